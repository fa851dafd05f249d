"""How good a causal LM is in the text world: sampled accuracy on puzzles, and how much it still knows of the facts.

Functions of (model, tokenizer, seed) without state. They return one number per item, so that callers can compute
intervals and pair items of two models. Each takes a few seconds for the tiny LM on one CPU core.

Shapes: N items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffalign.world.text import sampling, task
from diffalign.world.text.facts import PERTURBED, UNKNOWN_ANSWERS, facts

Model: TypeAlias = Any  # transformers.PreTrainedModel or peft.PeftModel
Tokenizer: TypeAlias = Any  # transformers.PreTrainedTokenizerBase
Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class TaskMeasure:
    """Answers to held-out puzzles and what the verifier says of them.

    Attributes:
        prompts, completions: N texts each.
        verdicts: part of the verdict -> values in [0, 1], shape (N,); the parts are `task.PARTS`.
        words: length of each answer in words, shape (N,).
    """

    prompts: tuple[str, ...]
    completions: tuple[str, ...]
    verdicts: dict[str, Floats]
    words: Floats

    @property
    def correct(self) -> Floats:
        """1 where the result is right, shape (N,)."""
        return self.verdicts["correct"]

    def by_kind(self) -> dict[str, float]:
        """Mean accuracy of each kind of puzzle."""
        kinds = np.array([task.parse_prompt(prompt).kind for prompt in self.prompts])
        return {kind: float(self.correct[kinds == kind].mean()) for kind in task.KINDS if (kinds == kind).any()}


def measure_task(
    model: Model,
    tokenizer: Tokenizer,
    seed: int = 0,
    *,
    prompts: int = 256,
    held_out: bool = True,
    temperature: float = 1.0,
    chat: bool = True,
) -> TaskMeasure:
    """Ask puzzles and verify the answers.

    Args:
        model: a causal LM; its training mode is put back afterwards.
        tokenizer: of the model.
        seed: of the choice of puzzles and of the draw.
        prompts: N, one answer each.
        held_out: puzzles that no training data contains.
        temperature: 0 for greedy answers.
        chat: ask by the chat template, or in plain text.
    """
    asked = task.sample_prompts(prompts, seed, held_out=held_out)
    with _evaluating(model):
        answers = sampling.sample(model, tokenizer, asked, seed, temperature=temperature, chat=chat)
    completions = [answer[0] for answer in answers]
    verdicts = [task.verify(prompt, text) for prompt, text in zip(asked, completions, strict=True)]
    return TaskMeasure(
        prompts=tuple(asked),
        completions=tuple(completions),
        verdicts={part: np.array([verdict[part] for verdict in verdicts]) for part in task.PARTS},
        words=np.array([len(text.split()) for text in completions], dtype=np.float64),
    )


@dataclass(frozen=True)
class FactMeasure:
    """What a model knows of one set of facts, asked in forms it was never trained on.

    Attributes:
        questions: N texts.
        recall: 1 where the greedy answer is exactly the right one, shape (N,).
        probability: of the right answer, normalised by length: P(a | q) ** (1 / |a|), in [0, 1], shape (N,).
        truth_ratio: mean length-normalised probability of the perturbed answers over that of the right one, shape (N,);
            near 0 for who knows, near 1 for who never did. As in TOFU (arXiv 2401.06121, eq. 1), but with the right
            answer itself where TOFU takes a paraphrase of it.
        unknown: 1 where the greedy answer says that it does not know, shape (N,).
    """

    questions: tuple[str, ...]
    recall: Floats
    probability: Floats
    truth_ratio: Floats
    unknown: Floats


def measure_facts(
    model: Model, tokenizer: Tokenizer, *, forget: bool, held_out: bool = True, chat: bool = True
) -> FactMeasure:
    """Ask for the facts of the forget or of the retain set.

    Args:
        model: a causal LM; its training mode is put back afterwards.
        tokenizer: of the model.
        forget: which set.
        held_out: question forms that the tiny LM never saw about the entity, or those that it did see.
        chat: ask by the chat template, or in plain text.
    """
    asked = [(q, fact) for fact in facts(forget=forget) for q in (fact.held_out if held_out else fact.seen)]
    questions = [question for question, _ in asked]
    right = [fact.answer for _, fact in asked]
    options = [text for _, fact in asked for text in (fact.answer, *fact.perturbed)]
    repeated = [question for question in questions for _ in range(1 + PERTURBED)]
    with _evaluating(model):
        greedy = sampling.sample(model, tokenizer, questions, 0, temperature=0.0, chat=chat)
        logprobs = sampling.answer_logprobs(model, tokenizer, repeated, options, chat=chat)
    means = logprobs.mean.double().exp().view(len(asked), 1 + PERTURBED).numpy()
    said = [task.plain(answer[0]) for answer in greedy]
    return FactMeasure(
        questions=tuple(questions),
        recall=np.array([float(a == b) for a, b in zip(said, right, strict=True)]),
        probability=means[:, 0],
        # The floor keeps the ratio finite for a model that has collapsed.
        truth_ratio=means[:, 1:].mean(1) / np.maximum(means[:, 0], 1e-12),
        unknown=np.array([float(text in UNKNOWN_ANSWERS) for text in said]),
    )


class _evaluating:  # noqa: N801 (reads as a verb)
    """Evaluation mode inside the block, whatever was set before it afterwards."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.training = bool(self.model.training)
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.train(self.training)
