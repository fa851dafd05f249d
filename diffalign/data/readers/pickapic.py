"""Pick-a-Pic v1 and v2 (Kirstain et al. 2023, arXiv 2305.01569) as parquet with inline image bytes.

One row is one comparison of two images of a prompt by one user. (label_0, label_1) is (1, 0), (0, 1) or, for a tie,
(0.5, 0.5). `num_example_per_prompt` counts the comparisons of the row's prompt. Mirrors differ in whether `jpg_0` is
plain binary or an image struct; both are read. Some images cannot be decoded, and the two of a row may differ in size.

Copies with more columns say more: `score_0`, `score_1` (or SmPO's `ps_score_0`, `ps_score_1`) are one reward of each image;
`aspect`, and `map_0`, `map_1` as lists of rows, are as in `diffalign.data.facts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffalign.data.readers import (
    BadRow,
    Place,
    Reader,
    image_bytes,
    optional_text,
    probability,
    prompt_text,
    split_files,
)
from diffalign.data.record import ImageItem, Record

REQUIRED = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
OPTIONAL = (
    "has_label",
    "user_id",
    "num_example_per_prompt",
    "ranking_id",
    "image_0_uid",
    "image_1_uid",
    "model_0",
    "model_1",
)
SCORES = (("score_0", "score_1"), ("ps_score_0", "ps_score_1"))  # the first that a row has
REWARD_LISTS = ("rewards_0", "rewards_1")  # several scores of an image each; before single ones
FACTS = ("aspect", "map_0", "map_1", *REWARD_LISTS, *(name for names in SCORES for name in names))


class PickAPic(Reader):
    """Parquet shards such as `data/train-00000-of-00645.parquet`."""

    layout: ClassVar[str] = (
        "parquet with columns caption, jpg_0, jpg_1, label_0, label_1 (Pick-a-Pic v1, v2 and mirrors)"
    )
    facts: ClassVar[frozenset[str]] = frozenset({"rewards", "aspect", "maps"})

    def shards(self, files: Sequence[str], split: str) -> list[str]:
        return split_files(files, split, (".parquet",))

    def check(self, path: Path) -> None:
        from diffalign.data.readers import _parquet

        _parquet.check_columns(path, REQUIRED, ("jpg_0", "jpg_1"))

    def read(self, path: Path, place: Place) -> Iterator[Record]:
        from diffalign.data.readers import _parquet

        return place.records(_parquet.rows(path, REQUIRED + OPTIONAL + FACTS), _parse)


def _parse(row: dict[str, Any]) -> dict[str, Any]:
    labelled = has_label(row.get("has_label"))
    kept = ("ranking_id", "num_example_per_prompt")
    return {
        "prompt": prompt_text(row["caption"], "caption"),
        "images": tuple(
            ImageItem(
                data=image_bytes(row[f"jpg_{side}"], f"jpg_{side}"),
                model=optional_text(row.get(f"model_{side}")),
                uid=optional_text(row.get(f"image_{side}_uid")),
            )
            for side in (0, 1)
        ),
        "p": probability(row["label_0"], row["label_1"]) if labelled else None,
        "user": optional_text(row.get("user_id")),
        "meta": {name: row[name] for name in kept if row.get(name) is not None},
        "extra": _extra(row),
    }


def _extra(row: dict[str, Any]) -> dict[str, Any]:
    """What the row says beyond its label. One of two scores or maps that is missing is a bad row, not a row without."""
    extra: dict[str, Any] = {}
    if any(row.get(name) is not None for name in REWARD_LISTS):
        extra["rewards"] = [row.get(name) for name in REWARD_LISTS]
    else:
        for names in SCORES:
            if any(row.get(name) is not None for name in names):
                extra["rewards"] = [[row.get(name)] for name in names]
                break
    if row.get("aspect") is not None:
        extra["aspect"] = row["aspect"]
    maps = [row.get("map_0"), row.get("map_1")]
    return extra | ({"maps": maps} if maps != [None, None] else {})


def has_label(value: Any) -> bool:
    """Whether a row says that it is labelled; rows of sets without that column are.

    Raises:
        BadRow: neither true nor false.
    """
    if value is None or value is True or value is False:
        return value is not False
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if str(value).strip().lower() not in known:
        raise BadRow("bad_label", f"has_label is {value!r}; true or false expected")
    return known[str(value).strip().lower()]
