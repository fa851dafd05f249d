"""DRTune: deep reward tuning, early steps are trained without back-propagation through the network's input.

Paper: "Deep Reward Supervisions for Tuning Text-to-Image Diffusion Models", Wu et al. 2024 (ECCV), arXiv 2405.00760. Read
through the port RuoyuWang-2077/FlowBP:flowbp/trainers/sd35/drtune.py; the paper's own number of trained steps and range of
the stop are UNVERIFIED.

K evenly spaced steps are trained. The network sees detached latents everywhere, so that the gradient is a sum over trained
steps of first-order terms: dR/dtheta = sum_i dx/dv_i dR/dx0^ dv_i/dtheta, without products of the network's Jacobians; the
latents themselves are accumulated with their gradient. The sampler stops early, and the reward sees the clean latents that
the prediction there implies. With S steps:

    stop   = S - u,  u uniform on 1 ... round(0.4 S)           the last step whose prediction is taken
    stride = (stop + 1) // K,  start uniform on 0 ... stride - 1
    trained steps: start, start + stride, ..., K of them

Loss: -R (the port: max(0, 0.55 - R) with HPSv2.1, gradient through the branch with the prompt alone).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from diffalign.losses.diffusion.walks import Backprop, Chain, End


@dataclass(frozen=True, kw_only=True)
class DRTune(Backprop):
    """DRTune (Wu et al. 2024, arXiv 2405.00760; read through the port in RuoyuWang-2077/FlowBP).

    Evenly spaced steps with detached inputs, so that early steps are trained without long chains of Jacobians; see the top
    of the file. The reward must be differentiable.

    Attributes:
        trained: K, 3 (port).
        early_stop: largest share of the steps that are left out at the end, 0.4 (port); 0 takes all of them.
    """

    trained: int = 3
    early_stop: float = 0.4

    name: ClassVar[str] = "drtune"
    title: ClassVar[str] = "DRTune"
    paper: ClassVar[str] = "2405.00760"
    composition: ClassVar[str] = (
        "sampler with detached inputs, some steps trained -> reward of an early predicted clean image -> minus it"
    )
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = "the paper's own number of trained steps and range of the stop"
    parity: ClassVar[str] = "RuoyuWang-2077/FlowBP flowbp/trainers/sd35/drtune.py (formula)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trained < 1:
            raise ValueError(f"trained is {self.trained}; expected at least 1 step")
        if not 0 <= self.early_stop < 1:
            raise ValueError(f"early_stop is {self.early_stop}; expected a share, 0 <= early_stop < 1")

    def check_steps(self, steps: int) -> None:
        shortest = steps - max(1, round(self.early_stop * steps)) + 1
        if shortest < self.trained:
            raise ValueError(
                f"trained is {self.trained}; with early_stop {self.early_stop} a walk may have {shortest} of the sampler's "
                f"{steps} steps"
            )

    def plan(self, steps: int, generator: torch.Generator) -> tuple[int, list[int]]:
        """The step at which it stops, and the steps that are trained."""
        left_out = int(torch.randint(1, max(1, round(self.early_stop * steps)) + 1, (), generator=generator))
        stop = steps - left_out
        stride = (stop + 1) // self.trained
        start = int(torch.randint(0, stride, (), generator=generator))
        return stop, [start + i * stride for i in range(self.trained)]

    def walk(self, chain: Chain) -> Sequence[End]:
        stop, trained = self.plan(len(chain), chain.generator)
        x = chain.start
        for step in range(stop):
            output = chain.predict(x.detach(), chain.level(step), gradient=step in trained)
            x = chain.advance(x, output, step)
        level = chain.level(stop)
        output = chain.predict(x.detach(), level, gradient=stop in trained)
        return [End(chain.clean(x, output, level))]

    def trained_steps(self, steps: int) -> int:
        return self.trained
