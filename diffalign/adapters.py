"""LoRA on a frozen network: attach, switch off for the reference pass, mix for sampling, keep in checkpoints.

The reference of a preference loss is the same network with its adapters off, so nothing here may ever change a base
weight: initialisations that do are refused, and `adapters_off` is exact to the bit.

Shapes: `r` rank; a linear adapter is A (r, in), B (out, r); a convolution's is A (r, in, kh, kw), B (out, r, 1, 1).
GPT-2's `Conv1D` is a linear layer whose weight is stored as (in, out).
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import peft
import torch
from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from diffalign.config import LoraConfig
from diffalign.delta_layers import DeltaLayer, delta_layers, tuner_layers, values_of, weight_changes
from diffalign.errors import CheckpointError, ConfigError, did_you_mean

if TYPE_CHECKING:
    from diffalign.gates import Gates

Layer: TypeAlias = nn.Linear | nn.Conv2d | Conv1D
PRESETS = ("attention", "attention+ff", "all")
# The presets go by place, since names of projections differ (FLUX's to_add_out, Sana's convolutions, Qwen-Image's txt_mlp).
# "all" is what stands in the blocks of a UNet or a transformer, modulation included; what is outside of them embeds or
# projects out. The output projections of FLUX's single blocks take attention and feed-forward together.
_BLOCKS = re.compile(r"((down|up|(single_)?transformer)_blocks|mid_block|blocks)\.")
_ATTENTION = re.compile(r"\.attn\d*\.(to|add)_")
FEED_FORWARD = re.compile(r"\.(ff|ffn|ff_context|img_mlp|txt_mlp)\.|^single_transformer_blocks\.\d+\.proj_(mlp|out)$")
# Text of the last block is read by nothing: adapters there have no gradient, at which DistributedDataParallel stops.
_UNREAD = {"QwenImageTransformer2DModel": re.compile(r"\.(attn\.to_add_out|txt_mlp\.)")}
# In a language model, too, names of projections differ from one architecture to the next
# (q_proj, c_attn, query_key_value, Wqkv), those of the blocks they stand in hardly.
_IN_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_NOT_FEED_FORWARD = re.compile(r"mixer|mamba|ssm|router|(^|[._])gate$", re.IGNORECASE)  # state-space layers, routers

# Checked against peft 0.21: what each of its initialisations does to a network.
USERS = "user_branch"  # the submodule of a network that sees users (`diffalign.user_branches`)
DEFAULT = "default"  # name of the adapter that is trained
_SAFE_INITS = ("gaussian", "default", "orthogonal", "mica")
_LINEAR_ONLY_INITS = ("orthogonal", "mica")
_REWRITING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

_MARKS = "gates.experts"  # in a state: which experts the gates are for
WHOLE = "diffalign_whole"  # the network's attribute: names of parameters that are trained as they are
GATES = "diffalign_gates"  # the network's submodule that weighs frozen adapters, where there is one
_TRAINED = (
    "rank",
    "alpha",
    "targets",
    "dropout",
    "init",
    "use_rslora",
    "use_dora",
    "text_encoder_rank",
    "text_encoder_alpha",
    "text_encoder_targets",
)  # of experts, they are in their files


def check_lora(config: LoraConfig, *, others: bool = False) -> None:
    """Refuse an adapter that cannot be trained against an adapters-off reference.

    Args:
        config: the adapter.
        others: something else is trained on the network, so that its rank may be 0.

    Raises:
        ConfigError: an initialisation that changes base weights or needs a data pass, an unknown one, or a rank, alpha
            or dropout out of range; for fused experts, settings that nothing would read.
    """
    _check_experts(config)
    _check_text_encoders(config)
    if config.rank < 1 and not (config.rank == 0 and (config.text_encoder_rank or others)):
        raise ConfigError(f"lora.rank: got {config.rank}; expected a whole number of at least 1, such as 16")
    for key in ("alpha", "text_encoder_alpha"):
        alpha = getattr(config, key)
        if alpha is not None and not 0 < alpha < float("inf"):
            raise ConfigError(
                f"lora.{key}: got {alpha}; expected a positive number (0 would never act), or null for alpha = rank"
            )
    if not 0 <= config.dropout < 1:
        raise ConfigError(f"lora.dropout: got {config.dropout}; expected a share in [0, 1)")
    init = config.init.lower()
    if init.startswith(_REWRITING_INITS):
        raise ConfigError(
            f"lora.init: {config.init!r} rewrites the base weights, so the reference (adapters off) would no longer be "
            "the base model; use 'gaussian' or 'default'"
        )
    if init.startswith("eva"):
        raise ConfigError(
            f"lora.init: {config.init!r} needs a pass over data before training and is plain LoRA without it; "
            "use 'gaussian' or 'default'"
        )
    if init not in _SAFE_INITS:
        near = did_you_mean(config.init, _SAFE_INITS)
        raise ConfigError(f"lora.init: {config.init!r} is not known{near} Known: {', '.join(_SAFE_INITS)}")
    for key in ("rank", "text_encoder_rank"):
        rank = getattr(config, key)
        if init == "orthogonal" and rank % 2:
            raise ConfigError(f"lora.{key}: 'orthogonal' needs an even rank, got {rank}; use {rank + 1}")
    if init == "mica" and config.use_dora:
        raise ConfigError("lora.init: 'mica' cannot be combined with use_dora; use 'gaussian' or turn use_dora off")


def _check_text_encoders(config: LoraConfig) -> None:
    plain = LoraConfig()
    if config.text_encoder_rank < 0:
        raise ConfigError(
            f"lora.text_encoder_rank: got {config.text_encoder_rank}; expected a whole number such as 16, or 0 for none"
        )
    which, unread = ("text_encoder_rank", ("text_encoder_alpha", "text_encoder_targets"))
    if config.text_encoder_rank and not config.rank:
        which, unread = "rank", ("alpha", "targets")
    for name in unread if not (config.rank and config.text_encoder_rank) else ():
        if getattr(config, name) != getattr(plain, name):
            raise ConfigError(f"lora.{name}: has no effect with lora.{which} 0; set that, or remove this")
    if config.text_encoder_rank and config.use_dora:
        raise ConfigError(
            "lora.use_dora: got true; adapters of text encoders are plain ones here: set it to false, or "
            "lora.text_encoder_rank to 0"
        )


def _check_experts(config: LoraConfig) -> None:
    plain = LoraConfig()
    if not config.experts:
        for name in ("gate", "gate_features"):
            if getattr(config, name) != getattr(plain, name):
                raise ConfigError(f"lora.{name}: has no effect without lora.experts; name them or remove it")
        return
    for name in _TRAINED:
        if getattr(config, name) != getattr(plain, name):
            raise ConfigError(
                f"lora.{name}: has no effect with lora.experts, whose files say how they were trained; remove it"
            )
    if config.gate_features < 0:
        raise ConfigError(
            f"lora.gate_features: got {config.gate_features}; expected 0 (gates of the layer alone) or more"
        )
    if len(config.experts) == 1 and config.gate == "softmax":
        raise ConfigError(
            "lora.experts: got one, and a softmax over one expert is always 1: nothing could be trained; name more, or set "
            "lora.gate: sigmoid"
        )


def base_layers(network: nn.Module) -> dict[str, Layer]:
    """Every linear and 2-d convolution layer by its path, looking through adapters that are already attached.

    Convolutions in groups (Sana's depthwise ones) are left out: peft has adapters for few ranks there.
    """
    found: dict[str, Layer] = {}
    inside = "\0"  # no path starts with it
    for path, module in network.named_modules():
        if path.startswith(inside):  # an adapter's own parts
            continue
        if isinstance(module, BaseTunerLayer):
            inside = f"{path}."
            module = module.get_base_layer()
        if isinstance(module, (nn.Linear, nn.Conv2d, Conv1D)) and getattr(module, "groups", 1) == 1:
            found[path] = module
    return found


def head_path(network: nn.Module) -> str | None:
    """The path of a language model's output projection; None for networks without one."""
    if not isinstance(network, PreTrainedModel):
        return None
    head = network.get_output_embeddings()
    return next((path for path, module in network.named_modules() if module is head), None) if head else None


def target_modules(network: nn.Module, targets: str | Sequence[str], key: str = "lora.targets") -> list[str]:
    """The exact paths of the layers that `targets` names, in the network's order.

    Args:
        network: the network that adapters are for.
        targets: a preset ("attention", "attention+ff", "all"), a name ending such as "to_q", or a list of both.
        key: the setting that names them, for messages.

    Raises:
        ConfigError: a target that no linear or convolution layer ends with, or that names a language model's output
            projection: log-probabilities are computed from its frozen weight in chunks, past any adapter.
    """
    head = head_path(network)
    paths = [path for path in base_layers(network) if path != head and not _is_unread(network, path)]
    wanted = (targets,) if isinstance(targets, str) else tuple(targets)
    if not wanted:
        raise ConfigError(f"{key}: the list is empty; expected one of {', '.join(PRESETS)}, or name endings")
    chosen: set[str] = set()
    for target in wanted:
        if head is not None and target not in PRESETS and _ends_with(head, (target,)):
            raise ConfigError(
                f"{key}: {target!r} is the output projection, which stays frozen (log-probabilities are computed "
                f"from it in chunks); presets without it: {', '.join(PRESETS)}"
            )
        hits = [path for path in paths if _is_target(network, path, target)]
        if not hits:
            raise ConfigError(f"{key}: {_no_such_target(target, paths)}")
        chosen.update(hits)
    return [path for path in paths if path in chosen]


def _is_target(network: nn.Module, path: str, target: str) -> bool:
    if target not in PRESETS:
        return _ends_with(path, (target,))
    if not isinstance(network, PreTrainedModel):
        if not in_blocks(path):
            return False
        in_attention, in_feed_forward = _ATTENTION.search(path), FEED_FORWARD.search(path)
        return target == "all" or bool(in_attention) or (target == "attention+ff" and bool(in_feed_forward))
    block = re.search(r"\.\d+\.(.*)", path)  # blocks are numbered; what is outside of them projects embeddings
    if block is None:
        return False
    if target == "all" or _IN_ATTENTION.search(block[1]):
        return True
    return target == "attention+ff" and not _NOT_FEED_FORWARD.search(block[1])


def in_blocks(path: str) -> bool:
    """Whether a layer of a diffusers network stands in its blocks."""
    return _BLOCKS.match(path) is not None


def _is_unread(network: nn.Module, path: str) -> bool:
    pattern = _UNREAD.get(type(network).__name__)
    if pattern is None:
        return False
    last = len(network.transformer_blocks) - 1  # type: ignore[arg-type]
    return path.startswith(f"transformer_blocks.{last}.") and pattern.search(path) is not None


def _ends_with(path: str, endings: Sequence[str]) -> bool:
    return any(path == ending or path.endswith(f".{ending}") for ending in endings)


def _no_such_target(target: str, paths: Sequence[str]) -> str:
    parts = [path.split(".") for path in paths]
    endings = Counter(".".join(p[-n:]) for p in parts for n in (1, 2, 3) if len(p) >= n and not p[-n].isdigit())
    near = did_you_mean(target, [*PRESETS, *endings])
    common = ", ".join(sorted(e for e, _ in Counter(".".join(_tail(p)) for p in parts).most_common(8)))
    return (
        f"no linear or convolution layer ends with {target!r}{near} "
        f"Presets: {', '.join(PRESETS)}; endings here: {common or 'none'}"
    )


def _tail(parts: list[str]) -> list[str]:
    """The shortest ending that is not a bare number: `to_out.0`, not `0`."""
    return parts[-2:] if parts[-1].isdigit() else parts[-1:]


def attach(network: nn.Module, config: LoraConfig, name: str = "default", seed: int = 0) -> list[nn.Parameter]:
    """Freeze a network and add a LoRA adapter to it, or frozen experts with gates over them.

    Args:
        network: a diffusers model or a transformers language model; on the meta device only shapes are made.
        config: the adapter.
        name: adapter name; it becomes the only active one.
        seed: of the initialisation; the global generators are left as they were.

    Returns:
        The trainable parameters, float32 whatever the base's type, in the network's order.

    Raises:
        ConfigError: see `check_lora` and `target_modules`; a name that is taken; an initialisation for linear layers
            on convolutions.
        CheckpointError: an expert's file that does not fit.
    """
    check_lora(config)
    if config.experts:
        from diffalign.gates import fuse  # which reads files, and so imports this module

        fuse(network, config, name)
        return parameters(network, name)
    paths = target_modules(network, config.targets)
    init = config.init.lower()
    if init in _LINEAR_ONLY_INITS:
        layers = base_layers(network)
        # a subclass of nn.Linear is a quantised layer
        other = next((path for path in paths if type(layers[path]) is not nn.Linear), None)
        if other is not None:
            raise ConfigError(
                f"lora.init: {init!r} is for plain linear layers only, and the targets include {other!r} "
                f"({type(layers[other]).__name__}); use 'gaussian', or targets without it"
            )
    alpha = config.rank if config.alpha is None else config.alpha
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=_whole(alpha),
        target_modules=paths,
        lora_dropout=config.dropout,
        init_lora_weights=True if init == "default" else init,  # type: ignore[arg-type]
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )
    _inject(network, settings, paths, name, seed)
    return [p for p in parameters(network, name) if p.requires_grad]


