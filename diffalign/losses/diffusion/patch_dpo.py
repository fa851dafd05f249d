"""PatchDPO: denoising regression with a weight per location of the latent.

Paper: "PatchDPO: Patch-level DPO for Finetuning-free Personalized Image Generation", Huang et al. 2024 (CVPR 2025), arXiv
2412.03177. Code: hqhQAQ/PatchDPO:train_patchdpo.py, data/subject_dataset.py. The stage that estimates the quality of patches
is not released.

Loss: mean over all elements of W (f - y)^2, W = 1 - (map of the subject image) for subject images and the generated image's
own map for generated ones (`patch_weights`), at the resolution of the latent, the same for all channels. Good patches of
generated images are kept, patches of the subject that the model reproduces poorly are learnt. Despite the name there is no
reference, no margin and no sigmoid.

Paper and code: W is *not* divided by its sum in the code, which is followed; `normalise` does it. Summaries of the paper
speak of negative weights for bad patches; with maps in [0, 1] the code has none (UNVERIFIED whether maps are signed). Maps
must be resized and flipped with their image.

Timestep and noise are shared by the two images of a pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffalign.losses.base import AnyLayout, LossOut, Needs, Objective, detached
from diffalign.losses.diffusion._common import broadcast_locations
from diffalign.losses.layouts import Layout
from diffalign.losses.scores import Cap, Scores, lift


def patch_weights(quality: Tensor, subject: Tensor) -> Tensor:
    """W of PatchDPO: 1 - quality for subject images, quality for generated ones, (N, h, w).

    Args:
        quality: of every patch, in [0, 1], (N, h, w): for a generated image, how well it agrees with the subject; for a
            subject image, how well the model reproduces it.
        subject: bool (N,): a real image of the subject.
    """
    quality = lift(quality)
    return quality.where(~subject[:, None, None], 1 - quality)


@dataclass(frozen=True, kw_only=True)
class PatchDPO(Objective):
    """PatchDPO (Huang et al. 2024, arXiv 2412.03177; official code hqhQAQ/PatchDPO:train_patchdpo.py).

    The mean over a latent of W (f - y)^2, W per location from `Scores.patch_weight`: weighted denoising, no preference loss.
    Every image counts alike, chosen or not, since W already says what is worth learning; make it with
    `patch_dpo.patch_weights`. Latents are (C, h, w) or (C, frames, h, w).

    Attributes:
        normalise: divide by the mean of W over the image's locations, so that a map of small weights does not shrink its
            image; the official code does not.
    """

    normalise: bool = False

    name: ClassVar[str] = "patch_dpo"
    takes_sides: ClassVar[bool] = False
    title: ClassVar[str] = "PatchDPO"
    paper: ClassVar[str] = "2412.03177"
    composition: ClassVar[str] = "squared residual times a weight per location -> mean"
    needs: ClassVar[Needs] = Needs(
        layout=("items",), or_layout=("pairs",), reference=False, caps=frozenset({Cap.RESIDUAL}), patch_weight=True
    )
    parity: ClassVar[str] = "hqhQAQ/PatchDPO train_patchdpo.py (formula)"
    instead: ClassVar[str] = "use 'sft' with weights of units"

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        items = Layout.of(layout).as_items()
        residual, weight = scores.need_residual()[items.index], scores.need_patch_weight()[items.index]
        if residual.ndim < 4:
            raise ValueError(f"residuals have shape {tuple(residual.shape)}; patch_dpo reads latents (N, C, h, w)")
        loss = (broadcast_locations(weight, residual) * residual.square()).flatten(1).mean(1)
        share = weight.flatten(1).mean(1)
        if self.normalise:
            loss = loss / share.clamp(min=1e-8)
        error = residual.square().flatten(1).mean(1)
        return LossOut(items.weight * loss, detached(error=error, patch_weight=share))
