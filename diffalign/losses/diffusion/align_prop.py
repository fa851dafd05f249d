"""AlignProp: back-propagation of a reward through the whole sampler, with randomised truncation.

Paper: "Aligning Text-to-Image Diffusion Models with Reward Backpropagation", Prabhudesai et al. 2023, arXiv 2310.03739.
Code: mihirp1998/AlignProp, as first released (commit 7f4503f) and as rewritten since.

Loss: scale * |target - R| (released: aesthetic reward, target 10, scale 0.01; HPS 1), or -scale * R (rewrite). R is taken of
the sampler's last latents. Of steps before a cut-off the *network's output* is detached, not the latents: what x_t adds to
x_{t-1} directly still carries the gradient of earlier trained steps.

Cut-offs, all of them here, S the number of steps:

    per_step   drawn anew at every step, uniform on 0 ... S: step i is trained with probability (i + 1) / (S + 1) (released)
    uniform    one for all steps, uniform on 0 ... S - 1
    normal     one, normal around 0.84 S with deviation 0.1 S: 42 and 5 of 50 (rewrite)
    last       S - last_steps (the rewrite's fixed cut-off of 49 is last_steps 1)

Differences: a draw is for an optimiser step, in the code for a micro-batch. The released code samples with 50 DDIM steps,
eta 0 and guidance 7.5, the rewrite with eta 1 and guidance 5, gradient through both branches.

Defaults not part of the loss: rank 4, learning rate 1e-3, weight decay 0.1, max norm 5, 128 images a step; 7 epochs of 256
images on the aesthetic reward, which is its early stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from diffalign.losses.diffusion._common import one_of
from diffalign.losses.diffusion.walks import Backprop, Chain, End


@dataclass(frozen=True, kw_only=True)
class AlignProp(Backprop):
    """AlignProp (Prabhudesai et al. 2023, arXiv 2310.03739; official code mihirp1998/AlignProp).

    The reward's gradient through all sampler steps from a random cut-off on; see the top of the file. The reward must be
    differentiable.

    Attributes:
        truncation: how the cut-off is drawn: "per_step", "uniform", "normal" or "last".
        last_steps: of "last": how many steps are trained.
        loss_scale: 0.01 (code).
    """

    truncation: Literal["per_step", "uniform", "normal", "last"] = "per_step"
    last_steps: int = 1
    loss_scale: float = 0.01

    name: ClassVar[str] = "align_prop"
    title: ClassVar[str] = "AlignProp"
    paper: ClassVar[str] = "2310.03739"
    composition: ClassVar[str] = (
        "sampler with a random cut-off -> reward of the last latents -> minus it, or |target - R|"
    )
    parity: ClassVar[str] = "mihirp1998/AlignProp main.py, commit 7f4503f (formula)"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "truncation", ("per_step", "uniform", "normal", "last"))
        if self.last_steps < 1:
            raise ValueError(f"last_steps is {self.last_steps}; expected at least 1")

    def cutoffs(self, steps: int, generator: torch.Generator) -> list[int]:
        """For every step the first that is trained, as it is drawn there."""
        if self.truncation == "per_step":
            return torch.randint(0, steps + 1, (steps,), generator=generator).tolist()
        if self.truncation == "uniform":
            return [int(torch.randint(0, steps, (), generator=generator))] * steps
        if self.truncation == "normal":
            drawn = 0.84 * steps + 0.1 * steps * float(torch.randn((), generator=generator))
            return [min(max(int(drawn), 0), steps - 1)] * steps
        return [steps - min(self.last_steps, steps)] * steps

    def walk(self, chain: Chain) -> Sequence[End]:
        cutoffs = self.cutoffs(len(chain), chain.generator)
        if all(step < cutoff for step, cutoff in enumerate(cutoffs)):
            cutoffs[-1] = 0  # a rare draw would train nothing: the last step then
        x = chain.start
        for step, cutoff in enumerate(cutoffs):
            output = chain.predict(x, chain.level(step), gradient=step >= cutoff)
            x = chain.advance(x, output, step)
        return [End(x)]

    def trained_steps(self, steps: int) -> int:
        return min(self.last_steps, steps) if self.truncation == "last" else steps
