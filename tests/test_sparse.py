"""Entries of the weights as what is trained: which are chosen, that nothing else moves, and that off is the base."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import ShiraConfig, inject_adapter_in_model
from test_adapters import quiet, run
from test_users import NAMES, network_of
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from diffalign import adapters, delta_files, export, gates, soups, sparse
from diffalign._preflight_negative import check_fused
from diffalign.architecture import resolve
from diffalign.branches import Branches
from diffalign.config import LoraConfig, ModelConfig, SparseConfig
from diffalign.delta_layers import DeltaLayer, delta_layers
from diffalign.errors import CheckpointError, ConfigError
from diffalign.families import NETWORK, load_family, published
from diffalign.model_card import _fuse_lines, snippet
from diffalign.world.bases import build_untrained

SARA = SparseConfig(method="sara", threshold=1e-2)
EVERYTHING = SparseConfig(method="sara", threshold=math.inf, biases_and_norms=True)
LIFT = SparseConfig(method="lift", rank=4, filter_rank=8)
HFT = SparseConfig(method="hft")
KINDS = (SARA, EVERYTHING, LIFT, HFT)
by_method = pytest.mark.parametrize("config", KINDS, ids=["sara", "everything", "lift", "hft"])


@torch.no_grad()
def stir(network: nn.Module, name: str = "default", size: float = 0.02) -> None:
    draw = torch.Generator().manual_seed(len(name))
    for parameter in adapters.parameters(network, name):
        parameter += size * torch.randn(parameter.shape, generator=draw)


def plain_weights(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter of the base with its changes in it, by the base's own names."""
    found = {name: p.detach().clone() for name, p in network.named_parameters() if ".delta_" not in name}
    found = {name.replace(".base_layer.", "."): p for name, p in found.items()}
    for path, layer in delta_layers(network).items():
        for kind in ("weight", "bias"):
            change = layer.change({"default": 1.0}, kind)  # type: ignore[arg-type]
            if change is not None:
                found[f"{path}.{kind}"] += change.detach()
    return found


def steps(network: nn.Module, parameters: list[nn.Parameter], count: int, **settings: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameters, **{"lr": 1e-3, "weight_decay": 0.0} | settings)
    for number in range(count):
        run(network, seed=number).square().mean().backward()  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


# What is chosen


def test_sara_takes_exactly_the_entries_below_its_threshold(base: UNet2DConditionModel) -> None:
    network = copy.deepcopy(base)
    sparse.attach(network, SARA)
    layers = adapters.base_layers(base)
    paths = adapters.target_modules(base, "all")
    expected = sum(int((layers[path].weight.abs() < 1e-2).sum()) for path in paths)
    assert adapters.count(network) == (len(paths), expected)
    assert 0 < expected < sum(layers[path].weight.numel() for path in paths) / 2
    for path, layer in delta_layers(network).items():
        mask = torch.zeros_like(layers[path].weight, dtype=torch.bool).flatten()
        mask[layer.index_weight["default"].long()] = True
        assert torch.equal(mask.view(layers[path].weight.shape), layers[path].weight.abs() < 1e-2)
    assert len(sparse.below(torch.tensor([1e-2, -1e-2, 0.0, -9e-3]), 1e-2)) == 2  # strictly below


def test_a_threshold_is_not_rounded_to_the_type_of_the_weights() -> None:
    weight = torch.tensor([1e-3, -1e-3, 2e-3]).bfloat16()
    assert weight.float().abs().tolist() == pytest.approx([0.99945e-3, 0.99945e-3, 1.99890e-3], rel=1e-4)
    assert sparse.below(weight, 1e-3).tolist() == [0, 1]
    assert sparse.below(weight, 2e-3).tolist() == [0, 1, 2]


def test_biases_and_norms_are_a_choice(base: UNet2DConditionModel) -> None:
    network = copy.deepcopy(base)
    sparse.attach(network, SparseConfig(method="sara", threshold=1e-2, biases_and_norms=True))
    kinds = {(kind, type(layer.base_layer).__name__) for _, kind, layer in sparse.changes(network, "default")}
    assert {("bias", "GroupNorm"), ("bias", "LayerNorm"), ("bias", "Linear"), ("bias", "Conv2d")} <= kinds
    outside = [path for path in delta_layers(network) if not adapters.in_blocks(path)]
    assert not outside


