"""Human Preference Dataset v2 (Wu et al. 2023, arXiv 2306.09341; Apache-2.0): an index in JSON, images beside it.

`train.json`: a list of {prompt, file_path: [a, b], human_preference: [1, 0] or [0, 1]}. `test.json`: a list of {prompt,
image_path: [nine], rank: [nine], 0 is best}; every two images become a pair, and the number of pairs of the prompt is
kept as `num_example_per_prompt`. Images are looked up by file name in tar files named after the split, in `<split>/`,
`images/`, or the index's folder. A compressed tar cannot be read in the index's order and is unpacked to a temporary
file.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import logging
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, ClassVar

from diffalign.data.readers import (
    IMAGE_SUFFIXES,
    BadRow,
    Place,
    Reader,
    UnreadableShard,
    image_bytes,
    image_file,
    probability,
    prompt_text,
)
from diffalign.data.readers.pickapic_wds import TAR_ERRORS
from diffalign.data.record import ImageItem, Record
from diffalign.errors import DataError

log = logging.getLogger(__name__)
TARS = (".tar", ".tar.gz", ".tgz")
EXPECTED = "a list of {prompt, file_path, human_preference} (train) or {prompt, image_path, rank} (test)"


class HPDv2(Reader):
    """`train.json` or `test.json` with images beside it."""

    layout: ClassVar[str] = "train.json or test.json (HPDv2) with images in a folder or tar named after the split"
    beside: ClassVar[bool] = True

    def shards(self, files: Sequence[str], split: str) -> list[str]:
        return sorted(f for f in files if PurePosixPath(f).name == f"{split}.json")

    def companions(self, files: Sequence[str], split: str) -> list[str]:
        tars = [f for f in files if f.endswith(TARS) and PurePosixPath(f).name.startswith(split)]
        return sorted(tars) or [f for f in files if PurePosixPath(f).suffix.lower() in IMAGE_SUFFIXES]

    def check(self, path: Path) -> None:
        entries = _entries(path)
        found = entries[0] if entries and isinstance(entries[0], dict) else {}
        known = {"file_path", "human_preference"} <= found.keys() or {"image_path", "rank"} <= found.keys()
        if not known or "prompt" not in found:
            raise DataError(
                f"{path}: found keys {', '.join(found) or '(none)'}; expected {EXPECTED}: check data.format"
            )

    def read(self, path: Path, place: Place) -> Iterator[Record]:
        with contextlib.ExitStack() as stack:
            images = _Images(path, place, stack)
            yield from place.records(_rows(path), lambda row: _parse(row, images))


def _entries(path: Path) -> list[Any]:
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UnreadableShard(f"not readable as JSON ({error})") from error
    if not isinstance(entries, list):
        raise DataError(f"{path}: found {type(entries).__name__}; expected {EXPECTED}: check data.format")
    return entries


def _rows(path: Path) -> Iterator[tuple[int | str, Any]]:
    """Rows of two images; a ranked list of n becomes its n(n-1)/2 pairs, named `<entry>.<i>-<j>`."""
    for number, entry in enumerate(_entries(path)):
        if not isinstance(entry, dict) or "rank" not in entry:
            yield number, entry
            continue
        ranks, files = entry["rank"], entry.get("image_path")
        if not isinstance(ranks, list) or not isinstance(files, list) or len(ranks) != len(files):
            yield number, None
            continue
        pairs = list(itertools.combinations(range(len(ranks)), 2))
        for i, j in pairs:
            preference = _from_ranks(ranks[i], ranks[j])
            pair = {"prompt": entry.get("prompt"), "file_path": [files[i], files[j]], "human_preference": preference}
            yield f"{number}.{i}-{j}", pair | {"num_example_per_prompt": len(pairs)}


def _from_ranks(first: Any, second: Any) -> list[float] | None:
    if not isinstance(first, (int, float)) or not isinstance(second, (int, float)):
        return None
    if first == second:
        return [0.5, 0.5]
    return [1.0, 0.0] if first < second else [0.0, 1.0]


def _parse(row: Any, images: _Images) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise BadRow(
            "bad_json", f"entry is {type(row).__name__}, or its rank and image_path do not match; see the layout"
        )
    files, preference = row.get("file_path"), row.get("human_preference")
    if not isinstance(files, list) or len(files) != 2:
        raise BadRow("missing_image", f"file_path is {files!r}; two names expected")
    if not isinstance(preference, list) or len(preference) != 2:
        raise BadRow("missing_label", f"human_preference is {preference!r}; two numbers expected")
    names = ("human_preference[0]", "human_preference[1]")
    kept = {k: row[k] for k in ("num_example_per_prompt", "user_hash") if k in row}
    return {
        "prompt": prompt_text(row.get("prompt"), "prompt"),
        "p": probability(preference[0], preference[1], names),
        "images": (images.find(files[0]), images.find(files[1])),
        "meta": kept,
    }


class _Images:
    """Images by file name, from folders or from tar files that are read in any order."""

    def __init__(self, index: Path, place: Place, stack: contextlib.ExitStack) -> None:
        around, split = index.parent, index.stem
        self.report = place.report
        self.folders = [f for f in (around / split, around / "images", around) if f.is_dir()]
        self.members: dict[str, tuple[IO[bytes], int, int]] = {}
        for tar in sorted(p for p in around.iterdir() if p.name.startswith(split) and p.name.endswith(TARS)):
            self._add(tar, stack)

    def _add(self, tar: Path, stack: contextlib.ExitStack) -> None:
        file = stack.enter_context(tar.open("rb") if tar.name.endswith(".tar") else _unpacked(tar))
        try:
            for member in tarfile.open(fileobj=file, mode="r:"):  # noqa: SIM115 - the stack closes the file
                if member.isfile():
                    self.members[PurePosixPath(member.name).name] = (file, member.offset_data, member.size)
        except TAR_ERRORS as error:
            # The images before the break are there; rows that need the others are counted one by one.
            self.report.bad_shard(tar.name, f"broken after {len(self.members)} images ({error})")

    def find(self, name: Any) -> ImageItem:
        member = self.members.get(PurePosixPath(name).name) if isinstance(name, str) else None
        if member is None:
            return self._file(name)
        file, offset, size = member
        file.seek(offset)
        return ImageItem(data=image_bytes(file.read(size), name), uid=name)

    def _file(self, name: Any) -> ImageItem:
        bad = BadRow("missing_image", f"file_path has {name!r}; no folder or tar of images found")
        for folder in self.folders:
            try:
                item = image_file(folder, name, "file_path")
            except BadRow as error:
                bad = error
            else:
                return ImageItem(path=item.path, uid=str(name))
        raise bad


def _unpacked(tar: Path) -> IO[bytes]:
    """A compressed tar, unpacked into a temporary file that vanishes when it is closed.

    Raises:
        DataError: there is no room for it.
    """
    log.info("unpacking %s to a temporary file, because its images are needed in the index's order", tar.name)
    plain = tempfile.TemporaryFile(prefix="diffalign-")  # noqa: SIM115 - the caller closes it
    try:
        with gzip.open(tar) as packed:
            shutil.copyfileobj(packed, plain, 1 << 20)
    except (zlib.error, EOFError, gzip.BadGzipFile) as error:
        # What was unpacked so far is a cut tar: its index names the images before the cut.
        log.warning("%s is broken (%s); images after the break are missing", tar.name, error)
    except OSError as error:
        plain.close()
        raise DataError(
            f"{tar}: cannot unpack it to {tempfile.gettempdir()} ({error.strerror}); unpack it yourself beside its "
            "JSON, or set TMPDIR to a folder with room"
        ) from error
    plain.seek(0)
    return plain
