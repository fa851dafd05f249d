"""Fronts between two rewards on the tiny world: one adapter that is told weights, against soups, MODPO and fixed weights.

    python scripts/benchmark_fronts.py --out runs/fronts --seeds 0 1 2
    python scripts/benchmark_fronts.py --out runs/fronts --seeds 0 --steps 60 --prompts 16     # a look
    python scripts/benchmark_fronts.py --table                                                 # the page, from the store

For each seed, on the same base, images, held-out captions and noise (demo_modpo keeps its learning rate, loss and ties):

    told    one run of demo_preference, asked for weights along the edge; twice the steps of the others, as a soup's two have
    soup    two runs with preference.fixed at the ends, their changes of the weights added up by weight
    fixed   a run with preference.fixed for each trade between the ends
    modpo   a run of demo_modpo for each trade: labels of the first reward, the second one as a margin

The *area* of a way is what its points enclose with a corner: the base's (trades that cost nobody), and the worst of all
points by either reward (all trades). Intervals are bootstraps over captions, all ways resampled together; points are means
over seeds first. A run or a point that is there is not made again; points are kept in docs/benchmarks/fronts.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pages
import torch

from diffalign import adapters, asked, pareto, soups
from diffalign.config import RunConfig
from diffalign.config_loading import load_config
from diffalign.data.prompts import load_prompts
from diffalign.families import NETWORK, load_family
from diffalign.sampling import Sampler
from diffalign.trainer import train

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / "docs" / "benchmarks" / "fronts.jsonl"
PAGE = ROOT / "docs" / "benchmarks" / "fronts.md"
PICTURE = ROOT / "docs" / "images" / "fronts.png"
WAYS = {
    "told": "one adapter, told weights",
    "soup": "soup of two adapters",
    "fixed": "a run for each trade",
    "modpo": "MODPO, a run for each trade",
}
RESAMPLES = 2000
Points = dict[tuple[str, tuple[float, ...]], np.ndarray[Any, Any]]


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the numbers, apart from the seed."""
    names = ("rewards", "steps", "told_steps", "prompts", "pairs", "points", "trades", "modpo_beta", "set")
    return {name: getattr(args, name) for name in names}


def runs_of(args: argparse.Namespace, seed: int) -> dict[str, tuple[str, list[str]]]:
    """Config and overrides of every run by name."""
    first, second = args.rewards
    judges = [f"world_taste:{name}" for name in args.rewards]
    shared = [
        f"seed={seed}",
        f"data.world_pairs.prompts={args.pairs}",
        "evaluation.at_end=false",
        f"evaluation.rewards={json.dumps(judges)}",
        f"training.threads={args.threads}",
        "training.checkpointing_steps=0",
        "training.resume_from_checkpoint=latest",
        f"training.max_train_steps={args.steps}",
        *args.set,
    ]
    both = [
        f"data.world_pairs.rewards=[{first}, {second}]",
        f"data.world_pairs.taste={first}",
        f"preference.rewards=[{first}, {second}]",
    ]
    runs = {
        "told": ("demo_preference", [*shared, *both, f"training.max_train_steps={args.told_steps or 2 * args.steps}"])
    }
    for weight in sorted({0.0, 1.0, *args.trades}):
        fixed = f"preference.fixed=[{weight:g}, {1 - weight:g}]"
        runs[f"fixed-{weight:g}"] = ("demo_preference", [*shared, *both, fixed])
    for weight in args.trades:
        own = [
            f"data.world_pairs.taste={first}",
            f"data.world_pairs.rewards=[{second}]",
            f"objective.beta={args.modpo_beta:g}",
            f"objective.weights=[{weight:g}, {1 - weight:g}]",
        ]
        runs[f"modpo-{weight:g}"] = ("demo_modpo", [*shared, *own])
    return runs


def trained(out: Path, name: str, config: str, overrides: Sequence[str]) -> tuple[Path, RunConfig]:
    """The folder of a finished run and its config; its pairs are those of the first run on the same data."""
    digest = hashlib.sha256(json.dumps([config, list(overrides)]).encode()).hexdigest()[:8]
    folder = out / f"{name}-{digest}"
    kind = "modpo" if config == "demo_modpo" else "both"
    loaded = load_config(config, [*overrides, f"output_dir={folder}", f"cache.dir={out / f'cache-{kind}'}"])
    if not (folder / "pytorch_lora_weights.safetensors").is_file():
        shared = out / f"data-{kind}"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "data").exists() and shared.is_dir():
            (folder / "data").mkdir()
            for file in shared.iterdir():
                (folder / "data" / file.name).hardlink_to(file)
        started = time.perf_counter()
        train(loaded)
        print(f"{folder.name}: {time.perf_counter() - started:.0f} s", flush=True)
        if not shared.is_dir():
            shared.mkdir()
            for file in (folder / "data").iterdir():
                (shared / file.name).hardlink_to(file)
    return folder, loaded


