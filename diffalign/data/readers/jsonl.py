"""JSONL with image or video files beside it: the simplest way to bring one's own comparisons.

Each line is an object `{"prompt", "chosen", "rejected", "weight"?, "user"?}`, or `{"prompt", "image_0", "image_1",
"label_0", "label_1"?}` with label 1, 0 or 0.5 (a tie); `caption` may stand for `prompt`, and `video_0` and `video_1` for
the images. Paths name images, videos or folders of frames; they are relative to the JSONL's folder and may not leave it.

A line may say more (`diffalign.data.facts`), always of image 0, or the chosen one, first: `"rewards": [[0.3], [0.1]]`,
`"aspect": 0`, `"maps": [map, map]` with lists of rows or paths of `.npy` files, and in place of `prompt` `"prompts": [text,
text]`, one for each image.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from diffalign.data.readers import (
    MEDIA_SUFFIXES,
    BadRow,
    Place,
    Reader,
    UnreadableShard,
    image_file,
    inside,
    optional_text,
    positive,
    probability,
    prompt_text,
    split_files,
)
from diffalign.data.record import Record
from diffalign.errors import DataError

EXPECTED = "prompt, chosen, rejected (weight, user) or prompt, image_0, image_1, label_0 (label_1)"
MAPS = ".npy"


class Jsonl(Reader):
    """`*.jsonl` with paths of images or videos."""

    layout: ClassVar[str] = f"JSONL with {EXPECTED}; image paths relative to the JSONL's folder"
    beside: ClassVar[bool] = True
    labels: ClassVar[bool] = False  # both kinds of line may be there, and writing the winner first is fine
    facts: ClassVar[frozenset[str]] = frozenset({"rewards", "aspect", "maps", "prompts"})

    def shards(self, files: Sequence[str], split: str) -> list[str]:
        return split_files(files, split, (".jsonl",))

    def companions(self, files: Sequence[str], split: str) -> list[str]:
        return [f for f in files if PurePosixPath(f).suffix.lower() in MEDIA_SUFFIXES | {MAPS}]

    def check(self, path: Path) -> None:
        for _, line in islice(_lines(path), 20):  # a few bad lines at the start are only bad lines
            try:
                values = _object(line)
            except BadRow:
                continue
            sides = set(_pair(values)) | (set() if "chosen" in values else {"label_0"})
            if sides <= values.keys() and {"prompt", "caption", "prompts"} & values.keys():
                return
            raise DataError(
                f"{path}: found keys {', '.join(values) or '(none)'}; expected {EXPECTED}: check data.format"
            )
        raise DataError(f"{path}: no JSON object in its first lines; expected one per line with {EXPECTED}")

    def read(self, path: Path, place: Place) -> Iterator[Record]:
        folder = path.parent
        return place.records(_lines(path), lambda line: _parse(line, folder))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line); blank lines do not count as rows."""
    try:
        with path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise UnreadableShard(f"cannot be read ({error.strerror})") from error


def _object(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise BadRow("bad_json", str(error)) from None
    if not isinstance(values, dict):
        raise BadRow("bad_json", f"{type(values).__name__}; an object expected")
    return values


def _parse(line: bytes, folder: Path) -> dict[str, Any]:
    values = _object(line)
    pair = _pair(values)
    if pair[0] == "chosen":
        p = 1.0
    else:
        label_0 = values.get("label_0")
        p = probability(label_0, values["label_1"]) if "label_1" in values else probability(label_0, _other(label_0))
    extra = _extra(values, folder)
    return {
        "prompt": _prompt(values, p),
        "images": tuple(image_file(folder, values.get(side), side) for side in pair),
        "p": p,
        "weight": positive(values["weight"], "weight") if values.get("weight") is not None else 1.0,
        "user": optional_text(values.get("user")),
        "extra": extra,
    }


def _extra(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the line says beyond its label; a null is nothing."""
    extra = {name: values[name] for name in sorted(Jsonl.facts) if values.get(name) is not None}
    if isinstance(extra.get("maps"), list):
        extra["maps"] = [str(_map(folder, entry)) if isinstance(entry, str) else entry for entry in extra["maps"]]
    return extra


def _map(folder: Path, name: str) -> Path:
    path = inside(folder, name, "maps", "bad_map")
    if path.suffix.lower() != MAPS:
        raise BadRow("bad_map", f"maps hold {name!r}; lists of rows or the names of {MAPS} files expected")
    return path


def _prompt(values: dict[str, Any], p: float) -> str:
    """The line's prompt; where each image has its own, the winner's."""
    one, each = values.get("prompt", values.get("caption")), values.get("prompts")
    if each is None:
        return prompt_text(one, "prompt")
    if one is not None:
        raise BadRow("bad_prompt", "prompt and prompts; one of them expected")
    if not isinstance(each, list) or len(each) != 2:
        raise BadRow("bad_prompt", f"prompts is {each!r}; a list of two texts expected")
    return prompt_text(each[0 if p >= 0.5 else 1], "prompts")


def _pair(values: dict[str, Any]) -> tuple[str, str]:
    """The keys under which a line has its two images."""
    pairs = (("chosen", "rejected"), ("video_0", "video_1"))
    return next((pair for pair in pairs if any(key in values for key in pair)), ("image_0", "image_1"))


def _other(label_0: Any) -> float | None:
    """The label of image 1 where only that of image 0 is written; anything odd is left for `probability` to refuse."""
    return 1.0 - label_0 if isinstance(label_0, (int, float)) else None
