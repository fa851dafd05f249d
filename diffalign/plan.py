"""What a run will cost, before anything is downloaded: parameters, memory, time, disk, batch and learning rate.

Counts are exact for the architecture (`diffalign.measure`). Times are arithmetic: operations divided by a stated share
of a card's data-sheet rate; nothing is timed. Facts about published data sets are what their pages said.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffalign import plugins, rewards, sides
from diffalign._plan_rollouts import (
    Sampling,
    checkpoints_steps,
    group_of,
    images_per_item,
    passes_per_item,
    plan_sampling,
    steps_per_pass,
    unit_of,
)
from diffalign.architecture import Architecture, Download, resolve
from diffalign.config import RunConfig
from diffalign.errors import ConfigError
from diffalign.measure import (
    EncodeCost,
    NetworkCost,
    TextCost,
    measure_encoder,
    measure_network,
    measure_text_encoders,
)
from diffalign.sampling.rules import kind_of
from diffalign.sparse import label
from diffalign.summary import objective_summary
from diffalign.user_branches import wanted

GIB = 2**30
# CUDA context, library workspaces and the allocator's own reserve.
CONTEXT_BYTES = GIB
# Casts, gradients in flight and fragmentation come on top of what autograd keeps; real runs carry some 10 to 30 %.
ACTIVATION_ALLOWANCE = 0.15
UTILISATION = 0.40
# Dense bf16/fp16 rates with float32 accumulation, TFLOP/s, from the makers' data sheets.
CARDS = {"H100/H200": 989, "A100": 312, "RTX 4090": 165}
# Diffusion-DPO's launchers: 1e-8 x global batch, that is 2.048e-5 at 2,048 pairs (full fine-tuning).
PUBLISHED_RATE_PER_PAIR = 1e-8
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STORAGE = {"float32": 4, "float16": 2, "bfloat16": 2}
CACHED_IMAGES = 2  # of a pair, whatever the objective uses


@dataclass(frozen=True)
class DataSet:
    """What is known of a published data set.

    Attributes:
        gigabytes: of the training split's files (1e9 bytes).
        rows: of the training split.
        usable: after ties and unlabelled rows are dropped; None if unknown.
        prompts: distinct ones; None if unknown.
    """

    gigabytes: float
    rows: int
    usable: int | None = None
    prompts: int | None = None


# The training split has 959,040 of Pick-a-Pic v2's 1,001,352 rows, and 583,747 of v1's 616,259.
KNOWN_DATA = {
    "yuvalkirstain/pickapic_v2": DataSet(321, 959_040, 851_293, 58_960),
    "liuhuohuo2/pick-a-pic-v2": DataSet(321, 959_040, 851_293, 58_960),
    "sayakpaul/pickapic_v2_webdataset": DataSet(563, 959_040, 851_293, 58_960),
    "pickapic-anonymous/pickapic_v1": DataSet(193, 583_747),
}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the training device at the peak of a step.

    Attributes:
        network: frozen weights, those of text encoders that are trained included.
        adapter: LoRA weights in float32 with gradients and optimiser states.
        ema: the average's copy.
        encoders: VAE and text encoders with one encoding call, where there is no cache.
        activations: kept for the backward pass.
        recomputed: the largest checkpointed block while it is recomputed.
        allowance: for what is not counted, a share of activations and recomputed.
        context: CUDA context and workspaces.
    """

    network: int
    adapter: int
    ema: int
    encoders: int
    activations: int
    recomputed: int
    allowance: int
    context: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A way to run the same optimiser step, and the memory it takes."""

    train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    memory: Memory


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every number of a plan. Bytes are bytes, FLOPs count a multiply-add as 2, None means unknown.

    Attributes:
        model: where the architecture was read from.
        assumed: why an architecture was assumed, or None.
        parameters: by component.
        frames: of a clip; 1 for images.
        network: counts of one image or clip through the network at the training resolution.
        text_encoders: counts of one prompt through the text encoders that are trained; None where none are.
        latent_shape: (C, h, w), of clips (C, F, h, w).
        setting: micro-batch, accumulation and checkpointing in use, with their memory.
        cache_phase_bytes: on the device while images and prompts are encoded; None without a cache.
        sampling: of the images that are trained on; None where all are stored.
        sampling_phase_bytes: on the device while sampled images are decoded, without reward models; None where none are.
        gpu_bytes: of the card that was asked about.
        fits: whether `setting` and the encoding fit it; None without a card.
        nearest: the nearest setting that fits, if `setting` does not and one exists.
        unit: what batches count: "pairs", "images" or "pairs of steps".
        flops_per_pair: of a training step, by pair (or whatever batches count).
        step_seconds: per optimiser step and device, by card at `UTILISATION`; empty in float32.
        run_hours: all optimiser steps, by card.
        encode_hours: filling the cache once, by card.
        pairs: usable pairs before the held-out share; None if unknown, or if there are prompts alone.
        effective_batch: pairs (or whatever batches count) per optimiser step, over all processes.
        steps_per_epoch: optimiser steps for one pass over pairs or prompts; None if their number is unknown.
        epochs: passes made by `max_train_steps`.
        learning_rate: in use.
        rate_per_pair: learning rate / effective batch.
        method: the objective's title.
        objective: the objective's own numbers, such as beta and its equivalents.
        latent_bytes_per_pair: in the cache, if no image is shared.
        text_bytes_per_prompt: in the cache.
        cache_bytes: in all, an upper bound; None if the number of pairs is unknown or there is no cache.
        downloads: what is needed and whether it is here.
        notes: in plain words.
    """

    model: str
    assumed: str | None
    resolution: int
    frames: int
    precision: str
    num_processes: int
    parameters: dict[str, int]
    lora_rank: int
    users: str | None
    preference: tuple[str, ...]
    through: str | None
    lora_targets: str | tuple[str, ...]
    lora_experts: int  # that are fused; 0: a new adapter is trained
    lora_text_rank: int
    sparse: str | None  # entries of the weights that are trained in place of a LoRA
    network: NetworkCost
    text_encoders: TextCost | None
    latent_shape: tuple[int, ...]
    setting: Setting
    cache_phase_bytes: int | None
    sampling: Sampling | None
    sampling_phase_bytes: int | None
    gpu_bytes: int | None
    fits: bool | None
    nearest: Setting | None
    unit: str
    flops_per_pair: int
    step_seconds: dict[str, float]
    run_hours: dict[str, float]
    encode_hours: dict[str, float]
    pairs: int | None
    effective_batch: int
    max_train_steps: int
    steps_per_epoch: int | None
    epochs: float | None
    learning_rate: float
    rate_per_pair: float
    method: str
    objective: dict[str, float | str]
    latent_bytes_per_pair: int
    text_bytes_per_prompt: int
    cache_bytes: int | None
    downloads: tuple[Download, ...]
    notes: tuple[str, ...]


