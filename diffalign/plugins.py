"""Components by file name: `diffalign/families/sdxl.py` holds the family `sdxl`, and so on.

A kind is a package folder; a plugin is a module in it whose name does not start with an underscore; its class is the
module's one public class that the kind's base class accepts. Names are listed without importing anything.
A name may also be `path/to/file.py`: a user's own plug-in outside the package. Objectives are the exception: those of the
project are the named compositions of the preference core, several to a file (`diffalign.losses.catalogue`).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from diffalign.errors import ConfigError, did_you_mean

# kind -> (package, name of the base class that lives in the package's __init__)
KINDS = {
    "objectives": ("diffalign.losses", "Objective"),
    "families": ("diffalign.families", "Family"),
    "readers": ("diffalign.data.readers", "Reader"),
    "rewards": ("reward_models", "RewardModel"),
}
_SINGULAR = {"objectives": "objective", "families": "family", "readers": "data format", "rewards": "reward"}


def _folder(kind: str) -> Path:
    spec = importlib.util.find_spec(KINDS[kind][0])
    assert spec is not None, f"package {KINDS[kind][0]} is part of this project"
    assert spec.origin is not None, "a package with an __init__ has a file"
    return Path(spec.origin).parent


def names(kind: str) -> list[str]:
    """The plugin names of a kind, without importing them (but the preference core, for objectives); sorted."""
    if kind == "objectives":
        from diffalign import losses

        return sorted(losses.names())
    return sorted(p.stem for p in _folder(kind).glob("*.py") if not p.stem.startswith("_"))


@cache
def find(kind: str, name: str) -> type:
    """The class of a plugin.

    Raises:
        ConfigError: no such name, or a file without exactly one plugin class.
    """
    package, base_name = KINDS[kind]
    if name.endswith(".py"):
        module = _load_file(kind, Path(name))
    elif kind == "objectives" and name in names(kind):
        from diffalign import losses

        return losses.find(name)
    elif name in names(kind):
        module = importlib.import_module(f"{package}.{name}")
    else:
        known = names(kind)
        raise ConfigError(
            f"{_SINGULAR[kind]} {name!r} not found{did_you_mean(name, known)} Available: {', '.join(known)}"
        )
    base = _base(kind)
    found = [
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if member.__module__ == module.__name__ and issubclass(member, base) and not member.__name__.startswith("_")
    ]
    if len(found) != 1:
        raise ConfigError(
            f"{_SINGULAR[kind]} file {name!r} must define exactly one public subclass of {base_name}; "
            f"found {', '.join(c.__name__ for c in found) or 'none'}"
        )
    return found[0]


def _base(kind: str) -> type:
    package, base_name = KINDS[kind]
    owner = "diffalign.rewards" if kind == "rewards" else package
    return getattr(importlib.import_module(owner), base_name)  # type: ignore[no-any-return]


@cache
def _load_file(kind: str, path: Path) -> ModuleType:
    """Run a user's file once; a file that failed may be tried again."""
    if not path.is_file():
        raise ConfigError(f"{_SINGULAR[kind]} file {str(path)!r} does not exist")
    # Two files of one stem are two modules; dataclasses and `inspect` look their module up in sys.modules.
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"diffalign_user_{kind}_{path.stem}_{place}", path)
    assert spec is not None, "a .py path always has a spec"
    assert spec.loader is not None, "and a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        del sys.modules[spec.name]
        raise ConfigError(
            f"{_SINGULAR[kind]} file {str(path)!r} does not run: {type(error).__name__}: {error}"
        ) from error
    return module


def has_class(kind: str, path: str) -> bool:
    """Whether a user's `.py` file defines a plugin class of a kind.

    Raises:
        ConfigError: no such file, or one that does not run.
    """
    module, base = _load_file(kind, Path(path)), _base(kind)
    return any(
        issubclass(member, base) and member.__module__ == module.__name__
        for _, member in inspect.getmembers(module, inspect.isclass)
    )


def find_function(kind: str, path: str, name: str) -> Callable[..., Any]:
    """A function of a user's `.py` file.

    Raises:
        ConfigError: no such file, one that does not run, or no such function in it.
    """
    functions = dict(inspect.getmembers(_load_file(kind, Path(path)), inspect.isfunction))
    if name not in functions:
        raise ConfigError(
            f"{_SINGULAR[kind]} file {path!r} has no function {name!r}{did_you_mean(name, functions)} "
            f"It has: {', '.join(functions) or 'none'}"
        )
    found: Callable[..., Any] = functions[name]
    return found


def name_of(cls: type) -> str:
    """The plugin name of a class: its module's file name (or its path, for a user's own file)."""
    if cls.__module__.startswith("diffalign_user_"):
        return str(inspect.getfile(cls))
    if cls.__module__.startswith("diffalign.losses."):
        return cls.name  # type: ignore[attr-defined,no-any-return]
    return cls.__module__.rpartition(".")[2]
