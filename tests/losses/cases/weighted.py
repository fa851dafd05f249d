"""Cases of `diffalign.losses.weighted`."""

import math
from dataclasses import replace

import pytest
import torch
from loss_cases import Case, Start, at_start, row_scores
from torch.nn.functional import relu, softplus

from diffalign import losses
from diffalign.losses import Items, Kind, Layout, Pairs
from diffalign.losses.weighted import (
    CREAM,
    MADPO,
    MAPL,
    MODPO,
    POWER,
    POWERDL,
    BetaDPO,
    DynamicLabelDPO,
    SimulPL,
    SPODegree,
    VerifierDPO,
)

ALL = (Kind.TOKEN, Kind.STEP, Kind.BOUND)
LOGISTIC = ("links.logistic(z", "links.logistic(-z")


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def pairs_batch(seed, rewards=1, **stats):
    """4 pairs with rewards, soft labels, weights and margins."""
    g = torch.Generator().manual_seed(seed + 300)
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    pairs = Pairs.halves(
        4,
        p=0.6 + 0.4 * rand(4),
        weight=0.5 + rand(4),
        margin=0.3 * rand(4),
        reward_w=3 * rand(4, rewards),
        reward_l=3 * rand(4, rewards),
        uid=torch.tensor([7, 3, 900, 12]),
    )
    return row_scores(8, seed), Layout(pairs=pairs), stats


def with_stats(**stats):
    return lambda seed: pairs_batch(seed, **stats)


def start_batch(length=(10, 20), stats=None, **more):
    return lambda: (at_start(2, length=length), Layout(pairs=Pairs.halves(1, **more)), stats or {})


def delta(batch):
    scores, layout, _ = batch
    d = scores.theta - scores.ref
    return d[layout.pairs.w] - d[layout.pairs.l], layout.pairs


def logistic(z, p):
    return p * softplus(-z) + (1 - p) * softplus(z)


def dpo(scores, layout, beta=0.1):
    return losses.DPO(beta=beta)(scores, layout).per_item


# -- margins ---------------------------------------------------------------------------------------------------------


def modpo_formula(link):
    def formula(batch, frozen):
        d, pairs = delta(batch)
        gap = pairs.reward_w - pairs.reward_l
        z = (0.1 * d - 0.3 * gap[:, 0] - 0.2 * gap[:, 1]) / 0.5 - pairs.margin
        cost = logistic if link == "logistic" else lambda z, p: p * relu(1 - z) + (1 - p) * relu(1 + z)
        return pairs.weight * cost(z, pairs.p)

    return formula


def two_rewards(**more):
    return lambda cls: cls(beta=0.1, weights=(0.5, 0.3, 0.2), **more)


def modpo_is_dpo_with_a_margin(cls):
    scores, layout, _ = pairs_batch(3)
    pairs = layout.pairs
    gap = (pairs.reward_w - pairs.reward_l)[:, 0]
    margined = replace(layout, pairs=replace(pairs, margin=gap * 0.4 / 0.6))
    mine = cls(beta=0.1, weights=(0.6, 0.4))(scores, replace(layout, pairs=replace(pairs, margin=0.0)))
    torch.testing.assert_close(mine.per_item, dpo(scores, margined, beta=0.1 / 0.6))


def its_minimiser_adds_up_the_rewards(cls):
    """Implicit rewards equal to the scalarised rewards give the logit of the first objective alone."""
    r = torch.tensor([[1.3, -0.4], [0.2, 0.9]], dtype=torch.float64)  # two objectives of two responses
    theta = ((0.5 * r[:, 0] + 0.5 * r[:, 1]) / 0.1).requires_grad_()
    pairs = Pairs.halves(1, reward_w=r[:1, 1:], reward_l=r[1:, 1:], p=torch.sigmoid(r[:1, 0] - r[1:, 0]))
    loss = cls(beta=0.1, weights=(0.5, 0.5))(losses.Scores.tokens(theta, torch.zeros(2)), pairs).loss
    (grad,) = torch.autograd.grad(loss, theta)
    torch.testing.assert_close(grad, torch.zeros(2, dtype=torch.float64))


