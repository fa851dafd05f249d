"""What sampling costs a run that trains on its own images: forwards of the network, and the decoder's memory."""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.architecture import Architecture
from diffalign.config import RunConfig
from diffalign.data.prompts import load_prompts
from diffalign.families import DenoisingFamily
from diffalign.losses.diffusion.self_npo import SelfNPO
from diffalign.losses.diffusion.walks import Backprop
from diffalign.measure import NetworkCost, measure_decoder
from diffalign.sampling.rules import DECODED, detaches_negative, recomputes_steps, samples_images, sampling_policy
from diffalign.summary import images_per_pair


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling of an optimiser step, the mean over a round and all processes.

    Attributes:
        prompts: that are sampled.
        images: sampled for them, or candidates that are scored.
        steps: of the sampler.
        branches: forwards for one prediction: 2 with classifier-free guidance.
        forwards: images through the network.
        flops: of the network and of decoding.
        decoder_bytes: the decoder with one call; 0 where nothing is decoded.
        available: prompts, where they are known; None: those of the data.
    """

    prompts: float
    images: float
    steps: int
    branches: int
    forwards: float
    flops: float
    decoder_bytes: int
    available: int | None


def branches_of(config: RunConfig, family: DenoisingFamily) -> int:
    """Forwards that a guided prediction takes: distilled models are told their scale, if they have one."""
    return 2 if config.rollout.guidance_scale != 1 and family.unconditional else 1


def images_per_item(config: RunConfig, family: DenoisingFamily) -> int:
    """How many images of what a batch counts go through the network: transitions are scored with the sampler's guidance."""
    if isinstance(config.objective, Backprop):
        kept = trained_predictions(config) if not checkpoints_steps(config) else 1
        return kept * branches_of(config, family)
    if samples_images(config) and config.objective.trains_steps:
        each = 1 if single_images(config) else images_per_pair(config.objective)
        if config.objective.rows_from == "whole_trajectories" and not checkpoints_steps(config):
            each = trajectory_steps(config)
        return each * (1 if detaches_negative(config) else branches_of(config, family))
    return 1 if single_images(config) else images_per_pair(config.objective)


def passes_per_item(config: RunConfig, family: DenoisingFamily) -> int:
    """How many times an image is computed, at most with gradient; more than `images_per_item` where not all is kept."""
    if isinstance(config.objective, Backprop):
        return trained_predictions(config) * branches_of(config, family)
    if config.objective.rows_from == "whole_trajectories":
        return trajectory_steps(config) * branches_of(config, family)
    if samples_images(config) and config.objective.trains_steps and detaches_negative(config):
        return images_per_item(config, family) * branches_of(config, family)
    return images_per_item(config, family)


def trained_predictions(config: RunConfig) -> int:
    """Predictions with gradient of a sample, at most."""
    return int(config.objective.trained_steps(config.rollout.num_inference_steps))


def trajectory_steps(config: RunConfig) -> int:
    """Steps of a whole trajectory that have a density: as a rule all but the last."""
    return max(1, config.rollout.num_inference_steps - 1)


def checkpoints_steps(config: RunConfig) -> bool:
    """Whether a trained prediction is computed again in the backward pass, as a whole."""
    again = config.rollout.checkpoint_steps
    if config.objective.rows_from == "whole_trajectories":
        return recomputes_steps(config)
    return isinstance(config.objective, Backprop) and (trained_predictions(config) > 1 if again is None else again)


def single_images(config: RunConfig) -> bool:
    """Whether a batch counts sampled images one by one: groups, items, and chosen images."""
    needs = config.objective.needs
    return samples_images(config) and (
        config.objective.rows_from in ("data", "truncated", "steps", "whole_trajectories", "differentiable")
        and "pairs" not in needs.layout
    )


def group_of(config: RunConfig) -> int:
    """Images that must come into one micro-batch together."""
    grouped = single_images(config) and config.objective.needs.labels != (1,)
    return config.rollout.samples_per_prompt if grouped else 1


