"""Questions about pictures to a vision-language model on an OpenAI-compatible server (vLLM, sglang, llama.cpp).

One token is asked for, and its log-probabilities are read instead of its text: a greedy answer knows few values, so that
whole groups tie; expectations are smooth. An answer in which none of the expected tokens occurs is missing, NaN, and
never 0. Yes or no: Lin et al. 2024 (VQAScore), arXiv 2404.01291, here among yes and no alone. Rating: the mean of 1..K under
the digits' probabilities, as in Q-Align (arXiv 2312.17090). Pairs are asked in both orders, since models prefer a place.

What is asked stands in a YAML file:

    server: http://127.0.0.1:8000/v1        # patience as in remote rewards: ...?wait=600&timeout=60
    model: Qwen/Qwen2.5-VL-7B-Instruct      # default: the first that the server lists
    mode: yes_no                            # or rating, or pair
    question: 'Does this picture show "{prompt}"? Answer Yes or No.'

Shapes: B pictures or pairs.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import logging
import math
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from diffalign.errors import ConfigError, did_you_mean
from diffalign.http_client import Server, ServerError, parse_url
from diffalign.rewards import RewardError

log = logging.getLogger("diffalign.rewards")

TOKEN_VARIABLE = "DIFFALIGN_VLM_TOKEN"
MODES = ("yes_no", "rating", "pair")
QUESTIONS = {
    "yes_no": 'Does this picture show "{prompt}"? Answer with Yes or No.',
    "rating": 'How well does this picture show "{prompt}"? Answer with one digit, 1 (not at all) to {scale} (perfectly).',
    "pair": 'Which picture shows "{prompt}" better, the first (A) or the second (B)? Answer with one letter, A or B.',
}
LOW_MASS = 0.5  # of the expected tokens; below it the model wants to say something else


@dataclass(frozen=True)
class Questions:
    """What is asked of whom.

    Attributes:
        server: address up to `/v1`, with its patience (see `diffalign.http_client.Patience`).
        model: as the server lists it; None takes the first.
        mode: one of `MODES`.
        question: with {prompt}, and for ratings {scale}; None takes that of `QUESTIONS`.
        system: message that comes first; None sends none.
        scale: K of ratings 1..K, at most 9, since 10 is two tokens for most models.
        top_logprobs: tokens whose probability is sent; 20 is what servers allow by default.
        workers: questions at the same time.
        extra: further keys of the request, such as chat_template_kwargs: {enable_thinking: false}.
    """

    server: str
    model: str | None = None
    mode: str = "yes_no"
    question: str | None = None
    system: str | None = None
    scale: int = 5
    top_logprobs: int = 20
    workers: int = 8
    extra: dict[str, Any] = field(default_factory=dict)

    def text(self, prompt: str) -> str:
        """The question about a prompt, which may hold braces of its own."""
        question = self.question or QUESTIONS[self.mode]
        return question.replace("{scale}", str(self.scale)).replace("{prompt}", prompt)


def read_questions(path: str | Path) -> Questions:
    """Read the YAML file.

    Raises:
        ConfigError: what was got and what is possible.
    """
    where = f"questions {path}"
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("server"), str):
        raise ConfigError(f"{where}: no server; write server: http://127.0.0.1:8000/v1")
    known = {f.name: f for f in dataclasses.fields(Questions)}
    for key, value in tree.items():
        if key not in known:
            raise ConfigError(f"{where}: {key}: unknown key{did_you_mean(str(key), known)} Known: {', '.join(known)}")
        kind = {"scale": int, "top_logprobs": int, "workers": int, "extra": dict}.get(key, str)
        optional = key in ("model", "question", "system") and value is None
        if not optional and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ConfigError(f"{where}: {key} is {value!r}; {kind.__name__} expected")
    found = Questions(**tree)
    if found.mode not in MODES:
        raise ConfigError(
            f"{where}: mode {found.mode!r}{did_you_mean(found.mode, MODES)} Available: {', '.join(MODES)}"
        )
    bounds = {"scale": (2, 9), "top_logprobs": (2, 1000), "workers": (1, 256)}
    for key, (low, high) in bounds.items():
        if not low <= getattr(found, key) <= high:
            raise ConfigError(f"{where}: {key} is {getattr(found, key)}; {low} to {high} expected")
    if wrong := set(re.findall(r"\{(\w*)\}", found.question or "")) - {"prompt", "scale"}:
        raise ConfigError(f"{where}: question has {{{min(wrong)}}}; {{prompt}} and {{scale}} are what is filled in")
    parse_url(found.server, where)
    return found


# ---------------------------------------------------------------- reading answers


@dataclass(frozen=True)
class Answer:
    """A number read from log-probabilities, NaN where it cannot be, and the probability of all tokens that count."""

    value: float
    mass: float


def plain(token: str) -> str:
    """A token without the blanks, of whatever tokeniser, around it."""
    return token.strip(" \n\t\u2581\u0120\u010a")


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


def yes_probability(top: Mapping[str, float]) -> Answer:
    """P(yes) / (P(yes) + P(no))."""
    return weigh(top, {"yes": 1.0, "no": 0.0})


def expected_rating(top: Mapping[str, float], scale: int = 5) -> Answer:
    """Sum of k P(k) over sum of P(k), k from 1 to `scale`."""
    return weigh(top, {str(k): float(k) for k in range(1, scale + 1)})


def first_probability(top: Mapping[str, float]) -> Answer:
    """P(A) / (P(A) + P(B))."""
    return weigh(top, {"a": 1.0, "b": 0.0})


# ---------------------------------------------------------------- asking


class Judge:
    """Asks the questions of a file.

    Attributes:
        asked, failed: answers so far, and those that could not be read.

    Raises:
        ServerError: the server does not answer.
        RewardError: it has no such model.
    """

    def __init__(self, questions: Questions) -> None:
        self.questions, self.asked, self.failed = questions, 0, 0
        url, patience = parse_url(questions.server, "vlm")
        self.server = Server(url, patience, token=os.environ.get(TOKEN_VARIABLE), what="vlm server")
        models = self._models()
        if not models or (questions.model is not None and questions.model not in models):
            near = did_you_mean(questions.model or "", models)
            raise RewardError(
                f"vlm server {url} has no model {questions.model!r}{near} It has: {', '.join(models) or 'none'}"
            )
        self.model = questions.model or models[0]
        self._lock = threading.Lock()

    def _models(self) -> list[str]:
        found = self.server.get("/models")
        try:
            return [str(entry["id"]) for entry in found["data"]]
        except (KeyError, TypeError) as error:
            raise RewardError(
                f"vlm server {self.server.url} lists no models; is it OpenAI-compatible, and does the address end in /v1?"
            ) from error

    def ask(self, pictures: Sequence[Sequence[Tensor]], prompts: Sequence[str]) -> list[Answer]:
        """An answer to each question, in order.

        Args:
            pictures: of each question, float RGB (3, H, W) in [0, 1].
            prompts: one for each question.

        Raises:
            ServerError, RewardError: the server is gone for too long, refuses a request, or sends no log-probabilities.
        """
        read: dict[str, Callable[[Mapping[str, float]], Answer]] = {
            "yes_no": yes_probability,
            "rating": lambda top: expected_rating(top, self.questions.scale),
            "pair": first_probability,
        }
        pool = ThreadPoolExecutor(self.questions.workers, thread_name_prefix="vlm")
        try:
            tops = list(pool.map(self._top, pictures, prompts))
        finally:
            pool.shutdown(cancel_futures=True)
        answers = [read[self.questions.mode](top) for top in tops]
        lost = [i for i, answer in enumerate(answers) if math.isnan(answer.value)]
        self.asked, self.failed = self.asked + len(answers), self.failed + len(lost)
        if lost:
            said = ", ".join(repr(token) for token in list(tops[lost[0]])[:3]) or "nothing"
            log.warning(
                "vlm: %d of %d answers could not be read; to %r the model says %s",
                self.failed,
                self.asked,
                prompts[lost[0]][:80],
                said,
            )
        masses = [answer.mass for answer in answers if not math.isnan(answer.value)]
        if masses and (mean := math.fsum(masses) / len(masses)) < LOW_MASS:
            log.warning("vlm: the expected tokens have only %.2f of the probability; does the model think first?", mean)
        return answers

    def _top(self, pictures: Sequence[Tensor], prompt: str) -> dict[str, float]:
        content = [{"type": "image_url", "image_url": {"url": data_uri(picture)}} for picture in pictures]
        content.append({"type": "text", "text": self.questions.text(prompt)})  # type: ignore[dict-item]
        system = [{"role": "system", "content": self.questions.system}] if self.questions.system else []
        request = {
            "model": self.model,
            "messages": [*system, {"role": "user", "content": content}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": self.questions.top_logprobs,
            **self.questions.extra,
        }
        try:
            answer = self.server.post("/chat/completions", json.dumps(request).encode())
        except ServerError as error:
            raise ServerError(f"{error} (asked about {prompt[:80]!r})") from error
        return self._read(answer)

    def _read(self, answer: Any) -> dict[str, float]:
        """Log-probability by token; empty where the model said nothing."""
        try:
            logprobs = answer["choices"][0]["logprobs"]
            if logprobs is None:
                raise KeyError("logprobs")
            first = logprobs["content"][:1]
            top: dict[str, float] = {}
            for entry in first[0]["top_logprobs"] if first else []:
                top[str(entry["token"])] = float(entry["logprob"])
            return top
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise RewardError(
                f"vlm server {self.server.url} sends no log-probabilities ({error!r} in {str(answer)[:100]}); "
                "they are what is read. Is top_logprobs above what the server allows?"
            ) from error


def data_uri(picture: Tensor) -> str:
    """A picture (3, H, W) in [0, 1] as the text of a PNG: without loss but for the rounding to 8 bits."""
    from PIL import Image

    buffer = io.BytesIO()
    levels = (picture.detach().clamp(0, 1) * 255).round().byte().movedim(0, -1)
    Image.fromarray(levels.cpu().numpy()).save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---------------------------------------------------------------- pairs


@dataclass(frozen=True)
class Comparison:
    """What a judge says about pairs.

    Attributes:
        p: probability that the first picture is better, mean of both orders, (B,); NaN where an answer is missing.
        tie: the orders disagree on the winner, (B,).
        bias: mean distance of the two orders' probabilities; 0 for a judge that does not care for the place.
    """

    p: Tensor
    tie: Tensor
    bias: float


def compare(judge: Judge, first: Tensor, second: Tensor, prompts: Sequence[str]) -> Comparison:
    """Ask which of two pictures is better, in both orders; for annotating pairs (`p` is what data readers call `p`).

    Args:
        judge: with questions of mode pair.
        first, second: float RGB in [0, 1], (B, 3, H, W).
        prompts: B texts.
    """
    if judge.questions.mode != "pair":
        raise ConfigError(f"questions of mode {judge.questions.mode!r}; compare needs mode: pair")
    forward = [(a, b) for a, b in zip(first, second, strict=True)]
    answers = judge.ask([*forward, *((b, a) for a, b in forward)], [*prompts, *prompts])
    values = torch.tensor([answer.value for answer in answers])
    ab, ba = values[: len(forward)], 1 - values[len(forward) :]
    p, apart = (ab + ba) / 2, (ab - ba).abs()
    known = apart[~apart.isnan()]
    return Comparison(p, (ab > 0.5) != (ba > 0.5), float(known.mean()) if len(known) else math.nan)
