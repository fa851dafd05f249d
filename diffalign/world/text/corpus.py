"""What the tiny LM is trained on: puzzles answered in mixed styles, facts, and questions nobody can answer.

A share of the puzzles' answers is wrong on purpose (near misses) or malformed, so that the model knows better than it
samples: preference or reward training has something to raise.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from diffalign.world.text import facts as known
from diffalign.world.text import task

RIGHT = 0.62  # share of right results among well-formed answers
MALFORMED = 0.07  # share of answers without a result, with two, or cut off
SHARES = {"task": 0.86, "fact": 0.11, "stranger": 0.03}


@dataclass(frozen=True)
class Document:
    """A question and its answer, as plain sentences."""

    prompt: str
    completion: str


def _malformed(puzzle: task.Puzzle, rng: random.Random) -> str:
    fault = rng.randrange(3)
    if fault == 0:
        return " ".join([*rng.sample(task.FILLERS, 1), rng.choice(task.EVASIONS)])
    if fault == 1:
        return " ".join(task.word(text) for text in (puzzle.answer, rng.choice(puzzle.near_misses())))
    return task.word(puzzle.answer, task.sample_style(rng)).rstrip(".!")


def task_document(
    rng: random.Random, *, right: float = RIGHT, malformed: float = MALFORMED, bare: float = task.BARE
) -> Document:
    """A puzzle of the training side, answered rightly with probability `right` if the answer is well-formed."""
    puzzle = task.sample_puzzle(rng)
    while puzzle.held_out:
        puzzle = task.sample_puzzle(rng, puzzle.kind)
    prompt = rng.choice(puzzle.prompts())
    if rng.random() < malformed:
        return Document(prompt, _malformed(puzzle, rng))
    result = puzzle.answer if rng.random() < right else rng.choice(puzzle.near_misses())
    return Document(prompt, task.word(result, task.sample_style(rng, bare)))


def documents(
    n: int, rng: random.Random, *, right: float = RIGHT, malformed: float = MALFORMED, bare: float = task.BARE
) -> list[Document]:
    """Draw documents in the proportions of `SHARES`; see `task_document`."""
    everything: Sequence[known.Fact] = known.facts()
    made = []
    for kind in rng.choices(list(SHARES), list(SHARES.values()), k=n):
        if kind == "task":
            made.append(task_document(rng, right=right, malformed=malformed, bare=bare))
        elif kind == "fact":
            fact = rng.choice(everything)
            made.append(Document(rng.choice(fact.seen), fact.answer))
        else:
            made.append(Document(known.stranger_question(rng), rng.choice(known.UNKNOWN_ANSWERS)))
    return made


def vocabulary_texts() -> list[str]:
    """Every word of the world, in sentences as they occur: what the tokenizer is learnt from."""
    rng = random.Random("text world vocabulary")
    texts = [*task.OPENERS, *task.FILLERS, *task.CLOSINGS, *task.EVASIONS, *known.UNKNOWN_ANSWERS]
    for kind in task.KINDS:
        for _ in range(100):
            puzzle = task.sample_puzzle(rng, kind)
            texts += [*puzzle.prompts(), task.word(puzzle.answer)]
    for fact in known.facts():
        texts += [*fact.seen, *fact.held_out, fact.answer, *fact.perturbed]
    texts += [known.stranger_question(rng) for _ in range(200)]
    return texts
