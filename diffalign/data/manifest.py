"""What a cache folder was made with and from: `manifest.json`, and when it does not fit."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffalign.config import DataConfig, RunConfig
from diffalign.config_loading import to_tree
from diffalign.data.prompts import load_prompts, normalised
from diffalign.data.source import Source
from diffalign.errors import DataError
from diffalign.families import EncodingFamily
from diffalign.files import atomic_write_text, sha256

VERSION = 2  # 2: a column `extra`; what is in it was not read before
# Keys of the data section that do not change what a cached pair is.
NEUTRAL_DATA_KEYS = ("keep_downloads", "label", "label_temperature", "max_disk_gb", "max_unusable", "sources")


def fingerprint(config: RunConfig, family: EncodingFamily) -> dict[str, Any]:
    """Everything that determines a cache's contents, except the source's files."""
    data = {k: v for k, v in to_tree(config.data).items() if k not in NEUTRAL_DATA_KEYS}
    if config.data.num_frames == 1:  # as caches were that knew no clips, and no stride matters
        del data["num_frames"], data["frame_stride"]
    cache = {"dtype": config.cache.dtype, "encode_dtype": str(family.vae_dtype).removeprefix("torch.")}
    random = config.data.crop == "random" or config.data.flip
    return {
        "version": VERSION,
        "family": config.model.family,
        "encoders": family.fingerprint() | {"text_dtype": str(family.dtype).removeprefix("torch.")},
        "data": data | _named_files(config.data),
        "cache": cache,
        "seed": config.seed if random or config.data.world_pairs else None,
    }


def _named_files(data: DataConfig) -> dict[str, str]:
    """Hashes of the files that the data section names as rules: what they say decides which pairs are there."""
    found = {}
    if data.filter:
        file = Path(data.filter.rpartition(":")[0]).expanduser()
        found["filter_file"] = sha256(file) if file.is_file() else "missing"
    if data.exclude_prompts:
        prompts = sorted({normalised(prompt) for spec in data.exclude_prompts for prompt in load_prompts(spec)})
        found["excluded_prompts"] = hashlib.sha256("\n".join(prompts).encode("utf-8", "surrogatepass")).hexdigest()
    return found


def _differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        yield f"{where} was {old!r}, is {new!r}"


def source_facts(source: Source) -> dict[str, Any]:
    """What a manifest says of the source: the entry in `data.sources`, what it is, and a hash of its files."""
    facts = {"id": source.id, "name": source.name, "kind": source.kind, "revision": source.revision}
    return facts | {"fingerprint": source.fingerprint()}


def source_label(facts: dict[str, Any]) -> str:
    """A source in words."""
    if facts["kind"] == "hub":
        return f"the hub data set {facts['name']} at {facts['revision']}"
    return f"the local {facts['kind']} {facts['id']} (files {facts['fingerprint'][:8]})"


def check_manifest(folder: Path, wanted: dict[str, Any], source: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The manifest of an existing cache, or None if there is none.

    Args:
        folder: of the cache.
        wanted: see `fingerprint`.
        source: what the cache is about to be filled from (`source_facts`); None compares settings only.

    Raises:
        DataError: the cache was made with other settings or from another source, or is unreadable.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        found, begun = manifest["fingerprint"], manifest["source"]
    except (ValueError, KeyError) as error:
        raise DataError(
            f"cache {folder}: manifest.json is not readable; delete the folder to build it again"
        ) from error
    if differences := list(_differences(found, json.loads(json.dumps(wanted)))):
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise stale(folder, f"{'; '.join(differences[:3])}{more}")
    if isinstance(begun, dict) and source is not None and not _same_source(begun, source):
        hub = begun["kind"] == "hub"
        pinned = f"{begun['name']}@{begun['revision']}" if hub else begun["id"]
        raise DataError(
            f"cache {folder} was begun from {source_label(begun)} and would go on from {source_label(source)}; "
            f"to go on, set data.sources=[{pinned}]{'' if hub else ' with the files as they were'}; "
            "or delete the cache, or name another cache.dir"
        )
    return manifest


def _same_source(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """A hub data set is its commit: how many of its files are listed depends on being offline, too."""
    if a["kind"] == b["kind"] == "hub":
        return bool(a["name"] == b["name"] and a["revision"] == b["revision"])
    return bool(a["fingerprint"] == b["fingerprint"])


def stale(folder: Path, why: str) -> DataError:
    """The error for a cache that does not fit."""
    return DataError(f"cache {folder} is stale: {why}. Delete it, or name another cache.dir")


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left half written; files of a process that is alive stay."""
    for leftover in folder.glob(".tmp-*"):
        if not _is_alive(leftover.name.rpartition("-")[2]):
            leftover.unlink(missing_ok=True)


def _is_alive(pid: str) -> bool:
    if os.name != "posix":  # elsewhere signal 0 is not a mere question
        return True
    try:
        os.kill(int(pid), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def write_manifest(folder: Path, wanted: dict[str, Any], source: dict[str, Any], pairs: int | None) -> None:
    """Record what a cache holds and where from: before the first shard (`pairs` None), after the last (their number)."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"fingerprint": wanted, "source": source, "pairs": pairs}
    atomic_write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
