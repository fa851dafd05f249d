"""`diffalign score`: pictures in, a table of scores out, with the best and the worst to look at.

A source is a folder of pictures, or a JSONL, JSON, CSV or parquet file with a picture (a path beside the file, an absolute
path, in parquet also bytes) and a prompt in every row. Rows that cannot be read are counted and listed, never dropped in
silence. Pictures are scored at their own size, those of one size together; the table keeps the order of the source.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from diffalign import _page, reward_math, rewards, score_cache
from diffalign.data import images as pixels
from diffalign.data.readers import BadRow, UnreadableShard, inside, prompt_text
from diffalign.data.readers.text import SUFFIXES, raw_rows
from diffalign.data.record import IMAGE_SUFFIXES
from diffalign.data.report import DataReport
from diffalign.errors import ConfigError, DataError, UserError
from diffalign.files import atomic_write_text
from diffalign.progress import Progress
from diffalign.rewards import Reward, RewardModel

TABLES = (".csv", ".jsonl", ".parquet")
GRIDS = (".html", ".png")
IMAGE_COLUMNS = ("image", "file", "file_name", "path", "image_path", "jpg", "png")
PROMPT_COLUMNS = ("prompt", "caption", "text")
SIDE = 224  # of a thumbnail, in pixels
HELD = 8  # batches of pictures of different sizes that wait for others of theirs


@dataclass(frozen=True)
class Settings:
    """What the command is told.

    Attributes:
        source: folder or file.
        rewards: names.
        prompts: a file with a prompt a line, for the pictures of a folder in the order of their names.
        prompt: one prompt for all pictures.
        image_column, prompt_column: of a file; default: the first of `IMAGE_COLUMNS` and `PROMPT_COLUMNS` that a row has.
        metadata: columns that the rewards get to see.
        device: where the rewards compute.
        batch_size: pictures at a time.
        cache: file of known scores, see `diffalign.score_cache`.
        show: how many of the best and of the worst.
    """

    source: Path
    rewards: tuple[str, ...]
    prompts: Path | None = None
    prompt: str | None = None
    image_column: str | None = None
    prompt_column: str | None = None
    metadata: tuple[str, ...] = ()
    device: str = "cpu"
    batch_size: int = 32
    cache: Path | None = None
    show: int = 12


@dataclass(frozen=True)
class Picture:
    """One row of the source, not decoded: the file's path or its bytes."""

    row: int
    name: str
    data: Path | bytes
    prompt: str
    metadata: dict[str, Any]


@dataclass
class Column:
    """Scores of one reward by row, what it told about their parts, and the pictures at both ends (score, row, thumbnail)."""

    name: str
    scores: dict[int, float] = field(default_factory=dict)
    parts: dict[str, dict[int, float]] = field(default_factory=dict)
    best: list[tuple[float, int, Image.Image]] = field(default_factory=list)
    worst: list[tuple[float, int, Image.Image]] = field(default_factory=list)

    def known(self) -> Tensor:
        """All scores but NaN, float64."""
        values = torch.tensor(list(self.scores.values()), dtype=torch.float64)
        return values[~values.isnan()]


@dataclass
class Scored:
    """What came out: pictures by row, a column per reward, and the account of the rows."""

    pictures: dict[int, tuple[str, str]]
    columns: list[Column]
    report: DataReport
    found: int = 0  # scores that the cache knew

    def table(self) -> list[dict[str, Any]]:
        """Rows in the order of the source; NaN stays NaN."""
        rows = []
        for row in sorted(self.pictures):
            name, prompt = self.pictures[row]
            values: dict[str, Any] = {"row": row, "image": name, "prompt": prompt}
            for column in self.columns:
                values[column.name] = column.scores[row]
                values |= {f"{column.name} | {part}": scores[row] for part, scores in column.parts.items()}
            rows.append(values)
        return rows

    def summary(self) -> str:
        """A line per reward, and one about the rows."""
        width = max(len(column.name) for column in self.columns)
        lines = [f"{'reward':<{width}}  {'scored':>7}  {'missing':>7}  {'mean':>9}  {'std':>9}  {'min':>9}  {'max':>9}"]
        for column in self.columns:
            known = column.known()
            numbers = [math.nan] * 4
            if len(known):
                numbers = [float(v) for v in (known.mean(), known.std(correction=0), known.min(), known.max())]
            shown = "  ".join(f"{number:>9.4f}" for number in numbers)
            lines.append(f"{column.name:<{width}}  {len(known):>7}  {len(column.scores) - len(known):>7}  {shown}")
        cached = f", {self.found:,} scores from the cache" if self.found else ""
        return "\n".join([*lines, self.report.summary() + cached])


