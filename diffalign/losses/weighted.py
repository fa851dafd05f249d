"""Margins, weights, label dynamics and several objectives at once.

What separates these from DPO is a number per pair: a margin subtracted from z, a weight on the loss, a label that moves, a
beta that follows the batch. Where such a number is merely given (a verifier's weight, a latency), the objective only says
which column it reads.

Shapes: P pairs, N rows, K rewards, G prompts, C candidates of each, D degrees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from diffalign.losses import links, reduce
from diffalign.losses.base import AnyLayout, IncompatibleObjective, LossOut, Needs, as_rows, detached, needs, read_stat
from diffalign.losses.estimators import BetaDPOStats, DynamicLabels
from diffalign.losses.layouts import Layout, Pairs
from diffalign.losses.pairwise import BETA, LogisticPair, PairObjective, pair_metrics
from diffalign.losses.scores import Cap, Kind, Scores, lift

DPO_BETA = BETA | {Kind.BOUND: 5000.0}  # of the sigmoid DPO they modify


def _rewards(pairs: Pairs, what: str) -> tuple[Tensor, Tensor]:
    if pairs.reward_w is None or pairs.reward_l is None:
        raise ValueError(f"pairs.reward_w and pairs.reward_l are missing; expected {what}")
    return pairs.reward_w.detach(), pairs.reward_l.detach()


@dataclass(frozen=True, kw_only=True)
class LikeDPO(LogisticPair):
    """Base: DPO's logit, link and defaults."""

    default_beta: ClassVar[Mapping[Kind, float]] = DPO_BETA


@dataclass(frozen=True, kw_only=True)
class WeighedDPO(LikeDPO):
    """Base: DPO whose loss at policy == reference depends on the data."""

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return None


# -- margins ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MODPO(PairObjective):
    """Multi-objective DPO (Zhou et al. 2023, arXiv 2310.03708; ZHZisZZ/modpo): other rewards enter as a margin.

    For the target E[sum_k w_k r_k] - beta KL with comparisons on the first objective only:
    z = (beta / w_1) Delta - (1 / w_1) sum_{k >= 2} w_k (r_k(y_w) - r_k(y_l)). Mind the minus: a chosen item that is ahead on
    the other rewards needs less. The rewards (`pairs.reward_w`, `pairs.reward_l`, (P, K - 1)) are in units of z, the same
    beta; implicit rewards beta rho of another adapter are. A small w_1 blows up the gradient.

    Defaults: beta 0.1, weights 0.5, 0.5 (official code).

    Attributes:
        weights: w_1 (of the compared objective), w_2, ...
        temperatures: of the other rewards, by which they are divided: the one at which sigma of a difference is the
            probability that people prefer (fit it on held-out pairs). Empty: 1 each.
        mode: link, "logistic" or "hinge".
    """

    weights: tuple[float, ...] = (0.5, 0.5)
    temperatures: tuple[float, ...] = ()
    mode: Literal["logistic", "hinge"] = "logistic"

    name: ClassVar[str] = "modpo"
    title: ClassVar[str] = "MODPO"
    paper: ClassVar[str] = "2310.03708"
    composition: ClassVar[str] = "log-ratio -> beta / w_1 (w - l) - reward margin / w_1 -> logistic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.weights) < 2 or self.weights[0] <= 0:
            raise ValueError(f"weights are {self.weights}; expected at least two, the first positive")
        if self.temperatures and (len(self.temperatures) != len(self.weights) - 1 or min(self.temperatures) <= 0):
            raise ValueError(
                f"temperatures are {self.temperatures}; expected {len(self.weights) - 1} positive numbers, one for each "
                "weight but the first, or none"
            )

    def summary(self) -> dict[str, float | str]:
        return super().summary() | {"weights": ", ".join(f"{w:g}" for w in self.weights)}

    def link(self, z: Tensor, p: Tensor | float, beta: float) -> Tensor:
        return links.logistic(z, p) if self.mode == "logistic" else links.hinge(z, p)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs = Layout.of(layout).need_pairs()
        reward_w, reward_l = _rewards(pairs, f"{len(self.weights) - 1} margin rewards per item")
        first, *rest = self.weights
        if reward_w.shape[1] != len(rest):
            raise ValueError(f"got {reward_w.shape[1]} margin rewards; weights {self.weights} expect {len(rest)}")
        beta = self.beta_for(scores.kind)
        w, l = self.sides(scores, pairs)
        rest = [w / t for w, t in zip(rest, self.temperatures or (1.0,) * len(rest), strict=True)]
        margin = (reward_w - reward_l) @ reward_w.new_tensor(rest)
        z = (beta * (w - l) - margin) / first - pairs.margin
        metrics = pair_metrics(beta * (w - l), beta * w, beta * l, scores, pairs)
        return LossOut(pairs.weight * self.link(z, pairs.p, beta), metrics | detached(rewards__other_margin=margin))


