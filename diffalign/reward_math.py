"""Arithmetic on scores of several rewards: bringing them to one scale, and making one number of them.

Raw sums are ruled by whichever reward varies most: its weight is in effect weight times standard deviation. So scores
are standardised or ranked first, with statistics measured once on pictures of the reference model and then frozen; taken
from each batch they would make the reward of a picture depend on its neighbours.

Shapes: B pictures, R rewards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.files import atomic_write_text

QUANTILES = 101  # 0 %, 1 %, ..., 100 %
FLOOR = 1e-6  # of what a harmonic mean divides by


@dataclass(frozen=True)
class Statistics:
    """What is known about a reward's scores on reference pictures.

    Attributes:
        mean, std: of the scores; std with n in the denominator.
        quantiles: ascending, from the lowest score to the highest in equal shares.
        count: scores that were measured.
    """

    mean: float
    std: float
    quantiles: tuple[float, ...] = ()
    count: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(f"mean {self.mean} and std {self.std}; finite numbers and a std above 0 expected")
        if self.quantiles and (len(self.quantiles) < 2 or list(self.quantiles) != sorted(self.quantiles)):
            raise ValueError("quantiles are not an ascending list of at least two numbers")

    @staticmethod
    def measure(scores: Tensor) -> Statistics:
        """Of scores (N,); NaN is left out.

        Raises:
            ValueError: fewer than two different scores.
        """
        known = scores[~scores.isnan()].double()
        if len(known) < 2:
            raise ValueError(f"{len(known)} scores; at least two expected")
        quantiles = torch.quantile(known, torch.linspace(0, 1, QUANTILES, dtype=torch.float64))
        return Statistics(float(known.mean()), float(known.std(correction=0)), tuple(quantiles.tolist()), len(known))


def save_statistics(path: Path, found: Mapping[str, Statistics]) -> None:
    """Write statistics by reward name, as JSON."""
    atomic_write_text(path, json.dumps({name: asdict(one) for name, one in found.items()}, indent=1))


def load_statistics(path: Path, name: str) -> Statistics:
    """The statistics of a reward from a file that `save_statistics` wrote.

    Raises:
        ConfigError: no such file, nothing about this reward in it, or not such a file.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        if name not in found:
            raise ConfigError(f"statistics {path}: nothing about {name!r}; there are {', '.join(found) or 'none'}")
        one = found[name]
        return Statistics(one["mean"], one["std"], tuple(one["quantiles"]), one["count"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"statistics {path} cannot be read ({error}); write them with: diffalign score --statistics FILE"
        ) from error


# ---------------------------------------------------------------- to one scale


def standardise(scores: Tensor, mean: float, std: float) -> Tensor:
    """(score - mean) / std: 0 is the reference's mean, 1 its standard deviation."""
    return (scores - mean) / std


def into_range(scores: Tensor, low: float, high: float) -> Tensor:
    """`low` becomes 0 and `high` 1; beyond them it is cut."""
    return ((scores - low) / (high - low)).clamp(0, 1)


def rank(scores: Tensor, quantiles: Sequence[float]) -> Tensor:
    """The share of the reference's scores that lie below, in [0, 1], linear between the quantiles.

    A score that many of the reference have gets the middle of their ranks.
    """
    grid = torch.tensor(quantiles, dtype=torch.float64, device=scores.device)
    last = len(grid) - 1
    value = scores.detach().double()
    below, upto = torch.searchsorted(grid, value), torch.searchsorted(grid, value, right=True)
    left, right = (below - 1).clamp(0, last), below.clamp(0, last)
    share = (value - grid[left]) / (grid[right] - grid[left]).where(right > left, torch.ones((), dtype=torch.float64))
    between = (left + share).where(right > left, left.double())
    place = ((below + upto - 1) / 2).where(upto > below, between)
    return (place / last).where(~value.isnan(), math.nan).float()


def win_rate(scores: Tensor, groups: Tensor) -> Tensor:
    """How often each picture beats the others of its prompt; ties count one half, and alone it is one half.

    Args:
        scores: (B,). A comparison with NaN does not count; NaN itself stays NaN.
        groups: (B,), the same number for the same prompt. All pictures of a prompt must be there.

    Returns:
        Shares in [0, 1], shape (B,).
    """
    counted = groups[:, None] == groups[None, :]
    counted = counted & ~torch.eye(len(scores), dtype=torch.bool, device=scores.device) & ~scores.isnan()[None, :]
    won = (scores[:, None] > scores[None, :]).float() + 0.5 * (scores[:, None] == scores[None, :]).float()
    number = counted.sum(1)
    rate = (won * counted).sum(1) / number.clamp(min=1)
    return rate.where(number > 0, 0.5).where(~scores.isnan(), math.nan)


# ---------------------------------------------------------------- one number


def weighted_sum(scores: Tensor, weights: Sequence[float]) -> Tensor:
    """Sum over rewards of weight times score: (R, B) to (B,)."""
    return (scores * _column(weights, scores)).sum(0)


def harmonic_mean(scores: Tensor, weights: Sequence[float]) -> Tensor:
    """Weighted harmonic mean, (R, B) to (B,): near 0 as soon as one score is, so that every reward must be content.

    Args:
        scores: in (0, 1], as `into_range` and `rank` give them; what is below `FLOOR` counts as `FLOOR`.
        weights: positive, R of them.
    """
    weight = _column(weights, scores)
    return weight.sum() / (weight / scores.clamp(min=FLOOR)).sum(0)


def shortfall(scores: Tensor, at_least: float) -> Tensor:
    """How far scores are below a bound, 0 where they are not: what a constraint's penalty is proportional to."""
    return (at_least - scores).clamp(min=0)


def _column(weights: Sequence[float], scores: Tensor) -> Tensor:
    if len(weights) != len(scores):
        raise ValueError(f"{len(weights)} weights for {len(scores)} rewards")
    return torch.tensor(weights, dtype=scores.dtype, device=scores.device)[:, None]
