"""TRL's KTOTrainer against our unpaired objectives."""

import pytest
import torch
from trl.trainer.kto_trainer import KTOTrainer
from trl_stubs import (
    DTYPES,
    TOLERANCE,
    Model,
    assert_parity,
    model_output,
    ragged_mask,
    sequence_inputs,
    token_logps,
    trainer,
)

from diffalign import losses
from diffalign.losses import Items, Layout, Scores

ROWS = 6


class Batch:
    """Labelled responses, and the mismatched ones of the reference point."""

    def __init__(self, seed, dtype, labels=(1, 0, 1, 1, 0, 0), drift=0.0):
        self.mask = ragged_mask(ROWS, 7, seed)
        self.theta = token_logps(self.mask, seed + 1, dtype).requires_grad_()
        self.ref = token_logps(self.mask, seed + 2, dtype, near=self.theta)
        self.labels = torch.tensor(labels)
        g = torch.Generator().manual_seed(seed)
        self.kl = (torch.randn(ROWS, generator=g, dtype=torch.float64) + drift).to(dtype)

    def trl(self, loss_type="kto", *, weights=(1.0, 1.0), beta=0.1):
        stub = trainer(
            loss_type=loss_type,
            beta=beta,
            desirable_weight=weights[0],
            undesirable_weight=weights[1],
            calculate_KL=loss_type == "kto",
            precompute_ref_logps=True,
            _compute_kl_logps=lambda model, batch: self.kl - 9.0,
        )
        inputs = sequence_inputs(self.mask) | {
            "label": self.labels,
            "ref_logps": (self.ref * self.mask).sum(1),
            "ref_KL_logps": torch.full_like(self.kl, -9.0),
        }
        return KTOTrainer._compute_loss(stub, Model(**model_output(self.theta, self.mask)), inputs, False)

    def ours(self, name="kto", *, weights=(1.0, 1.0), beta=0.1):
        """Matched rows first, then one mismatched row for each."""
        zero = torch.zeros(ROWS, dtype=self.kl.dtype)
        scores = Scores.tokens(self.theta, self.ref, mask=self.mask)
        scores = Scores.tokens(torch.cat([scores.theta, self.kl]), torch.cat([scores.ref, zero]))
        items = Items(
            index=torch.arange(ROWS), label=self.labels.to(zero.dtype), mismatched=torch.arange(ROWS, 2 * ROWS)
        )
        objective = losses.find(name)(beta=beta, desirable_weight=weights[0], undesirable_weight=weights[1])
        estimator = objective.estimator()
        stats = {} if estimator is None else estimator.update(scores, Layout(items=items))
        return objective(scores, items, stats).loss


@DTYPES
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.75)])
@pytest.mark.parametrize("drift", [2.0, -2.0], ids=["above zero", "clamped"])
def test_kto(weights, drift, dtype):
    batch = Batch(0, dtype, drift=drift)
    assert_parity(batch.trl(weights=weights), batch.ours(weights=weights), batch.theta, TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("labels", [(1,) * ROWS, (0,) * ROWS], ids=["all desirable", "all undesirable"])
def test_one_class_only(labels, dtype):
    batch = Batch(1, dtype, labels=labels, drift=1.0)
    assert_parity(batch.trl(), batch.ours(), batch.theta, TOLERANCE[dtype])


@DTYPES
def test_apo_zero_unpaired(dtype):
    batch = Batch(2, dtype)
    trl = batch.trl("apo_zero_unpaired", weights=(1.5, 0.75), beta=0.3)
    ours = batch.ours("apo_zero_unpaired", weights=(1.5, 0.75), beta=0.3)
    assert_parity(trl, ours, batch.theta, TOLERANCE[dtype])
