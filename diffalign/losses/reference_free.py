"""Pairwise objectives without a reference: one model in memory, and nothing that holds it near where it started.

What takes the reference's place is an imitation term on the chosen responses, a target margin, or both. On texts the
scores compared are log-probabilities of different responses to one prompt. On denoising errors the same difference mostly
measures which image is more complex, so those objectives are refused there; `mapo` is the one made for them.

Imitation terms are means over tokens (nats), or errors on denoising scores: a weight from a text recipe does not carry over.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from diffalign.losses import links, reduce
from diffalign.losses.base import AnyLayout, LossOut, Needs, Objective, detached, needs
from diffalign.losses.layouts import Layout, Pairs
from diffalign.losses.pairwise import PairObjective, check_share, pair_metrics, smoothed
from diffalign.losses.scores import Cap, Kind, Scores
from diffalign.losses.transforms import bernoulli_score, exponential_reward, odds

_USE_MAPO = "use mapo on denoising errors, dpo or cpo on trajectories"
_ABSOLUTE = (
    "use mapo, or dpo or rpo, which have a reference; or set objective.allow_bound_abs: true and give pairs a calibrated"
    " margin"
)


@dataclass(frozen=True, kw_only=True)
class ReferenceFree(PairObjective):
    """Base: logistic link on scores of the policy alone, plus imitation of the chosen rows.

    Attributes:
        beta: scale of the difference.
        label_smoothing: conservative smoothing, as in `dpo`.
        imitation_weight: weight of the imitation loss.
        imitation_reduction: "token": mean over all tokens; "sequence": mean of each response's mean.
    """

    label_smoothing: float = 0.0
    imitation_weight: float = 0.0
    imitation_reduction: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "label_smoothing")

    def link(self, z: Tensor, p: Tensor | float, beta: float) -> Tensor:
        return links.logistic(z, smoothed(p, self.label_smoothing))

    def transform(self, scores: Scores) -> Tensor:
        return scores.theta

    def imitation(self, scores: Scores, layout: Layout) -> Tensor:
        """The imitation loss per pair, (P,), weights of the pairs in it."""
        pairs = layout.need_pairs()
        return pairs.weight * reduce.imitation(scores, pairs.w, self.imitation_reduction)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        layout = Layout.of(layout)
        out = super().__call__(scores, layout, stats)
        if not self.imitation_weight:
            return out
        imitation = self.imitation(scores, layout)
        return LossOut(out.per_item + self.imitation_weight * imitation, out.metrics | detached(imitation=imitation))


@dataclass(frozen=True, kw_only=True)
class AbsoluteSums(ReferenceFree):
    """Base of those that contrast sums of log-probabilities.

    Attributes:
        allow_bound_abs: run on denoising errors although a difference between two images is mostly their complexity.
    """

    allow_bound_abs: bool = False

    instead: ClassVar[str] = _ABSOLUTE

    def required_caps(self, kind: Kind) -> frozenset[Cap]:
        allowed = self.allow_bound_abs and kind is Kind.BOUND
        return self.needs.caps - {Cap.ABSOLUTE} if allowed else self.needs.caps


@dataclass(frozen=True, kw_only=True)
class CPO(AbsoluteSums):
    """Contrastive preference optimisation (Xu et al. 2024, arXiv 2401.08417): DPO with a uniform reference, plus imitation.

    -log sigma(beta (s_w - s_l)) + weight * imitation of chosen, s summed over tokens.

    beta: 0.1 on tokens (TRL).

    Attributes:
        imitation_weight: 1 (TRL's `cpo_alpha`).
    """

    imitation_weight: float = 1.0

    name: ClassVar[str] = "cpo"
    title: ClassVar[str] = "CPO"
    paper: ClassVar[str] = "2401.08417"
    composition: ClassVar[str] = "score -> beta (w - l) -> logistic + imitation of chosen"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.ABSOLUTE, Cap.IMITATION), reference=False)
    parity: ClassVar[str] = "TRL CPOTrainer sigmoid"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 0.1}
    aliases: ClassVar[Mapping[str, str]] = {"cpo_alpha": "imitation_weight"}


@dataclass(frozen=True, kw_only=True)
class SLiC(AbsoluteSums):
    """Sequence likelihood calibration (Zhao et al. 2023, arXiv 2305.10425): a hinge on log-probabilities, plus imitation.

    max(0, margin - beta (s_w - s_l)) + weight * imitation of chosen. The published code has beta 1; TRL's `hinge` in its CPO
    trainer is margin 1 at beta 0.1. HALOs adds a term per token to one per sequence, which is not followed: imitation is the
    mean over tokens. With a reference: `hinge`.

    Attributes:
        margin: difference from which a pair no longer pulls, in nats at beta 1; 1 (HALOs).
        imitation_weight: 0.1 (HALOs).
    """

    margin: float = 1.0
    imitation_weight: float = 0.1

    name: ClassVar[str] = "slic"
    title: ClassVar[str] = "SLiC"
    paper: ClassVar[str] = "2305.10425"
    composition: ClassVar[str] = "score -> w - l -> hinge + imitation of chosen"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.ABSOLUTE, Cap.IMITATION), reference=False)
    parity: ClassVar[str] = "TRL CPOTrainer hinge"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.margin <= 0:
            raise ValueError(f"margin is {self.margin}; expected a positive number")

    def link(self, z: Tensor, p: Tensor | float, beta: float) -> Tensor:
        return self.margin * links.hinge(z / self.margin, smoothed(p, self.label_smoothing))


@dataclass(frozen=True, kw_only=True)
class TPO(AbsoluteSums):
    """Triple preference optimisation (Saeidi et al. 2024, arXiv 2405.16681; not tree or task PO, also called TPO).

    -log sigma(beta (s_w - s_l)) + weight * imitation of a *gold* response, which is neither chosen nor rejected and not a
    reference model, although data sets call its column `reference`. The layout's items are the gold responses, one per pair
    in the order of pairs.

    beta: 0.01 on tokens (paper and TRL).

    Attributes:
        imitation_weight: 1 (TRL's `tpo_alpha`).
    """

    imitation_weight: float = 1.0

    name: ClassVar[str] = "tpo"
    title: ClassVar[str] = "TPO (triple)"
    paper: ClassVar[str] = "2405.16681"
    composition: ClassVar[str] = "score -> beta (w - l) -> logistic + imitation of a gold response"
    needs: ClassVar[Needs] = needs("pairs", "items", caps=(Cap.ABSOLUTE, Cap.IMITATION), reference=False)
    parity: ClassVar[str] = "TRL TPOTrainer sigmoid"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 0.01}
    aliases: ClassVar[Mapping[str, str]] = {"tpo_alpha": "imitation_weight"}

    def imitation(self, scores: Scores, layout: Layout) -> Tensor:
        return gold_imitation(self, scores, layout)


def gold_imitation(owner: ReferenceFree, scores: Scores, layout: Layout) -> Tensor:
    """The imitation loss of the gold responses, (P,), one per pair.

    Raises:
        ValueError: their number differs from that of the pairs.
    """
    pairs, items = layout.need_pairs(), layout.need_items()
    if len(items) != len(pairs):
        raise ValueError(f"{len(items)} gold responses for {len(pairs)} pairs; expected one per pair, in their order")
    units = None if scores.totals is None else scores.totals.item_units
    return items.weight * reduce.imitation(scores, items.index, owner.imitation_reduction, units=units)


@dataclass(frozen=True, kw_only=True)
class MeanLogps(ReferenceFree):
    """Base of those that contrast mean log-probabilities per token, with a target margin.

    Attributes:
        imitation_weight: 0; above, the mixture called CPO-SimPO.
    """

    instead: ClassVar[str] = _USE_MAPO

    def transform(self, scores: Scores) -> Tensor:
        return scores.theta / scores.need_length()

    @abstractmethod
    def gamma_for(self, beta: float) -> float:
        """The target margin gamma, in units of beta times mean log-probabilities."""

    def target_margin(self, scores: Scores, pairs: Pairs, beta: float) -> Tensor | float:
        return pairs.margin + self.gamma_for(beta)


@dataclass(frozen=True, kw_only=True)
class SimPO(MeanLogps):
    """Simple preference optimisation (Meng et al. 2024, arXiv 2405.14734).

    -log sigma(beta (mean_w - mean_l) - gamma), means of log-probabilities per token.

    TRL's `simpo_gamma` is gamma; here, as in the official code, the setting is gamma / beta: gamma = ratio * beta. TRL's
    defaults (beta 0.1, gamma 0.5, `cpo_alpha` 1) ask for 5 nats *per token* and keep an imitation term; they are not SimPO.

    beta: 2.0 on tokens (official code; recipes use 2 to 2.5, and 10 for later models).

    Attributes:
        gamma_beta_ratio: target margin in nats per token; 0.25 (official code; recipes 0.1 to 0.8).
    """

    gamma_beta_ratio: float = 0.25

    name: ClassVar[str] = "simpo"
    title: ClassVar[str] = "SimPO"
    paper: ClassVar[str] = "2405.14734"
    composition: ClassVar[str] = "score / length -> beta (w - l) - gamma -> logistic"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.ABSOLUTE, Cap.LENGTH, Cap.PROBABILITY), reference=False)
    parity: ClassVar[str] = "TRL CPOTrainer simpo"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 2.0}
    aliases: ClassVar[Mapping[str, str]] = {"sft_weight": "imitation_weight", "cpo_alpha": "imitation_weight"}

    def gamma_for(self, beta: float) -> float:
        return self.gamma_beta_ratio * beta


@dataclass(frozen=True, kw_only=True)
class AlphaPO(MeanLogps):
    """AlphaPO (Gupta et al. 2025, arXiv 2501.03884): SimPO with a bent reward.

    -log sigma(beta (r_w - r_l) - gamma), r = (1 - exp(-alpha mean)) / alpha of the mean log-probability per token. SimPO is
    its limit alpha -> 0; alpha > 0 pulls harder on unlikely responses. The exponent is limited to 80.

    beta: 2.5 on tokens (as TRL quotes the paper).

    Attributes:
        alpha: shape of the reward; 0.25.
        gamma: the target margin itself, not a ratio to beta (TRL's `simpo_gamma`); 0.1.
    """

    alpha: float = 0.25
    gamma: float = 0.1

    name: ClassVar[str] = "alphapo"
    title: ClassVar[str] = "AlphaPO"
    paper: ClassVar[str] = "2501.03884"
    composition: ClassVar[str] = "(1 - exp(-alpha score / length)) / alpha -> beta (w - l) - gamma -> logistic"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.ABSOLUTE, Cap.LENGTH, Cap.PROBABILITY), reference=False)
    parity: ClassVar[str] = "TRL CPOTrainer alphapo"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 2.5}
    aliases: ClassVar[Mapping[str, str]] = {"simpo_gamma": "gamma", "cpo_alpha": "imitation_weight"}

    def transform(self, scores: Scores) -> Tensor:
        return exponential_reward(super().transform(scores), self.alpha)

    def gamma_for(self, beta: float) -> float:
        return self.gamma


@dataclass(frozen=True, kw_only=True)
class TPOL(MeanLogps):
    """TPO-L, the length-normalised triple preference optimisation (arXiv 2405.16681): SimPO plus a gold response.

    -log sigma(beta (mean_w - mean_l) - gamma) + weight * imitation of the gold response; see `tpo` for its layout. In TRL,
    not in the authors' repository. No default beta: TRL's 0.01 with gamma 0.5 asks for 50 nats per token.

    Attributes:
        gamma: the target margin itself, not a ratio to beta; 0.5 (TRL's `tpo_l_gamma`).
        imitation_weight: 1 (TRL's `tpo_alpha`).
    """

    gamma: float = 0.5
    imitation_weight: float = 1.0

    name: ClassVar[str] = "tpo_l"
    title: ClassVar[str] = "TPO-L"
    paper: ClassVar[str] = "2405.16681"
    composition: ClassVar[str] = "score / length -> beta (w - l) - gamma -> logistic + imitation of a gold response"
    needs: ClassVar[Needs] = needs(
        "pairs", "items", caps=(Cap.ABSOLUTE, Cap.LENGTH, Cap.PROBABILITY, Cap.IMITATION), reference=False
    )
    parity: ClassVar[str] = "TRL TPOTrainer tpo-l"
    default_beta: ClassVar[Mapping[Kind, float]] = {}
    aliases: ClassVar[Mapping[str, str]] = {"tpo_l_gamma": "gamma", "tpo_alpha": "imitation_weight"}

    def gamma_for(self, beta: float) -> float:
        return self.gamma

    def imitation(self, scores: Scores, layout: Layout) -> Tensor:
        return gold_imitation(self, scores, layout)


@dataclass(frozen=True, kw_only=True)
class Odds(Objective):
    """Base of objectives on log-odds o = log(p / (1 - p)) of p = exp(mean log-probability per token), plus imitation.

    Attributes:
        odds_weight: weight of the odds term.
        imitate_prompt: imitate the tokens of prompt and chosen response, not of the response alone.
    """

    odds_weight: float = 0.1
    imitate_prompt: bool = False

    needs: ClassVar[Needs] = needs(
        "pairs", caps=(Cap.LENGTH, Cap.PROBABILITY, Cap.IMITATION), reference=False, prompt=True
    )
    instead: ClassVar[str] = _USE_MAPO

    def reads_prompt(self) -> bool:
        return self.imitate_prompt

    @abstractmethod
    def cost(self, o_w: Tensor, o_l: Tensor, pairs: Pairs) -> Tensor:
        """The odds term per pair, (P,)."""

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs = Layout.of(layout).need_pairs()
        mean = scores.theta / scores.need_length()
        o = odds(mean)
        imitation = reduce.imitation(scores, pairs.w, prompt=self.imitate_prompt)
        loss = pairs.weight * (imitation + self.odds_weight * self.cost(o[pairs.w], o[pairs.l], pairs))
        w, l = mean[pairs.w], mean[pairs.l]
        metrics = pair_metrics(w - l, w, l, scores, pairs)
        return LossOut(loss, metrics | detached(imitation=imitation, log_odds_ratio=o[pairs.w] - o[pairs.l]))


@dataclass(frozen=True, kw_only=True)
class ORPO(Odds):
    """Odds-ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691).

    imitation of chosen - weight * log sigma(o_w - o_l). Prompt and response are imitated (TRL; the official default).
    log(1 - p) is computed by two safe branches: the official code's log1p(-exp(.)) and log(sigmoid(.)) give minus infinity,
    TRL 1.16's single `where` a NaN gradient, once p rounds to 1.

    Attributes:
        odds_weight: 0.1 (called lambda in the paper, beta in TRL, alpha in the official code).
        imitate_prompt: needs `prompt_imitation` and `prompt_length`.
    """

    imitate_prompt: bool = True

    name: ClassVar[str] = "orpo"
    title: ClassVar[str] = "ORPO"
    paper: ClassVar[str] = "2403.07691"
    composition: ClassVar[str] = "log-odds of score / length -> w - l -> logistic + imitation of chosen"
    parity: ClassVar[str] = "TRL ORPOTrainer"
    aliases: ClassVar[Mapping[str, str]] = {"beta": "odds_weight", "alpha": "odds_weight"}

    def cost(self, o_w: Tensor, o_l: Tensor, pairs: Pairs) -> Tensor:
        return links.logistic(o_w - o_l - pairs.margin, pairs.p)


@dataclass(frozen=True, kw_only=True)
class ASFT(Odds):
    """Aligned supervised fine-tuning (arXiv 2409.10571): each side's odds by itself.

    imitation of chosen + weight * [-log sigma(o_w) - log sigma(-o_l)] = imitation + weight * [-log p_w - log(1 - p_l)], that
    is sequence-level unlikelihood. Unlike ORPO's, the term has no coupling of both sides. A soft label mixes it with that of
    the swapped pair.

    Attributes:
        odds_weight: the published weight is not known; 0.1 is ORPO's.
    """

    name: ClassVar[str] = "asft"
    title: ClassVar[str] = "ASFT"
    paper: ClassVar[str] = "2409.10571?"
    composition: ClassVar[str] = "log-odds of score / length -> logistic each + imitation of chosen"
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = "the weight of the published runs"

    def cost(self, o_w: Tensor, o_l: Tensor, pairs: Pairs) -> Tensor:
        half = 0.5 * pairs.margin
        w, l = o_w - half, o_l + half
        return links.logistic(w, pairs.p) + links.logistic(-l, pairs.p)


@dataclass(frozen=True, kw_only=True)
class MaPO(PairObjective):
    """Margin-aware preference optimisation of denoising errors (arXiv 2406.06424; official code mapo-t2i/mapo:utils.py).

    e_w - beta * log sigma(T (f(e_w) - f(e_l))), f(e) = s e / (exp(s e) - 1), e the mean squared error at a (t, noise) shared
    by both images. The code calls f's difference log-odds, but f is the Bernoulli function, no odds of a probability. Since
    f falls almost straight with slope -s/2, this is about Diffusion-DPO without reference at beta T s = 500, plus the
    winner's error as an anchor. Only the code was read, not the paper's derivation of f. Computed by expm1 with its limit at
    0, where the literal form is 0/0.

    Attributes:
        beta: weight of the margin term; 0.1 (official).
        snr_value: s; 0.5 (official).
        train_timesteps: T, the scheduler's number of training timesteps.
    """

    snr_value: float = 0.5
    train_timesteps: int = 1000

    name: ClassVar[str] = "mapo"
    title: ClassVar[str] = "MaPO"
    paper: ClassVar[str] = "2406.06424?"
    composition: ClassVar[str] = "Bernoulli function of the error -> T (w - l) -> logistic times beta + error of chosen"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.DIFFERENCE, Cap.ERROR, Cap.IMITATION), reference=False)
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.BOUND: 0.1}
    aliases: ClassVar[Mapping[str, str]] = {"beta_mapo": "beta"}
    instead: ClassVar[str] = "use orpo, simpo or cpo, its relatives on log-probabilities"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.snr_value <= 0 or self.train_timesteps <= 0:
            raise ValueError(
                f"snr_value is {self.snr_value}, train_timesteps {self.train_timesteps}; expected positive numbers"
            )

    def transform(self, scores: Scores) -> Tensor:
        if scores.error is None:
            raise ValueError("mapo is a function of denoising errors; scores.error is missing")
        return self.train_timesteps * bernoulli_score(scores.error, self.snr_value)

    def link(self, z: Tensor, p: Tensor | float, beta: float) -> Tensor:
        return links.logistic(z, p)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs = Layout.of(layout).need_pairs()
        w, l = self.sides(scores, pairs)
        margin_loss = self.link(w - l - pairs.margin, pairs.p, 1.0)
        anchor = reduce.imitation(scores, pairs.w)
        loss = pairs.weight * (anchor + self.beta_for(scores.kind) * margin_loss)
        return LossOut(loss, pair_metrics(w - l, w, l, scores, pairs) | detached(imitation=anchor))
