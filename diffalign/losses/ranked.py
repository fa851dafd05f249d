"""Objectives on ranked lists, trees and steps.

Shapes: G lists of at most L rows, N rows, U units, S steps, P pairs.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, logsigmoid

from diffalign.losses import links
from diffalign.losses.base import AnyLayout, BetaObjective, IncompatibleObjective, LossOut, Needs, detached, needs
from diffalign.losses.layouts import Layout, Lists
from diffalign.losses.pairwise import BETA, PairObjective
from diffalign.losses.scores import Cap, Kind, Scores, Units, lift

Gain = Literal["exponential", "linear"]

# -- list losses as functions ----------------------------------------------------------------------------------------


def plackett_luce(u: Tensor, gain: Tensor, mask: Tensor) -> Tensor:
    """sum_k [logsumexp over {j: gain_j <= gain_k} of u_j - u_k] per list, (G,).

    For a strict order this is the Plackett-Luce likelihood of the ranking, and for two rows -log sigma(u_w - u_l). Rows of
    equal gain each compete with all of their tie (Breslow's form), so no order is invented for them.

    Args:
        u: scaled scores, (G, L); gradient flows.
        gain: higher is better, (G, L).
        mask: bool (G, L).
    """
    u = lift(u).masked_fill(~mask, 0.0)
    itself = torch.eye(u.shape[1], dtype=torch.bool, device=u.device)
    # rivals[g, k, j]: j is not better than k. A padded k keeps itself, so that its logsumexp is finite before it is masked.
    rivals = (gain[:, None, :] <= gain[:, :, None]) & mask[:, None, :] | itself
    spread = u[:, None, :].expand_as(rivals).masked_fill(~rivals, -torch.inf)
    return ((spread.logsumexp(-1) - u) * mask).sum(1)


def model_ranks(u: Tensor, gain: Tensor, mask: Tensor) -> Tensor:
    """Rank of every row by the model's score, 1 for the highest, float (G, L); padded rows come last.

    Equal scores (all, at the start) are ranked by gain, which does not depend on the order of listing.
    """
    by_gain = gain.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    scores = u.detach().masked_fill(~mask, -torch.inf).gather(1, by_gain)
    order = by_gain.gather(1, scores.argsort(dim=1, descending=True, stable=True))
    places = torch.arange(1, u.shape[1] + 1, device=u.device).expand_as(order)
    return torch.zeros_like(order).scatter(1, order, places).to(u.dtype)


def lambda_weights(u: Tensor, gain: Tensor, mask: Tensor, form: Gain = "exponential") -> Tensor:
    """|G_i - G_j| |1/D_i - 1/D_j|, G = 2^gain - 1 (or gain), D = log(1 + rank by the model); (G, L, L), no gradient."""
    worth = (gain.clamp(max=links.EXP_LIMIT).exp2() - 1) if form == "exponential" else gain
    discount = 1 / model_ranks(u, gain, mask).log1p()
    return (worth[:, :, None] - worth[:, None, :]).abs() * (discount[:, :, None] - discount[:, None, :]).abs()


def pairwise_logistic(u: Tensor, gain: Tensor, mask: Tensor, weight: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Sum over the ordered pairs of a list of weight x -log sigma(u_i - u_j) where gain_i > gain_j, and their number.

    Returns:
        (sum, number of such pairs), each (G,).
    """
    u = lift(u).masked_fill(~mask, 0.0)
    better = (gain[:, :, None] > gain[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    loss = -logsigmoid(u[:, :, None] - u[:, None, :]) * weight
    return loss.masked_fill(~better, 0.0).sum((1, 2)), better.sum((1, 2)).to(u.dtype)


# -- objectives on lists ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ListObjective(BetaObjective):
    """Base of objectives on ranked lists: u = beta times the transformed score of every row, then a loss per list.

    Attributes:
        beta: strength of the pull to the reference. None takes the default of the kind of score.
    """

    needs: ClassVar[Needs] = needs("lists")
    default_beta: ClassVar[Mapping[Kind, float]] = BETA

    def transform(self, scores: Scores) -> Tensor:
        """What is ranked, per row, (N,): the log-ratio, unless a method says otherwise."""
        return scores.log_ratio()

    @abstractmethod
    def list_loss(self, u: Tensor, lists: Lists) -> Tensor:
        """Loss per list of scaled scores u (G, L), (G,)."""

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        lists = Layout.of(layout).need_lists()
        # Padded places may hold any index.
        rows = lists.index.masked_fill(~lists.mask, 0)
        u = self.beta_for(scores.kind) * self.transform(scores)[rows]
        loss = self.list_loss(u, lists)
        best = lists.gain.masked_fill(~lists.mask, -torch.inf).argmax(1, keepdim=True)
        top = u.detach().masked_fill(~lists.mask, -torch.inf)
        count = lists.mask.sum(1).clamp(min=1)
        metrics = detached(
            implicit_acc=(top.gather(1, best) >= top.amax(1, keepdim=True))[:, 0].to(u.dtype),
            rewards__best=u.gather(1, best)[:, 0],
            rewards__mean=u.masked_fill(~lists.mask, 0.0).sum(1) / count,
        )
        return LossOut(loss, metrics)


@dataclass(frozen=True, kw_only=True)
class PlackettLuce(ListObjective):
    """Plackett-Luce ranking loss, the list form of DPO (Rafailov et al. 2023, arXiv 2305.18290, appendix A.3).

    Two rows give DPO exactly. `lists.gain` only orders: its values do not enter. Ties: see `plackett_luce`.
    """

    name: ClassVar[str] = "plackett_luce"
    title: ClassVar[str] = "Plackett-Luce DPO"
    paper: ClassVar[str] = "2305.18290"
    composition: ClassVar[str] = "log-ratio -> beta rho -> Plackett-Luce over the list"

    def list_loss(self, u: Tensor, lists: Lists) -> Tensor:
        return plackett_luce(u, lists.gain, lists.mask)


@dataclass(frozen=True, kw_only=True)
class LambdaRank(ListObjective):
    """LiPO-lambda (Liu et al. 2024, arXiv 2402.01878?): pairwise logistic weighted by what a swap would change in DCG.

    1 / pairs sum over {gain_i > gain_j} of |G_i - G_j| |1/D_i - 1/D_j| (-log sigma(beta (rho_i - rho_j))), G = 2^gain - 1,
    D = log(1 + rank), the rank by the model's current log-ratios (no gradient). G grows exponentially: gains are meant to be
    grades or win rates of order 1. Rows equal in score are ranked by gain.

    Attributes:
        gain: "exponential" as above, or "linear": G = gain.
    """

    gain: Gain = "exponential"

    name: ClassVar[str] = "lambda_rank"
    title: ClassVar[str] = "LiPO-lambda"
    paper: ClassVar[str] = "2402.01878?"
    composition: ClassVar[str] = "log-ratio -> beta (u_i - u_j) -> logistic -> lambda weight -> mean over ordered pairs"

    def list_loss(self, u: Tensor, lists: Lists) -> Tensor:
        weight = lambda_weights(u, lists.gain, lists.mask, self.gain)
        total, number = pairwise_logistic(u, lists.gain, lists.mask, weight)
        return total / number.clamp(min=1)


# -- trees -----------------------------------------------------------------------------------------------------------


def step_means(x: Tensor, units: Units) -> tuple[Tensor, Tensor]:
    """Mean over the units of every step, (N, S) or (N, S, D), and which steps have units, bool (N, S).

    Args:
        x: per unit, (N, U) or (N, U, D).
        units: with `segment`, ids 1 to S; 0 is no step.

    Raises:
        ValueError: there are no segments.
    """
    if units.segment is None:
        raise ValueError("units.segment is missing; expected the number (from 1) of the step every unit belongs to")
    x = lift(x)
    segment = units.segment.masked_fill(~units.mask, 0)
    steps = int(segment.max()) + 1
    count = x.new_zeros(len(x), steps).scatter_add(1, segment, torch.ones_like(segment, dtype=x.dtype))[:, 1:]
    index = segment if x.ndim == 2 else segment[:, :, None].expand_as(x)
    sums = x.new_zeros(len(x), steps, *x.shape[2:]).scatter_add(1, index, x)[:, 1:]
    divisor = count.clamp(min=1)
    return sums / (divisor if x.ndim == 2 else divisor[:, :, None]), count > 0


def step_similarity_weights(hidden: Tensor, units: Units, lists: Lists) -> Tensor:
    """TPO's adaptive weight per unit: 1 + cosine of its step's mean hidden state and that of the best response's same step.

    For `Units.weight`; steps that the best response does not have get 1 (cosine 0), rows outside of all lists too.

    Args:
        hidden: of the response's units, (N, U, D); no gradient is taken.
        units: with `segment`.
        lists: whose best row is compared with; a row belongs to one list.

    Returns:
        (N, U), in [0, 2].
    """
    mean, _ = step_means(hidden.detach(), units)
    best = lists.gain.masked_fill(~lists.mask, -torch.inf).argmax(1)
    best_row = lists.index.gather(1, best[:, None]).expand_as(lists.index)
    partner = torch.arange(len(mean), device=mean.device)
    partner[lists.index[lists.mask]] = best_row[lists.mask]
    cosine = cosine_similarity(mean, mean[partner], dim=-1)  # 0 where one of them has no such step: its mean is 0
    listed = torch.zeros_like(partner, dtype=torch.bool)
    listed[lists.index[lists.mask]] = True
    per_step = torch.cat([torch.zeros_like(cosine[:, :1]), cosine * listed[:, None]], 1)
    assert units.segment is not None  # step_means has read it
    return 1 + per_step.gather(1, units.segment.masked_fill(~units.mask, 0))


@dataclass(frozen=True, kw_only=True)
class TPOTree(ListObjective):
    """Tree preference optimisation (arXiv 2410.12854?): ranks the leaves of a tree of thoughts with adaptive step rewards.

    The score of a row is the weighted mean over its steps (`units.segment`) of the step's mean log-ratio per unit; the
    weight of a step is the mean `units.weight` over it (`step_similarity_weights`; None is 1). Lists are ranked by
    pairwise logistic losses divided by N (N - 1), N rows, as in the official code (MrBlankness/TPO:loss.py).

    That code then minimises -log sigma(beta L_rank), which *increases* the ranking loss L_rank; here L_rank is minimised
    itself. The paper's text describes lambda weights, its code has none: they are a setting.

    Attributes:
        lambda_weighted: weigh pairs as `lambda_rank` does and divide by the number of ordered pairs.
    """

    lambda_weighted: bool = False

    name: ClassVar[str] = "tpo_tree"
    title: ClassVar[str] = "TPO (tree)"
    paper: ClassVar[str] = "2410.12854?"
    composition: ClassVar[str] = "weighted mean of step log-ratios -> beta (u_i - u_j) -> logistic -> mean over pairs"
    needs: ClassVar[Needs] = needs("lists", caps=(Cap.DIFFERENCE, Cap.UNITS))
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = (
        "lambda weights and adaptive step reward of the paper (only the code was read, whose outer sign is inverted); beta; "
        "which of them the reported numbers belong to"
    )

    def check(self, kind: Kind) -> None:
        super().check(kind)
        if kind is Kind.BOUND:
            raise IncompatibleObjective(
                self.name, kind, "elements of a latent do not form reasoning steps", "use lambda_rank or plackett_luce"
            )

    def transform(self, scores: Scores) -> Tensor:
        units = scores.need_units()
        if units.ref is None:
            raise ValueError("this objective compares with a reference per unit; scores.units.ref is missing")
        reward, there = step_means(lift(units.theta) - lift(units.ref), units)
        if units.weight is None:
            weight = there.to(reward.dtype)
        else:
            weight = step_means(units.weight.detach(), units)[0] * there
        return (weight * reward).sum(1) / weight.sum(1).clamp(min=1e-6)

    def list_loss(self, u: Tensor, lists: Lists) -> Tensor:
        if self.lambda_weighted:
            weight = lambda_weights(u, lists.gain, lists.mask)
            total, number = pairwise_logistic(u, lists.gain, lists.mask, weight)
            return total / number.clamp(min=1)
        total, _ = pairwise_logistic(u, lists.gain, lists.mask)
        size = lists.mask.sum(1)
        return total / (size * (size - 1)).clamp(min=1)


# -- steps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StepDPO(PairObjective):
    """DPO on sibling steps (MCTS-DPO, Xie et al. 2024, arXiv 2405.00451; YuxiXie/MCTS-DPO).

    Only units from the first one that differs between the two rows on are summed (`units.segment` is not 0 there; see
    `pairing.divergence_segments`), over the number of them to the power `length_power`. The conservative mode is a soft
    label: `pairs.p` = `pairing.conservative_label` of the tree search's confidence.

    Attributes:
        length_power: kappa; 0 sums, 1 is the mean.
        mode: "logistic", or "ipo": (difference - 1 / (2 beta))^2.
    """

    length_power: float = 0.0
    mode: Literal["logistic", "ipo"] = "logistic"

    name: ClassVar[str] = "step_dpo"
    title: ClassVar[str] = "Step-DPO (MCTS-DPO)"
    paper: ClassVar[str] = "2405.00451"
    composition: ClassVar[str] = "log-ratio from the first difference on / n^kappa -> beta (w - l) -> logistic"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.DIFFERENCE, Cap.UNITS))

    def check(self, kind: Kind) -> None:
        super().check(kind)
        if kind is Kind.BOUND:
            raise IncompatibleObjective(
                self.name, kind, "elements of a latent have no order in which two samples branch", "use dpo"
            )

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return math.log(2) if self.mode == "logistic" else 0.25 / self.beta_for(kind) ** 2

    def transform(self, scores: Scores) -> Tensor:
        units = scores.need_units()
        if units.ref is None or units.segment is None:
            missing = "ref" if units.ref is None else "segment"
            raise ValueError(
                f"step_dpo sums log-ratios from the first difference on; scores.units.{missing} is missing"
            )
        part = units.mask & (units.segment != 0)
        total = (lift(units.theta) - lift(units.ref)).masked_fill(~part, 0.0).sum(1)
        return total / part.sum(1).clamp(min=1).to(total.dtype) ** self.length_power

    def link(self, z: Tensor, p: Tensor | float, beta: float) -> Tensor:
        return links.logistic(z, p) if self.mode == "logistic" else links.square(z, p, beta)
