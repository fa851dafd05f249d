"""Aesthetic predictor v2.5: a head on SigLIP that predicts people's ratings of pictures without a prompt.

Code and weights: discus0434/aesthetic-predictor-v2-5 (commit c0e15567), file `models/aesthetic_predictor_v2_5.pth`. Score =
head(unit embedding), where the embedding is the pooled output of SigLIP so400m at 384 pixels and the head has five linear
layers with dropout and no activation between, folded here into one affine map in float64. The author calls 5.5 and more
great. The head is under AGPL-3.0: neither it nor its code is part of this project, and nothing is downloaded; put the file
into $DIFFALIGN_WEIGHTS or name it. Not comparable with `aesthetic` (v2 and v1), although the scale looks alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.rewards import WEIGHTS_VARIABLE, Reward, RewardError, local_weights, normalise, pillow_resize
from reward_models._weights import fold, pretrained, read_state

TOWER = "google/siglip-so400m-patch14-384"
TOWER_REVISION = "9fdffc58afc957d1a03a25b10dba0329ab15c2a3"
HEAD_FILE = "aesthetic_predictor_v2_5.pth"
LAYERS = (0, 2, 4, 6, 8)  # places of the linear layers between the dropouts
MEAN = STD = (0.5, 0.5, 0.5)


class AestheticV25(Reward):
    """Predicted rating (about 1 to 10) of a picture's looks under SigLIP; the prompt is not read."""

    range = (-23.6, 27.4)  # 1.939 -+ 25.452: an affine map on the unit sphere
    unit = "points of a 1 to 10 rating; 5.5 and more is called great by the author"
    differentiable = True
    weights = f"{HEAD_FILE} (sha256 a6caf256b3dc, from the user), {TOWER}@{TOWER_REVISION}"
    licence = "AGPL-3.0 (head), Apache-2.0 (SigLIP)"
    gap = (
        "resizing is within 2/255 of Pillow's; the original is run in bfloat16; scores of whole pictures are "
        "UNVERIFIED here (SigLIP's weights were not at hand)"
    )
    argument = f"path of the head file; default: {HEAD_FILE} from $DIFFALIGN_WEIGHTS"

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        head: str | Path | None = None,
        *,
        tower: str | Path = TOWER,
    ) -> None:
        from transformers import SiglipVisionModel

        self.check_argument(None if head is None else str(head))
        weight_D, bias = read_head(Path(local_weights(HEAD_FILE)) if head is None else Path(head))
        revision = TOWER_REVISION if str(tower) == TOWER else "main"
        vision = pretrained(
            "aesthetic_v2_5",
            lambda source: SiglipVisionModel.from_pretrained(source, revision=revision, dtype=dtype),
            tower,
        )
        self.tower = cast(Any, vision)
        self.tower.eval().requires_grad_(False).to(device)
        if len(weight_D) != (width := self.tower.config.hidden_size):
            raise RewardError(f"aesthetic_v2_5: the head reads {len(weight_D)} numbers, {str(tower)!r} gives {width}")
        self.weight_D, self.bias = weight_D.float().to(device), float(bias)
        self.device, self.dtype = torch.device(device), dtype
        self.eight_bit = True  # see `diffalign.rewards.preprocess`

    @classmethod
    def check_argument(cls, argument: str | None) -> None:
        if argument is not None and not Path(argument).is_file():
            raise ConfigError(f"aesthetic_v2_5: head file {argument!r} does not exist")

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        side = self.tower.config.image_size
        squashed = pillow_resize(images, (side, side), eight_bit=self.eight_bit)  # SigLIP does not keep the aspect
        pixels = normalise(squashed, MEAN, STD).to(self.device, self.dtype)
        embedding = self.tower(pixel_values=pixels).pooler_output.float()
        unit = embedding / embedding.norm(dim=-1, keepdim=True)
        return (unit * self.weight_D).sum(-1) + self.bias


def read_head(path: Path) -> tuple[Tensor, Tensor]:
    """Read the head file and fold its layers: weight (D,) and bias (), float64.

    Raises:
        RewardError: it is not there, or is another head.
    """
    if not path.is_file():
        raise RewardError(
            f"aesthetic_v2_5: {HEAD_FILE} is not at hand; its licence is AGPL-3.0 and it is not downloaded: get it from "
            f"github.com/discus0434/aesthetic-predictor-v2-5, write aesthetic_v2_5:/path/to/the/file or put it into "
            f"${WEIGHTS_VARIABLE}"
        )
    state = read_state("aesthetic_v2_5", path)
    names = [f"scoring_head.{i}.{kind}" for i in LAYERS for kind in ("weight", "bias")]
    if set(state) != set(names):
        raise RewardError(
            f"aesthetic_v2_5: {path} has {', '.join(sorted(state)[:3])}, ...; {', '.join(names[:3])}, ... expected"
        )
    return fold([(state[f"scoring_head.{i}.weight"], state[f"scoring_head.{i}.bias"]) for i in LAYERS])
