"""The tiny world's rewards agree with the verifier and the tastes they wrap."""

import pytest
import torch

from diffalign import rewards
from diffalign.errors import ConfigError
from diffalign.rewards import RewardError, score
from diffalign.world import taste, verifier
from diffalign.world.scenes import draw, sample_captions, sample_scenes


@pytest.fixture(scope="module")
def world() -> tuple[torch.Tensor, list[str]]:
    scenes = sample_scenes(40, seed=3)
    return draw(scenes), [scene.caption for scene in scenes]


def test_true_drawings_have_reward_one(world):
    images, captions = world
    for name in ("world_verifier", "world_verifier:strict"):
        assert score(rewards.load(name), images, captions).tolist() == [1.0] * len(captions)


@pytest.mark.parametrize("part", ["score", "strict", "bound"])
def test_parts_are_those_of_the_verifier(world, part: str):
    images, _ = world
    other = sample_captions(len(images), seed=9)
    got = score(rewards.load(f"world_verifier:{part}"), images, other, batch_size=7)
    assert got.tolist() == pytest.approx([v[part] for v in verifier.verify(images, other)])


@pytest.mark.parametrize(("name", "who", "weight"), [("pastel@1", "pastel", 1.0), ("ada@0.3", "ada", 0.3)])
def test_taste_is_the_one_named(world, name: str, who: str, weight: float):
    images, captions = world
    wanted = [
        taste.combined(reading, caption, taste.find(who), weight)
        for reading, caption in zip(verifier.read(images), captions, strict=True)
    ]
    assert score(rewards.load(f"world_taste:{name}"), images, captions).tolist() == pytest.approx(wanted)


def test_default_taste_is_the_demos(world):
    images, captions = world
    assert torch.equal(
        score(rewards.load("world_taste"), images, captions),
        score(rewards.load("world_taste:outlined@0.5"), images, captions),
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("world_taste:outlind", "did you mean 'outlined'"),
        ("world_taste:outlined@2", "outside"),
        ("world_taste:outlined@much", "not a number"),
        ("world_verifier:strickt", "did you mean 'strict'"),
    ],
)
def test_arguments_are_checked_without_loading(name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        rewards.find(name)


@pytest.mark.parametrize("name", ["world_verifier", "world_taste"])
def test_other_pictures_and_prompts_are_refused_in_one_line(name: str):
    reward = rewards.load(name)
    with pytest.raises(RewardError, match=f"{name}: .*32, 32"):
        score(reward, torch.rand(1, 3, 64, 64), ["a large red circle on a white background"])
    with pytest.raises(RewardError, match=f"{name}: .*not of the tiny world"):
        score(reward, torch.rand(1, 3, 32, 32), ["an astronaut"])
    with pytest.raises(RewardError, match="not differentiable"):
        score(reward, torch.rand(1, 3, 32, 32, requires_grad=True), ["a large red circle on a white background"])
