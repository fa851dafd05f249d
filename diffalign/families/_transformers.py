"""What families of diffusion transformers share: what they refuse, 2 x 2 packing of latents, masks that survive a cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.config import ModelConfig
from diffalign.errors import ConfigError


def check_architecture(config: Mapping[str, Any], family: str, *expected: str) -> None:
    """Refuse a network of another class.

    Args:
        config: the network's own; without a class name it passes.
        family: name of the family, for the message.
        expected: names of diffusers classes; the first is named.

    Raises:
        ConfigError: it is none of them.
    """
    found = config.get("_class_name", expected[0])
    if found not in expected:
        raise ConfigError(f"model.family is {family!r}, but this network is a {found}, expected {expected[0]}")


def check_channels(inputs: int, *outputs: int) -> None:
    """Refuse a network that takes more than noisy latents, as inpainting, control and editing networks do.

    Args:
        inputs: channels that it takes.
        outputs: channels that it may take, by what it returns.

    Raises:
        ConfigError: it takes another number of them.
    """
    if inputs not in outputs:
        raise ConfigError(
            f"this transformer takes {inputs} channels and returns {outputs[0]}, as inpainting and control networks do; "
            "expected a text-to-image network"
        )


def check_text_length(config: ModelConfig, longest: int | None = None) -> None:
    """Refuse a text length that the stock pipeline refuses.

    Raises:
        ConfigError: with what it takes.
    """
    length = config.max_sequence_length
    if length is not None and (length < 1 or (longest is not None and length > longest)):
        upto = "at least 1" if longest is None else f"1 to {longest}"
        raise ConfigError(f"model.max_sequence_length: got {length}; family {config.family!r} takes {upto} tokens")


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) to tokens of 2 x 2 latents, (B, h/2 * w/2, 4 C), row by row."""
    tokens = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, h/2, 2, w/2, 2)
    return tokens.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `pack`; `shape` is (B, C, h, w)."""
    height, width = shape[2] // 2, shape[3] // 2
    latents = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height, width))  # (B, h/2, w/2, C, 2, 2)
    return latents.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def stored(mask: Tensor) -> Tensor:
    """An attention mask of ones and zeros as float32: caches and batches keep conditioning as floating-point numbers."""
    return mask.float()


def restored(mask: Tensor) -> Tensor:
    """An attention mask as stock pipelines have it, int64, from a `stored` one of any floating-point type."""
    return mask.round().long()
