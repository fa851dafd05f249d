"""The policy and its reference: one network, adapters on or off, turned into denoising errors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from diffalign.adapters import adapters_off
from diffalign.families import Conditioning, Family
from diffalign.prediction import PredictionType, add_noise, error_factor, mean_squared_error, target

ErrorSpace = Literal["native", "epsilon", "v_prediction", "sample"]
Reduction = Literal["mean", "sum"]


class Policy:
    """Scores samples under the policy and under the reference.

    The reference is the same network with the adapters off and without gradient, so that both passes run the very same
    kernels in the same types: with a fresh adapter they agree bitwise.

    Args:
        family: how the network is called.
        network: the network as prepared for training (possibly wrapped for several processes).
        bare: the same network unwrapped.
        autocast: makes the mixed-precision context, entered for policy and reference alike.
    """

    def __init__(
        self,
        family: Family,
        network: nn.Module,
        bare: nn.Module | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.family = family
        self.network = network
        self.bare = network if bare is None else bare
        self.autocast = autocast

    @property
    def num_timesteps(self) -> int:
        return self.family.schedule.num_timesteps

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The policy's native prediction, with gradient."""
        with self.autocast():
            return self.family.predict(self.network, x_t.to(self.family.dtype), t, conditioning)

    @torch.no_grad()
    def predict_reference(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The reference's native prediction."""
        with adapters_off(self.bare), self.autocast():
            return self.family.predict(self.bare, x_t.to(self.family.dtype), t, conditioning)

    def errors(
        self,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        *,
        space: ErrorSpace = "native",
        reduction: Reduction = "mean",
        reference: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Denoising errors of policy and reference at the same (x0, noise, t).

        Args:
            x0: scaled latents (N, C, h, w).
            noise: (N, C, h, w).
            t: int64 timesteps (N,).
            conditioning: with a batch axis of N.
            space: where the error is measured; "native" is what the network predicts.
            reduction: over the latent axes; published beta values refer to "mean".
            reference: False leaves the second result out (None).

        Returns:
            (policy errors with gradient, reference errors without), float32, shape (N,).
        """
        schedule = self.family.schedule
        alpha, sigma = schedule.alpha_sigma(t)
        x_t = add_noise(x0, noise, alpha, sigma)
        wanted = target(schedule.prediction_type, x0, noise, alpha, sigma)
        measured: PredictionType = schedule.prediction_type if space == "native" else space
        factor = error_factor(schedule.prediction_type, measured, alpha, sigma)
        reference_error = None
        # The reference goes first: adapters must not be switched between the policy's forward and its backward.
        if reference:
            output = self.predict_reference(x_t, t, conditioning)
            reference_error = factor * mean_squared_error(output, wanted, reduction)
        policy_error = factor * mean_squared_error(self.predict(x_t, t, conditioning), wanted, reduction)
        return policy_error, reference_error
