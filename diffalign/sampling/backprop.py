"""Images that are sampled with gradient: prompts -> a walk through the sampler -> differentiable rewards.

Nothing is stored and nothing is used twice: a micro-batch is a list of prompts with their noise, and sampling happens in
the objective's walk (`diffalign.losses.diffusion.walks`) when its loss is asked for. Prompts, noise and order are
functions of (seed, prompt, visit), the walk's choices of (seed, optimiser step).

Memory: a trained step keeps its latents alone and is computed again in the backward pass (`rollout.checkpoint_steps`), and
decoder and reward are differentiated picture by picture: since a reward is a function of one image, its gradient to the
latents is all that the sampler needs, and the decoder's graph is gone before the sampler's backward begins.

Every forward calls the network unwrapped: checkpoints call it again during the backward pass, which a wrapper for several
processes does not expect. The trainer averages the gradients itself (`Job.own_gradients`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign import rewards
from diffalign.config import RunConfig
from diffalign.data.batch import Batch
from diffalign.data.loader import BatchPlan
from diffalign.families import DECODER, DenoisingFamily
from diffalign.losses import Items, Layout, Scores
from diffalign.losses.diffusion.walks import PROMPT, Backprop, Chain, End, Level
from diffalign.policy import Policy, guided, recomputed, without_dropout
from diffalign.prediction import append_dims, convert
from diffalign.sampling.batches import Conditions
from diffalign.sampling.rules import noise_level, reward_sign, reward_weights
from diffalign.sampling.trajectories import Grid, make_grid, next_mean
from diffalign.schedules import generator_for


@dataclass(frozen=True, kw_only=True)
class PromptBatch(Batch):
    """B prompts to be sampled.

    Attributes:
        ids: of the samples.
        visits: how often each has come before.
        prompts: texts.
        step: number of the optimiser step.
        start: standard normal latents (B, C, ..., h, w).
        conditioning, negative: with and without the prompt, batch B.
    """

    ids: tuple[str, ...]
    visits: tuple[int, ...]
    prompts: tuple[str, ...]
    step: int
    start: Tensor
    conditioning: dict[str, Tensor]
    negative: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def weight(self) -> float:
        return 1.0


class RewardPaths:
    """Samples with gradient and scores; this process's share of every optimiser step.

    Args:
        config: of the run.
        family: predicts and decodes.
        policy: the network; its forwards are counted there.
        accelerator: processes.
        prompts: texts.
        conditions: conditioning of samples.
        latent_shape: of one sample.
    """

    def __init__(
        self,
        config: RunConfig,
        family: DenoisingFamily,
        policy: Policy,
        accelerator: Accelerator,
        *,
        prompts: Sequence[str],
        conditions: Conditions,
        latent_shape: tuple[int, ...],
    ) -> None:
        self.config, self.rollout, self.family, self.policy = config, config.rollout, family, policy
        self.accelerator, self.prompts, self.conditions = accelerator, prompts, conditions
        self.latent_shape = latent_shape
        objective = config.objective
        assert isinstance(objective, Backprop), "other objectives have other sources"
        self.objective: Backprop = objective
        self.models = [rewards.load(name, device=accelerator.device) for name in self.rollout.rewards]
        self.weights = reward_weights(config)
        self.sign = reward_sign(config)
        self.eta = noise_level(config)
        steps = self.rollout.num_inference_steps
        self.grid = make_grid(family, family.stock_scheduler(), steps, latent_shape, self.rollout.kernel)
        again = self.rollout.checkpoint_steps
        self.checkpointed = objective.trained_steps(steps) > 1 if again is None else again
        assert config.training.train_batch_size != "auto", "the preflight has refused it"
        self.batch_size = config.training.train_batch_size
        self.plan = BatchPlan(range(len(prompts)), [(0, 0)] * len(prompts), self.batch_size, config.seed)

    @property
    def per_step(self) -> int:
        """Micro-batches of an optimiser step, over all processes."""
        return self.config.training.gradient_accumulation_steps * self.accelerator.num_processes

    def passes(self) -> float:
        """How often a run samples all of its prompts."""
        return self.config.training.max_train_steps * self.per_step * self.batch_size / len(self.prompts)

    def micro_batches(self, first_step: int) -> Iterator[PromptBatch]:
        """This process's micro-batches from an optimiser step on."""
        for step in range(first_step, self.config.training.max_train_steps):
            first = step * self.per_step + self.accelerator.process_index
            for number in range(first, (step + 1) * self.per_step, self.accelerator.num_processes):
                yield self._batch(self.plan.micro_batch(number), step).to(self.accelerator.device)

    def _batch(self, chosen: Sequence[tuple[int, int]], step: int) -> PromptBatch:
        ids, visits = tuple(f"walk {index}" for index, _ in chosen), tuple(visit for _, visit in chosen)
        return PromptBatch(
            ids=ids,
            visits=visits,
            prompts=tuple(self.prompts[index] for index, _ in chosen),
            step=step,
            start=self.noise(ids, visits, "start"),
            conditioning=self.conditions.of([index for index, _ in chosen]),
            negative=self.conditions.without(len(chosen)),
        )

    def noise(self, ids: Sequence[str], visits: Sequence[int], name: str) -> Tensor:
        """Standard normal noise of samples under a name, (B, C, ..., h, w), on the CPU."""
        seed = self.config.seed
        return torch.stack(
            [
                torch.randn(self.latent_shape, generator=generator_for(seed, f"{one} {name}", visit))
                for one, visit in zip(ids, visits, strict=True)
            ]
        )

    def scores(self, batch: PromptBatch) -> tuple[Scores, Layout]:
        """Rewards of the images that the objective's walk samples, with gradient to the adapter; every end is an item."""
        chain = SamplerChain(self, batch)
        self.family.load(DECODER)
        found = [self._reward(end, batch.prompts) for end in self.objective.walk(chain)]
        reward = torch.cat([total for total, _ in found])
        index = torch.arange(len(reward), device=reward.device)
        parts = torch.cat([each for _, each in found])
        names = [f"reward/{name}" for name in self.rollout.rewards] if len(self.models) > 1 else []
        scores = Scores.rewards(reward, extra={name: parts[:, i] for i, name in enumerate(names)})
        return scores, Layout(items=Items(index=index, label=torch.ones_like(reward)))

    def _reward(self, end: End, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The weighted sum of rewards of an end with gradient, (B,), and each without, (B, R)."""

        def score(images: Tensor, start: int) -> tuple[Tensor, Tensor]:
            each = torch.zeros(len(images), len(self.models), device=images.device)
            for weight, template in end.captions:
                texts = [template.replace(PROMPT, prompt) for prompt in prompts[start : start + len(images)]]
                given = [rewards.score(model, images, texts).to(images.device) for model in self.models]
                each = each + weight * torch.stack(given, 1)
            return self.sign * (each @ self.weights.to(each)), each.detach()

        return through_decoder(self.family.decode_latents, score, end.latents, self.rollout.decode_batch_size)

    # -- what a checkpoint stores: nothing, a step makes all it needs ------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return


def through_decoder(
    decode: Callable[[Tensor], Tensor],
    score: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    latents: Tensor,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Scores of decoded latents, whose gradient to the latents is computed at once.

    Exact for scores that depend on one image each: what goes on is score + <gradient, latents>, which has the same value and
    the same derivative. Of scores that compare the images of a part (`mmd`) the *sum* over the part has. No graph of decoder
    or reward outlives the call, and `size` images have one at a time.

    Args:
        decode: latents (n, ...) to images.
        score: images, and the place of the first of them, to scores (n,) and whatever else is told of them (n, K).
        latents: (N, ...), gradient flows.
        size: images at a time.

    Returns:
        Scores (N,) with gradient to the latents, and (N, K) without.
    """
    totals, told = [], []
    for start in range(0, len(latents), size):
        part = latents[start : start + size]
        leaf = part.detach().requires_grad_()
        with torch.enable_grad():
            total, each = score(decode(leaf), start)
            (slope,) = torch.autograd.grad(total.sum(), leaf)
        totals.append(total.detach() + (slope * (part - part.detach())).flatten(1).sum(1))
        told.append(each)
    return torch.cat(totals), torch.cat(told)


class SamplerChain(Chain):
    """The sampler of a micro-batch, as walks see it.

    Args:
        paths: network, grid and settings.
        batch: prompts and noise.
    """

    def __init__(self, paths: RewardPaths, batch: PromptBatch) -> None:
        self.paths, self.batch, self.start = paths, batch, batch.start
        self.grid: Grid = paths.grid
        self.generator = generator_for(paths.config.seed, "walk", batch.step)

    def __len__(self) -> int:
        return len(self.grid)

    def level(self, step: int) -> Level:
        time = float(self.grid.times[step]) if step < len(self.grid) else math.nan
        return Level(time, float(self.grid.alphas[step]), float(self.grid.sigmas[step]))

    def at(self, share: float) -> Level:
        schedule = self.paths.family.schedule
        t = torch.tensor(round(share * (schedule.num_timesteps - 1)))
        return Level(float(schedule.times[t]), float(schedule.alphas[t]), float(schedule.sigmas[t]))

    def predict(self, x: Tensor, level: Level, *, gradient: bool) -> Tensor:
        policy, scale = self.paths.policy, self.paths.rollout.guidance_scale
        batch, objective = self.batch, self.paths.objective
        times = torch.full((len(x),), level.time, device=x.device)
        if self.grid.times.dtype == torch.int64:
            times = times.long()

        def call(x: Tensor) -> Tensor:
            return guided(
                policy,
                policy.bare,
                x,
                times,
                batch.conditioning,
                batch.negative,
                scale,
                detach_negative=not objective.negative_gradient,
            )

        if not gradient:
            with torch.no_grad(), without_dropout(policy.bare):
                return call(x.detach())
        if not self.paths.checkpointed:
            return call(x)
        return recomputed(policy, lambda: call(x))

    def advance(self, x: Tensor, output: Tensor, step: int) -> Tensor:
        deviation = torch.full((len(x),), self.grid.deviation(step, self.paths.eta), device=x.device)
        x = next_mean(self.grid, torch.full((len(x),), step), x, output, deviation)
        if self.paths.eta and float(deviation[0]) > 0:
            x = x + append_dims(deviation, x) * self.noise(f"step {step}")
        return x

    def move(self, x: Tensor, output: Tensor, level: Level, to: Level) -> Tensor:
        return to.alpha * self._converted(x, output, level, "sample") + to.sigma * self._converted(
            x, output, level, "epsilon"
        )

    def clean(self, x: Tensor, output: Tensor, level: Level) -> Tensor:
        return self._converted(x, output, level, "sample")

    def _converted(self, x: Tensor, output: Tensor, level: Level, to: Any) -> Tensor:
        alpha, sigma = (torch.full((len(x),), value, device=x.device) for value in (level.alpha, level.sigma))
        return convert(output, x, alpha, sigma, self.grid.prediction_type, to)

    def noised(self, x0: Tensor, level: Level, noise: Tensor) -> Tensor:
        return level.alpha * x0 + level.sigma * noise

    def noise(self, name: str) -> Tensor:
        return self.paths.noise(self.batch.ids, self.batch.visits, name).to(self.start.device)
