"""Names and metadata of LoRA files as other programs write them: kohya's trainers, ModelSpec, the models' own code.

Every family has a diffusers file: `unet.` or `transformer.`, the layer's path, `lora_A` and `lora_B`. Most have a second
one in kohya's naming, `lora_unet_` and the path with underscores; `FORMATS` has what is particular to each:

| family | the second file's paths are | read by |
| --- | --- | --- |
| sd | the diffusers ones | sd-scripts, ComfyUI, web UIs, diffusers |
| sdxl | the original code's ("sgm": `input_blocks_4_1_...`) | sd-scripts, ComfyUI, web UIs, diffusers |
| sd3 | the original code's, q, k and v in one | sd-scripts, ComfyUI; not diffusers, which has no converter |
| flux | the original code's, q, k, v (and the single blocks' MLP) in one | sd-scripts, ComfyUI, diffusers |
| qwen_image | the diffusers ones | musubi-tuner, ComfyUI, diffusers |
| wan | the original code's | musubi-tuner, ComfyUI; diffusers if attention and feed-forward are both there |
| pixart, sana, cogvideox | none: no program has a convention for them | |

ComfyUI also reads the diffusers file of SD3, FLUX, Qwen-Image and PixArt, but not its metadata: it takes alpha = rank.
diffusers has no LoRA loader for PixArt: `diffalign.export.load_lora` puts the file into the transformer. What is said of
ComfyUI, sd-scripts and musubi-tuner is from reading their code; none of them was run.

Adapters of text encoders go into the same two files: `text_encoder.text_model.` and `text_encoder_2.text_model.` and the
layer's path, whether this version of transformers has a `text_model` in it or not, and `lora_te_` (sd) or `lora_te1_` and
`lora_te2_` (sdxl, sd3). diffusers converts SDXL's and SD1.x's second file with them, by its code.

Layers that the original code has as one are written as one: factors A on top of each other, factors B in a block
diagonal, ranks filled up with zeros to the largest. That is exact, and diffusers takes it apart again exactly.

The sgm numbers are counted off the network at hand, so any number of levels and layers per block can be written and read
here; **other programs know only the published SDXL layout** (3 levels, 2 layers per block).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from diffalign import adapters

# Inside a residual block, and around the blocks: diffusers name -> sgm name.
_SGM_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_SGM_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}

# Inside a block, diffusers name -> the original code's. Several names: one layer there.
_SD3_BLOCK = {
    "attn.to_q attn.to_k attn.to_v": "x_block.attn.qkv",
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_q attn2.to_k attn2.to_v": "x_block.attn2.qkv",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "attn.add_q_proj attn.add_k_proj attn.add_v_proj": "context_block.attn.qkv",
    "attn.to_add_out": "context_block.attn.proj",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
}
_FLUX_DOUBLE = {
    "attn.to_q attn.to_k attn.to_v": "img_attn.qkv",
    "attn.to_out.0": "img_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "norm1.linear": "img_mod.lin",
    "attn.add_q_proj attn.add_k_proj attn.add_v_proj": "txt_attn.qkv",
    "attn.to_add_out": "txt_attn.proj",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "norm1_context.linear": "txt_mod.lin",
}
_FLUX_SINGLE = {
    "attn.to_q attn.to_k attn.to_v proj_mlp": "linear1",
    "proj_out": "linear2",
    "norm.linear": "modulation.lin",
}
_WAN_BLOCK = {
    **{f"attn1.{ours}": f"self_attn.{theirs}" for ours, theirs in zip(("to_q", "to_k", "to_v"), "qkv", strict=True)},
    **{f"attn2.{ours}": f"cross_attn.{theirs}" for ours, theirs in zip(("to_q", "to_k", "to_v"), "qkv", strict=True)},
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}

# Facts of the run that other programs show, under their names.
_KOHYA_FACTS = {
    "base": "ss_sd_model_name",
    "comment": "ss_training_comment",
    "epoch": "ss_epoch",
    "learning_rate": "ss_learning_rate",
    "optimizer": "ss_optimizer",
    "seed": "ss_seed",
    "steps": "ss_steps",
}
_MODELSPEC_FACTS = ("author", "date", "description", "license", "tags", "title", "trigger_phrase", "usage_hint")


@dataclass(frozen=True)
class Format:
    """What the LoRA files of a family are like.

    Attributes:
        prefix: of layer paths in the diffusers file.
        blocks: diffusers name of a row of blocks -> the original code's, and what the layers in it are called there; None
            for families with rules of their own, and for those without a second file.
        module: `ss_network_module`, by which kohya's trainers know their files; None: there is no second file.
        base: `ss_base_model_version`, of a network.
        spec: ModelSpec's name of the architecture, the usual side of its images, and the implementation; of a network and
            the facts of the run. Names that no other program writes are the last three families' and our own.
    """

    prefix: str
    spec: Callable[[nn.Module, Mapping[str, str]], tuple[str, int, str]]
    blocks: Mapping[str, tuple[str, Mapping[str, str]]] | None = None
    module: str | None = None
    base: Callable[[nn.Module], str] = lambda network: ""


_GENERATIVE_MODELS = "https://github.com/Stability-AI/generative-models"


def _sd_spec(network: nn.Module, facts: Mapping[str, str]) -> tuple[str, int, str]:
    if not _is_sd2(network):
        return "stable-diffusion-v1", 512, "diffusers"
    v = facts.get("prediction_type") == "v_prediction"
    return ("stable-diffusion-v2-768-v", 768, "diffusers") if v else ("stable-diffusion-v2-512", 512, "diffusers")


def _sd3_spec(network: nn.Module, facts: Mapping[str, str]) -> tuple[str, int, str]:
    """sd-scripts': "-m" is SD3 medium; the two of 3.5 are told apart by their second attention."""
    config: Any = network.config
    kind = "m" if not config.qk_norm else "5-medium" if config.dual_attention_layers else "5-large"
    return f"stable-diffusion-3-{kind}", 1024, "diffusers"


