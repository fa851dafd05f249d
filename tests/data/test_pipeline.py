"""The rules between a reader and training, each on a small parquet file of Pick-a-Pic's schema."""

from __future__ import annotations

import dataclasses
import io
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.config import DataConfig
from diffalign.data import pipeline
from diffalign.data.pipeline import check, is_held_out, iterate, split_held_out
from diffalign.data.record import Record
from diffalign.data.report import DataReport
from diffalign.data.source import resolve
from diffalign.errors import ConfigError, DataError


def jpeg(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (shade % 256, shade // 256, 0)).save(out, "PNG")
    return out.getvalue()


def row(number: int, label_0: float | None, **more: Any) -> dict[str, Any]:
    label_1 = None if label_0 is None else 1 - label_0
    return {
        "caption": f"prompt {number}",
        "jpg_0": jpeg(2 * number),
        "jpg_1": jpeg(2 * number + 1),
        "label_0": label_0,
        "label_1": label_1,
        "has_label": True,
        "num_example_per_prompt": 4,
        "image_0_uid": f"a{number}",
        "image_1_uid": f"b{number}",
    } | more


def swapped(values: dict[str, Any]) -> dict[str, Any]:
    """The same comparison, shown the other way round."""
    pairs = (("jpg_0", "jpg_1"), ("label_0", "label_1"), ("image_0_uid", "image_1_uid"))
    return values | {a: values[b] for a, b in pairs} | {b: values[a] for a, b in pairs}


def run(folder: Path, rows: list[dict[str, Any]], **options: Any) -> tuple[list[Record], DataReport]:
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    config = DataConfig(sources=(str(folder),), **options)
    report = DataReport()
    return list(iterate(config, resolve(config), report)), report


def test_ties_are_dropped_or_soft_and_never_a_win(tmp_path: Path) -> None:
    rows = [row(0, 1.0), row(1, 0.5), row(2, 0.0)]
    kept, report = run(tmp_path, rows)
    assert [(r.prompt, r.p) for r in kept] == [("prompt 0", 1.0), ("prompt 2", 0.0)]
    assert dict(report.skipped) == {"tie": 1}
    kept, report = run(tmp_path, rows, ties="soft")
    assert [r.p for r in kept] == [1.0, 0.5, 0.0]
    assert (dict(report.skipped), dict(report.notes)) == ({}, {"soft_tie": 1})


def test_rows_without_a_label_do_not_come_out(tmp_path: Path) -> None:
    kept, report = run(tmp_path, [row(0, 1.0), row(1, 1.0, has_label=False), row(2, None)])
    assert [r.prompt for r in kept] == ["prompt 0"]
    assert dict(report.skipped) == {"unlabelled": 1, "missing_label": 1}
    assert report.unusable == 1  # a row that says it has no label is as it should be


@pytest.mark.parametrize("uids", [True, False])
def test_duplicates_in_either_order_go(tmp_path: Path, uids: bool) -> None:
    first = row(0, 1.0)
    rows = [first, swapped(first), first | {"caption": "another prompt"}, row(1, 0.0)]
    if not uids:
        rows = [{k: v for k, v in r.items() if not k.endswith("uid")} for r in rows]
    kept, report = run(tmp_path, rows)
    assert [r.prompt for r in kept] == ["prompt 0", "another prompt", "prompt 1"]
    assert dict(report.skipped) == {"duplicate": 1}
    kept, _ = run(tmp_path, rows, drop_duplicates=False)
    assert [r.p for r in kept] == [1.0, 0.0, 1.0, 0.0]


def test_a_pair_of_one_image_with_itself_teaches_nothing(tmp_path: Path) -> None:
    kept, report = run(tmp_path, [row(0, 1.0), row(1, 1.0, image_1_uid="a1")])
    assert (len(kept), dict(report.skipped)) == (1, {"identical_images": 1})


def test_evaluation_prompts_are_excluded(tmp_path: Path) -> None:
    listed = tmp_path / "evaluation.txt"
    listed.write_text("PROMPT 1 \nsomething else\n")
    rows = [row(0, 1.0), row(1, 1.0), row(2, 1.0, caption=" Bond"), row(3, 0.0, caption="bonds")]
    kept, report = run(tmp_path, rows, exclude_prompts=(str(listed), "partiprompts"))
    assert [r.prompt for r in kept] == ["prompt 0", "bonds"]
    assert [e["detail"] for e in report.listed["excluded_prompt"]] == [f"in {listed}", "in partiprompts"]


def test_the_users_filter(tmp_path: Path) -> None:
    hook = tmp_path / "hook.py"
    hook.write_text("def keep(record):\n    return record.prompt != 'prompt 1'\n")
    kept, report = run(tmp_path, [row(i, 1.0) for i in range(3)], filter=f"{hook}:keep")
    assert [r.prompt for r in kept] == ["prompt 0", "prompt 2"]
    assert dict(report.skipped) == {"filtered": 1}


@pytest.mark.parametrize(
    ("code", "name", "error", "message"),
    [
        ("def keep(record):\n    raise KeyError('x')", "keep", DataError, r"failed on record \w+ \(row 0 of train"),
        ("def keep(record):\n    pass", "keep", DataError, "returned None"),
        ("def other(record):\n    return True", "keep", ConfigError, "no function 'keep'; it has other"),
        ("import nothing_of_that_name", "keep", ConfigError, "does not run: ModuleNotFoundError"),
        ("x = 1", "x y", ConfigError, "file.py:function expected"),
    ],
)
def test_mistakes_in_the_filter(tmp_path: Path, code: str, name: str, error: type[Exception], message: str) -> None:
    (tmp_path / "hook.py").write_text(code)
    with pytest.raises(error, match=message):
        run(tmp_path, [row(0, 1.0)], filter=f"{tmp_path / 'hook.py'}:{name}")


def test_max_pairs_counts_usable_pairs(tmp_path: Path) -> None:
    rows = [row(0, 0.5), row(1, 1.0), row(2, 1.0), row(3, 0.0), row(4, 0.0)]
    kept, report = run(tmp_path, rows, max_pairs=2)
    assert [r.prompt for r in kept] == ["prompt 1", "prompt 2"]
    assert report.kept == 2
    # A pair that turns out undecodable later is replaced by the next one.
    config = DataConfig(sources=(str(tmp_path),), max_pairs=2)
    report, good = DataReport(), []
    for record in iterate(config, resolve(config), report):
        if record.prompt == "prompt 1":
            report.skip(record, "undecodable", "cut")
        else:
            good.append(record.prompt)
    assert good == ["prompt 2", "prompt 3"]


def test_weight_by_prompt(tmp_path: Path) -> None:
    rows = [row(0, 1.0), row(1, 1.0, num_example_per_prompt=None)]
    assert [r.weight for r in run(tmp_path, rows)[0]] == [1.0, 1.0]
    kept, report = run(tmp_path, rows, weight_by_prompt=True)
    assert [r.weight for r in kept] == [0.25, 1.0]
    assert report.notes["no_prompt_count"] == 1


def test_nothing_left_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no pairs left\. 2 rows read, 0 kept, 2 tie\. .*data\.split"):
        run(tmp_path, [row(0, 0.5), row(1, 0.5)])


def test_mostly_unusable_is_refused_and_a_few_bad_rows_are_not(tmp_path: Path) -> None:
    rows = [row(i, 1.0) for i in range(4)] + [row(9, 1.0, jpg_0=None)]
    assert len(run(tmp_path, rows)[0]) == 4
    with pytest.raises(DataError, match=r"1 of 5 rows are unusable, more than data.max_unusable=0.1.*jpg_0 has no byt"):
        run(tmp_path, rows, max_unusable=0.1)


def test_a_wrong_format_stops_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "EARLY_ROWS", 10)
    rows = [row(i, 1.0, jpg_0=None) for i in range(9)] + [row(i, 1.0) for i in range(10, 40)]
    with pytest.raises(DataError, match="9 of 10 rows are unusable"):
        run(tmp_path, rows)


def test_a_bad_shard_does_not_stop_the_run(tmp_path: Path) -> None:
    run(tmp_path, [row(0, 1.0)])
    good = (tmp_path / "train-00000-of-00001.parquet").read_bytes()
    (tmp_path / "train-00000-of-00001.parquet").unlink()
    (tmp_path / "train-00000-of-00003.parquet").write_bytes(b"cut")
    (tmp_path / "train-00001-of-00003.parquet").write_bytes(good)
    pq.write_table(pa.table({"other": [1]}), tmp_path / "train-00002-of-00003.parquet")
    config = DataConfig(sources=(str(tmp_path),))
    check(config, resolve(config))
    report = DataReport()
    assert [r.prompt for r in iterate(config, resolve(config), report)] == ["prompt 0"]
    assert [bad["shard"][:11] for bad in report.bad_shards] == ["train-00000", "train-00002"]


def test_labels_that_all_say_the_same_are_suspicious(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipeline, "LABELS_SEEN", 5)
    with caplog.at_level(logging.WARNING):
        _, report = run(tmp_path, [row(i, 0.0) for i in range(8)])
    assert "second image wins in all of the first 5" in caplog.text
    assert report.notes["one_sided_labels"] == 1
    _, report = run(tmp_path, [row(i, float(i == 3)) for i in range(8)])
    assert not report.notes


def test_schema_and_lists_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "train.parquet")
    config = DataConfig(sources=(str(tmp_path),))
    with pytest.raises(DataError, match="columns jpg_0, jpg_1"):
        check(config, resolve(config))
    with pytest.raises(DataError, match="no such file and no shipped list"):
        check(dataclasses.replace(config, exclude_prompts=("nowhere",)), resolve(config))
    (tmp_path / "train.parquet").write_bytes(b"cut")
    with pytest.raises(DataError, match="none of its 1 shards can be read"):
        check(config, resolve(config))


def test_ids_do_not_depend_on_where_the_data_lies(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    rows = [row(0, 1.0), row(1, 0.0)]
    assert [r.id for r in run(tmp_path / "here", rows)[0]] == [r.id for r in run(tmp_path / "there", rows)[0]]


def test_held_out_is_decided_by_the_prompt_alone() -> None:
    prompts = [f"prompt {i}" for i in range(500)]
    out = [is_held_out(prompt, 0.2) for prompt in prompts]
    assert 60 < sum(out) < 140
    kept, held = split_held_out(prompts, 0.2)
    assert held == [i for i, o in enumerate(out) if o]
    assert sorted(kept + held) == list(range(len(prompts)))
    assert not any(is_held_out(prompt, 0.0) for prompt in prompts)
    assert all(is_held_out(prompt, 1.0) for prompt in prompts)
    # A larger share keeps what a smaller one kept out, and case does not move a prompt across.
    assert all(is_held_out(prompt, 0.3) for prompt, o in zip(prompts, out, strict=True) if o)
    assert [is_held_out(f" {prompt.upper()}", 0.2) for prompt in prompts] == out
