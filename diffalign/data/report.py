"""What happened to every row: read, kept, or skipped for a stated reason. Written as `data_report.json`.

Counts are exact; the list of rows behind each count stops at `LISTED` entries, so the file stays small.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from diffalign.errors import DataError
from diffalign.files import atomic_write_text

LISTED = 1000  # rows listed per reason; the counts go on

# Rows that a rule of the configuration takes out. Every other reason means that the row could not be used at all.
RULES = frozenset(
    {
        "unlabelled",
        "tie",
        "duplicate",
        "identical_images",
        "excluded_prompt",
        "filtered",
        "beyond_max_pairs",
        "unread_label",
        "undecided_preference",
    }
)


class Located(Protocol):
    """A record (of images or of texts) that says where it came from."""

    @property
    def id(self) -> str: ...

    @property
    def meta(self) -> Mapping[str, Any]: ...


@dataclass
class DataReport:
    """Counts and lists of one pass over a data set.

    Attributes:
        rows: rows read.
        skipped: rows taken out, by reason; a row counts once.
        notes: things worth knowing about rows that stay (ties kept as soft labels, prompts cut at 77 tokens ...).
        listed: for each reason or note, the first `LISTED` occurrences: id, shard, row, detail.
        bad_shards: shards that could not be read to their end, with the reason.
        source: where the data came from (`Source.facts`).
    """

    rows: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    listed: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    bad_shards: list[dict[str, str]] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """Rows read and not skipped. A later `skip` (undecodable bytes, say) lowers it."""
        return self.rows - self.skipped.total()

    @property
    def unusable(self) -> int:
        """Rows that could not be used; rows removed by a rule of the configuration do not count."""
        return sum(n for reason, n in self.skipped.items() if reason not in RULES)

    def read(self, rows: int = 1) -> None:
        """Count rows read."""
        self.rows += rows

    def skip(
        self, record: Located | str, reason: str, detail: str = "", *, shard: str = "", row: int | str = ""
    ) -> None:
        """Take a row that was counted by `read` out.

        Args:
            record: the record, or its id.
            reason: short stable word, such as "undecodable".
            detail: what exactly was wrong, for a person.
            shard, row: where it stands; taken from the record where one is given.
        """
        self.skipped[reason] += 1
        self._list(reason, record, detail, shard, row)

    def note(self, reason: str, detail: str = "", record: Located | str = "", *, count: int = 1) -> None:
        """Count something that removes no row."""
        self.notes[reason] += count
        self._list(reason, record, detail, "", "")

    def bad_shard(self, shard: str, detail: str) -> None:
        """Say that a shard (or its rest) was lost."""
        self.bad_shards.append({"shard": shard, "detail": detail})

    def _list(self, reason: str, record: Located | str, detail: str, shard: str, row: int | str) -> None:
        entries = self.listed.setdefault(reason, [])
        if len(entries) >= LISTED:
            return
        if not isinstance(record, str):
            shard, row = shard or record.meta.get("shard", ""), record.meta.get("row", row)
            record = record.id
        entry = {"id": record, "shard": shard, "row": row, "detail": detail}
        entries.append({k: v for k, v in entry.items() if v != ""})

    def summary(self) -> str:
        """One line: counts by reason, the most frequent first."""
        parts = [f"{self.rows:,} rows read, {self.kept:,} kept"]
        parts += [f"{n:,} {reason}" for reason, n in self.skipped.most_common()]
        parts += [f"{n:,} noted as {reason}" for reason, n in self.notes.most_common()]
        if self.bad_shards:
            parts.append(f"{len(self.bad_shards):,} shards not read to the end")
        return ", ".join(parts)

    def example(self) -> str:
        """The first unusable row of the most frequent reason, for an error message; empty if there is none."""
        for reason, _ in self.skipped.most_common():
            if reason not in RULES and self.listed.get(reason):
                entry = self.listed[reason][0]
                where = f"row {entry.get('row', '?')} of {entry.get('shard', '?')}"
                return f"{reason}, for example {where}: {entry.get('detail', 'no detail')}"
        if self.bad_shards:
            return f"shard {self.bad_shards[0]['shard']}: {self.bad_shards[0]['detail']}"
        return ""

    def merge(self, other: DataReport) -> None:
        """Add the counts of another report (of other rows) to this one."""
        self.rows += other.rows
        self.skipped.update(other.skipped)
        self.notes.update(other.notes)
        self.bad_shards += other.bad_shards
        self.source = self.source or dict(other.source)
        for reason, entries in other.listed.items():
            mine = self.listed.setdefault(reason, [])
            mine += entries[: LISTED - len(mine)]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready tree; `from_dict` reads it back."""

        def group(counts: Counter[str]) -> dict[str, Any]:
            return {
                reason: {"count": n, "unusable": counts is self.skipped and reason not in RULES}
                | {"listed": self.listed.get(reason, [])}
                for reason, n in counts.most_common()
            }

        return {
            "summary": self.summary(),
            "source": self.source,
            "rows": self.rows,
            "kept": self.kept,
            "skipped": group(self.skipped),
            "notes": group(self.notes),
            "bad_shards": self.bad_shards,
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> DataReport:
        """The report that `to_dict` wrote."""
        report = cls(rows=tree["rows"], bad_shards=list(tree["bad_shards"]), source=dict(tree["source"]))
        for counts, group in ((report.skipped, tree["skipped"]), (report.notes, tree["notes"])):
            for reason, entry in group.items():
                counts[reason] = entry["count"]
                if entry["listed"]:
                    report.listed[reason] = list(entry["listed"])
        return report

    def write(self, path: Path) -> None:
        """Write JSON atomically: a reader sees the old file or the new one.

        Raises:
            DataError: the place is not writable.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False))
        except OSError as error:
            raise DataError(
                f"{path}: cannot write the data report ({error.strerror}); check space and rights"
            ) from error

    @classmethod
    def load(cls, path: Path) -> DataReport:
        """Read a report.

        Raises:
            DataError: not a data report.
        """
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: not a data report ({error}); delete it and run the data step again") from error