class _Costs:
    """The counted costs of a configuration, from which memory at any micro-batch follows."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.architecture: Architecture = resolve(config.model)
        self.dtype = DTYPES[config.training.mixed_precision]
        self.images = images_per_item(config, self.architecture.family)
        self.passes = passes_per_item(config, self.architecture.family)
        self.together = group_of(config)
        self.has_pairs = not config.rollout.prompts
        resolution, frames = config.data.resolution, config.data.num_frames
        self.latent_shape = self.architecture.latent_shape(resolution, frames)
        self.network: NetworkCost = measure_network(
            self.architecture,
            sides.lora_of(config),
            shape=self.latent_shape,
            dtype=self.dtype,
            branch=wanted(config),
            sparse=config.sparse,
            seed=config.seed,
        )
        self.text: TextCost | None = measure_text_encoders(self.architecture, config.lora, dtype=self.dtype)
        self.encoder: EncodeCost = measure_encoder(self.architecture.configs["vae"], resolution, frames)

    def memory(self, micro_batch: int, checkpointing: bool) -> Memory:
        """Peak memory with `micro_batch` pairs at a time."""
        training, network = self.config.training, self.network
        images = micro_batch * self.images
        kept = images * (network.checkpoint_bytes if checkpointing else network.saved_bytes)
        recomputed = images * network.transient_bytes if checkpointing else 0
        trained, weights = network.lora_parameters, network.weight_bytes
        if self.text is not None:  # at most: images of one prompt share what its encoders keep
            kept += images * self.text.saved_bytes
            trained, weights = trained + self.text.lora_parameters, weights + self.text.weight_bytes
        listed = self.config.sparse.method in ("sara", "lift")  # values on one axis, and their places
        # Bytes per number; Adafactor's are factored, but not those on one axis.
        states = {"adamw8bit": 2, "adafactor": 4 if listed else 0}.get(training.optimizer, 8)
        return Memory(
            network=weights,
            adapter=trained * (4 + 4 + states + (4 if listed else 0)),
            ema=0 if training.ema_decay is None else trained * 4,
            encoders=0 if self.config.cache.enabled or not self.has_pairs else self._encoding(2),
            activations=kept,
            recomputed=recomputed,
            allowance=int((kept + recomputed) * ACTIVATION_ALLOWANCE),
            context=CONTEXT_BYTES,
        )

    def _encoding(self, batch: int) -> int:
        """Bytes of the encoders with one VAE call of `batch` images."""
        vae, text = self._encode_types()
        parameters = self.architecture.parameters
        weights = sum(n * text for name, n in parameters.items() if name.startswith("text_encoder"))
        return weights + parameters["vae"] * vae + batch * self.encoder.peak_bytes * vae // 4

    def _encode_types(self) -> tuple[int, int]:
        """Bytes per number of VAE and text encoders: the VAE is float32 unless told otherwise."""
        named = self.config.cache.encode_dtype
        return (STORAGE[named] if named else 4), self.dtype.itemsize

    def cache_phase(self) -> int | None:
        """Bytes on the device while the cache is filled."""
        if not self.config.cache.enabled or not self.has_pairs:
            return None
        return self._encoding(self.config.cache.batch_size) + CONTEXT_BYTES

    def flops_per_pair(self, checkpointing: bool) -> int:
        """A training step's operations per pair; encoders only where there is no cache."""
        network = self.network
        reference = network.forward_flops if self.config.objective.reads_reference() else 0
        again = int(checkpointing) + int(checkpoints_steps(self.config))  # blocks in the steps that are computed again
        policy = network.policy_forward_flops * (1 + again) + network.backward_flops
        if self.text is not None:
            policy += self.text.forward_flops + self.text.backward_flops
            reference += self.text.forward_flops if reference else 0
        encode = 0 if self.config.cache.enabled or not self.has_pairs else self.encoder.flops
        return self.passes * (reference + policy + encode)

    def setting(self, micro_batch: int, checkpointing: bool) -> Setting:
        """The same pairs per device and step, cut into micro-batches of this size."""
        return Setting(
            train_batch_size=micro_batch,
            gradient_accumulation_steps=pairs_per_device(self.config) // micro_batch,
            gradient_checkpointing=checkpointing,
            memory=self.memory(micro_batch, checkpointing),
        )


