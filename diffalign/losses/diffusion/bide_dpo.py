"""BideDPO: several kinds of preference at once, the one that is worse off weighing more.

Paper: "BideDPO: Conditional Image Generation with Simultaneous Text and Condition Alignment", Zhou et al. 2025 (ICLR 2026),
arXiv 2511.19268. Code: limuloo/BideDPO, announced, none released; formulas second-hand (its rule of balance is quoted by a
later paper too).

Loss: sum over aspects a of w_a L_a, L_a the mean of Diffusion-DPO's loss over the pairs of that aspect and w_a = sg(L_a /
sum of L_b): with text and condition (two pairs per item, each differing in one of them only), (L_T^2 + L_C^2) / (L_T + L_C)
in value and w_a in slope. Shares are of *batch means*, gathered over all processes; of single items it would be another
method.

Not published, or not read: beta (no default), whether the two pairs of an item share timestep and noise (independent pairs
here), the reference (the model at the start of the round).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.losses.base import AnyLayout, Estimator, LossOut, Needs, detached, needs
from diffalign.losses.estimators import Gather, alone
from diffalign.losses.layouts import Layout, Pairs
from diffalign.losses.pairwise import LogisticPair
from diffalign.losses.scores import Cap, Kind, Scores


def need_aspect(pairs: Pairs) -> Tensor:
    """Which preference every pair is about, int64 (P,).

    Raises:
        ValueError: it is missing.
    """
    if pairs.aspect is None:
        raise ValueError(
            "pairs.aspect is missing; expected which preference a pair is about (0 text, 1 condition, ...)"
        )
    return pairs.aspect


def means_by_aspect(loss: Tensor, aspect: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss and number of pairs per aspect, (A,) each; 0 where there is none."""
    size = int(aspect.max()) + 1 if len(aspect) else 0
    zero = torch.zeros(size, dtype=loss.dtype, device=loss.device)
    count = zero.index_add(0, aspect, torch.ones_like(loss))
    return zero.index_add(0, aspect, loss) / count.clamp(min=1), count


class AspectMeans(Estimator):
    """Mean loss and number of pairs of every aspect over all processes; no memory.

    Stats: "aspect_loss" and "aspect_count", (A,).
    """

    def __init__(self, objective: BideDPO) -> None:
        self.objective = objective

    def update(self, scores: Scores, layout: Layout, gather: Gather = alone) -> dict[str, Tensor]:
        with torch.no_grad():
            loss = self.objective.pair_loss(scores, layout).per_item
        mean, count = means_by_aspect(gather(loss.detach()), gather(need_aspect(layout.need_pairs())))
        return {"aspect_loss": mean, "aspect_count": count}


@dataclass(frozen=True, kw_only=True)
class BideDPO(LogisticPair):
    """BideDPO (Zhou et al. 2025, arXiv 2511.19268; no public code).

    The sum over aspects of w_a L_a, L_a the mean of `dpo`'s loss over the pairs about aspect a (`pairs.aspect`: 0 text, 1
    condition, ...) and w_a = L_a / sum of L_b, detached: the worse objective gets the larger weight, and equal ones an equal
    share whatever their numbers of pairs. Means are over the batch of all processes; without statistics, over this batch
    alone. Losses per pair are scaled so that their mean is the published loss.
    """

    name: ClassVar[str] = "bide_dpo"
    title: ClassVar[str] = "BideDPO"
    paper: ClassVar[str] = "2511.19268"
    composition: ClassVar[str] = "log-ratio -> beta (w - l) -> logistic, aspects weighted by their share of the loss"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.DIFFERENCE,), stats=("aspect_loss", "aspect_count"))
    default_beta: ClassVar[Mapping[Kind, float]] = {}
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = (
        "no code is public; beta, the timestep sampler, and whether the pairs of an item share their noise"
    )

    def estimator(self) -> AspectMeans:
        return AspectMeans(self)

    def pair_loss(self, scores: Scores, layout: AnyLayout) -> LossOut:
        """DPO's loss per pair, before aspects are balanced."""
        return super().__call__(scores, layout)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs, out = Layout.of(layout).need_pairs(), self.pair_loss(scores, layout)
        aspect = need_aspect(pairs)
        if stats is not None and {"aspect_loss", "aspect_count"} <= stats.keys():
            mean, count = (stats[name].detach().to(out.per_item) for name in ("aspect_loss", "aspect_count"))
        else:
            mean, count = means_by_aspect(out.per_item.detach(), aspect)
        share = mean / mean.sum().clamp(min=1e-30)
        weight = share * count.sum() / count.clamp(min=1)
        per_aspect = {f"loss/aspect_{a}": out.per_item.detach()[aspect == a] for a in range(len(mean))}
        return LossOut(weight[aspect] * out.per_item, out.metrics | per_aspect | detached(weight=weight[aspect]))
