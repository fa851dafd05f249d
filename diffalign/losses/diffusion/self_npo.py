"""Self-NPO: fine-tuning on a model's own truncated samples, for the negative branch of guidance.

Paper: "Self-NPO: Data-free diffusion model enhancement via truncated diffusion fine-tuning", arXiv 2505.11777 (AAAI 2026).
Code read: G-U-N/Diffusion-NPO:Self-NPO/train.py and train_xl.py.

A teacher denoises for some steps without noise and stops at x_t; the clean latents that it predicts there, x0*, are the
target. x_t is noised further, to x_s with s > t,

    x_s = (alpha_s / alpha_t) x_t + sqrt(sigma_s^2 - sigma_t^2 alpha_s^2 / alpha_t^2) n

and the network learns to come from x_s to x0* with the real prompt: the mean over elements of sqrt((x0^ - x0*)^2 + h^2) - h,
h = 0.001. No pairs, no rewards, no labels.

Paper and code differ. The paper calls itself data-free and speaks of the reference model's own samples; the code starts at
noised real images, at one of 25 levels (`start: data`), its teacher is an average of the student (`rollout.policy: lagged`
with `rollout.old_decay: 0.999`), and it guides the teacher *away* from the prompt: SD1.5 with weight -1, the prediction
without a prompt (`rollout.guidance_scale: 0`), SDXL with -5 (`rollout.guidance_scale: -4`). Defaults here are the paper's:
from noise, by the base, without guidance (1). How many steps a walk from noise takes is not known; here it is drawn from
1 to all but one, so that all levels are reached. Published: 25 sampler steps, 5 walked from data, 1000 optimiser steps, full
weights at 1e-6 (SDXL 1e-7); whether the average or the student is used is UNVERIFIED.

Use with `negative.train: plain`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from diffalign.losses.base import AnyLayout, LossOut, Needs, Objective, Sampling, Source, detached, needs
from diffalign.losses.diffusion._common import one_of, positive
from diffalign.losses.layouts import Layout
from diffalign.losses.scores import Cap, Scores


@dataclass(frozen=True, kw_only=True)
class SelfNPO(Objective):
    """Self-NPO (arXiv 2505.11777; official code G-U-N/Diffusion-NPO:Self-NPO).

    Regression of the clean latents on what the sampler predicted at a less noisy point of the same walk. The result is a
    slightly worse copy of the model that stays correlated with it: for the negative branch of guidance.

    Attributes:
        start: "noise": walks begin at pure noise, for prompts alone. "data": at noised images of the data (official code).
        steps: sampler steps of a walk from "data" (official code: 5).
        distance: "huber": pseudo-Huber, nearly the absolute difference (official launchers); "l2" (the script's default).
        huber: h of "huber", in units of the latents; 0.001.
    """

    start: Literal["noise", "data"] = "noise"
    steps: int = 5
    distance: Literal["huber", "l2"] = "huber"
    huber: float = 0.001

    name: ClassVar[str] = "self_npo"
    title: ClassVar[str] = "Self-NPO"
    paper: ClassVar[str] = "2505.11777"
    composition: ClassVar[str] = "residual of the clean latents -> pseudo-Huber"
    needs: ClassVar[Needs] = needs("items", caps=(Cap.RESIDUAL,), labels=(1,), reference=False, to_sample=True)
    parity: ClassVar[str] = "G-U-N/Diffusion-NPO Self-NPO/train.py (formula)"
    instead: ClassVar[str] = "it is made for the negative branch of a denoising model's guidance"
    source: ClassVar[Source] = "truncated"
    sampling: ClassVar[Sampling] = Sampling(policy="reference")

    def __post_init__(self) -> None:
        one_of(self, "start", ("noise", "data"))
        one_of(self, "distance", ("huber", "l2"))
        positive(self, "huber", "steps")

    @property
    def from_data(self) -> bool:
        return self.start == "data"

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        items = Layout.of(layout).need_items()
        if scores.to_sample is None:
            raise ValueError("self_npo reads to_sample: how much larger an error of the clean latents is")
        missed = scores.need_residual()[items.index].flatten(1) * scores.to_sample[items.index, None]
        each = missed.square()
        if self.distance == "huber":
            each = (each + self.huber**2).sqrt() - self.huber
        metrics = detached(distance=missed.abs().mean(1))
        return LossOut(items.weight * each.mean(1), metrics)
