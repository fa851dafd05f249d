"""Mistakes that the user can mend. The command line prints them as one line and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What was got, what was expected, what to do: one line, no traceback unless `--debug`."""


class ConfigError(UserError):
    """A configuration that cannot be run."""


class DataError(UserError):
    """A data set or cache that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint or adapter file that does not fit."""


class MissingExtraError(UserError):
    """An optional package is needed.

    Args:
        package: what failed to import.
        extra: the name of our extra that installs it.
        why: what asked for it.
    """

    def __init__(self, package: str, extra: str, why: str) -> None:
        super().__init__(f"{why} needs the package {package!r}; install it with: pip install 'diffalign[{extra}]'")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """How the sentence that says what is wrong ends: `; did you mean 'x'?` with the nearest name, or a full stop."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else "."
