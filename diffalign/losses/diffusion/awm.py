"""AWM: advantage-weighted matching, PPO's surrogate on the denoising error of sampled images that are noised again.

Paper: "Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models", Xue et al. 2025, arXiv 2509.25050.
Code: scxue/advantage_weighted_matching:advantage_weighted_matching/scripts/train_sd3_awm.py, config/dgx_awm.py; ported in
X-GenGroup/Flow-Factory:src/flow_factory/trainers/awm.py.

Loss, with D = M[(v - target)^2], M the mean over the latent, t in [0, 1] the noise level and a surrogate likelihood l of

    plain -D    t -t D    t2 -t^2 D    huber -t (sqrt(D + 1e-10) - 1e-5)    ghuber -t ((D + 1e-10)^p - 1e-10^p) / p

    -min(r A, clip(r, 1 - k, 1 + k) A) + kl M[(v - v_ref)^2] + ema_kl M[(v - v_ema)^2]        r = exp(l - l_old)

A = clip(z, -5, 5) / 5 of z = (R - mean of the group) / (std of the round + 1e-4). In the released runs l_old is l itself,
detached (`ratio_to: current`), so r = 1, the clip does nothing, and the gradient is -A grad l: reward-weighted regression
with signed weights. Tune the learning rate, not the clip.

Differences: the code computes D in float64, here float32 (float64 stays). Its `sum_first` ratio of the mean likelihood over
a sample's timesteps needs these in one row and is not here. t is sigma / (alpha + sigma), which is the noise level of flow
matching; for networks that predict noise nothing is published, and D is of their own prediction (UNVERIFIED).

Defaults: released SD3.5 runs: ghuber with p = 1/4, k 1, ema_kl 1, A within +-1. kl is 3e-3 (GenEval, OCR) and 1e-4
(PickScore) in the configs that were read; 1e-3, the default, is what summaries of the runs give (UNVERIFIED). Not part of
the loss: 24 x 24 images, 14 steps of SA-Solver without guidance, 6 of the sampler's levels each (not the first, not the
last tenth), the copy of `ema_kl` with decay min(0.3, 0.001 step) after every round. The *policy* samples, not that copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from diffalign.losses.advantages import Scale
from diffalign.losses.base import AnyLayout, LossOut, Needs, Sampling, detached, needs
from diffalign.losses.diffusion._common import one_of, positive
from diffalign.losses.diffusion._online import Noised, ask
from diffalign.losses.group_objective import group_metrics
from diffalign.losses.layouts import Layout
from diffalign.losses.scores import Cap, Scores, mean_square
from diffalign.losses.surrogates import bounded_exp, clip_surrogate, clipped_fractions

SMALL = 1e-10  # keeps roots of small errors from having huge slopes
FORMS = ("plain", "t", "t2", "huber", "ghuber")


@dataclass(frozen=True, kw_only=True)
class AWM(Noised):
    """Advantage-weighted matching (Xue et al. 2025, arXiv 2509.25050; official code scxue/advantage_weighted_matching).

    PPO's surrogate with exp of the change of a function of the denoising error in the place of a likelihood ratio; see the
    top of the file. With `ratio_to: current` the ratio is 1, and the gradient is that of A times the error. The distances to
    the reference and to a lagged copy (`ema_kl`) hold the policy.

    Attributes:
        beta: of the mean squared distance to the reference's prediction; 1e-3 (configs: 3e-3, PickScore 1e-4).
        form: of the likelihood: "plain", "t", "t2", "huber" or "ghuber" (released).
        power: p of "ghuber"; 1/4.
        ratio_to: "current": the policy itself, detached (released); "old": the policy of `Scores.old_residual`.
        epsilon: k, clip range of the ratio; 1, which clips nothing in practice.
        ema_kl: of the mean squared distance to the prediction of the lagged copy (`Scores.old_residual`); 1 (code).
        adv_clip: advantages are limited to +-this, and divided by it; 5.
    """

    beta: float = 1e-3
    scale_rewards: Scale = "batch"
    form: Literal["plain", "t", "t2", "huber", "ghuber"] = "ghuber"
    power: float = 0.25
    ratio_to: Literal["current", "old"] = "current"
    epsilon: float = 1.0
    ema_kl: float = 1.0

    name: ClassVar[str] = "awm"
    title: ClassVar[str] = "AWM"
    paper: ClassVar[str] = "2509.25050"
    composition: ClassVar[str] = (
        "function of the error -> ratio (1 on policy) -> advantage in +-1 -> clip (+ L2 to two)"
    )
    needs: ClassVar[Needs] = needs("groups", caps=(Cap.RESIDUAL,), reference=False, old=True, log_snr=True)
    parity: ClassVar[str] = "scxue/advantage_weighted_matching scripts/train_sd3_awm.py (formula)"
    instead: ClassVar[str] = "use 'grpo' on texts, 'flow_grpo' on stored transitions"
    noise: ClassVar[Literal["shared", "independent"]] = "independent"
    sampling: ClassVar[Sampling] = Sampling(timesteps="sampler")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "form", FORMS)
        one_of(self, "ratio_to", ("current", "old"))
        positive(self, "power", "epsilon")
        positive(self, "ema_kl", zero=True)
        ask(self, old=self.ema_kl > 0 or self.ratio_to == "old", log_snr=self.form != "plain")

    def likelihood(self, error: Tensor, t: Tensor | None) -> Tensor:
        """The surrogate log-likelihood of errors, (M,); t: noise levels in [0, 1], (M,), of forms that weigh by them."""
        if t is None:
            return -error
        if self.form == "huber":
            return -t * ((error + SMALL).sqrt() - SMALL**0.5)
        if self.form == "ghuber":
            return -t * ((error + SMALL) ** self.power - SMALL**self.power) / self.power
        return -(t if self.form == "t" else t**2) * error

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        groups = Layout.of(layout).need_groups()
        e, advantage = scores.need_residual()[groups.index], self.advantage(scores, groups)
        a = advantage.to(e) / self.adv_clip
        # sigma / (alpha + sigma): t of flow matching
        t = None if self.form == "plain" else (-scores.need_log_snr()[groups.index] / 2).sigmoid()
        error = mean_square(e)
        now = self.likelihood(error, t)
        if self.ratio_to == "old":
            before = self.likelihood(mean_square(scores.need_old_residual()[groups.index]), t)
        else:
            before = now.detach()
        ratio = bounded_exp(now - before)
        loss = clip_surrogate(ratio, a, self.epsilon, self.epsilon)
        low, high = clipped_fractions(ratio, a, self.epsilon, self.epsilon)
        metrics = group_metrics(groups, advantage) | detached(
            error=error, ratio=ratio, clip_frac__low=low, clip_frac__high=high
        )
        held, more = self.anchor(scores, groups)
        loss, metrics = loss + held, metrics | more
        if self.ema_kl:
            moved = mean_square(e - scores.need_old_residual()[groups.index])
            loss, metrics = loss + self.ema_kl * moved, metrics | detached(moved=moved)
        return LossOut(loss, metrics)
