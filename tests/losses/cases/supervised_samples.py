"""Cases of `diffalign.losses.supervised` on samples of a prompt and on samples of the reference."""

import math
from dataclasses import replace

import torch
from loss_cases import Case, Start, at_start, row_scores

from diffalign.losses import Groups, Items, Kind, Layout, Lists, Scores
from diffalign.losses.supervised import MML, RAFT, RFT, SFT, FDivergenceSFT, UniformMLE

ALL = (Kind.TOKEN, Kind.STEP, Kind.BOUND)
DOUBLE = torch.float64


def groups_batch(seed):
    """8 samples of 3 prompts; some rewards are equal."""
    g = torch.Generator().manual_seed(seed + 900)
    reward = torch.randint(0, 3, (8,), generator=g).double() / 2
    groups = Groups(index=torch.randperm(8, generator=g), group=torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]), reward=reward)
    return row_scores(9, seed), Layout(groups=groups), {}


def accepted_formula(choose):
    def formula(batch, frozen):
        scores, layout, _ = batch
        rows = layout.groups.index[choose(layout.groups)]
        return -scores.theta[rows] * len(rows) / scores.length[rows].sum()

    return formula


def first_best(groups):
    chosen = []
    for prompt in range(3):
        members = [i for i in range(8) if groups.group[i] == prompt]
        chosen.append(max(members, key=lambda i: (groups.reward[i, 0].item(), -i)))
    return torch.tensor(sorted(chosen))


def lists_batch(seed):
    """4 lists of at most 3 samples: the second has no solution, the third is padded."""
    index = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 0], [8, 9, 10]])
    gain = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    mask = torch.ones(4, 3).bool()
    mask[2, 2] = False
    return row_scores(11, seed), Layout(lists=Lists(index=index, gain=gain, mask=mask)), {}


def mml_formula(beta):
    def formula(batch, frozen):
        p = (beta * batch[0].theta).exp()
        marginal = torch.stack([p[0] + p[2], torch.ones((), dtype=DOUBLE), p[6] + p[7], p[10]])
        return -marginal.log() / beta

    return formula


def uniform_formula(batch, frozen):
    s = batch[0].theta
    return -torch.stack([(s[0] + s[2]) / 2, 0 * s[0], (s[6] + s[7]) / 2, s[10]])


def lists_start():
    lists = Lists(index=torch.tensor([[0, 1]]), gain=torch.ones(1, 2), mask=torch.ones(1, 2).bool())
    return at_start(2), Layout(lists=lists), {}


def f_formula(divergence):
    def formula(batch, frozen):
        scores, layout, _ = batch
        items = layout.items
        u = ((scores.theta - scores.ref)[items.index]).exp()
        f = {
            "kl": (u.log() + 1, u),
            "pearson_chi2": (2 * (u - 1), u * 2 * (u - 1) - (u - 1) ** 2),
            "squared_hellinger": (1 - u**-0.5, u * (1 - u**-0.5) - (u**0.5 - 1) ** 2),
        }[divergence]
        data = items.label == 1
        values = torch.where(data, -f[0] * 6 / data.sum(), f[1] * 6 / (~data).sum())
        return items.weight * values

    return formula


def f_batch(seed):
    """Data and samples of the reference, in one layout."""
    g = torch.Generator().manual_seed(seed + 800)
    items = Items(
        index=torch.tensor([3, 0, 7, 1, 2, 6]),
        label=torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0]),
        weight=0.5 + torch.rand(6, generator=g, dtype=DOUBLE),
    )
    return row_scores(8, seed, spread=0.7), Layout(items=items), {}


# -- identities --------------------------------------------------------------------------------------------------------


def it_is_sft_on_the_accepted(threshold):
    def identity(cls):
        scores, layout, _ = groups_batch(24)
        rows = layout.groups.index[layout.groups.reward[:, 0] > threshold]
        torch.testing.assert_close(cls()(scores, layout).per_item, SFT()(scores, Items(index=rows)).per_item)

    return identity


