"""Diffusion-DPO as the core's DPO on denoising errors: what image batches become, and the published formula."""

import math
from types import SimpleNamespace

import pytest
import torch

from diffalign import losses
from diffalign.config import DenoisingConfig, NegativeConfig
from diffalign.data.batch import PairBatch
from diffalign.losses import Needs
from diffalign.losses.base import needs
from diffalign.policy import Policy
from diffalign.summary import images_per_pair, objective_summary

B = 3


def batch(p=1.0):
    g = torch.Generator().manual_seed(0)
    images = torch.randn(2, B, 4, 2, 2, generator=g)
    return PairBatch(
        ids=tuple("abc"),
        chosen=images[0],
        rejected=images[1],
        text={"hidden": torch.arange(B).float()},
        chosen_image={"size": torch.ones(B)},
        rejected_image={"size": torch.zeros(B)},
        p=torch.full((B,), p),
        weight=torch.tensor([1.0, 2.0, 0.5]),
        t=torch.tensor([5, 6, 7]),
        noise=torch.randn(B, 4, 2, 2, generator=g),
    )


class KnownErrors(Policy):
    """A policy whose errors are given; remembers what it was asked."""

    def __init__(self, error, reference):
        self.known, self.asked = (error, reference), None
        self.denoising = DenoisingConfig()

    def measure(self, rows, *, reference=True, old=False, residual=False, noising="forward"):
        self.asked = SimpleNamespace(
            x0=rows.x0, noise=rows.noise, t=rows.t, conditioning=rows.conditioning, reference=reference
        )
        return losses.Scores.denoising(self.known[0], self.known[1] if reference else None)


ERROR = torch.tensor([0.30, 0.20, 0.10, 0.40, 0.25, 0.15])
REFERENCE = torch.tensor([0.31, 0.19, 0.12, 0.39, 0.20, 0.15])


def run(objective, error=ERROR, reference=REFERENCE, p=1.0):
    return objective(*KnownErrors(error, reference).scores(batch(p), objective))


def test_the_published_formula():
    beta = 8.0
    (w, l), (rw, rl) = ERROR.chunk(2), REFERENCE.chunk(2)
    inside = -0.5 * beta * ((w - l) - (rw - rl))
    wanted = -torch.nn.functional.logsigmoid(inside) * batch().weight
    torch.testing.assert_close(run(losses.DPO(beta=beta)).per_item, wanted)


def test_metrics_are_errors_and_implicit_rewards():
    out = run(losses.DPO(beta=7.0))
    torch.testing.assert_close(out.metrics["error/chosen"], ERROR[:B])
    torch.testing.assert_close(out.metrics["error/rejected_ref"], REFERENCE[B:])
    torch.testing.assert_close(out.metrics["rewards/chosen"], -3.5 * (ERROR - REFERENCE)[:B])
    torch.testing.assert_close(out.metrics["rewards/rejected"], -3.5 * (ERROR - REFERENCE)[B:])


def test_lower_error_on_the_winner_lowers_the_loss():
    better = REFERENCE.clone()
    better[:B] -= 0.05
    assert (run(losses.DPO(beta=50.0), better).per_item < run(losses.DPO(beta=50.0), REFERENCE).per_item).all()


def test_differences_of_a_millionth_survive_beta_in_the_thousands():
    error = REFERENCE.clone()
    error[:B] -= 1e-6
    assert (run(losses.DPO(beta=5000.0), error).metrics["rewards/margins"] > 1e-3).all()


def test_chosen_rows_come_first_and_share_timestep_and_noise_with_the_rejected():
    policy = KnownErrors(ERROR, REFERENCE)
    _, layout = policy.scores(batch(), losses.DPO())
    asked = policy.asked
    assert torch.equal(asked.x0, torch.cat([batch().chosen, batch().rejected]))
    assert torch.equal(asked.noise[:B], asked.noise[B:])
    assert torch.equal(asked.t[:B], asked.t[B:])
    assert asked.conditioning["size"].tolist() == [1.0] * B + [0.0] * B
    assert asked.reference
    assert torch.equal(layout.pairs.w, torch.arange(B))
    assert torch.equal(layout.pairs.l, torch.arange(B) + B)


def test_a_tie_pulls_both_ways_equally():
    error = REFERENCE.clone().requires_grad_()
    run(losses.DPO(beta=8.0), error, p=0.5).loss.backward()
    torch.testing.assert_close(error.grad, torch.zeros(2 * B))


@pytest.mark.parametrize(("labels", "side", "label"), [((1,), "chosen", 1.0), ((0,), "rejected", 0.0)])
def test_objectives_on_one_label_see_one_side(labels, side, label):
    policy = KnownErrors(ERROR[:B], None)
    wanted = Needs(layout=("items",), reference=False, labels=labels)
    asking = SimpleNamespace(
        needs=wanted, reads_reference=lambda: False, required_caps=lambda kind: wanted.caps, noising="forward"
    )
    _, layout = policy.scores(batch(), asking)
    assert torch.equal(policy.asked.x0, getattr(batch(), side))
    assert not policy.asked.reference
    assert layout.items.label.tolist() == [label] * B
    assert torch.equal(layout.items.weight, batch().weight)


def test_objectives_on_items_see_both_sides_with_their_labels():
    wanted = needs("items")
    asking = SimpleNamespace(
        needs=wanted, reads_reference=lambda: True, required_caps=lambda kind: wanted.caps, noising="forward"
    )
    _, layout = KnownErrors(ERROR, REFERENCE).scores(batch(p=0.75), asking)
    assert layout.items.label.tolist() == [0.75] * B + [0.25] * B


@pytest.mark.parametrize(
    ("beta", "elements", "wanted"), [(5000.0, 4 * 128 * 128, 0.0381), (2000.0, 4 * 64 * 64, 0.0610)]
)
def test_beta_on_the_summed_error_is_the_known_one(beta, elements, wanted):
    config = SimpleNamespace(objective=losses.DPO(beta=beta), denoising=DenoisingConfig(), negative=NegativeConfig())
    summary = objective_summary(config, elements=elements)
    assert summary["beta_on_summed_error"] == pytest.approx(wanted, rel=2e-3)
    assert summary["beta_without_half"] == beta / 2


def test_the_default_beta_is_the_published_one():
    config = SimpleNamespace(objective=losses.DPO(), denoising=DenoisingConfig(), negative=NegativeConfig())
    assert objective_summary(config)["beta"] == 5000
    assert losses.DPO().initial_loss() == pytest.approx(math.log(2))


def test_images_per_pair():
    assert images_per_pair(losses.DPO()) == 2


@pytest.mark.parametrize(
    "values",
    [{"proportion_empty_prompts": 1.0}, {"timestep_min": 5, "timestep_max": 4}, {"timestep_min": -1}],
)
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values)).replace("timestep_min", "timestep")):
        DenoisingConfig(**values)