def rewards_are_counted(cls):
    scores, layout, _ = pairs_batch(3)
    with pytest.raises(ValueError, match="1 margin rewards"):
        cls(weights=(0.5, 0.25, 0.25))(scores, layout)
    with pytest.raises(ValueError, match="reward_w"):
        cls()(scores, Pairs.halves(4))


def simulpl_formula(batch, frozen):
    d, pairs = delta(batch)
    z = 0.1 * d - pairs.margin + 0.7 * (pairs.reward_w - pairs.reward_l)[:, 0]
    return pairs.weight * logistic(z, pairs.p)


def latency_is_modpo_with_minus_latency(cls):
    """beta and margin of weights (w_1, w_2): beta / w_1 and w_2 / w_1."""
    scores, layout, _ = pairs_batch(4)
    pairs = replace(layout.pairs, reward_w=-layout.pairs.reward_w, reward_l=-layout.pairs.reward_l)
    torch.testing.assert_close(
        cls(beta=0.2, latency_weight=1.0)(scores, layout).per_item,
        MODPO(beta=0.1, weights=(0.5, 0.5))(scores, pairs).per_item,
    )


def temperatures_divide_the_other_rewards(cls):
    scores, layout, _ = pairs_batch(3, rewards=2)
    pairs = layout.pairs
    scale = torch.tensor([0.5, 4.0], dtype=torch.float64)
    scaled = replace(layout, pairs=replace(pairs, reward_w=pairs.reward_w / scale, reward_l=pairs.reward_l / scale))
    loss = cls(beta=0.1, weights=(0.5, 0.2, 0.3), temperatures=(0.5, 4.0))
    plain = cls(beta=0.1, weights=(0.5, 0.2, 0.3))
    torch.testing.assert_close(loss(scores, layout).per_item, plain(scores, scaled).per_item)
    assert not torch.allclose(loss(scores, layout).per_item, plain(scores, layout).per_item)
    with pytest.raises(ValueError, match="one for each weight but the first"):
        cls(weights=(0.5, 0.5), temperatures=(1.0, 1.0))


# -- weights ---------------------------------------------------------------------------------------------------------


def weighed_formula(weight):
    def formula(batch, frozen):
        d, pairs = delta(batch)
        return weight(pairs) * logistic(0.1 * d - pairs.margin, pairs.p)

    return formula


def weight_one_is_dpo(cls):
    scores, layout, _ = pairs_batch(5)
    one = replace(layout, pairs=replace(layout.pairs, weight=torch.ones(4, dtype=torch.float64)))
    torch.testing.assert_close(cls(beta=0.1)(scores, one).per_item, dpo(scores, one))


def weights_must_be_given(cls):
    with pytest.raises(ValueError, match="verifier"):
        cls(beta=0.1)(row_scores(2), Pairs.halves(1))


def a_weighted_mean_ignores_the_size_of_weights(cls):
    scores, layout, _ = pairs_batch(6)
    larger = replace(layout, pairs=replace(layout.pairs, weight=7 * layout.pairs.weight))
    loss = cls(beta=0.1, weight_reduction="weighted_mean")
    torch.testing.assert_close(loss(scores, larger).loss, loss(scores, layout).loss)
    pairs = layout.pairs
    plain = dpo(scores, replace(pairs, weight=1.0))
    torch.testing.assert_close(loss(scores, layout).loss, (plain * pairs.weight).sum() / pairs.weight.sum())


def madpo_weight(pairs):
    h = (pairs.reward_w - pairs.reward_l)[:, 0]
    return pairs.weight * (2 / (1 + torch.exp((h - 0.2) / 0.5))).clamp(0.3, 1.6)


def hard_pairs_weigh_more(cls):
    h = torch.linspace(-5, 5, 41)
    weight = cls().weight(h)
    assert (weight.diff() <= 0).all()
    assert ((weight > 1) == (h < 0)).all()
    assert weight.min() >= 0.1
    assert weight.max() <= 2.0
    torch.testing.assert_close(cls().weight(torch.zeros(1)), torch.ones(1))


