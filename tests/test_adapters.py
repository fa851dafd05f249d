"""LoRA: which layers, off means the base to the bit, and what an adapter adds to a weight."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from diffalign import adapters
from diffalign.adapters import adapters_off, attach, target_modules
from diffalign.config import LoraConfig
from diffalign.errors import CheckpointError, ConfigError


def run(unet: UNet2DConditionModel, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"sample": (2, 20, 8, 8), "text": (2, 5, 64), "pooled": (2, 32)}
    values = {key: torch.randn(shape, generator=draw).to(dtype) for key, shape in shapes.items()}
    conditions = {"text_embeds": values["pooled"], "time_ids": torch.full((2, 6), 32.0, dtype=dtype)}
    t = torch.tensor([700, 300])
    return unet(values["sample"], t, values["text"], added_cond_kwargs=conditions).sample


@torch.no_grad()
def quiet(unet: UNet2DConditionModel, **options: object) -> Tensor:
    return run(unet, **options)  # type: ignore[arg-type]


@torch.no_grad()
def stir(unet: nn.Module, name: str = "default", size: float = 0.1) -> None:
    """Random factors, as after training."""
    draw = torch.Generator().manual_seed(len(name))
    for parameter in adapters.parameters(unet, name):
        parameter += size * torch.randn(parameter.shape, generator=draw)


@torch.no_grad()
def merged(unet: UNet2DConditionModel, deltas: dict[str, Tensor]) -> UNet2DConditionModel:
    unet = copy.deepcopy(unet)
    for path, change in deltas.items():
        unet.get_submodule(path).weight += change
    return unet


# Targets


def test_attention_preset_is_the_four_projections_of_every_attention(unet: UNet2DConditionModel) -> None:
    expected = {
        f"{path}.{part}"
        for path, module in unet.named_modules()
        if type(module).__name__ == "Attention"
        for part in ("to_q", "to_k", "to_v", "to_out.0")
    }
    assert set(target_modules(unet, "attention")) == expected
    more = set(target_modules(unet, "attention+ff")) - expected
    assert more
    assert all(path.endswith(("ff.net.0.proj", "ff.net.2")) for path in more)


def test_all_is_every_linear_and_convolution_of_the_blocks_and_nothing_outside(unet: UNet2DConditionModel) -> None:
    got = target_modules(unet, "all")
    every = [path for path, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    outside = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    outside |= {"add_embedding.linear_1", "add_embedding.linear_2"}
    assert set(every) - set(got) == outside
    assert got == [path for path in every if path not in outside]  # the network's order


def test_an_ending_matches_whole_parts_of_a_name_only(unet: UNet2DConditionModel) -> None:
    # "proj" is also the end of time_emb_proj, and conv_in the end of nothing else
    assert all(path.endswith("ff.net.0.proj") for path in target_modules(unet, "proj"))
    assert target_modules(unet, ("conv_in",)) == ["conv_in"]
    both = target_modules(unet, ("attention", "conv1"))
    assert len(both) == len(target_modules(unet, "attention")) + len(target_modules(unet, "conv1"))


def test_a_target_that_matches_nothing_is_refused_with_the_nearest(unet: UNet2DConditionModel) -> None:
    with pytest.raises(ConfigError, match=r"'to_qq'; did you mean 'to_q'\?"):
        target_modules(unet, ("to_k", "to_qq"))
    with pytest.raises(ConfigError, match=r"did you mean 'attention'\?"):
        target_modules(unet, "atention")
    with pytest.raises(ConfigError, match="empty"):
        target_modules(unet, ())


def test_targets_look_through_attached_adapters(unet: UNet2DConditionModel) -> None:
    before = target_modules(unet, "all")
    attach(unet, LoraConfig(rank=2, targets="all", dropout=0.1))
    assert target_modules(unet, "all") == before


# Refusals


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "PiSSA", "olora", "corda", "loftq", "lora_ga", "eva", "gausian", "false"]
)
def test_unsafe_or_unknown_initialisations_are_refused(unet: UNet2DConditionModel, init: str) -> None:
    with pytest.raises(ConfigError, match=r"lora\.init.*gaussian"):
        attach(unet, LoraConfig(init=init))
    assert adapters.adapter_names(unet) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (LoraConfig(rank=0), "lora.rank"),
        (LoraConfig(alpha=0.0), "lora.alpha"),
        (LoraConfig(dropout=1.0), "lora.dropout"),
        (LoraConfig(dropout=-0.1), "lora.dropout"),
        (LoraConfig(init="orthogonal", rank=3), "even rank"),
        (LoraConfig(init="mica", use_dora=True), "use_dora"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong: LoraConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        adapters.check_lora(wrong)


def test_linear_initialisations_are_refused_on_convolutions(unet: UNet2DConditionModel) -> None:
    with pytest.raises(ConfigError, match=r"linear layers only.*conv"):
        attach(unet, LoraConfig(init="mica", rank=2, targets="all"))


def test_a_taken_name_is_refused(unet: UNet2DConditionModel) -> None:
    attach(unet, LoraConfig(rank=2))
    with pytest.raises(ConfigError, match="already has an adapter named 'default'"):
        attach(unet, LoraConfig(rank=2))


# Attaching


@pytest.mark.parametrize(
    ("config", "exact"),
    [
        (LoraConfig(rank=4, targets="all"), True),
        (LoraConfig(rank=4, targets="all", init="default", use_rslora=True), True),
        (LoraConfig(rank=4, targets="all", use_dora=True), False),
        (LoraConfig(rank=4, init="orthogonal"), False),
        (LoraConfig(rank=4, init="mica"), True),
    ],
)
def test_a_fresh_adapter_changes_nothing_and_leaves_the_base_alone(
    base: UNet2DConditionModel, unet: UNet2DConditionModel, config: LoraConfig, exact: bool
) -> None:
    attach(unet, config)
    layers = adapters.base_layers(unet)
    for path, layer in adapters.base_layers(base).items():
        assert torch.equal(layer.weight, layers[path].weight), path
    on, untouched = quiet(unet), quiet(base)
    assert torch.equal(on, untouched) if exact else torch.allclose(on, untouched, atol=1e-5)


def test_the_trainable_parameters_are_the_adapters_in_float32(unet: UNet2DConditionModel) -> None:
    unet.to(torch.bfloat16)
    trainable = attach(unet, LoraConfig(rank=3, targets="all"))
    assert {p.dtype for p in trainable} == {torch.float32}
    assert {id(p) for p in trainable} == {id(p) for p in unet.parameters() if p.requires_grad}
    layers = adapters.base_layers(unet)
    sizes = [3 * (x.weight[0].numel() + x.weight.shape[0]) for p, x in layers.items() if "_block" in p]
    assert adapters.count(unet) == (len(sizes), sum(sizes)) == (len(sizes), sum(p.numel() for p in trainable))


def test_the_seed_decides_the_start_and_the_global_generator_is_left_alone(base: UNet2DConditionModel) -> None:
    states = []
    for seed in (1, 1, 2):
        network = copy.deepcopy(base)
        torch.manual_seed(7)
        torch.rand(len(states))  # another global state each time
        before = torch.get_rng_state()
        attach(network, LoraConfig(rank=2), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(adapters.state_dict(network))
    key = next(key for key in states[0] if "lora_A" in key)
    assert torch.equal(states[0][key], states[1][key])
    assert not torch.equal(states[0][key], states[2][key])


def test_the_meta_device_gives_the_same_counts(base: UNet2DConditionModel, unet: UNet2DConditionModel) -> None:
    with torch.device("meta"):
        ghost = UNet2DConditionModel.from_config(base.config)
    config = LoraConfig(rank=4, targets="all", use_dora=True)
    assert all(p.is_meta for p in attach(ghost, config))
    attach(unet, config)
    assert adapters.count(ghost) == adapters.count(unet)


# Reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_off_is_the_untouched_base_to_the_bit(base: UNet2DConditionModel, dtype: torch.dtype, dora: bool) -> None:
    untouched = copy.deepcopy(base).to(dtype)
    unet = copy.deepcopy(untouched)
    # peft's DoRA convolutions with dropout need autocast on a half-precision base
    attach(unet, LoraConfig(rank=4, alpha=8, targets="all", dropout=0.0 if dora else 0.5, use_dora=dora))
    stir(unet)
    unet.train()
    with torch.no_grad(), adapters_off(unet):
        reference = run(unet, dtype=dtype)
    assert torch.equal(reference, quiet(untouched, dtype=dtype))
    assert (quiet(unet, dtype=dtype) - reference).abs().max() > 1e-3  # on again


def test_off_restores_flags_and_mode_also_when_the_forward_raises(unet: UNet2DConditionModel) -> None:
    attach(unet, LoraConfig(rank=2), name="frozen")
    stir(unet, "frozen")
    trainable = attach(unet, LoraConfig(rank=2, targets="all"), name="trained")
    adapters.use_adapters(unet, ["frozen", "trained"], [1, 1])
    trainable[0].requires_grad_(False)  # a choice of the user
    unet.train()
    unet.mid_block.eval()
    flags = {key: p.requires_grad for key, p in unet.named_parameters()}
    modes = {key: m.training for key, m in unet.named_modules()}
    on = quiet(unet)

    with pytest.raises(KeyError), torch.no_grad(), adapters_off(unet), adapters_off(unet):
        raise KeyError
    assert torch.equal(quiet(unet), on)
    assert {key: p.requires_grad for key, p in unet.named_parameters()} == flags
    assert {key: m.training for key, m in unet.named_modules()} == modes
    assert flags[next(key for key in flags if ".lora_A.frozen" in key)] is False


def test_leaving_an_inner_off_keeps_the_outer_one(base: UNet2DConditionModel, unet: UNet2DConditionModel) -> None:
    attach(unet, LoraConfig(rank=2))
    stir(unet)
    with torch.no_grad(), adapters_off(unet):
        with adapters_off(unet):
            pass
        assert torch.equal(run(unet), run(base))


def test_a_reference_pass_between_forward_and_backward_keeps_the_gradients(unet: UNet2DConditionModel) -> None:
    trainable = attach(unet, LoraConfig(rank=2))
    stir(unet)

    def gradients(between: bool) -> list[Tensor]:
        loss = run(unet).square().mean()
        if between:
            with torch.no_grad(), adapters_off(unet):
                run(unet)
        return list(torch.autograd.grad(loss, trainable))

    for plain, mixed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, mixed)
        assert plain.abs().max() > 0


def test_off_refuses_gradients_missing_adapters_and_merged_weights(unet: UNet2DConditionModel) -> None:
    with pytest.raises(RuntimeError, match="no adapter"), torch.no_grad(), adapters_off(unet):
        pass
    attach(unet, LoraConfig(rank=2))
    with pytest.raises(RuntimeError, match="no_grad"), adapters_off(unet):
        pass
    unet.fuse_lora()
    with pytest.raises(RuntimeError, match="merged"), torch.no_grad(), adapters_off(unet):
        pass


# Weights


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=4, alpha=12, targets="all"),
        LoraConfig(rank=4, alpha=6, targets="all", use_rslora=True),
        LoraConfig(rank=4, targets=("conv1", "downsamplers.0.conv", "upsamplers.0.conv")),
    ],
)
def test_deltas_merged_into_the_base_give_the_adapters_output(base: UNet2DConditionModel, config: LoraConfig) -> None:
    unet = copy.deepcopy(base)
    attach(unet, config)
    stir(unet)
    deltas = adapters.delta_weights(unet)
    assert list(deltas) == target_modules(base, config.targets)
    on = quiet(unet)
    assert (on - quiet(merged(base, deltas))).abs().max() < 1e-4 * on.abs().max()
    assert (on - quiet(base)).abs().max() > 1e-3


def test_the_delta_of_a_convolution_is_the_composition_of_its_two() -> None:
    # A is 3x3 to r channels, B 1x1: their composition applied to an image is the convolution with the delta.
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 3, 3, generator=draw), torch.randn(5, 2, 1, 1, generator=draw)
    x = torch.randn(1, 3, 6, 6, generator=draw)
    both = nn.functional.conv2d(nn.functional.conv2d(x, a), b)
    assert torch.allclose(nn.functional.conv2d(x, adapters.delta(a, b, 0.5)), both / 2, atol=1e-5)


def test_dora_has_no_delta(unet: UNet2DConditionModel) -> None:
    attach(unet, LoraConfig(rank=2, use_dora=True))
    with pytest.raises(ConfigError, match="DoRA"):
        adapters.delta_weights(unet)


def test_weighted_adapters_add_up_and_stay_trainable_as_they_were(
    base: UNet2DConditionModel, unet: UNet2DConditionModel
) -> None:
    attach(unet, LoraConfig(rank=2, alpha=5, targets="all"), name="one")
    attach(unet, LoraConfig(rank=4, use_rslora=True), name="other")
    stir(unet, "one")
    stir(unet, "other")
    one, other = adapters.delta_weights(unet, "one"), adapters.delta_weights(unet, "other")
    flags = [p.requires_grad for p in unet.parameters()]
    adapters.use_adapters(unet, ["one", "other"], [0.5, -2.0])
    expected = {path: 0.5 * change - 2 * other.get(path, torch.zeros(())) for path, change in one.items()}
    on = quiet(unet)
    assert (on - quiet(merged(base, expected))).abs().max() < 1e-4 * on.abs().max()
    assert [p.requires_grad for p in unet.parameters()] == flags
    assert torch.equal(
        adapters.delta_weights(unet, "one")["mid_block.resnets.0.conv1"], one["mid_block.resnets.0.conv1"]
    )
    adapters.use_adapters(unet, ["other"], [1.0])
    assert (quiet(unet) - quiet(merged(base, other))).abs().max() < 1e-4 * on.abs().max()


def test_unknown_adapters_and_missing_weights_are_refused(unet: UNet2DConditionModel) -> None:
    attach(unet, LoraConfig(rank=2), name="style")
    with pytest.raises(ConfigError, match=r"did you mean 'style'\?"):
        adapters.use_adapters(unet, ["styl"], [1.0])
    with pytest.raises(ConfigError, match="one weight per name"):
        adapters.use_adapters(unet, ["style"], [])
    with pytest.raises(ConfigError, match="attached: style"):
        adapters.state_dict(unet, "default")


# State


@pytest.mark.parametrize("dora", [False, True])
def test_the_state_is_pefts_and_returns_to_the_bit(base: UNet2DConditionModel, dora: bool) -> None:
    config = LoraConfig(rank=2, targets="all", use_dora=dora)
    first, second = copy.deepcopy(base), copy.deepcopy(base)
    attach(first, config, seed=1)
    stir(first)
    state = adapters.state_dict(first)
    theirs = get_peft_model_state_dict(first, adapter_name="default")
    assert state.keys() == theirs.keys()
    assert all(torch.equal(state[key], theirs[key]) for key in state)
    attach(second, config, seed=2)
    places = [p.data_ptr() for p in adapters.parameters(second)]
    adapters.load_state_dict(second, state)
    assert torch.equal(quiet(first), quiet(second))
    assert places == [p.data_ptr() for p in adapters.parameters(second)]  # an optimiser keeps its parameters
    adapters.parameters(first)[0].data.zero_()
    assert next(iter(state.values())).abs().max() > 0  # a copy


def test_a_state_that_does_not_fit_changes_nothing(unet: UNet2DConditionModel) -> None:
    attach(unet, LoraConfig(rank=2))
    state = adapters.state_dict(unet)
    last = list(state)[-1]
    other = {key: value + 1 for key, value in state.items()}
    for wrong, said in [
        ({key: value for key, value in other.items() if key != last}, "missing"),
        (other | {"conv_in.lora_A.weight": torch.zeros(2, 2)}, "conv_in"),
        (other | {last: torch.zeros(3, 3)}, "shape"),
    ]:
        with pytest.raises(CheckpointError, match=said):
            adapters.load_state_dict(unet, wrong)
    assert all(torch.equal(value, state[key]) for key, value in adapters.state_dict(unet).items())
