"""DiffusionNFT: negative-aware fine-tuning on the forward process, around the policy that sampled.

Paper: "DiffusionNFT: Online Diffusion Reinforcement with Forward Process", Zheng et al. 2025 (ICLR 2026), arXiv 2509.16117.
Code: NVlabs/DiffusionNFT:scripts/train_nft_sd3.py, config/nft.py, flow_grpo/stat_tracking.py.

Clean sampled images are noised again. One network gives a positive and a negative prediction around the lagged one,

    v+ = (1 - b) v_old + b v        v- = (1 + b) v_old - b v        b = nft_beta
    L = r L+ + (1 - r) L-           L+- = M[(x0+- - x0)^2] / sg(M|x0+- - x0|)

with x0+- the clean latents that v+- imply, M the mean over the latent, r in [0, 1] how good the image is among those of its
prompt: r = (clip(A, -c, c) / c + 1) / 2, A = (R - mean of the group) / (std of the whole round + 1e-4). Neither likelihoods
nor stochastic samplers are needed, and no guidance: it is learnt along the way.

At v = v_old the value does not depend on r, and the gradient is that of A M[(x0^ - x0)^2] / sg(w): independent of b. Without
the weight, L / b is, up to a constant, (2r - 1) (D - D_old) + (b - (2r - 1)) M[(v - v_old)^2], D = M[(v - target)^2]:
advantage-weighted matching, linear around the lagged policy, with a proximal term.

Paper and code differ: the paper divides advantages by a constant, "e.g." the global deviation, and clips to 1; the code
divides by the deviation and clips to 5, so its r is five times softer, and multiplies the loss by 5 / b. The code adds
kl M[(v - v_ref)^2] with 1e-4 (`beta`), the paper's algorithm has no such term. OCR runs have b 1 in the paper, 0.1 in the
code. Half-way, r = 1/2, an image has no gradient in the first step.

Not part of the loss: 48 prompts x 24 images per round, the sampler's own noise levels in random order (all but the last),
the lagged policy's schedule (`rollout.old_decay`), learning rate 3e-4 with rank 32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from diffalign.losses.advantages import Scale
from diffalign.losses.base import AnyLayout, LossOut, Needs, Sampling, detached, needs
from diffalign.losses.diffusion._common import one_of, positive
from diffalign.losses.diffusion._online import Noised
from diffalign.losses.group_objective import group_metrics
from diffalign.losses.layouts import Layout
from diffalign.losses.scores import Cap, Scores, mean_square

FLOOR = 1e-5  # of the weight


def optimality(advantage: Tensor, clip: float) -> Tensor:
    """r in [0, 1] of advantages, (M,): 1/2 for an average image, the ends at +-clip."""
    return (advantage.clamp(-clip, clip) / clip + 1) / 2


@dataclass(frozen=True, kw_only=True)
class DiffusionNFT(Noised):
    """DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117; official code NVlabs/DiffusionNFT).

    r L+ + (1 - r) L-, errors of the clean latents that predictions on both sides of the lagged policy imply, divided by
    their own mean size; see the top of the file. Groups come from a deterministic sampler without guidance.

    Attributes:
        beta: of the mean squared distance to the reference's prediction; 1e-4 (code; the paper has none).
        nft_beta: b, how far the two predictions lie from the lagged one; 1 (OCR and several rewards in the code: 0.1).
        adv_mode: "all"; "positive" or "negative" keep the advantages of that sign and set others to 0; "binary" keeps the
            sign alone. Without the negative side the paper saw collapse.
        weight: "self": divided by the mean size of the error; "none".
    """

    beta: float = 1e-4
    scale_rewards: Scale = "batch"
    nft_beta: float = 1.0
    adv_mode: Literal["all", "positive", "negative", "binary"] = "all"
    weight: Literal["self", "none"] = "self"

    name: ClassVar[str] = "diffusion_nft"
    title: ClassVar[str] = "DiffusionNFT"
    paper: ClassVar[str] = "2509.16117"
    composition: ClassVar[str] = (
        "predictions around the lagged policy -> errors of x0 -> weighed by optimality r and 1 - r"
    )
    needs: ClassVar[Needs] = needs("groups", caps=(Cap.RESIDUAL,), reference=False, old=True, to_sample=True)
    sampling: ClassVar[Sampling] = Sampling(policy="lagged", timesteps="sampler")
    parity: ClassVar[str] = "NVlabs/DiffusionNFT scripts/train_nft_sd3.py (formula)"
    instead: ClassVar[str] = "use 'nft' on texts, 'grpo' on stored transitions"
    noise: ClassVar[Literal["shared", "independent"]] = "independent"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "nft_beta")
        one_of(self, "adv_mode", ("all", "positive", "negative", "binary"))
        one_of(self, "weight", ("self", "none"))

    def kept(self, advantage: Tensor) -> Tensor:
        """Advantages as `adv_mode` says, (M,)."""
        if self.adv_mode == "positive":
            return advantage.clamp(min=0)
        if self.adv_mode == "negative":
            return advantage.clamp(max=0)
        return advantage.sign() if self.adv_mode == "binary" else advantage

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        groups = Layout.of(layout).need_groups()
        advantage = self.advantage(scores, groups)
        e, old = scores.need_residual()[groups.index], scores.need_old_residual()[groups.index]
        size = scores.need_to_sample()[groups.index].view(-1, *[1] * (e.ndim - 1))
        r = optimality(self.kept(advantage), self.adv_clip).to(e)

        def error(missed: Tensor) -> Tensor:
            missed = size * missed
            if self.weight == "none":
                return mean_square(missed)
            weight = missed.detach().abs().flatten(1).mean(1).clamp(min=FLOOR)
            return mean_square(missed) / weight

        b = self.nft_beta
        better, worse = error((1 - b) * old + b * e), error((1 + b) * old - b * e)
        loss = (r * better + (1 - r) * worse) * self.adv_clip / b
        moved = mean_square(e.detach() - old)
        metrics = group_metrics(groups, advantage) | detached(
            optimality=r, error__better=better, error__worse=worse, moved=moved
        )
        anchor, more = self.anchor(scores, groups)
        return LossOut(loss + anchor, metrics | more)
