"""Cases of `diffalign.losses.games`."""

import math
from dataclasses import replace

import pytest
import torch
from loss_cases import Case, Start, at_start, row_scores, token_scores
from torch.nn.functional import softplus

from diffalign import losses
from diffalign.losses import Items, Kind, Layout, Pairs, Scores
from diffalign.losses.games import DNO, GPO, INPO, SPPO, XPO, NashMD, OnlineIPO

ALL = (Kind.TOKEN, Kind.STEP, Kind.BOUND)
EXACT = (Kind.TOKEN, Kind.STEP)


def pairs_batch(seed, **more):
    """4 pairs with win rates, soft labels, weights and margins; a behaviour policy."""
    g = torch.Generator().manual_seed(seed + 200)
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    pairs = Pairs.halves(
        4, p=0.6 + 0.4 * rand(4), weight=0.5 + rand(4), margin=0.3 * rand(4), reward_w=rand(4), reward_l=rand(4)
    )
    scores = row_scores(8, seed, **more)
    old = scores.theta.detach() + torch.randn(8, generator=g, dtype=torch.float64)
    return replace(scores, old=old), Layout(pairs=pairs), {}


def start_batch(win_w=0.8, win_l=0.3, **more):
    reward = {"reward_w": torch.tensor([win_w]), "reward_l": torch.tensor([win_l])}

    def batch():
        scores = at_start(2, length=(10, 20))
        return replace(scores, old=scores.ref), Layout(pairs=Pairs.halves(1, **reward, **more)), {}

    return batch


def sides(batch, divide=False):
    scores, layout, _ = batch
    d = scores.theta - scores.ref
    d = d / scores.length if divide else d
    return d[layout.pairs.w], d[layout.pairs.l], layout.pairs


def swapped(pairs, **more):
    return Pairs(w=pairs.l, l=pairs.w, **more)


# -- SPPO and GPO ----------------------------------------------------------------------------------------------------


def sppo_formula(factor, hard=False):
    def formula(batch, frozen):
        w, l, pairs = sides(batch)
        win_w, win_l = (pairs.p, 1 - pairs.p) if hard else (pairs.reward_w[:, 0], pairs.reward_l[:, 0])
        return pairs.weight * factor * ((w - (win_w - 0.5) / 0.1) ** 2 + (l - (win_l - 0.5) / 0.1) ** 2)

    return formula


def sppo_is_ipo_and_an_anchor_on_the_sum(cls):
    """The hard form, not halved: (Delta - 1 / beta)^2 / 2 + (rho_w + rho_l)^2 / 2."""
    scores, layout, _ = pairs_batch(4)
    hard = cls(beta=0.1, win_rate="hard", halve=False)(scores, replace(layout.pairs, p=1.0, weight=1.0)).per_item
    w, l, _ = sides((scores, layout, {}))
    torch.testing.assert_close(hard, 0.5 * (w - l - 10) ** 2 + 0.5 * (w + l) ** 2)


def hard_unhalved_start_is_the_published_fifty(cls):
    scores = at_start(2)
    out = cls(beta=0.1, win_rate="hard", halve=False)(scores, Pairs.halves(1))
    (grad,) = torch.autograd.grad(out.loss, scores.theta)
    torch.testing.assert_close(out.loss.item(), 50.0, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, torch.tensor([-10.0, 10.0], dtype=torch.float64))


def unit_scale_is_beta_squared(cls):
    scores, layout, _ = pairs_batch(5)
    paper, unit = cls(beta=0.1)(scores, layout), cls(beta=0.1, scale="unit")(scores, layout)
    torch.testing.assert_close(paper.per_item * 0.01, unit.per_item)


def sppo_is_gpo_on_win_rates(cls):
    scores, layout, _ = pairs_batch(6)
    pairs = replace(layout.pairs, weight=1.0)
    target = torch.cat([pairs.reward_w[:, 0], pairs.reward_l[:, 0]]) - 0.5
    torch.testing.assert_close(
        cls(beta=0.1)(scores, pairs).loss,
        GPO(beta=0.1)(scores, Items(index=torch.cat([pairs.w, pairs.l]), target=target)).loss,
    )


def win_rates_are_asked_for(cls):
    with pytest.raises(ValueError, match="reward_w"):
        cls(beta=0.1)(row_scores(2), Pairs.halves(1))


