"""What a network costs, counted on the meta device: no weights, no memory, no GPU.

Operations are counted by torch's own formulas (a multiply-add is 2). Activations are the distinct storages that
autograd keeps for the backward pass, seen through saved-tensor hooks. Both come from one real forward pass of the real
module on shapes alone, so that LoRA targets, resolution and checkpointing count as they are. Attention is counted as a
fused kernel (queries, keys, values and output are kept; the attention matrix is not). Under mixed precision the casts
of CUDA autocast are imitated: matrix products and convolutions in the low type, normalisations in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from diffalign.adapters import lora_layers
from diffalign.architecture import Architecture
from diffalign.config import LoraConfig, SparseConfig
from diffalign.delta_layers import delta_layers
from diffalign.errors import ConfigError
from diffalign.families._pipeline import PipelineFamily
from diffalign.families.published import MAX_TOKENS, build_from_config
from diffalign.text_encoders import PREFIX, ZEROS, attach_text, network_lora, trains_text
from diffalign.user_branches import Kind

CLIP_ENCODERS = ("AutoencoderKLCogVideoX", "AutoencoderKLQwenImage", "AutoencoderKLWan")  # an image is a clip to them


@dataclass(frozen=True, kw_only=True)
class NetworkCost:
    """One image or clip through a network with a LoRA adapter, or without one where text encoders are trained alone.

    Attributes:
        parameters: of the frozen network.
        weight_bytes: of the frozen network, with what is stored beside its parameters.
        lora_modules: layers with an adapter.
        lora_parameters: trainable numbers.
        forward_flops: reference pass, adapters off.
        policy_forward_flops: forward pass with adapters.
        backward_flops: backward pass through adapters, and to the text where its encoders are trained; frozen layers need
            no weight gradient.
        saved_bytes: kept for the backward pass without checkpointing.
        checkpoint_bytes: kept with checkpointing of every block that diffusers checkpoints.
        transient_bytes: what the largest checkpointed block keeps while it is recomputed.
    """

    parameters: int
    weight_bytes: int
    lora_modules: int
    lora_parameters: int
    forward_flops: int
    policy_forward_flops: int
    backward_flops: int
    saved_bytes: int
    checkpoint_bytes: int
    transient_bytes: int


class _Training(TorchFunctionMode):
    """Fused attention, and autocast's choice of types where `low` is given."""

    LOW = (F.linear, F.conv2d, F.conv3d, torch.matmul, torch.bmm, torch.baddbmm)
    HIGH = (F.layer_norm, F.group_norm)

    def __init__(self, low: torch.dtype | None) -> None:
        super().__init__()
        self.low = low

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            query, key, value = (self._cast(named[name], self.low) for name in ("query", "key", "value"))
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(query, key, value, 0.0, False, False, scale=kwargs.get("scale"))[0]
        if self.low is not None and (func in self.LOW or func in self.HIGH):
            dtype = self.low if func in self.LOW else torch.float32
            args = tuple(self._cast(x, dtype) for x in args)
            kwargs = {k: self._cast(x, dtype) for k, x in kwargs.items()}
        return func(*args, **kwargs)

    @staticmethod
    def _cast(x: Any, dtype: torch.dtype | None) -> Any:
        return x.to(dtype) if dtype is not None and isinstance(x, Tensor) and x.is_floating_point() else x


