"""Advantages, divergence estimators, PPO's pieces and shaped rewards; surrogates that no case covers."""

import math

import pytest
import torch

from diffalign.losses import Groups, Scores, surrogates
from diffalign.losses.advantages import (
    adjusted_entropy,
    advantages,
    gae,
    group_mean,
    group_std,
    informative,
    kl_estimate,
    optimal_value,
    overlong_penalty,
    ppo_rewards,
    ppo_value_loss,
    rank_reward,
    score_function_kl,
    temperature_for_entropy,
    total_reward,
    whiten,
    zero_std_groups,
)
from diffalign.losses.group_objective import pair_squares
from diffalign.losses.policy_gradient import CISPO, DAPO, GMPO, GRPO, GSPO, RLOO, SAPO, VESPO, DrGRPO
from diffalign.losses.regression import NFT, CoPG
from diffalign.losses.surrogates import Rollout

NAN = float("nan")
GROUP = torch.tensor([4, 4, 9, 4, 9])


def assert_same(one, other, **more):
    torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), **({"rtol": 1e-9, "atol": 1e-9} | more))


# -- divergence estimators, exactly, over a categorical policy ---------------------------------------------------------


@pytest.fixture
def pair():
    theta = torch.tensor([0.4, -0.3, 1.1], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.1, 0.6, -0.2], dtype=torch.float64).log_softmax(0)
    return theta, ref


def expected_gradient(theta, estimate):
    """Gradient of a loss on samples of the policy, whose probabilities are weights and not differentiated."""
    logp = theta.log_softmax(0)
    return torch.autograd.grad((logp.detach().exp() * estimate(logp)).sum(), theta)[0]


def reverse_gradient(theta, ref):
    logp = theta.log_softmax(0)
    return torch.autograd.grad((logp.exp() * (logp - ref)).sum(), theta)[0]


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(pair, kind):
    theta, ref = pair
    logp = theta.log_softmax(0).detach()
    assert_same((logp.exp() * kl_estimate(logp, ref, kind)).sum(), (logp.exp() * (logp - ref)).sum())


def test_only_k3_and_k2_are_never_negative(pair):
    theta, ref = pair
    logp = theta.log_softmax(0)
    assert kl_estimate(logp, ref, "k1").min() < 0
    assert kl_estimate(logp, ref, "k2").min() >= 0
    assert kl_estimate(logp, ref, "k3").min() >= 0


def test_gradients_of_the_estimators_as_losses(pair):
    theta, ref = pair
    logp = theta.log_softmax(0)
    forward = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), theta)[0]
    reverse = reverse_gradient(theta, ref)
    assert_same(expected_gradient(theta, lambda s: kl_estimate(s, ref, "k1")), torch.zeros(3, dtype=torch.float64))
    assert_same(expected_gradient(theta, lambda s: kl_estimate(s, ref, "k2")), reverse)
    assert_same(expected_gradient(theta, lambda s: kl_estimate(s, ref, "k3")), forward)
    assert_same(expected_gradient(theta, lambda s: score_function_kl(s, ref)), reverse)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_bias_correction_turns_k1_and_k3_into_the_reverse_divergence(pair, kind):
    theta, ref = pair
    got = expected_gradient(theta, lambda s: kl_estimate(s, ref, kind) * (s - s.detach()).exp())
    assert_same(got, reverse_gradient(theta, ref))


def test_large_divergences_stay_finite():
    theta = torch.tensor([-1e4, 1e4], requires_grad=True)
    k3 = kl_estimate(theta, torch.zeros(2), "k3")
    assert torch.isfinite(k3).all()
    assert torch.isfinite(torch.autograd.grad(k3.sum(), theta)[0]).all()


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")
    for wrong in ({"center": "median"}, {"scale": "global"}, {"aggregate": "max"}):
        with pytest.raises(ValueError, match="expected"):
            advantages(torch.tensor([1.0, 0.0]), torch.zeros(2), **wrong)
    with pytest.raises(ValueError, match="3 reward weights for 1"):
        advantages(torch.zeros(2), torch.zeros(2), weight=(1.0, 2.0, 3.0))


