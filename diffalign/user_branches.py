"""What makes one network draw for many tastes: attentions to a user (PPD), a LoRA that users weigh, a vector on the time.

A user is an embedding: of a person (`diffalign.users`), or the weights of several rewards (`diffalign.preferences`).

Paper: "Personalized Preference Fine-tuning of Diffusion Models", arXiv 2501.06655 (CVPR 2025). No code is public and the
paper was read second-hand. In every attention between image and text a second attention with the same queries looks at
tokens of a user,

    Z = Attn(Q, K_text, V_text) + Attn(Q, u W_k', u W_v')

and only W_k', W_v' and the projection of the user's embedding to tokens are trained. W_v' starts at zero, so that an
untouched network is its base to the bit, and the loss starts at log 2. A user of zeros, "anybody", switches the branch off.

UNVERIFIED: the number of tokens, their normalisation, and in which branches of guidance users act; here in both.

The branch is a module of the network, `user_branch`, that adds to what the attentions return: UNets and transformers with
attention to text (PixArt, Sana, Wan), and joint attention of image and text (SD3, FLUX, Qwen-Image, CogVideoX), where the
image's queries alone look at the user. Rotary positions are left out: users have no place.

Shapes: B rows, d width of an embedding, T tokens, L image tokens, H heads.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn
from torch.nn import functional

from diffalign.adapters import DEFAULT, USERS, lora_layers
from diffalign.config import RunConfig
from diffalign.errors import CheckpointError, ConfigError

NAME = USERS
HIDDEN = 128  # units between a user's embedding and a vector on the time
CLOCKS = ("time_embedding", "timestep_embedder", "time_embedder")  # what diffusers calls the embedding of the time
FILE_NAME = "user_adapter.safetensors"
HEADER = "diffalign.users"


class UserBranch(nn.Module):
    """What lets a network see users: the part that all kinds have in common.

    Args:
        width: d, of an embedding.

    Attributes:
        kind: for files.
        user: embeddings of the rows that come next, (B, d), or None. A batch with k times as many rows holds the rows k
            times over, as guidance does it.
        off: nothing is added.
        names: what the numbers of an embedding are the weights of, where they are weights of rewards.
        strength: multiplies what users change; 1 is as trained.
    """

    kind: ClassVar[str]

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.user: Tensor | None = None
        self.off, self.strength = False, 1.0
        self.names: tuple[str, ...] = ()
        self._hooks: list[Any] = []

    def _join(self, network: nn.Module) -> None:
        """Become a module of the network."""
        if hasattr(network, NAME):
            raise ConfigError("the network has a branch for users already")
        self.to(next(network.parameters()).device)
        network.add_module(NAME, self)

    def remove(self, network: nn.Module) -> None:
        """Take the branch off again."""
        for hook in self._hooks:
            hook.remove()
        del network._modules[NAME]

    @contextmanager
    def given(self, user: Tensor | None, strength: float = 1.0) -> Iterator[UserBranch]:
        """Within, these users act; backward passes through checkpointed blocks have to happen within, too.

        Args:
            user: (B, d), or (d,) for all rows; None: nobody.
            strength: of what users change.

        Raises:
            ConfigError: embeddings of another width.
        """
        before = self.user, self.strength
        self.seat(user)
        self.strength = strength
        try:
            yield self
        finally:
            self.user, self.strength = before

    def seat(self, user: Tensor | None) -> None:
        """Let users act from now on; see `given`."""
        if user is not None and user.shape[-1] != self.width:
            if self.names:
                raise ConfigError(
                    f"got {user.shape[-1]} weights; this adapter was trained on {self.width} rewards: "
                    f"{', '.join(self.names)}"
                )
            raise ConfigError(f"got embeddings of width {user.shape[-1]}; this network was trained for {self.width}")
        self.user = None if user is None else user.reshape(-1, self.width).to(next(self.parameters()))

    def _rows(self, rows: int, where: str) -> Tensor:
        """The users of a batch, (rows, d)."""
        assert self.user is not None, "asked where somebody is given"
        if rows % len(self.user):
            raise RuntimeError(f"{where}: {rows} rows for {len(self.user)} users; expected a multiple")
        return self.user.repeat(rows // len(self.user), 1)

    def _directions(self, rows: int, where: str) -> Tensor:
        """The users of a batch by direction, each of norm sqrt(d); nobody's, zeros, stays zeros.

        Embeddings of several encoders have other sizes, and weights of rewards are the same by their direction.
        """
        return functional.normalize(self._rows(rows, where), dim=-1) * self.width**0.5

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What makes the same module, as JSON."""


