"""Write docs/reference/{config,objectives,components}.md from the docstrings.

    python scripts/generate_reference.py            (or: make reference)
    python scripts/generate_reference.py --check    (exit code 1 if a committed page is out of date)

Every key of the configuration is an attribute of a dataclass, described under `Attributes:` in its docstring. A key without
a description is an error here, so that none can stay undocumented.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import typing
from pathlib import Path
from typing import Any

from diffalign import config, losses, plugins, rewards
from diffalign.losses import IncompatibleObjective, Kind, Objective

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"
NOTE = "<!-- Written by scripts/generate_reference.py from the docstrings: change those, then run `make reference`. -->"
SECTIONS: dict[str, type] = {
    "model": config.ModelConfig,
    "data": config.DataConfig,
    "data.world_pairs": config.WorldPairsConfig,
    "data.world_text": config.WorldTextConfig,
    "text": config.TextConfig,
    "cache": config.CacheConfig,
    "denoising": config.DenoisingConfig,
    "reference": config.ReferenceConfig,
    "negative": config.NegativeConfig,
    "users": config.UsersConfig,
    "preference": config.PreferenceConfig,
    "lora": config.LoraConfig,
    "judge": config.JudgeConfig,
    "sparse": config.SparseConfig,
    "training": config.TrainingConfig,
    "rollout": config.RolloutConfig,
    "sampling": config.SamplingConfig,
    "generation": config.GenerationConfig,
    "evaluation": config.EvaluationConfig,
}
KINDS = {
    Kind.TOKEN: "text",
    Kind.STEP: "trajectories",
    Kind.BOUND: "denoising",
    Kind.REWARD: "reward gradient",
    Kind.JUDGE: "judge",
}


def attributes(cls: type) -> dict[str, str]:
    """Descriptions by attribute name, from a class's Google-style docstring and those of its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.getdoc(base) if "__doc__" in vars(base) and vars(base)["__doc__"] else None
        body = (text or "").partition("Attributes:\n")[2].partition("\n\n")[0]
        for entry in re.split(r"\n(?=    \S)", "\n" + body):
            names, colon, description = entry.strip().partition(": ")
            if colon:
                found |= {name.strip(): " ".join(description.split()) for name in names.split(",")}
    return found


