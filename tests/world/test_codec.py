"""The closed-form autoencoder."""

import pytest
import torch

from diffalign.world.codec import PatchVAE
from diffalign.world.scenes import draw, sample_scenes
from diffalign.world.verifier import verify


@pytest.fixture(scope="module")
def vae() -> PatchVAE:
    return PatchVAE(latent_channels=20).fit(draw(sample_scenes(800, seed=1)) * 2 - 1)


@torch.no_grad()
def test_round_trip_keeps_what_the_verifier_reads(vae: PatchVAE):
    scenes = sample_scenes(120, seed=9)
    images = draw(scenes)
    latents = vae.encode(images * 2 - 1).latent_dist.mode()
    assert latents.shape == (120, 20, 8, 8)
    again = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    assert (again - images).square().mean() < 10**-2.5  # 25 dB
    verdicts = verify(again, [scene.caption for scene in scenes])
    assert sum(v["strict"] for v in verdicts) / len(verdicts) > 0.9


@torch.no_grad()
def test_complete_codec_is_exact():
    images = draw(sample_scenes(60, seed=2)) * 2 - 1
    vae = PatchVAE(latent_channels=48).fit(images)
    assert (vae.decode(vae.encode(images).latent_dist.mode()).sample - images).abs().max() < 1e-3


@torch.no_grad()
def test_latents_are_reproducible_and_near_unit_scale(vae: PatchVAE):
    images = draw(sample_scenes(800, seed=1)) * 2 - 1
    latents = vae.encode(images).latent_dist.mode()
    assert 0.2 < latents.std() < 3
    again = PatchVAE(latent_channels=20).fit(images).encode(images).latent_dist.mode()
    assert torch.allclose(latents, again, atol=1e-4)
    assert torch.equal(vae.encode(images[:1]).latent_dist.sample(), vae.encode(images[:1]).latent_dist.mode())
