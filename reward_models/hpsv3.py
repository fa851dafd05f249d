"""HPSv3: Qwen2-VL-7B with a head on one token of a long instruction, trained on choices over many kinds of pictures.

Paper: Ma et al. 2025, "HPSv3: Towards Wide-Spectrum Human Preference Score", arXiv 2508.03789; code: MizzenAI/HPSv3:
hpsv3/inference.py and hpsv3/model/qwen2vl_trainer.py. The picture is resized to about 256 x 28 x 28 pixels; instruction and
prompt follow it and hold the token `<|Reward|>`, whose last hidden state goes through three linear layers with ReLU between
them, in float32, to (mu, log sigma). Score = mu.

The instruction must be the original's to the byte. It comes with the code and not with the weights: put it, with the
closing lines that hold the token, into a file `template.txt` beside the weights, with `{text_prompt}` where the prompt goes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffalign.errors import ConfigError
from diffalign.rewards import CLIP_MEAN, CLIP_STD, Reward, RewardError, local_weights, normalise, pillow_resize
from reward_models._weights import fill, find_file, pretrained, read_state

REPOSITORY = "MizzenAI/HPSv3"
REVISION = "4f81e3e09edd82fe3c5f636444c721b592a735ca"
FILE, TEMPLATE = "HPSv3.safetensors", "template.txt"
BASE = "Qwen/Qwen2-VL-7B-Instruct"  # only its configuration and processor are read; its revision is not pinned
TOKEN, PROMPT = "<|Reward|>", "{text_prompt}"
PIXELS = 256 * 28 * 28  # HPSv3_7B.yaml, smallest and largest


class HPSv3(Reward):
    """Human preference score v3: the mean of a rating by a vision-language model with a head."""

    range = (-float("inf"), float("inf"))
    unit = "points, about -5 to 15 (UNVERIFIED); a difference of 1 is a 73 % preference before uncertainty"
    differentiable = True
    weights = f"{REPOSITORY}@{REVISION}:{FILE}, {BASE}@main (configuration and processor, not pinned)"
    licence = "MIT (UNVERIFIED, as the card is said to state)"
    gap = (
        "resizing is within 2/255 of Pillow's; scores and the names of the published tensors are UNVERIFIED here "
        "(names of both generations of transformers are read; the rest is tested on random weights)"
    )
    argument = f"folder with {FILE} and {TEMPLATE}; default: $DIFFALIGN_WEIGHTS/{REPOSITORY}"

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        folder: str | Path | None = None,
        *,
        base: str | Path = BASE,
        pixels: int = PIXELS,
    ) -> None:
        from transformers import AutoProcessor, Qwen2VLConfig, Qwen2VLModel

        place = Path(local_weights(REPOSITORY)) if folder is None else Path(folder)
        self.template = _read_template(place / TEMPLATE)
        self.path = path = find_file("hpsv3", REPOSITORY, FILE, REVISION) if folder is None else place / FILE
        self.processor = cast(Any, pretrained("hpsv3", AutoProcessor.from_pretrained, base))
        self.processor.tokenizer.add_tokens([TOKEN], special_tokens=True)
        self.token = self.processor.tokenizer.convert_tokens_to_ids(TOKEN)
        config = cast(Any, pretrained("hpsv3", Qwen2VLConfig.from_pretrained, base))
        body, head = rename(read_state("hpsv3", path))
        words = body.get("language_model.embed_tokens.weight")
        if words is None or len(words) <= self.token:
            raise RewardError(f"hpsv3: {path} has no embedding of the token {TOKEN}; these are not HPSv3's weights")
        config.text_config.vocab_size = len(words)  # the original cuts the embedding to its tokenizer's length
        load = cast(Any, Qwen2VLModel).from_pretrained
        self.model, report = load(None, config=config, state_dict=body, dtype=dtype, output_loading_info=True)
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if keys := sorted(map(str, report[what])):
                raise RewardError(f"hpsv3: {path} has {len(keys)} {what.replace('_', ' ')}, such as {keys[0]!r}")
        width = config.text_config.hidden_size
        self.head = nn.Sequential(
            nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        )
        fill("hpsv3", path, self.head, head)
        self.model.eval().requires_grad_(False).to(device)
        self.head.eval().requires_grad_(False).to(device)
        self.device, self.dtype, self.pixels = torch.device(device), dtype, pixels
        self.eight_bit = True  # see `diffalign.rewards.preprocess`

    @classmethod
    def check_argument(cls, argument: str | None) -> None:
        if argument is not None:
            for file in (FILE, TEMPLATE):
                if not (Path(argument) / file).is_file():
                    raise ConfigError(f"hpsv3: folder {argument!r} holds no {file}")

    def identity(self) -> str:
        """The instruction, and size and time of change of the weights."""
        stat = self.path.stat()
        return repr((self.template, stat.st_size, stat.st_mtime_ns))

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        vision = self.model.config.vision_config
        size = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        patches, grid = to_patches(images, self.pixels, *size, eight_bit=self.eight_bit)
        pads = grid[0] * grid[1] // vision.spatial_merge_size**2
        tokens = self.processor.tokenizer(
            [self.ask(prompt, pads) for prompt in prompts], padding=True, padding_side="right", return_tensors="pt"
        ).to(self.device)
        at_BL = tokens.input_ids == self.token
        if (at_BL.sum(-1) != 1).any():
            raise RewardError(f"hpsv3: a prompt holds {TOKEN}, which marks the place of the score; take it out")
        hidden_BLD = self.model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            mm_token_type_ids=(tokens.input_ids == self.model.config.image_token_id).int(),
            pixel_values=patches.to(self.device, self.dtype),
            image_grid_thw=torch.tensor([[1, *grid]] * len(prompts), device=self.device),
        ).last_hidden_state
        with torch.autocast(self.device.type, enabled=False):
            scores: Tensor = self.head(hidden_BLD[at_BL].float())[:, 0]
        return scores

    def ask(self, prompt: str, pads: int) -> str:
        """The whole text that the model sees, with `pads` places for the picture."""
        content = [{"type": "image"}, {"type": "text", "text": self.template.replace(PROMPT, prompt)}]
        messages = [{"role": "user", "content": content}]
        text: str = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text.replace("<|image_pad|>", "<|image_pad|>" * pads, 1)


def fit(height: int, width: int, pixels: int, factor: int = 28) -> tuple[int, int]:
    """Height and width as multiples of `factor` with about `pixels` pixels and the same aspect, as qwen-vl-utils has it."""
    near = tuple(max(factor, round(side / factor) * factor) for side in (height, width))
    area = near[0] * near[1]
    if area == pixels:
        return near[0], near[1]
    if area > pixels:
        beta = math.sqrt(height * width / pixels)
        fitted = [max(factor, math.floor(side / beta / factor) * factor) for side in (height, width)]
    else:
        beta = math.sqrt(pixels / (height * width))
        fitted = [math.ceil(side * beta / factor) * factor for side in (height, width)]
    return fitted[0], fitted[1]


def to_patches(
    images: Tensor, pixels: int, patch: int = 14, merge: int = 2, frames: int = 2, *, eight_bit: bool = True
) -> tuple[Tensor, tuple[int, int]]:
    """Qwen2-VL's transform, with gradient: resize, normalise, cut into patches in the order in which they are merged.

    Args:
        images: float RGB in [0, 1], shape (B, 3, H, W).
        pixels: see `fit`.
        patch: side of a patch.
        merge: side of the square of patches that become one token.
        frames: how often a still is repeated in time.
        eight_bit: see `diffalign.rewards.preprocess`.

    Returns:
        patches (B * h * w, 3 * frames * patch * patch), and (h, w).
    """
    height, width = fit(images.shape[-2], images.shape[-1], pixels, patch * merge)
    images = normalise(pillow_resize(images, (height, width), eight_bit=eight_bit), CLIP_MEAN, CLIP_STD)
    h, w = height // patch, width // patch
    cut = images.reshape(-1, 3, h // merge, merge, patch, w // merge, merge, patch)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)  # picture, block row and column, patch in it, channel, pixel
    cut = cut.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, frames, -1, -1)
    return cut.reshape(-1, 3 * frames * patch * patch), (h, w)


def rename(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The published tensors under the names of transformers' `Qwen2VLModel`, and those of the head.

    transformers 4.45 saves `visual.*` and `model.layers.*`, 4.52 and later `model.visual.*` and
    `model.language_model.layers.*`. The output layer of the language model is not used.
    """
    body, head = {}, {}
    for key, value in state.items():
        if key.startswith("rm_head."):
            head[key.removeprefix("rm_head.")] = value
        elif not key.startswith("lm_head."):
            new = re.sub(r"^(model\.)?visual\.", "visual.", key)
            body[re.sub(r"^model\.(language_model\.)?", "language_model.", new)] = value
    return body, head


def _read_template(path: Path) -> str:
    """The instruction, to the byte.

    Raises:
        RewardError: it is not there, or lacks the prompt's place or the token.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(
            f"hpsv3: the instruction {str(path)!r} cannot be read; copy INSTRUCTION and prompt_with_special_token of "
            "MizzenAI/HPSv3:hpsv3/dataset/data_collator_qwen.py into it, one after the other"
        ) from error
    if text.count(PROMPT) != 1 or text.count(TOKEN) != 1:
        raise RewardError(f"hpsv3: {path} must hold {PROMPT} and {TOKEN} once each; copy the original instruction")
    return text
