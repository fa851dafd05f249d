"""Gates over frozen experts: what they compute, what they train, and that a run, a file and a reference know them."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from diffalign import adapters, checkpoint, commands, export, gates, preflight
from diffalign.config import LoraConfig, RunConfig
from diffalign.config_loading import build
from diffalign.errors import CheckpointError, ConfigError, UserError
from diffalign.gates import Gates, load_gated
from diffalign.metrics import read_rows
from diffalign.trainer import train
from diffalign.world.bases import build_untrained

T = torch.tensor([700, 300])


@pytest.fixture(scope="module")
def base() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return build_untrained().unet.requires_grad_(False)


@torch.no_grad()
def write_expert(folder: Path, base: UNet2DConditionModel, seed: int, **settings: Any) -> str:
    """A LoRA file with random factors, as after training."""
    network = copy.deepcopy(base)
    config = LoraConfig(**({"rank": 2, "alpha": 3.0} | settings))
    adapters.attach(network, config, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    for parameter in adapters.parameters(network):
        parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    export.save_lora(network, config, folder, family="sdxl")
    return str(folder)


@pytest.fixture(scope="module")
def experts(base: UNet2DConditionModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two run folders: other ranks, scales and layers."""
    place = tmp_path_factory.mktemp("experts")
    return (
        write_expert(place / "one", base, 1, targets="all"),
        write_expert(place / "two", base, 2, rank=3, use_rslora=True),
    )


@pytest.fixture
def fused(base: UNet2DConditionModel, experts: tuple[str, str]) -> UNet2DConditionModel:
    network = copy.deepcopy(base)
    adapters.attach(network, LoraConfig(experts=experts))
    return network


def gates_of(network: UNet2DConditionModel) -> Gates:
    found = adapters.gates_of(network)
    assert found is not None
    return found


def run(network: UNet2DConditionModel, t: Tensor | int = T, rows: slice = slice(None)) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=draw)[rows] for shape in ((2, 20, 8, 8), (2, 5, 64), (2, 32))]
    added = {"text_embeds": values[2], "time_ids": torch.full((2, 6), 32.0)[rows]}
    return network(values[0], t, values[1], added_cond_kwargs=added).sample


@torch.no_grad()
def quiet(network: UNet2DConditionModel, *where: Any) -> Tensor:
    return run(network, *where)


@torch.no_grad()
def stir(network: UNet2DConditionModel, seed: int = 5) -> Gates:
    """Gates that differ by time, layer and expert."""
    found = gates_of(network)
    found.weight += torch.randn(found.weight.shape, generator=torch.Generator().manual_seed(seed))
    return found


def alone(base: UNet2DConditionModel, expert: str) -> UNet2DConditionModel:
    network = copy.deepcopy(base)
    export.load_lora(network, Path(expert), family="sdxl")
    return network


# The formula


