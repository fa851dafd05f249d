"""The command line: what a mistake looks like, and what each command prints."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diffalign import __version__, checkpoint, cli, files, plugins
from diffalign.cli import main
from diffalign.config import ModelConfig, RunConfig
from diffalign.config_loading import dump, load_config
from diffalign.errors import ConfigError, UserError
from diffalign.families import NETWORK, load_family
from diffalign.trainer import TrainResult

TinyConfig = Callable[..., RunConfig]
Complaint = Callable[..., str]


pytestmark = pytest.mark.usefixtures("own_logging")


@pytest.fixture
def complaint(capfd: pytest.CaptureFixture[str]) -> Complaint:
    """Run a command that must fail, and return its one line of complaint."""

    def run(*argv: str | Path, alone: bool = True) -> str:
        capfd.readouterr()
        assert main([str(word) for word in argv]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        lines = err.splitlines()
        assert "Traceback" not in err
        # The complaint stands last; only what was done before it (which data is used, say) may stand above it.
        assert lines[-1].startswith("diffalign: ")
        assert all(line.startswith(("data: ", "cache ", "data source ")) for line in lines[:-1]), err
        if alone:
            assert len(lines) == 1
        return lines[-1]

    return run


@pytest.fixture
def write(tmp_path: Path, tiny_config: TinyConfig) -> Callable[..., Path]:
    """Write a config file of a tiny run; its output_dir is `tmp_path / "run"`."""

    def make(**changes: Any) -> Path:
        file = tmp_path / "config.yaml"
        file.write_text(dump(tiny_config(tmp_path / "run", **changes)))
        return file

    return make


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo_dpoo"], r"config 'demo_dpoo' not found .*; did you mean 'demo_dpo'\? Shipped: "),
        (
            ["demo_dpo", "training.learning_rte=1"],
            r"training\.learning_rte: unknown key; did you mean 'learning_rate'\?",
        ),
        (
            ["demo_dpo", "training.max_train_steps=many"],
            r"training\.max_train_steps: got 'many' .*a whole number expected",
        ),
        (["demo_dpo", "objective.name=dppo"], r"objective 'dppo' not found; did you mean 'dpo'\?"),
        (["demo_dpo", "objective.beta_dpo=0"], r"beta is 0.*expected a positive number"),
        (["demo_dpo", "model.family=sdlx"], r"family 'sdlx' not found; did you mean 'sdxl'\?"),
        (["demo_dpo", "model.family=sd"], r"model\.family is 'sd', but .* set model\.family: sdxl"),
        (["demo_dpo", "model.pretrained=nothing"], r"'nothing' is no file, folder, hub id .*Tiny bases: tiny-sdxl"),
        (["demo_dpo", "model.vae=nothing"], r"model\.vae 'nothing' is no file, folder or hub id"),
        (["demo_dpo", "data.format=pickapick"], r"data format 'pickapick' not found; did you mean 'pickapic'\?"),
        (["demo_dpo", "data.world_pairs=null"], r"data\.sources: empty; name local files or folders"),
        (["demo_dpo", "data.resolution=4"], r"data\.resolution: got 4; expected at least 8"),
        (["demo_dpo", "data.max_pairs=0"], r"data\.max_pairs: got 0; expected at least 1"),
        (["demo_dpo", "cache.enabled=false", "data.buckets=true"], r"data\.buckets needs the cache"),
        (["demo_dpo", "cache.shard_size=0"], r"cache\.shard_size: got 0; expected at least 1"),
        (["demo_dpo", "lora.init=pissa"], r"lora\.init.*pissa.*base"),
        (["demo_dpo", "training.lr_scheduler=cosin"], r"lr_scheduler 'cosin'; did you mean 'cosine'\?"),
        (["demo_dpo", "training.train_batch_size=0"], r"train_batch_size: got 0; expected at least 1, or 'auto'"),
        (["demo_dpo", "training.max_train_steps=0"], r"max_train_steps: got 0; expected at least 1"),
        (["demo_dpo", "training.learning_rate=-1"], r"learning_rate: got -1\.0; expected a number >= 0"),
        (["demo_dpo", "training.ema_decay=1"], r"ema_decay: got 1\.0; expected 0 < value < 1"),
        (["demo_dpo", "training.max_grad_norm=-1"], r"max_grad_norm: got -1\.0; expected 0 .*or more"),
        (
            ["demo_dpo", "sampling.scheduler=EulerScheduler"],
            r"sampling\.scheduler 'EulerScheduler' is no diffusers scheduler",
        ),
        (["demo_dpo", "evaluation.rewards=pickscor"], r"reward 'pickscor' not found; did you mean 'pickscore'\?"),
        (["demo_dpo", "evaluation.rewards=[]"], r"evaluation\.rewards: empty, and evaluation\.at_end is true"),
        (["demo_dpo", "evaluation.prompts=nowhere.txt"], r"prompts 'nowhere\.txt': no such file and no shipped list"),
        (["demo_dpo", "evaluation.held_out_fraction=1"], r"held_out_fraction: got 1\.0; expected 0 <= value < 1"),
    ],
)
def test_a_bad_config_is_one_line_before_anything_is_done(
    argv: list[str], message: str, complaint: Complaint, tmp_path: Path
) -> None:
    line = complaint("train", *argv, f"output_dir={tmp_path / 'run'}", "training.cpu=true")
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


OWN_OBJECTIVE = """
from dataclasses import dataclass
from typing import ClassVar

