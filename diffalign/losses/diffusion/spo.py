"""SPO: D3PO's clipped loss on candidates for the next latent of one trajectory, ranked by a step-aware preference model.

Paper: "Step-aware Preference Optimization: Aligning Preference with Denoising Performance at Each Step" (later "Aesthetic
Post-Training Diffusion Models from Generic Preferences with Step-by-step Preference Optimization", CVPR 2025), Liang et al.
2024, arXiv 2406.04314. Code: RockeyCoss/SPO:spo_training_and_inference/{configs,train_scripts,spo},
step_aware_preference_model.

Loss, per kept step: -log sigma(beta (log r_w - log r_l)), r as in `d3po`, on the best and the worst of several x_{t-1} drawn
from *one* x_t. A step is kept only if the softmax over the two logit-scaled scores differs by more than a threshold (0.3
SD1.5, 0.4 SDXL): `step_weights`. The published code drops the others before it batches, so its mean is over kept steps;
where rows cannot be dropped, put `step_weights` into `pairs.weight`, which keeps that mean within the call.

Since both candidates share x_t, the means of policy and reference are common, and before clipping q_w - q_l = (x_w - x_l) .
(m - m_ref) / sd^2, averaged over elements: linear in the difference of the candidates.

Defaults: beta 10, clip 0.1 (code): |z| <= 2.007, loss in [0.126, 2.133]. 20 DDIM steps at eta 1, candidates from step 4 on,
4 (SD1.5) or 2 (SDXL). The preference model (PickScore with a time embedding) is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffalign.losses.base import Source
from diffalign.losses.diffusion.d3po import ClippedPair
from diffalign.losses.scores import Kind, lift


def step_weights(score_w: Tensor, score_l: Tensor, threshold: float = 0.3) -> Tensor:
    """Weights of pairs: 0 for a step whose best and worst candidate are too close, P / kept for the others, (P,).

    The gap is p_best - p_worst of a softmax over the two, tanh((score_w - score_l) / 2).

    Args:
        score_w, score_l: of the best and worst candidate, multiplied by the model's logit scale (not cosines), (P,).
        threshold: in [0, 1); 0.3 (SD1.5), 0.4 (SDXL).

    Raises:
        ValueError: `threshold` outside [0, 1).
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold is {threshold}; expected 0 <= threshold < 1")
    gap = ((lift(score_w) - lift(score_l)) / 2).tanh()
    keep = (gap > threshold).to(gap.dtype)
    return keep * len(keep) / keep.sum().clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class SPO(ClippedPair):
    """Step-aware preference optimisation (Liang et al. 2024, arXiv 2406.04314; official code RockeyCoss/SPO).

    `d3po`'s clipped loss on the best and worst of several next latents drawn from the same x_t, so that only this step
    differs. Pairs whose probabilities differ by no more than a threshold are left out: drop them, or weigh by
    `spo.step_weights`.

    beta: 10 on transitions (official): |z| <= 2.007.
    """

    name: ClassVar[str] = "spo"
    title: ClassVar[str] = "SPO (step-aware)"
    paper: ClassVar[str] = "2406.04314"
    composition: ClassVar[str] = (
        "log-ratio of a transition, clipped -> beta (w - l) -> logistic, steps with a clear winner"
    )
    parity: ClassVar[str] = "RockeyCoss/SPO train_scripts (formula)"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.STEP: 10.0}
    source: ClassVar[Source] = "candidates"
