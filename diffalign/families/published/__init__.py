"""Published architectures without their weights: shapes, parameter counts, random networks, offline config folders.

One JSON file per architecture beside this module holds the component configs of the published pipeline; a component that
several of them have is a name in `components.json`. They are what `plan` counts, what random-weight tests and benchmarks
run, and, for Stable Diffusion 1 and 2 and SDXL, what a single-file checkpoint is loaded with when nothing can be
downloaded. "sd15" is Stable Diffusion 1.5; "sd21-base": 2.1, epsilon, 512 px; "sd21": 2.1, v-prediction, 768 px; "sdxl":
SDXL base 1.0; the other names are what they say.

Parameters of the networks, counted here, and whether a public source says the same (positions that are stored as buffers
are not parameters; published file sizes include them for SD3: 2,084,951,104 and 2,469,663,936 for the two medium ones):

| architecture | parameters | |
| --- | --- | --- |
| sd3-medium | 2,028,328,000 | confirmed |
| sd35-medium | 2,243,171,520 | confirmed, with its buffer |
| sd35-large | 8,056,627,520 | config confirmed, count UNVERIFIED |
| flux1-dev | 11,901,408,320 | confirmed |
| flux1-schnell | 11,891,178,560 | confirmed |
| pixart-sigma | 610,856,096 | confirmed |
| sana-1.6b | 1,604,462,752 | config confirmed, count UNVERIFIED |
| qwen-image | 20,430,401,088 | confirmed |
| wan21-t2v-1.3b | 1,418,996,800 | confirmed |
| wan21-t2v-14b | 14,288,491,584 | confirmed |
| cogvideox-2b | 1,693,783,872 | confirmed |
| cogvideox-5b | 5,570,283,072 | confirmed |

Text encoders: T5-XXL 4,762,310,656; UMT5-XXL 5,680,910,336; Gemma 2 2B 2,614,341,888; Qwen2.5-VL 7B 8,292,166,656.
Autoencoders: 16 channels 83,819,683 (SD3, FLUX); DC-AE 312,250,275; Wan and Qwen-Image 126,892,531; CogVideoX
215,583,907. All confirmed.

CLIP tokenizers come from the merges file that open_clip ships. T5, Gemma and Qwen tokenizers cannot be shipped: random
weights have a `stand_in_tokenizer` in their place.
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
NAMES = (
    "sd15",
    "sd21-base",
    "sd21",
    "sdxl",
    "sd3-medium",
    "sd35-medium",
    "sd35-large",
    "flux1-dev",
    "flux1-schnell",
    "pixart-sigma",
    "sana-1.6b",
    "qwen-image",
    "wan21-t2v-1.3b",
    "wan21-t2v-14b",
    "cogvideox-2b",
    "cogvideox-5b",
)
NETWORK_PARTS = ("unet", "transformer")  # what pipelines call their network
MAX_TOKENS = 77  # CLIP's context, start and end tokens included
START, END = "<|startoftext|>", "<|endoftext|>"
TEXT_ENCODERS = (
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "Gemma2Model",
    "Qwen2_5_VLForConditionalGeneration",
    "T5EncoderModel",
    "UMT5EncoderModel",
)
DIFFUSERS_CLASSES = (
    "AutoencoderDC",
    "AutoencoderKL",
    "AutoencoderKLCogVideoX",
    "AutoencoderKLQwenImage",
    "AutoencoderKLWan",
    "CogVideoXTransformer3DModel",
    "FluxTransformer2DModel",
    "PixArtTransformer2DModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
    "SanaTransformer2DModel",
    "UNet2DConditionModel",
    "WanTransformer3DModel",
)
# Names of a class that the published weights of PixArt carry, from before it had one of its own.
_RENAMED = {"Transformer2DModel": "PixArtTransformer2DModel"}


def component_configs(name: str) -> dict[str, dict[str, Any]]:
    """The configs of an architecture by component: `model_index`, `unet` or `transformer`, `vae`, `scheduler`, ...

    Raises:
        ConfigError: no such architecture.
    """
    if name not in NAMES:
        raise ConfigError(f"architecture {name!r} not found{did_you_mean(name, NAMES)} Available: {', '.join(NAMES)}")
    parts = _read(name)
    shared = _read("components") if any(isinstance(config, str) for config in parts.values()) else {}
    return {part: shared[config] if isinstance(config, str) else config for part, config in parts.items()}


def _read(name: str) -> dict[str, Any]:
    return dict(json.loads(resources.files(__package__).joinpath(f"{name}.json").read_text(encoding="utf-8")))


def network_part(configs: Iterable[str]) -> str:
    """Which of some components is the network: `unet` or `transformer`."""
    return next(part for part in configs if part in NETWORK_PARTS)


def weight_components(name: str) -> list[str]:
    """The components that hold weights: `unet` or `transformer`, `vae`, `text_encoder`, `text_encoder_2`, ..."""
    held = (*NETWORK_PARTS, "vae")
    return [key for key in component_configs(name) if key in held or key.startswith("text_encoder")]


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
        component: "unet" or "transformer", "vae", "text_encoder", "text_encoder_2", ...
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
        ConfigError: a class that is none of `DIFFUSERS_CLASSES`, `TEXT_ENCODERS`, or the tiny codec.
    """
    if device == "meta":
        with torch.device("meta"):
            module = _construct(config).eval()
        _cast(module, dtype)
        return module
    from accelerate import init_empty_weights
    from transformers import PreTrainedModel

    with init_empty_weights(include_buffers=False):  # positions and frequencies are computed, weights are not
        module = _construct(config).eval()
    if isinstance(module, PreTrainedModel):
        module.tie_weights()  # making it without weights has untied them
    _cast(module, dtype)
    _fill(module, torch.Generator(device).manual_seed(seed))
    return module.to(device)


