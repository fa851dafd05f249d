"""What methods share that follow the gradient of a reward through the sampler. B samples, S sampler steps, E ends.

Such a method is a *walk*: a way down the sampler's noise levels that says at which steps gradient is kept and of which clean
latents the reward is taken. It is written in terms of a `Chain`, which knows the network, its guidance and the noise levels,
so that a method's file reads like its algorithm. What comes back, rewards with gradient, is the score that the objective
turns into a loss.

A walk makes its choices (cut-offs, stops) with `Chain.generator`, which is the same for all samples of an optimiser step:
they do not depend on how a step is split over micro-batches and processes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from diffalign.losses.base import AnyLayout, LossOut, Needs, Objective, Source, detached, needs
from diffalign.losses.diffusion._common import one_of, positive
from diffalign.losses.layouts import Layout
from diffalign.losses.scores import Cap, Scores

PROMPT = "{prompt}"


@dataclass(frozen=True)
class Level:
    """A noise level: x = alpha x0 + sigma noise; `time` is what the network is told there."""

    time: float
    alpha: float
    sigma: float


@dataclass(frozen=True)
class End:
    """Clean latents that the reward sees.

    Attributes:
        latents: (B, C, ..., h, w), gradient flows.
        captions: weights, and captions as templates of the prompt; the score is the weighted sum of the rewards under them.
    """

    latents: Tensor
    captions: tuple[tuple[float, str], ...] = ((1.0, PROMPT),)


class Chain(Protocol):
    """A sampler over one micro-batch, step by step.

    Attributes:
        start: standard normal latents (B, C, ..., h, w), float32.
        generator: of the walk's choices.
    """

    start: Tensor
    generator: torch.Generator

    def __len__(self) -> int:
        """S."""

    def level(self, step: int) -> Level:
        """Before a step; `level(S)` is clean."""

    def at(self, share: float) -> Level:
        """At a share of the training schedule: 0 the least noise, 1 the most."""

    def predict(self, x: Tensor, level: Level, *, gradient: bool) -> Tensor:
        """The guided native prediction, float32; without gradient `x` is detached, too."""

    def advance(self, x: Tensor, output: Tensor, step: int) -> Tensor:
        """The latents after a sampler step (with its noise, where the sampler has any)."""

    def move(self, x: Tensor, output: Tensor, level: Level, to: Level) -> Tensor:
        """The latents at another level, deterministically (DDIM, Euler), in either direction."""

    def clean(self, x: Tensor, output: Tensor, level: Level) -> Tensor:
        """The clean latents that a prediction implies."""

    def noised(self, x0: Tensor, level: Level, noise: Tensor) -> Tensor:
        """alpha x0 + sigma noise."""

    def noise(self, name: str) -> Tensor:
        """Standard normal noise of the samples, another for every name, (B, C, ..., h, w)."""


def roll(chain: Chain, x: Tensor, first: int, last: int, *, gradient: bool = False) -> Tensor:
    """Sampler steps `first` to `last - 1`."""
    for step in range(first, last):
        x = chain.advance(x, chain.predict(x, chain.level(step), gradient=gradient), step)
    return x


@dataclass(frozen=True, kw_only=True)
class Backprop(Objective):
    """Base of objectives that follow a reward's gradient through the sampler.

    Attributes:
        link: "linear": minus the reward; "hinge": max(0, target - reward), no gradient above the target; "distance":
            |target - reward|.
        target: of "hinge" and "distance", in units of the reward.
        loss_scale: multiplies the loss. Adaptive optimisers ignore it but for max_grad_norm, weight decay and epsilon.
        negative_gradient: whether gradient flows through the unconditional branch of guidance, too.
    """

    link: Literal["linear", "hinge", "distance"] = "linear"
    target: float | None = None
    loss_scale: float = 1.0
    negative_gradient: bool = True

    needs: ClassVar[Needs] = needs("items", caps=(Cap.REWARD,), reference=False, labels=(1,))
    source: ClassVar[Source] = "differentiable"
    instead: ClassVar[str] = "on images, sample with a differentiable reward; on texts use 'grpo'"

    def __post_init__(self) -> None:
        one_of(self, "link", ("linear", "hinge", "distance"))
        positive(self, "loss_scale")
        if (self.target is None) != (self.link == "linear"):
            raise ValueError(
                f"target is {self.target} with link {self.link!r}; expected a number for 'hinge' and 'distance' and null "
                "for 'linear'"
            )

    @abstractmethod
    def walk(self, chain: Chain) -> Sequence[End]:
        """Sample with gradient; at least one end."""

    @abstractmethod
    def trained_steps(self, steps: int) -> int:
        """How many predictions of a sampler of so many steps may keep gradient, at most."""

    def plain_steps(self, steps: int) -> int:
        """How many predictions it makes without gradient, at most; by default all of the sampler's that are not trained."""
        return max(0, steps - self.trained_steps(steps))

    def ends(self) -> int:
        """How many images of a sample the reward sees."""
        return 1

    def check_steps(self, steps: int) -> None:
        """Refuse a sampler with too few steps.

        Raises:
            ValueError: naming the field.
        """

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        items = Layout.of(layout).need_items()
        reward = scores.theta[items.index]
        loss = self.loss_scale * self.linked(reward)
        metrics = detached(reward=reward)
        if self.link == "hinge":
            assert self.target is not None, "checked when it was made"
            metrics |= detached(saturated=(reward >= self.target).to(reward))
        return LossOut(per_item=items.weight * loss, metrics=metrics)

    def linked(self, reward: Tensor) -> Tensor:
        """The loss of rewards, without its scale, (M,)."""
        if self.target is None:
            return -reward
        missing = self.target - reward
        return missing.clamp(min=0) if self.link == "hinge" else missing.abs()
