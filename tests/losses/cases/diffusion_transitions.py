"""Cases of `diffalign.losses.diffusion` on groups of trajectories: DDPO, DPOK, Flow-GRPO and its kin, PRDP."""

from dataclasses import replace

import pytest
import torch
from group_cases import GROUP, INDEX, MEMBERS, same
from loss_cases import Case, Start, leaf, with_leaf

from diffalign.losses import DPO, GRPO, Groups, Kind, Layout, Pairs, Rebel, Scores
from diffalign.losses.diffusion.dance_grpo import DanceGRPO
from diffalign.losses.diffusion.ddpo import DDPO
from diffalign.losses.diffusion.dpok import DPOK
from diffalign.losses.diffusion.flow_dppo import FlowDPPO
from diffalign.losses.diffusion.flow_grpo import FlowGRPO
from diffalign.losses.diffusion.grpo_guard import GRPOGuard
from diffalign.losses.diffusion.prdp import PRDP

STEP = (Kind.STEP,)
DOUBLE = torch.float64
EXTRA = ("mean_shift", "ref_shift", "eps_shift", "std", "dt")


def batch(seed, columns=1):
    """6 trajectories of up to 4 trained steps."""
    g = torch.Generator().manual_seed(seed + 60)
    rand = lambda: torch.rand(6, 4, generator=g, dtype=DOUBLE)  # noqa: E731
    theta = rand().requires_grad_()
    old, ref = (theta.detach() + 0.3 * (rand() - 0.5) for _ in range(2))
    mask = rand() > 0.3
    mask[:, 0] = True
    extra = {name: 0.1 + rand() for name in EXTRA}
    extra["mean_shift"] = 0.1 * (rand() - 0.1).clamp(min=0)
    scores = Scores.steps(theta, ref, old, mask=mask, extra=extra)
    reward = torch.randn(6, columns, generator=g, dtype=DOUBLE)
    return scores, Layout(groups=Groups(index=INDEX, group=GROUP, reward=reward)), {}


def fresh():
    """Trajectories that the policy itself just sampled, all with advantage 1."""
    theta = torch.full((2, 3), 0.4, dtype=DOUBLE, requires_grad=True)
    still, none = theta.detach().clone(), torch.zeros(2, 3, dtype=DOUBLE)
    extra = dict.fromkeys(EXTRA, none) | {"std": none + 0.3, "dt": none + 0.5}
    scores = Scores.steps(theta, still, still.clone(), extra=extra)
    one = torch.ones(2, dtype=DOUBLE)
    return scores, Layout(groups=Groups(index=torch.arange(2), group=torch.zeros(2), reward=one, advantage=one)), {}


def standardised(r, eps, unbiased):
    spread = r - r.mean()
    return torch.sqrt((spread**2).sum() / (len(r) - unbiased)) + eps


def by_group(eps=1e-4, unbiased=0, whole=False, clip=1.2):
    def compute(r):
        out = torch.zeros(6, dtype=DOUBLE)
        for members in MEMBERS:
            scale = standardised(r if whole else r[members], eps, unbiased)
            out[members] = (r[members] - r[members].mean()) / scale
        return out.clamp(-clip, clip)

    return compute


def by_round(r):
    return ((r - r.mean()) / standardised(r, 1e-6, 0)).clamp(-1.2, 1.2)


def raw(r):
    return r


def formula(advantage, term, kl=()):
    """term(log-ratio, a, extras of the step) -> loss of a step; kl: names whose product, times 0.3, is added."""

    def compute(batch, frozen):
        scores, layout, _ = batch
        u, a = scores.units, advantage(layout.groups.reward[:, 0])
        out = []
        for place, row in enumerate(INDEX.tolist()):
            steps = []
            for step in torch.nonzero(u.mask[row]).flatten().tolist():
                at = {name: x[row, step] for name, x in scores.extra.items()}
                loss = term(u.theta[row, step] - u.old[row, step], a[place], at)
                for name in kl[:1]:
                    loss = loss + 0.3 * at[name] * (at[kl[1]] if kl[1:] else 1.0)
                steps.append(loss)
            out.append(torch.stack(steps).mean())
        return torch.stack(out)

    return compute


