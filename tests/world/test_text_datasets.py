"""Data sets of the text world: TRL's layouts, judged by the verifier, and the same bytes for the same settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffalign.errors import ConfigError, DataError
from diffalign.world.text import datasets, facts, lm, task
from diffalign.world.text.datasets import Sampling


@pytest.fixture(scope="module")
def base():
    return lm.load()


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_plain_pairs(base, tmp_path: Path):
    info = datasets.write_pairs(tmp_path / "pairs.jsonl", Sampling(prompts=60, base=base))
    made = rows(info.path)
    assert info.rows == len(made) == 60 - info.ties
    assert 10 < info.rows < 50
    assert 0.3 < info.mean_score < 0.7
    for row in made:
        assert set(row) == {"prompt", "chosen", "rejected", "score_chosen", "score_rejected"}
        assert row["prompt"].endswith(lm.SEPARATOR)
        assert not task.parse_prompt(row["prompt"]).held_out
        assert task.verify(row["prompt"], row["chosen"])["correct"] == row["score_chosen"] == 1
        assert task.verify(row["prompt"], row["rejected"])["correct"] == row["score_rejected"] == 0


def test_layouts_hold_the_same_prompts(base, tmp_path: Path):
    sampling = Sampling(prompts=30, base=base)
    chat = rows(datasets.write_pairs(tmp_path / "chat.jsonl", sampling, layout="chat").path)
    whole = rows(datasets.write_pairs(tmp_path / "whole.jsonl", sampling, layout="chat-implicit").path)
    for one, other in zip(chat, whole, strict=True):
        assert one["prompt"][0]["role"] == "user"
        assert "prompt" not in other
        for side in ("chosen", "rejected"):
            assert [message["role"] for message in one[side]] == ["assistant"]
            assert other[side] == one["prompt"] + one[side]
        assert task.verify(one["prompt"][0]["content"], one["chosen"][0]["content"])["correct"] == 1


def test_ties_and_flips(base, tmp_path: Path):
    sampling = Sampling(prompts=40, base=base)
    dropped = datasets.write_pairs(tmp_path / "a.jsonl", sampling)
    kept = datasets.write_pairs(tmp_path / "b.jsonl", sampling, ties="keep")
    flipped = datasets.write_pairs(tmp_path / "c.jsonl", sampling, flip=1.0)
    assert kept.rows == 40
    tied = [row for row in rows(kept.path) if row["score_chosen"] == row["score_rejected"]]
    assert len(tied) == kept.ties == dropped.ties > 0
    for one, other in zip(rows(dropped.path), rows(flipped.path), strict=True):
        assert (one["chosen"], one["rejected"]) == (other["rejected"], other["chosen"])
    some = rows(datasets.write_pairs(tmp_path / "d.jsonl", sampling, flip=0.3).path)
    wrong = sum(row["score_chosen"] < row["score_rejected"] for row in some)
    assert 0 < wrong < len(some) / 2


def test_a_judge_of_style(base, tmp_path: Path):
    info = datasets.write_pairs(tmp_path / "p.jsonl", Sampling(prompts=40, judge="polite", samples=4, base=base))
    made = rows(info.path)
    assert all(row["score_chosen"] > row["score_rejected"] for row in made)
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in made)
    assert longer > 0.7 * len(made)


@pytest.mark.parametrize("layout", ["plain", "chat"])
def test_unpaired(base, tmp_path: Path, layout: str):
    info = datasets.write_unpaired(tmp_path / "u.jsonl", Sampling(prompts=20, base=base), layout=layout)
    made = rows(info.path)
    assert len(made) == 40
    assert {row["label"] for row in made} == {True, False}
    for row in made:
        prompt, text = row["prompt"], row["completion"]
        if layout == "chat":
            prompt, text = prompt[0]["content"], text[0]["content"]
        assert row["label"] is bool(task.verify(prompt, text)["correct"])


def test_ranked(base, tmp_path: Path):
    sampling = Sampling(prompts=15, samples=5, judge="score", base=base)
    for row in rows(datasets.write_ranked(tmp_path / "r.jsonl", sampling).path):
        assert row["scores"] == sorted(row["scores"], reverse=True)
        judged = [task.verify(row["prompt"], text)["score"] for text in row["completions"]]
        assert judged == pytest.approx(row["scores"])


def test_prompts_with_reward_columns(tmp_path: Path):
    for row in rows(datasets.write_prompts(tmp_path / "q.jsonl", prompts=50, held_out=True).path):
        puzzle = task.parse_prompt(row["prompt"])
        assert puzzle.held_out
        assert (row["answer"], row["kind"]) == (puzzle.answer, puzzle.kind)


def test_forget_and_retain(tmp_path: Path):
    forget = rows(datasets.write_facts(tmp_path / "f.jsonl", forget=True).path)
    retain = rows(datasets.write_facts(tmp_path / "r.jsonl", forget=False, layout="chat").path)
    unseen = rows(datasets.write_facts(tmp_path / "h.jsonl", forget=True, held_out=True).path)
    assert (len(forget), len(retain), len(unseen)) == (18 * 4, 126 * 4, 18 * 2)
    known = {(q + lm.SEPARATOR, fact.answer, fact.unknown) for fact in facts.facts(forget=True) for q in fact.seen}
    assert {(row["prompt"], row["completion"], row["alternate"]) for row in forget} == known
    assert all(row["completion"][0]["role"] == "assistant" for row in retain)
    assert not {row["prompt"] for row in forget} & {row["prompt"] for row in unseen}


def test_the_same_settings_give_the_same_file(base, tmp_path: Path):
    sampling, path = Sampling(prompts=12, samples=3, base=base), tmp_path / "p.jsonl"
    first = datasets.write_pairs(path, sampling)
    data = path.read_bytes()
    again = datasets.write_pairs(path, sampling)
    assert again.reused
    assert (again.rows, again.ties, again.mean_score) == (first.rows, first.ties, first.mean_score)
    path.write_text("damaged\n")
    assert not datasets.write_pairs(path, sampling).reused
    assert path.read_bytes() == data
    assert not datasets.write_pairs(path, Sampling(prompts=12, samples=3, seed=1, base=base)).reused
    assert path.read_bytes() != data


def test_wrong_settings(base, tmp_path: Path):
    path = tmp_path / "x.jsonl"
    with pytest.raises(ConfigError, match=r"layout 'chta' not found; did you mean 'chat'"):
        datasets.write_pairs(path, Sampling(base=base), layout="chta")
    with pytest.raises(ConfigError, match="at least 1 and 2 expected"):
        datasets.write_pairs(path, Sampling(samples=1, base=base))
    with pytest.raises(ConfigError, match="flip: got 2"):
        datasets.write_pairs(path, Sampling(base=base), flip=2)
    with pytest.raises(ConfigError, match="part 'nice' not found"):
        datasets.write_ranked(path, Sampling(judge="nice", base=base))
    with pytest.raises(ConfigError, match="ask for fewer"):
        datasets.write_prompts(path, prompts=100_000)
    with pytest.raises(DataError, match="every prompt was a tie"):
        datasets.write_pairs(path, Sampling(prompts=2, temperature=0.0, base=base))
    assert not path.exists()
