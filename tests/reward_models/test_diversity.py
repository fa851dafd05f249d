"""Diversity within a prompt."""

import pytest
import torch

from diffalign import preflight, rewards
from diffalign.errors import ConfigError
from diffalign.evaluate import score_all
from reward_models.diversity import mean_distance


def test_a_picture_is_compared_with_the_others_of_its_prompt() -> None:
    embedding = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [1.0, 1.0], [2.0, 2.0], [0.0, 1.0]])
    found = mean_distance(embedding, ["a", "a", "a", "b", "b", "c"])
    torch.testing.assert_close(found, torch.tensor([(1 + 2) / 2, (1 + 1) / 2, (2 + 1) / 2, 0.0, 0.0, 0.0]))
    order = [3, 0, 5, 2, 4, 1]
    torch.testing.assert_close(mean_distance(embedding[order], ["b", "a", "c", "a", "b", "a"]), found[order])


def test_pictures_that_differ_are_more_diverse_than_copies() -> None:
    reward = rewards.load("diversity:tiny-clip")
    g = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 32, 32, generator=g)
    images[3] = images[2]
    found = rewards.score(reward, images, ["a", "a", "b", "b"])
    assert found[:2].min() > 0.01
    torch.testing.assert_close(found[2:], torch.zeros(2), rtol=0, atol=1e-5)


def test_groups_are_not_cut_into_batches() -> None:
    reward = rewards.load("diversity:tiny-clip")
    g = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 32, 32, generator=g)
    prompts = ["a"] * 6
    torch.testing.assert_close(
        rewards.score(reward, images, prompts, batch_size=2), rewards.score(reward, images, prompts)
    )
    eight_bit = (images * 255).round().to(torch.uint8)
    whole = rewards.score(reward, eight_bit.float() / 255, prompts)
    torch.testing.assert_close(score_all(reward, eight_bit, prompts, batch_size=2), whole)


@pytest.mark.parametrize(
    ("objective", "rollout", "message"),
    [
        (
            "dgpo",
            {"samples_per_prompt": 3},
            r"sampling.batch_size: got 8; .*'diversity:tiny-clip' compares.* 3",
        ),
        ("spo", {"samples_per_prompt": 2}, r"'diversity:tiny-clip' compares the images of a prompt"),
        (
            "dgpo",
            {"samples_per_prompt": 3, "rewards": ["mix:1*world_verifier+0.5*diversity:tiny-clip"]},
            r"sampling.batch_size: got 8; reward 'mix:1\*world_verifier.* compares",
        ),
    ],
)
def test_runs_that_would_cut_groups_are_refused(tmp_path, tiny_config, objective, rollout, message) -> None:
    config = tiny_config(
        tmp_path / "run",
        objective={"name": objective} | ({"beta": 1.0} if objective == "spo" else {}),
        rollout={"prompts": ["two green triangles"], "rewards": ["diversity:tiny-clip"]} | rollout,
        training={"train_batch_size": 6},
        sampling={"batch_size": 8},
        data={"sources": []},
    )
    with pytest.raises(ConfigError, match=message):
        preflight.check(config)