def pairs_per_device(config: RunConfig) -> int:
    """Pairs per device and optimiser step. With `train_batch_size: auto` that is what accumulation alone says.

    So the micro-batch that a card allows never changes the effective batch.
    """
    training = config.training
    micro = 1 if training.train_batch_size == "auto" else training.train_batch_size
    if micro < 1 or training.gradient_accumulation_steps < 1:
        raise ConfigError(
            f"training: train_batch_size is {micro} and gradient_accumulation_steps "
            f"{training.gradient_accumulation_steps}; both must be at least 1"
        )
    return int(micro * training.gradient_accumulation_steps)


def choose_micro_batch(config: RunConfig, gpu_bytes: float) -> tuple[int, bool]:
    """What `train_batch_size: auto` and `gradient_checkpointing: auto` stand for on a device.

    The largest micro-batch that fits without checkpointing, if one does; else the largest with it. Only divisors of
    `gradient_accumulation_steps` are tried, and with "auto" the trainer divides it by the micro-batch: the effective
    batch is the same on every device. What is not "auto" stays as it is.

    Args:
        config: the run.
        gpu_bytes: memory of the device.

    Returns:
        (train_batch_size, gradient_checkpointing).

    Raises:
        ConfigError: not even one pair with checkpointing fits.
    """
    costs = _Costs(config)
    found = _choose(costs, gpu_bytes)
    if found is None:
        smallest = costs.memory(1, True).total
        raise ConfigError(
            f"no micro-batch fits into {gpu_bytes / GIB:.1f} GiB: one pair with gradient checkpointing takes about "
            f"{smallest / GIB:.1f} GiB; use a smaller data.resolution or lora.rank, or a larger device"
        )
    return found


