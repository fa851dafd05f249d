"""JPEG compressibility: minus the size of a picture's JPEG file, for pictures that are easy to compress.

Paper: Black et al. 2023, "Training Diffusion Models with Reinforcement Learning" (DDPO), arXiv 2305.13301; code:
kvablack/ddpo-pytorch:ddpo_pytorch/rewards.py (commit 1958463f): quality 95, Pillow's defaults otherwise. No weights, no
prompt, the same on every machine with the same libjpeg: a good first reward for a new set-up. Published in kilobytes of
1000; flow_grpo and DiffusionNFT divide by 500.
"""

from __future__ import annotations

import io
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.rewards import Reward

QUALITY = 95


class JpegCompressibility(Reward):
    """Minus the size of a picture as JPEG of quality 95; the prompt is not read."""

    sign: ClassVar[int] = -1
    range = (-float("inf"), 0.0)
    unit = "kB (1000 bytes); -200 to -30 for pictures of 512 x 512; grows with the number of pixels"
    differentiable = False
    weights = None
    licence = "Apache-2.0 (code only)"
    gap = "none but the version of libjpeg in Pillow, which may move a size by a few bytes"

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        pass

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        arrays = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([self.sign * _bytes(array) / 1000 for array in arrays], device=images.device)


def _bytes(array: Any) -> int:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell()
