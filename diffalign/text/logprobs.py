"""Token log-probabilities from hidden states, a few thousand tokens' logits at a time.

The logits of a batch, (N, L, V), are the largest tensor of a text objective by far. Here only the tokens that are scored
go through the language-model head, `chunk` of them at a time, and no logits outlive their chunk: a token's score is one
number, so its gradient by the token's hidden state is one vector of the hidden width, and that is taken while the logits
are there. Backward then multiplies by what arrives, without computing logits again. The head must be frozen.

liger's fused kernel is not used: its unreduced form (0.8.5) computes the logits a second time in backward, and it knows
no statistics over the vocabulary.

Shapes: T scored tokens, C tokens of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import ConfigError
from diffalign.losses.base import TokenStatistic
from diffalign.losses.scores import lift

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
_FACTORS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_DIVISORS_THAT_MULTIPLY = ("hyperclovax",)


@dataclass(frozen=True)
class Head:
    """From the last hidden state to logits, as the model's own forward does it.

    Attributes:
        layer: the output projection.
        scale: factor on its output.
        softcap: c in c * tanh(logits / c), after the scale; None: no cap.
    """

    layer: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D), in the layer's own type."""
        logits: Tensor = self.layer(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def head_of(network: Any) -> Head:
    """The head of a transformers causal LM, by its config; `check_head` proves it on the network itself.

    Raises:
        ConfigError: there is no output projection.
    """
    layer = network.get_output_embeddings()
    if layer is None:
        raise ConfigError(f"{type(network).__name__} has no output projection; expected a causal language model")
    config = network.config.to_dict()
    numbers = {key: float(value) for key, value in config.items() if isinstance(value, (int, float)) and value}
    scale = 1.0
    for key in _FACTORS:
        scale *= numbers.get(key, 1.0)
    for key in _DIVISORS:
        value = numbers.get(key, 1.0)
        scale = scale * value if config.get("model_type") in _DIVISORS_THAT_MULTIPLY else scale / value
    softcap = next((numbers[key] for key in _SOFTCAPS if key in numbers), None)
    return Head(layer, scale, softcap)


@torch.no_grad()
def check_head(network: Any, head: Head) -> None:
    """Prove on a few tokens that `head` of the base's last hidden state is what the whole model returns, and that the
    base only looks back.

    The hidden states are enlarged on their way into the projection, so that a cap that is forgotten cannot hide behind
    small logits. The network must be in evaluation mode.

    Raises:
        ConfigError: it is not; such an architecture would be scored wrongly.
    """
    name = type(network).__name__
    if network.base_model is network:
        raise ConfigError(f"{name} has no base model apart from its head, so its log-probabilities cannot be chunked")
    ids = torch.arange(1, 9, device=network.device)[None] % network.config.vocab_size
    hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state
    changed = torch.cat([ids[:, :-1], ids[:, :1]], 1)
    if not _close(network.base_model(input_ids=changed, use_cache=False).last_hidden_state[:, :-1], hidden[:, :-1]):
        raise ConfigError(
            f"{name} looks ahead: a token changes what stands before it; expected a causal language model"
        )
    plain = head.layer(hidden).abs().amax().clamp(min=1e-6)
    enlarged = (50.0 / plain).item()
    seen: list[Tensor] = []

    def enlarge(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(inputs[0])
        return (inputs[0] * enlarged, *inputs[1:])

    hook = head.layer.register_forward_pre_hook(enlarge)
    try:
        wanted = network(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    same_input = len(seen) == 1 and seen[0].shape == hidden.shape and _close(seen[0], hidden)
    if not same_input or not _close(head(seen[0] * enlarged), wanted):
        raise ConfigError(
            f"{name} computes its logits in a way that is not known here, so its log-probabilities would be wrong; "
            "expected output projection, factor and soft cap of the last hidden state"
        )


def _close(a: Tensor, b: Tensor) -> bool:
    bound = 1e-5 if a.dtype in (torch.float32, torch.float64) and b.dtype in (torch.float32, torch.float64) else 2e-2
    return bool((a.double() - b.double()).abs().amax() <= bound * b.double().abs().amax())


def token_scores(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    *,
    chunk: int = 1024,
    statistics: Mapping[str, TokenStatistic] | None = None,
    reference: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """log p of each label, and statistics over the vocabulary.

    Args:
        hidden: hidden states that predict the labels, (T, D), any floating type; gradient flows to it.
        labels: int64 (T,).
        head: frozen.
        chunk: tokens whose logits are held at a time.
        statistics: by name; each sees the float32 log-softmax of a chunk, (C, V), its labels (C,) and the reference's
            log-softmax or None, and returns (C,). A token's value may depend on that token alone.
        reference: hidden states of the reference at the same places, (T, D), no gradient; only for the statistics.

    Returns:
        (log p (T,), statistics (T,) by name), float32 (float64 for float64 inputs).

    Raises:
        ValueError: the head is trainable, which this computation would ignore; or chunk < 1.
    """
    if chunk < 1:
        raise ValueError(f"logits_chunk is {chunk}; expected at least 1 token")
    if any(p.requires_grad for p in head.layer.parameters()):
        raise ValueError("the language-model head is trainable; chunked log-probabilities need it frozen")
    functions = dict(statistics or {})
    wants_gradient = torch.is_grad_enabled() and hidden.requires_grad
    values = _TokenScores.apply(hidden, labels, reference, head, chunk, tuple(functions.values()), wants_gradient)
    return values[0], dict(zip(functions, values[1:], strict=True))


class _TokenScores(torch.autograd.Function):
    """(1 + S, T): log p and S statistics. Gradients by the hidden states are taken in forward, where the logits are."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        reference: Tensor | None,
        head: Head,
        chunk: int,
        statistics: Sequence[TokenStatistic],
        wants_gradient: bool,
    ) -> Tensor:
        values: list[Tensor] = []
        slopes: list[list[Tensor]] = [[] for _ in range(1 + len(statistics))]
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            h = hidden[part].detach().requires_grad_(wants_gradient)
            if statistics:
                other = None if reference is None else lift(head(reference[part])).log_softmax(-1)
                value, slope = _chunk_with_statistics(h, labels[part], head, statistics, other)
            else:
                value, slope = _chunk(h, labels[part], head)
            values.append(value)
            for kept, one in zip(slopes, slope):
                kept.append(one)
        ctx.empty = not values
        if ctx.empty:
            ctx.save_for_backward(hidden)
            return lift(hidden.new_zeros(1 + len(statistics), 0))
        ctx.save_for_backward(*(torch.cat(kept) for kept in slopes if kept))
        ctx.has_slope = [bool(kept) for kept in slopes]
        return torch.cat(values, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        slopes = iter(ctx.saved_tensors)
        if ctx.empty:
            return torch.zeros_like(next(slopes)), *[None] * 6
        total: Tensor | None = None
        for row, there in zip(grad, ctx.has_slope, strict=True):
            if there:
                slope = next(slopes)
                term = slope.to(row.dtype) * row[:, None]
                total = term if total is None else total.add_(term)
        assert total is not None, "log p always has a slope where gradient is wanted"
        return total, *[None] * 6


def _chunk(h: Tensor, labels: Tensor, head: Head) -> tuple[Tensor, list[Tensor]]:
    """log p, (1, C), and its gradient by h: onehot(label) - softmax, through the head; no further copies of (C, V)."""
    with torch.set_grad_enabled(h.requires_grad):
        logits_CV = head(h)
    logp_CV = lift(logits_CV.detach()).log_softmax(-1)
    value = logp_CV.gather(1, labels[:, None]).T
    if not h.requires_grad:
        return value, []
    slope_CV = logp_CV.exp_().neg_()
    slope_CV.scatter_add_(1, labels[:, None], torch.ones_like(value.T))
    return value, list(torch.autograd.grad(logits_CV, h, slope_CV.to(logits_CV.dtype)))


def _chunk_with_statistics(
    h: Tensor, labels: Tensor, head: Head, statistics: Sequence[TokenStatistic], reference: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """The same for log p and statistics, by autograd within the chunk. Constants have a slope of zero."""
    with torch.set_grad_enabled(h.requires_grad):
        logp_CV = lift(head(h)).log_softmax(-1)
        found = [logp_CV.gather(1, labels[:, None])[:, 0]]
        found += [statistic(logp_CV, labels, reference) for statistic in statistics]
    for value in found:
        if value.shape != labels.shape:
            raise ValueError(f"a vocabulary statistic has shape {tuple(value.shape)}; expected {tuple(labels.shape)}")
    slopes: list[Tensor] = []
    if h.requires_grad:
        for value in found:
            if value.requires_grad:  # tokens do not mix: the slope of the sum holds every token's own
                slopes += torch.autograd.grad(value, h, torch.ones_like(value), retain_graph=True)
            else:
                slopes.append(torch.zeros_like(h))
    return torch.stack([value.detach().to(logp_CV.dtype) for value in found]), slopes
