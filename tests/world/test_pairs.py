"""The demo's preference file: schema, labels, noise, reuse."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from diffalign import plugins
from diffalign.config import DataConfig, ModelConfig, WorldPairsConfig
from diffalign.data.prepare import make_world_pairs
from diffalign.data.readers import Place
from diffalign.data.report import DataReport
from diffalign.errors import ConfigError, UserError
from diffalign.families import DECODER, ENCODERS, NETWORK, load_family
from diffalign.world import drawings, pairs, taste
from diffalign.world.bases import build_untrained, build_untrained_sd3
from diffalign.world.scenes import Style, compose, draw, is_held_out, parse_caption
from diffalign.world.verifier import read, verify

CONFIG = WorldPairsConfig(prompts=12, unlabelled=0.25, corrupt=2, num_inference_steps=2)


def loaded(name: str, folder: Path):
    made = load_family(
        ModelConfig(family=name, pretrained=str(folder), max_sequence_length=0 if name == "sd3" else None)
    )
    made.load(NETWORK, ENCODERS, DECODER)
    return made


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "sdxl"
    build_untrained((16, 32)).save_pretrained(folder)
    return loaded("sdxl", folder)


def drawn_pairs(family, captions: list[str], config: WorldPairsConfig, seed: int, batch_size: int = 0) -> Tensor:
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


def test_schema_is_that_of_pick_a_pic(family, tmp_path: Path):
    info = pairs.make_pairs(CONFIG, tmp_path, 0, family)
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
        "score_0": "double",  # the last two are ours
        "score_1": "double",
    }
    assert info.path.name == "train-00000-of-00001.parquet"
    assert [p.name for p in tmp_path.iterdir()] == [info.path.name]


def test_counts_are_those_of_the_file(tmp_path: Path, family):
    info = pairs.make_pairs(CONFIG, tmp_path, 1, family)
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


def test_the_liked_picture_gets_the_label_on_either_side(tmp_path: Path, family, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pairs, "sample", drawn_pairs)
    info = pairs.make_pairs(replace(CONFIG, prompts=30, unlabelled=0, corrupt=0), tmp_path, 0, family)
    assert info.decided == 30
    for i, row in enumerate(rows_of(info)):
        winner = i % 2  # the outlined one
        assert (row["label_0"], row["label_1"]) == ((1.0, 0.0), (0.0, 1.0))[winner]
        assert row["best_image_uid"] == row[f"image_{winner}_uid"]


def test_labels_follow_from_the_stored_bytes(tmp_path: Path, family, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pairs, "sample", drawn_pairs)
    config = replace(CONFIG, prompts=30, corrupt=0, taste="leftward", margin=0.1)
    rows = rows_of(pairs.make_pairs(config, tmp_path, 5, family))
    seen = set()
    for row in rows:
        readings = read(torch.stack([pairs.from_jpeg(row["jpg_0"]), pairs.from_jpeg(row["jpg_1"])]))
        first, second = (taste.combined(r, row["caption"], taste.find("leftward"), 0.5) for r in readings)
        assert (row["score_0"], row["score_1"]) == (first, second)
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


def test_users_judge_by_their_own_taste(tmp_path: Path, family, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pairs, "sample", drawn_pairs)
    config = replace(CONFIG, prompts=60, unlabelled=0, corrupt=0, taste=pairs.ALL_USERS, taste_weight=1.0, margin=0.0)
    rows = rows_of(pairs.make_pairs(config, tmp_path, 0, family))
    assert {row["user_id"] for row in rows} == {user.user_id for user in taste.USERS.values()}
    for row in rows:
        if row["user_id"] in (taste.USERS["ada"].user_id, taste.USERS["bela"].user_id):
            likes_outlines = row["user_id"] == taste.USERS["ada"].user_id
            assert row["label_0"] == float((row["ranking_id"] % 2 == 0) is likes_outlines)


def test_samples_do_not_depend_on_the_batch_or_on_later_prompts(family):
    captions = pairs.sample_captions(4, 0)
    whole = pairs.sample(family, captions, CONFIG, seed=3, batch_size=8)
    assert whole.shape == (8, 3, 32, 32)
    assert (whole - pairs.sample(family, captions, CONFIG, seed=3, batch_size=3)).abs().max() < 1e-3
    assert (whole[:4] - pairs.sample(family, captions[:2], CONFIG, seed=3)).abs().max() < 1e-3
    assert (whole - pairs.sample(family, captions, CONFIG, seed=4)).abs().max() > 0.1
    assert (whole[0::2] - whole[1::2]).abs().amax((1, 2, 3)).min() > 0.1


def test_samples_equal_the_stock_pipeline_called_with_prompts(family):
    captions = pairs.sample_captions(2, 0)
    noise = torch.stack([pairs.initial_noise(3, i // 2, i % 2, (20, 8, 8)) for i in range(4)])
    stock = family.pipeline()(
        [caption for caption in captions for _ in (0, 1)],
        latents=noise,
        num_inference_steps=CONFIG.num_inference_steps,
        guidance_scale=CONFIG.guidance_scale,
        height=32,
        width=32,
        output_type="pt",
    ).images
    assert (pairs.sample(family, captions, CONFIG, seed=3) - stock).abs().max() < 1e-4


def test_same_settings_same_file(family, tmp_path: Path):
    first = pairs.make_pairs(CONFIG, tmp_path / "a", 0, family)
    second = pairs.make_pairs(CONFIG, tmp_path / "b", 0, family)
    other = pairs.make_pairs(CONFIG, tmp_path / "c", 1, family)
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.path.read_bytes() != other.path.read_bytes()


def test_file_is_reused_only_for_the_same_settings_and_weights(family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = pairs.make_pairs(CONFIG, tmp_path, 0, family)
    calls = []
    monkeypatch.setattr(pairs, "sample", lambda *args: calls.append(1) or drawn_pairs(*args))
    again = pairs.make_pairs(CONFIG, tmp_path, 0, family)
    assert again == replace(made, reused=True)
    assert calls == []
    assert not pairs.make_pairs(replace(CONFIG, margin=0.2), tmp_path, 0, family).reused
    assert not pairs.make_pairs(CONFIG, tmp_path, 0, family).reused
    assert len(calls) == 2
    with torch.no_grad():
        family.network.conv_in.bias[0] += 1
    assert not pairs.make_pairs(CONFIG, tmp_path, 0, family).reused
    with torch.no_grad():
        family.network.conv_in.bias[0] -= 1
    made.path.write_bytes(b"PAR1 broken")
    assert not pairs.make_pairs(CONFIG, tmp_path, 0, family).reused
    assert pairs.make_pairs(CONFIG, tmp_path, 0, family).reused


def test_row_groups_are_small(family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pairs, "sample", drawn_pairs)
    info = pairs.make_pairs(replace(CONFIG, prompts=210), tmp_path, 0, family)
    file = pq.ParquetFile(info.path)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [100, 100, 10]


def test_nothing_is_shown_where_nobody_looks(family, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    pairs.make_pairs(CONFIG, tmp_path, 0, family)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"taste": "outlind"}, "did you mean 'outlined'"),
        ({"taste_weight": 1.5}, "taste_weight: got 1.5"),
        ({"unlabelled": -0.1}, "unlabelled: got -0.1"),
        ({"prompts": 3, "corrupt": 4}, "prompts is 3"),
        ({"maps": True}, "needs data.world_pairs.chosen: drawn"),
    ],
)
def test_bad_settings_are_refused_before_any_work(change: dict, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        pairs.make_pairs(replace(CONFIG, **change), tmp_path, 0, None)


def test_unwritable_folder_is_one_line(family, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="choose another output_dir") as caught:
        pairs.make_pairs(CONFIG, tmp_path / "file", 0, family)
    assert "\n" not in str(caught.value)


LABELS = "0?=1==0?1=?00==1==0???01?=?111001001?101??0=?1?1==0?0?==0111"  # of the first version of the format
USERS = "224643667347245644474126731232617754426212451222442546433614"


def test_labels_users_and_damage_are_those_of_the_first_version(
    family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pairs, "sample", drawn_pairs)
    config = replace(CONFIG, prompts=60, taste="users", margin=0.1, corrupt=3)
    rows = rows_of(pairs.make_pairs(config, tmp_path, 5, family))
    assert "".join({1.0: "1", 0.0: "0", 0.5: "=", None: "?"}[row["label_0"]] for row in rows) == LABELS
    assert "".join(str(row["user_id"]) for row in rows) == USERS
    assert (rows[0]["caption"], rows[59]["caption"]) == (
        "a small yellow circle on a gray background",
        "a red circle left of a yellow square on a black background",
    )
    assert [place for place in ((22, 1), (30, 0), (35, 0)) if undecodable(rows[place[0]][f"jpg_{place[1]}"])] == [
        (22, 1), (30, 0), (35, 0),
    ]  # fmt: skip


def undecodable(data: bytes) -> bool:
    try:
        pairs.from_jpeg(data)
    except (OSError, UnidentifiedImageError):
        return True
    return False


def test_half_of_the_rows_are_judged_in_one_aspect_and_half_in_the_other(
    family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pairs, "sample", drawn_pairs)
    config = replace(CONFIG, prompts=30, corrupt=0, unlabelled=0, aspects=True)
    rows = rows_of(pairs.make_pairs(config, tmp_path, 0, family))
    assert [row["aspect"] for row in rows] == [0, 1] * 15
    for row in rows:
        images = torch.stack([pairs.from_jpeg(row[f"jpg_{side}"]) for side in (0, 1)])
        seen = [reading["score"] for reading in verify(images, [row["caption"]] * 2)]
        liked = [taste.find("outlined")(reading) for reading in read(images)]
        assert [row["score_0"], row["score_1"]] == pytest.approx(liked if row["aspect"] else seen)
        # True drawings differ in style alone: the verifier sees no difference.
        assert (row["label_0"] == 0.5) is (row["aspect"] == 0)


def test_the_chosen_picture_can_be_a_drawing_in_the_judges_taste(family, tmp_path: Path):
    config = replace(CONFIG, prompts=24, corrupt=0, unlabelled=0, chosen="drawn", taste="users")
    info = pairs.make_pairs(config, tmp_path, 3, family)
    rows = rows_of(info)
    assert (info.decided, info.ties) == (24, 0)
    assert {row["label_0"] for row in rows} == {0.0, 1.0}  # on either side
    users = {user.user_id: user for user in taste.USERS.values()}
    for row in rows:
        side = 0 if row["label_0"] == 1.0 else 1
        assert (row[f"model_{side}"], row[f"model_{1 - side}"]) == ("drawing", "tiny-sdxl")
        assert row["best_image_uid"] == row[f"image_{side}_uid"]
        image = pairs.from_jpeg(row[f"jpg_{side}"])[None]
        assert verify(image, [row["caption"]])[0]["strict"] == 1.0
        assert users[row["user_id"]](read(image)[0]) > 0.7
        assert row[f"score_{side}"] > row[f"score_{1 - side}"] + 0.2  # an untrained base draws nothing
    # The samples are the first of those that are compared with each other otherwise.
    captions = [row["caption"] for row in rows]
    first = pairs.sample(family, captions, config, 3)[0::2]
    assert (pairs.sample(family, captions, config, 3, count=1) - first).abs().max() < 1e-3


def test_maps_are_the_weights_of_patch_dpo_and_reach_the_record(family, tmp_path: Path):
    config = replace(CONFIG, prompts=6, corrupt=0, unlabelled=0, chosen="drawn", maps=True)
    info = pairs.make_pairs(config, tmp_path, 0, family)
    report = DataReport()
    reader = plugins.find("readers", "pickapic")()
    place = Place(source="local", split="train", shard=info.path.name, root=tmp_path, report=report)
    records = list(reader.read(info.path, place))
    assert (len(records), dict(report.skipped)) == (6, {})

    def shown(image: Tensor) -> Tensor:
        return pairs.from_jpeg(pairs.to_jpeg(image, config.jpeg_quality))

    captions = [record.prompt for record in records]
    references = drawings.favourites(captions, [taste.find("outlined")] * 6, [0.5] * 6, 0, seen=shown)
    for record, others in zip(records, references, strict=True):
        assert record.extra.keys() == {"rewards", "maps"}
        maps = torch.tensor(record.extra["maps"])
        assert maps.shape == (2, 8, 8)
        drawn = 0 if record.p == 1.0 else 1
        images = [pairs.from_jpeg(image.read())[None] for image in record.images]
        of_sample, of_drawing = drawings.quality_maps(family, images[1 - drawn], images[drawn], others[None])
        torch.testing.assert_close(maps[1 - drawn], of_sample[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(maps[drawn], 1 - of_drawing[0], atol=1e-4, rtol=0)


def scene(caption: str, seed: int, *, outline: bool = True) -> Tensor:
    return draw([compose(parse_caption(caption), random.Random(seed), Style(outline=outline))])


def test_quality_is_high_where_a_patch_is_drawn_right(family):
    caption = "a large red circle on a gray background"
    references = torch.cat([scene(caption, seed) for seed in range(1, 5)])[None]

    def maps(sample: Tensor) -> tuple[Tensor, Tensor]:
        generated, target = drawings.quality_maps(family, sample, scene(caption, 9), references)
        return generated[0], target[0]

    generated, target = maps(scene(caption, 6))
    assert generated.min() > 0.95  # in another place, but of the same patches
    assert target.mean() > 0.95
    wrong, missed = maps(scene("a large blue circle on a gray background", 6))
    body = wrong < 0.3
    assert 4 <= body.sum() <= 12  # the inside of the circle
    assert wrong[0, 0] > 0.99
    assert wrong[7, 7] > 0.99
    assert 4 <= (missed < 0.3).sum() <= 12  # and the red that no patch of the sample has
    background, _ = maps(scene("a large red circle on a white background", 6))
    assert background[0, 0] < 0.5
    assert background[body].min() > 0.9  # the circle is right
    plain, _ = maps(scene(caption, 6, outline=False))
    assert 0.3 < plain.min() < 0.85  # a rim without its outline
    assert plain[body].min() > 0.95
    # A little noise on a grey background, whose latents are nearly zero, is no other background.
    noisy, _ = maps((scene(caption, 6) + 0.02 * torch.randn(1, 3, 32, 32)).clamp(0, 1))
    assert noisy[0, 0] > 0.9


def test_favourites_are_liked_and_depend_on_their_place_alone():
    captions = pairs.sample_captions(70, 0)
    judges = [taste.find("outlined")] * 70
    best = drawings.favourites(captions, judges, [0.5] * 70, seed=4)
    assert best.shape == (70, drawings.REFERENCES, 3, 32, 32)
    readings = read(best[:, 0])
    assert min(judges[0](reading) for reading in readings) > 0.9
    assert all(score["strict"] == 1 for score in verify(best[:, 0], captions))
    assert torch.equal(drawings.favourites(captions[:3], judges[:3], [0.5] * 3, seed=4), best[:3])
    assert not torch.equal(drawings.favourites(captions[:3], judges[:3], [0.5] * 3, seed=5), best[:3])


def test_an_sd3_base_is_sampled_by_the_same_code(tmp_path: Path):
    torch.manual_seed(0)
    build_untrained_sd3(width=32, layers=1).save_pretrained(tmp_path / "sd3")
    family = loaded("sd3", tmp_path / "sd3")
    info = pairs.make_pairs(replace(CONFIG, base="tiny-sd3", prompts=3, corrupt=0), tmp_path / "out", 0, family)
    rows = rows_of(info)
    assert {row["model_0"] for row in rows} == {"tiny-sd3"}
    stock = family.pipeline()(
        rows[0]["caption"],
        latents=pairs.initial_noise(0, 0, 0, (20, 8, 8))[None],
        num_inference_steps=CONFIG.num_inference_steps,
        guidance_scale=CONFIG.guidance_scale,
        height=32,
        width=32,
        max_sequence_length=0,
        output_type="pt",
    ).images
    again = pairs.to_jpeg(stock[0], CONFIG.jpeg_quality)
    assert (pairs.from_jpeg(again) - pairs.from_jpeg(rows[0]["jpg_0"])).abs().max() < 0.02


@pytest.mark.parametrize(
    ("pretrained", "base", "sampled"),
    [("tiny-sd3", None, "tiny-sd3"), ("tiny-sdxl", None, None), ("sdxl", None, None), ("sdxl", "tiny-sd3", "tiny-sd3")],
)
def test_the_runs_own_base_is_sampled_unless_another_is_named(
    pretrained: str, base: str | None, sampled: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[WorldPairsConfig] = []
    monkeypatch.setattr(pairs, "make_pairs", lambda config, *rest: asked.append(config))
    run = SimpleNamespace(
        output_dir=str(tmp_path),
        seed=0,
        model=ModelConfig(family="sd3", pretrained=pretrained),
        data=DataConfig(world_pairs=replace(CONFIG, base=base)),
    )
    process = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
    make_world_pairs(run, process)  # type: ignore[arg-type]
    assert asked[0].base in (sampled, "tiny-sdxl" if sampled is None else sampled)


def test_further_judges_write_their_scores_for_the_loss_to_read(
    tmp_path: Path, family, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pairs, "sample", drawn_pairs)
    config = replace(CONFIG, prompts=8, corrupt=0, unlabelled=0, taste_weight=1.0, rewards=("verifier", "plain"))
    info = pairs.make_pairs(config, tmp_path, 0, family)
    for row in rows_of(info):
        flat = 1 if row["label_0"] == 1.0 else 0  # the outlined one is preferred
        true, plain = zip(row["rewards_0"], row["rewards_1"], strict=True)
        assert min(true) > 0.9, "both drawings keep what the caption promises"
        assert plain[flat] > plain[1 - flat] + 0.5
    reader, report = plugins.find("readers", "pickapic")(), DataReport()
    place = Place(source="local", split="train", shard=info.path.name, root=tmp_path, report=report)
    found = [record.extra["rewards"] for record in reader.read(info.path, place)]
    assert found == [[row["rewards_0"], row["rewards_1"]] for row in rows_of(info)]
    with pytest.raises(ConfigError, match="nobody"):
        pairs.make_pairs(replace(config, rewards=("nobody",)), tmp_path / "x", 0, family)
