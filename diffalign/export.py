"""LoRA files that load elsewhere: diffusers/peft names, and for most families kohya names for ComfyUI and others.

Both files hold the same update, `W += alpha / r * B A`. Where alpha lives differs, and losing it is the classic silent
mistake: diffusers reads it from a JSON text in the metadata (without it, alpha = rank is assumed), kohya from an
`.alpha` tensor beside each pair. rsLoRA's scale alpha / sqrt(r) has no kohya form: alpha * sqrt(r) is written there.

DoRA magnitudes are written as `.dora_scale`, one per output. Check the result in the program you use: diffusers drops
these tensors from kohya files, and ComfyUI has normalised over inputs in some versions. The diffusers file is exact.

Names and metadata: `diffalign/lora_format.py`, which also says which layouts other programs know.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import diffalign
from diffalign import adapters
from diffalign.config import LoraConfig
from diffalign.delta_layers import delta_layers
from diffalign.errors import CheckpointError
from diffalign.lora_format import (
    TEXT_MODEL,
    format_of,
    halves_swapped,
    kohya_layers,
    kohya_metadata,
    modelspec_metadata,
    text_kohya_names,
    text_part,
)
from diffalign.text_encoders import TextConditioned, network_lora, text_lora

logger = logging.getLogger(__name__)

FILE_NAME = "pytorch_lora_weights.safetensors"
KOHYA_NAME = "pytorch_lora_weights_kohya.safetensors"
KINDS = {  # the files of an adapter by its kind; those of the others are named here as this module is imported there
    "lora": (FILE_NAME, KOHYA_NAME),
    "delta": ("delta_weights.safetensors", "delta_weights_comfyui.safetensors"),
    "gated": ("gated_lora_weights.safetensors",),
}
_ADAPTER_KEY = "lora_adapter_metadata"  # diffusers' name for the JSON text that holds alpha

_PEFT_ALPHA = 8  # what peft takes where settings leave alpha out

# What a key of an adapter file ends with -> which tensor it is. Kohya, peft, and diffusers' older spelling.
_SUFFIXES = {
    ".lora_down.weight": "a",
    ".lora_up.weight": "b",
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora.down.weight": "a",
    ".lora.up.weight": "b",
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
    ".lora_magnitude_vector": "magnitude",
}


@dataclass(frozen=True, kw_only=True)
class LoraInfo:
    """What an adapter file held.

    Attributes:
        path: the file.
        style: "diffusers", "kohya", "gated" (several experts), or "delta" (changed weights, without rank and alpha: 0).
        name: the adapter's name in the network.
        modules: number of adapted layers.
        rank: the most frequent rank.
        alpha: the most frequent alpha.
        role: "positive", "negative" or "user" of our own files; other files count as "positive".
        metadata: the file's metadata.
    """

    path: Path
    style: str
    name: str
    modules: int
    rank: int
    alpha: float
    role: str
    metadata: dict[str, str]


# Writing


def save_lora(
    network: nn.Module,
    lora: LoraConfig | None,
    out_dir: Path,
    *,
    family: str,
    name: str = "default",
    state: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Path]:
    """Write an adapter as `pytorch_lora_weights.safetensors` and, where a family has it, `..._kohya.safetensors`.

    The second file is left out, with a warning, if the adapter has layers or magnitudes that it has no name for.

    Args:
        network: the network that carries it, or a `TextConditioned`; its ranks, alphas and options are what is written.
        lora: what it was attached with, compared with the network; None skips that.
        out_dir: folder, made if missing. Files appear whole or not at all.
        family: its name; see `lora_format.FORMATS`.
        name: adapter name.
        state: tensors to write instead of the adapter's own, such as its moving average (`adapters.state_dict` keys).
        metadata: facts of the run as texts: role ("positive", "negative", "user"), objective, beta, base, resolution
            ("1024"), prediction_type ("epsilon" or "v_prediction"), title, steps, seed, ... Each is written as
            `diffalign.<key>`, and under kohya's and ModelSpec's names where those have one.
        dtype: float32, or float16 for distribution.

    Returns:
        The files by style, "diffusers" and perhaps "kohya".

    Raises:
        ConfigError: no such adapter.
        CheckpointError: `state` does not fit, a number is too large for `dtype`, or the files cannot be written.
        ValueError: a metadata value that is no text, or `lora` is not what is attached.
    """
    facts = {"role": "positive", "family": family, "version": diffalign.__version__} | dict(metadata or {})
    for key, value in facts.items():
        if not isinstance(value, str):
            raise ValueError(f"metadata {key!r}: got {value!r}; safetensors metadata values are texts")
    if adapters.gates_of(network, name) is not None:
        from diffalign.gates import save_gated

        return {"gated": save_gated(network, Path(out_dir), facts=facts, dtype=dtype)}
    if delta_layers(network, name):
        from diffalign.delta_files import save_delta, save_differences

        found = {"delta": save_delta(network, Path(out_dir), facts=facts, name=name, dtype=dtype)}
        comfy = save_differences(network, Path(out_dir), family=family, facts=facts, name=name, dtype=dtype)
        return found if comfy is None else found | {"comfyui": comfy}
    own = adapters.state_dict(network, name)
    if state is not None:
        adapters.check_state(own, state, "the state to export")
    whole = network.__dict__.get(adapters.WHOLE, ())  # trained beside the LoRA, and written by whoever trains it
    tensors = {key: cast(key, (own if state is None else state)[key], dtype) for key in own if key not in whole}
    parts = _parts(network, name, tensors, family)
    if lora is not None:
        for part in parts:
            _check_same(network_lora(lora) if part.is_network else text_lora(lora), part.settings)
    kohya = _all_to_kohya(parts, name, family)
    settings = parts[0].settings
    network = network.network if isinstance(network, TextConditioned) else network

    plain = {f"{part.prefix}.{part.file_path(key)}": value for part in parts for key, value in part.tensors.items()}
    ours = {f"diffalign.{key}": value for key, value in facts.items()}
    header = json.dumps(
        {f"{part.prefix}.{key}": value for part in parts for key, value in part.settings.items()}, sort_keys=True
    )
    diffusers_file, kohya_file = Path(out_dir) / FILE_NAME, Path(out_dir) / KOHYA_NAME
    spec = modelspec_metadata(network, family, facts, plain)
    write_file(diffusers_file, plain, {"format": "pt", _ADAPTER_KEY: header} | spec | ours)
    remove_others(diffusers_file.parent, "lora")
    if kohya is None:
        kohya_file.unlink(missing_ok=True)  # that of an earlier export into the same folder is another adapter
        return {"diffusers": diffusers_file}
    # no _ADAPTER_KEY here: diffusers refuses a file that says alpha twice
    spec = modelspec_metadata(network, family, facts, kohya)
    write_file(
        kohya_file, kohya, {"format": "pt"} | kohya_metadata(network, family, facts, settings, kohya) | spec | ours
    )
    return {"diffusers": diffusers_file, "kohya": kohya_file}


@dataclass(frozen=True, kw_only=True)
class _Part:
    """An adapted module of a file: the network, or a text encoder.

    Attributes:
        prefix: of its keys.
        module: with the adapter.
        is_network: False for a text encoder.
        tensors: the adapter's, by peft's keys.
        settings: peft's arguments, as the file has them.
    """

    prefix: str
    module: nn.Module
    is_network: bool
    tensors: dict[str, Tensor]
    settings: dict[str, Any]

    def file_path(self, key: str) -> str:
        """A layer's path, or what begins with one, as files have it."""
        return key if self.is_network else f"{TEXT_MODEL}{key.removeprefix(TEXT_MODEL)}"


