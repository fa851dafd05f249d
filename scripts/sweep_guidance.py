"""Sweep guidance scale, alpha and beta of negative adapters, over several runs, and draw what they gain.

    python scripts/sweep_guidance.py --negative runs/npo-0 runs/npo-1 --positive runs/dpo-0 runs/dpo-1 \\
        --out runs/negative.json --figure docs/images/negative_guidance.png --write docs/benchmarks/negative.md

Runs are run folders on one base; the k-th positive one goes with the k-th negative one. Every point is compared at the
same guidance scale, prompts and noise: the base with the negative adapter against the base, or both adapters against the
positive one alone. Intervals are bootstraps over prompts, the runs of a prompt together. Points that are in the file
already, with the same runs, are not repeated.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pages
import torch

from diffalign import adapters, export, rewards, statistics
from diffalign.config import RunConfig
from diffalign.config_loading import load_config
from diffalign.data.prompts import load_prompts
from diffalign.families import NETWORK, load_family
from diffalign.sampling import Sampler, to_float
from diffalign.sampling.guidance import NegativeGuidance

BAD, GOOD = "bad", "good"
Point = tuple[str, float, float, float]  # against what, guidance scale, alpha, beta


class Sweep:
    """Samples and scores one pair of runs at any point.

    Args:
        config: of the negative run.
        negative, positive: folders; no positive one: points against the base alone.
        prompts: number of evaluation prompts.
    """

    def __init__(self, config: RunConfig, negative: Path, positive: Path | None, prompts: int) -> None:
        self.config = config
        self.family = load_family(config.model)
        texts = load_prompts(config.evaluation.prompts, prompts)
        self.sampler = Sampler(self.family, texts, config.sampling, config.data.resolution)
        self.family.load(NETWORK)
        for name, folder in ((BAD, negative), (GOOD, positive)):
            if folder is not None:
                export.load_lora(self.family.network, folder, family=config.model.family, name=name, negative=True)
        self.rewards = {name: rewards.load(name) for name in config.evaluation.rewards}
        self.known: dict[tuple[Any, ...], dict[str, list[float]]] = {}

    def scores(self, scale: float, good: bool, alpha: float = 1.0, beta: float | None = None) -> dict[str, list[float]]:
        """Rewards of every prompt; beta None: plain guidance."""
        key = (scale, good, alpha, beta)
        if key not in self.known:
            self.sampler.sampling = replace(self.config.sampling, guidance_scale=scale)
            if good:
                adapters.use_adapters(self.family.network, [GOOD], [1.0])
            around = {} if beta is None else {"around": lambda p: NegativeGuidance(p, BAD, alpha=alpha, beta=beta)}
            images = self.sampler.images(
                range(len(self.sampler.prompts)), seed=self.config.evaluation.seed, adapters=good, **around
            )
            with torch.no_grad():
                self.known[key] = {
                    name: rewards.score(model, to_float(images), self.sampler.prompts).tolist()
                    for name, model in self.rewards.items()
                }
        return self.known[key]

    def at(self, point: Point) -> dict[str, dict[str, list[float]]]:
        """Scores of both sides."""
        against, scale, alpha, beta = point
        good = against == "positive"
        return {"without": self.scores(scale, good), "with": self.scores(scale, good, alpha, beta)}


def points(args: argparse.Namespace) -> list[Point]:
    """A cross through (scale, alpha 1, beta 1), against the base and against the positive adapter."""
    scale = args.scale
    found: list[Point] = [("base", w, 1.0, 1.0) for w in args.scales] + [("base", scale, 1.0, b) for b in args.betas]
    if args.positive:
        found += [("positive", w, 1.0, 1.0) for w in args.scales] + [("positive", scale, 1.0, b) for b in args.betas]
        found += [("positive", scale, a, 1.0) for a in args.alphas]
    return list(dict.fromkeys(found))


def gains(entry: dict[str, Any], reward: str) -> Any:
    sides = [np.array([run[side][reward] for run in entry["runs"]]).T for side in ("without", "with")]
    return statistics.mean_gain(*sides)


def draw(found: dict[Point, dict[str, Any]], args: argparse.Namespace, names: list[str], path: Path) -> None:
    """Gain by guidance scale, beta and alpha; bands are intervals."""
    panels = [
        ("guidance scale", 1, lambda p: p[2] == p[3] == 1),
        ("beta", 3, lambda p: p[1] == args.scale and p[2] == 1),
        ("alpha (beta 1)", 2, lambda p: p[1] == args.scale and p[3] == 1),
    ]
    panels = [
        panel for panel in panels if len([p for p in found if panel[2](p)]) > 1 and (args.positive or panel[1] != 2)
    ]
    width = len(panels)
    figure, axes = plt.subplots(len(names), width, figsize=(3.4 * width, 2.9 * len(names)), squeeze=False, sharey="row")
    for row, reward in enumerate(names):
        for axis, (title, place, wanted) in zip(axes[row], panels):
            for against, colour in (("base", "#2f6db3"), ("positive", "#c4602a")):
                chosen = sorted((p for p in found if p[0] == against and wanted(p)), key=lambda p: p[place])
                if not chosen or (against == "base" and place == 2):
                    continue
                estimates = [gains(found[p], reward) for p in chosen]
                x = [p[place] for p in chosen]
                label = "over the base" if against == "base" else "over the positive adapter"
                axis.plot(x, [e.mean for e in estimates], color=colour, marker="o", markersize=3, label=label)
                axis.fill_between(
                    x, [e.ci_low for e in estimates], [e.ci_high for e in estimates], color=colour, alpha=0.15, lw=0
                )
            axis.axhline(0, color="#888", linewidth=0.8)
            axis.set_xlabel(title)
        axes[row][0].set_ylabel(f"gain, {reward}", fontsize=8)
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def table(found: dict[Point, dict[str, Any]], names: list[str]) -> str:
    lines = [
        "| against | guidance | alpha | beta |" + "".join(f" {n}: gain, 95 % interval |" for n in names) + " by run |"
    ]
    lines.append("| --- " * (5 + len(names)) + "|")
    for point in sorted(found):
        against, scale, alpha, beta = point
        cells = [against, f"{scale:g}", f"{alpha:g}", f"{beta:g}"]
        for name in names:
            gain = gains(found[point], name)
            cells.append(f"{gain.mean:+.3f} [{gain.ci_low:+.3f}, {gain.ci_high:+.3f}]")
        runs = [np.mean(r["with"][names[0]]) - np.mean(r["without"][names[0]]) for r in found[point]["runs"]]
        cells.append(", ".join(f"{gain:+.3f}" for gain in runs))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--negative", type=Path, nargs="+", required=True)
    parser.add_argument("--positive", type=Path, nargs="*", default=[])
    parser.add_argument("--scale", type=float, default=3.0, help="guidance scale at which alpha and beta are swept")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.5, 2.0, 3.0, 4.0, 5.0])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.25, 0.5, 1.0, 1.5, 2.0])
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON of the scores")
    parser.add_argument("--figure", type=Path, default=None)
    parser.add_argument("--write", type=Path, default=None, help="put the table between the marks of this page")
    parser.add_argument("--mark", default="sweep")
    args = parser.parse_args()
    if args.positive and len(args.positive) != len(args.negative):
        raise SystemExit(f"{len(args.positive)} positive and {len(args.negative)} negative runs; expected as many")
    if args.threads:
        torch.set_num_threads(args.threads)
    runs = [folder.name for folder in (*args.negative, *args.positive)]
    stored = json.loads(args.out.read_text()) if args.out.is_file() else {}
    if stored.get("runs") != runs:
        stored = {"runs": runs, "points": []}
    found: dict[Point, dict[str, Any]] = {tuple(entry["point"]): entry for entry in stored["points"]}
    todo = [point for point in points(args) if point not in found]
    names = list(load_config(str(args.negative[0] / "config.yaml")).evaluation.rewards)
    if todo:
        made: dict[Point, list[Any]] = {point: [] for point in todo}
        for number, negative in enumerate(args.negative):
            config = load_config(str(negative / "config.yaml"))
            sweep = Sweep(config, negative, args.positive[number] if args.positive else None, args.prompts)
            for point in todo:
                made[point].append(
                    {
                        side: {name: [round(v, 4) for v in values] for name, values in by.items()}
                        for side, by in sweep.at(point).items()
                    }
                )
                print(f"{negative.name} {point}", flush=True)
        found |= {point: {"point": list(point), "runs": entries} for point, entries in made.items()}
        args.out.write_text(json.dumps({"runs": runs, "points": [found[p] for p in sorted(found)]}))
    if args.figure is not None:
        draw(found, args, names, args.figure)
    text = table(found, names)
    if args.write is None:
        print(text)
        return
    pages.put(args.write, args.mark, text)


if __name__ == "__main__":
    main()
