"""What a network predicts, and the conversions between the ways of saying it.

Time runs as in diffusers: noise grows with t, and x_t = alpha x0 + sigma noise. Variance-preserving models have
alpha = sqrt(alphas_cumprod[t]) and sigma = sqrt(1 - alphas_cumprod[t]); flow models alpha = 1 - sigma. Prediction types
carry diffusers' names: "epsilon" (the noise), "v_prediction" (alpha noise - sigma x0), "sample" (x0) and
"flow_prediction" (noise - x0). All conversions hold for any alpha and sigma.

Legend: B batch; alpha and sigma have shape (B,), tensors (B, ...) of any rank.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]


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
    if prediction_type == "flow_prediction":
        return noise - x0
    raise ValueError(f"prediction type {prediction_type!r}; expected epsilon, v_prediction, sample or flow_prediction")


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
        length = a.square() + s.square()
        noise, x0 = (a * output + s * x_t) / length, (a * x_t - s * output) / length
    elif source == "flow_prediction":
        noise, x0 = (x_t + a * output) / (a + s), (x_t - s * output) / (a + s)
    elif source == "epsilon":
        noise, x0 = output, (x_t - s * output) / a
    else:
        noise, x0 = (x_t - a * output) / s, output
    if wanted == "epsilon":
        return noise
    if wanted == "flow_prediction":
        return noise - x0
    return x0 if wanted == "sample" else a * noise - s * x0


def error_factor(
    source: PredictionType, wanted: PredictionType, alpha: Float[Tensor, " b"], sigma: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """What turns a squared error in one space into the squared error of the same prediction in another, per item.

    The error of one prediction, for noisy latents that are given, is in all spaces the same vector times a number:
    x0 : epsilon : v : flow = sigma : -alpha : -(alpha^2 + sigma^2) : -(alpha + sigma). A weight that is constant in one
    space is a timestep weight in another: uniform epsilon weights are (1 - t)^2 on a flow model's errors.
    """
    lengths = {
        "sample": sigma.square(),
        "epsilon": alpha.square(),
        "v_prediction": (alpha.square() + sigma.square()).square(),
        "flow_prediction": (alpha + sigma).square(),
    }
    return torch.ones_like(alpha) if source == wanted else lengths[wanted] / lengths[source]


def mean_squared_error(output: Tensor, wanted: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Squared error per item in float32, over all but the first axis, shape (B,).

    "mean" is what published beta values refer to; "sum" is larger by the number of latent elements.
    """
    squared = (output.float() - wanted.float()).square().flatten(1)
    return squared.mean(1) if reduction == "mean" else squared.sum(1)
