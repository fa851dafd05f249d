"""Questions about pictures to a vision-language model, on an OpenAI-compatible server or in this process.

Where one token is enough, its log-probabilities are read instead of its text: a greedy answer knows few values, so that
whole groups tie; expectations are smooth. An answer in which none of the expected tokens occurs is missing, NaN, and
never 0. Yes or no: Lin et al. 2024 (VQAScore), arXiv 2404.01291, here among yes and no alone. Rating: the mean of 1..K under
the digits' probabilities, as in Q-Align (arXiv 2312.17090). Pairs are asked in both orders, since models prefer a place.
Models that were trained to write a verdict are let write, and the verdict is read from the text.

What is asked stands in a YAML file:

    server: http://127.0.0.1:8000/v1        # patience as in remote rewards: ...?wait=600&timeout=60
    model: Qwen/Qwen2.5-VL-7B-Instruct      # default: the first that the server lists
    mode: yes_no                            # or rating, pair, verdict
    question: 'Does this picture show "{prompt}"? Answer Yes or No.'

`local: Qwen/Qwen2.5-VL-7B-Instruct` (or a folder) in place of `server` loads the model here.

Shapes: B pictures or pairs.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from diffalign.errors import ConfigError, did_you_mean
from diffalign.http_client import parse_url
from diffalign.rewards import Reward
from diffalign.vlm_backends import TOKEN_VARIABLE, Backend, LocalBackend, Request, ServerBackend, data_uri, plain

__all__ = [
    "TOKEN_VARIABLE",
    "Answer",
    "Comparison",
    "Judge",
    "Questions",
    "compare",
    "data_uri",
    "plain",
    "read_questions",
    "weigh",
]

log = logging.getLogger("diffalign.rewards")

QUESTIONS = {
    "yes_no": 'Does this picture show "{prompt}"? Answer with Yes or No.',
    "rating": 'How well does this picture show "{prompt}"? Answer with one digit, 1 (not at all) to {scale} (perfectly).',
    "pair": 'Which picture shows "{prompt}" better, the first (A) or the second (B)? Answer with one letter, A or B.',
    "verdict": (
        'Both pictures were made for the caption "{prompt}". Compare how well they follow it, then how good they look. '
        'End with one of these sentences: "Image 1 is better than Image 2.", "Image 2 is better than Image 1.", '
        '"Both images are equally good."'
    ),
}
MODES = tuple(QUESTIONS)
PAIR_MODES = ("pair", "verdict")  # about two pictures
LOW_MASS = 0.5  # of the expected tokens; below it the model wants to say something else


@dataclass(frozen=True)
class Questions:
    """What is asked of whom: of `server` or of `local`.

    Attributes:
        server: address up to `/v1`, with its patience (see `diffalign.http_client.Patience`).
        local: hub id or folder of a model that is loaded in this process.
        model: of the server, as it lists it; None takes the first.
        mode: one of `MODES`, or of those that a reward adds.
        question: with {prompt}, and for ratings {scale}; None takes that of `QUESTIONS`.
        system: message that comes first; None sends none.
        scale: K of ratings 1..K, at most 9, since 10 is two tokens for most models.
        top_logprobs: tokens whose probability the server sends; 20 is what servers allow by default.
        workers: questions to the server at the same time.
        batch: questions to the local model at a time.
        max_tokens: of an answer that is a text.
        extra: further keys of the request to a server, such as chat_template_kwargs: {enable_thinking: false}.
        processor: keywords for the local model's processor, such as max_pixels.
    """

    server: str | None = None
    local: str | None = None
    model: str | None = None
    mode: str = "yes_no"
    question: str | None = None
    system: str | None = None
    scale: int = 5
    top_logprobs: int = 20
    workers: int = 8
    batch: int = 4
    max_tokens: int = 1024
    extra: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)

    def text(self, prompt: str) -> str:
        """The question about a prompt, which may hold braces of its own."""
        question = self.question if self.question is not None else QUESTIONS[self.mode]
        return question.replace("{scale}", str(self.scale)).replace("{prompt}", prompt)


_KINDS = {
    "scale": int,
    "top_logprobs": int,
    "workers": int,
    "batch": int,
    "max_tokens": int,
    "extra": dict,
    "processor": dict,
}
_BOUNDS = {
    "scale": (2, 9),
    "top_logprobs": (2, 1000),
    "workers": (1, 256),
    "batch": (1, 1024),
    "max_tokens": (1, 100_000),
}


def read_questions(path: str | Path, modes: Sequence[str] = MODES) -> Questions:
    """Read the YAML file.

    Args:
        path: of the file.
        modes: that are possible here; the first is the default.

    Raises:
        ConfigError: what was got and what is possible.
    """
    return parse_questions(read_yaml(path), f"questions {path}", modes)


def read_yaml(path: str | Path) -> Any:
    """What a YAML file of questions holds.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"questions {path} cannot be read: {error}") from error


