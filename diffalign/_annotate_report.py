"""The page that `diffalign annotate` writes: a table of numbers and a histogram."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from diffalign._page import card, cards, page, section, table

BINS = 24
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 520, 220, 40, 26, 10
SHARES = {"consistency": "both orders name the same winner", "given": "agreement with the labels of the source"}


def render(facts: Mapping[str, Any], differences: Sequence[float], summary: str, *, judged: bool) -> str:
    """The whole page.

    Args:
        facts: as `diffalign.annotate` counts them.
        differences: of every pair that was kept, first minus second.
        summary: what the command prints.
        judged: by a judge, whose differences are its probability minus 1/2.
    """
    rows = [(key, str(facts[key])) for key in ("pairs", "first", "second", "ties", "margin", "asked", "known")]
    rows += [(text, _share(facts.get(key))) for key, text in SHARES.items() if facts.get(key)]
    rows += [(f"agreement with {name}", _share(share)) for name, share in facts.get("between", {}).items()]
    if facts.get("bias") is not None:
        rows.append(("bias of the place", f"{facts['bias']:.3f}"))
    title = (
        "Probability that the first is better, minus 1/2"
        if judged
        else f"Difference of {facts['by'][0]}, first minus second"
    )
    sections = [
        f"<h1>Annotated pairs</h1><pre>{escape(summary)}</pre>",
        section("Histogram", cards([card(title, histogram(differences, facts["margin"], label=title))])),
        section("Numbers", table((), rows)),
    ]
    return page("Annotated pairs", sections)


def _share(share: Mapping[str, Any] | None) -> str:
    return f"{share['share']:.3f} of {share['of']}" if share else "no pair on which both name a winner"


def counts(values: Sequence[float], bins: int = BINS) -> tuple[list[int], float]:
    """How many values fall into each of some equal bins around 0, and where the outer ones end."""
    reach = max((abs(value) for value in values), default=0.0) or 1.0
    found = [0] * bins
    for value in values:
        found[min(bins - 1, math.floor((value + reach) / (2 * reach) * bins))] += 1
    return found, reach


def histogram(values: Sequence[float], margin: float, *, label: str) -> str:
    """Bars as inline SVG; the strip of ties is marked."""
    found, reach = counts(values)
    top, width = max(found) or 1, (WIDTH - LEFT) / len(found)
    height = HEIGHT - BOTTOM - TOP

    def x(value: float) -> float:
        return LEFT + (value + reach) / (2 * reach) * (WIDTH - LEFT)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for i, n in enumerate(found):
        tall, left = n / top * height, LEFT + i * width
        parts.append(
            f'<rect x="{left + 1:.1f}" y="{HEIGHT - BOTTOM - tall:.1f}" width="{width - 2:.1f}" height="{tall:.1f}" '
            f'fill="var(--c0)"><title>{n}</title></rect>'
        )
    edges = (-margin, margin) if 0 < margin < reach else (0.0,)
    parts += [f'<line class="ref" x1="{x(e):.1f}" x2="{x(e):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>' for e in edges]
    for value, anchor in ((-reach, "start"), (0.0, "middle"), (reach, "end")):
        parts.append(f'<text x="{x(value):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{value:.3g}</text>')
    parts.append(f'<text x="{LEFT - 6}" y="{TOP + 8}" text-anchor="end">{top}</text></svg>')
    return "".join(parts)