def _choose(costs: _Costs, gpu_bytes: float) -> tuple[int, bool] | None:
    training = costs.config.training
    micro = training.train_batch_size
    ways = [False, True] if training.gradient_checkpointing == "auto" else [training.gradient_checkpointing]
    sizes = _divisors(pairs_per_device(costs.config)) if micro == "auto" else [micro]
    for checkpointing in ways:
        for size in sizes:
            if costs.memory(size, checkpointing).total <= gpu_bytes:
                return size, checkpointing
    return None


def _divisors(number: int) -> list[int]:
    """All divisors, largest first."""
    return [n for n in range(number, 0, -1) if number % n == 0]


def _nearest(costs: _Costs, setting: Setting, gpu_bytes: float) -> Setting | None:
    """Checkpointing on; then smaller micro-batches with more accumulation; groups of samples stay whole."""
    for size in _divisors(pairs_per_device(costs.config)):
        if (
            size % costs.together == 0
            and size <= setting.train_batch_size
            and costs.memory(size, True).total <= gpu_bytes
        ):
            return costs.setting(size, True)
    return None


def make_plan(
    config: RunConfig, *, gpu_gb: float | None = None, num_processes: int = 1, pairs: int | None = None
) -> Plan:
    """Count what a run costs. Nothing is downloaded, and no weights are made.

    Args:
        config: the run.
        gpu_gb: memory of the card as it is sold (24, 80: GiB in truth); None takes the card of this machine, if any.
        num_processes: devices that train together.
        pairs: number of usable pairs, where you know it; None takes `data.max_pairs` or what is known of the source.

    Raises:
        ConfigError: a language model, a model that cannot be found or built, or LoRA targets that name no layer.
    """
    if plugins.find("families", config.model.family).modality != "image":  # type: ignore[attr-defined]
        raise ConfigError(
            f"plan: family {config.model.family!r} works on texts, and only diffusion models are planned; look at the data "
            "with diffalign data check, and try the settings with training.max_train_steps=10"
        )
    costs = _Costs(config)
    training = config.training
    gpu_bytes = int(gpu_gb * GIB) if gpu_gb is not None else _this_gpu()
    setting, notes = _setting(costs, gpu_bytes)
    phase = costs.cache_phase()
    effective = pairs_per_device(config) * num_processes
    sampling = plan_sampling(config, costs.architecture, costs.network, costs.latent_shape, effective)
    sampled = _sampling_phase(config, setting.memory, sampling)
    fits = None if gpu_bytes is None else max(setting.memory.total, phase or 0, sampled or 0) <= gpu_bytes
    nearest = None
    if gpu_bytes is not None and setting.memory.total > gpu_bytes:
        nearest = _nearest(costs, setting, gpu_bytes)
    if gpu_bytes is not None and phase is not None and phase > gpu_bytes:
        notes.append("filling the cache does not fit the card: lower cache.batch_size")
    if gpu_bytes is not None and sampled is not None and sampled > gpu_bytes:
        key = "rollout.decode_batch_size" if config.objective.rows_from == "differentiable" else "sampling.batch_size"
        notes.append(f"decoding samples does not fit the card: lower {key}")
    known, data = _data(config)
    count = pairs if pairs is not None else _pairs(config, known)
    trained = None if count is None else count - int(count * config.evaluation.held_out_fraction)
    one_pass = _one_pass(config, known, trained, sampling, effective)
    latent = STORAGE[config.cache.dtype] * CACHED_IMAGES * math.prod(costs.latent_shape)
    text = STORAGE[config.cache.dtype] * costs.architecture.text_numbers
    flops = costs.flops_per_pair(setting.gradient_checkpointing)
    work = flops * effective + (0 if sampling is None else sampling.flops)
    step = {} if training.mixed_precision == "no" else _seconds(work / num_processes)
    encode = {} if count is None or not step else _seconds(count * CACHED_IMAGES * costs.encoder.flops)
    if known is None and count is None and costs.has_pairs:
        notes.append(
            "the number of pairs is not known before the data is read: pass pairs to get epochs and cache size"
        )
    with_weights = [name for name in config.evaluation.rewards if rewards.find(name)[0].weights is not None]
    if with_weights and config.evaluation.at_end:
        notes.append(f"evaluation also downloads its reward models: {', '.join(with_weights)}")
    if config.rollout.rewards and sampling is not None:
        notes.append(f"memory and time of the reward models come on top: {', '.join(config.rollout.rewards)}")
    if config.sparse.method == "sara":
        notes.append(
            "SaRA: which entries are below sparse.threshold is known when weights are there; parameters, memory and time "
            "are those of all entries of its layers, the most there can be"
        )
    return Plan(
        model=costs.architecture.source,
        assumed=costs.architecture.assumed,
        resolution=config.data.resolution,
        frames=config.data.num_frames,
        precision=training.mixed_precision,
        num_processes=num_processes,
        parameters=costs.architecture.parameters,
        lora_rank=config.lora.rank,
        users=config.users.encoder,
        preference=config.preference.rewards,
        through=config.preference.through if config.preference.seen else None,
        lora_targets=config.lora.targets,
        lora_experts=len(config.lora.experts),
        lora_text_rank=config.lora.text_encoder_rank,
        sparse=None if config.sparse.method is None else label(config.sparse),
        network=costs.network,
        text_encoders=costs.text,
        latent_shape=costs.latent_shape,
        setting=setting,
        cache_phase_bytes=phase,
        sampling=sampling,
        sampling_phase_bytes=sampled,
        gpu_bytes=gpu_bytes,
        fits=fits,
        nearest=nearest,
        unit=unit_of(config),
        flops_per_pair=flops,
        step_seconds=step,
        run_hours={card: s * training.max_train_steps / 3600 for card, s in step.items()},
        encode_hours={card: s / 3600 for card, s in encode.items()} if phase is not None else {},
        pairs=count,
        effective_batch=effective,
        max_train_steps=training.max_train_steps,
        steps_per_epoch=None if one_pass is None else max(1, math.ceil(one_pass)),
        epochs=None if not one_pass else training.max_train_steps / one_pass,
        learning_rate=training.learning_rate,
        rate_per_pair=training.learning_rate / effective,
        method=type(config.objective).title,
        objective=objective_summary(config, kind_of(config.objective), elements=math.prod(costs.latent_shape)),
        latent_bytes_per_pair=latent,
        text_bytes_per_prompt=text,
        cache_bytes=_cache_bytes(config, count, known, latent, text),
        downloads=(*costs.architecture.downloads(config.model), *data),
        notes=tuple(notes),
    )


