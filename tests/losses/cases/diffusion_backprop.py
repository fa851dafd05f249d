"""Cases of objectives that follow a reward's gradient: their walks on a toy flow whose derivatives are written out by hand.

The toy: velocity v(x) = w tanh(x), x_{k+1} = x_k + (s_{k+1} - s_k) v(x_k), reward sum of the last latents. Derivatives in
w are carried forward, d_{k+1} = d_k + (s_{k+1} - s_k) (tanh(x_k) + w (1 - tanh(x_k)^2) d_k), with whatever a method
leaves out.
"""

import itertools

import torch
from loss_cases import Case

from diffalign.losses import Items, Kind, Layout, Scores
from diffalign.losses.diffusion.align_prop import AlignProp
from diffalign.losses.diffusion.draft import DRaFT, DRaFTLV
from diffalign.losses.diffusion.drtune import DRTune
from diffalign.losses.diffusion.refl import ReFL
from diffalign.losses.diffusion.srpo import SRPO
from diffalign.losses.diffusion.walks import Level


def close(one, other, **more):
    torch.testing.assert_close(one, other, **({"rtol": 1e-9, "atol": 1e-12} | more))


class Toy:
    """A chain of S steps over one sample of four elements."""

    def __init__(self, steps=6, seed=0, w=0.7):
        self.w = torch.tensor(w, dtype=torch.float64, requires_grad=True)
        self.sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(seed)
        g = torch.Generator().manual_seed(99)
        self.start = torch.randn(1, 4, generator=g, dtype=torch.float64)
        self.asked = []

    def __len__(self):
        return len(self.sigmas) - 1

    def level(self, step):
        s = float(self.sigmas[step])
        return Level(1000 * s, 1 - s, s)

    def at(self, share):
        return Level(1000 * share, 1 - share, share)

    def velocity(self, x):
        return self.w * torch.tanh(x)

    def predict(self, x, level, *, gradient):
        self.asked.append((round(level.sigma, 9), gradient))
        if gradient:
            return self.velocity(x)
        with torch.no_grad():
            return self.velocity(x.detach())

    def advance(self, x, output, step):
        return x + (self.sigmas[step + 1] - self.sigmas[step]) * output

    def move(self, x, output, level, to):
        return x + (to.sigma - level.sigma) * output

    def clean(self, x, output, level):
        return x - level.sigma * output

    def noised(self, x0, level, noise):
        return level.alpha * x0 + level.sigma * noise

    def noise(self, name):
        g = torch.Generator().manual_seed(int.from_bytes(name.encode()[-4:], "big"))
        return torch.randn(1, 4, generator=g, dtype=torch.float64)


def slope(chain, ends):
    """The derivative of the summed ends in w."""
    total = sum(end.latents.sum() for end in ends)
    (grad,) = torch.autograd.grad(total, chain.w)
    return grad


def carried(trained, x, sigmas, w, *, detached=False, first=0):
    """Last latents and their derivative, gradient kept at `trained` steps; `detached`: without the network's Jacobian."""
    d = torch.zeros_like(x)
    for k in range(first, len(sigmas) - 1):
        ds, th = sigmas[k + 1] - sigmas[k], torch.tanh(x)
        if k in trained:
            d = d + ds * (th + (0 if detached else 1) * w * (1 - th**2) * d)
        x = x + ds * w * th
    return x, d


def plain(chain):
    return chain.start, chain.sigmas, chain.w.detach()


def batch(seed):
    g = torch.Generator().manual_seed(seed)
    reward = torch.randn(5, generator=g, dtype=torch.float64).requires_grad_()
    index = torch.randperm(5, generator=g)
    weight = 0.5 + torch.rand(5, generator=g, dtype=torch.float64)
    return Scores.rewards(reward), Layout(items=Items(index=index, weight=weight)), {}


def linear(scale):
    def formula(batch, frozen):
        scores, layout, _ = batch
        return torch.stack(
            [-scale * scores.theta[i] * w for i, w in zip(layout.items.index, layout.items.weight, strict=True)]
        )

    return formula


def hinge(scale, target):
    def formula(batch, frozen):
        scores, layout, _ = batch
        missing = target - scores.theta[layout.items.index]
        return scale * layout.items.weight * missing * (missing > 0)

    return formula


def distance(batch, frozen):
    scores, layout, _ = batch
    return 0.3 * layout.items.weight * ((0.2 - scores.theta[layout.items.index]) ** 2).sqrt()


def higher_rewards_cost_less(make):
    def identity(cls):
        scores, layout, _ = batch(4)
        out = make(cls)(scores, layout)
        (grad,) = torch.autograd.grad(out.per_item.sum(), scores.theta)
        assert (grad <= 0).all()
        assert grad.min() < 0
        close(out.metrics["reward"], scores.theta.detach()[layout.items.index])

    return identity


