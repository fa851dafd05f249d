"""Objectives: one file per method. An objective is its own configuration: fields are settings, the call is the method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffalign.data.batch import PairBatch
    from diffalign.families import Family
    from diffalign.losses import PairLoss
    from diffalign.policy import Policy

Layout = Literal["pairs", "winners"]


@dataclass(frozen=True)
class LossOutput:
    """What an objective returns.

    Attributes:
        loss: per item, float32 (B,), with gradient; the trainer multiplies the weights and takes the mean.
        metrics: detached float32 tensors of shape (B,), by metric name.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def pair_metrics(out: PairLoss, error: Tensor, reference_error: Tensor) -> dict[str, Tensor]:
    """The metrics every pairwise objective on denoising errors reports.

    Args:
        out: of the pair loss, (B,).
        error, reference_error: of policy and reference, winners first, (2B,).
    """
    (error_w, error_l), (ref_w, ref_l) = error.detach().chunk(2), reference_error.chunk(2)
    return {
        "implicit_acc": out.accuracy,
        "rewards/chosen": out.chosen_reward,
        "rewards/rejected": out.rejected_reward,
        "rewards/margins": out.logits,
        "error/chosen": error_w,
        "error/rejected": error_l,
        "error/chosen_ref": ref_w,
        "error/rejected_ref": ref_l,
    }


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """Base of all objectives.

    Attributes:
        timestep_min, timestep_max: inclusive bounds of the uniform timestep draw; None means the last step.
        proportion_empty_prompts: share of the pairs whose prompt is replaced by the empty one (keeps classifier-free
            guidance trained); drawn once per pair and visit. The empty prompt is encoded, as in the published code;
            SDXL 1.0 itself samples with zeros instead.
        error_reduction: over the latent: "mean" as published, or "sum" (then beta must be smaller by the latent's size).
        error_space: where errors are measured: "native" (what the network predicts, as published), "epsilon",
            "v_prediction" or "sample".
    """

    timestep_min: int = 0
    timestep_max: int | None = None
    proportion_empty_prompts: float = 0.0
    error_reduction: Literal["mean", "sum"] = "mean"
    error_space: Literal["native", "epsilon", "v_prediction", "sample"] = "native"

    title: ClassVar[str]
    layout: ClassVar[Layout]
    uses_reference: ClassVar[bool]

    def __post_init__(self) -> None:
        if not 0 <= self.proportion_empty_prompts < 1:
            raise ValueError(f"proportion_empty_prompts is {self.proportion_empty_prompts}; expected 0 <= value < 1")
        if self.timestep_min < 0 or (self.timestep_max is not None and self.timestep_max < self.timestep_min):
            raise ValueError(
                f"timestep_min {self.timestep_min} and timestep_max {self.timestep_max} leave no timestep to draw"
            )

    def check(self, family: type[Family], prediction_type: str | None = None) -> None:
        """Refuse a family on which the objective means nothing. The base accepts all.

        Raises:
            ConfigError: with the reason.
        """
        return

    def timestep_range(self, num_timesteps: int) -> tuple[int, int]:
        """First and last timestep that are drawn, inclusive."""
        last = num_timesteps - 1 if self.timestep_max is None else min(self.timestep_max, num_timesteps - 1)
        return self.timestep_min, last

    def draw(self, generator: torch.Generator, shape: tuple[int, ...], num_timesteps: int) -> tuple[int, Tensor, bool]:
        """One sample's timestep, noise and whether its prompt is dropped.

        Args:
            generator: seeded by (seed, sample id, visit).
            shape: of the latents.
            num_timesteps: T of the schedule.
        """
        first, last = self.timestep_range(num_timesteps)
        t = int(torch.randint(first, last + 1, (), generator=generator))
        noise = torch.randn(shape, generator=generator)
        dropped = bool(torch.rand((), generator=generator) < self.proportion_empty_prompts)
        return t, noise, dropped

    def initial_loss(self) -> float | None:
        """The loss per item at policy == reference, where it is known; the first step is checked against it."""
        return None

    def summary(self, latent_elements: int | None = None) -> dict[str, float | str]:
        """Numbers worth printing and storing with every checkpoint (beta, its reduction and equivalents)."""
        return {}

    @abstractmethod
    def __call__(self, policy: Policy, batch: PairBatch) -> LossOutput:
        """The loss per item of a batch."""
