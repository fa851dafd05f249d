"""What the image side trains on: latents, conditioning, labels, and the timestep and noise already drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from diffalign.losses import Items, Layout, Needs, Pairs
from diffalign.schedules import sample_seed


@dataclass(frozen=True, kw_only=True)
class PairExample:
    """One encoded pair, chosen first; no batch axis.

    Attributes:
        id: the record's id.
        chosen, rejected: scaled latents (C, h, w).
        text: text conditioning of the prompt.
        chosen_image, rejected_image: per-image conditioning (SDXL's time ids).
        p: probability that `chosen` is preferred, in [1/2, 1].
        weight: of the pair.
        t: timestep.
        noise: (C, h, w), shared by both images.
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


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """B pairs; fields as in `PairExample` with a batch axis, float32 except `t` (int64)."""

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

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> PairBatch:
        """A copy on another device."""
        return self._map(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> PairBatch:
        """A copy in page-locked memory; called by the data loader."""
        return self._map(lambda value: value.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> PairBatch:
        def each(value: object) -> object:
            if isinstance(value, Tensor):
                return change(value)
            return {k: change(v) for k, v in value.items()} if isinstance(value, dict) else value

        return PairBatch(**{f.name: each(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]

    @property
    def chosen_conditioning(self) -> dict[str, Tensor]:
        return self.text | self.chosen_image

    @property
    def rejected_conditioning(self) -> dict[str, Tensor]:
        return self.text | self.rejected_image

    def rows(self, needs: Needs) -> tuple[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]], Layout]:
        """What goes through the network, as arguments of `Policy.errors`, and its layout.

        Chosen and rejected rows for objectives on pairs or on items of both labels; one side where only its label is read.
        """
        count, device = len(self), self.t.device
        if "pairs" in needs.layout:
            uid = torch.tensor([sample_seed(0, name, 0) for name in self.ids], device=device)
            return self.stacked(), Layout(pairs=Pairs.halves(count, device, p=self.p, weight=self.weight, uid=uid))
        index = torch.arange(count, device=device)
        if needs.labels == (1,):
            items = Items(index=index, label=torch.ones(count, device=device), weight=self.weight)
            return (self.chosen, self.noise, self.t, self.chosen_conditioning), Layout(items=items)
        if needs.labels == (0,):
            items = Items(index=index, label=torch.zeros(count, device=device), weight=self.weight)
            return (self.rejected, self.noise, self.t, self.rejected_conditioning), Layout(items=items)
        # A pair whose label is uncertain says less about each of its images.
        label = torch.cat([self.p, 1 - self.p])
        index = torch.arange(2 * count, device=device)
        weight = torch.cat([self.weight, self.weight])
        return self.stacked(), Layout(items=Items(index=index, label=label, weight=weight))

    def stacked(self) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Chosen then rejected along the batch axis (2B), for one forward: latents, noise, timesteps, conditioning.

        Both images of a pair get the same timestep and the same noise.
        """
        conditioning = {
            name: torch.cat([value, self.rejected_conditioning[name]])
            for name, value in self.chosen_conditioning.items()
        }
        latents = torch.cat([self.chosen, self.rejected])
        return latents, torch.cat([self.noise, self.noise]), torch.cat([self.t, self.t]), conditioning


def collate(examples: Sequence[PairExample]) -> PairBatch:
    """Stack examples of equal latent shape."""

    def stack(values: list[Tensor]) -> Tensor:
        return torch.stack([v.float() for v in values])

    def stack_all(values: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {k: stack([v[k] for v in values]) for k in values[0]}

    return PairBatch(
        ids=tuple(e.id for e in examples),
        chosen=stack([e.chosen for e in examples]),
        rejected=stack([e.rejected for e in examples]),
        text=stack_all([e.text for e in examples]),
        chosen_image=stack_all([e.chosen_image for e in examples]),
        rejected_image=stack_all([e.rejected_image for e in examples]),
        p=torch.tensor([e.p for e in examples], dtype=torch.float32),
        weight=torch.tensor([e.weight for e in examples], dtype=torch.float32),
        t=torch.tensor([e.t for e in examples], dtype=torch.int64),
        noise=stack([e.noise for e in examples]),
    )
