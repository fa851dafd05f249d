"""The training loop: read it from top to bottom.

    data -> network + adapter -> [ micro-batches -> scores -> objective -> backward ] -> step -> log -> checkpoint -> outputs

What is particular to images or texts is the job's. Timesteps, noise and order of the samples are functions of (seed, sample
id) and come with the micro-batches, so a step does not depend on the number of processes, on how it is split into
micro-batches, or on being resumed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffalign import adapters, checkpoint, preflight
from diffalign._run_data import describe_environment
from diffalign.config import RunConfig, TrainingConfig
from diffalign.config_loading import dump
from diffalign.errors import MissingExtraError, UserError
from diffalign.files import atomic_write_text
from diffalign.hardware import make_accelerator, memory_gb, open_family, resolve_auto
from diffalign.health import Monitor, require_finite, require_on_policy
from diffalign.jobs import open_job
from diffalign.metrics import MetricsFile, StepMetrics
from diffalign.progress import Progress
from diffalign.references import Reference
from diffalign.schedules import sample_seed
from diffalign.stopping import StopRequest
from diffalign.text_encoders import parameter_groups

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        run_dir: where everything was written.
        step: optimiser steps done.
        result: content of `result.json`, if the run evaluated itself.
        stopped_by: signal number, if the run was asked to stop early.
    """

    run_dir: Path
    step: int
    result: dict[str, Any] | None
    stopped_by: int | None = None


