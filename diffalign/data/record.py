"""The canonical record: one comparison, whatever data set it came from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageItem:
    """One image, not decoded.

    Attributes:
        data: encoded bytes (JPEG, PNG, WebP), or None if `path` is given.
        path: file to read, or None if `data` is given.
        model: who made it, where known.
        uid: the source's own id, where it has one.
    """

    data: bytes | None = None
    path: Path | None = None
    model: str | None = None
    uid: str | None = None

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            OSError: the file cannot be read.
        """
        if self.data is not None:
            return self.data
        assert self.path is not None, "an image has bytes or a path"
        return self.path.read_bytes()


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
    """

    id: str
    prompt: str
    images: tuple[ImageItem, ...]
    p: float | None
    weight: float = 1.0
    user: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def record_id(source: str, split: str, shard: str, row: int | str) -> str:
    """The stable id of a row: 16 hex digits."""
    return hashlib.sha256(f"{source}\n{split}\n{shard}\n{row}".encode()).hexdigest()[:16]
