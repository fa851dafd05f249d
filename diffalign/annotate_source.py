"""What `diffalign annotate` labels: pairs of pictures with a prompt, or pictures that share a prompt.

| source | what it holds |
| --- | --- |
| JSONL, JSON, CSV or parquet with two pictures a row (`PAIR_COLUMNS`) | a pair a row; a `label_0` is compared with |
| the same with one picture a row (as `diffalign score` reads them) | groups of the same prompt |
| a folder with two folders of same-named pictures | pairs, prompts in `<first folder>/<name>.txt` |
| a folder of pictures (as `diffalign score` reads it) | groups of the same prompt |
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign import score
from diffalign.data.readers import BadRow, UnreadableShard, prompt_text
from diffalign.data.readers.text import raw_rows
from diffalign.data.record import IMAGE_SUFFIXES
from diffalign.data.report import DataReport
from diffalign.errors import DataError
from diffalign.files import atomic_write_bytes

PAIR_COLUMNS = (("image_0", "image_1"), ("jpg_0", "jpg_1"), ("image_a", "image_b"), ("chosen", "rejected"))


@dataclass(frozen=True)
class Item:
    """One picture: the row it is from, its file, and the hash of what is in it."""

    row: int
    name: str
    path: Path
    digest: str


@dataclass
class Group:
    """Pictures of one prompt that are compared with each other.

    Attributes:
        row: of the source, or of its first picture.
        given: probability that the first of two is better, as the source says it.
        metadata: columns that rewards get to see.
    """

    row: int
    prompt: str
    items: list[Item]
    given: float | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


class Store:
    """The pictures of the result: one file for each content, in `images/` of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "images"
        self.folder.mkdir(parents=True, exist_ok=True)

    def item(self, row: int, name: str, data: Path | bytes) -> Item:
        """A picture, whose bytes are put away if they are no file yet.

        Raises:
            BadRow: the file cannot be read.
        """
        if isinstance(data, bytes):
            digest = hashlib.sha256(data).hexdigest()
            path = self.folder / f"{digest[:20]}{_suffix(data)}"
            if not path.exists():
                atomic_write_bytes(path, data)
            return Item(row, name, path, digest)
        try:
            return Item(row, name, data, hashlib.sha256(data.read_bytes()).hexdigest())
        except OSError as error:
            raise BadRow("missing_image", f"{name}: {error.strerror}") from error

    def keep(self, item: Item) -> str:
        """The name, from the folder's parent, of a picture's copy: the same file under a second name where that can be."""
        if item.path.parent == self.folder:
            return f"images/{item.path.name}"
        suffix = item.path.suffix.lower()
        path = self.folder / f"{item.digest[:20]}{suffix if suffix in IMAGE_SUFFIXES else '.png'}"
        if not path.exists():
            temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
            try:
                os.link(item.path.resolve(), temporary)
            except OSError:  # another file system, or one without links
                shutil.copyfile(item.path, temporary)
            os.replace(temporary, path)
        return f"images/{path.name}"


def _suffix(data: bytes) -> str:
    kinds = ((b"\xff\xd8", ".jpg"), (b"GIF8", ".gif"), (b"RIFF", ".webp"), (b"BM", ".bmp"))
    return next((suffix for start, suffix in kinds if data.startswith(start)), ".png")


def read(settings: score.Settings, report: DataReport, store: Store) -> list[Group]:
    """All groups of at least two pictures, in the order of the source; what cannot be read goes into the report.

    Args:
        settings: source, prompts and columns, as `diffalign score` takes them.
        report: counts the rows.
        store: where bytes go.

    Raises:
        DataError: nothing can be compared.
    """
    pairs: list[Group] = []
    shared: dict[str, Group] = {}
    folders = two_folders(settings.source)
    rows = _of_folders(*folders) if folders else _rows(settings, report)
    for row, found in rows:
        report.read()
        try:
            if isinstance(found, BadRow):
                raise found
            prompt, seen, given, metadata = found
            items = [store.item(row, name, data) for name, data in seen]
        except BadRow as bad:
            report.skip(str(row), bad.reason, bad.detail, shard=settings.source.name, row=row)
            continue
        if len(items) == 2:
            pairs.append(Group(row, prompt, items, given, metadata))
        else:
            group = shared.setdefault(prompt, Group(row, prompt, [], None, metadata))
            if all(item.digest != items[0].digest for item in group.items):
                group.items.append(items[0])
            else:
                report.skip(str(row), "duplicate", "the same picture again", shard=settings.source.name, row=row)
    for prompt, group in shared.items():
        if len(group.items) < 2:
            report.skip(
                str(group.row),
                "single",
                f"the only picture of {prompt[:80]!r}",
                shard=settings.source.name,
                row=group.row,
            )
    groups = [*pairs, *(group for group in shared.values() if len(group.items) > 1)]
    if not groups:
        raise DataError(
            f"annotate: nothing in {settings.source} can be compared; rows with two pictures ("
            f"{', '.join(' and '.join(pair) for pair in PAIR_COLUMNS)}) or several pictures of a prompt expected. "
            f"{report.summary()}; {report.example()}"
        )
    return groups


