"""Reference and update schemes that are arithmetic on scores or on parameters, apart from objectives.

Which model a log-ratio is taken against, and what becomes of it during training, is independent of the objective:

    frozen: scores of the model before training.
    previous iterate: scores of the policy at the start of the round (SPPO, DNO, GPO, iterative DPO).
    geometric mixture: `geometric_mixture` of models' scores (INPO), `mixture_logits` to sample from it (Nash-MD).
    synchronised: `blend` every so many steps (TR-DPO), or every step (EMA of the behaviour policy).
    extrapolated: `extrapolate` scores or logits, `extrapolate_parameters`, `extrapolate_lora` (Accelerated PO, ExPO).
    extragradient: `extragradient_update` (EGPO).
    reincarnation: `blend` with weight 1 at one step, which makes the policy its own new base (ReMix).

A reference that moves has no use for log-probabilities computed once and stored, and a reference that is "the model with
its LoRA switched off" cannot move: both need a second set of weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from diffalign.losses.scores import lift

Sample = TypeVar("Sample")

# -- scores and logits -----------------------------------------------------------------------------------------------


def geometric_mixture(scores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Score of the (unnormalised) geometric mixture prod_k pi_k^{a_k}: sum_k a_k s_k, (N,).

    The missing normaliser depends on the condition alone, so it cancels between responses to the same prompt; objectives on
    single items keep it.

    Args:
        scores: of each model, (N,).
        weights: a_k, summing to 1.

    Raises:
        ValueError: other counts, or weights that do not sum to 1.
    """
    if len(scores) != len(weights) or not scores:
        raise ValueError(f"got {len(scores)} scores and {len(weights)} weights; expected the same number, at least 1")
    if abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"mixture weights {tuple(weights)} sum to {sum(weights):g}; expected 1")
    return torch.stack([a * lift(s) for a, s in zip(weights, scores)]).sum(0)


def mixture_logits(logits: Tensor, reference_logits: Tensor, weight: float = 0.5) -> Tensor:
    """Logits of the geometric mixture pi^{1 - a} ref^a per position, (..., V): what Nash-MD samples from.

    Exact per token: the softmax supplies the normaliser. weight a: share of the reference; TRL's default 0.5.
    """
    return (1 - weight) * lift(logits) + weight * lift(reference_logits)


def extrapolate(newer: Tensor, older: Tensor, amount: float) -> Tensor:
    """Log-probabilities of the extrapolated policy pi_new (pi_new / pi_old)^a: s + a (s - s_old), elementwise.

    Accelerated PO (arXiv 2410.06293?) takes it as the reference of the next round; amount 0 is plain iterative training.
    The same holds for logits, where the softmax normalises. The amount of the paper is UNVERIFIED, about 0.3; the authors
    of ExPO recommend 0.3 to 0.5 for a one-time version.
    """
    newer, older = lift(newer), lift(older)
    return newer + amount * (newer - older)


# -- parameters ------------------------------------------------------------------------------------------------------


