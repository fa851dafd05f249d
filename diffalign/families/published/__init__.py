"""Published architectures without their weights: shapes, parameter counts, random networks, offline config folders.

One JSON file per architecture beside this module holds the component configs of the published pipeline ("sd15": Stable
Diffusion 1.5; "sd21-base": 2.1, epsilon, 512 px; "sd21": 2.1, v-prediction, 768 px; "sdxl": SDXL base 1.0). They are
what `plan` counts, what random-weight tests and benchmarks run, and what a single-file checkpoint is loaded with
when nothing can be downloaded. CLIP tokenizers come from the merges file that open_clip ships.
"""

from __future__ import annotations

import gzip
import json
import math
import tempfile
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffalign.errors import ConfigError, did_you_mean

VERSION = 1  # of the JSON files; part of the name of folders written from them
NAMES = ("sd15", "sd21-base", "sd21", "sdxl")
MAX_TOKENS = 77  # CLIP's context, start and end tokens included
START, END = "<|startoftext|>", "<|endoftext|>"


def component_configs(name: str) -> dict[str, dict[str, Any]]:
    """The configs of an architecture by component: `model_index`, `unet`, `vae`, `text_encoder`, `scheduler`, ...

    Raises:
        ConfigError: no such architecture.
    """
    if name not in NAMES:
        raise ConfigError(f"architecture {name!r} not found{did_you_mean(name, NAMES)} Available: {', '.join(NAMES)}")
    text = resources.files(__package__).joinpath(f"{name}.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def weight_components(name: str) -> list[str]:
    """The components that hold weights: `unet`, `vae`, `text_encoder` and, for SDXL, `text_encoder_2`."""
    return [key for key in component_configs(name) if key == "unet" or key == "vae" or key.startswith("text_encoder")]


def build_component(
    name: str,
    component: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> nn.Module:
    """A component with random weights, in evaluation mode.

    Args:
        name: an architecture of `NAMES`.
        component: "unet", "vae", "text_encoder" or "text_encoder_2".
        device: "cpu", or "meta" for shapes without memory. On the CPU the weights are written straight in `dtype`:
            no float32 copy exists at any time.
        dtype: of the weights.
        seed: the same seed gives the same weights on every machine with the same torch; the global generator is
            not touched. Unused on "meta".

    Raises:
        ConfigError: no such architecture or component.
    """
    configs = component_configs(name)
    if component not in weight_components(name):
        raise ConfigError(
            f"architecture {name!r} has no weights called {component!r}; it has {', '.join(weight_components(name))}"
        )
    return build_from_config(configs[component], device=device, dtype=dtype, seed=seed)


def build_from_config(
    config: dict[str, Any], *, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Module:
    """As `build_component`, for any component config of a diffusers pipeline folder.

    Raises:
        ConfigError: a class that is no diffusers UNet or VAE, transformers CLIP text model, or tiny codec.
    """
    with torch.device("meta"):
        module = _construct(config).eval()
    nn.Module.to(module, dtype)  # not ModelMixin.to, which warns about casts it does not like
    if device == "meta":
        return module
    module.to_empty(device=device)
    _fill(module, torch.Generator(device).manual_seed(seed))
    return module


def _construct(config: dict[str, Any]) -> nn.Module:
    if "architectures" in config:
        import transformers

        classes = {"CLIPTextModel", "CLIPTextModelWithProjection"}
        class_name = str(config["architectures"][0])
        if class_name in classes:
            settings = transformers.CLIPTextConfig.from_dict(config)
            return getattr(transformers, class_name)(settings)  # type: ignore[no-any-return]
        raise ConfigError(f"text encoder class {class_name!r} is not supported; expected one of {sorted(classes)}")
    class_name = str(config.get("_class_name"))
    if class_name == "PatchVAE":
        from diffalign.world.codec import PatchVAE

        return PatchVAE.from_config(config)  # type: ignore[no-any-return]
    import diffusers

    supported = {"UNet2DConditionModel", "AutoencoderKL"}
    if class_name not in supported:
        raise ConfigError(f"component class {class_name!r} is not supported; expected one of {sorted(supported)}")
    return getattr(diffusers, class_name).from_config(config)  # type: ignore[no-any-return]


@torch.no_grad()
def _fill(module: nn.Module, generator: torch.Generator) -> None:
    """Variance-preserving uniform weights, unit norms, zero biases: outputs stay finite through SDXL's depth."""
    for owner in module.modules():
        is_norm = isinstance(owner, (nn.GroupNorm, nn.LayerNorm))
        for name, weight in owner.named_parameters(recurse=False):
            if weight.ndim < 2:
                weight.fill_(1.0 if is_norm and name == "weight" else 0.0)
            elif isinstance(owner, nn.Embedding):
                weight.uniform_(-0.03, 0.03, generator=generator)
            else:
                bound = math.sqrt(3 / weight[0].numel())  # standard deviation 1 / sqrt(fan in)
                weight.uniform_(-bound, bound, generator=generator)
        for name, buffer in owner.named_buffers(recurse=False):
            assert name == "position_ids", f"unknown buffer {name!r}: to_empty left it undefined"
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))


@cache
def _vocabulary() -> tuple[dict[str, int], tuple[str, ...]]:
    """CLIP's vocabulary and merges, from open_clip's copy of OpenAI's file."""
    from tokenizers.pre_tokenizers import ByteLevel

    file = resources.files("open_clip").joinpath("bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    # The first line is a version note; CLIP uses 49,152 entries less 256 bytes and 2 special tokens.
    merges = tuple(lines[1 : 49152 - 256 - 2 + 1])
    alphabet = _byte_order(set(ByteLevel.alphabet()))
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m.split()) for m in merges), START, END]
    return {token: index for index, token in enumerate(tokens)}, merges