def measure(args: argparse.Namespace, seed: int, known: set[tuple[str, tuple[float, ...]]]) -> list[dict[str, Any]]:
    """Train what is missing, and measure points that are not known yet."""
    out = args.out / f"seed-{seed}"
    folders, configs = {}, {}
    for name, (config, overrides) in runs_of(args, seed).items():
        folders[name], configs[name] = trained(out, name, config, overrides)
    config = configs["told"]
    family = load_family(config.model)
    texts = load_prompts(config.evaluation.prompts, args.prompts)
    sampler = Sampler(family, texts, config.sampling, config.data.resolution)
    family.load(NETWORK)
    plain = [name for name in folders if name != "told"]
    names, _ = soups.attach(family, config, [soups.Part(folders[name]) for name in plain])
    part = dict(zip(plain, names, strict=True))
    asked.attach(family, config, folders["told"])
    measuring = pareto.Measuring(sampler, config, "cpu")
    edge, trades = soups.simplex(2, args.points), [(weight, 1 - weight) for weight in args.trades]
    wanted: list[tuple[str, tuple[float, ...]]] = [("base", ())]
    wanted += [(way, weights) for way in ("told", "soup") for weights in edge]
    wanted += [(way, weights) for way in ("fixed", "modpo") for weights in trades]
    found = []
    for way, weights in wanted:
        if (way, weights) in known:
            continue
        told = None
        if way == "told":
            adapters.use_adapters(family.network, [adapters.DEFAULT], [1.0])
            told = torch.tensor(weights)
        elif way == "soup":
            pareto.mixture(family.network, [part["fixed-1"], part["fixed-0"]], weights)
        elif way != "base":
            adapters.use_adapters(family.network, [part[f"{way}-{weights[0]:g}"]], [1.0])
        point = measuring.point(
            f"{way} {' '.join(f'{w:g}' for w in weights)}", way, weights, on=way != "base", told=told
        )
        found.append({"seed": seed, "way": way, "weights": list(weights), "scores": point.scores})
        print(f"seed {seed} {point.label}: " + "  ".join(f"{n} {m:.4f}" for n, m in point.means.items()), flush=True)
    return found


