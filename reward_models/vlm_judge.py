"""A vision-language model as judge: probability of "yes", or expected rating, from log-probabilities.

`vlm_judge:questions.yaml` asks what the file says of the server or the local model that it names; `diffalign.vlm` describes
the file, how answers are read, and how pairs are compared. An answer that cannot be read is NaN, refused where a score is
needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffalign import vlm
from diffalign.errors import ConfigError


class VLMJudge(vlm.JudgeReward):
    """What a vision-language model, on a server or here, answers to a question about picture and prompt."""

    range = (0.0, 9.0)
    unit = "yes_no: probability of yes among yes and no; rating: expected rating from 1 to the scale (5 by default)"
    gap = (
        "on a server probabilities are over the tokens that it tells, 20 by default; one with a generation configuration "
        "of its own may change them (vLLM: --generation-config vllm)"
    )
    argument = "YAML file of questions (see diffalign.vlm)"

    @classmethod
    def questions(cls, file: str) -> vlm.Questions:
        if not file:
            raise ConfigError("reward vlm_judge: no questions; write vlm_judge:questions.yaml")
        questions = vlm.read_questions(file)
        if questions.mode in vlm.PAIR_MODES:
            raise ConfigError(
                f"reward vlm_judge: {file} asks about pairs, which are no scores; mode: yes_no or rating expected"
            )
        return questions

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        answers = self.judge.ask([[image] for image in images], prompts)
        return torch.tensor([answer.value for answer in answers], device=images.device)
