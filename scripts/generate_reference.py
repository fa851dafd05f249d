"""Write docs/reference/config.md and docs/reference/components.md from the docstrings.

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

from diffalign import config, plugins, rewards

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"
NOTE = "<!-- Written by scripts/generate_reference.py from the docstrings: change those, then run `make reference`. -->"
SECTIONS: dict[str, type] = {
    "model": config.ModelConfig,
    "data": config.DataConfig,
    "data.world_pairs": config.WorldPairsConfig,
    "cache": config.CacheConfig,
    "lora": config.LoraConfig,
    "training": config.TrainingConfig,
    "sampling": config.SamplingConfig,
    "evaluation": config.EvaluationConfig,
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
        "`objective.name` chooses the method: a file of `diffalign/objectives`, or the path of your own `.py` file. The "
        "other keys are the fields of its class.",
    ]
    for name in plugins.names("objectives"):
        cls = plugins.find("objectives", name)
        lines += ["", f"### objective.name: {name}", "", summary(cls), "", *table(cls)]
    return "\n".join(lines) + "\n"


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
        "| name | title | trains on | reference |",
        "| --- | --- | --- | --- |",
    ]
    for name in plugins.names("objectives"):
        cls: Any = plugins.find("objectives", name)
        lines.append(f"| `{name}` | {cls.title} | {cls.layout} | {'needed' if cls.uses_reference else 'not used'} |")
    lines += ["", "## Families (`model.family`)", "", "| name | models |", "| --- | --- |"]
    families: dict[str, Any] = {name: plugins.find("families", name) for name in plugins.names("families")}
    lines += [f"| `{name}` | {cls.title} |" for name, cls in families.items()]
    lines += ["", "## Readers (`data.format`)", "", "| name | what a source looks like |", "| --- | --- |"]
    readers: dict[str, Any] = {name: plugins.find("readers", name) for name in plugins.names("readers")}
    lines += [f"| `{name}` | {plain(cls.layout)} |" for name, cls in readers.items()]
    head = ["name", "score", "range and unit", "differentiable", "weights", "licence", "known gap to the original"]
    lines += ["", "## Rewards (`evaluation.rewards`)", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + reward_rows()) + "\n"


PAGES = {"config.md": config_page, "components.md": components_page}


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
