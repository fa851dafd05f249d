"""Cases of `diffalign.losses.unpaired`."""

import torch
from loss_cases import Case, Start, at_start, row_scores
from torch.nn.functional import logsigmoid, softplus

from diffalign.losses import Items, Kind, Layout, Scores
from diffalign.losses.unpaired import BCO, KTO, APOZeroUnpaired

ALL = (Kind.TOKEN, Kind.STEP, Kind.BOUND)


def items_batch(**stats):
    """6 items in another order than the rows, labels at both ends and between, weights."""

    def batch(seed):
        g = torch.Generator().manual_seed(seed + 50)
        rand = lambda: torch.rand(6, generator=g, dtype=torch.float64)  # noqa: E731
        label = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.3, 1.0], dtype=torch.float64)
        items = Items(index=torch.randperm(6, generator=g), label=label, weight=0.5 + rand())
        values = {name: torch.tensor(value, dtype=torch.float64) for name, value in stats.items()}
        return row_scores(6, seed), Layout(items=items), values

    return batch


def start_batch(**stats):
    def batch():
        items = Items(index=torch.tensor([0, 1]), label=torch.tensor([1.0, 0.0]))
        return at_start(2), Layout(items=items), {name: torch.tensor(value) for name, value in stats.items()}

    return batch


def kto_formula(batch, frozen, z0=None, up=1.5, down=0.8):
    scores, layout, stats = batch
    items = layout.items
    z0 = stats["z0"] if z0 is None else z0
    z = 0.1 * (scores.theta[items.index] - scores.ref[items.index] - z0)
    desirable = up / (1 + torch.exp(z))
    undesirable = down / (1 + torch.exp(-z))
    return items.weight * (items.label * desirable + (1 - items.label) * undesirable)


def bco_formula(batch, frozen):
    scores, layout, stats = batch
    items = layout.items
    z = 0.1 * (scores.theta - scores.ref)[items.index] - 0.1 * stats["mean_log_ratio"]
    return items.weight * (items.label * softplus(-z) + (1 - items.label) * softplus(z))


def weighted(cls):
    return cls(beta=0.1, desirable_weight=1.5, undesirable_weight=0.8)


def flipping_labels_complements(cls):
    """With weights 1, label y costs 1 minus what label 1 - y costs (bounded in [0, 1])."""
    scores, layout, stats = items_batch(z0=0.7)(3)
    items = layout.items
    one = cls(beta=0.1)(scores, Items(index=items.index, label=items.label), stats).per_item
    other = cls(beta=0.1)(scores, Items(index=items.index, label=1 - items.label), stats).per_item
    torch.testing.assert_close(one + other, torch.ones_like(one))


def kto_moves_with_its_reference_point(cls):
    """Adding a constant to all log-ratios and to z0 changes nothing; to the log-ratios alone it does."""
    scores, layout, stats = items_batch(z0=0.7)(4)
    moved = Scores.tokens(scores.theta + 2, scores.ref)
    loss = cls(beta=0.1)
    before = loss(scores, layout, stats).per_item
    torch.testing.assert_close(loss(moved, layout, {"z0": stats["z0"] + 2}).per_item, before)
    assert not torch.allclose(loss(moved, layout, stats).per_item, before)


def kto_at_zero_is_apo_zero(cls):
    scores, layout, stats = items_batch(z0=0.0)(5)
    torch.testing.assert_close(
        cls(beta=0.2)(scores, layout, stats).per_item, APOZeroUnpaired(beta=0.2)(scores, layout).per_item
    )


def one_class_alone_is_fine(cls):
    """Only desirable, only undesirable or no items at all: finite, connected to the graph."""
    stats = {"z0": torch.tensor(0.1), "mean_log_ratio": torch.tensor(0.1)}
    for labels in ([1.0, 1.0], [0.0, 0.0], []):
        scores = at_start(2)
        items = Items(index=torch.arange(len(labels)), label=torch.tensor(labels))
        loss = cls(beta=0.1)(scores, items, stats).loss
        assert torch.isfinite(loss)
        (grad,) = torch.autograd.grad(loss, scores.theta)
        assert torch.isfinite(grad).all()
        if labels:
            assert ((grad < 0) if labels[0] else (grad > 0)).all(), "desirable goes up, undesirable down"


