"""DDPO: PPO on the steps of a denoising trajectory.

Paper: "Training Diffusion Models with Reinforcement Learning", Black et al. 2023 (ICLR 2024), arXiv 2305.13301. Code:
kvablack/ddpo-pytorch:scripts/train.py, ddpo_pytorch/diffusers_patch/ddim_with_logprob.py, ddpo_pytorch/stat_tracking.py;
before that jannerm/ddpo.

Loss (DDPO_IS), per step x_t -> x_s of a stochastic sampler (DDIM, eta 1): max(-A r, -A clip(r, 1 - c, 1 + c)), r the
likelihood ratio to the policy that sampled, of *mean* log-densities over the latent. Its other form (DDPO_SF) is `reinforce`
on the same rows, one update per round.

Advantages: the code standardises a reward by the last 16 or 32 rewards of the *same prompt*, kept over rounds, and by the
whole round (std + 1e-6, NumPy's) until it has 16 of them. An objective remembers nothing: computed here is the latter, and
an image run with `rollout.history` does the former. With groups of a prompt in every round `center: mean, scale_rewards:
group` is the former on one round.

Differences: guidance is used in sampling and in training, and both its branches carry gradient (Flow-GRPO's unconditional
one does not: `rollout.negative_gradient`). jannerm/ddpo clips advantages to +-10.

Defaults: c 1e-4, advantages within +-5, no divergence. Not part of the loss: 50 steps, guidance 5, all steps in random
order, LoRA learning rate 3e-4, gradients clipped to 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffalign.losses.advantages import Center, Scale
from diffalign.losses.base import Sampling
from diffalign.losses.diffusion._transitions import Clipped


@dataclass(frozen=True, kw_only=True)
class DDPO(Clipped):
    """DDPO (Black et al. 2023, arXiv 2305.13301; official code kvablack/ddpo-pytorch), the importance-sampled form.

    Clipped ratio per denoising step times the advantage of the image. With the default `center` and `scale_rewards`
    advantages are rewards standardised over the round, the code's fallback until it knows a prompt; see the top of the
    file.

    Attributes:
        center, scale_rewards: "none", "none" standardise over the round; others as `grpo`.
    """

    center: Center = "none"
    scale_rewards: Scale = "none"

    name: ClassVar[str] = "ddpo"
    title: ClassVar[str] = "DDPO"
    paper: ClassVar[str] = "2305.13301"
    composition: ClassVar[str] = (
        "ratio of a step -> reward standardised over the round -> clip at 1e-4 -> mean over steps"
    )
    parity: ClassVar[str] = "kvablack/ddpo-pytorch scripts/train.py (formula)"
    sampling: ClassVar[Sampling] = Sampling(shared_start=False)

    def options(self) -> dict[str, Any]:
        return super().options() | {
            "eps": 1e-6,
            "standardize": self.center == "none" and self.scale_rewards == "none",
        }
