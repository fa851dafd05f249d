"""The cache holds what the uncached path computes, survives a kill, and is refused when it is stale or damaged."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from diffalign.config import ModelConfig, RunConfig
from diffalign.data import cache as caches
from diffalign.data.cache import CacheBuilder, LatentCache
from diffalign.data.encode import LivePairs, Preparer
from diffalign.data.loader import PairData
from diffalign.data.pipeline import iterate
from diffalign.data.prepare import prepare
from diffalign.data.report import DataReport
from diffalign.data.source import resolve
from diffalign.errors import DataError
from diffalign.families import ENCODERS, DenoisingFamily, load_family

TinyConfig = Callable[..., RunConfig]
PAIRS = 10  # of the shared data, without ties
SHARDS = 3  # of four pairs each


@pytest.fixture(scope="module")
def family(tiny_folder: Path) -> DenoisingFamily:
    return load_family(ModelConfig(family="sdxl", pretrained=str(tiny_folder)))


@pytest.fixture(autouse=True)
def _encoders(family: DenoisingFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the same encoders again and again would take most of the time here."""
    family.load(ENCODERS)
    monkeypatch.setattr(family, "unload", lambda *parts: None)


class Calls:
    """What a family was asked to encode."""

    def __init__(self, family: DenoisingFamily, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompts: list[str] = []
        self.images = 0
        encode_prompts, encode_images = family.encode_prompts, family.encode_images

        def counted_prompts(prompts: list[str]) -> dict[str, Tensor]:
            self.prompts += prompts
            return encode_prompts(prompts)

        def counted_images(pixels: Tensor) -> Tensor:
            self.images += len(pixels)
            return encode_images(pixels)

        monkeypatch.setattr(family, "encode_prompts", counted_prompts)
        monkeypatch.setattr(family, "encode_images", counted_images)


@pytest.fixture
def calls(family: DenoisingFamily, monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(family, monkeypatch)


def build(config: RunConfig, family: DenoisingFamily, rank: int = 0, world: int = 1) -> DataReport:
    """Build one process's share; the report of what was encoded."""
    report = DataReport()
    records = iterate(config.data, resolve(config.data), DataReport())
    CacheBuilder(config.cache_dir, config, family, rank=rank, world=world).build(records, report)
    return report


def run(config: RunConfig, family: DenoisingFamily) -> LatentCache:
    """The way of a real run."""
    data = prepare(config, family, Accelerator(cpu=True)).data
    assert isinstance(data, LatentCache)
    return data


def same(a: PairData, b: PairData, atol: float = 0.0) -> None:
    """Equal pairs in equal order: to the bit, or up to `atol` where they were encoded in batches of other sizes."""
    assert len(a) == len(b)
    assert a.prompts == b.prompts
    assert a.target_sizes == b.target_sizes
    for i, prompt in enumerate(a.prompts):
        one, two = a.pair(i), b.pair(i)
        assert dataclasses.replace(one, latents=()) == dataclasses.replace(two, latents=())  # type: ignore[arg-type]
        for x, y in zip(one.latents, two.latents, strict=True):
            torch.testing.assert_close(x, y, atol=atol, rtol=0)
        for text in (prompt, ""):
            assert a.text(text).keys() == b.text(text).keys()
            for name, value in a.text(text).items():
                torch.testing.assert_close(value, b.text(text)[name], atol=atol, rtol=0)


def names(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


# --- content ---------------------------------------------------------------------------------------------------------


def test_the_cache_holds_what_the_uncached_path_computes(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily
) -> None:
    config = tiny_config(tmp_path, data={"ties": "soft"})
    build(config, family)
    records = iterate(config.data, resolve(config.data), DataReport())
    preparer = Preparer(config.data, config.seed, family.resolution_step)
    live = LivePairs(records, preparer, family, DataReport())
    cached = LatentCache(config.cache_dir)
    assert len(cached) == PAIRS + 1
    assert sorted({cached.pair(i).p for i in range(len(cached))}) == [0.0, 0.5, 1.0]
    same(cached, live, atol=1e-5)


def test_latents_are_those_of_the_image_and_the_labels_those_of_the_row(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, pair_parquet: Path
) -> None:
    config = tiny_config(tmp_path)
    build(config, family)
    cached = LatentCache(config.cache_dir)
    rows = pq.read_table(pair_parquet).to_pylist()
    for index, row in ((0, rows[0]), (1, rows[1]), (3, rows[4])):
        pair = cached.pair(index)
        assert (pair.prompt, pair.p, pair.user) == (row["caption"], row["label_0"], str(row["user_id"]))
        for side in (0, 1):
            pixels = torch.tensor(list(Image.open(io.BytesIO(row[f"jpg_{side}"])).convert("RGB").tobytes()))
            pixels = pixels.view(1, 32, 32, 3).movedim(3, 1) / 127.5 - 1
            torch.testing.assert_close(pair.latents[side], family.encode_images(pixels)[0], atol=1e-5, rtol=0)


def test_the_storage_type_is_the_configured_one(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily
) -> None:
    config = tiny_config(tmp_path, cache={"dtype": "float16"})
    build(config, family)
    exact = tiny_config(tmp_path / "exact")
    build(exact, family)
    half, full = LatentCache(config.cache_dir), LatentCache(exact.cache_dir)
    assert half.pair(0).latents[0].dtype == torch.float16
    assert torch.equal(half.pair(0).latents[0], full.pair(0).latents[0].half())
    assert torch.equal(half.text("")["text_embeds"], full.text("")["text_embeds"].half())


def test_each_distinct_prompt_is_encoded_once(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, calls: Calls
) -> None:
    config = tiny_config(tmp_path)
    build(config, family)
    cached = LatentCache(config.cache_dir)
    assert len(names(config.cache_dir, "pairs-*")) == SHARDS
    assert len(set(cached.prompts)) < len(cached.prompts)
    assert sorted(calls.prompts) == sorted({"", *cached.prompts})


def test_an_image_that_a_shard_holds_twice_is_encoded_once(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, calls: Calls
) -> None:
    config = tiny_config(tmp_path, cache={"shard_size": 100})
    build(config, family)
    rows = pq.read_table(next(config.cache_dir.glob("pairs-*.parquet"))).column("image_keys").to_pylist()
    distinct = {key for keys in rows for key in keys}
    assert calls.images == len(distinct) < 2 * len(rows)
    cached = LatentCache(config.cache_dir)
    assert torch.equal(cached.pair(0).latents[0], cached.pair(1).latents[0])


def test_a_prompt_that_is_cut_off_is_counted(tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily) -> None:
    report = build(tiny_config(tmp_path), family)
    assert report.notes["truncated_prompt"] == 2
    assert "the encoder takes 20" in report.listed["truncated_prompt"][0]["detail"]
    config = tiny_config(tmp_path / "live", cache={"enabled": False})
    assert prepare(config, family, Accelerator(cpu=True)).report.notes["truncated_prompt"] == 2


def test_the_report_accounts_for_every_row(tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily) -> None:
    config = tiny_config(tmp_path)
    report = prepare(config, family, Accelerator(cpu=True)).report
    assert (report.rows, report.kept) == (13, PAIRS)
    assert dict(report.skipped) == {"tie": 1, "unlabelled": 1, "undecodable": 1}
    assert DataReport.load(config.cache_dir / "data_report.json").to_dict() == report.to_dict()


def test_pairs_of_one_bucket_share_a_size(tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily) -> None:
    def png(height: int, width: int, shade: int) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", (width, height), (shade, 0, 0)).save(out, "PNG")
        return out.getvalue()

    shapes = [((32, 32), (32, 32)), ((64, 32), (64, 32)), ((32, 64), (32, 64)), ((64, 40), (60, 32))]
    rows = [
        {"caption": f"p{i}", "jpg_0": png(*a, i), "jpg_1": png(*b, 100 + i), "label_0": i % 2, "label_1": 1 - i % 2}
        for i, (a, b) in enumerate(shapes)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    config = tiny_config(tmp_path, data={"sources": [str(tmp_path / "train.parquet")], "buckets": True})
    build(config, family)
    cached = LatentCache(config.cache_dir)
    sizes = cached.target_sizes
    assert sizes[0] == (32, 32)
    assert sizes[1][0] > sizes[1][1]
    assert sizes[2] == sizes[1][::-1]
    for i, size in enumerate(sizes):
        pair = cached.pair(i)
        assert pair.target_size == size
        assert pair.original_sizes == shapes[i]
        assert {tuple(latent.shape) for latent in pair.latents} == {(20, size[0] // 4, size[1] // 4)}


# --- interruptions and processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["images", "prompts", "pairs"])
def test_a_killed_build_goes_on_to_the_same_cache(
    tiny_config: TinyConfig,
    tmp_path: Path,
    family: DenoisingFamily,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    calls: Calls,
) -> None:
    whole, config = tiny_config(tmp_path / "whole"), tiny_config(tmp_path / "killed")
    expected = build(whole, family)
    replace = caches.os.replace
    with monkeypatch.context() as patch:

        def killed(temporary: Path, final: Path) -> None:
            # In the second shard, with its file written but not in place. Its third prompt is in the third shard.
            if final.name.startswith(step) and "r0-00001" in final.name:
                raise KeyboardInterrupt
            replace(temporary, final)

        patch.setattr(caches.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            build(config, family)
    done = pq.read_table(config.cache_dir / "pairs-r0-00000.parquet").num_rows
    assert names(config.cache_dir, "pairs-*") == ["pairs-r0-00000.parquet"]
    calls.images = 0
    report = build(config, family)
    same(LatentCache(whole.cache_dir), LatentCache(config.cache_dir))
    assert calls.images < 2 * (PAIRS - done) + 1
    assert report.notes == expected.notes  # what the first attempt had encoded is accounted for as well
    assert report.skipped == expected.skipped


def test_two_processes_build_what_one_builds(tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily) -> None:
    one, two = tiny_config(tmp_path / "one"), tiny_config(tmp_path / "two", cache={"shard_size": 2})
    expected = build(one, family)
    # The second first: nothing may depend on which of them is ahead.
    report = build(two, family, rank=1, world=2)
    report.merge(build(two, family, rank=0, world=2))
    assert {name[:8] for name in names(two.cache_dir, "pairs-*")} == {"pairs-r0", "pairs-r1"}
    same(LatentCache(one.cache_dir), LatentCache(two.cache_dir), atol=1e-5)
    assert report.notes == expected.notes


def test_another_number_of_processes_may_finish(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily
) -> None:
    one, other = tiny_config(tmp_path / "one"), tiny_config(tmp_path / "other")
    build(one, family)
    build(other, family, rank=0, world=2)
    build(other, family)
    same(LatentCache(one.cache_dir), LatentCache(other.cache_dir), atol=1e-5)


def test_a_complete_cache_needs_no_encoder(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path)
    first = run(config, family)

    def never(*parts: str) -> None:
        raise AssertionError(f"loaded {parts}")

    monkeypatch.setattr(family, "load", never)
    same(first, run(config, family))


def test_the_encoders_leave_memory(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    run(tiny_config(tmp_path), family)
    with pytest.raises(RuntimeError, match="vae is not in memory"):
        family.latent_shape(32, 32)


def test_no_space_keeps_what_is_there(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, config = tiny_config(tmp_path / "whole"), tiny_config(tmp_path / "full")
    build(whole, family)
    left = iter([10**12, 1000])
    with monkeypatch.context() as patch:
        patch.setattr(caches, "free_bytes", lambda path: next(left))
        with pytest.raises(DataError, match=r"no space left for the next shard .* data\.max_pairs.* is kept"):
            build(config, family)
    assert names(config.cache_dir, "pairs-*") == ["pairs-r0-00000.parquet"]
    build(config, family)
    same(LatentCache(whole.cache_dir), LatentCache(config.cache_dir))


# --- stale -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"resolution": 16}}, r"data\.resolution was 32, is 16"),
        ({"data": {"ties": "soft"}}, r"data\.ties was 'drop', is 'soft'"),
        ({"cache": {"dtype": "float16"}}, r"cache\.dtype was 'float32', is 'float16'"),
        ({"data": {"exclude_prompts": ["world_heldout"]}}, r"data\.exclude_prompts was \[\], is \['world_heldout'\]"),
    ],
)
def test_other_settings_are_refused_by_name(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, changes: dict[str, Any], message: str
) -> None:
    run(tiny_config(tmp_path), family)
    with pytest.raises(DataError, match=rf"cache .* is stale: .*{message}.*Delete it, or name another cache\.dir"):
        run(tiny_config(tmp_path, **changes), family)


def test_what_does_not_change_the_contents_is_not_compared(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, calls: Calls
) -> None:
    run(tiny_config(tmp_path), family)
    calls.images = 0
    run(
        tiny_config(tmp_path, seed=5, data={"max_unusable": 0.9}, cache={"batch_size": 2}, training={"threads": 1}),
        family,
    )
    assert calls.images == 0
    # A seed that draws crops does.
    cropped = tiny_config(tmp_path / "b", data={"crop": "random"})
    run(cropped, family)
    with pytest.raises(DataError, match="seed was 0, is 5"):
        run(dataclasses.replace(cropped, seed=5), family)


def test_other_encoders_are_refused(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, tiny_folder: Path
) -> None:
    run(tiny_config(tmp_path), family)
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    weights = other / "text_encoder_2" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    config = tiny_config(tmp_path, model={"pretrained": str(other)})
    with pytest.raises(DataError, match=r"encoders\.text_encoder_2/model\.safetensors was "):
        run(config, load_family(config.model))
    with pytest.raises(DataError, match=r"encoders\.text_dtype was 'float32', is 'bfloat16'"):
        run(tiny_config(tmp_path), load_family(tiny_config(tmp_path).model, dtype=torch.bfloat16))


def test_a_filter_that_was_edited_is_another_filter(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily
) -> None:
    file = tmp_path / "rules.py"
    file.write_text("def keep(record):\n    return True\n")
    config = tiny_config(tmp_path, data={"filter": f"{file}:keep"})
    run(config, family)
    file.write_text("def keep(record):\n    return record.p == 1\n")
    with pytest.raises(DataError, match=r"data\.filter_file was "):
        run(config, family)


def test_other_source_files_are_refused(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, pair_parquet: Path
) -> None:
    folder = shutil.copytree(pair_parquet, tmp_path / "pairs")
    config = tiny_config(tmp_path / "run", data={"sources": [str(folder)]})
    first = run(config, family)
    # The same files elsewhere are the same data.
    moved = shutil.copytree(folder, tmp_path / "moved")
    same(first, run(tiny_config(tmp_path / "run", data={"sources": [str(moved)]}), family))
    table = pq.read_table(folder)
    pq.write_table(table.slice(0, 9), next(folder.glob("*.parquet")))
    with pytest.raises(DataError, match=r"is stale: the source's files have changed\. Delete it"):
        run(config, family)


def test_an_unreadable_manifest(tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily) -> None:
    config = tiny_config(tmp_path)
    run(config, family)
    (config.cache_dir / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json is not readable; delete the folder"):
        run(config, family)


# --- damage ----------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("shard", [0, 1, 2])
@pytest.mark.parametrize("damage", [cut, remove])
def test_a_damaged_shard_of_images_is_named_and_made_again_alone(
    tiny_config: TinyConfig,
    tmp_path: Path,
    family: DenoisingFamily,
    calls: Calls,
    shard: int,
    damage: Callable[[Path], None],
) -> None:
    whole, config = tiny_config(tmp_path / "whole"), tiny_config(tmp_path / "damaged")
    expected = run(whole, family)
    run(config, family)
    damage(config.cache_dir / f"images-r0-0000{shard}.safetensors")
    with pytest.raises(
        DataError, match=rf"images-r0-0000{shard}\.safetensors is missing or corrupt .*delete pairs"
    ) as error:
        run(config, family)
    told = next(word for word in str(error.value).split() if word.startswith("pairs-"))
    others = {p: p.stat().st_mtime_ns for p in config.cache_dir.glob("images-*") if f"0000{shard}" not in p.name}
    (config.cache_dir / told).unlink()
    calls.images, calls.prompts = 0, []
    same(run(config, family), expected)
    assert calls.images <= 2 * 4
    assert calls.prompts == []
    assert all(path.stat().st_mtime_ns == before for path, before in others.items())


def test_a_damaged_table_is_named_and_made_again(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily
) -> None:
    whole, config = tiny_config(tmp_path / "whole"), tiny_config(tmp_path / "damaged")
    expected = run(whole, family)
    run(config, family)
    table = config.cache_dir / "pairs-r0-00001.parquet"
    cut(table)
    with pytest.raises(DataError, match=r"pairs-r0-00001\.parquet is corrupt .*delete this file"):
        run(config, family)
    table.unlink()
    same(run(config, family), expected)


def test_damaged_prompts_are_named_and_made_again_alone(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, calls: Calls
) -> None:
    whole, config = tiny_config(tmp_path / "whole"), tiny_config(tmp_path / "damaged")
    expected = run(whole, family)
    run(config, family)
    # Prompts of the first shard that later shards use as well.
    prompts = config.cache_dir / "prompts-r0-00000.safetensors"
    cut(prompts)
    with pytest.raises(DataError, match=r"prompts-r0-00000\.safetensors is corrupt; delete this file"):
        run(config, family)
    prompts.unlink()
    calls.images, calls.prompts = 0, []
    same(run(config, family), expected)
    assert calls.images == 0
    assert 0 < len(calls.prompts) < len(set(expected.prompts))


def test_a_lost_manifest_entry_is_built_from_what_is_there(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, calls: Calls
) -> None:
    config = tiny_config(tmp_path)
    run(config, family)
    path = config.cache_dir / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pairs": None}))  # as a kill before the end leaves it
    calls.images = 0
    assert len(run(config, family)) == PAIRS
    assert calls.images == 0


# --- nothing left ----------------------------------------------------------------------------------------------------


def bad_rows(folder: Path, n: int) -> str:
    rows = [
        {"caption": f"p{i}", "jpg_0": b"no image", "jpg_1": bytes([i]), "label_0": 1.0, "label_1": 0.0}
        for i in range(n)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "bad.parquet")
    return str(folder / "bad.parquet")


@pytest.mark.parametrize("enabled", [True, False])
def test_a_set_of_which_nothing_can_be_used(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, enabled: bool
) -> None:
    source = bad_rows(tmp_path, 3)
    config = tiny_config(tmp_path, data={"sources": [source], "max_unusable": 1.0}, cache={"enabled": enabled})
    with pytest.raises(DataError, match=r"no usable pair is left: 3 rows read, 0 kept, 3 undecodable.*not an image"):
        prepare(config, family, Accelerator(cpu=True))


def test_a_filter_that_takes_everything(tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily) -> None:
    (tmp_path / "rules.py").write_text("def keep(record):\n    return False\n")
    config = tiny_config(tmp_path, data={"filter": f"{tmp_path / 'rules.py'}:keep"})
    with pytest.raises(DataError, match=r"no pairs left\. 13 rows read, 0 kept, 11 filtered"):
        run(config, family)


def test_missing_columns_are_found_before_the_encoders_load(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.Table.from_pylist([{"text": "x", "jpg_0": b""}]), tmp_path / "train.parquet")

    def never(*parts: str) -> None:
        raise AssertionError(f"loaded {parts}")

    for enabled in (True, False):
        config = tiny_config(tmp_path, data={"sources": [str(tmp_path / "train.parquet")]}, cache={"enabled": enabled})
        with monkeypatch.context() as patch:
            patch.setattr(family, "load", never)
            with pytest.raises(
                DataError, match="columns caption, jpg_1, label_0, label_1 are missing; found text, jpg_0"
            ):
                prepare(config, family, Accelerator(cpu=True))


# --- the uncached path -----------------------------------------------------------------------------------------------


def test_the_uncached_path_outlives_an_unload(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, cache={"enabled": False})
    data = prepare(config, family, Accelerator(cpu=True)).data
    before = data.pair(0)
    monkeypatch.undo()
    family.unload(ENCODERS)  # as the sampler does after it has encoded its prompts
    assert torch.equal(data.pair(0).latents[0], before.latents[0])
    assert data.text("another prompt")["text_embeds"].shape == (32,)


def test_handles_stay_in_their_process(tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily) -> None:
    import pickle

    config = tiny_config(tmp_path)
    build(config, family)
    cached = LatentCache(config.cache_dir)
    cached.pair(0)
    same(cached, pickle.loads(pickle.dumps(cached)))


def test_no_more_files_stay_open_than_allowed(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, cache={"shard_size": 1})
    build(config, family)
    monkeypatch.setattr(caches, "OPEN_FILES", 2)
    cached = LatentCache(config.cache_dir)
    order: Iterator[int] = iter([0, 5, 9, 0, 3, 3, 0])
    for i in order:
        cached.pair(i)
        assert len(cached._open) <= 2
