"""Cases of `diffalign.losses.anchored`."""

import math

import torch
from loss_cases import Case, Start, at_start, pair_batch, pair_rho, pair_start, row_scores
from torch.nn.functional import softplus

from diffalign.losses import DPO, Kind, Layout, Lists, Pairs, Scores
from diffalign.losses.anchored import NCA, APODown, APOZero, BCOPair, EXOList, InfoNCA, NCAList
from diffalign.losses.pairwise import EXO

ALL = (Kind.TOKEN, Kind.STEP, Kind.BOUND)
LOG2 = math.log(2)


def anchored_formula(cost):
    """Mixed over both labels; the margin split evenly."""

    def formula(batch, frozen):
        w, l, pairs = pair_rho(batch)
        w, l = 0.1 * w - pairs.margin / 2, 0.1 * l + pairs.margin / 2
        return pairs.weight * (pairs.p * cost(w, l) + (1 - pairs.p) * cost(l, w))

    return formula


def constants_matter(make):
    """Adding a constant to every log-ratio changes the loss: that is what anchoring means."""

    def identity(cls):
        scores, layout, _ = pair_batch(4)
        moved = Scores.tokens(scores.theta + 3, scores.ref)
        change = make(cls)(moved, layout).per_item - make(cls)(scores, layout).per_item
        assert (change.abs() > 1e-4).any()

    return identity


def swap_with_the_label(cls):
    scores, _, _ = pair_batch(4)
    pairs = Pairs.halves(4, p=0.7)
    other = Pairs(w=pairs.l, l=pairs.w, p=0.3)
    torch.testing.assert_close(cls(beta=0.1)(scores, pairs).per_item, cls(beta=0.1)(scores, other).per_item)


def nca_settles_at_two_thirds(cls):
    # The chosen side alone: the rejected one has rho = 0 and its slope does not depend on the chosen.
    theta = torch.tensor([LOG2 / 0.1, 0.0], dtype=torch.float64, requires_grad=True)
    out = cls(beta=0.1)(Scores.tokens(theta, torch.zeros(2)), Pairs.halves(1))
    (grad,) = torch.autograd.grad(out.loss, theta)
    torch.testing.assert_close(grad[0].item(), 0.0, rtol=0, atol=1e-12)


def bco_is_two_classifications(cls):
    scores, layout, _ = pair_batch(5, soft=False)
    w, l, _ = pair_rho((scores, layout, {}))
    sides = -torch.sigmoid(0.1 * w).log() - (1 - torch.sigmoid(0.1 * l)).log()
    torch.testing.assert_close(cls(beta=0.1)(scores, layout).per_item, sides)


def apo_zero_of_a_pair_is_two_items(cls):
    """Raising chosen and lowering rejected are separate terms: moving one side leaves the other's slope alone."""
    theta = torch.tensor([3.0, -2.0], dtype=torch.float64, requires_grad=True)
    moved = torch.tensor([3.0, 9.0], dtype=torch.float64, requires_grad=True)
    slopes = [
        torch.autograd.grad(cls(beta=0.1)(Scores.tokens(x, torch.zeros(2)), Pairs.halves(1)).loss, x)[0][0]
        for x in (theta, moved)
    ]
    torch.testing.assert_close(slopes[0], slopes[1])


def apo_down_lowers_both(cls):
    theta = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
    out = cls(beta=0.1)(Scores.tokens(theta, torch.zeros(2)), Pairs.halves(1))
    (grad,) = torch.autograd.grad(out.loss, theta)
    assert grad[1] > grad[0] > 0


def anchored_case(cls, cost, value, slopes, identity, mutations):
    return Case(
        objective=cls,
        make=lambda cls: cls(beta=0.1),
        batch=pair_batch,
        formula=anchored_formula(cost),
        start=Start(value, slopes, pair_start()),
        identities=[constants_matter(lambda cls: cls(beta=0.1)), swap_with_the_label, identity],
        mutations=[
            *mutations,
            ("pairs.weight * loss", "loss"),
            ("w - half, l + half", "w + half, l - half"),
            ("(1 - pairs.p) * self.cost", "pairs.p * self.cost"),
        ],
        kinds=ALL,
    )


# -- lists -----------------------------------------------------------------------------------------------------------


def list_batch(seed):
    """3 lists of up to 4 of 9 rows; the second has 2 entries, the third 3."""
    g = torch.Generator().manual_seed(seed + 50)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    index = torch.zeros(3, 4, dtype=torch.long)
    index[mask] = torch.randperm(9, generator=g)
    gain = torch.randn(3, 4, generator=g, dtype=torch.float64)
    return row_scores(9, seed), Layout(lists=Lists(index=index, gain=gain, mask=mask)), {}


def list_start(gains=(0.0, 0.0)):
    index = torch.arange(2)[None]
    lists = Lists(
        index=index, gain=torch.tensor([gains], dtype=torch.float64), mask=torch.ones_like(index, dtype=torch.bool)
    )
    return lambda: (at_start(2), Layout(lists=lists), {})


def per_list(term):
    def formula(batch, frozen):
        scores, layout, _ = batch
        lists, rho = layout.lists, scores.theta - scores.ref
        values = []
        for index, gain, mask in zip(lists.index, lists.gain, lists.mask):
            values.append(term(0.1 * rho[index[mask]], (gain[mask] / 0.5).softmax(0)))
        return torch.stack(values)

    return formula


