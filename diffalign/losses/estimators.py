"""Estimators: what has memory or looks at all processes (reference points, running means, dynamic labels).

Each is defined on the batch gathered over all processes, so one process and many give the same numbers; each is restored by
`load_state_dict(state_dict())`. What `update` returns are the `stats` an objective is called with. Two kinds of statistic:
of the whole step (scalars, or one per reward), and per row of the local layout, in its order.

`gather` must accept tensors whose first axis differs in length between processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.losses.base import Estimator
from diffalign.losses.layouts import Layout, Pairs
from diffalign.losses.scores import Scores, Totals, lift

Gather = Callable[[Tensor], Tensor]
# (scores, layout) -> values (n,) of which a mean is taken
Measure = Callable[[Scores, Layout], Tensor]


def alone(x: Tensor) -> Tensor:
    """The gather of a single process."""
    return x


def global_sums(x: Tensor, gather: Gather) -> Tensor:
    """Sum, sum of squares and count of a vector over all processes, float64 (3,)."""
    x = x.detach().double().flatten()
    local = torch.stack([x.sum(), x.square().sum(), x.new_tensor(float(x.numel()))])
    return gather(local[None]).sum(0)


def global_mean(x: Tensor, gather: Gather) -> Tensor:
    """Mean over all processes, whatever each holds; 0 if there is nothing; float64 scalar."""
    total, _, count = global_sums(x, gather)
    return total / count.clamp(min=1)


class _Remembering(Estimator):
    """State of named float64 tensors, which is empty until the first update."""

    def __init__(self) -> None:
        self._state: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        return {name: value.detach().cpu().clone() for name, value in self._state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state = {name: torch.as_tensor(value).clone() for name, value in state.items()}

    def _get(self, name: str, like: Tensor) -> Tensor | None:
        value = self._state.get(name)
        return None if value is None else value.to(like.device)


def _ema(old: Tensor | None, new: Tensor, decay: float) -> Tensor:
    # The first batch is taken whole. Started from zero without bias correction, as published code does, the first means
    # are 10 % of their value and weights built on them underflow.
    return new if old is None else decay * old + (1 - decay) * new


def _unit_interval(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; expected 0 <= {name} < 1")


# -- unpaired --------------------------------------------------------------------------------------------------------


def mismatched_partners(prompt: Tensor) -> Tensor:
    """For every row, the row whose response it is given to estimate KTO's reference point: a response to another prompt.

    Every response is used exactly once, so the estimate sees the prompts and the responses of the batch. The rows are
    sorted by prompt and rotated by the size of the largest group of equal prompts; with all prompts different that is the
    usual rotation by one. (Reversal, an alternative in use, leaves the middle of an odd batch matched.)

    Args:
        prompt: int64 id of every row's prompt, (M,).

    Returns:
        int64 (M,), a permutation without a row of the same prompt.

    Raises:
        ValueError: fewer than two prompts, or one prompt has more than half of the rows.
    """
    _, counts = prompt.unique(return_counts=True)
    if len(counts) < 2 or 2 * int(counts.max()) > len(prompt):
        raise ValueError(
            f"{len(prompt)} rows of {len(counts)} prompts cannot be mismatched; "
            "expected at least 2 prompts and none with more than half of the rows: use a larger batch"
        )
    order = torch.sort(prompt, stable=True).indices
    partner = torch.empty_like(order)
    partner[order] = order.roll(int(counts.max()))
    return partner


class KTOReference(Estimator):
    """KTO's reference point z0 = max(0, mean log-ratio), clamped after averaging over all processes; no memory.

    Stats: "z0", scalar, in nats (times beta in the objective).

    Attributes:
        source: "mismatched": over `items.mismatched`, responses scored under another prompt (arXiv 2402.01306).
            "batch": over the items themselves, as Diffusion-KTO does (arXiv 2404.04465).
    """

    def __init__(self, source: str = "mismatched") -> None:
        if source not in ("mismatched", "batch"):
            raise ValueError(f"reference_point is {source!r}; expected mismatched or batch")
        self.source = source

    def update(self, scores: Scores, layout: Layout, gather: Gather = alone) -> dict[str, Tensor]:
        items = layout.need_items()
        rows = items.index
        if self.source == "mismatched":
            if items.mismatched is None:
                raise ValueError("items.mismatched is missing; expected rows that hold a response to another prompt")
            rows = items.mismatched
            if bool(torch.isin(rows, items.index).any()):
                raise ValueError(
                    "items.mismatched contains rows of items.index: the reference point would equal the reward; "
                    "score each response under another prompt (at least 2 prompts per batch)"
                )
        log_ratio = scores.log_ratio().detach()
        return {"z0": global_mean(log_ratio[rows], gather).clamp(min=0).to(log_ratio.dtype)}


class BCODelta(_Remembering):
    """BCO's shift: running mean of the log-ratio over all items seen, both classes, the current batch included.

    Stats: "mean_log_ratio", scalar; beta times it is the paper's delta (arXiv 2404.04656).
    """

    def update(self, scores: Scores, layout: Layout, gather: Gather = alone) -> dict[str, Tensor]:
        log_ratio = scores.log_ratio().detach()
        total, _, count = global_sums(log_ratio[layout.need_items().index], gather)
        before, seen = self._get("sum", total), self._get("count", total)
        self._state["sum"] = total if before is None else before + total
        self._state["count"] = count if seen is None else seen + count
        mean = self._state["sum"] / self._state["count"].clamp(min=1)
        return {"mean_log_ratio": mean.to(log_ratio.dtype)}


# -- beta-DPO --------------------------------------------------------------------------------------------------------

_GOLDEN, _MIX1, _MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hashed_uniform(uid: Tensor, seed: int, step: int) -> Tensor:
    """A number in (0, 1) per uid, the same on every device and in every split of a batch; float64.

    splitmix64 of (uid, seed, step): random draws that depend on what is drawn for, not on where.
    """
    key = (seed * 0x9E3779B9 + step * 0x85EBCA6B + 1) % (1 << 62)
    x = (uid + key) * _GOLDEN
    x = (x ^ _shifted(x, 30)) * _MIX1
    x = (x ^ _shifted(x, 27)) * _MIX2
    x = _shifted(x ^ _shifted(x, 31), 11)  # 53 bits
    return (x.double() + 0.5) / float(1 << 53)


class BetaDPOStats(_Remembering):
    """Moments of the log-ratio differences and the filter of beta-DPO (arXiv 2407.08639).

    Stats: "mean" and "std" of Delta = rho_w - rho_l, moving averages over batches of all processes; "kept_mean", the
    mean of Delta over the pairs kept; "keep" (P,), 0 for a dropped pair and B / kept for a kept one, so that the mean of
    keep times loss is the mean over kept pairs of all processes.

    A fraction q is dropped: kept pairs are drawn without replacement with weight exp(-((Delta - mean) / std)^2 / 2). The
    draw (the largest of log weight + Gumbel noise) is a hash of seed, step and `pairs.uid`; splitting the batch does not
    change it. Differs from the official code: the moving averages start at the first batch instead of at 0.

    Attributes:
        drop: q in [0, 1).
        decay: of the moving averages.
        seed: of the draws.
    """

    def __init__(self, drop: float = 0.2, decay: float = 0.9, seed: int = 0) -> None:
        super().__init__()
        _unit_interval("drop", drop)
        _unit_interval("decay", decay)
        self.drop, self.decay, self.seed = drop, decay, seed

    def update(self, scores: Scores, layout: Layout, gather: Gather = alone) -> dict[str, Tensor]:
        pairs = layout.need_pairs()
        if pairs.uid is None:
            raise ValueError("pairs.uid is missing; the filter needs a stable number per pair")
        log_ratio = scores.log_ratio().detach()
        delta = (log_ratio[pairs.w] - log_ratio[pairs.l]).double()
        everywhere, uid = gather(delta), gather(pairs.uid)
        mean = _ema(self._get("mean", delta), everywhere.mean(), self.decay)
        std = _ema(self._get("std", delta), everywhere.std(unbiased=False), self.decay)
        step = int(self._state.get("step", torch.tensor(0)))
        self._state |= {"mean": mean, "std": std, "step": torch.tensor(step + 1)}

        def rank(of: Tensor, at: Tensor) -> Tensor:
            gumbel = -(-hashed_uniform(at, self.seed, step).log()).log()
            return gumbel - 0.5 * ((of - mean) / std.clamp(min=1e-12)).square()

        ranks = rank(everywhere, uid)
        # Rounded first: (1 - 0.2) * 5 is 3.9999... in floating point.
        kept = max(1, int(round((1 - self.drop) * len(ranks), 6)))
        bar = ranks.topk(kept).values[-1]
        chosen = ranks >= bar
        share = len(ranks) / chosen.sum()
        stats = {
            "mean": mean,
            "std": std,
            "kept_mean": everywhere[chosen].mean(),
            "keep": (rank(delta, pairs.uid) >= bar) * share,
        }
        return {name: value.to(log_ratio.dtype) for name, value in stats.items()}


# -- groups and counts -----------------------------------------------------------------------------------------------


class GroupStats(Estimator):
    """Mean and standard deviation of rewards per prompt and of the whole batch, over all processes; no memory.

    A group may be split over processes. NaN rewards count as missing.

    Stats: "group_mean", "group_std" (M, K) and "group_count" (M, K) per local item; "batch_mean", "batch_std" (K,).

    Attributes:
        unbiased: divide by n - 1 (TRL: two rewards 1 and 0 give 0.7071) or by n (NumPy's default: 0.5). The deviation of a
            single reward is 0.
    """

    def __init__(self, unbiased: bool = True) -> None:
        self.unbiased = unbiased

    def update(self, scores: Scores, layout: Layout, gather: Gather = alone) -> dict[str, Tensor]:
        groups = layout.need_groups()
        reward, gid = gather(groups.reward.detach()).double(), gather(groups.group)
        ids, place = gid.unique(return_inverse=True)
        mean, std, count = self._moments(reward, place, len(ids))
        local = torch.searchsorted(ids, groups.group)
        batch_mean, batch_std, _ = self._moments(reward, torch.zeros_like(place), 1)
        stats = {
            "group_mean": mean[local],
            "group_std": std[local],
            "group_count": count[local],
            "batch_mean": batch_mean[0],
            "batch_std": batch_std[0],
        }
        return {name: value.to(groups.reward.dtype) for name, value in stats.items()}

    def _moments(self, x: Tensor, place: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, deviation and count per bin, each (bins, K); in two passes, so that equal rewards deviate by exactly 0."""
        there = ~x.isnan()
        x = x.masked_fill(~there, 0.0)
        empty = x.new_zeros(bins, x.shape[1])
        count = empty.index_add(0, place, there.to(x.dtype))
        mean = empty.index_add(0, place, x) / count.clamp(min=1)
        # A mean of equal numbers may be off by one rounding; what differs by less than that does not deviate.
        off = (x - mean[place]).masked_fill(~there, 0.0)
        off = torch.where(off.abs() <= 1e-12 * mean[place].abs(), torch.zeros_like(off), off)
        degrees = (count - 1 if self.unbiased else count).clamp(min=1)
        return mean, (empty.index_add(0, place, off.square()) / degrees).sqrt(), count


def count_totals(
    masks: Sequence[Tensor],
    gather: Gather = alone,
    *,
    chosen: Sequence[Tensor] | None = None,
    positive: Sequence[Tensor] | None = None,
    items: float | None = None,
) -> Totals:
    """Counts over all micro-batches of this process and over all processes: `Scores.totals` of every micro-batch.

    Known before the first forward pass, since only masks are counted; DAPO divides by the units of the whole generation
    batch.

    Args:
        masks: bool (N_i, U_i) of every micro-batch; at least one.
        gather: over processes.
        chosen: int64 rows of the chosen items of every micro-batch, (P_i,).
        positive: int64 rows of the items labelled 1 of every micro-batch.
        items: what the loss of this process is averaged over, where that is not the rows (pairs, lists).
    """

    def units(rows: Sequence[Tensor]) -> Tensor:
        return torch.stack([mask[row].sum() for mask, row in zip(masks, rows)]).sum().double()

    device = masks[0].device
    number = sum(len(mask) for mask in masks) if items is None else items
    counts = [
        torch.tensor(float(number), dtype=torch.float64, device=device),
        torch.stack([mask.sum() for mask in masks]).sum().double(),
        units(chosen or []) if chosen else torch.zeros((), dtype=torch.float64, device=device),
        torch.tensor(float(sum(map(len, positive or ()))), dtype=torch.float64, device=device),
        units(positive or []) if positive else torch.zeros((), dtype=torch.float64, device=device),
    ]
    total = gather(torch.stack(counts)[None]).sum(0).tolist()
    known = positive is not None
    return Totals(
        items=total[0],
        units=total[1],
        chosen_units=total[2],
        positive_items=total[3] if known else None,
        positive_units=total[4] if known else None,
    )


class UnitCount(Estimator):
    """DAPO's denominator for a step of one micro-batch: units of the grouped rows of all processes; no memory.

    Stats: "items" and "units", scalars. With several micro-batches use `count_totals`.
    """

    def update(self, scores: Scores, layout: Layout, gather: Gather = alone) -> dict[str, Tensor]:
        mask = scores.need_units().mask[layout.need_groups().index]
        local = torch.stack([mask.new_tensor(len(mask), dtype=torch.float64), mask.sum().double()])
        items, units = gather(local[None]).sum(0)
        return {"items": items.to(scores.theta.dtype), "units": units.to(scores.theta.dtype)}


# -- labels, rewards and constraints ---------------------------------------------------------------------------------


class DynamicLabels(Estimator):
    """Labels that follow the model: p <- (1 - rate) p + rate sigma(z), per pair and visit, from p = 1 (arXiv 2412.09544).

    Stats: "p" (P,), the label after this visit. Every process remembers the labels of all, so pairs may move between
    processes from one epoch to the next.

    Attributes:
        rate: gamma in [0, 1]; 0 keeps p = 1.
        margin: (scores, pairs) -> z (P,), as in the objective.
    """

    def __init__(self, rate: float, margin: Callable[[Scores, Pairs], Tensor]) -> None:
        if not 0 <= rate <= 1:
            raise ValueError(f"rate is {rate}; expected 0 <= rate <= 1")
        self.rate, self.margin = rate, margin
        self._labels: dict[int, float] = {}

    def update(self, scores: Scores, layout: Layout, gather: Gather = alone) -> dict[str, Tensor]:
        pairs = layout.need_pairs()
        if pairs.uid is None:
            raise ValueError("pairs.uid is missing; dynamic labels need a stable number per pair")
        with torch.no_grad():
            win = self.margin(scores, pairs).double().sigmoid()
        for uid, value in zip(gather(pairs.uid).tolist(), gather(win).tolist()):
            self._labels[uid] = (1 - self.rate) * self._labels.get(uid, 1.0) + self.rate * value
        p = [self._labels[uid] for uid in pairs.uid.tolist()]
        return {"p": torch.tensor(p, dtype=scores.theta.dtype, device=scores.theta.device)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "uid": torch.tensor(list(self._labels), dtype=torch.int64),
            "p": torch.tensor(list(self._labels.values()), dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        uid, p = torch.as_tensor(state["uid"]).tolist(), torch.as_tensor(state["p"]).tolist()
        self._labels = dict(zip(uid, p))


class RewardNormaliser(_Remembering):
    """Moving mean and deviation of rewards over batches of all processes, started at the first batch.

    Stats: "reward_mean", "reward_std" (K,). See `normalised`.
    """

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        _unit_interval("decay", decay)
        self.decay = decay

    def update(self, scores: Scores, layout: Layout, gather: Gather = alone) -> dict[str, Tensor]:
        local = layout.need_groups().reward
        reward = gather(local.detach()).double()
        mean = _ema(self._get("mean", reward), reward.mean(0), self.decay)
        # Second moment about the moving mean, so that drift between batches counts as spread.
        var = _ema(self._get("var", reward), (reward - mean).square().mean(0), self.decay)
        self._state |= {"mean": mean, "var": var}
        return {"reward_mean": mean.to(local.dtype), "reward_std": var.sqrt().to(local.dtype)}

    @staticmethod
    def normalised(reward: Tensor, stats: Mapping[str, Tensor], eps: float = 1e-4) -> Tensor:
        """(reward - mean) / (deviation + eps), (M, K)."""
        return (lift(reward) - stats["reward_mean"]) / (stats["reward_std"] + eps)


def retained_imitation(scores: Scores, layout: Layout) -> Tensor:
    """Imitation loss per unit of the items with label 1 (what unlearning must retain), (R,)."""
    items = layout.need_items()
    if items.label is None or scores.imitation is None:
        raise ValueError("retained loss needs items.label and scores.imitation")
    rows = items.index[items.label > 0.5]
    loss = scores.imitation[rows]
    return loss if scores.length is None else loss / scores.need_length()[rows]


class DualVariable(_Remembering):
    """The multiplier of a constraint mean(measure) <= limit, by dual ascent: a <- clip(a + rate (mean - limit), 0, largest).

    For constrained objectives such as unlearning that must not raise the retained loss above a limit.

    Stats: "dual", the multiplier after this batch; "violation", mean - limit.
    """

    def __init__(
        self,
        *,
        limit: float,
        rate: float,
        initial: float = 1.0,
        largest: float = 100.0,
        measure: Measure = retained_imitation,
    ) -> None:
        super().__init__()
        if rate <= 0 or not 0 <= initial <= largest:
            raise ValueError(
                f"dual variable: rate {rate}, initial {initial}; expected rate > 0, 0 <= initial <= {largest}"
            )
        self.limit, self.rate, self.initial, self.largest, self.measure = limit, rate, initial, largest, measure

    def update(self, scores: Scores, layout: Layout, gather: Gather = alone) -> dict[str, Tensor]:
        violation = global_mean(self.measure(scores, layout), gather) - self.limit
        before = self._get("dual", violation)
        before = torch.full_like(violation, self.initial) if before is None else before
        self._state["dual"] = (before + self.rate * violation).clamp(0, self.largest)
        dtype = scores.theta.dtype
        return {"dual": self._state["dual"].to(dtype), "violation": violation.to(dtype)}
