"""Several rewards as one: weighted sum or harmonic mean, each brought to one scale first, with constraints.

A short one stands in the name, `mix:0.7*world_verifier+0.3*world_taste:outlined`: a weighted sum of raw scores. Anything
else, and rewards that are `.py` files, stand in a YAML file, `mix:my_mix.yaml`:

    combine: sum                      # or harmonic
    parts:
      - {reward: pickscore, weight: 1.0, scale: standardise, mean: 21.1, std: 1.3}
      - {reward: clip_score, weight: 0.5, scale: rank, statistics: base.json}
      - {reward: aesthetic, scale: range, low: 4, high: 7}
    constraints:                      # taken off: weight times how far the score is below the bound
      - {reward: image_reward, at_least: 0.0, weight: 2.0}

A part that compares the pictures of a prompt (`diversity`) makes the whole such a reward: a prompt's pictures come in one
call. Statistics are those of pictures of the reference model and stay what they are: `mean` and `std`, or a file that
`diffalign score --statistics` wrote, beside the YAML file. The arithmetic is `diffalign.reward_math`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from diffalign import reward_math, rewards
from diffalign.errors import ConfigError, did_you_mean
from diffalign.reward_math import Statistics
from diffalign.rewards import Reward

log = logging.getLogger("diffalign.rewards")

SCALES = ("none", "standardise", "rank", "range")
TERM = re.compile(r"(?:^|\+)(-?(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?)\*")


class Mix(Reward):
    """Weighted sum or harmonic mean of other rewards, with constraints."""

    range = (-math.inf, math.inf)
    unit = "that of its parts; standard deviations of the reference where they are standardised"
    differentiable = False  # an instance is, where all of its parts are and none is ranked
    weights = None
    licence = "that of its parts"
    gap = "none: this is the original"
    argument = "W*REWARD+W*REWARD..., or a YAML file with scales and constraints"

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, spec: str = "") -> None:
        self.plan = _read(spec)
        names = dict.fromkeys(entry.reward for entry in (*self.plan.parts, *self.plan.constraints))
        self.models = {
            name: rewards.load(name, device, dtype) for name in names
        }  # one of each, however often it is named
        smooth = all(entry.scale != "rank" for entry in (*self.plan.parts, *self.plan.constraints))
        self.differentiable = smooth and all(model.differentiable for model in self.models.values())  # type: ignore[misc]
        self.grouped = any(model.grouped for model in self.models.values())  # type: ignore[misc]
        self.sets = any(model.sets for model in self.models.values())  # type: ignore[misc]
        self._parts: dict[str, Tensor] = {}

    @classmethod
    def check_argument(cls, argument: str | None) -> None:
        plan = _read(argument or "")
        for entry in (*plan.parts, *plan.constraints):
            rewards.check_images(entry.reward)

    @classmethod
    def groups(cls, argument: str | None) -> bool:
        plan = _read(argument or "")
        return any(rewards.groups(entry.reward) for entry in (*plan.parts, *plan.constraints))

    @classmethod
    def of_sets(cls, argument: str | None) -> bool:
        plan = _read(argument or "")
        return any(rewards.of_sets(entry.reward) for entry in (*plan.parts, *plan.constraints))

    def identity(self) -> str:
        parts = {name: rewards.identity(name, model) for name, model in self.models.items()}
        return json.dumps([dataclasses.asdict(self.plan), parts])

    def parts(self) -> dict[str, Tensor]:
        """Raw scores by reward; under "added: NAME" and "taken off: NAME" what parts of a sum and constraints did."""
        return self._parts

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        raw = {
            name: rewards.score(model, images, prompts, metadata, batch_size=len(prompts), missing=True).to(
                images.device
            )
            for name, model in self.models.items()
        }
        scaled = torch.stack([entry.scaled(raw[entry.reward]) for entry in self.plan.parts])
        weights = [entry.weight for entry in self.plan.parts]
        told = {name: score.detach() for name, score in raw.items()}
        if self.plan.combine == "harmonic":
            total = reward_math.harmonic_mean(scaled, weights)
        else:
            total = reward_math.weighted_sum(scaled, weights)
            told |= {
                f"added: {entry.reward}": entry.weight * row.detach()
                for entry, row in zip(self.plan.parts, scaled, strict=True)
            }
        for entry in self.plan.constraints:
            loss = entry.weight * reward_math.shortfall(entry.scaled(raw[entry.reward]), entry.at_least)
            told[f"taken off: {entry.reward}"] = loss.detach()
            total = total - loss
        self._parts = told
        log.debug("mix: %s", ", ".join(f"{name} {float(score.mean()):.4g}" for name, score in told.items()))
        return total


@dataclass(frozen=True)
class _Entry:
    """One reward and what becomes of its score.

    Attributes:
        reward: its name.
        weight: of a part; of a constraint, what is taken off per unit.
        scale: one of `SCALES`.
        mean, std, low, high: for the scales that need them.
        statistics: a file with mean, std and quantiles, in their place.
        at_least: the bound of a constraint, on the scaled score.
    """

    reward: str
    weight: float = 1.0
    scale: str = "none"
    mean: float | None = None
    std: float | None = None
    low: float | None = None
    high: float | None = None
    statistics: str | None = None
    at_least: float = -math.inf
    known: Statistics | None = field(default=None, repr=False)  # what `mean`, `std` or the file say

    def scaled(self, scores: Tensor) -> Tensor:
        if self.scale == "range":
            assert self.low is not None, "checked by _entry"
            assert self.high is not None, "checked by _entry"
            return reward_math.into_range(scores, self.low, self.high)
        if self.scale == "none":
            return scores
        assert self.known is not None, "checked by _entry"
        if self.scale == "rank":
            return reward_math.rank(scores, self.known.quantiles)
        return reward_math.standardise(scores, self.known.mean, self.known.std)


@dataclass(frozen=True)
class _Plan:
    parts: tuple[_Entry, ...]
    combine: str = "sum"
    constraints: tuple[_Entry, ...] = ()


def _read(spec: str) -> _Plan:
    if not spec.endswith((".yaml", ".yml")):
        return _Plan(tuple(_terms(spec)))
    path = Path(spec)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"mix: {spec} cannot be read: {error}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("parts"), list) or not tree["parts"]:
        raise ConfigError(f"mix: {spec} has no list 'parts'; write parts: [{{reward: NAME, weight: 1.0}}, ...]")
    _known(spec, "", tree, ("parts", "combine", "constraints"))
    if (combine := tree.get("combine", "sum")) not in ("sum", "harmonic"):
        raise ConfigError(f"mix: {spec}: combine is {combine!r}; sum or harmonic expected")
    if not isinstance(tree.get("constraints") or [], list):
        raise ConfigError(f"mix: {spec}: constraints is no list")
    parts = tuple(_entry(path, f"parts[{i}]", entry) for i, entry in enumerate(tree["parts"]))
    bounds = tuple(
        _entry(path, f"constraints[{i}]", entry, bound=True) for i, entry in enumerate(tree.get("constraints") or [])
    )
    if combine == "harmonic" and (
        wrong := [p.reward for p in parts if p.scale not in ("rank", "range") or p.weight <= 0]
    ):
        raise ConfigError(
            f"mix: {spec}: a harmonic mean needs scores in [0, 1] and positive weights; give {wrong[0]} scale: range or rank"
        )
    return _Plan(parts, combine, bounds)


def _terms(spec: str) -> list[_Entry]:
    found = list(TERM.finditer(spec))
    if not found or found[0].start() > 0:
        raise ConfigError(
            f"mix: got {spec!r}; expected weights and rewards like mix:0.7*pickscore+0.3*aesthetic, or a .yaml file"
        )
    ends = [match.start() for match in found[1:]] + [len(spec)]
    return [
        _Entry(_named("mix", spec[match.end() : end]), float(match[1])) for match, end in zip(found, ends, strict=True)
    ]


def _entry(path: Path, place: str, given: Any, *, bound: bool = False) -> _Entry:
    where = f"mix: {path}: {place}"
    if not isinstance(given, dict) or not isinstance(given.get("reward"), str):
        raise ConfigError(f"{where}: {given!r}; expected {{reward: NAME, weight: 1.0}}")
    fields = [f.name for f in dataclasses.fields(_Entry) if f.name != "known" and (bound or f.name != "at_least")]
    _known(str(path), f"{place}.", given, fields)
    if bound and "at_least" not in given:
        raise ConfigError(f"{where}: at_least is missing")
    values = dict(given)
    for key in ("weight", "mean", "std", "low", "high", "at_least"):
        if key in values:
            try:
                values[key] = float(values[key])
            except (TypeError, ValueError):
                values[key] = math.nan
            if not math.isfinite(values[key]):
                raise ConfigError(f"{where}: {key} is {given[key]!r}; a number expected")
    entry = _Entry(**values)
    _named(where, entry.reward)
    if entry.scale not in SCALES:
        near = did_you_mean(str(entry.scale), SCALES)
        raise ConfigError(f"{where}: scale {entry.scale!r} not found{near} Available: {', '.join(SCALES)}")
    if entry.scale == "range" and not (entry.low is not None and entry.high is not None and entry.low < entry.high):
        raise ConfigError(f"{where}: scale range needs low and high, low below high")
    if entry.scale not in ("standardise", "rank"):
        return entry
    if entry.statistics is not None:
        known = reward_math.load_statistics(path.parent / entry.statistics, entry.reward)
    elif entry.mean is not None and entry.std is not None:
        if entry.std <= 0:
            raise ConfigError(f"{where}: std is {entry.std}; a positive number expected")
        known = Statistics(entry.mean, entry.std)
    else:
        raise ConfigError(f"{where}: scale {entry.scale} needs statistics: FILE, or mean and std")
    if entry.scale == "rank" and not known.quantiles:
        raise ConfigError(f"{where}: scale rank needs statistics: FILE with quantiles")
    return dataclasses.replace(entry, known=known)


def _named(where: str, reward: str) -> str:
    if rewards.split_name(reward)[0] == "mix":
        raise ConfigError(f"{where}: a mix in a mix; name its parts instead")
    return reward


def _known(spec: str, place: str, given: dict[str, Any], known: Any) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(
                f"mix: {spec}: {place}{key}: unknown key{did_you_mean(str(key), known)} Known: {', '.join(known)}"
            )