def test_lift_takes_k_entries_the_largest_of_the_low_rank_part() -> None:
    draw = torch.Generator().manual_seed(0)
    for shape in ((48, 32), (24, 8, 3, 3)):
        rows, columns = shape[0], math.prod(shape[1:])
        u, s, v = torch.linalg.svd(torch.randn(rows, columns, generator=draw), full_matrices=False)
        s = 0.8 ** torch.arange(len(s))  # a spectrum that falls, as those of trained weights do
        weight, exact = ((u * s) @ v).view(shape), (u[:, :6] * s[:6]) @ v[:6]
        part = sparse.low_rank_part(weight, 6, seed=3)
        torch.testing.assert_close(part, exact, rtol=0, atol=2e-2 * float(exact.abs().max()))
        index = sparse.principal(weight, 3, 6, seed=3)
        assert len(index) == 3 * (rows + columns)
        assert bool((index.diff() > 0).all())
        chosen = torch.zeros(weight.numel(), dtype=torch.bool)
        chosen[index.long()] = True
        assert part.flatten().abs()[chosen].min() >= part.flatten().abs()[~chosen].max()
        assert torch.equal(index, sparse.principal(weight, 3, 6, seed=3))
    state = torch.get_rng_state()
    sparse.low_rank_part(weight, 6)
    assert torch.equal(state, torch.get_rng_state())


def test_a_wide_sketch_is_the_truncated_svd_itself_and_small_matrices_are_trained_in_full() -> None:
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(sparse.low_rank_part(weight, 6), (u[:, :6] * s[:6]) @ v[:6], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sparse.low_rank_part(weight, 12), weight, rtol=1e-4, atol=1e-5)
    assert torch.equal(sparse.principal(weight, 8, 4), torch.arange(240, dtype=torch.int32))


def halves(network: nn.Module, seed: int = 0) -> dict[str, tuple[int, int]]:
    """(chosen, all) matrices by category."""
    layers = {p: adapters.base_layers(network)[p] for p in adapters.target_modules(network, "all")}
    chosen = set(sparse.half(layers, seed))
    found: dict[str, tuple[int, int]] = {}
    for path, layer in layers.items():
        kind, _ = sparse.category(path, layer)
        ours, every = found.get(kind, (0, 0))
        found[kind] = ours + (path in chosen), every + 1
    return found


@pytest.mark.parametrize("name", ["sdxl", "sd15", "sd35-medium", "flux1-dev"])
def test_hft_trains_half_of_the_matrices_of_each_category(name: str) -> None:
    network = meta(name)
    for seed in range(3):
        for kind, (ours, every) in halves(network, seed).items():
            assert abs(ours - every / 2) <= 0.5, kind  # half a matrix, whatever the number
            assert every < 25 or abs(ours / every - 0.5) <= 0.02


def meta(name: str) -> nn.Module:
    """A published network without weights."""
    family = {"sdxl": "sdxl", "sd15": "sd", "sd35-medium": "sd3", "flux1-dev": "flux"}[name]
    architecture = resolve(ModelConfig(family=family, pretrained=name, random_weights=True))
    return published.build_from_config(architecture.network, device="meta")


def test_hft_takes_two_of_the_four_projections_of_every_attention(base: UNet2DConditionModel) -> None:
    layers = {p: adapters.base_layers(base)[p] for p in adapters.target_modules(base, "all")}
    chosen = sparse.half(layers, 5)
    for path in layers:
        if path.endswith(".to_q"):
            of = path.removesuffix(".to_q")
            assert sum(p.startswith(f"{of}.to_") for p in chosen) == 2, of
    first = [p.endswith("ff.net.0.proj") for p in chosen if ".ff." in p]
    assert all(a != b for a, b in itertools.pairwise(first))  # one of the two, by turns
    assert chosen == sparse.half(layers, 5) != sparse.half(layers, 6)


@pytest.mark.parametrize("name", ["sd35-medium", "flux1-dev"])
def test_hft_takes_two_of_the_four_projections_of_the_text_side(name: str) -> None:
    network = meta(name)
    layers = {p: adapters.base_layers(network)[p] for p in adapters.target_modules(network, "all")}
    chosen, sides = sparse.half(layers, 5), 0
    for path in layers:
        if path.endswith(".to_add_out"):
            of = path.removesuffix(".to_add_out")
            assert sum(p.startswith((f"{of}.add_", f"{of}.to_add_")) for p in chosen) == 2, of
            assert sum(p.startswith(f"{of}.to_") and "to_add_" not in p for p in chosen) == 2, of
            sides += 1
    assert sides > 10


