"""Averages over micro-batches and processes, and the run's `metrics.jsonl`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign.health import BinAccumulator
from diffalign.objectives import LossOutput

BINNED = ("implicit_acc", "rewards/margins")


class StepMetrics:
    """Collects per-sample metrics over one optimiser step; sums and counts are exact over micro-batches and ranks."""

    def __init__(self, accelerator: Accelerator, num_timesteps: int) -> None:
        self.accelerator, self.num_timesteps = accelerator, num_timesteps
        self._values: dict[str, list[Tensor]] = {}
        self._bins: BinAccumulator | None = None

    def add(self, out: LossOutput, t: Tensor) -> None:
        """Take in one micro-batch; the logged loss is the unweighted one."""
        values = {"loss": out.loss.detach(), **out.metrics}
        if "rewards/margins" in values:
            values["logits/square"] = values["rewards/margins"].square()
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.detach().double())
        binned = {name: values[name] for name in BINNED if name in values}
        for side in ("chosen", "rejected"):
            if f"error/{side}_ref" in values:
                binned[f"error_{side}_delta"] = values[f"error/{side}"] - values[f"error/{side}_ref"]
        binned = binned or {"loss": values["loss"]}
        if self._bins is None:
            self._bins = BinAccumulator(list(binned), self.num_timesteps, device=t.device)
        self._bins.add(t, binned)

    def reduce(self) -> dict[str, float]:
        """Means over everything added on every process; empties the collection."""
        names = sorted(self._values)
        sums = torch.stack([torch.cat(self._values[n]).sum() for n in names])
        count = torch.tensor([sum(len(v) for v in self._values[names[0]])], dtype=sums.dtype, device=sums.device)
        assert self._bins is not None, "at least one micro-batch was added"
        packed = torch.cat([sums, count, self._bins.sums.to(sums).flatten()])
        packed = self.accelerator.reduce(packed, reduction="sum")
        total = packed[len(names)].item()
        row = {name: value / total for name, value in zip(names, packed[: len(names)].tolist(), strict=True)}
        if "logits/square" in row:
            row["logits/std"] = max(0.0, row.pop("logits/square") - row["rewards/margins"] ** 2) ** 0.5
        self._bins.sums = packed[len(names) + 1 :].view_as(self._bins.sums).to(self._bins.sums)
        row |= self._bins.by_bin()
        row["count"] = total
        self._values, self._bins = {}, None
        return row


class MetricsFile:
    """`metrics.jsonl`: one JSON object per line; a cut last line is tolerated by its readers.

    Args:
        path: of the file.
        resume_step: rows after this step belong to work that was lost, and are removed.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        kept = [row for row in read_rows(path) if row.get("step", 0) <= resume_step] if resume_step else []
        temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, path)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; the file is not kept open, so that nothing is lost whatever ends the run."""
        with self.path.open("a") as file:
            file.write(json.dumps({k: _short(v) for k, v in row.items()}) + "\n")


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All complete rows of a metrics file; none if it is not there."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # the line that a kill cut short
    return rows
