"""Hybrids: DPO's contrast together with an imitation term, a penalty, or a second contrast.

Their use is against likelihood displacement, where DPO lowers the likelihood of *both* responses and only the gap grows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from diffalign.losses import links
from diffalign.losses.base import AnyLayout, IncompatibleObjective, LossOut, Needs, detached, needs
from diffalign.losses.fine_grained import beside, masked_sum, unit_log_ratio
from diffalign.losses.layouts import Groups, Layout
from diffalign.losses.pairwise import BETA, PairObjective, pair_metrics
from diffalign.losses.reduce import imitation
from diffalign.losses.scores import Cap, Kind, Scores


@dataclass(frozen=True, kw_only=True)
class LogisticObjective(PairObjective):
    """Base of objectives whose first term is DPO's -log sigma(z)."""

    def link(self, z: Tensor, p: Tensor | float, beta: float) -> Tensor:
        return links.logistic(z, p)

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return math.log(2)


@dataclass(frozen=True, kw_only=True)
class RPO(LogisticObjective):
    """Regularised preference optimisation: DPO + sft_weight times the imitation of the chosen response (arXiv 2405.16436).

    In the paper the imitation term comes from the baseline policy's data; the chosen responses are its practical choice.
    Token reduction: TRL's [sigmoid, sft] averages over all tokens of the batch, the official OpenRLHF fork over sequences of
    each one's own token mean; they differ where lengths do. On denoising scores the term is the chosen image's error.

    beta 0.01 and sft_weight 0.005 on tokens (paper). On denoising errors state sft_weight yourself: 0.005 nats are not
    0.005 of a squared error. Other methods called RPO: `rrpo` (2504.12083) and reward-aware RPO.

    Attributes:
        sft_weight: eta.
        sft_reduction: "token" or "sequence".
    """

    sft_weight: float | None = None
    sft_reduction: Literal["token", "sequence"] = "token"

    name: ClassVar[str] = "rpo"
    title: ClassVar[str] = "RPO (DPO + SFT)"
    paper: ClassVar[str] = "2405.16436"
    composition: ClassVar[str] = "log-ratio -> beta (w - l) -> logistic; + eta NLL of w"
    parity: ClassVar[str] = "TRL DPOTrainer [sigmoid, sft]"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.DIFFERENCE, Cap.IMITATION))
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 0.01, Kind.STEP: 0.01}
    default_sft_weight: ClassVar[float] = 0.005
    aliases: ClassVar[Mapping[str, str]] = dict(PairObjective.aliases) | {
        "eta": "sft_weight",
        "rpo_alpha": "sft_weight",
    }

    def check(self, kind: Kind) -> None:
        super().check(kind)
        if kind is not Kind.TOKEN and self.sft_weight is None:
            raise IncompatibleObjective(
                self.name,
                kind,
                "the published weight of the imitation term is per nat of a token, not per unit of this score",
                "set objective.sft_weight in units of the imitation loss (the squared error on denoising scores)",
            )

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return None  # depends on the imitation loss

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs = Layout.of(layout).need_pairs()
        out = super().__call__(scores, pairs)
        weight = self.default_sft_weight if self.sft_weight is None else self.sft_weight
        sft = imitation(scores, pairs.w, self.sft_reduction)
        return LossOut(out.per_item + pairs.weight * weight * sft, out.metrics | detached(sft=sft))


@dataclass(frozen=True, kw_only=True)
class IterativeRPO(RPO):
    """Iterative reasoning preference optimisation (arXiv 2404.19733): RPO, weight 1, beta 0.1, refreshed reference.

    Each iteration samples pairs from the last policy, which also becomes the reference; that is a reference scheme, not part
    of the loss.
    """

    name: ClassVar[str] = "iterative_rpo"
    title: ClassVar[str] = "Iterative RPO"
    paper: ClassVar[str] = "2404.19733"
    default_beta: ClassVar[Mapping[Kind, float]] = BETA
    default_sft_weight: ClassVar[float] = 1.0


