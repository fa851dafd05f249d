"""Cases of `diffalign.losses.unlearning`."""

import math
from dataclasses import replace

import pytest
import torch
from loss_cases import Case, Start, at_start, row_scores, token_scores
from torch.nn.functional import softplus

from diffalign import losses
from diffalign.losses import Items, Kind, Layout, Lists, Pairs, Scores, Totals
from diffalign.losses.unlearning import D2O, GA, NPO, GradDiff, IdkDPO, SimNPO

ALL = (Kind.TOKEN, Kind.STEP, Kind.BOUND)
LABELS = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0)
STATISTICS = ("kl_ref_theta", "ce_u", "undial", "pdu", "dipo_forget", "dipo_memory")


def forget_batch(seed):
    """7 rows of up to 5 tokens, listed out of order: 4 to forget, 3 to retain, with weights and statistics."""
    g = torch.Generator().manual_seed(seed + 500)
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    scores = token_scores(8, 5, seed, vocabulary={name: rand(8, 5) for name in STATISTICS})
    index = torch.tensor([3, 0, 7, 1, 2, 6, 5])
    return scores, Layout(items=Items(index=index, label=torch.tensor(LABELS), weight=0.5 + rand(7))), {}


def start(labels=(0.0,), length=(10,)):
    def batch():
        rows = len(labels)
        return (
            at_start(rows, length=length),
            Layout(items=Items(index=torch.arange(rows), label=torch.tensor(labels))),
            {},
        )

    return batch


def combine(items, lost, kept, gamma, alpha):
    """Per item: each side's values (of all rows that are listed) scaled so that the mean over all is the sum of means."""
    forget = items.label == 0
    count = len(items)
    values = torch.where(forget, gamma * lost * count / forget.sum(), alpha * kept * count / (~forget).sum())
    return values * items.weight


def token_mean(x, batch, forget=True, skip=0):
    """x (N, U) summed over the response and scaled to the side's mean over tokens, per listed item."""
    scores, layout, _ = batch
    items = layout.items
    mask = scores.units.mask[items.index].double()
    mask = mask * (mask.cumsum(1) > skip)
    side = (items.label == 0) if forget else (items.label == 1)
    return (x[items.index] * mask).sum(1) * side.sum() / mask[side].sum()


def nll(batch, forget=True):
    return token_mean(-batch[0].units.theta, batch, forget)


def rho(batch):
    scores, layout, _ = batch
    u = scores.units
    return ((u.theta - u.ref) * u.mask).sum(1)[layout.items.index]


def ga_formula(alpha, retain="nll", cap=None):
    def formula(batch, frozen):
        scores, layout, _ = batch
        kept = nll(batch, False) if retain == "nll" else token_mean(scores.vocabulary["kl_ref_theta"], batch, False)
        lost = nll(batch)
        if cap is not None:
            mask = scores.units.mask[layout.items.index].double()
            sums = -(scores.units.theta[layout.items.index] * mask).sum(1)
            forget = layout.items.label == 0
            lost = torch.minimum(sums, cap * mask.sum(1)) * forget.sum() / mask[forget].sum()
        return combine(layout.items, -lost, kept, 1.0, alpha)

    return formula


def npo_formula(batch, frozen):
    return combine(batch[1].items, 2 / 0.1 * softplus(0.1 * rho(batch)), nll(batch, False), 1.0, 0.5)


def simnpo_formula(batch, frozen):
    scores, layout, _ = batch
    u, index = scores.units, layout.items.index
    mean = ((u.theta * u.mask).sum(1) / u.mask.sum(1))[index]
    lost = 2 / 2.5 * softplus(2.5 * mean + 2.5 * 0.3)
    kept = -mean
    return combine(layout.items, lost, kept, 0.125, 1.0)


# -- identities --------------------------------------------------------------------------------------------------------


def sides_have_their_own_means(make):
    """The loss is gamma times the forget mean plus alpha times the retain mean, however many items there are of each."""

    def identity(cls):
        scores, layout, stats = forget_batch(30)
        items = replace(layout.items, weight=1.0)
        once = make(cls)(scores, items, stats).loss
        forget = torch.nonzero(items.label == 0)[:, 0]
        order = torch.cat([torch.arange(len(items)), forget, forget])
        more = Items(index=items.index[order], label=items.label[order])
        torch.testing.assert_close(make(cls)(scores, more, stats).loss, once)

    return identity