def _flux_spec(network: nn.Module, facts: Mapping[str, str]) -> tuple[str, int, str]:
    config: Any = network.config
    name = "flux-1-dev" if config.guidance_embeds else "flux-1-schnell"
    return name, 1024, "https://github.com/black-forest-labs/flux"


def _always(name: str, side: int, implementation: str) -> Callable[..., tuple[str, int, str]]:
    return lambda network, facts: (name, side, implementation)


FORMATS: Mapping[str, Format] = {
    "sd": Format("unet", _sd_spec, module="networks.lora", base=lambda n: "sd_v2" if _is_sd2(n) else "sd_v1"),
    "sdxl": Format(
        "unet",
        _always("stable-diffusion-xl-v1-base", 1024, _GENERATIVE_MODELS),
        module="networks.lora",
        base=lambda n: "sdxl_base_v1-0",
    ),
    "sd3": Format(
        "transformer",
        _sd3_spec,
        {"transformer_blocks": ("joint_blocks", _SD3_BLOCK)},
        "networks.lora_sd3",
        lambda n: "sd3",
    ),
    "flux": Format(
        "transformer",
        _flux_spec,
        {
            "transformer_blocks": ("double_blocks", _FLUX_DOUBLE),
            "single_transformer_blocks": ("single_blocks", _FLUX_SINGLE),
        },
        "networks.lora_flux",
        lambda n: "flux1",
    ),
    "qwen_image": Format(
        "transformer",
        _always("Qwen-Image", 1024, "https://github.com/QwenLM/Qwen-Image"),
        module="networks.lora_qwen_image",
        base=lambda n: "qwen_image",
    ),
    "wan": Format(
        "transformer",
        _always("wan2.1", 480, "https://github.com/Wan-Video/Wan2.1"),
        {"blocks": ("blocks", _WAN_BLOCK)},
        "networks.lora_wan",
        lambda n: "wan",
    ),
    "pixart": Format("transformer", _always("pixart-sigma", 1024, "diffusers")),
    "sana": Format("transformer", _always("sana", 1024, "diffusers")),
    "cogvideox": Format("transformer", _always("cogvideox", 480, "diffusers")),
}