def undesirable_alone_at_zero_is_npo(cls):
    """beta / 2 times NPO, -(2 / beta) log sigma(-beta rho) (arXiv 2404.05868)."""
    scores, _, _ = items_batch()(6)
    items = Items(index=torch.arange(6), label=torch.zeros(6))
    mine = cls(beta=0.1)(scores, items, {"mean_log_ratio": torch.tensor(0.0)}).per_item
    npo = -20 * logsigmoid(-0.1 * (scores.theta - scores.ref))
    torch.testing.assert_close(mine, 0.05 * npo)


CASES = [
    Case(
        objective=KTO,
        make=weighted,
        batch=items_batch(z0=0.7),
        formula=kto_formula,
        start="the two classes have different weights; see the case with equal ones",
        identities=[flipping_labels_complements, kto_moves_with_its_reference_point, kto_at_zero_is_apo_zero],
        mutations=[
            ("beta * (rho - anchor)", "beta * (rho + anchor)"),
            ("beta * (rho - anchor)", "2 * beta * (rho - anchor)"),
            ("links.sigmoid(-z)", "links.sigmoid(z)"),
            ("self.desirable_weight * label", "label"),
            ("self.undesirable_weight * (1 - label)", "(1 - label)"),
            ("items.weight * self.terms", "self.terms"),
        ],
        kinds=ALL,
    ),
    Case(
        name="kto with equal weights",
        objective=KTO,
        make=lambda cls: cls(beta=0.1),
        batch=items_batch(z0=0.7),
        formula=lambda batch, frozen: kto_formula(batch, frozen, up=1.0, down=1.0),
        start=Start(0.5, [-0.025, 0.025], start_batch(z0=0.0)),
        identities=[one_class_alone_is_fine],
        mutations=[("links.sigmoid(z)", "links.sigmoid(-z)")],
        kinds=ALL,
    ),
    Case(
        objective=APOZeroUnpaired,
        make=weighted,
        batch=items_batch(),
        formula=lambda batch, frozen: kto_formula(batch, frozen, z0=0.0),
        start="the two classes have different weights; see the case with equal ones",
        identities=[flipping_labels_complements, one_class_alone_is_fine],
        mutations=[
            ("links.sigmoid(z)", "links.sigmoid(-z)"),
            ("self.undesirable_weight * (1 - label)", "2 * self.undesirable_weight * (1 - label)"),
        ],
        kinds=ALL,
    ),
    Case(
        name="apo_zero_unpaired with equal weights",
        objective=APOZeroUnpaired,
        make=lambda cls: cls(beta=0.1),
        batch=items_batch(),
        formula=lambda batch, frozen: kto_formula(batch, frozen, z0=0.0, up=1.0, down=1.0),
        start=Start(0.5, [-0.025, 0.025], start_batch()),
        identities=[one_class_alone_is_fine],
        mutations=[("beta * (rho - anchor)", "0.5 * beta * (rho - anchor)")],
        kinds=ALL,
    ),
    Case(
        objective=BCO,
        make=lambda cls: cls(beta=0.1),
        batch=items_batch(mean_log_ratio=-1.3),
        formula=bco_formula,
        start=Start(0.6931472, [-0.05, 0.05], start_batch(mean_log_ratio=0.0)),
        identities=[undesirable_alone_at_zero_is_npo, one_class_alone_is_fine],
        mutations=[
            ("links.logistic(z, label)", "links.logistic(-z, label)"),
            ("links.logistic(z, label)", "2 * links.logistic(z, label)"),
            ("beta * (rho - anchor)", "beta * rho - anchor"),
        ],
        kinds=(Kind.TOKEN, Kind.STEP, Kind.BOUND),
    ),
]
