"""Rewards, aspects, maps and prompts of their own: from the source to the loss, in the right order."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from diffalign import losses, plugins, preflight
from diffalign.config import DataConfig, DenoisingConfig, ModelConfig, RunConfig
from diffalign.data import facts
from diffalign.data import prepare as module
from diffalign.data.batch import collate
from diffalign.data.cache import LatentCache
from diffalign.data.encode import EncodedPair, Prepared
from diffalign.data.facts import BadFact, check_extra, fit_map, load_map
from diffalign.data.loader import BatchPlan, PairMicroBatches
from diffalign.data.pipeline import iterate
from diffalign.data.prepare import prepare
from diffalign.data.readers import Place
from diffalign.data.record import Record
from diffalign.data.report import DataReport
from diffalign.data.source import resolve
from diffalign.errors import ConfigError, DataError
from diffalign.families import ENCODERS, DenoisingFamily, load_family

TinyConfig = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def family(tiny_folder: Path) -> DenoisingFamily:
    return load_family(ModelConfig(family="sdxl", pretrained=str(tiny_folder)))


@pytest.fixture(autouse=True)
def _encoders(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "family" in request.fixturenames:
        family = request.getfixturevalue("family")
        family.load(ENCODERS)
        monkeypatch.setattr(family, "unload", lambda *parts: None)


def png(shade: int, size: tuple[int, int] = (32, 32)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (shade % 256, shade // 256, 50)).save(out, "PNG")
    return out.getvalue()


# --- one record ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"rewards": [[0.5, -3], [1, 2.5]], "aspect": 0, "prompts": ["a", "b"]},
        {"maps": [[[0, 1]], [[0.5], [0.25]]]},
        {"maps": ["a.npy", [[1.0]]]},  # files are read later
        {"something": {"of": "one's own"}},
    ],
)
def test_facts_that_are_fine(extra: dict[str, Any]) -> None:
    check_extra(extra)


@pytest.mark.parametrize(
    ("extra", "reason", "said"),
    [
        ({"rewards": [0.5, 0.1]}, "bad_reward", "list of finite numbers"),
        ({"rewards": [[0.5]]}, "bad_reward", "a list of two"),
        ({"rewards": [[0.5], [0.1, 2]]}, "bad_reward", "1 rewards of image 0 and 2"),
        ({"rewards": [[], []]}, "bad_reward", "finite numbers"),
        ({"rewards": [[float("nan")], [1.0]]}, "bad_reward", "finite numbers"),
        ({"rewards": [[True], [1.0]]}, "bad_reward", "finite numbers"),
        ({"rewards": [["0.5"], [1.0]]}, "bad_reward", "finite numbers"),
        ({"aspect": -1}, "bad_aspect", "0, 1, 2"),
        ({"aspect": 1.0}, "bad_aspect", "0, 1, 2"),
        ({"aspect": True}, "bad_aspect", "0, 1, 2"),
        ({"maps": [[[0.5]]]}, "bad_map", "a list of two"),
        ({"maps": [[[0.5]], [[1.5]]]}, "bad_map", "from 1.5 to 1.5"),
        ({"maps": [[[0.5]], [[-0.1, 0]]]}, "bad_map", "from -0.1 to 0"),
        ({"maps": [[[0.5]], [[float("nan")]]]}, "bad_map", "expected"),
        ({"maps": [[[0.5]], [0.5]]}, "bad_map", "rows of numbers"),
        ({"maps": [[[0.5]], [[0.5], [0.5, 1]]]}, "bad_map", "different lengths"),
        ({"maps": [[[0.5]], [["x"]]]}, "bad_map", "rows of numbers"),
        ({"maps": [[[0.5]], None]}, "bad_map", "rows of numbers"),
        ({"prompts": ["a"]}, "bad_prompt", "a list of two"),
        ({"prompts": ["a", " "]}, "bad_prompt", "a text expected"),
        ({"prompts": ["a", 3]}, "bad_prompt", "a text expected"),
        ({"mine": {1, 2}}, "bad_extra", "JSON"),
    ],
)
def test_facts_that_are_not(extra: dict[str, Any], reason: str, said: str) -> None:
    with pytest.raises(BadFact, match=said) as caught:
        check_extra(extra)
    assert caught.value.reason == reason


def test_a_map_of_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[0.0, 0.5], [1.0, 0.25]]))
    assert load_map(str(tmp_path / "a.npy")).tolist() == [[0.0, 0.5], [1.0, 0.25]]
    np.save(tmp_path / "b.npy", np.ones((2, 2, 2)))
    with pytest.raises(BadFact, match=r"b.npy is float64 of shape \(2, 2, 2\)"):
        load_map(str(tmp_path / "b.npy"))
    (tmp_path / "c.npy").write_bytes(b"nothing of the sort")
    with pytest.raises(BadFact, match=r"c.npy is not readable"):
        load_map(str(tmp_path / "c.npy"))
    np.save(tmp_path / "d.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(BadFact, match=r"d.npy is not readable"):
        load_map(str(tmp_path / "d.npy"))


# --- maps ------------------------------------------------------------------------------------------------------------

WHOLE = ((8, 8), (0, 0), (8, 8))


def test_a_map_of_the_latents_size_stays_as_it_is() -> None:
    weights = torch.rand(4, 4)
    torch.testing.assert_close(fit_map(weights, *WHOLE, (4, 4)), weights)
    torch.testing.assert_close(fit_map(weights, *WHOLE, (4, 4), flip=True), weights.flip(1))


def test_maps_are_resized_by_area() -> None:
    weights = torch.rand(12, 8)
    area = torch.nn.functional.interpolate(weights[None, None], size=(4, 2), mode="area")[0, 0]
    torch.testing.assert_close(fit_map(weights, *WHOLE, (4, 2)), area)
    torch.testing.assert_close(fit_map(torch.tensor([[0.0, 1.0]]), *WHOLE, (1, 4)), torch.tensor([[0.0, 0, 1, 1]]))
    # 3 cells into 2: the middle one belongs half to each
    torch.testing.assert_close(fit_map(torch.tensor([[1.0, 0.5, 0]]), *WHOLE, (1, 2)), torch.tensor([[2.5, 0.5]]) / 3)
    assert fit_map(torch.rand(5, 7), *WHOLE, (3, 3)).mean() < 1


def test_a_map_is_cropped_as_its_image_was() -> None:
    weights = torch.arange(8.0).expand(4, 8) / 8
    # A wide image of 4 x 8, and a square of it from column 2 on.
    cut = fit_map(weights, (4, 8), (0, 2), (4, 4), (4, 4))
    torch.testing.assert_close(cut, weights[:, 2:6])
    # Mirrored first, as Pillow does it: the crop's offset counts from the mirrored image's left.
    cut = fit_map(weights, (4, 8), (0, 1), (4, 4), (4, 4), flip=True)
    torch.testing.assert_close(cut, weights.flip(1)[:, 1:5])
    image = Prepared("", torch.zeros(3, 4, 4), (8, 16), (0, 2), (4, 4), weights=weights)
    expected = fit_map(weights, (4, 8), (0, 2), (4, 4), (2, 2))
    torch.testing.assert_close(cast(Tensor, image.weights_at((2, 2))), expected)


# --- what objectives read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "wanted"),
    [
        ("dpo", {}, ()),
        ("smpo", {}, ("rewards",)),
        ("smpo", {"soft_label": "p"}, ()),
        ("capo", {"beta": 1.0}, ("rewards",)),
        ("modpo", {"beta": 1.0}, ("rewards",)),
        ("rwr", {}, ("rewards",)),
        ("bide_dpo", {"beta": 1.0}, ("aspect",)),
        ("patch_dpo", {}, ("maps",)),
        ("subject_rpo", {}, ()),
    ],
)
def test_what_an_objective_reads_is_found_out(name: str, settings: dict[str, Any], wanted: tuple[str, ...]) -> None:
    objective = losses.find(name)(**settings)
    assert facts.needed(objective) == wanted
    if wanted:
        with pytest.raises(ConfigError, match=r"docs/how-to/data.md"):
            preflight._rehearse(objective)
    preflight._rehearse(objective, wanted)


def test_pairs_without_what_is_read_are_counted() -> None:
    objective, reads = losses.find("smpo")(), {"rewards": "objective 'smpo'"}
    extras: list[dict[str, Any]] = [{"rewards": [[1.0], [0.0]]}] * 5
    facts.require(extras, reads, objective)
    assert facts.in_all(extras) == {"rewards"}
    with pytest.raises(DataError, match=r"objective 'smpo' reads the rewards of every pair; 2 of 7 pairs have none"):
        facts.require([*extras, {}, {"aspect": 1}], reads, objective)
    assert facts.in_all([*extras, {}]) == frozenset()
    with pytest.raises(DataError, match=r"5 pairs have 1, 1 pairs have 2"):
        facts.require([*extras, {"rewards": [[1.0, 2.0], [0.0, 1.0]]}], reads, objective)
    with pytest.raises(DataError, match=r"do not fit objective 'smpo': got 2 rewards per image; smpo reads one"):
        facts.require([{"rewards": [[1.0, 2.0], [0.0, 1.0]]}], reads, objective)
    facts.require([{"rewards": [[1.0, 2.0], [0.0, 1.0]]}], reads, losses.find("capo")(beta=1.0))


# --- readers ---------------------------------------------------------------------------------------------------------


def read(name: str, path: Path) -> tuple[list[Record], DataReport]:
    reader, report = plugins.find("readers", name)(), DataReport()
    reader.check(path)
    place = Place(source="local", split="train", shard=path.name, root=path.parent, report=report)
    return list(reader.read(path, place)), report


def write_jsonl(folder: Path, lines: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    for shade in range(10):
        (folder / f"{shade}.png").write_bytes(png(shade))
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_jsonl_takes_all_facts(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.ones((2, 2)))
    images = {"image_0": "0.png", "image_1": "1.png", "label_0": 0}
    lines: list[dict[str, Any]] = [
        {"prompt": "p", "rewards": [[0.5, 1], [0.1, 2]], "aspect": 1, "maps": ["w.npy", [[0.5]]]} | images,
        {"prompts": ["of 0", "of 1"], "rewards": None} | images,
        {"prompts": ["of 0", "of 1"], "chosen": "0.png", "rejected": "1.png"},
        {"prompt": "p"} | images,
    ]
    records, report = read("jsonl", write_jsonl(tmp_path, lines))
    assert not report.skipped
    maps = [str(tmp_path / "w.npy"), [[0.5]]]
    assert records[0].extra == {"rewards": [[0.5, 1], [0.1, 2]], "aspect": 1, "maps": maps}
    assert [(r.prompt, r.prompts) for r in records[1:3]] == [
        ("of 1", ("of 1", "of 0")),  # the winner's
        ("of 0", ("of 0", "of 1")),
    ]
    assert (records[3].extra, records[3].prompts) == ({}, ("p",))
    reader = plugins.find("readers", "jsonl")()
    assert reader.companions(["a.npy", "b.png", "pairs.jsonl"], "train") == ["a.npy", "b.png"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rewards": [0.5, 0.1]}, "bad_reward"),
        ({"aspect": "text"}, "bad_aspect"),
        ({"maps": [[[2.0]], [[0.5]]]}, "bad_map"),
        ({"maps": ["none.npy", [[0.5]]]}, "bad_map"),
        ({"maps": ["0.png", [[0.5]]]}, "bad_map"),
        ({"maps": ["../w.npy", [[0.5]]]}, "path_escapes"),
        ({"prompts": ["a", "b"]}, "bad_prompt"),  # and prompt
        ({"prompt": None, "prompts": ["a"]}, "bad_prompt"),
        ({"prompt": None, "prompts": ["a", ""]}, "bad_prompt"),
    ],
)
def test_jsonl_rows_with_bad_facts_go_with_a_reason(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    good = {"prompt": "p", "chosen": "0.png", "rejected": "1.png"}
    records, report = read("jsonl", write_jsonl(tmp_path / "d", [good, good | change]))
    assert (len(records), dict(report.skipped)) == (1, {reason: 1})


def pickapic(folder: Path, rows: Sequence[dict[str, Any]], size: tuple[int, int] = (32, 32)) -> Path:
    folder.mkdir(exist_ok=True)
    table = [
        {
            "caption": f"prompt {i}",
            "jpg_0": png(2 * i, size),
            "jpg_1": png(2 * i + 1, size),
            "label_0": float(i % 2),
            "label_1": float(1 - i % 2),
        }
        | row
        for i, row in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(table), folder / "train-00000-of-00001.parquet")
    return folder / "train-00000-of-00001.parquet"


@pytest.mark.parametrize("names", [("score_0", "score_1"), ("ps_score_0", "ps_score_1")])
def test_pickapic_takes_scores_aspects_and_maps(tmp_path: Path, names: tuple[str, str]) -> None:
    rows: list[dict[str, Any]] = [
        {names[0]: 0.25, names[1]: 0.5, "aspect": 1, "map_0": [[0.5]], "map_1": [[1.0, 0.0]]},
        {names[0]: None, names[1]: None, "aspect": None, "map_0": None, "map_1": None},
        {names[0]: 0.25, names[1]: None, "aspect": 0, "map_0": None, "map_1": None},
        {names[0]: 0.25, names[1]: float("nan"), "aspect": 0, "map_0": None, "map_1": None},
        {names[0]: 0.25, names[1]: 0.0, "aspect": -1, "map_0": None, "map_1": None},
        {names[0]: 0.25, names[1]: 0.0, "aspect": 0, "map_0": [[0.5]], "map_1": None},
    ]
    records, report = read("pickapic", pickapic(tmp_path, rows))
    assert [r.extra for r in records] == [
        {"rewards": [[0.25], [0.5]], "aspect": 1, "maps": [[[0.5]], [[1.0, 0.0]]]},
        {},
    ]
    assert dict(report.skipped) == {"bad_reward": 2, "bad_aspect": 1, "bad_map": 1}


# --- labels of rewards -----------------------------------------------------------------------------------------------


def run(folder: Path, rows: list[dict[str, Any]], **options: Any) -> tuple[list[Record], DataReport]:
    pickapic(folder, rows)
    config, report = DataConfig(sources=(str(folder),), **options), DataReport()
    return list(iterate(config, resolve(config), report)), report


def scored(first: float | None, second: float | None, label_0: float | None = 1.0) -> dict[str, Any]:
    other = None if label_0 is None else 1 - label_0
    return {"score_0": first, "score_1": second, "label_0": label_0, "label_1": other, "has_label": label_0 is not None}


def test_rewards_can_say_who_won(tmp_path: Path) -> None:
    rows = [
        scored(0.9, 0.1),  # as labelled
        scored(0.1, 0.9),  # the other way round
        scored(0.9, 0.1, 0.5),  # people's tie
        scored(0.4, 0.4),  # a tie of rewards
        scored(None, None),
        scored(0.9, 0.1, None),
        scored(0.9, 0.1, 0.0),
    ]
    kept, report = run(tmp_path, rows, label_from="rewards")
    assert [(r.prompt, r.p) for r in kept] == [("prompt 0", 1.0), ("prompt 1", 0.0), ("prompt 6", 1.0)]
    assert dict(report.skipped) == {"tie": 2, "missing_reward": 1, "unlabelled": 1}
    assert report.unusable == 1
    kept, report = run(tmp_path, rows, label_from="rewards", ties="soft")
    assert [(r.prompt, r.p) for r in kept][2] == ("prompt 3", 0.5)
    assert dict(report.skipped) == {"tie": 1, "missing_reward": 1, "unlabelled": 1}
    kept, _ = run(tmp_path, rows)
    assert [r.p for r in kept] == [1.0, 1.0, 1.0, 1.0, 0.0]


def test_most_rewards_can_say_who_won(tmp_path: Path) -> None:
    """One vote each: a wide range counts no more than a narrow one, and a monotone change of a reward changes nothing."""
    lists = [
        ([0.9, 0.2, 3.0], [0.1, 0.1, 900.0]),
        ([0.1, 0.2, 1.0], [0.9, 0.3, -5.0]),
        ([0.4, 0.1, 0.0], [0.3, 0.2, 0.0]),
    ]
    rows = [{"rewards_0": a, "rewards_1": b, "label_0": 1.0, "label_1": 0.0, "has_label": True} for a, b in lists]
    kept, report = run(tmp_path / "one", rows, label_from="majority")
    assert [(r.prompt, r.p) for r in kept] == [("prompt 0", 1.0), ("prompt 1", 0.0)]
    assert dict(report.skipped) == {"tie": 1}
    for row in rows:
        row |= {key: [value[0] ** 3, *value[1:]] for key, value in row.items() if key.startswith("rewards")}
    again, _ = run(tmp_path / "two", rows, label_from="majority")
    assert [r.p for r in again] == [r.p for r in kept]
    first, _ = run(tmp_path / "three", rows, label_from="rewards")
    assert [r.p for r in first] == [1.0, 0.0, 1.0]


def test_the_same_images_in_two_respects_are_two_pairs(tmp_path: Path) -> None:
    row = {"caption": "p", "jpg_0": png(1), "jpg_1": png(2), "label_0": 1.0, "label_1": 0.0}
    kept, report = run(tmp_path, [row | {"aspect": a} for a in (0, 1, 1)])
    assert [r.extra["aspect"] for r in kept] == [0, 1]
    assert dict(report.skipped) == {"duplicate": 1}


@pytest.mark.parametrize(
    ("data", "objective", "said"),
    [
        ({"format": "hpdv2", "label_from": "rewards"}, {"name": "dpo"}, r"label_from: got 'rewards', and.*no rewards"),
        ({"format": "folder", "label": "soft"}, {"name": "dpo"}, r"data.label: got 'soft', and rows.*no rewards"),
        ({"label_temperature": 2.0}, {"name": "dpo"}, r"label_temperature: has no effect"),
        ({"label": "soft", "label_temperature": 0}, {"name": "dpo"}, r"expected a positive number"),
        ({"label": "soft"}, {"name": "dro"}, r"data.label: got 'soft'; it has no effect where images are sampled"),
        ({"format": "hpdv2"}, {"name": "smpo"}, r"'smpo' cannot be computed.*reward_w.*docs/how-to/data.md"),
        ({"world_pairs": {}}, {"name": "bide_dpo", "beta": 1}, r"'bide_dpo' cannot be computed.*aspect is missing"),
        ({"world_pairs": {}}, {"name": "patch_dpo"}, r"'patch_dpo' cannot be computed.*patch_weight is missing"),
        ({"world_pairs": {"maps": True}}, {"name": "patch_dpo"}, r"needs data.world_pairs.chosen: drawn"),
    ],
)
def test_the_preflight_knows_which_data_have_no_such_facts(
    tiny_config: TinyConfig, tmp_path: Path, data: dict[str, Any], objective: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        preflight.check(tiny_config(tmp_path, data=data, objective=objective))


@pytest.mark.parametrize("name", ["smpo", "capo", "bide_dpo", "patch_dpo", "subject_rpo"])
def test_the_demos_pass_the_preflight(name: str, tmp_path: Path) -> None:
    from diffalign.config_loading import load_config

    preflight.check(load_config(f"demo_{name}", [f"output_dir={tmp_path}"]))


# --- examples --------------------------------------------------------------------------------------------------------


class Pairs:
    """Encoded pairs whose tensors say which they are; the second image wins in those of odd number."""

    def __init__(self, extras: Sequence[dict[str, Any]]) -> None:
        self.extras = list(extras)
        self.prompts = ["pair"] * len(extras)
        self.target_sizes = [(32, 32)] * len(extras)

    def __len__(self) -> int:
        return len(self.extras)

    def pair(self, index: int) -> EncodedPair:
        return EncodedPair(
            id=f"id{index}",
            prompt=self.prompts[index],
            latents=(torch.full((2, 3, 4), 1.0), torch.full((2, 3, 4), 2.0)),
            p=1.0 - index % 2,
            weight=1.0,
            user=None,
            original_sizes=((32, 32), (32, 32)),
            crops=((0, 0), (0, 0)),
            target_size=(32, 32),
            extra=self.extras[index],
        )

    def text(self, prompt: str) -> dict[str, Tensor]:
        return {"hidden": torch.full((5,), float(len(prompt)))}


def dataset(
    extras: Sequence[dict[str, Any]], denoising: DenoisingConfig | None = None, **more: Any
) -> PairMicroBatches:
    family = SimpleNamespace(
        image_conditioning=lambda *sizes: {}, schedule=SimpleNamespace(num_timesteps=1000), timestep_sampling="uniform"
    )
    data = Pairs(extras)
    plan = BatchPlan(range(len(extras)), data.target_sizes, len(extras), 0)
    denoising = denoising or DenoisingConfig()
    return PairMicroBatches(data, plan, denoising, cast(DenoisingFamily, family), 0, **more)


FULL = {
    "rewards": [[0.1, 1.0], [0.2, 2.0]],
    "aspect": 3,
    "maps": [torch.full((3, 4), 0.1), torch.full((3, 4), 0.2)],
    "prompts": ["a", "four"],
}


def test_facts_of_the_chosen_image_come_first_whichever_it_is() -> None:
    data = dataset([FULL, FULL], facts=facts.READ_BY_OBJECTIVES)
    for index, (chosen, rejected) in ((0, (0, 1)), (1, (1, 0))):
        example = data.example(index, 0)
        assert cast(Tensor, example.chosen_reward).tolist() == pytest.approx(FULL["rewards"][chosen])
        assert cast(Tensor, example.rejected_reward).tolist() == pytest.approx(FULL["rewards"][rejected])
        assert example.aspect == 3
        assert example.chosen_map is FULL["maps"][chosen]
        assert example.rejected_map is FULL["maps"][rejected]
        assert example.text["hidden"][0] == len(FULL["prompts"][chosen])
        assert cast(dict[str, Tensor], example.rejected_text)["hidden"][0] == len(FULL["prompts"][rejected])
        assert torch.all(example.chosen == 1 + chosen)
    batch = data[0]
    assert cast(Tensor, batch.chosen_reward).shape == (2, 2)
    assert cast(Tensor, batch.aspect).dtype == torch.int64
    assert cast(Tensor, batch.chosen_map).shape == (2, 3, 4)
    rows, layout = batch.rows(losses.PatchDPO.needs)
    assert cast(Tensor, rows.patch_weight).shape == (4, 3, 4)
    assert layout.items is not None


def test_facts_change_neither_timestep_nor_noise() -> None:
    plain, full = dataset([{}, {}]), dataset([FULL, FULL], facts=facts.READ_BY_OBJECTIVES, label="sampled")
    for index in (0, 1):
        assert plain.example(index, 3).t == full.example(index, 3).t
        assert torch.equal(plain.example(index, 3).noise, full.example(index, 3).noise)
    assert plain.example(0, 0).chosen_reward is None
    assert plain.example(0, 0).rejected_text is None
    assert dataset([FULL]).example(0, 0).chosen_reward is None  # nobody asked for it


def test_a_batch_may_mix_pairs_with_and_without_prompts_of_their_own() -> None:
    batch = collate([dataset([FULL]).example(0, 0), dataset([{}]).example(0, 0)])
    assert batch.text["hidden"][:, 0].tolist() == [1, 4]
    assert cast(dict[str, Tensor], batch.rejected_text)["hidden"][:, 0].tolist() == [4, 4]


def test_dropping_the_prompt_drops_both() -> None:
    data = dataset([FULL], DenoisingConfig(proportion_empty_prompts=0.5))
    seen = Counter()
    for visit in range(60):
        example = data.example(0, visit)
        seen[float(example.text["hidden"][0]), float(cast(dict[str, Tensor], example.rejected_text)["hidden"][0])] += 1
    assert set(seen) == {(0.0, 0.0), (1.0, 4.0)}
    kept = data.example(0, 0, keep_prompt=True)
    assert kept.text["hidden"][0] == 1


def test_labels_of_rewards_soft_and_drawn() -> None:
    extras = [{"rewards": [[0.0], [1.0]]}] * 2  # image 1 is better by one; it is the rejected of pair 0
    soft = dataset(extras, label="soft")
    assert soft.example(0, 0).p == pytest.approx(1 / (1 + torch.e))
    assert soft.example(1, 0).p == pytest.approx(torch.e / (1 + torch.e))
    assert torch.all(soft.example(0, 0).chosen == 1)  # which image is the chosen one stays
    assert dataset(extras, label="soft", temperature=0.001).example(0, 0).p == pytest.approx(0, abs=1e-9)
    drawn = dataset(extras, label="sampled")
    labels = [drawn.example(1, visit).p for visit in range(400)]
    assert set(labels) == {0.0, 1.0}
    assert sum(labels) / 400 == pytest.approx(torch.e / (1 + torch.e), abs=0.06)
    assert labels == [dataset(extras, label="sampled").example(1, visit).p for visit in range(400)]
    assert dataset(extras).example(1, 0).p == 1.0


# --- the cache -------------------------------------------------------------------------------------------------------


def full_lines(folder: Path) -> Path:
    np.save(folder / "w.npy", np.linspace(0, 1, 16).reshape(4, 4))
    lines = [
        {
            "prompts": [f"text {i}", f"another text {i}"],
            "image_0": f"{2 * i}.png",
            "image_1": f"{2 * i + 1}.png",
            "label_0": i % 2,
            "rewards": [[i / 10], [i / 20]],
            "aspect": i % 2,
            "maps": ["w.npy", [[i / 10]]],
        }
        for i in range(5)
    ]
    lines[4]["prompts"][1] = "far too long " * 30
    return write_jsonl(folder, lines)


@pytest.mark.parametrize("enabled", [True, False])
def test_facts_travel_through_the_cache_and_around_it(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, enabled: bool
) -> None:
    config = tiny_config(
        tmp_path / "run",
        data={"format": "jsonl", "sources": [str(full_lines(tmp_path))], "flip": True},
        cache={"enabled": enabled, "shard_size": 2, "dtype": "float32"},
    )
    prepared = prepare(config, family, Accelerator(cpu=True))
    data, report = prepared.data, prepared.report
    assert prepared.facts == set(facts.READ_BY_OBJECTIVES)
    assert report.notes["truncated_prompt"] == 1  # of an image that is not the chosen one
    assert [extra["aspect"] for extra in data.extras] == [0, 1, 0, 1, 0]
    ramp, flips = torch.linspace(0, 1, 16).reshape(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1), 0
    for i in range(5):
        pair = data.pair(i)
        assert pair.extra["rewards"] == [[i / 10], [i / 20]]
        assert pair.extra["prompts"][0] == f"text {i}"
        first, second = pair.extra["maps"]
        assert first.shape == second.shape == pair.latents[0].shape[-2:]
        torch.testing.assert_close(second, torch.full((8, 8), i / 10))
        mirrored = not torch.allclose(first, ramp, atol=1e-6)
        torch.testing.assert_close(first, ramp.flip(1) if mirrored else ramp)
        flips += mirrored
        for prompt in pair.extra["prompts"]:
            expected = family.encode_prompts([prompt])
            for name, value in data.text(prompt).items():
                torch.testing.assert_close(value, expected[name][0], atol=1e-5, rtol=0)
    assert 0 < flips < 5
    if enabled:
        again = prepare(config, family, Accelerator(cpu=True))
        assert (again.facts, len(again.data)) == (prepared.facts, 5)
        # What was lost with a file of prompts is encoded again, of both images.
        for path in config.cache_dir.glob("prompts-*.safetensors"):
            path.unlink()
        assert len(LatentCache(config.cache_dir).missing_prompts()) == 11
        assert prepare(config, family, Accelerator(cpu=True)).data.text("another text 0")


def test_a_map_that_cannot_be_read_costs_its_row(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily
) -> None:
    path = full_lines(tmp_path)
    (tmp_path / "w.npy").write_bytes(b"broken")
    lines = path.read_text().splitlines()
    plain = {key: value for key, value in json.loads(lines[0]).items() if key != "maps"}
    path.write_text("\n".join([json.dumps(plain), *lines[1:2]]) + "\n")
    config = tiny_config(tmp_path / "run", data={"format": "jsonl", "sources": [str(path)]})
    prepared = prepare(config, family, Accelerator(cpu=True))
    assert (len(prepared.data), dict(prepared.report.skipped)) == (1, {"bad_map": 1})
    assert prepared.facts == {"rewards", "aspect"}


def test_pairs_that_lack_what_the_objective_reads_are_refused_with_their_number(
    tiny_config: TinyConfig, tmp_path: Path, family: DenoisingFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickapic(tmp_path / "d", [scored(0.9, 0.1)] * 4 + [scored(None, None)] * 3)
    smpo = tiny_config(tmp_path / "a", data={"sources": [str(tmp_path / "d")]}, objective={"name": "smpo"})
    with pytest.raises(DataError, match=r"objective 'smpo' reads the rewards of every pair; 3 of 7 pairs have none"):
        prepare(smpo, family, Accelerator(cpu=True))
    with pytest.raises(DataError, match="3 of 7"):  # and so when the cache is there
        prepare(smpo, family, Accelerator(cpu=True))
    dpo = tiny_config(tmp_path / "a", data={"sources": [str(tmp_path / "d")]})
    prepared = prepare(dpo, family, Accelerator(cpu=True))
    assert prepared.facts == frozenset()
    labels = tiny_config(tmp_path / "a", data={"sources": [str(tmp_path / "d")], "label": "sampled"})
    with pytest.raises(DataError, match=r"data.label: sampled reads the rewards of every pair; 3 of 7"):
        prepare(labels, family, Accelerator(cpu=True))  # with the same cache: it does not depend on the label
    # Where none has it, that is said before all is encoded.
    pickapic(tmp_path / "e", [{}] * 9)
    none = tiny_config(tmp_path / "b", data={"sources": [str(tmp_path / "e")]}, objective={"name": "smpo"})
    monkeypatch.setattr(module, "EARLY", 5)
    with pytest.raises(DataError, match=r"reads the rewards of every pair; none of the first 5 has any"):
        prepare(none, family, Accelerator(cpu=True))
