"""Open Image Preferences v1, binarized (data-is-better-together, Apache-2.0): about 7,500 pairs at 1024 px.

Parquet with `prompt`, `chosen` and `rejected`, where the last two are image structs. Small, permissive and without
unsafe content: the open set to start with. The category is kept in `meta` where present.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffalign.data.readers import Place, Reader, image_bytes, optional_text, prompt_text, split_files
from diffalign.data.record import ImageItem, Record

REQUIRED = ("prompt", "chosen", "rejected")
OPTIONAL = ("chosen_model", "rejected_model", "category")


class ImagePreferences(Reader):
    """Parquet shards with the winner in `chosen`."""

    layout: ClassVar[str] = "parquet with columns prompt, chosen, rejected (Open Image Preferences, binarized)"
    labels: ClassVar[bool] = False

    def shards(self, files: Sequence[str], split: str) -> list[str]:
        return split_files(files, split, (".parquet",))

    def check(self, path: Path) -> None:
        from diffalign.data.readers import _parquet

        _parquet.check_columns(path, REQUIRED, ("chosen", "rejected"))

    def read(self, path: Path, place: Place) -> Iterator[Record]:
        from diffalign.data.readers import _parquet

        return place.records(_parquet.rows(path, REQUIRED + OPTIONAL), _parse)


def _parse(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": prompt_text(row["prompt"], "prompt"),
        "images": tuple(
            ImageItem(data=image_bytes(row[side], side), model=optional_text(row.get(f"{side}_model")))
            for side in ("chosen", "rejected")
        ),
        "p": 1.0,
        "meta": {"category": row["category"]} if row.get("category") is not None else {},
    }
