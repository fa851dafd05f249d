"""From the data section to tokenised texts: find the source, apply the rules, fit to the objective, tokenise.

What an objective reads decides what a record becomes (`as_needed`): a pair serves objectives on items as two items, and a
completion that is to be forgotten, with an `alternate`, serves pairwise ones as the pair (alternate, completion).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator

from diffalign import plugins
from diffalign.config import DataConfig, RunConfig
from diffalign.data.pipeline import EARLY_ROWS, ask, check_usable, load_filter, load_prompts, read_all
from diffalign.data.prompts import normalised
from diffalign.data.readers import BadRow, Reader
from diffalign.data.record import record_id
from diffalign.data.report import DataReport
from diffalign.data.source import Source, resolve
from diffalign.errors import ConfigError, DataError
from diffalign.losses.base import Needs
from diffalign.losses.unlearning import Retaining
from diffalign.progress import Progress
from diffalign.text.batch import TextExample
from diffalign.text.dataset import TextData
from diffalign.text.records import TextRecord
from diffalign.text.tokenize import Tokenizing

log = logging.getLogger(__name__)
LAYOUTS = {"pair": "pairs", "item": "items", "list": "lists"}


class HasTokenizer(Protocol):
    """What is needed of a language model's family."""

    @property
    def tokenizer(self) -> Any:
        """Of transformers."""
        ...


def prepare_text(
    config: RunConfig, family: HasTokenizer, accelerator: Accelerator | None = None, *, needs: Needs | None = None
) -> tuple[TextData, DataReport]:
    """Tokenised data of a run, and the account of how it came to be.

    With `data.retain_sources`, `sources` are what is forgotten (label 0) and those what is retained (label 1).

    Args:
        config: the sections data and text, the objective's needs, seed and output folder.
        family: for its tokenizer.
        accelerator: with several processes, the first downloads and makes data, the others wait.
        needs: what a record is made into; None: what the objective reads.

    Raises:
        ConfigError: settings that do not fit.
        DataError: no source, missing columns, nothing left, or too much unusable.
    """
    first = contextlib.nullcontext() if accelerator is None else accelerator.main_process_first()
    with first:
        data = config.data if config.data.world_text is None else world_data(config)
        text_reader(data)
        sources = [(data, resolve(data))]
        if data.retain_sources:
            kept = replace(data, sources=data.retain_sources, split=data.retain_split or data.split)
            sources.append((kept, resolve(kept)))
    two = len(sources) == 2
    tokenizing = Tokenizing(family.tokenizer, config.text)
    needs = config.objective.needs if needs is None else needs
    report = DataReport()
    examples: list[TextExample] = []
    shown = accelerator is None or accelerator.is_main_process
    with Progress("tokenising", data.max_pairs, "row", show=shown) as progress:
        for number, (part, source) in enumerate(sources):  # duplicates are looked for in each set by itself
            seen = DataReport()
            label = float(number) if two else None
            for example in iterate(part, source, tokenizing, needs, seen, label):
                examples.append(example)
                progress.set(report.kept + seen.kept)
            report.merge(seen)
    report.source = sources[0][1].facts() | ({"retain": sources[1][1].facts()} if two else {})
    log.info("data: %s", report.summary())
    unlearning = two or isinstance(config.objective, Retaining)
    made = TextData(
        examples,
        max_length=tokenizing.max_length,
        retain=[e.kind == "item" and e.label > 0.5 for e in examples] if unlearning else None,
        report=report,
        weight_by_prompt=data.weight_by_prompt,
        held_out=config.evaluation.held_out_fraction,
    )
    return made, report