def format_of(network: nn.Module, family: str) -> Format:
    """The format of a family's files; of a user's own family, a plain diffusers file by the kind of its network."""
    if family in FORMATS:
        return FORMATS[family]
    prefix = "unet" if type(network).__name__.startswith("UNet") else "transformer"
    return Format(prefix, _always(Path(family).stem, 1024, "diffusers"))


# Beginnings of kohya's names of text encoders' layers, by family and part.
KOHYA_TEXT: Mapping[str, Mapping[str, str]] = {
    "sd": {"text_encoder": "lora_te"},
    "sdxl": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "sd3": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
}
# What the keys of a text encoder's layers begin with, in either style -> the part.
TEXT_KEYS: Mapping[str, str] = {
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
TEXT_MODEL = "text_model."  # around a CLIP text model's layers in every file; in the module, by version of transformers


def text_part(key: str) -> str | None:
    """The text encoder that a file's key is about; None: the network."""
    return next((part for prefix, part in TEXT_KEYS.items() if key.startswith(prefix)), None)


def text_kohya_names(encoder: nn.Module, family: str, part: str) -> dict[str, str]:
    """Kohya module names of a text encoder's layers by path; none where the family has no such naming.

    Args:
        encoder: with or without adapters.
        family: of `FORMATS`.
        part: "text_encoder" or "text_encoder_2".
    """
    prefix = KOHYA_TEXT.get(family, {}).get(part)
    if prefix is None:
        return {}
    return {
        path: f"{prefix}_{TEXT_MODEL}{path.removeprefix(TEXT_MODEL)}".replace(".", "_")
        for path in adapters.base_layers(encoder)
    }


def kohya_names(network: nn.Module, family: str) -> dict[str, str]:
    """Kohya module names by layer path, for every linear and convolution layer that has one.

    Args:
        network: with or without adapters.
        family: of `FORMATS`.
    """
    return {path: name for name, paths in kohya_layers(network, family).items() for path in paths}


def kohya_layers(network: nn.Module, family: str) -> dict[str, tuple[str, ...]]:
    """Layer paths by kohya module name; several where the original code has one layer, in its order.

    Args:
        network: with or without adapters.
        family: of `FORMATS`; one without a second file has none.
    """
    layout, paths = format_of(network, family), list(adapters.base_layers(network))
    if layout.module is None:
        return {}
    if layout.blocks is not None:
        return _native_layers(paths, layout.blocks)
    names: dict[str, str | None] = {path: path for path in paths}
    if family == "sdxl":
        blocks = _sgm_blocks(network)
        names = {path: _sgm_name(path, blocks) for path in names}
    return {f"lora_unet_{name.replace('.', '_')}": (path,) for path, name in names.items() if name is not None}


def _native_layers(paths: list[str], rows: Mapping[str, tuple[str, Mapping[str, str]]]) -> dict[str, tuple[str, ...]]:
    found = {}
    for row, (theirs, names) in rows.items():
        numbers = {int(path.split(".")[1]) for path in paths if path.startswith(f"{row}.")}
        for number in sorted(numbers):
            for ours, name in names.items():
                layers = tuple(f"{row}.{number}.{part}" for part in ours.split())
                if all(layer in paths for layer in layers):
                    found[f"lora_unet_{theirs}_{number}_{name.replace('.', '_')}"] = layers
    return found


def halves_swapped(network: nn.Module, family: str, path: str) -> bool:
    """Whether a layer's output has its halves the other way round in the original code: shift, scale for scale, shift.

    That is so of SD3's last modulation of text, as diffusers' converter of checkpoints has it.
    """
    if family != "sd3":
        return False
    config: Any = network.config
    return path == f"transformer_blocks.{config.num_layers - 1}.norm1_context.linear"


def _sgm_blocks(network: nn.Module) -> dict[str, str]:
    """diffusers block -> sgm block. sgm numbers residual blocks and downsamplers in one row; upsamplers have none."""
    modules = {name for name, _ in network.named_modules()}
    blocks = {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for side, row, number in (("down_blocks", "input_blocks", 1), ("up_blocks", "output_blocks", 0)):
        level = 0
        while f"{side}.{level}" in modules:
            here, layer = f"{side}.{level}", 0
            while f"{here}.resnets.{layer}" in modules:
                blocks[f"{here}.resnets.{layer}"] = f"{row}.{number}.0"
                blocks[f"{here}.attentions.{layer}"] = f"{row}.{number}.1"
                number, layer = number + 1, layer + 1
            if f"{here}.downsamplers.0" in modules:
                blocks[f"{here}.downsamplers.0.conv"] = f"{row}.{number}.0.op"
                number += 1
            # an upsampler is the last part of the block that precedes it
            place = 2 if f"{here}.attentions.0" in modules else 1
            blocks[f"{here}.upsamplers.0.conv"] = f"{row}.{number - 1}.{place}.conv"
            level += 1
    return blocks


def _sgm_name(path: str, blocks: Mapping[str, str]) -> str | None:
    if path in _SGM_OUTSIDE:
        return _SGM_OUTSIDE[path]
    match = re.match(
        r"(?:(?:down|up)_blocks\.\d+|mid_block)\.(?:(resnets|attentions)\.\d+|(?:down|up)samplers\.0\.conv)", path
    )
    if match is None or match.group() not in blocks:
        return None
    block, rest = blocks[match.group()], path[match.end() + 1 :]
    if match.group(1) == "resnets":
        return f"{block}.{_SGM_RESNET[rest]}" if rest in _SGM_RESNET else None
    return f"{block}.{rest}" if rest else block


def kohya_metadata(
    network: nn.Module,
    family: str,
    facts: Mapping[str, str],
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> dict[str, str]:
    """What kohya's trainer writes (`ss_*`), as far as it is known here, and the hashes that web UIs index by."""
    layout = format_of(network, family)
    base = layout.base(network)
    alpha = settings["lora_alpha"] * (settings["r"] ** 0.5 if settings["use_rslora"] else 1)
    arguments = {}
    if any(tensor.ndim == 4 and tensor.shape[-1] > 1 for tensor in tensors.values()):
        arguments = {"conv_dim": str(settings["r"]), "conv_alpha": str(alpha)}
    result = {
        "ss_v2": str(base == "sd_v2"),
        "ss_base_model_version": base,
        "ss_network_module": layout.module or "networks.lora",
        "ss_network_dim": str(settings["r"]),
        "ss_network_alpha": str(alpha),
        "ss_network_args": json.dumps(arguments),
    }
    result |= {theirs: facts[key] for key, theirs in _KOHYA_FACTS.items() if key in facts}
    if "resolution" in facts:
        result["ss_resolution"] = f"({facts['resolution']}, {facts['resolution']})"
    # sd-webui-additional-networks' two hashes: all bytes after the header, and 64 KiB at 1 MiB of a file that has only
    # the ss_ metadata.
    content = safetensors.torch.save(dict(tensors), result)
    start = 8 + int.from_bytes(content[:8], "little")
    result["sshs_model_hash"] = hashlib.sha256(content[start:]).hexdigest()
    result["sshs_legacy_hash"] = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    return result


def modelspec_metadata(
    network: nn.Module, family: str, facts: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """ModelSpec 1.0.1, the fields that are known; the hash is over the numbers of the file's tensors, in order."""
    architecture, usual, implementation = format_of(network, family).spec(network, facts)
    side = facts.get("resolution", str(usual))
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.numpy().tobytes())
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{architecture}/lora",
        "implementation": implementation,
        "title": facts.get("objective", "preference") + " LoRA",
        "resolution": f"{side}x{side}",
        "hash_sha256": f"0x{digest.hexdigest()}",
    }
    known = {"v_prediction": "v", "epsilon": "epsilon"}  # ModelSpec has none for flow models
    if facts.get("prediction_type") in known:
        spec["prediction_type"] = known[facts["prediction_type"]]
    spec |= {key: facts[key] for key in _MODELSPEC_FACTS if key in facts}
    return {f"modelspec.{key}": value for key, value in spec.items()}


def _is_sd2(network: nn.Module) -> bool:
    config: Any = network.config
    return bool(config.cross_attention_dim == 1024)  # SD2's OpenCLIP-H; SD1's CLIP-L has 768
