"""The report holds what the run folder holds, nothing else, and survives half of it."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffalign._charts import Series, interval_plot, line_chart, smooth
from diffalign._run_data import describe_environment, read_run
from diffalign.errors import UserError
from diffalign.report import render_index, write_report

CONFIG = """
output_dir: out
seed: 3
model: {family: sdxl, pretrained: owner/base}
objective: {name: dpo, beta_dpo: 5000.0}
training: {max_train_steps: 40}
evaluation: {num_prompts: 64}
"""
RESULT = {
    "metric": "pickscore",
    "base_mean": 21.5,
    "aligned_mean": 22.25,
    "win_rate": 0.625,
    "win_rate_ci95": [0.55, 0.7],
    "steps": 40,
    "pairs": 640,
    "seconds_per_step": 0.5,
    "train_seconds": 20.0,
}

DATA_REPORT = {
    "rows": 1000,
    "kept": 923,
    "skipped": {"tie": {"count": 77, "unusable": False, "listed": [{"id": "abc", "row": 5}]}},
    "notes": {},
    "bad_shards": [],
    "source": {"id": "pairs"},
}


class Checker(html.parser.HTMLParser):
    """Collects text and addresses, and checks that tags close in order."""

    VOID = frozenset({"meta", "br", "img", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.images: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            self.images.append(str(values["src"]))
        self.addresses += [str(v) for k, v in attrs if k in ("src", "href") and not str(v).startswith("data:")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += data + "\n"


def parse(path: Path) -> Checker:
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    checker.close()
    assert checker.open == []
    return checker


def row(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 0.69 - 0.002 * step,
        "implicit_acc": 0.5 + 0.005 * step,
        "rewards/margins": 0.01 * step,
        "error/chosen": 0.2,
        "error/chosen_ref": 0.2,
        "error/rejected": 0.22,
        "error/rejected_ref": 0.2,
        "grad_norm": 0.3,
        "learning_rate": 1e-5,
        "t0/implicit_acc": 0.4,
        "t0/error_chosen_delta": 0.001,
        "t0/count": 4,
        "t3/implicit_acc": 0.9,
        "t3/error_chosen_delta": -0.002,
        "t3/count": 12,
    }


def colour_file(path: Path, colour: tuple[int, int, int], size: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "my_run"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    rows = [row(step) for step in range(40)]
    alarm = {"step": 20, "alarm": "winner_error", "level": "alarm", "message": "chosen <worse> than the reference"}
    lines = [json.dumps(line) for line in [*rows[:21], alarm, *rows[21:]]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "result.json").write_text(json.dumps(RESULT))
    (folder / "data_report.json").write_text(json.dumps(DATA_REPORT))
    files = {}
    for step, colour in ((0, (200, 0, 0)), (20, (0, 200, 0)), (40, (0, 0, 200))):
        names = [f"samples/step-{step:06d}/{i:03d}.png" for i in range(2)]
        for name in names:
            colour_file(folder / name, colour)
        files[str(step)] = names
    index = {"prompts": ["a <red> fox", "two cats"], "steps": [0, 20, 40], "files": files}
    (folder / "samples" / "index.json").write_text(json.dumps(index))
    return folder


def test_a_finished_run_shows_its_numbers(run_dir: Path) -> None:
    page = parse(write_report(run_dir))
    for expected in (
        "21.5 → 22.25",
        "62.5%",
        "55.0% to 70.0%",
        "lies above one half",
        "640",
        "winner error",
        "1,000",
        "77",
    ):
        assert expected in page.text
    assert "Step 20" in page.text
    assert "beta_dpo: 5000.0" in page.text


@pytest.mark.parametrize(
    ("interval", "words"),
    [([0.45, 0.7], "contains one half"), ([0.3, 0.45], "lies below one half: worse")],
)
def test_the_verdict_follows_the_interval(run_dir: Path, interval: list[float], words: str) -> None:
    (run_dir / "result.json").write_text(json.dumps(RESULT | {"win_rate_ci95": interval}))
    assert words in parse(write_report(run_dir)).text


def test_gain_replaces_the_win_rate_where_there_is_none(run_dir: Path) -> None:
    result = {k: v for k, v in RESULT.items() if "win" not in k} | {"gain_ci95": [0.5, 1.0]}
    (run_dir / "result.json").write_text(json.dumps(result))
    page = parse(write_report(run_dir))
    assert "+0.75" in page.text
    assert "Win rate" not in page.text


def test_several_rewards_are_all_listed(run_dir: Path) -> None:
    rewards = [
        {"reward": "pickscore", "base_mean": 21.5, "p_value": 0.01},
        {"reward": "aesthetic", "base_mean": 5.5, "win_rate_ci95": [0.41, 0.59]},
    ]
    (run_dir / "result.json").write_text(json.dumps(RESULT | {"rewards": rewards}))
    text = parse(write_report(run_dir)).text
    assert "aesthetic" in text
    assert "0.41 to 0.59" in text


def test_it_is_self_contained_and_escaped(run_dir: Path) -> None:
    page = parse(write_report(run_dir))
    assert page.addresses == []
    assert "a <red> fox" in page.text
    assert "Chosen <worse> than" in page.text


def test_samples_are_ordered_base_to_final(run_dir: Path) -> None:
    page = parse(write_report(run_dir))
    colours = []
    for source in page.images:
        data = base64.b64decode(source.partition("base64,")[2])
        with Image.open(io.BytesIO(data)) as image:
            colours.append(image.convert("RGB").getpixel((0, 0)))
    row_of_three = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    assert colours == row_of_three * 2
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", (run_dir / "report.html").read_text())
    assert captions == ["base", "step 20", "step 40"] * 2


def test_large_images_are_embedded_smaller(run_dir: Path) -> None:
    colour_file(run_dir / "samples/step-000040/000.png", (0, 0, 200), size=1024)
    page = parse(write_report(run_dir))
    (large,) = [source for source in page.images if "jpeg" in source]
    with Image.open(io.BytesIO(base64.b64decode(large.partition("base64,")[2]))) as image:
        assert max(image.size) < 512


def test_plain_before_and_after_files_do_without_an_index(run_dir: Path) -> None:
    (run_dir / "samples" / "index.json").unlink()
    colour_file(run_dir / "samples" / "before.png", (1, 2, 3))
    colour_file(run_dir / "samples" / "after.png", (4, 5, 6))
    assert len(parse(write_report(run_dir)).images) == 2


def test_a_killed_run_still_has_a_report(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    for name in ("result.json", "data_report.json"):
        (run_dir / name).write_text('{"cut')
    (run_dir / "samples" / "step-000040" / "001.png").write_bytes(b"\x89PNG cut")
    page = parse(write_report(run_dir))
    for expected in ("No result.json", "No data_report.json", "1 line(s) of metrics.jsonl", "Loss"):
        assert expected in page.text
    assert len(page.images) == 5


def test_a_run_that_only_just_started(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    page = parse(write_report(tmp_path))
    assert "No metrics yet" in page.text
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row(0)) + "\n")
    assert "Implicit accuracy" in parse(write_report(tmp_path)).text


def test_metrics_that_are_not_numbers_are_left_out(run_dir: Path) -> None:
    odd = [{"step": 41, "loss": math.nan, "grad_norm": math.inf, "implicit_acc": None}, {"loss": 1.0}, [1]]
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in odd)
    text = write_report(run_dir).read_text()
    points = re.findall(r'points="([^"]*)"', text)
    assert points
    assert not any("nan" in value or "inf" in value for value in points)


def test_after_a_resume_the_later_row_of_a_step_counts(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row(10) | {"loss": 0.123}) + "\n")
    rows = read_run(run_dir).rows
    assert [r["step"] for r in rows] == list(range(40))
    assert rows[10]["loss"] == 0.123


def test_timestep_table_is_weighted_by_samples(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row(39) | {"t0/implicit_acc": 1.0, "t0/count": 36}) + "\n")
    # The last quarter: nine rows of 4 samples at 0.4, one of 36 samples at 1.0.
    assert "0.7" in re.findall(r"<td>(.*?)</td>", write_report(run_dir).read_text().split("By timestep")[1])


def test_log_2_is_drawn_only_where_pairs_are_compared(run_dir: Path) -> None:
    assert "log 2" in write_report(run_dir).read_text()
    rows = [{"step": s, "loss": 0.69 + 0.001 * s} for s in range(5)]
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "log 2" not in write_report(run_dir).read_text()


def test_error_chart_is_relative_to_the_reference(run_dir: Path) -> None:
    card = write_report(run_dir).read_text().split("Error vs. reference")[1].split("</div>")[0]
    assert "0 % / 10 %" in card


def test_comparison_overlays_runs_and_links_them(run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text((run_dir / "metrics.jsonl").read_text())
    write_report(run_dir)
    path = render_index([run_dir, other])
    page = parse(path)
    assert path == tmp_path / "comparison.html"
    assert page.addresses == ["my_run/report.html"]
    assert "22.25" in page.text
    loss = path.read_text().split("<h3>Loss</h3>")[1].split("</svg>")[0]
    assert loss.count("<polyline") == 2


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="expected one or more"):
        render_index([])


def test_smoothing_keeps_constants_and_lines() -> None:
    assert smooth(np.full(9, 2.0), 4) == pytest.approx(np.full(9, 2.0))
    assert smooth(np.arange(9.0), 3)[1:-1] == pytest.approx(np.arange(1.0, 8.0))


def test_higher_values_are_drawn_higher() -> None:
    svg = line_chart([Series("", [0, 1], [0.0, 1.0])], label="x")
    first, last = (float(p.split(",")[1]) for p in re.findall(r'class="mean"[^>]*points="([^"]*)"', svg)[0].split())
    assert last < first  # SVG's y points down


def test_interval_plot_puts_the_dot_inside_its_interval() -> None:
    svg = interval_plot(0.6, 0.5, 0.7, limits=(0.0, 1.0), neutral=0.5, label="x")
    low, high = map(float, re.findall(r'class="interval" x1="([\d.]+)" x2="([\d.]+)"', svg)[0])
    (dot,) = map(float, re.findall(r'class="dot" cx="([\d.]+)"', svg))
    assert low < dot < high
    assert dot == pytest.approx((low + high) / 2, abs=0.1)


def test_environment_names_versions() -> None:
    environment = describe_environment()
    assert environment["torch"][0].isdigit()
    assert all(isinstance(value, str) for value in environment.values())
