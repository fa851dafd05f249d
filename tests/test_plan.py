"""`diffalign plan`: exact counts of the published architectures, and the arithmetic on top of them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffalign import config_loading
from diffalign.adapters import attach
from diffalign.architecture import assume, resolve
from diffalign.config import LoraConfig, ModelConfig, RunConfig
from diffalign.config_loading import build, load_config
from diffalign.errors import ConfigError
from diffalign.families import DECODER, ENCODERS, NETWORK, DenoisingFamily, load_family, published
from diffalign.hardware import resolve_auto
from diffalign.measure import NetworkCost, measure_decoder, measure_encoder, measure_network
from diffalign.plan import GIB, choose_micro_batch, make_plan, pairs_per_device, to_json
from diffalign.plan_text import render
from diffalign.preflight import check

SHIPPED = ("sdxl_dpo_pickapic", "sdxl_dpo_pickapic_24gb", "sd15_dpo_pickapic")
# Recipes of transformers: the card they are for, the network's parameters, the sum that their header says.
RECIPES = {
    "sd35m_dpo_pickapic": (24, 2_243_171_520, 8.6),
    "flux_dpo_pickapic": (80, 11_901_408_320, 33.5),
    "wan_dpo_video": (24, 1_418_996_800, 8.0),
}


def sd15(**changes: Any) -> RunConfig:
    """A small, quick configuration: SD1.5 at 256 px."""
    tree: dict[str, Any] = {
        "output_dir": "unused",
        "model": {"family": "sd", "pretrained": "sd15", "random_weights": True},
        "data": {"resolution": 256},
        "objective": {"name": "dpo", "beta_dpo": 5000.0},
        "training": {"mixed_precision": "bf16", "train_batch_size": 4, "gradient_accumulation_steps": 8},
    }
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values
    return build(tree)


def test_language_models_are_not_planned() -> None:
    with pytest.raises(ConfigError, match="'causal_lm' works on texts, and only diffusion models are planned"):
        make_plan(load_config("demo_llm_dpo"))


# --- counts ----------------------------------------------------------------------------------------------------------


def measured(family: str, name: str, rank: int, shape: tuple[int, ...]) -> NetworkCost:
    architecture = resolve(ModelConfig(family=family, pretrained=name, random_weights=True))
    return measure_network(architecture, LoraConfig(rank=rank), shape=shape, dtype=torch.bfloat16)


def test_sdxl_at_1024_px_against_known_numbers() -> None:
    cost = measured("sdxl", "sdxl", 16, (4, 128, 128))
    assert cost.parameters == 2_567_463_684
    assert cost.weight_bytes == 2 * cost.parameters
    assert (cost.lora_modules, cost.lora_parameters) == (560, 23_224_320)
    assert cost.forward_flops == pytest.approx(6.76e12, rel=0.02)
    # Backward is hardly more than forward: frozen layers need no weight gradient. Fused attention recomputes a little.
    assert 1.0 < cost.backward_flops / cost.forward_flops < 1.25
    assert cost.saved_bytes / GIB == pytest.approx(7.26, rel=0.05)
    assert cost.checkpoint_bytes / GIB == pytest.approx(0.45, rel=0.2)
    assert cost.transient_bytes / GIB == pytest.approx(0.2, rel=0.1)


def test_adapter_flops_are_what_separates_policy_and_reference() -> None:
    """2 r (in + out) per position and layer: twice the rank, twice the difference; the reference does not move."""
    one, two = (measured("sd", "sd15", rank, (4, 16, 16)) for rank in (4, 8))
    assert one.forward_flops == two.forward_flops
    assert two.policy_forward_flops - two.forward_flops == 2 * (one.policy_forward_flops - one.forward_flops) > 0
    assert two.lora_parameters == 2 * one.lora_parameters


def test_flux_at_1024_px_against_arithmetic() -> None:
    """Products of weights that see every token, and attention; modulation sees one vector."""
    cost = measured("flux", "flux1-dev", 16, (16, 128, 128))
    assert cost.parameters == 11_901_408_320
    assert cost.lora_parameters == 26_148_864
    image, text, width, feed_forward = 4096, 512, 3072, 12288
    double = (image + text) * (4 * width**2 + 2 * width * feed_forward)
    single = (image + text) * (3 * width**2 + width * feed_forward + (width + feed_forward) * width)
    attention = 2 * (image + text) ** 2 * width
    ends = image * 64 * width * 2 + text * 4096 * width
    modulation = (19 * 12 + 38 * 3 + 2) * width**2
    expected = 2 * (19 * double + 38 * single + 57 * attention + ends + modulation)
    assert cost.forward_flops == pytest.approx(expected, rel=0.001)
    assert cost.checkpoint_bytes < 0.1 * cost.saved_bytes


TRANSFORMERS = ("sd3", "flux", "pixart", "sana", "qwen_image", "wan", "cogvideox")
HUB = {
    "stabilityai/stable-diffusion-3-medium-diffusers": ("sd3", 2_028_328_000),
    "stabilityai/stable-diffusion-3.5-medium": ("sd3", 2_243_171_520),
    "stabilityai/stable-diffusion-3.5-large": ("sd3", 8_056_627_520),
    "black-forest-labs/FLUX.1-dev": ("flux", 11_901_408_320),
    "black-forest-labs/FLUX.1-schnell": ("flux", 11_891_178_560),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": ("pixart", 610_856_096),
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": ("sana", 1_604_462_752),
    "Qwen/Qwen-Image": ("qwen_image", 20_430_401_088),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("wan", 1_418_996_800),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": ("wan", 14_288_491_584),
    "THUDM/CogVideoX-2b": ("cogvideox", 1_693_783_872),
    "THUDM/CogVideoX-5b": ("cogvideox", 5_570_283_072),
}


@pytest.mark.parametrize("hub", HUB)
def test_hub_ids_of_transformers_have_their_published_counts(hub: str) -> None:
    family, count = HUB[hub]
    architecture = resolve(ModelConfig(family=family, pretrained=hub))
    assert architecture.parameters["transformer"] == count
    assert hub in str(architecture.assumed)
    wide = "Sana" in hub or "PixArt" in hub or "Wan" in hub
    item = next(x for x in architecture.downloads(architecture.model) if x.source == f"{hub}/transformer")
    assert item.bytes == architecture.stored["transformer"] * (4 if wide else 2)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("sana", "Efficient-Large-Model/Sana_600M_1024px_diffusers"),
        ("wan", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
        ("wan", "someone/wan"),
        ("cogvideox", "THUDM/CogVideoX1.5-5B"),
    ],
)
def test_what_is_not_known_is_not_assumed(family: str, name: str) -> None:
    with pytest.raises(ConfigError, match="no architecture is known"):
        assume(ModelConfig(family=family, pretrained=name))


@pytest.fixture(scope="module")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp(family) / "tiny" for family in TRANSFORMERS}
    for family, folder in folders.items():
        tiny.build(family, folder)
    return folders


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_counts_are_of_what_the_family_really_does(family: str, tiny_folders: dict[str, Path]) -> None:
    """Shapes and operations on the meta device against those of a loaded model, a clip of two latent frames included."""
    model = ModelConfig(family=family, pretrained=str(tiny_folders[family]), **tiny.SETTINGS.get(family, {}))
    architecture = resolve(model)
    real = load_family(model)
    assert isinstance(real, DenoisingFamily)
    real.load(NETWORK, ENCODERS, DECODER)
    frames = 1 + real.frame_step
    shape = architecture.latent_shape(32, frames)
    assert shape == real.latent_shape(32, 32, frames)
    conditioning = real.encode_prompts(["a red circle"])
    assert {name: value.shape[1:] for name, value in conditioning.items()} == architecture.conditioning
    assert architecture.text_numbers == sum(value.numel() for value in conditioning.values())
    lora = LoraConfig(rank=2, targets="attention+ff")
    cost = measure_network(architecture, lora, shape=shape, dtype=torch.float32)
    attach(real.network, lora)
    assert cost.weight_bytes == sum(x.nbytes for x in load_network(model).state_dict().values())
    # The other kernels of a CPU are not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        real.predict(real.network, torch.randn(1, *shape), torch.full((1,), 500.0), conditioning)
    assert cost.policy_forward_flops == counter.get_total_flops()
    assert 0 < cost.checkpoint_bytes < cost.saved_bytes
    assert cost.transient_bytes < cost.saved_bytes
    assert cost.backward_flops > 0


def load_network(model: ModelConfig) -> torch.nn.Module:
    family = load_family(model)
    family.load(NETWORK)
    return family.network


def test_clips_are_planned() -> None:
    config = build(
        {
            "output_dir": "unused",
            "model": {"family": "cogvideox", "pretrained": "cogvideox-2b", "random_weights": True},
            "data": {"resolution": 256, "num_frames": 17},
            "objective": {"name": "dpo"},
            "training": {"mixed_precision": "bf16", "train_batch_size": 1},
        }
    )
    plan = make_plan(config)
    assert plan.latent_shape == (16, 5, 32, 32)
    assert plan.latent_bytes_per_pair == 2 * 2 * 16 * 5 * 32 * 32
    assert plan.text_bytes_per_prompt == 2 * 226 * 4096
    text = render(plan)
    assert "256 px, 17 frames" in text
    assert "network forward, per clip" in text
    data = dataclasses.replace(config.data, num_frames=16)
    with pytest.raises(ConfigError, match=r"data.num_frames: got 16"):
        make_plan(dataclasses.replace(config, data=data))
    image = make_plan(dataclasses.replace(config, data=dataclasses.replace(config.data, num_frames=1)))
    assert image.network.forward_flops < plan.network.forward_flops / 3
    assert image.setting.memory.network == plan.setting.memory.network


def test_vae_encoding_of_one_image() -> None:
    cost = measure_encoder(published.component_configs("sdxl")["vae"], 1024)
    assert cost.flops == pytest.approx(4.88e12, rel=0.01)
    assert cost.peak_bytes >= 3 * 4 * 128 * 1024**2  # three full-resolution feature maps of 128 channels in float32


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_batch_epoch_and_rate() -> None:
    config = sd15(training={"learning_rate": 2e-5, "max_train_steps": 100}, data={"max_pairs": 1000, "resolution": 256})
    plan = make_plan(config, num_processes=2)
    assert plan.effective_batch == 4 * 8 * 2
    assert plan.steps_per_epoch == 16  # ceil(1000 / 64)
    assert plan.epochs == pytest.approx(6.4)
    assert plan.rate_per_pair == pytest.approx(2e-5 / 64)
    assert plan.objective["beta_on_summed_error"] == pytest.approx(5000 / (2 * 4 * 32 * 32))
    assert plan.latent_bytes_per_pair == 2 * 2 * 4 * 32 * 32
    assert plan.text_bytes_per_prompt == 2 * 77 * 768
    assert plan.cache_bytes == 1000 * (plan.latent_bytes_per_pair + plan.text_bytes_per_prompt)
    assert make_plan(config, pairs=640).steps_per_epoch == 20
    held_out = dataclasses.replace(config.evaluation, held_out_fraction=0.5)
    assert make_plan(dataclasses.replace(config, evaluation=held_out), num_processes=2).steps_per_epoch == 8


def test_work_per_pair() -> None:
    """DPO: two images, policy and reference. SFT: one image, no reference. No cache: the VAE at every step."""
    dpo, sft = make_plan(sd15()), make_plan(build_sft())
    network = dpo.network
    training = network.policy_forward_flops + network.backward_flops
    assert dpo.flops_per_pair == 2 * (training + network.forward_flops)
    assert sft.flops_per_pair == training
    live = make_plan(sd15(cache={"enabled": False}))
    encoder = measure_encoder(published.component_configs("sd15")["vae"], 256)
    assert live.flops_per_pair - dpo.flops_per_pair == 2 * encoder.flops
    assert live.setting.memory.encoders > 4 * 83_653_863
    assert dpo.setting.memory.encoders == 0
    assert live.cache_bytes is None


def build_sft() -> RunConfig:
    tree = config_loading.to_tree(sd15())
    return build(tree | {"objective": {"name": "sft"}})


def test_memory_adds_up_and_checkpointing_lowers_it() -> None:
    plain = make_plan(sd15())
    checkpointed = make_plan(sd15(training={"gradient_checkpointing": True}))
    memory = plain.setting.memory
    assert memory.network == 2 * 859_520_964
    assert memory.adapter == 16 * plain.network.lora_parameters
    assert memory.activations == 8 * plain.network.saved_bytes  # 4 pairs
    assert memory.total == sum(dataclasses.asdict(memory).values())
    assert checkpointed.setting.memory.total < memory.total - 0.5 * memory.activations
    assert checkpointed.flops_per_pair - plain.flops_per_pair == 2 * plain.network.policy_forward_flops
    ema = make_plan(sd15(training={"ema_decay": 0.99})).setting.memory
    assert ema.total - memory.total == 4 * plain.network.lora_parameters


# --- sampled images ---------------------------------------------------------------------------------------------------

PROMPTS = ["one", "two", "three"]


def sampled(name: str, *, online: bool = True, **rollout: Any) -> RunConfig:
    """SD1.5 on its own samples, 32 to an optimiser step."""
    own = {"prompts": PROMPTS, "rewards": ["world_verifier"], "samples_per_prompt": 4} if online else {}
    beta = {} if name in ("sft", "dro", "spo", "d3po") else {"beta": 30.0}
    tree = config_loading.to_tree(sd15())
    return build(tree | {"objective": {"name": name} | beta, "rollout": {"num_inference_steps": 10} | own | rollout})


@pytest.mark.parametrize(
    ("config", "prompts", "images", "forwards", "unit"),
    [
        (sampled("dpo"), 32, 128, 1280, "pairs"),
        (sampled("dpo", guidance_scale=5.0), 32, 128, 2560, "pairs"),
        (sampled("dpo", num_iterations=2, steps_per_generation=3), 16, 64, 640, "pairs"),
        (sampled("gdpo"), 8, 32, 320, "images"),
        (sampled("sft"), 32, 128, 1280, "images"),
        (sampled("d3po", steps_per_sample=4), 8, 32, 320, "pairs of steps"),
        (sampled("d3po"), 32 / 9, 128 / 9, 1280 / 9, "pairs of steps"),  # the last of 10 steps has no density
        (sampled("prdp"), 8, 32, 320, "images"),  # all steps of a trajectory are one row
        (sampled("spo", first_step=1), 4, 4 * 8 * 4, 4 * (10 + 8 * 4), "pairs of steps"),
        (sampled("seppo", online=False), 32, 32, 320, "pairs"),
        (sampled("dro", online=False, steps_per_sample=4), 8, 8, 80, "pairs"),
    ],
    ids=lambda value: value.objective.name if isinstance(value, RunConfig) else "",
)
def test_sampling_is_counted(config: RunConfig, prompts: float, images: float, forwards: float, unit: str) -> None:
    plan = make_plan(config)
    found = plan.sampling
    assert found is not None
    assert plan.unit == unit
    assert (found.prompts, found.images, found.forwards) == pytest.approx((prompts, images, forwards))
    each = plan.network.forward_flops if config.objective.name == "seppo" else plan.network.policy_forward_flops
    decoder = measure_decoder(published.component_configs("sd15")["vae"], plan.latent_shape)
    decoded = found.images * decoder.flops if config.rollout.rewards else 0
    assert found.flops == pytest.approx(found.forwards * each + decoded)
    work = plan.flops_per_pair * plan.effective_batch + found.flops
    assert plan.step_seconds["A100"] == pytest.approx(work / (312e12 * 0.4))
    two = make_plan(config, num_processes=2)
    assert two.step_seconds == pytest.approx(plan.step_seconds)
    assert f"{found.forwards:,.1f} forwards" in render(plan)


def test_prompts_alone_have_no_pairs_no_cache_and_no_download_of_data() -> None:
    plan = make_plan(sampled("dpo", num_prompts=2))
    text = render(plan)
    assert not any(word in text for word in ("usable pairs", "cache", "no usable source"))
    assert re.search(r"prompts +2\n", text)
    assert "reward models come on top: world_verifier" in text
    assert (plan.pairs, plan.cache_bytes, plan.cache_phase_bytes) == (None, None, None)
    assert plan.steps_per_epoch == 1
    assert plan.epochs == pytest.approx(plan.max_train_steps * 32 / 2)
    assert [item.what for item in plan.downloads] == ["model"]
    assert json.loads(to_json(plan))["sampling"]["available"] == 2
    assert "forwards" not in render(make_plan(sd15()))


def test_transitions_are_scored_with_the_samplers_guidance_and_groups_image_by_image() -> None:
    plain, guided = make_plan(sampled("d3po")), make_plan(sampled("d3po", guidance_scale=5.0))
    assert guided.flops_per_pair == 2 * plain.flops_per_pair
    assert guided.setting.memory.activations == 2 * plain.setting.memory.activations
    detached = make_plan(sampled("d3po", guidance_scale=5.0, negative_gradient=False))
    assert detached.setting.memory.activations == plain.setting.memory.activations
    one, whole = (make_plan(sampled("prdp", checkpoint_steps=again)) for again in (True, False))
    assert whole.setting.memory.activations == 9 * one.setting.memory.activations  # of 10 steps the last has no density
    assert one.flops_per_pair == whole.flops_per_pair + 9 * one.network.policy_forward_flops
    pairs, images = make_plan(sampled("dpo")), make_plan(sampled("gdpo"))
    assert pairs.flops_per_pair == 2 * images.flops_per_pair
    assert make_plan(sampled("dpo", guidance_scale=5.0)).flops_per_pair == pairs.flops_per_pair


def back_propagated(name: str, **rollout: Any) -> RunConfig:
    """SD1.5 on the gradient of a reward, 32 images to an optimiser step, 10 steps with guidance."""
    own = {"prompts": PROMPTS, "rewards": ["clip_score"], "num_inference_steps": 10, "guidance_scale": 5.0}
    return build(config_loading.to_tree(sd15()) | {"objective": {"name": name}, "rollout": own | rollout})


@pytest.mark.parametrize(
    ("name", "plain", "trained", "images"),
    [
        ("draft", 0, 10, 1),
        ("align_prop", 0, 10, 1),
        ("draft_lv", 9, 3, 3),
        ("refl", 9, 1, 1),
        ("drtune", 7, 3, 1),
        ("srpo", 10, 2, 2),
    ],
)
def test_back_propagation_is_counted(name: str, plain: int, trained: int, images: int) -> None:
    plan = make_plan(back_propagated(name))
    found, network = plan.sampling, plan.network
    assert found is not None
    assert plan.unit == "images"
    assert (found.prompts, found.images, found.forwards) == (32, 32 * images, 32 * plain * 2)
    there_and_back = network.policy_forward_flops * (2 if trained > 1 else 1) + network.backward_flops
    assert plan.flops_per_pair == trained * 2 * there_and_back
    decoder = measure_decoder(published.component_configs("sd15")["vae"], plan.latent_shape)
    back = measure_decoder(published.component_configs("sd15")["vae"], plan.latent_shape, gradient=True)
    assert back.flops == pytest.approx(2 * decoder.flops, rel=0.05)  # weights are frozen: one product back
    assert back.peak_bytes > 2 * decoder.peak_bytes
    assert found.flops == pytest.approx(found.forwards * network.policy_forward_flops + found.images * back.flops)


def test_checkpointed_steps_take_the_memory_of_one() -> None:
    checkpointed, kept = (make_plan(back_propagated("draft", checkpoint_steps=again)) for again in (True, False))
    assert kept.setting.memory.activations == 10 * checkpointed.setting.memory.activations
    one = make_plan(back_propagated("draft", decode_batch_size=1)).sampling_phase_bytes
    four = checkpointed.sampling_phase_bytes
    assert one is not None
    assert four is not None
    assert four > one + 3e9
    assert kept.sampling_phase_bytes == four + kept.setting.memory.activations


def test_decoding_samples_counts_for_the_verdict() -> None:
    config = sampled("dpo")
    plan = make_plan(config)
    decoder = measure_decoder(published.component_configs("sd15")["vae"], plan.latent_shape)
    assert plan.sampling is not None
    batch = min(16, config.sampling.batch_size)
    assert plan.sampling.decoder_bytes == 4 * 83_653_863 + batch * decoder.peak_bytes
    assert plan.sampling_phase_bytes is not None
    more = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, batch_size=16))
    more = dataclasses.replace(more, training=dataclasses.replace(config.training, gradient_checkpointing=True))
    needed = make_plan(more)
    assert needed.sampling_phase_bytes is not None
    assert needed.sampling_phase_bytes > needed.setting.memory.total
    small = make_plan(more, gpu_gb=(needed.sampling_phase_bytes - 1) / GIB)
    assert small.fits is False
    assert "decoding samples does not" in render(small)
    assert make_plan(more, gpu_gb=(needed.sampling_phase_bytes + 1) / GIB).fits


# --- fitting a card --------------------------------------------------------------------------------------------------


def test_the_suggestion_fits_and_keeps_the_effective_batch() -> None:
    config = sd15(training={"train_batch_size": 64, "gradient_accumulation_steps": 2}, cache={"batch_size": 1})
    plan = make_plan(config, gpu_gb=6)
    assert plan.fits is False
    near = plan.nearest
    assert near is not None
    assert near.gradient_checkpointing
    assert near.memory.total <= 6 * GIB
    assert near.train_batch_size * near.gradient_accumulation_steps == 128
    training = dataclasses.replace(
        config.training,
        train_batch_size=near.train_batch_size,
        gradient_accumulation_steps=near.gradient_accumulation_steps,
        gradient_checkpointing=True,
    )
    again = make_plan(dataclasses.replace(config, training=training), gpu_gb=6)
    assert again.fits
    assert again.effective_batch == plan.effective_batch
    assert "training.gradient_checkpointing=true" in render(plan)
    # Nothing fits a card that cannot hold the weights.
    assert make_plan(config, gpu_gb=1).nearest is None
    assert "none" in render(make_plan(config, gpu_gb=1))


def test_checkpointing_comes_before_a_smaller_micro_batch() -> None:
    config = sd15()
    without, with_it = (
        make_plan(sd15(training={"gradient_checkpointing": flag})).setting.memory.total for flag in (False, True)
    )
    plan = make_plan(config, gpu_gb=(without + with_it) / 2 / GIB)
    assert plan.nearest is not None
    assert (plan.nearest.train_batch_size, plan.nearest.gradient_checkpointing) == (4, True)


def test_auto_prefers_no_checkpointing_and_divides_the_effective_batch() -> None:
    config = sd15(
        training={"train_batch_size": "auto", "gradient_checkpointing": "auto", "gradient_accumulation_steps": 24}
    )
    assert pairs_per_device(config) == 24
    assert choose_micro_batch(config, 200 * GIB) == (24, False)
    one = make_plan(sd15(training={"train_batch_size": 1, "gradient_accumulation_steps": 24})).setting.memory
    assert choose_micro_batch(config, one.total) == (1, False)
    micro, checkpointing = choose_micro_batch(config, one.total - 1)
    assert checkpointing
    assert 24 % micro == 0
    setting = make_plan(config, gpu_gb=8).setting
    assert (setting.train_batch_size, setting.gradient_checkpointing) == choose_micro_batch(config, 8 * GIB)
    assert setting.train_batch_size * setting.gradient_accumulation_steps == 24
    with pytest.raises(ConfigError, match="no micro-batch fits"):
        choose_micro_batch(config, 1 * GIB)
    # A stated value is never replaced.
    fixed = sd15(training={"train_batch_size": "auto", "gradient_checkpointing": True})
    assert choose_micro_batch(fixed, 200 * GIB) == (8, True)


class Device(str):
    """The CPU under the name of a card."""

    type = "cuda"


def test_the_smallest_card_decides_what_auto_stands_for_on_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    config = sd15(
        training={"train_batch_size": "auto", "gradient_checkpointing": "auto", "gradient_accumulation_steps": 24}
    )
    cards = (200 * GIB, 8 * GIB)
    made = []
    for own in cards:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, own=own: SimpleNamespace(total_memory=own))
        accelerator = SimpleNamespace(device=Device("cpu"), gather=lambda value: torch.tensor(cards).to(value))
        made.append(resolve_auto(config, accelerator).training)  # type: ignore[arg-type]
    assert made[0] == made[1]
    assert (made[1].train_batch_size, made[1].gradient_checkpointing) == choose_micro_batch(config, 8 * GIB)


def test_filling_the_cache_counts_for_the_verdict() -> None:
    plan = make_plan(sd15(cache={"batch_size": 512}), gpu_gb=16)
    assert plan.setting.memory.total <= 16 * GIB
    assert plan.fits is False
    assert any("cache.batch_size" in note for note in plan.notes)
    half = make_plan(sd15(cache={"batch_size": 512, "encode_dtype": "float16"})).cache_phase_bytes
    assert half is not None
    assert half < 0.6 * (plan.cache_phase_bytes or 0)


# --- where the architecture comes from -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name", "expected"),
    [
        ("sdxl", "someone/any-xl", "sdxl"),
        ("sd", "someone/dreamy-v8", "sd15"),
        ("sd", "stabilityai/stable-diffusion-2-1", "sd21"),
        ("sd", "stabilityai/stable-diffusion-2-1-base", "sd21-base"),
    ],
)
def test_hub_ids_that_are_not_here_are_assumed_by_family(family: str, name: str, expected: str) -> None:
    assert assume(ModelConfig(family=family, pretrained=name)) == expected


def test_a_local_folder_is_read(tmp_path: Path) -> None:
    from diffalign.world.bases import build_untrained

    pipeline = build_untrained()
    pipeline.save_pretrained(tmp_path / "tiny")
    config = sd15(
        model={"family": "sdxl", "pretrained": str(tmp_path / "tiny"), "random_weights": False},
        data={"resolution": 32, "max_pairs": 10},
        training={"mixed_precision": "no"},
        lora={"targets": "all", "rank": 4},
    )
    plan = make_plan(config)
    assert plan.assumed is None
    assert plan.parameters["unet"] == sum(p.numel() for p in pipeline.unet.parameters())
    assert plan.parameters["vae"] == sum(p.numel() for p in pipeline.vae.parameters())
    assert plan.latent_shape == (20, 8, 8)
    assert all(download.here for download in plan.downloads if download.what == "model")
    assert plan.step_seconds == {}
    (tmp_path / "tiny" / "unet" / "config.json").unlink()
    with pytest.raises(ConfigError, match="not readable as a component config"):
        make_plan(config)


def test_a_resolution_that_the_network_cannot_take_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 64"):
        make_plan(sd15(data={"resolution": 300}))


def test_unknown_number_of_pairs_is_said() -> None:
    plan = make_plan(sd15(data={"resolution": 256, "sources": ["someone/some-pairs"]}))
    assert plan.pairs is None
    assert plan.steps_per_epoch is None
    assert plan.downloads[-1].bytes is None
    assert "unknown" in render(plan)


def test_local_parquet_rows_bound_the_pairs(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split, rows in (("train", 30), ("test", 5)):
        pq.write_table(pa.table({"caption": ["x"] * rows}), tmp_path / f"{split}-00000.parquet")
    plan = make_plan(sd15(data={"resolution": 256, "sources": [str(tmp_path)]}))
    assert plan.pairs == 30
    assert plan.downloads[-1].here


# --- the shipped recipes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_and_plan(name: str) -> None:
    config = load_config(name)
    plan = make_plan(config, gpu_gb=24 if "24gb" in name else 80)
    assert plan.fits
    text = render(plan)
    expected = "859,520,964" if config.model.family == "sd" else "2,567,463,684"
    assert expected in text
    if "24gb" not in name:
        assert plan.effective_batch == 2048
        assert plan.rate_per_pair == pytest.approx(1e-8)
        assert plan.pairs == 851_293
    tree = json.loads(to_json(plan))
    assert tree["setting"]["memory"]["total"] == plan.setting.memory.total
    assert tree["parameters"]["unet"] == plan.network.parameters


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_transformers_load_and_plan(name: str) -> None:
    config, (card, count, gigabytes) = load_config(name), RECIPES[name]
    check(config)
    plan = make_plan(config, gpu_gb=card, pairs=10_000 if "video" in name else None)
    assert plan.fits
    assert plan.parameters["transformer"] == count
    assert plan.setting.memory.total / GIB == pytest.approx(gigabytes, abs=0.1)
    text = render(plan)
    assert f"{count:,}" in text
    header = (config_loading.config_folder() / f"{name}.yaml").read_text().split("output_dir")[0]
    assert f"{gigabytes} GiB" in header
    assert "UNVERIFIED" in header
    if name.startswith("flux"):
        small = make_plan(config, gpu_gb=24)
        assert not small.fits
        assert small.nearest is None


def test_the_full_recipe_does_not_fit_24_gb_and_says_what_does() -> None:
    plan = make_plan(load_config("sdxl_dpo_pickapic"), gpu_gb=24)
    assert plan.fits is False
    assert plan.nearest is not None
    assert plan.nearest.train_batch_size * plan.nearest.gradient_accumulation_steps == 2048
    assert "does not fit" in render(plan)
