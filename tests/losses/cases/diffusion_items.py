"""Cases of `diffalign.losses.diffusion` on single images and groups: Diffusion-KTO, GDPO-SR."""

import math

import torch
from group_cases import GROUP, INDEX, MEMBERS
from loss_cases import Case, Start, error_scores, image_start
from torch.nn.functional import logsigmoid, softplus

from diffalign.losses import DPO, KTO, Groups, Items, Kind, Layout, Pairs, Scores
from diffalign.losses.diffusion.gdpo import GDPO
from diffalign.losses.diffusion.kto import DiffusionKTO

LOG2 = math.log(2)
ALL = (Kind.TOKEN, Kind.STEP, Kind.BOUND)


def close(one, other, **more):
    torch.testing.assert_close(one, other, **({"rtol": 1e-9, "atol": 1e-12} | more))


# -- diffusion_kto ---------------------------------------------------------------------------------------------------


def items_batch(seed):
    g = torch.Generator().manual_seed(seed + 50)
    label = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.3, 1.0], dtype=torch.float64)
    weight = 0.5 + torch.rand(6, generator=g, dtype=torch.float64)
    items = Items(index=torch.randperm(6, generator=g), label=label, weight=weight)
    return error_scores(6, seed), Layout(items=items), {"q": torch.tensor(0.03, dtype=torch.float64)}


def kto_formula(value, up=1.0, down=1.0):
    def formula(batch, frozen):
        scores, layout, stats = batch
        items = layout.items
        g = (-2 * scores.ref - -2 * scores.theta)[items.index]  # e_ref - e
        u = 5.0 * (g - stats["q"])
        return items.weight * (items.label * up * value(u) + (1 - items.label) * down * value(-u))

    return formula


VALUES = {
    "kahneman_tversky": lambda u: 1 - torch.sigmoid(u),
    "loss_averse": lambda u: 1 - logsigmoid(u),
    "risk_seeking": lambda u: 1 + logsigmoid(-u),
}


def kto_start():
    scores, layout, _ = image_start()()
    return scores, Layout(items=layout.as_items()), {"q": torch.tensor(0.0, dtype=torch.float64)}


def labels_complement(cls):
    scores, layout, stats = items_batch(3)
    items = layout.items
    one, other = (
        cls(beta=5.0)(scores, Items(index=items.index, label=x), stats).per_item for x in (items.label, 1 - items.label)
    )
    close(one + other, torch.ones_like(one))


def the_reference_point_moves_with_all_images(cls):
    """A positive mean takes a common shift of all g along; below 0 the reference point stays at 0."""
    objective = cls(beta=5.0)
    scores, layout, _ = items_batch(4)

    def loss(shift):
        moved = Scores.denoising(scores.error, -2 * scores.ref + shift)
        stats = objective.estimator().update(moved, layout)
        return stats["q"].item(), objective(moved, layout, stats).per_item

    (q1, one), (q2, other) = loss(1.0), loss(1.5)
    close(q2 - q1, 0.5)
    close(one, other)
    (q3, low), (q4, lower) = loss(-1.0), loss(-1.5)
    assert q3 == q4 == 0.0
    assert not torch.allclose(low, lower)


def all_liked_images_still_pull(cls):
    scores, _, _ = items_batch(5)
    items = Items(index=torch.arange(6), label=torch.ones(6))
    stats = cls(beta=5.0).estimator().update(scores, Layout(items=items))
    (grad,) = torch.autograd.grad(cls(beta=5.0)(scores, items, stats).loss, scores.theta)
    assert (grad < 0).all()


def the_reference_point_is_that_of_all_processes(cls):
    """Clamped after averaging: two processes whose means differ in sign."""
    estimator = cls(beta=5.0).estimator()
    scores = Scores.denoising(torch.tensor([0.2, 0.2]), torch.tensor([0.3, 0.5]))
    other = torch.tensor([[-0.9, 0.81, 1.0]], dtype=torch.float64)  # sum, squares, count elsewhere
    q = estimator.update(scores, Layout(pairs=Pairs.halves(1)), lambda x: torch.cat([x, other]))["q"]
    assert q == 0
    close(estimator.update(scores, Layout(pairs=Pairs.halves(1)))["q"].item(), 0.2, rtol=1e-6)


def pairs_serve_as_images(cls):
    scores, _, stats = items_batch(6)
    pairs = Pairs(w=torch.tensor([0, 3]), l=torch.tensor([5, 1]))
    items = Items(index=torch.tensor([0, 3, 5, 1]), label=torch.tensor([1.0, 1.0, 0.0, 0.0]))
    close(cls(beta=5.0)(scores, pairs, stats).per_item, cls(beta=5.0)(scores, items, stats).per_item)


