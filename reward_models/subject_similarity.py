"""Subject similarity: does a picture show the same thing as given reference pictures (CLIP-I, DINO), and what is asked for.

CLIP-I and DINO are the metrics of Ruiz et al. 2022, "DreamBooth", arXiv 2208.12242: the mean cosine between the embeddings
of the picture and of the references. With `@LAMBDA` it is the harmonic mean of Miao et al. 2024, "Subject-driven
Text-to-Image Generation via Preference-based Reinforcement Learning" (RPO), arXiv 2407.12164; code:
andrew-miao/RPO:evaluation_metrics.py (commit 56b190a0):

    reward = 1 / (lambda / (s_i + 1e-8) + (1 - lambda) / (s_t + 1e-8)),   s = (cosine + 1) / 2

with s_i to the references (the mean over them) and s_t to the prompt; 0 and 1 give s_t and s_i alone; its default is 0.3.
The backbones are those of RPO's evaluation, CLIP ViT-B/16 and DINO ViT-S/16 (its [CLS] token); the DreamBooth paper is
said to use ViT-B/32 for CLIP-I (UNVERIFIED). Say which backbone a number is of.

References come from `metadata[i]["references"]`, a list of paths, of Pillow pictures or of tensors (3, H, W) in [0, 1];
where there is none, from the folder after the second colon: `subject_similarity:dino@0.3:photos/my_dog`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from diffalign.errors import ConfigError, did_you_mean
from diffalign.rewards import ClipTowers, Reward, RewardError, cosine, normalise, pillow_resize, preprocess
from reward_models._pictures import files_of, to_tensor
from reward_models._weights import pretrained

CLIP = "openai/clip-vit-base-patch16"
CLIP_REVISION = "57c216476eefef5ab752ec549e440a49ae4ae5f3"
DINO = "facebook/dino-vits16"  # its revision is not pinned
METHODS = ("clip_i", "dino")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class SubjectSimilarity(Reward):
    """Mean cosine to reference pictures (CLIP-I or DINO), or its lambda-harmonic mean with the prompt's."""

    range = (-1.0, 1.0)
    unit = (
        "cosine, 0.3 to 0.9 in practice; with @LAMBDA a number in [0, 1] in which two cosines count as (cosine + 1) / 2"
    )
    differentiable = True
    weights = f"{CLIP}@{CLIP_REVISION}, {DINO}@main (not pinned)"
    licence = "MIT (CLIP), Apache-2.0 (DINO)"
    gap = (
        "RPO's training reward takes both similarities from ALIGN, here they are CLIP's, or DINO's and CLIP's; RPO resizes "
        "for DINO by the hub's processor, here as DINO's own evaluation does (256, centre crop 224); Pillow's resizing "
        "within 2/255; scores of the published weights are UNVERIFIED here"
    )
    argument = (
        "clip_i (default) or dino, then perhaps @LAMBDA, then perhaps :FOLDER of references, as in dino@0.3:photos"
    )

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        what: str = "clip_i",
        *,
        clip: str | Path = CLIP,
        dino: str | Path = DINO,
    ) -> None:
        self.what = _parse(what)
        self.device, self.dtype = torch.device(device), dtype
        self.clip = self.dino = cast(Any, None)
        if self.what.method == "clip_i" or self.what.share is not None:
            revision = CLIP_REVISION if str(clip) == CLIP else None
            self.clip = ClipTowers(clip, revision=revision, device=device, dtype=dtype)
        if self.what.method == "dino":
            from transformers import ViTModel

            self.dino = pretrained(
                "subject_similarity",
                lambda source: cast(Any, ViTModel.from_pretrained(source, add_pooling_layer=False, dtype=dtype)),
                dino,
            )
            self.dino.eval().requires_grad_(False).to(device)
        self.eight_bit = True  # see `preprocess`
        self.known: dict[str, Tensor] = {}  # embeddings (D,) of references that are files

    @classmethod
    def check_argument(cls, argument: str | None) -> None:
        if argument is not None:
            _parse(argument)

    def identity(self) -> str:
        """The files of the folder of references, with their sizes and times of change."""
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.what.folder]
        return repr(stats)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        references = [_references(entry, self.what.folder) for entry in metadata or [{}] * len(prompts)]
        embeddings = self.embed(images)
        subject = torch.stack(
            [
                cosine(embedding.expand(len(given), -1), self.embed_references(given)).mean()
                for embedding, given in zip(embeddings, references, strict=True)
            ]
        )
        share = self.what.share
        if share is None:
            return subject
        in_text = embeddings if self.what.method == "clip_i" else self.embed(images, "clip_i")
        s_i, s_t = (subject + 1) / 2, (cosine(in_text, self.clip.embed_texts(prompts)) + 1) / 2
        if share in (0, 1):
            return s_i if share else s_t
        return 1 / (share / (s_i + 1e-8) + (1 - share) / (s_t + 1e-8))

    def embed(self, images: Tensor, method: str | None = None) -> Tensor:
        """Pictures (B, 3, H, W) to embeddings, float32 (B, D), not normalised."""
        if (method or self.what.method) == "clip_i":
            features: Tensor = self.clip.embed_images(
                preprocess(images, self.clip.image_size, eight_bit=self.eight_bit)
            )
            return features
        pixels = preprocess_dino(images, self.dino.config.image_size, eight_bit=self.eight_bit)
        hidden = self.dino(pixel_values=pixels.to(self.device, self.dtype)).last_hidden_state
        return cast(Tensor, hidden[:, 0].float())

    @torch.no_grad()
    def embed_references(self, given: Sequence[Any]) -> Tensor:
        """References to embeddings (R, D); a file is read once."""
        rows = []
        for reference in given:
            key = str(reference) if isinstance(reference, (str, Path)) else None
            if key is None or key not in self.known:
                embedding = self.embed(to_tensor(reference, "subject_similarity")[None].to(self.device))[0]
                if key is not None:
                    self.known[key] = embedding
            rows.append(self.known[key] if key is not None else embedding)
        return torch.stack(rows)


