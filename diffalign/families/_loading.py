"""Where the parts of a diffusers pipeline come from: hub id, folder, single file, tiny base, or random weights."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from diffalign.config import ModelConfig
from diffalign.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".json", ".txt")
# Constructor arguments of stock pipelines that would load more, or warn, if they were left out.
PLAIN = {"requires_safety_checker": False, "add_watermarker": False}
# Messages of other libraries that say nothing true or new here, by logger.
NOISE = {
    # The tiny bases' closed-form codec is no AutoencoderKL and need not be one.
    "diffusers.pipelines.pipeline_utils": "Expected types for vae",
    # diffusers 0.42 says this of every cast, also where the list of such modules is empty.
    "diffusers.models.modeling_utils": "that should be kept in float32: []",
    # Prompts that are cut off are counted in the data report.
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion": "part of your input was truncated",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl": "part of your input was truncated",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3": "part of your input was truncated",
    "diffusers.pipelines.cogvideo.pipeline_cogvideox": "part of your input was truncated",
    "diffusers.pipelines.flux.pipeline_flux": "part of your input was truncated",
    "diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma": "part of your input was truncated",
    "transformers.tokenization_utils_base": "Token indices sequence length is longer than",
}


@dataclass(frozen=True)
class Location:
    """A resolved `model.pretrained`."""

    kind: Literal["folder", "hub", "file", "random"]
    where: str


@contextmanager
def quiet() -> Iterator[None]:
    """Other libraries' progress bars only for somebody who looks on a terminal, and none of `NOISE`."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    if sys.stderr.isatty():
        libraries = []
    filters = {logging.getLogger(name): _Without(text) for name, text in NOISE.items()}
    for library in libraries:
        library.disable_progress_bar()
    for logger, one in filters.items():
        logger.addFilter(one)
    try:
        with warnings.catch_warnings():
            # diffusers 0.42 passes it to huggingface_hub 1.x, which no longer wants it.
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated")
            yield
    finally:
        for library in libraries:
            library.enable_progress_bar()
        for logger, one in filters.items():
            logger.removeFilter(one)


class _Without(logging.Filter):
    """Drops messages that contain a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in record.getMessage()


def dtype_argument(dtype: Any) -> dict[str, Any]:
    """How the installed diffusers wants to be told the weights' type: `dtype` since 0.40, where `torch_dtype` warns."""
    major, minor = importlib.metadata.version("diffusers").split(".")[:2]
    return {"dtype" if (int(major), int(minor)) >= (0, 40) else "torch_dtype": dtype}


def locate(config: ModelConfig, *, file_ok: bool = True) -> Location:
    """Decide what `pretrained` names, without loading.

    Raises:
        ConfigError: none of the possible kinds.
    """
    from diffalign.families import published
    from diffalign.world.names import TINY_BASES, base_folder

    name = config.pretrained
    if config.random_weights:
        if name not in published.NAMES:
            raise ConfigError(
                f"model.pretrained {name!r} is no published architecture{did_you_mean(name, published.NAMES)} "
                f"With random_weights expected one of: {', '.join(published.NAMES)}"
            )
        return Location("random", name)
    if name in TINY_BASES:
        return Location("folder", str(base_folder(name)))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ConfigError(
                f"model.pretrained {name!r} is a folder without model_index.json; expected a diffusers pipeline folder"
            )
        return Location("folder", str(path))
    if path.is_file():
        if not file_ok or path.suffix != ".safetensors":
            raise ConfigError(
                f"model.pretrained {name!r}: expected a single-file .safetensors checkpoint or a diffusers folder; "
                "convert .ckpt files first (they can run code when opened)"
            )
        return Location("file", str(path))
    if HUB_ID.fullmatch(name):
        return Location("hub", name)
    raise ConfigError(
        f"model.pretrained {name!r} is no file, folder, hub id (owner/name) or tiny base"
        f"{did_you_mean(name, TINY_BASES)} Tiny bases: {', '.join(TINY_BASES)}"
    )


def network_config(config: ModelConfig, location: Location, part: str = "unet") -> Mapping[str, Any] | None:
    """The network's config as far as it is known without loading weights or asking the hub; None if it is not.

    Args:
        config: which model.
        location: of it.
        part: the pipeline's name of the network, "unet" or "transformer".

    Raises:
        ConfigError: a folder without such a network, or a single file of an unknown architecture.
    """
    from diffalign.families import published

    if location.kind == "random":
        return published.component_configs(location.where).get(part)
    if location.kind == "hub":
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(location.where, f"{part}/config.json", revision=config.revision)
        return _read_network_config(Path(cached).parent.parent, part) if isinstance(cached, str) else None
    if location.kind == "folder":
        return _read_network_config(Path(location.where), part)
    if config.config:
        folder = Path(config.config).expanduser()
        if not folder.is_dir() and HUB_ID.fullmatch(config.config):
            return None
        return _read_network_config(folder, part)
    return published.component_configs(_architecture_of(location.where)).get(part)


