"""Cases of `diffalign.losses.ranked`."""

import itertools
import math

import torch
from loss_cases import Case, Start, at_start, row_scores, token_scores
from torch.nn.functional import logsigmoid

from diffalign import losses
from diffalign.losses import Kind, Layout, Lists, Pairs, Scores
from diffalign.losses.ranked import LambdaRank, PlackettLuce, StepDPO, TPOTree, plackett_luce

ALL = (Kind.TOKEN, Kind.STEP, Kind.BOUND)


def lists_of(seed, ties=False):
    """Lists of 4, 3 and 2 rows out of 9, padded with index 99."""
    g = torch.Generator().manual_seed(seed + 30)
    order = torch.randperm(9, generator=g).tolist()
    index = torch.full((3, 4), 99)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    for i, size in enumerate((4, 3, 2)):
        index[i, :size] = torch.tensor([order.pop() for _ in range(size)])
        mask[i, :size] = True
    gain = torch.rand(3, 4, generator=g, dtype=torch.float64)
    if ties:
        gain[0, :2] = gain[0, 2]
    return Layout(lists=Lists(index=index, gain=gain, mask=mask))


def lists_batch(ties=False):
    return lambda seed: (row_scores(9, seed), lists_of(seed, ties), {})


def start_batch(gain=(1.0, 0.5, 0.0)):
    n = len(gain)
    lists = Lists(index=torch.arange(n)[None], gain=torch.tensor([gain]), mask=torch.ones(1, n, dtype=torch.bool))
    return lambda: (at_start(n), Layout(lists=lists), {})


def each_list(batch, u):
    """(scaled scores, gains) of the rows of every list, as Python walks them."""
    lists = batch[1].lists
    for index, gain, mask in zip(lists.index, lists.gain, lists.mask):
        rows = index[mask]
        yield u[rows], gain[mask]


def log_ratio(batch):
    return batch[0].theta - batch[0].ref


def plackett_luce_formula(batch, frozen):
    """Choose the best first, then the best of the rest, and so on; strict orders."""
    out = []
    for u, gain in each_list(batch, 0.1 * log_ratio(batch)):
        ranked = u[gain.argsort(descending=True)]
        out.append(-sum(torch.log_softmax(ranked[k:], 0)[0] for k in range(len(ranked))))
    return torch.stack(out)


def ordered(gain):
    return [(i, j) for i, j in itertools.permutations(range(len(gain)), 2) if gain[i] > gain[j]]


def discount(u, gain):
    """1 / log(1 + rank), ranked by score and then by gain."""
    order = sorted(range(len(u)), key=lambda i: (-u[i].item(), -gain[i].item()))
    return {i: 1 / math.log(2 + place) for place, i in enumerate(order)}


def lambda_formula(batch, frozen, form="exponential"):
    out = []
    held = [u for u, _ in each_list(frozen, log_ratio(frozen))]
    for (u, gain), still in zip(each_list(batch, 0.1 * log_ratio(batch)), held):
        worth = 2**gain - 1 if form == "exponential" else gain
        d = discount(still, gain)
        terms = [-logsigmoid(u[i] - u[j]) * (worth[i] - worth[j]) * abs(d[i] - d[j]) for i, j in ordered(gain)]
        out.append(sum(terms) / len(terms))
    return torch.stack(out)


def two_rows_are_dpo(cls):
    scores = row_scores(6, 8)
    pairs = Pairs(w=torch.tensor([0, 3, 4]), l=torch.tensor([1, 2, 5]))
    lists = Lists(
        index=torch.stack([pairs.l, pairs.w], 1),
        gain=torch.tensor([[0.0, 1.0]]).repeat(3, 1),
        mask=torch.ones(3, 2, dtype=torch.bool),
    )
    torch.testing.assert_close(
        cls(beta=0.3)(scores, lists).per_item, losses.DPO(beta=0.3)(scores, pairs).per_item, rtol=1e-9, atol=1e-9
    )


def listing_order_is_irrelevant(make, scores_of):
    """Rows of a list in another order, ties included; also at equal scores."""

    def identity(cls):
        layout = lists_of(9, ties=True)
        lists = layout.lists
        flipped = Lists(index=lists.index.flip(1), gain=lists.gain.flip(1), mask=lists.mask.flip(1))
        for scores in scores_of():
            loss = make(cls)
            torch.testing.assert_close(loss(scores, flipped).per_item, loss(scores, lists).per_item)

    return identity