from diffalign.losses import Cap, LossOut, Objective
from diffalign.losses.base import needs


@dataclass(frozen=True, kw_only=True)
class PerToken(Objective):
    name: ClassVar[str] = "per_token"
    title: ClassVar[str] = "Per token"
    composition: ClassVar[str] = "score / length"
    instead: ClassVar[str] = "choose objective.name=dpo"
    needs: ClassVar = needs("pairs", caps=(Cap.LENGTH,), reference=False)

    def __call__(self, scores, layout, stats=None):
        return LossOut(scores.theta, {})
"""


def test_an_objective_that_means_nothing_on_a_family(
    write: Callable[..., Path], complaint: Complaint, tmp_path: Path
) -> None:
    file = tmp_path / "per_token.py"
    file.write_text(OWN_OBJECTIVE)
    line = complaint("train", write(objective={"name": str(file)}))
    assert line == (
        "diffalign: objective 'per_token' on bound scores: there are no tokens to count or to normalise by; choose "
        "objective.name=dpo (family 'sdxl')"
    )


def test_an_output_folder_that_cannot_be_written(
    complaint: Complaint, write: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    line = complaint("train", write(), f"output_dir={tmp_path / 'file' / 'run'}")
    assert "is not writable (Not a directory); choose another output_dir" in line


def test_no_disk_space(
    complaint: Complaint, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 1_000_000)
    assert "0.0 GB free, about 0.1 GB are needed; free some space" in complaint("train", write())
    assert list((tmp_path / "run").iterdir()) == []


def test_missing_columns(complaint: Complaint, write: Callable[..., Path], tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"caption": "x", "image": b"1"}]), tmp_path / "train.parquet")
    line = complaint("train", write(data={"sources": [str(tmp_path / "train.parquet")]}), alone=False)
    assert "columns jpg_0, jpg_1, label_0, label_1 are missing; found caption, image; expected caption, jpg_0" in line


def test_nothing_left_after_filtering(complaint: Complaint, write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text("def keep(record):\n    return False\n")
    config = write(data={"filter": f"{tmp_path / 'rules.py'}:keep"})
    assert "no pairs left. 13 rows read, 0 kept, 11 filtered" in complaint("train", config, alone=False)


def test_no_source(complaint: Complaint, write: Callable[..., Path], tmp_path: Path) -> None:
    line = complaint("data", "check", write(data={"sources": [str(tmp_path / "gone"), "owner/set"]}), alone=False)
    assert "no data source can be used. Tried " in line
    assert "no such file or folder" in line
    assert "owner/set: " in line


def test_cache_damaged_and_stale(
    complaint: Complaint, write: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", str(write())]) == 0
    out = capfd.readouterr().out
    assert out.startswith("10 pairs in ")
    assert "13 rows read, 10 kept" in out
    assert "2 noted as truncated_prompt" in out
    line = complaint("train", write(data={"ties": "soft"}), alone=False)
    assert "is stale: data.ties was 'drop', is 'soft'. Delete it, or name another cache.dir" in line
    shard = tmp_path / "run" / "cache" / "images-r0-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    line = complaint("train", write(), alone=False)
    assert f"cache shard {shard} is missing or corrupt" in line
    assert "delete pairs-r0-00001.parquet" in line


def save_checkpoint(folder: Path, config: RunConfig) -> None:
    folder.mkdir()
    checkpoint.save(folder, 2, {"a": torch.zeros(1)}, {}, config, {})


def test_checkpoint_of_another_config_and_a_used_folder(
    complaint: Complaint, write: Callable[..., Path], tmp_path: Path
) -> None:
    config = write()
    save_checkpoint(tmp_path / "run", load_config(config))
    line = complaint("train", config)
    assert "already holds checkpoints up to step 2; set training.resume_from_checkpoint=latest to go on" in line
    line = complaint("train", config, "training.resume_from_checkpoint=latest", "lora.rank=8")
    assert "belongs to another config: lora.rank was 4, is 8. Use its settings, or start in another output_dir" in line
    line = complaint("train", config, "training.resume_from_checkpoint=checkpoint-9")
    assert "'checkpoint-9' is no folder; expected 'latest' or one of: checkpoint-000002" in line


def test_an_adapter_of_another_family(
    complaint: Complaint, write: Callable[..., Path], tmp_path: Path, tiny_sd_folder: Path
) -> None:
    from diffalign import adapters, export
    from diffalign.config import LoraConfig

    family = load_family(ModelConfig(family="sd", pretrained=str(tiny_sd_folder)))
    family.load(NETWORK)
    lora = LoraConfig(rank=2)
    adapters.attach(family.network, lora, seed=0)
    file = export.save_lora(family.network, lora, tmp_path / "sd", family="sd")["diffusers"]
    out = tmp_path / "images"
    line = complaint("generate", write(), "--prompt", "a", "--adapter", file, "--out", out, alone=False)
    assert "adapter" in line
    assert "sdxl" in line
    assert not list(out.iterdir())


def test_commands_that_need_something(complaint: Complaint, write: Callable[..., Path], tmp_path: Path) -> None:
    config = write()
    assert "evaluate needs an adapter; give --adapter FILE" in complaint("evaluate", config)
    line = complaint("evaluate", config, "--adapter", tmp_path)
    assert "evaluation.prompts and evaluation.rewards must both be set" in line
    assert "run folder nowhere does not exist" in complaint("report", "nowhere")
    assert "no run folder: expected config.yaml or metrics.jsonl" in complaint("report", tmp_path / "..")


def test_debug_shows_the_whole_story() -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        main(["train", "demo_dpo", "nothing=1", "--debug"])


def test_line_breaks_stay_out_of_the_complaint(monkeypatch: pytest.MonkeyPatch, complaint: Complaint) -> None:
    def run(args: object) -> int:
        raise UserError("one\ntwo\n  three")

    monkeypatch.setattr(cli, "run_doctor", run)
    assert complaint("doctor") == "diffalign: one two three"


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["plan", "c.yaml", "seed=3", "training.threads=2", "--json"],
        ["plan", "c.yaml", "--json", "seed=3", "training.threads=2"],
        ["plan", "--json", "c.yaml", "seed=3", "training.threads=2"],
        ["plan", "seed=3", "c.yaml", "training.threads=2", "--json"],
        ["plan", "seed=3", "training.threads=2", "--json", "c.yaml"],
        ["plan", "c.yaml", "seed=3", "--json", "training.threads=2"],
    ],
)
def test_settings_may_stand_anywhere(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def run(args: Any) -> int:
        seen.append(args)
        return 0

    monkeypatch.setattr(cli, "run_plan", run)
    assert main(argv) == 0
    (args,) = seen
    assert args.config == "c.yaml"
    assert sorted(args.overrides) == ["seed=3", "training.threads=2"]
    assert args.json is True


def test_option_values_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(cli, "run_generate", lambda args: seen.append(args) or 0)
    assert main(["generate", "c.yaml", "--prompt", "x = y", "seed=3", "--seed", "4"]) == 0
    assert (seen[0].prompt, seen[0].overrides, seen[0].seed) == (["x = y"], ["seed=3"], 4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "c.yaml", "--jsn"], "unrecognised: --jsn (settings are given as section.key=value)"),
        (["doctor", "seed=3"], "doctor takes no settings; got seed=3"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "required: COMMAND"),
    ],
)
def test_wrong_words(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_how_a_stopped_run_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import diffalign.trainer

    monkeypatch.setattr(diffalign.trainer, "train", lambda config: TrainResult(tmp_path, 3, None, stopped_by=15))
    assert main(["train", "demo_dpo"]) == 143

    def interrupted(config: RunConfig) -> TrainResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(diffalign.trainer, "train", interrupted)
    assert main(["train", "demo_dpo"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "diffalign: interrupted"


def test_the_demo_never_writes_into_an_earlier_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import diffalign.trainer

    seen: list[RunConfig] = []

    def train(config: RunConfig) -> TrainResult:
        seen.append(config)
        Path(config.output_dir).mkdir(parents=True)
        return TrainResult(Path(config.output_dir), 1, None)

    monkeypatch.setattr(diffalign.trainer, "train", train)
    monkeypatch.chdir(tmp_path)
    for argv in (["demo"], ["demo", "seed=2"], ["demo", "output_dir=mine"]):
        assert main(argv) == 0
    assert [config.output_dir for config in seen] == ["runs/demo_dpo-1", "runs/demo_dpo-2", "mine"]
    assert [config.seed for config in seen] == [0, 2, 0]
    assert "open runs/demo_dpo-1/report.html" in capsys.readouterr().out


def test_the_headline_numbers_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    cli.print_result(
        {
            "metric": "verifier",
            "base_mean": 0.5,
            "aligned_mean": 0.625,
            "gain": 0.125,
            "gain_ci95": [0.1, 0.15],
            "win_rate": 0.7,
            "win_rate_ci95": [0.6, 0.8],
            "steps": 10,
            "pairs": 20,
            "train_seconds": 30.0,
            "seconds_per_step": 3.0,
        }
    )
    out = capsys.readouterr().out
    assert "0.5000 -> 0.6250" in out
    assert "win rate            0.700    95 % interval [0.600, 0.800]" in out
    assert "10 steps on 20 pairs in 30 s (3.00 s per step)" in out


# --- commands --------------------------------------------------------------------------------------------------------


def test_list_is_quick_and_imports_no_model_code(tmp_path: Path) -> None:
    code = (
        "import sys, time; from diffalign.cli import main; code = main(['list']);"
        "heavy = [m for m in ('diffusers', 'transformers', 'pyarrow', 'accelerate', 'peft') if m in sys.modules];"
        "print(heavy, time.process_time() < 6, code)"
    )
    root = str(Path(cli.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment
    )
    assert done.stderr == ""
    *lines, last = done.stdout.splitlines()
    assert last == "[] True 0"
    listed = dict(line.split(":", 1) for line in lines)
    assert listed.keys() == {"objectives", "families", "readers", "rewards", "configs", "prompts"}
    assert {"dpo", "sft", "kto", "npo", "grpo"} <= set(listed["objectives"].split())
    assert {"sd", "sdxl"} <= set(listed["families"].split())
    assert "demo_dpo" in listed["configs"].split()
    assert "world_heldout" in listed["prompts"].split()


def test_list_of_one_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "families"]) == 0
    listed = capsys.readouterr().out.split()
    assert listed == plugins.names("families")
    assert {"causal_lm", "sd", "sdxl", "sd3"} <= set(listed)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"diffalign {__version__}\n"


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"] == importlib.metadata.version("torch")
    assert facts["packages"]["diffusers"] == importlib.metadata.version("diffusers")
    assert facts["offline"] is True
    assert facts["devices"]


def test_plan(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(write()), "--json", "--pairs", "100"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert '"steps_per_epoch": 50' in json.dumps(plan)  # steps of two pairs each
    assert main(["plan", str(write())]) == 0
    assert "parameters" in capsys.readouterr().out


def test_data_check_accounts_for_every_row(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(write())]) == 0
    out = capsys.readouterr().out
    assert "13 rows read, 11 kept, 1 tie, 1 unlabelled" in out  # nothing is decoded, so the cut image is not known yet
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert report["skipped"]["tie"]["count"] == 1


def test_generate_from_the_base(write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", str(write()), "--prompt", "a red circle", "--prompt", "ü", "--images-per-prompt", "2"]
    assert main([*argv, "--out", str(tmp_path / "one")]) == 0
    assert main([*argv, "--out", str(tmp_path / "two"), "sampling.batch_size=1"]) == 0
    assert f"images in {tmp_path / 'one'}" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "one" / "images.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["prompt"], row["repeat"], row["side"]) for row in rows] == [
        (prompt, repeat, "base") for prompt in ("a red circle", "ü") for repeat in (0, 1)
    ]
    from PIL import Image, ImageChops

    for row in rows:
        one, two = (Image.open(tmp_path / run / row["file"]) for run in ("one", "two"))
        assert one.size == (32, 32)
        # The noise of an image is its own, whatever batch it is sampled in.
        assert max(high for _, high in ImageChops.difference(one, two).getextrema()) <= 1
    contents = {(tmp_path / "one" / row["file"]).read_bytes() for row in rows}
    assert len(contents) == 4


def test_a_run_folder_is_a_config_and_stays_one_when_it_is_moved(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config = tiny_config(tmp_path / "run")
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "config.yaml").write_text(dump(config))
    args = argparse.Namespace(config=str(tmp_path / "moved"), overrides=[])
    assert cli.read_config(args) == replace(config, output_dir=str(tmp_path / "moved"))
    args = argparse.Namespace(config="demo_dpo", overrides=["seed=7"])
    assert cli.read_config(args).seed == 7


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    code = "import sys; from diffalign.cli import main; sys.exit(main(['list', 'objectives']))"
    root = str(Path(cli.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root}
    listing = subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert listing.stdout is not None
    listing.stdout.close()
    _, complaint = listing.communicate(timeout=120)
    assert (listing.returncode, complaint) == (141, b"")
