"""Texts as JSONL, JSON, parquet or CSV, with TRL's columns (see `diffalign.text.records`) or renamed to them.

A `.json` file holds one array of objects, or one object per line. In CSV every cell is a text; columns of numbers and
lists (`completions`, `scores`, `rank`) are read as JSON, and empty cells are absent. CSV holds no conversations.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

from diffalign.data.readers import BadRow, Place, Reader, UnreadableShard, split_files
from diffalign.errors import DataError
from diffalign.text.records import EXPECTED, TextRecord, known_columns, parse_row, renamed

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
CSV_BLOCK = 16 << 20  # bytes; a row must fit into one block
CSV_LISTS = frozenset({"completions", "scores", "rank"})
_OPTIONAL_FILES = ("dataset_info.json", "dataset_infos.json", "state.json")  # what `datasets` writes beside its data


class Text(Reader):
    """Texts of any of the formats, in any of the four file types."""

    layout: ClassVar[str] = f"JSONL, JSON, parquet or CSV with columns {EXPECTED}"
    labels: ClassVar[bool] = False  # the chosen side comes first
    modality: ClassVar[Literal["image", "text"]] = "text"

    def shards(self, files: Sequence[str], split: str) -> list[str]:
        data = [f for f in files if not f.endswith(_OPTIONAL_FILES)]
        return split_files(data, split, SUFFIXES)

    def check(self, path: Path) -> None:
        """Check that one of the first rows has the columns of a format."""
        found: dict[str, None] = {}
        for _, row in islice(raw_rows(path), 20):  # a few bad rows at the start are only bad rows
            if isinstance(row, BadRow):
                continue
            names = renamed(row, self.rename)
            if known_columns([name for name, value in names.items() if value is not None]):
                return
            found |= dict.fromkeys(names)
        if not found:
            raise DataError(f"{path}: no row in it can be read; expected {self.layout}")
        raise DataError(
            f"{path}: found columns {', '.join(found)}; expected {EXPECTED}: name them with data.rename, such as "
            "data.rename=[question=prompt,answer=completion]"
        )

    def read(self, path: Path, place: Place) -> Iterator[TextRecord]:
        for identity, meta, fields in place.rows(raw_rows(path), self._parse):
            yield TextRecord(id=identity, meta=meta, **fields)

    def _parse(self, row: dict[str, Any] | BadRow) -> dict[str, Any]:
        if isinstance(row, BadRow):
            raise row
        return parse_row(renamed(row, self.rename))


def raw_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """(row number, values by column) of a file; a row that cannot be read is a `BadRow` in its place.

    Raises:
        UnreadableShard: the file, or the rest of it, cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        from diffalign.data.readers import _parquet

        return iter(_parquet.rows(path, _parquet.columns(path)))
    if suffix == ".csv":
        return _csv(path)
    return _json(path) if suffix == ".json" else _lines(path)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """One object per line, numbered from 1; blank lines do not count as rows."""
    try:
        with path.open("rb") as file:
            yield from ((number, _object(line)) for number, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise UnreadableShard(f"cannot be read ({error.strerror})") from error


def _object(line: bytes) -> dict[str, Any] | BadRow:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        return BadRow("bad_json", str(error))
    return values if isinstance(values, dict) else BadRow("bad_json", f"{type(values).__name__}; an object expected")


def _json(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnreadableShard(f"cannot be read ({error.strerror})") from error
    if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _lines(path)
        return
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        raise UnreadableShard(f"not JSON ({error})") from error
    for number, value in enumerate(values, 1):
        good = isinstance(value, dict)
        yield number, value if good else BadRow("bad_json", f"{type(value).__name__}; an object expected")


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    import pyarrow as pa
    from pyarrow import csv

    bad: list[BadRow] = []

    def note(row: Any) -> str:
        bad.append(BadRow("bad_csv", f"{row.actual_columns} cells; {row.expected_columns} expected"))
        return "skip"

    try:
        with csv.open_csv(
            path,
            csv.ReadOptions(block_size=CSV_BLOCK, use_threads=False),
            csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note),
            csv.ConvertOptions(column_types=dict.fromkeys(_csv_header(path), pa.string())),
        ) as reader:
            number = 0
            for batch in reader:
                for values in batch.to_pylist():
                    number += 1
                    yield number, {k: _cell(k, v) for k, v in values.items()}
            for row in bad:  # pyarrow does not say where they stood
                number += 1
                yield number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UnreadableShard(f"not readable as CSV ({str(error).splitlines()[0]})") from error


def _csv_header(path: Path) -> list[str]:
    import csv

    with path.open(encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file), [])


def _cell(name: str, value: str | None) -> Any:
    if not value:
        return None
    if name not in CSV_LISTS and not name.endswith("_segments"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value  # refused by what reads the column, with its name