# -- AlignProp -------------------------------------------------------------------------------------------------------


def align_with_all_steps_is_the_full_gradient(cls):
    chain = Toy()
    ends = cls(truncation="last", last_steps=6).walk(chain)
    x, d = carried(range(6), *plain(chain))
    close(ends[0].latents.detach(), x)
    close(slope(chain, ends), d.sum())


def align_keeps_the_direct_path_past_untrained_steps(cls):
    class Fixed(cls):
        def cutoffs(self, steps, generator):
            return [0, 9, 9, 3, 9, 5]

    chain = Toy()
    ends = Fixed().walk(chain)
    _, d = carried((0, 3, 5), *plain(chain))
    close(slope(chain, ends), d.sum())
    assert [kept for _, kept in chain.asked] == [True, False, False, True, False, True]


def align_draws_late_steps_more_often(cls):
    g = torch.Generator().manual_seed(0)
    kept = torch.zeros(5)
    for _ in range(4000):
        kept += torch.tensor([step >= cut for step, cut in enumerate(cls().cutoffs(5, g))], dtype=torch.float32)
    close(kept / 4000, torch.arange(1, 6) / 6, rtol=0, atol=0.03)
    for name, middle, spread in (("uniform", 24.5, 14.4), ("normal", 41.5, 5)):
        cuts = [cls(truncation=name).cutoffs(50, g) for _ in range(2000)]
        assert all(len(set(one)) == 1 and 0 <= one[0] < 50 for one in cuts)
        first = torch.tensor([float(one[0]) for one in cuts])
        assert abs(first.mean() - middle) < 1
        assert abs(first.std() - spread) < 1


def align_always_trains_a_step(cls):
    class Never(cls):
        def cutoffs(self, steps, generator):
            return [steps] * steps

    chain = Toy()
    slope(chain, Never().walk(chain))
    assert [kept for _, kept in chain.asked] == [False] * 5 + [True]


# -- DRaFT -----------------------------------------------------------------------------------------------------------


def draft_trains_the_last_steps(cls):
    for last in (None, 1, 2, 9):
        chain = Toy()
        ends = cls(last_steps=last).walk(chain)
        first = 0 if last in (None, 9) else 6 - last
        x, d = carried(range(first, 6), *plain(chain))
        close(ends[0].latents.detach(), x)
        close(slope(chain, ends), d.sum())
        assert sum(kept for _, kept in chain.asked) == cls(last_steps=last).trained_steps(6) == 6 - first


def draft_finite_differences(cls):
    h = 1e-6
    values = [cls().walk(Toy(2, w=w))[0].latents.sum() for w in (0.7 + h, 0.7 - h)]
    chain = Toy(2)
    close(slope(chain, cls().walk(chain)), ((values[0] - values[1]) / (2 * h)).detach(), rtol=1e-6)


def one_step_of_draft_is_refl_at_the_last_step(cls):
    one, two = Toy(), Toy()
    ends, other = cls(last_steps=1).walk(one), ReFL(first_step=5).walk(two)
    close(ends[0].latents, other[0].latents)
    close(slope(one, ends), slope(two, other))


def copies_are_steps_from_the_noised_image(cls):
    chain = Toy()
    ends = cls(copies=2).walk(chain)
    assert len(ends) == 3
    x, sigmas, w = plain(chain)
    x0, d = carried((5,), x, sigmas, w)
    wanted = d.sum()
    close(ends[0].latents.detach(), x0)
    noises = [chain.noise(f"copy {k}") for k in (0, 1)]
    assert (noises[0] - noises[1]).abs().min() > 1e-3
    for end, noise in zip(ends[1:], noises, strict=True):
        s = sigmas[5]
        again, slope_again = carried((5,), (1 - s) * x0 + s * noise, sigmas, w, first=5)
        close(end.latents.detach(), again)
        wanted = wanted + slope_again.sum()
    close(slope(chain, ends), wanted)


# -- ReFL ------------------------------------------------------------------------------------------------------------


def refl_rewards_the_predicted_clean_image_of_one_late_step(cls):
    drawn = set()
    for seed in range(40):
        chain = Toy(8, seed)
        ends = cls().walk(chain)
        step = len(chain.asked) - 1
        drawn.add(step)
        assert [kept for _, kept in chain.asked] == [False] * step + [True]
        x, sigmas, w = plain(chain)
        x, _ = carried((), x, sigmas[: step + 1], w)
        close(ends[0].latents.detach(), x - sigmas[step] * w * torch.tanh(x))
        close(slope(chain, ends), -(sigmas[step] * torch.tanh(x)).sum())
    assert drawn == {6, 7}
    assert cls().earliest(40) == 30