@dataclass(frozen=True, kw_only=True)
class FlexDPO(LogisticObjective):
    """Flex-DPO (3D-properties, arXiv 2406.07327), experimental: two betas, -log sigma(beta rho_w - ratio beta rho_l).

    A smaller beta on the rejected response slows its drop, which the paper finds to drag the chosen one along. With ratio 1
    it is DPO, with 0 a one-sided logistic on chosen responses. Optionally + imitation of the chosen response.

    Attributes:
        beta: on the chosen response.
        rejected_ratio: beta of the rejected response divided by `beta`, in [0, 1]; the default is ours.
        sft_weight: of the imitation term.
    """

    rejected_ratio: float = 0.5
    sft_weight: float = 0.0

    name: ClassVar[str] = "flex_dpo"
    title: ClassVar[str] = "Flex-DPO"
    paper: ClassVar[str] = "2406.07327"
    composition: ClassVar[str] = "log-ratio -> beta+ w - beta- l -> logistic; + NLL of w"
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = (
        "the published values of both betas, and the adaptive rule for them, which is not implemented"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rejected_ratio <= 1:
            raise ValueError(f"rejected_ratio is {self.rejected_ratio}; expected 0 <= rejected_ratio <= 1")

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return None if self.sft_weight else math.log(2)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs = Layout.of(layout).need_pairs()
        reward = self.beta_for(scores.kind) * self.transform(scores)
        z = reward[pairs.w] - self.rejected_ratio * reward[pairs.l]
        loss = self.link(z - pairs.margin, pairs.p, self.beta_for(scores.kind))
        if self.sft_weight:
            loss = loss + self.sft_weight * imitation(scores, pairs.w)
        return LossOut(pairs.weight * loss, pair_metrics(z, reward[pairs.w], reward[pairs.l], scores, pairs))


@dataclass(frozen=True, kw_only=True)
class DPOP(LogisticObjective):
    """DPO-Positive (Smaug, arXiv 2402.13228): a penalty wherever the chosen response falls below the reference.

    inside the link: -log sigma(beta (rho_w - rho_l - dpop_lambda max(0, -rho_w))), as in the paper; outside:
    -log sigma(beta (rho_w - rho_l)) + dpop_lambda max(0, -beta rho_w), in units of z so that one value serves every kind of
    score. At the start both are DPO: the penalty begins where the chosen response has dropped.

    Attributes:
        dpop_lambda: 50 is the paper's, from memory.
        place: "inside" or "outside".
    """

    dpop_lambda: float = 50.0
    place: Literal["inside", "outside"] = "inside"

    name: ClassVar[str] = "dpop"
    title: ClassVar[str] = "DPO-Positive"
    paper: ClassVar[str] = "2402.13228?"
    composition: ClassVar[str] = "log-ratio -> beta (w - l - lambda max(0, -w)) -> logistic"

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs = Layout.of(layout).need_pairs()
        beta = self.beta_for(scores.kind)
        reward = beta * self.transform(scores)
        penalty = self.dpop_lambda * relu(-reward[pairs.w])
        z = reward[pairs.w] - reward[pairs.l]
        if self.place == "inside":
            loss = self.link(z - pairs.margin - penalty, pairs.p, beta)
        else:
            loss = self.link(z - pairs.margin, pairs.p, beta) + penalty
        metrics = pair_metrics(z, reward[pairs.w], reward[pairs.l], scores, pairs)
        return LossOut(pairs.weight * loss, metrics | detached(dpop__penalty=penalty))


@dataclass(frozen=True, kw_only=True)
class HyPO(LogisticObjective):
    """Hybrid preference optimisation (arXiv 2406.01462), experimental: offline DPO + kl_weight KL(policy || reference).

    The divergence is estimated on `Layout.on_policy`: fresh samples of the policy. Its gradient is the score-function one,
    sg(rho - baseline) grad s; differentiating the sample mean of rho has zero expected gradient, and k3 as a loss has the
    gradient of the *other* divergence. The value shown is the mean of rho.

    Attributes:
        kl_weight: lambda; the default is ours.
        baseline: "none", or "loo": the mean rho of the other samples of the prompt (`Groups.group`), which removes variance.
    """

    kl_weight: float = 0.1
    baseline: Literal["none", "loo"] = "loo"

    name: ClassVar[str] = "hypo"
    title: ClassVar[str] = "HyPO"
    paper: ClassVar[str] = "2406.01462?"
    composition: ClassVar[str] = "log-ratio -> beta (w - l) -> logistic; + lambda score-function KL on own samples"
    needs: ClassVar[Needs] = needs("pairs", "on_policy", caps=(Cap.DIFFERENCE, Cap.RATIO))
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = "lambda, the baseline and the sampling rate; the official repository is not available"
    instead: ClassVar[str] = "use dpo on freshly sampled pairs, or penalise the squared difference of predictions"

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        layout = Layout.of(layout)
        pairs = layout.need_pairs()
        if layout.on_policy is None:
            raise ValueError("hypo needs fresh samples of the policy; layout.on_policy is missing")
        out, kl = super().__call__(scores, pairs), self.divergence(scores, layout.on_policy)
        mean = kl.mean() if len(kl) else kl.sum()
        return LossOut(out.per_item + self.kl_weight * mean, out.metrics | detached(kl=kl))

    def divergence(self, scores: Scores, samples: Groups) -> Tensor:
        """Per sample, (M,): the value of rho, the gradient of (rho - baseline) s."""
        s, rho = scores.theta[samples.index], scores.log_ratio()[samples.index].detach()
        centred = rho - leave_one_out(rho, samples.group) if self.baseline == "loo" else rho
        return rho + centred * (s - s.detach())


def leave_one_out(x: Tensor, group: Tensor) -> Tensor:
    """Mean over the other members of each one's group, (M,); 0 for a member without any."""
    same = (group[:, None] == group[None, :]).to(x.dtype)
    others = same.sum(1) - 1
    return (same @ x - x) / others.clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class TwoContrasts(LogisticObjective):
    """Base of DPO on responses plus DPO on `Layout.conditions`: pairs that differ in what the response is conditioned on."""

    def weights(self) -> tuple[float, float]:
        """Of the contrast of responses and of the contrast of conditions."""
        return 1.0, 1.0

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return sum(self.weights()) * math.log(2)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        layout = Layout.of(layout)
        pairs = layout.need_pairs()
        first = super().__call__(scores, pairs)
        second = super().__call__(scores, layout.need_conditions())
        a, b = self.weights()
        loss = a * first.per_item + b * beside(second.per_item, pairs)
        return LossOut(loss, first.metrics | {"conditions/margins": second.metrics["rewards/margins"]})


@dataclass(frozen=True, kw_only=True)
class RealignRDPO(TwoContrasts):
    """Re-Align's retrieval-augmented DPO (arXiv 2502.13146): DPO on responses plus DPO on images.

    -log sigma(z) - log sigma(beta [rho(y_w|x, v) - rho(y_w|x, v')]).
    The second term keeps the response and swaps the image v for a similar retrieved one v', so lengths are equal by
    construction; put those pairs into `Layout.conditions`. Optionally + imitation of the chosen response. Official code
    taco-group/Re-Align:rDPOtrainer.py. Other methods called rDPO: `robust_dpo`, length-regularised R-DPO.

    Attributes:
        sft_weight: of the imitation term; 0 as released.
    """

    sft_weight: float = 0.0

    name: ClassVar[str] = "realign_rdpo"
    title: ClassVar[str] = "Re-Align rDPO"
    paper: ClassVar[str] = "2502.13146"
    composition: ClassVar[str] = "log-ratio -> beta (w - l) -> logistic, on responses + on conditions"
    needs: ClassVar[Needs] = needs("pairs", "conditions")

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return None if self.sft_weight else super().initial_loss(kind)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        out, pairs = super().__call__(scores, layout), Layout.of(layout).need_pairs()
        if not self.sft_weight:
            return out
        sft = imitation(scores, pairs.w)
        return LossOut(out.per_item + self.sft_weight * pairs.weight * sft, out.metrics | detached(sft=sft))


@dataclass(frozen=True, kw_only=True)
class POVID(TwoContrasts):
    """POVID, second stage: (1 - noised_weight) DPO(clean image) + noised_weight DPO(rejected response on a noised image).

    The pairs with the noised image go into `Layout.conditions`. The released code averages both with 0.5. arXiv id unknown
    here.

    Attributes:
        noised_weight: of the second contrast, in [0, 1].
    """

    noised_weight: float = 0.5

    name: ClassVar[str] = "povid"
    title: ClassVar[str] = "POVID mix"
    composition: ClassVar[str] = "log-ratio -> beta (w - l) -> logistic, averaged over clean and noised images"
    needs: ClassVar[Needs] = needs("pairs", "conditions")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.noised_weight <= 1:
            raise ValueError(f"noised_weight is {self.noised_weight}; expected 0 <= noised_weight <= 1")

    def weights(self) -> tuple[float, float]:
        return 1 - self.noised_weight, self.noised_weight


@dataclass(frozen=True, kw_only=True)
class UVCoT(LogisticObjective):
    """UV-CoT's mix: DPO on token-weighted log-ratios (as RLAIF-V) minus sft_weight times the chosen response's score.

    z = beta (sum_t w_t rho_t of w - of l) with w_t = `Units.weight`. The imitation term is the *sum* over tokens, without
    weights. arXiv id unknown here.

    Attributes:
        sft_weight: per nat of a whole response; the published value is unknown and the default leaves the term out.
    """

    sft_weight: float = 0.0

    name: ClassVar[str] = "uv_cot"
    title: ClassVar[str] = "UV-CoT mix"
    composition: ClassVar[str] = "weighted log-ratio -> beta (w - l) -> logistic; - score of w"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.DIFFERENCE, Cap.UNITS, Cap.IMITATION))

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return None if self.sft_weight else math.log(2)

    def transform(self, scores: Scores) -> Tensor:
        units = scores.need_units()
        return masked_sum(unit_log_ratio(units), units.mask, units.weight)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs = Layout.of(layout).need_pairs()
        out = super().__call__(scores, pairs)
        loss = out.per_item
        if self.sft_weight:
            loss = loss + pairs.weight * self.sft_weight * scores.need_imitation()[pairs.w]
        return LossOut(loss, out.metrics)


