"""SePPO: dataset winners against images of an earlier checkpoint, taken for losers or for second winners by an anchor test.

Paper: "SePPO: Semi-Policy Preference Optimization for Diffusion Alignment", Zhang et al. 2024, arXiv 2410.05255. Code:
DwanZhang-AI/SePPO has scoring and inference only, no training; the formula is from summaries and public reviews
(second-hand).

Loss, per pair, delta = e - e_ref of the winner w and of the generated image r:
    -log sigma(-beta T omega [delta_w - s delta_r]), s = sign(e_ref(w) - e(w)), no gradient.
s = +1 where the policy already denoises the winner better than the reference: the generated image counts as losing. s = -1:
as a second winner, whose error goes down too; that is no Bradley-Terry likelihood. Here T omega is part of beta, and beta
multiplies log-ratios (minus one half of delta), as in Diffusion-DPO.

Not published, or not read: beta, learning rate, scheduler (so beta has no default); what sign(0) is (`on_zero`), which every
run meets at its first step; whether both images share their noise (UNVERIFIED; they do here). Ablation: an indicator instead
of the sign scores the same (21.56 against 21.57 PickScore); without either 20.88, below winners-only SFT (21.32). s rests on
a single (t, noise), so it is noisy.

The generated image comes from the reference itself; of the strategies studied (the initial model, the latest of seven
checkpoints saved every 30 updates, a uniformly random earlier one) the last is the proposed one. Draw it per step or epoch;
that is the sampler's and reference's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.losses.base import AnyLayout, LossOut, Needs, Sampling, Source, detached, needs
from diffalign.losses.diffusion._common import Directed, label_direction, one_of
from diffalign.losses.layouts import Layout, Pairs
from diffalign.losses.pairwise import LogisticPair
from diffalign.losses.scores import Cap, Kind, Scores


@dataclass(frozen=True, kw_only=True)
class SePPO(Directed, LogisticPair):
    """SePPO (Zhang et al. 2024, arXiv 2410.05255; no public training code).

    -log sigma(beta (rho_w - s rho_r)): w is a winner from the data, r an image that the reference generated for its prompt.
    s is +1 where the policy beats the reference on w, so that r counts as worse, and -1 where it does not, so that both are
    learnt. With s fixed to +1 it is Diffusion-DPO on generated losers (SPIN).

    Attributes:
        flip: "sign" as above; "indicator": 0 instead of -1, which leaves r out (published ablation, as good); "none": always
            +1.
        on_zero: of a policy that equals the reference, as in the first step: "keep": s = +1; "drop": s = 0, which starts
            like fine-tuning on winners. Not published.
    """

    flip: Literal["sign", "indicator", "none"] = "sign"
    on_zero: Literal["keep", "drop"] = "keep"

    name: ClassVar[str] = "seppo"
    title: ClassVar[str] = "SePPO"
    paper: ClassVar[str] = "2410.05255"
    composition: ClassVar[str] = "log-ratio -> beta (w - s l), s = +-1 by whether w beats the reference -> logistic"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.DIFFERENCE, Cap.ERROR))
    default_beta: ClassVar[Mapping[Kind, float]] = {}
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = (
        "no training code is public; beta, what sign(0) is, and whether winner and generated image share their noise"
    )
    instead: ClassVar[str] = "use 'dpo' on generated losers"
    source: ClassVar[Source] = "generated"
    sampling: ClassVar[Sampling] = Sampling(policy="reference")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "flip", ("sign", "indicator", "none"))
        one_of(self, "on_zero", ("keep", "drop"))

    def anchor(self, rho_w: Tensor) -> Tensor:
        """s per pair, (P,), without gradient.

        Args:
            rho_w: log-ratios of the winners, (P,): positive where the policy denoises them better than the reference.
        """
        if self.flip == "none":
            return torch.ones_like(rho_w.detach())
        s = rho_w.detach().sign()
        if self.on_zero == "keep":
            s = torch.where(s == 0, torch.ones_like(s), s)
        return s.clamp(min=0) if self.flip == "indicator" else s

    def direction(self, scores: Scores, pairs: Pairs) -> Tensor:
        rho_w = scores.log_ratio()[pairs.w]
        return self.anchor(rho_w).clamp(min=0) * label_direction(pairs, rho_w)

    def sides(self, scores: Scores, pairs: Pairs) -> tuple[Tensor, Tensor]:
        rho = scores.log_ratio()
        return rho[pairs.w], self.anchor(rho[pairs.w]) * rho[pairs.l]

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        out = super().__call__(scores, layout, stats)
        return LossOut(
            out.per_item,
            out.metrics | detached(anchor=self.anchor(scores.log_ratio()[Layout.of(layout).need_pairs().w])),
        )
