"""Objectives for general preferences P(y > y'): self-play and Nash learning.

Preferences need not come from a reward (they may be circular), so what is looked for is the equilibrium of a game. Methods
differ in what a log-ratio is regressed on. Most take the policy of the current round as the reference: its scores then
stand in `Scores.ref` (see `references`).

Shapes: G prompts, k samples of each, P pairs, M items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.losses import links
from diffalign.losses.base import (
    AnyLayout,
    BetaObjective,
    IncompatibleObjective,
    LossOut,
    Needs,
    Objective,
    as_rows,
    detached,
    needs,
)
from diffalign.losses.layouts import Items, Layout, Pairs
from diffalign.losses.pairwise import PairObjective, pair_metrics
from diffalign.losses.references import geometric_mixture
from diffalign.losses.scores import Cap, Kind, Scores, lift

Scale = Literal["paper", "unit"]

# -- preferences -----------------------------------------------------------------------------------------------------


def win_rates(preference: Tensor) -> Tensor:
    """Win rate of every sample against the other samples of its prompt, 1 / (k - 1) sum over j != i of P_ij, (G, k).

    The reward of minimalist self-play (SPO, arXiv 2401.04056?), for any policy-gradient method. In [0, 1]; the mean over a
    prompt's samples is exactly 1/2 where P_ij + P_ji = 1.

    Args:
        preference: P[g, i, j], probability that i is preferred to j, (G, k, k), k >= 2; the diagonal is not read.

    Raises:
        ValueError: not square, or a single sample.
    """
    p = lift(preference)
    k = p.shape[-1]
    if p.ndim != 3 or p.shape[1] != k or k < 2:
        raise ValueError(f"preference has shape {tuple(p.shape)}; expected (prompts, k, k) with k >= 2")
    diagonal = torch.eye(k, dtype=torch.bool, device=p.device)
    return p.masked_fill(diagonal, 0.0).sum(-1) / (k - 1)


def gpm_score(v: Tensor, other: Tensor, block_scale: Tensor | None = None) -> Tensor:
    """Score s(v > other) of the general preference model, <R v, v'>, any leading shape.

    R is block-diagonal with [[0, -1], [1, 0]], so per block v_0 v'_1 - v_1 v'_0: antisymmetric, 0 against oneself, and able
    to be circular, which no difference of rewards is. arXiv 2410.02197; general-preference/general-preference-model.

    Args:
        v, other: embeddings from a head without bias, (..., 2m), broadcast against each other.
        block_scale: >= 0 per block, (..., m), of the prompt; None is 1.

    Raises:
        ValueError: an odd last axis.
    """
    if v.shape[-1] % 2:
        raise ValueError(f"embedding has {v.shape[-1]} dimensions; expected an even number")
    v, other = lift(v).unflatten(-1, (-1, 2)), lift(other).unflatten(-1, (-1, 2))
    blocks = v[..., 0] * other[..., 1] - v[..., 1] * other[..., 0]
    return (blocks if block_scale is None else blocks * block_scale).sum(-1)


def gpm_probability(score: Tensor, tau: float = 0.1) -> Tensor:
    """P(y > y') = sigma(score / tau)."""
    return (lift(score) / tau).sigmoid()


def gpm_loss(score: Tensor, tau: float = 0.1, target: float | None = None) -> Tensor:
    """Loss of the general preference model per pair, of s(w > l): -log sigma(s / tau), or (s - target)^2.

    The official code has the second with target 10, and a learned tau as a variant of the first.
    """
    score = lift(score)
    return -logsigmoid(score / tau) if target is None else (score - target).square()


def gpm_against_group(v: Tensor, block_scale: Tensor | None = None) -> Tensor:
    """Mean score of every sample against the other samples of its prompt, (G, k): the target of `gpo`.

    k embeddings instead of k^2 calls of a judge. The published pipeline stores s(i, j) - s(j, i), which is twice the score.

    Args:
        v: (G, k, 2m).
        block_scale: (G, m) or None.
    """
    scale = None if block_scale is None else block_scale[:, None, None, :]
    return win_rates(gpm_score(v[:, :, None], v[:, None, :], scale))


# -- regression on win rates -----------------------------------------------------------------------------------------


def _refuse_paper_scale(objective: Objective, kind: Kind, scale: str) -> None:
    if kind is Kind.BOUND and scale == "paper":
        raise IncompatibleObjective(
            objective.name,
            kind,
            "dividing by beta^2 with beta in the thousands leaves gradients of 1e-8",
            "set objective.scale: unit",
        )


def _regression(rho: Tensor, target: Tensor, beta: float, scale: str) -> Tensor:
    """(rho - target / beta)^2, or, as "unit", beta^2 times that."""
    loss = (beta * rho - target).square()
    return loss / beta**2 if scale == "paper" else loss


def _column(value: Tensor | None, what: str) -> Tensor:
    if value is None:
        raise ValueError(f"pairs.reward_w and pairs.reward_l are missing; expected {what}")
    return value[:, 0]


@dataclass(frozen=True, kw_only=True)
class SPPO(BetaObjective):
    """Self-play preference optimisation (Wu et al. 2024, arXiv 2405.00675; uclaml/SPPO:sppo/trainer.py).

    1/2 [(rho_w - (P_w - 1/2) / beta)^2 + (rho_l - (P_l - 1/2) / beta)^2], with the current round's policy as the
    reference and P the win rate of the item against that policy's samples. The hard form equals, before halving,
    1/2 (Delta - 1 / beta)^2 + 1/2 (rho_w + rho_l)^2: IPO's target and an anchor on the sum, which stops both from falling.

    Official code and paper halve and use soft win rates (PairRM, five samples); TRL's `sppo_hard` does neither. The official
    one is followed; `halve=False, win_rate="hard"` is TRL's.

    beta 1e-3: paper and official scripts (with RMSprop at 5e-7). `pairs.margin` is not read.

    Attributes:
        win_rate: "soft": `pairs.reward_w`, `pairs.reward_l` (first column), in [0, 1]. "hard": p and 1 - p.
        halve: as above.
        scale: "paper", or "unit": times beta^2, compulsory on denoising scores.
    """

    win_rate: Literal["soft", "hard"] = "soft"
    halve: bool = True
    scale: Scale = "paper"

    name: ClassVar[str] = "sppo"
    title: ClassVar[str] = "SPPO"
    paper: ClassVar[str] = "2405.00675"
    composition: ClassVar[str] = "log-ratio to the round's policy -> each item -> square at (P - 1/2) / beta"
    parity: ClassVar[str] = "TRL DPOTrainer sppo_hard (hard, not halved)"
    needs: ClassVar[Needs] = needs("pairs")
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 1e-3}

    def check(self, kind: Kind) -> None:
        super().check(kind)
        _refuse_paper_scale(self, kind, self.scale)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs = Layout.of(layout).need_pairs()
        beta = self.beta_for(scores.kind)
        rho = scores.log_ratio()
        win_w, win_l = self._win_rates(pairs, rho)
        loss = _regression(rho[pairs.w], win_w - 0.5, beta, self.scale)
        loss = loss + _regression(rho[pairs.l], win_l - 0.5, beta, self.scale)
        z = beta * (rho[pairs.w] - rho[pairs.l])
        metrics = pair_metrics(z, beta * rho[pairs.w], beta * rho[pairs.l], scores, pairs)
        return LossOut(pairs.weight * (0.5 * loss if self.halve else loss), metrics)

    def _win_rates(self, pairs: Pairs, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.win_rate == "soft":
            what = "win rates in [0, 1] against the policy's samples (or set win_rate: hard)"
            return _column(pairs.reward_w, what), _column(pairs.reward_l, what)
        p = as_rows(pairs.p, like).expand(len(pairs))
        return p, 1 - p


@dataclass(frozen=True, kw_only=True)
class GPO(BetaObjective):
    """General preference optimisation (Zhang et al. 2024, arXiv 2410.02197): (rho - s(y > pi_t) / beta)^2 per item.

    `items.target` is the item's mean score against samples of the current round's policy, whose scores stand in `ref`:
    of the general preference model (`gpm_against_group`, half of what the published pipeline stores), or P - 1/2, which
    is SPPO. beta 1e-3: official scripts.

    Attributes:
        scale: "paper", or "unit": times beta^2, compulsory on denoising scores.
    """

    scale: Scale = "paper"

    name: ClassVar[str] = "gpo"
    title: ClassVar[str] = "GPO"
    paper: ClassVar[str] = "2410.02197"
    composition: ClassVar[str] = "log-ratio to the round's policy -> each item -> square at score / beta"
    needs: ClassVar[Needs] = needs("items")
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 1e-3}

    def check(self, kind: Kind) -> None:
        super().check(kind)
        _refuse_paper_scale(self, kind, self.scale)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        items = Layout.of(layout).need_items()
        target = _target(items, "score against the policy's samples")
        beta = self.beta_for(scores.kind)
        rho = scores.log_ratio()[items.index]
        loss = items.weight * _regression(rho, target, beta, self.scale)
        return LossOut(loss, detached(rewards__implicit=beta * rho, rewards__target=target))


