"""A sampler that returns what training needs: latents, stored transitions with their log-densities, or points on the way.

One step of it, for any model x_t = alpha x0 + sigma noise, from level t to level s < t:

    x_s = alpha_s x0^ + sqrt(sigma_s^2 - sd^2) noise^ + sd xi,
    sd^2 = eta^2 sigma_s^2 (1 - (sigma_s alpha_t)^2 / (sigma_t alpha_s)^2)

with x0^ and noise^ from the network's prediction. For variance-preserving models this is DDIM (arXiv 2010.02502, eq. 12 and
16; eta 1 is the DDPM posterior), for flow models DiffusionNFT's stochastic step (arXiv 2509.16117, appendix B); eta 0 is
the deterministic DDIM or Euler step. Flow models have three more kernels, which differ in sd and, but for cps, in the mean:

    flow_sde     sd = eta sqrt(t / (1 - t)) sqrt(t - s)     x_s = x_t - (t - s) v - sd^2 / (2 t) noise^ + sd xi
                 (Flow-GRPO, arXiv 2505.05470; at t = 1 the denominator is that of the second level)
    constant_sde sd = eta sqrt(t - s), the same mean                                         (DanceGRPO, arXiv 2505.07818)
    cps          sd = s sin(eta pi / 2), the mean of the first formula above                 (Flow-CPS, arXiv 2509.05952)

The first two keep the marginals as steps grow finer; cps re-injects a share of the noise at every step and does not. Public
implementations of cps leave the variance out of its log-density; so does `log_density`.

Log-densities are means over the latent's elements, as all public implementations of trajectory methods have them, in
float32.

Legend: S steps, N samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.families import DenoisingFamily
from diffalign.prediction import PredictionType, append_dims, convert

Kernel = Literal["ddim", "flow_sde", "constant_sde", "cps"]
Predict = Callable[[Tensor, Tensor], Tensor]  # (noisy latents (N, ...), times (N,)) -> native prediction, float32


@dataclass(frozen=True)
class Grid:
    """The noise levels of a sampler, from noise to clean.

    Attributes:
        times: what the network is told at each step, (S,).
        alphas, sigmas: levels before each step and after the last, (S + 1,), float32.
        timesteps: the nearest timesteps of the training schedule, int64 (S,).
        prediction_type: of the network.
        kernel: of the stochastic step.
    """

    times: Tensor
    alphas: Tensor
    sigmas: Tensor
    timesteps: Tensor
    prediction_type: PredictionType
    kernel: Kernel = "ddim"

    def __len__(self) -> int:
        return len(self.times)

    def deviation(self, step: int, eta: float) -> float:
        """sd of a step; 0 where it is deterministic."""
        a, s = float(self.alphas[step]), float(self.sigmas[step])
        a_next, s_next = float(self.alphas[step + 1]), float(self.sigmas[step + 1])
        if self.kernel == "cps":
            return s_next * math.sin(eta * math.pi / 2)
        if self.kernel == "constant_sde":
            return eta * math.sqrt(s - s_next)
        if self.kernel == "flow_sde":
            below = 1 - s if s < 1 else 1 - float(self.sigmas[1])
            return eta * math.sqrt(s / below) * math.sqrt(s - s_next)
        inside = 1 - (s_next * a) ** 2 / (s * a_next) ** 2
        return eta * s_next * math.sqrt(max(inside, 0.0))

    def random_steps(self, eta: float) -> list[int]:
        """Steps that have a density: the last one usually has not."""
        return [k for k in range(len(self)) if self.deviation(k, eta) > 0]


def make_grid(
    family: DenoisingFamily, scheduler: Any, steps: int, latent_shape: tuple[int, ...], kernel: Kernel = "ddim"
) -> Grid:
    """The grid of a stock scheduler.

    Args:
        family: for the training schedule.
        scheduler: a diffusers scheduler of the family's pipeline (it is not changed).
        steps: number of steps.
        latent_shape: of one sample; some flow schedulers shift by it.
        kernel: of stochastic steps; all but "ddim" are for flow models.

    Raises:
        ConfigError: a flow kernel for another model.
    """
    if kernel != "ddim" and not family.schedule.is_flow:
        raise ConfigError(f"rollout.kernel: got {kernel!r}, a step of flow models; this model takes 'ddim'")
    made = type(scheduler).from_config(scheduler.config)
    schedule = family.schedule
    if schedule.is_flow:
        more = {}
        if made.config.get("use_dynamic_shifting", False):
            more["mu"] = dynamic_shift(made.config, latent_shape)
        if family.linspace_sigmas and not made.config.get("use_flow_sigmas", False):
            made.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **more)
        else:
            made.set_timesteps(steps, **more)
        sigmas = made.sigmas.float().cpu()
        if len(sigmas) == len(made.timesteps):
            sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        times = made.timesteps.float().cpu()
        timesteps = (sigmas[:-1, None] - schedule.sigmas[None]).abs().argmin(1)
        return Grid(times, 1 - sigmas, sigmas, timesteps, schedule.prediction_type, kernel)
    made.set_timesteps(steps)
    times = made.timesteps.long().cpu().unique_consecutive()  # PNDM takes its second step twice
    alphas = schedule.alphas[times]
    final = torch.ones(1) if made.config.get("set_alpha_to_one", True) else schedule.alphas[:1]
    levels = torch.cat([alphas, final])
    return Grid(times, levels, (1 - levels.square()).clamp(min=0).sqrt(), times, schedule.prediction_type)


def dynamic_shift(config: Any, latent_shape: tuple[int, ...]) -> float:
    """mu of a flow scheduler whose shift depends on the number of 2 x 2 patches (FLUX, Qwen-Image)."""
    tokens = latent_shape[-1] * latent_shape[-2] / 4
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    first, last = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(first + (last - first) * (tokens - low) / (high - low))


def next_mean(grid: Grid, steps: Tensor, x: Tensor, output: Tensor, deviation: Tensor) -> Tensor:
    """The mean of the next latents, (N, ...).

    Args:
        grid: levels.
        steps: number of each sample's step, int64 (N,).
        x: noisy latents (N, ...).
        output: the network's native prediction there, float32.
        deviation: sd of each sample's step, (N,).
    """
    here, there = steps.to("cpu"), steps.to("cpu") + 1
    alpha, sigma = grid.alphas[here].to(x.device), grid.sigmas[here].to(x.device)
    alpha_next, sigma_next = grid.alphas[there].to(x.device), grid.sigmas[there].to(x.device)
    x0 = convert(output, x, alpha, sigma, grid.prediction_type, "sample")
    noise = convert(output, x, alpha, sigma, grid.prediction_type, "epsilon")
    if grid.kernel in ("flow_sde", "constant_sde"):
        moved = x + append_dims(sigma_next - sigma, x) * (noise - x0)
        return moved - append_dims(deviation.square() / (2 * sigma), x) * noise
    kept = (sigma_next.square() - deviation.square()).clamp(min=0).sqrt()
    return append_dims(alpha_next, x) * x0 + append_dims(kept, x) * noise


def log_density(x_next: Tensor, mean: Tensor, deviation: Tensor, kernel: Kernel = "ddim") -> Tensor:
    """Gaussian log-density of next latents, the mean over their elements, float32 (N,); of "cps" minus the squared distance.

    Args:
        x_next: (N, ...).
        mean: (N, ...), gradient flows.
        deviation: > 0, (N,).
    """
    missed = (x_next.float() - mean.float()).square().flatten(1).mean(1)
    if kernel == "cps":
        return -missed
    return -missed / (2 * deviation.square()) - deviation.log() - 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Trajectory:
    """Sampled latents and how they came about.

    Attributes:
        latents: levels 0 (noise) to S (clean), each (N, ...).
        outputs: the network's predictions at each step.
    """

    latents: list[Tensor]
    outputs: list[Tensor]

    @property
    def clean(self) -> Tensor:
        return self.latents[-1]


@torch.no_grad()
def sample(
    predict: Predict,
    grid: Grid,
    noise: Tensor,
    eta: float,
    draw: Callable[[int], Tensor] | None = None,
    *,
    keep: bool = True,
    outputs: bool = True,
    stochastic: Callable[[int], Tensor] | None = None,
) -> Trajectory:
    """Sample N latents.

    Args:
        predict: the network with its conditioning (and guidance).
        grid: levels.
        noise: standard normal, (N, ...), float32.
        eta: 0 deterministic, 1 fully stochastic.
        draw: standard normal noise of a step, (N, ...), where eta > 0.
        keep: False keeps the clean latents alone.
        outputs: False forgets the predictions.
        stochastic: bool (N,) of a step: which samples take it with noise; None: all.
    """
    x = noise  # samplers start from unit variance, whatever little signal the noisiest level still has
    latents, predicted = [x], []
    for number in range(len(grid)):
        output = predict(x, grid.times[number].to(x.device).expand(len(x))).float()
        deviation = torch.full((len(x),), grid.deviation(number, eta), device=x.device)
        if stochastic is not None:
            deviation = deviation * stochastic(number).to(deviation)
        x = next_mean(grid, torch.full((len(x),), number), x, output, deviation)
        if (deviation > 0).any():
            assert draw is not None, "a stochastic sampler needs noise"
            x = x + append_dims(deviation, x) * draw(number).to(x)
        if keep:
            latents.append(x)
        if keep and outputs:
            predicted.append(output)
    return Trajectory(latents if keep else [x], predicted)
