"""The demo's preference file: schema, labels, noise, reuse."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from diffalign.config import WorldPairsConfig
from diffalign.errors import ConfigError, UserError
from diffalign.world import pairs, taste
from diffalign.world.bases import build_untrained
from diffalign.world.scenes import Style, compose, draw, is_held_out, parse_caption
from diffalign.world.verifier import read

CONFIG = WorldPairsConfig(prompts=12, unlabelled=0.25, corrupt=2, num_inference_steps=2)


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    pipe = build_untrained((16, 32))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn_pairs(pipeline, captions: list[str], config: WorldPairsConfig, seed: int, batch_size: int = 0) -> Tensor:
    """Instead of samples: true drawings. The outlined one comes first for even prompts, second for odd ones."""
    scenes = []
    for i, caption in enumerate(captions):
        styles = [Style(outline=True), Style()]
        spec = parse_caption(caption)
        order = styles if i % 2 == 0 else styles[::-1]
        scenes += [compose(spec, random.Random(2 * i + j), style) for j, style in enumerate(order)]
    return draw(scenes)


def rows_of(info: pairs.PairsInfo) -> list[dict]:
    return pq.read_table(info.path).to_pylist()


def test_schema_is_that_of_pick_a_pic(pipeline, tmp_path: Path):
    info = pairs.make_pairs(CONFIG, tmp_path, 0, pipeline)
    assert {field.name: str(field.type) for field in pq.read_schema(info.path)} == {
        "are_different": "bool",
        "best_image_uid": "string",
        "caption": "string",
        "created_at": "timestamp[ns]",
        "has_label": "bool",
        "image_0_uid": "string",
        "image_1_uid": "string",
        "image_0_url": "string",
        "image_1_url": "string",
        "jpg_0": "binary",
        "jpg_1": "binary",
        "label_0": "double",
        "label_1": "double",
        "model_0": "string",
        "model_1": "string",
        "ranking_id": "int64",
        "user_id": "int64",
        "num_example_per_prompt": "int64",
        "__index_level_0__": "int64",
    }
    assert info.path.name == "train-00000-of-00001.parquet"
    assert [p.name for p in tmp_path.iterdir()] == [info.path.name]


def test_counts_are_those_of_the_file(tmp_path: Path, pipeline):
    info = pairs.make_pairs(CONFIG, tmp_path, 1, pipeline)
    rows = rows_of(info)
    undecodable = 0
    for row in rows:
        try:
            first, second = pairs.from_jpeg(row["jpg_0"]), pairs.from_jpeg(row["jpg_1"])
            assert first.shape == second.shape == (3, 32, 32)
        except (OSError, UnidentifiedImageError):
            undecodable += 1
    assert undecodable == info.corrupt == CONFIG.corrupt
    assert info.pairs == len(rows) == CONFIG.prompts
    assert sum(not row["has_label"] for row in rows) == info.unlabelled == 3
    assert sum(row["has_label"] and row["label_0"] == 0.5 for row in rows) == info.ties
    assert info.decided + info.ties + info.unlabelled == info.pairs
    assert all((row["label_0"] is None) is not row["has_label"] for row in rows)
    repeats = Counter(row["caption"] for row in rows)
    assert all(row["num_example_per_prompt"] == repeats[row["caption"]] for row in rows)
    assert not any(is_held_out(row["caption"]) for row in rows)
    assert len({uid for row in rows for uid in (row["image_0_uid"], row["image_1_uid"])}) == 2 * len(rows)


def test_the_liked_picture_gets_the_label_on_either_side(tmp_path: Path, pipeline, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pairs, "sample", drawn_pairs)
    info = pairs.make_pairs(replace(CONFIG, prompts=30, unlabelled=0, corrupt=0), tmp_path, 0, pipeline)
    assert info.decided == 30
    for i, row in enumerate(rows_of(info)):
        winner = i % 2  # the outlined one
        assert (row["label_0"], row["label_1"]) == ((1.0, 0.0), (0.0, 1.0))[winner]
        assert row["best_image_uid"] == row[f"image_{winner}_uid"]


def test_labels_follow_from_the_stored_bytes(tmp_path: Path, pipeline, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pairs, "sample", drawn_pairs)
    config = replace(CONFIG, prompts=30, corrupt=0, taste="leftward", margin=0.1)
    rows = rows_of(pairs.make_pairs(config, tmp_path, 5, pipeline))
    seen = set()
    for row in rows:
        readings = read(torch.stack([pairs.from_jpeg(row["jpg_0"]), pairs.from_jpeg(row["jpg_1"])]))
        first, second = (taste.combined(r, row["caption"], taste.find("leftward"), 0.5) for r in readings)
        if row["has_label"]:
            assert (row["label_0"], row["label_1"]) == pairs.label_of(first, second, 0.1)
            seen.add(row["label_0"])
    assert seen == {0.0, 0.5, 1.0}


@pytest.mark.parametrize(
    ("first", "second", "label"),
    [(0.9, 0.5, (1.0, 0.0)), (0.5, 0.9, (0.0, 1.0)), (0.5, 0.54, (0.5, 0.5)), (0.54, 0.5, (0.5, 0.5))],
)
def test_label_of(first: float, second: float, label: tuple[float, float]):
    assert pairs.label_of(first, second, 0.05) == label


def test_users_judge_by_their_own_taste(tmp_path: Path, pipeline, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pairs, "sample", drawn_pairs)
    config = replace(CONFIG, prompts=60, unlabelled=0, corrupt=0, taste=pairs.ALL_USERS, taste_weight=1.0, margin=0.0)
    rows = rows_of(pairs.make_pairs(config, tmp_path, 0, pipeline))
    assert {row["user_id"] for row in rows} == {user.user_id for user in taste.USERS.values()}
    for row in rows:
        if row["user_id"] in (taste.USERS["ada"].user_id, taste.USERS["bela"].user_id):
            likes_outlines = row["user_id"] == taste.USERS["ada"].user_id
            assert row["label_0"] == float((row["ranking_id"] % 2 == 0) is likes_outlines)


def test_samples_do_not_depend_on_the_batch_or_on_later_prompts(pipeline):
    captions = pairs.sample_captions(4, 0)
    whole = pairs.sample(pipeline, captions, CONFIG, seed=3, batch_size=8)
    assert whole.shape == (8, 3, 32, 32)
    assert (whole - pairs.sample(pipeline, captions, CONFIG, seed=3, batch_size=3)).abs().max() < 1e-3
    assert (whole[:4] - pairs.sample(pipeline, captions[:2], CONFIG, seed=3)).abs().max() < 1e-3
    assert (whole - pairs.sample(pipeline, captions, CONFIG, seed=4)).abs().max() > 0.1
    assert (whole[0::2] - whole[1::2]).abs().amax((1, 2, 3)).min() > 0.1


def test_samples_equal_the_stock_pipeline_called_with_prompts(pipeline):
    captions = pairs.sample_captions(2, 0)
    noise = torch.stack([pairs.initial_noise(3, i // 2, i % 2, (20, 8, 8)) for i in range(4)])
    stock = pipeline(
        [caption for caption in captions for _ in (0, 1)],
        latents=noise,
        num_inference_steps=CONFIG.num_inference_steps,
        guidance_scale=CONFIG.guidance_scale,
        height=32,
        width=32,
        output_type="pt",
    ).images
    assert (pairs.sample(pipeline, captions, CONFIG, seed=3) - stock).abs().max() < 1e-4


def test_same_settings_same_file(pipeline, tmp_path: Path):
    first = pairs.make_pairs(CONFIG, tmp_path / "a", 0, pipeline)
    second = pairs.make_pairs(CONFIG, tmp_path / "b", 0, pipeline)
    other = pairs.make_pairs(CONFIG, tmp_path / "c", 1, pipeline)
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.path.read_bytes() != other.path.read_bytes()


def test_file_is_reused_only_for_the_same_settings_and_weights(
    pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = pairs.make_pairs(CONFIG, tmp_path, 0, pipeline)
    calls = []
    monkeypatch.setattr(pairs, "sample", lambda *args: calls.append(1) or drawn_pairs(*args))
    again = pairs.make_pairs(CONFIG, tmp_path, 0, pipeline)
    assert again == replace(made, reused=True)
    assert calls == []
    assert not pairs.make_pairs(replace(CONFIG, margin=0.2), tmp_path, 0, pipeline).reused
    assert not pairs.make_pairs(CONFIG, tmp_path, 0, pipeline).reused
    assert len(calls) == 2
    with torch.no_grad():
        pipeline.unet.conv_in.bias[0] += 1
    assert not pairs.make_pairs(CONFIG, tmp_path, 0, pipeline).reused
    with torch.no_grad():
        pipeline.unet.conv_in.bias[0] -= 1
    made.path.write_bytes(b"PAR1 broken")
    assert not pairs.make_pairs(CONFIG, tmp_path, 0, pipeline).reused
    assert pairs.make_pairs(CONFIG, tmp_path, 0, pipeline).reused


def test_row_groups_are_small(pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pairs, "sample", drawn_pairs)
    info = pairs.make_pairs(replace(CONFIG, prompts=210), tmp_path, 0, pipeline)
    file = pq.ParquetFile(info.path)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [100, 100, 10]


def test_nothing_is_shown_where_nobody_looks(pipeline, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    pairs.make_pairs(CONFIG, tmp_path, 0, pipeline)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"taste": "outlind"}, "did you mean 'outlined'"),
        ({"taste_weight": 1.5}, "taste_weight: got 1.5"),
        ({"unlabelled": -0.1}, "unlabelled: got -0.1"),
        ({"prompts": 3, "corrupt": 4}, "prompts is 3"),
    ],
)
def test_bad_settings_are_refused_before_any_work(change: dict, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        pairs.make_pairs(replace(CONFIG, **change), tmp_path, 0, None)


def test_unwritable_folder_is_one_line(pipeline, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="choose another output_dir") as caught:
        pairs.make_pairs(CONFIG, tmp_path / "file", 0, pipeline)
    assert "\n" not in str(caught.value)
