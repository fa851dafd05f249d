"""The tiny world's own CLIP as a reward: a differentiable approximation of the exact verifier, and of a taste.

`world_clip` is near the verifier's score; `world_clip:outlined` is near `world_taste:outlined` (a style word before the
caption). The shipped towers are learnt (`scripts/build_tiny_clip.py`), so unlike the verifier they have a gradient, and they
can be deceived: judge what was trained against them by `world_verifier`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffalign.errors import ConfigError, did_you_mean
from diffalign.rewards import ClipTowers, Reward, RewardError, cosine, preprocess
from diffalign.world.names import base_folder

TASTES = (
    "outlined",
    "plain",
    "striped",
    "pastel",
    "vivid",
)  # as `diffalign.world.clip`, without importing any model code

SIDE = 32


class WorldClip(Reward):
    """Cosine of the tiny CLIP: about the share of promises that a 32 x 32 picture keeps, differentiable."""

    range = (-1.0, 1.0)
    unit = "cosine, trained to be the verifier's score, or (verifier + taste) / 2; drawings of their caption have about 0.9"
    differentiable = True
    weights = None
    licence = "Apache-2.0 (code and weights)"
    gap = "none: this is the original; it approximates world_verifier and world_taste"
    argument = f"a taste: {', '.join(TASTES)} (default: none, the caption alone)"

    def __init__(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, taste: str | None = None
    ) -> None:
        self.check_argument(taste)
        self.towers = ClipTowers(base_folder("tiny-clip"), device=device, dtype=dtype)
        self.prefix = "" if taste is None else f"{taste}, "
        self.eight_bit = True  # see `preprocess`

    @classmethod
    def check_argument(cls, argument: str | None) -> None:
        if argument is not None and argument not in TASTES:
            near = did_you_mean(argument, TASTES) or ";"
            raise ConfigError(f"world_clip: taste {argument!r} not found{near} Available: {', '.join(TASTES)}")

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        if tuple(images.shape[-2:]) != (SIDE, SIDE):
            raise RewardError(
                f"world_clip: images have shape {tuple(images.shape)}; the tiny world's are (B, 3, {SIDE}, {SIDE})"
            )
        pixels = preprocess(images, SIDE, eight_bit=self.eight_bit)
        texts = [self.prefix + prompt for prompt in prompts]
        return cosine(self.towers.embed_images(pixels), self.towers.embed_texts(texts))
