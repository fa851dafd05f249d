"""Weight files that are not in transformers' layout: finding them, reading them without running code, filling models.

Shared by the rewards of this folder; no reward itself.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from diffalign.rewards import WEIGHTS_VARIABLE, RewardError, local_weights

T = TypeVar("T")


def find_file(reward: str, repository: str, file: str, revision: str | None = None, *, telling: bool = True) -> Path:
    """A weight file: under the folder `DIFFALIGN_WEIGHTS`, as `<owner>/<name>/<file>` or alone, else from the hub.

    Args:
        reward: whose weights they are, for messages.
        repository: `<owner>/<name>` on the hub.
        file: its name there.
        revision: of the repository.
        telling: the file's name says what it is; otherwise it is not looked for without its repository.

    Raises:
        RewardError: it is neither here nor there.
    """
    for place in (f"{repository}/{file}", *([file] if telling else [])):
        if (local := Path(local_weights(place))).is_file():
            return local
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except OSError as error:  # no network, offline mode, or gone from the hub
        raise RewardError(
            f"{reward}: {file} is not at hand and cannot be downloaded from {repository}; write "
            f"{reward}:/path/to/the/file or put it into ${WEIGHTS_VARIABLE} as {file if telling else f'{repository}/{file}'}"
        ) from error


def read_state(reward: str, path: Path) -> dict[str, Tensor]:
    """The named tensors of a safetensors file, or of a pickle that holds nothing but tensors and plain values.

    Of a pickled checkpoint with an entry `state_dict` that entry is taken.

    Raises:
        RewardError: not such a file.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                return load_file(path)
            except SafetensorError as error:
                raise ValueError(str(error)) from error
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own message advises to run whatever code it holds
        raise RewardError(f"{reward}: {path} cannot be read: it is damaged or holds more than tensors") from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise RewardError(f"{reward}: {path} cannot be read: {str(error).splitlines()[0]}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise RewardError(f"{reward}: {path} holds no named tensors; a state dict expected")
    return dict(state)


def fill(reward: str, path: Path, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load tensors under a model's own names, all of them and no others.

    Raises:
        RewardError: a tensor is missing, is too many, or has another shape.
    """
    wanted = model.state_dict()
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shapes = [key for key in wanted.keys() & state.keys() if wanted[key].shape != state[key].shape]
    for what, keys in (("lacks", missing), ("has unknown", extra), ("has other shapes of", sorted(shapes))):
        if keys:
            raise RewardError(
                f"{reward}: {path} {what} {len(keys)} of {len(wanted)} tensors, such as {keys[0]!r}; these are not "
                "the weights that this reward reads"
            )
    model.load_state_dict(dict(state))


def fold(layers: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Linear layers with nothing between them as one affine map to a number, multiplied out in float64.

    Returns:
        weight (D,) and bias (), float64.
    """
    weight, bias = (v.double() for v in layers[0])
    for w, b in layers[1:]:
        weight, bias = w.double() @ weight, w.double() @ bias + b.double()
    return weight[0], bias[0]


def pretrained(reward: str, load: Callable[[str], T], source: str | Path) -> T:
    """`load(source)` with the local copy of `source`, if there is one, and a message that says what to do.

    Raises:
        RewardError: the files cannot be read.
    """
    try:
        return load(local_weights(source))
    except (OSError, ValueError) as error:
        raise RewardError(
            f"{reward}: {str(source)!r} cannot be loaded: {str(error).splitlines()[0]} Put <owner>/<name> under "
            f"${WEIGHTS_VARIABLE}"
        ) from error
