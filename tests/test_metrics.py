"""Averages that do not depend on how a step was cut, and a log that survives a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffalign.jobs.image import times_of
from diffalign.losses import Groups, Items, Layout, LossOut, Pairs
from diffalign.metrics import MetricsFile, StepMetrics, read_rows


class OneProcess:
    """As much of an accelerator as a single process needs; `copies` pretends that several processes hold the same."""

    def __init__(self, copies: int = 1) -> None:
        self.copies = copies

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        return value * self.copies


def collect(sizes: list[int], copies: int = 1) -> dict[str, float]:
    n = sum(sizes)
    g = torch.Generator().manual_seed(0)
    loss, margin = torch.rand(n, generator=g), torch.randn(n, generator=g)
    t = torch.randint(0, 1000, (n,), generator=g)
    metrics = StepMetrics(OneProcess(copies), 1000)  # type: ignore[arg-type]
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        values = {
            "implicit_acc": (margin[part] > 0).float(),
            "rewards/margins": margin[part],
            "error/chosen": loss[part] + 1,
            "error/chosen_ref": loss[part],
            "error/rejected": loss[part],
            "error/rejected_ref": loss[part] + 2,
        }
        metrics.add(LossOut(loss[part].requires_grad_(), values), t[part])
        start += size
    return metrics.reduce()


def test_means_over_uneven_micro_batches_are_means_over_samples() -> None:
    whole, cut = collect([9]), collect([1, 5, 3])
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        assert cut[name] == pytest.approx(value, rel=1e-12), name
    g = torch.Generator().manual_seed(0)
    loss, margin = torch.rand(9, generator=g), torch.randn(9, generator=g)
    assert whole["loss"] == pytest.approx(loss.double().mean().item(), rel=1e-12)
    assert whole["logits/std"] == pytest.approx(margin.double().std(correction=0).item(), rel=1e-6)
    assert "logits/square" not in whole
    assert whole["count"] == 9


def test_counts_and_bins_add_up_over_processes() -> None:
    one, two = collect([4, 2]), collect([4, 2], copies=2)
    assert two["count"] == 12
    assert two["loss"] == pytest.approx(one["loss"])
    bins = [name for name in one if name.endswith("/count")]
    assert sum(one[name] for name in bins) == 6
    assert sum(two[name] for name in bins) == 12
    for k in (name.removesuffix("/count") for name in bins):
        assert two[f"{k}/implicit_acc"] == pytest.approx(one[f"{k}/implicit_acc"])
        # By how much the error grew against the reference: chosen + 1, rejected - 2.
        assert one[f"{k}/error_chosen_delta"] == pytest.approx(1)
        assert one[f"{k}/error_rejected_delta"] == pytest.approx(-2)


def test_a_step_starts_empty() -> None:
    metrics = StepMetrics(OneProcess(), 1000)  # type: ignore[arg-type]
    for value in (1.0, 3.0):
        metrics.add(LossOut(torch.tensor([value]), {}), torch.tensor([5]))
        row = metrics.reduce()
        assert (row["loss"], row["count"], row["t0/loss"]) == (value, 1, value)


class SeveralProcesses:
    """Adds up what several processes hold, as a collective would: all must bring as many numbers."""

    def __init__(self) -> None:
        self.brought: list[Tensor] = []

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        self.brought.append(value)
        return torch.stack(self.brought).sum(0)


def test_processes_add_up_as_many_numbers_whatever_their_losses_belong_to() -> None:
    """A rejection sampler keeps another number of images on every process, and only some of these have timesteps."""
    accelerator = SeveralProcesses()
    kept = {2: torch.tensor([1, 600]), 3: None, 1: torch.tensor([999])}
    for count, t in kept.items():
        metrics = StepMetrics(accelerator, 1000)  # type: ignore[arg-type]
        metrics.add(LossOut(torch.full((count,), float(count)), {"kept": torch.ones(count)}), t)
        row = metrics.reduce()
    assert row["count"] == 6
    assert row["loss"] == pytest.approx((4 + 9 + 1) / 6)
    assert {name: value for name, value in row.items() if name.startswith("t")} == {
        "t0/loss": 2,
        "t0/count": 1,
        "t2/loss": 2,
        "t2/count": 1,
        "t3/loss": 1,
        "t3/count": 1,
    }


def test_timesteps_come_from_what_the_losses_belong_to() -> None:
    t = torch.tensor([1, 2, 3, 4])
    items = Layout(items=Items(index=torch.tensor([3, 0])))
    groups = Layout(groups=Groups(index=torch.arange(4), group=torch.tensor([0, 0, 1, 1]), reward=torch.ones(4)))
    pairs = Layout(pairs=Pairs(w=torch.tensor([2, 3]), l=torch.tensor([0, 1])))
    for layout, count, times in (
        (pairs, 2, [3, 4]),
        (pairs, 4, None),
        (items, 2, [4, 1]),
        (groups, 4, [1, 2, 3, 4]),
        (groups, 2, None),  # half of them accepted
        (Layout(), 4, None),
    ):
        found = times_of(layout, t, count)
        assert (None if found is None else found.tolist()) == times


def write(path: Path, steps: list[int], resume_step: int = 0) -> None:
    file = MetricsFile(path, resume_step)
    for step in steps:
        file.write({"step": step, "loss": 1 / 3})


def test_rows_are_on_disk_at_once_and_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1, "loss": 1 / 3, "name": "x"})
    assert json.loads(path.read_text()) == {"step": 1, "loss": 0.333333, "name": "x"}


def test_a_line_that_a_kill_cut_is_left_out_and_the_next_starts_clean(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    write(path, [3, 4], resume_step=2)
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_resumed_run_drops_what_was_lost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3, 4, 5])
    write(path, [], resume_step=3)
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]
    write(path, [1])  # a run from the start
    assert [row["step"] for row in read_rows(path)] == [1]
    assert read_rows(tmp_path / "none.jsonl") == []
