"""Cases of `diffalign.losses.supervised`."""

import math
from dataclasses import replace

import pytest
import torch
from loss_cases import Case, Start, at_start, token_scores
from torch.nn.functional import softplus

from diffalign.losses import Items, Kind, Layout, Pairs, Scores, Totals
from diffalign.losses.supervised import AWR, RWR, SFT, PoFT, Unlikelihood

ALL = (Kind.TOKEN, Kind.STEP, Kind.BOUND)
DOUBLE = torch.float64


def items_batch(seed):
    """6 rows of up to 5 tokens, of which 4 are labelled 1; weights, targets, phrases and values per row."""
    g = torch.Generator().manual_seed(seed + 800)
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=DOUBLE)  # noqa: E731
    extra = {"value": rand(8), "token_value": rand(8, 5)}
    scores = token_scores(8, 5, seed, segment=torch.randint(0, 2, (8, 5), generator=g), extra=extra)
    items = Items(
        index=torch.tensor([3, 0, 7, 1, 2, 6]),
        label=torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0]),
        weight=0.5 + rand(6),
        target=2 * rand(6) - 1,
    )
    return scores, Layout(items=items), {}


def start(length=(10, 10), **more):
    def batch():
        items = Items(index=torch.arange(len(length)), label=torch.ones(len(length)), **more)
        return at_start(len(length), length=length), Layout(items=items), {}

    return batch


def sums(batch):
    """Summed log-probability and length of the listed items."""
    scores, layout, _ = batch
    index = layout.items.index
    mask = scores.units.mask.double()
    return (scores.units.theta * mask).sum(1)[index], mask.sum(1)[index]


def sft_formula(reduction):
    def formula(batch, frozen):
        items = batch[1].items
        keep = items.label == 1
        s, length = (x[keep] for x in sums(batch))
        mean = -s / length if reduction == "sequence" else -s * len(s) / length.sum()
        return items.weight[keep] * mean

    return formula


def unlikelihood_formula(batch, frozen):
    scores, layout, _ = batch
    items = layout.items
    p = scores.units.theta.exp()[items.index]
    mask = scores.units.mask[items.index]
    bad = (scores.units.segment[items.index] == 1) | (items.label == 0)[:, None]
    terms = torch.where(bad, -0.4 * (1 - p.clamp(max=1 - 1e-12)).log(), -p.log()) * mask
    return items.weight * terms.sum(1) * 6 / mask.sum()


def poft_formula(batch, frozen):
    items = batch[1].items
    s, length = sums(batch)
    every = items.weight * softplus(-(1.5 * (s / length - items.target) + 0.2))
    return every[items.label == 1]


def rwr_formula(batch, frozen):
    items = batch[1].items
    s, length = sums(batch)
    return items.weight * (items.target / 0.5).exp() * -s * 6 / length.sum()


def awr_formula(per_token):
    def formula(batch, frozen):
        scores, layout, _ = batch
        items, index = layout.items, layout.items.index
        value = scores.extra["value"][index]
        value = value if per_token else value[:, None].expand(6, 5)
        mask = scores.units.mask[index].double()
        weight = ((items.target[:, None] - value) / 0.5).exp().clamp(max=1000)
        policy = (weight * -scores.units.theta[index] * mask).sum(1) * 6 / mask.sum()
        error = ((value - items.target[:, None]) ** 2 * mask).sum(1) / mask.sum(1)
        return items.weight * (0.3 * policy + 0.7 * error)

    return formula


def token_value_batch(seed):
    scores, layout, stats = items_batch(seed)
    return replace(scores, extra={"value": scores.extra["token_value"]}), layout, stats


# -- identities --------------------------------------------------------------------------------------------------------


