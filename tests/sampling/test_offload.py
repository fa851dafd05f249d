"""Networks of rewards are on their device while a round is made, and in the CPU's memory while the policy trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffalign import offload, rewards
from diffalign.errors import ConfigError
from diffalign.jobs.image import ImageJob
from diffalign.offload import Offload
from diffalign.rewards import Reward
from diffalign.trainer import train

REWARD = """
import torch
from torch import nn
from diffalign.rewards import Reward


class Placed(nn.Module):
    "Brightness, by a network that says it is on a GPU: it refuses to compute anywhere else."

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.place, self.moves = torch.device("cuda:0"), []

    def to(self, device):
        self.place = torch.device(device)
        self.moves.append(self.place.type)
        return self

    def forward(self, images):
        assert self.place == torch.device("cuda:0"), f"computes on {self.place}"
        return self.scale * images.mean((1, 2, 3))


class Helper:
    def __init__(self):
        self.towers = {"image": Placed()}


class Bright(Reward):
    "A network that is held by a helper."
    range = (-10.0, 10.0)
    unit = licence = gap = ""
    differentiable = False
    weights = None

    def __init__(self, device="cpu", dtype=None):
        self.helper = Helper()

    def __call__(self, images, prompts, metadata=None):
        return self.helper.towers["image"](images)
"""


@pytest.fixture
def run(tmp_path: Path, tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two rounds of two steps; where the reward's network was while the policy trained, and how it was moved."""
    (tmp_path / "bright.py").write_text(REWARD)
    monkeypatch.setattr(offload, "home", lambda network: network.place)
    training: list[str] = []
    moves: list[str] = []
    original = ImageJob.loss

    def loss(self: ImageJob, batch: Any) -> Any:
        (network,) = self.rollouts.models[0].networks()
        training.append(network.place.type)
        moves[:] = network.moves
        return original(self, batch)

    monkeypatch.setattr(ImageJob, "loss", loss)

    def start(name: str, objective: str = "dpo", **rollout: Any) -> tuple[Path, list[str], list[str]]:
        training.clear()
        asked = {"prompts": ["a small red circle", "two green triangles"], "rewards": [str(tmp_path / "bright.py")]}
        config = tiny_config(
            tmp_path / name,
            objective={"name": objective} | ({"beta": 50.0} if objective == "dpo" else {}),
            rollout=asked | {"samples_per_prompt": 2, "num_inference_steps": 2, "steps_per_generation": 2} | rollout,
            data={"sources": []},
        )
        return train(config).run_dir, list(training), list(moves)

    return start


def test_networks_are_away_while_the_policy_trains_and_back_for_every_round(run: Any, adapter_of: Any) -> None:
    away, places, moves = run("away", offload_rewards=True)
    assert places == ["cpu"] * 4
    assert moves == ["cpu", "cuda", "cpu", "cuda", "cpu"]
    here, places, moves = run("here")
    assert places == ["cuda"] * 4
    assert moves == []
    one, other = adapter_of(away), adapter_of(here)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_candidates_are_scored_without_a_move_for_every_step(run: Any) -> None:
    _, places, moves = run("run", "spo", offload_rewards=True, reward_scale=1000.0)
    assert set(places) == {"cpu"}
    assert moves == ["cpu", "cuda", "cpu", "cuda", "cpu"]


class Bare(Reward):
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def __call__(self, images: Any, prompts: Any, metadata: Any = None) -> Any: ...


def test_networks_are_found_in_containers_and_helpers_each_once() -> None:
    one, two, three = (nn.Linear(1, 1) for _ in range(3))
    inner = Bare(network=two)
    inner.__dict__["me"] = inner  # objects may go round in circles
    reward = Bare(plain=one, again=[one, {"deep": (three,)}], inner=inner, text="x", tensor=torch.ones(1), none=None)
    assert reward.networks() == [one, three, two]
    assert Bare(tokenizer=object(), number=3).networks() == []


@pytest.mark.parametrize(
    ("name", "count"), [("world_clip", 1), ("diversity:tiny-clip", 1), ("mix:1*world_clip+2*diversity:tiny-clip", 2)]
)
def test_rewards_of_ours_say_what_their_networks_are(name: str, count: int) -> None:
    found = rewards.load(name).networks()
    assert len(found) == count
    assert all(sum(p.numel() for p in network.parameters()) > 1000 for network in found)
    assert rewards.load("world_verifier").networks() == []


def test_a_round_that_fails_leaves_nothing_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[str] = []
    network = nn.Linear(1, 1)
    monkeypatch.setattr(network, "to", lambda device: places.append(str(device)))
    monkeypatch.setattr(offload, "home", lambda network: torch.device("cuda:1"))
    away = Offload([Bare(network=network)], True)
    with pytest.raises(KeyError), away:
        raise KeyError
    assert places == ["cpu", "cuda:1", "cpu"]


def test_networks_on_the_cpu_or_on_several_devices_stay() -> None:
    mixed = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1, device="meta")])
    assert offload.home(mixed) is None
    assert offload.home(nn.Identity()) is None
    assert offload.home(nn.Linear(1, 1)) == torch.device("cpu")
    reward = Bare(mixed=mixed, idle=nn.Identity(), here=nn.Linear(1, 1))
    away = Offload([reward], True)
    with away:
        pass
    assert [p.device.type for p in mixed.parameters()] == ["cpu", "cpu", "meta", "meta"]


def test_it_is_refused_where_rewards_are_never_idle(run: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout.offload_rewards: got True.*'draft' follows a reward's gradient"):
        run(
            "run",
            "draft",
            offload_rewards=True,
            samples_per_prompt=8,
            steps_per_generation=1,
            rewards=["world_clip"],
        )


@pytest.mark.gpu
def test_a_network_on_a_gpu_leaves_and_comes_back_whole() -> None:
    network = nn.Linear(1000, 1000, device="cuda")
    weight, before = network.weight.detach().clone(), torch.cuda.memory_allocated()
    away = Offload([Bare(network=network)], True)
    assert network.weight.device.type == "cpu"
    assert torch.cuda.memory_allocated() < before - 3_000_000
    with away:
        assert torch.equal(network.weight, weight)
    assert network.weight.device.type == "cpu"
