"""Rewards of texts: found like rewards of pictures, loaded from a plain function too, and checked at the border."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from diffalign import rewards
from diffalign.errors import ConfigError
from diffalign.rewards import RewardError, TextReward, load_text, score_texts

FUNCTIONS = """
def brevity(prompts, completions, **columns):
    return [-float(len(text)) for text in completions]

def right(prompts, completions, answer, **columns):
    assert "trainer_state" not in columns
    return [float(text == wanted) for text, wanted in zip(completions, answer)]

def holes(prompts, completions, **columns):
    return [None if "x" in text else 1.0 for text in completions]

def narrow(prompts, completions):
    return [0.0] * len(prompts)

async def later(prompts, completions, **columns):
    return [0.0] * len(prompts)
"""
CLASS = '''
from diffalign.rewards import TextReward
import torch


class Vowels(TextReward):
    """Counts vowels."""

    range = (0.0, float("inf"))
    unit = "vowels"
    weights = None
    licence = "Apache-2.0"
    gap = "none"
    argument = "which vowels"

    def __init__(self, device="cpu", dtype=None, vowels="aeiou"):
        self.vowels = vowels

    def __call__(self, prompts, completions, metadata=None):
        return torch.tensor([float(sum(c in self.vowels for c in text)) for text in completions])
'''


@pytest.fixture
def functions(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    return str(path)


def test_a_users_class(tmp_path: Path):
    path = tmp_path / "vowels.py"
    path.write_text(CLASS)
    assert score_texts(load_text(str(path)), ["a"] * 2, ["banana", "xyz"]).tolist() == [3, 0]
    assert score_texts(load_text(f"{path}:b"), ["a"] * 2, ["banana", "xyz"]).tolist() == [1, 0]
    assert rewards.describe(str(path)).differentiable is False


def test_a_users_function(functions: str):
    brevity = load_text(f"{functions}:brevity")
    scores = score_texts(brevity, ["p"] * 3, ["a", "bbb", ""], batch_size=2)
    assert scores.tolist() == [-1, -3, 0]
    assert scores.dtype == torch.float32
    right = load_text(f"{functions}:right")
    rows = [{"answer": "4", "kind": "add"}, {"answer": "5"}]
    assert score_texts(right, ["p", "q"], ["4", "4"], rows).tolist() == [1, 0]


def test_functions_that_do_not_fit(functions: str):
    with pytest.raises(ConfigError, match=r"no function 'brevty'; did you mean 'brevity'\?"):
        load_text(f"{functions}:brevty")
    for name in ("narrow", "later"):
        with pytest.raises(ConfigError, match=r"has the signature .*expected a plain function"):
            load_text(f"{functions}:{name}")
    with pytest.raises(ConfigError, match="does not exist"):
        load_text("nowhere.py:f")


def test_pictures_and_texts_are_not_confused():
    with pytest.raises(ConfigError, match="'world_verifier' judges pictures"):
        load_text("world_verifier")
    with pytest.raises(ConfigError, match="'text_world:correct' judges texts"):
        rewards.load("text_world:correct")
    with pytest.raises(ConfigError, match="did you mean 'text_world'"):
        load_text("text_word")


def test_bad_scores_name_the_prompt(functions: str):
    holes = load_text(f"{functions}:holes")
    assert score_texts(holes, ["cat", "dog"], ["a", "b"]).tolist() == [1, 1]
    with pytest.raises(RewardError, match=r"mine\.py:holes' returned NaN or infinity") as caught:
        score_texts(holes, ["cat", "dog"], ["a", "x"])
    assert "'dog'" in str(caught.value)
    assert "'cat'" not in str(caught.value)
    assert score_texts(holes, ["cat", "dog"], ["a", "x"], missing=True).isnan().tolist() == [False, True]

    class Scalar(TextReward):
        range, unit, weights, licence, gap = (0.0, math.inf), "none", None, "none", "none"

        def __init__(self):
            pass

        def __call__(self, prompts, completions, metadata=None):
            return torch.tensor(1.0)

    with pytest.raises(RewardError, match=r"shape \(\) instead of \(2,\).*'cat'"):
        score_texts(Scalar(), ["cat", "dog"], ["a", "b"])


def test_counts_must_match(functions: str):
    brevity = load_text(f"{functions}:brevity")
    with pytest.raises(RewardError, match="got 1 prompts for 2 completions"):
        score_texts(brevity, ["a"], ["a", "b"])
    with pytest.raises(RewardError, match="got one text as completions"):
        score_texts(brevity, ["a"], "a")
    with pytest.raises(RewardError, match="got 1 metadata entries for 2"):
        score_texts(brevity, ["a", "b"], ["a", "b"], [{}])
    assert score_texts(brevity, [], []).shape == (0,)
