"""The latent and text cache: every image encoded once, every distinct prompt once, in shards that survive a kill.

Layout of a cache folder:

    manifest.json            fingerprint of everything that determines the contents, and whether it is complete
    pairs-<name>.parquet     rows: id, order, prompt, image keys, p, weight, user, sizes
    images-<name>.safetensors    latents by image key            (written before their parquet file)
    prompts-<name>.safetensors   text conditioning, `<prompt key>/<tensor name>`
    data_report.json         what was read, kept, skipped and why

A shard's parquet file appears last and by an atomic rename, so that it stands for a complete shard; anything else in
the folder is left over from a kill and is written again. Building with several processes deals records round robin.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffalign.config import DataConfig, RunConfig, to_tree
from diffalign.data.encode import (
    EncodedPair,
    PreparedPair,
    Preparer,
    encode_images,
    encode_prompts,
    is_pair,
    note_truncation,
    prepare_all,
    prompt_key,
)
from diffalign.data.prompts import load_prompts, normalised
from diffalign.data.record import Record
from diffalign.data.report import DataReport
from diffalign.errors import DataError
from diffalign.families import Family
from diffalign.files import atomic_write_text, free_bytes, sha256

log = logging.getLogger(__name__)
VERSION = 1
# Keys of the data section that do not change what a cached pair is.
NEUTRAL_DATA_KEYS = ("keep_downloads", "max_disk_gb", "max_unusable", "sources")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
OPEN_FILES = 48


SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("order", pa.int64()),
        ("prompt", pa.string()),
        ("image_keys", pa.list_(pa.string(), 2)),
        ("p", pa.float32()),
        ("weight", pa.float32()),
        ("user", pa.string()),
        ("geometry", pa.list_(pa.int32(), 10)),  # two original sizes, two crops, the target size
    ]
)


def fingerprint(config: RunConfig, family: Family) -> dict[str, Any]:
    """Everything that determines a cache's contents, except the source's files."""
    data = {k: v for k, v in to_tree(config.data).items() if k not in NEUTRAL_DATA_KEYS}
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


def check_manifest(folder: Path, wanted: dict[str, Any], source: str | None) -> dict[str, Any] | None:
    """The manifest of an existing cache, or None if there is none.

    Raises:
        DataError: the cache was made with other settings, from other files, or is unreadable.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        found = manifest["fingerprint"]
    except (ValueError, KeyError) as error:
        raise DataError(
            f"cache {folder}: manifest.json is not readable; delete the folder to build it again"
        ) from error
    differences = list(_differences(found, json.loads(json.dumps(wanted))))
    if source is not None and manifest.get("source") not in (None, source):
        differences.append("the source's files have changed")
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise DataError(
            f"cache {folder} is stale: {'; '.join(differences[:3])}{more}. Delete it, or name another cache.dir"
        )
    return manifest


