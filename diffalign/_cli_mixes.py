"""The commands `merge` and `pareto`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from diffalign.config import RunConfig
from diffalign.errors import ConfigError

Add = Callable[..., argparse.ArgumentParser]


def add_commands(add: Add, read: Callable[[argparse.Namespace], RunConfig]) -> None:
    """Declare them.

    Args:
        add: of the main parser.
        read: the configuration of the arguments.
    """
    merge = add(
        "merge", lambda args: run_merge(args, read(args)), "add adapters up by weight and write the sum as one LoRA"
    )
    merge.add_argument(
        "--adapter", action="append", default=[], metavar="PATH=WEIGHT", help="LoRA file or run folder; two or more"
    )
    merge.add_argument("--out", required=True, help="folder")
    merge.add_argument("--fp16", action="store_true", help="half precision, for distribution")
    pareto = add(
        "pareto",
        lambda args: run_pareto(args, read(args)),
        "measure mixtures of adapters, whole runs and a run on preferences by two rewards and draw the fronts",
    )
    pareto.add_argument(
        "--adapter", action="append", default=[], help="of the mixtures, two or more: LoRA files or run folders"
    )
    pareto.add_argument("--points", type=int, default=5, help="mixtures along an edge (default: 5)")
    pareto.add_argument("--runs", nargs="*", default=[], help="run folders or LoRA files that are points of their own")
    pareto.add_argument(
        "--preferences",
        type=int,
        default=0,
        metavar="N",
        help="of a run folder on preferences in place of a config: so many weights along an edge that it is told",
    )
    pareto.add_argument("--out", default="front", help="files FRONT.json and FRONT.html (default: front)")


def _opened(config: RunConfig) -> tuple[Any, Any]:
    from diffalign import preflight
    from diffalign.commands import is_text
    from diffalign.hardware import make_accelerator, open_denoising

    if is_text(config):
        raise ConfigError(
            f"family {config.model.family!r} works on texts, whose adapters peft itself adds up (add_weighted_adapter)"
        )
    preflight.check_sampling(config)
    accelerator = make_accelerator(config.training, config.output_dir)
    return accelerator, open_denoising(config, accelerator)


def run_merge(args: argparse.Namespace, config: RunConfig) -> int:
    """Write the sum of adapters."""
    import torch

    from diffalign import export, soups
    from diffalign.families import NETWORK
    from diffalign.files import require_writable

    parts = [soups.Part.parse(text) for text in args.adapter]
    if len(parts) < 2:
        raise ConfigError(f"merge: got {len(parts)} --adapter; expected at least two, as PATH=WEIGHT")
    out = Path(args.out)
    require_writable(out)
    _, family = _opened(config)
    family.load(NETWORK)
    names, role = soups.attach(family, config, parts)
    merged = soups.merge(family.network, names, [part.weight for part in parts])
    recipe = " + ".join(f"{part.weight:g} {part.path.name}" for part in parts)
    metadata = {
        "role": role,
        "base": config.model.pretrained,
        "merged": recipe,
        "resolution": str(config.data.resolution),
    }
    files = export.save_lora(
        family.network,
        None,
        out,
        family=config.model.family,
        name=merged,
        metadata=metadata,
        dtype=torch.float16 if args.fp16 else torch.float32,
    )
    print("\n".join(str(path) for path in files.values()))
    return 0


def _asks(args: argparse.Namespace, config: RunConfig, folder: Path) -> bool:
    """Whether the front of a run on preferences is asked for.

    Raises:
        ConfigError: it is, of something else.
    """
    if not args.preferences:
        return False
    if args.preferences < 2 or not config.preference.seen or not (folder / "config.yaml").is_file():
        has = "has none that its network sees" if not config.preference.seen else "is a run on preferences"
        raise ConfigError(
            f"pareto --preferences {args.preferences}: {folder} {has}; expected at least 2 points, and the run folder of a "
            "run with preference.rewards and without preference.fixed"
        )
    return True


def run_pareto(args: argparse.Namespace, config: RunConfig) -> int:
    """Measure and draw a front."""
    import torch

    from diffalign import adapters, asked, pareto, soups
    from diffalign.data.prompts import load_prompts
    from diffalign.families import NETWORK
    from diffalign.files import require_writable
    from diffalign.sampling import Sampler

    parts = [soups.Part.parse(text) for text in args.adapter]
    runs = [soups.Part.parse(text) for text in args.runs]
    if parts and len(parts) < 2:
        raise ConfigError("pareto: got one --adapter; a mixture needs two or more")
    if not parts and not runs and not args.preferences:
        raise ConfigError("pareto: nothing to measure; give --adapter twice or more, --runs, or --preferences")
    own = Path(args.config)
    told = soups.simplex(len(config.preference.rewards), args.preferences) if _asks(args, config, own) else []
    if not config.evaluation.prompts:
        raise ConfigError("evaluation.prompts: missing; name a file or a list of prompts to measure on")
    out = Path(args.out)
    require_writable(out.parent)
    texts = load_prompts(config.evaluation.prompts, config.evaluation.num_prompts)
    accelerator, family = _opened(config)
    autocast = accelerator.autocast if config.training.mixed_precision != "no" else nullcontext
    sampler = Sampler(family, texts, config.sampling, config.data.resolution, autocast, config.data.num_frames)
    measuring = pareto.Measuring(sampler, config, accelerator.device)
    family.load(NETWORK)
    names, role = soups.attach(family, config, [*parts, *runs]) if parts or runs else ([], "positive")
    if told:
        asked.attach(family, config, own)
    if role == "negative":
        raise ConfigError(
            "pareto: these are adapters for the negative branch of guidance, and would act in both here; measure them with "
            "diffalign evaluate --negative-adapter"
        )
    points = [measuring.point("base", "base", on=False)]
    for weights in soups.simplex(len(parts), args.points) if parts else []:
        pareto.mixture(family.network, names[: len(parts)], weights)
        label = " ".join(f"{weight:.2g}" for weight in weights)
        points.append(measuring.point(label, "mixture", weights))
    for name, part in zip(names[len(parts) :], runs, strict=True):
        adapters.use_adapters(family.network, [name], [part.weight])
        points.append(measuring.point(part.path.name, "run"))
    if told:
        if adapters.lora_layers(family.network, adapters.DEFAULT):
            adapters.use_adapters(family.network, [adapters.DEFAULT], [1.0])
        elif names:  # attentions of their own stand alone
            adapters.use_adapters(family.network, names, [0.0] * len(names))
    for weights in told:
        label = " ".join(f"{weight:.2g}" for weight in weights)
        points.append(measuring.point(label, "preference", weights, told=torch.tensor(weights)))
    page = pareto.write(points, out, f"{config.model.pretrained}: a front of {len(points) - 1} points")
    for point in points:
        print(f"{point.label:24s} " + "  ".join(f"{name} {mean:.4f}" for name, mean in point.means.items()))
    print(f"written to {page}")
    return 0
