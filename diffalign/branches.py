"""Different adapters for different parts of one batch: what classifier-free guidance with two sets of weights needs.

A call of the network sees its batch as equal parts in order (of guidance: negative rows, then positive ones), and every part
has its own mixture of the LoRAs that are attached: theta + sum of weight x scale x B A. Sums need no merging, since a LoRA's
part of the output is added layer by layer; rows that share an adapter at the same weight are computed together. So a batch
of two branches costs what plain guidance costs, plus the LoRAs.

peft can mix adapters in a batch too (`adapter_names`), one adapter a row and for inference only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from diffalign.adapters import lora_layers
from diffalign.delta_layers import DeltaLayer, delta_layers
from diffalign.errors import ConfigError

Mix: TypeAlias = Mapping[str, float]  # adapter -> weight, on top of the scale that it was trained with


class RowsUnknownError(RuntimeError):
    """A layer whose first axis cannot be cut into the parts of the batch."""


class Branches:
    """The adapters of a network by part of the batch.

    Args:
        network: with LoRA adapters attached through peft, as diffusers does; which of them are active does not matter here.

    Raises:
        ConfigError: no adapters; merged ones; DoRA, whose magnitudes depend on the sum of all adapters.
    """

    def __init__(self, network: nn.Module) -> None:
        # A layer of changed weights may stand inside of a LoRA's, which calls it.
        inner = {f"{path} (weights)": layer for path, layer in delta_layers(network).items()}
        self.layers: dict[str, Any] = lora_layers(network) | inner
        if not self.layers:
            raise ConfigError("the network has no LoRA adapter; load one before its branches are told apart")
        for path, layer in self.layers.items():
            if layer.merged:
                raise ConfigError(
                    f"adapters are fused into {path}: their rows cannot be told apart; call unfuse_lora() first"
                )
            if not isinstance(layer, DeltaLayer) and any(layer.use_dora.values()):
                raise ConfigError(f"{path} has a DoRA adapter, which does not add up with others; expected plain LoRA")
        self.parts: tuple[Mix, ...] | None = None

    def names(self) -> set[str]:
        """Adapters that some layer has."""
        return {name for layer in self.layers.values() for name in _names(layer)}

    def active(self) -> dict[str, float]:
        """The adapters that act now, each with weight 1: the mixture that the network has without us.

        Weights given to `set_adapters` are kept in the scale of every layer already.
        """
        found: dict[str, float] = {}
        for layer in self.layers.values():
            if not layer.disable_adapters:
                found |= {name: 1.0 for name in layer.active_adapters if name in _names(layer)}
        return found

    @contextmanager
    def installed(self) -> Iterator[Branches]:
        """Within, `use` takes effect. Backward passes through checkpointed blocks have to happen within, too."""
        before = {path: layer.__dict__.get("forward") for path, layer in self.layers.items()}
        for path, layer in self.layers.items():
            layer.forward = self._forward_of(path, layer)
        try:
            yield self
        finally:
            for path, layer in self.layers.items():
                own = before[path]
                if own is None:
                    del layer.__dict__["forward"]
                else:
                    layer.forward = own

    @contextmanager
    def use(self, *parts: Mix) -> Iterator[None]:
        """Within, a batch consists of as many equal parts as there are mixtures.

        Raises:
            ConfigError: an adapter that no layer has.
        """
        unknown = {name for part in parts for name in part} - self.names()
        if unknown:
            raise ConfigError(
                f"no adapter {', '.join(sorted(unknown))}; attached are {', '.join(sorted(self.names()))}"
            )
        before, self.parts = self.parts, parts
        try:
            yield
        finally:
            self.parts = before

    def _forward_of(self, path: str, layer: Any) -> Any:
        plain = layer.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.parts is None:
                return plain(x, *args, **kwargs)  # type: ignore[no-any-return]
            if len(x) % len(self.parts):
                raise RowsUnknownError(
                    f"{path}: {len(x)} rows cannot be cut into {len(self.parts)} parts, so its adapters cannot be told apart"
                )
            if isinstance(layer, DeltaLayer):
                mixes = [
                    {n: w * layer.scaling[n] for n, w in part.items() if n in layer.scaling} for part in self.parts
                ]
                if all(mix == mixes[0] for mix in mixes):
                    return layer.mixed(mixes[0], x, *args, **kwargs)  # type: ignore[no-any-return]
                rows = zip(mixes, x.chunk(len(mixes)), strict=True)
                return torch.cat([layer.mixed(mix, part, *args, **kwargs) for mix, part in rows])
            out = layer.base_layer(x, *args, **kwargs)
            kind = out.dtype
            for name in layer.lora_A:
                weights = [part.get(name, 0.0) for part in self.parts]
                if len(set(weights)) == 1:
                    if weights[0]:
                        out = out + scaled(layer, name, x, weights[0])
                    continue
                size = len(x) // len(weights)
                for number, weight in enumerate(weights):
                    if weight:
                        own = slice(number * size, (number + 1) * size)
                        _add(out[own], layer, name, x[own], weight)
            return out.to(kind)  # type: ignore[no-any-return]

        return forward


def _names(layer: Any) -> tuple[str, ...]:
    """Adapters of a layer."""
    return tuple(layer.scaling) if isinstance(layer, DeltaLayer) else (*layer.lora_A, *layer.lora_embedding_A)


def _add(out: Tensor, layer: Any, name: str, x: Tensor, weight: float) -> None:
    """Add to rows of a layer's output, in place, what `scaled` gives for them; without gradient in one pass over them."""
    down, up = layer.lora_A[name], layer.lora_B[name]
    plain = type(up) is nn.Linear and up.bias is None and not torch.is_grad_enabled()
    if not plain or not x.dtype == out.dtype == up.weight.dtype or not out.is_contiguous():
        out += scaled(layer, name, x, weight)
        return
    hidden = down(layer.lora_dropout[name](x))
    flat = out.view(-1, out.shape[-1])
    flat.addmm_(hidden.flatten(0, -2), up.weight.T, alpha=layer.scaling[name] * weight)


def scaled(layer: Any, name: str, x: Tensor, weight: float) -> Tensor:
    """What an adapter adds to a layer's output, as peft computes it, times a weight."""
    down, up = layer.lora_A[name], layer.lora_B[name]
    x = layer._cast_input_dtype(x, down.weight.dtype)
    added = up(down(layer.lora_dropout[name](x))) * layer.scaling[name]
    return added if weight == 1 else added * weight  # type: ignore[no-any-return]
