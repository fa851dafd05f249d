"""Reductions from units to rows and from rows to one number.

The trainer averages `per_item` over everything in an optimiser step. Reductions over units therefore return values whose
*mean over rows* is the wanted average, using the counts of the whole step (`Totals`) where they are known, so that the
same step split into more micro-batches or processes has the same loss.

Shapes: N rows, U units.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from diffalign.losses.scores import Scores, Totals, lift

UnitReduction = Literal["seq_mean", "token_mean", "constant", "seq_sum"]
WeightReduction = Literal["mean", "weighted_mean"]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the masked units of every row, (N,); 0 for a row without any."""
    x = lift(x)
    return x.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def reduce_units(
    x: Tensor,
    mask: Tensor,
    mode: UnitReduction,
    *,
    constant: float | None = None,
    totals: Totals | None = None,
) -> Tensor:
    """Values per unit, (N, U), to values per row, (N,), to be averaged over rows.

    Args:
        x: per unit; whatever stands where `mask` is False is ignored, NaN included.
        mask: bool (N, U).
        mode: "seq_mean": mean over the row's units. "token_mean": mean over all units of the step (a long row counts for
            more). "constant": sum / `constant`, as Dr. GRPO divides by the longest allowed length. "seq_sum": sum.
        constant: for "constant".
        totals: counts of the step; None takes these rows for all.
    """
    sums = lift(x).masked_fill(~mask, 0.0).sum(1)
    if mode == "seq_sum":
        return sums
    if mode == "seq_mean":
        return sums / mask.sum(1).clamp(min=1)
    if mode == "constant":
        if not constant:
            raise ValueError("reduction 'constant' needs the constant to divide by")
        return sums / constant
    if mode == "token_mean":
        items, units = (len(sums), mask.sum()) if totals is None else (totals.items, totals.units)
        return sums * items / (units.clamp(min=1) if isinstance(units, Tensor) else max(units, 1.0))
    raise ValueError(f"reduction is {mode!r}; expected seq_mean, token_mean, constant or seq_sum")


def imitation(
    scores: Scores,
    rows: Tensor,
    reduction: Literal["token", "sequence"] = "token",
    *,
    prompt: bool = False,
    units: float | None = None,
) -> Tensor:
    """The imitation (SFT) loss of some rows, (R,), to be averaged over them.

    Args:
        scores: with `imitation`; nats for tokens, squared error for denoising.
        rows: int64 (R,): the chosen rows of all pairs, or the items to imitate.
        reduction: "token": mean over all units of those rows in the step, as TRL does; "sequence": mean over rows of each
            row's own mean, as the official RPO code does. Equal where lengths are, and on denoising scores.
        prompt: imitate the tokens of the prompt as well (`prompt_imitation`, `prompt_length`).
        units: units of all such rows in the step; None takes `totals.chosen_units` (with the prompt's, where it counts), or
            counts these rows where there are no totals.

    Raises:
        ValueError: there is no imitation loss.
    """
    loss, length = scores.need_imitation()[rows], scores.length
    if prompt:
        if scores.prompt_imitation is None or scores.prompt_length is None:
            raise ValueError(
                "this objective imitates the prompt too; scores.prompt_imitation or prompt_length is missing"
            )
        loss = loss + scores.prompt_imitation[rows]
        length = None if length is None else length + scores.prompt_length
    if length is None:
        return loss
    if reduction == "sequence":
        return loss / length[rows].clamp(min=1)
    totals = scores.totals
    if totals is None:
        return loss * len(rows) / length[rows].sum().clamp(min=1)
    if units is None:
        units = (totals.chosen_units or totals.units) + (totals.chosen_prompt_units if prompt else 0.0)
    return loss * totals.items / max(units, 1.0)


def normalised_weight(weight: Tensor, reduction: WeightReduction) -> Tensor:
    """Weights whose mean with the losses is mean(w l) or sum(w l) / sum(w), (P,).

    The second takes the weights of this call for all there are; give weights that average to 1 over the data where a step
    has several micro-batches.
    """
    if reduction == "mean":
        return weight
    return weight * len(weight) / weight.sum().clamp(min=1e-30)
