"""Looking at a run while it trains: rewards by step, the best adapter, and an early end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffalign import checkpoint, trainer
from diffalign.errors import ConfigError
from diffalign.jobs.image import ImageJob
from diffalign.metrics import read_rows
from diffalign.report import write_report
from diffalign.rewards import RewardError
from diffalign.trainer import agreed, train
from diffalign.watch import Watch

LOOK = {
    "every": 1,
    "watch_prompts": 2,
    "prompts": ["a small red circle on a white background", "two red circles on a black background"],
    "at_end": False,
}


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Means that the adapter's images get at one look after the other; the base has 0."""
    found: list[float] = []
    state = {"base": True}

    def scores(self: Watch, images: torch.Tensor) -> dict[str, torch.Tensor]:
        value = 0.0 if state["base"] else found.pop(0)
        state["base"] = False
        return {name: torch.full((2,), value) for name in self.config.rewards}

    monkeypatch.setattr(Watch, "_scores", scores)
    return found


@pytest.fixture
def run(tmp_path: Path, tiny_config: Any) -> Any:
    def start(name: str = "run", steps: int = 3, **evaluation: Any) -> Any:
        settings = LOOK | {"rewards": ["world_verifier"]} | evaluation
        training = {"max_train_steps": steps, "logging_steps": 100, "learning_rate": 1e-2}
        return tiny_config(tmp_path / name, evaluation=settings, training=training)

    return start


def looks(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(folder / "metrics.jsonl") if "eval/drift" in row]


def test_rewards_are_written_by_step(run: Any) -> None:
    folder = train(run(every=2)).run_dir
    rows = looks(folder)
    assert [row["step"] for row in rows] == [2, 3]
    assert all(0 <= row["eval/world_verifier"] <= 1 and row["eval/drift"] > 0 for row in rows)
    assert rows[1]["image_forwards"] > rows[0]["image_forwards"] > 0
    assert "eval/best_step" not in rows[0]
    assert "Gain in world_verifier" in write_report(folder).read_text()


def test_gain_is_that_over_the_base(run: Any, values: list[float]) -> None:
    values += [0.5, 0.25, 0.75]
    rows = looks(train(run()).run_dir)
    assert [row["eval/world_verifier/gain"] for row in rows] == [0.5, 0.25, 0.75]


def test_outputs_are_those_of_the_best_step(run: Any, values: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    values += [0.5, 0.9, 0.7]
    config = run(keep_best="world_verifier")
    config = replace(config, training=replace(config.training, checkpointing_steps=1))
    kept: list[dict[str, torch.Tensor]] = []
    original = ImageJob.finish

    def finish(self: ImageJob, step: int, facts: dict[str, Any]) -> Any:
        result = original(self, step, facts)
        kept.append({n: p.detach().clone() for n, p in self.policy.bare.named_parameters() if p.requires_grad})
        return result

    monkeypatch.setattr(ImageJob, "finish", finish)
    folder = train(config).run_dir
    assert [row["eval/best_step"] for row in looks(folder)] == [1, 2, 2]
    best = load_file(folder / "best" / "adapter.safetensors")
    second = load_file(checkpoint.steps_of(folder)[2] / "adapter.safetensors")
    assert all(torch.equal(best[name], second[name]) for name in second)
    (now,) = kept
    assert {name: float(value.norm()) for name, value in best.items()} == pytest.approx(
        {
            name: float(next(p.norm() for key, p in now.items() if key.replace(".default", "").endswith(name)))
            for name in best
        }
    )


def test_training_ends_when_nothing_gets_better(run: Any, values: list[float]) -> None:
    values += [0.5, 0.4, 0.6, 0.5, 0.55, 0.9]
    config = run(steps=6, keep_best="world_verifier", patience=2)
    result = train(config)
    assert (result.step, result.stopped_by) == (5, None)
    assert list(checkpoint.steps_of(result.run_dir)) == [5]
    assert (result.run_dir / "pytorch_lora_weights.safetensors").is_file()
    again = train(replace(config, training=replace(config.training, resume_from_checkpoint="latest")))
    assert again.step == 5, "an ended run has nothing left to do"


def test_a_resumed_run_remembers_the_best(run: Any, values: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    values += [0.9, 0.5, 0.6]
    config = run(steps=3, keep_best="world_verifier")
    config = replace(config, training=replace(config.training, checkpointing_steps=1))
    stops = iter([False, False, True])
    monkeypatch.setattr(trainer, "stop_requested", lambda stop, accelerator: next(stops))
    assert train(config).step == 2
    monkeypatch.undo()
    made: list[Watch] = []
    original = Watch.measure
    monkeypatch.setattr(Watch, "measure", lambda self, *args: made.append(self) or original(self, *args))
    monkeypatch.setattr(Watch, "_scores", lambda self, images: {"world_verifier": torch.full((2,), 0.6)})
    again = replace(config, training=replace(config.training, resume_from_checkpoint="latest"))
    assert train(again).step == 3
    assert made[0].best == (1, pytest.approx(0.9))
    assert made[0].waited == 2


def test_the_final_result_says_which_step_it_is_of(run: Any, values: list[float]) -> None:
    values += [0.5, 0.4]
    folder = train(run(steps=2, keep_best="world_verifier", at_end=True)).run_dir
    result = json.loads((folder / "result.json").read_text())
    assert (result["best_step"], result["steps"]) == (1, 2)


def test_all_processes_end_together() -> None:
    class Two:
        num_processes, device = 2, "cpu"

        def __init__(self, other: float) -> None:
            self.other = other

        def reduce(self, value: torch.Tensor, reduction: str) -> torch.Tensor:
            assert reduction == "sum"
            return value + self.other

    assert agreed(False, Two(1.0)) is True  # type: ignore[arg-type]
    assert agreed(False, Two(0.0)) is False  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0, "keep_best": "world_verifier"}, "every is 0, so nothing is looked at"),
        ({"keep_best": "clip_score"}, "keep_best is 'clip_score'; expected one of rewards: world_verifier"),
        ({"patience": 2}, "expected keep_best to say"),
        ({"rewards": []}, "evaluation.every: got 1, and there are no prompts or no rewards"),
        ({"every": -1}, "every is -1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(run: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        train(run(**settings))


def test_a_reward_that_dies_at_a_look_loses_neither_the_step_nor_the_look(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(run("whole", keep_best="world_verifier")).run_dir
    original, fatal = Watch.measure, [2, 3]

    def measure(self: Watch, step: int, network: torch.nn.Module) -> dict[str, float]:
        if step in fatal:
            fatal.remove(step)
            raise RewardError("no answer")
        return original(self, step, network)

    monkeypatch.setattr(Watch, "measure", measure)
    config = run("part", keep_best="world_verifier")
    again = replace(config, training=replace(config.training, resume_from_checkpoint="latest"))
    for step, made in ((2, config), (3, again)):
        with pytest.raises(RewardError, match="no answer"):
            train(made)
        assert list(checkpoint.steps_of(Path(config.output_dir)))[-1] == step
    part = train(again).run_dir
    timed = ("seconds_per_step", "pairs_per_second", "memory_gb")
    one, other = ([{k: v for k, v in row.items() if k not in timed} for row in looks(f)] for f in (whole, part))
    assert one == other
    assert len(other) == 3
    adapters = [load_file(folder / "pytorch_lora_weights.safetensors") for folder in (whole, part)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
