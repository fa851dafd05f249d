"""Preference pairs from the tiny world, written as Pick-a-Pic v2 parquet: what the demos train on.

Two pictures per prompt are sampled from a tiny base with the stock pipeline, encoded as JPEG, and judged by an
annotator (the verifier's score mixed with a taste) who sees the decoded JPEG. Ties, unlabelled rows and damaged bytes
are put in because the real data set has them, so that the ordinary reader meets what it must cope with.

Columns beyond Pick-a-Pic's are what objectives may read beyond the label: the judge's scores (`score_0`, `score_1`), and,
where asked for, the aspect that was judged (`aspect`) and the weights of PatchDPO (`map_0`, `map_1`).

The same settings always give the same file; a file that is already there with the same settings is used again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.config import ModelConfig, SamplingConfig, WorldPairsConfig
from diffalign.errors import ConfigError, DataError
from diffalign.families import DenoisingFamily
from diffalign.files import require_writable
from diffalign.losses.diffusion.patch_dpo import patch_weights
from diffalign.world import taste, verifier
from diffalign.world.drawings import favourites, quality_maps
from diffalign.world.names import BASE_FAMILIES
from diffalign.world.scenes import CANVAS, parse_caption, sample_captions

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

FILE_NAME = "train-00000-of-00001.parquet"
BASE = "tiny-sdxl"  # where neither the settings nor the run name one
DRAWING = "drawing"  # as the model of a picture
BATCH_SIZE = 128  # pictures per sampler call
ROW_GROUP = 100  # rows; larger groups make readers of real image tables hold gigabytes
ALL_USERS = "users"  # as the taste: every prompt is judged by one of `taste.USERS`, drawn at random
TIE = "tie"
FORMAT = 2  # change it whenever the same settings would give another file
_SETTINGS, _INFO = b"diffalign.world_pairs.settings", b"diffalign.world_pairs.info"


@dataclass(frozen=True, kw_only=True)
class PairsInfo:
    """What was written.

    Attributes:
        path: the parquet file.
        pairs: rows.
        decided: labelled rows with a winner.
        ties: labelled rows without one.
        unlabelled: rows without a label.
        corrupt: rows of which one picture cannot be decoded.
        mean_score: the annotators' mean score of all pictures, in [0, 1].
        reused: the file was already there.
    """

    path: Path
    pairs: int
    decided: int
    ties: int
    unlabelled: int
    corrupt: int
    mean_score: float
    reused: bool


def make_pairs(config: WorldPairsConfig, out_dir: Path, seed: int, family: DenoisingFamily | None = None) -> PairsInfo:
    """Sample, judge and write the pairs, unless they are there already.

    Args:
        config: how many, whose taste, how sampled.
        out_dir: folder of the parquet file; made if it is missing.
        seed: of prompts, noise and the choice of damaged and unlabelled rows.
        family: a base with all parts loaded, to be sampled; None loads the shipped one that the settings name.

    Raises:
        ConfigError: settings that make no sense.
        UserError: the folder cannot be written.
    """
    _check(config)
    if family is None:
        family = load_base(config.base or BASE)
    path = Path(out_dir) / FILE_NAME
    settings = dataclasses.asdict(config) | {"seed": seed, "weights": weights_hash(family), "format": FORMAT}
    if (info := _existing(path, settings)) is not None:
        log.info("using the %d pairs that are already in %s", info.pairs, path)
        return info

    require_writable(path.parent)  # before the work, not after it
    captions = sample_captions(config.prompts, seed, held_out=False)
    rng = random.Random(f"world pairs/{seed}")
    judges = _judges(config, rng)
    if config.chosen == "drawn":
        made = _drawn(family, captions, config, judges, seed)
    else:
        made = _Made([to_jpeg(image, config.jpeg_quality) for image in sample(family, captions, config, seed)])
    table, info = _judge(config, captions, made, judges, rng, seed, path)
    _write(table, info, settings)
    return info


def _check(config: WorldPairsConfig) -> None:
    if config.taste != ALL_USERS:
        taste.find(config.taste)
    for name in config.rewards:
        _judge_of(name)
    for name in ("taste_weight", "unlabelled"):
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"data.world_pairs.{name}: got {getattr(config, name)}; a share in [0, 1] expected")
    if config.maps and config.chosen != "drawn":
        raise ConfigError(
            "data.world_pairs.maps compares samples with drawings; it needs data.world_pairs.chosen: drawn"
        )
    if config.prompts < 1 or round(config.unlabelled * config.prompts) + config.corrupt > config.prompts:
        raise ConfigError(
            f"data.world_pairs: prompts is {config.prompts}, fewer than the unlabelled and {config.corrupt} corrupt "
            "rows together; raise prompts"
        )


def _judge_of(name: str) -> Callable[[verifier.Reading, str], float]:
    """A judge by name: the verifier, or a taste alone."""
    if name == "verifier":
        return lambda reading, caption: float(verifier.judge(reading, parse_caption(caption))["score"])
    found = taste.find(name)
    return lambda reading, caption: found(reading)


# ---------------------------------------------------------------- sampling


def initial_noise(seed: int, prompt_index: int, image_index: int, shape: tuple[int, ...]) -> Tensor:
    """Start latents of one picture, float32: a function of its place alone, whatever batch it is sampled in."""
    digest = hashlib.sha256(f"world pairs/{seed}/{prompt_index}/{image_index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def sample(
    family: DenoisingFamily,
    captions: list[str],
    config: WorldPairsConfig,
    seed: int,
    batch_size: int = BATCH_SIZE,
    count: int = 2,
) -> Tensor:
    """Pictures of captions through the base's stock pipeline, whose own progress bar is turned off.

    Args:
        family: the base, with all parts loaded.
        captions: prompts.
        config: sampler steps and guidance.
        seed: of the noise.
        batch_size: pictures per call.
        count: pictures per caption.

    Returns:
        float32 RGB in [0, 1], shape (count * prompts, 3, 32, 32); the pictures of a prompt follow each other.
    """
    from tqdm.auto import tqdm

    distinct = list(dict.fromkeys(captions))
    embedded = [family.encode_prompts(distinct[i : i + batch_size]) for i in range(0, len(distinct), batch_size)]
    conditioning = {name: torch.cat([part[name] for part in embedded]) for name in embedded[0]}
    negative = family.encode_negative("")
    rows = torch.tensor([distinct.index(caption) for caption in captions]).repeat_interleave(count)
    shape = family.latent_shape(CANVAS, CANVAS)
    sampling = SamplingConfig(num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale)
    images = []
    # One bar for all, and only for somebody who looks.
    for start in tqdm(
        range(0, len(rows), batch_size), desc="sampling pairs", unit="batch", disable=not sys.stderr.isatty()
    ):
        row = rows[start : start + batch_size]
        noise = [initial_noise(seed, i // count, i % count, shape) for i in range(start, start + len(row))]
        part = {name: value[row] for name, value in conditioning.items()}
        images.append(family.sample(part, negative, torch.stack(noise), sampling))
    return torch.cat(images)


def load_base(name: str) -> DenoisingFamily:
    """A tiny base with all parts loaded."""
    from diffalign.families import DECODER, ENCODERS, NETWORK, load_family

    family = load_family(ModelConfig(family=BASE_FAMILIES[name], pretrained=name))
    assert isinstance(family, DenoisingFamily), "bases make images"
    family.load(NETWORK, ENCODERS, DECODER)
    return family


def weights_hash(family: DenoisingFamily) -> str:
    """16 hex digits of all weights and the scheduler's settings: pairs of another base are other pairs."""
    pipeline = family.pipeline()
    digest = hashlib.sha256(json.dumps(dict(pipeline.scheduler.config), sort_keys=True, default=str).encode())
    for name, part in sorted(pipeline.components.items()):
        if isinstance(part, nn.Module):
            for key, value in part.state_dict().items():
                digest.update(f"{name}.{key}".encode())
                digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- encoding and judging


