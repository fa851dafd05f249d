"""The source resolver against a pretended hub: order, reasons, disk limits, downloads and their deletion."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from diffalign.config import DataConfig
from diffalign.data import source as module
from diffalign.data.hub import HubError, HuggingFaceHub, Listing
from diffalign.data.report import DataReport
from diffalign.data.source import Source, resolve
from diffalign.errors import DataError

SHARDS = [f"data/train-{i:05d}-of-00004.parquet" for i in range(4)]


class PretendHub:
    """Data sets in memory; downloads are files under `root`."""

    def __init__(self, root: Path, repos: dict[str, dict[str, int] | HubError]) -> None:
        self.root, self.repos = root, repos
        self.asked: list[str] = []
        self.downloads: list[str] = []
        self.deleted: list[str] = []
        self.failing: dict[str, list[HubError]] = {}
        self.most = 0

    def list_files(self, repo: str, revision: str | None) -> Listing:
        self.asked.append(repo)
        found = self.repos.get(repo, HubError("not on the hub (404)"))
        if isinstance(found, HubError):
            raise found
        return Listing(revision or "c0ffee", found)

    def cached(self, repo: str, path: str, revision: str) -> Path | None:
        file = self.root / revision / path
        return file if file.is_file() else None

    def download(self, repo: str, path: str, revision: str) -> Path:
        self.downloads.append(path)
        if self.failing.get(path):
            raise self.failing[path].pop(0)
        file = self.root / revision / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(path)
        self.most = max(self.most, sum(p.is_file() for p in self.root.rglob("*")))
        return file

    def delete(self, path: Path) -> None:
        self.deleted.append(path.name)
        path.unlink()

    def folder(self) -> Path:
        return self.root


@pytest.fixture(autouse=True)
def _plenty_of_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda folder: 1e15)
    monkeypatch.setattr(module, "RETRY_SECONDS", (0.0, 0.0))


@pytest.fixture
def hub(tmp_path: Path) -> PretendHub:
    sizes = dict.fromkeys(SHARDS, 1_000_000_000)
    return PretendHub(tmp_path / "cache", {"mirror/set": sizes | {"README.md": 5, "data/test-00000.parquet": 7}})


def local(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def drain(source: Source, report: DataReport | None = None) -> list[str]:
    return [path.read_text() for _, path in source.shards(report or DataReport())]


# --- which source ----------------------------------------------------------------------------------------------------


def test_the_first_usable_entry_wins_and_the_others_have_reasons(tmp_path: Path, hub: PretendHub) -> None:
    empty = local(tmp_path / "empty", "README.md")
    config = DataConfig(sources=(str(tmp_path / "nowhere"), str(empty), "gone/set", "mirror/set", "later/set"))
    source = resolve(config, hub)
    assert (source.id, source.kind, source.revision) == ("mirror/set", "hub", "c0ffee")
    assert [file.name for file in source.files] == SHARDS
    assert hub.asked == ["gone/set", "mirror/set"]
    reasons = dict(source.tried)
    assert "no such file or folder" in reasons[str(tmp_path / "nowhere")]
    assert "no files of format 'pickapic'" in reasons[str(empty)]
    assert "404" in reasons["gone/set"]
    assert hub.downloads == []  # resolving costs nothing


def test_a_local_name_is_never_asked_of_the_hub(
    tmp_path: Path, hub: PretendHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    local(tmp_path / "mirror" / "set", *SHARDS, "README.md", ".cache/train-00009.parquet")
    monkeypatch.chdir(tmp_path)
    source = resolve(DataConfig(sources=("mirror/set",)), hub)
    assert (source.kind, hub.asked, source.download_bytes) == ("folder", [], 0)
    assert drain(source) == SHARDS


def test_a_single_file_needs_no_split_in_its_name(tmp_path: Path) -> None:
    local(tmp_path, "test-1.parquet", "other.parquet")
    source = resolve(DataConfig(sources=(str(tmp_path / "test-1.parquet"),)))
    assert ([f.name for f in source.files], source.kind) == (["test-1.parquet"], "file")


def test_a_revision_after_the_at_sign(hub: PretendHub) -> None:
    source = resolve(DataConfig(sources=("mirror/set@v2",)), hub)
    assert (source.revision, source.repo, source.name) == ("v2", "mirror/set", "mirror/set")


def test_when_all_fail_one_line_says_why_and_what_to_do(hub: PretendHub) -> None:
    hub.repos["closed/set"] = HubError("gated: accept its terms")
    sources = ("yuvalkirstain/pickapic_v2", "closed/set", "not a name")
    with pytest.raises(DataError) as caught:
        resolve(DataConfig(sources=sources), hub)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("pickapic_v2: not on the hub (404)", "closed/set: gated", "not a name: no such file", "April 2025"):
        assert part in message
    assert "data.format=image_preferences data.sources=[data-is-better-together/" in message
    with pytest.raises(DataError, match=r"data\.sources is empty"):
        resolve(DataConfig(), hub)


def test_hints_for_another_split_and_another_format(tmp_path: Path, hub: PretendHub) -> None:
    with pytest.raises(DataError, match=r"no shards of split 'validation'; it has test, train: set data\.split"):
        resolve(DataConfig(sources=("mirror/set",), split="validation"), hub)
    tars = local(tmp_path / "tars", "00000.tar")
    with pytest.raises(DataError, match=r"data\.format=pickapic_wds might read it"):
        resolve(DataConfig(sources=(str(tars),)), hub)


def test_it_says_in_plain_words_what_is_used(hub: PretendHub, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        resolve(DataConfig(sources=("gone/set", "mirror/set")), hub)
    assert "gone/set is passed over: not on the hub" in caplog.text
    assert "using the hub data set mirror/set: 4 shards, 4.00 GB at c0ffee, 4.00 GB to download" in caplog.text


# --- downloads -------------------------------------------------------------------------------------------------------


def test_downloads_come_in_order_and_stay(hub: PretendHub) -> None:
    source = resolve(DataConfig(sources=("mirror/set",)), hub)
    assert drain(source) == SHARDS
    assert (hub.downloads, hub.deleted) == (SHARDS, [])
    assert source.download_bytes == 0


def test_used_shards_are_deleted_but_not_what_was_there_before(hub: PretendHub) -> None:
    before = hub.download("mirror/set", SHARDS[1], "c0ffee")
    source = resolve(DataConfig(sources=("mirror/set",), keep_downloads=False), hub)
    assert source.download_bytes == 3_000_000_000
    assert drain(source) == SHARDS
    assert before.is_file()
    assert hub.deleted == [Path(SHARDS[i]).name for i in (0, 2, 3)]
    assert hub.most <= 3  # the old one, the one in use, and the one ahead


def test_stopping_early_leaves_nothing_behind(hub: PretendHub) -> None:
    source = resolve(DataConfig(sources=("mirror/set",), keep_downloads=False), hub)
    shards = source.shards(DataReport())
    next(shards)
    assert hub.downloads == SHARDS[:1]  # a small run does not fetch a second shard
    next(shards)
    shards.close()
    assert {Path(name).name for name in SHARDS[:2]} <= set(hub.deleted)
    assert not [p for p in hub.root.rglob("*") if p.is_file()]


def test_the_disk_budget_stops_downloads_with_a_count(hub: PretendHub) -> None:
    source = resolve(DataConfig(sources=("mirror/set",), max_disk_gb=2.5), hub)
    report = DataReport()
    assert drain(source, report) == SHARDS[:2]
    assert report.notes["shards_not_downloaded"] == 2
    assert "max_disk_gb=2.5" in report.listed["shards_not_downloaded"][0]["detail"]


def test_a_budget_of_one_shard_is_enough_when_shards_are_deleted(hub: PretendHub) -> None:
    source = resolve(DataConfig(sources=("mirror/set",), max_disk_gb=1.5, keep_downloads=False), hub)
    assert drain(source) == SHARDS
    assert hub.most == 1


def test_a_source_that_does_not_fit_at_all_is_passed_over(hub: PretendHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"first shard needs 1\.00 GB .*more than data\.max_disk_gb=0\.5"):
        resolve(DataConfig(sources=("mirror/set",), max_disk_gb=0.5), hub)
    monkeypatch.setattr(module, "free_bytes", lambda folder: 2.5e9)  # 2 GB are left alone
    with pytest.raises(DataError, match=r"first shard needs 1\.00 GB, and .* has 2\.5 GB left"):
        resolve(DataConfig(sources=("mirror/set",)), hub)


def test_a_broken_connection_is_tried_again_and_a_missing_shard_is_not(hub: PretendHub) -> None:
    hub.failing = {
        SHARDS[1]: [HubError("no connection", passing=True)] * 2,
        SHARDS[2]: [HubError("no such file on the hub")],
    }
    report = DataReport()
    assert drain(resolve(DataConfig(sources=("mirror/set",)), hub), report) == [SHARDS[0], SHARDS[1], SHARDS[3]]
    assert hub.downloads.count(SHARDS[1]) == 3
    assert report.bad_shards == [{"shard": SHARDS[2], "detail": "not downloaded: no such file on the hub"}]


def test_a_connection_that_is_gone_stops_the_run(hub: PretendHub) -> None:
    hub.failing = {name: [HubError("no connection", passing=True)] * 3 for name in SHARDS[1:]}
    with pytest.raises(DataError, match="3 shards in a row could not be downloaded"):
        drain(resolve(DataConfig(sources=("mirror/set",)), hub))


def test_images_beside_an_index_are_downloaded_first(hub: PretendHub) -> None:
    hub.repos["my/pairs"] = {"pairs.jsonl": 10, "images/a.jpg": 20, "images/b.png": 20, "README.md": 3}
    source = resolve(DataConfig(sources=("my/pairs",), format="jsonl"), hub)
    assert source.total_bytes == 50
    ((shard, path),) = source.shards(DataReport())
    assert hub.downloads == ["images/a.jpg", "images/b.png", "pairs.jsonl"]
    assert source.root_of(shard, path) == path.parent


def test_a_folder_of_images_from_the_hub(hub: PretendHub) -> None:
    hub.repos["my/folder"] = {"chosen/a.jpg": 1, "rejected/a.jpg": 1, "chosen/a.txt": 1}
    source = resolve(DataConfig(sources=("my/folder",), format="folder", keep_downloads=False), hub)
    shards = source.shards(DataReport())
    name, path = next(shards)
    assert (name, sorted(p.name for p in path.iterdir())) == ("chosen/", ["a.jpg", "a.txt"])
    assert list(shards) == []
    assert len(hub.deleted) == 3


# --- fingerprint -----------------------------------------------------------------------------------------------------


def test_the_fingerprint_follows_content_and_not_place_or_time(tmp_path: Path) -> None:
    def fingerprint(name: str) -> str:
        return resolve(DataConfig(sources=(str(tmp_path / name),))).fingerprint()

    for name in ("a", "b"):
        local(tmp_path / name, "train-0.parquet")
    os.utime(tmp_path / "b" / "train-0.parquet", (1, 1))
    assert fingerprint("a") == fingerprint("b")
    (tmp_path / "b" / "train-0.parquet").write_bytes(b"train-0.parqueT")  # same size
    assert fingerprint("a") != fingerprint("b")
    for name, end in (("a", b"x"), ("b", b"y")):  # long files that differ in their last byte
        (tmp_path / name / "train-0.parquet").write_bytes(bytes(200_000) + end)
    assert fingerprint("a") != fingerprint("b")
    (tmp_path / "b" / "train-0.parquet").write_bytes(bytes(200_000) + b"x")
    assert fingerprint("a") == fingerprint("b")
    local(tmp_path / "a", "train-1.parquet")
    assert fingerprint("a") != fingerprint("b")


def test_the_fingerprint_of_jsonl_covers_its_images(tmp_path: Path) -> None:
    local(tmp_path, "pairs.jsonl", "images/a.jpg")
    config = DataConfig(sources=(str(tmp_path / "pairs.jsonl"),), format="jsonl")
    before = resolve(config).fingerprint()
    (tmp_path / "images" / "a.jpg").write_bytes(b"other")
    assert resolve(config).fingerprint() != before


def test_the_fingerprint_of_a_hub_set_follows_its_commit(hub: PretendHub) -> None:
    prints = [resolve(DataConfig(sources=(f"mirror/set@{r}",)), hub).fingerprint() for r in ("v1", "v2", "v1")]
    assert prints[0] == prints[2] != prints[1]


# --- the real hub's adapter, without a network -----------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An offline hub cache with one data set, laid out as `huggingface_hub` does."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "datasets--mirror--set"
    local(repo, "blobs/abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("c0ffee")
    link = repo / "snapshots" / "c0ffee" / SHARDS[0]
    link.parent.mkdir(parents=True)
    link.symlink_to(os.path.relpath(repo / "blobs" / "abc", link.parent))
    return repo


def test_offline_uses_what_is_in_the_cache_and_says_so(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        source = resolve(DataConfig(sources=("other/set", "mirror/set")))
    assert ([f.name for f in source.files], source.revision) == ([SHARDS[0]], "c0ffee")
    assert "offline (HF_HUB_OFFLINE), so only the 1 shards in the cache" in caplog.text
    assert "nothing of it is in the cache" in dict(source.tried)["other/set"]
    with pytest.raises(DataError, match=r"offline .* of what is in the cache, no shards of split 'test'"):
        resolve(DataConfig(sources=("mirror/set",), split="test"))


def test_deleting_from_the_cache_removes_the_link_and_its_blob(cache: Path) -> None:
    link = cache / "snapshots" / "c0ffee" / SHARDS[0]
    HuggingFaceHub().delete(link)
    assert not link.is_symlink()
    assert not (cache / "blobs" / "abc").exists()


def response_error(kind: str) -> Exception:
    cls: Any = getattr(errors, kind)
    try:
        import httpx2 as http
    except ImportError:
        import httpx as http  # type: ignore[no-redef]
    request = http.Request("GET", "https://hub.invalid")
    return cls("no\nmore", response=http.Response(404, request=request))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("error", "reason", "passing"),
    [
        ("RepositoryNotFoundError", "not on the hub (404)", False),
        ("GatedRepoError", "gated: accept its terms", False),
        ("RevisionNotFoundError", "no such revision", False),
        ("HfHubHTTPError", "the hub cannot be reached (no)", True),
        (ConnectionError("no route"), "the hub cannot be reached (no route)", True),
        (errors.HFValidationError("x"), "is not a data set id", False),
    ],
)
def test_what_the_hub_says_becomes_a_short_reason(
    monkeypatch: pytest.MonkeyPatch, error: str | Exception, reason: str, passing: bool
) -> None:
    raised = response_error(error) if isinstance(error, str) else error

    def refuse(*args: object, **kwargs: object) -> None:
        raise raised

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(HubError) as caught:
        HuggingFaceHub().list_files("a/b", None)
    assert reason in str(caught.value)
    assert caught.value.passing is passing


def test_listing_gives_commit_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [{"rfilename": "data/a.parquet", "size": 12}, {"rfilename": "README.md", "size": None}]
    info = huggingface_hub.hf_api.DatasetInfo(id="a/b", sha="c0ffee", siblings=files, gated=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: info)
    assert HuggingFaceHub().list_files("a/b", None) == Listing("c0ffee", {"data/a.parquet": 12, "README.md": 0})
