"""What the image side trains on: latents, conditioning, labels, and the timestep and noise already drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffalign.losses import Items, Layout, Needs, Pairs
from diffalign.schedules import sample_seed

B = TypeVar("B", bound="Batch")


@dataclass(frozen=True, kw_only=True)
class PairExample:
    """One encoded pair, chosen first; no batch axis.

    Attributes:
        id: the record's id.
        chosen, rejected: scaled latents (C, ..., h, w).
        text: text conditioning of the prompt.
        chosen_image, rejected_image: per-image conditioning (SDXL's time ids).
        p: probability that `chosen` is preferred: in [1/2, 1] as labelled, in [0, 1] if it is what rewards say.
        weight: of the pair.
        t: timestep.
        noise: (C, ..., h, w), shared by both images.
        rejected_text: conditioning of the rejected image, where its prompt is another one.
        rejected_t, rejected_noise: where the rejected image has a timestep and noise of its own.
        rejected_x_t, rejected_target: a noisy latent and what to predict there, in place of noise on `rejected`.
        chosen_reward, rejected_reward: rewards (K,), where the data have them.
        aspect: which preference the pair is about.
        chosen_map, rejected_map: weights of the locations of the latents (h, w), where the data have them.
    """

    id: str
    chosen: Tensor
    rejected: Tensor
    text: dict[str, Tensor]
    chosen_image: dict[str, Tensor]
    rejected_image: dict[str, Tensor]
    p: float
    weight: float
    t: int
    noise: Tensor
    rejected_text: dict[str, Tensor] | None = None
    rejected_t: int | None = None
    rejected_noise: Tensor | None = None
    rejected_x_t: Tensor | None = None
    rejected_target: Tensor | None = None
    chosen_reward: Tensor | None = None
    rejected_reward: Tensor | None = None
    aspect: int | None = None
    chosen_map: Tensor | None = None
    rejected_map: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """N noisy latents to be scored.

    Attributes:
        x0: scaled latents (N, C, ..., h, w).
        noise: of the same shape.
        t: int64 timesteps (N,).
        conditioning: with a batch axis of N.
        negative: the same without the prompt, where the reference is guided.
        x_t, target: noisy latents and what to predict there, used in the rows where `given` is True.
        given: bool (N,).
        patch_weight: weights of the locations (N, h, w).
    """

    x0: Tensor
    noise: Tensor
    t: Tensor
    conditioning: dict[str, Tensor]
    negative: dict[str, Tensor] | None = None
    x_t: Tensor | None = None
    target: Tensor | None = None
    given: Tensor | None = None
    patch_weight: Tensor | None = None


class Batch:
    """Base of the batches: tensors in fields, in dictionaries and in layouts travel together."""

    def to(self: B, device: torch.device | str) -> B:
        """A copy on another device."""
        return mapped(self, lambda value: value.to(device, non_blocking=True))

    def pin_memory(self: B) -> B:
        """A copy in page-locked memory; called by the data loader."""
        return mapped(self, lambda value: value.pin_memory())


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested dataclasses, mappings and lists with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: mapped(entry, change) for name, entry in value.items()}
    if isinstance(value, list):
        return [mapped(entry, change) for entry in value]
    if hasattr(value, "__dataclass_fields__"):
        return type(value)(**{f.name: mapped(getattr(value, f.name), change) for f in fields(value)})
    return value


@dataclass(frozen=True, kw_only=True)
class PairBatch(Batch):
    """B pairs; fields as in `PairExample` with a batch axis, float32 except `t`, `rejected_t` and `aspect` (int64)."""

    ids: tuple[str, ...]
    chosen: Tensor
    rejected: Tensor
    text: dict[str, Tensor]
    chosen_image: dict[str, Tensor]
    rejected_image: dict[str, Tensor]
    p: Tensor
    weight: Tensor
    t: Tensor
    noise: Tensor
    rejected_text: dict[str, Tensor] | None = None
    rejected_t: Tensor | None = None
    rejected_noise: Tensor | None = None
    rejected_x_t: Tensor | None = None
    rejected_target: Tensor | None = None
    chosen_reward: Tensor | None = None
    rejected_reward: Tensor | None = None
    aspect: Tensor | None = None
    chosen_map: Tensor | None = None
    rejected_map: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def chosen_conditioning(self) -> dict[str, Tensor]:
        return self.text | self.chosen_image

    @property
    def rejected_conditioning(self) -> dict[str, Tensor]:
        return (self.text if self.rejected_text is None else self.rejected_text) | self.rejected_image

    def rows(self, needs: Needs) -> tuple[Rows, Layout]:
        """What goes through the network and its layout.

        Chosen and rejected rows for objectives on pairs or on items of both labels; one side where only its label is read.
        A single reward of every image is the target of its item.
        """
        count, device = len(self), self.t.device
        if "pairs" in needs.layout:
            uid = torch.tensor([sample_seed(0, name, 0) for name in self.ids], device=device)
            more = {"reward_w": self.chosen_reward, "reward_l": self.rejected_reward, "aspect": self.aspect}
            pairs = Pairs.halves(count, device, p=self.p, weight=self.weight, uid=uid, **more)
            return self.stacked(), Layout(pairs=pairs)
        if needs.labels in ((0,), (1,)):
            items = Items(
                index=torch.arange(count, device=device),
                label=torch.full((count,), float(needs.labels[0]), device=device),
                weight=self.weight,
            )
            return (self.chosen_rows() if needs.labels == (1,) else self.rejected_rows()), Layout(items=items)
        # A pair whose label is uncertain says less about each of its images.
        label = torch.cat([self.p, 1 - self.p])
        index = torch.arange(2 * count, device=device)
        weight = torch.cat([self.weight, self.weight])
        sides = (self.chosen_reward, self.rejected_reward)
        found = [side[:, 0] for side in sides if side is not None and side.shape[1] == 1]
        target = torch.cat(found) if len(found) == 2 else None
        return self.stacked(), Layout(items=Items(index=index, label=label, weight=weight, target=target))

    def chosen_rows(self) -> Rows:
        """The chosen images."""
        return Rows(
            x0=self.chosen,
            noise=self.noise,
            t=self.t,
            conditioning=self.chosen_conditioning,
            patch_weight=self.chosen_map,
        )

    def rejected_rows(self) -> Rows:
        """The rejected images, with what is their own."""
        given = torch.full((len(self),), self.rejected_x_t is not None, device=self.t.device)
        return Rows(
            x0=self.rejected,
            noise=self.noise if self.rejected_noise is None else self.rejected_noise,
            t=self.t if self.rejected_t is None else self.rejected_t,
            conditioning=self.rejected_conditioning,
            x_t=self.rejected_x_t,
            target=self.rejected_target,
            given=given,
            patch_weight=self.rejected_map,
        )

    def stacked(self, t: Tensor | None = None) -> Rows:
        """Chosen then rejected along the batch axis (2B), for one forward.

        Both images of a pair have the same timestep and the same noise, unless the rejected one has its own.

        Args:
            t: timesteps (B,) of both images, in place of the batch's.
        """
        chosen, rejected = self.chosen_rows(), self.rejected_rows()
        if t is not None:
            chosen, rejected = replace(chosen, t=t), replace(rejected, t=t)
        conditioning = {name: torch.cat([v, rejected.conditioning[name]]) for name, v in chosen.conditioning.items()}
        rows = Rows(
            x0=torch.cat([chosen.x0, rejected.x0]),
            noise=torch.cat([chosen.noise, rejected.noise]),
            t=torch.cat([chosen.t, rejected.t]),
            conditioning=conditioning,
        )
        if chosen.patch_weight is not None and rejected.patch_weight is not None:
            rows = replace(rows, patch_weight=torch.cat([chosen.patch_weight, rejected.patch_weight]))
        if rejected.x_t is not None and rejected.target is not None and rejected.given is not None:
            rows = replace(
                rows,
                x_t=torch.cat([torch.zeros_like(rejected.x_t), rejected.x_t]),
                target=torch.cat([torch.zeros_like(rejected.target), rejected.target]),
                given=torch.cat([~rejected.given, rejected.given]),
            )
        return rows


@dataclass(frozen=True, kw_only=True)
class RowBatch(Batch):
    """Rows with a layout of their own, as sampled images have it (groups, single items)."""

    ids: tuple[str, ...]
    content: Rows
    layout: Layout

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def t(self) -> Tensor:
        return self.content.t

    @property
    def weight(self) -> Tensor | float:
        return 1.0 if self.layout.items is None else self.layout.items.weight

    def rows(self, needs: Needs) -> tuple[Rows, Layout]:
        """As `PairBatch.rows`."""
        return self.content, self.layout


def collate(examples: Sequence[PairExample]) -> PairBatch:
    """Stack examples of equal latent shape; what is optional is there in all of them or in none.

    But for the text of the rejected image: where only some have one of its own, it is that of the pair in the others.
    """
    if any(e.rejected_text is not None for e in examples):
        examples = [e if e.rejected_text is not None else replace(e, rejected_text=e.text) for e in examples]
    first = examples[0]

    def stack(values: list[Any]) -> Any:
        if isinstance(values[0], Tensor):
            return torch.stack([v.float() for v in values])
        if isinstance(values[0], dict):
            return {k: stack([v[k] for v in values]) for k in values[0]}
        return torch.tensor(values, dtype=torch.int64 if isinstance(values[0], int) else torch.float32)

    present = [f.name for f in fields(PairExample) if f.name != "id" and getattr(first, f.name) is not None]
    values: dict[str, Any] = {name: stack([getattr(e, name) for e in examples]) for name in present}
    return PairBatch(ids=tuple(e.id for e in examples), **values)