def _parts(network: nn.Module, name: str, tensors: Mapping[str, Tensor], family: str) -> list[_Part]:
    """The adapted modules, the network first; `tensors` have the keys of `adapters.state_dict`."""
    if not isinstance(network, TextConditioned):
        prefix, settings = format_of(network, family).prefix, _settings(network, name)
        return [_Part(prefix=prefix, module=network, is_network=True, tensors=dict(tensors), settings=settings)]
    found = []
    for part, module in network.parts.items():
        own = {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
        if not own:
            continue
        settings, is_network = _settings(module, name), part == network.part
        if not is_network:  # peft takes endings of paths: these fit with and without `text_model`
            settings["target_modules"] = [path.removeprefix(TEXT_MODEL) for path in settings["target_modules"]]
        prefix = format_of(module, family).prefix if is_network else part
        found.append(_Part(prefix=prefix, module=module, is_network=is_network, tensors=own, settings=settings))
    return found


def _all_to_kohya(parts: Sequence[_Part], name: str, family: str) -> dict[str, Tensor] | None:
    """The parts' tensors under kohya's names; None where one of them has none."""
    found: dict[str, Tensor] = {}
    for part in parts:
        if part.is_network:
            tensors = _to_kohya(part.module, name, part.tensors, family)
        else:
            tensors = _text_to_kohya(part, name, family)
        if tensors is None:
            return None
        found |= tensors
    return found


def _text_to_kohya(part: _Part, name: str, family: str) -> dict[str, Tensor] | None:
    """A text encoder's tensors under kohya's names, with each layer's alpha; None: no such naming."""
    names = text_kohya_names(part.module, family, part.prefix)
    found: dict[str, Tensor] = {}
    for path, layer in adapters.lora_layers(part.module, name).items():
        if path not in names:
            return None
        found[f"{names[path]}.lora_down.weight"] = part.tensors[f"{path}.lora_A.weight"]
        found[f"{names[path]}.lora_up.weight"] = part.tensors[f"{path}.lora_B.weight"]
        found[f"{names[path]}.alpha"] = torch.tensor(adapters.scale(layer, name) * layer.r[name], dtype=torch.float32)
    return found


def _settings(network: nn.Module, name: str) -> dict[str, Any]:
    """peft's arguments of an attached adapter: only what shapes and scales it, which every version of peft accepts."""
    configs: Any = network.peft_config
    config = configs[name]
    targets = config.target_modules
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
    }


