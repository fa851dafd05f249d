"""GenEval's rules: whether a picture holds the things, counts, colours and places that its prompt names.

Paper: Ghosh et al. 2023, "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment", arXiv 2310.11513;
code: djghosh13/geneval: evaluation/evaluate_images.py (commit af4902f), and for graded scores yifan123/reward-server:
reward_server/gen_eval.py (commit 7131478), which Flow-GRPO trains with. Nothing here looks at a picture: detectors and the
naming of colours come from outside.

What a prompt promises is what GenEval's metadata say: `include`, clauses {class, count, color?, position?: [relation, index
of an earlier clause]}, and `exclude`, clauses {class, count}. All of the first have to hold and none of the second.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5}
CONFIDENCE = 0.3  # that a detection must exceed
COUNTING_CONFIDENCE = 0.9  # the same where things are counted
MOST = 16  # detections kept per class
OVERLAP = 0.1  # share of both sizes by which centres may be apart without being beside each other
CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant"),
    *("bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard"),
    *("sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle"),
    *("wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli"),
    *("carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet"),
    *("tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster"),
    *("sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
COCO_NAMES = {
    "computer mouse": "mouse",
    "tv remote": "remote",
    "computer keyboard": "keyboard",
}  # GenEval's names, COCO's


@dataclass(frozen=True)
class Detection:
    """One thing that a detector found.

    Attributes:
        box: left, top, right, bottom, in pixels; y grows downwards.
        score: confidence in [0, 1].
        mask: True where the thing is, (H, W); None where the detector knows only boxes.
    """

    box: tuple[float, float, float, float]
    score: float
    mask: Tensor | None = None


Found = Mapping[str, Sequence[Detection]]
NameColours = Callable[[str, Sequence[Detection]], Sequence[str]]


@dataclass(frozen=True)
class Verdict:
    """What the rules say of a picture.

    Attributes:
        correct: as in the official evaluation: at least as many things as are named.
        strict: as in Flow-GRPO: exactly as many; `exclude` is not looked at, since counts say it.
        graded: Flow-GRPO's training score, mean of partial credits; below 0 where there are more than twice as many.
    """

    correct: bool
    strict: bool
    graded: float


def keep(found: Found, tag: str) -> dict[str, list[Detection]]:
    """The detections that count: confident enough for the tag, the `MOST` best of each class, best first."""
    least = COUNTING_CONFIDENCE if tag == "counting" else CONFIDENCE
    kept = {name: sorted((d for d in all_ if d.score > least), key=lambda d: -d.score) for name, all_ in found.items()}
    return {name: best[:MOST] for name, best in kept.items() if best}


def relations(a: Detection, b: Detection) -> set[str]:
    """Where `a` is as seen from `b`: any of `RELATIONS`, none where they overlap too much to tell."""
    ax, ay, aw, ah = _place(a)
    bx, by, bw, bh = _place(b)
    offset = (ax - bx, ay - by)
    rest = tuple(
        math.copysign(max(abs(d) - OVERLAP * size, 0.0), d) for d, size in zip(offset, (aw + bw, ah + bh), strict=True)
    )
    if max(map(abs, rest)) < 1e-3:
        return set()
    dx, dy = (value / math.hypot(*offset) for value in rest)
    named = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in named.items() if holds}


def _place(found: Detection) -> tuple[float, float, float, float]:
    """Centre x and y, width, height."""
    x0, y0, x1, y1 = found.box
    return (x0 + x1) / 2, (y0 + y1) / 2, abs(x1 - x0), abs(y1 - y0)


def judge(found: Found, metadata: Mapping[str, Any], name_colours: NameColours) -> Verdict:
    """Apply the rules.

    Args:
        found: what `keep` left, by class.
        metadata: of the prompt.
        name_colours: one of `COLOURS` for each of some detections of a class.
    """
    correct = _holds(found, metadata, name_colours)
    strict, graded = _graded(found, metadata, name_colours)
    return Verdict(correct, strict, graded)


def _holds(found: Found, metadata: Mapping[str, Any], name_colours: NameColours) -> bool:
    groups: list[Sequence[Detection] | None] = []
    for clause in metadata.get("include", ()):
        name, count = clause["class"], clause["count"]
        things = list(found.get(name, ()))[:count]
        holds = len(things) == count
        if holds and "color" in clause:
            holds = list(name_colours(name, things)).count(clause["color"]) >= count
        if holds and "position" in clause:
            relation, target = clause["position"]
            holds = _all_placed(things, groups[target], relation)
        groups.append(things if holds else None)
    excluded = any(len(found.get(c["class"], ())) >= c["count"] for c in metadata.get("exclude", ()))
    return all(group is not None for group in groups) and not excluded


def _graded(found: Found, metadata: Mapping[str, Any], name_colours: NameColours) -> tuple[bool, float]:
    """Exact counts, and a credit for each count, colour and place.

    As in the released code a relation that does not hold has credits 0 and 1, so that it costs half of a clause; a
    relation whose things have the wrong colour has none.
    """
    credits_: list[float] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in metadata.get("include", ()):
        name, count = clause["class"], clause["count"]
        things = list(found.get(name, ()))
        credits_.append(1 - abs(count - len(things)) / count)
        holds = len(things) == count
        if not holds and ("color" in clause or "position" in clause):
            credits_.append(0.0)
        if holds and "color" in clause:
            right = list(name_colours(name, things)).count(clause["color"])
            credits_.append(1 - abs(count - right) / count)
            holds = right == count
        if holds and "position" in clause:
            relation, target = clause["position"]
            holds = _all_placed(things, groups[target], relation)
            credits_ += [] if holds else [0.0]
            credits_ += [] if groups[target] is None else [1.0]
        groups.append(things if holds else None)
    return all(group is not None for group in groups), math.fsum(credits_) / len(credits_) if credits_ else 0.0


def _all_placed(things: Sequence[Detection], targets: Sequence[Detection] | None, relation: str) -> bool:
    return targets is not None and all(relation in relations(a, b) for a in things for b in targets)


# ---------------------------------------------------------------- prompts


def parse_prompt(prompt: str) -> dict[str, Any] | None:
    """GenEval's metadata of a prompt in its words; None for any other prompt. Gives all 553 published lines back."""
    text = prompt.strip().rstrip(".")
    if not text.startswith("a photo of "):
        return None
    text = text.removeprefix("a photo of ")
    if (counted := _counted(text)) is not None:
        return counted | {"prompt": prompt}
    for relation in RELATIONS:
        sides = re.fullmatch(rf"an? (.+) {relation} an? (.+)", text)
        if sides and sides[1] in CLASSES and sides[2] in CLASSES:
            placed = {"class": sides[1], "count": 1, "position": [relation, 0]}
            return {"tag": "position", "include": [{"class": sides[2], "count": 1}, placed], "prompt": prompt}
    include = [_thing(part) for part in re.split(r" and (?=an? )", text)]
    if len(include) > 2 or None in include:
        return None
    coloured = [clause is not None and "color" in clause for clause in include]
    if any(coloured) != all(coloured):
        return None
    plain, with_colour = ("single_object", "colors") if len(include) == 1 else ("two_object", "color_attr")
    return {"tag": with_colour if all(coloured) else plain, "include": include, "prompt": prompt}


def _counted(text: str) -> dict[str, Any] | None:
    word, _, plural = text.partition(" ")
    name = next((name for name in CLASSES if plural in (f"{name}s", f"{name}es")), None)
    if word not in NUMBERS or name is None:
        return None
    count = NUMBERS[word]
    exclude = [{"class": name, "count": count + 1}]
    return {"tag": "counting", "include": [{"class": name, "count": count}], "exclude": exclude}


def _thing(text: str) -> dict[str, Any] | None:
    """A clause of "a bench" or "a blue bench"."""
    article, _, name = text.partition(" ")
    if article not in ("a", "an"):
        return None
    if name in CLASSES:
        return {"class": name, "count": 1}
    colour, _, name = name.partition(" ")
    return {"class": name, "count": 1, "color": colour} if colour in COLOURS and name in CLASSES else None
