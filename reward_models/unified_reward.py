"""UnifiedReward: a vision-language model that was trained to judge writes its marks, and they are read from its text.

Paper: Wang et al. 2025, "Unified Reward Model for Multimodal Understanding and Generation", arXiv 2503.05236; code:
CodeGoat24/UnifiedReward: inference_llava/image_generation/point_score_image_generation.py (mode final, first generation)
and point_score_ACS_image_generation.py (mode dimensions: 1.5 and 2.0). `unified_reward:judge.yaml` names who is asked, in
the form of `diffalign.vlm`:

    server: http://127.0.0.1:8000/v1        # or local: CodeGoat24/UnifiedReward-qwen-7b
    mode: final                             # or dimensions

Final: the number after "Final Score:", 1 to 5, over 5. Dimensions: the mean of "Alignment Score (1-5): ", "Coherence Score
(1-5): " and "Style Score (1-5): ", over 5; the mean is ours, the three are told as parts. A text without its numbers, or
with one out of 1 to 5, is missing, NaN (in flow_grpo 0). Pictures are first resized to 512 x 512, as in flow_grpo.

The questions here say the same as the original's in other words, and ask for the same form of answer. Put the original's own
into `question:`, with {prompt}, for its own scores. Which of two pictures is better is asked with mode verdict of
`diffalign.vlm`, whose three sentences are this model's.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import torch
from torch import Tensor

from diffalign import vlm
from diffalign.errors import ConfigError
from diffalign.rewards import pillow_resize

SIDE = 512
LOWEST, HIGHEST = 1.0, 5.0
DIMENSIONS = ("Alignment", "Coherence", "Style")
_CRITERIA = (
    'A picture was generated for this caption: "{prompt}". First, check how well it follows the caption: the things that '
    "are named, their attributes and relations. Second, check how good the picture itself is: clarity, detail, colour and "
    "beauty."
)
QUESTIONS = {
    "final": (
        _CRITERIA
        + " List the elements of the caption, each as 'element (type): value', 1 where it is in the picture and 0 "
        "where it is not. Then give a mark from 1 to 5 after 'Final Score:'."
    ),
    "dimensions": (
        'A picture was generated for this caption: "{prompt}". Mark it from 1 to 5 in three respects: how well its content '
        "matches the caption (Alignment), how free it is of glitches and distortions (Coherence), how good it looks, "
        "whatever the caption says (Style). Answer in this form:\n"
        "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z"
    ),
}
_NUMBER = r"[\s*:\[]*([0-9]+(?:\.[0-9]+)?)"  # blanks, a colon, bold type and a bracket may stand before it


class UnifiedReward(vlm.JudgeReward):
    """Mark that UnifiedReward gives a picture for its prompt, read from the text that it writes."""

    range = (LOWEST / HIGHEST, 1.0)
    unit = "mark from 1 to 5, over 5"
    licence = "MIT (the project's repository); the base models have their own"
    gap = (
        "the questions are in other words unless the file has the original's; scores of published weights are UNVERIFIED "
        "here, as is the size at which the three-dimensional version sees pictures"
    )
    argument = "YAML file that says who is asked (see diffalign.vlm); mode: final or dimensions"

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, file: str = "") -> None:
        super().__init__(device, dtype, file)
        self._parts: dict[str, Tensor] = {}

    @classmethod
    def questions(cls, file: str) -> vlm.Questions:
        if not file:
            raise ConfigError("reward unified_reward: nobody to ask; write unified_reward:judge.yaml")
        found = vlm.read_questions(file, tuple(QUESTIONS))
        return found if found.question else dataclasses.replace(found, question=QUESTIONS[found.mode])

    def parts(self) -> dict[str, Tensor]:
        return self._parts

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        seen = pillow_resize(images, (SIDE, SIDE))
        self._parts = {}
        if self.judge.questions.mode == "final":
            return torch.tensor(self.judge.read([[p] for p in seen], prompts, final_score), device=images.device)
        marks: list[tuple[float, ...]] = []

        def mean(text: str) -> float:
            marks.append(dimension_scores(text))
            return math.fsum(marks[-1]) / len(DIMENSIONS)

        means = self.judge.read([[picture] for picture in seen], prompts, mean)
        columns = zip(*marks, strict=True)
        self._parts = {name.lower(): torch.tensor(column) for name, column in zip(DIMENSIONS, columns, strict=True)}
        return torch.tensor(means, device=images.device)


def final_score(text: str) -> float:
    """The last number after "Final Score", over 5; NaN where there is none in 1 to 5."""
    found = re.findall("final score" + _NUMBER, text, re.IGNORECASE)
    return _mark(found[-1]) if found else math.nan


def dimension_scores(text: str) -> tuple[float, ...]:
    """The last mark of each of `DIMENSIONS`, over 5; NaN where there is none in 1 to 5."""
    marks = []
    for name in DIMENSIONS:
        found = re.findall(rf"{name} score(?:\s*\(1-5\))?" + _NUMBER, text, re.IGNORECASE)
        marks.append(_mark(found[-1]) if found else math.nan)
    return tuple(marks)


def _mark(number: str) -> float:
    value = float(number)
    return value / HIGHEST if LOWEST <= value <= HIGHEST else math.nan