_Row = tuple[str, list[tuple[str, "Path | bytes"]], "float | None", dict[str, Any]]


def two_folders(source: Path) -> tuple[Path, Path] | None:
    """The two folders of a folder that holds no pictures itself; chosen/ comes before rejected/."""
    if not source.is_dir() or any(path.suffix.lower() in IMAGE_SUFFIXES for path in source.iterdir()):
        return None
    folders = sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    return (folders[0], folders[1]) if len(folders) == 2 else None


def _of_folders(first: Path, second: Path) -> Iterator[tuple[int, _Row | BadRow]]:
    sides = []
    for folder in (first, second):
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        sides.append({path.stem: path for path in files if not path.name.startswith(".")})
    given = 1.0 if (first.name, second.name) == ("chosen", "rejected") else None
    for row, stem in enumerate(sorted(sides[0].keys() | sides[1].keys())):
        lacking = [folder.name for folder, files in zip((first, second), sides, strict=True) if stem not in files]
        try:
            if lacking:
                raise BadRow("missing_image", f"{stem}: none in {lacking[0]}/")
            text = prompt_text((first / f"{stem}.txt").read_text(encoding="utf-8").strip(), f"{first.name}/{stem}.txt")
            both = [(f"{files[stem].parent.name}/{files[stem].name}", files[stem]) for files in sides]
            yield row, (text, [*both], given, {})
        except OSError as error:
            yield row, BadRow("missing_prompt", f"{first.name}/{stem}.txt: {error.strerror}")
        except BadRow as bad:
            yield row, bad


def _rows(settings: score.Settings, report: DataReport) -> Iterator[tuple[int, _Row | BadRow]]:
    if settings.source.is_dir():
        for row, picture in score.folder_rows(settings):
            yield row, picture if isinstance(picture, BadRow) else _alone(picture)
        return
    try:
        for row, values in raw_rows(settings.source):
            try:
                if isinstance(values, BadRow):
                    yield row, values
                elif columns := next((p for p in PAIR_COLUMNS if any(values.get(c) is not None for c in p)), None):
                    yield row, _pair(settings, row, values, columns)
                else:
                    yield row, _alone(score.file_row(settings, row, values))
            except BadRow as bad:
                yield row, bad
    except UnreadableShard as error:
        report.bad_shard(settings.source.name, str(error))


def _alone(picture: score.Picture) -> _Row:
    prompt_text(picture.prompt, "prompt")
    return picture.prompt, [(picture.name, picture.data)], None, picture.metadata


def _pair(settings: score.Settings, row: int, values: dict[str, Any], columns: tuple[str, str]) -> _Row:
    seen = [score.locate(values.get(column), settings.source.parent, row, column) for column in columns]
    prompt, metadata = score.words_of(settings, values)
    given = 1.0 if columns[0] == "chosen" else None
    label = values.get("label_0")
    if isinstance(label, (int, float, str)) and not isinstance(label, bool):
        try:
            given = float(label)
        except ValueError:
            raise BadRow("bad_label", f"label_0 is {label!r}; 0, 0.5 or 1 expected") from None
        if not 0 <= given <= 1:
            raise BadRow("bad_label", f"label_0 is {label!r}; 0, 0.5 or 1 expected")
    return prompt_text(prompt, "prompt"), seen, given, metadata
