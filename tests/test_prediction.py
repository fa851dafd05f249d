"""Parameterisations: parity with diffusers' schedulers, exact conversions, and the error factors between spaces."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffalign.prediction import add_noise, convert, error_factor, mean_squared_error, target
from diffalign.schedules import Schedule, generator_for, sample_seed

KINDS = ("epsilon", "v_prediction", "sample")


def schedule(prediction="epsilon", zero_snr=False):
    scheduler = DDPMScheduler(
        prediction_type=prediction, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_snr
    )
    return scheduler, Schedule.variance_preserving(scheduler.alphas_cumprod, prediction)


def tensors(n=4):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 5, 5, generator=g), torch.randn(n, 3, 5, 5, generator=g)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_noising_and_v_target_equal_diffusers(zero_snr):
    scheduler, ours = schedule("v_prediction", zero_snr)
    x0, noise = tensors()
    t = torch.tensor([0, 250, 700, 999])
    alpha, sigma = ours.alpha_sigma(t)
    torch.testing.assert_close(add_noise(x0, noise, alpha, sigma), scheduler.add_noise(x0, noise, t))
    torch.testing.assert_close(target("v_prediction", x0, noise, alpha, sigma), scheduler.get_velocity(x0, noise, t))
    assert target("epsilon", x0, noise, alpha, sigma) is noise
    assert target("sample", x0, noise, alpha, sigma) is x0


def test_zero_terminal_snr_leaves_pure_noise_at_the_end():
    _, ours = schedule("v_prediction", True)
    alpha, sigma = ours.alpha_sigma(torch.tensor([999]))
    assert float(alpha) == 0.0
    assert float(sigma) == 1.0


@pytest.mark.parametrize(("source", "wanted"), list(itertools.permutations(KINDS, 2)))
def test_conversions_of_the_true_target_give_the_other_true_target_and_return(source, wanted):
    _, ours = schedule()
    x0, noise = tensors()
    alpha, sigma = ours.alpha_sigma(torch.tensor([20, 250, 700, 950]))
    x_t = add_noise(x0, noise, alpha, sigma)
    there = convert(target(source, x0, noise, alpha, sigma), x_t, alpha, sigma, source, wanted)
    torch.testing.assert_close(there, target(wanted, x0, noise, alpha, sigma), rtol=1e-3, atol=1e-3)
    back = convert(there, x_t, alpha, sigma, wanted, source)
    torch.testing.assert_close(back, target(source, x0, noise, alpha, sigma), rtol=1e-3, atol=1e-3)


def test_conversion_agrees_with_the_x0_that_diffusers_predicts():
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=True)
    ours = Schedule.variance_preserving(scheduler.alphas_cumprod, "v_prediction")
    scheduler.set_timesteps(10)
    x_t, output = tensors(1)
    t = torch.tensor([501])
    alpha, sigma = ours.alpha_sigma(t)
    expected = scheduler.step(output, 501, x_t).pred_original_sample
    torch.testing.assert_close(convert(output, x_t, alpha, sigma, "v_prediction", "sample"), expected)


@pytest.mark.parametrize(("source", "wanted"), list(itertools.permutations(KINDS, 2)))
def test_error_factor_is_the_ratio_of_squared_errors_of_one_prediction(source, wanted):
    _, ours = schedule()
    x0, noise = (x.double() for x in tensors())
    alpha, sigma = (v.double() for v in ours.alpha_sigma(torch.tensor([100, 250, 700, 900])))
    x_t = add_noise(x0, noise, alpha, sigma)
    output = (
        target(source, x0, noise, alpha, sigma) + 0.1 * torch.randn(x0.shape, generator=generator_for(1, "e")).double()
    )
    before = (output - target(source, x0, noise, alpha, sigma)).square().flatten(1).mean(1)
    said = convert(output, x_t, alpha, sigma, source, wanted)
    after = (said - target(wanted, x0, noise, alpha, sigma)).square().flatten(1).mean(1)
    torch.testing.assert_close(error_factor(source, wanted, alpha, sigma) * before, after, rtol=1e-6, atol=1e-12)


def test_mean_squared_error_is_a_mean_per_sample_in_float32():
    a, b = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16), torch.ones(2, 3, 4, 4, dtype=torch.bfloat16)
    b[1] *= 2
    torch.testing.assert_close(mean_squared_error(a, b), torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(mean_squared_error(a, b, "sum"), torch.tensor([48.0, 192.0]))


def test_seeds_depend_on_every_part_and_on_nothing_else():
    assert sample_seed(0, "a", 0) == sample_seed(0, "a", 0)
    assert len({sample_seed(0, "a", 0), sample_seed(1, "a", 0), sample_seed(0, "b", 0), sample_seed(0, "a", 1)}) == 4
    torch.testing.assert_close(
        torch.randn(3, generator=generator_for(5, "x", 2)), torch.randn(3, generator=generator_for(5, "x", 2))
    )