def check(settings: Settings, out: Path, grid: Path | None) -> None:
    """Refuse what cannot work before anything is loaded.

    Raises:
        UserError: what was got, what is possible.
    """
    if not settings.rewards:
        raise ConfigError("score: no reward; give --reward NAME, several times for several")
    if len(set(settings.rewards)) < len(settings.rewards):
        raise ConfigError(f"score: a reward is named twice: {', '.join(settings.rewards)}")
    for name in settings.rewards:
        rewards.check_images(name)
        rewards.refuse_groups(name, rewards.groups(name) or rewards.of_sets(name), "score")
    for what, path, known in (("--out", out, TABLES), ("--grid", grid, GRIDS)):
        if path is not None and path.suffix.lower() not in known:
            raise ConfigError(f"score: {what} is {str(path)!r}; a name that ends in {', '.join(known)} expected")
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"score: the folder of {what} {str(path)!r} does not exist")
    for what, number in (("--batch-size", settings.batch_size), ("--show", settings.show)):
        if number < 1:
            raise ConfigError(f"score: {what} is {number}; at least 1 expected")
    source = settings.source
    if not source.exists():
        raise DataError(
            f"score: {source} does not exist; a folder of pictures or a file ({', '.join(SUFFIXES)}) expected"
        )
    if not source.is_dir() and source.suffix.lower() not in SUFFIXES:
        raise DataError(f"score: {source} is neither a folder nor a file of rows ({', '.join(SUFFIXES)})")
    if settings.prompts is not None and not source.is_dir():
        raise ConfigError("score: --prompts is for a folder of pictures; rows of a file bring their own prompts")
    if settings.prompts is not None and settings.prompt is not None:
        raise ConfigError("score: --prompt and --prompts exclude each other")


# ---------------------------------------------------------------- reading


def count(settings: Settings) -> int | None:
    """How many rows there are, where that is cheap to know."""
    source = settings.source
    if source.is_dir():
        return len(_files(source))
    try:
        if source.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            return int(pq.read_metadata(source).num_rows)
        if source.suffix.lower() == ".jsonl":
            with source.open("rb") as file:
                return sum(1 for line in file if line.strip())
    except Exception:  # reading says it better
        return None
    return None


def read(settings: Settings, report: DataReport) -> Iterator[Picture]:
    """The pictures of a source; what cannot be read goes into the report.

    Raises:
        DataError: a folder without pictures or prompts.
    """
    rows = folder_rows(settings) if settings.source.is_dir() else _of_file(settings, report)
    for row, picture in rows:
        report.read()
        if isinstance(picture, BadRow):
            report.skip(str(row), picture.reason, picture.detail, shard=settings.source.name, row=row)
        else:
            yield picture


def _files(folder: Path) -> list[Path]:
    found = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    return sorted(p for p in found if p.is_file())


def folder_rows(settings: Settings) -> Iterator[tuple[int, Picture | BadRow]]:
    """(row, picture) of every picture of a folder.

    Raises:
        DataError: no pictures, or no prompts.
    """
    files = _files(settings.source)
    if not files:
        raise DataError(f"score: {settings.source} holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))})")
    prompts: list[str | None] = [settings.prompt] * len(files)
    if settings.prompts is not None:
        try:
            lines = settings.prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"score: --prompts {settings.prompts} cannot be read ({error})") from error
        if len(lines) != len(files):
            raise DataError(
                f"score: {settings.prompts} has {len(lines)} lines for {len(files)} pictures; one each expected"
            )
        prompts = list(lines)
    elif settings.prompt is None and not any(file.with_suffix(".txt").is_file() for file in files):
        raise DataError(
            f"score: no prompts for the pictures of {settings.source}; give --prompts FILE (one a line), --prompt TEXT for "
            "all (empty for rewards that do not read it), or put <picture>.txt beside each"
        )
    for row, (file, prompt) in enumerate(zip(files, prompts, strict=True)):
        if prompt is None:
            try:
                prompt = file.with_suffix(".txt").read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                yield row, BadRow("missing_prompt", f"{file.with_suffix('.txt').name}: {error}")
                continue
        yield row, Picture(row, file.name, file, prompt, {})


def _of_file(settings: Settings, report: DataReport) -> Iterator[tuple[int, Picture | BadRow]]:
    try:
        for number, values in raw_rows(settings.source):
            try:
                yield number, values if isinstance(values, BadRow) else file_row(settings, number, values)
            except BadRow as bad:
                yield number, bad
    except UnreadableShard as error:
        report.bad_shard(settings.source.name, str(error))


