"""Transforms: from scores to the quantity that is contrasted, and safe logarithms.

Shapes: N rows, U units.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.losses.scores import lift

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, with finite values and gradients everywhere.

    x is limited to -1e-6, below which float32 sees exp(x) as 1. Two branches meet at -log 2, and each gets an argument
    that is safe for it: masking only the result would leave NaN gradients behind.
    """
    x = lift(x).clamp(max=-1e-6)
    near = x > -math.log(2)
    one = torch.full_like(x, -1.0)
    by_expm1 = torch.where(near, x, one).expm1().neg().log()
    by_log1p = (-torch.where(near, one, x).exp()).log1p()
    return torch.where(near, by_expm1, by_log1p)


def odds(mean_log_probability: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean log-probability <= 0): the log-odds of ORPO and ASFT."""
    return lift(mean_log_probability) - log1mexp(mean_log_probability)


def f_score(rho: Tensor, divergence: Divergence = "reverse_kl", alpha: float = 0.5, limit: float = 80.0) -> Tensor:
    """f'(exp(rho)) of an f-divergence, up to a constant: what f-DPO (arXiv 2309.16240) contrasts instead of rho.

    Args:
        rho: log-ratios.
        divergence: "reverse_kl": rho. "forward_kl": 1 - exp(-rho), at most 1. "js": log 2 + log sigma(rho), at most
            log 2 and of slope 1/2 at 0 (half the effective beta). "alpha": (exp((alpha - 1) rho) - 1) / (alpha - 1), whose
            limit alpha -> 1 is rho.
        alpha: of "alpha".
        limit: largest exponent.
    """
    rho = lift(rho)
    if divergence == "reverse_kl":
        return rho
    if divergence == "forward_kl":
        return 1 - (-rho).clamp(max=limit).exp()
    if divergence == "js":
        return math.log(2) + logsigmoid(rho)
    if divergence == "alpha":
        if alpha == 1:
            return rho
        return ((alpha - 1) * rho).clamp(max=limit).expm1() / (alpha - 1)
    raise ValueError(f"divergence is {divergence!r}; expected reverse_kl, forward_kl, js or alpha")


def exponential_reward(mean_log_probability: Tensor, alpha: float) -> Tensor:
    """(1 - exp(-alpha x)) / alpha, which is x as alpha -> 0: AlphaPO's reward (arXiv 2501.03884). Slope 1 at x = 0."""
    x = lift(mean_log_probability)
    return x if alpha == 0 else -(-alpha * x).clamp(max=80.0).expm1() / alpha


def bernoulli_score(error: Tensor, s: float = 0.5) -> Tensor:
    """s e / (exp(s e) - 1) of a denoising error e >= 0: MaPO's score. f(0) = 1 with slope -s / 2."""
    x = s * lift(error)
    small = x < 1e-4
    safe = torch.where(small, torch.ones_like(x), x.clamp(max=80.0))
    # At 0 the quotient is 0/0; its series is 1 - x/2 + x^2/12.
    return torch.where(small, 1 - x / 2 + x.square() / 12, safe / safe.expm1())
