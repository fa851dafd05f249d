"""Run the image objectives on equal footing and write docs/benchmarks/objectives.md.

    python scripts/benchmark_objectives.py --out runs/objectives --seeds 0 1 2 --jobs 2
    python scripts/benchmark_objectives.py --out runs/objectives --only demo_dpo demo_d3po --base tiny-sd3
    python scripts/benchmark_objectives.py --steps 40 80 120 --only demo_dpo demo_ddim_inpo --set training.learning_rate=3e-4
    python scripts/benchmark_objectives.py --table        # only the table, from docs/benchmarks/objectives.jsonl

Equal footing: the same base, the same pairs and prompts by seed, the same evaluation prompts and noise, and the same
number of *image forwards*: every image that goes through the network counts once, with or without gradient, of policy,
reference, inversion and sampler alike. The steps of a config are scaled so that it spends the budget; what it spent in the
end is in the table. `--steps` asks for numbers of steps instead, for curves.

Results are kept in docs/benchmarks/objectives.jsonl, one line a run, with the digest of the config that made it. A run whose
line is there is not repeated; after a change of the config it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pages
import torch
import yaml

from diffalign import statistics
from diffalign.config_loading import config_folder, read_tree

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / "docs" / "benchmarks" / "objectives.jsonl"
WRITING = Lock()
BASES = {"tiny-sdxl": "sdxl", "tiny-sd3": "sd3"}
BUDGET = 20_480  # image forwards: 320 steps of Diffusion-DPO on 16 pairs
PAIRS = 900  # prompts of the pairs, before ties are dropped
PROBE = "probe"
# What is set for every run alike, so that a demo may be made shorter and its results stay.
SET_HERE = {
    "training": ("max_train_steps", "threads", "checkpointing_steps", "sample_steps", "cpu"),
    "evaluation": ("num_prompts", "images_per_prompt", "grid_prompts", "at_end"),
}
COLUMNS = (
    "objective",
    "gain, 95 % interval",
    "by seed",
    "win rate, 95 % interval",
    "verifier",
    "drift",
    "diversity",
    "held-out acc.",
    "steps",
    "forwards",
    "seconds",
)


def configs() -> list[str]:
    """Names of the demos that train on images."""
    found = sorted(config_folder().glob("demo_*.yaml"))
    return [path.stem for path in found if yaml.safe_load(path.read_text())["model"]["family"] in BASES.values()]


def overrides_for(name: str, base: str, seed: int, out: Path) -> list[str]:
    """What makes a demo comparable with the others."""
    tree = read_tree(name)
    threads = 1
    changes = [
        f"output_dir={out}",
        f"seed={seed}",
        f"model.family={BASES[base]}",
        f"model.pretrained={base}",
        "evaluation.num_prompts=96",
        "evaluation.images_per_prompt=2",
        f"training.threads={threads}",
        "training.checkpointing_steps=100000",
        "training.sample_steps=0",
    ]
    if tree["data"].get("world_pairs"):
        share_pairs(tree, base, seed, out)
        changes += [f"data.world_pairs.prompts={PAIRS}"]
        changes += [f"cache.dir={out.parent / ('cache-' + data_key(tree, base, seed))}"]
    return changes


def share_pairs(tree: dict[str, Any], base: str, seed: int, out: Path) -> None:
    """Let a run find the pairs that another demo with the same data has made."""
    shared = out.parent / f"pairs-{data_key(tree, base, seed)}"
    shared.mkdir(exist_ok=True)
    out.mkdir(exist_ok=True)
    if not (out / "data").exists():
        (out / "data").symlink_to(shared)


def data_key(tree: dict[str, Any], base: str, seed: int) -> str:
    """The same for demos with the same pairs."""
    text = json.dumps([of_the_demo(tree)["data"], tree.get("cache"), base, seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def train(name: str, changes: list[str], log: Path) -> int:
    command = [sys.executable, "-m", "diffalign", "train", name, *changes]
    with log.open("w") as file:
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, check=False).returncode


def digest(name: str, budget: int, extra: list[str], steps: int | None = None) -> str:
    """Of what a config trains."""
    what = [of_the_demo(read_tree(name)), budget if steps is None else f"{steps} steps", extra]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]


def of_the_demo(tree: dict[str, Any]) -> dict[str, Any]:
    """A config without what is set here for every run."""
    tree = {name: dict(section) if isinstance(section, dict) else section for name, section in tree.items()}
    for section, names in SET_HERE.items():
        for name in names:
            tree.get(section, {}).pop(name, None)
    if tree["data"].get("world_pairs"):
        tree["data"]["world_pairs"] = tree["data"]["world_pairs"] | {"prompts": PAIRS}
    for name in ("output_dir", "seed", "model"):
        tree.pop(name, None)
    return tree


def stored(store: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in store.read_text().splitlines()] if store.is_file() else []


def keep(store: Path, result: dict[str, Any]) -> None:
    """Put a result in the place of an older one of the same run."""
    with WRITING:
        lines = [r for r in stored(store) if key_of(r) != key_of(result)] + [result]
        lines.sort(key=key_of)
        store.write_text("".join(json.dumps(r, sort_keys=True) + "\n" for r in lines))


def key_of(result: dict[str, Any]) -> tuple[str, str, int, int]:
    return result["base"], result["demo"], result["seed"], result.get("asked_steps") or 0


def run(
    name: str, base: str, seed: int, asked: int | None, folder: Path, budget: int, extra: list[str], store: Path
) -> dict[str, Any] | None:
    """One demo at the budget, or for a number of steps; its result, or None if it failed."""
    out = folder / (f"{name}-{base}-{seed}" + ("" if asked is None else f"-steps{asked}"))
    mark = digest(name, budget, extra, asked)
    for result in stored(store):
        if key_of(result) == (base, name, seed, asked or 0) and result["config"] == mark:
            return result
    if out.exists():
        shutil.rmtree(out)
    changes = overrides_for(name, base, seed, out) + extra
    steps = asked
    if steps is None:
        steps = max(1, round(budget / forwards_per_step(name, base, seed, folder, changes)))
        every = steps_per_round(name)
        steps = max(every, round(steps / every) * every)
    code = train(name, [*changes, f"training.max_train_steps={steps}"], folder / f"{out.name}.log")
    if code:
        print(f"{out.name}: exit status {code}, see {folder / f'{out.name}.log'}", flush=True)
        return None
    result = {"demo": name, "base": base, "seed": seed, "config": mark} | read(out)
    if asked is not None:
        result |= {"asked_steps": asked, "set": extra}
    keep(store, result)
    print(f"{out.name}: {line(result)}", flush=True)
    return result


def steps_per_round(name: str) -> int:
    """Steps between two samplings."""
    rollout = read_tree(name).get("rollout", {})
    return int(rollout.get("steps_per_generation", 1)) * int(rollout.get("num_iterations", 1))


def forwards_per_step(name: str, base: str, seed: int, folder: Path, changes: list[str]) -> float:
    """Image forwards of an optimiser step, counted on one round (or two steps) without evaluation."""
    cache = folder / "forwards.json"
    known = json.loads(cache.read_text()) if cache.is_file() else {}
    key = f"{name} {base}"
    if key not in known:
        tree = read_tree(name)
        steps = max(2, steps_per_round(name))
        out = folder / f"{PROBE}-{name}-{base}"
        if tree["data"].get("world_pairs"):
            share_pairs(tree, base, seed, out)
        more = [c for c in changes if not c.startswith("output_dir")]
        more += [f"output_dir={out}", f"training.max_train_steps={steps}", "evaluation.at_end=false"]
        more += ["evaluation.prompts=", "evaluation.held_out_fraction=0", f"training.checkpointing_steps={steps}"]
        if train(name, more, folder / f"{out.name}.log"):
            raise SystemExit(f"{name}: the probe failed, see {folder / f'{out.name}.log'}")
        state = torch.load(next(out.glob("checkpoint-*")) / "state.pt", weights_only=True)
        known = json.loads(cache.read_text()) if cache.is_file() else {}
        known[key] = state["job"]["image_forwards"] / steps
        cache.write_text(json.dumps(known, indent=1))
    return float(known[key])


def read(out: Path) -> dict[str, Any]:
    """What the table needs of a run, with the scores behind it."""
    result = json.loads((out / "result.json").read_text())
    scores = json.loads((out / "scores.json").read_text())[result["metric"]]
    wanted = ("metric", "drift", "diversity", "held_out_implicit_acc", "steps", "image_forwards", "train_seconds")
    found = {name: result[name] for name in wanted if name in result}
    found["verifier_gain"] = next(x["gain"] for x in result["rewards"] if x["reward"] == "world_verifier")
    found["scores"] = {who: np.round(np.array(scores[who]), 4).tolist() for who in ("base", "aligned")}
    return found


def line(result: dict[str, Any]) -> str:
    gain, rate = compared([result])
    return (
        f"gain {gain.mean:+.3f} [{gain.ci_low:+.3f}, {gain.ci_high:+.3f}], win rate {rate.rate:.3f}, "
        f"{result['image_forwards']} forwards, {result['train_seconds']:.0f} s, drift {result['drift']:.3f}"
    )


# -- the table ---------------------------------------------------------------------------------------------------------


def compared(results: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Gain and win rate over runs. Seeds are other pairs, noise and adapters; the captions are the same."""
    # (captions, images of all seeds): the bootstrap draws captions, and a caption keeps what all seeds made of it.
    base = np.concatenate([np.array(r["scores"]["base"]) for r in results], axis=1)
    aligned = np.concatenate([np.array(r["scores"]["aligned"]) for r in results], axis=1)
    return statistics.mean_gain(base, aligned), statistics.win_rate(base, aligned)


