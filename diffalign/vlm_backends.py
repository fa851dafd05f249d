"""Who answers questions about pictures: a model on an OpenAI-compatible server, or one of transformers in this process.

Both tell the log-probabilities of the first token of the answer, or generate a text. A server tells those of the few most
probable tokens; a local model knows all, and tells those that count and the few most probable ones.

Shapes: L tokens, V vocabulary.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from diffalign.errors import did_you_mean
from diffalign.http_client import Server, ServerError, parse_url
from diffalign.rewards import WEIGHTS_VARIABLE, RewardError, local_weights

TOKEN_VARIABLE = "DIFFALIGN_VLM_TOKEN"
SHOWN = 5  # most probable tokens that a local model tells beside those that count

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """One question: pictures, float RGB (3, H, W) in [0, 1], then a text. `about` is the prompt, for messages."""

    pictures: tuple[Tensor, ...]
    text: str
    about: str


class Backend(Protocol):
    """Answers questions.

    Attributes:
        model: which model answers, part of the identity of scores.
    """

    model: str

    def first_tokens(self, requests: Sequence[Request], words: Collection[str]) -> list[dict[str, float]]:
        """Log-probability by token at the first place of each answer; empty where the model said nothing.

        Args:
            requests: in an order in which neighbours share pictures, where there is a choice.
            words: tokens that count, without blanks and in lower case.
        """

    def texts(self, requests: Sequence[Request], most: int) -> list[str]:
        """Each answer as a text of at most `most` tokens, the most probable token at every place."""

    def speaks(self, word: str) -> bool:
        """Whether a word, in lower case, can be one token, as far as that is known."""


def plain(token: str) -> str:
    """A token without the blanks, of whatever tokeniser, around it."""
    return token.strip(" \n\t\u2581\u0120\u010a")


def data_uri(picture: Tensor) -> str:
    """A picture (3, H, W) in [0, 1] as the text of a PNG: without loss but for the rounding to 8 bits."""
    buffer = io.BytesIO()
    to_pil(picture).save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def to_pil(picture: Tensor) -> Any:
    """Float RGB (3, H, W) in [0, 1] as an 8-bit Pillow picture."""
    from PIL import Image

    levels = (picture.detach().clamp(0, 1) * 255).round().byte().movedim(0, -1)
    return Image.fromarray(levels.cpu().numpy())


# ---------------------------------------------------------------- on a server


class ServerBackend:
    """A model on an OpenAI-compatible server (vLLM, sglang, llama.cpp).

    At most `workers` questions are under way; whoever is told to wait (429, 503) keeps its place while it waits, so that a
    busy server is asked less. Patience is that of `diffalign.http_client`.

    Args:
        url: address up to `/v1`, perhaps with its patience.
        model: as the server lists it; None takes the first.
        workers: questions at the same time.
        top_logprobs: tokens whose probability is sent.
        system: message that comes first; None sends none.
        extra: further keys of every request.

    Raises:
        ServerError: the server does not answer.
        RewardError: it has no such model.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        workers: int = 8,
        top_logprobs: int = 20,
        system: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        address, patience = parse_url(url, "vlm")
        self.server = Server(address, patience, token=os.environ.get(TOKEN_VARIABLE), what="vlm server")
        models = self._models()
        if not models or (model is not None and model not in models):
            near = did_you_mean(model or "", models)
            raise RewardError(
                f"vlm server {address} has no model {model!r}{near} It has: {', '.join(models) or 'none'}"
            )
        self.model = model or models[0]
        self.workers, self.top_logprobs, self.system, self.extra = workers, top_logprobs, system, dict(extra or {})

    def _models(self) -> list[str]:
        found = self.server.get("/models")
        try:
            return [str(entry["id"]) for entry in found["data"]]
        except (KeyError, TypeError) as error:
            raise RewardError(
                f"vlm server {self.server.url} lists no models; is it OpenAI-compatible, and does the address end in /v1?"
            ) from error

    def first_tokens(self, requests: Sequence[Request], words: Collection[str]) -> list[dict[str, float]]:
        asked = {"max_tokens": 1, "logprobs": True, "top_logprobs": self.top_logprobs}
        return self._all(lambda request: self._read_tokens(self._ask(request, asked)), requests)

    def texts(self, requests: Sequence[Request], most: int) -> list[str]:
        return self._all(lambda request: self._read_text(self._ask(request, {"max_tokens": most})), requests)

    def speaks(self, word: str) -> bool:
        return True  # a server does not tell its vocabulary

    def _all(self, one: Callable[[Request], T], requests: Sequence[Request]) -> list[T]:
        if len(requests) == 1:  # asked from a thread of the caller's
            return [one(requests[0])]
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="vlm")
        try:
            return list(pool.map(one, requests))
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, request: Request, asked: Mapping[str, Any]) -> Any:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_uri(picture)}} for picture in request.pictures
        ]
        content.append({"type": "text", "text": request.text})
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, {"role": "user", "content": content}]
        body = {"model": self.model, "messages": messages, "temperature": 0, **asked, **self.extra}
        try:
            return self.server.post("/chat/completions", json.dumps(body).encode())
        except ServerError as error:
            raise ServerError(f"{error} (asked about {request.about[:80]!r})") from error

    def _read_tokens(self, answer: Any) -> dict[str, float]:
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

    def _read_text(self, answer: Any) -> str:
        try:
            return str(answer["choices"][0]["message"]["content"] or "")
        except (KeyError, TypeError, IndexError) as error:
            raise RewardError(
                f"vlm server {self.server.url} sends no text ({error!r} in {str(answer)[:100]}); "
                "is it OpenAI-compatible?"
            ) from error


