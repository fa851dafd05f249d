"""The cache of scores: what is the same is not asked twice, what differs is, and several processes may write."""

from __future__ import annotations

import math
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign import evaluate, rewards, score_cache
from diffalign.errors import UserError
from diffalign.rewards import Reward, RewardError
from diffalign.score_cache import ScoreCache, key_of


class Probe(Reward):
    """Mean brightness plus the prompt's length; counts what it is asked."""

    range = (-math.inf, math.inf)
    unit = "none"
    differentiable = True
    weights: Any = None
    licence = "none"
    gap = "none"

    def __init__(self, setting: str = "") -> None:
        self.asked, self.setting, self.answer = 0, setting, lambda scores: scores

    def identity(self) -> str:
        return self.setting

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        self.asked += len(prompts)
        scores = images.flatten(1).mean(1) + torch.tensor([float(len(prompt)) for prompt in prompts])
        return self.answer(scores)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(6, 3, 4, 5, generator=torch.Generator().manual_seed(0))


PROMPTS = ["a", "bb", "ccc", "a", "bb", ""]


def test_the_same_is_asked_once(tmp_path: Path, images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    probe = Probe()
    wanted = rewards.score(Probe(), images, PROMPTS)
    with caplog.at_level("INFO", "diffalign"), ScoreCache(tmp_path / "new" / "scores.db") as cache:
        assert torch.equal(cache.score("probe", probe, images[:4], PROMPTS[:4]), wanted[:4])
        assert torch.equal(cache.score("probe", probe, images, PROMPTS, batch_size=1), wanted)
        assert (cache.hits, cache.misses, probe.asked) == (4, 6, 6)
    assert "4 found, 6 scored" in caplog.text
    with ScoreCache(tmp_path / "new" / "scores.db") as cache:  # another run
        order = [5, 0, 3]
        got = cache.score("probe", probe, images[order], [PROMPTS[i] for i in order])
        assert torch.equal(got, wanted[order])
        assert (cache.hits, probe.asked) == (3, 6)


def test_twice_in_a_batch_is_asked_once(tmp_path: Path, images: Tensor) -> None:
    probe, order = Probe(), [0, 1, 0, 1, 2]
    with ScoreCache(tmp_path / "scores.db") as cache:
        got = cache.score("probe", probe, images[order], ["p"] * 5)
    assert torch.equal(got, rewards.score(Probe(), images[order], ["p"] * 5))
    assert (cache.hits, cache.misses, probe.asked) == (2, 3, 3)


def test_every_part_of_the_key_counts(images: Tensor) -> None:
    image = images[0]
    brighter = image.clone()
    brighter[0, 0, 0] += 1e-6
    keys = [
        key_of("i", image, "p", None),
        key_of("j", image, "p", None),
        key_of("i", brighter, "p", None),
        key_of("i", image.reshape(3, 5, 4), "p", None),
        key_of("i", image, "q", None),
        key_of("i", image, "p", {"a": 1}),
        key_of("i", image, "p", {"a": 2}),
    ]
    assert len(set(keys)) == len(keys)
    assert key_of("i", image.clone(), "p", {"a": 1, "b": 2}) == key_of("i", image, "p", {"b": 2, "a": 1})
    assert key_of("i", image, "p", {"a": image}) is None


def test_every_part_of_a_reward_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.py"
    text = (
        "from diffalign.rewards import Reward\n\n\nclass Mine(Reward):\n    range = (0.0, 1.0)\n"
        "    unit = licence = gap = ''\n"
        "    differentiable = False\n    weights = None\n    argument = 'anything'\n\n    def __init__(self, *args):\n"
        "        pass\n\n    def __call__(self, images, prompts, metadata=None):\n        return images.mean((1, 2, 3))\n"
    )
    file.write_text(text)
    name = str(file)
    mine, data = rewards.load(name), tmp_path / "head.pt"
    data.write_text("1")
    probe = Probe()
    found = [rewards.identity(n, mine) for n in (name, f"{name}:x", f"{name}:{data}")]
    found += [rewards.identity("probe", Probe("a")), rewards.identity("probe", probe), rewards.identity("other", probe)]
    data.write_text("22")
    found.append(rewards.identity(f"{name}:{data}", mine))
    file.write_text(text + "# changed\n")
    found.append(rewards.identity(name, mine))
    probe.weights = "x@1"
    found.append(rewards.identity("probe", probe))
    monkeypatch.setenv(rewards.WEIGHTS_VARIABLE, "/elsewhere")
    found.append(rewards.identity("probe", probe))
    assert len(set(found)) == len(found)
    assert rewards.identity("probe", probe) == found[-1]


def test_what_json_cannot_hold_and_nan_are_not_kept(tmp_path: Path, images: Tensor) -> None:
    probe = Probe()
    probe.answer = lambda scores: torch.where(scores > 2, math.nan, scores)
    with ScoreCache(tmp_path / "scores.db") as cache:
        for _ in range(2):
            got = cache.score("probe", probe, images[:3], ["a", "bbb", "a"], [{}, {}, {"t": images}], missing=True)
            assert got.isnan().tolist() == [False, True, False]
        assert (cache.hits, probe.asked) == (1, 5)
        with pytest.raises(RewardError, match="NaN or infinity for the prompts 'bbb'"):
            cache.score("probe", probe, images[:2], ["a", "bbb"])
        with pytest.raises(RewardError, match="1 prompts for 2 images"):
            cache.score("probe", probe, images[:2], ["a"])


def test_clips_count_by_the_frame_that_is_seen(tmp_path: Path) -> None:
    probe, clips = Probe(), torch.rand(2, 3, 5, 4, 4)
    other = clips.clone()
    other[:, :, 0] = 0
    with ScoreCache(tmp_path / "scores.db") as cache:
        assert torch.equal(cache.score("p", probe, clips, ["a", "b"]), cache.score("p", probe, other, ["a", "b"]))
        assert (cache.hits, probe.asked) == (2, 2)


def test_many_writers(tmp_path: Path, images: Tensor) -> None:
    """Connections of their own, as processes have."""
    wanted, trouble = rewards.score(Probe(), images, PROMPTS), []

    def work(k: int) -> None:
        try:
            with ScoreCache(tmp_path / "scores.db") as cache:
                for i in range(12):
                    place = (i + k) % 6
                    got = cache.score("probe", Probe(), images[place : place + 1], PROMPTS[place : place + 1])
                    assert torch.equal(got, wanted[place : place + 1])
        except BaseException as error:
            trouble.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trouble == []
    with ScoreCache(tmp_path / "scores.db") as cache:
        cache.score("probe", Probe(), images, PROMPTS)
        assert cache.hits == 6


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello, this is no data base " * 40)
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE mine (x)")
    other.close()
    for path in (tmp_path / "text", tmp_path / "other.db", tmp_path, tmp_path / "text" / "x"):
        with pytest.raises(UserError, match=r"score cache .* cannot be (used|opened)"):
            ScoreCache(path)
    assert (tmp_path / "text").read_text().startswith("hello")


@pytest.mark.gpu
@pytest.mark.parametrize("cached", [True, False])
def test_evaluation_of_a_reward_that_answers_on_a_gpu(tmp_path: Path, images: Tensor, cached: bool) -> None:
    probe = Probe()
    probe.answer = lambda scores: scores.cuda()
    with score_cache.from_environment(tmp_path / "scores.db" if cached else None) as cache:
        scores = evaluate.score_all(probe, (images * 255).byte(), PROMPTS, 4, cache=cache, name="probe")
    assert scores.numpy().shape == (6,)


def test_evaluation_uses_it_where_it_is_named(tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    levels, probe = (images * 255).byte(), Probe()
    plain = evaluate.score_all(Probe(), levels, PROMPTS, 4)
    monkeypatch.delenv(score_cache.CACHE_VARIABLE, raising=False)
    with score_cache.from_environment() as none:
        assert none is None
    monkeypatch.setenv(score_cache.CACHE_VARIABLE, str(tmp_path / "scores.db"))
    for asked in (6, 6):
        with score_cache.from_environment() as cache:
            assert torch.equal(evaluate.score_all(probe, levels, PROMPTS, 4, cache=cache, name="probe"), plain)
        assert probe.asked == asked
