"""What turns other structures into pairs, labels and segments: sibling steps, contexts, successive rankings.

Pure functions of tensors, used while batches are put together. Shapes: N rows, U units, P pairs, S steps, G prompts, C
candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from diffalign.losses.layouts import Layout, Pairs
from diffalign.losses.scores import lift

Consistency = Literal["kendall", "spearman", "top_bottom"]

# -- steps -----------------------------------------------------------------------------------------------------------


def divergence_segments(ids: Tensor, mask: Tensor, pairs: Pairs) -> Tensor:
    """`Units.segment` for `step_dpo`: 1 from the first unit on where the two rows of a pair differ, else 0; int64 (N, U).

    The k-th response unit of one row is compared with the k-th of the other. Rows that are in no pair, or equal to their
    partner, get 0. A row may be in one pair only, since siblings branch at different places: repeat rows otherwise.

    Args:
        ids: token ids, int64 (N, U), both rows of a pair aligned at the start of the response.
        mask: bool (N, U).
        pairs: siblings.
    """
    differ = (ids[pairs.w] != ids[pairs.l]) | (mask[pairs.w] != mask[pairs.l])
    started = differ.long().cumsum(1) > 0
    segment = torch.zeros_like(ids)
    segment[pairs.w] = (started & mask[pairs.w]).long()
    segment[pairs.l] = (started & mask[pairs.l]).long()
    return segment


def conservative_label(confidence: Tensor) -> Tensor:
    """`Pairs.p` of step_dpo's conservative mode: 1 - e with e = min(1 - confidence, 1/2), (P,).

    Args:
        confidence: in [0, 1], that the better sibling is better, from the two values of the tree search.
    """
    return 1 - (1 - lift(confidence)).clamp(min=0.0, max=0.5)


def worst_step(value: Tensor, mask: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The step of every failing trace to pair at: where the estimated chance of success drops most (arXiv 2406.14532?).

    DPO on (prefix before that step, a continuation that succeeds, the one taken) approximates advantage-weighted
    reinforcement learning.

    Args:
        value: share of rollouts that succeed from after each step, (N, S).
        mask: bool (N, S), the steps that exist; every trace has one.
        start: share of rollouts that succeed from the prompt, (N,).

    Returns:
        Index of the step, int64 (N,), and its advantage (value after minus value before), (N,).
    """
    value = lift(value)
    advantage = value - torch.cat([lift(start)[:, None], value[:, :-1]], 1)
    lowest = advantage.masked_fill(~mask, torch.inf).min(1)
    return lowest.indices, lowest.values


# -- contexts --------------------------------------------------------------------------------------------------------


def context_pairs(rows: Tensor) -> Layout:
    """Pairs of two responses under two contexts of which each prefers the other one (context-aware preference modelling).

    Args:
        rows: int64 (P, 4): response 1 under context A (which prefers 1), 2 under A, 1 under B (which prefers 2), 2 under B.

    Returns:
        `pairs` (2P,): the better response per context, contexts A first. `conditions` (2P,): the same response under the
        context that prefers it and under the other one, which has no bias towards a response. `uid` numbers the rows of
        `rows` in both.

    Raises:
        ValueError: another shape.
    """
    if rows.ndim != 2 or rows.shape[1] != 4:
        raise ValueError(f"context rows have shape {tuple(rows.shape)}; expected (P, 4)")
    a1, a2, b1, b2 = rows.unbind(1)
    better = torch.cat([a1, b2])
    uid = torch.arange(len(rows), device=rows.device).repeat(2)
    return Layout(
        pairs=Pairs(w=better, l=torch.cat([a2, b1]), uid=uid),
        conditions=Pairs(w=better, l=torch.cat([b1, a2]), uid=uid),
    )


# -- consistency of rankings -----------------------------------------------------------------------------------------


def rank_consistency(current: Tensor, previous: Tensor, measure: Consistency = "kendall") -> Tensor:
    """How far two models agree on the ranking of a prompt's candidates, in [0, 1], (G,): CREAM's C (arXiv 2410.12735).

    Args:
        current, previous: implicit rewards of the candidates, (G, C), C >= 2: length-normalised log-probabilities without a
            reference, log-ratios with one.
        measure: "kendall": (tau + 1) / 2, tau = (concordant - discordant pairs) / pairs; ties are neither. "spearman":
            (rho + 1) / 2, ties share ranks. "top_bottom": 1 where both name the same best and the same worst, else 0.

    Raises:
        ValueError: unknown measure, or fewer than two candidates.
    """
    one, other = lift(current), lift(previous)
    if one.shape != other.shape or one.ndim != 2 or one.shape[1] < 2:
        raise ValueError(
            f"rankings have shapes {tuple(one.shape)} and {tuple(other.shape)}; expected equal (G, C), C >= 2"
        )
    if measure == "top_bottom":
        same = (one.argmax(1) == other.argmax(1)) & (one.argmin(1) == other.argmin(1))
        return same.to(one.dtype)
    signs = [(x[:, :, None] - x[:, None, :]).sign() for x in (one, other)]
    c = one.shape[1]
    if measure == "kendall":
        return ((signs[0] * signs[1]).sum((1, 2)) / (c * (c - 1)) + 1) / 2
    if measure == "spearman":
        # A row of signs summed is a rank, centred: 2 rank - (c + 1), with ties sharing.
        first, second = signs[0].sum(2), signs[1].sum(2)
        scale = (first.square().sum(1) * second.square().sum(1)).sqrt().clamp(min=1e-12)
        return ((first * second).sum(1) / scale + 1) / 2
    raise ValueError(f"consistency measure is {measure!r}; expected kendall, spearman or top_bottom")


def join_by_key(keys: Tensor, values: Mapping[int, float]) -> Tensor:
    """The value of every key, float32 (P,): labels or weights joined to pairs by number, never by position.

    Raises:
        ValueError: a key without a value.
    """
    missing = [key for key in keys.tolist() if key not in values]
    if missing:
        raise ValueError(f"{len(missing)} keys have no value, first {missing[0]}; leave out their pairs or supply them")
    return torch.tensor([values[key] for key in keys.tolist()], dtype=torch.float32, device=keys.device)
