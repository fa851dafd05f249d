"""Cases of `diffalign.losses.diffusion` on pairs of denoising errors."""

import math
from dataclasses import replace

import pytest
import torch
from loss_cases import (
    Case,
    Start,
    better_denoising_of_winners_costs_less,
    constants_in_errors_cancel,
    equal_images_teach_nothing,
    error_scores,
    image_pairs,
    image_start,
    swapped_images_cost_the_margin_more,
)
from torch.nn.functional import relu, softplus

from diffalign.losses import DPO, EXO, Items, Kind, Layout, Pairs, Scores
from diffalign.losses.diffusion.bide_dpo import BideDPO
from diffalign.losses.diffusion.capo import CaPO
from diffalign.losses.diffusion.chats import CHATS
from diffalign.losses.diffusion.dmpo import DMPO
from diffalign.losses.diffusion.dro import DiffusionDRO
from diffalign.losses.diffusion.dual_ipo import DualIPO
from diffalign.losses.diffusion.flow_dpo import FlowDPO
from diffalign.losses.diffusion.inpo import DDIMInPO
from diffalign.losses.diffusion.pso import PSOPersonal
from diffalign.losses.diffusion.seppo import SePPO
from diffalign.losses.diffusion.smpo import SmPO
from diffalign.losses.diffusion.snpo import SNPO
from diffalign.losses.diffusion.subject_rpo import SubjectRPO

LOG2 = math.log(2)
BOUND = (Kind.BOUND,)
ALL = (Kind.TOKEN, Kind.STEP, Kind.BOUND)


def batch(seed, **more):
    return image_pairs(error_scores(8, seed), seed, **more)


def rewarded(columns=1, scale=0.05, **more):
    def make(seed):
        g = torch.Generator().manual_seed(seed + 300)
        w, l = (scale * torch.rand(4, columns, generator=g, dtype=torch.float64) for _ in range(2))
        return batch(seed, reward_w=w, reward_l=l, **more)

    return make


def noisy(make):
    """The same batch with a noise level per row."""

    def with_levels(seed):
        scores, layout, stats = make(seed)
        g = torch.Generator().manual_seed(seed + 400)
        level = 3 * torch.randn(8, generator=g, dtype=torch.float64)
        fields = {name: getattr(scores, name) for name in ("theta", "ref", "error", "imitation")}
        return Scores(kind=Kind.BOUND, log_snr=level, **fields), layout, stats

    return with_levels


def errors(batch):
    """e and e_ref of winners and losers, and the pairs."""
    scores, layout, _ = batch
    pairs, e, ref = layout.pairs, -2 * scores.theta, -2 * scores.ref
    return e[pairs.w], e[pairs.l], ref[pairs.w], ref[pairs.l], pairs


def mixed(pairs, z):
    return pairs.weight * (pairs.p * softplus(-z) + (1 - pairs.p) * softplus(z))


def close(one, other, **more):
    torch.testing.assert_close(one, other, **({"rtol": 1e-9, "atol": 1e-12} | more))


def dpo_z(batch, beta):
    w, l, rw, rl, pairs = errors(batch)
    return -beta / 2 * ((w - rw) - (l - rl)) - pairs.margin, pairs


# -- ddim_inpo, flow_dpo ---------------------------------------------------------------------------------------------


def inpo_formula(batch, frozen):
    z, pairs = dpo_z(batch, 7.0)
    return mixed(pairs, z)


def is_dpo(make, of=batch):
    def identity(cls):
        scores, layout, stats = of(2)
        loss = make(cls)
        close(loss(scores, layout, stats).per_item, DPO(beta=loss.beta)(scores, layout).per_item)

    return identity


def beta_scales_the_logit(cls):
    scores, layout, _ = batch(1)
    one, three = (cls(beta=b)(scores, layout).metrics["rewards/margins"] for b in (2.0, 6.0))
    close(three, 3 * one)


def a_vanishing_beta_costs_log_2(cls):
    scores, layout, _ = batch(1, soft=False)
    out = cls(beta=1e-12)(scores, layout)
    close(out.per_item, torch.full((4,), LOG2, dtype=torch.float64))
    assert torch.autograd.grad(out.loss, scores.theta)[0].abs().max() < 1e-11


def flow_formula(batch, frozen):
    w, l, rw, rl, pairs = errors(batch)
    level = batch[0].log_snr
    share = (1 / (1 + torch.exp(-level / 2))) ** 2  # (1 - t)^2
    z = -3.5 * ((w - rw) * share[pairs.w] - (l - rl) * share[pairs.l]) - pairs.margin
    return mixed(pairs, z)


def derived_beta_is_dpo_on_errors_of_the_noise(cls):
    """x_t = (1 - t) x_0 + t noise: the error of the noise is (1 - t) times that of the velocity (T12)."""
    g = torch.Generator().manual_seed(0)
    t = torch.tensor([0.1, 0.7, 0.1, 0.7], dtype=torch.float64)
    err, ref = (torch.randn(4, 6, generator=g, dtype=torch.float64) for _ in range(2))
    level = 2 * ((1 - t) / t).log()
    mse = lambda x: x.square().mean(1)  # noqa: E731
    velocity = Scores.denoising(mse(err), mse(ref), log_snr=level)
    noise = Scores.denoising(mse((1 - t)[:, None] * err), mse((1 - t)[:, None] * ref))
    pairs = Pairs.halves(2)
    derived = cls(beta=9.0, beta_schedule="derived")(velocity, pairs).per_item
    close(derived, DPO(beta=9.0)(noise, pairs).per_item)
    constant = cls(beta=9.0)(velocity, pairs).per_item
    assert not torch.allclose(constant, derived)


def both_schedules_agree_without_noise_and_the_derived_one_vanishes_at_its_end(cls):
    scores, layout, _ = batch(3)

    def at(level):
        return Scores.denoising(scores.error, -2 * scores.ref, log_snr=level)

    ends = torch.full((8,), torch.inf, dtype=torch.float64)
    make = lambda kind: cls(beta=9.0, beta_schedule=kind)  # noqa: E731
    close(make("derived")(at(ends), layout).per_item, make("constant")(at(ends), layout).per_item)
    gone = make("derived")(at(-ends), Pairs(w=layout.pairs.w, l=layout.pairs.l)).per_item
    close(gone, torch.full((4,), LOG2, dtype=torch.float64))