def it_is_kto_at_twice_the_beta(cls):
    """The core's log-ratio is one half of e_ref - e."""
    scores, layout, stats = items_batch(7)
    mine = cls(beta=5.0)(scores, layout, stats).per_item
    close(mine, KTO(beta=10.0, reference_point="batch")(scores, layout, {"z0": stats["q"] / 2}).per_item)


def its_images_pull_as_hard_as_dpos(cls):
    """T2: beta / 4 per image and error, at the same beta."""
    scores, layout, _ = image_start()()
    stats = {"q": torch.zeros((), dtype=torch.float64)}
    mine = torch.autograd.grad(cls(beta=8.0)(scores, layout, stats).per_item.sum(), scores.theta)[0]
    other = torch.autograd.grad(DPO(beta=8.0)(scores, layout).per_item.sum(), scores.theta)[0]
    close(mine, other)
    close(mine, torch.tensor([-4.0, 4.0], dtype=torch.float64))


def transitions_have_no_factor_of_two(cls):
    theta = torch.tensor([0.3, -0.1], dtype=torch.float64, requires_grad=True)
    out = cls(beta=2.0)(Scores.steps(theta, torch.zeros(2)), Pairs.halves(1), {"q": torch.tensor(0.1)})
    close(
        out.per_item,
        torch.stack([1 - torch.sigmoid(2 * (theta[0] - 0.1)), torch.sigmoid(2 * (theta[1] - 0.1))]),
        rtol=1e-6,
    )


# -- gdpo ------------------------------------------------------------------------------------------------------------


def group_batch(seed, columns=2):
    g = torch.Generator().manual_seed(seed + 500)
    reward = torch.randn(6, columns, generator=g, dtype=torch.float64)
    return error_scores(6, seed), Layout(groups=Groups(index=INDEX, group=GROUP, reward=reward)), {}


def gdpo_formula(batch, frozen, weights=(0.7, 1.6), size=1.0):
    scores, layout, _ = batch
    delta = (-2 * scores.theta - -2 * scores.ref)[INDEX]
    reward, out = layout.groups.reward, [None] * 6
    for members in MEMBERS:
        total = 0.0
        for k, weight in enumerate(weights):
            r = reward[members, k]
            total = total + weight * (r - r.min()) / (r.max() - r.min())
        a = (total - total.mean()) / (torch.sqrt(((total - total.mean()) ** 2).sum() / 2) + 1e-8)
        z = -3.5 * (a * delta[members]).sum() / size
        for m in members:
            out[m] = softplus(-z)
    return torch.stack(out)


def group_of(*reward, error=None):
    n = len(reward)
    theta = torch.full((n,), -0.15, dtype=torch.float64) if error is None else -error / 2
    theta = theta.requires_grad_()
    scores = Scores(kind=Kind.BOUND, theta=theta, ref=torch.full((n,), -0.15, dtype=torch.float64), error=-2 * theta)
    index = torch.arange(n)
    return (
        scores,
        Layout(groups=Groups(index=index, group=index * 0, reward=torch.tensor(reward, dtype=torch.float64))),
        {},
    )


def gdpo_start():
    return group_of(1.0, 0.0)


def a_pair_is_dpo_at_0_7071_beta(cls):
    error = torch.tensor([0.2, 0.35], dtype=torch.float64)
    scores, layout, _ = group_of(5.0, 2.0, error=error)
    mine = cls(beta=7.0)(scores, layout).per_item
    close(mine, DPO(beta=7.0 / math.sqrt(2))(scores, Pairs.halves(1)).per_item.expand(2), rtol=1e-6)


