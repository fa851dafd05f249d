"""Links: what a dimensionless margin z costs. All are minimised and return one value per item.

`p` is the probability that the item labelled "chosen" is the preferred one: 1 for a clean label, 1/2 for a tie.
Half precision is lifted to float32.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from diffalign.losses.scores import lift

EXP_LIMIT = 80.0  # exp of more leaves float32


def logistic(z: Float[Tensor, "*b"], p: Float[Tensor, "*b"] | float = 1.0) -> Float[Tensor, "*b"]:
    """-p log sigma(z) - (1 - p) log sigma(-z).

    At z = 0: value log 2, slope 1/2 - p. With p = 1 - eps this is conservative DPO (label smoothing), whose optimum is
    finite at z = log(p / (1 - p)).
    """
    z = lift(z)
    return -p * logsigmoid(z) - (1 - p) * logsigmoid(-z)


def robust_logistic(z: Float[Tensor, "*b"], noise: float, p: Float[Tensor, "*b"] | float = 1.0) -> Float[Tensor, "*b"]:
    """[(1 - e) l(z) - e l(-z)] / (1 - 2 e) with l = -log sigma: unbiased under labels flipped at rate e.

    Args:
        z: margins.
        noise: flip rate e in [0, 1/2).
        p: label probability before the flips.

    Unlike conservative smoothing it has no minimum: it is unbounded below for e > 0, so its value may be negative.
    Source: robust DPO, arXiv 2403.00409.

    Raises:
        ValueError: `noise` outside [0, 1/2).
    """
    if not 0 <= noise < 0.5:
        raise ValueError(f"label noise is {noise}; robust DPO is defined for 0 <= noise < 0.5")
    return ((1 - noise) * logistic(z, p) - noise * logistic(-z, p)) / (1 - 2 * noise)


def hinge(z: Float[Tensor, "*b"], p: Float[Tensor, "*b"] | float = 1.0) -> Float[Tensor, "*b"]:
    """p max(0, 1 - z) + (1 - p) max(0, 1 + z). At z = 0: value 1, slope 1 - 2 p."""
    z = lift(z)
    return p * relu(1 - z) + (1 - p) * relu(1 + z)


def square(
    z: Float[Tensor, "*b"],
    p: Float[Tensor, "*b"] | float = 1.0,
    beta: float | None = None,
    target: float = 0.5,
) -> Float[Tensor, "*b"]:
    """p (z - a)^2 + (1 - p) (z + a)^2 with a = 1/2: the identity-preference (IPO) loss.

    Args:
        z: beta times the difference of log-ratios.
        p: label probability.
        beta: None gives the unit scale above. A value divides by beta^2, which is the paper's (difference - 1 / (2 beta))^2
            (arXiv 2310.12036); on denoising scores, where beta is in the thousands, that scale vanishes.
        target: a.
    """
    z = lift(z)
    loss = p * (z - target).square() + (1 - p) * (z + target).square()
    return loss if beta is None else loss / beta**2


def sigmoid(z: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """sigma(-z), bounded in [0, 1]. At z = 0: value 1/2, slope -1/4; flat where |z| is large (KTO, APO)."""
    return (-lift(z)).sigmoid()


def exponential(z: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """exp(-z). At z = 0: value 1, slope -1. The exponent is limited to 80."""
    return (-lift(z)).clamp(max=EXP_LIMIT).exp()


def reverse_kl(z: Float[Tensor, "*b"], smoothing: float, p: Float[Tensor, "*b"] | float = 1.0) -> Float[Tensor, "*b"]:
    """KL(q || p_e) of q = (sigma(z), sigma(-z)) from p_e = (1 - e, e): EXO's pair loss (arXiv 2402.00856).

    A label of probability p smooths to p_e = p (1 - e) + (1 - p) e: it is the target itself, not a mixture of two losses.
    The gradient of the outer sigma flows. Minimum 0 at z = log(p_e / (1 - p_e)); plateau -log(1 - p_e) for z << 0.

    Raises:
        ValueError: `smoothing` outside (0, 1/2): at 0 the loss is infinite.
    """
    if not 0 < smoothing < 0.5:
        raise ValueError(f"label_smoothing is {smoothing}; the reverse-KL link needs 0 < label_smoothing < 0.5")
    z = lift(z)
    label = torch.as_tensor(p, dtype=z.dtype, device=z.device)
    up = label * (1 - 2 * smoothing) + smoothing
    down = (1 - label) * (1 - 2 * smoothing) + smoothing  # not 1 - up, which loses the digits of a small smoothing
    return z.sigmoid() * (logsigmoid(z) - up.log()) + (-z).sigmoid() * (logsigmoid(-z) - down.log())


def log_ratio_modulated(z: Float[Tensor, "*b"], tau: float) -> Float[Tensor, "*b"]:
    """(1 - m)(-log sigma(z)) + m exp(-z) with m = sigma(z / tau): the discovered loss of DiscoPOP (arXiv 2406.08414).

    Its slope at 0 is -3/4 + (1 - log 2) / (4 tau): with tau below 0.1023 it is *positive*, so training that starts from
    the reference first pushes margins the wrong way.
    """
    z = lift(z)
    m = (z / tau).sigmoid()
    return (1 - m) * -logsigmoid(z) + m * exponential(z)
