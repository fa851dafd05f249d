"""D3PO: DPO of every denoising step of two sampled trajectories, with a clipped likelihood ratio.

Paper: "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model", Yang et al. 2023 (CVPR 2024), arXiv
2311.13231. Code: yk7333/d3po:scripts/train.py, scripts/rm/train_d3po.py, d3po_pytorch/diffusers_patch/ddim_with_logprob.py.

Loss, per pair of transitions at the same step: -log sigma(beta (h_0 log r_0 + h_1 log r_1)), r = clamp(exp(q), 1 - c, 1 +
c), q = log p(x_{t-1} | x_t) - log p_ref(x_{t-1} | x_t) as the *mean* over the elements of the latent, and preferences h in
{+1, -1, 0}. Written here as q clamped to [log(1 - c), log(1 + c)], which neither overflows nor differs. A sum instead of the
mean would be clipped at once.

Consequences: |z| <= beta log(1.1 / 0.9) = 0.0201 and the loss stays in [0.6832, 0.7032] at the published settings. The clamp
is two-sided and does not look at the preference: out of the band a transition has no gradient, whichever way it should go.

Notes: ties (h = 0, both trajectories alike, or neither Pareto-dominates in several rewards; `rollout.pairing`) count log 2
each in the published mean without any gradient; `ties` can leave them out. The human script copies its reference *after*
loading a checkpoint, the reward script before adding adapters (the true base); that is the reference's configuration here.
The code computes log(sigmoid(z)), safe only for clipped z.

Defaults: beta 0.1, clip 0.1 (code). 20 DDIM steps at eta 1, guidance 5 in sampling *and* in training; learning rate 3e-5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.losses import links
from diffalign.losses.base import AnyLayout, BetaObjective, LossOut, Needs, Sampling, Source, as_rows, detached, needs
from diffalign.losses.diffusion._common import Refusing, one_of
from diffalign.losses.layouts import Layout, Pairs
from diffalign.losses.pairwise import pair_metrics
from diffalign.losses.scores import Cap, Kind, Scores


def without(pairs: Pairs, keep: Tensor) -> Pairs:
    """The pairs where `keep`, bool (P,), is True."""
    cut = {name: getattr(pairs, name) for name in pairs.__dataclass_fields__}
    return replace(pairs, **{name: value[keep] for name, value in cut.items() if isinstance(value, Tensor)})


@dataclass(frozen=True, kw_only=True)
class ClippedPair(Refusing, BetaObjective):
    """Base of DPO on pairs of transitions, one row each: the mean log-density of the latent's elements, clipped ratio.

    Attributes:
        clip: c; the ratio to the reference is limited to [1 - c, 1 + c]. 0.1 (all three codes).
        ties: of pairs with p = 1/2: "keep": they count log 2 in the mean, without gradient, as published; "drop": they are
            left out of the mean.
    """

    clip: float = 0.1
    ties: Literal["keep", "drop"] = "keep"

    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.DIFFERENCE, Cap.RATIO))
    refused: ClassVar[Mapping[Kind, str]] = {
        Kind.TOKEN: "its ratio is clipped per denoising transition, a mean over the elements of a latent; a text has none"
    }
    instead: ClassVar[str] = "use 'dpo'"
    source: ClassVar[Source] = "trajectories"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.clip < 1:
            raise ValueError(f"clip is {self.clip}; expected 0 < clip < 1")
        one_of(self, "ties", ("keep", "drop"))

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return math.log(2)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs, q = Layout.of(layout).need_pairs(), scores.log_ratio()
        if scores.units is not None and scores.units.theta.shape[1] > 1:
            raise ValueError(
                f"{self.name} reads one row per transition; these rows are sums over {scores.units.theta.shape[1]} steps, "
                "which the clip would cut at once"
            )
        preference = (2 * as_rows(pairs.p, q) - 1).sign().expand(len(pairs))
        if self.ties == "drop":
            pairs, preference = without(pairs, preference != 0), preference[preference != 0]
        beta = self.beta_for(scores.kind)
        clipped = q.clamp(math.log(1 - self.clip), math.log(1 + self.clip))
        w, l = beta * clipped[pairs.w], beta * clipped[pairs.l]
        loss = pairs.weight * links.logistic(preference * (w - l) - preference.abs() * pairs.margin)
        both = torch.cat([pairs.w, pairs.l])
        metrics = pair_metrics(w - l, w, l, scores, pairs)
        return LossOut(loss, metrics | detached(clip_frac=(clipped != q)[both].to(q.dtype)))


@dataclass(frozen=True, kw_only=True)
class D3PO(ClippedPair):
    """D3PO (Yang et al. 2023, arXiv 2311.13231; official code yk7333/d3po).

    -log sigma(beta (log r_w - log r_l)) per pair of transitions at the same step of two trajectories, r the likelihood ratio
    to the reference (mean over the latent's elements), clipped to [1 - c, 1 + c] on both sides whatever the preference. At
    the published settings |z| <= 0.0201, so the loss hardly moves from log 2; look at the accuracy. Rows come one per
    transition.

    beta: 0.1 on transitions (official).
    """

    name: ClassVar[str] = "d3po"
    title: ClassVar[str] = "D3PO"
    paper: ClassVar[str] = "2311.13231"
    composition: ClassVar[str] = "log-ratio of a transition, clipped -> beta (w - l) -> logistic"
    parity: ClassVar[str] = "yk7333/d3po scripts/train.py (formula)"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.STEP: 0.1}
    sampling: ClassVar[Sampling] = Sampling(pairing="dominance")