def clip_term(d, a, at, c=0.05):
    ratio = torch.exp(d)
    return torch.max(-a * ratio, -a * torch.clamp(ratio, 1 - c, 1 + c))


def guard_term(d, a, at):
    return clip_term((d + at["mean_shift"]) * at["std"], a, at, 0.02) / at["dt"]


def mask_term(d, a, at):
    moved = (a > 0 and d > 0) or (a < 0 and d < 0)
    return 0.0 * d if at["mean_shift"] >= 0.03 and moved else -a * torch.exp(d)


def clamp_term(d, a, at):
    return -2.5 * a * torch.clamp(torch.exp(d), 0.95, 1.05)


def gradient(objective, scores, layout):
    return torch.autograd.grad(objective(scores, layout).per_item.sum(), leaf(scores), retain_graph=True)[0]


def single(theta, old, advantage, **extra):
    """Single transitions, one row each, with given advantages."""
    theta = torch.tensor(theta, dtype=DOUBLE)[:, None].requires_grad_()
    old, a = (torch.tensor(x, dtype=DOUBLE) for x in (old, advantage))
    extra = {name: torch.tensor(x, dtype=DOUBLE) for name, x in extra.items()}
    groups = Groups(index=torch.arange(len(a)), group=torch.zeros(len(a)), reward=a, advantage=a)
    return Scores.steps(theta, None, old[:, None], extra=extra), groups


def is_grpo_with_given_advantages(cls):
    scores, layout, _ = batch(1)
    given = replace(layout.groups, advantage=torch.tensor([2.0, -1.0, 0.5, -0.2, 0.0, 1.0], dtype=DOUBLE))
    same(cls(epsilon=0.05, beta=0.0)(scores, given).per_item, GRPO(epsilon=0.05)(scores, given).per_item)


def advantages_are_limited_when_they_are_used(cls):
    scores, layout, _ = batch(2)
    a = torch.tensor([7.0, -9.0, 1.0, 0.0, 5.5, -1.0], dtype=DOUBLE)
    used = cls().advantage(scores, replace(layout.groups, advantage=a))
    assert used.tolist() == [5.0, -5.0, 1.0, 0.0, 5.0, -1.0]
    assert cls(adv_clip=None).advantage(scores, replace(layout.groups, advantage=a)).tolist() == a.tolist()


def round_advantages(wanted):
    def identity(cls):
        groups = batch(3)[1].groups
        same(cls().round_advantage(groups), wanted(groups.reward[:, 0]), rtol=1e-9)

    return identity


def fresh_steps_pull_by_their_advantage(cls):
    scores, layout, _ = batch(4)
    moved = replace(scores, old=None, units=replace(scores.units, old=None))
    got = gradient(cls(beta=0.0), moved, layout)[INDEX]
    a = cls().advantage(scores, layout.groups)
    mask = scores.units.mask[INDEX]
    same(got, (-a / mask.sum(1))[:, None] * mask)


def divergences_of_steps(cls):
    """Exact, times dt, of predictions, and sampled, all outside of the clip."""
    scores, layout, _ = batch(5)
    mask, x = scores.units.mask, scores.extra
    wanted = {"exact": x["ref_shift"], "code": x["ref_shift"] * x["dt"], "eps": x["eps_shift"]}
    none = cls(beta=0.0)(scores, layout).per_item
    for form, kl in wanted.items():
        got = cls(beta=0.5, kl_form=form)(scores, layout).per_item - none
        same(got, 0.5 * ((kl * mask).sum(1) / mask.sum(1))[INDEX])
    d = scores.units.ref - scores.units.theta
    ratio = torch.exp(scores.units.theta - scores.units.old)
    k3 = (torch.exp(d) - d - 1) * ratio
    got = cls(beta=0.5, kl_form="sampled")(scores, layout).per_item - none
    same(got, 0.5 * ((k3 * mask).sum(1) / mask.sum(1))[INDEX])
    assert set(cls(beta=0.0).needs.extra) <= {"mean_shift", "std", "dt"}
    assert "eps_shift" in cls(beta=0.5, kl_form="eps").needs.extra