def gpo_batch(seed):
    g = torch.Generator().manual_seed(seed + 210)
    rand = lambda: torch.rand(5, generator=g, dtype=torch.float64)  # noqa: E731
    items = Items(index=torch.randperm(5, generator=g), target=rand() - 0.5, weight=0.5 + rand())
    return row_scores(5, seed), Layout(items=items), {}


def gpo_formula(batch, frozen):
    scores, layout, _ = batch
    items = layout.items
    return items.weight * ((scores.theta - scores.ref)[items.index] - items.target / 0.2) ** 2


def gpo_is_zero_at_its_target(cls):
    theta = torch.tensor([4.0, -2.0], dtype=torch.float64, requires_grad=True)
    out = cls(beta=0.1)(Scores.tokens(theta, torch.zeros(2)), Items(index=torch.arange(2), target=theta.detach() * 0.1))
    torch.testing.assert_close(out.loss.item(), 0.0, rtol=0, atol=1e-12)


def gpo_start():
    return at_start(2), Layout(items=Items(index=torch.arange(2), target=torch.tensor([0.3, 0.3]))), {}


# -- DNO, INPO, online IPO -------------------------------------------------------------------------------------------


def dno_formula(hard):
    def formula(batch, frozen):
        w, l, pairs = sides(batch)
        z = 0.1 * (w - l) - pairs.margin
        gap = (pairs.reward_w - pairs.reward_l)[:, 0]
        p = pairs.p if hard else 1 / (1 + torch.exp(-gap))
        keep = (gap >= 0.1).double() if hard else 1.0
        return pairs.weight * keep * (p * softplus(-z) + (1 - p) * softplus(z))

    return formula


def swapping_the_pair_with_its_win_rates_changes_nothing(make):
    def identity(cls):
        scores, layout, _ = pairs_batch(7)
        pairs = replace(layout.pairs, margin=0.0, p=1.0)
        other = swapped(pairs, weight=pairs.weight, reward_w=pairs.reward_l, reward_l=pairs.reward_w)
        torch.testing.assert_close(make(cls)(scores, other).per_item, make(cls)(scores, pairs).per_item)

    return identity


def equal_win_rates_are_a_tie(cls):
    scores, layout, _ = pairs_batch(8)
    pairs = replace(layout.pairs, reward_l=layout.pairs.reward_w)
    tie = losses.DPO(beta=0.1)(scores, replace(pairs, p=0.5))
    torch.testing.assert_close(cls(beta=0.1)(scores, pairs).per_item, tie.per_item)


def small_gaps_are_left_out(cls):
    scores, layout, _ = pairs_batch(9)
    out = cls(beta=0.1, labels="hard", min_gap=2.0)(scores, layout)
    torch.testing.assert_close(out.per_item, torch.zeros(4, dtype=torch.float64))
    every = cls(beta=0.1, labels="hard", min_gap=-1.0)(scores, layout)
    torch.testing.assert_close(every.per_item, losses.DPO(beta=0.1)(scores, layout).per_item)


def inpo_formula(batch, frozen):
    scores, layout, _ = batch
    pairs = layout.pairs
    d = scores.theta - (0.25 * scores.ref + 0.75 * scores.old)
    h = d[pairs.w] - d[pairs.l] - pairs.margin / 0.1
    return pairs.weight * (pairs.p * (h - 5) ** 2 + (1 - pairs.p) * (h + 5) ** 2)


def the_whole_reference_is_ipo_on_sums(cls):
    scores, layout, _ = pairs_batch(10)
    torch.testing.assert_close(
        cls(beta=0.1, mixture=1.0)(scores, layout).per_item,
        losses.IPO(beta=0.1, reduction="sum")(scores, layout).per_item,
    )
    none = replace(scores, ref=torch.zeros_like(scores.ref))
    previous = replace(scores, ref=scores.old)
    torch.testing.assert_close(
        cls(beta=0.1, mixture=0.0)(none, layout).per_item,
        losses.IPO(beta=0.1, reduction="sum")(previous, layout).per_item,
    )


def online_formula(version, divide):
    def formula(batch, frozen):
        w, l, pairs = sides(batch, divide)
        target = (pairs.reward_w - pairs.reward_l)[:, 0] if version == 1 else pairs.p - 0.5
        return pairs.weight * (w - l - pairs.margin / 0.1 - target / 0.1) ** 2

    return formula


