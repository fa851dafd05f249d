"""Unlearning beside the losses: on hidden states, on parameters, and weights per item.

Pure functions and one module; hooks, passes over data and optimisers belong to the caller.

Shapes: N rows, U units, D hidden width, M items, K directions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffalign.losses.reduce import masked_mean
from diffalign.losses.scores import lift

# Exposure risks of the UnPII paper, where they are known here; the full table is scored by a judge model.
EXPOSURE_RISK: Mapping[str, float] = {"name": 0.183, "phone": 0.404, "ssn": 0.513, "name+bank": 0.665}


# -- hidden states ----------------------------------------------------------------------------------------------------


def rmu_direction(width: int, scale: float = 2.0, generator: torch.Generator | None = None) -> Tensor:
    """The control vector c u of RMU, (D,): a random direction of non-negative entries and norm `scale`.

    scale: 2 in open-unlearning's config, 20 in its code.
    """
    u = torch.rand(width, generator=generator)
    return scale * u / u.norm()


def rmu(
    forget: Tensor,
    forget_mask: Tensor,
    direction: Tensor,
    retain: Tensor | None = None,
    retain_reference: Tensor | None = None,
    retain_mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    alpha: float = 1.0,
) -> Tensor:
    """Representation misdirection (arXiv 2403.03218): push hidden states of forget rows to a control vector.

    gamma mean |h(forget) - direction|^2 + alpha mean |h(retain) - h_reference(retain)|^2, each a mean over D, then over the
    row's response tokens, then over rows. The released masked average divides sums of shape (N,) by counts of shape (N, 1),
    which averages over all pairs of rows; here each row has its own count.

    Args:
        forget: hidden states of one layer (7 in the released configs), (N, U, D), gradient flows.
        forget_mask: bool (N, U).
        direction: (D,), see `rmu_direction`.
        retain, retain_reference: the same layer of policy and reference on the retain set, (N', U', D); None leaves it out.
        retain_mask: bool (N', U').
        gamma, alpha: weights.

    Returns:
        The loss, a scalar.
    """
    loss = gamma * _mean_square(lift(forget) - direction.to(forget.device), forget_mask)
    if retain is None:
        return loss
    if retain_reference is None or retain_mask is None:
        raise ValueError("rmu's retain term needs retain_reference and retain_mask")
    return loss + alpha * _mean_square(lift(retain) - lift(retain_reference).detach(), retain_mask)


def _mean_square(difference: Tensor, mask: Tensor) -> Tensor:
    per_row = masked_mean(difference.square().mean(-1), mask)
    return per_row.mean() if len(per_row) else per_row.sum()


class RepresentationProjection(nn.Module):
    """Metamorphosis representation projection: h <- h - h Q^T Q with trainable orthonormal rows Q.

    arXiv 2508.15449, from memory.

    Insert it after chosen layers and train it alone, with gradient ascent on the forget set and descent on the retain set.
    Removing a subspace cannot be undone by later layers, which is its point against relearning.

    Args:
        width: D.
        directions: K < D, removed from the states.
    """

    def __init__(self, width: int, directions: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not 0 < directions < width:
            raise ValueError(f"directions is {directions}; expected 0 < directions < width, which is {width}")
        self.weight = nn.Parameter(torch.randn(width, directions, generator=generator))

    def basis(self) -> Tensor:
        """Q, float32, (K, D): orthonormal rows that span the trainable columns."""
        return torch.linalg.qr(self.weight.float()).Q.T

    def forward(self, states: Tensor) -> Tensor:
        """(..., D) -> (..., D), in the type it came in; computed in float32."""
        q = self.basis()
        h = states.float()
        return (h - (h @ q.T) @ q).to(states.dtype)


# -- parameters -------------------------------------------------------------------------------------------------------


def wagle_scores(
    weights: Mapping[str, Tensor],
    retain_grads: Mapping[str, Tensor],
    forget_grads: Mapping[str, Tensor],
    mu: float = 1e-6,
) -> dict[str, Tensor]:
    """WAGLE's attribution of parameters (arXiv 2410.17509): |(theta - g_retain / mu) g_forget|, by name.

    Gradients are accumulated over both whole sets with the model in evaluation mode. mu is 1e-6 in the released configs.

    Raises:
        ValueError: low-rank factors, of which neither is the weight that the scores are about; or names that do not match.
    """
    if any("lora_" in name for name in weights):
        raise ValueError("got LoRA factors; WAGLE scores full weights: merge the adapter, or score its product")
    if set(weights) != set(retain_grads) or set(weights) != set(forget_grads):
        raise ValueError("weights and gradients have different names; expected the same parameters in all three")
    return {
        name: ((lift(w.detach()) - lift(retain_grads[name]) / mu) * lift(forget_grads[name])).abs()
        for name, w in weights.items()
    }


def wagle_mask(scores: Mapping[str, Tensor], keep: float = 0.95) -> dict[str, Tensor]:
    """The `keep` fraction of all parameters with the largest scores, bool by name; multiply gradients by it.

    keep: 0.95 on TOFU as released.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}; expected a fraction in (0, 1]")
    flat = torch.cat([value.flatten() for value in scores.values()])
    drop = round((1 - keep) * flat.numel())
    if drop == 0:
        return {name: torch.ones_like(value, dtype=torch.bool) for name, value in scores.items()}
    threshold = flat.kthvalue(drop).values
    return {name: value > threshold for name, value in scores.items()}


# -- weights per item -------------------------------------------------------------------------------------------------


def unpii_weight(risk: Tensor) -> Tensor:
    """UnPII's weight 1 + risk of every item, for `Items.weight`; risk is the exposure index in [0, 1] (`EXPOSURE_RISK`).

    Applied outside of the link. The released code differs and is not followed: its NPO branch has the opposite sign (it
    rewards the forget text), its GA branch does not shift labels, and its DPO branch puts the risk inside the sigmoid,
    which weakens the push for risky items.
    """
    return 1 + lift(risk)


def u2a_weights(outer: Tensor, per_item: Tensor, preconditioner: Tensor | None = None) -> Tensor:
    """Weights of forget items by what forgetting them does for preference alignment (U2A), experimental.

    arXiv 2504.06659, from memory.

    omega_i is proportional to max(0, <g_outer, H^-1 g_i>), summing to 1: a gradient step on item i lowers the outer loss by
    that much. If no item helps, weights are uniform. The exact algorithm is UNVERIFIED. Multiply by M for `Items.weight`,
    whose losses are averaged.

    Args:
        outer: gradient of the alignment *loss* over a small set of parameters (LoRA, say), (D,).
        per_item: gradients of the items' forget losses over the same parameters, (M, D).
        preconditioner: diagonal of H^-1, (D,); None is the identity.
    """
    direction = lift(outer) if preconditioner is None else lift(outer) * lift(preconditioner)
    gain = (lift(per_item) @ direction).clamp(min=0)
    total = gain.sum()
    return torch.where(total > 0, gain / torch.where(total > 0, total, 1.0), 1 / max(len(gain), 1))
