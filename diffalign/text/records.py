"""The canonical text record, and how a row of a data set becomes one. TRL's formats are read unchanged.

| columns | kind | notes |
| --- | --- | --- |
| `prompt`, `chosen`, `rejected` | pair | texts, or lists of messages |
| `chosen`, `rejected` | pair | implicit prompt: what both begin with (`split_text`, `split_messages`) |
| `prompt` (text), `chosen`, `rejected` (messages) | pair | as in UltraFeedback: the messages hold the prompt |
| `prompt`, `completion`, `label` | item | unpaired: label true or false, 0 or 1 (or between) |
| `prompt`, `completion` | item | to imitate (SFT), label 1 |
| `messages` (or `conversations`) | item | the last assistant message is the response, the rest its prompt |
| `text` | item | no prompt: the response is the whole text |
| `prompt`, `completions`, `scores` or `rank` | list | higher scores are better; rank 1 is the best |
| `prompt` | prompt | for online training; further columns go to reward functions |

Further columns of pairs: `p` (probability that `chosen` is preferred; below 1/2 the sides change places), `margin`, and
rewards of both sides under the names of `SCORES`. Of items: `target`, `alternate` (what should be said instead of a
completion that is to be forgotten). Of all but prompts: `weight`. Phrases or steps of a response are in
`chosen_segments`, `rejected_segments` or `completion_segments`, as `[text, id]` in reading order or `[start, end, id]` in
characters (of the response's last message). Other columns stay in `columns`.

A row that cannot be used raises `BadRow` with one of these reasons: missing_column, bad_prompt, empty_prompt,
empty_response, identical_sides, role_order, mixed_formats, not_text, bad_messages, bad_label, missing_label, bad_score,
bad_weight, bad_number, bad_segment, bad_list, no_order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from diffalign.data.readers import BadRow, positive, prompt_text

Message: TypeAlias = "dict[str, Any]"
Text: TypeAlias = "str | tuple[Message, ...]"
Spans: TypeAlias = "tuple[tuple[int, int, int], ...]"
Kind: TypeAlias = Literal["pair", "item", "list", "prompt"]

EXPECTED = (
    "chosen and rejected (with or without prompt), prompt and completion (label), prompt and completions with scores or "
    "rank, messages, text, or prompt"
)
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
    ("reward_chosen", "reward_rejected"),
    ("chosen_reward", "rejected_reward"),
)
DIALOGUE = "\n\nAssistant:"  # how transcripts in plain text (HH-RLHF) begin an answer
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
_SYSTEM = ("system", "developer")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRecord:
    """One sample, not tokenised.

    Attributes:
        id: stable across runs: a hash of source, split, shard and row.
        prompt: text, or messages that end with the user's (or a tool's).
        responses: of a pair: chosen, rejected; of a list: its members; texts or assistant messages.
        kind: which of the four.
        p: pairs: probability that the first response is preferred, in [1/2, 1]; None if the row says it has no label.
        weight: in the loss.
        margin: pairs: subtracted from z.
        label: items: 1 desirable or to retain, 0 undesirable or to forget.
        target: items: a number that the objective fits or weighs by.
        gains: lists: relevance, higher is better. Pairs: rewards of both sides, where the data has them.
        alternate: items: another response that is to be preferred to this one.
        segments: per response (start, end, id) in characters, or None.
        columns: everything else.
        meta: shard and row.
    """

    id: str
    prompt: Text
    responses: tuple[Text, ...] = ()
    kind: Kind
    p: float | None = 1.0
    weight: float = 1.0
    margin: float = 0.0
    label: float = 1.0
    target: float | None = None
    gains: tuple[float, ...] | None = None
    alternate: Text | None = None
    segments: tuple[Spans | None, ...] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt_text(self) -> str:
        """The prompt as one text, for grouping, exclusion and the held-out split.

        A conversation of a single user message is that message, so both ways of writing a prompt are the same prompt.
        """
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) == 1:
            return str(self.prompt[0]["content"])
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.prompt)


def renamed(values: Mapping[str, Any], rename: Mapping[str, str]) -> dict[str, Any]:
    """A row with its columns under our names; a renamed column takes the place of one that has the name already."""
    moved = {ours: values[theirs] for theirs, ours in rename.items() if theirs in values}
    return {k: v for k, v in values.items() if k not in rename} | moved


def known_columns(names: Sequence[str] | Mapping[str, Any]) -> bool:
    """Whether columns of these names are one of the formats."""
    have = set(names)
    alone = ({"chosen", "rejected"}, {"prompt"}, {"messages"}, {"conversations"}, {"text"})
    return any(wanted <= have for wanted in alone)


def parse_row(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `TextRecord`, other than `id` and `meta`, of a row.

    Raises:
        BadRow: the row cannot be used.
    """
    row = _Row(values)
    if row.has("chosen") or row.has("rejected"):
        fields = _pair(row)
    elif row.has("completions"):
        fields = _list(row)
    elif row.has("completion"):
        fields = _item(row)
    elif row.has("messages") or row.has("conversations"):
        fields = _conversation(row)
    elif row.has("text"):
        fields = {"kind": "item", "prompt": "", "responses": (_response(row.take("text"), "text"),)}
    elif row.has("prompt"):
        fields = {"kind": "prompt", "prompt": _prompt(row.take("prompt"))}
    else:
        raise BadRow("missing_column", f"found {', '.join(values) or 'nothing'}; expected {EXPECTED}")
    if row.has("weight") and fields["kind"] != "prompt":
        fields["weight"] = positive(_number(row.take("weight"), "weight", "bad_weight"), "weight")
    return fields | {"columns": row.rest()}


