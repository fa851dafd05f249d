"""Policy-gradient objectives on sampled groups.

All read `Groups`: rows that were sampled for the same prompts, with rewards. Scores per unit (tokens, or denoising steps of
a stochastic sampler) come with those of the behaviour policy in `units.old`; without them the rows are taken as fresh
samples of the policy itself, whose ratio is 1 with the gradient of log p. With one update per rollout every ratio is 1, so
clipping does nothing and the loss of a centred method is about 0 by value, not by gradient: a flat zero is no bug.

Advantages need whole groups. A trainer that splits a rollout computes them once with `advantage` and passes them on as
`Groups.advantage`. PPO is this module's clipped surrogate with `advantages.gae` and `advantages.ppo_value_loss`.

Denoising errors are refused where exp of a log-ratio must be a likelihood ratio.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from diffalign.losses import surrogates
from diffalign.losses.advantages import Center, Scale
from diffalign.losses.base import (
    AnyLayout,
    LossOut,
    Needs,
    detached,
    needs,
)
from diffalign.losses.group_objective import (
    GroupObjective,
    PolicyGradient,
    group_metrics,
)
from diffalign.losses.layouts import Groups, Layout
from diffalign.losses.reduce import UnitReduction, reduce_units
from diffalign.losses.scores import Cap, Kind, Scores
from diffalign.losses.surrogates import Rollout


@dataclass(frozen=True, kw_only=True)
class GRPO(PolicyGradient):
    """Group relative policy optimisation (DeepSeekMath, Shao et al. 2024, arXiv 2402.03300).

    mean over rows of mean over units of -min(R A, clip(R, 1 - epsilon, 1 + epsilon_high) A), A = (r - mean) / (std + 1e-4)
    of the group, plus beta times the divergence. Divides by each row's own length, which favours short right and long
    wrong answers: see `dr_grpo`, `dapo`. With two samples per prompt (2-GRPO, arXiv 2510.00977) the advantages are +-0.7071,
    and the gradient is that of a contrastive pair loss on mean log-probabilities.

    Defaults: TRL 1.16 (beta 0, epsilon 0.2, 8 samples, learning rate 1e-6). Multi-objective GRPO (arXiv 2503.21819?) is a
    weighted sum of rewards, `reward_weights`; its weights are UNVERIFIED.

    Attributes:
        epsilon, epsilon_high: clip range below and above 1; None is the same above as below.
        delta: upper limit of the unclipped ratio, for two-sided clipping.
        importance_sampling_level: "token", or "sequence": one ratio per row, the geometric mean (GSPO).
    """

    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    importance_sampling_level: Literal["token", "sequence"] = "token"

    name: ClassVar[str] = "grpo"
    title: ClassVar[str] = "GRPO"
    paper: ClassVar[str] = "2402.03300"
    composition: ClassVar[str] = "ratio -> group advantage -> clip -> mean of row means (+ k3)"
    parity: ClassVar[str] = "TRL GRPOTrainer grpo"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.clip_range()) <= 0:
            raise ValueError(f"epsilon is {self.epsilon}, epsilon_high {self.epsilon_high}; expected positive numbers")

    def clip_range(self) -> tuple[float, float]:
        return self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high

    def ratio(self, rollout: Rollout) -> Tensor:
        return rollout.ratio(self.importance_sampling_level)

    def surrogate(self, rollout: Rollout, ratio: Tensor) -> Tensor:
        return surrogates.clip_surrogate(ratio, rollout.advantage, *self.clip_range(), delta=self.delta)


@dataclass(frozen=True, kw_only=True)
class BNPO(GRPO):
    """GRPO with token-mean reduction over the *local* batch, as TRL names it: sum over units / number of units.

    Depends on how a step is split into micro-batches, by definition; `dapo` does not. arXiv id unknown for this use of the
    name (BNPO is also a paper on Beta-normalised rewards).
    """

    name: ClassVar[str] = "bnpo"
    title: ClassVar[str] = "BNPO"
    paper: ClassVar[str] = ""
    composition: ClassVar[str] = "ratio -> group advantage -> clip -> mean over the units of the micro-batch"
    parity: ClassVar[str] = "TRL GRPOTrainer bnpo"

    def reduce(self, x: Tensor, scores: Scores, mask: Tensor) -> Tensor:
        return reduce_units(x.expand(mask.shape), mask, "token_mean")


@dataclass(frozen=True, kw_only=True)
class DrGRPO(GRPO):
    """Dr. GRPO, "GRPO done right" (Liu et al. 2025, arXiv 2503.20783): no division by lengths or by standard deviations.

    Sum over units / the longest allowed length, advantage r - mean. TRL's loss of the same name changes the reduction only;
    its users also set scale_rewards "none", which is the default here.

    Attributes:
        max_completion_length: the constant to divide by, TRL's default 512; on denoising steps it is their number.
    """

    scale_rewards: Scale = "none"
    max_completion_length: int = 512

    name: ClassVar[str] = "dr_grpo"
    title: ClassVar[str] = "Dr. GRPO"
    paper: ClassVar[str] = "2503.20783"
    composition: ClassVar[str] = "ratio -> centred reward -> clip -> sum / longest length"
    parity: ClassVar[str] = "TRL GRPOTrainer dr_grpo"

    def reduce(self, x: Tensor, scores: Scores, mask: Tensor) -> Tensor:
        constant = self.max_completion_length if scores.kind is Kind.TOKEN else mask.shape[1]
        return reduce_units(x.expand(mask.shape), mask, "constant", constant=constant)


@dataclass(frozen=True, kw_only=True)
class DAPO(GRPO):
    """DAPO (Yu et al. 2025, arXiv 2503.14476): a mean over all units of the whole step, and a wider clip range above 1.

    The paper also keeps sampling until groups have differing rewards (`advantages.informative`) and shapes the reward of
    long answers (`advantages.overlong_penalty`); both belong to the rollout. TRL's default loss, there with epsilon_high =
    epsilon = 0.2; here the paper's 0.28. No divergence.
    """

    epsilon_high: float | None = 0.28

    name: ClassVar[str] = "dapo"
    title: ClassVar[str] = "DAPO"
    paper: ClassVar[str] = "2503.14476"
    composition: ClassVar[str] = "ratio -> group advantage -> clip (higher above) -> mean over the units of the step"
    parity: ClassVar[str] = "TRL GRPOTrainer dapo"
    reduction: ClassVar[UnitReduction] = "token_mean"


@dataclass(frozen=True, kw_only=True)
class GSPO(GRPO):
    """Group sequence policy optimisation (Zheng et al. 2025, arXiv 2507.18071): one ratio per row, the geometric mean.

    Its clip range is that of a mean: 3e-4 and 4e-4 in the paper's section 5.1, not 0.2.
    """

    epsilon: float = 3e-4
    epsilon_high: float | None = 4e-4
    importance_sampling_level: Literal["token", "sequence"] = "sequence"

    name: ClassVar[str] = "gspo"
    title: ClassVar[str] = "GSPO"
    paper: ClassVar[str] = "2507.18071"
    composition: ClassVar[str] = "geometric-mean ratio -> group advantage -> clip -> mean over rows"
    parity: ClassVar[str] = "TRL GRPOTrainer grpo with importance_sampling_level sequence"


@dataclass(frozen=True, kw_only=True)
class LUSPO(GSPO):
    """Length-unbiased sequence policy optimisation (arXiv 2602.05261): GSPO with every row weighed by its length.

    Summed over units instead of averaged. Defaults of GSPO.
    """

    name: ClassVar[str] = "luspo"
    title: ClassVar[str] = "LUSPO"
    paper: ClassVar[str] = "2602.05261"
    composition: ClassVar[str] = "geometric-mean ratio -> group advantage -> clip -> times length -> mean over rows"
    parity: ClassVar[str] = "TRL GRPOTrainer luspo"
    reduction: ClassVar[UnitReduction] = "seq_sum"


@dataclass(frozen=True, kw_only=True)
class CISPO(PolicyGradient):
    """CISPO (MiniMax-M1, arXiv 2506.13585): -sg(min(R, epsilon_high)) A log p, mean over the units of the step.

    Clips the weight, so that no unit loses its gradient. Here `epsilon_high` is the largest ratio itself, not its distance
    from 1; TRL reads the same setting, whose default there (0.2) would scale every gradient by at most 0.2.

    Attributes:
        epsilon_high: largest ratio; 5 as in ScaleRL (arXiv 2510.13786).
    """

    epsilon_high: float = 5.0

    name: ClassVar[str] = "cispo"
    title: ClassVar[str] = "CISPO"
    paper: ClassVar[str] = "2506.13585"
    composition: ClassVar[str] = "detached clipped ratio -> group advantage -> log p -> mean over the units of the step"
    parity: ClassVar[str] = "TRL GRPOTrainer cispo"
    reduction: ClassVar[UnitReduction] = "token_mean"

    def clip_range(self) -> tuple[float, float]:
        return float("inf"), self.epsilon_high - 1

    def surrogate(self, rollout: Rollout, ratio: Tensor) -> Tensor:
        weight = ratio.clamp(max=self.epsilon_high)
        return surrogates.weighted_likelihood(rollout.theta, weight, rollout.advantage)


@dataclass(frozen=True, kw_only=True)
class SAPO(PolicyGradient):
    """Soft adaptive policy optimisation (arXiv 2511.20347): -(4 / tau) sigma(tau (R - 1)) A, mean of row means.

    A smooth gate in the place of the clip; a higher temperature for A <= 0 closes it sooner there. Defaults of TRL.

    Attributes:
        sapo_temperature_pos, sapo_temperature_neg: tau of rows with A > 0 and of the others.
    """

    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05

    name: ClassVar[str] = "sapo"
    title: ClassVar[str] = "SAPO"
    paper: ClassVar[str] = "2511.20347"
    composition: ClassVar[str] = "ratio -> group advantage -> sigmoid gate -> mean of row means"
    parity: ClassVar[str] = "TRL GRPOTrainer sapo"

    def surrogate(self, rollout: Rollout, ratio: Tensor) -> Tensor:
        return surrogates.soft_gate(ratio, rollout.advantage, self.sapo_temperature_pos, self.sapo_temperature_neg)


@dataclass(frozen=True, kw_only=True)
class VESPO(PolicyGradient):
    """Variational sequence-level soft policy optimisation (arXiv 2602.10693): -phi(W) A log p, mean over units of the step.

    W is the ratio of the whole row (a product, not a geometric mean), phi(W) = exp(lambda (1 - W)) W^k, detached.
    Defaults of TRL.

    Attributes:
        vespo_k_pos, vespo_lambda_pos: k and lambda of rows with A >= 0.
        vespo_k_neg, vespo_lambda_neg: of the others.
    """

    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    name: ClassVar[str] = "vespo"
    title: ClassVar[str] = "VESPO"
    paper: ClassVar[str] = "2602.10693"
    composition: ClassVar[str] = (
        "detached gamma weight of the row's ratio -> group advantage -> log p -> mean over units"
    )
    parity: ClassVar[str] = "TRL GRPOTrainer vespo"
    reduction: ClassVar[UnitReduction] = "token_mean"

    def surrogate(self, rollout: Rollout, ratio: Tensor) -> Tensor:
        weight = surrogates.gamma_weight(
            rollout.log_ratio,
            rollout.mask,
            rollout.advantage,
            k_pos=self.vespo_k_pos,
            lambda_pos=self.vespo_lambda_pos,
            k_neg=self.vespo_k_neg,
            lambda_neg=self.vespo_lambda_neg,
        )
        return surrogates.weighted_likelihood(rollout.theta, weight, rollout.advantage)


@dataclass(frozen=True, kw_only=True)
class GMPO(PolicyGradient):
    """Geometric-mean policy optimisation (arXiv 2507.20673): -A times the geometric mean of clipped token ratios.

    Clipping is per unit, one-sided and in log space, so a single outlier does not clip the row as in GSPO. The divergence
    is not corrected by the ratio, as in TRL. Units of weight 0 are left out of the mean; other weights do nothing.

    Attributes:
        epsilon, epsilon_high: clip range in log space, exp(+-0.4).
    """

    epsilon: float = 0.4
    epsilon_high: float | None = None
    use_bias_correction_kl: bool = False

    name: ClassVar[str] = "gmpo"
    title: ClassVar[str] = "GMPO"
    paper: ClassVar[str] = "2507.20673"
    composition: ClassVar[str] = "clipped log-ratios -> mean -> exp -> group advantage -> mean over rows"
    parity: ClassVar[str] = "TRL experimental.gmpo"
    weighs_surrogate: ClassVar[bool] = False

    def clip_range(self) -> tuple[float, float]:
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return -math.expm1(-self.epsilon), math.expm1(high)

    def surrogate(self, rollout: Rollout, ratio: Tensor) -> Tensor:
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        mask = rollout.mask if rollout.weight is None else rollout.mask & (rollout.weight > 0)
        return surrogates.geometric_clip(rollout.log_ratio, mask, rollout.advantage, self.epsilon, high)


@dataclass(frozen=True, kw_only=True)
class ReMix(GRPO):
    """ReMix (arXiv 2507.06892): GRPO on a mixture of fresh and older batches, held by two references.

    Every row's ratio is to its *own* behaviour policy, `units.old`. The divergence is convex between the base model
    (`ref`) and the policy of the previous round: beta [kl_mix KL(., base) + (1 - kl_mix) KL(., precedent)], estimated by k2
    of row sums, whose gradient on fresh rows is that of KL(policy || reference). The mixing of batches and the
    "reincarnation" (base := policy, old data dropped) are events of the trainer.

    `Scores.extra["precedent"]`: log-probability of the row under the previous policy, summed, (N,).

    Attributes:
        beta, kl_mix: a guess.
    """

    beta: float = 0.01
    kl_mix: float = 0.5

    name: ClassVar[str] = "remix"
    title: ClassVar[str] = "ReMix"
    paper: ClassVar[str] = "2507.06892"
    composition: ClassVar[str] = (
        "ratio to each row's own behaviour policy -> clip -> mean of row means + KL to two references"
    )
    needs: ClassVar[Needs] = needs("groups", caps=(Cap.RATIO, Cap.UNITS), old=True, extra=("precedent",))
    parity: ClassVar[str] = ""
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = "coefficients, share of old batches, round length, and which KL estimator; no public code"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.kl_mix <= 1:
            raise ValueError(f"kl_mix is {self.kl_mix}; expected 0 <= kl_mix <= 1")
        if self.kl_in_reward:
            raise ValueError("kl_in is 'reward'; two references are only supported with kl_in 'loss'")

    def divergence(
        self, scores: Scores, groups: Groups, rollout: Rollout, ratio: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        base = scores.log_ratio()[groups.index]
        recent = (scores.theta - scores.need_extra("precedent"))[groups.index]
        kl = self.kl_mix * 0.5 * base.square() + (1 - self.kl_mix) * 0.5 * recent.square()
        return self.beta * kl, detached(kl=kl)


@dataclass(frozen=True, kw_only=True)
class RLOO(GroupObjective):
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740), with the clipped sequence ratio of TRL.

    -min(W A, clip(W) A) with W = exp of the *summed* log-ratio and A = R - mean of the other samples' R; R is the reward
    minus beta times the summed k1. On the first update W = 1, which is REINFORCE. A long row's W leaves the clip range
    quickly.

    Defaults: TRL 1.16 (beta 0.05, epsilon 0.2, 2 samples per prompt).

    Attributes:
        epsilon, epsilon_high: clip range.
        normalize_advantages: standardise advantages over the batch.
        reward_clip_range: limits of the weighted reward, before the penalty.
    """

    beta: float = 0.05
    center: Center = "loo"
    scale_rewards: Scale = "none"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    normalize_advantages: bool = False
    reward_clip_range: tuple[float, float] | None = None

    name: ClassVar[str] = "rloo"
    title: ClassVar[str] = "RLOO"
    paper: ClassVar[str] = "2402.14740"
    composition: ClassVar[str] = (
        "ratio of row sums -> leave-one-out advantage (k1 in the reward) -> clip -> mean over rows"
    )
    needs: ClassVar[Needs] = needs("groups", caps=(Cap.RATIO,))
    parity: ClassVar[str] = "TRL RLOOTrainer"

    def total(self, groups: Groups) -> Tensor:
        total = super().total(groups)
        return total if self.reward_clip_range is None else total.clamp(*self.reward_clip_range)

    def options(self) -> dict[str, Any]:
        return super().options() | {"standardize": self.normalize_advantages}

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        groups = Layout.of(layout).need_groups()
        advantage = self.advantage(scores, groups).to(scores.theta.dtype)
        old = scores.theta.detach() if scores.old is None else scores.old
        ratio = surrogates.bounded_exp((scores.theta - old)[groups.index])
        clip = (self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high)
        loss = surrogates.clip_surrogate(ratio, advantage, *clip)
        low, high = surrogates.clipped_fractions(ratio, advantage, *clip)
        metrics = detached(ratio=ratio, clip_frac__low=low, clip_frac__high=high)
        return LossOut(loss, group_metrics(groups, advantage) | metrics)


@dataclass(frozen=True, kw_only=True)
class Reinforce(GroupObjective):
    """REINFORCE (Williams 1992; no paper on arXiv): -sg(A) log p of the row.

    Unbiased on fresh samples whatever the baseline; without one (the default) the variance is that of the reward itself.
    """

    center: Center = "none"
    scale_rewards: Scale = "none"

    name: ClassVar[str] = "reinforce"
    title: ClassVar[str] = "REINFORCE"
    paper: ClassVar[str] = ""
    composition: ClassVar[str] = "log p of the row -> times reward (k1 in it) -> mean over rows"
    needs: ClassVar[Needs] = needs("groups", caps=(Cap.RATIO,), reference=False)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        groups = Layout.of(layout).need_groups()
        advantage = self.advantage(scores, groups).to(scores.theta.dtype)
        loss = -advantage * scores.theta[groups.index]
        return LossOut(loss, group_metrics(groups, advantage))
