"""Files of changed weights (SaRA, LIFT, HFT): our own, with places and values, and full differences for ComfyUI.

`delta_weights.safetensors` holds `<layer>.delta_weight` (values), `<layer>.index_weight` (int32 places in row-major order;
none where the change is dense), the same with `bias`, and `base.sha256` and `base.norms` of the parameters that are changed.
The places are those that were trained; nothing is chosen again when it is loaded.

`delta_weights_comfyui.safetensors` holds the whole difference of every changed layer, `<layer>.diff` and `<layer>.diff_b`
under kohya's names: the exact change, and as large as the layers. ComfyUI's comfy/lora.py has these keys ("diff" patches);
that was read, not run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import diffalign
from diffalign import adapters, export, sparse
from diffalign.delta_layers import delta_layers, values_of
from diffalign.errors import CheckpointError, ConfigError
from diffalign.lora_format import halves_swapped, kohya_layers, modelspec_metadata

log = logging.getLogger(__name__)

FILE_NAME = "delta_weights.safetensors"
COMFY_NAME = "delta_weights_comfyui.safetensors"
HEADER = "diffalign.delta"  # metadata key of the JSON text that such a file has, and no other
VERSION = 1


def save_delta(
    network: nn.Module,
    out_dir: Path,
    *,
    facts: Mapping[str, str],
    name: str = adapters.DEFAULT,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a change as `delta_weights.safetensors`.

    Args:
        network: that carries it.
        out_dir: folder, made if missing.
        facts: of the run, as texts; written as `diffalign.<key>`.
        name: of the change.
        dtype: of the values, float32 or float16.

    Raises:
        ConfigError: no such change.
        CheckpointError: a number is too large for `dtype`, or the file cannot be written.
    """
    if not delta_layers(network, name):
        raise ConfigError(
            f"no changed weights {name!r}; attached: {', '.join(adapters.adapter_names(network)) or 'none'}"
        )
    values = values_of(network, name).keys()
    state = adapters.state_dict(network, name)
    tensors = {key: export.cast(key, tensor, dtype) if key in values else tensor for key, tensor in state.items()}
    record = sparse.record_of(network, name)
    header = json.dumps({"version": VERSION, "method": record.method, "base_dtype": record.dtype}, sort_keys=True)
    file = Path(out_dir) / FILE_NAME
    metadata = {f"diffalign.{key}": value for key, value in facts.items()}
    own = {HEADER: header}  # wins over that of the file the change came from
    export.write_file(file, tensors, {"format": "pt"} | metadata | own)
    (file.parent / COMFY_NAME).unlink(missing_ok=True)  # that of an earlier one into the same folder is another change
    export.remove_others(file.parent, "delta")
    return file


def save_differences(
    network: nn.Module,
    out_dir: Path,
    *,
    family: str,
    facts: Mapping[str, str],
    name: str = adapters.DEFAULT,
    dtype: torch.dtype = torch.float32,
) -> Path | None:
    """Write a change as full differences under kohya's names, for ComfyUI.

    Args:
        network: that carries it.
        out_dir: folder, made if missing.
        family: its name; see `lora_format.FORMATS`.
        facts: as of `save_delta`.
        name: of the change.
        dtype: of the differences.

    Returns:
        The file; None, with a warning, where the family has no such names or not for all changed layers.

    Raises:
        CheckpointError: a number is too large for `dtype`, or the file cannot be written.
    """
    layers, groups = delta_layers(network, name), kohya_layers(network, family)
    named = {path for paths in groups.values() for path in paths}
    file = Path(out_dir) / COMFY_NAME
    file.unlink(missing_ok=True)  # that of an earlier export into the same folder is another change
    if nameless := next((path for path in layers if path not in named), None):
        log.warning("no file for ComfyUI is written: layer %r has no name in kohya's %s files", nameless, family)
        return None
    bases = adapters.base_layers(network)
    tensors: dict[str, Tensor] = {}
    for their_name, paths in groups.items():
        for kind, suffix in (("weight", "diff"), ("bias", "diff_b")):
            found = [layers[path].change({name: 1.0}, kind) if path in layers else None for path in paths]  # type: ignore[arg-type]
            if all(change is None for change in found):
                continue
            whole = [
                torch.zeros_like(getattr(bases[path], kind), dtype=torch.float32) if change is None else change
                for path, change in zip(paths, found, strict=True)
            ]
            difference = torch.cat([change.detach() for change in whole])
            if halves_swapped(network, family, paths[0]):
                difference = torch.cat(difference.chunk(2)[::-1])
            tensors[f"{their_name}.{suffix}"] = export.cast(their_name, difference, dtype)
    metadata = {key: value for fact, value in facts.items() if (key := f"diffalign.{fact}") != HEADER}
    export.write_file(
        file, tensors, {"format": "pt"} | modelspec_metadata(network, family, dict(facts), tensors) | metadata
    )
    return file


def load_delta(
    network: nn.Module, path: Path, *, name: str = adapters.DEFAULT, trainable: bool = False
) -> export.LoraInfo:
    """Attach the change of a file to the base that it was trained on.

    Args:
        network: the base, or one with other adapters; it is frozen.
        path: file or run folder.
        name: what the change is called here; it becomes the only active adapter.
        trainable: leave its values trainable.

    Raises:
        CheckpointError: no such file, another network or base, or damaged; the network is untouched then.
        ConfigError: the name is taken.
    """
    file = export.find_file(path)
    tensors, metadata = export.read_file(file, tensors=True)
    header = read_header(file, metadata)
    state = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    values = sparse.attach_state(
        network, state, header["method"], name, what=str(file), dtype=header.get("base_dtype", "")
    )
    for parameter in values:
        parameter.requires_grad_(trainable)
    return export.LoraInfo(
        path=file,
        style="delta",
        name=name,
        modules=len(delta_layers(network, name)),
        rank=0,
        alpha=0.0,
        role=metadata.get("diffalign.role", "positive"),
        metadata=metadata,
    )


def read_header(file: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """What a file says about its change.

    Raises:
        CheckpointError: it is none of ours, of a later version, or damaged.
    """
    try:
        header = json.loads(metadata[HEADER])
        known = header["version"] == VERSION and header["method"] in ("sara", "lift", "hft")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: {HEADER} in its metadata is not readable; it holds no changed weights"
        ) from error
    if not known:
        raise CheckpointError(
            f"{file}: {HEADER} of version {header['version']!r} and method {header['method']!r}, expected version "
            f"{VERSION}; use the diffalign that wrote it (this is {diffalign.__version__})"
        )
    return header  # type: ignore[no-any-return]