def to_jpeg(image: Tensor, quality: int) -> bytes:
    """One picture (float RGB in [0, 1], (3, H, W)) as JPEG with full chroma, for outlines are one pixel wide."""
    pixels = (image.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()  # CHW float -> HWC uint8
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def from_jpeg(data: bytes) -> Tensor:
    """Float RGB in [0, 1], shape (3, H, W)."""
    with Image.open(io.BytesIO(data)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0).float() / 255


def label_of(first: float, second: float, margin: float) -> tuple[float, float]:
    """Pick-a-Pic's (label_0, label_1) for two scores: the higher one gets 1; within `margin` both get 0.5."""
    if abs(first - second) <= margin:
        return 0.5, 0.5
    return (1.0, 0.0) if first > second else (0.0, 1.0)


@dataclass(frozen=True)
class _Judges:
    """Who judges each row: whose taste, how much it counts, and which aspect that is, where aspects are asked for."""

    tastes: list[taste.Taste]
    weights: list[float]
    aspects: list[int] | None


def _judges(config: WorldPairsConfig, rng: random.Random) -> _Judges:
    if config.taste == ALL_USERS:
        tastes = rng.choices(list(taste.USERS.values()), k=config.prompts)
    else:
        tastes = [taste.find(config.taste)] * config.prompts
    if not config.aspects:
        return _Judges(tastes, [config.taste_weight] * config.prompts, None)
    aspects = [i % 2 for i in range(config.prompts)]  # 0: what the caption promises; 1: the taste
    return _Judges(tastes, [float(aspect) for aspect in aspects], aspects)


@dataclass(frozen=True)
class _Made:
    """Two pictures per caption, one after the other; which of the two is a drawing, and maps of weights, where there are."""

    files: list[bytes]
    drawn: list[int] | None = None
    maps: Tensor | None = None


def _drawn(family: DenoisingFamily, captions: list[str], config: WorldPairsConfig, judges: _Judges, seed: int) -> _Made:
    """A drawing that the judge likes against a sample, on either side."""
    samples = [to_jpeg(image, config.jpeg_quality) for image in sample(family, captions, config, seed, count=1)]
    references = favourites(
        captions,
        judges.tastes,
        judges.weights,
        seed,
        seen=lambda image: from_jpeg(to_jpeg(image, config.jpeg_quality)),
    )
    drawings = [to_jpeg(image, config.jpeg_quality) for image in references[:, 0]]
    rng = random.Random(f"drawn pairs/{seed}")
    sides = [rng.randrange(2) for _ in captions]

    def placed(drawing: Any, other: Any) -> list[Any]:
        rows = zip(sides, drawing, other, strict=True)
        return [entry for side, mine, theirs in rows for entry in ((theirs, mine) if side else (mine, theirs))]

    maps = None
    if config.maps:
        seen = [torch.stack([from_jpeg(data) for data in files]) for files in (samples, drawings)]
        of_sample, of_drawing = quality_maps(family, seen[0], seen[1], references)
        subject = torch.tensor(placed([True] * len(sides), [False] * len(sides)))
        maps = patch_weights(torch.stack(placed(of_drawing, of_sample)), subject)
    return _Made(placed(drawings, samples), sides, maps)


def _judge(
    config: WorldPairsConfig,
    captions: list[str],
    made: _Made,
    judges: _Judges,
    rng: random.Random,
    seed: int,
    path: Path,
) -> tuple[pa.Table, PairsInfo]:
    import pyarrow as pa

    files, annotators = made.files, judges.tastes
    readings = verifier.read(torch.stack([from_jpeg(data) for data in files]))
    scores = [
        taste.combined(reading, captions[i // 2], annotators[i // 2], judges.weights[i // 2])
        for i, reading in enumerate(readings)
    ]
    more = [
        [_judge_of(name)(reading, captions[i // 2]) for i, reading in enumerate(readings)] for name in config.rewards
    ]
    if made.drawn is None:
        judged = [label_of(scores[2 * i], scores[2 * i + 1], config.margin) for i in range(config.prompts)]
    else:
        judged = [(0.0, 1.0) if side else (1.0, 0.0) for side in made.drawn]
    # Broken bytes go to decided rows where there are enough: a tie is dropped before anybody decodes it.
    order = rng.sample(range(config.prompts), config.prompts)
    order.sort(key=lambda i: judged[i][0] == 0.5)
    corrupt = set(order[: config.corrupt])
    unlabelled = set(rng.sample(order[config.corrupt :], round(config.unlabelled * config.prompts)))
    repeats = Counter(captions)
    rows: list[dict[str, Any]] = []
    for i, caption in enumerate(captions):
        data = [files[2 * i], files[2 * i + 1]]
        uids = [hashlib.sha256(f"{seed}/{i}/{j}".encode() + data[j]).hexdigest()[:32] for j in (0, 1)]
        labels: tuple[float | None, float | None] = (None, None)
        if i not in unlabelled:
            labels = judged[i]
        if i in corrupt:  # either side, early or late in the file
            side = rng.randrange(2)
            data[side] = data[side][: rng.randrange(100, len(data[side]) * 3 // 4)]
        best = {1.0: uids[0], 0.0: uids[1], 0.5: TIE, None: None}[labels[0]]
        rows.append(
            {
                "are_different": uids[0] != uids[1],
                "best_image_uid": best,
                "caption": caption,
                # Made up, and a function of the row, so that the same settings give the same bytes.
                "created_at": datetime(2023, 1, 1) + timedelta(minutes=i),
                "has_label": i not in unlabelled,
                "num_example_per_prompt": repeats[caption],
                "ranking_id": i,
                "user_id": annotators[i].user_id,
                "__index_level_0__": i,
            }
            | {f"image_{j}_uid": uids[j] for j in (0, 1)}
            | {f"image_{j}_url": "" for j in (0, 1)}
            | {f"jpg_{j}": data[j] for j in (0, 1)}
            | {f"label_{j}": labels[j] for j in (0, 1)}
            | {f"model_{j}": DRAWING if made.drawn and made.drawn[i] == j else config.base or BASE for j in (0, 1)}
            | {f"score_{j}": scores[2 * i + j] for j in (0, 1)}
            | ({} if judges.aspects is None else {"aspect": judges.aspects[i]})
            | {f"rewards_{j}": [one[2 * i + j] for one in more] for j in (0, 1) if more}
            | ({} if made.maps is None else {f"map_{j}": made.maps[2 * i + j].tolist() for j in (0, 1)})
        )
    labels_seen = [row["label_0"] for row in rows if row["has_label"]]
    info = PairsInfo(
        path=path,
        pairs=len(rows),
        decided=sum(label != 0.5 for label in labels_seen),
        ties=sum(label == 0.5 for label in labels_seen),
        unlabelled=len(unlabelled),
        corrupt=len(corrupt),
        mean_score=sum(scores) / len(scores),
        reused=False,
    )
    return pa.Table.from_pylist(
        rows, schema=schema(aspects=config.aspects, maps=config.maps, rewards=bool(config.rewards))
    ), info


# ---------------------------------------------------------------- the file


def schema(*, aspects: bool = False, maps: bool = False, rewards: bool = False) -> pa.Schema:
    """The columns of Pick-a-Pic v2's parquet files, and then those that it does not have."""
    import pyarrow as pa

    more = [("score_0", pa.float64()), ("score_1", pa.float64())]
    more += [("aspect", pa.int64())] if aspects else []
    more += [(f"rewards_{side}", pa.list_(pa.float64())) for side in (0, 1)] if rewards else []
    more += [(f"map_{side}", pa.list_(pa.list_(pa.float32()))) for side in (0, 1)] if maps else []
    return pa.schema(
        [
            ("are_different", pa.bool_()),
            ("best_image_uid", pa.string()),
            ("caption", pa.string()),
            ("created_at", pa.timestamp("ns")),
            ("has_label", pa.bool_()),
            ("image_0_uid", pa.string()),
            ("image_0_url", pa.string()),
            ("image_1_uid", pa.string()),
            ("image_1_url", pa.string()),
            ("jpg_0", pa.binary()),
            ("jpg_1", pa.binary()),
            ("label_0", pa.float64()),
            ("label_1", pa.float64()),
            ("model_0", pa.string()),
            ("model_1", pa.string()),
            ("ranking_id", pa.int64()),
            ("user_id", pa.int64()),
            ("num_example_per_prompt", pa.int64()),
            ("__index_level_0__", pa.int64()),
            *more,
        ]
    )


def _existing(path: Path, settings: dict[str, Any]) -> PairsInfo | None:
    """The info of a file made with the same settings, None if there is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        return None
    try:
        stored = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError):
        return None  # not a parquet file, or a broken one: it is written anew
    if stored.get(_SETTINGS) != json.dumps(settings, sort_keys=True).encode():
        return None
    return PairsInfo(path=path, reused=True, **json.loads(stored[_INFO]))


def _write(table: pa.Table, info: PairsInfo, settings: dict[str, Any]) -> None:
    import pyarrow.parquet as pq

    kept = {k: v for k, v in dataclasses.asdict(info).items() if k not in ("path", "reused")}
    metadata = {_SETTINGS: json.dumps(settings, sort_keys=True), _INFO: json.dumps(kept)}
    partial = info.path.with_name(f"{info.path.name}.{os.getpid()}.partial")
    try:
        pq.write_table(table.replace_schema_metadata(metadata), partial, row_group_size=ROW_GROUP)
        os.replace(partial, info.path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(f"cannot write the pairs to {info.path}: {error}; choose another output_dir") from error
    log.info("wrote %d pairs (%d decided, %d ties) to %s", info.pairs, info.decided, info.ties, info.path)
