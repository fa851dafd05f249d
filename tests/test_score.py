"""`diffalign score`: every kind of source, every kind of table, and an account of what could not be read."""

from __future__ import annotations

import csv
import io
import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from server_support import running

from diffalign import reward_math, rewards
from diffalign.cli import main
from diffalign.reward_server import RewardServer
from diffalign.score_cache import CACHE_VARIABLE
from diffalign.world.scenes import compose, draw, parse_caption, sample_captions

CAPTIONS = sample_captions(6, seed=0)
Run = Callable[..., str]


@pytest.fixture(autouse=True)
def _own_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    logger = logging.getLogger("diffalign")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six scenes as 0.png to 5.png, and a text file among them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = random.Random(0)
    for i, image in enumerate(draw([compose(parse_caption(caption), rng) for caption in CAPTIONS])):
        Image.fromarray((image * 255).round().byte().movedim(0, -1).numpy()).save(folder / f"{i}.png")
    (folder / "notes.md").write_text("no picture")
    return folder


@pytest.fixture
def expected(pictures: Path) -> list[float]:
    images = torch.stack([torch.from_numpy(array(pictures / f"{i}.png")) for i in range(6)]).movedim(-1, 1) / 255
    return rewards.score(rewards.load("world_taste:outlined"), images, CAPTIONS).tolist()