@dataclass(frozen=True, kw_only=True)
class SimulPL(WeighedDPO):
    """SimulPL (arXiv id unknown): preferences of simultaneous translation, with latency as a margin.

    The public repository has no code and the objective is not known here. This is what the margin algebra of `modpo` gives
    for a reward of minus the latency: z = beta Delta + latency_weight (latency_w - latency_l); a slower chosen item gets a
    head start, so it is pushed less. Latencies: first column of `pairs.reward_w`, `pairs.reward_l`, lower is better.

    Attributes:
        latency_weight: units of z per unit of latency, >= 0.
    """

    latency_weight: float

    name: ClassVar[str] = "simulpl"
    title: ClassVar[str] = "SimulPL"
    composition: ClassVar[str] = "log-ratio -> beta (w - l) + latency margin -> logistic"
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = "the published objective (arXiv id and formula not found); the read / write policy's part"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latency_weight < 0:
            raise ValueError(f"latency_weight is {self.latency_weight}; expected >= 0")

    def target_margin(self, scores: Scores, pairs: Pairs, beta: float) -> Tensor | float:
        latency_w, latency_l = _rewards(pairs, "the latency of each item")
        return pairs.margin - self.latency_weight * (latency_w - latency_l)[:, 0]


# -- weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class VerifierDPO(WeighedDPO):
    """Hard-negative, verifier-weighted DPO (MathVerifier; arXiv id unknown): mean(weight x -log sigma(z)).

    The weight of a pair comes from a verifier's error profile of the rejected answer (wrongness and absurdity; near misses
    with wrong structure weigh most). How it is computed is not known here: it is the data's column `weight`, which this
    objective insists on.

    Attributes:
        weight_reduction: "mean" of weighted losses, or "weighted_mean": divided by the sum of weights.
    """

    weight_reduction: reduce.WeightReduction = "mean"

    name: ClassVar[str] = "verifier_dpo"
    title: ClassVar[str] = "Verifier-weighted DPO"
    composition: ClassVar[str] = "log-ratio -> beta (w - l) -> logistic -> verifier weight"
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = "how the weight follows from the verifier's scores (arXiv id not found)"

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        layout = Layout.of(layout)
        pairs = layout.need_pairs()
        if not isinstance(pairs.weight, Tensor):
            raise ValueError("pairs.weight is missing; expected the verifier's weight per pair (else use dpo)")
        weight = reduce.normalised_weight(pairs.weight.detach(), self.weight_reduction)
        out = super().__call__(scores, replace(layout, pairs=replace(pairs, weight=weight)), stats)
        return LossOut(out.per_item, out.metrics | detached(weight=weight))


@dataclass(frozen=True, kw_only=True)
class MADPO(WeighedDPO):
    """Margin-adaptive DPO (arXiv 2510.05342): -w(h) log sigma(z), h the margin of a separately trained reward model.

    w is continuous, above 1 for hard pairs (small or negative h), below 1 for easy ones; nothing is filtered. The published
    function is not known here. Ours: w = clip(2 sigma(-(h - center) / temperature), low, high), which is 1 at the center;
    override `weight` for another. With hard labels a weight changes the size of the gradient only, never its direction.

    h: first column of `pairs.reward_w` minus `pairs.reward_l`.

    Attributes:
        center, temperature: in units of h.
        low, high: limits of the weight.
    """

    center: float = 0.0
    temperature: float = 1.0
    low: float = 0.1
    high: float = 2.0

    name: ClassVar[str] = "madpo"
    title: ClassVar[str] = "MADPO"
    paper: ClassVar[str] = "2510.05342"
    composition: ClassVar[str] = "log-ratio -> beta (w - l) -> logistic -> weight of a reward margin"
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = "the weight function w(h) and its constants; what is here is our own choice"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0 or not 0 <= self.low <= self.high:
            raise ValueError(
                f"temperature {self.temperature}, low {self.low}, high {self.high}; expected > 0 and 0 <= low <= high"
            )

    def weight(self, h: Tensor) -> Tensor:
        """Weight of a reward margin, not increasing, bounded; (P,) to (P,)."""
        return (2 * (-(h - self.center) / self.temperature).sigmoid()).clamp(self.low, self.high)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        layout = Layout.of(layout)
        pairs = layout.need_pairs()
        reward_w, reward_l = _rewards(pairs, "the reward model's score of each item")
        weight = self.weight((reward_w - reward_l)[:, 0])
        out = super().__call__(scores, replace(layout, pairs=replace(pairs, weight=pairs.weight * weight)), stats)
        return LossOut(out.per_item, out.metrics | detached(weight=weight))


