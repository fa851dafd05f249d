"""Tokenised text data in memory, and its micro-batches.

Which samples form micro-batch k is a function of the seed and the samples' ids; nothing is drawn while batches are made.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from diffalign.data.loader import BatchPlan
from diffalign.data.pipeline import is_held_out
from diffalign.data.report import DataReport
from diffalign.errors import DataError
from diffalign.losses import Totals
from diffalign.losses.base import Needs
from diffalign.text.batch import TextBatch, TextExample, TextRow, collate_text

_ONE_SIZE = (1, 1)  # texts are not bucketed


class TextData:
    """All examples of a run as flat arrays: about 4 bytes a token.

    Columns are kept where reward functions may read them: of prompts, and of the held-out share of anything else.

    Args:
        examples: in any order; consumed once.
        max_length: tokens a row may have, which made-up rows (`TextMicroBatches.mismatched`) keep to as well.
        retain: unlearning: per example whether it is to be retained; None for any other data.
        report: what happened to the rows.
        weight_by_prompt: divide every weight by the number of examples of the same prompt.
        held_out: share of the prompts that will be held out.
    """

    def __init__(
        self,
        examples: Iterable[TextExample],
        *,
        max_length: int,
        retain: Sequence[bool] | None = None,
        report: DataReport | None = None,
        weight_by_prompt: bool = False,
        held_out: float = 0.0,
    ) -> None:
        self.max_length = max_length
        self.report = report or DataReport()
        self.ids: list[str] = []
        self.kinds: list[Any] = []
        self.prompts: list[str] = []
        self._rest: list[dict[str, Any]] = []
        tokens, segments, starts = array("i"), array("i"), array("i")
        ends, last, marked = array("q"), array("q"), bytearray()
        for example in examples:
            self.ids.append(example.id)
            self.kinds.append(example.kind)
            self.prompts.append(example.prompt)
            self._rest.append(_rest(example, held_out))
            for row in example.rows:
                tokens.extend(row.ids)
                ends.append(len(tokens))
                starts.append(row.start)
                segments.extend(row.segment or ())
                marked.append(row.segment is not None)
            last.append(len(ends))
        self._tokens, self._segments = np.asarray(tokens, np.int32), np.asarray(segments, np.int32)
        self._ends, self._starts = np.asarray(ends, np.int64), np.asarray(starts, np.int64)
        self._last, self._marked = np.asarray(last, np.int64), np.frombuffer(bytes(marked), np.bool_)
        lengths = np.diff(self._ends, prepend=0)
        self._answer_lengths = lengths - self._starts
        self._segment_ends = np.cumsum(np.where(self._marked, self._answer_lengths, 0))
        self.retain = None if retain is None else np.asarray(retain, np.bool_)
        if weight_by_prompt:
            counts = Counter(self.prompts)
            for prompt, rest in zip(self.prompts, self._rest):
                rest["weight"] = rest.get("weight", 1.0) / counts[prompt]
        firsts = np.concatenate([[0], self._last[:-1]]).astype(np.int64)
        total = np.concatenate([[0], np.cumsum(self._answer_lengths)])
        self._all_units = total[self._last] - total[firsts]
        self._first_units = self._answer_lengths[firsts]
        self._first_prompts = self._starts[firsts] - 1  # nothing predicts the first token
        self._is_pair = np.array([kind == "pair" for kind in self.kinds], np.bool_)
        self._is_item = np.array([kind == "item" for kind in self.kinds], np.bool_)
        self._positive = self._is_item & np.array([rest.get("label", 1.0) > 0.5 for rest in self._rest], np.bool_)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def plain(self) -> bool:
        """No pair has a margin or an uncertain label, so a loss starts where the objective says it does."""
        return not any("margin" in rest or "p" in rest for rest in self._rest)

    @property
    def tokens(self) -> int:
        """Of all rows together."""
        return len(self._tokens)

    def row(self, number: int) -> TextRow:
        """A row by its number over all examples."""
        begin = int(self._ends[number - 1]) if number else 0
        segment = None
        if self._marked[number]:
            end = int(self._segment_ends[number])
            segment = tuple(self._segments[end - int(self._answer_lengths[number]) : end].tolist())
        ids = tuple(self._tokens[begin : self._ends[number]].tolist())
        return TextRow(ids=ids, start=int(self._starts[number]), segment=segment)

    def rows(self, index: int) -> tuple[TextRow, ...]:
        """The rows of an example."""
        first = int(self._last[index - 1]) if index else 0
        return tuple(self.row(number) for number in range(first, int(self._last[index])))

    def example(self, index: int) -> TextExample:
        """An example as it was put in."""
        return TextExample(
            id=self.ids[index],
            kind=self.kinds[index],
            prompt=self.prompts[index],
            rows=self.rows(index),
            **self._rest[index],
        )

    def totals(self, indices: Sequence[int]) -> Totals:
        """Counts over some examples, each as often as it is named, from lengths alone."""
        take = np.asarray(indices, np.int64)

        def units(of: np.ndarray, mask: np.ndarray) -> float:
            return float(of[take][mask[take]].sum())

        have_items = bool(self._is_item[take].any())
        return Totals(
            items=float(len(take)),
            units=float(self._all_units[take].sum()),
            chosen_units=units(self._first_units, self._is_pair),
            chosen_prompt_units=units(self._first_prompts, self._is_pair),
            item_units=units(self._first_units, self._is_item),
            positive_items=float(self._positive[take].sum()) if have_items else None,
            positive_units=units(self._first_units, self._positive) if have_items else None,
        )

    def split(self, held_out: float) -> tuple[list[int], list[int]]:
        """(training, held out): indices in the order of the samples' ids; no prompt is on both sides.

        Args:
            held_out: share of the prompts, in [0, 1].
        """
        order = sorted(range(len(self)), key=self.ids.__getitem__)
        out = {prompt: is_held_out(prompt, held_out) for prompt in set(self.prompts)}
        return [i for i in order if not out[self.prompts[i]]], [i for i in order if out[self.prompts[i]]]


_DEFAULTS: Mapping[str, Any] = {
    f.name: f.default
    for f in TextExample.__dataclass_fields__.values()
    if f.name in ("p", "weight", "margin", "label", "target", "gains")
}


def _rest(example: TextExample, held_out: float) -> dict[str, Any]:
    """What an example says beyond its tokens; what is as usual takes no memory."""
    rest = {name: value for name, usual in _DEFAULTS.items() if (value := getattr(example, name)) != usual}
    if example.extra:
        rest["extra"] = example.extra
    if example.columns and (example.kind == "prompt" or is_held_out(example.prompt, held_out)):
        rest["columns"] = example.columns
    return rest


# --- which samples form a micro-batch --------------------------------------------------------------------------------


class Plan(Protocol):
    """What `TextMicroBatches` asks of a plan; `diffalign.data.loader.BatchPlan` is one."""

    batch_size: int

    def micro_batch(self, k: int) -> list[tuple[int, int]]:
        """(index, visit) of the samples of micro-batch k."""
        ...


class InterleavedPlan:
    """Forget and retain samples by turns: position j of one endless sequence is a forget sample where j is even.

    Each set is shuffled by itself and starts again when it is used up, so every forget sample has one retain sample beside
    it, as in the published code of unlearning. Every micro-batch of two or more has both; with one sample per
    micro-batch they alternate.

    Args:
        forget, retain: indices of the samples.
        batch_size: samples per micro-batch.
        seed: of the shuffles.
    """

    def __init__(self, forget: Sequence[int], retain: Sequence[int], batch_size: int, seed: int) -> None:
        self.batch_size = batch_size
        self.turns = [BatchPlan(part, [_ONE_SIZE] * len(part), 1, seed) for part in (forget, retain)]

    def micro_batch(self, k: int) -> list[tuple[int, int]]:
        """(index, visit) of the samples of micro-batch k."""
        positions = range(k * self.batch_size, (k + 1) * self.batch_size)
        return [self.turns[j % 2].micro_batch(j // 2)[0] for j in positions]


def make_plan(data: TextData, indices: Sequence[int], batch_size: int, seed: int) -> Plan:
    """The plan for some samples of the data: forget and retain samples by turns (`TextData.retain`), or all shuffled.

    Args:
        data: the samples.
        indices: of those to use, as `TextData.split` returns them.
        batch_size: samples per micro-batch.
        seed: of the shuffles.

    Raises:
        DataError: no sample to train on.
    """
    if data.retain is not None:
        forget, retain = ([i for i in indices if bool(data.retain[i]) == kept] for kept in (False, True))
        if forget and retain:
            return InterleavedPlan(forget, retain, batch_size, seed)
    return BatchPlan(indices, [_ONE_SIZE] * len(indices), batch_size, seed)


class TextMicroBatches(Dataset[TextBatch]):
    """Micro-batches by number, ready for the objective.

    Args:
        data: the samples.
        plan: which samples form micro-batch k.
        pad_id: token that fills short rows.
        needs: of the objective; a "z0" among its `stats` adds a mismatched row per item.
        micro_batches_per_step: of one optimiser step, over all processes. Micro-batches k = n s ... n s + n - 1 are step s,
            and each of them carries the counts of all.

    Raises:
        DataError: the objective needs mismatched rows, and the data has one prompt or a micro-batch one sample; it reads
            pairs and items, and a micro-batch has one sample; or the data has prompts without responses.
    """

    def __init__(
        self, data: TextData, plan: Plan, *, pad_id: int, needs: Needs, micro_batches_per_step: int = 1
    ) -> None:
        self.data, self.plan, self.pad_id, self.per_step = data, plan, pad_id, micro_batches_per_step
        self.wants_mismatched = "z0" in needs.stats
        self._totals: tuple[int, Totals] | None = None
        if "prompt" in data.kinds:
            raise DataError("the data has prompts without responses, which only online objectives can use")
        if {"pairs", "items"} <= set(needs.layout) and plan.batch_size < 2:
            raise DataError(
                "this objective reads pairs and items together; training.train_batch_size is 1, at least 2 expected"
            )
        if self.wants_mismatched and (plan.batch_size < 2 or len(set(data.prompts)) < 2):
            raise DataError(
                f"this objective compares with responses to other prompts; got {len(set(data.prompts))} prompts and "
                f"{plan.batch_size} samples per micro-batch; at least 2 of both expected (training.train_batch_size)"
            )

    def __getitem__(self, k: int) -> TextBatch:
        indices = [index for index, _ in self.plan.micro_batch(k)]
        examples = [self.data.example(index) for index in indices]
        mismatched = self.mismatched(indices, k) if self.wants_mismatched else None
        return collate_text(examples, self.pad_id, mismatched=mismatched, totals=self.totals(k // self.per_step))

    def totals(self, step: int) -> Totals:
        """Counts over all micro-batches of an optimiser step, from lengths alone."""
        if self._totals is None or self._totals[0] != step:
            numbers = range(step * self.per_step, (step + 1) * self.per_step)
            indices = [index for k in numbers for index, _ in self.plan.micro_batch(k)]
            self._totals = step, self.data.totals(indices)
        return self._totals[1]

    def mismatched(self, indices: Sequence[int], k: int) -> list[TextRow]:
        """For each sample its prompt with the response of the sample before it that has another prompt (KTO, 2402.01306).

        "Before" goes around the micro-batch. Where all of it has one prompt, the next micro-batches are asked.
        """
        prompts = self.data.prompts
        rows = []
        for place, index in enumerate(indices):
            before = [indices[(place - back) % len(indices)] for back in range(1, len(indices))]
            other = next((i for i in before if prompts[i] != prompts[index]), None)
            rows.append(self._joined(index, self._elsewhere(prompts[index], k) if other is None else other))
        return rows

    def _elsewhere(self, prompt: str, k: int) -> int:
        # Every sample of the plan comes up within one epoch: there are at most as many micro-batches in it as samples.
        for number in range(k + 1, k + 2 + 2 * len(self.data)):
            for index, _ in self.plan.micro_batch(number):
                if self.data.prompts[index] != prompt:
                    return index
        raise DataError(f"all samples that are trained on have the prompt {prompt[:60]!r}; at least 2 prompts expected")

    def _joined(self, index: int, other: int) -> TextRow:
        """The prompt of one sample and the response of another, cut at `max_length`."""
        mine, theirs = self.data.rows(index)[0], self.data.rows(other)[0]
        return TextRow(ids=(mine.ids[: mine.start] + theirs.response)[: self.data.max_length], start=mine.start)
