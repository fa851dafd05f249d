"""Decoding, resizing and cropping of images and clips, with the numbers SDXL wants to know about it.

Sizes are (height, width) and offsets (y, x) in pixels throughout, the order of diffusers' time ids. Resizing is
bilinear with antialiasing, as in the published Diffusion-DPO preprocessing; an image of the right size is not touched.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffalign.errors import ConfigError

Size = tuple[int, int]
Resampling = Literal["bilinear", "bicubic"]


class UndecodableImage(Exception):  # noqa: N818 - what it says of the image
    """Bytes that are not a whole image, with the reason."""


# What Pillow raises for broken files of one format or another; MemoryError comes from absurd sizes in a header.
DECODING_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    IndexError,
    KeyError,
    MemoryError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


@dataclass(frozen=True)
class Pixels:
    """One image or clip, ready for the VAE.

    Attributes:
        pixels: float32 RGB in [-1, 1], shape (3, H, W), of clips (3, F, H, W).
        original_size: (h, w) before resizing, upright.
        crop_top_left: (y, x) of the crop in the resized (and, if flipped, mirrored) image.
        target_size: (H, W).
        flipped: mirrored left to right.
    """

    pixels: Tensor
    original_size: Size
    crop_top_left: Size
    target_size: Size
    flipped: bool


def decode(data: bytes) -> Image.Image:
    """Decode to upright RGB; transparency is laid on white.

    Raises:
        UndecodableImage: not an image, cut short, or far too large.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return to_rgb(upright(image))
    except DECODING_ERRORS as error:
        raise UndecodableImage(reason(error)) from error


def reason(error: BaseException) -> str:
    """What a library says is wrong with a file, in one line."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image format that Pillow knows"  # its own text has a memory address
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data say."""
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, TypeError, KeyError, struct.error):
        return image  # broken EXIF says nothing about the pixels


def to_rgb(image: Image.Image) -> Image.Image:
    """8 bits of red, green and blue; transparency is laid on white."""
    if image.mode.startswith("I"):  # 16 bits of grey; a plain conversion would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


@dataclass(frozen=True)
class Crop:
    """What is done to an image: resize to `resized` (h, w), then cut `target` (h, w) at `top_left` (y, x)."""

    resized: Size
    top_left: Size
    target: Size


def plan_crop(size: Size, target: Size, generator: torch.Generator | None = None) -> Crop:
    """Resize so that the image just covers the target, keeping its aspect, then crop.

    Args:
        size: (h, w) of the image.
        target: (h, w) wanted.
        generator: draws the offset; None crops at the centre.
    """
    height, width = target
    scale = max(height / size[0], width / size[1])
    resized = max(height, round(size[0] * scale)), max(width, round(size[1] * scale))
    spare = resized[0] - height, resized[1] - width
    if generator is None:
        return Crop(resized, (spare[0] // 2, spare[1] // 2), target)
    top, left = (int(torch.randint(0, n + 1, (), generator=generator)) for n in spare)
    return Crop(resized, (top, left), target)


def transform(
    image: Image.Image | Sequence[Image.Image],
    target: Size,
    *,
    crop: Literal["center", "random"] = "center",
    flip: bool = False,
    generator: torch.Generator | None = None,
    resampling: Resampling = "bilinear",
) -> Pixels:
    """Resize to cover, mirror if asked, crop, and scale to [-1, 1].

    Args:
        image: RGB; the frames of a clip, all of one size, get the same crop. A clip of one frame is an image.
        target: (h, w).
        crop: where to cut.
        flip: mirror left to right; both images of a pair get the same.
        generator: draws a random crop; needed for that only.
        resampling: how it is resized.
    """
    assert crop == "center" or generator is not None, "a random crop needs a generator"
    frames = [image] if isinstance(image, Image.Image) else list(image)
    original = (frames[0].height, frames[0].width)
    plan = plan_crop(original, target, generator if crop == "random" else None)
    cut = [to_tensor(_cut(frame, plan, flip, resampling)) for frame in frames]
    pixels = cut[0] if len(cut) == 1 else torch.stack(cut, dim=1)
    return Pixels(pixels, original, plan.top_left, target, flip)


def _cut(image: Image.Image, plan: Crop, flip: bool, resampling: Resampling) -> Image.Image:
    if plan.resized != (image.height, image.width):
        image = image.resize(
            plan.resized[::-1], Image.Resampling[resampling.upper()]
        )  # Pillow's sizes are (width, height)
    if flip:
        image = ImageOps.mirror(image)
    top, left = plan.top_left
    height, width = plan.target
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image to float32 in [-1, 1]; HWC uint8 -> CHW."""
    array = torch.from_numpy(np.array(image, dtype=np.uint8))
    return array.permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1.0).contiguous()


# --- buckets ---------------------------------------------------------------------------------------------------------


def buckets(resolution: int, step: int = 64, max_ratio: float = 2.0) -> list[Size]:
    """Sizes (h, w) in multiples of `step` with about the area of a square, and never more.

    Args:
        resolution: side of the square in pixels.
        step: a multiple of the VAE's factor; small resolutions need a small one.
        max_ratio: longest aspect ratio.

    Returns:
        The square first, then from mild to extreme ratios.

    Raises:
        ConfigError: the resolution is not a multiple of the step.
    """
    if resolution < step or resolution % step:
        near = max(step, round(resolution / step) * step)
        raise ConfigError(f"data.resolution: got {resolution}; a multiple of {step} expected, such as {near}")
    sizes: list[Size] = [(resolution, resolution)]
    for short in range(resolution - step, 0, -step):
        long = resolution * resolution // short // step * step
        if long / short > max_ratio:
            break
        if long > short:
            sizes += [(short, long), (long, short)]
    return sizes


def nearest_bucket(size: Size, choices: Sequence[Size]) -> Size:
    """The bucket whose aspect is nearest on a log scale; the first of equals."""
    return pair_bucket((size,), choices)


def pair_bucket(sizes: Sequence[Size], choices: Sequence[Size]) -> Size:
    """One bucket for all images of a pair: nearest to the mean of their log aspects."""
    aspect = sum(math.log(h / w) for h, w in sizes) / len(sizes)
    # Rounded, because equal distances on both sides of the square must not be decided by the last bit.
    return min(choices, key=lambda hw: round(abs(math.log(hw[0] / hw[1]) - aspect), 9))