def test_a_second_change_on_the_same_layers_chooses_from_the_same_base(unet: UNet2DConditionModel) -> None:
    small = SparseConfig(method="sara", threshold=1e-2, biases_and_norms=True)
    sparse.attach(unet, small, name="one")
    stir(unet, "one")
    sparse.attach(unet, small, name="two")
    one, two = (sparse.record_of(unet, name) for name in ("one", "two"))
    assert torch.equal(one.sha256, two.sha256)
    assert adapters.count(unet, "one") == adapters.count(unet, "two")
    assert {path for path, layer in delta_layers(unet).items() if len(layer.scaling) == 2} == set(delta_layers(unet))


# What is computed and trained


@by_method
def test_a_fresh_change_is_the_base_to_the_bit_and_off_stays_it(
    base: UNet2DConditionModel, unet: UNet2DConditionModel, config: SparseConfig
) -> None:
    expected = quiet(base)
    params = sparse.attach(unet, config)
    assert torch.equal(quiet(unet), expected)
    assert [p for p in unet.parameters() if p.requires_grad] == params
    assert all(p.dtype == torch.float32 for p in params)
    steps(unet, params, 2)
    assert not torch.equal(quiet(unet), expected)
    with torch.no_grad(), adapters.adapters_off(unet):
        assert torch.equal(run(unet), expected)
    assert torch.isfinite(quiet(unet)).all()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_networks_of_every_family_can_be_changed(
    name: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    family, call = network_of(name, request, tmp_path_factory)
    base, untouched = call(), copy.deepcopy(family.network)
    sparse.attach(family.network, SparseConfig(method="sara", threshold=1e9, biases_and_norms=True))
    assert torch.equal(call(), base)
    stir(family.network, size=1e-2)
    changed = call()
    assert not torch.equal(changed, base)
    with adapters.adapters_off(family.network):
        assert torch.equal(call(), base)
    export.save_lora(family.network, None, tmp_path, family=name)
    family.parts[family.network_part] = untouched
    export.load_lora(untouched, tmp_path, family=name)
    assert torch.equal(call(), changed)


@by_method
def test_every_entry_outside_of_the_choice_stays_exactly_as_it_was(
    base: UNet2DConditionModel, unet: UNet2DConditionModel, config: SparseConfig
) -> None:
    before = dict(base.named_parameters())
    steps(unet, sparse.attach(unet, config), 2)
    after = plain_weights(unet)
    assert after.keys() == before.keys()
    layers, moved = delta_layers(unet), 0
    for name, old in before.items():
        path, _, kind = name.rpartition(".")
        free = torch.zeros(old.numel(), dtype=torch.bool)
        layer = layers.get(path)
        if layer is not None and kind in ("weight", "bias") and "default" in layer.values(kind):  # type: ignore[arg-type]
            index = layer.index(kind)  # type: ignore[arg-type]
            free[index["default"].long() if "default" in index else slice(None)] = True
        changed = (after[name] != old).flatten()
        assert not changed[~free].any(), name
        moved += int(changed.sum())
    assert moved > 0.9 * adapters.count(unet)[1]
    assert all(
        torch.equal(p, before[n.replace(".base_layer.", ".")]) for n, p in unet.named_parameters() if ".delta_" not in n
    )


def test_an_infinite_threshold_is_ordinary_fine_tuning(base: UNet2DConditionModel, unet: UNet2DConditionModel) -> None:
    plain = copy.deepcopy(base)
    params = sparse.attach(unet, EVERYTHING)
    names = {f"{path}.{kind}" for path, kind, _ in sparse.changes(unet, "default")}
    own = {name: p.requires_grad_(True) for name, p in plain.named_parameters() if name in names}
    assert sum(p.numel() for p in own.values()) == sum(p.numel() for p in params)
    # A larger epsilon: where a gradient is rounding alone, Adam's direction would be chance in both.
    steps(unet, params, 4, eps=1e-4)
    steps(plain, list(own.values()), 4, eps=1e-4)
    after = plain_weights(unet)
    largest = max(float((own[name] - base.get_parameter(name)).detach().abs().max()) for name in names)
    assert largest > 1e-3
    for name in names:
        torch.testing.assert_close(after[name], own[name].detach(), rtol=0, atol=1e-3 * largest)


@pytest.mark.parametrize(
    "layer", [nn.Linear(12, 8), nn.Conv2d(4, 8, 3, padding=1, stride=2), Conv1D(8, 12), nn.GroupNorm(2, 8)]
)
def test_a_layer_is_the_one_with_the_changed_weight_in_both_ways_to_compute_it(layer: nn.Module) -> None:
    draw = torch.Generator().manual_seed(0)
    shape = {"Linear": (5, 12), "Conv2d": (5, 4, 6, 6), "Conv1D": (5, 12), "GroupNorm": (5, 8, 3)}[type(layer).__name__]
    x = torch.randn(shape, generator=draw)
    merged, changed = copy.deepcopy(layer), DeltaLayer(copy.deepcopy(layer).requires_grad_(False))
    for kind in ("weight", "bias"):
        own = getattr(layer, kind)
        index = torch.arange(0, own.numel(), 3, dtype=torch.int32)
        values = changed.add("a", kind, index)  # type: ignore[arg-type]
        with torch.no_grad():
            values.copy_(torch.randn(values.shape, generator=draw))
            getattr(merged, kind).view(-1)[index.long()] += values
    changed.set_adapter(["a"])
    assert torch.equal(changed(x), merged(x))
    with torch.autocast("cpu", torch.bfloat16):
        half = changed(x)
    assert (half.float() - merged(x)).abs().max() < 0.05 * merged(x).abs().max()
    changed(x).square().sum().backward()
    merged(x).square().sum().backward()
    for kind in ("weight", "bias"):
        index = changed.index(kind)["a"].long()  # type: ignore[arg-type]
        torch.testing.assert_close(changed.values(kind)["a"].grad, getattr(merged, kind).grad.flatten()[index])  # type: ignore[arg-type]


def test_below_float32_a_change_is_not_rounded_with_its_weight() -> None:
    base = nn.Linear(64, 64, bias=False).bfloat16()
    nn.init.constant_(base.weight, 1.0)
    layer = DeltaLayer(base)
    with torch.no_grad():
        layer.add("a", "weight", None)[:, 0] = 1e-3  # a quarter of bfloat16's step below 1
    layer.set_adapter(["a"])
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    x[0, :2] = torch.tensor([1.0, -1.0])
    with torch.no_grad():
        torch.testing.assert_close(layer(x), torch.full_like(x, 1e-3), rtol=0.01, atol=0)
        assert not base(x).any()
        layer.merge()
        assert not layer(x).any()  # as weights of such a type cannot hold it


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_linear_layer_is_pefts_shira() -> None:
    layer = nn.Sequential(nn.Linear(32, 24))
    weight = layer[0].weight.detach().clone()
    index = sparse.principal(weight, 2, 4)
    mask = torch.zeros(weight.numel())
    mask[index.long()] = 1
    config = ShiraConfig(r=2, target_modules=["0"])
    config.mask_fn = lambda base_layer, r, **_: mask.view(weight.shape)
    ours = DeltaLayer(copy.deepcopy(layer[0]))
    theirs: Any = inject_adapter_in_model(config, layer, "a")[0]
    values = torch.randn(len(index), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours.add("a", "weight", index).copy_(values)
        theirs.shira_weight["a"].copy_(values)
    ours.set_adapter(["a"])
    x = torch.randn(3, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


def test_checkpointed_blocks_have_the_same_gradient(unet: UNet2DConditionModel) -> None:
    lean = copy.deepcopy(unet)
    lean.enable_gradient_checkpointing()
    found = []
    for network in (unet, lean):
        params = sparse.attach(network, SARA)
        stir(network)
        network.train()
        run(network).square().mean().backward()
        found.append([p.grad for p in params])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# Re-selection and the penalty


def test_reselection_only_ever_lets_entries_go_and_keeps_what_they_have_learnt(unet: UNet2DConditionModel) -> None:
    params = sparse.attach(unet, SARA)
    again = sparse.Reselection(unet, SparseConfig(method="sara", threshold=1e-2, reselect_at=2))
    optimizer = torch.optim.AdamW(params, lr=2e-3, weight_decay=0.1)  # which moves entries without gradient, too
    every, trained, snapshot = sum(p.numel() for p in params), [], []
    for step in range(1, 5):
        run(unet, seed=step).square().mean().backward()
        optimizer.step()
        again.after_update(step)
        optimizer.zero_grad()
        trained.append(again.trained())
        snapshot.append([p.detach().clone() for p in params])
    assert trained[0] == every > trained[1] == trained[2] == trained[3] > 0
    layers = [(kind, layer) for _, kind, layer in sparse.changes(unet, "default")]
    for (kind, layer), second, last in zip(layers, snapshot[1], snapshot[3], strict=True):
        held = layer.held(kind)["default"]
        grown = (layer.own(kind).flatten()[layer.index(kind)["default"].long()] + second).abs() >= 1e-2
        assert torch.equal(held, grown)
        assert torch.equal(second[held], last[held])
        assert (second[~held] != last[~held]).float().mean() > 0.9
    run(unet).square().mean().backward()
    for (kind, layer), p in zip(layers, params, strict=True):
        assert not p.grad[layer.held(kind)["default"]].any()
    # a resumed run has the same
    other = copy.deepcopy(unet)
    for layer in delta_layers(other).values():
        del layer.held_weight["default"]
    resumed = sparse.Reselection(other, again.config)
    resumed.load_state_dict(again.state_dict())
    assert resumed.trained() == trained[3]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(again.kept.values(), resumed.kept.values(), strict=True))


def test_the_nuclear_norm_is_that_of_trained_entries_and_reaches_their_values() -> None:
    network = build_untrained().unet.requires_grad_(False)
    sparse.attach(network, SARA)
    stir(network, size=1e-3)
    penalty = sparse.NuclearNorm(network, 0.5, seed=0)
    assert {min(layer.own("weight").shape) for layer in penalty.layers} == {80}
    layer = penalty.layers[0]
    mask = torch.zeros(layer.own("weight").numel())
    mask[layer.index_weight["default"].long()] = 1
    masked = (layer.own("weight") + layer.change({"default": 1.0}, "weight")).detach() * mask.view(
        layer.own("weight").shape
    )
    assert torch.equal(penalty.matrix(layer).detach(), masked)
    penalty.layers = [layer]
    value = penalty(3)
    torch.testing.assert_close(value, 0.5 * torch.linalg.svdvals(masked).sum())
    value.backward()
    u, _, v = torch.linalg.svd(masked, full_matrices=False)
    expected = 0.5 * (u @ v).flatten()[layer.index_weight["default"].long()]
    torch.testing.assert_close(layer.delta_weight["default"].grad, expected, rtol=1e-3, atol=1e-4)
    drawn = [int(torch.randint(9, (), generator=sparse.generator_for(0, "nuclear norm", s))) for s in range(20)]
    assert len(set(drawn)) > 3


def test_a_network_without_large_matrices_has_no_nuclear_norm() -> None:
    network = build_untrained().unet.requires_grad_(False)
    sparse.attach(network, SparseConfig(method="sara", targets=("conv1",)))
    with pytest.raises(ConfigError, match=r"sparse\.nuclear_norm: got 0.1.*both sides above 64"):
        sparse.NuclearNorm(network, 0.1)


def test_the_published_learning_rate() -> None:
    assert sparse.sara_learning_rate(2e-3) == pytest.approx(4.966e-4, rel=1e-3)


# Beside other adapters


@pytest.mark.parametrize("lora_first", [True, False])
def test_a_change_and_a_lora_add_up_and_switch_apart(
    base: UNet2DConditionModel, unet: UNet2DConditionModel, lora_first: bool
) -> None:
    def lora() -> None:
        adapters.attach(unet, LoraConfig(rank=2), name="lora")

    for attach in (lora, lambda: sparse.attach(unet, LIFT, name="sparse"))[:: 1 if lora_first else -1]:
        attach()
    assert set(adapters.adapter_names(unet)) == {"lora", "sparse"}
    assert list(adapters.base_layers(unet)) == list(adapters.base_layers(base))
    assert list(delta_layers(unet)) == adapters.target_modules(base, "all")
    stir(unet, "lora", 0.1)
    stir(unet, "sparse")
    expected = {}
    for names in (["lora"], ["sparse"], ["lora", "sparse"]):
        other = copy.deepcopy(base)
        with torch.no_grad():
            for name in names:
                for path, change in adapters.delta_weights(unet, name).items():
                    other.get_submodule(path).weight += 0.5 * change
        adapters.use_adapters(unet, names, [0.5] * len(names))
        expected[tuple(names)] = quiet(other)
        torch.testing.assert_close(quiet(unet), expected[tuple(names)], rtol=1e-3, atol=1e-4)
    with torch.no_grad(), adapters.adapters_off(unet):
        assert torch.equal(run(unet), quiet(base))
    adapters.use_adapters(unet, ["lora", "sparse"], [1.0, 1.0])
    branches = Branches(unet)
    assert branches.active() == {"lora": 1.0, "sparse": 1.0}
    with branches.installed(), branches.use({"lora": 0.5}, {"sparse": 0.5, "lora": 0.5}):
        rows = quiet(unet)
    torch.testing.assert_close(rows[0], expected["lora",][0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(rows[1], expected["lora", "sparse"][1], rtol=1e-3, atol=1e-4)
    assert not torch.equal(quiet(unet)[0], rows[0])


# Files and states


@by_method
@torch.no_grad()
def test_states_and_files_come_back_to_the_bit(
    base: UNet2DConditionModel, unet: UNet2DConditionModel, config: SparseConfig, tmp_path: Path
) -> None:
    sparse.attach(unet, config)
    stir(unet)
    state = adapters.state_dict(unet)
    again, loaded = copy.deepcopy(base), copy.deepcopy(base)
    sparse.attach(again, config)
    adapters.load_state_dict(again, state)
    files = export.save_lora(unet, None, tmp_path, family="sdxl", metadata={"objective": "dpo"})
    info = export.load_lora(loaded, tmp_path, family="sdxl")
    assert (info.style, info.rank, info.metadata["diffalign.objective"]) == ("delta", 0, "dpo")
    assert torch.equal(quiet(again), quiet(unet))
    assert torch.equal(quiet(loaded), quiet(unet))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert files["delta"].name == delta_files.FILE_NAME
    if config is EVERYTHING:
        assert "comfyui" not in files  # norms have no name there
        return
    differences, _ = export.read_file(files["comfyui"], tensors=True)
    assert len(differences) == len(delta_layers(unet))
    kohya = {name: paths[0] for name, paths in export.kohya_layers(base, "sdxl").items()}
    for key, difference in differences.items():
        name, end = key.split(".")
        assert end == "diff"
        assert torch.equal(difference, adapters.delta_weights(unet)[kohya[name]])


def test_stored_places_are_taken_and_not_chosen_again(base: UNet2DConditionModel, unet: UNet2DConditionModel) -> None:
    sparse.attach(unet, LIFT, seed=0)
    stir(unet)
    state = adapters.state_dict(unet)
    path = next(iter(delta_layers(unet)))
    size = adapters.base_layers(base)[path].weight.numel()
    k = len(state[f"{path}.index_weight"])
    state[f"{path}.index_weight"] = torch.arange(size - k, size, dtype=torch.int32)  # another machine's SVD, say
    here, fresh = copy.deepcopy(base), copy.deepcopy(base)
    sparse.attach(here, LIFT, seed=0)
    adapters.load_state_dict(here, state)
    sparse.attach_state(fresh, state, "lift")
    assert torch.equal(delta_layers(here)[path].index_weight["default"], state[f"{path}.index_weight"])
    assert torch.equal(quiet(here), quiet(fresh))
    assert not torch.equal(quiet(here), quiet(unet))


def test_all_processes_train_the_places_of_the_first(
    base: UNet2DConditionModel, unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = unet, copy.deepcopy(base)
    sparse.attach(first, LIFT, seed=0)
    sparse.attach(second, LIFT, seed=0)
    for layer in delta_layers(second).values():  # another device's SVD, say
        layer.index_weight["default"].copy_(torch.arange(len(layer.index_weight["default"])))
    sent = iter([layer.index_weight["default"] for layer in delta_layers(first).values()])
    monkeypatch.setattr(sparse, "broadcast", lambda index, from_process: next(sent))
    alone = SimpleNamespace(num_processes=1, device="cpu", gather=None)
    sparse.share_places(second, alone)  # type: ignore[arg-type]
    two = SimpleNamespace(num_processes=2, device="cpu", gather=lambda own: torch.cat([own, own]))
    sparse.share_places(second, two)  # type: ignore[arg-type]
    for one, other in zip(delta_layers(first).values(), delta_layers(second).values(), strict=True):
        assert torch.equal(one.index_weight["default"], other.index_weight["default"])
    unlike = SimpleNamespace(num_processes=2, device="cpu", gather=lambda own: torch.cat([own, own + 1]))
    with pytest.raises(ConfigError, match="different numbers of entries"):
        sparse.share_places(second, unlike)  # type: ignore[arg-type]


def test_another_base_is_refused(base: UNet2DConditionModel, unet: UNet2DConditionModel, tmp_path: Path) -> None:
    sparse.attach(unet, LIFT)
    stir(unet)
    export.save_lora(unet, None, tmp_path, family="sdxl")
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.down_blocks[0].resnets[0].conv1.weight *= 1 + 1e-4  # one matrix
    untouched = copy.deepcopy(other)
    with pytest.raises(CheckpointError, match=r"chosen on other weights.*model\.pretrained"):
        export.load_lora(other, tmp_path, family="sdxl")
    assert adapters.adapter_names(other) == []
    assert torch.equal(quiet(other), quiet(untouched))
    sparse.attach(other, LIFT)
    with pytest.raises(CheckpointError, match="chosen on other weights"):
        adapters.load_state_dict(other, adapters.state_dict(unet))
    # the same base in another type is the same base; a different one in another type is not
    half = copy.deepcopy(base).bfloat16()
    export.load_lora(half, tmp_path, family="sdxl")
    with torch.no_grad():
        other = copy.deepcopy(base)
        other.down_blocks[0].resnets[0].conv1.weight *= 1.01
    with pytest.raises(CheckpointError, match="chosen on other weights"):
        export.load_lora(other.bfloat16(), tmp_path, family="sdxl")


def test_a_base_that_differs_by_rounding_is_taken_with_a_warning(
    base: UNet2DConditionModel, unet: UNet2DConditionModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sparse.attach(unet, LIFT)
    stir(unet)
    export.save_lora(unet, None, tmp_path, family="sdxl")
    rounded = copy.deepcopy(base)
    with torch.no_grad():
        rounded.down_blocks[0].resnets[0].conv1.weight *= 1 + 1e-6
    loaded, resumed, attached = (copy.deepcopy(rounded) for _ in range(3))
    export.load_lora(copy.deepcopy(base), tmp_path, family="sdxl")
    assert "taken for rounding" not in caplog.text
    export.load_lora(loaded, tmp_path, family="sdxl")
    sparse.attach(resumed, LIFT)
    adapters.load_state_dict(resumed, adapters.state_dict(unet))
    sparse.attach_state(attached, adapters.state_dict(unet), "lift")
    assert caplog.text.count("taken for rounding") == 3
    for network in (loaded, resumed, attached):
        torch.testing.assert_close(quiet(network), quiet(unet), rtol=1e-3, atol=1e-4)


def test_damaged_and_foreign_states_are_refused(base: UNet2DConditionModel, unet: UNet2DConditionModel) -> None:
    sparse.attach(unet, LIFT)
    state = adapters.state_dict(unet)
    path = next(iter(delta_layers(unet)))
    index = f"{path}.index_weight"
    for broken, said in (
        ({index: state[index].flip(0)}, "does not fit"),
        ({index: state[index] + 10**6}, "does not fit"),
        ({index: state[index][1:]}, "does not fit"),
        ({"nowhere.delta_weight": torch.zeros(3)}, "fits no layer"),
    ):
        with pytest.raises(CheckpointError, match=said):
            sparse.attach_state(copy.deepcopy(base), state | broken, "lift")
    with pytest.raises(CheckpointError, match="nobody knows which base"):
        sparse.attach_state(copy.deepcopy(base), {k: v for k, v in state.items() if k != sparse.SHA}, "lift")
    with pytest.raises(ConfigError, match="already has an adapter named 'default'"):
        sparse.attach(unet, LIFT)


@torch.no_grad()
def test_a_file_that_is_written_again_tells_of_the_base_it_is_for_now(
    base: UNet2DConditionModel, unet: UNet2DConditionModel, tmp_path: Path
) -> None:
    sparse.attach(unet, LIFT)
    stir(unet)
    export.save_lora(unet, None, tmp_path / "one", family="sdxl")
    for folder, network in (("two", copy.deepcopy(base).bfloat16()), ("three", copy.deepcopy(base))):
        info = export.load_lora(network, tmp_path / "one", family="sdxl")
        known = {key.removeprefix("diffalign."): value for key, value in info.metadata.items() if key != "format"}
        files = export.save_lora(network, None, tmp_path / folder, family="sdxl", metadata=known)
        assert delta_files.HEADER not in export.read_metadata(files["comfyui"])
    of = [json.loads(export.read_metadata(tmp_path / name)[delta_files.HEADER]) for name in ("one", "two", "three")]
    assert [header["base_dtype"] for header in of] == ["float32", "bfloat16", "float32"]
    export.load_lora(copy.deepcopy(base), tmp_path / "two", family="sdxl")


def test_an_adapter_of_another_kind_leaves_no_file_to_be_found(
    base: UNet2DConditionModel, unet: UNet2DConditionModel, tmp_path: Path
) -> None:
    lora = copy.deepcopy(base)
    adapters.attach(lora, LoraConfig(rank=2))
    sparse.attach(unet, LIFT)
    for network, style in ((lora, "diffusers"), (unet, "delta"), (lora, "diffusers")):
        files = export.save_lora(network, None, tmp_path, family="sdxl")
        assert set(tmp_path.iterdir()) == set(files.values())
        assert export.load_lora(copy.deepcopy(base), tmp_path, family="sdxl").style == style
    export.save_lora(unet, None, tmp_path, family="sdxl")
    delta_files.save_delta(unet, tmp_path, facts={})
    assert [file.name for file in tmp_path.iterdir()] == [delta_files.FILE_NAME]


@torch.no_grad()
def test_a_file_is_fused_into_the_base_that_is_named_with_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family: Any = load_family(ModelConfig(family="sdxl", pretrained=str(tiny_folder)))
    family.load(NETWORK)
    sparse.attach(family.network, SARA)
    stir(family.network)
    export.save_lora(family.network, None, tmp_path, family="sdxl")
    fused: Any = load_family(ModelConfig(family="sdxl", pretrained=str(tiny_folder), adapters=(str(tmp_path),)))
    fused.load(NETWORK)
    assert not adapters.is_adapted(fused.network)
    assert torch.equal(quiet(fused.network), quiet(family.network))
    # as the model card of a run on it says, for which a file is where the run is
    lines = _fuse_lines(fused.config)
    assert not any("load_lora_weights" in line for line in lines)
    bare: Any = load_family(ModelConfig(family="sdxl", pretrained=str(tiny_folder)))
    bare.load(NETWORK)
    monkeypatch.chdir(tmp_path.parent)
    exec("\n".join(lines), {"pipe": SimpleNamespace(unet=bare.network)})
    assert not adapters.is_adapted(bare.network)
    assert torch.equal(quiet(bare.network), quiet(family.network))


def test_a_run_below_float32_is_told_what_its_fused_base_loses(
    unet: UNet2DConditionModel, tiny_config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sparse.attach(unet, LIFT)
    export.save_lora(unet, None, tmp_path / "file", family="sdxl")
    for precision in ("no", "bf16"):
        config = tiny_config(
            tmp_path, model={"adapters": [str(tmp_path / "file")]}, training={"mixed_precision": precision}
        )
        check_fused(config)
        assert ("are rounded away" in caplog.text) == (precision == "bf16")
    code = snippet(config, "delta_weights.safetensors")
    assert code.count("from diffalign.export import load_lora") == 1
    assert code.index("sparse.remove(pipe.unet)") < code.index("image = pipe(")


@torch.no_grad()
def test_a_change_for_the_negative_branch_is_not_loaded_silently_as_an_ordinary_one(
    base: UNet2DConditionModel, unet: UNet2DConditionModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sparse.attach(unet, LIFT)
    export.save_lora(unet, None, tmp_path, family="sdxl", metadata={"role": "negative"})
    export.load_lora(copy.deepcopy(base), tmp_path, family="sdxl", negative=True)
    assert "loaded as an ordinary one" not in caplog.text
    export.load_lora(copy.deepcopy(base), tmp_path, family="sdxl")
    assert "loaded as an ordinary one" in caplog.text


# Refusals


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (SparseConfig(threshold=1e-3), r"set sparse\.method"),
        (SparseConfig(method="sara", threshold=0.0), r"sparse\.threshold: got 0"),
        (SparseConfig(method="sara", rank=4), r"sparse\.rank: got 4; it has no effect with sparse\.method 'sara'"),
        (SparseConfig(method="lift", threshold=1e-3), r"sparse\.threshold: got 0\.001; it has no effect"),
        (SparseConfig(method="hft", reselect_at=3), r"sparse\.reselect_at: got 3; it has no effect"),
        (SparseConfig(method="sara", reselect_at=0), r"sparse\.reselect_at: got 0"),
        (SparseConfig(method="sara", nuclear_norm=-1.0), r"sparse\.nuclear_norm: got -1"),
        (SparseConfig(method="lift", rank=0), r"sparse\.rank: got 0"),
    ],
)
def test_settings_out_of_range_or_unread_are_refused(config: SparseConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sparse.check_sparse(config)


def test_targets_and_thresholds_that_leave_nothing_are_refused(unet: UNet2DConditionModel) -> None:
    with pytest.raises(ConfigError, match=r"sparse\.targets: no linear or convolution layer ends with 'to_qq'"):
        sparse.attach(unet, SparseConfig(method="hft", targets=("to_qq",)))
    one = next(path for path in adapters.target_modules(unet, "all") if path.endswith(".conv1"))
    for seed in range(4):  # whichever way the coin falls for an odd number
        try:
            assert len(sparse.choose(unet, SparseConfig(method="hft", targets=(one,)), seed)) == 1
        except ConfigError as error:
            assert str(error).startswith("sparse.targets: got (")  # noqa: PT017
    with pytest.raises(
        ConfigError, match=r"sparse\.threshold: got 1e-30, and no entry is smaller; half of them are below"
    ):
        sparse.attach(unet, SparseConfig(method="sara", threshold=1e-30, targets=("to_q",)))


def test_what_is_for_loras_alone_refuses_changed_weights(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    sparse.attach(unet, SARA)
    export.save_lora(unet, None, tmp_path, family="sdxl")
    with pytest.raises(ConfigError, match="experts are LoRA files"):
        gates.check_expert(str(tmp_path))
    with pytest.raises(ConfigError, match="have no rank"):
        soups.merge(unet, ["default"], [1.0])