def _check_same(lora: LoraConfig, settings: Mapping[str, Any]) -> None:
    meant = (lora.rank, lora.rank if lora.alpha is None else lora.alpha, lora.use_rslora, lora.use_dora)
    attached = tuple(settings[key] for key in ("r", "lora_alpha", "use_rslora", "use_dora"))
    if meant != attached:
        raise ValueError(f"rank, alpha, use_rslora, use_dora: the config says {meant}, attached is {attached}")


def cast(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as it is written.

    Raises:
        CheckpointError: it is not finite in that type.
    """
    result = tensor.detach().to("cpu", dtype).contiguous()
    if not torch.isfinite(result).all():
        raise CheckpointError(
            f"{key}: not finite as {str(dtype).removeprefix('torch.')} (largest magnitude {tensor.abs().max():.3g}); "
            "export as float32, or from an earlier checkpoint"
        )
    return result


def _to_kohya(network: nn.Module, name: str, tensors: Mapping[str, Tensor], family: str) -> dict[str, Tensor] | None:
    """peft-named tensors -> kohya names, with each layer's true alpha as a float32 scalar; None: no such file."""
    groups, layers = kohya_layers(network, family), adapters.lora_layers(network, name)
    if not groups:
        return None
    dora = any(layer.use_dora[name] for layer in layers.values())
    named = {path for paths in groups.values() for path in paths}
    if nameless := next((path for path in layers if path not in named), None):
        logger.warning("no kohya file is written: layer %r has no name in kohya's %s files", nameless, family)
        return None
    if dora and any(len(paths) > 1 for paths in groups.values()):
        logger.warning("no kohya file is written: DoRA cannot be said of %s's joined layers", family)
        return None
    result: dict[str, Tensor] = {}
    for kohya, paths in groups.items():
        if any(path in layers for path in paths):
            a, b, alpha = _joined(network, name, tensors, paths)
            if halves_swapped(network, family, paths[0]):
                b = torch.cat(b.chunk(2)[::-1])
            result[f"{kohya}.lora_down.weight"], result[f"{kohya}.lora_up.weight"] = a.contiguous(), b.contiguous()
            # Readers compute alpha / r. float32 whatever the weights are: rounding it would rescale the whole layer.
            result[f"{kohya}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
            if dora:
                magnitude = tensors[f"{paths[0]}.lora_magnitude_vector"].flatten()
                result[f"{kohya}.dora_scale"] = magnitude.reshape(-1, *[1] * (a.ndim - 1))
    if dora:
        logger.warning(
            "DoRA in the kohya file: diffusers ignores .dora_scale and other programs differ; prefer %s", FILE_NAME
        )
    return result


def _joined(
    network: nn.Module, name: str, tensors: Mapping[str, Tensor], paths: Sequence[str]
) -> tuple[Tensor, Tensor, float]:
    """A, B and alpha of layers that another program has as one, in the order of `paths`; not all need an adapter.

    A of every layer is as high as the highest, filled up with zeros; B is a block diagonal.
    """
    layers, bases = adapters.lora_layers(network, name), adapters.base_layers(network)
    scales = {path: adapters.scale(layers[path], name) for path in paths if path in layers}
    rank = max(layers[path].r[name] for path in scales)
    # Scale times rank is alpha * sqrt(rank) for rsLoRA. Unequal scales go into B.
    common = next(iter(scales.values())) if len(set(scales.values())) == 1 else 1.0
    alpha = common * rank * len(paths)
    if len(paths) == 1:
        return tensors[f"{paths[0]}.lora_A.weight"], tensors[f"{paths[0]}.lora_B.weight"], alpha
    inputs, like = bases[paths[0]].weight.shape[1], tensors[f"{next(iter(scales))}.lora_A.weight"]
    downs, ups = [], []
    for path in paths:
        down, up = like.new_zeros(rank, inputs), like.new_zeros(bases[path].weight.shape[0], rank)
        if path in scales:
            own = layers[path].r[name]
            down[:own] = tensors[f"{path}.lora_A.weight"]
            up[:, :own] = tensors[f"{path}.lora_B.weight"] * (scales[path] / common)
        downs.append(down)
        ups.append(up)
    return torch.cat(downs), torch.block_diag(*ups), alpha


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write beside the target and rename: a reader sees the old file or the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(dict(tensors), part, metadata=dict(metadata))
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error}); check the folder's rights and free space"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # gone after the rename, or its folder could not be made
            part.unlink()


