"""Pairwise objectives with a reference: DPO and its relatives.

All contrast u_w - u_l, where u is a transform of the log-ratio rho = theta - ref, and differ in the transform and the link.
They see only the difference: adding a number to both log-ratios changes nothing, so both may fall together (likelihood
displacement); `anchored` has the objectives that notice. They need paired comparisons and a reference that stays near the
data; see also `reference_free` and `unpaired`.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.losses import links
from diffalign.losses.base import (
    AnyLayout,
    BetaObjective,
    IncompatibleObjective,
    LossOut,
    Needs,
    Objective,
    detached,
    needs,
)
from diffalign.losses.layouts import Layout, Pairs
from diffalign.losses.scores import Cap, Kind, Scores

log = logging.getLogger(__name__)

BETA = {Kind.TOKEN: 0.1, Kind.STEP: 0.1}
# The published beta_dpo of Diffusion-DPO belongs to a logistic link on differences of mean squared errors.
DIFFUSION_BETA = BETA | {Kind.BOUND: 5000.0}


def pair_metrics(z: Tensor, reward_w: Tensor, reward_l: Tensor, scores: Scores, pairs: Pairs) -> dict[str, Tensor]:
    """What every pairwise objective reports.

    Args:
        z: differences of implicit rewards, (P,), positive where chosen is ahead.
        reward_w, reward_l: implicit rewards (beta times log-ratio), (P,).
        scores, pairs: for raw scores and errors.
    """
    metrics = detached(
        implicit_acc=(z > 0).to(z.dtype) + 0.5 * (z == 0).to(z.dtype),
        rewards__chosen=reward_w,
        rewards__rejected=reward_l,
        rewards__margins=z,
    )
    return metrics | raw_metrics(scores, pairs)


def raw_metrics(scores: Scores, pairs: Pairs) -> dict[str, Tensor]:
    """Scores of both sides as they came: errors where there are errors, else log-probabilities."""
    if scores.error is None:
        return detached(logps__chosen=scores.theta[pairs.w], logps__rejected=scores.theta[pairs.l])
    metrics = detached(error__chosen=scores.error[pairs.w], error__rejected=scores.error[pairs.l])
    if scores.ref is not None:
        metrics |= detached(error__chosen_ref=-2 * scores.ref[pairs.w], error__rejected_ref=-2 * scores.ref[pairs.l])
    return metrics


def check_share(owner: Objective, name: str, below: float = 0.5) -> None:
    """Refuse a rate outside of [0, `below`).

    Raises:
        ValueError: naming the field.
    """
    value = getattr(owner, name)
    if not 0 <= value < below:
        raise ValueError(f"{name} is {value}; expected 0 <= {name} < {below:g}")


def smoothed(p: Tensor | float, smoothing: float) -> Tensor | float:
    """The label probability after conservative smoothing: p (1 - e) + (1 - p) e."""
    return p * (1 - smoothing) + (1 - p) * smoothing


@dataclass(frozen=True, kw_only=True)
class PairObjective(BetaObjective):
    """Base of objectives on one logit per pair: z = beta (u_w - u_l) - margin, then a link."""

    needs: ClassVar[Needs] = needs("pairs")
    default_beta: ClassVar[Mapping[Kind, float]] = BETA

    def transform(self, scores: Scores) -> Tensor:
        """What is contrasted, per row, (N,): the log-ratio, unless a method says otherwise."""
        return scores.log_ratio()

    def sides(self, scores: Scores, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """What is contrasted, of chosen and rejected, (P,) each; for methods where it depends on the partner."""
        u = self.transform(scores)
        return u[pairs.w], u[pairs.l]

    def target_margin(self, scores: Scores, pairs: Pairs, beta: float) -> Tensor | float:
        """What is subtracted from beta (u_w - u_l), (P,) or a number: the pairs' own margin."""
        return pairs.margin

    @abstractmethod
    def link(self, z: Tensor, p: Tensor | float, beta: float) -> Tensor:
        """The loss per pair of margins z, (P,)."""

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs = Layout.of(layout).need_pairs()
        beta = self.beta_for(scores.kind)
        w, l = self.sides(scores, pairs)
        z = beta * (w - l) - self.target_margin(scores, pairs, beta)
        loss = pairs.weight * self.link(z, pairs.p, beta)
        return LossOut(loss, pair_metrics(beta * (w - l), beta * w, beta * l, scores, pairs))


