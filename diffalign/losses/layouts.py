"""Layouts: index structures over the rows of `Scores` that say what is compared with what.

Shapes: P pairs, M items, N rows, G lists of at most L rows, K rewards.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from diffalign.losses.scores import lift


def _check(owner: object, size: torch.Size, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, Tensor):
            if value.shape != size:
                raise ValueError(
                    f"{type(owner).__name__}.{name} has shape {tuple(value.shape)}; expected {tuple(size)}"
                )
            if value.is_floating_point():
                object.__setattr__(owner, name, lift(value))


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """P comparisons.

    Attributes:
        w, l: int64 rows of the chosen and the rejected item, (P,).
        p: probability that the chosen item is the preferred one, in [0, 1]; 1/2 is a tie. Scalar or (P,).
        weight: >= 0, scalar or (P,); multiplies the loss.
        margin: subtracted from z, scalar or (P,): in units of beta times log-ratios.
        uid: a stable number per pair, int64 (P,), for estimators that remember pairs.
        reward_w, reward_l: rewards of chosen and rejected, (P, K), for methods that read them.
        aspect: which preference a pair is about, int64 (P,), for methods that balance several: 0 text, 1 condition, ...
    """

    w: Tensor
    l: Tensor
    p: Tensor | float = 1.0
    weight: Tensor | float = 1.0
    margin: Tensor | float = 0.0
    uid: Tensor | None = None
    reward_w: Tensor | None = None
    reward_l: Tensor | None = None
    aspect: Tensor | None = None

    def __post_init__(self) -> None:
        _check(self, self.w.shape, ("w", "l", "p", "weight", "margin", "uid", "aspect"))
        for name in ("reward_w", "reward_l"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, lift(value if value.ndim == 2 else value[:, None]))

    def __len__(self) -> int:
        return len(self.w)

    @classmethod
    def halves(cls, pairs: int, device: torch.device | str = "cpu", **more: Any) -> Pairs:
        """The first `pairs` rows are chosen, the next `pairs` rejected, in the same order."""
        index = torch.arange(pairs, device=device)
        return cls(w=index, l=index + pairs, **more)


@dataclass(frozen=True, kw_only=True)
class Items:
    """M items without partners.

    Attributes:
        index: int64 rows, (M,).
        label: in [0, 1], (M,): 1 desirable (retain, imitate), 0 undesirable (forget).
        weight: >= 0, scalar or (M,).
        target: a number per item that the objective fits or weighs by (win rate, reward, external score), (M,).
        mismatched: int64 rows whose response belongs to another prompt, (M',): the sample of KTO's reference point.
    """

    index: Tensor
    label: Tensor | None = None
    weight: Tensor | float = 1.0
    target: Tensor | None = None
    mismatched: Tensor | None = None

    def __post_init__(self) -> None:
        _check(self, self.index.shape, ("index", "label", "weight", "target"))

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Samples of the same prompt, with rewards.

    Attributes:
        index: int64 rows, (M,).
        group: int64 id of the prompt, (M,).
        reward: (M, K); a single reward may be given as (M,).
        advantage: (M,), where it is already known (computed over the whole rollout); None computes it from `reward`.
    """

    index: Tensor
    group: Tensor
    reward: Tensor
    advantage: Tensor | None = None

    def __post_init__(self) -> None:
        _check(self, self.index.shape, ("index", "group", "advantage"))
        reward = self.reward if self.reward.ndim == 2 else self.reward[:, None]
        object.__setattr__(self, "reward", lift(reward))
        if len(reward) != len(self.index):
            raise ValueError(f"Groups.reward has {len(reward)} rows; expected {len(self.index)}")

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, kw_only=True)
class Lists:
    """G ranked lists.

    Attributes:
        index: int64 rows, (G, L); anything where `mask` is False.
        gain: relevance or reward, higher is better, (G, L).
        mask: bool (G, L); False pads short lists.
    """

    index: Tensor
    gain: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        _check(self, self.index.shape, ("index", "gain", "mask"))

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Everything that is compared in one batch; an objective reads the parts it needs.

    Attributes:
        pairs, items, groups, lists: see their classes.
        conditions: further pairs whose two rows differ in the condition instead of the response.
        on_policy: freshly sampled rows beside offline pairs.
    """

    pairs: Pairs | None = None
    items: Items | None = None
    groups: Groups | None = None
    lists: Lists | None = None
    conditions: Pairs | None = None
    on_policy: Groups | None = None

    @classmethod
    def of(cls, layout: Layout | Pairs | Items | Groups | Lists) -> Layout:
        """A layout with one part, or the layout itself."""
        if isinstance(layout, Layout):
            return layout
        if isinstance(layout, Pairs):
            return cls(pairs=layout)
        if isinstance(layout, Items):
            return cls(items=layout)
        return cls(groups=layout) if isinstance(layout, Groups) else cls(lists=layout)

    @property
    def parts(self) -> frozenset[str]:
        """Names of the parts that are there."""
        return frozenset(f.name for f in fields(self) if getattr(self, f.name) is not None)

    def need_pairs(self) -> Pairs:
        """The pairs."""
        if self.pairs is None:
            raise ValueError(
                f"this objective compares pairs; the layout has {', '.join(sorted(self.parts)) or 'nothing'}"
            )
        return self.pairs

    def need_items(self) -> Items:
        """The items."""
        if self.items is None:
            raise ValueError(f"this objective reads items; the layout has {', '.join(sorted(self.parts)) or 'nothing'}")
        return self.items

    def need_conditions(self) -> Pairs:
        """The pairs that differ in their condition."""
        if self.conditions is None:
            raise ValueError(
                f"this objective compares conditions; the layout has {', '.join(sorted(self.parts)) or 'nothing'}"
            )
        return self.conditions

    def as_items(self) -> Items:
        """The items; where there are only pairs, their rows: chosen labelled 1, rejected 0."""
        if self.items is not None or self.pairs is None:
            return self.need_items()
        w, l = self.pairs.w, self.pairs.l
        label = torch.cat([torch.ones_like(w), torch.zeros_like(l)]).to(torch.float32)
        weight = self.pairs.weight
        return Items(
            index=torch.cat([w, l]),
            label=label,
            weight=torch.cat([weight] * 2) if isinstance(weight, Tensor) else weight,
        )

    def need_groups(self) -> Groups:
        """The groups."""
        if self.groups is None:
            raise ValueError(
                f"this objective reads groups; the layout has {', '.join(sorted(self.parts)) or 'nothing'}"
            )
        return self.groups

    def need_lists(self) -> Lists:
        """The lists."""
        if self.lists is None:
            raise ValueError(f"this objective reads lists; the layout has {', '.join(sorted(self.parts)) or 'nothing'}")
        return self.lists
