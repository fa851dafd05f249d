"""Every `loss_type` of TRL's DPOTrainer, with its divergences, weights and lengths, against ours."""

import math
from types import SimpleNamespace

import pytest
import torch
from trl.experimental.online_dpo.online_dpo_trainer import OnlineDPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl_stubs import (
    DOUBLE,
    DTYPES,
    LOSS_TYPES,
    SINGLE,
    TOLERANCE,
    Model,
    assert_parity,
    model_output,
    ragged_mask,
    run_statements,
    sequence_inputs,
    token_logps,
    trainer,
)

from diffalign import losses
from diffalign.losses import Pairs, Scores

PAIRS = 4

F_TYPES = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"]
# TRL refuses sorted pairs; sppo is no base of ours; hinge and sft: see the end of this file.
WPO_TYPES = [t for t in LOSS_TYPES if t not in ("aot", "aot_unpaired", "sppo_hard", "hinge", "sft")]
F_NAMES = {"forward_kl": "forward_kl", "js": "js_divergence", "alpha": "alpha_divergence"}


class Batch:
    """Ragged pairs: tensors for TRL, `Scores` for us."""

    def __init__(self, seed, dtype):
        self.mask = ragged_mask(2 * PAIRS, 8, seed)
        self.theta = token_logps(self.mask, seed + 1, dtype).requires_grad_()
        self.ref = token_logps(self.mask, seed + 2, dtype, near=self.theta)
        self.log_sum_p2 = token_logps(self.mask, seed + 3, dtype)

    def scores(self, **more):
        return Scores.tokens(self.theta, self.ref, mask=self.mask, **more)

    def trl(self, *loss_types, weights=None, beta=0.1, **settings):
        """TRL's loss."""
        stub = trainer(
            ref_model=Model(**model_output(self.ref, self.mask)),
            loss_types=list(loss_types),
            loss_weights=weights or [1.0] * len(loss_types),
            beta=beta,
            label_smoothing=settings.pop("label_smoothing", 0.0),
            f_divergence_type=settings.pop("f_divergence_type", "reverse_kl"),
            f_alpha_divergence_coef=settings.pop("f_alpha", 0.5),
            ld_alpha=settings.pop("ld_alpha", None),
            use_weighting=settings.pop("use_weighting", False),
            precompute_ref_logps=False,
            args=SimpleNamespace(discopop_tau=settings.pop("tau", 0.05), gradient_checkpointing_kwargs=None),
        )
        assert not settings
        model = Model(**model_output(self.theta, self.mask, self.log_sum_p2))
        return DPOTrainer._compute_loss(stub, model, sequence_inputs(self.mask), False), stub._metrics["train"]

    def ours(self, name, *, beta=0.1, scores=None, **settings):
        """Our loss."""
        objective = losses.find(name)(beta=beta, **settings)
        return objective(scores or self.scores(), Pairs.halves(PAIRS))


@DTYPES
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_types(loss_type, dtype):
    name, mine, theirs = LOSS_TYPES[loss_type]
    for seed, beta in ((0, 0.1), (10, 0.5)):
        batch = Batch(seed, dtype)
        trl, _ = batch.trl(loss_type, beta=beta, **theirs)
        assert_parity(trl, batch.ours(name, beta=beta, **mine).loss, batch.theta, TOLERANCE[dtype])


@SINGLE
@pytest.mark.parametrize("loss_type", F_TYPES)
@pytest.mark.parametrize("divergence", F_NAMES)
def test_f_divergences(divergence, loss_type, dtype):
    base, mine, theirs = LOSS_TYPES[loss_type]
    batch = Batch(20, dtype)
    trl, _ = batch.trl(loss_type, f_divergence_type=F_NAMES[divergence], **theirs)
    ours = batch.ours("f_dpo", base=base, settings=mine, divergence=divergence)
    assert_parity(trl, ours.loss, batch.theta, TOLERANCE[dtype])


