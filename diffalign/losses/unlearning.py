"""Unlearning: objectives on a set to forget and a set to retain.

    loss = gamma * (mean of the forget loss over the forget set) + alpha * (mean of the retain loss over the retain set)

Rows are `Items` with label 0 (forget) and 1 (retain); where there are only pairs, rejected rows are forgotten and chosen
ones retained. Each side has its own mean, whatever the sizes of the two sides, and may be empty. `Items.weight` multiplies
the losses, for per-item risks and importances (see `unlearning_tools`). Formulas and defaults follow
locuslab/open-unlearning, with one difference: averages over positions are over the *response*; its KL retain loss, UNDIAL
and PDU average over all positions, prompt and padding included (`positions: all`).

Caution: random 5 % subsets of the usual forget sets give about the same result as the whole (arXiv 2504.10185), so a
benchmark number says less about the forget set than it seems to.

Shapes: N rows, U units, M items, R rows of one side.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.losses import vocabulary
from diffalign.losses.base import (
    AnyLayout,
    IncompatibleObjective,
    LossOut,
    Needs,
    Objective,
    TokenStatistic,
    as_rows,
    detached,
    needs,
)
from diffalign.losses.fine_grained import masked_sum
from diffalign.losses.layouts import Items, Layout
from diffalign.losses.pairwise import BETA
from diffalign.losses.reduce import masked_mean
from diffalign.losses.scores import Cap, Kind, Scores

KL = "kl_ref_theta"


def item_needs(*caps: Cap, reference: bool = False, stats: tuple[str, ...] = ()) -> Needs:
    """Needs of an objective on labelled items, or on the rows of pairs."""
    return Needs(layout=("items",), or_layout=("pairs",), reference=reference, caps=frozenset(caps), stats=stats)


@dataclass(frozen=True)
class Side:
    """The rows to forget, or those to retain, of a batch.

    Attributes:
        rows: int64, (R,).
        weight: of their losses, scalar or (R,).
        share: values averaged in the step divided by rows of this side in the step: the factor that turns the mean over
            everything into a mean over this side.
        items, units: of this side in the step; None where only the batch is known.
    """

    rows: Tensor
    weight: Tensor | float
    share: float
    items: float | None = None
    units: float | None = None

    def average(self, sums: Tensor, length: Tensor | None, reduction: Literal["token", "sequence"]) -> Tensor:
        """Sums over units to values per row, (R,), whose mean over this side is the mean over units or over rows."""
        if length is None:
            return sums
        if reduction == "sequence":
            return sums / length.clamp(min=1)
        if self.items is None or self.units is None:
            return sums * len(sums) / length.sum().clamp(min=1)
        return sums * self.items / max(self.units, 1.0)

    def without(self, tokens: int) -> Side:
        """The same with that many units fewer per row."""
        known = self.items is not None and self.units is not None
        return replace(self, units=self.units - tokens * self.items) if known else self  # type: ignore[operator]


def split(scores: Scores, items: Items, pairs: int = 0) -> tuple[Tensor, Side, Side]:
    """Where to retain, bool (M,), and the sides to forget and to retain; `pairs` to be forgotten are averaged over as well.

    Raises:
        ValueError: items without labels.
    """
    if items.label is None:
        raise ValueError("unlearning needs items.label: 0 to forget, 1 to retain")
    keep = items.label > 0.5
    totals = scores.totals
    counted = totals is not None and totals.positive_items is not None
    total = float(totals.items) if totals is not None and counted else float(len(items) + pairs)
    positive = float(totals.positive_items or 0.0) if totals is not None and counted else float(keep.sum())
    sides = []
    for mask, count in ((~keep, total - positive), (keep, positive)):
        weight = items.weight[mask] if isinstance(items.weight, Tensor) else items.weight
        units = None
        if totals is not None and counted and totals.positive_units is not None:
            units = totals.positive_units if mask is keep else totals.units - totals.positive_units
        share = total / max(count, 1.0)
        sides.append(Side(items.index[mask], weight, share, count if counted else None, units))
    return keep, sides[0], sides[1]


# -- base -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Retaining(Objective):
    """Base of everything with a retain set: its losses and averages.

    Attributes:
        gamma: weight of the forget loss.
        alpha: weight of the retain loss.
        retain: "nll": the imitation loss; "kl": KL(reference || policy) per position; "none".
        reduction: of losses over units: "token": mean over all tokens of a side, as the released code; "sequence": mean over
            rows of each one's mean.
        positions: of vocabulary statistics: "response", or "all": every position supplied counts, as in the released code.
    """

    gamma: float = 1.0
    alpha: float = 1.0
    retain: Literal["nll", "kl", "none"] = "nll"
    reduction: Literal["token", "sequence"] = "token"
    positions: Literal["response", "all"] = "response"

    instead: ClassVar[str] = "set objective.retain: nll"

    def required_caps(self, kind: Kind) -> frozenset[Cap]:
        more = {"nll": {Cap.IMITATION}, "kl": {Cap.VOCABULARY, Cap.UNITS}, "none": set()}[self.retain]
        return self.needs.caps | more

    def reads_reference(self) -> bool:
        return self.needs.reference or self.retain == "kl"

    def statistic(self) -> Mapping[str, TokenStatistic]:
        """The forget loss's own vocabulary statistics."""
        return {}

    def vocabulary(self) -> Mapping[str, TokenStatistic]:
        own = dict(self.statistic())
        return own | {KL: vocabulary.kl_ref_theta} if self.retain == "kl" else own

    def over_positions(self, x: Tensor, scores: Scores, side: Side) -> Tensor:
        """A vocabulary statistic (N, U) averaged over positions, per row of `side`, (R,)."""
        mask = scores.need_units().mask[side.rows]
        mask = torch.ones_like(mask) if self.positions == "all" else mask
        # The counts of the step are of response tokens, and say nothing about other positions.
        known = side if self.positions == "response" else Side(side.rows, side.weight, side.share)
        return known.average(masked_sum(x[side.rows], mask), mask.sum(1), self.reduction)

    def over_tokens(self, x: Tensor, scores: Scores, side: Side) -> Tensor:
        """Values per unit (N, U) averaged over the response, per row of `side`, (R,)."""
        mask = scores.need_units().mask[side.rows]
        return side.average(masked_sum(x[side.rows], mask), mask.sum(1), self.reduction)

    def imitation(self, scores: Scores, side: Side) -> Tensor:
        """The imitation loss per row of `side`, (R,)."""
        length = None if scores.length is None else scores.length[side.rows]
        return side.average(scores.need_imitation()[side.rows], length, self.reduction)

    def retained(self, scores: Scores, side: Side) -> Tensor:
        """The retain loss per row of `side`, (R,)."""
        if self.retain == "nll":
            return self.imitation(scores, side)
        if self.retain == "kl":
            return self.over_positions(scores.need_vocabulary(KL), scores, side)
        return 0.0 * scores.theta[side.rows]