@dataclass(frozen=True, kw_only=True)
class LogisticPair(PairObjective):
    """Base of pairwise objectives with the logistic link.

    Attributes:
        label_smoothing: conservative DPO (E. Mitchell's note, 2023): p becomes p (1 - e) + (1 - p) e, whose optimum is
            finite. TRL 1.16's `sigmoid` ignores its argument of that name.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "label_smoothing")

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return math.log(2)

    def link(self, z: Tensor, p: Tensor | float, beta: float) -> Tensor:
        return links.logistic(z, smoothed(p, self.label_smoothing))


@dataclass(frozen=True, kw_only=True)
class DPO(LogisticPair):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290; on denoising errors arXiv 2311.12908).

    -log sigma(z), z = beta (rho_w - rho_l). On denoising scores this is Diffusion-DPO (eq. 14 with the shared noise of its
    supplement S4; official code SalesforceAIResearch/DiffusionDPO:train.py):
    z = -(beta / 2) [(e_w - e_w_ref) - (e_l - e_l_ref)] with e the *mean* squared error over the latent. There paper and code
    differ and the code is followed: the paper's pseudo-code takes the squared norm (a sum) without the 1/2, about 1e5 times
    larger at the published beta; its eq. 14 draws separate noise for winner and loser. The diffusers SD1.5 script leaves
    out the 1/2 and halves beta to 2500, which is the same numbers.

    beta: 0.1 on tokens (TRL); 5000 on denoising errors (official launchers; the paper's main SD1.5 result uses 2000).
    """

    name: ClassVar[str] = "dpo"
    title: ClassVar[str] = "DPO"
    paper: ClassVar[str] = "2305.18290"
    composition: ClassVar[str] = "log-ratio -> beta (w - l) -> logistic"
    parity: ClassVar[str] = "TRL DPOTrainer sigmoid"
    default_beta: ClassVar[Mapping[Kind, float]] = DIFFUSION_BETA


@dataclass(frozen=True, kw_only=True)
class RobustDPO(PairObjective):
    """Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409): unbiased under labels flipped at a known rate.

    [(1 - e) l(z) - e l(-z)] / (1 - 2e) with l = -log sigma. Unbounded below: its value may be negative. Not label smoothing,
    which mixes instead of undoing the mixture.

    Attributes:
        label_noise: flip rate e in [0, 1/2).
    """

    label_noise: float = 0.1

    name: ClassVar[str] = "robust_dpo"
    title: ClassVar[str] = "Robust DPO"
    paper: ClassVar[str] = "2403.00409"
    composition: ClassVar[str] = "log-ratio -> beta (w - l) -> debiased logistic"
    parity: ClassVar[str] = "TRL DPOTrainer robust"
    default_beta: ClassVar[Mapping[Kind, float]] = DIFFUSION_BETA

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "label_noise")

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return math.log(2)

    def link(self, z: Tensor, p: Tensor | float, beta: float) -> Tensor:
        return links.robust_logistic(z, self.label_noise, p)


@dataclass(frozen=True, kw_only=True)
class Hinge(PairObjective):
    """Normalised hinge: SLiC on log-ratios, `hinge-norm` of RSO (Zhao et al. 2023, Liu et al. 2023, arXiv 2309.06657).

    max(0, 1 - z), z = beta (rho_w - rho_l). Pairs with z > 1 stop pulling. RSO's other link, `sigmoid-norm`, is DPO; its
    unnormalised hinge, without a reference, is `slic` (arXiv 2305.10425). RSO's rejection sampling prepares the pairs.

    beta: 0.05 on tokens (RSO's gamma as TRL quotes it); none published on denoising errors.
    """

    name: ClassVar[str] = "hinge"
    title: ClassVar[str] = "Hinge (SLiC-norm, RSO)"
    paper: ClassVar[str] = "2309.06657"
    composition: ClassVar[str] = "log-ratio -> beta (w - l) -> hinge"
    parity: ClassVar[str] = "TRL DPOTrainer hinge"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 0.05}

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return 1.0

    def link(self, z: Tensor, p: Tensor | float, beta: float) -> Tensor:
        return links.hinge(z, p)


