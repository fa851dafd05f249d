"""Text runs end to end on a tiny language model: exact resume, invariances, online training, outputs and refusals."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_support import save_lm
from safetensors.torch import load_file

from diffalign import checkpoint, offload
from diffalign.config_loading import build
from diffalign.errors import ConfigError, DataError, UserError
from diffalign.jobs.text import TextJob
from diffalign.metrics import read_rows
from diffalign.trainer import TrainResult, train

ROOT = Path(__file__).parent.parent
TIMING = ("samples_per_second", "seconds_per_step", "memory_gb")
# Letters should come early in the alphabet; smooth, so that groups differ.
REWARD = """
def early(prompts, completions, **columns):
    words = [[(ord("z") - ord(c)) / 25 for c in text if c.isalpha()] for text in completions]
    return [sum(word) / max(1, len(word)) for word in words]


def constant(prompts, completions, **columns):
    return [1.0 for _ in completions]
"""

LONG_ONLY = """
from dataclasses import dataclass

from diffalign.losses import DPO, LossOut


@dataclass(frozen=True, kw_only=True)
class LongOnly(DPO):
    name = "long_only"
    title = "DPO on pairs with a long winner"

    def initial_loss(self, kind=None):
        return None

    def __call__(self, scores, layout, stats=None):
        out = super().__call__(scores, layout, stats)
        keep = scores.length[layout.pairs.w] > 4
        return LossOut(out.per_item[keep], {})
"""


def letters(draw: random.Random, shortest: int = 2, longest: int = 6) -> str:
    return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(draw.randint(shortest, longest)))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, preference pairs, a forget and a retain set, and rewards."""
    folder = tmp_path_factory.mktemp("text")
    save_lm(folder / "lm")
    draw = random.Random(0)
    rows = [{"prompt": letters(draw), "chosen": letters(draw), "rejected": letters(draw)} for _ in range(24)]
    write_rows(folder / "pairs.jsonl", rows)
    for name in ("forget", "retain"):
        write_rows(folder / f"{name}.jsonl", [{"prompt": letters(draw), "completion": letters(draw)} for _ in range(8)])
    (folder / "rewards.py").write_text(REWARD)
    return folder


def config_tree(folder: Path, place: Path, **changes: Any) -> dict[str, Any]:
    """A small run; `changes` are `section__key=value`."""
    tree: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": 3,
        "model": {"family": "causal_lm", "pretrained": str(place / "lm")},
        "data": {"format": "text", "sources": [str(place / "pairs.jsonl")]},
        "text": {"max_length": 24},
        "objective": {"name": "dpo"},
        "lora": {"rank": 4, "targets": "all"},
        "training": {"learning_rate": 1e-2, "train_batch_size": 4, "max_train_steps": 4, "cpu": True, "threads": 1},
        "generation": {"max_new_tokens": 6, "batch_size": 16},
        "evaluation": {},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            tree.setdefault(section, {})[name] = value
        else:
            tree[section] = value
    return tree


def online(place: Path, objective: str = "grpo", count: int = 4, **rollout: Any) -> dict[str, Any]:
    rewards = [f"{place / 'rewards.py'}:early"]
    return {
        "objective": {"name": objective},
        "rollout": {"samples_per_prompt": count, "rewards": rewards, **rollout},
        "training__train_batch_size": 8,
    }


def unlearning(place: Path, objective: str = "npo") -> dict[str, Any]:
    return {
        "objective": {"name": objective},
        "data": {
            "format": "text",
            "sources": [str(place / "forget.jsonl")],
            "retain_sources": [str(place / "retain.jsonl")],
        },
    }


class Runs:
    """Starts runs in folders of their own."""

    def __init__(self, folder: Path, place: Path) -> None:
        self.folder, self.place = folder, place

    def __call__(self, name: str = "run", **changes: Any) -> TrainResult:
        return train(build(config_tree(self.folder / name, self.place, **changes)))


@pytest.fixture
def run(tmp_path: Path, place: Path) -> Runs:
    return Runs(tmp_path, place)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(list(checkpoint.steps_of(folder).values())[-1] / "adapter.safetensors")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_same_steps(one: Path, other: Path) -> None:
    """Losses, gradient norms and rewards agree but for rounding."""
    a, b = rows_of(one), rows_of(other)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        for name in ("loss", "grad_norm", "reward", "length", "implicit_acc"):
            assert (name in x) == (name in y)
            # At the first step policy and reference differ by rounding alone, and so does who is ahead.
            if name in x and not (name == "implicit_acc" and x["step"] == 1):
                assert x[name] == pytest.approx(y[name], rel=1e-4, abs=1e-6), (x["step"], name)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def command(config: Path) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "diffalign", "train", str(config)]


