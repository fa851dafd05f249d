"""Prompt lists: shipped ones, the tiny world's, and files."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffalign.data.prompts import load_prompts, names
from diffalign.errors import DataError
from diffalign.world import scenes


def test_shipped_lists_are_complete() -> None:
    assert {"partiprompts", "drawbench", "world_heldout", "world_train"} <= set(names())
    parti, bench = load_prompts("partiprompts"), load_prompts("drawbench")
    assert (len(parti), parti[0], len(bench), len(set(bench))) == (1632, "bond", 200, 200)


def test_world_lists_are_the_two_sides_of_its_split() -> None:
    held_out, train = load_prompts("world_heldout"), load_prompts("world_train")
    assert set(held_out) == set(scenes.captions(held_out=True))
    assert len(held_out) == len(set(held_out))
    assert not set(held_out) & set(train)
    kinds = [scenes.parse_caption(caption).kind for caption in load_prompts("world_heldout", 9)]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"one": 3, "two": 3, "count": 3}


def test_files_lists_and_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_bytes(b"\xef\xbb\xbffirst \r\n\r\nsecond\n")
    assert load_prompts(str(file)) == ["first ", "second"]
    assert load_prompts(("a", "b", "c"), 2) == ["a", "b"]
    with pytest.raises(DataError, match="did you mean 'drawbench'"):
        load_prompts("drawbanch")
    file.write_text("\n")
    with pytest.raises(DataError, match="empty"):
        load_prompts(str(file))
