"""From a source to the records that are trained on: reading, label rules, duplicates, exclusions, the user's filter.

Every row that does not come out is counted and listed in the report under one reason. One bad row, or one bad shard,
never stops a run; a data set that is mostly unusable does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import logging
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from diffalign import plugins
from diffalign.config import DataConfig
from diffalign.data.facts import ASPECT, PROMPTS, REWARDS, winners_prompt
from diffalign.data.prompts import load_prompts, normalised
from diffalign.data.readers import Place, Reader, UnreadableShard
from diffalign.data.record import ImageItem, Record
from diffalign.data.report import DataReport, Located
from diffalign.data.source import Source
from diffalign.errors import ConfigError, DataError

__all__ = ["check", "check_usable", "is_held_out", "iterate", "load_filter", "load_prompts"]

log = logging.getLogger(__name__)

EARLY_ROWS = 1000  # after so many rows a wrong format is told from a few bad rows
LABELS_SEEN = 500  # labelled rows within which both sides must have won

Filter = Callable[..., object]  # a `Record`, or for texts a `TextRecord`


def check(config: DataConfig, source: Source) -> None:
    """What can be known before anything is downloaded or loaded: prompt lists, filter, schema of local data.

    Raises:
        ConfigError: the filter cannot be loaded.
        DataError: missing columns, no such prompt list, or no readable shard.
    """
    _Rules(config)
    if source.root is None:
        return
    reader: Reader = plugins.find("readers", config.format)()
    broken = []
    for file in source.files:
        try:
            return reader.check(source.root / file.name)
        except UnreadableShard as error:
            broken.append(f"{file.name}: {error}")
    raise DataError(f"{source.id}: none of its {len(broken)} shards can be read ({broken[0]}); check data.format")


def iterate(config: DataConfig, source: Source, report: DataReport) -> Generator[Record, None, None]:
    """The usable records of a source, in order.

    `max_pairs` counts what the report has as kept: a consumer that skips a record later (undecodable bytes) gets
    another one for it, as long as it says so before it asks for the next.

    Args:
        config: format, split and rules.
        source: from `diffalign.data.source.resolve`.
        report: empty; receives every count.

    Yields:
        Records with two images and `p` of 0, 1, or (ties kept) 1/2. Images are not decoded.

    Raises:
        ConfigError: the filter cannot be loaded.
        DataError: missing columns, nothing left, too much unusable, or an error in the user's filter.
    """
    report.source = source.facts()
    rules = _Rules(config)
    reader: Reader = plugins.find("readers", config.format)()
    sides = _Sides(enabled=reader.labels)
    checked_early = False
    with contextlib.closing(read_all(config, source, reader, report)) as records:  # closing deletes downloads
        for read in records:
            record, why = (read, None) if config.label_from == "label" else by_rewards(read, config.label_from)
            if why := why or rules.why_not(record):
                report.skip(record, *why)
            else:
                sides.see(record, report)
                if record.p == 0.5:
                    report.note("soft_tie", record=record)
                yield _weighted(record, report) if config.weight_by_prompt else record
                if config.max_pairs is not None and report.kept >= config.max_pairs:
                    break
            if not checked_early and report.rows >= EARLY_ROWS:
                checked_early = True
                check_usable(report, config.max_unusable, source.id)
    log.debug("read: %s", report.summary())
    check_usable(report, config.max_unusable, source.id)
    if report.kept == 0:
        example = f" ({report.example()})" if report.example() else ""
        raise DataError(
            f"{source.id}: no pairs left. {report.summary()}{example}. Check data.format, data.split and data.filter"
        )


def by_rewards(record: Record, rule: str = "rewards") -> tuple[Record, tuple[str, str] | None]:
    """A record labelled by its first reward, or by the majority of them, and why it cannot be.

    Its own label only says that it is a tie. Equal rewards, or as many votes for either image, are a tie like any other,
    kept or dropped by `data.ties`; people's ties are always dropped.
    """
    if record.p is None:
        return record, None  # left out as unlabelled
    if record.p == 0.5:
        return record, ("tie", "as labelled")
    if REWARDS not in record.extra:
        return record, ("missing_reward", f"no rewards, and data.label_from is {rule!r}")
    votes = list(zip(*record.extra[REWARDS], strict=True))
    if rule == "majority":  # scales do not matter: every reward has one vote
        first, second = sum(a > b for a, b in votes), sum(b > a for a, b in votes)
    else:
        first, second = votes[0]
    p = 0.5 if first == second else float(first > second)
    prompt = winners_prompt(record.extra, p) if PROMPTS in record.extra else record.prompt
    return dataclasses.replace(record, p=p, prompt=prompt), None


def check_usable(report: DataReport, max_unusable: float, source: str) -> None:
    """Refuse data of which too much cannot be used.

    Raises:
        DataError: the share of unusable rows is above `max_unusable`.
    """
    if report.unusable > max_unusable * report.rows:
        raise DataError(
            f"{source}: {report.unusable:,} of {report.rows:,} rows are unusable, more than data.max_unusable="
            f"{max_unusable:g} allows. {report.summary()} ({report.example()}). Check data.format"
        )


def split_held_out(prompts: Sequence[str], fraction: float) -> tuple[list[int], list[int]]:
    """Places of the prompts that are trained on, and of those that are kept out."""
    out = [is_held_out(prompt, fraction) for prompt in prompts]
    return [i for i, held in enumerate(out) if not held], [i for i, held in enumerate(out) if held]


def is_held_out(prompt: str, fraction: float) -> bool:
    """Whether a prompt's pairs are kept out of training, so that no prompt is on both sides.

    Args:
        prompt: of the pair.
        fraction: share of the prompts to keep out, in [0, 1].
    """
    digest = hashlib.sha256(f"held out\n{normalised(prompt)}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def read_all(config: DataConfig, source: Source, reader: Reader, report: DataReport) -> Generator[Any, None, None]:
    """All shards' records. The first readable shard's schema must fit; a later one that does not is a bad shard.

    Raises:
        DataError: the first readable shard's columns do not fit the format.
    """
    checked = False
    with contextlib.closing(source.shards(report)) as shards:
        for shard, path in shards:
            root = source.root_of(shard, path)
            place = Place(source=source.name, split=config.split, shard=shard, root=root, report=report)
            try:
                reader.check(path)
                checked = True
                yield from reader.read(path, place)
            except (UnreadableShard, DataError) as error:
                if isinstance(error, DataError) and not checked:
                    raise
                report.bad_shard(shard, str(error))
                log.warning("data: shard %s: %s", shard, error)


def _weighted(record: Record, report: DataReport) -> Record:
    count = record.meta.get("num_example_per_prompt")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        report.note("no_prompt_count", "weight_by_prompt has nothing to divide by; the weight stays", record)
        return record
    return dataclasses.replace(record, weight=record.weight / count)


class _Sides:
    """Watches that both sides win: labels read as something else than numbers make one side win every time."""

    def __init__(self, *, enabled: bool) -> None:
        self.left = LABELS_SEEN if enabled else 0
        self.winners: set[float] = set()

    def see(self, record: Record, report: DataReport) -> None:
        if self.left == 0 or record.p is None or record.p == 0.5:
            return
        self.winners.add(record.p)
        self.left -= 1
        if len(self.winners) == 2:
            self.left = 0
        elif self.left == 0:
            side = "first" if record.p == 1 else "second"
            detail = (
                f"the {side} image wins in all of the first {LABELS_SEEN} labelled rows; are the labels read rightly?"
            )
            report.note("one_sided_labels", detail)
            log.warning("data: %s", detail)


class _Rules:
    """The configuration's reasons to leave a readable record out, in the order in which they are asked."""

    def __init__(self, config: DataConfig) -> None:
        self.keep_ties = config.ties == "soft"
        self.excluded = {normalised(prompt): spec for spec in config.exclude_prompts for prompt in load_prompts(spec)}
        self.filter = load_filter(config.filter) if config.filter else None
        self.seen: set[bytes] | None = set() if config.drop_duplicates else None

    def why_not(self, record: Record) -> tuple[str, str] | None:
        """(reason, detail), or None to keep it."""
        if record.p is None:
            return "unlabelled", ""
        if record.p == 0.5 and not self.keep_ties:
            return "tie", ""
        for prompt in record.prompts:
            if (spec := self.excluded.get(normalised(prompt))) is not None:
                return "excluded_prompt", f"in {spec}"
        try:
            keys = [_image_key(image) for image in record.images]
        except OSError as error:
            return "unreadable", str(error)
        if keys[0] == keys[1]:
            return "identical_images", ""
        if self.seen is not None and self._repeats(record, keys):
            return "duplicate", ""
        if self.filter is not None and not ask(self.filter, record):
            return "filtered", ""
        return None

    def _repeats(self, record: Record, keys: list[bytes]) -> bool:
        assert self.seen is not None, "only asked when duplicates are dropped"
        digest = hashlib.blake2b(record.prompt.encode("utf-8", "surrogatepass"), digest_size=16)
        if ASPECT in record.extra:  # the same images may be compared in another respect
            digest.update(f"\naspect {record.extra[ASPECT]}\n".encode())
        for key in sorted(keys):  # either order of the two images is the same pair
            digest.update(key)
        before = len(self.seen)
        self.seen.add(digest.digest())
        return len(self.seen) == before


