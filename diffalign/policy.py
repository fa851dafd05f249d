"""The policy and its reference: one network, adapters on or off, turned into denoising errors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from diffalign.adapters import adapters_off
from diffalign.config import DenoisingConfig
from diffalign.data.batch import PairBatch
from diffalign.families import Conditioning, DenoisingFamily
from diffalign.losses import Layout, Objective, Scores
from diffalign.prediction import PredictionType, add_noise, error_factor, mean_squared_error, target
from diffalign.references import Reference


class Policy:
    """Scores samples under the policy and under the reference.

    The reference is the same network with the adapters off and without gradient, so that both passes run the very same
    kernels in the same types: with a fresh adapter they agree bitwise.

    Args:
        family: how the network is called.
        network: the network as prepared for training (possibly wrapped for several processes).
        bare: the same network unwrapped.
        autocast: makes the mixed-precision context, entered for policy and reference alike.
        denoising: where and how errors are measured.
        reference: what the policy is compared with; None: the network with its adapters off.
    """

    def __init__(
        self,
        family: DenoisingFamily,
        network: nn.Module,
        bare: nn.Module | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        denoising: DenoisingConfig | None = None,
        reference: Reference | None = None,
    ) -> None:
        self.family = family
        self.network = network
        self.bare = network if bare is None else bare
        self.autocast = autocast
        self.denoising = DenoisingConfig() if denoising is None else denoising
        self.reference = reference

    @property
    def num_timesteps(self) -> int:
        return self.family.schedule.num_timesteps

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The policy's native prediction, with gradient."""
        with self.autocast():
            return self._call(self.network, x_t, t, conditioning)

    @torch.no_grad()
    def predict_reference(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The reference's native prediction."""
        with adapters_off(self.bare), self.autocast():
            return self._call(self.bare, x_t, t, conditioning)

    def _call(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.family.predict(network, x_t.to(self.family.dtype), self.family.schedule.time(t), conditioning)

    def errors(
        self,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        *,
        reference: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Denoising errors of policy and reference at the same (x0, noise, t).

        Args:
            x0: scaled latents (N, C, h, w).
            noise: (N, C, h, w).
            t: int64 timesteps (N,).
            conditioning: with a batch axis of N.
            reference: False leaves the second result out (None).

        Returns:
            (policy errors with gradient, reference errors without), float32, shape (N,).
        """
        schedule, space, reduction = self.family.schedule, self.denoising.error_space, self.denoising.error_reduction
        alpha, sigma = schedule.alpha_sigma(t)
        x_t = add_noise(x0, noise, alpha, sigma)
        wanted = target(schedule.prediction_type, x0, noise, alpha, sigma)
        measured: PredictionType = schedule.prediction_type if space == "native" else space
        factor = error_factor(schedule.prediction_type, measured, alpha, sigma)

        def error(output: Tensor) -> Tensor:
            return factor * mean_squared_error(output, wanted, reduction)

        reference_error = None
        # The reference goes first: adapters must not be switched between the policy's forward and its backward.
        if reference and self.reference is None:
            reference_error = error(self.predict_reference(x_t, t, conditioning))
        elif reference:
            assert self.reference is not None, "tested above"
            reference_error = torch.zeros((), device=x_t.device)
            for weight, weights in self.reference.parts():
                with torch.no_grad(), self.reference.active(weights), self.autocast():
                    output = self._call(self.bare, x_t, t, conditioning)
                reference_error = reference_error + weight * error(output)
        return error(self.predict(x_t, t, conditioning)), reference_error

    def scores(self, batch: PairBatch, objective: Objective) -> tuple[Scores, Layout]:
        """Scores of a batch and who is compared with whom: minus one half of the denoising errors.

        Objectives on pairs get chosen rows first, in one concatenated forward; a pair shares its timestep and its noise.
        Objectives on single items get the chosen images with label 1 and the rejected ones with label 0.
        """
        rows, layout = batch.rows(objective.needs)
        error, reference_error = self.errors(*rows, reference=objective.reads_reference())
        return Scores.denoising(error, reference_error), layout