def iterate(
    config: DataConfig,
    source: Source,
    tokenizing: Tokenizing,
    needs: Needs,
    report: DataReport,
    label: float | None = None,
) -> Iterator[TextExample]:
    """The usable examples of a source, in order; `max_pairs` counts rows, not what a row becomes.

    Args:
        config: format, split and rules.
        source: from `diffalign.data.source.resolve`.
        tokenizing: tokenizer and limits.
        needs: of the objective.
        report: empty; receives every count.
        label: given to every item: 0 in a forget set, 1 in a retain set; None leaves labels.

    Raises:
        ConfigError: a reader of images, or a filter that cannot be loaded.
        DataError: missing columns, nothing left, too much unusable, or an error in the user's filter.
    """
    reader = text_reader(config)
    rules = _Rules(config)
    checked_early = False
    with contextlib.closing(read_all(config, source, reader, report)) as records:
        for record in records:
            try:
                rules.check(record)
                made = [tokenised(r, tokenizing, needs, report) for r in as_needed(_labelled(record, label), needs)]
            except BadRow as bad:
                report.skip(record, bad.reason, bad.detail)
            else:
                if record.p == 0.5:
                    report.note("soft_tie", record=record)
                yield from made
                if config.max_pairs is not None and report.kept >= config.max_pairs:
                    break
            if not checked_early and report.rows >= EARLY_ROWS:
                checked_early = True
                check_usable(report, config.max_unusable, source.id)
    check_usable(report, config.max_unusable, source.id)
    if report.kept == 0:
        example = f" ({report.example()})" if report.example() else ""
        raise DataError(
            f"{source.id}: no texts left. {report.summary()}{example}. Check data.format, data.split and data.filter"
        )


def text_reader(config: DataConfig) -> Reader:
    """The reader of the configuration.

    Raises:
        ConfigError: no such format, one for images, or a `data.rename` that is not theirs=ours.
    """
    cls: type[Reader] = plugins.find("readers", config.format)
    if cls.modality != "text":
        raise ConfigError(f"data.format={config.format} reads images; a language model needs data.format=text")
    return cls(dict(_renaming(entry) for entry in config.rename))


def tokenised(record: TextRecord, tokenizing: Tokenizing, needs: Needs, report: DataReport) -> TextExample:
    """An example with the numbers that the objective reads besides (`Needs.extra`).

    A number per row stands in the column of its name: one number for an item, a list of them for pairs (chosen,
    rejected) and lists; for pairs also in two columns, `<name>_chosen` and `<name>_rejected`.

    Raises:
        BadRow: it cannot be tokenised, or a number is missing.
    """
    example = tokenizing.example(record, report)
    return replace(example, extra={name: _extra(record, name) for name in needs.extra}) if needs.extra else example


def _extra(record: TextRecord, name: str) -> tuple[float, ...]:
    value = record.columns.get(name)
    if record.kind == "pair" and value is None:
        value = [record.columns.get(f"{name}_{side}") for side in ("chosen", "rejected")]
    values: list[Any] = value if isinstance(value, list) else [value]
    if len(values) != len(record.responses) or not all(isinstance(v, (int, float)) for v in values):
        raise BadRow("missing_column", f"the objective reads {name!r}, a number per response; got {value!r}")
    return tuple(float(v) for v in values)


def _renaming(entry: str) -> tuple[str, str]:
    theirs, equals, ours = entry.partition("=")
    if not (theirs and equals and ours):
        raise ConfigError(f"data.rename: got {entry!r}; theirs=ours expected, such as question=prompt")
    return theirs, ours


# --- fitting records to objectives -----------------------------------------------------------------------------------


def as_needed(record: TextRecord, needs: Needs) -> list[TextRecord]:
    """The record as the objective reads it.

    A pair becomes two items with labels p and 1 - p and its rewards as targets, as far as the objective reads such labels.
    A pair is also a list of two. Online objectives on groups take the prompt of anything.

    Raises:
        BadRow: "wrong_kind": the objective cannot read it; "unread_label": nor items with this label;
            "missing_alternate": it compares what is to be forgotten with an `alternate`, and there is none.
    """
    wanted = set(needs.layout)
    offline = wanted & set(LAYOUTS.values())
    if not offline:
        return [replace(record, kind="prompt", responses=(), gains=None, segments=None)]
    if record.kind == "item" and record.alternate is not None and record.label < 0.5 and "pairs" in wanted:
        segments = None if record.segments is None else (None, *record.segments)
        sides = (record.alternate, *record.responses)
        return [replace(record, kind="pair", responses=sides, alternate=None, segments=segments, p=1.0)]
    if record.kind == "item" and "items" in wanted and round(record.label) not in needs.labels:
        raise BadRow(
            "unread_label", f"label {record.label:g}; the objective reads {' and '.join(map(str, needs.labels))}"
        )
    if record.kind == "item" and {"pairs", "items"} <= wanted and record.label < 0.5:
        raise BadRow("missing_alternate", "what is to be forgotten becomes a pair with what is to be said instead")
    if LAYOUTS.get(record.kind) in wanted:
        return [record]
    if record.kind == "pair" and "items" in wanted:
        return [item for item in _as_items(record) if round(item.label) in needs.labels]
    if record.kind == "pair" and "lists" in wanted:
        return [replace(record, kind="list", gains=record.gains or (1.0, 0.0))]
    hint = "; make pairs of it with: diffalign data make all_pairs IN OUT" if record.kind == "list" else ""
    raise BadRow("wrong_kind", f"a row of kind {record.kind!r}; the objective reads {', '.join(sorted(offline))}{hint}")


