"""What several methods of this package share. P pairs, N rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.losses.base import IncompatibleObjective, Objective, as_rows
from diffalign.losses.layouts import Pairs
from diffalign.losses.scores import Kind, Scores


@dataclass(frozen=True, kw_only=True)
class Refusing(Objective):
    """Base of objectives that refuse kinds of score for reasons of their own, besides capabilities.

    Class attributes:
        refused: the reason, by kind.
    """

    refused: ClassVar[Mapping[Kind, str]] = {}

    def check(self, kind: Kind) -> None:
        if kind in self.refused:
            raise IncompatibleObjective(self.name, kind, self.refused[kind], self.instead)
        super().check(kind)


@dataclass(frozen=True, kw_only=True)
class Directed(Objective):
    """Base of objectives on pairs in which the label alone does not say which image is pushed away."""

    @abstractmethod
    def direction(self, scores: Scores, pairs: Pairs) -> Tensor:
        """1 where row l is pushed away, -1 where row w is, 0 where neither is; (P,), without gradient."""


def label_direction(pairs: Pairs, like: Tensor) -> Tensor:
    """`Directed.direction` of a label: 1 where it prefers w, -1 where it prefers l, 0 of a tie; (P,), of `like`'s type."""
    return (2 * as_rows(pairs.p, like) - 1).sign().expand(len(pairs))


def either_way(pairs: Pairs, loss: Callable[[Tensor, Tensor, Tensor | float], Tensor]) -> Tensor:
    """p loss(w, l, margin) + (1 - p) loss(l, w, -margin), (P,): soft labels for losses that are no function of one logit.

    Args:
        pairs: with p and margins.
        loss: of rows that win, rows that lose, (P,) each, and the margin.
    """
    clean = loss(pairs.w, pairs.l, pairs.margin)
    if not isinstance(pairs.p, Tensor) and pairs.p == 1:
        return clean
    return pairs.p * clean + (1 - pairs.p) * loss(pairs.l, pairs.w, -pairs.margin)


def take(scores: Scores, rows: Tensor) -> Scores:
    """Rows of denoising scores, possibly repeated."""
    chosen = {
        name: value[rows]
        for name in ("theta", "ref", "old", "imitation", "error", "residual", "ref_residual", "log_snr", "patch_weight")
        if (value := getattr(scores, name)) is not None
    }
    extra = {name: value[rows] for name, value in scores.extra.items()}
    return Scores(kind=scores.kind, extra=extra, totals=scores.totals, **chosen)


def broadcast_locations(weight: Tensor, residual: Tensor) -> Tensor:
    """Weights of locations (N, h, w) against residuals (N, C, h, w) or (N, C, F, h, w)."""
    n, h, w = weight.shape
    return weight.reshape(n, *[1] * (residual.ndim - 3), h, w)


def one_of(owner: Objective, name: str, allowed: tuple[str, ...]) -> None:
    """Refuse an unknown word.

    Raises:
        ValueError: naming the field and what it takes.
    """
    value = getattr(owner, name)
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")


def positive(owner: Objective, *names: str, zero: bool = False) -> None:
    """Refuse numbers that are negative, or zero unless `zero`.

    Raises:
        ValueError: naming the field.
    """
    for name in names:
        value = getattr(owner, name)
        if value < 0 or (value == 0 and not zero):
            raise ValueError(f"{name} is {value}; expected {'no negative' if zero else 'a positive'} number")


def pair_mean(x: Tensor) -> Tensor:
    """The mean, 0 where there is nothing."""
    return x.mean() if x.numel() else torch.zeros((), dtype=x.dtype, device=x.device)