def _target(items: Items, what: str) -> Tensor:
    if items.target is None:
        raise ValueError(f"items.target is missing; expected the {what} per item")
    return items.target


# -- pairs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DNO(PairObjective):
    """Direct Nash optimisation (Rosset et al. 2024, arXiv 2404.03715?).

    -p log sigma(z) - (1 - p) log sigma(-z), z = beta (rho_w - rho_l) with the current round's policy as the reference, and
    p = sigma(r(y_w) - r(y_l)), r the item's win rate against that policy (`pairs.reward_w`, `pairs.reward_l`, first column).
    Its minimiser is pi_t exp(r / beta), normalised; beta is the paper's eta and has no published default here.

    Attributes:
        labels: "soft" as above. "hard": `pairs.p`, for pairs that differ by at least `min_gap`, the rest weighs 0 (DNO-Prct;
            its threshold and how the teacher's samples join the pool are UNVERIFIED).
        min_gap: smallest r(y_w) - r(y_l) of a pair that counts; hard labels only.
    """

    labels: Literal["soft", "hard"] = "soft"
    min_gap: float = 0.0

    name: ClassVar[str] = "dno"
    title: ClassVar[str] = "DNO"
    paper: ClassVar[str] = "2404.03715?"
    composition: ClassVar[str] = (
        "log-ratio to the round's policy -> beta (w - l) -> logistic at sigma(win-rate difference)"
    )
    default_beta: ClassVar[Mapping[Kind, float]] = {}
    aliases: ClassVar[Mapping[str, str]] = {"eta": "beta", "beta_dpo": "beta"}

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return math.log(2) if self.labels == "soft" else None

    def link(self, z: Tensor, p: Tensor | float, beta: float) -> Tensor:
        return links.logistic(z, p)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        layout = Layout.of(layout)
        pairs = layout.need_pairs()
        what = "win rates in [0, 1] against the policy's samples"
        gap = (_column(pairs.reward_w, what) - _column(pairs.reward_l, what)).detach()
        if self.labels == "soft":
            pairs = replace(pairs, p=gap.sigmoid())
        else:
            pairs = replace(pairs, weight=pairs.weight * (gap >= self.min_gap))
        return super().__call__(scores, replace(layout, pairs=pairs), stats)


