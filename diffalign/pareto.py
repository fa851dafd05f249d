"""Several preferences against each other: mixtures of adapters, whole runs, and one adapter told several weights, measured
by two rewards and drawn.

A point is *dominated* if another one is at least as good by both rewards and better by one. The area that the front encloses
with the base (a hypervolume) says in one number how far it reaches: of two ways to make a front, the one with the larger
area offers better trades.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from diffalign import adapters, rewards, statistics
from diffalign._charts import Scatter, scatter
from diffalign._page import card, cards, missing, page, section, table
from diffalign.config import RunConfig
from diffalign.errors import ConfigError
from diffalign.evaluate import score_all
from diffalign.files import atomic_write_text
from diffalign.progress import Progress
from diffalign.sampling import Sampler

NAMES = {"mixture": "mixtures of adapters", "run": "runs", "preference": "one adapter, told weights"}


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one mixture or run makes of the prompts.

    Attributes:
        label: for people.
        kind: "base", "mixture", "run" or "preference".
        weights: of a mixture, or what an adapter was told.
        means: by reward.
        gains: over the base by reward: mean and 95 % interval.
        scores: by reward, one number per prompt.
    """

    label: str
    kind: str
    weights: tuple[float, ...] = ()
    means: dict[str, float]
    gains: dict[str, tuple[float, float, float]]
    scores: dict[str, list[float]]


class Measuring:
    """Samples a network as it is and scores the images, always on the same prompts and noise.

    Args:
        sampler: over the evaluation prompts.
        config: rewards, images per prompt, seed.
        device: of the rewards.
    """

    def __init__(self, sampler: Sampler, config: RunConfig, device: Any) -> None:
        self.sampler, self.evaluation, self.device = sampler, config.evaluation, device
        if len(config.evaluation.rewards) < 2:
            raise ConfigError(
                f"evaluation.rewards: got {len(config.evaluation.rewards)}; a front needs at least 2, and shows the first "
                "two"
            )
        self.base: dict[str, np.ndarray[Any, Any]] | None = None

    def point(
        self, label: str, kind: str, weights: Sequence[float] = (), *, on: bool = True, told: Tensor | None = None
    ) -> Point:
        """Measure the network with its adapters on or off; a network that sees preferences is told (K,), or nothing."""
        self.sampler.users = None if told is None else told.expand(len(self.sampler.prompts), -1)
        count = self.evaluation.images_per_prompt
        with Progress(f"sampling {label}", len(self.sampler.prompts) * count) as progress:
            images = self.sampler.images(
                range(len(self.sampler.prompts)),
                seed=self.evaluation.seed,
                repeats=count,
                adapters=on,
                progress=progress.advance,
            )
        prompts = [prompt for prompt in self.sampler.prompts for _ in range(count)]
        scores = {
            name: score_all(rewards.load(name, device=self.device), images, prompts).view(-1, count).numpy()
            for name in self.evaluation.rewards
        }
        if self.base is None:
            self.base = scores
        gains = {name: statistics.mean_gain(self.base[name], values) for name, values in scores.items()}
        return Point(
            label=label,
            kind=kind,
            weights=tuple(weights),
            means={name: float(values.mean()) for name, values in scores.items()},
            gains={name: (gain.mean, gain.ci_low, gain.ci_high) for name, gain in gains.items()},
            scores={name: [round(float(v), 4) for v in values.mean(1)] for name, values in scores.items()},
        )


def mixture(network: nn.Module, names: Sequence[str], weights: Sequence[float]) -> None:
    """Let adapters act by weight; those of weight 0 not at all."""
    chosen = [(name, weight) for name, weight in zip(names, weights, strict=True) if weight]
    adapters.use_adapters(network, [name for name, _ in chosen], [weight for _, weight in chosen])


def dominated(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of every point whether another one is at least as good in both and better in one."""
    return [
        any(a >= x and b >= y and (a > x or b > y) for j, (a, b) in enumerate(points) if j != i)
        for i, (x, y) in enumerate(points)
    ]


def area(points: Sequence[tuple[float, float]], corner: tuple[float, float]) -> float:
    """What a front encloses with a corner: the area of all that some point is at least as good as, beyond the corner."""
    total, top = 0.0, corner[1]
    for x, y in sorted(points, reverse=True):
        if x > corner[0] and y > top:
            total += (x - corner[0]) * (y - top)
            top = y
    return total


def write(points: Sequence[Point], out: Path, title: str) -> Path:
    """Write `<out>.json` with all numbers and `<out>.html` with the picture; returns the page."""
    names = list(points[0].means)[:2]
    places = [(point.means[names[0]], point.means[names[1]]) for point in points]
    beaten, base = dominated(places), places[0]
    areas = {kind: area([p for p, point in zip(places, points) if point.kind == kind], base) for kind in NAMES}
    areas = {kind: value for kind, value in areas.items() if any(point.kind == kind for point in points)}
    data = {
        "rewards": names,
        "points": [asdict(p) | {"dominated": b} for p, b in zip(points, beaten, strict=True)],
        "area": areas,
    }
    atomic_write_text(out.with_suffix(".json"), json.dumps(data, indent=1))
    kinds = (*NAMES, "base")
    series = [
        Scatter(
            name=NAMES.get(kind, "base"),
            points=[(*place, point.label) for place, point in zip(places, points) if point.kind == kind],
            colour=colour,
            line=kind != "base",
        )
        for colour, kind in enumerate(kinds)
        if any(point.kind == kind for point in points)
    ]
    picture = scatter(series, x_label=names[0], y_label=names[1], label=title)
    said = "; ".join(f"{NAMES[kind]} {value:.4f}" for kind, value in areas.items())
    rows = [
        (
            point.label,
            *(f"{point.means[name]:.4f}" for name in names),
            *(f"{g:+.4f} [{low:+.4f}, {high:+.4f}]" for g, low, high in (point.gains[name] for name in names)),
            "dominated" if worse else "",
        )
        for point, worse in zip(points, beaten, strict=True)
    ]
    head = ("", *names, *(f"gain, {name}" for name in names), "")
    document = page(
        f"{title} · diffalign",
        [
            f"<h1>{escape(title)}</h1>",
            missing("Every point: the same prompts and noise. Intervals are bootstraps over prompts."),
            cards(
                [
                    card(
                        "Front",
                        picture,
                        now=f"area beyond the base: {said}",
                        legend=[(s.name, s.colour) for s in series],
                    )
                ]
            ),
            section("Points", table(head, rows)),
        ],
    )
    atomic_write_text(out.with_suffix(".html"), document)
    return out.with_suffix(".html")
