"""Supervised fine-tuning on the winners: the plain denoising loss, without a reference and without the losers.

It is the baseline that every preference method is compared with, and the usual start of some of them on SD1.5. As in the
`--sft` mode of SalesforceAIResearch/DiffusionDPO:train.py and Diffusion-DPO's S6 (arXiv 2311.12908: it helps SD1.5 and not
SDXL). Its gradients are about beta / 4 times smaller than Diffusion-DPO's; Adam hides that, other optimisers do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffalign.objectives import LossOutput, Objective

if TYPE_CHECKING:
    from diffalign.data.batch import PairBatch
    from diffalign.policy import Policy


@dataclass(frozen=True, kw_only=True)
class SFT(Objective):
    """Denoising loss on chosen images."""

    title: ClassVar[str] = "SFT on winners"
    layout: ClassVar = "winners"
    uses_reference: ClassVar[bool] = False

    def __call__(self, policy: Policy, batch: PairBatch) -> LossOutput:
        error, _ = policy.errors(
            batch.chosen,
            batch.noise,
            batch.t,
            batch.chosen_conditioning,
            space=self.error_space,
            reduction=self.error_reduction,
            reference=False,
        )
        return LossOutput(error, {"error/chosen": error.detach()})
