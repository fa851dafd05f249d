"""Training on images that are sampled on the way: by the policy, by its reference, or along stored trajectories.

    prompts -> K images each -> rewards -> entries: pairs, groups, chosen images, transitions -> micro-batches

A *round* serves `steps_per_generation` optimiser steps, `num_iterations` times over. Prompts, noise and the order of a
round's entries are functions of (seed, round) whatever the number of processes; images also depend on the weights, so a
round is made when its first micro-batch is asked for. Sampled latents are used as they are: nothing is decoded and encoded
again.

What a round holds follows from the objective's `source` and layout:

| source | entries |
| --- | --- |
| data (pairs, groups, items) | sampled images of the prompts: best against worst, all of a group, or the chosen one |
| generated | chosen images of the data against images that the reference samples of the same prompts |
| on_policy | chosen images of the data against points of the policy's own trajectories, with its predictions as targets |
| truncated | points of a walk that stops on its way, with the clean latents that are predicted there |
| trajectories | stored transitions of the best and the worst of K trajectories |
| candidates | at every step the best and the worst of K next latents from the same latent |
| steps | transitions of all K trajectories, with their log-densities when they were sampled |
| whole_trajectories | all K trajectories with all their steps, and their log-densities when they were sampled |
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from diffalign import rewards
from diffalign._preflight_images import check_group, check_set
from diffalign.config import RunConfig
from diffalign.data.batch import mapped
from diffalign.data.loader import BatchPlan, PairMicroBatches
from diffalign.families import DECODER, Conditioning, DenoisingFamily
from diffalign.losses import Layout, Objective, Scores
from diffalign.losses.diffusion.capo import calibrated_rewards, frontiers
from diffalign.losses.scores import mean_square
from diffalign.offload import Offload
from diffalign.policy import Policy, guided
from diffalign.prediction import append_dims, convert
from diffalign.rounds import plain, rebuilt
from diffalign.sampling import sampling_mode
from diffalign.sampling.advantages import RoundAdvantages
from diffalign.sampling.batches import AnyBatch, Batches, Conditions
from diffalign.sampling.densities import Densities, StepOutput
from diffalign.sampling.entries import (
    CLASSES,
    Entry,
    Sampled,
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
from diffalign.sampling.rules import (
    DECODED,
    candidate_steps,
    noise_level,
    reward_sign,
    reward_weights,
    round_size,
    sampling_policy,
    window_starts,
)
from diffalign.sampling.scoring import Scoring
from diffalign.sampling.trajectories import Trajectory, log_density, make_grid, next_mean, sample
from diffalign.schedules import generator_for

log = logging.getLogger(__name__)


class ImageRollouts:
    """Samples, scores and cuts into micro-batches; this process's share of every round.

    Args:
        config: of the run.
        family: samples and decodes.
        policy: the network and its reference.
        accelerator: processes.
        prompts: texts.
        conditions: conditioning of samples.
        latent_shape: of one sample.
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
        conditions: Conditions,
        latent_shape: tuple[int, ...],
        winners: PairMicroBatches | None = None,
        kept: Sequence[int] = (),
    ) -> None:
        self.config, self.rollout, self.family, self.policy = config, config.rollout, family, policy
        self.accelerator, self.prompts, self.conditions = accelerator, prompts, conditions
        self.latent_shape, self.winners, self.kept = latent_shape, winners, list(kept)
        self.objective: Objective = config.objective
        self.models = [rewards.load(name, device=accelerator.device) for name in self.rollout.rewards]
        for name, model in zip(self.rollout.rewards, self.models, strict=True):
            check_group(config, name, model.grouped)
            check_set(config, name, model.sets)
        self.offload = Offload(self.models, self.rollout.offload_rewards)
        self.weights = reward_weights(config)
        self.sign = reward_sign(config)
        self.pairing = config.rollout.pairing or self.objective.sampling.pairing
        self.eta = noise_level(config)
        self.grid = make_grid(
            family, family.stock_scheduler(), self.rollout.num_inference_steps, latent_shape, self.rollout.kernel
        )
        self.batches = Batches(
            config,
            family,
            self.grid,
            conditions=conditions,
            latent_shape=latent_shape,
            winners=winners,
            kept=kept,
        )
        self.densities = Densities(config, policy, self.grid, self.eta)
        self.advantages = RoundAdvantages(config)
        self.size = round_size(config, self.grid, self.eta, accelerator.num_processes)
        total = len(self.kept) if self.from_data else len(prompts)
        self.plan = BatchPlan(range(total), [(0, 0)] * total, self.size.prompts, config.seed)
        self._round: tuple[int, list[Entry]] | None = None

    @property
    def from_data(self) -> bool:
        """Whether winners come from the data."""
        return self.objective.from_data

    @property
    def steps_per_round(self) -> int:
        return self.rollout.steps_per_generation * self.rollout.num_iterations

    def passes(self) -> float:
        """How often a run samples all of its prompts."""
        rounds = math.ceil(self.config.training.max_train_steps / self.steps_per_round)
        return rounds * self.plan.batch_size / max(1, len(self.kept) if self.from_data else len(self.prompts))

    def micro_batches(self, first_step: int) -> Iterator[AnyBatch]:
        """This process's micro-batches from an optimiser step on."""
        per_step, size = self.config.training.gradient_accumulation_steps, self.size.per_batch
        for step in range(first_step, self.config.training.max_train_steps):
            number, place = divmod(step, self.steps_per_round)
            if self._round is None or self._round[0] != number:
                self._round = None  # its memory is needed for the next one
                with self.offload:
                    self._round = (number, self._make(number))
            iteration, place = divmod(place, self.rollout.steps_per_generation)
            for batch in range(place * per_step, (place + 1) * per_step):
                entries = self._round[1][batch * size : (batch + 1) * size]
                yield self.batches.make(entries, number, iteration).to(self.accelerator.device)

    # -- a round -----------------------------------------------------------------------------------------------------

    def _make(self, number: int) -> list[Entry]:
        """This process's entries of a round, in the order of its micro-batches."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if self.policy.lagged is not None:
            self.policy.lagged.start_round(number, number * self.steps_per_round)
        prompts = self.plan.micro_batch(number)
        names = [
            f"rollout {index}/{sum(i == index for i, _ in prompts[:place])}"  # one that comes twice is sampled anew
            for place, (index, _) in enumerate(prompts)
        ]
        together = self.size.per_prompt > 1 or self.objective.trains_steps
        mine = list(range(rank, len(prompts), world)) if together else self._own(len(prompts))
        made = self._sampled([prompts[i] for i in mine], [names[i] for i in mine], number)
        if self.family.device.type != "cpu":
            self.family.park(DECODER)  # the device's memory belongs to training
        if not together:
            return self._with_advantages(mine, [entry for entries in made for entry in entries], number)
        # Entries of a prompt are spread over the round, so over the processes, too.
        found = list(zip(mine, made, strict=True))
        if world > 1:
            found = sorted(gather_object(found), key=lambda one: one[0])
        if self.objective.rows_from == "steps":
            found = self._step_advantages(found, number)
        every = [entry for _, entries in found for entry in entries]
        if self.objective.rows_from == "candidates":
            every = _weighed(every)
        order = torch.randperm(len(every), generator=generator_for(self.config.seed, "transitions", number)).tolist()
        return [every[order[i]] for i in self._own(len(every))]

    def _with_advantages(self, places: Sequence[int], entries: list[Entry], number: int) -> list[Entry]:
        """Groups with what the objective makes of the rewards of the whole round, over all processes."""
        if "groups" not in self.objective.needs.layout:
            return entries
        groups = [entry for entry in entries if isinstance(entry, SampledRows)]
        found = [(place, entry.rewards) for place, entry in zip(places, groups, strict=True)]
        if self.accelerator.num_processes > 1:
            found = gather_object(found)
        advantage = self.advantages(number, self._texts(number), sorted(found, key=lambda one: one[0]))
        return [replace(e, advantage=advantage.get(place)) for place, e in zip(places, groups, strict=True)]

    def _step_advantages(self, found: list[tuple[int, list[Entry]]], number: int) -> list[tuple[int, list[Entry]]]:
        """The same of every prompt's steps, which share them."""
        steps = [(place, [e for e in entries if isinstance(e, StepRows)]) for place, entries in found]
        rewards_ = [(place, entries[0].rewards) for place, entries in steps]
        advantage = self.advantages(number, self._texts(number), rewards_)
        return [(place, [replace(e, advantage=advantage.get(place)) for e in entries]) for place, entries in steps]

    def _texts(self, number: int) -> list[str]:
        """The prompts of a round, of all processes."""
        return [self.prompts[index] for index, _ in self.plan.micro_batch(number)]

    def _own(self, count: int) -> list[int]:
        """Places of this process's entries: micro-batches are dealt in turn, as those of data are."""
        rank, world, size = self.accelerator.process_index, self.accelerator.num_processes, self.size.per_batch
        return [i for k in range(rank, count // size, world) for i in range(k * size, (k + 1) * size)]

    def _sampled(self, prompts: Sequence[tuple[int, int]], names: Sequence[str], number: int) -> list[list[Entry]]:
        """The entries of prompts.

        Args:
            prompts: (number, how often it has come before); of objectives on the data's winners, of a pair.
            names: a text per prompt that seeds its noise.
            number: of the round.
        """
        numbers = [index for index, _ in prompts]
        source, needs = self.objective.rows_from, self.objective.needs
        if source == "truncated":
            return self._truncated(prompts, names, number)
        if self.from_data:
            return self._losers(prompts, names, number)
        if source == "candidates":
            return self._candidates(numbers, names, number)
        made = self.sample(numbers, names, self.rollout.samples_per_prompt, number)
        if source == "trajectories":
            return [self._transitions(one, number) for one in made]
        if source == "steps":
            return [self._steps(one, number) for one in made]
        if source == "whole_trajectories":
            return [[self._trajectories(one)] for one in made]
        if "pairs" in needs.layout:
            return [[self._pair(one, number)] for one in made]
        if "groups" not in needs.layout and needs.labels == (1,):
            return [[self._chosen(one, number)] for one in made]
        return [[_rows(one, range(len(one.reward)), one.reward > one.reward.mean())] for one in made]

    # -- sampling ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _sampler(self) -> Iterator[None]:
        """The network of whoever samples, without dropout."""
        who = sampling_policy(self.config)
        context: AbstractContextManager[None] = nullcontext()
        if who == "lagged":
            assert self.policy.lagged is not None, "runs with a behaviour policy have one"
            context = self.policy.lagged.active()
        if who == "reference" and self.policy.reference is not None:
            context = self.policy.reference.active(self.policy.reference.parts()[0][1])
        with torch.no_grad(), sampling_mode(self.policy.bare, adapters=True), context:
            yield

    def predict(self, conditioning: Conditioning) -> Callable[[Tensor, Tensor], Tensor]:
        """The network's native prediction for N samples, guided if the rollout is."""
        device, scale = self.accelerator.device, self.rollout.guidance_scale
        count = len(next(iter(conditioning.values())))
        with self.policy.autocast():  # by whoever samples, once for all steps
            here, empty = (
                self.family.encode_tokens({name: value.to(device) for name, value in one.items()})
                for one in (conditioning, self.conditions.without(count))
            )

        def call(x: Tensor, times: Tensor) -> Tensor:
            return guided(self.policy, self.policy.bare, x, times, here, empty, scale)

        return call

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
        """`count` images of each prompt, as many at a time as `sampling.batch_size` says.

        Args:
            chosen: prompts by number.
            names: a text per prompt that seeds its noise.
            count: images per prompt.
            number: of the round.
            texts: conditioning of each, without a batch axis; None: that of the prompts.
        """
        texts = [self.conditions.text(index) for index in chosen] if texts is None else texts
        shared = (
            self.objective.sampling.shared_start if self.rollout.shared_start is None else self.rollout.shared_start
        )
        source = self.objective.rows_from
        shared = shared and source in ("trajectories", "steps", "whole_trajectories")
        windows = [set(self._window(name, number)) for name in names] if self.rollout.window else []
        rows = [(i, k) for i in range(len(chosen)) for k in range(count)]
        parts: list[Trajectory] = []
        given: list[Future[Tensor]] = []
        with self._sampler(), Scoring(self.models, self.sign) as scoring:
            for start in range(0, len(rows), self.config.sampling.batch_size):
                part = rows[start : start + self.config.sampling.batch_size]
                noise = torch.stack([self._noise(f"{names[i]}/{0 if shared else k}", number) for i, k in part])
                made = sample(
                    self.predict(self.conditions.of_texts([texts[i] for i, _ in part])),
                    self.grid,
                    noise.to(self.accelerator.device),
                    self.eta,
                    lambda step, part=part: torch.stack(  # type: ignore[misc]
                        [self._noise(f"{names[i]}/{k}/{step}", number) for i, k in part]
                    ),
                    keep=source in ("trajectories", "on_policy", "steps", "whole_trajectories"),
                    outputs=source in ("on_policy", "steps", "whole_trajectories"),
                    stochastic=None
                    if not windows
                    else lambda step, part=part: torch.tensor([step in windows[i] for i, _ in part]),  # type: ignore[misc]
                )
                captions = [self.prompts[chosen[i]] for i, _ in part] if self.models else []
                given.append(scoring.submit(self._decoded(made.clean) if self.models else made.clean, captions))
                parts.append(mapped(made, lambda x: x.cpu()))
            every = torch.cat([one.result() for one in given])
        total = every @ self.weights if self.models else every.new_zeros(len(rows))
        trajectory = Trajectory(
            [torch.cat(level) for level in zip(*(part.latents for part in parts), strict=True)],
            [torch.cat(level) for level in zip(*(part.outputs for part in parts), strict=True)],
        )
        return [
            Sampled(
                id=names[i],
                prompt=index,
                trajectory=mapped(trajectory, lambda x, i=i: x[i * count : (i + 1) * count]),  # type: ignore[misc]
                reward=total[i * count : (i + 1) * count],
                rewards=every[i * count : (i + 1) * count],
            )
            for i, index in enumerate(chosen)
        ]

    def _reward(self, latents: Tensor, prompts: list[str]) -> Tensor:
        """Rewards (N, R) of clean latents."""
        with Scoring(self.models, self.sign) as scoring:
            return scoring.submit(self._decoded(latents), prompts).result()

    def _decoded(self, latents: Tensor) -> Tensor:
        """Images of clean latents."""
        self.family.load(DECODER)
        size = min(DECODED, self.config.sampling.batch_size)
        return torch.cat([self.family.decode_latents(part) for part in latents.split(size)])

    # -- from samples to entries -------------------------------------------------------------------------------------

    def _pair(self, one: Sampled, number: int) -> SampledPair:
        """The best against the worst; without contrast with weight 0, so that batches keep their size."""
        best, worst, tie = one.best_and_worst(self.pairing)
        given = one.rewards
        if self.objective.sampling.win_rates and not tie:
            given = calibrated_rewards(given, torch.zeros(len(given), dtype=torch.int64))
            best, worst = self._from_frontiers(given, best, worst, one.id, number)
        return SampledPair(
            id=one.id,
            prompt=one.prompt,
            latents=one.trajectory.clean[[best, worst]],
            rewards=given[[best, worst]],
            p=0.5 if tie else 1.0,
            weight=0.0 if tie else 1.0,
        )

    def _from_frontiers(self, given: Tensor, best: int, worst: int, name: str, number: int) -> tuple[int, int]:
        """One image of the upper Pareto frontier and one of the lower, those in both left out; else best and worst."""
        upper, lower = frontiers(given, torch.zeros(len(given), dtype=torch.int64))
        above, below = (upper & ~lower).nonzero()[:, 0], (lower & ~upper).nonzero()[:, 0]
        if not len(above) or not len(below):
            return best, worst
        generator = generator_for(self.config.seed, f"{name} frontier", number)
        pick = [int(side[torch.randint(len(side), (), generator=generator)]) for side in (above, below)]
        return pick[0], pick[1]

    def _chosen(self, one: Sampled, number: int) -> SampledRows:
        """The image that people would have chosen of the group, labelled 1."""
        if self.rollout.select == "best":
            pick = int(one.reward.argmax())
        else:  # Gumbel-max: a draw from softmax(reward / temperature)
            generator = generator_for(self.config.seed, f"{one.id} choice", number)
            uniform = torch.rand(one.reward.shape, generator=generator).clamp(min=1e-20)
            pick = int((one.reward / self.rollout.select_temperature - (-uniform.log()).log()).argmax())
        return _rows(one, [pick], torch.ones(len(one.reward)))

    def _losers(self, prompts: Sequence[tuple[int, int]], names: Sequence[str], number: int) -> list[list[Entry]]:
        """Samples, or points on the way to them, of the prompts of data pairs."""
        # A winner whose prompt was dropped is compared with a sample without a prompt.
        examples = [self.batches.winner(place, visit) for place, visit in prompts]
        made = self.sample([i for i, _ in prompts], names, 1, number, [example.text for example in examples])
        found: list[list[Entry]] = []
        for (place, visit), one in zip(prompts, made, strict=True):
            entries: list[Entry] = []
            for repeat in range(self.size.per_prompt):
                loser = SampledLoser(id=one.id, place=place, visit=visit, latents=one.trajectory.clean[0].clone())
                if self.objective.rows_from == "on_policy":
                    generator = generator_for(self.config.seed, f"{one.id} place {repeat}", number)
                    step = int(torch.randint(len(self.grid), (), generator=generator))
                    loser = replace(
                        loser,
                        id=f"{one.id} expert {repeat}",
                        step=step,
                        x_t=one.trajectory.latents[step][0].clone(),
                        target=one.trajectory.outputs[step][0].clone(),
                    )
                entries.append(loser)
            found.append(entries)
        return found

    def _truncated(self, prompts: Sequence[tuple[int, int]], names: Sequence[str], number: int) -> list[list[Entry]]:
        """Walks that stop on their way, and the clean latents that are predicted where they stop."""
        last, draws = len(self.grid) - 1, [generator_for(self.config.seed, f"{n} walk", number) for n in names]
        if self.from_data:
            examples = [self.batches.winner(place, visit) for place, visit in prompts]
            texts = [example.text for example in examples]
            first = torch.tensor([int(torch.randint(last, (), generator=g)) for g in draws])
            stop = (first + self.objective.steps).clamp(max=last)  # type: ignore[attr-defined]
            clean = torch.stack([example.chosen for example in examples])
        else:
            texts = [self.conditions.text(index) for index, _ in prompts]
            first = torch.zeros(len(prompts), dtype=torch.int64)
            stop = torch.tensor([1 + int(torch.randint(last, (), generator=g)) for g in draws])
            clean = None
        x = torch.stack([self._noise(f"{name}/0", number) for name in names])
        if clean is not None:
            alpha, sigma = self.grid.alphas[first], self.grid.sigmas[first]
            x = append_dims(alpha, x) * clean + append_dims(sigma, x) * x
        goal, size = torch.zeros_like(x), self.config.sampling.batch_size
        with self._sampler():
            for step in range(int(first.min()), int(stop.max()) + 1):
                moving = ((first <= step) & (step <= stop)).nonzero()[:, 0]
                for rows in moving.split(size) if len(moving) else ():
                    here = x[rows].to(self.accelerator.device)
                    predict = self.predict(self.conditions.of_texts([texts[i] for i in rows.tolist()]))
                    output = predict(here, self.grid.times[step].to(here.device).expand(len(here))).float()
                    ends = stop[rows] == step
                    levels = (self.grid.alphas[step], self.grid.sigmas[step])
                    alpha, sigma = (level.to(here.device).expand(len(here)) for level in levels)
                    found = convert(output, here, alpha, sigma, self.grid.prediction_type, "sample").cpu()
                    goal[rows[ends]] = found[ends]
                    moved = next_mean(self.grid, torch.full((len(here),), step), here, output, torch.zeros_like(alpha))
                    x[rows[~ends]] = moved.cpu()[~ends]
        return [
            [
                Truncated(
                    id=name,
                    prompt=index,
                    visit=visit,
                    step=int(stop[i]),
                    x_t=x[i].clone(),
                    goal=goal[i].clone(),
                )
            ]
            for i, ((index, visit), name) in enumerate(zip(prompts, names, strict=True))
        ]

    def _transitions(self, one: Sampled, number: int) -> list[Entry]:
        """Transitions of the best and the worst trajectory of a prompt."""
        best, worst, tie = one.best_and_worst(self.pairing)
        latents = one.trajectory.latents
        return [
            Transition(
                id=f"{one.id}/{step}",
                prompt=one.prompt,
                step=step,
                x=latents[step][[best, worst]],
                x_next=latents[step + 1][[best, worst]],
                rewards=one.rewards[[best, worst]],
                p=0.5 if tie else 1.0,
            )
            for step in self._some(one.id, number)
        ]

    def _window(self, name: str, number: int) -> list[int]:
        """The stochastic steps of a prompt's samples, where only a window of them is."""
        first, last = window_starts(self.config, self.grid, self.eta)
        if (every := self.rollout.window_every) is not None:
            start = first + number // every % (last - first + 1)
            return list(range(start, start + self.size.per_prompt))
        generator = generator_for(self.config.seed, f"{name} window", number)
        start = first + int(torch.randint(last - first + 1, (), generator=generator))
        return list(range(start, start + self.size.per_prompt))

    def _steps(self, one: Sampled, number: int) -> list[Entry]:
        """Transitions of all samples of a prompt, with what the policy that sampled says of them."""
        latents, found = one.trajectory.latents, list[Entry]()
        for step in self._window(one.id, number) if self.rollout.window else self._some(one.id, number):
            mean, old = self._as_sampled(one, step)
            found.append(
                StepRows(
                    id=f"{one.id}/{step}",
                    prompt=one.prompt,
                    step=step,
                    x=latents[step].clone(),
                    x_next=latents[step + 1].clone(),
                    mean=mean if "mean_shift" in self.objective.needs.extra else None,
                    old=old,
                    rewards=one.rewards,
                )
            )
        return found

    def _trajectories(self, one: Sampled) -> TrajectoryRows:
        """All trajectories of a prompt, with what the policy that sampled says of all of their steps."""
        steps = self.grid.random_steps(self.eta)
        return TrajectoryRows(
            id=one.id,
            prompt=one.prompt,
            latents=torch.stack(one.trajectory.latents, 1),
            steps=steps,
            old=torch.stack([self._as_sampled(one, step)[1] for step in steps], 1),
            rewards=one.rewards,
        )

    def _as_sampled(self, one: Sampled, step: int) -> tuple[Tensor, Tensor]:
        """Mean of a step of all samples of a prompt, (K, ...), and their log-densities, (K,), when they were sampled."""
        latents, count = one.trajectory.latents, len(one.reward)
        deviation = torch.full((count,), self.grid.deviation(step, self.eta))
        mean = next_mean(self.grid, torch.full((count,), step), latents[step], one.trajectory.outputs[step], deviation)
        return mean, log_density(latents[step + 1], mean, deviation, self.grid.kernel)

    def _some(self, name: str, number: int) -> list[int]:
        """`steps_per_sample` of the steps that have a density, drawn at random."""
        steps = candidate_steps(self.config, self.grid, self.eta)
        order = torch.randperm(len(steps), generator=generator_for(self.config.seed, f"{name} steps", number))
        return [steps[i] for i in order[: self.size.per_prompt].tolist()]

    def _candidates(self, chosen: Sequence[int], names: Sequence[str], number: int) -> list[list[Entry]]:
        """At every step the best and the worst of several next latents from the same latent; a random one goes on (SPO)."""
        size = max(1, self.config.sampling.batch_size // self.rollout.samples_per_prompt)
        found: list[list[Entry]] = []
        with self._sampler():
            for start in range(0, len(chosen), size):
                found += self._branch(chosen[start : start + size], names[start : start + size], number)
        return found

    def _branch(self, chosen: Sequence[int], names: Sequence[str], number: int) -> list[list[Entry]]:
        device, count = self.accelerator.device, self.rollout.samples_per_prompt
        found: list[list[Entry]] = [[] for _ in chosen]
        wanted = [set(self._some(name, number)) for name in names]
        texts = [self.conditions.text(index) for index in chosen]
        predict = self.predict(self.conditions.of_texts(texts))
        many = [text for text in texts for _ in range(count)]
        captions = [self.prompts[index] for index in chosen for _ in range(count)]
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
                given = self._reward(self._clean(candidates, many, step + 1), captions)
                total = (given @ self.weights).view(-1, count)
                for n, name in enumerate(names):
                    if step not in wanted[n]:
                        continue
                    best, worst = int(total[n].argmax()), int(total[n].argmin())
                    clear = torch.tanh(self.rollout.reward_scale * (total[n, best] - total[n, worst]) / 2)
                    sides = [n * count + best, n * count + worst]
                    found[n].append(
                        Transition(
                            id=f"{name}/{step}",
                            prompt=chosen[n],
                            step=step,
                            x=x[[n, n]].cpu(),
                            x_next=candidates[sides].cpu(),
                            rewards=given[sides],
                            weight=float(clear > self.rollout.keep_threshold),
                        )
                    )
            x = candidates[[n * count + pick for n, pick in enumerate(picks)]]
        return found

    def _clean(self, x: Tensor, texts: Sequence[Conditioning], step: int) -> Tensor:
        """The clean latents that the network predicts at a level of the grid; the last level is clean already."""
        if step == len(self.grid):
            return x
        size, found = self.config.sampling.batch_size, []
        for start in range(0, len(x), size):
            part = x[start : start + size]
            ones = torch.ones(len(part), device=part.device)
            times = self.grid.times[step].to(part.device).expand(len(part))
            output = self.predict(self.conditions.of_texts(texts[start : start + size]))(part, times)
            alpha, sigma = float(self.grid.alphas[step]) * ones, float(self.grid.sigmas[step]) * ones
            found.append(convert(output, part, alpha, sigma, self.grid.prediction_type, "sample"))
        return torch.cat(found)

    def scores(self, batch: StepBatch | TrajectoryBatch) -> tuple[Scores, Layout]:
        """Mean log-densities of stored transitions under policy and reference, and the pairs or groups.

        The reference goes first: adapters must not be switched between the policy's forward and its backward.
        """
        if isinstance(batch, TrajectoryBatch):
            return self.densities.trajectories(batch), batch.layout
        policy, densities = self.policy, self.densities

        def steps(network: torch.nn.Module) -> StepOutput:
            return densities.of(network, batch.x, batch.x_next, batch.step, batch.conditioning, batch.negative)

        there = densities.reference(steps) if self.objective.reads_reference() else None
        ref = None if there is None else there.density
        here = steps(policy.network)
        theta = here.density
        if batch.old is None:
            return Scores.steps(theta, ref), batch.layout
        # One unit a row: an objective on units takes every transition as one.
        extra = self._extra(batch, densities.deviation(batch.step), here, there)
        ref = None if ref is None else ref[:, None]
        return Scores.steps(theta[:, None], ref, batch.old[:, None], extra=extra), batch.layout

    def _extra(
        self,
        batch: StepBatch,
        deviation: Tensor,
        here: StepOutput,
        there: StepOutput | None,
    ) -> dict[str, Tensor]:
        """What policy gradients on steps read beside log-densities, (N,) each; see `losses.diffusion._transitions`."""
        asked, sigmas = self.objective.needs.extra, self.grid.sigmas.to(batch.x.device)
        found: dict[str, Tensor] = {}
        if "std" in asked:
            found["std"] = deviation
        if "dt" in asked:
            found["dt"] = (sigmas[batch.step + 1] - sigmas[batch.step]).abs()
        if "mean_shift" in asked:
            assert batch.mean is not None, "stored where it is asked for"
            found["mean_shift"] = mean_square(here.mean - batch.mean) / (2 * deviation.square())
        if there is not None and "ref_shift" in asked:
            found["ref_shift"] = mean_square(here.mean - there.mean) / (2 * deviation.square())
        if there is not None and "eps_shift" in asked:
            alpha, sigma = self.grid.alphas.to(batch.x.device)[batch.step], sigmas[batch.step]
            native = self.grid.prediction_type
            noises = [convert(one.output, batch.x, alpha, sigma, native, "epsilon") for one in (here, there)]
            found["eps_shift"] = mean_square(noises[0] - noises[1])
        return found

    # -- what a checkpoint stores ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The entries of an unfinished round, but where every step makes its own; and rewards of past rounds."""
        state = self.advantages.state_dict()
        if self._round is None or self.steps_per_round == 1:
            return state
        number, entries = self._round
        return state | {"round": number, "entries": plain(entries), "processes": self.accelerator.num_processes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on within a round. Samples of other processes are not in a checkpoint: with several, the round is made anew."""
        self.advantages.load_state_dict(state)
        if "round" not in state:
            return
        if state["processes"] != 1 or self.accelerator.num_processes != 1:
            log.warning("the unfinished round of samples is made anew by the current policy (several processes)")
            return
        self._round = (state["round"], rebuilt(state["entries"], CLASSES))


def _rows(one: Sampled, numbers: Sequence[int], label: Tensor) -> SampledRows:
    """Some images of a prompt."""
    picked = list(numbers)
    return SampledRows(
        id=one.id,
        prompt=one.prompt,
        numbers=picked,
        latents=one.trajectory.clean[picked],
        reward=one.reward[picked],
        rewards=one.rewards[picked],
        label=label[picked].float(),
    )


def _weighed(entries: list[Entry]) -> list[Entry]:
    """Candidates with weights of mean 1 over the round: steps that are kept weigh alike, whatever batch they come to."""
    steps = [entry for entry in entries if isinstance(entry, Transition)]
    kept = max(1.0, sum(entry.weight for entry in steps))
    return [replace(entry, weight=entry.weight * len(steps) / kept) for entry in steps]
