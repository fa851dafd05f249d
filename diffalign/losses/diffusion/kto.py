"""Diffusion-KTO: single images, liked or not, against a reference point of the whole batch.

Paper: "Aligning Diffusion Models by Optimizing Human Utility", Li et al. 2024, arXiv 2404.04465 (appendices A.1, D). Code:
jacklishufan/diffusion-kto:train_kto_sd_v1.5.py, exps/example.sh.

Loss, per image: lambda (1 - U(y u)), u = beta (g - q), g = e_ref - e (no one half here), y = +1 liked, -1 not, q = max(0,
mean of g over the *global* batch) without gradient, U the logistic function. Variants (the code's `--halo`): loss-averse, U
= log sigma(u); risk-seeking, U = -log sigma(-u) (`risk_seeking_3`; two further forms of it in the code, one that is not a
function of y u and one with an exponential, are not here). The loss is 1 - U for all of them, so it starts at 1/2, 1 + log 2
and 1 - log 2; the last has no minimum. The code's other reference points (mean of per-class means, images under other
prompts) are not here; `kto` has the second.

Paper and code differ: beta is 5000 in the paper, its ablation rises from 2000 to 5000, and the released example leaves the
argument at 1000; 5000 is followed. The published global batch is 8 images, so q is very noisy; under accumulation it is one
micro-batch over all processes. The code swaps weights of policy and reference in place, which is not followed.

Liked images are drawn with probability 0.8 (the sampler's business), timestep and noise are independent per image. lambda 1
for both classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import softplus

from diffalign.losses import links
from diffalign.losses.base import AnyLayout, BetaObjective, Estimator, LossOut, Needs, detached, read_stat
from diffalign.losses.diffusion._common import Refusing, one_of, positive
from diffalign.losses.estimators import Gather, alone, global_mean
from diffalign.losses.layouts import Layout
from diffalign.losses.scores import Cap, Kind, Scores
from diffalign.losses.unpaired import item_metrics, need_labels


def gain(scores: Scores) -> Tensor:
    """g per row, (N,): e_ref - e of denoising errors, twice the log-ratio; the log-ratio of stored transitions."""
    return (2.0 if scores.kind is Kind.BOUND else 1.0) * scores.log_ratio()


class BatchGain(Estimator):
    """q = max(0, mean of g over the items of all processes), clamped after averaging; no memory.

    Stats: "q", scalar, in units of g.
    """

    def update(self, scores: Scores, layout: Layout, gather: Gather = alone) -> dict[str, Tensor]:
        g = gain(scores).detach()
        return {"q": global_mean(g[layout.as_items().index], gather).clamp(min=0).to(g.dtype)}


@dataclass(frozen=True, kw_only=True)
class DiffusionKTO(Refusing, BetaObjective):
    """Diffusion-KTO (Li et al. 2024, arXiv 2404.04465; official code jacklishufan/diffusion-kto).

    lambda (1 - sigma(y beta (g - q))) per image, g = e_ref - e, q = max(0, mean of g over the batch of all processes). Reads
    images with labels in [0, 1]; of pairs it takes the chosen for liked, the rejected for not. Every image has its own
    timestep and noise.

    beta: 5000 on denoising errors (paper; the released example runs 1000). It multiplies differences of errors, twice the
    log-ratio: as steep as `dpo` at the same beta, whose z holds two images with a half each.

    Attributes:
        utility: "kahneman_tversky": sigma; "loss_averse": log sigma(u), as `bco` has it; "risk_seeking": -log sigma(-u),
            whose loss has no minimum.
        desirable_weight, undesirable_weight: lambda of the two classes; 1 (official).
    """

    utility: Literal["kahneman_tversky", "loss_averse", "risk_seeking"] = "kahneman_tversky"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    name: ClassVar[str] = "diffusion_kto"
    title: ClassVar[str] = "Diffusion-KTO"
    paper: ClassVar[str] = "2404.04465"
    composition: ClassVar[str] = "difference of errors -> beta (g - q), q of the batch -> utility per label"
    needs: ClassVar[Needs] = Needs(
        layout=("items",), or_layout=("pairs",), caps=frozenset({Cap.DIFFERENCE}), stats=("q",)
    )
    parity: ClassVar[str] = "jacklishufan/diffusion-kto train_kto_sd_v1.5.py (formula)"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.BOUND: 5000.0}
    instead: ClassVar[str] = "use 'kto', which has a reference point made for texts"
    refused: ClassVar[Mapping[Kind, str]] = {
        Kind.TOKEN: "the mean over the batch itself is a reference point for images; texts are compared with mismatched ones"
    }
    noise: ClassVar[Literal["shared", "independent"]] = "independent"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "utility", ("kahneman_tversky", "loss_averse", "risk_seeking"))
        positive(self, "desirable_weight", "undesirable_weight", zero=True)

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        if self.desirable_weight != self.undesirable_weight:
            return None
        values = {"kahneman_tversky": 0.5, "loss_averse": 1 + math.log(2), "risk_seeking": 1 - math.log(2)}
        return self.desirable_weight * values[self.utility]

    def estimator(self) -> BatchGain:
        return BatchGain()

    def cost(self, u: Tensor) -> Tensor:
        """What a value u costs, (M,)."""
        if self.utility == "kahneman_tversky":
            return links.sigmoid(u)
        return 1 + softplus(-u) if self.utility == "loss_averse" else 1 - softplus(u)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        items = Layout.of(layout).as_items()
        label, beta = need_labels(items), self.beta_for(scores.kind)
        g = gain(scores)[items.index]
        q = read_stat(stats, "q", g)
        u = beta * (g - q)
        liked = self.desirable_weight * label * self.cost(u)
        loss = items.weight * (liked + self.undesirable_weight * (1 - label) * self.cost(-u))
        metrics = item_metrics(beta * g, label, scores, items)
        return LossOut(loss, metrics | detached(reference_point=(beta * q).reshape(1)))
