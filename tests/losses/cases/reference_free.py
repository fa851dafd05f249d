"""Cases of `diffalign.losses.reference_free`."""

import math

import torch
from loss_cases import Case, Start, pair_batch
from torch.nn.functional import softplus

from diffalign.losses import Items, Kind, Layout, Pairs, Scores
from diffalign.losses.reference_free import ASFT, CPO, ORPO, TPO, TPOL, AlphaPO, MaPO, SimPO, SLiC

LOG2 = math.log(2)
SAMPLED = (Kind.TOKEN, Kind.STEP)
NO_POINT = "there is no reference to start from"


def batch(seed):
    return pair_batch(seed, ref=False)


def gold_batch(seed):
    """12 rows: 4 chosen, 4 rejected, 4 gold responses of weight one half."""
    _, layout, _ = batch(seed)
    g = torch.Generator().manual_seed(seed + 9)
    theta = (-1 - 20 * torch.rand(12, generator=g, dtype=torch.float64)).requires_grad_()
    length = torch.randint(1, 30, (12,), generator=g)
    items = Items(index=torch.arange(8, 12), weight=0.5)
    return Scores.tokens(theta, length=length), Layout(pairs=layout.pairs, items=items), {}


def logistic(z, pairs, eps=0.0):
    p = pairs.p * (1 - eps) + (1 - pairs.p) * eps
    return p * softplus(-z) + (1 - p) * softplus(z)


def token_mean(scores, rows):
    """Such that its mean over rows is the mean over all their tokens."""
    return -scores.theta[rows] * len(rows) / scores.length[rows].sum()


def sums(scores, pairs):
    return scores.theta[pairs.w] - scores.theta[pairs.l]


def means(scores, pairs):
    mean = scores.theta / scores.length
    return mean[pairs.w] - mean[pairs.l]


def cpo_formula(batch, frozen):
    scores, pairs = batch[0], batch[1].pairs
    contrast = logistic(0.1 * sums(scores, pairs) - pairs.margin, pairs, 0.1)
    return pairs.weight * (contrast + 0.4 * token_mean(scores, pairs.w))


def slic_formula(batch, frozen):
    scores, pairs = batch[0], batch[1].pairs
    z = sums(scores, pairs) - pairs.margin
    hinge = pairs.p * (2 - z).clamp(min=0) + (1 - pairs.p) * (2 + z).clamp(min=0)
    return pairs.weight * (hinge + 0.1 * token_mean(scores, pairs.w))


def tpo_formula(batch, frozen):
    scores, pairs, items = batch[0], batch[1].pairs, batch[1].items
    contrast = pairs.weight * logistic(0.01 * sums(scores, pairs) - pairs.margin, pairs)
    return contrast + 0.8 * 0.5 * token_mean(scores, items.index)


def tpo_l_formula(batch, frozen):
    scores, pairs, items = batch[0], batch[1].pairs, batch[1].items
    contrast = pairs.weight * logistic(2.0 * means(scores, pairs) - 0.5 - pairs.margin, pairs)
    return contrast + 0.5 * token_mean(scores, items.index)


def simpo_formula(batch, frozen):
    scores, pairs = batch[0], batch[1].pairs
    return pairs.weight * logistic(2.5 * means(scores, pairs) - 1.375 - pairs.margin, pairs, 0.1)


def alphapo_formula(batch, frozen):
    scores, pairs = batch[0], batch[1].pairs
    p_mean = (scores.theta / scores.length).exp()
    r = (1 - p_mean**-0.25) / 0.25
    return pairs.weight * logistic(2.5 * (r[pairs.w] - r[pairs.l]) - 0.1 - pairs.margin, pairs)


def swap_changes_the_logistic_by_its_margin(make):
    def identity(cls):
        scores, _, _ = batch(3)
        pairs = Pairs.halves(4)
        one, other = make(cls)(scores, pairs), make(cls)(scores, Pairs(w=pairs.l, l=pairs.w))
        torch.testing.assert_close(other.per_item - one.per_item, one.metrics["rewards/margins"])

    return identity