def certain_preference_is_ipo(cls):
    """P(y > y') = 1: the target is 1/2."""
    scores, layout, _ = pairs_batch(11)
    pairs = replace(layout.pairs, p=1.0)
    torch.testing.assert_close(
        cls(beta=0.1, version=2)(scores, pairs).per_item, losses.IPO(beta=0.1, reduction="sum")(scores, pairs).per_item
    )


def the_two_versions_agree_against_the_partner(cls):
    """With y'' = y': P(y > y') - P(y' > y') = p - 1/2."""
    scores, layout, _ = pairs_batch(12)
    pairs = replace(layout.pairs, reward_w=layout.pairs.p, reward_l=torch.full((4,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(
        cls(beta=0.1, version=1)(scores, pairs).per_item, cls(beta=0.1, version=2)(scores, pairs).per_item
    )


# -- policy gradients ------------------------------------------------------------------------------------------------


def nash_batch(seed):
    g = torch.Generator().manual_seed(seed + 220)
    rand = lambda: torch.rand(4, generator=g, dtype=torch.float64)  # noqa: E731
    items = Items(index=torch.randperm(5, generator=g)[:4], target=rand(), weight=0.5 + rand())
    return token_scores(5, 5, seed), Layout(items=items), {}


def nash_formula(batch, frozen):
    scores, layout, _ = batch
    items, out = layout.items, []
    for row, win in zip(items.index, items.target):
        live = scores.units.mask[row]
        theta, held = scores.units.theta[row][live], frozen[0].units.theta[row][live]
        rho = held - scores.units.ref[row][live]
        out.append(0.2 * (rho * theta).sum() - (win - 0.5) * theta.sum())
    return items.weight * torch.stack(out)


def nash_start():
    theta = torch.full((2, 4), -1.0, dtype=torch.float64, requires_grad=True)
    scores = Scores.tokens(theta, theta.detach().clone(), mask=torch.ones(2, 4, dtype=torch.bool))
    return scores, Layout(items=Items(index=torch.arange(2), target=torch.tensor([0.75, 0.75]))), {}


def a_tie_leaves_the_divergence(cls):
    """Win rate 1/2: only beta sum_t sg(rho_t) s_t, whose slope per unit is beta rho_t; none at policy == reference."""
    scores, layout, _ = nash_batch(3)
    items = replace(layout.items, target=torch.full((4,), 0.5, dtype=torch.float64), weight=1.0)
    (grad,) = torch.autograd.grad(cls(beta=0.3)(scores, items).per_item.sum(), scores.units.theta)
    units = scores.units
    expected = 0.3 * (units.theta - units.ref).detach() * units.mask
    torch.testing.assert_close(grad[items.index], expected[items.index])


def xpo_batch(seed):
    scores, layout, stats = pairs_batch(seed)
    rows = torch.where(torch.tensor([True, False, False, True]), layout.pairs.w, layout.pairs.l)
    return scores, replace(layout, items=Items(index=rows)), stats


def xpo_formula(square):
    def formula(batch, frozen):
        w, l, pairs = sides(batch)
        optimism = 0.02 * batch[0].theta[batch[1].items.index]
        if square:
            d = w - l - pairs.margin / 0.1
            return pairs.weight * (pairs.p * (d - 5) ** 2 + (1 - pairs.p) * (d + 5) ** 2) + optimism
        z = 0.1 * (w - l) - pairs.margin
        return pairs.weight * (pairs.p * softplus(-z) + (1 - pairs.p) * softplus(z)) + optimism

    return formula


def xpo_start():
    scores, layout, stats = start_batch()()
    return scores, replace(layout, items=Items(index=torch.tensor([1]))), stats


def without_optimism_it_is_online_dpo(cls):
    scores, layout, _ = xpo_batch(3)
    torch.testing.assert_close(
        cls(beta=0.1, alpha=0.0)(scores, layout).per_item, losses.DPO(beta=0.1)(scores, layout).per_item
    )


def optimism_lowers_samples_of_the_reference(cls):
    scores, layout, _ = xpo_batch(4)
    plain, bold = cls(beta=0.1, alpha=0.0), cls(beta=0.1, alpha=0.5)
    grads = [torch.autograd.grad(o(scores, layout).per_item.sum(), scores.theta)[0] for o in (plain, bold)]
    expected = torch.zeros(8, dtype=torch.float64)
    expected[layout.items.index] = 0.5
    torch.testing.assert_close(grads[1] - grads[0], expected)


def every_pair_names_its_reference_row(cls):
    scores, layout, _ = xpo_batch(4)
    with pytest.raises(ValueError, match="3 items for 4 pairs"):
        cls(beta=0.1)(scores, replace(layout, items=Items(index=layout.items.index[:3])))


DELTA = "beta * (w - l)"

CASES = [
    Case(
        objective=SPPO,
        make=lambda cls: cls(beta=0.1),
        batch=pairs_batch,
        formula=sppo_formula(0.5),
        # Targets 3 and -2: (9 + 4) / 2.
        start=Start(6.5, [-3.0, 2.0], start_batch()),
        identities=[
            sppo_is_ipo_and_an_anchor_on_the_sum,
            hard_unhalved_start_is_the_published_fifty,
            unit_scale_is_beta_squared,
            sppo_is_gpo_on_win_rates,
            win_rates_are_asked_for,
        ],
        mutations=[
            ("win_w - 0.5", "win_w + 0.5"),
            ("win_l - 0.5", "0.5 - win_l"),
            ("0.5 * loss if self.halve", "loss if self.halve"),
            ("return p, 1 - p", "return p, p"),
            ("beta * rho - target", "rho - target"),
            ("pairs.weight * (0.5", "(0.5"),
        ],
        kinds=EXACT,
    ),
    Case(
        name="sppo as TRL has it",
        objective=SPPO,
        make=lambda cls: cls(beta=0.1, win_rate="hard", halve=False),
        batch=pairs_batch,
        formula=sppo_formula(1.0, hard=True),
        start=Start(50.0, [-10.0, 10.0], start_batch(p=torch.tensor([1.0]))),
        identities=[sppo_is_ipo_and_an_anchor_on_the_sum],
        mutations=[("return p, 1 - p", "return 1 - p, p")],
        kinds=EXACT,
    ),
    Case(
        name="sppo in units of z",
        objective=SPPO,
        make=lambda cls: cls(beta=0.1, scale="unit"),
        batch=pairs_batch,
        formula=sppo_formula(0.005),
        start=Start(0.065, [-0.03, 0.02], start_batch()),
        identities=[unit_scale_is_beta_squared],
        mutations=[('loss / beta**2 if scale == "paper" else loss', "loss / beta**2")],
        kinds=ALL,
    ),
    Case(
        objective=GPO,
        make=lambda cls: cls(beta=0.2),
        batch=gpo_batch,
        formula=gpo_formula,
        start=Start(2.25, [-3.0, -3.0], gpo_start),
        identities=[gpo_is_zero_at_its_target],
        mutations=[
            ("beta * rho - target", "beta * rho + target"),
            ("loss / beta**2 if", "loss / beta if"),
            ("items.weight * _regression", "_regression"),
        ],
        kinds=EXACT,
    ),
    Case(
        name="gpo in units of z",
        objective=GPO,
        make=lambda cls: cls(beta=0.2, scale="unit"),
        batch=gpo_batch,
        formula=lambda batch, frozen: 0.04 * gpo_formula(batch, frozen),
        start=Start(0.09, [-0.12, -0.12], gpo_start),
        identities=[gpo_is_zero_at_its_target],
        mutations=[('loss / beta**2 if scale == "paper" else loss', "loss / beta**2")],
        kinds=ALL,
    ),
    Case(
        objective=DNO,
        make=lambda cls: cls(beta=0.1),
        batch=pairs_batch,
        formula=dno_formula(hard=False),
        # p = sigma(1/2): slopes beta (1/2 - p).
        start=Start(math.log(2), [-0.1 * 0.1224593, 0.1 * 0.1224593], start_batch()),
        identities=[
            equal_win_rates_are_a_tie,
            swapping_the_pair_with_its_win_rates_changes_nothing(lambda cls: cls(beta=0.1)),
        ],
        mutations=[
            ("p=gap.sigmoid()", "p=(-gap).sigmoid()"),
            ("p=gap.sigmoid()", "p=(2 * gap).sigmoid()"),
            ("links.logistic(z, p)", "2 * links.logistic(z, p)"),
        ],
        kinds=ALL,
    ),
    Case(
        name="dno with hard labels",
        objective=DNO,
        make=lambda cls: cls(beta=0.1, labels="hard", min_gap=0.1),
        batch=pairs_batch,
        formula=dno_formula(hard=True),
        start=Start(math.log(2), [-0.05, 0.05], start_batch()),
        identities=[small_gaps_are_left_out],
        mutations=[("gap >= self.min_gap", "gap <= self.min_gap")],
        kinds=ALL,
    ),
    Case(
        objective=INPO,
        make=lambda cls: cls(beta=0.1, mixture=0.25),
        batch=pairs_batch,
        formula=inpo_formula,
        start=Start(25.0, [-10.0, 10.0], start_batch()),
        identities=[the_whole_reference_is_ipo_on_sums, unit_scale_is_beta_squared],
        mutations=[
            ("scores.theta - geometric_mixture", "scores.theta + geometric_mixture"),
            ("(self.mixture, 1 - self.mixture)", "(1 - self.mixture, self.mixture)"),
            ('beta if self.scale == "paper" else None', "None"),
        ],
        kinds=EXACT,
    ),
    Case(
        objective=OnlineIPO,
        make=lambda cls: cls(beta=0.1),
        batch=pairs_batch,
        formula=online_formula(1, divide=False),
        start=Start(25.0, [-10.0, 10.0], start_batch()),
        identities=[
            the_two_versions_agree_against_the_partner,
            certain_preference_is_ipo,
            unit_scale_is_beta_squared,
            swapping_the_pair_with_its_win_rates_changes_nothing(lambda cls: cls(beta=0.1)),
        ],
        mutations=[
            ("(z - p).square()", "(z + p).square()"),
            ("beta**2 if self.scale", "beta if self.scale"),
            ("pairs.p - 0.5", "pairs.p"),
        ],
        kinds=EXACT,
    ),
    Case(
        name="online_ipo version 2, per token",
        objective=OnlineIPO,
        make=lambda cls: cls(beta=0.1, version=2, reduction="mean"),
        batch=pairs_batch,
        formula=online_formula(2, divide=True),
        # Lengths 10 and 20; target 1/2 over beta.
        start=Start(25.0, [-1.0, 0.5], start_batch()),
        identities=[the_two_versions_agree_against_the_partner],
        mutations=[("rho / scores.need_length()", "rho"), ("pairs.weight * self.link", "self.link")],
        kinds=EXACT,
    ),
    Case(
        name="online_ipo in units of z",
        objective=OnlineIPO,
        make=lambda cls: cls(beta=0.1, scale="unit"),
        batch=pairs_batch,
        formula=lambda batch, frozen: 0.01 * online_formula(1, divide=False)(batch, frozen),
        start=Start(0.25, [-0.1, 0.1], start_batch()),
        identities=[unit_scale_is_beta_squared],
        mutations=[(DELTA + " - pairs.margin", DELTA + " + pairs.margin")],
        kinds=ALL,
    ),
    Case(
        objective=NashMD,
        make=lambda cls: cls(beta=0.2),
        batch=nash_batch,
        formula=nash_formula,
        # Four units at -1: -(3/4 - 1/2) * -4; slope of a row is summed over its units.
        start=Start(1.0, [-1.0, -1.0], nash_start),
        identities=[a_tie_leaves_the_divergence],
        mutations=[
            ("- (win - 0.5)", "+ (win - 0.5)"),
            ("win - 0.5", "win"),
            ("rho.detach() * theta", "rho * theta"),
            ("(rho.detach() * theta).sum(1)", "(rho.detach() * theta).mean(1)"),
            ("items.weight * loss", "loss"),
        ],
        kinds=EXACT,
    ),
    Case(
        objective=XPO,
        make=lambda cls: cls(beta=0.1, alpha=0.02),
        batch=xpo_batch,
        formula=xpo_formula(square=False),
        start=Start(math.log(2) - 0.14, [-0.05, 0.05 + 0.02], xpo_start),
        identities=[
            without_optimism_it_is_online_dpo,
            optimism_lowers_samples_of_the_reference,
            every_pair_names_its_reference_row,
        ],
        mutations=[
            ("out.per_item + self.alpha", "out.per_item - self.alpha"),
            ("self.alpha * optimism", "2 * self.alpha * optimism"),
            ("self.alpha * optimism", "self.alpha * optimism.mean()"),
        ],
        kinds=EXACT,
    ),
    Case(
        name="xpo with the square link",
        objective=XPO,
        make=lambda cls: cls(beta=0.1, alpha=0.02, mode="ipo"),
        batch=xpo_batch,
        formula=xpo_formula(square=True),
        start=Start(25.0 - 0.14, [-10.0, 10.0 + 0.02], xpo_start),
        identities=[optimism_lowers_samples_of_the_reference],
        mutations=[("links.square(z, p, beta)", "links.square(z, p)")],
        kinds=EXACT,
    ),
]
