"""Rewards made of rewards: what the spec says, what is told of the parts, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diffalign import reward_math, rewards
from diffalign.errors import ConfigError
from diffalign.reward_math import Statistics
from diffalign.rewards import RewardError, score

FILE = """
from diffalign.rewards import Reward


class Channel(Reward):
    range = (0.0, 1.0)
    unit = licence = gap = ""
    differentiable = True
    weights = None
    argument = "a number"
    loaded = []

    def __init__(self, device="cpu", dtype=None, which="0"):
        self.which = int(which)
        self.loaded.append(self.which)

    def __call__(self, images, prompts, metadata=None):
        return images[:, self.which].mean((1, 2)) / (0 if "bad" in prompts else 1)
"""

SPREAD = """
import torch
from diffalign.rewards import Reward


class Spread(Reward):
    "Mean distance in brightness to the others of the prompt."
    range = (0.0, 1.0)
    unit = licence = gap = ""
    differentiable = False
    grouped = True
    weights = None

    def __init__(self, device="cpu", dtype=None):
        pass

    def __call__(self, images, prompts, metadata=None):
        light = images.mean((1, 2, 3))
        others = [[light[j] for j, q in enumerate(prompts) if q == p and j != i] for i, p in enumerate(prompts)]
        return torch.stack([(torch.stack(o) - x).abs().mean() for o, x in zip(others, light)])
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write a mix of the mean of channels; `write(parts=[...])` with `channel: N` for a reward."""
    (tmp_path / "channel.py").write_text(FILE)

    def named(entry: Any) -> Any:
        if isinstance(entry, dict) and "channel" in entry:
            entry = {"reward": f"{tmp_path / 'channel.py'}:{entry['channel']}"} | entry
            del entry["channel"]
        return entry

    def make(**tree: Any) -> str:
        for key in ("parts", "constraints"):
            if isinstance(tree.get(key), list):
                tree[key] = [named(entry) for entry in tree[key]]
        file = tmp_path / "mix.yaml"
        file.write_text(yaml.safe_dump(tree))
        return f"mix:{file}"

    return make


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_a_sum_in_the_name(images: torch.Tensor) -> None:
    mixed = rewards.load("mix:0.5*jpeg_compressibility+-2*jpeg_incompressibility+1e-1*jpeg_compressibility")
    size = score(rewards.load("jpeg_incompressibility"), images, ["p"] * 5)
    assert torch.allclose(score(mixed, images, ["p"] * 5), -2.6 * size)
    assert len(mixed.models) == 2  # type: ignore[attr-defined]
    assert mixed.differentiable is False
    argument = rewards.load("mix:1*world_taste:ada@0.3+.25*world_verifier:strict")
    assert list(argument.models) == ["world_taste:ada@0.3", "world_verifier:strict"]  # type: ignore[attr-defined]


def test_scales_weights_and_constraints(write: Any, images: torch.Tensor, tmp_path: Path) -> None:
    a, b, c = images.mean((2, 3)).T
    known = Statistics.measure(torch.linspace(0.2, 0.9, 50))
    reward_math.save_statistics(tmp_path / "base.json", {f"{tmp_path / 'channel.py'}:1": known})
    name = write(
        parts=[
            {"channel": 0, "weight": 2, "scale": "standardise", "mean": 0.5, "std": 0.1},
            {"channel": 1, "scale": "rank", "statistics": "base.json"},
            {"channel": 2, "weight": -1, "scale": "range", "low": 0.4, "high": 0.6},
        ],
        constraints=[{"channel": 0, "at_least": 0.5, "weight": 3}],
    )
    mixed = rewards.load(name)
    got = score(mixed, images, ["p"] * 5)
    third = ((c - 0.4) / 0.2).clamp(0, 1)
    short = 3 * (0.5 - a).clamp(min=0)
    assert 0 < int((short > 0).sum()) < 5
    wanted = 2 * (a - 0.5) / 0.1 + reward_math.rank(b, known.quantiles) - third - short
    assert torch.allclose(got, wanted, atol=1e-5)
    parts = mixed.parts()
    first = f"{tmp_path / 'channel.py'}:0"
    assert torch.allclose(parts[first], a)
    assert torch.allclose(parts[f"taken off: {first}"], short)
    added = sum(value for key, value in parts.items() if key.startswith("added: "))
    assert torch.allclose(added - parts[f"taken off: {first}"], got, atol=1e-5)  # type: ignore[operator]
    (module,) = {type(model) for model in mixed.models.values()}  # type: ignore[attr-defined]
    assert sorted(module.loaded) == [0, 1, 2]  # one of each


def test_harmonic_mean(write: Any, images: torch.Tensor) -> None:
    ranges = {"scale": "range", "low": 0, "high": 1}
    mixed = rewards.load(
        write(combine="harmonic", parts=[{"channel": 0, **ranges}, {"channel": 1, "weight": 3, **ranges}])
    )
    a, b, _ = images.mean((2, 3)).T
    assert torch.allclose(score(mixed, images, ["p"] * 5), 4 / (1 / a + 3 / b), atol=1e-5)


def test_gradient_passes_where_all_parts_let_it(write: Any, images: torch.Tensor) -> None:
    pixels = images.clone().requires_grad_()
    mixed = rewards.load(write(parts=[{"channel": 0, "weight": 2}, {"channel": 1, "weight": -1}]))
    score(mixed, pixels, ["p"] * 5, batch_size=2).sum().backward()
    assert pixels.grad is not None
    assert torch.allclose(pixels.grad.mean((0, 2, 3)), torch.tensor([2.0, -1.0, 0.0]) / 16)


def test_a_part_that_compares_the_pictures_of_a_prompt_gets_all_of_them(write: Any, tmp_path: Path) -> None:
    (tmp_path / "spread.py").write_text(SPREAD)
    name = write(
        parts=[{"channel": 0, "weight": 2}, {"reward": str(tmp_path / "spread.py"), "weight": 10}],
        constraints=[{"reward": str(tmp_path / "spread.py"), "at_least": 0.4, "weight": 100}],
    )
    light = torch.tensor([0.1, 0.5, 0.3, 0.9, 0.8])
    images = light[:, None, None, None].expand(5, 3, 4, 4)
    prompts = ["a", "b", "a", "b", "a"]  # a: 0.1, 0.3, 0.8; b: 0.5, 0.9
    spread = [(0.2 + 0.7) / 2, 0.4, (0.2 + 0.5) / 2, 0.4, (0.7 + 0.5) / 2]
    short = [0, 0, 100 * (0.4 - 0.35), 0, 0]
    wanted = torch.tensor([2 * x + 10 * s - f for x, s, f in zip(light.tolist(), spread, short, strict=True)])
    mixed = rewards.load(name)
    assert mixed.grouped
    assert not mixed.differentiable
    assert rewards.groups(name)
    torch.testing.assert_close(score(mixed, images, prompts, batch_size=2), wanted, rtol=1e-4, atol=1e-4)
    alone = write(parts=[{"channel": 0}])
    assert not rewards.load(alone).grouped
    assert not rewards.groups(alone)


def test_a_broken_part_is_named(write: Any, images: torch.Tensor) -> None:
    mixed = rewards.load(write(parts=[{"channel": 0}]))
    with pytest.raises(RewardError, match=r"channel.py' returned NaN or infinity for the prompts 'bad'"):
        score(mixed, images[:1], ["bad"])


def test_the_identity_knows_the_file(write: Any) -> None:
    seen = set()
    for parts in ([{"channel": 0}], [{"channel": 1}], [{"channel": 0, "weight": 2}]):
        seen.add(rewards.load(write(parts=parts)).identity())
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mix", r"got ''; expected weights and rewards like mix:0\.7\*pickscore"),
        ("mix:pickscore", "expected weights and rewards"),
        ("mix:0.5*pickscor", "did you mean 'pickscore'"),
        ("mix:0.5*world_taste:ad", "taste"),
        ("mix:0.5*text_world", "judges texts"),
        ("mix:1*mix:1*pickscore", "a mix in a mix"),
        ("mix:nowhere.yaml", "cannot be read"),
    ],
)
def test_wrong_names_are_refused_before_loading(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rewards.check_images(name)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "has no list 'parts'"),
        ({"parts": []}, "has no list 'parts'"),
        ({"parts": ["pickscore"]}, r"parts\[0\]: 'pickscore'; expected"),
        ({"parts": [{"channel": 0}], "combin": "sum"}, "combin: unknown key; did you mean 'combine'"),
        ({"parts": [{"channel": 0}], "combine": "product"}, "combine is 'product'; sum or harmonic"),
        ({"parts": [{"channel": 0, "wieght": 1}]}, r"parts\[0\]\.wieght: unknown key; did you mean 'weight'"),
        ({"parts": [{"channel": 0, "at_least": 1}]}, r"at_least: unknown key"),
        ({"parts": [{"channel": 0, "weight": "much"}]}, "weight is 'much'; a number expected"),
        ({"parts": [{"channel": 0, "scale": "zscore"}]}, "scale 'zscore' not found"),
        ({"parts": [{"channel": 0, "scale": "standardise"}]}, "needs statistics: FILE, or mean and std"),
        ({"parts": [{"channel": 0, "scale": "standardise", "mean": 0, "std": 0}]}, "std is 0.0"),
        (
            {"parts": [{"channel": 0, "scale": "rank", "mean": 0, "std": 1}]},
            "rank needs statistics: FILE with quantiles",
        ),
        ({"parts": [{"channel": 0, "scale": "rank", "statistics": "gone.json"}]}, r"gone\.json cannot be read"),
        ({"parts": [{"channel": 0, "scale": "range", "low": 1}]}, "needs low and high"),
        ({"parts": [{"channel": 0}], "combine": "harmonic"}, r"needs scores in \[0, 1\]"),
        ({"parts": [{"channel": 0}], "constraints": [{"channel": 0}]}, r"constraints\[0\]: at_least is missing"),
        ({"parts": [{"channel": 0}], "constraints": 3}, "constraints is no list"),
        ({"parts": [{"reward": "mix:1*pickscore"}]}, "a mix in a mix"),
    ],
)
def test_wrong_files_are_refused_before_loading(write: Any, tree: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rewards.check_images(write(**tree))
