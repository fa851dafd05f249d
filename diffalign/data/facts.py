"""Further facts of a pair: rewards, the aspect it is about, maps of the latents' locations, a prompt for each image.

They stand in `Record.extra` under the names below, per image in the record's own order, and travel through the cache to the
loss. Objectives that read them say so only by failing without: `needed` finds out by rehearsal on made-up pairs.

    rewards   [[r, ...], [r, ...]]   finite numbers, higher is better; as many for image 0 as for image 1
    aspect    int                    which preference the pair is about, 0, 1, ...
    maps      [map, map]             weights of the locations, in [0, 1]: lists of rows, or paths of .npy files, of any size;
                                     a map covers the whole image
    prompts   [text, text]           each image has its own; `Record.prompt` is then the winner's
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.data.batch import PairBatch
from diffalign.errors import DataError
from diffalign.losses import Objective, Scores

REWARDS, ASPECT, MAPS, PROMPTS = "rewards", "aspect", "maps", "prompts"
READ_BY_OBJECTIVES = (REWARDS, ASPECT, MAPS)
MAX_COLUMNS = 8  # rewards per image that a rehearsal tries
EARLY = 100  # rows after which data without a needed fact are told from a few rows without it


class BadFact(ValueError):  # noqa: N818 - a verdict on one row
    """A fact of the wrong type or range: a short reason that is counted, and a detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


# --- one record ------------------------------------------------------------------------------------------------------


def check_extra(extra: Mapping[str, Any]) -> None:
    """Check types and ranges of the facts that are there; maps in files are checked when they are read (`load_map`).

    Raises:
        BadFact: with what was found and expected.
    """
    if REWARDS in extra:
        _check_rewards(extra[REWARDS])
    if ASPECT in extra:
        value = extra[ASPECT]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise BadFact("bad_aspect", f"aspect is {value!r}; 0, 1, 2, ... expected")
    if MAPS in extra:
        for value in _two(extra[MAPS], "bad_map", "maps"):
            if not isinstance(value, str):
                load_map(value)
    if PROMPTS in extra:
        for value in _two(extra[PROMPTS], "bad_prompt", "prompts"):
            if not isinstance(value, str) or not value.strip():
                raise BadFact("bad_prompt", f"prompts hold {value!r}; a text expected for each image")
    try:
        json.dumps(extra)
    except (TypeError, ValueError) as error:
        raise BadFact("bad_extra", f"extra cannot be written as JSON ({error})") from None


