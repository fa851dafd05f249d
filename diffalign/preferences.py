"""Weights of several rewards as what a pair is judged by and what the network sees: one adapter for every trade.

At every visit of a pair weights p are drawn from a Dirichlet distribution on the simplex, sum p_k = 1; the chosen image is
the one with the larger p . r, where r are the rewards of the pair's images on one scale, and the network is told p. When
images are sampled the trade is chosen by p: a whole front from one adapter.

Ideas: "Arithmetic Control of LLMs for Diverse User Preferences", arXiv 2402.18571 (DPA: a direction of rewards as a
condition; there written into the prompt, with rejection sampling, and unit vectors in place of sums of 1). A condition of
the network and preference losses in place of supervised ones are how we bring it to denoisers; there is no paper on it that
we could name. Mixtures of adapters (arXiv 2306.04488) and MODPO (2310.03708) are what it is compared with.

What is a function of what: p of (seed, pair, visit); the scale of the rewards of the training pairs alone. Every row of a
batch says which image is better: where p leaves the two closer than `preference.margin`, another p is drawn, so that no row
counts 0 and means over rows stay what they were. Weights under which a pair says nothing are thus not drawn for that pair;
pairs that no weights decide are left out. Without weights ("no preference", `preference.dropout` of the visits) pairs are
labelled by equal weights, the mean of the distribution, and not by their own label, which is a judge's who may be none of
the rewards.

Shapes: K rewards, N images.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.config import PreferenceConfig
from diffalign.data.encode import EncodedPair
from diffalign.data.facts import REWARDS
from diffalign.data.loader import PairMicroBatches
from diffalign.errors import ConfigError, DataError
from diffalign.evaluate import held_out_hits
from diffalign.policy import Policy
from diffalign.progress import Progress
from diffalign.schedules import generator_for, sample_seed
from diffalign.statistics import bootstrap_rate

log = logging.getLogger(__name__)
TRIES = 200  # draws of weights for one row
MEASURED = 1000  # pairs that are ranked at the end, at most
Floats = np.ndarray[Any, np.dtype[np.float64]]


class Scale:
    """Rewards on a scale that is common to all of them.

    Args:
        kind: "rank": the share of the known images with a lower reward, equal ones count one half, in [0, 1]; "deviation":
            divided by the standard deviation; "raw".
        known: rewards of the training images, (N, K).
    """

    def __init__(self, kind: str, known: Floats) -> None:
        self.kind = kind
        self.sorted = np.sort(known, axis=0)
        deviation = known.std(0)
        self.deviation = np.where(deviation > 0, deviation, 1.0)

    def __call__(self, rewards: Floats) -> Floats:
        """Rewards (..., K) to the scale, float64."""
        if self.kind == "raw":
            return rewards
        if self.kind == "deviation":
            return rewards / self.deviation
        found = np.empty_like(rewards)
        for k in range(rewards.shape[-1]):
            column, asked = self.sorted[:, k], rewards[..., k]
            below, up_to = np.searchsorted(column, asked, "left"), np.searchsorted(column, asked, "right")
            found[..., k] = (below + up_to) / (2 * len(column))
        return found


class Preferences:
    """Weights and labels of the pairs of a data set.

    Args:
        config: of the run; `rewards` names them.
        scale: of their rewards.
        seed: of the weights.
    """

    def __init__(self, config: PreferenceConfig, scale: Scale, seed: int) -> None:
        self.config, self.scale, self.seed = config, scale, seed
        self.width = len(config.rewards)
        self.equal = np.full(self.width, 1 / self.width)

    def ahead(self, rewards: Sequence[Sequence[float]]) -> Floats:
        """By how much image 0 of a pair is ahead of image 1 by each reward, on the scale, (K,)."""
        first, second = self.scale(np.array(rewards, dtype=np.float64))
        return np.asarray(first - second)

    def decided(self, ahead: Floats, weights: Floats) -> bool:
        """Whether weights tell the images of a pair apart."""
        gap = abs(float(ahead @ weights))
        return gap >= self.config.margin and gap > 0

    def useful(self, ahead: Floats) -> bool:
        """Whether a pair is decided by the fixed weights, or else by some."""
        if self.config.fixed:
            return self.decided(ahead, np.array(self.config.fixed))
        return any(self.decided(ahead, corner) for corner in np.eye(self.width))

    def draw(self, pair_id: str, visit: int, ahead: Floats, *, measured: bool = False) -> tuple[Floats, bool]:
        """Weights of a visit, (K,), and whether the network sees them.

        Args:
            pair_id: of the pair.
            visit: earlier appearances.
            ahead: of the pair.
            measured: not trained: weights are always seen.
        """
        if self.config.fixed:
            return np.array(self.config.fixed), False
        # The standard library's, whose streams stay the same from version to version.
        rng = random.Random(sample_seed(self.seed, f"{pair_id} preference", visit))
        if rng.random() < self.config.dropout and not measured and self.decided(ahead, self.equal):
            return self.equal, False
        for _ in range(TRIES):
            parts = np.array([rng.gammavariate(self.config.concentration, 1.0) for _ in range(self.width)])
            if parts.sum() > 0 and self.decided(ahead, weights := parts / parts.sum()):
                return weights, True
        return np.eye(self.width)[np.abs(ahead).argmax()], True

    def seen(self, pair: EncodedPair, visit: int, *, measured: bool = False) -> tuple[EncodedPair, Tensor | None]:
        """A pair as a visit judges it, and what the network sees, float32 (K,): zeros for no preference; None: nothing ever.

        Args:
            pair: with rewards.
            visit: earlier appearances.
            measured: not trained: weights are always seen.
        """
        ahead = self.ahead(pair.extra[REWARDS])
        weights, shown = self.draw(pair.id, visit, ahead, measured=measured)
        return judged(pair, float(ahead @ weights)), self._told(weights if shown else np.zeros(self.width))

    def _told(self, weights: Floats) -> Tensor | None:
        return torch.tensor(weights, dtype=torch.float32) if self.config.seen else None


def judged(pair: EncodedPair, ahead: float) -> EncodedPair:
    """A pair with the label of a difference: 1, 0, or 1/2 for none."""
    return replace(pair, p=0.5 if ahead == 0 else float(ahead > 0))


@dataclass(frozen=True)
class Asked:
    """Pairs labelled by one weighted sum and shown with other weights; for measurements.

    Attributes:
        of: scale and margin.
        label: weights of the label, (K,).
        told: what the network sees, (K,).
    """

    of: Preferences
    label: Floats
    told: Floats

    def seen(self, pair: EncodedPair, visit: int, *, measured: bool = False) -> tuple[EncodedPair, Tensor | None]:
        """As `Preferences.seen`; a pair that the label does not decide has label 1/2."""
        ahead = self.of.ahead(pair.extra[REWARDS])
        gap = float(ahead @ self.label) if self.of.decided(ahead, self.label) else 0.0
        return judged(pair, gap), self.of._told(self.told)


def prepare(
    extras: Sequence[Mapping[str, Any]], trained: Sequence[int], config: PreferenceConfig, seed: int
) -> tuple[Preferences, Floats]:
    """Preferences over pairs, and by how much image 0 is ahead in each of them.

    Args:
        extras: of all pairs.
        trained: those whose rewards make the scale.
        config: of the run.
        seed: of the weights.

    Returns:
        The preferences, and differences (pairs, K).

    Raises:
        DataError: rows have another number of rewards than names.
    """
    width, names = len(config.rewards), ", ".join(config.rewards)
    if (found := len(extras[0][REWARDS][0])) != width:
        raise DataError(
            f"preference.rewards: {width} names ({names}) for {found} rewards of every image; name them in the order of the "
            "data's columns"
        )
    known = np.array([side for index in trained for side in extras[index][REWARDS]], dtype=np.float64)
    made = Preferences(config, Scale(config.scale, known), seed)
    ahead = np.stack([made.ahead(extra[REWARDS]) for extra in extras])
    log.info("preference: correlation of the rewards' differences: %s", _said(correlation(ahead[list(trained)])))
    return made, ahead


def correlation(ahead: Floats) -> list[list[float]]:
    """Of differences (pairs, K): 1 says the same image is ahead by two rewards, so that both are one vote; (K, K)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Any = np.corrcoef(ahead, rowvar=False)
    rows: list[list[float]] = np.nan_to_num(found).round(4).tolist()
    return rows


