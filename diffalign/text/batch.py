"""What a text objective is given: tokenised rows and who is compared with whom.

Shapes: N rows, L tokens of the longest row. Rows are padded on the right; a row's response is everything from `start` on,
its end-of-sequence token included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.losses import Groups, Items, Layout, Lists, Pairs, Totals


@dataclass(frozen=True, kw_only=True)
class TextRow:
    """One tokenised sequence.

    Attributes:
        ids: prompt and response tokens.
        start: place of the first response token, >= 1.
        segment: per response token, the id of its step or phrase (0: none); None if the data has none.
        old: log p of every response token under the model that sampled it, where known.
    """

    ids: tuple[int, ...]
    start: int
    segment: tuple[int, ...] | None = None
    old: tuple[float, ...] | None = None

    @property
    def response(self) -> tuple[int, ...]:
        return self.ids[self.start :]


@dataclass(frozen=True, kw_only=True)
class TextExample:
    """One sample as the data set has it: a pair, an item or a ranked list.

    Attributes:
        id: the record's id (hexadecimal).
        kind: "pair", "item", "list", or "prompt" (no response yet; `rows` then holds one row that is all prompt).
        rows: of a pair: chosen, rejected; of an item: one; of a list: its members.
        prompt: text, for grouping and the held-out split.
        p: pairs: probability that the first row is preferred, in [1/2, 1].
        weight: in the loss.
        margin: pairs: subtracted from z.
        label: items: 1 desirable (or to retain), 0 undesirable (or to forget).
        target: items: a number that the objective fits or weighs by.
        gains: lists: relevance per row. Pairs: rewards of chosen and rejected, where the data has them.
        extra: numbers per row for `Scores.extra`, by name.
        columns: everything else the record says, for reward functions.
    """

    id: str
    kind: Literal["pair", "item", "list", "prompt"]
    rows: tuple[TextRow, ...]
    prompt: str = ""
    p: float = 1.0
    weight: float = 1.0
    margin: float = 0.0
    label: float = 1.0
    target: float | None = None
    gains: tuple[float, ...] | None = None
    extra: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TextBatch:
    """N rows and their layout.

    Attributes:
        ids: of the samples, for messages.
        input_ids: int64 (N, L).
        attention_mask: bool (N, L).
        response_mask: bool (N, L), True on response tokens.
        layout: indices into the rows.
        segment: int64 (N, L), 0 outside of segments; None if the data has none.
        old: log p under the behaviour policy per token, (N, L), 0 outside of the response; None if unknown.
        extra: (N,) each.
        totals: counts over the whole optimiser step.
    """

    ids: tuple[str, ...]
    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    layout: Layout
    segment: Tensor | None = None
    old: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    totals: Totals | None = None

    def __len__(self) -> int:
        """Number of samples (pairs, items or lists), not of rows."""
        return len(self.ids)

    def to(self, device: torch.device | str) -> TextBatch:
        """A copy on another device."""
        return _moved(self, device)  # type: ignore[no-any-return]


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {k: _moved(v, device) for k, v in value.items()}
    if isinstance(value, (TextBatch, Layout, Pairs, Items, Groups, Lists)):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})
    return value


def pad_rows(rows: list[TextRow], pad_id: int) -> dict[str, Tensor | None]:
    """Right-padded tensors of rows: `input_ids`, `attention_mask`, `response_mask`, `segment`, `old` (see `TextBatch`)."""
    longest = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    place = torch.arange(longest)
    lengths = torch.tensor([len(row.ids) for row in rows])
    starts = torch.tensor([row.start for row in rows])
    attention = place < lengths[:, None]
    segment = torch.zeros_like(input_ids) if any(row.segment is not None for row in rows) else None
    old = torch.zeros(input_ids.shape) if all(row.old is not None for row in rows) else None
    for n, row in enumerate(rows):
        input_ids[n, : len(row.ids)] = torch.tensor(row.ids, dtype=torch.int64)
        if segment is not None and row.segment is not None:
            segment[n, row.start : len(row.ids)] = torch.tensor(row.segment)
        if old is not None:
            assert row.old is not None, "all rows have it, as tested above"
            old[n, row.start : len(row.ids)] = torch.tensor(row.old)
    return {
        "input_ids": input_ids,
        "attention_mask": attention,
        "response_mask": attention & (place >= starts[:, None]),
        "segment": segment,
        "old": old,
    }


def collate_text(
    examples: list[TextExample],
    pad_id: int,
    *,
    mismatched: list[TextRow] | None = None,
    totals: Totals | None = None,
) -> TextBatch:
    """A batch of examples; kinds may be mixed.

    Rows: the chosen ones of all pairs, their rejected ones, items, members of lists, and then `mismatched` rows (a response
    under another prompt), which KTO's reference point needs.
    """
    pairs = [e for e in examples if e.kind == "pair"]
    items = [e for e in examples if e.kind == "item"]
    lists = [e for e in examples if e.kind == "list"]
    order = [(e, 0) for e in pairs] + [(e, 1) for e in pairs] + [(e, 0) for e in items]
    order += [(e, k) for e in lists for k in range(len(e.rows))]
    rows = [e.rows[k] for e, k in order]
    layout = Layout(
        pairs=_pairs(pairs) if pairs else None,
        items=_items(items, 2 * len(pairs), len(rows), len(mismatched or ())) if items else None,
        lists=_lists(lists, 2 * len(pairs) + len(items)) if lists else None,
    )
    spare = [0.0] * len(mismatched or ())
    extra = {
        name: torch.tensor([e.extra[name][k] for e, k in order] + spare, dtype=torch.float32)
        for name in examples[0].extra
    }
    padded: dict[str, Any] = pad_rows(rows + list(mismatched or ()), pad_id)
    ids = tuple(e.id for e in (*pairs, *items, *lists))
    return TextBatch(ids=ids, layout=layout, extra=extra, totals=totals, **padded)


def _pairs(examples: list[TextExample]) -> Pairs:
    rewards = [e.gains for e in examples if e.gains is not None]
    given = len(rewards) == len(examples)
    return Pairs.halves(
        len(examples),
        p=torch.tensor([e.p for e in examples]),
        weight=torch.tensor([e.weight for e in examples]),
        margin=torch.tensor([e.margin for e in examples]),
        uid=torch.tensor([int(e.id[:15], 16) for e in examples]),
        reward_w=torch.tensor([r[0] for r in rewards]) if given else None,
        reward_l=torch.tensor([r[1] for r in rewards]) if given else None,
    )


def _items(examples: list[TextExample], first: int, end: int, mismatched: int) -> Items:
    targets = [e.target for e in examples if e.target is not None]
    return Items(
        index=torch.arange(first, first + len(examples)),
        label=torch.tensor([e.label for e in examples]),
        weight=torch.tensor([e.weight for e in examples]),
        target=torch.tensor(targets) if len(targets) == len(examples) else None,
        mismatched=torch.arange(end, end + mismatched) if mismatched else None,
    )


def _lists(examples: list[TextExample], first: int) -> Lists:
    longest = max(len(e.rows) for e in examples)
    index = torch.zeros(len(examples), longest, dtype=torch.int64)
    gain = torch.zeros(len(examples), longest)
    mask = torch.zeros(len(examples), longest, dtype=torch.bool)
    for g, example in enumerate(examples):
        count = len(example.rows)
        index[g, :count] = torch.arange(first, first + count)
        gain[g, :count] = torch.tensor(example.gains if example.gains is not None else [0.0] * count)
        mask[g, :count] = True
        first += count
    return Lists(index=index, gain=gain, mask=mask)
