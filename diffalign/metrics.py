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
from diffalign.losses import LossOut

DELTAS = {f"error_{side}_delta": f"error/{side}" for side in ("chosen", "rejected")}
# By timestep, whatever an objective reports of them: processes must agree on what they add up.
BINNED = ("implicit_acc", "rewards/margins", *DELTAS, "loss")


class StepMetrics:
    """Collects metrics over one optimiser step; sums and counts are exact over micro-batches and ranks.

    Args:
        accelerator: sums over processes.
        num_timesteps: of the schedule, for values by timestep; None where there are no timesteps.
    """

    def __init__(self, accelerator: Accelerator, num_timesteps: int | None) -> None:
        self.accelerator, self.num_timesteps = accelerator, num_timesteps
        self._values: dict[str, list[Tensor]] = {}
        self._bins: dict[str, BinAccumulator] = {}

    def add(self, out: LossOut, t: Tensor | None = None) -> None:
        """Take in one micro-batch; `t` are the timesteps of its items, (M,), None where items have no one timestep."""
        values = {"loss": out.per_item.detach(), **out.metrics}
        if "rewards/margins" in values:
            values["logits/square"] = values["rewards/margins"].square()
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.detach().double())
        if self.num_timesteps is None:
            return
        for name in BINNED:  # all of them, though nothing may be added
            if name not in self._bins:
                self._bins[name] = BinAccumulator([name], self.num_timesteps, device=out.per_item.device)
        if t is not None:
            self._add_bins(values, t)

    def _add_bins(self, values: dict[str, Tensor], t: Tensor) -> None:
        binned = {name: values[name] for name in BINNED if name in values}
        for name, error in DELTAS.items():
            if f"{error}_ref" in values:
                binned[name] = values[error] - values[f"{error}_ref"]
        for name, value in binned.items():
            if len(value) == len(t):
                self._bins[name].add(t, {name: value})

    def reduce(self) -> dict[str, float]:
        """Means over everything added on every process; empties the collection."""
        names = sorted(self._values)
        joined = [torch.cat(self._values[name]) for name in names]
        sums = torch.stack([value.sum() for value in joined])
        counts = torch.tensor([len(value) for value in joined], dtype=sums.dtype, device=sums.device)
        bins = [accumulator.sums.to(sums).flatten() for accumulator in self._bins.values()]
        packed = self.accelerator.reduce(torch.cat([sums, counts, *bins]), reduction="sum")
        totals = dict(zip(names, packed[len(names) : 2 * len(names)].tolist(), strict=True))
        row = {
            name: value / totals[name]
            for name, value in zip(names, packed[: len(names)].tolist(), strict=True)
            if totals[name]
        }
        if "logits/square" in row:
            row["logits/std"] = max(0.0, row.pop("logits/square") - row["rewards/margins"] ** 2) ** 0.5
        if row.get("weight") == 1.0:  # of data without weights: nothing to tell
            del row["weight"]
        row |= self._by_bin(packed[2 * len(names) :])
        row["count"] = totals["loss"]
        self._values, self._bins = {}, {}
        return row

    def _by_bin(self, packed: Tensor) -> dict[str, float]:
        """Means by timestep; of the loss only where nothing says more."""
        row: dict[str, float] = {}
        if not self._bins:
            return row
        for part, accumulator in zip(packed.chunk(len(self._bins)), self._bins.values(), strict=True):
            accumulator.sums = part.view_as(accumulator.sums).to(accumulator.sums)
            found = accumulator.by_bin()
            if accumulator.names == ("loss",) and row:
                found = {name: value for name, value in found.items() if name.endswith("/count")}
            row |= found
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
