"""What a config says of sampled rows: whether there are any, who samples, at which noise, and how a round is cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.config import RunConfig
from diffalign.errors import ConfigError
from diffalign.losses import Kind, Objective
from diffalign.sampling.trajectories import Grid

DECODED = 16  # images that are decoded at a time, at most
NOISE_LEVELS = {"ddim": 1.0, "flow_sde": 0.7, "constant_sde": 0.3, "cps": 0.8}  # published


def samples_images(config: RunConfig) -> bool:
    """Whether an image run trains on images that it samples."""
    objective: Objective = config.objective
    return objective.rows_from != "data" or bool(config.rollout.rewards)


def noise_of(config: RunConfig) -> str:
    """Whether the images of a pair or group share their timestep and noise."""
    return config.denoising.noise or str(config.objective.noise)


def reward_weights(config: RunConfig) -> Tensor:
    """Of every reward, float32 (R,); all 1 where none are given. Rows of groups have their rewards times this."""
    return torch.tensor(config.rollout.reward_weights or (1.0,) * len(config.rollout.rewards))


def reward_sign(config: RunConfig) -> float:
    """-1 where an adapter learns what rewards do not like."""
    return -1.0 if config.negative.train == "flip" else 1.0


def flipped_pairs(config: RunConfig) -> Literal["none", "all", "empty"]:
    """The data's pairs whose images change places."""
    return {"flip": "all", "empty_prompts": "empty"}.get(config.negative.train or "", "none")  # type: ignore[return-value]


def sampling_policy(config: RunConfig) -> str:
    """Who samples: "policy", "reference" or "lagged"."""
    return config.rollout.policy or str(config.objective.sampling.policy)


def detaches_negative(config: RunConfig) -> bool:
    """Whether the unconditional branch of guided log-densities carries no gradient."""
    asked = config.rollout.negative_gradient
    return not (config.objective.sampling.negative_gradient if asked is None else asked)


def recomputes_steps(config: RunConfig) -> bool:
    """Whether of the steps of whole trajectories one at a time has a graph, made again in the backward pass."""
    return config.rollout.checkpoint_steps is not False


def has_lagged(config: RunConfig) -> bool:
    """Whether a run keeps a lagged copy of the policy: it samples, or the objective compares with it."""
    objective: Objective = config.objective
    compares = objective.needs.old and not objective.trains_steps
    return samples_images(config) and (compares or sampling_policy(config) == "lagged")


def kind_of(objective: Objective) -> Kind:
    """The kind of score that an image run gives an objective."""
    if objective.rows_from == "differentiable":
        return Kind.REWARD
    return Kind.STEP if objective.trains_steps else Kind.BOUND


@dataclass(frozen=True)
class RoundSize:
    """How a round is cut.

    Attributes:
        per_batch: entries of a micro-batch.
        per_prompt: entries that come of one prompt (or data pair).
        prompts: of a round, over all processes.
    """

    per_batch: int
    per_prompt: int
    prompts: int


def candidate_steps(config: RunConfig, grid: Grid, eta: float) -> list[int]:
    """Steps of the grid that have a density and are not before `rollout.first_step`."""
    return [step for step in grid.random_steps(eta) if step >= config.rollout.first_step]


def noise_level(config: RunConfig) -> float:
    """eta: as set, or as published for transitions, or 0."""
    if config.rollout.eta is not None:
        return config.rollout.eta
    return NOISE_LEVELS[config.rollout.kernel] if config.objective.trains_steps else 0.0


def window_starts(config: RunConfig, grid: Grid, eta: float) -> tuple[int, int]:
    """First and last step at which a window of stochastic steps may begin.

    Raises:
        ConfigError: the window does not fit into the steps that have a density.
    """
    rollout, steps = config.rollout, candidate_steps(config, grid, eta)
    assert rollout.window is not None, "asked where there is one"
    first, last = (rollout.window_range[0], rollout.window_range[1]) if rollout.window_range else (0, len(grid) // 2)
    if not rollout.window_range:
        last = max(0, min(last, len(steps) - rollout.window))
    if not set(range(first, last + rollout.window)) <= set(steps):
        raise ConfigError(
            f"rollout.window: {rollout.window} steps that start at {first} to {last} do not fit; of {len(grid)} sampler "
            f"steps these have a density: {', '.join(map(str, steps)) or 'none'}"
        )
    return first, last


def round_size(config: RunConfig, grid: Grid, eta: float, processes: int) -> RoundSize:
    """How many prompts a round has and how it is cut.

    A micro-batch counts pairs, groups' images, single images or pairs of transitions; that groups are whole in it is the
    preflight's business.

    Raises:
        ConfigError: a round is no whole number of prompts.
    """
    training, rollout, objective = config.training, config.rollout, config.objective
    assert training.train_batch_size != "auto", "resolved before"
    batch, layout = training.train_batch_size, objective.needs.layout
    rows, per_prompt, what = 1, 1, ""
    if objective.trains_steps:
        possible = len(candidate_steps(config, grid, eta))
        if rollout.window is not None:
            window_starts(config, grid, eta)
        per_prompt = rollout.window or rollout.steps_per_sample or possible
        if objective.rows_from == "whole_trajectories":
            per_prompt = 1
        what = f"{per_prompt} trained steps of a trajectory"
        if not 1 <= per_prompt <= possible:
            raise ConfigError(
                f"rollout.steps_per_sample: got {per_prompt}; {possible} of {len(grid)} sampler steps have a density "
                f"(eta {eta})"
            )
        if objective.rows_from in ("steps", "whole_trajectories"):
            rows = rollout.samples_per_prompt
    elif objective.rows_from == "on_policy":
        per_prompt, what = rollout.steps_per_sample or 1, "rollout.steps_per_sample"
    elif "groups" in layout or ("items" in layout and objective.needs.labels != (1,) and "pairs" not in layout):
        rows = rollout.samples_per_prompt
    entries = batch // rows * training.gradient_accumulation_steps * rollout.steps_per_generation * processes
    if entries % per_prompt:
        raise ConfigError(
            f"rollout: a round of {entries} (train_batch_size x gradient_accumulation_steps x steps_per_generation x "
            f"processes) is no multiple of {what} ({per_prompt}); change one of them"
        )
    return RoundSize(per_batch=batch // rows, per_prompt=per_prompt, prompts=entries // per_prompt)