def numbers_of_steps_may_come_per_transition(cls):
    scores, groups = single([0.1, 0.2], [0.0, 0.2], [1.0, -1.0], ref_shift=[0.3, 0.4], dt=[0.5, 0.1])
    out = cls(beta=1.0)(scores, groups)
    same(out.metrics["kl"], torch.tensor([0.15, 0.04], dtype=DOUBLE))
    with pytest.raises(ValueError, match=r"expected \(2, 1\), one per step"):
        cls(beta=1.0)(replace(scores, extra=scores.extra | {"dt": torch.ones(3)}), groups)


def given_clip(cls):
    """A step beyond the band has no gradient where its advantage asked for it, and keeps it where not."""
    scores, groups = single([0.3, 0.3, -0.3, -0.3], [0.0] * 4, [1.0, -1.0, 1.0, -1.0])
    assert gradient(cls(epsilon=0.1, beta=0.0), scores, groups).flatten().ne(0).tolist() == [False, True, True, False]


def beyond_the_band_nothing_pulls_on_either_side(cls):
    scores, groups = single([0.3, 0.3, -0.3, -0.3, 0.05], [0.0] * 5, [1.0, -1.0, 1.0, -1.0, 1.0])
    got = gradient(cls(epsilon=0.1, beta=0.0), scores, groups).flatten()
    assert got.ne(0).tolist() == [False, False, False, False, True]
    same(got[4], -100 * torch.exp(torch.tensor(0.05, dtype=DOUBLE)))


def rewards_are_taken_as_they_are(cls):
    scores, layout, _ = batch(6)
    assert cls().advantage(scores, layout.groups).tolist() == layout.groups.reward[:, 0].tolist()


# -- grpo_guard, flow_dppo -------------------------------------------------------------------------------------------


def gaussian(seed, std=0.3, dt=0.2, size=0.02):
    """Steps x = mu_old + std xi of 50 elements, as a function of the policy's mean."""
    g = torch.Generator().manual_seed(seed)
    mu_old, xi, delta = (torch.randn(4, 50, generator=g, dtype=DOUBLE) for _ in range(3))
    mu = (mu_old + size * delta).requires_grad_()
    x = mu_old + std * xi
    logp = lambda mean: (-((x - mean) ** 2) / (2 * std**2)).mean(1, keepdim=True)  # noqa: E731
    shift = ((mu - mu_old) ** 2).mean(1, keepdim=True) / (2 * std**2)
    ones = torch.ones(4, 1, dtype=DOUBLE)
    extra = {"mean_shift": shift, "std": std * ones, "dt": dt * ones}
    a = torch.tensor([1.0, -0.5, 2.0, -1.0], dtype=DOUBLE)
    groups = Groups(index=torch.arange(4), group=torch.zeros(4), reward=a, advantage=a)
    return mu, (xi * (mu - mu_old)).mean(1), Scores.steps(logp(mu), None, logp(mu_old).detach(), extra=extra), groups


def the_ratio_is_the_mean_of_noise_times_shift(cls):
    """(log p - log p_old + M[d^2] / (2 std^2)) std = M[xi d], in value and in gradient: whatever std is."""
    for std in (0.05, 0.3, 2.0):
        mu, centred, scores, groups = gaussian(7, std)
        out = cls(epsilon=5.0)(scores, groups)
        same(out.metrics["ratio"], centred.exp().detach(), rtol=1e-9)
        wanted = -groups.advantage * centred.exp() / 0.2
        same(out.per_item, wanted, rtol=1e-9)
        one, other = (torch.autograd.grad(x.sum(), mu, retain_graph=True)[0] for x in (out.per_item, wanted))
        same(one, other, rtol=1e-7)
        unweighed = cls(epsilon=5.0, reweight=False)
        same(unweighed(scores, groups).per_item, 0.2 * wanted, rtol=1e-9)
        assert unweighed.needs.extra == ("mean_shift", "std")


