"""An objective of your own, in one file outside of the package: Diffusion-DPO with an anchor on the winner's error.

    diffalign train demo_dpo objective.name=examples/custom_objective.py objective.anchor=1.0

Diffusion-DPO only sees differences, so the errors of winner and loser often rise together. The anchor charges the
winner's error wherever it is above the reference's:

    loss = -log sigma(z) + anchor * (beta / 2) * max(0, e_policy(w) - e_ref(w))

It is an example and no published method. The fields of the class are the keys of the `objective` section.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from diffalign import losses
from diffalign.data.batch import PairBatch
from diffalign.objectives import LossOutput, Objective, pair_metrics
from diffalign.policy import Policy


@dataclass(frozen=True, kw_only=True)
class AnchoredDPO(Objective):
    """Diffusion-DPO that charges for a winner that gets worse than under the reference.

    Attributes:
        beta_dpo: as in Diffusion-DPO, for mean squared errors.
        anchor: weight of the charge, in units of the implicit reward that the winner has lost; 0 is Diffusion-DPO.
    """

    beta_dpo: float = 5000.0
    anchor: float = 1.0

    title: ClassVar[str] = "Anchored Diffusion-DPO"
    layout: ClassVar = "pairs"
    uses_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anchor < 0:
            raise ValueError(f"anchor is {self.anchor}; expected a number >= 0")

    def initial_loss(self) -> float:
        return math.log(2)  # at policy == reference the anchor is 0

    def summary(self, latent_elements: int | None = None) -> dict[str, float | str]:
        return {"beta_dpo": self.beta_dpo, "anchor": self.anchor, "error_reduction": "mean", "error_factor": 0.5}

    def __call__(self, policy: Policy, batch: PairBatch) -> LossOutput:
        # One forward for both images, winners first, with the same timestep and the same noise.
        error, reference = policy.errors(*batch.stacked())
        assert reference is not None, "policy.errors computes the reference unless told otherwise"
        error_w, error_l = error.chunk(2)
        ref_w, ref_l = reference.chunk(2)
        out = losses.dpo(-0.5 * error_w, -0.5 * error_l, -0.5 * ref_w, -0.5 * ref_l, beta=self.beta_dpo, p=batch.p)
        charge = self.anchor * self.beta_dpo / 2 * (error_w - ref_w).relu()
        metrics = pair_metrics(out, error, reference) | {"anchor": charge.detach()}
        return LossOutput(out.loss + charge, metrics)
