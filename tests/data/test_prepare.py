"""From the data section to a finished cache: which source, how many pairs, what is refused, what a kill leaves."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from diffalign.config import ModelConfig, RunConfig
from diffalign.data import encode
from diffalign.data import prepare as module
from diffalign.data import source as sources
from diffalign.data.cache import CacheBuilder, LatentCache
from diffalign.data.hub import HubError, Listing
from diffalign.data.loader import PairData
from diffalign.data.pipeline import iterate
from diffalign.data.prepare import merged, prepare
from diffalign.data.record import Record
from diffalign.data.report import DataReport
from diffalign.data.source import resolve
from diffalign.errors import DataError
from diffalign.families import ENCODERS, DenoisingFamily, load_family

TinyConfig = Callable[..., RunConfig]
FILE = "data/train-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def family(tiny_folder: Path) -> DenoisingFamily:
    return load_family(ModelConfig(family="sdxl", pretrained=str(tiny_folder)))


@pytest.fixture(autouse=True)
def _encoders(family: DenoisingFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    family.load(ENCODERS)
    monkeypatch.setattr(family, "unload", lambda *parts: None)


def run(config: RunConfig, family: DenoisingFamily) -> PairData:
    return prepare(config, family, Accelerator(cpu=True)).data


def png(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), (shade % 256, shade // 256, 50)).save(out, "PNG")
    return out.getvalue()


def rows(folder: Path, good: str, prompts: int = 1000) -> str:
    """A parquet file with one row per letter of `good`; those that are not "+" have a broken image."""
    table = [
        {
            "caption": f"prompt {i % prompts}",
            "jpg_0": png(2 * i) if letter == "+" else b"no image %d" % i,
            "jpg_1": png(2 * i + 1),
            "label_0": float(i % 2),
            "label_1": float(1 - i % 2),
        }
        for i, letter in enumerate(good)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(table), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def partial(config: RunConfig) -> None:
    """As a kill before the end leaves it."""
    path = config.cache_dir / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pairs": None}))


class FolderHub:
    """Data sets that lie in folders, each with the commit that it has now."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.commits: dict[str, str] = {}
        self.asked = 0

    def add(self, repo: str, commit: str, parquet: Path) -> None:
        target = self.root / repo / commit / FILE
        target.parent.mkdir(parents=True)
        shutil.copy(parquet, target)
        self.commits[repo] = commit

    def list_files(self, repo: str, revision: str | None) -> Listing:
        self.asked += 1
        if repo not in self.commits:
            raise HubError("not on the hub (404)")
        commit = revision or self.commits[repo]
        return Listing(commit, {FILE: (self.root / repo / commit / FILE).stat().st_size})

    def cached(self, repo: str, file: str, commit: str) -> Path | None:
        return self.root / repo / commit / file

    def download(self, repo: str, file: str, commit: str) -> Path:
        return self.root / repo / commit / file

    def folder(self) -> Path:
        return self.root

    def delete(self, path: Path) -> None:
        raise AssertionError("nothing was downloaded")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair_parquet: Path) -> FolderHub:
    """`owner/a` at commit `aaaa1111`, and `owner/b`."""
    found = FolderHub(tmp_path / "hub")
    found.add("owner/a", "aaaa1111", next(pair_parquet.glob("*.parquet")))
    found.add("owner/b", "bbbb1111", Path(rows(tmp_path / "b", "+" * 5)))
    monkeypatch.setattr(sources, "HuggingFaceHub", lambda: found)
    return found


# --- which source ----------------------------------------------------------------------------------------------------


def test_an_empty_folder_is_passed_over_at_every_start(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, pair_parquet: Path
) -> None:
    (tmp_path / "empty").mkdir()
    config = tiny_config(tmp_path, data={"sources": [str(tmp_path / "empty"), str(pair_parquet)]})
    assert len(run(config, family)) == 10
    assert len(run(config, family)) == 10


def test_a_cache_from_the_hub_is_not_compared_with_local_files(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, hub: FolderHub
) -> None:
    local = rows(tmp_path / "local", "+++")
    for order in (["owner/a", local], [local, "owner/a"]):
        run(tiny_config(tmp_path, data={"sources": ["owner/a"]}), family)
        hub.asked = 0
        assert len(run(tiny_config(tmp_path, data={"sources": order}), family)) == 10
        assert hub.asked == 0