class CacheBuilder:
    """Writes shards of pairs, skipping those that an earlier, interrupted build has finished.

    Args:
        folder: of the cache.
        config: the run's configuration.
        family: with its encoders loaded.
        rank, world: this process and how many build together.
        progress: called with the number of pairs finished so far.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        family: Family,
        *,
        rank: int = 0,
        world: int = 1,
        progress: Callable[[int], None] = lambda n: None,
    ) -> None:
        self.folder, self.config, self.family = folder, config, family
        self.rank, self.world, self.progress = rank, world, progress
        self.dtype = DTYPES[config.cache.dtype]
        self.done, self.known_prompts = set[str](), set[str]()
        self._pending: list[tuple[int, PreparedPair]] = []
        self._made = 0
        cached_prompts: dict[str, None] = {"": None}
        for table in tables(folder):
            self.done.update(table.column("id").to_pylist())
            cached_prompts |= dict.fromkeys(table.column("prompt").to_pylist())
        for path in folder.glob("prompts-*.safetensors"):
            self.known_prompts.update(_prompt_names(path) or ())
        # The empty prompt, and what was lost with a prompt file that somebody deleted.
        self._missing_prompts = [p for p in cached_prompts if prompt_key(p) not in self.known_prompts]

    def build(self, records: Iterator[Record], report: DataReport) -> int:
        """Encode all records of this process; returns how many pairs the cache holds from it now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            for path in self.folder.glob("prompts-*.safetensors"):
                if _prompt_names(path) is None:
                    path.unlink()
            if self._missing_prompts:
                self._write_prompts(self._free("prompts-", "extra-{:05d}", ".safetensors"), self._missing_prompts)
        self.known_prompts.update(prompt_key(prompt) for prompt in self._missing_prompts)
        numbered = enumerate(record for record in records if is_pair(record))
        mine = ((order, record) for order, record in numbered if order % self.world == self.rank)
        todo: dict[str, int] = {}

        def fresh() -> Iterator[Record]:
            for order, record in mine:
                if record.id not in self.done:
                    todo[record.id] = order
                    yield record
                else:  # a resumed build accounts for what an earlier one has encoded, too
                    note_truncation(self.family, record, report)

        preparer = Preparer(self.config.data, self.config.seed, self.family.resolution_step)
        for pair in prepare_all(fresh(), preparer, report, self.config.cache.workers):
            note_truncation(self.family, pair.record, report)
            self._pending.append((todo.pop(pair.record.id), pair))
            if len(self._pending) >= self.config.cache.shard_size:
                self._flush()
        self._flush()
        return len(self.done)

    def _flush(self) -> None:
        if not self._pending:
            return
        # The first free number: a shard that was deleted because it was damaged leaves a gap.
        name = self._free("pairs-", f"r{self.rank}-{{:05d}}", ".parquet")
        pairs = [pair for _, pair in self._pending]
        latents = encode_images(
            self.family, [image for pair in pairs for image in pair.images], self.config.cache.batch_size
        )
        size = sum(latent.numel() for latent in latents.values()) * self.dtype.itemsize
        if free_bytes(self.folder) < 2 * size + (64 << 20):
            raise DataError(
                f"cache {self.folder}: no space left for the next shard ({size / 1e6:.0f} MB); free some, name another "
                "cache.dir, or set data.max_pairs. What is cached is kept, and the build goes on from there"
            )
        _save({key: value.to(self.dtype) for key, value in latents.items()}, self.folder / f"images-{name}.safetensors")
        prompts = [
            p for p in dict.fromkeys(pair.record.prompt for pair in pairs) if prompt_key(p) not in self.known_prompts
        ]
        if prompts:
            self._write_prompts(name, prompts)
        rows = [_row(order, pair) for order, pair in self._pending]
        temporary = self.folder / f".tmp-pairs-{name}-{os.getpid()}"
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary)
        os.replace(temporary, self.folder / f"pairs-{name}.parquet")
        self.done.update(pair.record.id for pair in pairs)
        self.known_prompts.update(prompt_key(prompt) for prompt in prompts)
        self._made += len(pairs)
        self._pending.clear()
        self.progress(self._made)

    def _free(self, before: str, pattern: str, after: str) -> str:
        """The first name of a numbered pattern that no file has."""
        names = (pattern.format(number) for number in itertools.count())
        return next(name for name in names if not (self.folder / f"{before}{name}{after}").exists())

    def _write_prompts(self, name: str, prompts: list[str]) -> None:
        encoded = encode_prompts(self.family, prompts)
        tensors = {
            f"{prompt_key(prompt)}/{part}": value.to(self.dtype)
            for prompt, conditioning in encoded.items()
            for part, value in conditioning.items()
        }
        _save(tensors, self.folder / f"prompts-{name}.safetensors")


def _row(order: int, pair: PreparedPair) -> dict[str, Any]:
    a, b = pair.images
    geometry = [*a.original_size, *b.original_size, *a.crop_top_left, *b.crop_top_left, *a.target_size]
    record = pair.record
    return {
        "id": record.id,
        "order": order,
        "prompt": record.prompt,
        "image_keys": [a.key, b.key],
        "p": record.p,
        "weight": record.weight,
        "user": record.user,
        "geometry": geometry,
    }


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
    os.replace(temporary, path)


def tables(folder: Path) -> Iterator[pa.Table]:
    for path in sorted(folder.glob("pairs-*.parquet")):
        try:
            yield pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"cache shard {path} is corrupt ({str(error).splitlines()[0]}); delete this file and run again: only "
                "its pairs are encoded anew"
            ) from error