def parse_questions(tree: Any, where: str, modes: Sequence[str] = MODES) -> Questions:
    """The same from what a YAML file holds; `where` is how messages call it."""
    known = {f.name: f for f in dataclasses.fields(Questions)}
    if not isinstance(tree, dict) or not (tree.keys() & {"server", "local"}):
        raise ConfigError(f"{where}: no server; write server: http://127.0.0.1:8000/v1, or local: and a model's folder")
    for key, value in tree.items():
        if key not in known:
            raise ConfigError(f"{where}: {key}: unknown key{did_you_mean(str(key), known)} Known: {', '.join(known)}")
        kind = _KINDS.get(key, str)
        optional = key in ("model", "question", "system", "server", "local") and value is None
        if not optional and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ConfigError(f"{where}: {key} is {value!r}; {kind.__name__} expected")
    values: dict[str, Any] = {"mode": modes[0], **tree}
    found = Questions(**values)
    if (found.server is None) == (found.local is None):
        got = "no server" if found.server is None else "server and local"
        raise ConfigError(f"{where}: {got}; write server: http://127.0.0.1:8000/v1 or local: and a model's folder")
    if found.mode not in modes:
        raise ConfigError(
            f"{where}: mode {found.mode!r}{did_you_mean(found.mode, modes)} Available: {', '.join(modes)}"
        )
    for key, (low, high) in _BOUNDS.items():
        if not low <= getattr(found, key) <= high:
            raise ConfigError(f"{where}: {key} is {getattr(found, key)}; {low} to {high} expected")
    if wrong := set(re.findall(r"\{(\w*)\}", found.question or "")) - {"prompt", "scale"}:
        raise ConfigError(f"{where}: question has {{{min(wrong)}}}; {{prompt}} and {{scale}} are what is filled in")
    if found.server is not None:
        parse_url(found.server, where)
    return found


# ---------------------------------------------------------------- reading answers


@dataclass(frozen=True)
class Answer:
    """A number read from log-probabilities, NaN where it cannot be, and the probability of all tokens that count."""

    value: float
    mass: float


def weigh(top: Mapping[str, float], values: Mapping[str, float]) -> Answer:
    """The mean of `values` under the probabilities of their tokens.

    Args:
        top: log-probability by token; several forms of a token (" Yes", "Yes") add up.
        values: number by token in lower case.
    """
    shares = [(math.exp(p), values[key]) for token, p in top.items() if (key := plain(token).lower()) in values]
    mass = math.fsum(p for p, _ in shares)
    if not mass > 0:
        return Answer(math.nan, 0.0)
    return Answer(math.fsum(p * value for p, value in shares) / mass, mass)


YES_NO = {"yes": 1.0, "no": 0.0}
FIRST = {"a": 1.0, "b": 0.0}


def yes_probability(top: Mapping[str, float]) -> Answer:
    """P(yes) / (P(yes) + P(no))."""
    return weigh(top, YES_NO)


def expected_rating(top: Mapping[str, float], scale: int = 5) -> Answer:
    """Sum of k P(k) over sum of P(k), k from 1 to `scale`."""
    return weigh(top, {str(k): float(k) for k in range(1, scale + 1)})


VERDICTS = re.compile(
    r"image\s*1\s+is\s+better|image\s*2\s+is\s+better|both\s+images\s+are\s+equally\s+good", re.IGNORECASE
)


