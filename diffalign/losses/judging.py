"""Losses that train a reward model: its scores of two pictures (or texts) of one prompt, and which one people preferred.

There is no policy, no reference and no implicit reward: a score is what the model says, Delta = s_w - s_l, and the label is
the probability p that the chosen item is the preferred one, 1/2 for a tie. Sources: arXiv 2305.01569 (PickScore), arXiv
2304.05977 (ImageReward), Rao and Kupper 1967 (ties), arXiv 2410.02197 (cyclic preferences).
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
from diffalign.losses.base import AnyLayout, LossOut, Needs, Objective, as_rows, detached, needs
from diffalign.losses.layouts import Layout, Pairs
from diffalign.losses.pairwise import check_share, smoothed
from diffalign.losses.scores import Cap, Kind, Scores

TIE = 0.5


def is_tie(p: Tensor) -> Tensor:
    """Which labels are ties, bool (P,)."""
    return (p - TIE).abs() < 1e-6


def tied_logistic(delta: Tensor, p: Tensor, k: float) -> Tensor:
    """Minus the log-likelihood of Rao and Kupper's model with ties, (P,).

    P(first) = sigma(Delta - ln k), P(second) = sigma(-Delta - ln k), and the rest is P(tie) =
    (k^2 - 1) P(first) P(second). A tie costs at least -log((k - 1) / (k + 1)), at Delta = 0.

    Args:
        delta: differences of scores.
        p: labels; 1/2 is a tie, anything else the share of votes for the first, and then mixes the two wins.
        k: > 1; how far scores are apart before a win is likelier than a tie.
    """
    win, loss = logsigmoid(delta - math.log(k)), logsigmoid(-delta - math.log(k))
    decided = -p * win - (1 - p) * loss
    tie = -win - loss - math.log(k**2 - 1)
    return torch.where(is_tie(p), tie, decided)


def label_entropy(p: Tensor) -> Tensor:
    """-p log p - (1 - p) log(1 - p), (P,): what the cross-entropy of a perfect prediction still costs."""
    return -torch.xlogy(p, p) - torch.xlogy(1 - p, 1 - p)


def general_preference(v: Tensor, w: Tensor) -> Tensor:
    """How much v is preferred to w: <R v, w> with R block diagonal, blocks [[0, -1], [1, 0]].

    Antisymmetric, so nothing is preferred to itself; not transitive with two or more dimensions.

    Args:
        v, w: embeddings (..., 2 k).

    Returns:
        sum over blocks of v_1 w_2 - v_2 w_1, shape (...,).
    """
    a, b = v.unflatten(-1, (-1, 2)), w.unflatten(-1, (-1, 2))
    return (a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]).sum(-1)


@dataclass(frozen=True, kw_only=True)
class JudgeObjective(Objective):
    """Base of losses on the difference of two scores of a reward model.

    Attributes:
        temperature: divides the scores, > 0.
    """

    temperature: float = 1.0

    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.JUDGEMENT,), reference=False)
    instead: ClassVar[str] = "it trains reward models: use model.family: clip_reward; dpo is its like for policies"

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; expected a positive number")

    def difference(self, scores: Scores, pairs: Pairs) -> Tensor:
        """Delta, (P,), before the temperature."""
        return scores.theta[pairs.w] - scores.theta[pairs.l]

    @abstractmethod
    def link(self, z: Tensor, p: Tensor) -> Tensor:
        """The loss per pair of differences z with labels p, (P,)."""

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs = Layout.of(layout).need_pairs()
        z = self.difference(scores, pairs) / self.temperature
        p = as_rows(pairs.p, z).expand_as(z)
        loss = pairs.weight * self.link(z - pairs.margin, p)
        right = (z > 0).to(z.dtype) + 0.5 * (z == 0).to(z.dtype)
        metrics = detached(
            judge__margins=z,
            judge__chosen=scores.theta[pairs.w],
            judge__rejected=scores.theta[pairs.l],
            # Ties have no right answer; they are counted by the evaluation, which has a threshold for them.
            judge__accuracy=right[~is_tie(p)],
        )
        return LossOut(loss, metrics)


@dataclass(frozen=True, kw_only=True)
class BradleyTerry(JudgeObjective):
    """Bradley-Terry with soft labels: -p log sigma(z) - (1 - p) log sigma(-z), z = Delta / temperature - margin.

    With clean labels this is the loss of ImageReward (Xu et al. 2023, arXiv 2304.05977, code THUDM/ImageReward:train, a
    cross-entropy over [r_better, r_worse]) and, over all ranked pairs, of VP-Score (arXiv 2404.15100). Ties are soft labels
    of 1/2, which pull the two scores together.

    Attributes:
        margin: subtracted from every difference that is not a tie; 0.57 in VideoAlign's "constant margin" variant.
        label_smoothing: p becomes p (1 - e) + (1 - p) e, for labels known to be flipped now and then.
    """

    margin: float = 0.0
    label_smoothing: float = 0.0

    name: ClassVar[str] = "bradley_terry"
    title: ClassVar[str] = "Bradley-Terry"
    paper: ClassVar[str] = "2304.05977"
    composition: ClassVar[str] = "score -> (w - l) / temperature -> logistic"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "label_smoothing")

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return None  # a reward model does not start with equal scores

    def link(self, z: Tensor, p: Tensor) -> Tensor:
        shifted = torch.where(is_tie(p), z, z - self.margin)
        return links.logistic(shifted, smoothed(p, self.label_smoothing))


@dataclass(frozen=True, kw_only=True)
class PickScoreLoss(JudgeObjective):
    """PickScore's loss (Kirstain et al. 2023, arXiv 2305.01569; code yuvalkirstain/PickScore:trainer): a KL.

    KL(y || softmax(s_w, s_l)) with y = (p, 1 - p): Bradley-Terry with soft labels minus the label's entropy, so that a tie's
    minimum is 0 as a win's is. The gradient is that of Bradley-Terry. The code does this for ties only, by adding
    log(1/2); other soft labels do not occur there.

    Where paper and code differ from here: the code weighs a pair by 1 / (rows of its prompt), divided by the sum over the
    batch; the data's weights are the same without the division, so a batch of often compared prompts has a smaller step.
    In-batch negatives, off by default there, are not here.
    """

    name: ClassVar[str] = "pickscore"
    title: ClassVar[str] = "PickScore"
    paper: ClassVar[str] = "2305.01569"
    composition: ClassVar[str] = "score -> (w - l) / temperature -> logistic - entropy of the label"

    def link(self, z: Tensor, p: Tensor) -> Tensor:
        return links.logistic(z, p) - label_entropy(p)


@dataclass(frozen=True, kw_only=True)
class BradleyTerryTies(JudgeObjective):
    """Bradley-Terry with ties (Rao and Kupper 1967; as in VideoAlign, arXiv 2501.13918?, and HPSv3's code).

    Win: -log sigma(z - ln k). Tie: -log sigma(z - ln k) - log sigma(-z - ln k) - ln(k^2 - 1). Three outcomes whose
    probabilities add up to 1: a tie is an event and not half a win, so that scores learn how far apart "different" is.
    Needs data.ties: soft; without ties in the data it is Bradley-Terry with a margin of ln k.

    Attributes:
        k: > 1; 5 (VideoAlign, HPSv3's code).
    """

    k: float = 5.0

    name: ClassVar[str] = "bradley_terry_ties"
    title: ClassVar[str] = "Bradley-Terry with ties"
    paper: ClassVar[str] = "2501.13918?"
    composition: ClassVar[str] = "score -> (w - l) / temperature -> three-way logistic (win, tie, loss)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k <= 1:
            raise ValueError(f"k is {self.k}; expected more than 1, at which ties cannot happen")

    def link(self, z: Tensor, p: Tensor) -> Tensor:
        return tied_logistic(z, p, self.k)


@dataclass(frozen=True, kw_only=True)
class GeneralPreference(JudgeObjective):
    """General preference embeddings (Zhang et al. 2024, arXiv 2410.02197; code general-preference-model).

    Every item has an embedding v in R^2k instead of a score, and P(w over l) = sigma(<R v_w, v_l> / temperature), R a
    rotation by 90 degrees in each of k planes. One plane already represents rock, paper, scissors, which no score can.
    Soft labels as in Bradley-Terry. The paper scales v to unit length; in the code that is commented out. The paper is
    followed: the network scales them (`diffalign.judges`).

    temperature: 0.1 (paper and code).
    """

    temperature: float = 0.1

    name: ClassVar[str] = "general_preference"
    title: ClassVar[str] = "General preference"
    paper: ClassVar[str] = "2410.02197"
    composition: ClassVar[str] = "embedding -> <R v_w, v_l> / temperature -> logistic"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.JUDGEMENT, Cap.UNITS), reference=False)

    def difference(self, scores: Scores, pairs: Pairs) -> Tensor:
        v = scores.need_units().theta
        return general_preference(v[pairs.w], v[pairs.l])

    def link(self, z: Tensor, p: Tensor) -> Tensor:
        return links.logistic(z, p)
