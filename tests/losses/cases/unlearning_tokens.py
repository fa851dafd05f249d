"""Cases of `diffalign.losses.unlearning_tokens`."""

import math
from dataclasses import replace

import pytest
import torch
from loss_cases import Case, Start, detach, token_scores
from torch.nn.functional import softplus

from diffalign import losses
from diffalign.losses import Items, Layout, Scores, Totals
from diffalign.losses.unlearning import GA
from diffalign.losses.unlearning_tokens import CATNIP, CEU, PDU, UNDIAL, WGA, DiPO, SatImp

STATISTICS = ("kl_ref_theta", "ce_u", "undial", "pdu", "dipo_forget", "dipo_memory")


def tokens_batch(seed, dual=None):
    """7 rows of up to 5 tokens: 4 to forget, 3 to retain, with weights and vocabulary statistics."""
    g = torch.Generator().manual_seed(seed + 700)
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    scores = token_scores(8, 5, seed, vocabulary={name: rand(8, 5) for name in STATISTICS})
    items = Items(
        index=torch.tensor([3, 0, 7, 1, 2, 6, 5]),
        label=torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0]),
        weight=0.5 + rand(7),
    )
    return scores, Layout(items=items), {} if dual is None else {"dual": torch.tensor(dual)}


def start(p, ref=None, statistic=0.0, dual=None):
    """One row of three tokens of probability p, to be forgotten."""

    def batch():
        theta = torch.full((1, 3), math.log(p), dtype=torch.float64, requires_grad=True)
        reference = torch.full((1, 3), math.log(p if ref is None else ref), dtype=torch.float64)
        fixed = {name: torch.full((1, 3), statistic, dtype=torch.float64) for name in STATISTICS}
        scores = Scores.tokens(theta, reference, mask=torch.ones(1, 3).bool(), vocabulary=fixed)
        scores = replace(scores, units=replace(scores.units, theta=theta), theta=theta.sum(1), imitation=-theta.sum(1))
        stats = {} if dual is None else {"dual": torch.tensor(dual)}
        return scores, Layout(items=Items(index=torch.tensor([0]), label=torch.zeros(1))), stats

    return batch


def side_mean(x, batch, forget=True, skip=0, reduction="token"):
    scores, layout, _ = batch
    items = layout.items
    mask = scores.units.mask[items.index].double()
    mask = mask * (mask.cumsum(1) > skip)
    side = (items.label == 0) if forget else (items.label == 1)
    sums = (x[items.index] * mask).sum(1)
    if reduction == "sequence":
        return sums / mask.sum(1).clamp(min=1)
    return sums * side.sum() / mask[side].sum()


def formula(lost, gamma=1.0, alpha=1.0, skip=0, bound=0.0, retain=True):
    """Values per item of a forget loss per unit `lost(scores, frozen)`, with the NLL as retain loss."""

    def evaluate(batch, frozen):
        scores, layout, stats = batch
        items = layout.items
        forget = items.label == 0
        x = side_mean(lost(scores, frozen[0]), batch, skip=skip)
        kept = side_mean(-scores.units.theta, batch, False) - bound
        factor = stats["dual"].double() if "dual" in stats else alpha
        x = gamma * x * 7 / forget.sum()
        kept = factor * kept * 7 / (~forget).sum() if retain else 0.0 * kept
        return torch.where(forget, x, kept) * items.weight

    return evaluate


def wga_unit(beta):
    return lambda scores, frozen: frozen.units.theta.exp() ** beta * scores.units.theta


def satimp_unit(scores, frozen):
    p = frozen.units.theta.exp()
    return p**3 * (1 - p) ** 2 * scores.units.theta


def catnip_unit(calibrator):
    def unit(scores, frozen):
        logp, fixed = scores.units.theta, frozen.units.theta
        c = {
            "confidence": (1 - fixed.exp()).clamp(min=1e-300).log(),
            "constant": torch.tensor(-0.7, dtype=torch.float64),
            "reference": scores.units.ref,
        }
        return 2 / 0.3 * softplus(0.3 * (logp - c[calibrator]))

    return unit