def train(config: RunConfig) -> TrainResult:
    """Train an adapter.

    Raises:
        UserError: something about the config, the data or a checkpoint; nothing was lost.
    """
    # -- Setup ---------------------------------------------------------------------------------------------------
    training, objective = config.training, config.objective
    accelerator = make_accelerator(training, config.output_dir)
    preflight.check(config)
    config = resolve_auto(config, accelerator)
    training = config.training
    run_dir = Path(config.output_dir)
    resume_path = checkpoint.find(run_dir, training.resume_from_checkpoint)
    resumed = checkpoint.load(resume_path, config) if resume_path else None
    device = accelerator.device
    family = open_family(config, accelerator)
    if accelerator.is_main_process:
        atomic_write_text(run_dir / "config.yaml", dump(config))
        atomic_write_text(run_dir / "environment.json", json.dumps(describe_environment(), indent=1))

    # -- Data: what is trained on, and what must be the same when the run is resumed ------------------------------
    job = open_job(config, accelerator, family)
    job.prepare()
    identity = job.identity()
    if resumed is not None:
        checkpoint.check_identity(resumed, identity)

    # -- Network, adapter, reference, optimiser ------------------------------------------------------------------
    bare = job.load()
    params = job.attach(bare)
    modules, count = adapters.count(bare, "default")
    bare.train()
    network = accelerator.prepare_model(bare)
    reference = Reference(config.reference, bare, params, config.seed)
    optimizer = accelerator.prepare_optimizer(make_optimizer(parameter_groups(bare, params, training), training))
    scheduler = get_scheduler(
        training.lr_scheduler,
        optimizer.optimizer,
        num_warmup_steps=training.lr_warmup_steps,
        num_training_steps=training.max_train_steps,
    )
    ema = EMAModel(params, decay=training.ema_decay) if training.ema_decay else None
    job.start(network, bare, reference)
    step = 0
    if resumed is not None:
        step = resumed.step
        adapters.load_state_dict(bare, resumed.adapter)
        optimizer.optimizer.load_state_dict(resumed.state["optimizer"])
        scheduler.load_state_dict(resumed.state["scheduler"])
        reference.load_state_dict(resumed.state.get("reference", {}))
        job.load_state_dict(resumed.state.get("job", {}))
        if ema is not None:
            ema.load_state_dict(resumed.state["ema"])
            ema.to(device)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(resumed.state["scaler"])
        log.info("resumed %s at step %d", resumed.path, step)

    # -- What this run is, in numbers ----------------------------------------------------------------------------
    accumulation, world, effective = (
        training.gradient_accumulation_steps,
        accelerator.num_processes,
        job.effective_batch,
    )
    summary = job.summary()
    log.info(
        "%s on %d %s (%d held out): %d adapted modules, %s trained parameters; effective batch %d = %d x %d x %d processes; "
        "learning rate in use %g; %.2f passes over the data",
        objective.title,
        job.count,
        job.unit,
        job.held_out,
        modules,
        f"{count:,}",
        effective,
        training.train_batch_size,
        accumulation,
        world,
        training.learning_rate,
        job.passes(),
    )
    if summary:
        log.info("%s", ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in summary.items()))
    if step == 0 and accelerator.is_main_process:
        job.sample(0, adapters=False)
    accelerator.wait_for_everyone()

    # -- The loop ------------------------------------------------------------------------------------------------
    metrics = StepMetrics(accelerator, job.num_timesteps)
    monitor = Monitor(initial_loss=job.initial_loss(), fresh=step == 0, reference=job.objective.reads_reference())
    rows = MetricsFile(run_dir / "metrics.jsonl", resume_step=step) if accelerator.is_main_process else None
    accelerator.init_trackers("diffalign", config={"objective": objective.title, "effective_batch": effective})
    batches = job.micro_batches(step)
    if rows is not None and resumed is not None and "unseen" in resumed.state:
        with swapped(ema, params):
            rows.write(resumed.state["unseen"] | job.watch(step))
    last_checkpoint = str(resumed.path) if resumed else None
    seconds_before = resumed.manifest["train_seconds"] if resumed else 0.0
    started, busy, first_step = time.perf_counter(), 0.0, step
    enough = agreed(job.enough, accelerator)  # nothing has got better for a while

    def save_checkpoint(unseen: dict[str, Any] | None = None) -> str:
        """Write a checkpoint of the state after `step` steps (main process); `unseen` is its row, not looked at yet."""
        state: dict[str, Any] = {
            "optimizer": optimizer.optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        }
        if ema is not None:
            state["ema"] = ema.state_dict()
        if accelerator.scaler is not None:
            state["scaler"] = accelerator.scaler.state_dict()
        state |= {
            name: value
            for name, value in (
                ("reference", reference.state_dict()),
                ("job", job.state_dict()),
                ("unseen", unseen),
            )
            if value
        }
        extra = {
            "objective": summary,
            "identity": identity,
            "samples": step * effective,
            "train_seconds": seconds_before + time.perf_counter() - started,
        }
        keep = training.checkpoints_total_limit
        return str(checkpoint.save(run_dir, step, adapters.state_dict(bare), state, config, extra, keep=keep))

    with StopRequest() as stop, Progress("training", training.max_train_steps, "step", step, rows is not None) as bar:
        while step < training.max_train_steps and not enough and not stop_requested(stop, accelerator):
            tick = time.perf_counter()
            counted = 0
            for part in range(accumulation):
                try:
                    batch = next(batches)
                except UserError:  # a reward that died, say: no step is lost
                    if accelerator.is_main_process and not checkpoint.folder_for(run_dir, step).exists():
                        save_checkpoint()
                        log.warning("stopped at step %d; go on with training.resume_from_checkpoint=latest", step)
                    raise
                if config.lora.dropout:  # the only random numbers that are not drawn for a sample
                    visit = step * accumulation + part
                    torch.manual_seed(sample_seed(config.seed, f"dropout {accelerator.process_index}", visit))
                # Gradients travel between processes once per optimiser step.
                with accelerator.no_sync(network) if part < accumulation - 1 else nullcontext():
                    out = job.loss(batch)
                    require_finite(step + 1, batch.ids, out.per_item, last_checkpoint)
                    share = len(out.per_item) / job.micro_batch
                    accelerator.backward(out.loss * share / accumulation)
                counted += len(out.per_item)
                job.record(metrics, batch, out)
            if job.own_gradients:
                average_gradients(accelerator, params)
            average_over(accelerator, params, counted, effective)
            penalties = add_penalties(accelerator, params, job.penalties(step))
            grad_norm = clip(accelerator, params, training.max_grad_norm)
            rates = [float(rate) for rate in scheduler.get_last_lr()]
            optimizer.step()
            job.after_update(step + 1)
            # A step that the fp16 loss scaler skipped does not count for the schedule.
            if not accelerator.optimizer_step_was_skipped:
                scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            if ema is not None:
                ema.step(params)
            step += 1
            reference.after_step(step)
            job.after_step(step)

            row = metrics.reduce() | penalties
            if step == 1:  # of a new run
                require_on_policy(row)
            seconds = time.perf_counter() - tick
            busy += seconds
            row |= {
                "step": step,
                "samples": step * effective,
                "grad_norm": grad_norm,
                "learning_rate": rates[0],
                f"{job.unit}_per_second": effective / seconds,
                "seconds_per_step": seconds,
                "memory_gb": memory_gb(device),
            }
            if len(rates) > 1:
                row["text_encoder_learning_rate"] = rates[1]
            if accelerator.scaler is not None:
                row["loss_scale"] = accelerator.scaler.get_scale()
            watched = job.watches(step)
            if watched:
                if accelerator.is_main_process:
                    try:
                        with swapped(ema, params):
                            row |= job.watch(step)
                    except UserError:  # a reward that died: the step stays done, and a resumed run looks first
                        save_checkpoint(unseen=row)
                        log.warning("stopped at step %d; go on with training.resume_from_checkpoint=latest", step)
                        raise
                enough = agreed(job.enough, accelerator)
            last = step == training.max_train_steps or enough
            if rows is not None:
                for alarm in monitor.update(row):
                    log.warning("step %d: %s", step, alarm.message)
                    rows.write(alarm.row())
                if step % training.logging_steps == 0 or watched or last:
                    rows.write(row)
                    accelerator.log({k: v for k, v in row.items() if k != "step"}, step=step)
            bar.advance()
            bar.note(progress_note(row))
            if accelerator.is_main_process:
                if last or (training.checkpointing_steps and step % training.checkpointing_steps == 0):
                    last_checkpoint = save_checkpoint()
                if not last and training.sample_steps and step % training.sample_steps == 0:
                    with swapped(ema, params):
                        job.sample(step, adapters=True)
            accelerator.wait_for_everyone()
    train_seconds = seconds_before + time.perf_counter() - started

    # -- Interrupted: leave a checkpoint and go ------------------------------------------------------------------
    if step < training.max_train_steps and not enough:
        if accelerator.is_main_process and not checkpoint.folder_for(run_dir, step).exists():
            last_checkpoint = save_checkpoint()
        log.warning("stopped at step %d; go on with training.resume_from_checkpoint=latest", step)
        end(accelerator)
        return TrainResult(run_dir, step, None, stop.signal or signal.SIGTERM)

    if step < training.max_train_steps:
        log.info(
            "training ends at step %d: %s has not got better for %d looks",
            step,
            config.evaluation.keep_best,
            config.evaluation.patience,
        )

    # -- Outputs: adapter files, evaluation, report, model card -------------------------------------------------
    result = None
    if accelerator.is_main_process:
        with swapped(ema, params):
            result = job.finish(
                step,
                {
                    "steps": step,
                    job.unit: job.count,
                    "effective_batch": effective,
                    "seconds_per_step": busy / max(1, step - first_step),
                    "train_seconds": train_seconds,
                    "lora_parameters": count,
                },
            )
    end(accelerator)
    return TrainResult(run_dir, step, result)


