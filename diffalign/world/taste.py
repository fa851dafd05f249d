"""Tastes: what somebody likes about a picture beyond what its caption says.

A *rule* maps a verifier's reading to [0, 1]; it is 0 when nothing was seen, so that an empty picture pleases nobody.
A *taste* is a weighted mean of rules; a single rule is a taste of its own. A *user* has a name, a number (Pick-a-Pic's
`user_id`) and a taste; some of them disagree on purpose. Rules look only at the uncaptioned style.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from diffalign.errors import ConfigError, did_you_mean
from diffalign.world.scenes import CANVAS, parse_caption
from diffalign.world.verifier import Found, Reading, judge

Rule = Callable[[Reading], float]
PLACEMENT_MARGIN = 8.0  # pixels: the things' centres lie between this and CANVAS minus this
RULE_USER_ID = 0  # the annotator of pairs judged by a rule instead of a user


def _mean(reading: Reading, of: Callable[[Found], float]) -> float:
    """Mean over the things seen, 0 if there are none."""
    return sum(of(thing) for thing in reading.things) / len(reading.things) if reading.things else 0.0


def _from_low_to_high(pixels: float) -> float:
    return min(max((pixels - PLACEMENT_MARGIN) / (CANVAS - 2 * PLACEMENT_MARGIN), 0.0), 1.0)


def outlined(reading: Reading) -> float:
    """Things have an ink outline."""
    return _mean(reading, lambda thing: thing.outline)


def plain(reading: Reading) -> float:
    """Neither outline nor stripes: flat areas of colour."""
    return _mean(reading, lambda thing: (1 - thing.outline) * (1 - thing.striped))


def striped(reading: Reading) -> float:
    """Things are striped."""
    return _mean(reading, lambda thing: thing.striped)


def pastel(reading: Reading) -> float:
    """Pale colours."""
    return _mean(reading, lambda thing: thing.pastel)


def vivid(reading: Reading) -> float:
    """Strong colours; a thing without any colour is not vivid."""
    return _mean(reading, lambda thing: 0.0 if thing.colour == "none" else 1 - thing.pastel)


def leftward(reading: Reading) -> float:
    """Things stand to the left: 1 at the leftmost place of the grid, 0 at the rightmost."""
    return _mean(reading, lambda thing: 1 - _from_low_to_high(thing.cx))


def rightward(reading: Reading) -> float:
    """Things stand to the right."""
    return _mean(reading, lambda thing: _from_low_to_high(thing.cx))


def upward(reading: Reading) -> float:
    """Things stand near the top."""
    return _mean(reading, lambda thing: 1 - _from_low_to_high(thing.cy))


def downward(reading: Reading) -> float:
    """Things stand near the bottom."""
    return _mean(reading, lambda thing: _from_low_to_high(thing.cy))


def tilted(reading: Reading) -> float:
    """Share of things that are turned; a circle never is."""
    return _mean(reading, lambda thing: float(thing.tilt != 0))


def upright(reading: Reading) -> float:
    """Share of things that are not turned; a circle always counts."""
    return _mean(reading, lambda thing: float(thing.tilt == 0))


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        rule.__name__: rule
        for rule in (
            outlined, plain, striped, pastel, vivid, leftward, rightward, upward, downward, tilted, upright
        )
    }
)  # fmt: skip


@dataclass(frozen=True)
class Taste:
    """A weighted mean of rules.

    Attributes:
        name: of the rule or user it belongs to.
        weights: rule -> positive weight; they add up to 1.
        user_id: Pick-a-Pic's number of the annotator.
    """

    name: str
    weights: Mapping[str, float]
    user_id: int = RULE_USER_ID

    def __call__(self, reading: Reading) -> float:
        """How much this reading is liked, in [0, 1]."""
        return sum(weight * RULES[rule](reading) for rule, weight in self.weights.items())


# Ada and Bela, Cleo and Dev, and Eli and Fay want opposite things; Gil agrees with half of Ada and half of Cleo.
USERS: Mapping[str, Taste] = MappingProxyType(
    {
        name: Taste(name, MappingProxyType(weights), user_id)
        for user_id, (name, weights) in enumerate(
            {
                "ada": {"outlined": 0.8, "upright": 0.2},
                "bela": {"plain": 0.8, "tilted": 0.2},
                "cleo": {"pastel": 0.7, "leftward": 0.3},
                "dev": {"vivid": 0.7, "rightward": 0.3},
                "eli": {"striped": 0.6, "upward": 0.4},
                "fay": {"plain": 0.6, "downward": 0.4},
                "gil": {"outlined": 0.5, "pastel": 0.5},
            }.items(),
            start=1,
        )
    }
)


def find(name: str) -> Taste:
    """The taste of a rule or user.

    Raises:
        ConfigError: no rule and no user has this name.
    """
    if name in USERS:
        return USERS[name]
    if name in RULES:
        return Taste(name, MappingProxyType({name: 1.0}))
    raise ConfigError(
        f"taste {name!r} not found{did_you_mean(name, [*RULES, *USERS]) or ';'} Rules: {', '.join(RULES)}. "
        f"Users: {', '.join(USERS)}"
    )


def combined(reading: Reading, caption: str, taste: Taste, weight: float) -> float:
    """An annotator's score in [0, 1]: (1 - weight) * verifier score + weight * taste.

    Args:
        reading: what is seen in the picture.
        caption: a sentence of the tiny world.
        taste: see `find`.
        weight: of the taste, in [0, 1].
    """
    return (1 - weight) * judge(reading, parse_caption(caption))["score"] + weight * taste(reading)
