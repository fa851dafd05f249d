"""Statistics over the vocabulary per token, computed where the logits are, so that [N, U, V] never reaches the core.

A statistic takes log-softmax of the policy (..., V), labels int64 (...), and log-softmax of the reference (..., V) or None,
and returns one value per position, (...). Everything is computed from log-probabilities: softmax().log() is minus infinity
once a probability underflows, and 0 times that is NaN (as in the released TDPO and RRPO code). Half precision is lifted to
float32. Positions are independent, so a scorer may feed them in chunks.

Where a target distribution is built from the policy's own logits, no gradient flows through it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.losses.scores import lift


def expectation(log_q: Tensor, values: Tensor) -> Tensor:
    """sum_v q_v values_v with q = exp(log_q), over the last axis; terms of probability zero count as zero."""
    q = lift(log_q).exp()
    return (q * lift(values).masked_fill(q == 0, 0.0)).sum(-1)


def _reference(reference: Tensor | None) -> Tensor:
    if reference is None:
        raise ValueError("this statistic compares with a reference; give the reference's log-softmax")
    return lift(reference).detach()


def kl_ref_theta(logp: Tensor, labels: Tensor, reference: Tensor | None) -> Tensor:
    """KL(reference || policy) >= 0 of every position: the sequential KL of TDPO, SparsePO and RRPO."""
    ref = _reference(reference)
    return expectation(ref, ref) - expectation(ref, logp)


def kl_theta_ref(logp: Tensor, labels: Tensor, reference: Tensor | None) -> Tensor:
    """KL(policy || reference) >= 0 of every position."""
    return expectation(logp, lift(logp) - _reference(reference))


def entropy(logp: Tensor, labels: Tensor, reference: Tensor | None = None) -> Tensor:
    """Entropy of the policy in nats, in [0, log V]."""
    return -expectation(logp, logp)


def log_sum_p2(logp: Tensor, labels: Tensor, reference: Tensor | None = None) -> Tensor:
    """log sum_v p_v^2 <= 0: the log of the expected probability of a token drawn from the policy (WPO's normaliser)."""
    return (2 * lift(logp)).logsumexp(-1)


def ce_u(logp: Tensor, labels: Tensor, reference: Tensor | None = None) -> Tensor:
    """Cross-entropy to the policy's own distribution without the label (CE-U, arXiv 2503.01224).

    The target is softmax of the policy's logits with the label's at minus infinity; no gradient flows through it.
    """
    logp = lift(logp)
    target = logp.detach().masked_fill(_is_label(logp, labels), -torch.inf).log_softmax(-1)
    return -expectation(target, logp)


def pdu(logp: Tensor, labels: Tensor, reference: Tensor | None = None) -> Tensor:
    """(largest logit - mean logit)^2: zero for a uniform distribution (PDU). The same of logits and of log-probabilities."""
    logp = lift(logp)
    return (logp.amax(-1) - logp.mean(-1)).square()


def undial(logp: Tensor, labels: Tensor, reference: Tensor | None, strength: float = 10.0) -> Tensor:
    """Cross-entropy to the reference's distribution with `strength` taken off the label's logit (UNDIAL)."""
    logp = lift(logp)
    shifted = _reference(reference) - strength * _is_label(logp, labels)
    return -expectation(shifted.log_softmax(-1), logp)


def promoted(logp: Tensor, strength: float, top_k: int) -> Tensor:
    """log-softmax of the policy's logits with `strength` added to the `top_k` largest, without gradient, (..., V)."""
    logp = lift(logp).detach()
    index = logp.topk(min(top_k, logp.shape[-1]), dim=-1).indices
    return logp.scatter_add(-1, index, torch.full_like(index, 1, dtype=logp.dtype) * strength).log_softmax(-1)


def dipo_term(logp: Tensor, labels: Tensor, reference: Tensor | None, strength: float = 1.0, top_k: int = 10) -> Tensor:
    """E_{v ~ q}[log p(v) - log p_ref(v)] with q = `promoted(logp, strength, top_k)`.

    Positive strength is the memory-promoting q_m of distribution preference optimisation, negative strength its
    forgetting-promoting q_f. How the paper (arXiv 2510.04773) builds both is UNVERIFIED.
    """
    q = promoted(logp, strength, top_k)
    return expectation(q, lift(logp)) - expectation(q, _reference(reference))


def _is_label(logp: Tensor, labels: Tensor) -> Tensor:
    """bool (..., V): True at the label; nowhere where the label is negative (ignored)."""
    return torch.arange(logp.shape[-1], device=logp.device) == labels[..., None]
