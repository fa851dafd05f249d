"""Recipes, each against what it must give exactly."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffalign.data.corruption import KINDS, image_corruption
from diffalign.data.report import DataReport
from diffalign.errors import ConfigError, DataError
from diffalign.text.pairing import agreement
from diffalign.text.recipes import OF_ALL_ROWS, RECIPES, apply, make
from diffalign.text.records import parse_row

LIST = {"prompt": "Q", "completions": ["a", "b", "c", "d"], "scores": [1.0, 4.0, 2.0, 4.0]}


def one(recipe: str, row: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    return apply(recipe, [row], **options)


def sides(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["chosen"], row["rejected"]) for row in rows]


def why(recipe: str, row: dict[str, Any], **options: Any) -> str:
    report = DataReport()
    assert apply(recipe, [row], report, **options) == []
    ((reason, count),) = report.skipped.items()
    assert (report.rows, count) == (1, 1)
    return reason


# --- pairs from lists ------------------------------------------------------------------------------------------------


def test_best_of_n() -> None:
    (pair,) = one("best_of_n", LIST)
    assert pair == {"prompt": "Q", "chosen": "b", "rejected": "a", "score_chosen": 4.0, "score_rejected": 1.0}
    assert sides(one("best_of_n", LIST, min_gap=3)) == [("b", "a")]
    assert why("best_of_n", LIST, min_gap=3.1) == "no_pair"
    even = LIST | {"scores": [1, 1, 1, 1]}
    assert why("best_of_n", even) == "no_pair"
    (tie,) = one("best_of_n", even, ties="soft")
    assert (tie["chosen"], tie["rejected"], tie["p"]) == ("a", "d", 0.5)
    assert why("best_of_n", LIST | {"completions": ["a"] * 4}, ties="soft") == "no_pair"


def test_all_pairs_and_first_vs_rest() -> None:
    expected = [("b", "a"), ("c", "a"), ("d", "a"), ("b", "c"), ("d", "c")]
    assert sides(one("all_pairs", LIST)) == expected  # all but the tie of b and d
    assert sides(one("all_pairs", LIST, min_gap=2.5)) == [("b", "a"), ("d", "a")]
    assert len(one("all_pairs", LIST, ties="soft")) == 6
    assert sides(one("first_vs_rest", LIST)) == [("b", "a"), ("b", "c")]


def test_tournament_has_a_match_less_than_players_and_the_best_wins() -> None:
    row = {"prompt": "Q", "completions": list("abcdefg"), "scores": [3, 1, 4, 1.5, 5, 9, 2.6]}
    for seed in range(5):
        rows = one("tournament", row, seed=seed)
        assert len(rows) == 6
        losers = [row["rejected"] for row in rows]
        assert sorted(losers) == list("abcdeg")  # everybody but the best loses once
        assert all(row["score_chosen"] > row["score_rejected"] for row in rows)
    assert one("tournament", row, seed=1) == one("tournament", row, seed=1)
    assert sides(one("tournament", row, seed=1)) != sides(one("tournament", row, seed=2))


@pytest.mark.parametrize("recipe", ["best_of_n", "all_pairs", "first_vs_rest", "tournament", "rejection_sampling"])
def test_lists_that_are_none(recipe: str) -> None:
    assert why(recipe, {"prompt": "Q", "completions": ["a", "b"]}) == "missing_column"
    assert why(recipe, LIST | {"completions": ["a"]}) == "bad_list"
    assert why(recipe, LIST | {"scores": [1, 2]}) == "bad_score"
    assert why(recipe, LIST | {"scores": [1, 2, 3, math.nan]}) == "bad_score"


# --- selection -------------------------------------------------------------------------------------------------------


def test_rejection_sampling_at_its_limits() -> None:
    row = {"prompt": "Q", "completions": list("abcd"), "scores": [1.0, 5.0, 2.0, 4.0]}
    assert one("rejection_sampling", row, beta=0)[0]["completions"] == ["b"]
    assert one("rejection_sampling", row, beta=1e-9)[0]["completions"] == ["b"]
    everything = one("rejection_sampling", row, beta=1e9)[0]
    assert (everything["completions"], everything["scores"]) == (list("abcd"), [1.0, 5.0, 2.0, 4.0])
    assert one("rejection_sampling", row, beta=1e300)[0]["completions"] == list("abcd")
    # With a number to reach, rounds go on over what is left: the best ones, in the order of the list.
    assert one("rejection_sampling", row, beta=0, n=3)[0]["completions"] == ["b", "c", "d"]
    assert one("rejection_sampling", row, beta=1e9, n=2)[0]["completions"] == ["a", "b"]
    assert one("rejection_sampling", row, beta=0, n=9)[0]["completions"] == list("abcd")
    with pytest.raises(ConfigError, match="must be 0 or more"):
        one("rejection_sampling", row, beta=-1)


def test_rejection_sampling_accepts_with_the_stated_probability() -> None:
    row = {"prompt": "Q", "completions": ["best", "worse"], "scores": [1.0, 0.0]}
    rows = [row | {"id": i} for i in range(4000)]
    kept = sum(len(made["completions"]) == 2 for made in apply("rejection_sampling", rows, beta=0.5))
    assert kept / 4000 == pytest.approx(math.exp(-2), abs=0.02)
    assert apply("rejection_sampling", rows[::-1], beta=0.5)[::-1] == apply("rejection_sampling", rows, beta=0.5)


def test_curated_chooses_by_softmax() -> None:
    row = {"prompt": "Q", "completions": ["x", "y"], "scores": [0.0, 1.0]}
    made = apply("curated", [row | {"id": i} for i in range(4000)], temperature=0.5)
    share = sum(r["completion"] == "y" for r in made) / 4000
    assert share == pytest.approx(1 / (1 + math.exp(-2)), abs=0.02)
    assert set(made[0]) == {"prompt", "completion"}
    assert one("curated", row, temperature=1e-4)[0]["completion"] == "y"


# --- self-play -------------------------------------------------------------------------------------------------------


def test_self_play_against_samples() -> None:
    row = {"prompt": "Q", "completion": "real", "samples": ["own", "real", "other"]}
    assert sides(one("self_play", row)) == [("real", "own"), ("real", "other")]
    assert why("self_play", row | {"samples": ["real"]}) == "no_pair"


def test_self_play_by_win_rates() -> None:
    row = {"prompt": "Q", "completions": list("abc"), "win_rates": [[0.5, 0.8, 0.3], [0.2, 0.5, 0.4], [0.7, 0.6, 0.5]]}
    items = one("self_play", row, mode="items")
    assert [(r["completion"], r["target"]) for r in items] == [
        ("a", pytest.approx(0.55)),
        ("b", pytest.approx(0.3)),
        ("c", pytest.approx(0.65)),
    ]
    assert sides(one("self_play", row, mode="pairs")) == [("c", "b")]
    assert one("self_play", row, mode="pairs", soft=True)[0]["p"] == 0.6
    assert why("self_play", row | {"win_rates": [[0.5, 0.8, 0.3]] * 3}, mode="items") == "bad_score"
    assert why("self_play", row | {"win_rates": [[0.5]]}, mode="items") == "bad_list"


# --- rules -----------------------------------------------------------------------------------------------------------

VERIFIER = """
def exact(prompts, completions, answer, **columns):
    assert len(prompts) == len(completions) == len(answer)
    return [c == a for c, a in zip(completions, answer)]

