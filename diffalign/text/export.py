"""Language-model adapters as standard peft folders: `adapter_config.json` and `adapter_model.safetensors`.

Such a folder is what `PeftModel.from_pretrained`, transformers' `load_adapter`, vLLM and the hub read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import diffalign
from diffalign import adapters
from diffalign.config import LoraConfig
from diffalign.errors import CheckpointError
from diffalign.files import atomic_write_text

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # how a PeftModel names its inner network's layers
_PLAIN = {"bias": "none", "modules_to_save": None, "lora_bias": False, "target_parameters": None}


def save_peft(
    network: nn.Module,
    lora: LoraConfig | None,
    folder: Path,
    base_name: str,
    metadata: Mapping[str, str] | None = None,
    *,
    name: str = "default",
    state: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write an adapter as a peft folder.

    Args:
        network: the language model that carries it.
        lora: what it was attached with, compared with the network; None skips that.
        folder: made if missing. Each file appears whole or not at all, the weights first.
        base_name: hub id or folder of the base, which `AutoPeftModelForCausalLM` loads.
        metadata: facts of the run as texts, written into the weights' header as `diffalign.<key>`.
        name: adapter name.
        state: tensors to write instead of the adapter's own, such as its moving average (`adapters.state_dict` keys).
        dtype: of the file.

    Returns:
        The folder.

    Raises:
        ConfigError: no such adapter.
        CheckpointError: `state` does not fit, or the folder cannot be written.
        ValueError: a metadata value that is no text, or `lora` is not what is attached.
    """
    facts = {"version": diffalign.__version__} | dict(metadata or {})
    for key, value in facts.items():
        if not isinstance(value, str):
            raise ValueError(f"metadata {key!r}: got {value!r}; safetensors metadata values are texts")
    own = adapters.state_dict(network, name)
    if state is not None:
        adapters.check_state(own, state, "the state to export")
    settings = _settings(network, name, base_name)
    if lora is not None:
        _check_same(lora, settings)
    kept = own if state is None else state
    tensors = {f"{_PREFIX}{key}": kept[key].detach().to("cpu", dtype).contiguous() for key in own}
    header = {"format": "pt"} | {f"diffalign.{key}": value for key, value in facts.items()}
    temporary = folder / f".tmp-{WEIGHTS_NAME}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=header)
        os.replace(temporary, folder / WEIGHTS_NAME)
        atomic_write_text(folder / CONFIG_NAME, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error.strerror}); free space or choose another folder"
        ) from error
    return folder


def _settings(network: nn.Module, name: str, base_name: str) -> dict[str, Any]:
    """peft's own description, with what a reader needs: names instead of our full paths, and inference mode."""
    attached: Any = network.peft_config
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        base_model_name_or_path=base_name,
        inference_mode=True,
        **{
            key: getattr(attached[name], key)
            for key in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
        },
        target_modules=_short_names(network, name),
        fan_in_fan_out=_stored_transposed(network, name),
    )
    described = config.to_dict()
    # peft keeps a set; sorted, the same adapter is the same file
    return described | {"target_modules": sorted(described["target_modules"])}


def _short_names(network: nn.Module, name: str) -> list[str]:
    """Last parts of the adapted layers' names where they mean exactly those layers (vLLM wants that), else full paths."""
    adapted = set(adapters.lora_layers(network, name))
    short = {path.rpartition(".")[2] for path in adapted}
    meant = {path for path in adapters.base_layers(network) if path.rpartition(".")[2] in short}
    numbered = any(part.isdigit() for part in short)
    return sorted(short if meant == adapted and not numbered else adapted)


def _stored_transposed(network: nn.Module, name: str) -> bool:
    layers = adapters.lora_layers(network, name)
    return all(isinstance(layer.get_base_layer(), adapters.Conv1D) for layer in layers.values())


def _check_same(lora: LoraConfig, settings: Mapping[str, Any]) -> None:
    meant = (lora.rank, lora.rank if lora.alpha is None else lora.alpha, lora.use_rslora, lora.use_dora)
    attached = tuple(settings[key] for key in ("r", "lora_alpha", "use_rslora", "use_dora"))
    if meant != attached:
        raise ValueError(f"rank, alpha, use_rslora, use_dora: the config says {meant}, attached is {attached}")


def load_peft(network: nn.Module, folder: Path, name: str = "default") -> None:
    """Attach the adapter of a peft folder, ours or another program's.

    Args:
        network: the language model it was trained on; it is frozen, and the adapter becomes the only active one.
        folder: with both files.
        name: of the adapter here.

    Raises:
        CheckpointError: files missing or unreadable, no LoRA or more than LoRA, or layers that this network lacks.
        ConfigError: the name is taken.
    """
    config, tensors = _read(folder)
    bases = adapters.base_layers(network)
    ranks: dict[str, int] = {}
    for key, tensor in tensors.items():
        path, _, end = key.partition(".lora_")
        if end == "A.weight":
            ranks[path] = tensor.shape[0]
        if path not in bases or path == adapters.head_path(network):
            raise CheckpointError(
                f"{folder}: {path!r} is no layer of this network that can carry an adapter; use the base it was trained "
                f"on ({config.get('base_model_name_or_path')!r})"
            )
    alphas = {path: _alpha(config, path) for path in ranks}
    adapters.attach_modules(
        network, ranks, alphas, use_rslora=config["use_rslora"], use_dora=config["use_dora"], name=name
    )
    adapters.load_state_dict(network, tensors, name)


def _alpha(config: Mapping[str, Any], path: str) -> float:
    """As peft finds it: patterns are regular expressions for the end of a path."""
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    return float(patterns.get(get_pattern_key(list(patterns), path), config["lora_alpha"]))


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_NAME)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is no readable peft adapter ({type(error).__name__}); expected {CONFIG_NAME} and {WEIGHTS_NAME}"
        ) from error
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder}: a {config.get('peft_type')} adapter; expected LORA")
    for key, plain in _PLAIN.items():
        if config.get(key) not in (plain, None, []):
            raise CheckpointError(f"{folder}: {key} is {config[key]!r}; only plain LoRA can be loaded ({plain!r})")
    config.setdefault("use_rslora", False)
    config.setdefault("use_dora", False)
    foreign = next((key for key in tensors if not key.startswith(_PREFIX) or ".lora_" not in key), None)
    if foreign is not None or not tensors:
        raise CheckpointError(f"{folder}: {foreign or 'nothing'} in {WEIGHTS_NAME}; expected {_PREFIX}<layer>.lora_...")
    return config, {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}
