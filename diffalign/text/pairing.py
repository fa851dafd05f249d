"""Recipes from scored candidates to training rows: pure functions of one row (or of all rows).

A row of candidates has `prompt`, `completions` and `scores` (higher is better). What is drawn is a function of (seed,
row) alone. Rows of equal score make no pair, unless `ties` is "soft": then p is 1/2.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from diffalign.data.pipeline import load_filter
from diffalign.data.readers import BadRow
from diffalign.data.readers.text import raw_rows
from diffalign.errors import ConfigError, DataError

Row: TypeAlias = "dict[str, Any]"
Ties: TypeAlias = Literal["drop", "soft"]


@dataclass(frozen=True)
class Candidates:
    """Responses to one prompt and their scores, in the order given."""

    prompt: Any
    completions: list[Any]
    scores: list[float]

    def pair(self, chosen: int, rejected: int, p: float = 1.0) -> Row:
        """A preference row."""
        row = {
            "prompt": self.prompt,
            "chosen": self.completions[chosen],
            "rejected": self.completions[rejected],
            "score_chosen": self.scores[chosen],
            "score_rejected": self.scores[rejected],
        }
        return row if p == 1.0 else row | {"p": p}


def key_of(row: Mapping[str, Any]) -> str:
    """What identifies a row: its `id`, or else a hash of its prompt."""
    if row.get("id") is not None:
        return str(row["id"])
    content = json.dumps(row.get("prompt", row), sort_keys=True, default=str)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def rng_of(what: str, seed: int, row: Mapping[str, Any]) -> random.Random:
    """Random numbers for one row and one purpose."""
    return random.Random(f"{what}/{seed}/{key_of(row)}")


def take(row: Mapping[str, Any], name: str) -> Any:
    """A column that must be there.

    Raises:
        BadRow: it is not.
    """
    if row.get(name) is None:
        raise BadRow("missing_column", f"{name} is missing; found {', '.join(row)}")
    return row[name]


def numbers(values: Any, count: int, name: str) -> list[float]:
    """`count` finite numbers.

    Raises:
        BadRow: something else.
    """
    good = isinstance(values, (list, tuple)) and len(values) == count
    if not good or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
        raise BadRow("bad_score", f"{name} is {str(values)[:60]}; {count} numbers expected")
    return [float(v) for v in values]


def candidates(row: Mapping[str, Any]) -> Candidates:
    """The candidates of a row.

    Raises:
        BadRow: columns are missing, or there are fewer than two candidates.
    """
    completions = take(row, "completions")
    if not isinstance(completions, (list, tuple)) or len(completions) < 2:
        raise BadRow("bad_list", "completions holds fewer than two responses")
    return Candidates(take(row, "prompt"), list(completions), numbers(take(row, "scores"), len(completions), "scores"))


def _compare(found: Candidates, a: int, b: int, min_gap: float, ties: Ties) -> Row | None:
    """The pair of two candidates, the better one first; None if they make none."""
    if found.scores[b] > found.scores[a]:
        a, b = b, a
    gap = found.scores[a] - found.scores[b]
    if found.completions[a] == found.completions[b]:
        return None
    if gap == 0:
        return found.pair(a, b, 0.5) if ties == "soft" else None
    return found.pair(a, b) if gap >= min_gap else None


def _some(pairs: Iterator[Row | None]) -> list[Row]:
    kept = [pair for pair in pairs if pair is not None]
    if not kept:
        raise BadRow("no_pair", "no two candidates differ in text and, by min_gap or more, in score")
    return kept


# --- pairs -----------------------------------------------------------------------------------------------------------


def best_of_n(row: Row, *, min_gap: float = 0.0, ties: Ties = "drop") -> list[Row]:
    """The best against the worst of the candidates (self-rewarding 2401.10020, CREAM 2410.12735)."""
    found = candidates(row)
    order = sorted(range(len(found.scores)), key=lambda i: -found.scores[i])  # stable: of equals the first
    return _some(iter([_compare(found, order[0], order[-1], min_gap, ties)]))


def all_pairs(row: Row, *, min_gap: float = 0.0, ties: Ties = "drop") -> list[Row]:
    """Every two candidates: K(K - 1)/2 pairs at most."""
    found = candidates(row)
    return _some(_compare(found, a, b, min_gap, ties) for a, b in itertools.combinations(range(len(found.scores)), 2))


def first_vs_rest(row: Row, *, min_gap: float = 0.0) -> list[Row]:
    """The best candidate against every other: K - 1 pairs at most."""
    found = candidates(row)
    best = found.scores.index(max(found.scores))
    others = (i for i in range(len(found.scores)) if i != best)
    return _some(_compare(found, best, i, min_gap, "drop") for i in others)


def tournament(row: Row, *, min_gap: float = 0.0, seed: int = 0) -> list[Row]:
    """Knock-out rounds in a drawn order, a pair per match: K - 1 at most (RSO, 2309.06657). Of equals the first goes on."""
    found = candidates(row)
    field = list(range(len(found.scores)))
    rng_of("tournament", seed, row).shuffle(field)
    matches = []
    while len(field) > 1:
        ahead = []
        for a, b in zip(field[::2], field[1::2]):
            matches.append((a, b))
            ahead.append(b if found.scores[b] > found.scores[a] else a)
        field = ahead + field[len(field) - len(field) % 2 :]
    return _some(_compare(found, a, b, min_gap, "drop") for a, b in matches)


# --- selection -------------------------------------------------------------------------------------------------------


def rejection_sampling(row: Row, *, beta: float = 0.5, n: int = 0, seed: int = 0) -> list[Row]:
    """Candidates as if drawn from the optimal policy of reward and beta (RSO, 2309.06657, algorithm 1).

    A candidate of reward r is accepted with probability exp((r - max r) / beta), max r over those that are left; rounds
    go on until `n` are accepted. beta -> 0 accepts the best only, beta -> infinity all. The result is a list again: make
    pairs of it with `all_pairs` or `tournament`.

    Args:
        row: candidates.
        beta: >= 0, in units of the reward.
        n: candidates to accept; 0 makes one round and keeps whatever it accepts.
        seed: of the draws.
    """
    if beta < 0 or n < 0:
        raise ConfigError(f"rejection_sampling: beta={beta:g} and n={n}; both must be 0 or more")
    found = candidates(row)
    rng = rng_of("rejection sampling", seed, row)
    left, accepted = list(range(len(found.scores))), list[int]()
    while left and (len(accepted) < n or not accepted):
        best = max(found.scores[i] for i in left)
        taken = [i for i in left if _accepts(found.scores[i] - best, beta, rng.random())]
        accepted += taken[: n - len(accepted)] if n else taken
        left = [i for i in left if i not in taken]
    accepted.sort()
    kept = {"completions": [found.completions[i] for i in accepted], "scores": [found.scores[i] for i in accepted]}
    return [{"prompt": found.prompt, **kept}]


def _accepts(gap: float, beta: float, u: float) -> bool:
    return u < math.exp(gap / beta) if beta > 0 else gap == 0


def curated(row: Row, *, temperature: float = 1.0, seed: int = 0) -> list[Row]:
    """One of the candidates, chosen with probability softmax(score / temperature), as a user would (2407.09499, from
    memory). Retraining on such choices alone maximises the reward at the cost of variety: mix real data in.
    """
    if temperature <= 0:
        raise ConfigError(f"curated: temperature is {temperature:g}; a number above 0 expected")
    found = candidates(row)
    top = max(found.scores)
    weights = [math.exp((score - top) / temperature) for score in found.scores]
    chosen = rng_of("curated", seed, row).choices(range(len(weights)), weights)[0]
    return [{"prompt": found.prompt, "completion": found.completions[chosen]}]


# --- self-play -------------------------------------------------------------------------------------------------------


def self_play(row: Row, *, mode: Literal["spin", "pairs", "items"] = "spin", soft: bool = False) -> list[Row]:
    """Rows against the model's own samples.

    Args:
        row: for "spin" a `completion` from data and the model's `samples`; else `completions` and `win_rates`, where
            win_rates[i][j] is the probability that i is preferred to j.
        mode: "spin": the data's response against every sample (SPIN, 2401.01335). "pairs": the candidate of the highest
            mean win rate against that of the lowest. "items": every candidate with its mean win rate over the others as
            `target` (SPPO, 2405.00675; SPO, 2401.04056).
        soft: "pairs": p is the win rate of the two instead of 1.
    """
    prompt = take(row, "prompt")
    if mode == "spin":
        real = take(row, "completion")
        samples = take(row, "samples")
        if not isinstance(samples, (list, tuple)):
            raise BadRow("bad_list", "samples is not a list of responses")
        return _some(None if s == real else {"prompt": prompt, "chosen": real, "rejected": s} for s in samples)
    completions = take(row, "completions")
    matrix = _win_rates(take(row, "win_rates"), len(completions))
    means = [sum(line[j] for j in range(len(line)) if j != i) / (len(line) - 1) for i, line in enumerate(matrix)]
    if mode == "items":
        return [{"prompt": prompt, "completion": c, "target": m} for c, m in zip(completions, means, strict=True)]
    best, worst = means.index(max(means)), means.index(min(means))
    if means[best] == means[worst]:
        raise BadRow("no_pair", "all candidates win equally often")
    pair = Candidates(prompt, list(completions), means).pair(best, worst, matrix[best][worst] if soft else 1.0)
    return _some(iter([None if pair["chosen"] == pair["rejected"] else pair]))


def _win_rates(values: Any, count: int) -> list[list[float]]:
    if count < 2 or not isinstance(values, (list, tuple)) or len(values) != count:
        raise BadRow("bad_list", f"win_rates has not {count} lines, one for each candidate (two or more)")
    matrix = [numbers(line, count, "win_rates") for line in values]
    for i, j in itertools.combinations(range(count), 2):
        if not 0 <= matrix[i][j] <= 1 or abs(matrix[i][j] + matrix[j][i] - 1) > 1e-6:
            raise BadRow("bad_score", f"win_rates[{i}][{j}] and [{j}][{i}] are no probabilities that sum to 1")
    return matrix


# --- rules -----------------------------------------------------------------------------------------------------------


def rule_checked(
    row: Row,
    *,
    verifier: str,
    mode: Literal["pairs", "items"] = "pairs",
    threshold: float = 0.5,
    max_pairs: int = 4,
    seed: int = 0,
) -> list[Row]:
    """Candidates judged by a program: those that pass against those that fail (PLUM, 2406.06887, from memory).

    Args:
        row: `prompt`, `completions`, and whatever columns the verifier reads.
        verifier: `file.py:function`, called as reward functions are: (prompts, completions, **columns), lists of equal
            length; returns a number or truth value for each.
        mode: "items" keeps every candidate, with `label`.
        threshold: a value above it passes.
        max_pairs: of one prompt; drawn from all.
        seed: of that draw.
    """
    judge = _verifier(verifier)
    prompt, completions = take(row, "prompt"), take(row, "completions")
    others = {k: v for k, v in row.items() if k not in ("prompt", "completions", "meta")}
    count = len(completions)
    try:
        values = judge(prompts=[prompt] * count, completions=completions, **{k: [v] * count for k, v in others.items()})
        scores = [float(value) for value in values]
    except Exception as error:  # the user's code may raise anything
        raise DataError(f"verifier {verifier} failed on row {key_of(row)}: {type(error).__name__}: {error}") from error
    scores = numbers(scores, count, "the verifier's answer")
    if mode == "items":
        return [
            {"prompt": prompt, "completion": c, "label": s > threshold, "target": s}
            for c, s in zip(completions, scores, strict=True)
        ]
    found = Candidates(prompt, list(completions), scores)
    good, bad = ([i for i in range(count) if (scores[i] > threshold) == wanted] for wanted in (True, False))
    pairs = [(g, b) for g in good for b in bad if completions[g] != completions[b]]
    if not pairs:
        raise BadRow("no_pair", f"{len(good)} of {count} candidates pass, so there is nothing to compare")
    kept = sorted(rng_of("rule checked", seed, row).sample(pairs, min(max_pairs, len(pairs))))
    return [found.pair(g, b) for g, b in kept]


@functools.cache
def _verifier(spec: str) -> Callable[..., Any]:
    return load_filter(spec, "verifier")


# --- consistency -----------------------------------------------------------------------------------------------------


def consistency(
    rows: Sequence[Row],
    *,
    previous: str,
    measure: Literal["kendall", "spearman", "top_bottom"] = "kendall",
    average: bool = False,
) -> list[list[Row] | BadRow]:
    """Best against worst, with p from how well two rankings of the same candidates agree (CREAM, 2410.12735).

    Prompts and candidates are joined by their content: the published pairing script zips two lists of which one may lack
    entries, and then gives prompts the consistency of others.

    Args:
        rows: candidates with the current model's scores.
        previous: file of the same candidates with the previous iteration's scores.
        measure: C = (tau + 1)/2 with Kendall's tau (tau-b) or Spearman's rho, or 1 and 0 for whether the best and the
            worst are the same.
        average: one C for all prompts, the mean.
    """
    if not Path(previous).is_file():
        raise ConfigError(f"consistency: previous={previous!r} is no file; one with the previous scores expected")
    before = {_join_key(row): row for _, row in raw_rows(Path(previous)) if isinstance(row, dict)}
    made: list[tuple[Candidates, float] | BadRow] = []
    for row in rows:
        try:
            made.append(_agreement(row, before, measure))
        except BadRow as bad:
            made.append(bad)
    agreed = [c for entry in made if not isinstance(entry, BadRow) for c in [entry[1]]]
    mean = sum(agreed) / len(agreed) if agreed else 0.0
    return [e if isinstance(e, BadRow) else _consistent(e[0], mean if average else e[1]) for e in made]


def _agreement(row: Row, before: Mapping[str, Row], measure: str) -> tuple[Candidates, float]:
    now = candidates(row)
    if (other := before.get(_join_key(row))) is None:
        raise BadRow("unmatched", "the previous ranking has no such prompt")
    then = candidates(other)
    scores = {json.dumps(c, sort_keys=True): s for c, s in zip(then.completions, then.scores, strict=True)}
    texts = [json.dumps(c, sort_keys=True) for c in now.completions]
    if any(content not in scores for content in texts):
        raise BadRow("unmatched", "the previous ranking has other candidates for this prompt")
    return now, agreement(now.scores, [scores[content] for content in texts], measure)


def _consistent(found: Candidates, c: float) -> list[Row] | BadRow:
    best, worst = found.scores.index(max(found.scores)), found.scores.index(min(found.scores))
    if found.scores[best] == found.scores[worst] or found.completions[best] == found.completions[worst]:
        return BadRow("no_pair", "the best and the worst candidate are equal")
    return [found.pair(best, worst, c)]


def _join_key(row: Mapping[str, Any]) -> str:
    return json.dumps(row.get("prompt"), sort_keys=True)


def agreement(a: Sequence[float], b: Sequence[float], measure: str) -> float:
    """Agreement of two rankings in [0, 1]: 1 equal, 0 opposite (kendall, spearman), or 1/2 where one has no order."""
    if measure == "top_bottom":
        ends = [(s.index(max(s)), s.index(min(s))) for s in (list(a), list(b))]
        return float(ends[0] == ends[1])
    if measure == "spearman":
        a, b = _ranks(a), _ranks(b)
        means = sum(a) / len(a), sum(b) / len(b)
        x, y = [v - means[0] for v in a], [v - means[1] for v in b]
    else:  # tau-b is the correlation of the signs of all differences
        couples = list(itertools.combinations(range(len(a)), 2))
        x, y = ([float((s[i] > s[j]) - (s[i] < s[j])) for i, j in couples] for s in (a, b))
    size = math.sqrt(sum(v * v for v in x) * sum(v * v for v in y))
    return (sum(v * w for v, w in zip(x, y)) / size + 1) / 2 if size else 0.5


def _ranks(scores: Sequence[float]) -> list[float]:
    """Ranks from 0; equal scores share the mean of theirs."""
    return [sum(o < s for o in scores) + (sum(o == s for o in scores) - 1) / 2 for s in scores]
