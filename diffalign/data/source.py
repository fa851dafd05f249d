"""Where the comparisons come from: the first usable one of an ordered list of local paths and hub data set ids.

`resolve` only lists files; nothing is downloaded before `Source.shards` is read. A downloaded shard can be deleted once
it was used, so that hundreds of gigabytes pass through a small disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffalign import plugins
from diffalign.config import DataConfig
from diffalign.data.hub import Hub, HubError, HuggingFaceHub, Listing
from diffalign.data.readers import Reader, split_name
from diffalign.data.report import DataReport
from diffalign.errors import ConfigError, DataError
from diffalign.files import free_bytes

log = logging.getLogger(__name__)

GB = 1e9
RESERVE = 2 * GB  # free space that downloads leave alone
RETRY_SECONDS = (2.0, 10.0)  # waits before the second and third attempt at a download
FAILURES = 3  # shards in a row that may fail before the run stops
EDGE = 64 * 1024  # bytes hashed at each end of a local file
HASHED_FILES = 20_000  # beyond, local files count by name and size alone

_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
FALLBACK = "data-is-better-together/open-image-preferences-v1-binarized"
ADVICE = (
    "The official Pick-a-Pic ids (yuvalkirstain/pickapic_v1, _v2) have been gone from the hub since April 2025: name a "
    "local folder or a mirror's id in data.sources, or use the open set with "
    f"data.format=image_preferences data.sources=[{FALLBACK}]"
)


TEXT_ADVICE = (
    "Name a local JSONL, JSON, parquet or CSV file (or a folder of them), or a hub data set id, in data.sources"
)


class _NotUsable(Exception):  # noqa: N818 - a verdict on one entry
    """Why one entry of the list is passed over."""


@dataclass(frozen=True)
class File:
    """A file of a source: name relative to its root ("/" at the end: a folder), size in bytes."""

    name: str
    size: int


@dataclass
class Source:
    """One usable source. Its shards are read with `shards`.

    Attributes:
        id: the path or hub id, as written in the configuration.
        kind: a local file, a local folder, or the hub.
        revision: commit on the hub, None for local data.
        files: data shards, in order.
        companions: other files that are needed first.
        root: folder of a local source.
        hub: of a hub source.
        keep_downloads: False deletes each downloaded shard after use.
        budget: bytes of downloads that may be on disk at once; None for no limit but the disk's.
        tried: (entry, reason) of what was passed over.
    """

    id: str
    kind: Literal["file", "folder", "hub"]
    revision: str | None
    files: tuple[File, ...]
    companions: tuple[File, ...] = ()
    root: Path | None = None
    hub: Hub | None = None
    keep_downloads: bool = True
    budget: float | None = None
    tried: tuple[tuple[str, str], ...] = ()
    _held: dict[str, int] = field(default_factory=dict, repr=False)  # downloaded by us and still on disk

    @property
    def repo(self) -> str:
        """The hub id without its revision."""
        return self.id.partition("@")[0]

    @property
    def name(self) -> str:
        """What record ids are made of: moving local data does not change them."""
        return self.repo if self.kind == "hub" else "local"

    @property
    def total_bytes(self) -> int:
        """Size of all shards and companions."""
        return sum(file.size for file in self.files) + sum(file.size for file in self.companions)

    @property
    def download_bytes(self) -> int:
        """How much of it is not on this machine yet."""
        if self.kind != "hub":
            return 0
        return sum(file.size for file in (*self.files, *self.companions) if not self._cached(file))

    def describe(self) -> str:
        """One line in plain words: what is used and what it costs."""
        what = f"{self.id}: {len(self.files)} shards, {self.total_bytes / GB:.2f} GB"
        if self.kind != "hub":
            return f"using the local {self.kind} {what}"
        line = f"using the hub data set {what} at {self.revision}, {self.download_bytes / GB:.2f} GB to download"
        if not self.keep_downloads:
            return f"{line}, each shard deleted after use"
        return line if self.budget is None else f"{line}, at most {self.budget / GB:.2f} GB of it (data.max_disk_gb)"

    def facts(self) -> dict[str, Any]:
        """The same for `data_report.json`."""
        return {
            "id": self.id,
            "kind": self.kind,
            "revision": self.revision,
            "shards": len(self.files),
            "gigabytes": round(self.total_bytes / GB, 3),
            "tried": [{"source": spec, "reason": reason} for spec, reason in self.tried],
        }

    def fingerprint(self) -> str:
        """Changes when the data does: names and sizes, with the commit (hub) or the files' first and last 64 KiB."""
        listed = (*self.files, *self.companions)
        read = self.root if len(listed) <= HASHED_FILES else None
        files = [(f.name, f.size, _edges(read / f.name) if read and not f.name.endswith("/") else "") for f in listed]
        tree = {"source": self.name, "revision": self.revision, "files": files}
        return hashlib.sha256(json.dumps(tree).encode()).hexdigest()[:32]

    def root_of(self, shard: str, path: Path) -> Path:
        """The folder that `shard` is relative to, given where it lies."""
        return path.parents[len(Path(shard).parts) - 1]

    # --- reading -----------------------------------------------------------------------------------------------------

    def shards(self, report: DataReport) -> Generator[tuple[str, Path], None, None]:
        """(name, local path) of each shard in order, downloaded one ahead where needed.

        Stops at the disk budget, and says so in the report. From the second shard on the next one is downloaded in the
        background: a run of few pairs never fetches what it does not read.

        Raises:
            DataError: several shards in a row could not be downloaded.
        """
        if self.root is not None:
            for file in self.files:
                yield file.name, self.root / file.name
            return
        with ThreadPoolExecutor(1, thread_name_prefix="download") as pool:
            yield from self._downloaded(report, pool)

    def _downloaded(self, report: DataReport, pool: ThreadPoolExecutor) -> Iterator[tuple[str, Path]]:
        companion = self._companions(report)
        ahead: tuple[File, Future[Path]] | None = None
        failures = 0
        try:
            for number, file in enumerate(self.files):
                if ahead is None:
                    if why := self._no_room(file):
                        self._stopped(number, why, report)
                        return
                    ahead = file, pool.submit(self._fetch, file, companion)
                try:
                    path = ahead[1].result()
                    failures = 0
                except HubError as error:
                    failures += 1
                    ahead = None
                    report.bad_shard(file.name, f"not downloaded: {error}")
                    if failures == FAILURES:
                        raise DataError(
                            f"{self.id}: {FAILURES} shards in a row could not be downloaded ({error}); "
                            "check the connection and start again: what is cached is kept"
                        ) from error
                    continue
                following = self.files[number + 1] if 1 <= number < len(self.files) - 1 else None
                ahead = None
                if following and not self._no_room(following):
                    ahead = following, pool.submit(self._fetch, following, companion)
                try:
                    yield file.name, path
                finally:
                    self._release(file, path)
        finally:
            self._drop(ahead)
            for file in self.companions:
                if (found := self._cached(file)) is not None:
                    self._release(file, found)

    def _companions(self, report: DataReport) -> Path | None:
        """Download the companions; the last one's path tells where folders lie."""
        path = None
        for number, file in enumerate(self.companions):
            if why := self._no_room(file):
                left = len(self.companions) - number
                report.note("companions_not_downloaded", why, count=left)
                log.warning("%s: %d companion files are not downloaded: %s", self.id, left, why)
                break
            try:
                path = self._fetch(file, None)
            except HubError as error:
                report.note("companions_not_downloaded", f"{file.name}: {error}")
                self._held.pop(file.name, None)
        return None if path is None else self.root_of(file.name, path)

    def _fetch(self, file: File, root: Path | None) -> Path:
        if file.name.endswith("/"):  # a folder: its files are companions
            if root is None:
                raise HubError("none of its files could be downloaded")
            return root / file.name
        assert self.hub is not None, "only hub sources download"
        assert self.revision is not None, "a hub source has a commit"
        for wait in (*RETRY_SECONDS, None):
            try:
                return self.hub.download(self.repo, file.name, self.revision)
            except HubError as error:
                if wait is None or not error.passing:
                    self._held.pop(file.name, None)
                    raise
                log.warning("%s: %s; trying again in %.0f s", file.name, error, wait)
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _cached(self, file: File) -> Path | None:
        if self.hub is None or self.revision is None or file.name.endswith("/"):
            return None
        return self.hub.cached(self.repo, file.name, self.revision)

    def _no_room(self, file: File) -> str:
        """Reserve space for a download; the reason why not, or nothing."""
        if file.name in self._held or file.name.endswith("/") or self._cached(file) is not None:
            return ""
        assert self.hub is not None, "only hub sources download"
        held = sum(self._held.values())
        if self.budget is not None and held + file.size > self.budget:
            return f"data.max_disk_gb={self.budget / GB:g} allows no more ({held / GB:.2f} GB used)"
        free = free_bytes(self.hub.folder())
        if file.size + RESERVE > free:
            return f"the disk of {self.hub.folder()} has {free / GB:.1f} GB left"
        self._held[file.name] = file.size
        return ""

    def _stopped(self, number: int, why: str, report: DataReport) -> None:
        left = len(self.files) - number
        report.note("shards_not_downloaded", why, count=left)
        log.warning("%s: stopping before shard %d of %d: %s", self.id, number + 1, len(self.files), why)

    def _release(self, file: File, path: Path) -> None:
        # Only what this run downloaded goes; what was in the cache before is the user's.
        if not self.keep_downloads and file.name in self._held:
            assert self.hub is not None, "only hub sources download"
            self.hub.delete(path)
            del self._held[file.name]

    def _drop(self, ahead: tuple[File, Future[Path]] | None) -> None:
        """Wait for a download that nobody will read, and release it."""
        if ahead is None:
            return
        file, future = ahead
        if future.cancel():
            self._held.pop(file.name, None)
        else:
            with contextlib.suppress(HubError):
                self._release(file, future.result())


