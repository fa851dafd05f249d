"""Progress for people: a bar with rate and time left on a terminal, silence elsewhere."""

from __future__ import annotations

import sys

from tqdm import tqdm


class Progress:
    """A progress bar that shows nothing when standard error is no terminal.

    Args:
        title: what is going on.
        total: number of items, or None if unknown.
        unit: of the items.
        start: items done before (resume).
        show: False never shows it (other processes than the main one).
    """

    def __init__(self, title: str, total: int | None, unit: str = "it", start: int = 0, show: bool = True) -> None:
        self._bar = tqdm(
            desc=title,
            total=total,
            unit=unit,
            initial=start,
            disable=not (show and sys.stderr.isatty()),
            dynamic_ncols=True,
            leave=False,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self, n: int = 1) -> None:
        """Count `n` more items as done."""
        self._bar.update(n)

    def set(self, n: int) -> None:
        """Set the number of items done."""
        self._bar.update(n - self._bar.n)

    def note(self, text: str) -> None:
        """Show a few numbers behind the bar."""
        self._bar.set_postfix_str(text, refresh=False)