@DOUBLE
@pytest.mark.parametrize("divergence", ["forward_kl", "js"])
def test_f_divergences_in_double_precision(divergence, dtype):
    """TRL's alpha divergence has no float64."""
    batch = Batch(21, dtype)
    trl, _ = batch.trl("sigmoid", f_divergence_type=F_NAMES[divergence])
    assert_parity(trl, batch.ours("f_dpo", divergence=divergence).loss, batch.theta, TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("loss_type", WPO_TYPES)
def test_weighted_preference_optimisation(loss_type, dtype):
    base, mine, theirs = LOSS_TYPES[loss_type]
    batch = Batch(30, dtype)
    trl, _ = batch.trl(loss_type, use_weighting=True, **theirs)
    scores = batch.scores(vocabulary={"log_sum_p2": batch.log_sum_p2})
    ours = batch.ours("wpo", scores=scores, base=base, settings=mine)
    assert_parity(trl, ours.loss, batch.theta, TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_length_desensitised(alpha, dtype):
    batch = Batch(40, dtype)
    trl, _ = batch.trl("sigmoid", ld_alpha=alpha)
    assert_parity(trl, batch.ours("ld_dpo", alpha=alpha).loss, batch.theta, TOLERANCE[dtype])


@DTYPES
def test_imitation(dtype):
    """The mean over all tokens of chosen responses, by itself and as a part of a mixture."""
    batch = Batch(45, dtype)
    ours = losses.find("sft")()(batch.scores(), Pairs.halves(PAIRS))
    assert_parity(batch.trl("sft")[0], ours.loss, batch.theta, TOLERANCE[dtype])


@DTYPES
def test_regularised_by_imitation(dtype):
    batch = Batch(50, dtype)
    trl, _ = batch.trl("sigmoid", "sft", weights=[1.0, 0.005], beta=0.01)
    assert_parity(trl, batch.ours("rpo", beta=0.01).loss, batch.theta, TOLERANCE[dtype])
    trl, _ = batch.trl("sigmoid", "sft", weights=[1.0, 1.0])
    assert_parity(trl, batch.ours("iterative_rpo", sft_weight=1.0).loss, batch.theta, TOLERANCE[dtype])


@DTYPES
def test_mixed_preference_optimisation(dtype):
    batch = Batch(60, dtype)
    trl, _ = batch.trl("sigmoid", "bco_pair", "sft", weights=[0.8, 0.2, 1.0])
    assert_parity(trl, batch.ours("mixed").loss, batch.theta, TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize(("loss_type", "ours"), [("sigmoid", ("dpo", {})), ("ipo", ("ipo", {"reduction": "sum"}))])
def test_online_trainer(loss_type, ours, dtype):
    """The same losses on fresh pairs. Its `ipo` is on sums, the offline one on means per token: ours says which."""
    batch = Batch(65, dtype)
    stub = trainer(beta=0.1, args=SimpleNamespace(loss_type=loss_type))
    names = {
        "self": stub,
        "batch_size": PAIRS,
        "cr_logprobs": batch.theta,
        "cr_ref_logprobs": batch.ref,
        "cr_padding_mask": ~batch.mask,
    }
    scope = run_statements(OnlineDPOTrainer.training_step, "cr_logprobs_sum =", "loss = losses.mean()", names)
    name, settings = ours
    assert_parity(scope["loss"], batch.ours(name, **settings).loss, batch.theta, TOLERANCE[dtype])


def test_metrics_agree():
    batch = Batch(70, torch.float32)
    _, trl = batch.trl("sigmoid")
    ours = batch.ours("dpo").metrics
    for name, theirs in (("implicit_acc", "rewards/accuracies"), ("rewards/margins",) * 2, ("rewards/chosen",) * 2):
        assert ours[name].mean().item() == pytest.approx(trl[theirs][0], rel=1e-5)
    assert ours["logps/rejected"].mean().item() == pytest.approx(trl["logps/rejected"][0], rel=1e-5)


# -- where TRL differs: checked against the formula --------------------------------------------------------------------


def test_trl_ignores_label_smoothing_in_sigmoid():
    """Conservative DPO is gone from `sigmoid`; ours is the mixture, as TRL still computes it for its sorted pairs."""
    batch = Batch(80, torch.float32)
    smoothed, plain = batch.trl("sigmoid", label_smoothing=0.2)[0], batch.trl("sigmoid")[0]
    assert smoothed.item() == plain.item()
    z = batch.ours("dpo").metrics["rewards/margins"]
    expected = (0.8 * torch.nn.functional.softplus(-z) + 0.2 * torch.nn.functional.softplus(z)).mean()
    torch.testing.assert_close(batch.ours("dpo", label_smoothing=0.2).loss.detach(), expected)


def test_trl_does_not_halve_sppo():
    """Paper and official code are half of TRL's sppo_hard."""
    batch = Batch(90, torch.float32)
    trl, _ = batch.trl("sppo_hard", beta=1e-3)
    official = batch.ours("sppo", beta=1e-3, win_rate="hard")
    torch.testing.assert_close(official.loss, 0.5 * trl)


def test_trl_bco_pair_has_no_shift():
    """Its code is the absolute form, not DPO's formula that its documentation prints; `bco` has the shift."""
    batch = Batch(100, torch.float32)
    trl, _ = batch.trl("bco_pair")
    rho = batch.scores().log_ratio().detach() * 0.1
    absolute = torch.nn.functional.softplus(-rho[:PAIRS]) + torch.nn.functional.softplus(rho[PAIRS:])
    torch.testing.assert_close(trl.detach(), absolute.mean())
    assert abs(trl.item() - batch.trl("sigmoid")[0].item()) > 0.1


def test_trl_alpha_divergence_is_the_reverse_kl_at_one():
    batch = Batch(110, torch.float32)
    trl, _ = batch.trl("sigmoid", f_divergence_type="alpha_divergence", f_alpha=1.0)
    torch.testing.assert_close(batch.ours("f_dpo", divergence="alpha", alpha=1.0).loss, trl)
    torch.testing.assert_close(batch.ours("dpo").loss, trl)


def test_discopop_starts_the_wrong_way_in_both():
    """At its default tau the slope at the reference raises the loss with the margin."""
    batch = Batch(120, torch.float32)
    batch.ref = batch.theta.detach()
    trl, _ = batch.trl("discopop", beta=0.05)
    (slope,) = torch.autograd.grad(trl, batch.theta)
    assert slope[:PAIRS].sum() > 0
    assert trl.item() == pytest.approx(0.5 * math.log(2) + 0.5, rel=1e-5)
    assert_parity(batch.trl("discopop", beta=0.05)[0], batch.ours("discopop", beta=0.05).loss, batch.theta, 1e-5)


def test_trl_cannot_train_weighted_hinge_or_imitation():
    """It multiplies in place what relu needs for its gradient, and what `expand` made of one number."""
    batch = Batch(130, torch.float32)
    trl, _ = batch.trl("hinge", use_weighting=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(trl, batch.theta)
    with pytest.raises(RuntimeError, match="more than one element"):
        batch.trl("sft", use_weighting=True)
    ours = batch.ours("wpo", scores=batch.scores(vocabulary={"log_sum_p2": batch.log_sum_p2}), base="hinge")
    torch.testing.assert_close(ours.loss, trl)
    z = batch.ours("dpo").metrics["rewards/margins"]
    mean = (batch.theta.detach() - batch.log_sum_p2).sum(1) / batch.mask.sum(1)
    expected = (mean[:PAIRS] + mean[PAIRS:]).exp() * torch.relu(1 - z)
    torch.testing.assert_close(ours.per_item.detach(), expected)
    assert torch.isfinite(torch.autograd.grad(ours.loss, batch.theta)[0]).all()