class _Flops(TorchDispatchMode):
    """Sums torch's own FLOP formulas. FlopCounterMode does the same by module, which takes three times as long."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=output)
        return output


class _Saved:
    """Which storages autograd keeps, sorted by where: inside a block that checkpointing would recompute, or outside.

    Parameters and buffers, such as places of changed weights, do not count. Installed as a network's checkpointing function,
    `block` runs every block as it is, so that one forward pass answers both ways.
    """

    def __init__(self, parameters: set[int]) -> None:
        self.parameters = parameters
        # Holding the storages keeps their addresses from being given to others.
        self.outside: dict[int, torch.UntypedStorage] = {}
        self.inputs: dict[int, torch.UntypedStorage] = {}
        self.inside: dict[int, torch.UntypedStorage] = {}
        self.transient = 0

    def hooks(self, store: dict[int, torch.UntypedStorage]) -> Any:
        def pack(x: Tensor) -> Tensor:
            self._add(store, x)
            return x

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)

    def _add(self, store: dict[int, torch.UntypedStorage], x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage._cdata not in self.parameters:
            store[storage._cdata] = storage

    def block(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        inputs: dict[int, torch.UntypedStorage] = {}
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor):
                self._add(inputs, x)
        inside: dict[int, torch.UntypedStorage] = {}
        with self.hooks(inside):  # the innermost hooks win: nothing inside the block is counted as outside
            output = function(*args, **kwargs)
        self.inputs |= inputs
        self.inside |= inside
        self.transient = max(self.transient, _size({k: v for k, v in inside.items() if k not in inputs}))
        return output


def resident(network: torch.nn.Module) -> list[Tensor]:
    """What is there whether or not anything is kept: parameters and buffers, such as places of changed weights."""
    return [*network.parameters(), *network.buffers()]


def _size(storages: dict[int, torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages.values())


def measure_network(
    architecture: Architecture,
    lora: LoraConfig,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    branch: Kind | None = None,
    sparse: SparseConfig | None = None,
    seed: int = 0,
) -> NetworkCost:
    """Count one image or clip through the network as its family calls it.

    Args:
        architecture: of the model.
        lora: the adapter.
        shape: (C, h, w) or (C, F, h, w) of the latents.
        dtype: of the frozen weights; below float32 the training pass is counted under autocast to it.
        branch: for users or preferences, where one is trained.
        sparse: entries of the weights, where they are trained; of SaRA all entries of its layers are counted.
        seed: of the run, which HFT's half depends on.

    Raises:
        ConfigError: a class that cannot be built or whose inputs are not known, or LoRA targets that name no layer.
    """
    key = json.dumps([architecture.network, architecture.conditioning], sort_keys=True)
    family = architecture.family
    seed = seed if sparse is not None and sparse.method == "hft" else 0  # what else is counted is measured once
    return _measure_network(_Call(key, family, architecture), lora, shape, dtype, branch, sparse, seed)


class _Call:
    """How to call a network, equal to another one with the same configs."""

    def __init__(self, key: str, family: PipelineFamily, architecture: Architecture) -> None:
        self.key = key, type(family)
        self.family = family
        self.config, self.part = architecture.network, architecture.network_part
        self.conditioning = architecture.conditioning

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Call) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def forward(
        self, network: Any, shape: tuple[int, ...], dtype: torch.dtype, *, text_gradient: bool = False
    ) -> Tensor:
        def empty(*sides: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(1, *sides, device="meta", dtype=dtype)

        self.family.parts[self.part] = network
        exact = ("attention_mask", "time_ids")
        told = {
            name: empty(*sides, dtype=torch.float32 if name in exact else dtype)
            for name, sides in self.conditioning.items()
        }
        if text_gradient:
            for name in told.keys() - set(exact):
                told[name].requires_grad_()
        return self.family.predict(network, empty(*shape, dtype=dtype), empty(dtype=torch.float32), told)


@lru_cache(maxsize=8)
def _measure_network(
    call: _Call,
    lora: LoraConfig,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    kind: Kind | None = None,
    sparse: SparseConfig | None = None,
    seed: int = 0,
) -> NetworkCost:
    from diffalign import sparse as entries
    from diffalign.adapters import attach, count

    network: Any = build_from_config(call.config, device="meta", dtype=dtype).requires_grad_(False)
    parameters = sum(p.numel() for p in network.parameters())
    weight_bytes = sum(tensor.nbytes for tensor in network.state_dict().values())
    low = None if dtype == torch.float32 else dtype
    modules, lora_parameters = 0, 0
    if lora.rank or lora.experts:
        attach(network, network_lora(lora))
        modules, lora_parameters = count(network, "default")
    if sparse is not None and sparse.method is not None:
        entries.attach(network, sparse, seed=seed)
        modules, lora_parameters = count(network, "default")
    if kind is not None:
        branch = kind.attach(network)
        modules = modules or len(branch.settings()["paths"])
        branch.seat(torch.ones(1, branch.width, device="meta"))
        lora_parameters += sum(p.numel() for p in branch.parameters())

    saved = _Saved({x.untyped_storage()._cdata for x in resident(network)})
    network.train()  # diffusers calls the checkpointing function only in training mode
    network.enable_gradient_checkpointing(saved.block)
    with _Training(low), _Flops() as policy:
        in_adapters = _count_adapters(network, policy)
        with saved.hooks(saved.outside):
            output = call.forward(network, shape, dtype, text_gradient=trains_text(lora))
        policy_forward = policy.total
        output.float().mean().backward()
    return NetworkCost(
        parameters=parameters,
        weight_bytes=weight_bytes,
        lora_modules=modules,
        lora_parameters=lora_parameters,
        forward_flops=policy_forward - sum(in_adapters),
        policy_forward_flops=policy_forward,
        backward_flops=policy.total - policy_forward,
        saved_bytes=_size(saved.outside | saved.inside),
        checkpoint_bytes=_size(saved.outside | saved.inputs),
        transient_bytes=saved.transient,
    )


def _count_adapters(network: Any, counter: _Flops) -> list[int]:
    """Let the forward pass append the operations of every adapter: the reference has all but these."""
    found: list[int] = []

    def before(module: Any, args: Any) -> None:
        found.append(-counter.total)

    def after(module: Any, args: Any, output: Any) -> None:
        found.append(counter.total)

    for changed in delta_layers(network).values():
        totals: list[int] = []  # after the layer itself, and where its change runs apart, after that

        def ran(module: Any, args: Any, output: Any, totals: list[int] = totals) -> None:
            totals.append(counter.total)

        def done(module: Any, args: Any, output: Any, totals: list[int] = totals) -> None:
            found.append(totals[-1] - totals[0])
            totals.clear()

        changed.base_layer.register_forward_hook(ran)
        changed.register_forward_hook(done)
    for layer in lora_layers(network).values():
        for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
            factor.register_forward_pre_hook(before)
            factor.register_forward_hook(after)
    return found


@dataclass(frozen=True, kw_only=True)
class TextCost:
    """One prompt through text encoders with adapters.

    Attributes:
        weight_bytes: of the frozen encoders, with what is stored beside their parameters.
        lora_modules: layers with an adapter.
        lora_parameters: trainable numbers.
        forward_flops: with adapters.
        backward_flops: through adapters.
        saved_bytes: kept for the backward pass; text encoders are not checkpointed.
    """

    weight_bytes: int
    lora_modules: int
    lora_parameters: int
    forward_flops: int
    backward_flops: int
    saved_bytes: int


def measure_text_encoders(architecture: Architecture, lora: LoraConfig, *, dtype: torch.dtype) -> TextCost | None:
    """Count one prompt through the text encoders that are trained; None where none are.

    Args:
        architecture: of the model.
        lora: the adapter.
        dtype: of the frozen weights; below float32 counted under autocast to it.

    Raises:
        ConfigError: a class that cannot be built, targets that name no layer, or a family without such encoders.
    """
    family = architecture.family
    if not trains_text(lora):
        return None
    if not family.text_encoders:
        raise ConfigError(
            f"lora.text_encoder_rank: got {lora.text_encoder_rank}; family {family.config.family!r} has no text encoders "
            "that can be trained; remove it"
        )
    encoders: dict[str, Any] = {
        name: build_from_config(architecture.configs[name], device="meta", dtype=dtype) for name in family.text_encoders
    }
    found = {name: attach_text(e, lora, unread_last=name in family.last_unread) for name, e in encoders.items()}
    lengths = {name: int(architecture.configs[name].get("max_position_embeddings", MAX_TOKENS)) for name in encoders}
    tokens = {
        f"{PREFIX}{name}": torch.zeros(1, length, dtype=torch.int64, device="meta") for name, length in lengths.items()
    }
    tokens[ZEROS] = torch.zeros(1, dtype=torch.int64, device="meta")
    family.parts |= encoders
    saved = _Saved({p.untyped_storage()._cdata for e in encoders.values() for p in e.parameters()})
    with _Training(None if dtype == torch.float32 else dtype), _Flops() as counter:
        with saved.hooks(saved.outside):
            outputs = list(family.encode_rows(tokens).values())
        forward = counter.total
        torch.stack([output.float().mean() for output in outputs]).sum().backward()
    frozen = [p for encoder in encoders.values() for p in encoder.parameters() if not p.requires_grad]
    return TextCost(
        weight_bytes=sum(p.nbytes for p in frozen),
        lora_modules=sum(len(lora_layers(encoder)) for encoder in encoders.values()),
        lora_parameters=sum(p.numel() for params in found.values() for p in params),
        forward_flops=forward,
        backward_flops=counter.total - forward,
        saved_bytes=_size(saved.outside),
    )


@dataclass(frozen=True, kw_only=True)
class EncodeCost:
    """One image or clip through an autoencoder's encoder or decoder.

    Attributes:
        flops: of it.
        peak_bytes: the most that is alive at a time, in float32, without the kernels' own workspaces.
    """

    flops: int
    peak_bytes: int


class _Alive(TorchDispatchMode):
    """The largest sum of storages that are alive after any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for x in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return output