class UserAttention(UserBranch):
    """A second attention, to tokens of the user, beside every attention between image and text (PPD).

    Args:
        network: whose attentions get the branch; it is frozen by whoever trains.
        width: d, of an embedding.
        tokens: T.
        size: of a token.
        seed: of the initialisation.

    Raises:
        ConfigError: the network has no attention that could carry it, or carries a branch already.
    """

    kind = "attention"

    def __init__(self, network: nn.Module, width: int, tokens: int = 8, size: int = 256, seed: int = 0) -> None:
        super().__init__(width)
        found = attentions(network)
        self.count, self.size = tokens, size
        self.paths = tuple(found)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.project = nn.Linear(width, tokens * size, bias=False)
            self.norm = nn.LayerNorm(size, bias=False)  # a bias would make tokens of nobody
            inner = [int(getattr(module, "inner_dim", None) or module.to_q.out_features) for module in found.values()]
            self.to_k = nn.ModuleList(nn.Linear(size, n, bias=False) for n in inner)
            self.to_v = nn.ModuleList(nn.Linear(size, n, bias=False) for n in inner)
        for layer in self.to_v:
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
        self._join(network)
        self._hooks = [
            module.register_forward_hook(self._hook(number), with_kwargs=True)
            for number, module in enumerate(found.values())
        ]

    def settings(self) -> dict[str, Any]:
        return {"width": self.width, "tokens": self.count, "size": self.size, "paths": list(self.paths)}

    def _hook(self, number: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self.off or self.user is None:
                return output
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            added = self.strength * self._added(number, module, hidden)
            if isinstance(output, tuple):
                return (output[0] + added.to(output[0].dtype), *output[1:])
            return output + added.to(output.dtype)

        return hook

    def _added(self, number: int, module: Any, hidden: Tensor) -> Tensor:
        """What the user adds to an attention's output, (B, L, C)."""
        rows = len(hidden)
        user = self._rows(rows, self.paths[number])
        tokens = self.norm(self.project(user).view(rows, self.count, self.size))
        heads = int(module.heads)
        query = _split(_normed(module, module.to_q(hidden)), heads)
        norm = getattr(module, "norm_q", None)
        if norm is not None and _norm_width(norm) == query.shape[-1]:
            query = norm(query)
        key, value = (_split(layer(tokens).to(query.dtype), heads) for layer in (self.to_k[number], self.to_v[number]))
        found = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        somebody = (user != 0).any(1).to(found)[:, None, None]
        layer = module.to_out[0]
        out = layer(found * somebody)
        bias = getattr(layer, "bias", None)
        return out if bias is None else out - bias


class UserGates(UserBranch):
    """A LoRA whose ranks weigh more or less by user: B diag(1 + G u) A in every layer.

    One adapter is everybody's, and users turn its ranks up and down. It reaches every layer that the LoRA has, which
    attentions to users do not. G starts at zero; nobody has the plain LoRA. There is no paper that we could name for it; it
    is what people ask for as a LoRA with weights by user.

    Embeddings of a few numbers, as weights of rewards are, would turn a linear G slowly (a step of Adam changes it by the
    learning rate whatever d is): with a hidden layer, which all layers of the LoRA share, it is B diag(1 + G h(u)) A.

    Where embeddings are weights p of d rewards, ranks can be dealt out to them, `shares`: B diag(d p_k(j) + G h(u)) A with
    k(j) = j mod d, which starts as a sum of d adapters by weight, all of them trained for every mixture, and G is what
    mixtures need beyond that. Nobody's gates, 1, are those of equal weights. While B is zero nothing depends on p.

    Args:
        network: with a LoRA.
        width: d, of an embedding.
        adapter: name of the LoRA.
        hidden: units of h, silu(W u + b); 0: h(u) = u.
        shares: deal the ranks out; embeddings are at least 0, with sum 1.
        seed: of the initialisation of W and b.

    Raises:
        ConfigError: no such adapter, or the network carries a branch already.
    """

    kind = "gates"

    def __init__(
        self,
        network: nn.Module,
        width: int,
        adapter: str = DEFAULT,
        *,
        hidden: int = 0,
        shares: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(width)
        found: dict[str, Any] = dict(lora_layers(network, adapter))
        if not found:
            raise ConfigError(f"no adapter {adapter!r} whose ranks users could weigh; attach a LoRA first")
        self.paths, self.ranks = tuple(found), tuple(int(layer.r[adapter]) for layer in found.values())
        if shares and min(self.ranks) < width:
            raise ConfigError(f"lora.rank: got {min(self.ranks)}; expected at least one for each of {width} rewards")
        self.shares = shares
        self.hidden, self.first = hidden, first_layer(width, hidden, seed) if hidden else None
        self.gates = nn.ModuleList(nn.Linear(hidden or width, rank, bias=False) for rank in self.ranks)
        for layer in self.gates:
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
        self._join(network)
        self._hooks = [
            layer.lora_A[adapter].register_forward_hook(self._hook(number))
            for number, layer in enumerate(found.values())
        ]

    def settings(self) -> dict[str, Any]:
        own = {"hidden": self.hidden, "shares": self.shares}
        return {"width": self.width, "paths": list(self.paths), "ranks": list(self.ranks)} | own

    def _hook(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if self.off or self.user is None:
                return output
            user = self._directions(len(output), self.paths[number])
            somebody = (user != 0).any(1, keepdim=True)
            if self.first is not None:
                user = functional.silu(self.first(user)) * somebody
            change = self.gates[number](user)
            if self.shares:
                weights = self._rows(len(output), self.paths[number])
                dealt = weights[:, torch.arange(change.shape[1], device=weights.device) % self.width]
                change = change + (self.width * dealt - 1) * somebody
            gate = 1 + self.strength * change
            sides = (1,) * (output.ndim - 2)
            convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
            shape = (*gate.shape, *sides) if convolution else (len(gate), *sides, gate.shape[1])
            return output * gate.view(shape).to(output.dtype)

        return hook


class UserTime(UserBranch):
    """A vector that users add to the embedded time, on which every block of the network is conditioned.

    t + W_2 silu(W_1 u + b_1) + b_2, of which W_2 and b_2 start at zero; nobody adds nothing. That is how class labels and
    sizes enter these networks. In UNets it reaches residual blocks, in transformers their modulations.

    Args:
        network: a LoRA may be attached.
        width: d, of an embedding.
        hidden: units of the hidden layer.
        seed: of the initialisation.

    Raises:
        ConfigError: the network embeds no time in one vector, or carries a branch already.
    """

    kind = "time"

    def __init__(self, network: nn.Module, width: int, hidden: int = 128, seed: int = 0) -> None:
        super().__init__(width)
        path, clock = embedded_time(network)
        self.path, self.hidden = path, hidden
        self.paths = (path,)
        self.first = first_layer(width, hidden, seed)
        self.last = nn.Linear(hidden, clock.linear_2.out_features)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self._join(network)
        self._hooks = [clock.register_forward_hook(self._add)]

    def settings(self) -> dict[str, Any]:
        return {"width": self.width, "hidden": self.hidden, "paths": list(self.paths)}

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.off or self.user is None:
            return output
        user = self._directions(len(output), self.path)
        added = self.last(functional.silu(self.first(user)))
        somebody = (user != 0).any(1, keepdim=True).to(added)
        change = (self.strength * somebody * added).to(output.dtype)
        return output + change.view(
            len(change), *[1] * (output.ndim - 2), -1
        )  # some models have a time for every token


def first_layer(width: int, hidden: int, seed: int) -> nn.Linear:
    """The layer from an embedding to hidden units, a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(width, hidden)


def embedded_time(network: nn.Module) -> tuple[str, Any]:
    """The module whose output, (B, D), is the embedded time, and its path.

    Raises:
        ConfigError: there is none, or more than one.
    """
    found = {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, TimestepEmbedding) and path.rpartition(".")[2] in CLOCKS
    }
    if len(found) != 1:
        raise ConfigError(
            f"{type(network).__name__} embeds the time in {len(found)} places; expected one to which a vector can be added. "
            "Let users or preferences act through gates"
        )
    return next(iter(found.items()))


@dataclass(frozen=True)
class Kind:
    """What makes a branch.

    Attributes:
        through: "attention", "gates" or "time".
        width: d, of an embedding.
        tokens, token_size: of "attention".
        hidden: of "time", and of "gates", where 0 is none.
        shares: of "gates".
        names: of the rewards that embeddings are weights of.
        seed: of the initialisation.
    """

    through: Literal["attention", "gates", "time"]
    width: int
    tokens: int = 8
    token_size: int = 256
    hidden: int = 0
    shares: bool = False
    names: tuple[str, ...] = ()
    seed: int = 0

    def attach(self, network: nn.Module) -> UserBranch:
        """Put the branch on a network, with the LoRA already attached where there is one.

        Raises:
            ConfigError: the network cannot carry it.
        """
        branch: UserBranch
        if self.through == "gates":
            branch = UserGates(network, self.width, hidden=self.hidden, shares=self.shares, seed=self.seed)
        elif self.through == "time":
            branch = UserTime(network, self.width, self.hidden, self.seed)
        else:
            branch = UserAttention(network, self.width, self.tokens, self.token_size, self.seed)
        branch.names = self.names
        return branch


def wanted(config: RunConfig, width: int | None = None) -> Kind | None:
    """The branch that a run trains, if it trains one.

    Args:
        config: of the run.
        width: of users' embeddings, where it is known.
    """
    users, preference = config.users, config.preference
    if users.encoder is not None:
        width = users.expected_width if width is None else width
        hidden = HIDDEN if users.through == "time" else 0
        return Kind(users.through, width, users.tokens, users.token_size, hidden, seed=config.seed)
    if preference.seen:
        names = preference.rewards
        shares = preference.through == "gates"
        return Kind(
            preference.through, len(names), hidden=preference.hidden, shares=shares, names=names, seed=config.seed
        )
    return None


def attentions(network: nn.Module) -> dict[str, Any]:
    """Attentions in which the image looks at text, by path.

    Raises:
        ConfigError: there is none.
    """
    every = {path: m for path, m in network.named_modules() if hasattr(m, "to_q") and hasattr(m, "to_out")}
    every = {path: m for path, m in every.items() if isinstance(m.to_out, nn.ModuleList)}
    cross = {path: m for path, m in every.items() if path.endswith("attn2")}
    joint = {path: m for path, m in every.items() if getattr(m, "add_k_proj", None) is not None}
    found = joint or cross or every  # SD3.5 medium has an attn2, too, in which the image looks at itself
    if not found:
        raise ConfigError(f"{type(network).__name__} has no attention that a user could be added to")
    return found


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, L, C) to (B, H, L, C / H)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _norm_width(norm: nn.Module) -> int | None:
    weight = getattr(norm, "weight", None)
    return None if weight is None else int(weight.numel())


def _normed(module: Any, query: Tensor) -> Tensor:
    """Queries after a norm over all heads together (Wan); those over each head come after splitting."""
    norm = getattr(module, "norm_q", None)
    return norm(query) if norm is not None and _norm_width(norm) == query.shape[-1] else query  # type: ignore[no-any-return]


def of(network: nn.Module) -> UserBranch | None:
    """The user's branch of a network, if it has one."""
    found = getattr(network, NAME, None)
    return found if isinstance(found, UserBranch) else None


def save(branch: UserBranch, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the branch as a safetensors file.

    Args:
        branch: to be written.
        path: file.
        metadata: facts of the run as texts, such as family, base and encoder.
    """
    from diffalign.export import write_file

    tensors = {name: value.detach().float().cpu().contiguous() for name, value in branch.state_dict().items()}
    settings = {"kind": branch.kind, "rewards": branch.names} | branch.settings()
    header = {HEADER: json.dumps(settings), "diffalign.role": "user"}
    write_file(
        path, tensors, {"format": "pt"} | header | {f"diffalign.{key}": value for key, value in metadata.items()}
    )


def load(network: nn.Module, path: str | Path) -> UserBranch:
    """Put the branch of a file onto a network; beside attentions of its own, the LoRA of the same folder first.

    Args:
        network: of the base that it was trained on.
        path: file, or folder with `user_adapter.safetensors`.

    Raises:
        CheckpointError: no such file, or another network's.
    """
    from diffalign.export import load_lora, read_file

    file = Path(path)
    file = file / FILE_NAME if file.is_dir() else file
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; expected a run folder, or the {FILE_NAME} of one")
    tensors, metadata = read_file(file, tensors=True)
    if HEADER not in metadata:
        raise CheckpointError(f"{file}: no adapter for users; LoRA files are loaded by pipe.load_lora_weights")
    settings = json.loads(metadata[HEADER])
    kind = Kind(
        settings["kind"],
        settings["width"],
        settings.get("tokens", 8),
        settings.get("size", 256),
        settings.get("hidden", 0),
        settings.get("shares", False),
        tuple(settings.get("rewards", ())),
    )
    if kind.through == "attention" and list(attentions(network)) != settings["paths"]:
        raise CheckpointError(f"{file}: made for a network with other layers; load it into its own base")
    if kind.through != "attention":
        load_lora(network, file.parent, family=metadata["diffalign.family"])
    branch = kind.attach(network)
    if branch.settings()["paths"] != settings["paths"]:
        branch.remove(network)
        raise CheckpointError(f"{file}: made for a network with other layers; load it into its own base")
    try:
        branch.load_state_dict(tensors)
    except RuntimeError as error:
        branch.remove(network)
        raise CheckpointError(f"{file}: does not fit: {str(error).splitlines()[-1].strip()}") from error
    return branch.requires_grad_(False)
