"""`diffalign annotate`: labels by rewards and judges, what cannot be read, stopping and going on, training on the result."""

from __future__ import annotations

import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import vlm_process
import yaml
from PIL import Image

from diffalign import annotate, rewards
from diffalign._annotate_report import counts
from diffalign.cli import main
from diffalign.commands import check_data
from diffalign.trainer import train
from diffalign.world.scenes import compose, draw, parse_caption, sample_captions

CAPTIONS = sample_captions(6, seed=0)
Run = Callable[..., str]


pytestmark = pytest.mark.usefixtures("own_logging")


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def go(source: Path, *argv: Any, out: str = "out", code: int = 0) -> str:
        capsys.readouterr()
        words = ["annotate", source, "--out", out, "--device", "cpu", *argv]
        assert main([str(word) for word in words]) == code
        printed, err = capsys.readouterr()
        return printed if code == 0 else err

    return go


def save(path: Path, image: torch.Tensor) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray((image * 255).round().byte().movedim(0, -1).numpy()).save(path)
    return path


def grey(path: Path, level: float) -> Path:
    return save(path, torch.full((3, 8, 8), level))


def png(level: float) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (round(level * 255),) * 3).save(out, "png")
    return out.getvalue()


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Three scenes of each of six captions, one picture a row."""
    rng, rows = random.Random(0), []
    for k in range(3):
        for i, image in enumerate(draw([compose(parse_caption(caption), rng) for caption in CAPTIONS])):
            save(tmp_path / "pictures" / f"{i}_{k}.png", image)
            rows.append({"image": f"pictures/{i}_{k}.png", "prompt": CAPTIONS[i]})
    return write(tmp_path / "rows.jsonl", rows)


LEVEL = """
import torch
from diffalign.rewards import Reward
class Level(Reward):
    "Mean brightness; no opinion on black."
    range, unit, differentiable, weights, licence, gap = (0.0, 1.0), "level", False, None, "none", "none"
    def __init__(self, device="cpu", dtype=torch.float32): pass
    def __call__(self, images, prompts, metadata=None):
        with open("calls.txt", "a") as file:
            file.write("x" * len(prompts))
        level = images.mean((1, 2, 3))
        return torch.where(level == 0, torch.nan, level)