def table(store: Path) -> str:
    """Markdown rows, by base and then by gain; intervals by a bootstrap over captions, seeds of a caption together."""
    parts = []
    everything = [r for r in stored(store) if "asked_steps" not in r]
    for base in BASES:
        rows = []
        for name in configs():
            results = [r for r in everything if r["base"] == base and r["demo"] == name]
            if not results:
                continue
            gain, rate = compared(results)
            seeds = ", ".join(f"{compared([r])[0].mean:+.3f}" for r in results)
            accuracy = [r["held_out_implicit_acc"] for r in results if "held_out_implicit_acc" in r]
            wide = [r["diversity"]["aligned"] / r["diversity"]["base"] for r in results if r.get("diversity")]
            numbers = [
                f"{gain.mean:+.3f} [{gain.ci_low:+.3f}, {gain.ci_high:+.3f}]",
                seeds,
                f"{rate.rate:.3f} [{rate.ci_low:.3f}, {rate.ci_high:.3f}]",
                f"{mean([r['verifier_gain'] for r in results]):+.3f}",
                f"{mean([r['drift'] for r in results]):.3f}",
                f"{mean(wide):.2f}",
                f"{mean(accuracy):.2f}" if accuracy else "–",
                f"{mean([r['steps'] for r in results]):.0f}",
                f"{mean([r['image_forwards'] for r in results]):,.0f}",
                f"{mean([r['train_seconds'] for r in results]):.0f}",
            ]
            rows.append((gain.mean, f"| `{name.removeprefix('demo_')}` | {' | '.join(numbers)} |"))
        if rows:
            head = f"### `{base}`\n\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"
            parts.append("\n".join([head, *(text for _, text in sorted(rows, key=lambda row: -row[0]))]))
    return "\n\n".join(parts)


