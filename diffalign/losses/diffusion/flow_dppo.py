"""Flow-DPPO: Flow-GRPO with a mask by divergence in the place of the clip.

Paper: 2026, arXiv 2606.11025 (title not verified). Code: Tencent-Hunyuan/UniRL:unirl/algorithms/flowdppo.py; verl-omni.

Loss, per step: -k A r, where k = 0 if M[(mu - mu_old)^2] / (2 std^2), the exact KL of the step from the one that sampled,
is 1e-5 or more *and* the ratio r has already moved the way the advantage asks for (A > 0 and r > 1, or A < 0 and r < 1),
else 1. Masked steps count as 0 in the mean. A step that went too far may come back, and a ratio that is large by chance
alone is not clipped. At the old policy all steps are kept, and the loss is -mean A.

`Scores.extra["mean_shift"]` is that divergence, of every step; here it has no gradient.

Defaults: threshold 1e-5. Advantages as Flow-GRPO; beta 0: no coefficient was seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from diffalign.losses.base import Needs, Sampling, detached, needs
from diffalign.losses.diffusion._common import positive
from diffalign.losses.diffusion._transitions import KLForm, Transitions, per_step
from diffalign.losses.group_objective import UNIT_CAPS
from diffalign.losses.layouts import Groups
from diffalign.losses.scores import Scores
from diffalign.losses.surrogates import Rollout


@dataclass(frozen=True, kw_only=True)
class FlowDPPO(Transitions):
    """Flow-DPPO (2026, arXiv 2606.11025; code Tencent-Hunyuan/UniRL).

    -A r per denoising step, without those whose step has moved by more than a threshold from the one that sampled, in the
    direction that their advantage asks for. Reads "mean_shift" of every step from `Scores.extra`; see the top of the file.

    Attributes:
        kl_form: of the divergence that beta multiplies, as `flow_grpo`.
        threshold: largest divergence, in nats per element; 1e-5.
    """

    kl_form: KLForm = "code"
    threshold: float = 1e-5

    name: ClassVar[str] = "flow_dppo"
    title: ClassVar[str] = "Flow-DPPO"
    paper: ClassVar[str] = "2606.11025"
    composition: ClassVar[str] = (
        "ratio of a step -> advantage -> masked by the divergence of the step -> mean over steps"
    )
    needs: ClassVar[Needs] = needs("groups", caps=UNIT_CAPS, reference=False, old=True, extra=("mean_shift",))
    parity: ClassVar[str] = "Tencent-Hunyuan/UniRL unirl/algorithms/flowdppo.py (formula)"
    sampling: ClassVar[Sampling] = Sampling(shared_start=False)  # as Flow-GRPO

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "threshold")

    def reads_extra(self) -> tuple[str, ...]:
        return ("mean_shift", *super().reads_extra())

    def rollout(self, scores: Scores, groups: Groups) -> Rollout:
        rollout = super().rollout(scores, groups)
        far = per_step(scores, "mean_shift", groups.index).detach() >= self.threshold
        done = rollout.log_ratio.detach() * rollout.advantage > 0
        keep = (~(far & done)).to(rollout.theta.dtype)
        return replace(rollout, weight=keep if rollout.weight is None else keep * rollout.weight)

    def surrogate(self, rollout: Rollout, ratio: Tensor) -> Tensor:
        return -rollout.advantage * ratio

    def ratio_metrics(self, rollout: Rollout, ratio: Tensor) -> dict[str, Tensor]:
        assert rollout.weight is not None
        masked = (rollout.weight == 0).to(ratio.dtype)[rollout.mask]
        return detached(ratio=ratio[rollout.mask], masked_frac=masked)
