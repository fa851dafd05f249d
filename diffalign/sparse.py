"""SaRA, LIFT and HFT: which entries of the weights are trained, as an additive change beside a frozen base.

What is trained is one matter and the objective another: these are choices of the former, in place of a LoRA. Every change
starts at zero and lives in a `DeltaLayer`, so adapters off is the base to the bit, and references, averages, branches of
guidance and checkpoints treat it as any adapter.

- SaRA (arXiv 2409.06633, ICLR 2025; code sjtuplayer/SaRA, optim/adamw2.py): entries with |w| < threshold. Deviations from
  the code: a negative or missing step of re-selection means never (the released optimisers stop at their first step there);
  re-selection keeps signs, the optimiser's moments and the step itself (the "unstructured" version loses all three); the
  nuclear norm acts (there it is dead code, in adamw2 it is not). Biases and norms, which the code includes, are a choice.
- LIFT (arXiv 2506.00772, ICML 2025; code zihanghliu/LIFT, src/sparseAdam.py): the k largest |entries| of the truncated SVD
  of each matrix, by torch's randomised SVD in float32, seeded. Deviations: convolutions are matrices of outputs by
  everything else (the code skips them); the choice is made once (the code makes it anew every some steps).
- HFT (arXiv 2404.18466, ACL 2025; read second-hand): half of the matrices, all of their entries. Of an attention's four
  projections two, of a feed-forward layer's two one and the other in turn, of convolutions and of everything else half. The
  paper is on language models; its port to UNets and transformers of images is ours. Norms, which it halves too, are frozen.

AdamW's weight decay acts on changes here and pulls towards the base, not towards zero.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from diffalign import adapters
from diffalign.config import SparseConfig
from diffalign.delta_layers import KINDS, DeltaLayer, Kind, delta_layers, plain_path, tuner_layers, values_of
from diffalign.errors import CheckpointError, ConfigError
from diffalign.schedules import generator_for, sample_seed

log = logging.getLogger(__name__)
RECORDS = "diffalign_deltas"  # the network's attribute: what is known of its changes, by adapter
SHA, NORMS = "base.sha256", "base.norms"  # in a state: which base the entries were chosen on
LEAST_SIDE, LEAST_ENTRIES = 64, 100  # of matrices in the nuclear norm, both exclusive; adamw2.py
NORM_TOLERANCE = 2e-3  # by which norms of a base in another floating type may differ
ROUNDING = 1e-5  # by which they may in the same one, where an adapter was fused on another device, say
_READ = {
    "sara": ("threshold", "biases_and_norms", "nuclear_norm", "reselect_at"),
    "lift": ("rank", "filter_rank"),
    "hft": (),
}
_TITLES = {"sara": "SaRA", "lift": "LIFT", "hft": "HFT"}
# The four projections of an attention; those of a transformer's text side, to_add_out among them, are four of their own.
_PROJECTION = re.compile(r"^(.*\.attn\d*)\.(?:(to)_(?!add_)[a-z0-9.]+|(?:to_)?(add)_[a-z0-9._]+)$")

Choice = dict[tuple[str, Kind], Tensor | None]  # (layer, parameter) -> places, None for all of them


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a change.

    Attributes:
        method: "sara", "lift" or "hft".
        sha256: of the base's parameters that it changes, (32,) uint8, their floating type included.
        norms: L2 norms of these parameters, (P,) float32, in the order of paths.
        dtype: their floating type, such as "float32".
    """

    method: str
    sha256: Tensor
    norms: Tensor
    dtype: str


def check_sparse(config: SparseConfig) -> None:
    """Refuse settings out of range, or that nothing would read.

    Raises:
        ConfigError: the first problem found.
    """
    plain = SparseConfig()
    if config.method is None:
        if config != plain:
            raise ConfigError("sparse: set sparse.method, without which the section has no effect, or remove it")
        return
    for method, names in _READ.items():
        for name in names if method != config.method else ():
            if (value := getattr(config, name)) != getattr(plain, name):
                raise ConfigError(
                    f"sparse.{name}: got {value!r}; it has no effect with sparse.method {config.method!r}, it is of "
                    f"{method!r}: remove it"
                )
    if not config.threshold > 0:
        raise ConfigError(f"sparse.threshold: got {config.threshold}; expected a positive number such as 2e-3")
    if not 0 <= config.nuclear_norm < math.inf:
        raise ConfigError(f"sparse.nuclear_norm: got {config.nuclear_norm}; expected 0 (none) or more, such as 5e-4")
    if config.reselect_at is not None and config.reselect_at < 1:
        raise ConfigError(
            f"sparse.reselect_at: got {config.reselect_at}; expected a step of at least 1, or null for never"
        )
    for name in ("rank", "filter_rank"):
        if getattr(config, name) < 1:
            raise ConfigError(f"sparse.{name}: got {getattr(config, name)}; expected at least 1")


