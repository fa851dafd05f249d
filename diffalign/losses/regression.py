"""Negative-aware and regression objectives on sampled groups: likelihoods and squared reward differences, no clipping.

They read `Groups` as the policy-gradient family does (`policy_gradient`), and are supervised losses in form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from diffalign.losses import surrogates
from diffalign.losses.advantages import group_mean, total_reward
from diffalign.losses.base import (
    AnyLayout,
    BetaObjective,
    IncompatibleObjective,
    LossOut,
    Needs,
    Objective,
    detached,
    needs,
)
from diffalign.losses.group_objective import (
    group_metrics,
    pair_squares,
)
from diffalign.losses.layouts import Groups, Layout
from diffalign.losses.reduce import reduce_units
from diffalign.losses.scores import Cap, Kind, Scores
from diffalign.losses.surrogates import Rollout


@dataclass(frozen=True, kw_only=True)
class NFT(Objective):
    """Negative-aware fine-tuning (Chen et al. 2025, arXiv 2505.18116; official code NVlabs/NFT:dp_actor.py).

    Supervised learning on correct *and* wrong answers: correct ones train the policy, wrong ones train it through the
    implicit negative policy (see `surrogates.nft_terms`). The reward says whether an answer is correct (more than 1/2); r is
    the share of correct answers of its group, or `Scores.extra["pass_rate"]`, (N,), where a group is split over
    micro-batches. Groups that are all right or all wrong have loss 0. On fresh samples the gradient is that of Dr. GRPO
    (normalize 1) or GRPO (normalize 2).

    Third-party ports divide by 1 - R instead of 1 - r. The official code sums over the rows of a step and divides by 1000
    instead of a length; that is followed, so the learning rate goes with the batch size. Defaults: official launchers
    (learning rate 1e-6, 16 samples, no KL). DiffusionNFT, for denoising, regresses predictions and is not here.

    Attributes:
        normalize: weight of a prompt: 0: 1, 1: 1 - r, 2: sqrt((1 - r) / r).
        neg_weight: of wrong answers; 0 is rejection-sampling fine-tuning. (Official code: -1 switches to DAPO.)
        clamp_negative: floor of the negative ratio; at 1 it acts wherever R > 1.
        ratio_type: "token", or "sequence": one ratio of the row's sum, not divided by 1000.
        row_reduction: "sum" over rows (official) or "mean".
        length_norm: the constant instead of a length.
    """

    normalize: Literal[0, 1, 2] = 1
    neg_weight: float = 1.0
    clamp_negative: float = 1.0
    ratio_type: Literal["token", "sequence"] = "token"
    row_reduction: Literal["sum", "mean"] = "sum"
    length_norm: float = 1000.0

    name: ClassVar[str] = "nft"
    title: ClassVar[str] = "NFT"
    paper: ClassVar[str] = "2505.18116"
    composition: ClassVar[str] = (
        "ratio -> log-likelihood of the policy or of the implicit negative policy -> sum over units"
    )
    needs: ClassVar[Needs] = needs("groups", caps=(Cap.RATIO, Cap.UNITS), reference=False)
    parity: ClassVar[str] = "NVlabs/NFT dp_actor.py (formula)"
    instead: ClassVar[str] = "use 'raft' or 'rebel' on denoising errors, or STEP scores"

    def __post_init__(self) -> None:
        if self.neg_weight < 0 or self.clamp_negative <= 0 or self.normalize not in (0, 1, 2):
            raise ValueError("nft needs neg_weight >= 0, clamp_negative > 0 and normalize 0, 1 or 2")

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        groups = Layout.of(layout).need_groups()
        reward = total_reward(groups.reward)
        # A missing reward says nothing about the answer: left out like a group without contrast.
        correct = (reward > 0.5).to(reward.dtype).masked_fill(reward.isnan(), float("nan"))
        rate = (
            scores.extra["pass_rate"][groups.index]
            if "pass_rate" in scores.extra
            else group_mean(correct, groups.group)
        )
        use = ((rate > 0) & (rate < 1) & ~correct.isnan()).to(reward.dtype)
        rollout = Rollout.of(scores.need_units(), groups.index, correct.nan_to_num(0.0))
        log_ratio = rollout.log_ratio if self.ratio_type == "token" else rollout.log_ratio.sum(1, keepdim=True)
        terms = surrogates.nft_terms(
            log_ratio,
            rollout.advantage,
            rate.nan_to_num(0.5).clamp(0.02, 0.98).to(log_ratio.dtype)[:, None],
            normalize=self.normalize,
            floor=self.clamp_negative,
            neg_weight=self.neg_weight,
        )
        loss = use * self.reduce(terms, scores, rollout.mask)
        metrics = detached(accuracy=correct[~correct.isnan()], pass_rate=rate[~rate.isnan()], used=use)
        ratio = surrogates.bounded_exp(log_ratio)
        return LossOut(loss, metrics | detached(ratio=ratio[:, 0] if ratio.shape[1] == 1 else ratio[rollout.mask]))

    def reduce(self, terms: Tensor, scores: Scores, mask: Tensor) -> Tensor:
        """Per row: over units as the official code does, times the number of rows in the step where rows are summed."""
        if self.ratio_type == "sequence":
            rows = terms[:, 0]
        else:
            rows = reduce_units(terms, mask, "constant", constant=self.length_norm)
        items = len(rows) if scores.totals is None else scores.totals.items
        return rows * items if self.row_reduction == "sum" else rows


# -- regression of reward differences --------------------------------------------------------------------------------


def regression_metrics(z: Tensor, target: Tensor, groups: Groups) -> dict[str, Tensor]:
    """Implicit rewards and what they are fitted to."""
    return group_metrics(groups, target) | detached(implicit_reward=z)


@dataclass(frozen=True, kw_only=True)
class CoPG(BetaObjective):
    """Contrastive policy gradient (Flet-Berliac et al. 2024, arXiv 2406.19185?), for sequence-level rewards off-policy.

    (dR - beta d rho)^2 / (2 beta), the mean over all pairs of a group; valid without importance weights, whoever sampled
    the rows. Its gradient is the contrastive one, (R_b(y) - R_b(y')) d(s - s') with R_b = R - beta rho. With dR = 1/2 it is
    beta / 2 times IPO, plus a constant. The identity is proven, the paper's own notation is UNVERIFIED. PRDP is the same on
    diffusion trajectories with proximal clipping.

    Attributes:
        copg_scale: "paper" as above; "unit": (dR - z)^2 / 2, compulsory on denoising scores.
    """

    copg_scale: Literal["paper", "unit"] = "paper"

    name: ClassVar[str] = "copg"
    title: ClassVar[str] = "CoPG"
    paper: ClassVar[str] = "2406.19185?"
    composition: ClassVar[str] = "log-ratio -> beta (y - y') -> square at the difference of rewards"
    needs: ClassVar[Needs] = needs("groups")
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 0.1, Kind.STEP: 0.1}

    def check(self, kind: Kind) -> None:
        super().check(kind)
        if kind is Kind.BOUND and self.copg_scale == "paper":
            raise IncompatibleObjective(
                self.name,
                kind,
                "dividing by beta in the thousands leaves next to no gradient",
                "set objective.copg_scale: unit",
            )

    def factor(self, beta: float) -> float:
        """What the squared difference is multiplied by."""
        return 0.5 / beta if self.copg_scale == "paper" else 0.5

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        groups = Layout.of(layout).need_groups()
        beta = self.beta_for(scores.kind)
        reward = total_reward(groups.reward)
        z = beta * scores.log_ratio()[groups.index]
        a = reward.nan_to_num(0.0).to(z.dtype) - z
        loss = self.factor(beta) * pair_squares(a, groups.group, ~reward.isnan())
        return LossOut(loss, regression_metrics(z, reward.nan_to_num(0.0), groups))


@dataclass(frozen=True, kw_only=True)
class Rebel(CoPG):
    """REBEL (Gao et al. 2024, arXiv 2404.16767?): regression to relative rewards, (beta d rho - dR)^2 over pairs of a group.

    beta is the paper's 1 / eta. The reference is the policy that sampled the rows (reference scheme "previous"). It is
    2 beta times CoPG.
    """

    copg_scale: Literal["paper", "unit"] = "unit"

    name: ClassVar[str] = "rebel"
    title: ClassVar[str] = "REBEL"
    paper: ClassVar[str] = "2404.16767?"
    composition: ClassVar[str] = (
        "log-ratio to the sampling policy -> beta (y - y') -> square at the difference of rewards"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copg_scale != "unit":
            raise ValueError("rebel has one scale, 'unit'; use copg for the other")

    def factor(self, beta: float) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class A2PO(BetaObjective):
    """A*-PO (Brantley et al. 2025, arXiv 2505.20686): (beta rho - (r - V*))^2 on one fresh sample per prompt.

    V* = beta1 log mean exp(r / beta1) over samples of the *reference*, computed before training by
    `advantages.optimal_value` and given as `Scores.extra["v_star"]`, (N,).

    Default beta: TRL's `beta2`, 1e-3.
    """

    name: ClassVar[str] = "a2po"
    title: ClassVar[str] = "A*-PO"
    paper: ClassVar[str] = "2505.20686"
    composition: ClassVar[str] = "log-ratio -> beta rho -> square at reward - V*"
    needs: ClassVar[Needs] = needs("groups", extra=("v_star",))
    parity: ClassVar[str] = "TRL experimental.a2po"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 1e-3, Kind.STEP: 1e-3}
    aliases: ClassVar[Mapping[str, str]] = {"beta2": "beta"}

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        groups = Layout.of(layout).need_groups()
        z = self.beta_for(scores.kind) * scores.log_ratio()[groups.index]
        target = total_reward(groups.reward) - scores.need_extra("v_star")[groups.index]
        there = ~target.isnan()
        target = target.nan_to_num(0.0).detach()
        loss = there * (z - target).square()
        return LossOut(loss, regression_metrics(z, target, groups))
