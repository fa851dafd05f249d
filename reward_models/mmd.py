"""MMD: how far the pictures of a batch, as a set, are from a folder of pictures, in the eyes of a CLIP image tower.

Paper: Aiello et al. 2023, "Fast Inference in Denoising Diffusion Models via MMD Finetuning", arXiv 2301.07969; code
diegovalsesia/MMD-DDM. With a differentiable walk (`draft`, `align_prop`) this is its fine-tuning of short samplers: the
distance of m samples x to n pictures y, without bias,

    MMD^2 = mean over i != j of k(x_i, x_j) + mean over i != j of k(y_i, y_j) - 2 mean of k(x_i, y_j)

is minus the mean over the batch of what each picture gets here,

    r_i = 2 mean over j of k(x_i, y_j) - mean over j != i of k(x_i, x_j) - mean over j != l of k(y_j, y_l),

near the folder and far from one another. Kernels, with d the number of features: "linear" <x, y> / d + 1, "cubic" its third
power (KID's), "rbf" exp(-|x - y|^2 / d).

The more pictures come in one call the better: all that are decoded together (`rollout.decode_batch_size`) are the set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from diffalign.errors import ConfigError, did_you_mean
from diffalign.rewards import ClipTowers, Reward, RewardError, preprocess
from diffalign.world.names import TINY_CLIPS, base_folder
from reward_models._pictures import files_of, to_tensor

MODEL = "openai/clip-vit-base-patch32"
REVISION = "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"
Kernel = Literal["linear", "cubic", "rbf"]


class MMD(Reward):
    """Minus the squared maximum mean discrepancy between the pictures of a call and a folder, shared out among them."""

    range = (-float("inf"), float("inf"))
    unit = "of the kernel; 0 on average for pictures of the folder's distribution, below for others; above is possible"
    differentiable = True
    sets = True
    weights = f"{MODEL}@{REVISION}"
    licence = "MIT"
    gap = (
        "Pillow's resizing within 2/255; the paper also uses Inception features; scores of the published weights are "
        "UNVERIFIED here"
    )
    argument = (
        "FOLDER of pictures, then perhaps @KERNEL (cubic, linear, rbf), then perhaps :MODEL (hub id, folder, tiny-clip)"
    )

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, what: str = "") -> None:
        self.files, self.kernel, model = _parse(what)
        source = base_folder(model) if model in TINY_CLIPS else model
        self.towers = ClipTowers(source, revision=REVISION if model == MODEL else None, device=device, dtype=dtype)
        self.eight_bit = True  # see `preprocess`
        with torch.no_grad():
            self.real = torch.cat([self.embed(to_tensor(file, "mmd")[None].to(device)) for file in self.files])
            self.within = within(self.real, self.kernel).mean()

    @classmethod
    def check_argument(cls, argument: str | None) -> None:
        _parse(argument or "")

    def identity(self) -> str:
        """The files of the folder, with their sizes and times of change."""
        return repr([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.files])

    def embed(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) to features, float32 (B, D), as they come out of the tower."""
        return self.towers.embed_images(preprocess(images, self.towers.image_size, eight_bit=self.eight_bit))

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        if len(images) < 2:
            raise RewardError(
                "mmd: got one picture; it compares the set of all pictures of a call with the folder: score more of them "
                "at a time (batch sizes that leave no single one over)"
            )
        features = self.embed(images)
        near = 2 * kernel(features, self.real, self.kernel).mean(1)
        return near - within(features, self.kernel) - self.within


def kernel(x: Tensor, y: Tensor, kind: Kernel = "cubic") -> Tensor:
    """k(x_i, y_j) of features x (M, D) and y (N, D): float32, (M, N)."""
    x, y, size = x.float(), y.float(), x.shape[1]
    if kind == "rbf":
        squares = x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * x @ y.T
        return (-squares / size).exp()
    plain = x @ y.T / size + 1
    return plain if kind == "linear" else plain**3


def within(x: Tensor, kind: Kernel = "cubic") -> Tensor:
    """The mean of k(x_i, x_j) over j != i, float32 (M,), of features (M, D), M >= 2."""
    every = kernel(x, x, kind)
    return (every.sum(1) - every.diagonal()) / (len(x) - 1)


def _parse(text: str) -> tuple[tuple[Path, ...], Kernel, str]:
    """The text after the reward's colon: files of the folder, kernel, model."""
    what, colon, model = text.partition(":")
    folder, at, name = what.rpartition("@")
    folder, name = (folder, name) if at else (name, "cubic")
    if at and name not in get_args(Kernel) and Path(what).is_dir():
        folder, name = what, "cubic"
    if not folder:
        raise ConfigError("mmd: no folder of pictures to compare with; write mmd:FOLDER, as in mmd:photos")
    kinds = get_args(Kernel)
    if name not in kinds:
        near = did_you_mean(name, kinds) or ";"
        raise ConfigError(f"mmd: kernel {name!r} not found{near} Available: {', '.join(kinds)}")
    files = files_of(folder, "mmd")
    if len(files) < 2:
        raise ConfigError(
            f"mmd: folder {folder!r} holds one picture; a set is expected: two at the least, hundreds are better"
        )
    return files, cast(Kernel, name), model if colon else MODEL
