"""Runs that train entries of the weights: resumed to the bit, read by the commands, refused where they mean nothing."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapters import quiet
from test_gates import assert_same_file, rows_of
from torch import Tensor, nn

from diffalign import adapters, checkpoint, commands, delta_files, export, measure, preflight, soups, sparse, trainer
from diffalign.config import RunConfig
from diffalign.config_loading import build, load_config
from diffalign.delta_layers import DeltaLayer
from diffalign.errors import CheckpointError, ConfigError
from diffalign.families import NETWORK
from diffalign.hardware import make_accelerator, open_denoising
from diffalign.jobs import image
from diffalign.plan import _Costs, make_plan
from diffalign.trainer import train

SARA = {"method": "sara", "threshold": 1e-2, "reselect_at": 2, "nuclear_norm": 1e-3}
LIFT = {"method": "lift", "rank": 4, "filter_rank": 8}


def made(tiny_config: Any, folder: Path, sparse: dict[str, Any], **changes: Any) -> RunConfig:
    training = {"max_train_steps": 3, "checkpointing_steps": 1} | changes.pop("training", {})
    config: RunConfig = tiny_config(folder, lora={"rank": 0}, sparse=sparse, training=training, **changes)
    return config


@pytest.mark.parametrize(
    ("sparse", "reference", "ema"),
    [
        (SARA, {}, 0.9),
        (LIFT, {"scheme": "pool", "every": 1}, None),
        ({"method": "hft", "targets": "attention"}, {"scheme": "sync", "every": 1, "rate": 0.5}, 0.9),
    ],
    ids=["sara", "lift", "hft"],
)
def test_a_run_resumes_to_the_bit(
    tiny_config: Any, tmp_path: Path, sparse: dict[str, Any], reference: dict[str, Any], ema: float | None
) -> None:
    def config(name: str, **training: Any) -> RunConfig:
        return made(tiny_config, tmp_path / name, sparse, reference=reference, training={"ema_decay": ema} | training)

    whole = train(config("whole")).run_dir
    for last in (1, 2, 3):  # re-selection is at the second
        again = {"resume_from_checkpoint": "latest"} if last > 1 else {}
        parts = train(config("parts", **({"max_train_steps": last} if last < 3 else {}), **again)).run_dir
    states = [checkpoint.load(folder / "checkpoint-000003", config(folder.name)) for folder in (whole, parts)]
    assert states[0].adapter.keys() == states[1].adapter.keys()
    assert all(torch.equal(value, states[1].adapter[key]) for key, value in states[0].adapter.items())
    assert any(value.any() for key, value in states[0].adapter.items() if ".delta_" in key)
    assert {value.dtype for key, value in states[0].adapter.items() if ".index_" in key} <= {torch.int32}
    assert rows_of(whole) == rows_of(parts)
    assert_same_file(whole / delta_files.FILE_NAME, parts / delta_files.FILE_NAME)
    assert ("reselection" in states[0].state["job"]) == ("reselect_at" in sparse)
    first = rows_of(whole)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6), "policy and reference are the base"
    assert ("nuclear_norm" in first) == ("nuclear_norm" in sparse)


def test_a_run_shares_its_places(tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[Any] = []
    monkeypatch.setattr("diffalign.sparse.share_places", lambda network, accelerator: shared.append(network))
    train(made(tiny_config, tmp_path, LIFT, training={"max_train_steps": 1}))
    assert len(shared) == 1


def test_the_penalty_is_in_the_gradient_and_in_a_metric_of_its_own(tiny_config: Any, tmp_path: Path) -> None:
    rows = []
    for weight in (0.0, 1e-3, 1.0):
        sparse = {"method": "sara", "threshold": 1e-2, "nuclear_norm": weight}
        config = made(tiny_config, tmp_path / f"{weight}", sparse, training={"max_train_steps": 1})
        rows.append(rows_of(train(config).run_dir)[0])
    assert rows[0]["loss"] == rows[1]["loss"] == rows[2]["loss"]
    assert "nuclear_norm" not in rows[0]
    assert rows[2]["nuclear_norm"] == pytest.approx(1000 * rows[1]["nuclear_norm"], rel=1e-4)
    assert rows[0]["grad_norm"] < rows[2]["grad_norm"]
    assert rows[1]["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=0.1)


def test_the_penalty_is_added_once_a_step_however_the_step_is_split(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    asked: list[int] = []
    norm, clip, loss = torch.linalg.matrix_norm, trainer.clip, image.ImageJob.loss

    def counted(*args: Any) -> Tensor:
        asked.append(1)
        return norm(*args)

    def caught(accelerator: Any, params: list[Any], max_norm: float) -> float:
        seen.append(torch.cat([p.grad.flatten() for p in params]))
        return clip(accelerator, params, max_norm)

    def of_one_less(self: Any, batch: Any) -> Any:
        out = loss(self, batch)
        return dataclasses.replace(out, per_item=out.per_item[1:])

    monkeypatch.setattr(torch.linalg, "matrix_norm", counted)
    monkeypatch.setattr(trainer, "clip", caught)
    added = []
    for number, (batch, accumulation, left_out) in enumerate([(4, 1, False), (1, 4, False), (2, 2, True)]):
        monkeypatch.setattr(image.ImageJob, "loss", of_one_less if left_out else loss)
        for weight in (0.0, 1.0):
            sparse = {"method": "sara", "threshold": 1e-2, "nuclear_norm": weight}
            training = {"max_train_steps": 1, "train_batch_size": batch, "gradient_accumulation_steps": accumulation}
            train(made(tiny_config, tmp_path / f"{number}-{weight}", sparse, training=training))
        assert len(asked) == number + 1
        added.append(seen[-1] - seen[-2])
    assert added[0].abs().max() > 0.1
    for other in added[1:]:
        torch.testing.assert_close(other, added[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sparse", [SARA | {"biases_and_norms": True}, LIFT], ids=["sara", "lift"])
def test_a_run_in_bfloat16_starts_at_the_base_and_keeps_values_in_float32(
    tiny_config: Any, tmp_path: Path, sparse: dict[str, Any]
) -> None:
    training = {"mixed_precision": "bf16", "gradient_checkpointing": True}
    run = train(made(tiny_config, tmp_path / "run", sparse, training=training)).run_dir
    rows = rows_of(run)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["loss"] != rows[0]["loss"]
    tensors, _ = export.read_file(run / delta_files.FILE_NAME, tensors=True)
    values = [value for key, value in tensors.items() if ".delta_" in key]
    assert {value.dtype for value in values} == {torch.float32}
    assert any(value.any() for value in values)


def test_what_a_run_leaves_is_read_by_the_commands(tiny_config: Any, tmp_path: Path) -> None:
    config = made(tiny_config, tmp_path / "run", LIFT, training={"ema_decay": 0.5})
    run = train(config).run_dir
    assert [path.name for path in run.glob("*.safetensors")] == [delta_files.FILE_NAME]
    card = (run / "README.md").read_text()
    assert "no LoRA and without a rank (LIFT: 4 (rows + columns)" in card
    assert 'load_lora(pipe.unet, "delta_weights.safetensors", family="sdxl")' in card
    assert "rank 16" not in card
    assert "rank 0" not in card
    pictures = {}
    for name, adapter in (("file", run), ("checkpoint", run / "checkpoint-000003")):
        out = tmp_path / name
        asked: dict[str, Any] = {"prompts": ["a red circle"], "seed": 0, "images_per_prompt": 1}
        commands.generate(config, adapter=adapter, with_base=True, out=out, **asked)
        sides = [(out / f"0000-0-{side}.png").read_bytes() for side in ("base", "adapter")]
        assert sides[0] != sides[1]
        pictures[name] = sides[1]
    assert pictures["file"] == pictures["checkpoint"], "both are the average"
    files = commands.export_adapter(config, run / "checkpoint-000003", tmp_path / "out", fp16=True)
    assert [file.name for file in files] == [delta_files.FILE_NAME, delta_files.COMFY_NAME]
    tensors, metadata = export.read_file(files[1], tensors=True)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert metadata["diffalign.family"] == "sdxl"
    # a mixture of two, and as the adapter of the negative branch beside a positive one
    mixed, scaled = (open_denoising(config, make_accelerator(config.training, config.output_dir)) for _ in range(2))
    for family in (mixed, scaled):
        family.load(NETWORK)
    soups.attach(mixed, config, [soups.Part(run, 0.25), soups.Part(run, 0.5)])
    export.load_lora(scaled.network, run, family="sdxl")
    adapters.use_adapters(scaled.network, ["default"], [0.75])
    torch.testing.assert_close(quiet(mixed.network), quiet(scaled.network), rtol=1e-4, atol=1e-5)
    commands.generate(config, adapter=run, with_base=False, negative_adapter=run, out=tmp_path / "both", **asked)
    guided, plain = (tmp_path / "both" / "0000-0-guided.png").read_bytes(), pictures["file"]
    assert guided != plain


def test_a_checkpoint_of_another_base_is_refused(tiny_config: Any, tmp_path: Path) -> None:
    config = made(tiny_config, tmp_path / "run", LIFT, training={"max_train_steps": 1})
    run = train(config).run_dir
    family = open_denoising(config, make_accelerator(config.training, config.output_dir))
    family.load(NETWORK)
    with torch.no_grad():
        family.network.mid_block.resnets[0].conv1.weight *= 1.5
    with pytest.raises(CheckpointError, match="chosen on other weights"):
        commands.load_adapter(family, config, run / "checkpoint-000001")


def test_a_negative_adapter_can_be_a_change_of_weights(tiny_config: Any, tmp_path: Path) -> None:
    config = made(tiny_config, tmp_path / "run", LIFT, negative={"train": "flip"}, training={"max_train_steps": 1})
    run = train(config).run_dir
    assert export.read_metadata(run)["diffalign.role"] == "negative"
    assert 'name="negative", negative=True)' in (run / "README.md").read_text()
    asked: dict[str, Any] = {"prompts": ["a red circle"], "seed": 0, "images_per_prompt": 1}
    commands.generate(config, adapter=run, with_base=True, out=tmp_path / "out", **asked)


# Refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"sparse": {"method": "sara"}, "training": {"train_batch_size": "auto"}},
            r"train_batch_size: got 'auto'.*number",
        ),
        ({"sparse": {"method": "sara"}, "training": {"gradient_checkpointing": "auto"}}, r"got 'auto'.*true or false"),
        ({"lora": {"rank": 4}}, r"lora\.rank: got 4; .*set it to 0"),
        ({"lora": {"rank": 0, "alpha": 8.0}}, r"lora\.alpha: got 8\.0; .*remove it"),
        ({"lora": {"rank": 0, "text_encoder_rank": 4}}, r"lora\.text_encoder_rank: got 4"),
        ({"lora": {"rank": 0, "dropout": 0.1}}, r"lora\.dropout: got 0\.1"),
        ({"users": {"encoder": "world_clip"}}, r"users\.encoder: got 'world_clip'"),
        ({"training": {"compile": True}}, r"training\.compile"),
        ({"sparse": {"method": "hft", "rank": 3}}, r"sparse\.rank: got 3; it has no effect"),
        ({"sparse": {"threshold": 1e-3}}, r"set sparse\.method"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    tiny_config: Any, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    plain = {"lora": {"rank": 0}, "sparse": LIFT}
    preflight.check(tiny_config(tmp_path, **plain))
    with pytest.raises(ConfigError, match=said):
        preflight.check(tiny_config(tmp_path, **plain | changes))


def test_a_choice_after_the_last_step_is_told(
    tiny_config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    preflight.check(made(tiny_config, tmp_path, {"method": "sara", "reselect_at": 3}))
    assert "training ends at step 3: entries are not chosen again" in caplog.text


@pytest.mark.parametrize("family", ["causal_lm", "clip_reward"])
def test_families_that_are_not_denoised_have_no_such_section(tmp_path: Path, family: str) -> None:
    model = {"family": family, "pretrained": "tiny-lm" if family == "causal_lm" else "tiny-clip"}
    objective = {"name": "dpo" if family == "causal_lm" else "pickscore"}
    tree = {"output_dir": str(tmp_path), "model": model, "objective": objective, "sparse": {"method": "hft"}}
    with pytest.raises(ConfigError, match=rf"sparse: has no effect on family '{family}'"):
        preflight.check(build(tree))


# Counts


def test_plans_count_what_is_known_from_shapes(tiny_config: Any, tmp_path: Path) -> None:
    base = made(tiny_config, tmp_path, LIFT)
    lift, sara = make_plan(base), make_plan(made(tiny_config, tmp_path, {"method": "sara"}))
    family = open_denoising(base, make_accelerator(base.training, base.output_dir))
    family.load(NETWORK)
    layers = adapters.base_layers(family.network)
    shapes = [layers[path].weight.shape for path in adapters.target_modules(family.network, "all")]
    expected = sum(min(4 * (s[0] + math.prod(s[1:])), math.prod(s)) for s in shapes)
    assert lift.network.lora_parameters == expected
    assert lift.network.forward_flops == lift.network.policy_forward_flops  # float32: one pass with the changed weight
    assert sara.network.lora_parameters == sum(math.prod(s) for s in shapes)
    assert any("the most there can be" in note for note in sara.notes)
    assert not any("SaRA" in note for note in lift.notes)
    assert (lift.sparse, lift.lora_rank) == ("LIFT rank 4 of rank 8 on all", 0)


def test_places_are_not_counted_for_every_image() -> None:
    network = DeltaLayer(nn.Linear(8, 8, device="meta"))
    network.add("default", "weight", torch.empty(5, dtype=torch.int32, device="meta"))
    network.set_adapter(["default"])
    places = network.index_weight["default"].untyped_storage()._cdata
    seen: list[int] = []

    def pack(x: Tensor) -> Tensor:
        seen.append(x.untyped_storage()._cdata)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        network(torch.empty(2, 8, device="meta"))
    assert places in seen, "autograd keeps them"
    assert places in {x.untyped_storage()._cdata for x in measure.resident(network)}


def test_counts_of_states_and_halves(tiny_config: Any, tmp_path: Path) -> None:
    def costs(sparse: dict[str, Any], **changes: Any) -> _Costs:
        return _Costs(made(tiny_config, tmp_path, sparse, **changes))

    lift = costs(LIFT)
    factored = [costs(sparse, training={"optimizer": "adafactor"}) for sparse in (LIFT, {"method": "hft"})]
    numbers = [one.network.lora_parameters for one in factored]
    assert [one.memory(1, False).adapter for one in factored] == [16 * numbers[0], 8 * numbers[1]]
    assert lift.memory(1, False).adapter == 20 * numbers[0]
    family = open_denoising(lift.config, make_accelerator(lift.config.training, lift.config.output_dir))
    for seed in range(4):
        hft = costs({"method": "hft"}, seed=seed)
        family.load(NETWORK)
        params = sparse.attach(family.network, hft.config.sparse, seed=seed)
        assert hft.network.lora_parameters == sum(p.numel() for p in params)
        family.unload(NETWORK)


def test_shipped_demos_are_in_order() -> None:
    for name in ("demo_sara", "demo_lift", "demo_hft"):
        config = load_config(name)
        assert config.sparse.method is not None
        assert config.lora.rank == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": {"rank": 4}}, r"lora\.rank: got 4"),
        ({"preference": {"rewards": ["world_taste:gil", "world_taste:dev"]}}, r"not on changed weights"),
        ({"objective": {"name": "chats"}, "negative": {"train": "joint"}}, r"halves of a LoRA"),
        ({"training": {"compile": True}}, r"training\.compile: got true"),
    ],
)
def test_changed_weights_go_with_no_other_adapter(
    tmp_path: Path, tiny_config: Any, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        preflight.check(tiny_config(tmp_path / "x", **({"lora": {"rank": 0}, "sparse": {"method": "hft"}} | changes)))