@dataclass(frozen=True, kw_only=True)
class RationaleDPO(LogisticObjective):
    """DPO plus the likelihood of a rationale for the preference (arXiv 2407.14477).

    The rationale r of pair i ("y_w is better because ...") is one more row, conditioned on prompt and both responses:
    `Layout.items` lists these rows in the order of the pairs. form "paper": -log sigma(z) - gamma s_r; "code" (official
    repository reds-lab/preference-learning-with-rationales): -log sigma(z) - log sigma(gamma s_r), which has slope gamma
    while s_r is very negative and damps later. Which of the two gave the reported numbers is UNVERIFIED.

    Attributes:
        gamma: weight of the rationale; 0.1 as released.
        form: "paper" or "code".
    """

    gamma: float = 0.1
    form: Literal["paper", "code"] = "paper"

    name: ClassVar[str] = "rationale_dpo"
    title: ClassVar[str] = "DPO with rationales"
    paper: ClassVar[str] = "2407.14477"
    composition: ClassVar[str] = "log-ratio -> beta (w - l) -> logistic; - gamma log-likelihood of the rationale"
    needs: ClassVar[Needs] = needs("pairs", "items")

    def check(self, kind: Kind) -> None:
        if kind is not Kind.TOKEN:
            raise IncompatibleObjective(self.name, kind, "there is no text head to score a rationale with", "use dpo")
        super().check(kind)

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return None

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        layout = Layout.of(layout)
        pairs = layout.need_pairs()
        rows = layout.need_items().index
        if len(rows) != len(pairs):
            raise ValueError(
                f"rationale_dpo needs one rationale per pair; got {len(rows)} items and {len(pairs)} pairs"
            )
        s = self.gamma * scores.theta[rows]
        out = super().__call__(scores, pairs)
        loss = out.per_item + pairs.weight * (-s if self.form == "paper" else -logsigmoid(s))
        return LossOut(loss, out.metrics | detached(logps__rationale=scores.theta[rows]))
