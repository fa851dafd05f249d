"""GDPO-SR: one DPO logit of a whole group, its members weighed by normalised advantages.

Paper: "GDPO-SR" (group direct preference optimisation for one-step super-resolution), 2026 (CVPR), arXiv 2603.16769; its
equations were not seen, the code is authoritative. Code: Joyies/GDPO:GDPOSR/train/train_GDPOSR.py, GDPOSR/losses/grpo.py.

Loss, per group: -log sigma(z), z = -(beta / 2) sum over members of A_g (e_g - e_g_ref), A = (R - mean) / (std + 1e-8) with
the unbiased deviation, R a weighted sum of rewards that are each min-max-normalised within the group
(`normalised_advantages`). Members are samples of the frozen reference, each with its own noise. Two members: A = (0.7071,
-0.7071), Diffusion-DPO at 0.7071 beta. Since advantages sum to 0, a constant added to all errors changes nothing.

Differences: rewards that are all equal are 0 / 0 = NaN in the code; here they normalise to 0, and missing rewards (NaN) are
left out. The code pairs images and
prompts wrongly above a batch of one. |z| grows with the group, since it is a sum; `group_reduction: mean` divides by its
size. The fixed timestep (250, asked at 100) is the data's.

Defaults: beta 5000 (hard-coded), six members. Rewards: fidelity times PSNR + detail times the mean of MANIQA and MUSIQ,
ratios per image: with such ratios give `groups.advantage`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.losses import links
from diffalign.losses.advantages import advantages, group_ids, group_sums
from diffalign.losses.base import AnyLayout, BetaObjective, LossOut, Needs, detached, needs
from diffalign.losses.diffusion._common import one_of
from diffalign.losses.group_objective import group_metrics
from diffalign.losses.layouts import Groups, Layout
from diffalign.losses.scores import Cap, Kind, Scores, lift


def min_max(reward: Tensor, group: Tensor) -> Tensor:
    """(R - min) / (max - min) within every group, in [0, 1], (M, K); 0 where all are equal.

    Missing rewards (NaN) stay missing and do not enter the extremes of their group.
    """
    ids, count = group_ids(group)
    reward = lift(reward)
    place, missing = ids[:, None].expand_as(reward), reward.isnan()

    def extreme(fill: float, reduce: str) -> Tensor:
        start = torch.full((count, reward.shape[1]), fill, dtype=reward.dtype, device=reward.device)
        return start.scatter_reduce(0, place, reward.masked_fill(missing, fill), reduce)[ids]

    low = extreme(math.inf, "amin")
    width = extreme(-math.inf, "amax") - low
    unit = torch.where(
        width > 0, (reward - low) / width.where(width > 0, torch.ones_like(width)), torch.zeros_like(width)
    )
    return unit.masked_fill(missing, math.nan)


def normalised_advantages(reward: Tensor, group: Tensor, weight: Tensor | tuple[float, ...] | None = None) -> Tensor:
    """GDPO-SR's advantages, (M,): weighted sum of min-max-normalised rewards, standardised within the group.

    The sum is over the rewards that are there; a member without any gets 0 and does not enter its group's statistics.

    Args:
        reward: (M, K); NaN is a missing one.
        group: int64 id of the prompt or image, (M,).
        weight: of the rewards: (K,), or (M, K) where images differ in what they ask for; None is 1.
    """
    unit = min_max(reward, group)
    weighed = unit if weight is None else unit * torch.as_tensor(weight, dtype=unit.dtype, device=unit.device)
    total = weighed.nansum(1).masked_fill(unit.isnan().all(1), math.nan)
    return advantages(total, group, center="mean", scale="group", eps=1e-8)


@dataclass(frozen=True, kw_only=True)
class GDPO(BetaObjective):
    """GDPO-SR (2026, arXiv 2603.16769; official code Joyies/GDPO).

    -log sigma(beta sum over the group of A rho), A the group's standardised advantages of min-max-normalised rewards. A
    group costs one value, which each of its members carries, so groups count by their size. A group of equal rewards has no
    gradient. Members have their own noise.

    beta: 5000 on denoising errors (official).

    Attributes:
        reward_weights: of every reward, after its normalisation; None weighs all by 1.
        group_reduction: "sum" (official), or "mean": z divided by the size of the group.
    """

    reward_weights: tuple[float, ...] | None = None
    group_reduction: Literal["sum", "mean"] = "sum"

    name: ClassVar[str] = "gdpo"
    title: ClassVar[str] = "GDPO-SR"
    paper: ClassVar[str] = "2603.16769"
    composition: ClassVar[str] = "log-ratio -> beta times sum over the group of advantages -> logistic"
    needs: ClassVar[Needs] = needs("groups", caps=(Cap.DIFFERENCE,))
    parity: ClassVar[str] = "Joyies/GDPO GDPOSR/losses/grpo.py (formula)"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.BOUND: 5000.0}
    noise: ClassVar[Literal["shared", "independent"]] = "independent"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "group_reduction", ("sum", "mean"))

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return math.log(2)

    def summary(self) -> dict[str, float | str]:
        weights = (
            {} if self.reward_weights is None else {"reward_weights": ", ".join(f"{w:g}" for w in self.reward_weights)}
        )
        return super().summary() | weights

    def round_advantage(self, groups: Groups) -> Tensor:
        return self.advantage(groups)

    def advantage(self, groups: Groups) -> Tensor:
        """Advantages, (M,), without gradient: those of the groups if they have any."""
        if groups.advantage is not None:
            return groups.advantage.detach()
        if self.reward_weights is not None and len(self.reward_weights) != groups.reward.shape[1]:
            raise ValueError(f"got {groups.reward.shape[1]} rewards; reward_weights has {len(self.reward_weights)}")
        return normalised_advantages(groups.reward.detach(), groups.group, self.reward_weights)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        groups = Layout.of(layout).need_groups()
        rho, a = scores.log_ratio()[groups.index], self.advantage(groups)
        ids, count = group_ids(groups.group)
        z = self.beta_for(scores.kind) * group_sums(a.to(rho) * rho, ids, count)
        if self.group_reduction == "mean":
            z = z / group_sums(torch.ones_like(rho), ids, count)
        metrics = group_metrics(groups, a) | detached(
            rewards__margins=z, implicit_acc=(z > 0).to(z.dtype) + 0.5 * (z == 0)
        )
        return LossOut(links.logistic(z)[ids], metrics)
