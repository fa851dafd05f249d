"""What adapters for the negative branch of guidance, and adapters that are fused into the base, cannot be."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.config import NegativeConfig, RunConfig
from diffalign.errors import ConfigError

if TYPE_CHECKING:
    from diffalign.families import DenoisingFamily

log = logging.getLogger(__name__)
GUIDED = ("trajectories", "candidates", "steps", "whole_trajectories", "differentiable")


def check_negative(config: RunConfig, family: type[DenoisingFamily]) -> None:
    """Refuse a negative branch that does not exist, or that the objective cannot train.

    Raises:
        ConfigError: the first problem found.
    """
    train, objective = config.negative.train, config.objective
    if objective.rows_from == "truncated" and train != "plain":
        raise ConfigError(
            f"negative.train: got {train!r}; objective {objective.name!r} makes a slightly worse copy of a model, for the "
            "negative branch of guidance: set it to 'plain'"
        )
    _check_unread(config)
    if train is None:
        if config.negative != NegativeConfig():
            raise ConfigError(
                f"negative.beta: got {config.negative.beta}, which has no effect on an ordinary adapter; set "
                "negative.train, or remove it"
            )
        return
    if not family.unconditional:
        raise ConfigError(
            f"negative.train: got {train!r}; {family.title} is guidance-distilled and has no negative branch, so that an "
            "adapter for it would do nothing. Take a model with classifier-free guidance (SDXL, SD3.5, Qwen-Image, Wan); "
            "the distilled one can use it in a stock pipeline with true_cfg_scale above 1, at twice the cost a step"
        )
    if train in ("flip", "empty_prompts") and not objective.takes_sides:
        raise ConfigError(
            f"negative.train: got {train!r}; objective {objective.name!r} learns from both images of a pair alike, so that "
            "exchanging them changes nothing; take another objective, or other maps with 'plain'"
        )
    if train == "empty_prompts":
        _check_empty(config)
        return
    if train == "joint":
        _check_joint(config)
    for key, value in (
        ("lora.experts", config.lora.experts),
        ("lora.text_encoder_rank", config.lora.text_encoder_rank),
    ):
        if value:
            raise ConfigError(
                f"{key}: got {value!r}; an adapter for the negative branch alone (negative.train) is on the network, where "
                "branches can be told apart; remove it"
            )
    if config.training.compile and config.evaluation.prompts:
        raise ConfigError(
            "training.compile: got true; the branches of guidance have different adapters (negative.train), which compiled "
            "blocks do not see when pictures are sampled: remove it, or evaluation.prompts"
        )
    if config.lora.use_dora:
        raise ConfigError(
            "lora.use_dora: got true; magnitudes depend on the sum of all adapters, and the branches of guidance have "
            "different ones (negative.train); remove it"
        )
    if config.evaluation.prompts and config.sampling.guidance_scale <= 1:
        raise ConfigError(
            f"sampling.guidance_scale: got {config.sampling.guidance_scale}; pictures of an adapter for the negative branch "
            "need guidance: set it above 1"
        )
    if train == "guided":
        if objective.rows_from not in GUIDED:
            raise ConfigError(
                f"negative.train: got 'guided'; objective {objective.name!r} measures denoising errors, which no guidance "
                "enters; take 'flip', or an objective on a sampler's steps (spo, d3po, ddpo) or on the gradient of a reward "
                "(draft)"
            )
        if config.rollout.guidance_scale == 1:
            raise ConfigError(
                "rollout.guidance_scale: got 1; without guidance there is no negative branch to train (negative.train: "
                "guided)"
            )
        for key in ("rollout.negative_gradient", "objective.negative_gradient"):
            section, _, name = key.partition(".")
            if getattr(getattr(config, section), name, None) is False:
                raise ConfigError(f"{key}: got false; the negative branch is all that negative.train 'guided' trains")


def _check_empty(config: RunConfig) -> None:
    """Refuse pairs that change places where their prompt is dropped, if no prompt is dropped or there are no pairs."""
    from diffalign.sampling.rules import samples_images

    if config.negative.beta != 1:
        raise ConfigError(
            f"negative.beta: got {config.negative.beta}; with negative.train 'empty_prompts' one adapter serves both "
            "branches, and the negative one has no weight of its own; remove it"
        )
    if not config.denoising.proportion_empty_prompts:
        raise ConfigError(
            "denoising.proportion_empty_prompts: got 0, so that no pair changes places (negative.train: empty_prompts); "
            "take the model's own share, such as 0.1"
        )
    if samples_images(config):
        raise ConfigError(
            f"negative.train: got 'empty_prompts'; objective {config.objective.name!r} trains on sampled images here, which "
            "keep their prompt; take data with pairs, or 'flip'"
        )


def _check_unread(config: RunConfig) -> None:
    """Refuse settings of two adapters that are trained together where there is one, and objectives that are for two."""
    train, objective, plain = config.negative.train, config.objective, NegativeConfig()
    if objective.joint and train != "joint":
        raise ConfigError(
            f"negative.train: got {train!r}; objective {objective.name!r} trains one adapter for chosen and one for "
            "rejected images: set it to 'joint'"
        )
    if train == "joint":
        return
    for key in ("proportion_empty_prompts", "prompt_share"):
        if getattr(config.negative, key) != getattr(plain, key):
            raise ConfigError(
                f"negative.{key}: got {getattr(config.negative, key)}, which is read with negative.train 'joint' alone; "
                "remove it"
            )


def _check_joint(config: RunConfig) -> None:
    """Refuse two adapters that are trained together where an objective scores both images by one model."""
    from diffalign.sampling.rules import samples_images

    objective = config.objective
    if not objective.joint:
        raise ConfigError(
            f"negative.train: got 'joint'; objective {objective.name!r} scores chosen and rejected images by one model; "
            "take 'chats', or 'flip' for an adapter of the negative branch"
        )
    for key, value, wanted, why in (
        (
            "lora.init",
            config.lora.init.lower(),
            ("gaussian", "default"),
            "halves of the ranks do not start at the base otherwise",
        ),
        ("data.label", config.data.label, ("given",), "an image belongs to one side"),
        ("denoising.noise", config.denoising.noise, (None, "shared"), "a pair shares its timestep and noise"),
        ("denoising.noising", config.denoising.noising, (None, "forward"), "inversion sees single rows"),
        ("evaluation.held_out_fraction", config.evaluation.held_out_fraction, (0,), "two models rank nothing"),
    ):
        if value not in wanted:
            raise ConfigError(
                f"{key}: got {value!r}; with negative.train 'joint' {why}: expected {' or '.join(map(repr, wanted))}"
            )
    if samples_images(config):
        raise ConfigError("negative.train: got 'joint', which learns from the data's pairs; remove rollout.rewards")


def check_fused(config: RunConfig) -> None:
    """Refuse adapters that cannot be fused into the base, by their files.

    Raises:
        ConfigError: gated experts, or text encoders.
        CheckpointError: no LoRA file, or one of another family.
    """
    from diffusers.loaders.lora_base import LoraBaseMixin

    from diffalign import export, gates, plugins
    from diffalign.families._pipeline import PipelineFamily

    family = plugins.find("families", config.model.family)
    if config.model.adapters and not (
        issubclass(family, PipelineFamily) and issubclass(family.pipeline_class(), LoraBaseMixin)
    ):
        raise ConfigError(
            f"model.adapters: diffusers cannot fuse LoRA into the network of family {config.model.family!r}; save the model "
            "with the adapter in its weights and name that in model.pretrained"
        )
    for source in config.model.adapters:
        file = export.find_file(Path(source).expanduser())
        _, metadata = export.read_file(file)
        if gates.HEADER in metadata:
            raise ConfigError(
                f"model.adapters: {file} holds gated experts, which depend on the time and cannot be fused"
            )
        if export.adapts_text(file):
            raise ConfigError(
                f"model.adapters: {file} has a part for text encoders; only the network's adapters are fused here"
            )
        export.check_family(file, metadata, config.model.family)
        if "diffalign.delta" in metadata and config.training.mixed_precision != "no":
            log.warning(
                "model.adapters: %s holds changed weights, which are fused in %s: changes below about %s of their weight "
                "are rounded away; with training.mixed_precision 'no' all of them stay",
                file,
                config.training.mixed_precision,
                {"bf16": "0.4 %", "fp16": "0.05 %"}[config.training.mixed_precision],
            )
