"""From records to latents and text embeddings: shared by the cache and by the uncached path."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffalign.config import DataConfig
from diffalign.data.facts import MAPS, BadFact, fit_map, load_map
from diffalign.data.images import Resampling, UndecodableImage, buckets, pair_bucket, plan_crop, transform
from diffalign.data.record import Record
from diffalign.data.report import DataReport
from diffalign.data.video import TooShort, decode_clip
from diffalign.errors import DataError
from diffalign.families import ENCODERS, Conditioning, EncodingFamily
from diffalign.schedules import generator_for


@dataclass(frozen=True)
class Prepared:
    """An image or clip ready to encode.

    Attributes:
        key: hash of its bytes and of everything done to it; equal keys mean equal latents.
        pixels: uint8 RGB, (3, H, W) or (3, F, H, W): a quarter of the memory while an image waits for the VAE.
        original_size, crop_top_left, target_size: (height, width) or (top, left) in pixels.
        flipped: mirrored left to right before the crop.
        weights: the image's map of weights as it came, (rows, columns), where there is one.
    """

    key: str
    pixels: Tensor
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]
    flipped: bool = False
    weights: Tensor | None = None

    def weights_at(self, size: tuple[int, int]) -> Tensor | None:
        """The map cropped, mirrored and resized as the image was, at the size of its latents (h, w)."""
        if self.weights is None:
            return None
        resized = plan_crop(self.original_size, self.target_size).resized
        return fit_map(self.weights, resized, self.crop_top_left, self.target_size, size, flip=self.flipped)


@dataclass(frozen=True)
class PreparedPair:
    """A record with both images prepared, in the record's own order."""

    record: Record
    images: tuple[Prepared, Prepared]


@dataclass(frozen=True)
class Unusable:
    """A record that has an image which cannot be used."""

    record: Record
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class EncodedPair:
    """One pair as latents; sizes are (height, width) and crops (top, left) in pixels, per image.

    `extra` is the record's, in the record's own order, but that maps are tensors of the latents' size (h, w).
    """

    id: str
    prompt: str
    latents: tuple[Tensor, Tensor]
    p: float
    weight: float
    user: str | None
    original_sizes: tuple[tuple[int, int], tuple[int, int]]
    crops: tuple[tuple[int, int], tuple[int, int]]
    target_size: tuple[int, int]
    extra: dict[str, Any] = field(default_factory=dict)