def imitation_alone(cls):
    """Equal responses leave the imitation term and log 2."""
    theta = torch.tensor([-6.0, -6.0], dtype=torch.float64)
    scores = Scores.tokens(theta, length=torch.tensor([3, 3]))
    torch.testing.assert_close(cls()(scores, Pairs.halves(1)).loss.item(), LOG2 + 2.0)


def reference_free_pairs_of_images_are_refused_or_allowed_on_purpose(cls):
    error = torch.tensor([0.3, 0.2], dtype=torch.float64)
    objective = cls(beta=100.0, imitation_weight=0.0, allow_bound_abs=True)
    objective.check(Kind.BOUND)
    out = objective(Scores.denoising(error), Pairs.halves(1))
    z = 100.0 * -0.5 * (0.3 - 0.2)
    torch.testing.assert_close(out.loss.item(), math.log1p(math.exp(-z)) if cls.name != "slic" else 1 - z)


def simpo_of_equal_lengths_is_cpo(cls):
    scores, layout, _ = pair_batch(2, ref=False, length=torch.full((8,), 10))
    ours = cls(beta=1.0, gamma_beta_ratio=0.0)(scores, layout)
    torch.testing.assert_close(ours.per_item, CPO(beta=0.1, imitation_weight=0.0)(scores, layout).per_item)


def simpo_gamma_is_a_ratio_to_beta(cls):
    """A margin of exactly the ratio, per token, is a logit of zero at any beta."""
    scores = Scores.tokens(torch.tensor([-3.0, -4.0], dtype=torch.float64), length=torch.tensor([10, 10]))
    for beta in (0.5, 10.0):
        out = cls(beta=beta, gamma_beta_ratio=0.1)(scores, Pairs.halves(1))
        torch.testing.assert_close(out.loss.item(), LOG2)


def alphapo_without_bend_is_simpo(cls):
    scores, layout, _ = batch(2)
    simpo = SimPO(beta=2.5, gamma_beta_ratio=0.04)(scores, layout)
    for alpha, tolerance in ((0.0, 1e-12), (1e-8, 1e-6)):
        ours = cls(beta=2.5, alpha=alpha, gamma=0.1)(scores, layout)
        torch.testing.assert_close(ours.per_item, simpo.per_item, rtol=tolerance, atol=0)


def tpo_of_the_chosen_itself_is_cpo(cls):
    scores, _, _ = batch(4)
    pairs = Pairs.halves(4)
    gold = Layout(pairs=pairs, items=Items(index=pairs.w))
    torch.testing.assert_close(cls(beta=0.1)(scores, gold).per_item, CPO(beta=0.1)(scores, pairs).per_item)


def tpo_l_of_the_chosen_itself_is_simpo_with_imitation(cls):
    scores, _, _ = batch(4)
    pairs = Pairs.halves(4)
    gold = Layout(pairs=pairs, items=Items(index=pairs.w))
    simpo = SimPO(beta=2.0, gamma_beta_ratio=0.25, imitation_weight=1.0)
    torch.testing.assert_close(cls(beta=2.0, gamma=0.5)(scores, gold).per_item, simpo(scores, pairs).per_item)


def slic_stops_at_its_margin(cls):
    theta = torch.tensor([-1.0, -4.5], dtype=torch.float64, requires_grad=True)
    out = cls(margin=3.0, imitation_weight=0.0)(Scores.tokens(theta), Pairs.halves(1))
    (grad,) = torch.autograd.grad(out.loss, theta)
    assert out.loss.item() == 0
    assert not grad.any()


# -- odds ------------------------------------------------------------------------------------------------------------


def prompt_batch(seed):
    g = torch.Generator().manual_seed(seed + 3)
    prompt = {
        "prompt_imitation": 5 * torch.rand(8, generator=g, dtype=torch.float64),
        "prompt_length": torch.randint(1, 9, (8,), generator=g),
    }
    return pair_batch(seed, ref=False, **prompt)


