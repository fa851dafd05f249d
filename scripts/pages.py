"""What scripts write into pages of the documentation: the part between two marks, and nothing else of them."""

from __future__ import annotations

from pathlib import Path


def put(page: Path, mark: str, text: str) -> None:
    """Replace what stands between `<!-- mark:start -->` and `<!-- mark:end -->`.

    Raises:
        ValueError: the page lacks one of the marks.
    """
    whole, start, end = page.read_text(), f"<!-- {mark}:start -->", f"<!-- {mark}:end -->"
    before, after = whole[: whole.index(start) + len(start)], whole[whole.index(end) :]
    page.write_text(f"{before}\n{text}\n{after}")
