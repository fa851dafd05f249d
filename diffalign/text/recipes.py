"""`diffalign data make RECIPE IN OUT key=value`: training rows from other rows, by a named recipe.

Every row that comes out has a `meta` with recipe, source, judge and settings (and, as `before`, the `meta` it had). Every
row that makes nothing is counted and listed with its reason in `<OUT>.report.json`.
"""

from __future__ import annotations

import inspect
import json
import os
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffalign.config_loading import convert
from diffalign.data.readers import BadRow, UnreadableShard
from diffalign.data.readers.text import SUFFIXES, raw_rows
from diffalign.data.report import DataReport
from diffalign.errors import ConfigError, DataError, did_you_mean
from diffalign.files import atomic_write_text, require_writable
from diffalign.text import pairing, rewriting
from diffalign.text.pairing import Row, key_of

# From one row to those made of it.
OF_A_ROW: Mapping[str, Callable[..., list[Row]]] = {
    "best_of_n": pairing.best_of_n,
    "all_pairs": pairing.all_pairs,
    "first_vs_rest": pairing.first_vs_rest,
    "tournament": pairing.tournament,
    "rejection_sampling": pairing.rejection_sampling,
    "curated": pairing.curated,
    "self_play": pairing.self_play,
    "rule_checked": pairing.rule_checked,
    "reward_augmented": rewriting.reward_augmented,
    "directional": rewriting.directional,
    "control_tokens": rewriting.control_tokens,
    "step_pairs": rewriting.step_pairs,
    "step_negatives": rewriting.step_negatives,
}
# From all rows to, for each of them, those made of it or why there are none.
OF_ALL_ROWS: Mapping[str, Callable[..., list[list[Row] | BadRow]]] = {
    "consistency": pairing.consistency,
    "coreset": rewriting.coreset,
}
RECIPES: Mapping[str, Callable[..., Any]] = {**OF_A_ROW, **OF_ALL_ROWS}
OUTPUTS = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Made:
    """What a recipe did.

    Attributes:
        path: the file written.
        rows: in it.
        report: of the rows read.
    """

    path: Path
    rows: int
    report: DataReport

    def summary(self) -> str:
        """One line."""
        return f"{self.path}: {self.rows:,} rows made; {self.report.summary()}"


def make(recipe: str, input: str | Path, output: str | Path, *, judge: str = "", **options: Any) -> Made:
    """Run a recipe on a file.

    Args:
        recipe: a name of `RECIPES`.
        input: JSONL, JSON, parquet or CSV.
        output: JSONL or parquet; written whole or not at all.
        judge: who scored the rows, for `meta`; a row's own `judge` goes before it.
        options: the recipe's settings, as values or as text from the command line.

    Raises:
        ConfigError: no such recipe or setting.
        DataError: nothing readable, nothing made, or nowhere to write.
    """
    source, target = Path(input), Path(output)
    settings = _settings(recipe, options)
    if target.suffix.lower() not in OUTPUTS:
        raise ConfigError(f"output {str(output)!r}: one of {', '.join(OUTPUTS)} expected")
    if not source.is_file() or source.suffix.lower() not in SUFFIXES:
        raise DataError(f"input {str(input)!r}: no such file of type {', '.join(SUFFIXES)}")
    require_writable(target.parent)
    report = DataReport(source={"id": source.name, "kind": "file"})
    meta = {
        "recipe": recipe,
        "source": source.name,
        "judge": judge or settings.get("verifier", ""),
        "settings": settings,
    }
    try:
        made = list(_made(recipe, settings, _read(source, report), report, meta))
    except UnreadableShard as error:
        raise DataError(f"{source}: {error}") from error
    if not made:
        example = next((e[0].get("detail", "") for e in report.listed.values() if e), "no rows")
        raise DataError(f"{source}: recipe {recipe!r} made nothing. {report.summary()} ({example})")
    write_rows(target, made)
    report.write(target.with_name(target.name + ".report.json"))
    return Made(target, len(made), report)


