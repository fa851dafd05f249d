"""Answers drawn from a causal LM, in batches with the key-value cache, and log-probabilities of given answers.

The noise of an answer is a function of its seed and its place alone, whatever batch it is drawn in. Works for any
transformers causal LM whose tokenizer has a chat template, with or without adapters.

Shapes: N questions, K samples per question, R rows still being written, L tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache

from diffalign.text.generation import left_padded
from diffalign.world.text.lm import MAX_NEW_TOKENS, plain_prompt

Model: TypeAlias = Any  # transformers.PreTrainedModel or peft.PeftModel
Tokenizer: TypeAlias = Any  # transformers.PreTrainedTokenizerBase
# What the key-value cache is called: transformers 5.24 renamed the argument, and warns of the old name.
_VERSION = tuple(int(part) for part in importlib.metadata.version("transformers").split(".")[:2])
CACHE = "cache" if _VERSION >= (5, 24) else "past_key_values"


def prompt_ids(tokenizer: Tokenizer, question: str, *, chat: bool = True) -> list[int]:
    """A question as the model reads it: by the chat template, or as plain text that ends with a line break."""
    if not chat:
        return list(tokenizer(plain_prompt(question)).input_ids)
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def sample(
    model: Model,
    tokenizer: Tokenizer,
    questions: Sequence[str],
    seed: int,
    *,
    samples: int = 1,
    temperature: float = 1.0,
    chat: bool = True,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 256,
) -> list[list[str]]:
    """Draw answers.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        questions: N questions, without any markers.
        seed: of the draw.
        samples: K, answers per question.
        temperature: 0 takes the most probable token each time.
        chat: ask by the chat template, or in plain text.
        max_new_tokens: an answer is cut there.
        batch_size: answers written at once.

    Returns:
        N lists of K answers, without the end mark.
    """
    places = [(i, k) for i in range(len(questions)) for k in range(samples)]
    ids = [prompt_ids(tokenizer, question, chat=chat) for question in questions]
    texts: list[str] = []
    for start in range(0, len(places), batch_size):
        part = places[start : start + batch_size]
        noise = [_generator(seed, i, k) for i, k in part] if temperature > 0 else None
        rows = _write(model, tokenizer, [ids[i] for i, _ in part], noise, temperature, max_new_tokens)
        texts += tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [texts[i * samples : (i + 1) * samples] for i in range(len(questions))]


def _generator(seed: int, question: int, sample: int) -> torch.Generator:
    digest = hashlib.sha256(f"text world/{seed}/{question}/{sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def _write(
    model: Model,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    noise: list[torch.Generator] | None,
    temperature: float,
    max_new_tokens: int,
) -> list[list[int]]:
    ids, mask = left_padded(prompts, tokenizer.pad_token_id, model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    rows: list[list[int]] = [[] for _ in prompts]
    alive, cache = list(range(len(prompts))), DynamicCache(config=model.config)
    for _ in range(max_new_tokens):
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **{CACHE: cache})
        logits_RV = out.logits[:, -1].float()
        if noise is not None:  # Gumbel-max: argmax(logits / T + g) is a draw from softmax(logits / T)
            uniform = torch.stack([torch.rand(logits_RV.shape[1], generator=noise[row]) for row in alive])
            logits_RV = logits_RV / temperature - (-uniform.clamp(min=1e-20).log()).log().to(logits_RV.device)
        token_R = logits_RV.argmax(1)
        going = [j for j, token in enumerate(token_R.tolist()) if token != tokenizer.eos_token_id]
        for j in going:
            rows[alive[j]].append(int(token_R[j]))
        if not going:
            break
        alive = [alive[j] for j in going]
        kept = torch.tensor(going, device=ids.device)
        cache.batch_select_indices(kept)
        ids, mask = token_R[kept, None], torch.cat([mask[kept], mask.new_ones(len(kept), 1)], 1)
        positions = positions[kept, -1:] + 1
    return rows


# ---------------------------------------------------------------- given answers


@dataclass(frozen=True)
class AnswerLogprobs:
    """Log-probabilities of answers.

    Attributes:
        total: summed over the answer's tokens and its end mark, float32 (N,), in nats.
        tokens: how many tokens that is, int64 (N,).
    """

    total: Tensor
    tokens: Tensor

    @property
    def mean(self) -> Tensor:
        """Per token, float32 (N,): the logarithm of the length-normalised probability."""
        return self.total / self.tokens


@torch.no_grad()
def answer_logprobs(
    model: Model,
    tokenizer: Tokenizer,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    chat: bool = True,
    batch_size: int = 256,
) -> AnswerLogprobs:
    """Log-probability of each answer to its question, in float32.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        questions: N questions, without any markers.
        answers: N answers, without an end mark.
        chat: ask by the chat template, or in plain text.
        batch_size: answers per forward pass.
    """
    heads = [prompt_ids(tokenizer, question, chat=chat) for question in questions]
    tails = [[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in answers]
    totals = []
    for start in range(0, len(heads), batch_size):
        part = slice(start, start + batch_size)
        rows = [head + tail for head, tail in zip(heads[part], tails[part], strict=True)]
        ids, mask = left_padded(rows, tokenizer.pad_token_id, model.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits_NLV = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, :-1].float()
        logp_NL = logits_NLV.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        lengths = torch.tensor([len(tail) for tail in tails[part]], device=ids.device)
        from_end = torch.arange(ids.shape[1] - 1, 0, -1, device=ids.device)  # the last token is the first from the end
        totals.append(torch.where(from_end <= lengths[:, None], logp_NL, 0.0).sum(1))
    lengths = torch.tensor([len(tail) for tail in tails])
    return AnswerLogprobs(torch.cat(totals).cpu() if totals else torch.zeros(0), lengths)
