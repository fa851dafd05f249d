"""Puzzles of the text world: how they are posed, how an answer may be worded, and the exact verifier.

A puzzle is a small sum, difference, sorting or comparison. An answer is a row of sentences: exactly one *core*
that states the result, and around it manners and filler, which a preference may choose among. Both grammars are closed,
so that everything the verifier says is read and nothing is guessed.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from diffalign.errors import ConfigError, did_you_mean

KINDS = ("add", "subtract", "sort", "compare")
LARGEST, LARGEST_SECOND = 89, 9  # operands of sums and differences
LARGEST_COMPARED = 99
SORTED_DIGITS = 4
HELD_OUT_EVERY = 8
_MOST_MISSES = 20_000  # draws in a row without a new prompt: the kind is used up

OPENERS = ("sure!", "of course!", "gladly!")
FILLERS = (
    "let me think about it for a moment.",
    "this is a nice question.",
    "i looked at it twice.",
    "there is a lot to consider here.",
)
CLOSINGS = ("thank you for asking.", "i hope that helps.")
EVASIONS = ("hmm.", "that is hard to say.")  # sentences without a result: never well-formed
MOST_FILLERS = 2
BARE = 0.25  # share of terse answers in the tiny LM's corpus

_PHRASINGS = {
    "add": ("what is {0} + {1}?", "add {0} and {1}.", "compute {0} + {1}."),
    "subtract": ("what is {0} - {1}?", "take {1} from {0}.", "compute {0} - {1}."),
    "sort": ("sort {0}.", "put {0} in order."),
    "compare": ("which is {0}, {1} or {2}?", "tell me the {0} one: {1} or {2}."),
}
_PATTERNS = {
    "add": r"(?:what is|compute) (\d+) \+ (\d+)[.?]|add (\d+) and (\d+)\.",
    "subtract": r"(?:what is|compute) (\d+) - (\d+)[.?]|take (?P<b>\d+) from (?P<a>\d+)\.",
    "sort": r"sort ((?:\d ?)+)\.|put ((?:\d ?)+) in order\.",
    "compare": r"which is (larger|smaller), (\d+) or (\d+)\?|tell me the (larger|smaller) one: (\d+) or (\d+)\.",
}
_RESULT = re.compile(r"(the answer is )?(\d+(?: \d+)*)\.")
_SENTENCE = re.compile(r"[^.!?]*[.!?]?")
_MARKER = re.compile(r"<\|[a-z]+\|>")


# ---------------------------------------------------------------- puzzles


@dataclass(frozen=True)
class Puzzle:
    """One puzzle.

    Attributes:
        kind: one of `KINDS`.
        given: what is asked about, as texts: two numbers, digits, or ("larger" or "smaller", number, number).
    """

    kind: str
    given: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The one right result."""
        if self.kind == "sort":
            return " ".join(sorted(self.given))
        first, second = (int(text) for text in self.given[-2:])
        if self.kind == "compare":
            return str(max(first, second) if self.given[0] == "larger" else min(first, second))
        return str(first + second if self.kind == "add" else first - second)

    @property
    def held_out(self) -> bool:
        """True for the eighth of all puzzles that neither the tiny LM nor any training data ever sees.

        A puzzle's phrasings and the exchange of its operands are on the same side.
        """
        given = self.given if self.kind == "subtract" else sorted(self.given)
        digest = hashlib.sha256(f"{self.kind} {' '.join(given)}".encode()).digest()
        return digest[0] % HELD_OUT_EVERY == 0

    def prompts(self) -> tuple[str, ...]:
        """All phrasings."""
        return tuple(phrasing.format(*self._slots()) for phrasing in _PHRASINGS[self.kind])

    def near_misses(self) -> tuple[str, ...]:
        """Wrong results of the right form, the ones that a careless solver would give."""
        if self.kind == "sort":
            digits = self.answer.split()
            swaps = [[*digits[:i], digits[i + 1], digits[i], *digits[i + 2 :]] for i in range(len(digits) - 1)]
            found = [" ".join(swap) for swap in swaps]
        elif self.kind == "compare":
            found = list(self.given[1:])
        else:
            found = [str(int(self.answer) + step) for step in (-10, -2, -1, 1, 2, 10) if int(self.answer) + step >= 0]
        return tuple(text for text in found if text != self.answer)

    def _slots(self) -> tuple[str, ...]:
        if self.kind == "sort":
            return (" ".join(self.given),)
        return self.given


