"""DSPO: direct score preference optimisation, the denoising target shifted by what separates policy and reference.

Paper: "DSPO: Direct Score Preference Optimization for Diffusion Model Alignment", Zhu et al. 2025 (ICLR, OpenReview
xyfb9HHvMe; no arXiv id seen). Code: huaishengzhu/DSPO:train.py, launchers.

The code has two losses under one name, with z Diffusion-DPO's logit:
- "residual" (its SD1.5 branch): u = (f(w) - y) - beta (1 - sigma(z)) (f(w) - f_ref(w)), loss the mean of u^2 over the
  elements. Close to the paper's idea: match the score of p(x) p(preferred | x), the second factor from DPO's implicit
  reward. Nothing but f_ref is detached, so gradients also reach the losing image through sigma(z); `detach` cuts that. beta
  is the weight of the shift *and* DPO's beta; `shift` separates them.
- "link" (its SDXL branch): sigma(-z)^2 times the mean of (f(w) - f_ref(w))^2 where the batch's mean of that is at least 0.1,
  and sigma(-z)^2 alone below: the target of denoising is gone. The second case is a squared-sigmoid link.

The paper's equation was not read in full (UNVERIFIED constants); the code is followed. Defaults: residual beta 0.001 (the
code lists 0.001, 0.01, 0.05), link beta 5000 (1000 to 5000). At 0.001 the residual form differs from fine-tuning on the
winners by a factor of 1 - 0.0005 on the shift: within noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.losses.base import AnyLayout, BetaObjective, LossOut, Needs, detached, needs
from diffalign.losses.diffusion._common import either_way, one_of, pair_mean, positive
from diffalign.losses.layouts import Layout
from diffalign.losses.pairwise import pair_metrics
from diffalign.losses.scores import Cap, Kind, Scores


@dataclass(frozen=True, kw_only=True)
class DSPO(BetaObjective):
    """DSPO (Zhu et al. 2025, ICLR, OpenReview xyfb9HHvMe; arXiv id unknown; official code huaishengzhu/DSPO:train.py).

    "residual": mean of [(f_w - y) - beta (1 - sigma(z)) (f_w - f_ref_w)]^2, denoising towards a target shifted to where the
    policy has moved from the reference. "link": sigma(-z)^2, times the mean of (f_w - f_ref_w)^2 once that mean over the
    batch reaches 0.1. z is that of `dpo`. They are two branches of one script, SD1.5 and SDXL, and different losses.

    beta: 0.001 for "residual", 5000 for "link" (official launchers). At 0.001 it is fine-tuning on winners to four digits.

    Attributes:
        form: "residual" or "link".
        shift: weight of the shift in "residual"; None takes beta, as published.
        detach: cut the gradient through sigma(z) in "residual"; the official code does not.
        gate: of "link"; 0.1 (official).
    """

    form: Literal["residual", "link"] = "residual"
    shift: float | None = None
    detach: bool = False
    gate: float = 0.1

    name: ClassVar[str] = "dspo"
    title: ClassVar[str] = "DSPO"
    composition: ClassVar[str] = "log-ratio -> beta (w - l) -> shift of the denoising target of w, or squared sigmoid"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.DIFFERENCE, Cap.RESIDUAL))
    parity: ClassVar[str] = "huaishengzhu/DSPO train.py (formula)"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.BOUND: 0.001}
    instead: ClassVar[str] = "use 'dpo'"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "form", ("residual", "link"))
        positive(self, "gate", zero=True)
        if self.detach and self.form == "link":
            raise ValueError("detach leaves form 'link' without any gradient; use it with 'residual'")

    def beta_for(self, kind: Kind) -> float:
        return 5000.0 if self.beta is None and self.form == "link" and kind is Kind.BOUND else super().beta_for(kind)

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return 0.25 if self.form == "link" and self.gate > 0 else None  # else the winner's error

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs, beta, rho = Layout.of(layout).need_pairs(), self.beta_for(scores.kind), scores.log_ratio()
        error = scores.need_residual().flatten(1)
        moved = error - scores.need_ref_residual().flatten(1)  # f - f_ref: both have the same target
        weight = beta if self.shift is None else self.shift

        def loss(win: Tensor, lose: Tensor, margin: Tensor | float) -> Tensor:
            miss = (-(beta * (rho[win] - rho[lose]) - margin)).sigmoid()  # 1 - sigma(z)
            if self.form == "residual":
                miss = miss.detach() if self.detach else miss
                return (error[win] - weight * miss[:, None] * moved[win]).square().mean(1)
            distance = moved[win].square().mean(1)
            far = pair_mean(distance.detach()) >= self.gate
            return miss.square() * torch.where(far, distance, torch.ones_like(distance))

        w, l = beta * rho[pairs.w], beta * rho[pairs.l]
        metrics = pair_metrics(w - l, w, l, scores, pairs)
        distance = moved[pairs.w].square().mean(1)
        return LossOut(pairs.weight * either_way(pairs, loss), metrics | detached(distance=distance))