def broken(prompts, completions, **columns):
    raise KeyError('answer')
"""


def test_rule_checked(tmp_path: Path) -> None:
    (tmp_path / "verify.py").write_text(VERIFIER)
    verifier = f"{tmp_path / 'verify.py'}:exact"
    row = {"prompt": "1+1", "completions": ["2", "3", "2", "4"], "answer": "2"}
    pairs = one("rule_checked", row, verifier=verifier, max_pairs=99)
    assert sorted(sides(pairs)) == [("2", "3"), ("2", "3"), ("2", "4"), ("2", "4")]
    assert {(p["score_chosen"], p["score_rejected"]) for p in pairs} == {(1.0, 0.0)}
    assert len(one("rule_checked", row, verifier=verifier, max_pairs=2)) == 2
    items = one("rule_checked", row, verifier=verifier, mode="items")
    assert [(r["completion"], r["label"]) for r in items] == [("2", True), ("3", False), ("2", True), ("4", False)]
    assert why("rule_checked", row | {"answer": "9"}, verifier=verifier) == "no_pair"
    with pytest.raises(DataError, match=r"verify\.py:broken failed on row [0-9a-f]{16}: KeyError"):
        one("rule_checked", row, verifier=f"{tmp_path / 'verify.py'}:broken")
    with pytest.raises(ConfigError, match=r"verifier: .* has no function 'none'"):
        one("rule_checked", row, verifier=f"{tmp_path / 'verify.py'}:none")
    with pytest.raises(ConfigError, match=r"rule_checked\.verifier: missing"):
        one("rule_checked", row)


# --- consistency -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["kendall", "spearman"])
def test_agreement_of_rankings(measure: str) -> None:
    assert agreement([1, 2, 3], [10, 20, 30], measure) == pytest.approx(1)
    assert agreement([1, 2, 3], [3, 2, 1], measure) == pytest.approx(0)
    assert agreement([1, 2, 3], [5, 5, 5], measure) == 0.5
    # One of three couples swapped: tau = 1/3; rho = 1 - 6 (1 + 1) / 24 = 1/2.
    expected = (1 / 3 + 1) / 2 if measure == "kendall" else 0.75
    assert agreement([1, 2, 3], [2, 1, 3], measure) == pytest.approx(expected)


def test_agreement_is_scipys_with_ties_as_well() -> None:
    a, b = [1, 2, 2, 4], [1, 3, 2, 2]
    # By hand: couples agreeing 3 (12 13 14), opposing 1 (24), tied in a 1 (23), in b 1 (34): (3 - 1) / 5.
    assert agreement(a, b, "kendall") == pytest.approx((2 / 5 + 1) / 2)
    ranks = np.corrcoef([0, 1.5, 1.5, 3], [0, 3, 1.5, 1.5])[0, 1]
    assert agreement(a, b, "spearman") == pytest.approx((ranks + 1) / 2)
    assert agreement(a, b, "top_bottom") == 0.0
    assert agreement([1, 5, 3], [0, 9, 9], "top_bottom") == 1.0


def test_consistency_joins_by_content(tmp_path: Path) -> None:
    now = [
        {"prompt": "Q0", "completions": ["a", "b", "c"], "scores": [1, 2, 3]},
        {"prompt": "Q1", "completions": ["a", "b", "c"], "scores": [1, 2, 3]},
        {"prompt": "Q2", "completions": ["a", "b", "c"], "scores": [1, 2, 3]},
        {"prompt": "Q3", "completions": ["a", "b", "x"], "scores": [1, 2, 3]},
    ]
    before = [  # another order of prompts and of candidates, and Q1 is missing
        {"prompt": "Q3", "completions": ["a", "b", "c"], "scores": [1, 2, 3]},
        {"prompt": "Q2", "completions": ["c", "b", "a"], "scores": [0, 5, 9]},
        {"prompt": "Q0", "completions": ["c", "a", "b"], "scores": [9, 1, 5]},
    ]
    file = tmp_path / "before.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in before))
    report = DataReport()
    made = apply("consistency", now, report, previous=str(file))
    assert [(r["prompt"], r["chosen"], r["rejected"], r.get("p", 1.0)) for r in made] == [
        ("Q0", "c", "a", 1.0),
        ("Q2", "c", "a", 0.0),
    ]
    assert dict(report.skipped) == {"unmatched": 2}
    assert parse_row(made[1])["responses"] == ("a", "c")  # p = 0 turns the pair round
    averaged = apply("consistency", now, previous=str(file), average=True)
    assert [r["p"] for r in averaged] == [0.5, 0.5]
    with pytest.raises(ConfigError, match="is no file"):
        apply("consistency", now, previous=str(tmp_path / "none"))


# --- conditions ------------------------------------------------------------------------------------------------------

SCORED = {"prompt": "Q", "chosen": "good", "rejected": "bad", "score_chosen": 9, "score_rejected": 2.5}


def test_reward_augmented_swaps_the_second_copy() -> None:
    first, second = one("reward_augmented", SCORED, template="goal {goal}")
    assert first == {"prompt": "goal 9\nQ", "chosen": "good", "rejected": "bad", "goal": 9.0}
    assert second == {"prompt": "goal 2.5\nQ", "chosen": "bad", "rejected": "good", "goal": 2.5}
    assert why("reward_augmented", SCORED | {"score_chosen": 2.5}) == "bad_score"
    assert why("reward_augmented", {"prompt": "Q", "chosen": "a", "rejected": "b"}) == "missing_column"
    with pytest.raises(ConfigError, match="has no"):
        one("reward_augmented", SCORED, template="no goal")


@pytest.mark.parametrize("where", ["system", "user"])
@pytest.mark.parametrize("system", [True, False])
def test_reward_augmented_conversations_are_swapped_in_both_branches(where: str, system: bool) -> None:
    asked = [{"role": "user", "content": "Q"}]
    good, bad = [{"role": "assistant", "content": "good"}], [{"role": "assistant", "content": "bad"}]
    before = [{"role": "system", "content": "S"}] if system else []
    row = SCORED | {"chosen": [*before, *asked, *good], "rejected": [*before, *asked, *bad]}
    row.pop("prompt")  # an implicit prompt
    first, second = one("reward_augmented", row, template="goal {goal}", where=where)
    for made, goal, chosen, rejected in ((first, "9", good, bad), (second, "2.5", bad, good)):
        assert (made["chosen"], made["rejected"]) == (chosen, rejected)
        told = f"goal {goal}"
        if where == "user":
            assert made["prompt"] == [*before, {"role": "user", "content": f"{told}\nQ"}]
        else:
            content = f"S\n{told}" if system else told
            assert made["prompt"] == [{"role": "system", "content": content}, *asked]


def test_directional_ranks_by_the_direction_in_the_prompt() -> None:
    row = {"prompt": "Q", "completions": ["kind", "long"], "rewards": [[1.0, 0.0], [0.9, 2.0]]}
    straight = {"angle_min": 0.0, "angle_max": 0.0}
    (best,) = one("directional", row, **straight)
    assert best == {
        "prompt": "Maximise 100 x helpfulness + 0 x verbosity.\nQ",
        "direction": [100, 0],
        "completion": "kind",
    }
    (tilted,) = one("directional", row, angle_min=45.0, angle_max=45.0, mode="list")
    assert tilted["direction"] == [71, 71]
    assert tilted["scores"] == [pytest.approx(0.71), pytest.approx(0.71 * 2.9)]
    (pair,) = one("directional", row, angle_min=-45.0, angle_max=-45.0, mode="pairs")
    assert (pair["chosen"], pair["rejected"]) == ("kind", "long")
    assert pair["prompt"].startswith("Maximise 71 x helpfulness - 71 x verbosity.")
    drawn = [r["direction"] for r in apply("directional", [row | {"id": i} for i in range(200)])]
    assert all(71 <= v[0] <= 100 for v in drawn)
    assert len({tuple(v) for v in drawn}) > 20
    assert {v[1] < 0 for v in drawn} == {True, False}


def test_control_tokens() -> None:
    never = {"omit": 0.0, "good": "<+>", "bad": "<->"}
    made = one("control_tokens", SCORED, **never)
    assert made == [{"prompt": "Q<+>", "completion": "good"}, {"prompt": "Q<->", "completion": "bad"}]
    assert one("control_tokens", {"prompt": "Q", "completion": "A", "label": False}, **never)[0]["prompt"] == "Q<->"
    scored = {"prompt": "Q", "completion": "A", "score": 0.2}
    assert one("control_tokens", scored, **never)[0]["prompt"] == "Q<->"
    assert one("control_tokens", scored, lower_is_better=True, **never)[0]["prompt"] == "Q<+>"
    sentences = {"sentences": ["One. ", "Two. ", "Three."], "scores": [0.9, 0.1, 0.5]}
    assert one("control_tokens", sentences, **never) == [{"text": "<+>One. <->Two. <+>Three."}]
    asked = sentences | {"prompt": "Q"}
    assert one("control_tokens", asked, **never)[0] == {"prompt": "Q", "completion": "<+>One. <->Two. <+>Three."}
    assert one("control_tokens", asked, omit=1.0)[0]["completion"] == "One. Two. Three."
    chat = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    assert one("control_tokens", chat, **never)[0]["prompt"] == [{"role": "user", "content": "Q<+>"}]


# --- steps -----------------------------------------------------------------------------------------------------------


def test_step_pairs_begin_where_the_solutions_part() -> None:
    row = {"prompt": "Q:", "chosen_steps": ["a.", "b.", "c."], "rejected_steps": ["a.", "x.", "y."]}
    (pair,) = one("step_pairs", row)
    assert pair == {"prompt": "Q:a.", "chosen": "b.", "rejected": "x.", "step": 1}
    (whole,) = one("step_pairs", row, whole=True)
    assert (whole["chosen"], whole["rejected"]) == ("b.c.", "x.y.")
    assert one("step_pairs", row | {"confidence": 0.8})[0]["p"] == pytest.approx(0.8)
    assert one("step_pairs", row | {"confidence": 0.2})[0]["p"] == 0.5
    valued = row | {"chosen_value": 0.9, "rejected_value": 0.4}
    assert one("step_pairs", valued)[0]["score_chosen"] == 0.9
    assert why("step_pairs", valued, min_gap=0.6) == "no_pair"
    assert why("step_pairs", row | {"rejected_steps": ["a."]}) == "no_divergence"


def test_step_negatives_take_the_worst_step() -> None:
    row = {
        "prompt": "Q:",
        "steps": ["a.", "b.", "c."],
        "values": [0.8, 0.7, 0.1, 0.0],
        "alternatives": [None, "good.", None],
    }
    assert one("step_negatives", row) == [{"prompt": "Q:a.", "chosen": "good.", "rejected": "b.", "step": 1}]
    assert why("step_negatives", row | {"alternatives": ["x.", None, "y."]}) == "no_alternative"
    assert why("step_negatives", row, min_drop=0.7) == "no_pair"
    assert why("step_negatives", row | {"values": [0, 0.1, 0.2, 0.3]}) == "no_pair"
    assert why("step_negatives", row | {"values": [0, 1]}) == "bad_score"


# --- subsets ---------------------------------------------------------------------------------------------------------


def test_coreset_is_a_fixed_share() -> None:
    rows = [{"prompt": f"Q{i}", "completion": "A"} for i in range(100)]
    kept = apply("coreset", rows)
    assert len(kept) == 5
    assert all(row in rows for row in kept)
    assert sorted(r["prompt"] for r in apply("coreset", rows[::-1])) == sorted(r["prompt"] for r in kept)
    assert apply("coreset", rows, seed=1) != kept
    assert len(apply("coreset", rows[:3])) == 1
    assert apply("coreset", rows, fraction=1) == rows
    with pytest.raises(ConfigError, match="0 < fraction <= 1"):
        apply("coreset", rows, fraction=0)


# --- files -----------------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_make_writes_rows_with_their_origin_and_a_report(tmp_path: Path) -> None:
    rows = [LIST, LIST | {"prompt": "R", "judge": "me", "meta": {"from": "x"}}, LIST | {"scores": [1, 1, 1, 1]}]
    source = write(tmp_path / "in.jsonl", rows)
    with source.open("a") as file:
        file.write("broken\n")
    made = make("best_of_n", source, tmp_path / "new" / "out.jsonl", judge="rm-7", min_gap="0.5")
    out = [json.loads(line) for line in made.path.read_text().splitlines()]
    assert (made.rows, len(out), made.report.rows, made.report.kept) == (2, 2, 4, 2)
    settings = {"min_gap": 0.5, "ties": "drop"}
    meta = {"recipe": "best_of_n", "source": "in.jsonl", "judge": "rm-7", "settings": settings}
    assert {k: v for k, v in out[0]["meta"].items() if k != "key"} == meta
    assert out[1]["meta"]["judge"] == "me"
    assert out[1]["meta"]["before"] == {"from": "x"}
    report = json.loads((tmp_path / "new" / "out.jsonl.report.json").read_text())
    assert {reason: entry["count"] for reason, entry in report["skipped"].items()} == {"no_pair": 1, "bad_json": 1}
    assert [p.name for p in (tmp_path / "new").iterdir() if p.name.startswith(".tmp")] == []
    assert "2 rows made; 4 rows read, 2 kept" in made.summary()
    assert parse_row(out[0])["kind"] == "pair"  # what comes out can be trained on


def test_make_reads_and_writes_parquet(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [LIST, LIST | {"prompt": "R"}])
    made = make("all_pairs", source, tmp_path / "out.parquet")
    table = pq.read_table(made.path).to_pylist()
    assert (made.rows, len(table)) == (10, 10)
    assert json.loads(table[0]["meta"])["recipe"] == "all_pairs"
    again = make("reward_augmented", made.path, tmp_path / "twice.jsonl")
    assert again.rows == 20
    mixed = write(tmp_path / "mixed.jsonl", [LIST, LIST | {"prompt": [{"role": "user", "content": "Q"}]}])
    with pytest.raises(DataError, match=r"fit no parquet table .* write \.jsonl instead"):
        make("best_of_n", mixed, tmp_path / "mixed.parquet")


def test_make_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [LIST])
    with pytest.raises(ConfigError, match=r"recipe 'best_of' not found; did you mean 'best_of_n'\?"):
        make("best_of", source, tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match=r"best_of_n\.mingap: unknown setting; did you mean 'min_gap'\?"):
        make("best_of_n", source, tmp_path / "out.jsonl", mingap=1)
    with pytest.raises(ConfigError, match=r"best_of_n\.min_gap: got 'much'"):
        make("best_of_n", source, tmp_path / "out.jsonl", min_gap="much")
    with pytest.raises(ConfigError, match=r"\.jsonl, \.parquet expected"):
        make("best_of_n", source, tmp_path / "out.txt")
    with pytest.raises(DataError, match="no such file"):
        make("best_of_n", tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(DataError, match=r"made nothing.*no_pair"):
        make("best_of_n", source, tmp_path / "out.jsonl", min_gap=99)
    assert not (tmp_path / "out.jsonl").exists()


def test_every_recipe_says_what_it_does() -> None:
    assert set(OF_ALL_ROWS) == {"consistency", "coreset"}
    assert all((function.__doc__ or "").strip() for function in RECIPES.values())


# --- images ----------------------------------------------------------------------------------------------------------


def photo() -> Image.Image:
    grid = np.indices((32, 48)).sum(0) * 3 % 256
    return Image.fromarray(np.stack([grid, 255 - grid, grid // 2], -1).astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float)


@pytest.mark.parametrize("kind", KINDS)
def test_corruption_keeps_the_size_and_grows_with_strength(kind: Any) -> None:
    image = photo()
    before = pixels(image)

    def damage(strength: float) -> float:
        made = image_corruption(image, kind, strength, torch.Generator().manual_seed(0))
        assert (made.size, made.mode) == (image.size, "RGB")
        return float(np.abs(pixels(made) - before).mean())

    assert damage(0.0) == 0.0
    assert 0 < damage(0.3) < damage(1.0)
    assert np.array_equal(pixels(image), before)  # the original stays
    twice = [image_corruption(image, kind, 0.5, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert np.array_equal(pixels(twice[0]), pixels(twice[1]))


def test_corruption_by_its_definition() -> None:
    image = photo()
    masked = pixels(image_corruption(image, "mask", 0.25, torch.Generator().manual_seed(0)))
    grey = (masked == 128).all(-1).reshape(8, 4, 8, 6).all((1, 3))
    assert grey.sum() == 16
    assert (pixels(image_corruption(image, "mask", 1.0)) == 128).all()
    flat = Image.new("RGB", (64, 64), (128, 128, 128))
    noisy = pixels(image_corruption(flat, "noise", 0.2, torch.Generator().manual_seed(0)))
    assert noisy.std() == pytest.approx(0.2 * 127.5, rel=0.05)
    with pytest.raises(ConfigError, match="one of noise, blur, mask, jpeg"):
        image_corruption(image, "melt", 0.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="strength 2"):
        image_corruption(image, "blur", 2.0)


def test_the_draws_of_rows_are_independent() -> None:
    row = {"prompt": "Q", "completions": ["x", "y"], "scores": [0.0, 0.0]}
    made = apply("curated", [row | {"id": i} for i in range(1000)])
    counts = Counter(r["completion"] for r in made)
    assert 430 < counts["x"] < 570
