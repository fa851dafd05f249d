"""Cases of `diffalign.losses.fine_grained`."""

import math
from dataclasses import replace

import torch
from loss_cases import Case, Start, token_scores
from torch.nn.functional import softplus

from diffalign import losses
from diffalign.losses import Kind, Layout, Pairs, Scores, Units
from diffalign.losses.fine_grained import OSPO, RRPO, TDPO1, TDPO2, SparsePO

TOKEN = (Kind.TOKEN,)
LAYOUT_WEIGHTS = (1.5, 0.5, 1.0)


def divergences(n, u, seed):
    g = torch.Generator().manual_seed(seed + 50)
    return torch.rand(n, u, generator=g, dtype=torch.float64)


def unit_batch(seed, **more):
    """3 pairs of 5 tokens with KL per position, masks, phrases, and a condition pair per pair."""
    g = torch.Generator().manual_seed(seed + 200)
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    scores = token_scores(
        9,
        5,
        seed,
        weight=rand(9, 5) + 0.1,
        divergence_weight=rand(9, 5) + 0.1,
        segment=torch.randint(0, 3, (9, 5), generator=g),
        vocabulary={"kl_ref_theta": divergences(9, 5, seed)},
        **more,
    )
    index = torch.arange(3)
    pairs = Pairs(
        w=index, l=index + 3, p=0.6 + 0.4 * rand(3), weight=torch.tensor(LAYOUT_WEIGHTS), margin=0.3 * rand(3)
    )
    return scores, Layout(pairs=pairs, conditions=Pairs(w=index, l=index + 6, margin=0.1 * rand(3))), {}


def unit_start(kl=0.0, value=-2.0):
    def batch():
        mask = torch.tensor([[True, True, False], [True, True, True], [True, True, False]])
        theta = torch.full((3, 3), value, dtype=torch.float64, requires_grad=True)
        scores = Scores.tokens(theta, theta.detach().clone(), mask=mask, segment=mask.long())
        scores = replace(scores, vocabulary={"kl_ref_theta": torch.full((3, 3), kl, dtype=torch.float64)})
        # The slopes are those of the rows' own leaf.
        scores = replace(scores, units=replace(scores.units, theta=theta))
        scores = replace(scores, theta=theta.masked_fill(~mask, 0.0).sum(1))
        conditions = Pairs(w=torch.tensor([0]), l=torch.tensor([2]))
        return scores, Layout(pairs=Pairs.halves(1), conditions=conditions), {}

    return batch


def parts(batch):
    """Token log-ratios, KL, mask as 0/1, weights, pairs."""
    scores, layout, _ = batch
    u = scores.units
    return u.theta - u.ref, scores.vocabulary["kl_ref_theta"], u.mask.double(), u, layout.pairs


def logistic(z, pairs, eps=0.0):
    p = pairs.p * (1 - eps) + (1 - pairs.p) * eps
    return pairs.weight * (p * softplus(-z) + (1 - p) * softplus(z))


def tdpo_formula(alpha):
    def formula(batch, frozen):
        d, kl, m, _, pairs = parts(batch)
        d, kl = (d * m).sum(1), (kl * m).sum(1)
        z = 0.1 * ((d[pairs.w] - d[pairs.l]) - alpha * (kl[pairs.l] - kl[pairs.w])) - pairs.margin
        return logistic(z, pairs)

    return formula


def sparse_formula(lambda_u, lambda_d, eps=0.0):
    def formula(batch, frozen):
        d, kl, m, units, pairs = parts(batch)
        u = (units.weight * d * m).sum(1)
        k = (units.divergence_weight * kl * m).sum(1)
        z = 0.1 * (u[pairs.w] - u[pairs.l] - (k[pairs.l] - k[pairs.w])) - pairs.margin
        norms = lambda_u * (units.weight * m).sum(1) + lambda_d * (units.divergence_weight * m).sum(1)
        return logistic(z, pairs, eps) + pairs.weight * (norms[pairs.w] + norms[pairs.l])

    return formula


def rrpo_formula(batch, frozen):
    d, kl, m, units, pairs = parts(batch)
    total = torch.zeros(len(pairs), dtype=torch.float64)
    for phrase in (1, 2):
        here = (units.segment == phrase).double() * m
        total = total + (d * here).sum(1)[pairs.w] - (d * here).sum(1)[pairs.l]
    return logistic(0.1 * total - pairs.margin, pairs) + pairs.weight * 0.05 * (kl * m).sum(1)[pairs.w]


