"""`diffalign annotate`: pairs labelled by a reward or by a vision-language model, in the form that training reads.

A reward scores every picture once; a judge is asked about every pair in both orders, and what the two orders do not agree
on is a tie. Every answer goes into a journal, `answers.jsonl`, as it comes: a command that was stopped asks for the rest
when it is started again, and a changed margin asks nothing. The folder that comes out holds:

    pairs.jsonl      prompt, image_0, image_1, label_0 (1, 0, or 0.5 for a tie), rewards, and who said it: data.format: jsonl
    images/          the pictures, so that the folder can be moved
    report.html      agreement, consistency, bias, and a histogram; report.json has the numbers and every row left out
    answers.jsonl    what has been answered

`rewards` of a judge's pair are its log-odds and 0, so that data.label: soft trains on its probability.

Shapes: B pictures or pairs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign import _annotate_report, rewards, score, vlm
from diffalign.annotate_source import Group, Item, Store, read
from diffalign.data.readers import BadRow
from diffalign.data.report import DataReport
from diffalign.errors import ConfigError, DataError, UserError
from diffalign.files import atomic_write_text, require_writable
from diffalign.progress import Progress
from diffalign.rewards import Reward

log = logging.getLogger(__name__)

PAIRS = ("best_worst", "all", "ring")
SUREST = 1e-4  # probabilities nearer to 0 and 1 than this have no larger log-odds


@dataclass(frozen=True)
class Settings:
    """What the command is told.

    Attributes:
        source: where pictures and prompts are, as `diffalign.score` takes them; its rewards label.
        out: folder to write.
        judge: a file of questions of mode pair or verdict; None where rewards label.
        pairs: of more than two pictures of a prompt: "best_worst" (rewards alone), "all", or "ring", each with the next;
            None takes best_worst for rewards and all for a judge.
        margin: differences of at most this are ties; of a judge, of its probability from 1/2.
        ties: "keep" them with label 0.5, or "drop" them.
        inconsistent: of a judge whose orders disagree: a "tie", or "drop".
    """

    source: score.Settings
    out: Path
    judge: Path | None = None
    pairs: str | None = None
    margin: float = 0.0
    ties: Literal["keep", "drop"] = "keep"
    inconsistent: Literal["tie", "drop"] = "tie"


@dataclass(frozen=True)
class Pair:
    """Two pictures of a group, by their place in it, and what was said of them.

    Attributes:
        label: 1 the first is better, 0 the second, 1/2 a tie.
        rewards: of the first and of the second picture; log-odds and 0 of a judge.
        difference: what `label` was read from: of the first reward, or probability minus 1/2.
        orders: of a judge: probability that the first is better, as told when it stands first, and when second.
        inconsistent: the orders do not agree on a winner.
    """

    group: Group
    a: int
    b: int
    label: float
    rewards: tuple[tuple[float, ...], tuple[float, ...]]
    difference: float
    orders: tuple[float, float] | None = None
    inconsistent: bool = False


@dataclass
class Annotated:
    """What came out."""

    pairs: list[Pair]
    report: DataReport
    facts: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        """A few lines for people."""
        facts = self.facts
        won = f"first better {facts['first']:,}, second better {facts['second']:,}, ties {facts['ties']:,}"
        lines = [f"{facts['pairs']:,} pairs: {won}"]
        asked = f"{facts['asked']:,} answers asked for, {facts['known']:,} known before"
        if facts["asked"] and facts["seconds"] > 0:
            asked += f"; {facts['asked'] / facts['seconds']:.1f} a second"
        lines.append(asked)
        for key, text in _annotate_report.SHARES.items():
            if facts.get(key) is not None:
                lines.append(f"{text}: {facts[key]['share']:.3f} of {facts[key]['of']:,}")
        for name, share in facts.get("between", {}).items():
            if share is not None:
                lines.append(f"agreement with {name}: {share['share']:.3f} of {share['of']:,}")
        if facts.get("bias") is not None:
            lines.append(f"bias of the place: {facts['bias']:.3f}")
        return "\n".join([*lines, self.report.summary()])


def check(settings: Settings) -> None:
    """Refuse what cannot work before anything is loaded.

    Raises:
        UserError: what was got, what is possible.
    """
    named = settings.source.rewards
    if bool(named) == (settings.judge is not None):
        raise ConfigError("annotate: give --reward NAME (several times for several), or --judge FILE")
    for name in named:
        rewards.check_images(name)
        rewards.refuse_groups(name, rewards.groups(name) or rewards.of_sets(name), "annotate")
    if len(set(named)) < len(named):
        raise ConfigError(f"annotate: a reward is named twice: {', '.join(named)}")
    if settings.judge is not None:
        questions = vlm.read_questions(settings.judge)
        if questions.mode not in vlm.PAIR_MODES:
            raise ConfigError(
                f"annotate: {settings.judge} asks about one picture (mode {questions.mode}); mode: "
                f"{' or '.join(vlm.PAIR_MODES)} expected, or name it as --reward vlm_judge:{settings.judge}"
            )
    if settings.pairs is not None and settings.pairs not in PAIRS:
        raise ConfigError(f"annotate: --pairs is {settings.pairs!r}; {', '.join(PAIRS)} expected")
    if settings.judge is not None and settings.pairs == "best_worst":
        raise ConfigError("annotate: --pairs best_worst needs scores of pictures; a judge compares pairs: all or ring")
    if not 0 <= settings.margin < math.inf or (settings.judge is not None and settings.margin >= 0.5):
        most = "below 0.5" if settings.judge is not None else "and finite"
        raise ConfigError(f"annotate: --margin is {settings.margin}; a number from 0 {most} expected")
    if settings.source.batch_size < 1:
        raise ConfigError(f"annotate: --batch-size is {settings.source.batch_size}; at least 1 expected")
    if not settings.source.source.exists():
        raise DataError(f"annotate: {settings.source.source} does not exist; a folder or a file of rows expected")


# ---------------------------------------------------------------- what has been answered


class Journal:
    """Answers by key, in a file that grows by a line each; a line that was cut when the writer died is taken off.

    Attributes:
        known, asked: answers that were there, and that were added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._answers: dict[str, Any] = {}
        if path.exists():
            whole = []
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    row = json.loads(line)
                    self._answers[row["key"]] = row["value"]
                    whole.append(line)
                except (ValueError, KeyError, TypeError):
                    log.warning("%s: a line that cannot be read is left out: %s", path, line[:80])
            atomic_write_text(path, "".join(f"{line}\n" for line in whole))
        self._file = path.open("a", encoding="utf-8")
        self.known, self.asked = 0, 0

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> float:
        value = self._answers[key]
        return math.nan if value is None else float(value)

    def write(self, key: str, value: float, **told: Any) -> None:
        """Keep an answer, NaN as null; `told` is for people."""
        self._answers[key] = None if math.isnan(value) else value
        self._file.write(json.dumps({"key": key, "value": self._answers[key], **told}, ensure_ascii=False) + "\n")
        self._file.flush()
        self.asked += 1