@dataclass(frozen=True, kw_only=True)
class Unlearning(Retaining):
    """Base of methods that forget items: each says what forgetting a row costs."""

    @abstractmethod
    def forget(self, scores: Scores, side: Side) -> Tensor:
        """The forget loss per row of `side`, (R,)."""

    def forget_metrics(self, scores: Scores, side: Side) -> dict[str, Tensor]:
        """Metrics of the method itself."""
        return {}

    def retain_factor(self, stats: Mapping[str, Tensor] | None) -> Tensor | float:
        """The weight of the retain loss."""
        return self.alpha

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        keep, forget, retain = split(scores, Layout.of(layout).as_items())
        lost, kept = self.forget(scores, forget), self.retained(scores, retain)
        per_item = torch.zeros(len(keep), dtype=scores.theta.dtype, device=scores.theta.device)
        per_item = per_item.masked_scatter(~keep, lost * forget.weight * (self.gamma * forget.share))
        factor = as_rows(self.retain_factor(stats), per_item)
        per_item = per_item.masked_scatter(keep, kept * retain.weight * (factor * retain.share))
        metrics = detached(forget__loss=lost, retain__loss=kept, retain__weight=factor.reshape(1))
        name = "logps" if scores.error is None else "scores"
        metrics |= {f"{name}/forget": scores.theta[forget.rows].detach()}
        metrics |= {f"{name}/retain": scores.theta[retain.rows].detach()}
        return LossOut(per_item, metrics | self.forget_metrics(scores, forget))


# -- on likelihoods ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GA(Unlearning):
    """Gradient ascent on what is to be forgotten: + mean log-probability of its tokens. arXiv id from memory.

    The slope stays 1 for ever, so the model collapses if it is not stopped: a baseline. On denoising scores the error is
    pushed up without bound, which needs `max_loss`.

    Attributes:
        max_loss: a row stops counting once its imitation loss (nats per token, or squared error) reaches this.
    """

    retain: Literal["nll", "kl", "none"] = "none"
    max_loss: float | None = None

    name: ClassVar[str] = "ga"
    title: ClassVar[str] = "Gradient ascent"
    paper: ClassVar[str] = "2210.01504?"
    composition: ClassVar[str] = "- NLL of forget rows"
    needs: ClassVar[Needs] = item_needs(Cap.IMITATION)
    parity: ClassVar[str] = "open-unlearning GradAscent (formula)"

    def check(self, kind: Kind) -> None:
        super().check(kind)
        if kind is Kind.BOUND and self.max_loss is None:
            raise IncompatibleObjective(
                self.name,
                kind,
                "ascent on a denoising error has no bound and diverges",
                "set objective.max_loss, or use npo",
            )

    def forget(self, scores: Scores, side: Side) -> Tensor:
        length = None if scores.length is None else scores.length[side.rows]
        loss = scores.need_imitation()[side.rows]
        if self.max_loss is not None:
            loss = loss.clamp(max=self.max_loss if length is None else self.max_loss * length.to(loss.dtype))
        return -side.average(loss, length, self.reduction)


