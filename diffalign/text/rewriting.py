"""Recipes that rewrite rows: conditions in the prompt, control tokens, pairs of single steps, and subsets."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from diffalign.data.readers import BadRow
from diffalign.errors import ConfigError
from diffalign.text.pairing import Row, key_of, numbers, rng_of, take
from diffalign.text.records import Text, parse_row

GOAL = "Give a response that would be scored {goal}."
Place: TypeAlias = Literal["system", "user"]


def plain(value: Text) -> Any:
    """A text or messages as JSON has them."""
    return value if isinstance(value, str) else [dict(message) for message in value]


def instructed(prompt: Any, instruction: str, where: Place = "system") -> Any:
    """A prompt with an instruction before it.

    Args:
        prompt: text (the instruction becomes its first line) or messages.
        instruction: the text.
        where: in messages: "system" adds to the system message or makes one; "user" begins the first user message, for
            templates without a system role.
    """
    if isinstance(prompt, str):
        return f"{instruction}\n{prompt}"
    messages = [dict(message) for message in prompt]
    if where == "system" and messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": instruction}, *messages]
    role = ("system", "developer") if where == "system" else ("user",)
    first = next(message for message in messages if message["role"] in role)
    parts = [first["content"], instruction] if where == "system" else [instruction, first["content"]]
    first["content"] = "\n".join(parts)
    return messages


def reward_augmented(row: Row, *, template: str = GOAL, where: Place = "system") -> list[Row]:
    """A pair twice, with the wanted score in the prompt (2410.08067): for the goal score_chosen the pair as it is, for the
    goal score_rejected the *swapped* pair.

    The published code leaves the second copy unswapped where there is no system role; here both are swapped. At inference,
    ask for the highest score. The wording is ours; the published one was not available.

    Args:
        row: a pair with scores (any names of `records.SCORES`).
        template: with {goal}.
        where: see `instructed`.
    """
    if "{goal}" not in template:
        raise ConfigError(f"reward_augmented: template {template!r} has no {{goal}}")
    fields = parse_row(row)
    if fields["kind"] != "pair" or fields.get("gains") is None:
        raise BadRow("missing_column", "a pair with score_chosen and score_rejected expected")
    (w, l), (score_w, score_l) = map(plain, fields["responses"]), fields["gains"]
    if score_w <= score_l:
        raise BadRow("bad_score", f"chosen scores {score_w:g} and rejected {score_l:g}; the chosen one must score more")
    prompt = plain(fields["prompt"])

    def copy(goal: float, chosen: Any, rejected: Any) -> Row:
        asked = instructed(prompt, template.replace("{goal}", f"{goal:g}"), where)
        return {"prompt": asked, "chosen": chosen, "rejected": rejected, "goal": goal}

    return [copy(score_w, w, l), copy(score_l, l, w)]


def directional(
    row: Row,
    *,
    names: tuple[str, ...] = ("helpfulness", "verbosity"),
    angle_min: float = -45.0,
    angle_max: float = 45.0,
    mode: Literal["best", "pairs", "list"] = "best",
    where: Place = "system",
    seed: int = 0,
) -> list[Row]:
    """Candidates ranked along a direction v of two rewards that the prompt states (DPA, 2402.18571).

    v = (cos a, sin a) with the angle a drawn per row; the prompt has 100 v in whole numbers, and these rank the candidates
    by v . r. Within 45 degrees the first weight is 71 to 100, as suggested. The wording is ours.

    Args:
        row: `prompt`, `completions`, and `rewards`: two numbers per candidate, on one scale.
        names: of the rewards, for the prompt.
        angle_min, angle_max: degrees.
        mode: "best" keeps the best to imitate, "pairs" the best against the worst, "list" all with their scores.
        where: see `instructed`.
        seed: of the angles.
    """
    completions = take(row, "completions")
    values = take(row, "rewards")
    if len(names) != 2 or not isinstance(values, (list, tuple)) or len(values) != len(completions):
        raise BadRow("bad_list", "rewards has not two numbers for each completion")
    rewards = [numbers(value, 2, "rewards") for value in values]
    angle = math.radians(rng_of("directional", seed, row).uniform(angle_min, angle_max))
    v = round(100 * math.cos(angle)), round(100 * math.sin(angle))
    scores = [(v[0] * a + v[1] * b) / 100 for a, b in rewards]
    goal = f"Maximise {v[0]} x {names[0]} {'-' if v[1] < 0 else '+'} {abs(v[1])} x {names[1]}."
    made = {"prompt": instructed(take(row, "prompt"), goal, where), "direction": list(v)}
    if mode == "list":
        return [made | {"completions": list(completions), "scores": scores}]
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if mode == "best":
        return [made | {"completion": completions[best]}]
    if scores[best] == scores[worst]:
        raise BadRow("no_pair", "all completions score the same in this direction")
    sides = {"chosen": completions[best], "rejected": completions[worst]}
    return [made | sides | {"score_chosen": scores[best], "score_rejected": scores[worst]}]


def control_tokens(
    row: Row,
    *,
    good: str = "<|aligned|>",
    bad: str = "<|misaligned|>",
    threshold: float = 0.5,
    lower_is_better: bool = False,
    omit: float = 0.01,
    seed: int = 0,
) -> list[Row]:
    """Rows to imitate with a control token that says how good they are (conditional training, 2302.08582).

    With `sentences` and `scores`, every sentence of the completion has its token before it. Else the token ends the
    prompt: by the score (`score`, or the `label`) of an unpaired row, and for a pair `good` before the chosen and `bad`
    before the rejected side. The tokens must be added to the tokenizer; when sampling, ask with `good` and forbid both.

    Args:
        row: a pair, an unpaired row, or one with sentences.
        good, bad: the tokens.
        threshold: a score that reaches it is good (with `lower_is_better`: one that does not exceed it).
        lower_is_better: scores measure harm, as in the paper.
        omit: probability that a token is left out, so that the model also goes on without (paper: 0.01, or 0.1 for PEP8).
        seed: of that draw.
    """
    rng = rng_of("control tokens", seed, row)

    def token(is_good: bool) -> str:
        return "" if rng.random() < omit else (good if is_good else bad)

    def passes(score: float) -> bool:
        return score <= threshold if lower_is_better else score >= threshold

    if row.get("sentences") is not None:
        sentences = row["sentences"]
        scores = numbers(take(row, "scores"), len(sentences), "scores")
        content = "".join(token(passes(score)) + sentence for score, sentence in zip(scores, sentences, strict=True))
        return [{"prompt": row["prompt"], "completion": content} if row.get("prompt") else {"text": content}]
    fields = parse_row(row)
    if fields["kind"] == "pair":
        verdicts = [True, False]
    elif fields["kind"] == "item":
        score = row.get("score")
        verdicts = [fields["label"] >= 0.5 if score is None else passes(numbers([score], 1, "score")[0])]
    else:
        raise BadRow("wrong_kind", f"a row of kind {fields['kind']!r}; a pair or an unpaired row expected")
    return [
        {"prompt": _with_ending(plain(fields["prompt"]), token(verdict)), "completion": plain(response)}
        for verdict, response in zip(verdicts, fields["responses"], strict=True)
    ]


def _with_ending(prompt: Any, ending: str) -> Any:
    if isinstance(prompt, str):
        return prompt + ending
    return [*prompt[:-1], prompt[-1] | {"content": prompt[-1]["content"] + ending}]


# --- steps -----------------------------------------------------------------------------------------------------------


def step_pairs(row: Row, *, whole: bool = False, min_gap: float = 0.0) -> list[Row]:
    """Two solutions as a pair at the first step in which they differ (MCTS-DPO, 2405.00451).

    Args:
        row: `prompt` (text), `chosen_steps` and `rejected_steps` (texts that join as they are); `chosen_value` and
            `rejected_value`, or `confidence`: p is then 1 - min(1 - confidence, 1/2).
        whole: the rest of the solutions instead of the one step.
        min_gap: of the values, where they are there.
    """
    prompt = _text(take(row, "prompt"))
    chosen, rejected = _steps(take(row, "chosen_steps")), _steps(take(row, "rejected_steps"))
    common = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), None)
    if common is None:
        raise BadRow("no_divergence", "one solution begins with all of the other")
    made: Row = {"prompt": prompt + "".join(chosen[:common]), "step": common}
    end = None if whole else common + 1
    made |= {"chosen": "".join(chosen[common:end]), "rejected": "".join(rejected[common:end])}
    if row.get("chosen_value") is not None and row.get("rejected_value") is not None:
        values = numbers([row["chosen_value"], row["rejected_value"]], 2, "values")
        if values[0] <= values[1] or values[0] - values[1] < min_gap:
            raise BadRow("no_pair", f"values {values[0]:g} and {values[1]:g} differ by too little")
        made |= {"score_chosen": values[0], "score_rejected": values[1]}
    if row.get("confidence") is not None:
        (confidence,) = numbers([row["confidence"]], 1, "confidence")
        made["p"] = 1 - min(1 - confidence, 0.5)
    return [made]


def step_negatives(row: Row, *, min_drop: float = 0.0) -> list[Row]:
    """A failing solution as a pair at its worst step (per-step negatives, 2406.14532, from memory).

    The advantage of step t is V[t + 1] - V[t]; the pair is (prompt and steps before it, a good continuation, this step).

    Args:
        row: `prompt` (text), `steps`, `values`: success rate of rollouts before the first step and after each; and
            `alternatives`: for each step a good continuation in its place, or null.
        min_drop: the step must lose more than this.
    """
    steps = _steps(take(row, "steps"))
    values = numbers(take(row, "values"), len(steps) + 1, "values")
    alternatives = take(row, "alternatives")
    advantages = [after - before for before, after in itertools.pairwise(values)]
    worst = advantages.index(min(advantages))
    if advantages[worst] >= -min_drop:
        raise BadRow("no_pair", f"no step loses more than {min_drop:g}")
    if len(alternatives) != len(steps) or not alternatives[worst] or alternatives[worst] == steps[worst]:
        raise BadRow("no_alternative", f"step {worst} is the worst, and there is no other continuation for it")
    prefix = _text(take(row, "prompt")) + "".join(steps[:worst])
    return [{"prompt": prefix, "chosen": alternatives[worst], "rejected": steps[worst], "step": worst}]


def _steps(value: Any) -> list[str]:
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(step, str) for step in value):
        raise BadRow("bad_list", "steps are not a list of texts")
    return list(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise BadRow("not_text", "steps go on from a prompt that is a text; render conversations first")
    return value


# --- subsets ---------------------------------------------------------------------------------------------------------


def coreset(rows: Sequence[Row], *, fraction: float = 0.05, seed: int = 0) -> list[list[Row] | BadRow]:
    """A random share of the rows, at least one: for unlearning 5 % of the forget set do nearly as well as all of it
    (2504.10185, from memory), which is also a caution about benchmarks. Which rows depends on their content alone.
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"coreset: fraction is {fraction:g}; expected 0 < fraction <= 1")
    digests = [hashlib.sha256(f"{seed}/{key_of(row)}/{row}".encode("utf-8", "replace")).digest() for row in rows]
    order = sorted(range(len(rows)), key=digests.__getitem__)
    kept = set(order[: math.ceil(fraction * len(rows) - 1e-9)])
    return [[rows[i]] if i in kept else BadRow("left_out", "not in the coreset") for i in range(len(rows))]
