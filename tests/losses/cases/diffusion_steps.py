"""Cases of `diffalign.losses.diffusion` on stored transitions: D3PO, SPO, PSO."""

import math

import torch
from loss_cases import Case, Start, image_pairs, step_scores
from torch.nn.functional import logsigmoid

from diffalign.losses import DPO, Kind, Layout, Pairs, Scores
from diffalign.losses.diffusion.d3po import D3PO
from diffalign.losses.diffusion.pso import PSO
from diffalign.losses.diffusion.spo import SPO

LOG2 = math.log(2)


def batch(seed, p=None):
    more = {} if p is None else {"p": torch.tensor(p, dtype=torch.float64)}
    return image_pairs(step_scores(8, seed), seed, **more)


def formula(beta, drop=False):
    """As the codes have it: exp, clamp, log, preferences in {+1, -1, 0}."""

    def compute(batch, frozen):
        scores, layout, _ = batch
        pairs = layout.pairs
        rho = torch.clamp(torch.exp(scores.theta - scores.ref), 0.9, 1.1)
        out = []
        for k in range(len(pairs)):
            h = float(torch.sign(2 * pairs.p[k] - 1))
            z = beta * (h * rho[pairs.w[k]].log() - h * rho[pairs.l[k]].log()) - abs(h) * pairs.margin[k]
            if h or not drop:
                out.append(-pairs.weight[k] * logsigmoid(z))
        return torch.stack(out)

    return compute


def start():
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    return Scores.steps(theta, theta.detach().clone()), Layout(pairs=Pairs.halves(1)), {}


def run(objective, q_w, q_l, **more):
    theta = torch.tensor([q_w, q_l], dtype=torch.float64, requires_grad=True)
    out = objective(Scores.steps(theta, torch.zeros(2)), Pairs.halves(1, **more))
    return out, torch.autograd.grad(out.loss, theta)[0]


def bounded_by(reach, low, high):
    def identity(cls):
        assert abs(reach - cls().beta_for(Kind.STEP) * math.log(1.1 / 0.9)) < 0.01 * reach
        for q_w, q_l, value in ((9.0, -9.0, low), (-9.0, 9.0, high)):
            out, grad = run(cls(), q_w, q_l)
            torch.testing.assert_close(out.loss.item(), value, rtol=0, atol=5e-4)
            assert not grad.any(), "no gradient out of the band, on either side"

    return identity


def within_the_band_it_is_dpo(cls):
    scores, layout, _ = image_pairs(step_scores(8, 3, spread=0.02), 3, soft=False)
    q = scores.theta - scores.ref
    assert q.abs().max() < 0.09
    torch.testing.assert_close(cls(beta=2.0)(scores, layout).per_item, DPO(beta=2.0)(scores, layout).per_item)


def the_clip_does_not_look_at_the_preference(cls):
    """A winner beyond the band has no gradient, whichever way it is; its partner keeps its own."""
    for q_w in (0.2, -0.2):
        _, grad = run(cls(beta=2.0), q_w, 0.05)
        assert grad[0] == 0
        assert grad[1] > 0


def labels_turn_the_pair(cls):
    one, other = run(cls(beta=2.0), 0.05, -0.03, p=0.2)[0], run(cls(beta=2.0), -0.03, 0.05)[0]
    torch.testing.assert_close(one.loss, other.loss)


