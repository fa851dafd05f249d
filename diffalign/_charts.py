"""Small charts as inline SVG. Colours are CSS variables of the page (`--c0` ...), so they follow light and dark."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 24
MAX_POINTS = 240


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: for the legend.
        x, y: same length; points with a non-finite y are left out.
        colour: index of the page's colours.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0


def smooth(values: Floats, window: int) -> Floats:
    """Centred moving average; at the ends the window is cut, so nothing lags and nothing is invented."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    half = window // 2
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low))


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    reference: tuple[float, str] | None = None,
    y_range: tuple[float, float] | None = None,
    log: bool = False,
    raw: bool = True,
    smoothed: bool = True,
) -> str:
    """Smoothed lines over faint raw ones.

    Args:
        series: at least one with a finite point.
        label: what a screen reader says.
        reference: a dashed horizontal line and its name.
        y_range: fixed limits; None fits the smoothed lines and 98 % of the raw points.
        log: logarithmic y; non-positive points are left out.
        raw: draw the raw lines.
        smoothed: False for values without noise, such as the learning rate.
    """
    lines = [line for line in (_prepare(item, log, smoothed) for item in series) if line is not None]
    if not lines:
        return ""
    reference_y = None if reference is None else math.log10(reference[0]) if log else reference[0]
    y_low, y_high = y_range or _limits(lines, reference_y, raw)
    x_low, x_high = min(line.x[0] for line in lines), max(line.x[-1] for line in lines)
    frame = _Frame(x_low, max(x_high, x_low + 1), y_low, y_high)
    clip = f"c{zlib.crc32(repr((label, y_low, y_high)).encode()):x}"
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    parts.append(
        f'<clipPath id="{clip}"><rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" '
        f'height="{HEIGHT - TOP - BOTTOM}"/></clipPath>'
    )
    parts += _axes(frame, log)
    parts.append(f'<g clip-path="url(#{clip})">')
    if raw:
        parts += [_polyline(frame, *_thin(line.x, line.y), line.colour, "raw") for line in lines]
    parts += [_polyline(frame, *_stride(line.x, line.mean), line.colour, "mean") for line in lines]
    parts.append("</g>")
    if reference is not None and reference_y is not None and y_low <= reference_y <= y_high:
        y = frame.y(reference_y)
        parts.append(f'<line class="ref" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="reft" x="{WIDTH - RIGHT - 2}" y="{y - 3:.1f}">{escape(reference[1])}</text>')
    return "".join([*parts, "</svg>"])


def interval_plot(
    value: float, low: float, high: float, *, limits: tuple[float, float], neutral: float, label: str
) -> str:
    """A dot with its interval on an axis, and the value that means no difference.

    Args:
        value, low, high: estimate and interval.
        limits: of the axis.
        neutral: one half for a rate, 0 for a gain.
        label: what a screen reader says.
    """
    height, y, left, right = 54, 20, 14, 14

    def place(at: float) -> float:
        share = (min(max(at, limits[0]), limits[1]) - limits[0]) / (limits[1] - limits[0])
        return left + share * (WIDTH - left - right)

    ticks = "".join(
        f'<line class="grid" x1="{place(at):.1f}" x2="{place(at):.1f}" y1="34" y2="38"/>'
        f'<text class="tick" text-anchor="middle" x="{place(at):.1f}" y="50">{_format(at)}</text>'
        for at in _ticks(*limits, 5)
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
        f'<line class="grid" x1="{left}" x2="{WIDTH - right}" y1="34" y2="34"/>{ticks}'
        f'<line class="ref" x1="{place(neutral):.1f}" x2="{place(neutral):.1f}" y1="4" y2="34"/>'
        f'<line class="interval" x1="{place(low):.1f}" x2="{place(high):.1f}" y1="{y}" y2="{y}"/>'
        f'<circle class="dot" cx="{place(value):.1f}" cy="{y}" r="5.5"/></svg>'
    )