def progress_note(row: dict[str, float]) -> str:
    """The few numbers beside the progress bar."""
    shown = {"acc": "implicit_acc", "right": "judge/accuracy", "reward": "reward", "grad": "grad_norm"}
    found = [f"{label} {row[name]:.2f}" for label, name in shown.items() if name in row]
    return " ".join([f"loss {row['loss']:.4f}", *found[:2]])


def end(accelerator: Accelerator) -> None:
    """Wait for the other processes and close the trackers."""
    accelerator.wait_for_everyone()
    accelerator.end_training()


def make_optimizer(
    params: list[nn.Parameter] | list[dict[str, Any]], training: TrainingConfig
) -> torch.optim.Optimizer:
    """The configured optimiser over the adapter's parameters, or over groups of them."""
    betas = (training.adam_beta1, training.adam_beta2)
    common: dict[str, Any] = {"lr": training.learning_rate, "weight_decay": training.adam_weight_decay}
    if training.optimizer in ("adamw", "adamw_fused"):
        fused = True if training.optimizer == "adamw_fused" else None
        return torch.optim.AdamW(params, betas=betas, eps=training.adam_epsilon, fused=fused, **common)
    if training.optimizer == "adamw8bit":
        try:
            import bitsandbytes
        except ImportError as error:
            raise MissingExtraError("bitsandbytes", "bitsandbytes", "training.optimizer=adamw8bit") from error
        return bitsandbytes.optim.AdamW8bit(  # type: ignore[no-any-return]
            params, betas=betas, eps=training.adam_epsilon, **common
        )
    from transformers import Adafactor

    # The settings of the published SDXL runs: external learning rate, no parameter scaling.
    return Adafactor(params, scale_parameter=False, relative_step=False, warmup_init=False, **common)


