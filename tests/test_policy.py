"""Policy and reference on a real (tiny, untrained) SDXL network: what the two passes share, and where gradients go."""

from types import SimpleNamespace

import pytest
import torch
from tests_support import random_batch

from diffalign import adapters
from diffalign.config import DenoisingConfig, LoraConfig, ModelConfig, ReferenceConfig
from diffalign.data.batch import PairExample
from diffalign.evaluate import held_out_accuracy
from diffalign.families import NETWORK, load_family
from diffalign.losses import DPO
from diffalign.policy import Policy
from diffalign.references import Reference


@pytest.fixture(scope="module")
def family(tiny_folder):
    found = load_family(ModelConfig(family="sdxl", pretrained=str(tiny_folder)))
    found.load(NETWORK)
    adapters.attach(found.network, LoraConfig(rank=4, targets="attention"), seed=0)
    return found


@pytest.fixture
def fresh(family):
    """The network with an untouched adapter."""
    with torch.no_grad():
        for name, parameter in family.network.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    family.network.zero_grad(set_to_none=True)
    return family


def disturb(network, size=0.05):
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=g))


def score(objective, policy, batch):
    return objective(*policy.scores(batch, objective))


def test_a_fresh_adapter_agrees_with_the_reference_bitwise(fresh):
    batch = random_batch(2)
    ours, reference = Policy(fresh, fresh.network).errors(batch.chosen, batch.noise, batch.t, batch.chosen_conditioning)
    assert torch.equal(ours, reference)
    out = score(DPO(beta=5000.0), Policy(fresh, fresh.network), batch)
    assert torch.equal(out.per_item.detach(), torch.full((2,), 2.0).log())


def test_the_reference_is_untouched_by_a_trained_adapter(fresh):
    batch = random_batch(2)
    policy = Policy(fresh, fresh.network)
    _, before = policy.errors(batch.chosen, batch.noise, batch.t, batch.chosen_conditioning)
    disturb(fresh.network)
    ours, after = policy.errors(batch.chosen, batch.noise, batch.t, batch.chosen_conditioning)
    assert torch.equal(before, after)
    assert (ours - after).abs().min() > 1e-6


def test_gradients_reach_the_adapter_and_nothing_else(fresh):
    disturb(fresh.network)
    score(DPO(beta=100.0), Policy(fresh, fresh.network), random_batch(2)).loss.backward()
    with_gradient = {n for n, p in fresh.network.named_parameters() if p.grad is not None}
    assert with_gradient
    assert all("lora_" in name for name in with_gradient)


def test_identical_images_give_a_zero_margin_for_any_policy(fresh):
    disturb(fresh.network)
    batch = random_batch(2, same_images=True)
    out = score(DPO(beta=5000.0), Policy(fresh, fresh.network), batch)
    torch.testing.assert_close(out.metrics["rewards/margins"], torch.zeros(2), rtol=0, atol=2e-2)


def test_errors_in_another_space_differ_by_the_known_factor(fresh):
    batch = random_batch(2)
    policy = Policy(fresh, fresh.network)
    native, _ = policy.errors(batch.chosen, batch.noise, batch.t, batch.chosen_conditioning)
    policy.denoising = DenoisingConfig(error_space="epsilon")
    epsilon, _ = policy.errors(batch.chosen, batch.noise, batch.t, batch.chosen_conditioning)
    assert fresh.schedule.prediction_type == "v_prediction"
    torch.testing.assert_close(epsilon, native * fresh.schedule.alphas[batch.t].square())


def test_sum_is_the_mean_times_the_number_of_latent_elements(fresh):
    batch = random_batch(2)
    policy = Policy(fresh, fresh.network)
    mean, _ = policy.errors(batch.chosen, batch.noise, batch.t, batch.chosen_conditioning)
    policy.denoising = DenoisingConfig(error_reduction="sum")
    total, _ = policy.errors(batch.chosen, batch.noise, batch.t, batch.chosen_conditioning)
    torch.testing.assert_close(total, mean * batch.chosen[0].numel())


