"""JPEG incompressibility: the size of a picture's JPEG file, for pictures that are hard to compress.

Paper, code and scale as in `jpeg_compressibility`, with the other sign.
"""

from __future__ import annotations

from typing import ClassVar

from reward_models.jpeg_compressibility import JpegCompressibility


class JpegIncompressibility(JpegCompressibility):
    """The size of a picture as JPEG of quality 95; the prompt is not read."""

    sign: ClassVar[int] = 1
    range = (0.0, float("inf"))
    unit = "kB (1000 bytes); 30 to 200 for pictures of 512 x 512; grows with the number of pixels"
