"""Cases of `diffalign.losses.diffusion` on sampled images that are noised again: AWM, DGPO, CRD."""

import math
from dataclasses import replace

import torch
from group_cases import GROUP, INDEX, MEMBERS, same
from loss_cases import Case
from torch.nn.functional import softplus

from diffalign.losses import DPO, Groups, Kind, Layout, Pairs, Scores
from diffalign.losses.diffusion.awm import AWM
from diffalign.losses.diffusion.crd import CRD
from diffalign.losses.diffusion.dgpo import DGPO
from diffalign.losses.diffusion.nft import DiffusionNFT

BOUND = (Kind.BOUND,)
DOUBLE = torch.float64


def scores_of(e, old, ref, **more):
    return Scores.residuals(e, ref, old_residual=old, **more)


def batch(seed, moved=0.2):
    g = torch.Generator().manual_seed(seed + 40)
    e = 0.6 * torch.randn(6, 2, 1, 2, generator=g, dtype=DOUBLE)
    old, ref = (e + moved * torch.randn(e.shape, generator=g, dtype=DOUBLE) for _ in range(2))
    log_snr = 2 * torch.randn(6, generator=g, dtype=DOUBLE)
    reward = torch.randn(6, 1, generator=g, dtype=DOUBLE)
    groups = Groups(index=INDEX, group=GROUP, reward=reward)
    return scores_of(e.requires_grad_(), old, ref, log_snr=log_snr), Layout(groups=groups), {}


def on_policy(seed):
    """The lagged policy and the reference are the policy."""
    scores, layout, _ = batch(seed)
    still = scores.residual.detach().clone()
    return scores_of(scores.residual, still, still.clone(), log_snr=scores.log_snr), layout, {}


def mse(x):
    return (x**2).mean((-3, -2, -1))


def advantage_of(reward, clip, whole=False):
    """NumPy's deviation of the group, or of the whole round, + 1e-4."""
    r = reward[:, 0]
    out = torch.zeros(6, dtype=DOUBLE)
    for members in MEMBERS:
        centred = r[members] - r[members].mean()
        spread = r - r.mean() if whole else centred
        out[members] = centred / (torch.sqrt((spread**2).mean()) + 1e-4)
    return out.clamp(-clip, clip)


def gradient(objective, scores, layout):
    out = objective(scores, layout)
    return torch.autograd.grad(out.per_item.sum(), scores.residual, retain_graph=True)[0]


def rounds_are_centred_by_group_and_divided_by_the_round(cls):
    scores, layout, _ = batch(21)
    wanted = advantage_of(layout.groups.reward, 9.0, whole=True)
    same(cls().round_advantage(layout.groups), wanted, rtol=1e-7)
    given = replace(layout.groups, advantage=torch.tensor([9.0, -9.0, 0.0, 2.0, -2.0, 0.5], dtype=DOUBLE))
    assert cls().advantage(scores, given).tolist() == [5.0, -5.0, 0.0, 2.0, -2.0, 0.5]


# -- awm -------------------------------------------------------------------------------------------------------------


def awm_likelihood(form, d, t):
    return {
        "plain": -d,
        "t": -t * d,
        "t2": -t * t * d,
        "huber": -t * (torch.sqrt(d + 1e-10) - 1e-5),
        "ghuber": -t / 0.25 * (torch.pow(d + 1e-10, 0.25) - 10**-2.5),
    }[form]


def awm_formula(form="ghuber", old=False, clip=1.2, kl=0.3, ema=0.7, eps=1.0):
    def compute(batch, frozen):
        scores, layout, _ = batch
        a = advantage_of(layout.groups.reward, clip) / clip
        out = []
        for place, row in enumerate(INDEX.tolist()):
            t = 1 / (1 + torch.exp(scores.log_snr[row] / 2))
            e, still, before, ref = (
                x[row] for x in (scores.residual, frozen[0].residual, scores.old_residual, scores.ref_residual)
            )
            base = before if old else still
            r = torch.exp(awm_likelihood(form, mse(e), t) - awm_likelihood(form, mse(base), t))
            loss = -torch.min(r * a[place], torch.clamp(r, 1 - eps, 1 + eps) * a[place])
            out.append(loss + kl * mse(e - ref) + ema * mse(e - before))
        return torch.stack(out)

    return compute


