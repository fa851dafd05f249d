"""Diffusion-DPO and SFT on a policy whose errors are known: what is compared with what, and by how much."""

import math

import pytest
import torch

from diffalign.data.batch import PairBatch
from diffalign.objectives.dpo import DPO
from diffalign.objectives.sft import SFT
from diffalign.schedules import generator_for


class KnownErrors:
    """Stands in for `Policy`: remembers what it was asked, answers with given errors (winners first)."""

    def __init__(self, policy, reference):
        self.policy, self.reference, self.asked = policy, reference, None

    def errors(self, x0, noise, t, conditioning, *, space="native", reduction="mean", reference=True):
        self.asked = {"x0": x0, "noise": noise, "t": t, "conditioning": conditioning, "space": space}
        return self.policy[: len(x0)], (self.reference[: len(x0)] if reference else None)


def batch(n=3, p=1.0):
    g = torch.Generator().manual_seed(0)
    image = (n, 2, 4, 4)
    return PairBatch(
        ids=tuple(f"pair{i}" for i in range(n)),
        chosen=torch.randn(image, generator=g),
        rejected=torch.randn(image, generator=g),
        text={"encoder_hidden_states": torch.randn(n, 5, 8, generator=g)},
        chosen_image={"time_ids": torch.full((n, 6), 1.0)},
        rejected_image={"time_ids": torch.full((n, 6), 2.0)},
        p=torch.full((n,), p),
        weight=torch.ones(n),
        t=torch.tensor([10, 500, 900][:n]),
        noise=torch.randn(image, generator=g),
    )


def errors(seed=0, n=6):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=g) + 0.1


def test_logit_is_minus_half_beta_times_the_difference_of_error_differences():
    policy, reference = errors(1), errors(2)
    out = DPO(beta_dpo=7.0)(KnownErrors(policy, reference), batch())
    w, l = slice(0, 3), slice(3, 6)
    z = -0.5 * 7.0 * ((policy[w] - policy[l]) - (reference[w] - reference[l]))
    torch.testing.assert_close(out.metrics["rewards/margins"], z)
    torch.testing.assert_close(out.loss, -torch.nn.functional.logsigmoid(z))
    torch.testing.assert_close(out.metrics["implicit_acc"], (z > 0).float())
    torch.testing.assert_close(out.metrics["rewards/chosen"], -0.5 * 7.0 * (policy[w] - reference[w]))


def test_at_the_reference_the_loss_is_log_two_and_the_slopes_are_a_quarter_of_beta():
    reference = errors()
    policy = reference.clone().requires_grad_()
    out = DPO(beta_dpo=8.0)(KnownErrors(policy, reference), batch())
    torch.testing.assert_close(out.loss.detach(), torch.full((3,), math.log(2)))
    out.loss.sum().backward()
    torch.testing.assert_close(policy.grad, torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0]))
    assert (out.metrics["implicit_acc"] == 0.5).all()


def test_a_lower_error_of_the_chosen_image_lowers_the_loss():
    reference = errors()
    better = reference.clone()
    better[:3] -= 0.05
    at, below = (
        DPO(beta_dpo=50.0)(KnownErrors(reference, reference), batch()),
        DPO(beta_dpo=50.0)(KnownErrors(better, reference), batch()),
    )
    assert (below.loss < at.loss).all()


def test_winner_and_loser_share_timestep_and_noise_and_keep_their_own_conditioning():
    policy, b = KnownErrors(errors(), errors()), batch()
    DPO()(policy, b)
    asked = policy.asked
    assert torch.equal(asked["x0"], torch.cat([b.chosen, b.rejected]))
    assert torch.equal(asked["noise"][:3], asked["noise"][3:])
    assert torch.equal(asked["noise"][:3], b.noise)
    assert torch.equal(asked["t"], torch.cat([b.t, b.t]))
    assert torch.equal(asked["conditioning"]["time_ids"][:, 0], torch.tensor([1.0, 1, 1, 2, 2, 2]))
    text = asked["conditioning"]["encoder_hidden_states"]
    assert torch.equal(text[:3], text[3:])


