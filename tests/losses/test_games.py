"""Preferences as games: win rates, the general preference model, and what the objectives converge to."""

import pytest
import torch

from diffalign.losses import Items, Pairs, Scores
from diffalign.losses.games import (
    DNO,
    GPO,
    INPO,
    SPPO,
    OnlineIPO,
    gpm_against_group,
    gpm_loss,
    gpm_probability,
    gpm_score,
    win_rates,
)
from diffalign.losses.references import extragradient_update

ARMS = 4
I, J = (x.flatten() for x in torch.meshgrid(torch.arange(ARMS), torch.arange(ARMS), indexing="ij"))


@pytest.fixture
def bandit():
    """Four arms: log-probabilities of a reference and of a current policy, and a preference that no reward explains."""
    g = torch.Generator().manual_seed(0)
    ref, old = (torch.randn(ARMS, generator=g, dtype=torch.float64).log_softmax(0) for _ in range(2))
    skew = torch.randn(ARMS, ARMS, generator=g, dtype=torch.float64)
    return ref, old, torch.sigmoid(skew - skew.T)


def slope(objective, theta, pairs, **scores):
    """Gradient of the mean loss over all pairs of arms."""
    theta = theta.clone().requires_grad_()
    loss = objective(Scores.tokens(theta, **scores), pairs).loss
    return torch.autograd.grad(loss, theta)[0]


def flat(n=ARMS):
    return torch.zeros(n, dtype=torch.float64)


# -- win rates and the general preference model ----------------------------------------------------------------------


def test_win_rates_of_complementary_preferences_average_one_half():
    g = torch.Generator().manual_seed(1)
    a = torch.rand(3, 5, 5, generator=g, dtype=torch.float64)
    preference = torch.triu(a, 1) + torch.tril(1 - a.mT, -1) + 9 * torch.eye(5)
    rates = win_rates(preference)
    torch.testing.assert_close(rates.mean(1), torch.full((3,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(rates[1, 2], (preference[1, 2].sum() - 9) / 4)


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 4), (2, 1, 1)])
def test_win_rates_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="expected \\(prompts, k, k\\)"):
        win_rates(torch.zeros(shape))


def test_general_preferences_are_antisymmetric_with_any_block_scale():
    g = torch.Generator().manual_seed(2)
    v, w = (torch.randn(7, 6, generator=g, dtype=torch.float64) for _ in range(2))
    for scale in (None, torch.rand(7, 3, generator=g, dtype=torch.float64)):
        torch.testing.assert_close(gpm_score(v, w, scale), -gpm_score(w, v, scale))
        torch.testing.assert_close(gpm_score(v, v, scale), flat(7))


def test_three_vectors_play_rock_paper_scissors():
    angle = torch.arange(3, dtype=torch.float64) * 2 * torch.pi / 3
    v = torch.stack([angle.cos(), angle.sin()], 1)
    scores = gpm_score(v[:, None], v[None])
    torch.testing.assert_close(scores[[0, 1, 2], [1, 2, 0]], torch.full((3,), 3**0.5 / 2, dtype=torch.float64))
    assert (gpm_probability(scores[[0, 1, 2], [1, 2, 0]]) > 0.999).all()
    torch.testing.assert_close(gpm_against_group(v[None]), torch.zeros(1, 3, dtype=torch.float64))


def test_general_preference_losses():
    score = torch.tensor([0.0, 0.3, -0.3], dtype=torch.float64)
    torch.testing.assert_close(gpm_loss(score), -torch.log(gpm_probability(score)))
    torch.testing.assert_close(gpm_loss(score, target=10.0), (score - 10) ** 2)
    with pytest.raises(ValueError, match="even"):
        gpm_score(torch.zeros(3), torch.zeros(3))


def test_block_scales_belong_to_prompts():
    g = torch.Generator().manual_seed(3)
    v = torch.randn(2, 4, 6, generator=g, dtype=torch.float64)
    scale = torch.rand(2, 3, generator=g, dtype=torch.float64)
    blocks = v.unflatten(-1, (3, 2))

    def score(i, j):
        x, y = blocks[1, i], blocks[1, j]
        return sum(scale[1, b] * (x[b, 0] * y[b, 1] - x[b, 1] * y[b, 0]) for b in range(3))

    expected = sum(score(0, j) for j in (1, 2, 3)) / 3
    torch.testing.assert_close(gpm_against_group(v, scale)[1, 0], expected)


# -- what the objectives converge to ---------------------------------------------------------------------------------