def ospo_formula(batch, frozen):
    layout = batch[1]
    _, _, m, units, pairs = parts(batch)
    mean = (units.theta * m * units.weight).sum(1) / (m * units.weight).sum(1)
    conditions = layout.conditions
    main = logistic(5 * (mean[pairs.w] - mean[pairs.l]) - 2.5 - pairs.margin, pairs)
    other = softplus(-(3 * (mean[conditions.w] - mean[conditions.l]) - 1.2 - conditions.margin))
    nll = -(units.theta * m).sum(1)[pairs.w] * len(pairs) / m[pairs.w].sum()
    return main + 2.0 * pairs.weight * nll + 0.5 * other


def kl_gradient_signs(expected_w):
    """Gradient through the divergences: down on the rejected response, `expected_w` (0: detached) on the chosen one."""

    def identity(cls):
        scores, layout, _ = unit_batch(1)
        kl = scores.vocabulary["kl_ref_theta"].clone().requires_grad_()
        out = cls(beta=0.1)(replace(scores, vocabulary={"kl_ref_theta": kl}), replace(layout, conditions=None))
        (grad,) = torch.autograd.grad(out.per_item.sum(), kl)
        mask = scores.units.mask
        assert (grad[3:6][mask[3:6]] > 0).all()
        assert (torch.sign(grad[:3][mask[:3]]) == expected_w).all()

    return identity


def is_dpo_without_divergences(cls):
    scores, layout, _ = unit_batch(2)
    none = replace(scores, vocabulary={"kl_ref_theta": torch.zeros(9, 5, dtype=torch.float64)})
    torch.testing.assert_close(cls(beta=0.1)(none, layout).per_item, losses.DPO(beta=0.1)(scores, layout).per_item)


def alpha_one_has_tdpo1s_value(cls):
    scores, layout, _ = unit_batch(3)
    torch.testing.assert_close(
        cls(beta=0.1, alpha=1.0)(scores, layout).per_item, TDPO1(beta=0.1)(scores, layout).per_item
    )


def masks_of_one_give_tdpo1(cls):
    scores, layout, _ = unit_batch(4)
    plain = replace(scores, units=replace(scores.units, weight=None, divergence_weight=None))
    torch.testing.assert_close(cls(beta=0.1)(plain, layout).per_item, TDPO1(beta=0.1)(scores, layout).per_item)


def a_masked_token_is_a_missing_token(cls):
    scores, layout, _ = unit_batch(5)
    weight = torch.ones_like(scores.units.weight)
    weight[:, 0] = 0
    shorter = scores.units.mask.clone()
    shorter[:, 0] = False
    units = replace(scores.units, weight=weight, divergence_weight=None)
    one = cls(beta=0.1)(replace(scores, units=units), layout)
    other = cls(beta=0.1)(replace(scores, units=replace(units, weight=None, mask=shorter)), layout)
    torch.testing.assert_close(one.per_item, other.per_item)


def a_shared_mask_halves_the_penalties(cls):
    scores, layout, _ = unit_batch(6)
    weight = scores.units.weight
    make = lambda d: replace(scores, units=replace(scores.units, divergence_weight=d))  # noqa: E731
    loss = cls(beta=0.1, lambda_u=0.3, lambda_d=0.2)
    plain = cls(beta=0.1)(make(weight), layout).per_item
    separate, shared = loss(make(weight), layout).per_item - plain, loss(make(None), layout).per_item - plain
    torch.testing.assert_close(shared, 0.5 * separate)


def learned_masks_get_gradient(cls):
    scores, layout, _ = unit_batch(7)
    weight = scores.units.weight.clone().requires_grad_()
    made = replace(scores, units=replace(scores.units, weight=weight, divergence_weight=None))
    (grad,) = torch.autograd.grad(cls(beta=0.1, lambda_u=0.1)(made, layout).per_item.sum(), weight)
    assert (grad[:6][scores.units.mask[:6]] != 0).all()
    assert (grad[~scores.units.mask] == 0).all()