def probability(scores):
    return (scores.theta / scores.length).exp()


def orpo_formula(batch, frozen):
    scores, pairs = batch[0], batch[1].pairs
    p = probability(scores)
    o = (p / (1 - p)).log()
    whole = (scores.prompt_imitation - scores.theta)[pairs.w]
    tokens = (scores.length + scores.prompt_length)[pairs.w].sum()
    contrast = logistic(o[pairs.w] - o[pairs.l] - pairs.margin, pairs)
    return pairs.weight * (whole * len(pairs) / tokens + 0.25 * contrast)


def asft_formula(batch, frozen):
    scores, pairs = batch[0], batch[1].pairs
    p = probability(scores)
    o = (p / (1 - p)).log()
    w, l = o[pairs.w] - pairs.margin / 2, o[pairs.l] + pairs.margin / 2
    term = pairs.p * (softplus(-w) + softplus(l)) + (1 - pairs.p) * (softplus(w) + softplus(-l))
    return pairs.weight * (token_mean(scores, pairs.w) + 0.25 * term)


def orpo_is_asft_and_a_coupling(cls):
    scores, _, _ = prompt_batch(5)
    pairs = Pairs.halves(4)
    p = probability(scores)
    w, l = p[pairs.w], p[pairs.l]
    coupling = (w * (1 - l) + l * (1 - w)).log()
    settings = {"odds_weight": 1.0, "imitate_prompt": False}
    ours = {name: obj(**settings)(scores, pairs).per_item for name, obj in (("orpo", ORPO), ("asft", ASFT))}
    ours[cls.name] = cls(**settings)(scores, pairs).per_item
    torch.testing.assert_close(ours["orpo"], ours["asft"] + coupling)


def asft_is_unlikelihood(cls):
    scores, _, _ = batch(6)
    pairs = Pairs.halves(4)
    p = probability(scores)
    unlikelihood = -p[pairs.w].log() - (1 - p[pairs.l]).log()
    ours = cls(odds_weight=1.0)(scores, pairs).per_item - token_mean(scores, pairs.w)
    torch.testing.assert_close(ours, unlikelihood)


# -- MaPO ------------------------------------------------------------------------------------------------------------


def error_batch(seed):
    g = torch.Generator().manual_seed(seed)
    theta = (-0.05 - 0.2 * torch.rand(8, generator=g, dtype=torch.float64)).requires_grad_()
    layout = batch(seed)[1]
    return Scores(kind=Kind.BOUND, theta=theta, error=-2 * theta, imitation=-2 * theta), layout, {}


def mapo_formula(batch, frozen):
    scores, pairs = batch[0], batch[1].pairs
    e = -2 * scores.theta
    f = 0.5 * e / ((0.5 * e).exp() - 1)
    contrast = logistic(20 * (f[pairs.w] - f[pairs.l]) - pairs.margin, pairs)
    return pairs.weight * (e[pairs.w] + 0.1 * contrast)


def mapo_start():
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    return (
        Scores(kind=Kind.BOUND, theta=theta, error=-2 * theta, imitation=-2 * theta),
        Layout(pairs=Pairs.halves(1)),
        {},
    )


def mapo_is_dpo_without_reference_for_small_errors(cls):
    """Slope of the score -T s / 2 in the error, T s = 500 in the score minus one half of the error."""
    error = torch.tensor([1.0e-3, 1.1e-3], dtype=torch.float64)
    out = cls()(Scores.denoising(error), Pairs.halves(1))
    cpo = CPO(beta=500.0, imitation_weight=0.0, allow_bound_abs=True)(Scores.denoising(error), Pairs.halves(1))
    torch.testing.assert_close((out.loss.item() - 1e-3) / 0.1, cpo.loss.item(), rtol=1e-4, atol=0)


