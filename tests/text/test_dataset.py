"""From files to tokenised data to micro-batches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from text_support import EOS, build

from diffalign.config import RunConfig
from diffalign.config_loading import build as build_config
from diffalign.data.loader import BatchPlan
from diffalign.data.pipeline import is_held_out
from diffalign.data.report import DataReport
from diffalign.errors import ConfigError, DataError
from diffalign.losses import Totals
from diffalign.losses.base import Needs
from diffalign.losses.unlearning import IdkDPO
from diffalign.text.batch import TextExample, TextRow
from diffalign.text.dataset import InterleavedPlan, TextData, TextMicroBatches, make_plan
from diffalign.text.prepare import prepare_text


class Family:
    """As much of a language model as data needs."""

    def __init__(self, **settings: Any) -> None:
        self.tokenizer = build(**settings)


def run(
    folder: Path,
    rows: list[dict[str, Any]],
    objective: str = "dpo",
    *,
    needs: Needs | None = None,
    retain: list[dict[str, Any]] | None = None,
    text: Mapping[str, Any] | None = None,
    held_out: float = 0.0,
    **data: Any,
) -> tuple[TextData, DataReport]:
    section: dict[str, Any] = {"format": "text", "sources": [write(folder / "a" / "train.jsonl", rows)]} | data
    if retain is not None:
        section["retain_sources"] = [write(folder / "b" / "train.jsonl", retain)]
    return prepare_text(config(folder, objective, section, text, held_out), Family(), needs=needs)


def config(
    folder: Path, objective: str, data: Mapping[str, Any], text: Mapping[str, Any] | None = None, held_out: float = 0.0
) -> RunConfig:
    tree = {
        "output_dir": str(folder / "run"),
        "model": {"family": "causal_lm", "pretrained": "tiny-lm"},
        "objective": {"name": objective},
        "data": data,
        "text": text or {},
        "evaluation": {"held_out_fraction": held_out},
    }
    return build_config(tree)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(data: TextData) -> list[list[str]]:
    tokenizer = build()
    return [[str(tokenizer.decode(list(row.response))) for row in data.rows(i)] for i in range(len(data))]


def pair(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"Q{number}", "chosen": f"good {number}", "rejected": f"bad {number}"} | more


def item(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"Q{number}", "completion": f"answer {number}"} | more


# --- preparing -------------------------------------------------------------------------------------------------------


def test_pairs_come_out_as_they_are(tmp_path: Path) -> None:
    rows = [pair(0, score_chosen=2, score_rejected=1, margin=0.5), pair(1, weight=3, p=0.25), pair(2)]
    data, report = run(tmp_path, rows, ties="soft")
    assert texts(data) == [
        [f"good 0{EOS}", f"bad 0{EOS}"],
        [f"bad 1{EOS}", f"good 1{EOS}"],
        [f"good 2{EOS}", f"bad 2{EOS}"],
    ]
    assert data.prompts == ["Q0", "Q1", "Q2"]
    first, second = data.example(0), data.example(1)
    assert (first.kind, first.margin, first.gains, first.p, first.weight) == ("pair", 0.5, (2.0, 1.0), 1.0, 1.0)
    assert (second.p, second.weight, second.gains) == (0.75, 3.0, None)
    assert report.kept == report.rows == 3
    assert data.tokens == sum(len(row.ids) for i in range(3) for row in data.rows(i))


def test_every_row_is_accounted_for(tmp_path: Path) -> None:
    (tmp_path / "keep.py").write_text("def keep(record):\n    return record.prompt != 'Q6'\n")
    (tmp_path / "exclude.txt").write_text("q5\n")
    chat = {"prompt": [{"role": "user", "content": "Q5 "}]}
    rows = [
        pair(0),
        pair(0),  # a duplicate
        pair(0, chosen="bad 0", rejected="good 0"),  # the same the other way round
        pair(1, p=0.5),  # a tie
        pair(2, p=None),  # unlabelled
        pair(3, rejected="good 3"),  # identical
        pair(4, chosen="x" * 30 + "A", rejected="x" * 30 + "B"),  # identical once cut
        pair(5),  # excluded
        chat | {"chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]},
        pair(6),  # filtered
        {"prompt": "Q7", "completions": ["a", "b"], "scores": [1, 0]},  # a list
        pair(8),
    ]
    data, report = run(
        tmp_path,
        rows,
        exclude_prompts=[str(tmp_path / "exclude.txt")],
        filter=f"{tmp_path / 'keep.py'}:keep",
        text={"max_length": 20},
    )
    assert data.prompts == ["Q0", "Q8"]
    assert dict(report.skipped) == {
        "duplicate": 2,
        "tie": 1,
        "unlabelled": 1,
        "identical_sides": 1,
        "identical_after_truncation": 1,
        "excluded_prompt": 2,
        "filtered": 1,
        "wrong_kind": 1,
    }
    assert (report.rows, report.kept, report.unusable) == (12, 2, 3)
    assert "diffalign data make all_pairs" in report.listed["wrong_kind"][0]["detail"]
    assert report.source["kind"] == "file"


def test_ties_max_pairs_and_weights_by_prompt(tmp_path: Path) -> None:
    rows = [pair(0, p=0.5), pair(1), pair(1, chosen="better"), pair(2)]
    data, report = run(tmp_path, rows, ties="soft", max_pairs=3, weight_by_prompt=True)
    assert [data.example(i).p for i in range(3)] == [0.5, 1.0, 1.0]
    assert [data.example(i).weight for i in range(3)] == [1.0, 0.5, 0.5]
    assert (len(data), dict(report.notes)) == (3, {"soft_tie": 1})
    assert len(run(tmp_path, [pair(0), pair(0)], drop_duplicates=False)[0]) == 2


def test_data_that_is_mostly_unusable_or_gone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 of 3 rows are unusable.*empty_response"):
        run(tmp_path, [pair(0), pair(1, chosen=""), pair(2, chosen=" ")])
    assert len(run(tmp_path, [pair(0), pair(1, chosen=""), pair(2, chosen=" ")], max_unusable=0.9)[0]) == 1
    with pytest.raises(DataError, match="no texts left"):
        run(tmp_path, [pair(0, p=0.5)])
    with pytest.raises(ConfigError, match=r"data\.format=pickapic reads images"):
        run(tmp_path, [pair(0)], format="pickapic")
    with pytest.raises(ConfigError, match="theirs=ours expected"):
        run(tmp_path, [pair(0)], rename=["question"])


def test_rename_and_implicit_names(tmp_path: Path) -> None:
    rows = [{"question": "Who?", "answer": "Ann"}]
    data, _ = run(tmp_path, rows, "sft", rename=["question=prompt", "answer=completion"])
    assert (data.prompts, texts(data)) == (["Who?"], [[f"Ann{EOS}"]])


def test_a_pair_serves_objectives_on_items_and_on_lists(tmp_path: Path) -> None:
    row = pair(0, score_chosen=2, score_rejected=1)
    data, _ = run(tmp_path, [row], "kto")
    assert texts(data) == [[f"good 0{EOS}"], [f"bad 0{EOS}"]]
    examples = [data.example(i) for i in range(2)]
    assert [(e.kind, e.label, e.target, e.gains) for e in examples] == [("item", 1, 2.0, None), ("item", 0, 1.0, None)]
    assert examples[0].id != examples[1].id
    assert all(int(e.id, 16) >= 0 for e in examples)
    soft, _ = run(tmp_path, [row | {"p": 0.75}], "kto")
    assert [soft.example(i).label for i in range(2)] == [0.75, 0.25]
    only, _ = run(tmp_path, [row], needs=Needs(layout=("items",), labels=(1,)))
    assert texts(only) == [[f"good 0{EOS}"]]
    listed, _ = run(tmp_path, [row, pair(1)], needs=Needs(layout=("lists",)))
    assert [listed.example(i).gains for i in range(2)] == [(2.0, 1.0), (1.0, 0.0)]
    asked, _ = run(tmp_path, [row | {"answer": 4}], needs=Needs(layout=("groups",)))
    example = asked.example(0)
    assert (example.kind, len(example.rows), example.rows[0].start, example.columns["answer"]) == ("prompt", 1, 3, 4)


def test_columns_are_kept_where_rewards_may_read_them(tmp_path: Path) -> None:
    rows = [pair(i, answer=i) for i in range(40)]
    data, _ = run(tmp_path, rows, held_out=0.3)
    out = [is_held_out(f"Q{i}", 0.3) for i in range(40)]
    assert [dict(data.example(i).columns) for i in range(40)] == [{"answer": i} if out[i] else {} for i in range(40)]
    assert 0 < sum(out) < 40


def test_numbers_that_an_objective_reads_besides(tmp_path: Path) -> None:
    needs = Needs(layout=("pairs",), extra=("llm",))
    rows = [pair(0, llm=[-1, -2.5]), pair(1, llm_chosen=-3, llm_rejected=-4), pair(2, llm=[1]), pair(3)]
    data, report = run(tmp_path, rows, needs=needs)
    assert [dict(data.example(i).extra) for i in range(2)] == [{"llm": (-1.0, -2.5)}, {"llm": (-3.0, -4.0)}]
    assert dict(report.skipped) == {"missing_column": 2}
    batch = batches(data, 2, needs=needs)[0]
    chosen = {"Q0": (-1.0, -2.5), "Q1": (-3.0, -4.0)}
    order = [data.prompts[data.ids.index(i)] for i in batch.ids]
    assert batch.extra["llm"].tolist() == [chosen[p][0] for p in order] + [chosen[p][1] for p in order]


# --- unlearning ------------------------------------------------------------------------------------------------------

FORGET = [item(i, alternate="no idea") for i in range(5)]
RETAIN = [item(10 + i, alternate="no idea") for i in range(3)]


def test_two_sources_are_forget_and_retain(tmp_path: Path) -> None:
    data, report = run(tmp_path, FORGET, "npo", retain=RETAIN)
    assert data.retain is not None
    assert data.retain.tolist() == [False] * 5 + [True] * 3
    assert [data.example(i).label for i in range(8)] == [0.0] * 5 + [1.0] * 3
    assert [data.example(i).kind for i in range(8)] == ["item"] * 8
    assert len(set(data.ids)) == 8  # although both files have the same name
    assert (report.rows, report.source["retain"]["shards"]) == (8, 1)


def test_labels_say_the_same_in_one_source(tmp_path: Path) -> None:
    rows = [item(0, label=0), item(1, label=1), item(2, label=False)]
    data, _ = run(tmp_path, rows, "npo")
    assert data.retain is not None
    assert data.retain.tolist() == [False, True, False]
    unpaired, _ = run(tmp_path, rows, "kto")
    assert unpaired.retain is None  # the balance of KTO's labels is the data's


def test_alternates_make_pairs_against_what_is_to_be_forgotten(tmp_path: Path) -> None:
    data, _ = run(tmp_path, FORGET[:2], "idk_dpo", retain=RETAIN[:2])
    assert texts(data) == [
        [f"no idea{EOS}", f"answer 0{EOS}"],
        [f"no idea{EOS}", f"answer 1{EOS}"],
        [f"answer 10{EOS}"],
        [f"answer 11{EOS}"],
    ]
    assert data.kinds == ["pair", "pair", "item", "item"]
    batch = batches(data, 2, needs=IdkDPO.needs)[0]
    assert batch.layout.pairs is not None
    assert batch.layout.items is not None


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_forget_and_retain_samples_take_turns(tmp_path: Path, size: int) -> None:
    data, _ = run(tmp_path, FORGET, "npo", retain=RETAIN)
    plan = make_plan(data, range(8), size, seed=3)
    assert isinstance(plan, InterleavedPlan)
    assert data.retain is not None
    stream = [index for k in range(30) for index, _ in plan.micro_batch(k)]
    assert [bool(data.retain[i]) for i in stream] == [j % 2 == 1 for j in range(len(stream))]
    forget = stream[::2]
    epochs = [sorted(forget[i : i + 5]) for i in range(0, len(forget) - 4, 5)]
    assert all(epoch == [0, 1, 2, 3, 4] for epoch in epochs)  # all of the set before any of it again
    # The same step in more and smaller micro-batches has the same samples.
    whole = make_plan(data, range(8), 2 * size, seed=3)
    assert [i for i, _ in whole.micro_batch(1)] == stream[2 * size : 4 * size]
    assert isinstance(make_plan(data, [0, 1, 2], 2, seed=3), BatchPlan)  # only one of the sets is left


# --- the text world --------------------------------------------------------------------------------------------------


def test_the_text_world_makes_its_data(tmp_path: Path) -> None:
    section = {"format": "pickapic", "world_text": {"kind": "forget"}}
    data, report = prepare_text(config(tmp_path, "npo", section), Family())
    assert data.retain is not None
    assert 0 < data.retain.sum() < len(data)
    assert report.kept == len(data)
    section = {"world_text": {"kind": "prompts", "size": 20}}
    asked, _ = prepare_text(config(tmp_path, "grpo", section), Family(), needs=Needs(layout=("groups",)))
    assert (len(asked), set(asked.kinds)) == (20, {"prompt"})
    assert "answer" in asked.example(0).columns


# --- storage ---------------------------------------------------------------------------------------------------------


def example(number: int, prompt: str, *lengths: int, kind: str = "pair", **more: Any) -> TextExample:
    """Rows of two prompt tokens and responses of given lengths; every token of example n is n."""
    rows = tuple(TextRow(ids=(number,) * (2 + n), start=2) for n in lengths)
    return TextExample(id=f"{number:016x}", kind=kind, rows=rows, prompt=prompt, **more)  # type: ignore[arg-type]


def test_examples_come_back_as_they_went_in() -> None:
    marked = TextRow(ids=(5, 6, 7, 8), start=1, segment=(0, 2, 2))
    given = [
        example(1, "a", 3, 2, p=0.75, gains=(1.0, 0.5), margin=0.25, extra={"x": (1.0, 2.0)}),
        example(2, "b", 4, kind="item", label=0.0, target=0.5, weight=2.0),
        TextExample(id="3" * 16, kind="pair", rows=(marked, TextRow(ids=(1, 2), start=1)), prompt="c"),
        example(4, "d", 1, 2, 3, kind="list", gains=(3.0, 2.0, 1.0)),
        TextExample(id="5" * 16, kind="prompt", rows=(TextRow(ids=(9, 9), start=2),), prompt="e", columns={"k": [1]}),
        TextExample(id="6" * 16, kind="item", rows=(marked,), prompt="f"),
    ]
    data = TextData(given, max_length=10)
    assert [data.example(i) for i in range(len(data))] == given


def test_the_split_keeps_prompts_together_and_orders_by_id() -> None:
    given = [example(number, f"p{number % 20}", 1, 2) for number in range(100)]
    data = TextData(given, max_length=10)
    train, held = data.split(0.3)
    assert sorted(train + held) == list(range(100))
    assert not {data.prompts[i] for i in train} & {data.prompts[i] for i in held}
    assert all(is_held_out(data.prompts[i], 0.3) for i in held)
    assert len(held) % 5 == 0
    assert 0 < len(held) < 100
    shuffled = TextData(given[::-1], max_length=10)
    plans = [make_plan(d, d.split(0.3)[0], 4, seed=1) for d in (data, shuffled)]
    drawn = [[d.ids[i] for k in range(20) for i, _ in p.micro_batch(k)] for d, p in zip((data, shuffled), plans)]
    assert drawn[0] == drawn[1]  # the order of the rows in the file does not matter


# --- micro-batches ---------------------------------------------------------------------------------------------------


def batches(data: TextData, size: int, *, needs: Needs | None = None, per_step: int = 1) -> TextMicroBatches:
    plan = make_plan(data, range(len(data)), size, seed=0)
    return TextMicroBatches(data, plan, pad_id=0, needs=needs or Needs(), micro_batches_per_step=per_step)


def test_a_micro_batch_holds_the_samples_of_the_plan() -> None:
    data = TextData([example(n, f"p{n}", n, n + 1) for n in range(1, 7)], max_length=20)
    made = batches(data, 3)
    for k in range(4):
        batch = made[k]
        indices = [index for index, _ in made.plan.micro_batch(k)]
        assert batch.ids == tuple(data.ids[i] for i in indices)
        assert batch.response_mask.sum(1).tolist() == [i + 1 for i in indices] + [i + 2 for i in indices]
        assert batch.input_ids[:3, 0].tolist() == [i + 1 for i in indices]
        assert batch.layout.pairs is not None
        assert batch.layout.pairs.uid is not None
    assert torch.equal(made[1].input_ids, batches(data, 3)[1].input_ids)


def test_totals_are_those_of_the_whole_step_and_do_not_depend_on_its_cutting() -> None:
    given = [example(n, f"p{n}", n, n + 1) for n in range(1, 13)]
    data = TextData(given, max_length=30)
    made = batches(data, 2, per_step=3)
    step = [index for k in (3, 4, 5) for index, _ in made.plan.micro_batch(k)]
    chosen = sum(i + 1 for i in step)
    expected = Totals(items=6, units=2 * chosen + 6, chosen_units=chosen, chosen_prompt_units=6)
    assert [made[k].totals for k in (3, 4, 5)] == [expected] * 3
    counted = sum(int(made[k].response_mask.sum()) for k in (3, 4, 5))
    assert expected.units == counted
    for size, per_step in ((1, 6), (6, 1), (3, 2)):
        assert batches(data, size, per_step=per_step).totals(1) == expected


def test_totals_tell_pairs_from_items_and_labels_apart() -> None:
    given = [
        example(1, "a", 3, 5),
        example(2, "b", 7, kind="item", label=1.0),
        example(3, "c", 11, kind="item", label=0.0),
    ]
    data = TextData(given, max_length=30)
    assert data.totals([0, 1, 2, 1]) == Totals(
        items=4,
        units=3 + 5 + 7 + 11 + 7,
        chosen_units=3,
        chosen_prompt_units=1,
        item_units=25,
        positive_items=2,
        positive_units=14,
    )
    assert data.totals([0]).positive_items is None


KTO = Needs(layout=("items",), stats=("z0",))


def test_mismatched_rows_have_the_response_of_another_prompt() -> None:
    given = [example(n, f"p{n % 3}", n, kind="item") for n in range(1, 10)]
    data = TextData(given, max_length=30)
    made = batches(data, 4, needs=KTO)
    for k in range(12):
        indices = [index for index, _ in made.plan.micro_batch(k)]
        batch = made[k]
        assert batch.layout.items is not None
        rows = batch.input_ids[batch.layout.items.mismatched]
        masks = batch.response_mask[batch.layout.items.mismatched]
        assert len(rows) == 4
        for place, (index, row, mask) in enumerate(zip(indices, rows, masks)):
            others = [indices[(place - back) % 4] for back in (1, 2, 3)]
            expected = next(i for i in others if data.prompts[i] != data.prompts[index])
            assert row[:2].tolist() == [index + 1] * 2  # its own prompt
            assert row[mask].tolist() == [expected + 1] * (expected + 1)  # the response of the one before it
    assert made[0].totals == batches(data, 4)[0].totals  # these rows count for nothing


def test_a_micro_batch_of_one_prompt_looks_further() -> None:
    given = [example(n, "often", 2, kind="item") for n in range(1, 12)] + [example(12, "once", 3, kind="item")]
    data = TextData(given, max_length=4)
    made = batches(data, 2, needs=KTO)
    alone = next(k for k in range(6) if 11 not in [i for i, _ in made.plan.micro_batch(k)])
    rows = made.mismatched([i for i, _ in made.plan.micro_batch(alone)], alone)
    assert [row.response for row in rows] == [(12, 12)] * 2  # cut at max_length
    assert all(len(row.ids) == 4 for row in rows)


def test_batches_that_cannot_be_made_are_refused() -> None:
    same = TextData([example(n, "p", 2, kind="item") for n in (1, 2)], max_length=9)
    with pytest.raises(DataError, match="got 1 prompts and 2 samples"):
        batches(same, 2, needs=KTO)
    two = TextData([example(n, f"p{n}", 2, kind="item") for n in (1, 2)], max_length=9)
    with pytest.raises(DataError, match="got 2 prompts and 1 samples"):
        batches(two, 1, needs=KTO)
    with pytest.raises(DataError, match="pairs and items together"):
        batches(two, 1, needs=Needs(layout=("pairs", "items")))
    asked = TextData([TextExample(id="0", kind="prompt", rows=(TextRow(ids=(1,), start=1),))], max_length=9)
    with pytest.raises(DataError, match="prompts without responses"):
        batches(asked, 1)