def elements_of_a_denoising_error(cls):
    """Without divergences it runs on latent elements; equal weights are DPO on the same errors."""
    g = torch.Generator().manual_seed(1)
    error, ref = torch.rand(4, 6, generator=g, dtype=torch.float64), torch.rand(4, 6, generator=g, dtype=torch.float64)
    mask = torch.ones(4, 6, dtype=torch.bool)
    units = Units(theta=-0.5 * error / 6, ref=-0.5 * ref / 6, mask=mask)
    scores = Scores.denoising(error.mean(1), ref.mean(1), units=units)
    pairs = Pairs.halves(2)
    one = cls(beta=2000, use_kl=False)(scores, pairs).per_item
    torch.testing.assert_close(one, losses.DPO(beta=2000)(scores, pairs).per_item)
    cls(beta=2000, use_kl=False).check(Kind.BOUND)


def shared_text_does_not_count(cls):
    scores, layout, _ = unit_batch(8)
    moved = scores.units.theta.detach() - 3.0 * (scores.units.segment == 0).double() * scores.units.mask
    other = replace(scores, units=replace(scores.units, theta=moved), theta=moved.sum(1))
    torch.testing.assert_close(cls(beta=0.1)(scores, layout).per_item, cls(beta=0.1)(other, layout).per_item)


def only_the_chosen_divergence_counts(cls):
    scores, layout, _ = unit_batch(9)
    kl = scores.vocabulary["kl_ref_theta"].clone().requires_grad_()
    out = cls(beta=0.1, alpha=0.05)(replace(scores, vocabulary={"kl_ref_theta": kl}), layout)
    (grad,) = torch.autograd.grad(out.per_item.sum(), kl)
    expected = 0.05 * torch.tensor(LAYOUT_WEIGHTS, dtype=torch.float64)[:, None] * scores.units.mask[:3]
    torch.testing.assert_close(grad[:3], expected)
    assert (grad[3:] == 0).all()


def weights_are_normalised(cls):
    scores, layout, _ = unit_batch(10)
    twice = replace(scores, units=replace(scores.units, weight=2 * scores.units.weight))
    torch.testing.assert_close(cls()(scores, layout).per_item, cls()(twice, layout).per_item)


def equal_weights_are_length_normalised_margins(cls):
    scores, layout, _ = unit_batch(11)
    plain = replace(scores, units=replace(scores.units, weight=None))
    pairs = Pairs(w=layout.pairs.w, l=layout.pairs.l)
    mean = scores.theta / scores.length
    expected = softplus(-(2 * (mean[pairs.w] - mean[pairs.l]) - 1.0))
    torch.testing.assert_close(cls(beta=2.0, sft_weight=0.0)(plain, pairs).per_item, expected)


def the_conditional_term_defaults_to_the_main_settings(cls):
    scores, layout, _ = unit_batch(12)
    implicit = cls(copo_weight=0.5)(scores, layout).per_item
    explicit = cls(copo_weight=0.5, copo_beta=5.0, copo_gamma_beta_ratio=0.5)(scores, layout).per_item
    torch.testing.assert_close(implicit, explicit)