def type_name(hint: Any) -> str:
    """A declared type in plain words."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(f"`{option}`" for option in options)
    if typing.get_origin(hint) is tuple:
        return "list"
    if options:
        return " or ".join("`null`" if option is type(None) else type_name(option) for option in options)
    names = {str: "text", int: "whole number", float: "number", bool: "`true`/`false`"}
    return names.get(hint, "section" if dataclasses.is_dataclass(hint) else str(hint))


def default_of(field: dataclasses.Field[Any]) -> str:
    """A default as it would stand in YAML."""
    if field.default is dataclasses.MISSING:
        return "*required*" if field.default_factory is dataclasses.MISSING else ""
    value = field.default
    words = {None: "null", True: "true", False: "false", (): "[]", "": '""'}
    if isinstance(value, (bool, str, tuple)) or value is None:
        return f"`{words.get(value, value)}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def table(cls: type) -> list[str]:
    """A Markdown table of a dataclass's keys.

    Raises:
        ValueError: a key has no description.
    """
    hints, described = typing.get_type_hints(cls), attributes(cls)
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(cls):
        if field.name not in described:
            raise ValueError(f"{cls.__name__}.{field.name} is not described under Attributes: in its docstring")
        cells = [f"`{field.name}`", type_name(hints[field.name]), default_of(field), described[field.name]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def summary(cls: type) -> str:
    """The docstring up to its list of attributes."""
    return " ".join((inspect.getdoc(cls) or "").partition("Attributes:")[0].split())


def config_page() -> str:
    """The page of all configuration keys."""
    lines = [
        NOTE,
        "# Configuration keys",
        "",
        "One YAML file per run. A key that is not listed here is an error that names the nearest one. On the command line "
        "any key can be set as `section.key=value`; the value is read as YAML, so lists are `data.sources=[a,b]` and "
        "nothing is `null`. Sizes of batches count pairs, per device. The resolved configuration of a run is the "
        "`config.yaml` in its folder.",
        "",
        "## Top level",
        "",
        "| key | type | default | meaning |",
        "| --- | --- | --- | --- |",
    ]
    described = attributes(config.RunConfig)
    for field in dataclasses.fields(config.RunConfig):
        if field.name in described and field.name != "objective":
            hint = typing.get_type_hints(config.RunConfig)[field.name]
            lines.append(f"| `{field.name}` | {type_name(hint)} | {default_of(field)} | {described[field.name]} |")
    for name, cls in SECTIONS.items():
        lines += ["", f"## {name}", "", summary(cls), "", *table(cls)]
    lines += [
        "",
        "## objective",
        "",
        "`objective.name` chooses the method: one of the [objectives](objectives.md), or the path of your own `.py` file. "
        "The other keys are the fields of its class.",
    ]
    return "\n".join(lines) + "\n"


def paper(cls: type[Objective]) -> str:
    """A link to the paper; ids from memory keep their question mark."""
    number = cls.paper.rstrip("?")
    mark = " (id from memory)" if cls.paper.endswith("?") else ""
    return f"[{number}](https://arxiv.org/abs/{number}){mark}" if number else ""


def made(cls: type[Objective]) -> Objective:
    """An instance with its default settings; what has no published default is given a number here."""
    missing = [f.name for f in dataclasses.fields(cls) if default_of(f) == "*required*"]
    return cls(**dict.fromkeys(missing, 0.1))


def kinds_of(cls: type[Objective]) -> str:
    """The kinds of score that an objective takes with its default settings, and those that other settings allow."""
    found = []
    for kind, word in KINDS.items():
        try:
            made(cls).check(kind)
            found.append(word)
        except IncompatibleObjective as refusal:
            if "beta has no default" in refusal.why:
                found.append(f"{word} (set beta)")
            elif refusal.instead.startswith("set objective."):
                found.append(f"{word} ({refusal.instead.removeprefix('set objective.').partition(',')[0]})")
    return ", ".join(found)


def needs_of(cls: type[Objective]) -> str:
    """Layout, reference and further inputs of an objective."""
    needs = cls.needs
    parts = [" + ".join(needs.layout), "reference" if made(cls).reads_reference() else ""]
    parts += [
        "old policy" if needs.old else "",
        *needs.stats,
        *needs.extra,
        *(f"`{n}`" for n in made(cls).vocabulary()),
    ]
    return ", ".join(part for part in parts if part)


def objectives_page() -> str:
    """The table of all objectives, and what each of them says about itself."""
    count = len(losses.catalogue())
    lines = [
        NOTE,
        "# Objectives",
        "",
        f"{count} named compositions of the [preference core](../explanation/preference-core.md). *Needs* is what the data "
        "and the policy must supply. *Scores* are the kinds it means something on: text (token log-probabilities), "
        "trajectories (log-densities of sampled steps), denoising (errors of diffusion and flow models). *Parity* is the "
        "independent implementation that values and gradients are compared with in the tests; every objective is also "
        "compared with a transcription of its formula, and mutated. *Experimental*: the published formula was not "
        "available in full; what is unknown stands below.",
    ]
    head = ["name", "title", "paper", "needs", "scores", "parity", "status"]
    for module, members in losses.FAMILIES.items():
        found = [losses.find(name) for name in members]
        lines += [
            "",
            f"## {title_of(getattr(losses, module))}",
            "",
            f"| {' | '.join(head)} |",
            "|" + " --- |" * len(head),
        ]
        for cls in found:
            cells = [
                f"[`{cls.name}`](#{cls.name})",
                cls.title,
                paper(cls),
                needs_of(cls),
                kinds_of(cls),
                cls.parity,
                cls.status,
            ]
            lines.append("| " + " | ".join(plain(cell) for cell in cells) + " |")
    for cls in losses.catalogue().values():
        lines += objective_section(cls)
    return "\n".join(lines) + "\n"


def title_of(module: Any) -> str:
    """The first line of a module's docstring, as a heading."""
    return str((module.__doc__ or "").strip().splitlines()[0]).rstrip(".")


