"""SRPO: semantic relative preference optimisation, rewards relative to a control word on directly aligned images.

Paper: "Directly Aligning the Full Diffusion Trajectory with Fine-Grained Human Preference", Shen et al. 2025, arXiv
2509.06942. Code: Tencent-Hunyuan/SRPO:fastvideo/SRPO.py, scripts/finetune/SRPO_training_hpsv2.sh.

The image is sampled without gradient from known noise n. With two levels a (noisier) and b, the network takes one step
between latents that are known exactly, and the clean image is recovered with the known noise, not the predicted one:

    denoise:  x_a = alpha_a x0 + sigma_a n, step down to x_b,  x0' = (x_b - sigma_b n) / alpha_b
    invert:   x_b = alpha_b x0 + sigma_b n, step up to x_a,    x0' = (x_a - sigma_a n) / alpha_a

Reward: (1 + k) R(x0', "<word+>. prompt") - R(x0', "<word->. prompt"); for rewards linear in the caption's feature (CLIP
types) this is the paper's reward of the feature (1 + k) f+ - f-. The inversion's step has the opposite sign, so raising its
score pushes the other way: there the two captions are swapped, which makes it the penalty. Loss: max(0, 0.7 - R) of each
branch, the mean over both (code: one half of the sum).

Levels: a middle slot drawn uniformly from 5 ... 995 of 1000 slots between 0.9 and 0.5 of the training schedule (entries 5 to
25 of 50 shifted levels), a and b 50 slots to both sides, cut at the ends. k falls with the noise: 0.1 to 0.25 over the slots
(denoise), 0.3 to 0.01 (invert). Words rotate with the step.

Differences: one guidance for sampling and training (the code samples FLUX with embedded guidance 1 and trains with 3.5). Its
sampler is deterministic whatever its arguments say. HPSv2.1 counts as its cosine, without the logit scale. The words are
made for HPS; another reward needs its own.

Defaults not part of the loss: 25 steps, full fine-tuning at 5e-6, max norm 0.1, 32 images a step; useful for some ten steps
(issue 22 of the code): save often and stop early.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.losses.diffusion.walks import PROMPT, Backprop, Chain, End, Level, roll

SLOTS = 1000
MARGIN = 5  # slots at both ends that are no middle
HALF = 50  # slots from the middle to a and to b
NOISIEST, CLEANEST = 0.9, 0.5  # shares of the training schedule
DENOISE, INVERT = (0.1, 0.25), (0.3, 0.01)  # k at the first and at the last slot


@dataclass(frozen=True, kw_only=True)
class SRPO(Backprop):
    """SRPO with Direct-Align (Shen et al. 2025, arXiv 2509.06942; official code Tencent-Hunyuan/SRPO).

    One step between known noisy latents, rewards under a wanted against those under an unwanted control word; see the top of
    the file. The reward must be differentiable and should be linear in the caption's feature.

    Attributes:
        positive, negative: control words, one drawn with every step; both lists have the same length, or one entry.
        caption: a control word before the prompt, with both in braces.
        inversion: the branch that penalises; without it the method is prone to hacking (maintainers).
        link: "hinge" (code).
        target: 0.7, of HPSv2.1 (code).
    """

    positive: tuple[str, ...] = ("Realistic photo",)
    negative: tuple[str, ...] = ("CG Render",)
    caption: str = "{word}. {prompt}"
    inversion: bool = True
    link: Literal["linear", "hinge", "distance"] = "hinge"
    target: float | None = 0.7

    name: ClassVar[str] = "srpo"
    title: ClassVar[str] = "SRPO"
    paper: ClassVar[str] = "2509.06942"
    composition: ClassVar[str] = (
        "one step between known noisy latents, down and up -> reward relative to a control word -> hinge at a target"
    )
    parity: ClassVar[str] = "Tencent-Hunyuan/SRPO fastvideo/SRPO.py (formula)"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("positive", "negative"):
            words = getattr(self, name)
            object.__setattr__(self, name, (words,) if isinstance(words, str) else tuple(words))
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; expected at least one control word")
        if "{word}" not in self.caption or PROMPT not in self.caption:
            raise ValueError(f"caption is {self.caption!r}; expected both {{word}} and {PROMPT} in it")

    def captions(self, slot: int, words: tuple[str, str], ends: tuple[float, float]) -> tuple[tuple[float, str], ...]:
        """(1 + k) of the first word's caption, minus that of the second."""
        k = ends[0] + (ends[1] - ends[0]) * slot / (SLOTS - 1)
        good, bad = (self.caption.replace("{word}", word) for word in words)
        return (1 + k, good), (-1.0, bad)

    def walk(self, chain: Chain) -> Sequence[End]:
        generator = chain.generator
        slot = int(torch.randint(MARGIN, SLOTS - MARGIN + 1, (), generator=generator))
        word = int(torch.randint(0, max(len(self.positive), len(self.negative)), (), generator=generator))
        good, bad = self.positive[word % len(self.positive)], self.negative[word % len(self.negative)]
        x0 = roll(chain, chain.start, 0, len(chain)).detach()
        a, b = (chain.at(share(slot + side)) for side in (-HALF, HALF))
        ends = [End(self.recovered(chain, x0, a, b), self.captions(slot, (good, bad), DENOISE))]
        if self.inversion:
            ends.append(End(self.recovered(chain, x0, b, a), self.captions(slot, (bad, good), INVERT)))
        return ends

    def recovered(self, chain: Chain, x0: Tensor, level: Level, to: Level) -> Tensor:
        """The clean latents after one step from a level to another, by the known noise."""
        noise = chain.start
        x = chain.noised(x0, level, noise)
        moved = chain.move(x, chain.predict(x, level, gradient=True), level, to)
        return (moved - to.sigma * noise) / to.alpha

    def trained_steps(self, steps: int) -> int:
        return self.ends()

    def plain_steps(self, steps: int) -> int:
        return steps

    def ends(self) -> int:
        return 2 if self.inversion else 1


def share(slot: int) -> float:
    """Of the training schedule, at a slot from the noisiest (0) to the cleanest."""
    return NOISIEST + (CLEANEST - NOISIEST) * min(max(slot, 0), SLOTS - 1) / (SLOTS - 1)