def statistic(name):
    return lambda scores, frozen: scores.vocabulary[name]


def dipo_formula(batch, frozen):
    scores, layout, _ = batch
    gap = scores.vocabulary["dipo_forget"] - scores.vocabulary["dipo_memory"]
    z = 0.1 * (gap * scores.units.mask).sum(1)
    lost = softplus(-z)[layout.items.index]
    kept = side_mean(-scores.units.theta, batch, False)
    forget = layout.items.label == 0
    return torch.where(forget, lost * 7 / forget.sum(), kept * 7 / (~forget).sum()) * layout.items.weight


# -- identities --------------------------------------------------------------------------------------------------------


def gradients_through(make, transcription, *names):
    """Gradients through vocabulary statistics equal those of the transcription."""

    def identity(cls):
        batch = tokens_batch(40, 0.7)
        found = []
        for run in (lambda b: make(cls)(*b).per_item, lambda b: transcription(b, detach(b))):
            live = {name: batch[0].vocabulary[name].clone().requires_grad_() for name in names}
            scores = replace(batch[0], vocabulary={**batch[0].vocabulary, **live})
            found.append(torch.autograd.grad(run((scores, *batch[1:])).sum(), list(live.values())))
        for one, other in zip(*found):
            torch.testing.assert_close(one, other)
            assert (one != 0).any()

    return identity


def declares(make, *names):
    def identity(cls):
        assert set(make(cls).vocabulary()) == set(names)

    return identity


def micro_batches_add_up(make, dual=None):
    def identity(cls):
        scores, layout, stats = tokens_batch(41, dual)
        items = replace(layout.items, weight=1.0)
        length, keep = scores.length[items.index], items.label == 1
        totals = Totals(
            items=7, units=float(length.sum()), positive_items=3.0, positive_units=float(length[keep].sum())
        )
        whole = make(cls)(scores, items, stats).loss
        known = replace(scores, totals=totals)
        parts = [
            make(cls)(known, Items(index=items.index[p], label=items.label[p]), stats).per_item
            for p in (slice(0, 2), slice(2, 3), slice(3, 7))
        ]
        torch.testing.assert_close(torch.cat(parts).mean(), whole)

    return identity


def power_zero_is_gradient_ascent(make):
    def identity(cls):
        scores, layout, _ = tokens_batch(42)
        torch.testing.assert_close(make(cls)(scores, layout).per_item, GA(retain="nll")(scores, layout).per_item)

    return identity


def satimp_with_one_factor_is_wga(cls):
    scores, layout, _ = tokens_batch(43)
    one = cls(gamma=1.0, beta1=2.0, beta2=0.0)(scores, layout).per_item
    torch.testing.assert_close(one, WGA(beta=2.0)(scores, layout).per_item)