def micro_batches_add_up(make):
    """Uneven micro-batches that know the counts of the step have the loss of the whole."""

    def identity(cls):
        scores, layout, stats = forget_batch(31)
        items = replace(layout.items, weight=1.0)
        length, keep = scores.length[items.index], items.label == 1
        totals = Totals(
            items=7,
            units=float(length.sum()),
            positive_items=float(keep.sum()),
            positive_units=float(length[keep].sum()),
        )
        whole = make(cls)(scores, items, stats).loss
        known = replace(scores, totals=totals)
        parts = [
            make(cls)(known, Items(index=items.index[part], label=items.label[part]), stats).per_item
            for part in (slice(0, 2), slice(2, 3), slice(3, 7))
        ]
        torch.testing.assert_close(torch.cat(parts).mean(), whole)

    return identity


def empty_sides_are_fine(make):
    def identity(cls):
        for label in (0.0, 1.0):
            scores, layout, stats = forget_batch(32)
            index = layout.items.index[layout.items.label == label]
            out = make(cls)(scores, Items(index=index, label=torch.full((len(index),), label)), stats)
            assert torch.isfinite(out.loss)
            out.loss.backward()
        scores, _, stats = forget_batch(33)
        none = make(cls)(scores, Items(index=torch.zeros(0).long(), label=torch.zeros(0)), stats)
        none.loss.backward()
        assert none.loss == 0

    return identity


def everywhere(make):
    return [sides_have_their_own_means(make), micro_batches_add_up(make), empty_sides_are_fine(make)]


