"""ImageReward v1.0: BLIP with a head on its multimodal [CLS] token, trained on people's rankings of pictures.

Paper: Xu et al. 2023, "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", arXiv
2304.05977; code: THUDM/ImageReward:ImageReward/ImageReward.py (commit c1392c6d). The published file is read into
transformers' BLIP classes; the package `image-reward` is not needed. Score = (head([CLS]) - MEAN) / STD, so that it has
mean 0 and standard deviation 1 on the pictures it was trained on. The head's five linear layers have dropout and no
activation between them; they are folded into one affine map in float64.

The text goes through bert-base-uncased's tokenizer, cut to 35 tokens; its first token stays [CLS], and every token attends
to all others and to the picture. The official `score` and `inference_rank` give the same numbers; both are this one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffalign.errors import ConfigError
from diffalign.rewards import Reward, preprocess
from reward_models._weights import fill, find_file, fold, pretrained, read_state

REPOSITORY = "THUDM/ImageReward"  # also zai-org/ImageReward
REVISION = "5736be03b2652728fb87788c9797b0570450ab72"
FILE = "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
TOKENIZER_REVISION = "86b5e0934494bd15c9632b12f734a8a67f723594"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's answers, ImageReward.py
MAX_TOKENS = 35
LAYERS = (0, 2, 4, 6, 7)  # places of the head's linear layers between the dropouts
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
TEXT = {  # med_config.json
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
}
# Published names to transformers', for the picture side; the text side has the same names in both.
VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)
UNUSED = r"^blip\.(vision_proj|text_proj)\.|\.position_ids$"  # of BLIP's pretraining, and a constant


class ImageReward(Reward):
    """Human preference for text-to-image pictures (ImageRewardDB), standardised."""

    range = (-float("inf"), float("inf"))
    unit = "standard deviations from the mean of the training pictures; -2.3 to 2 in practice, SD1.5 about 0.1 to 0.2"
    differentiable = True
    weights = f"{REPOSITORY}@{REVISION}:{FILE}, {TOKENIZER}@{TOKENIZER_REVISION} (tokenizer)"
    licence = "Apache-2.0"
    gap = (
        "resizing is within 2/255 of Pillow's; scores of the published weights are UNVERIFIED here (key map, "
        "attention and preprocessing are tested on random weights)"
    )
    argument = f"path of the checkpoint file; default: {FILE} from $DIFFALIGN_WEIGHTS or the hub"

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        checkpoint: str | Path | None = None,
        *,
        tokenizer: str | Path = TOKENIZER,
        vision: Mapping[str, Any] = VISION,
        text: Mapping[str, Any] = TEXT,
    ) -> None:
        from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        path = find_file("image_reward", REPOSITORY, FILE, REVISION) if checkpoint is None else Path(checkpoint)
        revision = TOKENIZER_REVISION if str(tokenizer) == TOKENIZER else "main"
        words = pretrained(
            "image_reward", lambda source: BertTokenizer.from_pretrained(source, revision=revision), tokenizer
        )
        self.tokenizer = cast(Any, words)
        self.tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # BLIP's, in this order
        vision_config = BlipVisionConfig(**vision)
        # is_decoder only gives the layers their cross-attention; the forward pass is told otherwise.
        text_config = BlipTextConfig(**text, encoder_hidden_size=vision_config.hidden_size, is_decoder=True)
        blip = {
            "vision": BlipVisionModel(vision_config),
            "text": BlipTextModel(text_config, add_pooling_layer=False),
            "head": nn.ModuleDict({str(i): nn.Linear(*size) for i, size in zip(LAYERS, _head_sizes(text_config))}),
        }
        towers = nn.ModuleDict(blip)
        state = rename(read_state("image_reward", path))
        fill("image_reward", path, towers, state)
        weight_D, bias = fold([(state[f"head.{i}.weight"], state[f"head.{i}.bias"]) for i in LAYERS])
        self.weight_D, self.bias = weight_D.float().to(device), float(bias)
        self.vision, self.text = cast(Any, towers["vision"]), cast(Any, towers["text"])
        for tower in (self.vision, self.text):
            tower.eval().requires_grad_(False).to(device, dtype)
        self.device, self.dtype = torch.device(device), dtype
        self.eight_bit = True  # see `preprocess`

    @classmethod
    def check_argument(cls, argument: str | None) -> None:
        if argument is not None and not Path(argument).is_file():
            raise ConfigError(f"image_reward: checkpoint {argument!r} does not exist")

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        size = self.vision.config.image_size
        pixels = preprocess(images, size, eight_bit=self.eight_bit, crop_offset=round)  # torchvision's crop
        patches = self.vision(pixel_values=pixels.to(self.device, self.dtype)).last_hidden_state
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        hidden = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=patches,
            is_decoder=False,
        ).last_hidden_state
        raw = (hidden[:, 0].float() * self.weight_D).sum(-1) + self.bias
        return (raw - MEAN) / STD


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published file's tensors under transformers' names, as `vision.*`, `text.*` and `head.*`."""
    renamed = {}
    for key, value in state.items():
        if re.search(UNUSED, key):
            continue
        new = key
        if key.startswith("blip.visual_encoder."):
            new = key.removeprefix("blip.visual_encoder.")
            for old, name in VISION_NAMES:
                new = re.sub(old, name, new)
            new = f"vision.{new}"
        for old, name in (("blip.text_encoder.", "text."), ("mlp.layers.", "head.")):
            new = name + new.removeprefix(old) if new.startswith(old) else new
        renamed[new] = value
    return renamed


def _head_sizes(text_config: Any) -> list[tuple[int, int]]:
    sizes = (text_config.hidden_size, 1024, 128, 64, 16, 1)
    return list(itertools.pairwise(sizes))