def certain_tokens_have_weight_zero(cls):
    theta = torch.tensor([[0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    scores = Scores.tokens(theta, mask=torch.ones(1, 2).bool())
    out = cls(retain="none")(scores, Items(index=torch.tensor([0]), label=torch.zeros(1)))
    (grad,) = torch.autograd.grad(out.loss, theta)
    assert grad[0, 0] == 0
    assert grad[0, 1] > 0


def slope_grows_with_confidence(cls):
    p = torch.tensor([[0.01, 0.5, 0.99]], dtype=torch.float64)
    theta = p.log().requires_grad_()
    scores = Scores.tokens(theta, mask=torch.ones(1, 3).bool())
    out = cls(beta=0.3)(scores, Items(index=torch.tensor([0]), label=torch.zeros(1)))
    (grad,) = torch.autograd.grad(3 * out.loss, theta)
    torch.testing.assert_close(grad, 2 * torch.sigmoid(0.3 * (p.log() - (1 - p).log())))
    assert (grad.diff() > 0).all()


def one_token_with_the_reference_is_npo(cls):
    theta = torch.tensor([[-1.0], [-3.0]], dtype=torch.float64)
    ref = torch.tensor([[-2.0], [-2.5]], dtype=torch.float64)
    scores = Scores.tokens(theta, ref, mask=torch.ones(2, 1).bool())
    items = Items(index=torch.arange(2), label=torch.zeros(2))
    npo = losses.find("npo")(beta=0.3, retain="none")(scores, items).per_item
    torch.testing.assert_close(cls(beta=0.3, calibrator="reference")(scores, items).per_item, npo)
    assert cls(calibrator="reference").reads_reference()
    assert not cls().reads_reference()


def released_averages_count_every_position(make, name):
    def identity(cls):
        scores, layout, stats = tokens_batch(44, 0.7)
        items = replace(layout.items, weight=1.0, label=torch.zeros(7))
        out = make(cls, positions="all")(scores, items, stats)
        torch.testing.assert_close(out.loss, scores.vocabulary[name][items.index].mean())

    return identity


def skipping_everything_leaves_nothing(cls):
    scores, layout, _ = tokens_batch(45)
    items = replace(layout.items, label=torch.zeros(7))
    assert cls(skip_first=9)(scores, items).loss == 0
    more = cls(skip_first=0)(scores, replace(items, weight=1.0)).loss
    mask = scores.units.mask[items.index]
    torch.testing.assert_close(more, scores.vocabulary["ce_u"][items.index][mask].mean())


def swapping_the_distributions_turns_the_sign(cls):
    scores, layout, _ = tokens_batch(46)
    v = scores.vocabulary
    swapped = replace(scores, vocabulary={**v, "dipo_forget": v["dipo_memory"], "dipo_memory": v["dipo_forget"]})
    items = Items(index=layout.items.index, label=torch.zeros(7))
    one, other = cls(beta=0.1)(scores, items).per_item, cls(beta=0.1)(swapped, items).per_item
    z = 0.1 * ((v["dipo_forget"] - v["dipo_memory"]) * scores.units.mask).sum(1)[items.index]
    torch.testing.assert_close(other - one, z)


def the_multiplier_rises_and_falls_with_the_violation(cls):
    scores, layout, _ = tokens_batch(47)
    items = layout.items
    retained = -scores.theta[items.index[items.label == 1]].sum() / scores.length[items.index[items.label == 1]].sum()
    for bound, step in ((0.0, 0.5), (2 * retained.item(), 100.0)):
        estimator = cls(alpha=0.3, retain_bound=bound, dual_step_size=step).estimator()
        torch.testing.assert_close(estimator.update(scores, layout)["dual"], torch.tensor(0.3))
        expected = max(0.0, 0.3 + step * (retained.item() - bound))
        torch.testing.assert_close(estimator.update(scores, layout)["dual"].item(), expected, rtol=1e-6, atol=1e-6)


def the_multiplier_waits_and_is_stored(cls):
    scores, layout, _ = tokens_batch(48)
    estimator = cls(dual_warmup=2).estimator()
    values = [estimator.update(scores, layout)["dual"].item() for _ in range(4)]
    assert values[:3] == [1.0, 1.0, 1.0]
    assert values[3] > 1
    other = cls(dual_warmup=2).estimator()
    other.load_state_dict(estimator.state_dict())
    torch.testing.assert_close(other.update(scores, layout)["dual"], estimator.update(scores, layout)["dual"])


def the_multiplier_is_the_same_on_two_processes(cls):
    """Two halves with gathered sums move it as the whole does."""
    scores, layout, _ = tokens_batch(49)
    items = layout.items
    whole = cls().estimator()
    whole.update(scores, layout)
    halves = [Layout(items=Items(index=items.index[p], label=items.label[p])) for p in (slice(0, 2), slice(2, 7))]
    sent = []
    cls().estimator().update(scores, halves[0], gather=lambda x: sent.append(x) or x)
    second = cls().estimator()
    second.update(scores, halves[1], gather=lambda x: torch.cat([x, sent[0]]))
    torch.testing.assert_close(second.value, whole.value)


def it_needs_its_multiplier(cls):
    scores, layout, _ = tokens_batch(50)
    with pytest.raises(ValueError, match="multiplier"):
        cls()(scores, layout, {})
    with pytest.raises(ValueError, match="constrains the retain loss"):
        cls(retain="none")


P = 0.8
CASES = [
    Case(
        objective=WGA,
        make=lambda cls: cls(beta=1.5, alpha=0.5),
        batch=tokens_batch,
        formula=formula(wga_unit(1.5), alpha=0.5),
        start=Start(P**1.5 * math.log(P), [P**1.5], start(P)),
        identities=[
            power_zero_is_gradient_ascent(lambda cls: cls(beta=0.0)),
            micro_batches_add_up(lambda cls: cls()),
        ],
        mutations=[
            ("logp.detach()).exp() * logp", "logp).exp() * logp"),
            ("exp() * logp", "exp() * -logp"),
            ("self.beta * logp.detach()", "logp.detach()"),
        ],
    ),
    Case(
        objective=SatImp,
        make=lambda cls: cls(beta1=3.0, beta2=2.0),
        batch=tokens_batch,
        formula=formula(satimp_unit, gamma=0.1),
        start=Start(0.1 * P**3 * 0.04 * math.log(P), [0.1 * P**3 * 0.04], start(P)),
        identities=[
            satimp_with_one_factor_is_wga,
            certain_tokens_have_weight_zero,
            power_zero_is_gradient_ascent(lambda cls: cls(gamma=1.0, beta1=0.0, beta2=0.0)),
        ],
        mutations=[
            ("weight * logp, scores", "-weight * logp, scores"),
            ("-fixed.expm1()", "fixed.exp()"),
            ("fixed = logp.detach()", "fixed = logp"),
            ("gamma: float = 0.1", "gamma: float = 1.0"),
        ],
    ),
    Case(
        objective=CATNIP,
        make=lambda cls: cls(beta=0.3),
        batch=tokens_batch,
        formula=formula(catnip_unit("confidence"), retain=False),
        start=Start(2 / 0.3 * math.log1p(4**0.3), [2 * 4**0.3 / (1 + 4**0.3)], start(P)),
        identities=[slope_grows_with_confidence],
        mutations=[
            ("log1mexp(logp.detach())", "log1mexp(logp)"),
            ("-2 / self.beta * logsigmoid", "-1 / self.beta * logsigmoid"),
            ("logsigmoid(-self.beta * gap)", "logsigmoid(self.beta * gap)"),
        ],
    ),
    Case(
        name="catnip with the reference",
        objective=CATNIP,
        make=lambda cls: cls(beta=0.3, calibrator="reference"),
        batch=tokens_batch,
        formula=formula(catnip_unit("reference"), retain=False),
        start=Start(2 / 0.3 * math.log(2), [1.0], start(P)),
        identities=[one_token_with_the_reference_is_npo],
        mutations=[("gap = unit_log_ratio(units)", "gap = logp")],
    ),
    Case(
        name="catnip with a constant",
        objective=CATNIP,
        make=lambda cls: cls(beta=0.3, calibrator="constant", delta=-0.7),
        batch=tokens_batch,
        formula=formula(catnip_unit("constant"), retain=False),
        start=Start(2 / 0.3 * math.log(2), [1.0], start(math.exp(-0.7))),
        identities=[one_token_with_the_reference_is_npo],
        mutations=[("logp - self.delta", "logp + self.delta")],
    ),
    Case(
        objective=CEU,
        make=lambda cls: cls(retain="nll", alpha=0.5),
        batch=tokens_batch,
        formula=formula(statistic("ce_u"), alpha=0.5, skip=1),
        start=Start(0.25, [0.0], start(P, statistic=0.25)),
        identities=[
            gradients_through(
                lambda cls: cls(retain="nll", alpha=0.7), formula(statistic("ce_u"), alpha=0.7, skip=1), "ce_u"
            ),
            declares(lambda cls: cls(), "ce_u"),
            skipping_everything_leaves_nothing,
            micro_batches_add_up(lambda cls: cls(retain="nll")),
        ],
        mutations=[
            ("cumsum(1) > self.skip_first", "cumsum(1) >= self.skip_first"),
            ("sums = masked_sum(", "sums = -masked_sum("),
            ("side.without(self.skip_first)", "side"),
            ('Literal["nll", "kl", "none"] = "none"', 'Literal["nll", "kl", "none"] = "kl"'),
        ],
    ),
    Case(
        objective=UNDIAL,
        make=lambda cls: cls(retain="nll", alpha=0.5),
        batch=tokens_batch,
        formula=formula(statistic("undial"), alpha=0.5),
        start=Start(0.25, [0.0], start(P, statistic=0.25)),
        identities=[
            gradients_through(
                lambda cls: cls(retain="nll", alpha=0.7), formula(statistic("undial"), alpha=0.7), "undial"
            ),
            declares(lambda cls: cls(retain="kl"), "undial", "kl_ref_theta"),
            released_averages_count_every_position(lambda cls, **more: cls(**more), "undial"),
        ],
        mutations=[
            ('scores.need_vocabulary("undial"), scores', '-scores.need_vocabulary("undial"), scores'),
            ('scores.need_vocabulary("undial"), scores', '2 * scores.need_vocabulary("undial"), scores'),
            ('return {"undial": partial', 'return {"und": partial'),
        ],
    ),
    Case(
        objective=DiPO,
        make=lambda cls: cls(beta=0.1),
        batch=tokens_batch,
        formula=dipo_formula,
        start=Start(math.log(2), [0.0], start(P)),
        identities=[
            gradients_through(lambda cls: cls(beta=0.1), dipo_formula, "dipo_forget", "dipo_memory"),
            declares(lambda cls: cls(), "dipo_forget", "dipo_memory"),
            swapping_the_distributions_turns_the_sign,
        ],
        mutations=[
            ('"dipo_forget") - scores', '"dipo_forget") + scores'),
            ("self.beta_for(scores.kind) * masked", "2 * self.beta_for(scores.kind) * masked"),
            ("return -logsigmoid(", "return logsigmoid("),
        ],
    ),
    Case(
        objective=PDU,
        make=lambda cls: cls(retain_bound=0.4),
        batch=lambda seed: tokens_batch(seed, 0.7),
        formula=formula(statistic("pdu"), bound=0.4),
        start=Start(0.25, [0.0], start(P, statistic=0.25, dual=0.7)),
        identities=[
            gradients_through(lambda cls: cls(), formula(statistic("pdu")), "pdu"),
            declares(lambda cls: cls(), "pdu"),
            released_averages_count_every_position(lambda cls, **more: cls(**more), "pdu"),
            the_multiplier_rises_and_falls_with_the_violation,
            the_multiplier_waits_and_is_stored,
            the_multiplier_is_the_same_on_two_processes,
            it_needs_its_multiplier,
        ],
        mutations=[
            ("- self.retain_bound", "+ self.retain_bound"),
            ('return stats["dual"].detach()', 'return -stats["dual"].detach()'),
            ("self.value + self.objective.dual_step_size", "self.value - self.objective.dual_step_size"),
            ("max(0.0, self.value", "max(-99.0, self.value"),
            ("self.updates > self", "self.updates >= self"),
            ("return scores.length[rows].sum()", "return scores.length[rows].sum() * 0 + 1"),
        ],
    ),
]
