"""What the cases of `diffalign.losses.policy_gradient` share: batches of two groups, and transcriptions in plain loops."""

from dataclasses import replace

import torch
from loss_cases import leaf, row_scores, token_scores, with_leaf

from diffalign.losses import Groups, Kind, Layout, Scores

SAMPLED = (Kind.TOKEN, Kind.STEP)
ALL = (Kind.TOKEN, Kind.STEP, Kind.BOUND)
INDEX = torch.tensor([3, 0, 5, 1, 4, 2])
GROUP = torch.tensor([7, 7, 2, 7, 2, 2])
MEMBERS = [[0, 1, 3], [2, 4, 5]]  # positions of the same prompt


def groups(seed, columns=1, **more):
    g = torch.Generator().manual_seed(seed + 500)
    reward = torch.randn(6, columns, generator=g, dtype=torch.float64)
    return Groups(index=INDEX, group=GROUP, reward=reward, **more)


def unit_batch(seed, *, columns=1, ref=True, **more):
    scores = token_scores(6, seed=seed, ref=ref, old=True, spread=0.3, **more)
    return scores, Layout(groups=groups(seed, columns)), {}


def row_batch(seed, **extra):
    scores = row_scores(6, seed, spread=0.5)
    g = torch.Generator().manual_seed(seed + 900)
    old = scores.theta.detach() + 0.3 * torch.randn(6, generator=g, dtype=torch.float64)
    made = {k: f(scores, g) for k, f in extra.items()}
    return replace(scores, old=old, extra=made), Layout(groups=groups(seed)), {}


def advantage_of(reward, std=True):
    """Plain loops over the two groups."""
    out = torch.zeros(6, dtype=torch.float64)
    for members in MEMBERS:
        r = reward[members]
        centred = r - r.mean()
        out[members] = centred / (torch.sqrt((centred**2).sum() / (len(r) - 1)) + 1e-4) if std else centred
    return out


def rows_of(batch):
    """Per member: its unmasked units under policy, behaviour policy and reference."""
    u = batch[0].units
    for row in INDEX.tolist():
        keep = u.mask[row]
        yield (x[row][keep] if x is not None else None for x in (u.theta, u.old, u.ref))


def formula(term, reduce, *, beta=0.0, std=True, level="token", corrected=True):
    """term(theta, ratio, a, frozen ratio) -> loss per unit; reduce(units, all lengths) -> per row."""

    def compute(batch, frozen):
        scores, layout, _ = batch
        a = advantage_of(layout.groups.reward.sum(1), std)
        lengths = [int(scores.units.mask[i].sum()) for i in INDEX.tolist()]
        out = []
        for i, (live, dead) in enumerate(zip(rows_of(batch), rows_of(frozen))):
            (theta, old, ref), (theta0, _, _) = live, dead
            ratio, ratio0 = torch.exp(theta - old), torch.exp(theta0 - old)
            if level == "sequence":
                ratio, ratio0 = torch.exp((theta - old).mean()), torch.exp((theta0 - old).mean())
            loss = term(theta, ratio, a[i], ratio0) * torch.ones_like(theta)
            if beta:
                d = ref - theta
                kl = torch.exp(d) - d - 1
                loss = loss + beta * kl * (ratio if corrected else 1.0)
            out.append(reduce(loss, lengths))
        return torch.stack(out)

    return compute


def clip_term(low, high, delta=None):
    def term(theta, ratio, a, ratio0):
        free = ratio if delta is None else torch.clamp(ratio, max=delta)
        return -torch.min(free * a, torch.clamp(ratio, 1 - low, 1 + high) * a)

    return term


def row_mean(x, lengths):
    return x.mean()


def slope(objective, batch):
    """Gradient of the loss of fresh samples (the behaviour policy is the policy) with respect to the leaf."""
    scores, layout, stats = batch
    x = leaf(scores).detach().requires_grad_()
    moved = with_leaf(scores, x)
    if moved.units is not None:
        moved = replace(moved, units=replace(moved.units, old=None))
    moved = replace(moved, old=None)
    return torch.autograd.grad(objective(moved, layout, stats).loss, x)[0]


def same(one, other, **more):
    torch.testing.assert_close(one, other, **({"rtol": 1e-9, "atol": 1e-12} | more))


def fresh(lengths=(2, 2), value=-1.0, advantage=1.0, **fields):
    """Rows that the policy itself just sampled, all with the same advantage."""

    def batch():
        n, u = len(lengths), max(lengths)
        mask = torch.arange(u) < torch.tensor(lengths)[:, None]
        theta = torch.full((n, u), value, dtype=torch.float64, requires_grad=True)
        scores = Scores.tokens(theta, theta.detach().clone(), mask=mask, **fields)
        index = torch.arange(n)
        given = torch.full((n,), advantage, dtype=torch.float64)
        layout = Layout(groups=Groups(index=index, group=index * 0, reward=given, advantage=given))
        return scores, layout, {}

    return batch
