"""Everything that can be found wrong before any weights load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffalign import plugins
from diffalign.config import RunConfig
from diffalign.errors import ConfigError, DataError, did_you_mean
from diffalign.files import require_writable

if TYPE_CHECKING:
    from diffalign.families import Family
    from diffalign.objectives import Objective

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
)


def check(config: RunConfig) -> None:
    """Refuse what cannot run.

    Raises:
        UserError: the first problem found.
    """
    from diffalign.adapters import check_lora
    from diffalign.data.prompts import load_prompts

    family: type[Family] = plugins.find("families", config.model.family)
    family.preflight(config.model)
    objective: Objective = config.objective
    objective.check(family, config.model.prediction_type)
    plugins.find("readers", config.data.format)
    check_lora(config.lora)
    _check_training(config)
    if config.training.attention not in family.attention_backends:
        raise ConfigError(
            f"training.attention {config.training.attention!r}: family {config.model.family!r} takes "
            f"{' or '.join(map(repr, family.attention_backends))} (PyTorch's own attention picks flash where it can)"
        )
    _check_data(config, family)
    check_sampling(config)
    if config.evaluation.at_end:
        if not config.evaluation.prompts:
            raise ConfigError("evaluation.prompts: missing, and evaluation.at_end is true; name a file or a list")
        if not config.evaluation.rewards:
            raise ConfigError("evaluation.rewards: empty, and evaluation.at_end is true; name at least one reward")
    if config.evaluation.prompts:
        load_prompts(config.evaluation.prompts, config.evaluation.num_prompts)
    require_writable(Path(config.output_dir), needed_bytes=64 << 20)


def _check_training(config: RunConfig) -> None:
    training = config.training
    for name in ("max_train_steps", "gradient_accumulation_steps", "logging_steps"):
        if getattr(training, name) < 1:
            raise ConfigError(f"training.{name}: got {getattr(training, name)}; expected at least 1")
    if training.train_batch_size != "auto" and training.train_batch_size < 1:
        raise ConfigError(f"training.train_batch_size: got {training.train_batch_size}; expected at least 1, or 'auto'")
    if training.learning_rate < 0:
        raise ConfigError(f"training.learning_rate: got {training.learning_rate}; expected a number >= 0")
    if training.lr_scheduler not in SCHEDULES:
        raise ConfigError(
            f"training.lr_scheduler {training.lr_scheduler!r}{did_you_mean(training.lr_scheduler, SCHEDULES)} "
            f"Expected one of: {', '.join(SCHEDULES)}"
        )
    if training.lr_scheduler == "constant" and training.lr_warmup_steps:
        raise ConfigError(
            f"training.lr_warmup_steps: got {training.lr_warmup_steps}, but the 'constant' schedule has no warm-up; set "
            "training.lr_scheduler: constant_with_warmup"
        )
    if training.lr_scheduler == "polynomial" and training.learning_rate <= 1e-7:
        raise ConfigError(
            f"training.learning_rate: got {training.learning_rate}; the 'polynomial' schedule ends at 1e-7 and must start "
            "above it"
        )
    _check_trackers(training.report_to)
    if training.max_grad_norm < 0:
        raise ConfigError(f"training.max_grad_norm: got {training.max_grad_norm}; expected 0 (no clipping) or more")
    if training.ema_decay is not None and not 0 < training.ema_decay < 1:
        raise ConfigError(f"training.ema_decay: got {training.ema_decay}; expected 0 < value < 1, or null")
    if not config.cache.enabled and training.dataloader_workers:
        raise ConfigError(
            "training.dataloader_workers needs the cache: without it images are encoded by the model in the main "
            "process. Set cache.enabled: true or training.dataloader_workers: 0"
        )


def _check_trackers(names: tuple[str, ...]) -> None:
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = sorted(LOGGER_TYPE_TO_CLASS)
            raise ConfigError(
                f"training.report_to {name!r} is no tracker{did_you_mean(name, known)} Known: {', '.join(known)}"
            )
        if name not in available:
            raise ConfigError(f"training.report_to {name!r} needs its package; install it with: pip install {name}")


def check_sampling(config: RunConfig) -> None:
    """Counts, scheduler and reward names: what sampling and evaluation need, for every command.

    Raises:
        ConfigError: the first problem found.
    """
    from diffalign import rewards
    from diffalign.families._loading import find_scheduler

    _check_counts(config)
    if config.sampling.scheduler:
        find_scheduler(config.sampling.scheduler)
    for name in config.evaluation.rewards:
        rewards.find(name)


def _check_counts(config: RunConfig) -> None:
    counts = {
        "cache": ("shard_size", "batch_size", "workers"),
        "sampling": ("num_inference_steps", "batch_size"),
        "evaluation": ("num_prompts", "images_per_prompt"),
    }
    for section, names in counts.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            if value < 1:
                raise ConfigError(f"{section}.{name}: got {value}; expected at least 1")
    if config.data.max_pairs is not None and config.data.max_pairs < 1:
        raise ConfigError(f"data.max_pairs: got {config.data.max_pairs}; expected at least 1, or null for all")


def _check_data(config: RunConfig, family: type[Family]) -> None:
    data = config.data
    if not data.sources and data.world_pairs is None:
        raise ConfigError(
            "data.sources: empty; name local files or folders, or hub data set ids, in the order to try them"
        )
    if data.resolution < family.resolution_step:
        raise ConfigError(f"data.resolution: got {data.resolution}; expected at least {family.resolution_step} pixels")
    if data.buckets and not config.cache.enabled:
        raise ConfigError("data.buckets needs the cache, which knows every image's size; set cache.enabled: true")
    if not 0 <= config.evaluation.held_out_fraction < 1:
        raise ConfigError(
            f"evaluation.held_out_fraction: got {config.evaluation.held_out_fraction}; expected 0 <= value < 1"
        )
    if data.world_pairs is not None and data.format != "pickapic":
        raise DataError(f"data.world_pairs writes the 'pickapic' format; data.format is {data.format!r}")
