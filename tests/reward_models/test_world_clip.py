"""The tiny world's CLIP: what it knows of held-out captions and styles, and a gradient that finite differences confirm."""

import random

import pytest
import torch
from torch import nn

from diffalign import rewards
from diffalign.errors import ConfigError
from diffalign.rewards import RewardError, score
from diffalign.world.clip import build_untrained, styled
from diffalign.world.scenes import Style, compose, draw, parse_caption, sample_captions

COUNT = 96


@pytest.fixture(scope="module")
def held_out():
    """Drawings of captions that the tiny CLIP has never seen, and other captions of the same kind."""
    captions = sample_captions(COUNT, seed=21, held_out=True)
    rng = random.Random(21)
    return draw([compose(parse_caption(c), rng) for c in captions]), captions


def test_a_drawing_is_worth_more_for_its_own_caption(held_out):
    images, captions = held_out
    reward = rewards.load("world_clip")
    other = captions[1:] + captions[:1]
    differ = torch.tensor([a != b for a, b in zip(captions, other, strict=True)])
    own, false = score(reward, images, captions), score(reward, images, other)
    assert (own > false)[differ].float().mean() > 0.97
    assert 0.85 < own.mean() < 0.95  # the unit: what a drawing of its caption has


@pytest.mark.parametrize(("taste", "style"), [("outlined", Style(outline=True)), ("pastel", Style(pastel=True))])
def test_a_taste_prefers_its_style_and_the_caption_alone_does_not(held_out, taste, style):
    _, captions = held_out
    liked, plain = (
        draw([compose(parse_caption(c), random.Random(f"{c}"), s) for c in captions]) for s in (style, Style())
    )
    gaps = {
        name: score(rewards.load(name), liked, captions) - score(rewards.load(name), plain, captions)
        for name in ("world_clip", f"world_clip:{taste}")
    }
    assert (gaps[f"world_clip:{taste}"] > 0).float().mean() > 0.9
    assert gaps[f"world_clip:{taste}"].mean() > 0.2 > gaps["world_clip"].mean().abs() + 0.1


def test_gradient_to_the_pixels_is_that_of_finite_differences(held_out):
    images, captions = held_out
    images = (0.8 * images[:4] + 0.1).requires_grad_()
    for name in ("world_clip", "world_clip:outlined"):
        reward = rewards.load(name)
        (rounded,) = torch.autograd.grad(score(reward, images, captions[:4]).sum(), images)
        assert rounded.abs().amax((0, 2, 3)).min() > 0  # all three channels, straight through the rounding
        reward.eight_bit = False
        (gradient,) = torch.autograd.grad(score(reward, images, captions[:4]).sum(), images)
        direction = nn.functional.normalize(gradient.flatten(), dim=0).view_as(gradient)
        with torch.no_grad():
            up, down = (score(reward, images + s * direction, captions[:4]).sum() for s in (0.01, -0.01))
        assert float((up - down) / 0.02) == pytest.approx(float((gradient * direction).sum()), rel=0.02)


def test_other_tastes_and_sizes_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'outlined'"):
        rewards.find("world_clip:outlind")
    with pytest.raises(RewardError, match=r"world_clip: .*32, 32"):
        score(rewards.load("world_clip"), torch.rand(1, 3, 64, 64), ["a large red circle on a white background"])


def test_every_word_is_one_token_and_captions_fit():
    _, tokenizer = build_untrained()
    for caption in styled(sample_captions(20, seed=1), "outlined"):
        words = caption.replace(",", " ,").split()
        assert len(tokenizer(caption).input_ids) == len(words) + 2 <= 20
