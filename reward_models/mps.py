"""MPS: a CLIP ViT-H/14 whose picture tokens look at those words of the prompt that a list of quality words singles out.

Paper: Zhang et al. 2024, "Learning Multi-dimensional Human Preference for Text-to-Image Generation", CVPR 2024; code:
Kwai-Kolors/MPS:trainer/models and eval_overall_mps_on_hpdv2.py (commit be9027f3). Only the weights for overall preference
were published. Text tokens (also the padding) are projected and compared with those of the condition, a fixed list of
words; tokens whose best product, divided by the largest of the prompt, is not above a threshold are masked. Picture tokens
attend to the rest in four blocks with multi-query attention. Score = exp(logit_scale) * cosine(first picture token, end
token of the prompt); for two pictures of one prompt, sigmoid(s0 - s1) is the probability that the first is preferred.

Code and code differ: the README and the model's forward pass mask at 0.01, the evaluation scripts at 0.3, which is
followed here, as the published accuracies presumably are (UNVERIFIED). The forward pass divides by the largest product of
the whole batch; here, as in the scripts, each prompt has its own. The original weights are a pickled module, which runs
code when it is read and is refused; the default is a safetensors copy of its tensors. A state dict saved from the original
module is read as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from diffalign.errors import ConfigError
from diffalign.rewards import Reward, RewardError, cosine, preprocess
from reward_models._weights import fill, find_file, pretrained, read_state

REPOSITORY = "RE-N-Y/mpsv1"  # a port of the published weights; its revision is not pinned
FILE = "model.safetensors"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
TOKENIZER_REVISION = "1c2b8495b28150b8a4922ee1c8edee224c284c0c"
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, texture, "
    "quantity, attributes, position, number, location, word, things."
)
THRESHOLD = 0.3  # eval_overall_mps_on_hpdv2.py; 0.01 in the README
TOWERS: dict[str, Any] = {  # ViT-H/14 of laion
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
}
CROSS = {"layers": 4, "heads": 16, "head_width": 64}
UNUSED = r"\.position_ids$|^cross\..*\.norm\.bias$|\.inv_freq$"  # constants


class MPS(Reward):
    """Overall human preference for text-to-image pictures (MHP), as a logit."""

    range = (-100.0, 100.0)
    unit = "logit of the preference; about 5 to 20 (UNVERIFIED); a difference of 1 is a 73 % preference"
    differentiable = True
    weights = f"{REPOSITORY}@main:{FILE} (not pinned), {TOKENIZER}@{TOKENIZER_REVISION} (tokenizer)"
    licence = "MIT"
    gap = (
        "resizing is within 2/255 of Pillow's; float32 where the original computes in float16; scores of the "
        "published weights and the names in the default file are UNVERIFIED here (the architecture is tested on random "
        "weights)"
    )
    argument = f"path of the weights; default: {REPOSITORY}/{FILE} from $DIFFALIGN_WEIGHTS or the hub"

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        checkpoint: str | Path | None = None,
        *,
        threshold: float = THRESHOLD,
        tokenizer: str | Path = TOKENIZER,
        towers: Mapping[str, Any] = TOWERS,
        cross: Mapping[str, int] = CROSS,
    ) -> None:
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

        path = _find() if checkpoint is None else Path(checkpoint)
        state = rename(read_state("mps", path))
        revision = TOKENIZER_REVISION if str(tokenizer) == TOKENIZER else "main"
        words = pretrained("mps", lambda source: CLIPTokenizer.from_pretrained(source, revision=revision), tokenizer)
        config = CLIPConfig(**towers)
        blocks = [
            _Block(int(towers["projection_dim"]), cross["heads"], cross["head_width"]) for _ in range(cross["layers"])
        ]
        model = nn.ModuleDict({"clip": CLIPModel(config), "cross": nn.ModuleList(blocks)})
        fill("mps", path, model, state)
        model.eval().requires_grad_(False).to(device, dtype)
        self.clip, self.cross, self.tokenizer = cast(Any, model["clip"]), blocks, cast(Any, words)
        self.device, self.dtype, self.threshold = torch.device(device), dtype, threshold
        self.condition_KD, _ = self.embed_texts([CONDITION])
        self.eight_bit = True  # see `preprocess`

    @classmethod
    def check_argument(cls, argument: str | None) -> None:
        if argument is not None and not Path(argument).is_file():
            raise ConfigError(f"mps: weights {argument!r} do not exist")

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        pixels = preprocess(images, self.clip.config.vision_config.image_size, eight_bit=self.eight_bit)
        hidden = self.clip.vision_model(pixel_values=pixels.to(self.device, self.dtype)).last_hidden_state
        image_BND = self.clip.visual_projection(hidden)
        distinct = list(dict.fromkeys(prompts))
        rows = [distinct.index(prompt) for prompt in prompts]
        text_BLD, end_BD = (v[rows] for v in self.embed_texts(distinct))
        similarity_BL = (text_BLD @ self.condition_KD[0].T).amax(-1).float()
        kept_BL = similarity_BL / similarity_BL.amax(-1, keepdim=True) > self.threshold
        for block in self.cross:
            image_BND = block(image_BND, text_BLD, kept_BL)
        return self.clip.logit_scale.float().exp() * cosine(image_BND[:, 0], end_BD)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Projected tokens (B, L, D), padding included, and the projected end token (B, D)."""
        length = self.clip.config.text_config.max_position_embeddings
        ids = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids.to(self.device)
        hidden = self.clip.text_model(input_ids=ids).last_hidden_state
        ends = ids.argmax(-1)  # the first token with the highest id, as the original's config has it
        tokens = self.clip.text_projection(hidden)
        return tokens, tokens[torch.arange(len(ids), device=self.device), ends]