def apply(recipe: str, rows: Iterable[Row], report: DataReport | None = None, **options: Any) -> list[Row]:
    """Run a recipe on rows in memory, without `meta`; rows that make nothing are skipped in the report."""
    report = report or DataReport()
    found = _counted(enumerate(rows), report)
    return [out for _, outs in _run(recipe, _settings(recipe, options), found, report) for out in outs]


def _settings(recipe: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a recipe, converted by their declared types."""
    if recipe not in RECIPES:
        raise ConfigError(f"recipe {recipe!r} not found{did_you_mean(recipe, RECIPES)} Available: {', '.join(RECIPES)}")
    function = RECIPES[recipe]
    parameters = inspect.signature(function).parameters.values()
    known = {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    hints = typing.get_type_hints(function)
    settings = {name: p.default for name, p in known.items() if p.default is not inspect.Parameter.empty}
    for name, value in options.items():
        if name not in known:
            raise ConfigError(f"{recipe}.{name}: unknown setting{did_you_mean(name, known)} Known: {', '.join(known)}")
        settings[name] = convert(_read_text(value), hints[name], f"{recipe}.{name}")
    if missing := [name for name in known if name not in settings]:
        raise ConfigError(f"{recipe}.{missing[0]}: missing; it has no default")
    return settings


def _read_text(value: Any) -> Any:
    try:
        return yaml.safe_load(value) if isinstance(value, str) and value.strip() else value
    except yaml.YAMLError:
        return value


# --- rows ------------------------------------------------------------------------------------------------------------


def _read(path: Path, report: DataReport) -> Iterator[tuple[int, Row]]:
    return _counted(raw_rows(path), report)


def _counted(rows: Iterable[tuple[int, Row | BadRow]], report: DataReport) -> Iterator[tuple[int, Row]]:
    for number, row in rows:
        report.read()
        if isinstance(row, BadRow):
            report.skip(str(number), row.reason, row.detail, row=number)
        else:
            yield number, row


def _run(
    recipe: str, settings: Mapping[str, Any], rows: Iterable[tuple[int, Row]], report: DataReport
) -> Iterator[tuple[Row, list[Row]]]:
    """(row, rows made of it)."""
    if recipe in OF_ALL_ROWS:
        everything = list(rows)
        outs = OF_ALL_ROWS[recipe]([row for _, row in everything], **settings)
        results: Iterable[tuple[tuple[int, Row], list[Row] | BadRow]] = zip(everything, outs, strict=True)
    else:
        results = ((entry, _one(OF_A_ROW[recipe], entry[1], settings)) for entry in rows)
    for (number, row), result in results:
        if isinstance(result, BadRow):
            report.skip(key_of(row), result.reason, result.detail, row=number)
        else:
            yield row, result


def _one(function: Callable[..., list[Row]], row: Row, settings: Mapping[str, Any]) -> list[Row] | BadRow:
    try:
        return function(row, **settings)
    except BadRow as bad:
        return bad


def _made(
    recipe: str, settings: Mapping[str, Any], rows: Iterable[tuple[int, Row]], report: DataReport, meta: Row
) -> Iterator[Row]:
    for row, outs in _run(recipe, settings, rows, report):
        own = meta | {"key": key_of(row)} | ({"judge": row["judge"]} if row.get("judge") else {})
        before = {"before": row["meta"]} if row.get("meta") else {}
        for out in outs:
            yield out | {"meta": own | before}


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write JSONL or parquet (by the name's ending), whole or not at all.

    Raises:
        DataError: it cannot be written.
    """
    try:
        if path.suffix.lower() == ".parquet":
            _write_parquet(path, rows)
        else:
            atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); check space and rights") from error


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Settings differ in type from row to row of a chain of recipes; as JSON text they always fit one column.
    plain = [row | ({"meta": json.dumps(row["meta"], ensure_ascii=False)} if "meta" in row else {}) for row in rows]
    try:
        table = pa.Table.from_pylist(plain)
    except pa.ArrowException as error:
        raise DataError(f"{path}: the rows fit no parquet table ({error}); write .jsonl instead") from error
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    pq.write_table(table, temporary)
    os.replace(temporary, path)
