"""Cases of `diffalign.losses.judging`."""

import math

import pytest
import torch
from loss_cases import Case, Start
from torch.nn.functional import softplus

from diffalign.losses import Kind, Layout, Pairs, Scores
from diffalign.losses.judging import BradleyTerry, BradleyTerryTies, GeneralPreference, PickScoreLoss

JUDGE = (Kind.JUDGE,)
LABELS = torch.tensor([1.0, 0.5, 0.8, 1.0], dtype=torch.float64)  # a tie among them


def batch(seed, *, embedding=False, plain=False):
    """4 pairs over 8 rows in a random order."""
    g = torch.Generator().manual_seed(seed + 300)
    theta = torch.randn(8, generator=g, dtype=torch.float64)
    v = torch.randn(8, 6, generator=g, dtype=torch.float64).requires_grad_() if embedding else None
    scores = Scores.judged(theta.requires_grad_() if v is None else v.sum(1), v)
    order = torch.randperm(8, generator=g)
    rand = lambda: torch.rand(4, generator=g, dtype=torch.float64)  # noqa: E731
    labels = {} if plain else {"p": LABELS, "weight": 0.5 + rand(), "margin": 0.1 * rand()}
    return scores, Layout(pairs=Pairs(w=order[:4], l=order[4:], **labels)), {}


def equal(embedding=False, **labels):
    """One pair with equal scores."""

    def made():
        v = torch.tensor([[0.6, 0.8]] * 2, dtype=torch.float64, requires_grad=True) if embedding else None
        theta = torch.zeros(2, dtype=torch.float64, requires_grad=True) if v is None else v.sum(1)
        return Scores.judged(theta, v), Layout(pairs=Pairs.halves(1, **labels)), {}

    return made


def delta(batch, temperature):
    scores, pairs = batch[0], batch[1].pairs
    return (scores.theta[pairs.w] - scores.theta[pairs.l]) / temperature, pairs


def bradley_terry_formula(batch, frozen):
    z, pairs = delta(batch, 0.7)
    z = z - pairs.margin - 0.57 * (pairs.p != 0.5).double()
    p = 0.9 * pairs.p + 0.1 * (1 - pairs.p)
    return pairs.weight * (p * softplus(-z) + (1 - p) * softplus(z))


def pickscore_formula(batch, frozen):
    z, pairs = delta(batch, 0.7)
    z = z - pairs.margin
    y = torch.stack([pairs.p, 1 - pairs.p], 1)
    q = torch.stack([z, torch.zeros_like(z)], 1).log_softmax(1)
    return pairs.weight * torch.nn.functional.kl_div(q, y, reduction="none").sum(1)


def ties_formula(batch, frozen):
    """From the three probabilities as Rao and Kupper write them, with strengths exp(score)."""
    z, pairs = delta(batch, 0.7)
    a, b, k = (z - pairs.margin).exp(), torch.ones_like(z), 5.0
    win, lose = a / (a + k * b), b / (b + k * a)
    tie = (k**2 - 1) * a * b / ((a + k * b) * (b + k * a))
    decided = -pairs.p * win.log() - (1 - pairs.p) * lose.log()
    return pairs.weight * torch.where(pairs.p == 0.5, -tie.log(), decided)


def general_formula(batch, frozen):
    scores, layout, _ = batch
    pairs, v = layout.pairs, scores.units.theta
    block = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    rotation = torch.block_diag(block, block, block)
    z = torch.einsum("pi,ji,pj->p", v[pairs.w], rotation, v[pairs.l]) / 0.1 - pairs.margin
    return pairs.weight * (pairs.p * softplus(-z) + (1 - pairs.p) * softplus(z))


def swapping_a_clean_pair_costs_its_difference(cls):
    scores, layout, _ = batch(4, plain=True)
    pairs, loss = layout.pairs, cls(temperature=0.7)
    one, other = loss(scores, pairs), loss(scores, Pairs(w=pairs.l, l=pairs.w))
    torch.testing.assert_close(other.per_item - one.per_item, one.metrics["judge/margins"])


def a_tie_pulls_scores_together(cls):
    """At equal scores its gradient is 0, and its loss the least of all differences."""
    values = []
    for gap in (-1.0, 0.0, 1.0):
        theta = torch.tensor([gap, 0.0], dtype=torch.float64, requires_grad=True)
        out = cls()(Scores.judged(theta), Pairs.halves(1, p=0.5))
        values.append(out.loss.item())
        if gap == 0:
            torch.testing.assert_close(torch.autograd.grad(out.loss, theta)[0].abs().max().item(), 0.0)
    assert values[1] < min(values[0], values[2])
    torch.testing.assert_close(values[0], values[2])