def read_verdict(text: str) -> float:
    """1 where the text ends with image 1 as the better one, 0 with image 2, 1/2 with neither; NaN where it does not say.

    The last such sentence counts: a model that thinks aloud weighs both first.
    """
    found = VERDICTS.findall(text)
    if not found:
        return math.nan
    last = found[-1].lower()
    return 0.5 if last.startswith("both") else float("1" in last)


# ---------------------------------------------------------------- asking


def connect(questions: Questions, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Backend:
    """Whoever the questions are for; `device` and `dtype` are those of a local model.

    Raises:
        ServerError: the server does not answer.
        RewardError: it has no such model, or the model cannot be loaded.
    """
    if questions.server is not None:
        return ServerBackend(
            questions.server,
            questions.model,
            workers=questions.workers,
            top_logprobs=questions.top_logprobs,
            system=questions.system,
            extra=questions.extra,
        )
    assert questions.local is not None, "checked by parse_questions"
    return LocalBackend(
        questions.local,
        batch=questions.batch,
        system=questions.system,
        processor=questions.processor,
        device=device,
        dtype=dtype,
    )


class Judge:
    """Asks the questions of a file.

    Args:
        questions: what is asked of whom.
        device, dtype: of a local model.
        backend: who answers; None connects to whom the questions name.

    Attributes:
        asked, failed: answers so far, and those that could not be read.

    Raises:
        ServerError: the server does not answer.
        RewardError: it has no such model, or the model cannot be loaded.
    """

    def __init__(
        self,
        questions: Questions,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: Backend | None = None,
    ) -> None:
        self.questions, self.asked, self.failed = questions, 0, 0
        self._told_of_mass = False
        self.backend = backend or connect(questions, device, dtype)
        self.model = self.backend.model

    def identity(self) -> dict[str, Any]:
        """What changes the answers: all that is asked and of which model, but not where it runs."""
        facts = dataclasses.asdict(self.questions) | {"model": self.model}
        return {key: value for key, value in facts.items() if key not in ("server", "workers", "batch")}

    def ask(self, pictures: Sequence[Sequence[Tensor]], prompts: Sequence[str]) -> list[Answer]:
        """An answer to each question, in order.

        Args:
            pictures: of each question, float RGB (3, H, W) in [0, 1].
            prompts: one for each question.

        Raises:
            ServerError, RewardError: the server is gone for too long, refuses a request, or sends no log-probabilities.
        """
        if self.questions.mode == "verdict":
            return [Answer(value, 1.0) for value in self.read(pictures, prompts, read_verdict)]
        values: dict[str, dict[str, float]] = {
            "yes_no": YES_NO,
            "rating": {str(k): float(k) for k in range(1, self.questions.scale + 1)},
            "pair": FIRST,
        }
        counts = values[self.questions.mode]
        texts = [self.questions.text(prompt) for prompt in prompts]
        tops = self.tops(pictures, prompts, texts, counts)
        answers = [weigh(top, counts) for top in tops]
        said = [", ".join(repr(token) for token in _best(top)) or "nothing" for top in tops]
        self.account(prompts, [answer.value for answer in answers], said)
        masses = [answer.mass for answer in answers if not math.isnan(answer.value)]
        if masses and not self._told_of_mass and (mean := math.fsum(masses) / len(masses)) < LOW_MASS:
            self._told_of_mass = True
            log.warning("vlm: the expected tokens have only %.2f of the probability; does the model think first?", mean)
        return answers

    def tops(
        self,
        pictures: Sequence[Sequence[Tensor]],
        prompts: Sequence[str],
        texts: Sequence[str],
        words: Collection[str],
    ) -> list[dict[str, float]]:
        """Log-probability by token at the first place of the answer to each text, of `words` and others."""
        rows = zip(pictures, texts, prompts, strict=True)
        return self.backend.first_tokens([Request(tuple(seen), text, prompt) for seen, text, prompt in rows], words)

    def read(
        self, pictures: Sequence[Sequence[Tensor]], prompts: Sequence[str], reader: Callable[[str], float]
    ) -> list[float]:
        """What `reader` finds in the text of each answer, NaN where it finds nothing."""
        rows = zip(pictures, prompts, strict=True)
        requests = [Request(tuple(seen), self.questions.text(prompt), prompt) for seen, prompt in rows]
        texts = self.backend.texts(requests, self.questions.max_tokens)
        values = [reader(text) for text in texts]
        self.account(prompts, values, [repr(text[-80:]) for text in texts])
        return values

    def account(self, prompts: Sequence[str], values: Sequence[float], said: Sequence[str]) -> None:
        """Count answers, and tell of those that could not be read what the model said instead."""
        lost = [i for i, value in enumerate(values) if math.isnan(value)]
        self.asked, self.failed = self.asked + len(values), self.failed + len(lost)
        before = self.failed - len(lost)
        if lost and self.failed.bit_length() > before.bit_length():  # at 1, 2, 4, ...: questions may come one by one
            log.warning(
                "vlm: %d of %d answers could not be read; to %r the model says %s",
                self.failed,
                self.asked,
                prompts[lost[0]][:80],
                said[lost[0]],
            )


class JudgeReward(Reward):
    """Base of rewards that ask a vision-language model; a file after the colon says what is asked of whom."""

    differentiable = False
    weights = None
    licence = "that of the model that is asked"

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, file: str = "") -> None:
        self.judge = Judge(self.questions(file), device, dtype)
        self.waits = isinstance(self.judge.backend, ServerBackend)  # a model that runs here is busy itself

    @classmethod
    @abstractmethod
    def questions(cls, file: str) -> Questions:
        """What a file asks; "" where none was named.

        Raises:
            ConfigError: it cannot be asked.
        """

    @classmethod
    def check_argument(cls, argument: str | None) -> None:
        cls.questions(argument or "")

    def identity(self) -> str:
        return json.dumps(self.judge.identity())


