"""Cases of `diffalign.losses.composite`."""

import math

import torch
from loss_cases import Case, Start, pair_batch, pair_rho, pair_start, token_scores
from torch.nn.functional import softplus

from diffalign.losses import DPO, Kind, Layout, Pairs, Scores
from diffalign.losses.anchored import BCOPair
from diffalign.losses.composite import FDPO, WPO, Mixed
from diffalign.losses.pairwise import Hinge

ALL = (Kind.TOKEN, Kind.STEP, Kind.BOUND)
SAMPLED = (Kind.TOKEN, Kind.STEP)
LOG2 = math.log(2)


def logistic(z, pairs, eps=0.0):
    p = pairs.p * (1 - eps) + (1 - pairs.p) * eps
    return p * softplus(-z) + (1 - p) * softplus(z)


def f_batch(seed):
    """Log-ratios of about one, where exponentials of them differ but do not drown everything else."""
    return pair_batch(seed, spread=0.7)


def f_formula(derivative, beta, link):
    def formula(batch, frozen):
        w, l, pairs = pair_rho(batch)
        u_w, u_l = derivative(w), derivative(l)
        return pairs.weight * link(beta * u_w - beta * u_l - pairs.margin, pairs)

    return formula


def forward_kl(rho):
    return 1 - 1 / rho.exp()


def jensen_shannon(rho):
    return (2 * rho.exp() / (1 + rho.exp())).log()


def alpha_half(rho):
    return (rho.exp() ** -0.5 - 1) / -0.5


def reverse_kl_is_the_base(cls):
    scores, layout, _ = f_batch(1)
    for base, plain in (("dpo", DPO(beta=0.1)), ("hinge", Hinge(beta=0.1))):
        ours = cls(beta=0.1, base=base, divergence="reverse_kl")(scores, layout)
        torch.testing.assert_close(ours.per_item, plain(scores, layout).per_item)


def alpha_near_one_is_the_base(cls):
    scores, layout, _ = f_batch(1)
    ours = cls(beta=0.1, divergence="alpha", alpha=1 - 1e-7)(scores, layout)
    torch.testing.assert_close(ours.per_item, DPO(beta=0.1)(scores, layout).per_item, rtol=1e-6, atol=0)


def forward_kl_is_bounded_above(cls):
    """However likely a response becomes, its score stays below one: so does the margin, at beta."""
    theta = torch.tensor([500.0, 0.0], dtype=torch.float64)
    out = cls(beta=0.1)(Scores.tokens(theta, torch.zeros(2)), Pairs.halves(1))
    torch.testing.assert_close(out.metrics["rewards/margins"].item(), 0.1)


def js_halves_beta_at_the_start(cls):
    scores, layout, _ = pair_start()()
    ours = cls(beta=0.2, divergence="js")(scores, layout)
    plain = DPO(beta=0.1)(scores, layout)
    grads = [torch.autograd.grad(out.loss, scores.theta)[0] for out in (ours, plain)]
    torch.testing.assert_close(*grads)


def ipo_of_forward_kl(batch, frozen):
    scores, layout, _ = batch
    pairs = layout.pairs
    u = forward_kl(scores.theta - scores.ref) / scores.length
    d = u[pairs.w] - u[pairs.l] - pairs.margin / 0.1
    return pairs.weight * (pairs.p * (d - 5) ** 2 + (1 - pairs.p) * (d + 5) ** 2)


# -- WPO -------------------------------------------------------------------------------------------------------------


def wpo_batch(seed):
    scores, layout, stats = pair_batch(seed, units=True)
    g = torch.Generator().manual_seed(seed + 7)
    statistic = -2 * torch.rand(8, 6, generator=g, dtype=torch.float64)
    # What stands where the mask is False must not matter.
    statistic = statistic.masked_fill(~scores.units.mask, float("nan"))
    return token_scores(8, 6, seed, vocabulary={"log_sum_p2": statistic}), layout, stats