def _sampling_phase(config: RunConfig, memory: Memory, sampling: Sampling | None) -> int | None:
    """Bytes on the device while samples are decoded: the network stays, and what back-propagation keeps of the sampler."""
    if sampling is None or not sampling.decoder_bytes:
        return None
    back = config.objective.rows_from == "differentiable" and not checkpoints_steps(config)
    return (
        (memory.activations if back else 0)
        + memory.network
        + memory.adapter
        + memory.ema
        + memory.context
        + sampling.decoder_bytes
    )


def _one_pass(
    config: RunConfig, known: DataSet | None, trained: int | None, sampling: Sampling | None, effective: int
) -> float | None:
    """Optimiser steps for one pass over what is trained on: pairs, or the prompts that are sampled for."""
    if sampling is None:
        return None if trained is None else trained / effective
    if config.objective.from_data or config.data.world_pairs is not None:
        return steps_per_pass(sampling, trained)
    prompts = known.prompts if known else None  # several pairs of the data may have the same
    return steps_per_pass(sampling, prompts if prompts is None or trained is None else min(prompts, trained))


def _this_gpu() -> int | None:
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _setting(costs: _Costs, gpu_bytes: int | None) -> tuple[Setting, list[str]]:
    """The setting in use, with "auto" resolved, and what there is to say about it."""
    training = costs.config.training
    micro, checkpointing = training.train_batch_size, training.gradient_checkpointing
    if micro != "auto" and checkpointing != "auto":
        return costs.setting(micro, checkpointing), []
    if gpu_bytes is None:
        note = "auto is decided on the device; shown for one pair at a time with checkpointing, the least memory"
        return costs.setting(1 if micro == "auto" else micro, checkpointing is not False), [note]
    found = _choose(costs, gpu_bytes)
    if found is None:
        return costs.setting(1 if micro == "auto" else micro, checkpointing is not False), [
            "auto finds nothing that fits"
        ]
    return costs.setting(*found), ["auto was decided for this card"]