def test_inpo_rests_at_the_mirror_descent_step(bandit):
    """ref^a old^(1 - a) exp(P(y > old) / beta), over pairs drawn from the current policy."""
    ref, old, preference = bandit
    beta, a = 0.3, 1 / 3
    pairs = Pairs(w=I, l=J, p=preference[I, J], weight=old.exp()[I] * old.exp()[J])
    target = a * ref + (1 - a) * old + preference @ old.exp() / beta
    objective = INPO(beta=beta, mixture=a)
    at_target = slope(objective, target, pairs, ref=ref, old=old)
    torch.testing.assert_close(at_target, flat(), rtol=0, atol=1e-12)
    assert slope(objective, old, pairs, ref=ref, old=old).norm() > 1e-2, "elsewhere it does not rest"


def test_dno_rests_at_the_exponential_of_win_rates(bandit):
    _, old, preference = bandit
    rate = preference @ old.exp()
    pairs = Pairs(w=I, l=J, reward_w=rate[I], reward_l=rate[J])
    objective = DNO(beta=0.3)
    torch.testing.assert_close(slope(objective, old + rate / 0.3, pairs, ref=old), flat(), rtol=0, atol=1e-12)
    assert slope(objective, old, pairs, ref=old).norm() > 1e-3


def test_online_ipo_rests_at_the_best_response_to_its_opponent(bandit):
    ref, opponent, preference = bandit
    g = preference @ opponent.exp()
    pairs = Pairs(w=I, l=J, reward_w=g[I], reward_l=g[J])
    objective = OnlineIPO(beta=0.3)
    torch.testing.assert_close(slope(objective, ref + g / 0.3, pairs, ref=ref), flat(), rtol=0, atol=1e-12)
    assert objective(Scores.tokens(ref + g / 0.3, ref), pairs).loss < 1e-24


def test_sppo_and_gpo_rest_at_their_targets(bandit):
    _, old, preference = bandit
    win = preference @ old.exp()
    target = old + (win - 0.5) / 0.3
    pairs = Pairs(w=I, l=J, reward_w=win[I], reward_l=win[J])
    torch.testing.assert_close(slope(SPPO(beta=0.3), target, pairs, ref=old), flat(), rtol=0, atol=1e-12)
    items = Items(index=torch.arange(ARMS), target=win - 0.5)
    torch.testing.assert_close(slope(GPO(beta=0.3), target, items, ref=old), flat(), rtol=0, atol=1e-12)


# -- extragradient ---------------------------------------------------------------------------------------------------


def test_extragradient_steps_from_where_it_was_against_who_it_would_be():
    """With plain descent on w: look ahead to w - lr grad(w; w), then w - lr grad(w; ahead)."""
    w = torch.nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.1)

    def sample():
        assert not torch.is_grad_enabled()
        return w.detach().clone()

    start = w.detach().clone()
    extragradient_update([w], optimizer, sample, lambda opponent: (w * opponent.square()).sum())
    ahead = start - 0.1 * start.square()
    torch.testing.assert_close(w.detach(), start - 0.1 * ahead.square())
    assert w.grad is None


def test_extragradient_gives_the_optimiser_its_state_back():
    """Two updates with Adam equal two plain steps with the gradients of the second half: half steps leave no trace."""
    gradients = [torch.tensor([0.5, -2.0]), torch.tensor([1.0, 0.25])]
    one, other = (torch.nn.Parameter(torch.tensor([1.0, 1.0])) for _ in range(2))
    adam = torch.optim.Adam([one], lr=0.05)
    for gradient in gradients:
        answers = iter([100 * torch.ones(2), gradient])
        extragradient_update([one], adam, lambda answers=answers: next(answers), lambda g: (one * g).sum())
    plain = torch.optim.Adam([other], lr=0.05)
    for gradient in gradients:
        other.grad = gradient.clone()
        plain.step()
    assert torch.equal(one, other)
    assert adam.state[one]["step"] == 2


def test_extragradient_finds_the_equilibrium_of_a_circular_game():
    """Biased rock-paper-scissors: the last iterate satisfies pi = softmax(P pi / beta), the regularised equilibrium."""
    wins = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]], dtype=torch.float64)
    i, j = (x.flatten() for x in torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"))
    beta, logits = 0.1, torch.nn.Parameter(torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64))
    objective = OnlineIPO(beta=beta)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64).log()

    def loss(opponent):
        g = wins @ opponent
        pairs = Pairs(w=i, l=j, reward_w=g[i], reward_l=g[j])
        return objective(Scores.tokens(logits.log_softmax(0), uniform), pairs).loss

    optimizer = torch.optim.SGD([logits], lr=0.1)
    for _ in range(300):
        extragradient_update([logits], optimizer, lambda: logits.softmax(0).clone(), loss)
    policy = logits.detach().softmax(0)
    torch.testing.assert_close(policy, torch.softmax(wins @ policy / beta, 0), rtol=0, atol=1e-6)
