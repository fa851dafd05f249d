"""What a report shows of texts: answers before and after, what the policy wrote in training, and what was forgotten."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from diffalign._charts import before_after
from diffalign._page import card, cards, collapsed, missing, table
from diffalign._run_data import RunData, get, interval_of, is_number, read_json, text_of

SHOWN = 12  # rows of answers
CHANGED = 20  # of those whose score changed
LONGEST = 4000  # characters of an answer
MEMORY = (
    ("forget_recall", "forget: recall"),
    ("forget_probability", "forget: probability"),
    ("forget_reworded_recall", "forget, reworded: recall"),
    ("retain_recall", "retain: recall"),
    ("retain_probability", "retain: probability"),
    ("retain_reworded_recall", "retain, reworded: recall"),
)


def text_samples(run: RunData) -> str:
    """The section with answers; a line that says so where there are none."""
    told = read_json(run.folder / "samples" / "texts.json") or {}
    compared = read_rows(run.folder / "samples" / "comparison.json")
    parts = [_answers(told, compared), _changed(compared), _group(run.folder)]
    return "".join(parts) or missing("No answers were written.")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A JSON list of objects; empty if the file is missing, cut or something else."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else []
    except ValueError:
        rows = []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _answers(told: Mapping[str, Any], compared: Sequence[Mapping[str, Any]]) -> str:
    """A row per prompt: base, the middle of training, the end."""
    by_step = get(told, "answers")
    found: dict[str, Sequence[Any]] = dict(by_step) if isinstance(by_step, Mapping) else {}
    steps = sorted((step for step in found if step.isdigit()), key=int)
    prompts = [str(prompt) for prompt in told.get("prompts") or [row.get("prompt") for row in compared[:SHOWN]]]
    columns = {("base" if step == "0" else f"step {step}"): found[step] for step in steps}
    if compared:
        known = {row.get("prompt"): row for row in compared}
        rows = [known.get(prompt, {}) for prompt in prompts]
        columns = (
            {"base": [row.get("base") for row in rows]} | columns | {"aligned": [row.get("aligned") for row in rows]}
        )
        scores = {side: [row.get(f"{side}_scores") for row in rows] for side in ("base", "aligned")}
    else:
        scores = {}
    names = list(columns)
    names = names if len(names) <= 3 else [names[0], names[len(names) // 2], names[-1]]
    if not prompts or not names:
        return ""
    lines = []
    for n, prompt in enumerate(prompts[:SHOWN]):
        cells = [said(prompt)]
        for name in names:
            marks = scores.get(name)
            answer = columns[name][n] if n < len(columns[name]) else None
            cells.append(said(answer) + _marks(marks[n] if marks else None))
        lines.append(cells)
    note = missing(
        "Same prompt and same noise in every column. Marks: \u00b7 space at an edge or in a run, \u21b5 line break."
    )
    return note + _texts(("prompt", *names), lines)


def _changed(compared: Sequence[Mapping[str, Any]]) -> str:
    """Prompts where the first reward of base and adapter differs, the largest changes first."""
    rows = [(_first(row.get("aligned_scores")), _first(row.get("base_scores")), row) for row in compared]
    moved = [(b - a, row) for b, a, row in rows if a is not None and b is not None and a != b]
    if not moved:
        return ""
    up, down = sum(change > 0 for change, _ in moved), sum(change < 0 for change, _ in moved)
    moved.sort(key=lambda entry: -abs(entry[0]))
    lines = [
        [
            said(row.get("prompt")),
            said(row.get("base")) + _marks(row.get("base_scores")),
            said(row.get("aligned")) + _marks(row.get("aligned_scores")),
            f'<span class="{"up" if change > 0 else "down"}">{escape(f"{change:+.3g}")}</span>',
        ]
        for change, row in moved[:CHANGED]
    ]
    title = f"Prompts whose score changed: {up} better, {down} worse of {len(compared)}"
    return collapsed(title, _texts(("prompt", "base", "aligned", "change"), lines))


def _group(folder: Path) -> str:
    """What the policy wrote to one prompt in the last round, with its rewards."""
    rows = read_rows(folder / "samples" / "rollouts.json")
    if not rows:
        return ""
    lines = [[said(row.get("answer")), escape(", ".join(text_of(v) for v in row.get("rewards") or ()))] for row in rows]
    prompt = str(rows[0].get("prompt", "")).strip()
    title = f"A group of sampled answers of round {rows[0].get('round')}: {prompt[:80]}"
    return collapsed(title, _texts(("answer", "rewards"), lines))


def unlearning(result: Mapping[str, Any]) -> str:
    """What is still known of the forget and the retain set, before and after."""
    found = [(name, result[key]) for key, name in MEMORY if isinstance(result.get(key), Mapping)]
    found = [(name, entry) for name, entry in found if is_number(entry.get("base")) and is_number(entry.get("aligned"))]
    if not found:
        return ""
    bars = before_after(
        [(name, float(e["base"]), float(e["aligned"])) for name, e in found], label="recall before and after"
    )
    rows = [
        (name, *(_memory_cell(entry, key) for key in ("base", "aligned", "change", "change_ci95", "items")))
        for name, entry in found
    ]
    note = (
        "Recall: share of answers that greedy decoding repeats exactly. Probability: geometric mean per token. Pale is the "
        "base. Good unlearning lowers forget and leaves retain."
    )
    inner = bars + f'<div class="muted"><small>{escape(note)}</small></div>'
    numbers = table(("set", "base", "aligned", "change", "95 %", "items"), rows)
    return f'<div class="block">{cards([card("Memory before and after", inner)])}</div>{numbers}'


def _memory_cell(entry: Mapping[str, Any], key: str) -> str:
    interval = interval_of(entry.get(key))
    if interval is not None:
        return f"{interval[0]:+.3g} to {interval[1]:+.3g}"
    value = entry.get(key)
    return f"{value:+.3g}" if key == "change" and is_number(value) else text_of(value)


# -- Cells ------------------------------------------------------------------------------------------------------------


def said(text: Any) -> str:
    """A text in a cell, escaped, with whitespace that would not be seen marked."""
    if text is None:
        return "\u2013"
    whole = str(text)
    if not whole:
        return '<span class="ws">(empty)</span>'
    shown = escape(whole[:LONGEST]) + (f" \u2026 ({len(whole):,} characters)" if len(whole) > LONGEST else "")
    shown = re.sub(r"^ +| +$|  +", lambda run: _mark("\u00b7" * len(run.group())), shown, flags=re.M)
    shown = shown.replace("\t", _mark("\u2192") + "\t")
    return f'<div class="said">{shown.replace(chr(10), _mark(chr(0x21B5)) + chr(10))}</div>'


def _mark(sign: str) -> str:
    return f'<span class="ws">{sign}</span>'


def _marks(scores: Any) -> str:
    if not isinstance(scores, Mapping) or not scores:
        return ""
    alone = len(scores) == 1
    told = ", ".join((text_of(value) if alone else f"{name} {text_of(value)}") for name, value in scores.items())
    return f'<div class="score">score {escape(told)}</div>'


def _first(scores: Any) -> float | None:
    value = next(iter(scores.values()), None) if isinstance(scores, Mapping) else None
    return float(value) if is_number(value) else None  # type: ignore[arg-type]


def _texts(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are HTML already."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="texts"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
