"""Sampling answers with transformers' `generate`, each row from its own random numbers.

A row's noise is drawn from a generator of its own seed, one vector over the vocabulary per token, and added to the
log-probabilities (Gumbel-max: the largest of log p + noise is a draw from p). So what is sampled depends on neither the
batch a row is in nor the number of processes, and two policies that are nearly the same give nearly the same samples.

Shapes: R rows of a call, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig as HFGenerationConfig
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from diffalign.adapters import adapters_off
from diffalign.config import GenerationConfig
from diffalign.errors import ConfigError, DataError
from diffalign.text.policy import evaluation_mode

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampled:
    """One answer.

    Attributes:
        ids: its tokens, the end-of-sequence token included.
        finished: it ended by itself; False: it was cut at `max_new_tokens`.
    """

    ids: tuple[int, ...]
    finished: bool


def check_generation(config: GenerationConfig) -> None:
    """Refuse settings out of range.

    Raises:
        ConfigError: with the range.
    """
    if config.max_new_tokens < 1:
        raise ConfigError(f"generation.max_new_tokens: got {config.max_new_tokens}; expected at least 1")
    if config.batch_size < 1:
        raise ConfigError(f"generation.batch_size: got {config.batch_size}; expected at least 1")
    if not 0 <= config.temperature < float("inf"):
        raise ConfigError(f"generation.temperature: got {config.temperature}; expected 0 (greedy) or a positive number")
    if not 0 < config.top_p <= 1:
        raise ConfigError(f"generation.top_p: got {config.top_p}; expected 0 < value <= 1 (1 keeps everything)")
    if config.top_k < 0:
        raise ConfigError(f"generation.top_k: got {config.top_k}; expected 0 (keep all) or a number of tokens")


@torch.no_grad()
def generate(
    network: Any,
    prompts: Sequence[Sequence[int]],
    *,
    config: GenerationConfig,
    seeds: Sequence[int],
    eos_ids: Sequence[int],
    pad_id: int,
    adapters: bool = True,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> list[Sampled]:
    """One answer per prompt.

    Args:
        network: a transformers causal LM, with or without adapters, in any mode, unwrapped.
        prompts: token ids; none empty.
        config: length, temperature and filters.
        seeds: one per row, 0 <= seed < 2^63: `schedules.sample_seed(seed, sample_id, k)`. Unused at temperature 0.
        eos_ids: tokens that end an answer; they are kept in it.
        pad_id: any token id; prompts are padded on the left with it and it is masked.
        adapters: False samples from the reference.
        autocast: mixed-precision context, as in training.

    Raises:
        ConfigError: settings out of range.
        DataError: an empty prompt, or one that leaves no room for `max_new_tokens` in the model's context.
    """
    check_generation(config)
    if len(seeds) != len(prompts):
        raise ValueError(f"got {len(prompts)} prompts and {len(seeds)} seeds; expected one seed per prompt")
    check_prompts(network, prompts, config)
    settings = HFGenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=False,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
    )
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))  # alike lengths together: less padding
    found: dict[int, Sampled] = {}
    without = nullcontext() if adapters else adapters_off(network)
    with evaluation_mode(network), _own_settings(network, settings), without, autocast():
        for start in range(0, len(order), config.batch_size):
            rows = order[start : start + config.batch_size]
            ids, mask = left_padded([prompts[n] for n in rows], pad_id, network.device)
            processors = _processors(config, [seeds[n] for n in rows], network.device)
            out = network.generate(
                input_ids=ids, attention_mask=mask, generation_config=settings, logits_processor=processors
            )
            for n, answer in zip(rows, out[:, ids.shape[1] :].tolist(), strict=True):
                found[n] = _cut(answer, frozenset(eos_ids))
    return [found[n] for n in range(len(prompts))]


def check_prompts(network: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> None:
    """Refuse prompts that are empty, or that leave no room for `max_new_tokens` in the model's context.

    Raises:
        DataError: naming the longest.
    """
    if (empty := next((n for n, prompt in enumerate(prompts) if not prompt), None)) is not None:
        raise DataError(f"prompt {empty} has no tokens; expected at least one (a start-of-text token will do)")
    context = context_length(network.config)
    lengths = [len(prompt) for prompt in prompts]
    if context is None or not lengths or max(lengths) + config.max_new_tokens <= context:
        return
    longest = lengths.index(max(lengths))
    many = sum(length + config.max_new_tokens > context for length in lengths)
    raise DataError(
        f"prompt {longest} has {lengths[longest]} tokens, and generation.max_new_tokens is {config.max_new_tokens}; "
        f"together at most {context} fit the model's context ({many} of {len(lengths)} prompts do not). Lower one of them, "
        "or text.max_prompt_length"
    )


def context_length(config: Any) -> int | None:
    """Tokens a model can take, by its config; None where it does not say."""
    known = config.to_dict()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(known.get(name), int):
            return int(known[name])
    return None


def left_padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), int64 (R, longest), padded on the left."""
    longest = max(len(row) for row in rows)
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _cut(answer: list[int], ends: frozenset[int]) -> Sampled:
    """Up to the first end token, which stays."""
    for place, token in enumerate(answer):
        if token in ends:
            return Sampled(tuple(answer[: place + 1]), True)
    return Sampled(tuple(answer), False)


def _processors(config: GenerationConfig, seeds: Sequence[int], device: torch.device) -> LogitsProcessorList:
    """transformers' own filters in its own order, then the noise; with it, the greedy choice is the draw."""
    processors = LogitsProcessorList()
    if config.temperature == 0:
        return processors
    if config.temperature != 1:
        processors.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        processors.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        processors.append(TopPLogitsWarper(config.top_p))
    processors.append(_Gumbel(seeds, device))
    return processors


class _Gumbel(LogitsProcessor):
    """Adds Gumbel noise to log-probabilities, every row's from its own generator (on the device of the scores)."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.draws = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, draw in zip(noise, self.draws, strict=True):
            row.exponential_(generator=draw)
        # -log of an exponential variable is a Gumbel variable; a rounded zero would be infinite
        return scores.float() - noise.clamp_(min=1e-10).log()


@contextmanager
def _own_settings(network: nn.Module, settings: HFGenerationConfig) -> Iterator[None]:
    """Inside, the network's own generation defaults do not count.

    `generate` takes from them whatever it is not told, and published ones carry repetition penalties and temperatures,
    with which a sample would not be the policy's.
    """
    owner: Any = network
    before = owner.generation_config
    owner.generation_config = settings
    try:
        yield
    finally:
        owner.generation_config = before