def slopes_follow_the_advantages(cls):
    """0.25 beta A per error at the start; a one-hot reward in six gives (2.041, -0.408 five times)."""
    scores, layout, _ = group_of(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    out = cls()(scores, layout)
    (grad,) = torch.autograd.grad(out.per_item[0], scores.theta)
    expected = torch.tensor([2.041] + [-0.408] * 5, dtype=torch.float64)
    torch.testing.assert_close(grad / -2500.0, expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(out.metrics["advantage"], expected, rtol=1e-3, atol=0)


def constants_in_all_errors_cancel(cls):
    scores, layout, _ = group_batch(3)
    moved = Scores.denoising(scores.error + 0.4, -2 * scores.ref)
    close(cls(beta=7.0)(moved, layout).per_item, cls(beta=7.0)(scores, layout).per_item, rtol=1e-7)


def equal_rewards_teach_nothing_and_are_no_nan(cls):
    scores, layout, _ = group_of(0.3, 0.3, 0.3)
    out = cls()(scores, layout)
    close(out.per_item, torch.full((3,), LOG2, dtype=torch.float64))
    assert not torch.autograd.grad(out.loss, scores.theta)[0].any()


def rewards_are_normalised_before_they_are_added(cls):
    scores, layout, _ = group_batch(4)
    groups = layout.groups
    scaled = Groups(index=groups.index, group=groups.group, reward=groups.reward * torch.tensor([100.0, 0.01]) + 5)
    close(cls(beta=7.0)(scores, scaled).per_item, cls(beta=7.0)(scores, layout).per_item, rtol=1e-7)


def given_advantages_are_taken(cls):
    scores, layout, _ = group_batch(5)
    groups = layout.groups
    a = cls(beta=7.0)(scores, layout).metrics["advantage"]
    given = Groups(index=groups.index, group=groups.group, reward=0 * groups.reward, advantage=a)
    close(cls(beta=7.0)(scores, given).per_item, cls(beta=7.0)(scores, layout).per_item)


CASES = [
    Case(
        objective=DiffusionKTO,
        make=lambda cls: cls(beta=5.0, desirable_weight=1.5, undesirable_weight=0.8),
        batch=items_batch,
        formula=kto_formula(VALUES["kahneman_tversky"], 1.5, 0.8),
        start="the two classes have different weights; see the cases with equal ones",
        identities=[
            labels_complement,
            the_reference_point_moves_with_all_images,
            all_liked_images_still_pull,
            the_reference_point_is_that_of_all_processes,
            pairs_serve_as_images,
            it_is_kto_at_twice_the_beta,
            its_images_pull_as_hard_as_dpos,
            transitions_have_no_factor_of_two,
        ],
        mutations=[
            ("beta * (g - q)", "beta * (g + q)"),
            ("beta * (g - q)", "beta * (q - g)"),
            ("(2.0 if", "(1.0 if"),
            ("(1 - label) * self.cost(-u)", "(1 - label) * self.cost(u)"),
            ("self.desirable_weight * label", "label"),
            ("self.undesirable_weight * (1 - label)", "(1 - label)"),
            ("items.weight * (liked", "(liked"),
            (".clamp(min=0)", ""),
        ],
        kinds=(Kind.STEP, Kind.BOUND),
    ),
    *(
        Case(
            name=f"diffusion_kto, {utility}",
            objective=DiffusionKTO,
            make=lambda cls, utility=utility: cls(beta=5.0, utility=utility),
            batch=items_batch,
            formula=kto_formula(VALUES[utility]),
            start=Start(value, [-slope, slope], kto_start),
            identities=[pairs_serve_as_images],
            mutations=mutations,
            kinds=(Kind.STEP, Kind.BOUND),
        )
        for utility, value, slope, mutations in (
            ("kahneman_tversky", 0.5, 2.5, [("links.sigmoid(u)", "links.sigmoid(-u)")]),
            ("loss_averse", 1 + LOG2, 5.0, [("softplus(-u)", "softplus(u)")]),
            (
                "risk_seeking",
                1 - LOG2,
                5.0,
                [("else 1 - softplus(u)", "else 1 + softplus(-u)"), ("else 1 - softplus(u)", "else -softplus(u)")],
            ),
        )
    ),
    Case(
        objective=GDPO,
        make=lambda cls: cls(beta=7.0, reward_weights=(0.7, 1.6)),
        batch=group_batch,
        formula=gdpo_formula,
        start=Start(LOG2, [-7 / math.sqrt(2), 7 / math.sqrt(2)], lambda: group_of_two_columns()),
        identities=[
            a_pair_is_dpo_at_0_7071_beta,
            slopes_follow_the_advantages,
            constants_in_all_errors_cancel,
            equal_rewards_teach_nothing_and_are_no_nan,
            rewards_are_normalised_before_they_are_added,
            given_advantages_are_taken,
        ],
        mutations=[
            ("group_sums(a.to(rho) * rho", "group_sums(-a.to(rho) * rho"),
            ("group_sums(a.to(rho) * rho", "group_sums(0.5 * a.to(rho) * rho"),
            ("(reward - low) / width", "(reward - low) * width"),
            ("unit * torch.as_tensor", "torch.as_tensor"),
            ("Kind.BOUND: 5000.0", "Kind.BOUND: 2000.0"),
        ],
        kinds=ALL,
    ),
    Case(
        name="gdpo, mean over the group",
        objective=GDPO,
        make=lambda cls: cls(beta=7.0, reward_weights=(0.7, 1.6), group_reduction="mean"),
        batch=group_batch,
        formula=lambda batch, frozen: gdpo_formula(batch, frozen, size=3.0),
        start="as the sum, divided by the size of the group",
        identities=[equal_rewards_teach_nothing_and_are_no_nan],
        mutations=[('self.group_reduction == "mean"', "False")],
        kinds=ALL,
    ),
]


def group_of_two_columns():
    scores, layout, _ = group_of(1.0, 0.0)
    groups = layout.groups
    return scores, Layout(groups=Groups(index=groups.index, group=groups.group, reward=groups.reward.repeat(1, 2))), {}
