"""Diffusion-DRO: expert images ranked above the policy's own latents by a hinge on denoising errors.

Paper: "Ranking-based Preference Optimization for Diffusion Models from Implicit User Feedback", Wu et al. 2025 (NeurIPS),
arXiv 2510.18353 (algorithm 1, eq. 12 to 15). Code: basiclab/DiffusionDRO:train.py, misc/buffer.py, misc/dataset.py.

Loss, per pair: max(d + m, 0), d = [e(E) - e_ref(E)] - [e(P) - e_ref(P)], m = 0.001. E is an expert image with fresh noise as
its target; P a latent *on a lagged policy's own trajectory* for the same prompt and timestep, its target that policy's
prediction. The reference's errors carry no gradient and only decide which pairs are still unsatisfied.

Paper and code differ: the paper writes max(m, d) with a threshold m, the code max(d + m, 0): the same but for a constant if
one's m is minus the other's. `form` has both; the code's is the default, and the paper's takes m = -0.001, the code's 0.001.
With a positive m the paper's form never starts: an untouched adapter has d = 0 in every pair, below m, so no gradient, so it
stays untouched. Positive ones are refused there, and at d = m the gradient counts as that of d, so that m = 0 starts. With a
softplus instead of the hinge, and noise as the target of P, it is a DPO-style loss: use `dpo` on such rows.

Consequences: d = 0 and loss m (paper's form: 0) at the start; where the lagged policy still equals the trained one, e(P) = 0
without gradient, so the first updates are fine-tuning on experts behind the gate, and the negative term acts only through
the lag. d <= -m: nothing.

Not part of the loss: experts are the top 500 of Pick-a-Pic by HPSv2 (do not evaluate with that scorer), a replay buffer of
4, the lagged copy refreshed every 16 micro-steps, jittered timesteps. The code's gradient clipping does nothing (its list of
parameters is used up).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import relu

from diffalign.losses.base import AnyLayout, LossOut, Needs, Objective, Source, detached, needs
from diffalign.losses.diffusion._common import either_way, one_of
from diffalign.losses.layouts import Layout
from diffalign.losses.pairwise import pair_metrics
from diffalign.losses.scores import Cap, Kind, Scores

OFFICIAL = 0.001  # margin of the code


@dataclass(frozen=True, kw_only=True)
class DiffusionDRO(Objective):
    """Diffusion-DRO (Wu et al. 2025, arXiv 2510.18353; official code basiclab/DiffusionDRO).

    max(d + m, 0), d = (e_w - e_w_ref) - (e_l - e_l_ref): w is an expert image, l a latent of the policy's own trajectory
    with a lagged policy's prediction as its target. There is no beta: errors are compared as they are, and a pair that is
    ahead by m stops. The reference only gates. On stored losers instead of trajectories it is a hinge with a tiny margin.

    Attributes:
        margin: m. None is 0.001 for "code" (official), which takes positive ones, and the same threshold, -0.001, for
            "paper", which takes none above 0: an untouched adapter would never get a gradient.
        form: "code": max(d + m, 0). "paper": max(m, d), whose gradient is that of the code's form at -m.
    """

    margin: float | None = None
    form: Literal["code", "paper"] = "code"

    name: ClassVar[str] = "dro"
    title: ClassVar[str] = "Diffusion-DRO"
    paper: ClassVar[str] = "2510.18353"
    composition: ClassVar[str] = "difference of errors -> w - l -> hinge at a small margin"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.DIFFERENCE, Cap.ERROR))
    parity: ClassVar[str] = "basiclab/DiffusionDRO train.py (formula)"
    instead: ClassVar[str] = "use 'hinge', whose margin is in units of beta times log-ratios"
    source: ClassVar[Source] = "on_policy"

    def __post_init__(self) -> None:
        one_of(self, "form", ("code", "paper"))
        if self.form == "code" and self.m <= 0:
            raise ValueError(f"margin is {self.m}; expected a positive number with form 'code'")
        if self.form == "paper" and self.m > 0:
            raise ValueError(
                f"margin is {self.m}; expected 0 or less with form 'paper': above 0 an untouched adapter has no gradient"
            )

    @property
    def m(self) -> float:
        """The margin in use."""
        return self.margin if self.margin is not None else OFFICIAL if self.form == "code" else -OFFICIAL

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return self.m if self.form == "code" else 0.0

    def summary(self) -> dict[str, float | str]:
        return super().summary() | {"margin": self.m}

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs, gain = Layout.of(layout).need_pairs(), 2 * scores.log_ratio()  # e_ref - e

        def loss(win: Tensor, lose: Tensor, margin: Tensor | float) -> Tensor:
            d = gain[lose] - gain[win] + margin
            if self.form == "code":
                return relu(d + self.m)
            return torch.where(d >= self.m, d, torch.full_like(d, self.m) + 0 * d)

        w, l = gain[pairs.w], gain[pairs.l]
        d = l - w + pairs.margin
        unsatisfied = (d > -self.m if self.form == "code" else d >= self.m).to(w.dtype)
        metrics = pair_metrics(w - l, w, l, scores, pairs)
        return LossOut(pairs.weight * either_way(pairs, loss), metrics | detached(unsatisfied=unsatisfied))
