"""Distance of a set of pictures from a folder."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rewards_support import check_gradient, pictures

from diffalign import rewards
from diffalign.errors import ConfigError
from diffalign.evaluate import score_all
from diffalign.reward_server import RewardServer
from diffalign.rewards import RewardError, score
from reward_models.mmd import MMD, kernel, within

KERNELS = ("linear", "cubic", "rbf")


def by_hand(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], kind: str) -> float:
    """The unbiased estimate, pair by pair."""
    d = x.shape[1]
    k = {
        "linear": lambda a, b: a @ b / d + 1,
        "cubic": lambda a, b: (a @ b / d + 1) ** 3,
        "rbf": lambda a, b: np.exp(-((a - b) ** 2).sum() / d),
    }[kind]
    own = [np.mean([k(a, b) for a, b in itertools.permutations(z, 2)]) for z in (x, y)]
    return float(sum(own) - 2 * np.mean([k(a, b) for a in x for b in y]))


@pytest.mark.parametrize("kind", KERNELS)
def test_the_mean_of_the_shares_is_minus_the_unbiased_distance(kind: Any) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 3)), rng.normal(0.5, 2.0, size=(4, 3))
    a, b = torch.from_numpy(x), torch.from_numpy(y)
    share = 2 * kernel(a, b, kind).mean(1) - within(a, kind) - within(b, kind).mean()
    assert float(-share.mean()) == pytest.approx(by_hand(x, y, kind), rel=1e-5)


@pytest.mark.parametrize("kind", KERNELS)
def test_the_distance_of_two_draws_of_one_distribution_is_zero_on_average(kind: Any) -> None:
    g = torch.Generator().manual_seed(0)
    found, biased = [], []
    for _ in range(4000):
        x, y = torch.randn(4, 3, generator=g), torch.randn(5, 3, generator=g)
        cross = 2 * kernel(x, y, kind).mean()
        found.append(within(x, kind).mean() + within(y, kind).mean() - cross)
        biased.append(kernel(x, x, kind).mean() + kernel(y, y, kind).mean() - cross)
    every = torch.stack(found)
    error = every.std() / len(every) ** 0.5
    assert every.mean().abs() < 4 * error
    assert every.min() < 0
    assert torch.stack(biased).mean() > 20 * error  # what the mean over all pairs, i == j included, would give


def test_the_linear_kernel_measures_the_distance_of_means() -> None:
    x, y = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    distance = within(x, "linear").mean() + within(y, "linear").mean() - 2 * kernel(x, y, "linear").mean()
    means = (x.mean(0) - y.mean(0)).square().sum() / 2
    spread = x.var(0, correction=1).sum() / 2 / 2  # the mean's own error, which the estimate is freed of
    torch.testing.assert_close(distance, means - spread)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("photos")
    for number, picture in enumerate(pictures(6, 32, 32)):
        Image.fromarray((picture.permute(1, 2, 0) * 255).byte().numpy()).save(place / f"{number}.png")
    return place


def test_pictures_of_the_folder_score_above_noise(folder: Path) -> None:
    reward: Any = rewards.load(f"mmd:{folder}:tiny-clip")
    own = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255 for file in reward.files])
    g = torch.Generator().manual_seed(1)
    noise = torch.rand(6, 3, 32, 32, generator=g)
    near, far = score(reward, own, [""] * 6), score(reward, noise, [""] * 6)
    # Six equal pictures on both sides: minus the distance is 2 / 6 of (k(x, x) - mean of the others).
    assert near.mean() > 0 > far.mean()
    assert not torch.equal(far, score(reward, torch.cat([noise[:1], own[1:]]), [""] * 6))  # a set, not a picture


def test_the_gradient_reaches_the_pixels(folder: Path) -> None:
    for kind in KERNELS:
        check_gradient(MMD(what=f"{folder}@{kind}:tiny-clip"), ["", "", ""])


def test_one_picture_is_no_set(folder: Path) -> None:
    reward: Any = rewards.load(f"mmd:{folder}:tiny-clip")
    with pytest.raises(RewardError, match="got one picture"):
        score(reward, pictures(1, 32, 32), [""])


def test_a_call_is_not_cut(folder: Path) -> None:
    for name in (f"mmd:{folder}:tiny-clip", f"mix:2*mmd:{folder}:tiny-clip"):
        reward: Any = rewards.load(name)
        images, prompts = pictures(5, 32, 32), [""] * 5
        whole = score(reward, images, prompts)
        torch.testing.assert_close(score(reward, images, prompts, batch_size=2), whole)
        with pytest.raises(ConfigError, match=r"evaluation: reward .*one number of a whole set"):
            score_all(reward, (images * 255).to(torch.uint8), prompts, name=name)
        assert rewards.of_sets(name)
        assert not rewards.groups(name)


def test_who_scores_pictures_as_they_come_refuses_it(folder: Path) -> None:
    name = f"mmd:{folder}:tiny-clip"
    with pytest.raises(ConfigError, match=r"score: reward 'mmd:.*compares pictures with one another"):
        rewards.refuse_groups(name, rewards.compares(rewards.load(name)), "score")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"serve-reward: reward 'mmd:.*compares all pictures of a call"):
        RewardServer(rewards.load(name), name)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (None, "no folder of pictures"),
        ("", "no folder of pictures"),
        ("nowhere", "folder of references 'nowhere' does not exist"),
        ("FOLDER@cubical", "kernel 'cubical' not found.*cubic"),
    ],
)
def test_what_cannot_work_is_refused_before_loading(argument: str | None, message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        MMD.check_argument(argument and argument.replace("FOLDER", str(folder)))


def test_a_folder_may_have_an_at_in_its_name(tmp_path: Path) -> None:
    place = tmp_path / "me@home"
    place.mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8)).save(place / f"{name}.png")
    MMD.check_argument(str(place))
    MMD.check_argument(f"{place}@rbf")


def test_a_folder_with_one_picture_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=re.escape("holds one picture")):
        MMD.check_argument(str(tmp_path))