def key_of(*facts: Any) -> str:
    """The key of an answer: a hash of all that it depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Pictures:
    """Decodes pictures; says of each that cannot be decoded why, once."""

    def __init__(self) -> None:
        self.bad: dict[str, BadRow] = {}

    def decode(self, item: Item) -> Tensor | None:
        """Float RGB (3, H, W) in [0, 1], or None."""
        if item.digest in self.bad:
            return None
        try:
            return score.decode(score.Picture(0, item.name, item.path, "", {})).float() / 255
        except BadRow as bad:
            self.bad[item.digest] = bad
            return None


# ---------------------------------------------------------------- rewards


def annotate(settings: Settings) -> Annotated:
    """Label everything that can be read, and write the folder.

    Raises:
        UserError: nothing can be compared, or a reward or judge fails; what was answered is kept.
    """
    require_writable(settings.out)
    report, started = DataReport(), time.monotonic()
    store = Store(settings.out)
    groups = read(settings.source, report, store)
    pictures = Pictures()
    with Journal(settings.out / "answers.jsonl") as journal:
        by_judge = settings.judge is not None
        pairs = list((_by_judge if by_judge else _by_rewards)(settings, groups, journal, pictures, report))
    seconds = time.monotonic() - started
    lost = {i.row: pictures.bad[i.digest] for group in groups for i in group.items if i.digest in pictures.bad}
    for row, bad in lost.items():
        report.skip(str(row), bad.reason, bad.detail, shard=settings.source.source.name, row=row)
    kept = [pair for pair in pairs if _keep(settings, pair, report)]
    if not kept:
        raise DataError(
            f"annotate: no pair of {settings.source.source} is left. {report.summary()}; {report.example()}"
        )
    result = Annotated(kept, report, _facts(settings, pairs, kept, journal, seconds))
    _write(settings, result, store)
    return result


def _by_rewards(
    settings: Settings, groups: Sequence[Group], journal: Journal, pictures: Pictures, report: DataReport
) -> Iterator[Pair]:
    """Score every picture that is not in the journal, then make pairs."""
    names = settings.source.rewards
    models = {name: rewards.load(name, settings.source.device) for name in names}
    for name, model in models.items():
        rewards.refuse_groups(name, rewards.compares(model), "annotate")
    identities = {name: rewards.identity(name, model) for name, model in models.items()}

    def key(name: str, group: Group, item: Item) -> str:
        return key_of(identities[name], group.prompt, group.metadata, item.digest)

    wanted = {tuple(key(name, g, item) for name in names): (g, item) for g in groups for item in g.items}
    missing = {keys: place for keys, place in wanted.items() if any(k not in journal for k in keys)}
    journal.known = sum(k in journal for keys in wanted for k in keys)
    with Progress("scoring", len(wanted), "picture", start=len(wanted) - len(missing)) as bar:
        for batch in _chunks(list(missing.values()), settings.source.batch_size):
            for same in _by_size(batch, pictures):
                images = torch.stack([image for _, _, image in same])
                for name in names:
                    ask = [i for i, (g, item, _) in enumerate(same) if key(name, g, item) not in journal]
                    values = _score(settings, models[name], images[ask], [same[i][0] for i in ask])
                    for i, value in zip(ask, values, strict=True):
                        group, item, _ = same[i]
                        journal.write(key(name, group, item), value, reward=name, image=item.name, prompt=group.prompt)
            bar.advance(len(batch))
    for group in groups:
        found = {}
        for i, item in enumerate(group.items):
            if item.digest not in pictures.bad:
                found[i] = tuple(journal[key(name, group, item)] for name in names)
        known = {i: values for i, values in found.items() if not any(map(math.isnan, values))}
        if len(known) < len(found):
            report.note("no_score", f"a reward has no opinion on a picture of row {group.row}", str(group.row))
        for a, b in choose(known, settings.pairs or "best_worst"):
            difference = known[a][0] - known[b][0]
            yield Pair(group, a, b, label_of(difference, settings.margin), (known[a], known[b]), difference)


@torch.no_grad()
def _score(settings: Settings, model: Reward, images: Tensor, groups: Sequence[Group]) -> list[float]:
    prompts = [group.prompt for group in groups]
    metadata = [group.metadata for group in groups] if settings.source.metadata else None
    options: dict[str, Any] = {"batch_size": settings.source.batch_size, "device": settings.source.device}
    return rewards.score(model, images, prompts, metadata, missing=True, **options).tolist() if prompts else []


def _by_size(batch: Sequence[tuple[Group, Item]], pictures: Pictures) -> list[list[tuple[Group, Item, Tensor]]]:
    """The pictures of a batch that can be decoded, those of one size together."""
    sizes: dict[torch.Size, list[tuple[Group, Item, Tensor]]] = {}
    for group, item in batch:
        if (image := pictures.decode(item)) is not None:
            sizes.setdefault(image.shape, []).append((group, item, image))
    return list(sizes.values())


def _chunks(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def choose(scores: dict[int, tuple[float, ...]], pairs: str) -> list[tuple[int, int]]:
    """Which pictures of a group are compared, each pair in the order of the source.

    Args:
        scores: of each picture that has them, by its place in the group; the first decides.
        pairs: see `Settings`.
    """
    places = sorted(scores)
    if len(places) < 2:
        return []
    if pairs == "all":
        return list(itertools.combinations(places, 2))
    if pairs == "ring":
        ring = [(places[i], places[(i + 1) % len(places)]) for i in range(len(places) if len(places) > 2 else 1)]
        return [(min(pair), max(pair)) for pair in ring]
    best = max(places, key=lambda i: (scores[i][0], -i))
    worst = min((i for i in places if i != best), key=lambda i: (scores[i][0], i))
    return [(min(best, worst), max(best, worst))]


def label_of(difference: float, margin: float) -> float:
    """1 where the first is better by more than the margin, 0 where the second is, 1/2 between."""
    return 0.5 if abs(difference) <= margin else float(difference > 0)


# ---------------------------------------------------------------- a judge


@dataclass(frozen=True)
class _Question:
    group: Group
    first: Item
    second: Item
    key: str


def _by_judge(
    settings: Settings, groups: Sequence[Group], journal: Journal, pictures: Pictures, report: DataReport
) -> Iterator[Pair]:
    """Ask about every pair in both orders what is not in the journal."""
    assert settings.judge is not None, "checked by check"
    judge = vlm.Judge(vlm.read_questions(settings.judge), settings.source.device)
    identity = judge.identity()

    def question(group: Group, a: int, b: int) -> _Question:
        first, second = group.items[a], group.items[b]
        return _Question(group, first, second, key_of(identity, group.prompt, first.digest, second.digest))

    chosen = [
        (group, a, b)
        for group in groups
        for a, b in choose(dict.fromkeys(range(len(group.items)), ()), settings.pairs or "all")
    ]
    questions = {q.key: q for group, a, b in chosen for q in (question(group, a, b), question(group, b, a))}
    missing = [q for key, q in questions.items() if key not in journal]
    journal.known = len(questions) - len(missing)

    def ask(batch: Sequence[_Question]) -> list[tuple[_Question, float]]:
        shown = [(q, pictures.decode(q.first), pictures.decode(q.second)) for q in batch]
        fine = [(q, a, b) for q, a, b in shown if a is not None and b is not None]
        if not fine:
            return []
        answers = judge.ask([(a, b) for _, a, b in fine], [q.group.prompt for q, _, _ in fine])
        return [(q, answer.value) for (q, _, _), answer in zip(fine, answers, strict=True)]

    def record(found: Iterable[tuple[_Question, float]]) -> None:
        for q, value in found:
            journal.write(q.key, value, judge=judge.model, images=[q.first.name, q.second.name], prompt=q.group.prompt)

    with Progress("judging", len(questions), "question", start=journal.known) as bar:
        if judge.questions.server is not None:
            _ask_at_once(ask, record, missing, judge.questions.workers, bar.advance)
        else:
            for batch in _chunks(missing, judge.questions.batch):
                record(ask(batch))
                bar.advance(len(batch))
    for group, a, b in chosen:
        there, back = question(group, a, b).key, question(group, b, a).key
        if there not in journal or back not in journal:  # a picture that cannot be decoded
            continue
        ab, ba = journal[there], 1 - journal[back]
        if math.isnan(ab) or math.isnan(ba):
            report.note(
                "no_answer", f"the judge's answer about a pair of row {group.row} cannot be read", str(group.row)
            )
            continue
        found = vlm.combine_orders(torch.tensor([ab], dtype=torch.float64), torch.tensor([ba], dtype=torch.float64))
        p, tie = float(found.p), bool(found.tie)
        label = 0.5 if tie else label_of(p - 0.5, settings.margin)
        sure = min(max(p, SUREST), 1 - SUREST)
        yield Pair(group, a, b, label, ((math.log(sure / (1 - sure)),), (0.0,)), p - 0.5, (ab, ba), tie)


def _ask_at_once(
    ask: Callable[[Sequence[_Question]], list[tuple[_Question, float]]],
    record: Callable[[Iterable[tuple[_Question, float]]], None],
    questions: Sequence[_Question],
    workers: int,
    advance: Callable[[int], None],
) -> None:
    """Ask a server one by one, `workers` at a time; every answer is recorded as it comes, also when another one fails."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="annotate")
    pending: set[Future[list[tuple[_Question, float]]]] = set()
    try:
        for question in questions:
            if len(pending) >= 2 * workers:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    record(future.result())
                advance(len(done))
            pending.add(pool.submit(ask, [question]))
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                record(future.result())
            advance(len(done))
    finally:
        pool.shutdown(cancel_futures=True)
        for future in pending:  # answered while something else failed
            if future.done() and not future.cancelled() and future.exception() is None:
                record(future.result())


