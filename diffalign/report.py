"""One self-contained HTML file per run, and one that compares several.

A report is written from whatever a run folder holds; what a killed run did not write is left out with a line that
says so.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from diffalign._charts import interval_plot
from diffalign._curves import by_timestep, compare_curves, curves
from diffalign._page import card, cards, collapsed, missing, page, section, table
from diffalign._report_reward import judged
from diffalign._report_text import text_samples, unlearning
from diffalign._run_data import RunData, duration, get, interval_of, is_number, read_json, read_run, row_counts, text_of
from diffalign.errors import UserError
from diffalign.files import atomic_write_text
from diffalign.health import UNITS
from diffalign.model_card import caveats

REPORT, COMPARISON = "report.html", "comparison.html"
_SMALL = 128  # pixels; smaller images are shown with hard pixels, as they are
_SHOWN = 448  # larger ones are embedded at this size: 24 full SDXL images would be 40 MB


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder.

    Raises:
        UserError: the folder holds neither `config.yaml` nor `metrics.jsonl`.
    """
    run = read_run(run_dir)
    document = page(
        f"{run.name} · diffalign",
        [
            _header(run),
            section("Result", _result(run)),
            section("Alarms", _alarms(run)),
            section("Before and after", _before_and_after(run)),
            section("Curves", curves(run)),
            section("By timestep", by_timestep(run)),
            section("Data", _data(run)),
            section("Configuration", _configuration(run)),
            section("Environment", _environment(run)),
        ],
    )
    path = run.folder / REPORT
    atomic_write_text(path, document)
    return path


