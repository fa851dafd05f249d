"""What a network that sees users (PPD) makes of the tiny world's people, against one trained on all of them together.

    diffalign train demo_ppd output_dir=runs/ppd-0 seed=0
    diffalign train demo_ppd output_dir=runs/shared-0 seed=0 'users={}'
    python scripts/benchmark_users.py --personal runs/ppd-0 runs/ppd-1 --shared runs/shared-0 runs/shared-1 \\
        --out runs/users.json --write docs/benchmarks/users.md

The k-th personal run goes with the k-th shared one; both draw the same held-out captions from the same noise. Every person
judges by `world_taste:NAME`, (verifier + taste) / 2. Win rates count ties one half; intervals are bootstraps over captions,
the runs of a caption together. *Swapped* is somebody of the opposite taste in the person's place.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pages
import torch

from diffalign import adapters, export, rewards, statistics, user_branches, users
from diffalign.config_loading import load_config
from diffalign.data.prompts import load_prompts
from diffalign.families import NETWORK, load_family
from diffalign.sampling import Sampler, to_float
from diffalign.world import taste

OPPOSITE = {"ada": "bela", "bela": "ada", "cleo": "dev", "dev": "cleo", "eli": "fay", "fay": "eli", "gil": "bela"}
MIXED = (("ada", "bela", "outlined"), ("cleo", "dev", "pastel"))  # from, to, what changes on the way
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def measure(personal: Path, shared: Path | None, prompts: int) -> dict[str, Any]:
    """Scores of every person's pictures: by their own judge, by caption."""
    config = load_config(str(personal / "config.yaml"))
    family = load_family(config.model)
    texts = load_prompts(config.evaluation.prompts, prompts)
    sampler = Sampler(family, texts, config.sampling, config.data.resolution)
    family.load(NETWORK)
    branch = user_branches.load(family.network, personal)
    known = users.read_users(personal)
    who = {name: known[users.hashed(str(one.user_id))] for name, one in taste.USERS.items()}
    judges = {name: rewards.load(f"world_taste:{name}") for name in who}
    rules = {rule: rewards.load(f"world_taste:{rule}") for _, _, rule in MIXED}

    def pictures(user: torch.Tensor | None, *, on: bool = True) -> torch.Tensor:
        sampler.users = None if user is None else user.expand(len(texts), -1)
        return to_float(sampler.images(range(len(texts)), seed=config.evaluation.seed, adapters=on))

    def scored(model: Any, images: torch.Tensor) -> list[float]:
        return [round(v, 4) for v in rewards.score(model, images, texts).tolist()]

    base, of = pictures(None, on=False), {name: pictures(embeddings[0]) for name, embeddings in who.items()}
    found: dict[str, Any] = {"people": {}, "mixed": {}}
    for one, other, rule in MIXED:
        path = [users.between([who[one][0], who[other][0]], [1 - w, w]) for w in WEIGHTS]
        found["mixed"][f"{one} to {other}"] = [scored(rules[rule], pictures(user)) for user in path]
    branch.remove(family.network)
    if adapters.adapter_names(family.network):
        family.network.unload_lora()
    together = base
    if shared is not None:
        export.load_lora(family.network, shared, family=config.model.family)
        together = pictures(None)
        adapters.use_adapters(family.network, ["default"], [1.0])
    for name, judge in judges.items():
        found["people"][name] = {
            "base": scored(judge, base),
            "shared": scored(judge, together),
            "own": scored(judge, of[name]),
            "swapped": scored(judge, of[OPPOSITE[name]]),
            "unseen": users.kept_out(str(taste.USERS[name].user_id), config.users),
        }
    return found


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: a row per person, and one per mixture."""

    def sides(name: str, side: str) -> np.ndarray[Any, Any]:
        return np.array([run["people"][name][side] for run in runs]).T

    lines = [
        "| person | win rate over the shared model | gain over it | over the base | by run | swapped: gain over shared |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in runs[0]["people"].items():
        rate = statistics.win_rate(sides(name, "shared"), sides(name, "own"))
        gains = [
            statistics.mean_gain(sides(name, before), sides(name, after))
            for before, after in (("shared", "own"), ("base", "own"), ("shared", "swapped"))
        ]
        each = [
            statistics.win_rate(*(np.array(run["people"][name][s])[:, None] for s in ("shared", "own"))) for run in runs
        ]
        cells = [f"{gain.mean:+.3f} [{gain.ci_low:+.3f}, {gain.ci_high:+.3f}]" for gain in gains]
        lines.append(
            f"| {name}{' (unseen)' if one['unseen'] else ''} | {rate.rate:.3f} [{rate.ci_low:.3f}, {rate.ci_high:.3f}] | "
            f"{cells[0]} | {cells[1]} | {', '.join(f'{r.rate:.3f}' for r in each)} | {cells[2]} |"
        )
    lines += [
        "",
        "| between | judge | " + " | ".join(f"{w:g}" for w in WEIGHTS) + " |",
        "| --- " * (2 + len(WEIGHTS)) + "|",
    ]
    for one, other, rule in MIXED:
        means = np.array([run["mixed"][f"{one} to {other}"] for run in runs]).mean((0, 2))
        lines.append(f"| {one} to {other} | {rule} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--personal", type=Path, nargs="*", default=[])
    parser.add_argument("--shared", type=Path, nargs="*", default=[])
    parser.add_argument("--stored", type=Path, nargs="*", default=[], help="files of --out, whose runs are added")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="JSON of the scores")
    parser.add_argument("--write", type=Path, default=None, help="put the tables between the marks of this page")
    args = parser.parse_args()
    if args.shared and len(args.shared) != len(args.personal):
        raise SystemExit(f"{len(args.shared)} shared and {len(args.personal)} personal runs; expected as many")
    if args.threads:
        torch.set_num_threads(args.threads)
    runs = [run for file in args.stored for run in json.loads(file.read_text())]
    for number, personal in enumerate(args.personal):
        runs.append(measure(personal, args.shared[number] if args.shared else None, args.prompts))
        print(f"{personal.name} measured", flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(runs))
    text = table(runs)
    if args.write is None:
        print(text)
        return
    pages.put(args.write, "users", text)


if __name__ == "__main__":
    main()
