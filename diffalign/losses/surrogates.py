"""Surrogates of policy gradients on sampled rows: pure functions of ratios and advantages, all to be minimised.

Shapes: M sampled rows, U units (tokens or denoising steps). A ratio is (M, U), or (M, 1) where it is one per row; an
advantage is (M, 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.losses.advantages import LOG_RATIO_LIMIT
from diffalign.losses.reduce import masked_mean
from diffalign.losses.scores import Units, lift


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Sampled rows, per unit.

    Attributes:
        theta: log-probabilities of the policy, (M, U); gradient flows.
        log_ratio: theta minus the behaviour policy's, (M, U), 0 where masked; where that is the policy itself, 0 with the
            gradient of theta.
        mask: bool (M, U).
        advantage: (M, 1).
        ref: of the reference, (M, U).
        weight: of the surrogate per unit, (M, U).
    """

    theta: Tensor
    log_ratio: Tensor
    mask: Tensor
    advantage: Tensor
    ref: Tensor | None = None
    weight: Tensor | None = None

    @classmethod
    def of(cls, units: Units, index: Tensor, advantage: Tensor) -> Rollout:
        """Rows `index` of scores per unit; without `units.old` the policy itself is the behaviour policy."""
        theta, mask = lift(units.theta[index]), units.mask[index]
        old = theta.detach() if units.old is None else lift(units.old[index])
        return cls(
            theta=theta,
            log_ratio=(theta - old).masked_fill(~mask, 0.0),
            mask=mask,
            advantage=advantage.to(theta.dtype)[:, None],
            ref=None if units.ref is None else lift(units.ref[index]),
            weight=None if units.weight is None else lift(units.weight[index]),
        )

    def ratio(self, level: Literal["token", "sequence"]) -> Tensor:
        """exp of the log-ratio per unit, (M, U); or of its mean over the row (GSPO's geometric mean), (M, 1)."""
        if level == "token":
            return bounded_exp(self.log_ratio)
        return bounded_exp(masked_mean(self.log_ratio, self.mask)[:, None])


def bounded_exp(log_ratio: Tensor, limit: float = LOG_RATIO_LIMIT) -> Tensor:
    """exp with its argument limited, so that no ratio leaves float32; beyond the limit there is no gradient."""
    return lift(log_ratio).clamp(max=limit).exp()


def clip_surrogate(ratio: Tensor, advantage: Tensor, low: float, high: float, *, delta: float | None = None) -> Tensor:
    """-min(R A, clip(R, 1 - low, 1 + high) A): the clipped surrogate of PPO (arXiv 1707.06347).

    Args:
        ratio, advantage: broadcast against each other.
        low, high: widths of the clip range below and above 1.
        delta: also limits the *unclipped* ratio from above, which bounds the loss of negative advantages (INTELLECT-2's
            two-sided clipping); must exceed 1 + high to change nothing else.
    """
    free = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(free * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def clipped_fractions(ratio: Tensor, advantage: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Where clipping stops the gradient, below (A < 0) and above (A > 0), as 0 or 1."""
    below = (ratio < 1 - low) & (advantage < 0)
    above = (ratio > 1 + high) & (advantage > 0)
    return below.to(ratio.dtype), above.to(ratio.dtype)


def weighted_likelihood(theta: Tensor, weight: Tensor, advantage: Tensor) -> Tensor:
    """-sg(weight) A log p: importance weights that scale the gradient and are not themselves differentiated."""
    return -weight.detach() * advantage * theta


def by_sign(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """One of two numbers, in the precision of `like` (torch.where of two floats is float32)."""
    return torch.where(condition, like.new_tensor(yes), like.new_tensor(no))


def soft_gate(ratio: Tensor, advantage: Tensor, tau_pos: float, tau_neg: float) -> Tensor:
    """-(4 / tau) sigma(tau (R - 1)) A: SAPO's smooth clip (arXiv 2511.20347), of the same slope -A as R A at R = 1."""
    tau = by_sign(advantage > 0, tau_pos, tau_neg, ratio)
    return -(tau * (ratio - 1)).sigmoid() * 4 / tau * advantage


def gamma_weight(
    log_ratio: Tensor,
    mask: Tensor,
    advantage: Tensor,
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> Tensor:
    """phi(W) = exp(lambda) W^k exp(-lambda W) of the sequence ratio W: VESPO's weight (arXiv 2602.10693), (M, 1), detached.

    phi(1) = 1, and phi -> 0 on both sides. Sums of log-ratios are limited to [log 1e-8, 20] as in TRL.
    """
    with torch.no_grad():
        sums = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).masked_fill(~mask, 0.0).sum(1, keepdim=True)
        log_w = sums.clamp(-18.420680743952367, LOG_RATIO_LIMIT)
        up = advantage >= 0
        k, decay = by_sign(up, k_pos, k_neg, log_w), by_sign(up, lambda_pos, lambda_neg, log_w)
        return (decay + k * log_w - decay * log_w.exp()).exp()


def geometric_clip(log_ratio: Tensor, mask: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """-A times the geometric mean of one-sidedly clipped ratios: GMPO (arXiv 2507.20673), (M, 1). low, high in log space."""
    clipped = log_ratio.clamp(-low, high)
    pessimistic = torch.where(advantage > 0, torch.minimum(log_ratio, clipped), torch.maximum(log_ratio, clipped))
    return -bounded_exp(masked_mean(pessimistic, mask)[:, None]) * advantage


def off_policy_keep(rollout: Rollout, threshold: float) -> Tensor:
    """1 to keep a row, 0 to drop it, (M, 1): off-policy sequence masking of DeepSeek-V3.2 (arXiv 2512.02556, eq. 9).

    Dropped are rows with A < 0 whose mean log-probability fell by more than `threshold` nats per unit since sampling.
    """
    drift = masked_mean(-rollout.log_ratio.detach(), rollout.mask)[:, None]
    return ((rollout.advantage >= 0) | (drift <= threshold)).to(rollout.theta.dtype)


def nft_terms(
    log_ratio: Tensor, correct: Tensor, rate: Tensor, *, normalize: int = 1, floor: float = 1.0, neg_weight: float = 1.0
) -> Tensor:
    """Negative-aware fine-tuning per unit (arXiv 2505.18116; official code NVlabs/NFT:dp_actor.py).

    Correct rows: -log R. Wrong rows: -log of the *implicit negative policy's* ratio x = (1 - r R) / (1 - r), where x is
    replaced by max(x, floor) in value but keeps its gradient, which is therefore r R / ((1 - r) max(x, floor)).

    Args:
        log_ratio: (M, U) or (M, 1); limited to 10.
        correct: 0 or 1, (M, 1).
        rate: share r of correct answers to the prompt, in (0, 1), (M, 1).
        normalize: weight of the prompt: 0: 1. 1: 1 - r (the on-policy gradient of Dr. GRPO). 2: sqrt((1 - r) / r) (of GRPO).
        floor: smallest value of x. The official 1 is active wherever R > 1.
        neg_weight: of wrong rows; 0 is rejection-sampling fine-tuning.
    """
    log_ratio = lift(log_ratio).clamp(max=10.0)
    x = (1 - rate * log_ratio.exp()) / (1 - rate)
    negative = -(x + (x.clamp(min=floor) - x).detach()).log()
    loss = correct * -log_ratio + (1 - correct) * neg_weight * negative
    if normalize == 0:
        return loss
    return loss * ((1 - rate) if normalize == 1 else ((1 - rate) / rate).sqrt())
