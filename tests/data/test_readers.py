"""Readers: every layout is written here, small, and read back."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign import plugins
from diffalign.data.readers import Place, UnreadableShard, split_files
from diffalign.data.record import Record
from diffalign.data.report import DataReport
from diffalign.errors import DataError


def jpeg(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(out, "JPEG")
    return out.getvalue()


def read(name: str, path: Path, split: str = "train") -> tuple[list[Record], DataReport]:
    reader, report = plugins.find("readers", name)(), DataReport()
    reader.check(path)
    place = Place(source="local", split=split, shard=path.name, root=path.parent, report=report)
    return list(reader.read(path, place)), report


def pickapic_row(number: int, label_0: Any, label_1: Any, **more: Any) -> dict[str, Any]:
    return {
        "caption": f"prompt {number}",
        "jpg_0": jpeg(10 + number),
        "jpg_1": jpeg(100 + number),
        "label_0": label_0,
        "label_1": label_1,
        "has_label": True,
        "user_id": 7,
        "num_example_per_prompt": 4,
        "ranking_id": 90 + number,
        "image_0_uid": f"a{number}",
        "image_1_uid": f"b{number}",
        "model_0": "sdxl",
        "model_1": "dreamlike",
    } | more


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=2)
    return path


# --- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (["data/train-00001-of-00002-ab.parquet", "data/train-00000-of-00002-cd.parquet"], "train", 2),
        (["data/validation_unique-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"], "validation", 1),
        (["default/train/0000.parquet", "default/test/0000.parquet"], "test", 1),
        (["train.parquet", "test.parquet"], "train", 1),
        (["mine.parquet", "other.parquet"], "train", 2),
        (["mine.parquet", "other.parquet"], "test", 0),  # no split names: all of it is training data, none is test data
        (["test-00000.parquet", "mine.parquet"], "train", 0),
        (["trainer_notes.parquet"], "train", 1),
        (["train/test-00000.parquet", "train/x.parquet"], "train", 1),
    ],
)
def test_a_split_takes_its_own_files_only(files: list[str], split: str, expected: int) -> None:
    assert len(split_files(files, split, (".parquet",))) == expected


def test_shards_come_in_order() -> None:
    files = [f"data/train-{i:05d}-of-00012.parquet" for i in (10, 2, 0)]
    assert split_files(files, "train", (".parquet",)) == sorted(files)


# --- Pick-a-Pic parquet ----------------------------------------------------------------------------------------------


def test_pickapic_labels_images_and_ids(tmp_path: Path) -> None:
    rows = [
        pickapic_row(0, 1.0, 0.0),
        pickapic_row(1, 0.0, 1.0),
        pickapic_row(2, 0.5, 0.5),
        pickapic_row(3, None, None, has_label=False),
    ]
    records, report = read("pickapic", write_parquet(tmp_path / "train.parquet", rows))
    assert [r.p for r in records] == [1.0, 0.0, 0.5, None]
    # The images stay in the order of the row, whoever won.
    assert [r.images[0].data for r in records] == [row["jpg_0"] for row in rows]
    assert [r.images[1].data for r in records] == [row["jpg_1"] for row in rows]
    first = records[0]
    assert (first.prompt, first.user, first.images[0].uid, first.images[1].model) == (
        "prompt 0",
        "7",
        "a0",
        "dreamlike",
    )
    assert first.meta == {"shard": "train.parquet", "row": 0, "ranking_id": 90, "num_example_per_prompt": 4}
    assert len({r.id for r in records}) == 4
    assert [r.id for r in read("pickapic", tmp_path / "train.parquet")[0]] == [r.id for r in records]
    assert (report.rows, report.kept) == (4, 4)


def test_pickapic_image_structs_are_the_same_as_plain_bytes(tmp_path: Path) -> None:
    row = pickapic_row(0, 0.0, 1.0)
    struct = row | {f"jpg_{i}": {"bytes": row[f"jpg_{i}"], "path": None} for i in (0, 1)}
    plain = read("pickapic", write_parquet(tmp_path / "a.parquet", [row]))[0][0]
    nested = read("pickapic", write_parquet(tmp_path / "b.parquet", [struct]))[0][0]
    assert [i.data for i in nested.images] == [i.data for i in plain.images] == [row["jpg_0"], row["jpg_1"]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label_0": 1.0, "label_1": 1.0}, "bad_label"),
        ({"label_0": 0.7, "label_1": 0.3}, "bad_label"),
        ({"label_0": float("nan")}, "bad_label"),
        ({"label_0": None}, "missing_label"),
        ({"jpg_1": None}, "missing_image"),
        ({"jpg_0": b""}, "missing_image"),
        ({"caption": None}, "bad_prompt"),
        ({"caption": "  "}, "empty_prompt"),
    ],
)
def test_a_bad_row_is_counted_and_the_others_stay(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    rows = [pickapic_row(0, 1.0, 0.0), pickapic_row(1, 1.0, 0.0) | change, pickapic_row(2, 0.0, 1.0)]
    records, report = read("pickapic", write_parquet(tmp_path / "train.parquet", rows))
    assert [r.prompt for r in records] == ["prompt 0", "prompt 2"]
    assert dict(report.skipped) == {reason: 1}
    assert report.listed[reason][0]["row"] == 1


def test_a_caption_that_is_not_utf8_costs_its_row_only(tmp_path: Path) -> None:
    rows = [pickapic_row(i, 1.0, 0.0) for i in range(3)]
    table = pa.Table.from_pylist(rows)
    captions = pa.array([b"fine", b"\xff\xfe", b"fine too"], pa.binary()).view(pa.utf8())
    table = table.set_column(table.schema.get_field_index("caption"), "caption", captions)
    pq.write_table(table, tmp_path / "train.parquet")
    records, report = read("pickapic", tmp_path / "train.parquet")
    assert [r.prompt for r in records] == ["fine", "fine too"]
    assert dict(report.skipped) == {"bad_prompt": 1}


def test_missing_columns_are_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train.parquet", [{"caption": "a", "label_0": 1.0, "url": "x"}])
    with pytest.raises(DataError, match=r"columns jpg_0, jpg_1, label_1 are missing; found caption, label_0, url"):
        read("pickapic", path)


def test_an_image_column_of_text_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train.parquet", [pickapic_row(0, 1.0, 0.0, jpg_0="file.jpg")])
    with pytest.raises(DataError, match="column jpg_0 is string; expected image bytes"):
        read("pickapic", path)


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UnreadableShard, match="not a readable parquet"):
        read("pickapic", tmp_path / "train.parquet")


def test_image_preferences_puts_the_chosen_first(tmp_path: Path) -> None:
    row = {"prompt": "p", "rejected": {"bytes": jpeg(1), "path": "r"}, "chosen": {"bytes": jpeg(200), "path": "c"}}
    (record,), _ = read("image_preferences", write_parquet(tmp_path / "train.parquet", [row | {"category": "art"}]))
    assert record.p == 1.0
    assert [i.data for i in record.images] == [jpeg(200), jpeg(1)]
    assert record.meta["category"] == "art"


# --- webdataset ------------------------------------------------------------------------------------------------------


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, label_0: str, label_1: str, *, long_names: bool = True) -> list[tuple[str, bytes]]:
    names = ["original_prompt.txt", "jpg_0.jpg", "jpg_1.jpg", "label_0.txt", "label_1.txt"]
    if not long_names:
        names = ["caption", "jpg_0", "jpg_1", "label_0", "label_1"]
    values = [f"prompt {key}".encode(), jpeg(10), jpeg(200), label_0.encode(), label_1.encode()]
    return [(f"{key}.{name}", value) for name, value in zip(names, values, strict=True)]


@pytest.mark.parametrize("long_names", [True, False])
def test_webdataset_labels_are_text_and_still_count(tmp_path: Path, long_names: bool) -> None:
    labels = [("1.0", "0.0"), ("0.0", "1.0"), ("0.5", "0.5")]
    members = [m for i, ab in enumerate(labels) for m in sample(f"{i:03d}", *ab, long_names=long_names)]
    records, _ = read("pickapic_wds", write_tar(tmp_path / "00000.tar", members))
    assert [r.p for r in records] == [1.0, 0.0, 0.5]
    assert all((r.images[0].data, r.images[1].data) == (jpeg(10), jpeg(200)) for r in records)
    assert [r.prompt for r in records] == ["prompt 000", "prompt 001", "prompt 002"]


def test_webdataset_keys_restart_in_every_tar_but_ids_do_not(tmp_path: Path) -> None:
    ids = [
        read("pickapic_wds", write_tar(tmp_path / name, sample("000", "1.0", "0.0")))[0][0].id
        for name in ("00000.tar", "00001.tar")
    ]
    assert ids[0] != ids[1]


def test_a_cut_tar_gives_what_comes_before_the_cut(tmp_path: Path) -> None:
    members = [m for i in range(4) for m in sample(f"{i:03d}", "1.0", "0.0")]
    path = write_tar(tmp_path / "00000.tar", members)
    per_sample = sum(512 + -(-len(data) // 512) * 512 for _, data in members[:5])
    path.write_bytes(path.read_bytes()[: 2 * per_sample + 700])
    report = DataReport()
    place = Place(source="s", split="train", shard=path.name, root=tmp_path, report=report)
    rows = plugins.find("readers", "pickapic_wds")().read(path, place)
    assert [next(rows).prompt for _ in range(2)] == ["prompt 000", "prompt 001"]
    with pytest.raises(UnreadableShard, match="broken after 2 samples"):
        next(rows)
    assert dict(report.skipped) == {"missing_image": 1}  # the sample at the cut


def test_a_tar_of_something_else_is_refused_by_its_members(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "00000.tar", [("000.jpg", b"x"), ("000.json", b"{}")])
    with pytest.raises(DataError, match=r"lacks jpg_0, jpg_1, label_0, label_1, original_prompt; found jpg, json"):
        read("pickapic_wds", path)


# --- HPDv2 -----------------------------------------------------------------------------------------------------------

HPD_TRAIN = [
    {"prompt": "a", "file_path": ["x.jpg", "y.jpg"], "human_preference": [0, 1]},
    {"prompt": "b", "file_path": ["x.jpg", "gone.jpg"], "human_preference": [1, 0]},
    {"prompt": "c", "file_path": ["y.jpg", "x.jpg"], "human_preference": [1, 0]},
]


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz"])
def test_hpdv2_images_in_any_container(tmp_path: Path, kind: str) -> None:
    (tmp_path / "train.json").write_text(json.dumps(HPD_TRAIN))
    if kind == "folder":
        (tmp_path / "train").mkdir()
        for name, data in (("x.jpg", jpeg(1)), ("y.jpg", jpeg(200))):
            (tmp_path / "train" / name).write_bytes(data)
    else:
        write_tar(tmp_path / "train.tar", [("train/x.jpg", jpeg(1)), ("train/y.jpg", jpeg(200))])
    if kind == "tar.gz":
        (tmp_path / "train.tar.gz").write_bytes(gzip.compress((tmp_path / "train.tar").read_bytes()))
        (tmp_path / "train.tar").unlink()
    records, report = read("hpdv2", tmp_path / "train.json")
    assert [(r.prompt, r.p) for r in records] == [("a", 0.0), ("c", 1.0)]
    assert [i.read() for i in records[0].images] == [jpeg(1), jpeg(200)]
    assert [i.read() for i in records[1].images] == [jpeg(200), jpeg(1)]
    assert dict(report.skipped) == {"missing_image": 1}


def test_hpdv2_ranks_become_pairs_with_rank_0_best(tmp_path: Path) -> None:
    names = ["x.jpg", "y.jpg", "z.jpg"]
    entry = {"prompt": "a", "image_path": names, "rank": [1, 0, 1]}
    (tmp_path / "test.json").write_text(json.dumps([entry]))
    (tmp_path / "test").mkdir()
    for shade, name in enumerate(names):
        (tmp_path / "test" / name).write_bytes(jpeg(shade))
    records, _ = read("hpdv2", tmp_path / "test.json", "test")
    assert [(r.meta["row"], r.p) for r in records] == [("0.0-1", 0.0), ("0.0-2", 0.5), ("0.1-2", 1.0)]
    assert {r.meta["num_example_per_prompt"] for r in records} == {3}


def test_hpdv2_of_another_shape_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps([{"prompt": "a", "path1": "x"}]))
    with pytest.raises(DataError, match="found keys prompt, path1"):
        read("hpdv2", tmp_path / "train.json")


# --- JSONL -----------------------------------------------------------------------------------------------------------


def write_jsonl(folder: Path, lines: list[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, shade in (("good.jpg", 200), ("bad.jpg", 1)):
        (folder / name).write_bytes(jpeg(shade))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_jsonl_reads_both_kinds_of_line(tmp_path: Path) -> None:
    lines = [
        {"prompt": " p ", "chosen": "good.jpg", "rejected": "bad.jpg", "weight": 2, "user": 5},
        {"prompt": "q", "image_0": "bad.jpg", "image_1": "good.jpg", "label_0": 0},
        {"caption": "r", "image_0": "bad.jpg", "image_1": "good.jpg", "label_0": 0.5, "label_1": 0.5},
    ]
    records, _ = read("jsonl", write_jsonl(tmp_path / "d", lines))
    assert [(r.prompt, r.p, r.weight, r.user) for r in records] == [
        (" p ", 1.0, 2.0, "5"),
        ("q", 0.0, 1.0, None),
        ("r", 0.5, 1.0, None),
    ]
    assert records[0].images[0].read() == jpeg(200)
    assert records[1].images[0].read() == jpeg(1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rejected": "../secret.jpg"}, "path_escapes"),
        ({"rejected": "sub/../../secret.jpg"}, "path_escapes"),
        ({"rejected": "/etc/hostname"}, "path_escapes"),
        ({"rejected": "none.jpg"}, "missing_image"),
        ({"rejected": 3}, "missing_image"),
        ({"weight": -1}, "bad_weight"),
        ({"weight": "much"}, "bad_weight"),
        ({"prompt": 3}, "bad_prompt"),
    ],
)
def test_jsonl_rows_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    (tmp_path / "secret.jpg").write_bytes(jpeg(5))
    good = {"prompt": "p", "chosen": "good.jpg", "rejected": "bad.jpg"}
    records, report = read("jsonl", write_jsonl(tmp_path / "d", [good, good | change]))
    assert len(records) == 1
    assert dict(report.skipped) == {reason: 1}


def test_jsonl_tolerates_a_broken_line_but_not_other_keys(tmp_path: Path) -> None:
    good = {"prompt": "p", "chosen": "good.jpg", "rejected": "bad.jpg"}
    records, report = read("jsonl", write_jsonl(tmp_path / "d", ["{broken", good]))
    assert (len(records), dict(report.skipped)) == (1, {"bad_json": 1})
    with pytest.raises(DataError, match="found keys text, img; expected prompt, chosen, rejected"):
        read("jsonl", write_jsonl(tmp_path / "e", [{"text": "p", "img": "good.jpg"}]))


# --- folders ---------------------------------------------------------------------------------------------------------


def test_folder_pairs_by_name_and_counts_the_lonely(tmp_path: Path) -> None:
    for side, shade in (("chosen", 200), ("rejected", 1)):
        (tmp_path / side).mkdir()
        (tmp_path / side / f"a.{'jpg' if side == 'chosen' else 'png'}").write_bytes(jpeg(shade))
        (tmp_path / side / "b.jpg").write_bytes(jpeg(shade))
    (tmp_path / "chosen" / "a.txt").write_text("prompt a\n")
    (tmp_path / "captions.jsonl").write_text('{"file_name": "chosen/b.jpg", "text": "prompt b"}\n')
    (tmp_path / "chosen" / "lonely.jpg").write_bytes(jpeg(3))
    (tmp_path / "rejected" / "other.jpg").write_bytes(jpeg(3))
    records, report = read("folder", tmp_path / "chosen")
    assert [(r.prompt, r.p) for r in records] == [("prompt a", 1.0), ("prompt b", 1.0)]
    assert [i.read() for i in records[0].images] == [jpeg(200), jpeg(1)]
    assert dict(report.skipped) == {"missing_image": 2}


def test_folder_without_a_prompt_skips_the_pair(tmp_path: Path) -> None:
    for side in ("chosen", "rejected"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "a.jpg").write_bytes(jpeg(1))
    records, report = read("folder", tmp_path / "chosen")
    assert (records, dict(report.skipped)) == ([], {"missing_prompt": 1})


def test_every_reader_says_what_it_reads_and_ignores_foreign_files() -> None:
    for name in plugins.names("readers"):
        reader = plugins.find("readers", name)()
        assert reader.layout
        assert reader.shards(["README.md", "notes.txt", "logo.png"], "train") == []