def _seconds(flops: float) -> dict[str, float]:
    return {card: flops / (rate * 1e12 * UTILISATION) for card, rate in CARDS.items()}


def _data(config: RunConfig) -> tuple[DataSet | None, tuple[Download, ...]]:
    """What is known of the source that will probably be used, and its download."""
    data = config.data
    if config.rollout.prompts:
        return None, ()
    if data.world_pairs is not None:
        return None, (Download(what="pairs", source="made from the tiny world", bytes=0, here=True),)
    for source in data.sources:
        path = Path(source).expanduser()
        if path.exists():
            return _local_data(path, data.split), (Download(what="pairs", source=source, bytes=0, here=True),)
    hub = [source for source in data.sources if source.count("/") == 1 and not source.startswith((".", "/", "~"))]
    if not hub:
        return None, (Download(what="pairs", source="no usable source in data.sources", bytes=None, here=False),)
    source = next((s for s in hub if s.partition("@")[0] in KNOWN_DATA), hub[0])
    known = KNOWN_DATA.get(source.partition("@")[0])
    size = None
    if known is not None:
        wanted = (
            data.max_pairs if data.max_pairs is not None and known.usable is not None else known.usable or known.rows
        )
        size = int(known.gigabytes * 1e9 * min(1.0, wanted / (known.usable or known.rows)))
    return known, (Download(what="pairs", source=source, bytes=size, here=False),)


def _local_data(path: Path, split: str) -> DataSet | None:
    """Rows of local parquet files, from their footers: an upper bound of the pairs."""
    import pyarrow.parquet as pq

    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path] if path.suffix == ".parquet" else []
    files = [file for file in files if split in file.name or len(files) == 1] or files
    if not files:
        return None
    rows = sum(pq.read_metadata(file).num_rows for file in files)
    return DataSet(sum(file.stat().st_size for file in files) / 1e9, rows, rows)


def _pairs(config: RunConfig, known: DataSet | None) -> int | None:
    data = config.data
    bounds = [data.max_pairs, known.usable if known else None, data.world_pairs.prompts if data.world_pairs else None]
    return min((bound for bound in bounds if bound is not None), default=None)


def _cache_bytes(config: RunConfig, pairs: int | None, known: DataSet | None, latent: int, text: int) -> int | None:
    if pairs is None or not config.cache.enabled:
        return None
    prompts = min(pairs, known.prompts) if known and known.prompts else pairs
    return pairs * latent + prompts * text


def to_json(plan: Plan) -> str:
    """Every number of a plan as JSON."""
    tree: dict[str, Any] = dataclasses.asdict(plan)
    for setting, owner in ((plan.setting, tree["setting"]), (plan.nearest, tree["nearest"])):
        if setting is not None:
            owner["memory"]["total"] = setting.memory.total
    return json.dumps(tree, indent=2)
