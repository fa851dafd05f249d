"""Data sets of the text world as JSONL, in the layouts that TRL users have.

Preference data are *sampled*, as real pipelines sample them: the tiny LM answers each prompt several times, and a judge
(`task.find_judge`) scores the answers. Three layouts of the same rows:

- `plain`: `prompt`, `chosen`, `rejected` are texts; the prompt ends with a line break.
- `chat`: they are lists of messages.
- `chat-implicit`: `chosen` and `rejected` are whole conversations, and there is no `prompt`.

The same settings always give the same file; one that is there already with the same settings is used again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from diffalign.errors import ConfigError, DataError, did_you_mean
from diffalign.files import atomic_write_text, require_writable
from diffalign.world.text import task
from diffalign.world.text.facts import facts
from diffalign.world.text.lm import plain_prompt

Base: TypeAlias = "tuple[Any, Any]"  # (model, tokenizer) as `lm.load` returns them
Row: TypeAlias = "dict[str, Any]"
LAYOUTS = ("plain", "chat", "chat-implicit")
TIES = ("drop", "keep")
FORMAT = 1  # change it whenever the same settings would give another file
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TextDataInfo:
    """What was written.

    Attributes:
        path: the JSONL file.
        rows: lines in it.
        ties: prompts whose answers all scored the same (0 where nothing is compared).
        mean_score: the judge's mean of all sampled answers (0 where nothing is judged).
        reused: the file was already there.
    """

    path: Path
    rows: int
    ties: int = 0
    mean_score: float = 0.0
    reused: bool = False


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn and judged.

    Attributes:
        prompts: how many different prompts.
        seed: of prompts, answers and label noise.
        judge: see `task.find_judge`.
        samples: answers per prompt.
        temperature: of the draw.
        held_out: prompts that no training data contains, for evaluation sets.
        base: model and tokenizer that answer; None loads the shipped tiny LM.
    """

    prompts: int = 512
    seed: int = 0
    judge: str = "correct"
    samples: int = 2
    temperature: float = 1.0
    held_out: bool = False
    base: Base | None = None


# ---------------------------------------------------------------- preference data


def write_pairs(
    path: Path, sampling: Sampling, *, layout: str = "plain", ties: str = "drop", flip: float = 0.0
) -> TextDataInfo:
    """Preference pairs: the best and the worst of each prompt's answers, with `score_chosen` and `score_rejected`.

    Args:
        path: the JSONL file.
        sampling: of prompts and answers.
        layout: one of `LAYOUTS`.
        ties: "drop" prompts whose answers all score the same, or "keep" their first two in the order drawn.
        flip: probability that a pair is labelled the wrong way round.

    Raises:
        ConfigError: settings that make no sense.
        DataError: the file cannot be written.
    """
    _check(sampling, layout=layout, at_least=2)
    _known("ties", ties, TIES)
    if not 0 <= flip <= 1:
        raise ConfigError(f"flip: got {flip}; a probability in [0, 1] expected")

    def make(judged: list[_Judged]) -> Iterable[Row]:
        rng = random.Random(f"text world flips/{sampling.seed}")
        for item in judged:
            best, worst = item.best, item.worst
            flipped = rng.random() < flip
            if item.tied and ties == "drop":
                continue
            if flipped:
                best, worst = worst, best
            row = _sides(item.prompt, {"chosen": item.answers[best], "rejected": item.answers[worst]}, layout)
            yield row | {"score_chosen": item.scores[best], "score_rejected": item.scores[worst]}

    settings = {"what": "pairs", "layout": layout, "ties": ties, "flip": flip}
    return _write_sampled(path, sampling, settings, make, chat=layout != "plain")


