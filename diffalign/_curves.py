"""Curves of a report: which metrics are drawn together, and the strips by timestep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffalign._charts import Series, heat_strip, line_chart
from diffalign._page import COLOURS, card, cards, missing, table
from diffalign._run_data import RunData, is_number, text_of
from diffalign.health import LOG2, UNITS


@dataclass(frozen=True)
class Chart:
    title: str
    lines: tuple[tuple[str, str], ...]  # (metric, name in the legend)
    reference: tuple[float, str] | None = None
    y_range: tuple[float, float] | None = None
    log: bool = False
    percent: bool = False
    smoothed: bool = True
    quiet: bool = False  # left out while it never leaves its reference


CHARTS = (
    Chart("Loss", (("loss", ""),), (LOG2, "log 2")),
    Chart("Implicit accuracy", (("implicit_acc", ""),), (0.5, "chance"), (0.0, 1.0)),
    Chart("Margin", (("rewards/margins", "margin"), ("logits/std", "spread in the batch")), (0.0, "")),
    Chart(
        "Error vs. reference",
        (("chosen", "chosen"), ("rejected", "rejected")),
        (0.0, "reference"),
        percent=True,
    ),
    Chart("Implicit rewards", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")), (0.0, "")),
    Chart("Implicit rewards", (("rewards/desirable", "desirable"), ("rewards/undesirable", "undesirable")), (0.0, "")),
    Chart("Log-probabilities", (("logps/chosen", "chosen"), ("logps/rejected", "rejected"))),
    Chart("Log-probabilities", (("logps/desirable", "desirable"), ("logps/undesirable", "undesirable"))),
    Chart("Log-probabilities", (("logps/forget", "forget"), ("logps/retain", "retain"))),
    Chart("Forget loss", (("forget/loss", ""),)),
    Chart("Retain loss", (("retain/loss", ""),)),
    Chart("Reward", (("reward", "mean"), ("reward/best", "best"), ("reward/worst", "worst"))),
    Chart("Length of answers in tokens", (("length", ""),)),
    Chart("Answers that end by themselves", (("finished", ""),), y_range=(0.0, 1.0)),
    Chart("Groups without contrast", (("frac_zero_std", ""),), y_range=(0.0, 1.0)),
    Chart("Divergence from the reference", (("kl", ""),), (0.0, "")),
    Chart("Entropy in nats per token", (("entropy", ""),)),
    Chart("Clipped share", (("clip_frac/low", "below"), ("clip_frac/high", "above")), (0.0, ""), quiet=True),
    Chart("Ratio to the sampling policy", (("ratio", ""),), (1.0, ""), quiet=True),
    Chart("Size of the advantage", (("advantage/abs", ""),)),
    Chart("Gradient norm", (("grad_norm", ""),), log=True),
    Chart("Learning rate", (("learning_rate", ""),), smoothed=False),
    Chart("Learning rate of the text encoders", (("text_encoder_learning_rate", ""),), smoothed=False),
    *(Chart(f"{unit.capitalize()} per second", ((f"{unit}_per_second", ""),)) for unit in UNITS),
    Chart("Memory in GB", (("memory_gb", ""),)),
)


def curves(run: RunData) -> str:
    if not run.rows:
        return missing("No metrics yet.")
    cut = missing(f"{run.unreadable_lines} line(s) of metrics.jsonl could not be read.") if run.unreadable_lines else ""
    return cards([_chart(run, chart) for chart in (*watched([run]), *CHARTS)]) + cut


def watched(runs: Sequence[RunData]) -> list[Chart]:
    """Gains of the rewards that were looked at during training, which other runs may not have."""
    gains = dict.fromkeys(
        name for run in runs for row in run.rows for name in row if name.startswith("eval/") and name.endswith("/gain")
    )
    charts = [
        Chart(f"Gain in {name.split('/', 1)[1].rsplit('/', 1)[0]}", ((name, ""),), (0.0, "base"), smoothed=False)
        for name in gains
    ]
    return [*charts, Chart("Drift from the base", (("eval/drift", ""),), (0.0, ""), smoothed=False)]


def _chart(run: RunData, chart: Chart) -> str:
    series = []
    for i, (metric, name) in enumerate(chart.lines):
        x, y = _error_change(run, metric) if chart.percent else run.column(metric)
        if any(math.isfinite(value) for value in y):
            series.append(Series(name, x, y, i))
    if not series or (chart.quiet and _still(series, chart.reference)):
        return ""
    reference = None if chart.title == "Loss" and not _starts_at_log_two(run) else chart.reference
    svg = line_chart(
        series, label=chart.title, reference=reference, y_range=chart.y_range, log=chart.log, smoothed=chart.smoothed
    )
    unit = " %" if chart.percent else ""
    now = " / ".join(f"{_last(item):.4g}{unit}" for item in series)
    return card(chart.title, svg, now=now, legend=[(s.name, s.colour) for s in series if len(chart.lines) > 1])


def _still(series: Sequence[Series], reference: tuple[float, str] | None) -> bool:
    return reference is not None and all(abs(value - reference[0]) < 1e-3 for item in series for value in item.y)


def _starts_at_log_two(run: RunData) -> bool:
    """Log 2 is the loss of doing nothing where pairs are compared by a sigmoid; on texts other links are common."""
    if not run.column("implicit_acc")[1]:
        return False
    first = run.rows[0]
    weight = first.get("weight", 1.0)
    return not run.is_text or abs(first.get("loss", 0.0) - LOG2 * weight) < 0.02


def _last(series: Series) -> float:
    """The smoothed end of a curve: the mean of its last twentieth."""
    values = [value for value in series.y if math.isfinite(value)]
    tail = values[-max(1, len(values) // 20) :]
    return sum(tail) / len(tail)


def _error_change(run: RunData, side: str) -> tuple[list[float], list[float]]:
    """Steps, and the error of one side against the reference's in per cent, where both are known."""
    names = (f"error/{side}", f"error/{side}_ref")
    rows = [row for row in run.rows if all(is_number(row.get(name)) for name in names) and row[names[1]] > 0]
    return [float(row["step"]) for row in rows], [100 * (row[names[0]] / row[names[1]] - 1) for row in rows]