def train_whole(network: nn.Module, names: Sequence[str]) -> None:
    """Train parameters as they are, beside the adapter or in place of it; they are kept in checkpoints with it.

    Args:
        network: after `attach`, if there is an adapter.
        names: of parameters.
    """
    known = dict(network.named_parameters())
    for name in names:
        known[name].requires_grad_(True)
        known[name].data = known[name].data.float()
    network.__dict__[WHOLE] = tuple(names)


def attach_modules(
    network: nn.Module,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    use_rslora: bool = False,
    use_dora: bool = False,
    name: str = "default",
) -> None:
    """Add an adapter whose rank and alpha are given layer by layer, as adapter files have them.

    Args:
        network: a diffusers model or a language model; it is frozen, and the new adapter becomes the only active one.
        ranks: layer path -> rank.
        alphas: layer path -> alpha.
        use_rslora: scale alpha / sqrt(rank) instead of alpha / rank.
        use_dora: with a magnitude per output.
        name: adapter name.

    Raises:
        ConfigError: the name is taken.
    """
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=_whole(alpha),
        # peft reads the keys as regular expressions
        rank_pattern={re.escape(path): r for path, r in ranks.items() if r != rank},
        alpha_pattern={re.escape(path): _whole(a) for path, a in alphas.items() if a != alpha},
        target_modules=list(ranks),
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    _inject(network, settings, list(ranks), name, seed=0)


