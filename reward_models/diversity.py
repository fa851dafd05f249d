"""Diversity: how different a picture is from the others of its prompt, in the eyes of a CLIP image tower.

Paper: Cideron et al. 2024 (ICLR 2025), "Diversity-Rewarded CFG Distillation", arXiv 2410.06084: r = 1 - cos(E(x), E(x')),
for pairs of one prompt; a picture gets the mean over its partners. The paper is about music and embeds sound; CLIP for
images is this translation's choice.

On its own it is raised by noise and by pictures of something else: train it beside a reward of quality, or with a guided
reference that is pulled to (`reference.guidance_scale` with the objective's `beta`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards import ClipTowers, Reward, preprocess
from diffalign.world.names import TINY_CLIPS, base_folder

MODEL = "openai/clip-vit-large-patch14"
REVISION = "32bd64288804d66eefd0ccbe215aa642df71cc41"


class Diversity(Reward):
    """1 - cosine between the CLIP embeddings of a picture and of the others of its prompt, the mean over them."""

    range = (0.0, 2.0)
    unit = (
        "1 - cosine; 0 for pictures that are all alike, and for one that is alone; 0.1 to 0.4 is usual under ViT-L/14"
    )
    differentiable = False
    grouped = True
    weights = f"{MODEL}@{REVISION}"
    licence = "MIT"
    gap = "the paper embeds music with a network of its own; the constants for images are UNVERIFIED"
    argument = "hub id or folder of another transformers CLIP model; tiny-clip is the tiny world's"

    def __init__(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, model: str | Path = MODEL
    ) -> None:
        revision = REVISION if str(model) == MODEL else None
        source = base_folder(str(model)) if str(model) in TINY_CLIPS else model
        self.towers = ClipTowers(source, revision=revision, device=device, dtype=dtype)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        embedding = self.towers.embed_images(preprocess(images, self.towers.image_size))
        return mean_distance(embedding, prompts)


def mean_distance(embedding: Tensor, groups: list[str]) -> Tensor:
    """Mean of 1 - cosine to the others of the same group, float32 (B,); 0 for one that is alone.

    Args:
        embedding: (B, D), any length.
        groups: B names.
    """
    unit = embedding.float() / embedding.float().norm(dim=-1, keepdim=True)
    numbers = torch.tensor([groups.index(name) for name in groups], device=unit.device)
    partner = (numbers[:, None] == numbers[None, :]) & ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    distance = (1 - (unit[:, None, :] * unit[None, :, :]).sum(-1)) * partner
    return distance.sum(1) / partner.sum(1).clamp(min=1)