@dataclass(frozen=True, kw_only=True)
class IPO(PairObjective):
    """Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036): (difference - 1 / (2 beta))^2.

    On tokens, log-ratios are means per token: the authors confirmed that the reported results use them, although the paper
    prints sums; TRL's offline `ipo` does the same, its online one uses sums. Lengths count tokens, not non-zero log-ratios
    (HALOs), which is 0/0 at the start.

    Attributes:
        ipo_scale: "paper" as above, or "unit": (z - 1/2)^2, the same without 1 / beta^2, compulsory on denoising scores.
        reduction: of a row's log-ratio on tokens: "mean" or "sum".
    """

    ipo_scale: Literal["paper", "unit"] = "paper"
    reduction: Literal["mean", "sum"] = "mean"

    name: ClassVar[str] = "ipo"
    title: ClassVar[str] = "IPO"
    paper: ClassVar[str] = "2310.12036"
    composition: ClassVar[str] = "log-ratio / length -> beta (w - l) -> square at 1/2"
    parity: ClassVar[str] = "TRL DPOTrainer ipo"

    def check(self, kind: Kind) -> None:
        super().check(kind)
        if kind is Kind.BOUND and self.ipo_scale == "paper":
            raise IncompatibleObjective(
                self.name,
                kind,
                "dividing by beta^2 with beta in the thousands leaves gradients of 1e-8",
                "set objective.ipo_scale: unit",
            )

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return 0.25 if self.ipo_scale == "unit" else 0.25 / self.beta_for(kind) ** 2

    def link(self, z: Tensor, p: Tensor | float, beta: float) -> Tensor:
        return links.square(z, p, beta if self.ipo_scale == "paper" else None)

    def transform(self, scores: Scores) -> Tensor:
        rho = scores.log_ratio()
        return rho / scores.need_length() if scores.kind is Kind.TOKEN and self.reduction == "mean" else rho


@dataclass(frozen=True, kw_only=True)
class EXO(PairObjective):
    """Efficient exact optimisation of pairs (Ji et al. 2024, arXiv 2402.00856, eq. 16): the reverse KL of DPO's.

    KL(q || p_e) with q = (sigma(z), sigma(-z)) and p_e the label's distribution, smoothed. Minimum 0 at
    z = log((1 - e) / e), 6.9 for e = 1e-3. Unimodal but not convex: for z << 0 it is flat, so badly violated pairs hardly
    pull. A soft label p is the target itself. More than two responses per prompt: `exo_list`.

    Attributes:
        label_smoothing: e in (0, 1/2), compulsory: at 0 the loss is infinite. 1e-3 (paper).
    """

    label_smoothing: float = 1e-3

    name: ClassVar[str] = "exo"
    title: ClassVar[str] = "EXO"
    paper: ClassVar[str] = "2402.00856"
    composition: ClassVar[str] = "log-ratio -> beta (w - l) -> reverse KL"
    parity: ClassVar[str] = "TRL DPOTrainer exo_pair"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 0.1}

    def __post_init__(self) -> None:
        super().__post_init__()
        links.reverse_kl(torch.zeros(1), self.label_smoothing)  # refuses rates now instead of at the first step

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        """Of clean labels; ties start lower."""
        return float(links.reverse_kl(torch.zeros(1, dtype=torch.float64), self.label_smoothing))

    def link(self, z: Tensor, p: Tensor | float, beta: float) -> Tensor:
        return links.reverse_kl(z, self.label_smoothing, p)


@dataclass(frozen=True, kw_only=True)
class DiscoPOP(PairObjective):
    """Discovered preference optimisation, log-ratio modulated loss (Lu et al. 2024, arXiv 2406.08414, eq. 5).

    (1 - m)(-log sigma(z)) + m exp(-z) with m = sigma(z / tau). Not monotone: with the published tau the slope at z = 0 is
    +0.784, so training that starts from the reference first pushes margins the *wrong* way, until a local minimum at
    z = -0.119; only tau above 0.1023 starts downhill. On denoising errors that zone is the whole range of early training,
    so tau must be at least 0.2 there.

    beta: 0.05 on tokens (paper).

    Attributes:
        tau: temperature of the modulation; 0.05 (paper).
    """

    tau: float = 0.05

    name: ClassVar[str] = "discopop"
    title: ClassVar[str] = "DiscoPOP"
    paper: ClassVar[str] = "2406.08414"
    composition: ClassVar[str] = "log-ratio -> beta (w - l) -> log-ratio modulated logistic and exponential"
    parity: ClassVar[str] = "TRL DPOTrainer discopop"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 0.05}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau <= 0:
            raise ValueError(f"tau is {self.tau}; expected a positive number")
        slope = -0.75 + (1 - math.log(2)) / (4 * self.tau)
        if slope > 0:
            log.warning("discopop: at tau %g training first lowers the margin (slope %+.3f at 0)", self.tau, slope)

    def check(self, kind: Kind) -> None:
        super().check(kind)
        if kind is Kind.BOUND and self.tau < 0.2:
            raise IncompatibleObjective(
                self.name,
                kind,
                f"at tau {self.tau:g} the loss falls with the margin's fall all over the range of early training",
                "set objective.tau: 0.2 or more, or use dpo",
            )

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return 0.5 * math.log(2) + 0.5

    def link(self, z: Tensor, p: Tensor | float, beta: float) -> Tensor:
        return p * links.log_ratio_modulated(z, self.tau) + (1 - p) * links.log_ratio_modulated(-z, self.tau)