@pytest.mark.slow
def test_softmax_gates_begin_equal_and_the_update_is_the_mean_of_the_experts(base, fused, experts) -> None:
    assert torch.equal(gates_of(fused)(torch.tensor([0.2, 0.9])), torch.full((2, len(gates_of(fused).layers), 2), 0.5))
    mean = copy.deepcopy(base)
    with torch.no_grad():
        for expert in experts:
            for path, change in adapters.delta_weights(alone(base, expert)).items():
                mean.get_submodule(path).weight += change / 2
    expected = quiet(mean)
    assert (quiet(fused) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (quiet(base) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [0, 1])
def test_one_hot_gates_are_the_expert(base, experts, k: int, kind: str) -> None:
    network = copy.deepcopy(base)
    adapters.attach(network, LoraConfig(experts=experts, gate=kind))
    with torch.no_grad():
        gates_of(network).weight[..., 0] = -1e3
        gates_of(network).weight[:, k, 0] = 1e3
    expected = quiet(alone(base, experts[k]))
    assert (quiet(network) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_gates_of_zero_are_the_base(base, experts) -> None:
    network = copy.deepcopy(base)
    adapters.attach(network, LoraConfig(experts=experts, gate="sigmoid"))
    assert torch.allclose(gates_of(network)(torch.tensor([0.3])), torch.tensor(0.5))
    with torch.no_grad():
        gates_of(network).weight[..., 0] = -math.inf
        gates_of(network).weight[..., 1:] = 0
    assert torch.equal(quiet(network), quiet(base))


def test_sigmoids_begin_at_the_mean_and_a_single_one_at_a_half() -> None:
    three, one = (Gates("g", "abc"[:k], "abc"[:k], ["x"], kind="sigmoid") for k in (3, 1))
    assert torch.allclose(three(torch.rand(2)), torch.tensor(1 / 3))
    assert torch.allclose(one(torch.rand(2)), torch.tensor(1 / 2))


def test_one_expert_under_a_softmax_is_constant_one_without_gradient() -> None:
    single = Gates("g", ["a"], ["a"], ["x", "y"])
    with torch.no_grad():
        single.weight += torch.randn_like(single.weight)
    found = single(torch.rand(3))
    assert torch.equal(found, torch.ones(3, 2, 1))
    found.square().sum().backward()
    assert not single.weight.grad.any()


def test_gates_are_a_function_of_the_layer_alone_without_features(base, experts) -> None:
    network = copy.deepcopy(base)
    adapters.attach(network, LoraConfig(experts=experts, gate_features=0))
    early, late = stir(network)(torch.tensor([0.0, 1.0]))
    assert torch.equal(early, late)
    assert early[:, 0].std() > 0.1


def test_every_row_has_the_gates_of_its_own_time(fused) -> None:
    stir(fused)
    together = quiet(fused)
    for row in range(2):
        own = quiet(fused, T[row : row + 1], slice(row, row + 1))
        assert (together[row : row + 1] - own).abs().max() < 1e-5 * own.abs().max()
    # ... and the time matters beyond what the base makes of it
    early, late = (gates_of(fused)(torch.tensor([t / 1000]))[0] for t in (700, 300))
    assert (early - late).abs().max() > 0.1
    assert torch.equal(quiet(fused, 300), quiet(fused, torch.tensor([300, 300])))  # a number, as samplers give it


# What is trained


def gradient(network: UNet2DConditionModel, between: bool = False) -> Tensor:
    network.train()
    network.zero_grad()
    loss = run(network).square().mean()
    if between:
        with torch.no_grad(), adapters.adapters_off(network):
            run(network, torch.tensor([10, 990]))
    loss.backward()
    found = gates_of(network).weight.grad
    assert found is not None
    return found.clone()


def test_gradients_reach_the_gates_and_nothing_else(base, experts) -> None:
    network = copy.deepcopy(base)
    trained = adapters.attach(network, LoraConfig(experts=experts))
    assert [id(p) for p in trained] == [id(gates_of(network).weight)]
    assert [p for p in network.parameters() if p.requires_grad] == trained
    assert gradient(network).abs().amax(dim=(1, 2)).min() > 0  # of every layer
    assert all(p.grad is None for p in network.parameters() if p is not trained[0])
    layers, count = adapters.count(network, "default")
    assert (layers, count) == (len(adapters.lora_layers(network)), trained[0].numel())


@pytest.mark.parametrize("between", [False, True])
def test_recomputed_blocks_see_the_times_of_their_own_forward_pass(base, experts, between: bool) -> None:
    plain, lean = copy.deepcopy(base), copy.deepcopy(base)
    lean.enable_gradient_checkpointing()
    for network in (plain, lean):
        adapters.attach(network, LoraConfig(experts=experts))
        stir(network)
    torch.testing.assert_close(gradient(lean, between), gradient(plain), rtol=1e-4, atol=1e-7)


def test_checkpointing_that_comes_too_late_is_told(fused) -> None:
    fused.enable_gradient_checkpointing()
    with pytest.raises(RuntimeError, match="before the experts are attached"):
        gradient(fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_off_is_the_untouched_base_to_the_bit(base, experts, dtype: torch.dtype) -> None:
    untouched = copy.deepcopy(base).to(dtype)
    network = copy.deepcopy(untouched)
    adapters.attach(network, LoraConfig(experts=experts))
    stir(network)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        with torch.no_grad(), adapters.adapters_off(network):
            reference = run(network)
        assert torch.equal(reference, quiet(untouched))
        assert not torch.equal(quiet(network), reference)
    assert gates_of(network).weight.dtype == torch.float32


def test_a_copied_network_has_gates_of_its_own(fused) -> None:
    other = copy.deepcopy(fused)
    before = quiet(fused)
    stir(other)
    assert torch.equal(quiet(fused), before)
    assert not torch.equal(quiet(other), before)


# State and files


def test_the_state_returns_to_the_bit_and_knows_its_experts(base, experts, tmp_path: Path) -> None:
    first, second, third = (copy.deepcopy(base) for _ in range(3))
    adapters.attach(first, LoraConfig(experts=experts))
    stir(first)
    state = adapters.state_dict(first)
    assert set(state) == {"gates.weight", "gates.experts"}
    adapters.attach(second, LoraConfig(experts=experts))
    adapters.load_state_dict(second, state)
    assert torch.equal(quiet(first), quiet(second))
    other = write_expert(tmp_path / "other", base, 3)
    adapters.attach(third, LoraConfig(experts=(experts[0], other)))
    with pytest.raises(CheckpointError, match="another expert 'other'"):
        adapters.load_state_dict(third, state | fit(third))


def fit(network: UNet2DConditionModel) -> dict[str, Tensor]:
    """Gates of the shape that a network has."""
    return {"gates.weight": torch.zeros_like(gates_of(network).weight)}


def assert_same_file(one: Path, other: Path) -> None:
    (first, about_first), (second, about_second) = (export.read_file(path, tensors=True) for path in (one, other))
    assert about_first == about_second  # in no order of its own
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_file_brings_experts_and_gates_back(base, fused, tmp_path: Path) -> None:
    stir(fused)
    files = export.save_lora(fused, LoraConfig(), tmp_path, family="sdxl", metadata={"objective": "dpo"})
    assert {kind: path.name for kind, path in files.items()} == {"gated": "gated_lora_weights.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["gated_lora_weights.safetensors"]
    other = copy.deepcopy(base)
    info = export.load_lora(other, tmp_path, family="sdxl")
    assert torch.equal(quiet(other), quiet(fused))
    assert not any(p.requires_grad for p in other.parameters())
    assert (info.style, info.modules) == ("gated", len(gates_of(fused).layers))
    assert info.metadata["diffalign.objective"] == "dpo"
    header = json.loads(info.metadata["diffalign.gates"])
    assert header["experts"] == ["one", "two"]
    assert all(math.isclose(sum(row), 1, abs_tol=1e-3) for row in header["shares"])
    # written again it is the same file, and in half precision nearly the same network
    old = {"objective": "dpo", "gates": "what another file said"}
    again = export.save_lora(other, None, tmp_path / "again", family="sdxl", metadata=old)
    assert_same_file(again["gated"], files["gated"])
    export.save_lora(other, None, tmp_path / "half", family="sdxl", dtype=torch.float16)
    half = copy.deepcopy(base)
    load_gated(half, tmp_path / "half")
    assert torch.allclose(quiet(half), quiet(fused), atol=1e-2)


def test_a_file_of_another_model_is_refused_before_the_network_is_touched(base, fused, tmp_path: Path) -> None:
    file = export.save_lora(fused, None, tmp_path, family="sdxl")["gated"]
    with pytest.raises(CheckpointError, match="own family"):
        export.load_lora(copy.deepcopy(base), file, family="sd")
    config = dict(base.config) | {"cross_attention_dim": 48}
    other = UNet2DConditionModel.from_config(config)
    with pytest.raises(CheckpointError, match=r"attn2\.to_k.*another model"):
        load_gated(other, file)
    assert adapters.adapter_names(other) == []
    with pytest.raises(CheckpointError, match="holds no gated experts"):
        load_gated(other, Path(write_expert(tmp_path / "plain", base, 1)))


def test_gated_experts_have_no_delta_and_no_second_gates(fused, experts) -> None:
    with pytest.raises(ConfigError, match="depend on the time"):
        adapters.delta_weights(fused)
    with pytest.raises(ConfigError, match="already has"):
        adapters.attach(fused, LoraConfig(experts=experts))


# Refusals


def made(folder: Path, base: Path, data: Path, experts: tuple[str, ...], **changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": 3,
        "model": {"family": "sdxl", "pretrained": str(base)},
        "data": {"sources": [str(data)], "resolution": 32},
        "cache": {"dir": str(folder.parent / "cache"), "dtype": "float32", "shard_size": 8},
        "objective": {"name": "dpo", "beta_dpo": 200.0},
        "lora": {"experts": list(experts)},
        "training": {"learning_rate": 1e-2, "train_batch_size": 4, "max_train_steps": 2, "cpu": True},
        "sampling": {"num_inference_steps": 2, "guidance_scale": 2.0, "batch_size": 4},
    }
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values
    return build(tree)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": {"rank": 4}}, r"lora\.rank: has no effect with lora\.experts"),
        ({"lora": {"targets": "all"}}, r"lora\.targets: has no effect"),
        ({"lora": {"use_dora": True}}, r"lora\.use_dora: has no effect"),
        ({"lora": {"gate_features": -1}}, r"gate_features: got -1"),
        ({"lora": {"experts": []}}, None),  # K = 0 is ordinary training
        ({"lora": {"experts": [], "gate": "sigmoid"}}, r"lora\.gate: has no effect without lora\.experts"),
        ({"training": {"compile": True}}, r"training\.compile"),
    ],
)
def test_settings_that_nothing_would_read_are_refused(tmp_path, tiny_folder, experts, changes, said) -> None:
    config = made(tmp_path / "run", tiny_folder, tmp_path, experts, **changes)
    if said is None:
        preflight.check(config)
        return
    with pytest.raises(ConfigError, match=said):
        preflight.check(config)


def test_experts_that_cannot_be_fused_are_refused_before_anything_loads(
    tmp_path, tiny_folder, tiny_sd_folder, base, fused, experts
) -> None:
    def refused(said: str, *sources: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=said):
            preflight.check(made(tmp_path / "run", tiny_folder, tmp_path, sources, **changes))

    preflight.check(made(tmp_path / "run", tiny_folder, tmp_path, experts))
    refused("no such adapter", experts[0], str(tmp_path / "nowhere"))
    refused("always 1: nothing could be trained", experts[0])
    refused("DoRA", experts[0], write_expert(tmp_path / "dora", base, 3, use_dora=True))
    refused("kohya's names", experts[0], f"{experts[1]}/{export.KOHYA_NAME}")
    export.save_lora(fused, None, tmp_path / "gated", family="sdxl")
    refused("gated experts itself", experts[0], str(tmp_path / "gated"))
    sd = {"family": "sd", "pretrained": str(tiny_sd_folder)}
    refused("for 'sdxl', got model.family 'sd'", *experts, model=sd)
    outside = write_expert(tmp_path / "outside", base, 4, targets=("conv_in",))
    refused("outside of the network's blocks", experts[0], outside)
    wide = UNet2DConditionModel.from_config(dict(base.config) | {"cross_attention_dim": 48}).requires_grad_(False)
    refused("the file is for", experts[0], write_expert(tmp_path / "wide", wide, 5))


def test_a_language_model_has_no_times_to_gate_by(tmp_path, experts) -> None:
    model = {"family": "causal_lm", "pretrained": "tiny-lm"}
    config = build(
        {"output_dir": str(tmp_path), "model": model, "objective": {"name": "dpo"}, "lora": {"experts": experts}}
    )
    with pytest.raises(ConfigError, match=r"lora\.experts: has no effect on family 'causal_lm'"):
        preflight.check(config)


# Runs


def rows_of(folder: Path) -> list[dict[str, Any]]:
    timing = ("pairs_per_second", "seconds_per_step", "memory_gb")
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    return [{k: v for k, v in row.items() if k not in timing} for row in rows]


def test_a_run_trains_saves_samples_and_resumes_to_the_bit(tmp_path, tiny_folder, pair_parquet, experts) -> None:
    def config(name: str, **training: Any) -> RunConfig:
        settings = {"checkpointing_steps": 1, "ema_decay": 0.9} | training
        return made(tmp_path / name, tiny_folder, pair_parquet, experts, training=settings)

    whole = train(config("whole")).run_dir
    train(config("parts", max_train_steps=1))
    parts = train(config("parts", resume_from_checkpoint="latest")).run_dir
    found = [checkpoint.load(folder / "checkpoint-000002", config(folder.name)) for folder in (whole, parts)]
    assert torch.equal(found[0].adapter["gates.weight"], found[1].adapter["gates.weight"])
    assert found[0].adapter["gates.weight"].abs().max() > 1e-3
    assert rows_of(whole) == rows_of(parts)
    assert not [row for row in read_rows(whole / "metrics.jsonl") if "alarm" in row]
    assert sorted(path.name for path in whole.glob("*.safetensors")) == ["gated_lora_weights.safetensors"]
    assert_same_file(whole / gates.FILE_NAME, parts / gates.FILE_NAME)
    card = (whole / "README.md").read_text()
    assert 'load_gated(pipe.unet, "gated_lora_weights.safetensors")' in card
    assert "cannot be merged" in card
    assert "| time | one | two |" in card
    # the commands read the run folder, and its checkpoint with the average that the run has saved
    commands.generate(
        config("whole"),
        prompts=["a red circle"],
        adapter=whole,
        with_base=True,
        seed=0,
        images_per_prompt=1,
        out=tmp_path / "out",
    )
    base_image, image = (tmp_path / "out" / f"0000-0-{side}.png" for side in ("base", "adapter"))
    assert base_image.read_bytes() != image.read_bytes()
    (file,) = commands.export_adapter(config("whole"), whole / "checkpoint-000002", tmp_path / "exported", fp16=False)
    ours, again = (export.read_file(path, tensors=True)[0] for path in (whole / gates.FILE_NAME, file))
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[key], again[key]) for key in ours)


def test_a_run_with_checkpointing_and_a_moving_reference_trains_the_same(
    tmp_path, tiny_folder, pair_parquet, experts
) -> None:
    found = []
    for lean in (False, True):
        config = made(
            tmp_path / f"lean{lean}",
            tiny_folder,
            pair_parquet,
            experts,
            training={"gradient_checkpointing": lean},
            reference={"scheme": "sync", "every": 1, "rate": 0.5},
        )
        folder = train(config).run_dir
        found.append(checkpoint.load(folder / "checkpoint-000002", config))
    torch.testing.assert_close(found[0].adapter["gates.weight"], found[1].adapter["gates.weight"], rtol=1e-3, atol=1e-6)
    assert len(found[0].state["reference"]["copy"]) == 1
