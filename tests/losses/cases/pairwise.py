"""Cases of `diffalign.losses.pairwise`."""

import math

import torch
from loss_cases import Case, Start, pair_batch, pair_rho, pair_start, token_scores
from torch.nn.functional import relu, softplus

from diffalign.losses import Kind, Layout, Pairs, Scores
from diffalign.losses.pairwise import (
    DPO,
    EXO,
    IPO,
    DiscoPOP,
    Hinge,
    LengthDesensitisedDPO,
    LengthRegularisedDPO,
    NormalisedDPO,
    RobustDPO,
)

ALL = (Kind.TOKEN, Kind.STEP, Kind.BOUND)
LOG2 = math.log(2)


def z_of(batch, beta=0.1):
    w, l, pairs = pair_rho(batch)
    return beta * w - beta * l - pairs.margin, pairs


def dpo_formula(eps):
    def formula(batch, frozen):
        z, pairs = z_of(batch)
        p = pairs.p * (1 - eps) + (1 - pairs.p) * eps
        return pairs.weight * (p * softplus(-z) + (1 - p) * softplus(z))

    return formula


def swapped(pairs):
    return Pairs(w=pairs.l, l=pairs.w)


def swap_changes_dpo_by_the_margin(cls):
    scores, layout, _ = pair_batch(3, soft=False)
    loss = cls(beta=0.3)
    one, other = loss(scores, layout), loss(scores, swapped(layout.pairs))
    torch.testing.assert_close(other.per_item - one.per_item, one.metrics["rewards/margins"])


def swap_with_the_label(make):
    """(w, l) with p is (l, w) with 1 - p."""

    def identity(cls):
        scores, _, _ = pair_batch(4)
        pairs = Pairs.halves(4, p=0.7)
        other = Pairs(w=pairs.l, l=pairs.w, p=0.3)
        torch.testing.assert_close(make(cls)(scores, pairs).per_item, make(cls)(scores, other).per_item)

    return identity


def constants_cancel(make):
    """Adding a constant to every log-ratio changes nothing."""

    def identity(cls):
        scores, layout, _ = pair_batch(4)
        moved = Scores.tokens(scores.theta + 3, scores.ref, length=scores.length)
        torch.testing.assert_close(make(cls)(moved, layout).per_item, make(cls)(scores, layout).per_item)

    return identity