def _two(value: Any, reason: str, name: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise BadFact(reason, f"{name} is {_short(value)}; a list of two expected, of image 0 and of image 1")
    return value


def _check_rewards(value: Any) -> None:
    sides = _two(value, "bad_reward", REWARDS)
    for side in sides:
        if not isinstance(side, (list, tuple)) or not side or not all(_is_finite(number) for number in side):
            raise BadFact(
                "bad_reward", f"rewards hold {_short(side)}; a list of finite numbers expected for each image"
            )
    if len(sides[0]) != len(sides[1]):
        raise BadFact(
            "bad_reward", f"{len(sides[0])} rewards of image 0 and {len(sides[1])} of image 1; the same expected"
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def load_map(value: Any) -> Tensor:
    """A map as float32 (rows, columns).

    Args:
        value: a list of rows, or the path of a `.npy` file with a two-dimensional array.

    Raises:
        BadFact: it cannot be read, is not two-dimensional, or has values outside of [0, 1].
    """
    if isinstance(value, str):
        try:
            array = np.load(value, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise BadFact("bad_map", f"{Path(value).name} is not readable as .npy ({error})") from None
        what = Path(value).name
    else:
        try:
            array = np.asarray(value)
        except ValueError:
            raise BadFact("bad_map", "a map has rows of different lengths") from None
        what = "a map"
    if not isinstance(array, np.ndarray):
        raise BadFact("bad_map", f"{what} is {type(array).__name__}; one array expected")
    if array.dtype.kind not in "fiu" or array.ndim != 2 or not array.size:
        raise BadFact("bad_map", f"{what} is {array.dtype} of shape {array.shape}; rows of numbers expected")
    if not bool(((array >= 0) & (array <= 1)).all()):  # also refuses NaN
        raise BadFact("bad_map", f"{what} has values from {array.min():g} to {array.max():g}; [0, 1] expected")
    return torch.from_numpy(array.astype(np.float32))


def winners_prompt(extra: Mapping[str, Any], p: float | None) -> str:
    """Which of two prompts stands for the pair."""
    return str(extra[PROMPTS][0 if p is None or p >= 0.5 else 1])


def fit_map(
    weights: Tensor,
    resized: tuple[int, int],
    top_left: tuple[int, int],
    target: tuple[int, int],
    size: Sequence[int],
    *,
    flip: bool = False,
) -> Tensor:
    """A map of a whole image, cropped, mirrored and resized as the image was, by the area of overlap.

    Args:
        weights: (rows, columns).
        resized: (height, width) of the whole image after resizing.
        top_left: (top, left) of the crop in it.
        target: (height, width) of the crop.
        size: (h, w) wanted: that of the latents.
        flip: the image was mirrored left to right before it was cropped.
    """
    if flip:
        weights = weights.flip(1)
    across = [
        _overlap(weights.shape[axis], top_left[axis] / resized[axis], target[axis] / resized[axis], int(size[axis]))
        for axis in (0, 1)
    ]
    return (across[0] @ weights.double() @ across[1].T).float().clamp(0, 1)


def _overlap(cells: int, start: float, length: float, wanted: int) -> Tensor:
    """Shares (wanted, cells) of old cells in new ones, which divide [start, start + length] of [0, 1]; rows sum to 1."""
    edges = (start + length * torch.arange(wanted + 1, dtype=torch.float64) / wanted) * cells
    low, high = edges[:-1, None], edges[1:, None]
    cell = torch.arange(cells, dtype=torch.float64)[None]
    share = (torch.minimum(high, cell + 1) - torch.maximum(low, cell)).clamp(min=0)
    return share / share.sum(1, keepdim=True)


# --- what an objective reads -----------------------------------------------------------------------------------------


def rehearse(objective: Objective, facts: Collection[str] = (), columns: int = 1) -> None:
    """Compute an objective on two made-up image pairs, as training will.

    Args:
        objective: to be tried.
        facts: which of `READ_BY_OBJECTIVES` the pairs have.
        columns: rewards per image.

    Raises:
        ValueError: what it reads and the pairs do not have.
    """
    nothing, more = torch.zeros(2, 1, 1, 1), dict[str, Any]()
    if REWARDS in facts:
        more |= {"chosen_reward": torch.full((2, columns), 0.75), "rejected_reward": torch.full((2, columns), 0.25)}
    if ASPECT in facts:
        more["aspect"] = torch.tensor([0, 1])
    if MAPS in facts:
        more |= {"chosen_map": torch.ones(2, 1, 1), "rejected_map": torch.ones(2, 1, 1)}
    batch = PairBatch(
        ids=("a", "b"),
        chosen=nothing,
        rejected=nothing,
        text={},
        chosen_image={},
        rejected_image={},
        p=torch.ones(2),
        weight=torch.ones(2),
        t=torch.zeros(2, dtype=torch.int64),
        noise=nothing,
        **more,
    )
    rows, layout = batch.rows(objective.needs)
    missed = torch.linspace(0.3, 0.4, len(rows.x0)).view(-1, 1, 1, 1)
    supplied: dict[str, Tensor] = {}
    if objective.needs.log_snr:
        supplied["log_snr"] = torch.zeros(len(rows.x0))
    if objective.needs.patch_weight and rows.patch_weight is not None:
        supplied["patch_weight"] = rows.patch_weight
    scores = Scores.residuals(missed, missed if objective.reads_reference() else None, **supplied)
    estimator = objective.estimator()
    objective(scores, layout, None if estimator is None else estimator.update(scores, layout))


def why_not(objective: Objective, facts: Collection[str] = ()) -> str:
    """What an objective misses in pairs with these facts, whatever their number of rewards; empty if nothing."""
    said = ""
    for columns in range(1, MAX_COLUMNS + 1 if REWARDS in facts else 2):
        try:
            rehearse(objective, facts, columns)
            return ""
        except ValueError as error:  # how the losses say that something they read is not there
            said = said or str(error)
    return said


def needed(objective: Objective) -> tuple[str, ...]:
    """The facts without which an objective cannot be computed on image pairs."""
    if why_not(objective, READ_BY_OBJECTIVES):
        return ()  # not with them either: the preflight's business
    return tuple(
        fact
        for fact in READ_BY_OBJECTIVES
        if why_not(objective, [other for other in READ_BY_OBJECTIVES if other != fact])
    )


def in_all(extras: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """The facts that every pair has; rewards only if all have the same number of them."""
    found = {fact for fact in READ_BY_OBJECTIVES if all(fact in extra for extra in extras)}
    if REWARDS in found and len({len(extra[REWARDS][0]) for extra in extras}) > 1:
        found.remove(REWARDS)
    return frozenset(found)


def require(extras: Sequence[Mapping[str, Any]], reads: Mapping[str, str], objective: Objective) -> None:
    """Refuse pairs of which some lack a fact that is read.

    Args:
        extras: of all pairs.
        reads: facts that all of them must have, and what reads them.
        objective: asked whether it takes so many rewards.

    Raises:
        DataError: with the number of pairs without it.
    """
    for fact, who in reads.items():
        if lacking := sum(fact not in extra for extra in extras):
            raise DataError(
                f"{who} reads {_WHAT[fact]} of every pair; {lacking:,} of {len(extras):,} pairs have none: add them to the "
                "data, or leave those rows out with data.filter (record.extra); see docs/how-to/data.md"
            )
    if REWARDS not in reads or not extras:
        return
    numbers = Counter(len(extra[REWARDS][0]) for extra in extras)
    if len(numbers) > 1:
        said = ", ".join(f"{count:,} pairs have {number}" for number, count in sorted(numbers.items()))
        raise DataError(f"{reads[REWARDS]} reads the same number of rewards of every pair; {said}")
    if REWARDS in needed(objective):
        try:
            rehearse(objective, READ_BY_OBJECTIVES, next(iter(numbers)))
        except ValueError as error:
            raise DataError(f"the rewards do not fit objective {objective.name!r}: {error}") from error


def refuse_without(extras: Sequence[Mapping[str, Any]], reads: Mapping[str, str]) -> None:
    """Refuse data whose first pairs all lack a fact that is read.

    Raises:
        DataError: with the fact.
    """
    for fact, who in reads.items():
        if not any(fact in extra for extra in extras):
            raise DataError(
                f"{who} reads {_WHAT[fact]} of every pair; none of the first {len(extras):,} has any; see "
                "docs/how-to/data.md"
            )


_WHAT = {REWARDS: "the rewards", ASPECT: "the aspect", MAPS: "the maps"}
