"""Flow-DPO: Diffusion-DPO on the velocity errors of flow-matching models, with a constant or a derived beta.

Paper: "Improving Video Generation with Human Feedback", Liu et al. 2025, arXiv 2501.13918. Code:
yifan123/flow_grpo:scripts/train_sd3_dpo.py, config/dpo.py (where KwaiVGI/VideoAlign points); X-GenGroup/Flow-Factory has
another port.

Loss, per pair: -log sigma(z), z = -(beta_t / 2) [(e_w - e_w_ref) - (e_l - e_l_ref)], e the mean squared error of the
velocity noise - x_0. The derivation gives beta_t = beta (1 - t)^2, which is uniform weight on the error of the *noise*; a
constant beta works better and is the default (second-hand: VBench quality 83.41 against 80.90, since beta_t leaves high
noise almost free). Both agree at t = 0.

beta_t is made of the signal-to-noise ratio alone, as sigma(log_snr / 2)^2 = (alpha / (alpha + sigma))^2. That is (1 - t)^2
on a flow schedule and an arbitrary weight on a variance-preserving one, which scores do not tell apart. It also expects
errors of the velocity: `denoising.error_space: epsilon` measures errors of the noise, which hold (1 - t)^2 already, and with
both the weight would be (1 - t)^4.

Paper and code differ: the paper writes a squared norm, both public codes take the mean over the latent, which is followed.

Defaults: beta 100 (flow_grpo for SD3.5-M at 512; the same in Flow-Factory). Projects run 100 to 5000; the paper's value for
video is UNVERIFIED.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from diffalign.losses.base import Needs, needs
from diffalign.losses.diffusion._common import one_of
from diffalign.losses.pairwise import LogisticPair
from diffalign.losses.scores import Cap, Kind, Scores


@dataclass(frozen=True, kw_only=True)
class FlowDPO(LogisticPair):
    """Flow-DPO (Liu et al. 2025, arXiv 2501.13918; official code yifan123/flow_grpo:scripts/train_sd3_dpo.py).

    `dpo` on velocity errors of a flow-matching model. With a constant beta it is that very loss at another default;
    "derived" multiplies beta by (1 - t)^2 of every row, which measures errors of the noise, as `dpo` does on models that
    predict noise. "derived" means something on flow models alone, and not where errors are those of the noise already
    (`denoising`, error space "epsilon"), which is the same weight once more.

    beta: 100 on denoising errors (official configuration for SD3.5-M).

    Attributes:
        beta_schedule: "constant" (better in the paper), or "derived": beta (1 - t)^2, t the noise level of flow matching.
    """

    beta_schedule: Literal["constant", "derived"] = "constant"

    name: ClassVar[str] = "flow_dpo"
    title: ClassVar[str] = "Flow-DPO"
    paper: ClassVar[str] = "2501.13918"
    composition: ClassVar[str] = "log-ratio of velocity errors -> beta_t (w - l) -> logistic"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.DIFFERENCE, Cap.ERROR), log_snr=True)
    parity: ClassVar[str] = "yifan123/flow_grpo scripts/train_sd3_dpo.py (formula)"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.BOUND: 100.0}
    instead: ClassVar[str] = "use 'dpo'"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "beta_schedule", ("constant", "derived"))

    def transform(self, scores: Scores) -> Tensor:
        rho = scores.log_ratio()
        if self.beta_schedule == "constant":
            return rho
        return rho * (scores.need_log_snr() / 2).sigmoid().square()  # (1 - t)^2