def array(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image).copy()


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Score with one reward, and return what was printed."""
    monkeypatch.chdir(tmp_path)

    def go(source: Path, *argv: Any, reward: str = "world_taste:outlined", code: int = 0) -> str:
        words = ["score", source, *(["--reward", reward] if reward else []), "--device", "cpu", *argv]
        capsys.readouterr()
        assert main([str(word) for word in words]) == code
        out, err = capsys.readouterr()
        assert "scoring" not in err  # no bar where there is no terminal
        return out if code == 0 else err

    return go


def table(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    return [json.loads(line) for line in text.splitlines()]


def column(rows: list[dict[str, Any]], name: str = "world_taste:outlined") -> list[float]:
    return [float(row[name]) for row in rows]


@pytest.mark.parametrize("out", ["s.csv", "s.jsonl", "s.parquet"])
def test_a_folder_with_a_file_of_prompts(run: Run, pictures: Path, expected: list[float], out: str) -> None:
    (pictures / "prompts.list").write_text("\n".join(CAPTIONS) + "\n")
    said = run(pictures, "--prompts", pictures / "prompts.list", "--out", out, "--batch-size", 4)
    rows = table(Path(out))
    assert column(rows) == pytest.approx(expected, abs=1e-6)
    assert [(row["image"], row["prompt"]) for row in rows] == [(f"{i}.png", c) for i, c in enumerate(CAPTIONS)]
    assert "6 rows read, 6 kept" in said
    assert f"{sum(expected) / 6:.4f}" in said


def test_a_folder_with_texts_beside_the_pictures(run: Run, pictures: Path, expected: list[float]) -> None:
    for i, caption in enumerate(CAPTIONS[:5]):
        (pictures / f"{i}.txt").write_text(caption + "\n")
    said = run(pictures)
    assert column(table(Path("scores.csv"))) == pytest.approx(expected[:5], abs=1e-6)
    assert "1 missing_prompt" in said
    report = json.loads(Path("scores.csv.report.json").read_text())
    assert "5.txt" in json.dumps(report["skipped"]["missing_prompt"])


def test_a_list_as_generate_writes_it(run: Run, pictures: Path, expected: list[float]) -> None:
    rows = [{"file": f"{i}.png", "prompt": c, "seed": 3} for i, c in enumerate(CAPTIONS)]
    (pictures / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(pictures / "images.jsonl", "--out", "s.jsonl")
    assert column(table(Path("s.jsonl"))) == pytest.approx(expected, abs=1e-6)


def test_what_cannot_be_read_is_counted_and_listed(run: Run, pictures: Path, expected: list[float]) -> None:
    (pictures / "cut.png").write_bytes((pictures / "0.png").read_bytes()[:80])
    lines = [
        json.dumps({"file": "0.png", "prompt": CAPTIONS[0]}),
        "{broken",
        json.dumps({"file": "gone.png", "prompt": "p"}),
        json.dumps({"file": "../x.png", "prompt": "p"}),
        json.dumps({"file": "cut.png", "prompt": "p"}),
        json.dumps({"file": "1.png", "prompt": None}),
        json.dumps({"prompt": "p"}),
        json.dumps({"file": str(pictures / "5.png"), "prompt": CAPTIONS[5]}),
    ]
    (pictures / "images.jsonl").write_text("\n".join(lines) + "\n")
    said = run(pictures / "images.jsonl")
    rows = table(Path("scores.csv"))
    assert [row["row"] for row in rows] == ["1", "8"]
    assert column(rows) == pytest.approx([expected[0], expected[5]], abs=1e-6)
    assert "8 rows read, 2 kept, 2 missing_image" in said
    for reason in ("bad_json", "path_escapes", "undecodable", "bad_prompt"):
        assert f"1 {reason}" in said
    report = json.loads(Path("scores.csv.report.json").read_text())
    assert "gone.png" in json.dumps(report["skipped"]["missing_image"])
    assert 'row": 5' in json.dumps(report["skipped"]["undecodable"])


@pytest.mark.parametrize("nested", [True, False])
def test_parquet_with_bytes(run: Run, pictures: Path, expected: list[float], tmp_path: Path, nested: bool) -> None:
    cells = [(pictures / f"{i}.png").read_bytes() for i in range(6)]
    rows = [
        {"jpg": {"bytes": b, "path": "x"} if nested else b, "caption": c} for b, c in zip(cells, CAPTIONS, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    run(tmp_path / "rows.parquet", "--image-column", "jpg", "--prompt-column", "caption", "--out", "s.parquet")
    assert column(table(Path("s.parquet"))) == pytest.approx(expected, abs=1e-6)


def test_several_rewards_sizes_and_parts(run: Run, pictures: Path) -> None:
    Image.new("RGB", (20, 31), "red").save(pictures / "tall.png")
    mix = "mix:1*jpeg_incompressibility+2*jpeg_compressibility"
    said = run(
        pictures, "--prompt", "", "--reward", mix, "--out", "s.jsonl", "--batch-size", 2, reward="jpeg_compressibility"
    )
    rows = table(Path("s.jsonl"))
    assert len(rows) == 7
    for row in rows:
        size = row[f"{mix} | jpeg_incompressibility"]
        assert (row["jpeg_compressibility"], row[mix]) == pytest.approx((-size, -size), abs=1e-6)
        assert row[f"{mix} | added: jpeg_compressibility"] == pytest.approx(-2 * size, abs=1e-6)
    assert [line.split()[0] for line in said.splitlines()[:3]] == ["reward", "jpeg_compressibility", mix]


@pytest.mark.parametrize("grid", ["g.html", "g.png"])
def test_the_best_and_the_worst(run: Run, pictures: Path, expected: list[float], grid: str, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("\n".join(CAPTIONS))
    run(pictures, "--prompts", tmp_path / "prompts", "--grid", grid, "--show", 2, "--batch-size", 2)
    if grid == "g.png":
        best, worst = expected.index(max(expected)), expected.index(min(expected))
        shown = array(Path(grid))
        assert shown.shape == (2 * 240, 2 * 224, 3)
        assert (shown[16:240:7, :224:7] == array(pictures / f"{best}.png")).all()
        assert (shown[256::7, :224:7] == array(pictures / f"{worst}.png")).all()
        return
    text = Path(grid).read_text()
    assert text.count("<img") == 4
    assert f"<b>{max(expected):.4g}</b>" in text
    assert f"<b>{min(expected):.4g}</b>" in text
    assert text.index(f"<b>{max(expected):.4g}</b>") < text.index(f"<b>{min(expected):.4g}</b>")


def test_texts_are_escaped_on_the_page(run: Run, pictures: Path) -> None:
    run(pictures, "--prompt", "<script>", "--grid", "g.html", reward="jpeg_compressibility")
    assert "&lt;script&gt;" in Path("g.html").read_text()


def test_the_cache_knows_the_second_time(run: Run, pictures: Path, expected: list[float], tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("\n".join(CAPTIONS))
    argv = ["--prompts", tmp_path / "prompts", "--cache", tmp_path / "scores.db"]
    assert "from the cache" not in run(pictures, *argv)
    assert "6 scores from the cache" in run(pictures, *argv)
    assert column(table(Path("scores.csv"))) == pytest.approx(expected, abs=1e-6)


def test_statistics_are_those_that_mix_reads(run: Run, pictures: Path, tmp_path: Path) -> None:
    run(pictures, "--prompt", "", "--statistics", "base.json", reward="jpeg_incompressibility")
    known = reward_math.load_statistics(Path("base.json"), "jpeg_incompressibility")
    sizes = torch.tensor(column(table(Path("scores.csv")), "jpeg_incompressibility"))
    assert known.mean == pytest.approx(float(sizes.mean()), rel=1e-5)
    (tmp_path / "mix.yaml").write_text(
        "parts: [{reward: jpeg_incompressibility, scale: standardise, statistics: base.json}]"
    )
    run(pictures, "--prompt", "", reward="mix:mix.yaml")
    scores = torch.tensor(column(table(Path("scores.csv")), "mix:mix.yaml"))
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_metadata_and_missing_opinions(run: Run, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "plus.py").write_text(
        "import torch\nfrom diffalign.rewards import Reward\n\n\nclass Plus(Reward):\n    range = (0.0, 9.0)\n"
        "    unit = licence = gap = ''\n    differentiable = False\n    weights = None\n\n    def __init__(self, *args):\n"
        "        pass\n\n    def __call__(self, images, prompts, metadata=None):\n"
        "        return torch.tensor([float(m['n'] or 'nan') for m in metadata])\n"
    )
    rows = [
        {"file": "0.png", "prompt": "p", "n": 2},
        {"file": "1.png", "prompt": "p", "n": 0},
        {"file": "2.png", "prompt": "p"},
    ]
    (pictures / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = run(pictures / "images.jsonl", "--metadata", "n", "--grid", "g.html", reward="plus.py")
    assert [row["plus.py"] for row in table(Path("scores.csv"))] == ["2.0", ""]
    assert said.splitlines()[1].split()[:3] == ["plus.py", "1", "1"]
    assert "1 missing_metadata" in said
    assert Path("g.html").read_text().count("<img") == 2


def test_a_reward_on_a_server(run: Run, pictures: Path, expected: list[float], tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("\n".join(CAPTIONS))
    local = RewardServer(rewards.load("world_taste:outlined"), "world_taste:outlined", max_batch=4)
    with running(local) as url:
        run(pictures, "--prompts", tmp_path / "prompts", "--out", "s.jsonl", reward=f"remote:{url}")
        assert column(table(Path("s.jsonl")), f"remote:{url}") == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--reward", "pickscor"], "did you mean 'pickscore'"),
        (["--reward", "text_world"], "judges texts"),
        (["--reward", "mix:1*diversity"], "compares pictures with one another, and score scores them as they come"),
        (["--reward", "pickscore", "--reward", "pickscore"], "named twice"),
        ([], "no reward; give --reward NAME"),
        (["--reward", "pickscore", "--out", "s.txt"], "a name that ends in .csv, .jsonl, .parquet expected"),
        (["--reward", "pickscore", "--out", "no/s.csv"], "the folder of --out 'no/s.csv' does not exist"),
        (["--reward", "pickscore", "--grid", "s.gif"], "a name that ends in .html, .png expected"),
        (["--reward", "pickscore", "--batch-size", "0"], "--batch-size is 0"),
        (["--reward", "pickscore", "--prompt", "a", "--prompts", "b"], "exclude each other"),
        (["--reward", "world_verifier"], "no prompts for the pictures of"),
        (["--reward", "world_verifier", "--prompts", "two"], "two has 2 lines for 6 pictures"),
        (["--reward", "world_verifier", "--prompts", "gone"], "--prompts gone cannot be read"),
    ],
)
def test_mistakes_are_one_line(run: Run, pictures: Path, tmp_path: Path, argv: list[str], message: str) -> None:
    (tmp_path / "two").write_text("a\nb\n")
    said = run(pictures, *argv, reward="", code=2)
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "scores.csv").exists()


def test_sources_that_hold_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "rows.parquet").write_bytes(b"no parquet")
    (tmp_path / "one.png").write_bytes(b"")
    for name, message in (
        ("empty", "holds no pictures"),
        ("gone", "does not exist"),
        ("one.png", "neither a folder nor a file of rows"),
        (
            "rows.jsonl",
            "no picture of rows.jsonl can be read. 1 rows read, 0 kept, 1 missing_image; missing_image, for example",
        ),
        ("rows.parquet", "not a readable parquet file"),
    ):
        assert message in run(Path(name), "--prompt", "", code=2)
