"""Cases of `diffalign.losses.diffusion` on prediction errors element by element: DSPO, SDPO, PatchDPO."""

import math
from dataclasses import replace

import torch
from loss_cases import Case, Start, image_pairs, residual_scores
from torch.nn.functional import softplus

from diffalign.losses import DPO, Items, Kind, Layout, Pairs, Scores
from diffalign.losses.diffusion.dmpo import DMPO
from diffalign.losses.diffusion.dspo import DSPO
from diffalign.losses.diffusion.patch_dpo import PatchDPO
from diffalign.losses.diffusion.sdpo import SDPO
from diffalign.losses.diffusion.self_npo import SelfNPO

LOG2 = math.log(2)
BOUND = (Kind.BOUND,)


def batch(seed, **more):
    return image_pairs(residual_scores(8, seed), seed, **more)


def start(near=0.0, **more):
    """One pair at policy == reference; `near` makes the loser's residual differ from the winner's."""

    def make():
        r = torch.tensor([[0.4, -0.2, 0.6, 0.2], [0.4, -0.2, 0.6, 0.2]], dtype=torch.float64)
        r[1] = r[1] + near * torch.tensor([0.2, 0.6, 0.4, -0.4])
        r = r.view(2, 2, 1, 2).requires_grad_()
        return Scores.residuals(r, r.detach().clone()), Layout(pairs=Pairs.halves(1, **more)), {}

    return make


def close(one, other, **more):
    torch.testing.assert_close(one, other, **({"rtol": 1e-9, "atol": 1e-12} | more))


def mse(x):
    return (x**2).mean((1, 2, 3))


def logit(batch, beta, swap=False):
    scores, layout, _ = batch
    pairs = layout.pairs
    e, ref = mse(scores.residual), mse(scores.ref_residual)
    z = -beta / 2 * ((e - ref)[pairs.w] - (e - ref)[pairs.l]) - pairs.margin
    return -z if swap else z


# -- dspo ------------------------------------------------------------------------------------------------------------


def residual_formula(batch, frozen, detach=False, shift=4.0):
    scores, layout, _ = batch
    pairs, total = layout.pairs, 0.0
    for share, rows, swap in ((pairs.p, pairs.w, False), (1 - pairs.p, pairs.l, True)):
        z = logit(frozen if detach else batch, 4.0, swap)
        error = scores.residual[rows]
        moved = error - scores.ref_residual[rows]  # f - f_ref
        u = error - shift * (1 - torch.sigmoid(z))[:, None, None, None] * moved
        total = total + share * mse(u)
    return pairs.weight * total


def link_formula(gate):
    def formula(batch, frozen):
        scores, layout, _ = batch
        pairs, total = layout.pairs, 0.0
        for share, rows, swap in ((pairs.p, pairs.w, False), (1 - pairs.p, pairs.l, True)):
            miss = 1 - torch.sigmoid(logit(batch, 4.0, swap))
            distance = mse(scores.residual[rows] - scores.ref_residual[rows])
            total = total + share * miss**2 * (distance if distance.mean() >= gate else 1.0)
        return pairs.weight * total

    return formula


def a_small_beta_is_fine_tuning_on_winners(cls):
    scores, layout, _ = batch(3, soft=False)
    sft = mse(scores.residual)[layout.pairs.w]
    out = cls()(scores, layout).per_item
    torch.testing.assert_close(out, sft, rtol=5e-3, atol=0)
    assert not torch.equal(out, sft)


def at_the_reference_it_costs_the_winners_error(cls):
    scores, layout, _ = start(1.0)()
    close(cls(beta=4.0)(scores, layout).loss, mse(scores.residual)[0])


def losers_are_reached_through_the_logit_alone(cls):
    """Detached, the losing image has no gradient; as published it has."""
    scores, layout, _ = batch(4, soft=False)
    for detach in (False, True):
        out = cls(beta=4.0, detach=detach)(scores, layout)
        (grad,) = torch.autograd.grad(out.loss, scores.residual)
        assert bool(grad[layout.pairs.l].any()) is not detach
        assert grad[layout.pairs.w].any()


