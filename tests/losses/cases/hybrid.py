"""Cases of `diffalign.losses.hybrid`."""

import math
from dataclasses import replace

import torch
from loss_cases import Case, Start, at_start, row_scores, token_scores
from torch.nn.functional import softplus

from diffalign import losses
from diffalign.losses import Groups, Items, Kind, Layout, Pairs, Scores
from diffalign.losses.hybrid import (
    DPOP,
    POVID,
    RPO,
    FlexDPO,
    HyPO,
    IterativeRPO,
    RationaleDPO,
    RealignRDPO,
    UVCoT,
    leave_one_out,
)

ALL = (Kind.TOKEN, Kind.STEP, Kind.BOUND)
LOG2 = math.log(2)


def hybrid_batch(seed):
    """4 pairs (rows 0-7), 4 condition rows (8-11, also rationales) and 6 on-policy samples of 2 prompts (12-17)."""
    g = torch.Generator().manual_seed(seed + 300)
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    index = torch.arange(4)
    layout = Layout(
        pairs=Pairs(w=index, l=index + 4, p=0.6 + 0.4 * rand(4), weight=0.5 + rand(4), margin=0.3 * rand(4)),
        conditions=Pairs(w=index, l=index + 8, margin=0.1 * rand(4)),
        items=Items(index=index + 8),
        on_policy=Groups(index=torch.arange(12, 18), group=torch.tensor([0, 0, 0, 1, 1, 1]), reward=rand(6)),
    )
    return row_scores(18, seed), layout, {}


def start(rows=2, **layout):
    def batch():
        return at_start(rows, length=[10] * rows), Layout(pairs=Pairs.halves(1), **layout), {}

    return batch


def rewards(batch, beta=0.1):
    scores, layout, _ = batch
    r = beta * (scores.theta - scores.ref)
    return r, r[layout.pairs.w], r[layout.pairs.l], layout.pairs


def logistic(z, pairs):
    return pairs.p * softplus(-z) + (1 - pairs.p) * softplus(z)


def dpo(batch, beta=0.1):
    _, w, l, pairs = rewards(batch, beta)
    return pairs.weight * logistic(w - l - pairs.margin, pairs)


def rpo_formula(beta, eta, reduction):
    def formula(batch, frozen):
        scores, layout, _ = batch
        nll, length = -scores.theta[layout.pairs.w], scores.length[layout.pairs.w]
        sft = nll / length if reduction == "sequence" else 4 * nll / length.sum()
        return dpo(batch, beta) + layout.pairs.weight * eta * sft

    return formula


def flex_formula(batch, frozen):
    scores = batch[0]
    _, w, l, pairs = rewards(batch)
    nll = -4 * scores.theta[pairs.w] / scores.length[pairs.w].sum()
    return pairs.weight * (logistic(w - 0.3 * l - pairs.margin, pairs) + 0.2 * nll)


def dpop_formula(place):
    def formula(batch, frozen):
        _, w, l, pairs = rewards(batch)
        penalty = 5 * torch.maximum(-w, torch.zeros_like(w))
        z = w - l - pairs.margin
        loss = logistic(z - penalty, pairs) if place == "inside" else logistic(z, pairs) + penalty
        return pairs.weight * loss

    return formula


