"""A tiny-world annotator as a reward: the verifier's score mixed with a taste, as in the demo's preference pairs.

`world_taste:outlined` likes outlines as much as correctness, `world_taste:ada@0.3` is user Ada with less weight on her
taste, and `world_taste:pastel@1` is the bare style. Rules and users are in `diffalign.world.taste`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.rewards import Reward, RewardError
from diffalign.world import taste, verifier

DEFAULT_WEIGHT = 0.5


class WorldTaste(Reward):
    """(1 - weight) * verifier score + weight * taste, for 32 x 32 pictures of the tiny world."""

    range = (0.0, 1.0)
    unit = "weighted mean of the share of promises kept and of how much the style is liked"
    differentiable = False
    weights = None
    licence = "Apache-2.0 (code only)"
    gap = "none: this is the original"
    argument = f"TASTE or TASTE@WEIGHT, such as outlined or ada@0.3 (default outlined@{DEFAULT_WEIGHT})"

    def __init__(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, what: str = "outlined"
    ) -> None:
        self.taste, self.weight = _parse(what)

    @classmethod
    def check_argument(cls, argument: str | None) -> None:
        if argument is not None:
            _parse(argument)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        try:
            scores = [
                taste.combined(reading, prompt, self.taste, self.weight)
                for reading, prompt in zip(verifier.read(images), prompts, strict=True)
            ]
        except ValueError as error:  # another size, or a prompt of another world
            raise RewardError(f"world_taste: {error}") from error
        return torch.tensor(scores, device=images.device)


def _parse(what: str) -> tuple[taste.Taste, float]:
    name, at, number = what.partition("@")
    try:
        weight = float(number) if at else DEFAULT_WEIGHT
    except ValueError as error:
        raise ConfigError(f"world_taste: weight {number!r} is not a number; write TASTE@0.5") from error
    if not 0 <= weight <= 1:
        raise ConfigError(f"world_taste: weight {weight} is outside [0, 1]")
    return taste.find(name), weight