def no_sample_above_is_fine(cls):
    scores, layout, _ = groups_batch(25)
    out = cls(threshold=9.0)(scores, layout)
    out.loss.backward()
    assert out.loss == 0


def one_sample_per_prompt(cls):
    for seed in range(5):
        scores, layout, _ = groups_batch(seed)
        out = cls()(scores, layout)
        assert len(out.per_item) == 3
        scaled = replace(layout.groups, reward=5 * layout.groups.reward - 2)
        torch.testing.assert_close(out.per_item, cls()(scores, scaled).per_item)


def one_solution_is_its_likelihood(cls):
    scores, _, _ = lists_batch(31)
    lists = Lists(index=torch.tensor([[4, 5]]), gain=torch.tensor([[0.0, 1.0]]), mask=torch.ones(1, 2).bool())
    torch.testing.assert_close(cls()(scores, lists).per_item, -scores.theta[5:6])


def small_powers_weigh_all_solutions_alike(cls):
    scores, layout, _ = lists_batch(32)
    x = scores.theta.detach().requires_grad_()
    moved = replace(scores, theta=x)
    (grad,) = torch.autograd.grad(cls(beta=1e-5)(moved, layout).per_item.sum(), x)
    (uniform,) = torch.autograd.grad(UniformMLE()(replace(moved, imitation=-x), layout).per_item.sum(), x)
    torch.testing.assert_close(grad, uniform, rtol=0, atol=1e-3)


def lists_without_solutions_are_fine(cls):
    scores, layout, _ = lists_batch(33)
    lists = replace(layout.lists, gain=torch.zeros(4, 3))
    out = cls()(scores, lists)
    out.loss.backward()
    assert out.loss == 0


def the_bound_is_tight_at_the_true_ratio(divergence):
    """On a small space the minimum is minus the divergence, at policy == data."""

    def identity(cls):
        g = torch.Generator().manual_seed(7)
        p, q = (torch.rand(5, generator=g, dtype=DOUBLE).softmax(0) for _ in range(2))
        rho = (p / q).log().requires_grad_()
        # Five data and five samples of the reference, weighed by their probabilities.
        scores = Scores.tokens(rho.repeat(2) - 3, torch.full((10,), -3.0, dtype=DOUBLE))
        items = Items(index=torch.arange(10), label=torch.tensor([1.0] * 5 + [0.0] * 5), weight=5 * torch.cat([p, q]))
        loss = cls(divergence=divergence)(scores, items).loss
        u = p / q
        f = {"kl": u * u.log(), "pearson_chi2": (u - 1) ** 2, "squared_hellinger": (u**0.5 - 1) ** 2}[divergence]
        torch.testing.assert_close(loss, -(q * f).sum())
        (grad,) = torch.autograd.grad(loss, rho)
        torch.testing.assert_close(grad, torch.zeros(5, dtype=DOUBLE), rtol=0, atol=1e-12)

    return identity


def f_start(cls_slope, value=0.0):
    def batch():
        items = Items(index=torch.arange(2), label=torch.tensor([1.0, 0.0]))
        return at_start(2), Layout(items=items), {}

    return Start(value, cls_slope, batch)


def f_case(divergence, name, slope, mutations):
    return Case(
        name=name,
        objective=FDivergenceSFT,
        make=lambda cls: cls(divergence=divergence),
        batch=f_batch,
        formula=f_formula(divergence),
        start=f_start([-2 * slope, 2 * slope]) if divergence != "kl" else "data and samples start at -2 and 2",
        identities=[the_bound_is_tight_at_the_true_ratio(divergence)],
        mutations=mutations,
        kinds=ALL[:2],
    )