# -- beta of the batch -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BetaDPO(LikeDPO):
    """beta-DPO (Wu et al. 2024, arXiv 2407.08639?; junkangwu/beta-DPO): a beta per batch, and a filter of outliers.

    beta_b = max(beta (1 + a (mean over kept pairs of Delta - M)), 1e-3), without gradient; M and S are moving averages over
    batches of the mean and deviation of the *raw* Delta = rho_w - rho_l, and 1 - q of the pairs are kept, drawn with weight
    exp(-((Delta - M) / S)^2 / 2). The loss uses beta_b, logged rewards use beta. All of it over all processes
    (`estimators.BetaDPOStats`, which also says how the draw is made and how the averages start; the official averages start
    at 0, which breaks the first draws; it also divides by the kept pairs of each process, which may be none).

    Delta on denoising errors is of order 1 / beta, so there the deviation of the *logit* beta Delta drives beta_b
    (`delta_unit: z`).

    Defaults: beta 0.1, a 0.6, q 0.2, decay 0.9 (README of the official code).

    Attributes:
        sensitivity: a.
        drop: q.
        decay: of the moving averages.
        seed: of the draws.
        delta_unit: "log_ratio" as published, or "z".
    """

    sensitivity: float = 0.6
    drop: float = 0.2
    decay: float = 0.9
    seed: int = 0
    delta_unit: Literal["log_ratio", "z"] = "log_ratio"

    name: ClassVar[str] = "beta_dpo"
    title: ClassVar[str] = "beta-DPO"
    paper: ClassVar[str] = "2407.08639?"
    composition: ClassVar[str] = "log-ratio -> beta of the batch (w - l) -> logistic -> mean over kept pairs"
    needs: ClassVar[Needs] = needs("pairs", stats=("mean", "std", "kept_mean", "keep"))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.estimator()  # refuses drop and decay outside [0, 1)

    def check(self, kind: Kind) -> None:
        super().check(kind)
        if kind is Kind.BOUND and self.delta_unit == "log_ratio":
            raise IncompatibleObjective(
                self.name,
                kind,
                "differences of denoising errors are of order 1 / beta, so beta would never move",
                "set objective.delta_unit: z",
            )

    def estimator(self) -> BetaDPOStats:
        return BetaDPOStats(drop=self.drop, decay=self.decay, seed=self.seed)

    def batch_beta(self, beta: float, stats: Mapping[str, Tensor] | None, like: Tensor) -> Tensor:
        """beta_b, scalar."""
        away = read_stat(stats, "kept_mean", like) - read_stat(stats, "mean", like)
        unit = beta if self.delta_unit == "z" else 1.0
        return (beta * (1 + self.sensitivity * unit * away)).clamp(min=1e-3)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs = Layout.of(layout).need_pairs()
        beta = self.beta_for(scores.kind)
        w, l = self.sides(scores, pairs)
        beta_b, keep = self.batch_beta(beta, stats, w), read_stat(stats, "keep", w)
        loss = pairs.weight * keep * self.link(beta_b * (w - l) - pairs.margin, pairs.p, beta)
        metrics = pair_metrics(beta * (w - l), beta * w, beta * l, scores, pairs)
        return LossOut(loss, metrics | detached(beta=beta_b.reshape(1), kept=(keep > 0).to(w.dtype)))


