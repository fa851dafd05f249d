"""CLIP score: how well a picture matches its prompt, by a contrastive image-text model.

Paper: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020.
"CLIP score" names several things; this one is 100 * cosine (the model's logit). Raw cosine: divide by 100. Hessel et
al. 2021 (arXiv 2104.08718): 2.5 * max(cosine, 0). The tower matters more than the scale: OpenAI's L/14 gives 20 to 32,
laion's H/14 25 to 40 (`clip_score:laion/CLIP-ViT-H-14-laion2B-s32B-b79K`); never compare across towers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards import ClipTowers, Reward, cosine, preprocess

MODEL = "openai/clip-vit-large-patch14"
REVISION = "32bd64288804d66eefd0ccbe215aa642df71cc41"


class ClipScore(Reward):
    """100 x cosine between the CLIP embeddings of picture and prompt."""

    range = (-100.0, 100.0)
    unit = "100 x cosine; 20 to 32 for ordinary pictures under ViT-L/14"
    differentiable = True
    weights = f"{MODEL}@{REVISION}"
    licence = "MIT"
    gap = "resizing is within 2/255 of Pillow's; prompts beyond 77 tokens are cut with the end token kept"
    argument = "hub id or folder of another transformers CLIP model"

    def __init__(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, model: str | Path = MODEL
    ) -> None:
        revision = REVISION if str(model) == MODEL else None
        self.towers = ClipTowers(model, revision=revision, device=device, dtype=dtype)
        self.eight_bit = True  # see `preprocess`

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        pixels = preprocess(images, self.towers.image_size, eight_bit=self.eight_bit)
        return 100 * cosine(self.towers.embed_images(pixels), self.towers.embed_texts(prompts))