@dataclass(frozen=True, kw_only=True)
class GradDiff(GA):
    """Gradient difference: ascent on the forget set, descent (or a divergence) on the retain set. arXiv id from memory.

    gamma 1, alpha 1 (open-unlearning). Its released KL retain loss divides by all positions, padding included.
    """

    retain: Literal["nll", "kl", "none"] = "nll"

    name: ClassVar[str] = "grad_diff"
    title: ClassVar[str] = "Gradient difference"
    paper: ClassVar[str] = "2401.06121?"
    composition: ClassVar[str] = "- NLL of forget rows; + NLL or KL of retain rows"
    parity: ClassVar[str] = "open-unlearning GradDiff (formula)"


@dataclass(frozen=True, kw_only=True)
class NPO(Unlearning):
    """Negative preference optimisation (arXiv 2404.05868): -(2 / beta) log sigma(-beta rho) on forget rows.

    rho is summed over tokens. It is 2 / beta times DPO with the winner's log-ratio held at 0. The slope in rho is
    2 sigma(beta rho): 1 at the start, in (0, 2) always, and falling like 2 exp(beta rho) for what is already forgotten, so
    it does not explode as gradient ascent does; as beta -> 0 it *is* gradient ascent. Repositories store NLL, hence a sign:
    -rho is nll - nll_ref. On denoising scores it is a one-sided logistic on rejected images.

    Attributes:
        beta: 0.1 on tokens (gamma = alpha = 1).
    """

    beta: float | None = None

    name: ClassVar[str] = "npo"
    title: ClassVar[str] = "NPO"
    paper: ClassVar[str] = "2404.05868?"
    composition: ClassVar[str] = "log-ratio -> -beta rho -> logistic, 2 / beta, on forget rows; + retain"
    needs: ClassVar[Needs] = item_needs(Cap.DIFFERENCE, reference=True)
    parity: ClassVar[str] = "open-unlearning NPO (formula)"
    default_beta: ClassVar[Mapping[Kind, float]] = BETA

    def __post_init__(self) -> None:
        if self.beta is not None and self.beta <= 0:
            raise ValueError(f"beta is {self.beta}; expected a positive number")

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return self.gamma * 2 / self.beta_for(kind) * math.log(2) if self.retain == "none" else None

    def forget(self, scores: Scores, side: Side) -> Tensor:
        beta = self.beta_for(scores.kind)
        return -2 / beta * logsigmoid(-beta * scores.log_ratio()[side.rows])

    def forget_metrics(self, scores: Scores, side: Side) -> dict[str, Tensor]:
        rho = scores.log_ratio()[side.rows]
        return detached(forget__log_ratio=rho, forget__slope=2 * (self.beta_for(scores.kind) * rho).sigmoid())


@dataclass(frozen=True, kw_only=True)
class SimNPO(Unlearning):
    """SimNPO (Fan et al. 2024, arXiv 2410.07163): -(2 / beta) log sigma(-beta mean log p - beta delta) on forget rows.

    Length-normalised and reference-free: no weight depends on how well the base model knew a row. The slope in the mean
    log-probability s is 2 sigma(beta (s + delta)), below 1 from the start as s < 0.

    beta 4.5, delta 0, gamma 0.125 (open-unlearning); the official TOFU forget05 run uses beta 2.5, gamma 0.1375.

    Attributes:
        beta: see above.
        delta: shift, in nats per token.
    """

    gamma: float = 0.125
    beta: float = 4.5
    delta: float = 0.0

    name: ClassVar[str] = "simnpo"
    title: ClassVar[str] = "SimNPO"
    paper: ClassVar[str] = "2410.07163"
    composition: ClassVar[str] = "mean log p -> -beta (s + delta) -> logistic, 2 / beta, on forget rows; + retain"
    needs: ClassVar[Needs] = item_needs(Cap.ABSOLUTE, Cap.LENGTH)
    parity: ClassVar[str] = "open-unlearning SimNPO (formula)"
    instead: ClassVar[str] = "use npo, which compares with a reference"

    def forget(self, scores: Scores, side: Side) -> Tensor:
        s = scores.theta[side.rows] / scores.need_length()[side.rows]
        return -2 / self.beta * logsigmoid(-self.beta * (s + self.delta))


