"""Checkpoints: atomic folders with a manifest, retention, and the check that a run is continued with its own settings.

`checkpoint-<step>/` holds `adapter.safetensors` (float32 weights, peft names), `state.pt` (optimiser, schedule, EMA,
loss scaler) and `manifest.json` (hashes of both, the step, the resolved config, versions). The folder appears by one
rename.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign import __version__
from diffalign.config import RunConfig
from diffalign.config_loading import to_tree
from diffalign.errors import CheckpointError
from diffalign.files import atomic_write_text, free_bytes, sha256

log = logging.getLogger(__name__)
# What may change between a run and its continuation.
FREE_SECTIONS = ("output_dir", "sampling", "cache")
FREE_TRAINING = (
    "max_train_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "logging_steps",
    "sample_steps",
    "dataloader_workers",
    "threads",
    "cpu",
    "report_to",
    "compile",
    "attention",
    "gradient_checkpointing",
)
# Compared as their product with the number of processes (`check_identity`), so that a run can move to other hardware.
FREE_BATCH = ("train_batch_size", "gradient_accumulation_steps")
FREE_EVALUATION = ("at_end", "prompts", "num_prompts", "images_per_prompt", "rewards", "seed", "grid_prompts")
FREE_ROLLOUT = ("offload_rewards",)
FREE_NEGATIVE = ("beta", "prompt_share")  # of sampling
FREE_DATA = ("sources", "keep_downloads", "max_disk_gb", "max_unusable")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    path: Path
    step: int
    adapter: dict[str, Tensor]
    state: dict[str, Any]
    manifest: dict[str, Any]


def folder_for(run_dir: Path, step: int) -> Path:
    return run_dir / f"checkpoint-{step:06d}"


def steps_of(run_dir: Path) -> dict[int, Path]:
    """Checkpoint folders by step, ascending."""
    found = {}
    for path in run_dir.glob("checkpoint-*"):
        suffix = path.name.removeprefix("checkpoint-")
        if path.is_dir() and suffix.isdigit():
            found[int(suffix)] = path
    return dict(sorted(found.items()))


def save(
    run_dir: Path,
    step: int,
    adapter: dict[str, Tensor],
    state: dict[str, Any],
    config: RunConfig,
    extra: dict[str, Any],
    *,
    keep: int | None = None,
) -> Path:
    """Write a checkpoint so that it is there whole or not at all, then remove the oldest beyond `keep`.

    Args:
        run_dir: the run's folder.
        step: optimiser steps done.
        adapter: float32 adapter weights.
        state: anything `torch.load(weights_only=True)` can read back.
        config: the resolved config.
        extra: goes into the manifest (objective summary, data fingerprint, samples seen).
        keep: how many checkpoints stay.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    final = folder_for(run_dir, step)
    for leftover in run_dir.glob(".tmp-checkpoint-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = run_dir / f".tmp-checkpoint-{os.getpid()}"
    size = 4 * sum(value.numel() for value in adapter.values()) * 4
    if free_bytes(run_dir) < size + (16 << 20):
        raise CheckpointError(
            f"no space for a checkpoint of about {size / 1e6:.0f} MB in {run_dir}; the last one is intact. Free some, "
            "or lower training.checkpoints_total_limit"
        )
    try:
        temporary.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in adapter.items()}, temporary / "adapter.safetensors")
        torch.save(state, temporary / "state.pt")
        files = {name: sha256(temporary / name) for name in ("adapter.safetensors", "state.pt")}
        manifest = {
            "step": step,
            "files": files,
            "config": to_tree(config),
            "versions": {"diffalign": __version__, "torch": torch.__version__, "python": platform.python_version()},
            **extra,
        }
        atomic_write_text(temporary / "manifest.json", json.dumps(manifest, indent=1))
        for name in files:
            _sync(temporary / name)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _sync(run_dir)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is each of these, by who writes
        shutil.rmtree(temporary, ignore_errors=True)
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"checkpoint {final} could not be written ({why}); earlier ones are intact: free some space and resume"
        ) from error
    if keep is not None:
        for path in list(steps_of(run_dir).values())[: -max(keep, 1)]:
            if path != final:  # a run that went on from an earlier step keeps what it has just written
                shutil.rmtree(path)
    return final


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(path: Path) -> dict[str, Any]:
    """The manifest of an intact checkpoint.

    Raises:
        CheckpointError: something is missing or its hash differs.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
        for name, digest in manifest["files"].items():
            if sha256(path / name) != digest:
                raise CheckpointError(f"checkpoint {path}: {name} is damaged; use an earlier checkpoint")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no intact checkpoint ({type(error).__name__}: {error}); expected manifest.json, "
            "adapter.safetensors and state.pt"
        ) from error
    return manifest


def find(run_dir: Path, wanted: str | None) -> Path | None:
    """The checkpoint to resume from: None to start afresh.

    Raises:
        CheckpointError: the folder was used and nothing says what to do with it, no checkpoint is intact, or the named
            one is not there.
    """
    existing = steps_of(run_dir)
    if wanted is None:
        if existing:
            raise CheckpointError(
                f"output_dir {run_dir} already holds checkpoints up to step {max(existing)}; set "
                "training.resume_from_checkpoint=latest to go on, or choose another output_dir"
            )
        return None
    if wanted == "latest":
        for path in reversed(existing.values()):
            try:
                verify(path)
                return path
            except CheckpointError as error:
                log.warning("%s; trying the one before", error)
        if existing:
            raise CheckpointError(
                f"none of the {len(existing)} checkpoints in {run_dir} is intact; delete them to start afresh, or "
                "choose another output_dir"
            )
        return None
    path = Path(wanted) if Path(wanted).is_dir() else run_dir / wanted
    if not path.is_dir():
        raise CheckpointError(
            f"training.resume_from_checkpoint {wanted!r} is no folder; expected 'latest' or one of: "
            f"{', '.join(p.name for p in existing.values()) or 'none there'}"
        )
    return path


def load(path: Path, config: RunConfig) -> Checkpoint:
    """Read a checkpoint that was made with the same settings.

    Raises:
        CheckpointError: damaged, or made with other settings.
    """
    manifest = verify(path)
    differences = list(_differences(_with_new_keys(manifest["config"], config), to_tree(config)))
    if differences:
        raise CheckpointError(
            f"checkpoint {path} belongs to another config: {'; '.join(differences[:3])}"
            f"{' ...' if len(differences) > 3 else ''}. Use its settings, or start in another output_dir"
        )
    state = torch.load(path / "state.pt", weights_only=True, map_location="cpu")
    return Checkpoint(path, manifest["step"], load_file(path / "adapter.safetensors"), state, manifest)


_IDENTITY = {
    "effective_batch": "set gradient_accumulation_steps so that batch x accumulation x processes is the same",
    "micro_batch": "with several image sizes the micro-batch must stay the same",
}


def check_identity(found: Checkpoint, identity: dict[str, Any]) -> None:
    """Refuse to go on with another effective batch or on other samples: the data position would mean something else.

    Args:
        found: the checkpoint.
        identity: `effective_batch` (samples per optimiser step over all processes), and what the job adds: of images
            `micro_batch` (where sizes differ), number of training `pairs` and a hash of their `prompts`; of texts number
            of `samples` and a hash of their `ids`.

    Raises:
        CheckpointError: naming what differs.
    """
    before = found.manifest["identity"]
    for key, now in identity.items():
        if before.get(key) != now:
            why = _IDENTITY.get(key, f"the training {'pairs' if 'pairs' in identity else 'samples'} must be the same")
            raise CheckpointError(
                f"checkpoint {found.path}: {key.replace('_', ' ')} was {before.get(key)!r}, is {now!r}; {why}, "
                "or start in another output_dir"
            )


def _with_new_keys(old: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """A stored config with the defaults of sections and keys that did not exist yet when it was stored."""
    found, tree = dict(old), to_tree(config)
    for section in fields(config):
        stored = old.get(section.name, {})
        now = getattr(config, section.name)
        if not is_dataclass(now) or not isinstance(stored, dict):
            continue
        if section.name != "objective" or stored.get("name") == tree["objective"]["name"]:
            known = {f.name: to_tree(f.default) for f in fields(now) if f.default is not MISSING}
            found[section.name] = json.loads(json.dumps(known)) | stored
    return found


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    found = []
    for section in new.keys() | old.keys():
        if section in FREE_SECTIONS:
            continue
        before, after = old.get(section), json.loads(json.dumps(new.get(section)))
        if not (isinstance(before, dict) and isinstance(after, dict)):
            if before != after:
                found.append(f"{section} was {before!r}, is {after!r}")
            continue
        free = {
            "training": FREE_TRAINING + FREE_BATCH,
            "data": FREE_DATA,
            "evaluation": FREE_EVALUATION,
            "rollout": FREE_ROLLOUT,
            "negative": FREE_NEGATIVE,
        }.get(section, ())
        found += [
            f"{section}.{key} was {before.get(key)!r}, is {after.get(key)!r}"
            for key in sorted(before.keys() | after.keys())
            if key not in free and before.get(key) != after.get(key)
        ]
    return sorted(found)