# -- labels that move ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MovingLabels(PairObjective):
    """Mix-in: the label of a pair follows the model.

    p <- (1 - rate) p + rate sigma(z), without gradient, per pair and visit, from p = 1, updated before use
    (`estimators.DynamicLabels`). The gradient sigma(z) - p vanishes where label and model agree.

    Attributes:
        rate: gamma in [0, 1]; no published value is known here.
    """

    rate: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self.estimator()  # refuses a rate outside [0, 1]

    def logit(self, scores: Scores, pairs: Pairs) -> Tensor:
        """z per pair, (P,)."""
        beta = self.beta_for(scores.kind)
        w, l = self.sides(scores, pairs)
        return beta * (w - l) - self.target_margin(scores, pairs, beta)

    def estimator(self) -> DynamicLabels:
        return DynamicLabels(self.rate, self.logit)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        layout = Layout.of(layout)
        p = read_stat(stats, "p", scores.theta)
        pairs = replace(layout.need_pairs(), p=p)
        out = super().__call__(scores, replace(layout, pairs=pairs), stats)
        return LossOut(out.per_item, out.metrics | detached(label=p))


@dataclass(frozen=True, kw_only=True)
class DynamicLabelDPO(MovingLabels, LikeDPO):
    """DPO with POWER-DL's dynamic labels (arXiv 2412.09544), see `MovingLabels`.

    Keeps the reference, so it runs on denoising errors, unlike `power_dl`.
    """

    name: ClassVar[str] = "dynamic_label_dpo"
    title: ClassVar[str] = "DPO with dynamic labels"
    paper: ClassVar[str] = "2412.09544"
    composition: ClassVar[str] = "log-ratio -> beta (w - l) -> logistic at a label that moves"
    needs: ClassVar[Needs] = needs("pairs", stats=("p",))
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = "the update rule (from memory), its rate, and whether a label moves before its use"


@dataclass(frozen=True, kw_only=True)
class POWER(PairObjective):
    """POWER: weighted-entropy preference optimisation without a reference (arXiv 2412.09544).

    -log sigma(beta [w_w s_w - w_l s_l + w_w - w_l]) - eta beta w_w s_w, with w = 1 / tokens. At w = 1 it is CPO with its
    imitation term weighted by eta beta (of the token *sum*).

    Attributes:
        eta: weight of the imitation term; no published value is known here.
        weighting: "length": w = 1 / tokens, or "one".
    """

    eta: float
    weighting: Literal["length", "one"] = "length"

    name: ClassVar[str] = "power"
    title: ClassVar[str] = "POWER"
    paper: ClassVar[str] = "2412.09544"
    composition: ClassVar[str] = "score / length + 1 / length -> beta (w - l) -> logistic + imitation of the chosen"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.ABSOLUTE, Cap.LENGTH), reference=False)
    default_beta: ClassVar[Mapping[Kind, float]] = {}
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = "both formulas are from memory; beta, eta and the weights in use"
    instead: ClassVar[str] = "use dynamic_label_dpo, which keeps the reference, or mapo without one"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta < 0:
            raise ValueError(f"eta is {self.eta}; expected >= 0")

    def required_caps(self, kind: Kind) -> frozenset[Cap]:
        return self.needs.caps if self.weighting == "length" else self.needs.caps - {Cap.LENGTH}

    def row_weight(self, scores: Scores) -> Tensor:
        """w per row, (N,)."""
        return 1 / scores.need_length() if self.weighting == "length" else torch.ones_like(scores.theta)

    def transform(self, scores: Scores) -> Tensor:
        return self.row_weight(scores) * (scores.theta + 1)

    def link(self, z: Tensor, p: Tensor | float, beta: float) -> Tensor:
        return links.logistic(z, p)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        layout = Layout.of(layout)
        out = super().__call__(scores, layout, stats)
        pairs = layout.need_pairs()
        imitation = -self.row_weight(scores)[pairs.w] * scores.theta[pairs.w]
        weight = self.eta * self.beta_for(scores.kind) * as_rows(pairs.weight, imitation)
        return LossOut(out.per_item + weight * imitation, out.metrics | detached(imitation=imitation))


@dataclass(frozen=True, kw_only=True)
class POWERDL(MovingLabels, POWER):
    """POWER-DL: POWER with dynamic labels (arXiv 2412.09544); see `POWER` and `MovingLabels`."""

    name: ClassVar[str] = "power_dl"
    title: ClassVar[str] = "POWER-DL"
    composition: ClassVar[str] = "score / length + 1 / length -> beta (w - l) -> logistic at a moving label + imitation"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.ABSOLUTE, Cap.LENGTH), reference=False, stats=("p",))
    unknown: ClassVar[str] = "both formulas are from memory; beta, eta, rate, and whether a label moves before its use"


