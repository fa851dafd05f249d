"""Cases of `diffalign.losses.policy_gradient` per row, and of regression and negative-aware objectives."""

import math
from dataclasses import replace

import torch
from group_cases import (
    ALL,
    GROUP,
    INDEX,
    MEMBERS,
    SAMPLED,
    advantage_of,
    clip_term,
    formula,
    fresh,
    row_batch,
    row_mean,
    rows_of,
    same,
    slope,
    unit_batch,
)
from loss_cases import Case, Start, row_scores

from diffalign import losses
from diffalign.losses import Groups, Layout, Pairs, Scores
from diffalign.losses.policy_gradient import RLOO, Reinforce, ReMix
from diffalign.losses.regression import A2PO, NFT, CoPG, Rebel


def remix_formula(batch, frozen):
    scores, _, _ = batch
    base = formula(clip_term(0.2, 0.2), row_mean)(batch, frozen)
    s = scores.theta[INDEX]
    kl = 0.75 * (s - scores.ref[INDEX]) ** 2 / 2 + 0.25 * (s - scores.extra["precedent"][INDEX]) ** 2 / 2
    return base + 0.05 * kl


def loo(r):
    out = torch.zeros(6, dtype=torch.float64)
    for members in MEMBERS:
        for i in members:
            out[i] = r[i] - sum(r[j] for j in members if j != i) / (len(members) - 1)
    return out


def rloo_formula(batch, frozen):
    scores, layout, _ = batch
    r = layout.groups.reward[:, 0] - 0.05 * (scores.old - scores.ref)[INDEX]
    a, w = loo(r), torch.exp(scores.theta - scores.old)[INDEX]
    return -torch.min(w * a, torch.clamp(w, 0.8, 1.2) * a)


def reinforce_formula(batch, frozen):
    scores, layout, _ = batch
    r = layout.groups.reward[:, 0] - 0.05 * (scores.old - scores.ref)[INDEX]
    return -r * scores.theta[INDEX]


def nft_formula(normalize, floor=1.0):
    def compute(batch, frozen):
        _, layout, _ = batch
        correct = (layout.groups.reward[:, 0] > 0.5).double()
        out = []
        for i, (live, dead) in enumerate(zip(rows_of(batch), rows_of(frozen))):
            (theta, old, _), (theta0, _, _) = live, dead
            rate = correct[MEMBERS[0] if i in MEMBERS[0] else MEMBERS[1]].mean()
            omega = [1.0, 1 - rate, torch.sqrt((1 - rate) / rate)][normalize]
            if correct[i]:
                loss = old - theta
            else:
                x = (1 - rate * torch.exp(theta - old)) / (1 - rate)
                x0 = (1 - rate * torch.exp(theta0 - old)) / (1 - rate)
                loss = -torch.log(x + torch.clamp(x0, min=floor) - x0)
            out.append(6 * omega * loss.sum() / 1000 if 0 < rate < 1 else 0 * theta.sum())
        return torch.stack(out)

    return compute


def nft_batch(seed):
    scores, _, _ = unit_batch(seed, ref=False)
    reward = torch.tensor([1.0, 0, 1, 0, 0, 1], dtype=torch.float64)
    return scores, Layout(groups=Groups(index=INDEX, group=GROUP, reward=reward)), {}


def pair_formula(beta, factor):
    def compute(batch, frozen):
        scores, layout, _ = batch
        rho, r = (scores.theta - scores.ref)[INDEX], layout.groups.reward[:, 0]
        out = []
        for i in range(6):
            others = [j for j in (MEMBERS[0] if i in MEMBERS[0] else MEMBERS[1]) if j != i]
            out.append(sum(factor * ((r[i] - r[j]) - beta * (rho[i] - rho[j])) ** 2 for j in others) / len(others))
        return torch.stack(out)

    return compute


def a2po_formula(batch, frozen):
    scores, layout, _ = batch
    target = layout.groups.reward[:, 0] - scores.extra["v_star"][INDEX]
    return (0.1 * (scores.theta - scores.ref)[INDEX] - target) ** 2


