"""A reward of texts that runs elsewhere: see `remote`, which is the same for pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffalign import reward_wire as wire
from diffalign.http_client import parse_url
from diffalign.rewards import TextReward
from reward_models.remote import address_of, connect


class RemoteText(TextReward):
    """What a reward server answers about texts."""

    range = (-float("inf"), float("inf"))
    unit = "that of the reward on the server, which is logged when it is first asked"
    weights = None
    licence = "that of the reward on the server"
    gap = "none: the server calls the reward itself"
    argument = (
        f"address, perhaps with ?wait=, timeout=, connect= or backoff= in seconds, or $VARIABLE; default {wire.ADDRESS}"
    )

    def __init__(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, address: str = wire.ADDRESS
    ) -> None:
        self.server, self.health = connect(address, "texts")

    @property
    def name(self) -> str:
        return f"{self.health.reward} at {self.server.url}"

    @classmethod
    def check_argument(cls, argument: str | None) -> None:
        if argument is not None:
            parse_url(address_of(argument), "reward remote_text")

    def identity(self) -> str:
        return self.health.identity

    def __call__(
        self, prompts: list[str], completions: list[str], metadata: list[dict[str, Any]] | None = None
    ) -> Tensor:
        scores, size = [], self.health.max_batch
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            body = wire.encode_texts(prompts[part], completions[part], metadata[part] if metadata is not None else None)
            answer = self.server.post("/score", body, wire.JSON)
            scores.append(wire.decode_scores(answer, len(prompts[part]), self.server.url))
        return torch.cat(scores) if scores else torch.zeros(0)