def before_after(rows: Sequence[tuple[str, float, float]], *, label: str) -> str:
    """Two bars per row on an axis from 0 to 1: before (pale) and after.

    Args:
        rows: (name, before, after).
        label: what a screen reader says.
    """
    left, right, each = 112, 40, 34
    height = each * len(rows) + 20
    wide = WIDTH - left - right
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">']
    for at in (0.0, 0.5, 1.0):
        x = left + at * wide
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 18}"/>')
        parts.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{height - 5}">{_format(at)}</text>')
    for i, (name, *values) in enumerate(rows):
        y = i * each + 4
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        for k, value in enumerate(values):
            size = min(max(value, 0.0), 1.0) * wide
            fill = f'fill="var(--c0)" fill-opacity="{0.35 if k == 0 else 1}"'
            parts.append(f'<rect x="{left}" y="{y + 12 * k}" width="{size:.1f}" height="10" {fill}/>')
            parts.append(f'<text class="tick" x="{left + size + 4:.1f}" y="{y + 12 * k + 9}">{_format(value)}</text>')
    return "".join([*parts, "</svg>"])


def heat_strip(
    rows: Sequence[Sequence[float]],
    names: Sequence[str],
    *,
    neutral: float,
    scale: float,
    more_is_better: bool,
    x_max: float,
    label: str,
) -> str:
    """One row of cells per name, over the steps; blue where better than `neutral`, orange where worse, else empty.

    Args:
        rows: one sequence of cells per name, oldest first; NaN is empty.
        names: of the rows.
        neutral: the uncoloured value.
        scale: distance from `neutral` at full colour.
        more_is_better: which side of `neutral` is blue.
        x_max: last step, for the axis.
        label: what a screen reader says.
    """
    cell, gap = 24, 3
    height = len(rows) * (cell + gap) + 18
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">']
    for i, (row, name) in enumerate(zip(rows, names)):
        y = i * (cell + gap)
        parts.append(f'<text class="tick" x="{LEFT + 18}" y="{y + 16}" text-anchor="end">{escape(name)}</text>')
        step = (WIDTH - LEFT - 24 - RIGHT) / max(len(row), 1)
        for j, value in enumerate(row):
            if math.isfinite(value):
                strength = min(abs(value - neutral) / scale, 1.0)
                colour = 0 if (value >= neutral) == more_is_better else 1
                fill = f'fill="var(--c{colour})" fill-opacity="{0.06 + 0.94 * strength:.2f}"'
                parts.append(
                    f'<rect x="{LEFT + 24 + j * step:.1f}" y="{y}" width="{step + 0.3:.1f}" height="{cell}" {fill}>'
                    f"<title>{value:.4g}</title></rect>"
                )
    parts.append(f'<text class="tick" x="{LEFT + 24}" y="{height - 4}">0</text>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{height - 4}" text-anchor="end">step {x_max:g}</text>')
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class Scatter:
    """Labelled points of a scatter.

    Attributes:
        name: for the legend.
        points: (x, y, label).
        colour: index of the page's colours.
        line: join them in order of x.
    """

    name: str
    points: Sequence[tuple[float, float, str]]
    colour: int = 0
    line: bool = False


def scatter(series: Sequence[Scatter], *, x_label: str, y_label: str, label: str) -> str:
    """Points with names, and lines through those of a kind.

    Args:
        series: at least one point in all.
        x_label, y_label: names of the axes.
        label: what a screen reader says.
    """
    every = [(x, y) for item in series for x, y, _ in item.points]
    ends = []
    for values in zip(*every, strict=True):
        low, high = min(values), max(values)
        pad = 0.16 * (high - low) or max(0.1 * abs(high), 1e-6)
        ends.append((low - pad, high + pad))
    frame = _Frame(*ends[0], *ends[1])
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 12}" role="img" aria-label="{escape(label)}">', *_axes(frame, False)]
    for item in series:
        points = sorted(item.points)
        if item.line and len(points) > 1:
            x, y = (np.array([point[axis] for point in points]) for axis in (0, 1))
            parts.append(_polyline(frame, x, y, item.colour, "raw"))
        for x_, y_, name in points:
            place = f'cx="{frame.x(x_):.1f}" cy="{frame.y(y_):.1f}"'
            parts.append(f'<circle {place} r="3.5" fill="var(--c{item.colour})"><title>{escape(name)}</title></circle>')
            anchor = "end" if frame.x(x_) > WIDTH - 70 else "start"
            shift = -6 if anchor == "end" else 6
            where = f'x="{frame.x(x_) + shift:.1f}" y="{frame.y(y_) - 4:.1f}" text-anchor="{anchor}"'
            parts.append(f'<text {where} style="font-size:7.5px">{escape(name)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT + 8}" text-anchor="end">{escape(x_label)} →</text>')
    parts.append(
        f'<text x="{LEFT + 3}" y="{TOP + 8}" class="reft" style="text-anchor:start">↑ {escape(y_label)}</text>'
    )
    return "".join([*parts, "</svg>"])