def write_manifest(folder: Path, wanted: dict[str, Any], source: str | None, pairs: int | None) -> None:
    """Record what a cache holds: before the first shard (`pairs` None) and after the last (their number)."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"fingerprint": wanted, "source": source, "pairs": pairs}
    atomic_write_text(folder / "manifest.json", json.dumps(manifest, indent=1))


class LatentCache:
    """Read access to a complete cache.

    Args:
        folder: of the cache.

    Raises:
        DataError: a shard is missing or corrupt, or there is no pair.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found, shards = [], []
        for path, table in zip(sorted(folder.glob("pairs-*.parquet")), tables(folder), strict=True):
            images = folder / f"images-{path.stem.removeprefix('pairs-')}.safetensors"
            _check_images(images)
            found.append(table)
            shards += [images.name] * len(table)
        if not found:
            raise DataError(f"cache {folder} holds no pairs; see data_report.json there for what was skipped and why")
        table = pa.concat_tables(found).append_column("shard", pa.array(shards))
        # Source order, whatever number of processes built the cache.
        self._table = table.sort_by("order").combine_chunks()
        self._text_names: dict[str, tuple[Path, list[str]]] = {}
        for path in sorted(folder.glob("prompts-*.safetensors")):
            names = _prompt_names(path)
            if names is None:
                raise DataError(
                    f"cache shard {path} is corrupt; delete this file and run again: only its prompts are encoded anew"
                )
            for key, group in names.items():
                self._text_names.setdefault(key, (path, group))
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._table)

    def missing_prompts(self) -> list[str]:
        """Distinct prompts without an embedding, the empty one included: those of a file that somebody deleted."""
        return [p for p in dict.fromkeys(["", *self.prompts]) if prompt_key(p) not in self._text_names]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # file handles stay in their process

    @property
    def prompts(self) -> list[str]:
        """The prompt of every pair, in order."""
        return self._table.column("prompt").to_pylist()  # type: ignore[no-any-return]

    @property
    def target_sizes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of every pair, in order."""
        return [(g[8], g[9]) for g in self._table.column("geometry").to_pylist()]

    def pair(self, index: int) -> EncodedPair:
        """One pair, in the record's own order."""
        row = self._table.slice(index, 1).to_pylist()[0]
        g, shard = row["geometry"], self.folder / row["shard"]
        a, b = row["image_keys"]
        return EncodedPair(
            id=row["id"],
            prompt=row["prompt"],
            latents=(self._tensor(shard, a), self._tensor(shard, b)),
            p=row["p"],
            weight=row["weight"],
            user=row["user"],
            original_sizes=((g[0], g[1]), (g[2], g[3])),
            crops=((g[4], g[5]), (g[6], g[7])),
            target_size=(g[8], g[9]),
        )

    def text(self, prompt: str) -> dict[str, Tensor]:
        """Text conditioning of a prompt, without a batch axis."""
        key = prompt_key(prompt)
        if key not in self._text_names:
            raise DataError(
                f"cache {self.folder} has no embedding of the prompt {prompt!r}; delete the cache to rebuild it"
            )
        path, names = self._text_names[key]
        return {name.partition("/")[2]: self._tensor(path, name) for name in names}

    def _handle(self, path: Path) -> Any:
        if path in self._open:
            self._open.move_to_end(path)
        else:
            self._open[path] = safe_open(path, framework="pt").__enter__()
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)[1].__exit__(None, None, None)
        return self._open[path]

    def _tensor(self, path: Path, name: str) -> Tensor:
        try:
            return self._handle(path).get_tensor(name)  # type: ignore[no-any-return]
        except SafetensorError as error:
            raise DataError(f"cache shard {path}: {error}; delete its pairs-*.parquet to encode it anew") from error


def _prompt_names(path: Path) -> dict[str, list[str]] | None:
    """Tensor names of a prompt file by prompt key; None if it cannot be read."""
    names: dict[str, list[str]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                names.setdefault(name.partition("/")[0], []).append(name)
    except (SafetensorError, OSError):
        return None
    return names


def _check_images(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        pairs = path.stem.replace("images-", "pairs-", 1)
        raise DataError(
            f"cache shard {path} is missing or corrupt ({str(error).splitlines()[0]}); delete {pairs}.parquet beside "
            "it and run again: only its pairs are encoded anew"
        ) from error