def ties_count_log_2_without_gradient_or_not_at_all(cls):
    theta = torch.tensor([0.05, 0.02, -0.03, 0.04], dtype=torch.float64, requires_grad=True)
    scores = Scores.steps(theta, torch.zeros(4))
    tied = Pairs.halves(2, p=torch.tensor([1.0, 0.5]), margin=0.1)
    keep, drop = (cls(beta=2.0, ties=ties)(scores, tied) for ties in ("keep", "drop"))
    torch.testing.assert_close(keep.per_item[1].item(), LOG2)
    torch.testing.assert_close(keep.per_item[:1], drop.per_item)
    assert torch.autograd.grad(keep.loss, theta, retain_graph=True)[0][[1, 3]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(keep.loss, (drop.loss + LOG2) / 2)
    nothing = cls(ties="drop")(scores, Pairs.halves(2, p=0.5))
    assert len(nothing.per_item) == 0
    assert nothing.loss.requires_grad


def swapping_costs_the_margin(cls):
    one, other = run(cls(beta=2.0), 0.05, -0.03)[0], run(cls(beta=2.0), -0.03, 0.05)[0]
    torch.testing.assert_close(other.loss - one.loss, one.metrics["rewards/margins"][0])


def slope_at_the_start(cls):
    """dL / dq_w = -beta / 2, and exactly 0 once q_w > log 1.1."""
    beta = cls().beta_for(Kind.STEP)
    _, grad = run(cls(), 0.0, 0.0)
    torch.testing.assert_close(grad, torch.tensor([-beta / 2, beta / 2], dtype=torch.float64))
    assert run(cls(), math.log(1.1) + 1e-6, 0.0)[1][0] == 0
    assert run(cls(), math.log(1.1) - 1e-6, 0.0)[1][0] < 0


def candidates_of_one_latent(cls):
    """Both share x_t, so the margin is (x_w - x_l) . (m - m_ref) / sd^2, averaged: linear in the difference."""
    g = torch.Generator().manual_seed(0)
    m, m_ref, x_w, x_l = (0.02 * torch.randn(9, generator=g, dtype=torch.float64) for _ in range(4))
    sd = 0.3
    logp = lambda x, mean: (-((x - mean) ** 2) / (2 * sd**2)).mean()  # noqa: E731
    theta = torch.stack([logp(x_w, m), logp(x_l, m)])
    ref = torch.stack([logp(x_w, m_ref), logp(x_l, m_ref)])
    margin = cls()(Scores.steps(theta, ref), Pairs.halves(1)).metrics["rewards/margins"][0]
    torch.testing.assert_close(margin, 10 * ((x_w - x_l) * (m - m_ref)).mean() / sd**2)


SHARED = [
    within_the_band_it_is_dpo,
    the_clip_does_not_look_at_the_preference,
    swapping_costs_the_margin,
    slope_at_the_start,
]
MUTATIONS = [
    ("preference * (w - l)", "preference * (l - w)"),
    ("preference * (w - l)", "0.5 * preference * (w - l)"),
    ("math.log(1 - self.clip)", "-1.0"),
    ("math.log(1 + self.clip)", "1.0"),
    ("pairs.weight * links", "links"),
]

CASES = [
    Case(
        objective=D3PO,
        make=lambda cls: cls(beta=2.0),
        batch=lambda seed: batch(seed, [1.0, 0.0, 0.5, 0.8]),
        formula=formula(2.0),
        start=Start(LOG2, [-1.0, 1.0], start),
        identities=[
            *SHARED,
            bounded_by(0.0201, 0.6832, 0.7032),
            labels_turn_the_pair,
            ties_count_log_2_without_gradient_or_not_at_all,
        ],
        mutations=[
            *MUTATIONS,
            ("- preference.abs() * pairs.margin", ""),
            ("2 * as_rows(pairs.p, q) - 1", "as_rows(pairs.p, q)"),
            ("Kind.STEP: 0.1", "Kind.STEP: 0.2"),
        ],
        kinds=(Kind.STEP,),
    ),
    Case(
        name="d3po without ties",
        objective=D3PO,
        make=lambda cls: cls(beta=2.0, ties="drop"),
        batch=lambda seed: batch(seed, [1.0, 0.0, 0.5, 0.8]),
        formula=formula(2.0, drop=True),
        start=Start(LOG2, [-1.0, 1.0], start),
        identities=[ties_count_log_2_without_gradient_or_not_at_all],
        mutations=[("preference != 0)", "preference != 1)")],
        kinds=(Kind.STEP,),
    ),
    Case(
        objective=SPO,
        make=lambda cls: cls(),
        batch=batch,
        formula=formula(10.0),
        start=Start(LOG2, [-5.0, 5.0], start),
        identities=[*SHARED, bounded_by(2.007, 0.126, 2.133), candidates_of_one_latent],
        mutations=[*MUTATIONS, ("Kind.STEP: 10.0", "Kind.STEP: 5.0")],
        kinds=(Kind.STEP,),
    ),
    Case(
        objective=PSO,
        make=lambda cls: cls(),
        batch=batch,
        formula=formula(50.0),
        start=Start(LOG2, [-25.0, 25.0], start),
        identities=[*SHARED, bounded_by(10.03, math.log1p(math.exp(-10.0335)), 10.0336)],
        mutations=[*MUTATIONS, ("Kind.STEP: 50.0", "Kind.STEP: 5.0")],
        kinds=(Kind.STEP,),
    ),
]