def _whole(number: float) -> int:
    """peft declares alpha as int and computes with any number."""
    return int(number) if float(number).is_integer() else number  # type: ignore[return-value]


def _inject(network: nn.Module, settings: peft.LoraConfig, paths: Sequence[str], name: str, seed: int) -> None:
    if not isinstance(network, (ModelMixin, PreTrainedModel)):
        raise TypeError(f"adapters go on diffusers and transformers models; got {type(network).__name__}")
    if name in adapter_names(network):
        raise ConfigError(f"the network already has an adapter named {name!r}; choose another name")
    network.requires_grad_(False)
    on_meta = any(p.is_meta for p in network.parameters())
    with contextlib.ExitStack() as stack:
        # Only the CPU generator is seeded: peft draws there and moves the result, so every device starts alike.
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.default_generator.manual_seed(seed)
        if on_meta:
            stack.enter_context(torch.device("meta"))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but the target module is `Conv1D`")
        if not isinstance(network, PeftAdapterMixin):
            # What transformers' `add_adapter` does, without its check: 5.24 asks for a peft that is not released yet.
            # Some of diffusers' networks (PixArt) have no such method.
            peft.inject_adapter_in_model(settings, network, name)
            network._hf_peft_config_loaded = True  # type: ignore[assignment]
            for layer in tuner_layers(network):
                layer.set_adapter([name] if isinstance(layer, LoraLayer) and name in layer.lora_A else [])
        else:
            network.add_adapter(settings, adapter_name=name)
    attached = list(lora_layers(network, name))
    if sorted(attached) != sorted(paths):
        raise ConfigError(f"adapter {name!r}: {len(attached)} layers attached where {len(paths)} were meant")
    for parameter in parameters(network, name):
        parameter.data = parameter.data.float()  # peft follows the base's type; small updates vanish in bf16


