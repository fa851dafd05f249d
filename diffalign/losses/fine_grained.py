"""Objectives on tokens, phrases and masks instead of whole responses, and functions that make such masks.

They need scores per unit, and those that penalise a divergence need a vocabulary. Given masks go into `Units.weight`; a
mask that is learned comes from `MaskHead` and carries gradient there. The same weights on the elements of a denoising error
are spatial masks.

Shapes: N rows, U units, P pairs, D hidden width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from diffalign.losses import links, vocabulary
from diffalign.losses.base import AnyLayout, LossOut, Needs, Objective, TokenStatistic, detached, needs
from diffalign.losses.layouts import Layout, Pairs
from diffalign.losses.pairwise import PairObjective, pair_metrics
from diffalign.losses.reduce import imitation
from diffalign.losses.scores import Cap, Kind, Scores, Units, lift

KL = "kl_ref_theta"


# -- sums over units --------------------------------------------------------------------------------------------------


def unit_log_ratio(units: Units) -> Tensor:
    """theta - ref per unit, (N, U).

    Raises:
        ValueError: there is no reference per unit.
    """
    if units.ref is None:
        raise ValueError("this objective compares units with a reference; scores.units.ref is missing")
    return lift(units.theta) - lift(units.ref)


def masked_sum(x: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum of weight times x over the masked units of every row, (N,)."""
    return (lift(x) if weight is None else lift(x) * lift(weight)).masked_fill(~mask, 0.0).sum(1)


