"""Cases of `diffalign.losses.diffusion.nft`: predictions on both sides of the policy that sampled."""

import torch
from loss_cases import Case

from diffalign.losses import Groups, Kind, Layout, Scores
from diffalign.losses.diffusion.nft import DiffusionNFT, optimality

INDEX = torch.tensor([3, 0, 5, 1, 4, 2])
GROUP = torch.tensor([7, 7, 7, 2, 2, 2])


def close(one, other, **more):
    torch.testing.assert_close(one, other, **({"rtol": 1e-9, "atol": 1e-12} | more))


def scores_of(e, old, ref, size):
    return Scores.residuals(e, ref, old_residual=old, to_sample=size)


def batch(seed, moved=0.2):
    g = torch.Generator().manual_seed(seed)
    e = 0.6 * torch.randn(6, 2, 1, 2, generator=g, dtype=torch.float64)
    old, ref = (e + moved * torch.randn(e.shape, generator=g, dtype=torch.float64) for _ in range(2))
    size = 0.2 + torch.rand(6, generator=g, dtype=torch.float64)
    reward = torch.randn(6, 1, generator=g, dtype=torch.float64)
    groups = Groups(index=INDEX, group=GROUP, reward=reward)
    return scores_of(e.requires_grad_(), old, ref, size), Layout(groups=groups), {}


def on_policy(seed, reward=(1.0, 0.0, 0.3, 0.2, 0.9, 0.5)):
    """The lagged policy is the policy."""
    scores, _, _ = batch(seed)
    made = scores_of(scores.residual, scores.residual.detach().clone(), scores.ref_residual, scores.to_sample)
    reward = torch.tensor(reward, dtype=torch.float64)
    return made, Layout(groups=Groups(index=INDEX, group=GROUP, reward=reward)), {}


def advantage_of(reward):
    r = reward[:, 0] if reward.ndim == 2 else reward
    centred = torch.cat([part - part.mean() for part in (r[:3], r[3:])])
    return centred / (torch.sqrt(((r - r.mean()) ** 2).mean()) + 1e-4)


def formula(batch, frozen, b=0.7, clip=1.5, kl=0.3):
    scores, layout, _ = batch
    still = frozen[0]
    a = advantage_of(layout.groups.reward).clamp(-clip, clip)
    out = []
    for place, row in enumerate(INDEX.tolist()):
        t, r = scores.to_sample[row], a[place] / clip * 0.5 + 0.5
        e, old, ref = scores.residual[row], scores.old_residual[row], scores.ref_residual[row]
        total = 0.0
        for sign, share in ((1, r), (-1, 1 - r)):
            x0 = t * (old + sign * b * (e - old))
            weight = (t * (old + sign * b * (still.residual[row] - old))).abs().mean()
            total = total + share * (x0**2).mean() / max(float(weight), 1e-5)
        out.append(total * clip / b + kl * ((e - ref) ** 2).mean())
    return torch.stack(out)


def first_gradient(cls, b, batch):
    scores, layout, _ = batch
    out = cls(nft_beta=b, beta=0.0)(scores, layout)
    return torch.autograd.grad(out.per_item.sum(), scores.residual, retain_graph=True)[0]


def on_policy_the_gradient_is_that_of_the_advantage(cls):
    """A grad M[(x0^ - x0)^2] / w, whatever nft_beta is."""
    made = on_policy(1)
    scores, layout, _ = made
    a = advantage_of(layout.groups.reward)[INDEX.argsort()]
    x0 = scores.to_sample.view(-1, 1, 1, 1) * scores.residual
    weight = x0.detach().abs().mean((1, 2, 3))
    wanted = torch.autograd.grad((a * (x0**2).mean((1, 2, 3)) / weight).sum(), scores.residual, retain_graph=True)[0]
    for b in (0.1, 0.5, 1.0):
        close(first_gradient(cls, b, made), wanted, rtol=1e-7)


