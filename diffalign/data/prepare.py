"""From the data section to encoded pairs: make or find the source, build or open the cache, account for every row."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from diffalign.config import DataConfig, RunConfig
from diffalign.data import manifest as manifests
from diffalign.data.cache import CacheBuilder, LatentCache, tables
from diffalign.data.encode import LivePairs, Preparer
from diffalign.data.facts import ASPECT, EARLY, REWARDS, in_all, needed, refuse_without, require
from diffalign.data.loader import PairData
from diffalign.data.pipeline import check, check_usable, iterate
from diffalign.data.record import Record
from diffalign.data.report import DataReport
from diffalign.data.source import Source, resolve
from diffalign.errors import DataError
from diffalign.families import ENCODERS, EncodingFamily
from diffalign.losses.judging import JudgeObjective
from diffalign.progress import Progress

log = logging.getLogger(__name__)
REPORT = "data_report.json"


@dataclass(frozen=True)
class Prepared:
    """Encoded pairs, the account of how they came to be, and the facts (`diffalign.data.facts`) that all of them have."""

    data: PairData
    report: DataReport
    facts: frozenset[str] = frozenset()


def prepare(config: RunConfig, family: EncodingFamily, accelerator: Accelerator) -> Prepared:
    """Encoded pairs of a run; the encoders are out of memory again afterwards if the cache is used.

    Raises:
        DataError: no source, nothing or too little usable, a cache of other settings or another source, or pairs without
            what the objective reads.
    """
    prepared = _prepare(config, family, accelerator)
    extras = prepared.data.extras
    require(extras, facts_read(config), config.objective)
    return replace(prepared, facts=in_all(extras))


def facts_read(config: RunConfig) -> dict[str, str]:
    """Facts that every pair must have, and what reads them; sampled images have what the rollout gives them."""
    from diffalign.sampling.rules import samples_images

    found: dict[str, str] = {}
    if isinstance(config.objective, JudgeObjective):
        if config.judge.head == "aspects":
            found[ASPECT] = "judge.head: aspects"
    elif not samples_images(config):
        found |= dict.fromkeys(needed(config.objective), f"objective {config.objective.name!r}")
    if config.data.label != "given":
        found.setdefault(REWARDS, f"data.label: {config.data.label}")
    if config.preference.rewards:
        found.setdefault(REWARDS, "preference.rewards")
    return found


def _prepare(config: RunConfig, family: EncodingFamily, accelerator: Accelerator) -> Prepared:
    data = config.data
    if data.world_pairs is not None:
        data = replace(data, sources=(str(make_world_pairs(config, accelerator)),))
    if not config.cache.enabled:
        source = resolve(data)
        check(data, source)
        report = DataReport(source=source.facts())
        family.load(ENCODERS)
        preparer = Preparer(data, config.seed, family.resolution_step, family.resampling)
        with contextlib.closing(_records(data, source, report, facts_read(config))) as records:
            live = LivePairs(records, preparer, family, report, config.cache.workers, data.max_pairs)
        check_usable(report, data.max_unusable, source.id)
        return Prepared(live, report)
    folder = config.cache_dir
    wanted = manifests.fingerprint(config, family)
    found = open_complete(folder, wanted, data)
    if found is not None:
        return found
    if accelerator.num_processes > 1 and not data.keep_downloads:
        # A process that is done with a shard must not delete it under another that still reads it.
        log.warning(
            "data.keep_downloads: false has no effect with several processes; to save disk, fill the cache with one "
            "process first (diffalign cache CONFIG)"
        )
        data = replace(data, keep_downloads=True)
    with accelerator.main_process_first():
        source = resolve(data)
    manifests.check_manifest(
        folder, wanted, manifests.source_facts(source)
    )  # a part of something else is not gone on with
    check(data, source)  # before the encoders load
    built = build(config, data, source, family, accelerator, wanted)
    log.info("data: %s", built.report.summary())
    return built


def _records(
    data: DataConfig, source: Source, report: DataReport, reads: Mapping[str, str]
) -> Generator[Record, None, None]:
    """All records, to be closed: `max_pairs` is counted by who decodes and encodes them, since some cannot be.

    Raises:
        DataError: none of the first rows has a fact that is read; that is known before all are encoded.
    """
    first: list[Record] = []
    with contextlib.closing(iterate(replace(data, max_pairs=None), source, report)) as records:
        for record in records:
            if len(first) < EARLY:
                first.append(record)
                if len(first) == EARLY:
                    refuse_without([r.extra for r in first], reads)
            yield record


def open_complete(folder: Path, wanted: dict[str, object], data: DataConfig) -> Prepared | None:
    """A cache that is complete and was made with these settings; None if it has to be built (further).

    Raises:
        DataError: it was made with other settings, from other files, or from a source that is not wanted any more.
    """
    manifest = manifests.check_manifest(folder, wanted)
    if manifest is None or manifest["pairs"] is None:
        return None
    if isinstance(manifest["source"], dict) and (why := _why_other_source(manifest["source"], data)):
        raise manifests.stale(folder, why)
    if not any(folder.glob("pairs-*.parquet")):
        return None
    cache = LatentCache(folder)
    if len(cache) != manifest["pairs"]:
        log.warning("cache %s: %d of %d pairs are there; encoding the rest", folder, len(cache), manifest["pairs"])
        return None
    if missing := cache.missing_prompts():
        log.warning("cache %s: %d prompts have no embedding; encoding them", folder, len(missing))
        return None
    log.info("cache %s: %d pairs", folder, len(cache))
    return Prepared(cache, DataReport.load(folder / REPORT))


def _why_other_source(made_from: dict[str, Any], data: DataConfig) -> str:
    """Why the source of a complete cache is none of `data.sources`; nothing if it is one. Does not ask the hub."""
    gone = f"it was made from {manifests.source_label(made_from)}, which is not in data.sources"
    if made_from["kind"] == "hub":
        return "" if any(_names_hub(spec, made_from) for spec in data.sources) else gone
    changed = False
    for spec in data.sources:
        found = _local_fingerprint(spec, data)
        if found == made_from["fingerprint"] or (spec == made_from["id"] and found is None):
            return ""  # the same files, or there is nothing left to compare with
        changed |= spec == made_from["id"]
    return "the source's files have changed" if changed else gone


def _names_hub(spec: str, made_from: dict[str, Any]) -> bool:
    """Whether an entry of `data.sources` means a hub source: the same one, or its data set without a revision."""
    if Path(spec).expanduser().exists():
        return False
    repo, _, pin = spec.partition("@")
    if repo != made_from["name"]:
        return False
    return not pin or spec == made_from["id"] or (len(pin) >= 7 and made_from["revision"].startswith(pin))


def _local_fingerprint(spec: str, data: DataConfig) -> str | None:
    """Of a local source; None if it is not there or cannot be used."""
    if not Path(spec).expanduser().exists():
        return None
    try:
        return resolve(replace(data, sources=(spec,))).fingerprint()
    except DataError as error:
        log.info("data source %s is not compared with the cache: %s", spec, error)
        return None


def build(
    config: RunConfig,
    data: DataConfig,
    source: Source,
    family: EncodingFamily,
    accelerator: Accelerator,
    wanted: dict[str, object],
) -> Prepared:
    """Encode everything into the cache folder; the encoders are unloaded at the end.

    Raises:
        DataError: nothing or too little usable, no space, or a prompt without an embedding.
    """
    folder, facts = config.cache_dir, manifests.source_facts(source)
    if accelerator.is_main_process:
        manifests.write_manifest(folder, wanted, facts, None)
        manifests.remove_leftovers(folder)
    accelerator.wait_for_everyone()
    family.load(ENCODERS)
    reading = DataReport(source=source.facts())
    # Alone, one report lets the reader see early how much cannot be decoded.
    encoding = reading if accelerator.num_processes == 1 else DataReport()
    with (
        Progress("caching pairs", data.max_pairs, "pair", show=accelerator.is_main_process) as progress,
        contextlib.closing(_records(data, source, reading, facts_read(config))) as records,
    ):
        builder = CacheBuilder(
            folder,
            config,
            family,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            progress=lambda n: progress.set(n * accelerator.num_processes),
        )
        builder.build(records, encoding)
    family.unload(ENCODERS)
    accelerator.wait_for_everyone()
    total = sum(len(table) for table in tables(folder))
    report = reading
    if accelerator.num_processes > 1:
        report = merged(gather_object([(reading, encoding)]), total)
    if accelerator.is_main_process:
        report.write(folder / REPORT)
    # Every process sees the same, so that all of them stop, or none.
    if total == 0:
        raise DataError(f"no usable pair is left: {report.summary()}. {report.example()}")
    check_usable(report, data.max_unusable, source.id)
    cache = LatentCache(folder)
    if missing := cache.missing_prompts():
        raise DataError(
            f"cache {folder}: {len(missing)} prompts have no embedding, such as {missing[0]!r}: did something else "
            "change the folder? Start again: only they are encoded"
        )
    if accelerator.is_main_process:
        manifests.write_manifest(folder, wanted, facts, total)
    accelerator.wait_for_everyone()
    return Prepared(cache, report)


def merged(parts: list[tuple[DataReport, DataReport]], pairs: int) -> DataReport:
    """One report of what several processes read (all the same rows, but not equally far) and encoded (each its share).

    Args:
        parts: (reading, encoding) of each process.
        pairs: in the cache now.
    """
    report = max((reading for reading, _ in parts), key=lambda reading: reading.rows)
    for _, encoding in parts:
        report.merge(encoding)
    if (beyond := report.kept - pairs) > 0:  # read on for one process when another had its share of max_pairs
        report.skipped["beyond_max_pairs"] += beyond
    return report


def make_world_pairs(config: RunConfig, accelerator: Accelerator) -> Path:
    """Write the tiny world's pairs (once) and return their folder."""
    from diffalign.world.names import TINY_BASES
    from diffalign.world.pairs import make_pairs

    folder = Path(config.output_dir) / "data"
    world = config.data.world_pairs
    assert world is not None, "asked for by the config"
    if world.base is None and config.model.pretrained in TINY_BASES:
        world = replace(world, base=config.model.pretrained)  # type: ignore[arg-type]
    if accelerator.is_main_process:
        make_pairs(world, folder, config.seed)
    accelerator.wait_for_everyone()
    return folder
