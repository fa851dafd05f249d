"""PickScore v1: a CLIP ViT-H/14 fine-tuned on the choices of Pick-a-Pic's users.

Paper: Kirstain et al. 2023, "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation", arXiv
2305.01569; code: yuvalkirstain/PickScore. Score = exp(logit_scale) * cosine(picture, prompt); for two pictures of one
prompt, sigmoid(s0 - s1) is the probability that the first is preferred. Published tables differ in scale: raw (18 to
24, this one), cosine (divide by exp(logit_scale), about 100), or raw / 26 (flow_grpo, DiffusionNFT).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards import ClipTowers, Reward, cosine, preprocess

MODEL = "yuvalkirstain/PickScore_v1"
REVISION = "a4e4367c6dfa7288a00c550414478f865b875800"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # only its tokenizer is read
PROCESSOR_REVISION = "1c2b8495b28150b8a4922ee1c8edee224c284c0c"


class PickScore(Reward):
    """Human preference for text-to-image pictures (Pick-a-Pic), as a logit."""

    range = (-100.0, 100.0)
    unit = "logit of the preference; 18 to 24 for SD1.5 to SD3.5 pictures; a difference of 1 is a 73 % preference"
    differentiable = True
    weights = f"{MODEL}@{REVISION}, {PROCESSOR}@{PROCESSOR_REVISION} (tokenizer)"
    licence = "MIT"
    gap = "resizing is within 2/255 of Pillow's; the cosine is float32 where the original follows the towers"
    argument = "folder or hub id of PickScore-like weights that come with their tokenizer"

    def __init__(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, model: str | Path = MODEL
    ) -> None:
        original = str(model) == MODEL
        self.towers = ClipTowers(
            model,
            PROCESSOR if original else None,
            revision=REVISION if original else None,
            tokenizer_revision=PROCESSOR_REVISION,
            device=device,
            dtype=dtype,
        )
        self.eight_bit = True  # see `preprocess`

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        pixels = preprocess(images, self.towers.image_size, eight_bit=self.eight_bit)
        return self.towers.logit_scale * cosine(self.towers.embed_images(pixels), self.towers.embed_texts(prompts))