_BINNED = (
    ("implicit_acc", "implicit accuracy"),
    ("rewards/margins", "margin"),
    ("error_chosen_delta", "chosen error − reference"),
    ("error_rejected_delta", "rejected error − reference"),
    ("loss", "loss"),
)
_STRIPS = ("implicit_acc", "error_chosen_delta")


def by_timestep(run: RunData) -> str:
    bins = sorted(
        {key.split("/")[0] for row in run.rows for key in row if key[0] == "t" and key.split("/")[0][1:].isdigit()}
    )
    if not bins:
        return missing("No metrics by timestep.") if run.rows and not run.is_text else ""
    recent = run.rows[-max(1, len(run.rows) // 4) :]
    share = 100 / len(bins)
    names = [f"{i * share:.0f}–{(i + 1) * share:.0f} %" for i in range(len(bins))]
    known = {key for row in recent for key in row}
    metrics = [(m, title) for m, title in _BINNED if any(f"{b}/{m}" in known for b in bins)]
    rows = [
        (name, *(text_of(_weighted(recent, b, metric)) for metric, _ in metrics), f"{_total(run.rows, b):,.0f}")
        for name, b in zip(names, bins)
    ]
    head = ("noise level", *(title for _, title in metrics), "samples in all")
    strips = [_strip(run, bins, names, metric, title) for metric, title in metrics if metric in _STRIPS]
    intro = missing(
        "Noise level as a share of the schedule: 0 % is a clean image. Blue is better than neutral, orange worse."
    )
    return intro + cards(strips) + table(head, rows)


def _strip(run: RunData, bins: Sequence[str], names: Sequence[str], metric: str, title: str) -> str:
    columns = min(36, len(run.rows))
    edges = [round(i * len(run.rows) / columns) for i in range(columns + 1)]
    rows = [[_weighted(run.rows[a:b], name, metric) for a, b in itertools.pairwise(edges)] for name in bins]
    values = [abs(value) for row in rows for value in row if math.isfinite(value)]
    if not values:
        return ""
    accuracy = metric == "implicit_acc"
    neutral, scale = (0.5, 0.5) if accuracy else (0.0, max(*values, 1e-12))
    svg = heat_strip(
        rows,
        names,
        neutral=neutral,
        scale=scale,
        x_max=run.rows[-1]["step"],
        label=f"{title} by timestep",
        more_is_better=accuracy,
    )
    return card(title, svg, now=f"full colour at ±{scale:.2g}")


def _weighted(rows: Sequence[Mapping[str, Any]], name: str, metric: str) -> float:
    """Mean of a bin's metric over rows, weighted by the samples in it; NaN without any."""
    found = [
        (row[f"{name}/{metric}"], row.get(f"{name}/count", 1)) for row in rows if is_number(row.get(f"{name}/{metric}"))
    ]
    total = sum(count for _, count in found)
    return sum(value * count for value, count in found) / total if total else math.nan


def _total(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(row[f"{name}/count"] for row in rows if is_number(row.get(f"{name}/count")))


def compare_curves(data: Sequence[RunData], names: Sequence[str]) -> list[str]:
    charts = []
    for chart in (*watched(data), *CHARTS):
        for metric, side in chart.lines:
            series = []
            for i, (run, name) in enumerate(zip(data, names)):
                x, y = _error_change(run, metric) if chart.percent else run.column(metric)
                if any(math.isfinite(value) for value in y):
                    series.append(Series(name, x, y, i % COLOURS))
            if series:
                title = f"{chart.title}{f', {side}' if side and side != chart.title.lower() else ''}"
                title += ", %" if chart.percent else ""
                svg = line_chart(
                    series,
                    label=title,
                    reference=chart.reference,
                    y_range=chart.y_range,
                    log=chart.log,
                    raw=False,
                    smoothed=chart.smoothed,
                )
                charts.append(card(title, svg, legend=[(s.name, s.colour) for s in series]))
    return charts
