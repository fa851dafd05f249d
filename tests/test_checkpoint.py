"""Checkpoints are there whole or not at all, and belong to one config."""

from __future__ import annotations

import json
import logging
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign import checkpoint
from diffalign.config import RunConfig
from diffalign.config_loading import build
from diffalign.errors import CheckpointError


def make_config(**changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "output_dir": "out",
        "model": {"family": "sdxl", "pretrained": "tiny-sdxl"},
        "objective": {"name": "dpo", "beta_dpo": 500},
    }
    return build(tree | changes)


def weights(step: int) -> dict[str, torch.Tensor]:
    return {"unet.to_q.lora_A": torch.full((2, 3), float(step)), "unet.to_q.lora_B": torch.arange(6.0).view(3, 2).T}


def state(step: int) -> dict[str, Any]:
    return {
        "optimizer": {"state": {0: {"step": torch.tensor(float(step)), "exp_avg": torch.ones(2, dtype=torch.float64)}}}
    }


def save(folder: Path, step: int, config: RunConfig | None = None, **options: Any) -> Path:
    return checkpoint.save(
        folder, step, weights(step), state(step), config or make_config(), {"samples": step}, **options
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    assert names(tmp_path) == ["checkpoint-000003"]
    assert names(path) == ["adapter.safetensors", "manifest.json", "state.pt"]
    found = checkpoint.load(path, make_config())
    assert (found.step, found.manifest["samples"]) == (3, 3)
    for name, value in weights(3).items():
        assert torch.equal(found.adapter[name], value)
    moments = found.state["optimizer"]["state"][0]
    assert moments["exp_avg"].dtype == torch.float64
    assert moments["step"] == 3


@pytest.mark.parametrize("victim", ["save_file", "sha256", "atomic_write_text"])
def test_a_kill_while_writing_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    old = save(tmp_path, 2)
    with monkeypatch.context() as patch:

        def killed(*args: object) -> None:
            raise KeyboardInterrupt  # what no handler of ours catches, like a kill

        patch.setattr(checkpoint, victim, killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 4)
    assert checkpoint.find(tmp_path, "latest") == old
    assert checkpoint.load(old, make_config()).step == 2
    # The next save clears what the kill left behind, whatever process that was.
    (tmp_path / ".tmp-checkpoint-1").mkdir()
    save(tmp_path, 4)
    assert names(tmp_path) == ["checkpoint-000002", "checkpoint-000004"]


def test_a_failed_write_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 2)

    def full(*args: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed\nmore")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"could not be written \(Pytorch.*failed\); earlier ones are intact"):
        save(tmp_path, 4)
    assert names(tmp_path) == ["checkpoint-000002"]


def test_no_space_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: 1000)
    with pytest.raises(CheckpointError, match="no space for a checkpoint"):
        save(tmp_path, 4)
    assert names(tmp_path) == []


