"""`diffalign plan`: exact counts of the published architectures, and the arithmetic on top of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign import config as config_module
from diffalign.architecture import assume
from diffalign.config import LoraConfig, ModelConfig, RunConfig, build, load_config
from diffalign.errors import ConfigError
from diffalign.families import published
from diffalign.measure import measure_encoder, measure_unet
from diffalign.plan import GIB, choose_micro_batch, make_plan, pairs_per_device, render, to_json

SHIPPED = ("sdxl_dpo_pickapic", "sdxl_dpo_pickapic_24gb", "sd15_dpo_pickapic")


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


def test_sdxl_at_1024_px_against_known_numbers() -> None:
    unet = published.component_configs("sdxl")["unet"]
    cost = measure_unet(unet, LoraConfig(rank=16), height=128, width=128, dtype=torch.bfloat16)
    assert cost.parameters == 2_567_463_684
    assert (cost.lora_modules, cost.lora_parameters) == (560, 23_224_320)
    assert cost.forward_flops == pytest.approx(6.76e12, rel=0.02)
    # Backward is hardly more than forward: frozen layers need no weight gradient. Fused attention recomputes a little.
    assert 1.0 < cost.backward_flops / cost.forward_flops < 1.25
    assert cost.saved_bytes / GIB == pytest.approx(7.26, rel=0.05)
    assert cost.checkpoint_bytes / GIB == pytest.approx(0.45, rel=0.2)
    assert cost.transient_bytes / GIB == pytest.approx(0.2, rel=0.1)


def test_adapter_flops_are_what_separates_policy_and_reference() -> None:
    """2 r (in + out) per position and layer: twice the rank, twice the difference; the reference does not move."""
    unet = published.component_configs("sd15")["unet"]
    one, two = (measure_unet(unet, LoraConfig(rank=r), height=16, width=16, dtype=torch.bfloat16) for r in (4, 8))
    assert one.forward_flops == two.forward_flops
    assert two.policy_forward_flops - two.forward_flops == 2 * (one.policy_forward_flops - one.forward_flops) > 0
    assert two.lora_parameters == 2 * one.lora_parameters


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
    tree = config_module.to_tree(sd15())
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


def test_the_full_recipe_does_not_fit_24_gb_and_says_what_does() -> None:
    plan = make_plan(load_config("sdxl_dpo_pickapic"), gpu_gb=24)
    assert plan.fits is False
    assert plan.nearest is not None
    assert plan.nearest.train_batch_size * plan.nearest.gradient_accumulation_steps == 2048
    assert "does not fit" in render(plan)