# ---------------------------------------------------------------- writing


def _keep(settings: Settings, pair: Pair, report: DataReport) -> bool:
    where = f"{pair.group.items[pair.a].name} and {pair.group.items[pair.b].name}"
    if pair.inconsistent:
        assert pair.orders is not None, "only a judge is inconsistent"
        ab, ba = pair.orders
        told = f"{where}: the first is better with {ab:.3f} when it stands first, {ba:.3f} when second"
        report.note(f"inconsistent_{'tie' if settings.inconsistent == 'tie' else 'dropped'}", told, str(pair.group.row))
        if settings.inconsistent == "drop":
            return False
    if pair.label == 0.5 and settings.ties == "drop":
        report.note("tie_dropped", f"{where}: {pair.difference:+.4g}", str(pair.group.row))
        return False
    return True


def _facts(
    settings: Settings, pairs: Sequence[Pair], kept: Sequence[Pair], journal: Journal, seconds: float
) -> dict[str, Any]:
    """The numbers of the report."""
    facts: dict[str, Any] = {
        "by": [str(settings.judge)] if settings.judge is not None else list(settings.source.rewards),
        "margin": settings.margin,
        "pairs": len(kept),
        "first": sum(pair.label == 1 for pair in kept),
        "second": sum(pair.label == 0 for pair in kept),
        "ties": sum(pair.label == 0.5 for pair in kept),
        "asked": journal.asked,
        "known": journal.known,
        "seconds": round(seconds, 3),
        "given": _agreement([(pair.label, pair.group.given) for pair in pairs]),
    }
    if settings.judge is not None and pairs:
        orders = [pair.orders for pair in pairs if pair.orders is not None]
        facts["bias"] = math.fsum(abs(ab - ba) for ab, ba in orders) / len(orders)
        agreed = sum(not pair.inconsistent for pair in pairs)
        facts["consistency"] = {"share": agreed / len(pairs), "of": len(pairs)}
    for i, name in enumerate(settings.source.rewards[1:], 1):
        sides = [(label_of(p.difference, 0), label_of(p.rewards[0][i] - p.rewards[1][i], 0)) for p in pairs]
        facts.setdefault("between", {})[name] = _agreement(sides)
    return facts


