"""Device, precision and memory: what a run needs from the machine, set through accelerate and diffusers."""

from __future__ import annotations

import dataclasses
import logging
import resource
import sys
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, InitProcessGroupKwargs

from diffalign.config import RunConfig, TrainingConfig
from diffalign.errors import ConfigError, MissingExtraError
from diffalign.families import DenoisingFamily, Family, load_family

log = logging.getLogger(__name__)
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_accelerator(training: TrainingConfig, output_dir: str) -> Accelerator:
    """Device, processes, mixed precision and CPU threads."""
    if training.threads:
        torch.set_num_threads(training.threads)
    # While the main process samples and evaluates, the others wait for it: longer than torch's ten minutes.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    # Buffers are constants and the same everywhere: with this, nothing sends them, not even at the start. Those of changed
    # weights, as large as what is trained, are sent once by `sparse.share_places`.
    wrapper = DistributedDataParallelKwargs(broadcast_buffers=False)
    # accelerate keeps the precision of a process's first run; a second run in the same process may want another.
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision=training.mixed_precision,
            cpu=training.cpu or None,  # type: ignore[arg-type]
            log_with=list(training.report_to) or None,
            project_dir=output_dir,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=False),
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[patience, wrapper],
        )
    except ValueError as error:
        raise ConfigError(
            f"training.mixed_precision {training.mixed_precision!r}: {str(error).splitlines()[0]} "
            "Use 'no', or 'bf16' where the device has it"
        ) from error
    if not accelerator.is_main_process:
        logging.getLogger("diffalign").setLevel(logging.WARNING)
    return accelerator


def open_denoising(config: RunConfig, accelerator: Accelerator) -> DenoisingFamily:
    """The family of a config whose model makes images.

    Raises:
        ConfigError: it is a language model's or a reward's.
    """
    family = open_family(config, accelerator)
    if not isinstance(family, DenoisingFamily):
        what = "works on texts" if family.modality == "text" else "trains reward models"
        raise ConfigError(f"model.family {config.model.family!r} {what}; this needs a model that makes images")
    return family


def open_family(config: RunConfig, accelerator: Accelerator) -> Family:
    """The family of a config in the precision of training; nothing is loaded yet."""
    encode_dtype = config.cache.encode_dtype
    return load_family(
        config.model,
        device=accelerator.device,
        dtype=DTYPES[config.training.mixed_precision],
        vae_dtype=torch.float32 if encode_dtype is None else getattr(torch, encode_dtype),
    )


def resolve_auto(config: RunConfig, accelerator: Accelerator) -> RunConfig:
    """Replace `auto` batch size and checkpointing by what fits every device; the effective batch stays as configured.

    All processes must come to the same: it is the smallest device that decides.
    """
    training = config.training
    if "auto" not in (training.train_batch_size, training.gradient_checkpointing):
        return config
    batch, checkpointing = 1, False
    if accelerator.device.type == "cuda":
        from diffalign.plan import choose_micro_batch

        memory = torch.cuda.get_device_properties(accelerator.device).total_memory
        everywhere = accelerator.gather(torch.tensor([memory], device=accelerator.device))
        batch, checkpointing = choose_micro_batch(config, int(everywhere.min()))
    if training.gradient_checkpointing != "auto":
        checkpointing = training.gradient_checkpointing
    changes: dict[str, Any] = {"train_batch_size": batch, "gradient_checkpointing": checkpointing}
    if training.train_batch_size == "auto":
        # Accumulation was given for a micro-batch of one; larger micro-batches need fewer of them.
        if training.gradient_accumulation_steps % batch:
            batch = max(b for b in range(1, batch + 1) if training.gradient_accumulation_steps % b == 0)
        changes |= {
            "train_batch_size": batch,
            "gradient_accumulation_steps": training.gradient_accumulation_steps // batch,
        }
    else:
        changes["train_batch_size"] = training.train_batch_size
    log.info("chosen for this device: %s", ", ".join(f"{k} {v}" for k, v in changes.items()))
    return dataclasses.replace(config, training=dataclasses.replace(training, **changes))


def configure_network(network: Any, training: TrainingConfig) -> None:
    """Checkpointing, attention backend, memory format and compilation, all through diffusers.

    Raises:
        ConfigError: this network or device cannot do one of them.
    """
    if training.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if training.attention == "xformers":
        try:
            network.enable_xformers_memory_efficient_attention()
        except ImportError as error:
            raise MissingExtraError("xformers", "xformers", "training.attention=xformers") from error
        except ValueError as error:  # no CUDA device
            raise ConfigError(f"training.attention 'xformers': {str(error).splitlines()[0]}; use 'default'") from error
    if training.channels_last:
        try:
            network.to(memory_format=torch.channels_last)
        except RuntimeError as error:  # a convolution over frames, too
            raise ConfigError(
                f"training.channels_last: {type(network).__name__} has convolutions that are not of images; remove it"
            ) from error
    if training.compile:
        try:
            network.compile_repeated_blocks()
        except ValueError as error:
            raise ConfigError(
                f"training.compile: diffusers does not say which blocks of {type(network).__name__} repeat; remove it"
            ) from error


def memory_gb(device: torch.device) -> float:
    """Peak memory in GB: of the accelerator, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9