def remove_others(folder: Path, kind: str) -> None:
    """Remove adapter files of other kinds from a folder: an adapter is written anew, and they would be found instead.

    Args:
        folder: with the new file.
        kind: of the new file, one of `KINDS`.
    """
    for other, names in KINDS.items():
        for name in names if other != kind else ():
            if (folder / name).is_file():
                (folder / name).unlink()
                logger.warning("%s removed: an earlier adapter of another kind in the same folder", folder / name)


# Reading


def find_file(path: Path) -> Path:
    """The adapter file of a path: the file itself, or that of a run folder.

    Raises:
        CheckpointError: there is none, or several and no telling which.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such adapter; expected a .safetensors file or a run folder with {FILE_NAME}")
    for name in (FILE_NAME, KINDS["delta"][0]):
        if (path / name).is_file():
            return path / name
    if (path / "manifest.json").is_file():
        raise CheckpointError(
            f"{path} is a training checkpoint, whose alpha is in its manifest; write adapter files from it with "
            f"'diffalign export RUN --adapter {path.name} --out FOLDER'"
        )
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "no .safetensors file"
        raise CheckpointError(f"{path}: expected {FILE_NAME} in this folder, found {found}; name the file itself")
    return files[0]


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of an adapter file or run folder.

    Raises:
        CheckpointError: no such file, or not a safetensors file.
    """
    return read_file(find_file(path))[1]