# -- smpo ------------------------------------------------------------------------------------------------------------

LOW, HIGH = 0.11543526500463486, 0.28201571106910706


def smpo_formula(batch, frozen):
    w, l, rw, rl, pairs = errors(batch)
    n_w, n_l = ((r[:, 0] - LOW) / (HIGH - LOW) for r in (pairs.reward_w, pairs.reward_l))
    p = torch.exp(n_w) / (torch.exp(n_w) + torch.exp(n_l))
    z = -3.5 * ((w - rw) - (l - rl))
    return pairs.weight * softplus(-(10 * (2 * p - 1) * z - pairs.margin))


def smpo_p_formula(batch, frozen):
    w, l, rw, rl, pairs = errors(batch)
    z = -3.5 * ((w - rw) - (l - rl))
    return pairs.weight * softplus(-(4 * (2 * pairs.p - 1) * z - pairs.margin))


def smpo_of_equal_rewards_teaches_nothing(cls):
    scores, layout, _ = batch(3, soft=False, reward_w=torch.ones(4), reward_l=torch.ones(4))
    out = cls(beta=7.0)(scores, layout)
    close(out.per_item, torch.full((4,), LOG2, dtype=torch.float64))
    assert not torch.autograd.grad(out.loss, scores.theta)[0].any()


def smpo_is_inpo_at_a_gap_of_0_2007(cls):
    """gamma (2 p - 1) = 1: gap 2 artanh(0.1) of normalised rewards."""
    gap = 2 * math.atanh(0.1)
    assert abs(gap - 0.2007) < 1e-4
    reward = torch.full((4,), gap * (HIGH - LOW), dtype=torch.float64)
    scores, layout, _ = batch(4, soft=False, reward_w=reward, reward_l=torch.zeros(4, dtype=torch.float64))
    close(cls(beta=7.0)(scores, layout).per_item, DDIMInPO(beta=7.0)(scores, layout).per_item)


def smpo_swaps_pairs_that_the_reward_ranks_the_other_way(cls):
    scores, layout, _ = rewarded(soft=False)(5)
    pairs = layout.pairs
    other = Pairs(w=pairs.l, l=pairs.w, reward_w=pairs.reward_l, reward_l=pairs.reward_w)
    close(cls(beta=7.0)(scores, pairs).per_item, cls(beta=7.0)(scores, other).per_item)


def smpo_says_where_its_factor_saturates(cls):
    """PickScore on its usual scale, 100 times the cosine, against the constants of the cosine: labels are hard again."""
    cosine = torch.tensor([0.21, 0.22, 0.20, 0.205], dtype=torch.float64), torch.full((4,), 0.2, dtype=torch.float64)
    scores, layout, _ = batch(5, soft=False, reward_w=cosine[0], reward_l=cosine[1])
    right = cls(beta=7.0)(scores, layout)
    pairs = Pairs(w=layout.pairs.w, l=layout.pairs.l, reward_w=100 * cosine[0], reward_l=100 * cosine[1])
    wrong, mended = cls(beta=7.0)(scores, pairs), cls(beta=7.0, reward_scale=0.01)(scores, pairs)
    assert wrong.metrics["saturated_frac"].tolist() == [1.0, 1.0, 0.0, 1.0]
    assert wrong.metrics["factor"].max() > 9.9
    for out in (right, mended):
        assert not out.metrics["saturated_frac"].any()
        close(out.per_item, right.per_item)
    swapped = Pairs(w=pairs.l, l=pairs.w, reward_w=pairs.reward_l, reward_l=pairs.reward_w)
    assert cls(beta=7.0)(scores, swapped).metrics["saturated_frac"].tolist() == [1.0, 1.0, 0.0, 1.0]
    assert "saturated_frac" not in cls(beta=7.0, soft_label="p")(scores, pairs).metrics


def smpo_start():
    one = torch.ones(1, dtype=torch.float64)
    return image_start(reward_w=LOW + 0.3 * (HIGH - LOW) * one, reward_l=LOW * one)


# -- seppo -----------------------------------------------------------------------------------------------------------


def seppo_formula(flip):
    def formula(batch, frozen):
        w, l, rw, rl, pairs = errors(batch)
        w0 = errors(frozen)[0]
        s = torch.sign(rw - w0)
        s = {"sign": s, "indicator": (s > 0).double(), "none": torch.ones_like(s)}[flip]
        assert (s > 0).any()
        return mixed(pairs, -3.5 * ((w - rw) - s * (l - rl)) - pairs.margin)

    return formula


def seppo_batch(seed):
    scores, layout, stats = batch(seed)
    rho = (scores.theta - scores.ref)[layout.pairs.w]
    if (rho > 0).all() or (rho < 0).all():  # both kinds of winner
        moved = scores.ref.clone()
        moved[layout.pairs.w[0]] = 2 * scores.theta[layout.pairs.w[0]].detach() - moved[layout.pairs.w[0]]
        fields = {name: getattr(scores, name) for name in ("theta", "error", "imitation")}
        scores = Scores(kind=Kind.BOUND, ref=moved, **fields)
    return scores, layout, stats


def seppo_flips_the_pull_on_the_generated_image_only(cls):
    """Winner better or worse than the reference by the same: the other sign for the generated image."""
    ref = torch.tensor([0.3, 0.3], dtype=torch.float64)
    found = []
    for winner in (0.28, 0.32):
        error = torch.tensor([winner, 0.3], dtype=torch.float64, requires_grad=True)
        found.append(torch.autograd.grad(cls(beta=7.0)(Scores.denoising(error, ref), Pairs.halves(1)).loss, error)[0])
    better, worse = found
    assert better[0] > 0
    assert worse[0] > 0
    assert better[1] < 0 < worse[1]


def seppo_without_flips_is_dpo(cls):
    scores, layout, _ = seppo_batch(3)
    close(cls(beta=7.0, flip="none")(scores, layout).per_item, DPO(beta=7.0)(scores, layout).per_item)