def test_the_error_is_measured_against_the_v_target(fresh):
    batch = random_batch(2)
    policy = Policy(fresh, fresh.network)
    ours, _ = policy.errors(batch.chosen, batch.noise, batch.t, batch.chosen_conditioning)
    abar = fresh.schedule.alphas[batch.t].square().view(-1, 1, 1, 1)
    x_t = abar.sqrt() * batch.chosen + (1 - abar).sqrt() * batch.noise
    v = abar.sqrt() * batch.noise - (1 - abar).sqrt() * batch.chosen
    with torch.no_grad():
        output = fresh.predict(fresh.network, x_t, batch.t, batch.chosen_conditioning)
    torch.testing.assert_close(ours.detach(), (output - v).square().mean((1, 2, 3)))


def test_splitting_a_batch_gives_the_same_losses(fresh):
    disturb(fresh.network)
    policy = Policy(fresh, fresh.network)
    whole = score(DPO(beta=50.0), policy, random_batch(4)).per_item
    parts = [score(DPO(beta=50.0), policy, random_batch(4, only=slice(i, i + 1))).per_item for i in range(4)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=1e-4)


@pytest.fixture
def dropping(tiny_folder):
    """A network of its own whose adapter drops half of its input, in training mode, and its adapter's parameters."""
    found = load_family(ModelConfig(family="sdxl", pretrained=str(tiny_folder)))
    found.load(NETWORK)
    params = adapters.attach(found.network, LoraConfig(rank=4, targets="attention", dropout=0.5), seed=0)
    disturb(found.network)
    found.network.train()
    return found, params


@pytest.mark.parametrize("scheme", ["sync", "mixture", "momentum"])
def test_dropout_is_the_policys_alone(dropping, scheme):
    family, params = dropping
    reference = Reference(ReferenceConfig(scheme=scheme), family.network, params)
    policy = Policy(family, family.network, reference=reference)
    rows = random_batch(2).stacked()
    torch.manual_seed(0)
    one, other = policy.measure(rows, residual=True), policy.measure(rows, residual=True)
    assert torch.equal(one.need_ref(), other.need_ref())
    assert not torch.equal(one.theta, other.theta)
    assert family.network.training
    assert all(part.training for part in family.network.modules())
    family.network.eval()
    assert torch.equal(policy.measure(rows).need_ref(), one.need_ref())
    assert not family.network.training


def test_dropout_is_off_where_images_are_inverted(dropping):
    family, _ = dropping
    policy = Policy(family, family.network, denoising=DenoisingConfig(inversion_steps=2))
    rows = random_batch(2).stacked()
    alpha_sigma = family.schedule.alpha_sigma(rows.t)
    one, other = (policy._noised(rows, *alpha_sigma, "ddim_inversion")[0] for _ in range(2))
    assert torch.equal(one, other)
    assert family.network.training


def test_held_out_pairs_are_measured_against_the_base_whatever_the_runs_reference_is(fresh):
    """A reference that has just been synchronised is the policy: nothing is gained over it, and accuracy is one half."""
    disturb(fresh.network, 0.5)
    params = adapters.parameters(fresh.network)
    synced = Policy(fresh, fresh.network, reference=Reference(ReferenceConfig(scheme="sync"), fresh.network, params))
    batch = random_batch(4)
    pairs = [
        PairExample(
            id=batch.ids[i],
            chosen=batch.chosen[i],
            rejected=batch.rejected[i],
            text={name: value[i] for name, value in batch.text.items()},
            chosen_image={"time_ids": batch.chosen_image["time_ids"][i]},
            rejected_image={"time_ids": batch.rejected_image["time_ids"][i]},
            p=1.0,
            weight=1.0,
            t=int(batch.t[i]),
            noise=batch.noise[i],
        )
        for i in range(4)
    ]
    data = SimpleNamespace(
        data=SimpleNamespace(target_sizes=[(32, 32)] * 4), example=lambda index, visit, keep_prompt: pairs[index]
    )
    gained, plain = (held_out_accuracy(policy, data, range(4)) for policy in (synced, Policy(fresh, fresh.network)))
    assert gained == plain
    assert gained.mean != 0.5
    assert torch.equal(synced.measure(batch.stacked()).log_ratio(), torch.zeros(8))