@dataclass(frozen=True, kw_only=True)
class INPO(PairObjective):
    """Iterative Nash policy optimisation (Zhang et al. 2024, arXiv 2407.00617?): (h - 1 / (2 beta))^2, winner first.

    h is the difference of log-ratios to the geometric mixture ref^a old^(1 - a) of the fixed reference (`ref`) and the
    current round's policy (`old`), a = tau / eta; beta is the paper's eta. The minimiser over the policy's own pairs is
    ref^a old^(1 - a) exp(P(y > old) / beta), normalised. Sums over tokens.

    Defaults beta 0.1 and a = 1/3: a third party's code (yale-nlp/COMAL:losses.py); the original eta is UNVERIFIED.

    Attributes:
        mixture: a in [0, 1], share of the fixed reference; 1 is IPO on sums.
        scale: "paper", or "unit": times beta^2, compulsory on denoising scores.
    """

    mixture: float = 1 / 3
    scale: Scale = "paper"

    name: ClassVar[str] = "inpo"
    title: ClassVar[str] = "INPO"
    paper: ClassVar[str] = "2407.00617?"
    composition: ClassVar[str] = "log-ratio to ref^a old^(1-a) -> beta (w - l) -> square at 1/2"
    parity: ClassVar[str] = ""
    needs: ClassVar[Needs] = needs("pairs", old=True)
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 0.1}
    aliases: ClassVar[Mapping[str, str]] = {"eta": "beta", "beta_dpo": "beta"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mixture <= 1:
            raise ValueError(f"mixture is {self.mixture}; expected tau / eta in [0, 1]")

    def check(self, kind: Kind) -> None:
        super().check(kind)
        _refuse_paper_scale(self, kind, self.scale)

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return None  # the mixture differs from the policy from the second round on

    def transform(self, scores: Scores) -> Tensor:
        if scores.ref is None or scores.old is None:
            raise ValueError(
                "inpo mixes the reference (scores.ref) and the round's policy (scores.old); one is missing"
            )
        return scores.theta - geometric_mixture((scores.ref, scores.old), (self.mixture, 1 - self.mixture))

    def link(self, z: Tensor, p: Tensor | float, beta: float) -> Tensor:
        return links.square(z, p, beta if self.scale == "paper" else None)


@dataclass(frozen=True, kw_only=True)
class OnlineIPO(PairObjective):
    """Online IPO and the inner loss of EGPO (arXiv 2503.08942; zhourunlong/EGPO): (Delta - target / beta)^2.

    Version 1: target = P(y > y'') - P(y' > y''), y and y' from the reference (or uniform), y'' from the policy, one or
    several averaged: `pairs.reward_w`, `pairs.reward_l` (first column). Minimiser for a given opponent: ref exp(g / beta),
    g the win rate. Version 2: target = P(y > y') - 1/2, y and y' from the policy: `pairs.p`. "Chosen" then only names
    the first row. EGPO is `references.extragradient_update` with version 1.

    beta: the published runs sweep it, so there is no default.

    Attributes:
        version: 1 or 2.
        reduction: of a row's log-ratio on tokens: "sum" as in the theory, or "mean" as the official code does by default.
        scale: "paper", or "unit": times beta^2, compulsory on denoising scores.
    """

    version: Literal[1, 2] = 1
    reduction: Literal["sum", "mean"] = "sum"
    scale: Scale = "paper"

    name: ClassVar[str] = "online_ipo"
    title: ClassVar[str] = "Online IPO / EGPO"
    paper: ClassVar[str] = "2503.08942"
    composition: ClassVar[str] = "log-ratio -> beta (y - y') -> square at a difference of win rates"
    default_beta: ClassVar[Mapping[Kind, float]] = {}

    def check(self, kind: Kind) -> None:
        super().check(kind)
        _refuse_paper_scale(self, kind, self.scale)

    def transform(self, scores: Scores) -> Tensor:
        rho = scores.log_ratio()
        return rho / scores.need_length() if scores.kind is Kind.TOKEN and self.reduction == "mean" else rho

    def link(self, z: Tensor, p: Tensor | float, beta: float) -> Tensor:
        return (z - p).square() / (beta**2 if self.scale == "paper" else 1)

    def target(self, pairs: Pairs) -> Tensor | float:
        """What z is regressed on, scalar or (P,)."""
        if self.version == 2:
            return pairs.p - 0.5
        what = "P(y > y'') and P(y' > y'') against the policy's samples y'' (or set version: 2)"
        return _column(pairs.reward_w, what) - _column(pairs.reward_l, what)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs = Layout.of(layout).need_pairs()
        beta = self.beta_for(scores.kind)
        w, l = self.sides(scores, pairs)
        z = beta * (w - l) - pairs.margin
        loss = pairs.weight * self.link(z, self.target(pairs), beta)
        return LossOut(loss, pair_metrics(beta * (w - l), beta * w, beta * l, scores, pairs))


# -- policy gradients on preferences ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NashMD(BetaObjective):
    """Nash-MD (Munos et al. 2023, arXiv 2312.00886?): beta sum_t sg(rho_t) s_t - (P - 1/2) s per item.

    A score-function gradient of the win rate against the opponent, with the divergence from the reference per token. Items
    are fresh samples of the policy; `items.target` is P(y > y''), y'' drawn from the geometric mixture of policy and
    reference (`references.mixture_logits`). The value means nothing, its gradient does. As in TRL's trainer of version 1.10
    (not in 1.16), whose beta 0.1 is the default.

    Attributes:
        beta: weight of the divergence.
    """

    name: ClassVar[str] = "nash_md"
    title: ClassVar[str] = "Nash-MD"
    paper: ClassVar[str] = "2312.00886?"
    composition: ClassVar[str] = "score function of (P - 1/2) and of beta rho per unit"
    needs: ClassVar[Needs] = needs("items", caps=(Cap.ABSOLUTE, Cap.UNITS))
    instead: ClassVar[str] = "use online_ipo or sppo with scale: unit, which compare with a reference"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 0.1}

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        items = Layout.of(layout).need_items()
        win = _target(items, "probability of beating a sample of the mixture")
        units = scores.need_units()
        if units.ref is None:
            raise ValueError("this objective compares with a reference per unit; scores.units.ref is missing")
        theta = lift(units.theta).masked_fill(~units.mask, 0.0)[items.index]
        rho = (theta - lift(units.ref)[items.index]).masked_fill(~units.mask[items.index], 0.0)
        divergence = (rho.detach() * theta).sum(1)
        loss = self.beta_for(scores.kind) * divergence - (win - 0.5) * theta.sum(1)
        return LossOut(items.weight * loss, detached(win_rate=win, kl=rho.sum(1), logps=theta.sum(1)))


