"""CRD: centred reward distillation, the implicit reward of an image regressed to its reward, both centred.

Paper: "Diffusion Reinforcement Learning via Centered Reward Distillation", 2026, arXiv 2603.14128. The authors' code was not
seen; the formulas are those of its port X-GenGroup/Flow-Factory:src/flow_factory/trainers/crd.py, whose constants these are
(UNVERIFIED against the authors').

Loss, with e = v - target on an image that is noised again, M the mean over the latent, w = sg max(M|e|, 1e-5), and the same
of the policy before (`old`):

    r = -M[e^2] / w + M[e_old^2] / w_old        R = (clip(A, -c, c) / c + 1) / 2, as DiffusionNFT's
    r^c = r - sg mean r        R^c = R - mean R        (b r^c - R^c)^2 c / b + kl s M[(v - v_ref)^2]

or the cross-entropy of b r^c with the label sigma(R^c) for the square; s = m + (1 - m) R with m = 1e-4 / kl holds good
images more. Centring within the prompt is what cancels the prompt's normaliser. With a `temperature` tau the mean is
weighed by softmax(R / tau), and the loss is the average of that and of the one weighed by softmax(-R / tau).

At policy == old r = 0: the value is (R^c)^2 c / b, and the gradient is (A - mean A) grad M[e^2] / w: DiffusionNFT's first
step, centred, in the space of the prediction instead of x_0.

Differences: the port centres over *all* gathered samples, though its text says within prompts; here within the prompt, and
`center_on: batch` takes what is in the micro-batch. The reference of its kl term is guided (4.5): guidance is distilled
along the way. `Scores.ref_residual` is whatever the run supplies. Two lagged copies, one here (decay min(0.25 + 0.005 step,
0.999)), another that samples (DiffusionNFT's delayed schedule); a run has one for both.

Defaults: b 1, square, c 5, kl 0.1, s as above. Not part of the loss: 48 prompts x 24 images, 10 steps without guidance, 20
timesteps (the sampler's, without the last).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from diffalign.losses.advantages import Scale, group_ids, group_sums
from diffalign.losses.base import AnyLayout, LossOut, Needs, Sampling, detached, needs
from diffalign.losses.diffusion._common import one_of, positive
from diffalign.losses.diffusion._online import Noised
from diffalign.losses.diffusion.nft import FLOOR, optimality
from diffalign.losses.group_objective import group_metrics
from diffalign.losses.layouts import Layout
from diffalign.losses.scores import Cap, Scores, mean_square

LEAST = 1e-4  # of the kl term, for the worst image


def group_softmax(x: Tensor, ids: Tensor, count: int) -> Tensor:
    """softmax of x within every group, (M,)."""
    top = torch.full((count,), -float("inf"), dtype=x.dtype, device=x.device).scatter_reduce(0, ids, x, "amax")
    weight = (x - top[ids]).exp()
    return weight / group_sums(weight, ids, count)[ids]


@dataclass(frozen=True, kw_only=True)
class CRD(Noised):
    """Centred reward distillation (2026, arXiv 2603.14128; port X-GenGroup/Flow-Factory).

    Square of b times the centred implicit reward (how much better than the lagged policy the image is denoised) minus its
    centred optimality; see the top of the file. Reads the lagged policy's predictions.

    Attributes:
        beta: of the mean squared distance to the reference's prediction; 0.1. The reference ought to be guided.
        crd_beta: b; 1.
        link: "square", or "bce": cross-entropy.
        center_on: "group": centred within the prompt; "batch": over the micro-batch, as the port does over all samples.
        temperature: tau of the two-sided centring; None is the plain mean.
        weight: "self": errors divided by their mean size; "none".
        adaptive_kl: scale the distance of an image by its optimality.
    """

    beta: float = 0.1
    scale_rewards: Scale = "batch"
    crd_beta: float = 1.0
    link: Literal["square", "bce"] = "square"
    center_on: Literal["group", "batch"] = "group"
    temperature: float | None = None
    weight: Literal["self", "none"] = "self"
    adaptive_kl: bool = True

    name: ClassVar[str] = "crd"
    title: ClassVar[str] = "CRD"
    paper: ClassVar[str] = "2603.14128"
    composition: ClassVar[str] = "error of the lagged policy - error -> centred -> square at the centred optimality"
    needs: ClassVar[Needs] = needs("groups", caps=(Cap.RESIDUAL,), reference=False, old=True)
    sampling: ClassVar[Sampling] = Sampling(policy="lagged", timesteps="sampler")
    parity: ClassVar[str] = "X-GenGroup/Flow-Factory trainers/crd.py (formula)"
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = (
        "whether the authors' code and constants are those of the port, which was read in its place"
    )
    instead: ClassVar[str] = "use 'rebel' on texts and on stored transitions"
    noise: ClassVar[Literal["shared", "independent"]] = "independent"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "crd_beta")
        one_of(self, "link", ("square", "bce"))
        one_of(self, "center_on", ("group", "batch"))
        one_of(self, "weight", ("self", "none"))
        if self.temperature is not None:
            positive(self, "temperature")

    def loss(self, implicit: Tensor, target: Tensor, share: Tensor, ids: Tensor, count: int) -> Tensor:
        """The link of both, centred with the weights `share`, which sum to 1 in every group; (M,)."""
        z = self.crd_beta * (implicit - group_sums(share * implicit.detach(), ids, count)[ids])
        wanted = target - group_sums(share * target, ids, count)[ids]
        if self.link == "bce":
            return binary_cross_entropy_with_logits(z, wanted.sigmoid(), reduction="none")
        return (z - wanted).square()

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        groups = Layout.of(layout).need_groups()
        advantage = self.advantage(scores, groups)
        e, old = scores.need_residual()[groups.index], scores.need_old_residual()[groups.index]
        target = optimality(advantage, self.adv_clip).to(e)
        ids, count = group_ids(groups.group if self.center_on == "group" else torch.zeros_like(groups.group))

        def likelihood(missed: Tensor) -> Tensor:
            if self.weight == "none":
                return -mean_square(missed)
            return -mean_square(missed) / missed.detach().abs().flatten(1).mean(1).clamp(min=FLOOR)

        implicit = likelihood(e) - likelihood(old)
        if self.temperature is None:
            sides = [torch.zeros_like(target)]
        else:
            sides = [target / self.temperature, -target / self.temperature]
        shares = [group_softmax(side, ids, count) for side in sides]
        matched = torch.stack([self.loss(implicit, target, share, ids, count) for share in shares]).mean(0)
        held, more = self.anchor(scores, groups)
        if self.beta and self.adaptive_kl:
            least = LEAST / self.beta
            held = held * (least + (1 - least) * target)
        metrics = group_metrics(groups, advantage) | more
        metrics |= detached(optimality=target, implicit_reward=implicit, moved=mean_square(e.detach() - old))
        return LossOut(matched * self.adv_clip / self.crd_beta + held, metrics)
