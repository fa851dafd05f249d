"""What a run folder holds, read as far as it can be: a killed run leaves cut lines and missing files."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from diffalign.errors import UserError


@dataclass(frozen=True)
class RunData:
    """What a run folder holds.

    Attributes:
        folder: the run folder.
        config: resolved config as a plain tree; empty if it cannot be read.
        rows: metrics by step, ascending, one per step (after a resume the later one).
        alarms: alarm rows, ascending.
        result, data_report, environment: the JSON files; None where they are missing or cut.
        unreadable_lines: of `metrics.jsonl`.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] | None = None
    data_report: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    unreadable_lines: int = 0

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def is_text(self) -> bool:
        """A run on texts, by its config."""
        return bool(get(self.config, "data", "format") == "text")

    @property
    def is_reward(self) -> bool:
        """A run that trains a reward model, by its config."""
        return bool(get(self.config, "model", "family") == "clip_reward")

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) of a metric where it is a number."""
        pairs = [(row["step"], row[name]) for row in self.rows if isinstance(row.get(name), (int, float))]
        return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]


def read_data_report(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The account of the rows: in the run folder, or in the cache that the run trained from."""
    named = get(config, "cache", "dir")
    places = (folder, folder / "cache", *([Path(named)] if isinstance(named, str) else []))
    found = (read_json(place / "data_report.json") for place in places)
    return next((report for report in found if report is not None), None)


def row_counts(report: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """(what, rows, kind) of a data report: rows read, rows kept, then every reason to skip or to take note."""
    counts = [(name, report[name], "") for name in ("rows", "kept") if isinstance(report.get(name), int)]
    for group, kind in (("skipped", "removed by a rule"), ("notes", "kept, noted")):
        for reason, entry in (report.get(group) or {}).items():
            if isinstance(count := get(entry, "count"), int):
                counts.append((reason.replace("_", " "), count, "unusable" if get(entry, "unusable") else kind))
    return counts


def read_run(folder: Path) -> RunData:
    """Read a run folder, finished or not.

    Raises:
        UserError: it holds neither `config.yaml` nor `metrics.jsonl`.
    """
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise UserError(
            f"{folder} is no run folder: expected config.yaml or metrics.jsonl in it; name a train output_dir"
        )
    rows, alarms, unreadable = _read_metrics(folder / "metrics.jsonl")
    config = _read_config(folder / "config.yaml")
    return RunData(
        folder,
        config,
        rows,
        alarms,
        read_json(folder / "result.json"),
        read_data_report(folder, config),
        read_json(folder / "environment.json"),
        unreadable,
    )


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    by_step: dict[int, dict[str, Any]] = {}
    alarms: dict[tuple[int, str], dict[str, Any]] = {}
    unreadable = 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in filter(str.strip, lines):
        try:
            row = json.loads(line)
        except ValueError:  # a killed run may leave a cut last line
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            unreadable += 1
        elif "alarm" in row:
            alarms[row["step"], str(row["alarm"])] = row
        else:
            by_step[row["step"]] = row
    return [by_step[step] for step in sorted(by_step)], [alarms[key] for key in sorted(alarms)], unreadable


def _read_config(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    except yaml.YAMLError:
        tree = None
    return tree if isinstance(tree, dict) else {}


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None if the file is missing, cut or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    except ValueError:
        value = None
    return value if isinstance(value, dict) else None


def get(tree: Mapping[str, Any], *path: str) -> Any:
    """The value at a path of keys, or None."""
    node: Any = tree
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def is_number(value: Any) -> bool:
    """A finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def interval_of(value: Any) -> tuple[float, float] | None:
    """Two finite numbers, or None."""
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(is_number(end) for end in value):
        return float(value[0]), float(value[1])
    return None


def text_of(value: Any) -> str:
    """A value of a JSON file for a table cell."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def duration(seconds: Any) -> str | None:
    """Seconds in the unit that fits."""
    if not is_number(seconds):
        return None
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def describe_environment() -> dict[str, str]:
    """Versions and hardware of this process, for `environment.json` of a run folder."""
    import torch

    packages = ("diffalign", "torch", "diffusers", "transformers", "accelerate", "peft", "open_clip_torch")
    found = {name: _version(name) for name in packages}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        **{name: version for name, version in found.items() if version},
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "cpu cores": str(os.cpu_count()),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
