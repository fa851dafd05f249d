"""HPS v2.0: a CLIP ViT-H/14 fine-tuned on the Human Preference Dataset v2.

Paper: Wu et al. 2023, "Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image
Synthesis", arXiv 2306.09341; code: tgxs002/HPSv2:hpsv2/img_score.py (commit 866735ec). Score = cosine(picture, prompt),
without the logit scale; published tables are 100 times that. Versions 2.0 (this one) and 2.1 (`hpsv2_1`) are different
weights on different scales: SD1.5 has about 0.27 under 2.0 and 0.24 to 0.25 under 2.1; never compare across them. The
package's `score` defaults to 2.0, its `evaluate` to 2.1.

The original resizes a float tensor, in one pass and without clamping (bicubic, antialiased since torchvision 0.17; older
versions did not antialias tensors and gave other scores). So does this one, and not as Pillow, which the other rewards
imitate.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffalign.errors import ConfigError
from diffalign.rewards import CLIP_MEAN, CLIP_STD, Reward, RewardError, cosine, normalise, to_eight_bit
from reward_models._weights import fill, find_file, read_state

REPOSITORY = "xswu/HPSv2"
REVISION = "697403c78157020a1ae59d23f111aa58ced35b0a"
ARCHITECTURE = "ViT-H-14"  # of open_clip


class HPSv2(Reward):
    """Human preference score v2.0: cosine of picture and prompt under a CLIP fine-tuned on people's rankings."""

    name: ClassVar[str] = "hpsv2"  # in messages
    file: ClassVar[str] = "HPS_v2_compressed.pt"
    range = (-1.0, 1.0)
    unit = "cosine; 0.24 to 0.30 for SD1.5 to SD3.5 pictures (published as 24 to 30)"
    differentiable = True
    weights = f"{REPOSITORY}@{REVISION}:{file}"
    licence = "Apache-2.0"
    gap = (
        "the original runs under autocast in float16; scores of the published weights are UNVERIFIED here (preprocessing "
        "and loading are tested on random weights)"
    )
    argument = "path of the checkpoint file; default: from $DIFFALIGN_WEIGHTS or the hub"

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        checkpoint: str | Path | None = None,
        *,
        architecture: str | Mapping[str, Any] = ARCHITECTURE,
    ) -> None:
        import open_clip

        name = self.name
        path = find_file(name, REPOSITORY, self.file, REVISION) if checkpoint is None else Path(checkpoint)
        state = read_state(name, path)
        state.pop("attn_mask", None)  # a constant that old checkpoints hold
        known = open_clip.get_model_config(architecture) if isinstance(architecture, str) else dict(architecture)
        if known is None:
            raise RewardError(f"{name}: open_clip knows no architecture {architecture!r}")
        self.towers = open_clip.CLIP(**known)
        fill(name, path, self.towers, state)
        self.towers.eval().requires_grad_(False).to(device, dtype)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.towers.context_length)
        self.image_size = int(known["vision_cfg"]["image_size"])
        self.device, self.dtype = torch.device(device), dtype
        self.eight_bit = True  # off: smooth in the pixels

    @classmethod
    def check_argument(cls, argument: str | None) -> None:
        if argument is not None and not Path(argument).is_file():
            raise ConfigError(f"{cls.name}: checkpoint {argument!r} does not exist")

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        pixels = preprocess(images, self.image_size, eight_bit=self.eight_bit).to(self.device, self.dtype)
        distinct = list(dict.fromkeys(prompts))
        texts = self.towers.encode_text(self.tokenizer(distinct).to(self.device))
        rows = [distinct.index(prompt) for prompt in prompts]
        return cosine(self.towers.encode_image(pixels), texts[rows])


def preprocess(images: Tensor, size: int, *, eight_bit: bool = True) -> Tensor:
    """The original's transform of a float tensor: shorter side to `size`, centre crop, normalise; no clamp between.

    Args:
        images: float RGB in [0, 1], shape (B, 3, H, W).
        size: side of the square that the tower reads, in pixels.
        eight_bit: round the pictures to the 8-bit grid first (gradient straight through), as the original's files are.
    """
    images = to_eight_bit(images.float()) if eight_bit else images.float().clamp(0, 1)
    height, width = images.shape[-2:]
    short = min(height, width)
    shape = tuple(size if side == short else int(size * side / short) for side in (height, width))
    if shape != (height, width):
        images = interpolate(images, shape, mode="bicubic", antialias=True, align_corners=False)
    top, left = (round((side - size) / 2) for side in shape)
    return normalise(images[..., top : top + size, left : left + size], CLIP_MEAN, CLIP_STD)