def average_gradients(accelerator: Accelerator, params: list[nn.Parameter]) -> None:
    """Average gradients over processes, where no wrapper has done it; does nothing on one."""
    if accelerator.num_processes == 1:
        return
    for param in params:
        if param.grad is not None:
            param.grad = accelerator.reduce(param.grad, reduction="mean")


def average_over(accelerator: Accelerator, params: list[nn.Parameter], counted: int, expected: int) -> None:
    """Make gradients those of the mean over all items of the step, where they were taken for `expected` of them.

    An objective may leave samples out, a different number in every micro-batch and process.

    Args:
        accelerator: sums over processes.
        params: of the adapter.
        counted: items of this process.
        expected: samples of a step, over all processes.
    """
    total = float(counted)
    if accelerator.num_processes > 1:
        total = float(accelerator.reduce(torch.tensor([total], device=accelerator.device), reduction="sum").item())
    if total not in (0.0, float(expected)):
        for param in params:
            if param.grad is not None:
                param.grad.mul_(expected / total)


def add_penalties(
    accelerator: Accelerator, params: list[nn.Parameter], penalties: Mapping[str, Tensor]
) -> dict[str, float]:
    """Add the gradient of terms beside the loss to that of the step, whatever its micro-batches and processes are.

    Args:
        accelerator: averages over processes, whose rounding may differ.
        params: of the adapter, with the gradient of the whole step.
        penalties: scalars with gradient, the same on every process.

    Returns:
        Their values.
    """
    if not penalties:
        return {}
    total = torch.stack(list(penalties.values())).sum()
    if accelerator.scaler is not None:  # the other gradients are still scaled
        total = accelerator.scaler.scale(total)
    for param, found in zip(params, torch.autograd.grad(total, params, allow_unused=True), strict=True):
        if found is None:
            continue
        added = accelerator.reduce(found, reduction="mean") if accelerator.num_processes > 1 else found
        param.grad = added if param.grad is None else param.grad + added
    return {name: float(value.detach()) for name, value in penalties.items()}


def clip(accelerator: Accelerator, params: list[nn.Parameter], max_norm: float) -> float:
    """Clip to the global norm and return it as it was; a non-positive `max_norm` only measures."""
    if max_norm > 0:
        return float(accelerator.clip_grad_norm_(params, max_norm))
    accelerator.unscale_gradients()
    return float(torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]))


class swapped:  # noqa: N801 (used like a function)
    """Inside, the parameters are the EMA's averages (if there is one)."""

    def __init__(self, ema: EMAModel | None, params: list[nn.Parameter]) -> None:
        self.ema, self.params = ema, params

    def __enter__(self) -> None:
        if self.ema is not None:
            self.ema.store(self.params)
            self.ema.copy_to(self.params)

    def __exit__(self, *error: object) -> None:
        if self.ema is not None:
            self.ema.restore(self.params)


def stop_requested(stop: StopRequest, accelerator: Accelerator) -> bool:
    """True on every process as soon as one was asked to stop."""
    return agreed(stop.signal is not None, accelerator)


def agreed(flag: bool, accelerator: Accelerator) -> bool:
    """True on every process where it is on one."""
    if accelerator.num_processes == 1:
        return flag
    count = torch.tensor([float(flag)], device=accelerator.device)
    return bool(accelerator.reduce(count, reduction="sum").item() > 0)
