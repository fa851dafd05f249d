"""Alignment via optimal transport: compare sorted samples instead of pairs (Melnyk et al. 2024, arXiv 2406.05882).

Asks for first-order stochastic dominance: every quantile of one distribution above the same quantile of the other. On the
line the optimal coupling is by rank, so both objectives sort, and each rank gets a logistic loss. What is compared therefore
depends on the batch, and a rank belongs to no particular pair.

Sorting is over what one process holds, as in TRL, or over all processes with `global_sort`, whose estimator collects the
values; larger batches estimate quantiles better, and accumulated micro-batches are sorted one by one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.losses.base import AnyLayout, Estimator, LossOut, Needs, needs
from diffalign.losses.layouts import Layout, Pairs
from diffalign.losses.pairwise import LogisticPair, pair_metrics
from diffalign.losses.scores import Kind, Scores


def _same_for_all(value: Tensor | float, name: str) -> Tensor | float:
    """The value, if it is the same for every pair.

    Raises:
        ValueError: it is not, and after sorting there is no saying which pair it belongs to.
    """
    if isinstance(value, Tensor) and bool((value != value.flatten()[:1]).any()):
        raise ValueError(
            f"aot sorts the batch, so a {name} per pair belongs to nothing; give all pairs the same {name}, or use dpo"
        )
    return value


@dataclass(frozen=True, kw_only=True)
class SortedPairs(LogisticPair):
    """Base of both: z of rank k = beta (k-th smallest of `upper` - k-th smallest of `lower`).

    Attributes:
        label_smoothing: as in `dpo`; TRL uses it here.
        global_sort: sort over all processes instead of each one's own pairs.
    """

    global_sort: bool = False

    needs: ClassVar[Needs] = needs("pairs")
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 0.01}

    @abstractmethod
    def samples(self, scores: Scores, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """The two samples, (P,) each: what should dominate, and what should be dominated."""

    def estimator(self) -> Estimator | None:
        return GlobalOrder(self) if self.global_sort else None

    def couple(self, upper: Tensor, lower: Tensor, stats: Mapping[str, Tensor]) -> list[Tensor]:
        """Differences of equal ranks, (P,) each; two of them where a process holds only its share of every coupling."""
        if not self.global_sort:
            return [upper.sort().values - lower.sort().values]
        if "samples" not in stats:
            raise ValueError("global_sort needs the values of all processes; call with the estimator's stats")
        above, below = stats["samples"]
        return [
            upper - partners(upper, above, below),
            partners(lower, below, above) - lower,
        ]

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs = Layout.of(layout).need_pairs()
        beta = self.beta_for(scores.kind)
        p, weight, margin = (_same_for_all(getattr(pairs, name), name) for name in ("p", "weight", "margin"))
        parts = [self.link(beta * d - margin, p, beta) for d in self.couple(*self.samples(scores, pairs), stats or {})]
        loss = parts[0]
        if len(parts) == 2:
            # Each side holds the other fixed. Their sum counts every coupling twice in the value, once in the gradient.
            loss = parts[0] + parts[1]
            loss = loss - 0.5 * loss.detach()
        w, l = (beta * scores.log_ratio()[rows] for rows in (pairs.w, pairs.l))
        return LossOut(weight * loss, pair_metrics(w - l, w, l, scores, pairs))


def partners(x: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Of every x, the value in `other` at x's rank in `own`; both sorted, (Q,), without gradient. Ties share a rank."""
    return other[torch.searchsorted(own, x.detach().contiguous()).clamp(max=len(own) - 1)]


class GlobalOrder(Estimator):
    """Both samples of all processes, the upper and the lower, sorted: `samples`, (2, Q)."""

    def __init__(self, objective: SortedPairs) -> None:
        self._objective = objective

    def update(
        self, scores: Scores, layout: Layout, gather: Callable[[Tensor], Tensor] = lambda x: x
    ) -> dict[str, Tensor]:
        samples = self._objective.samples(scores, layout.need_pairs())
        return {"samples": torch.stack([gather(x.detach()).sort().values for x in samples])}


@dataclass(frozen=True, kw_only=True)
class AOT(SortedPairs):
    """AOT, paired: the policy's margins should dominate the reference's (arXiv 2406.05882).

    d = sort(theta_w - theta_l) - sort(ref_w - ref_l), then -log sigma(beta d).

    beta: 0.01 on tokens (paper, as TRL quotes it).
    """

    name: ClassVar[str] = "aot"
    title: ClassVar[str] = "AOT"
    paper: ClassVar[str] = "2406.05882"
    composition: ClassVar[str] = "sorted policy margins - sorted reference margins -> beta -> logistic"
    parity: ClassVar[str] = "TRL DPOTrainer aot"

    def samples(self, scores: Scores, pairs: Pairs) -> tuple[Tensor, Tensor]:
        theta, ref = scores.theta, scores.need_ref()
        return theta[pairs.w] - theta[pairs.l], ref[pairs.w] - ref[pairs.l]


@dataclass(frozen=True, kw_only=True)
class AOTUnpaired(SortedPairs):
    """AOT, unpaired: log-ratios of chosen responses should dominate those of rejected ones (arXiv 2406.05882).

    d = sort(rho_w) - sort(rho_l), then -log sigma(beta d). Chosen and rejected need not answer the same prompts.

    beta: 0.01 on tokens (paper, as TRL quotes it).
    """

    name: ClassVar[str] = "aot_unpaired"
    title: ClassVar[str] = "AOT (unpaired)"
    paper: ClassVar[str] = "2406.05882"
    composition: ClassVar[str] = "sorted chosen log-ratios - sorted rejected ones -> beta -> logistic"
    parity: ClassVar[str] = "TRL DPOTrainer aot_unpaired"

    def samples(self, scores: Scores, pairs: Pairs) -> tuple[Tensor, Tensor]:
        rho = scores.log_ratio()
        return rho[pairs.w], rho[pairs.l]