def on_policy_it_is_regression_with_signed_weights(cls):
    scores, layout, _ = on_policy(1)
    a = advantage_of(layout.groups.reward, 5.0, whole=True)[INDEX.argsort()] / 5
    t = 1 / (1 + torch.exp(scores.log_snr / 2))
    for form, weight in (("plain", torch.ones(6, dtype=DOUBLE)), ("t", t), ("t2", t**2)):
        wanted = torch.autograd.grad((a * weight * mse(scores.residual)).sum(), scores.residual)[0]
        same(gradient(cls(form=form, beta=0.0, ema_kl=0.0), scores, layout), wanted, rtol=1e-7)


def forms_meet(cls):
    d, t = torch.tensor([0.0, 0.01, 0.7], dtype=DOUBLE), torch.tensor([0.3, 1.0, 0.6], dtype=DOUBLE)
    same(cls(power=1.0).likelihood(d, t), cls(form="t").likelihood(d, t), atol=1e-15)
    same(cls(power=0.5).likelihood(d, t), 2 * cls(form="huber").likelihood(d, t))
    same(cls(form="t").likelihood(d, t), t * cls(form="plain").likelihood(d, None))
    assert cls().likelihood(d, t)[0] == 0


def the_noise_level_is_that_of_flow_matching(cls):
    t = torch.tensor([0.1, 0.5, 0.9, 0.2, 0.7, 1.0], dtype=DOUBLE)
    scores, layout, _ = on_policy(2)
    made = scores_of(scores.residual, None, None, log_snr=2 * ((1 - t) / t).log())
    plain, weighed = (gradient(cls(form=form, beta=0.0, ema_kl=0.0), made, layout) for form in ("plain", "t"))
    same(weighed, t.view(-1, 1, 1, 1) * plain)


def what_is_not_needed_is_not_asked_for(cls):
    assert cls().needs == cls.needs
    alone = cls(ema_kl=0.0, beta=0.0, form="plain")
    assert (alone.needs.old, alone.needs.log_snr, alone.reads_reference()) == (False, False, False)
    assert cls(ema_kl=0.0, ratio_to="old").needs.old
    scores, layout, _ = batch(3)
    bare = Scores.residuals(scores.residual)
    same(alone(bare, layout).per_item, -alone.advantage(bare, layout.groups) / 5)


def awm(**settings):
    return lambda cls: cls(scale_rewards="group", adv_clip=1.2, beta=0.3, ema_kl=0.7, **settings)


# -- dgpo ------------------------------------------------------------------------------------------------------------


def dgpo_formula(b=3.0, c=0.02, clip=1.2, kl=0.3):
    def compute(batch, frozen):
        scores, layout, _ = batch
        a = advantage_of(layout.groups.reward, clip)
        still = frozen[0].residual
        out = [torch.zeros(())] * 6
        for members in MEMBERS:
            total = 0.0
            for place in members:
                row = INDEX[place]
                total += a[place] * b * (mse(still[row]) - mse(scores.ref_residual[row])) / len(members)
            u = 1 / (1 + math.exp(-float(total)))
            for place in members:
                row = INDEX[place]
                ratio = float(torch.exp(mse(scores.old_residual[row]) - mse(still[row])))
                stopped = ratio > 1 + c if a[place] > 0 else ratio < 1 - c
                d = mse((still if stopped else scores.residual)[row])
                out[place] = u * a[place] * d + kl * mse(scores.residual[row] - scores.ref_residual[row])
        return torch.stack(out)

    return compute


def at_the_reference_half_of_the_advantage_is_taught(cls):
    scores, layout, _ = on_policy(4)
    a = advantage_of(layout.groups.reward, 5.0)[INDEX.argsort()]
    wanted = torch.autograd.grad((a * mse(scores.residual)).sum() / 2, scores.residual, retain_graph=True)[0]
    same(gradient(cls(), scores, layout), wanted, rtol=1e-7)


