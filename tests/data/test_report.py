"""The data report: exact counts, capped lists, and a file that reads back."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffalign.data import report as module
from diffalign.data.record import Record
from diffalign.data.report import DataReport
from diffalign.errors import DataError


def filled() -> DataReport:
    report = DataReport(source={"id": "x"})
    report.read(10)
    report.skip("id1", "bad_label", "label_0 is 3", shard="s.parquet", row=4)
    report.skip("id2", "tie")
    report.note("soft_tie", record="id3")
    report.bad_shard("t.parquet", "cut")
    return report


def test_kept_is_what_was_read_and_not_skipped_even_later() -> None:
    report = filled()
    assert (report.kept, report.unusable) == (8, 1)  # a tie is a rule, not a bad row
    record = Record(id="late", prompt="p", images=(), p=1.0, meta={"shard": "s.parquet", "row": 9})
    report.skip(record, "undecodable", "truncated")
    assert (report.kept, report.unusable) == (7, 2)
    assert report.listed["undecodable"] == [{"id": "late", "shard": "s.parquet", "row": 9, "detail": "truncated"}]


def test_lists_are_capped_and_counts_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LISTED", 3)
    report = DataReport()
    for number in range(7):
        report.read()
        report.skip(f"r{number}", "bad_label")
    assert report.skipped["bad_label"] == 7
    assert len(report.listed["bad_label"]) == 3
    report.merge(report.from_dict(report.to_dict()))
    assert (report.rows, report.skipped["bad_label"], len(report.listed["bad_label"])) == (14, 14, 3)


def test_it_reads_back_what_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "data_report.json"
    filled().write(path)
    assert DataReport.load(path) == filled()
    assert [p.name for p in path.parent.iterdir()] == ["data_report.json"]  # no partial file is left


def test_the_summary_names_every_reason() -> None:
    line = filled().summary()
    assert "\n" not in line
    assert line.startswith("10 rows read, 8 kept, ")
    assert all(part in line for part in ("1 bad_label", "1 tie", "1 noted as soft_tie", "1 shards not read to the end"))


def test_places_that_cannot_be_written_or_read_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot write the data report"):
        filled().write(tmp_path / "file" / "data_report.json")
    with pytest.raises(DataError, match="not a data report"):
        DataReport.load(tmp_path / "file")