def seppo_at_the_reference(cls):
    """sign(0) is +1 or drops the generated image; the loss is log 2 either way."""
    for on_zero, slope in (("keep", 3.5), ("drop", 0.0)):
        scores, layout, _ = image_start()()
        out = cls(beta=7.0, on_zero=on_zero)(scores, layout)
        close(out.loss.item(), LOG2)
        (grad,) = torch.autograd.grad(out.loss, scores.theta)
        close(grad, torch.tensor([-3.5, slope], dtype=torch.float64))


# -- dmpo ------------------------------------------------------------------------------------------------------------


def dmpo_formula(a, floor=1e-6):
    def formula(batch, frozen):
        z, pairs = dpo_z(batch, 7.0)
        p = torch.sigmoid(z)
        e = max(a, floor)
        q = pairs.p * (1 - e) + (1 - pairs.p) * e
        return pairs.weight * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())

    return formula


def dmpo_at_2000(a):
    """At the default beta: errors in units of 7 / 2000."""

    def formula(batch, frozen):
        scores, layout, _ = batch
        larger = Scores.denoising(scores.error * 2000 / 7, -2 * scores.ref * 2000 / 7)
        return dmpo_formula(a)((larger, layout, {}), frozen)

    return formula


def dmpo_is_zero_where_p_is_q(cls):
    best = math.log(0.9 / 0.1)
    error = torch.tensor([0.3, 0.3 + 2 * best / 7], dtype=torch.float64, requires_grad=True)
    out = cls(beta=7.0, label_smoothing=0.1)(Scores.denoising(error, torch.full((2,), 0.3)), Pairs.halves(1))
    (grad,) = torch.autograd.grad(out.loss, error)
    torch.testing.assert_close(out.loss.item(), 0.0, rtol=0, atol=1e-7)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6)


def dmpo_is_exo(cls):
    scores, layout, _ = batch(4)
    mine = cls(beta=7.0, label_smoothing=0.05)(scores, layout).per_item
    close(mine, EXO(beta=7.0, label_smoothing=0.05)(scores, layout).per_item)


# -- snpo ------------------------------------------------------------------------------------------------------------


def chats_formula(batch, frozen):
    """The published code's: beta on whole errors, a plus between the sides."""
    e_w, e_l, ref_w, ref_l, pairs = errors(batch)
    z = -3.5 * ((e_w - ref_w) + (e_l - ref_l))
    return pairs.weight * relu(2 * pairs.p - 1) * softplus(-(z - pairs.margin))


def chats_wants_both_sides_better(cls):
    """A smaller error of either image costs less, and one side makes up for the other."""
    objective = cls(beta=7.0)
    scores, layout, _ = batch(5)
    layout = replace(layout, pairs=replace(layout.pairs, p=1.0))
    before = objective(scores, layout).per_item
    for side in (layout.pairs.w, layout.pairs.l):
        theta = scores.theta.clone()
        theta[side] += 0.1
        better = objective(replace(scores, theta=theta), layout).per_item
        assert (better < before).all()
    theta = scores.theta.clone()
    theta[layout.pairs.w] += 0.1
    theta[layout.pairs.l] -= 0.1
    torch.testing.assert_close(objective(replace(scores, theta=theta), layout).per_item, before)


def chats_leaves_out_what_is_uncertain(cls):
    scores, layout, _ = batch(5)
    full = cls(beta=7.0)(scores, replace(layout, pairs=replace(layout.pairs, p=1.0))).per_item
    for p, share in ((1.0, 1.0), (0.75, 0.5), (0.5, 0.0), (0.2, 0.0)):
        found = cls(beta=7.0)(scores, replace(layout, pairs=replace(layout.pairs, p=p))).per_item
        torch.testing.assert_close(found, share * full)


def snpo_formula(share):
    def formula(batch, frozen):
        w, l, rw, rl, pairs = errors(batch)
        d = lambda e: 7.0 / 2 * e  # noqa: E731
        mix = lambda e, r: -torch.log(share * torch.exp(-d(e)) + (1 - share) * torch.exp(-d(r))) - d(r)  # noqa: E731
        forth = -((d(w) - d(rw)) - mix(l, rl)) - pairs.margin
        back = -((d(l) - d(rl)) - mix(w, rw)) + pairs.margin
        return pairs.weight * (pairs.p * softplus(-forth) + (1 - pairs.p) * softplus(-back))

    return formula


def snpo_earns_a_bounded_reward_from_the_rejected(cls):
    error = torch.tensor([0.3, 1e4], dtype=torch.float64, requires_grad=True)
    reference = torch.full((2,), 0.3, dtype=torch.float64)
    out = cls(beta=7.0, share=0.9)(Scores.denoising(error, reference), Pairs.halves(1))
    (grad,) = torch.autograd.grad(out.loss, error)
    close(out.per_item, softplus(torch.tensor([math.log(0.1)], dtype=torch.float64)))  # z = -log(1 - share) = 2.3026
    assert grad[0] > 0
    assert grad[1] == 0, "nothing is left to be gained there"


def snpo_at_share_1_is_dpo(cls):
    scores, layout, _ = batch(2)
    close(cls(beta=7.0, share=1.0)(scores, layout).per_item, DPO(beta=7.0)(scores, layout).per_item)


# -- capo ------------------------------------------------------------------------------------------------------------


def capo_formula(weighted):
    def formula(batch, frozen):
        w, l, rw, rl, pairs = errors(batch)
        level = batch[0].log_snr
        share = 1 / (1 + torch.exp(level - 0.7)) if weighted else torch.ones_like(level)
        target = pairs.reward_w.mean(1) - pairs.reward_l.mean(1)
        z = 3.0 * (share[pairs.w] * (rw - w) - share[pairs.l] * (rl - l)) - pairs.margin
        return pairs.weight * (pairs.p * (target - z) ** 2 + (1 - pairs.p) * (target + z) ** 2)

    return formula


def capo_start():
    scores, layout, stats = image_start(
        reward_w=torch.tensor([[0.9]], dtype=torch.float64), reward_l=torch.tensor([[0.4]], dtype=torch.float64)
    )()
    fields = {name: getattr(scores, name) for name in ("theta", "ref", "error", "imitation")}
    return Scores(kind=Kind.BOUND, log_snr=torch.zeros(2, dtype=torch.float64), **fields), layout, stats


