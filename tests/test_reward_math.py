"""Identities of the arithmetic on scores."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffalign import reward_math
from diffalign.errors import ConfigError
from diffalign.reward_math import (
    Statistics,
    harmonic_mean,
    into_range,
    rank,
    shortfall,
    standardise,
    weighted_sum,
    win_rate,
)

NAN = math.nan


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_standardised_reference_has_mean_0_and_std_1() -> None:
    scores = random(1000) * 3 + 20
    known = Statistics.measure(torch.cat([scores, torch.tensor([NAN])]))
    assert known.count == 1000
    z = standardise(scores, known.mean, known.std)
    assert float(z.mean()) == pytest.approx(0, abs=1e-5)
    assert float(z.std(correction=0)) == pytest.approx(1, abs=1e-5)
    # Scale and origin of the reward do not matter.
    other = Statistics.measure(scores * 7 - 4)
    assert torch.allclose(standardise(scores * 7 - 4, other.mean, other.std), z, atol=1e-4)


def test_rank_of_the_reference_is_uniform_and_knows_only_the_order() -> None:
    scores = random(2000)
    known = Statistics.measure(scores)
    ranks = rank(scores, known.quantiles)
    assert (float(ranks.min()), float(ranks.max())) == (0, 1)
    assert float(ranks.mean()) == pytest.approx(0.5, abs=1e-3)
    assert (ranks[scores.argsort()].diff() >= 0).all()
    assert torch.allclose(rank(scores.exp(), Statistics.measure(scores.exp()).quantiles), ranks, atol=1e-2)
    exact = scores.argsort().argsort() / 1999
    assert torch.allclose(ranks, exact, atol=6e-3)


def test_rank_between_at_and_beyond_quantiles() -> None:
    quantiles = (0.0, 1.0, 1.0, 1.0, 5.0)  # a fifth of a step each
    asked = torch.tensor([-9.0, 0.0, 0.5, 1.0, 3.0, 5.0, 9.0, NAN])
    assert rank(asked, quantiles).tolist()[:-1] == [0, 0, 0.125, 0.5, 0.875, 1, 1]  # ties: the middle of 1/4 and 3/4
    assert rank(asked, quantiles)[-1].isnan()
    assert rank(torch.tensor([2.0]), (2.0, 2.0)).tolist() == [0.5]


def test_range() -> None:
    assert into_range(torch.tensor([0.0, 2.0, 4.0, 9.0]), 2, 6).tolist() == [0, 0, 0.5, 1]


def test_win_rate_within_prompts() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 5.0, 5.0, 7.0])
    groups = torch.tensor([4, 4, 4, 9, 9, 2])
    assert win_rate(scores, groups).tolist() == [1, 0, 0.5, 0.5, 0.5, 0.5]
    many, ids = random(40, seed=1), torch.arange(40) % 5
    rates = win_rate(many, ids)
    for group in range(5):
        inside = rates[ids == group]
        assert float(inside.mean()) == pytest.approx(0.5, abs=1e-6)  # what one wins another loses
        assert torch.allclose(inside, many[ids == group].argsort().argsort() / 7)  # without ties: the rank
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert torch.equal(win_rate(many[order], ids[order]), rates[order])
    assert torch.allclose(win_rate(-many, ids), 1 - rates)


def test_win_rate_leaves_missing_scores_out() -> None:
    rates = win_rate(torch.tensor([1.0, NAN, 2.0, NAN, 3.0]), torch.tensor([0, 0, 0, 1, 1]))
    assert rates[[0, 2, 4]].tolist() == [0, 1, 0.5]
    assert rates[[1, 3]].isnan().all()


def test_sum_and_harmonic_mean() -> None:
    scores = torch.tensor([[0.5, 1.0, 0.2], [0.5, 0.25, 0.9]])
    assert torch.allclose(weighted_sum(scores, [2, -1]), 2 * scores[0] - scores[1])
    mean = harmonic_mean(scores, [1, 1])
    assert torch.allclose(mean, 2 * scores[0] * scores[1] / (scores[0] + scores[1]))
    assert float(mean[0]) == pytest.approx(0.5)  # equal ratings keep their value
    assert (mean <= scores.mean(0) + 1e-6).all()
    assert torch.allclose(harmonic_mean(scores, [3, 3]), mean)  # only ratios of weights matter
    assert torch.allclose(harmonic_mean(scores, [1, 1e-9]), scores[0], atol=1e-6)
    assert torch.allclose(harmonic_mean(torch.tensor([[0.0], [1.0]]), [1, 1]), torch.tensor([2e-6]), rtol=1e-3)
    # RPO's lambda-harmonic mean: 1 / (lambda / a + (1 - lambda) / b)
    assert torch.allclose(harmonic_mean(scores, [0.3, 0.7]), 1 / (0.3 / scores[0] + 0.7 / scores[1]))
    with pytest.raises(ValueError, match="1 weights for 2 rewards"):
        weighted_sum(scores, [1])


def test_shortfall_and_gradients() -> None:
    scores = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    missing = shortfall(scores, 3.0)
    assert missing.tolist() == [2, 1, 0]
    missing.sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [-1, -1, 0]
    pair = torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: harmonic_mean(x, [1, 2]), pair)


def test_statistics_survive_their_file(tmp_path: Path) -> None:
    known = {"a:b": Statistics.measure(random(50)), "c": Statistics(1.0, 2.0)}
    reward_math.save_statistics(tmp_path / "s.json", known)
    assert reward_math.load_statistics(tmp_path / "s.json", "a:b") == known["a:b"]
    assert reward_math.load_statistics(tmp_path / "s.json", "c") == known["c"]
    with pytest.raises(ConfigError, match="nothing about 'd'; there are a:b, c"):
        reward_math.load_statistics(tmp_path / "s.json", "d")
    for text in ("nothing", "[]", json.dumps({"c": {"mean": 1}}), json.dumps({"c": vars(known["c"]) | {"std": 0}})):
        (tmp_path / "s.json").write_text(text)
        with pytest.raises(ConfigError, match=r"cannot be read|nothing about"):
            reward_math.load_statistics(tmp_path / "s.json", "c")


@pytest.mark.parametrize("scores", [[1.0], [], [2.0, 2.0], [NAN, 1.0]])
def test_too_few_scores_have_no_statistics(scores: list[float]) -> None:
    with pytest.raises(ValueError, match=r"at least two|std 0"):
        Statistics.measure(torch.tensor(scores))