def _read_network_config(folder: Path, part: str) -> Mapping[str, Any]:
    file = folder / part / "config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} is not readable ({type(error).__name__}); expected a diffusers pipeline with a "
            f"{'UNet (SD1.x, SD2.x or SDXL)' if part == 'unet' else part} for this model.family"
        ) from error


def check_vae(name: str) -> None:
    """Check, before anything loads, that `model.vae` can name an autoencoder.

    Raises:
        ConfigError: it is no such file, folder or hub id.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (_vae_folder(path) / "config.json").is_file():
            raise ConfigError(f"model.vae {name!r} is a folder without config.json; expected a diffusers autoencoder")
    elif path.is_file():
        if path.suffix != ".safetensors":
            raise ConfigError(f"model.vae {name!r}: expected a .safetensors file, a diffusers folder or a hub id")
    elif not HUB_ID.fullmatch(name):
        raise ConfigError(f"model.vae {name!r} is no file, folder or hub id (owner/name)")


def _vae_folder(path: Path) -> Path:
    """An autoencoder's own folder, also where a whole pipeline's was named."""
    return path / "vae" if (path / "model_index.json").is_file() else path


def find_scheduler(name: str) -> Any:
    """A diffusers scheduler class by name.

    Raises:
        ConfigError: no such class.
    """
    import diffusers

    known = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    if name not in known:
        raise ConfigError(
            f"sampling.scheduler {name!r} is no diffusers scheduler{did_you_mean(name, known)} Expected a class name "
            "such as EulerDiscreteScheduler, or null for the model's own"
        )
    return getattr(diffusers, name)


def load_components(
    pipeline_class: Any,
    config: ModelConfig,
    location: Location,
    wanted: Iterable[str],
    *,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    absent: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Load named components of a stock pipeline and nothing else; `absent` are those that the model comes without.

    Returns:
        The components by name, and the pipeline's own settings under "pipeline_config".

    Raises:
        ConfigError: missing or unreadable weights, with the first line of the cause.
    """
    wanted = set(wanted)
    stock = wanted - {"vae"} if config.vae else wanted
    with quiet():
        if location.kind == "random":
            parts = _random_components(location.where, stock, dtype, vae_dtype)
        else:
            what = f"model.pretrained {config.pretrained!r} ({location.kind})"
            with _loading(what):
                if location.kind == "file":
                    parts = _from_file(pipeline_class, config, location.where, stock, dtype, vae_dtype)
                else:
                    parts = _from_folder(pipeline_class, config, location.where, stock, dtype, vae_dtype)
            if missing := sorted(name for name, part in parts.items() if part is None):
                raise ConfigError(f"{what} has no {', '.join(missing)}; expected {', '.join(sorted(wanted))}")
        if config.vae and "vae" in wanted:
            with _loading(f"model.vae {config.vae!r}"):
                parts["vae"] = _load_vae(pipeline_class, config, config.vae, vae_dtype)
    return parts


@contextmanager
def _loading(what: str) -> Iterator[None]:
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError, SingleFileComponentError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{what} could not be loaded: {first} Check the name, that it is downloaded if you are offline, and your "
            "hub login if it is gated"
        ) from error


def absent_parts(
    pipeline_class: Any, config: ModelConfig, location: Location, optional: Iterable[str]
) -> frozenset[str]:
    """Which optional parts a pipeline folder or hub repository comes without.

    Raises:
        ConfigError: its index cannot be read.
    """
    with quiet(), _loading(f"model.pretrained {config.pretrained!r} ({location.kind})"):
        index = pipeline_class.load_config(location.where, revision=config.revision)
    return frozenset(name for name in optional if index.get(name, [None, None])[0] is None)


def _skipped(pipeline_class: Any, wanted: set[str]) -> dict[str, Any]:
    """Arguments that keep diffusers from loading (and downloading) what is not wanted: None for each of those parts."""
    expected, optional = pipeline_class._get_signature_keys(pipeline_class)
    plain = {name: value for name, value in PLAIN.items() if name in optional}
    return plain | {name: None for name in expected if name not in wanted}


def _from_folder(
    pipeline_class: Any, config: ModelConfig, where: str, wanted: set[str], dtype: torch.dtype, vae_dtype: torch.dtype
) -> dict[str, Any]:
    # diffusers loads a class of ours (the tiny bases' codec) only where our module is already imported.
    importlib.import_module("diffalign.world.codec")
    pipeline = pipeline_class.from_pretrained(
        where,
        revision=config.revision,
        variant=config.variant,
        **dtype_argument({"vae": vae_dtype, "default": dtype}),
        **_skipped(pipeline_class, wanted),
    )
    return {name: getattr(pipeline, name) for name in wanted} | {"pipeline_config": dict(pipeline.config)}


