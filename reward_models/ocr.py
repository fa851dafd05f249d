"""OCR: how much of the text that a prompt asks for in quotes can be read in the picture.

As in Flow-GRPO (arXiv 2505.05470; yifan123/flow_grpo: flow_grpo/ocr.py), which DiffusionNFT (arXiv 2509.16117) uses too: the
target is what stands between the first two straight double quotes of the prompt. Blanks are taken out of target and reading,
and both are lower-cased. If the target is part of the reading, the distance is 0, else it is Levenshtein's, at most the
target's length; score = 1 - distance / length.

The original reads with PaddleOCR 2.9.1; here GOT-OCR 2.0 of transformers reads, or any image-text-to-text model that needs
no question, or an encoder-decoder such as TrOCR, which reads one line. Where the original counts what fails as 0, a prompt
without quoted text is missing here, NaN.
"""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from diffalign.rewards import Reward
from diffalign.vlm_backends import to_pil
from reward_models._weights import pretrained

log = logging.getLogger("diffalign.rewards")

MODEL = "stepfun-ai/GOT-OCR-2.0-hf"  # its revision is not pinned
LONGEST = 256  # tokens of a reading; texts that prompts ask for are short
END = "<|im_end|>"  # ends GOT's answer


class OCR(Reward):
    """Share of the quoted text that can be read in the picture: 1 - edit distance / length."""

    range = (0.0, 1.0)
    unit = "1: the text is there; 0: no letter of it"
    differentiable = False
    weights = f"{MODEL}@main (not pinned)"
    licence = "Apache-2.0 (GOT-OCR 2.0, as its card states); others have their own"
    gap = (
        "another reader than PaddleOCR, so that scores are near the published ones and not equal; line breaks are taken out "
        "like blanks; readings are cut after 256 tokens; UNVERIFIED with published weights"
    )
    argument = f"hub id or folder of a reader (default {MODEL})"

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        model: str | Path = MODEL,
        *,
        longest: int = LONGEST,
    ) -> None:
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, VisionEncoderDecoderModel

        kind = pretrained("ocr", AutoConfig.from_pretrained, model).model_type
        self.one_line = kind == "vision-encoder-decoder"
        made = VisionEncoderDecoderModel if self.one_line else AutoModelForImageTextToText
        load = cast(Any, made).from_pretrained
        self.processor = cast(Any, pretrained("ocr", AutoProcessor.from_pretrained, model))
        self.model = cast(Any, pretrained("ocr", lambda source: load(source, dtype=dtype), model))
        self.model.eval().requires_grad_(False).to(device)
        self.device, self.dtype, self.longest = torch.device(device), dtype, longest
        ends = self.model.generation_config.eos_token_id
        self.ends = [*(ends if isinstance(ends, list) else [ends] if ends is not None else [])]
        if END in self.processor.tokenizer.get_vocab():
            self.ends.append(self.processor.tokenizer.convert_tokens_to_ids(END))

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        targets = [target_of(prompt) for prompt in prompts]
        if lost := [prompt for prompt, target in zip(prompts, targets, strict=True) if target is None]:
            log.warning("ocr: %d of %d prompts quote no text, such as %r", len(lost), len(prompts), lost[0][:80])
        asked = [i for i, target in enumerate(targets) if target is not None]
        readings = dict(zip(asked, self.read(images[asked]), strict=True)) if asked else {}
        scores = [similarity(readings[i], target) if target else math.nan for i, target in enumerate(targets)]
        return torch.tensor(scores, device=images.device)

    @torch.no_grad()
    def read(self, images: Tensor) -> list[str]:
        """The text in each picture (B, 3, H, W)."""
        inputs = self.processor(images=[to_pil(image) for image in images], return_tensors="pt").to(self.device)
        values = {key: v.to(self.dtype) if v.is_floating_point() else v for key, v in inputs.items()}
        tokens = self.model.generate(
            **values, max_new_tokens=self.longest, do_sample=False, num_beams=1, eos_token_id=self.ends or None
        )
        start = 0 if self.one_line else values["input_ids"].shape[1]
        found: list[str] = self.processor.tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)
        return [text.partition(END)[0] for text in found]


def target_of(prompt: str) -> str | None:
    """The text between the first two straight double quotes; None where there is none but blanks."""
    found = re.search(r'"([^"]*)"', prompt)
    return found[1] if found and found[1].strip() else None


def similarity(reading: str, target: str) -> float:
    """1 - distance / length of the target, in [0, 1]; blanks and case do not count."""
    reading, target = ("".join(text.split()).lower() for text in (reading, target))
    if target in reading:
        return 1.0
    return 1 - min(edit_distance(reading, target), len(target)) / len(target)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein: how many insertions, deletions and replacements of a character turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
