"""Links: values and slopes at zero, closed forms, and the difference between two kinds of label noise."""

import math

import pytest
import torch

from diffalign.losses.links import hinge, logistic, robust_logistic, square

Z = torch.linspace(-6, 6, 25, dtype=torch.float64).float()


def slope_at(link, z):
    z = torch.tensor([z], requires_grad=True)
    link(z).sum().backward()
    return float(z.grad)


@pytest.mark.parametrize(
    ("link", "value", "slope"),
    [
        (logistic, math.log(2), -0.5),
        (lambda z: logistic(z, 0.9), math.log(2), -0.4),
        (lambda z: robust_logistic(z, 0.1), math.log(2), -0.5 / 0.8),
        (hinge, 1.0, -1.0),
        (square, 0.25, -1.0),
        (lambda z: square(z, beta=0.1), 25.0, -100.0),
    ],
)
def test_value_and_slope_at_zero(link, value, slope):
    assert float(link(torch.zeros(1))) == pytest.approx(value, rel=1e-6)
    assert slope_at(link, 0.0) == pytest.approx(slope, rel=1e-6)


def test_logistic_is_the_negative_log_of_the_logistic_function():
    torch.testing.assert_close(logistic(Z), -torch.log(torch.sigmoid(Z.double())).float(), rtol=1e-5, atol=1e-6)


def test_swapping_the_pair_changes_the_logistic_loss_by_exactly_the_margin():
    torch.testing.assert_close(logistic(-Z) - logistic(Z), Z, rtol=1e-5, atol=1e-5)


def test_a_tie_is_symmetric_and_has_no_slope_at_zero():
    for link in (logistic, hinge, square):
        torch.testing.assert_close(link(Z, 0.5), link(-Z, 0.5))
        assert slope_at(lambda z, link=link: link(z, 0.5), 0.0) == pytest.approx(0.0, abs=1e-7)


def test_conservative_smoothing_has_its_optimum_at_the_log_odds():
    best = math.log(0.8 / 0.2)
    assert slope_at(lambda z: logistic(z, 0.8), best) == pytest.approx(0.0, abs=1e-6)
    entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert float(logistic(torch.tensor([best]), 0.8)) == pytest.approx(entropy, rel=1e-5)


def test_robust_loss_is_unbiased_under_flipped_labels():
    e = 0.2
    flipped = (1 - e) * robust_logistic(Z, e) + e * robust_logistic(-Z, e)
    torch.testing.assert_close(flipped, logistic(Z), rtol=1e-4, atol=1e-5)


def test_robust_loss_is_unbounded_below_where_the_conservative_one_is_not():
    assert float(robust_logistic(torch.tensor([20.0]), 0.2)) == pytest.approx(-20 * 0.2 / 0.6, rel=1e-3)
    assert float(logistic(torch.tensor([20.0]), 0.8)) > 0


def test_square_is_zero_at_one_half_and_its_paper_scale_is_in_units_of_the_difference():
    assert float(square(torch.tensor([0.5]))) == 0.0
    beta, difference = 0.3, torch.tensor([0.7])
    expected = (difference - 1 / (2 * beta)).square()
    torch.testing.assert_close(square(beta * difference, beta=beta), expected)


def test_hinge_stops_at_a_margin_of_one():
    assert float(hinge(torch.tensor([1.0]))) == 0.0
    assert slope_at(hinge, 1.5) == 0.0
    assert slope_at(hinge, 0.5) == -1.0


@pytest.mark.parametrize("link", [logistic, lambda z: robust_logistic(z, 0.1), hinge, square])
def test_extreme_margins_stay_finite_with_finite_slopes(link):
    z = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = link(z)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert z.grad.isfinite().all()


def test_half_precision_margins_are_computed_in_float32():
    assert logistic(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("noise", [-0.1, 0.5, 0.7])
def test_robust_noise_out_of_range_is_refused(noise):
    with pytest.raises(ValueError, match="label noise"):
        robust_logistic(torch.zeros(1), noise)
