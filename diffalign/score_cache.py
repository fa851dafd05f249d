"""Scores kept on disk, so that the same picture is not scored twice by the same reward with the same prompt.

One SQLite file, safe under several processes of one machine (not on a network share). A key is the hash of the reward's
identity (`rewards.identity`: name, argument, weights, code, version), the picture's float32 pixels, the prompt and the
metadata. It is used where it is named: by `diffalign score --cache FILE`, or by
$DIFFALIGN_SCORE_CACHE for `score`, `evaluate` and the evaluation at the end of a run. Scores may differ in the last bits
between devices and batch sizes; whichever came first is kept.

Shapes: B pictures.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign import rewards
from diffalign.errors import UserError
from diffalign.rewards import Reward

log = logging.getLogger(__name__)

CACHE_VARIABLE = "DIFFALIGN_SCORE_CACHE"
LAYOUT = 1  # of the file
LOCK_SECONDS = 60.0  # that another process may hold the file
CHUNK = 500  # keys of a query; SQLite knows limits


class ScoreCache:
    """A file of scores; a context manager that closes it.

    Args:
        path: of the file; made if it is not there, with its folder.

    Attributes:
        hits, misses: pictures that were found and that were scored, since it was opened.

    Raises:
        UserError: not a file of scores, or not writable.
    """

    def __init__(self, path: Path | str) -> None:
        self.path, self.hits, self.misses = Path(path), 0, 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(self.path, timeout=LOCK_SECONDS, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"score cache {self.path} cannot be opened ({error}); name another file") from error
        try:
            (layout,) = self._file.execute("PRAGMA user_version").fetchone()
            tables = self._file.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if layout not in (0, LAYOUT) or (layout == 0 and tables):
                raise sqlite3.DatabaseError("another program's file, or another version's")
            self._file.execute("PRAGMA journal_mode=WAL")  # readers and a writer at the same time
            self._file.execute("PRAGMA synchronous=NORMAL")  # a power cut loses scores, not the file
            with self._file:
                self._file.execute("BEGIN IMMEDIATE")
                self._file.execute("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, score REAL) WITHOUT ROWID")
                self._file.execute(f"PRAGMA user_version={LAYOUT}")
        except sqlite3.Error as error:
            self._file.close()
            raise UserError(
                f"score cache {self.path} cannot be used ({error}); delete it or name another file"
            ) from error

    def __enter__(self) -> ScoreCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and tell how often it helped."""
        self._file.close()
        if self.hits + self.misses:
            log.info("score cache %s: %d found, %d scored", self.path, self.hits, self.misses)

    def score(
        self,
        name: str,
        reward: Reward,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]] | None = None,
        **options: Any,
    ) -> Tensor:
        """`rewards.score`, asking the reward only for what is not in the file.

        The reward's score of a picture must not depend on the other pictures of the batch. Gradient does not flow.

        Args:
            name: of the reward, as it was loaded.
            reward, images, prompts, metadata, options: see `rewards.score`.

        Returns:
            float32 scores, shape (B,), on the CPU. NaN, where `missing` lets it through, is not kept.
        """
        with torch.no_grad():
            if (
                isinstance(prompts, str)
                or len(prompts) != len(images)
                or (metadata is not None and len(metadata) != len(images))
            ):
                return rewards.score(reward, images, prompts, metadata, **options)  # which says what is wrong
            seen = images if reward.clips else rewards.stills(images)
            identity = rewards.identity(name, reward)
            keys = [
                key_of(identity, seen[i], prompt, metadata[i] if metadata is not None else None)
                for i, prompt in enumerate(prompts)
            ]
            found = self._read([key for key in keys if key is not None])
            asked = list(
                {key: i for i, key in reversed(list(enumerate(keys))) if key is not None and key not in found}.values()
            )
            asked = sorted([*asked, *(i for i, key in enumerate(keys) if key is None)])
            scores = rewards.score(
                reward,
                seen[asked],
                [prompts[i] for i in asked],
                [metadata[i] for i in asked] if metadata is not None else None,
                **options,
            )
        fresh = dict(zip(asked, scores.cpu().tolist(), strict=True))
        self.hits, self.misses = self.hits + len(keys) - len(asked), self.misses + len(asked)
        new = {key: value for i, value in fresh.items() if (key := keys[i]) is not None}
        self._write([(key, value) for key, value in new.items() if value == value])
        return torch.tensor([fresh[i] if key is None else (found | new)[key] for i, key in enumerate(keys)])

    def _read(self, keys: list[bytes]) -> dict[bytes, float]:
        found: dict[bytes, float] = {}
        for start in range(0, len(keys), CHUNK):
            part = keys[start : start + CHUNK]
            marks = ",".join("?" * len(part))
            found |= dict(self._run(f"SELECT key, score FROM scores WHERE key IN ({marks})", part))
        return found

    def _write(self, rows: list[tuple[bytes, float]]) -> None:
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            marks = ",".join(["(?, ?)"] * len(part))
            values = [value for row in part for value in row]
            self._run(f"INSERT OR IGNORE INTO scores VALUES {marks}", values)

    def _run(self, statement: str, values: Sequence[Any]) -> list[Any]:
        try:
            return self._file.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise UserError(
                f"score cache {self.path} cannot be used ({error}); delete it or name another file"
            ) from error


def key_of(identity: str, image: Tensor, prompt: str, metadata: dict[str, Any] | None) -> bytes | None:
    """The key of one picture (3, H, W) or clip; None where the metadata hold what JSON cannot, which is never kept."""
    try:
        facts = json.dumps([identity, list(image.shape), prompt, metadata], sort_keys=True)
    except (TypeError, ValueError):
        return None
    digest = hashlib.sha256(facts.encode())
    digest.update(image.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.digest()


def from_environment(path: Path | str | None = None) -> AbstractContextManager[ScoreCache | None]:
    """The cache at a path or at the one that $DIFFALIGN_SCORE_CACHE names; None inside where there is neither."""
    path = path or os.environ.get(CACHE_VARIABLE)
    return ScoreCache(path) if path else nullcontext()
