"""Networks of rewards that wait in the CPU's memory while the policy trains (`rollout.offload_rewards`).

A reward says what its networks are (`RewardModel.networks`); nothing here knows one. Rewards on a server have none, and
networks that are on the CPU anyway, or spread over several devices, stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import nn

from diffalign.rewards import RewardModel

REST = torch.device("cpu")


def home(network: nn.Module) -> torch.device | None:
    """The one device of a network's tensors; None if there are several, or no tensors."""
    places = {tensor.device for tensor in chain(network.parameters(), network.buffers())}
    return places.pop() if len(places) == 1 else None


class Offload:
    """A context in which rewards are where they compute; outside of it their networks are in the CPU's memory.

    Args:
        models: loaded rewards, where they compute.
        wanted: False leaves them there.
    """

    def __init__(self, models: Sequence[RewardModel], wanted: bool) -> None:
        self.models = models if wanted else ()
        self._away: list[tuple[nn.Module, torch.device]] = []
        self._leave()

    def __enter__(self) -> None:
        for network, device in self._away:
            network.to(device)
        self._away = []

    def __exit__(self, *error: object) -> None:
        self._leave()

    def _leave(self) -> None:
        """Move everything, also what a reward has loaded since."""
        for network in chain.from_iterable(model.networks() for model in self.models):
            device = home(network)
            if device is not None and device != REST:
                self._away.append((network, device))
                network.to(REST)