def write_unpaired(path: Path, sampling: Sampling, *, layout: str = "plain", threshold: float = 0.5) -> TextDataInfo:
    """Single answers with `label`: true if the judge's score is above `threshold`; every sampled answer is a row.

    Raises:
        ConfigError: settings that make no sense.
        DataError: the file cannot be written.
    """
    _check(sampling, layout=layout)

    def make(judged: list[_Judged]) -> Iterable[Row]:
        for item in judged:
            for answer, score in zip(item.answers, item.scores, strict=True):
                row = _sides(item.prompt, {"completion": answer}, "plain" if layout == "plain" else "chat")
                yield row | {"label": score > threshold}

    settings = {"what": "unpaired", "layout": layout, "threshold": threshold}
    return _write_sampled(path, sampling, settings, make, chat=layout != "plain")


def write_ranked(path: Path, sampling: Sampling, *, layout: str = "plain") -> TextDataInfo:
    """Lists: `prompt`, `completions` (best first) and their `scores`.

    Raises:
        ConfigError: settings that make no sense.
        DataError: the file cannot be written.
    """
    _check(sampling, layout=layout, at_least=2)

    def make(judged: list[_Judged]) -> Iterable[Row]:
        for item in judged:
            order = sorted(range(len(item.scores)), key=lambda i: -item.scores[i])
            answers = [item.answers[i] for i in order]
            yield {
                "prompt": _prompt(item.prompt, layout),
                "completions": answers if layout == "plain" else [[_assistant(answer)] for answer in answers],
                "scores": [item.scores[i] for i in order],
            }

    return _write_sampled(path, sampling, {"what": "ranked", "layout": layout}, make, chat=layout != "plain")


def write_prompts(
    path: Path, *, prompts: int = 512, seed: int = 0, layout: str = "plain", held_out: bool = False
) -> TextDataInfo:
    """Prompts for online methods: `prompt`, and as reward columns `answer` (the right result) and `kind`.

    Raises:
        ConfigError: settings that make no sense.
        DataError: the file cannot be written.
    """
    _known("layout", layout, LAYOUTS)
    rows = []
    for text in _prompts(prompts, seed, held_out):
        puzzle = task.parse_prompt(text)
        rows.append({"prompt": _prompt(text, layout), "answer": puzzle.answer, "kind": puzzle.kind})
    settings = {"what": "prompts", "prompts": prompts, "seed": seed, "layout": layout, "held_out": held_out}
    return _write(path, settings, rows, {})


def write_facts(path: Path, *, forget: bool, layout: str = "plain", held_out: bool = False) -> TextDataInfo:
    """The forget or the retain set: `prompt`, `completion` (the memorised answer), `alternate` ("i do not know.").

    Args:
        path: the JSONL file.
        forget: which set.
        layout: one of `LAYOUTS`.
        held_out: question forms that the tiny LM never saw about the entity, for evaluation sets.

    Raises:
        ConfigError: no such layout.
        DataError: the file cannot be written.
    """
    _known("layout", layout, LAYOUTS)
    shape = "plain" if layout == "plain" else "chat"
    rows = [
        _sides(question, {"completion": fact.answer, "alternate": fact.unknown}, shape)
        for fact in facts(forget=forget)
        for question in (fact.held_out if held_out else fact.seen)
    ]
    return _write(path, {"what": "facts", "forget": forget, "layout": layout, "held_out": held_out}, rows, {})


# ---------------------------------------------------------------- sampling and judging


@dataclass(frozen=True)
class _Judged:
    """A prompt with its answers and their scores, in the order drawn."""

    prompt: str
    answers: list[str]
    scores: list[float]

    @property
    def tied(self) -> bool:
        return max(self.scores) == min(self.scores)

    @property
    def best(self) -> int:
        return 0 if self.tied else self.scores.index(max(self.scores))

    @property
    def worst(self) -> int:
        return 1 if self.tied else self.scores.index(min(self.scores))


