"""The tiny world's exact verifier as a reward: how many of the caption's promises a picture keeps.

Reads background, count, colour, shape, size and relation back from the pixels (`diffalign.world.verifier`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffalign.errors import ConfigError, did_you_mean
from diffalign.rewards import Reward, RewardError
from diffalign.world import verifier

PARTS = ("score", "strict", "background", "count", "colour", "shape", "bound")  # those that every caption has


class WorldVerifier(Reward):
    """Share of the caption's promises that a 32 x 32 picture of the tiny world keeps."""

    range = (0.0, 1.0)
    unit = "share of promises kept; the world's own drawings have 1, drawings of other captions about 0.3"
    differentiable = False
    weights = None
    licence = "Apache-2.0 (code only)"
    gap = "none: this is the original"
    argument = f"part of the verdict: {', '.join(PARTS)} (default: score, the mean; strict: 1 only if all are right)"

    def __init__(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, part: str = "score"
    ) -> None:
        self.check_argument(part)
        self.part = part

    @classmethod
    def check_argument(cls, argument: str | None) -> None:
        if argument is not None and argument not in PARTS:
            near = did_you_mean(argument, PARTS) or ";"
            raise ConfigError(f"world_verifier: part {argument!r} not found{near} Available: {', '.join(PARTS)}")

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        try:
            verdicts = verifier.verify(images, prompts)
        except ValueError as error:  # another size, or a prompt of another world
            raise RewardError(f"world_verifier: {error}") from error
        return torch.tensor([verdict[self.part] for verdict in verdicts], device=images.device)