def _construct(config: dict[str, Any]) -> nn.Module:
    if "architectures" in config:
        import transformers

        class_name = str(config["architectures"][0])
        if class_name not in TEXT_ENCODERS:
            expected = ", ".join(TEXT_ENCODERS)
            raise ConfigError(f"text encoder class {class_name!r} is not supported; expected one of {expected}")
        cls = getattr(transformers, class_name)
        return cls(cls.config_class.from_dict(config))  # type: ignore[no-any-return]
    class_name = str(config.get("_class_name"))
    class_name = _RENAMED.get(class_name, class_name)
    if class_name == "PatchVAE":
        from diffalign.world.codec import PatchVAE

        return PatchVAE.from_config(config)  # type: ignore[no-any-return]
    import diffusers

    if class_name not in DIFFUSERS_CLASSES:
        expected = ", ".join(DIFFUSERS_CLASSES)
        raise ConfigError(f"component class {class_name!r} is not supported; expected one of {expected}")
    return getattr(diffusers, class_name).from_config(config)  # type: ignore[no-any-return]


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Types as `from_pretrained` gives them: some layers stay float32, and so does what is computed at the start."""
    from diffusers import ModelMixin

    kept: set[str] = set()
    if isinstance(module, ModelMixin):
        kept.update(type(module)._keep_in_fp32_modules or ())
    for path, owner in module.named_modules():
        for name, weight in owner.named_parameters(recurse=False):
            if not kept & {*path.split("."), name}:
                weight.data = weight.data.to(dtype)
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in owner._non_persistent_buffers_set:
                owner._buffers[name] = buffer.to(dtype)


@torch.no_grad()
def _fill(module: nn.Module, generator: torch.Generator) -> None:
    """Variance-preserving uniform weights, unit norms, zero biases: outputs stay finite through SDXL's depth."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # weights that two layers share stay shared
    for owner in module.modules():
        for name, empty in owner.named_parameters(recurse=False):
            if id(empty) not in made:
                weight = torch.empty_like(empty, device=generator.device)
                _draw(owner, name, weight, generator)
                made[id(empty)] = empty, nn.Parameter(weight, requires_grad=empty.requires_grad)
            owner._parameters[name] = made[id(empty)][1]