def wpo_weights(batch):
    scores, layout, _ = batch
    units, statistic = scores.units, scores.vocabulary["log_sum_p2"]
    mean = torch.stack([(units.theta - statistic)[row][units.mask[row]].mean() for row in range(8)])
    w = mean.exp()
    return w[layout.pairs.w] * w[layout.pairs.l]


def wpo_formula(batch, frozen):
    w, l, pairs = pair_rho(batch)
    return wpo_weights(frozen) * pairs.weight * logistic(0.1 * (w - l) - pairs.margin, pairs, 0.1)


def wpo_of_typical_responses_is_dpo(cls):
    """Tokens exactly as likely as the policy's own samples are expected to be weigh one."""
    scores, layout, _ = pair_batch(3, units=True)
    typical = token_scores(8, 6, 3, vocabulary={"log_sum_p2": scores.units.theta.detach()})
    torch.testing.assert_close(
        cls(beta=0.1)(typical, layout).per_item, DPO(beta=0.1)(scores, layout).per_item, rtol=1e-12, atol=0
    )


def wpo_start():
    scores = token_scores(2, 4, 1, spread=0.0)
    mean = scores.theta.detach() / scores.length
    # Both rows' weights are one half.
    statistic = (mean + LOG2)[:, None].expand(2, 4)
    return token_scores(2, 4, 1, spread=0.0, vocabulary={"log_sum_p2": statistic}), Layout(pairs=Pairs.halves(1)), {}


def wpo_slopes():
    """The sum over a row's tokens of -beta/2 (or +beta/2) times both weights, label smoothing 0.1 in it."""
    w, l = wpo_start()[0].length.tolist()
    return [-0.01 * w, 0.01 * l]


# -- mixed -----------------------------------------------------------------------------------------------------------


def mixed_formula(batch, frozen):
    scores, _, _ = batch
    w, l, pairs = pair_rho(batch)
    dpo = logistic(0.1 * (w - l) - pairs.margin, pairs, 0.1)
    a, b = 0.1 * w - pairs.margin / 2, 0.1 * l + pairs.margin / 2
    bco = pairs.p * (softplus(-a) + softplus(b)) + (1 - pairs.p) * (softplus(-b) + softplus(a))
    chosen = scores.theta[pairs.w]
    sft = -chosen * len(pairs) / scores.length[pairs.w].sum()
    return pairs.weight * (0.8 * dpo + 0.2 * bco + 1.0 * sft)


def make_mixed(cls):
    return cls(beta=0.1, settings={"dpo": {"label_smoothing": 0.1}})


def mixed_is_the_sum_of_its_parts(cls):
    scores, layout, _ = pair_batch(6)
    ours = cls(beta=0.1, losses=("dpo", "bco_pair"), weights=(0.3, 2.0))(scores, layout).per_item
    parts = 0.3 * DPO(beta=0.1)(scores, layout).per_item + 2.0 * BCOPair(beta=0.1)(scores, layout).per_item
    torch.testing.assert_close(ours, parts)


def mixed_sft_is_the_mean_over_tokens(cls):
    scores, layout, _ = pair_batch(6, units=True, soft=False)
    out = cls(losses=("sft",), weights=(1.0,))(scores, layout)
    chosen = scores.units.mask[layout.pairs.w]
    tokens = scores.units.theta[layout.pairs.w][chosen]
    torch.testing.assert_close(out.loss, -tokens.mean())