def pairs_give_their_chosen_rows(cls):
    scores, _, _ = items_batch(20)
    pairs = Pairs(w=torch.tensor([2, 5]), l=torch.tensor([0, 1]))
    plain = Items(index=torch.tensor([2, 5]))
    torch.testing.assert_close(cls()(scores, pairs).per_item, cls()(scores, plain).per_item)
    weighted = Pairs(w=pairs.w, l=pairs.l, weight=torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(
        cls()(scores, weighted).per_item, cls()(scores, pairs).per_item * torch.tensor([1.0, 3.0], dtype=DOUBLE)
    )


def denoising_errors_are_the_loss(cls):
    error = torch.tensor([0.2, 0.4, 0.9], dtype=DOUBLE)
    scores = Scores.denoising(error)
    torch.testing.assert_close(cls()(scores, Items(index=torch.tensor([0, 1]))).loss.item(), 0.3)
    torch.testing.assert_close(cls()(scores, Pairs(w=torch.tensor([2]), l=torch.tensor([0]))).loss.item(), 0.9)


def micro_batches_add_up(cls):
    scores, _, _ = items_batch(21)
    index = torch.arange(6)
    totals = Totals(items=6, units=float(scores.length[:6].sum()))
    whole = cls()(scores, Items(index=index)).loss
    parts = [cls()(replace(scores, totals=totals), Items(index=index[p])).per_item for p in (slice(0, 1), slice(1, 6))]
    torch.testing.assert_close(torch.cat(parts).mean(), whole)


def micro_batches_of_pairs_add_up(cls):
    scores, _, _ = items_batch(22)
    w, l = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    totals = Totals(items=3, units=99.0, chosen_units=float(scores.length[:3].sum()))
    whole = cls()(scores, Pairs(w=w, l=l)).loss
    parts = [cls()(replace(scores, totals=totals), Pairs(w=w[p], l=l[p])).per_item for p in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(torch.cat(parts).mean(), whole)


def nothing_to_imitate_is_fine(cls):
    scores, layout, _ = items_batch(23)
    out = cls()(scores, replace(layout.items, label=torch.zeros(6)))
    out.loss.backward()
    assert out.loss == 0


def poft_is_sft_far_below(cls):
    """Where the model is far less likely than the others, the slope in the mean log-probability is -beta."""
    theta = torch.tensor([-500.0], dtype=DOUBLE, requires_grad=True)
    items = Items(index=torch.tensor([0]), target=torch.tensor([-1.0]))
    out = cls(beta=0.7)(Scores.tokens(theta, length=torch.tensor([5])), items)
    (grad,) = torch.autograd.grad(out.loss, theta)
    torch.testing.assert_close(grad, torch.tensor([-0.7 / 5], dtype=DOUBLE))
    with pytest.raises(ValueError, match=r"items\.target"):
        cls()(Scores.tokens(theta, length=torch.tensor([5])), Items(index=torch.tensor([0])))


def without_bad_tokens_it_is_sft(cls):
    scores, layout, _ = items_batch(26)
    good = replace(scores, units=replace(scores.units, segment=None))
    items = replace(layout.items, label=None)
    torch.testing.assert_close(cls()(good, items).per_item, SFT()(good, items).per_item)


def bad_tokens_are_pushed_down(cls):
    p = torch.tensor([[0.2, 0.9, 1.0]], dtype=DOUBLE)
    theta = p.log().requires_grad_()
    scores = Scores.tokens(theta, mask=torch.ones(1, 3).bool())
    out = cls(alpha=0.5)(scores, Items(index=torch.tensor([0]), label=torch.zeros(1)))
    (grad,) = torch.autograd.grad(out.loss, theta)
    torch.testing.assert_close(grad[0, :2] * 3, 0.5 * p[0, :2] / (1 - p[0, :2]))
    assert torch.isfinite(grad).all()


def reductions_of_unlikelihood(cls):
    scores, layout, _ = items_batch(27)
    items = replace(layout.items, weight=1.0)
    s, length = sums((scores, layout, {}))
    good = replace(scores, units=replace(scores.units, segment=None))
    out = cls(reduction="sequence")(good, replace(items, label=torch.ones(6)))
    torch.testing.assert_close(out.per_item, -s / length)
    totals = Totals(items=6, units=float(length.sum()))
    parts = [
        cls()(replace(scores, totals=totals), Items(index=items.index[p], label=items.label[p])).per_item
        for p in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(torch.cat(parts).mean(), cls()(scores, items).loss)


def equal_rewards_are_weighted_sft(cls):
    scores, layout, _ = items_batch(28)
    items = replace(layout.items, label=None, target=torch.full((6,), 0.4, dtype=DOUBLE))
    weight = math.exp(0.4 / 0.5)
    torch.testing.assert_close(cls(beta=0.5)(scores, items).per_item, weight * SFT()(scores, items).per_item)


def weights_are_limited(cls):
    weights = cls(beta=0.1).weigh(torch.tensor([1e4, 0.0, -1e4]))
    torch.testing.assert_close(weights, torch.tensor([1000.0, 1.0, 0.0]))


def the_policys_weight_has_no_gradient_to_the_value(cls):
    scores, layout, _ = items_batch(29)
    value = scores.extra["value"].clone().requires_grad_()
    out = cls(alpha=0.3)(replace(scores, extra={"value": value}), replace(layout.items, weight=1.0))
    (grad,) = torch.autograd.grad(out.per_item.sum(), value)
    expected = torch.zeros(8, dtype=DOUBLE)
    index = layout.items.index
    expected[index] = 1.4 * (value.detach()[index] - layout.items.target)
    torch.testing.assert_close(grad, expected)


def a_value_of_zero_is_rwr(cls):
    scores, layout, _ = items_batch(30)
    for shape in ((8,), (8, 5)):
        none = replace(scores, extra={"value": torch.zeros(shape, dtype=DOUBLE)})
        for reduction in ("token", "sequence"):
            awr = cls(alpha=1.0, reduction=reduction)(none, layout).per_item
            torch.testing.assert_close(awr, RWR(reduction=reduction)(scores, layout).per_item)


def on_denoising_errors_it_weighs_as_jannerms_ddpo(cls):
    """N softmax(R / 5) over the data, up to the one constant N / sum exp(R / 5); within a prompt, a constant per prompt."""
    g = torch.Generator().manual_seed(3)
    error, reward = torch.rand(8, generator=g, dtype=DOUBLE).requires_grad_(), torch.randn(8, generator=g, dtype=DOUBLE)
    out = cls(beta=5.0)(Scores.denoising(error), Items(index=torch.arange(8), target=reward))
    published = 8 * torch.softmax(reward / 5, 0) * error
    constant = 8 / torch.exp(reward / 5).sum()
    torch.testing.assert_close(constant * out.per_item, published)
    shifted = cls(beta=5.0)(Scores.denoising(error), Items(index=torch.arange(8), target=reward + 1.0))
    torch.testing.assert_close(shifted.per_item, math.exp(0.2) * out.per_item)


CASES = [
    Case(
        objective=SFT,
        make=lambda cls: cls(),
        batch=items_batch,
        formula=sft_formula("token"),
        start=Start(0.7, [-0.1, -0.1], start()),
        identities=[
            pairs_give_their_chosen_rows,
            denoising_errors_are_the_loss,
            micro_batches_add_up,
            micro_batches_of_pairs_add_up,
            nothing_to_imitate_is_fine,
        ],
        mutations=[
            ("loss if weight is None else weight * loss", "-loss if weight is None else -weight * loss"),
            ("items.label > 0.5", "items.label < 0.5"),
            ("sums * len(sums) / length.sum()", "sums / length.sum()"),
            ("sums * items / max(units", "sums / max(units"),
            ("totals.chosen_units or totals.units", "totals.units"),
            ("loss if weight is None else weight * loss", "loss"),
        ],
        kinds=ALL,
    ),
    Case(
        name="sft per sequence",
        objective=SFT,
        make=lambda cls: cls(reduction="sequence"),
        batch=items_batch,
        formula=sft_formula("sequence"),
        start=Start(0.7, [-0.1, -0.1], start()),
        identities=[denoising_errors_are_the_loss],
        mutations=[("sums / length.clamp(min=1)", "sums")],
        kinds=ALL,
    ),
    Case(
        objective=PoFT,
        make=lambda cls: cls(beta=1.5, gamma=0.2),
        batch=items_batch,
        formula=poft_formula,
        # 1.5 (-0.7 - target) + 0.2 = 0; the slope is -1.5 / 2 over 10 tokens.
        start=Start(math.log(2), [-0.075, -0.075], start(target=torch.full((2,), -0.7 + 0.4 / 3, dtype=DOUBLE))),
        identities=[poft_is_sft_far_below],
        mutations=[
            ("self.beta * gap + self.gamma", "self.beta * gap - self.gamma"),
            ("self.beta * gap + self.gamma", "-self.beta * gap + self.gamma"),
            ("items.weight * -logsigmoid", "-logsigmoid"),
            ("[items.index] - external", "[items.index] + external"),
            ("items.label > 0.5", "items.label >= 0.0"),
        ],
    ),
    Case(
        objective=Unlikelihood,
        make=lambda cls: cls(alpha=0.4),
        batch=items_batch,
        formula=unlikelihood_formula,
        start="it has no reference to start at",
        identities=[without_bad_tokens_it_is_sft, bad_tokens_are_pushed_down, reductions_of_unlikelihood],
        mutations=[
            ("-self.alpha * log1mexp", "self.alpha * log1mexp"),
            ("-self.alpha * log1mexp", "-log1mexp"),
            ("units.segment[items.index] > 0", "units.segment[items.index] < 0"),
            ("items.label <= 0.5", "items.label > 0.5"),
            ("LossOut(items.weight * loss, detached(bad", "LossOut(loss, detached(bad"),
        ],
    ),
    Case(
        objective=RWR,
        make=lambda cls: cls(beta=0.5),
        batch=items_batch,
        formula=rwr_formula,
        start=Start(0.7 * math.e**2, [-0.1 * math.e**2] * 2, start(target=torch.ones(2))),
        identities=[
            equal_rewards_are_weighted_sft,
            weights_are_limited,
            on_denoising_errors_it_weighs_as_jannerms_ddpo,
        ],
        mutations=[
            ("advantage.detach() / self.beta", "-advantage.detach() / self.beta"),
            ("advantage.detach() / self.beta", "advantage.detach()"),
            ("loss = items.weight * row_loss", "loss = row_loss"),
            (".clamp(max=math.log(WEIGHT_LIMIT))", ""),
        ],
        kinds=ALL,
    ),
    Case(
        objective=AWR,
        make=lambda cls: cls(beta=0.5, alpha=0.3),
        batch=items_batch,
        formula=awr_formula(per_token=False),
        start=Start(
            0.3 * 0.7 * math.e**2 + 0.7,
            [-0.03 * math.e**2] * 2,
            lambda: (
                replace(at_start(2, length=(10, 10)), extra={"value": torch.zeros(2, dtype=DOUBLE)}),
                Layout(items=Items(index=torch.arange(2), target=torch.ones(2))),
                {},
            ),
        ),
        identities=[the_policys_weight_has_no_gradient_to_the_value, a_value_of_zero_is_rwr],
        mutations=[
            ("self.weigh(reward - value)", "self.weigh(value - reward)"),
            ("(1 - self.alpha) * error", "self.alpha * error"),
            ("self.alpha * policy +", "-self.alpha * policy +"),
            ("loss = items.weight * (self", "loss = (self"),
        ],
        kinds=ALL,
    ),
    Case(
        name="awr with a value per token",
        objective=AWR,
        make=lambda cls: cls(beta=0.5, alpha=0.3),
        batch=token_value_batch,
        formula=awr_formula(per_token=True),
        start="as with a value per row",
        identities=[a_value_of_zero_is_rwr],
        mutations=[
            ("self.weigh(reward[:, None] - value)", "self.weigh(value - reward[:, None])"),
            ("-weight * lift(units.theta)[rows]", "weight * lift(units.theta)[rows]"),
            ("(value - reward[:, None]).square()", "2 * (value - reward[:, None]).square()"),
        ],
        kinds=ALL,
    ),
]
