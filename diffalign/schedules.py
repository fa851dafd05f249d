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
    """A discrete variance-preserving schedule.

    Attributes:
        alphas_cumprod: float32, shape (T,), from 1 (clean) down to 0 (zero terminal signal) or nearly so.
        prediction_type: what the network was trained to output.
    """

    alphas_cumprod: Tensor
    prediction_type: PredictionType

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def alpha_sigma(self, t: Int[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """alpha = sqrt(abar_t) and sigma = sqrt(1 - abar_t), each (B,), on t's device."""
        abar = self.alphas_cumprod.to(t.device)[t]
        return abar.sqrt(), (1 - abar).sqrt()


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
