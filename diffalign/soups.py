"""Adapters added up by weight: "reward soups", whose weights are chosen when images are sampled.

    W + sum over k of  w_k s_k B_k A_k

Paper: "Rewarded soups", arXiv 2306.04488: one adapter per reward from the same base, interpolated. What is added are the
changes of the weights; means of the factors A and B would be something else, with products of one adapter's A with
another's B in it. The sum is exact, and is one LoRA again, whose rank is the sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign import adapters, export
from diffalign.adapters import lora_layers
from diffalign.config import RunConfig
from diffalign.delta_layers import delta_layers
from diffalign.errors import ConfigError
from diffalign.families import DenoisingFamily

MERGED = "merged"


@dataclass(frozen=True)
class Part:
    """An adapter and its weight.

    Attributes:
        path: LoRA file or run folder.
        weight: 1 is as trained.
    """

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Part:
        """PATH or PATH=WEIGHT.

        Raises:
            ConfigError: the weight is no number.
        """
        path, _, weight = text.rpartition("=")
        if not path:
            return cls(Path(text))
        try:
            return cls(Path(path), float(weight))
        except ValueError:
            raise ConfigError(f"--adapter: got {text!r}; expected PATH, or PATH=WEIGHT with a number") from None


def names_of(count: int) -> list[str]:
    """What the adapters of a mixture are called in the network."""
    return [f"part{number}" for number in range(count)]


def attach(family: DenoisingFamily, config: RunConfig, parts: Sequence[Part]) -> tuple[list[str], str]:
    """Attach adapters beside each other, all of them acting by weight; returns their names and their role.

    Args:
        family: with its network in memory.
        config: names the family.
        parts: at least one.

    Raises:
        CheckpointError: a file that does not fit.
        ConfigError: DoRA, gated experts or trained text encoders, which do not add up this way, or adapters for different
            branches of guidance.
    """
    names, roles = names_of(len(parts)), dict[str, Path]()
    for name, part in zip(names, parts, strict=True):
        if export.adapts_text(part.path):
            raise ConfigError(
                f"{part.path} has a part for text encoders; only the network's adapters are added up here"
            )
        info = export.load_lora(family.network, part.path, family=config.model.family, name=name, negative=True)
        roles[info.role] = part.path
        if "diffalign.partner" in info.metadata:
            raise ConfigError(
                f"{part.path} is one of two adapters that were trained together for the branches of guidance (CHATS): alone "
                "it is not what was trained; compare such runs with diffalign evaluate"
            )
        if info.style == "gated":
            raise ConfigError(f"{part.path} holds gated experts, which depend on the time and cannot be added up")
    for path, layer in lora_layers(family.network).items():
        if any(layer.use_dora.values()):
            raise ConfigError(f"an adapter of {path} is a DoRA, whose magnitudes do not add up; expected plain LoRA")
    if len(roles) > 1:
        said = " and ".join(f"{path} ({role})" for role, path in roles.items())
        raise ConfigError(f"{said} are for different branches of guidance, and do not add up")
    adapters.use_adapters(family.network, names, [part.weight for part in parts])
    return names, next(iter(roles))


def merge(network: nn.Module, names: Sequence[str], weights: Sequence[float]) -> str:
    """Add a LoRA that does what several do together; returns its name.

    Args:
        network: with the adapters attached.
        names, weights: of the adapters.
    """
    ranks: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    if changed := {name for layer in delta_layers(network).values() for name in layer.scaling} & set(names):
        raise ConfigError(
            f"{', '.join(sorted(changed))}: changed weights (SaRA, LIFT, HFT) have no rank, and no LoRA does what they do; "
            "merge LoRA files alone"
        )
    layers: dict[str, Any] = dict(lora_layers(network))
    for path, layer in layers.items():
        here = [(name, weight) for name, weight in zip(names, weights, strict=True) if name in layer.lora_A]
        if not here:
            continue
        down = [layer.lora_A[name].weight.detach().float() for name, _ in here]
        # The trained scale, not the layer's own number, in which `use_adapters` keeps a weight.
        up = [w * adapters.scale(layer, name) * layer.lora_B[name].weight.detach().float() for name, w in here]
        tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = torch.cat(down), torch.cat(up, 1)
        ranks[path] = sum(len(part) for part in down)
    adapters.attach_modules(network, ranks, {path: float(rank) for path, rank in ranks.items()}, name=MERGED)
    adapters.load_state_dict(network, tensors, MERGED)
    return MERGED


def simplex(count: int, points: int) -> list[tuple[float, ...]]:
    """All mixtures of `count` adapters in steps of 1 / (points - 1), weights >= 0 that add up to 1.

    Args:
        count: adapters, at least 2.
        points: along an edge, at least 2.

    Raises:
        ConfigError: fewer.
    """
    if count < 2 or points < 2:
        raise ConfigError(f"got {count} adapters and {points} points; expected at least 2 of each")
    steps, found = points - 1, []
    for bars in combinations_with_replacement(range(steps + 1), count - 1):
        edges = (0, *bars, steps)
        found.append(tuple((b - a) / steps for a, b in pairwise(edges)))
    return sorted(found)
