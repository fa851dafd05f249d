"""Writes that are whole or not at all, and what a folder can take."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from diffalign import files
from diffalign.errors import UserError


def test_a_text_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.atomic_write_text(path, "first")
    files.atomic_write_text(path, "zweite Fassung ü")
    assert path.read_text(encoding="utf-8") == "zweite Fassung ü"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_before_the_rename_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.atomic_write_text(path, "old")

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.atomic_write_text(path, "new")
    assert path.read_text() == "old"


def test_hash_of_a_file_larger_than_a_block(tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 17)
    (tmp_path / "x").write_bytes(data)
    assert files.sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_free_space_of_what_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.free_bytes(tmp_path / "a" / "b") > 0
    monkeypatch.chdir(tmp_path)
    assert files.free_bytes(Path("a/b/c")) > 0


def test_a_writable_folder_is_made_and_left_clean(tmp_path: Path) -> None:
    files.require_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(UserError, match=r"is not writable \((File exists|Not a directory)\); choose another"):
            files.require_writable(folder)


def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 2_000_000_000)
    files.require_writable(tmp_path, needed_bytes=1_000_000_000)
    with pytest.raises(UserError, match=r"has 2\.0 GB free, about 3\.0 GB are needed"):
        files.require_writable(tmp_path, needed_bytes=3_000_000_000)
