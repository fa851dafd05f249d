"""A reward server, a process of its own, that is killed while a run samples: nothing is lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign import checkpoint
from diffalign.errors import UserError
from diffalign.metrics import read_rows
from diffalign.trainer import train

ROOT = Path(__file__).parent.parent.parent
REWARD = """
import os, signal, time
from diffalign.rewards import Reward

SLOW, FATAL = (int(os.environ.get(name, 0)) for name in ("SLOW_CALL", "FATAL_CALL"))


class Lit(Reward):
    "How bright a picture is; one call sleeps, and another ends the process as `kill -9` does."
    range = (0.0, 1.0)
    unit = "mean of all channels"
    differentiable = False
    weights = None
    licence = "Apache-2.0"
    gap = "none"
    calls = 0

    def __init__(self, device="cpu", dtype=None):
        pass

    def __call__(self, images, prompts, metadata=None):
        self.calls += 1
        if self.calls == FATAL:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.calls == SLOW:
            time.sleep(1.5)
        return images.mean((1, 2, 3))
"""
PROMPTS = ["a small red circle on a black background", "a large blue square", "two green triangles"]
STEPS = 3  # of two calls of the reward each: six images, four at a time


class Hosting:
    """`diffalign serve-reward` at one port, started as often as a test wants."""

    def __init__(self, reward: str, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.reward, self.log, self.processes = reward, folder / "server.log", list[subprocess.Popen[str]]()

    @property
    def name(self) -> str:
        return f"remote:http://127.0.0.1:{self.port}"

    def start(self, **calls: int) -> None:
        """Start it and wait until it listens; `SLOW_CALL=2` and `FATAL_CALL=3` count calls of this process."""
        words = ["serve-reward", self.reward, "--port", str(self.port), "--device", "cpu"]
        more = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in calls.items()}
        with self.log.open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "diffalign", *words],
                env=os.environ | more,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.processes.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            if "use it as" in line:
                return
        raise AssertionError(f"the server did not start: {self.log.read_text()}")

    def fell(self, number: int) -> bool:
        """Wait for the end of a process; whether it was killed."""
        return self.processes[number].wait(60) == -signal.SIGKILL

    def start_again(self) -> None:
        """Once the first process has been killed."""
        assert self.fell(0)
        self.start()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def hosting(tmp_path: Path) -> Iterator[Hosting]:
    file = tmp_path / "lit.py"
    file.write_text(REWARD)
    made = Hosting(str(file), tmp_path)
    yield made
    made.close()


@pytest.fixture
def run(tmp_path: Path, tiny_config: Any) -> Callable[..., Path]:
    def start(name: str, reward: str, **changes: Any) -> Path:
        config = tiny_config(
            tmp_path / name,
            objective={"name": "dpo", "beta": 50.0},
            rollout={"prompts": PROMPTS, "samples_per_prompt": 2, "num_inference_steps": 3, "rewards": [reward]},
            training={"train_batch_size": 3, "max_train_steps": STEPS} | changes.pop("training", {}),
            data={"sources": []},
            **changes,
        )
        return train(config).run_dir

    return start


def assert_same_run(one: Path, other: Path, adapter_of: Callable[[Path], dict[str, torch.Tensor]]) -> None:
    losses = [[row["loss"] for row in read_rows(folder / "metrics.jsonl")] for folder in (one, other)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
    a, b = adapter_of(one), adapter_of(other)
    assert any(value.abs().max() > 0 for name, value in a.items() if "lora_B" in name)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_a_killed_server_that_comes_back_changes_nothing(
    run: Any, hosting: Hosting, adapter_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run("whole", hosting.reward)
    hosting.start(SLOW_CALL=2, FATAL_CALL=4)
    again = threading.Thread(target=hosting.start_again)
    again.start()
    with caplog.at_level("WARNING", "diffalign"):
        made = run("run", f"{hosting.name}?wait=60&backoff=0.05&timeout=0.5")
    again.join()
    assert len(hosting.processes) == 2
    assert_same_run(whole, made, adapter_of)
    assert "does not answer (time-out)" in caplog.text  # the slow call
    assert caplog.text.count("trying again") >= 2


def test_a_run_that_ends_with_its_server_goes_on_after_it(
    run: Any, hosting: Hosting, adapter_of: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run("whole", hosting.reward)
    name = f"{hosting.name}?wait=0.3&backoff=0.05"
    hosting.start(FATAL_CALL=4)
    with (
        caplog.at_level("WARNING", "diffalign"),
        pytest.raises(UserError, match=rf"{hosting.port}/score does not answer .* tries in .*\?wait=SECONDS"),
    ):
        run("part", name)
    assert hosting.fell(0)
    assert list(checkpoint.steps_of(tmp_path / "part")) == [1]
    assert "stopped at step 1; go on with training.resume_from_checkpoint=latest" in caplog.text
    resumed = {"resume_from_checkpoint": "latest"}
    with pytest.raises(UserError, match=r"/health does not answer \(Connection refused\)"):
        run("part", name, training=resumed)
    assert list(checkpoint.steps_of(tmp_path / "part")) == [1]
    hosting.start()
    assert_same_run(whole, run("part", name, training=resumed), adapter_of)