def curves(store: Path) -> str:
    """Markdown rows of gain by number of steps."""
    found = [r for r in stored(store) if "asked_steps" in r]
    lines = ["| base | objective | steps | gain, 95 % interval | by seed | forwards |", "| --- " * 6 + "|"]
    for base, demo, steps in sorted({(r["base"], r["demo"], r["asked_steps"]) for r in found}):
        results = [r for r in found if (r["base"], r["demo"], r["asked_steps"]) == (base, demo, steps)]
        gain, _ = compared(results)
        cells = [
            f"`{base}`",
            f"`{demo.removeprefix('demo_')}`",
            str(steps),
            f"{gain.mean:+.3f} [{gain.ci_low:+.3f}, {gain.ci_high:+.3f}]",
            ", ".join(f"{compared([r])[0].mean:+.3f}" for r in results),
            f"{mean([r['image_forwards'] for r in results]):,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"), help="folder of the runs")
    parser.add_argument("--store", type=Path, default=STORE, help="file of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=None, help="names of demos; all of them otherwise")
    parser.add_argument("--base", choices=sorted(BASES), nargs="+", default=["tiny-sdxl"])
    parser.add_argument("--budget", type=int, default=BUDGET, help="image forwards of a run")
    parser.add_argument("--steps", type=int, nargs="+", default=[None], help="numbers of steps, in place of the budget")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--set", nargs="+", default=[], help="further overrides of every run")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--write", type=Path, default=None, help="put the table between the marks of this page")
    args = parser.parse_args()
    args.out = args.out.resolve()
    if not args.table:
        args.out.mkdir(parents=True, exist_ok=True)
        names = args.only or configs()
        todo = [(n, b, s, k) for s in args.seeds for b in args.base for k in args.steps for n in names]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: run(*job, args.out, args.budget, args.set, args.store), todo))
    for mark, text in (("objectives", table(args.store)), ("steps", curves(args.store))):
        if args.write is None:
            print(text)
        else:
            pages.put(args.write, mark, text)


if __name__ == "__main__":
    main()