"""


@pytest.fixture
def level(tmp_path: Path) -> str:
    (tmp_path / "level.py").write_text(LEVEL)
    return "level.py"


# ---------------------------------------------------------------- small functions


def test_which_pictures_are_compared() -> None:
    scores = {0: (0.5,), 2: (0.9,), 3: (0.1,), 5: (0.5,)}
    assert annotate.choose(scores, "best_worst") == [(2, 3)]
    assert len(annotate.choose(scores, "all")) == 6
    assert annotate.choose(scores, "ring") == [(0, 2), (2, 3), (3, 5), (0, 5)]
    assert annotate.choose({1: (0.0,), 4: (0.0,)}, "best_worst") == [(1, 4)]
    assert annotate.choose({1: (0.0,), 4: (1.0,)}, "ring") == [(1, 4)]
    assert annotate.choose({1: (0.0,)}, "all") == []


def test_labels_and_bins() -> None:
    assert [annotate.label_of(d, 0.1) for d in (0.2, 0.1, 0.0, -0.1, -0.2)] == [1, 0.5, 0.5, 0.5, 0]
    assert [annotate.label_of(d, 0) for d in (1e-9, 0.0, -1e-9)] == [1, 0.5, 0]
    assert counts([-1.0, -0.9, 0.0, 1.0], bins=4) == ([2, 0, 1, 1], 1.0)
    assert counts([], bins=2) == ([0, 0], 1.0)


# ---------------------------------------------------------------- rewards


def test_best_against_worst_of_each_prompt(run: Run, world: Path, tmp_path: Path) -> None:
    said = run(world, "--reward", "world_taste:outlined", "--reward", "jpeg_compressibility")
    reward = rewards.load("world_taste:outlined")
    by_prompt: dict[str, list[float]] = {}
    for row in lines(world):
        with Image.open(tmp_path / row["image"]) as image:
            pixels = (
                torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(32, 32, 3).movedim(-1, 0) / 255
            )
        by_prompt.setdefault(row["prompt"], []).append(float(rewards.score(reward, pixels[None], [row["prompt"]])))
    rows = lines(tmp_path / "out" / "pairs.jsonl")
    assert [row["prompt"] for row in rows] == list(by_prompt)
    for row in rows:
        first, second = (side[0] for side in row["rewards"])
        scores = by_prompt[row["prompt"]]
        assert sorted((first, second)) == pytest.approx([min(scores), max(scores)], abs=1e-5)
        assert row["label_0"] == (0.5 if first == second else int(first > second))
        assert len(row["rewards"][0]) == 2
    assert f"{len(rows)} pairs: first better" in said
    tree = json.loads((tmp_path / "out" / "report.json").read_text())
    assert tree["annotation"]["asked"] == 36
    assert tree["annotation"]["between"]["jpeg_compressibility"]["of"] > 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<svg" in page
    assert "Difference of world_taste:outlined" in page


def test_pairs_of_rows_and_what_they_said_before(run: Run, tmp_path: Path, level: str) -> None:
    for name, value in (("a", 0.2), ("b", 0.8), ("c", 0.85), ("black", 0.0)):
        grey(tmp_path / "img" / f"{name}.png", value)
    (tmp_path / "img" / "torn.png").write_bytes(png(0.5)[:40])
    rows = [
        {"prompt": "p", "image_0": "img/a.png", "image_1": "img/b.png", "label_0": 0},
        {"prompt": "q", "image_0": "img/c.png", "image_1": "img/a.png", "label_0": 0},
        {"prompt": "r", "chosen": "img/b.png", "rejected": "img/c.png"},
        {"prompt": "s", "image_0": "img/b.png", "image_1": "img/none.png"},
        {"prompt": "t", "image_0": "img/b.png", "image_1": "img/torn.png"},
        {"prompt": "", "image_0": "img/b.png", "image_1": "img/a.png"},
        {"prompt": "u", "image_0": "img/b.png", "image_1": "img/black.png"},
        {"prompt": "v", "image_0": "../a.png", "image_1": "img/a.png"},
        {"prompt": "w", "image_0": "img/b.png", "image_1": "img/a.png", "label_0": "often"},
    ]
    said = run(write(tmp_path / "pairs.jsonl", rows), "--reward", level, "--margin", "0.1")
    got = lines(tmp_path / "out" / "pairs.jsonl")
    assert [(row["prompt"], row["label_0"]) for row in got] == [("p", 0), ("q", 1), ("r", 0.5)]
    assert got[0]["rewards"][0] == [pytest.approx(0.2, abs=2e-3)]
    assert "agreement with the labels of the source: 0.500 of 2" in said
    tree = json.loads((tmp_path / "out" / "report.json").read_text())["data"]
    reasons = {reason: entry["count"] for reason, entry in tree["skipped"].items()}
    expected = {"missing_image": 1, "undecodable": 1, "empty_prompt": 1, "path_escapes": 1, "bad_label": 1}
    assert reasons == expected
    assert [entry["row"] for entry in tree["skipped"]["undecodable"]["listed"]] == [5]
    assert tree["notes"]["no_score"]["count"] == 1
    dropped = run(tmp_path / "pairs.jsonl", "--reward", level, "--margin", "0.1", "--ties", "drop")
    assert "2 pairs: first better 1, second better 1, ties 0" in dropped
    assert "1 noted as tie_dropped" in dropped


def test_bytes_folders_and_groups(run: Run, tmp_path: Path, level: str) -> None:
    rows = [{"jpg_0": png(0.2), "jpg_1": {"bytes": png(0.8), "path": "x.png"}, "caption": "p", "label_0": 0.0}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    assert "second better 1" in run(tmp_path / "train.parquet", "--reward", level, out="of_bytes")
    (row,) = lines(tmp_path / "of_bytes" / "pairs.jsonl")
    assert (tmp_path / "of_bytes" / row["image_1"]).read_bytes() == png(0.8)

    folder = tmp_path / "two"
    for name, value in (("chosen/1", 0.7), ("chosen/2", 0.7), ("rejected/1", 0.3)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        grey(folder / f"{name}.png", value)
    (folder / "chosen" / "1.txt").write_text("a grey square\n")
    said = run(folder, "--reward", level, out="of_folders")
    assert "1 pairs: first better 1" in said
    assert "1 missing_image" in said
    assert "agreement with the labels of the source: 1.000 of 1" in said

    flat = tmp_path / "flat"
    for i, value in enumerate((0.1, 0.5, 0.9, 0.5)):
        grey(flat / f"{i}.png", value)
    said = run(flat, "--prompt", "p", "--reward", level, "--pairs", "all", out="of_flat")
    assert [row["label_0"] for row in lines(tmp_path / "of_flat" / "pairs.jsonl")] == [0, 0, 0]
    assert "1 duplicate" in said


def test_nothing_is_scored_twice(run: Run, tmp_path: Path, level: str) -> None:
    rows = [{"image": str(grey(tmp_path / "img" / f"{i}.png", i / 10 + 0.1)), "prompt": "p"} for i in range(5)]
    source = write(tmp_path / "rows.jsonl", rows)
    run(source, "--reward", level)
    journal = tmp_path / "out" / "answers.jsonl"
    assert len((tmp_path / "calls.txt").read_text()) == 5
    cut = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(cut[:3]) + cut[3][: len(cut[3]) // 2])  # the writer died in a line
    said = run(source, "--reward", level, "--pairs", "all", "--margin", "0.15")
    assert len((tmp_path / "calls.txt").read_text()) == 7
    assert "2 answers asked for, 3 known before" in said
    assert "10 pairs" in said
    assert len({row["key"] for row in lines(journal)}) == len(lines(journal)) == 5


def test_answers_belong_to_picture_and_prompt(run: Run, tmp_path: Path) -> None:
    likes = LEVEL.replace(
        "level = images.mean((1, 2, 3))", "level = (images.mean((1, 2, 3)) - 0.5) * len(prompts[0]) - 3"
    )
    (tmp_path / "likes.py").write_text(likes.replace("(0.0, 1.0)", "(-9.0, 9.0)"))
    for name, value in (("a", 0.2), ("b", 0.8)):
        grey(tmp_path / "img" / f"{name}.png", value)
    rows = [{"prompt": p, "image_0": "img/a.png", "image_1": "img/b.png"} for p in ("p", "pppppppppp")]
    run(write(tmp_path / "pairs.jsonl", rows), "--reward", "likes.py", "--batch-size", "1")
    short, long = (row["rewards"] for row in lines(tmp_path / "out" / "pairs.jsonl"))
    assert long[1][0] - long[0][0] == pytest.approx(10 * (short[1][0] - short[0][0]), rel=1e-3)


def test_nothing_to_compare(run: Run, tmp_path: Path, level: str) -> None:
    source = write(tmp_path / "rows.jsonl", [{"image": str(grey(tmp_path / "a.png", 0.5)), "prompt": "p"}])
    assert "nothing in" in run(source, "--reward", level, code=2)
    rows = [{"prompt": "p", "image_0": str(tmp_path / "a.png"), "image_1": str(tmp_path / "a.png")}]
    said = run(write(tmp_path / "same.jsonl", rows), "--reward", level, "--ties", "drop", code=2)
    assert "no pair of" in said


def test_wrong_settings_are_refused_before_anything_loads(run: Run, tmp_path: Path, level: str) -> None:
    source = write(tmp_path / "rows.jsonl", [])
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("server: http://127.0.0.1:9/v1")
    two.write_text("{server: 'http://127.0.0.1:9/v1', mode: pair}")
    for argv, message in (
        ((), "give --reward NAME"),
        (("--reward", level, "--judge", two), "give --reward NAME"),
        (("--reward", level, "--reward", level), "named twice"),
        (("--reward", "pickscor"), "did you mean 'pickscore'"),
        (("--reward", "diversity"), "and annotate scores them as they come"),
        (("--judge", one), "asks about one picture"),
        (("--judge", two, "--pairs", "best_worst"), "needs scores of pictures"),
        (("--judge", two, "--margin", "0.5"), "from 0 below 0.5"),
        (("--reward", level, "--pairs", "some"), "best_worst, all, ring expected"),
        (("--reward", level, "--margin", "-1"), "--margin is -1"),
        (("--reward", level, "--batch-size", "0"), "at least 1"),
    ):
        assert message in run(source, *argv, code=2)
    assert "does not exist" in run(tmp_path / "nothing", "--reward", level, code=2)


# ---------------------------------------------------------------- a judge


def judged(tmp_path: Path, url: str, **keys: Any) -> Path:
    file = tmp_path / "judge.yaml"
    file.write_text(yaml.safe_dump({"server": url, "mode": "pair", "workers": 2} | keys))
    return file


def test_a_judge_is_asked_in_both_orders(run: Run, tmp_path: Path) -> None:
    for i, value in enumerate((0.2, 0.8, 0.8)):
        save(tmp_path / "img" / f"{i}.png", torch.full((3, 8, 8 + i), value))  # of different sizes
    pairs = [(0, 1), (1, 0), (1, 2)]
    rows = [{"prompt": f"p{i}", "image_0": f"img/{a}.png", "image_1": f"img/{b}.png"} for i, (a, b) in enumerate(pairs)]
    source = write(tmp_path / "pairs.jsonl", rows)
    with vlm_process.serving() as url:
        file = judged(tmp_path, url)
        said = run(source, "--judge", file)
        assert vlm_process.stats(url)["answered"] == 6
        got = lines(tmp_path / "out" / "pairs.jsonl")
        assert [row["label_0"] for row in got] == [0, 1, 0.5]
        assert [row["consistent"] for row in got] == [True, True, False]
        p = 1 / (1 + math.exp(8 * 0.6))
        log_odds = math.log(p / (1 - p))
        assert got[0]["rewards"] == [[pytest.approx(log_odds, abs=0.05)], [0.0]]
        assert got[0]["orders"] == [pytest.approx(p, abs=1e-3)] * 2
        assert "both orders name the same winner: 0.667 of 3" in said
        assert "1 noted as inconsistent_tie" in said
        said = run(source, "--judge", file, "--inconsistent", "drop")
        assert vlm_process.stats(url)["answered"] == 6  # asked nothing
        assert "2 pairs" in said
        assert "1 noted as inconsistent_dropped" in said
        file = judged(tmp_path, url, mode="verdict")
        assert "2 pairs: first better 1" in run(source, "--judge", file, "--ties", "drop")
        assert vlm_process.stats(url)["answered"] == 12  # another question


def test_a_local_judge_is_asked_in_batches(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Local:
        model = "brightness"
        batches: ClassVar[list[int]] = []

        def first_tokens(self, requests: Any, words: Any) -> list[dict[str, float]]:
            self.batches.append(len(requests))
            if any(request.about == "odd" for request in requests):
                return [{"hm": -0.1} for _ in requests]
            first = [float(r.pictures[0].mean() - r.pictures[1].mean()) for r in requests]
            return [{"A": math.log(0.5 + d / 2), "b": math.log(0.5 - d / 2)} for d in first]

    monkeypatch.setattr("diffalign.vlm.connect", lambda *_: Local())
    for name, value in (("a", 0.2), ("b", 0.8), ("c", 0.3)):
        grey(tmp_path / "img" / f"{name}.png", value)
    (tmp_path / "img" / "torn.png").write_bytes(b"no picture")
    pairs = [("p", "a", "b"), ("q", "a", "c"), ("r", "b", "torn"), ("odd", "b", "a")]
    rows = [{"prompt": p, "image_0": f"img/{a}.png", "image_1": f"img/{b}.png"} for p, a, b in pairs]
    (tmp_path / "judge.yaml").write_text("{local: somewhere, mode: pair, batch: 2}")
    source = write(tmp_path / "pairs.jsonl", rows)
    said = run(source, "--judge", "judge.yaml", "--margin", "0.1")
    assert Local.batches == [2, 2, 2]  # none about what cannot be read
    got = lines(tmp_path / "out" / "pairs.jsonl")
    assert [row["label_0"] for row in got] == [0, 0.5]  # 0.05 from 1/2 is within the margin
    assert got[0]["orders"] == [pytest.approx(0.2, abs=2e-3)] * 2
    assert "1 undecodable" in said
    assert "1 noted as no_answer" in said
    run(source, "--judge", "judge.yaml", "--margin", "0.1")
    assert Local.batches == [2, 2, 2]  # an answer that could not be read is not asked for again


def test_a_judge_that_dies_leaves_what_it_said(run: Run, tmp_path: Path) -> None:
    rows = [{"image": str(grey(tmp_path / "img" / f"{i}.png", i / 10)), "prompt": "p"} for i in range(5)]
    source = write(tmp_path / "rows.jsonl", rows)
    with vlm_process.serving(*["ok"] * 7, "crash") as url:
        err = run(source, "--judge", judged(tmp_path, f"{url}?wait=0", workers=1), code=2)
    assert "does not answer" in err
    journal = tmp_path / "out" / "answers.jsonl"
    assert len(lines(journal)) == 7
    with vlm_process.serving() as url:
        said = run(source, "--judge", judged(tmp_path, url, workers=1))
        assert vlm_process.stats(url)["answered"] == 20 - 7
    assert "13 answers asked for, 7 known before" in said
    assert "10 pairs: first better 0, second better 10, ties 0" in said


@pytest.mark.slow
def test_killed_and_started_again(tmp_path: Path) -> None:
    """A process that is killed without warning; only questions that were under way are asked again."""
    rows = [{"image": str(grey(tmp_path / "img" / f"{i}.png", i / 10)), "prompt": "p"} for i in range(6)]
    source, journal = write(tmp_path / "rows.jsonl", rows), tmp_path / "out" / "answers.jsonl"
    with vlm_process.serving(*["slow"] * 30) as url:
        command = [sys.executable, "-m", "diffalign", "annotate", str(source), "--judge", str(judged(tmp_path, url))]
        command += ["--out", str(tmp_path / "out"), "--device", "cpu"]
        root = str(Path(annotate.__file__).resolve().parent.parent)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while not (journal.exists() and journal.read_text().count("\n") >= 4) and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        known = len(lines(journal))
        assert 4 <= known < 30
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert f"{30 - known} answers asked for, {known} known before" in done.stdout
        assert vlm_process.stats(url)["answered"] <= 30 + 2  # two workers
    assert len({row["key"] for row in lines(journal)}) == len(lines(journal)) == 30


# ---------------------------------------------------------------- training


def test_the_result_is_checked_and_trained_on(run: Run, world: Path, tmp_path: Path, tiny_config: Any) -> None:
    run(world, "--reward", "world_taste:outlined")
    rows = lines(tmp_path / "out" / "pairs.jsonl")
    ties = sum(row["label_0"] == 0.5 for row in rows)
    assert len(rows) > ties
    moved = tmp_path / "moved"
    (tmp_path / "out").rename(moved)  # the folder stands for itself
    data = {"format": "jsonl", "sources": [str(moved / "pairs.jsonl")], "label": "soft"}
    training = {"max_train_steps": 1, "train_batch_size": 2}
    config = tiny_config(tmp_path / "run", data=data, training=training)
    report, _ = check_data(config)
    assert (report.rows, report.skipped) == (len(rows), {"tie": ties} if ties else {})
    result = train(config)
    assert result.step == 1
