"""Every format of TRL, and every reason not to use a row."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign import plugins
from diffalign.config import DataConfig
from diffalign.data.readers import BadRow, Place
from diffalign.data.report import DataReport
from diffalign.data.source import resolve
from diffalign.errors import ConfigError, DataError
from diffalign.text.records import TextRecord, parse_row, renamed, split_messages, split_text


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def says(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def record(row: dict[str, Any]) -> TextRecord:
    return TextRecord(id="0", **parse_row(row))


def reason(row: dict[str, Any]) -> str:
    with pytest.raises(BadRow) as caught:
        parse_row(row)
    return caught.value.reason


# --- TRL's formats ---------------------------------------------------------------------------------------------------


def test_standard_preference() -> None:
    found = record({"prompt": "The sky is", "chosen": " blue.", "rejected": " green.", "source": "x"})
    assert (found.kind, found.prompt, found.responses) == ("pair", "The sky is", (" blue.", " green."))
    assert (found.p, found.weight, found.margin, found.gains, found.columns) == (1.0, 1.0, 0.0, None, {"source": "x"})


def test_conversational_preference() -> None:
    found = record({"prompt": [user("Colour?")], "chosen": [says("Blue.")], "rejected": [says("Green.")]})
    assert found.prompt == (user("Colour?"),)
    assert found.responses == ((says("Blue."),), (says("Green."),))
    assert found.prompt_text == "Colour?"


def test_conversational_implicit_prompt_is_the_longest_common_prefix() -> None:
    system = {"role": "system", "content": "Be brief."}
    shared = [system, user("Hi"), says("Hello"), user("Colour?")]
    found = record({"chosen": [*shared, says("Blue.")], "rejected": [*shared, says("Green.")]})
    assert found.prompt == tuple(shared)
    assert found.responses == ((says("Blue."),), (says("Green."),))
    assert found.prompt_text == "system: Be brief.\nuser: Hi\nassistant: Hello\nuser: Colour?"


def test_standard_implicit_prompt() -> None:
    found = record({"chosen": "The sky is blue.", "rejected": "The sky is green."})
    assert (found.prompt, found.responses) == ("The sky is", (" blue.", " green."))


def test_ultrafeedback_has_a_text_prompt_beside_conversations() -> None:
    row = {"prompt": "Colour?", "chosen": [user("Colour?"), says("Blue.")], "rejected": [user("Colour?"), says("Red.")]}
    found = record(row | {"score_chosen": 8.5, "score_rejected": 3.0, "prompt_id": "7"})
    assert (found.prompt, found.gains) == ((user("Colour?"),), (8.5, 3.0))
    assert found.responses == ((says("Blue."),), (says("Red."),))
    assert found.columns["prompt_id"] == "7"


def test_a_conversation_that_repeats_its_prompt_loses_it() -> None:
    row = {"prompt": [user("Q")], "chosen": [user("Q"), says("a")], "rejected": [user("Q"), says("b")]}
    assert record(row).responses == ((says("a"),), (says("b"),))


@pytest.mark.parametrize(
    ("value", "label"), [(True, 1.0), (False, 0.0), (1, 1.0), (0, 0.0), (0.25, 0.25), ("true", 1.0), ("0", 0.0)]
)
def test_unpaired(value: Any, label: float) -> None:
    found = record({"prompt": "Q", "completion": " A", "label": value})
    assert (found.kind, found.responses, found.label) == ("item", (" A",), label)


def test_prompt_completion_messages_text_and_prompt_only() -> None:
    assert record({"prompt": "Q", "completion": " A"}).label == 1.0
    chat = record({"messages": [user("Q"), says("A"), user("R"), says("B")]})
    assert (chat.kind, chat.prompt, chat.responses) == ("item", (user("Q"), says("A"), user("R")), ((says("B"),),))
    shared = record({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]})
    assert (shared.prompt, shared.responses) == ((user("Q"),), ((says("A"),),))
    assert (record({"text": "all of it"}).prompt, record({"text": "all of it"}).responses) == ("", ("all of it",))
    asked = record({"prompt": "Q", "answer": 7, "weight": 3})
    assert (asked.kind, asked.responses, asked.columns) == ("prompt", (), {"answer": 7, "weight": 3})


def test_ranked_lists_from_scores_and_ranks() -> None:
    row = {"prompt": "Q", "completions": ["a", "b", "c"]}
    assert record(row | {"scores": [0.5, 2, 1]}).gains == (0.5, 2.0, 1.0)
    found = record(row | {"rank": [1, 3, 2]})
    assert (found.kind, found.gains) == ("list", (2.0, 0.0, 1.0))  # rank 1 is the best
    chat = record({"prompt": [user("Q")], "completions": [[says("a")], [says("b")]], "scores": [1, 0]})
    assert chat.responses == ((says("a"),), (says("b"),))


@pytest.mark.parametrize("names", [("chosen-rating", "rejected-rating"), ("reward_chosen", "reward_rejected")])
def test_score_columns_margin_and_weight(names: tuple[str, str]) -> None:
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", names[0]: 4, names[1]: "2.5", "margin": 1.5, "weight": 2}
    found = record(row)
    assert (found.gains, found.margin, found.weight) == ((4.0, 2.5), 1.5, 2.0)


def test_soft_labels_put_the_likelier_side_first() -> None:
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2, "margin": 0.5}
    kept = record(row | {"p": 0.75})
    assert (kept.responses, kept.p, kept.margin, kept.gains) == (("a", "b"), 0.75, 0.5, (1.0, 2.0))
    turned = record(row | {"p": 0.25, "chosen_segments": [[0, 1, 3]]})
    assert (turned.responses, turned.p, turned.margin, turned.gains) == (("b", "a"), 0.75, -0.5, (2.0, 1.0))
    assert turned.segments == (None, ((0, 1, 3),))
    assert record(row | {"p": None}).p is None  # the row says that it has no label


def test_alternate_target_and_rename() -> None:
    row = {"question": "Who?", "answer": "Ann.", "idk": "I do not know.", "label": 0, "target": 0.7, "prompt": "old"}
    found = record(renamed(row, {"question": "prompt", "answer": "completion", "idk": "alternate"}))
    assert (found.prompt, found.responses, found.alternate) == ("Who?", ("Ann.",), "I do not know.")
    assert (found.label, found.target) == (0.0, 0.7)


def test_segments_as_texts_and_as_spans() -> None:
    row = {"prompt": "Q", "chosen": "one two one", "rejected": "nothing"}
    found = record(row | {"chosen_segments": [["one", 1], ["one", 2]], "rejected_segments": [[2, 5, 1]]})
    assert found.segments == (((0, 3, 1), (8, 11, 2)), ((2, 5, 1),))
    for wrong in ([["two", 1], ["one two", 2]], [["", 1]], [[0, 99, 1]], [["one", 0]], [["one"]], "one", [[5, 2, 1]]):
        assert reason(row | {"chosen_segments": wrong}) == "bad_segment"


def test_parts_of_a_message_are_joined_and_nulls_dropped() -> None:
    parts = [{"type": "text", "text": "Co"}, {"type": "text", "text": "lour?"}]
    row = {
        "prompt": [{"role": "user", "content": parts, "tool_calls": None}],
        "chosen": [says("a")],
        "rejected": [says("b")],
    }
    assert record(row).prompt == (user("Colour?"),)


# --- reasons ---------------------------------------------------------------------------------------------------------

PAIR = {"prompt": "Q", "chosen": "a", "rejected": "b"}
CHAT = {"prompt": [user("Q")], "chosen": [says("a")], "rejected": [says("b")]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "Q"}, "missing_column"),
        ({"prompt": "Q", "chosen": "a"}, "missing_column"),
        ({"prompt": "Q", "chosen": "a", "rejected": None}, "missing_column"),
        ({"prompt": "Q", "completions": ["a", "b"]}, "missing_column"),
        (PAIR | {"prompt": "  "}, "empty_prompt"),
        (PAIR | {"prompt": 3}, "bad_prompt"),
        (PAIR | {"rejected": " \n"}, "empty_response"),
        (CHAT | {"rejected": [says("")]}, "empty_response"),
        (PAIR | {"rejected": "a"}, "identical_sides"),
        (PAIR | {"rejected": 7}, "not_text"),
        (PAIR | {"rejected": [says("b")]}, "mixed_formats"),
        (CHAT | {"chosen": "a", "rejected": "b"}, "mixed_formats"),
        (CHAT | {"prompt": [says("Q")]}, "role_order"),
        (CHAT | {"prompt": [user("Q"), says("A")]}, "role_order"),
        (CHAT | {"prompt": [user("Q"), {"role": "system", "content": "S"}, user("R")]}, "role_order"),
        (CHAT | {"chosen": [user("a")]}, "role_order"),
        (CHAT | {"chosen": [says("a"), user("b"), says("c")]}, "role_order"),
        (CHAT | {"prompt": [{"role": "wizard", "content": "Q"}]}, "role_order"),
        ({"chosen": [user("Q"), says("a")], "rejected": [user("R"), says("b")]}, "role_order"),
        ({"messages": [user("Q"), says("a"), user("b")]}, "role_order"),
        (CHAT | {"prompt": []}, "bad_messages"),
        (CHAT | {"prompt": ["Q"]}, "bad_messages"),
        (CHAT | {"prompt": [{"role": "user", "content": 1}]}, "bad_messages"),
        (CHAT | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "not_text"),
        ({"prompt": "Q", "completion": "a", "label": "maybe"}, "bad_label"),
        ({"prompt": "Q", "completion": "a", "label": 2}, "bad_label"),
        ({"prompt": "Q", "completion": "a", "label": None}, "missing_label"),
        ({"prompt": "Q", "completion": "a", "alternate": "a"}, "identical_sides"),
        (PAIR | {"p": 1.2}, "bad_label"),
        (PAIR | {"weight": 0}, "bad_weight"),
        (PAIR | {"weight": "much"}, "bad_weight"),
        (PAIR | {"margin": "wide"}, "bad_number"),
        (PAIR | {"score_chosen": float("nan"), "score_rejected": 1}, "bad_score"),
        ({"prompt": "Q", "completions": ["a"], "scores": [1]}, "bad_list"),
        ({"prompt": "Q", "completions": ["a", "b"], "scores": [1]}, "bad_list"),
        ({"prompt": "Q", "completions": ["a", "b"], "scores": [1, None]}, "bad_score"),
        ({"prompt": "Q", "completions": ["a", "b"], "scores": [1, 1]}, "no_order"),
        ({"prompt": "Q", "completions": ["a", "a"], "scores": [1, 0]}, "identical_sides"),
    ],
)
def test_rows_that_cannot_be_used_say_why(row: dict[str, Any], expected: str) -> None:
    assert reason(row) == expected


# --- implicit prompts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "prompt"),
    [
        ("Name: Anna", "Name: Anton", "Name:"),  # not inside of a word, and the blank goes with the response
        ("Yes or no?\nYes", "Yes or no?\nNo", "Yes or no?\n"),
        ("sky: blue", "sky: blue and wide", "sky:"),  # one goes on where the other ends
        ("cat", "dog", ""),
        ("catalogue", "category", ""),
        ("a b", "a", ""),  # an empty response is no response
        ("\n\nHuman: Hi\n\nAssistant: I am A", "\n\nHuman: Hi\n\nAssistant: I am B", "\n\nHuman: Hi\n\nAssistant:"),
    ],
)
def test_text_is_split_at_a_safe_place(a: str, b: str, prompt: str) -> None:
    for first, second in ((a, b), (b, a)):
        found = split_text(first, second)
        assert found[0] == prompt
        assert (found[0] + found[1], found[0] + found[2]) == (first, second)


def test_messages_are_split_before_an_assistant() -> None:
    a = (user("Q"), says("A"), user("R"), says("B"))
    prompt, one, two = split_messages(a, (user("Q"), says("A"), user("S"), says("C")))
    assert (prompt, one[0], two[0]) == ((user("Q"),), says("A"), says("A"))  # they differ in a user's message
    with pytest.raises(BadRow, match="no prompt in common"):
        split_messages(a, (user("X"), says("A")))


# --- the reader ------------------------------------------------------------------------------------------------------


def read(path: Path, **rename: str) -> tuple[list[TextRecord], DataReport]:
    reader, report = plugins.find("readers", "text")(rename), DataReport()
    reader.check(path)
    place = Place(source="local", split="train", shard=path.name, root=path.parent, report=report)
    return list(reader.read(path, place)), report


ROWS = [
    {"prompt": "P0", "chosen": "a, b\nc", "rejected": "d", "score_chosen": 2.0, "score_rejected": 1.0},
    {"prompt": "P1", "chosen": "same", "rejected": "same", "score_chosen": None, "score_rejected": None},
    {"prompt": "P2", "chosen": "7", "rejected": "8", "score_chosen": None, "score_rejected": None},
]


def write(path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(ROWS[0]))
            table.writeheader()
            table.writerows(ROWS)
    elif path.name == "array.json":
        path.write_text(json.dumps(ROWS))
    else:
        path.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n")
    return path


@pytest.mark.parametrize("name", ["train.jsonl", "lines.json", "array.json", "train.parquet", "train.csv"])
def test_every_file_type_gives_the_same_records(tmp_path: Path, name: str) -> None:
    records, report = read(write(tmp_path / name))
    assert [(r.prompt, r.responses, r.gains) for r in records] == [
        ("P0", ("a, b\nc", "d"), (2.0, 1.0)),
        ("P2", ("7", "8"), None),
    ]
    assert (report.rows, dict(report.skipped)) == (3, {"identical_sides": 1})
    assert report.listed["identical_sides"][0]["shard"] == name
    assert len({r.id for r in records}) == 2


def test_csv_labels_lists_and_broken_rows(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text('prompt,completions,scores\nQ,"[""a"", ""b""]","[1, 0]"\nonly one cell\nR,x,y\n')
    records, report = read(path)
    assert [(r.kind, r.responses, r.gains) for r in records] == [("list", ("a", "b"), (1.0, 0.0))]
    assert dict(report.skipped) == {"bad_csv": 1, "bad_list": 1}
    path.write_text("prompt,completion,label\nQ,A,False\nR,B,1\nS,C,\n")
    records, report = read(path)
    assert [r.label for r in records] == [0.0, 1.0]
    assert dict(report.skipped) == {"missing_label": 1}


def test_nested_parquet_drops_the_nulls_it_fills_in(tmp_path: Path) -> None:
    rows = [
        {"messages": [user("Q"), says("A")]},
        {"messages": [user("R"), {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    records, _ = read(tmp_path / "train.parquet")
    assert records[0].responses == ((says("A"),),)
    assert records[1].responses[0][0]["tool_calls"] == [{"name": "f"}]


def test_broken_lines_are_counted_and_wrong_columns_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "Q", "completion": "A"}\n{"prompt": \n[1]\n')
    records, report = read(path)
    assert (len(records), dict(report.skipped)) == (1, {"bad_json": 2})
    path.write_text('{"question": "Q", "answer": "A"}\n')
    with pytest.raises(DataError, match=r"found columns question, answer; expected .*data\.rename=\[question=prompt"):
        read(path)
    assert read(path, question="prompt", answer="completion")[0][0].responses == ("A",)
    path.write_text("nonsense\n")
    with pytest.raises(DataError, match="no row in it can be read"):
        read(path)


def test_sources_and_splits(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"):
        write(tmp_path / "data" / name)
    (tmp_path / "dataset_info.json").write_text("{}")
    source = resolve(DataConfig(format="text", sources=(str(tmp_path),)))
    assert [f.name for f in source.files] == [f"data/train-0000{i}-of-00002.parquet" for i in (0, 1)]
    with pytest.raises(DataError, match=r"Name a local JSONL, JSON, parquet or CSV file"):
        resolve(DataConfig(format="text", sources=(str(tmp_path / "none"),)))
    with pytest.raises(ConfigError, match="has fixed columns"):
        resolve(DataConfig(format="pickapic", sources=(str(tmp_path),), rename=("a=b",)))


def test_no_reader_hides_a_helper_of_its_package() -> None:
    """An imported submodule becomes an attribute of its package, in place of a function of that name."""
    from types import ModuleType

    from diffalign.data import readers

    for name in plugins.names("readers"):
        plugins.find("readers", name)
        assert isinstance(vars(readers)[name], ModuleType)
    assert callable(readers.prompt_text)
    source = Path(readers.__file__ or "").read_text()
    assert not [name for name in plugins.names("readers") if f"def {name}(" in source]
