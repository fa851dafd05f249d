"""What a network predicts, and the conversions between the ways of saying it.

Time runs as in diffusers: noise grows with t, and x_t = alpha x0 + sigma noise. For the variance-preserving models here
alpha = sqrt(alphas_cumprod[t]) and sigma = sqrt(1 - alphas_cumprod[t]). Prediction types carry diffusers' names:
"epsilon" (the noise), "v_prediction" (alpha noise - sigma x0) and "sample" (x0).

Legend: B batch; alpha and sigma have shape (B,), tensors (B, ...) of any rank.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]


def append_dims(value: Float[Tensor, " b"], like: Tensor) -> Tensor:
    """Shape (B,) to (B, 1, ..., 1) with the rank of `like`."""
    return value.view(-1, *([1] * (like.ndim - 1)))


def add_noise(x0: Tensor, noise: Tensor, alpha: Float[Tensor, " b"], sigma: Float[Tensor, " b"]) -> Tensor:
    """x_t = alpha x0 + sigma noise."""
    return append_dims(alpha, x0) * x0 + append_dims(sigma, x0) * noise


def target(
    prediction_type: PredictionType,
    x0: Tensor,
    noise: Tensor,
    alpha: Float[Tensor, " b"],
    sigma: Float[Tensor, " b"],
) -> Tensor:
    """What the network should output.

    Raises:
        ValueError: unknown prediction type.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return append_dims(alpha, x0) * noise - append_dims(sigma, x0) * x0
    if prediction_type == "sample":
        return x0
    raise ValueError(f"prediction type {prediction_type!r}; expected epsilon, v_prediction or sample")


def convert(
    output: Tensor,
    x_t: Tensor,
    alpha: Float[Tensor, " b"],
    sigma: Float[Tensor, " b"],
    source: PredictionType,
    wanted: PredictionType,
) -> Tensor:
    """The same prediction said another way.

    Exact where defined; from "epsilon" it divides by alpha, to "epsilon" from "sample" by sigma: infinite at zero
    terminal signal or zero noise.
    """
    if source == wanted:
        return output
    a, s = append_dims(alpha, x_t), append_dims(sigma, x_t)
    if source == "v_prediction":
        noise, x0 = a * output + s * x_t, a * x_t - s * output
    elif source == "epsilon":
        noise, x0 = output, (x_t - s * output) / a
    else:
        noise, x0 = (x_t - a * output) / s, output
    if wanted == "epsilon":
        return noise
    return x0 if wanted == "sample" else a * noise - s * x0


def error_factor(
    source: PredictionType, wanted: PredictionType, alpha: Float[Tensor, " b"], sigma: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """What turns a squared error in one space into the squared error of the same prediction in another, per item.

    From err_eps = alpha err_v and err_x0 = -sigma err_v (variance-preserving). A weight that is constant in one space is
    a timestep weight in another.
    """
    to_v = {
        "v_prediction": torch.ones_like(alpha),
        "epsilon": alpha.square(),
        "sample": sigma.square(),
    }
    return to_v[wanted] / to_v[source]


def mean_squared_error(output: Tensor, wanted: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Squared error per item in float32, over all but the first axis, shape (B,).

    "mean" is what published beta values refer to; "sum" is larger by the number of latent elements.
    """
    squared = (output.float() - wanted.float()).square().flatten(1)
    return squared.mean(1) if reduction == "mean" else squared.sum(1)