def sample_puzzle(rng: random.Random, kind: str | None = None) -> Puzzle:
    """Draw a puzzle of a kind, or of any kind with equal probability; either side of the split."""
    kind = kind or rng.choice(KINDS)
    if kind == "sort":
        return Puzzle(kind, tuple(rng.sample("0123456789", SORTED_DIGITS)))
    if kind == "compare":
        first, second = rng.sample(range(LARGEST_COMPARED + 1), 2)
        return Puzzle(kind, (rng.choice(("larger", "smaller")), str(first), str(second)))
    first, second = rng.randint(LARGEST_SECOND, LARGEST), rng.randint(1, LARGEST_SECOND)
    return Puzzle(kind, (str(first), str(second)))


def sample_prompts(n: int, seed: int, *, held_out: bool, kinds: Sequence[str] = KINDS) -> list[str]:
    """Different prompts of one side of the split, kinds in turn; the same seed gives the same list.

    Args:
        n: how many; a few thousand at most (`kinds` with few puzzles run out sooner).
        seed: of the draw.
        held_out: which side.
        kinds: from which kinds.

    Raises:
        ValueError: the kinds hold fewer prompts than are asked for.
    """
    rng = random.Random(f"text world prompts/{seed}/{held_out}")
    prompts: dict[str, None] = {}
    misses = 0
    while len(prompts) < n:
        misses += 1
        if misses > _MOST_MISSES:
            raise ValueError(f"kinds {', '.join(kinds)} hold no {n} different prompts; ask for fewer")
        puzzle = sample_puzzle(rng, kinds[len(prompts) % len(kinds)])
        if puzzle.held_out == held_out and (prompt := rng.choice(puzzle.prompts())) not in prompts:
            prompts[prompt] = None
            misses = 0
    return list(prompts)


def plain(text: str) -> str:
    """A prompt or completion without chat markers and surrounding white space."""
    return _MARKER.sub("", text).strip()


def parse_prompt(prompt: str) -> Puzzle:
    """Read a prompt back.

    Raises:
        ValueError: not a prompt of this world.
    """
    text = plain(prompt)
    for kind, pattern in _PATTERNS.items():
        if found := re.fullmatch(pattern, text):
            named = found.groupdict()
            if named.get("a") is not None:
                return Puzzle(kind, (named["a"], named["b"]))
            groups = [group for group in found.groups() if group is not None]
            given = groups if kind != "sort" else groups[0].split()
            return Puzzle(kind, tuple(given))
    raise ValueError(f"{text[:80]!r} is no puzzle of the text world; expected one like 'what is 17 + 26?'")


# ---------------------------------------------------------------- wording an answer


@dataclass(frozen=True)
class Style:
    """How an answer is worded: sentences before the core (manners, filler), a bare core or a full one, and after it."""

    opener: str | None = None
    fillers: tuple[str, ...] = ()
    bare: bool = False
    closing: str | None = None


def sample_style(rng: random.Random, bare: float = BARE) -> Style:
    """Terse with probability `bare`, otherwise any mixture of manners and filler."""
    if rng.random() < bare:
        return Style(bare=True)
    return Style(
        opener=rng.choice(OPENERS) if rng.random() < 0.35 else None,
        fillers=tuple(rng.sample(FILLERS, rng.choices((0, 1, 2), (0.5, 0.3, 0.2))[0])),
        closing=rng.choice(CLOSINGS) if rng.random() < 0.35 else None,
    )


def word(result: str, style: Style = Style()) -> str:
    """A result as an answer in a style."""
    core = f"{result}." if style.bare else f"the answer is {result}."
    return " ".join([*filter(None, [style.opener]), *style.fillers, core, *filter(None, [style.closing])])


# ---------------------------------------------------------------- reading an answer


@dataclass(frozen=True)
class Reading:
    """What stands in an answer.

    Attributes:
        result: what the one core states; None without a core, or with two that differ.
        well_formed: opener, up to two different fillers, one core, closing, in this order and nothing else.
        opener, closing: present.
        fillers: how many.
        bare: the core is the result alone.
    """

    result: str | None
    well_formed: bool
    opener: bool
    fillers: int
    bare: bool
    closing: bool


def _sentences(text: str) -> Iterator[str]:
    return (part.strip() for part in _SENTENCE.findall(text) if part.strip())