def _as_items(record: TextRecord) -> list[TextRecord]:
    p = 1.0 if record.p is None else record.p
    return [
        replace(
            record,
            id=record_id("side", "", record.id, side),
            kind="item",
            responses=(record.responses[side],),
            label=label,
            p=1.0,
            target=None if record.gains is None else record.gains[side],
            gains=None,
            segments=None if record.segments is None else (record.segments[side],),
        )
        for side, label in enumerate((p, 1 - p))
    ]


def _labelled(record: TextRecord, label: float | None) -> TextRecord:
    if label is None:
        return record
    # Two local files of the same name give equal ids.
    return replace(record, label=label, id=record_id("retain" if label else "forget", "", "", record.id))


class _Rules:
    """The configuration's reasons to leave a readable record out, in the order in which they are asked."""

    def __init__(self, config: DataConfig) -> None:
        self.keep_ties = config.ties == "soft"
        self.excluded = {normalised(prompt): spec for spec in config.exclude_prompts for prompt in load_prompts(spec)}
        self.filter = load_filter(config.filter) if config.filter else None
        self.seen: set[bytes] | None = set() if config.drop_duplicates else None

    def check(self, record: TextRecord) -> None:
        """Raise `BadRow` for a record that a rule takes out."""
        if record.p is None:
            raise BadRow("unlabelled", "")
        if record.kind == "pair" and record.p == 0.5 and not self.keep_ties:
            raise BadRow("tie", "")
        if spec := self._excluded(record):
            raise BadRow("excluded_prompt", f"in {spec}")
        if self.seen is not None:
            before = len(self.seen)
            self.seen.add(_content_key(record))
            if len(self.seen) == before:
                raise BadRow("duplicate", "")
        if self.filter is not None and not ask(self.filter, record):
            raise BadRow("filtered", "")

    def _excluded(self, record: TextRecord) -> str | None:
        """The list that holds the prompt, or the user's last message in it."""
        said = [record.prompt_text]
        if not isinstance(record.prompt, str):
            said += [message["content"] for message in record.prompt if message["role"] == "user"][-1:]
        return next((self.excluded[key] for key in map(normalised, said) if key in self.excluded), None)


def _content_key(record: TextRecord) -> bytes:
    """What counts as the same record: prompt and responses in any order; for items also the label."""
    parts = [repr(record.prompt), *sorted(map(repr, record.responses))]
    if record.kind == "item":
        parts.append(repr(record.label))
    return hashlib.blake2b("\n".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


# --- the text world --------------------------------------------------------------------------------------------------


def world_data(config: RunConfig) -> DataConfig:
    """Write the text world's data (once) and return the data section that reads them."""
    from diffalign.world.text import datasets

    settings = config.data.world_text
    assert settings is not None, "asked for by the config"
    folder = Path(config.output_dir) / "data"
    sampling = datasets.Sampling(prompts=settings.size, seed=config.seed)
    read = replace(config.data, format="text", rename=())
    if settings.kind == "forget":
        paths = [folder / "forget.jsonl", folder / "retain.jsonl"]
        for path, forget in zip(paths, (True, False), strict=True):
            datasets.write_facts(path, forget=forget)
        return replace(read, sources=(str(paths[0]),), retain_sources=(str(paths[1]),))
    path = folder / f"{settings.kind}.jsonl"
    if settings.kind == "pairs":
        datasets.write_pairs(path, sampling)
    elif settings.kind == "unpaired":
        datasets.write_unpaired(path, sampling)
    else:
        datasets.write_prompts(path, prompts=settings.size, seed=config.seed)
    return replace(read, sources=(str(path),))
