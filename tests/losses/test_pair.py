"""The pair loss: identities of direct preference optimisation, and parity with TRL's."""

import math

import pytest
import torch

from diffalign import losses

BETA = 0.3


def scores(n=6, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=g, dtype=dtype) for _ in range(4)]


def test_policy_equal_to_reference_gives_log_two_and_half_beta_slopes():
    w, l, _, _ = scores()
    pw, pl = w.clone().requires_grad_(), l.clone().requires_grad_()
    out = losses.dpo(pw, pl, w, l, beta=BETA)
    torch.testing.assert_close(out.loss, torch.full((6,), math.log(2)))
    out.loss.sum().backward()
    torch.testing.assert_close(pw.grad, torch.full((6,), -BETA / 2))
    torch.testing.assert_close(pl.grad, torch.full((6,), BETA / 2))
    assert (out.accuracy == 0.5).all()


def test_logit_is_beta_times_the_difference_of_log_ratios():
    pw, pl, rw, rl = scores()
    out = losses.dpo(pw, pl, rw, rl, beta=BETA)
    torch.testing.assert_close(out.logits, BETA * ((pw - rw) - (pl - rl)))
    torch.testing.assert_close(out.chosen_reward - out.rejected_reward, out.logits)
    torch.testing.assert_close(out.chosen_reward, BETA * (pw - rw))


def test_swapping_chosen_and_rejected_flips_the_logit_and_changes_the_loss_by_it():
    pw, pl, rw, rl = scores()
    out, swapped = losses.dpo(pw, pl, rw, rl, beta=BETA), losses.dpo(pl, pw, rl, rw, beta=BETA)
    torch.testing.assert_close(swapped.logits, -out.logits)
    torch.testing.assert_close(swapped.loss - out.loss, out.logits)
    torch.testing.assert_close(swapped.accuracy, 1 - out.accuracy)


def test_adding_a_constant_to_all_scores_changes_nothing():
    pw, pl, rw, rl = scores(dtype=torch.float64)
    a = losses.dpo(pw, pl, rw, rl, beta=BETA)
    b = losses.dpo(pw + 3, pl + 3, rw + 3, rl + 3, beta=BETA)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=1e-6)


def test_better_chosen_score_lowers_the_loss():
    pw, pl, rw, rl = scores()
    assert (losses.dpo(pw + 1, pl, rw, rl, beta=BETA).loss < losses.dpo(pw, pl, rw, rl, beta=BETA).loss).all()
    assert (losses.dpo(pw, pl + 1, rw, rl, beta=BETA).loss > losses.dpo(pw, pl, rw, rl, beta=BETA).loss).all()


def test_reference_gets_no_gradient():
    pw, pl, rw, rl = (s.requires_grad_() for s in scores())
    losses.dpo(pw, pl, rw, rl, beta=BETA).loss.sum().backward()
    assert pw.grad is not None
    assert rw.grad is None
    assert rl.grad is None


def test_without_a_reference_the_scores_themselves_are_compared():
    pw, pl, _, _ = scores()
    zeros = torch.zeros(6)
    a = losses.dpo(pw, pl, None, None, beta=BETA)
    torch.testing.assert_close(a.loss, losses.dpo(pw, pl, zeros, zeros, beta=BETA).loss)


def test_smoothing_mixes_the_two_orders_and_one_half_would_be_symmetric():
    pw, pl, rw, rl = scores()
    plain, swapped = losses.dpo(pw, pl, rw, rl, beta=BETA), losses.dpo(pl, pw, rl, rw, beta=BETA)
    smooth = losses.dpo(pw, pl, rw, rl, beta=BETA, label_smoothing=0.2)
    torch.testing.assert_close(smooth.loss, 0.8 * plain.loss + 0.2 * swapped.loss)
    tie = losses.dpo(pw, pl, rw, rl, beta=BETA, p=torch.full((6,), 0.5))
    torch.testing.assert_close(tie.loss, losses.dpo(pl, pw, rl, rw, beta=BETA, p=torch.full((6,), 0.5)).loss)


def test_permuting_pairs_permutes_losses():
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    s = scores()
    torch.testing.assert_close(
        losses.dpo(*(x[order] for x in s), beta=BETA).loss, losses.dpo(*s, beta=BETA).loss[order]
    )


def test_extreme_scores_give_no_nan():
    big = torch.tensor([1e4, -1e4])
    s = [big.clone().requires_grad_(), (-big).requires_grad_(), torch.zeros(2), torch.zeros(2)]
    for kind in ("sigmoid", "robust", "hinge", "ipo"):
        out = losses.dpo(*s, beta=BETA, loss_type=kind, label_noise=0.1 if kind == "robust" else 0.0)
        out.loss.sum().backward()
        assert out.loss.isfinite().all()
        assert s[0].grad.isfinite().all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"label_smoothing": 0.5},
        {"label_smoothing": 0.1, "loss_type": "hinge"},
        {"label_noise": 0.1},
        {"loss_type": "sigmod"},
        {"loss_type": "robust", "label_noise": 0.5},
    ],
)
def test_rates_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=r"label|loss_type"):
        losses.dpo(*scores(), beta=BETA, **wrong)


def test_gradients_match_finite_differences():
    s = [x.double().requires_grad_() for x in scores(3)]

    def total(pw, pl):
        # The float64 path of the same composition: the public function computes in float32 by contract.
        z = BETA * ((pw - s[2].detach()) - (pl - s[3].detach()))
        return -torch.nn.functional.logsigmoid(z)

    assert torch.autograd.gradcheck(total, (s[0], s[1]))
    ours = losses.dpo(*(x.float() for x in s), beta=BETA).loss
    torch.testing.assert_close(ours, total(s[0], s[1]).float())
    ours.sum().backward()
    by_formula = -BETA * torch.sigmoid(-BETA * ((s[0] - s[2]) - (s[1] - s[3])))
    torch.testing.assert_close(s[0].grad, by_formula.detach(), rtol=1e-5, atol=1e-6)


def test_importing_the_core_needs_torch_alone():
    import subprocess
    import sys

    code = (
        "import sys, diffalign.losses\n"
        "heavy = {'diffusers', 'transformers', 'accelerate', 'peft', 'open_clip'} & set(sys.modules)\n"
        "ours = {m for m in sys.modules if m.startswith('diffalign.') and not m.startswith('diffalign.losses')}\n"
        "assert not heavy and not ours, (heavy, ours)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