def _role(sentence: str) -> str:
    """One letter per sentence, so that the order of an answer is a regular expression."""
    for letter, known in (("o", OPENERS), ("f", FILLERS), ("c", CLOSINGS)):
        if sentence in known:
            return letter
    return "r" if _RESULT.fullmatch(sentence) else "x"


def read(completion: str) -> Reading:
    """Read an answer: every text has a reading."""
    sentences = list(_sentences(plain(completion)))
    roles = "".join(_role(sentence) for sentence in sentences)
    cores = [found for s in sentences if (found := _RESULT.fullmatch(s))]
    results = {core[2] for core in cores}
    fillers = [s for s, role in zip(sentences, roles, strict=True) if role == "f"]
    return Reading(
        result=results.pop() if len(results) == 1 else None,
        well_formed=re.fullmatch("o?f{0,2}rc?", roles) is not None and len(set(fillers)) == len(fillers),
        opener="o" in roles,
        fillers=len(fillers),
        bare=len(cores) == 1 and cores[0][1] is None,
        closing="c" in roles,
    )


# ---------------------------------------------------------------- verdicts


def verify(prompt: str, completion: str) -> dict[str, float]:
    """Judge an answer; everything in [0, 1], higher is more of it.

    Style is 0 for an answer that is not well-formed, so that saying nothing pleases nobody.

    Args:
        prompt: a prompt of this world, plain or with chat markers.
        completion: any text.

    Returns:
        correct: 1 if the result is right; format: 1 if well-formed; score: 0.2 format + 0.8 closeness, where closeness
        is 1 for the right result and at most 1/2 for another; polite: half each for opener and closing; terse: 1 minus a
        fifth for each of opener, closing, filler and a core in words; verbose: fillers / 2.

    Raises:
        ValueError: the prompt is not of this world.
    """
    puzzle, reading = parse_prompt(prompt), read(completion)
    formed = float(reading.well_formed)
    extras = reading.opener + reading.closing + reading.fillers + (not reading.bare)
    return {
        "correct": float(reading.result == puzzle.answer),
        "format": formed,
        "score": 0.2 * formed + 0.8 * _closeness(puzzle, reading.result),
        "polite": formed * (reading.opener + reading.closing) / 2,
        "terse": formed * (1 - extras / (MOST_FILLERS + 3)),
        "verbose": formed * reading.fillers / MOST_FILLERS,
    }


PARTS = ("correct", "format", "score", "polite", "terse", "verbose")


def _closeness(puzzle: Puzzle, result: str | None) -> float:
    if result is None:
        return 0.0
    if result == puzzle.answer:
        return 1.0
    if puzzle.kind == "compare":
        return 0.0
    if puzzle.kind == "sort":
        pairs = zip(result.split(), puzzle.answer.split(), strict=False)
        return 0.5 * sum(a == b for a, b in pairs) / max(len(result.split()), SORTED_DIGITS)
    if " " in result:
        return 0.0
    return 0.5 * max(0.0, 1 - abs(int(result) - int(puzzle.answer)) / 20)


Judge = Callable[[str, str], float]


def find_judge(name: str) -> Judge:
    """A function of (prompt, completion), higher is better, from a sum of parts of the verdict.

    Args:
        name: parts with optional weights, such as "correct" or "correct+0.3*polite-0.1*verbose".

    Raises:
        ConfigError: a part that does not exist, or a sum that cannot be read.
    """
    weights = judge_weights(name)

    def judge(prompt: str, completion: str) -> float:
        verdict = verify(prompt, completion)
        return sum(weight * verdict[part] for part, weight in weights.items())

    return judge


def judge_weights(name: str) -> dict[str, float]:
    """The weight of each part in a judge's name; see `find_judge`."""
    text = name.replace(" ", "")
    term = r"(?:(\d+(?:\.\d*)?|\.\d+)\*)?([a-z_]+)"
    if not re.fullmatch(rf"[+-]?{term}(?:[+-]{term})*", text):
        raise ConfigError(
            f"judge {name!r} cannot be read; expected a sum of parts like 'correct+0.3*polite' of {', '.join(PARTS)}"
        )
    weights: dict[str, float] = {}
    for sign, weight, part in re.findall(rf"([+-]?){term}", text):
        if part not in PARTS:
            raise ConfigError(
                f"judge {name!r}: part {part!r} not found{did_you_mean(part, PARTS)} Available: {', '.join(PARTS)}"
            )
        weights[part] = weights.get(part, 0.0) + float(weight or 1) * (-1 if sign == "-" else 1)
    return weights
