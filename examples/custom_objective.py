"""An objective of your own, in one file outside of the package: DPO with an anchor on the winner.

    diffalign train demo_dpo objective.name=examples/custom_objective.py objective.anchor=1.0

DPO only sees differences, so the scores of winner and loser often fall together. The anchor charges the winner wherever its
score is below the reference's:

    loss = -log sigma(z) + anchor * beta * max(0, ref_w - theta_w)

It is an example and no published method. The fields of the class are the keys of the `objective` section. Because it is a
function of scores, the same file works on images and on texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffalign.losses import DPO, Layout, LossOut, Scores
from diffalign.losses.base import AnyLayout


@dataclass(frozen=True, kw_only=True)
class AnchoredDPO(DPO):
    """DPO that charges for a winner that gets worse than under the reference.

    Attributes:
        anchor: weight of the charge, in units of the implicit reward that the winner has lost; 0 is DPO.
    """

    anchor: float = 1.0

    name: ClassVar[str] = "anchored_dpo"
    title: ClassVar[str] = "Anchored DPO"
    composition: ClassVar[str] = "DPO + anchor * beta * max(0, -rho_w)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anchor < 0:
            raise ValueError(f"anchor is {self.anchor}; expected a number >= 0")

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        out = super().__call__(scores, layout, stats)
        pairs = Layout.of(layout).need_pairs()
        lost = (-scores.log_ratio()[pairs.w]).relu()
        charge = self.anchor * self.beta_for(scores.kind) * lost
        return LossOut(out.per_item + charge, out.metrics | {"anchor": charge.detach()})
