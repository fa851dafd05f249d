"""The sampler that stores what training needs: the same as diffusers' schedulers, and densities that are densities."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from diffalign.errors import ConfigError
from diffalign.prediction import convert
from diffalign.sampling.trajectories import Grid, log_density, make_grid, next_mean, sample
from diffalign.schedules import Schedule

SHAPE = (3, 4, 4)


class Model:
    """A family as far as the sampler knows it, with a fixed linear network."""

    linspace_sigmas = False

    def __init__(self, scheduler, prediction):
        self.scheduler = scheduler
        if prediction == "flow_prediction":
            self.schedule = Schedule.flow(scheduler.config.shift)
        else:
            self.schedule = Schedule.variance_preserving(scheduler.alphas_cumprod, prediction)

    def grid(self, steps):
        return make_grid(self, self.scheduler, steps, SHAPE)


def ddim(prediction="epsilon", **more):
    options = {"beta_schedule": "scaled_linear", "clip_sample": False, "prediction_type": prediction} | more
    return Model(DDIMScheduler(**options), prediction)


def flow(shift=3.0):
    return Model(FlowMatchEulerDiscreteScheduler(shift=shift), "flow_prediction")


def network(x, times):
    return 0.3 * x + 0.1 * torch.tanh(x) + times.view(-1, 1, 1, 1) / 5000


def noise(n=2, seed=0):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(
    ("prediction", "more"),
    [
        ("epsilon", {}),
        ("v_prediction", {}),
        ("v_prediction", ZERO_SNR),
        ("epsilon", {"set_alpha_to_one": False, "steps_offset": 1}),
    ],
)
def test_every_step_equals_ddim_of_diffusers(prediction, more, eta):
    model = ddim(prediction, **more)
    grid = model.grid(10)
    scheduler = model.scheduler
    scheduler.set_timesteps(10)
    x, xi = noise(), noise(seed=1)
    for number, t in enumerate(scheduler.timesteps):
        output = network(x, t.expand(2).float())
        expected = scheduler.step(output, t, x, eta=eta, variance_noise=xi).prev_sample
        deviation = torch.full((2,), grid.deviation(number, eta))
        ours = next_mean(grid, torch.full((2,), number), x, output, deviation) + deviation.view(-1, 1, 1, 1) * xi
        if torch.isfinite(expected).all():  # diffusers takes the root of a rounding error where all noise is fresh
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)
        else:
            assert eta == 1.0
            assert number == 0
        assert torch.isfinite(ours).all()
        x = ours


def test_eta_one_is_the_ddpm_posterior():
    model = ddim()
    grid = model.grid(1000)
    ddpm = DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    ddpm.set_timesteps(1000)
    for number in (10, 500, 990):
        t = int(grid.times[number])
        assert grid.deviation(number, 1.0) == pytest.approx(float(ddpm._get_variance(t)) ** 0.5, rel=1e-3)


def test_a_deterministic_run_equals_euler_of_diffusers():
    model = flow()
    grid = model.grid(8)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    x = noise()
    ours = sample(network, grid, x, 0.0)
    for number, t in enumerate(scheduler.timesteps):
        torch.testing.assert_close(ours.outputs[number], network(x, t.expand(2)))
        x = scheduler.step(network(x, t.expand(2)), t, x).prev_sample
        torch.testing.assert_close(ours.latents[number + 1], x, rtol=1e-4, atol=1e-5)
    assert len(ours.latents) == 9


def test_a_flow_step_is_that_of_diffusion_nft():
    grid = flow(1.0).grid(10)
    for number in (1, 4, 8):
        t, s = float(grid.sigmas[number]), float(grid.sigmas[number + 1])
        rho = s * math.sqrt(1 - s**2 * (1 - t) ** 2 / (t**2 * (1 - s) ** 2))
        assert grid.deviation(number, 1.0) == pytest.approx(rho, rel=1e-5)


@pytest.mark.parametrize("model", [ddim(), ddim("v_prediction", **ZERO_SNR), flow()], ids=["ddim", "zero-snr", "flow"])
def test_the_true_prediction_keeps_the_noise_levels(model):
    """From x_t = a x0 + s n, with x0 and n known, the next latent is a' x0 + s' of unit noise."""
    grid = model.grid(10)
    x0, n, xi = noise(seed=3), noise(seed=4), noise(seed=5)
    for number in (0, 3, 8):
        ones = torch.ones(2)
        a, s = grid.alphas[number] * ones, grid.sigmas[number] * ones
        x = a.view(-1, 1, 1, 1) * x0 + s.view(-1, 1, 1, 1) * n
        prediction = grid.prediction_type
        if prediction == "v_prediction":
            output = a.view(-1, 1, 1, 1) * n - s.view(-1, 1, 1, 1) * x0
        else:
            output = n - x0 if prediction == "flow_prediction" else n
        torch.testing.assert_close(convert(output, x, a, s, prediction, "sample"), x0, rtol=1e-3, atol=1e-3)
        d = torch.full((2,), grid.deviation(number, 0.7))
        mean = next_mean(grid, torch.full((2,), number), x, output, d)
        kept = math.sqrt(float(grid.sigmas[number + 1]) ** 2 - float(d[0]) ** 2)
        torch.testing.assert_close(mean, grid.alphas[number + 1] * x0 + kept * n, rtol=1e-3, atol=1e-3)
        assert xi.shape == mean.shape


def test_densities_are_means_of_gaussian_ones():
    x, mean, deviation = noise(seed=1), noise(seed=2), torch.tensor([0.3, 1.7])
    ours = log_density(x, mean, deviation)
    exact = torch.distributions.Normal(mean, deviation.view(-1, 1, 1, 1)).log_prob(x).mean((1, 2, 3))
    torch.testing.assert_close(ours, exact)


def test_the_last_step_has_no_density():
    grid = ddim("v_prediction", **ZERO_SNR).grid(10)
    assert grid.random_steps(1.0) == list(range(9))
    assert grid.random_steps(0.0) == []
    assert isinstance(grid, Grid)


def test_where_the_last_level_keeps_noise_its_step_has_one():
    """Stable Diffusion 1.5's scheduler ends at alphas_cumprod[0]."""
    grid = ddim(set_alpha_to_one=False, steps_offset=1).grid(20)
    assert grid.times[-1] == 1
    abar = DDIMScheduler(beta_schedule="scaled_linear").alphas_cumprod.double()
    variance = (1 - abar[0]) / (1 - abar[1]) * (1 - abar[1] / abar[0])
    assert grid.deviation(19, 1.0) == pytest.approx(float(variance) ** 0.5, rel=1e-3)


