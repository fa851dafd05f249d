"""Training on images that are sampled on the way: by the policy, by its reference, or along stored trajectories.

    prompts -> K images each -> rewards -> pairs, groups or chosen images -> inner micro-batches

A *round* serves `steps_per_generation` optimiser steps, `num_iterations` times over. Prompts and noise of a round are
functions of (seed, prompt, round); images also depend on the weights, so a round is made when its first micro-batch is asked
for. Sampled latents are used as they are: nothing is decoded and encoded again.

What a round holds follows from the objective's `source` and layout:

| source | rows |
| --- | --- |
| data (pairs, groups, items) | sampled images of the prompts: best against worst, all of a group, or the chosen one |
| generated | chosen images of the data against images that the reference samples of the same prompts |
| on_policy | chosen images of the data against points of the policy's own trajectories, with its predictions as targets |
| trajectories | stored transitions of the best and the worst of K trajectories |
| candidates | at every step the best and the worst of K next latents from the same latent |
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign import rewards
from diffalign.config import RunConfig
from diffalign.data.batch import Batch, PairBatch, PairExample, RowBatch, Rows, collate, mapped
from diffalign.data.loader import BatchPlan, PairMicroBatches, draw
from diffalign.errors import ConfigError
from diffalign.families import DECODER, Conditioning, DenoisingFamily
from diffalign.losses import Groups, Items, Kind, Layout, Lists, Objective, Pairs, Scores
from diffalign.losses.diffusion.capo import calibrated_rewards, frontiers
from diffalign.policy import Policy
from diffalign.prediction import append_dims, convert
from diffalign.rounds import plain, rebuilt
from diffalign.sampling import sampling_mode
from diffalign.sampling.trajectories import Grid, Trajectory, log_density, make_grid, next_mean, sample
from diffalign.schedules import generator_for

log = logging.getLogger(__name__)
TRANSITIONS = ("trajectories", "candidates")  # sources of transitions


@dataclass(frozen=True, kw_only=True)
class StepBatch(Batch):
    """P pairs of transitions: 2P rows, chosen first.

    Attributes:
        ids: of the pairs.
        x, x_next: noisy latents before and after the step, (2P, C, ..., h, w).
        step: number of the step in the sampler's grid, int64 (2P,).
        t: the nearest timesteps, int64 (2P,), for metrics.
        conditioning, negative: with and without the prompt, batch 2P.
        layout: the pairs.
    """

    ids: tuple[str, ...]
    x: Tensor
    x_next: Tensor
    step: Tensor
    t: Tensor
    conditioning: dict[str, Tensor]
    negative: dict[str, Tensor]
    layout: Layout

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def weight(self) -> Tensor | float:
        return self.layout.need_pairs().weight


AnyBatch: TypeAlias = PairBatch | RowBatch | StepBatch
_CLASSES: dict[str, Any] = {
    c.__name__: c for c in (PairBatch, RowBatch, StepBatch, Rows, Layout, Pairs, Items, Groups, Lists)
}


def samples_images(config: RunConfig) -> bool:
    """Whether an image run trains on images that it samples."""
    objective: Objective = config.objective
    return objective.source != "data" or bool(config.rollout.rewards)


def noise_of(config: RunConfig) -> str:
    """Whether the images of a pair or group share their timestep and noise."""
    return config.denoising.noise or str(config.objective.noise)


def kind_of(objective: Objective) -> Kind:
    """The kind of score that an image run gives an objective."""
    return Kind.STEP if objective.source in TRANSITIONS else Kind.BOUND


@dataclass(frozen=True)
class Sampled:
    """K images of a prompt.

    Attributes:
        prompt: its number.
        id: a text that no other prompt of the round has.
        trajectory: latents (K, ...) at every level.
        reward: weighted sum, (K,).
        rewards: one column per reward model, (K, R).
    """

    prompt: int
    id: str
    trajectory: Trajectory
    reward: Tensor
    rewards: Tensor


@dataclass(frozen=True, kw_only=True)
class Transition:
    """One step of two trajectories, the better one first.

    Attributes:
        id: of the pair.
        prompt: its number.
        step: number of the step in the grid.
        x, x_next: latents before and after it, (2, ...).
        rewards: (2, R).
        p, weight: of the pair.
    """

    id: str
    prompt: int
    step: int
    x: Tensor
    x_next: Tensor
    rewards: Tensor
    p: float = 1.0
    weight: float = 1.0


class ImageRollouts:
    """Samples, scores and cuts into micro-batches; this process's share of every round.

    Args:
        config: of the run.
        family: samples and decodes.
        policy: the network and its reference.
        accelerator: processes.
        prompts: texts.
        encoded: conditioning of each prompt, batch 1.
        negative: conditioning without a prompt, batch 1.
        latent_shape: of one sample.
        image: per-image conditioning of samples (SDXL's time ids), without a batch axis.
        winners: data whose chosen images are trained on, for objectives that compare them with samples.
        kept: indices of `winners` that may be trained on.
    """

    def __init__(
        self,
        config: RunConfig,
        family: DenoisingFamily,
        policy: Policy,
        accelerator: Accelerator,
        *,
        prompts: Sequence[str],
        encoded: Sequence[Conditioning],
        negative: Conditioning,
        latent_shape: tuple[int, ...],
        image: Conditioning,
        winners: PairMicroBatches | None = None,
        kept: Sequence[int] = (),
    ) -> None:
        self.config, self.rollout, self.family, self.policy = config, config.rollout, family, policy
        self.accelerator, self.prompts, self.encoded, self.negative = accelerator, prompts, encoded, negative
        self.latent_shape, self.image, self.winners, self.kept = latent_shape, image, winners, list(kept)
        self.objective: Objective = config.objective
        self.models = [rewards.load(name, device=accelerator.device) for name in self.rollout.rewards]
        self.weights = self.rollout.reward_weights or (1.0,) * len(self.models)
        self.independent = noise_of(config) == "independent"
        source = self.objective.source
        self.eta = self.rollout.eta if self.rollout.eta is not None else float(source in TRANSITIONS)
        self.grid = self._grid()
        self.share = samples_per_process(config, self.grid, self.eta)
        count = self.share * accelerator.num_processes
        total = len(self.kept) if self.from_data else len(prompts)
        self.plan = BatchPlan(range(total), [(0, 0)] * total, count, config.seed)
        self._round: tuple[int, list[list[AnyBatch]]] | None = None

    @property
    def from_data(self) -> bool:
        """Whether winners come from the data."""
        return self.objective.source in ("generated", "on_policy")

    @property
    def steps_per_round(self) -> int:
        return self.rollout.steps_per_generation * self.rollout.num_iterations

    def passes(self) -> float:
        """How often a run samples all of its prompts."""
        rounds = math.ceil(self.config.training.max_train_steps / self.steps_per_round)
        return rounds * self.plan.batch_size / max(1, len(self.kept) if self.from_data else len(self.prompts))

    def micro_batches(self, first_step: int) -> Iterator[AnyBatch]:
        """This process's micro-batches from an optimiser step on."""
        for step in range(first_step, self.config.training.max_train_steps):
            number, place = divmod(step, self.steps_per_round)
            if self._round is None or self._round[0] != number:
                self._round = (number, self._make(number))
            iteration, place = divmod(place, self.rollout.steps_per_generation)
            for batch in self._round[1][place]:
                yield self._again(batch, number, iteration).to(self.accelerator.device)

    # -- sampling ----------------------------------------------------------------------------------------------------

    def _grid(self) -> Grid:
        return make_grid(
            self.family, self.family.stock_scheduler(), self.rollout.num_inference_steps, self.latent_shape
        )

    @contextmanager
    def _sampler(self) -> Iterator[None]:
        """The network of whoever samples, without dropout."""
        who = self.rollout.policy or ("reference" if self.objective.source == "generated" else "policy")
        context: AbstractContextManager[None] = nullcontext()
        if who == "reference" and self.policy.reference is not None:
            context = self.policy.reference.active(self.policy.reference.parts()[0][1])
        with torch.no_grad(), sampling_mode(self.policy.bare, adapters=True), context:
            yield

    def predict(self, conditioning: Conditioning) -> Callable[[Tensor, Tensor], Tensor]:
        """The network's native prediction for N samples, guided if the rollout is."""
        device, scale = self.accelerator.device, self.rollout.guidance_scale
        here = {name: value.to(device) for name, value in conditioning.items()}
        count = len(next(iter(here.values())))
        empty = {name: value.to(device).expand(count, *value.shape[1:]) for name, value in self._without().items()}

        def call(x: Tensor, times: Tensor) -> Tensor:
            return guided(self.policy, self.policy.bare, x, times, here, empty, scale)

        return call

    def _without(self) -> Conditioning:
        return self.negative | {name: value[None] for name, value in self.image.items()}

    def conditioning(self, prompts: Sequence[int]) -> Conditioning:
        """Text and image conditioning of prompts by number, on the CPU, with a batch axis."""
        text = {name: torch.cat([self.encoded[i][name] for i in prompts]) for name in self.encoded[0]}
        return text | self._images(len(prompts))

    def _images(self, count: int) -> Conditioning:
        return {name: value.expand(count, *value.shape) for name, value in self.image.items()}

    def _noise(self, name: str, number: int) -> Tensor:
        return torch.randn(self.latent_shape, generator=generator_for(self.config.seed, name, number))

    def sample(
        self,
        chosen: Sequence[int],
        names: Sequence[str],
        count: int,
        number: int,
        texts: Sequence[Conditioning] | None = None,
    ) -> list[Sampled]:
        """`count` images of each prompt, in batches of the sampler's size.

        Args:
            chosen: prompts by number.
            names: a text per prompt that seeds its noise.
            count: images per prompt.
            number: of the round.
            texts: conditioning of each, without a batch axis; None: that of the prompts.
        """
        size = max(1, self.config.sampling.batch_size // count)
        found: list[Sampled] = []
        texts = [self._text(i) for i in chosen] if texts is None else texts
        with self._sampler():
            for start in range(0, len(chosen), size):
                part = slice(start, start + size)
                found += self._sample(chosen[part], names[part], count, number, texts[part])
        return found

    def _sample(
        self, chosen: Sequence[int], names: Sequence[str], count: int, number: int, texts: Sequence[Conditioning]
    ) -> list[Sampled]:
        device = self.accelerator.device
        rows = [(i, k) for i in range(len(chosen)) for k in range(count)]
        shared = self.objective.shared_start if self.rollout.shared_start is None else self.rollout.shared_start
        shared = shared and self.objective.source == "trajectories"
        noise = torch.stack([self._noise(f"{names[i]}/{0 if shared else k}", number) for i, k in rows]).to(device)
        text = {name: torch.stack([texts[i][name] for i, _ in rows]) for name in texts[0]}
        predict = self.predict(text | self._images(len(rows)))

        def steps(step: int) -> Tensor:
            return torch.stack([self._noise(f"{names[i]}/{k}/{step}", number) for i, k in rows])

        keep = self.objective.source in ("trajectories", "on_policy")
        made = sample(predict, self.grid, noise, self.eta, steps, keep=keep)
        given = self._reward(made.clean, [self.prompts[chosen[i]] for i, _ in rows])
        total = given @ torch.tensor(self.weights) if self.models else given.new_zeros(len(rows))
        return [
            Sampled(
                prompt=index,
                id=names[i],
                trajectory=mapped(_cut(made, slice(i * count, (i + 1) * count)), lambda x: x.cpu()),
                reward=total[i * count : (i + 1) * count],
                rewards=given[i * count : (i + 1) * count],
            )
            for i, index in enumerate(chosen)
        ]

    def _reward(self, latents: Tensor, prompts: list[str]) -> Tensor:
        """Rewards (N, R) of clean latents."""
        if not self.models:
            return torch.zeros(len(prompts), 0)
        self.family.load(DECODER)
        images = torch.cat([self.family.decode_latents(part) for part in latents.split(16)])
        return torch.stack([rewards.score(model, images, prompts).cpu() for model in self.models], 1)

    # -- from samples to micro-batches -------------------------------------------------------------------------------

    def _make(self, number: int) -> list[list[AnyBatch]]:
        """The micro-batches of a round, per optimiser step."""
        made = self._sample_round(number)
        if self.family.device.type != "cpu":
            self.family.unload(DECODER)  # the device's memory belongs to training
        return made

    def _sample_round(self, number: int) -> list[list[AnyBatch]]:
        rank, every = self.accelerator.process_index, self.plan.micro_batch(number)
        mine = every[rank * self.share : (rank + 1) * self.share]
        before = [index for index, _ in every[: rank * self.share]]
        names = []
        for index, _ in mine:  # a prompt that comes twice in a round is sampled anew
            names.append(f"rollout {index}/{before.count(index)}")
            before.append(index)
        chosen = [index for index, _ in mine]
        if self.objective.source == "trajectories":
            return self._steps(self.sample(chosen, names, self.rollout.samples_per_prompt, number), number)
        if self.objective.source == "candidates":
            return self._candidates(chosen, names, number)
        if self.from_data:
            return self._against_data(mine, names, number)
        made = self.sample(chosen, names, self.rollout.samples_per_prompt, number)
        layout = self.objective.needs.layout
        if "pairs" in layout:
            return self._slices([self._pair(one, number) for one in made], collate)
        if "groups" in layout:
            return self._slices([self._group(one, number) for one in made], self._join, self.rollout.samples_per_prompt)
        if self.objective.needs.labels == (1,):
            return self._slices([self._chosen(one, number) for one in made], self._join)
        return self._slices([self._items(one, number) for one in made], self._join, self.rollout.samples_per_prompt)

    def _slices(self, entries: list[Any], join: Callable[[list[Any]], AnyBatch], rows: int = 1) -> list[list[AnyBatch]]:
        """Entries of `rows` samples each as micro-batches, per optimiser step."""
        size = max(1, self._micro_batch() // rows)
        batches = [join(entries[i : i + size]) for i in range(0, len(entries), size)]
        per_step = self.config.training.gradient_accumulation_steps
        return [batches[i : i + per_step] for i in range(0, len(batches), per_step)]

    def _micro_batch(self) -> int:
        size = self.config.training.train_batch_size
        assert size != "auto", "resolved before"
        return size

    def _draw(self, name: str, number: int) -> tuple[int, Tensor]:
        schedule = self.family.schedule
        generator = generator_for(self.config.seed, f"{name} noise", number)
        denoising = replace(self.config.denoising, proportion_empty_prompts=0.0)
        t, noise, _ = draw(
            denoising, generator, self.latent_shape, schedule.num_timesteps, self.family.timestep_sampling
        )
        return t, noise

    def _text(self, prompt: int) -> Conditioning:
        return {name: value[0] for name, value in self.encoded[prompt].items()}

    def _pair(self, one: Sampled, number: int) -> PairExample:
        """The best against the worst; without contrast with weight 0, so that batches keep their size."""
        reward, given = one.reward, one.rewards
        best, worst = int(reward.argmax()), int(reward.argmin())
        tie = bool(reward[best] == reward[worst])
        if self.objective.win_rates and not tie:
            given = calibrated_rewards(given, torch.zeros(len(given), dtype=torch.int64))
            best, worst = self._from_frontiers(given, best, worst, one.id, number)
        best, worst = (0, 1) if tie else (best, worst)
        name = f"{one.id}/{number}"
        return PairExample(
            id=name,
            chosen=one.trajectory.clean[best],
            rejected=one.trajectory.clean[worst],
            text=self._text(one.prompt),
            chosen_image=dict(self.image),
            rejected_image=dict(self.image),
            p=0.5 if tie else 1.0,
            weight=0.0 if tie else 1.0,
            chosen_reward=given[best],
            rejected_reward=given[worst],
            **self._pair_noise(name, number),
        )

    def _pair_noise(self, name: str, number: int) -> dict[str, Any]:
        """Timestep and noise of a pair by its id, or of both of its images."""
        t, noise = self._draw(name, number)
        if not self.independent:
            return {"t": t, "noise": noise}
        rejected_t, rejected_noise = self._draw(f"{name} rejected", number)
        return {"t": t, "noise": noise, "rejected_t": rejected_t, "rejected_noise": rejected_noise}

    def _from_frontiers(self, given: Tensor, best: int, worst: int, name: str, number: int) -> tuple[int, int]:
        """One image of the upper Pareto frontier and one of the lower, those in both left out; else best and worst."""
        upper, lower = frontiers(given, torch.zeros(len(given), dtype=torch.int64))
        above, below = (upper & ~lower).nonzero()[:, 0], (lower & ~upper).nonzero()[:, 0]
        if not len(above) or not len(below):
            return best, worst
        generator = generator_for(self.config.seed, f"{name} frontier", number)
        pick = [int(side[torch.randint(len(side), (), generator=generator)]) for side in (above, below)]
        return pick[0], pick[1]

    def _rows(self, one: Sampled, picked: Sequence[int], number: int) -> Rows:
        """Sampled images with noise of their own, unless the objective shares it."""
        t, noise = self._rows_noise([f"{one.id}/{k}" for k in picked], number)
        return Rows(
            x0=one.trajectory.clean[list(picked)],
            noise=noise,
            t=t,
            conditioning=self.conditioning([one.prompt] * len(picked)),
        )

    def _rows_noise(self, names: Sequence[str], number: int, again: str = "") -> tuple[Tensor, Tensor]:
        """Timesteps and noise of rows by their ids, which end in the number within the group."""
        if not self.independent and "groups" in self.objective.needs.layout:
            names = [f"{name.rpartition('/')[0]}/0" for name in names]
        drawn = [self._draw(name + again, number) for name in names]
        return torch.tensor([t for t, _ in drawn]), torch.stack([noise for _, noise in drawn])

    def _group(self, one: Sampled, number: int) -> RowBatch:
        count = len(one.reward)
        groups = Groups(
            index=torch.arange(count), group=torch.zeros(count, dtype=torch.int64), reward=one.rewards.clone()
        )
        ids = tuple(f"{one.id}/{k}" for k in range(count))
        return RowBatch(ids=ids, content=self._rows(one, range(count), number), layout=Layout(groups=groups))

    def _chosen(self, one: Sampled, number: int) -> RowBatch:
        """The image that people would have chosen of the group, labelled 1."""
        if self.rollout.select == "best":
            pick = int(one.reward.argmax())
        else:  # Gumbel-max: a draw from softmax(reward / temperature)
            generator = generator_for(self.config.seed, f"{one.id} choice", number)
            uniform = torch.rand(one.reward.shape, generator=generator).clamp(min=1e-20)
            pick = int((one.reward / self.rollout.select_temperature - (-uniform.log()).log()).argmax())
        items = Items(index=torch.zeros(1, dtype=torch.int64), label=torch.ones(1), target=one.reward[pick : pick + 1])
        return RowBatch(ids=(f"{one.id}/{pick}",), content=self._rows(one, [pick], number), layout=Layout(items=items))

    def _items(self, one: Sampled, number: int) -> RowBatch:
        """All images: desirable above the group's mean."""
        count = len(one.reward)
        items = Items(
            index=torch.arange(count), label=(one.reward > one.reward.mean()).float(), target=one.reward.clone()
        )
        ids = tuple(f"{one.id}/{k}" for k in range(count))
        return RowBatch(ids=ids, content=self._rows(one, range(count), number), layout=Layout(items=items))

    @staticmethod
    def _join(parts: list[RowBatch]) -> RowBatch:
        """Rows of several prompts as one batch; groups are numbered."""
        offsets, at = [], 0
        for part in parts:
            offsets.append(at)
            at += len(part)
        rows = [part.content for part in parts]
        content = Rows(
            x0=torch.cat([r.x0 for r in rows]),
            noise=torch.cat([r.noise for r in rows]),
            t=torch.cat([r.t for r in rows]),
            conditioning={name: torch.cat([r.conditioning[name] for r in rows]) for name in rows[0].conditioning},
        )
        layout: dict[str, Any] = {}
        if parts[0].layout.groups is not None:
            groups = [part.layout.need_groups() for part in parts]
            layout["groups"] = Groups(
                index=torch.cat([g.index + offset for g, offset in zip(groups, offsets, strict=True)]),
                group=torch.cat([torch.full_like(g.group, n) for n, g in enumerate(groups)]),
                reward=torch.cat([g.reward for g in groups]),
            )
        else:
            items = [part.layout.need_items() for part in parts]
            layout["items"] = Items(
                index=torch.cat([i.index + offset for i, offset in zip(items, offsets, strict=True)]),
                label=torch.cat([i.label for i in items if i.label is not None]),
                target=torch.cat([i.target for i in items if i.target is not None]),
            )
        return RowBatch(ids=tuple(i for part in parts for i in part.ids), content=content, layout=Layout(**layout))

    def _against_data(self, mine: list[tuple[int, int]], names: list[str], number: int) -> list[list[AnyBatch]]:
        """Chosen images of the data against samples of the same prompts."""
        assert self.winners is not None, "objectives of these sources have data"
        examples = [self.winners.example(self.kept[place], visit) for place, visit in mine]
        where = {prompt: i for i, prompt in enumerate(self.prompts)}
        prompts = [where[self.winners.data.pair(self.kept[place]).prompt] for place, _ in mine]
        # A winner whose prompt was dropped is compared with a sample without a prompt.
        made = self.sample(prompts, names, 1, number, [example.text for example in examples])
        if self.objective.source == "generated":
            pairs = []
            for example, one in zip(examples, made, strict=True):
                pairs.append(
                    replace(
                        example,
                        rejected=one.trajectory.clean[0],
                        rejected_image=dict(self.image),
                        rejected_text=None,
                        p=1.0,
                    )
                )
            return self._slices(pairs, collate)
        count = self.rollout.steps_per_sample or 1
        found = []
        for repeat in range(count):
            for example, one in zip(examples, made, strict=True):
                generator = generator_for(self.config.seed, f"{one.id} place {repeat}", number)
                step = int(torch.randint(len(self.grid), (), generator=generator))
                _, fresh = self._draw(f"{one.id} expert {repeat}", number)
                found.append(
                    replace(
                        example,
                        id=f"{example.id}/{repeat}",
                        t=int(self.grid.timesteps[step]),
                        noise=fresh,
                        rejected=one.trajectory.clean[0],
                        rejected_image=dict(self.image),
                        rejected_text=None,
                        rejected_x_t=one.trajectory.latents[step][0],
                        rejected_target=one.trajectory.outputs[step][0],
                        p=1.0,
                    )
                )
        return self._slices(found, collate)

    def _steps(self, made: list[Sampled], number: int) -> list[list[AnyBatch]]:
        """Transitions of the best and the worst trajectory of every prompt, in random order."""
        entries: list[Transition] = []
        for one in made:
            best, worst = int(one.reward.argmax()), int(one.reward.argmin())
            tie = bool(one.reward[best] == one.reward[worst])
            sides = [0, 1] if tie else [best, worst]
            latents = one.trajectory.latents
            entries += [
                Transition(
                    id=f"{one.id}/{step}",
                    prompt=one.prompt,
                    step=step,
                    x=latents[step][sides],
                    x_next=latents[step + 1][sides],
                    rewards=one.rewards[sides],
                    p=0.5 if tie else 1.0,
                )
                for step in self._some(candidate_steps(self.config, self.grid, self.eta), one.id, number)
            ]
        return self._shuffled(entries, number)

    def _some(self, steps: list[int], name: str, number: int) -> list[int]:
        """`steps_per_sample` of the steps, drawn at random."""
        order = torch.randperm(len(steps), generator=generator_for(self.config.seed, f"{name} steps", number))
        return [steps[i] for i in order[: self.rollout.steps_per_sample or len(steps)].tolist()]

    def _shuffled(self, entries: list[Transition], number: int) -> list[list[AnyBatch]]:
        order = torch.randperm(len(entries), generator=generator_for(self.config.seed, "transitions", number))
        return self._slices([entries[i] for i in order.tolist()], self._transitions)

    def _candidates(self, chosen: Sequence[int], names: Sequence[str], number: int) -> list[list[AnyBatch]]:
        """At every step the best and the worst of several next latents from the same latent; a random one goes on (SPO)."""
        count, entries = self.rollout.samples_per_prompt, []
        size = max(1, self.config.sampling.batch_size // count)
        steps = candidate_steps(self.config, self.grid, self.eta)
        with self._sampler():
            for start in range(0, len(chosen), size):
                part, labels = chosen[start : start + size], names[start : start + size]
                wanted = [set(self._some(steps, name, number)) for name in labels]
                entries += self._branch(part, labels, wanted, count, number)
        # Steps that are kept weigh alike, whatever micro-batch or process they come to: a round's mean weight is 1.
        found = torch.tensor([sum(e.weight for e in entries), float(len(entries))], device=self.accelerator.device)
        kept, every = self.accelerator.reduce(found, "sum").tolist()
        return self._shuffled([replace(e, weight=e.weight * every / max(kept, 1.0)) for e in entries], number)

    def _branch(
        self, chosen: Sequence[int], names: Sequence[str], wanted: list[set[int]], count: int, number: int
    ) -> list[Transition]:
        device, found = self.accelerator.device, []
        one, many = self.conditioning(chosen), self.conditioning([i for i in chosen for _ in range(count)])
        predict, predict_many = self.predict(one), self.predict(many)
        x = torch.stack([self._noise(f"{name}/0", number) for name in names]).to(device)
        for step in range(len(self.grid)):
            times = self.grid.times[step].to(device).expand(len(x))
            steps = torch.full((len(x),), step)
            deviation = torch.full((len(x),), self.grid.deviation(step, self.eta), device=device)
            mean = next_mean(self.grid, steps, x, predict(x, times), deviation)
            if deviation[0] == 0:
                x = mean
                continue
            xi = torch.stack([self._noise(f"{name}/{k}/{step}", number) for name in names for k in range(count)])
            spread = append_dims(deviation.repeat_interleave(count), xi.to(device)) * xi.to(device)
            candidates = mean.repeat_interleave(count, 0) + spread
            picks = [
                int(torch.randint(count, (), generator=generator_for(self.config.seed, f"{name} pick {step}", number)))
                for name in names
            ]
            if any(step in some for some in wanted):
                rewards_ = self._reward(
                    self._clean(predict_many, candidates, step + 1),
                    [self.prompts[i] for i in chosen for _ in range(count)],
                )
                total = (rewards_ @ torch.tensor(self.weights)).view(-1, count)
                for n, name in enumerate(names):
                    best, worst = int(total[n].argmax()), int(total[n].argmin())
                    clear = torch.tanh(self.rollout.reward_scale * (total[n, best] - total[n, worst]) / 2)
                    if step not in wanted[n]:
                        continue
                    sides = [n * count + best, n * count + worst]
                    found.append(
                        Transition(
                            id=f"{name}/{step}",
                            prompt=chosen[n],
                            step=step,
                            x=x[[n, n]].cpu(),
                            x_next=candidates[sides].cpu(),
                            rewards=rewards_[sides],
                            weight=float(clear > self.rollout.keep_threshold),
                        )
                    )
            x = candidates[[n * count + pick for n, pick in enumerate(picks)]]
        return found

    def _clean(self, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, step: int) -> Tensor:
        """The clean latents that the network predicts at a level of the grid; the last level is clean already."""
        if step == len(self.grid):
            return x
        ones = torch.ones(len(x), device=x.device)
        output = predict(x, self.grid.times[step].to(x.device).expand(len(x)))
        alpha, sigma = float(self.grid.alphas[step]) * ones, float(self.grid.sigmas[step]) * ones
        return convert(output, x, alpha, sigma, self.grid.prediction_type, "sample")

    def _transitions(self, entries: list[Transition]) -> StepBatch:
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
            conditioning=self.conditioning([e.prompt for e in rows]),
            negative={name: v.expand(len(rows), *v.shape[1:]).clone() for name, v in self._without().items()},
            layout=Layout(pairs=pairs),
        )

    def _again(self, batch: AnyBatch, number: int, iteration: int) -> AnyBatch:
        """The batch of a later pass over a round: images get fresh noise."""
        if iteration == 0 or isinstance(batch, StepBatch):
            return batch
        again = f" again {iteration}"
        if isinstance(batch, RowBatch):
            t, noise = self._rows_noise(batch.ids, number, again)
            return replace(batch, content=replace(batch.content, t=t, noise=noise))
        drawn = [self._pair_noise(name + again, number) for name in batch.ids]
        fresh: dict[str, Tensor] = {"noise": torch.stack([one["noise"] for one in drawn])}
        if batch.rejected_x_t is None:  # points on the policy's way lie at a timestep, which its winner shares
            fresh["t"] = torch.tensor([one["t"] for one in drawn])
            if self.independent:
                fresh["rejected_t"] = torch.tensor([one["rejected_t"] for one in drawn])
                fresh["rejected_noise"] = torch.stack([one["rejected_noise"] for one in drawn])
        return replace(batch, **fresh)

    def scores(self, batch: StepBatch) -> tuple[Scores, Layout]:
        """Mean log-densities of stored transitions under policy and reference, and the pairs.

        The reference goes first: adapters must not be switched between the policy's forward and its backward.
        """
        policy, scale = self.policy, self.rollout.guidance_scale
        deviation = torch.tensor([self.grid.deviation(k, self.eta) for k in batch.step.tolist()], device=batch.x.device)
        times = self.grid.times.to(batch.x.device)[batch.step]

        def density(network: torch.nn.Module) -> Tensor:
            output = guided(policy, network, batch.x, times, batch.conditioning, batch.negative, scale)
            mean = next_mean(self.grid, batch.step, batch.x, output, deviation)
            return log_density(batch.x_next, mean, deviation)

        ref = None
        if self.objective.reads_reference():
            assert policy.reference is not None, "a run has a reference"
            ((_, weights),) = policy.reference.parts()
            with torch.no_grad(), policy.reference.active(weights):
                ref = density(policy.bare)
        return Scores.steps(density(policy.network), ref), batch.layout

    # -- what a checkpoint stores ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The samples of an unfinished round; nothing where every step makes its own."""
        if self._round is None or self.steps_per_round == 1:
            return {}
        number, batches = self._round
        return {"round": number, "batches": plain(batches), "processes": self.accelerator.num_processes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on within a round. Samples of other processes are not in a checkpoint: with several, the round is made anew."""
        if not state:
            return
        if state["processes"] != 1 or self.accelerator.num_processes != 1:
            log.warning("the unfinished round of samples is made anew by the current policy (several processes)")
            return
        self._round = (state["round"], rebuilt(state["batches"], _CLASSES))


def _cut(made: Trajectory, part: slice) -> Trajectory:
    return Trajectory([x[part] for x in made.latents], [x[part] for x in made.outputs])


def guided(
    policy: Policy,
    network: torch.nn.Module,
    x: Tensor,
    times: Tensor,
    conditioning: Conditioning,
    negative: Conditioning,
    scale: float,
) -> Tensor:
    """The native prediction with classifier-free guidance, float32: both branches in one forward.

    Args:
        policy: for its family and precision.
        network: bare or wrapped.
        x: noisy latents (N, ...).
        times: what the network is told (N,).
        conditioning, negative: with and without the prompt, batch N.
        scale: 1 is no guidance, and the negative branch is not computed.
    """
    family = policy.family
    policy.forwards += len(x) * (1 if scale == 1 else 2)
    with policy.autocast():
        if scale == 1:
            return family.predict(network, x.to(family.dtype), times, conditioning).float()
        both = {name: torch.cat([value, negative[name].to(value)]) for name, value in conditioning.items()}
        output = family.predict(network, torch.cat([x, x]).to(family.dtype), torch.cat([times, times]), both).float()
    with_prompt, without = output.chunk(2)
    return without + scale * (with_prompt - without)


def candidate_steps(config: RunConfig, grid: Grid, eta: float) -> list[int]:
    """Steps of the grid that have a density and are not before `rollout.first_step`."""
    return [step for step in grid.random_steps(eta) if step >= config.rollout.first_step]


def samples_per_process(config: RunConfig, grid: Grid, eta: float) -> int:
    """Prompts (or data rows) that one process samples for a round.

    A step's size counts pairs, groups' images, single images or pairs of transitions.

    Raises:
        ConfigError: a round is no whole number of them.
    """
    training, rollout, objective = config.training, config.rollout, config.objective
    assert training.train_batch_size != "auto", "resolved before"
    size = training.train_batch_size * training.gradient_accumulation_steps * rollout.steps_per_generation
    layout, each, what = objective.needs.layout, 1, ""
    if objective.source in TRANSITIONS:
        possible = len(candidate_steps(config, grid, eta))
        each = rollout.steps_per_sample or possible
        what = f"{each} trained steps of a trajectory"
        if not 1 <= each <= possible:
            raise ConfigError(
                f"rollout.steps_per_sample: got {each}; {possible} of {len(grid)} sampler steps have a density (eta {eta})"
            )
    elif objective.source == "on_policy":
        if rollout.guidance_scale != 1:
            raise ConfigError(
                f"rollout.guidance_scale: got {rollout.guidance_scale}; {objective.name!r} trains the prediction with the prompt "
                "on targets that the sampler predicted, so it samples without guidance: take 1"
            )
        each, what = rollout.steps_per_sample or 1, "rollout.steps_per_sample"
    elif "groups" in layout or ("items" in layout and objective.needs.labels != (1,) and "pairs" not in layout):
        each, what = rollout.samples_per_prompt, f"rollout.samples_per_prompt {rollout.samples_per_prompt}"
        if training.train_batch_size % each:
            raise ConfigError(
                f"training.train_batch_size: got {training.train_batch_size}; the images of a group stay together: expected "
                f"a multiple of rollout.samples_per_prompt {each}"
            )
    if size % each:
        raise ConfigError(
            f"rollout: a round of {size} (train_batch_size x gradient_accumulation_steps x steps_per_generation) is no "
            f"multiple of {what} ({each}); change one of them"
        )
    return int(size // each)