def stored(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Points in the store that were made with these settings."""
    lines = STORE.read_text().splitlines() if STORE.is_file() else []
    return [row for row in map(json.loads, lines) if row["settings"] == settings]


def averaged(rows: list[dict[str, Any]]) -> Points:
    """Scores (2, captions) of every point, the mean over seeds; points that not all seeds have are left out."""
    seeds = {row["seed"] for row in rows}
    by: dict[tuple[str, tuple[float, ...]], list[Any]] = {}
    for row in rows:
        by.setdefault((row["way"], tuple(row["weights"])), []).append(list(row["scores"].values()))
    return {key: np.array(values).mean(0) for key, values in by.items() if len(values) == len(seeds)}


def areas(points: Points, rows: np.ndarray[Any, Any]) -> dict[str, tuple[float, float]]:
    """By way, the area beyond the base and beyond the worst of all points, on some captions."""
    means = {key: tuple(float(v) for v in values[:, rows].mean(1)) for key, values in points.items()}
    base = means["base", ()]
    worst = tuple(min(mean[axis] for mean in means.values()) for axis in (0, 1))
    found = {}
    for way in WAYS:
        # Every way has both ends: those of fixed weights and of MODPO are the runs on one reward, which the soup has.
        ends = [mean for (own, weights), mean in means.items() if own == "soup" and max(weights) == 1 and way != "told"]
        own = [mean for (other, _), mean in means.items() if other == way]
        if own:
            corners = (base, worst)
            one, two = (pareto.area([*own, *ends], corner) for corner in corners)  # type: ignore[arg-type]
            found[way] = (one, two)
    return found


def command(settings: dict[str, Any], seeds: Sequence[int]) -> str:
    """The options that make these numbers."""
    words = [f"--seeds {' '.join(map(str, seeds))}"]
    for name, value in settings.items():
        if value:
            text = " ".join(
                f"{v:g}" if isinstance(v, float) else str(v) for v in (value if isinstance(value, list) else [value])
            )
            words.append(f"--{name.replace('_', '-')} {text}")
    return " ".join(words)


def table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Markdown: areas with intervals, and the points."""
    points, seeds = averaged(rows), sorted({row["seed"] for row in rows})
    count = next(iter(points.values())).shape[1]
    now, draw = areas(points, np.arange(count)), np.random.default_rng(0)
    drawn = [areas(points, draw.integers(count, size=count)) for _ in range(RESAMPLES)]
    each = {seed: areas(averaged([row for row in rows if row["seed"] == seed]), np.arange(count)) for seed in seeds}

    def cell(way: str, which: int, against: str | None = None) -> str:
        def value(found: dict[str, tuple[float, float]]) -> float:
            return found[way][which] - (found[against][which] if against else 0.0)

        low, high = np.percentile([value(one) for one in drawn], [2.5, 97.5])
        sign = "+" if against else ""
        return f"{value(now):{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]"

    first, second = settings["rewards"]
    lines = [
        f"```bash\npython scripts/benchmark_fronts.py {command(settings, seeds)}\n```",
        "",
        f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}, {count} held-out captions, {settings['steps']} steps a run "
        f"({settings['told_steps'] or 2 * settings['steps']} of the one that is told), {settings['pairs']} pairs; rewards "
        f"`world_taste:{first}` and `world_taste:{second}`.",
        "",
        "| way | area beyond the base | told minus it | area beyond the worst | told minus it | the same, by seed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for way in now:
        less = [cell("told", which, way) if way != "told" else "" for which in (0, 1)]
        by_seed = ", ".join(f"{each[seed][way][1]:.4f}" for seed in seeds)
        lines.append(f"| {WAYS[way]} | {cell(way, 0)} | {less[0]} | {cell(way, 1)} | {less[1]} | {by_seed} |")
    lines += ["", f"| way | weight of {first} | {first} | {second} |", "| --- | --- | --- | --- |"]
    for (way, weights), values in sorted(points.items()):
        means = values.mean(1)
        lines.append(
            f"| {WAYS.get(way, way)} | {f'{weights[0]:g}' if weights else ''} | {means[0]:.4f} | {means[1]:.4f} |"
        )
    return "\n".join(lines)


def draw_picture(points: Points, rewards: Sequence[str]) -> None:
    """All fronts in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4.6))
    for (way, label), marker in zip(WAYS.items(), "osD^"):
        own = sorted((weights, values.mean(1)) for (other, weights), values in points.items() if other == way)
        if not own:
            continue
        x, y = ([float(mean[k]) for _, mean in own] for k in (0, 1))
        axis.plot(x, y, marker=marker, linewidth=1.2, markersize=5, label=label)
        for (weights, _), a, b in zip(own, x, y, strict=True):
            axis.annotate(f"{weights[0]:g}", (a, b), xytext=(4, 4), textcoords="offset points", fontsize=7)
    base = points["base", ()].mean(1)
    axis.plot(*(([float(v)]) for v in base), "kx", label="base")
    axis.set_xlabel(f"world_taste:{rewards[0]}")
    axis.set_ylabel(f"world_taste:{rewards[1]}")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=130)


def write(rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """The page and the picture."""
    draw_picture(averaged(rows), settings["rewards"])
    pages.put(PAGE, "fronts", table(rows, settings))
    print(f"written to {PAGE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/fronts"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--rewards", nargs=2, default=["gil", "dev"], help="tastes; the first labels MODPO's pairs")
    parser.add_argument("--steps", type=int, default=200, help="of a run")
    parser.add_argument(
        "--told-steps", type=int, default=0, help="of the run that is told weights (default: twice --steps)"
    )
    parser.add_argument("--prompts", type=int, default=64, help="held-out captions")
    parser.add_argument("--pairs", type=int, default=800)
    parser.add_argument("--points", type=int, default=5, help="weights along the edge, of the told and the soup")
    parser.add_argument("--trades", type=float, nargs="*", default=[0.25, 0.5, 0.75], help="of fixed weights and MODPO")
    parser.add_argument("--modpo-beta", type=float, default=30.0)
    parser.add_argument("--set", nargs="*", default=[], help="more settings of all runs, section.key=value")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="write the page from the store alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out = args.out.resolve()
    settings = json.loads(json.dumps(settings_of(args)))
    for seed in [] if args.table else args.seeds:
        known = {(row["way"], tuple(row["weights"])) for row in stored(settings) if row["seed"] == seed}
        rows = measure(args, seed, known)
        with STORE.open("a") as file:
            file.writelines(json.dumps({"settings": settings} | row) + "\n" for row in rows)
    rows = [row for row in stored(settings) if args.table or row["seed"] in args.seeds]
    if not rows:
        raise SystemExit(f"{STORE} has no points with these settings")
    write(rows, settings)


if __name__ == "__main__":
    main()
