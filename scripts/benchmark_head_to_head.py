"""Race objectives from one base to the same held-out reward: image forwards and seconds, seed by seed, with curves.

    python scripts/benchmark_head_to_head.py --only demo_nft demo_flow_grpo --base tiny-sd3 --steps 96 --every 8 \\
        --figure docs/images/nft_flow_grpo.png --write docs/benchmarks/online.md --mark nft

Every run is watched every so many steps on the same held-out prompts and noise, drawn as the evaluation draws. The target
of a seed is a gain over the base: `--share` of the smallest of the objectives' best gains, so that all reach it.
Forwards and seconds to the target are read off the curve between two looks; looks themselves cost neither. A forward is an
image that goes through the network, with gradient or without; seconds are those of training steps and sampling.

Curves are kept in --store, one line a run; a run whose line is there is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pages

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / "docs" / "benchmarks" / "head_to_head.jsonl"
FAMILIES = {"tiny-sdxl": "sdxl", "tiny-sd3": "sd3"}
COLOURS = ("#2f6db3", "#c4602a", "#3d8b57", "#8a4fa3", "#b3942f")
WRITING = Lock()


def stored(store: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in store.read_text().splitlines()] if store.is_file() else []


def same(result: dict[str, Any], name: str, base: str, seed: int, args: argparse.Namespace) -> bool:
    wanted = (name, base, seed, args.steps, args.every, args.prompts, args.set, args.reward)
    return (
        tuple(result[key] for key in ("demo", "base", "seed", "steps", "every", "prompts", "set", "reward")) == wanted
    )


def run(name: str, base: str, seed: int, args: argparse.Namespace) -> None:
    """Train one demo with looks, and keep its curve."""
    if any(same(result, name, base, seed, args) for result in stored(args.store)):
        return
    out = args.out / f"{name}-{base}-{seed}"
    if out.exists():
        shutil.rmtree(out)
    changes = [
        f"output_dir={out}",
        f"seed={seed}",
        f"model.family={FAMILIES[base]}",
        f"model.pretrained={base}",
        f"training.max_train_steps={args.steps}",
        "training.threads=1",
        "training.checkpointing_steps=100000",
        "training.sample_steps=0",
        "training.logging_steps=1",
        "evaluation.at_end=false",
        f"evaluation.every={args.every}",
        f"evaluation.num_prompts={args.prompts}",
        f"evaluation.watch_prompts={args.prompts}",
        *args.set,
    ]
    log = args.out / f"{out.name}.log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "diffalign", "train", name, *changes]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, check=False).returncode
    if code:
        print(f"{out.name}: exit status {code}, see {log}", flush=True)
        return
    curve = read(out, args.reward)
    if len(curve) == 1:
        print(f"{out.name}: {args.reward} is none of its evaluation.rewards; nothing is kept", flush=True)
        return
    result = {
        "demo": name,
        "base": base,
        "seed": seed,
        "steps": args.steps,
        "every": args.every,
        "prompts": args.prompts,
        "set": args.set,
        "reward": args.reward,
        "curve": curve,
    }
    with WRITING, args.store.open("a") as file:
        file.write(json.dumps(result, sort_keys=True) + "\n")
    best = max(curve, key=lambda point: point[3])
    print(f"{out.name}: best {best[3]:+.3f} at step {best[0]}, {best[1]:.0f} forwards, {best[2]:.0f} s", flush=True)


def read(out: Path, reward: str) -> list[list[float]]:
    """(step, image forwards, seconds of training, mean gain over the base) of every look, from the base on."""
    points, seconds = [[0, 0.0, 0.0, 0.0]], 0.0
    for text in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(text)
        seconds += row.get("seconds_per_step", 0.0)
        if (gain := row.get(f"eval/{reward}/gain")) is not None:
            points.append([row["step"], row["image_forwards"], round(seconds, 2), round(gain, 5)])
    return points


def reached(curve: list[list[float]], target: float, column: int) -> float:
    """Where a curve first passes a gain, between two looks in proportion; infinite if it never does."""
    for before, after in itertools.pairwise(curve):
        if after[3] >= target:
            share = (target - before[3]) / (after[3] - before[3]) if after[3] > before[3] else 1.0
            return before[column] + max(0.0, share) * (after[column] - before[column])
    return float("inf")


def curves_of(args: argparse.Namespace) -> dict[str, list[list[list[float]]]]:
    """Of every demo, by seed.

    Raises:
        SystemExit: one is missing.
    """
    store = stored(args.store)
    found = {
        name: {r["seed"]: r["curve"] for r in store for seed in args.seeds if same(r, name, args.base, seed, args)}
        for name in args.only
    }
    missing = [f"{name}, seed {seed}" for name, known in found.items() for seed in args.seeds if seed not in known]
    if missing:
        raise SystemExit(f"no curve of {'; '.join(missing)}: run it, or name other --seeds")
    return {name: [known[seed] for seed in args.seeds] for name, known in found.items()}


def race(args: argparse.Namespace) -> str:
    """Markdown: what each objective needs to the target of a seed, and ratios to the first one named, median and by seed."""
    costs = ("steps", "forwards", "seconds")
    titles = ["objective", "best gain, by seed", "target, by seed", *(f"{what} to it, by seed" for what in costs)]
    titles += [f"{what}, ratio" for what in costs]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    curves = curves_of(args)
    first = args.only[0]
    best = {name: [max(point[3] for point in curve) for curve in found] for name, found in curves.items()}
    targets = [args.share * min(gains) for gains in zip(*best.values(), strict=True)]
    costs_of = {
        name: [[reached(c, target, column) for c, target in zip(found, targets, strict=True)] for column in range(3)]
        for name, found in curves.items()
    }
    for name, cost in costs_of.items():
        ratios = [
            [x / y for x, y in zip(one, two, strict=True)] for one, two in zip(cost, costs_of[first], strict=True)
        ]
        cells = [
            f"`{name.removeprefix('demo_')}`",
            ", ".join(f"{gain:+.3f}" for gain in best[name]),
            ", ".join(f"{target:+.3f}" for target in targets),
            *(", ".join(f"{x:,.0f}" for x in one) for one in cost),
            *("1" if name == first else f"{np.median(r):.2f} ({', '.join(f'{x:.2f}' for x in r)})" for r in ratios),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(args: argparse.Namespace) -> None:
    """Gain against forwards and against seconds: thin lines are seeds, the thick one their mean by step."""
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.3), sharey=True)
    for colour, (name, found) in zip(COLOURS, curves_of(args).items(), strict=False):
        curves = [np.array(c) for c in found]
        for axis, column in zip(axes, (1, 2), strict=True):
            for curve in curves:
                axis.plot(curve[:, column], curve[:, 3], color=colour, alpha=0.3, linewidth=0.8)
            middle = np.mean(curves, axis=0)
            axis.plot(middle[:, column], middle[:, 3], color=colour, linewidth=2, label=name.removeprefix("demo_"))
    for axis, label in zip(axes, ("image forwards", "seconds, one thread"), strict=True):
        axis.axhline(0, color="#888", linewidth=0.8)
        axis.set_xlabel(label)
    axes[0].set_ylabel(f"gain over the base, {args.reward}", fontsize=8)
    axes[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.figure, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", required=True, help="demos; the others are compared with the first")
    parser.add_argument("--base", choices=sorted(FAMILIES), default="tiny-sdxl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--every", type=int, default=8, help="steps between two looks")
    parser.add_argument("--prompts", type=int, default=128, help="held-out prompts of a look")
    parser.add_argument("--share", type=float, default=0.8, help="of the smallest best gain of a seed: its target")
    parser.add_argument("--reward", default="world_taste:outlined")
    parser.add_argument("--out", type=Path, default=Path("runs/head_to_head"))
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--set", nargs="*", default=[], help="further overrides of every run")
    parser.add_argument("--figure", type=Path, default=None)
    parser.add_argument("--write", type=Path, default=None, help="put the table between the marks of this page")
    parser.add_argument("--mark", default="race")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    todo = [(name, args.base, seed) for seed in args.seeds for name in args.only]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: run(*job, args), todo))
    if args.figure is not None:
        draw(args)
    text = race(args)
    if args.write is None:
        print(text)
        return
    pages.put(args.write, args.mark, text)


if __name__ == "__main__":
    main()