def on_policy_the_value_does_not_depend_on_rewards(cls):
    made, other = on_policy(2), on_policy(2, (0.0, 5.0, 1.0, 1.0, 0.0, 0.0))
    one, two = (cls(nft_beta=0.5, beta=0.0)(s, l).per_item for s, l, _ in (made, other))
    close(one, two)


def an_average_image_has_no_gradient_at_first(cls):
    scores, layout, _ = on_policy(3, (0.4, 0.4, 0.4, 0.0, 0.5, 1.0))
    (grad,) = torch.autograd.grad(cls(beta=0.0)(scores, layout).per_item.sum(), scores.residual)
    for place in (0, 1, 2, 4):
        close(grad[INDEX[place]], torch.zeros_like(grad[0]))
    assert grad[INDEX[3]].abs().max() > 0.01


def without_the_weight_it_is_matching_around_the_lagged_policy(cls):
    """(r L+ + (1 - r) L-) / b = const + (2 r - 1) (D - D_old) + (b - (2 r - 1)) M[(v - v_old)^2]."""
    scores, layout, _ = batch(4)
    sized = scores_of(scores.residual, scores.old_residual, scores.ref_residual, torch.ones(6, dtype=torch.float64))
    b = 0.6
    out = cls(nft_beta=b, weight="none", beta=0.0, adv_clip=2.0)(sized, layout).per_item / 2.0
    a = advantage_of(layout.groups.reward).clamp(-2, 2) / 2  # 2 r - 1
    e, old = scores.residual[INDEX], scores.old_residual[INDEX]
    d, d_old, moved = ((x**2).mean((1, 2, 3)) for x in (e, old, e - old))
    close(out, d_old / b + a * (d - d_old) + (b - a) * moved, rtol=1e-8)


def modes_keep_one_side(cls):
    a = torch.tensor([-2.0, 0.5], dtype=torch.float64)
    assert cls(adv_mode="positive").kept(a).tolist() == [0.0, 0.5]
    assert cls(adv_mode="negative").kept(a).tolist() == [-2.0, 0.0]
    assert cls(adv_mode="binary").kept(a).tolist() == [-1.0, 1.0]
    close(optimality(torch.tensor([-9.0, 0.0, 2.5, 9.0]), 5.0), torch.tensor([0.0, 0.5, 0.75, 1.0]))


def advantages_of_a_whole_round_are_taken(cls):
    scores, layout, _ = batch(5)
    given = torch.tensor([1.0, -1.0, 0.0, 2.0, -2.0, 0.5], dtype=torch.float64)
    groups = layout.groups
    with_given = Groups(index=groups.index, group=groups.group, reward=groups.reward, advantage=given)
    out = cls()(scores, with_given)
    close(out.metrics["optimality"], (given / 5 + 1) / 2)
    close(cls().round_advantage(groups), advantage_of(groups.reward), rtol=1e-7)


CASES = [
    Case(
        objective=DiffusionNFT,
        make=lambda cls: cls(nft_beta=0.7, adv_clip=1.5, beta=0.3),
        batch=batch,
        formula=formula,
        start="the value at the start is the size of the errors; its gradient is an identity below",
        identities=[
            on_policy_the_gradient_is_that_of_the_advantage,
            on_policy_the_value_does_not_depend_on_rewards,
            an_average_image_has_no_gradient_at_first,
            without_the_weight_it_is_matching_around_the_lagged_policy,
            modes_keep_one_side,
            advantages_of_a_whole_round_are_taken,
        ],
        mutations=[
            ("r * better + (1 - r) * worse", "r * worse + (1 - r) * better"),
            ("(1 - b) * old + b * e", "(1 - b) * old - b * e"),
            ("self.adv_clip / b", "0.5 * self.adv_clip / b"),
            ("missed = size * missed", "missed = 1 * missed"),
            ("missed.detach().abs()", "missed.abs()"),
            ("loss + anchor", "loss - anchor"),
        ],
        kinds=(Kind.BOUND,),
    ),
]
