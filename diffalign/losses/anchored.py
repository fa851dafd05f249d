"""Pairwise and list-wise objectives that anchor log-ratios to absolute values, or match a whole distribution of rewards.

Where DPO sees only differences, these look at beta rho of each side: raising both or lowering both changes the loss, which
counters likelihood displacement. The price is that the sign of rho must mean something. On denoising errors it does (the
error against the reference's at the same noise), but its scale is arbitrary, so beta has no default there.

Shapes: P pairs; G lists of at most L rows.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.losses import links
from diffalign.losses.base import AnyLayout, BetaObjective, LossOut, Needs, detached, needs
from diffalign.losses.layouts import Layout, Lists
from diffalign.losses.pairwise import pair_metrics
from diffalign.losses.scores import Kind, Scores


@dataclass(frozen=True, kw_only=True)
class AnchoredPair(BetaObjective):
    """Base of pairwise objectives of two logits: r_w = beta rho_w and r_l = beta rho_l.

    A soft label p mixes the loss with that of the swapped pair. A margin m is taken half from r_w and given half to r_l, so
    that their difference is beta (rho_w - rho_l) - m as in every other pairwise objective.

    Attributes:
        beta: as above.
    """

    needs: ClassVar[Needs] = needs("pairs")

    @abstractmethod
    def cost(self, r_w: Tensor, r_l: Tensor) -> Tensor:
        """The loss per pair, (P,), of a clean label."""

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        zero = torch.zeros(1, dtype=torch.float64)
        return float(self.cost(zero, zero))

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs = Layout.of(layout).need_pairs()
        beta, rho = self.beta_for(scores.kind), scores.log_ratio()
        w, l = beta * rho[pairs.w], beta * rho[pairs.l]
        half = 0.5 * pairs.margin
        loss = pairs.p * self.cost(w - half, l + half) + (1 - pairs.p) * self.cost(l + half, w - half)
        return LossOut(pairs.weight * loss, pair_metrics(w - l, w, l, scores, pairs))


@dataclass(frozen=True, kw_only=True)
class NCA(AnchoredPair):
    """Noise-contrastive alignment of pairs (Chen et al. 2024, arXiv 2402.05369).

    -log sigma(r_w) - 1/2 log sigma(-r_w) - 1/2 log sigma(-r_l). Alone, the chosen side settles at sigma(r_w) = 2/3 instead
    of growing without end. More than two responses with rewards: `nca_list`.

    beta: 0.01 on tokens (paper, as TRL quotes it).
    """

    name: ClassVar[str] = "nca"
    title: ClassVar[str] = "NCA (pairs)"
    paper: ClassVar[str] = "2402.05369"
    composition: ClassVar[str] = "log-ratio -> beta w, beta l -> logistic each"
    parity: ClassVar[str] = "TRL DPOTrainer nca_pair"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 0.01}

    def cost(self, r_w: Tensor, r_l: Tensor) -> Tensor:
        return links.logistic(r_w) + 0.5 * links.logistic(-r_w) + 0.5 * links.logistic(-r_l)


@dataclass(frozen=True, kw_only=True)
class BCOPair(AnchoredPair):
    """Binary classifier optimisation on pairs, without its shift (Jung et al. 2024, arXiv 2404.04656).

    -log sigma(r_w) - log sigma(-r_l). TRL's `bco_pair` is this, although its documentation prints DPO's formula. With the
    shift, a running mean of implicit rewards, and on unpaired data: `bco`.

    beta: 0.1 on tokens (TRL; the paper has 0.01).
    """

    name: ClassVar[str] = "bco_pair"
    title: ClassVar[str] = "BCO (pairs, no shift)"
    paper: ClassVar[str] = "2404.04656"
    composition: ClassVar[str] = "log-ratio -> beta w, beta l -> logistic each"
    parity: ClassVar[str] = "TRL DPOTrainer bco_pair"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 0.1}

    def cost(self, r_w: Tensor, r_l: Tensor) -> Tensor:
        return links.logistic(r_w) + links.logistic(-r_l)


@dataclass(frozen=True, kw_only=True)
class APOZero(AnchoredPair):
    """Anchored preference optimisation, zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7; not accelerated PO).

    sigma(-r_w) + sigma(r_l): raises chosen, lowers rejected. For chosen responses that are better than what the model
    writes. Slopes die for |r| > 4.

    beta: 0.1 on tokens (TRL).
    """

    name: ClassVar[str] = "apo_zero"
    title: ClassVar[str] = "APO-zero"
    paper: ClassVar[str] = "2408.06266"
    composition: ClassVar[str] = "log-ratio -> beta w, beta l -> sigmoid each"
    parity: ClassVar[str] = "TRL DPOTrainer apo_zero"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 0.1}

    def cost(self, r_w: Tensor, r_l: Tensor) -> Tensor:
        return links.sigmoid(r_w) + links.sigmoid(-r_l)


@dataclass(frozen=True, kw_only=True)
class APODown(AnchoredPair):
    """Anchored preference optimisation, down (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8).

    sigma(r_w) + sigma(-(r_w - r_l)): lowers both, rejected more. For chosen responses that are worse than what the model
    writes. At the reference the chosen side has no slope at all.

    beta: 0.1 on tokens (TRL).
    """

    name: ClassVar[str] = "apo_down"
    title: ClassVar[str] = "APO-down"
    paper: ClassVar[str] = "2408.06266"
    composition: ClassVar[str] = "log-ratio -> beta w, beta (w - l) -> sigmoid each"
    parity: ClassVar[str] = "TRL DPOTrainer apo_down"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 0.1}

    def cost(self, r_w: Tensor, r_l: Tensor) -> Tensor:
        return links.sigmoid(-r_w) + links.sigmoid(r_w - r_l)


def masked_log_softmax(x: Tensor, mask: Tensor) -> Tensor:
    """log-softmax over the entries of every list that `mask` keeps, (G, L); 0 elsewhere, and for a list of none."""
    # A finite filler: minus infinity would make lists without entries NaN, gradients included.
    return x.masked_fill(~mask, -1e30).log_softmax(1).masked_fill(~mask, 0.0)


@dataclass(frozen=True, kw_only=True)
class RewardMatching(BetaObjective):
    """Base of objectives that match r_k = beta rho_k of a prompt's responses to q = softmax(gain / reward_temperature).

    Attributes:
        beta: as above.
        reward_temperature: temperature of the target, in the unit of the gains. The papers' values belong to their reward
            models; 1 takes gains for logits.
    """

    reward_temperature: float = 1.0

    needs: ClassVar[Needs] = needs("lists")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_temperature <= 0:
            raise ValueError(f"reward_temperature is {self.reward_temperature}; expected a positive number")

    @abstractmethod
    def terms(self, r: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
        """The loss per entry, (G, L), to be summed over entries where `mask` is True."""

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        lists = Layout.of(layout).need_lists()
        # Padded places may hold any index.
        r = self.beta_for(scores.kind) * scores.log_ratio()[lists.index.masked_fill(~lists.mask, 0)]
        log_q = masked_log_softmax(lists.gain / self.reward_temperature, lists.mask)
        loss = self.terms(r, log_q, lists.mask).masked_fill(~lists.mask, 0.0).sum(1)
        return LossOut(loss, _list_metrics(r, lists))


def _list_metrics(r: Tensor, lists: Lists) -> dict[str, Tensor]:
    """Whether the response of largest gain has the largest implicit reward, and that of the best and of all, (G,)."""
    # Lists that are all padding have no best response to report on.
    r, gain, mask = (x[lists.mask.any(1)].detach() for x in (r, lists.gain, lists.mask))
    best = gain.masked_fill(~mask, -torch.inf).argmax(1, keepdim=True)
    top = r.gather(1, best)[:, 0]
    largest = r.masked_fill(~mask, -torch.inf).amax(1)
    mean = r.masked_fill(~mask, 0.0).sum(1) / mask.sum(1)
    return detached(implicit_acc=(top == largest).to(r.dtype), rewards__best=top, rewards__mean=mean)


@dataclass(frozen=True, kw_only=True)
class InfoNCA(RewardMatching):
    """InfoNCA (Chen et al. 2024, arXiv 2402.05369): cross-entropy between softmax(reward) and softmax(beta rho).

    -sum_k q_k log softmax_k(beta rho). With two responses and a one-hot target it is DPO. Sees only differences inside a
    list, unlike `nca_list`.

    beta: 0.01 on tokens (paper, as TRL quotes it).
    """

    name: ClassVar[str] = "infonca"
    title: ClassVar[str] = "InfoNCA"
    paper: ClassVar[str] = "2402.05369"
    composition: ClassVar[str] = "log-ratio -> beta rho -> softmax cross-entropy to softmax(reward)"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 0.01}

    def terms(self, r: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
        return -log_q.exp() * masked_log_softmax(r, mask)


@dataclass(frozen=True, kw_only=True)
class NCAList(RewardMatching):
    """Noise-contrastive alignment of K responses (Chen et al. 2024, arXiv 2402.05369).

    -sum_k [q_k log sigma(r_k) + 1/K log sigma(-r_k)], K the number of responses of the prompt. With two and a one-hot
    target it is `nca`.

    beta: 0.01 on tokens (paper, as TRL quotes it).
    """

    name: ClassVar[str] = "nca_list"
    title: ClassVar[str] = "NCA (lists)"
    paper: ClassVar[str] = "2402.05369"
    composition: ClassVar[str] = "log-ratio -> beta rho -> logistic each, weighted by softmax(reward)"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 0.01}

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return 2 * math.log(2)

    def terms(self, r: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum(1, keepdim=True).clamp(min=1)
        return -log_q.exp() * logsigmoid(r) - logsigmoid(-r) / count


@dataclass(frozen=True, kw_only=True)
class EXOList(RewardMatching):
    """Efficient exact optimisation of K responses (Ji et al. 2024, arXiv 2402.00856).

    KL(softmax(beta rho) || softmax(reward / reward_temperature)): the reverse of InfoNCA's direction, so it seeks a mode.
    With two responses and a target (1 - e, e) it is `exo`.

    beta: 0.1 on tokens (paper).
    """

    name: ClassVar[str] = "exo_list"
    title: ClassVar[str] = "EXO (lists)"
    paper: ClassVar[str] = "2402.00856"
    composition: ClassVar[str] = "log-ratio -> beta rho -> reverse KL to softmax(reward)"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: 0.1}

    def terms(self, r: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
        log_p = masked_log_softmax(r, mask)
        return log_p.exp() * (log_p - log_q)