CASES = [
    Case(
        objective=FDPO,
        make=lambda cls: cls(beta=0.1),
        batch=f_batch,
        formula=f_formula(forward_kl, 0.1, logistic),
        start=Start(LOG2, [-0.05, 0.05], pair_start()),
        identities=[reverse_kl_is_the_base, forward_kl_is_bounded_above],
        mutations=[
            ("f_score(scores.log_ratio()", "f_score(-scores.log_ratio()"),
            ("f_score(scores.log_ratio()", "f_score(2 * scores.log_ratio()"),
            ("theta=u, ref", "theta=-u, ref"),
        ],
        kinds=SAMPLED,
    ),
    Case(
        name="f_dpo js",
        objective=FDPO,
        make=lambda cls: cls(beta=0.1, divergence="js", settings={"label_smoothing": 0.1}),
        batch=f_batch,
        formula=f_formula(jensen_shannon, 0.1, lambda z, pairs: logistic(z, pairs, 0.1)),
        start=Start(LOG2, [-0.02, 0.02], pair_start()),
        identities=[js_halves_beta_at_the_start],
        mutations=[("self.divergence, self.alpha, limit", '"forward_kl", self.alpha, limit')],
        kinds=SAMPLED,
    ),
    Case(
        name="f_dpo alpha",
        objective=FDPO,
        make=lambda cls: cls(beta=0.1, divergence="alpha", base="hinge"),
        batch=f_batch,
        formula=f_formula(
            alpha_half, 0.1, lambda z, pairs: pairs.p * (1 - z).clamp(min=0) + (1 - pairs.p) * (1 + z).clamp(min=0)
        ),
        start=Start(1.0, [-0.1, 0.1], pair_start()),
        identities=[alpha_near_one_is_the_base],
        mutations=[("self.divergence, self.alpha, limit", "self.divergence, 2 * self.alpha, limit")],
        kinds=SAMPLED,
    ),
    Case(
        name="f_dpo of ipo",
        objective=FDPO,
        make=lambda cls: cls(beta=0.1, base="ipo"),
        batch=f_batch,
        formula=ipo_of_forward_kl,
        start=Start(25.0, [-1.0, 0.5], pair_start()),
        identities=[reverse_kl_is_the_base],
        mutations=[("theta=u, ref", "theta=2 * u, ref")],
        kinds=SAMPLED,
    ),
    Case(
        name="f_dpo, reverse KL",
        objective=FDPO,
        make=lambda cls: cls(beta=0.1, divergence="reverse_kl"),
        batch=pair_batch,
        formula=f_formula(lambda rho: rho, 0.1, logistic),
        start=Start(LOG2, [-0.05, 0.05], pair_start()),
        identities=[reverse_kl_is_the_base],
        mutations=[("theta=u, ref", "theta=2 * u, ref")],
        kinds=ALL,
    ),
    Case(
        objective=WPO,
        make=lambda cls: cls(beta=0.1, settings={"label_smoothing": 0.1}),
        batch=wpo_batch,
        formula=wpo_formula,
        start=Start(LOG2 / 4, wpo_slopes(), wpo_start),
        identities=[wpo_of_typical_responses_is_dpo],
        mutations=[
            ("weights[pairs.w] * weights[pairs.l]", "weights[pairs.w]"),
            ("units.theta.detach() - scores", "units.theta.detach() + scores"),
            ("units.theta.detach() - scores", "units.theta - scores"),
            ("weight=pairs.weight * both", "weight=both"),
            ("reduce.masked_mean(aligned, units.mask)", "aligned.masked_fill(~units.mask, 0).sum(1)"),
        ],
    ),
    Case(
        objective=Mixed,
        make=make_mixed,
        batch=pair_batch,
        formula=mixed_formula,
        # 7 nats over 10 tokens; the slopes of dpo (smoothed), bco_pair and imitation.
        start=Start(
            0.8 * LOG2 + 0.2 * 2 * LOG2 + 0.7,
            [0.8 * -0.04 + 0.2 * -0.05 - 0.1, 0.8 * 0.04 + 0.2 * 0.05],
            pair_start(),
        ),
        identities=[mixed_is_the_sum_of_its_parts, mixed_sft_is_the_mean_over_tokens],
        mutations=[
            ("total = total + weight * loss", "total = total - weight * loss"),
            ("total = total + weight * loss", "total = total + loss"),
            ("reduce.imitation(scores, pairs.w)", "reduce.imitation(scores, pairs.l)"),
            ("reduce.imitation(scores, pairs.w)", 'reduce.imitation(scores, pairs.w, "sequence")'),
            ("pairs.weight * reduce", "reduce"),
        ],
        kinds=ALL,
    ),
]