def all_steps_of_flow_grpo_weigh_the_same(cls):
    """|d mu / d v| / std of Flow-GRPO's steps differs 30 times between them; after std and 1 / dt it is 1 + a^2 / 2."""
    a, sigma = 0.7, torch.tensor([0.9601, 0.7073, 0.2780, 0.0089], dtype=DOUBLE)
    t, dt = sigma[:-1], sigma[:-1] - sigma[1:]
    s = a * (t / (1 - t)).sqrt()
    slope = dt * (1 + s**2 * (1 - t) / (2 * t))  # of the step's mean in the velocity
    std, v = s * dt.sqrt(), torch.zeros(3, dtype=DOUBLE, requires_grad=True)
    x = std * 1.0  # mu_old = 0, xi = 1
    logp = lambda mean: -((x - mean) ** 2) / (2 * std**2)  # noqa: E731
    extra = {"mean_shift": (slope * v)[:, None] ** 2 / (2 * std[:, None] ** 2), "std": std, "dt": dt}
    scores = Scores.steps(logp(slope * v)[:, None], None, logp(0 * v.detach())[:, None], extra=extra)
    one = torch.ones(3, dtype=DOUBLE)
    groups = Groups(index=torch.arange(3), group=torch.zeros(3), reward=one, advantage=one)
    grad = torch.autograd.grad(cls()(scores, groups).per_item.sum(), v)[0]
    same(grad, torch.full((3,), -(1 + a**2 / 2), dtype=DOUBLE), rtol=1e-9)


def weights_of_units_stay(cls):
    scores, layout, _ = batch(8)
    half = replace(scores, units=replace(scores.units, weight=torch.full((6, 4), 0.5, dtype=DOUBLE)))
    same(cls()(half, layout).per_item, 0.5 * cls()(scores, layout).per_item)


def only_steps_that_went_far_the_wanted_way_are_masked(cls):
    d = [0.1, -0.1, 0.1, -0.1, 0.1, 0.0]
    scores, groups = single(
        d, [0.0] * 6, [1.0, 1.0, -1.0, -1.0, 1.0, 1.0], mean_shift=[1e-4, 1e-4, 1e-4, 1e-4, 1e-6, 1e-4]
    )
    keep = [False, True, True, False, True, True]
    assert gradient(cls(), scores, groups).flatten().ne(0).tolist() == keep
    assert cls()(scores, groups).metrics["masked_frac"].tolist() == [1.0 - k for k in keep]
    scores, groups = single([0.1], [0.0], [1.0], mean_shift=[1e-5])
    assert cls()(scores, groups).per_item.item() == 0.0, "at the threshold"


def at_the_sampling_policy_all_is_kept(cls):
    scores, layout, _ = batch(9)
    u = scores.units
    moved = with_leaf(scores, u.old.detach().clone().requires_grad_())
    a = cls().advantage(scores, layout.groups)
    same(cls()(moved, layout).per_item, -a)


# -- prdp ------------------------------------------------------------------------------------------------------------