def a_perfect_prediction_costs_nothing(cls):
    theta = torch.tensor([math.log(0.8 / 0.2), 0.0], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(cls()(Scores.judged(theta), Pairs.halves(1, p=0.8)).loss.item(), 0.0)


def a_number_added_to_both_scores_changes_nothing(cls):
    scores, layout, _ = batch(5)
    moved = Scores.judged(scores.theta + 3)
    torch.testing.assert_close(cls()(moved, layout).per_item, cls()(scores, layout).per_item)


def outcomes_are_a_distribution(cls):
    theta = torch.tensor([0.7, 0.0], dtype=torch.float64, requires_grad=True)
    scores = Scores.judged(theta)
    win, lose = (cls()(scores, Pairs(w=torch.tensor([i]), l=torch.tensor([1 - i]))).loss for i in (0, 1))
    tie = cls()(scores, Pairs.halves(1, p=0.5)).loss
    torch.testing.assert_close(sum(math.exp(-x.item()) for x in (win, lose, tie)), 1.0)


def k_must_allow_ties(cls):
    with pytest.raises(ValueError, match="expected more than 1"):
        cls(k=1.0)


def rock_paper_scissors_can_be_learnt(cls):
    """Three unit vectors at 120 degrees: each beats the next by the same margin."""
    angles = torch.tensor([0.0, 2 * math.pi / 3, 4 * math.pi / 3], dtype=torch.float64)
    v = torch.stack([angles.cos(), angles.sin()], 1).requires_grad_()
    out = cls()(Scores.judged(v.sum(1), v), Pairs(w=torch.tensor([0, 1, 2]), l=torch.tensor([1, 2, 0])))
    torch.testing.assert_close(out.metrics["judge/margins"], torch.full((3,), math.sin(2 * math.pi / 3) / 0.1).double())
    assert out.per_item.max() < 1e-3


LOG2 = math.log(2)
# A margin of 0.57 at equal scores: log(1 + exp(0.57)) and -sigma(0.57), smoothed by 0.1.
MARGIN = 0.9 * math.log1p(math.exp(0.57)) + 0.1 * math.log1p(math.exp(-0.57))
SLOPE = (0.9 / (1 + math.exp(-0.57)) - 0.1 / (1 + math.exp(0.57))) / 0.7
CASES = [
    Case(
        objective=BradleyTerry,
        make=lambda cls: cls(temperature=0.7, margin=0.57, label_smoothing=0.1),
        batch=batch,
        formula=bradley_terry_formula,
        start=Start(MARGIN, (-SLOPE, SLOPE), equal()),
        identities=[
            swapping_a_clean_pair_costs_its_difference,
            a_tie_pulls_scores_together,
            a_number_added_to_both_scores_changes_nothing,
        ],
        mutations=[
            ("scores.theta[pairs.w] - scores.theta[pairs.l]", "scores.theta[pairs.l] - scores.theta[pairs.w]"),
            (" / self.temperature", " * self.temperature"),
            ("z - self.margin)", "z + self.margin)"),
            ("torch.where(is_tie(p), z,", "torch.where(~is_tie(p), z,"),
            ("pairs.weight * self.link", "self.link"),
        ],
        kinds=JUDGE,
    ),
    Case(
        objective=PickScoreLoss,
        make=lambda cls: cls(temperature=0.7),
        batch=batch,
        formula=pickscore_formula,
        start=Start(LOG2, (-0.5 / 0.7, 0.5 / 0.7), equal()),
        identities=[
            swapping_a_clean_pair_costs_its_difference,
            a_perfect_prediction_costs_nothing,
            a_tie_pulls_scores_together,
        ],
        mutations=[
            ("- label_entropy(p)", "+ label_entropy(p)"),
            ("links.logistic(z, p)", "links.logistic(-z, p)"),
            ("return -torch.xlogy(p, p)", "return -2 * torch.xlogy(p, p)"),
        ],
        kinds=JUDGE,
    ),
    Case(
        objective=BradleyTerryTies,
        make=lambda cls: cls(temperature=0.7, k=5.0),
        batch=batch,
        formula=ties_formula,
        start=Start(math.log(6), (-5 / 6 / 0.7, 5 / 6 / 0.7), equal()),
        identities=[outcomes_are_a_distribution, a_tie_pulls_scores_together, k_must_allow_ties],
        mutations=[
            ("delta - math.log(k)), logsigmoid", "delta + math.log(k)), logsigmoid"),
            ("math.log(k**2 - 1)", "math.log(k**2 + 1)"),
            ("tie = -win - loss", "tie = -win"),
            ("tied_logistic(z, p", "tied_logistic(-z, p"),
        ],
        kinds=JUDGE,
    ),
    Case(
        objective=GeneralPreference,
        make=lambda cls: cls(),
        batch=lambda seed: batch(seed, embedding=True),
        formula=general_formula,
        # Equal embeddings: neither is preferred; the slopes of a rotation sum to (v_2 - v_1) / 2 / 0.1 and its negative.
        start=Start(LOG2, (-0.5 * (0.8 - 0.6) / 0.1, 0.5 * (0.8 - 0.6) / 0.1), equal(embedding=True)),
        identities=[rock_paper_scissors_can_be_learnt],
        mutations=[
            ("a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]", "a[..., 0] * b[..., 1] + a[..., 1] * b[..., 0]"),
            ("general_preference(v[pairs.w], v[pairs.l])", "general_preference(v[pairs.l], v[pairs.w])"),
            ("temperature: float = 0.1", "temperature: float = 1.0"),
        ],
        kinds=JUDGE,
    ),
]
