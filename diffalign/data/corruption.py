"""Corrupted images, as the rejected side of a pair or as the wrong condition of one.

POVID (2402.11411) and MMed-RAG (2410.13085) make negatives so; kinds and scales here are ours.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from diffalign.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

Corruption: TypeAlias = Literal["noise", "blur", "mask", "jpeg"]
KINDS = ("noise", "blur", "mask", "jpeg")
GRID = 8  # cells per side for "mask"


def image_corruption(
    image: Image, kind: Corruption, strength: float, generator: torch.Generator | None = None
) -> Image:
    """A corrupted copy of an image, of the same size, RGB.

    - "noise": sqrt(1 - s^2) x + s n with pixels x in [-1, 1] and standard normal n, clipped: a step of a diffusion
      process with alpha-bar = 1 - s^2.
    - "blur": Gaussian, radius s times an eighth of the shorter side.
    - "mask": a share s of the cells of an 8 x 8 grid is mid-grey; which ones is drawn.
    - "jpeg": saved and read again at quality 95 - 94 s.

    Args:
        image: of any mode.
        kind: see above.
        strength: s in [0, 1]; 0 leaves the image as it is.
        generator: of the draws (CPU); None uses the global one.

    Raises:
        ConfigError: unknown kind, or a strength out of range.
    """
    if kind not in KINDS or not 0 <= strength <= 1:
        raise ConfigError(
            f"image corruption {kind!r} of strength {strength:g}: one of {', '.join(KINDS)} in [0, 1] expected"
        )
    rgb = image.convert("RGB")
    if strength == 0:
        return rgb if rgb is not image else image.copy()
    if kind == "noise":
        return _noise(rgb, strength, generator)
    if kind == "blur":
        from PIL import ImageFilter

        return rgb.filter(ImageFilter.GaussianBlur(strength * min(rgb.size) / 8))
    return _mask(rgb, strength, generator) if kind == "mask" else _jpeg(rgb, round(95 - 94 * strength))


def _noise(image: Image, strength: float, generator: torch.Generator | None) -> Image:
    import numpy as np
    from PIL import Image as Images

    x_HWC = torch.from_numpy(np.asarray(image).copy()).float() / 127.5 - 1
    noisy = (1 - strength**2) ** 0.5 * x_HWC + strength * torch.randn(x_HWC.shape, generator=generator)
    return Images.fromarray(((noisy.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy())


def _mask(image: Image, strength: float, generator: torch.Generator | None) -> Image:
    width, height = image.size
    masked = image.copy()
    for cell in torch.randperm(GRID * GRID, generator=generator)[: round(strength * GRID * GRID)].tolist():
        y, x = divmod(cell, GRID)
        box = (x * width // GRID, y * height // GRID, (x + 1) * width // GRID, (y + 1) * height // GRID)
        masked.paste((128, 128, 128), box)
    return masked


def _jpeg(image: Image, quality: int) -> Image:
    from PIL import Image as Images

    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Images.open(io.BytesIO(buffer.getvalue())).convert("RGB")
