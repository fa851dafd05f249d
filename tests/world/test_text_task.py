"""Puzzles of the text world: posing, wording and reading are inverses, and verdicts are exact."""

from __future__ import annotations

import random

import pytest

from diffalign.errors import ConfigError
from diffalign.world.text import task
from diffalign.world.text.task import Puzzle, Style, verify


def puzzles(n: int, seed: int = 0) -> list[Puzzle]:
    rng = random.Random(seed)
    return [task.sample_puzzle(rng, task.KINDS[i % len(task.KINDS)]) for i in range(n)]


def test_every_phrasing_is_read_back():
    for puzzle in puzzles(500):
        assert len(set(puzzle.prompts())) == len(puzzle.prompts()) >= 2
        for prompt in puzzle.prompts():
            assert task.parse_prompt(prompt) == puzzle
            assert task.parse_prompt(f"<|bos|><|user|>{prompt}<|assistant|>") == puzzle
            assert task.parse_prompt(prompt + "\n") == puzzle


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("what is 17 + 6?", "23"),
        ("take 6 from 43.", "37"),
        ("sort 5 2 9 0.", "0 2 5 9"),
        ("which is larger, 9 or 27?", "27"),
        ("tell me the smaller one: 90 or 8.", "8"),
    ],
)
def test_answers(prompt: str, answer: str):
    assert task.parse_prompt(prompt).answer == answer


@pytest.mark.parametrize("text", ["", "what is love?", "which is taller, 3 or 4?", "what is 3 + 4", "sort b a."])
def test_other_prompts_are_refused(text: str):
    with pytest.raises(ValueError, match="no puzzle of the text world"):
        task.parse_prompt(text)


def test_near_misses_are_well_formed_and_wrong():
    for puzzle in puzzles(300):
        assert puzzle.near_misses()
        assert puzzle.answer not in puzzle.near_misses()
        for miss in puzzle.near_misses():
            verdict = verify(puzzle.prompts()[0], task.word(miss))
            assert (verdict["correct"], verdict["format"]) == (0.0, 1.0)
            assert 0.2 <= verdict["score"] <= 0.6


def test_the_split_is_by_puzzle():
    shares = [puzzle.held_out for puzzle in puzzles(4000)]
    assert 0.09 < sum(shares) / len(shares) < 0.16
    assert Puzzle("add", ("17", "6")).held_out == Puzzle("add", ("6", "17")).held_out
    assert Puzzle("sort", ("1", "2", "3", "4")).held_out == Puzzle("sort", ("4", "3", "2", "1")).held_out
    train = task.sample_prompts(800, 0, held_out=False)
    test = task.sample_prompts(200, 0, held_out=True)
    assert len(set(train)) == 800
    assert not any(task.parse_prompt(prompt).held_out for prompt in train)
    assert all(task.parse_prompt(prompt).held_out for prompt in test)
    assert {task.parse_prompt(prompt).kind for prompt in test} == set(task.KINDS)


def test_prompts_are_a_function_of_the_seed():
    assert task.sample_prompts(50, 3, held_out=False) == task.sample_prompts(80, 3, held_out=False)[:50]
    assert task.sample_prompts(50, 3, held_out=False) != task.sample_prompts(50, 4, held_out=False)


def test_too_many_prompts_are_refused():
    with pytest.raises(ValueError, match="hold no 5000 different prompts"):
        task.sample_prompts(5000, 0, held_out=True, kinds=["add"])


def test_wording_is_read_back():
    rng = random.Random(0)
    for puzzle in puzzles(500):
        style = task.sample_style(rng)
        reading = task.read(task.word(puzzle.answer, style))
        assert reading == task.Reading(
            result=puzzle.answer,
            well_formed=True,
            opener=style.opener is not None,
            fillers=len(style.fillers),
            bare=style.bare,
            closing=style.closing is not None,
        )


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("", None),
        ("hmm.", None),
        ("the answer is 4. the answer is 5.", None),
        ("the answer is 4. 4.", "4"),  # one result, said twice
        ("the answer is 4", None),  # cut off
        ("the answer is 4. sure!", "4"),  # out of order
        ("i hope that helps. 4.", "4"),
        ("this is a nice question. this is a nice question. 4.", "4"),
        ("4. and some more", "4"),
        ("the answer is -4.", None),
        ("the answer is four.", None),
    ],
)
def test_malformed_answers(text: str, result: str | None):
    reading = task.read(text)
    assert reading.result == result
    assert not reading.well_formed
    verdict = verify("what is 1 + 3?", text)
    assert verdict["format"] == verdict["polite"] == verdict["terse"] == verdict["verbose"] == 0
    assert verdict["correct"] == float(result == "4")


def test_verdicts():
    polite = Style(opener="sure!", closing="thank you for asking.", fillers=(task.FILLERS[0],))
    assert verify("what is 17 + 6?", "23.") == {
        "correct": 1, "format": 1, "score": 1, "polite": 0, "terse": 1, "verbose": 0
    }  # fmt: skip
    verdict = verify("what is 17 + 6?", task.word("21", polite))
    assert verdict == pytest.approx(
        {"correct": 0, "format": 1, "score": 0.2 + 0.8 * 0.5 * 0.9, "polite": 1, "terse": 0.2, "verbose": 0.5}
    )
    assert verify("sort 5 2 9 0.", "0 2 9 5.")["score"] == pytest.approx(0.2 + 0.8 * 0.25)
    assert verify("which is larger, 9 or 27?", "9.")["score"] == pytest.approx(0.2)
    assert verify("what is 17 + 6?", "2 3.")["score"] == pytest.approx(0.2)
    assert set(verdict) == set(task.PARTS)


def test_judges_add_up():
    judge = task.find_judge("correct + 0.5*polite - .25*verbose")
    assert judge("what is 17 + 6?", "sure! this is a nice question. 23.") == pytest.approx(1 + 0.25 - 0.125)
    assert task.judge_weights("correct+correct") == {"correct": 2.0}
    with pytest.raises(ConfigError, match=r"part 'corect' not found; did you mean 'correct'\?"):
        task.find_judge("corect")
    for name in ("", "correct+", "2*", "correct polite*"):
        with pytest.raises(ConfigError, match=r"cannot be read|not found"):
            task.find_judge(name)
