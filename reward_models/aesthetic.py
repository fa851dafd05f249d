"""LAION aesthetic predictor v2: a head on CLIP ViT-L/14 that predicts people's ratings of pictures without a prompt.

Code and weights: christophschuhmann/improved-aesthetic-predictor, file `sac+logos+ava1-l14-linearMSE.pth`. Five linear
layers with dropout and no activation, so that in evaluation the head is one affine map of the unit embedding; the
layers are folded into it in float64. The v1 heads of LAION-AI/aesthetic-predictor (one linear layer) are read as well:
another scale (v2 gives SD1.5 about 5.4, v1 about 5.9), so say which one a number is of. `ava+logos-l14-reluMSE.pth` has
activations, is not affine, and is refused.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.rewards import ClipTowers, Reward, RewardError, local_weights, preprocess
from reward_models._weights import fold

CLIP = "openai/clip-vit-large-patch14"
CLIP_REVISION = "32bd64288804d66eefd0ccbe215aa642df71cc41"
HEAD_REPOSITORY = "camenduru/improved-aesthetic-predictor"  # a hub copy of the file, checked by its hash
HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"
HEAD_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
LAYERS = (0, 2, 4, 6, 7)  # places of the linear layers between the dropouts


class Aesthetic(Reward):
    """Predicted mean rating (about 1 to 10) of a picture's looks; the prompt is not read."""

    range = (-12.8, 23.3)  # 5.237 -+ 17.996: an affine map on the unit sphere
    unit = "points of a 1 to 10 rating; 4.5 to 6.6 for ordinary pictures"
    differentiable = True
    weights = f"{HEAD_REPOSITORY}:{HEAD_FILE} (sha256 {HEAD_SHA256[:12]}), {CLIP}@{CLIP_REVISION}"
    licence = "Apache-2.0 (head), MIT (CLIP)"
    gap = "resizing is within 2/255 of Pillow's; the original runs CLIP in float16 on GPUs"
    argument = f"path of a head file (v2 or v1 layout); default: {HEAD_FILE} from $DIFFALIGN_WEIGHTS or the hub"

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        head: str | Path | None = None,
        *,
        clip: str | Path = CLIP,
    ) -> None:
        weight_D, bias = read_head(find_head() if head is None else Path(head))
        revision = CLIP_REVISION if str(clip) == CLIP else None
        self.towers = ClipTowers(clip, revision=revision, device=device, dtype=dtype)
        if len(weight_D) != (width := self.towers.model.config.projection_dim):
            raise RewardError(f"aesthetic head reads {len(weight_D)} numbers, but {str(clip)!r} embeds into {width}")
        self.weight_D, self.bias = weight_D.float().to(device), float(bias)
        self.eight_bit = True  # see `preprocess`

    @classmethod
    def check_argument(cls, argument: str | None) -> None:
        if argument is not None and not Path(argument).is_file():
            raise ConfigError(f"aesthetic: head file {argument!r} does not exist")

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        # The original crops by torchvision, which rounds the offset.
        pixels = preprocess(images, self.towers.image_size, eight_bit=self.eight_bit, crop_offset=round)
        embedding = self.towers.embed_images(pixels)
        unit = embedding / embedding.norm(dim=-1, keepdim=True)
        return (unit * self.weight_D).sum(-1) + self.bias  # a sum of products stays float32 under autocast


def find_head() -> Path:
    """The v2 head file: under the folder `DIFFALIGN_WEIGHTS`, else from the hub, where its hash is checked.

    Raises:
        RewardError: it is neither here nor there, or the hub's file is another one.
    """
    if (local := Path(local_weights(HEAD_FILE))).is_file():
        return local
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(HEAD_REPOSITORY, HEAD_FILE))
    except OSError as error:  # no network, offline mode, or gone from the hub
        raise RewardError(
            f"aesthetic head {HEAD_FILE} is not at hand and cannot be downloaded from {HEAD_REPOSITORY}; write "
            "aesthetic:/path/to/the/file or put it into $DIFFALIGN_WEIGHTS"
        ) from error
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != HEAD_SHA256:
        raise RewardError(f"{path}: sha256 is {found}, expected {HEAD_SHA256}; this is another head")
    return path


def read_head(path: Path) -> tuple[Tensor, Tensor]:
    """Read a head file and fold its layers into one affine map.

    Returns:
        weight (D,) and bias (), float64: score = weight . unit embedding + bias.

    Raises:
        RewardError: not a head of one of the two known layouts.
    """
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own message advises to run whatever code it holds
        raise RewardError(f"aesthetic head {path} cannot be read: it is damaged or holds more than tensors") from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise RewardError(f"aesthetic head {path} cannot be read: {str(error).splitlines()[0]}") from error
    v2 = {f"layers.{i}.{kind}" for i in LAYERS for kind in ("weight", "bias")}
    if set(state) == {"weight", "bias"}:
        layers = [(state["weight"], state["bias"])]
    elif set(state) == v2:
        layers = [(state[f"layers.{i}.weight"], state[f"layers.{i}.bias"]) for i in LAYERS]
    else:
        places = sorted({int(n) for key in state for n in re.findall(r"layers\.(\d+)\.", key)})
        raise RewardError(
            f"aesthetic head {path}: linear layers at {places}; expected {list(LAYERS)} (v2) or a single one (v1)"
        )
    return fold(layers)
