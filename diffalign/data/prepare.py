"""From the data section to encoded pairs: make or find the source, build or open the cache, account for every row."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from diffalign.config import DataConfig, RunConfig
from diffalign.data import cache as caches
from diffalign.data.cache import CacheBuilder, LatentCache
from diffalign.data.encode import LivePairs, Preparer
from diffalign.data.loader import PairData
from diffalign.data.pipeline import check, iterate
from diffalign.data.report import DataReport
from diffalign.data.source import Source, resolve
from diffalign.errors import DataError
from diffalign.families import ENCODERS, Family
from diffalign.progress import Progress

log = logging.getLogger(__name__)
REPORT = "data_report.json"


@dataclass(frozen=True)
class Prepared:
    """Encoded pairs and the account of how they came to be."""

    data: PairData
    report: DataReport


def prepare(config: RunConfig, family: Family, accelerator: Accelerator) -> Prepared:
    """Encoded pairs of a run; the encoders are out of memory again afterwards if the cache is used.

    Raises:
        DataError: no source, nothing usable, or a stale cache.
    """
    data = config.data
    if data.world_pairs is not None:
        data = replace(data, sources=(str(make_world_pairs(config, accelerator)),))
    if not config.cache.enabled:
        source = resolve(data)
        check(data, source)
        report = DataReport(source=source.facts())
        family.load(ENCODERS)
        preparer = Preparer(data, config.seed, family.resolution_step)
        live = LivePairs(iterate(data, source, report), preparer, family, report, config.cache.workers)
        return Prepared(live, report)
    folder = config.cache_dir
    wanted = caches.fingerprint(config, family)
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
    check(data, source)  # before the encoders load
    report = build(config, data, source, family, accelerator, wanted)
    log.info("data: %s", report.summary())
    return Prepared(LatentCache(folder), report)


def open_complete(folder: Path, wanted: dict[str, object], data: DataConfig) -> Prepared | None:
    """A cache that is complete and was made with these settings; None if it has to be built (further).

    Raises:
        DataError: it was made with other settings or from other files.
    """
    local = [source for source in data.sources if Path(source).expanduser().exists()]
    fingerprint = resolve(replace(data, sources=(local[0],))).fingerprint() if local else None
    manifest = caches.check_manifest(folder, wanted, fingerprint)
    if manifest is None or manifest["pairs"] is None:
        return None
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


def build(
    config: RunConfig,
    data: DataConfig,
    source: Source,
    family: Family,
    accelerator: Accelerator,
    wanted: dict[str, object],
) -> DataReport:
    """Encode everything into the cache folder; the encoders are unloaded at the end."""
    folder = config.cache_dir
    if accelerator.is_main_process:
        caches.write_manifest(folder, wanted, source.fingerprint(), None)
        for leftover in folder.glob(".tmp-*"):
            leftover.unlink()
    accelerator.wait_for_everyone()
    family.load(ENCODERS)
    reading, encoding = DataReport(source=source.facts()), DataReport()
    with Progress("caching pairs", data.max_pairs, "pair", show=accelerator.is_main_process) as progress:
        builder = CacheBuilder(
            folder,
            config,
            family,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            progress=lambda n: progress.set(n * accelerator.num_processes),
        )
        builder.build(iterate(data, source, reading), encoding)
    family.unload(ENCODERS)
    accelerator.wait_for_everyone()
    for other in gather_object([encoding]):
        reading.merge(other)
    if accelerator.is_main_process:
        reading.write(folder / REPORT)
        total = sum(len(table) for table in caches.tables(folder))
        if total == 0:
            raise DataError(f"no usable pair is left: {reading.summary()}. {reading.example()}")
        caches.write_manifest(folder, wanted, source.fingerprint(), total)
    accelerator.wait_for_everyone()
    return reading


def make_world_pairs(config: RunConfig, accelerator: Accelerator) -> Path:
    """Write the tiny world's pairs (once) and return their folder."""
    from diffalign.world.pairs import make_pairs

    folder = Path(config.output_dir) / "data"
    assert config.data.world_pairs is not None, "asked for by the config"
    if accelerator.is_main_process:
        make_pairs(config.data.world_pairs, folder, config.seed)
    accelerator.wait_for_everyone()
    return folder