@dataclass(frozen=True, kw_only=True)
class IdkDPO(Retaining):
    """DPO with an alternative answer as the winner: -(2 / beta) log sigma(beta (rho_alternative - rho_forget)).

    Chosen rows of the pairs are the alternatives ("I don't know"), rejected ones what is to be forgotten; items labelled 1
    are the retain set. arXiv id from memory.

    Attributes:
        beta: 0.1 on tokens.
    """

    beta: float | None = None

    name: ClassVar[str] = "idk_dpo"
    title: ClassVar[str] = "IdkDPO"
    paper: ClassVar[str] = "2401.06121?"
    composition: ClassVar[str] = "log-ratio -> beta (alternative - forget) -> logistic, 2 / beta; + retain"
    needs: ClassVar[Needs] = needs("pairs", "items")
    parity: ClassVar[str] = "open-unlearning DPO (formula)"
    default_beta: ClassVar[Mapping[Kind, float]] = BETA

    def __post_init__(self) -> None:
        if self.beta is not None and self.beta <= 0:
            raise ValueError(f"beta is {self.beta}; expected a positive number")

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return self.gamma * 2 / self.beta_for(kind) * math.log(2) if self.retain == "none" else None

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        layout = Layout.of(layout)
        pairs, beta, rho = layout.need_pairs(), self.beta_for(scores.kind), scores.log_ratio()
        items = layout.need_items() if self.retain != "none" else Items(index=pairs.w[:0], label=pairs.w[:0].float())
        keep, forget, retain = split(scores, items, pairs=len(pairs))
        if not bool(keep.all()):
            raise ValueError(
                "idk_dpo retains its items, which need label 1; what it forgets are rejected rows of pairs"
            )
        z = beta * (rho[pairs.w] - rho[pairs.l])
        lost, kept = -2 / beta * logsigmoid(z - pairs.margin), self.retained(scores, retain)
        lost_share = lost * pairs.weight * (self.gamma * forget.share)
        kept_share = kept * retain.weight * (self.alpha * retain.share)
        return LossOut(
            torch.cat([lost_share, kept_share]), detached(forget__loss=lost, retain__loss=kept, rewards__margins=z)
        )


@dataclass(frozen=True, kw_only=True)
class D2O(Objective):
    """Distributional dispreference optimisation (arXiv 2403.03419): own samples against one disliked response.

    -log sigma(beta mean_k [s(y_k) - s_minus(y_k)] - alpha [s(y_l) - s_plus(y_l)]): K samples of the model itself stand for
    what is acceptable, so no good responses are needed. `Lists` hold both: gain > 0 marks own samples, gain 0 the disliked
    response (their mean, if there are several). s_minus is a harmful-leaning and s_plus a helpful-leaning reference, which
    may be the same model: `Scores.ref` of own samples is s_minus, of disliked responses s_plus. K = 1 with one reference
    and alpha = beta is DPO.

    beta 0.1 and K 11 are a third party's (agentsea/dark.rl); the paper's own constants are UNVERIFIED.

    Attributes:
        beta: of own samples.
        alpha: of the disliked response; None takes beta.
    """

    beta: float | None = None
    alpha: float | None = None

    name: ClassVar[str] = "d2o"
    title: ClassVar[str] = "D2O"
    paper: ClassVar[str] = "2403.03419"
    composition: ClassVar[str] = "log-ratio -> beta mean(own samples) - alpha disliked -> logistic"
    needs: ClassVar[Needs] = needs("lists")
    default_beta: ClassVar[Mapping[Kind, float]] = BETA

    def __post_init__(self) -> None:
        if self.beta is not None and self.beta <= 0:
            raise ValueError(f"beta is {self.beta}; expected a positive number")

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return math.log(2)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        lists = Layout.of(layout).need_lists()
        beta = self.beta_for(scores.kind)
        rho = scores.log_ratio()[lists.index.masked_fill(~lists.mask, 0)]
        own, disliked = (
            masked_mean(rho, lists.mask & (lists.gain > 0)),
            masked_mean(rho, lists.mask & (lists.gain <= 0)),
        )
        z = beta * own - (beta if self.alpha is None else self.alpha) * disliked
        metrics = detached(rewards__margins=z, log_ratio__own=own, log_ratio__disliked=disliked)
        return LossOut(-logsigmoid(z), metrics)
