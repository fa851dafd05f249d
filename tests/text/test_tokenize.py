"""Tokens of prompts and responses, with a tokenizer whose only merges are "ab" and a double line break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from text_support import BOS, END, EOS, TEMPLATE, UNSTABLE, build

from diffalign.config import TextConfig
from diffalign.data.readers import BadRow
from diffalign.data.report import DataReport
from diffalign.errors import ConfigError
from diffalign.text.batch import TextExample
from diffalign.text.records import TextRecord, parse_row
from diffalign.text.tokenize import Tokenizing


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def says(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def example(row: dict[str, Any], tokenizer: Any = None, **settings: Any) -> TextExample:
    made = Tokenizing(tokenizer or build(), TextConfig(**settings))
    return made.example(TextRecord(id="0" * 16, **parse_row(row)))


def shown(ids: tuple[int, ...], tokenizer: Any = None) -> list[str]:
    """Tokens as texts; line breaks stay readable."""
    return [t.replace("Ċ", "\n").replace("Ġ", " ") for t in (tokenizer or build()).convert_ids_to_tokens(list(ids))]


def reason(row: dict[str, Any], tokenizer: Any = None, **settings: Any) -> str:
    with pytest.raises(BadRow) as caught:
        example(row, tokenizer, **settings)
    return caught.value.reason


PAIR = {"prompt": "Qa", "chosen": "bc", "rejected": "xy"}


# --- plain text ------------------------------------------------------------------------------------------------------


def test_no_merge_crosses_the_border_of_prompt_and_response() -> None:
    joint = build()("Qabc")["input_ids"]
    assert shown(tuple(joint)) == [BOS, "Q", "ab", "c"]  # a joint text would merge what belongs to two sides
    chosen, rejected = example(PAIR).rows
    assert shown(chosen.ids) == [BOS, "Q", "a", "b", "c", EOS]
    assert shown(rejected.ids) == [BOS, "Q", "a", "x", "y", EOS]
    assert chosen.start == rejected.start == 3
    assert chosen.ids[:3] == rejected.ids[:3]


def test_bos_and_eos_are_there_exactly_once() -> None:
    chosen, _ = example(PAIR | {"prompt": f"{BOS}Qa", "chosen": f"bc{EOS}"}).rows
    assert shown(chosen.ids) == [BOS, "Q", "a", "b", "c", EOS]
    twice, _ = example(PAIR | {"chosen": f"bc{EOS}{EOS}"}).rows
    assert shown(twice.response) == ["b", "c", EOS]
    without, _ = example(PAIR, build(bos=False)).rows
    assert shown(without.ids) == ["Q", "a", "b", "c", EOS]


def test_texts_without_a_prompt_begin_with_bos_or_with_their_own_first_token() -> None:
    (row,) = example({"text": "abc"}).rows
    assert (shown(row.ids), row.start) == ([BOS, "ab", "c", EOS], 1)
    (row,) = example({"text": "abc"}, build(bos=False)).rows
    assert (shown(row.ids), row.start) == (["ab", "c", EOS], 1)
    assert reason({"chosen": "cat", "rejected": "dog"}, build(bos=False)) == "empty_prompt"
    assert shown(example({"chosen": "c", "rejected": "d"}).rows[0].ids) == [BOS, "c", EOS]


def test_prompts_and_what_an_example_carries() -> None:
    asked = example({"prompt": "Qa", "answer": 3})
    assert (asked.kind, shown(asked.rows[0].ids), asked.rows[0].start) == ("prompt", [BOS, "Q", "a"], 3)
    assert asked.columns == {"answer": 3}
    row = PAIR | {"p": 0.75, "weight": 2, "margin": 0.5, "score_chosen": 3, "score_rejected": 1}
    made = example(row)
    assert (made.id, made.kind, made.prompt) == ("0" * 16, "pair", "Qa")
    assert (made.p, made.weight, made.margin, made.gains) == (0.75, 2.0, 0.5, (3.0, 1.0))
    listed = example({"prompt": "Q", "completions": ["a", "b", "c"], "scores": [1, 3, 2]})
    assert [shown(r.response)[0] for r in listed.rows] == ["a", "b", "c"]
    item = example({"prompt": "Q", "completion": "a", "label": False, "target": 0.2})
    assert (item.label, item.target, shown(item.rows[0].response)) == (0.0, 0.2, ["a", EOS])


# --- conversations ---------------------------------------------------------------------------------------------------

CHAT = {"prompt": [user("Q")], "chosen": [says("b")], "rejected": [says("c")]}


def text_of(ids: tuple[int, ...]) -> str:
    return str(build().decode(list(ids)))


def test_chat_templates() -> None:
    chosen, rejected = example(CHAT).rows
    assert text_of(chosen.ids[: chosen.start]) == f"{BOS}<user>Q{END}\n<assistant>"
    # The end-of-turn token ends the response: no eos is added, and the line break after it is left out.
    assert shown(chosen.response) == ["b", END]
    assert shown(rejected.response) == ["c", END]
    assert list(chosen.ids).count(build().bos_token_id) == 1
    asked = example({"prompt": [user("Q")]})
    assert asked.rows[0].ids == chosen.ids[: chosen.start]  # what is trained on is what is sampled from


def test_system_prompts_and_several_turns() -> None:
    prompt = [{"role": "system", "content": "S"}, user("Q"), says("A"), user("R")]
    chosen, _ = example(CHAT | {"prompt": prompt}).rows
    expected = f"{BOS}<system>S{END}\n<user>Q{END}\n<assistant>A{END}\n<user>R{END}\n<assistant>"
    assert text_of(chosen.ids[: chosen.start]) == expected
    (last,) = example({"messages": [user("Q"), says("A"), user("R"), says("B")]}).rows
    assert shown(last.response) == ["B", END]


def test_a_template_without_an_end_of_turn_gets_eos() -> None:
    turns = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
    bare = turns + "{% if add_generation_prompt %}a:{% endif %}"
    chosen, _ = example(CHAT, build(template=bare)).rows
    assert shown(chosen.ids) == ["u", ":", "Q", "\n", "a", ":", "b", "\n", EOS]
    closed = bare.replace("}}\n", "}}{{ eos_token }}")
    assert shown(example(CHAT, build(template=closed)).rows[0].response) == ["b", EOS]


def test_a_merge_at_the_border_of_the_generation_prompt_stays_out() -> None:
    lines = TEMPLATE.replace("<assistant>{% endif", "<assistant>\n{% endif").replace(
        "<{{ m['role'] }}>{{ m['content'] | trim }}", "<{{ m['role'] }}>\n{{ m['content'] }}"
    )
    chosen, _ = example(CHAT | {"chosen": [says("\nb")]}, build(template=lines)).rows
    assert shown(chosen.ids)[chosen.start - 1 : chosen.start + 2] == ["\n", "\n", "b"]


def test_templates_that_change_the_prompt_or_refuse_are_bad_rows() -> None:
    tokenizer = build(template=UNSTABLE)
    with pytest.raises(BadRow, match="renders the prompt differently from character 3 on") as caught:
        example(CHAT, tokenizer)
    assert caught.value.reason == "unstable_template"
    template = "{{ raise_exception('only system messages') }}"
    with pytest.raises(BadRow, match="only system messages") as caught:
        example(CHAT, build(template=template))
    assert caught.value.reason == "template_refused"


def test_the_template_may_come_from_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no chat template; name a Jinja file in text\.chat_template"):
        example(CHAT, build(template=None))
    file = tmp_path / "chat.jinja"
    file.write_text(
        TEMPLATE.replace("<{{ m['role'] }}>", "{{ m['role'] | upper }}:").replace("<assistant>", "ASSISTANT:")
    )
    chosen, _ = example(CHAT, build(template=None), chat_template=str(file)).rows
    assert text_of(chosen.ids) == f"{BOS}USER:Q{END}\nASSISTANT:b{END}"
    with pytest.raises(ConfigError, match="cannot be read"):
        example(CHAT, chat_template=str(tmp_path / "none.jinja"))


def test_tools_and_template_arguments_reach_the_template() -> None:
    template = "{{ tools | length if tools else 0 }}{{ mood }}" + TEMPLATE
    row = CHAT | {"tools": '[{"type": "function"}]', "chat_template_kwargs": {"mood": "!"}}
    assert text_of(example(row, build(template=template)).rows[0].ids).startswith(f"1!{BOS}")
    assert reason(CHAT | {"tools": "["}) == "bad_tools"


# --- limits ----------------------------------------------------------------------------------------------------------


def test_the_prompt_gives_way_first_and_is_the_same_on_both_sides() -> None:
    row = {"prompt": "01234567", "chosen": "xyz", "rejected": "x"}
    chosen, rejected = example(row, max_length=8).rows
    # 8 tokens, 4 of them the longer response with eos; bos stays when the start is cut.
    assert shown(chosen.ids) == [BOS, "5", "6", "7", "x", "y", "z", EOS]
    assert shown(rejected.ids) == [BOS, "5", "6", "7", "x", EOS]
    chosen, _ = example(row, max_length=8, truncate_prompt="end").rows
    assert shown(chosen.ids) == [BOS, "0", "1", "2", "x", "y", "z", EOS]
    chosen, _ = example(row, max_prompt_length=2).rows
    assert shown(chosen.ids) == [BOS, "7", "x", "y", "z", EOS]
    asked = example({"prompt": "01234567"}, max_prompt_length=3)
    assert shown(asked.rows[0].ids) == [BOS, "6", "7"]


def test_a_response_too_long_by_itself_keeps_a_prompt_token_and_loses_its_end() -> None:
    tokenizing = Tokenizing(build(), TextConfig(max_length=4))
    report = DataReport()
    row = {"prompt": "0123", "chosen": "xyzw", "rejected": "v"}
    made = tokenizing.example(TextRecord(id="0" * 16, **parse_row(row)), report)
    assert [shown(r.ids) for r in made.rows] == [["3", "x", "y", "z"], ["3", "v", EOS]]  # no eos after a cut
    assert dict(report.notes) == {"truncated_prompt": 1, "truncated_response": 1}
    assert report.listed["truncated_response"][0]["detail"] == "5 tokens, 3 kept"


def test_losing_only_eos_counts_as_cut() -> None:
    tokenizing, report = Tokenizing(build(), TextConfig(max_length=4)), DataReport()
    made = tokenizing.example(TextRecord(id="0", **parse_row({"prompt": "Q", "completion": "xyz"})), report)
    assert shown(made.rows[0].ids) == ["Q", "x", "y", "z"]
    assert dict(report.notes) == {"truncated_prompt": 1, "truncated_response": 1}


def test_nothing_is_noted_where_nothing_is_cut() -> None:
    tokenizing, report = Tokenizing(build(), TextConfig(max_length=6)), DataReport()
    tokenizing.example(TextRecord(id="0", **parse_row(PAIR)), report)
    assert dict(report.notes) == {}


def test_sides_that_become_equal_are_no_pair() -> None:
    assert reason({"prompt": "Q", "chosen": "xyzA", "rejected": "xyzB"}, max_length=4) == "identical_after_truncation"
    assert reason(CHAT | {"chosen": [says("a")], "rejected": [says(" a ")]}) == "identical_tokens"  # the template trims
    assert reason({"prompt": "Q", "chosen": EOS, "rejected": "a"}) == "no_response_left"


def test_limits_and_tokenizers_that_do_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="leave no room"):
        Tokenizing(build(), TextConfig(max_length=1))
    tokenizer = build()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no eos token"):
        Tokenizing(tokenizer, TextConfig())
    assert Tokenizing(build(max_length=12), TextConfig(max_length=100)).max_length == 12
    assert "the model takes 12 tokens" in caplog.text


# --- segments --------------------------------------------------------------------------------------------------------


def test_segments_follow_the_tokens() -> None:
    row = {"prompt": "Q", "chosen": "xab y", "rejected": "z", "chosen_segments": [["xa", 1], ["b", 2], ["y", 3]]}
    chosen, rejected = example(row).rows
    assert shown(chosen.response) == ["x", "ab", " ", "y", EOS]
    # "ab" lies in two segments by one character each: the earlier one. Blanks and eos are in none.
    assert chosen.segment == (1, 1, 0, 3, 0)
    assert rejected.segment is None
    cut, _ = example(row, max_length=3).rows
    assert (shown(cut.response), cut.segment) == (["x", "ab"], (1, 1))


def test_segments_of_conversations_count_from_the_message() -> None:
    row = CHAT | {"chosen": [says("  xy é!")], "chosen_segments": [["xy", 1], ["é", 4]]}
    chosen, _ = example(row).rows
    assert shown(chosen.response)[:2] == ["x", "y"]
    assert chosen.segment == (1, 1, 0, 4, 4, 0, 0)  # é is two bytes; the last is the end of turn