def _best(top: Mapping[str, float]) -> list[str]:
    return sorted(top, key=lambda token: -top[token])[:3]


# ---------------------------------------------------------------- pairs


@dataclass(frozen=True)
class Comparison:
    """What a judge says about pairs.

    Attributes:
        p: probability that the first picture is better, mean of both orders, (B,); NaN where an answer is missing.
        tie: the orders do not agree on a winner, (B,); False where an answer is missing.
        bias: mean distance of the two orders' probabilities; 0 for a judge that does not care for the place.
        consistency: share of the known pairs on whose winner both orders agree.
    """

    p: Tensor
    tie: Tensor
    bias: float
    consistency: float


def compare(
    judge: Judge, first: Tensor | Sequence[Tensor], second: Tensor | Sequence[Tensor], prompts: Sequence[str]
) -> Comparison:
    """Ask which of two pictures is better, in both orders; for annotating pairs (`p` is what data readers call `p`).

    Args:
        judge: with questions of mode pair or verdict.
        first, second: B pictures, float RGB (3, H, W) in [0, 1].
        prompts: B texts.
    """
    if judge.questions.mode not in PAIR_MODES:
        raise ConfigError(f"questions of mode {judge.questions.mode!r}; compare needs mode: {' or '.join(PAIR_MODES)}")
    forward = [(a, b) for a, b in zip(first, second, strict=True)]
    answers = judge.ask([*forward, *((b, a) for a, b in forward)], [*prompts, *prompts])
    values = torch.tensor([answer.value for answer in answers])
    return combine_orders(values[: len(forward)], 1 - values[len(forward) :])


def combine_orders(ab: Tensor, ba: Tensor) -> Comparison:
    """Of the probabilities (B,) that the first picture is better, as it is told when it stands first, and when second."""
    p, apart = (ab + ba) / 2, (ab - ba).abs()
    known = ~apart.isnan()
    agree = ((ab - 0.5).sign() == (ba - 0.5).sign()) & (ab != 0.5)
    return Comparison(
        p,
        ~agree & known,
        float(apart[known].mean()) if known.any() else math.nan,
        float(agree[known].float().mean()) if known.any() else math.nan,
    )
