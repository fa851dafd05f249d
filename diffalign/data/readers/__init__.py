"""Readers: one file per data set layout. A reader says which files it needs and turns their rows into records.

A reader does not judge: ties, unlabelled rows and duplicates are the pipeline's business. It only refuses what it
cannot read (`BadRow`), one row at a time, so that one bad row never costs the rest of a shard.
"""

from __future__ import annotations

import abc
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal, TypeVar

from diffalign.data.record import IMAGE_SUFFIXES, VIDEO_SUFFIXES, ImageItem, Record, frames_of, record_id
from diffalign.data.report import DataReport

Raw = TypeVar("Raw")

MEDIA_SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES


class BadRow(Exception):  # noqa: N818 - a verdict on one row, not a failure
    """One row that cannot be used: a short reason that is counted, and a detail that is listed."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class UnreadableShard(Exception):  # noqa: N818 - a verdict on one file
    """A whole file that is not what its name says, or whose rest is lost."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a shard's rows come from, and where what happens to them is counted.

    Attributes:
        source: name of the source, part of each record's id.
        split: split name, part of each record's id.
        shard: file name relative to `root`, part of each record's id.
        root: folder against which the source's relative paths are resolved.
        report: counts rows read and rows that are not usable.
    """

    source: str
    split: str
    shard: str
    root: Path
    report: DataReport

    def records(
        self, rows: Iterable[tuple[int | str, Raw]], parse: Callable[[Raw], dict[str, Any]]
    ) -> Iterator[Record]:
        """Turn raw rows into records; a row whose `parse` raises `BadRow` is counted, listed and left out.

        Args:
            rows: (key, raw row); the key is the row's number or name, unique in the shard.
            parse: gives the fields of `Record` other than `id`; `extra` is checked here.
        """
        from diffalign.data.facts import BadFact, check_extra

        def checked(raw: Raw) -> dict[str, Any]:
            fields = parse(raw)
            try:
                check_extra(fields.get("extra", {}))
            except BadFact as error:
                raise BadRow(error.reason, str(error)) from None
            return fields

        for identity, meta, fields in self.rows(rows, checked):
            yield Record(id=identity, meta=meta, **fields)

    def rows(
        self, rows: Iterable[tuple[int | str, Raw]], parse: Callable[[Raw], dict[str, Any]]
    ) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """The same before it becomes a record of either kind: (id, meta, other fields)."""
        for row, raw in rows:
            identity = record_id(self.source, self.split, self.shard, row)
            self.report.read()
            try:
                fields = parse(raw)
            except BadRow as bad:
                self.report.skip(identity, bad.reason, bad.detail, shard=self.shard, row=row)
                continue
            meta = {"shard": self.shard, "row": row} | fields.pop("meta", {})
            yield identity, meta, fields


class Reader(abc.ABC):
    """A data set layout.

    Attributes:
        layout: one line for people: what a source of this format looks like.
        labels: rows say which side won (False: the layout itself puts the winner first).
        beside: needs other files beside its shards (`companions`).
        modality: what its records are made of: `Record` for images, `diffalign.text.records.TextRecord` for texts.
        facts: what rows may say beyond their label (`diffalign.data.facts`), in `Record.extra`.

    Args:
        rename: columns under other names, theirs to ours; only text readers have columns that can be renamed.
    """

    layout: ClassVar[str]
    labels: ClassVar[bool] = True
    beside: ClassVar[bool] = False
    modality: ClassVar[Literal["image", "text"]] = "image"
    facts: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, rename: Mapping[str, str] | None = None) -> None:
        self.rename = dict(rename or {})

    @abc.abstractmethod
    def shards(self, files: Sequence[str], split: str) -> list[str]:
        """The data shards of a split, in reading order.

        Args:
            files: relative paths ("/" between parts) of everything the source holds.
            split: split name.

        Returns:
            Paths out of `files`, or folders (ending in "/") that hold some of them. Empty: not this layout.
        """

    def companions(self, files: Sequence[str], split: str) -> list[str]:
        """Other files that must be there before the first shard is read (images next to an index, say)."""
        return []

    @abc.abstractmethod
    def check(self, path: Path) -> None:
        """Check a shard's schema without reading its images.

        Raises:
            DataError: columns are missing or of the wrong type; names what was found and what was expected.
            UnreadableShard: this file is broken.
        """

    @abc.abstractmethod
    def read(self, path: Path, place: Place) -> Iterator[Any]:
        """The records of one shard, in order, with few rows in memory at a time.

        Raises:
            UnreadableShard: the file, or the rest of it, cannot be read.
        """


# --- which files belong to a split -----------------------------------------------------------------------------------

_KNOWN_SPLIT = re.compile(r"(?:partial-)?(?P<split>(?:train|validation|valid|val|test|dev|eval)(?:_[a-z]+)*)(?![a-z])")


def split_files(files: Sequence[str], split: str, suffixes: tuple[str, ...]) -> list[str]:
    """Files with one of the suffixes that belong to `split`, sorted by name.

    A file belongs to it by its name ("train-00000-of-00645.parquet", "train.parquet") or by its folder
    ("train/0000.parquet"). Where no file carries any split name, all of them are the split "train".
    """
    data = sorted(f for f in files if f.lower().endswith(suffixes))
    named = [f for f in data if _names_split(f, split)]
    if named or split != "train":
        return named
    return data if not any(split_name(f) for f in data) else []


def _names_split(file: str, split: str) -> bool:
    path = PurePosixPath(file)
    stem = path.name.partition(".")[0]
    by_name = stem == split or re.match(rf"{re.escape(split)}[-_]\d", stem) is not None
    # A folder counts only for files that do not name a split themselves: "train/test-00000.parquet" is test.
    by_folder = not _split_of_stem(stem) and any(p in (split, f"partial-{split}") for p in path.parts[:-1])
    return by_name or by_folder


def split_name(file: str) -> str | None:
    """The well-known split ("train", "validation_unique", "test" ...) a file's name or folder states, or None."""
    path = PurePosixPath(file)
    parts = (path.name.partition(".")[0], *reversed(path.parts[:-1]))
    return next((found for part in parts if (found := _split_of_stem(part))), None)