def render_index(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write one page that compares runs: results in a table, smoothed curves over each other.

    Args:
        runs: run folders.
        out: the file; None writes `comparison.html` beside the first run.

    Raises:
        UserError: no run given, or one that is no run folder.
    """
    if not runs:
        raise UserError(
            "report: got no run folder; expected one or more, such as: diffalign report out/run_a out/run_b"
        )
    data = [read_run(run) for run in runs]
    out = out or data[0].folder.resolve().parent / COMPARISON
    names = [run.name for run in data]
    if len(set(names)) < len(names):
        names = [f"{run.folder.resolve().parent.name}/{run.name}" for run in data]
    document = page(
        "Comparison · diffalign",
        [
            f"<h1>Comparison of {len(data)} runs</h1>",
            missing("Curves are smoothed; each run's own report has the rest."),
            section("Results", _compare_results(data, names, out.parent)),
            section("Curves", cards(compare_curves(data, names))),
        ],
    )
    atomic_write_text(out, document)
    return out


# -- Sections ---------------------------------------------------------------------------------------------------------


def _header(run: RunData) -> str:
    parts = [
        get(run.config, "objective", "name"),
        get(run.config, "model", "pretrained"),
        get(run.config, "data", "format"),
        f"text encoders r{rank}" if (rank := get(run.config, "lora", "text_encoder_rank")) else None,
    ]
    last = run.rows[-1]["step"] if run.rows else None
    total = get(run.config, "training", "max_train_steps")
    if last is not None:
        parts.append(f"step {last} of {total}" if isinstance(total, int) else f"step {last}")
    seed = get(run.config, "seed")
    parts.append(None if seed is None else f"seed {seed}")
    line = " · ".join(escape(str(part)) for part in parts if part is not None)
    return f'<h1>{escape(run.name)}</h1><p class="muted">{line}</p>'


def _before_and_after(run: RunData) -> str:
    if run.is_reward:
        return ""
    return text_samples(run) if run.is_text else _samples(run.folder)


def _result(run: RunData) -> str:
    result = run.result
    if result is None:
        return missing("No result.json: this run was not evaluated, or it did not finish.")
    if run.is_reward:
        told = [(name.replace("_", " "), text_of(value)) for name, value in result.items()]
        return (
            judged(result)
            + cards([_cost_card(result)], "tiles")
            + collapsed("Everything in result.json", table((), told))
        )
    metric = str(result.get("metric", "metric"))
    notes = "".join(f"<p><small>{escape(note).replace('`', '')}</small></p>" for note in caveats(run.config, result))
    rest = [(name.replace("_", " "), text_of(value)) for name, value in result.items() if name != "rewards"]
    tiles = cards([_means_card(metric, result), _rate_card(result), _gain_card(result), _cost_card(result)], "tiles")
    return (
        tiles
        + unlearning(result)
        + _rewards(result)
        + _preference(result)
        + notes
        + (collapsed("Everything in result.json", table((), rest)) if rest else "")
    )


def _rewards(result: Mapping[str, Any]) -> str:
    """All rewards, where there are several; the first is the one in the tiles."""
    rewards = [entry for entry in result.get("rewards") or () if isinstance(entry, Mapping)]
    if len(rewards) < 2:
        return ""
    names = ("reward", "base_mean", "aligned_mean", "win_rate", "win_rate_ci95", "gain", "gain_ci95", "p_value")
    rows = [[_cell(entry.get(name)) for name in names] for entry in rewards]
    head = ("reward", "base", "aligned", "win rate", "95 %", "gain", "95 %", "p (sign test)")
    return f'<div class="block">{table(head, rows)}</div>'


def _preference(result: Mapping[str, Any]) -> str:
    """How held-out pairs are ranked by each reward, with the weights the network was told or trained on."""
    found = result.get("preference")
    if not isinstance(found, Mapping) or not found.get("rewards"):
        return ""
    names = [str(name) for name in found["rewards"]]
    rows = [
        (
            ", ".join(f"{weight:g} {name}" for weight, name in zip(entry["weights"], names, strict=True)),
            *(f"{entry[name]['accuracy']:.3f} of {entry[name]['pairs']}" if name in entry else "" for name in names),
        )
        for entry in found.get("held_out") or ()
    ]
    how = "fixed weights" if found.get("fixed") else "weights that the network is told"
    told = f"<p><small>Pairs were judged by {how} of {escape(', '.join(names))}.</small></p>"
    if not rows:
        return told
    head = ("held-out pairs ranked right", *(f"by {name}" for name in names))
    return f'<div class="block">{told}{table(head, rows)}</div>'


def _cell(value: Any) -> str:
    interval = interval_of(value)
    return text_of(value) if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}"


def _means_card(metric: str, result: Mapping[str, Any]) -> str:
    base, aligned = result.get("base_mean"), result.get("aligned_mean")
    if not isinstance(base, (int, float)) or not isinstance(aligned, (int, float)):
        return ""
    inner = (
        f'<div class="big">{base:.4g} → {aligned:.4g}</div>'
        f'<div class="muted">{escape(f"{aligned - base:+.3g}, base to aligned")}</div>'
    )
    return card(f"Mean {metric}", inner)


def _rate_card(result: Mapping[str, Any]) -> str:
    rate, interval = result.get("win_rate"), interval_of(result.get("win_rate_ci95"))
    if not isinstance(rate, (int, float)):
        return ""
    inner = f'<div class="big">{rate:.1%}</div>'
    if interval is not None:
        label = f"win rate {rate:.1%}, 95 % interval {interval[0]:.1%} to {interval[1]:.1%}"
        inner += interval_plot(rate, *interval, limits=(0.0, 1.0), neutral=0.5, label=label)
        told = f"95 % interval {interval[0]:.1%} to {interval[1]:.1%}. {_verdict(interval, 0.5, 'one half')}"
        inner += f'<div class="muted"><small>{told}</small></div>'
    return card("Win rate", inner)


def _gain_card(result: Mapping[str, Any]) -> str:
    interval = interval_of(result.get("gain_ci95"))
    if interval is None:
        return ""
    low, high = interval
    base, aligned, stated = (result.get(name) for name in ("base_mean", "aligned_mean", "gain"))
    if is_number(stated):
        gain = float(stated)  # type: ignore[arg-type]
    else:
        gain = aligned - base if is_number(base) and is_number(aligned) else (low + high) / 2  # type: ignore[operator]
    span = max(abs(low), abs(high), 1e-9) * 1.15
    label = f"mean gain {gain:.3g}, 95 % interval {low:.3g} to {high:.3g}"
    inner = f'<div class="big">{gain:+.3g}</div>'
    inner += interval_plot(
        gain, low, high, limits=(min(-0.15 * span, 1.1 * low), max(0.15 * span, 1.1 * high)), neutral=0.0, label=label
    )
    told = f"95 % interval {low:.3g} to {high:.3g}. {_verdict(interval, 0.0, '0')}"
    inner += f'<div class="muted"><small>{told}</small></div>'
    return card("Mean gain", inner)


def _cost_card(result: Mapping[str, Any]) -> str:
    rows = [
        ("steps", result.get("steps")),
        *((unit, result.get(unit)) for unit in UNITS),
        ("seconds per step", result.get("seconds_per_step")),
        ("training", duration(result.get("train_seconds"))),
        ("held-out accuracy", _accuracy(result)),
    ]
    shown = [(name, text_of(value)) for name, value in rows if value is not None]
    return card("Cost and size", table((), shown)) if shown else ""


def _accuracy(result: Mapping[str, Any]) -> str | None:
    value, interval = result.get("held_out_implicit_acc"), interval_of(result.get("held_out_implicit_acc_ci95"))
    if not is_number(value):
        return None
    return f"{value:.3f}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")


def _verdict(interval: tuple[float, float], neutral: float, name: str) -> str:
    if interval[0] > neutral:
        return f"It lies above {name}: better than the base by this metric."
    if interval[1] < neutral:
        return f"It lies below {name}: worse than the base by this metric."
    return f"It contains {name}: no difference from the base is shown."


def _alarms(run: RunData) -> str:
    if not run.alarms:
        return missing("None." if run.rows else "No metrics, hence no alarms.")
    lines = []
    for row in run.alarms:
        kind = "note" if row.get("level") == "notice" else "alarm"
        lines.append(
            f'<div class="{kind}"><b>Step {row["step"]} · {escape(str(row["alarm"]).replace("_", " "))}</b><br>'
            f"{escape(_sentence(str(row.get('message', ''))))}</div>"
        )
    return "".join(lines)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?")) else ".")


def _samples(folder: Path) -> str:
    index = read_json(folder / "samples" / "index.json")
    files = get(index, "files") if index else None
    if isinstance(files, Mapping) and any(str(step).isdigit() for step in files):
        return _sample_cards(folder, index or {}, files)
    pair = [(name, _embed(folder / "samples" / f"{name}.png")) for name in ("before", "after")]
    shown = [f"<figure>{image}<figcaption>{name}</figcaption></figure>" for name, image in pair if image]
    return f'<div class="pair">{"".join(shown)}</div>' if shown else missing("No samples were written.")


def _sample_cards(folder: Path, index: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    steps = sorted((step for step in files if str(step).isdigit()), key=int)
    # Base, the middle, the last: three columns are what a phone can show.
    steps = steps if len(steps) <= 3 else [steps[0], steps[len(steps) // 2], steps[-1]]
    names = {step: f"step {step}" for step in steps} | {steps[0]: "base" if int(steps[0]) == 0 else f"step {steps[0]}"}
    prompts = [str(prompt) for prompt in index.get("prompts") or ()]
    items = []
    for i in range(max(len(files[step]) for step in steps)):
        prompt = prompts[i] if i < len(prompts) else f"prompt {i}"
        shots = [_figure(folder, files[step], i, prompt, names[step], step == steps[-1] != steps[0]) for step in steps]
        grid = (
            f'<div class="shots" style="grid-template-columns:repeat({max(2, len(steps))},1fr)">{"".join(shots)}</div>'
        )
        items.append(f'<div class="card"><h3>{escape(prompt)}</h3>{grid}</div>')
    if len(steps) == 1:
        return missing("Only one set of samples so far.") + cards(items)
    note = "Same prompt and same noise in every column. Hold an outlined image to see the first one in its place."
    return missing(note) + cards(items)


def _figure(folder: Path, files: Sequence[str], i: int, prompt: str, caption: str, last: bool) -> str:
    image = _embed(folder / str(files[i]), f"{prompt}, {caption}") if i < len(files) else ""
    label = escape(caption)
    if i < len(files) and (clip := Path(str(files[i])).with_suffix(".webp")) and (folder / clip).is_file():
        label += f' · <a href="{escape(clip.as_posix())}">clip</a>'  # its frames are side by side in the image
    return f"<figure{' class=last' if last else ''}>{image or '–'}<figcaption>{label}</figcaption></figure>"


def _embed(path: Path, alt: str = "") -> str:
    """An `<img>` with its data inside; an empty string if the file is missing or broken."""
    try:
        with Image.open(path) as image:
            small = max(image.size) <= _SMALL
            shown = image.convert("RGB")
            shown.thumbnail((_SHOWN, _SHOWN) if alt else (1200, 1200))
    except OSError:
        return ""
    buffer, kind = io.BytesIO(), "png" if small else "jpeg"
    shown.save(buffer, kind, **({} if small else {"quality": 88}))
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img{" class=small" if small else ""} alt="{escape(alt or path.stem)}" src="data:image/{kind};base64,{data}">'
    )


def _data(run: RunData) -> str:
    report = run.data_report
    if report is None:
        return missing("No data_report.json.")
    parts = [table(("rows", "count", ""), [(what, f"{n:,}", kind) for what, n, kind in row_counts(report)])]
    for group in ("skipped", "notes"):
        for reason, entry in (report.get(group) or {}).items():
            if listed := get(entry, "listed"):
                rows = table((), [[text_of(item)] for item in listed[:20]])
                parts.append(collapsed(f"{reason.replace('_', ' ')}: the first {min(len(listed), 20)}", rows))
    parts += [
        collapsed(name.replace("_", " "), f"<pre>{escape(_yaml(report[name]))}</pre>")
        for name in ("source", "bad_shards")
        if report.get(name)
    ]
    return "".join(parts)


def _configuration(run: RunData) -> str:
    if not run.config:
        return missing("No readable config.yaml.")
    card_line = (
        '<p>How to use the adapter: <a href="README.md">README.md</a></p>'
        if (run.folder / "README.md").is_file()
        else ""
    )
    return card_line + collapsed("The resolved config.yaml", f"<pre>{escape(_yaml(run.config))}</pre>")


def _yaml(tree: Any) -> str:
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


def _environment(run: RunData) -> str:
    if not run.environment:
        return missing("Not recorded.")
    return table((), [(str(name), text_of(value)) for name, value in run.environment.items()])


# -- Comparison -------------------------------------------------------------------------------------------------------


def _compare_results(data: Sequence[RunData], names: Sequence[str], where: Path) -> str:
    rows = []
    for run, name in zip(data, names):
        result = run.result or {}
        interval = interval_of(result.get("win_rate_ci95")) or interval_of(result.get("gain_ci95"))
        link = os.path.relpath(run.folder.resolve() / REPORT, where.resolve())
        own = f'<a href="{escape(link)}">{escape(name)}</a>' if (run.folder / REPORT).is_file() else escape(name)
        last = run.rows[-1]["step"] if run.rows else None
        cells = [
            get(run.config, "objective", "name"),
            last,
            result.get("metric"),
            result.get("base_mean"),
            result.get("aligned_mean"),
            result.get("win_rate"),
            None if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}",
            sum(1 for row in run.alarms if row.get("level") != "notice"),
        ]
        rows.append(f"<tr><td>{own}</td>{''.join(f'<td>{escape(text_of(cell))}</td>' for cell in cells)}</tr>")
    head = ("run", "objective", "last step", "metric", "base", "aligned", "win rate", "95 % interval", "alarms")
    top = "".join(f"<th>{title}</th>" for title in head)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
