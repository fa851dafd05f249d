"""Weights of unpaired objectives."""

import pytest
import torch

from diffalign import losses
from diffalign.losses import Items, Scores
from diffalign.losses.unpaired import (
    balanced_weights,
    classifier_probability,
    prompt_classifier,
    underlying_distribution_weight,
)


@pytest.mark.parametrize(("up", "down", "ratio"), [(100, 300, 1.0), (300, 100, 1.0), (300, 100, 4 / 3), (5, 5, 1.2)])
def test_balanced_weights_have_the_asked_ratio_and_only_raise(up, down, ratio):
    w_up, w_down = balanced_weights(up, down, ratio)
    assert w_up * up / (w_down * down) == pytest.approx(ratio)
    assert min(w_up, w_down) == 1


def test_a_missing_class_has_no_balance():
    with pytest.raises(ValueError, match="0 undesirable"):
        balanced_weights(3, 0)


def test_weight_of_undesirable_items_is_the_limited_odds_of_their_prompt():
    weight = underlying_distribution_weight(torch.tensor([0.0, 0.5, 0.75, 0.99, 1.0]))
    torch.testing.assert_close(weight, torch.tensor([0.5, 1.0, 3.0, 10.0, 10.0]))


def test_prompt_classifier_minimises_its_balanced_loss():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=g, dtype=torch.float64)
    up = x[:, 0] + 0.5 * torch.randn(60, generator=g, dtype=torch.float64) > 0.8
    w = prompt_classifier(x, up, penalty=0.7).requires_grad_()
    p = classifier_probability(w, x)
    share = torch.where(up, 30 / up.sum(), 30 / (~up).sum())
    loss = (share * -torch.where(up, p, 1 - p).log()).sum() + 0.35 * w[:-1].square().sum()
    (grad,) = torch.autograd.grad(loss, w)
    torch.testing.assert_close(grad, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-6)
    assert ((p > 0.5) == up).double().mean() > 0.8


def test_separable_prompts_and_equal_ones_have_finite_coefficients():
    x = torch.tensor([[-50.0], [-40.0], [60.0]])
    w = prompt_classifier(x, torch.tensor([False, False, True]), penalty=0.01)
    assert torch.isfinite(w).all()
    assert classifier_probability(w, x)[2] > 0.5
    same = prompt_classifier(torch.ones(4, 2), torch.tensor([True, False, False, False]))
    torch.testing.assert_close(classifier_probability(same, torch.ones(1, 2)).item(), 0.5, rtol=0, atol=1e-6)


def test_one_class_cannot_be_told_from_nothing():
    with pytest.raises(ValueError, match="items per class"):
        prompt_classifier(torch.zeros(3, 2), torch.ones(3, dtype=torch.bool))


def test_metrics_come_per_class():
    scores = Scores.tokens(torch.tensor([2.0, -1.0, 3.0]), torch.zeros(3))
    items = Items(index=torch.arange(3), label=torch.tensor([1.0, 0.0, 0.0]))
    metrics = losses.unpaired.APOZeroUnpaired(beta=1.0)(scores, items).metrics
    assert metrics["rewards/desirable"].tolist() == [2.0]
    assert metrics["rewards/undesirable"].tolist() == [-1.0, 3.0]
    assert metrics["implicit_acc"].tolist() == [1.0, 1.0, 0.0]


def test_labels_are_asked_for():
    scores = Scores.tokens(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"items\.label is missing"):
        losses.unpaired.APOZeroUnpaired(beta=1.0)(scores, Items(index=torch.arange(2)))
    with pytest.raises(ValueError, match="expected none below 0"):
        losses.unpaired.KTO(desirable_weight=-1.0)
