"""Preference pairs from the tiny world, written as Pick-a-Pic v2 parquet: what the demos train on.

Two pictures per prompt are sampled from a tiny base with the stock pipeline, encoded as JPEG, and judged by an
annotator (the verifier's score mixed with a taste) who sees the decoded JPEG. Ties, unlabelled rows and damaged bytes
are put in because the real data set has them, so that the ordinary reader meets what it must cope with.

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
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.config import WorldPairsConfig
from diffalign.errors import ConfigError, DataError
from diffalign.files import require_writable
from diffalign.world import taste, verifier
from diffalign.world.scenes import CANVAS, sample_captions

if TYPE_CHECKING:
    import pyarrow as pa

Pipeline: TypeAlias = Any  # diffusers.StableDiffusionXLPipeline; importing it takes seconds
log = logging.getLogger(__name__)

FILE_NAME = "train-00000-of-00001.parquet"
BASE = "tiny-sdxl"
BATCH_SIZE = 128  # pictures per sampler call
ROW_GROUP = 100  # rows; larger groups make readers of real image tables hold gigabytes
ALL_USERS = "users"  # as the taste: every prompt is judged by one of `taste.USERS`, drawn at random
TIE = "tie"
FORMAT = 1  # change it whenever the same settings would give another file
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


def make_pairs(config: WorldPairsConfig, out_dir: Path, seed: int, pipeline: Pipeline | None = None) -> PairsInfo:
    """Sample, judge and write the pairs, unless they are there already.

    Args:
        config: how many, whose taste, how sampled.
        out_dir: folder of the parquet file; made if it is missing.
        seed: of prompts, noise and the choice of damaged and unlabelled rows.
        pipeline: a tiny SDXL pipeline; None loads the shipped base.

    Raises:
        ConfigError: settings that make no sense.
        UserError: the folder cannot be written.
    """
    _check(config)
    if pipeline is None:
        from diffalign.world.bases import load_pipeline

        pipeline = load_pipeline(BASE)
    path = Path(out_dir) / FILE_NAME
    settings = dataclasses.asdict(config) | {"seed": seed, "base": weights_hash(pipeline), "format": FORMAT}
    if (info := _existing(path, settings)) is not None:
        log.info("using the %d pairs that are already in %s", info.pairs, path)
        return info

    require_writable(path.parent)  # before the work, not after it
    captions = sample_captions(config.prompts, seed, held_out=False)
    images = sample(pipeline, captions, config, seed)
    files = [to_jpeg(image, config.jpeg_quality) for image in images]
    table, info = _judge(config, captions, files, seed, path)
    _write(table, info, settings)
    return info


def _check(config: WorldPairsConfig) -> None:
    if config.taste != ALL_USERS:
        taste.find(config.taste)
    for name in ("taste_weight", "unlabelled"):
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"data.world_pairs.{name}: got {getattr(config, name)}; a share in [0, 1] expected")
    if config.prompts < 1 or round(config.unlabelled * config.prompts) + config.corrupt > config.prompts:
        raise ConfigError(
            f"data.world_pairs: prompts is {config.prompts}, fewer than the unlabelled and {config.corrupt} corrupt "
            "rows together; raise prompts"
        )


# ---------------------------------------------------------------- sampling


def initial_noise(seed: int, prompt_index: int, image_index: int, shape: tuple[int, ...]) -> Tensor:
    """Start latents of one picture, float32: a function of its place alone, whatever batch it is sampled in."""
    digest = hashlib.sha256(f"world pairs/{seed}/{prompt_index}/{image_index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def sample(
    pipeline: Pipeline,
    captions: list[str],
    config: WorldPairsConfig,
    seed: int,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """Two pictures per caption with the stock pipeline, whose own progress bar is turned off.

    Returns:
        float32 RGB in [0, 1], shape (2 * prompts, 3, 32, 32); both pictures of a prompt follow each other.
    """
    from tqdm.auto import tqdm

    distinct = list(dict.fromkeys(captions))
    hidden, pooled = _embed(pipeline, distinct, batch_size)
    no_hidden, no_pooled = _embed(pipeline, [""], batch_size)
    rows = torch.tensor([distinct.index(caption) for caption in captions]).repeat_interleave(2)
    side = CANVAS // pipeline.vae_scale_factor
    shape = (pipeline.unet.config.in_channels, side, side)
    pipeline.set_progress_bar_config(disable=True)  # one bar for all, and only for somebody who looks
    images = []
    for start in tqdm(
        range(0, len(rows), batch_size), desc="sampling pairs", unit="batch", disable=not sys.stderr.isatty()
    ):
        row = rows[start : start + batch_size]
        noise = [initial_noise(seed, i // 2, i % 2, shape) for i in range(start, start + len(row))]
        images.append(
            pipeline(
                prompt_embeds=hidden[row],
                pooled_prompt_embeds=pooled[row],
                negative_prompt_embeds=no_hidden.expand(len(row), -1, -1),
                negative_pooled_prompt_embeds=no_pooled.expand(len(row), -1),
                latents=torch.stack(noise).to(pipeline.device, pipeline.unet.dtype),
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                height=CANVAS,
                width=CANVAS,
                output_type="pt",
            )
            .images.float()
            .cpu()
        )
    return torch.cat(images)


def _embed(pipeline: Pipeline, prompts: list[str], batch_size: int) -> tuple[Tensor, Tensor]:
    """Hidden states and pooled embeddings of prompts."""
    parts = [
        pipeline.encode_prompt(
            prompts[i : i + batch_size],
            device=pipeline.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        for i in range(0, len(prompts), batch_size)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[2] for part in parts])


def weights_hash(pipeline: Pipeline) -> str:
    """16 hex digits of all weights and the scheduler's settings: pairs of another base are other pairs."""
    digest = hashlib.sha256(json.dumps(dict(pipeline.scheduler.config), sort_keys=True, default=str).encode())
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        for key, value in getattr(pipeline, name).state_dict().items():
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


def _annotators(config: WorldPairsConfig, rng: random.Random) -> list[taste.Taste]:
    if config.taste == ALL_USERS:
        return rng.choices(list(taste.USERS.values()), k=config.prompts)
    return [taste.find(config.taste)] * config.prompts


def _judge(
    config: WorldPairsConfig, captions: list[str], files: list[bytes], seed: int, path: Path
) -> tuple[pa.Table, PairsInfo]:
    import pyarrow as pa

    rng = random.Random(f"world pairs/{seed}")
    annotators = _annotators(config, rng)
    readings = verifier.read(torch.stack([from_jpeg(data) for data in files]))
    scores = [
        taste.combined(reading, captions[i // 2], annotators[i // 2], config.taste_weight)
        for i, reading in enumerate(readings)
    ]
    judged = [label_of(scores[2 * i], scores[2 * i + 1], config.margin) for i in range(config.prompts)]
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
            | {f"model_{j}": BASE for j in (0, 1)}
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
    return pa.Table.from_pylist(rows, schema=schema()), info


# ---------------------------------------------------------------- the file


def schema() -> pa.Schema:
    """The columns of Pick-a-Pic v2's parquet files."""
    import pyarrow as pa

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