# -- group statistics and advantages -----------------------------------------------------------------------------------


def test_statistics_of_interleaved_groups_of_different_size():
    x = torch.tensor([1.0, 3.0, 10.0, 8.0, 20.0], dtype=torch.float64)
    assert_same(group_mean(x, GROUP), torch.tensor([4.0, 4, 15, 4, 15], dtype=torch.float64))
    big, small = math.sqrt(13), math.sqrt(50)
    assert_same(group_std(x, GROUP), torch.tensor([big, big, small, big, small], dtype=torch.float64))
    assert_same(group_std(x, GROUP, unbiased=False)[2].item(), 5.0)


def test_two_samples_unbiased_and_biased():
    r, g = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.zeros(2)
    half = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert_same(advantages(r, g), torch.tensor([half, -half], dtype=torch.float64))
    assert_same(advantages(r, g, unbiased=False, eps=0.0), torch.tensor([1.0, -1.0], dtype=torch.float64))


def test_leave_one_out_is_the_mean_of_the_others():
    r = torch.tensor([1.0, 3.0, 10.0, 8.0, 20.0], dtype=torch.float64)
    expected = [1 - 5.5, 3 - 4.5, -10.0, 8 - 2.0, 10.0]
    assert_same(advantages(r, GROUP, center="loo", scale="none"), torch.tensor(expected, dtype=torch.float64))


def test_batch_scale_uses_one_deviation_for_all():
    r = torch.tensor([1.0, 3.0, 10.0, 8.0, 20.0], dtype=torch.float64)
    std = r.std()
    expected = (r - group_mean(r, GROUP)) / (std + 1e-4)
    assert_same(advantages(r, GROUP, scale="batch"), expected)


def test_no_centre_keeps_rewards_even_of_equal_groups():
    r = torch.tensor([2.0, 2.0], dtype=torch.float64)
    assert_same(advantages(r, torch.zeros(2), center="none", scale="none"), r)


def test_missing_rewards_get_advantage_zero_and_do_not_count():
    r = torch.tensor([[1.0, NAN], [NAN, NAN], [0.0, NAN], [NAN, 0.5], [3.0, NAN]], dtype=torch.float64)
    g = torch.tensor([0, 0, 0, 0, 1])
    assert_same(total_reward(r), torch.tensor([1.0, NAN, 0.0, 0.5, 3.0], dtype=torch.float64), equal_nan=True)
    a = advantages(r, g, scale="none")
    assert_same(a, torch.tensor([0.5, 0.0, -0.5, 0.0, 0.0], dtype=torch.float64))
    a = advantages(r, g, center="loo", scale="none")
    assert_same(a, torch.tensor([0.75, 0.0, -0.75, 0.0, 0.0], dtype=torch.float64))
    for scale in ("group", "batch"):
        assert torch.isfinite(advantages(r, g, scale=scale)).all()
    assert advantages(torch.full((2,), NAN), torch.zeros(2)).tolist() == [0.0, 0.0]


def test_equal_rewards_give_exactly_zero_however_they_round():
    r = torch.full((7,), 0.1)
    assert advantages(r, torch.zeros(7)).tolist() == [0.0] * 7
    assert zero_std_groups(torch.tensor([0.1, 0.1, 2.0, 0.1, 3.0]), GROUP).tolist() == [1.0, 0.0]
    assert informative(torch.tensor([0.1, 0.1, 2.0, 0.1, 3.0]), GROUP).tolist() == [False, False, True, False, True]
    tiny = torch.tensor([0.0, 1e-12])
    assert informative(tiny, torch.zeros(2)).all(), "small rewards are not equal rewards"


def test_weights_sum_rewards_before_normalising():
    r = torch.tensor([[1.0, 4.0], [0.0, 1.0]], dtype=torch.float64)
    a = advantages(r, torch.zeros(2), weight=(1.0, 0.5), scale="none")
    assert_same(a, torch.tensor([1.25, -1.25], dtype=torch.float64))


