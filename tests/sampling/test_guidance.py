"""Two sets of weights in guidance: every stock pipeline against networks whose weights were added up by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from torch import Tensor, nn

from diffalign import adapters
from diffalign.branches import Branches
from diffalign.config import LoraConfig, ModelConfig
from diffalign.errors import ConfigError
from diffalign.families import DECODER, ENCODERS, NETWORK, load_family
from diffalign.sampling.guidance import NegativeGuidance, falling, interval

NAMES = ("sd", "sdxl", "sd3", "pixart", "sana", "cogvideox", "flux", "qwen_image", "wan")
APART = ("flux", "qwen_image", "wan")  # pipelines that call once for every branch
CALLS: dict[str, dict[str, Any]] = {
    "pixart": {"clean_caption": False, "use_resolution_binning": False},
    "sana": {"use_resolution_binning": False, "complex_human_instruction": None},
    "cogvideox": {"max_sequence_length": tiny.TOKENS, "num_frames": 5},
    "wan": {"max_sequence_length": tiny.TOKENS, "num_frames": 5},
    "sd3": {"max_sequence_length": tiny.TOKENS},
    "flux": {"max_sequence_length": tiny.TOKENS},
    "qwen_image": {"max_sequence_length": 200},
}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pipe(name: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return stock(name, request, tmp_path_factory)


def stock(name: str, request: pytest.FixtureRequest, factory: pytest.TempPathFactory) -> Any:
    """The stock pipeline of a family over random weights, with the adapters "good" and "bad" in its network."""
    if name in tiny.FIXTURES:
        folder = request.getfixturevalue(tiny.FIXTURES[name])
    else:
        folder = factory.getbasetemp() / f"guidance-{name}"
        if not folder.exists():
            tiny.build(name, folder)
    family = load_family(ModelConfig(family=name, pretrained=str(folder), **tiny.SETTINGS.get(name, {})))
    family.load(ENCODERS, NETWORK, DECODER)
    pipe = family.pipeline()
    attach(network_of(pipe))
    return pipe


def network_of(pipe: Any) -> nn.Module:
    network: nn.Module = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    return network


def attach(network: nn.Module) -> None:
    draw = torch.Generator().manual_seed(1)
    for name in ("good", "bad"):
        adapters.attach(network, LoraConfig(rank=2, alpha=3.0, targets="all"), name)
    with torch.no_grad():
        for path, value in network.named_parameters():
            if "lora_B" in path:
                value.copy_(0.2 * torch.randn(value.shape, generator=draw))
    for layer in Branches(network).layers.values():
        layer.set_adapter("good")


def run(pipe: Any, name: str, scale: float = 3.0, count: int = 2, **more: Any) -> Tensor:
    """Latents of a short run."""
    guidance = {"guidance_scale": scale}
    if name in ("flux", "qwen_image"):
        guidance = {"true_cfg_scale": scale}
    out = pipe(
        ["a red circle", "a blue square"][:count],
        negative_prompt=["a green ring", ""][:count],
        height=32,
        width=32,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        return_dict=False,
        **guidance,
        **CALLS.get(name, {}),
        **more,
    )[0]
    assert out.isfinite().all()
    return out


def summed(network: nn.Module, mix: dict[str, float]) -> nn.Module:
    """A copy without adapters whose weights have those of a mixture added, by hand."""
    network = copy.deepcopy(network)
    for path, layer in Branches(network).layers.items():
        weight = layer.base_layer.weight
        for name, share in mix.items():
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            delta = torch.einsum("or...,ri...->oi...", b.flatten(1), a.flatten(1)).reshape(weight.shape)
            weight.data += share * layer.scaling[name] * delta
        parent = network.get_submodule(path.rpartition(".")[0])
        setattr(parent, path.rpartition(".")[2], layer.base_layer)
    return network


def by_hand(pipe: Any, name: str, good: dict[str, float], bad: dict[str, float], **more: Any) -> Tensor:
    """A run over two networks: each call is answered branch by branch."""
    network = network_of(pipe)
    positive, negative = summed(network, good), summed(network, bad)
    calls: list[int] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if name in APART:
            return (positive if len(calls) % 2 else negative)(*args, **kwargs)
        outs = [net(*args, **kwargs) for net in (negative, positive)]
        below, above = (out[0] if isinstance(out, tuple) else out.sample for out in outs)
        return (torch.cat([below.chunk(2)[0], above.chunk(2)[1]]),)

    network.forward = forward  # type: ignore[method-assign]
    try:
        return run(pipe, name, **more)
    finally:
        del network.__dict__["forward"]


def close(one: Tensor, other: Tensor) -> None:
    """Random weights blow rounding up from step to step; a wrong branch would differ by about as much as there is."""
    torch.testing.assert_close(one, other, rtol=1e-3, atol=3e-4 * float(other.abs().max()))


def test_branches_have_the_weights_of_the_formula(pipe: Any, name: str) -> None:
    wanted = by_hand(pipe, name, {"good": 1.0}, {"good": 0.4, "bad": 0.7})
    with NegativeGuidance(pipe, "bad", alpha=0.4, beta=0.7) as guidance:
        close(run(pipe, name), wanted)
    assert guidance.calls == "auto", "one batch was enough"
    with NegativeGuidance(pipe, "bad", alpha=0.4, beta=0.7, calls="two"):
        close(run(pipe, name), wanted)
    plain = run(pipe, name)
    assert (plain - wanted).abs().max() > 1e-3, "the negative adapter does something"


def test_nothing_in_the_negative_adapter_is_plain_guidance_to_the_bit(pipe: Any, name: str) -> None:
    for path, value in network_of(pipe).named_parameters():
        if "lora_B.bad" in path:
            value.data.zero_()
    plain = run(pipe, name)
    with NegativeGuidance(pipe, "bad"):
        assert torch.equal(run(pipe, name), plain)
    with NegativeGuidance(pipe, "bad", beta=0.0):
        assert torch.equal(run(pipe, name), plain)
    assert torch.equal(run(pipe, name), plain), "everything is put back"


@pytest.mark.parametrize("name", ["sdxl", "wan"], indirect=True)
def test_base_with_a_negative_adapter_leaves_the_positive_branch_alone(pipe: Any, name: str) -> None:
    for layer in Branches(network_of(pipe)).layers.values():
        layer.enable_adapters(False)
    wanted = by_hand(pipe, name, {}, {"bad": 1.0})
    with NegativeGuidance(pipe, "bad"):
        close(run(pipe, name), wanted)


def test_a_run_without_a_negative_branch_is_refused(pipe: Any, name: str) -> None:
    with pytest.raises(ConfigError, match="without a negative branch"), NegativeGuidance(pipe, "bad"):
        run(pipe, name, scale=1.0)
    if name not in APART:  # one image: nothing that could look like two halves
        with pytest.raises(ConfigError, match="true_cfg_scale"), NegativeGuidance(pipe, "bad"):
            run(pipe, name, scale=1.0, count=1)
    run(pipe, name)


@pytest.mark.parametrize("name", ["sdxl", "wan"], indirect=True)
def test_schedules_and_rescaling_are_those_of_their_formulas(pipe: Any, name: str) -> None:
    plain = run(pipe, name, scale=4.0)
    with NegativeGuidance(pipe, "bad", beta=0.0, scale=lambda step, steps: 4.0):
        close(run(pipe, name, scale=2.0), plain)
    with NegativeGuidance(pipe, "bad", scale=lambda step, steps: 1.0):  # the positive branch alone
        without = run(pipe, name, scale=2.0)
    close(without, run(pipe, name, scale=1.0))
    seen: list[tuple[int, int]] = []
    with NegativeGuidance(pipe, "bad", scale=lambda step, steps: seen.append((step, steps)) or 2.0):
        run(pipe, name)
        run(pipe, name)
    assert seen == [(0, 3), (1, 3), (2, 3)] * 2
    if name == "sdxl":
        wanted = run(pipe, name, guidance_rescale=0.7)
        with NegativeGuidance(pipe, "bad", beta=0.0, rescale=0.7):
            close(run(pipe, name), wanted)


@pytest.mark.parametrize("name", ["sd3", "wan"], indirect=True)
def test_negative_prompts_can_be_scaled_in_the_first_steps(pipe: Any, name: str) -> None:
    network, seen = network_of(pipe), []
    network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    plain = run(pipe, name)
    before = [text.clone() for text in seen]

    def stronger(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        number = len(seen) - 1  # of this call
        text = kwargs["encoder_hidden_states"].clone()
        if name == "wan" and number in (1, 3):  # the negative branch of the first two steps
            text *= 1.5
        if name == "sd3" and number in (0, 1):
            text[: len(text) // 2] *= 1.5
        return args, kwargs | {"encoder_hidden_states": text}

    seen.clear()
    hook = network.register_forward_pre_hook(stronger, with_kwargs=True)
    wanted = run(pipe, name)
    hook.remove()
    seen.clear()
    with NegativeGuidance(pipe, "bad", beta=0.0, prompt_scale=1.5, prompt_steps=2):
        scaled = run(pipe, name)
    close(scaled, wanted)
    assert (scaled - plain).abs().max() > 1e-4
    assert all(torch.equal(one, other) for one, other in zip(before, seen, strict=True)), (
        "the pipeline's own is untouched"
    )
    with NegativeGuidance(pipe, "bad", beta=0.0, prompt_scale=1.5, prompt_steps=0):
        assert torch.equal(run(pipe, name), plain)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart", "wan"], indirect=True)
def test_negative_prompts_can_be_moved_away_from_the_positive_ones(pipe: Any, name: str) -> None:
    """(1 + a) negative - a positive, sequences and pooled embeddings alike."""
    network, share, apart = network_of(pipe), 0.5, name in APART
    told: dict[str, list[Tensor]] = {}

    def away(key: str, value: Tensor) -> Tensor:
        def mixed(below: Tensor, above: Tensor) -> Tensor:
            return torch.maximum(below, above) if "mask" in key else (1 + share) * below - share * above

        if apart:
            seen = told.setdefault(key, [])
            seen.append(value)
            return value if len(seen) % 2 else mixed(value, seen[-2])
        below, above = value.chunk(2)
        return torch.cat([mixed(below, above), above])

    def moved(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        masks = ("encoder_attention_mask", "encoder_hidden_states_mask")
        for key in ("encoder_hidden_states", "pooled_projections", *masks):
            if kwargs.get(key) is not None:
                kwargs[key] = away(key, kwargs[key])
        more = kwargs.get("added_cond_kwargs")
        if more and "text_embeds" in more:
            kwargs["added_cond_kwargs"] = more | {"text_embeds": away("text_embeds", more["text_embeds"])}
        return args, kwargs

    plain = run(pipe, name)
    hook = network.register_forward_pre_hook(moved, with_kwargs=True)
    wanted = run(pipe, name)
    hook.remove()
    with NegativeGuidance(pipe, "bad", beta=0.0, prompt_share=share):
        close(run(pipe, name), wanted)
    assert (wanted - plain).abs().max() > 1e-4
    with NegativeGuidance(pipe, "bad", beta=0.0, prompt_share=0.0):
        assert torch.equal(run(pipe, name), plain)


@pytest.mark.parametrize("name", ["qwen_image"], indirect=True)
def test_prompts_of_other_lengths_are_not_mixed(pipe: Any, name: str) -> None:
    with (
        pytest.raises(ConfigError, match=r"141 and 140 tokens cannot be mixed.*Set it to 0"),
        NegativeGuidance(pipe, "bad", prompt_share=0.5),
    ):
        run(pipe, name)


def test_a_whole_network_can_be_the_negative_branch(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pipe = stock("sdxl", request, tmp_path_factory)
    wanted = by_hand(pipe, "sdxl", {"good": 1.0}, {"bad": 1.0})
    with NegativeGuidance(pipe, summed(pipe.unet, {"bad": 1.0})):
        close(run(pipe, "sdxl"), wanted)


def test_adapter_files_are_loaded_for_the_time_of_the_context(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    from peft.utils import get_peft_model_state_dict

    pipe = stock("sdxl", request, tmp_path_factory)
    pipe.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipe.unet, adapter_name="bad"))
    with NegativeGuidance(pipe, "bad"):
        wanted = run(pipe, "sdxl")
    pipe.delete_adapters("bad")
    plain = run(pipe, "sdxl")
    for active in (True, False):
        if not active:
            pipe.delete_adapters("good")
            plain = run(pipe, "sdxl")
        # alpha is not in a plain file, where it is then the rank
        with NegativeGuidance(pipe, tmp_path, beta=1.5) as guidance:
            got = run(pipe, "sdxl")
            assert "diffalign_negative" in pipe.get_list_adapters()["unet"]
        if active:
            close(got, wanted)
        assert guidance.calls == "auto"
        assert torch.equal(run(pipe, "sdxl"), plain)
        assert "diffalign_negative" not in pipe.get_list_adapters().get("unet", [])


def test_layers_that_cannot_tell_rows_apart_get_two_calls(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pipe = stock("sdxl", request, tmp_path_factory)
    wanted = by_hand(pipe, "sdxl", {"good": 1.0}, {"good": 1.0, "bad": 1.0})
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    plain = attention.forward

    def shuffled(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # rows of both halves in turn
        order = torch.arange(len(hidden_states)).view(2, -1).T.flatten() if len(hidden_states) > 2 else slice(None)
        back = torch.argsort(order) if isinstance(order, Tensor) else order
        return plain(hidden_states[order], *args, **kwargs)[back]

    attention.forward = shuffled
    with NegativeGuidance(pipe, "bad") as guidance:
        close(run(pipe, "sdxl"), wanted)
    assert guidance.calls == "two"


def test_gradients_of_both_branches_go_through_checkpointed_blocks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    unet = stock("sdxl", request, tmp_path_factory).unet
    draw = torch.Generator().manual_seed(3)
    x, text = torch.randn(4, 20, 8, 8, generator=draw), torch.randn(4, 5, 64, generator=draw)
    more = {"text_embeds": torch.randn(4, 32, generator=draw), "time_ids": torch.zeros(4, 6)}
    time = torch.full((4,), 500)
    branches = Branches(unet)
    for name, value in unet.named_parameters():
        value.requires_grad_("lora_" in name)

    def gradients(rows: list[slice], parts: list[tuple[dict[str, float], ...]]) -> dict[str, Tensor]:
        unet.zero_grad()
        for row, part in zip(rows, parts, strict=True):
            with branches.installed(), branches.use(*part):
                call(row).square().sum().backward()
        return {n: p.grad.clone() for n, p in unet.named_parameters() if p.grad is not None}

    bad, good = {"good": 0.5, "bad": 1.0}, {"good": 1.0}

    def call(row: slice) -> Tensor:
        out: Tensor = unet(x[row], time[row], text[row], added_cond_kwargs={k: v[row] for k, v in more.items()}).sample
        return out

    with torch.no_grad(), branches.installed():
        with branches.use(bad, good):
            both = call(slice(0, 4))
        for part, row in ((bad, slice(0, 2)), (good, slice(2, 4))):
            with branches.use(part):
                torch.testing.assert_close(both[row], call(row), rtol=1e-5, atol=1e-5)
    apart = gradients([slice(0, 2), slice(2, 4)], [(bad,), (good,)])
    together = gradients([slice(0, 4)], [(bad, good)])
    unet.train()
    unet.enable_gradient_checkpointing()
    checkpointed = gradients([slice(0, 4)], [(bad, good)])
    assert {name.split(".")[-2] for name in apart} == {"good", "bad"}
    for found in (together, checkpointed):
        for name, value in apart.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))


def test_bfloat16_stays_bfloat16(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    pipe = stock("sdxl", request, tmp_path_factory)
    wanted = by_hand(pipe, "sdxl", {"good": 1.0}, {"good": 1.0, "bad": 1.0})
    pipe.to(torch.bfloat16)
    with NegativeGuidance(pipe, "bad") as guidance:
        got = run(pipe, "sdxl")
    assert guidance.calls == "auto"
    assert got.dtype == torch.bfloat16
    assert (got.float() - wanted).abs().mean() < 0.1 * wanted.abs().mean()


def test_what_cannot_be_told_apart_is_refused(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pipe = stock("sdxl", request, tmp_path_factory)
    with pytest.raises(ConfigError, match="no adapter missing; attached are bad, good"):
        Branches(pipe.unet).use({"missing": 1.0}).__enter__()
    adapters.attach(pipe.unet, LoraConfig(rank=2, use_dora=True), "magnitudes")
    with pytest.raises(ConfigError, match="DoRA"):
        Branches(pipe.unet)
    pipe.unet.set_adapter("good")
    pipe.delete_adapters("magnitudes")
    pipe.fuse_lora(adapter_names=["good"])
    with pytest.raises(ConfigError, match=r"unfuse_lora\(\)"), NegativeGuidance(pipe, "bad"):
        pass
    with pytest.raises(ConfigError, match="expected a diffusers text-to-image"):
        NegativeGuidance(object(), "bad")

    class Distilled:
        transformer = nn.Linear(1, 1)

        def __call__(self, prompt: str) -> None: ...

    with pytest.raises(ConfigError, match="guidance-distilled"):
        NegativeGuidance(Distilled(), "bad")


def test_guidance_falls_to_half_and_intervals_end() -> None:
    values = [falling(4.0)(step, 25) for step in range(25)]
    assert values[:4] == pytest.approx([4.00, 3.84, 3.48, 3.09], abs=0.005)
    assert values[8] == pytest.approx(2.10, abs=0.005)
    assert values[-1] == pytest.approx(2.0, abs=1e-3)
    assert values == sorted(values, reverse=True)
    assert [interval(3.0, 0.25, 0.75)(step, 4) for step in range(4)] == [1.0, 3.0, 3.0, 1.0]
    with pytest.raises(ConfigError, match="0 <= start < end <= 1"):
        interval(3.0, 0.5, 0.5)