def mapo_values(cls):
    """f(0.1), f(1) at s = 1/2, to the digits of the specification."""
    error = torch.tensor([0.1, 1.0], dtype=torch.float64)
    made = cls(train_timesteps=1)(Scores.denoising(error), Pairs.halves(1)).metrics
    torch.testing.assert_close(made["rewards/chosen"].item(), 0.97521, rtol=1e-5, atol=0)
    torch.testing.assert_close(made["rewards/rejected"].item(), 0.77075, rtol=1e-5, atol=0)


CASES = [
    Case(
        objective=CPO,
        make=lambda cls: cls(beta=0.1, label_smoothing=0.1, imitation_weight=0.4),
        batch=batch,
        formula=cpo_formula,
        start=NO_POINT,
        identities=[
            imitation_alone,
            swap_changes_the_logistic_by_its_margin(lambda cls: cls(beta=0.1, imitation_weight=0.0)),
            reference_free_pairs_of_images_are_refused_or_allowed_on_purpose,
        ],
        mutations=[
            ("return scores.theta\n", "return -scores.theta\n"),
            ("return scores.theta\n", "return 2 * scores.theta\n"),
            ("+ self.imitation_weight * imitation", "- self.imitation_weight * imitation"),
            ("+ self.imitation_weight * imitation", "+ imitation"),
            ("return pairs.weight * reduce.imitation", "return reduce.imitation"),
            ("imitation(scores, pairs.w, self", "imitation(scores, pairs.l, self"),
            ("links.logistic(z, smoothed(p, self.label_smoothing))", "links.logistic(z, p)"),
        ],
        kinds=SAMPLED,
    ),
    Case(
        name="cpo on denoising errors, on purpose",
        objective=CPO,
        make=lambda cls: cls(beta=0.1, imitation_weight=0.4, allow_bound_abs=True, imitation_reduction="sequence"),
        batch=error_batch,
        formula=lambda batch, frozen: (
            batch[1].pairs.weight
            * (
                logistic(0.1 * sums(batch[0], batch[1].pairs) - batch[1].pairs.margin, batch[1].pairs)
                - 0.4 * 2 * batch[0].theta[batch[1].pairs.w]
            )
        ),
        start=NO_POINT,
        identities=[reference_free_pairs_of_images_are_refused_or_allowed_on_purpose],
        mutations=[("self.allow_bound_abs and", "not self.allow_bound_abs and")],
        kinds=(*SAMPLED, Kind.BOUND),
    ),
    Case(
        objective=SLiC,
        make=lambda cls: cls(beta=1.0, margin=2.0),
        batch=batch,
        formula=slic_formula,
        start=NO_POINT,
        identities=[slic_stops_at_its_margin, reference_free_pairs_of_images_are_refused_or_allowed_on_purpose],
        mutations=[
            ("links.hinge(z / self.margin", "links.hinge(-z / self.margin"),
            ("links.hinge(z / self.margin", "links.hinge(z"),
            ("self.margin * links", "links"),
            ("imitation_weight: float = 0.1", "imitation_weight: float = 0.2"),
        ],
        kinds=SAMPLED,
    ),
    Case(
        objective=TPO,
        make=lambda cls: cls(imitation_weight=0.8),
        batch=gold_batch,
        formula=tpo_formula,
        start=NO_POINT,
        identities=[tpo_of_the_chosen_itself_is_cpo],
        mutations=[
            ("items.weight * reduce", "reduce"),
            ("imitation(scores, items.index", "imitation(scores, pairs.w"),
            ("{Kind.TOKEN: 0.01}", "{Kind.TOKEN: -0.01}"),
            ("{Kind.TOKEN: 0.01}", "{Kind.TOKEN: 0.02}"),
        ],
        kinds=(Kind.TOKEN,),
    ),
    Case(
        objective=TPOL,
        make=lambda cls: cls(beta=2.0),
        batch=gold_batch,
        formula=tpo_l_formula,
        start=NO_POINT,
        identities=[tpo_l_of_the_chosen_itself_is_simpo_with_imitation],
        mutations=[
            ("return self.gamma\n\n    def imitation", "return -self.gamma\n\n    def imitation"),
            ("return self.gamma\n\n    def imitation", "return beta * self.gamma\n\n    def imitation"),
            ("return gold_imitation(self", "return 2 * gold_imitation(self"),
        ],
    ),
    Case(
        objective=SimPO,
        make=lambda cls: cls(beta=2.5, gamma_beta_ratio=0.55, label_smoothing=0.1),
        batch=batch,
        formula=simpo_formula,
        start=NO_POINT,
        identities=[simpo_of_equal_lengths_is_cpo, simpo_gamma_is_a_ratio_to_beta],
        mutations=[
            ("return self.gamma_beta_ratio * beta", "return -self.gamma_beta_ratio * beta"),
            ("return self.gamma_beta_ratio * beta", "return self.gamma_beta_ratio"),
            ("return scores.theta / scores.need_length()", "return scores.theta"),
            ("pairs.margin + self.gamma_for", "self.gamma_for"),
        ],
    ),
    Case(
        objective=AlphaPO,
        make=lambda cls: cls(),
        batch=batch,
        formula=alphapo_formula,
        start=NO_POINT,
        identities=[
            alphapo_without_bend_is_simpo,
            swap_changes_the_logistic_by_its_margin(lambda cls: cls(gamma=0.0)),
        ],
        mutations=[
            ("super().transform(scores), self.alpha", "super().transform(scores), -self.alpha"),
            ("super().transform(scores), self.alpha", "super().transform(scores), 2 * self.alpha"),
            ("gamma: float = 0.1", "gamma: float = 0.5"),
        ],
    ),
    Case(
        objective=ORPO,
        make=lambda cls: cls(odds_weight=0.25),
        batch=prompt_batch,
        formula=orpo_formula,
        start=NO_POINT,
        identities=[orpo_is_asft_and_a_coupling],
        mutations=[
            ("o_w - o_l - pairs.margin", "o_l - o_w - pairs.margin"),
            ("self.odds_weight * self.cost", "self.cost"),
            ("prompt=self.imitate_prompt", "prompt=False"),
            ("pairs.weight * (imitation", "(imitation"),
            ("mean = scores.theta / scores.need_length()", "mean = scores.theta"),
        ],
    ),
    Case(
        objective=ASFT,
        make=lambda cls: cls(odds_weight=0.25),
        batch=batch,
        formula=asft_formula,
        start=NO_POINT,
        identities=[asft_is_unlikelihood, orpo_is_asft_and_a_coupling],
        mutations=[
            ("links.logistic(-l, pairs.p)", "links.logistic(l, pairs.p)"),
            ("links.logistic(-l, pairs.p)", "2 * links.logistic(-l, pairs.p)"),
            ("o_w - half, o_l + half", "o_w, o_l"),
            ("(imitation + self.odds_weight", "(-imitation + self.odds_weight"),
        ],
    ),
    Case(
        objective=MaPO,
        make=lambda cls: cls(train_timesteps=20),
        batch=error_batch,
        formula=mapo_formula,
        # Slopes in theta = -e/2: -2 of the anchor; -0.1 T s / 2 of the margin term at T = 20.
        start=Start(0.1 * LOG2, [-2 - 0.5, 0.5], mapo_start),
        identities=[mapo_is_dpo_without_reference_for_small_errors, mapo_values],
        mutations=[
            ("self.link(w - l", "self.link(l - w"),
            ("self.train_timesteps * bernoulli_score", "bernoulli_score"),
            ("(anchor + self", "(self"),
            ("self.beta_for(scores.kind) * margin_loss", "margin_loss"),
            ("snr_value: float = 0.5", "snr_value: float = 1.0"),
        ],
        kinds=(Kind.BOUND,),
    ),
]
