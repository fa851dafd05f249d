"""Paired comparison of two models on the same prompts and seeds: win rates, mean gains, and their intervals.

Legend: `P` prompts, `K` repeats (images) per prompt. Repeats of one prompt are not independent, so they are averaged
first and the bootstrap resamples prompts (clusters), never single images. Numpy only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95
_CHUNK = 4_000_000  # drawn indices held at once: 32 MB


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its bootstrap interval.

    Attributes:
        mean: mean over prompts of the prompt means.
        ci_low, ci_high: percentile interval; NaN with a single prompt, which says nothing about others.
        count: prompts that went in.
    """

    mean: float
    ci_low: float
    ci_high: float
    count: int


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """How often the aligned model beats the base.

    Attributes:
        rate: in [0, 1]; ties count one half, repeats are averaged within a prompt first.
        ci_low, ci_high: 95 % interval over prompts, in [0, 1].
        wins, ties, losses: single comparisons (prompt, repeat), from the aligned model's side.
        missing: comparisons left out because a score was NaN (an image that could not be scored).
        prompts: prompts with at least one comparison.
        p_value: two-sided sign test over prompts (a prompt is won when more than half of its repeats are).
    """

    rate: float
    ci_low: float
    ci_high: float
    wins: int
    ties: int
    losses: int
    missing: int
    prompts: int
    p_value: float


def win_rate(
    base: ArrayLike, aligned: ArrayLike, *, eps: float = 0.0, resamples: int = RESAMPLES, seed: int = 0
) -> WinRate:
    """Win rate of `aligned` over `base`, paired by prompt and repeat.

    Scores are rounded to float32 before they are compared, so that float64 dust does not decide a tie.

    Args:
        base: scores, higher is better, shape (P, K) or (P,). NaN marks a missing score.
        aligned: scores of the same prompts and seeds, same shape.
        eps: differences up to this are ties, in units of the score.
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Raises:
        ValueError: shapes differ, or no pair of scores is complete.
    """
    base_PK, aligned_PK = _paired(base, aligned)
    gap_PK = aligned_PK.astype(np.float32) - base_PK.astype(np.float32)
    won_PK = np.where(np.isnan(gap_PK), np.nan, np.where(gap_PK > eps, 1.0, np.where(gap_PK < -eps, 0.0, 0.5)))
    won_P = _prompt_means(won_PK)
    low, high = _rate_interval(won_P, resamples, seed)
    return WinRate(
        rate=float(won_P.mean()),
        ci_low=low,
        ci_high=high,
        wins=int((won_PK == 1.0).sum()),
        ties=int((won_PK == 0.5).sum()),
        losses=int((won_PK == 0.0).sum()),
        missing=int(np.isnan(won_PK).sum()),
        prompts=len(won_P),
        p_value=sign_test(int((won_P > 0.5).sum()), int((won_P < 0.5).sum())),
    )


def mean_gain(base: ArrayLike, aligned: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean of `aligned - base`, in units of the score, with its interval over prompts.

    A 60 % win rate can hide a tiny gain, and a large mean gain a few outliers: report both.

    Args:
        base, aligned: scores of the same prompts and seeds, shape (P, K) or (P,); NaN marks a missing score.
        resamples, seed: of the bootstrap.

    Raises:
        ValueError: shapes differ, or no pair of scores is complete.
    """
    base_PK, aligned_PK = _paired(base, aligned)
    return bootstrap_mean(aligned_PK - base_PK, resamples=resamples, seed=seed)


def bootstrap_mean(
    values: ArrayLike, *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0
) -> Estimate:
    """Mean and percentile bootstrap interval.

    Args:
        values: shape (P,) or (P, K); rows are the independent units, NaN is left out.
        resamples: bootstrap resamples over rows.
        confidence: of the interval, in (0, 1).
        seed: of the bootstrap; the same seed and number of rows draws the same resamples.

    Raises:
        ValueError: no finite value.
    """
    means_P = _prompt_means(_two_dimensional(values))
    low, high = _percentile_interval(means_P, resamples, confidence, seed)
    return Estimate(mean=float(means_P.mean()), ci_low=low, ci_high=high, count=len(means_P))


def bootstrap_rate(values: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """`bootstrap_mean` for shares of successes, with an honest interval where all are 0 or all are 1.

    Args:
        values: in [0, 1], shape (P,) or (P, K); NaN is left out.
        resamples, seed: of the bootstrap.

    Raises:
        ValueError: no finite value.
    """
    means_P = _prompt_means(_two_dimensional(values))
    low, high = _rate_interval(means_P, resamples, seed)
    return Estimate(mean=float(means_P.mean()), ci_low=low, ci_high=high, count=len(means_P))


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided sign test: the probability of a split at least this uneven if both sides were equally likely.

    Ties say nothing about the direction and are not passed in. 1.0 without any win or loss.
    """
    n, k = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    # Sums of binomial terms in logs: C(n, i) overflows a float beyond about n = 1000.
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))


def _two_dimensional(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in (1, 2):
        raise ValueError(f"expected values of shape (P,) or (P, K), got {array.shape}")
    return array[:, None] if array.ndim == 1 else array


def _paired(base: ArrayLike, aligned: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    base_PK, aligned_PK = _two_dimensional(base), _two_dimensional(aligned)
    if base_PK.shape != aligned_PK.shape:
        raise ValueError(
            f"base has shape {base_PK.shape}, aligned {aligned_PK.shape}: a paired comparison needs the same "
            "prompts and repeats on both sides"
        )
    return base_PK, aligned_PK


def _prompt_means(values_PK: NDArray[np.float64]) -> NDArray[np.float64]:
    present_PK = ~np.isnan(values_PK)
    count_P = present_PK.sum(axis=1)
    if not count_P.any():
        raise ValueError("nothing to average: no prompt has a complete, finite score")
    sum_P = np.where(present_PK, values_PK, 0.0).sum(axis=1)
    return np.asarray(sum_P[count_P > 0] / count_P[count_P > 0])


def _rate_interval(won_P: NDArray[np.float64], resamples: int, seed: int) -> tuple[float, float]:
    """The bootstrap interval; where every prompt fell the same way, resampling shows no spread and the exact
    binomial (Clopper-Pearson) bound is taken instead: 8 wins of 8 are not certainty."""
    alpha, n = 1 - CONFIDENCE, len(won_P)
    if (won_P == 1.0).all():
        return (alpha / 2) ** (1 / n), 1.0
    if (won_P == 0.0).all():
        return 0.0, 1 - (alpha / 2) ** (1 / n)
    if n == 1:
        return 0.0, 1.0
    return _percentile_interval(won_P, resamples, CONFIDENCE, seed)


def _percentile_interval(
    means_P: NDArray[np.float64], resamples: int, confidence: float, seed: int
) -> tuple[float, float]:
    n = len(means_P)
    if n == 1:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // n)
    draws = [
        means_P[generator.integers(0, n, size=(min(rows, resamples - start), n))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(draws), [tail, 1 - tail])
    return float(low), float(high)
