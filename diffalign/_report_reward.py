"""What a report shows of a trained reward model: accuracy, calibration, and others on the same pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffalign._charts import Series, interval_plot, line_chart
from diffalign._page import card, cards, table
from diffalign._run_data import interval_of, is_number, text_of


def judged(result: Mapping[str, Any]) -> str:
    """Tiles and tables of a reward training run; empty for other runs."""
    if not is_number(result.get("held_out_accuracy")):
        return ""
    return cards([_accuracy(result), _reliability(result)], "cards") + _others(result) + _aspects(result)


def _accuracy(result: Mapping[str, Any]) -> str:
    rate, interval = result["held_out_accuracy"], interval_of(result.get("held_out_accuracy_ci95"))
    inner = f'<div class="big">{rate:.1%}</div>'
    if interval is not None:
        label = f"accuracy {rate:.1%}, 95 % interval {interval[0]:.1%} to {interval[1]:.1%}"
        inner += interval_plot(rate, *interval, limits=(0.0, 1.0), neutral=0.5, label=label)
        told = f"95 % interval {interval[0]:.1%} to {interval[1]:.1%}; one half is chance"
        inner += f'<div class="muted"><small>{told}</small></div>'
    rows = [
        ("before training", result.get("held_out_accuracy_before")),
        ("with ties", result.get("accuracy_with_ties")),
        ("pairs", result.get("held_out_pairs")),
        ("of these ties", result.get("held_out_ties")),
        ("prompts", result.get("held_out_prompts")),
    ]
    return card("Held-out accuracy", inner + table((), [(name, text_of(v)) for name, v in rows if v is not None]))


def _reliability(result: Mapping[str, Any]) -> str:
    """The reliability curve, in per cent: on the diagonal, 80 % sure is right in 80 % of the cases."""
    curve = result.get("reliability")
    if not isinstance(curve, Mapping) or not curve.get("confidence"):
        return ""
    x, y = ([100 * value for value in curve[name]] for name in ("confidence", "accuracy"))
    chart = line_chart(
        [Series("right", x, y), Series("perfect", [50.0, 100.0], [50.0, 100.0], 1)],
        label="share of right predictions over predicted probability, in per cent",
        y_range=(0.0, 100.0),
        raw=False,
        smoothed=False,
    )
    error, fitted = result.get("calibration_error"), result.get("calibration_error_at_temperature")
    told = f"Expected calibration error {error:.3f}" if is_number(error) else ""
    if is_number(fitted):
        told += (
            f"; {fitted:.3f} with logits divided by {result['calibration_temperature']:.2f}, fitted on the other half"
        )
    legend = [("right, of predictions with that probability", 0), ("perfectly calibrated", 1)]
    return card("Calibration", f'{chart}<div class="muted"><small>{told}</small></div>', legend=legend)


def _others(result: Mapping[str, Any]) -> str:
    rows = []
    for entry in result.get("other_rewards") or ():
        interval = interval_of(entry.get("ci95"))
        rows.append(
            (
                str(entry["name"]),
                f"{entry['accuracy']:.1%}",
                f"{interval[0]:.1%} to {interval[1]:.1%}" if interval else "",
            )
        )
    return f'<div class="block">{table(("on the same pairs", "accuracy", "95 %"), rows)}</div>' if rows else ""


def _aspects(result: Mapping[str, Any]) -> str:
    found = result.get("held_out_accuracy_by_aspect")
    if not found:
        return ""
    rows = [(str(a), "no pair" if rate is None else f"{rate:.1%}") for a, rate in enumerate(found)]
    if (rate := result.get("held_out_accuracy_overall")) is not None:
        rows.append(("the gated score", f"{rate:.1%}"))
    return f'<div class="block">{table(("aspect", "held-out accuracy"), rows)}</div>'