def read_file(file: Path, tensors: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (none, unless asked for) and metadata of a file.

    Raises:
        CheckpointError: it is no safetensors file.
    """
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            metadata = dict(handle.metadata() or {})
            return {key: handle.get_tensor(key) for key in handle.keys()} if tensors else {}, metadata  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not readable as safetensors ({error}); expected a LoRA file") from error


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One layer of a file: A, B, alpha (None: as the file's metadata says, or the rank), DoRA magnitude (flat)."""

    a: Tensor
    b: Tensor
    alpha: float | None
    magnitude: Tensor | None


def load_lora(
    network: nn.Module,
    path: Path,
    *,
    family: str,
    name: str = "default",
    trainable: bool = False,
    negative: bool = False,
) -> LoraInfo:
    """Attach the adapter of a file to a network: ours, diffusers' or kohya's (sgm or diffusers names).

    Everything is checked before the network is touched, and every tensor of the file is used.

    Args:
        network: the base, or one with other adapters; it is frozen. For files that adapt text encoders, too, a
            `TextConditioned` (`family.with_text_encoders()`).
        path: file or run folder.
        family: its name.
        name: what the adapter is called here; it becomes the only active one.
        trainable: leave it trainable (training goes on from a file).
        negative: it is for the negative branch of guidance, so that a negative adapter is no reason for a warning.

    Raises:
        CheckpointError: not a LoRA file, of another family or architecture, or with parts that cannot be used.
        ConfigError: the name is taken.
    """
    file = find_file(path)
    tensors, metadata = read_file(file, tensors=True)
    if "diffalign.gates" in metadata:
        from diffalign.gates import load_gated

        check_family(file, metadata, family)
        return load_gated(network, file, name=name, trainable=trainable)
    if "diffalign.delta" in metadata:
        from diffalign.delta_files import load_delta

        check_family(file, metadata, family)
        info = load_delta(network, file, name=name, trainable=trainable)
        _tell_negative(info, negative)
        return info
    origin = _origin(metadata)
    style = "kohya" if any(key.startswith(("lora_unet_", "lora_te")) for key in tensors) else "diffusers"
    found = [
        _read_part(file, part, module, own, metadata, style, family, origin)
        for part, module, own in _tensors_by_part(file, network, tensors)
    ]
    check_family(file, metadata, family)
    silent = all(not one.settings and layer.alpha is None for one in found for layer in one.layers.values())
    if style == "diffusers" and silent:
        logger.info("%s: no alpha in the file; alpha = rank, as diffusers reads it", file)

    ranks: list[int] = []
    alphas: list[float] = []
    for one in found:
        layers, settings = one.layers, one.settings
        own_ranks = {path: layer.a.shape[0] for path, layer in layers.items()}
        own_alphas = {path: _alpha(path, layer, settings) for path, layer in layers.items()}
        ranks, alphas = [*ranks, *own_ranks.values()], [*alphas, *own_alphas.values()]
        adapters.attach_modules(
            one.module,
            own_ranks,
            own_alphas,
            use_rslora=bool(settings.get("use_rslora", False)),
            use_dora=any(layer.magnitude is not None for layer in layers.values()),
            name=name,
        )
        adapters.load_state_dict(one.module, _to_peft(layers), name)
    if not trainable:
        for parameter in adapters.parameters(network, name):
            parameter.requires_grad_(False)
    info = LoraInfo(
        path=file,
        style=style,
        name=name,
        modules=len(ranks),
        rank=Counter(ranks).most_common(1)[0][0],
        alpha=Counter(alphas).most_common(1)[0][0],
        role=metadata.get("diffalign.role", "positive"),
        metadata=metadata,
    )
    _tell_negative(info, negative)
    return info


def _tell_negative(info: LoraInfo, negative: bool) -> None:
    """Warn of an adapter for the negative branch that is loaded as an ordinary one."""
    if info.role == "negative" and not negative:
        logger.warning(
            "%s: a negative-preference adapter, loaded as an ordinary one: it pulls towards what people reject; "
            "it is meant for the negative branch of classifier-free guidance",
            info.path,
        )


def adapts_text(path: Path) -> bool:
    """Whether an adapter file, or a run folder's, has a part for text encoders.

    Raises:
        CheckpointError: no such file, or not a safetensors file.
    """
    return any(text_part(key) for key in read_file(find_file(path), tensors=True)[0])


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What a file has for one module: its layers, and peft's settings (empty where the file has none)."""

    module: nn.Module
    layers: dict[str, _Layer]
    settings: dict[str, Any]


def _tensors_by_part(
    file: Path, network: nn.Module, tensors: Mapping[str, Tensor]
) -> list[tuple[str, nn.Module, dict[str, Tensor]]]:
    """(part, module, tensors) of a file; the network's part is "". A network alone has all of them."""
    split: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        split.setdefault(text_part(key) or "", {})[key] = tensor
    modules = {"": network}
    if isinstance(network, TextConditioned):
        modules = {"": network.network} | network.encoders
    if beyond := [part for part in split if part not in modules]:
        key = next(iter(split[beyond[0]]))
        raise CheckpointError(
            f"{file}: {key!r} adapts {beyond[0]}, which cannot carry an adapter here; expected a family with CLIP text "
            "encoders (sd, sdxl, sd3) and what its with_text_encoders() returns, or a file of the network's part only"
        )
    # A file without tensors is the network's, where it is refused.
    return [(part, modules[part], own) for part, own in (split or {"": {}}).items()]


def _read_part(
    file: Path,
    part: str,
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    style: str,
    family: str,
    origin: str,
) -> _Found:
    """Check what a file has for a module."""
    if not part:
        prefix, what = f"{format_of(module, family).prefix}.", f"a {family} network"
        if style == "kohya":
            tensors = _take_apart(module, family, tensors)
        lookup = {path: path for path in adapters.base_layers(module)}
        if style == "kohya":
            kinds = (family,) if prefix != "unet." else ("sd", "sdxl")
            lookup |= {name: paths[0] for kind in kinds for name, paths in kohya_layers(module, kind).items()}
    else:
        prefix, what = f"{part}.", f"{part} of family {family!r}"
        lookup = {f"{TEXT_MODEL}{path.removeprefix(TEXT_MODEL)}": path for path in adapters.base_layers(module)}
        lookup |= {path.removeprefix(TEXT_MODEL): path for path in adapters.base_layers(module)}
        lookup |= {name: path for path, name in text_kohya_names(module, family, part).items()}
    layers = _group(file, tensors, style, lookup, prefix, what, origin)
    _check_shapes(file, layers, module, what, origin)
    settings = _read_settings(file, metadata, prefix) if style == "diffusers" else {}
    return _Found(module=module, layers=layers, settings=settings)


def check_family(file: Path, metadata: Mapping[str, str], family: str) -> None:
    """Refuse a file that says it is for another family.

    Raises:
        CheckpointError: naming both.
    """
    if metadata.get("diffalign.family", family) != family:
        raise CheckpointError(
            f"{file}: an adapter for {_origin(metadata)}, got model.family {family!r}; load it into its own family"
        )


def _origin(metadata: Mapping[str, str]) -> str:
    keys = ("diffalign.family", "modelspec.architecture", "ss_base_model_version")
    return next((repr(metadata[key]) for key in keys if key in metadata), "an unknown model (no metadata)")


def _group(
    file: Path,
    tensors: Mapping[str, Tensor],
    style: str,
    lookup: Mapping[str, str],
    prefix: str,
    what: str,
    origin: str,
) -> dict[str, _Layer]:
    """The file's tensors by layer path.

    Args:
        file: for messages.
        tensors: by the file's keys.
        style: "diffusers" or "kohya".
        lookup: a layer's path by what the file may call it, after the prefix.
        prefix: of keys in diffusers' style.
        what: the module, for messages.
        origin: what the file is for.
    """
    if not tensors:
        raise CheckpointError(f"{file}: holds no tensors; expected a LoRA file")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        suffix = next((s for s in _SUFFIXES if key.endswith(s)), None)
        if suffix is None:
            raise CheckpointError(f"{file}: {key!r} is no LoRA tensor (LoHa, LoKr and others are not supported)")
        module = key.removesuffix(suffix).removeprefix(prefix)
        if module not in lookup:
            raise CheckpointError(
                f"{file}: {key!r} fits no layer of {what}; the file is for {origin}; load it into that"
            )
        part = parts.setdefault(lookup[module], {})
        if _SUFFIXES[suffix] in part:
            raise CheckpointError(f"{file}: {key!r} is the second such tensor of one layer; the file mixes two namings")
        part[_SUFFIXES[suffix]] = tensor
    dora = any("magnitude" in part for part in parts.values())
    layers = {}
    for path, part in parts.items():
        if not {"a", "b"} <= part.keys() or ("magnitude" in part) != dora:
            raise CheckpointError(
                f"{file}: {path!r} has only {', '.join(sorted(part))}; expected A, B{' and a DoRA magnitude' * dora}; "
                "the file is incomplete"
            )
        layers[path] = _layer(file, path, part, style)
    return layers


def _take_apart(network: nn.Module, family: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A kohya file's tensors with joined layers as several, each under its own path; the rest is what it was.

    A block-diagonal B gives each layer its share of the rank; any other gives each the whole of A.
    """
    found, bases = dict(tensors), adapters.base_layers(network)
    for name, paths in kohya_layers(network, family).items():
        down, up = f"{name}.lora_down.weight", f"{name}.lora_up.weight"
        swapped = halves_swapped(network, family, paths[0])
        if not {down, up} <= found.keys() or (len(paths) == 1 and not swapped):
            continue
        if swapped:
            found[up] = torch.cat(found[up].chunk(2)[::-1])
            continue
        sizes = [bases[path].weight.shape[0] for path in paths]
        if found[up].ndim != 2 or found[up].shape[0] != sum(sizes):
            continue  # left as it is, for the message about shapes
        a, b, alpha = found.pop(down), found.pop(up).split(sizes), found.pop(f"{name}.alpha", None)
        share, rest = divmod(len(a), len(paths))
        columns = [slice(i * share, (i + 1) * share) for i in range(len(paths))]
        diagonal = not rest and all(
            not part[:, other].any() for i, part in enumerate(b) for j, other in enumerate(columns) if i != j
        )
        acts = [bool(part.any()) for part in b]
        for path, part, column, acting in zip(paths, b, columns, acts, strict=True):
            if any(acts) and not acting:  # no adapter there
                continue
            found[f"{path}.lora_A.weight"] = a[column] if diagonal else a
            found[f"{path}.lora_B.weight"] = part[:, column] if diagonal else part
            if alpha is not None:
                found[f"{path}.alpha"] = alpha / len(paths) if diagonal else alpha
    return found


def _layer(file: Path, path: str, part: Mapping[str, Tensor], style: str) -> _Layer:
    """Check the numbers of one layer."""
    for what, tensor in part.items():
        if not torch.isfinite(tensor).all() or (what == "alpha" and (tensor.numel() != 1 or tensor.item() == 0)):
            raise CheckpointError(f"{file}: {path!r}: {what} is not a usable number; the file is damaged")
    magnitude = part.get("magnitude")
    if magnitude is not None:
        # (out, 1, ...) here, (1, in, ...) in LyCORIS: on square layers only the place of the 1 tells them apart.
        if style == "kohya" and magnitude.ndim > 1 and magnitude.shape[0] == 1 < magnitude.numel():
            raise CheckpointError(f"{file}: {path!r}: DoRA over inputs is not supported; expected one scale per output")
        magnitude = magnitude.float().flatten()
    return _Layer(
        a=part["a"].float(),
        b=part["b"].float(),
        alpha=float(part["alpha"].item()) if "alpha" in part else None,
        magnitude=magnitude,
    )


def _check_shapes(file: Path, layers: Mapping[str, _Layer], network: nn.Module, here: str, origin: str) -> None:
    bases = adapters.base_layers(network)
    for path, layer in layers.items():
        out, *inner = bases[path].weight.shape
        rank = layer.a.shape[0] if layer.a.ndim else 0
        want = {"A": (rank, *inner), "B": (out, rank, *[1] * (len(inner) - 1))}
        got = {"A": tuple(layer.a.shape), "B": tuple(layer.b.shape)}
        if layer.magnitude is not None:
            want["magnitude"], got["magnitude"] = (out,), tuple(layer.magnitude.shape)
        for part in want:
            if got[part] != want[part] or not rank:
                raise CheckpointError(
                    f"{file}: {path!r}: {part} has shape {got[part]}, {here} needs {want[part]}; "
                    f"the file is for {origin}"
                )


def _read_settings(file: Path, metadata: Mapping[str, str], prefix: str) -> dict[str, Any]:
    """diffusers' adapter settings for the network, without prefix; empty if the file has none."""
    try:
        settings = json.loads(metadata.get(_ADAPTER_KEY, "{}"))
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{file}: {_ADAPTER_KEY} in its metadata is no JSON ({error}); the file is damaged"
        ) from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file}: {_ADAPTER_KEY} in its metadata is no JSON object; the file is damaged")
    mine = {key: value for key, value in settings.items() if (text_part(key) or "") == (text_part(prefix) or "")}
    return {key.removeprefix(prefix): value for key, value in mine.items()}


def _alpha(path: str, layer: _Layer, settings: Mapping[str, Any]) -> float:
    """The layer's alpha: its own tensor, else peft's setting (patterns are regular expressions), else the rank."""
    if layer.alpha is not None:
        return layer.alpha
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return float(alpha)
    return float(settings.get("lora_alpha", _PEFT_ALPHA) if settings else layer.a.shape[0])


def _to_peft(layers: Mapping[str, _Layer]) -> dict[str, Tensor]:
    state = {}
    for path, layer in layers.items():
        state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"] = layer.a, layer.b
        if layer.magnitude is not None:  # peft: (out,) for linear layers, (1, out, 1, 1) for convolutions
            shape = (1, -1, 1, 1) if layer.a.ndim == 4 else (-1,)
            state[f"{path}.lora_magnitude_vector"] = layer.magnitude.reshape(shape)
    return state