@pytest.mark.parametrize("spec", ["owner/a", "owner/a@aaaa1111", "owner/a@aaaa111"])
def test_a_complete_cache_goes_with_its_data_set(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, hub: FolderHub, spec: str
) -> None:
    run(tiny_config(tmp_path, data={"sources": ["owner/a"]}), family)
    hub.asked = 0
    assert len(run(tiny_config(tmp_path, data={"sources": [spec]}), family)) == 10
    assert hub.asked == 0


@pytest.mark.parametrize("spec", ["owner/b", "owner/a@cccc2222", "local"])
def test_a_complete_cache_of_another_source_is_refused(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, hub: FolderHub, spec: str
) -> None:
    run(tiny_config(tmp_path, data={"sources": ["owner/a"]}), family)
    spec = rows(tmp_path / "local", "+++") if spec == "local" else spec
    message = r"is stale: it was made from the hub data set owner/a at aaaa1111, which is not in data\.sources\. Delete"
    with pytest.raises(DataError, match=message):
        run(tiny_config(tmp_path, data={"sources": [spec]}), family)


def test_a_complete_cache_of_local_files_is_refused_for_the_hub(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, hub: FolderHub
) -> None:
    local = Path(rows(tmp_path / "local", "+++"))
    run(tiny_config(tmp_path, data={"sources": [str(local)]}), family)
    with pytest.raises(DataError, match=r"made from the local file .*rows\.parquet .*not in data\.sources"):
        run(tiny_config(tmp_path, data={"sources": ["owner/a"]}), family)
    local.unlink()  # to save the space, say
    assert len(run(tiny_config(tmp_path, data={"sources": [str(local)]}), family)) == 3


def test_a_partial_cache_does_not_go_on_from_another_source(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, hub: FolderHub, pair_parquet: Path
) -> None:
    config = tiny_config(tmp_path, data={"sources": ["owner/a"]})
    run(config, family)
    partial(config)
    before = (config.cache_dir / "manifest.json").read_text()
    begun = r"was begun from the hub data set owner/a at aaaa1111 and would go on from "
    advice = r".*set data\.sources=\[owner/a@aaaa1111\]; or delete the cache, or name another cache\.dir"
    for spec, other in (("owner/b", "the hub data set owner/b at bbbb1111"), (str(pair_parquet), "the local folder ")):
        with pytest.raises(DataError, match=begun + other + advice):
            run(tiny_config(tmp_path, data={"sources": [spec]}), family)
    hub.add("owner/a", "aaaa2222", next(pair_parquet.glob("*.parquet")))
    with pytest.raises(DataError, match=begun + "the hub data set owner/a at aaaa2222" + advice):
        run(config, family)
    assert (config.cache_dir / "manifest.json").read_text() == before
    assert len(run(tiny_config(tmp_path, data={"sources": ["owner/a@aaaa1111"]}), family)) == 10


def test_a_partial_cache_goes_on_from_moved_files_only(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily
) -> None:
    config = tiny_config(tmp_path, data={"sources": [rows(tmp_path / "one", "+++")]})
    run(config, family)
    partial(config)
    (tmp_path / "one").rename(tmp_path / "two")
    moved = tiny_config(tmp_path, data={"sources": [str(tmp_path / "two" / "rows.parquet")]})
    assert len(run(moved, family)) == 3
    partial(config)
    rows(tmp_path / "two", "++++")
    with pytest.raises(DataError, match=r"begun from the local file .* with the files as they were; or delete"):
        run(moved, family)


# --- how many --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("workers", [1, 3])
def test_max_pairs_counts_pairs_that_can_be_used(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, enabled: bool, workers: int
) -> None:
    source = rows(tmp_path, "+-+-+-+-+-+-" + "+" * 20)
    config = tiny_config(
        tmp_path, data={"sources": [source], "max_pairs": 12}, cache={"enabled": enabled, "workers": workers}
    )
    found = prepare(config, family, Accelerator(cpu=True))
    assert found.data.prompts == [f"prompt {i}" for i in [0, 2, 4, 6, 8, 10, 12, 13, 14, 15, 16, 17]]
    assert (found.report.rows, found.report.kept, dict(found.report.skipped)) == (18, 12, {"undecodable": 6})