def prdp_formula(beta=0.5, c=0.05, ties="keep", mean=True):
    def compute(batch, frozen):
        scores, layout, _ = batch
        u, reward = scores.units, layout.groups.reward.sum(1)
        free, near = [], []
        for row in INDEX.tolist():
            keep = u.mask[row]
            rho, rho_old = (x[row][keep] - u.ref[row][keep] for x in (u.theta, u.old))
            clipped = torch.min(torch.max(rho, rho_old - c), rho_old + c)
            size = len(rho) if mean else 1
            free.append(rho.sum() / size)
            near.append(clipped.sum() / size)
        out = torch.zeros(6, dtype=DOUBLE)
        for members in MEMBERS:
            pairs = [(i, j) for i in members for j in members if i < j and (ties == "keep" or reward[i] != reward[j])]
            for i, j in pairs:
                gap = (reward[i] - reward[j]) / beta
                loss = torch.max((free[i] - free[j] - gap) ** 2, (near[i] - near[j] - gap) ** 2)
                share = loss * len(members) / (2 * len(pairs))
                out = out.index_add(0, torch.tensor([i, j]), torch.stack([share, share]))
        return out

    return compute


def tied(seed):
    scores, layout, _ = batch(seed)
    reward = torch.tensor([1.0, 1.0, 0.0, 0.0, 2.0, 1.0], dtype=DOUBLE)
    return scores, Layout(groups=replace(layout.groups, reward=reward)), {}


def pair_of(q, rewards, old=None, beta=0.5, **settings):
    """Two trajectories of one step: loss and gradient."""
    theta = torch.tensor(q, dtype=DOUBLE)[:, None].requires_grad_()
    before = theta.detach().clone() if old is None else torch.tensor(old, dtype=DOUBLE)[:, None]
    scores = Scores.steps(theta, torch.zeros(2, 1, dtype=DOUBLE), before)
    groups = Groups(index=torch.arange(2), group=torch.zeros(2), reward=torch.tensor(rewards, dtype=DOUBLE))
    return lambda cls: (lambda out: (out.loss, torch.autograd.grad(out.loss, theta)[0][:, 0]))(
        cls(beta=beta, epsilon=0.1, **settings)(scores, groups)
    )


def nothing_is_left_where_the_differences_are_right(cls):
    loss, grad = pair_of([0.7, 0.1], [1.0, 0.7])(cls)
    same(loss, torch.zeros((), dtype=DOUBLE))
    assert not grad.abs().gt(1e-9).any()


def constants_in_rewards_cancel(cls):
    scores, layout, _ = batch(10)
    shift = torch.where(GROUP == 7, 3.0, -2.0)[:, None]
    moved = replace(layout.groups, reward=layout.groups.reward + shift)
    same(cls(beta=0.5)(scores, moved).per_item, cls(beta=0.5)(scores, layout).per_item, rtol=1e-7)


def the_first_gradient_is_that_of_dpo_times_the_difference(cls):
    """-2 dR / beta for i and its negative for j; DPO's at zero margin is -beta / 2."""
    _, grad = pair_of([0.0, 0.0], [1.0, 0.7])(cls)
    same(grad, torch.tensor([-1.2, 1.2], dtype=DOUBLE))
    theta = torch.zeros(2, dtype=DOUBLE, requires_grad=True)
    dpo = DPO(beta=1.0)(Scores.steps(theta, torch.zeros(2)), Pairs.halves(1)).loss
    same(grad, 2.4 * torch.autograd.grad(dpo, theta)[0])


def the_clip_stops_what_goes_on_and_lets_come_back(cls):
    still = [0.0, 0.0]
    _, further = pair_of([0.3, -0.3], [1.0, 0.0], old=still)(cls)  # 0.6 of 2, and already out of the band
    assert not further.any()
    _, back = pair_of([0.3, -0.3], [0.01, 0.0], old=still)(cls)  # 0.6 of 0.02: too far
    assert back.ne(0).all()
    assert back[0] > 0
    same(pair_of([0.3, -0.3], [1.0, 0.0], old=still)(cls)[0], torch.tensor((0.2 - 2.0) ** 2, dtype=DOUBLE))


def without_the_clip_it_is_rebel(cls):
    scores, layout, _ = batch(11)
    whole = replace(scores, units=replace(scores.units, old=None))
    got = cls(beta=0.5, epsilon=1e3, step_reduction="sum")(whole, layout).per_item
    same(got.mean(), 4 * Rebel(beta=0.5)(scores, layout).loss, rtol=1e-9)