def lora_layers(network: nn.Module, name: str | None = None) -> dict[str, LoraLayer]:
    """The adapted layers by path: all, or those with the adapter `name`."""
    return {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, LoraLayer) and (name is None or name in module.lora_A)
    }


def adapter_names(network: nn.Module) -> list[str]:
    """The names of the attached adapters, in the order of attachment."""
    names: dict[str, None] = {}
    for layer in tuner_layers(network):
        names.update(dict.fromkeys(layer.scaling if isinstance(layer, DeltaLayer) else layer.lora_A))
    return list(names)


def is_adapted(network: nn.Module) -> bool:
    """Whether the network has an adapter, or a branch for users."""
    return bool(adapter_names(network)) or hasattr(network, USERS)


def gates_of(network: nn.Module, name: str | None = None) -> Gates | None:
    """The gates over frozen experts that `attach` left on the network: any, or those that are the adapter `name`."""
    gates: Gates | None = getattr(network, GATES, None)
    return gates if gates is not None and name in (None, gates.adapter) else None


def parameters(network: nn.Module, name: str = "default") -> list[nn.Parameter]:
    """All parameters of an adapter, trainable or not, in the network's order; of fused experts, the gates.

    Raises:
        ConfigError: no such adapter.
    """
    return list(_tensors(network, name).values())


