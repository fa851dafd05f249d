"""Records to tokens.

A row's ids are the prompt's ids followed by the response's, each tokenised on its own: that is what the model sees when it
is sampled, and no merge crosses the border (which a prefix of a jointly tokenised text would allow).
For plain text the prompt begins with whatever the tokenizer begins a text with (bos), once, and the response ends with
eos, once. Conversations are rendered by the chat template, which writes its own special tokens; what it writes after the
end-of-turn token is left out, since sampling stops there.

Tokenizers of the SentencePiece kind mark the beginning of a text with a blank; the response's first word then begins
with one too, as it does when the model is sampled after training on it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.config import TextConfig
from diffalign.data.readers import BadRow
from diffalign.data.report import DataReport
from diffalign.errors import ConfigError
from diffalign.text.batch import TextExample, TextRow
from diffalign.text.records import Message, Spans, Text, TextRecord

log = logging.getLogger(__name__)
Ids = tuple[int, ...]


@dataclass(frozen=True)
class _Response:
    """Tokens of one response and, where the data has segments, the segment of each."""

    ids: Ids
    segment: Ids | None = None

    def cut(self, length: int) -> _Response:
        return _Response(self.ids[:length], None if self.segment is None else self.segment[:length])


class Tokenizing:
    """Turns records into examples with one tokenizer and one set of limits.

    Args:
        tokenizer: of transformers; segments need a fast one.
        config: lengths, truncation side, chat template.

    Raises:
        ConfigError: no end-of-sequence token, limits that leave no room, or a chat template file that is not there.
    """

    def __init__(self, tokenizer: Any, config: TextConfig) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no eos token, so no response could ever end; set one in its config")
        if config.max_length < 2 or (config.max_prompt_length is not None and config.max_prompt_length < 1):
            raise ConfigError(
                f"text.max_length={config.max_length} and text.max_prompt_length={config.max_prompt_length} leave no room; "
                "at least 2 and 1 expected"
            )
        self.tokenizer, self.config = tokenizer, config
        self.max_length = min(config.max_length, int(tokenizer.model_max_length))
        if self.max_length < config.max_length:
            log.warning("text.max_length=%d: the model takes %d tokens, no more", config.max_length, self.max_length)
        self.template = _template(config.chat_template)
        self.eos = int(tokenizer.eos_token_id)
        self.begin = _begin(tokenizer)
        added = tokenizer.added_tokens_decoder
        self.special = frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}

    # --- examples ----------------------------------------------------------------------------------------------------

    def example(self, record: TextRecord, report: DataReport | None = None) -> TextExample:
        """Tokenise a record; what is cut is noted in the report as `truncated_prompt` and `truncated_response`.

        Raises:
            BadRow: unstable_template, template_refused, empty_prompt, no_response_left, identical_tokens or
                identical_after_truncation.
            ConfigError: the data need something that the tokenizer lacks (a chat template, offsets).
        """
        prompt, responses = self._tokens(record)
        rows, notes = self._fit(prompt, responses)
        self._check_sides(record, rows, responses)
        for note, detail in notes.items():
            if report is not None:
                report.note(note, detail, record)
        return TextExample(
            id=record.id,
            kind=record.kind,
            rows=rows,
            prompt=record.prompt_text,
            p=1.0 if record.p is None else record.p,
            weight=record.weight,
            margin=record.margin,
            label=record.label,
            target=record.target,
            gains=record.gains,
            columns=record.columns,
        )

    def _tokens(self, record: TextRecord) -> tuple[Ids, list[_Response]]:
        segments = record.segments or (None,) * len(record.responses)
        begin, prompt = self._prompt(record)
        responses = []
        for response, spans in zip(record.responses, segments, strict=True):
            content = response if isinstance(response, str) else self._rendered(record, response, begin)
            made = self._segmented(content, response, spans)
            responses.append(self._ended(made, chat=not isinstance(response, str)))
        if not prompt:  # nothing to predict the first token from
            if record.kind != "item":
                raise BadRow("empty_prompt", "the prompt has no tokens, and the tokenizer adds no bos")
            first = responses[0]
            prompt = first.ids[:1]
            responses = [_Response(first.ids[1:], first.segment[1:] if first.segment else None)]
        for number, found in enumerate(responses):
            if not set(found.ids) - {self.eos}:
                raise BadRow("no_response_left", f"response {number} has no tokens but eos")
        return prompt, responses

    def _prompt(self, record: TextRecord) -> tuple[str, Ids]:
        """The prompt as the model is asked: rendered up to where the response begins, and its tokens with bos."""
        if not isinstance(record.prompt, str):
            begin = self._render(record.prompt, record.columns, generation=True)
            return begin, self._encode(begin)
        ids = self._encode(record.prompt)
        return record.prompt, ids if ids[: len(self.begin)] == self.begin else self.begin + ids

    def _rendered(self, record: TextRecord, response: tuple[Message, ...], begin: str) -> str:
        """What the template writes after `begin`, the rendered prompt."""
        assert isinstance(record.prompt, tuple), "readers refuse mixed formats"
        whole = self._render((*record.prompt, *response), record.columns, generation=False)
        if not whole.startswith(begin):
            place = next((i for i, (a, b) in enumerate(zip(begin, whole)) if a != b), min(len(begin), len(whole)))
            raise BadRow(
                "unstable_template",
                f"with the response, the chat template renders the prompt differently from character {place} on "
                f"({whole[place : place + 30]!r} instead of {begin[place : place + 30]!r}), so the response cannot be told "
                "from it; set text.chat_template to one that renders a prefix the same way",
            )
        return whole[len(begin) :]

    def _segmented(self, content: str, response: Text, spans: Spans | None) -> _Response:
        if spans is None:
            return _Response(self._encode(content))
        if not self.tokenizer.is_fast:
            raise ConfigError("segments need a fast tokenizer (one that knows character offsets); this model has none")
        shift = 0
        if not isinstance(response, str):  # the template may strip what it renders
            said = str(response[-1]["content"])
            shift = content.rfind(said.strip()) - (len(said) - len(said.lstrip()))
        made = self.tokenizer(content, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        segment = tuple(_segment_of(start - shift, end - shift, spans) for start, end in made["offset_mapping"])
        return _Response(tuple(made["input_ids"]), segment)

    def _ended(self, response: _Response, *, chat: bool) -> _Response:
        """The response with one end: eos, or (in a conversation) the end-of-turn token that the template writes."""
        length = len(response.ids)
        if chat:
            last = next((i for i in range(length - 1, -1, -1) if response.ids[i] in self.special), None)
            if last is not None and not self.tokenizer.decode(response.ids[last + 1 :]).strip():
                length = last + 1
        while length > 1 and response.ids[length - 1] == response.ids[length - 2] == self.eos:
            length -= 1
        kept = response.cut(length)
        if length and (kept.ids[-1] == self.eos or (chat and kept.ids[-1] in self.special)):
            return kept
        return _Response(
            (*kept.ids, self.eos),
            None if kept.segment is None else (*kept.segment, 0),
        )

    # --- limits ------------------------------------------------------------------------------------------------------

    def _fit(self, prompt: Ids, responses: Sequence[_Response]) -> tuple[tuple[TextRow, ...], dict[str, str]]:
        """Rows within the limits. All rows keep the same prompt: it gives way to the longest response."""
        notes = {}
        room = min(self.config.max_prompt_length or self.max_length, self.max_length)
        longest = max((len(response.ids) for response in responses), default=1)
        kept = self._cut_prompt(prompt, max(1, min(room, self.max_length - longest)))
        if len(kept) < len(prompt):
            notes["truncated_prompt"] = f"{len(prompt)} tokens, {len(kept)} kept"
        room = self.max_length - len(kept)
        if longest > room:
            notes["truncated_response"] = f"{longest} tokens, {room} kept"
        if not responses:
            return (TextRow(ids=kept, start=len(kept)),), notes
        cut = [response.cut(room) for response in responses]
        return tuple(TextRow(ids=kept + r.ids, start=len(kept), segment=r.segment) for r in cut), notes

    def _cut_prompt(self, ids: Ids, length: int) -> Ids:
        if len(ids) <= length:
            return ids
        if self.config.truncate_prompt == "end":
            return ids[:length]
        # The tokens that begin every text stay: without them a model is far from what it was trained on.
        head = self.begin if len(self.begin) < length and ids[: len(self.begin)] == self.begin else ()
        return head + ids[len(ids) - (length - len(head)) :]

    def _check_sides(self, record: TextRecord, rows: Sequence[TextRow], before: Sequence[_Response]) -> None:
        if record.kind not in ("pair", "list") or len({row.ids for row in rows}) > 1:
            return
        if len({response.ids for response in before}) > 1:
            raise BadRow(
                "identical_after_truncation", f"the responses differ only beyond text.max_length={self.max_length}"
            )
        raise BadRow("identical_tokens", "the responses have the same tokens")

    # --- the tokenizer -----------------------------------------------------------------------------------------------

    def _encode(self, content: str) -> Ids:
        return tuple(self.tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"])

    def _render(self, messages: Sequence[Mapping[str, Any]], columns: Mapping[str, Any], *, generation: bool) -> str:
        from jinja2 import TemplateError

        if self.template is None and self.tokenizer.chat_template is None:
            raise ConfigError(
                "the data are conversations, and the tokenizer has no chat template; name a Jinja file in text.chat_template"
            )
        try:
            made = self.tokenizer.apply_chat_template(
                list(messages),
                tools=_tools(columns.get("tools")),
                chat_template=self.template,
                add_generation_prompt=generation,
                tokenize=False,
                **(columns.get("chat_template_kwargs") or {}),
            )
        except TemplateError as error:
            raise BadRow("template_refused", f"the chat template says: {error}") from error
        return str(made)


def _template(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text.chat_template: {file!r} cannot be read ({error}); a Jinja file expected") from error


def _begin(tokenizer: Any) -> Ids:
    """The tokens that the tokenizer puts before a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    places = (i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
    return tuple(whole[: next(places, 0)])


def _segment_of(start: int, end: int, spans: Spans) -> int:
    """The segment that most characters of a token lie in; the earlier one of two equal, 0 where none do."""
    best, most = 0, 0
    for first, last, number in spans:
        if (shared := min(end, last) - max(start, first)) > most:
            best, most = number, shared
    return best


def _tools(value: Any) -> Any:
    """Tool descriptions; data sets often store them as JSON text."""
    if not isinstance(value, str):
        return value or None
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadRow("bad_tools", f"tools is not JSON ({error})") from error