def file_row(settings: Settings, row: int, values: dict[str, Any]) -> Picture:
    """The picture of one row of a file.

    Raises:
        BadRow: no picture or prompt in it.
    """
    column = settings.image_column or next((c for c in IMAGE_COLUMNS if values.get(c) is not None), IMAGE_COLUMNS[0])
    image = values.get(column)
    if image is None:
        known = settings.image_column or ", ".join(IMAGE_COLUMNS)
        raise BadRow("missing_image", f"no column {known}; there are {', '.join(values)}")
    name, data = locate(image, settings.source.parent, row, column)
    prompt, metadata = words_of(settings, values)
    return Picture(row, name, data, prompt, metadata)


def words_of(settings: Settings, values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Prompt and metadata of one row of a file.

    Raises:
        BadRow: one of them is not there.
    """
    prompt = settings.prompt
    if prompt is None:
        column = settings.prompt_column or next((c for c in PROMPT_COLUMNS if c in values), PROMPT_COLUMNS[0])
        prompt = prompt_text(values.get(column), column)
    missing = [key for key in settings.metadata if key not in values]
    if missing:
        raise BadRow("missing_metadata", f"no column {', '.join(missing)}")
    return prompt, {key: values[key] for key in settings.metadata}


def locate(image: Any, folder: Path, row: int, column: str) -> tuple[str, Path | bytes]:
    """Name and file, or bytes, of a picture in a cell: a path from `folder`, an absolute one, bytes, or a struct of both.

    Raises:
        BadRow: none of these, or no such file.
    """
    name = f"row {row}"
    if isinstance(image, dict):  # of a Hugging Face data set
        name = str(image.get("path") or name)
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes) and image:
        return name, image
    if isinstance(image, str) and Path(image).is_absolute():
        return image, Path(image)
    return str(image), inside(folder, image, column)


def decode(picture: Picture) -> Tensor:
    """uint8 RGB (3, H, W), upright, transparency on white.

    Raises:
        BadRow: not a picture, or no such file.
    """
    try:
        data = picture.data if isinstance(picture.data, bytes) else picture.data.read_bytes()
        image = pixels.decode(data)
    except OSError as error:
        raise BadRow("missing_image", f"{picture.name}: {error.strerror}") from error
    except pixels.UndecodableImage as error:
        raise BadRow("undecodable", f"{picture.name}: {error}") from error
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .view(image.height, image.width, 3)
        .movedim(-1, 0)
    )


# ---------------------------------------------------------------- scoring


def score(settings: Settings) -> Scored:
    """Score every picture that can be read by every reward.

    Raises:
        UserError: no picture can be read, or a reward cannot score one; see `rewards.score`.
    """
    models = {name: rewards.load(name, settings.device) for name in settings.rewards}
    for name, model in models.items():
        rewards.refuse_groups(name, rewards.compares(model), "score")
    result = Scored({}, [Column(name) for name in models], DataReport())
    with score_cache.from_environment(settings.cache) as cache, Progress("scoring", count(settings), "picture") as bar:
        waiting: dict[tuple[int, int], list[tuple[Picture, Tensor]]] = {}
        for picture in read(settings, result.report):
            try:
                image = decode(picture)
            except BadRow as bad:
                result.report.skip(
                    str(picture.row), bad.reason, bad.detail, shard=settings.source.name, row=picture.row
                )
                bar.advance()
                continue
            size = (image.shape[1], image.shape[2])
            waiting.setdefault(size, []).append((picture, image))
            if len(waiting[size]) == settings.batch_size:
                bar.advance(_score_batch(settings, models, cache, waiting.pop(size), result))
            elif sum(map(len, waiting.values())) >= HELD * settings.batch_size:
                size = max(waiting, key=lambda s: len(waiting[s]))
                bar.advance(_score_batch(settings, models, cache, waiting.pop(size), result))
        for batch in waiting.values():
            bar.advance(_score_batch(settings, models, cache, batch, result))
        result.found = cache.hits if cache is not None else 0
    if not result.pictures:
        raise DataError(
            f"score: no picture of {settings.source} can be read. {result.report.summary()}; {result.report.example()}"
        )
    return result


@torch.no_grad()
def _score_batch(
    settings: Settings,
    models: dict[str, Reward],
    cache: score_cache.ScoreCache | None,
    batch: Sequence[tuple[Picture, Tensor]],
    result: Scored,
) -> int:
    """Score pictures of one size; how many."""
    images = torch.stack([image for _, image in batch]).float() / 255
    prompts = [picture.prompt for picture, _ in batch]
    metadata = [picture.metadata for picture, _ in batch] if settings.metadata else None
    rows = [picture.row for picture, _ in batch]
    for column in result.columns:
        reward = models[column.name]
        options: dict[str, Any] = {"batch_size": settings.batch_size, "device": settings.device, "missing": True}
        if cache is None or type(reward).parts is not RewardModel.parts:  # what is told of parts is not in the cache
            scores = rewards.score(reward, images, prompts, metadata, **options)
        else:
            scores = cache.score(column.name, reward, images, prompts, metadata, **options)
        column.scores |= dict(zip(rows, scores.tolist(), strict=True))
        for part, values in reward.parts().items():
            column.parts.setdefault(part, {}).update(zip(rows, values.tolist(), strict=True))
        _keep_ends(column, [image for _, image in batch], rows, settings.show)
    result.pictures |= {picture.row: (picture.name, picture.prompt) for picture, _ in batch}
    return len(batch)


def _keep_ends(column: Column, images: Sequence[Tensor], rows: Sequence[int], show: int) -> None:
    """Let the pictures of a batch take part in the best and the worst."""
    for ends, sign in ((column.best, -1), (column.worst, 1)):
        found = [(column.scores[row], row, image) for row, image in zip(rows, images, strict=True)]
        entries: list[tuple[float, int, Any]] = [entry for entry in (*ends, *found) if not math.isnan(entry[0])]
        entries.sort(key=lambda entry: (sign * entry[0], entry[1]))
        ends[:] = [
            (s, row, image if isinstance(image, Image.Image) else _thumbnail(image)) for s, row, image in entries[:show]
        ]


def _thumbnail(image: Tensor) -> Image.Image:
    picture = Image.fromarray(image.movedim(0, -1).numpy())
    picture.thumbnail((SIDE, SIDE))
    return picture


# ---------------------------------------------------------------- writing


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """CSV, JSONL or parquet, by the name's ending; a missing score is an empty cell, null, or null."""
    plain = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
    if path.suffix.lower() == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        pq.write_table(pa.Table.from_pylist(plain), temporary)
        os.replace(temporary, path)
    elif path.suffix.lower() == ".csv":
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(plain[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(plain)
        atomic_write_text(path, buffer.getvalue())
    else:
        atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in plain))


def write_grid(path: Path, scored: Scored) -> None:
    """The best and the worst of every reward: a page that needs nothing else, or one picture, by the name's ending."""
    if path.suffix.lower() == ".png":
        _montage(scored).save(path)
        return
    sections = [f"<h1>Scores</h1><pre>{escape(scored.summary())}</pre>"]
    for column in scored.columns:
        parts = []
        for title, ends in (("Best", column.best), ("Worst", column.worst)):
            figures = "".join(_figure(scored, *entry) for entry in ends)
            parts.append(f"<h3>{title}</h3><div class=cards>{figures}</div>")
        sections.append(_page.section(column.name, *parts))
    atomic_write_text(path, _page.page("Scores", sections))


def _figure(scored: Scored, score: float, row: int, thumbnail: Image.Image) -> str:
    name, prompt = scored.pictures[row]
    buffer = io.BytesIO()
    thumbnail.save(buffer, "png")
    data = base64.b64encode(buffer.getvalue()).decode()
    small = " class=small" if max(thumbnail.size) < SIDE else ""
    caption = f"<b>{score:.4g}</b> {escape(name)}: {escape(prompt)}"
    image = f'<img{small} alt="{escape(name)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _montage(scored: Scored) -> Image.Image:
    """For every reward a row of the best and one of the worst, with their scores."""
    label, across = 16, max(len(column.best) for column in scored.columns) or 1
    sheet = Image.new("RGB", (across * SIDE, 2 * len(scored.columns) * (SIDE + label)), "white")
    draw = ImageDraw.Draw(sheet)
    lines = [
        (f"{c.name} {what}", ends) for c in scored.columns for what, ends in (("best", c.best), ("worst", c.worst))
    ]
    for y, (title, ends) in enumerate(lines):
        for x, (value, row, thumbnail) in enumerate(ends):
            place = (x * SIDE, y * (SIDE + label))
            text = f"{value:.4g}  row {row}" + (f"  {title}" if x == 0 else "")
            draw.text((place[0] + 2, place[1] + 2), text.encode("ascii", "replace").decode(), "black")
            factor = max(1, SIDE // max(thumbnail.size))  # tiny pictures are shown larger, pixel by pixel
            shown = thumbnail.resize((thumbnail.width * factor, thumbnail.height * factor), Image.Resampling.NEAREST)
            sheet.paste(shown, (place[0], place[1] + label))
    return sheet


def write_statistics(path: Path, scored: Scored) -> None:
    """Mean, spread and quantiles of every reward, for the reward `mix`.

    Raises:
        UserError: a reward gave fewer than two different scores.
    """
    found = {}
    for column in scored.columns:
        try:
            found[column.name] = reward_math.Statistics.measure(column.known())
        except ValueError as error:
            raise UserError(f"score: no statistics of {column.name!r}: {error}") from error
    reward_math.save_statistics(path, found)
