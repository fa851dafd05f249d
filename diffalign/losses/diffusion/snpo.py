"""Diff-SNPO: DPO whose rejected side cannot earn more than a bounded reward, for one network with a negative branch.

Paper: "Diffusion NPO made simple" (ICLR 2026, OpenReview CU5EHe1KUt; arXiv id unknown). Its code was not available, and the
paper was read second-hand.

Idea: the branch with the prompt learns the preference, the branch without it the reversed one: of every pair with the share
p the prompt is dropped, and its images change places (`negative.train: empty_prompts` with
`denoising.proportion_empty_prompts` p). One adapter then serves both branches of guidance in any stock pipeline, at the cost
of one network. Plain DPO collapses on this, since it earns most by raising errors of rejected images without end. So the
rejected image's likelihood is replaced by that of a mixture with the reference,

    z = r_w - log(lambda e^{r_l} + 1 - lambda),   r = beta (score - reference's score),   loss = -log sigma(z)

which is Diffusion-DPO at lambda 1, starts at log 2 for every lambda, and gains at most -log(1 - lambda) from the rejected
image, 2.303 at 0.9. Two summaries print z with different signs; this is the one that becomes DPO.

UNVERIFIED: the scale at which errors enter the exponential (mean or sum, a weight of the timestep); here it is that of
beta, so that beta times the mean error over 2 is what the paper calls d.

Defaults: lambda 0.9 and beta 2000 (SD1.5; SDXL 5000), as reported; learning rate 2.048e-8, Pick-a-Pic v2, p the model's own
share of dropped prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.losses import links
from diffalign.losses.base import AnyLayout, BetaObjective, LossOut, Needs, needs
from diffalign.losses.diffusion._common import either_way
from diffalign.losses.layouts import Layout
from diffalign.losses.pairwise import pair_metrics
from diffalign.losses.scores import Kind, Scores


@dataclass(frozen=True, kw_only=True)
class SNPO(BetaObjective):
    """Diff-SNPO's bounded DPO ("Diffusion NPO made simple", ICLR 2026, OpenReview CU5EHe1KUt; arXiv id unknown; no code).

    -log sigma(r_w - log(share e^{r_l} + 1 - share)), r = beta (theta - ref): `dpo` at share 1. The rejected side stops
    pulling once r_l is far below log((1 - share) / share), so that errors of rejected images do not grow without end. Made
    for `negative.train: empty_prompts` or `flip`; it is a preference objective like any other without them.

    beta: 2000 on denoising errors (SD1.5; SDXL 5000), 0.1 on tokens (ours).

    Attributes:
        share: lambda, of the policy in the mixture with the reference; 0.9 (reported).
    """

    share: float = 0.9

    name: ClassVar[str] = "snpo"
    title: ClassVar[str] = "Diff-SNPO (bounded DPO)"
    composition: ClassVar[str] = "log-ratio -> beta; that of l mixed with the reference -> w - l -> logistic"
    needs: ClassVar[Needs] = needs("pairs")
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = "the scale at which errors enter the mixture"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 0.1, Kind.STEP: 0.1, Kind.BOUND: 2000.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; expected 0 < share <= 1")

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return math.log(2)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs, reward = Layout.of(layout).need_pairs(), self.beta_for(scores.kind) * scores.log_ratio()

        def bounded(r: Tensor) -> Tensor:
            """Of the mixture with the reference: at least log(1 - share)."""
            if self.share == 1:
                return r
            return torch.logaddexp(r + math.log(self.share), torch.full_like(r, math.log(1 - self.share)))

        def loss(win: Tensor, lose: Tensor, margin: Tensor | float) -> Tensor:
            return links.logistic(reward[win] - bounded(reward[lose]) - margin)

        w, l = reward[pairs.w], reward[pairs.l]
        return LossOut(pairs.weight * either_way(pairs, loss), pair_metrics(w - bounded(l), w, l, scores, pairs))