def _edges(path: Path) -> str:
    """Hash of the first and last 64 KiB of a file."""
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(EDGE))
            file.seek(max(0, path.stat().st_size - EDGE))
            digest.update(file.read(EDGE))
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); check that it is there and yours to read"
        ) from error
    return digest.hexdigest()


# --- resolving -------------------------------------------------------------------------------------------------------


def resolve(config: DataConfig, hub: Hub | None = None) -> Source:
    """Find the first usable source of `config.sources`, and say in the log which it is and what it costs.

    A name that exists as a local path is never asked of the hub.

    Args:
        config: which sources, format, split, and disk limits.
        hub: for tests; None is the Hugging Face hub.

    Raises:
        ConfigError: no such format, or a setting that this format does not have.
        DataError: nothing is usable; the message has each entry's reason and what to do.
    """
    reader: Reader = plugins.find("readers", config.format)()
    if config.rename and reader.modality == "image":
        raise ConfigError(
            f"data.rename: data.format={config.format} has fixed columns; remove it (text formats have it)"
        )
    advice = ADVICE if reader.modality == "image" else TEXT_ADVICE
    if not config.sources:
        raise DataError(f"data.sources is empty; expected local paths or hub data set ids, tried in order. {advice}")
    hub = hub or HuggingFaceHub()
    tried: list[tuple[str, str]] = []
    for spec in config.sources:
        try:
            source = _try(spec, config, reader, hub)
        except (_NotUsable, HubError) as why:
            log.info("data source %s is passed over: %s", spec, why)
            tried.append((spec, str(why)))
            continue
        source.tried = tuple(tried)
        log.info("data: %s", source.describe())
        return source
    reasons = "; ".join(f"{spec}: {reason}" for spec, reason in tried)
    raise DataError(f"no data source can be used. Tried {reasons}. {advice}")


