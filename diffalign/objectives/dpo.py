"""Diffusion-DPO: the winner's denoising error down and the loser's up, both relative to a frozen reference.

Paper: Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization", arXiv 2311.12908, eq. 14 with
the shared noise of its supplement S4. Official code: SalesforceAIResearch/DiffusionDPO:train.py; LoRA port:
huggingface/diffusers:examples/research_projects/diffusion_dpo/train_diffusion_dpo_sdxl.py.

    z = -(beta / 2) [(e_policy(w) - e_policy(l)) - (e_ref(w) - e_ref(l))],   loss = -log sigma(z)

with e the *mean* squared error over the latent. That is text DPO on the score -e/2.

Paper and code differ, and here the code is followed: the paper's pseudo-code takes the squared norm (a sum) without the
1/2, which at the published beta would be about 1e5 times larger; eq. 14 draws separate noise for winner and loser, the
released models come from shared noise; the official reference branch stays in half precision, here errors are float32. The
diffusers SD1.5 script leaves out the 1/2 and halves the default beta to 2500, which is the same numbers. Ties are dropped
or trained with p = 1/2 (the diffusers scripts train them as wins of image 0).

Defaults: beta 5000 (launchers; the paper's main SD1.5 result uses 2000). Needs pairs and a reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from diffalign import losses
from diffalign.objectives import LossOutput, Objective, pair_metrics

if TYPE_CHECKING:
    from diffalign.data.batch import PairBatch
    from diffalign.policy import Policy


@dataclass(frozen=True, kw_only=True)
class DPO(Objective):
    """Diffusion-DPO and its links.

    Attributes:
        beta_dpo: strength of the pull to the reference, in units of the mean squared error's inverse; larger stays closer.
        loss_type: "sigmoid", "robust", "hinge" or "ipo" (see `diffalign.losses.dpo`).
        label_smoothing: conservative smoothing, sigmoid only.
        label_noise: assumed rate of flipped labels, "robust" only.
        ipo_scale: "unit", or "paper" (divides by beta^2, which vanishes at beta in the thousands).
    """

    beta_dpo: float = 5000.0
    loss_type: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    label_noise: float = 0.0
    ipo_scale: Literal["unit", "paper"] = "unit"

    title: ClassVar[str] = "Diffusion-DPO"
    layout: ClassVar = "pairs"
    uses_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta_dpo <= 0:
            raise ValueError(
                f"beta_dpo is {self.beta_dpo}; expected a positive number, published values are 2000 to 5000"
            )
        # The loss core knows which rates go with which link: let it refuse now, not at the first step.
        zero = torch.zeros(1)
        losses.dpo(zero, zero, zero, zero, beta=1.0, **self._link())

    def _link(self) -> dict[str, Any]:
        return {
            "loss_type": self.loss_type,
            "label_smoothing": self.label_smoothing,
            "label_noise": self.label_noise,
            "ipo_scale": self.ipo_scale,
        }

    def initial_loss(self) -> float | None:
        square = 0.25 if self.ipo_scale == "unit" else 0.25 / self.beta_dpo**2
        return {"sigmoid": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": square}[self.loss_type]

    def summary(self, latent_elements: int | None = None) -> dict[str, float | str]:
        numbers: dict[str, float | str] = {
            "beta_dpo": self.beta_dpo,
            "error_reduction": self.error_reduction,
            "error_factor": 0.5,
            "error_space": self.error_space,
            "beta_without_half": self.beta_dpo / 2,
        }
        if latent_elements:
            scale = 1 / (2 * latent_elements) if self.error_reduction == "mean" else 0.5
            numbers["beta_on_summed_error"] = self.beta_dpo * scale
        return numbers

    def __call__(self, policy: Policy, batch: PairBatch) -> LossOutput:
        # One concatenated forward, winners first; the pair shares its timestep and its noise.
        error, reference_error = policy.errors(*batch.stacked(), space=self.error_space, reduction=self.error_reduction)
        assert reference_error is not None, "DPO asked for the reference"
        error_w, error_l = error.chunk(2)
        ref_w, ref_l = reference_error.chunk(2)
        # The score of a denoising model is minus one half of its error.
        out = losses.dpo(
            -0.5 * error_w, -0.5 * error_l, -0.5 * ref_w, -0.5 * ref_l, beta=self.beta_dpo, p=batch.p, **self._link()
        )
        return LossOutput(out.loss, pair_metrics(out, error, reference_error))
