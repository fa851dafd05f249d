"""JPEG sizes as rewards."""

import io

import pytest
import torch
from rewards_support import pictures, to_pil

from diffalign import rewards
from diffalign.errors import ConfigError
from diffalign.rewards import RewardError, score

PROMPTS = ["unread"] * 4


def test_score_is_the_size_of_the_file():
    images = pictures(4, 37, 52)
    wanted = []
    for image in images:
        buffer = io.BytesIO()
        to_pil(image).save(buffer, format="JPEG", quality=95)
        wanted.append(len(buffer.getvalue()) / 1000)
    assert score(rewards.load("jpeg_incompressibility"), images, PROMPTS).tolist() == pytest.approx(wanted)
    assert score(rewards.load("jpeg_compressibility"), images, PROMPTS).tolist() == pytest.approx([-w for w in wanted])


def test_noise_is_hard_to_compress():
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    images = torch.cat([(0.5 + strength * noise).clamp(0, 1) for strength in (0, 0.1, 0.3, 1)])
    sizes = score(rewards.load("jpeg_incompressibility"), images, PROMPTS)
    assert (sizes.diff() > 0).all()


def test_no_gradient_and_no_argument():
    with pytest.raises(RewardError, match="not differentiable"):
        score(rewards.load("jpeg_compressibility"), pictures().requires_grad_(), PROMPTS)
    with pytest.raises(ConfigError, match="takes nothing after a colon"):
        rewards.find("jpeg_incompressibility:95")
