"""What a text run did: rewards of base and adapter on the same prompts and noise, accuracy on held-out pairs, and memory.

Shapes: N items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffalign import rewards, statistics
from diffalign.config import EvaluationConfig, GenerationConfig
from diffalign.evaluate import Evaluation, reward_result
from diffalign.progress import Progress
from diffalign.schedules import sample_seed
from diffalign.text.batch import TextExample, collate_text
from diffalign.text.generation import Sampled, generate
from diffalign.text.policy import TextPolicy

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TextSample:
    """Answers of base and adapter to one prompt, and their scores by reward."""

    prompt: str
    base: str
    aligned: str
    base_scores: dict[str, float]
    aligned_scores: dict[str, float]


def sample(
    policy: TextPolicy,
    prompts: Sequence[TextExample],
    generation: GenerationConfig,
    *,
    seed: int,
    repeats: int = 1,
    adapters: bool,
    title: str,
) -> list[Sampled]:
    """`repeats` answers to every prompt; noise is a function of (seed, prompt id, repeat) alone."""
    ids = [example.rows[0].ids[: example.rows[0].start] for example in prompts for _ in range(repeats)]
    seeds = [sample_seed(seed, example.id, k) for example in prompts for k in range(repeats)]
    found: list[Sampled] = []
    with Progress(title, len(ids)) as progress:
        for start in range(0, len(ids), generation.batch_size):
            part = slice(start, start + generation.batch_size)
            found += generate(
                policy.bare,
                ids[part],
                config=generation,
                seeds=seeds[part],
                eos_ids=policy.family.eos_ids,
                pad_id=policy.family.pad_id,
                adapters=adapters,
                autocast=policy.autocast,
            )
            progress.advance(len(ids[part]))
    return found


def compare(
    policy: TextPolicy,
    prompts: Sequence[TextExample],
    config: EvaluationConfig,
    generation: GenerationConfig,
) -> tuple[Evaluation, list[TextSample]]:
    """Sample base and adapter on the same prompts and noise, and score both.

    Returns:
        The evaluation, and the first answer of either to every prompt.
    """
    repeats = config.images_per_prompt
    tokenizer = policy.family.tokenizer
    texts = {
        side: [
            tokenizer.decode(answer.ids, skip_special_tokens=True)
            for answer in sample(
                policy,
                prompts,
                generation,
                seed=config.seed,
                repeats=repeats,
                adapters=adapters,
                title=f"sampling {side}",
            )
        ]
        for side, adapters in (("base", False), ("aligned", True))
    }
    asked = [example.prompt for example in prompts for _ in range(repeats)]
    columns = [dict(example.columns) for example in prompts for _ in range(repeats)]
    evaluation = Evaluation(len(prompts), repeats, config.seed)
    for name in config.rewards:
        model = rewards.load_text(name, policy.family.device)
        scores = {
            side: rewards.score_texts(model, asked, answers, columns).view(-1, repeats).numpy()
            for side, answers in texts.items()
        }
        evaluation.results.append(reward_result(name, scores["base"], scores["aligned"]))
        evaluation.scores[name] = {side: value.tolist() for side, value in scores.items()}
    samples = [
        TextSample(
            prompt=example.prompt,
            base=texts["base"][n * repeats],
            aligned=texts["aligned"][n * repeats],
            base_scores={name: evaluation.scores[name]["base"][n][0] for name in config.rewards},
            aligned_scores={name: evaluation.scores[name]["aligned"][n][0] for name in config.rewards},
        )
        for n, example in enumerate(prompts)
    ]
    return evaluation, samples


def answer_scores(
    policy: TextPolicy, examples: Sequence[TextExample], *, adapters: bool, batch_size: int = 32
) -> list[Tensor]:
    """log p of every row's response tokens, one tensor (tokens,) per row, rows in order."""
    rows = [row for example in examples for row in example.rows]
    found: list[Tensor] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch = collate_text([TextExample(id="0", kind="item", rows=(row,)) for row in part], policy.family.pad_id).to(
            policy.family.device
        )
        values = policy.log_probs(batch, adapters=adapters).cpu()
        found += [values[n, row.start : len(row.ids)] for n, row in enumerate(part)]
    return found


def held_out_accuracy(
    policy: TextPolicy, pairs: Sequence[TextExample], *, reference: bool
) -> statistics.Estimate | None:
    """How often the chosen response of pairs that training never saw is ahead.

    With a reference, ahead means that its log-ratio is higher (implicit accuracy). Without one, that its mean
    log-probability per token is higher (ranking accuracy), as reference-free objectives score. Ties are left out.
    """
    pairs = [pair for pair in pairs if pair.kind == "pair" and pair.p != 0.5]
    if not pairs:
        return None
    ours = answer_scores(policy, pairs, adapters=True)
    if reference:
        theirs = answer_scores(policy, pairs, adapters=False)
        scores = [float(a.double().sum() - b.double().sum()) for a, b in zip(ours, theirs, strict=True)]
    else:
        scores = [float(a.double().mean()) for a in ours]
    hits = [float(w > l) + 0.5 * float(w == l) for w, l in zip(scores[::2], scores[1::2], strict=True)]
    return statistics.bootstrap_rate(hits)


@dataclass(frozen=True)
class Memory:
    """What a model still knows of a set of answers.

    Attributes:
        probability: geometric mean of the answer's token probabilities, in [0, 1], (N,).
        recall: 1 where greedy decoding gives exactly the answer, (N,).
    """

    probability: Floats
    recall: Floats


def memory(policy: TextPolicy, items: Sequence[TextExample], *, adapters: bool) -> Memory:
    """How well the answers of some items are known, by base or adapter."""
    scores = answer_scores(policy, items, adapters=adapters)
    probability = np.array([float(value.double().mean().exp()) for value in scores])
    generation = GenerationConfig(
        temperature=0.0, max_new_tokens=max(len(item.rows[0].response) for item in items), batch_size=64
    )
    said = sample(policy, items, generation, seed=0, adapters=adapters, title="recall")
    recall = [float(answer.ids == item.rows[0].response) for answer, item in zip(said, items, strict=True)]
    return Memory(probability, np.array(recall))


def unlearning_result(policy: TextPolicy, sets: Mapping[str, Sequence[TextExample]]) -> dict[str, Any]:
    """Recall and probability of sets of answers, before and after, with intervals of the differences.

    Args:
        policy: with the adapter.
        sets: items by the name of their set, such as "forget" and "retain"; empty ones are left out.
    """
    found: dict[str, Any] = {}
    for name, items in sets.items():
        if not items:
            continue
        before, after = (memory(policy, items, adapters=adapters) for adapters in (False, True))
        for what in ("recall", "probability"):
            a, b = getattr(before, what)[:, None], getattr(after, what)[:, None]
            gain = statistics.mean_gain(a, b)
            found[f"{name}_{what}"] = {
                "base": float(a.mean()),
                "aligned": float(b.mean()),
                "change": gain.mean,
                "change_ci95": [gain.ci_low, gain.ci_high],
                "items": len(items),
            }
    return found
