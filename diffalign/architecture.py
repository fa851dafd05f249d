"""Which architecture a model section stands for, read without weights and without the network."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from diffalign import plugins
from diffalign.config import ModelConfig
from diffalign.errors import ConfigError
from diffalign.families import published
from diffalign.families._loading import Location, locate
from diffalign.families._pipeline import PipelineFamily

TIME_IDS = 6
# What a hub id says of an architecture, by family; the first that is in it counts. None: not one of those known here.
HINTS: dict[str, tuple[tuple[str, str | None], ...]] = {
    "sdxl": (("", "sdxl"),),
    "sd3": (("3.5-large", "sd35-large"), ("3.5", "sd35-medium"), ("", "sd3-medium")),
    "flux": (("schnell", "flux1-schnell"), ("", "flux1-dev")),
    "pixart": (("", "pixart-sigma"),),
    "sana": (("_600m", None), ("0.6b", None), ("4.8b", None), ("sana1.5", None), ("", "sana-1.6b")),
    "qwen_image": (("", "qwen-image"),),
    "wan": (("2.2", None), ("14b", "wan21-t2v-14b"), ("1.3b", "wan21-t2v-1.3b")),
    "cogvideox": (("1.5", None), ("2b", "cogvideox-2b"), ("5b", "cogvideox-5b")),
}
# Published repositories whose weights are stored in 16 bits without being a variant; confirmed for FLUX.1, SD3.5 medium and
# Qwen-Image, UNVERIFIED for the others.
HALF = (
    "sd3-medium",
    "sd35-medium",
    "sd35-large",
    "flux1-dev",
    "flux1-schnell",
    "qwen-image",
    "cogvideox-2b",
    "cogvideox-5b",
)
# Where a transformer's config says how wide the text is, by class.
WIDTHS = {
    "CogVideoXTransformer3DModel": "text_embed_dim",
    "FluxTransformer2DModel": "joint_attention_dim",
    "PixArtTransformer2DModel": "caption_channels",
    "QwenImageTransformer2DModel": "joint_attention_dim",
    "SD3Transformer2DModel": "joint_attention_dim",
    "SanaTransformer2DModel": "caption_channels",
    "Transformer2DModel": "caption_channels",  # PixArt's first name
    "WanTransformer3DModel": "text_dim",
}
POOLED = ("SD3Transformer2DModel", "FluxTransformer2DModel")
MASKED = ("PixArtTransformer2DModel", "QwenImageTransformer2DModel", "SanaTransformer2DModel", "Transformer2DModel")
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
        configs: by component: `unet` or `transformer`, `vae`, `text_encoder`, ...
        source: in words.
        assumed: why this architecture was assumed, where nothing could be read.
        location: of the weights.
        model: what it was resolved from.
        name: of a published architecture, where it is one.
    """

    configs: dict[str, dict[str, Any]]
    source: str
    assumed: str | None
    location: Location
    model: ModelConfig
    name: str | None = None

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return {name: published.build_from_config(config, device="meta") for name, config in self.configs.items()}

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Parameters by component."""
        return {name: sum(p.numel() for p in module.parameters()) for name, module in self._modules.items()}

    @cached_property
    def stored(self) -> dict[str, int]:
        """Numbers in a component's file: parameters, and positions that are stored with them."""
        return {
            name: self.parameters[name]
            + sum(
                buffer.numel()
                for owner in module.modules()
                for key, buffer in owner.named_buffers(recurse=False)
                if key not in owner._non_persistent_buffers_set
            )
            for name, module in self._modules.items()
        }

    @cached_property
    def family(self) -> PipelineFamily:
        """The family's own object, with a network and an autoencoder that have no memory.

        Raises:
            ConfigError: a family that is not behind a stock diffusers pipeline.
        """
        cls: Any = plugins.find("families", self.model.family)
        if not issubclass(cls, PipelineFamily):
            raise ConfigError(
                f"plan: model.family {self.model.family!r} is no family behind a stock diffusers pipeline, which are the "
                "only ones that are planned"
            )
        family: PipelineFamily = cls(self.model)
        family.parts |= {part: self._modules[part] for part in (self.network_part, "vae")}
        return family

    @property
    def network_part(self) -> str:
        """`unet` or `transformer`."""
        return published.network_part(self.configs)

    @property
    def network(self) -> dict[str, Any]:
        """The network's config."""
        return self.configs[self.network_part]

    @cached_property
    def conditioning(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what the family's network is told of one prompt, and of one image, without a batch axis.

        Raises:
            ConfigError: a network whose inputs are not known here.
        """
        network, family = self.network, self.family
        kind = str(network.get("_class_name"))
        clip = int(self.configs["text_encoder"].get("max_position_embeddings", published.MAX_TOKENS))
        if kind == "UNet2DConditionModel":
            shapes: dict[str, tuple[int, ...]] = {"encoder_hidden_states": (clip, network["cross_attention_dim"])}
            if network.get("addition_embed_type") == "text_time":
                times = TIME_IDS * network["addition_time_embed_dim"]
                shapes["text_embeds"] = (network["projection_class_embeddings_input_dim"] - times,)
                shapes["time_ids"] = (TIME_IDS,)
            return shapes
        length = int(getattr(family, "text_length", 0))
        if kind == "SD3Transformer2DModel":  # CLIP's tokens, then T5's
            length += clip
        if kind not in WIDTHS or not length:
            raise ConfigError(
                f"plan: what a {kind} is told of a prompt is not known here; planned are {', '.join(WIDTHS)} and "
                "UNet2DConditionModel"
            )
        shapes = {"encoder_hidden_states": (length, network[WIDTHS[kind]])}
        if kind in POOLED:
            shapes["pooled_projections"] = (network["pooled_projection_dim"],)
        if kind in MASKED:
            shapes["attention_mask"] = (length,)
        return shapes

    @property
    def text_numbers(self) -> int:
        """Numbers in the text conditioning of one prompt."""
        return sum(math.prod(shape) for name, shape in self.conditioning.items() if name != "time_ids")

    def latent_shape(self, resolution: int, frames: int = 1) -> tuple[int, ...]:
        """(C, h, w) of a square image, or (C, F, h, w) of a clip.

        Raises:
            ConfigError: the side is no multiple of what VAE and network divide it by, or a number of frames that the
                family does not have.
        """
        step = self.family.resolution_step
        if self.network_part == "unet":
            step = self.family.vae_factor * 2 ** (len(self.network["block_out_channels"]) - 1)
        if resolution % step:
            raise ConfigError(f"data.resolution: got {resolution}; this model needs a multiple of {step}")
        self.family.check_frames(frames)
        return self.family.latent_shape(resolution, resolution, frames)

    def downloads(self, model: ModelConfig) -> list[Download]:
        """The model's files; sizes are numbers times the width of the stored type."""
        width = 2 if model.variant in ("fp16", "bf16") or self.name in HALF else 4
        here = self.location.kind != "hub"
        if here:
            return [Download(what="model", source=self.location.where, bytes=0, here=True), *self._vae(model)]
        found = []
        for name, numbers in self.stored.items():
            if name == "vae" and model.vae:
                continue
            cached = cached_file(self.location.where, name, model) is not None
            source = f"{self.location.where}/{name}"
            found.append(Download(what="model", source=source, bytes=numbers * width, here=cached))
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

    def named(name: str, source: str, assumed: str | None = None) -> Architecture:
        return Architecture(_published(name), source, assumed, location, model, name)

    if location.kind == "random":
        return named(location.where, f"published architecture {location.where!r}")
    if location.kind == "folder":
        return Architecture(read_folder(Path(location.where)), f"folder {location.where}", None, location, model)
    if location.kind == "file":
        if model.config and Path(model.config).is_dir():
            return Architecture(read_folder(Path(model.config)), f"folder {model.config}", None, location, model)
        detected = published.detect(Path(location.where))
        if detected is None:
            raise ConfigError(
                f"{location.where}: not recognised as an SD1.x, SD2.x or SDXL checkpoint; name a folder in model.config"
            )
        return named(detected, f"header of {location.where}: {detected!r}")
    config = cached_config(location.where, model.revision)
    if config is not None:
        return Architecture(read_folder(config), f"hub cache of {location.where}", None, location, model)
    name = assume(model)
    why = f"{location.where} is not on this machine; the published architecture {name!r} is assumed"
    return named(name, f"published architecture {name!r}", why)


def assume(model: ModelConfig) -> str:
    """The published architecture that a family and a name suggest.

    Raises:
        ConfigError: none that is known here.
    """
    name = model.pretrained.lower()
    found: str | None = None
    if model.family == "sd":
        if not any(part in name for part in ("2-1", "2.1", "2-base", "diffusion-2")):
            return "sd15"
        return "sd21-base" if "base" in name else "sd21"
    for hint, architecture in HINTS.get(model.family, ()):
        if hint in name:
            found = architecture
            break
    if found is None:
        raise ConfigError(
            f"model.family {model.family!r}: {model.pretrained!r} is not on this machine and no architecture is known for "
            "it; download it or name a local folder"
        )
    return found


def _published(name: str) -> dict[str, dict[str, Any]]:
    configs = published.component_configs(name)
    return {component: configs[component] for component in published.weight_components(name)}


def read_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """The component configs of a diffusers pipeline folder.

    Raises:
        ConfigError: a missing or unreadable config.
    """
    index = _read_json(folder / "model_index.json")
    held = (*published.NETWORK_PARTS, "vae")
    names = [n for n in index if n in held or n.startswith("text_encoder")]
    missing = {"vae", "text_encoder"} - set(names)
    if not set(published.NETWORK_PARTS) & set(names):
        missing.add("unet or transformer")
    if missing:
        raise ConfigError(
            f"{folder}: model_index.json has no {', '.join(sorted(missing))}; expected a text-to-image or -video pipeline"
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
    networks = [part for part in published.NETWORK_PARTS if (folder / part / "config.json").is_file()]
    complete = networks and all((folder / name / "config.json").is_file() for name in ("vae", "text_encoder"))
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
