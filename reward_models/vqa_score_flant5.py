"""VQAScore as in the paper: the probability that CLIP-FlanT5 answers "Yes" when asked whether the figure shows the prompt.

Paper: Lin et al. 2024, "Evaluating Text-to-Visual Generation with Image-to-Text Generation", arXiv 2404.01291; code:
linzhiqiu/t2v_metrics, clip_t5_model.py as of commit 335e4c2 (version 3.1 drops it). The picture is padded to a square with
CLIP's mean colour and read by CLIP L/14 at 336 pixels; the last but one layer's patches go through two linear layers and
stand in the text where `<image>` does, for Flan-T5 to read. Score = exp(mean log-probability of "Yes" and the end token), a
geometric mean.

transformers has no class for the whole; it is put together from T5 and CLIP. The projector comes from the checkpoint, CLIP
from its own repository: training froze it (UNVERIFIED), and copies in the checkpoint are not read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffalign.rewards import CLIP_MEAN, Reward, RewardError, preprocess, to_eight_bit
from reward_models._weights import pretrained

MODEL = "zhiqiulin/clip-flant5-xxl"  # 11 billion parameters; clip-flant5-xl has 3; revisions are not pinned
TOKENIZER = "google/flan-t5-xxl"
TOWER = "openai/clip-vit-large-patch14-336"
BEFORE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. USER: "
)
AFTER = '\nDoes this figure show "{}"? Please answer yes or no. ASSISTANT: '
ANSWER = "Yes"


class VQAScoreFlanT5(Reward):
    """Probability that CLIP-FlanT5 answers "Yes" to the question whether the figure shows the prompt."""

    range = (0.0, 1.0)
    unit = "probability, geometric mean over the answer's tokens"
    differentiable = True
    weights = f"{MODEL}@main, {TOKENIZER}@main (tokenizer), {TOWER}@main (none pinned)"
    licence = "Apache-2.0 (CLIP-FlanT5), MIT (CLIP)"
    gap = (
        "resizing is within 2/255 of Pillow's; the original computes in bfloat16 and with the slow tokenizer; the published "
        "weights, the names in them and their scores are UNVERIFIED here (the method is tested on random weights)"
    )
    argument = f"hub id or folder of CLIP-FlanT5 weights (default {MODEL})"

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        model: str | Path = MODEL,
        *,
        tokenizer: str | Path = TOKENIZER,
        tower: str | Path = TOWER,
    ) -> None:
        from transformers import CLIPVisionModel, T5Config, T5ForConditionalGeneration, T5Tokenizer

        class ClipT5(T5ForConditionalGeneration):  # type: ignore[misc]
            """Flan-T5 with the projector under its published name."""

            _keys_to_ignore_on_load_unexpected = [r"^vision_tower\."]  # noqa: RUF012

            def __init__(self, config: Any) -> None:
                super().__init__(config)
                wide, width = config.mm_hidden_size, config.d_model
                self.mm_projector = nn.Sequential(nn.Linear(wide, width), nn.GELU(), nn.Linear(width, width))

        name = "vqa_score_flant5"
        self.tokenizer = cast(Any, pretrained(name, T5Tokenizer.from_pretrained, tokenizer))
        vision = pretrained(name, lambda source: CLIPVisionModel.from_pretrained(source, dtype=dtype), tower)
        config = cast(Any, pretrained(name, T5Config.from_pretrained, model))
        config.mm_hidden_size = cast(Any, vision).config.hidden_size
        load = cast(Any, ClipT5).from_pretrained
        self.model, report = pretrained(
            name, lambda source: load(source, config=config, dtype=dtype, output_loading_info=True), model
        )
        for what in ("missing_keys", "mismatched_keys"):
            if keys := sorted(map(str, report[what])):
                raise RewardError(
                    f"{name}: {str(model)!r} has {len(keys)} {what.replace('_', ' ')}, such as {keys[0]!r}"
                )
        self.tower = cast(Any, vision)
        for part in (self.model, self.tower):
            part.eval().requires_grad_(False).to(device)
        self.device, self.dtype = torch.device(device), dtype
        self.eight_bit = True  # see `preprocess`

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        size = self.tower.config.image_size
        images = to_eight_bit(images) if self.eight_bit else images
        pixels = preprocess(pad_to_square(images), size, eight_bit=self.eight_bit).to(self.device, self.dtype)
        patches = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        words = self.model.get_input_embeddings()
        # Each piece of text around the picture is closed by an end token, as the original's tokenizer does.
        before = self.tokenizer([BEFORE] * len(prompts), return_tensors="pt").to(self.device)
        after = self.tokenizer(
            [AFTER.format(prompt) for prompt in prompts], padding=True, padding_side="right", return_tensors="pt"
        ).to(self.device)
        seen = [words(before.input_ids), self.model.mm_projector(patches), words(after.input_ids)]
        present = before.attention_mask.new_ones(patches.shape[:2])
        answer = self.tokenizer([ANSWER] * len(prompts), return_tensors="pt").input_ids.to(self.device)
        logits = self.model(
            inputs_embeds=torch.cat(seen, 1),
            attention_mask=torch.cat([before.attention_mask, present, after.attention_mask], 1),
            labels=answer,
        ).logits[..., : len(self.tokenizer)]  # rows without a token are cut, as in the original
        return logits.float().log_softmax(-1).gather(-1, answer[..., None])[..., 0].mean(-1).exp()


def pad_to_square(images: Tensor) -> Tensor:
    """Pictures in the middle of a square of CLIP's mean colour, as a whole number of 255, like the original's."""
    height, width = images.shape[-2:]
    side = max(height, width)
    colour = torch.tensor([int(mean * 255) / 255 for mean in CLIP_MEAN], device=images.device)
    square = colour.view(1, 3, 1, 1).expand(len(images), 3, side, side).clone()
    top, left = (side - height) // 2, (side - width) // 2
    square[..., top : top + height, left : left + width] = images
    return square
