"""What a round of sampled training data holds: latents and rewards on the CPU, without conditioning, timesteps or noise.

Those are joined when an entry comes into a micro-batch, so that a round takes little memory and goes into a checkpoint
whole, a later pass draws anew, and a resumed run may cut its steps into other micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from diffalign.data.batch import Batch
from diffalign.losses import Layout
from diffalign.sampling.trajectories import Trajectory


@dataclass(frozen=True)
class Sampled:
    """K images of a prompt.

    Attributes:
        id: a text that no other prompt of the round has.
        prompt: its number; of objectives on the data's winners, the place of the pair.
        trajectory: latents (K, ...) at every level, or the clean ones alone.
        reward: weighted sum, (K,).
        rewards: one column per reward model, (K, R).
    """

    id: str
    prompt: int
    trajectory: Trajectory
    reward: Tensor
    rewards: Tensor

    def best_and_worst(self, pairing: str = "sum") -> tuple[int, int, bool]:
        """Numbers of the images with the largest and the smallest reward, and whether that is a tie.

        Args:
            pairing: "sum": where all are alike (then 0 and 1); "dominance": also where some reward prefers the worst.
        """
        best, worst = int(self.reward.argmax()), int(self.reward.argmin())
        if self.reward[best] == self.reward[worst]:
            return 0, 1, True
        return best, worst, pairing == "dominance" and bool((self.rewards[worst] > self.rewards[best]).any())


@dataclass(frozen=True, kw_only=True)
class SampledPair:
    """Two images of a prompt, the better one first.

    Attributes:
        id: of the pair.
        prompt: its number.
        latents: clean, (2, ...).
        rewards: (2, R).
        p, weight: of the pair.
    """

    id: str
    prompt: int
    latents: Tensor
    rewards: Tensor
    p: float = 1.0
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SampledRows:
    """Images of a prompt that stay together: all of a group, or the chosen one.

    Attributes:
        id: of the group.
        prompt: its number.
        numbers: of the images within the group.
        latents: clean, (K, ...).
        reward: weighted sum, (K,).
        rewards: (K, R).
        label: 1 for images to be liked, (K,).
        advantage: over the whole round, (K,), where the objective wants one.
    """

    id: str
    prompt: int
    numbers: list[int]
    latents: Tensor
    reward: Tensor
    rewards: Tensor
    label: Tensor
    advantage: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SampledLoser:
    """A sample that the chosen image of a data pair is compared with.

    Attributes:
        id: of the comparison.
        place: of the pair among those trained on.
        visit: counts the pair's earlier appearances.
        latents: clean, (...).
        step: of the sampler's grid, where a point on the way is the rejected row; else None.
        x_t, target: there, the latents before the step and the sampler's prediction.
    """

    id: str
    place: int
    visit: int
    latents: Tensor
    step: int | None = None
    x_t: Tensor | None = None
    target: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Truncated:
    """Where a walk of the sampler stopped.

    Attributes:
        id: of the walk.
        prompt: its number; of walks that begin at images of the data, the place of the pair.
        visit: counts the pair's earlier appearances.
        step: of the sampler's grid, at which it stopped.
        x_t: noisy latents there, (...).
        goal: clean latents that are predicted there, (...).
    """

    id: str
    prompt: int
    visit: int
    step: int
    x_t: Tensor
    goal: Tensor


@dataclass(frozen=True, kw_only=True)
class Transition:
    """One step of two trajectories, the better one first.

    Attributes:
        id: of the pair.
        prompt: its number.
        step: number of the step in the grid.
        x, x_next: latents before and after it, (2, ...).
        rewards: (2, R).
        p, weight: of the pair.
    """

    id: str
    prompt: int
    step: int
    x: Tensor
    x_next: Tensor
    rewards: Tensor
    p: float = 1.0
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """One step of all samples of a prompt.

    Attributes:
        id: of the group and step.
        prompt: its number.
        step: number of the step in the grid.
        x, x_next: latents before and after it, (K, ...).
        old: log-densities under the policy that sampled, (K,).
        mean: of the step, (K, ...), where the objective reads how far it has moved.
        rewards: (K, R).
        advantage: over the whole round, (K,).
    """

    id: str
    prompt: int
    step: int
    x: Tensor
    x_next: Tensor
    old: Tensor
    rewards: Tensor
    mean: Tensor | None = None
    advantage: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class TrajectoryRows:
    """All samples of a prompt with all of their steps.

    Attributes:
        id: of the group.
        prompt: its number.
        latents: at every level of the grid, (K, L, ...).
        steps: numbers of the S steps that have a density.
        old: their log-densities under the policy that sampled, (K, S).
        rewards: (K, R).
    """

    id: str
    prompt: int
    latents: Tensor
    steps: list[int]
    old: Tensor
    rewards: Tensor


Entry: TypeAlias = SampledPair | SampledRows | SampledLoser | Truncated | Transition | StepRows | TrajectoryRows
CLASSES: dict[str, Any] = {
    c.__name__: c for c in (SampledPair, SampledRows, SampledLoser, Truncated, Transition, StepRows, TrajectoryRows)
}


@dataclass(frozen=True, kw_only=True)
class StepBatch(Batch):
    """N transitions: 2P of P pairs, chosen first, or those of groups.

    Attributes:
        ids: of the pairs or rows.
        x, x_next: noisy latents before and after the step, (N, C, ..., h, w).
        step: number of the step in the sampler's grid, int64 (N,).
        t: the nearest timesteps, int64 (N,), for metrics.
        conditioning, negative: with and without the prompt, batch N.
        layout: pairs or groups.
        old: log-densities under the policy that sampled, (N,); of groups.
        mean: of the steps when they were sampled, (N, C, ..., h, w); of groups.
    """

    ids: tuple[str, ...]
    x: Tensor
    x_next: Tensor
    step: Tensor
    t: Tensor
    conditioning: dict[str, Tensor]
    negative: dict[str, Tensor]
    layout: Layout
    old: Tensor | None = None
    mean: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def weight(self) -> Tensor | float:
        return 1.0 if self.layout.pairs is None else self.layout.pairs.weight


@dataclass(frozen=True, kw_only=True)
class TrajectoryBatch(Batch):
    """N whole trajectories, those of a prompt together.

    Attributes:
        ids: of the trajectories.
        latents: at every level of the grid, (N, L, C, ..., h, w).
        steps: numbers of the S steps that have a density, int64 (S,).
        old: log-densities of these under the policy that sampled, (N, S).
        conditioning, negative: with and without the prompt, batch N.
        layout: groups.
    """

    ids: tuple[str, ...]
    latents: Tensor
    steps: Tensor
    old: Tensor
    conditioning: dict[str, Tensor]
    negative: dict[str, Tensor]
    layout: Layout

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def weight(self) -> float:
        return 1.0