def sara_learning_rate(threshold: float) -> float:
    """The published learning rate for a threshold, 1e-3 exp(-350 threshold): smaller entries bear larger steps."""
    return 1e-3 * math.exp(-350 * threshold)


# -- Choosing ------------------------------------------------------------------------------------------------------------


def below(weight: Tensor, threshold: float) -> Tensor:
    """SaRA's entries: places where |w| < threshold, strictly and in float32; int32 (k,), ascending."""
    return (weight.detach().flatten().abs().float() < threshold).nonzero().flatten().to(torch.int32)


def low_rank_part(weight: Tensor, rank: int, seed: int = 0) -> Tensor:
    """The rank-r part of a matrix by randomised SVD, float32.

    Args:
        weight: any number of axes; all but the first are one.
        rank: of the part; the sketch has twice as many columns.
        seed: of the sketch; global generators are left as they were.

    Returns:
        (rows, columns), exact up to rounding where the sketch is as wide as the matrix.
    """
    matrix = weight.detach().float().flatten(1)
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix, q=min(2 * rank, *matrix.shape), niter=4)
    return (u[:, :rank] * s[:rank]) @ v[:, :rank].T


def principal(weight: Tensor, rank: int, filter_rank: int, seed: int = 0) -> Tensor:
    """LIFT's entries: places of the k largest |entries| of the low-rank part; int32 (k,), ascending.

    Args:
        weight: of two or more axes.
        rank: k = rank (rows + columns), or all entries where that is more.
        filter_rank: of the low-rank part.
        seed: of the randomised SVD.
    """
    rows, columns = weight.shape[0], weight[0].numel()
    k = min(rank * (rows + columns), rows * columns)
    if weight.is_meta:
        return torch.empty(k, dtype=torch.int32, device="meta")
    part = low_rank_part(weight, filter_rank, seed)
    return part.flatten().abs().topk(k).indices.sort().values.to(torch.int32)


def category(path: str, layer: nn.Module) -> tuple[str, str]:
    """(category, group) of a layer for HFT: a group is halved by itself."""
    if found := _PROJECTION.match(path):
        return "attention", f"{found[1]} {found[2] or found[3]}"
    if (found := adapters.FEED_FORWARD.search(path)) is not None:
        return "feed-forward", path[: found.end() if path[found.start()] == "." else path.rfind(".")]
    return ("convolution", "") if isinstance(layer, nn.Conv2d) else ("other", "")


def half(layers: Mapping[str, nn.Module], seed: int = 0) -> list[str]:
    """HFT's matrices: a seeded half of every group of layers, in the given order.

    An odd group has one more or one fewer by turns, so a category's share is one half up to half a matrix in all.
    """
    draw = generator_for(seed, "hft")
    categories: dict[str, dict[str, list[str]]] = {}
    for path, layer in layers.items():
        kind, group = category(path, layer)
        categories.setdefault(kind, {}).setdefault(group, []).append(path)
    chosen: set[str] = set()
    for kind, groups in categories.items():
        turn = int(torch.randint(2, (), generator=draw))
        for members in groups.values():
            count = len(members) // 2
            if len(members) % 2:
                count, turn = count + turn, 1 - turn
            order = torch.randperm(len(members), generator=draw).tolist()
            if kind == "feed-forward" and len(members) == 2:
                order, turn = [turn], 1 - turn
            chosen.update(members[i] for i in order[:count])
    return [path for path in layers if path in chosen]


def norms_in_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """Norms with parameters of their own that stand in a network's blocks, by path."""
    return {
        plain_path(path): module
        for path, module in network.named_modules()
        if "norm" in type(module).__name__.lower()
        and not list(module.children())
        and isinstance(getattr(module, "weight", None), nn.Parameter)
        and adapters.in_blocks(path)
    }


