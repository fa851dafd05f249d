"""Names and metadata of LoRA files as other programs write them: kohya's sd-scripts, ModelSpec, the original SDXL code.

Kohya names of SDXL are those of the original code ("sgm": `lora_unet_input_blocks_4_1_...`), of SD1/SD2 the diffusers
path with underscores. The sgm numbers are counted off the network at hand, so any number of levels and layers per block
can be written and read here; **other programs know only the published SDXL layout** (3 levels, 2 layers per block).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
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


def kohya_names(network: nn.Module, family: str) -> dict[str, str]:
    """Kohya module names by layer path, for every linear and convolution layer that has one.

    Args:
        network: a UNet, with or without adapters.
        family: "sdxl" gives sgm names, "sd" diffusers names.
    """
    names: dict[str, str | None] = {path: path for path in adapters.base_layers(network)}
    if family == "sdxl":
        blocks = _sgm_blocks(network)
        names = {path: _sgm_name(path, blocks) for path in names}
    return {path: f"lora_unet_{name.replace('.', '_')}" for path, name in names.items() if name is not None}


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
    base = "sdxl_base_v1-0" if family == "sdxl" else "sd_v2" if _is_sd2(network) else "sd_v1"
    alpha = settings["lora_alpha"] * (settings["r"] ** 0.5 if settings["use_rslora"] else 1)
    arguments = {}
    if any(tensor.ndim == 4 and tensor.shape[-1] > 1 for tensor in tensors.values()):
        arguments = {"conv_dim": str(settings["r"]), "conv_alpha": str(alpha)}
    result = {
        "ss_v2": str(base == "sd_v2"),
        "ss_base_model_version": base,
        "ss_network_module": "networks.lora",
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
    v = facts.get("prediction_type") == "v_prediction"
    if family == "sdxl":
        architecture, side = "stable-diffusion-xl-v1-base", "1024"
    elif _is_sd2(network):
        architecture, side = ("stable-diffusion-v2-768-v", "768") if v else ("stable-diffusion-v2-512", "512")
    else:
        architecture, side = "stable-diffusion-v1", "512"
    side = facts.get("resolution", side)
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.numpy().tobytes())
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{architecture}/lora",
        "implementation": "https://github.com/Stability-AI/generative-models" if family == "sdxl" else "diffusers",
        "title": facts.get("objective", "preference") + " LoRA",
        "resolution": f"{side}x{side}",
        "hash_sha256": f"0x{digest.hexdigest()}",
    }
    if "prediction_type" in facts:
        spec["prediction_type"] = "v" if v else "epsilon"
    spec |= {key: facts[key] for key in _MODELSPEC_FACTS if key in facts}
    return {f"modelspec.{key}": value for key, value in spec.items()}


def _is_sd2(network: nn.Module) -> bool:
    config: Any = network.config
    return bool(config.cross_attention_dim == 1024)  # SD2's OpenCLIP-H; SD1's CLIP-L has 768
