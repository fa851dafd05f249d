"""Two folders, `chosen/` and `rejected/`: images or videos of the same name (any extension) are a pair.

A clip may also be a folder `<name>.frames` with one image per frame. The prompt is in `chosen/<name>.txt`, or in a
`captions.jsonl` or `metadata.jsonl` beside or inside the folders, with `file_name` and one of `prompt`, `caption`, `text`.
Sub-folders are allowed, and so is a folder per split around both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from diffalign.data.readers import MEDIA_SUFFIXES, BadRow, Place, Reader, prompt_text
from diffalign.data.record import ImageItem, Record
from diffalign.errors import DataError

CAPTIONS = ("captions.jsonl", "metadata.jsonl")
FRAMES = ".frames"  # how the name of a folder ends that holds one clip's frames


class Folder(Reader):
    """`chosen/` and `rejected/` with same-named images or videos."""

    layout: ClassVar[str] = "folders chosen/ and rejected/ with same-named images, prompts in chosen/<name>.txt"
    beside: ClassVar[bool] = True
    labels: ClassVar[bool] = False

    def shards(self, files: Sequence[str], split: str) -> list[str]:
        folders: dict[str, set[str]] = {}
        for file in files:
            parts = PurePosixPath(file).parts
            for side in ("chosen", "rejected"):
                if side in parts[:-1] and _is_image(file):
                    folders.setdefault("/".join(parts[: parts.index(side)]), set()).add(side)
        both = sorted(folder for folder, sides in folders.items() if len(sides) == 2)
        of_split = [folder for folder in both if PurePosixPath(folder).name == split]
        found = of_split or [folder for folder in both if folder == ""]
        return [f"{folder}/chosen/".lstrip("/") for folder in found]

    def companions(self, files: Sequence[str], split: str) -> list[str]:
        around = [shard.removesuffix("chosen/") for shard in self.shards(files, split)]
        wanted = (*MEDIA_SUFFIXES, ".txt", ".jsonl")
        return [f for f in files if f.lower().endswith(wanted) and any(f.startswith(a) for a in around)]

    def check(self, path: Path) -> None:
        other = path.parent / "rejected"
        for folder in (path, other):
            if not folder.is_dir() or not any(_images(folder)):
                raise DataError(
                    f"{folder}: no images there; expected folders chosen/ and rejected/ with same-named images"
                )

    def read(self, path: Path, place: Place) -> Iterator[Record]:
        sides = {side: _by_stem(path.parent / side) for side in ("chosen", "rejected")}
        names = sorted(sides["chosen"].keys() | sides["rejected"].keys())
        parse = partial(_parse, sides=sides, captions=_captions(path), folder=path)
        return place.records(((name, name) for name in names), parse)


def _is_image(file: str | Path) -> bool:
    return PurePosixPath(file).suffix.lower() in MEDIA_SUFFIXES


def _images(folder: Path) -> Iterator[Path]:
    """Images, videos, and folders of frames in place of what is in them."""
    for path in folder.rglob("*"):
        if any(part.endswith(FRAMES) for part in path.relative_to(folder).parts[:-1]):
            continue
        if (path.is_dir() and path.name.endswith(FRAMES)) or (path.is_file() and _is_image(path)):
            yield path


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for image in sorted(_images(folder)):
        found.setdefault(image.relative_to(folder).with_suffix("").as_posix(), []).append(image)
    return found


def _captions(chosen: Path) -> dict[str, Any]:
    """Prompt by image name without extension, from the caption files; lines that say nothing are left out."""
    found: dict[str, Any] = {}
    for file in (folder / name for folder in (chosen.parent, chosen) for name in CAPTIONS):
        if not file.is_file():
            continue
        for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if isinstance(values, dict) and isinstance(values.get("file_name"), str):
                name = PurePosixPath(values["file_name"]).with_suffix("").as_posix().removeprefix("chosen/")
                found[name] = next((values[k] for k in ("prompt", "caption", "text") if k in values), None)
    return found


def _parse(
    name: str, *, sides: dict[str, dict[str, list[Path]]], captions: dict[str, Any], folder: Path
) -> dict[str, Any]:
    for side, images in sides.items():
        if len(images.get(name, ())) != 1:
            raise BadRow("missing_image", f"{len(images.get(name, ()))} images named {name} in {side}/; one expected")
    return {
        "prompt": _prompt(name, captions, folder),
        "images": tuple(ImageItem(path=images[name][0], uid=None) for images in sides.values()),
        "p": 1.0,
    }


def _prompt(name: str, captions: dict[str, Any], folder: Path) -> str:
    file = folder / f"{name}.txt"
    if file.is_file():
        try:
            return prompt_text(file.read_text(encoding="utf-8-sig").rstrip("\r\n"), file.name)
        except (OSError, UnicodeDecodeError) as error:
            raise BadRow("bad_prompt", f"{file.name}: {error}") from None
    if name not in captions:
        raise BadRow("missing_prompt", f"neither {name}.txt nor a line of {' or '.join(CAPTIONS)} has a prompt for it")
    return prompt_text(captions[name], "prompt")
