"""Reference pictures of rewards: a folder's files, and files, Pillow pictures or tensors as tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.rewards import RewardError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def files_of(folder: str | Path, reward: str) -> tuple[Path, ...]:
    """The pictures of a folder, by name.

    Args:
        folder: its subfolders are not looked into.
        reward: named in errors.

    Raises:
        ConfigError: it does not exist or holds none.
    """
    if not Path(folder).is_dir():
        raise ConfigError(f"{reward}: folder of references {str(folder)!r} does not exist")
    files = tuple(sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES))
    if not files:
        raise ConfigError(f"{reward}: folder {str(folder)!r} holds no pictures ({', '.join(SUFFIXES)})")
    return files


def to_tensor(reference: Any, reward: str) -> Tensor:
    """A reference picture as float RGB (3, H, W) in [0, 1].

    Args:
        reference: a path, a Pillow picture or such a tensor.
        reward: named in errors.

    Raises:
        RewardError: it is none of these, or cannot be read.
    """
    if isinstance(reference, Tensor):
        fits = reference.ndim == 3 and reference.shape[0] == 3 and reference.is_floating_point()
        if not fits or not 0 <= float(reference.min()) <= float(reference.max()) <= 1:
            raise RewardError(
                f"{reward}: a reference is {reference.dtype} of shape {tuple(reference.shape)}; floats in [0, 1] "
                "of shape (3, H, W) expected"
            )
        return reference.float()
    if isinstance(reference, (str, Path)):
        try:
            with Image.open(reference) as file:
                reference = file.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise RewardError(f"{reward}: reference {str(reference)!r} cannot be read: {error}") from error
    if not isinstance(reference, Image.Image):
        raise RewardError(
            f"{reward}: a reference is {type(reference).__name__}; a path, a Pillow picture or a tensor expected"
        )
    return torch.from_numpy(np.asarray(reference.convert("RGB")).copy()).permute(2, 0, 1) / 255