def a_shift_of_its_own(cls):
    """The weight of the shift without DPO's beta: none is fine-tuning, whatever beta."""
    scores, layout, _ = batch(4, soft=False)
    close(cls(beta=4.0, shift=0.0)(scores, layout).per_item, mse(scores.residual)[layout.pairs.w])
    close(cls(beta=4.0, shift=4.0)(scores, layout).per_item, cls(beta=4.0)(scores, layout).per_item)


def the_gate_is_the_mean_of_the_batch(cls):
    scores, layout, _ = batch(5, soft=False)
    distance = mse(scores.residual - scores.ref_residual)[layout.pairs.w].detach()
    below, above = (cls(form="link", beta=4.0, gate=float(distance.mean()) * x)(scores, layout) for x in (1.01, 0.99))
    close(above.per_item, below.per_item * distance)


def the_link_has_half_of_dpos_slope(cls):
    """dL / dz = -1/4 at the start, DPO's is -1/2."""
    scores, layout, _ = start(1.0)()
    mine = torch.autograd.grad(cls(form="link", beta=4.0)(scores, layout).loss, scores.residual, retain_graph=True)[0]
    other = torch.autograd.grad(DPO(beta=4.0)(scores, layout).loss, scores.residual)[0]
    close(mine, other / 2)


# -- sdpo ------------------------------------------------------------------------------------------------------------


def lam_of(batch, mu, scope, p=1.0):
    """What the gradient of each pair's loser is multiplied by: of row l where p > 1/2, of row w where it is less."""
    scores, layout, _ = batch
    w, l = scores.residual[layout.pairs.w], scores.residual[layout.pairs.l]
    p = torch.as_tensor(p, dtype=w.dtype).expand(4)
    better = torch.where(p[:, None, None, None] > 0.5, w, l)
    decided = (p != 0.5).double()
    own, cross = decided * (better**2).sum((1, 2, 3)), decided * (w * l).sum((1, 2, 3))
    if scope == "batch":
        own, cross = own.sum().expand(4), cross.sum().expand(4)
    lam = torch.where(cross > 0, torch.clamp((1 - mu) * own / cross, 0, 1), torch.ones_like(cross))
    return lam.detach()


def sdpo_formula(mu, scope):
    def formula(batch, frozen):
        scores, layout, _ = batch
        pairs = layout.pairs
        e, still, ref = mse(scores.residual), mse(frozen[0].residual), mse(scores.ref_residual)
        lam, one = lam_of(frozen, mu, scope, pairs.p), torch.ones(4, dtype=torch.float64)

        def scaled(rows, lam):
            return still[rows] + lam * (e[rows] - still[rows]) - ref[rows]

        w, l = scaled(pairs.w, lam.where(pairs.p < 0.5, one)), scaled(pairs.l, lam.where(pairs.p > 0.5, one))
        z = -2.0 * (w - l) - pairs.margin
        return pairs.weight * (pairs.p * softplus(-z) + (1 - pairs.p) * softplus(z))

    return formula


def the_value_is_that_of_the_base(cls):
    scores, layout, _ = batch(3)
    for base, settings, other in (
        ("dpo", {}, DPO(beta=4.0)),
        ("dmpo", {"label_smoothing": 0.1}, DMPO(beta=4.0, label_smoothing=0.1)),
        ("dspo", {"form": "link"}, DSPO(beta=4.0, form="link")),
        ("dspo", {}, DSPO(beta=4.0)),
    ):
        for mu in (0.0, 0.6, 1.0):
            mine = cls(base=base, settings=settings, beta=4.0, mu=mu)
            close(mine(scores, layout).per_item, other(scores, layout).per_item)


def gradient(objective, scores, layout):
    return torch.autograd.grad(objective(scores, layout).loss, scores.residual, retain_graph=True)[0]


def only_losers_gradients_are_scaled(cls):
    scores, layout, _ = batch(3, soft=False)
    lam = lam_of((scores, layout, {}), 0.5, "pair")
    assert (lam < 1).any()
    mine, base = gradient(cls(beta=4.0, mu=0.5, scope="pair"), scores, layout), gradient(DPO(beta=4.0), scores, layout)
    close(mine[layout.pairs.w], base[layout.pairs.w])
    close(mine[layout.pairs.l], lam[:, None, None, None] * base[layout.pairs.l])


