"""Layers with an additive change of their own weights: W = W0 + scatter(values), beside a frozen W0.

A change is dense (values in the weight's shape) or sparse (values and their places). It starts at zero and is never merged
while it is trained, so switched off it leaves the base to the bit. `diffalign.sparse` says which entries are trained.

In float32 a layer runs once, with W0 + change as its weight: exactly the network that a merged file gives. Below float32 a
small change of a large weight would be rounded away, so there the layer runs a second time with the change alone as its
weight, and the outputs are added; linear layers, convolutions and norms are all linear in their own parameters. Values are
float32 and rounded for that pass: in float16 those below 3e-8 become zero and 1e-6 is off by up to 3 %, so bfloat16, whose
error is 0.4 % at any size, is the better one.

peft's SHiRA is such a layer for linear ones with exactly r (rows + columns) entries. It is not used here: convolutions and
norms have none, a threshold chooses any number of entries, and its change is rounded with the weight below float32.

Shapes: `k` entries of a parameter; `index` counts its elements in row-major order, int32, ascending.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

Kind: TypeAlias = Literal["weight", "bias"]
KINDS: tuple[Kind, ...] = ("weight", "bias")


class DeltaLayer(nn.Module, BaseTunerLayer):
    """A frozen layer and changes of its weight and bias, each under an adapter's name.

    Args:
        base_layer: linear, convolution, `Conv1D` or norm, without adapters of its own.

    Attributes:
        delta_weight, delta_bias: values of an adapter's change, float32, (k,) or in the parameter's shape.
        index_weight, index_bias: their places, int32 (k,); none where the change is dense.
        held_weight, held_bias: entries that are not trained any more, bool (k,); none while all are.
        scaling: weight of an adapter's change; 1 as trained.
    """

    adapter_layer_names = ("delta_weight", "delta_bias")
    other_param_names = ("index_weight", "index_bias", "held_weight", "held_bias", "scaling")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.delta_weight, self.delta_bias = nn.ParameterDict(), nn.ParameterDict()
        self.index_weight, self.index_bias = BufferDict(persistent=False), BufferDict(persistent=False)
        self.held_weight, self.held_bias = BufferDict(persistent=False), BufferDict(persistent=False)
        self.scaling: dict[str, float] = {}
        self._disable_adapters = False
        self._active_adapter: list[str] = []  # type: ignore[assignment]
        self.merged_adapters: list[str] = []

    def add(self, name: str, kind: Kind, index: Tensor | None) -> nn.Parameter:
        """A zero change under an adapter's name.

        Args:
            name: the adapter.
            kind: which of the layer's parameters.
            index: int32 (k,), or None for all entries, dense.
        """
        own: Tensor = getattr(self.base_layer, kind)
        shape = own.shape if index is None else index.shape
        self.values(kind)[name] = nn.Parameter(torch.zeros(shape, device=own.device))
        if index is not None:
            self.index(kind)[name] = index.to(own.device, torch.int32)
        self.scaling[name] = 1.0
        parameter: nn.Parameter = self.values(kind)[name]
        return parameter

    def values(self, kind: Kind) -> nn.ParameterDict:
        """Changes of one of the parameters by adapter."""
        return self.delta_weight if kind == "weight" else self.delta_bias

    def index(self, kind: Kind) -> Any:
        """Places of the sparse ones by adapter."""
        return self.index_weight if kind == "weight" else self.index_bias

    def held(self, kind: Kind) -> Any:
        """Entries that are not trained any more, by adapter."""
        return self.held_weight if kind == "weight" else self.held_bias

    def own(self, kind: Kind) -> Tensor:
        """The frozen parameter."""
        found: Tensor = getattr(self.base_layer, kind)
        return found

    def entries(self, name: str, kind: Kind) -> Tensor:
        """The chosen entries as they are now, W0 + change, float32 in the shape of `values`."""
        own, index = self.own(kind).detach().float(), self.index(kind)
        if name in index:
            own = own.flatten().index_select(0, index[name])
        return own + self._values(name, kind)

    def change(self, weights: Mapping[str, float], kind: Kind) -> Tensor | None:
        """The weighted sum of changes in the parameter's shape, float32; None without any."""
        total: Tensor | None = None
        for name, weight in weights.items():
            if name not in self.values(kind):
                continue
            values = self._values(name, kind)
            values = values if weight == 1 else values * weight
            if name not in self.index(kind):
                total = values if total is None else total + values
                continue
            own = self.own(kind)
            flat = torch.zeros(own.numel(), device=own.device) if total is None else total.flatten()
            total = flat.index_add(0, self.index(kind)[name], values).view(own.shape)
        return total

    def _values(self, name: str, kind: Kind) -> Tensor:
        values: Tensor = self.values(kind)[name]
        held = self.held(kind)
        return torch.where(held[name], values.detach(), values) if name in held else values

    def set_scale(self, name: str, weight: float) -> None:
        """Weight of an adapter's change; of one that is not here, nothing."""
        if name in self.scaling:
            self.scaling[name] = weight

    def scale_layer(self, scale: float) -> None:
        """Multiply the weights of the active adapters; diffusers calls it."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`; without a number, weights are 1 again."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer with its active changes."""
        active = {name: self.scaling[name] for name in self.active_adapters if name in self.scaling}
        return self.mixed({} if self.disable_adapters or self.merged else active, x, *args, **kwargs)

    def mixed(self, weights: Mapping[str, float], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer with changes by weight, whatever is active."""
        acting = {name: weight for name, weight in weights.items() if weight}
        changes = {kind: change for kind in KINDS if (change := self.change(acting, kind)) is not None}
        if not changes:
            return self.base_layer(x, *args, **kwargs)
        full = all(self.own(kind).dtype in (torch.float32, torch.float64) for kind in changes)
        if full and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
            whole: dict[str, Tensor] = {
                kind: self.own(kind) + change.to(self.own(kind).dtype) for kind, change in changes.items()
            }
            return functional_call(self.base_layer, whole, (x, *args), kwargs)
        alone: dict[str, Tensor] = {
            kind: changes[kind].to(own.dtype) if kind in changes else torch.zeros_like(own)
            for kind in KINDS
            if (own := getattr(self.base_layer, kind, None)) is not None
        }
        out = self.base_layer(x, *args, **kwargs)
        added: Tensor = functional_call(self.base_layer, alone, (x, *args), kwargs)
        return out + added.to(out.dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put changes into the frozen weights; without `unmerge`, whose subtraction would not be exact."""
        for name in check_adapters_to_merge(self, adapter_names) or ():
            if name not in self.scaling:
                continue
            for kind in KINDS:
                change = self.change({name: self.scaling[name]}, kind)
                if change is not None:
                    own = self.own(kind)
                    own.copy_(own.float() + change)
            self.merged_adapters.append(name)


def plain_path(path: str) -> str:
    """A layer's path without what adapters around it add to it."""
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


def delta_layers(network: nn.Module, name: str | None = None) -> dict[str, DeltaLayer]:
    """The layers whose weights are changed by path: all, or those with the adapter `name`."""
    return {
        plain_path(path): module
        for path, module in network.named_modules()
        if isinstance(module, DeltaLayer) and (name is None or name in module.scaling)
    }


def tuner_layers(network: nn.Module) -> list[Any]:
    """Every layer with a LoRA or a change; a layer may be inside of another."""
    return [module for module in network.modules() if isinstance(module, (LoraLayer, DeltaLayer))]


def values_of(network: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """`<layer>.delta_weight` and `<layer>.delta_bias` -> values of a change, in the network's order; empty without one."""
    found = [(path, kind, layer.values(kind)) for path, layer in delta_layers(network, name).items() for kind in KINDS]
    return {f"{path}.delta_{kind}": values[name] for path, kind, values in found if name in values}


def weight_changes(network: nn.Module, name: str) -> dict[str, Tensor]:
    """What a change adds to each weight, float32 in the weight's shape, by layer path."""
    each = {path: layer.change({name: 1.0}, "weight") for path, layer in delta_layers(network, name).items()}
    return {path: change.detach() for path, change in each.items() if change is not None}