def hypo_formula(baseline):
    def formula(batch, frozen):
        scores, layout, _ = batch
        rows = layout.on_policy.index
        rho = (frozen[0].theta - frozen[0].ref)[rows]
        b = torch.zeros(6, dtype=torch.float64)
        if baseline == "loo":
            for i in range(6):
                b[i] = rho[[j for j in range(6) if j != i and j // 3 == i // 3]].mean()
        kl = rho + (rho - b) * (scores.theta[rows] - frozen[0].theta[rows])
        return dpo(batch) + 0.2 * kl.mean()

    return formula


def two_formula(a, b, sft=0.0):
    def formula(batch, frozen):
        scores, layout, _ = batch
        r, w, _, pairs = rewards(batch)
        second = softplus(-(w - r[layout.conditions.l] - layout.conditions.margin))
        nll = -4 * scores.theta[pairs.w] / scores.length[pairs.w].sum()
        return a * dpo(batch) + b * second + sft * pairs.weight * nll

    return formula


def rationale_formula(form):
    def formula(batch, frozen):
        scores, layout, _ = batch
        s = 0.1 * scores.theta[layout.items.index]
        return dpo(batch) + layout.pairs.weight * (-s if form == "paper" else softplus(-s))

    return formula


def weighted_batch(seed):
    g = torch.Generator().manual_seed(seed + 400)
    weight = torch.rand(6, 5, generator=g, dtype=torch.float64) * 2
    pairs = Pairs.halves(3, weight=torch.rand(3, generator=g, dtype=torch.float64) + 0.5, margin=0.1)
    return token_scores(6, 5, seed, weight=weight), Layout(pairs=pairs), {}


def uv_formula(batch, frozen):
    scores, layout, _ = batch
    u, pairs = scores.units, layout.pairs
    d = (u.weight * (u.theta - u.ref) * u.mask).sum(1)
    nll = -(u.theta * u.mask).sum(1)[pairs.w]
    return pairs.weight * (softplus(-(0.1 * (d[pairs.w] - d[pairs.l]) - 0.1)) + 0.3 * nll)


# -- identities --------------------------------------------------------------------------------------------------------


def equals_dpo(make):
    def identity(cls):
        scores, layout, _ = hybrid_batch(20)
        torch.testing.assert_close(make(cls)(scores, layout).per_item, losses.DPO(beta=0.1)(scores, layout).per_item)

    return identity


def the_imitation_term_scales_with_its_weight(cls):
    scores, layout, _ = hybrid_batch(21)
    none, one, two = (cls(beta=0.1, sft_weight=w)(scores, layout).per_item for w in (0.0, 0.3, 0.6))
    torch.testing.assert_close(two - none, 2 * (one - none))
    assert (one > none).all()


def reductions_agree_where_lengths_do(cls):
    scores, layout, _ = hybrid_batch(22)
    even = replace(scores, length=torch.full((18,), 7.0))
    one, other = (cls(sft_weight=0.5, sft_reduction=r)(even, layout).per_item for r in ("token", "sequence"))
    torch.testing.assert_close(one, other)
    assert not torch.allclose(
        cls(sft_weight=0.5)(scores, layout).per_item,
        cls(sft_weight=0.5, sft_reduction="sequence")(scores, layout).per_item,
    )


def its_defaults_are(beta, weight):
    def identity(cls):
        scores, layout, _ = hybrid_batch(23)
        given, default = cls(beta=beta, sft_weight=weight)(scores, layout), cls()(scores, layout)
        torch.testing.assert_close(default.per_item, given.per_item)

    return identity


def the_winners_error_is_imitated(cls):
    error = torch.tensor([0.3, 0.5], dtype=torch.float64)
    scores = Scores.denoising(error, error)
    loss = cls(beta=5000.0, sft_weight=0.1)(scores, Pairs.halves(1)).loss
    torch.testing.assert_close(loss.item(), LOG2 + 0.03)


def token_means_survive_micro_batches(cls):
    """Two micro-batches that know the counts of the step have the loss of the whole."""
    scores, layout, _ = hybrid_batch(24)
    pairs = Pairs(w=torch.arange(4), l=torch.arange(4) + 4)
    totals = losses.Totals(
        items=4, units=float(scores.length.sum()), chosen_units=float(scores.length[layout.pairs.w].sum())
    )
    whole = cls(sft_weight=1.0)(scores, pairs).loss
    halves = [
        cls(sft_weight=1.0)(replace(scores, totals=totals), Pairs(w=pairs.w[i : i + 2], l=pairs.l[i : i + 2])).per_item
        for i in (0, 2)
    ]
    torch.testing.assert_close(torch.cat(halves).mean(), whole)


def ratio_zero_is_one_sided(cls):
    scores, layout, _ = hybrid_batch(25)
    x = scores.theta.detach().requires_grad_()
    moved = replace(scores, theta=x)
    (grad,) = torch.autograd.grad(cls(beta=0.1, rejected_ratio=0.0)(moved, layout).loss, x)
    assert (grad[4:8] == 0).all()
    assert (grad[:4] < 0).any()


def no_penalty_above_the_reference(cls):
    """Where the chosen response gained, it is DPO; where it lost, the loss is larger, by lambda outside of the link."""
    theta = torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64)
    scores, pairs = Scores.tokens(theta, torch.zeros(4)), Pairs.halves(2)
    plain = losses.DPO(beta=0.1)(scores, pairs).per_item
    outside = cls(beta=0.1, dpop_lambda=7.0, place="outside")(scores, pairs).per_item
    torch.testing.assert_close(outside - plain, torch.tensor([0.0, 0.7], dtype=torch.float64))
    inside = cls(beta=0.1, dpop_lambda=7.0)(scores, pairs).per_item
    torch.testing.assert_close(inside, softplus(torch.tensor([-0.1, 0.1 + 0.7], dtype=torch.float64)))


def the_gradient_is_that_of_the_reverse_divergence(cls):
    """Its expectation over a small vocabulary is KL(pi || ref), in value and in gradient."""
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(5, generator=g, dtype=torch.float64).requires_grad_()
    ref = torch.randn(5, generator=g, dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    exact = (logp.exp() * (logp - ref)).sum()
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    scores = Scores.tokens(logp, ref)
    samples = Groups(index=torch.arange(5), group=torch.arange(5), reward=torch.zeros(5))
    estimate = cls(beta=0.1, baseline="none").divergence(scores, samples)
    weighted = (logp.exp().detach() * estimate).sum()
    torch.testing.assert_close(weighted, exact)
    (grad,) = torch.autograd.grad(weighted, logits)
    torch.testing.assert_close(grad, expected)


def leaving_one_out(cls):
    x, group = torch.tensor([1.0, 2.0, 6.0, 5.0]), torch.tensor([0, 0, 0, 1])
    torch.testing.assert_close(leave_one_out(x, group), torch.tensor([4.0, 3.5, 1.5, 0.0]))


def no_samples_leave_dpo(cls):
    scores, layout, _ = hybrid_batch(26)
    none = Groups(index=torch.zeros(0).long(), group=torch.zeros(0).long(), reward=torch.zeros(0))
    out = cls(beta=0.1)(scores, replace(layout, on_policy=none))
    torch.testing.assert_close(out.per_item, losses.DPO(beta=0.1)(scores, layout).per_item)


def conditions_of_another_count_are_averaged(cls):
    scores, layout, _ = hybrid_batch(27)
    c = layout.conditions
    fewer = Pairs(w=c.w[:2], l=c.l[:2], margin=c.margin[:2])
    whole, part = cls(beta=0.1)(scores, layout), cls(beta=0.1)(scores, replace(layout, conditions=fewer))
    second = whole.per_item - cls(beta=0.1)(scores, replace(layout, conditions=Pairs(w=c.w, l=c.w))).per_item
    difference = part.loss - cls(beta=0.1)(scores, replace(layout, conditions=Pairs(w=c.w, l=c.w))).loss
    torch.testing.assert_close(difference, second[:2].mean())


def equal_mix_of_the_same_pairs_is_dpo(cls):
    scores, layout, _ = hybrid_batch(28)
    same = replace(layout, conditions=layout.pairs)
    torch.testing.assert_close(cls(beta=0.1)(scores, same).per_item, losses.DPO(beta=0.1)(scores, layout).per_item)


def without_noise_it_is_dpo(cls):
    equals_dpo(lambda c: c(beta=0.1, noised_weight=0.0))(cls)


def equal_token_weights_are_dpo(cls):
    scores, layout, _ = weighted_batch(5)
    plain = replace(scores, units=replace(scores.units, weight=None))
    torch.testing.assert_close(cls(beta=0.1)(plain, layout).per_item, losses.DPO(beta=0.1)(scores, layout).per_item)


def forms_agree_early(cls):
    """For very unlikely rationales both forms have the same slopes, and the same values."""
    scores, layout, _ = hybrid_batch(29)
    unlikely = replace(scores, theta=scores.theta - 1000 * (torch.arange(18) >= 8))
    paper, code = (cls(beta=0.1, form=form)(unlikely, layout).per_item for form in ("paper", "code"))
    torch.testing.assert_close(paper, code)


CASES = [
    Case(
        objective=RPO,
        make=lambda cls: cls(sft_weight=0.3),
        batch=hybrid_batch,
        formula=rpo_formula(0.01, 0.3, "token"),
        start=Start(LOG2 + 0.3 * 0.7, [-0.005 - 0.03, 0.005], start()),
        identities=[
            equals_dpo(lambda cls: cls(beta=0.1, sft_weight=0.0)),
            the_imitation_term_scales_with_its_weight,
            reductions_agree_where_lengths_do,
            its_defaults_are(0.01, 0.005),
            the_winners_error_is_imitated,
            token_means_survive_micro_batches,
        ],
        mutations=[
            ("pairs.weight * weight * sft", "-pairs.weight * weight * sft"),
            ("pairs.weight * weight * sft", "weight * sft"),
            ("imitation(scores, pairs.w, self", "imitation(scores, pairs.l, self"),
            ("default_sft_weight: ClassVar[float] = 0.005", "default_sft_weight: ClassVar[float] = 0.05"),
            ("pairs.w, self.sft_reduction", "pairs.w"),
        ],
        kinds=ALL[:2],
    ),
    Case(
        name="rpo on any score",
        objective=RPO,
        make=lambda cls: cls(beta=0.1, sft_weight=0.3, sft_reduction="sequence"),
        batch=hybrid_batch,
        formula=rpo_formula(0.1, 0.3, "sequence"),
        start=Start(LOG2 + 0.3 * 0.7, [-0.05 - 0.03, 0.05], start()),
        identities=[the_imitation_term_scales_with_its_weight],
        mutations=[("pairs.w, self.sft_reduction", "pairs.w")],
        kinds=ALL,
    ),
    Case(
        objective=IterativeRPO,
        make=lambda cls: cls(),
        batch=hybrid_batch,
        formula=rpo_formula(0.1, 1.0, "token"),
        start=Start(LOG2 + 0.7, [-0.05 - 0.1, 0.05], start()),
        identities=[its_defaults_are(0.1, 1.0)],
        mutations=[
            ("default_sft_weight: ClassVar[float] = 1.0", "default_sft_weight: ClassVar[float] = 0.5"),
            ("ClassVar[Mapping[Kind, float]] = BETA", "ClassVar[Mapping[Kind, float]] = {Kind.TOKEN: -0.1}"),
        ],
        kinds=ALL[:1],
    ),
    Case(
        objective=FlexDPO,
        make=lambda cls: cls(beta=0.1, rejected_ratio=0.3, sft_weight=0.2),
        batch=hybrid_batch,
        formula=flex_formula,
        start=Start(LOG2 + 0.2 * 0.7, [-0.05 - 0.02, 0.015], start()),
        identities=[equals_dpo(lambda cls: cls(beta=0.1, rejected_ratio=1.0)), ratio_zero_is_one_sided],
        mutations=[
            ("- self.rejected_ratio * reward", "+ self.rejected_ratio * reward"),
            ("self.sft_weight * imitation", "imitation"),
            ("- pairs.margin", "+ pairs.margin"),
            ("pairs.weight * loss", "loss"),
        ],
        kinds=ALL,
    ),
    Case(
        objective=DPOP,
        make=lambda cls: cls(beta=0.1, dpop_lambda=5.0),
        batch=hybrid_batch,
        formula=dpop_formula("inside"),
        start=Start(LOG2, [-0.05, 0.05], start()),
        identities=[equals_dpo(lambda cls: cls(beta=0.1, dpop_lambda=0.0)), no_penalty_above_the_reference],
        mutations=[
            ("pairs.margin - penalty", "pairs.margin + penalty"),
            ("relu(-reward[pairs.w])", "relu(reward[pairs.w])"),
            ("pairs.weight * loss", "loss"),
        ],
        kinds=ALL,
    ),
    Case(
        name="dpop outside of the link",
        objective=DPOP,
        make=lambda cls: cls(beta=0.1, dpop_lambda=5.0, place="outside"),
        batch=hybrid_batch,
        formula=dpop_formula("outside"),
        start=Start(LOG2, [-0.05, 0.05], start()),
        identities=[no_penalty_above_the_reference],
        mutations=[("pairs.p, beta) + penalty", "pairs.p, beta) - penalty"), ("self.dpop_lambda * relu", "relu")],
        kinds=ALL,
    ),
    Case(
        objective=HyPO,
        make=lambda cls: cls(beta=0.1, kl_weight=0.2),
        batch=hybrid_batch,
        formula=hypo_formula("loo"),
        start=Start(
            LOG2,
            [-0.05, 0.05, 0.0],
            start(3, on_policy=Groups(index=torch.tensor([2]), group=torch.tensor([0]), reward=torch.zeros(1))),
        ),
        identities=[the_gradient_is_that_of_the_reverse_divergence, leaving_one_out, no_samples_leave_dpo],
        mutations=[
            ("self.kl_weight * mean", "-self.kl_weight * mean"),
            ("centred * (s - s.detach())", "2 * centred * (s - s.detach())"),
            ("rho - leave_one_out", "rho + leave_one_out"),
            ("kl.mean() if", "kl.sum() if"),
            ("[samples.index].detach()", "[samples.index]"),
        ],
        kinds=ALL[:2],
    ),
    Case(
        name="hypo without baseline",
        objective=HyPO,
        make=lambda cls: cls(beta=0.1, kl_weight=0.2, baseline="none"),
        batch=hybrid_batch,
        formula=hypo_formula("none"),
        start="as with the baseline",
        identities=[the_gradient_is_that_of_the_reverse_divergence],
        mutations=[('self.baseline == "loo"', 'self.baseline != "loo"')],
        kinds=ALL[:2],
    ),
    Case(
        objective=RealignRDPO,
        make=lambda cls: cls(beta=0.1),
        batch=hybrid_batch,
        formula=two_formula(1.0, 1.0),
        start=Start(
            2 * LOG2,
            [-0.1, 0.05, 0.05],
            start(3, conditions=Pairs(w=torch.tensor([0]), l=torch.tensor([2]))),
        ),
        identities=[conditions_of_another_count_are_averaged],
        mutations=[("return 1.0, 1.0", "return 1.0, 0.5"), ("b * beside", "-b * beside")],
        kinds=ALL,
    ),
    Case(
        name="realign_rdpo with imitation",
        objective=RealignRDPO,
        make=lambda cls: cls(beta=0.1, sft_weight=0.2),
        batch=hybrid_batch,
        formula=two_formula(1.0, 1.0, 0.2),
        start="as without, plus the imitation loss",
        identities=[the_imitation_term_scales_with_its_weight],
        mutations=[
            ("self.sft_weight * pairs.weight * sft", "-self.sft_weight * pairs.weight * sft"),
            ("self.sft_weight * pairs.weight * sft", "self.sft_weight * sft"),
        ],
        kinds=ALL,
    ),
    Case(
        objective=POVID,
        make=lambda cls: cls(beta=0.1, noised_weight=0.3),
        batch=hybrid_batch,
        formula=two_formula(0.7, 0.3),
        start=Start(
            LOG2,
            [-0.05, 0.035, 0.015],
            start(3, conditions=Pairs(w=torch.tensor([0]), l=torch.tensor([2]))),
        ),
        identities=[equal_mix_of_the_same_pairs_is_dpo, without_noise_it_is_dpo],
        mutations=[
            ("1 - self.noised_weight, self", "1 + self.noised_weight, self"),
            ("1 - self.noised_weight, self.noised_weight", "1.0, self.noised_weight"),
        ],
        kinds=ALL,
    ),
    Case(
        objective=UVCoT,
        make=lambda cls: cls(beta=0.1, sft_weight=0.3),
        batch=weighted_batch,
        formula=uv_formula,
        start="the imitation term depends on the score",
        identities=[equal_token_weights_are_dpo],
        mutations=[
            ("units.mask, units.weight", "units.mask"),
            ("self.sft_weight * scores", "-self.sft_weight * scores"),
            ("pairs.weight * self.sft_weight", "self.sft_weight"),
        ],
        kinds=ALL,
    ),
    Case(
        objective=RationaleDPO,
        make=lambda cls: cls(beta=0.1, gamma=0.1),
        batch=hybrid_batch,
        formula=rationale_formula("paper"),
        start=Start(LOG2 + 0.7, [-0.05, 0.05, -0.1], start(3, items=Items(index=torch.tensor([2])))),
        identities=[equals_dpo(lambda cls: cls(beta=0.1, gamma=0.0)), forms_agree_early],
        mutations=[
            ('-s if self.form == "paper"', 's if self.form == "paper"'),
            ("s = self.gamma * scores", "s = scores"),
            ("pairs.weight * (-s", "(-s"),
        ],
        kinds=ALL[:1],
        tags=("batch order",),
    ),
    Case(
        name="rationale_dpo as released",
        objective=RationaleDPO,
        make=lambda cls: cls(beta=0.1, gamma=0.1, form="code"),
        batch=hybrid_batch,
        formula=rationale_formula("code"),
        start=Start(
            LOG2 + math.log1p(math.exp(0.7)),
            [-0.05, 0.05, -0.1 / (1 + math.exp(-0.7))],
            start(3, items=Items(index=torch.tensor([2]))),
        ),
        identities=[forms_agree_early],
        mutations=[("-logsigmoid(s)", "-logsigmoid(-s)"), ("self.gamma * scores", "2 * self.gamma * scores")],
        kinds=ALL[:1],
        tags=("batch order",),
    ),
]
