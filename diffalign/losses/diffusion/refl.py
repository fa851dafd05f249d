"""ReFL: reward feedback learning, the gradient of one step late in the sampler, through its prediction of the clean image.

Paper: "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", Xu et al. 2023 (NeurIPS), arXiv
2304.05977. Code: THUDM/ImageReward:ImageReward/ReFL.py, ReFL_SDXL.

Loss: scale * mean(max(0, 2 - R)), scale 1e-3, R the ImageReward of the clean latents that the network predicts at one step,
drawn uniformly from steps 30 to 39 of 40; the steps before it have no gradient, those after it are not taken. No guidance.

Differences: the paper alternates this loss with the pre-training loss on images; the public SD1.4 script leaves it out, the
SDXL script takes separate steps. Here it is left out; a rehearsal of other data is `composite`'s business. The code's
scheduler is stochastic (DDPM): rollout.eta 1. The draw is for an optimiser step, in the code for every process.

Defaults not part of the loss: full UNet at 1e-5, 64 images a step, 100 steps (SD1.4); LoRA rank 4 at 1e-4 (SDXL).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from diffalign.losses.diffusion.walks import Backprop, Chain, End, roll


@dataclass(frozen=True, kw_only=True)
class ReFL(Backprop):
    """ReFL (Xu et al. 2023, arXiv 2304.05977; official code THUDM/ImageReward).

    The reward of the clean image that one late step predicts, with gradient through that step alone; nothing is learnt from
    images whose reward is above the target. The reward must be differentiable.

    Attributes:
        first_step: the earliest step that may be drawn; null: three quarters of them, 30 of 40 (code).
        link: "hinge" (code).
        target: 2, of ImageReward (code); other rewards need their own.
        loss_scale: 1e-3 (code).
    """

    first_step: int | None = None
    link: Literal["linear", "hinge", "distance"] = "hinge"
    target: float | None = 2.0
    loss_scale: float = 1e-3

    name: ClassVar[str] = "refl"
    title: ClassVar[str] = "ReFL"
    paper: ClassVar[str] = "2304.05977"
    composition: ClassVar[str] = (
        "sampler to a random late step -> reward of its predicted clean image -> hinge at a target"
    )
    parity: ClassVar[str] = "THUDM/ImageReward ImageReward/ReFL.py (formula)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first_step is not None and self.first_step < 0:
            raise ValueError(f"first_step is {self.first_step}; expected 0 or more, or null")

    def earliest(self, steps: int) -> int:
        """The first step that may be drawn."""
        return min(math.ceil(0.75 * steps), steps - 1) if self.first_step is None else self.first_step

    def check_steps(self, steps: int) -> None:
        if self.earliest(steps) >= steps:
            raise ValueError(f"first_step is {self.earliest(steps)}; the sampler's steps are 0 to {steps - 1}")

    def walk(self, chain: Chain) -> Sequence[End]:
        drawn = int(torch.randint(self.earliest(len(chain)), len(chain), (), generator=chain.generator))
        x, level = roll(chain, chain.start, 0, drawn), chain.level(drawn)
        return [End(chain.clean(x, chain.predict(x, level, gradient=True), level))]

    def trained_steps(self, steps: int) -> int:
        return 1