def count(network: nn.Module, name: str | None = None) -> tuple[int, int]:
    """(adapted layers, adapter parameters) of all adapters, or of one."""
    gates = gates_of(network, name)
    layers = lora_layers(network, name).keys() | delta_layers(network, name).keys() if gates is None else gates.layers
    names = adapter_names(network) if name is None else [name]
    if gates is not None and name is None:
        names.append(gates.adapter)
    return len(layers), sum(p.numel() for n in names for p in parameters(network, n))


@contextlib.contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """The reference pass: inside, the network is its base, to the bit. Enter it under `torch.no_grad()`.

    Raises:
        RuntimeError: gradients are enabled (nothing of the reference may be trained); there is no adapter; an adapter
            is merged into the base (unmerging is not exact).
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "adapters_off was entered with gradients enabled; wrap the reference pass in torch.no_grad()"
        )
    layers = tuner_layers(network)
    branch: Any = getattr(network, USERS, None)
    if not layers and branch is None:
        raise RuntimeError("adapters_off: the network has no adapter, so its reference would be the policy itself")
    if any(layer.merged for layer in layers):
        raise RuntimeError("adapters_off: an adapter is merged into the base weights; unfuse it before training")
    before = [layer.disable_adapters for layer in layers]
    # peft's own switch, `enable_adapters`, also sets requires_grad of every adapter: between a forward and its backward
    # pass that drops gradients, and switching back unfreezes adapters that were frozen. Only the flag is needed.
    for layer in layers:
        layer._disable_adapters = True
    was_off = branch is not None and branch.off
    if branch is not None:
        branch.off = True
    try:
        yield
    finally:
        if branch is not None:
            branch.off = was_off
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


def use_adapters(network: nn.Module, names: Sequence[str], weights: Sequence[float]) -> None:
    """Let exactly these adapters act, each with its weight (1 = as trained). What is trainable stays as it is.

    Raises:
        ConfigError: an unknown name, or not one weight per name.
    """
    known = adapter_names(network)
    for name in names:
        if name not in known:
            near = did_you_mean(name, known)
            raise ConfigError(f"no adapter named {name!r}{near} Attached: {', '.join(known) or 'none'}")
    if not names or len(names) != len(weights):
        raise ConfigError(f"got {len(names)} adapter names and {len(weights)} weights; expected one weight per name")
    trainable = [(p, p.requires_grad) for p in network.parameters()]
    for layer in tuner_layers(network):
        layer.set_adapter(list(names))
        for name, weight in zip(names, weights, strict=True):
            layer.set_scale(name, weight)
    for parameter, flag in trainable:
        parameter.requires_grad_(flag)


def scale(layer: LoraLayer, name: str) -> float:
    """The trained scale of an adapter on one layer: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    r, alpha = layer.r[name], layer.lora_alpha[name]
    return float(alpha / r**0.5 if layer.use_rslora[name] else alpha / r)


