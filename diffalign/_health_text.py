"""Alarms of text runs: preference training, answers that the policy samples itself, and unlearning.

Thresholds are judgements, not published numbers: far outside of what healthy runs of the embedded text world show, and of
what TRL users report for 7B models. Each stands beside its check; all are smoothed over the monitor's window.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Literal

Level = Literal["alarm", "notice"]
Window = Callable[..., list[tuple[float, ...]]]

FIRST = 10  # steps that say where a run began
DISPLACED = -0.05  # implicit reward of chosen answers: beta times log-ratio
FALLEN = -1.0  # at beta 0.1, ten nats per answer
SAME_REWARD = 0.9  # share of groups
LENGTH_FACTOR, LENGTH_LEAST = 2.0, 16.0  # times the start; tokens
FINISHED_LEAST, FINISHED_FALL = 0.5, 0.3  # share of answers; below the start
KL_MOST = 1.0  # nats per token; usual are 0.01 to 0.1
ENTROPY_SHARE, ENTROPY_MOST = 0.2, 0.3  # of the start; nats per token
REWARD_ERRORS, REWARD_SHARE = 4.0, 0.1  # standard errors; of the start
RETAIN_FALL, RETAIN_SHARE = 1.0, 0.5  # nats per answer; of the start


class TextChecks:
    """The checks of one monitor.

    Args:
        window: the named metrics of the last steps that have all of them; empty while there are too few.
        reference: implicit rewards are relative to a reference, so that 0 is "as likely as before".
    """

    watched = ("reward", "length", "finished", "entropy", "logps/retain")

    def __init__(self, window: Window, *, reference: bool) -> None:
        self.window, self.reference = window, reference
        self.first: dict[str, list[float]] = {name: [] for name in self.watched}

    def note(self, row: Mapping[str, float]) -> None:
        """Remember how the run began."""
        for name, values in self.first.items():
            if name in row and len(values) < FIRST:
                values.append(row[name])

    def all(self) -> dict[str, tuple[Level, Callable[[], str | None]]]:
        """Level and check by code; a check returns a message while its condition holds."""
        return {
            "likelihood_displacement": ("notice", self._displacement),
            "chosen_falls": ("alarm", self._chosen_falls),
            "no_contrast": ("alarm", self._no_contrast),
            "reward_falls": ("alarm", self._reward_falls),
            "length": ("alarm", self._length),
            "unfinished": ("alarm", self._unfinished),
            "kl": ("alarm", self._kl),
            "entropy": ("notice", self._entropy),
            "retain_lost": ("alarm", self._retain_lost),
        }

    def _mean(self, *names: str) -> float | None:
        """The smoothed value of the first name, over steps that have all of them."""
        rows = self.window(*names)
        return statistics.fmean(row[0] for row in rows) if rows else None

    def _start(self, name: str) -> float | None:
        values = self.first[name]
        return statistics.fmean(values) if len(values) == FIRST else None

    # -- preferences ----------------------------------------------------------------------------------------------

    def _chosen(self) -> float | None:
        return self._mean("rewards/chosen", "logps/chosen") if self.reference else None

    def _displacement(self) -> str | None:
        chosen, accuracy = self._chosen(), self._mean("implicit_acc")
        if chosen is None or accuracy is None or chosen >= DISPLACED or accuracy <= 0.55:
            return None
        return (
            f"likelihood displacement: accuracy is {accuracy:.2f}, yet the chosen answers' implicit reward is {chosen:.2f}: "
            "they are less likely than under the reference, and the rejected ones only fell further. Common and mild at "
            "this size. Judge by samples; if it keeps falling, add an SFT term or DPOP, or lower training.learning_rate"
        )

    def _chosen_falls(self) -> str | None:
        chosen = self._chosen()
        if chosen is None or chosen >= FALLEN:
            return None
        return (
            f"the chosen answers' implicit reward fell to {chosen:.2f} (below {FALLEN:g}): the model unlearns what it "
            "should prefer, and the probability goes to answers that nobody judged. Lower training.learning_rate, raise the "
            "objective's beta, use an objective that holds the chosen likelihood (dpop, or DPO with an SFT term), or "
            "take an earlier checkpoint"
        )

    # -- sampled answers ------------------------------------------------------------------------------------------

    def _no_contrast(self) -> str | None:
        share = self._mean("frac_zero_std")
        if share is None:  # pairs of sampled answers: those without contrast have weight 0
            weight = self._mean("weight", "reward/best")
            share = None if weight is None else 1 - weight
        if share is None or share <= SAME_REWARD:
            return None
        reward = self._mean("reward")
        now = "" if reward is None else f" (mean reward {reward:.3g})"
        return (
            f"in {share:.0%} of the groups all answers have the same reward{now}: there is nothing to learn from them. "
            "Where the reward is at its best, training is done; otherwise take easier prompts, more "
            "rollout.samples_per_prompt or a reward with finer steps"
        )

    def _reward_falls(self) -> str | None:
        rows, first = [value for (value,) in self.window("reward")], self.first["reward"]
        if len(rows) < FIRST or len(first) < FIRST:
            return None
        start, now = statistics.fmean(first), statistics.fmean(rows)
        error = math.sqrt(statistics.variance(first) / len(first) + statistics.variance(rows) / len(rows))
        if start - now <= max(REWARD_ERRORS * error, REWARD_SHARE * abs(start), 1e-9):
            return None
        return (
            f"the reward fell from {start:.3g} to {now:.3g}: the policy gets worse at what it is trained for. Lower "
            "training.learning_rate, use fewer rollout.num_iterations, or set the objective's beta above 0 to hold it near "
            "the reference"
        )

    def _length(self) -> str | None:
        start, now = self._start("length"), self._mean("length")
        if start is None or now is None or now <= max(LENGTH_FACTOR * start, LENGTH_LEAST):
            return None
        return (
            f"answers grew from {start:.0f} to {now:.0f} tokens: either the reward pays for length, or the objective's "
            "reduction does. Look at samples; use a length penalty in the reward, or a reduction over tokens (dapo, dr_grpo)"
        )

    def _unfinished(self) -> str | None:
        start, now = self._start("finished"), self._mean("finished")
        if now is None or (now >= FINISHED_LEAST and (start is None or now >= start - FINISHED_FALL)):
            return None
        return (
            f"only {now:.0%} of the answers end by themselves; the others are cut at generation.max_new_tokens, and are "
            "rewarded and trained on as stumps. Raise generation.max_new_tokens; if the share falls during training, give "
            "cut answers a low reward"
        )

    def _kl(self) -> str | None:
        # Only with "ratio" is it an estimate per token.
        kl = self._mean("kl", "ratio")
        if kl is None or kl <= KL_MOST:
            return None
        return (
            f"the divergence from the reference is {kl:.2g} nats per token (above {KL_MOST:g}): little of the base model is "
            "left. Raise the objective's beta, lower training.learning_rate, or take an earlier checkpoint"
        )

    def _entropy(self) -> str | None:
        start, now = self._start("entropy"), self._mean("entropy")
        if start is None or now is None or now >= min(ENTROPY_SHARE * start, ENTROPY_MOST):
            return None
        return (
            f"entropy fell from {start:.2g} to {now:.2g} nats per token: the policy gives nearly the same answer every time "
            "and explores no more. Fine when the reward is high; otherwise lower training.learning_rate, widen the upper "
            "clip (objective.epsilon_high, as in dapo), or set the objective's beta above 0"
        )

    # -- unlearning -----------------------------------------------------------------------------------------------

    def _retain_lost(self) -> str | None:
        start, now = self._start("logps/retain"), self._mean("logps/retain")
        if start is None or now is None or start - now <= max(RETAIN_FALL, RETAIN_SHARE * abs(start)):
            return None
        return (
            f"log-probabilities of what is to be retained fell from {start:.3g} to {now:.3g} nats per answer: the model "
            "forgets more than it should. Take fewer steps, lower training.learning_rate, raise the weight of the retain "
            "term (objective.alpha), or use npo or simnpo instead of gradient ascent"
        )