def _try(spec: str, config: DataConfig, reader: Reader, hub: Hub) -> Source:
    path = Path(spec).expanduser()
    if path.exists():
        return _local(spec, path, config, reader)
    match = _HUB_ID.fullmatch(spec)
    if match is None:
        raise _NotUsable("no such file or folder, and not a hub id (owner/name)")
    return _from_hub(spec, match["repo"], match["revision"], config, reader, hub)


def _local(spec: str, path: Path, config: DataConfig, reader: Reader) -> Source:
    root = path if path.is_dir() else path.parent
    inside = sorted(_files_below(path)) if path.is_dir() else [path.name]
    named = None if path.is_dir() else split_name(path.name)  # naming a file is choice enough
    shards = _shards(inside, config, reader, named or ("train" if path.is_file() else config.split))
    # The companions of a single file (images beside a JSONL, say) lie around it.
    around = _files_below(root) if reader.beside and path.is_file() else inside
    companions = reader.companions(around, config.split)
    return Source(
        id=spec,
        kind="folder" if path.is_dir() else "file",
        revision=None,
        files=tuple(File(name, 0 if name.endswith("/") else (root / name).stat().st_size) for name in shards),
        companions=tuple(File(name, (root / name).stat().st_size) for name in sorted(companions)),
        root=root,
    )