def is_centred_by_the_group_times_k_over_k_minus_one(cls):
    scores, layout, _ = row_batch(14)
    a = cls(beta=0.0).advantage(scores, layout.groups)
    same(a, advantage_of(layout.groups.reward[:, 0], std=False) * 3 / 2)


def has_the_gradient_of_reinforce_with_that_baseline(cls):
    batch = row_batch(15)
    same(slope(cls(), batch), slope(Reinforce(center="loo", beta=0.05), batch))


def a_constant_reward_has_no_expected_gradient(cls):
    """Enumerating a categorical policy: the expected gradient of a constant reward is 0, that of a reward is exact."""
    logits = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    for reward in (torch.ones(3), torch.tensor([1.0, 0.0, 2.0])):
        logp = logits.log_softmax(0)
        g = Groups(index=torch.arange(3), group=torch.arange(3), reward=reward)
        loss = (logp.detach().exp() * cls()(Scores.tokens(logp), g).per_item).sum()
        expected = torch.autograd.grad(-(logits.softmax(0) * reward).sum(), logits)[0]
        same(torch.autograd.grad(loss, logits)[0], expected)


def fresh_gradient_is_that_of_the_advantages(cls):
    """normalize 1: Dr. GRPO's r - mean; normalize 2: GRPO's z-score (biased standard deviation); both over 1000."""
    scores, layout, _ = nft_batch(16)
    correct = layout.groups.reward[:, 0]
    rate = torch.tensor([1 / 3, 1 / 3, 2 / 3, 1 / 3, 2 / 3, 2 / 3], dtype=torch.float64)
    for normalize, a in ((1, correct - rate), (2, (correct - rate) / (rate * (1 - rate)).sqrt())):
        got = slope(cls(normalize=normalize), (scores, layout, {}))
        expected = torch.zeros_like(got)
        expected[INDEX] = -a[:, None] / 1000 * scores.units.mask[INDEX]
        same(got, expected)


