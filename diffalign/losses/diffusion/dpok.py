"""DPOK: policy gradient on denoising steps with a ratio that is clamped, held by the reference's noise prediction.

Paper: "DPOK: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models", Fan et al. 2023, arXiv 2305.16381.
Code: google-research/google-research:dpok/train_online_pg.py.

Loss (code), per step: -w A clamp(r, 1 - c, 1 + c) + kl M[(eps - eps_ref)^2], r the likelihood ratio to the policy that
sampled, of mean log-densities over the latent, eps the *guided* noise predictions. There is no max: out of the band a step
has no gradient, not even where A says to come back, unlike PPO's.

Paper and code differ in the divergence: the paper's is the KL of the steps, |mu - mu_ref|^2 / (2 sigma^2) (`kl_form:
exact`); the code's squared distance of predictions weighs steps otherwise. yk7333/d3po's DPOK computes a categorical KL
over a batch of log-densities, which means nothing. A is the raw reward; with the code's value function it is R minus a
value of (x_t, t, prompt), of every step apart, which `Groups.advantage` (one per image) cannot hold, so that is missing.

Defaults (code): w 100 (the default of `--reward_weight`), kl 0.01, c 1e-4. Not part of the loss: 50 DDIM steps at eta 1,
guidance 7.5, single steps drawn from a buffer of 1000, LoRA rank 4 with 1e-5, gradients clipped to 0.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffalign.losses.advantages import Center, Scale
from diffalign.losses.base import Needs, Sampling, detached, needs
from diffalign.losses.diffusion._common import positive
from diffalign.losses.diffusion._transitions import KLForm, Transitions
from diffalign.losses.group_objective import UNIT_CAPS
from diffalign.losses.surrogates import Rollout


@dataclass(frozen=True, kw_only=True)
class DPOK(Transitions):
    """DPOK (Fan et al. 2023, arXiv 2305.16381; official code google-research/google-research:dpok).

    -w A clamp(r) per denoising step, A the reward itself, r clamped on both sides whatever A; plus the squared distance to
    the reference's guided prediction, `extra["eps_shift"]` of every step.

    Attributes:
        beta: of the divergence; 0.01 (code).
        center, scale_rewards: "none": the reward itself (code).
        adv_clip: None: rewards are not limited.
        kl_form: "eps" (code): of noise predictions; "exact" (paper): the KL of two steps (`extra["ref_shift"]`); "code",
            "sampled" as `flow_grpo`.
        reward_weight: w; 100 (code).
        epsilon: c, limits of the ratio; 1e-4.
    """

    beta: float = 0.01
    center: Center = "none"
    scale_rewards: Scale = "none"
    adv_clip: float | None = None
    kl_form: KLForm = "eps"
    reward_weight: float = 100.0
    epsilon: float = 1e-4

    name: ClassVar[str] = "dpok"
    title: ClassVar[str] = "DPOK"
    paper: ClassVar[str] = "2305.16381"
    composition: ClassVar[str] = "ratio of a step, clamped -> times reward -> mean over steps + L2 of predictions"
    needs: ClassVar[Needs] = needs("groups", caps=UNIT_CAPS, reference=False, extra=("eps_shift",))
    parity: ClassVar[str] = "google-research/google-research dpok/train_online_pg.py (formula)"
    sampling: ClassVar[Sampling] = Sampling(shared_start=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "reward_weight", "epsilon")

    def surrogate(self, rollout: Rollout, ratio: Tensor) -> Tensor:
        return -self.reward_weight * rollout.advantage * ratio.clamp(1 - self.epsilon, 1 + self.epsilon)

    def ratio_metrics(self, rollout: Rollout, ratio: Tensor) -> dict[str, Tensor]:
        out = (ratio - 1).abs() > self.epsilon
        return detached(ratio=ratio[rollout.mask], clip_frac=out.to(ratio.dtype)[rollout.mask])
