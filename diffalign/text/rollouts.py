"""Online training on texts: sample answers from the policy, score them, and make the batches of the next optimiser steps.

    prompts -> K answers each (the policy as it is) -> rewards -> groups, pairs, items or lists -> inner micro-batches

A *round* serves `steps_per_generation` optimiser steps, `num_iterations` times over. Which prompts a round has, and the
noise of every answer, are functions of (seed, prompt id, round); answers also depend on the policy, so a round is made when
its first micro-batch is asked for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign import rewards
from diffalign.config import RunConfig
from diffalign.data.loader import BatchPlan
from diffalign.errors import ConfigError
from diffalign.losses import Groups, Items, Layout, Lists, Objective, Pairs, Scores, Totals
from diffalign.losses.advantages import group_mean, total_reward
from diffalign.losses.games import win_rates
from diffalign.losses.group_objective import GroupObjective
from diffalign.losses.regression import NFT
from diffalign.losses.supervised import RFT
from diffalign.offload import Offload
from diffalign.rounds import plain, rebuilt
from diffalign.schedules import sample_seed
from diffalign.text.batch import TextBatch, TextExample, TextRow, collate_text
from diffalign.text.generation import generate
from diffalign.text.policy import TextPolicy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """One sampled answer.

    Attributes:
        example: its prompt.
        row: prompt and answer.
        text: decoded, without special tokens.
        finished: it ended by itself.
        rewards: one per reward model; NaN where a reward function had no opinion.
        group: number of the prompt within the round.
    """

    example: TextExample
    row: TextRow
    text: str
    finished: bool
    rewards: tuple[float, ...]
    group: int


class Rollouts:
    """Samples, scores and cuts into micro-batches; this process's share of every round.

    Args:
        config: of the run.
        prompts: samples whose prompts are answered.
        policy: samples and scores.
        accelerator: processes.
        tokenizer: decodes answers.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: Sequence[TextExample],
        policy: TextPolicy,
        accelerator: Accelerator,
        tokenizer: Any,
    ) -> None:
        self.config, self.rollout, self.prompts = config, config.rollout, prompts
        self.policy, self.accelerator, self.tokenizer = policy, accelerator, tokenizer
        self.objective: Objective = config.objective
        self.models = [rewards.load_text(name, accelerator.device) for name in self.rollout.rewards]
        self.offload = Offload(self.models, self.rollout.offload_rewards)
        self.weights = self.rollout.reward_weights or (1.0,) * len(self.models)
        self.share = prompts_per_step(config)
        count = self.share * accelerator.num_processes * self.rollout.steps_per_generation
        self.plan = BatchPlan(range(len(prompts)), [(0, 0)] * len(prompts), count, config.seed)
        self._round: tuple[int, list[list[TextBatch]]] | None = None
        self.shown: list[dict[str, Any]] = []

    @property
    def steps_per_round(self) -> int:
        return self.rollout.steps_per_generation * self.rollout.num_iterations

    def passes(self) -> float:
        """How often a run answers all of its prompts."""
        rounds = math.ceil(self.config.training.max_train_steps / self.steps_per_round)
        return rounds * self.plan.batch_size / len(self.prompts)

    def micro_batches(self, first_step: int) -> Iterator[TextBatch]:
        """This process's micro-batches from an optimiser step on."""
        for step in range(first_step, self.config.training.max_train_steps):
            number, place = divmod(step, self.steps_per_round)
            if self._round is None or self._round[0] != number:
                with self.offload:
                    self._round = (number, self._make(number))
            yield from self._round[1][place % self.rollout.steps_per_generation]

    def _make(self, number: int) -> list[list[TextBatch]]:
        """The micro-batches of a round, per optimiser step."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        chosen = self.plan.micro_batch(number)
        steps = []
        for step in range(self.rollout.steps_per_generation):
            start = (step * world + rank) * self.share
            steps.append(self._answer(chosen[start : start + self.share], number, start))
        self._show(number, steps[0])
        return [self._cut(answers) for answers in steps]

    def _answer(self, chosen: list[tuple[int, int]], number: int, first_group: int) -> list[Answer]:
        count = self.rollout.samples_per_prompt
        examples = [self.prompts[index] for index, _ in chosen]
        repeats = self._repeats(chosen, first_group, number)
        prompts = [example.rows[0].ids[: example.rows[0].start] for example in examples for _ in range(count)]
        seeds = [
            sample_seed(self.config.seed, f"{example.id}/{k + again * count}", number)
            for example, again in zip(examples, repeats, strict=True)
            for k in range(count)
        ]
        sampled = generate(
            self.policy.bare,
            prompts,
            config=self.config.generation,
            seeds=seeds,
            eos_ids=self.policy.family.eos_ids,
            pad_id=self.policy.family.pad_id,
            autocast=self.policy.autocast,
        )
        texts = [self.tokenizer.decode(answer.ids, skip_special_tokens=True) for answer in sampled]
        given = self._reward([e for e in examples for _ in range(count)], texts)
        return [
            Answer(
                example=examples[n // count],
                row=TextRow(ids=(*prompts[n], *sampled[n].ids), start=len(prompts[n])),
                text=texts[n],
                finished=sampled[n].finished,
                rewards=tuple(given[n].tolist()),
                group=first_group + n // count,
            )
            for n in range(len(prompts))
        ]

    def _repeats(self, chosen: Sequence[tuple[int, int]], first: int, number: int) -> list[int]:
        """How often each prompt has come up in the round before, so that a prompt that comes twice is answered anew."""
        before = [index for index, _ in self.plan.micro_batch(number)[:first]]
        found = []
        for index, _ in chosen:
            found.append(before.count(index))
            before.append(index)
        return found

    def _reward(self, examples: Sequence[TextExample], texts: list[str]) -> Tensor:
        """Rewards (N, K) of answers, in the order of the reward models."""
        prompts = [example.prompt for example in examples]
        columns = [dict(example.columns) for example in examples]
        return torch.stack(
            [rewards.score_texts(model, prompts, texts, columns, missing=True) for model in self.models], 1
        )

    # -- from answers to micro-batches -----------------------------------------------------------------------------

    def _cut(self, answers: list[Answer]) -> list[TextBatch]:
        """This process's micro-batches of one optimiser step."""
        layout = self.objective.needs.layout
        if "groups" in layout:
            return self._groups(answers)
        if self.objective.needs.old and (old := self._old(answers)) is not None:
            answers = [replace(a, row=replace(a.row, old=values)) for a, values in zip(answers, old, strict=True)]
        examples = [made for group in by_group(answers) for made in self._compare(group)]
        return self._batches(examples)

    def _compare(self, group: list[Answer]) -> list[TextExample]:
        """What an objective without groups learns from the answers to one prompt."""
        layout, totals = self.objective.needs.layout, self._total(group)
        prompt, first = group[0].example, group[0]
        common: dict[str, Any] = {"id": prompt.id, "prompt": prompt.prompt, "columns": prompt.columns}
        mean = float(totals.mean())
        if "pairs" in layout:
            best, worst = int(totals.argmax()), int(totals.argmin())
            tie = bool(totals[best] == totals[worst])
            # A prompt without contrast teaches nothing; it stays with weight 0, so that batches keep their size.
            best, worst = (0, 1) if tie else (best, worst)
            rows = (group[best].row, group[worst].row)
            gains: tuple[float, ...] = (float(totals[best]), float(totals[worst]))
            extra = _told([group[best], group[worst]], mean)
            p, weight = (0.5, 0.0) if tie else (1.0, 1.0)
            return [TextExample(kind="pair", rows=rows, p=p, weight=weight, gains=gains, extra=extra, **common)]
        if "lists" in layout:
            gains = tuple(totals.tolist())
            extra = _told(group, mean)
            return [TextExample(kind="list", rows=tuple(a.row for a in group), gains=gains, extra=extra, **common)]
        beaten = (totals[:, None] > totals).double() + 0.5 * (totals[:, None] == totals).double()
        rates = win_rates(beaten[None])[0]
        above = (totals > totals.mean()).double()
        return [
            TextExample(
                kind="item",
                rows=(answer.row,),
                label=float(above[k]),
                target=float(rates[k]),
                extra=_told([answer], float(totals[k])),
                **common | {"id": f"{sample_seed(0, first.example.id, k):016x}"},
            )
            for k, answer in enumerate(group)
        ]

    def _total(self, answers: Sequence[Answer]) -> Tensor:
        """Weighted reward per answer; no opinion counts as nothing."""
        return total_reward(torch.tensor([a.rewards for a in answers]).double(), tuple(self.weights))

    def _batches(self, examples: list[TextExample]) -> list[TextBatch]:
        size = self._micro_batch()
        parts = [examples[i : i + size] for i in range(0, len(examples), size)]
        totals = self._totals(self._counts(examples))
        pad, device = self.policy.family.pad_id, self.accelerator.device
        mismatched = self._mismatched(examples) if "z0" in self.objective.needs.stats else None
        return [
            collate_text(
                part, pad, mismatched=mismatched[n * size : (n + 1) * size] if mismatched else None, totals=totals
            ).to(device)
            for n, part in enumerate(parts)
        ]

    def _counts(self, examples: Sequence[TextExample]) -> Totals:
        """Counts of this process's share of an optimiser step."""

        def units(of: Sequence[TextExample]) -> float:
            return float(sum(len(example.rows[0].response) for example in of))

        pairs = [example for example in examples if example.kind == "pair"]
        items = [example for example in examples if example.kind == "item"]
        positive = [example for example in items if example.label > 0.5]
        only_positive = self.objective.needs.labels == (1,)  # the others have no loss, and are not averaged over
        return Totals(
            items=float(len(positive) if only_positive else len(examples)),
            units=float(sum(len(row.response) for example in examples for row in example.rows)),
            chosen_units=units(pairs),
            chosen_prompt_units=float(sum(example.rows[0].start - 1 for example in pairs)),
            item_units=units(items),
            positive_items=float(len(positive)) if items else None,
            positive_units=units(positive) if items else None,
        )

    def _mismatched(self, examples: list[TextExample]) -> list[TextRow]:
        """Each item's prompt with an answer to another prompt of this process's step, for KTO's reference point."""
        count, limit = self.rollout.samples_per_prompt, self.config.text.max_length
        rows = []
        for n, example in enumerate(examples):
            mine, other = example.rows[0], examples[(n + count) % len(examples)].rows[0]
            rows.append(TextRow(ids=(mine.ids[: mine.start] + other.response)[:limit], start=mine.start))
        return rows

    def _groups(self, answers: list[Answer]) -> list[TextBatch]:
        size = self._micro_batch()
        group = torch.tensor([a.group for a in answers])
        reward = torch.tensor([a.rewards for a in answers])
        reward = reward * torch.tensor(self.weights)
        old = self._old(answers)
        groups = Groups(index=torch.arange(len(answers)), group=group, reward=reward)
        raw = Groups(index=groups.index, group=group, reward=torch.tensor([a.rewards for a in answers]))
        totals = self._totals(self._group_counts(answers, groups))
        advantage = self._advantage(answers, groups, raw, old)
        total = total_reward(reward)
        passed = group_mean((total > 0.5).float(), group)
        batches = []
        for start in range(0, len(answers), size):
            part = slice(start, start + size)
            examples = [
                TextExample(
                    id=f"{sample_seed(0, a.example.id, n):016x}",
                    kind="item",
                    rows=(a.row if old is None else replace(a.row, old=old[start + n]),),
                    prompt=a.example.prompt,
                    extra={
                        "pass_rate": (float(passed[start + n]),),
                        **_told([a], float(total[start + n])),
                    },
                )
                for n, a in enumerate(answers[part])
            ]
            batch = collate_text(examples, self.policy.family.pad_id, totals=totals)
            index = torch.arange(len(examples))
            cut = Groups(
                index=index,
                group=group[part],
                reward=reward[part],
                advantage=None if advantage is None else advantage[part],
            )
            batches.append(replace(batch, layout=Layout(groups=cut)).to(self.accelerator.device))
        return batches

    def _old(self, answers: list[Answer]) -> list[tuple[float, ...]] | None:
        """log p of every answer's tokens under the policy that wrote it; None where every step is taken on fresh answers."""
        if self.steps_per_round == 1 and not self.objective.needs.old:
            return None
        return [tuple(values.tolist()) for values in self._log_probs(answers, self.policy.log_probs)]

    def _log_probs(self, answers: Sequence[Answer], score: Callable[[TextBatch], Tensor]) -> list[Tensor]:
        """log p of every answer's tokens, one tensor (tokens,) each."""
        found: list[Tensor] = []
        size = self.config.generation.batch_size
        for start in range(0, len(answers), size):
            part = answers[start : start + size]
            examples = [TextExample(id="0", kind="item", rows=(a.row,)) for a in part]
            values = score(collate_text(examples, self.policy.family.pad_id).to(self.accelerator.device)).cpu()
            found += [values[n, a.row.start : len(a.row.ids)] for n, a in enumerate(part)]
        return found

    def _advantage(
        self, answers: list[Answer], groups: Groups, raw: Groups, old: list[tuple[float, ...]] | None
    ) -> Tensor | None:
        """Advantages of the whole step on every process, where the objective has them."""
        objective = self.objective
        if not isinstance(objective, GroupObjective):
            return None
        if objective.aggregate == "normalize_then_sum" and objective.reward_weights is None:
            # Weights inside the rewards would be normalised away again.
            groups, objective = raw, replace(objective, reward_weights=tuple(self.weights))
        ref = None
        theta = torch.zeros(len(answers))
        if objective.beta and objective.kl_in_reward:
            ref = torch.stack([v.sum() for v in self._log_probs(answers, self.policy.reference_log_probs)])
            known = self._log_probs(answers, self.policy.log_probs) if old is None else [torch.tensor(o) for o in old]
            theta = torch.stack([values.sum() for values in known])
        gather = self.accelerator.gather
        device = self.accelerator.device
        everywhere = Groups(
            index=torch.arange(len(answers) * self.accelerator.num_processes),
            group=gather(groups.group.to(device)).cpu(),
            reward=gather(groups.reward.contiguous().to(device)).cpu(),
        )
        scores = Scores.tokens(gather(theta.to(device)).cpu(), None if ref is None else gather(ref.to(device)).cpu())
        found = objective.advantage(scores, everywhere)
        start = self.accelerator.process_index * len(answers)
        return found[start : start + len(answers)]

    def _group_counts(self, answers: Sequence[Answer], groups: Groups) -> Totals:
        lengths = torch.tensor([float(len(answer.row.response)) for answer in answers])
        units = float(lengths.sum())
        if not isinstance(self.objective, RFT):
            return Totals(items=float(len(answers)), units=units)
        accepted = self.objective.accepted(groups)  # the others have no loss, and are not averaged over
        count, kept = float(accepted.sum()), float(lengths[accepted].sum())
        return Totals(items=count, units=units, positive_items=count, positive_units=kept)

    def _totals(self, mine: Totals) -> Totals:
        """Counts of an optimiser step over all processes; the same fields are known on each."""
        known = [f.name for f in fields(mine) if getattr(mine, f.name) is not None]
        counts = torch.tensor([getattr(mine, name) for name in known], dtype=torch.float64)
        summed = self.accelerator.reduce(counts.to(self.accelerator.device), reduction="sum").tolist()
        return Totals(**dict(zip(known, summed, strict=True)))

    def _micro_batch(self) -> int:
        size = self.config.training.train_batch_size
        assert size != "auto", "resolved before"
        return size

    # -- what people look at, and what a checkpoint stores ---------------------------------------------------------

    def _show(self, number: int, answers: list[Answer]) -> None:
        best = answers[: self.rollout.samples_per_prompt]
        self.shown = [
            {"round": number, "prompt": a.example.prompt, "answer": a.text, "rewards": list(a.rewards)} for a in best
        ]

    def state_dict(self) -> dict[str, Any]:
        """The answers of an unfinished round; nothing where every step makes its own."""
        if self._round is None or self.steps_per_round == 1:
            return {}
        number, batches = self._round
        return {"round": number, "batches": plain(batches), "processes": self.accelerator.num_processes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on within a round. Answers of other processes are not in a checkpoint: with several, the round is made anew."""
        if not state:
            return
        if state["processes"] != 1 or self.accelerator.num_processes != 1:
            log.warning("the unfinished round of samples is made anew by the current policy (several processes)")
            return
        batches = [
            [batch.to(self.accelerator.device) for batch in step] for step in rebuilt(state["batches"], _CLASSES)
        ]
        self._round = (state["round"], batches)


_CLASSES: dict[str, Any] = {c.__name__: c for c in (TextBatch, Layout, Pairs, Items, Groups, Lists, Totals)}


def _told(answers: Sequence[Answer], reward: float) -> dict[str, tuple[float, ...]]:
    """Numbers per row for the log: reward (of a pair or list the mean of its group), length in tokens, share that ended."""
    return {
        "length": tuple(float(len(answer.row.response)) for answer in answers),
        "finished": tuple(float(answer.finished) for answer in answers),
        "reward": (reward,) * len(answers),
    }


def by_group(answers: Sequence[Answer]) -> list[list[Answer]]:
    """Answers of each prompt together, in order."""
    groups: dict[int, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.group, []).append(answer)
    return list(groups.values())


def prompts_per_step(config: RunConfig) -> int:
    """Prompts that one process answers for one optimiser step.

    A step's size counts answers for objectives on groups and items, and prompts (one pair or list each) otherwise.

    Raises:
        ConfigError: the step is no whole number of groups.
    """
    training, count = config.training, config.rollout.samples_per_prompt
    assert training.train_batch_size != "auto", "resolved before"
    size = training.train_batch_size * training.gradient_accumulation_steps
    layout = config.objective.needs.layout
    if "pairs" in layout or "lists" in layout:
        return size
    if size % count or size < count:
        raise ConfigError(
            f"training: {training.train_batch_size} x {training.gradient_accumulation_steps} answers per device and step "
            f"are no multiple of rollout.samples_per_prompt {count}; change one of them"
        )
    # Advantages and pass rates are computed before a step is cut; whatever else compares answers needs them together.
    alone = isinstance(config.objective, GroupObjective) or type(config.objective) in (NFT, RFT)
    if "groups" in layout and not alone and training.train_batch_size % count:
        raise ConfigError(
            f"training.train_batch_size: got {training.train_batch_size}; objective {config.objective.name!r} compares the "
            f"answers of a group in one micro-batch: expected a multiple of rollout.samples_per_prompt {count}"
        )
    if "z0" in config.objective.needs.stats and size < 2 * count:
        raise ConfigError(
            f"training: objective {config.objective.name!r} compares with answers to other prompts, and a step has one "
            f"prompt per device; take at least {2 * count} answers (2 x rollout.samples_per_prompt)"
        )
    return size // count