def pairs_serve_as_items(cls):
    """Rejected rows are forgotten, chosen ones retained."""
    scores, _, _ = forget_batch(34)
    pairs = Pairs(w=torch.tensor([0, 1]), l=torch.tensor([2, 3]))
    items = Items(index=torch.tensor([0, 1, 2, 3]), label=torch.tensor([1.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(cls()(scores, pairs).per_item, cls()(scores, items).per_item)


def npo_is_dpo_with_a_fixed_winner(cls):
    scores, layout, _ = forget_batch(35)
    rows = layout.items.index
    theta = torch.cat([scores.ref, scores.theta])
    both = Scores.tokens(theta, torch.cat([scores.ref, scores.ref]))
    dpo = losses.DPO(beta=0.3)(both, Pairs(w=rows, l=rows + 8)).per_item
    npo = cls(beta=0.3, retain="none")(scores, Items(index=rows, label=torch.zeros(7)))
    torch.testing.assert_close(npo.per_item, 2 / 0.3 * dpo)


def npo_becomes_gradient_ascent(cls):
    scores, layout, _ = forget_batch(36)
    rows = layout.items.index
    beta = 1e-4
    out = cls(beta=beta, retain="none")(scores, Items(index=rows, label=torch.zeros(7))).per_item
    torch.testing.assert_close(out - 2 / beta * math.log(2), (scores.theta - scores.ref)[rows], rtol=0, atol=1e-2)


def npo_slopes(cls):
    """2 sigma(beta rho), on scores of every kind."""
    theta = torch.tensor([-30.0, 0.0, 30.0], dtype=torch.float64, requires_grad=True)
    expected = 2 * torch.sigmoid(0.1 * theta.detach())
    items = Items(index=torch.arange(3), label=torch.zeros(3))
    for scores in (Scores.tokens(theta, torch.zeros(3)), Scores.steps(theta, torch.zeros(3))):
        (grad,) = torch.autograd.grad(cls(beta=0.1, retain="none")(scores, items).per_item.sum(), theta)
        torch.testing.assert_close(grad, expected)
    error = (-2 * theta.detach()).requires_grad_()
    out = cls(beta=0.1, retain="none")(Scores.denoising(error, torch.zeros(3)), items)
    (grad,) = torch.autograd.grad(out.per_item.sum(), error)
    torch.testing.assert_close(grad, -0.5 * expected)


def retained_errors_are_denoising_losses(cls):
    error = torch.tensor([0.2, 0.4, 0.6], dtype=torch.float64)
    items = Items(index=torch.arange(3), label=torch.tensor([0.0, 1.0, 1.0]))
    out = cls(beta=5000.0)(Scores.denoising(error, error), items)
    torch.testing.assert_close(out.loss.item(), 2 / 5000 * math.log(2) + 0.5)


def ascent_stops_at_the_limit(cls):
    error = torch.tensor([0.2, 3.0], dtype=torch.float64, requires_grad=True)
    items = Items(index=torch.arange(2), label=torch.zeros(2))
    out = cls(max_loss=1.0, retain="none")(Scores.denoising(error), items)
    (grad,) = torch.autograd.grad(out.loss, error)
    torch.testing.assert_close(grad, torch.tensor([-0.5, 0.0], dtype=torch.float64))


def descent_on_both_sides_is_sft_minus_ascent(cls):
    """Retaining everything is SFT; forgetting everything is minus SFT."""
    scores, layout, _ = forget_batch(37)
    rows = layout.items.index
    sft = -scores.theta[rows].sum() / scores.length[rows].sum()
    make = lambda label: cls(retain="nll")(scores, Items(index=rows, label=torch.full((7,), label))).loss  # noqa: E731
    torch.testing.assert_close(make(1.0), sft)
    torch.testing.assert_close(make(0.0), -sft)


def released_kl_counts_every_position(cls):
    scores, layout, _ = forget_batch(38)
    kl, retain = scores.vocabulary["kl_ref_theta"], layout.items.index[layout.items.label == 1]
    items = replace(layout.items, weight=1.0)
    released = cls(gamma=0.0, retain="kl", positions="all")(scores, items).loss
    torch.testing.assert_close(released, kl[retain].mean())
    masked = cls(gamma=0.0, retain="kl")(scores, items).loss
    mask = scores.units.mask[retain]
    torch.testing.assert_close(masked, kl[retain][mask].mean())


def simnpo_does_not_know_the_reference(cls):
    scores, layout, _ = forget_batch(39)
    moved = replace(scores, ref=scores.ref - 5)
    torch.testing.assert_close(cls()(scores, layout).per_item, cls()(moved, layout).per_item)


def simnpo_slope_is_below_one_at_first(cls):
    theta = torch.tensor([-7.0], dtype=torch.float64, requires_grad=True)
    scores = Scores.tokens(theta, length=torch.tensor([1]))
    out = cls(gamma=1.0, beta=2.0, retain="none")(scores, Items(index=torch.tensor([0]), label=torch.zeros(1)))
    (grad,) = torch.autograd.grad(out.loss, theta)
    torch.testing.assert_close(grad, 2 * torch.sigmoid(2 * theta.detach()))
    assert 0 < grad.item() < 1


# -- idk and d2o -------------------------------------------------------------------------------------------------------


def idk_batch(seed):
    """3 pairs (rows 0-5) and 4 rows to retain."""
    g = torch.Generator().manual_seed(seed + 600)
    pairs = Pairs.halves(3, weight=torch.rand(3, generator=g, dtype=torch.float64) + 0.5, margin=0.2)
    items = Items(index=torch.tensor([9, 6, 7, 8]), label=torch.ones(4), weight=torch.rand(4, generator=g) + 0.5)
    return row_scores(10, seed), Layout(pairs=pairs, items=items), {}


def idk_formula(batch, frozen):
    scores, layout, _ = batch
    d, pairs, items = scores.theta - scores.ref, layout.pairs, layout.items
    lost = 2 / 0.1 * softplus(-(0.1 * (d[pairs.w] - d[pairs.l]) - 0.2))
    kept = -scores.theta[items.index] * 4 / scores.length[items.index].sum()
    return torch.cat([pairs.weight * lost * 7 / 3, items.weight * 0.5 * kept * 7 / 4])


def idk_is_dpo(cls):
    scores, layout, _ = idk_batch(1)
    one = cls(beta=0.1, retain="none")(scores, layout).per_item
    torch.testing.assert_close(one, 20 * losses.DPO(beta=0.1)(scores, Layout(pairs=layout.pairs)).per_item)


def idk_refuses_items_to_forget(cls):
    scores, layout, _ = idk_batch(2)
    wrong = replace(layout, items=replace(layout.items, label=torch.zeros(4)))
    with pytest.raises(ValueError, match="label 1"):
        cls(beta=0.1)(scores, wrong)


def d2o_batch(seed):
    """3 lists of own samples (gain 1) and one disliked response (gain 0), padded."""
    index = torch.tensor([[0, 1, 2, 3], [4, 5, 0, 0], [6, 7, 8, 0]])
    gain = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    return row_scores(9, seed), Layout(lists=Lists(index=index, gain=gain, mask=mask)), {}


def d2o_formula(batch, frozen):
    scores = batch[0]
    d = scores.theta - scores.ref
    own = torch.stack([d[:3].mean(), d[5], (d[6] + d[8]) / 2])
    disliked = torch.stack([d[3], d[4], d[7]])
    return softplus(-(0.1 * own - 0.2 * disliked))


def d2o_of_one_sample_is_dpo(cls):
    scores, _, _ = d2o_batch(1)
    lists = Lists(
        index=torch.tensor([[0, 1], [2, 3]]), gain=torch.tensor([[1.0, 0.0]] * 2), mask=torch.ones(2, 2).bool()
    )
    dpo = losses.DPO(beta=0.1)(scores, Pairs(w=torch.tensor([0, 2]), l=torch.tensor([1, 3])))
    torch.testing.assert_close(cls(beta=0.1)(scores, lists).per_item, dpo.per_item)


def d2o_averages_own_samples(cls):
    scores, layout, _ = d2o_batch(2)
    index, gain, mask = layout.lists.index, layout.lists.gain, layout.lists.mask
    twice = Lists(index=torch.cat([index, index], 1), gain=torch.cat([gain, gain], 1), mask=torch.cat([mask, mask], 1))
    torch.testing.assert_close(cls(beta=0.1)(scores, twice).per_item, cls(beta=0.1)(scores, layout).per_item)


def d2o_start():
    lists = Lists(index=torch.tensor([[0, 1, 2]]), gain=torch.tensor([[1.0, 1.0, 0.0]]), mask=torch.ones(1, 3).bool())
    return at_start(3), Layout(lists=lists), {}


CASES = [
    Case(
        objective=GA,
        make=lambda cls: cls(max_loss=1.2),
        batch=forget_batch,
        formula=ga_formula(0.0, cap=1.2),
        # Two rows of -7 with 10 and 20 tokens: their tokens' mean is -14 / 30.
        start=Start(-14 / 30, [2 / 30, 2 / 30], start((0.0, 0.0), (10, 20))),
        identities=[ascent_stops_at_the_limit, *everywhere(lambda cls: cls(max_loss=9.0))],
        mutations=[
            ("return -side.average(loss", "return side.average(loss"),
            ("self.max_loss * length.to(loss.dtype)", "self.max_loss"),
            ("clamp(max=", "clamp(min="),
            ("forget.weight * (self.gamma * forget.share)", "forget.weight * self.gamma"),
            ('self.retain == "nll"', 'self.retain != "kl"'),
        ],
        kinds=ALL,
    ),
    Case(
        objective=GradDiff,
        make=lambda cls: cls(alpha=0.7),
        batch=forget_batch,
        formula=ga_formula(0.7),
        start=Start(-0.7, [0.1], start()),
        identities=[
            *everywhere(lambda cls: cls()),
            pairs_serve_as_items,
            descent_on_both_sides_is_sft_minus_ascent,
            released_kl_counts_every_position,
        ],
        mutations=[
            ("retain.weight * (factor * retain.share)", "retain.weight * (-factor * retain.share)"),
            ("kept * retain.weight * (factor", "kept * (factor"),
            ("lost * forget.weight", "lost"),
            ("items.label > 0.5", "items.label < 0.5"),
            ("sums * len(sums) / length.sum()", "sums / length"),
            ("sums * self.items / max(self.units", "sums / max(self.units"),
            ("totals.units - totals.positive_units", "totals.units"),
            ("total / max(count, 1.0)", "total"),
        ],
        kinds=(Kind.TOKEN, Kind.STEP),
    ),
    Case(
        name="grad_diff with kl",
        objective=GradDiff,
        make=lambda cls: cls(alpha=0.7, retain="kl"),
        batch=forget_batch,
        formula=ga_formula(0.7, "kl"),
        start="a row without units has no divergence; the case with nll has the start",
        identities=[*everywhere(lambda cls: cls(retain="kl")), released_kl_counts_every_position],
        mutations=[
            ("return self.over_positions(scores.need", "return -self.over_positions(scores.need"),
            ('self.positions == "all" else mask', 'self.positions != "all" else mask'),
        ],
    ),
    Case(
        objective=NPO,
        make=lambda cls: cls(beta=0.1, alpha=0.5),
        batch=forget_batch,
        formula=npo_formula,
        start=Start(13.862943611, [1.0], start()),
        identities=[
            npo_is_dpo_with_a_fixed_winner,
            npo_becomes_gradient_ascent,
            npo_slopes,
            retained_errors_are_denoising_losses,
            pairs_serve_as_items,
            *everywhere(lambda cls: cls(beta=0.1)),
        ],
        mutations=[
            ("logsigmoid(-beta * scores", "logsigmoid(beta * scores"),
            ("-2 / beta * logsigmoid", "-1 / beta * logsigmoid"),
            ("scores.log_ratio()[side.rows])", "scores.theta[side.rows])"),
        ],
        kinds=ALL,
    ),
    Case(
        objective=SimNPO,
        make=lambda cls: cls(beta=2.5, delta=0.3, reduction="sequence"),
        batch=forget_batch,
        formula=simnpo_formula,
        start=Start(
            # beta (s + delta) = 2.5 (-0.7 + 0.3) = -1, and the slope in theta is that in s divided by 10 tokens.
            0.125 * 0.8 * math.log1p(math.exp(-1.0)),
            [0.125 * 0.2 / (1 + math.exp(1.0))],
            start(),
        ),
        identities=[
            simnpo_does_not_know_the_reference,
            simnpo_slope_is_below_one_at_first,
            *everywhere(lambda cls: cls()),
        ],
        mutations=[
            ("s + self.delta", "s - self.delta"),
            ("-2 / self.beta * logsigmoid", "-1 / self.beta * logsigmoid"),
            ("gamma: float = 0.125", "gamma: float = 1.0"),
            ("/ scores.need_length()[side.rows]", ""),
            ("sums / length.clamp(min=1)", "sums"),
        ],
    ),
    Case(
        objective=IdkDPO,
        make=lambda cls: cls(beta=0.1, alpha=0.5),
        batch=idk_batch,
        formula=idk_formula,
        start=Start(
            13.862943611,
            [-1.0, 1.0],
            lambda: (
                at_start(2, length=(10, 20)),
                Layout(pairs=Pairs.halves(1), items=Items(index=torch.zeros(0).long(), label=torch.zeros(0))),
                {},
            ),
        ),
        identities=[idk_is_dpo, idk_refuses_items_to_forget],
        mutations=[
            ("rho[pairs.w] - rho[pairs.l]", "rho[pairs.l] - rho[pairs.w]"),
            ("-2 / beta * logsigmoid(z - pairs.margin)", "-1 / beta * logsigmoid(z - pairs.margin)"),
            ("pairs=len(pairs)", "pairs=0"),
            ("lost * pairs.weight", "lost"),
            ("(self.alpha * retain.share)", "(-self.alpha * retain.share)"),
            ("- pairs.margin", "+ pairs.margin"),
        ],
        kinds=ALL,
    ),
    Case(
        objective=D2O,
        make=lambda cls: cls(beta=0.1, alpha=0.2),
        batch=d2o_batch,
        formula=d2o_formula,
        start=Start(math.log(2), [-0.025, -0.025, 0.1], d2o_start),
        identities=[d2o_of_one_sample_is_dpo, d2o_averages_own_samples],
        mutations=[
            ("lists.gain > 0", "lists.gain >= 0"),
            ("self.alpha) * disliked", "-self.alpha) * disliked"),
            ("beta if self.alpha is None else self.alpha", "beta"),
            ("masked_mean(rho, lists.mask & (lists.gain > 0))", "(rho * (lists.mask & (lists.gain > 0))).sum(1)"),
        ],
        kinds=ALL,
    ),
]