def _said(rows: Sequence[Sequence[float]]) -> str:
    return "; ".join(" ".join(f"{value:.2f}" for value in row) for row in rows)


def by_reward(
    policy: Policy, dataset: PairMicroBatches, preferences: Preferences, held_out: Sequence[int]
) -> list[dict[str, Any]]:
    """How pairs that were not trained on are ranked by each reward alone, with the weights that the network can be given.

    Args:
        policy: with the trained adapter.
        dataset: of the run.
        preferences: of the run.
        held_out: pairs.

    Returns:
        An entry for each weights asked for (of fixed ones those; else all on one reward) with `weights` and, by reward,
        accuracy with its 95 % interval and the number of pairs.
    """
    names = preferences.config.rewards
    corners = np.eye(len(names))
    asked = [np.array(preferences.config.fixed)] if preferences.config.fixed else list(corners)
    if len(held_out) > MEASURED:
        order = torch.randperm(len(held_out), generator=generator_for(preferences.seed, "measured preference", 0))
        held_out = [held_out[i] for i in sorted(order[:MEASURED].tolist())]
    found: list[dict[str, Any]] = []
    with Progress("ranking pairs by reward", len(asked) * len(names) * len(held_out), "pair") as progress:
        for weights in asked:
            entry: dict[str, Any] = {"weights": [round(float(w), 4) for w in weights]}
            for name, corner in zip(names, corners, strict=True):
                dataset.preferences = Asked(preferences, corner, weights)
                try:
                    hits = held_out_hits(policy, dataset, held_out, progress=progress.advance)
                finally:
                    dataset.preferences = preferences
                if hits:
                    one = bootstrap_rate(list(hits.values()))
                    entry[name] = {
                        "accuracy": one.mean,
                        "ci_low": one.ci_low,
                        "ci_high": one.ci_high,
                        "pairs": one.count,
                    }
            found.append(entry)
    return found