def equal_residuals_keep_one_minus_mu_and_orthogonal_ones_all(cls):
    scores, layout, _ = start()()
    out = cls(beta=4.0, mu=0.7)(scores, layout)
    close(out.metrics["loser_gradient"], torch.tensor([0.3], dtype=torch.float64))
    for l in ([-0.2, -0.4, 0.0, 0.0], [-0.4, 0.2, -0.6, -0.2]):  # orthogonal, opposite
        r = torch.tensor([[0.4, -0.2, 0.6, 0.2], l], dtype=torch.float64).view(2, 1, 2, 2).requires_grad_()
        out = cls(beta=4.0, mu=0.7)(Scores.residuals(r, r.detach()), Pairs.halves(1))
        close(out.metrics["loser_gradient"], torch.ones(1, dtype=torch.float64))


def winners_keep_their_share_of_the_pull(cls):
    """Along the output-space gradient the winner's error falls by mu of what it would without the loser, where lam acts."""
    scores, layout, _ = start(0.5)()
    w, l = scores.residual.detach()
    for mu, objective in ((0.6, cls(beta=4.0, mu=0.6)), (None, DPO(beta=4.0))):
        grad = gradient(objective, scores, layout)
        along = ((grad[0] + grad[1]) * w).sum()  # one network: a step moves both outputs alike
        alone = (grad[0] * w).sum()
        if mu is None:
            assert along < 0, "plain DPO raises the winner's error here"
        else:
            close(along, mu * alone)
    assert (w * l).sum() > (w * w).sum()


def a_row_may_win_one_pair_and_lose_another(cls):
    scores = residual_scores(3, 2)
    pairs = Pairs(w=torch.tensor([0, 1]), l=torch.tensor([1, 2]))
    r = scores.residual
    apart = Scores.residuals(torch.stack([r[0], r[1], r[1], r[2]]), scores.ref_residual[torch.tensor([0, 1, 1, 2])])
    objective = cls(beta=4.0, mu=0.5)
    close(
        objective(scores, pairs).per_item,
        objective(apart, Pairs(w=torch.tensor([0, 2]), l=torch.tensor([1, 3]))).per_item,
    )
    mine = gradient(objective, scores, pairs)
    other = torch.autograd.grad(
        objective(apart, Pairs(w=torch.tensor([0, 2]), l=torch.tensor([1, 3]))).loss, scores.residual
    )[0]
    close(mine, other)


def either_label_batch(seed):
    """Labels for either image, and a tie; where lam acts in either scope."""
    scores, layout, stats = batch(seed)
    pairs = replace(layout.pairs, p=torch.tensor([0.1, 0.5, 0.9, 0.0], dtype=torch.float64))
    near = scores.residual.detach().clone()
    near[pairs.l] = 1.3 * near[pairs.w] + 0.1 * near[pairs.l]
    return Scores.residuals(near.requires_grad_(), scores.ref_residual), Layout(pairs=pairs), stats


def other_way_round(pairs, **more):
    return Pairs(w=pairs.l, l=pairs.w, reward_w=pairs.reward_l, reward_l=pairs.reward_w, **more)


def a_label_of_zero_is_the_swapped_pair(cls):
    scores, layout, _ = either_label_batch(3)
    pairs = layout.pairs
    for base in ("dpo", "dspo", "dmpo"):
        for scope in ("batch", "pair"):
            objective = cls(base=base, beta=4.0, mu=0.6, scope=scope)
            reversed_label = replace(pairs, p=torch.zeros(4), margin=0.0)
            one = gradient(objective, scores, reversed_label)
            close(one, gradient(objective, scores, other_way_round(pairs, weight=pairs.weight)))
            assert not torch.allclose(one, gradient(objective.inner, scores, reversed_label))


def the_side_that_the_base_pushes_away_is_scaled(cls):
    """Rewards that disagree with the order of the images, and two winners."""
    scores, layout, _ = either_label_batch(4)
    high, low = torch.full((4, 1), 0.9, dtype=torch.float64), torch.full((4, 1), 0.1, dtype=torch.float64)
    pairs = Pairs(w=layout.pairs.w, l=layout.pairs.l, reward_w=low, reward_l=high)
    for base, settings in (("smpo", {"reward_low": 0.0, "reward_high": 1.0}), ("capo", {"weighting": "none"})):
        objective = cls(base=base, settings=settings, beta=4.0, mu=0.6)
        one = gradient(objective, scores, pairs)
        close(one, gradient(objective, scores, other_way_round(pairs)))
        plain = gradient(objective.inner, scores, pairs)
        close(one[pairs.l], plain[pairs.l])  # the winners
        assert not torch.allclose(one[pairs.w], plain[pairs.w])
    given = cls(base="smpo", settings={"soft_label": "p"}, beta=4.0, mu=0.6)
    close(gradient(given, scores, replace(pairs, p=0.0)), gradient(given, scores, other_way_round(pairs)))


