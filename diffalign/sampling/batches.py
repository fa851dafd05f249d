"""From the entries of a round to micro-batches: conditioning, timesteps and noise are joined to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from diffalign.config import RunConfig
from diffalign.data.batch import PairBatch, PairExample, RowBatch, Rows, collate
from diffalign.data.loader import PairMicroBatches, draw
from diffalign.families import Conditioning, DenoisingFamily
from diffalign.losses import Groups, Items, Layout, Objective, Pairs
from diffalign.sampling.entries import (
    Entry,
    SampledLoser,
    SampledPair,
    SampledRows,
    StepBatch,
    StepRows,
    TrajectoryBatch,
    TrajectoryRows,
    Transition,
    Truncated,
)
from diffalign.sampling.rules import noise_of, reward_weights
from diffalign.sampling.trajectories import Grid
from diffalign.schedules import generator_for

AnyBatch: TypeAlias = PairBatch | RowBatch | StepBatch | TrajectoryBatch


class Conditions:
    """Conditioning of samples, on the CPU, with a batch axis.

    Args:
        text: conditioning of a prompt by its number, without a batch axis.
        negative: conditioning without a prompt, batch 1.
        image: per-image conditioning of samples (SDXL's time ids), without a batch axis.
    """

    def __init__(self, text: Callable[[int], Conditioning], negative: Conditioning, image: Conditioning) -> None:
        self.text, self.negative, self.image = text, negative, image

    def of(self, prompts: Sequence[int]) -> Conditioning:
        """Of prompts by number."""
        return self.of_texts([self.text(index) for index in prompts])

    def of_texts(self, texts: Sequence[Conditioning]) -> Conditioning:
        """Of texts that are encoded already, each without a batch axis."""
        text = {name: torch.stack([one[name] for one in texts]) for name in texts[0]}
        return text | {name: value.expand(len(texts), *value.shape) for name, value in self.image.items()}

    def without(self, count: int) -> Conditioning:
        """Of `count` samples without a prompt."""
        one = self.negative | {name: value[None] for name, value in self.image.items()}
        return {name: value.expand(count, *value.shape[1:]) for name, value in one.items()}


class Batches:
    """Makes micro-batches of entries, on the CPU.

    Args:
        config: of the run.
        family: for its schedule.
        grid: of the sampler.
        conditions: conditioning of samples.
        latent_shape: of one sample.
        winners: data whose chosen images are trained on, for objectives that compare them with samples.
        kept: indices of `winners` that may be trained on.
    """

    def __init__(
        self,
        config: RunConfig,
        family: DenoisingFamily,
        grid: Grid,
        *,
        conditions: Conditions,
        latent_shape: tuple[int, ...],
        winners: PairMicroBatches | None,
        kept: Sequence[int],
    ) -> None:
        self.config, self.family, self.grid = config, family, grid
        self.conditions, self.latent_shape = conditions, latent_shape
        self.winners, self.kept = winners, list(kept)
        self.objective: Objective = config.objective
        self.independent = noise_of(config) == "independent"
        self.weights = reward_weights(config)

    def winner(self, place: int, visit: int) -> PairExample:
        assert self.winners is not None, "objectives of these sources have data"
        return self.winners.example(self.kept[place], visit)

    def make(self, entries: Sequence[Entry], number: int, iteration: int) -> AnyBatch:
        """Entries with conditioning, timesteps and noise, on the CPU; every pass over a round draws its own noise."""
        first = entries[0]
        if isinstance(first, Transition):
            return self._step_batch([e for e in entries if isinstance(e, Transition)])
        if isinstance(first, StepRows):
            return self._group_steps([e for e in entries if isinstance(e, StepRows)])
        if isinstance(first, TrajectoryRows):
            return self._trajectories([e for e in entries if isinstance(e, TrajectoryRows)])
        if isinstance(first, Truncated):
            return self._walks([e for e in entries if isinstance(e, Truncated)], number, iteration)
        if isinstance(first, SampledRows):
            return self._row_batch([e for e in entries if isinstance(e, SampledRows)], number, iteration)
        examples = []
        for entry in entries:
            if isinstance(entry, SampledPair):
                examples.append(self._pair_example(entry, number, iteration))
            elif isinstance(entry, SampledLoser):
                examples.append(self._against_winner(entry, number, iteration))
        return collate(examples)

    def _draw(self, name: str, number: int, iteration: int) -> tuple[int, Tensor]:
        """Timestep and noise of a row in a pass over the round."""
        schedule = self.family.schedule
        again = f" again {iteration}" if iteration else ""
        generator = generator_for(self.config.seed, f"{name}{again} noise", number)
        of_sampler = (self.config.denoising.timestep_sampling or self.objective.sampling.timesteps) == "sampler"
        sampling = None if of_sampler else self.config.denoising.timestep_sampling
        denoising = replace(self.config.denoising, proportion_empty_prompts=0.0, timestep_sampling=sampling)
        t, noise, _ = draw(
            denoising, generator, self.latent_shape, schedule.num_timesteps, self.family.timestep_sampling
        )
        if of_sampler:  # every level but the last, once before any comes again
            count = max(1, len(self.grid) - 1)
            order = torch.randperm(count, generator=generator_for(self.config.seed, f"{name} levels", number))
            t = int(self.grid.timesteps[order[iteration % count]])
        return t, noise

    def _pair_noise(self, name: str, number: int, iteration: int) -> dict[str, Any]:
        """Timestep and noise of a pair, or of both of its images."""
        t, noise = self._draw(name, number, iteration)
        if not self.independent:
            return {"t": t, "noise": noise}
        rejected_t, rejected_noise = self._draw(f"{name} rejected", number, iteration)
        return {"t": t, "noise": noise, "rejected_t": rejected_t, "rejected_noise": rejected_noise}

    def _pair_example(self, entry: SampledPair, number: int, iteration: int) -> PairExample:
        return PairExample(
            id=f"{entry.id}/{number}",
            chosen=entry.latents[0],
            rejected=entry.latents[1],
            text=self.conditions.text(entry.prompt),
            chosen_image=dict(self.conditions.image),
            rejected_image=dict(self.conditions.image),
            p=entry.p,
            weight=entry.weight,
            chosen_reward=entry.rewards[0],
            rejected_reward=entry.rewards[1],
            **self._pair_noise(entry.id, number, iteration),
        )

    def _against_winner(self, entry: SampledLoser, number: int, iteration: int) -> PairExample:
        """The chosen image of a data pair against a sample; on a first pass with the noise that the data give it."""
        example = replace(
            self.winner(entry.place, entry.visit),
            rejected=entry.latents,
            rejected_image=dict(self.conditions.image),
            rejected_text=None,
            p=1.0,
        )
        if entry.step is None:
            return replace(example, **self._pair_noise(entry.id, number, iteration)) if iteration else example
        _, fresh = self._draw(entry.id, number, iteration)
        return replace(
            example,
            id=f"{example.id}/{entry.id.rpartition(' ')[2]}",
            t=int(self.grid.timesteps[entry.step]),
            noise=fresh,
            rejected_x_t=entry.x_t,
            rejected_target=entry.target,
        )

    def _walks(self, entries: list[Truncated], number: int, iteration: int) -> RowBatch:
        """Points of walks, noised further: to a timestep that is drawn from those with more noise."""
        schedule, times, noises, texts = self.family.schedule, [], [], []
        for entry in entries:
            here = int(self.grid.timesteps[entry.step])
            again = f" again {iteration}" if iteration else ""
            generator = generator_for(self.config.seed, f"{entry.id}{again} noise", number)
            t = int(torch.randint(here + 1, schedule.num_timesteps, (), generator=generator))
            fresh = torch.randn(entry.x_t.shape, generator=generator)
            (alpha, sigma), (a, s) = schedule.alpha_sigma(torch.tensor([t])), self._level(entry.step)
            x = alpha / a * entry.x_t + (sigma.square() - (s * alpha / a).square()).clamp(min=0).sqrt() * fresh
            times.append(t)
            noises.append((x - alpha * entry.goal) / sigma)  # with the goal as the clean image, x is what is noised
            own = self.objective.from_data
            texts.append(self.winner(entry.prompt, entry.visit).text if own else self.conditions.text(entry.prompt))
        index, ones = torch.arange(len(entries)), torch.ones(len(entries))
        content = Rows(
            x0=torch.stack([entry.goal for entry in entries]),
            noise=torch.stack(noises),
            t=torch.tensor(times),
            conditioning=self.conditions.of_texts(texts),
        )
        layout = Layout(items=Items(index=index, label=ones))
        return RowBatch(ids=tuple(entry.id for entry in entries), content=content, layout=layout)

    def _level(self, step: int) -> tuple[Tensor, Tensor]:
        """alpha and sigma of a step of the sampler."""
        return self.grid.alphas[step], self.grid.sigmas[step]

    def _row_batch(self, entries: list[SampledRows], number: int, iteration: int) -> RowBatch:
        """Rows of several prompts; their groups are numbered."""
        ids = tuple(f"{e.id}/{k}" for e in entries for k in e.numbers)
        groups = "groups" in self.objective.needs.layout
        shared = groups and not self.independent  # all of a group at one timestep and noise
        drawn = [self._draw(f"{name.rpartition('/')[0]}/0" if shared else name, number, iteration) for name in ids]
        content = Rows(
            x0=torch.cat([e.latents for e in entries]),
            noise=torch.stack([noise for _, noise in drawn]),
            t=torch.tensor([t for t, _ in drawn]),
            conditioning=self.conditions.of([e.prompt for e in entries for _ in e.numbers]),
            negative=self.conditions.without(len(ids)) if self.config.reference.guidance_scale != 1 else None,
        )
        index = torch.arange(len(ids))
        if groups:
            sizes = torch.tensor([len(e.numbers) for e in entries])
            group = torch.arange(len(entries)).repeat_interleave(sizes)
            reward = torch.cat([e.rewards for e in entries]) * self.weights
            parts = [e.advantage for e in entries if e.advantage is not None]
            advantage = torch.cat(parts) if parts else None
            layout = Layout(groups=Groups(index=index, group=group, reward=reward, advantage=advantage))
        else:
            label, reward = torch.cat([e.label for e in entries]), torch.cat([e.reward for e in entries])
            layout = Layout(items=Items(index=index, label=label, target=reward))
        return RowBatch(ids=ids, content=content, layout=layout)

    def _step_batch(self, entries: list[Transition]) -> StepBatch:
        """Pairs of transitions, chosen rows first."""
        pairs = Pairs.halves(
            len(entries),
            p=torch.tensor([e.p for e in entries]),
            weight=torch.tensor([e.weight for e in entries]),
            reward_w=torch.stack([e.rewards[0] for e in entries]),
            reward_l=torch.stack([e.rewards[1] for e in entries]),
        )
        rows = [*entries, *entries]
        steps = torch.tensor([e.step for e in rows])
        return StepBatch(
            ids=tuple(e.id for e in entries),
            x=torch.cat([torch.stack([e.x[side] for e in entries]) for side in (0, 1)]),
            x_next=torch.cat([torch.stack([e.x_next[side] for e in entries]) for side in (0, 1)]),
            step=steps,
            t=self.grid.timesteps[steps],
            conditioning=self.conditions.of([e.prompt for e in rows]),
            negative={name: v.clone() for name, v in self.conditions.without(len(rows)).items()},
            layout=Layout(pairs=pairs),
        )

    def _group_steps(self, entries: list[StepRows]) -> StepBatch:
        """Transitions of groups."""
        sizes = torch.tensor([len(e.old) for e in entries])
        steps = torch.tensor([e.step for e in entries]).repeat_interleave(sizes)
        parts = [e.advantage for e in entries if e.advantage is not None]
        count = int(sizes.sum())
        groups = Groups(
            index=torch.arange(count),
            group=torch.arange(len(entries)).repeat_interleave(sizes),
            reward=torch.cat([e.rewards for e in entries]) * self.weights,
            advantage=torch.cat(parts) if parts else None,
        )
        return StepBatch(
            ids=tuple(f"{e.id}/{k}" for e in entries for k in range(len(e.old))),
            x=torch.cat([e.x for e in entries]),
            x_next=torch.cat([e.x_next for e in entries]),
            step=steps,
            t=self.grid.timesteps[steps],
            conditioning=self.conditions.of([e.prompt for e in entries for _ in e.old]),
            negative={name: v.clone() for name, v in self.conditions.without(count).items()},
            layout=Layout(groups=groups),
            old=torch.cat([e.old for e in entries]),
            mean=None if entries[0].mean is None else torch.cat([e.mean for e in entries if e.mean is not None]),
        )

    def _trajectories(self, entries: list[TrajectoryRows]) -> TrajectoryBatch:
        """Whole trajectories of several prompts; their groups are numbered."""
        sizes = torch.tensor([len(e.old) for e in entries])
        count = int(sizes.sum())
        groups = Groups(
            index=torch.arange(count),
            group=torch.arange(len(entries)).repeat_interleave(sizes),
            reward=torch.cat([e.rewards for e in entries]) * self.weights,
        )
        return TrajectoryBatch(
            ids=tuple(f"{e.id}/{k}" for e in entries for k in range(len(e.old))),
            latents=torch.cat([e.latents for e in entries]),
            steps=torch.tensor(entries[0].steps),
            old=torch.cat([e.old for e in entries]),
            conditioning=self.conditions.of([e.prompt for e in entries for _ in e.old]),
            negative={name: v.clone() for name, v in self.conditions.without(count).items()},
            layout=Layout(groups=groups),
        )
