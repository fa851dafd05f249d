"""DDIM inversion as DDIM-InPO and SmPO use it, and scores at inverted latents."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from tests_support import random_batch

from diffalign import adapters
from diffalign.config import DenoisingConfig, LoraConfig, ModelConfig
from diffalign.data.batch import Rows
from diffalign.families import NETWORK, load_family
from diffalign.losses import DPO, find
from diffalign.policy import Policy
from diffalign.prediction import convert
from diffalign.schedules import Schedule


def vp(prediction):
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return Schedule.variance_preserving(scheduler.alphas_cumprod, prediction)


class Known(Policy):
    """A policy whose network predicts a given noise, whatever it sees; counts its calls."""

    def __init__(self, schedule, noise, **denoising):
        self.family = SimpleNamespace(schedule=schedule, dtype=torch.float32)
        self.noise, self.calls = noise, []
        self.denoising = DenoisingConfig(**denoising)
        self.bare = self.network = None
        self.reference, self.forwards = None, 0
        from contextlib import nullcontext

        self.autocast = nullcontext

    def _call(self, network, x_t, t, conditioning):
        self.calls.append(t.tolist())
        alpha, sigma = self.family.schedule.alpha_sigma(t)
        noise = self.noise[conditioning["row"].long()]
        return convert(noise, x_t, alpha, sigma, "epsilon", self.family.schedule.prediction_type)


def setup(n=4):
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(n, 3, 4, 4, generator=g), torch.randn(n, 3, 4, 4, generator=g)
    return x0, noise, {"row": torch.arange(n)}


@pytest.mark.parametrize("schedule", [vp("epsilon"), vp("v_prediction"), Schedule.flow(3.0)], ids=["eps", "v", "flow"])
@pytest.mark.parametrize("renoise", [False, True])
def test_a_constant_noise_comes_back_at_exactly_the_timestep(schedule, renoise):
    x0, noise, row = setup()
    t = torch.tensor([3, 150, 501, 950])
    policy = Known(schedule, noise)
    x_t, implied = policy.invert(x0, t, row, renoise=renoise)
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in schedule.alpha_sigma(t))
    torch.testing.assert_close(x_t, alpha * x0 + sigma * noise, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(implied, noise, rtol=2e-3, atol=2e-3)


def test_the_released_code_stops_at_the_grid_level_below_the_timestep():
    """Its implied noise then holds a part of the image, rho noise + k x0: the constants of (950, 901), (200, 101)."""
    schedule = vp("epsilon")
    x0, noise, row = setup(2)
    t = torch.tensor([950, 200])
    x_t, implied = Known(schedule, noise, inversion_level="grid").invert(x0, t, row)
    level = torch.tensor([901, 101])
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in schedule.alpha_sigma(level))
    torch.testing.assert_close(x_t, alpha * x0 + sigma * noise, rtol=1e-4, atol=1e-5)
    rho, k = torch.tensor([0.997, 0.66]).view(-1, 1, 1, 1), torch.tensor([0.03, 0.155]).view(-1, 1, 1, 1)
    torch.testing.assert_close(implied, rho * noise + k * x0, rtol=0.02, atol=0.02)


def test_only_rows_below_their_timestep_are_computed():
    x0, noise, row = setup(3)
    policy = Known(vp("epsilon"), noise)
    policy.invert(x0, torch.tensor([50, 250, 999]), row)
    assert [len(call) for call in policy.calls] == [3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1]
    assert policy.calls[1] == [50, 101, 101]
    assert policy.calls[3] == [250, 301]


def test_renoise_predicts_twice_at_every_level():
    x0, noise, row = setup(2)
    once, twice = Known(vp("epsilon"), noise), Known(vp("epsilon"), noise)
    once.invert(x0, torch.tensor([400, 600]), row)
    twice.invert(x0, torch.tensor([400, 600]), row, renoise=True)
    assert len(twice.calls) == 2 * len(once.calls)


def test_noise_of_the_inversion_is_that_of_the_sampler_on_the_same_levels():
    """A stochastic DDIM step from 301 down to 201 would add this much; the first step, from clean, adds none."""
    schedule = vp("epsilon")
    abar = schedule.alphas.double().square()
    policy = Known(schedule, setup(1)[1], inversion_noise=0.5)
    variance = (1 - abar[201]) / (1 - abar[301]) * (1 - abar[301] / abar[201])
    found = policy._deviation(torch.tensor([301, 1]), torch.tensor([201, -1]))
    torch.testing.assert_close(found, torch.tensor([float(variance) ** 0.5, 0.0]), rtol=1e-3, atol=1e-6)


def test_noise_of_the_inversion_becomes_part_of_the_target():
    x0, noise, row = setup(2)
    t, own = torch.tensor([101, 501]), torch.randn(x0.shape, generator=torch.Generator().manual_seed(7))
    schedule = vp("epsilon")
    still, _ = Known(schedule, noise).invert(x0, t, row)
    policy = Known(schedule, noise, inversion_noise=0.5)
    moved, implied = policy.invert(x0, t, row, noise=own)
    again, _ = policy.invert(x0, t, row, noise=own)
    assert torch.equal(moved, again)
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in schedule.alpha_sigma(t))
    torch.testing.assert_close(implied, (moved - alpha * x0) / sigma)
    # two levels up to 101: the first adds none, the second half of its deviation
    d = 0.5 * policy._deviation(torch.tensor([101]), torch.tensor([1]))
    torch.testing.assert_close((moved - still)[0].std(), (d * own[0].std())[0], rtol=1e-3, atol=1e-5)
    assert (moved - still)[1].std() > 0.1


def test_noise_at_grid_levels_is_that_of_the_step_from_the_level_above():
    """As released: at level s the deviation of the sampler's step from s + 100, at the last one of the table's end."""
    x0, noise, row = setup(1)
    own = torch.randn(x0.shape, generator=torch.Generator().manual_seed(7))
    schedule, t = vp("epsilon"), torch.tensor([50])  # the grid's 1 alone lies below
    still, _ = Known(schedule, noise, inversion_level="grid").invert(x0, t, row)
    policy = Known(schedule, noise, inversion_level="grid", inversion_noise=0.5)
    moved, _ = policy.invert(x0, t, row, noise=own)
    abar = schedule.alphas.double().square()
    deviation = ((1 - abar[1]) / (1 - abar[101]) * (1 - abar[101] / abar[1])).sqrt()
    torch.testing.assert_close((moved - still).std() / own.std(), 0.5 * deviation.float(), rtol=1e-3, atol=1e-5)
    last = policy.invert(x0, torch.tensor([999]), row, noise=own)[0]
    assert last.isfinite().all()


@pytest.fixture(scope="module")
def family(tiny_folder):
    found = load_family(ModelConfig(family="sdxl", pretrained=str(tiny_folder)))
    found.load(NETWORK)
    adapters.attach(found.network, LoraConfig(rank=4, targets="attention"), seed=0)
    return found


def test_inversion_makes_each_image_its_own_noise_and_no_margin_without_an_adapter(family):
    batch = random_batch(2, t=400)
    policy = Policy(family, family.network)
    objective = find("ddim_inpo")(beta=5000.0)
    scores, layout = policy.scores(batch, objective)
    torch.testing.assert_close(objective(scores, layout).per_item.detach(), torch.full((2,), 2.0).log())
    forward, _ = policy.scores(batch, DPO(beta=5000.0))
    assert (scores.error - forward.error).abs().min() > 1e-4
    policy.denoising = DenoisingConfig(noising="forward")
    again, _ = policy.scores(batch, objective)
    torch.testing.assert_close(again.error, forward.error)


def test_gradient_comes_from_the_last_forward_alone(family):
    batch = random_batch(2, t=400)
    policy = Policy(family, family.network)
    x_t, implied = policy.invert(batch.chosen, batch.t, batch.chosen_conditioning)
    assert not x_t.requires_grad
    assert not implied.requires_grad
    rows = Rows(x0=batch.chosen, noise=batch.noise, t=batch.t, conditioning=batch.chosen_conditioning)
    scores = policy.measure(rows, noising="ddim_inversion")
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in family.schedule.alpha_sigma(batch.t))
    with torch.no_grad():
        output = family.predict(family.network, x_t, batch.t, batch.chosen_conditioning)
    v = alpha * implied - sigma * batch.chosen
    torch.testing.assert_close(scores.error.detach(), (output - v).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


def test_residuals_are_errors_element_by_element_also_in_another_space(family):
    batch = random_batch(2)
    rows = batch.stacked()
    for space in ("native", "epsilon"):
        policy = Policy(family, family.network, denoising=DenoisingConfig(error_space=space))
        scores = policy.measure(rows, residual=True)
        torch.testing.assert_close(scores.residual.square().mean((1, 2, 3)), scores.error)
        torch.testing.assert_close(scores.ref_residual.square().mean((1, 2, 3)), -2 * scores.ref)
    assert policy.measure(rows).residual is None
