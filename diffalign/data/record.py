"""The canonical record: one comparison, whatever data set it came from."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".apng"})
VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".mkv", ".avi", ".mov"})


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageItem:
    """One image or clip, not decoded.

    Attributes:
        data: encoded bytes (JPEG, PNG, WebP, GIF, mp4, ...), or None if `path` is given.
        path: file to read, or a folder with one image per frame; None if `data` is given.
        model: who made it, where known.
        uid: the source's own id, where it has one.
    """

    data: bytes | None = None
    path: Path | None = None
    model: str | None = None
    uid: str | None = None

    def read(self) -> bytes:
        """The encoded bytes; of a folder of frames one after the other.

        Raises:
            OSError: the file cannot be read.
        """
        return b"".join(self.parts())

    def parts(self) -> list[bytes]:
        """The encoded bytes of the file, or of every frame of a folder.

        Raises:
            OSError: a file cannot be read.
        """
        if self.data is not None:
            return [self.data]
        assert self.path is not None, "an image has bytes or a path"
        if not self.path.is_dir():
            return [self.path.read_bytes()]
        return [frame.read_bytes() for frame in frames_of(self.path)]


def frames_of(folder: Path) -> list[Path]:
    """The images in a folder, in the order in which people number them: frame_2 before frame_10."""
    images = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    return sorted(images, key=lambda path: (_numbered(path.name), path.name))


def _numbered(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One comparison. Images are never reordered by readers; `p` says which one won.

    Attributes:
        id: stable across runs: a hash of source, split, shard and row.
        prompt: exact text, never stripped.
        images: two for a comparison, one for an unpaired item, none for a bare prompt.
        p: probability that the first image is preferred: 1, 0, or 1/2 for a tie; None if it is not labelled.
        weight: of the pair in the loss.
        user: the annotator's id, where known.
        meta: anything else the source says (ranking id, model names, scores).
        extra: what the loss may read beyond the label (`diffalign.data.facts`): rewards, aspect, maps, prompts. JSON.
    """

    id: str
    prompt: str
    images: tuple[ImageItem, ...]
    p: float | None
    weight: float = 1.0
    user: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def prompts(self) -> tuple[str, ...]:
        """All distinct prompts: one, unless each image has its own."""
        return tuple(dict.fromkeys([self.prompt, *self.extra.get("prompts", ())]))


def record_id(source: str, split: str, shard: str, row: int | str) -> str:
    """The stable id of a row: 16 hex digits."""
    return hashlib.sha256(f"{source}\n{split}\n{shard}\n{row}".encode()).hexdigest()[:16]