def choose(network: nn.Module, config: SparseConfig, seed: int = 0) -> Choice:
    """The entries that are trained.

    Args:
        network: the base; on the meta device SaRA chooses all entries, of which weights would leave some out.
        config: how.
        seed: of LIFT's sketches and HFT's half.

    Raises:
        ConfigError: targets that name no layer, weights that are no floating numbers, or no entry at all.
    """
    known = adapters.base_layers(network)
    layers: dict[str, Any] = {
        path: known[path] for path in adapters.target_modules(network, config.targets, "sparse.targets")
    }
    for path, layer in layers.items():
        weight: Any = layer.weight
        if not weight.is_floating_point() or weight.numel() >= 2**31:
            raise ConfigError(f"sparse.targets: {path!r} is quantised or too large; its entries cannot be changed")
    if config.method == "hft":
        if not (chosen := half(layers, seed)):
            raise ConfigError(
                f"sparse.targets: got {config.targets!r}, which is one matrix, and the half of one is none here; take more"
            )
        return dict.fromkeys((path, "weight") for path in chosen)
    if config.method == "lift":
        return {
            (path, "weight"): principal(
                layer.weight, config.rank, config.filter_rank, sample_seed(seed, path, 0) % 2**31
            )
            for path, layer in layers.items()
        }
    kinds: tuple[Kind, ...] = KINDS if config.biases_and_norms else ("weight",)
    found: Choice = {}
    for path, layer in (layers | (norms_in_blocks(network) if config.biases_and_norms else {})).items():
        for kind in kinds:
            own = getattr(layer, kind, None)
            if own is None:
                continue
            on_meta = own.is_meta
            places = (
                torch.empty(own.numel(), dtype=torch.int32, device="meta") if on_meta else below(own, config.threshold)
            )
            if len(places):
                found[path, kind] = places
    if not found:
        typical = torch.cat(
            [layer.weight.detach().flatten().abs()[:1000].float() for layer in layers.values()]
        ).median()
        raise ConfigError(
            f"sparse.threshold: got {config.threshold:g}, and no entry is smaller; half of them are below {typical:.2g}: "
            "take a larger one"
        )
    return found


# -- Attaching -----------------------------------------------------------------------------------------------------------


def attach(network: nn.Module, config: SparseConfig, name: str = adapters.DEFAULT, seed: int = 0) -> list[nn.Parameter]:
    """Freeze a network and make the chosen entries trainable, as a change of zero.

    Args:
        network: a diffusers or transformers model; on the meta device only shapes are made.
        config: which entries.
        name: of the adapter; it becomes the only active one.
        seed: see `choose`.

    Returns:
        The values, float32 whatever the base's type, in the network's order.

    Raises:
        ConfigError: see `check_sparse` and `choose`; a name that is taken.
    """
    check_sparse(config)
    assert config.method is not None, "the caller has asked for one"
    place(network, choose(network, config, seed), name, config.method)
    return adapters.parameters(network, name)


def place(network: nn.Module, choice: Choice, name: str, method: str) -> None:
    """Put zero changes of chosen entries onto a network, frozen before, and make them the only active adapter.

    Raises:
        ConfigError: the name is taken.
    """
    if name in adapters.adapter_names(network):
        raise ConfigError(f"the network already has an adapter named {name!r}; choose another name")
    network.requires_grad_(False)
    wrapped = delta_layers(network)
    record = _record(network, choice, method)
    for (path, kind), index in choice.items():
        if path not in wrapped:
            wrapped[path] = _wrap(network, path)
        wrapped[path].add(name, kind, index)
    for layer in tuner_layers(network):
        layer.set_adapter([name] if isinstance(layer, DeltaLayer) and name in layer.scaling else [])
    network.__dict__[RECORDS] = network.__dict__.get(RECORDS, {}) | {name: record}