class _Row:
    """Values by column; a null is an absent value, since parquet fills missing ones with nulls. Remembers what was read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values, self.taken = values, set[str]()

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def take(self, name: str) -> Any:
        self.taken.add(name)
        if not self.has(name):
            raise BadRow("missing_column", f"{name} is missing; found {', '.join(self.values)}")
        return self.values[name]

    def rest(self) -> dict[str, Any]:
        return {k: v for k, v in self.values.items() if k not in self.taken and v is not None}


# --- the four kinds --------------------------------------------------------------------------------------------------


def _pair(row: _Row) -> dict[str, Any]:
    sides = tuple(_text_or_messages(row.take(side), side) for side in ("chosen", "rejected"))
    if isinstance(sides[0], str) != isinstance(sides[1], str):
        raise BadRow("mixed_formats", "one of chosen and rejected is a text and the other a list of messages")
    given = _prompt(row.take("prompt")) if row.has("prompt") else None
    if sides[0] == sides[1]:
        raise BadRow("identical_sides", "chosen and rejected are equal")
    prompt: Text
    if given is not None and not (isinstance(given, str) and not isinstance(sides[0], str)):
        prompt, responses = given, tuple(_without_prompt(given, side) for side in sides)
    else:
        prompt, *rest = split_text(*sides) if isinstance(sides[0], str) else split_messages(*sides)  # type: ignore[arg-type]
        responses = tuple(rest)
    _check_prompt(prompt)
    responses = tuple(_response(r, name) for r, name in zip(responses, ("chosen", "rejected"), strict=True))
    fields: dict[str, Any] = {"kind": "pair", "prompt": prompt, "responses": responses}
    for names in SCORES:
        if row.has(names[0]) and row.has(names[1]):
            fields["gains"] = tuple(_number(row.take(name), name, "bad_score") for name in names)
            break
    if row.has("margin"):
        fields["margin"] = _number(row.take("margin"), "margin", "bad_number")
    fields["segments"] = _segments(row, responses, ("chosen_segments", "rejected_segments"))
    return _oriented(fields, _probability(row))


def _oriented(fields: dict[str, Any], p: float | None) -> dict[str, Any]:
    """The likelier side first: p < 1/2 changes the sides with all that belongs to them."""
    if p is None or p >= 0.5:
        return fields | {"p": p}
    turned = {name: fields[name][::-1] for name in ("responses", "gains", "segments") if fields.get(name)}
    return fields | turned | {"p": 1 - p, "margin": -fields.get("margin", 0.0)}


def _probability(row: _Row) -> float | None:
    if "p" not in row.values:
        return 1.0
    row.taken.add("p")
    if row.values["p"] is None:
        return None
    p = _number(row.values["p"], "p", "bad_label")
    if not 0 <= p <= 1:
        raise BadRow("bad_label", f"p is {p:g}; a probability in [0, 1] expected")
    return p


def _item(row: _Row) -> dict[str, Any]:
    prompt = _prompt(row.take("prompt"))
    _check_prompt(prompt)
    response = _same_kind(prompt, _response(row.take("completion"), "completion"))
    fields: dict[str, Any] = {"kind": "item", "prompt": prompt, "responses": (response,), "label": _label(row)}
    if row.has("alternate"):
        fields["alternate"] = _same_kind(prompt, _response(row.take("alternate"), "alternate"))
        if fields["alternate"] == response:
            raise BadRow("identical_sides", "alternate and completion are equal")
    if row.has("target"):
        fields["target"] = _number(row.take("target"), "target", "bad_number")
    return fields | {"segments": _segments(row, (response,), ("completion_segments",))}


def _conversation(row: _Row) -> dict[str, Any]:
    name = "messages" if row.has("messages") else "conversations"
    messages = _text_or_messages(row.take(name), name)
    if isinstance(messages, str):
        raise BadRow("bad_messages", f"{name} is a text; a list of messages expected")
    prompt, response = messages[:-1], messages[-1:]
    if response[0]["role"] != "assistant":
        raise BadRow("role_order", f"{name} ends with {response[0]['role']}; an assistant's message expected")
    _check_prompt(prompt)
    fields = {"kind": "item", "prompt": prompt, "responses": (_response(response, name),), "label": _label(row)}
    return fields | {"segments": _segments(row, (response,), ("completion_segments",))}


def _label(row: _Row) -> float:
    if "label" not in row.values:
        return 1.0
    row.taken.add("label")
    value = row.values["label"]
    if value is None:
        raise BadRow("missing_label", "label is null")
    words = {"true": 1.0, "false": 0.0}
    if isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in words):
        return words[str(value).strip().lower()]
    number = _number(value, "label", "bad_label")
    if not 0 <= number <= 1:
        raise BadRow("bad_label", f"label is {value!r}; true, false, or a number in [0, 1] expected")
    return number


def _list(row: _Row) -> dict[str, Any]:
    prompt = _prompt(row.take("prompt"))
    _check_prompt(prompt)
    members = row.take("completions")
    if not isinstance(members, list) or len(members) < 2:
        raise BadRow("bad_list", "completions holds fewer than two responses")
    responses = tuple(_same_kind(prompt, _response(member, f"completions[{i}]")) for i, member in enumerate(members))
    gains = _gains(row, len(responses))
    if len(set(gains)) == 1:
        raise BadRow("no_order", "all completions score the same")
    if all(response == responses[0] for response in responses):
        raise BadRow("identical_sides", "all completions are equal")
    return {"kind": "list", "prompt": prompt, "responses": responses, "gains": gains}


def _gains(row: _Row, count: int) -> tuple[float, ...]:
    name = next((n for n in ("scores", "rank") if row.has(n)), "scores")
    values = row.take(name)
    if not isinstance(values, list) or len(values) != count:
        raise BadRow("bad_list", f"{name} has not one number for each of the {count} completions")
    numbers = tuple(_number(value, name, "bad_score") for value in values)
    return numbers if name == "scores" else tuple(max(numbers) - number for number in numbers)


# --- values ----------------------------------------------------------------------------------------------------------


def _number(value: Any, column: str, reason: str) -> float:
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(reason, f"{column} is {value!r}; a number expected")
    return number


def _prompt(value: Any) -> Text:
    return prompt_text(value, "prompt") if not isinstance(value, (list, tuple)) else _messages(value, "prompt")


def _text_or_messages(value: Any, column: str) -> Text:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return _messages(value, column)
    raise BadRow("not_text", f"{column} is {type(value).__name__}; a text or a list of messages expected")


def _messages(value: Sequence[Any], column: str) -> tuple[Message, ...]:
    if not value:
        raise BadRow("bad_messages", f"{column} is an empty list")
    return tuple(_message(item, f"{column}[{i}]") for i, item in enumerate(value))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise BadRow("bad_messages", f"{where} is {type(value).__name__}; an object with role and content expected")
    message = {k: v for k, v in value.items() if v is not None}
    if "from" in message and "role" not in message:  # ShareGPT's keys
        message["role"], message["content"] = message.pop("from"), message.pop("value", None)
    role = _ROLES.get(str(message.get("role")), str(message.get("role")))
    if role not in (*_SYSTEM, "user", "assistant", "tool"):
        raise BadRow(
            "role_order", f"{where} has role {message.get('role')!r}; system, user, assistant or tool expected"
        )
    content = message.get("content")
    if isinstance(content, list):  # parts, as models that also see images have them
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise BadRow("not_text", f"{where} holds parts that are no texts")
        content = "".join(str(part.get("text", "")) for part in content)
    if content is None and "tool_calls" in message:
        content = ""
    if not isinstance(content, str):
        raise BadRow("bad_messages", f"{where} has content of type {type(content).__name__}; a text expected")
    return message | {"role": role, "content": content}


def _check_prompt(prompt: Text) -> None:
    if isinstance(prompt, str):
        return
    roles = [message["role"] for message in prompt]
    later = roles[1:] if roles and roles[0] in _SYSTEM else roles
    if any(role in _SYSTEM for role in later):
        raise BadRow("role_order", f"a system message stands after others ({', '.join(roles)})")
    if not later or later[0] != "user" or later[-1] not in ("user", "tool"):
        raise BadRow("role_order", f"the prompt's roles are {', '.join(roles) or 'none'}; user first and last expected")


def _response(value: Any, column: str) -> Text:
    response = _text_or_messages(value, column)
    if isinstance(response, str):
        if not response.strip():
            raise BadRow("empty_response", f"{column} is empty")
        return response
    roles = [message["role"] for message in response]
    if set(roles) != {"assistant"}:
        # Everything after the prompt is trained on, and a model is not to learn what users or tools say.
        raise BadRow("role_order", f"{column} has roles {', '.join(roles) or 'none'}; only assistant expected")
    if not any(message["content"].strip() or message.get("tool_calls") for message in response):
        raise BadRow("empty_response", f"{column} is empty")
    return response


def _same_kind(prompt: Text, response: Text) -> Text:
    if isinstance(prompt, str) != isinstance(response, str):
        raise BadRow("mixed_formats", "one of prompt and response is a text and the other a list of messages")
    return response


def _without_prompt(prompt: Text, side: Text) -> Text:
    """The response of a side; a conversation that repeats its prompt loses it."""
    _same_kind(prompt, side)
    if isinstance(prompt, tuple) and isinstance(side, tuple) and side[: len(prompt)] == prompt:
        return side[len(prompt) :]
    return side


# --- implicit prompts ------------------------------------------------------------------------------------------------


def split_messages(
    a: tuple[Message, ...], b: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """(prompt, rest of a, rest of b): the longest common prefix after which both go on with an assistant's message.

    Raises:
        BadRow: there is no such place.
    """
    common = 0
    while common < min(len(a), len(b)) and a[common] == b[common]:
        common += 1
    while common > 0:
        if common < min(len(a), len(b)) and a[common]["role"] == b[common]["role"] == "assistant":
            return a[:common], a[common:], b[common:]
        common -= 1
    raise BadRow("role_order", "chosen and rejected have no prompt in common that an assistant's message follows")


def split_text(a: str, b: str) -> tuple[str, str, str]:
    """(prompt, rest of a, rest of b), cut where a word begins; a blank before it belongs to the responses.

    The prompt is the longest common prefix, or in a transcript (`DIALOGUE`) all up to the last answer that begins in it:
    two answers that begin with the same words keep them. Two texts with nothing in common have an empty prompt.
    """
    limit = min(len(a), len(b))
    cut = next((i for i in range(limit) if a[i] != b[i]), limit)
    if (begin := a.rfind(DIALOGUE, 0, cut)) >= 0:
        cut = begin + len(DIALOGUE)
        return a[:cut], a[cut:], b[cut:]
    cut = _word_start(a, b, cut)
    while cut > 0 and not (a[cut:].strip() and b[cut:].strip()):
        cut = _word_start(a, b, cut - 1)
    return a[:cut], a[cut:], b[cut:]


def _word_start(a: str, b: str, cut: int) -> int:
    """The last place at or before `cut` that is not inside a word of either text."""
    while cut > 0 and a[cut - 1].isalnum() and any(s[cut : cut + 1].isalnum() for s in (a, b)):
        cut -= 1
    return cut - 1 if cut > 0 and a[cut - 1] == " " else cut


# --- segments --------------------------------------------------------------------------------------------------------


def _segments(row: _Row, responses: Sequence[Text], names: Sequence[str]) -> tuple[Spans | None, ...] | None:
    found = tuple(
        _spans(row.take(name), _content(response), name) if row.has(name) else None
        for response, name in zip(responses, names, strict=True)
    )
    return None if all(spans is None for spans in found) else found


def _content(response: Text) -> str:
    return response if isinstance(response, str) else str(response[-1]["content"])


def _spans(value: Any, content: str, column: str) -> Spans:
    """(start, end, id) of every entry; entries do not overlap and stand in reading order."""
    spans, place = [], 0
    for entry in value if isinstance(value, list) else [None]:
        start, end, number = _span(entry, content, place, column)
        if not (place <= start < end <= len(content)) or number < 1:
            raise BadRow(
                "bad_segment", f"{column}: {entry!r} overlaps, lies outside of the response, or has an id below 1"
            )
        spans.append((start, end, number))
        place = end
    return tuple(spans)


def _span(entry: Any, content: str, place: int, column: str) -> tuple[int, int, int]:
    whole = isinstance(entry, (list, tuple)) and all(isinstance(x, int) and not isinstance(x, bool) for x in entry[-1:])
    if whole and len(entry) == 2 and isinstance(entry[0], str):
        start = content.find(entry[0], place)
        if start < 0 or not entry[0]:
            raise BadRow("bad_segment", f"{column}: {entry[0]!r} is not in the response after the one before it")
        return start, start + len(entry[0]), entry[1]
    if whole and len(entry) == 3 and all(isinstance(x, int) for x in entry):
        return entry[0], entry[1], entry[2]
    raise BadRow("bad_segment", f"{column}: {entry!r}; [text, id] or [start, end, id] expected")
