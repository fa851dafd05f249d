"""How good a reward model is on labelled pairs: accuracy with ties, and whether its probabilities are frequencies.

Shapes: P pairs. `logit` is the first picture's score minus the second's, divided by the loss's temperature; `p` is the
label, the probability that the first is preferred, 1/2 for a tie. Numpy only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
THRESHOLDS = tuple(i / 10 for i in range(11))  # of |P(first) - P(second)|, PickScore's
BINS = 10
_TEMPERATURES = np.exp(np.linspace(math.log(0.02), math.log(50), 400))


def sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-np.clip(x, -700, 700)))


def correct(logit: Floats, p: Floats) -> Floats:
    """1 where the preferred picture has the higher score, 0 where not, 1/2 for equal scores; NaN for ties, (P,)."""
    won = np.where(logit == 0, 0.5, (logit > 0) == (p > 0.5))
    return np.where(p == 0.5, np.nan, won.astype(np.float64))


def correct_with_ties(logit: Floats, p: Floats, threshold: float) -> Floats:
    """PickScore's accuracy with ties, per pair: 1 right, 1/2 if exactly one of label and prediction is a tie, else 0.

    A tie is predicted where the two probabilities differ by less than the threshold (arXiv 2305.01569, code
    yuvalkirstain/PickScore:trainer).
    """
    said_tie = np.abs(2 * sigmoid(logit) - 1) < threshold
    is_tie = p == 0.5
    same = np.where(is_tie, said_tie, ~said_tie & ((logit > 0) == (p > 0.5)))
    return np.where(said_tie != is_tie, 0.5, same.astype(np.float64))


def best_threshold(logit: Floats, p: Floats) -> float:
    """The threshold of `THRESHOLDS` with the highest accuracy with ties; the lowest of equals."""
    means = [float(correct_with_ties(logit, p, threshold).mean()) for threshold in THRESHOLDS]
    return THRESHOLDS[int(np.argmax(means))]


def fit_temperature(logit: Floats, p: Floats) -> float:
    """The factor that logits are divided by for the highest likelihood of the labels: above 1, the model is too sure."""
    scaled = logit[None] / _TEMPERATURES[:, None]
    nll = (np.logaddexp(0, -scaled) * p + np.logaddexp(0, scaled) * (1 - p)).mean(1)
    return float(_TEMPERATURES[int(np.argmin(nll))])


@dataclass(frozen=True)
class Reliability:
    """A reliability curve over bins of the predicted probability of the likelier picture, from 1/2 to 1.

    Attributes:
        confidence: mean predicted probability in each bin that has pairs.
        accuracy: share of these pairs in which the likelier picture was preferred; a tie is half.
        count: pairs in it.
        error: expected calibration error: the mean |accuracy - confidence|, weighted by pairs.
    """

    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    count: tuple[int, ...]
    error: float


def reliability(logit: Floats, p: Floats, bins: int = BINS) -> Reliability:
    """The curve of predictions sigmoid(logit) against labels. Which picture is called the first does not matter."""
    sure = sigmoid(np.abs(logit))
    right = np.where(logit >= 0, p, 1 - p)
    place = np.minimum(((sure - 0.5) * 2 * bins).astype(int), bins - 1)
    rows = [
        (float(sure[here].mean()), float(right[here].mean()), int(here.sum()))
        for b in range(bins)
        if (here := place == b).any()
    ]
    error = sum(count * abs(accuracy - confidence) for confidence, accuracy, count in rows) / len(logit)
    confidence, accuracy, count = zip(*rows, strict=True)
    return Reliability(confidence, accuracy, count, error)


def by_prompt(values: Floats, prompts: list[str]) -> Floats:
    """Mean value of each prompt's pairs, (prompts,), without NaN: pairs of one prompt are not independent."""
    sums: dict[str, list[float]] = {}
    for value, prompt in zip(values.tolist(), prompts, strict=True):
        if not math.isnan(value):
            sums.setdefault(prompt, []).append(value)
    return np.array([sum(found) / len(found) for found in sums.values()])