def write_config(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


# --- learning --------------------------------------------------------------------------------------------------------


def test_dpo_starts_at_log_two_and_separates_the_pairs(run: Runs) -> None:
    result = run(training__max_train_steps=12)
    rows = rows_of(result.run_dir)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["implicit_acc"] == 0.5
    assert rows[-1]["implicit_acc"] > 0.9
    assert rows[-1]["rewards/chosen"] > rows[-1]["rewards/rejected"]
    assert "weight" not in rows[0]
    assert {"adapter_config.json", "adapter_model.safetensors", "report.html", "README.md"} <= {
        path.name for path in result.run_dir.iterdir()
    }


def test_grpo_raises_its_reward(run: Runs, place: Path) -> None:
    changes = online(place) | {"training__train_batch_size": 32, "training__learning_rate": 2e-2}
    rows = rows_of(run(**changes, training__max_train_steps=20).run_dir)
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.1
    assert {"length", "finished", "frac_zero_std", "advantage"} <= rows[0].keys()
    assert 0 < rows[0]["entropy"] < math.log(60)


def test_npo_forgets_and_reports_both_sets(run: Runs, place: Path) -> None:
    result = run(**unlearning(place), training__max_train_steps=15, evaluation={"at_end": True}).result
    assert result is not None
    for name in ("forget", "retain"):
        entry = result[f"{name}_probability"]
        assert entry["items"] == 8
        assert entry["change"] == pytest.approx(entry["aligned"] - entry["base"], abs=1e-9)
    assert result["forget_probability"]["change_ci95"][1] < 0
    assert result["retain_probability"]["change"] > 0


# --- resume ----------------------------------------------------------------------------------------------------------

RESUMED: dict[str, dict[str, Any]] = {
    "dpo": {},
    "kto": {"objective": {"name": "kto"}},
    "bco": {"objective": {"name": "bco"}},
    "sync": {"reference": {"scheme": "sync", "every": 1, "rate": 0.5}},
    "mixture": {"reference": {"scheme": "mixture", "every": 1, "base_share": 0.3}},
    "momentum": {"reference": {"scheme": "momentum", "every": 1, "momentum": 0.3}},
    "dropout": {"lora__dropout": 0.3},
}


def assert_resumes_exactly(run: Runs, first: int, changes: dict[str, Any]) -> Path:
    """Four steps in one go equal `first` of them, a resume, and the rest, bit for bit."""
    common = changes | {"training__checkpointing_steps": first}
    whole = run("whole", **common).run_dir
    path = checkpoint.folder_for(whole, first)
    target = run.folder / "resumed"
    target.mkdir()
    path.rename(target / path.name)
    resumed = run("resumed", **common, training__resume_from_checkpoint="latest").run_dir
    assert_equal(adapter_of(whole), adapter_of(resumed))
    assert rows_of(whole)[first:] == rows_of(resumed)[-(4 - first) :]
    return target / path.name


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(name: str, run: Runs) -> None:
    saved = assert_resumes_exactly(run, 2, RESUMED[name])
    state = torch.load(saved / "state.pt", weights_only=True)
    assert ("reference" in state) == (name in ("sync", "mixture", "momentum"))
    if name == "momentum":
        assert state["reference"].keys() == {"copy", "before"}
        moved = [bool((a != b).any()) for a, b in zip(*state["reference"].values(), strict=True)]
        assert any(moved)
    if name == "bco":
        assert "estimator" in state["job"]


@pytest.mark.parametrize("objective", ["grpo", "dpo"])
@pytest.mark.parametrize("first", [2, 3])
def test_a_round_of_samples_is_gone_on_with(objective: str, first: int, run: Runs, place: Path) -> None:
    changes = online(place, objective, steps_per_generation=2)
    saved = assert_resumes_exactly(run, first, changes)
    state = torch.load(saved / "state.pt", weights_only=True)["job"]["rollouts"]
    assert state["round"] == (first - 1) // 2
    assert len(state["batches"]) == 2


def test_several_iterations_use_the_log_probabilities_of_the_sampling_policy(run: Runs, place: Path) -> None:
    rows = rows_of(run(**online(place, num_iterations=2)).run_dir)
    assert [row["ratio"] for row in rows[::2]] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert all(abs(row["ratio"] - 1) > 1e-4 for row in rows[1::2])
    assert rows[0]["reward"] == rows[1]["reward"] != rows[2]["reward"]


@pytest.mark.slow  # that of images is quicker, and the trainer is the same
def test_sigterm_leaves_a_checkpoint_and_a_run_that_goes_on(run: Runs, tmp_path: Path, place: Path) -> None:
    changes = online(place, steps_per_generation=2) | {"training__checkpointing_steps": 0}
    tree = config_tree(tmp_path / "stopped", place, **changes, training__max_train_steps=5000)
    config = write_config(tmp_path / "stopped.yaml", tree)
    process = subprocess.Popen(command(config), env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    while len(read_rows(metrics)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, message
    assert "resume_from_checkpoint=latest" in message
    assert "Traceback" not in message
    (step,) = checkpoint.steps_of(tmp_path / "stopped")
    more = run("stopped", **changes, training__max_train_steps=step + 1, training__resume_from_checkpoint="latest")
    assert more.step == step + 1


def test_other_data_and_another_step_are_refused_on_resume(run: Runs, tmp_path: Path, place: Path) -> None:
    run(training__max_train_steps=1)
    again = {"training__resume_from_checkpoint": "latest"}
    with pytest.raises(UserError, match="effective batch was 4, is 8; set gradient_accumulation_steps"):
        run(**again, training__train_batch_size=8)
    fewer = tmp_path / "fewer" / "pairs.jsonl"
    fewer.parent.mkdir()
    fewer.write_text("\n".join((place / "pairs.jsonl").read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(UserError, match="samples was 24, is 23; the training samples must be the same"):
        run(**again, data__sources=[str(fewer)])


# --- how a step is cut does not matter -------------------------------------------------------------------------------

CUT = ("dpo", "simpo", "orpo", "npo", "sft", "dapo", "grpo", "dr_grpo")


@pytest.mark.parametrize("name", CUT)
def test_accumulation_does_not_change_the_step(name: str, run: Runs, place: Path) -> None:
    changes: dict[str, Any] = {"objective": {"name": name}}
    if name == "npo":
        changes = unlearning(place)
    if name in ("dapo", "grpo", "dr_grpo"):
        changes = online(place, name, count=2) | {"training__train_batch_size": 4}
    whole = run("whole", **changes, training__max_train_steps=3)
    split = changes | {"training__train_batch_size": 1, "training__gradient_accumulation_steps": 4}
    assert_same_steps(whole.run_dir, run("split", **split, training__max_train_steps=3).run_dir)


@pytest.mark.parametrize("name", ["npo", "sft", "rft", "orpo", "inpo"])
def test_accumulation_does_not_change_an_online_step(name: str, run: Runs, place: Path) -> None:
    """Objectives with a side that has no loss, with averages over either side, over prompts, or with the sampling model."""
    changes = online(place, name) | {"training__max_train_steps": 2, "training__train_batch_size": 8}
    whole = run("whole", **changes)
    split = changes | {"training__train_batch_size": 2, "training__gradient_accumulation_steps": 4}
    assert_same_steps(whole.run_dir, run("split", **split).run_dir)


def test_the_loss_of_a_step_is_the_mean_over_what_has_a_loss(run: Runs, tmp_path: Path, place: Path) -> None:
    """An objective that leaves samples out, a different number in every micro-batch."""
    objective = tmp_path / "long_only.py"
    objective.write_text(LONG_ONLY)
    changes = {"objective": {"name": str(objective)}, "training__max_train_steps": 3}
    whole = run("whole", **changes)
    assert 1 < min(row["count"] for row in rows_of(whole.run_dir)) < 4
    split = changes | {"training__train_batch_size": 1, "training__gradient_accumulation_steps": 4}
    assert_same_steps(whole.run_dir, run("split", **split).run_dir)


def test_rows_whose_label_is_not_read_are_left_out_and_counted(run: Runs, tmp_path: Path) -> None:
    draw = random.Random(1)
    rows = [{"prompt": letters(draw), "completion": letters(draw), "label": i % 4 == 0} for i in range(24)]
    write_rows(tmp_path / "labelled.jsonl", rows)
    folder = run(data__sources=[str(tmp_path / "labelled.jsonl")], objective={"name": "sft"}).run_dir
    assert json.loads((folder / "data_report.json").read_text())["skipped"]["unread_label"]["count"] == 18
    assert [row["count"] for row in rows_of(folder)] == [4.0] * 4


@pytest.mark.parametrize("name", ["dpo", "grpo"])
@pytest.mark.slow  # that of images is quicker, and the trainer is the same
def test_two_processes_equal_one(name: str, run: Runs, tmp_path: Path, place: Path) -> None:
    changes = online(place, steps_per_generation=2) if name == "grpo" else {}
    changes["training__max_train_steps"] = 3
    one = run("one", **changes)
    half = (8 if name == "grpo" else 4) // 2
    tree = config_tree(tmp_path / "two", place, **changes | {"training__train_batch_size": half})
    config = write_config(tmp_path / "two.yaml", tree)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            command(config),
            env=environment() | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    messages = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], messages
    assert_same_steps(one.run_dir, tmp_path / "two")
    a, b = adapter_of(one.run_dir), adapter_of(tmp_path / "two")
    for tensor in a:
        torch.testing.assert_close(a[tensor], b[tensor], rtol=1e-3, atol=1e-5)


def test_packing_and_gradient_checkpointing_change_nothing(run: Runs) -> None:
    plain = run("plain").run_dir
    assert_same_steps(plain, run("packed", text__packing=True).run_dir)
    assert_same_steps(plain, run("lean", training__gradient_checkpointing=True).run_dir)


# --- online training of other objectives -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpo", "kto", "sft", "rloo", "nft"])
def test_objectives_train_on_what_the_policy_samples(name: str, run: Runs, place: Path) -> None:
    rows = rows_of(run(**online(place, name), training__max_train_steps=2).run_dir)
    assert len(rows) == 2
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert 0 < rows[0]["reward"] < 1
    assert 1 <= rows[0]["length"] <= 6
    if name == "dpo":  # eight prompts, a pair each
        assert rows[0]["count"] == 8
        assert rows[0]["reward/best"] > rows[0]["reward"] > rows[0]["reward/worst"]


def test_groups_without_contrast_teach_nothing(run: Runs, place: Path) -> None:
    for name in ("grpo", "dpo"):
        changes = online(place, name)
        changes["rollout"]["rewards"] = [f"{place / 'rewards.py'}:constant"]
        result = run(name, **changes, training__max_train_steps=2)
        rows = rows_of(result.run_dir)
        assert [row["grad_norm"] for row in rows] == [0.0, 0.0]
        assert rows[0]["weight" if name == "dpo" else "loss"] == pytest.approx(0.0, abs=1e-9)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache__shard_size": 8}, r"cache: has no effect on family 'causal_lm'"),
        ({"sampling__num_inference_steps": 3}, r"sampling: has no effect on family 'causal_lm'"),
        ({"data__resolution": 64}, r"data\.resolution: has no effect"),
        ({"objective": {"name": "grpo"}}, r"rollout\.rewards: empty; online training needs at least one reward"),
        ({"rollout__samples_per_prompt": 4}, r"rollout: objective 'dpo' samples nothing; remove the section"),
        ({"data__format": "pickapic"}, r"data\.format: got 'pickapic'; family 'causal_lm' reads 'text'"),
        ({"text__max_length": 1}, r"text: got max_length 1"),
        ({"reference__scheme": "sync", "objective": {"name": "simpo"}}, r"objective 'simpo' has no reference"),
        ({"evaluation": {"at_end": True, "prompts": ["a"]}}, r"evaluation\.rewards: empty"),
        ({"evaluation": {"rewards": ["pickscore"]}}, r"reward 'pickscore' judges pictures"),
        ({"objective": {"name": "hypo"}}, r"'hypo' needs on_policy, which text data do not have"),
        ({"objective": {"name": "inpo"}}, r"'inpo' needs the log-probabilities .* train it online"),
        (
            {"evaluation": {"at_end": True, "rewards": ["text_world:correct"]}},
            r"evaluation\.prompts: missing, and .*rewards are set",
        ),
        (
            {"evaluation": {"at_end": True, "prompts": "held_out", "rewards": ["text_world:correct"]}},
            r"held_out_fraction is 0, so no prompt is held out",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_the_model_is_read(
    changes: dict[str, Any], message: str, run: Runs, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**changes)
    assert not (tmp_path / "run" / "config.yaml").exists()


AWAY = """
import torch
from diffalign.rewards import TextReward


class Placed(torch.nn.Linear):
    place, moves = "cuda:0", []

    def to(self, device):
        self.place = str(device)
        self.moves.append(self.place)
        return self


class Long(TextReward):
    range = (0.0, 10.0)
    unit = licence = gap = ""
    weights = None

    def __init__(self, device="cpu", dtype=None):
        self.network = Placed(1, 1)

    def __call__(self, prompts, completions, metadata=None):
        assert self.network.place == "cuda:0"
        return torch.tensor([float(len(text)) for text in completions])
"""


def test_networks_of_rewards_are_away_while_a_text_policy_trains(
    run: Runs, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "away.py").write_text(AWAY)
    monkeypatch.setattr(offload, "home", lambda network: torch.device(network.place))
    original, seen = TextJob.loss, list[list[str]]()

    def loss(self: TextJob, batch: Any) -> Any:
        (network,) = self.rollouts.models[0].networks()
        assert network.place == "cpu"
        seen.append(list(network.moves))
        return original(self, batch)

    monkeypatch.setattr(TextJob, "loss", loss)
    made = online(place, rewards=[str(tmp_path / "away.py")], offload_rewards=True, steps_per_generation=2)
    run("away", **made)
    assert seen[0] == ["cpu", "cuda:0", "cpu"]
    assert seen[-1] == ["cpu", *["cuda:0", "cpu"] * 2]


def test_online_steps_are_whole_groups(run: Runs, place: Path) -> None:
    with pytest.raises(ConfigError, match=r"8 x 1 answers .* no multiple of rollout.samples_per_prompt 3"):
        run("three", **online(place, count=3))
    with pytest.raises(ConfigError, match="'kto' compares with answers to other prompts"):
        run("kto", **online(place, "kto", count=8))
    with pytest.raises(ConfigError, match="temperature 1"):
        run("cold", **online(place), generation__temperature=0.7)
    with pytest.raises(ConfigError, match="got 2 for 1 rewards"):
        run("weights", **online(place, reward_weights=[1.0, 2.0]))


@pytest.mark.parametrize("setting", ["kernel", "window", "pairing", "old_decay", "policy", "select"])
def test_rollout_settings_of_images_are_refused_on_texts(setting: str, run: Runs, place: Path) -> None:
    value = {
        "kernel": "cps",
        "window": 2,
        "pairing": "sum",
        "old_decay": 0.5,
        "policy": "lagged",
        "select": "bradley_terry",
    }
    with pytest.raises(ConfigError, match=rf"rollout\.{setting}: has no effect on family 'causal_lm'"):
        run("wrong", **online(place, **{setting: value[setting]}))


def test_what_compares_answers_needs_them_in_one_micro_batch(run: Runs, place: Path) -> None:
    cut = {"training__train_batch_size": 2, "training__gradient_accumulation_steps": 4}
    with pytest.raises(ConfigError, match=r"got 2; objective 'rebel' .* a multiple of rollout.samples_per_prompt 4"):
        run("rebel", **online(place, "rebel") | {"objective": {"name": "rebel", "beta": 0.1}} | cut)
    with pytest.raises(ConfigError, match="'a2po' reads 'v_star' of every answer"):
        run("a2po", **online(place, "a2po"))
    with pytest.raises(ConfigError, match="'idk_dpo' reads pairs and items together"):
        run("idk", **online(place, "idk_dpo"))


def test_data_that_an_objective_cannot_read_are_a_users_mistake(run: Runs, place: Path) -> None:
    with pytest.raises(DataError, match=r"'rrpo' cannot be computed on these data: .*segment is missing; see docs"):
        run("rrpo", objective={"name": "rrpo"})
    with pytest.raises(DataError, match="missing_alternate"):
        run("idk", **unlearning(place, "idk_dpo"))


def test_pairs_of_a_prompt_with_many_can_count_less(run: Runs, tmp_path: Path) -> None:
    draw = random.Random(2)
    rows = [{"prompt": "abc", "chosen": letters(draw), "rejected": letters(draw)} for _ in range(8)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    folder = run(data__sources=[str(tmp_path / "pairs.jsonl")], data__weight_by_prompt=True).run_dir
    assert rows_of(folder)[0]["weight"] == pytest.approx(1 / 8)


def test_prompts_without_room_for_an_answer_are_refused_at_the_start(run: Runs, tmp_path: Path, place: Path) -> None:
    rows = [{"prompt": "ab" * n} for n in range(1, 12)] + [{"prompt": "abc" * 19}]
    write_rows(tmp_path / "prompts.jsonl", rows)
    changes = online(place) | {"data__sources": [str(tmp_path / "prompts.jsonl")], "text__max_length": 64}
    with pytest.raises(DataError, match=r"prompt \d+ has 57 tokens, .* 8; .* 64 fit .* \(1 of 12 prompts do not\)"):
        run(**changes, generation__max_new_tokens=8)


def test_held_out_samples_that_nothing_measures_are_noted(run: Runs, place: Path, caplog: Any) -> None:
    run("grpo", **online(place), evaluation={"held_out_fraction": 0.3}, training__max_train_steps=1)
    assert "nothing is measured on them" in caplog.text
    caplog.clear()
    run("dpo", evaluation={"held_out_fraction": 0.3}, training__max_train_steps=1)
    assert "nothing is measured on them" not in caplog.text


def test_a_prompt_that_comes_twice_in_a_round_is_answered_anew(run: Runs, tmp_path: Path, place: Path) -> None:
    write_rows(tmp_path / "one.jsonl", [{"prompt": "ab"}])
    changes = online(place) | {"data__sources": [str(tmp_path / "one.jsonl")], "training__max_train_steps": 1}
    rows = rows_of(run(**changes).run_dir)
    half = rows_of(run("half", **changes | {"training__train_batch_size": 4}).run_dir)
    assert rows[0]["reward"] != half[0]["reward"]


def test_passes_over_the_data_count_prompts_online(run: Runs, place: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    run(**online(place, num_iterations=2))  # 2 prompts for each of 2 rounds, of 24
    assert "0.17 passes over the data" in caplog.text


def test_text_objectives_are_refused_on_denoising_errors(tmp_path: Path, place: Path) -> None:
    tree = config_tree(tmp_path / "run", place, objective={"name": "simpo"})
    tree |= {"model": {"family": "sdxl", "pretrained": "tiny-sdxl"}, "data": {"sources": ["x"]}}
    del tree["text"], tree["generation"]
    with pytest.raises(ConfigError, match=r"simpo.*no tokens to count.*family 'sdxl'"):
        train(build(tree))


def test_prompts_without_answers_need_an_online_objective(run: Runs, tmp_path: Path) -> None:
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": word} for word in ("ab", "cd", "ef")])
    with pytest.raises(DataError, match=r"wrong_kind|no texts left"):
        run(data__sources=[str(tmp_path / "prompts.jsonl")])


# --- what a run leaves behind ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, place: Path) -> TrainResult:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    evaluation = {
        "at_end": True,
        "prompts": ["abc", "<b>\n x", "fgh"],
        "images_per_prompt": 2,
        "grid_prompts": 2,
        "rewards": [f"{place / 'rewards.py'}:early"],
        "held_out_fraction": 0.3,
    }
    return train(build(config_tree(folder, place, training__sample_steps=2, evaluation=evaluation)))


def test_the_result_has_rewards_and_held_out_accuracy(evaluated: TrainResult) -> None:
    result = json.loads((evaluated.run_dir / "result.json").read_text())
    assert result["win_rate_ci95"][0] <= result["win_rate"] <= result["win_rate_ci95"][1]
    assert result["gain"] == pytest.approx(result["aligned_mean"] - result["base_mean"], abs=1e-6)
    assert result["held_out_pairs"] + result["samples"] == 24
    (scores,) = json.loads((evaluated.run_dir / "scores.json").read_text()).values()
    assert [len(row) for row in scores["base"]] == [2, 2, 2]


def test_the_first_prompts_are_answered_before_during_and_after(evaluated: TrainResult) -> None:
    samples = evaluated.run_dir / "samples"
    told = json.loads((samples / "texts.json").read_text())
    assert told["prompts"] == ["abc", "<b>\n x"]
    assert list(told["answers"]) == ["0", "2"]
    compared = json.loads((samples / "comparison.json").read_text())
    assert [row["base"] for row in compared[:2]] == told["answers"]["0"]  # the same noise