CASES = [
    Case(
        objective=TDPO1,
        make=lambda cls: cls(beta=0.1),
        batch=unit_batch,
        formula=tdpo_formula(1.0),
        start=Start(math.log(2), [-0.1, 0.15, 0.0], unit_start()),
        identities=[is_dpo_without_divergences, kl_gradient_signs(-1)],
        mutations=[
            ("scores.log_ratio() + sequence_kl", "scores.log_ratio() - sequence_kl"),
            ("return scores.log_ratio() + sequence_kl", "return scores.log_ratio() + 0.5 * sequence_kl"),
        ],
        kinds=TOKEN,
    ),
    Case(
        objective=TDPO2,
        make=lambda cls: cls(beta=0.1, alpha=0.5),
        batch=unit_batch,
        formula=tdpo_formula(0.5),
        start=Start(math.log(2), [-0.1, 0.15, 0.0], unit_start(kl=0.0)),
        identities=[is_dpo_without_divergences, alpha_one_has_tdpo1s_value, kl_gradient_signs(0)],
        mutations=[
            ("self.alpha * kl[pairs.w].detach()", "self.alpha * kl[pairs.w]"),
            ("rho[pairs.l] + self.alpha", "rho[pairs.l] - self.alpha"),
            ("beta * (u_w - u_l)", "2 * beta * (u_w - u_l)"),
            ("- pairs.margin", "+ pairs.margin"),
        ],
        kinds=TOKEN,
    ),
    Case(
        objective=SparsePO,
        make=lambda cls: cls(beta=0.1, lambda_u=0.3, lambda_d=0.2),
        batch=unit_batch,
        formula=sparse_formula(0.3, 0.2),
        start="the penalties depend on the lengths; the case without them starts at log 2",
        identities=[
            masks_of_one_give_tdpo1,
            a_masked_token_is_a_missing_token,
            a_shared_mask_halves_the_penalties,
            learned_masks_get_gradient,
        ],
        mutations=[
            ("reward + sequence_kl", "reward - sequence_kl"),
            ("units.mask, units.weight)", "units.mask)"),
            ("0.5 if self.use_kl", "1.0 if self.use_kl"),
            ("penalty[pairs.w] + penalty[pairs.l]", "penalty[pairs.w] - penalty[pairs.l]"),
            ("pairs.weight * (penalty", "(penalty"),
            ("both + self.lambda_d", "both + self.lambda_u"),
        ],
        kinds=TOKEN,
    ),
    Case(
        name="sparse_po without divergences",
        objective=SparsePO,
        make=lambda cls: cls(beta=0.1, use_kl=False, label_smoothing=0.1),
        batch=unit_batch,
        formula=lambda batch, frozen: sparse_formula(0, 0, 0.1)(
            (replace(batch[0], vocabulary={"kl_ref_theta": torch.zeros(9, 5, dtype=torch.float64)}), *batch[1:]), frozen
        ),
        start=Start(math.log(2), [-0.08, 0.12, 0.0], unit_start(kl=7.0)),
        identities=[elements_of_a_denoising_error],
        mutations=[
            ("if not self.use_kl", "if self.use_kl"),
            ("(1 - p) * self.label_smoothing", "self.label_smoothing"),
        ],
        kinds=(Kind.TOKEN, Kind.STEP, Kind.BOUND),
    ),
    Case(
        objective=RRPO,
        make=lambda cls: cls(beta=0.1, alpha=0.05),
        batch=unit_batch,
        formula=rrpo_formula,
        start=Start(math.log(2), [-0.1, 0.15, 0.0], unit_start()),
        identities=[shared_text_does_not_count, only_the_chosen_divergence_counts],
        mutations=[
            ("units.segment > 0", "units.segment >= 0"),
            ("pairs.weight * self.alpha * kl", "-pairs.weight * self.alpha * kl"),
            ("pairs.weight * self.alpha * kl", "self.alpha * kl"),
            ("sequence_kl(scores)[pairs.w]", "sequence_kl(scores)[pairs.l]"),
        ],
        kinds=TOKEN,
    ),
    Case(
        objective=OSPO,
        make=lambda cls: cls(copo_weight=0.5, copo_beta=3.0, copo_gamma_beta_ratio=0.4),
        optional=["conditions"],
        batch=unit_batch,
        formula=ospo_formula,
        # All means equal: softplus(2.5) + 2 nll (2 nats) + 1/2 softplus(1.2).
        start=Start(
            math.log1p(math.exp(2.5)) + 4.0 + 0.5 * math.log1p(math.exp(1.2)),
            [
                -5 / (1 + math.exp(-2.5)) - 2.0 - 1.5 / (1 + math.exp(-1.2)),
                5 / (1 + math.exp(-2.5)),
                1.5 / (1 + math.exp(-1.2)),
            ],
            unit_start(),
        ),
        identities=[
            weights_are_normalised,
            equal_weights_are_length_normalised_margins,
            the_conditional_term_defaults_to_the_main_settings,
        ],
        mutations=[
            ("z - beta * ratio", "z + beta * ratio"),
            ("beta * (m[pairs.w] - m[pairs.l])", "beta * (m[pairs.w] + m[pairs.l])"),
            ("self.sft_weight * pairs.weight * sft", "pairs.weight * sft"),
            ("self.copo_weight * beside", "-self.copo_weight * beside"),
            ("self.copo_beta or self.beta", "self.beta"),
            ("weighted_mean(units.theta", "masked_sum(units.theta"),
        ],
        kinds=TOKEN,
    ),
]