def share_places(network: nn.Module, accelerator: Accelerator, name: str = adapters.DEFAULT) -> None:
    """Give every process the places that the first has chosen, in place; on one process nothing is done.

    Each has chosen by itself, and a randomised SVD may differ by a bit between devices.

    Raises:
        ConfigError: numbers of entries differ: the processes have different weights.
    """
    if accelerator.num_processes == 1:
        return
    found = [
        (f"{path}.{kind}", layer.index(kind)[name])
        for path, kind, layer in changes(network, name)
        if name in layer.index(kind)
    ]
    digest = hashlib.sha256(repr([(key, len(index)) for key, index in found]).encode()).digest()
    own = torch.tensor([int.from_bytes(digest[:7], "big")], device=accelerator.device)
    if len(set(accelerator.gather(own).tolist())) > 1:
        raise ConfigError(
            "sparse: processes have chosen different numbers of entries, so their weights differ; see that all load the "
            "same files (model.pretrained, model.adapters)"
        )
    for _, index in found:
        index.copy_(broadcast(index, from_process=0))


def _wrap(network: nn.Module, path: str) -> DeltaLayer:
    """A `DeltaLayer` around a layer, inside of a LoRA that it may have."""
    parent, last = network.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    while hasattr(parent.get_submodule(last), "base_layer"):
        parent, last = parent.get_submodule(last), "base_layer"
    layer = DeltaLayer(parent.get_submodule(last))
    layer.train(parent.training)
    setattr(parent, last, layer)
    return layer


def remove(network: nn.Module) -> bool:
    """Take all `DeltaLayer`s off a network, and say whether there were any; what was merged stays in its weights."""
    found = delta_layers(network)
    for path, layer in found.items():
        parent, last = network.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        while parent.get_submodule(last) is not layer:
            parent, last = parent.get_submodule(last), "base_layer"
        setattr(parent, last, layer.base_layer)
    network.__dict__.pop(RECORDS, None)
    return bool(found)


def _record(network: nn.Module, choice: Choice, method: str) -> Record:
    """Hash and norms of the base's parameters that are changed, by layer and kind in order."""
    layers, digest, norms, kinds = adapters.base_layers(network) | norms_in_blocks(network), hashlib.sha256(), [], set()
    on_meta = False
    for path, kind in sorted(choice):
        own: Tensor = getattr(layers[path], kind).detach()
        kinds.add(str(own.dtype).removeprefix("torch."))
        if own.is_meta:
            on_meta = True
            continue
        digest.update(f"{path}.{kind} {own.dtype} {tuple(own.shape)}".encode())
        digest.update(own.cpu().contiguous().view(torch.uint8).numpy().data)
        norms.append(own.float().norm().cpu())
    if on_meta:
        return Record(method=method, sha256=torch.zeros(32), norms=torch.zeros(len(choice)), dtype="")
    return Record(
        method=method,
        sha256=torch.tensor(list(digest.digest()), dtype=torch.uint8),
        norms=torch.stack(norms),
        dtype=" ".join(sorted(kinds)),
    )


def record_of(network: nn.Module, name: str) -> Record:
    """What is known of a change."""
    found: Record = network.__dict__[RECORDS][name]
    return found


def require_base(own: Record, state: Mapping[str, Tensor], what: str, dtype: str | None = None) -> None:
    """Refuse entries that were chosen on another base.

    Args:
        own: of the base that is here.
        state: with `base.sha256` and `base.norms`.
        what: whose entries, for the message.
        dtype: of their base; None: the same as here. Where it is another, bytes differ anyway and norms are compared, up to
            2e-3; where it is the same, norms may differ by 1e-5, with a warning.

    Raises:
        CheckpointError: the bases differ.
    """
    if SHA not in state or NORMS not in state:
        raise CheckpointError(f"{what}: {SHA} or {NORMS} is missing, so nobody knows which base it is for")
    sha, norms = state[SHA], state[NORMS]
    if torch.equal(sha.cpu(), own.sha256):
        return
    rounded = dtype not in (None, own.dtype)  # to another type
    rtol, atol = (NORM_TOLERANCE, 1e-6) if rounded else (ROUNDING, 1e-8)
    if norms.shape != own.norms.shape or not torch.allclose(norms.cpu().float(), own.norms, rtol=rtol, atol=atol):
        raise CheckpointError(
            f"{what}: its entries were chosen on other weights than this base has; load the base that it was trained on "
            "(model.pretrained, model.adapters). For relatives of it, ComfyUI takes the .diff file of 'diffalign export'"
        )
    if not rounded:
        log.warning(
            "%s: this base has not the very weights that its entries were chosen on, but their norms agree up to %g: taken "
            "for rounding, as of adapters that were fused on another device",
            what,
            ROUNDING,
        )


