"""VQAScore with a local vision-language model: how probable is "Yes" as its answer to whether a picture fits its prompt.

Paper: Lin et al. 2024, "Evaluating Text-to-Visual Generation with Image-to-Text Generation", arXiv 2404.01291; code:
linzhiqiu/t2v_metrics:t2v_metrics/models/vqascore_models/qwen2vl_model.py, whose question and default model this one
takes. Score = softmax over the whole vocabulary at the first token of the answer, read for "Yes". The paper's own numbers
are those of CLIP-FlanT5, another model asked in slightly other words; numbers of different models are not comparable. Such
scores know composition well and say nothing about looks.

Any model of transformers' image-text-to-text classes with a chat template will do, if "Yes" is one token for it. How many
tokens a picture gets is in the processor's configuration and part of the score.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from diffalign.rewards import Reward, RewardError
from reward_models._weights import pretrained

MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"  # its revision is not pinned
QUESTION = 'Does this figure show "{}"? Please answer Yes or No.'  # qwen2vl_model.py
ANSWER = "Yes"


class VQAScore(Reward):
    """Probability that a vision-language model answers "Yes" to the question whether the picture shows the prompt."""

    range = (0.0, 1.0)
    unit = "probability"
    differentiable = False
    weights = f"{MODEL}@main (not pinned)"
    licence = "Apache-2.0 (the default model; others have their own)"
    gap = (
        "the picture is resized by the model's own processor, in the original by qwen-vl-utils; the paper's model is "
        "another; scores of published weights are UNVERIFIED here"
    )
    argument = f"hub id or folder of a vision-language model (default {MODEL})"

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        model: str | Path = MODEL,
        *,
        question: str = QUESTION,
        answer: str = ANSWER,
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = cast(Any, pretrained("vqa_score", AutoProcessor.from_pretrained, model))
        if not getattr(self.processor, "chat_template", None):
            raise RewardError(f"vqa_score: {str(model)!r} has no chat template; take a model that was trained to chat")
        self.processor.tokenizer.padding_side = "left"  # so that the last place is the answer's in every row
        tokens = self.processor.tokenizer.encode(answer, add_special_tokens=False)
        if len(tokens) != 1:
            raise RewardError(
                f"vqa_score: the answer {answer!r} is {len(tokens)} tokens of {str(model)!r}; one expected"
            )
        self.token = tokens[0]
        load = AutoModelForImageTextToText.from_pretrained
        self.model = cast(Any, pretrained("vqa_score", lambda source: load(source, dtype=dtype), model))
        self.model.eval().requires_grad_(False).to(device)
        self.device, self.dtype, self.question = torch.device(device), dtype, question

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        from PIL import Image

        arrays = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        inputs = self.processor(
            text=[self.ask(prompt) for prompt in prompts],
            images=[[Image.fromarray(array)] for array in arrays],
            padding=True,
            return_tensors="pt",
        ).to(self.device)
        inputs = {key: value.to(self.dtype) if value.is_floating_point() else value for key, value in inputs.items()}
        logits: Tensor = self.model(**inputs, logits_to_keep=1).logits[:, -1]
        return logits.float().softmax(-1)[:, self.token]

    def ask(self, prompt: str) -> str:
        """The whole text that the model sees, up to where its answer begins."""
        content = [{"type": "image"}, {"type": "text", "text": self.question.format(prompt)}]
        # Models that think aloud would begin with a tag instead of the answer.
        thinking = {"enable_thinking": False} if "enable_thinking" in str(self.processor.chat_template) else {}
        messages = [{"role": "user", "content": content}]
        text: str = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **thinking)
        return text