def test_published_factors_of_d3po():
    """K^2 / (2 sd^2) on eps errors of SD1.5, 20 steps, eta 1: the table of yk7333/d3po's setting."""
    grid = ddim(beta_start=0.00085, beta_end=0.012, set_alpha_to_one=False, steps_offset=1).grid(20)
    known = {951: 0.364, 451: 0.194, 151: 0.376, 101: 0.651, 51: 14.75, 1: 0.503}
    for number, t in enumerate(grid.times.tolist()):
        if t not in known:
            continue
        d = torch.tensor([grid.deviation(number, 1.0)]).double()
        x, one = torch.zeros(1, *SHAPE).double(), torch.ones(1, *SHAPE).double()
        step = torch.tensor([number])
        slope = next_mean(grid, step, x, one, d) - next_mean(grid, step, x, 0 * one, d)
        factor = float(slope.square().mean() / (2 * d**2))
        assert factor == pytest.approx(known[t], rel=0.05), t


def test_what_is_not_kept_changes_nothing():
    grid = flow().grid(4)
    kept, clean = sample(network, grid, noise(), 0.0), sample(network, grid, noise(), 0.0, keep=False)
    assert torch.equal(kept.clean, clean.clean)
    assert (len(kept.latents), len(clean.latents), len(clean.outputs)) == (5, 1, 0)


def test_a_stochastic_run_needs_noise():
    with pytest.raises(AssertionError, match="needs noise"):
        sample(network, flow().grid(4), noise(), 1.0)


def test_no_step_of_a_grid_stays_where_it_is():
    """Stable Diffusion 1.5's own scheduler has its second timestep twice."""
    scheduler = PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)
    grid = Model(scheduler, "epsilon").grid(5)
    assert (grid.times.diff() < 0).all()
    assert all(grid.deviation(k, 1.0) > 0 for k in range(len(grid) - 1))


def test_predictions_are_kept_only_where_they_are_wanted():
    grid = ddim().grid(3)
    made = sample(network, grid, noise(), 0.0, outputs=False)
    assert len(made.latents) == 4
    assert made.outputs == []


# -- other kernels of flow models ------------------------------------------------------------------------------------


def flow_grid(kernel, steps=4):
    model = flow()
    return make_grid(model, model.scheduler, steps, SHAPE, kernel)


