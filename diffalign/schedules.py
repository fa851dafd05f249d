"""Noise schedules and timestep draws."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.prediction import PredictionType


@dataclass(frozen=True)
class Schedule:
    """The noise levels of training, by timestep: x_t = alpha_t x0 + sigma_t noise; noise grows with t.

    A *timestep* is a place in these tables, int64 in [0, T). What the network is told at that place is `times`.

    Attributes:
        alphas, sigmas: float32, shape (T,).
        times: shape (T,): int64 timesteps for variance-preserving models, float32 in (0, 1000] for flow models.
        prediction_type: what the network was trained to output.
    """

    alphas: Tensor
    sigmas: Tensor
    times: Tensor
    prediction_type: PredictionType

    @classmethod
    def variance_preserving(cls, alphas_cumprod: Float[Tensor, " t"], prediction_type: PredictionType) -> Schedule:
        """alpha^2 + sigma^2 = 1.

        Args:
            alphas_cumprod: shape (T,), from 1 (clean) down to 0 (zero terminal signal) or nearly so.
            prediction_type: of the network.
        """
        abar = alphas_cumprod.float()
        return cls(abar.sqrt(), (1 - abar).sqrt(), torch.arange(len(abar)), prediction_type)

    @classmethod
    def flow(cls, shift: float = 1.0, num_timesteps: int = 1000) -> Schedule:
        """alpha = 1 - sigma, with sigma = shift u / (1 + (shift - 1) u) for u = 1/T, 2/T, ..., 1.

        This is the table that diffusers' FlowMatchEulerDiscreteScheduler is made with, in ascending order.
        """
        u = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps
        sigma = shift * u / (1 + (shift - 1) * u)
        return cls((1 - sigma).float(), sigma.float(), (sigma * num_timesteps).float(), "flow_prediction")

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas)

    @property
    def is_flow(self) -> bool:
        return self.prediction_type == "flow_prediction"

    def alpha_sigma(self, t: Int[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """alpha and sigma at timesteps, each (B,), on t's device."""
        return self.alphas.to(t.device)[t], self.sigmas.to(t.device)[t]

    def time(self, t: Int[Tensor, " b"]) -> Tensor:
        """What the network is told at timesteps, (B,)."""
        return self.times.to(t.device)[t]

    def log_snr(self, t: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """log(alpha^2 / sigma^2), (B,); infinite at zero terminal signal or zero noise."""
        alpha, sigma = self.alpha_sigma(t)
        return 2 * (alpha.log() - sigma.log())


def sample_seed(seed: int, sample_id: str, visit: int) -> int:
    """A 63-bit seed for one visit of one sample: a function of nothing else, so not of the number of processes.

    Args:
        seed: the run's seed.
        sample_id: the record's id.
        visit: how often the sample was visited before (the epoch).
    """
    digest = hashlib.sha256(f"{seed}/{sample_id}/{visit}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_for(seed: int, sample_id: str, visit: int = 0) -> torch.Generator:
    """A CPU generator seeded by `sample_seed`."""
    return torch.Generator().manual_seed(sample_seed(seed, sample_id, visit))
