"""What policy gradients on the transitions of a stochastic sampler share.

A row is a trajectory with its steps as units, (N, U), or a single transition, (N, 1). A score is the *mean* log-density over
the elements of the latent, which all published clip ranges presuppose: a sum would multiply log-ratios by 16384 and more.
M[.] is the mean over the latent's elements, mu the mean of a step, std its deviation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from diffalign.losses import surrogates
from diffalign.losses.advantages import Scale
from diffalign.losses.base import Needs, detached, needs
from diffalign.losses.diffusion._common import Refusing, one_of, positive
from diffalign.losses.diffusion._online import ask
from diffalign.losses.group_objective import UNIT_CAPS, PolicyGradient
from diffalign.losses.layouts import Groups
from diffalign.losses.scores import Kind, Scores
from diffalign.losses.surrogates import Rollout

KLForm = Literal["exact", "code", "eps", "sampled"]
KL_READS: Mapping[KLForm, tuple[str, ...]] = {
    "exact": ("ref_shift",),
    "code": ("ref_shift", "dt"),
    "eps": ("eps_shift",),
    "sampled": (),
}


def per_step(scores: Scores, name: str, index: Tensor) -> Tensor:
    """Numbers of every step of rows `index`, (M, U), from `Scores.extra`; of single transitions also given as (N,).

    Raises:
        ValueError: there are none, or not one per step.
    """
    value, shape = scores.need_extra(name), scores.need_units().theta.shape
    value = value[:, None] if value.ndim == 1 else value
    if value.shape != shape:
        raise ValueError(
            f"scores.extra[{name!r}] has shape {tuple(value.shape)}; expected {tuple(shape)}, one per step"
        )
    return value[index]


@dataclass(frozen=True, kw_only=True)
class Transitions(Refusing, PolicyGradient):
    """Base of policy gradients on transitions.

    Advantages are (R - mean of the group) / (std of the round + 1e-4) with NumPy's deviation, Flow-GRPO's default, where a
    method does not say otherwise; every step of a trajectory has that of its image.

    Attributes:
        adv_clip: advantages are limited to +-this when they are used; None does not. 5.
        kl_form: the divergence that beta multiplies, outside of any clip. "exact": M[(mu - mu_ref)^2] / (2 std^2), the KL of
            two Gaussian steps (`extra["ref_shift"]`); "code": the same times dt (and `extra["dt"]`), as Flow-GRPO's SD3
            script; "eps": M[(eps - eps_ref)^2] (`extra["eps_shift"]`); "sampled": `kl_estimator` on log-densities.
    """

    scale_rewards: Scale = "batch"
    adv_clip: float | None = 5.0
    kl_form: KLForm = "exact"

    needs: ClassVar[Needs] = needs("groups", caps=UNIT_CAPS, reference=False)
    refused: ClassVar[Mapping[Kind, str]] = {
        Kind.TOKEN: "its settings are of denoising transitions, means over the elements of a latent; a text has none"
    }
    instead: ClassVar[str] = "use 'grpo' on texts, 'awm' or 'diffusion_nft' on denoising errors"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "kl_form", tuple(KL_READS))
        if self.adv_clip is not None:
            positive(self, "adv_clip")
        ask(self, extra=tuple(dict.fromkeys(self.reads_extra())))

    def reads_extra(self) -> tuple[str, ...]:
        """Names in `Scores.extra` that these settings read."""
        return KL_READS[self.kl_form] if self.beta and not self.kl_in_reward else ()

    def options(self) -> dict[str, Any]:
        return super().options() | {"unbiased": False}  # NumPy's deviation

    def advantage(self, scores: Scores, groups: Groups) -> Tensor:
        a = super().advantage(scores, groups)
        return a if self.adv_clip is None else a.clamp(-self.adv_clip, self.adv_clip)

    def divergence(
        self, scores: Scores, groups: Groups, rollout: Rollout, ratio: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.kl_form == "sampled":
            return super().divergence(scores, groups, rollout, ratio)
        first, *rest = (per_step(scores, name, groups.index) for name in KL_READS[self.kl_form])
        kl = first * rest[0] if rest else first
        return self.beta * self.reduce(kl, scores, rollout.mask), detached(kl=kl[rollout.mask])


@dataclass(frozen=True, kw_only=True)
class Clipped(Transitions):
    """Base of PPO's clip on transitions: mean over steps of -min(R A, clip(R, 1 - epsilon, 1 + epsilon) A).

    Attributes:
        epsilon: clip range of the ratio; 1e-4, of mean log-densities.
    """

    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "epsilon")

    def clip_range(self) -> tuple[float, float]:
        return self.epsilon, self.epsilon

    def surrogate(self, rollout: Rollout, ratio: Tensor) -> Tensor:
        return surrogates.clip_surrogate(ratio, rollout.advantage, *self.clip_range())
