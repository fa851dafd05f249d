"""Run the text demos on several seeds and write their results as a table.

    python scripts/measure_text_demos.py                         all demos, seeds 0 1 2, docs/benchmarks/text.md
    python scripts/measure_text_demos.py dpo npo --seeds 0       some of them; the table is printed

Each run is `diffalign train demo_llm_<name> seed=<seed>`. Finished runs in the folder are not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

from diffalign import statistics

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "text.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
REWARD = ("dpo", "kto", "simpo", "grpo", "nft")
MEMORY = ("npo", "grad_diff", "ga")


def run(name: str, seed: int, folder: Path, extra: list[str]) -> dict[str, Any]:
    """One demo on one seed; its `result.json` with the wall time of the whole command."""
    out = folder / f"{name}-{seed}"
    timing = out / "wall.json"
    if not timing.is_file():
        words = [sys.executable, "-m", "diffalign", "train", f"demo_llm_{name}", f"output_dir={out}", f"seed={seed}"]
        started = time.perf_counter()
        subprocess.run([*words, *extra], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        timing.write_text(json.dumps({"seconds": time.perf_counter() - started}))
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    return found | {"seconds": json.loads(timing.read_text())["seconds"], "folder": out}


def span(low: float, high: float) -> str:
    return f"[{low:+.3f}, {high:+.3f}]"


def reward_row(name: str, runs: list[dict[str, Any]]) -> str:
    """Verified reward before and after; the pooled interval averages a prompt over seeds first."""
    scores = [json.loads((r["folder"] / "scores.json").read_text())[r["metric"]] for r in runs]
    joined = {
        side: [list(chain.from_iterable(rows)) for rows in zip(*(found[side] for found in scores))]
        for side in ("base", "aligned")
    }
    pooled = statistics.mean_gain(joined["base"], joined["aligned"])
    gains = ", ".join(f"{r['gain']:+.3f} {span(*r['gain_ci95'])}" for r in runs)
    base, aligned = (sum(r[key] for r in runs) / len(runs) for key in ("base_mean", "aligned_mean"))
    accuracy = " / ".join(f"{r['held_out_implicit_acc']:.2f}" for r in runs if "held_out_implicit_acc" in r) or "-"
    seconds = max(r["seconds"] for r in runs)
    return (
        f"| `demo_llm_{name}` | {base:.3f} -> {aligned:.3f} | {pooled.mean:+.3f} {span(pooled.ci_low, pooled.ci_high)} | "
        f"{gains} | {accuracy} | {seconds:.0f} s |"
    )


def memory_row(name: str, runs: list[dict[str, Any]]) -> str:
    """Recall of the forget and of the retain set before and after."""
    cells = []
    for what in ("forget_recall", "forget_reworded_recall", "retain_recall", "retain_reworded_recall"):
        entries = [r[what] for r in runs]
        base, aligned = (sum(e[key] for e in entries) / len(entries) for key in ("base", "aligned"))
        changes = ", ".join(span(*e["change_ci95"]) for e in entries)
        cells.append(f"{base:.2f} -> {aligned:.2f} {changes}")
    task = " / ".join(f"{r['gain']:+.3f}" for r in runs if "gain" in r) or "-"
    return f"| `demo_llm_{name}` | " + " | ".join(cells) + f" | {task} | {max(r['seconds'] for r in runs):.0f} s |"


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """The page's tables."""
    lines = []
    if rewards := {k: v for k, v in results.items() if k in REWARD}:
        lines += [
            "| demo | verified reward, base -> aligned | gain over all seeds, 95 % interval | "
            "gain per seed, 95 % interval | held-out pair accuracy | longest run |",
            "| --- | --- | --- | --- | --- | --- |",
            *(reward_row(name, runs) for name, runs in rewards.items()),
        ]
    if memories := {k: v for k, v in results.items() if k in MEMORY}:
        lines += [
            "",
            "| demo | forget: recall, change per seed | forget, reworded | retain: recall | retain, reworded | "
            "change of puzzle accuracy | longest run |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(memory_row(name, runs) for name, runs in memories.items()),
        ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demos", nargs="*", help=f"of {', '.join(REWARD + MEMORY)}; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs") / "text")
    parser.add_argument("--set", action="append", default=[], help="a section.key=value for every run")
    args = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    for name in args.demos or REWARD + MEMORY:
        results[name] = [run(name, seed, args.folder, args.set) for seed in args.seeds]
        print(
            f"{name}: {', '.join(str(r.get('gain', r.get('forget_recall'))) for r in results[name])}", file=sys.stderr
        )
    found = table(results)
    print(found)
    if not args.demos and PAGE.is_file():
        text = PAGE.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n{found}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
