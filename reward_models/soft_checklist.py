"""Soft checklist: the mean probability of the right answers to questions that come with each prompt, as in GenEval 2.

Paper: "GenEval 2", 2025, arXiv 2512.16853, whose score is called soft-TIFA. Each prompt brings pairs of a question and the
answer that a right picture would get, as `vqa_list` in its metadata: [["How many dogs are in the image?", "two"], ["Is the
dog red?", "Yes"]]. Of each the probability of the expected answer at the first token is read, among all tokens; a number
counts as a word and as a digit. `soft_checklist:judge.yaml` says who is asked, in the form of `diffalign.vlm`, and with
`mode` how the questions of a picture are put together: `mean`, or `geometric`, where one wrong answer spoils all.

A server tells its twenty most probable tokens: an answer that is not among them counts 0, where a local model has a tiny
number.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from diffalign import vlm
from diffalign.errors import ConfigError
from diffalign.rewards import RewardError

KEY = "vqa_list"
FORM = "{question} Answer in one word."
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
MODES = ("mean", "geometric")


class SoftChecklist(vlm.JudgeReward):
    """Mean probability that a vision-language model gives the right answers to the questions of a prompt."""

    range = (0.0, 1.0)
    unit = "probability: arithmetic or geometric mean over the prompt's questions"
    gap = "the paper's model is Qwen3-VL-8B-Instruct; on a server answers beyond the tokens that it tells count 0"
    argument = "YAML file that says who is asked (see diffalign.vlm); mode: mean or geometric"

    @classmethod
    def questions(cls, file: str) -> vlm.Questions:
        if not file:
            raise ConfigError("reward soft_checklist: nobody to ask; write soft_checklist:judge.yaml")
        return vlm.read_questions(file, MODES)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        lists = [
            _questions(entry, prompt) for entry, prompt in zip(metadata or [{}] * len(prompts), prompts, strict=True)
        ]
        rows = [(i, question, answer) for i, pairs in enumerate(lists) for question, answer in pairs]
        found: dict[int, float] = {}
        for answer in dict.fromkeys(answer for *_, answer in rows):  # those of one answer are one request of the judge
            asked = [n for n, row in enumerate(rows) if row[2] == answer]
            words = [form for form in forms(answer) if self.judge.backend.speaks(form)]
            if not words:
                raise RewardError(
                    f"soft_checklist: the answer {answer!r} is no single token of {self.judge.model!r}; another model is "
                    "needed"
                )
            seen, about = [[images[rows[n][0]]] for n in asked], [prompts[rows[n][0]] for n in asked]
            texts = [FORM.replace("{question}", rows[n][1]) for n in asked]
            for n, top in zip(asked, self.judge.tops(seen, about, texts, words), strict=True):
                found[n] = vlm.weigh(top, dict.fromkeys(words, 1.0)).mass if top else math.nan
        values = [[found[n] for n, row in enumerate(rows) if row[0] == i] for i in range(len(prompts))]
        self.judge.account(prompts, [math.fsum(v) for v in values], ["nothing"] * len(prompts))
        return torch.tensor([combine(v, self.judge.questions.mode) for v in values], device=images.device)


def forms(answer: str) -> tuple[str, ...]:
    """What counts as an answer, in lower case: a number as a word and as a digit."""
    word = answer.strip().lower()
    if word in NUMBERS:
        return word, str(NUMBERS.index(word))
    if word.isdecimal() and int(word) < len(NUMBERS):
        return NUMBERS[int(word)], word
    return (word,)


def combine(values: list[float], mode: str) -> float:
    """Arithmetic or geometric mean of probabilities; NaN if one is."""
    if mode == "mean" or any(map(math.isnan, values)):
        return math.fsum(values) / len(values)
    if not all(values):
        return 0.0
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def _questions(metadata: dict[str, Any], prompt: str) -> list[tuple[str, str]]:
    given = metadata.get(KEY)
    given = json.loads(given) if isinstance(given, str) else given
    fine = isinstance(given, list) and all(isinstance(p, (list, tuple)) and len(p) == 2 for p in given)
    if not given or not fine:
        raise RewardError(
            f"soft_checklist: the prompt {prompt[:80]!r} brings no questions; metadata {KEY}: [[question, answer], ...] "
            "expected"
        )
    return [(str(question), str(answer)) for question, answer in given]