def its_gradient_is_that_of_the_group_logistic(cls):
    """-log sigma(-S), without its factor b."""
    scores, layout, _ = batch(5)
    for b in (0.5, 7.0):
        objective, total = cls(dgpo_beta=b, epsilon=None, beta=0.0), 0.0
        a = advantage_of(layout.groups.reward, 5.0)
        for members in MEMBERS:
            rows = INDEX[members]
            gap = mse(scores.residual[rows]) - mse(scores.ref_residual[rows])
            total = total + softplus((a[members] * b * gap).sum() / 3) / b
        wanted = torch.autograd.grad(total, scores.residual, retain_graph=True)[0]
        same(gradient(objective, scores, layout) / 3, wanted, rtol=1e-7)


def two_images_are_diffusion_dpo(cls):
    g = torch.Generator().manual_seed(6)
    e = torch.randn(2, 1, 2, 2, generator=g, dtype=DOUBLE).requires_grad_()
    scores = Scores.residuals(e, 0.8 * e.detach())
    groups = Groups(
        index=torch.arange(2), group=torch.zeros(2), reward=torch.ones(2), advantage=torch.tensor([1.0, -1.0])
    )
    mine = torch.autograd.grad(cls(dgpo_beta=4.0, epsilon=None, beta=0.0)(scores, groups).loss, e, retain_graph=True)[0]
    same(4 * mine, torch.autograd.grad(DPO(beta=4.0)(scores, Pairs.halves(1)).loss, e)[0])


def what_has_moved_far_enough_stops(cls):
    """Better images whose error fell, worse ones whose error rose; not those that went the other way."""
    e = torch.full((4, 1, 1, 1), 0.5, dtype=DOUBLE).requires_grad_()
    old = torch.tensor([0.8, 0.2, 0.2, 0.8], dtype=DOUBLE).view(4, 1, 1, 1)  # its error fell, rose, rose, fell
    a = torch.tensor([1.0, 1.0, -1.0, -1.0])
    groups = Groups(index=torch.arange(4), group=torch.zeros(4), reward=a, advantage=a)
    scores = scores_of(e, old, e.detach().clone())
    assert gradient(cls(), scores, groups).flatten().ne(0).tolist() == [False, True, False, True]
    assert cls()(scores, groups).metrics["clip_frac"].tolist() == [1.0, 0.0, 1.0, 0.0]
    assert gradient(cls(epsilon=None), scores, groups).ne(0).all()
    assert not cls(epsilon=None).needs.old


# -- crd -------------------------------------------------------------------------------------------------------------


def crd_formula(b=0.7, clip=1.2, kl=0.3, link="square", tau=None, whole=False, weighed=True):
    def likelihood(e, still):
        return -mse(e) / (max(float(still.abs().mean()), 1e-5) if weighed else 1.0)

    def compute(batch, frozen):
        scores, layout, _ = batch
        a = advantage_of(layout.groups.reward, clip)
        target = a / clip * 0.5 + 0.5

        def implicit(now):
            return torch.stack(
                [
                    likelihood(now.residual[i], frozen[0].residual[i])
                    - likelihood(scores.old_residual[i], scores.old_residual[i])
                    for i in INDEX.tolist()
                ]
            )

        r, still = implicit(scores), implicit(frozen[0])
        out = torch.zeros(6, dtype=DOUBLE)
        signs = (0.0,) if tau is None else (1 / tau, -1 / tau)
        for members in [list(range(6))] if whole else MEMBERS:
            for sign in signs:
                p = torch.exp(sign * target[members])
                p = p / p.sum()
                z = b * (r[members] - (p * still[members]).sum())
                wanted = target[members] - (p * target[members]).sum()
                if link == "square":
                    loss = (z - wanted) ** 2
                else:
                    label = 1 / (1 + torch.exp(-wanted))
                    loss = label * softplus(-z) + (1 - label) * softplus(z)
                out = out.index_put((torch.tensor(members),), loss / len(signs), accumulate=True)
        least = 1e-4 / kl
        held = torch.stack([mse(scores.residual[i] - scores.ref_residual[i]) for i in INDEX.tolist()])
        return out * clip / b + kl * (least + (1 - least) * target) * held

    return compute


def crd(**settings):
    return lambda cls: cls(scale_rewards="group", adv_clip=1.2, beta=0.3, crd_beta=0.7, **settings)


