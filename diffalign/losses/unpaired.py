"""Unpaired objectives: single items labelled desirable or undesirable (KTO, BCO and relatives).

Each item is compared with a reference point instead of with a partner, so the batch may hold any mixture of labels, one
class only included. With undesirable items only, `bco` at a reference point of 0 is beta / 2 times `npo`; labels between 0
and 1 mix both terms.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.losses import links
from diffalign.losses.base import AnyLayout, BetaObjective, LossOut, Needs, as_rows, detached, needs, read_stat
from diffalign.losses.estimators import BCODelta, KTOReference
from diffalign.losses.layouts import Items, Layout
from diffalign.losses.pairwise import BETA
from diffalign.losses.scores import Kind, Scores, lift


def need_labels(items: Items) -> Tensor:
    """Labels in [0, 1], (M,).

    Raises:
        ValueError: there are none.
    """
    if items.label is None:
        raise ValueError("items.label is missing; expected 1 (desirable) to 0 (undesirable) per item")
    return lift(items.label)


def item_metrics(implicit_reward: Tensor, label: Tensor, scores: Scores, items: Items) -> dict[str, Tensor]:
    """What every objective on labelled items reports, per class.

    Args:
        implicit_reward: beta times log-ratio, (M,).
        label: (M,); above 1/2 counts as desirable.
        scores, items: for raw scores and errors.
    """
    up = label > 0.5
    metrics = detached(
        rewards__desirable=implicit_reward[up],
        rewards__undesirable=implicit_reward[~up],
        implicit_acc=((implicit_reward > 0) == up).to(implicit_reward.dtype),
    )
    name, raw = ("error", scores.error) if scores.error is not None else ("logps", scores.theta)
    raw = raw[items.index].detach()
    return metrics | {f"{name}/desirable": raw[up], f"{name}/undesirable": raw[~up]}


def balanced_weights(desirable: int, undesirable: int, ratio: float = 1.0) -> tuple[float, float]:
    """Weights of the two classes with weight x count of desirable over undesirable items equal to `ratio`.

    The smaller product is raised, the other weight stays 1. KTO (arXiv 2402.01306) recommends a ratio of 1 to 4/3.

    Raises:
        ValueError: a class is empty.
    """
    if desirable < 1 or undesirable < 1 or ratio <= 0:
        raise ValueError(
            f"got {desirable} desirable, {undesirable} undesirable items, ratio {ratio}; expected all positive"
        )
    weight = ratio * undesirable / desirable
    return (weight, 1.0) if weight >= 1 else (1.0, 1 / weight)


# -- objectives ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ItemObjective(BetaObjective):
    """Base of objectives on labelled items with a reference: z = beta (rho - anchor), then a term per label.

    Attributes:
        beta: strength of the pull to the reference. None takes the default of the kind of score.
    """

    needs: ClassVar[Needs] = needs("items")
    default_beta: ClassVar[Mapping[Kind, float]] = BETA

    def anchor(self, stats: Mapping[str, Tensor] | None, like: Tensor) -> Tensor:
        """The log-ratio that items are compared with: 0 unless a method says otherwise."""
        return torch.zeros((), dtype=like.dtype, device=like.device)

    @abstractmethod
    def terms(self, z: Tensor, label: Tensor) -> Tensor:
        """Loss per item, (M,)."""

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        items = Layout.of(layout).need_items()
        label = need_labels(items)
        beta = self.beta_for(scores.kind)
        rho = scores.log_ratio()[items.index]
        anchor = self.anchor(stats, rho)
        loss = items.weight * self.terms(beta * (rho - anchor), label)
        metrics = item_metrics(beta * rho, label, scores, items)
        return LossOut(loss, metrics | detached(reference_point=as_rows(beta * anchor, rho).reshape(1)))


@dataclass(frozen=True, kw_only=True)
class APOZeroUnpaired(ItemObjective):
    """APO-zero on single items (D'Oosterlinck et al. 2024, arXiv 2408.06266): sigma(-beta rho) or sigma(beta rho).

    Raises desirable and lowers undesirable items, for data better than the model. It is KTO with the reference point at 0.
    Bounded: an item far off (|beta rho| >> 4) has no gradient. Default beta: TRL.

    Attributes:
        desirable_weight, undesirable_weight: factors of the two classes.
    """

    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    name: ClassVar[str] = "apo_zero_unpaired"
    title: ClassVar[str] = "APO-zero (unpaired)"
    paper: ClassVar[str] = "2408.06266"
    composition: ClassVar[str] = "log-ratio -> beta rho -> sigmoid per label"
    parity: ClassVar[str] = "TRL KTOTrainer apo_zero_unpaired"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.desirable_weight < 0 or self.undesirable_weight < 0:
            raise ValueError(
                f"class weights are {self.desirable_weight} and {self.undesirable_weight}; expected none below 0"
            )

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return 0.5 * self.desirable_weight if self.desirable_weight == self.undesirable_weight else None

    def terms(self, z: Tensor, label: Tensor) -> Tensor:
        up = self.desirable_weight * label * links.sigmoid(z)
        return up + self.undesirable_weight * (1 - label) * links.sigmoid(-z)


@dataclass(frozen=True, kw_only=True)
class KTO(APOZeroUnpaired):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306).

    desirable: lambda_D sigma(-beta (rho - z0)); undesirable: lambda_U sigma(-beta (z0 - rho)); mean over all items, as TRL
    does (the paper states the value 1 - sigma, which is the same). z0 = max(0, mean log-ratio over mismatched prompts and
    responses), detached, averaged over all processes and *then* clamped, estimated per step by `estimators.KTOReference`;
    `estimators.mismatched_partners` says which response to score under which prompt. It needs at least two prompts per
    batch: with one, the mismatched response is the matched one.

    On denoising errors this is Diffusion-KTO (arXiv 2404.04465) with reference_point "batch"; it writes beta = 5000 for
    differences of errors, which are twice the log-ratios here, so the default is 10000 (the released example leaves 1000 of
    its own units, against the paper).

    Other defaults: TRL. Choose weights with `balanced_weights`.

    Attributes:
        reference_point: "mismatched", or "batch": mean log-ratio of the items themselves (Diffusion-KTO).
    """

    reference_point: Literal["mismatched", "batch"] = "mismatched"

    name: ClassVar[str] = "kto"
    title: ClassVar[str] = "KTO"
    paper: ClassVar[str] = "2402.01306"
    composition: ClassVar[str] = "log-ratio -> beta (rho - z0) -> sigmoid per label"
    parity: ClassVar[str] = "TRL KTOTrainer kto"
    needs: ClassVar[Needs] = needs("items", stats=("z0",))
    default_beta: ClassVar[Mapping[Kind, float]] = BETA | {Kind.BOUND: 10000.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        KTOReference(self.reference_point)  # refuses unknown names

    def estimator(self) -> KTOReference:
        return KTOReference(self.reference_point)

    def anchor(self, stats: Mapping[str, Tensor] | None, like: Tensor) -> Tensor:
        return read_stat(stats, "z0", like)


@dataclass(frozen=True, kw_only=True)
class BCO(ItemObjective):
    """Binary classifier optimisation (Jung et al. 2024, arXiv 2404.04656).

    -log sigma(beta rho - delta) for desirable, -log sigma(-(beta rho - delta)) for undesirable items, with delta the running
    mean of beta rho over both classes, updated before use (`estimators.BCODelta`). The paper also weighs undesirable items
    by how desirable their prompt is: put `underlying_distribution_weight` into `items.weight`.

    beta 0.1: TRL's trainer (the paper's runs use 0.01). TRL's own `bco_pair` has no delta, and its documentation prints
    DPO's formula for it.
    """

    name: ClassVar[str] = "bco"
    title: ClassVar[str] = "BCO"
    paper: ClassVar[str] = "2404.04656"
    composition: ClassVar[str] = "log-ratio -> beta rho - delta -> logistic per label"
    needs: ClassVar[Needs] = needs("items", stats=("mean_log_ratio",))

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return math.log(2)

    def estimator(self) -> BCODelta:
        return BCODelta()

    def anchor(self, stats: Mapping[str, Tensor] | None, like: Tensor) -> Tensor:
        return read_stat(stats, "mean_log_ratio", like)

    def terms(self, z: Tensor, label: Tensor) -> Tensor:
        return links.logistic(z, label)


# -- weights of BCO --------------------------------------------------------------------------------------------------


def underlying_distribution_weight(probability: Tensor, low: float = 0.5, high: float = 10.0) -> Tensor:
    """Weight of an undesirable item: clamp(P(desirable | prompt) / P(undesirable | prompt), low, high), (M,).

    Source: BCO, arXiv 2404.04656; limits as in TRL. Desirable items keep weight 1.

    Args:
        probability: of a classifier that tells desirable from undesirable prompts, in [0, 1]; see `prompt_classifier`.
        low, high: limits.
    """
    p = lift(probability)
    return (p / (1 - p).clamp(min=1e-6)).clamp(low, high)


def prompt_classifier(embedding: Tensor, desirable: Tensor, penalty: float = 1.0, steps: int = 50) -> Tensor:
    """Logistic regression that tells the prompts of desirable from those of undesirable items, fitted by Newton's method.

    Both classes weigh the same in total, whatever their size. Minimises the sum of weighted logistic losses plus
    penalty / 2 times the squared coefficients (the intercept is free).

    Args:
        embedding: of prompts, (M, D); the paper's code fits 1024 of them.
        desirable: bool (M,).
        penalty: > 0.
        steps: of Newton's method, at most.

    Returns:
        Coefficients (D + 1,), intercept last, float64. `classifier_probability` applies them.

    Raises:
        ValueError: only one class.
    """
    up = desirable.double()
    counts = torch.stack([up.sum(), (1 - up).sum()])
    if penalty <= 0 or bool((counts == 0).any()):
        raise ValueError(f"classifier got {counts.tolist()} items per class, penalty {penalty}; expected all positive")
    x = torch.cat([embedding.double(), torch.ones_like(up)[:, None]], 1)
    weight = len(up) / 2 * (up / counts[0] + (1 - up) / counts[1])
    ridge = torch.full((x.shape[1],), penalty, dtype=x.dtype, device=x.device)
    ridge[-1] = 1e-9  # keeps the system regular where the intercept is not determined
    w = torch.zeros_like(ridge)
    for _ in range(steps):
        p = (x @ w).sigmoid()
        gradient = x.T @ (weight * (p - up)) + ridge * w
        hessian = (x * (weight * p * (1 - p))[:, None]).T @ x + ridge.diag()
        step = torch.linalg.solve(hessian, gradient)
        # Limited, since far from the optimum a full Newton step on logistic losses may overshoot.
        w = w - step * (10 / step.norm().clamp(min=10))
        if float(step.norm()) < 1e-10:
            break
    return w


def classifier_probability(coefficients: Tensor, embedding: Tensor) -> Tensor:
    """P(desirable | prompt) of `prompt_classifier`'s coefficients, (M,)."""
    return (embedding.double() @ coefficients[:-1] + coefficients[-1]).sigmoid()