def _write_sampled(
    path: Path,
    sampling: Sampling,
    settings: Row,
    make: Callable[[list[_Judged]], Iterable[Row]],
    *,
    chat: bool,
) -> TextDataInfo:
    from diffalign.world.text import lm
    from diffalign.world.text.sampling import sample

    model, tokenizer = sampling.base or lm.load()
    kept = {k: v for k, v in vars(sampling).items() if k != "base"}
    settings = settings | kept | {"base": _weights_hash(model)}
    if (info := _existing(path, settings)) is not None:
        return info
    prompts = _prompts(sampling.prompts, sampling.seed, sampling.held_out)
    answers = sample(
        model,
        tokenizer,
        prompts,
        sampling.seed,
        samples=sampling.samples,
        temperature=sampling.temperature,
        chat=chat,
    )
    judge = task.find_judge(sampling.judge)
    judged = [_Judged(p, given, [judge(p, text) for text in given]) for p, given in zip(prompts, answers, strict=True)]
    scores = [score for item in judged for score in item.scores]
    facts_of_run = {"ties": sum(item.tied for item in judged), "mean_score": sum(scores) / len(scores)}
    return _write(path, settings, list(make(judged)), facts_of_run)


def _prompts(n: int, seed: int, held_out: bool) -> list[str]:
    try:
        return task.sample_prompts(n, seed, held_out=held_out)
    except ValueError as error:
        raise ConfigError(f"prompts: {error}") from error


def _weights_hash(model: Any) -> str:
    """16 hex digits of all weights: answers of another base are other data."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _check(sampling: Sampling, *, layout: str, at_least: int = 1) -> None:
    _known("layout", layout, LAYOUTS)
    task.find_judge(sampling.judge)
    if sampling.prompts < 1 or sampling.samples < at_least:
        raise ConfigError(
            f"prompts is {sampling.prompts} and samples is {sampling.samples}; at least 1 and {at_least} expected"
        )


def _known(what: str, got: str, known: Sequence[str]) -> None:
    if got not in known:
        raise ConfigError(f"{what} {got!r} not found{did_you_mean(got, known)} Available: {', '.join(known)}")


# ---------------------------------------------------------------- rows and files


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _prompt(text: str, layout: str) -> Any:
    return plain_prompt(text) if layout == "plain" else [{"role": "user", "content": text}]


def _sides(prompt: str, texts: dict[str, str], layout: str) -> Row:
    """The prompt and the texts that answer it, as strings or messages."""
    asked = _prompt(prompt, layout)
    if layout == "plain":
        return {"prompt": asked} | texts
    if layout == "chat":
        return {"prompt": asked} | {side: [_assistant(text)] for side, text in texts.items()}
    return {side: [*asked, _assistant(text)] for side, text in texts.items()}


def _record(path: Path) -> Path:
    """Settings and facts of a file, hidden beside it."""
    return path.with_name(f".{path.name}.made.json")


def _existing(path: Path, settings: Row) -> TextDataInfo | None:
    """The info of a file made with the same settings, None if there is none or somebody changed it since."""
    record = _record(path)
    if not path.is_file() or not record.is_file():
        return None
    stored = json.loads(record.read_text(encoding="utf-8"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if stored["settings"] != settings | {"format": FORMAT} or stored["sha256"] != digest:
        return None
    log.info("using the %d rows that are already in %s", stored["info"]["rows"], path)
    return TextDataInfo(path=path, reused=True, **stored["info"])


def _write(path: Path, settings: Row, rows: list[Row], facts_of_run: Row) -> TextDataInfo:
    if (info := _existing(path, settings)) is not None:
        return info
    require_writable(path.parent)
    if not rows:
        raise DataError(f"no rows for {path}: every prompt was a tie; raise prompts or samples, or keep ties")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    info = TextDataInfo(path=path, rows=len(rows), **facts_of_run)
    kept = {k: v for k, v in asdict(info).items() if k not in ("path", "reused")}
    record = {
        "settings": settings | {"format": FORMAT},
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "info": kept,
    }
    try:
        atomic_write_text(path, text)
        atomic_write_text(_record(path), json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}; choose another output_dir") from error
    log.info("wrote %d rows (%d ties) to %s", info.rows, info.ties, path)
    return info
