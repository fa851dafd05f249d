"""Imitation: fine-tuning on chosen, verified or weighted rows, and relatives of it.

They need no reference and no comparison; use them to start from, to keep what preference losses unlearn, or as the
baseline that a preference loss has to beat.

Shapes: N rows, U units, M items, G lists of at most L rows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.losses.advantages import total_reward
from diffalign.losses.base import AnyLayout, LossOut, Needs, Objective, detached, needs
from diffalign.losses.fine_grained import masked_sum
from diffalign.losses.layouts import Groups, Items, Layout
from diffalign.losses.reduce import masked_mean
from diffalign.losses.scores import Cap, Scores, lift
from diffalign.losses.transforms import log1mexp
from diffalign.losses.unlearning import split

Reduction = Literal["token", "sequence"]
WEIGHT_LIMIT = 1000.0  # of exp(advantage / beta), as in the released code


def average(
    sums: Tensor, length: Tensor | None, reduction: Reduction, items: float | None = None, units: float | None = None
) -> Tensor:
    """Sums over the units of rows to values, (R,), whose mean over everything averaged is the wanted mean.

    Args:
        sums: per row, (R,).
        length: units per row, (R,); None where a row has none (denoising scores).
        reduction: "token": mean over all units; "sequence": mean over rows of each one's mean.
        items, units: counts of the step: values averaged, and units of these rows; None takes this batch for the whole.
    """
    if length is None:
        return sums
    if reduction == "sequence":
        return sums / length.clamp(min=1)
    if items is None or units is None:
        return sums * len(sums) / length.sum().clamp(min=1)
    return sums * items / max(units, 1.0)


def row_loss(
    scores: Scores, rows: Tensor, reduction: Reduction, weight: Tensor | None = None, units: float | None = None
) -> Tensor:
    """Imitation loss of rows, (R,): see `average`; `weight` (R,) multiplies sums, units are counted without it."""
    loss = scores.need_imitation()[rows]
    length = None if scores.length is None else scores.length[rows]
    items = None if scores.totals is None else scores.totals.items
    return average(loss if weight is None else weight * loss, length, reduction, items, units)


# -- imitation of rows ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SFT(Objective):
    """Supervised fine-tuning: the negative log-likelihood of chosen rows; on denoising scores the denoising loss. no paper.

    Rows are items labelled 1 (all, where there are no labels), or the chosen rows of pairs. `weight` of items or pairs
    multiplies the loss. The values averaged are those of the imitated rows only.

    Attributes:
        reduction: on tokens, "token": mean over all tokens (TRL); "sequence": mean over rows of each one's mean.
    """

    reduction: Reduction = "token"

    name: ClassVar[str] = "sft"
    title: ClassVar[str] = "SFT"
    composition: ClassVar[str] = "NLL of chosen rows"
    needs: ClassVar[Needs] = Needs(
        layout=("items",), or_layout=("pairs",), reference=False, caps=frozenset({Cap.IMITATION}), labels=(1,)
    )
    parity: ClassVar[str] = "TRL DPOTrainer sft"

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        rows, weight = chosen_rows(Layout.of(layout))
        totals, units = scores.totals, None
        if totals is not None:
            units = totals.positive_units
            units = (totals.chosen_units or totals.units) if units is None else units
        loss = row_loss(scores, rows, self.reduction, weight, units)
        return LossOut(loss, imitation_metrics(scores, rows))


def chosen_rows(layout: Layout) -> tuple[Tensor, Tensor | None]:
    """Rows to imitate, (R,), and their weights, (R,) or None for ones."""
    items = layout.as_items()
    keep = torch.ones_like(items.index, dtype=torch.bool) if items.label is None else items.label > 0.5
    if isinstance(items.weight, Tensor):
        return items.index[keep], items.weight[keep]
    rows = items.index[keep]
    return rows, None if items.weight == 1.0 else torch.full(rows.shape, items.weight, device=rows.device)


def imitation_metrics(scores: Scores, rows: Tensor) -> dict[str, Tensor]:
    """The unweighted imitation loss of rows: nats per token, or the error."""
    loss = scores.need_imitation()[rows]
    if scores.error is not None:
        return detached(error__chosen=loss)
    return detached(imitation=loss if scores.length is None else loss / scores.need_length()[rows])


@dataclass(frozen=True, kw_only=True)
class RFT(Objective):
    """Rejection-sampling fine-tuning: imitation of the samples that a verifier accepts. arXiv id from memory.

    Samples come as groups; those whose reward (the sum, if there are several) exceeds `threshold` are imitated, and a
    prompt with many accepted samples counts for more.

    Attributes:
        threshold: samples with a larger reward are imitated.
        reduction: as SFT's.
    """

    threshold: float = 0.5
    reduction: Reduction = "token"

    name: ClassVar[str] = "rft"
    title: ClassVar[str] = "RFT"
    paper: ClassVar[str] = "2308.01825?"
    composition: ClassVar[str] = "NLL of accepted samples"
    needs: ClassVar[Needs] = needs("groups", caps=(Cap.IMITATION,), reference=False)

    def accepted(self, groups: Groups) -> Tensor:
        """Which samples are imitated, bool (M,)."""
        return total_reward(groups.reward) > self.threshold

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        groups = Layout.of(layout).need_groups()
        accepted = self.accepted(groups)
        rows = groups.index[accepted]
        metrics = imitation_metrics(scores, rows) | detached(accepted=accepted.to(scores.theta.dtype))
        units = None if scores.totals is None else scores.totals.positive_units
        return LossOut(row_loss(scores, rows, self.reduction, units=units), metrics)


@dataclass(frozen=True, kw_only=True)
class RAFT(RFT):
    """Reward-ranked fine-tuning: imitation of the best sample of every prompt. arXiv id from memory.

    Of samples with equal reward the first counts. `threshold` additionally leaves prompts out whose best is not above it.
    """

    threshold: float = -math.inf

    name: ClassVar[str] = "raft"
    title: ClassVar[str] = "RAFT"
    paper: ClassVar[str] = "2304.06767?"
    composition: ClassVar[str] = "NLL of the best sample of every group"

    def accepted(self, groups: Groups) -> Tensor:
        reward = total_reward(groups.reward)
        same = groups.group[:, None] == groups.group[None, :]
        place = torch.arange(len(reward), device=reward.device)
        better = (reward[None, :] > reward[:, None]) | (
            (reward[None, :] == reward[:, None]) & (place[None, :] < place[:, None])
        )
        return ~(same & better).any(1) & (reward > self.threshold)


@dataclass(frozen=True, kw_only=True)
class PoFT(Objective):
    """Preference-oriented fine-tuning (arXiv 2412.12865): be likelier than aligned models on the same response.

    -log sigma(beta (s - s_external) + gamma), s the mean log-probability per token, s_external = `Items.target`: the mean
    over aligned models of *their* mean log-probability of the response, computed beforehand. Where the gap is very
    negative it is SFT of weight beta; what the others find unlikely gets a smaller gradient. Official code
    Savannah120/alignment-handbook-PoFT (log of a sigmoid there; beta 1 and gamma 0 are fixed).

    Models with other tokenizers have other tokens: give both numbers per character or byte then. Items labelled 0 are left
    out, as SFT does: nothing says that a rejected response should be likelier than under other models.

    Attributes:
        beta, gamma: scale and shift of the gap.
    """

    beta: float = 1.0
    gamma: float = 0.0

    name: ClassVar[str] = "poft"
    title: ClassVar[str] = "PoFT"
    paper: ClassVar[str] = "2412.12865"
    composition: ClassVar[str] = "mean log p - external mean log p -> beta, + gamma -> logistic"
    needs: ClassVar[Needs] = needs("items", caps=(Cap.ABSOLUTE, Cap.LENGTH), reference=False, labels=(1,))
    instead: ClassVar[str] = "use sft: there is no likelihood of other models to compare with"

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        items = labelled_one(Layout.of(layout).need_items())
        external = need_target(items, "the aligned models' mean log-probability")
        gap = scores.theta[items.index] / scores.need_length()[items.index] - external
        loss = items.weight * -logsigmoid(self.beta * gap + self.gamma)
        return LossOut(loss, detached(gap=gap))


def labelled_one(items: Items) -> Items:
    """The items labelled 1; all of them, where there are no labels."""
    if items.label is None:
        return items
    keep = items.label > 0.5
    cut = {name: getattr(items, name) for name in ("index", "label", "weight", "target")}
    return replace(items, **{name: x[keep] if isinstance(x, Tensor) else x for name, x in cut.items()})


def need_target(items: Items, what: str) -> Tensor:
    """The items' target, (M,).

    Raises:
        ValueError: there is none.
    """
    if items.target is None:
        raise ValueError(f"this objective reads items.target ({what}), which is missing")
    return items.target


# -- conditional training and its relatives ---------------------------------------------------------------------------

ALIGNED, MISALIGNED = "<|aligned|>", "<|misaligned|>"


def control_tokens(
    scores: Sequence[float], threshold: float, omit: float = 0.01, rng: random.Random | None = None
) -> list[str]:
    """What to prepend to every sentence for conditional training (arXiv 2302.08582); the loss is plain SFT.

    Args:
        scores: of the sentences, *lower is better*.
        threshold: at or below it a sentence is aligned; 5.6e-4 (toxicity), 0 (personal data), 0 (PEP8) as released.
        omit: probability of leaving the token out, so that the model also writes without it; 0.01 (PEP8: 0.1).
        rng: for `omit`.

    When sampling, prefix `ALIGNED` and ban both tokens from the output; for images, use it as the prompt's prefix and
    `MISALIGNED` as the negative prompt.
    """
    rng = rng or random.Random(0)
    return ["" if rng.random() < omit else ALIGNED if score <= threshold else MISALIGNED for score in scores]


@dataclass(frozen=True, kw_only=True)
class Unlikelihood(Objective):
    """Unlikelihood training (as in arXiv 2302.08582): - log p on good tokens, - alpha log(1 - p) on bad ones.

    A token is bad if its item is labelled 0, or if `Units.segment` > 0 marks it. The released code limits 1 - p to 1e-20;
    here log p is limited to -1e-6, below which float32 cannot tell p from 1.

    Attributes:
        alpha: weight of bad tokens; the default is ours, the released runs tune it per task.
        reduction: as SFT's.
    """

    alpha: float = 1.0
    reduction: Reduction = "token"

    name: ClassVar[str] = "unlikelihood"
    title: ClassVar[str] = "Unlikelihood"
    paper: ClassVar[str] = "2302.08582"
    composition: ClassVar[str] = "NLL of good tokens; - alpha log(1 - p) of bad ones"
    needs: ClassVar[Needs] = needs("items", caps=(Cap.UNITS, Cap.PROBABILITY), reference=False)
    instead: ClassVar[str] = "use npo on the bad rows and sft on the good ones"

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        items, units = Layout.of(layout).need_items(), scores.need_units()
        logp, mask = lift(units.theta)[items.index], units.mask[items.index]
        bad = torch.zeros_like(mask) if items.label is None else (items.label <= 0.5)[:, None].expand_as(mask)
        if units.segment is not None:
            bad = bad | (units.segment[items.index] > 0)
        # Both branches are finite everywhere, so that the one not taken has no NaN gradient.
        sums = masked_sum(torch.where(bad, -self.alpha * log1mexp(logp), -logp), mask)
        totals = scores.totals
        counts = (None, None) if totals is None else (totals.items, totals.units)
        loss = average(sums, mask.sum(1), self.reduction, *counts)
        return LossOut(items.weight * loss, detached(bad_tokens=masked_mean(bad.to(loss.dtype), mask)))


# -- regression on rewards --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RWR(Objective):
    """Reward-weighted regression: imitation weighted by exp(reward / beta), at most 1000. arXiv id from memory.

    `Items.target` is the reward, higher is better. On denoising scores it is reward-weighted denoising, DDPO's baseline
    (RWR in arXiv 2305.13301; jannerm/ddpo): that weighs by N softmax(R / 5) over all N images of a round, whose mean is 1,
    which is this with beta 5 up to one factor, so set the learning rate by the mean of the metric `weight`. (What the code
    calls a temperature, 1 / 5, multiplies the reward.) It regresses the *guided* prediction to the noise; here the plain
    one. For weights that add up within a prompt, give the reward minus beta log mean exp(R / beta) of the prompt
    (`advantages.optimal_value`) as the target. The limit of 1000 is reached at R = 6.9 beta, so take a mean off first; and
    watch the spread of `weight`: one outlier may carry a whole round.

    Attributes:
        beta: temperature, in units of the reward; the default is ours.
        reduction: as SFT's.
    """

    beta: float = 1.0
    reduction: Reduction = "token"

    name: ClassVar[str] = "rwr"
    title: ClassVar[str] = "RWR"
    paper: ClassVar[str] = "2302.08582?"
    composition: ClassVar[str] = "min(exp(r / beta), 1000) NLL"
    needs: ClassVar[Needs] = needs("items", caps=(Cap.IMITATION,), reference=False)

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta is {self.beta}; expected a positive number")

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        items = Layout.of(layout).need_items()
        weight = self.weigh(need_target(items, "the reward").to(scores.theta.dtype))
        units = None if scores.totals is None else scores.totals.units
        loss = items.weight * row_loss(scores, items.index, self.reduction, weight, units)
        return LossOut(loss, imitation_metrics(scores, items.index) | detached(weight=weight))

    def weigh(self, advantage: Tensor) -> Tensor:
        """exp(advantage / beta), at most 1000, without gradient; the exponent is limited first, so nothing overflows."""
        return (advantage.detach() / self.beta).clamp(max=math.log(WEIGHT_LIMIT)).exp()


@dataclass(frozen=True, kw_only=True)
class AWR(RWR):
    """Advantage-weighted regression: imitation weighted by exp((r - V) / beta), and a regression of V on r.

    alpha mean(nll min(exp(A / beta), 1000)) + (1 - alpha) mean (V - r)^2, A = r - sg V. V is `Scores.extra["value"]`, with
    gradient: per row, (N,), or per token, (N, U), as the released code of arXiv 2302.08582 has it (there the reward is minus
    a misalignment score).

    Attributes:
        alpha: weight of the policy's term, in [0, 1]; the default is ours.
    """

    alpha: float = 0.5

    name: ClassVar[str] = "awr"
    title: ClassVar[str] = "AWR"
    paper: ClassVar[str] = "2302.08582?"
    composition: ClassVar[str] = "alpha min(exp((r - V) / beta), 1000) NLL + (1 - alpha) (V - r)^2"
    needs: ClassVar[Needs] = needs("items", caps=(Cap.IMITATION,), reference=False, extra=("value",))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; expected 0 <= alpha <= 1")

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        items = Layout.of(layout).need_items()
        rows, value = items.index, scores.need_extra("value")[items.index]
        reward = need_target(items, "the reward").to(value.dtype)
        counts = (None, None) if scores.totals is None else (scores.totals.items, scores.totals.units)
        if value.ndim == 1:
            weight = self.weigh(reward - value)
            policy, error = row_loss(scores, rows, self.reduction, weight, counts[1]), (value - reward).square()
        else:
            units = scores.need_units()
            mask, weight = units.mask[rows], self.weigh(reward[:, None] - value)
            sums = masked_sum(-weight * lift(units.theta)[rows], mask)
            policy = average(sums, mask.sum(1), self.reduction, *counts)
            error, weight = masked_mean((value - reward[:, None]).square(), mask), masked_mean(weight, mask)
        loss = items.weight * (self.alpha * policy + (1 - self.alpha) * error)
        return LossOut(loss, detached(weight=weight, value__error=error))


# -- several solutions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MML(Objective):
    """Maximum marginal likelihood of a prompt's solutions: -(1 / beta) log sum_i p_i^beta (arXiv 2205.14318).

    A list holds the samples of a prompt; those with gain > 0 (correct, or partially correct) are its solutions. beta 1
    (MML) concentrates on the likeliest solution; as beta -> 0 the gradient becomes that of `uniform_mle`. A list without
    solutions has no loss.

    Attributes:
        beta: in (0, 1].
    """

    beta: float = 1.0

    name: ClassVar[str] = "mml"
    title: ClassVar[str] = "MML / beta-MML"
    paper: ClassVar[str] = "2205.14318?"
    composition: ClassVar[str] = "- log-sum-exp(beta s) / beta over the solutions of a list"
    needs: ClassVar[Needs] = needs("lists", caps=(Cap.ABSOLUTE,), reference=False)
    instead: ClassVar[str] = "use uniform_mle, which needs no likelihoods that can be compared"

    def __post_init__(self) -> None:
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta is {self.beta}; expected 0 < beta <= 1")

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        lists = Layout.of(layout).need_lists()
        solution = lists.mask & (lists.gain > 0)
        some = solution.any(1)
        s = self.beta * scores.theta[lists.index.masked_fill(~lists.mask, 0)]
        # A row of -inf only has NaN gradients: lists without solutions are summed as they are and left out afterwards.
        loss = -s.masked_fill(~solution & some[:, None], -torch.inf).logsumexp(1) / self.beta
        return LossOut(loss.masked_fill(~some, 0.0), detached(solutions=solution.sum(1).to(loss.dtype)))


@dataclass(frozen=True, kw_only=True)
class UniformMLE(Objective):
    """The mean negative log-likelihood of a prompt's solutions: every one counts the same (arXiv 2205.14318).

    Solutions as in `mml`. A list without solutions has no loss. On tokens the loss is of whole responses, in nats.
    """

    name: ClassVar[str] = "uniform_mle"
    title: ClassVar[str] = "Uniform MLE"
    paper: ClassVar[str] = "2205.14318?"
    composition: ClassVar[str] = "mean NLL over the solutions of a list"
    needs: ClassVar[Needs] = needs("lists", caps=(Cap.IMITATION,), reference=False)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        lists = Layout.of(layout).need_lists()
        solution = lists.mask & (lists.gain > 0)
        loss = masked_mean(scores.need_imitation()[lists.index.masked_fill(~lists.mask, 0)], solution)
        return LossOut(loss, detached(solutions=solution.sum(1).to(loss.dtype)))


# -- divergences ------------------------------------------------------------------------------------------------------

Generator = Literal["kl", "pearson_chi2", "squared_hellinger"]


def variational_terms(rho: Tensor, divergence: Generator, limit: float = 40.0) -> tuple[Tensor, Tensor]:
    """T = f'(u) and f*(T) = u f'(u) - f(u) at u = exp(rho), for the lower bound E_p[T] - E_q[f*(T)] <= D_f(p || q).

    "kl": log u + 1, u. "pearson_chi2": 2 (u - 1), u^2 - 1. "squared_hellinger": 1 - u^(-1/2), u^(1/2) - 1. Log-ratios are
    limited to +-`limit`.
    """
    rho = lift(rho).clamp(-limit, limit)
    if divergence == "kl":
        return rho + 1, rho.exp()
    if divergence == "pearson_chi2":
        return 2 * rho.expm1(), (2 * rho).expm1()
    if divergence == "squared_hellinger":
        return -(-rho / 2).expm1(), (rho / 2).expm1()
    raise ValueError(f"divergence is {divergence!r}; expected kl, pearson_chi2 or squared_hellinger")


@dataclass(frozen=True, kw_only=True)
class FDivergenceSFT(Objective):
    """SFT as matching of the implicit reward under an f-divergence (arXiv 2507.00018), experimental.

    -mean over data of T + mean over samples of the *reference* of f*(T), with T = f'(exp(rho)): the variational bound, whose
    maximum is at rho = log(data / reference). Items labelled 1 are data, labelled 0 samples of the reference. Unlike
    SFT's, the second term depends on the policy.

    Attributes:
        divergence: "pearson_chi2", "squared_hellinger" or "kl".
    """

    divergence: Generator = "squared_hellinger"

    name: ClassVar[str] = "f_sft"
    title: ClassVar[str] = "f-divergence SFT"
    paper: ClassVar[str] = "2507.00018?"
    composition: ClassVar[str] = "- f'(ratio) on data + f*(f'(ratio)) on samples of the reference"
    needs: ClassVar[Needs] = needs("items", caps=(Cap.DIFFERENCE, Cap.RATIO))
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = "which generators the paper uses, and from which model the second expectation is taken"
    instead: ClassVar[str] = "use sft"

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        items = Layout.of(layout).need_items()
        data, sampled, given = split(scores, items)
        rho = scores.log_ratio()
        term, _ = variational_terms(rho[given.rows], self.divergence)
        _, conjugate = variational_terms(rho[sampled.rows], self.divergence)
        per_item = torch.zeros(len(items), dtype=rho.dtype, device=rho.device)
        per_item = per_item.masked_scatter(data, -term * given.weight * given.share)
        per_item = per_item.masked_scatter(~data, conjugate * sampled.weight * sampled.share)
        metrics = detached(log_ratio__data=rho[given.rows], log_ratio__samples=rho[sampled.rows])
        return LossOut(per_item, metrics)
