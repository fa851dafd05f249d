"""Whose pictures are asked for: weights of rewards or people, of a run whose network sees them, by the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign import preferences, user_branches
from diffalign.config import RunConfig
from diffalign.errors import ConfigError
from diffalign.families import DenoisingFamily
from diffalign.users import USERS_FILE, hashed, read_users


@dataclass(frozen=True)
class Asked:
    """What a network is told.

    Attributes:
        label: of files and of rows of a grid.
        facts: for the index of images.
        embedding: (d,).
    """

    label: str
    facts: dict[str, Any]
    embedding: Tensor


def sees(config: RunConfig) -> bool:
    """Whether the network of a run sees users or preferences."""
    return user_branches.wanted(config) is not None


def asked(config: RunConfig, adapter: Path | None, weights: Sequence[str], users: Sequence[str]) -> list[Asked]:
    """What a network is told, in the order of the arguments; of a run on preferences, equal weights where none are given.

    Args:
        config: of the run.
        adapter: its folder.
        weights: as `preferences.parse` reads them.
        users: ids as the data have them, or the hashed ones of files.

    Raises:
        ConfigError: the run was not trained for what is asked, or it does not know somebody.
        CheckpointError: a run on users without its file of embeddings.
    """
    rewards = config.preference.rewards
    if weights and not config.preference.seen:
        has = f"has the fixed weights {list(config.preference.fixed)}" if rewards else "was not trained on preferences"
        raise ConfigError(f"--preference: got {weights[0]!r}, and this run {has}; leave the option out")
    if users and config.users.encoder is None:
        raise ConfigError(f"--user: got {users[0]!r}, and this run was not trained on users; leave the option out")
    if not sees(config):
        return []
    if adapter is None:
        raise ConfigError("a run whose network sees users or preferences: give its run folder in place of a config")
    if config.preference.seen:
        equal = torch.full((len(rewards),), 1 / len(rewards))
        vectors = [preferences.parse(text, rewards) for text in weights] or [equal]
        return [weighed(vector, rewards) for vector in vectors]
    if not users:
        raise ConfigError(f"a run on users: give --user ID; its {USERS_FILE} has their embeddings by hashed id")
    known = read_users(adapter if adapter.is_dir() else adapter.parent)
    found = []
    for user in users:
        key = user if user in known else hashed(user)
        if key not in known:
            raise ConfigError(
                f"--user: {user!r} is none of the {len(known)} people of {adapter}; expected an id as the data have it, or "
                f"a hashed one, such as {next(iter(known))}"
            )
        found.append(Asked(f"user-{key}", {"user": key}, known[key][0]))  # ids are personal data
    return found


def weighed(vector: Tensor, rewards: Sequence[str]) -> Asked:
    """Weights (K,) as what a network is told."""
    numbers = [round(float(weight), 4) for weight in vector]
    label = "-".join(f"{number:g}" for number in numbers)
    return Asked(f"preference-{label}", {"preference": dict(zip(rewards, numbers, strict=True))}, vector)


def attach(family: DenoisingFamily, config: RunConfig, adapter: Path) -> user_branches.UserBranch:
    """Put the branch of a run, and the LoRA beside it, onto the network in memory.

    Raises:
        CheckpointError: no such file, or one that does not fit.
        ConfigError: a checkpoint folder, or an adapter for other rewards than the config says.
    """
    if (adapter / "manifest.json").is_file():
        raise ConfigError(
            f"{adapter} is a checkpoint of a run whose network sees users or preferences; its files are written at the end: "
            "give the run folder"
        )
    branch = user_branches.load(family.network, adapter)
    if branch.names != config.preference.rewards:
        raise ConfigError(
            f"{adapter} was trained on the rewards {', '.join(branch.names) or 'of no name'}, and the config's are "
            f"{', '.join(config.preference.rewards) or 'none'}; give the adapter's own run folder as the config"
        )
    return branch