CASES = [
    Case(
        objective=RFT,
        make=lambda cls: cls(threshold=0.4),
        batch=groups_batch,
        formula=accepted_formula(lambda groups: groups.reward[:, 0] > 0.4),
        start=Start(
            0.7,
            [-0.1, 0.0],
            lambda: (
                at_start(2, length=(10, 10)),
                Layout(
                    groups=Groups(index=torch.arange(2), group=torch.zeros(2).long(), reward=torch.tensor([1.0, 0.0]))
                ),
                {},
            ),
        ),
        identities=[it_is_sft_on_the_accepted(0.5), no_sample_above_is_fine],
        mutations=[
            ("total_reward(groups.reward) > self.threshold", "total_reward(groups.reward) < self.threshold"),
            ("total_reward(groups.reward) > self.threshold", "total_reward(groups.reward) > -self.threshold"),
            ("return LossOut(row_loss(", "return LossOut(-row_loss("),
        ],
        kinds=ALL,
    ),
    Case(
        objective=RAFT,
        make=lambda cls: cls(),
        batch=groups_batch,
        formula=accepted_formula(first_best),
        start=Start(
            0.7,
            [-0.1, 0.0],
            lambda: (
                at_start(2, length=(10, 10)),
                Layout(groups=Groups(index=torch.arange(2), group=torch.zeros(2).long(), reward=torch.ones(2))),
                {},
            ),
        ),
        identities=[one_sample_per_prompt, no_sample_above_is_fine],
        mutations=[
            ("reward[None, :] > reward[:, None]", "reward[None, :] < reward[:, None]"),
            ("place[None, :] < place[:, None]", "place[None, :] > place[:, None]"),
            ("same & better", "better"),
            ("& (reward > self.threshold)", ""),
        ],
        kinds=ALL,
    ),
    Case(
        objective=MML,
        make=lambda cls: cls(),
        batch=lists_batch,
        formula=mml_formula(1.0),
        start=Start(7 - math.log(2), [-0.5, -0.5], lists_start),
        identities=[
            one_solution_is_its_likelihood,
            small_powers_weigh_all_solutions_alike,
            lists_without_solutions_are_fine,
        ],
        mutations=[
            ("loss = -s.masked_fill", "loss = s.masked_fill"),
            ("lists.gain > 0", "lists.gain >= 0"),
            ("loss.masked_fill(~some, 0.0)", "loss"),
        ],
        kinds=ALL[:2],
    ),
    Case(
        name="mml tempered",
        objective=MML,
        make=lambda cls: cls(beta=0.25),
        batch=lists_batch,
        formula=mml_formula(0.25),
        start=Start(7 - 4 * math.log(2), [-0.5, -0.5], lists_start),
        identities=[small_powers_weigh_all_solutions_alike],
        mutations=[(".logsumexp(1) / self.beta", ".logsumexp(1)"), ("s = self.beta * scores", "s = scores")],
        kinds=ALL[:2],
    ),
    Case(
        objective=UniformMLE,
        make=lambda cls: cls(),
        batch=lists_batch,
        formula=uniform_formula,
        start=Start(7.0, [-0.5, -0.5], lists_start),
        identities=[one_solution_is_its_likelihood, lists_without_solutions_are_fine],
        mutations=[
            ("loss = masked_mean(", "loss = -masked_mean("),
            ("loss = masked_mean(", "loss = 2 * masked_mean("),
            ("lists.gain > 0", "lists.gain >= 0"),
        ],
        kinds=ALL,
    ),
    f_case(
        "squared_hellinger",
        "",
        0.5,
        [
            ("data, -term", "data, term"),
            ("~data, conjugate", "~data, 2 * conjugate"),
            ("return -(-rho / 2).expm1(), (rho / 2)", "return (-rho / 2).expm1(), (rho / 2)"),
            ("sampled.weight * sampled.share", "sampled.share"),
        ],
    ),
    f_case("pearson_chi2", "f_sft with chi2", 2.0, [("return 2 * rho.expm1()", "return rho.expm1()")]),
    f_case("kl", "f_sft with kl", 1.0, [("return rho + 1, rho.exp()", "return rho + 1, -rho.exp()")]),
]