def refl_learns_nothing_above_the_target(cls):
    scores, layout, _ = batch(5)
    out = cls(target=-9.0)(scores, layout)
    assert not out.per_item.any()
    assert out.metrics["saturated"].tolist() == [1.0] * 5


# -- DRTune ----------------------------------------------------------------------------------------------------------


def drtune_adds_first_order_terms(cls):
    for seed in range(12):
        chain = Toy(10, seed)
        ends = cls(trained=3).walk(chain)
        stop = len(chain.asked) - 1
        trained = [step for step, (_, kept) in enumerate(chain.asked) if kept]
        assert (stop, trained) == cls(trained=3).plan(10, torch.Generator().manual_seed(seed))
        x, sigmas, w = plain(chain)
        x, d = carried(trained, x, sigmas[: stop + 1], w, detached=True)
        d = d - sigmas[stop] * torch.tanh(x) * (stop in trained)
        close(ends[0].latents.detach(), x - sigmas[stop] * w * torch.tanh(x))
        close(slope(chain, ends), d.sum())


def drtune_stops_early_and_spaces_its_steps(cls):
    stops, starts = set(), set()
    for seed in range(200):
        stop, trained = cls(trained=3).plan(10, torch.Generator().manual_seed(seed))
        stops.add(stop)
        gaps = {b - a for a, b in itertools.pairwise(trained)}
        assert gaps == {(stop + 1) // 3}
        assert 0 <= trained[0] < (stop + 1) // 3
        assert trained[-1] <= stop
        starts.add((stop, trained[0]))
    assert stops == {6, 7, 8, 9}
    assert {(9, 0), (9, 1), (9, 2)} <= starts


# -- SRPO ------------------------------------------------------------------------------------------------------------


class Straight(Toy):
    """Its velocity is w times the true one, noise - x0, of an image that its sampler makes."""

    def velocity(self, x):
        if not hasattr(self, "true"):
            return 0.2 * self.w * torch.ones_like(x)
        return self.w * self.true

    def noised(self, x0, level, noise):
        self.true, self.x0 = noise - x0, x0
        return super().noised(x0, level, noise)


def both_branches_recover_the_image_and_pull_to_opposite_sides(cls):
    for seed in range(6):
        chain = Straight(seed=seed, w=1.0)
        down, up = cls().walk(chain)
        close(down.latents.detach(), chain.x0)
        close(up.latents.detach(), chain.x0)
        (a, _), (b, _) = [one for one in chain.asked if one[1]]
        assert a > b
        close(slope(chain, [down]), (b - a) / (1 - b) * chain.true.sum(), rtol=1e-6)
        close(slope(chain, [up]), (a - b) / (1 - a) * chain.true.sum(), rtol=1e-6)
    assert len(cls(inversion=False).walk(Straight())) == 1


def slots_lie_between_the_published_levels(cls):
    first = [max(s for s, kept in chain.asked if kept) for chain in made(cls)]
    second = [min(s for s, kept in chain.asked if kept) for chain in made(cls)]
    width = 0.4 / 999
    assert all(0.5 <= b < a <= 0.9 for a, b in zip(first, second, strict=True))
    inner = [a - b for a, b in zip(first, second, strict=True) if a < 0.9 - width and b > 0.5 + width]
    close(torch.tensor(inner), torch.full((len(inner),), 100 * width), rtol=1e-4, atol=1e-7)
    assert len(inner) > 100


def made(cls):
    for seed in range(200):
        chain = Straight(seed=seed, w=1.0)
        cls().walk(chain)
        yield chain


def captions_are_relative_and_swapped_in_the_inversion(cls):
    objective = cls(positive=("good",), negative=("bad",))
    for seed in range(5):
        down, up = objective.walk(Straight(seed=seed))
        (one, good), (minus, bad) = down.captions
        assert (good, bad, minus) == ("good. {prompt}", "bad. {prompt}", -1.0)
        assert 1.1 <= one <= 1.25
        (other, first), (minus, second) = up.captions
        assert (first, second, minus) == ("bad. {prompt}", "good. {prompt}", -1.0)
        assert 1.01 <= other <= 1.3
        close(torch.tensor((one - 1.1) / 0.15), torch.tensor((1.3 - other) / 0.29), rtol=1e-5)
    assert [weight for weight, _ in objective.captions(0, ("a", "b"), (0.1, 0.25))] == [1.1, -1.0]
    other = cls(caption="{prompt}, {word}").captions(0, ("a", "b"), (0.1, 0.25))
    assert [text for _, text in other] == ["{prompt}, a", "{prompt}, b"]
    words = {cls(positive=("x", "y"), negative=("z",)).walk(Straight(seed=s))[0].captions[0][1] for s in range(20)}
    assert words == {"x. {prompt}", "y. {prompt}"}


def walk_case(*, identities, make=lambda cls: cls(), **more):
    """What all of these methods have in common."""
    start = "a reward has no value that is known before it is measured"
    identities = [higher_rewards_cost_less(lambda cls: cls()), *identities]
    return Case(make=make, batch=batch, start=start, identities=identities, kinds=(Kind.REWARD,), **more)


CASES = [
    walk_case(
        objective=AlignProp,
        make=lambda cls: cls(link="distance", target=0.2, loss_scale=0.3),
        formula=distance,
        identities=[
            align_with_all_steps_is_the_full_gradient,
            align_keeps_the_direct_path_past_untrained_steps,
            align_draws_late_steps_more_often,
            align_always_trains_a_step,
        ],
        mutations=[
            ("gradient=step >= cutoff", "gradient=step > cutoff"),
            ("chain.predict(x, chain", "chain.predict(x.detach(), chain"),
            ("chain.advance(x, output", "chain.advance(x.detach(), output"),
            ("(0, steps + 1, (steps,)", "(0, steps, (steps,)"),
            ("0.84 * steps", "0.5 * steps"),
            ("cutoffs[-1] = 0", "pass"),
            ("min(self.last_steps, steps)] * steps", "1] * steps"),
        ],
    ),
    walk_case(
        objective=DRaFT,
        formula=linear(1.0),
        identities=[
            draft_trains_the_last_steps,
            draft_finite_differences,
            one_step_of_draft_is_refl_at_the_last_step,
        ],
        mutations=[
            ("len(chain) - self.trained_steps", "len(chain) + 1 - self.trained_steps"),
            ("steps if self.last_steps is None", "1 if self.last_steps is None"),
            ("roll(chain, x, first", "roll(chain, chain.start, first"),
        ],
    ),
    walk_case(
        objective=DRaFTLV,
        make=lambda cls: cls(loss_scale=0.5),
        formula=linear(0.5),
        identities=[copies_are_steps_from_the_noised_image],
        mutations=[
            ("ends[0].detach()", "ends[0]"),
            ('chain.noise(f"copy {copy}")', 'chain.noise("copy 0")'),
            ("range(self.copies)", "range(1)"),
            ("roll(chain, x, last, last + 1, gradient=True)", "roll(chain, x, last, last + 1)"),
        ],
    ),
    walk_case(
        objective=ReFL,
        make=lambda cls: cls(target=0.4),
        formula=hinge(1e-3, 0.4),
        identities=[
            refl_rewards_the_predicted_clean_image_of_one_late_step,
            refl_learns_nothing_above_the_target,
        ],
        mutations=[
            ("0.75 * steps", "0.5 * steps"),
            ("chain.predict(x, level, gradient=True), level", "chain.predict(x, level, gradient=True), chain.level(0)"),
            ("loss_scale: float = 1e-3", "loss_scale: float = 1.0"),
        ],
    ),
    walk_case(
        objective=DRTune,
        formula=linear(1.0),
        identities=[
            drtune_adds_first_order_terms,
            drtune_stops_early_and_spaces_its_steps,
        ],
        mutations=[
            ("x.detach(), chain.level(step)", "x, chain.level(step)"),
            ("gradient=stop in trained", "gradient=False"),
            ("chain.clean(x, output", "chain.clean(x.detach(), output"),
            ("(stop + 1) // self.trained", "stop // self.trained"),
            ("round(self.early_stop * steps)) + 1, ()", "round(self.early_stop * steps)), ()"),
        ],
    ),
    walk_case(
        objective=SRPO,
        make=lambda cls: cls(target=0.3),
        formula=hinge(1.0, 0.3),
        identities=[
            both_branches_recover_the_image_and_pull_to_opposite_sides,
            slots_lie_between_the_published_levels,
            captions_are_relative_and_swapped_in_the_inversion,
        ],
        mutations=[
            ("self.recovered(chain, x0, b, a)", "self.recovered(chain, x0, a, b)"),
            ("(bad, good), INVERT", "(good, bad), INVERT"),
            ("to.sigma * noise", "level.sigma * noise"),
            ("(-HALF, HALF)", "(HALF, -HALF)"),
            ("(-1.0, bad)", "(1.0, bad)"),
            ("ends[0] + (ends[1] - ends[0])", "ends[1] + (ends[0] - ends[1])"),
            ("(1 + k, good)", "(k, good)"),
        ],
    ),
]