def probabilities_of_all_orders_sum_to_one(cls):
    u = torch.tensor([[0.3, -1.2, 0.9]], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    total = sum(
        torch.exp(-plackett_luce(u, torch.tensor([order], dtype=torch.float64), mask))
        for order in itertools.permutations((0, 1, 2))
    )
    torch.testing.assert_close(total, torch.ones_like(total))
    scores = Scores.tokens(u[0] * 10, torch.zeros(3, dtype=torch.float64))
    lists = Lists(index=torch.arange(3)[None], gain=torch.tensor([[1.0, 0.0, 2.0]]), mask=mask)
    torch.testing.assert_close(cls(beta=0.1)(scores, lists).per_item, plackett_luce(u, lists.gain, mask))


def lambda_reduces_to_dpo_times_its_weight(cls):
    """Two rows: one pair, |2^1 - 2^0| |1 / log 2 - 1 / log 3|."""
    scores = row_scores(2, 10)
    lists = Lists(
        index=torch.tensor([[0, 1]]), gain=torch.tensor([[1.0, 0.0]]), mask=torch.ones(1, 2, dtype=torch.bool)
    )
    weight = 1 / math.log(2) - 1 / math.log(3)
    dpo = losses.DPO(beta=0.1)(scores, Pairs.halves(1)).per_item
    torch.testing.assert_close(cls(beta=0.1)(scores, lists).per_item, weight * dpo)


def row_spread():
    return [row_scores(9, 12), at_start(9)]


# -- trees -----------------------------------------------------------------------------------------------------------


def steps_of(n, u, g):
    """Step numbers that never fall, some units without a step."""
    segment = torch.randint(0, 2, (n, u), generator=g).cumsum(1) + 1
    return segment.masked_fill(torch.rand(n, u, generator=g) < 0.15, 0)


def tree_batch(seed):
    g = torch.Generator().manual_seed(seed + 60)
    weight = 2 * torch.rand(9, 6, generator=g, dtype=torch.float64)
    return token_scores(9, 6, seed, weight=weight, segment=steps_of(9, 6, g)), lists_of(seed), {}


def tree_start():
    theta = torch.full((3, 4), -1.0, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(3, 4, dtype=torch.bool)
    segment = torch.tensor([1, 1, 2, 2]).repeat(3, 1)
    scores = Scores.tokens(theta, theta.detach().clone(), mask=mask, segment=segment)
    return scores, start_batch()()[1], {}


def tree_score(scores, n):
    """Weighted mean over steps of the mean log-ratio inside the step, by loops."""
    units, out = scores.units, []
    for i in range(n):
        total, weights = 0.0, 0.0
        for step in range(1, 9):
            inside = units.mask[i] & (units.segment[i] == step)
            if inside.any():
                w = units.weight[i][inside].mean()
                total, weights = total + w * (units.theta[i] - units.ref[i])[inside].mean(), weights + w
        out.append(total / max(weights, 1e-6) if weights else torch.zeros((), dtype=torch.float64))
    return torch.stack(out)


def tree_formula(batch, frozen):
    out = []
    for u, gain in each_list(batch, 0.5 * tree_score(batch[0], 9)):
        n = len(gain)
        out.append(sum(-logsigmoid(u[i] - u[j]) for i, j in ordered(gain)) / (n * (n - 1)))
    return torch.stack(out)


def tree_lambda_formula(batch, frozen):
    out = []
    held = [u for u, _ in each_list(frozen, tree_score(frozen[0], 9))]
    for (u, gain), still in zip(each_list(batch, 0.5 * tree_score(batch[0], 9)), held):
        d, worth = discount(still, gain), 2**gain - 1
        terms = [-logsigmoid(u[i] - u[j]) * (worth[i] - worth[j]) * abs(d[i] - d[j]) for i, j in ordered(gain)]
        out.append(sum(terms) / len(terms))
    return torch.stack(out)


def the_ranking_improves(cls):
    """The gradient raises the best leaf and lowers the worst: the published outer sign does the opposite."""
    scores, layout, _ = tree_start()
    out = cls(beta=0.5)(scores, layout)
    (grad,) = torch.autograd.grad(out.loss, scores.units.theta)
    assert (grad[0] < 0).all()
    assert (grad[2] > 0).all()


def a_step_counts_once_however_long(cls):
    """Splitting a unit of a step into two equal halves of the same mean changes nothing."""
    theta = torch.tensor([[-1.0, -3.0], [-2.0, -2.5]], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[-1.5, -2.0], [-1.0, -2.0]], dtype=torch.float64)
    lists = Lists(
        index=torch.tensor([[0, 1]]), gain=torch.tensor([[1.0, 0.0]]), mask=torch.ones(1, 2, dtype=torch.bool)
    )
    twice = torch.tensor([0, 0, 1])
    segment = torch.tensor([[1, 2], [1, 2]])
    values = []
    for pick in (torch.tensor([0, 1]), twice):
        mask = torch.ones(2, len(pick), dtype=torch.bool)
        scores = Scores.tokens(theta[:, pick], ref[:, pick], mask=mask, segment=segment[:, pick])
        values.append(cls(beta=0.5)(scores, lists).per_item)
    torch.testing.assert_close(values[0], values[1])


def tree_spread():
    g = torch.Generator().manual_seed(4)
    return [token_scores(9, 6, 12, segment=steps_of(9, 6, g))]


# -- steps -----------------------------------------------------------------------------------------------------------


def step_batch(seed):
    g = torch.Generator().manual_seed(seed + 70)
    segment = (torch.rand(8, 5, generator=g) < 0.3).cumsum(1).clamp(max=1)
    rand = lambda: torch.rand(4, generator=g, dtype=torch.float64)  # noqa: E731
    pairs = Pairs.halves(4, p=0.6 + 0.4 * rand(), weight=0.5 + rand(), margin=0.3 * rand())
    return token_scores(8, 5, seed, segment=segment), Layout(pairs=pairs), {}


def step_formula(mode):
    def formula(batch, frozen):
        scores, layout, _ = batch
        units, pairs, u = scores.units, layout.pairs, []
        for i in range(8):
            part = units.mask[i] & (units.segment[i] > 0)
            total = ((units.theta[i] - units.ref[i]) * part).sum()
            u.append(total / max(int(part.sum()), 1) ** 0.5)
        u = torch.stack(u)
        z = 0.2 * (u[pairs.w] - u[pairs.l]) - pairs.margin
        if mode == "logistic":
            return -pairs.weight * (pairs.p * logsigmoid(z) + (1 - pairs.p) * logsigmoid(-z))
        delta = z / 0.2
        return pairs.weight * (pairs.p * (delta - 2.5) ** 2 + (1 - pairs.p) * (delta + 2.5) ** 2)

    return formula


def step_start():
    theta = torch.full((2, 4), -1.0, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 4, dtype=torch.bool)
    segment = torch.tensor([0, 0, 1, 1]).repeat(2, 1)
    return Scores.tokens(theta, theta.detach().clone(), mask=mask, segment=segment), Layout(pairs=Pairs.halves(1)), {}


def the_shared_prefix_is_not_trained(cls):
    scores, layout, _ = step_start()
    (grad,) = torch.autograd.grad(cls(beta=0.1)(scores, layout).loss, scores.units.theta)
    torch.testing.assert_close(grad[:, :2], torch.zeros(2, 2, dtype=torch.float64))
    torch.testing.assert_close(grad[:, 2:], torch.tensor([[-0.05] * 2, [0.05] * 2], dtype=torch.float64))


def zero_at_its_target(cls):
    theta = torch.tensor([[-1.0, 2.5], [-1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 2, dtype=torch.bool)
    segment = torch.tensor([[0, 1], [0, 1]])
    scores = Scores.tokens(theta, torch.zeros(2, 2, dtype=torch.float64), mask=mask, segment=segment)
    out = cls(beta=0.2, mode="ipo")(scores, Pairs.halves(1))
    torch.testing.assert_close(out.loss.item(), 0.0, rtol=0, atol=1e-12)


def all_units_are_dpo(cls):
    scores, layout, _ = step_batch(5)
    units = scores.units
    everywhere = Scores.tokens(units.theta, units.ref, mask=units.mask, segment=torch.ones(8, 5, dtype=torch.long))
    torch.testing.assert_close(
        cls(beta=0.1)(everywhere, layout).per_item, losses.DPO(beta=0.1)(everywhere, layout).per_item
    )


TREE = ("units.weight.detach(), units)[0]", "torch.ones_like(units.weight), units)[0]")

CASES = [
    Case(
        objective=PlackettLuce,
        make=lambda cls: cls(beta=0.1),
        batch=lists_batch(),
        formula=plackett_luce_formula,
        # Best: first in both choices it is part of. d = u' = -1 + 1/3, 1/3 - 1/2, 1/3 + 1/2, times beta.
        start=Start(math.log(6), [-0.2 / 3, -0.05 / 3, 0.25 / 3], start_batch()),
        identities=[
            two_rows_are_dpo,
            probabilities_of_all_orders_sum_to_one,
            listing_order_is_irrelevant(lambda cls: cls(beta=0.1), row_spread),
        ],
        mutations=[
            ("spread.logsumexp(-1) - u", "spread.logsumexp(-1) + u"),
            ("gain[:, None, :] <= gain[:, :, None]", "gain[:, None, :] >= gain[:, :, None]"),
            ("self.beta_for(scores.kind) * self.transform", "2 * self.beta_for(scores.kind) * self.transform"),
            ("- u) * mask).sum(1)", "- u) * mask).mean(1)"),
        ],
        kinds=ALL,
    ),
    Case(
        objective=LambdaRank,
        make=lambda cls: cls(beta=0.1),
        batch=lists_batch(),
        formula=lambda_formula,
        start=Start(
            # Pairs (1, 2), (1, 3), (2, 3) at gains 1, 1/2, 0, each log 2 times its lambda, over 3.
            math.log(2) / 3 * sum(lam := [0.3119054, 0.7213475, 0.0782415]),
            [-0.05 / 3 * (lam[0] + lam[1]), 0.05 / 3 * (lam[0] - lam[2]), 0.05 / 3 * (lam[1] + lam[2])],
            start_batch(),
        ),
        identities=[
            lambda_reduces_to_dpo_times_its_weight,
            listing_order_is_irrelevant(lambda cls: cls(beta=0.1), row_spread),
        ],
        mutations=[
            ("-logsigmoid(u[:, :, None] - u[:, None, :])", "-logsigmoid(u[:, None, :] - u[:, :, None])"),
            ("clamp(max=links.EXP_LIMIT).exp2()", "clamp(max=links.EXP_LIMIT).exp()"),
            (".log1p()", ".log2()"),
            ("total / number.clamp(min=1)", "total"),
            ("scores = u.detach()", "scores = -u.detach()"),
        ],
        kinds=ALL,
    ),
    Case(
        name="lambda_rank with linear gain",
        objective=LambdaRank,
        make=lambda cls: cls(beta=0.1, gain="linear"),
        batch=lists_batch(ties=True),
        formula=lambda batch, frozen: lambda_formula(batch, frozen, "linear"),
        start="the start is the same as with exponential gain up to the gains",
        identities=[listing_order_is_irrelevant(lambda cls: cls(beta=0.1, gain="linear"), row_spread)],
        mutations=[("self.gain)", '"exponential")')],
        kinds=ALL,
    ),
    Case(
        objective=TPOTree,
        make=lambda cls: cls(beta=0.5),
        batch=tree_batch,
        formula=tree_formula,
        # Three ordered pairs of log 2 over 3 * 2; the best leads in two of them, each of slope beta / 2, over 6.
        start=Start(math.log(2) / 2, [-0.5 / 6, 0.0, 0.5 / 6], tree_start),
        identities=[
            the_ranking_improves,
            a_step_counts_once_however_long,
            listing_order_is_irrelevant(lambda cls: cls(beta=0.5), tree_spread),
        ],
        mutations=[
            ("lift(units.theta) - lift(units.ref), units)", "lift(units.ref) - lift(units.theta), units)"),
            ("size * (size - 1)", "size"),
            ("sums / (divisor", "sums / (1 + divisor"),
            TREE,
        ],
        kinds=(Kind.TOKEN, Kind.STEP),
    ),
    Case(
        name="tpo_tree with lambda weights",
        objective=TPOTree,
        make=lambda cls: cls(beta=0.5, lambda_weighted=True),
        batch=tree_batch,
        formula=tree_lambda_formula,
        start="as lambda_rank",
        identities=[the_ranking_improves],
        mutations=[("lists.mask, weight)\n            return total", "lists.mask)\n            return total")],
        kinds=(Kind.TOKEN, Kind.STEP),
    ),
    Case(
        objective=StepDPO,
        make=lambda cls: cls(beta=0.2, length_power=0.5),
        batch=step_batch,
        formula=step_formula("logistic"),
        # Two units after the branch, each beta / 2 / sqrt(2).
        start=Start(0.6931472, [-0.1 * math.sqrt(2), 0.1 * math.sqrt(2)], step_start),
        identities=[the_shared_prefix_is_not_trained, all_units_are_dpo],
        mutations=[
            ("units.segment != 0", "units.segment == 0"),
            (
                "lift(units.theta) - lift(units.ref)).masked_fill(~part",
                "lift(units.ref) - lift(units.theta)).masked_fill(~part",
            ),
            ("** self.length_power", "** (2 * self.length_power)"),
        ],
        kinds=(Kind.TOKEN, Kind.STEP),
    ),
    Case(
        name="step_dpo with the square link",
        objective=StepDPO,
        make=lambda cls: cls(beta=0.2, length_power=0.5, mode="ipo"),
        batch=step_batch,
        formula=step_formula("ipo"),
        start=Start(6.25, [-5 * math.sqrt(2), 5 * math.sqrt(2)], step_start),
        identities=[zero_at_its_target],
        mutations=[("links.square(z, p, beta)", "links.square(z, p)")],
        kinds=(Kind.TOKEN, Kind.STEP),
    ),
]
