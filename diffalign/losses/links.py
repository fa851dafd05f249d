"""Links: what a dimensionless margin z costs. All are minimised and return one value per item, float32.

`p` is the probability that the item labelled "chosen" is the preferred one: 1 for a clean label, 1/2 for a tie.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, relu


def logistic(z: Float[Tensor, " b"], p: Float[Tensor, " b"] | float = 1.0) -> Float[Tensor, " b"]:
    """-p log sigma(z) - (1 - p) log sigma(-z).

    At z = 0: value log 2, slope 1/2 - p. With p = 1 - eps this is conservative DPO (label smoothing), whose optimum is
    finite at z = log(p / (1 - p)).
    """
    z = z.float()
    return -p * logsigmoid(z) - (1 - p) * logsigmoid(-z)


def robust_logistic(z: Float[Tensor, " b"], noise: float, p: Float[Tensor, " b"] | float = 1.0) -> Float[Tensor, " b"]:
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


def hinge(z: Float[Tensor, " b"], p: Float[Tensor, " b"] | float = 1.0) -> Float[Tensor, " b"]:
    """p max(0, 1 - z) + (1 - p) max(0, 1 + z). At z = 0: value 1, slope 1 - 2 p."""
    z = z.float()
    return p * relu(1 - z) + (1 - p) * relu(1 + z)


def square(
    z: Float[Tensor, " b"], p: Float[Tensor, " b"] | float = 1.0, beta: float | None = None
) -> Float[Tensor, " b"]:
    """p (z - 1/2)^2 + (1 - p) (z + 1/2)^2, the identity-preference (IPO) loss.

    Args:
        z: beta times the difference of log-ratios.
        p: label probability.
        beta: None gives the unit scale above. A value divides by beta^2, which is the paper's (difference - 1 / (2 beta))^2
            (arXiv 2310.12036); on denoising scores, where beta is in the thousands, that scale vanishes.
    """
    z = z.float()
    loss = p * (z - 0.5).square() + (1 - p) * (z + 0.5).square()
    return loss if beta is None else loss / beta**2