def measure_encoder(config: dict[str, Any], resolution: int, frames: int = 1) -> EncodeCost:
    """Count one square image (or clip) of `resolution` pixels through an autoencoder's encoder.

    Raises:
        ConfigError: a class that cannot be built.
    """
    return _measure_encoder(json.dumps(config, sort_keys=True), resolution, frames)


@lru_cache(maxsize=8)
def _measure_encoder(text: str, resolution: int, frames: int) -> EncodeCost:
    vae: Any = build_from_config(json.loads(text), device="meta")
    volume = (frames,) if type(vae).__name__ in CLIP_ENCODERS else ()
    pixels = torch.empty(1, 3, *volume, resolution, resolution, device="meta")
    with torch.no_grad(), _Training(None), _Flops() as counter, _Alive() as alive:
        vae.encode(pixels)
    return EncodeCost(flops=counter.total, peak_bytes=alive.peak)


def measure_decoder(config: dict[str, Any], latent_shape: tuple[int, ...], *, gradient: bool = False) -> EncodeCost:
    """Count one image's (or clip's) latents through an autoencoder's decoder.

    Args:
        config: of the autoencoder.
        latent_shape: (C, ..., h, w).
        gradient: with the way back to the latents, and what has to be kept for it.

    Raises:
        ConfigError: a class that cannot be built.
    """
    return _measure_decoder(json.dumps(config, sort_keys=True), latent_shape, gradient)


@lru_cache(maxsize=8)
def _measure_decoder(text: str, latent_shape: tuple[int, ...], gradient: bool) -> EncodeCost:
    vae: Any = build_from_config(json.loads(text), device="meta")
    still = len(latent_shape) == 3 and type(vae).__name__ in CLIP_ENCODERS
    shape = (latent_shape[0], 1, *latent_shape[1:]) if still else latent_shape
    vae.requires_grad_(False)
    latents = torch.empty(1, *shape, device="meta", requires_grad=gradient)
    with torch.set_grad_enabled(gradient), _Training(None), _Flops() as counter, _Alive() as alive:
        images = vae.decode(latents).sample
        if gradient:
            images.sum().backward()
    return EncodeCost(flops=counter.total, peak_bytes=alive.peak)