def _byte_order(alphabet: set[str]) -> list[str]:
    """The 256 byte symbols in CLIP's order: printable Latin-1 first, then the stand-ins from U+0100 on.

    Sorting by code point is exactly that order.
    """
    assert len(alphabet) == 256, "a byte-level alphabet has one symbol per byte"
    return sorted(alphabet)


def write_tokenizer(folder: Path, pad_token: str = END) -> Path:
    """Write CLIP's tokenizer (77 tokens, 49,408 entries) as a transformers folder.

    Args:
        folder: created if missing.
        pad_token: "<|endoftext|>" (CLIP ViT-L) or "!" (the OpenCLIP encoders pad with id 0). As in the published
            tokenizers, "!" is then a special token, so that every exclamation mark of a text becomes id 0, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = _vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(("#version: 0.2", *merges)) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    settings = special | {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1), encoding="utf-8")
    return folder


def config_folder(name: str, dest: Path) -> Path:
    """Write a diffusers pipeline folder with every config and tokenizer, but no weights.

    `from_single_file(checkpoint, config=folder)` loads with it offline.

    Returns:
        `dest`.
    """
    configs = component_configs(name)
    # model_index.json comes last: whoever finds it finds the whole folder.
    for component, config in sorted(configs.items(), key=lambda item: item[0] == "model_index"):
        if component.startswith("tokenizer"):
            write_tokenizer(dest / component, config["pad_token"])
            continue
        folder = dest if component == "model_index" else dest / component
        folder.mkdir(parents=True, exist_ok=True)
        file = {"model_index": "model_index.json", "scheduler": "scheduler_config.json"}.get(component, "config.json")
        (folder / file).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return dest


def light_components(name: str, wanted: Iterable[str]) -> dict[str, Any]:
    """Tokenizers and scheduler of an architecture, ready to use.

    Args:
        name: an architecture of `NAMES`.
        wanted: some of "tokenizer", "tokenizer_2", "scheduler".
    """
    import diffusers
    from transformers import CLIPTokenizer

    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = config_folder(name, Path(temporary))
        for component in wanted:
            config = component_configs(name)[component]
            cls = CLIPTokenizer if component.startswith("tokenizer") else getattr(diffusers, config["_class_name"])
            parts[component] = cls.from_pretrained(folder, subfolder=component)
    return parts


def random_pipeline(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A stock diffusers pipeline of an architecture with random weights on the CPU, tokenizers included."""
    import diffusers

    configs = component_configs(name)
    parts: dict[str, Any] = {
        component: build_component(name, component, dtype=dtype, seed=seed) for component in weight_components(name)
    }
    parts |= light_components(name, configs.keys() & {"tokenizer", "tokenizer_2", "scheduler"})
    if configs["model_index"]["_class_name"] == "StableDiffusionXLPipeline":
        return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def detect(path: Path) -> str | None:
    """Which architecture a single-file `.safetensors` checkpoint holds, from its header alone (no tensor is read).

    Returns:
        "sd15" (any SD 1.x), "sd21-base" (any SD 2.x), "sdxl", or None for anything else: inpainting and refiner
        networks, LoRA files, other families. The weights of SD 2.x do not say whether they predict epsilon or v:
        pass `model.prediction_type: v_prediction` for a v checkpoint (they are trained at 768 px).

    Raises:
        ConfigError: not a readable safetensors file.
    """
    shapes = read_header(path)
    prefix = "model.diffusion_model."
    first = shapes.get(f"{prefix}input_blocks.0.0.weight")
    if first is None or first[1] != 4:
        return None
    # SDXL's first level has no cross-attention, so its first one sits lower. The width of its key says the rest.
    for block, width, name in ((1, 768, "sd15"), (1, 1024, "sd21-base"), (4, 2048, "sdxl")):
        key = shapes.get(f"{prefix}input_blocks.{block}.1.transformer_blocks.0.attn2.to_k.weight")
        if key is not None and key[-1] == width:
            return name
    return None


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a safetensors file.

    Raises:
        ConfigError: not a readable safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path}: not readable as a .safetensors checkpoint ({str(error).splitlines()[0]})"
        ) from error