def _aligned(one: Iterable[Tensor], other: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    pairs = list(zip(list(one), list(other), strict=True))
    for a, b in pairs:
        if a.shape != b.shape:
            raise ValueError(f"parameters of shapes {tuple(a.shape)} and {tuple(b.shape)} do not belong together")
    return pairs


@torch.no_grad()
def blend(target: Iterable[Tensor], source: Iterable[Tensor], weight: float) -> None:
    """target <- weight source + (1 - weight) target, in place.

    TR-DPO (arXiv 2404.09656?) does this to the reference every 512 steps with weight 0.6 (TRL's defaults); an EMA of the
    behaviour policy with decay eta is weight 1 - eta at every step; weight 1 copies.

    Not for LoRA factors of a target that is to be the blend of two models: see `extrapolate_lora`.

    Raises:
        ValueError: other numbers or shapes of parameters, or a weight outside [0, 1].
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is {weight}; expected 0 <= weight <= 1")
    for a, b in _aligned(target, source):
        a.lerp_(b.to(a.dtype), weight)


def sync_due(step: int, every: int = 512) -> bool:
    """True where a reference is synchronised after finishing optimiser step `step` (counted from 1)."""
    return step > 0 and step % every == 0


@torch.no_grad()
def extrapolate_parameters(newer: Iterable[Tensor], older: Iterable[Tensor], amount: float) -> list[Tensor]:
    """theta + a (theta - theta_old) per parameter; of full weights, not of LoRA factors.

    Equals extrapolating log-probabilities only where logits are linear in the parameters.
    """
    return [a + amount * (a - b.to(a.dtype)) for a, b in _aligned(newer, older)]


def lora_delta(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """The weight update scale B A of a LoRA pair: A (r, in), B (out, r)."""
    return scale * (b @ a)


@torch.no_grad()
def extrapolate_lora(
    newer: tuple[Tensor, Tensor], older: tuple[Tensor, Tensor], amount: float, scale: tuple[float, float] = (1.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """LoRA factors of the extrapolated update (1 + a) B A - a B' A', exact, by concatenating ranks.

    Extrapolating A and B each on its own gives a product with cross terms, another matrix. An amount between -1 and 0 is the
    blend of two adapters.

    Args:
        newer: (A, B), shapes (r, in) and (out, r).
        older: (A', B'), shapes (r', in) and (out, r').
        amount: a.
        scale: factors (alpha / r) of the two adapters; the result's is 1.

    Returns:
        (A, B) of rank r + r'.
    """
    (a1, b1), (a0, b0) = newer, older
    a = torch.cat([a1, a0.to(a1)], 0)
    b = torch.cat([(1 + amount) * scale[0] * b1, -amount * scale[1] * b0.to(b1)], 1)
    return a, b


# -- two-step updates ------------------------------------------------------------------------------------------------


def extragradient_update(
    parameters: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    sample: Callable[[], Sample],
    loss: Callable[[Sample], Tensor],
) -> None:
    """One update of EGPO (arXiv 2503.08942; zhourunlong/EGPO): look half a step ahead, then step from where one was.

    1. Opponents from the current policy; one optimiser step on the loss against them: theta_{t + 1/2}.
    2. Opponents from theta_{t + 1/2}.
    3. Parameters *and optimiser state* back to t; one optimiser step on the loss against the new opponents.

    With the objective `online_ipo` (version 1) the last iterate converges to the Nash equilibrium of the regularised game.
    Costs two rounds of sampling per update.

    Args:
        parameters: that the optimiser trains.
        optimizer: any.
        sample: draws responses from the policy as it is now; called under no_grad.
        loss: of the current parameters against a sample, a scalar with gradient.
    """
    params = list(parameters)
    before = [p.detach().clone() for p in params]
    state = copy.deepcopy(optimizer.state_dict())

    def draw() -> Sample:
        with torch.no_grad():
            return sample()

    def step(opponents: Sample) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(opponents).backward()
        optimizer.step()

    step(draw())
    ahead = draw()
    with torch.no_grad():
        for p, value in zip(params, before):
            p.copy_(value)
    optimizer.load_state_dict(state)
    step(ahead)
    optimizer.zero_grad(set_to_none=True)


def lag_decay(schedule: str | float, step: int) -> float:
    """How much of the lagged policy is kept when a round ends.

    Args:
        schedule: a number; or as DiffusionNFT's code: "copy" 0, "linear_to_0_5" min(step / 1000, 1/2),
            "delayed_linear_to_0_999" 0 up to step 75, then min(0.0075 (step - 75), 0.999).
        step: optimiser steps made.

    Raises:
        ValueError: unknown schedule.
    """
    if schedule == "copy":
        return 0.0
    if schedule == "linear_to_0_5":
        return min(0.001 * step, 0.5)
    if schedule == "delayed_linear_to_0_999":
        return min(max(0.0, 0.0075 * (step - 75)), 0.999)
    if isinstance(schedule, (int, float)) and 0 <= schedule < 1:
        return float(schedule)
    raise ValueError(
        f"old_decay is {schedule!r}; expected a number in [0, 1), copy, linear_to_0_5 or delayed_linear_to_0_999"
    )
