"""Small file helpers: atomic writes, hashes, free space."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from diffalign.errors import UserError


def atomic_write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing: a temporary neighbour, flushed to disk, then renamed."""
    atomic_write_bytes(path, text.encode())


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """As `atomic_write_text`."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def free_bytes(path: Path) -> int:
    """Free disk space at a path or at its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_writable(folder: Path, needed_bytes: int = 0) -> None:
    """Create a folder and check that it can be written.

    Raises:
        UserError: it cannot, or too little space is left.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".tmp-probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"output folder {folder} is not writable ({error.strerror}); choose another output_dir"
        ) from error
    if needed_bytes and (free := free_bytes(folder)) < needed_bytes:
        raise UserError(
            f"output folder {folder} has {free / 1e9:.1f} GB free, about {needed_bytes / 1e9:.1f} GB are needed; "
            "free some space or choose another output_dir"
        )