def smoothing_has_its_optimum_at_the_log_odds(cls):
    # arXiv 2305.18290's conservative variant: z* = log((1 - e) / e), minimum the binary entropy
    z = torch.tensor([math.log(4.0) / 0.1, 0.0], dtype=torch.float64, requires_grad=True)
    out = cls(beta=0.1, label_smoothing=0.2)(Scores.tokens(z, torch.zeros(2)), Pairs.halves(1))
    (grad,) = torch.autograd.grad(out.loss, z)
    torch.testing.assert_close(grad, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(out.loss.item(), 0.5004024235, rtol=1e-9, atol=0)


def robust_is_unbiased(cls):
    scores, layout, _ = pair_batch(5, soft=False)
    e = 0.2
    noisy = cls(beta=0.1, label_noise=e)
    kept = noisy(scores, layout).per_item
    flipped = noisy(scores, swapped(layout.pairs)).per_item
    clean = DPO(beta=0.1)(scores, layout).per_item
    torch.testing.assert_close((1 - e) * kept + e * flipped, clean)


def robust_without_noise_is_dpo(cls):
    scores, layout, _ = pair_batch(5)
    torch.testing.assert_close(
        cls(beta=0.1, label_noise=0.0)(scores, layout).per_item, DPO(beta=0.1)(scores, layout).per_item
    )


def ipo_is_zero_at_its_target(cls):
    for ipo_scale in ("paper", "unit"):
        theta = torch.tensor([5.0 * 4, 0.0], dtype=torch.float64, requires_grad=True)
        scores = Scores.tokens(theta, torch.zeros(2), length=torch.tensor([4, 9]))
        out = cls(beta=0.1, ipo_scale=ipo_scale)(scores, Pairs.halves(1))
        torch.testing.assert_close(out.loss.item(), 0.0, rtol=0, atol=1e-12)


def ipo_units_differ_by_beta_squared(cls):
    scores, layout, _ = pair_batch(6)
    paper, unit = cls(beta=0.1)(scores, layout), cls(beta=0.1, ipo_scale="unit")(scores, layout)
    torch.testing.assert_close(paper.per_item * 0.01, unit.per_item)


def ipo_formula(batch, frozen):
    scores, layout, _ = batch
    d = (scores.theta - scores.ref) / scores.length
    pairs = layout.pairs
    z = d[pairs.w] - d[pairs.l] - pairs.margin / 0.1
    return pairs.weight * (pairs.p * (z - 5) ** 2 + (1 - pairs.p) * (z + 5) ** 2)


def hinge_formula(batch, frozen):
    z, pairs = z_of(batch)
    return pairs.weight * (pairs.p * relu(1 - z) + (1 - pairs.p) * relu(1 + z))


def hinge_stops_at_one(cls):
    theta = torch.tensor([11.0, 0.0], dtype=torch.float64, requires_grad=True)
    out = cls(beta=0.1)(Scores.tokens(theta, torch.zeros(2)), Pairs.halves(1))
    (grad,) = torch.autograd.grad(out.loss, theta)
    assert out.loss.item() == 0
    assert not grad.any()


def exo_formula(batch, frozen):
    z, pairs = z_of(batch)
    q = torch.sigmoid(z)
    target = pairs.p * 0.95 + (1 - pairs.p) * 0.05
    return pairs.weight * (q * (q / target).log() + (1 - q) * ((1 - q) / (1 - target)).log())


def exo_is_zero_at_the_log_odds(cls):
    best = math.log(0.999 / 0.001)
    theta = torch.tensor([best / 0.1, 0.0], dtype=torch.float64, requires_grad=True)
    out = cls(beta=0.1, label_smoothing=1e-3)(Scores.tokens(theta, torch.zeros(2)), Pairs.halves(1))
    torch.testing.assert_close(best, 6.9068, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.loss.item(), 0.0, rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad(out.loss, theta)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-9)


def exo_of_a_soft_label_is_zero_at_the_label(cls):
    target = 0.7 * 0.999 + 0.3 * 0.001
    theta = torch.tensor([math.log(target / (1 - target)) / 0.1, 0.0], dtype=torch.float64)
    out = cls(beta=0.1, label_smoothing=1e-3)(Scores.tokens(theta, torch.zeros(2)), Pairs.halves(1, p=0.7))
    torch.testing.assert_close(out.loss.item(), 0.0, rtol=0, atol=1e-12)


def exo_is_flat_for_badly_violated_pairs(cls):
    theta = torch.tensor([-400.0, 0.0], dtype=torch.float64)
    out = cls(beta=0.1, label_smoothing=1e-3)(Scores.tokens(theta, torch.zeros(2)), Pairs.halves(1))
    torch.testing.assert_close(out.loss.item(), -math.log(1e-3), rtol=1e-9, atol=0)


def discopop_formula(batch, frozen):
    z, pairs = z_of(batch, 0.05)
    total = 0.0
    for share, x in ((pairs.p, z), (1 - pairs.p, -z)):
        m = 1 / (1 + (-x / 0.3).exp())
        total = total + share * ((1 - m) * (1 + (-x).exp()).log() + m * (-x).exp())
    return pairs.weight * total


def discopop_slope(cls, tau, at):
    theta = torch.tensor([at, 0.0], dtype=torch.float64, requires_grad=True)
    out = cls(beta=0.05, tau=tau)(Scores.tokens(theta, torch.zeros(2)), Pairs.halves(1))
    (grad,) = torch.autograd.grad(out.loss, theta)
    return grad[0].item() / 0.05


def discopop_goes_the_wrong_way_at_its_published_tau(cls):
    torch.testing.assert_close(discopop_slope(cls, 0.05, 0.0), 0.784264, rtol=1e-5, atol=0)
    torch.testing.assert_close(discopop_slope(cls, 0.2, 0.0), -0.366434, rtol=1e-5, atol=0)
    torch.testing.assert_close(discopop_slope(cls, (1 - LOG2) / 3, 0.0), 0.0, rtol=0, atol=1e-9)
    # Its local minimum and maximum, in units of the difference of log-ratios.
    for at in (-2.3714, 1.44012):
        torch.testing.assert_close(discopop_slope(cls, 0.05, at), 0.0, rtol=0, atol=1e-3)


def norm_formula(batch, frozen):
    scores, layout, _ = batch
    d = (scores.theta - scores.ref) / scores.length
    pairs = layout.pairs
    z = 2.0 * (d[pairs.w] - d[pairs.l]) - pairs.margin
    return pairs.weight * (pairs.p * softplus(-z) + (1 - pairs.p) * softplus(z))


def equal_lengths_are_dpo(cls):
    scores, layout, _ = pair_batch(8, length=torch.full((8,), 7))
    torch.testing.assert_close(
        cls(beta=0.7)(scores, layout).per_item, DPO(beta=0.1)(scores, layout).per_item, rtol=1e-12, atol=0
    )


def ld_formula(batch, frozen):
    scores, layout, _ = batch
    pairs, units = layout.pairs, scores.units
    z = []
    for k in range(len(pairs)):
        w, l = int(pairs.w[k]), int(pairs.l[k])
        shared = int(min(units.mask[w].sum(), units.mask[l].sum()))
        u = []
        for row in (w, l):
            rho = (units.theta - units.ref)[row][units.mask[row]]
            u.append(rho[:shared].sum() + 0.3 * rho[shared:].sum())
        z.append(0.1 * (u[0] - u[1]))
    z = torch.stack(z) - pairs.margin
    return pairs.weight * (pairs.p * softplus(-z) + (1 - pairs.p) * softplus(z))


def ld_without_desensitising_is_dpo(cls):
    scores, layout, _ = pair_batch(9, units=True)
    torch.testing.assert_close(
        cls(beta=0.1, alpha=1.0)(scores, layout).per_item, DPO(beta=0.1)(scores, layout).per_item
    )


def ld_zero_truncates(cls):
    scores, layout, _ = pair_batch(9, units=True)
    pairs = layout.pairs
    shared = torch.minimum(scores.length[pairs.w], scores.length[pairs.l]).repeat(2)
    mask = torch.arange(6) < shared[:, None]
    short = Scores.tokens(scores.units.theta, scores.units.ref, mask=mask)
    torch.testing.assert_close(cls(beta=0.1, alpha=0.0)(scores, layout).per_item, DPO(beta=0.1)(short, layout).per_item)


def ld_start():
    scores = token_scores(2, 6, 3, spread=0.0)
    return scores, Layout(pairs=Pairs.halves(1)), {}


def ld_slopes():
    """The sum over a row's tokens of -beta/2 (or +beta/2), the tail's times alpha."""
    length = ld_start()[0].length
    shared = length.min()
    counted = (shared + 0.3 * (length - shared)).tolist()
    return [-0.05 * counted[0], 0.05 * counted[1]]


def r_dpo_formula(batch, frozen):
    z, pairs = z_of(batch)
    length = batch[0].length
    z = z + 0.02 * (length[pairs.w] - length[pairs.l])
    return pairs.weight * (pairs.p * softplus(-z) + (1 - pairs.p) * softplus(z))


def r_dpo_pushes_a_longer_winner_less(cls):
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    long_winner, short_winner = (
        cls(beta=0.1, alpha=0.02)(Scores.tokens(theta, torch.zeros(2), length=torch.tensor(n)), Pairs.halves(1)).loss
        for n in ([20, 10], [10, 20])
    )
    assert long_winner < LOG2 < short_winner


def r_dpo_without_a_price_is_dpo(cls):
    scores, layout, _ = pair_batch(10)
    torch.testing.assert_close(
        cls(beta=0.1, alpha=0.0)(scores, layout).per_item, DPO(beta=0.1)(scores, layout).per_item
    )


CASES = [
    Case(
        objective=DPO,
        make=lambda cls: cls(beta=0.1),
        batch=pair_batch,
        formula=dpo_formula(0.0),
        start=Start(0.6931472, [-0.05, 0.05], pair_start()),
        identities=[
            swap_changes_dpo_by_the_margin,
            constants_cancel(lambda cls: cls(beta=0.1)),
            swap_with_the_label(lambda cls: cls(beta=0.1)),
        ],
        mutations=[
            ("z = beta * (w - l)", "z = beta * (w + l)"),
            ("z = beta * (w - l)", "z = 2 * beta * (w - l)"),
            ("- self.target_margin(", "+ self.target_margin("),
            ("pairs.weight * self.link", "self.link"),
            ("return u[pairs.w], u[pairs.l]", "return u[pairs.l], u[pairs.w]"),
            ("links.logistic(z, smoothed", "links.logistic(-z, smoothed"),
        ],
        kinds=ALL,
    ),
    Case(
        name="dpo with label smoothing",
        objective=DPO,
        make=lambda cls: cls(beta=0.1, label_smoothing=0.1),
        batch=pair_batch,
        formula=dpo_formula(0.1),
        start=Start(0.6931472, [-0.04, 0.04], pair_start()),
        identities=[smoothing_has_its_optimum_at_the_log_odds],
        mutations=[("+ (1 - p) * smoothing", "+ p * smoothing"), ("p * (1 - smoothing)", "p * (1 + smoothing)")],
        kinds=ALL,
    ),
    Case(
        objective=RobustDPO,
        make=lambda cls: cls(beta=0.1, label_noise=0.1),
        batch=pair_batch,
        formula=lambda batch, frozen: (
            (0.9 * dpo_formula(0.0)(batch, frozen) - 0.1 * dpo_formula(1.0)(batch, frozen)) / 0.8
        ),
        start=Start(0.6931472, [-0.0625, 0.0625], pair_start()),
        identities=[robust_is_unbiased, robust_without_noise_is_dpo],
        mutations=[
            ("robust_logistic(z, self.label_noise, p)", "robust_logistic(-z, self.label_noise, p)"),
            ("robust_logistic(z, self.label_noise, p)", "robust_logistic(z, 0.5 * self.label_noise, p)"),
        ],
        kinds=ALL,
    ),
    Case(
        objective=Hinge,
        make=lambda cls: cls(beta=0.1),
        batch=pair_batch,
        formula=hinge_formula,
        start=Start(1.0, [-0.1, 0.1], pair_start()),
        identities=[hinge_stops_at_one, constants_cancel(lambda cls: cls(beta=0.1))],
        mutations=[("links.hinge(z, p)", "links.hinge(-z, p)"), ("links.hinge(z, p)", "links.hinge(2 * z, p)")],
        kinds=ALL,
    ),
    Case(
        objective=IPO,
        make=lambda cls: cls(beta=0.1),
        batch=pair_batch,
        formula=ipo_formula,
        start=Start(25.0, [-1.0, 0.5], pair_start()),
        identities=[ipo_is_zero_at_its_target, ipo_units_differ_by_beta_squared],
        mutations=[("links.square(z, p, beta", "links.square(-z, p, beta"), ("rho / scores.need_length()", "rho")],
        kinds=(Kind.TOKEN, Kind.STEP),
    ),
    Case(
        name="ipo of sums, unit scale",
        objective=IPO,
        make=lambda cls: cls(beta=0.1, ipo_scale="unit", reduction="sum"),
        batch=pair_batch,
        formula=lambda batch, frozen: (
            batch[1].pairs.weight
            * (batch[1].pairs.p * (z_of(batch)[0] - 0.5) ** 2 + (1 - batch[1].pairs.p) * (z_of(batch)[0] + 0.5) ** 2)
        ),
        start=Start(0.25, [-0.1, 0.1], pair_start()),
        identities=[swap_with_the_label(lambda cls: cls(beta=0.1, ipo_scale="unit", reduction="sum"))],
        mutations=[('self.reduction == "mean"', 'self.reduction == "sum"')],
        kinds=ALL,
    ),
    Case(
        objective=EXO,
        make=lambda cls: cls(beta=0.1, label_smoothing=0.05),
        batch=pair_batch,
        formula=exo_formula,
        start=Start(-LOG2 - 0.5 * math.log(0.05 * 0.95), [-0.0736110, 0.0736110], pair_start()),
        identities=[
            exo_is_zero_at_the_log_odds,
            exo_of_a_soft_label_is_zero_at_the_label,
            exo_is_flat_for_badly_violated_pairs,
            swap_with_the_label(lambda cls: cls(beta=0.1)),
        ],
        mutations=[
            ("links.reverse_kl(z, self", "links.reverse_kl(-z, self"),
            ("links.reverse_kl(z, self", "links.reverse_kl(2 * z, self"),
            ("self.label_smoothing, p)", "2 * self.label_smoothing, p)"),
        ],
        kinds=ALL,
    ),
    Case(
        name="exo at its default smoothing",
        objective=EXO,
        make=lambda cls: cls(beta=0.1),
        batch=lambda seed: pair_batch(seed, soft=False),
        formula=lambda batch, frozen: (
            torch.sigmoid(z_of(batch)[0]) * (torch.sigmoid(z_of(batch)[0]) / 0.999).log()
            + torch.sigmoid(-z_of(batch)[0]) * (torch.sigmoid(-z_of(batch)[0]) / 0.001).log()
        ),
        start=Start(2.76123, [-0.17267, 0.17267], pair_start(), tolerance=1e-4),
        identities=[constants_cancel(lambda cls: cls(beta=0.1))],
        mutations=[("label_smoothing: float = 1e-3", "label_smoothing: float = 1e-2")],
        kinds=ALL,
    ),
    Case(
        objective=DiscoPOP,
        make=lambda cls: cls(beta=0.05, tau=0.3),
        batch=pair_batch,
        formula=discopop_formula,
        start=Start(0.8465736, [-0.0247143, 0.0247143], pair_start()),
        identities=[discopop_goes_the_wrong_way_at_its_published_tau],
        mutations=[
            ("p * links.log_ratio_modulated(z, self.tau)", "p * links.log_ratio_modulated(-z, self.tau)"),
            ("p * links.log_ratio_modulated(z, self.tau)", "p * links.log_ratio_modulated(z, 2 * self.tau)"),
            ("links.log_ratio_modulated(-z, self.tau)", "links.log_ratio_modulated(z, self.tau)"),
        ],
        kinds=ALL,
    ),
    Case(
        name="discopop at its default tau",
        objective=DiscoPOP,
        make=lambda cls: cls(beta=0.1),
        batch=lambda seed: pair_batch(seed, soft=False),
        formula=lambda batch, frozen: (
            torch.sigmoid(-z_of(batch)[0] / 0.05) * softplus(-z_of(batch)[0])
            + torch.sigmoid(z_of(batch)[0] / 0.05) * (-z_of(batch)[0]).exp()
        ),
        start=Start(0.8465736, [0.0784264, -0.0784264], pair_start()),
        identities=[constants_cancel(lambda cls: cls(beta=0.1))],
        mutations=[("tau: float = 0.05", "tau: float = 0.5")],
        kinds=(Kind.TOKEN, Kind.STEP),
    ),
    Case(
        objective=NormalisedDPO,
        make=lambda cls: cls(beta=2.0),
        batch=pair_batch,
        formula=norm_formula,
        start=Start(LOG2, [-0.1, 0.05], pair_start()),
        identities=[equal_lengths_are_dpo],
        mutations=[
            ("return scores.log_ratio() / scores.need_length()", "return scores.log_ratio()"),
            ("return scores.log_ratio() / scores.need_length()", "return -scores.log_ratio() / scores.need_length()"),
        ],
    ),
    Case(
        objective=LengthDesensitisedDPO,
        make=lambda cls: cls(beta=0.1, alpha=0.3),
        batch=lambda seed: pair_batch(seed, units=True),
        formula=ld_formula,
        start=Start(LOG2, ld_slopes(), ld_start),
        identities=[ld_without_desensitising_is_dpo, ld_zero_truncates],
        mutations=[
            ("place[rows] > shared", "place[rows] >= shared"),
            ("self.alpha * rho[rows]", "rho[rows]"),
            ("torch.minimum(", "torch.maximum("),
            ("units.theta - units.ref", "units.ref - units.theta"),
        ],
    ),
    Case(
        objective=LengthRegularisedDPO,
        make=lambda cls: cls(beta=0.1, alpha=0.02),
        batch=pair_batch,
        formula=r_dpo_formula,
        start=Start(math.log1p(math.exp(0.2)), [-0.1 / (1 + math.exp(-0.2)), 0.1 / (1 + math.exp(-0.2))], pair_start()),
        identities=[r_dpo_pushes_a_longer_winner_less, r_dpo_without_a_price_is_dpo],
        mutations=[
            ("pairs.margin - self.alpha", "pairs.margin + self.alpha"),
            ("pairs.margin - self.alpha", "pairs.margin - 2 * self.alpha"),
        ],
    ),
]