def test_normalising_before_the_sum_ignores_the_scale_of_each_reward():
    g = torch.Generator().manual_seed(0)
    r = torch.randn(6, 2, generator=g, dtype=torch.float64)
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    one = advantages(r, ids, aggregate="normalize_then_sum", eps=0.0)
    other = advantages(r * torch.tensor([100.0, 0.01]), ids, aggregate="normalize_then_sum", eps=0.0)
    assert_same(one, other)
    assert_same(one.std().item(), 1.0)
    assert (advantages(r, ids, eps=0.0) - one).abs().max() > 0.1


def test_half_precision_rewards_are_lifted_and_nothing_carries_gradient():
    r = torch.tensor([1.0, 0.0], dtype=torch.bfloat16, requires_grad=True)
    a = advantages(r, torch.zeros(2))
    assert a.dtype == torch.float32
    assert not a.requires_grad


def test_whitening_leaves_masked_places_out():
    x, mask = torch.tensor([[1.0, 3.0], [5.0, 99.0]]), torch.tensor([[True, True], [True, False]])
    assert_same(whiten(x, mask, eps=0.0), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))


# -- shaped rewards ----------------------------------------------------------------------------------------------------


def test_rank_penalty_sums_to_minus_one_over_all_ranks_and_needs_a_hit():
    correct = torch.tensor([False, True, False, False, False, False])
    group, rank = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2])
    r = rank_reward(correct, group, rank)
    discount = [1 / math.log2(i + 2) for i in range(3)]
    expected = [-discount[0] / sum(discount), 1.0, -discount[2] / sum(discount), 0.0, 0.0, 0.0]
    assert_same(r, torch.tensor(expected), rtol=1e-6)
    assert r[0] < r[2] < 0, "a confident mistake costs more"


def test_overlong_answers_are_punished_softly():
    r = overlong_penalty(torch.tensor([10, 80, 90, 100, 130]), max_length=100, cache=20)
    assert_same(r, torch.tensor([0.0, 0.0, -0.5, -1.0, -1.0]))


def test_optimal_value_lies_between_mean_and_best():
    r, g = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 1])
    v = optimal_value(r, g, beta=0.5)
    assert_same(v[0].item(), 0.5 * math.log((math.exp(2.0) + 2) / 3), rtol=1e-6)
    assert_same(v[3].item(), 1.0)
    assert_same(optimal_value(r, g, beta=1e4)[0].item(), 1 / 3, rtol=1e-2)
    assert_same(optimal_value(r, g, beta=1e-3)[0].item(), 1.0, rtol=1e-2)


def test_temperature_that_reaches_an_entropy():
    logits = 3 * torch.randn(50, 11, generator=torch.Generator().manual_seed(1))
    t = temperature_for_entropy(logits, 0.3)
    assert_same(adjusted_entropy(logits, t).item(), 0.3, rtol=1e-3)
    assert temperature_for_entropy(logits, 1.0) > t
    assert_same(adjusted_entropy(torch.zeros(2, 4)).item(), math.log(4.0), rtol=1e-6)


# -- PPO ---------------------------------------------------------------------------------------------------------------

MASK = torch.tensor([[True, True, True, False], [True, True, False, False]])


def test_ppo_reward_has_the_score_at_the_last_unit_and_k1_everywhere():
    old, ref = torch.full((2, 4), -1.0), torch.full((2, 4), -1.5)
    r = ppo_rewards(torch.tensor([2.0, 3.0]), old, ref, MASK, kl_coef=0.1)
    assert_same(r, torch.tensor([[-0.05, -0.05, 1.95, 0.0], [-0.05, 2.95, 0.0, 0.0]]), rtol=1e-6)


def test_gae_with_lambda_one_is_return_minus_value_and_with_zero_the_td_error():
    g = torch.Generator().manual_seed(2)
    reward, value = (
        torch.randn(2, 4, generator=g, dtype=torch.float64),
        torch.randn(2, 4, generator=g, dtype=torch.float64),
    )
    a, returns = gae(reward, value, MASK, gamma=0.9, lam=1.0)
    total = reward[0, 0] + 0.9 * reward[0, 1] + 0.81 * reward[0, 2]
    assert_same(returns[0, 0], total)
    assert_same(a[0, 0], total - value[0, 0])
    assert a[~MASK].abs().sum() == 0
    a, _ = gae(reward, value, MASK, gamma=0.9, lam=0.0)
    assert_same(a[1, 0], reward[1, 0] + 0.9 * value[1, 1] - value[1, 0])
    assert_same(a[1, 1], reward[1, 1] - value[1, 1])