def equal_rewards_are_dpo(cls):
    scores, layout, _ = pairs_batch(3)
    even = replace(layout, pairs=replace(layout.pairs, reward_l=layout.pairs.reward_w))
    torch.testing.assert_close(cls(beta=0.1)(scores, even).per_item, losses.DPO(beta=0.1)(scores, even).per_item)


# -- beta of the batch -----------------------------------------------------------------------------------------------

BETA_STATS = {
    "mean": tensor(0.5).squeeze(),
    "std": tensor(2.0).squeeze(),
    "kept_mean": tensor(1.7).squeeze(),
    "keep": tensor(1.25, 0.0, 1.25, 1.25),
}


def beta_formula(beta_b):
    def formula(batch, frozen):
        d, pairs = delta(batch)
        keep = torch.tensor([1.25, 0.0, 1.25, 1.25], dtype=torch.float64)
        return pairs.weight * keep * logistic(beta_b * d - pairs.margin, pairs.p)

    return formula


RESTING = {"mean": tensor(0.0)[0], "std": tensor(1.0)[0], "kept_mean": tensor(0.0)[0], "keep": tensor(1.0)}


def an_average_batch_is_dpo(cls):
    scores, layout, _ = pairs_batch(7)
    stats = BETA_STATS | {"kept_mean": BETA_STATS["mean"], "keep": torch.ones(4)}
    torch.testing.assert_close(cls(beta=0.1)(scores, layout, stats).per_item, dpo(scores, layout))


def beta_never_reaches_zero(cls):
    scores, layout, _ = pairs_batch(7)
    stats = BETA_STATS | {"kept_mean": torch.tensor(-1e6)}
    out = cls(beta=0.1)(scores, layout, stats)
    torch.testing.assert_close(out.metrics["beta"], tensor(1e-3))


# -- labels ----------------------------------------------------------------------------------------------------------

LABELS = {"p": tensor(0.9, 0.4, 0.75, 1.0)}


def dynamic_formula(batch, frozen):
    d, pairs = delta(batch)
    return pairs.weight * logistic(0.1 * d - pairs.margin, LABELS["p"])


def power_logit(scores, pairs, one=False):
    w = torch.ones_like(scores.theta) if one else 1 / scores.length
    score = w * scores.theta
    return 0.5 * (score[pairs.w] - score[pairs.l] + w[pairs.w] - w[pairs.l]) - pairs.margin, w


def power_formula(labels=None, one=False):
    def formula(batch, frozen):
        scores, layout, _ = batch
        pairs = layout.pairs
        z, w = power_logit(scores, pairs, one)
        p = pairs.p if labels is None else labels
        return pairs.weight * (logistic(z, p) - 0.3 * 0.5 * (w * scores.theta)[pairs.w])

    return formula


def the_label_of_the_model_has_no_gradient(make):
    """p = sigma(z) is where dynamic labels rest."""

    def identity(cls):
        scores, layout, _ = pairs_batch(8)
        loss = make(cls)
        p = loss.logit(scores, layout.pairs).sigmoid()
        (grad,) = torch.autograd.grad(loss(scores, layout, {"p": p}).loss, scores.theta)
        torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-12, rtol=0)

    return identity


def labels_at_rate(make):
    """First visit from p = 1, second from there; rate 0 is the clean label."""

    def identity(cls):
        scores, layout, _ = pairs_batch(9)
        loss = make(cls, 0.25)
        win = loss.logit(scores, layout.pairs).sigmoid().detach()
        estimator = loss.estimator()
        first = estimator.update(scores, layout)["p"]
        torch.testing.assert_close(first, 0.75 + 0.25 * win)
        torch.testing.assert_close(estimator.update(scores, layout)["p"], 0.75 * first + 0.25 * win)
        clean = make(cls, 0.0).estimator().update(scores, layout)
        torch.testing.assert_close(clean["p"], torch.ones(4, dtype=torch.float64))

    return identity