def capo_is_zero_where_margins_match(cls):
    """e_ref - e of 0.2 and -0.05, beta 2: margin 0.5, the target."""
    error = torch.tensor([0.1, 0.35], dtype=torch.float64, requires_grad=True)
    scores = Scores.denoising(error, torch.tensor([0.3, 0.3], dtype=torch.float64))
    one, other = torch.tensor([0.9], dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
    out = cls(beta=2.0, weighting="none")(scores, Pairs.halves(1, reward_w=one, reward_l=other))
    torch.testing.assert_close(out.loss.item(), 0.0, rtol=0, atol=1e-15)
    assert torch.autograd.grad(out.loss, error)[0].abs().max() < 1e-7
    beyond = cls(beta=4.0, weighting="none")(scores, Pairs.halves(1, reward_w=one, reward_l=other)).loss
    assert beyond > 0, "margins beyond the target cost again"


def capo_swaps_with_its_rewards(cls):
    scores, layout, _ = rewarded(2, 1.0, soft=False)(3)
    pairs = layout.pairs
    other = Pairs(w=pairs.l, l=pairs.w, reward_w=pairs.reward_l, reward_l=pairs.reward_w)
    loss = cls(beta=2.0, weighting="none")
    close(loss(scores, pairs).per_item, loss(scores, other).per_item)


def capo_gives_noise_more_weight(cls):
    scores, layout, _ = noisy(rewarded(1, 1.0, soft=False))(1)
    metrics = []
    for level in (-4.0, 0.0, 4.0):
        moved = Scores(
            kind=Kind.BOUND, theta=scores.theta, ref=scores.ref, log_snr=torch.full_like(scores.theta, level)
        )
        metrics.append(cls(beta=2.0)(moved, layout).metrics["rewards/margins"].abs())
    assert (metrics[0] > metrics[1]).all()
    assert (metrics[1] > metrics[2]).all()
    close(metrics[1], metrics[0] * 0.5 / torch.sigmoid(torch.tensor(4.0, dtype=torch.float64)))


# -- dro -------------------------------------------------------------------------------------------------------------


def dro_formula(form):
    def formula(batch, frozen):
        w, l, rw, rl, pairs = errors(batch)
        d = (w - rw) - (l - rl)

        def cost(d):
            return relu(d + 0.05) if form == "code" else torch.clamp(d, min=-0.05)

        both = pairs.p * cost(d + pairs.margin) + (1 - pairs.p) * cost(-d - pairs.margin)
        return pairs.weight * both

    return formula


def dro_of(form, winner, margin=None):
    def run(cls):
        error = torch.tensor([winner, 0.3], dtype=torch.float64, requires_grad=True)
        scores = Scores.denoising(error, torch.full((2,), 0.3, dtype=torch.float64))
        out = cls(margin=margin, form=form)(scores, Pairs.halves(1))
        return out.loss.item(), torch.autograd.grad(out.loss, error)[0].tolist()

    return run


def dro_stops_at_its_margin(cls):
    loss, grad = dro_of("code", 0.2995)(cls)
    close(loss, 0.0005)
    assert grad == [1.0, -1.0]
    assert dro_of("code", 0.2985)(cls) == (0.0, [0.0, 0.0])


def the_papers_form_has_the_gradient_of_the_codes_at_minus_m(cls):
    """max(m, d) is max(d - m, 0) + m."""
    for winner in (0.302, 0.3, 0.2995, 0.2985):
        (mine, grad), (other, same) = dro_of("paper", winner, None)(cls), dro_of("code", winner, None)(cls)
        close(mine, other - 0.001)
        assert grad == same
    close(dro_of("paper", 0.2985)(cls)[0], -0.001)


def the_papers_form_leaves_the_start(cls):
    """An untouched adapter, d = 0, has the hinge's gradient at every margin that is allowed, 0 included."""
    for margin in (None, -0.05, 0.0):
        assert dro_of("paper", 0.3, margin)(cls) == (0.0, [1.0, -1.0])
        scores, layout, _ = image_start()()
        assert cls(margin=margin, form="paper")(scores, layout).metrics["unsatisfied"].tolist() == [1.0]
    assert dro_of("paper", 0.2995, 0.0)(cls) == (0.0, [0.0, 0.0])


def the_reference_only_gates(cls):
    """While the hinge is active the reference's errors move the value and not the gradient."""
    error = torch.tensor([0.4, 0.3], dtype=torch.float64, requires_grad=True)
    grads = []
    for other in (0.3, 0.35):
        out = cls()(Scores.denoising(error, torch.tensor([other, 0.3], dtype=torch.float64)), Pairs.halves(1))
        grads.append((out.loss.item(), torch.autograd.grad(out.loss, error)[0].tolist()))
    close(grads[0][0] - grads[1][0], 0.05)
    assert grads[0][1] == grads[1][1] == [1.0, -1.0]


# -- pso_personal ----------------------------------------------------------------------------------------------------


def pso_personal_formula(form):
    def formula(batch, frozen):
        w, l, rw, rl, pairs = errors(batch)

        def cost(w, l, rw, rl, margin):
            if form == "hinge":
                return relu(1 + 2.0 * (w - 0.3 * l) + margin) + 0.7 * l
            return softplus(-(2.0 * ((rw - 0.3 * rl) - (w - 0.3 * l)) - margin)) + 0.7 * l

        one, other = cost(w, l, rw, rl, pairs.margin), cost(l, w, rl, rw, -pairs.margin)
        return pairs.weight * (pairs.p * one + (1 - pairs.p) * other)

    return formula


def the_shipped_negatives_have_no_gradient(cls):
    """beta eta = lambda: 1 + 5 e_w, whatever the generated images; below it they are pushed away."""
    scores, layout, _ = batch(3, soft=False)
    w, l = layout.pairs.w, layout.pairs.l
    out = cls()(scores, layout)
    close(out.per_item, 1 + 5 * scores.error[w])
    (grad,) = torch.autograd.grad(out.per_item.sum(), scores.theta, retain_graph=True)
    torch.testing.assert_close(grad[l], torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    close(grad[w], torch.full((4,), -10.0, dtype=torch.float64))
    pushed = torch.autograd.grad(cls(negative_weight=0.2)(scores, layout).per_item.sum(), scores.theta)[0]
    assert (pushed[l] > 0).all()


def the_hinge_lets_go_of_large_negative_errors(cls):
    error = torch.tensor([0.01, 4.0], dtype=torch.float64, requires_grad=True)
    out = cls()(Scores.denoising(error), Pairs.halves(1))
    (grad,) = torch.autograd.grad(out.loss, error)
    assert grad.tolist() == [0.0, 0.5]


# -- subject_rpo -----------------------------------------------------------------------------------------------------


def subject_formula(batch, frozen):
    w, l, rw, rl, pairs = errors(batch)
    k = 4.0 * ((rw - w) - (rl - l)) - pairs.margin
    return pairs.weight * (0.8 * w) + mixed(pairs, k)


def subject_starts_at_the_winners_error_and_log_2(cls):
    scores, layout, _ = image_start()()
    close(cls()(scores, layout).loss.item(), 0.3 + LOG2)


def subject_labels_are_linear(cls):
    """The loss at probability p is the mean over labels drawn with it."""
    scores, layout, _ = batch(2, soft=False)
    at = lambda p: cls()(scores, Pairs(w=layout.pairs.w, l=layout.pairs.l, p=p)).per_item  # noqa: E731
    close(at(0.3), 0.3 * at(1.0) + 0.7 * at(0.0))


def subject_without_imitation_is_dpo_at_twice_its_beta(cls):
    scores, layout, _ = batch(2)
    close(cls(beta=4.0, imitation_weight=0.0)(scores, layout).per_item, DPO(beta=8.0)(scores, layout).per_item)


# -- bide_dpo --------------------------------------------------------------------------------------------------------

ASPECT = torch.tensor([0, 1, 1, 1])


def bide_batch(**stats):
    def make(seed):
        scores, layout, _ = batch(seed, aspect=ASPECT)
        return scores, layout, {name: torch.tensor(value, dtype=torch.float64) for name, value in stats.items()}

    return make


def bide_formula(batch, frozen):
    z, pairs = dpo_z(batch, 7.0)
    loss, stats = mixed(pairs, z), batch[2]
    mean, count = stats["aspect_loss"], stats["aspect_count"]
    return torch.stack([mean[a] / mean.sum() * count.sum() / count[a] * x for a, x in zip(ASPECT.tolist(), loss)])


def bide_alone_formula(batch, frozen):
    """The batch's own means, held fixed."""
    z, pairs = dpo_z(batch, 7.0)
    still, _ = dpo_z(frozen, 7.0)
    loss, fixed = mixed(pairs, z), mixed(pairs, still)
    text, condition = fixed[:1].mean(), fixed[1:].mean()
    share = text / (text + condition)
    return torch.cat([share * 4 * loss[:1], (1 - share) * 4 / 3 * loss[1:]])


def bide_mean_is_the_published_loss(cls):
    """(L_T^2 + L_C^2) / (L_T + L_C) in value and w_a in slope, not 2 L_T / ... of a share with gradient."""
    scores, layout, _ = batch(4, aspect=ASPECT, soft=False)
    pairs = layout.pairs
    plain = DPO(beta=7.0)(scores, layout).per_item
    text, condition = plain[:1].mean(), plain[1:].mean()
    out = cls(beta=7.0)(scores, layout)
    close(out.loss, (text**2 + condition**2) / (text + condition))
    share = (text / (text + condition)).detach()
    expected = torch.autograd.grad(share * text + (1 - share) * condition, scores.theta, retain_graph=True)[0]
    close(torch.autograd.grad(out.loss, scores.theta)[0], expected)
    flipped = Pairs(w=pairs.w, l=pairs.l, aspect=1 - ASPECT)
    close(cls(beta=7.0)(scores, flipped).loss, out.loss)


def bide_of_one_aspect_is_dpo(cls):
    scores, layout, _ = batch(5, aspect=torch.zeros(4, dtype=torch.int64))
    close(cls(beta=7.0)(scores, layout).per_item, DPO(beta=7.0)(scores, layout).per_item)


def bide_estimates_over_all_processes(cls):
    """Statistics of the gathered batch: two processes together have the loss of one that holds everything."""
    objective = cls(beta=7.0)
    (s1, l1, _), (s2, l2, _) = (batch(seed, aspect=ASPECT) for seed in (1, 2))
    together = Scores.denoising(torch.cat([s1.error, s2.error]), torch.cat([-2 * s1.ref, -2 * s2.ref]))
    join = lambda f: torch.cat([getattr(l1.pairs, f), getattr(l2.pairs, f)])  # noqa: E731
    fields = {f: join(f) for f in ("p", "weight", "margin", "aspect")}
    pairs = Pairs(w=torch.cat([l1.pairs.w, l2.pairs.w + 8]), l=torch.cat([l1.pairs.l, l2.pairs.l + 8]), **fields)
    stats = objective.estimator().update(together, Layout(pairs=pairs))
    whole = objective(together, pairs)
    close(objective(together, pairs, stats).per_item, whole.per_item)
    parts = [objective(s, l, stats).per_item for s, l in ((s1, l1), (s2, l2))]
    close(torch.cat(parts).mean(), whole.loss)


# -- dual_ipo --------------------------------------------------------------------------------------------------------


def dual_batch(seed):
    scores, layout, _ = batch(seed)
    items = Items(
        index=torch.tensor([2, 5, 7]),
        label=torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64),
        weight=torch.tensor([0.5, 3.0, 2.0], dtype=torch.float64),
    )
    return scores, Layout(pairs=layout.pairs, items=items), {}


def dual_formula(batch, frozen):
    z, pairs = dpo_z(batch, 7.0)
    e = -2 * batch[0].theta
    real = (0.5 * e[2] + 2.0 * e[7]) / 2
    return mixed(pairs, z) + 0.6 * pairs.weight * e[pairs.w] + 0.4 * real


def dual_without_weights_is_dpo(cls):
    scores, layout, _ = dual_batch(2)
    mine = cls(beta=7.0, winner_weight=0.0, real_weight=0.0)(scores, layout)
    close(mine.per_item, DPO(beta=7.0)(scores, layout.pairs).per_item)


def dual_terms_add(cls):
    scores, layout, _ = dual_batch(2)
    loss = lambda a, b: cls(beta=7.0, winner_weight=a, real_weight=b)(scores, layout).per_item  # noqa: E731
    close(loss(0.6, 0.4) - loss(0.0, 0.0), (loss(0.6, 0.0) - loss(0.0, 0.0)) + (loss(0.0, 0.4) - loss(0.0, 0.0)))
    without = cls(beta=7.0)(scores, layout.pairs).per_item
    close(without, loss(1.0, 0.0))


def dual_does_not_drop_a_term_in_silence(cls):
    scores, layout, _ = dual_batch(2)
    assert cls().real_weight == 0
    with pytest.raises(ValueError, match=r"real_weight is 0.4, .* no real videos .*; set objective.real_weight: 0"):
        cls(beta=7.0, real_weight=0.4)(scores, layout.pairs)


def dual_start():
    scores, layout, _ = image_start()()
    return scores, Layout(pairs=layout.pairs, items=Items(index=torch.tensor([1]))), {}


SIGN = ("z = beta * (w - l)", "z = beta * (l - w)")
FACTOR = ("z = beta * (w - l)", "z = 0.5 * beta * (w - l)")

CASES = [
    Case(
        objective=DDIMInPO,
        make=lambda cls: cls(beta=7.0),
        batch=batch,
        formula=inpo_formula,
        start=Start(LOG2, [-3.5, 3.5], image_start()),
        identities=[
            is_dpo(lambda cls: cls(beta=7.0)),
            swapped_images_cost_the_margin_more(lambda cls: cls(beta=7.0)),
            constants_in_errors_cancel(lambda cls: cls(beta=7.0)),
            equal_images_teach_nothing(lambda cls: cls()),
            better_denoising_of_winners_costs_less(lambda cls: cls(beta=7.0)),
            beta_scales_the_logit,
            a_vanishing_beta_costs_log_2,
        ],
        mutations=[SIGN, FACTOR, ("links.logistic(z, smoothed", "links.logistic(-z, smoothed")],
        kinds=BOUND,
    ),
    Case(
        name="ddim_inpo at its default beta",
        objective=DDIMInPO,
        make=lambda cls: cls(),
        batch=lambda seed: image_pairs(error_scores(8, seed, spread=1e-3), seed),
        formula=lambda batch, frozen: mixed(batch[1].pairs, dpo_z(batch, 2000.0)[0]),
        start=Start(LOG2, [-1000.0, 1000.0], image_start()),
        identities=[swapped_images_cost_the_margin_more(lambda cls: cls())],
        mutations=[("Kind.BOUND: 2000.0", "Kind.BOUND: 5000.0")],
        kinds=BOUND,
    ),
    Case(
        objective=FlowDPO,
        make=lambda cls: cls(beta=7.0, beta_schedule="derived"),
        batch=noisy(batch),
        formula=flow_formula,
        start="slopes depend on the noise level; see the case with a constant beta",
        identities=[
            derived_beta_is_dpo_on_errors_of_the_noise,
            both_schedules_agree_without_noise_and_the_derived_one_vanishes_at_its_end,
            equal_images_teach_nothing(lambda cls: cls()),
        ],
        mutations=[
            ("sigmoid().square()", "sigmoid()"),
            ("need_log_snr() / 2", "need_log_snr()"),
            ("return rho * (", "return -rho * ("),
        ],
        kinds=BOUND,
    ),
    Case(
        name="flow_dpo with a constant beta",
        objective=FlowDPO,
        make=lambda cls: cls(),
        batch=lambda seed: noisy(lambda s: image_pairs(error_scores(8, s, spread=0.02), s))(seed),
        formula=lambda batch, frozen: mixed(batch[1].pairs, dpo_z(batch, 100.0)[0]),
        start=Start(LOG2, [-50.0, 50.0], image_start()),
        identities=[
            is_dpo(lambda cls: cls(beta=7.0)),
            constants_in_errors_cancel(lambda cls: cls(beta=7.0)),
            swapped_images_cost_the_margin_more(lambda cls: cls(beta=7.0)),
            better_denoising_of_winners_costs_less(lambda cls: cls(beta=7.0)),
        ],
        mutations=[("Kind.BOUND: 100.0", "Kind.BOUND: 5000.0"), ('self.beta_schedule == "constant"', "False")],
        kinds=BOUND,
    ),
    Case(
        objective=SmPO,
        make=lambda cls: cls(beta=7.0),
        batch=rewarded(),
        formula=smpo_formula,
        start=Start(LOG2, [-3.5 * 10 * math.tanh(0.15), 3.5 * 10 * math.tanh(0.15)], smpo_start()),
        identities=[
            smpo_of_equal_rewards_teaches_nothing,
            smpo_is_inpo_at_a_gap_of_0_2007,
            smpo_swaps_pairs_that_the_reward_ranks_the_other_way,
            smpo_says_where_its_factor_saturates,
        ],
        mutations=[
            ("(self.gap(pairs, like) / 2).tanh()", "self.gap(pairs, like).tanh()"),
            ("(self.gap(pairs, like) / 2).tanh()", "-(self.gap(pairs, like) / 2).tanh()"),
            ("self.reward_scale * gap", "gap"),
            (".abs() > 1)", " > 1)"),
            ("factor * (w - l) - pairs.margin", "factor * (w - l)"),
            ("pairs.weight * links", "links"),
            ("reward_high: float = 0.28201571106910706", "reward_high: float = 0.3"),
            ("gamma: float = 10.0", "gamma: float = 1.0"),
        ],
        kinds=BOUND,
    ),
    Case(
        name="smpo with given labels",
        objective=SmPO,
        make=lambda cls: cls(beta=7.0, soft_label="p", gamma=4.0),
        batch=batch,
        formula=smpo_p_formula,
        start=Start(LOG2, [-3.5 * 4, 3.5 * 4], image_start()),
        identities=[constants_in_errors_cancel(lambda cls: cls(beta=7.0, soft_label="p"))],
        mutations=[("(2 * as_rows(pairs.p, like) - 1)", "as_rows(pairs.p, like)")],
        kinds=BOUND,
    ),
    *(
        Case(
            name="" if flip == "sign" else f"seppo, {flip}",
            objective=SePPO,
            make=lambda cls, flip=flip: cls(beta=7.0, flip=flip),
            batch=seppo_batch,
            formula=seppo_formula(flip),
            start=Start(LOG2, [-3.5, 3.5], image_start()),
            identities=identities,
            mutations=mutations,
            kinds=BOUND,
        )
        for flip, identities, mutations in (
            (
                "sign",
                [
                    seppo_flips_the_pull_on_the_generated_image_only,
                    seppo_without_flips_is_dpo,
                    seppo_at_the_reference,
                    constants_in_errors_cancel(lambda cls: cls(beta=7.0, flip="none")),
                ],
                [
                    ("rho_w.detach().sign()", "-rho_w.detach().sign()"),
                    ("* rho[pairs.l]", "* -rho[pairs.l]"),
                    ("* rho[pairs.l]", "* 2 * rho[pairs.l]"),
                    ("torch.where(s == 0, torch.ones_like(s), s)", "s"),
                ],
            ),
            ("indicator", [seppo_at_the_reference], [("s.clamp(min=0)", "s.clamp(min=-1)")]),
            ("none", [seppo_without_flips_is_dpo], [('if self.flip == "none"', "if False")]),
        )
    ),
    Case(
        objective=DMPO,
        make=lambda cls: cls(beta=7.0, label_smoothing=0.05),
        batch=batch,
        formula=dmpo_formula(0.05),
        start=Start(
            -LOG2 - 0.5 * math.log(0.05 * 0.95),
            [-7 * 0.25 * math.log(19), 7 * 0.25 * math.log(19)],
            image_start(),
        ),
        identities=[dmpo_is_zero_where_p_is_q, dmpo_is_exo, constants_in_errors_cancel(lambda cls: cls(beta=7.0))],
        mutations=[
            ("links.reverse_kl(z, max", "links.reverse_kl(-z, max"),
            ("links.reverse_kl(z, max", "links.reverse_kl(2 * z, max"),
            ("max(self.label_smoothing, FLOOR)", "FLOOR"),
        ],
        kinds=(Kind.STEP, Kind.BOUND),
    ),
    Case(
        name="dmpo at its defaults",
        objective=DMPO,
        make=lambda cls: cls(),
        batch=lambda seed: image_pairs(error_scores(8, seed, spread=1e-3), seed, soft=False),
        formula=dmpo_at_2000(0.01),
        start=Start(1.6145, [-2000 * 0.25 * math.log(99), 2000 * 0.25 * math.log(99)], image_start(), 2e-4),
        identities=[equal_images_teach_nothing(lambda cls: cls(), 1.614463)],
        mutations=[("label_smoothing: float = 0.01", "label_smoothing: float = 0.0"), ("2000.0}", "6000.0}")],
        kinds=BOUND,
    ),
    Case(
        name="dmpo without smoothing",
        objective=DMPO,
        make=lambda cls: cls(label_smoothing=0.0),
        batch=lambda seed: image_pairs(error_scores(8, seed, spread=1e-3), seed, soft=False),
        formula=dmpo_at_2000(0.0),
        start=Start(6.215, [-2000 * 0.25 * math.log(1e6 - 1), 2000 * 0.25 * math.log(1e6 - 1)], image_start(), 2e-4),
        identities=[equal_images_teach_nothing(lambda cls: cls(label_smoothing=0.0), 6.214609)],
        mutations=[("FLOOR = 1e-6", "FLOOR = 1e-5")],
        kinds=BOUND,
    ),
    Case(
        objective=SNPO,
        make=lambda cls: cls(beta=7.0, share=0.8),
        batch=batch,
        formula=snpo_formula(0.8),
        start=Start(LOG2, [-7 / 2, 0.8 * 7 / 2], image_start()),
        identities=[
            snpo_earns_a_bounded_reward_from_the_rejected,
            snpo_at_share_1_is_dpo,
            better_denoising_of_winners_costs_less(lambda cls: cls(beta=7.0)),
            constants_in_errors_cancel(lambda cls: cls(beta=7.0)),
        ],
        mutations=[
            ("reward[win] - bounded(reward[lose])", "reward[win] + bounded(reward[lose])"),
            ("r + math.log(self.share)", "r"),
            ("math.log(1 - self.share)", "-math.log(1 - self.share)"),
            ("- bounded(reward[lose]) - margin", "- bounded(reward[lose])"),
        ],
        kinds=ALL,
    ),
    Case(
        objective=CHATS,
        make=lambda cls: cls(beta=7.0),
        batch=batch,
        formula=chats_formula,
        start=Start(LOG2, [-7 / 2, -7 / 2], image_start()),
        identities=[chats_wants_both_sides_better, chats_leaves_out_what_is_uncertain],
        mutations=[
            ("links.logistic(w + l - pairs.margin)", "links.logistic(w - l - pairs.margin)"),
            ("(2 * as_rows(pairs.p, reward) - 1)", "as_rows(pairs.p, reward)"),
            ("- pairs.margin", "+ pairs.margin"),
        ],
        kinds=BOUND,
    ),
    Case(
        objective=CaPO,
        make=lambda cls: cls(beta=3.0, bias=0.7),
        batch=noisy(rewarded(2, 1.0)),
        formula=capo_formula(True),
        # -2 (target) times beta times w_t times 2 (errors per score)
        start=Start(
            0.25, [-2 * 0.5 * 3 * 2 / (1 + math.exp(-0.7)), 2 * 0.5 * 3 * 2 / (1 + math.exp(-0.7))], capo_start
        ),
        identities=[capo_is_zero_where_margins_match, capo_swaps_with_its_rewards, capo_gives_noise_more_weight],
        mutations=[
            ("(z - target)", "(z + target)"),
            ("* 2 * scores.log_ratio()", "* scores.log_ratio()"),
            ("self.bias - scores.need_log_snr()", "self.bias + scores.need_log_snr()"),
            (".mean(1).detach()", ".sum(1).detach()"),
            ("w - l - pairs.margin", "w - l"),
        ],
        kinds=BOUND,
    ),
    Case(
        name="capo without weights of timesteps",
        objective=CaPO,
        make=lambda cls: cls(beta=3.0, weighting="none"),
        batch=noisy(rewarded(1, 1.0)),
        formula=capo_formula(False),
        start=Start(0.25, [-6.0, 6.0], capo_start),
        identities=[capo_is_zero_where_margins_match],
        mutations=[('self.weighting == "sigmoid"', "True")],
        kinds=BOUND,
    ),
    *(
        Case(
            name="" if form == "code" else f"dro, {form}",
            objective=DiffusionDRO,
            make=lambda cls, form=form: cls(margin=0.05 if form == "code" else -0.05, form=form),
            batch=batch,
            formula=dro_formula(form),
            start=Start(0.05 if form == "code" else 0.0, [-2.0, 2.0], image_start()),
            identities=identities,
            mutations=mutations,
            kinds=BOUND,
        )
        for form, identities, mutations in (
            (
                "code",
                [
                    dro_stops_at_its_margin,
                    the_reference_only_gates,
                    constants_in_errors_cancel(lambda cls: cls()),
                ],
                [
                    ("gain[lose] - gain[win]", "gain[win] - gain[lose]"),
                    ("2 * scores.log_ratio()", "scores.log_ratio()"),
                    ("relu(d + self.m)", "relu(d - self.m)"),
                    ("gain[win] + margin", "gain[win] - margin"),
                    ("OFFICIAL if self.form", "0.0015 if self.form"),
                    ("pairs.weight * either_way", "either_way"),
                ],
            ),
            (
                "paper",
                [the_papers_form_has_the_gradient_of_the_codes_at_minus_m, the_papers_form_leaves_the_start],
                [
                    ("torch.where(d >= self.m, d,", "torch.where(d >= self.m, 2 * d,"),
                    ("torch.full_like(d, self.m)", "0.0"),
                    ("torch.where(d >= self.m", "torch.where(d > self.m"),
                    ("else -OFFICIAL", "else 0.0"),
                    ("else d >= self.m", "else d > self.m"),
                ],
            ),
        )
    ),
    Case(
        objective=PSOPersonal,
        make=lambda cls: cls(beta=2.0, eta=0.3, negative_weight=0.7),
        batch=batch,
        formula=pso_personal_formula("hinge"),
        start=Start(1 + 2 * (0.3 - 0.09) + 0.7 * 0.3, [-2 * 2.0, -2 * (0.7 - 0.6)], image_start()),
        identities=[the_shipped_negatives_have_no_gradient, the_hinge_lets_go_of_large_negative_errors],
        mutations=[
            ("z = -beta * (", "z = beta * ("),
            ("self.eta * d[lose]", "d[lose]"),
            ("cost + self.negative_weight * e[lose]", "cost"),
            ("cost + self.negative_weight * e[lose]", "cost - self.negative_weight * e[lose]"),
            ("relu(1 - z)", "relu(-z)"),
            ("- margin", "+ margin"),
        ],
        kinds=BOUND,
    ),
    Case(
        name="pso_personal, logistic",
        objective=PSOPersonal,
        make=lambda cls: cls(beta=2.0, eta=0.3, negative_weight=0.7, form="logistic"),
        batch=batch,
        formula=pso_personal_formula("logistic"),
        start=Start(LOG2 + 0.7 * 0.3, [-2 * 1.0, -2 * (0.7 - 0.3)], image_start()),
        identities=[equal_images_teach_nothing(lambda cls: cls(form="logistic", eta=1.0, negative_weight=0.0))],
        mutations=[("e + 2 * scores.need_ref()", "e"), ("softplus(-z)", "softplus(z)")],
        kinds=BOUND,
    ),
    Case(
        objective=SubjectRPO,
        make=lambda cls: cls(beta=4.0, imitation_weight=0.8),
        batch=batch,
        formula=subject_formula,
        start=Start(0.8 * 0.3 + LOG2, [-1.6 - 4.0, 4.0], image_start()),
        identities=[
            subject_starts_at_the_winners_error_and_log_2,
            subject_labels_are_linear,
            subject_without_imitation_is_dpo_at_twice_its_beta,
        ],
        mutations=[
            ("return 2 * scores.log_ratio()", "return scores.log_ratio()"),
            ("return 2 * scores.log_ratio()", "return -2 * scores.log_ratio()"),
            ("self.imitation_weight * pairs.weight", "pairs.weight"),
            ("scores, pairs.w)", "scores, pairs.l)"),
            ("out.per_item + self", "out.per_item - self"),
        ],
        kinds=BOUND,
    ),
    Case(
        objective=BideDPO,
        make=lambda cls: cls(beta=7.0),
        batch=bide_batch(aspect_loss=[0.9, 0.3], aspect_count=[3.0, 5.0]),
        formula=bide_formula,
        start="weights come from the losses of the batch; see the case without statistics",
        identities=[bide_mean_is_the_published_loss, bide_of_one_aspect_is_dpo, bide_estimates_over_all_processes],
        mutations=[
            SIGN,
            ("count.sum() / count.clamp(min=1)", "1"),
            ("mean / mean.sum()", "1 - mean / mean.sum()"),
        ],
        kinds=ALL,
    ),
    Case(
        name="bide_dpo of a batch alone",
        objective=BideDPO,
        make=lambda cls: cls(beta=7.0),
        batch=lambda seed: batch(seed, aspect=ASPECT),
        formula=bide_alone_formula,
        start=Start(LOG2, [-3.5, 3.5], image_start(aspect=torch.tensor([1]))),
        identities=[bide_mean_is_the_published_loss],
        mutations=[("means_by_aspect(out.per_item.detach(), aspect)", "means_by_aspect(out.per_item, aspect)")],
        kinds=ALL,
    ),
    Case(
        objective=DualIPO,
        make=lambda cls: cls(beta=7.0, winner_weight=0.6, real_weight=0.4),
        batch=dual_batch,
        formula=dual_formula,
        start=Start(LOG2 + 0.6 * 0.3 + 0.4 * 0.3, [-3.5 - 1.2, 3.5 - 0.8], dual_start),
        identities=[dual_without_weights_is_dpo, dual_terms_add, dual_does_not_drop_a_term_in_silence],
        mutations=[
            SIGN,
            ("self.winner_weight * pairs.weight", "pairs.weight"),
            ("self.real_weight * real", "real"),
            ("out.per_item + self", "out.per_item - self"),
            ("(items.label > 0.5).to(", "(items.label < 0.5).to("),
            ("real_weight: float = 0.0", "real_weight: float = 1.0"),
            ("if layout.items is None", "if False"),
        ],
        kinds=BOUND,
        optional=("items",),
    ),
]
