"""Cases of `diffalign.losses.transport`."""

import math

import torch
from loss_cases import Case, Start, pair_batch, pair_start
from torch.nn.functional import softplus

from diffalign.losses import DPO, Kind, Layout, Pairs
from diffalign.losses.transport import AOT, AOTUnpaired

ALL = (Kind.TOKEN, Kind.STEP, Kind.BOUND)


def batch(seed):
    """Pairs with one label, weight and margin for all."""
    scores, _, _ = pair_batch(seed)
    return scores, Layout(pairs=Pairs.halves(4, p=0.9, weight=0.7, margin=0.2)), {}


def formula(samples):
    def losses_of(batch, frozen):
        scores, layout, _ = batch
        upper, lower = samples(scores, layout.pairs)
        z = 0.05 * torch.stack([u - l for u, l in zip(sorted(upper), sorted(lower))]) - 0.2
        p = 0.9 * 0.8 + 0.1 * 0.2
        return 0.7 * (p * softplus(-z) + (1 - p) * softplus(z))

    return losses_of


def margins(scores, pairs):
    return scores.theta[pairs.w] - scores.theta[pairs.l], scores.ref[pairs.w] - scores.ref[pairs.l]


def sides(scores, pairs):
    rho = scores.theta - scores.ref
    return rho[pairs.w], rho[pairs.l]


def make(cls):
    return cls(beta=0.05, label_smoothing=0.2)


def one_pair_is_dpo(cls):
    scores, _, _ = pair_batch(1)
    pairs = Pairs(w=torch.tensor([0]), l=torch.tensor([4]))
    torch.testing.assert_close(cls(beta=0.1)(scores, pairs).per_item, DPO(beta=0.1)(scores, pairs).per_item)


def who_rejected_whom_does_not_matter(cls):
    scores, _, _ = pair_batch(2)
    one = Pairs.halves(4)
    other = Pairs(w=one.w, l=one.l.flip(0))
    torch.testing.assert_close(cls(beta=0.1)(scores, one).per_item, cls(beta=0.1)(scores, other).per_item)


def the_coupling_is_the_best_one(cls):
    """Of all ways to couple both samples, ranks cost least for a convex loss."""
    scores, layout, _ = pair_batch(3, soft=False)
    upper, lower = (margins if cls.name == "aot" else sides)(scores, layout.pairs)
    sorted_loss = cls(beta=0.1)(scores, layout).loss
    for shift in range(4):
        assert sorted_loss <= softplus(-0.1 * (upper.sort().values - lower.sort().values.roll(shift))).mean() + 1e-12


def shared(cls, samples, extra):
    return Case(
        objective=cls,
        make=make,
        batch=batch,
        formula=formula(samples),
        start=Start(math.log(2), [-0.05 * 0.5 * 0.6, 0.05 * 0.5 * 0.6], pair_start()),
        identities=[one_pair_is_dpo, the_coupling_is_the_best_one, *extra],
        mutations=[
            ("upper.sort().values - lower.sort().values", "upper - lower"),
            ("upper.sort().values - lower.sort().values", "lower.sort().values - upper.sort().values"),
            ("beta * d - margin", "2 * beta * d - margin"),
            ("beta * d - margin", "beta * d + margin"),
            ("weight * loss", "loss"),
        ],
        kinds=ALL,
    )


def distributed(seed):
    """The same batch with what the estimator of one process adds."""
    scores, layout, _ = batch(seed)
    return scores, layout, make_global(AOTUnpaired).estimator().update(scores, layout)


def make_global(cls):
    return cls(beta=0.05, label_smoothing=0.2, global_sort=True)


def global_formula(batch, frozen):
    """Half of what each row's own coupling costs, in the order of rows, with the partners held fixed; twice its slope."""
    upper, lower = sides(batch[0], batch[1].pairs)
    held_upper, held_lower = sides(frozen[0], frozen[1].pairs)
    p, total = 0.9 * 0.8 + 0.1 * 0.2, 0.0
    for own, held, partner_of, sign in ((upper, held_upper, held_lower, 1), (lower, held_lower, held_upper, -1)):
        partner = torch.stack([sorted(partner_of)[int((held < x).sum())] for x in held])
        z = 0.05 * sign * (own - partner) - 0.2
        still = 0.05 * sign * (held - partner) - 0.2
        cost, base = (p * softplus(-x) + (1 - p) * softplus(x) for x in (z, still))
        total = total + cost - 0.5 * base
    return 0.7 * total


def sorting_over_one_process_is_sorting(cls):
    scores, layout, stats = distributed(4)
    theta = scores.theta
    ours, plain = make_global(cls)(scores, layout, stats), make(cls)(scores, layout)
    torch.testing.assert_close(ours.loss, plain.loss)
    torch.testing.assert_close(torch.autograd.grad(ours.loss, theta)[0], torch.autograd.grad(plain.loss, theta)[0])


CASES = [
    shared(AOT, margins, []),
    shared(AOTUnpaired, sides, [who_rejected_whom_does_not_matter]),
    Case(
        name="aot_unpaired over all processes",
        objective=AOTUnpaired,
        make=make_global,
        optional=["samples"],
        batch=distributed,
        formula=global_formula,
        start="the same as of one process; see aot_unpaired",
        identities=[sorting_over_one_process_is_sorting],
        mutations=[
            ("loss - 0.5 * loss.detach()", "loss - loss.detach()"),
            ("upper - partners(upper, above, below)", "partners(upper, above, below) - upper"),
            ("partners(lower, below, above) - lower", "partners(lower, above, below) - lower"),
        ],
        kinds=ALL,
    ),
]
