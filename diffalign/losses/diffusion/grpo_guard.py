"""GRPO-Guard: Flow-GRPO with a ratio that is centred, and steps that weigh the same.

Paper: "GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping", 2025, arXiv 2510.22319
(title from memory). Code: yifan123/flow_grpo:scripts/train_sd3_GRPO_Guard.py.

For samples of the old policy, x = mu_old + std xi, the mean log-ratio of a step is M[xi (mu - mu_old)] / std - M[(mu -
mu_old)^2] / (2 std^2): its second part is negative, so that steps with A > 0 are hardly ever clipped and others are, and
its scale goes with 1 / std. Instead ("RatioNorm")

    log r = (log p - log p_old + M[(mu - mu_old)^2] / (2 std^2)) std = M[xi (mu - mu_old)]

whose mean is 0 for every step, in PPO's clip, and the loss of a step is divided by its length dt: with Flow-GRPO's noise the
gradient of a log-density has the scale sqrt(dt (1 - t) / t), thirty times larger at the last of ten steps than at the first;
after std it is dt, and after the division one constant.

`Scores.extra` has "mean_shift" (M[(mu - mu_old)^2] / (2 std^2), with the gradient of mu), "std" and "dt" of every step.

Differences: the code's std is one number per step, the mean over the batch. Flow-Factory's `grpo-guard` leaves 1 / dt out
(`reweight: false`). In float32 the difference of two log-densities near 1 is wrong by 1e-7, a twentieth of the clip range:
the first step's ratios are not exactly 1 unless both come from the same computation.

Defaults: clip 2e-6 is verl-omni's for this form; the official launcher's was not seen (UNVERIFIED). Advantages as
Flow-GRPO, and so is guidance, whose unconditional branch is detached in that code's other scripts (UNVERIFIED of this one).
beta 0: no coefficient was seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from diffalign.losses.base import Needs, Sampling, needs
from diffalign.losses.diffusion._transitions import Clipped, KLForm, per_step
from diffalign.losses.group_objective import UNIT_CAPS
from diffalign.losses.layouts import Groups
from diffalign.losses.scores import Scores
from diffalign.losses.surrogates import Rollout

READS = ("mean_shift", "std", "dt")


@dataclass(frozen=True, kw_only=True)
class GRPOGuard(Clipped):
    """GRPO-Guard (2025, arXiv 2510.22319; official code yifan123/flow_grpo).

    PPO's clip of exp((log p - log p_old + mean shift) std) per denoising step, over dt: a ratio whose logarithm is 0 on
    average and of one scale at all steps. Reads "mean_shift", "std" and "dt" of every step from `Scores.extra`; see the top
    of the file.

    Attributes:
        epsilon: clip range of the normalised ratio; 2e-6 (verl-omni).
        kl_form: of the divergence that beta multiplies, as `flow_grpo`.
        reweight: divide the loss of a step by its dt.
    """

    epsilon: float = 2e-6
    kl_form: KLForm = "code"
    reweight: bool = True

    name: ClassVar[str] = "grpo_guard"
    title: ClassVar[str] = "GRPO-Guard"
    paper: ClassVar[str] = "2510.22319"
    composition: ClassVar[str] = (
        "log-ratio of a step + mean shift, times std -> advantage -> clip -> over dt -> mean over steps"
    )
    needs: ClassVar[Needs] = needs("groups", caps=UNIT_CAPS, reference=False, old=True, extra=READS)
    parity: ClassVar[str] = "yifan123/flow_grpo scripts/train_sd3_GRPO_Guard.py (formula)"
    sampling: ClassVar[Sampling] = Sampling(negative_gradient=False, shared_start=False)

    def reads_extra(self) -> tuple[str, ...]:
        mine = READS if self.reweight else READS[:2]
        return (*mine, *super().reads_extra())

    def rollout(self, scores: Scores, groups: Groups) -> Rollout:
        rollout, index = super().rollout(scores, groups), groups.index
        shift, std = per_step(scores, "mean_shift", index), per_step(scores, "std", index).detach()
        weight = rollout.weight
        if self.reweight:
            per_length = 1 / per_step(scores, "dt", index).detach()
            weight = per_length if weight is None else per_length * weight
        centred = ((rollout.log_ratio + shift) * std).masked_fill(~rollout.mask, 0.0)
        return replace(rollout, log_ratio=centred, weight=weight)
