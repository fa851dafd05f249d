"""Gates that fuse frozen LoRA experts, by layer and by denoising time: the second stage of TLPO.

    W x + sum_k g_lk(t) scale_lk B_lk A_lk x,     g_l(t) = softmax_k(G_l(phi(t)))     (or a sigmoid per expert)

Paper: TLPO of FantasyTalking2, arXiv 2508.11255. Its first stage trains one LoRA per axis of preference, which is ordinary
training. The second freezes these experts and trains the gates alone, with any objective: the gates are an adapter.

Status: experimental. No code is public, and the paper was read second-hand. UNVERIFIED: softmax or sigmoid; what phi is and
whether G is linear, as it is here; whether a gate is one linear layer's, as it is here, or a whole block's; that gates start
at the experts' mean; every hyper-parameter. The published lip mask of one expert's first stage is not here.

`phi(t)` is (cos(pi j u), j = 0 ... `gate_features`) with u in [0, 1], the time that the network embeds divided by 1000. It
is read where the network embeds it, so families that are told t and those that are told t / 1000 have the same gates.

Shapes: N rows of a batch, L gated layers, K experts, F features with the constant.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

import diffalign
from diffalign import adapters, export
from diffalign.adapters import GATES
from diffalign.config import LoraConfig
from diffalign.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

FILE_NAME = "gated_lora_weights.safetensors"
HEADER = "diffalign.gates"  # metadata key of the JSON text that a gated file has, and no other
VERSION = 1
NUM_TIMES = 1000  # what diffusers' networks embed lies in [0, 1000]
SHOWN = (0.1, 0.3, 0.5, 0.7, 0.9)  # times at which people are told the gates


class Gates(nn.Module):
    """How much of every expert acts, in every layer, at the time that a row is denoised at.

    Args:
        adapter: what the fusion is called among the network's adapters.
        experts: names of the experts' adapters.
        labels: what people call the experts.
        layers: paths of the gated layers.
        kind: "softmax" or "sigmoid".
        features: cosines of the time beside the constant.
        device: of the weight.
        span: times lie between 0 and this number where the network embeds them.

    Attributes:
        weight: G of every layer, (L, K, F); the last axis begins with the constant. Gates start at 1/K for every time: the
            experts' mean (a single sigmoid at 1/2).
        marks: a hash of every expert's weights, (K, 32): gates of other experts are refused.
        now: gates of the forward pass that runs, L x K tensors of shape (N,); None outside of one.
    """

    def __init__(
        self,
        adapter: str,
        experts: Sequence[str],
        labels: Sequence[str],
        layers: Sequence[str],
        *,
        kind: str = "softmax",
        features: int = 8,
        device: torch.device | str = "cpu",
        span: float = NUM_TIMES,
    ) -> None:
        super().__init__()
        self.adapter, self.experts, self.labels, self.layers = adapter, tuple(experts), tuple(labels), tuple(layers)
        self.kind, self.features, self.span = kind, features, span
        weight = torch.zeros(len(layers), len(experts), 1 + features, device=device)
        if kind == "sigmoid":
            weight[..., 0] = -math.log(max(len(experts) - 1, 1))
        self.weight = nn.Parameter(weight)
        self.marks = torch.zeros(len(experts), 32)
        self.now: tuple[Tensor, ...] | None = None
        self._inside = False

    def forward(self, times: Tensor) -> Tensor:
        """Gates (N, L, K), float32, of times (N,) in [0, 1]."""
        order = torch.arange(1 + self.features, device=times.device)
        phi = torch.cos(math.pi * times.float()[:, None] * order)
        logits = torch.einsum("nf,lkf->nlk", phi, self.weight)
        return logits.softmax(-1) if self.kind == "softmax" else logits.sigmoid()

    def tensors(self) -> dict[str, nn.Parameter]:
        """What is trained, by its name in checkpoints and files."""
        return {"gates.weight": self.weight}

    @torch.no_grad()
    def shares(self) -> list[list[float]]:
        """Mean gates over layers at the times `SHOWN`, a row per time and a number per expert."""
        times = torch.tensor(SHOWN, device=self.weight.device)
        return [[round(value, 4) for value in row] for row in self(times).mean(1).tolist()]

    def require_marks(self, marks: Tensor) -> None:
        """Refuse gates that were trained with other experts.

        Raises:
            CheckpointError: naming the first that differs.
        """
        for label, own, other in zip(self.labels, self.marks, marks, strict=True):
            if not torch.equal(own, other.to(own)):
                raise CheckpointError(
                    f"the gates were trained with another expert {label!r}: its weights have changed since; put the file "
                    "back that lora.experts named then, or start in another output_dir"
                )

    # Hooks. All are bound methods or partials of them, so that a copied network's hooks are its own.

    def _begin(self, network: nn.Module, args: Any) -> None:
        self._inside, self.now = True, None

    def _note(self, embedding: Timesteps, args: tuple[Tensor, ...]) -> None:
        """The first time that is embedded in a forward pass is the batch's; later ones are guidance scales and sizes."""
        if not self._inside or self.now is not None:
            return
        times = args[0].flatten()
        with torch.autocast(times.device.type, enabled=False):
            gates = self(times.float() * embedding.scale / self.span)
        self.now = gates.permute(1, 2, 0).flatten(0, 1).unbind()

    def _end(self, network: nn.Module, args: Any, output: Any) -> None:
        self._inside, self.now = False, None

    def _weigh(self, place: int, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        if self.now is None:
            raise RuntimeError(
                "a gated layer ran outside of its network's forward pass, where no time is known; with gradient "
                "checkpointing, switch it on before the experts are attached"
            )
        gate = self.now[place]
        if len(gate) not in (1, len(output)):
            path = self.layers[place // len(self.experts)]
            raise RuntimeError(f"{path}: {len(output)} rows for {len(gate)} times; gates need the batch's axis first")
        return output * gate.to(output.dtype).view(-1, *[1] * (output.ndim - 1))

    def _checkpointed(self, run: Callable[..., Any], block: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """A checkpointed block that is computed again in the backward pass sees the gates of its own forward pass."""
        now = self.now

        def replay(*inputs: Any, **settings: Any) -> Any:
            before, self.now = self.now, now
            try:
                return block(*inputs, **settings)
            finally:
                self.now = before

        return run(replay, *args, **options)


def fuse(network: nn.Module, config: LoraConfig, name: str = "default") -> None:
    """Attach the experts of a config, frozen, and fresh gates, trainable; for `adapters.attach`.

    Raises:
        ConfigError: an expert that cannot be one (see `check_expert`), or a network that cannot be gated.
        CheckpointError: an expert that does not fit the network.
    """
    names = [f"{name}_expert_{k}" for k in range(len(config.experts))]
    for expert, source in zip(names, config.experts, strict=True):
        file, metadata = check_expert(source)
        # In diffusers' naming a family says nothing that the network does not.
        export.load_lora(network, file, family=metadata.get("diffalign.family", "diffusers"), name=expert)
    _join(network, name, names, [label(s) for s in config.experts], config.gate, config.gate_features)


def check_expert(source: str, family: str | None = None) -> tuple[Path, dict[str, str]]:
    """The file of an expert and its metadata; only its header is read.

    Args:
        source: a LoRA file in diffusers' naming, or a run folder.
        family: that it must be for, where the file says one.

    Raises:
        ConfigError: gated itself, of another family, DoRA, or in kohya's naming.
        CheckpointError: no such file, or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    file = export.find_file(Path(source).expanduser())
    try:
        with safe_open(file, framework="pt") as handle:
            keys, metadata = list(handle.keys()), dict(handle.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not readable as safetensors ({error}); expected a LoRA file") from error
    of = metadata.get("diffalign.family", family)
    if HEADER in metadata:
        raise ConfigError(
            f"lora.experts: {file} holds gated experts itself; name single LoRA files or their run folders"
        )
    if "diffalign.delta" in metadata:
        raise ConfigError(f"lora.experts: {file} holds changed weights (section sparse); experts are LoRA files")
    if family is not None and of != family:
        raise ConfigError(f"lora.experts: {file} is an adapter for {of!r}, got model.family {family!r}")
    if any(key.endswith((".dora_scale", ".lora_magnitude_vector")) for key in keys):
        raise ConfigError(
            f"lora.experts: {file} is a DoRA adapter, which rescales weights and cannot be added up; train it without "
            "lora.use_dora"
        )
    if any(key.startswith("lora_unet_") for key in keys):
        raise ConfigError(
            f"lora.experts: {file} has kohya's names; take the diffusers file beside it, or convert it with "
            "'diffalign export CONFIG --adapter FILE --out FOLDER'"
        )
    return file, metadata


def label(source: str) -> str:
    """What people call an expert: its folder or file, without the way there, which is nobody's business."""
    path = Path(source)
    return path.parent.name if path.name == export.FILE_NAME and path.parent.name else path.stem


def _join(
    network: nn.Module, name: str, experts: Sequence[str], labels: Sequence[str], kind: str, features: int
) -> Gates:
    """Put fresh gates over attached experts and freeze everything else."""
    if adapters.gates_of(network) is not None:
        raise ConfigError("the network already has gated experts; load it afresh")
    found = {path: layer for path, layer in adapters.lora_layers(network).items() if set(experts) & set(layer.lora_A)}
    outside = next((path for path in found if not adapters.in_blocks(path)), None)
    if outside is not None:
        raise ConfigError(
            f"lora.experts: {outside!r} is adapted, which is outside of the network's blocks, where no time may be known "
            "yet; train experts with lora.targets attention, attention+ff or all"
        )
    clock = next((module for module in network.modules() if isinstance(module, Timesteps)), None)
    if clock is None:
        raise ConfigError(
            f"lora.experts: {type(network).__name__} embeds no time as diffusers' networks do; gates depend on it"
        )
    network.requires_grad_(False)
    adapters.use_adapters(network, experts, [1.0] * len(experts))
    device = next(network.parameters()).device
    settings: Mapping[str, Any] = network.config  # type: ignore[assignment]
    span = NUM_TIMES * float(settings.get("timestep_scale", 1.0))  # Sana's; of Sana-Sprint 1 / 1000
    gates = Gates(name, experts, labels, list(found), kind=kind, features=features, device=device, span=span)
    if device.type != "meta":
        gates.marks = torch.stack([_mark(network, expert) for expert in experts])
    network.add_module(GATES, gates)

    network.register_forward_pre_hook(gates._begin)
    network.register_forward_hook(gates._end, always_call=True)
    clock.register_forward_pre_hook(gates._note)
    for number, layer in enumerate(found.values()):
        for k, expert in enumerate(experts):
            if expert in layer.lora_B:  # an expert without an adapter here adds nothing, whatever its gate
                layer.lora_B[expert].register_forward_hook(partial(gates._weigh, number * len(experts) + k))
    for module in network.modules():
        run = getattr(module, "_gradient_checkpointing_func", None)
        if run is not None:
            setattr(module, "_gradient_checkpointing_func", partial(gates._checkpointed, run))  # noqa: B010
    return gates


def _mark(network: nn.Module, expert: str) -> Tensor:
    """A hash of an expert's update, as 32 bytes."""
    digest = hashlib.sha256()
    state, layers = adapters.state_dict(network, expert), adapters.lora_layers(network, expert)
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].numpy().tobytes())
    for path in sorted(layers):
        digest.update(f"{path} {adapters.scale(layers[path], expert)!r}".encode())
    return torch.tensor(list(digest.digest()), dtype=torch.float32)


# Files


def save_gated(
    network: nn.Module, out_dir: Path, *, facts: Mapping[str, str], dtype: torch.dtype = torch.float32
) -> Path:
    """Write experts and gates as one file, `gated_lora_weights.safetensors`.

    It holds `experts.<k>.<layer>.lora_A.weight`, `.lora_B.weight` and `.alpha` (float64; the scale is alpha / rank), and
    `gates.weight` (float32). Gates depend on the time, so nothing can be merged and no other program has a format for it.

    Args:
        network: with gated experts.
        out_dir: folder, made if missing.
        facts: of the run, as texts; written as `diffalign.<key>`.
        dtype: of the experts.

    Raises:
        CheckpointError: a number is too large for `dtype`, or the file cannot be written.
    """
    gates = adapters.gates_of(network)
    if gates is None:
        raise ConfigError("the network has no gated experts; there is nothing to write")
    tensors = {key: export.cast(key, value, torch.float32) for key, value in gates.tensors().items()}
    for k, expert in enumerate(gates.experts):
        for key, value in adapters.state_dict(network, expert).items():
            tensors[f"experts.{k}.{key}"] = export.cast(key, value, dtype)
        for path, layer in adapters.lora_layers(network, expert).items():
            rank, alpha = layer.r[expert], layer.lora_alpha[expert]
            alpha = alpha * rank**0.5 if layer.use_rslora[expert] else alpha
            tensors[f"experts.{k}.{path}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
    header = {
        "version": VERSION,
        "kind": gates.kind,
        "features": gates.features,
        "experts": gates.labels,
        "layers": gates.layers,
        "times": SHOWN,
        "shares": gates.shares(),
    }
    file = Path(out_dir) / FILE_NAME
    metadata = {f"diffalign.{key}": value for key, value in facts.items()}
    export.write_file(file, tensors, {"format": "pt"} | metadata | {HEADER: json.dumps(header)})
    export.remove_others(file.parent, "gated")
    log.info(
        "gated experts: only %s is written; gates depend on the time, so no diffusers or kohya file can hold them", file
    )
    return file


def load_gated(network: nn.Module, path: Path, *, name: str = "default", trainable: bool = False) -> export.LoraInfo:
    """Attach experts and gates of a file to a network.

    Args:
        network: the base, without gated experts.
        path: file or run folder.
        name: what the fusion is called here.
        trainable: leave the gates trainable.

    Raises:
        CheckpointError: no such file, or one that does not fit.
        ConfigError: the network has gates already, or cannot be gated.
    """
    folder = Path(path)
    file = folder / FILE_NAME if (folder / FILE_NAME).is_file() else export.find_file(folder)
    tensors, metadata = export.read_file(file, tensors=True)
    header = read_header(file, metadata)
    parts: list[dict[str, Tensor]] = [{} for _ in header["experts"]]
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        number, _, inner = rest.partition(".")
        if kind == "experts" and number.isdigit() and int(number) < len(parts):
            parts[int(number)][inner] = tensor
        elif key != "gates.weight":
            raise CheckpointError(f"{file}: {key!r} has no place in a file of gated experts; the file is damaged")
    shape = (len(header["layers"]), len(parts), 1 + int(header["features"]))
    if "gates.weight" not in tensors or tuple(tensors["gates.weight"].shape) != shape:
        raise CheckpointError(f"{file}: expected gates.weight of shape {shape}; the file is damaged")
    known, ranks, alphas = adapters.base_layers(network), Counter[int](), Counter[float]()
    read = [_read_expert(file, part, known) for part in parts]  # everything is checked before the network is touched
    names = [f"{name}_expert_{k}" for k in range(len(parts))]
    for expert, (state, rank, alpha) in zip(names, read, strict=True):
        adapters.attach_modules(network, rank, alpha, name=expert)
        adapters.load_state_dict(network, state, expert)
        ranks.update(rank.values())
        alphas.update(alpha.values())
    gates = _join(network, name, names, header["experts"], header["kind"], int(header["features"]))
    if list(gates.layers) != list(header["layers"]):
        raise CheckpointError(f"{file}: its gates are for other layers than its experts; the file is damaged")
    with torch.no_grad():
        gates.weight.copy_(tensors["gates.weight"])
    gates.weight.requires_grad_(trainable)
    return export.LoraInfo(
        path=file,
        style="gated",
        name=name,
        modules=len(gates.layers),
        rank=ranks.most_common(1)[0][0],
        alpha=alphas.most_common(1)[0][0],
        role=metadata.get("diffalign.role", "positive"),
        metadata=metadata,
    )


def read_header(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a gated file says about itself.

    Raises:
        CheckpointError: it is no gated file, of a later version, or damaged.
    """
    if HEADER not in metadata:
        raise CheckpointError(f"{file}: holds no gated experts; load it with diffalign.export.load_lora")
    try:
        header: dict[str, Any] = json.loads(metadata[HEADER])
        missing = {"version", "kind", "features", "experts", "layers"} - header.keys()
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: {HEADER} in its metadata is not readable; the file is damaged") from error
    if missing or header["version"] != VERSION or header["kind"] not in ("softmax", "sigmoid"):
        raise CheckpointError(
            f"{file}: {HEADER} of version {header.get('version')!r}, expected {VERSION}; use the diffalign "
            f"{metadata.get('diffalign.version', '')} that wrote it (this is {diffalign.__version__})"
        )
    return header


def _read_expert(
    file: Path, part: Mapping[str, Tensor], known: Mapping[str, adapters.Layer]
) -> tuple[dict[str, Tensor], dict[str, int], dict[str, float]]:
    """State, ranks and alphas of one expert in a file."""
    state, ranks, alphas = {}, {}, {}
    for key, tensor in part.items():
        if key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = float(tensor)
            continue
        state[key] = tensor.float()
        path = key.partition(".lora_")[0]
        if path not in known:
            raise CheckpointError(f"{file}: {key!r} fits no layer of this network; the file is for another model")
        if key.endswith(".lora_A.weight"):
            ranks[path] = tensor.shape[0]
            want: tuple[int, ...] = (tensor.shape[0], *known[path].weight.shape[1:])
        else:
            rank = part[f"{path}.lora_A.weight"].shape[0] if f"{path}.lora_A.weight" in part else 0
            want = (known[path].weight.shape[0], rank, *[1] * (tensor.ndim - 2))
        if tuple(tensor.shape) != want:
            raise CheckpointError(
                f"{file}: {key!r} has shape {tuple(tensor.shape)}, this network needs {want}; the file is for another model"
            )
    if not ranks or ranks.keys() != alphas.keys() or len(state) != 2 * len(ranks):
        raise CheckpointError(f"{file}: an expert lacks A, B or alpha of a layer; the file is damaged")
    return state, ranks, alphas
