"""DRaFT: direct reward fine-tuning by the gradient through all steps of the sampler, the last K, or the last alone.

Paper: "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", Clark et al. 2023 (ICLR 2024), arXiv 2309.17400. No
official code.

Loss: -R of the sampler's last latents (DRaFT), with gradient through the last K steps (DRaFT-K; before them nothing is
trained and the latents carry no gradient). DRaFT-LV (low variance) trains the last step alone and averages: the clean
latents are noised again to the last step's level, n times, and one step is taken from each copy; the reward is the mean over
the first image and its copies.

Constants: 50 DDIM steps, guidance 7.5, n = 2 (paper). Rank and learning rate are UNVERIFIED; a community port uses 8 and
1e-4. At use, a LoRA scale between 0 and 1 trades the reward against the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffalign.losses.diffusion.walks import Backprop, Chain, End, roll


@dataclass(frozen=True, kw_only=True)
class DRaFT(Backprop):
    """DRaFT and DRaFT-K (Clark et al. 2023, arXiv 2309.17400; no official code).

    The reward's gradient through the last K steps of the sampler. The reward must be differentiable.

    Attributes:
        last_steps: K; null trains all steps.
    """

    last_steps: int | None = None

    name: ClassVar[str] = "draft"
    title: ClassVar[str] = "DRaFT"
    paper: ClassVar[str] = "2309.17400"
    composition: ClassVar[str] = (
        "sampler with gradient through its last steps -> reward of the last latents -> minus it"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last_steps is not None and self.last_steps < 1:
            raise ValueError(f"last_steps is {self.last_steps}; expected at least 1, or null for all steps")

    def walk(self, chain: Chain) -> Sequence[End]:
        first = len(chain) - self.trained_steps(len(chain))
        x = roll(chain, chain.start, 0, first)
        return [End(roll(chain, x, first, len(chain), gradient=True))]

    def trained_steps(self, steps: int) -> int:
        return steps if self.last_steps is None else min(self.last_steps, steps)


@dataclass(frozen=True, kw_only=True)
class DRaFTLV(Backprop):
    """DRaFT-LV (Clark et al. 2023, arXiv 2309.17400; no official code).

    The last step's gradient, averaged over copies of the image that are noised again to that step's level. The reward must
    be differentiable.

    Attributes:
        copies: n, beside the sampled image; 2 (paper).
    """

    copies: int = 2

    name: ClassVar[str] = "draft_lv"
    title: ClassVar[str] = "DRaFT-LV"
    paper: ClassVar[str] = "2309.17400"
    composition: ClassVar[str] = "last step of the sampler, and again from re-noised copies -> mean reward -> minus it"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copies < 1:
            raise ValueError(f"copies is {self.copies}; expected at least 1")

    def walk(self, chain: Chain) -> Sequence[End]:
        last = len(chain) - 1
        level = chain.level(last)
        ends = [roll(chain, roll(chain, chain.start, 0, last), last, last + 1, gradient=True)]
        for copy in range(self.copies):
            x = chain.noised(ends[0].detach(), level, chain.noise(f"copy {copy}"))
            ends.append(roll(chain, x, last, last + 1, gradient=True))
        return [End(x) for x in ends]

    def trained_steps(self, steps: int) -> int:
        return 1 + self.copies

    def plain_steps(self, steps: int) -> int:
        return steps - 1

    def ends(self) -> int:
        return 1 + self.copies
