"""Adapters added up by weight, and fronts of several preferences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign import adapters, cli, export, pareto, soups
from diffalign.config import LoraConfig
from diffalign.errors import ConfigError
from diffalign.families import NETWORK, load_family

PROMPTS = ["a small red circle on a black background", "a large blue square"]
LOOKS = {"prompts": PROMPTS, "num_prompts": 2, "rewards": ["jpeg_compressibility", "jpeg_incompressibility"]}


@pytest.fixture
def made(tmp_path: Path, tiny_config: Any) -> tuple[Any, list[Path]]:
    """A config, and two adapters of other ranks, scales and targets."""
    config = tiny_config(tmp_path / "run", evaluation=LOOKS)
    folders = []
    for number, lora in enumerate((LoraConfig(rank=2, alpha=3.0), LoraConfig(rank=3, alpha=1.0, targets="all"))):
        family = load_family(config.model)
        family.load(NETWORK)
        adapters.attach(family.network, lora)
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, value in family.network.named_parameters():
                if "lora_B" in name:
                    value.copy_(0.3 * torch.randn(value.shape, generator=draw))
        export.save_lora(family.network, None, tmp_path / f"part{number}", family="sdxl")
        folders.append(tmp_path / f"part{number}")
    return config, folders


def deltas(config: Any, folder: Path) -> dict[str, torch.Tensor]:
    family = load_family(config.model)
    family.load(NETWORK)
    export.load_lora(family.network, folder, family="sdxl")
    return adapters.delta_weights(family.network)


def test_a_merged_file_is_the_sum_of_the_changes(made: tuple[Any, list[Path]], tmp_path: Path) -> None:
    config, (one, other) = made
    from diffalign.config_loading import dump

    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    command = [
        "merge",
        str(file),
        "--adapter",
        f"{one}=0.7",
        "--adapter",
        f"{other}=-0.4",
        "--out",
        str(tmp_path / "m"),
    ]
    assert cli.main(command) == 0
    merged, a, b = deltas(config, tmp_path / "m"), deltas(config, one), deltas(config, other)
    assert merged.keys() == a.keys() | b.keys()
    assert a.keys() < b.keys(), "one adapter has layers that the other has not"
    for path, value in merged.items():
        wanted = -0.4 * b[path] + (0.7 * a[path] if path in a else 0)
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
    assert export.read_file(tmp_path / "m" / export.FILE_NAME)[1]["diffalign.merged"] == "0.7 part0 + -0.4 part1"


def test_a_mixture_predicts_what_its_merged_adapter_predicts(made: tuple[Any, list[Path]]) -> None:
    config, folders = made
    family = load_family(config.model)
    family.load(NETWORK)
    parts = [soups.Part(folders[0], 0.3), soups.Part(folders[1], 0.9)]
    names, role = soups.attach(family, config, parts)
    assert role == "positive"
    sample, t = torch.randn(2, *sample_shape(family), generator=torch.Generator().manual_seed(0)), torch.tensor(300)
    text, more = conditioning(family)

    def predicted() -> torch.Tensor:
        with torch.no_grad():
            return family.network(sample, t, text, added_cond_kwargs=more, return_dict=False)[0]

    together = predicted()
    merged = soups.merge(family.network, names, [0.3, 0.9])
    adapters.use_adapters(family.network, [merged], [1.0])
    torch.testing.assert_close(predicted(), together, rtol=1e-3, atol=1e-4)
    pareto.mixture(family.network, names, [1.0, 0.0])
    alone = predicted()
    assert not torch.allclose(alone, together, atol=1e-2)
    pareto.mixture(family.network, names, [0.3, 0.9])
    torch.testing.assert_close(predicted(), together, rtol=1e-4, atol=1e-5)


def sample_shape(family: Any) -> tuple[int, int, int]:
    config = family.network.config
    return int(config.in_channels), 8, 8


def conditioning(family: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    config, draw = family.network.config, torch.Generator().manual_seed(1)
    text = torch.randn(2, 5, config.cross_attention_dim, generator=draw)
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return text, {"text_embeds": torch.randn(2, width, generator=draw), "time_ids": torch.full((2, 6), 32.0)}


def test_mixtures_cover_the_simplex() -> None:
    assert soups.simplex(2, 5) == [(0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25), (1.0, 0.0)]
    three = soups.simplex(3, 3)
    assert len(three) == len(set(three)) == 6
    assert all(sum(weights) == pytest.approx(1) for weights in three)
    assert (0.0, 0.5, 0.5) in three
    with pytest.raises(ConfigError, match="at least 2 of each"):
        soups.simplex(2, 1)


def test_what_is_dominated_and_the_area_of_a_front() -> None:
    points = [(0.0, 1.0), (0.5, 0.5), (0.4, 0.4), (1.0, 0.0), (0.5, 0.5)]
    assert pareto.dominated(points) == [False, False, True, False, False]
    assert pareto.area([(1.0, 2.0), (3.0, 1.0)], (0.0, 0.0)) == pytest.approx(1 * 2 + 2 * 1)
    assert pareto.area([(1.0, 2.0), (3.0, 1.0), (0.5, 0.5)], (0.0, 0.0)) == pytest.approx(4.0), "dominated adds nothing"
    assert pareto.area([(-1.0, 2.0), (2.0, -1.0)], (0.0, 0.0)) == 0.0


def test_a_front_is_measured_and_drawn(made: tuple[Any, list[Path]], tmp_path: Path) -> None:
    from diffalign.config_loading import dump

    config, (one, other) = made
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    command = ["pareto", str(file), "--adapter", str(one), "--adapter", str(other), "--points", "3"]
    assert cli.main([*command, "--runs", str(other), "--out", str(tmp_path / "front")]) == 0
    data = json.loads((tmp_path / "front.json").read_text())
    kinds = [point["kind"] for point in data["points"]]
    assert kinds == ["base", "mixture", "mixture", "mixture", "run"]
    by_weights = {tuple(point["weights"]): point for point in data["points"] if point["kind"] == "mixture"}
    assert by_weights[0.0, 1.0]["scores"] == data["points"][-1]["scores"], "all weight on one adapter is that adapter"
    assert by_weights[0.5, 0.5]["scores"] != by_weights[1.0, 0.0]["scores"]
    base = data["points"][0]
    assert base["gains"]["jpeg_compressibility"][0] == 0
    assert set(data["area"]) == {"mixture", "run"}
    page = (tmp_path / "front.html").read_text()
    assert "<svg" in page
    assert "0.5 0.5" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge", "--adapter", "a=1", "--out", "x"], "expected at least two"),
        (["merge", "--adapter", "a=much", "--adapter", "b", "--out", "x"], "PATH=WEIGHT with a number"),
        (["pareto", "--adapter", "a"], "needs two or more"),
        (["pareto"], "nothing to measure"),
    ],
)
def test_what_cannot_be_mixed_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], own_logging: None
) -> None:
    assert cli.main([words[0], "demo_dpo", *words[1:]]) == 2
    assert message in capsys.readouterr().err


def test_adapters_that_do_not_add_up_are_refused(tmp_path: Path, tiny_config: Any) -> None:
    config = tiny_config(tmp_path / "x")
    family = load_family(config.model)
    family.load(NETWORK)
    adapters.attach(family.network, LoraConfig(rank=2, use_dora=True))
    export.save_lora(family.network, None, tmp_path / "dora", family="sdxl")
    fresh = load_family(config.model)
    fresh.load(NETWORK)
    with pytest.raises(ConfigError, match="magnitudes do not add up"):
        soups.attach(fresh, config, [soups.Part(tmp_path / "dora")])


def test_adapters_for_different_branches_do_not_mix(
    made: tuple[Any, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str], own_logging: None
) -> None:
    from diffalign.config_loading import dump

    config, (one, _) = made
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    for name in ("bad", "worse"):
        family = load_family(config.model)
        family.load(NETWORK)
        adapters.attach(family.network, LoraConfig(rank=2))
        export.save_lora(family.network, None, tmp_path / name, family="sdxl", metadata={"role": "negative"})
    bad, worse = str(tmp_path / "bad"), str(tmp_path / "worse")
    both = ["--adapter", f"{bad}=1", "--adapter"]
    assert cli.main(["merge", str(file), *both, f"{one}=1", "--out", str(tmp_path / "m")]) == 2
    assert "different branches of guidance" in capsys.readouterr().err
    assert cli.main(["merge", str(file), *both, f"{worse}=1", "--out", str(tmp_path / "m")]) == 0
    assert export.read_file(tmp_path / "m" / export.FILE_NAME)[1]["diffalign.role"] == "negative"
    assert cli.main(["pareto", str(file), "--adapter", bad, "--adapter", worse, "--out", str(tmp_path / "f")]) == 2
    assert "would act in both" in capsys.readouterr().err
