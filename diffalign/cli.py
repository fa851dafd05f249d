"""The `diffalign` command: parse, call, exit code. 0 done, 2 a mistake the user can mend, 130 or 143 stopped."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign import __version__
from diffalign._cli_mixes import add_commands as add_mixes
from diffalign.errors import UserError

if TYPE_CHECKING:
    from diffalign.config import RunConfig
    from diffalign.score import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None takes the process's.

    Returns:
        The exit code.
    """
    parser = build_parser()
    args, extra = parser.parse_known_args(argv)
    # Overrides may stand anywhere: argparse cannot interleave them with options by itself.
    overrides = [word for word in extra if not word.startswith("-")]
    if wrong := [word for word in extra if word not in overrides]:
        parser.error(f"unrecognised: {' '.join(wrong)} (settings are given as section.key=value)")
    if overrides and "options" in vars(args):  # of a recipe
        args.options, overrides = [*args.options, *overrides], []
    if overrides and "overrides" not in vars(args):
        parser.error(f"{args.command} takes no settings; got {' '.join(overrides)}")
    if overrides:
        args.overrides = [*args.overrides, *overrides]
    if "overrides" in vars(args):
        args.config, args.overrides = config_first(args.config, args.overrides)
    set_up_logging(args.verbose)
    command: Callable[[argparse.Namespace], int] = args.run
    try:
        return command(args)
    except UserError as error:
        if args.debug:
            raise
        print(f"diffalign: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffalign: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def config_first(config: str, overrides: list[str]) -> tuple[str, list[str]]:
    """Take the config from wherever it stands among the settings: the first word that is a file or has no "="."""
    words = [config, *overrides]
    for place, word in enumerate(words):
        if "=" not in word or Path(word).exists():
            return word, words[:place] + words[place + 1 :]
    return config, overrides


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks of user errors")
    common.add_argument("-v", "--verbose", action="store_true", help="log more")
    parser = argparse.ArgumentParser(
        prog="diffalign", description="Preference alignment for diffusion models and language models."
    )
    parser.add_argument("--version", action="version", version=f"diffalign {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[[argparse.Namespace], int], text: str, *, config: bool = True
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=[common])
        sub.set_defaults(run=run)
        if config:
            sub.add_argument("config", help="a YAML file, the name of a shipped config, or a run folder")
            sub.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
        return sub

    add("train", run_train, "train an adapter")
    demo = add(
        "demo", run_demo, "the main job on the embedded tiny world: data, training, evaluation, report", config=False
    )
    demo.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    demo.add_argument("--config", default="demo_dpo", help="which shipped demo (default: demo_dpo)")
    plan = add("plan", run_plan, "what a run would need: parameters, memory, disk, time; loads no weights")
    plan.add_argument(
        "--gpu-gb", type=float, help="memory of the GPU as it is sold (24, 80, ...); tells whether it fits"
    )
    plan.add_argument("--processes", type=int, default=1, help="number of GPUs")
    plan.add_argument("--pairs", type=int, help="number of pairs, where the data set does not say")
    plan.add_argument("--json", action="store_true", help="machine-readable")
    add("cache", run_cache, "encode images and prompts into the cache, without training (diffusion models)")
    generate = add("generate", run_generate, "sample images or answers from the base, or with an adapter")
    generate.add_argument("--prompt", action="append", default=[], help="may be given several times")
    generate.add_argument("--prompts", help="a file or a shipped list; default: the config's evaluation prompts")
    generate.add_argument("--adapter", help="LoRA file, peft folder or run folder; default: the run folder's own")
    add_negative(generate)
    add_asked(generate)
    generate.add_argument("--base", action="store_true", help="also sample the base with the same noise, side by side")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--images-per-prompt", "--samples-per-prompt", type=int, default=1, dest="samples_per_prompt")
    generate.add_argument(
        "--chat", action="store_true", help="texts: send prompts as a user's message, by the chat template"
    )
    generate.add_argument("--out", default="generated", help="folder for images or answers")
    evaluate = add("evaluate", run_evaluate, "base against adapter: rewards and win rate with intervals")
    evaluate.add_argument("--adapter", help="LoRA file or run folder; default: the run folder's own")
    add_negative(evaluate)
    add_asked(evaluate)
    evaluate.add_argument(
        "--against",
        choices=("base", "adapter"),
        default="base",
        help="compare with the base (default), or with --adapter without --negative-adapter",
    )
    evaluate.add_argument("--out", help="where to write the JSON; default: <output_dir>/evaluation.json")
    add_mixes(add, read_config)
    export = add("export", run_export, "write an adapter: for diffusers and kohya / ComfyUI, or as a peft folder")
    export.add_argument(
        "--adapter", help="LoRA file, peft folder or checkpoint folder; default: the run's last checkpoint"
    )
    export.add_argument("--out", required=True)
    export.add_argument("--fp16", action="store_true", help="half precision, for distribution")
    export.add_argument("--merge", action="store_true", help="texts: the whole model with the adapter in its weights")
    score = add("score", run_score, "score pictures: a table, and the best and the worst to look at", config=False)
    score.add_argument("source", help="a folder of pictures, or a JSONL, JSON, CSV or parquet file")
    score.add_argument("--reward", action="append", default=[], help="may be given several times")
    score.add_argument("--prompts", help="of a folder: a file with a prompt a line, in the order of the names")
    score.add_argument("--prompt", help="one prompt for all pictures")
    score.add_argument("--image-column", help="of a file; default: image, file, file_name, path, ...")
    score.add_argument("--prompt-column", help="of a file; default: prompt, caption or text")
    score.add_argument("--metadata", action="append", default=[], help="a column that the rewards get; several times")
    score.add_argument("--device", default="auto", help="default: the first GPU, or the CPU")
    score.add_argument("--batch-size", type=int, default=32)
    score.add_argument("--cache", help="file of known scores; default: $DIFFALIGN_SCORE_CACHE, if it is set")
    score.add_argument("--out", default="scores.csv", help=".csv, .jsonl or .parquet (default: scores.csv)")
    score.add_argument("--grid", help="the best and the worst: .html or .png")
    score.add_argument("--show", type=int, default=12, help="how many of each (default: 12)")
    score.add_argument("--statistics", help="write what the reward 'mix' needs to standardise and rank: .json")
    label = add("annotate", run_annotate, "label pairs of pictures by a reward or a judge, for training", config=False)
    label.add_argument("source", help="pairs or pictures with prompts: a folder, or a JSONL, JSON, CSV or parquet file")
    label.add_argument("--reward", action="append", default=[], help="several times for several; the first decides")
    label.add_argument("--judge", help="a file of questions of mode pair or verdict, asked in both orders")
    label.add_argument("--out", required=True, help="folder for pairs.jsonl, images, report and answers")
    label.add_argument(
        "--pairs", help="of the pictures of a prompt: best_worst (default of rewards), all (of a judge) or ring"
    )
    label.add_argument("--margin", type=float, default=0.0, help="differences of at most this are ties (default: 0)")
    label.add_argument(
        "--ties", choices=["keep", "drop"], default="keep", help="label 0.5, or left out (default: keep)"
    )
    label.add_argument(
        "--inconsistent", choices=["tie", "drop"], default="tie", help="where the orders disagree (default: tie)"
    )
    label.add_argument("--prompts", help="of a folder: a file with a prompt a line, in the order of the names")
    label.add_argument("--prompt", help="one prompt for all pictures")
    label.add_argument("--image-column", help="of a file with one picture a row; default: image, file, file_name, ...")
    label.add_argument("--prompt-column", help="of a file; default: prompt, caption or text")
    label.add_argument("--metadata", action="append", default=[], help="a column that the rewards get; several times")
    label.add_argument("--device", default="auto", help="default: the first GPU, or the CPU")
    label.add_argument("--batch-size", type=int, default=32, help="pictures scored at a time (default: 32)")
    serve = add("serve-reward", run_serve_reward, "host a reward over HTTP, for the reward 'remote'", config=False)
    serve.add_argument("name", help="a reward of pictures or of texts, as it is named in a config")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    serve.add_argument("--port", type=int, default=8021, help="0 takes any that is free (default: 8021)")
    serve.add_argument("--device", default="auto", help="default: the first GPU, or the CPU")
    serve.add_argument("--max-batch", type=int, default=32, help="pictures or texts in a request (default: 32)")
    serve.add_argument("--max-mb", type=int, default=256, help="MiB in a request (default: 256)")
    serve.add_argument("--queue", type=int, default=8, help="requests that may wait; more get 503 (default: 8)")
    serve.add_argument("--token", help="demanded of clients; default: $DIFFALIGN_REWARD_TOKEN, if it is set")
    _add_data(commands, common)
    report = add("report", run_report, "write the HTML report of a run, or compare several", config=False)
    report.add_argument("runs", nargs="+", help="run folders")
    report.add_argument("--out", default="comparison.html", help="for several runs")
    lists = add("list", run_list, "what there is to name in a config", config=False)
    lists.add_argument("--long", action="store_true", help="what each is; the default on a terminal")
    lists.add_argument(
        "kind", nargs="?", choices=["objectives", "families", "readers", "rewards", "configs", "prompts"]
    )
    add("doctor", run_doctor, "versions, devices, optional packages", config=False)
    return parser


class _LateEpilog(argparse.ArgumentParser):
    """A parser whose help ends with a text that is only made when it is asked for."""

    late: Callable[[], str] | None = None

    def format_help(self) -> str:
        if self.late is not None:
            self.epilog = self.late()
        return super().format_help()


def _add_data(commands: Any, common: argparse.ArgumentParser) -> None:
    text = "look at a config's data, or make data from data"
    data = commands.add_parser("data", help=text, description=text)
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_LateEpilog)
    text = "read a config's data and account for every row, without training"
    check = actions.add_parser("check", help=text, description=text, parents=[common])
    check.add_argument("config", help="a YAML file, the name of a shipped config, or a run folder")
    check.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    check.set_defaults(run=run_data)
    text = "make training rows from other rows by a named recipe"
    make = actions.add_parser(
        "make", help=text, description=text, parents=[common], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    make.late = recipe_list
    make.add_argument("recipe", help="see below")
    make.add_argument("input", help="JSONL, JSON, parquet or CSV")
    make.add_argument("output", help="JSONL or parquet")
    make.add_argument("options", nargs="*", default=[], metavar="key=value", help="settings of the recipe")
    make.set_defaults(run=run_data_make)


def recipe_list() -> str:
    """Every recipe with its settings and what it does, a line each."""
    import inspect

    from diffalign.text.recipes import RECIPES

    lines = ["recipes:"]
    for name, function in RECIPES.items():
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        settings = " ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in own)
        summary = (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ")
        summary = summary.partition(". ")[0].rstrip(".")
        lines.append(f"  {name:<20} {summary}" + (f" [{settings}]" if settings else ""))
    return "\n".join(lines)


def set_up_logging(verbose: bool) -> None:
    """Our messages on standard error; other libraries only when they warn."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    ours = logging.getLogger("diffalign")
    ours.setLevel(logging.DEBUG if verbose else logging.INFO)
    ours.propagate = False
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        ours.addHandler(handler)


def run_train(args: argparse.Namespace) -> int:
    config = read_config(args)  # a typo must not wait for the imports below
    from diffalign.trainer import train

    result = train(config)
    if result.stopped_by:
        return 128 + result.stopped_by
    if os.environ.get("RANK", "0") == "0":  # one voice for all processes
        if result.result:
            print_result(result.result)
        print(f"run folder: {result.run_dir}")
    return 0


def run_demo(args: argparse.Namespace) -> int:
    from diffalign.config_loading import load_config
    from diffalign.trainer import train

    overrides = list(args.overrides)
    if not any(o.startswith("output_dir=") for o in overrides):
        overrides.append(f"output_dir={next_free('runs', args.config)}")
    result = train(load_config(args.config, overrides))
    if result.stopped_by:
        return 128 + result.stopped_by
    if result.result:
        print_result(result.result)
    print(f"open {result.run_dir / 'report.html'} to look at it")
    return 0


def next_free(parent: str, stem: str) -> Path:
    """`<parent>/<stem>-<n>` with the first n that does not exist."""
    n = 1
    while (path := Path(parent) / f"{stem}-{n}").exists():
        n += 1
    return path


def print_result(result: dict) -> None:  # type: ignore[type-arg]
    """The headline numbers of `result.json`."""
    if "metric" in result:
        low, high = result["win_rate_ci95"]
        gain_low, gain_high = result["gain_ci95"]
        print(f"metric              {result['metric']}")
        print(f"base -> aligned     {result['base_mean']:.4f} -> {result['aligned_mean']:.4f}")
        print(f"gain                {result['gain']:+.4f}   95 % interval [{gain_low:+.4f}, {gain_high:+.4f}]")
        print(f"win rate            {result['win_rate']:.3f}    95 % interval [{low:.3f}, {high:.3f}]")
    if "held_out_implicit_acc" in result:
        low, high = result["held_out_implicit_acc_ci95"]
        print(f"held-out accuracy   {result['held_out_implicit_acc']:.3f}    95 % interval [{low:.3f}, {high:.3f}]")
    for name in ("forget", "retain"):
        for what in ("recall", "probability"):
            if entry := result.get(f"{name}_{what}"):
                low, high = entry["change_ci95"]
                print(
                    f"{f'{name} {what}':<19} {entry['base']:.3f} -> {entry['aligned']:.3f}    95 % interval of the change "
                    f"[{low:+.3f}, {high:+.3f}]"
                )
    if "steps" in result:
        from diffalign.health import UNITS

        unit = next(unit for unit in UNITS if unit in result)
        print(
            f"{result['steps']} steps on {result[unit]} {unit} in {result['train_seconds']:.0f} s "
            f"({result['seconds_per_step']:.2f} s per step)"
        )


def read_config(args: argparse.Namespace) -> RunConfig:
    """The config named on the command line: a file, a shipped name, or a run folder, which then is the output folder."""
    from diffalign.config_loading import load_config

    inside = Path(args.config) / "config.yaml"
    if not inside.is_file():
        return load_config(args.config, args.overrides)
    # A run folder may have been moved since its config was written.
    return load_config(inside, [f"output_dir={args.config}", *args.overrides])


def run_plan(args: argparse.Namespace) -> int:
    config = read_config(args)
    from diffalign import _plan_rewards, plugins
    from diffalign.plan import make_plan, to_json
    from diffalign.plan_text import render

    if plugins.find("families", config.model.family).modality == "reward":  # type: ignore[attr-defined]
        told = _plan_rewards.plan_reward(config, gpu_gb=args.gpu_gb, num_processes=args.processes, pairs=args.pairs)
        print(json.dumps(dataclasses.asdict(told), indent=1) if args.json else _plan_rewards.render(told))
        return 0
    plan = make_plan(
        config,
        gpu_gb=args.gpu_gb,
        num_processes=args.processes,
        pairs=args.pairs,
    )
    print(to_json(plan) if args.json else render(plan))
    return 0


def run_cache(args: argparse.Namespace) -> int:
    from diffalign.commands import build_cache

    print(build_cache(read_config(args)))
    return 0


def add_negative(parser: argparse.ArgumentParser) -> None:
    """Options of the negative branch of guidance."""
    parser.add_argument(
        "--negative-adapter",
        help="LoRA file or run folder for the negative branch of guidance alone (Diffusion-NPO); no --adapter: the base's",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        help="share of --adapter in the negative branch (default: 1, or 0 for two adapters that were trained together)",
    )
    parser.add_argument(
        "--beta", type=float, help="weight of the negative adapter (default: negative.beta of the config, which is 1)"
    )


def refuse_asked(args: argparse.Namespace, config: RunConfig) -> None:
    """Language models see neither preferences nor users."""
    if args.preference or args.user:
        raise UserError(
            f"--preference, --user: family {config.model.family!r} writes texts, and sees neither; leave them out"
        )


def add_asked(parser: argparse.ArgumentParser) -> None:
    """Options of what networks that see preferences or users are told."""
    parser.add_argument(
        "--preference",
        action="append",
        default=[],
        metavar="W,W",
        help="weights of the rewards of a run on preferences, with sum 1, or NAME=W,...; several for a row of images each",
    )
    parser.add_argument("--user", action="append", default=[], help="id of somebody of a run on users; several as well")


def negative_of(args: argparse.Namespace) -> Path | None:
    """The adapter of the negative branch."""
    return Path(args.negative_adapter) if args.negative_adapter else None


def run_generate(args: argparse.Namespace) -> int:
    from diffalign.commands import generate, is_text

    config = read_config(args)
    if is_text(config):
        return generate_texts(args, config)
    if args.chat:
        raise UserError(f"--chat: family {config.model.family!r} makes images; leave it out")
    negative = negative_of(args)
    folder = generate(
        config,
        prompts=args.prompt or args.prompts,
        adapter=adapter_of(args) if args.adapter or negative is None else None,
        negative_adapter=negative,
        alpha=args.alpha,
        beta=args.beta,
        with_base=args.base,
        seed=args.seed,
        images_per_prompt=args.samples_per_prompt,
        out=Path(args.out),
        weights=args.preference,
        users=args.user,
    )
    print(f"images in {folder}")
    return 0


def generate_texts(args: argparse.Namespace, config: RunConfig) -> int:
    """`generate` of a language model: a file of answers, printed as well when they are few."""
    refuse_asked(args, config)
    if args.negative_adapter:
        raise UserError(
            f"--negative-adapter: family {config.model.family!r} writes texts, without guidance; leave it out"
        )
    from diffalign.text.commands import generate

    rows = generate(
        config,
        prompts=args.prompt or args.prompts,
        chat=args.chat,
        adapter=adapter_of(args),
        with_base=args.base,
        seed=args.seed,
        repeats=args.samples_per_prompt,
        out=Path(args.out),
    )
    if len(rows) <= 20:
        for row in rows:
            print(f"[{row['side']}] {row['prompt'].strip()}\n{row['text']}\n")
    print(f"{len(rows)} answers in {Path(args.out) / 'answers.jsonl'}")
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    from diffalign import commands

    config = read_config(args)
    negative = negative_of(args)
    adapter = adapter_of(args) if args.adapter or negative is None else None
    if adapter is None and negative is None:
        raise UserError("evaluate needs an adapter; give --adapter FILE, or a run folder instead of a config")
    if max(len(args.preference), len(args.user)) > 1:
        raise UserError(
            "evaluate: got several --preference or --user; expected one (pareto measures several preferences)"
        )
    out = Path(args.out) if args.out else Path(config.output_dir) / "evaluation.json"
    if commands.is_text(config):
        from diffalign.text.commands import evaluate_adapter as evaluate_texts

        refuse_asked(args, config)
        if adapter is None or negative is not None:
            raise UserError(
                f"--negative-adapter: family {config.model.family!r} writes texts, without guidance; leave it out"
            )
        print_result(evaluate_texts(config, adapter, out))
    else:
        print_result(
            commands.evaluate_adapter(
                config,
                adapter,
                out,
                negative_adapter=negative,
                alpha=args.alpha,
                beta=args.beta,
                against=args.against,
                weights=next(iter(args.preference), None),
                user=next(iter(args.user), None),
            )
        )
    print(f"written to {out}")
    return 0


def adapter_of(args: argparse.Namespace) -> Path | None:
    """The adapter named by the arguments, or the run folder's own."""
    if args.adapter:
        return Path(args.adapter)
    return Path(args.config) if (Path(args.config) / "config.yaml").is_file() else None


def run_export(args: argparse.Namespace) -> int:
    from diffalign import commands

    config = read_config(args)
    adapter, out = Path(args.adapter) if args.adapter else None, Path(args.out)
    if commands.is_text(config):
        from diffalign.text.commands import export_adapter as export_peft

        paths = export_peft(config, adapter, out, fp16=args.fp16, merge=args.merge)
    elif args.merge:
        raise UserError(
            f"--merge: only for language models; with family {config.model.family!r} load the exported adapter in "
            "diffusers, which fuses it with pipe.fuse_lora()"
        )
    else:
        paths = commands.export_adapter(config, adapter, out, args.fp16)
    for path in paths:
        print(path)
    return 0


def run_data(args: argparse.Namespace) -> int:
    from diffalign.commands import check_data

    report, path = check_data(read_config(args))
    print(report.summary())
    print(f"every row that was taken out: {path}")
    return 0


def run_data_make(args: argparse.Namespace) -> int:
    from diffalign.text.recipes import make

    options = {}
    for word in args.options:
        name, equals, value = word.partition("=")
        if not (name and equals):
            raise UserError(f"data make: got {word!r}; settings are given as key=value")
        options[name] = value
    print(make(args.recipe, args.input, args.output, **options).summary())
    return 0


def read_pictures(args: argparse.Namespace, **more: Any) -> Settings:
    """Which pictures `score` and `annotate` are about, and which rewards judge them."""
    from diffalign import reward_server, score

    return score.Settings(
        source=Path(args.source),
        rewards=tuple(args.reward),
        prompts=Path(args.prompts) if args.prompts else None,
        prompt=args.prompt,
        image_column=args.image_column,
        prompt_column=args.prompt_column,
        metadata=tuple(args.metadata),
        device=reward_server.check_device(args.device),
        batch_size=args.batch_size,
        **more,
    )


def run_score(args: argparse.Namespace) -> int:
    from diffalign import score

    settings = read_pictures(args, cache=Path(args.cache) if args.cache else None, show=args.show)
    out, grid = Path(args.out), Path(args.grid) if args.grid else None
    score.check(settings, out, grid)
    scored = score.score(settings)
    score.write_table(out, scored.table())
    print(scored.summary())
    print(f"table: {out}")
    if scored.report.skipped or scored.report.bad_shards:
        listed = out.with_name(f"{out.name}.report.json")
        scored.report.write(listed)
        print(f"every row that could not be scored: {listed}")
    if grid is not None:
        score.write_grid(grid, scored)
        print(f"best and worst: {grid}")
    if args.statistics:
        score.write_statistics(Path(args.statistics), scored)
        print(f"statistics: {args.statistics}")
    return 0


def run_annotate(args: argparse.Namespace) -> int:
    from diffalign import annotate

    settings = annotate.Settings(
        source=read_pictures(args),
        out=Path(args.out),
        judge=Path(args.judge) if args.judge else None,
        pairs=args.pairs,
        margin=args.margin,
        ties=args.ties,
        inconsistent=args.inconsistent,
    )
    annotate.check(settings)
    result = annotate.annotate(settings)
    print(result.summary())
    print(f"pairs: {settings.out / 'pairs.jsonl'} (data.format=jsonl); report: {settings.out / 'report.html'}")
    return 0


def run_serve_reward(args: argparse.Namespace) -> int:
    from diffalign import reward_server

    device = reward_server.check_device(args.device)
    token = args.token or os.environ.get("DIFFALIGN_REWARD_TOKEN") or None
    server = reward_server.RewardServer(
        reward_server.load_any(args.name, device),
        args.name,
        host=args.host,
        port=args.port,
        device=device,
        max_batch=args.max_batch,
        max_bytes=args.max_mb << 20,
        queue=args.queue,
        token=token,
    )
    if token is None and args.host not in ("127.0.0.1", "localhost", "::1"):
        logging.getLogger("diffalign").warning(
            "no token: whoever reaches %s may use the reward; give --token", server.url
        )
    kind = "remote" if server.health.kind == "images" else "remote_text"
    print(f"{args.name} on {device}, at most {args.max_batch} a request; use it as {kind}:{server.url}", flush=True)
    reward_server.serve(server)
    return 0


def run_report(args: argparse.Namespace) -> int:
    from diffalign.report import render_index, write_report

    folders = [Path(run) for run in args.runs]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"run folder {folder} does not exist")
    if len(folders) == 1:
        print(write_report(folders[0]))
    else:
        print(render_index(folders, Path(args.out)))
    return 0


def run_list(args: argparse.Namespace) -> int:
    from diffalign import plugins
    from diffalign.config_loading import config_folder

    folder = config_folder()
    prompts = Path(__file__).parent / "data" / "prompts"
    lists: dict[str, list[str]] = {
        kind: plugins.names(kind) for kind in ("objectives", "families", "readers", "rewards")
    }
    lists["configs"] = sorted(p.stem for p in folder.glob("*.yaml"))
    lists["prompts"] = sorted([p.stem for p in prompts.glob("*.txt")] + ["world_heldout", "world_train"])
    if args.kind in ("objectives", "rewards") and (args.long or sys.stdout.isatty()):
        from diffalign import listing

        print(listing.objective_table() if args.kind == "objectives" else listing.reward_table())
        return 0
    for kind, names in lists.items():
        if args.kind in (None, kind):
            print(f"{kind + ':':<12} {' '.join(names)}" if args.kind is None else "\n".join(names))
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    from diffalign.commands import doctor

    print(json.dumps(doctor(), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