def at_the_lagged_policy_it_is_the_first_step_of_diffusion_nft(cls):
    scores, layout, _ = on_policy(7)
    ones = replace(scores, to_sample=torch.ones(6, dtype=DOUBLE))
    for b in (0.3, 1.0):
        out = cls(crd_beta=b, beta=0.0)(scores, layout)
        same(out.metrics["implicit_reward"], torch.zeros(6, dtype=DOUBLE))
        a = advantage_of(layout.groups.reward, 5.0, whole=True)
        same(out.per_item.detach(), (a / 10) ** 2 * 5 / b, rtol=1e-7)
        wanted = gradient(DiffusionNFT(beta=0.0), ones, layout)
        same(gradient(cls(crd_beta=b, beta=0.0), scores, layout), wanted, rtol=1e-7)


def a_normaliser_of_the_prompt_cancels(cls):
    """The same number added to the implicit reward of all images of a prompt."""
    scores, layout, _ = batch(8)
    far = scores.old_residual.clone()
    for members, shift in zip(MEMBERS, (0.3, 1.1)):
        rows = INDEX[members]
        size = ((mse(far[rows]) + shift) / mse(far[rows])).sqrt().view(-1, 1, 1, 1)
        far[rows] = far[rows] * size
    one, other = (cls(weight="none")(replace(scores, old_residual=x), layout) for x in (scores.old_residual, far))
    same(one.per_item, other.per_item)
    assert (one.metrics["implicit_reward"] - other.metrics["implicit_reward"]).abs().min() > 0.2


def a_high_temperature_is_the_mean(cls):
    scores, layout, _ = batch(9)
    same(cls(temperature=1e7)(scores, layout).per_item, cls()(scores, layout).per_item, rtol=1e-5)
    lonely = replace(layout.groups, group=torch.zeros(6, dtype=torch.int64))
    same(cls(center_on="batch")(scores, lonely).per_item, cls()(scores, lonely).per_item)


def the_best_image_is_held_in_full(cls):
    scores, layout, _ = batch(10)
    a = torch.tensor([5.0, -5.0, 0.0, 5.0, -5.0, 0.0], dtype=DOUBLE)
    given = replace(layout.groups, advantage=a)
    none, held = (cls(beta=beta)(scores, given) for beta in (0.0, 0.1))
    got = (held.per_item - none.per_item) / held.metrics["kl"]
    same(got, torch.tensor([0.1, 1e-4, 0.05005, 0.1, 1e-4, 0.05005], dtype=DOUBLE), rtol=1e-6)


AWM_COMMON = {"objective": AWM, "batch": batch, "kinds": BOUND}
AWM_START = "its value at the start is the advantage, which differs between images; its gradient is an identity"
CRD_START = "its value at the start is the target's square, which differs between images; its gradient is an identity"