def test_adding_a_constant_to_all_four_errors_changes_nothing():
    policy, reference = errors(1), errors(2)
    a = DPO(beta_dpo=5.0)(KnownErrors(policy, reference), batch())
    b = DPO(beta_dpo=5.0)(KnownErrors(policy + 3, reference + 3), batch())
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-4, atol=1e-5)


def test_the_half_precision_scripts_beta_is_half_of_ours():
    # The diffusers SD1.5 script multiplies the un-halved difference by 2500.
    policy, reference = errors(1), errors(2)
    w, l = slice(0, 3), slice(3, 6)
    theirs = 2500 * ((reference[w] - reference[l]) - (policy[w] - policy[l]))
    out = DPO(beta_dpo=5000.0)(KnownErrors(policy, reference), batch())
    torch.testing.assert_close(out.metrics["rewards/margins"], theirs, rtol=1e-4, atol=1e-2)
    assert DPO(beta_dpo=5000.0).summary()["beta_without_half"] == 2500


def test_beta_on_the_summed_error():
    assert DPO(beta_dpo=5000.0).summary(4 * 128 * 128)["beta_on_summed_error"] == pytest.approx(0.0381, rel=2e-3)
    assert DPO(beta_dpo=2000.0).summary(4 * 64 * 64)["beta_on_summed_error"] == pytest.approx(0.0610, rel=2e-3)


def test_a_tie_pulls_neither_way():
    reference = errors()
    policy = reference.clone().requires_grad_()
    out = DPO(beta_dpo=8.0)(KnownErrors(policy, reference), batch(p=0.5))
    out.loss.sum().backward()
    torch.testing.assert_close(policy.grad, torch.zeros(6))


@pytest.mark.parametrize(
    ("objective", "value"),
    [
        (DPO(), math.log(2)),
        (DPO(loss_type="robust", label_noise=0.1), math.log(2)),
        (DPO(loss_type="hinge"), 1.0),
        (DPO(loss_type="ipo"), 0.25),
        (DPO(loss_type="ipo", ipo_scale="paper", beta_dpo=0.5), 1.0),
    ],
)
def test_the_stated_initial_loss_is_the_loss_at_the_reference(objective, value):
    reference = errors()
    out = objective(KnownErrors(reference.clone(), reference), batch())
    torch.testing.assert_close(out.loss, torch.full((3,), value))
    assert objective.initial_loss() == pytest.approx(value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta_dpo": 0.0},
        {"label_smoothing": 0.6},
        {"label_noise": 0.2},
        {"proportion_empty_prompts": 1.0},
        {"timestep_min": 5, "timestep_max": 4},
    ],
)
def test_settings_that_mean_nothing_are_refused_when_the_config_is_built(wrong):
    with pytest.raises(ValueError):
        DPO(**wrong)


def test_sft_is_the_winners_error_and_looks_at_no_loser():
    policy = KnownErrors(errors(), None)
    b = batch()
    out = SFT()(policy, b)
    torch.testing.assert_close(out.loss, policy.policy[:3])
    assert torch.equal(policy.asked["x0"], b.chosen)
    assert SFT().initial_loss() is None


def test_draws_are_uniform_over_the_allowed_timesteps_and_repeatable():
    objective = DPO(timestep_min=100, timestep_max=199, proportion_empty_prompts=0.25)
    draws = [objective.draw(generator_for(0, f"s{i}"), (1, 2, 2), 1000) for i in range(2000)]
    times = torch.tensor([t for t, _, _ in draws]).float()
    assert times.min() >= 100
    assert times.max() <= 199
    assert abs(float(times.mean()) - 149.5) < 3
    dropped = sum(d for _, _, d in draws) / len(draws)
    assert abs(dropped - 0.25) < 0.04
    again = objective.draw(generator_for(0, "s7"), (1, 2, 2), 1000)
    assert again[0] == draws[7][0]
    assert torch.equal(again[1], draws[7][1])


def test_timesteps_reach_both_ends_of_the_schedule():
    times = {DPO().draw(generator_for(0, f"s{i}"), (1,), 4)[0] for i in range(200)}
    assert times == {0, 1, 2, 3}
