"""Flow-GRPO: GRPO on the steps of a flow sampler that was made stochastic.

Paper: "Flow-GRPO: Training Flow Matching Models via Online RL", Liu et al. 2025, arXiv 2505.05470. Code:
yifan123/flow_grpo:scripts/train_sd3.py, train_sd3_fast.py, train_flux.py, flow_grpo/stat_tracking.py, config/grpo.py.

Loss, per step: max(-A r, -A clip(r, 1 - c, 1 + c)) + kl K, r the likelihood ratio to the policy that sampled, of mean
log-densities over the latent; A = (R - mean of the group) / (std of the whole round + 1e-4), limited to +-5, the same at
every step. Before the first update every r is 1.

Paper and code differ in K: the paper has the exact KL of two Gaussian steps, |mu - mu_ref|^2 / (2 S^2 |dt|); the SD3 script
divides by 2 S^2 alone, which is the exact KL times |dt| (`kl_form: code`, and the published coefficients are for that); the
FLUX script has the plain mean square. Both are means over the latent.

Flow-GRPO-Fast, the window of MixGRPO and CPS choose which steps are stochastic and trained (rows and masks, not this loss),
with c 1e-5 (CPS: of a score without 1 / (2 std^2), which a caller supplies as such; Wan 1e-3) and no K. With `global_std:
False` the code divides by the group's own deviation (`scale_rewards: group`), NumPy's. Groups whose rewards are all equal
are left out of the step there and count 0 here.

Defaults: c 1e-4, kl 0.04 (GenEval, OCR; PickScore 0.01, CLIP 0.02, Wan 0.004; Fast and FLUX 0). Not part of the loss:
SD3.5-M, 24 x 48 images, 10 steps of noise level 0.7, guidance 4.5 whose unconditional branch is detached in training
(`rollout.negative_gradient`), all steps but the last, LoRA learning rate 3e-4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign.losses.base import Needs, Sampling, needs
from diffalign.losses.diffusion._transitions import Clipped, KLForm
from diffalign.losses.group_objective import UNIT_CAPS


@dataclass(frozen=True, kw_only=True)
class FlowGRPO(Clipped):
    """Flow-GRPO (Liu et al. 2025, arXiv 2505.05470; official code yifan123/flow_grpo).

    Clipped ratio per denoising step times an advantage that is centred in the group and divided by the deviation of the
    whole round, and a divergence from the reference's steps. `extra["ref_shift"]` and `extra["dt"]` of every step are read
    with beta above 0.

    Attributes:
        beta: of the divergence; 0.04 (GenEval and OCR).
        kl_form: "code": the exact KL of two steps times dt, which the published coefficients are for; "exact" (paper):
            without dt; "eps": of noise predictions; "sampled": `kl_estimator` on log-densities.
    """

    beta: float = 0.04
    kl_form: KLForm = "code"

    name: ClassVar[str] = "flow_grpo"
    title: ClassVar[str] = "Flow-GRPO"
    paper: ClassVar[str] = "2505.05470"
    composition: ClassVar[str] = (
        "ratio of a step -> (reward - group) / std of the round -> clip at 1e-4 -> mean over steps"
    )
    needs: ClassVar[Needs] = needs("groups", caps=UNIT_CAPS, reference=False, extra=("ref_shift", "dt"))
    parity: ClassVar[str] = "yifan123/flow_grpo scripts/train_sd3.py (formula)"
    sampling: ClassVar[Sampling] = Sampling(negative_gradient=False, shared_start=False)
