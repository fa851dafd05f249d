"""References on LoRA weights: the base, a copy of the policy that follows it, and mixtures of both.

A reference is the same network with other adapter weights, never a second network. `parts` lists what is mixed: the score
of the reference is the weighted sum of the parts' scores, with weights that sum to 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.adapters import adapters_off
from diffalign.config import ReferenceConfig
from diffalign.losses.references import blend, lag_decay, sync_due
from diffalign.schedules import generator_for

Snapshot = list[Tensor]


@contextmanager
def swapped(params: Sequence[nn.Parameter], weights: Snapshot) -> Iterator[None]:
    """Inside, parameters have other values; for no-grad forwards that come before the policy's."""
    saved = [p.data for p in params]
    try:
        for param, value in zip(params, weights, strict=True):
            param.data = value
        yield
    finally:
        for param, value in zip(params, saved, strict=True):
            param.data = value


class Reference:
    """The reference of a run.

    Args:
        config: the scheme.
        network: the bare network with its adapters.
        params: the adapter's parameters.
        seed: of the draws from a pool.
    """

    def __init__(
        self, config: ReferenceConfig, network: nn.Module, params: Sequence[nn.Parameter], seed: int = 0
    ) -> None:
        self.config, self.network, self.params, self.seed = config, network, list(params), seed
        self.pool: list[Snapshot] = []  # earlier copies, oldest first; the base comes before them
        moving = config.scheme not in ("frozen", "pool")
        self.copy: Snapshot | None = self._snapshot() if moving else None
        self.before: Snapshot | None = self._snapshot() if config.scheme == "momentum" else None

    def _snapshot(self) -> Snapshot:
        return [p.detach().clone() for p in self.params]

    def parts(self) -> list[tuple[float, Snapshot | None]]:
        """(weight, adapter weights; None for adapters off) of everything that is mixed."""
        if self.config.scheme == "mixture":
            share = self.config.base_share
            return [(share, None), (1 - share, self.copy)]
        if self.config.scheme == "momentum":
            # log pi <- log pi_1 + a (log pi_1 - log pi_0): linear in log-probabilities, not in LoRA factors.
            return [(1 + self.config.momentum, self.copy), (-self.config.momentum, self.before)]
        return [(1.0, self.copy)]

    @contextmanager
    def active(self, weights: Snapshot | None) -> Iterator[None]:
        """Inside, the network computes with these adapter weights; for no-grad forwards that come before the policy's."""
        with adapters_off(self.network) if weights is None else swapped(self.params, weights):
            yield

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Follow the policy, where the scheme says so at this step."""
        if self.config.scheme == "pool" and sync_due(step, self.config.every):
            # The newest copy is the policy itself; one of the k before it is drawn, the base among them.
            drawn = torch.randint(len(self.pool) + 1, (), generator=generator_for(self.seed, "pool", step))
            self.copy = None if drawn == 0 else self.pool[int(drawn) - 1]
            self.pool.append(self._snapshot())
            return
        if self.copy is None or not sync_due(step, self.config.every):
            return
        if self.before is not None:
            self.before = [value.clone() for value in self.copy]
        blend(self.copy, self.params, self.config.rate)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores: nothing for a frozen reference."""
        state: dict[str, Any] = {"copy": self.copy, "before": self.before, "pool": self.pool or None}
        return {name: value for name, value in state.items() if value is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, values in state.items():
            setattr(self, name, [self._here(v) for v in values] if name == "pool" else self._here(values))

    def _here(self, values: Sequence[Tensor]) -> Snapshot:
        return [value.to(p.device) for value, p in zip(values, self.params, strict=True)]


class Lagged:
    """The behaviour policy: a copy of the adapter that samples, and follows the policy from round to round.

    Args:
        params: the adapter's parameters.
        schedule: how much of the copy is kept at the end of a round; see `lag_decay`.
    """

    def __init__(self, params: Sequence[nn.Parameter], schedule: str | float) -> None:
        self.params, self.schedule = list(params), schedule
        self.copy: Snapshot = [p.detach().clone() for p in self.params]
        self.round = 0

    def active(self) -> AbstractContextManager[None]:
        """Inside, the network computes with the copy."""
        return swapped(self.params, self.copy)

    @torch.no_grad()
    def start_round(self, number: int, step: int) -> None:
        """Follow the policy when a later round than the copy's begins, at an optimiser step."""
        if number > self.round:
            blend(self.copy, self.params, 1 - lag_decay(self.schedule, step))
            self.round = number

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        return {"copy": self.copy, "round": self.round}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.copy = [value.to(p.device) for value, p in zip(state["copy"], self.params, strict=True)]
        self.round = int(state["round"])