@dataclass(frozen=True, kw_only=True)
class XPO(PairObjective):
    """Exploratory preference optimisation (Xie et al. 2024, arXiv 2405.21046?): online DPO + alpha s(y_ref).

    One row of every pair was sampled from the policy, the other, y_ref, from the reference; `layout.items.index` names
    the latter, in the order of the pairs. The *plus* sign lowers the likelihood of the reference's samples: optimism.
    TRL's trainer of version 1.10 (not in 1.16), whose defaults are alpha 1e-5 and beta 0.1; its `ipo` sums tokens, unlike
    its offline one.

    Attributes:
        alpha: weight of the optimism.
        mode: "logistic", or "ipo": (Delta - 1 / (2 beta))^2 on sums.
    """

    alpha: float = 1e-5
    mode: Literal["logistic", "ipo"] = "logistic"

    name: ClassVar[str] = "xpo"
    title: ClassVar[str] = "XPO"
    paper: ClassVar[str] = "2405.21046?"
    composition: ClassVar[str] = "log-ratio -> beta (w - l) -> logistic + alpha score of the reference's sample"
    needs: ClassVar[Needs] = needs("pairs", "items", caps=(Cap.DIFFERENCE, Cap.ABSOLUTE))
    instead: ClassVar[str] = "use dpo on fresh samples"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 0.1}

    def link(self, z: Tensor, p: Tensor | float, beta: float) -> Tensor:
        return links.logistic(z, p) if self.mode == "logistic" else links.square(z, p, beta)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        layout = Layout.of(layout)
        out = super().__call__(scores, layout, stats)
        rows = layout.need_items().index
        if len(rows) != len(out.per_item):
            raise ValueError(
                f"got {len(rows)} items for {len(out.per_item)} pairs; expected the reference's row of each pair"
            )
        optimism = scores.theta[rows]
        return LossOut(out.per_item + self.alpha * optimism, out.metrics | detached(logps__reference_samples=optimism))
