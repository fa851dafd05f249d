"""The latent and text cache: every image encoded once, every distinct prompt once, in shards that survive a kill.

Layout of a cache folder:

    manifest.json            fingerprint of everything that determines the contents, source, and whether it is complete
    pairs-<name>.parquet     rows: id, order, prompt, image keys, p, weight, user, sizes, extra (JSON, or null)
    images-<name>.safetensors    latents by image key, maps by `map/<record id>/<0 or 1>` (written before their parquet file)
    prompts-<name>.safetensors   text conditioning, `<prompt key>/<tensor name>`; never written twice
    data_report.json         what was read, kept, skipped and why

A shard's parquet file appears last and by an atomic rename, so that it stands for a complete shard; anything else in
the folder is left over from a kill and is written again. Building with several processes deals records round robin.
"""

from __future__ import annotations

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

from diffalign.config import RunConfig
from diffalign.data.encode import (
    EncodedPair,
    Owner,
    Prepared,
    PreparedPair,
    Preparer,
    Quota,
    encode_images,
    encode_prompts,
    is_pair,
    maps_of,
    note_truncation,
    overflow_advice,
    prepare_all,
    prompt_key,
)
from diffalign.data.facts import MAPS, PROMPTS
from diffalign.data.record import Record
from diffalign.data.report import DataReport
from diffalign.errors import DataError
from diffalign.families import EncodingFamily
from diffalign.files import free_bytes

