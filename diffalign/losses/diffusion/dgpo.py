"""DGPO: direct group preference optimisation, a logistic loss of a whole group of sampled images that are noised again.

Paper: "Reinforcing Diffusion Models by Direct Group Preference Optimization", Luo et al. 2025, arXiv 2510.08425 (title from
memory). Code: Luo-Yihong/DGPO:scripts/train_sd3_dgpo.py, config/dgpo.py.

Loss, with D = M[(v - target)^2], M the mean over the latent, and the advantages A of a group of K images (their sum is 0,
which is what cancels DPO's partition function):

    S = (b / K) sum of A (D - D_ref)        u = sg sigma(S)        mean over images of u A D, plus kl M[(v - v_ref)^2]

The gradient of a group's mean is that of -log sigma(-S) divided by b: b only bends the weight. An image stops teaching (D
is detached) where A > 0 and exp(D_old - D) > 1 + c, or A < 0 and it is below 1 - c: a clip without PPO's max, whose weight
u still counts it. At policy == reference u = 1/2.

S needs the whole group in one micro-batch; groups of sampled images are never split here. The code divides by the nominal
size of a group even where members are missing; so does this (members without a reward have A = 0).

Differences: the code clips A to +-5, which breaks sum A = 0 a little; followed. From step 200 (500 for GenEval) the code
samples with a lagged copy of decay min(0.3, 0.001 step), and D_old is always that copy's. With `use_ema_ref` the copy is the
reference too, with b of 2000 to 5000: set `reference.scheme: sync`. Without guidance c is 1e-5, and the reference of the kl
term is guided (4.5).

Defaults: b 100 and c 1e-2 (config/dgpo.py for GenEval and OCR, whose flag defaults to 5e-2; 1e-3 is calmer), kl 0.02 (the
same configs). A by the group's own deviation (GenEval), NumPy's, + 1e-4. Not part of the loss: a deterministic sampler with
guidance 4.5 (training has none), 24 (or 16, 8) images of a prompt, 4 timesteps of the noisiest 60 %, shared by all groups,
noise shared within a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.losses.advantages import group_ids, group_sums
from diffalign.losses.base import AnyLayout, LossOut, Needs, Sampling, detached, needs
from diffalign.losses.diffusion._common import positive
from diffalign.losses.diffusion._online import Noised, ask
from diffalign.losses.group_objective import group_metrics
from diffalign.losses.layouts import Layout
from diffalign.losses.scores import Cap, Scores, mean_square
from diffalign.losses.surrogates import bounded_exp


@dataclass(frozen=True, kw_only=True)
class DGPO(Noised):
    """Direct group preference optimisation (Luo et al. 2025, arXiv 2510.08425; official code Luo-Yihong/DGPO).

    u A D per image: A its advantage, D its denoising error, u = sigma(b / K sum of A (D - D_ref)) the detached weight of its
    group: more where the group is ranked wrongly. Two images with A = (1, -1) have the gradient of `dpo` at beta b, over b.
    Needs whole groups in a micro-batch.

    Attributes:
        beta: of the mean squared distance to the reference's prediction; 0.02 (code).
        dgpo_beta: b, how fast the weight of a group falls as it is ranked right; 100 (code; 10 to 100).
        epsilon: c; an image whose error has moved further than this in the wanted direction has no gradient. 1e-2
            (launchers). None never stops and reads no lagged policy.
    """

    beta: float = 0.02
    dgpo_beta: float = 100.0
    epsilon: float | None = 1e-2

    name: ClassVar[str] = "dgpo"
    title: ClassVar[str] = "DGPO"
    paper: ClassVar[str] = "2510.08425"
    composition: ClassVar[str] = "error -> sum over the group of advantages -> detached sigmoid weight -> times A error"
    needs: ClassVar[Needs] = needs("groups", caps=(Cap.RESIDUAL,), old=True)
    parity: ClassVar[str] = "Luo-Yihong/DGPO scripts/train_sd3_dgpo.py (formula)"
    instead: ClassVar[str] = "use 'grpo' on texts, 'flow_grpo' on stored transitions"
    sampling: ClassVar[Sampling] = Sampling(timesteps="sampler")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "dgpo_beta")
        if self.epsilon is not None:
            positive(self, "epsilon")
        ask(self, old=self.epsilon is not None)

    def reads_reference(self) -> bool:
        return True

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        groups = Layout.of(layout).need_groups()
        index, advantage = groups.index, self.advantage(scores, groups)
        error = mean_square(scores.need_residual()[index])
        reference = -2 * scores.need_ref()[index]
        a = advantage.to(error)
        ids, count = group_ids(groups.group)
        size = group_sums(torch.ones_like(error), ids, count)
        ahead = self.dgpo_beta * group_sums(a * (error - reference).detach(), ids, count) / size
        weight = ahead.sigmoid()
        held, more = self.anchor(scores, groups)
        metrics = group_metrics(groups, advantage) | detached(error=error, group_weight=weight) | more
        if self.epsilon is not None:
            ratio = bounded_exp(mean_square(scores.need_old_residual()[index]) - error.detach())
            stop = torch.where(a > 0, ratio > 1 + self.epsilon, ratio < 1 - self.epsilon)
            error = torch.where(stop, error.detach(), error)
            metrics |= detached(ratio=ratio, clip_frac=stop.to(ratio.dtype))
        return LossOut(weight[ids] * a * error + held, metrics)
