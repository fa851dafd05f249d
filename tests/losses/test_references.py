"""Reference and update schemes: arithmetic on scores, logits, parameters and LoRA factors."""

import pytest
import torch

from diffalign.losses.references import (
    blend,
    extrapolate,
    extrapolate_lora,
    extrapolate_parameters,
    geometric_mixture,
    lora_delta,
    mixture_logits,
    sync_due,
)


@pytest.fixture
def logits():
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 5, generator=g, dtype=torch.float64) for _ in range(2))


def test_mixture_of_scores_is_the_weighted_sum():
    s = torch.tensor([-1.0, -4.0]), torch.tensor([-3.0, -2.0])
    torch.testing.assert_close(geometric_mixture(s, (0.25, 0.75)), torch.tensor([-2.5, -2.5]))
    torch.testing.assert_close(geometric_mixture(s[:1], (1.0,)), s[0])


@pytest.mark.parametrize(("count", "weights"), [(2, (0.5, 0.6)), (2, (1.0,)), (0, ())])
def test_mixtures_that_do_not_add_up_are_refused(count, weights):
    with pytest.raises(ValueError, match=r"expected (1|the same number)"):
        geometric_mixture([torch.zeros(1)] * count, weights)


def test_mixture_of_logits_is_the_normalised_geometric_mixture(logits):
    policy, ref = (x.softmax(-1) for x in logits)
    expected = policy**0.7 * ref**0.3
    torch.testing.assert_close(
        mixture_logits(*logits, weight=0.3).softmax(-1), expected / expected.sum(-1, keepdim=True)
    )


def test_differences_of_mixture_scores_need_no_normaliser(logits):
    """Between responses to one prompt, summed scores and log-probabilities of the mixture differ by a constant."""
    logp = [x.log_softmax(-1) for x in logits]
    mixed = geometric_mixture([x[0] for x in logp], (0.6, 0.4))
    exact = mixture_logits(*logits, weight=0.4).log_softmax(-1)[0]
    torch.testing.assert_close(mixed - mixed[0], exact - exact[0])


def test_extrapolated_log_probabilities_are_linear_in_logits(logits):
    newer, older = logits
    policy = extrapolate(newer, older, 0.4).softmax(-1)
    expected = newer.softmax(-1) * (newer.softmax(-1) / older.softmax(-1)) ** 0.4
    torch.testing.assert_close(policy, expected / expected.sum(-1, keepdim=True))
    torch.testing.assert_close(extrapolate(newer, older, 0.0), newer)


def test_extrapolating_weights_is_extrapolating_logits_only_for_linear_models():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, generator=g, dtype=torch.float64)
    new, old = ([torch.randn(4, 4, generator=g, dtype=torch.float64) for _ in range(2)] for _ in range(2))
    made = extrapolate_parameters(new, old, 0.5)
    torch.testing.assert_close(x @ made[0], extrapolate(x @ new[0], x @ old[0], 0.5))

    def deep(weights):
        return (x @ weights[0]).tanh() @ weights[1]

    assert not torch.allclose(deep(made), extrapolate(deep(new), deep(old), 0.5), atol=1e-2)


def test_blend_moves_the_target_towards_the_source_in_place():
    target, source = [torch.tensor([0.0, 10.0])], [torch.tensor([1.0, 20.0], requires_grad=True)]
    held = target[0]
    blend(target, source, 0.6)
    assert held is target[0]
    torch.testing.assert_close(held, torch.tensor([0.6, 16.0]))
    assert not held.requires_grad
    blend(target, source, 1.0)
    torch.testing.assert_close(held, source[0].detach())


def test_repeated_blends_are_an_exponential_average():
    target = [torch.zeros(1, dtype=torch.float64)]
    for _ in range(10):
        blend(target, [torch.ones(1, dtype=torch.float64)], 0.1)
    torch.testing.assert_close(target[0].item(), 1 - 0.9**10)


def test_blends_of_what_does_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="0 <= weight <= 1"):
        blend([torch.zeros(1)], [torch.zeros(1)], 1.5)
    with pytest.raises(ValueError, match="do not belong together"):
        blend([torch.zeros(1)], [torch.zeros(2)], 0.5)
    with pytest.raises(ValueError, match="shorter"):
        blend([torch.zeros(1), torch.zeros(1)], [torch.zeros(1)], 0.5)


def test_a_reference_is_synchronised_after_every_so_many_steps():
    assert [step for step in range(9) if sync_due(step, 4)] == [4, 8]


# -- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapters():
    """(A, B) of rank 2 and rank 3 on a 6 -> 5 layer."""
    g = torch.Generator().manual_seed(2)

    def make(rank):
        return torch.randn(rank, 6, generator=g, dtype=torch.float64), torch.randn(
            5, rank, generator=g, dtype=torch.float64
        )

    return make(2), make(3)


@pytest.mark.parametrize("amount", [-0.5, 0.0, 0.3, 2.0])
def test_extrapolated_lora_is_the_extrapolated_weight_update(adapters, amount):
    new, old = adapters
    a, b = extrapolate_lora(new, old, amount, scale=(2.0, 0.5))
    assert a.shape == (5, 6)
    assert b.shape == (5, 5)
    delta_new, delta_old = lora_delta(*new, 2.0), lora_delta(*old, 0.5)
    torch.testing.assert_close(lora_delta(a, b), delta_new + amount * (delta_new - delta_old))


def test_lora_factors_must_not_be_extrapolated_separately():
    """A and B each on its own leaves cross terms: with the update doubling from one adapter to the next, far from small."""
    g = torch.Generator().manual_seed(3)
    old = torch.randn(2, 6, generator=g, dtype=torch.float64), torch.randn(5, 2, generator=g, dtype=torch.float64)
    new = old[0] * 2**0.5, old[1] * 2**0.5
    amount = 1.0
    apart = lora_delta(*extrapolate_parameters(new, old, amount))
    right = lora_delta(*extrapolate_lora(new, old, amount))
    torch.testing.assert_close(right, 3 * lora_delta(*old))
    # (2 sqrt 2 - 1)^2 of the old update instead of 3 times.
    torch.testing.assert_close(apart, (2 * 2**0.5 - 1) ** 2 * lora_delta(*old))
    assert (apart - right).norm() > 0.1 * right.norm()


def test_averaging_lora_factors_is_not_averaging_updates(adapters):
    new, _ = adapters
    turned = -new[0], -new[1]  # the same update
    torch.testing.assert_close(lora_delta(*turned), lora_delta(*new))
    factors = [x.clone() for x in turned]
    blend(factors, new, 0.5)
    torch.testing.assert_close(lora_delta(*factors), torch.zeros(5, 6, dtype=torch.float64))
    torch.testing.assert_close(lora_delta(*extrapolate_lora(new, turned, -0.5)), lora_delta(*new))