def missing_rewards_and_lonely_rows_count_nothing(cls):
    scores, layout, _ = batch(12)
    reward = layout.groups.reward.clone()
    reward[0] = float("nan")
    out = cls(beta=0.5)(scores, replace(layout.groups, reward=reward)).per_item
    assert out[0] == 0
    assert torch.isfinite(out).all()
    lonely = cls(beta=0.5)(scores, replace(layout.groups, group=torch.arange(6)))
    assert not lonely.per_item.any()
    assert lonely.loss.requires_grad


COMMON = {"batch": batch, "kinds": STEP}
CLIP = ("ratio, rollout.advantage, *self", "ratio, -rollout.advantage, *self")
WIDER = ("return self.epsilon, self.epsilon", "return 2 * self.epsilon, self.epsilon")
LIMIT = ("a.clamp(-self.adv_clip, self.adv_clip)", "a")
KL = [
    ("return self.beta * self.reduce(kl", "return -self.beta * self.reduce(kl"),
    ("first * rest[0] if rest", "first if rest"),
]

CASES = [
    Case(
        **COMMON,
        objective=DDPO,
        make=lambda cls: cls(epsilon=0.05, adv_clip=1.2, beta=0.3),
        formula=formula(by_round, clip_term, ("ref_shift",)),
        start=Start(-1.0, [-1.0, -1.0], fresh),
        identities=[
            round_advantages(lambda r: (r - r.mean()) / standardised(r, 1e-6, 0)),
            is_grpo_with_given_advantages,
            advantages_are_limited_when_they_are_used,
            fresh_steps_pull_by_their_advantage,
            divergences_of_steps,
            given_clip,
        ],
        mutations=[
            CLIP,
            WIDER,
            LIMIT,
            KL[0],
            ('"eps": 1e-6', '"eps": 1e-2'),
            ('self.center == "none" and', "False and"),
        ],
    ),
    Case(
        **COMMON,
        objective=FlowGRPO,
        make=lambda cls: cls(epsilon=0.05, adv_clip=1.2, beta=0.3),
        formula=formula(by_group(whole=True), clip_term, ("ref_shift", "dt")),
        start=Start(-1.0, [-1.0, -1.0], fresh),
        identities=[
            round_advantages(by_group(whole=True, clip=9.0)),
            is_grpo_with_given_advantages,
            advantages_are_limited_when_they_are_used,
            fresh_steps_pull_by_their_advantage,
            divergences_of_steps,
            numbers_of_steps_may_come_per_transition,
            given_clip,
        ],
        mutations=[CLIP, WIDER, LIMIT, *KL, ('"unbiased": False', '"unbiased": True')],
    ),
    Case(
        **COMMON,
        objective=DanceGRPO,
        make=lambda cls: cls(epsilon=0.05, adv_clip=1.1),
        formula=formula(by_group(eps=1e-8, unbiased=1, clip=1.1), clip_term),
        start=Start(-1.0, [-1.0, -1.0], fresh),
        identities=[
            round_advantages(by_group(eps=1e-8, unbiased=1, clip=9.0)),
            is_grpo_with_given_advantages,
            fresh_steps_pull_by_their_advantage,
            divergences_of_steps,
            given_clip,
        ],
        mutations=[CLIP, WIDER, LIMIT, ('"eps": 1e-8', '"eps": 1e-4'), ('"unbiased": True', '"unbiased": False')],
    ),
    Case(
        **COMMON,
        objective=DPOK,
        make=lambda cls: cls(epsilon=0.05, reward_weight=2.5, beta=0.3),
        formula=formula(raw, clamp_term, ("eps_shift",)),
        start=Start(-2.5, [-2.5, -2.5], fresh),
        identities=[
            beyond_the_band_nothing_pulls_on_either_side,
            rewards_are_taken_as_they_are,
            divergences_of_steps,
        ],
        mutations=[
            ("return -self.reward_weight", "return self.reward_weight"),
            ("-self.reward_weight * rollout", "-rollout"),
            ("clamp(1 - self.epsilon, 1 + self.epsilon)", "clamp(1 - self.epsilon)"),
            KL[0],
        ],
    ),
    Case(
        **COMMON,
        objective=GRPOGuard,
        make=lambda cls: cls(epsilon=0.02, adv_clip=1.2, scale_rewards="group", beta=0.3),
        formula=formula(by_group(), guard_term, ("ref_shift", "dt")),
        start=Start(-2.0, [-0.6, -0.6], fresh),
        identities=[
            the_ratio_is_the_mean_of_noise_times_shift,
            all_steps_of_flow_grpo_weigh_the_same,
            weights_of_units_stay,
            round_advantages(by_group(whole=True, clip=9.0)),
        ],
        mutations=[
            ("rollout.log_ratio + shift", "rollout.log_ratio - shift"),
            ("(rollout.log_ratio + shift) * std", "(rollout.log_ratio + shift)"),
            ('"mean_shift", index)', '"mean_shift", index).detach()'),
            ("per_length = 1 / ", "per_length = "),
            CLIP,
            *KL,
        ],
    ),
    Case(
        **COMMON,
        objective=FlowDPPO,
        make=lambda cls: cls(threshold=0.03, adv_clip=1.2, scale_rewards="group", beta=0.3),
        formula=formula(by_group(), mask_term, ("ref_shift", "dt")),
        start=Start(-1.0, [-1.0, -1.0], fresh),
        identities=[
            only_steps_that_went_far_the_wanted_way_are_masked,
            at_the_sampling_policy_all_is_kept,
            weights_of_units_stay,
            round_advantages(by_group(whole=True, clip=9.0)),
        ],
        mutations=[
            ("return -rollout.advantage * ratio", "return rollout.advantage * ratio"),
            ("far & done", "far"),
            (">= self.threshold", ">= 2 * self.threshold"),
            ("rollout.advantage > 0", "rollout.advantage < 0"),
            *KL,
        ],
    ),
    Case(
        **COMMON,
        objective=PRDP,
        make=lambda cls: cls(beta=0.5, epsilon=0.05),
        formula=prdp_formula(),
        start="its value at the start is the square of the rewards' difference; value and gradient are identities",
        identities=[
            nothing_is_left_where_the_differences_are_right,
            constants_in_rewards_cancel,
            the_first_gradient_is_that_of_dpo_times_the_difference,
            the_clip_stops_what_goes_on_and_lets_come_back,
            without_the_clip_it_is_rebel,
            missing_rewards_and_lonely_rows_count_nothing,
        ],
        mutations=[
            ("self.over_steps(x - ref, mask) - wanted", "self.over_steps(x - ref, mask) + wanted"),
            ("torch.maximum(free, clipped)", "torch.minimum(free, clipped)"),
            ("torch.maximum(free, clipped)", "free"),
            ("members / number", "2 * members / number"),
            ("else masked_mean(x, mask)", "else x.masked_fill(~mask, 0.0).sum(1)"),
            ("old - self.epsilon)", "old - 2 * self.epsilon)"),
            ("/ self.beta_for(scores.kind)", "* self.beta_for(scores.kind)"),
        ],
    ),
    Case(
        objective=PRDP,
        name="prdp, sums, without ties",
        make=lambda cls: cls(beta=0.5, epsilon=0.05, step_reduction="sum", ties="drop"),
        batch=tied,
        formula=prdp_formula(ties="drop", mean=False),
        start="its value at the start is the square of the rewards' difference; value and gradient are identities",
        identities=[constants_in_rewards_cancel],
        mutations=[("pairs &= wanted[:, None] != wanted[None]", "pass"), ('== "sum" else', '!= "sum" else')],
        kinds=STEP,
    ),
]