def _files_below(folder: Path) -> list[str]:
    """Relative paths of the files below a folder, without hidden ones."""
    found = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return [p.as_posix() for p in found if not any(part.startswith(".") for part in p.parts)]


def _from_hub(spec: str, repo: str, revision: str | None, config: DataConfig, reader: Reader, hub: Hub) -> Source:
    listing = hub.list_files(repo, revision)
    names = sorted(listing.files)
    try:
        shards = _shards(names, config, reader, config.split)
    except _NotUsable as why:
        if listing.offline:
            raise _NotUsable(f"offline (HF_HUB_OFFLINE): of what is in the cache, {why}") from None
        raise
    source = Source(
        id=spec,
        kind="hub",
        revision=listing.commit,
        files=tuple(File(name, listing.files.get(name, 0)) for name in shards),
        companions=tuple(File(name, listing.files[name]) for name in reader.companions(names, config.split)),
        hub=hub,
        keep_downloads=config.keep_downloads,
        budget=None if config.max_disk_gb is None else config.max_disk_gb * GB,
    )
    if listing.offline:
        log.warning("%s: offline (HF_HUB_OFFLINE), so only the %d shards in the cache are used", spec, len(shards))
    _check_room(source, listing)
    return source


def _check_room(source: Source, listing: Listing) -> None:
    """Refuse a source of which not even the first shard fits."""
    assert source.hub is not None, "only hub sources download"
    first = sum(f.size for f in (source.files[0], *source.companions) if source._cached(f) is None)
    if source.budget is not None and first > source.budget:
        raise _NotUsable(
            f"its first shard needs {first / GB:.2f} GB (of {sum(listing.files.values()) / GB:.1f} GB in all), "
            f"more than data.max_disk_gb={source.budget / GB:g}"
        )
    free = free_bytes(source.hub.folder())
    if first and first + RESERVE > free:
        raise _NotUsable(
            f"its first shard needs {first / GB:.2f} GB, and {source.hub.folder()} has {free / GB:.1f} GB left"
        )


def _shards(files: Sequence[str], config: DataConfig, reader: Reader, split: str) -> list[str]:
    if not files:
        raise _NotUsable("it has no files")
    shards = reader.shards(files, split)
    if shards:
        return shards
    splits = sorted({name for f in files if (name := split_name(f))} - {split})
    if any(reader.shards(files, other) for other in splits):
        raise _NotUsable(f"no shards of split {split!r}; it has {', '.join(splits)}: set data.split")
    others = [n for n in plugins.names("readers") if n != config.format and _reads(n, reader.modality, files, split)]
    hint = f"; data.format={' or '.join(others)} might read it" if others else ""
    raise _NotUsable(f"no files of format {config.format!r} ({reader.layout}){hint}")


def _reads(name: str, modality: str, files: Sequence[str], split: str) -> bool:
    reader: Reader = plugins.find("readers", name)()
    return reader.modality == modality and bool(reader.shards(files, split))