def negative_gradient_grows_with_the_ratio(cls):
    """With the floor of 1: r R / (1 - r) wherever R > 1."""
    theta = torch.tensor([[1.0], [0.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 1, dtype=torch.bool)
    g = Groups(index=torch.arange(2), group=torch.zeros(2), reward=torch.tensor([0.0, 1.0]))
    out = cls(normalize=0, length_norm=1.0)(Scores.tokens(theta, None, torch.zeros(2, 1), mask=mask), g)
    same(out.per_item.detach(), torch.zeros(2, dtype=torch.float64))
    same(torch.autograd.grad(out.loss, theta)[0][0, 0].item(), math.e)


def groups_without_contrast_are_left_out(cls):
    scores, _, _ = nft_batch(17)
    out = cls()(scores, Groups(index=INDEX, group=GROUP, reward=torch.tensor([1.0, 1, 0, 1, 0, 0])))
    assert out.per_item.tolist() == [0.0] * 6
    assert out.metrics["used"].tolist() == [0.0] * 6
    split = replace(scores, extra={"pass_rate": torch.full((6,), 0.5)})
    assert cls()(split, Groups(index=INDEX, group=INDEX, reward=torch.ones(6))).per_item.abs().min() > 0


def gradient_is_the_contrastive_one(cls):
    """(R_b(y) - R_b(y')) grad(s - s') with R_b = R - beta rho, for a pair."""
    scores = row_scores(2, 18)
    r = torch.tensor([0.7, -0.2], dtype=torch.float64)
    out = cls(beta=0.3)(scores, Groups(index=torch.arange(2), group=torch.zeros(2), reward=r))
    got = torch.autograd.grad(out.loss, scores.theta)[0]
    rb = r - 0.3 * (scores.theta - scores.ref).detach()
    gap = rb[0] - rb[1]
    same(got, torch.stack([-gap, gap]))


def half_a_reward_is_ipo(cls):
    """dR = 1/2: beta / 2 times IPO on sums, whose square is (d rho - 1 / (2 beta))^2."""
    scores = row_scores(2, 19)
    out = cls(beta=0.3)(scores, Groups(index=torch.arange(2), group=torch.zeros(2), reward=torch.tensor([0.5, 0.0])))
    ipo = losses.IPO(beta=0.3, reduction="sum")(scores, Pairs.halves(1))
    same(out.loss, 0.15 * ipo.loss)


def is_copg_times_two_beta(cls):
    scores, layout, _ = row_batch(20)
    same(cls(beta=0.2)(scores, layout).per_item, 0.4 * CoPG(beta=0.2)(scores, layout).per_item)


def rewards_shift_freely(cls):
    scores, layout, _ = row_batch(21)
    moved = replace(layout.groups, reward=layout.groups.reward + 5)
    same(cls(beta=0.2)(scores, moved).per_item, cls(beta=0.2)(scores, layout).per_item)


def vanishes_at_the_optimal_policy(cls):
    """rho = (r - V*) / beta is the solution of the regularised problem where V* uses the same beta."""
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    r, beta = torch.tensor([1.0, 0.0, 0.4], dtype=torch.float64), 0.5
    optimal = reference * torch.exp(r / beta)
    v = beta * torch.log(optimal.sum())
    scores = Scores.tokens((optimal / optimal.sum()).log(), reference.log(), extra={"v_star": v.expand(3)})
    out = cls(beta=beta)(scores, Groups(index=torch.arange(3), group=torch.arange(3), reward=r))
    same(out.per_item, torch.zeros(3, dtype=torch.float64))


def the_two_references_mix_convexly(cls):
    batch = remix_batch(22)
    value = lambda mix: cls(beta=0.05, kl_mix=mix)(*batch).per_item  # noqa: E731
    same(value(0.25), 0.25 * value(1.0) + 0.75 * value(0.0))
    swapped = replace(batch[0], extra={"precedent": batch[0].ref})
    same(cls(kl_mix=0.2)(swapped, batch[1]).per_item, cls(kl_mix=1.0)(*batch).per_item)


def remix_batch(seed):
    scores, layout, _ = unit_batch(seed)
    g = torch.Generator().manual_seed(seed)
    precedent = scores.theta.detach() + torch.randn(6, generator=g, dtype=torch.float64)
    return replace(scores, extra={"precedent": precedent}), layout, {}


def remix_start():
    scores, layout, _ = fresh()()
    return replace(scores, extra={"precedent": scores.ref}), layout, {}


def row_start(**extra):
    def batch():
        theta = torch.full((2,), -3.0, dtype=torch.float64, requires_grad=True)
        made = {k: torch.full((2,), v) for k, v in extra.items()}
        scores = Scores.tokens(theta, theta.detach().clone(), extra=made)
        reward = torch.tensor([1.0, 0.0], dtype=torch.float64)
        return scores, Layout(groups=Groups(index=torch.arange(2), group=torch.zeros(2), reward=reward)), {}

    return batch


def rows_with_advantage_one():
    theta = torch.full((2,), -3.0, dtype=torch.float64, requires_grad=True)
    one = torch.ones(2, dtype=torch.float64)
    scores = Scores.tokens(theta, theta.detach().clone())
    return scores, Layout(groups=Groups(index=torch.arange(2), group=one, reward=one, advantage=one)), {}


CASES = [
    Case(
        objective=ReMix,
        make=lambda cls: cls(beta=0.05, kl_mix=0.75),
        batch=remix_batch,
        formula=remix_formula,
        start=Start(-1.0, [-1.0, -1.0], remix_start),
        identities=[the_two_references_mix_convexly],
        mutations=[
            ("self.kl_mix * 0.5 * base", "-self.kl_mix * 0.5 * base"),
            ("(1 - self.kl_mix) * 0.5", "(1 - self.kl_mix)"),
            ("return self.beta * kl, detached", "return 2 * self.beta * kl, detached"),
        ],
        kinds=SAMPLED,
    ),
    Case(
        objective=RLOO,
        make=lambda cls: cls(),
        batch=row_batch,
        formula=rloo_formula,
        start=Start(-1.0, [-1.0, -1.0], rows_with_advantage_one),
        identities=[
            is_centred_by_the_group_times_k_over_k_minus_one,
            has_the_gradient_of_reinforce_with_that_baseline,
        ],
        mutations=[
            ('center: Center = "loo"', 'center: Center = "mean"'),
            ("clip_surrogate(ratio, advantage, *clip)", "clip_surrogate(ratio, -advantage, *clip)"),
            ("beta: float = 0.05", "beta: float = 0.1"),
            ("return total - self.beta", "return total + self.beta"),
        ],
        kinds=SAMPLED,
    ),
    Case(
        objective=Reinforce,
        make=lambda cls: cls(beta=0.05),
        batch=row_batch,
        formula=reinforce_formula,
        start=Start(3.0, [-1.0, -1.0], rows_with_advantage_one),
        identities=[a_constant_reward_has_no_expected_gradient],
        mutations=[
            ("loss = -advantage * scores.theta", "loss = advantage * scores.theta"),
            ("loss = -advantage * scores.theta", "loss = -2 * advantage * scores.theta"),
            ("return total - self.beta", "return total + self.beta"),
        ],
        kinds=SAMPLED,
    ),
    Case(
        objective=NFT,
        make=lambda cls: cls(clamp_negative=0.8),
        batch=nft_batch,
        formula=nft_formula(1, 0.8),
        start="positive and negative rows start with opposite slopes; see the identities",
        identities=[
            fresh_gradient_is_that_of_the_advantages,
            negative_gradient_grows_with_the_ratio,
            groups_without_contrast_are_left_out,
        ],
        mutations=[
            ("loss = use * self.reduce(", "loss = -use * self.reduce("),
            ("rows * items if", "rows if"),
            ("reward > 0.5", "reward < 0.5"),
            ("rollout.log_ratio if self.ratio_type", "2 * rollout.log_ratio if self.ratio_type"),
        ],
        kinds=SAMPLED,
    ),
    Case(
        name="nft weighed as GRPO",
        objective=NFT,
        make=lambda cls: cls(normalize=2),
        batch=nft_batch,
        formula=nft_formula(2),
        start="positive and negative rows start with opposite slopes; see the identities",
        identities=[fresh_gradient_is_that_of_the_advantages],
        mutations=[("normalize=self.normalize", "normalize=1"), ("floor=self.clamp_negative", "floor=0.5")],
        kinds=SAMPLED,
    ),
    Case(
        objective=CoPG,
        make=lambda cls: cls(beta=0.2),
        batch=row_batch,
        formula=pair_formula(0.2, 2.5),
        start=Start(2.5, [-2.0, 2.0], row_start()),
        identities=[gradient_is_the_contrastive_one, half_a_reward_is_ipo, rewards_shift_freely],
        mutations=[
            (".to(z.dtype) - z", ".to(z.dtype) + z"),
            ("0.5 / beta if", "1 / beta if"),
            ("pair_squares(a, groups.group,", "pair_squares(a, 0 * groups.group,"),
        ],
        kinds=SAMPLED,
    ),
    Case(
        objective=Rebel,
        make=lambda cls: cls(beta=0.2),
        batch=row_batch,
        formula=pair_formula(0.2, 1.0),
        start=Start(1.0, [-0.8, 0.8], row_start()),
        identities=[is_copg_times_two_beta, rewards_shift_freely],
        mutations=[
            ("return 1.0", "return 2.0"),
            ("return 1.0", "return -1.0"),
            (".to(z.dtype) - z", ".to(z.dtype) + z"),
        ],
        kinds=ALL,
    ),
    Case(
        objective=A2PO,
        make=lambda cls: cls(beta=0.1),
        batch=lambda seed: row_batch(seed, v_star=lambda s, g: torch.rand(6, generator=g, dtype=torch.float64)),
        formula=a2po_formula,
        start="two rows differ in their rewards, so they have no common value; see the identity",
        identities=[vanishes_at_the_optimal_policy],
        mutations=[
            ('- scores.need_extra("v_star")', '+ scores.need_extra("v_star")'),
            ("(z - target).square()", "(z + target).square()"),
            ("(z - target).square()", "2 * (z - target).square()"),
        ],
        kinds=ALL,
    ),
]
