"""DanceGRPO: GRPO on the steps of a stochastic sampler, of diffusion and flow models alike.

Paper: "DanceGRPO: Unleashing GRPO on Visual Generation", Xue et al. 2025, arXiv 2505.07818. Code:
XueZeyue/DanceGRPO:fastvideo/train_grpo_flux.py, train_grpo_sd.py.

Loss, per step: max(-A r, -A clip(r, 1 - c, 1 + c)), r of mean log-densities over the latent; A = (R - mean) / (std + 1e-8)
of the group with the unbiased deviation, limited to +-5. No divergence. Several rewards: MixGRPO (arXiv 2507.21802)
standardises each in its group and sums them with weights, without a second norm, which comes as `Groups.advantage`.

Differences: none in the loss. The sampler is Flow-GRPO's with a constant noise of 0.3; all images of a prompt start from
the same noise; the reward sees the last step's clean image; 60 % of the steps but the last are trained, drawn for every
image; with guidance one update per round. All of these are the rollout's.

Defaults: c 1e-4, 12 images of a prompt (FLUX), 16 (SD1.4); learning rate 1e-5 full, 3e-4 LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffalign.losses.advantages import Scale
from diffalign.losses.diffusion._transitions import Clipped


@dataclass(frozen=True, kw_only=True)
class DanceGRPO(Clipped):
    """DanceGRPO (Xue et al. 2025, arXiv 2505.07818; official code XueZeyue/DanceGRPO).

    Clipped ratio per denoising step times the advantage within the group: unbiased deviation + 1e-8. No divergence.
    """

    scale_rewards: Scale = "group"

    name: ClassVar[str] = "dance_grpo"
    title: ClassVar[str] = "DanceGRPO"
    paper: ClassVar[str] = "2505.07818"
    composition: ClassVar[str] = "ratio of a step -> group advantage -> clip at 1e-4 -> mean over steps"
    parity: ClassVar[str] = "XueZeyue/DanceGRPO fastvideo/train_grpo_flux.py (formula)"

    def options(self) -> dict[str, Any]:
        return super().options() | {"eps": 1e-8, "unbiased": True}
