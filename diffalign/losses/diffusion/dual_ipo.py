"""Dual-IPO: Diffusion-DPO on pairs of an improving critic, held by the denoising error of winners and of real videos.

Paper: "IPO: Iterative Preference Optimization for Text-to-Video Generation" (later Dual-IPO, ICLR 2026), Yang et al. 2025,
arXiv 2502.02088. Code: SAIS-FUXI/IPO has inference and weights only; formula second-hand. "IPO" here is not Identity-PO
(`ipo`).

Loss, per pair: -log sigma(z) + lambda_1 e_w + lambda_2 mean e(real), e the denoising error (v-prediction for CogVideoX; D
includes the frames). The point-wise form, Diffusion-KTO's loss with the same two terms, is not here: `diffusion_kto` has
neither. Nor are the loop of generating, labelling by a critic and training again, and the critic's own training.

The term of lambda_2 needs real videos as items beside the pairs, which no batch of a run has: only a caller of the core can
give them. So its weight is 0 by default, and a positive one without items is refused.

Not published, or not read: beta (no default), lambda_1 (1 here) and lambda_2 (0 here), the timestep sampler, whether pairs
share their noise. Note the scale: DPO's pull on an error is beta / 4 at the start, in the hundreds, so weights of 1 hardly
hold anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from diffalign.losses import reduce
from diffalign.losses.base import AnyLayout, LossOut, Needs, detached, needs
from diffalign.losses.diffusion._common import positive
from diffalign.losses.layouts import Layout
from diffalign.losses.pairwise import LogisticPair
from diffalign.losses.scores import Cap, Kind, Scores


@dataclass(frozen=True, kw_only=True)
class DualIPO(LogisticPair):
    """Dual-IPO for text-to-video (Yang et al. 2025, arXiv 2502.02088; no public training code). Not `ipo`.

    `dpo` + winner_weight e_w + real_weight mean e of real videos, which are the layout's items (all, or those labelled 1);
    their mean is over the micro-batch. Without both weights it is `dpo`. Soft labels and margins act on the first term,
    weights of pairs on the first two.

    Attributes:
        winner_weight: lambda_1; not published.
        real_weight: lambda_2; not published. 0: training runs have no batches with real videos beside pairs, and a positive
            weight without them is refused.
    """

    winner_weight: float = 1.0
    real_weight: float = 0.0

    name: ClassVar[str] = "dual_ipo"
    title: ClassVar[str] = "Dual-IPO (text-to-video)"
    paper: ClassVar[str] = "2502.02088"
    composition: ClassVar[str] = "log-ratio -> beta (w - l) -> logistic + error of w + error of real items"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.DIFFERENCE, Cap.ERROR, Cap.IMITATION))
    default_beta: ClassVar[Mapping[Kind, float]] = {}
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = "no training code is public; beta, both weights and the timestep sampler"
    instead: ClassVar[str] = "use 'rpo', DPO with imitation of the chosen"
    aliases: ClassVar[Mapping[str, str]] = {
        "beta_dpo": "beta",
        "lambda_1": "winner_weight",
        "lambda_2": "real_weight",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "winner_weight", "real_weight", zero=True)

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return None if self.winner_weight or self.real_weight else super().initial_loss(kind)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        layout = Layout.of(layout)
        pairs, out = layout.need_pairs(), super().__call__(scores, layout, stats)
        imitation = reduce.imitation(scores, pairs.w)
        loss, metrics = out.per_item + self.winner_weight * pairs.weight * imitation, detached(imitation=imitation)
        if self.real_weight:
            if layout.items is None:
                raise ValueError(
                    f"real_weight is {self.real_weight:g}, but this batch has no real videos (items beside its pairs), and "
                    "training runs have none; set objective.real_weight: 0"
                )
            items = layout.items
            use = 1.0 if items.label is None else (items.label > 0.5).to(imitation.dtype)
            real = use * items.weight * scores.need_imitation()[items.index]
            number = len(items) if items.label is None else (items.label > 0.5).sum().clamp(min=1)
            loss = loss + self.real_weight * real.sum() / number
            metrics |= detached(error__real=real)
        return LossOut(loss, out.metrics | metrics)