def two_winners_are_left_alone(cls):
    """SePPO where the winner is worse than under the reference: nothing is pushed away. Better: the generated image is."""
    r = torch.tensor([[0.4, -0.2], [0.5, -0.3]], dtype=torch.float64).requires_grad_()
    objective = cls(base="seppo", beta=4.0, mu=0.9)
    for share, lam in ((0.9, []), (1.1, [0.1 * 0.2 / 0.26])):
        scores = Scores.residuals(r, share * r.detach())
        out = objective(scores, Pairs.halves(1))
        torch.testing.assert_close(out.metrics["loser_gradient"].tolist(), lam if lam else [1.0])
        ratio = gradient(objective, scores, Pairs.halves(1)) / gradient(objective.inner, scores, Pairs.halves(1))
        close(ratio[0], torch.ones(2, dtype=torch.float64))
        close(ratio[1], torch.full((2,), lam[0] if lam else 1.0, dtype=torch.float64))


# -- patch_dpo -------------------------------------------------------------------------------------------------------


def patch_batch(shape=(3, 2, 2)):
    def make(seed):
        g = torch.Generator().manual_seed(seed + 700)
        weight = torch.rand(5, *shape[-2:], generator=g, dtype=torch.float64)
        scores = residual_scores(5, seed, ref=False, shape=shape, patch_weight=weight)
        items = Items(index=torch.tensor([4, 0, 2]), weight=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
        return scores, Layout(items=items), {}

    return make


def patch_formula(normalise):
    def formula(batch, frozen):
        scores, layout, _ = batch
        out = []
        for row, weight in zip(layout.items.index.tolist(), layout.items.weight):
            maps, r = scores.patch_weight[row], scores.residual[row]
            total, count = 0.0, r.numel()
            for i in range(maps.shape[0]):
                for j in range(maps.shape[1]):
                    total = total + maps[i, j] * (r[..., i, j] ** 2).sum()
            out.append(weight * total / count / (maps.mean() if normalise else 1.0))
        return torch.stack(out)

    return formula


def weights_of_one_are_plain_denoising_and_of_zero_nothing(cls):
    for value in (1.0, 0.0, 2.5):
        weight = torch.full((4, 2, 2), value, dtype=torch.float64)
        scores = residual_scores(4, 3, ref=False, shape=(3, 2, 2), patch_weight=weight)
        out = cls()(scores, Pairs.halves(2))
        close(out.per_item, value * scores.error)
        (grad,) = torch.autograd.grad(out.loss, scores.residual)
        assert bool(grad.any()) is bool(value)


def the_pull_of_a_location_goes_with_its_weight(cls):
    weight = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]], dtype=torch.float64)
    residual = torch.ones(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    out = cls()(Scores.residuals(residual, patch_weight=weight), Items(index=torch.tensor([0])))
    (grad,) = torch.autograd.grad(out.loss, residual)
    close(grad, (2 * weight / 12).expand(1, 3, 2, 2))


def normalising_takes_the_scale_of_the_map_out(cls):
    scores, layout, _ = patch_batch()(2)
    larger = Scores.residuals(scores.residual, patch_weight=7 * scores.patch_weight)
    one, other = (cls(normalise=True)(s, layout).per_item for s in (scores, larger))
    close(one, other)
    close(cls()(larger, layout).per_item, 7 * cls()(scores, layout).per_item)


def patch_start():
    r = torch.tensor([[[[0.4, -0.2], [0.6, 0.2]]]], dtype=torch.float64, requires_grad=True)
    weight = torch.full((1, 2, 2), 0.5, dtype=torch.float64)
    return Scores.residuals(r, patch_weight=weight), Layout(items=Items(index=torch.tensor([0]))), {}


# -- self_npo --------------------------------------------------------------------------------------------------------


def distances(seed):
    made = residual_scores(6, seed)
    g = torch.Generator().manual_seed(seed + 500)
    size = 0.5 + torch.rand(6, generator=g, dtype=torch.float64)
    weight = 0.5 + torch.rand(4, generator=g, dtype=torch.float64)
    items = Items(index=torch.tensor([4, 0, 3, 1]), label=torch.ones(4, dtype=torch.float64), weight=weight)
    return Scores.residuals(made.residual, None, to_sample=size), Layout(items=items), {}


def self_npo_formula(h):
    def formula(batch, frozen):
        scores, layout, _ = batch
        items = layout.items
        x = scores.to_sample[items.index].view(-1, 1, 1, 1) * scores.residual[items.index]  # x0^ - x0*
        each = x**2 if h is None else torch.sqrt(x**2 + h**2) - h
        return items.weight * each.mean((1, 2, 3))

    return formula


def one_item(value):
    residual = torch.full((1, 2, 1, 2), value, dtype=torch.float64, requires_grad=True)
    items = Items(index=torch.tensor([0]), label=torch.ones(1, dtype=torch.float64))
    return Scores.residuals(residual, None, to_sample=torch.full((1,), 2.0, dtype=torch.float64)), Layout(items=items)


def self_npo_is_nothing_at_its_goal(cls):
    scores, layout = one_item(0.0)
    out = cls()(scores, layout)
    assert out.loss == 0
    assert not torch.autograd.grad(out.loss, scores.residual)[0].any()


def self_npo_far_away_is_the_absolute_difference(cls):
    scores, layout = one_item(-3.0)
    close(cls(huber=1e-6)(scores, layout).loss, torch.tensor(6.0, dtype=torch.float64), atol=1e-5)


CASES = [
    Case(
        objective=DSPO,
        make=lambda cls: cls(beta=4.0),
        batch=batch,
        formula=residual_formula,
        # u = r - 2 (r - r_ref), so the winner's error, and -2 (1 - beta / 2) per unit of its score.
        start=Start(0.15, [2.0, 0.0], start()),
        identities=[
            a_small_beta_is_fine_tuning_on_winners,
            at_the_reference_it_costs_the_winners_error,
            losers_are_reached_through_the_logit_alone,
            a_shift_of_its_own,
        ],
        mutations=[
            ("error[win] - weight", "error[win] + weight"),
            ("weight * miss[:, None]", "2 * weight * miss[:, None]"),
            ("(-(beta * (rho[win]", "((beta * (rho[win]"),
            ("error - scores.need_ref_residual()", "error + scores.need_ref_residual()"),
            ("Kind.BOUND: 0.001", "Kind.BOUND: 0.1"),
        ],
        kinds=BOUND,
    ),
    Case(
        name="dspo, detached, shift of its own",
        objective=DSPO,
        make=lambda cls: cls(beta=4.0, detach=True, shift=0.7),
        batch=batch,
        formula=lambda batch, frozen: residual_formula(batch, frozen, detach=True, shift=0.7),
        start=Start(0.15, [-2 * (1 - 0.35), 0.0], start()),
        identities=[losers_are_reached_through_the_logit_alone],
        mutations=[("miss.detach() if self.detach", "miss if self.detach")],
        kinds=BOUND,
    ),
    *(
        Case(
            name=f"dspo, link, {where} its gate",
            objective=DSPO,
            make=lambda cls, gate=gate: cls(beta=4.0, form="link", gate=gate),
            batch=batch,
            formula=link_formula(gate),
            start=begin,
            identities=[the_gate_is_the_mean_of_the_batch, the_link_has_half_of_dpos_slope],
            mutations=[("miss.square()", "miss"), (">= self.gate", "< self.gate")],
            kinds=BOUND,
        )
        for where, gate, begin in (
            ("below", 10.0, Start(0.25, [-1.0, 1.0], start())),
            ("above", 0.0, "0 at the reference, where f = f_ref: without a gate the loss does not start"),
        )
    ),
    *(
        Case(
            name="" if scope == "batch" else f"sdpo, per {scope}",
            objective=SDPO,
            make=lambda cls, scope=scope: cls(beta=4.0, mu=0.6, scope=scope),
            batch=batch,
            formula=sdpo_formula(0.6, scope),
            start=Start(LOG2, [-2.0, 0.4 * 2.0], start()),
            identities=identities,
            mutations=mutations,
            kinds=BOUND,
        )
        for scope, identities, mutations in (
            (
                "batch",
                [
                    the_value_is_that_of_the_base,
                    equal_residuals_keep_one_minus_mu_and_orthogonal_ones_all,
                    winners_keep_their_share_of_the_pull,
                    a_row_may_win_one_pair_and_lose_another,
                ],
                [
                    ("(1 - mu) * own", "mu * own"),
                    ("(w * l).sum(1)", "-(w * l).sum(1)"),
                    ("torch.where(ahead, own.l, own.w)", "torch.where(ahead, own.w, own.l)"),
                    ("x.detach() + by * (x - x.detach())", "x.detach() - by * (x - x.detach())"),
                    ("x.detach() + by * (x - x.detach())", "by * x"),
                ],
            ),
            ("pair", [only_losers_gradients_are_scaled], [('scope == "batch"', "True"), ("lam.clamp(0, 1)", "lam")]),
        )
    ),
    *(
        Case(
            name=f"sdpo of labels for either image, per {scope}",
            objective=SDPO,
            make=lambda cls, scope=scope: cls(beta=4.0, mu=0.6, scope=scope),
            batch=either_label_batch,
            formula=sdpo_formula(0.6, scope),
            start=Start(LOG2, [0.4 * 2.0, -2.0], start(p=0.0)),
            identities=[
                a_label_of_zero_is_the_swapped_pair,
                the_side_that_the_base_pushes_away_is_scaled,
                two_winners_are_left_alone,
            ],
            mutations=[
                ("direction > 0, direction != 0", "direction > -2, direction != 0"),
                ("direction > 0, direction != 0", "direction > 0, direction > -2"),
                ("torch.where(ahead, own.l, own.w)[decided]", "own.l[decided]"),
                ("isinstance(inner, Directed) else", "False else"),
            ],
            kinds=BOUND,
        )
        for scope in ("batch", "pair")
    ),
    Case(
        objective=PatchDPO,
        make=lambda cls: cls(),
        batch=patch_batch(),
        formula=patch_formula(False),
        start=Start(0.075, [-1.0], patch_start),
        identities=[
            weights_of_one_are_plain_denoising_and_of_zero_nothing,
            the_pull_of_a_location_goes_with_its_weight,
            normalising_takes_the_scale_of_the_map_out,
        ],
        mutations=[
            ("* residual.square())", "* residual)"),
            ("items.weight * loss", "loss"),
            ("broadcast_locations(weight, residual) *", "2 *"),
            ("broadcast_locations(weight, residual) *", "-broadcast_locations(weight, residual) *"),
        ],
        kinds=BOUND,
    ),
    Case(
        name="patch_dpo of videos, normalised",
        objective=PatchDPO,
        make=lambda cls: cls(normalise=True),
        batch=patch_batch((2, 2, 1, 2)),
        formula=patch_formula(True),
        start=Start(0.15, [-2.0], patch_start),
        identities=[normalising_takes_the_scale_of_the_map_out],
        mutations=[("loss / share", "loss * share")],
        kinds=BOUND,
    ),
    Case(
        objective=SelfNPO,
        make=lambda cls: cls(huber=0.3),
        batch=distances,
        formula=self_npo_formula(0.3),
        start="there is no reference, and the first loss is how far the copy is from its teacher's prediction",
        identities=[self_npo_is_nothing_at_its_goal, self_npo_far_away_is_the_absolute_difference],
        mutations=[
            ("* scores.to_sample[items.index, None]", "/ scores.to_sample[items.index, None]"),
            ("* scores.to_sample[items.index, None]", ""),
            (".sqrt() - self.huber", ".sqrt()"),
            ("each.mean(1)", "each.sum(1)"),
            ("items.weight * each", "each"),
        ],
        kinds=BOUND,
    ),
    Case(
        name="self_npo with squares",
        objective=SelfNPO,
        make=lambda cls: cls(distance="l2"),
        batch=distances,
        formula=self_npo_formula(None),
        start="there is no reference, and the first loss is how far the copy is from its teacher's prediction",
        identities=[self_npo_is_nothing_at_its_goal],
        mutations=[('if self.distance == "huber"', "if True")],
        kinds=BOUND,
    ),
]