@dataclass(frozen=True, kw_only=True)
class CREAM(LikeDPO):
    """CREAM (Wang et al. 2024, arXiv 2410.12735; Raibows/CREAM): C (-log sigma(z)) + (1 - C)(-log sigma(-z)).

    Self-rewarding with labels trusted as far as two successive models agree: C is the consistency of their rankings of the
    prompt's candidates (`pairing.rank_consistency`), given as `pairs.p`; the "avg" variant gives every pair the mean of C
    over the data. Conservative DPO with smoothing 1 - C per prompt. Join C to pairs by key (`pairing.join_by_key`): the
    official script zips two lists of which one skips prompts, and so shifts labels. beta 0.1: official code.
    """

    name: ClassVar[str] = "cream"
    title: ClassVar[str] = "CREAM"
    paper: ClassVar[str] = "2410.12735"
    composition: ClassVar[str] = "log-ratio -> beta (w - l) -> logistic at p = consistency"

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs = Layout.of(layout).need_pairs()
        if not isinstance(pairs.p, Tensor):
            raise ValueError(
                "pairs.p is missing; expected the consistency of each pair's prompt in [0, 1] (else use dpo)"
            )
        out = super().__call__(scores, layout, stats)
        return LossOut(out.per_item, out.metrics | detached(consistency=pairs.p))


# -- several terms ---------------------------------------------------------------------------------------------------


def _plus(out: LossOut, weight: float, term: Tensor, name: str) -> LossOut:
    """A loss per pair plus weight x the mean of another term over its own items."""
    mean = term.mean() if term.numel() else term.sum()
    return LossOut(out.per_item + weight * mean, out.metrics | {name: term.detach()})


@dataclass(frozen=True, kw_only=True)
class SPODegree(WeighedDPO):
    """Self-supervised preference optimisation (arXiv 2409.17791): DPO plus telling how much key content is missing.

    DPO + degree_weight x mean cross-entropy of a head that reads off a response how much of its key content was removed. The
    head and the responses are outside of the core: `scores.extra["degree_loss"]` (N,), with gradient, holds the
    cross-entropy (`degree_loss`) of the rows in `layout.items`.

    Attributes:
        degree_weight: lambda; no published value is known here.
    """

    degree_weight: float

    name: ClassVar[str] = "spo_degree"
    title: ClassVar[str] = "SPO (preference degree)"
    paper: ClassVar[str] = "2409.17791"
    composition: ClassVar[str] = "DPO + cross-entropy of the degree of removed content"
    needs: ClassVar[Needs] = needs("pairs", "items", extra=("degree_loss",))
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = (
        "how key content is found, the number of degrees, lambda (the official repository is empty)"
    )

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        layout = Layout.of(layout)
        out = super().__call__(scores, layout, stats)
        if "degree_loss" not in scores.extra:
            raise ValueError("scores.extra['degree_loss'] is missing; expected the head's cross-entropy per row")
        term = lift(scores.extra["degree_loss"])[layout.need_items().index]
        return _plus(out, self.degree_weight, term, "degree_loss")


def degree_loss(logits: Tensor, degree: Tensor) -> Tensor:
    """Cross-entropy of the degree of removed content per row, (N,), of logits (N, D) from a head on pooled hidden states."""
    return cross_entropy(lift(logits), degree, reduction="none")


@dataclass(frozen=True, kw_only=True)
class MAPL(WeighedDPO):
    """Multi-level preference learning (MAPL; arXiv id unknown): DPO between responses plus DPO between prompts.

    The mean logistic loss over `layout.pairs` (two responses to one instruction, or to several) plus condition_weight times
    that over `layout.conditions` (one response, two prompts that differ in a constraint). What is published on weights and
    on how samples are built is not known here.

    Attributes:
        condition_weight: of the second term.
    """

    condition_weight: float

    name: ClassVar[str] = "mapl"
    title: ClassVar[str] = "MAPL"
    composition: ClassVar[str] = "DPO between responses + DPO between conditions"
    needs: ClassVar[Needs] = needs("pairs", "conditions")
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = "the weights of the levels and how samples are built (arXiv id not found)"

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        layout = Layout.of(layout)
        out = super().__call__(scores, layout, stats)
        if layout.conditions is None:
            raise ValueError("layout.conditions is missing; expected pairs of rows that differ in their prompt")
        between = super().__call__(scores, layout.conditions, stats)
        return _plus(out, self.condition_weight, between.per_item, "condition_loss")