def two_entries(cls, reference, gains, **settings):
    """A list of two against a pairwise objective."""
    scores, _, _ = pair_batch(2)
    index = torch.stack([torch.arange(4), torch.arange(4) + 4], 1)
    gain = torch.tensor([gains] * 4, dtype=torch.float64)
    lists = Lists(index=index, gain=gain, mask=torch.ones(4, 2, dtype=torch.bool))
    ours, theirs = cls(beta=0.1, **settings)(scores, lists), reference(scores, Pairs.halves(4))
    torch.testing.assert_close(ours.per_item, theirs.per_item)


def padding_and_empty_lists_do_not_count(make):
    def identity(cls):
        scores, layout, _ = list_batch(1)
        lists = layout.lists
        objective = make(cls)
        short = Lists(index=lists.index[1:2, :2], gain=lists.gain[1:2, :2], mask=lists.mask[1:2, :2])
        torch.testing.assert_close(objective(scores, short).per_item, objective(scores, layout).per_item[1:2])
        empty = Lists(index=lists.index, gain=lists.gain, mask=torch.zeros_like(lists.mask))
        out = objective(scores, empty)
        (grad,) = torch.autograd.grad(out.loss, scores.theta)
        assert not out.per_item.any()
        assert not grad.any()

    return identity


def default(cls):
    return cls(beta=0.1, reward_temperature=0.5)


def list_case(cls, term, start, identity, mutations):
    return Case(
        objective=cls,
        make=default,
        batch=list_batch,
        formula=per_list(term),
        start=start,
        identities=[padding_and_empty_lists_do_not_count(default), identity],
        mutations=[*mutations, ("lists.gain / self.reward_temperature", "lists.gain * self.reward_temperature")],
        kinds=ALL,
    )


CASES = [
    anchored_case(
        NCA,
        lambda w, l: softplus(-w) + 0.5 * softplus(w) + 0.5 * softplus(l),
        2 * LOG2,
        [-0.025, 0.025],
        nca_settles_at_two_thirds,
        [("links.logistic(r_w) +", "links.logistic(-r_w) +"), ("0.5 * links.logistic(-r_l)", "links.logistic(-r_l)")],
    ),
    anchored_case(
        BCOPair,
        lambda w, l: softplus(-w) + softplus(l),
        2 * LOG2,
        [-0.05, 0.05],
        bco_is_two_classifications,
        [("links.logistic(-r_l)", "links.logistic(r_l)"), ("links.logistic(-r_l)", "0.5 * links.logistic(-r_l)")],
    ),
    anchored_case(
        APOZero,
        lambda w, l: torch.sigmoid(-w) + torch.sigmoid(l),
        1.0,
        [-0.025, 0.025],
        apo_zero_of_a_pair_is_two_items,
        [("links.sigmoid(r_w)", "links.sigmoid(-r_w)"), ("links.sigmoid(-r_l)", "2 * links.sigmoid(-r_l)")],
    ),
    anchored_case(
        APODown,
        lambda w, l: torch.sigmoid(w) + torch.sigmoid(l - w),
        1.0,
        [0.0, 0.025],
        apo_down_lowers_both,
        [("links.sigmoid(-r_w)", "links.sigmoid(r_w)"), ("links.sigmoid(r_w - r_l)", "links.sigmoid(2 * (r_w - r_l))")],
    ),
    list_case(
        InfoNCA,
        lambda r, q: -(q * (r - r.logsumexp(0))).sum(),
        Start(LOG2, [0.05 - 0.1 * 0.8, 0.05 - 0.1 * 0.2], list_start((0.5 * math.log(4), 0.0))),
        lambda cls: two_entries(cls, DPO(beta=0.1), (500.0, 0.0)),
        [
            ("return -log_q.exp() * masked", "return log_q.exp() * masked"),
            ("masked_log_softmax(r, mask)", "2 * masked_log_softmax(r, mask)"),
        ],
    ),
    list_case(
        NCAList,
        lambda r, q: (q * softplus(-r)).sum() + softplus(r).mean(),
        Start(2 * LOG2, [0.025 - 0.05 * 0.8, 0.025 - 0.05 * 0.2], list_start((0.5 * math.log(4), 0.0))),
        lambda cls: two_entries(cls, NCA(beta=0.1), (500.0, 0.0)),
        [("logsigmoid(-r) / count", "logsigmoid(r) / count"), ("logsigmoid(-r) / count", "logsigmoid(-r)")],
    ),
    list_case(
        EXOList,
        lambda r, q: (r.softmax(0) * (r.softmax(0) / q).log()).sum(),
        # As `exo` with smoothing 0.2.
        Start(
            -LOG2 - 0.5 * math.log(0.16),
            [-0.025 * math.log(4), 0.025 * math.log(4)],
            list_start((0.5 * math.log(4), 0.0)),
        ),
        lambda cls: two_entries(cls, EXO(beta=0.1, label_smoothing=0.2), (math.log(4), 0.0)),
        [("(log_p - log_q)", "(log_q - log_p)"), ("(log_p - log_q)", "(log_p - 2 * log_q)")],
    ),
]
