"""What `diffalign list objectives` and `list rewards` tell beside names."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from diffalign import plugins, rewards
from diffalign.losses import IncompatibleObjective, Kind, Objective, catalogue

KINDS = {
    Kind.BOUND: "images",
    Kind.TOKEN: "texts",
    Kind.STEP: "trajectories",
    Kind.REWARD: "reward gradients",
    Kind.JUDGE: "judges",
}


def objective_table() -> str:
    """Name, kinds of score, status and title of every objective."""
    logging.getLogger("diffalign.losses").setLevel(logging.ERROR)  # a list is no place for advice on settings
    rows = [(name, kinds_of(cls), _status(cls), cls.title) for name, cls in sorted(catalogue().items())]
    return _columns([("name", "scores", "", "title"), *rows])


def _rewards() -> list[tuple[str, str, str]]:
    """(name, what it judges, summary) of every reward."""
    rows = []
    for name in plugins.names("rewards"):
        text = issubclass(plugins.find("rewards", name), rewards.TextReward)
        rows.append((name, "texts" if text else "images", rewards.describe(name).summary))
    return rows


def reward_table() -> str:
    """Name, what it judges and summary of every reward."""
    return _columns([("name", "judges", "summary"), *_rewards()])


def kinds_of(cls: type[Objective]) -> str:
    """What an objective can be trained on; "images*" where that needs another setting than the default."""
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    found = []
    for kind, word in KINDS.items():
        try:
            cls(**dict.fromkeys(missing, 0.1)).check(kind)
            found.append(word)
        except IncompatibleObjective as refusal:
            if refusal.instead.startswith("set objective."):
                found.append(f"{word}*")
    return " ".join(found)


def _status(cls: type[Objective]) -> str:
    return "experimental" if cls.status == "experimental" else ""


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