def at(grid, step, eta, x, v):
    deviation = torch.full((len(x),), grid.deviation(step, eta))
    return next_mean(grid, torch.full((len(x),), step), x, v, deviation), deviation


@pytest.mark.parametrize("kernel", ["flow_sde", "constant_sde", "cps"])
def test_kernels_without_noise_are_the_euler_step(kernel):
    grid, x, v = flow_grid(kernel), noise(), noise(seed=1)
    mean, deviation = at(grid, 1, 0.0, x, v)
    assert not deviation.any()
    torch.testing.assert_close(mean, x + (grid.sigmas[2] - grid.sigmas[1]) * v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ["ddim", "flow_sde", "constant_sde", "cps"])
def test_at_noise_level_zero_the_image_is_that_of_the_ode(kernel):
    grid = flow_grid(kernel)
    x = noise()
    for number in range(len(grid)):
        x = x + (grid.sigmas[number + 1] - grid.sigmas[number]) * network(x, grid.times[number].expand(2))
    torch.testing.assert_close(sample(network, grid, noise(), 0.0).clean, x, rtol=1e-4, atol=1e-5)
    stochastic = sample(network, grid, noise(), 0.5, lambda step: noise(seed=step))
    assert not torch.allclose(stochastic.clean, x, atol=1e-2)


@pytest.mark.parametrize(("kernel", "eta"), [("flow_sde", 0.7), ("constant_sde", 0.3)])
@pytest.mark.parametrize("step", [0, 2])
def test_sde_steps_are_those_of_the_published_code(kernel, eta, step):
    """x (1 + S^2 dt / (2 t)) + v (1 + S^2 (1 - t) / (2 t)) dt, and S sqrt(-dt)."""
    grid, x, v = flow_grid(kernel), noise(), noise(seed=1)
    t, dt = float(grid.sigmas[step]), float(grid.sigmas[step + 1] - grid.sigmas[step])
    below = 1 - t if t < 1 else 1 - float(grid.sigmas[1])
    s = eta if kernel == "constant_sde" else eta * math.sqrt(t / below)
    mean, deviation = at(grid, step, eta, x, v)
    expected = x * (1 + s**2 / (2 * t) * dt) + v * (1 + s**2 * (1 - t) / (2 * t)) * dt
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)
    assert float(deviation[0]) == pytest.approx(s * math.sqrt(-dt), rel=1e-5)


def test_published_deviations_of_flow_grpo():
    """SD3.5's ten steps at a = 0.7."""
    model = flow(3.0)
    grid = make_grid(model, model.scheduler, 10, SHAPE, "flow_sde")
    found = [grid.deviation(k, 0.7) for k in range(10)]
    assert found == pytest.approx([0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.0063], rel=5e-3)


def test_cps_keeps_the_noise_level_and_has_no_noise_at_the_end():
    grid, x0, xi = flow_grid("cps"), noise(), noise(seed=1)
    s, s_next = grid.sigmas[1], grid.sigmas[2]
    x = (1 - s) * x0 + s * xi
    mean, deviation = at(grid, 1, 0.8, x, xi - x0)
    assert float(deviation[0]) == pytest.approx(float(s_next) * math.sin(0.4 * math.pi), rel=1e-5)
    left = (s_next**2 - deviation[0] ** 2).sqrt()
    torch.testing.assert_close(mean, (1 - s_next) * x0 + left * xi, rtol=1e-4, atol=1e-5)
    assert grid.deviation(len(grid) - 1, 0.8) == 0
    torch.testing.assert_close(log_density(mean + 0.5, mean, deviation, "cps"), torch.full((2,), -0.25))


def test_flow_kernels_are_refused_on_other_models():
    model = ddim()
    with pytest.raises(ConfigError, match="a step of flow models"):
        make_grid(model, model.scheduler, 4, SHAPE, "flow_sde")


def test_samples_are_stochastic_only_where_they_are_asked_to_be():
    grid = ddim().grid(4)
    mask = {1: torch.tensor([True, False])}

    def stochastic(step):
        return mask.get(step, torch.tensor([False, False]))

    made = sample(network, grid, noise(), 1.0, lambda step: noise(seed=step), stochastic=stochastic)
    still = sample(network, grid, noise(), 0.0)
    torch.testing.assert_close(made.clean[1], still.clean[1])
    assert not torch.allclose(made.clean[0], still.clean[0], atol=1e-3)
    torch.testing.assert_close(made.latents[1], still.latents[1])
