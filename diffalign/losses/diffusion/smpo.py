"""SmPO-Diffusion: soft labels of a reward model as a factor of the logit, on latents of ReNoise inversion.

Paper: "Smoothed Preference Optimization via ReNoise Inversion for Aligning Diffusion Models with Varied Human Preferences",
Lu et al. 2025 (ICML), arXiv 2506.02698. Code: JaydenLyh/SmPO:train.py, its preprocessing script, utils/pickscore_utils.py.

Loss, per pair: -log sigma(gamma (2 p - 1) z) with z Diffusion-DPO's logit at inverted latents (see `inpo`), and p = exp(n_w)
/ (exp(n_w) + exp(n_l)) of min-max-normalised rewards n = (s - low) / (high - low). Hence 2 p - 1 = tanh((n_w - n_l) / 2):
with n in [0, 1] the factor is in [0, 4.62] at gamma 10. The geometric mixture of winner and loser densities leads to it.

Notes:
- Labels are *re-assigned* by the reward (PickScore): a pair whose rejected image scores higher has a negative factor, which
  is the same as swapping it. The people's label only drops ties.
- low and high are constants of PickScore's cosine (CLIP-H, without the logit scale) on Pick-a-Pic; another reward needs its
  own. PickScore as it is usually given (18 to 24, as `pickscore` here) is 100 times the cosine: without `reward_scale: 0.01`
  every gap of 0.5 or more has nearly the largest factor there is, gamma, and the labels are hard again. `saturated_frac`
  is the share of pairs whose gap is wider than [low, high].
- The released code reads factor and label of the first element of a batch only: right for one pair per device.
- Inversion: at every grid step two predictions are averaged (ReNoise). Released grid: 5 points for SD1.5, queried up to 199
  steps away from the level reached, and 10 points, up to 99 steps, for SDXL; the paper reports 9 steps (second-hand).

Defaults: gamma 10 (hard-coded in the code), beta 2000 (SD1.5; SDXL 5000), low and high from the code. Paper body
second-hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from diffalign.losses import links
from diffalign.losses.base import AnyLayout, BetaObjective, LossOut, Needs, as_rows, detached, needs
from diffalign.losses.diffusion._common import Directed, one_of, positive
from diffalign.losses.layouts import Layout, Pairs
from diffalign.losses.pairwise import pair_metrics
from diffalign.losses.scores import Cap, Kind, Scores


@dataclass(frozen=True, kw_only=True)
class SmPO(Directed, BetaObjective):
    """SmPO-Diffusion (Lu et al. 2025, arXiv 2506.02698; official code JaydenLyh/SmPO:train.py).

    -log sigma(gamma (2 p - 1) z), z as in `dpo` at latents of ReNoise inversion: pairs that a reward model finds equal teach
    nothing, and one that it ranks the other way is swapped. p = sigmoid(n_w - n_l) of rewards normalised by two constants,
    which belong to PickScore's cosine: set them for another reward, and `reward_scale: 0.01` for PickScore on its usual
    scale of 18 to 24, stored or from a rollout. The metric `saturated_frac` should be 0: it is the share of pairs whose
    rewards lie farther apart than low and high, so that the factor leaves its range and labels become hard. Target margins
    are subtracted after the factor.

    beta: 2000 on denoising errors (SD1.5 launcher; SDXL 5000).

    Attributes:
        gamma: 10 (official).
        soft_label: where p comes from: "reward": `pairs.reward_w` and `pairs.reward_l`, one column; the label is not read.
            "p": `pairs.p`.
        reward_low, reward_high: lowest and highest reward of the data, in the units that `reward_scale` makes (official:
            cosines of PickScore on Pick-a-Pic).
        reward_scale: what rewards are multiplied by first; 1 (official, for cosines). PickScore of 18 to 24: 0.01.
    """

    gamma: float = 10.0
    soft_label: Literal["reward", "p"] = "reward"
    reward_low: float = 0.11543526500463486
    reward_high: float = 0.28201571106910706
    reward_scale: float = 1.0

    name: ClassVar[str] = "smpo"
    title: ClassVar[str] = "SmPO-Diffusion"
    paper: ClassVar[str] = "2506.02698"
    composition: ClassVar[str] = "log-ratio at inverted latents -> gamma (2 p - 1) beta (w - l) -> logistic"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.DIFFERENCE, Cap.ERROR))
    parity: ClassVar[str] = "JaydenLyh/SmPO train.py (formula)"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.BOUND: 2000.0}
    instead: ClassVar[str] = "there is no image to invert; use 'dpo' with soft labels"
    noising: ClassVar[Literal["forward", "ddim_inversion", "renoise_inversion"]] = "renoise_inversion"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "gamma", "reward_scale")
        one_of(self, "soft_label", ("reward", "p"))
        if self.reward_high <= self.reward_low:
            raise ValueError(f"reward_high is {self.reward_high}; expected more than reward_low, {self.reward_low}")

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return math.log(2)

    def factor(self, pairs: Pairs, like: Tensor) -> Tensor:
        """gamma (2 p - 1), (P,) or a scalar, without gradient."""
        if self.soft_label == "p":
            return self.gamma * (2 * as_rows(pairs.p, like) - 1)
        return self.gamma * (self.gap(pairs, like) / 2).tanh()

    def gap(self, pairs: Pairs, like: Tensor) -> Tensor:
        """n_w - n_l of normalised rewards, (P,), without gradient; in [-1, 1] for rewards between low and high."""
        if pairs.reward_w is None or pairs.reward_l is None:
            raise ValueError(
                "pairs.reward_w and pairs.reward_l are missing; smpo makes soft labels of them (or set soft_label: p)"
            )
        if pairs.reward_w.shape[1] != 1 or pairs.reward_l.shape[1] != 1:
            raise ValueError(f"got {pairs.reward_w.shape[1]} rewards per image; smpo reads one")
        gap = (pairs.reward_w - pairs.reward_l)[:, 0].detach().to(like)
        return self.reward_scale * gap / (self.reward_high - self.reward_low)

    def direction(self, scores: Scores, pairs: Pairs) -> Tensor:
        return self.factor(pairs, scores.theta).sign().expand(len(pairs))

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs = Layout.of(layout).need_pairs()
        beta, rho = self.beta_for(scores.kind), scores.log_ratio()
        w, l = beta * rho[pairs.w], beta * rho[pairs.l]
        factor = self.factor(pairs, rho)
        loss = pairs.weight * links.logistic(factor * (w - l) - pairs.margin)
        metrics = pair_metrics(w - l, w, l, scores, pairs) | detached(factor=factor.expand(len(pairs)).contiguous())
        if self.soft_label == "reward":
            metrics |= detached(saturated_frac=(self.gap(pairs, rho).abs() > 1).to(rho.dtype))
        return LossOut(loss, metrics)