def delta(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The change of a layer's weight, scale * B A, float32, in the layer's weight shape (out, in[, kh, kw])."""
    product = b.detach().float().flatten(1) @ a.detach().float().flatten(1)
    return scale * product.reshape(b.shape[0], *a.shape[1:])


def delta_weights(network: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """What merging the adapter at weight 1 would add to each layer's weight, by layer path.

    Raises:
        ConfigError: no such adapter, a DoRA one (it rescales the weight and has no such sum), or gated experts.
    """
    if delta_layers(network, name):
        return weight_changes(network, name)
    if gates_of(network, name) is not None:
        raise ConfigError(
            f"adapter {name!r} is fused by gates that depend on the time: it is no one change of a weight"
        )
    layers = _named(network, name)
    if any(layer.use_dora[name] for layer in layers.values()):
        raise ConfigError(f"adapter {name!r} is a DoRA adapter: it rescales the base and is no additive change")
    tensors = _tensors(network, name)
    found = {
        path: delta(tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"], scale(layer, name))
        for path, layer in layers.items()
    }
    return {path: d.T if isinstance(layers[path].get_base_layer(), Conv1D) else d for path, d in found.items()}


def _named(network: nn.Module, name: str) -> dict[str, LoraLayer]:
    layers = lora_layers(network, name)
    if not layers:
        raise ConfigError(f"no adapter named {name!r}; attached: {', '.join(adapter_names(network)) or 'none'}")
    return layers


def _tensors(network: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """peft's file keys -> parameters; of fused experts, the gates."""
    if (gates := gates_of(network, name)) is not None:
        return gates.tensors()
    tensors: dict[str, Any] = {}
    whole = network.__dict__.get(WHOLE, ())
    if changed := values_of(network, name):
        return changed
    layers = lora_layers(network, name) if whole else _named(network, name)
    for path, layer in layers.items():
        tensors[f"{path}.lora_A.weight"] = layer.lora_A[name].weight
        tensors[f"{path}.lora_B.weight"] = layer.lora_B[name].weight
        if name in layer.lora_magnitude_vector:
            tensors[f"{path}.lora_magnitude_vector"] = layer.lora_magnitude_vector[name].weight
    if whole:
        own = dict(network.named_parameters())
        tensors |= {parameter: own[parameter] for parameter in whole}
    return tensors


def state_dict(network: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The adapter in peft's file format: float32 copies on the CPU. Of fused experts, the gates and hashes of the experts.

    Of changed weights values (float32), their places (int32), and hash and norms of the base (`diffalign.sparse`).

    Raises:
        ConfigError: no such adapter.
    """
    tensors: dict[str, Tensor] = dict(_tensors(network, name))
    if (gates := gates_of(network, name)) is not None:
        tensors[_MARKS] = gates.marks
    found = {key: p.detach().to("cpu", torch.float32, copy=True).contiguous() for key, p in tensors.items()}
    if delta_layers(network, name):
        from diffalign.sparse import fixed  # which imports this module

        found |= {key: value.to("cpu", copy=True) for key, value in fixed(network, name).items()}
    return found


def load_state_dict(network: nn.Module, state: Mapping[str, Tensor], name: str = "default") -> None:
    """Put a `state_dict` back into an attached adapter, in place.

    Raises:
        ConfigError: no such adapter.
        CheckpointError: a missing, additional or misshapen tensor, or gates of other experts; nothing is changed then.
    """
    tensors = _tensors(network, name)
    if (gates := gates_of(network, name)) is not None:
        check_state({**tensors, _MARKS: gates.marks}, state, f"adapter {name!r}")
        gates.require_marks(state[_MARKS])
    elif delta_layers(network, name):
        from diffalign.sparse import load_fixed

        load_fixed(network, name, state, tensors)
    else:
        check_state(tensors, state, f"adapter {name!r}")
    with torch.no_grad():
        for key, parameter in tensors.items():
            parameter.copy_(state[key])


def check_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Compare keys and shapes.

    Raises:
        CheckpointError: they differ; the first difference is named.
    """
    for key in [*expected, *state]:
        if key not in state:
            raise CheckpointError(f"{what}: {key!r} is missing; it was saved with other LoRA targets")
        if key not in expected:
            raise CheckpointError(f"{what}: {key!r} has no place here; it was saved with other LoRA targets or options")
        if state[key].shape != expected[key].shape:
            got, want = tuple(state[key].shape), tuple(expected[key].shape)
            raise CheckpointError(f"{what}: {key!r} has shape {got}, expected {want}; use the rank it was saved with")