def one_is_cpo_with_imitation_by_eta_beta(cls):
    scores, layout, _ = pairs_batch(10)
    pairs = replace(layout.pairs, weight=1.0, margin=0.0)
    mine = cls(beta=0.5, eta=0.3, weighting="one")(scores, pairs).per_item
    s_w, s_l = scores.theta[pairs.w], scores.theta[pairs.l]
    torch.testing.assert_close(mine, logistic(0.5 * (s_w - s_l), pairs.p) - 0.15 * s_w)


def equal_lengths_are_normalised_scores(cls):
    scores, layout, _ = pairs_batch(11)
    same = replace(scores, length=torch.full((8,), 4.0, dtype=torch.float64))
    plain = cls(beta=0.5, eta=0.0)(same, layout).per_item
    eighth = cls(beta=0.125, eta=0.0, weighting="one")(same, layout).per_item
    torch.testing.assert_close(plain, eighth)


def power_dl_at_clean_labels_is_power(cls):
    scores, layout, _ = pairs_batch(12)
    pairs = replace(layout.pairs, p=1.0)
    torch.testing.assert_close(
        cls(beta=0.5, eta=0.3, rate=0.1)(scores, layout, {"p": torch.ones(4)}).per_item,
        POWER(beta=0.5, eta=0.3)(scores, pairs).per_item,
    )


def consistency_is_conservative_smoothing(cls):
    scores, layout, _ = pairs_batch(13)
    pairs = replace(layout.pairs, p=torch.full((4,), 0.8, dtype=torch.float64))
    smoothed = losses.DPO(beta=0.1, label_smoothing=0.2)(scores, replace(pairs, p=1.0))
    torch.testing.assert_close(cls(beta=0.1)(scores, pairs).per_item, smoothed.per_item)


def full_disagreement_turns_the_pair_round(cls):
    scores, layout, _ = pairs_batch(13)
    pairs = replace(layout.pairs, p=torch.zeros(4), margin=0.0)
    turned = Pairs(w=pairs.l, l=pairs.w, weight=pairs.weight)
    torch.testing.assert_close(cls(beta=0.1)(scores, pairs).per_item, dpo(scores, turned))


def consistency_must_be_given(cls):
    with pytest.raises(ValueError, match="consistency"):
        cls(beta=0.1)(row_scores(2), Pairs.halves(1))


# -- several terms ---------------------------------------------------------------------------------------------------


def degree_batch(seed):
    scores, layout, _ = pairs_batch(seed)
    extra = {"degree_loss": torch.linspace(0.2, 1.4, 8, dtype=torch.float64)}
    return replace(scores, extra=extra), replace(layout, items=Items(index=torch.tensor([1, 5, 6]))), {}


def degree_formula(batch, frozen):
    d, pairs = delta(batch)
    term = batch[0].extra["degree_loss"]
    return pairs.weight * logistic(0.1 * d - pairs.margin, pairs.p) + 0.4 * (term[1] + term[5] + term[6]) / 3


def degree_start():
    scores, layout, _ = start_batch()()
    scores = replace(scores, extra={"degree_loss": tensor(0.5, 1.5)})
    return scores, replace(layout, items=Items(index=torch.tensor([0, 1]))), {}


def the_head_gets_its_gradient(cls):
    scores, layout, _ = degree_batch(3)
    term = scores.extra["degree_loss"].requires_grad_()
    (grad,) = torch.autograd.grad(cls(beta=0.1, degree_weight=0.4)(scores, layout).loss, term)
    expected = torch.zeros(8, dtype=torch.float64)
    expected[layout.items.index] = 0.4 / 3
    torch.testing.assert_close(grad, expected)


def the_head_is_asked_for(cls):
    scores, layout, _ = degree_batch(3)
    with pytest.raises(ValueError, match="degree_loss"):
        cls(beta=0.1, degree_weight=0.4)(replace(scores, extra={}), layout)


def mapl_batch(seed):
    scores, layout, _ = pairs_batch(seed)
    conditions = Pairs(w=torch.tensor([0, 1, 2]), l=torch.tensor([5, 4, 7]), weight=tensor(0.5, 1.0, 2.0))
    return scores, replace(layout, conditions=conditions), {}


