"""Decoupled cross-attention to a user: what makes one network draw for many tastes (PPD).

Paper: "Personalized Preference Fine-tuning of Diffusion Models", arXiv 2501.06655 (CVPR 2025). No code is public and the
paper was read second-hand. In every attention between image and text a second attention with the same queries looks at
tokens of a user,

    Z = Attn(Q, K_text, V_text) + Attn(Q, u W_k', u W_v')

and only W_k', W_v' and the projection of the user's embedding to tokens are trained. W_v' starts at zero, so that an
untouched network is its base to the bit, and the loss starts at log 2. A user of zeros, "anybody", switches the branch off.

UNVERIFIED: the number of tokens, their normalisation, and in which branches of guidance users act; here in both.

The branch is a module of the network, `user_attention`, that adds to what the attentions return: UNets and transformers with
attention to text (PixArt, Sana, Wan), and joint attention of image and text (SD3, FLUX, Qwen-Image, CogVideoX), where the
image's queries alone look at the user. Rotary positions are left out: users have no place.

Shapes: B rows, d width of an embedding, T tokens, L image tokens, H heads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffalign.adapters import USERS
from diffalign.errors import CheckpointError, ConfigError

NAME = USERS
FILE_NAME = "user_adapter.safetensors"
HEADER = "diffalign.users"


class UserAttention(nn.Module):
    """The user's branch of all attentions of a network.

    Args:
        network: whose attentions get the branch; it is frozen by whoever trains.
        width: d, of an embedding.
        tokens: T.
        size: of a token.
        seed: of the initialisation.

    Attributes:
        user: embeddings of the rows that come next, (B, d), or None. A batch with k times as many rows holds the rows k
            times over, as guidance does it.
        off: nothing is added.
        strength: multiplies what is added; 1 is as trained.

    Raises:
        ConfigError: the network has no attention that could carry it, or carries one already.
    """

    def __init__(self, network: nn.Module, width: int, tokens: int = 8, size: int = 256, seed: int = 0) -> None:
        super().__init__()
        if hasattr(network, NAME):
            raise ConfigError("the network has a branch for users already")
        found = attentions(network)
        self.width, self.count, self.size = width, tokens, size
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
        self.user: Tensor | None = None
        self.off, self.strength = False, 1.0
        first = next(network.parameters())
        self.to(first.device)
        network.add_module(NAME, self)
        self._hooks = [
            module.register_forward_hook(self._hook(number), with_kwargs=True)
            for number, module in enumerate(found.values())
        ]

    def remove(self, network: nn.Module) -> None:
        """Take the branch off again."""
        for hook in self._hooks:
            hook.remove()
        del network._modules[NAME]

    @contextmanager
    def given(self, user: Tensor | None, strength: float = 1.0) -> Iterator[UserAttention]:
        """Within, these users act; backward passes through checkpointed blocks have to happen within, too.

        Args:
            user: (B, d), or (d,) for all rows; None: nobody.
            strength: of what is added.

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
            raise ConfigError(f"got embeddings of width {user.shape[-1]}; this network was trained for {self.width}")
        self.user = None if user is None else user.reshape(-1, self.width).to(self.project.weight)

    def settings(self) -> dict[str, Any]:
        """What makes the same module."""
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
        assert self.user is not None
        rows = len(hidden)
        if rows % len(self.user):
            raise RuntimeError(f"{self.paths[number]}: {rows} rows for {len(self.user)} users; expected a multiple")
        user = self.user.repeat(rows // len(self.user), 1)
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


def attentions(network: nn.Module) -> dict[str, Any]:
    """Attentions in which the image looks at text, by path.

    Raises:
        ConfigError: there is none.
    """
    every = {path: m for path, m in network.named_modules() if hasattr(m, "to_q") and hasattr(m, "to_out")}
    every = {path: m for path, m in every.items() if isinstance(m.to_out, nn.ModuleList)}
    cross = {path: m for path, m in every.items() if path.endswith("attn2")}
    joint = {path: m for path, m in every.items() if getattr(m, "add_k_proj", None) is not None}
    found = cross or joint or every
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


def of(network: nn.Module) -> UserAttention | None:
    """The user's branch of a network, if it has one."""
    found = getattr(network, NAME, None)
    return found if isinstance(found, UserAttention) else None


def save(branch: UserAttention, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the branch as a safetensors file.

    Args:
        branch: to be written.
        path: file.
        metadata: facts of the run as texts, such as family, base and encoder.
    """
    from diffalign.export import write_file

    tensors = {name: value.detach().float().cpu().contiguous() for name, value in branch.state_dict().items()}
    header = {HEADER: json.dumps(branch.settings()), "diffalign.role": "user"}
    write_file(
        path, tensors, {"format": "pt"} | header | {f"diffalign.{key}": value for key, value in metadata.items()}
    )


def load(network: nn.Module, path: str | Path) -> UserAttention:
    """Put the branch of a file onto a network.

    Args:
        network: of the base that it was trained on.
        path: file, or folder with `user_adapter.safetensors`.

    Raises:
        CheckpointError: no such file, or another network's.
    """
    from diffalign.export import read_file

    file = Path(path)
    file = file / FILE_NAME if file.is_dir() else file
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; expected a run folder, or the {FILE_NAME} of one")
    tensors, metadata = read_file(file, tensors=True)
    if HEADER not in metadata:
        raise CheckpointError(f"{file}: no adapter for users; LoRA files are loaded by pipe.load_lora_weights")
    settings = json.loads(metadata[HEADER])
    if list(attentions(network)) != settings["paths"]:
        raise CheckpointError(f"{file}: made for a network with other attentions; load it into its own base")
    branch = UserAttention(network, settings["width"], settings["tokens"], settings["size"])
    try:
        branch.load_state_dict(tensors)
    except RuntimeError as error:
        branch.remove(network)
        raise CheckpointError(f"{file}: does not fit: {str(error).splitlines()[-1].strip()}") from error
    return branch.requires_grad_(False)
