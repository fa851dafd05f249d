"""The commands for language models: what they write, and that they agree with the run they look at."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_support import save_lm

from diffalign.cli import main
from diffalign.config_loading import build
from diffalign.trainer import TrainResult, train

REWARD = """
def letters(prompts, completions, **columns):
    return [float(sum(c.isalpha() for c in text)) for text in completions]
"""


pytestmark = pytest.mark.usefixtures("own_logging")


def word(draw: random.Random) -> str:
    return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(draw.randint(2, 6)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    save_lm(folder / "lm")
    draw = random.Random(1)
    rows = [{"prompt": word(draw), "chosen": word(draw), "rejected": word(draw)} for _ in range(16)]
    lines = [json.dumps(row) for row in (*rows, rows[0], {"prompt": "ab", "chosen": "c", "rejected": "c"})]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "rewards.py").write_text(REWARD)
    return folder


def tree(folder: Path, place: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "model": {"family": "causal_lm", "pretrained": str(place / "lm")},
        "data": {"format": "text", "sources": [str(place / "pairs.jsonl")], "max_unusable": 0.5},
        "text": {"max_length": 24},
        "objective": {"name": "dpo"},
        "lora": {"rank": 4, "targets": "all"},
        "training": {"learning_rate": 3e-2, "train_batch_size": 4, "max_train_steps": 6, "cpu": True, "threads": 1},
        "generation": {"max_new_tokens": 6},
        "evaluation": {
            "at_end": True,
            "prompts": ["abc", "def", "ghi", "jkl"],
            "images_per_prompt": 2,
            "rewards": [f"{place / 'rewards.py'}:letters"],
            "held_out_fraction": 0.3,
        },
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, place: Path) -> TrainResult:
    return train(build(tree(tmp_path_factory.mktemp("runs") / "run", place)))


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def test_generate_answers_as_the_runs_own_evaluation(
    run: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "abc", "--prompt", "def", "--base", "--seed", "1234", "--samples-per-prompt", "2"]
    assert main(["generate", str(run.run_dir), *words, "--out", str(tmp_path)]) == 0
    rows = answers(tmp_path)
    assert [(r["prompt"], r["repeat"], r["side"]) for r in rows[:4]] == [
        ("abc", 0, "base"),
        ("abc", 0, "adapter"),
        ("abc", 1, "base"),
        ("abc", 1, "adapter"),
    ]
    compared = json.loads((run.run_dir / "samples" / "comparison.json").read_text())
    first = {(r["prompt"], r["side"]): r["text"] for r in rows if r["repeat"] == 0}
    for row in compared[:2]:
        assert first[row["prompt"], "base"] == row["base"]
        assert first[row["prompt"], "adapter"] == row["aligned"]
    out = capsys.readouterr().out
    assert f"8 answers in {tmp_path / 'answers.jsonl'}" in out
    assert "[adapter] abc" in out


def test_generate_reads_files_and_takes_the_base_alone(run: TrainResult, place: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("abc\n\nxyz\n")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree(tmp_path / "none", place)))
    argv = ["generate", str(tmp_path / "config.yaml"), "--prompts", str(tmp_path / "prompts.txt")]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert [(r["prompt"], r["side"]) for r in answers(tmp_path / "out")] == [("abc", "base"), ("xyz", "base")]


def test_evaluate_agrees_with_the_run(run: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.read_bytes() for p in run.run_dir.rglob("*") if p.is_file() and p.name != "data_report.json"}
    assert main(["evaluate", str(run.run_dir), "--out", str(tmp_path / "again.json")]) == 0
    again, first = json.loads((tmp_path / "again.json").read_text()), run.result
    assert first is not None
    for name in ("base_mean", "aligned_mean", "win_rate", "held_out_implicit_acc"):
        assert again[name] == pytest.approx(first[name], abs=1e-6)
    assert first["base_mean"] != first["aligned_mean"]
    assert "held-out accuracy" in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_checkpoint_is_an_adapter_too(run: TrainResult, tmp_path: Path) -> None:
    for name, adapter in (("run", run.run_dir), ("checkpoint", run.run_dir / "checkpoint-000006")):
        argv = [
            "generate",
            str(run.run_dir),
            "--adapter",
            str(adapter),
            "--prompt",
            "abc",
            "--out",
            str(tmp_path / name),
        ]
        assert main(argv) == 0
    assert answers(tmp_path / "run") == answers(tmp_path / "checkpoint")


# peft asks transformers for an attribute that has a new name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_export_writes_what_peft_reads_and_a_merged_model_says_the_same(run: TrainResult, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert main(["export", str(run.run_dir), "--out", str(tmp_path / "peft")]) == 0
    assert main(["export", str(run.run_dir), "--merge", "--out", str(tmp_path / "merged")]) == 0
    config = yaml.safe_load((run.run_dir / "config.yaml").read_text())
    base = AutoModelForCausalLM.from_pretrained(config["model"]["pretrained"])
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "peft"))(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    assert (plain - adapted).abs().max() > 1e-2
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_data_check_accounts_for_every_row(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree(tmp_path / "run", place)))
    assert main(["data", "check", str(tmp_path / "config.yaml")]) == 0
    assert "18 rows read, 16 kept" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert report["skipped"]["duplicate"]["count"] == 1


def test_data_make_and_its_help(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "p", "completions": ["a", "b", "c"], "scores": [0.1, 0.9, 0.5]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["data", "make", "best_of_n", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "min_gap=0.2"]
    assert main(argv) == 0
    assert "1 rows made" in capsys.readouterr().out
    (made,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (made["chosen"], made["rejected"]) == ("b", "a")
    assert main([*argv[:-1], "min_gap"]) == 2
    assert "settings are given as key=value" in capsys.readouterr().err
    assert main(["data", "make", "best_of_m", *argv[3:]]) == 2
    assert "did you mean 'best_of_n'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["data", "make", "--help"])
    told = capsys.readouterr().out
    from diffalign.text.recipes import RECIPES

    assert all(re.search(rf"^  {name} +\w", told, re.M) for name in RECIPES)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["cache", "demo_llm_dpo"], "there is nothing to cache"),
        (["generate", "demo_llm_dpo", "evaluation.prompts=[]"], "no prompt; give --prompt TEXT"),
        (["generate", "demo_llm_dpo", "--prompt", "a", "--samples-per-prompt", "0"], "--samples-per-prompt: got 0"),
        (["generate", "demo_dpo", "--prompt", "a", "--chat"], "makes images; leave it out"),
        (["export", "demo_dpo", "--merge", "--out", "x"], "only for language models"),
        (["export", "demo_llm_dpo", "model.load_in_4bit=true", "--merge", "--out", "x"], "4 bits"),
        (["evaluate", "demo_llm_dpo"], "evaluate needs an adapter"),
        (["evaluate", "demo_llm_dpo", "--adapter", "nowhere"], "nowhere holds no adapter"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*argv, f"output_dir={tmp_path / 'run'}", "training.cpu=true"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last
    assert last.startswith("diffalign: ")


def test_lists_tell_what_things_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "objectives", "--long"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert re.search(r"simpo +texts +SimPO", lines["simpo"])
    assert re.search(r"dpo +images texts trajectories +", lines["dpo"])
    assert sum("experimental" in line for line in lines.values()) >= 5
    assert main(["list", "objectives"]) == 0
    assert "simpo" in capsys.readouterr().out.splitlines()  # plain names where nobody looks
    assert main(["list", "rewards", "--long"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["text_world"].split()[1] == "texts"
    assert lines["pickscore"].split()[1] == "images"


# --- the model card --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """Unlearning on the embedded world's own language model, for two steps."""
    from diffalign.config_loading import load_config

    folder = tmp_path_factory.mktemp("tiny") / "run"
    short = [
        "training.max_train_steps=2",
        "training.train_batch_size=4",
        "training.threads=1",
        "evaluation.num_prompts=2",
    ]
    return train(load_config("demo_llm_npo", [f"output_dir={folder}", *short, "training.lr_warmup_steps=0"]))


