"""A reward of pictures that runs elsewhere: `diffalign serve-reward NAME` on another machine, GPU or Python environment.

`remote:http://host:8021` asks the server at that address. A server that is gone or busy is waited for, as long as the
address says: `remote:http://host:8021?wait=600&timeout=60` (seconds; see `diffalign.http_client.Patience`). Pictures travel
without loss, so scores are those of the server's own machine. A token is taken from $DIFFALIGN_REWARD_TOKEN. The address
may stand in a variable of the environment, `remote:$PICKSCORE_SERVER`: then a run can be resumed when the server has moved,
since its config stays the same.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor

from diffalign import reward_wire as wire
from diffalign.errors import ConfigError
from diffalign.http_client import Server, parse_url
from diffalign.rewards import Reward, RewardError

log = logging.getLogger("diffalign.rewards")


class Remote(Reward):
    """What a reward server answers."""

    range = (-float("inf"), float("inf"))
    unit = "that of the reward on the server, which is logged when it is first asked"
    differentiable = False
    waits = True
    weights = None
    licence = "that of the reward on the server"
    gap = "none: pictures travel without loss, as uint8 where they are on the 8-bit grid and as float32 elsewhere"
    argument = (
        f"address, perhaps with ?wait=, timeout=, connect= or backoff= in seconds, or $VARIABLE; default {wire.ADDRESS}"
    )

    def __init__(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, address: str = wire.ADDRESS
    ) -> None:
        self.server, self.health = connect(address, "images")
        self.clips = self.health.clips  # type: ignore[misc]
        self.grouped = self.health.grouped  # type: ignore[misc]

    @classmethod
    def check_argument(cls, argument: str | None) -> None:
        if argument is not None:
            parse_url(address_of(argument), "reward remote")

    def identity(self) -> str:
        return self.health.identity

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        each = max(1, images[0].numel() * 4)
        size = min(self.health.max_batch, (self.health.max_bytes - (1 << 20)) // each)  # a MiB for texts
        if size < 1:
            raise RewardError(
                f"reward server {self.server.url} takes {self.health.max_bytes} bytes a request, a picture of "
                f"{tuple(images.shape[1:])} has {each}; start it with a larger --max-mb"
            )
        parts = whole_groups(prompts, size, self.server.url) if self.grouped else _slices(len(prompts), size)
        scores = torch.empty(len(prompts))
        for part in parts:
            texts = [prompts[i] for i in part]
            facts = [metadata[i] for i in part] if metadata is not None else None
            answer = self.server.post("/score", wire.encode_pictures(images[part], texts, facts), wire.PICTURES)
            scores[part] = wire.decode_scores(answer, len(part), self.server.url)
        return scores.to(images.device)


def _slices(count: int, size: int) -> list[list[int]]:
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def whole_groups(prompts: list[str], size: int, url: str) -> list[list[int]]:
    """Places of pictures by request, at most `size` each, all pictures of a prompt in one.

    Raises:
        RewardError: a prompt has more.
    """
    groups: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(place)
    parts: list[list[int]] = []
    for prompt, places in groups.items():
        if len(places) > size:
            raise RewardError(
                f"reward server {url} compares the pictures of a prompt and takes {size} at a time; {prompt[:80]!r} has "
                f"{len(places)}: start it with a larger --max-batch or --max-mb"
            )
        if not parts or len(parts[-1]) + len(places) > size:
            parts.append([])
        parts[-1] += places
    return parts


def address_of(argument: str) -> str:
    """The address itself, or what the variable of the environment holds that `$NAME` names.

    Raises:
        ConfigError: there is no such variable.
    """
    if not argument.startswith("$"):
        return argument
    if not (address := os.environ.get(argument[1:])):
        raise ConfigError(
            f"reward remote: {argument} is not set; set it to the address of a server, like {wire.ADDRESS}"
        )
    return address


def connect(address: str, kind: str) -> tuple[Server, wire.Health]:
    """A reward server and what it says about itself.

    Raises:
        ConfigError: it judges something else.
        ServerError, WireError: it does not answer, or is no reward server.
    """
    url, patience = parse_url(address_of(address), "reward remote")
    server = Server(url, patience, token=os.environ.get(wire.TOKEN_VARIABLE), what="reward server")
    health = wire.Health.from_json(server.get("/health"), url)
    if health.kind != kind:
        other = "remote" if health.kind == "images" else "remote_text"
        raise ConfigError(
            f"reward server {url} hosts {health.reward!r}, which judges {health.kind}; name it {other}:{url}"
        )
    low, high = health.range
    log.info(
        "reward server %s: %s, %g to %g, %s; licence: %s", url, health.reward, low, high, health.unit, health.licence
    )
    return server, health