def unit_of(config: RunConfig) -> str:
    """What a batch counts."""
    if samples_images(config) and config.objective.trains_steps and config.objective.rows_from != "whole_trajectories":
        return "steps" if config.objective.rows_from == "steps" else "pairs of steps"
    return "images" if single_images(config) else "pairs"


def plan_sampling(
    config: RunConfig,
    architecture: Architecture,
    network: NetworkCost,
    latent_shape: tuple[int, ...],
    effective_batch: int,
) -> Sampling | None:
    """Count the sampling of a run; None if it samples nothing to train on.

    Args:
        config: the run.
        architecture: of the model.
        network: counts of one image.
        latent_shape: of one image.
        effective_batch: what a step trains on, over all processes.
    """
    if not samples_images(config):
        return None
    rollout, source = config.rollout, config.objective.rows_from
    if source == "differentiable":
        return _plan_paths(config, architecture, network, latent_shape, effective_batch)
    steps, trained = rollout.num_inference_steps, rollout.window or rollout.steps_per_sample or 1
    if config.objective.trains_steps and not (
        rollout.window or rollout.steps_per_sample
    ):  # the last step has no density as a rule
        trained = max(1, steps - 1 - rollout.first_step)
    count = 1 if source in ("generated", "on_policy", "truncated") else rollout.samples_per_prompt
    if isinstance(config.objective, SelfNPO):  # it stops on the way, and is asked once more there
        steps = 1 + (min(config.objective.steps, steps) if config.objective.from_data else steps // 2)
    apart = source == "on_policy" or (config.objective.trains_steps and source != "whole_trajectories")
    per_prompt = group_of(config) * (trained if apart else 1)
    prompts = effective_batch / per_prompt / rollout.num_iterations
    # Candidates branch off one trajectory: their clean images are predicted once more, at the steps that are trained.
    calls = steps + trained * count if source == "candidates" else steps * count
    images = trained * count if source == "candidates" else count
    branches = branches_of(config, architecture.family)
    forwards = prompts * calls * branches
    who = sampling_policy(config)
    each = network.forward_flops if who == "reference" else network.policy_forward_flops
    decode, memory = 0, 0
    if rollout.rewards:
        cost = measure_decoder(architecture.configs["vae"], latent_shape)
        width = 2 if config.cache.encode_dtype in ("float16", "bfloat16") else 4
        decode = cost.flops
        memory = architecture.parameters["vae"] * width
        memory += min(DECODED, config.sampling.batch_size) * cost.peak_bytes * width // 4
    return Sampling(
        prompts=prompts,
        images=prompts * images,
        steps=steps,
        branches=branches,
        forwards=forwards,
        flops=forwards * each + prompts * images * decode,
        decoder_bytes=memory,
        available=len(load_prompts(rollout.prompts, rollout.num_prompts)) if rollout.prompts else None,
    )


def _plan_paths(
    config: RunConfig,
    architecture: Architecture,
    network: NetworkCost,
    latent_shape: tuple[int, ...],
    effective_batch: int,
) -> Sampling:
    """Of reward back-propagation: the predictions without gradient, and decoding there and back."""
    rollout, objective = config.rollout, config.objective
    branches = branches_of(config, architecture.family)
    width = 2 if config.cache.encode_dtype in ("float16", "bfloat16") else 4
    cost = measure_decoder(architecture.configs["vae"], latent_shape, gradient=True)
    images = effective_batch * objective.ends()
    plain = effective_batch * objective.plain_steps(rollout.num_inference_steps) * branches
    return Sampling(
        prompts=effective_batch,
        images=images,
        steps=rollout.num_inference_steps,
        branches=branches,
        forwards=plain,
        flops=plain * network.policy_forward_flops + images * cost.flops,
        decoder_bytes=architecture.parameters["vae"] * width + rollout.decode_batch_size * cost.peak_bytes * width // 4,
        available=len(load_prompts(rollout.prompts, rollout.num_prompts)) if rollout.prompts else None,
    )


def steps_per_pass(sampling: Sampling, pairs: int | None) -> float | None:
    """Optimiser steps in which every prompt (or data pair) is sampled once; None if their number is not known."""
    total = sampling.available if sampling.available is not None else pairs
    return None if total is None else total / sampling.prompts