def test_gae_skips_units_that_do_not_count():
    reward, value = torch.tensor([[1.0, 50.0, 2.0]]), torch.tensor([[0.5, 70.0, 0.25]])
    gaps = torch.tensor([[True, False, True]])
    a, _ = gae(reward, value, gaps, gamma=0.9, lam=0.5)
    b, _ = gae(reward[:, [0, 2]], value[:, [0, 2]], torch.ones(1, 2, dtype=torch.bool), gamma=0.9, lam=0.5)
    assert_same(a[:, [0, 2]], b)


def test_value_loss_takes_the_worse_of_clipped_and_free():
    value, old, returns = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 3.0])
    assert_same(ppo_value_loss(value, old, returns, 0.2), torch.tensor([0.5 * 0.64, 0.5 * 2.8**2]), rtol=1e-6)


# -- surrogates and settings that are off in the cases -----------------------------------------------------------------


def test_gamma_weight_is_one_on_policy_and_fades_on_both_sides():
    mask, a = torch.ones(3, 1, dtype=torch.bool), torch.ones(3, 1)
    w = surrogates.gamma_weight(torch.tensor([[0.0], [3.0], [-3.0]]), mask, a)
    assert_same(w[0].item(), 1.0)
    assert w[1] < 0.01
    assert w[2] < 0.1


def test_off_policy_rows_are_dropped_only_where_the_advantage_is_negative():
    theta = torch.tensor([[-5.0, -5.0]] * 3)
    old = torch.tensor([[-1.0, -1.0], [-1.0, -1.0], [-4.9, -4.9]])
    scores = Scores.tokens(theta, None, old, mask=torch.ones(3, 2, dtype=torch.bool))
    rollout = Rollout.of(scores.units, torch.arange(3), torch.tensor([1.0, -1.0, -1.0]))
    assert surrogates.off_policy_keep(rollout, 0.5)[:, 0].tolist() == [1.0, 0.0, 1.0]
    g = Groups(
        index=torch.arange(3), group=torch.zeros(3), reward=torch.zeros(3), advantage=torch.tensor([1.0, -1, -1])
    )
    kept = GRPO(off_policy_mask_threshold=0.5)(scores, g).per_item
    assert kept[1] == 0
    assert kept[0] != 0
    assert kept[2] != 0


def test_weights_scale_the_surrogate_and_not_the_divergence():
    theta = torch.full((2, 2), -1.0, requires_grad=True)
    mask, ref = torch.ones(2, 2, dtype=torch.bool), torch.full((2, 2), -2.0)
    g = Groups(index=torch.arange(2), group=torch.zeros(2), reward=torch.zeros(2), advantage=torch.ones(2))
    off = Scores.tokens(theta, ref, mask=mask, weight=torch.zeros(2, 2))
    k3 = math.exp(-1.0) + 1 - 1
    assert_same(GRPO(beta=0.5)(off, g).per_item.detach(), torch.full((2,), 0.5 * k3), rtol=1e-6)


def test_divergence_in_the_reward_moves_the_advantage_and_not_the_loss():
    theta = torch.tensor([[-1.0], [-1.0]], requires_grad=True)
    scores = Scores.tokens(theta, torch.tensor([[-1.0], [-3.0]]), mask=torch.ones(2, 1, dtype=torch.bool))
    g = Groups(index=torch.arange(2), group=torch.zeros(2), reward=torch.tensor([1.0, 1.0]))
    a = GRPO(beta=0.25, kl_in="reward", scale_rewards="none").advantage(scores, g)
    assert_same(a, torch.tensor([0.25, -0.25]))
    out = GRPO(beta=0.25, kl_in="reward", scale_rewards="none")(scores, g)
    assert_same(out.per_item.detach(), -a)
    assert "kl" not in out.metrics