def _image_key(image: ImageItem) -> bytes:
    """What counts as the same image: the source's own id, or else the bytes."""
    content = b"id:" + image.uid.encode() if image.uid is not None else image.read()
    return hashlib.blake2b(content, digest_size=16).digest()


def load_filter(spec: str, setting: str = "data.filter") -> Filter:
    """The function named by `file.py:function`.

    Args:
        spec: the file and the function in it.
        setting: what asks for it, for messages.

    Raises:
        ConfigError: not of that form, no such file or function, or the file does not run.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file).expanduser()
    if not file or not name.isidentifier():
        raise ConfigError(f"{setting}: got {spec!r}; file.py:function expected")
    if not path.is_file():
        raise ConfigError(f"{setting}: file {file!r} does not exist; file.py:function expected")
    module_spec = importlib.util.spec_from_file_location(f"diffalign_user_filter_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"{setting}: {file!r} is not a Python file; file.py:function expected")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(f"{setting}: {file} does not run: {type(error).__name__}: {error}") from error
    function = vars(module).get(name)
    if not callable(function):
        known = ", ".join(k for k, v in vars(module).items() if callable(v) and not k.startswith("_"))
        raise ConfigError(f"{setting}: {file} has no function {name!r}; it has {known or 'none'}")
    return function  # type: ignore[no-any-return]


def ask(function: Filter, record: Located) -> bool:
    """Whether the user's filter keeps a record.

    Raises:
        DataError: it failed, or returned nothing.
    """
    where = f"record {record.id} (row {record.meta.get('row')} of {record.meta.get('shard')})"
    try:
        answer = function(record)
    except Exception as error:  # the user's code may raise anything
        raise DataError(f"data.filter failed on {where}: {type(error).__name__}: {error}") from error
    if answer is None:  # a forgotten `return` would remove everything
        raise DataError(f"data.filter returned None for {where}; True (keep) or False (remove) expected")
    return bool(answer)
