"""Which architecture a model section stands for, read without weights and without the network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffalign.config import ModelConfig
from diffalign.errors import ConfigError
from diffalign.families import published
from diffalign.families._loading import Location, locate

TIME_IDS = 6
# Files that hold a component's weights, in the order in which diffusers and transformers look for them.
WEIGHTS = ("diffusion_pytorch_model", "model")


@dataclass(frozen=True, kw_only=True)
class Download:
    """Something the run needs. `bytes` is None where it is unknown; `here` says that it need not be downloaded."""

    what: str
    source: str
    bytes: int | None
    here: bool


@dataclass(frozen=True)
class Architecture:
    """Component configs and where they came from.

    Attributes:
        configs: by component: `unet`, `vae`, `text_encoder`, ...
        source: in words.
        assumed: why this architecture was assumed, where nothing could be read.
        location: of the weights.
    """

    configs: dict[str, dict[str, Any]]
    source: str
    assumed: str | None
    location: Location

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Parameters by component."""
        modules = {name: published.build_from_config(config, device="meta") for name, config in self.configs.items()}
        return {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}

    @property
    def tokens(self) -> int:
        """Text length in tokens."""
        return int(self.configs["text_encoder"].get("max_position_embeddings", published.MAX_TOKENS))

    @property
    def text_numbers(self) -> int:
        """Numbers in the text conditioning of one prompt."""
        unet = self.configs["unet"]
        pooled = 0
        if unet.get("addition_embed_type") == "text_time":
            pooled = unet["projection_class_embeddings_input_dim"] - TIME_IDS * unet["addition_time_embed_dim"]
        return int(self.tokens * unet["cross_attention_dim"] + pooled)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of a square image.

        Raises:
            ConfigError: the side is no multiple of what VAE and UNet divide it by.
        """
        factor = 2 ** (len(self.configs["vae"]["block_out_channels"]) - 1)
        step = factor * 2 ** (len(self.configs["unet"]["block_out_channels"]) - 1)
        if resolution % step:
            raise ConfigError(f"data.resolution: got {resolution}; this model needs a multiple of {step}")
        return int(self.configs["unet"]["in_channels"]), resolution // factor, resolution // factor

    def downloads(self, model: ModelConfig) -> list[Download]:
        """The model's files; sizes are parameters times the width of the stored type."""
        width = 2 if model.variant in ("fp16", "bf16") else 4
        here = self.location.kind != "hub"
        if here:
            return [Download(what="model", source=self.location.where, bytes=0, here=True), *self._vae(model)]
        found = []
        for name, parameters in self.parameters.items():
            if name == "vae" and model.vae:
                continue
            cached = cached_file(self.location.where, name, model) is not None
            source = f"{self.location.where}/{name}"
            found.append(Download(what="model", source=source, bytes=parameters * width, here=cached))
        return [*found, *self._vae(model)]

    def _vae(self, model: ModelConfig) -> list[Download]:
        if model.vae is None:
            return []
        if Path(model.vae).exists():
            return [Download(what="VAE", source=model.vae, bytes=0, here=True)]
        here = cached_file(model.vae, "", ModelConfig(family=model.family, pretrained=model.vae)) is not None
        return [Download(what="VAE", source=model.vae, bytes=self.parameters["vae"] * 4, here=here)]


def resolve(model: ModelConfig) -> Architecture:
    """Read the configs of a model section; for a hub id that is not on this machine, assume the family's own.

    Raises:
        ConfigError: nothing there, or configs that are not a supported pipeline's.
    """
    location = locate(model)
    if location.kind == "random":
        return Architecture(_published(location.where), f"published architecture {location.where!r}", None, location)
    if location.kind == "folder":
        return Architecture(read_folder(Path(location.where)), f"folder {location.where}", None, location)
    if location.kind == "file":
        return _of_file(model, location)
    config = cached_config(location.where, model.revision)
    if config is not None:
        return Architecture(read_folder(config), f"hub cache of {location.where}", None, location)
    name = assume(model)
    why = f"{location.where} is not on this machine; the published architecture {name!r} is assumed"
    return Architecture(_published(name), f"published architecture {name!r}", why, location)


def _of_file(model: ModelConfig, location: Location) -> Architecture:
    if model.config and Path(model.config).is_dir():
        return Architecture(read_folder(Path(model.config)), f"folder {model.config}", None, location)
    name = published.detect(Path(location.where))
    if name is None:
        raise ConfigError(
            f"{location.where}: not recognised as an SD1.x, SD2.x or SDXL checkpoint; name a folder in model.config"
        )
    return Architecture(_published(name), f"header of {location.where}: {name!r}", None, location)


def assume(model: ModelConfig) -> str:
    """The published architecture that a family and a name suggest.

    Raises:
        ConfigError: a family without published architectures here.
    """
    name = model.pretrained.lower()
    if model.family == "sdxl":
        return "sdxl"
    if model.family == "sd":
        if not any(part in name for part in ("2-1", "2.1", "2-base", "diffusion-2")):
            return "sd15"
        return "sd21-base" if "base" in name else "sd21"
    raise ConfigError(
        f"model.family {model.family!r}: {model.pretrained!r} is not on this machine and no architecture is known for "
        "it; download it or name a local folder"
    )


def _published(name: str) -> dict[str, dict[str, Any]]:
    configs = published.component_configs(name)
    return {component: configs[component] for component in published.weight_components(name)}


def read_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """The component configs of a diffusers pipeline folder.

    Raises:
        ConfigError: a missing or unreadable config.
    """
    index = _read_json(folder / "model_index.json")
    names = [n for n in index if n in ("unet", "vae") or n.startswith("text_encoder")]
    missing = {"unet", "vae", "text_encoder"} - set(names)
    if missing:
        raise ConfigError(
            f"{folder}: model_index.json has no {', '.join(sorted(missing))}; expected an SD or SDXL pipeline"
        )
    return {name: _read_json(folder / name / "config.json") for name in names if index[name] != [None, None]}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not readable as a component config ({type(error).__name__})") from error


def cached_config(repo: str, revision: str | None) -> Path | None:
    """The snapshot folder of a hub model whose configs are all in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(repo, "model_index.json", revision=revision)
    if not isinstance(index, str):
        return None
    folder = Path(index).parent
    complete = all((folder / name / "config.json").is_file() for name in ("unet", "vae", "text_encoder"))
    return folder if complete else None


def cached_file(repo: str, component: str, model: ModelConfig) -> str | None:
    """The weights of a component in the local hub cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    variant = f".{model.variant}" if model.variant else ""
    for stem in WEIGHTS:
        for ending in (".safetensors", ".safetensors.index.json"):
            name = f"{component}/{stem}{variant}{ending}" if component else f"{stem}{variant}{ending}"
            found = try_to_load_from_cache(repo, name, revision=model.revision)
            if isinstance(found, str):
                return found
    return None