@pytest.mark.parametrize("file", ["adapter.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "delete"])
def test_damage_is_found_and_latest_falls_back(
    tmp_path: Path, file: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = save(tmp_path, 2)
    target = save(tmp_path, 4) / file
    data = target.read_bytes()
    if how == "delete":
        target.unlink()
    elif how == "cut":
        target.write_bytes(data[: len(data) // 2])
    else:
        # A digit of a hash, or one bit in the middle of the weights.
        place = data.index(b'"adapter.safetensors": "') + 30 if file == "manifest.json" else len(data) // 2
        target.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with caplog.at_level(logging.WARNING, "diffalign"):
        assert checkpoint.find(tmp_path, "latest") == before
    assert "checkpoint-000004" in caplog.text
    with pytest.raises(CheckpointError, match=r"checkpoint-000004.*(damaged|no intact checkpoint)"):
        checkpoint.load(tmp_path / "checkpoint-000004", make_config())


def test_a_folder_of_damaged_checkpoints_is_not_started_over(tmp_path: Path) -> None:
    (save(tmp_path, 2) / "state.pt").unlink()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        checkpoint.find(tmp_path, "latest")


def test_the_oldest_go_first(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        save(tmp_path, step)
    (tmp_path / "checkpoint-notes").mkdir()
    save(tmp_path, 12, keep=2)
    assert names(tmp_path) == ["checkpoint-000010", "checkpoint-000012", "checkpoint-notes"]
    # Going on from an earlier step never removes what was just written.
    save(tmp_path, 6, keep=1)
    assert "checkpoint-000006" in names(tmp_path)


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 2)
    path = checkpoint.save(tmp_path, 2, weights(9), state(9), make_config(), {})
    assert checkpoint.load(path, make_config()).adapter["unet.to_q.lora_A"][0, 0] == 9


def test_where_to_go_on(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path, None) is None
    assert checkpoint.find(tmp_path, "latest") is None
    first, second = save(tmp_path, 2), save(tmp_path, 4)
    assert checkpoint.find(tmp_path, "latest") == second
    assert checkpoint.find(tmp_path, "checkpoint-000002") == first
    assert checkpoint.find(tmp_path / "elsewhere", str(first)) == first
    with pytest.raises(
        CheckpointError, match=r"already holds checkpoints up to step 4; set .*=latest .*another output_dir"
    ):
        checkpoint.find(tmp_path, None)
    with pytest.raises(
        CheckpointError, match="'checkpoint-3' is no folder; expected 'latest' or one of: checkpoint-000002"
    ):
        checkpoint.find(tmp_path, "checkpoint-3")


Change = namedtuple("Change", "changes message")


@pytest.mark.parametrize(
    "case",
    [
        Change({"seed": 1}, "seed was 0, is 1"),
        Change({"training": {"learning_rate": 3e-5}}, r"training\.learning_rate was 1e-05, is 3e-05"),
        Change({"objective": {"name": "dpo", "beta_dpo": 600}}, r"objective\.beta was 500.0, is 600.0"),
        Change({"objective": {"name": "sft"}}, r"objective\..* was "),
        Change({"lora": {"rank": 8}}, r"lora\.rank was 16, is 8"),
        Change({"lora": {"targets": ["to_q"]}}, r"lora\.targets was 'attention', is \['to_q'\]"),
        Change({"data": {"ties": "soft"}}, r"data\.ties was 'drop', is 'soft'"),
        Change({"model": {"family": "sd", "pretrained": "x/y"}}, r"model\.family was 'sdxl', is 'sd'"),
    ],
)
def test_another_config_is_refused_by_name(tmp_path: Path, case: Change) -> None:
    path = save(tmp_path, 2)
    with pytest.raises(CheckpointError, match=f"belongs to another config: .*{case.message}"):
        checkpoint.load(path, make_config(**case.changes))


def test_keys_that_did_not_exist_yet_had_their_defaults(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    del (
        manifest["config"]["sparse"],
        manifest["config"]["lora"]["use_rslora"],
        manifest["config"]["objective"]["label_smoothing"],
    )
    file.write_text(json.dumps(manifest))
    assert checkpoint.load(path, make_config()).step == 2
    with pytest.raises(CheckpointError, match=r"lora\.use_rslora was False, is True"):
        checkpoint.load(path, make_config(lora={"use_rslora": True}))
    with pytest.raises(CheckpointError, match=r"sparse\.method was None, is 'hft'"):
        checkpoint.load(path, make_config(sparse={"method": "hft"}))


def test_what_may_change_between_a_run_and_its_continuation(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    changed = make_config(
        output_dir="elsewhere",
        training={"max_train_steps": 9, "logging_steps": 5, "resume_from_checkpoint": "latest", "cpu": True},
        sampling={"num_inference_steps": 3},
        evaluation={"num_prompts": 3},
        data={"sources": ["moved"]},
        cache={"dir": "elsewhere"},
    )
    assert checkpoint.load(path, changed).step == 2
