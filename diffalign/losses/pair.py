"""Pairwise preference losses with a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.losses.links import hinge, logistic, robust_logistic, square

LossType = Literal["sigmoid", "robust", "hinge", "ipo"]


@dataclass(frozen=True)
class PairLoss:
    """Per-pair results, all float32 of shape (B,).

    Attributes:
        loss: carries gradient; not reduced and not weighted.
        logits: z = beta (log-ratio of chosen - log-ratio of rejected) - margin, detached.
        chosen_reward: implicit reward beta (policy - reference) of the chosen item, detached.
        rejected_reward: the same of the rejected item.
    """

    loss: Tensor
    logits: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor

    @property
    def accuracy(self) -> Tensor:
        """1 where the chosen item has the higher implicit reward, 1/2 where they are equal, shape (B,)."""
        return (self.logits > 0).float() + 0.5 * (self.logits == 0).float()


def log_ratio(policy: Float[Tensor, " b"], reference: Float[Tensor, " b"] | None) -> Float[Tensor, " b"]:
    """policy - reference in float32; the reference is detached. None stands for a reference-free score."""
    policy = policy.float()
    return policy if reference is None else policy - reference.detach().float()


def implicit_reward(
    policy: Float[Tensor, " b"], reference: Float[Tensor, " b"] | None, beta: float
) -> Float[Tensor, " b"]:
    """beta (policy - reference), detached: for logging, never for the loss."""
    return (beta * log_ratio(policy, reference)).detach()


def pair_logits(
    chosen: Float[Tensor, " b"],
    rejected: Float[Tensor, " b"],
    beta: float,
    margin: Float[Tensor, " b"] | float = 0.0,
) -> Float[Tensor, " b"]:
    """z = beta (chosen - rejected) - margin from two log-ratios."""
    return beta * (chosen - rejected) - margin


def dpo(
    policy_chosen: Float[Tensor, " b"],
    policy_rejected: Float[Tensor, " b"],
    reference_chosen: Float[Tensor, " b"] | None,
    reference_rejected: Float[Tensor, " b"] | None,
    *,
    beta: float,
    loss_type: LossType = "sigmoid",
    p: Float[Tensor, " b"] | float = 1.0,
    label_smoothing: float = 0.0,
    label_noise: float = 0.0,
    ipo_scale: Literal["unit", "paper"] = "unit",
    margin: Float[Tensor, " b"] | float = 0.0,
) -> PairLoss:
    """Direct preference optimisation and its links.

    Composition: log-ratio -> beta (chosen - rejected) - margin -> link. Sources: DPO arXiv 2305.18290; Diffusion-DPO
    arXiv 2311.12908 (the same loss on denoising scores).

    Args:
        policy_chosen, policy_rejected: policy scores, shape (B,); gradient flows.
        reference_chosen, reference_rejected: reference scores, shape (B,), no gradient; None for reference-free.
        beta: about 0.1 for summed token log-probabilities, 2000 to 5000 for denoising scores (-1/2 mean squared error).
        loss_type: "sigmoid"; "robust" (debiased for `label_noise`); "hinge"; "ipo" (squared).
        p: probability that the chosen item is preferred, 1/2 for a tie; scalar or (B,).
        label_smoothing: conservative smoothing, sigmoid only: p becomes p (1 - e) + (1 - p) e.
        label_noise: flip rate for "robust" only. Never the same thing as `label_smoothing`.
        ipo_scale: "unit" (z - 1/2)^2, or "paper" which divides by beta^2.
        margin: subtracted from z.

    Returns:
        `PairLoss`; reduce with `(weight * out.loss).mean()`.

    Raises:
        ValueError: a smoothing or noise rate out of range, or one that the loss type does not use.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected 0 <= label_smoothing < 0.5")
    if label_smoothing and loss_type != "sigmoid":
        raise ValueError(f"label_smoothing belongs to loss_type 'sigmoid', not {loss_type!r}")
    if label_noise and loss_type != "robust":
        raise ValueError(f"label_noise belongs to loss_type 'robust', not {loss_type!r}")
    chosen = log_ratio(policy_chosen, reference_chosen)
    rejected = log_ratio(policy_rejected, reference_rejected)
    z = pair_logits(chosen, rejected, beta, margin)
    if loss_type == "sigmoid":
        loss = logistic(z, p * (1 - label_smoothing) + (1 - p) * label_smoothing)
    elif loss_type == "robust":
        loss = robust_logistic(z, label_noise, p)
    elif loss_type == "hinge":
        loss = hinge(z, p)
    elif loss_type == "ipo":
        loss = square(z, p, beta if ipo_scale == "paper" else None)
    else:
        raise ValueError(f"loss_type is {loss_type!r}; expected sigmoid, robust, hinge or ipo")
    with torch.no_grad():
        return PairLoss(loss, z.detach(), (beta * chosen).detach(), (beta * rejected).detach())
