"""Closed forms and coverage of the paired statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffalign.statistics import bootstrap_mean, bootstrap_rate, mean_gain, sign_test, win_rate


def test_all_wins_is_one_and_the_interval_is_not_certainty() -> None:
    result = win_rate(np.zeros((8, 2)), np.ones((8, 2)))
    assert (result.rate, result.ci_high) == (1.0, 1.0)
    assert (result.wins, result.ties, result.losses) == (16, 0, 0)
    assert result.ci_low == pytest.approx(0.025 ** (1 / 8))  # Clopper-Pearson, 8 of 8
    assert result.p_value == pytest.approx(2 / 2**8)


def test_all_losses_mirrors_all_wins() -> None:
    won, lost = win_rate(np.zeros(8), np.ones(8)), win_rate(np.ones(8), np.zeros(8))
    assert lost.rate == 0.0
    assert (lost.ci_low, lost.ci_high) == pytest.approx((0.0, 1 - won.ci_low))


def test_higher_score_wins() -> None:
    """One win, one tie, one loss, one loss: (1 + 1/2 + 0 + 0) / 4."""
    result = win_rate([0.0, 1.0, 2.0, 3.0], [0.5, 1.0, 1.0, 1.0])
    assert result.rate == pytest.approx(0.375)
    assert (result.wins, result.ties, result.losses) == (1, 1, 2)


def test_swapping_the_sides_mirrors_rate_and_interval() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (60, 3)).astype(float), rng.integers(0, 4, (60, 3)).astype(float)
    ab, ba = win_rate(a, b), win_rate(b, a)
    assert ab.rate + ba.rate == pytest.approx(1.0)
    assert ab.ci_low + ba.ci_high == pytest.approx(1.0)
    assert (ab.wins, ab.ties) == (ba.losses, ba.ties)
    assert ab.ties > 0


def test_all_ties_is_one_half() -> None:
    result = win_rate(np.ones((5, 2)), np.ones((5, 2)))
    assert (result.rate, result.ci_low, result.ci_high, result.p_value) == (0.5, 0.5, 0.5, 1.0)


def test_float32_dust_and_eps_are_ties() -> None:
    assert win_rate([1.0, 1.0], [1.0 + 1e-12, 1.0 - 1e-12]).ties == 2
    assert win_rate([1.0, 1.0], [1.05, 1.2], eps=0.1).rate == pytest.approx(0.75)


def test_prompts_weigh_equally_whatever_their_repeats() -> None:
    """Prompt 0 has one scored repeat (won), prompt 1 three (lost): 1/2, not 1/4."""
    nan = math.nan
    base = [[0.0, nan, 0.0], [1.0, 1.0, 1.0]]
    aligned = [[1.0, 1.0, nan], [0.0, 0.0, 0.0]]
    result = win_rate(base, aligned)
    assert result.rate == 0.5
    assert (result.wins, result.losses, result.missing, result.prompts) == (1, 3, 2, 2)


def test_repeats_of_one_prompt_do_not_narrow_the_interval() -> None:
    """Copies of the same outcome carry no new information: K = 5 gives the interval of K = 1."""
    rng = np.random.default_rng(1)
    gap = rng.normal(0.3, 1, 80)
    once = win_rate(np.zeros(80), gap)
    copied = win_rate(np.zeros((80, 5)), np.repeat(gap[:, None], 5, axis=1))
    assert (once.ci_low, once.ci_high) == pytest.approx((copied.ci_low, copied.ci_high))


def test_mean_gain_sign_and_shift() -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(size=(30, 2))
    gain = mean_gain(base, base + 0.25)
    assert (gain.mean, gain.ci_low, gain.ci_high) == pytest.approx((0.25, 0.25, 0.25))
    noisy = mean_gain(base, base + rng.normal(1.0, 0.1, base.shape))
    assert 0.9 < noisy.ci_low < noisy.mean < noisy.ci_high < 1.1


def test_bootstrap_width_is_that_of_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(size=400)
    estimate = bootstrap_mean(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert estimate.mean == pytest.approx(values.mean())
    assert (estimate.ci_high - estimate.ci_low) / 2 == pytest.approx(half, rel=0.05)


def test_rates_at_the_edge_keep_an_interval() -> None:
    """Four of four right is compatible with 40 % (Clopper-Pearson); a mixed sample has the plain bootstrap interval."""
    sure = bootstrap_rate([1.0] * 4)
    assert (sure.mean, sure.ci_low, sure.ci_high) == pytest.approx((1.0, 0.025**0.25, 1.0))
    mixed = [1.0, 0.0, 1.0, 0.5, 1.0]
    assert bootstrap_rate(mixed) == bootstrap_mean(mixed)


def test_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(4)
    hits = 0
    for seed in range(300):
        result = win_rate(rng.normal(size=(100, 2)), rng.normal(size=(100, 2)), resamples=500, seed=seed)
        hits += result.ci_low <= 0.5 <= result.ci_high
    assert 0.90 <= hits / 300 <= 0.99


def test_same_seed_same_interval() -> None:
    values = np.random.default_rng(5).normal(size=50)
    assert bootstrap_mean(values, seed=7) == bootstrap_mean(values, seed=7)
    assert bootstrap_mean(values, seed=7) != bootstrap_mean(values, seed=8)


@pytest.mark.parametrize(
    ("wins", "losses", "expected"),
    [(0, 0, 1.0), (5, 5, 1.0), (10, 0, 2 / 1024), (9, 1, 2 * 11 / 1024), (1, 9, 2 * 11 / 1024)],
)
def test_sign_test_closed_forms(wins: int, losses: int, expected: float) -> None:
    assert sign_test(wins, losses) == pytest.approx(expected)


def test_sign_test_does_not_overflow() -> None:
    assert sign_test(2000, 2000) == pytest.approx(1.0)
    assert 0 < sign_test(2200, 1800) < 1e-8


def test_one_prompt_says_nothing_about_others() -> None:
    assert math.isnan(bootstrap_mean([1.0]).ci_low)
    assert (win_rate([0.0], [0.0]).ci_low, win_rate([0.0], [0.0]).ci_high) == (0.0, 1.0)


def test_unusable_input_is_refused() -> None:
    with pytest.raises(ValueError, match="same prompts and repeats"):
        win_rate(np.zeros((3, 1)), np.zeros((4, 1)))
    with pytest.raises(ValueError, match="no prompt has a complete"):
        mean_gain([math.nan], [1.0])
