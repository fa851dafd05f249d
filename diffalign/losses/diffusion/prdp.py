"""PRDP: proximal reward difference prediction, a regression of log-ratio differences of trajectories to reward differences.

Paper: "PRDP: Proximal Reward Difference Prediction for Large-Scale Reward Finetuning of Diffusion Models", Deng et al. 2024
(CVPR 2024), arXiv 2402.08714 v2. There is no official code; App. G has pseudo-code.

Loss, for two images i, j of a prompt, with q_t = log p(x_{t-1} | x_t) - log p_ref(x_{t-1} | x_t):

    q = sum of q_t        q^c = sum of clip(q_t, q_t^old - c, q_t^old + c)
    max( (q_i - q_j - (R_i - R_j) / b)^2, (q_i^c - q_j^c - (R_i - R_j) / b)^2 )

averaged over the pairs of a prompt, then over prompts. It is 0 exactly at the optimum of KL-regularised reward
maximisation. A number added to all rewards of a prompt changes nothing, and rewards are not normalised. Where a step has
left the band and the clipped square is the larger one, it has no gradient; where it has gone too far, the unclipped one is,
and it comes back. At policy == old == reference the gradient is that of -2 (R_i - R_j) / b (q_i - q_j): DPO's, weighed by
the difference.

Paper and pseudo-code differ: the equations sum over steps, the pseudo-code takes their mean, so the tables' b is that of a
mean (`step_reduction: mean`, the default; the sum needs one that many times smaller). The pseudo-code keeps pairs with R_i
> R_j and averages over these, so ties are dropped (`ties: drop`); the equations keep them (default).

UNVERIFIED: whether a log-density is a sum or a mean over the latent's elements; the size of b (3e-5) suggests a sum. With
scores that are means over D elements, as everywhere here, use D times the published b and c / D (b about 0.5 for 4 x 64 x
64).

Defaults: b 3e-5, c 1e-6 (small scale: 32 prompts x 16 images, 10 updates, learning rate 1e-5); large scale 3e-6 and 1e-4
(64 x 8, one update, where the clip does nothing). Not part of the loss: 50 DDPM steps, guidance 5, in both policies'
scores; initial noise of its own for every image is ours (the paper does not say). All steps of a trajectory enter one loss
value, which depends on the policy only through q and q^c: runs compute these without graph first and go through the steps
one by one after (`diffalign.sampling.densities`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.losses.advantages import group_ids, group_sums, total_reward
from diffalign.losses.base import AnyLayout, BetaObjective, LossOut, Needs, Sampling, Source, detached, needs
from diffalign.losses.diffusion._common import Refusing, one_of, positive
from diffalign.losses.layouts import Layout
from diffalign.losses.reduce import masked_mean
from diffalign.losses.scores import Cap, Kind, Scores, lift


@dataclass(frozen=True, kw_only=True)
class PRDP(Refusing, BetaObjective):
    """Proximal reward difference prediction (Deng et al. 2024, arXiv 2402.08714).

    Square of the difference of two trajectories' log-ratios minus that of their rewards over beta, or of the same with
    steps clipped around the policy that sampled, whichever is larger; over all pairs of a prompt. Members of a prompt carry
    the means over their pairs. Rows are whole trajectories. See the top of the file for the scale of beta.

    beta: 3e-5 on log-densities (small scale).

    Attributes:
        epsilon: c, how far the log-ratio of a step may move from the sampling policy's; 1e-6 (small scale).
        step_reduction: log-ratios of steps are averaged ("mean", as the published beta goes) or added ("sum").
        ties: pairs of equal rewards: "keep", their log-ratios are made equal; "drop".
        reward_weights: of every reward; None weighs all by 1.
    """

    epsilon: float = 1e-6
    step_reduction: Literal["mean", "sum"] = "mean"
    ties: Literal["keep", "drop"] = "keep"
    reward_weights: tuple[float, ...] | None = None

    name: ClassVar[str] = "prdp"
    title: ClassVar[str] = "PRDP"
    paper: ClassVar[str] = "2402.08714"
    composition: ClassVar[str] = (
        "log-ratios of steps -> mean -> i - j -> square at reward difference / beta, clipped maximum"
    )
    needs: ClassVar[Needs] = needs("groups", caps=(Cap.RATIO, Cap.UNITS), old=True)
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = "whether log-densities are summed over the latent, so the scale of beta; no public code"
    refused: ClassVar[Mapping[Kind, str]] = {
        Kind.TOKEN: "it clips denoising steps and regresses their mean; a text has none"
    }
    instead: ClassVar[str] = "use 'rebel', the same regression without the clip"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.STEP: 3e-5}
    sampling: ClassVar[Sampling] = Sampling(shared_start=False)
    source: ClassVar[Source] = "whole_trajectories"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "epsilon")
        one_of(self, "step_reduction", ("mean", "sum"))
        one_of(self, "ties", ("keep", "drop"))

    def summary(self) -> dict[str, float | str]:
        weights = (
            {} if self.reward_weights is None else {"reward_weights": ", ".join(f"{w:g}" for w in self.reward_weights)}
        )
        return super().summary() | weights

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return None

    def over_steps(self, x: Tensor, mask: Tensor) -> Tensor:
        """Log-ratios of steps to one of the trajectory, (M,)."""
        return x.masked_fill(~mask, 0.0).sum(1) if self.step_reduction == "sum" else masked_mean(x, mask)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        groups = Layout.of(layout).need_groups()
        units = scores.need_units()
        if units.ref is None:
            raise ValueError("this objective compares with a reference; units.ref is missing")
        theta, ref, mask = lift(units.theta[groups.index]), lift(units.ref[groups.index]), units.mask[groups.index]
        old = theta.detach() if units.old is None else lift(units.old[groups.index])
        near = torch.maximum(torch.minimum(theta, old + self.epsilon), old - self.epsilon)
        reward = total_reward(groups.reward, self.reward_weights).to(theta)
        there = ~reward.isnan()
        wanted = reward.nan_to_num(0.0) / self.beta_for(scores.kind)

        def squares(x: Tensor) -> Tensor:
            missing = self.over_steps(x - ref, mask) - wanted
            return (missing[:, None] - missing[None]).square()

        free, clipped = squares(theta), squares(near)
        pairs = (groups.group[:, None] == groups.group[None]) & there[:, None] & there[None]
        pairs &= ~torch.eye(len(groups), dtype=torch.bool, device=pairs.device)
        if self.ties == "drop":
            pairs &= wanted[:, None] != wanted[None]
        ids, count = group_ids(groups.group)
        members = group_sums(torch.ones_like(wanted), ids, count)
        number = group_sums(pairs.to(wanted.dtype).sum(1), ids, count)
        loss = torch.maximum(free, clipped).masked_fill(~pairs, 0.0).sum(1)
        residual = free.detach()[pairs].sqrt()
        metrics = detached(
            reward=reward[there],
            residual=residual,
            log_ratio=self.over_steps(theta - ref, mask),
            clip_frac=(near != theta).to(theta.dtype)[mask],
        )
        return LossOut(loss * (members / number.clamp(min=1))[ids], metrics)