log = logging.getLogger(__name__)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
OPEN_FILES = 48
EARLY_PAIRS = 32  # encoded pairs after which a VAE that overflows is told from a few odd images

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
        ("extra", pa.string()),  # the record's, with `true` in place of the maps
    ]
)


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
        family: EncodingFamily,
        *,
        rank: int = 0,
        world: int = 1,
        progress: Callable[[int], None] = lambda n: None,
    ) -> None:
        self.folder, self.config, self.family = folder, config, family
        self.rank, self.world, self.progress = rank, world, progress
        self.dtype = DTYPES[config.cache.dtype]
        self.done, self.known_prompts = set[str](), set[str]()
        limit = config.data.max_pairs
        self._quota = Quota() if limit is None else Quota(limit // world + (rank < limit % world))
        self._made = self._settled = self._overflowed = 0
        # Of the shard under way: what waits for the VAE, latents in the storage type (None: not finite), finished rows.
        self._waiting: list[tuple[int, PreparedPair]] = []
        self._queue: dict[tuple[int, ...], dict[str, Prepared]] = {}
        self._latents: dict[str, Tensor | None] = {}
        self._maps: dict[str, Tensor] = {}
        self._rows: list[dict[str, Any]] = []
        cached_prompts: dict[str, None] = {"": None}
        for table in tables(folder):
            self.done.update(table.column("id").to_pylist())
            cached_prompts |= dict.fromkeys(_prompts(table))
        for path in folder.glob("prompts-*.safetensors"):
            self.known_prompts.update(_prompt_names(path) or ())
        # The empty prompt, and what was lost with a prompt file that somebody deleted.
        self._missing_prompts = [p for p in cached_prompts if prompt_key(p) not in self.known_prompts]

    def build(self, records: Iterator[Record], report: DataReport) -> int:
        """Encode this process's share; returns how many pairs the cache holds as far as this process knows.

        `data.max_pairs` counts pairs that came out: one with an unusable image is replaced by the next. With several
        processes each takes its share of the number.

        Args:
            records: of all processes; closed by the caller, since it need not be read to the end.
            report: receives what cannot be used.

        Raises:
            DataError: no space is left, or most latents are not finite.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            for path in self.folder.glob("prompts-*.safetensors"):
                if _prompt_names(path) is None:
                    path.unlink()
            if self._missing_prompts:
                self._write_prompts("extra-00000", self._missing_prompts)
        self.known_prompts.update(prompt_key(prompt) for prompt in self._missing_prompts)
        numbered = enumerate(record for record in records if is_pair(record))
        mine = ((order, record) for order, record in numbered if order % self.world == self.rank)
        todo: dict[str, int] = {}

        def fresh() -> Iterator[Record | None]:
            for order, record in mine:
                if record.id not in self.done:
                    todo[record.id] = order
                    yield record
                else:  # a resumed build accounts for what an earlier one has encoded, too
                    note_truncation(self.family, record, report)
                    yield None

        preparer = Preparer(self.config.data, self.config.seed, self.family.resolution_step, self.family.resampling)
        left = fresh()
        while True:
            for pair in prepare_all(left, preparer, report, self.config.cache.workers, self._quota):
                self._add(todo.pop(pair.record.id), pair, report)
            if not self._waiting:
                break
            self._settle(report)  # what fails here is given back to the quota
        self._flush()
        self._check_overflow(at_least=1)
        return len(self.done)

    def _add(self, order: int, pair: PreparedPair, report: DataReport) -> None:
        """Queue a pair; full batches are encoded at once, so that few images are ever held."""
        self._waiting.append((order, pair))
        encoded = False
        for image in pair.images:
            if image.key in self._latents:
                continue
            queue = self._queue.setdefault(tuple(image.pixels.shape), {})
            queue[image.key] = image
            if len(queue) >= self.config.cache.batch_size:
                self._encode(queue)
                encoded = True
        # Batches end with the shard: a resumed build makes the same ones.
        if len(self._rows) + len(self._waiting) >= self.config.cache.shard_size:
            self._settle(report)
            if len(self._rows) >= self.config.cache.shard_size:
                self._flush()
        elif encoded:
            self._take_encoded(report)

    def _encode(self, queue: dict[str, Prepared]) -> None:
        encoded = encode_images(self.family, list(queue.values()), self.config.cache.batch_size)
        queue.clear()
        for key, latent in encoded.items():
            stored = latent.to(self.dtype)
            self._latents[key] = stored if bool(stored.isfinite().all()) else None

    def _settle(self, report: DataReport) -> None:
        """Encode everything that waits, in batches of whatever is there."""
        for queue in self._queue.values():
            self._encode(queue)
        self._take_encoded(report)

    def _take_encoded(self, report: DataReport) -> None:
        """Turn waiting pairs with both latents into rows; leave out those of which one is not finite."""
        waiting, self._waiting = self._waiting, []
        for order, pair in waiting:
            keys = [image.key for image in pair.images]
            if not all(key in self._latents for key in keys):
                self._waiting.append((order, pair))
                continue
            self._settled += 1
            if any(self._latents[key] is None for key in keys):
                self._overflowed += 1
                self._quota.left += 1
                report.skip(pair.record, "non_finite_latents", overflow_advice(self.family))
            else:
                note_truncation(self.family, pair.record, report)
                self._rows.append(_row(order, pair))
                found = [latent for key in keys if (latent := self._latents[key]) is not None]
                for side, weights in enumerate(maps_of(pair, (found[0], found[1]))):
                    self._maps[_map_name(pair.record.id, side)] = weights.to(self.dtype)
        self._check_overflow(at_least=EARLY_PAIRS)

    def _check_overflow(self, at_least: int) -> None:
        if self._settled >= at_least and 2 * self._overflowed > self._settled:
            raise DataError(
                f"cache {self.folder}: {self._overflowed} of {self._settled} pairs have latents that are not finite; "
                f"{overflow_advice(self.family)}"
            )

    def _flush(self) -> None:
        """Write the shard under way."""
        if not self._rows:
            self._latents.clear()
            return
        # The first free number: a shard that was deleted because it was damaged leaves a gap.
        name = self._free("pairs-", f"r{self.rank}-{{:05d}}", ".parquet")
        used = {key for row in self._rows for key in row["image_keys"]}
        latents = {key: value for key, value in self._latents.items() if value is not None and key in used}
        latents |= self._maps
        size = sum(latent.nbytes for latent in latents.values())
        if free_bytes(self.folder) < 2 * size + (64 << 20):
            raise DataError(
                f"cache {self.folder}: no space left for the next shard ({size / 1e6:.0f} MB); free some, name another "
                "cache.dir, or set data.max_pairs. What is cached is kept, and the build goes on from there"
            )
        _save(latents, self.folder / f"images-{name}.safetensors")
        table = pa.Table.from_pylist(self._rows, schema=SCHEMA)
        if prompts := [p for p in _prompts(table) if prompt_key(p) not in self.known_prompts]:
            self._write_prompts(name, prompts)
        temporary = self.folder / f".tmp-pairs-{name}-{os.getpid()}"
        pq.write_table(table, temporary)
        os.replace(temporary, self.folder / f"pairs-{name}.parquet")
        self.done.update(row["id"] for row in self._rows)
        self._made += len(self._rows)
        self._rows.clear()
        self._latents.clear()
        self._maps.clear()
        self.progress(self._made)

    def _free(self, before: str, pattern: str, after: str) -> str:
        """The first name of a numbered pattern that no file has."""
        names = (pattern.format(number) for number in itertools.count())
        return next(name for name in names if not (self.folder / f"{before}{name}{after}").exists())

    def _write_prompts(self, name: str, prompts: list[str]) -> None:
        """Write a new file; one that a kill left under this name holds prompts that count as known, and stays."""
        encoded = encode_prompts(self.family, prompts)
        tensors = {
            f"{prompt_key(prompt)}/{part}": value.to(self.dtype)
            for prompt, conditioning in encoded.items()
            for part, value in conditioning.items()
        }
        if (self.folder / f"prompts-{name}.safetensors").exists():
            name = self._free("prompts-", f"{name}-{{}}", ".safetensors")
        _save(tensors, self.folder / f"prompts-{name}.safetensors")
        self.known_prompts.update(prompt_key(prompt) for prompt in prompts)


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
        "extra": json.dumps(record.extra | ({MAPS: True} if MAPS in record.extra else {})) if record.extra else None,
    }


def _map_name(record: str, side: int) -> str:
    return f"map/{record}/{side}"


def _extras(table: pa.Table) -> list[dict[str, Any]]:
    """What the rows say beyond the label, without the maps themselves."""
    return [json.loads(text) if text else {} for text in table.column("extra").to_pylist()]


def _prompts(table: pa.Table) -> list[str]:
    """Distinct prompts, those that images have of their own included."""
    own = [prompt for extra in _extras(table) for prompt in extra.get(PROMPTS, ())]
    return list(dict.fromkeys([*table.column("prompt").to_pylist(), *own]))


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
        return [p for p in dict.fromkeys(["", *_prompts(self._table)]) if prompt_key(p) not in self._text_names]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # file handles stay in their process

    @property
    def prompts(self) -> list[str]:
        """The prompt of every pair, in order."""
        return self._table.column("prompt").to_pylist()  # type: ignore[no-any-return]

    @property
    def extras(self) -> list[dict[str, Any]]:
        """What every pair has beyond its label, in order; maps are not read, but named."""
        return _extras(self._table)

    @property
    def owners(self) -> list[Owner]:
        """Whose every pair is, in order; no image is read."""
        columns = (self._table.column(name).to_pylist() for name in ("id", "user", "p", "prompt"))
        return [Owner(*row) for row in zip(*columns, strict=True)]

    @property
    def target_sizes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of every pair, in order."""
        return [(g[8], g[9]) for g in self._table.column("geometry").to_pylist()]

    def pair(self, index: int) -> EncodedPair:
        """One pair, in the record's own order."""
        row = self._table.slice(index, 1).to_pylist()[0]
        g, shard = row["geometry"], self.folder / row["shard"]
        a, b = row["image_keys"]
        extra = json.loads(row["extra"]) if row["extra"] else {}
        if MAPS in extra:
            extra[MAPS] = [self._tensor(shard, _map_name(row["id"], side)) for side in (0, 1)]
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
            extra=extra,
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
