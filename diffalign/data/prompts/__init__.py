"""Prompt lists: shipped text files, lists computed from the tiny world, or the user's own file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path

from diffalign.errors import DataError, did_you_mean

WORLD = {"world_heldout": True, "world_train": False}


def names() -> list[str]:
    """The shipped lists, files and computed ones."""
    return sorted([*WORLD, *(path.stem for path in Path(__file__).parent.glob("*.txt"))])


def load_prompts(spec: str | Sequence[str], n: int | None = None) -> list[str]:
    """Prompts of a text file (one per line), of a shipped list, or as given.

    Args:
        spec: path, name of a shipped list, or the prompts themselves.
        n: only the first so many; a shorter list is returned whole.

    Returns:
        Prompts, unchanged but for line ends; blank lines are left out.

    Raises:
        DataError: no such file or list, an unreadable file, or an empty list.
    """
    prompts = _by_name(spec) if isinstance(spec, str) else list(spec)
    if not prompts:
        raise DataError(f"prompts {spec!r}: empty; expected a text file with one prompt per line, or a shipped list")
    return prompts[:n]


def normalised(prompt: str) -> str:
    """What counts as the same prompt: lower-cased and stripped."""
    return prompt.strip().lower()


def _by_name(spec: str) -> list[str]:
    file = Path(spec).expanduser()
    if file.is_file():
        return _lines(file)
    if spec in WORLD:
        return _world(held_out=WORLD[spec])
    shipped = Path(__file__).parent / f"{spec}.txt"
    if spec in names():
        return _lines(shipped)
    raise DataError(
        f"prompts {spec!r}: no such file and no shipped list{did_you_mean(spec, names())} Shipped: {', '.join(names())}"
    )


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"prompts {file}: not readable as UTF-8 text ({error}); one prompt per line expected"
        ) from error
    return [line.rstrip("\r") for line in lines if line.strip()]


def _world(*, held_out: bool) -> list[str]:
    """Distinct captions in a fixed order in which the three kinds take turns for as long as each lasts.

    Nine tenths of all captions are relations; in plain order the first few dozen would be single things only.
    """
    from diffalign.world import scenes

    captions = scenes.captions(held_out=held_out)
    random.Random("prompt list").shuffle(captions)
    kinds: dict[str, list[str]] = {"one": [], "two": [], "count": []}
    for caption in captions:
        kinds[scenes.parse_caption(caption).kind].append(caption)
    return [caption for caption in chain.from_iterable(zip_longest(*kinds.values())) if caption is not None]