_NO_LENGTHS = "use dpo: where all responses have the same length it is the same objective"


@dataclass(frozen=True, kw_only=True)
class NormalisedDPO(LogisticPair):
    """Length-normalised DPO: the log-ratio per token (adopted by Tulu 3, arXiv 2411.15124; TRL `sigmoid_norm`).

    z = beta (rho_w / |y_w| - rho_l / |y_l|). Takes the length bias of the sum away. Log-ratios are smaller by the length, so
    beta must be larger than DPO's by about as much: no default, Tulu 3's own value was not seen.
    """

    name: ClassVar[str] = "dpo_norm"
    title: ClassVar[str] = "Length-normalised DPO"
    paper: ClassVar[str] = "2411.15124"
    composition: ClassVar[str] = "log-ratio / length -> beta (w - l) -> logistic"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.DIFFERENCE, Cap.LENGTH))
    parity: ClassVar[str] = "TRL DPOTrainer sigmoid_norm"
    default_beta: ClassVar[Mapping[Kind, float]] = {}
    instead: ClassVar[str] = _NO_LENGTHS

    def transform(self, scores: Scores) -> Tensor:
        return scores.log_ratio() / scores.need_length()


@dataclass(frozen=True, kw_only=True)
class LengthDesensitisedDPO(LogisticPair):
    """LD-DPO (Liu et al. 2024, arXiv 2409.06411): the tokens beyond the shorter response's length count less.

    u = sum_{t <= L} rho_t + alpha sum_{t > L} rho_t with L = min(|y_w|, |y_l|). alpha = 1 is DPO, 0 truncates both to L.

    Attributes:
        alpha: weight of the tail in [0, 1]; 0.5 is where the paper suggests to start.
    """

    alpha: float = 0.5

    name: ClassVar[str] = "ld_dpo"
    title: ClassVar[str] = "LD-DPO"
    paper: ClassVar[str] = "2409.06411"
    composition: ClassVar[str] = "log-ratio, tail times alpha -> beta (w - l) -> logistic"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.DIFFERENCE, Cap.LENGTH, Cap.UNITS))
    parity: ClassVar[str] = "TRL DPOTrainer ld_alpha"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 0.1}
    instead: ClassVar[str] = _NO_LENGTHS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; expected 0 <= alpha <= 1")

    def sides(self, scores: Scores, pairs: Pairs) -> tuple[Tensor, Tensor]:
        units = scores.need_units()
        if units.ref is None:
            raise ValueError("this objective compares with a reference; scores.units.ref is missing")
        rho = (units.theta - units.ref).masked_fill(~units.mask, 0.0)
        length, place = units.mask.sum(1), units.mask.cumsum(1)
        shared = torch.minimum(length[pairs.w], length[pairs.l])[:, None]
        w, l = (
            torch.where(place[rows] > shared, self.alpha * rho[rows], rho[rows]).sum(1) for rows in (pairs.w, pairs.l)
        )
        return w, l


@dataclass(frozen=True, kw_only=True)
class LengthRegularisedDPO(LogisticPair):
    """R-DPO (Park et al. 2024, arXiv 2403.19159): DPO with a penalty on length, not robust DPO (`robust_dpo`).

    -log sigma(beta (rho_w - rho_l) + alpha (|y_w| - |y_l|)), which follows from maximising E[r - alpha |y|] - beta KL: a
    longer winner has a head start and is pushed less. Sign derived here; paper not re-read.

    Attributes:
        alpha: price of a token, >= 0. 0.01 is from memory, not verified.
    """

    alpha: float = 0.01

    name: ClassVar[str] = "r_dpo"
    title: ClassVar[str] = "R-DPO (length)"
    paper: ClassVar[str] = "2403.19159?"
    composition: ClassVar[str] = "log-ratio -> beta (w - l) + alpha (|w| - |l|) -> logistic"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.DIFFERENCE, Cap.LENGTH))
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 0.1}
    instead: ClassVar[str] = _NO_LENGTHS

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return None  # depends on the lengths

    def target_margin(self, scores: Scores, pairs: Pairs, beta: float) -> Tensor | float:
        length = scores.need_length()
        return pairs.margin - self.alpha * (length[pairs.w] - length[pairs.l])