def preprocess_dino(images: Tensor, size: int, *, eight_bit: bool = True) -> Tensor:
    """DINO's transform for evaluation: shorter side to 8/7 `size` (256 for 224), centre crop, ImageNet's normalisation."""
    short = size * 8 // 7
    height, width = images.shape[-2:]
    shape = tuple(
        short if side == min(height, width) else int(short * side / min(height, width)) for side in (height, width)
    )
    images = pillow_resize(images, (shape[0], shape[1]), eight_bit=eight_bit)
    top, left = (round((side - size) / 2) for side in shape)
    return normalise(images[..., top : top + size, left : left + size], IMAGENET_MEAN, IMAGENET_STD)


class _What(NamedTuple):
    """The text after the colon: method, lambda (None for the plain cosine), files of the folder."""

    method: str
    share: float | None
    folder: tuple[Path, ...]


def _parse(text: str) -> _What:
    what, colon, folder = text.partition(":")
    method, at, number = what.partition("@")
    if method not in METHODS:
        near = did_you_mean(method, METHODS) or ";"
        raise ConfigError(f"subject_similarity: method {method!r} not found{near} Available: {', '.join(METHODS)}")
    try:
        share = float(number) if at else None
    except ValueError as error:
        raise ConfigError(f"subject_similarity: lambda {number!r} is not a number; write {method}@0.3") from error
    if share is not None and not 0 <= share <= 1:  # also true for NaN
        raise ConfigError(f"subject_similarity: lambda {share} is outside [0, 1]")
    files: tuple[Path, ...] = ()
    if colon:
        files = files_of(folder, "subject_similarity")
    return _What(method, share, files)


def _references(entry: dict[str, Any], folder: tuple[Path, ...]) -> Sequence[Any]:
    given = entry.get("references", folder)
    if isinstance(given, (str, Path)) or not isinstance(given, Sequence):
        raise RewardError(f"subject_similarity: references are {type(given).__name__}; a list of pictures expected")
    if not given:
        raise RewardError(
            "subject_similarity: no reference pictures; give metadata with a list 'references' for each picture, or a "
            "folder as in subject_similarity:clip_i:photos/my_dog"
        )
    return given
