"""Reading and writing configurations: YAML, `section.key=value` overrides, and strict conversion to the sections' types.

A key that no section declares is an error with the nearest known name; values are converted by declared type (PyYAML reads
`1e-5` as a string). The objective's section *is* the objective's own dataclass, found by its `name`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from diffalign import plugins
from diffalign.config import RunConfig
from diffalign.errors import ConfigError, did_you_mean

T = TypeVar("T")


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file (or the name of a shipped config), apply `section.key=value` overrides, and check every key.

    Raises:
        ConfigError: no such file, bad YAML, an unknown key, a value of the wrong type.
    """
    tree = read_tree(path)
    for override in overrides:
        apply_override(tree, override)
    _drop_other_spellings(tree, overrides)
    return build(tree)


def _drop_other_spellings(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """An overridden setting of the objective replaces the file's own, under whichever of its names that one stands."""
    section = tree.get("objective")
    given = [o.partition("=")[0].removeprefix("objective.") for o in overrides if o.startswith("objective.")]
    if not given or not isinstance(section, dict) or "name" not in section:
        return
    aliases: Mapping[str, str] = plugins.find("objectives", str(section["name"])).aliases  # type: ignore[attr-defined]
    for key in given:
        for other in [k for k in section if k != key and aliases.get(k, k) == aliases.get(key, key) and k not in given]:
            del section[other]


def read_tree(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The raw YAML mapping of a config file or of a shipped config's name."""
    file = find_config(path)
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not readable as YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected a mapping of sections, got {type(tree).__name__}")
    return tree


def config_folder() -> Path:
    """`configs/` of the installed wheel, or of the checkout."""
    inside = Path(__file__).parent / "_configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def find_config(path: str | os.PathLike[str]) -> Path:
    """A config file by path, or a shipped one by name (with or without `configs/` and `.yaml`)."""
    file = Path(path)
    if file.is_file():
        return file
    shipped = config_folder() / (file.stem + ".yaml")
    if shipped.is_file() and (file.parent in (Path("."), Path("configs"))):
        return shipped
    known = sorted(p.stem for p in config_folder().glob("*.yaml"))
    raise ConfigError(
        f"config {str(path)!r} not found (no such file, no shipped config){did_you_mean(file.stem, known)} "
        f"Shipped: {', '.join(known) or 'none'}"
    )


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in a raw tree; the value is read as YAML.

    Raises:
        ConfigError: not of that form.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key=value, such as training.learning_rate=1e-5")
    parts = key.split(".")
    node = tree
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {part!r} is a value, not a section")
        node = child
    try:
        node[parts[-1]] = yaml.safe_load(text) if text.strip() else text
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not readable as YAML") from error


def build(tree: Mapping[str, Any]) -> RunConfig:
    """Turn a raw tree into a `RunConfig`."""
    _refuse_unknown(tree, [f.name for f in dataclasses.fields(RunConfig)], "")
    tree = dict(tree)
    objective = _build_objective(tree.pop("objective", None))
    return from_mapping(RunConfig, tree, "", given={"objective": objective})


def _build_objective(section: Any) -> Any:
    if not isinstance(section, Mapping) or "name" not in section:
        raise ConfigError(
            "objective: expected a section with a name, such as 'objective: {name: dpo, beta: 5000}'. "
            f"Available: {', '.join(plugins.names('objectives'))}"
        )
    cls = plugins.find("objectives", str(section["name"]))
    aliases: Mapping[str, str] = cls.aliases  # type: ignore[attr-defined]
    rest: dict[str, Any] = {}
    spelling: dict[str, str] = {}
    for key, value in section.items():
        ours = aliases.get(key, key)
        if rest.get(ours) is not None and value is not None:
            raise ConfigError(f"objective.{key}: given twice; {key!r} and {spelling[ours]!r} are the same setting")
        if key != "name" and rest.get(ours) is None:
            rest[ours], spelling[ours] = value, key
    return from_mapping(cls, rest, "objective")


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str, given: Mapping[str, Any] | None = None) -> T:
    """Build a dataclass from a mapping, strictly.

    Args:
        cls: the dataclass.
        values: raw values, converted by the declared types.
        where: dotted path, for messages.
        given: ready values that are not converted.

    Raises:
        ConfigError: unknown key, missing key, wrong type.
    """
    given = given or {}
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    _refuse_unknown(values, [name for name in fields if name not in given], prefix)
    arguments = {k: convert(v, hints[k], f"{prefix}{k}") for k, v in values.items()}
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in arguments and name not in given:
            raise ConfigError(f"{prefix}{name}: missing; it has no default")
    try:
        return cls(**arguments, **given)
    except ValueError as error:  # a dataclass's own checks
        raise ConfigError(f"{where or 'config'}: {error}") from error


def _refuse_unknown(values: Mapping[str, Any], known: Sequence[str], prefix: str) -> None:
    for key in values:
        if key not in known:
            near = _elsewhere(str(key), prefix) or did_you_mean(str(key), known)
            raise ConfigError(f"{prefix}{key}: unknown key{near} Known: {', '.join(sorted(known))}")


# Names of earlier versions and of TRL, by what they are here.
_RENAMED = {
    "objective.loss_type": "objective.name (dpo, robust_dpo, hinge, ipo, ...)",
    "objective.ipo_scale": "a setting of objective 'ipo'",
    "objective.label_noise": "a setting of objective 'robust_dpo'",
    "lr": "training.learning_rate",
    "batch_size": "training.train_batch_size",
    "per_device_train_batch_size": "training.train_batch_size",
    "max_steps": "training.max_train_steps",
    "num_train_epochs": "training.max_train_steps, which counts optimiser steps",
    "max_completion_length": "generation.max_new_tokens",
    "num_generations": "rollout.samples_per_prompt",
    "reward_funcs": "rollout.rewards",
    "dataset": "data.sources",
    "train_dataset": "data.sources",
    "model_name_or_path": "model.pretrained",
}


def _elsewhere(key: str, prefix: str) -> str:
    """Where a setting stands that was looked for in the wrong section or under another name; empty if nowhere."""
    if found := _RENAMED.get(f"{prefix}{key}") or _RENAMED.get(key):
        return f"; it is {found}."
    hints = typing.get_type_hints(RunConfig)
    places = [key] if key in hints else []
    for name, hint in hints.items():
        if (
            dataclasses.is_dataclass(hint)
            and f"{name}." != prefix
            and key in [f.name for f in dataclasses.fields(hint)]
        ):
            places.append(f"{name}.{key}")
    return f"; it is {' or '.join(places)}." if places else ""


def convert(value: Any, hint: Any, where: str) -> Any:
    """Convert a YAML value to a declared type.

    Raises:
        ConfigError: it does not fit.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        errors = []
        # Exact types first, so that `1` in `int | str` stays an int and "auto" reaches its Literal.
        for option in sorted(options, key=lambda o: o is not type(value)):
            if option is type(None):
                continue
            try:
                return convert(value, option, where)
            except ConfigError as error:
                errors.append(str(error))
        raise ConfigError(errors[-1] if len(errors) == 1 else f"{where}: got {value!r}; {_describe(hint)} expected")
    if origin is Literal:
        if value in options and not (isinstance(value, bool) and True not in options and False not in options):
            return value
        if value is False and "no" in options:  # YAML 1.1 reads a bare `no` as false
            return "no"
        near = did_you_mean(str(value), [str(o) for o in options])
        raise ConfigError(f"{where}: got {value!r}; expected one of {', '.join(map(repr, options))}{near}")
    if origin is tuple:
        # `key=` on the command line empties a list.
        items = ([value] if value else []) if isinstance(value, str) else value
        if not isinstance(items, Sequence):
            raise ConfigError(f"{where}: got {value!r}; a list expected")
        return tuple(convert(item, options[0], f"{where}[{i}]") for i, item in enumerate(items))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: got {value!r}; a section with keys expected")
        return {str(key): convert(item, options[1], f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: got {value!r}; a section with keys expected")
        return from_mapping(typing.cast(type, hint), value, where)
    if hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, str) and (number := _number(value)) is not None and number.is_integer():
            return int(number)
    elif hint is float:
        number = None if isinstance(value, bool) else _number(value)
        if number is not None:
            return number
    elif hint is str:
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
    elif hint is Any:
        return value
    raise ConfigError(f"{where}: got {value!r} ({type(value).__name__}); {_describe(hint)} expected")


def _number(value: Any) -> float | None:
    """A finite number; PyYAML leaves `1e-5` a string."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _describe(hint: Any) -> str:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if o is type(None) else _describe(o) for o in options)
    if origin is Literal:
        return " or ".join(map(repr, options))
    if origin is tuple:
        return "a list"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def to_tree(config: Any) -> Any:
    """A plain tree (for YAML or JSON) of a config; the objective keeps its name."""
    if isinstance(config, RunConfig):
        tree = {f.name: to_tree(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return tree | {"objective": {"name": plugins.name_of(type(config.objective)), **tree["objective"]}}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_tree(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple):
        return [to_tree(item) for item in config]
    return config


def dump(config: RunConfig) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True, width=110)