# ---------------------------------------------------------------- in this process


class LocalBackend:
    """A model of transformers' image-text-to-text classes with a chat template, in this process.

    Args:
        model: hub id or folder.
        batch: questions at a time.
        system: message that comes first; None sends none.
        processor: keywords for the processor, such as min_pixels and max_pixels; part of the scores.
        device, dtype: of the model.

    Raises:
        RewardError: it cannot be loaded, or was not trained to chat.
    """

    def __init__(
        self,
        model: str,
        *,
        batch: int = 4,
        system: str | None = None,
        processor: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model, self.batch, self.system = model, batch, system
        source = local_weights(model)
        try:
            self.processor = cast(Any, AutoProcessor.from_pretrained(source, **(processor or {})))
            network = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
        except (OSError, ValueError) as error:
            raise RewardError(
                f"vlm: {model!r} cannot be loaded: {str(error).splitlines()[0]} Put <owner>/<name> under "
                f"${WEIGHTS_VARIABLE}, or name a folder"
            ) from error
        if not getattr(self.processor, "chat_template", None):
            raise RewardError(f"vlm: {model!r} has no chat template; take a model that was trained to chat")
        self.processor.tokenizer.padding_side = "left"  # so that the last place is the answer's in every row
        self.network = cast(Any, network).eval().requires_grad_(False).to(device)
        self.device, self.dtype = torch.device(device), dtype
        # Every token that reads as a word counts (" Yes", "yes"), as in the list that a server sends.
        self._words: dict[str, list[tuple[str, int]]] = {}
        for token, index in self.processor.tokenizer.get_vocab().items():
            self._words.setdefault(plain(token).lower(), []).append((token, index))

    @torch.no_grad()
    def first_tokens(self, requests: Sequence[Request], words: Collection[str]) -> list[dict[str, float]]:
        if unknown := sorted(word for word in words if not self.speaks(word)):
            raise RewardError(
                f"vlm: {unknown[0]!r} is not one token of {self.model!r}, so that its probability cannot be read; "
                "ask for other answers or take another model"
            )
        counted = [entry for word in words for entry in self._words[word]]
        tokens, indices = [token for token, _ in counted], torch.tensor([index for _, index in counted])
        found = []
        for inputs in self._batches(requests):
            logits: Tensor = self.network(**inputs, logits_to_keep=1).logits[:, -1]
            logp_BV = logits.float().log_softmax(-1).cpu()
            best = logp_BV.topk(min(SHOWN, logp_BV.shape[1]))
            for row, values, places in zip(logp_BV, best.values, best.indices, strict=True):
                shown = self.processor.tokenizer.convert_ids_to_tokens(places.tolist())
                told = {str(token): value for token, value in zip(shown, values.tolist(), strict=True)}
                found.append(told | dict(zip(tokens, row[indices].tolist(), strict=True)))
        return found

    @torch.no_grad()
    def texts(self, requests: Sequence[Request], most: int) -> list[str]:
        found: list[str] = []
        for inputs in self._batches(requests):
            answer = self.network.generate(**inputs, max_new_tokens=most, do_sample=False)
            new = answer[:, inputs["input_ids"].shape[1] :]
            found += self.processor.batch_decode(new, skip_special_tokens=True)
        return found

    def speaks(self, word: str) -> bool:
        return word in self._words

    def _batches(self, requests: Sequence[Request]) -> Iterator[dict[str, Any]]:
        for start in range(0, len(requests), self.batch):
            part = requests[start : start + self.batch]
            inputs = self.processor(
                text=[self.written(request) for request in part],
                images=[[to_pil(picture) for picture in request.pictures] for request in part],
                padding=True,
                return_tensors="pt",
            ).to(self.device)
            yield {key: value.to(self.dtype) if value.is_floating_point() else value for key, value in inputs.items()}

    def written(self, request: Request) -> str:
        """The whole text that the model sees, up to where its answer begins."""
        content = [{"type": "image"} for _ in request.pictures] + [{"type": "text", "text": request.text}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.system:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system}]})
        # Models that think aloud would begin with a tag instead of the answer.
        thinking = {"enable_thinking": False} if "enable_thinking" in str(self.processor.chat_template) else {}
        text: str = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **thinking)
        return text
