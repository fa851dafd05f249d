"""Advantages by the last rewards of the same prompt."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch

from diffalign.sampling.advantages import RewardHistory


class Tracker:
    """DDPO's bookkeeping, written down again with NumPy and deques."""

    def __init__(self, size: int, minimum: int) -> None:
        self.size, self.minimum = size, minimum
        self.known: dict[str, deque[float]] = {}

    def update(self, prompts: list[str], rewards: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        names, found = np.array(prompts), np.empty_like(rewards)
        for name in np.unique(names):
            own = rewards[names == name]
            past = self.known.setdefault(name, deque(maxlen=self.size))
            past.extend(own)
            few = len(past) < self.minimum
            mean = rewards.mean() if few else np.mean(past)
            deviation = (rewards.std() if few else np.std(past)) + 1e-6
            found[names == name] = (own - mean) / deviation
        return found


def test_advantages_are_those_of_the_published_bookkeeping() -> None:
    rng, history, tracker = np.random.default_rng(0), RewardHistory(6, 4), Tracker(6, 4)
    short = whole = full = 0
    for number in range(5):
        prompts = [str(name) for name in rng.choice(["a", "b", "c", "d"], size=7, p=[0.55, 0.25, 0.15, 0.05])]
        rewards = rng.normal(size=7) + np.array([ord(name) for name in prompts])
        wanted = tracker.update(prompts, rewards)
        found = history.advantages(number, prompts, torch.from_numpy(rewards))
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9, atol=1e-9)
        lengths = [len(tracker.known[name]) for name in prompts]
        short, whole, full = short + (min(lengths) < 4), whole + (max(lengths) >= 4), full + (max(lengths) == 6)
    assert min(short, whole, full) > 0  # prompts that are not known yet, known ones, and ones that forget


def test_a_round_that_comes_again_takes_its_own_place() -> None:
    once, twice = RewardHistory(8, 2), RewardHistory(8, 2)
    first, second = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 7.0])
    once.advantages(0, ["a", "a"], first)
    twice.advantages(0, ["a", "a"], first)
    twice.advantages(1, ["a", "a"], torch.tensor([50.0, -50.0]))
    assert torch.equal(twice.advantages(1, ["a", "a"], second), once.advantages(1, ["a", "a"], second))


def test_missing_rewards_are_neither_remembered_nor_learnt_from() -> None:
    history = RewardHistory(4, 2)
    found = history.advantages(0, ["a", "a", "a"], torch.tensor([1.0, float("nan"), 3.0]))
    torch.testing.assert_close(found, torch.tensor([-1.0, 0.0, 1.0]), atol=1e-5, rtol=0)


def test_a_loaded_history_goes_on_as_the_saved_one() -> None:
    saved, loaded = RewardHistory(4, 2), RewardHistory(4, 2)
    saved.advantages(0, ["a", "b"], torch.tensor([1.0, 2.0]))
    loaded.load_state_dict(saved.state_dict())
    reward = torch.tensor([5.0, 3.0])
    assert torch.equal(loaded.advantages(1, ["b", "a"], reward), saved.advantages(1, ["b", "a"], reward))