def weighted_mean(x: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Weighted mean over the masked units of every row, (N,); 0 for a row whose weights are all zero."""
    norm = masked_sum(torch.ones_like(lift(x)), mask, weight)
    return masked_sum(x, mask, weight) / torch.where(norm > 0, norm, 1.0)


def sequence_kl(scores: Scores, weight: Tensor | None = None) -> Tensor:
    """Sum over the response of KL(reference || policy) at every position, (N,)."""
    return masked_sum(scores.need_vocabulary(KL), scores.need_units().mask, weight)


# -- masks ------------------------------------------------------------------------------------------------------------


def quantile_mask(x: Tensor, mask: Tensor, keep: float, scope: Literal["row", "batch"] = "batch") -> Tensor:
    """The units with the largest values: bool (N, U), never outside of `mask`.

    Entropies with keep 0.2 give the high-entropy mask of GRPO (TRL's `top_entropy_quantile`); sizes of log-ratios give
    selective preference optimisation. Use it as `Units.weight`.

    Args:
        x: per unit, (N, U).
        mask: bool (N, U).
        keep: fraction in (0, 1]; a unit stays if its value is at least the (1 - keep) quantile, so ties stay.
        scope: of the quantile: each row its own, or all rows together.

    Raises:
        ValueError: `keep` outside of (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}; expected a fraction in (0, 1]")
    rows, inside = (x, mask) if scope == "row" else (x.reshape(1, -1), mask.reshape(1, -1))
    ordered = lift(rows.detach()).masked_fill(~inside, torch.inf).sort(dim=1).values
    count = inside.sum(1, keepdim=True)
    # The small number keeps a position that is whole in exact arithmetic from being rounded up.
    first = ((1 - keep) * (count - 1).clamp(min=0) - 1e-6).ceil().long().clamp(min=0)
    return ((rows >= ordered.gather(1, first)) & inside).view(mask.shape)


def activation_mask(x: Tensor, mask: Tensor) -> Tensor:
    """Values rescaled to [0, 1] within each row, 0 outside of `mask`, (N, U), without gradient.

    SparsePO's mask from the reference's activations (there called MaPO; not the objective `mapo`). Rows of equal values
    give 0.
    """
    x = lift(x.detach())
    low = x.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    span = x.masked_fill(~mask, -torch.inf).amax(1, keepdim=True) - low
    return torch.where(mask & (span > 0), (x - low) / torch.where(span > 0, span, 1.0), 0.0)


def object_weight(mask: Tensor, alpha: float = 1.0, gamma: float = 1.0) -> Tensor:
    """OSPO's token weights 1 + alpha m of an object mask, (N, H, W) -> (N, H, W).

    m is the mask after a 5 x 5 Gaussian blur of sigma 1 (edges reflected), rescaled to [0, 1] within each image, to the
    power `gamma`. Flatten it in the order of the image tokens and use it as `Units.weight`.
    """
    kernel = torch.exp(-(torch.arange(-2.0, 3.0, device=mask.device) ** 2) / 2)
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    padded = pad(mask.float()[:, None], (2, 2, 2, 2), mode="reflect")
    blurred = conv2d(padded, kernel[None, None])[:, 0]
    everywhere = torch.ones_like(blurred, dtype=torch.bool).flatten(1)
    return 1 + alpha * activation_mask(blurred.flatten(1), everywhere).view_as(blurred) ** gamma


class MaskHead(nn.Module):
    """A trainable mask over tokens from the reference's hidden states (SparsePO, arXiv 2410.05102).

    Every layer's states, layer-normalised, give one number per token through a linear map and ReLU; a bias-free linear map
    mixes the layers; ReLU again. The output is >= 0 and sparse. Two heads give separate masks for reward and divergence.
    The released sign masks have zero gradient everywhere and are left out: threshold a frozen head instead.

    Args:
        layers: hidden states given to `forward`; 1 is the "last layer" variant.
        width: D.
        hidden: width of a two-layer map per layer (200 in the paper's variant, whose released code has no activation between
            both layers, so that it is linear; here it has one); 0 is a linear map.
        dropout: on the outputs; 0.01 in the released configs.
    """

    def __init__(self, layers: int, width: int, hidden: int = 0, dropout: float = 0.01) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.per_layer = nn.ModuleList(self._layer(width, hidden, dropout) for _ in range(layers))
        self.mixer = nn.Linear(layers, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        # A head whose first output is zero has no gradient through its ReLU and stays so: start with equal positive weights.
        nn.init.constant_(self.mixer.weight, 1 / layers)

    @staticmethod
    def _layer(width: int, hidden: int, dropout: float) -> nn.Module:
        if hidden == 0:
            return nn.Sequential(nn.Linear(width, 1), nn.ReLU(), nn.Dropout(dropout))
        return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 1), nn.ReLU())

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Masks of hidden states, `layers` times (N, U, D) -> (N, U), >= 0."""
        if len(states) != len(self.per_layer):
            raise ValueError(
                f"got the hidden states of {len(states)} layers; this head was made for {len(self.per_layer)}"
            )
        per_layer = [layer(self.norm(state)) for layer, state in zip(self.per_layer, states)]
        mixed = self.mixer(torch.cat(per_layer, dim=-1)).relu()
        return self.dropout(mixed).squeeze(-1)


# -- objectives -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class UnitObjective(PairObjective):
    """Base of pair objectives with the logistic link on sums over units.

    Attributes:
        label_smoothing: p becomes p (1 - e) + (1 - p) e, as in conservative DPO.
    """

    label_smoothing: float = 0.0

    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.DIFFERENCE, Cap.UNITS, Cap.VOCABULARY))
    instead: ClassVar[str] = "use sparse_po with use_kl: false (per-element weights), or dpo"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; expected 0 <= label_smoothing < 0.5")

    def vocabulary(self) -> Mapping[str, TokenStatistic]:
        return {KL: vocabulary.kl_ref_theta}

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return math.log(2)

    def link(self, z: Tensor, p: Tensor | float, beta: float) -> Tensor:
        return links.logistic(z, p * (1 - self.label_smoothing) + (1 - p) * self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class TDPO1(UnitObjective):
    """Token-level DPO, first version (Zeng et al. 2024, arXiv 2404.11999): -log sigma(beta [M - (K_l - K_w)]).

    M is the difference of log-ratios, K the sum over the response's positions of KL(reference || policy) on the data's own
    prefixes; gradient flows through both. The released config defaults to this version, the released function to
    the second. The released code takes the log of a softmax, which is NaN once a reference probability underflows.
    """

    name: ClassVar[str] = "tdpo1"
    title: ClassVar[str] = "TDPO1"
    paper: ClassVar[str] = "2404.11999"
    composition: ClassVar[str] = "log-ratio + sequence KL -> beta (w - l) -> logistic"

    def transform(self, scores: Scores) -> Tensor:
        return scores.log_ratio() + sequence_kl(scores)


@dataclass(frozen=True, kw_only=True)
class TDPO2(UnitObjective):
    """Token-level DPO, second version (Zeng et al. 2024, arXiv 2404.11999): -log sigma(beta [M - alpha (K_l - sg K_w)]).

    As TDPO1, but no gradient flows through the divergence on the chosen response.

    Attributes:
        alpha: weight of the divergences; 0 is DPO.
    """

    alpha: float = 0.5

    name: ClassVar[str] = "tdpo2"
    title: ClassVar[str] = "TDPO2"
    paper: ClassVar[str] = "2404.11999"
    composition: ClassVar[str] = "log-ratio + alpha sequence KL (detached on w) -> beta (w - l) -> logistic"

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs = Layout.of(layout).need_pairs()
        beta, rho, kl = self.beta_for(scores.kind), scores.log_ratio(), sequence_kl(scores)
        u_w = rho[pairs.w] + self.alpha * kl[pairs.w].detach()
        u_l = rho[pairs.l] + self.alpha * kl[pairs.l]
        z = beta * (u_w - u_l)
        loss = pairs.weight * self.link(z - pairs.margin, pairs.p, beta)
        metrics = pair_metrics(z, beta * u_w, beta * u_l, scores, pairs)
        return LossOut(loss, metrics | detached(kl__chosen=kl[pairs.w], kl__rejected=kl[pairs.l]))


@dataclass(frozen=True, kw_only=True)
class SparsePO(UnitObjective):
    """SparsePO (Christopoulou et al. 2024, arXiv 2410.05102): TDPO1 with masks on the log-ratios and on the divergences.

    -log sigma(beta [sum m_u rho_t (w - l) - (sum m_d KL_t (l) - sum m_d KL_t (w))]) + lambda_u (|m_u,w| + |m_u,l|)
    + lambda_d (|m_d,w| + |m_d,l|), with L1 norms summed over the response; m_u is `Units.weight`, m_d
    `Units.divergence_weight`. Official code huawei-noah/HEBO:SparsePO. With all masks 1 it is TDPO1. Where only one mask is
    given it serves both terms and the penalties are halved, as in the paper.

    Without the divergences it also runs on denoising errors per latent element, as a spatial reward mask.

    Attributes:
        lambda_u, lambda_d: of the penalties; with given (frozen) masks they only shift the value.
        use_kl: False leaves the divergences out.
    """

    lambda_u: float = 0.0
    lambda_d: float = 0.0
    use_kl: bool = True

    name: ClassVar[str] = "sparse_po"
    title: ClassVar[str] = "SparsePO"
    paper: ClassVar[str] = "2410.05102"
    composition: ClassVar[str] = "masked log-ratio + masked KL -> beta (w - l) -> logistic; + L1 of the masks"
    instead: ClassVar[str] = "set objective.use_kl: false, which keeps the mask on the score"

    def required_caps(self, kind: Kind) -> frozenset[Cap]:
        return self.needs.caps if self.use_kl else self.needs.caps - {Cap.VOCABULARY}

    def vocabulary(self) -> Mapping[str, TokenStatistic]:
        return super().vocabulary() if self.use_kl else {}

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return None if self.lambda_u or self.lambda_d else math.log(2)

    def transform(self, scores: Scores) -> Tensor:
        units = scores.need_units()
        reward = masked_sum(unit_log_ratio(units), units.mask, units.weight)
        if not self.use_kl:
            return reward
        shared = units.weight if units.divergence_weight is None else units.divergence_weight
        return reward + sequence_kl(scores, shared)

    def penalty(self, scores: Scores) -> Tensor:
        """Weighted L1 norms of the masks of every row, (N,)."""
        units = scores.need_units()
        ones = torch.ones_like(lift(units.theta))
        m_u = ones if units.weight is None else units.weight
        m_d = m_u if units.divergence_weight is None else units.divergence_weight
        both = self.lambda_u * masked_sum(lift(m_u).abs(), units.mask)
        if self.use_kl:
            both = both + self.lambda_d * masked_sum(lift(m_d).abs(), units.mask)
        return both * (0.5 if self.use_kl and units.divergence_weight is None else 1.0)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs = Layout.of(layout).need_pairs()
        out, penalty = super().__call__(scores, pairs), self.penalty(scores)
        loss = out.per_item + pairs.weight * (penalty[pairs.w] + penalty[pairs.l])
        return LossOut(loss, out.metrics | detached(mask__l1=penalty[pairs.w] + penalty[pairs.l]))


@dataclass(frozen=True, kw_only=True)
class RRPO(UnitObjective):
    """Refined regularised preference optimisation (arXiv 2504.12083): only the phrases that differ are compared.

    -log sigma(beta sum_i (rho of phrase i in w - in l)) + alpha sum_t KL(reference || policy) over all tokens of the
    *chosen* response only. Phrases are `Units.segment` > 0; 0 is text both responses share. Official code
    pritamqu/RRPO:llava/losses.py, which takes the log of a softmax (NaN once a probability underflows) and needs the same
    number of phrases in all pairs of a batch; the sum over phrases, here, does not.

    beta: 0.1 to 0.9 and alpha: 0.01 to 0.1 in the released code; the defaults are the lower ends.
    Other methods called RPO: `rpo` (2405.16436).

    Attributes:
        alpha: weight of the divergence.
    """

    alpha: float = 0.01

    name: ClassVar[str] = "rrpo"
    title: ClassVar[str] = "RRPO"
    paper: ClassVar[str] = "2504.12083"
    composition: ClassVar[str] = "phrase log-ratio -> beta (w - l) -> logistic; + alpha sequence KL of w"

    def transform(self, scores: Scores) -> Tensor:
        units = scores.need_units()
        if units.segment is None:
            raise ValueError("rrpo compares phrases; scores.units.segment is missing")
        return masked_sum(unit_log_ratio(units), units.mask & (units.segment > 0))

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs = Layout.of(layout).need_pairs()
        out, kl = super().__call__(scores, pairs), sequence_kl(scores)[pairs.w]
        return LossOut(out.per_item + pairs.weight * self.alpha * kl, out.metrics | detached(kl__chosen=kl))


@dataclass(frozen=True, kw_only=True)
class OSPO(Objective):
    """Object-centric self-improving preference optimisation (arXiv 2506.02015): SimPO on weighted image tokens.

    -log sigma(beta (m_w - m_l) - gamma) with m the weighted mean of the tokens' log-probabilities (weights: `Units.weight`,
    see `object_weight`) and gamma = gamma_beta_ratio beta; + sft_weight times the imitation of the chosen response;
    + copo_weight times the same loss on `Layout.conditions`, pairs of the chosen response under its own and under a
    perturbed prompt. Official code KU-AGI/OSPO; its clipped variant detaches the rewards before the link, so that it has
    no gradient at all, and is left out. The released UniTok config has copo_weight 0 and equal beta for both terms.

    Attributes:
        beta: 5, with gamma_beta_ratio 0.5 and sft_weight 2 as released for Janus.
        gamma_beta_ratio: margin divided by beta.
        label_smoothing: as conservative DPO.
        sft_weight: of the imitation term, in nats per token.
        copo_weight: of the conditional term.
        copo_beta, copo_gamma_beta_ratio: its own settings; None takes the others.
    """

    beta: float = 5.0
    gamma_beta_ratio: float = 0.5
    label_smoothing: float = 0.0
    sft_weight: float = 2.0
    copo_weight: float = 0.0
    copo_beta: float | None = None
    copo_gamma_beta_ratio: float | None = None

    name: ClassVar[str] = "ospo"
    title: ClassVar[str] = "OSPO"
    paper: ClassVar[str] = "2506.02015"
    composition: ClassVar[str] = (
        "weighted mean -> beta (w - l) - gamma -> logistic; + NLL of w; + the same on conditions"
    )
    needs: ClassVar[Needs] = needs(
        "pairs", caps=(Cap.ABSOLUTE, Cap.LENGTH, Cap.UNITS, Cap.PROBABILITY, Cap.IMITATION), reference=False
    )
    instead: ClassVar[str] = "use sparse_po with use_kl: false (per-element weights with a reference), or mapo"

    def __post_init__(self) -> None:
        if self.beta <= 0 or (self.copo_beta is not None and self.copo_beta <= 0):
            raise ValueError(f"beta is {self.beta}, copo_beta {self.copo_beta}; expected positive numbers")

    def contrast(self, m: Tensor, pairs: Pairs, beta: float, ratio: float) -> tuple[Tensor, Tensor]:
        """Loss of weighted means m (N,) per pair, and beta times their difference, each (P,)."""
        z = beta * (m[pairs.w] - m[pairs.l])
        p = pairs.p * (1 - self.label_smoothing) + (1 - pairs.p) * self.label_smoothing
        return pairs.weight * links.logistic(z - beta * ratio - pairs.margin, p), z

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        layout = Layout.of(layout)
        pairs, units = layout.need_pairs(), scores.need_units()
        m = weighted_mean(units.theta, units.mask, units.weight)
        loss, z = self.contrast(m, pairs, self.beta, self.gamma_beta_ratio)
        metrics = pair_metrics(z, self.beta * m[pairs.w], self.beta * m[pairs.l], scores, pairs)
        if self.sft_weight:
            sft = imitation(scores, pairs.w)
            loss, metrics = loss + self.sft_weight * pairs.weight * sft, metrics | detached(sft=sft)
        if self.copo_weight:
            ratio = self.gamma_beta_ratio if self.copo_gamma_beta_ratio is None else self.copo_gamma_beta_ratio
            conditional, z = self.contrast(m, layout.need_conditions(), self.copo_beta or self.beta, ratio)
            loss = loss + self.copo_weight * beside(conditional, pairs)
            metrics = metrics | detached(conditions__margins=z)
        return LossOut(loss, metrics)


def beside(values: Tensor, pairs: Pairs) -> Tensor:
    """Losses of a second set of comparisons, added to those of `pairs`, (P,): one to one where there are as many, else
    their mean."""
    if len(values) == len(pairs):
        return values
    return (values.mean() if len(values) else values.sum()).expand(len(pairs))


def with_weights(scores: Scores, weight: Tensor, divergence_weight: Tensor | None = None) -> Scores:
    """The same scores with masks over units, each (N, U)."""
    units = replace(scores.need_units(), weight=weight, divergence_weight=divergence_weight)
    return replace(scores, units=units)
