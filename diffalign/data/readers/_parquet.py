"""Parquet, a few rows at a time, with only the columns that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.data.readers import UnreadableShard
from diffalign.errors import DataError

BATCH_ROWS = 32  # about 12 MB of Pick-a-Pic images
# Read column chunks in pieces, by one thread and without reading ahead: a row group of 1,000 rows may hold 400 MB of
# images, and decoding in parallel was slower and took several times the memory.
_BUFFER = 1 << 20


def check_columns(path: Path, required: Sequence[str], images: Sequence[str]) -> None:
    """Check that `required` columns exist and that `images` hold bytes or `{bytes, path}` structs.

    Raises:
        DataError: they do not; names what was found and expected.
        UnreadableShard: not a parquet file.
    """
    schema = _open(path).schema_arrow
    missing = [name for name in required if name not in schema.names]
    if missing:
        raise DataError(
            f"{path}: columns {', '.join(missing)} are missing; found {', '.join(schema.names)}; "
            f"expected {', '.join(required)}: check data.format"
        )
    for name in images:
        kind = schema.field(name).type
        if not (_is_binary(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)):
            raise DataError(f"{path}: column {name} is {kind}; expected image bytes (binary, or a struct with bytes)")


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise UnreadableShard(f"not a readable parquet file ({_first_line(error)})") from error


def columns(path: Path) -> list[str]:
    """Names of all columns.

    Raises:
        UnreadableShard: not a parquet file.
    """
    with _open(path) as file:
        return list(file.schema_arrow.names)


def rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, values) of those of `columns` that the file has; text that is not UTF-8 comes out as bytes.

    Raises:
        UnreadableShard: the file, or the rest of it, is broken.
    """
    number = 0
    with _open(path) as file:
        wanted = [name for name in columns if name in file.schema_arrow.names]
        batches = file.iter_batches(batch_size=BATCH_ROWS, columns=wanted, use_threads=False)
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise UnreadableShard(f"broken after row {number} ({_first_line(error)})") from error
            if batch is None:
                return
            for values in _values(batch):
                yield number, values
                number += 1


def _values(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:  # one bad text must not cost the batch
        columns = {name: [_value(cell) for cell in batch.column(name)] for name in batch.schema.names}
        return [{name: cells[i] for name, cells in columns.items()} for i in range(batch.num_rows)]


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return cell.as_buffer().to_pybytes() if isinstance(cell, pa.StringScalar) else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