class _Block(nn.Module):
    """A cross-attention to the text and a self-attention over the picture, each beside a feed-forward layer."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.text = _Attention(width, heads, head_width, separate=True)
        self.own = _Attention(width, heads, head_width, separate=False)

    def forward(self, x_BND: Tensor, text_BLD: Tensor, kept_BL: Tensor) -> Tensor:
        x_BND = x_BND + self.text(x_BND, text_BLD, kept_BL)
        return x_BND + self.own(x_BND)


class _Attention(nn.Module):
    """Multi-query attention (one head of keys and values) with a SwiGLU layer in parallel, both on the normed input.

    The cross-attention has separate matrices; the self-attention has one for queries, key, value and the layer's
    input, and turns queries and keys by their positions (rotary).
    """

    def __init__(self, width: int, heads: int, head_width: int, *, separate: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        inner, wide = heads * head_width, 4 * width
        self.heads, self.sizes = heads, (inner, head_width, head_width, 2 * wide)
        sizes = (inner, 2 * head_width, 2 * wide) if separate else (sum(self.sizes),)
        self.into = nn.ModuleList(nn.Linear(width, size, bias=False) for size in sizes)
        self.out = nn.Linear(inner, width, bias=False)
        self.ff_out = nn.Linear(wide, width, bias=False)

    def forward(self, x_BND: Tensor, text_BLD: Tensor | None = None, kept_BL: Tensor | None = None) -> Tensor:
        x_BND = self.norm(x_BND)
        if text_BLD is None:
            q, k, v, inner = self.into[0](x_BND).split(self.sizes, -1)
        else:
            q, inner = self.into[0](x_BND), self.into[2](x_BND)
            k, v = self.into[1](text_BLD).chunk(2, -1)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B heads N d
        if text_BLD is None:
            q, k = _rotate(q), _rotate(k)
        logits = q @ k.transpose(-1, -2)[:, None] * k.shape[-1] ** -0.5
        if kept_BL is not None:
            logits = logits.masked_fill(~kept_BL[:, None, None], -float("inf"))
        mixed = (logits.softmax(-1) @ v[:, None]).transpose(1, 2).flatten(2)
        value, gate = inner.chunk(2, -1)
        out: Tensor = self.out(mixed) + self.ff_out(silu(gate) * value)
        return out


def _rotate(x: Tensor) -> Tensor:
    """Rotary position embedding over the last but one axis; halves of the last axis are a pair's two numbers."""
    length, width = x.shape[-2:]
    frequency = 10000 ** -(torch.arange(0, width, 2, device=x.device).float() / width)
    angle = (torch.arange(length, device=x.device).float()[:, None] * frequency).repeat(1, 2)
    a, b = x.chunk(2, -1)
    return (x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()).to(x.dtype)


NAMES = (  # published names to those above
    (r"^mps\.", ""),
    (r"^model\.", "clip."),
    (r"^cross_model\.layers\.(\d+)\.0\.fn\.", r"cross.\1.text."),
    (r"^cross_model\.layers\.(\d+)\.1\.fn\.", r"cross.\1.own."),
    (r"\.(to_q|fused_attn_ff_proj)\.", ".into.0."),
    (r"\.to_kv\.", ".into.1."),
    (r"\.(to_out|attn_out)\.", ".out."),
    (r"(^cross\..*)\.ff\.0\.", r"\1.into.2."),
    (r"(^cross\..*)\.(ff\.2|ff_out\.1)\.", r"\1.ff_out."),
)


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors under the names of this file, as `clip.*` and `cross.*`."""
    renamed = {}
    for key, value in state.items():
        for old, new in NAMES:
            key = re.sub(old, new, key)
        if not re.search(UNUSED, key):
            renamed[key] = value
    return renamed


def _find() -> Path:
    try:
        return find_file("mps", REPOSITORY, FILE, telling=False)
    except RewardError as error:
        raise RewardError(f"{error} (the original file is a pickled module and cannot be read)") from error