def test_max_pairs_after_a_kill(tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily) -> None:
    source = rows(tmp_path, "+-+-+-+-+-+-" + "+" * 20)
    config = tiny_config(tmp_path, data={"sources": [source], "max_pairs": 9})
    first = prepare(config, family, Accelerator(cpu=True))
    (config.cache_dir / "pairs-r0-00001.parquet").unlink()
    again = prepare(config, family, Accelerator(cpu=True))
    assert again.data.prompts == first.data.prompts
    assert again.report.to_dict() == first.report.to_dict()


def test_several_processes_take_their_shares(tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily) -> None:
    source = rows(tmp_path, "+" * 3 + "-+" * 4 + "+" * 20)
    config = tiny_config(tmp_path, data={"sources": [source], "max_pairs": 7})
    parts = []
    for rank in (0, 1):
        reading, encoding = DataReport(), DataReport()
        records = iterate(tiny_config(tmp_path, data={"sources": [source]}).data, resolve(config.data), reading)
        CacheBuilder(config.cache_dir, config, family, rank=rank, world=2).build(records, encoding)
        parts.append((reading, encoding))
    cache = LatentCache(config.cache_dir)
    assert cache.prompts == [f"prompt {i}" for i in [0, 1, 2, 4, 6, 11, 13]]  # four even rows, three odd ones
    report = merged(parts, len(cache))
    assert dict(report.skipped) == {"undecodable": 4, "beyond_max_pairs": 3}
    assert (report.rows, report.kept, report.unusable) == (14, 7, 4)


@pytest.mark.parametrize("enabled", [True, False])
def test_mostly_undecodable_images_stop_the_run(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, enabled: bool
) -> None:
    source = rows(tmp_path, "---+---+--" * 2)
    config = tiny_config(tmp_path, data={"sources": [source]}, cache={"enabled": enabled})
    with pytest.raises(
        DataError, match=r"1[46] of 20 rows are unusable, more than data\.max_unusable=0\.5 allows.*not an"
    ):
        run(config, family)
    config = tiny_config(tmp_path, data={"sources": [source], "max_unusable": 0.9}, cache={"enabled": enabled})
    assert len(run(config, family)) == 4


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_images_are_encoded_as_soon_as_a_batch_is_there(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    source = rows(tmp_path, "+" * 60)
    config = tiny_config(
        tmp_path, data={"sources": [source]}, cache={"shard_size": 100, "batch_size": 4, "workers": workers}
    )
    prepared, held, dtypes = [0], [], set()
    call, encode_images = encode.Preparer.__call__, family.encode_images

    def counted(self: encode.Preparer, record: Record) -> encode.PreparedPair | encode.Unusable:
        done = call(self, record)
        assert isinstance(done, encode.PreparedPair)
        prepared[0] += 2
        dtypes.add(done.images[0].pixels.dtype)
        return done

    def watched(pixels: Tensor) -> Tensor:
        prepared[0] -= len(pixels)
        held.append(prepared[0])
        return encode_images(pixels)

    monkeypatch.setattr(encode.Preparer, "__call__", counted)
    monkeypatch.setattr(family, "encode_images", watched)
    assert len(run(config, family)) == 60
    assert len(held) == 30
    assert max(held) <= 2 * 4 * workers + 4
    assert dtypes == {torch.uint8}


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", [2, 6])
def test_prompts_outlive_a_kill_and_another_shard_size(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, monkeypatch: pytest.MonkeyPatch, shard_size: int
) -> None:
    source = rows(tmp_path, "+" * 12)
    data = {"sources": [source]}
    with monkeypatch.context() as patch:
        replace = os.replace

        def killed(temporary: Path, final: Path) -> None:
            if final.name == "pairs-r0-00001.parquet":
                raise KeyboardInterrupt
            replace(temporary, final)

        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_config(tmp_path, data=data), family)
    config = tiny_config(tmp_path, data=data, cache={"shard_size": shard_size})
    orphan = config.cache_dir / "prompts-r0-00001.safetensors"
    before = orphan.read_bytes()
    found = run(config, family)
    assert orphan.read_bytes() == before
    whole = run(tiny_config(tmp_path / "whole", data=data), family)
    for prompt in ("", *whole.prompts):
        for name, value in whole.text(prompt).items():
            torch.testing.assert_close(found.text(prompt)[name], value, atol=1e-5, rtol=0)