def parse(text: str, names: Sequence[str], option: str = "--preference") -> Tensor:
    """Weights as people write them, "0.7,0.3" or "outlined=0.7,pastel=0.3" (others 0), float32 (K,).

    Args:
        text: of the command line.
        names: of the rewards, in order.
        option: for errors.

    Raises:
        ConfigError: another number of weights, an unknown name, a negative weight, or a sum that is not 1.
    """
    wanted = f"{option}: got {text!r}; expected {len(names)} weights >= 0 with sum 1, of {', '.join(names)}"
    found: dict[str, float] = {}
    parts = [part.strip() for part in text.split(",")]
    named = all("=" in part for part in parts)
    if not named and len(parts) != len(names):
        raise ConfigError(f"{wanted}; these are {len(parts)}")
    for place, part in enumerate(parts):
        name, _, number = part.rpartition("=") if named else (names[place], "", part)
        if name not in names or name in found:
            raise ConfigError(f"{wanted}; {name!r} is {'named twice' if name in found else 'no reward of it'}")
        try:
            found[name] = float(number)
        except ValueError:
            raise ConfigError(f"{wanted}; {number!r} is no number") from None
    weights = [found.get(name, 0.0) for name in names]
    total = sum(weights)
    if not min(weights) >= 0 or not abs(total - 1) <= 1e-3:  # also refuses NaN
        raise ConfigError(f"{wanted}; their sum is {total:g}" + (" and one is negative" if min(weights) < 0 else ""))
    return torch.tensor(weights)


def said(weights: Sequence[float], names: Sequence[str]) -> str:
    """Weights for people: "0.7 outlined, 0.3 pastel"."""
    return ", ".join(f"{weight:g} {name}" for weight, name in zip(weights, names, strict=True))
