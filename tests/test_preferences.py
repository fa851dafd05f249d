"""Weights of several rewards: labels of pairs, what the network sees, runs, and what is asked for at sampling."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny
from test_users import NAMES, last, network_of
from torch import Tensor

from diffalign import adapters, asked, cli, export, preferences, user_branches
from diffalign.config import LoraConfig, PreferenceConfig, UsersConfig
from diffalign.config_loading import dump, load_config
from diffalign.data.encode import EncodedPair
from diffalign.data.loader import BatchPlan, PairMicroBatches
from diffalign.data.prepare import prepare as prepare_data
from diffalign.errors import CheckpointError, ConfigError, DataError
from diffalign.families import NETWORK, load_family
from diffalign.hardware import make_accelerator
from diffalign.jobs.image import ImageJob
from diffalign.preflight import check
from diffalign.trainer import train
from diffalign.user_branches import Kind, UserGates, UserTime

TWO = PreferenceConfig(rewards=("bright", "dark"), dropout=0.0)


def pair(name: str, first: list[float], second: list[float], p: float = 1.0) -> EncodedPair:
    return EncodedPair(
        id=name,
        prompt=name,
        latents=(torch.full((1, 2, 2), 0.9), torch.full((1, 2, 2), 0.1)),
        p=p,
        weight=1.0,
        user=None,
        original_sizes=((8, 8), (8, 8)),
        crops=((0, 0), (0, 0)),
        target_size=(8, 8),
        extra={"rewards": [first, second]},
    )


def rows(count: int = 60, seed: int = 0, width: int = 2) -> list[dict[str, Any]]:
    draw = np.random.default_rng(seed)
    return [{"rewards": draw.normal(size=(2, width)).tolist()} for _ in range(count)]


def made(config: PreferenceConfig = TWO, seed: int = 0, extras: list[dict[str, Any]] | None = None) -> Any:
    extras = rows(width=len(config.rewards)) if extras is None else extras
    return preferences.prepare(extras, range(len(extras)), config, seed)[0]


# -- labels ------------------------------------------------------------------------------------------------------------


def test_weights_depend_on_seed_pair_and_visit_alone() -> None:
    one, other = made(), made()
    ahead = np.array([0.4, -0.3])
    drawn = [one.draw("a", visit, ahead)[0] for visit in range(40)]
    again = [other.draw("a", visit, ahead)[0] for visit in reversed(range(40))][::-1]
    assert all(np.array_equal(x, y) for x, y in zip(drawn, again, strict=True))
    assert len({tuple(w) for w in drawn}) == 40, "every visit has its own"
    assert not np.array_equal(one.draw("b", 0, ahead)[0], drawn[0])
    assert not np.array_equal(made(seed=1).draw("a", 0, ahead)[0], drawn[0])
    assert all(w.min() >= 0 and abs(w.sum() - 1) < 1e-12 for w in drawn)


def test_weights_are_spread_evenly_over_the_simplex_or_towards_its_corners() -> None:
    wide = np.full(3, 0.9)  # always decided
    three = replace(TWO, rewards=("a", "b", "c"))
    even = np.array([made(three).draw("x", visit, wide)[0] for visit in range(2000)])
    np.testing.assert_allclose(even.mean(0), 1 / 3, atol=0.02)
    np.testing.assert_allclose(even.var(0), 2 / 36, atol=0.006)  # (K - 1) / (K^2 (K + 1)) with K = 3
    corners = np.array([made(replace(three, concentration=0.2)).draw("x", visit, wide)[0] for visit in range(500)])
    assert corners.max(1).mean() > even.max(1).mean() + 0.15


def test_the_label_follows_the_weights() -> None:
    found = made(extras=[{"rewards": [[0.0, 1.0], [1.0, 0.0]]}] * 3)
    one = pair("a", [0.0, 1.0], [1.0, 0.0], p=1.0)
    labels = []
    for visit in range(60):
        judged, told = found.seen(one, visit)
        assert told is not None
        assert judged.p == float(told[1] > told[0]), "image 0 is the better one by the second reward"
        assert abs(float(told[0] - told[1])) >= 0.05 / 0.5 - 1e-6, "and by the margin"
        labels.append(judged.p)
    assert 0.3 < sum(labels) / 60 < 0.7, "the order changes from visit to visit"
    turned = pair("a", [1.0, 0.0], [0.0, 1.0])
    for visit in range(20):
        assert found.seen(turned, visit)[0].p == 1 - found.seen(one, visit)[0].p


def test_a_monotone_change_of_one_reward_changes_no_label_by_rank() -> None:
    plain = rows(80)
    bent = [{"rewards": [[np.exp(3 * a), b] for a, b in extra["rewards"]]} for extra in plain]
    for scale, same in (("rank", True), ("deviation", False)):
        config = replace(TWO, scale=scale)  # type: ignore[arg-type]
        one, other = made(config, extras=plain), made(config, extras=bent)
        found = []
        for number, (a, b) in enumerate(zip(plain, bent, strict=True)):
            first, second = (
                one.seen(pair(f"{number}", *a["rewards"]), 0),
                other.seen(pair(f"{number}", *b["rewards"]), 0),
            )
            found.append(first[0].p == second[0].p and torch.equal(first[1], second[1]))
        assert all(found) == same


def test_ranks_are_shares_of_training_images_with_less() -> None:
    known = np.array([[1.0], [2.0], [2.0], [4.0]])
    np.testing.assert_allclose(
        preferences.Scale("rank", known)(np.array([[0.0], [1.0], [2.0], [3.0], [9.0]]))[:, 0], [0, 0.125, 0.5, 0.75, 1]
    )
    np.testing.assert_allclose(preferences.Scale("deviation", known)(known), known / known.std())
    assert preferences.Scale("raw", known)(known) is known
    assert np.isfinite(preferences.Scale("deviation", np.ones((3, 1)))(np.ones((3, 1)))).all(), "a constant reward"


def test_pairs_that_say_little_get_other_weights_and_those_that_say_nothing_none() -> None:
    found = made(replace(TWO, margin=0.2))
    for visit in range(50):
        weights, _ = found.draw("a", visit, np.array([0.5, -0.1]))
        assert abs(0.5 * weights[0] - 0.1 * weights[1]) >= 0.2
        weights, _ = found.draw("a", visit, np.array([0.201, 0.0]))  # nearly a corner alone
        assert weights[0] * 0.201 >= 0.2
    assert found.useful(np.array([0.5, -0.1]))
    assert not found.useful(np.array([0.19, -0.19]))
    assert not made(replace(TWO, margin=0.0)).useful(np.zeros(2)), "equal images are no pair"
    fixed = made(replace(TWO, fixed=(0.5, 0.5), margin=0.1))
    assert not fixed.useful(np.array([0.5, -0.5]))
    assert fixed.useful(np.array([0.5, -0.2]))


def test_without_weights_pairs_are_judged_by_equal_ones() -> None:
    found = made(replace(TWO, dropout=0.4))
    extras = rows(200, seed=3)
    none = 0
    for number, extra in enumerate(extras):
        judged, told = found.seen(pair(f"{number}", *extra["rewards"], p=0.0), 0)
        if not told.any():
            none += 1
            ahead = found.ahead(extra["rewards"])
            assert judged.p == float(ahead.mean() > 0)
            assert abs(ahead.mean()) >= 0.05
        assert found.seen(pair(f"{number}", *extra["rewards"]), 0, measured=True)[1].any(), "measured with weights"
    assert 0.25 < none / 200 < 0.5


def test_rewards_need_names_and_names_rewards() -> None:
    with pytest.raises(DataError, match=r"2 names \(bright, dark\) for 3 rewards"):
        made(extras=rows(width=3))
    found = preferences.correlation(np.array([[1.0, 2.0], [-1.0, -2.0], [0.5, 1.0]]))
    assert found == [[1.0, 1.0], [1.0, 1.0]]
    assert preferences.correlation(np.array([[1.0, 0.0], [-1.0, 0.0]]))[0][1] == 0, "a constant one says nothing"


# -- what the network sees ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_vector_on_the_time_changes_every_network_and_starts_at_nothing(
    name: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    family, call = network_of(name, request, tmp_path_factory)
    base = call()
    branch = UserTime(family.network, width=3, hidden=8)
    who = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    with branch.given(who):
        assert torch.equal(call(), base), "the last layer starts at zero"
    draw = torch.Generator().manual_seed(1)
    branch.last.weight.copy_(0.5 * torch.randn(branch.last.weight.shape, generator=draw))
    branch.last.bias.copy_(torch.ones(len(branch.last.bias)))
    assert torch.equal(call(), base), "nobody was given"
    with branch.given(torch.zeros(2, 3)):
        assert torch.equal(call(), base), "no preference adds nothing, not even the bias"
    with branch.given(who):
        both = call()
        with adapters.adapters_off(family.network):
            assert torch.equal(call(), base), "the reference sees nothing"
    with branch.given(who.flip(0)):
        turned = call()
    assert (both - base).flatten(1).abs().amax(1).min() > 1e-4, "both rows changed"
    assert not torch.allclose(both, turned, atol=1e-4)
    with branch.given(2 * who[0]):  # by direction
        torch.testing.assert_close(call()[0], both[0], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_hidden_units_of_gates_leave_nobody_the_plain_lora(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    family, call = network_of("sdxl", request, tmp_path_factory)
    adapters.attach(family.network, LoraConfig(rank=3, targets="all"))
    draw = torch.Generator().manual_seed(5)
    for path, value in family.network.named_parameters():
        if "lora_B" in path:
            value.copy_(0.2 * torch.randn(value.shape, generator=draw))
    shared = call()
    branch = UserGates(family.network, width=2, hidden=8)
    p = torch.tensor([[1.0, 0.0], [0.3, 0.7]])
    with branch.given(p):
        assert torch.equal(call(), shared), "gates start at 1"
    for layer in branch.gates:
        layer.weight.copy_(0.5 * torch.randn(layer.weight.shape, generator=draw))
    with branch.given(torch.zeros(2, 2)):
        torch.testing.assert_close(call(), shared)
    with branch.given(p):
        found = call()
    assert (found - shared).flatten(1).abs().amax(1).min() > 1e-5
    hidden = torch.nn.functional.silu(branch.first(torch.tensor([[2**0.5, 0.0]])))
    with branch.given(p[:1]):
        torch.testing.assert_close(branch.gates[0](hidden)[0], hidden[0] @ branch.gates[0].weight.T)


@torch.no_grad()
def test_ranks_dealt_out_to_rewards_are_a_sum_of_adapters_by_weight(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    family, call = network_of("sdxl", request, tmp_path_factory)
    base = call()
    adapters.attach(family.network, LoraConfig(rank=5, alpha=3.0, targets="all"))
    branch = UserGates(family.network, width=2, hidden=8, shares=True)
    p = torch.tensor([[0.7, 0.3]])
    with branch.given(p):
        assert torch.equal(call(), base), "while B is zero nothing depends on the weights"
    draw = torch.Generator().manual_seed(5)
    layers: dict[str, Any] = dict(adapters.lora_layers(family.network))
    for layer in layers.values():
        layer.lora_B["default"].weight.copy_(0.2 * torch.randn(layer.lora_B["default"].weight.shape, generator=draw))
    plain = call()
    for told in (torch.tensor([0.5, 0.5]), torch.zeros(2)):
        with branch.given(told):
            torch.testing.assert_close(call(), plain, rtol=1e-4, atol=1e-5)  # equal weights are no preference
    layer = next(layer for layer in layers.values() if isinstance(layer.base_layer, torch.nn.Linear))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(1, 3, a.shape[1], generator=draw)
    with branch.given(p):
        found = layer(x) - layer.base_layer(x)
    parts = [b[:, k::2] @ a[k::2] for k in (0, 1)]
    wanted = x @ (2 * 0.7 * parts[0] + 2 * 0.3 * parts[1]).T * 3.0 / 5
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    other, _ = network_of("sdxl", request, tmp_path_factory)
    adapters.attach(other.network, LoraConfig(rank=5))
    with pytest.raises(ConfigError, match="at least one for each of 6 rewards"):
        UserGates(other.network, width=6, shares=True)


@pytest.mark.parametrize("through", ["gates", "time", "attention"])
def test_a_file_makes_the_same_module_with_its_names(
    through: Any, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    family, call = network_of("sdxl", request, tmp_path_factory)
    if through != "attention":
        adapters.attach(family.network, LoraConfig(rank=3, targets="all"))
    kind = Kind(through, 2, tokens=2, token_size=8, hidden=8, shares=through == "gates", names=("a", "b"))
    branch = kind.attach(family.network)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in family.network.named_parameters():
            if "lora_B" in name or "user_branch" in name:
                value.copy_(0.2 * torch.randn(value.shape, generator=draw))
    user_branches.save(branch, tmp_path / user_branches.FILE_NAME, {"family": "sdxl"})
    if through != "attention":
        export.save_lora(family.network, None, tmp_path, family="sdxl")
    told = torch.tensor([0.7, 0.3])
    with torch.no_grad(), branch.given(told):
        wanted = call()
    other, again = network_of("sdxl", request, tmp_path_factory)
    loaded = user_branches.load(other.network, tmp_path)
    assert loaded.names == ("a", "b")
    with torch.no_grad(), loaded.given(told):
        torch.testing.assert_close(again(), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="got 3 weights; this adapter was trained on 2 rewards: a, b"):
        loaded.seat(torch.ones(3))
    if through == "time":
        elsewhere, _ = network_of("sd3", request, tmp_path_factory)
        with pytest.raises(CheckpointError):
            user_branches.load(elsewhere.network, tmp_path)


# -- what is asked for -------------------------------------------------------------------------------------------------


def test_weights_are_read_by_place_or_by_name() -> None:
    names = ("outlined", "pastel", "bold")
    assert preferences.parse("0.2, 0.3,0.5", names).tolist() == pytest.approx([0.2, 0.3, 0.5])
    assert preferences.parse("bold=0.75,outlined=0.25", names).tolist() == [0.25, 0.0, 0.75]
    assert preferences.said([0.5, 0.5], ("a", "b")) == "0.5 a, 0.5 b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5,0.5", "expected 3 weights >= 0 with sum 1, of outlined, pastel, bold; these are 2"),
        ("0.5,0.2,0.2", "their sum is 0.9"),
        ("1.5,-0.5,0", "one is negative"),
        ("nan,0.5,0.5", "sum is nan"),
        ("a,0,1", "'a' is no number"),
        ("blue=1", "'blue' is no reward"),
        ("bold=0.5,bold=0.5", "'bold' is named twice"),
    ],
)
def test_weights_that_mean_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preferences.parse(text, ("outlined", "pastel", "bold"))


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shades(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of a bright and a dark picture; the first reward likes bright ones, the second dark ones."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("shades")
    rng, lines = np.random.default_rng(0), []
    for i in range(30):
        pictures = [rng.integers(low, low + 60, (32, 32, 3), dtype=np.uint8) for low in (20, 180)]
        names = [f"{i}-dark.png", f"{i}-bright.png"]
        for name, picture in zip(names, pictures, strict=True):
            Image.fromarray(picture).save(folder / name)
        rewards = [[float(p.mean()) / 255, 1 - float(p.mean()) / 255] for p in pictures]
        order = (1, 0) if i % 3 else (0, 1)  # the label is a third judge's
        row = {"prompt": f"a picture of thing {i}", "chosen": names[order[0]], "rejected": names[order[1]]}
        lines.append(json.dumps(row | {"rewards": [rewards[k] for k in order]}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder


LOOKS = {
    "prompts": ["a red circle", "a blue square"],
    "num_prompts": 2,
    "held_out_fraction": 0.3,
    "rewards": ["jpeg_compressibility", "jpeg_incompressibility"],
}


@pytest.fixture
def weighed(tmp_path: Path, tiny_config: Any, shades: Path) -> Any:
    """Runs on pairs that two rewards judge."""

    def run(name: str, **changes: Any) -> Any:
        section = {"rewards": ["bright", "dark"], "hidden": 16}
        section |= changes.pop("preference", {})
        ties = "soft" if section["rewards"] else "drop"
        return tiny_config(
            tmp_path / name,
            data={"format": "jsonl", "sources": [str(shades / "train.jsonl")], "ties": ties} | changes.pop("data", {}),
            preference={key: value for key, value in section.items() if value is not None},
            **changes,
        )

    return run


STEPS = {"max_train_steps": 60, "train_batch_size": 6, "learning_rate": 3e-3}


def pictures(config: Any, folder: Path, told: list[Tensor | None]) -> list[Tensor]:
    from diffalign.sampling import Sampler

    family: Any = load_family(config.model)
    sampler = Sampler(family, LOOKS["prompts"], config.sampling, 32)  # type: ignore[arg-type]
    family.load(NETWORK)
    user_branches.load(family.network, folder)
    found = []
    for one in told:
        sampler.users = None if one is None else one.expand(2, -1)
        found.append(sampler.images([0, 1], seed=0).float() / 255)
    return found


@pytest.mark.parametrize("through", ["gates", "time"])
def test_one_adapter_learns_both_ends_and_is_asked_for_either(weighed: Any, through: str, own_logging: None) -> None:
    config = weighed(
        "run", preference={"through": through}, lora={"rank": 4, "targets": "all"}, evaluation=LOOKS, training=STEPS
    )
    folder = train(config).run_dir
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4), "step 0 is the base, whatever the weights"
    result = json.loads((folder / "result.json").read_text())["preference"]
    assert result["rewards"] == ["bright", "dark"]
    assert result["correlation"][0][1] == pytest.approx(-1, abs=0.1)
    for entry, own, other in zip(result["held_out"], ("bright", "dark"), ("dark", "bright"), strict=True):
        assert entry[own]["accuracy"] > 0.8, "told what is wanted, it is ranked first"
        assert entry[other]["accuracy"] < 0.2
    bright, dark = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    one, same, two = pictures(config, folder, [bright, bright, dark])
    assert torch.equal(one, same)
    assert one.mean() > two.mean() + 0.01, "swapped weights, swapped pictures"
    assert any(key.startswith("user_branch.") for key in last(folder))
    header = export.read_file(folder / export.FILE_NAME)[1]
    assert header["diffalign.preference"] == "bright, dark"
    assert header["diffalign.role"] == "positive", "alone it is for no preference"
    card = (folder / "README.md").read_text()
    assert "bright, dark" in card
    compile(card.partition("```python\n")[2].partition("```")[0], "snippet", "exec")
    assert "bright" in (folder / "report.html").read_text()

    out = folder.parent / "images"
    words = ["generate", str(folder), "--preference", "1,0", "--preference", "dark=1", "--base", "--out", str(out)]
    assert cli.main(words) == 0
    lines = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert [line["side"] for line in lines] == ["base"] * 2 + ["preference-1-0"] * 2 + ["preference-0-1"] * 2
    assert lines[-1]["preference"] == {"bright": 0.0, "dark": 1.0}
    from PIL import Image

    with Image.open(out / "grid.png") as grid:
        assert grid.size == (64, 96), "a row each"
    assert cli.main(["evaluate", str(folder), "--preference", "0.3,0.7", "--out", str(out / "e.json")]) == 0
    told = json.loads((out / "e.json").read_text())
    assert told["preference"] == {"bright": 0.3, "dark": 0.7}
    assert told["held_out_implicit_acc"] > 0.8
    assert cli.main(["pareto", str(folder), "--preferences", "3", "--out", str(out / "front")]) == 0
    points = json.loads((out / "front.json").read_text())["points"]
    assert [(p["kind"], p["weights"]) for p in points[1:]] == [
        ("preference", [0.0, 1.0]),
        ("preference", [0.5, 0.5]),
        ("preference", [1.0, 0.0]),
    ]
    assert points[1]["scores"] != points[3]["scores"]


def test_fronts_of_several_ways_are_measured_apart(weighed: Any, tmp_path: Path, own_logging: None) -> None:
    lora = {"rank": 4, "targets": "all"}
    plain = {**STEPS, "max_train_steps": 8}
    told = train(weighed("told", lora=lora, evaluation=LOOKS, training=STEPS)).run_dir
    ends = [
        train(
            weighed(f"end{k}", preference={"fixed": fixed, "hidden": None}, lora=lora, evaluation=LOOKS, training=plain)
        ).run_dir
        for k, fixed in enumerate(([1, 0], [0, 1]))
    ]
    alone = ["pareto", str(told), "--preferences", "2", "--out", str(tmp_path / "alone")]
    assert cli.main(alone) == 0
    both = [*alone[:-1], str(tmp_path / "both"), "--points", "2", "--adapter", str(ends[0]), "--adapter", str(ends[1])]
    assert cli.main([*both, "--runs", str(ends[1])]) == 0
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "both"))
    kinds = [point["kind"] for point in second["points"]]
    assert kinds == ["base", "mixture", "mixture", "run", "preference", "preference"]
    assert second["points"][0]["scores"] == first["points"][0]["scores"]
    assert [p["scores"] for p in second["points"][4:]] == [p["scores"] for p in first["points"][1:]], (
        "soups stay out of it"
    )
    assert second["points"][1]["scores"] == second["points"][3]["scores"]
    assert set(second["area"]) == {"mixture", "run", "preference"}
    assert "told weights" in (tmp_path / "both.html").read_text()


def batches(config: Any, k: int = 0) -> Any:
    """Micro-batch k as a run of this configuration sees it."""
    family: Any = load_family(config.model)
    accelerator = make_accelerator(config.training, config.output_dir)
    prepared = prepare_data(config, family, accelerator)
    kept = range(len(prepared.data))
    own = None
    if config.preference.rewards:
        own = preferences.prepare(prepared.data.extras, kept, config.preference, config.seed)[0]
    plan = BatchPlan(kept, prepared.data.target_sizes, config.training.train_batch_size, config.seed)
    dataset = PairMicroBatches(prepared.data, plan, config.denoising, family, config.seed, preferences=own)
    return dataset[k], dataset


def test_one_reward_alone_is_training_on_its_labels(weighed: Any) -> None:
    plain, _ = batches(weighed("labels", preference={"rewards": None, "hidden": None}, data={"label_from": "rewards"}))
    fixed, _ = batches(weighed("fixed", preference={"fixed": [1, 0], "hidden": None}))
    other, _ = batches(weighed("other", preference={"fixed": [0, 1], "hidden": None}))
    assert plain.ids == fixed.ids
    for name in ("chosen", "rejected", "t", "noise", "p"):
        assert torch.equal(getattr(plain, name), getattr(fixed, name)), name
    assert "user" not in fixed.text, "the network sees nothing of fixed weights"
    assert torch.equal(fixed.chosen, other.rejected), "these two rewards want opposite things"
    assert fixed.chosen.abs().sum() > 0


def test_micro_batches_do_not_matter(weighed: Any) -> None:
    whole, dataset = batches(weighed("whole", training={"train_batch_size": 6}))
    parts = [batches(weighed("whole", training={"train_batch_size": 2}), k)[0] for k in range(3)]
    assert sum((part.ids for part in parts), ()) == whole.ids
    for read in (lambda b: b.text["user"], lambda b: b.chosen, lambda b: b.noise):
        assert torch.equal(torch.cat([read(part) for part in parts]), read(whole))
    assert len({tuple(row.tolist()) for row in whole.text["user"]}) > 3, "rows have weights of their own"
    for conditioning in (whole.chosen_conditioning, whole.rejected_conditioning):
        assert torch.equal(conditioning["user"], whole.text["user"]), "both images of a pair are told the same"
    one, later = dataset.example(0, 0), dataset.example(0, 1)
    assert not torch.equal(one.text["user"], later.text["user"])


def test_a_run_resumes_to_the_same_adapter(weighed: Any) -> None:
    steps = {"max_train_steps": 4, "checkpointing_steps": 2}
    lora = {"rank": 2, "targets": "all"}
    whole = train(weighed("whole", lora=lora, training=steps))
    train(weighed("cut", lora=lora, training=steps | {"max_train_steps": 2}))
    ended = train(weighed("cut", lora=lora, training=steps | {"resume_from_checkpoint": "latest"}))
    one, other = last(whole.run_dir), last(ended.run_dir)
    assert any(name.startswith("user_branch.") for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_fixed_weights_leave_a_plain_lora(weighed: Any, capsys: pytest.CaptureFixture[str], own_logging: None) -> None:
    config = weighed(
        "run", preference={"fixed": [0.7, 0.3], "hidden": None}, evaluation=LOOKS, training={"max_train_steps": 1}
    )
    folder = train(config).run_dir
    assert not (folder / user_branches.FILE_NAME).exists()
    assert export.read_file(folder / export.FILE_NAME)[1]["diffalign.preference"] == "0.7 bright, 0.3 dark"
    assert "0.7 bright, 0.3 dark" in (folder / "README.md").read_text()
    assert json.loads((folder / "result.json").read_text())["preference"]["fixed"] == [0.7, 0.3]
    assert cli.main(["generate", str(folder), "--preference", "1,0", "--out", str(folder / "g")]) == 2
    assert "fixed weights [0.7, 0.3]" in capsys.readouterr().err


def test_pairs_that_no_weights_decide_are_counted(weighed: Any) -> None:
    folder = train(weighed("run", preference={"margin": 0.5}, training={"max_train_steps": 1})).run_dir
    report = json.loads((folder / "data_report.json").read_text())
    left_out = report["skipped"]["undecided_preference"]
    assert 0 < left_out["count"] == len(left_out["listed"]) < 30
    assert not left_out["unusable"], "a rule of the configuration took them out"
    assert "differences" in left_out["listed"][0]["detail"]
    with pytest.raises(DataError, match="decided by that much"):
        train(weighed("none", preference={"margin": 1.0}, training={"max_train_steps": 1}))


def test_evaluation_asks_for_equal_weights(weighed: Any) -> None:
    config = weighed("x", evaluation=LOOKS)
    found = asked.asked(config, Path("run"), [], [])
    assert [one.embedding.tolist() for one in found] == [[0.5, 0.5]]
    job = ImageJob.__new__(ImageJob)
    assert job.preferences is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preference": {"rewards": None, "margin": 0.1, "hidden": None}}, "set preference.rewards"),
        (
            {"preference": {"fixed": [0.5, 0.5], "dropout": 0.2, "hidden": None}},
            "dropout: has no effect with preference.fixed",
        ),
        ({"preference": {"through": "attention"}}, "hidden: has no effect with preference.through: attention"),
        ({"lora": {"init": "orthogonal"}}, "only 'gaussian' and 'default' start at the base"),
        ({"preference": {"through": "attention", "hidden": None}}, "set it to 0, or preference.through to gates"),
        ({"lora": {"rank": 1}}, "each of 2 rewards needs a rank of its own"),
        ({"lora": {"rank": 0}}, "'gates', which weigh the ranks of a LoRA, and lora.rank is 0"),
        ({"preference": {"through": "time"}, "lora": {"rank": 0}}, "'time', which act beside a LoRA"),
        ({"lora": {"use_dora": True, "rank": 2}}, "lora.use_dora: got True; with section 'preference'"),
        ({"training": {"compile": True}}, "training.compile: with preference.through 'gates'"),
        ({"negative": {"train": "flip"}}, "negative.train: got 'flip', and preference.rewards judge"),
        ({"data": {"label": "soft"}}, "data.label: got 'soft'"),
        ({"data": {"label_from": "majority"}}, "data.label_from: got 'majority'"),
        ({"users": {"encoder": "world_clip", "through": "gates"}}, "users.encoder: got 'world_clip'"),
        ({"objective": {"name": "modpo", "beta": 10}}, "'modpo' reads rewards itself"),
        ({"data": {"format": "image_preferences"}}, "have no rewards; expected 'jsonl' or 'pickapic'"),
        (
            {"rollout": {"rewards": ["jpeg_compressibility"], "samples_per_prompt": 2}},
            "sampled images here, which have no pairs",
        ),
    ],
)
def test_what_does_not_go_with_preferences_is_refused(weighed: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(weighed("x", **changes))


def test_numbers_that_mean_nothing_are_refused() -> None:
    two = ("a", "b")
    for changes, message in (
        ({"rewards": ("a",)}, "at least two different names"),
        ({"rewards": ("a", "a")}, "at least two different names"),
        ({"rewards": two, "fixed": (0.5,)}, "for each of 2 rewards"),
        ({"rewards": two, "fixed": (0.5, 0.6)}, "with sum 1"),
        ({"rewards": two, "fixed": (-0.5, 1.5)}, "a weight >= 0"),
        ({"fixed": (0.5, 0.5)}, "for each of 0 rewards"),
        ({"concentration": 0.0}, "concentration is 0"),
        ({"dropout": 1.0}, "dropout is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            PreferenceConfig(**changes)  # type: ignore[arg-type]
    assert UsersConfig().through == "attention"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "--preference", "1,0"], "this run was not trained on preferences"),
        (["generate", "--user", "ann"], "this run was not trained on users"),
        (["pareto", "--preferences", "3"], "has none that its network sees"),
        (["evaluate", "--adapter", "x", "--preference", "1,0", "--preference", "0,1"], "expected one (pareto"),
    ],
)
def test_runs_that_see_nothing_cannot_be_asked(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], own_logging: None
) -> None:
    assert cli.main([words[0], "demo_dpo", *words[1:]]) == 2
    assert message in capsys.readouterr().err


def test_a_config_alone_has_no_adapter_to_ask(
    weighed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], own_logging: None
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump(weighed("x", evaluation=LOOKS)))
    assert cli.main(["generate", str(file), "--preference", "1,0"]) == 2
    assert "give its run folder" in capsys.readouterr().err
    assert cli.main(["pareto", str(file), "--preferences", "3"]) == 2
    assert "the run folder of a run with preference.rewards" in capsys.readouterr().err


@pytest.mark.parametrize("through", ["gates", "time", "attention"])
def test_plans_count_the_module(through: Any) -> None:
    from diffalign.plan import make_plan
    from diffalign.plan_text import render

    rank = 0 if through == "attention" else 16
    config = load_config("demo_preference", [f"preference.through={through}", f"lora.rank={rank}"])
    plan = make_plan(config)
    family: Any = load_family(config.model)
    family.load(NETWORK)
    more = 0
    if rank:
        adapters.attach(family.network, config.lora)
        more = adapters.count(family.network, "default")[1]
    kind = user_branches.wanted(config)
    assert kind is not None
    branch = kind.attach(family.network)
    assert plan.network.lora_parameters == more + sum(p.numel() for p in branch.parameters())
    assert "by 2 rewards" in render(plan)


def test_the_recipe_passes_what_is_checked_before_weights_load(tmp_path: Path) -> None:
    check(load_config("demo_preference", [f"output_dir={tmp_path}"]))
    two = [f"output_dir={tmp_path}", "preference.rewards=[gil, dev]", "data.world_pairs.rewards=[gil, dev]"]
    with pytest.raises(ConfigError, match=r"data\.ties: got 'drop'.*set it to 'soft'"):
        check(load_config("demo_dpo", two))
    two.append("data.ties=soft")
    for name in (
        "demo_dpo",
        "demo_sft",
        "demo_ipo",
        "demo_sdpo",
    ):  # pairs, winners alone, with and without a log-sigmoid
        check(load_config(name, two))
    with pytest.raises(ConfigError, match=r"data\.world_pairs\.rewards are"):
        check(load_config("demo_preference", [f"output_dir={tmp_path}", "preference.rewards=[a, b]"]))


assert tiny.FIXTURES, "the families' fixtures are those of tests/families"