def _from_file(
    pipeline_class: Any, config: ModelConfig, where: str, wanted: set[str], dtype: torch.dtype, vae_dtype: torch.dtype
) -> dict[str, Any]:
    from diffusers import AutoencoderKL

    # A single file is read in one type: an autoencoder of another one is read by itself, not rounded and cast back.
    apart = wanted & {"vae"} if vae_dtype != dtype else set()
    with _config_folder(config, "" if config.config else _architecture_of(where)) as folder:
        pipeline = pipeline_class.from_single_file(
            where, config=folder, **dtype_argument(dtype), **_skipped(pipeline_class, wanted - apart)
        )
        parts = {name: getattr(pipeline, name) for name in wanted - apart}
        if apart:
            parts["vae"] = AutoencoderKL.from_single_file(
                where, config=folder, subfolder="vae", **dtype_argument(vae_dtype)
            )
    return parts | {"pipeline_config": dict(pipeline.config)}


def _load_vae(pipeline_class: Any, config: ModelConfig, name: str, dtype: torch.dtype) -> Any:
    import diffusers
    from diffusers import AutoencoderKL

    path = Path(name).expanduser()
    if path.is_file():
        # All published autoencoders of a family have one shape: no need to ask the hub for it.
        vae_class, architecture = stock_vae(pipeline_class)
        with _config_folder(config, architecture) as folder:
            return vae_class.from_single_file(str(path), config=folder, subfolder="vae", **dtype_argument(dtype))
    where = str(_vae_folder(path)) if path.is_dir() else name
    vae_class = getattr(diffusers, str(AutoencoderKL.load_config(where).get("_class_name", "AutoencoderKL")))
    return vae_class.from_pretrained(where, **dtype_argument(dtype))


def stock_vae(pipeline_class: Any) -> tuple[Any, str]:
    """The autoencoder's class of a stock pipeline, and the first published architecture that has it."""
    import diffusers

    from diffalign.families import published

    for name in published.NAMES:
        configs = published.component_configs(name)
        if configs["model_index"]["_class_name"] == pipeline_class.__name__:
            return getattr(diffusers, configs["vae"]["_class_name"]), name
    return diffusers.AutoencoderKL, "sd15"


@contextmanager
def _config_folder(config: ModelConfig, architecture: str) -> Iterator[str]:
    """The component configs of a single file: the folder (or hub id) that the user names, or a published one's."""
    if config.config:
        yield str(Path(config.config).expanduser()) if Path(config.config).expanduser().is_dir() else config.config
        return
    from diffalign.families import published

    with tempfile.TemporaryDirectory(prefix="diffalign-") as folder:
        yield str(published.config_folder(architecture, Path(folder)))


def _architecture_of(file: str) -> str:
    from diffalign.families import published

    name = published.detect(Path(file))
    if name is None:
        raise ConfigError(
            f"{file}: not recognised as an SD1.x, SD2.x or SDXL checkpoint; name its configuration (a diffusers folder or "
            "hub id) in model.config"
        )
    return name


def _random_components(name: str, wanted: set[str], dtype: torch.dtype, vae_dtype: torch.dtype) -> dict[str, Any]:
    from diffalign.families import published

    light = set(filter(published.is_light, wanted))
    parts: dict[str, Any] = {"pipeline_config": {}}
    if light:
        parts |= published.light_components(name, light)
    for part in wanted - light:
        parts[part] = published.build_component(name, part, dtype=vae_dtype if part == "vae" else dtype)
    return parts


def fingerprint(config: ModelConfig, location: Location, folders: Iterable[str]) -> dict[str, str]:
    """Hashes of what determines the encoders' output: by file content for local files, by commit for the hub."""
    found: dict[str, str] = {}
    if location.kind in ("random", "hub"):
        found["model"] = f"{location.where}@{config.revision or 'default'} {config.variant or ''}".rstrip()
    elif location.kind == "file":
        found["model"] = file_hash(Path(location.where))
    else:
        for folder in folders:
            for file in sorted((Path(location.where) / folder).glob("*")):
                if file.suffix in WEIGHT_SUFFIXES:
                    found[f"{folder}/{file.name}"] = file_hash(file)
    if config.vae:
        path = Path(config.vae).expanduser()
        found["vae"] = file_hash(path) if path.is_file() else config.vae
        if path.is_dir():
            files = sorted(f for f in _vae_folder(path).iterdir() if f.suffix in WEIGHT_SUFFIXES)
            found["vae"] = json.dumps({f.name: file_hash(f) for f in files})
    return found


def file_hash(path: Path, window: int = 1 << 18) -> str:
    """Size and a hash of the first and last 256 KiB: enough to tell published weights apart without reading all."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(window))
        if size > window:
            file.seek(max(window, size - window))
            digest.update(file.read())
    return f"{size}:{digest.hexdigest()[:16]}"
