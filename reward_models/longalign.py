"""LongAlign's preference: a CLIP for long captions whose prompts count less for what all prompts have in common.

Paper: Liu et al. 2024, "Improving Long-Text Alignment for Text-to-Image Diffusion Models", arXiv 2410.11817; code:
luping-liu/LongAlign:loss.py `dense_score` and tools.py (commit 61a10219). A prompt is split into sentences; its embedding t
is the mean of their unit embeddings under Denscore, a CLIP ViT-H/14 tuned on dense captions. The part of t along the shared
direction m, the normalised mean over many prompts, is what preference models like whatever was asked for. It gets weight w:

    score = (t - (1 - w) (t . m) m) . e,   e the unit embedding of the picture, w = 0.3

Neither the mean of the sentences nor the reweighted text is normalised again, as in the code. Sentences end where the code's
pattern says: at full stops and question marks, at `"!` and at `;"`.

The code takes m over the prompts of the batch on all devices, so that a score depends on its neighbours. Here m comes from
a file of prompts, one a line, named after the colon; without one it is the batch's, and a batch with a single prompt, for
which the method loses its meaning, is refused. The code crops 504 of 512 pixels at random against patterns of blocks while
it trains; here the crop is in the middle.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffalign.errors import ConfigError
from diffalign.rewards import CLIP_MEAN, CLIP_STD, ClipTowers, Reward, RewardError, normalise

MODEL = "luping-liu/Denscore"  # its revision is not pinned
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # only its tokenizer is read
PROCESSOR_REVISION = "1c2b8495b28150b8a4922ee1c8edee224c284c0c"
SHARED_WEIGHT = 0.3  # REWEIGHT in loss.py
SENTENCE_END = r'"!|\.|\?|;"'  # tools.py


class LongAlign(Reward):
    """Decomposed CLIP preference for long prompts (Denscore), with the part common to all prompts weighted down."""

    range = (-1.0, 1.0)
    unit = "product of the reweighted prompt and the unit picture, below their cosine"
    differentiable = True
    weights = f"{MODEL}@main (not pinned), {PROCESSOR}@{PROCESSOR_REVISION} (tokenizer)"
    licence = "UNVERIFIED (weights); Apache-2.0 (original code)"
    gap = (
        "the crop is in the middle instead of at random, the shared direction may come from a file instead of the batch; "
        "scores of the published weights are UNVERIFIED here"
    )
    argument = "path of a text file of prompts, one a line, for the shared direction (default: the batch)"

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        prompts: str | Path | None = None,
        *,
        model: str | Path = MODEL,
        shared_weight: float = SHARED_WEIGHT,
    ) -> None:
        original = str(model) == MODEL
        lines = None if prompts is None else _lines(Path(prompts))
        self.towers = ClipTowers(
            model,
            PROCESSOR if original else None,
            tokenizer_revision=PROCESSOR_REVISION if original else None,
            device=device,
            dtype=dtype,
        )
        self.shared_weight = shared_weight
        self.shared_D = None if lines is None else _direction(self.embed_texts(lines))

    @classmethod
    def check_argument(cls, argument: str | None) -> None:
        if argument is not None:
            _lines(Path(argument))

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        if self.shared_D is None and len(set(prompts)) < 2:
            raise RewardError(
                "longalign: the shared direction of a batch with one prompt is the prompt itself; name a file of "
                "prompts as in longalign:prompts.txt"
            )
        text_BD = self.embed_texts(prompts)
        shared_D = _direction(text_BD) if self.shared_D is None else self.shared_D
        along_B1 = (text_BD * shared_D).sum(-1, keepdim=True)
        text_BD = text_BD - (1 - self.shared_weight) * along_B1 * shared_D
        image_BD = self.towers.embed_images(preprocess(images, self.towers.image_size))
        return (image_BD / image_BD.norm(dim=-1, keepdim=True) * text_BD).sum(-1)

    @torch.no_grad()
    def embed_texts(self, prompts: list[str]) -> Tensor:
        """Means of the unit embeddings of each prompt's sentences, float32 (B, D); each distinct prompt is encoded once."""
        parts = {prompt: sentences(prompt) for prompt in dict.fromkeys(prompts)}
        unit = torch.nn.functional.normalize(
            self.towers.embed_texts([s for part in parts.values() for s in part]), dim=-1
        )
        means = {
            prompt: rows.mean(0)
            for prompt, rows in zip(parts, unit.split([len(p) for p in parts.values()]), strict=True)
        }
        return torch.stack([means[prompt] for prompt in prompts])


def sentences(prompt: str) -> list[str]:
    """The segments that the original encodes by themselves, each closed by a full stop; an empty prompt as it is."""
    return [part + "." for part in re.split(SENTENCE_END, prompt) if part] or [prompt]


def preprocess(images: Tensor, size: int) -> Tensor:
    """The original's transform of tensors: a square of 63/64 of the shorter side, bilinear to `size`, normalise."""
    height, width = images.shape[-2:]
    square = min(height, width) * 504 // 512
    top, left = (round((side - square) / 2) for side in (height, width))
    images = images.float().clamp(0, 1)[..., top : top + square, left : left + square]
    resized = interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return normalise(resized, CLIP_MEAN, CLIP_STD)


def _direction(text_BD: Tensor) -> Tensor:
    return torch.nn.functional.normalize(text_BD.mean(0), dim=0)


def _lines(path: Path) -> list[str]:
    """The prompts of a file.

    Raises:
        ConfigError: it is not there, or holds fewer than two.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"longalign: file of prompts {str(path)!r} cannot be read: {error}") from error
    if len(set(lines)) < 2:
        raise ConfigError(f"longalign: {str(path)!r} holds {len(set(lines))} prompts; two or more expected, one a line")
    return lines
