"""Log-densities of a sampler's stored steps under the policy and under its reference.

A loss on whole trajectories sees the network through the log-densities l_k of their steps alone, so its gradient is

    sum over steps k of  (d loss / d l_k) (d l_k / d adapter)

and no two steps have to be in memory at once: all are computed without a graph first, the loss and its factors d loss /
d l_k follow, and every step is computed again when its factor reaches it in the backward pass. That is exact, and costs
one forward more per step.

Legend: N rows, S steps, L levels of the grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from diffalign.config import RunConfig
from diffalign.families import Conditioning
from diffalign.losses import Scores
from diffalign.policy import Policy, guided, recomputed, without_dropout
from diffalign.sampling.entries import TrajectoryBatch
from diffalign.sampling.rules import detaches_negative, recomputes_steps
from diffalign.sampling.trajectories import Grid, log_density, next_mean

T = TypeVar("T")


@dataclass(frozen=True)
class StepOutput:
    """What a network says of steps.

    Attributes:
        output: native prediction, guided if the sampler is, (N, ...), float32.
        mean: of the next latents, (N, ...).
        density: mean log-density of the stored next latents, (N,), float32.
    """

    output: Tensor
    mean: Tensor
    density: Tensor


class Densities:
    """Scores stored steps.

    Args:
        config: of the run.
        policy: its network and reference.
        grid: of the sampler.
        eta: of the sampler.
    """

    def __init__(self, config: RunConfig, policy: Policy, grid: Grid, eta: float) -> None:
        self.policy, self.grid, self.eta = policy, grid, eta
        self.scale, self.detach_negative = config.rollout.guidance_scale, detaches_negative(config)
        self.recompute = recomputes_steps(config)

    def deviation(self, steps: Tensor) -> Tensor:
        """sd of steps by number, (N,), > 0, where they are."""
        return torch.tensor([self.grid.deviation(k, self.eta) for k in steps.tolist()], device=steps.device)

    def of(
        self,
        network: nn.Module,
        x: Tensor,
        x_next: Tensor,
        steps: Tensor,
        conditioning: Conditioning,
        negative: Conditioning,
    ) -> StepOutput:
        """Steps from x to x_next.

        Args:
            network: bare or wrapped, with the adapter weights that are asked about.
            x, x_next: latents before and after a step, (N, ...).
            steps: number of each row's step in the grid, int64 (N,).
            conditioning, negative: with and without the prompt, batch N.
        """
        times, deviation = self.grid.times.to(x.device)[steps], self.deviation(steps)
        output = guided(
            self.policy,
            network,
            x,
            times,
            conditioning,
            negative,
            self.scale,
            detach_negative=self.detach_negative,
        )
        mean = next_mean(self.grid, steps, x, output, deviation)
        return StepOutput(output, mean, log_density(x_next, mean, deviation, self.grid.kernel))

    def reference(self, compute: Callable[[nn.Module], T]) -> T:
        """`compute` with the reference's weights; before the policy's forward, whose backward needs its own in place."""
        policy = self.policy
        assert policy.reference is not None, "a run has a reference"
        ((_, weights),) = policy.reference.parts()
        with torch.no_grad(), without_dropout(policy.bare), policy.reference.active(weights):
            return compute(policy.bare)

    def trajectories(self, batch: TrajectoryBatch) -> Scores:
        """Scores of whole trajectories, units (N, S), with the graph of one step at a time.

        The unwrapped network is called, which the backward pass may call again.
        """
        policy = self.policy

        def density(network: nn.Module, step: Tensor) -> Tensor:
            x, x_next = batch.latents[:, int(step)], batch.latents[:, int(step) + 1]
            return self.of(network, x, x_next, step.expand(len(x)), batch.conditioning, batch.negative).density

        def trained(step: Tensor) -> Tensor:
            return (
                recomputed(policy, lambda: density(policy.bare, step)) if self.recompute else density(policy.bare, step)
            )

        ref = self.reference(lambda network: torch.stack([density(network, step) for step in batch.steps], 1))
        theta = torch.stack([trained(step) for step in batch.steps], 1)
        return Scores.steps(theta, ref, batch.old)