def _split_of_stem(stem: str) -> str | None:
    match = _KNOWN_SPLIT.match(stem)
    return match["split"] if match else None


# --- values ----------------------------------------------------------------------------------------------------------


def prompt_text(value: Any, column: str) -> str:
    """A prompt: a string with something in it, unchanged.

    Raises:
        BadRow: it is not.
    """
    if not isinstance(value, str):
        raise BadRow("bad_prompt", f"{column} is {type(value).__name__}; text expected")
    if not value.strip():
        raise BadRow("empty_prompt", f"{column} is empty")
    return value


def probability(label_0: Any, label_1: Any, names: tuple[str, str] = ("label_0", "label_1")) -> float:
    """P(image 0 is preferred) from two labels, which may be numbers or text.

    Raises:
        BadRow: a label is missing, is not one of 0, 1/2 and 1, or the two do not sum to 1.
    """
    first = _label(label_0, names[0])
    second = _label(label_1, names[1])
    if first + second != 1.0:
        raise BadRow("bad_label", f"{names[0]}={first:g} and {names[1]}={second:g} do not sum to 1")
    return first


def _label(value: Any, name: str) -> float:
    if value is None:
        raise BadRow("missing_label", f"{name} is null")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise BadRow("bad_label", f"{name} is {value!r}; 0, 0.5 or 1 expected") from None
    if number not in (0.0, 0.5, 1.0):
        raise BadRow("bad_label", f"{name} is {value!r}; 0, 0.5 or 1 expected")
    return number


def positive(value: Any, column: str) -> float:
    """A finite number above zero.

    Raises:
        BadRow: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise BadRow("bad_weight", f"{column} is {value!r}; a number above 0 expected")
    return float(value)


def optional_text(value: Any) -> str | None:
    """Ids of any type as text; None and "" stay None."""
    return None if value is None or value == "" else str(value)


def image_bytes(value: Any, column: str) -> bytes:
    """The encoded bytes of a parquet image cell: plain binary, or a `{bytes, path}` struct.

    Raises:
        BadRow: nothing there, or something else.
    """
    if isinstance(value, dict):
        value = value.get("bytes")
    if value is None or (isinstance(value, bytes) and not value):
        raise BadRow("missing_image", f"{column} has no bytes")
    if not isinstance(value, bytes):
        raise BadRow("missing_image", f"{column} is {type(value).__name__}; image bytes expected")
    return value


def image_file(folder: Path, name: Any, column: str) -> ImageItem:
    """An image or video file, or a folder of frames, named relative to `folder`.

    Raises:
        BadRow: not a name, outside of the folder, no such file, or a folder without images.
    """
    path = inside(folder, name, column)
    if path.is_dir() and not frames_of(path):
        raise BadRow("missing_image", f"{column} is {name!r}: a folder without images; its frames expected")
    return ImageItem(path=path)


def inside(folder: Path, name: Any, column: str, missing: str = "missing_image") -> Path:
    """A file named relative to `folder`.

    The check is on the name, not on what links resolve to: a user may link folders, a data file may not point outside.

    Raises:
        BadRow: not a name, outside of the folder, or no such file; `missing` is the reason of the first and the last.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise BadRow(missing, f"{column} is {name!r}; a file name expected")
    path = Path(os.path.normpath(folder / name))
    if not path.is_relative_to(os.path.normpath(folder)):
        raise BadRow("path_escapes", f"{column} is {name!r}, which is outside of the data folder")
    if not path.exists():
        raise BadRow(missing, f"{column} is {name!r}: no such file")
    return path