# -- State ---------------------------------------------------------------------------------------------------------------


def fixed(network: nn.Module, name: str) -> dict[str, Tensor]:
    """What a change's state has beside its values: places, and marks of the base."""
    record = record_of(network, name)
    found = {SHA: record.sha256, NORMS: record.norms}
    for path, layer in delta_layers(network, name).items():
        for kind in KINDS:
            if name in layer.index(kind):
                found[f"{path}.index_{kind}"] = layer.index(kind)[name]
    return found


def load_fixed(network: nn.Module, name: str, state: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Take over the places that a state has, in place; `values` are the change's own.

    Raises:
        CheckpointError: of another base, or a missing, additional or misshapen tensor; nothing is changed then.
    """
    require_base(record_of(network, name), state, f"adapter {name!r}")
    adapters.check_state({**values, **fixed(network, name)}, state, f"adapter {name!r}")
    for path, layer in delta_layers(network, name).items():
        for kind in KINDS:
            if name in layer.index(kind):
                layer.index(kind)[name].copy_(state[f"{path}.index_{kind}"])


def attach_state(
    network: nn.Module,
    state: Mapping[str, Tensor],
    method: str,
    name: str = adapters.DEFAULT,
    *,
    what: str = "the state",
    dtype: str | None = None,
) -> list[nn.Parameter]:
    """Attach the change of an `adapters.state_dict`: its places, not those that would be chosen now.

    Args:
        network: the base that it was trained on.
        state: see `adapters.state_dict`.
        method: how its entries were chosen.
        name: of the adapter here.
        what: where the state comes from, for messages.
        dtype: floating type of the base that the entries were chosen on; None: the same as here.

    Raises:
        CheckpointError: of another network or base, or damaged; the network is untouched then.
        ConfigError: the name is taken.
    """
    known = adapters.base_layers(network) | norms_in_blocks(network)
    choice: Choice = {}
    for key, values in state.items():
        path, _, end = key.rpartition(".")
        if key in (SHA, NORMS) or end.startswith("index_"):
            continue
        kind: Kind = "bias" if end == "delta_bias" else "weight"
        own = getattr(known.get(path), kind, None)
        index = state.get(f"{path}.index_{kind}")
        if not end.startswith("delta_") or own is None:
            raise CheckpointError(f"{what}: {key!r} fits no layer of this network; it is for another model")
        inside = index is None or _are_places(index, own.numel())
        if not inside or values.shape != (own if index is None else index).shape:
            raise CheckpointError(
                f"{what}: {key!r} has shape {tuple(values.shape)} and does not fit; it is for another model"
            )
        choice[path, kind] = index
    if not choice:
        raise CheckpointError(f"{what}: holds no changes of weights; the file is damaged")
    require_base(_record(network, choice, method), state, what, dtype)
    place(network, choice, name, method)
    with torch.no_grad():
        for key, parameter in values_of(network, name).items():
            parameter.copy_(state[key])
    return adapters.parameters(network, name)


def _are_places(index: Tensor, size: int) -> bool:
    """Whether these are ascending places in that many entries."""
    fits = index.dtype == torch.int32 and index.ndim == 1 and len(index) > 0
    return fits and bool((index.diff() > 0).all()) and int(index[0]) >= 0 and int(index[-1]) < size


# -- While it is trained -------------------------------------------------------------------------------------------------


def changes(network: nn.Module, name: str) -> Iterator[tuple[str, Kind, DeltaLayer]]:
    """(path, parameter, layer) of every change, in the network's order."""
    for path, layer in delta_layers(network, name).items():
        for kind in KINDS:
            if name in layer.values(kind):
                yield path, kind, layer


class Reselection:
    """SaRA's second choice: entries that have grown to the threshold keep their value from then on.

    Shapes stay as they are, and so do the moments that the optimiser has of the others. Entries that are held have no
    gradient, and whatever moments or weight decay make of them is undone after every step.

    Args:
        network: with the change.
        config: threshold and step.
        name: of the change.
    """

    def __init__(self, network: nn.Module, config: SparseConfig, name: str = adapters.DEFAULT) -> None:
        self.network, self.config, self.name = network, config, name
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}  # places in the values, and their values

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Called after every update of the optimiser, before averages see it."""
        if step == self.config.reselect_at:
            for path, kind, layer in changes(self.network, self.name):
                self._hold(f"{path}.{kind}", kind, layer, layer.entries(self.name, kind).abs() >= self.config.threshold)
            return
        if self.kept:
            for path, kind, layer in changes(self.network, self.name):
                rows, values = self.kept[f"{path}.{kind}"]
                layer.values(kind)[self.name].index_copy_(0, rows, values)

    def _hold(self, key: str, kind: Kind, layer: DeltaLayer, held: Tensor) -> None:
        rows = held.nonzero().flatten()
        layer.held(kind)[self.name] = held
        self.kept[key] = rows, layer.values(kind)[self.name].detach()[rows].clone()

    def trained(self) -> int:
        """How many entries are trained now."""
        every = sum(layer.values(kind)[self.name].numel() for _, kind, layer in changes(self.network, self.name))
        return every - sum(len(rows) for rows, _ in self.kept.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Which entries are held, by parameter: int64 places in the values. Their values are the adapter's own."""
        return {key: rows for key, (rows, _) in self.kept.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned, when the adapter's values are back."""
        for path, kind, layer in changes(self.network, self.name) if state else ():
            values = layer.values(kind)[self.name]
            held = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
            held[state[f"{path}.{kind}"].to(values.device)] = True
            self._hold(f"{path}.{kind}", kind, layer, held)


class NuclearNorm:
    """SaRA's penalty: weight times the sum of singular values of one matrix a step, drawn at random.

    The matrix has W0 + change at the entries that are trained and zeros elsewhere, as in the released code: the change alone
    is not what is penalised.

    Args:
        network: with the change.
        weight: of the penalty.
        seed: of the draws.
        name: of the change.

    Raises:
        ConfigError: no matrix has both sides above 64 and more than 100 trained entries.
    """

    def __init__(self, network: nn.Module, weight: float, seed: int = 0, name: str = adapters.DEFAULT) -> None:
        self.weight, self.seed, self.name = weight, seed, name
        self.layers = [
            layer
            for _, kind, layer in changes(network, name)
            if kind == "weight"
            and layer.own(kind).ndim == 2
            and min(layer.own(kind).shape) > LEAST_SIDE
            and layer.values(kind)[name].numel() > LEAST_ENTRIES
        ]
        if not self.layers:
            raise ConfigError(
                f"sparse.nuclear_norm: got {weight:g}, and no trained linear layer has both sides above {LEAST_SIDE}; "
                "set it to 0"
            )

    def __call__(self, step: int) -> Tensor:
        """The penalty of an optimiser step, with gradient; a scalar, float32."""
        drawn = int(torch.randint(len(self.layers), (), generator=generator_for(self.seed, "nuclear norm", step)))
        return self.weight * torch.linalg.matrix_norm(self.matrix(self.layers[drawn]), "nuc")

    def matrix(self, layer: DeltaLayer) -> Tensor:
        """What is penalised of a layer, float32 in the weight's shape."""
        entries, own = layer.entries(self.name, "weight"), layer.own("weight")
        if self.name in layer.held("weight"):
            entries = entries * ~layer.held("weight")[self.name]
        flat = torch.zeros(own.numel(), device=own.device)
        return flat.index_add(0, layer.index("weight")[self.name], entries).view(own.shape)


def describe(config: SparseConfig) -> str:
    """What a run has trained, for a sentence that goes on with "for <base>"."""
    assert config.method is not None, "asked of runs that train entries"
    what = {
        "sara": f"the entries with |w| < {config.threshold:g} of chosen layers",
        "lift": f"{config.rank} (rows + columns) principal entries of every chosen matrix",
        "hft": "a seeded half of the chosen matrices",
    }[config.method]
    return f"An additive change of the weights, no LoRA and without a rank ({_TITLES[config.method or 'hft']}: {what}),"


def label(config: SparseConfig) -> str:
    """The method and its numbers, for people."""
    assert config.method is not None, "asked of runs that train entries"
    targets: str | Sequence[str] = config.targets
    where = targets if isinstance(targets, str) else ", ".join(targets)
    numbers = {
        "sara": f" below {config.threshold:g}",
        "lift": f" rank {config.rank} of rank {config.filter_rank}",
        "hft": "",
    }[config.method]
    return f"{_TITLES[config.method or 'hft']}{numbers} on {where}"
