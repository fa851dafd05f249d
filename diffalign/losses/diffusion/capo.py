"""CaPO: the margin of implicit rewards regressed on a difference of calibrated rewards.

Paper: "Calibrated Multi-Preference Optimization for Aligning Diffusion Models", Lee et al. 2025 (CVPR), arXiv 2502.02588. No
public training code; read second-hand.

Loss, per pair: ([R_w - R_l] - beta [r_w - r_l])^2, r = w_t (e_ref - e), w_t = sigma(-lambda_t + b), lambda the log of the
signal-to-noise ratio: more weight on noisy steps. R are expected win rates against samples of the base model, R_i = mean
over j != i of sigma(reward_i - reward_j) (`calibrated_rewards`), averaged over reward models. A constant target is
squared-loss IPO. Pairs come from the Pareto frontiers of several calibrated rewards (`frontiers`): w from the upper, l from
the lower; with one reward they are the best and the worst. The project page generates 16 images per prompt and draws a pair
from the two frontiers at every step, those in both left out.

Notes: rewards must be on their Bradley-Terry scale (times the logit scale) before the logistic. With many rewards most
samples are non-dominated. The paper writes separate noise for the two images (UNVERIFIED; shared here).

Not published, or not read: beta (no default), b (0 here), the learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.losses.base import AnyLayout, BetaObjective, LossOut, Needs, Sampling, detached, needs
from diffalign.losses.diffusion._common import Directed, label_direction, one_of
from diffalign.losses.layouts import Layout, Pairs
from diffalign.losses.pairwise import pair_metrics
from diffalign.losses.scores import Cap, Kind, Scores, lift


def _mates(group: Tensor) -> Tensor:
    """bool (B, B): two different samples of one prompt."""
    return (group[:, None] == group[None, :]) & ~torch.eye(len(group), dtype=torch.bool, device=group.device)


def calibrated_rewards(reward: Tensor, group: Tensor) -> Tensor:
    """Expected win rates: mean over the other samples j of a prompt of sigma(R_i - R_j), in [0, 1], (B, K).

    The sum over a prompt's N samples is N / 2. Adding a constant to a prompt's rewards changes nothing; scaling sharpens.

    Args:
        reward: on the Bradley-Terry scale of each model, (B, K) or (B,).
        group: int64 id of the prompt, (B,).

    Raises:
        ValueError: a prompt has one sample only, which has no opponent.
    """
    reward = lift(reward if reward.ndim == 2 else reward[:, None])
    mates = _mates(group)
    count = mates.sum(1)
    if bool((count == 0).any()):
        raise ValueError("a prompt has one sample only; calibrated rewards compare with others of the prompt")
    wins = (reward[:, None] - reward[None, :]).sigmoid() * mates[:, :, None]
    return wins.sum(1) / count[:, None]


def frontiers(reward: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower Pareto frontier of every prompt, bool (B,) each.

    A sample dominates another if it is at least as good in every reward and better in one. Upper: dominated by none; lower:
    dominates none. With one reward they are the best and the worst, ties included. A sample may be in both.

    Args:
        reward: calibrated, (B, K) or (B,).
        group: int64 id of the prompt, (B,).
    """
    reward = lift(reward if reward.ndim == 2 else reward[:, None])
    one, other = reward[:, None], reward[None, :]
    dominates = (one >= other).all(2) & (one > other).any(2) & _mates(group)
    return ~dominates.any(0), ~dominates.any(1)


@dataclass(frozen=True, kw_only=True)
class CaPO(Directed, BetaObjective):
    """Calibrated preference optimisation (Lee et al. 2025, arXiv 2502.02588; no public training code).

    (R_w - R_l - beta (r_w - r_l))^2 with r = w_t (e_ref - e), w_t = sigma(b - log_snr). R, in `pairs.reward_w` and
    `pairs.reward_l`, are win rates already; several columns are averaged. A run with `rollout.rewards` makes them of its
    samples (`capo.calibrated_rewards`) and draws pairs from the frontiers; stored rewards are taken as they are. Where the
    target is reached the pair stops, so nothing drives margins to infinity. The loss starts at the mean of (R_w - R_l)^2.

    Attributes:
        weighting: "sigmoid": w_t as above, or "none": 1.
        bias: b; not published.
    """

    weighting: Literal["sigmoid", "none"] = "sigmoid"
    bias: float = 0.0

    name: ClassVar[str] = "capo"
    title: ClassVar[str] = "CaPO"
    paper: ClassVar[str] = "2502.02588"
    composition: ClassVar[str] = "w_t difference of errors -> beta (w - l) -> square at the calibrated margin"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.DIFFERENCE, Cap.ERROR), log_snr=True)
    default_beta: ClassVar[Mapping[Kind, float]] = {}
    sampling: ClassVar[Sampling] = Sampling(win_rates=True)
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = (
        "no training code is public; beta, the bias of the weight of timesteps, and whether a pair shares its noise"
    )
    instead: ClassVar[str] = "use 'rebel' on groups with rewards, or 'ipo'"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "weighting", ("sigmoid", "none"))

    def target(self, pairs: Pairs) -> Tensor:
        """R_w - R_l, averaged over rewards, (P,), without gradient."""
        if pairs.reward_w is None or pairs.reward_l is None:
            raise ValueError(
                "pairs.reward_w and pairs.reward_l are missing; capo fits the difference of calibrated rewards"
            )
        return (pairs.reward_w - pairs.reward_l).mean(1).detach()

    def direction(self, scores: Scores, pairs: Pairs) -> Tensor:
        return self.target(pairs).sign() * label_direction(pairs, scores.theta)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs, target = Layout.of(layout).need_pairs(), self.target(Layout.of(layout).need_pairs())
        r = self.beta_for(scores.kind) * 2 * scores.log_ratio()  # beta (e_ref - e)
        if self.weighting == "sigmoid":
            r = r * (self.bias - scores.need_log_snr()).sigmoid()
        w, l = r[pairs.w], r[pairs.l]
        z = w - l - pairs.margin
        loss = pairs.p * (z - target).square() + (1 - pairs.p) * (z + target).square()
        return LossOut(pairs.weight * loss, pair_metrics(w - l, w, l, scores, pairs) | detached(target=target))
