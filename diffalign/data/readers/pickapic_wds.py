"""Pick-a-Pic as webdataset tar files.

Labels are *text* here ("0.0", "1.0", "0.5"): compared with a number they are never equal, and every pair would keep
the order it was shown in. Two naming schemes exist: `<key>.original_prompt.txt`, `<key>.jpg_0.jpg`,
`<key>.label_0.txt`, and the same without the second extension (`<key>.caption`, `<key>.jpg_0`, `<key>.label_0`). Keys
restart in every tar, so a row is named by tar and key. Users, models and image ids are not in this copy.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from diffalign.data.readers import (
    BadRow,
    Place,
    Reader,
    UnreadableShard,
    image_bytes,
    probability,
    prompt_text,
    split_files,
)
from diffalign.data.readers.pickapic import has_label
from diffalign.data.record import ImageItem, Record
from diffalign.errors import DataError

PROMPTS = ("original_prompt.txt", "original_prompt", "caption.txt", "caption")
TAR_ERRORS = (tarfile.TarError, zlib.error, EOFError, OSError)

Sample = dict[str, bytes]


class PickAPicTar(Reader):
    """Tar shards such as `00000.tar`."""

    layout: ClassVar[str] = (
        "webdataset tar files with original_prompt.txt, jpg_0.jpg, jpg_1.jpg, label_0.txt, label_1.txt"
    )

    def shards(self, files: Sequence[str], split: str) -> list[str]:
        return split_files(files, split, (".tar", ".tar.gz", ".tgz"))

    def check(self, path: Path) -> None:
        key, sample = next(_samples(path), ("", {}))
        if not sample:
            raise UnreadableShard("empty tar file")
        missing = [field for field in ("jpg_0", "jpg_1", "label_0", "label_1") if _member(sample, field) is None]
        missing += [] if any(name in sample for name in PROMPTS) else ["original_prompt"]
        if missing:
            raise DataError(
                f"{path}: sample {key!r} lacks {', '.join(missing)}; found {', '.join(sorted(sample)) or 'nothing'}; "
                "expected original_prompt.txt (or caption), jpg_0, jpg_1, label_0, label_1: check data.format"
            )

    def read(self, path: Path, place: Place) -> Iterator[Record]:
        return place.records(_samples(path), _parse)


def _samples(path: Path) -> Iterator[tuple[str, Sample]]:
    """(key, extension -> bytes); members of a sample are consecutive. A cut tar gives what comes before the cut."""
    key, sample, number = "", Sample(), 0
    try:
        with tarfile.open(path, "r|*") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else every header of the shard stays in memory
                if not member.isfile():
                    continue
                name = PurePosixPath(member.name)
                stem, _, extension = name.name.partition(".")
                if sample and str(name.parent / stem) != key:
                    yield key, sample
                    sample, number = {}, number + 1
                file = tar.extractfile(member)
                assert file is not None, "a regular file has content"
                key, sample[extension] = str(name.parent / stem), file.read()
    except TAR_ERRORS as error:
        # The unfinished sample goes out as well, so that it is counted (as one that lacks a member).
        if sample:
            yield key, sample
        raise UnreadableShard(f"broken after {number} samples ({error})") from error
    if sample:
        yield key, sample


def _member(sample: Sample, field: str) -> bytes | None:
    return next((data for name, data in sample.items() if name == field or name.startswith(field + ".")), None)


def _parse(sample: Sample) -> dict[str, Any]:
    prompt = next((sample[name] for name in PROMPTS if name in sample), None)
    if prompt is None:
        raise BadRow("missing_member", "no prompt among " + ", ".join(sorted(sample)))
    labelled = has_label(_text(sample, "has_label"))
    images = tuple(ImageItem(data=image_bytes(_member(sample, f"jpg_{side}"), f"jpg_{side}")) for side in (0, 1))
    p = probability(_text(sample, "label_0"), _text(sample, "label_1")) if labelled else None
    return {"prompt": prompt_text(_decode(prompt, "prompt"), "prompt"), "images": images, "p": p}


def _text(sample: Sample, field: str) -> str | None:
    data = _member(sample, field)
    return None if data is None else _decode(data, field)


def _decode(data: bytes, field: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise BadRow("bad_prompt" if field == "prompt" else "bad_label", f"{field} is not UTF-8") from None
