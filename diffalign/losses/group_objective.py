"""Bases of objectives on sampled groups: advantages, divergence from the reference, reduction. See `policy_gradient`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from diffalign.losses import surrogates
from diffalign.losses.advantages import (
    Aggregate,
    Center,
    KLEstimator,
    Scale,
    advantages,
    group_ids,
    group_sums,
    kl_estimate,
    total_reward,
    zero_std_groups,
)
from diffalign.losses.base import AnyLayout, LossOut, Needs, Objective, detached, needs
from diffalign.losses.layouts import Groups, Layout
from diffalign.losses.reduce import UnitReduction, reduce_units
from diffalign.losses.scores import Cap, Scores
from diffalign.losses.surrogates import Rollout

UNIT_CAPS = (Cap.RATIO, Cap.UNITS)
INSTEAD = "score stored transitions of a stochastic sampler (STEP), or use 'rebel' or 'rwr' on denoising errors"


@dataclass(frozen=True, kw_only=True)
class GroupObjective(Objective):
    """Base of objectives that weigh sampled rows by advantages.

    Attributes:
        beta: coefficient of the divergence from the reference; 0 needs no reference.
        center, scale_rewards, aggregate: see `advantages.advantages`.
        reward_weights: of every reward; None weighs all by 1.
    """

    beta: float = 0.0
    center: Center = "mean"
    scale_rewards: Scale = "group"
    aggregate: Aggregate = "sum_then_normalize"
    reward_weights: tuple[float, ...] | None = None

    needs: ClassVar[Needs] = needs("groups", caps=UNIT_CAPS, reference=False)
    instead: ClassVar[str] = INSTEAD
    aliases: ClassVar[Mapping[str, str]] = {"multi_objective_aggregation": "aggregate"}

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"beta is {self.beta}; expected 0 (no reference) or more")
        if self.beta and self.kl_in_reward and self.aggregate != "sum_then_normalize":
            raise ValueError("a KL penalty in the reward needs aggregate 'sum_then_normalize'")

    @property
    def kl_in_reward(self) -> bool:
        """Whether the divergence is subtracted from the reward, rather than added to the loss."""
        return True

    def reads_reference(self) -> bool:
        return self.beta > 0

    def total(self, groups: Groups) -> Tensor:
        """The weighted reward, (M,)."""
        return total_reward(groups.reward, self.reward_weights)

    def reward(self, scores: Scores, groups: Groups) -> Tensor:
        """What advantages are made of: rewards, (M, K), or their total, (M,), with the KL penalty in it."""
        if self.aggregate == "normalize_then_sum":
            return groups.reward
        total = self.total(groups)
        if not self.beta or not self.kl_in_reward:
            return total
        old = scores.theta.detach() if scores.old is None else scores.old
        return total - self.beta * kl_estimate(old, scores.need_ref(), "k1")[groups.index]

    def options(self) -> dict[str, Any]:
        """How advantages are computed: arguments of `advantages.advantages`."""
        return {"center": self.center, "scale": self.scale_rewards, "aggregate": self.aggregate}

    def round_advantage(self, groups: Groups) -> Tensor | None:
        if self.beta and self.kl_in_reward:
            return None  # the penalty needs scores
        summed = self.aggregate == "sum_then_normalize"
        reward = self.total(groups) if summed else groups.reward
        return advantages(reward, groups.group, weight=None if summed else self.reward_weights, **self.options())

    def advantage(self, scores: Scores, groups: Groups) -> Tensor:
        """Advantages, (M,), without gradient: `groups.advantage` if there is one, else computed from these groups."""
        if groups.advantage is not None:
            return groups.advantage
        reward = self.reward(scores, groups)
        weight = self.reward_weights if reward.ndim == 2 else None
        return advantages(reward, groups.group, weight=weight, **self.options())


def group_metrics(groups: Groups, advantage: Tensor) -> dict[str, Tensor]:
    """What every objective on groups reports: rewards, advantages, and the share of groups that teach nothing."""
    reward = total_reward(groups.reward)
    found = detached(reward=reward[~reward.isnan()], advantage=advantage, advantage__abs=advantage.abs())
    if groups.advantage is not None and len(groups.group.unique()) == len(groups.group):
        return found  # single images, which are compared with those of other rounds
    return found | detached(frac_zero_std=zero_std_groups(groups.reward, groups.group))


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(GroupObjective):
    """Base of objectives per unit: a surrogate, weights, a divergence from the reference, a reduction.

    `units.weight` multiplies the surrogate and not the divergence: a mask of high-entropy tokens, or importance weights
    between the sampling and the training engine.

    Attributes:
        kl_in: "loss" adds beta times `kl_estimator` per unit; "reward" subtracts beta times the summed k1 from the reward.
        kl_estimator: "k3" (TRL), "k2", or "k1" (in the loss only with the correction: without, it has no expected gradient).
        use_bias_correction_kl: multiply the estimate by the ratio (TRL's default since 1.x; arXiv 2512.02556), which makes
            its gradient that of KL(policy || reference).
        off_policy_mask_threshold: drop rows with A < 0 whose ratio to the behaviour policy fell by more than this many nats
            per unit.
    """

    kl_in: Literal["loss", "reward"] = "loss"
    kl_estimator: KLEstimator = "k3"
    use_bias_correction_kl: bool = True
    off_policy_mask_threshold: float | None = None

    reduction: ClassVar[UnitReduction] = "seq_mean"
    weighs_surrogate: ClassVar[bool] = True  # False where `surrogate` uses the weights itself

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_in == "loss" and self.kl_estimator == "k1" and not self.use_bias_correction_kl:
            raise ValueError(
                "kl_estimator 'k1' in the loss has no expected gradient; use k2, k3, the bias correction or kl_in 'reward'"
            )

    @property
    def kl_in_reward(self) -> bool:
        return self.kl_in == "reward"

    def rollout(self, scores: Scores, groups: Groups) -> Rollout:
        """The sampled rows per unit, with their advantages."""
        return Rollout.of(scores.need_units(), groups.index, self.advantage(scores, groups))

    def ratio(self, rollout: Rollout) -> Tensor:
        """The ratio to the behaviour policy, (M, U) or (M, 1)."""
        return rollout.ratio("token")

    @abstractmethod
    def surrogate(self, rollout: Rollout, ratio: Tensor) -> Tensor:
        """The loss without divergence, (M, U) or (M, 1)."""

    def clip_range(self) -> tuple[float, float]:
        """Widths below and above 1 that `clip_frac` counts."""
        return float("inf"), float("inf")

    def reduce(self, x: Tensor, scores: Scores, mask: Tensor) -> Tensor:
        """Values per unit to values per row whose mean is the loss."""
        return reduce_units(x.expand(mask.shape), mask, self.reduction, totals=scores.totals)

    def divergence(
        self, scores: Scores, groups: Groups, rollout: Rollout, ratio: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """beta times the divergence per row, (M,), and metrics."""
        if rollout.ref is None:
            raise ValueError("beta > 0 needs a reference; units.ref is missing")
        kl = kl_estimate(rollout.theta, rollout.ref, self.kl_estimator)
        metrics = detached(kl=kl[rollout.mask])
        if self.use_bias_correction_kl:
            kl = kl * ratio
        return self.beta * self.reduce(kl, scores, rollout.mask), metrics

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        groups = Layout.of(layout).need_groups()
        rollout = self.rollout(scores, groups)
        ratio = self.ratio(rollout)
        loss = self.surrogate(rollout, ratio)
        if rollout.weight is not None and self.weighs_surrogate:
            loss = loss * rollout.weight
        if self.off_policy_mask_threshold is not None:
            loss = loss * surrogates.off_policy_keep(rollout, self.off_policy_mask_threshold)
        per_item = self.reduce(loss, scores, rollout.mask)
        metrics = group_metrics(groups, rollout.advantage[:, 0]) | self.ratio_metrics(rollout, ratio)
        if self.beta and not self.kl_in_reward:
            penalty, more = self.divergence(scores, groups, rollout, ratio)
            per_item, metrics = per_item + penalty, metrics | more
        return LossOut(per_item, metrics)

    def ratio_metrics(self, rollout: Rollout, ratio: Tensor) -> dict[str, Tensor]:
        """Ratios and clipped shares, per unit that counts (or per row)."""
        low, high = surrogates.clipped_fractions(ratio, rollout.advantage, *self.clip_range())
        pick = (lambda x: x[:, 0]) if ratio.shape[1] == 1 else (lambda x: x[rollout.mask])
        return detached(ratio=pick(ratio), clip_frac__low=pick(low), clip_frac__high=pick(high))


# -- regression of reward differences --------------------------------------------------------------------------------


def pair_squares(a: Tensor, group: Tensor, there: Tensor) -> Tensor:
    """Mean over the other members j of a group of (a_i - a_j)^2, (M,); 0 where there is no other.

    Written as k (a_i - m)^2 + sum_j (a_j - m)^2, which does not cancel and needs no list of pairs.

    Args:
        a: (M,).
        group: int64 (M,).
        there: bool (M,); members without a reward are left out.
    """
    ids, count = group_ids(group)
    number = group_sums(there.to(a.dtype), ids, count)
    mean = group_sums(a * there, ids, count) / number.clamp(min=1)
    d = (a - mean[ids]) * there
    total = number[ids] * d.square() + group_sums(d.square(), ids, count)[ids]
    return there * total / (number[ids] - 1).clamp(min=1)