class Preparer:
    """Decodes and transforms both images of a record; a record with an unusable image is skipped whole.

    Args:
        config: resolution, buckets, crop, flip, and the frames of clips.
        seed: of random crops and flips, which are functions of (seed, record id).
        step: image sides are multiples of this many pixels.
        resampling: how images are resized.
    """

    def __init__(self, config: DataConfig, seed: int, step: int, resampling: Resampling = "bilinear") -> None:
        self.config, self.seed, self.resampling = config, seed, resampling
        if config.buckets:
            # About sixteen steps to the side (64 px at 1024), in multiples of what the model takes.
            step = max(step, config.resolution // 16 // step * step)
        side = config.resolution // step * step
        self.sizes = buckets(side, step=step) if config.buckets else [(side, side)]

    def __call__(self, record: Record) -> PreparedPair | Unusable:
        """The prepared pair, or why it cannot be used."""
        frames, stride = self.config.num_frames, self.config.frame_stride
        try:
            raw = [item.parts() for item in record.images]
            clips = [decode_clip(parts, frames, stride) for parts in raw]
            maps: list[Tensor | None] = [load_map(value) for value in record.extra.get(MAPS, ())]
        except UndecodableImage as error:
            return Unusable(record, "undecodable", str(error))
        except TooShort as error:
            return Unusable(record, "too_short", str(error))
        except BadFact as error:
            return Unusable(record, error.reason, str(error))
        except OSError as error:
            return Unusable(record, "unreadable", str(error))
        size = pair_bucket([(clip[0].height, clip[0].width) for clip in clips], self.sizes)
        generator = generator_for(self.seed, record.id)
        flip = self.config.flip and bool(torch.rand((), generator=generator) < 0.5)
        prepared = []
        for parts, clip, weights in zip(raw, clips, maps or [None] * len(raw), strict=True):
            done = transform(
                clip, size, crop=self.config.crop, flip=flip, generator=generator, resampling=self.resampling
            )
            settings = f"{size} {done.crop_top_left} {flip}" + (f" {frames} {stride}" if frames > 1 else "")
            digest = b"".join(hashlib.sha256(part).digest() for part in parts)
            key = hashlib.sha256(digest + settings.encode()).hexdigest()[:24]
            pixels = done.pixels.add(1).mul_(127.5).round_().to(torch.uint8)  # exact: they come from bytes
            geometry = done.original_size, done.crop_top_left, done.target_size
            prepared.append(Prepared(key, pixels, *geometry, flip, weights))
        return PreparedPair(record, (prepared[0], prepared[1]))


@dataclass
class Quota:
    """How many more pairs may be begun; what turns out unusable is given back, so that another takes its place."""

    left: float = math.inf


def prepare_all(
    records: Iterator[Record | None], preparer: Preparer, report: DataReport, workers: int, quota: Quota
) -> Iterator[PreparedPair]:
    """Prepare in threads, in order, skipping and reporting what cannot be used.

    Ends when the records do, or when the quota is used up by pairs that all came out. It may be called again on the
    same records after some of those were given back.

    Args:
        records: read no further than the quota allows; None stands for one that counts and needs no preparation.
        preparer: decodes and transforms.
        report: receives what cannot be used.
        workers: threads; up to four pairs for each are held.
        quota: one less for every record taken, one more for every one that cannot be used.
    """
    ahead, ended = 4 * max(1, workers), False
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        window: deque[Future[PreparedPair | Unusable]] = deque()
        while True:
            while not ended and quota.left >= 1 and len(window) < ahead:
                try:
                    record = next(records)
                except StopIteration:
                    ended = True
                    break
                quota.left -= 1
                if record is not None:
                    window.append(pool.submit(preparer, record))
            if not window:
                return
            result = window.popleft().result()
            if isinstance(result, PreparedPair):
                yield result
            else:
                quota.left += 1
                report.skip(result.record, result.reason, result.detail)


def encode_images(family: EncodingFamily, images: list[Prepared], batch_size: int) -> dict[str, Tensor]:
    """Latents (C, ..., h, w) on the CPU by image key; images of one shape share a VAE call."""
    latents: dict[str, Tensor] = {}
    by_shape: dict[tuple[int, ...], list[Prepared]] = {}
    for image in images:
        by_shape.setdefault(tuple(image.pixels.shape), []).append(image)
    family.load(ENCODERS)  # nothing, if they are there
    for group in by_shape.values():
        unique = list({image.key: image for image in group}.values())
        for start in range(0, len(unique), batch_size):
            chunk = unique[start : start + batch_size]
            pixels = torch.stack([image.pixels for image in chunk]).float().div_(127.5).sub_(1.0)
            encoded = family.encode_images(pixels).cpu()
            latents |= {image.key: latent for image, latent in zip(chunk, encoded, strict=True)}
    return latents


def encode_prompts(family: EncodingFamily, prompts: list[str], batch_size: int = 16) -> dict[str, Conditioning]:
    """Text conditioning on the CPU by prompt, without a batch axis."""
    found: dict[str, Conditioning] = {}
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        family.load(ENCODERS)  # nothing, if they are there
        encoded = family.encode_prompts(chunk)
        for i, prompt in enumerate(chunk):
            found[prompt] = {name: value[i].cpu() for name, value in encoded.items()}
    return found


def note_truncation(family: EncodingFamily, record: Record, report: DataReport) -> None:
    """Count every prompt of a record whose end the text encoder will not see."""
    for prompt in record.prompts:
        tokens, limit = family.count_tokens(prompt)
        if tokens > limit:
            report.note("truncated_prompt", f"{tokens} tokens, the encoder takes {limit}", record)


def maps_of(pair: PreparedPair, latents: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The maps of both images at the size of their latents; empty if the record has none."""
    fitted = [image.weights_at((x.shape[-2], x.shape[-1])) for image, x in zip(pair.images, latents, strict=True)]
    return [weights for weights in fitted if weights is not None]


def overflow_advice(family: EncodingFamily) -> str:
    """What to do about latents with infinities or NaN."""
    dtype = str(family.vae_dtype).removeprefix("torch.")
    return f"the VAE computes in {dtype}: set cache.encode_dtype=float32, or name an fp16-safe VAE in model.vae"


def prompt_key(prompt: str) -> str:
    """Stable key of a prompt's embedding."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:24]


def is_pair(record: Record) -> bool:
    """Two images and a label."""
    return len(record.images) == 2 and record.p is not None


class Owner(NamedTuple):
    """Whose pair it is: what is known of it without its images.

    Attributes:
        id: of the record.
        user: the annotator's id, where known.
        p: probability that the first image is preferred.
        prompt: text.
    """

    id: str
    user: str | None
    p: float
    prompt: str

    def keys(self) -> frozenset[str]:
        """What it has in common with pairs that may show the same image: itself, and its prompt."""
        return frozenset({self.id, f"prompt: {' '.join(self.prompt.lower().split())}"})


class LivePairs:
    """Pairs encoded whenever they are asked for: the uncached path, for sets that fit into memory as encoded files.

    Args:
        records: all records; those with unusable images are reported and left out.
        preparer: decoding and transforms.
        family: its encoders are loaded again whenever something else has dropped them.
        report: takes what is left out.
        workers: decoding threads for the first check.
        limit: stop after so many usable pairs; None takes all.

    Raises:
        DataError: no usable pair is left.
    """

    def __init__(
        self,
        records: Iterator[Record],
        preparer: Preparer,
        family: EncodingFamily,
        report: DataReport,
        workers: int = 2,
        limit: int | None = None,
    ) -> None:
        self.preparer, self.family = preparer, family
        pairs = (record for record in records if is_pair(record))
        quota = Quota() if limit is None else Quota(limit)
        self.records = [pair.record for pair in prepare_all(pairs, preparer, report, workers, quota)]
        if not self.records:
            raise DataError(f"no usable pair is left: {report.summary()}. {report.example()}")
        for record in self.records:
            note_truncation(family, record, report)
        self._texts: dict[str, Conditioning] = {}

    def __len__(self) -> int:
        return len(self.records)

    @property
    def prompts(self) -> list[str]:
        return [record.prompt for record in self.records]

    @property
    def extras(self) -> list[dict[str, Any]]:
        return [record.extra for record in self.records]

    @property
    def owners(self) -> list[Owner]:
        return [Owner(r.id, r.user, 0.5 if r.p is None else r.p, r.prompt) for r in self.records]

    @property
    def target_sizes(self) -> list[tuple[int, int]]:
        return [self.preparer.sizes[0]] * len(self.records)

    def text(self, prompt: str) -> Conditioning:
        """Text conditioning of a prompt, without a batch axis; kept for the next time."""
        if prompt not in self._texts:
            self._texts |= encode_prompts(self.family, [prompt])
        return self._texts[prompt]

    def pair(self, index: int) -> EncodedPair:
        """Decode and encode one pair, in the record's own order.

        Raises:
            DataError: an image is gone, or its latents are not finite.
        """
        record = self.records[index]
        prepared = self.preparer(record)
        if not isinstance(prepared, PreparedPair):
            raise DataError(f"record {record.id} could be decoded at the start and cannot now: {prepared.detail}")
        a, b = prepared.images
        latents = encode_images(self.family, [a, b], batch_size=2)
        if not all(bool(latent.isfinite().all()) for latent in latents.values()):
            raise DataError(f"record {record.id}: its latents are not finite; {overflow_advice(self.family)}")
        assert record.p is not None, "records without a label were left out"
        pair = latents[a.key], latents[b.key]
        return EncodedPair(
            id=record.id,
            prompt=record.prompt,
            latents=pair,
            p=record.p,
            weight=record.weight,
            user=record.user,
            original_sizes=(a.original_size, b.original_size),
            crops=(a.crop_top_left, b.crop_top_left),
            target_size=a.target_size,
            extra=record.extra | ({MAPS: maps} if (maps := maps_of(prepared, pair)) else {}),
        )
