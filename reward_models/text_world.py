"""The text world's exact verifier as a reward: is the result right, is the answer well-formed, and how is it worded.

Reads the prompt's puzzle and the answer's sentences back (`diffalign.world.text.task`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffalign.rewards import RewardError, TextReward
from diffalign.world.text import task


class TextWorld(TextReward):
    """Verdict on an answer to a puzzle of the text world."""

    range = (0.0, 1.0)  # of every part; a weighted sum leaves it
    unit = (
        "1 is right (correct), entirely polite (polite), ...; the tiny LM samples right answers about half of the time"
    )
    weights = None
    licence = "Apache-2.0 (code only)"
    gap = "none: this is the original"
    argument = f"part of the verdict: {', '.join(task.PARTS)}, or a sum like correct+0.3*polite (default: correct)"

    def __init__(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, part: str = "correct"
    ) -> None:
        self.judge = task.find_judge(part)

    @classmethod
    def check_argument(cls, argument: str | None) -> None:
        if argument is not None:
            task.find_judge(argument)

    def __call__(
        self, prompts: list[str], completions: list[str], metadata: list[dict[str, Any]] | None = None
    ) -> Tensor:
        try:
            scores = [self.judge(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        except ValueError as error:  # a prompt of another world
            raise RewardError(f"text_world: {error}") from error
        return torch.tensor(scores, dtype=torch.float32)
