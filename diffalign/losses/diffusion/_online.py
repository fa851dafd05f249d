"""What online methods on denoising errors share: sampled images that are noised again. M images, N rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from diffalign.losses.base import Objective, detached
from diffalign.losses.diffusion._common import positive
from diffalign.losses.group_objective import GroupObjective
from diffalign.losses.layouts import Groups
from diffalign.losses.scores import Scores, mean_square


def ask(owner: Objective, **changes: Any) -> None:
    """Change what an objective needs, where its settings read more or less than the defaults."""
    object.__setattr__(owner, "needs", replace(type(owner).needs, **changes))


@dataclass(frozen=True, kw_only=True)
class Noised(GroupObjective):
    """Base of objectives on groups of sampled images that are noised again.

    Attributes:
        adv_clip: advantages are limited to +-this when they are used; 5 (all codes).
    """

    adv_clip: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "adv_clip")

    @property
    def kl_in_reward(self) -> bool:
        return False

    def options(self) -> dict[str, Any]:
        return super().options() | {"unbiased": False}  # NumPy's deviation

    def advantage(self, scores: Scores, groups: Groups) -> Tensor:
        return super().advantage(scores, groups).clamp(-self.adv_clip, self.adv_clip)

    def anchor(self, scores: Scores, groups: Groups) -> tuple[Tensor | float, dict[str, Tensor]]:
        """beta times the mean squared distance to the reference's prediction, (M,), and metrics; 0 without beta."""
        if not self.beta:
            return 0.0, {}
        index = groups.index
        kl = mean_square(scores.need_residual()[index] - scores.need_ref_residual()[index])
        return self.beta * kl, detached(kl=kl)