CASES = [
    Case(
        **AWM_COMMON,
        make=awm(),
        formula=awm_formula(),
        start=AWM_START,
        identities=[
            on_policy_it_is_regression_with_signed_weights,
            forms_meet,
            the_noise_level_is_that_of_flow_matching,
            what_is_not_needed_is_not_asked_for,
            rounds_are_centred_by_group_and_divided_by_the_round,
        ],
        mutations=[
            ("a = advantage.to(e) /", "a = -advantage.to(e) /"),
            ("a = advantage.to(e) / self.adv_clip", "a = advantage.to(e)"),
            ("before = now.detach()", "before = now"),
            ("SMALL**self.power) / self.power", "SMALL**self.power)"),
            ("[groups.index] / 2).sigmoid()", "[groups.index]).sigmoid()"),
            ("(-scores.need_log_snr()", "(scores.need_log_snr()"),
            ("self.ema_kl * moved", "-self.ema_kl * moved"),
            ("self.beta * kl", "-self.beta * kl"),
            ('"unbiased": False', '"unbiased": True'),
            (".clamp(-self.adv_clip, self.adv_clip)", ""),
        ],
    ),
    Case(
        **AWM_COMMON,
        name="awm, plain, against the lagged policy",
        make=awm(form="plain", ratio_to="old", epsilon=0.05),
        formula=awm_formula("plain", old=True, eps=0.05),
        start=AWM_START,
        identities=[on_policy_it_is_regression_with_signed_weights],
        mutations=[
            ("clip_surrogate(ratio, a, self.epsilon", "clip_surrogate(ratio, a, 2 * self.epsilon"),
            ("bounded_exp(now - before)", "bounded_exp(before - now)"),
        ],
    ),
    Case(
        **AWM_COMMON,
        name="awm, huber",
        make=awm(form="huber", ratio_to="old"),
        formula=awm_formula("huber", old=True),
        start=AWM_START,
        identities=[forms_meet],
        mutations=[("- SMALL**0.5", "")],
    ),
    Case(
        **AWM_COMMON,
        name="awm, t2",
        make=awm(form="t2", ratio_to="old"),
        formula=awm_formula("t2", old=True),
        start=AWM_START,
        identities=[on_policy_it_is_regression_with_signed_weights],
        mutations=[("else t**2)", "else t)")],
    ),
    Case(
        objective=DGPO,
        make=lambda cls: cls(dgpo_beta=3.0, epsilon=0.02, adv_clip=1.2, beta=0.3),
        batch=batch,
        formula=dgpo_formula(),
        start="its value at the start is half an error with the sign of the advantage; its gradient is an identity",
        identities=[
            at_the_reference_half_of_the_advantage_is_taught,
            its_gradient_is_that_of_the_group_logistic,
            two_images_are_diffusion_dpo,
            what_has_moved_far_enough_stops,
        ],
        mutations=[
            ("weight[ids] * a * error", "-weight[ids] * a * error"),
            ("weight[ids] * a * error", "weight[ids] * error"),
            ("(error - reference).detach()", "(error - reference)"),
            ("(error - reference).detach()", "(reference - error).detach()"),
            ("ids, count) / size", "ids, count)"),
            ("ratio > 1 + self.epsilon, ratio < 1", "ratio < 1 - self.epsilon, ratio > 1"),
            ("torch.where(stop, error.detach(), error)", "error"),
            ("self.beta * kl", "0.5 * self.beta * kl"),
        ],
        kinds=BOUND,
    ),
    Case(
        objective=CRD,
        make=crd(),
        batch=batch,
        formula=crd_formula(),
        start=CRD_START,
        identities=[
            at_the_lagged_policy_it_is_the_first_step_of_diffusion_nft,
            a_normaliser_of_the_prompt_cancels,
            a_high_temperature_is_the_mean,
            the_best_image_is_held_in_full,
            rounds_are_centred_by_group_and_divided_by_the_round,
        ],
        mutations=[
            ("implicit = likelihood(e) - likelihood(old)", "implicit = likelihood(old) - likelihood(e)"),
            ("self.crd_beta * (implicit -", "2 * self.crd_beta * (implicit -"),
            ("share * implicit.detach()", "share * implicit"),
            ("missed.detach().abs()", "missed.abs()"),
            ("target - group_sums(share * target, ids, count)[ids]", "target"),
            ("matched * self.adv_clip / self.crd_beta", "matched / self.crd_beta"),
            ("(least + (1 - least) * target)", "target"),
            ("self.beta * kl", "-self.beta * kl"),
        ],
        kinds=BOUND,
    ),
    Case(
        objective=CRD,
        name="crd, cross-entropy, unweighted",
        make=crd(link="bce", weight="none"),
        batch=batch,
        formula=crd_formula(link="bce", weighed=False),
        start=CRD_START,
        identities=[a_normaliser_of_the_prompt_cancels],
        mutations=[
            ("z, wanted.sigmoid()", "z, wanted"),
            ("return -mean_square(missed)\n", "return mean_square(missed)\n"),
        ],
        kinds=BOUND,
    ),
    Case(
        objective=CRD,
        name="crd, two-sided, over the batch",
        make=crd(temperature=0.4, center_on="batch"),
        batch=batch,
        formula=crd_formula(tau=0.4, whole=True),
        start=CRD_START,
        identities=[a_high_temperature_is_the_mean],
        mutations=[
            ("[target / self.temperature, -target / self.temperature]", "[target / self.temperature]"),
            ('self.center_on == "group"', 'self.center_on != "group"'),
        ],
        kinds=BOUND,
    ),
]