def objective_section(cls: type[Objective]) -> list[str]:
    """Name, composition, text and keys of one objective."""
    text = (inspect.getdoc(cls) or "").partition("Attributes:")[0].strip()
    lines = ["", f"### {cls.name}", "", f"*{cls.title}*: {cls.composition}.", "", *prose(text)]
    if cls.unknown:
        lines += ["", f"**Experimental.** Unknown: {cls.unknown}."]
    if cls.instead:
        lines += ["", f"Where it is refused: {cls.instead}."]
    return [*lines, "", *(table(cls) if dataclasses.fields(cls) else [])]


def prose(text: str) -> list[str]:
    """Paragraphs of a docstring as Markdown; mathematics keeps its asterisks and underscores."""
    found: list[str] = []
    for paragraph in text.split("\n\n"):
        found += ["", " ".join(re.sub(r"([*_<])", r"\\\1", line.strip()) for line in paragraph.splitlines())]
    return found[1:]


def plain(cell: str) -> str:
    """Text for a table cell: no HTML, no cell borders."""
    return cell.replace("|", "\\|").replace("<", "&lt;")


def reward_rows() -> list[str]:
    """One table row per reward model."""
    rows = []
    for name in plugins.names("rewards"):
        about = rewards.describe(name)
        low, high = about.range
        argument = f" After a colon: {about.argument}." if about.argument else ""
        differentiable = "yes" if about.differentiable else "no"
        cells = [
            f"`{name}`",
            about.summary + argument,
            f"{low:g} to {high:g}; {about.unit}",
            differentiable,
            about.weights or "none",
            about.licence,
            about.gap,
        ]
        rows.append("| " + " | ".join(plain(cell) for cell in cells) + " |")
    return rows


def components_page() -> str:
    """The page of everything that a configuration can name."""
    lines = [
        NOTE,
        "# Objectives, families, readers, rewards",
        "",
        "What `diffalign list` prints, with what each file says about itself. A name is a file name; the path of a `.py` "
        "file of your own works in its place (see [add a component](../how-to/add-a-component.md)).",
        "",
        "## Objectives (`objective.name`)",
        "",
        f"{len(losses.catalogue())}, on [a page of their own](objectives.md).",
    ]
    lines += ["", "## Families (`model.family`)", "", "| name | models |", "| --- | --- |"]
    families: dict[str, Any] = {name: plugins.find("families", name) for name in plugins.names("families")}
    lines += [f"| `{name}` | {cls.title} |" for name, cls in families.items()]
    lines += ["", "## Readers (`data.format`)", "", "| name | what a source looks like |", "| --- | --- |"]
    readers: dict[str, Any] = {name: plugins.find("readers", name) for name in plugins.names("readers")}
    lines += [f"| `{name}` | {plain(cls.layout)} |" for name, cls in readers.items()]
    head = ["name", "score", "range and unit", "differentiable", "weights", "licence", "known gap to the original"]
    lines += ["", "## Rewards (`evaluation.rewards`)", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + reward_rows()) + "\n"


PAGES = {"config.md": config_page, "objectives.md": objectives_page, "components.md": components_page}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    stale = []
    for name, page in PAGES.items():
        path, text = FOLDER / name, page()
        if args.check:
            stale += [] if path.is_file() and path.read_text(encoding="utf-8") == text else [name]
        else:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"out of date: {', '.join(stale)}; run: make reference", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