def mapl_formula(batch, frozen):
    d, pairs = delta(batch)
    conditions = batch[1].conditions
    rho = batch[0].theta - batch[0].ref
    between = conditions.weight * softplus(-0.1 * (rho[conditions.w] - rho[conditions.l]))
    return pairs.weight * logistic(0.1 * d - pairs.margin, pairs.p) + 0.4 * between.sum() / 3


def the_same_pairs_twice_count_one_plus_weight(cls):
    scores, layout, _ = pairs_batch(14)
    twice = replace(layout, conditions=layout.pairs)
    torch.testing.assert_close(
        cls(beta=0.1, condition_weight=0.4)(scores, twice).loss, 1.4 * dpo(scores, layout).mean()
    )


def conditions_are_asked_for(cls):
    scores, layout, _ = pairs_batch(14)
    with pytest.raises(ValueError, match="conditions"):
        cls(beta=0.1, condition_weight=0.4)(scores, layout)


ONE = {"reward_w": torch.tensor([1.0]), "reward_l": torch.tensor([1.0])}
REWARD_2 = {"reward_w": torch.tensor([[1.0, 2.0]]), "reward_l": torch.tensor([[1.0, 2.0]])}

CASES = [
    Case(
        objective=MODPO,
        make=two_rewards(),
        batch=with_stats(rewards=2),
        formula=modpo_formula("logistic"),
        start=Start(math.log(2), [-0.1, 0.1], start_batch(**REWARD_2)),
        identities=[
            modpo_is_dpo_with_a_margin,
            its_minimiser_adds_up_the_rewards,
            rewards_are_counted,
            temperatures_divide_the_other_rewards,
        ],
        mutations=[
            ("- margin) / first", "+ margin) / first"),
            ("- margin) / first", "- margin)"),
            ("(reward_w - reward_l) @", "0.5 * (reward_w - reward_l) @"),
            ("w / t for w, t", "w * t for w, t"),
        ],
        kinds=(Kind.TOKEN, Kind.STEP, Kind.BOUND),
    ),
    Case(
        name="modpo with hinge",
        objective=MODPO,
        make=two_rewards(mode="hinge"),
        batch=with_stats(rewards=2),
        formula=modpo_formula("hinge"),
        start=Start(1.0, [-0.2, 0.2], start_batch(**REWARD_2)),
        identities=[rewards_are_counted],
        mutations=[("links.hinge(z, p)", "links.logistic(z, p)")],
        kinds=ALL,
    ),
    Case(
        objective=SimulPL,
        make=lambda cls: cls(beta=0.1, latency_weight=0.7),
        batch=pairs_batch,
        formula=simulpl_formula,
        start=Start(math.log(2), [-0.05, 0.05], start_batch(**ONE)),
        identities=[latency_is_modpo_with_minus_latency],
        mutations=[
            ("pairs.margin - self.latency_weight", "pairs.margin + self.latency_weight"),
            ("self.latency_weight * (latency_w", "(latency_w"),
        ],
        kinds=ALL,
    ),
    Case(
        objective=VerifierDPO,
        make=lambda cls: cls(beta=0.1),
        batch=pairs_batch,
        formula=weighed_formula(lambda pairs: pairs.weight),
        start=Start(3 * math.log(2), [-0.15, 0.15], start_batch(weight=torch.tensor([3.0]))),
        identities=[weight_one_is_dpo, weights_must_be_given, a_weighted_mean_ignores_the_size_of_weights],
        mutations=[
            ("pairs=replace(pairs, weight=weight)", "pairs=replace(pairs, weight=-weight)"),
            ("pairs=replace(pairs, weight=weight)", "pairs=replace(pairs, weight=2 * weight)"),
            ("self.weight_reduction)", '"mean")'),
        ],
        kinds=ALL,
    ),
    Case(
        objective=MADPO,
        make=lambda cls: cls(beta=0.1, center=0.2, temperature=0.5, low=0.3, high=1.6),
        batch=pairs_batch,
        formula=weighed_formula(madpo_weight),
        start=Start(
            math.log(2), [-0.05, 0.05], start_batch(reward_w=torch.tensor([0.7]), reward_l=torch.tensor([0.5]))
        ),
        identities=[hard_pairs_weigh_more, equal_rewards_are_dpo],
        mutations=[
            ("-(h - self.center)", "(h - self.center)"),
            ("(2 * (-(h", "((-(h"),
            ("(h - self.center) / self.temperature", "(h - self.center)"),
            ("weight=pairs.weight * weight", "weight=weight"),
            (".clamp(self.low, self.high)", ""),
        ],
        kinds=ALL,
    ),
    Case(
        objective=BetaDPO,
        make=lambda cls: cls(beta=0.1, sensitivity=0.5),
        batch=with_stats(**BETA_STATS),
        formula=beta_formula(0.1 * (1 + 0.5 * 1.2)),
        start=Start(math.log(2), [-0.05, 0.05], start_batch(stats=RESTING)),
        identities=[an_average_batch_is_dpo, beta_never_reaches_zero],
        mutations=[
            ("1 + self.sensitivity", "1 - self.sensitivity"),
            ("self.sensitivity * unit * away", "2 * self.sensitivity * unit * away"),
            ("pairs.weight * keep * self.link", "pairs.weight * self.link"),
            ("pairs.weight * keep", "keep"),
            (".clamp(min=1e-3)", ""),
        ],
        kinds=(Kind.TOKEN, Kind.STEP),
    ),
    Case(
        name="beta_dpo in units of z",
        objective=BetaDPO,
        make=lambda cls: cls(beta=0.1, sensitivity=0.5, delta_unit="z"),
        batch=with_stats(**BETA_STATS),
        formula=beta_formula(0.1 * (1 + 0.5 * 0.1 * 1.2)),
        start=Start(math.log(2), [-0.05, 0.05], start_batch(stats=RESTING)),
        identities=[an_average_batch_is_dpo],
        mutations=[('beta if self.delta_unit == "z" else 1.0', "1.0")],
        kinds=ALL,
    ),
    Case(
        objective=DynamicLabelDPO,
        make=lambda cls: cls(beta=0.1, rate=0.25),
        batch=with_stats(**LABELS),
        formula=dynamic_formula,
        start=Start(math.log(2), [-0.025, 0.025], start_batch(stats={"p": torch.tensor([0.75])})),
        identities=[
            the_label_of_the_model_has_no_gradient(lambda cls: cls(beta=0.1, rate=0.25)),
            labels_at_rate(lambda cls, rate: cls(beta=0.1, rate=rate)),
        ],
        mutations=[
            ("replace(layout.need_pairs(), p=p)", "replace(layout.need_pairs(), p=1 - p)"),
            ("replace(layout.need_pairs(), p=p)", "layout.need_pairs()"),
            ("beta * (w - l) - self.target_margin", "2 * beta * (w - l) - self.target_margin"),
        ],
        kinds=ALL,
    ),
    Case(
        objective=POWER,
        make=lambda cls: cls(beta=0.5, eta=0.3),
        batch=pairs_batch,
        formula=power_formula(),
        # Rows of -7 with lengths 10 and 20: z = (-0.7 + 0.35 + 0.1 - 0.05) / 2 = -0.15; sigma(0.15) = 0.5374298.
        start=Start(
            math.log1p(math.exp(0.15)) + 0.15 * 0.7, [-0.05 * 0.5374298 - 0.015, 0.025 * 0.5374298], start_batch()
        ),
        identities=[one_is_cpo_with_imitation_by_eta_beta, equal_lengths_are_normalised_scores],
        mutations=[
            ("imitation = -self.row_weight", "imitation = self.row_weight"),
            ("self.eta * self.beta_for(scores.kind)", "self.eta"),
            ("(scores.theta + 1)", "scores.theta"),
            ("(scores.theta + 1)", "(scores.theta - 1)"),
            ("1 / scores.need_length()", "2 / scores.need_length()"),
        ],
        kinds=(Kind.TOKEN,),
    ),
    Case(
        name="power without lengths",
        objective=POWER,
        make=lambda cls: cls(beta=0.5, eta=0.3, weighting="one"),
        batch=pairs_batch,
        formula=power_formula(one=True),
        start=Start(math.log(2) + 0.15 * 7, [-0.25 - 0.15, 0.25], start_batch()),
        identities=[one_is_cpo_with_imitation_by_eta_beta],
        mutations=[("torch.ones_like(scores.theta)", "torch.full_like(scores.theta, 2)")],
        kinds=(Kind.TOKEN, Kind.STEP),
    ),
    Case(
        objective=POWERDL,
        make=lambda cls: cls(beta=0.5, eta=0.3, rate=0.25),
        batch=with_stats(**LABELS),
        formula=power_formula(LABELS["p"]),
        start=Start(
            0.75 * math.log1p(math.exp(0.15)) + 0.25 * math.log1p(math.exp(-0.15)) + 0.15 * 0.7,
            [0.05 * (0.4625702 - 0.75) - 0.015, -0.025 * (0.4625702 - 0.75)],
            start_batch(stats={"p": torch.tensor([0.75])}),
        ),
        identities=[
            power_dl_at_clean_labels_is_power,
            the_label_of_the_model_has_no_gradient(lambda cls: cls(beta=0.5, eta=0.0, rate=0.25)),
            labels_at_rate(lambda cls, rate: cls(beta=0.5, eta=0.0, rate=rate)),
        ],
        mutations=[
            ("replace(layout.need_pairs(), p=p)", "replace(layout.need_pairs(), p=1 - p)"),
            ("self.eta * self.beta_for", "2 * self.eta * self.beta_for"),
        ],
        kinds=(Kind.TOKEN,),
    ),
    Case(
        objective=CREAM,
        make=lambda cls: cls(beta=0.1),
        batch=pairs_batch,
        formula=weighed_formula(lambda pairs: pairs.weight),
        start=Start(math.log(2), [-0.03, 0.03], start_batch(p=torch.tensor([0.8]))),
        identities=[
            consistency_is_conservative_smoothing,
            full_disagreement_turns_the_pair_round,
            consistency_must_be_given,
        ],
        mutations=[
            (
                "super().__call__(scores, layout, stats)",
                "super().__call__(scores, replace(pairs, p=1 - pairs.p), stats)",
            ),
            ("super().__call__(scores, layout, stats)", "super().__call__(scores, replace(pairs, p=1.0), stats)"),
            ("return LossOut(out.per_item,", "return LossOut(2 * out.per_item,"),
        ],
        kinds=ALL,
    ),
    Case(
        objective=SPODegree,
        make=lambda cls: cls(beta=0.1, degree_weight=0.4),
        batch=degree_batch,
        formula=degree_formula,
        start=Start(math.log(2) + 0.4, [-0.05, 0.05], degree_start),
        identities=[the_head_gets_its_gradient, the_head_is_asked_for],
        mutations=[
            ("out.per_item + weight * mean", "out.per_item - weight * mean"),
            ("self.degree_weight, term", "1.0, term"),
            ("mean = term.mean()", "mean = term.sum()"),
            ("[layout.need_items().index]", ""),
        ],
        kinds=ALL,
    ),
    Case(
        objective=MAPL,
        make=lambda cls: cls(beta=0.1, condition_weight=0.4),
        batch=mapl_batch,
        formula=mapl_formula,
        start=Start(
            1.4 * math.log(2),
            [-0.07, 0.07],
            lambda: (at_start(2), Layout(pairs=Pairs.halves(1), conditions=Pairs.halves(1)), {}),
        ),
        identities=[the_same_pairs_twice_count_one_plus_weight, conditions_are_asked_for],
        mutations=[
            ("self.condition_weight, between", "-self.condition_weight, between"),
            ("self.condition_weight, between", "2 * self.condition_weight, between"),
            ("mean = term.mean()", "mean = term.sum()"),
        ],
        kinds=ALL,
    ),
]
