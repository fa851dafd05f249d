"""Clips: which frames are taken, how they are decoded, and what is done to all of them."""

from __future__ import annotations

import builtins
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign import plugins
from diffalign.config import DataConfig
from diffalign.data.encode import PreparedPair, Preparer, Unusable
from diffalign.data.images import UndecodableImage, transform
from diffalign.data.readers import Place
from diffalign.data.record import ImageItem, Record, frames_of
from diffalign.data.report import DataReport
from diffalign.data.video import TooShort, decode_clip, frame_numbers, is_video
from diffalign.errors import MissingExtraError


def frame(number: int, height: int = 32, width: int = 48) -> Image.Image:
    """Green says which frame it is, red and blue where a pixel is."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 4, np.full_like(x, 20 * number), y * 4], axis=-1).astype(np.uint8))


def clip(count: int, kind: str = "WEBP", start: int = 0, **options: Any) -> bytes:
    """An animation; lossless in the kinds that can be."""
    images = [frame(start + i) for i in range(count)]
    out = io.BytesIO()
    more = {"lossless": True} if kind == "WEBP" else {}
    images[0].save(out, kind, save_all=True, append_images=images[1:], duration=100, **more, **options)
    return out.getvalue()


def still(number: int = 0) -> bytes:
    out = io.BytesIO()
    frame(number).save(out, "PNG")
    return out.getvalue()


def shades(images: Sequence[Image.Image]) -> list[int]:
    """Which frames these are."""
    return [round(np.asarray(image)[..., 1].mean() / 20) for image in images]


# --- which frames ----------------------------------------------------------------------------------------------------


def test_frames_are_spread_from_the_first_to_the_last() -> None:
    assert frame_numbers(5, 5) == [0, 1, 2, 3, 4]
    assert frame_numbers(9, 5) == [0, 2, 4, 6, 8]
    assert frame_numbers(12, 5) == [0, 3, 6, 8, 11]
    assert frame_numbers(81, 1) == [0]
    for count in range(5, 60):
        numbers = frame_numbers(count, 5)
        assert numbers[0] == 0
        assert numbers[-1] == count - 1
        steps = np.diff(numbers)
        assert steps.min() >= 1
        assert steps.max() - steps.min() <= 1


def test_a_stride_keeps_the_speed() -> None:
    assert frame_numbers(12, 5, 2) == [0, 2, 4, 6, 8]
    assert frame_numbers(9, 5, 2) == [0, 2, 4, 6, 8]
    assert frame_numbers(500, 5, 1) == [0, 1, 2, 3, 4]


def test_clips_that_are_too_short() -> None:
    with pytest.raises(TooShort, match=r"^4 frames; at least 5 needed$"):
        frame_numbers(4, 5)
    with pytest.raises(TooShort, match=r"^8 frames; at least 9 needed \(5 at a stride of 2\)$"):
        frame_numbers(8, 5, 2)
    for parts in ([still()], [clip(4)], [still(i) for i in range(4)]):
        with pytest.raises(TooShort):
            decode_clip(parts, 5)


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_are_decoded_frame_by_frame(kind: str) -> None:
    data = clip(9, kind)
    images = decode_clip([data], 5)
    assert shades(images) == [0, 2, 4, 6, 8]
    assert {image.mode for image in images} == {"RGB"}
    assert shades(decode_clip([data], 5, stride=1)) == [0, 1, 2, 3, 4]
    assert shades(decode_clip([data], 1)) == [0]
    if kind != "GIF":  # 256 colours at most
        assert all(np.array_equal(image, frame(2 * i)) for i, image in enumerate(images))


def test_transparent_frames_are_laid_on_white() -> None:
    layers = [Image.new("RGBA", (8, 8), (0, 10 * i, 0, 0 if i < 2 else 255)) for i in range(5)]
    out = io.BytesIO()
    layers[0].save(out, "WEBP", save_all=True, append_images=layers[1:], lossless=True, exact=True)
    images = decode_clip([out.getvalue()], 5)
    assert [image.getpixel((3, 3)) for image in images[:2]] == [(255, 255, 255)] * 2
    assert images[4].getpixel((3, 3)) == (0, 40, 0)


def test_a_folder_holds_one_frame_in_each_file(tmp_path: Path) -> None:
    for i in range(11):
        (tmp_path / f"frame_{i}.png").write_bytes(still(i))
    (tmp_path / "notes.txt").write_text("no frame")
    item = ImageItem(path=tmp_path)
    assert [path.name for path in frames_of(tmp_path)] == [f"frame_{i}.png" for i in range(11)]  # 2 before 10
    assert shades(decode_clip(item.parts(), 11)) == list(range(11))
    assert shades(decode_clip(item.parts(), 5, stride=2)) == [0, 2, 4, 6, 8]
    assert item.read() == b"".join(still(i) for i in range(11))
    with pytest.raises(UndecodableImage, match="a folder without images"):
        decode_clip([], 5)


def test_what_cannot_be_decoded() -> None:
    data = clip(9, "GIF")
    with pytest.raises(UndecodableImage):
        decode_clip([data[: len(data) // 2]], 9)
    with pytest.raises(UndecodableImage, match="not an image format"):
        decode_clip([b"nothing of the kind"], 5)
    odd = io.BytesIO()
    frame(1, height=16).save(odd, "PNG")
    with pytest.raises(UndecodableImage, match=r"its frames have different sizes \(16x48, 32x48\)"):
        decode_clip([still(), odd.getvalue(), still()], 3)


# --- video files -----------------------------------------------------------------------------------------------------


def test_video_files_are_told_by_how_they_begin() -> None:
    assert is_video(b"\x00\x00\x00\x20ftypisom" + bytes(8))
    assert is_video(b"\x1a\x45\xdf\xa3" + bytes(8))
    assert is_video(b"RIFF\x00\x00\x00\x00AVI LIST")
    assert not is_video(b"\x00\x00\x00\x20ftypavif" + bytes(8))
    assert not any(is_video(data) for data in (still(), clip(2), clip(2, "GIF"), b""))


def test_without_pyav_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"pip install 'diffalign\[video\]'"):
        decode_clip([b"\x00\x00\x00\x20ftypisom" + bytes(8)], 5)


@pytest.mark.parametrize(("container", "codec"), [("mp4", "mpeg4"), ("webm", "libvpx")])
def test_video_files_are_decoded_by_pyav(container: str, codec: str) -> None:
    av = pytest.importorskip("av")
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 48, 32, "yuv420p", 1_000_000
        for i in range(12):
            flat = np.full((32, 48, 3), 20 * i, dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(flat, format="rgb24")))
        file.mux(stream.encode())
    data = out.getvalue()
    assert is_video(data)
    assert shades(decode_clip([data], 5)) == [0, 3, 6, 8, 11]
    assert shades(decode_clip([data], 5, stride=2)) == [0, 2, 4, 6, 8]
    assert shades(decode_clip([data], 1)) == [0]
    with pytest.raises(TooShort, match="12 frames; at least 13 needed"):
        decode_clip([data], 13)
    with pytest.raises(TooShort, match=r"12 frames; at least 13 needed \(5 at a stride of 3\)"):
        decode_clip([data], 5, stride=3)
    with pytest.raises(UndecodableImage):
        decode_clip([data[:60]], 5)


def test_videos_are_turned_upright() -> None:
    av = pytest.importorskip("av", minversion="18.1")  # which can write such files
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.set_display_rotation(90)
        stored = np.zeros((32, 48, 3), dtype=np.uint8)
        stored[:, :16] = 255  # the left third: at the bottom once it is turned counter-clockwise
        for _ in range(5):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
        file.mux(stream.encode())
    shown = np.asarray(decode_clip([out.getvalue()], 5)[0])
    assert shown.shape == (48, 32, 3)
    assert shown[-8:].mean() > 250
    assert shown[:8].mean() < 5


# --- the same for all frames -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("crop", "flip"), [("center", False), ("random", True)])
def test_all_frames_are_cut_alike(crop: Any, flip: bool) -> None:
    def cut(images: Any) -> Any:
        return transform(
            images,
            (16, 16),
            crop=crop,
            flip=flip,
            generator=torch.Generator().manual_seed(3) if crop == "random" else None,
        )

    frames = [frame(i) for i in range(5)]
    whole, parts = cut(frames), [cut(image) for image in frames]
    assert whole.pixels.shape == (3, 5, 16, 16)
    assert torch.equal(whole.pixels, torch.stack([part.pixels for part in parts], dim=1))
    assert (whole.original_size, whole.crop_top_left) == (parts[0].original_size, parts[0].crop_top_left)
    one = cut(frames[:1])
    assert torch.equal(one.pixels, parts[0].pixels)  # a clip of one frame is an image


def record(*data: bytes) -> Record:
    return Record(id="r", prompt="p", images=tuple(ImageItem(data=d) for d in data), p=1.0)


def test_pairs_of_clips_are_prepared() -> None:
    preparer = Preparer(DataConfig(num_frames=5, resolution=32), seed=0, step=16)
    made = preparer(record(clip(5), clip(9, start=3)))
    assert isinstance(made, PreparedPair)
    a, b = made.images
    assert a.pixels.shape == b.pixels.shape == (3, 5, 32, 32)
    assert a.pixels.dtype == torch.uint8
    assert [round(float(v) / 20) for v in b.pixels[1].float().mean((1, 2))] == [3, 5, 7, 9, 11]
    short = preparer(record(clip(5), clip(4)))
    assert isinstance(short, Unusable)
    assert (short.reason, short.detail) == ("too_short", "4 frames; at least 5 needed")
    # Which frames are taken is part of what an encoded clip is.
    keys = {
        Preparer(DataConfig(num_frames=n, frame_stride=s, resolution=32), 0, 16)(record(clip(9), clip(9, start=1)))
        .images[0]
        .key  # type: ignore[union-attr]
        for n, s in ((1, None), (5, None), (5, 1), (9, None))
    }
    assert len(keys) == 4


def test_an_image_is_what_it_was_before_there_were_clips() -> None:
    made = Preparer(DataConfig(resolution=32), seed=0, step=16)(record(still(1), clip(5)))
    assert isinstance(made, PreparedPair)
    assert [image.pixels.shape for image in made.images] == [(3, 32, 32)] * 2


# --- readers ---------------------------------------------------------------------------------------------------------


def read(name: str, path: Path) -> tuple[list[Record], DataReport]:
    reader, report = plugins.find("readers", name)(), DataReport()
    reader.check(path)
    root = path if path.is_dir() else path.parent
    return list(reader.read(path, Place(source="s", split="train", shard=path.name, root=root, report=report))), report


def write_frames(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(still(i))


def test_jsonl_names_clips_and_folders_of_frames(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(clip(5, "GIF"))
    (tmp_path / "b.webp").write_bytes(clip(5))
    write_frames(tmp_path / "c", 5)
    (tmp_path / "empty").mkdir()
    rows = [
        {"prompt": "p", "chosen": "a.gif", "rejected": "c"},
        {"prompt": "p", "video_0": "b.webp", "video_1": "a.gif", "label_0": 0},
        {"prompt": "p", "chosen": "a.gif", "rejected": "empty"},
        {"prompt": "p", "video_0": "b.webp", "video_1": "gone.mp4", "label_0": 1},
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records, report = read("jsonl", file)
    assert [r.p for r in records] == [1.0, 0.0]
    assert shades(decode_clip(records[0].images[1].parts(), 5)) == [0, 1, 2, 3, 4]
    assert [entry["detail"] for entry in report.listed["missing_image"]] == [
        "rejected is 'empty': a folder without images; its frames expected",
        "video_1 is 'gone.mp4': no such file",
    ]
    reader = plugins.find("readers", "jsonl")()
    assert reader.companions(["a.mp4", "c/0.png", "train.jsonl", "x.txt"], "train") == ["a.mp4", "c/0.png"]


def test_a_folder_has_clips_and_folders_of_frames(tmp_path: Path) -> None:
    for side, start in (("chosen", 0), ("rejected", 5)):
        write_frames(tmp_path / side / "one.frames", 5)
        (tmp_path / side / "sub").mkdir()
        (tmp_path / side / "sub" / "two.gif").write_bytes(clip(5, "GIF", start=start))
        (tmp_path / side / "three.mp4").write_bytes(b"\x00\x00\x00\x20ftypisom")
    for name in ("one", "sub/two", "three"):
        (tmp_path / "chosen" / f"{name}.txt").write_text(f"prompt {name}")
    files = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()]
    reader = plugins.find("readers", "folder")()
    assert reader.shards(files, "train") == ["chosen/"]
    assert set(reader.companions(files, "train")) == set(files)
    records, report = read("folder", tmp_path / "chosen")
    assert (report.rows, report.kept) == (3, 3)
    assert [r.prompt for r in records] == ["prompt one", "prompt sub/two", "prompt three"]
    assert shades(decode_clip(records[0].images[0].parts(), 5)) == [0, 1, 2, 3, 4]
    assert shades(decode_clip(records[1].images[1].parts(), 5)) == [5, 6, 7, 8, 9]