@pytest.mark.slow
def test_the_cards_snippet_runs(tiny: TrainResult) -> None:
    card = (tiny.run_dir / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    assert "PeftModel.from_pretrained" in snippet
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", snippet],
        cwd=tiny.run_dir,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_the_card_states_base_data_unlearning_and_limits(tiny: TrainResult) -> None:
    card = (tiny.run_dir / "README.md").read_text(encoding="utf-8")
    result = tiny.result
    assert result is not None
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "peft"
    assert front["pipeline_tag"] == "text-generation"
    entry = result["forget_recall"]
    assert f"| forget: recall | {entry['base']:.3g} |" in card
    assert "a little fine-tuning may bring the answers back" in card
    assert "same small generated world" in card
    assert "the embedded text world (forget)" in card
    assert "## Licence and limits" in card
    assert "image" not in card
    assert str(tiny.run_dir.parent) not in card


def test_a_card_of_conversations_renders_the_template(run: TrainResult) -> None:
    from diffalign._model_card_text import text_snippet
    from diffalign.config_loading import load_config

    config = load_config(run.run_dir / "config.yaml")
    for chat in (False, True):
        code = text_snippet(config, 'say "hi"\n', chat=chat)
        compile(code, "snippet", "exec")
        assert ("apply_chat_template" in code) == chat
    card = (run.run_dir / "README.md").read_text(encoding="utf-8")
    assert "apply_chat_template" not in card
    assert "held-out pairs" in card


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_shows_answers_curves_and_what_was_forgotten(tiny: TrainResult, run: TrainResult) -> None:
    page = (tiny.run_dir / "report.html").read_text(encoding="utf-8")
    assert "Memory before and after" in page
    assert "forget: recall" in page
    assert "Forget loss" in page
    assert "By timestep" not in page
    assert '<span class="ws">↵</span>' in page  # the world's prompts end with a line break
    page = (run.run_dir / "report.html").read_text(encoding="utf-8")
    assert "Log-probabilities" in page
    assert "Memory before" not in page
    assert page.count('<div class="score">') >= 8
    assert "Samples per second" in page


def test_text_cells_escape_and_show_whitespace() -> None:
    from diffalign._report_text import said

    assert said("<b>&") == '<div class="said">&lt;b&gt;&amp;</div>'
    assert said(" a  b\t\n") == (
        '<div class="said"><span class="ws">·</span>a<span class="ws">··</span>b<span class="ws">→</span>\t'
        '<span class="ws">↵</span>\n</div>'
    )
    assert said("") == '<span class="ws">(empty)</span>'
    assert "5,000 characters" in said("x" * 5000)
    assert said(None) == "–"


def test_a_cut_report_of_a_text_run_is_still_one(tmp_path: Path, run: TrainResult) -> None:
    from diffalign.report import write_report

    (tmp_path / "config.yaml").write_text((run.run_dir / "config.yaml").read_text())
    assert "No answers were written." in write_report(tmp_path).read_text()
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "texts.json").write_text('{"prompts": ["<i>"], "answers": {"0": ["x"], "5": []}}')
    (tmp_path / "samples" / "comparison.json").write_text("[{")
    (tmp_path / "samples" / "rollouts.json").write_text(
        '[{"round": 3, "prompt": "q", "answer": "z", "rewards": [0.5]}]'
    )
    page = write_report(tmp_path).read_text()
    assert "&lt;i&gt;" in page
    assert "<i>" not in page.partition("</style>")[2].replace("<i style", "")
    assert "round 3" in page