@pytest.mark.parametrize("cls", [GRPO, DAPO, DrGRPO, GSPO, CISPO, SAPO, VESPO, GMPO, RLOO, NFT])
def test_denoising_steps_and_tokens_with_equal_scores_have_equal_losses(cls):
    g = torch.Generator().manual_seed(3)
    theta, ref, old = (-torch.rand(4, 5, generator=g, dtype=torch.float64) for _ in range(3))
    mask = torch.ones(4, 5, dtype=torch.bool)
    groups = Groups(index=torch.arange(4), group=torch.tensor([0, 0, 1, 1]), reward=torch.tensor([1.0, 0, 0.2, 0.9]))
    settings = {"max_completion_length": 5} if cls is DrGRPO else {}
    tokens = cls(**settings)(Scores.tokens(theta, ref, old, mask=mask), groups)
    steps = cls()(Scores.steps(theta, ref, old), groups)
    assert_same(steps.per_item, tokens.per_item)
    assert steps.per_item.abs().sum() > 0


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="no expected gradient"):
        GRPO(beta=0.1, kl_estimator="k1", use_bias_correction_kl=False)
    with pytest.raises(ValueError, match="sum_then_normalize"):
        GRPO(beta=0.1, kl_in="reward", aggregate="normalize_then_sum")
    with pytest.raises(ValueError, match="epsilon"):
        GRPO(epsilon=0.0)
    with pytest.raises(ValueError, match="neg_weight"):
        NFT(neg_weight=-1.0)
    scores = Scores.tokens(torch.zeros(1, 1), mask=torch.ones(1, 1, dtype=torch.bool))
    one = Groups(index=torch.zeros(1, dtype=torch.int64), group=torch.zeros(1), reward=torch.ones(1))
    with pytest.raises(ValueError, match=r"units\.ref is missing"):
        GRPO(beta=0.1)(scores, one)


def test_a_reference_is_read_only_with_a_divergence():
    assert not GRPO().reads_reference()
    assert GRPO(beta=0.01).reads_reference()
    assert RLOO().reads_reference()
    assert not RLOO(beta=0.0).reads_reference()
    assert CoPG().reads_reference()


def test_rloo_clips_rewards_and_normalises_advantages():
    scores = Scores.tokens(torch.full((4,), -1.0))
    g = Groups(index=torch.arange(4), group=torch.tensor([0, 0, 1, 1]), reward=torch.tensor([9.0, 0.0, 1.0, 0.5]))
    assert RLOO(beta=0.0, reward_clip_range=(0.0, 2.0)).advantage(scores, g).tolist() == [2.0, -2.0, 0.5, -0.5]
    a = RLOO(beta=0.0, normalize_advantages=True).advantage(scores, g)
    assert_same(a.std().item(), 1.0, rtol=1e-3)


def test_nft_with_sequence_ratios_averages_rows_if_asked():
    theta = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-1.1, -1.0], [-1.2, -1.0]])
    scores = Scores.tokens(theta, None, old, mask=torch.ones(2, 2, dtype=torch.bool))
    g = Groups(index=torch.arange(2), group=torch.zeros(2), reward=torch.tensor([1.0, 0.0]))
    out = NFT(ratio_type="sequence", row_reduction="mean", clamp_negative=0.01)(scores, g)
    negative = -math.log((1 - 0.5 * math.exp(0.2)) / 0.5)
    assert_same(out.per_item.detach(), torch.tensor([-0.05, 0.5 * negative]), rtol=1e-5)
    assert_same(NFT(neg_weight=0.0)(scores, g).per_item[1].item(), 0.0)


def test_missing_rewards_leave_a_pair_out_of_the_regression():
    a, g = torch.tensor([1.0, 3.0, 100.0, 7.0], dtype=torch.float64), torch.tensor([0, 0, 0, 1])
    there = torch.tensor([True, True, False, True])
    assert_same(pair_squares(a, g, there), torch.tensor([4.0, 4.0, 0.0, 0.0], dtype=torch.float64))