# -- Geometry ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    x: Floats
    y: Floats
    mean: Floats
    colour: int


@dataclass(frozen=True)
class _Frame:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def _prepare(series: Series, log: bool, smoothed: bool) -> _Line | None:
    x, y = np.asarray(series.x, dtype=np.float64), np.asarray(series.y, dtype=np.float64)
    keep = np.isfinite(y) & ((y > 0) | (not log))
    if not keep.any():
        return None
    x, y = x[keep], np.log10(y[keep]) if log else y[keep]
    return _Line(x, y, smooth(y, max(1, len(y) // 12) if smoothed else 1), series.colour)


def _limits(lines: Sequence[_Line], reference: float | None, raw: bool) -> tuple[float, float]:
    """Of the smoothed lines and of 98 % of the raw points (if drawn): one spike must not flatten the rest."""
    ends = [end for line in lines for end in (line.mean.min(), line.mean.max())]
    if raw:
        ends += [end for line in lines for end in np.percentile(line.y, [1, 99])]
    low, high = float(min(ends)), float(max(ends))
    # A constant gets room around it, so that its ticks differ.
    size = high - low if high - low > 1e-6 * abs(high) else max(0.2 * abs(high), 1e-9)
    # A reference far away from the data would flatten it just as much.
    if reference is not None and low - 3 * size < reference < high + 3 * size:
        low, high = min(low, reference), max(high, reference)
    pad = max(high - low, size) * 0.08
    return low - pad, high + pad


def _ticks(low: float, high: float, most: int) -> list[float]:
    size = (high - low) / most
    power = 10.0 ** math.floor(math.log10(size))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= size * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _format(value: float) -> str:
    if value == 0 or abs(value) < 1e-12:
        return "0"
    if abs(value) >= 1e4 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


def _axes(frame: _Frame, log: bool) -> list[str]:
    parts = []
    ticks = _ticks(frame.y_low, frame.y_high, 4)
    if log:
        factors = (1, 2, 5) if frame.y_high - frame.y_low < 1.5 else (1,)
        decades = range(math.floor(frame.y_low), math.ceil(frame.y_high) + 1)
        ticks = [math.log10(factor) + power for power in decades for factor in factors]
        ticks = [value for value in ticks if frame.y_low <= value <= frame.y_high]
        if len(ticks) < 3:
            ticks = [math.log10(value) for value in _ticks(10**frame.y_low, 10**frame.y_high, 4) if value > 0]
    for value in ticks:
        y = frame.y(value)
        text = _format(10**value) if log else _format(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    for value in _ticks(frame.x_low, frame.x_high, 4):
        anchor = "middle" if frame.x(value) < WIDTH - RIGHT - 12 else "end"
        where = f'x="{frame.x(value):.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}"'
        parts.append(f'<text class="tick" {where}>{_format(value)}</text>')
    return parts


def _thin(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """At most `MAX_POINTS` points that keep the lowest and the highest of each stretch: spikes stay visible."""
    if len(x) <= MAX_POINTS:
        return x, y
    chunks = np.array_split(np.arange(len(x)), MAX_POINTS // 2)
    keep = sorted({int(i) for c in chunks for i in (c[np.argmin(y[c])], c[np.argmax(y[c])])})
    return x[keep], y[keep]


def _stride(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """At most `MAX_POINTS` evenly spaced points, the last one among them."""
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), MAX_POINTS)).round().astype(int))
    return x[keep], y[keep]


def _polyline(frame: _Frame, x: Floats, y: Floats, colour: int, kind: str) -> str:
    if len(x) == 1:
        return f'<circle cx="{frame.x(x[0]):.1f}" cy="{frame.y(y[0]):.1f}" r="2.5" fill="var(--c{colour})"/>'
    points = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in zip(x, y))
    return f'<polyline class="{kind}" stroke="var(--c{colour})" points="{points}"/>'