def _draw(owner: nn.Module, name: str, weight: torch.Tensor, generator: torch.Generator) -> None:
    kind = type(owner).__name__
    if sum(size > 1 for size in weight.shape) < 2 and (weight.ndim < 2 or "norm" in kind.lower()):
        # Gemma's norms multiply by 1 + weight.
        scales = name in ("weight", "gamma") and "norm" in kind.lower() and not kind.startswith("Gemma")
        weight.fill_(1.0 if scales else 0.0)
    elif isinstance(owner, nn.Embedding):
        weight.uniform_(-0.03, 0.03, generator=generator)
    else:
        bound = math.sqrt(3 / weight[0].numel())  # standard deviation 1 / sqrt(fan in)
        weight.uniform_(-bound, bound, generator=generator)


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


@cache
def _byte_tokens() -> tuple[str, ...]:
    from tokenizers.pre_tokenizers import ByteLevel

    return tuple(_byte_order(set(ByteLevel.alphabet())))


def stand_in_tokenizer(config: dict[str, Any]) -> Any:
    """The stand-in tokenizer: one token per byte of the text, in place of one that cannot be shipped.

    It has the special tokens of the published tokenizer, but neither its vocabulary nor its numbers: random weights have
    not learnt any. For trained weights it would be wrong.

    Args:
        config: `stand_in` (names of special tokens), `model_max_length`; `starts` and `ends`, tokens that every text gets.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = list(config["stand_in"].values())
    numbers = {token: number for number, token in enumerate((*special, *_byte_tokens()))}
    backend = Tokenizer(models.BPE(numbers, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    around = [config[side] for side in ("starts", "ends") if side in config]
    if around:
        template = " ".join([*(config.get("starts", "").split()), "$A", *(config.get("ends", "").split())])
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, numbers[token]) for token in around]
        )
    known = {name: token for name, token in config["stand_in"].items() if name.endswith("_token")}
    extra = [token for name, token in config["stand_in"].items() if name not in known]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=config["model_max_length"],
        additional_special_tokens=extra,
        **known,
    )


def config_folder(name: str, dest: Path) -> Path:
    """Write a diffusers pipeline folder with every config and CLIP tokenizer, but no weights.

    `from_single_file(checkpoint, config=folder)` loads with it offline, where there are no other tokenizers.

    Returns:
        `dest`.
    """
    configs = component_configs(name)
    # model_index.json comes last: whoever finds it finds the whole folder.
    for component, config in sorted(configs.items(), key=lambda item: item[0] == "model_index"):
        if component.startswith("tokenizer"):
            if "stand_in" not in config:
                write_tokenizer(dest / component, config["pad_token"])
            continue
        folder = dest if component == "model_index" else dest / component
        folder.mkdir(parents=True, exist_ok=True)
        file = {"model_index": "model_index.json", "scheduler": "scheduler_config.json"}.get(component, "config.json")
        (folder / file).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return dest


def light_components(name: str, wanted: Iterable[str]) -> dict[str, Any]:
    """Tokenizers (or their stand-ins) and scheduler of an architecture, ready to use.

    Args:
        name: an architecture of `NAMES`.
        wanted: some of "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler".
    """
    import diffusers
    from transformers import CLIPTokenizer

    configs = component_configs(name)
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for component in wanted:
            config = configs[component]
            if component == "scheduler":
                parts[component] = getattr(diffusers, config["_class_name"]).from_config(config)
            elif "stand_in" in config:
                parts[component] = stand_in_tokenizer(config)
            else:
                folder = write_tokenizer(Path(temporary) / component, config["pad_token"])
                parts[component] = CLIPTokenizer.from_pretrained(folder)
    return parts


def is_light(component: str) -> bool:
    """Whether a component has no weights: tokenizers and the scheduler."""
    return component.startswith("tokenizer") or component == "scheduler"


def random_pipeline(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A stock diffusers pipeline of an architecture with random weights on the CPU, tokenizers included."""
    import diffusers

    configs = component_configs(name)
    parts: dict[str, Any] = {
        component: build_component(name, component, dtype=dtype, seed=seed) for component in weight_components(name)
    }
    parts |= light_components(name, filter(is_light, configs))
    cls = getattr(diffusers, configs["model_index"]["_class_name"])
    plain: dict[str, dict[str, Any]] = {
        "StableDiffusionPipeline": {
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        },
        "StableDiffusionXLPipeline": {"add_watermarker": False},
    }
    return cls(**parts, **plain.get(cls.__name__, {}))


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