def test_prompts_that_vanish_during_the_build_are_noticed(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, data={"sources": [rows(tmp_path, "+" * 6)]})
    victim = config.cache_dir / "prompts-r0-00001.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(family, "unload", lambda *parts: victim.unlink())
        with pytest.raises(DataError, match=r"2 prompts have no embedding, such as 'prompt 4'.*Start again"):
            run(config, family)
    assert run(config, family).text("prompt 4")


# --- overflow --------------------------------------------------------------------------------------------------------


def overflow(
    family: DenoisingFamily, monkeypatch: pytest.MonkeyPatch, odd: Callable[[int], bool], value: float
) -> None:
    """A VAE that fails on images by their number (see `rows`)."""
    encode_images = family.encode_images

    def wrong(pixels: Tensor) -> Tensor:
        latents = encode_images(pixels)
        for latent, image in zip(latents, pixels, strict=True):
            if odd(round(float((image[0, 0, 0] + 1) * 127.5))):
                latent[0, 1, 1] = value
        return latents

    monkeypatch.setattr(family, "encode_images", wrong)


@pytest.mark.parametrize(("dtype", "value"), [("float32", float("nan")), ("float32", float("inf")), ("float16", 1e5)])
def test_latents_that_are_not_finite_are_left_out_and_replaced(
    tiny_config: TinyConfig,
    tmp_path: Path,
    family: DenoisingFamily,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    value: float,
) -> None:
    overflow(family, monkeypatch, lambda number: number in (3, 8, 20), value)  # of the rows 1, 4 and 10
    config = tiny_config(
        tmp_path, data={"sources": [rows(tmp_path, "+" * 20)], "max_pairs": 10}, cache={"dtype": dtype}
    )
    found = prepare(config, family, Accelerator(cpu=True))
    assert found.data.prompts == [f"prompt {i}" for i in [0, 2, 3, 5, 6, 7, 8, 9, 11, 12]]
    assert dict(found.report.skipped) == {"non_finite_latents": 3}
    assert (found.report.kept, found.report.unusable) == (10, 3)
    detail = found.report.listed["non_finite_latents"][0]["detail"]
    assert "cache.encode_dtype=float32" in detail
    assert "model.vae" in detail
    for i in range(10):
        assert all(latent.isfinite().all() for latent in found.data.pair(i).latents)


def test_a_vae_that_overflows_is_found_early(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def most(number: int) -> bool:
        calls.append(number)
        return number % 4 != 0

    overflow(family, monkeypatch, most, float("nan"))
    for n, images in ((3, 6), (100, 64)):
        calls.clear()
        config = tiny_config(tmp_path / str(n), data={"sources": [rows(tmp_path / str(n), "+" * n)]})
        overflow_at_all = r"of \d+ pairs have latents that are not finite; the VAE computes in float32: set cache\.enc"
        monkeypatch.setattr(module, "check_usable", lambda *a: None)
        with pytest.raises(DataError, match=overflow_at_all):
            run(config, family)
        assert len(calls) == images


def test_the_uncached_path_names_the_record(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow(family, monkeypatch, lambda number: number == 3, float("inf"))
    data = run(tiny_config(tmp_path, data={"sources": [rows(tmp_path, "+++")]}, cache={"enabled": False}), family)
    data.pair(0)
    with pytest.raises(DataError, match=r"record .*: its latents are not finite; .*model\.vae"):
        data.pair(1)


# --- leftovers -------------------------------------------------------------------------------------------------------


def test_files_of_a_living_process_stay(tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily) -> None:
    config = tiny_config(tmp_path, data={"sources": [rows(tmp_path, "+++")]})
    config.cache_dir.mkdir()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    alive, dead, other = (config.cache_dir / f".tmp-images-r0-00000-{x}" for x in (os.getppid(), gone.pid, "x"))
    for path in (alive, dead, other):
        path.write_bytes(b"half")
    run(config, family)
    assert alive.exists()
    assert not dead.exists()
    assert not other.exists()