def _agreement(sides: Sequence[tuple[float, float | None]]) -> dict[str, Any] | None:
    """Among the pairs on which both name a winner, the share on which it is the same; None if there is none."""
    both = [(a > 0.5) == (b > 0.5) for a, b in sides if b is not None and a != 0.5 and b != 0.5]
    return {"share": sum(both) / len(both), "of": len(both)} if both else None


def _write(settings: Settings, result: Annotated, store: Store) -> None:
    try:
        lines = [json.dumps(_line(settings, pair, store), ensure_ascii=False) for pair in result.pairs]
        atomic_write_text(settings.out / "pairs.jsonl", "".join(f"{line}\n" for line in lines))
        tree = {"annotation": result.facts, "data": result.report.to_dict()}
        atomic_write_text(settings.out / "report.json", json.dumps(tree, indent=1, ensure_ascii=False))
        differences = [pair.difference for pair in result.pairs]
        page = _annotate_report.render(result.facts, differences, result.summary(), judged=settings.judge is not None)
        atomic_write_text(settings.out / "report.html", page)
    except OSError as error:
        raise UserError(
            f"annotate: {settings.out} cannot be written ({error.strerror}); what was answered is in answers.jsonl"
        ) from error


def _line(settings: Settings, pair: Pair, store: Store) -> dict[str, Any]:
    label: float | int = pair.label if pair.label == 0.5 else int(pair.label)
    line: dict[str, Any] = {
        "prompt": pair.group.prompt,
        "image_0": store.keep(pair.group.items[pair.a]),
        "image_1": store.keep(pair.group.items[pair.b]),
        "label_0": label,
        "rewards": [[round(value, 6) for value in side] for side in pair.rewards],
        "by": str(settings.judge) if settings.judge is not None else list(settings.source.rewards),
        "row": pair.group.row,
    }
    if pair.orders is not None:
        line |= {"orders": [round(value, 6) for value in pair.orders], "consistent": not pair.inconsistent}
    return line
