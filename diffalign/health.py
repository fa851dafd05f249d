"""Is this run healthy? Alarms in plain words, the stop on a non-finite loss, and metrics by timestep bins.

`Monitor` reads one row of metrics per optimiser step and knows the ways in which preference training fails without an
error message. What is particular to texts is in `_health_text`. Nothing here touches a model.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign._health_text import TextChecks
from diffalign.errors import UserError

LOG2 = math.log(2)
UNITS = ("pairs", "prompts", "samples")  # what jobs count, see `Job.unit`


RATIO_LIMIT = 0.05  # of the first step's distance from 1: beyond it a run is stopped
_RATIO_CAUSES = "sampling and training differ in network, number format, guidance or noise levels, or dropout is on"


class NonFiniteLossError(UserError):
    """The loss became NaN or infinite; nothing was written after the last good step.

    Args:
        step: optimiser step at which it happened.
        sample_ids: ids of the samples with a non-finite loss.
        values: their losses, in the same order.
        checkpoint: the last checkpoint, which is intact; None if none was written yet.
    """

    def __init__(
        self, step: int, sample_ids: Sequence[str], values: Sequence[float], checkpoint: str | None = None
    ) -> None:
        self.step, self.sample_ids, self.values, self.checkpoint = step, list(sample_ids), list(values), checkpoint
        shown = ", ".join(f"{name} ({value})" for name, value in list(zip(sample_ids, values))[:8])
        more = f" and {len(sample_ids) - 8} more" if len(sample_ids) > 8 else ""
        back = f"resume from {checkpoint}, which is intact" if checkpoint else "no checkpoint was written before it"
        super().__init__(
            f"non-finite loss at step {step} in sample {shown}{more}; {back}. Look at these samples, lower "
            "training.learning_rate, or use bf16 or float32 instead of fp16"
        )


def require_finite(step: int, sample_ids: Sequence[str], losses: Tensor, checkpoint: str | None = None) -> None:
    """Stop on the first micro-batch with a NaN or infinite loss.

    Args:
        step: optimiser step.
        sample_ids: of the micro-batch. There may be several losses per sample (those of chosen items before those of
            rejected ones), or none for some; then all are named.
        losses: per-sample losses, shape (B,); reading them waits for the device once.
        checkpoint: the last checkpoint, for the message.

    Raises:
        NonFiniteLossError: naming the samples.
    """
    values = losses.detach().float().cpu().tolist()
    bad = [i for i, value in enumerate(values) if not math.isfinite(value)]
    if bad:
        names = [sample_ids[i % len(sample_ids)] for i in bad]
        if len(values) % len(sample_ids):
            names = [" or ".join(sample_ids)] * len(bad)
        raise NonFiniteLossError(step, names, [values[i] for i in bad], checkpoint)


class OffPolicyError(UserError):
    """The first step's samples do not look as if the policy had made them."""


def require_on_policy(row: Mapping[str, float]) -> None:
    """Stop at a first step whose mean ratio to the policy that sampled is far from 1, which it is before any update.

    Smaller distances, as half precision makes them, are an alarm (`Monitor`).

    Args:
        row: metrics of the first optimiser step of a new run.

    Raises:
        OffPolicyError: what was got, and where to look.
    """
    ratio = row.get("ratio", 1.0)
    if not abs(ratio - 1) <= RATIO_LIMIT:  # also for NaN
        raise OffPolicyError(
            f"the first step's mean ratio to the policy that sampled is {ratio:.4f}; before any update it must be 1: "
            f"{_RATIO_CAUSES}. Nothing was kept; training.mixed_precision=no tells whether it is rounding"
        )


@dataclass(frozen=True)
class Alarm:
    """Something the user should know.

    Attributes:
        step: optimiser step at which it was first true.
        code: short stable name.
        message: what was seen, what it means, what to do.
        level: "alarm" (the result is in danger) or "notice" (common; know it).
    """

    step: int
    code: str
    message: str
    level: Literal["alarm", "notice"] = "alarm"

    def row(self) -> dict[str, Any]:
        """The line for `metrics.jsonl`."""
        return {"step": self.step, "alarm": self.code, "level": self.level, "message": self.message}


class Monitor:
    """Watches a run; feed it every optimiser step, on one process, with metrics averaged over all of them.

    Each alarm is raised once, and again only after its condition was absent for `window` steps.

    Args:
        initial_loss: unweighted loss of an untouched adapter (the objective's `initial_loss()`): log 2 for sigmoid
            links, other links have their own; None where it is not known.
        fresh: the run starts with untouched adapters, so its first loss must be `initial_loss`; False on resume.
        reference: implicit rewards are relative to a reference (the objective's `reads_reference()`).
        window: steps of smoothing. Single batches are far too noisy to judge.
        flat_steps: steps without any effect before `not_learning` is raised.

    Attributes:
        alarms: everything raised so far, in order.
    """

    def __init__(
        self,
        *,
        initial_loss: float | None = LOG2,
        fresh: bool = True,
        reference: bool = True,
        window: int = 25,
        flat_steps: int = 10,
    ) -> None:
        self.initial_loss, self.fresh = initial_loss, fresh
        self.window, self.flat_steps = window, flat_steps
        self.alarms: list[Alarm] = []
        self._recent: deque[dict[str, float]] = deque(maxlen=200)
        self._quiet_for: dict[str, int] = {}  # active alarm -> steps since its condition was last true
        self._seen = 0
        self._text = TextChecks(self._window, reference=reference)

    def update(self, row: Mapping[str, float]) -> list[Alarm]:
        """Take in one step.

        Args:
            row: the step's metrics under their names in `metrics.jsonl`; "step" is required, what a run does not
                have is left out, non-finite values are ignored.

        Returns:
            Alarms raised by this step.
        """
        values = {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        self._seen += 1
        self._recent.append(values)
        self._text.note(values)
        raised = []
        for code, (level, check) in self._checks().items():
            message = check()
            if message is None:
                self._settle(code)
            elif code not in self._quiet_for:
                self._quiet_for[code] = 0
                raised.append(Alarm(int(row["step"]), code, message, level))
            else:
                self._quiet_for[code] = 0
        self.alarms += raised
        return raised

    def _checks(self) -> dict[str, tuple[Literal["alarm", "notice"], Callable[[], str | None]]]:
        own: dict[str, tuple[Literal["alarm", "notice"], Callable[[], str | None]]] = {
            "first_loss": ("alarm", self._first_loss),
            "first_ratio": ("alarm", self._first_ratio),
            "not_learning": ("alarm", self._not_learning),
            "winner_error": ("alarm", self._winner_error),
            "displacement": ("notice", self._displacement),
            "margin": ("alarm", self._margin),
            "saturated": ("alarm", self._saturated),
            "grad_spike": ("notice", self._grad_spike),
            "loss_scale": ("alarm", self._loss_scale),
            "slow": ("notice", self._slow),
        }
        return own | self._text.all()

    def _settle(self, code: str) -> None:
        if code in self._quiet_for:
            self._quiet_for[code] += 1
            if self._quiet_for[code] >= self.window:
                del self._quiet_for[code]

    def _window(self, *names: str) -> list[tuple[float, ...]]:
        """The named metrics of the last `window` steps that have all of them; empty while there are too few."""
        rows = list(self._recent)[-self.window :]
        found = [tuple(row[name] for name in names) for row in rows if all(name in row for name in names)]
        return found if len(found) >= min(self.window, 10) else []

    def _rise(self) -> float | None:
        """Relative change of the chosen images' error against the reference's: 0.1 is ten per cent worse.

        A median of ratios: the error itself varies tenfold with the drawn timesteps, and one bad batch is no trend.
        """
        pairs = self._window("error/chosen", "error/chosen_ref")
        return statistics.median(ours / max(reference, 1e-12) for ours, reference in pairs) - 1 if pairs else None

    def _accuracy(self) -> float | None:
        values = self._window("implicit_acc")
        return statistics.fmean(value for (value,) in values) if values else None

    # -- The checks: a message while the condition holds, else None -------------------------------------------------

    def _first_loss(self) -> str | None:
        if not self.fresh or self._seen > 1 or self.initial_loss is None or "loss" not in self._recent[0]:
            return None
        first = self._recent[0]
        spread, expected = first.get("logits/std", 0.0), self.initial_loss * first.get("weight", 1.0)
        if abs(first["loss"] - expected) < 1e-3 and spread < 1e-2:
            return None
        return (
            f"the first loss is {first['loss']:.4f} (logit spread {spread:.2g}), but an untouched adapter must give "
            f"{expected:.4f} and 0: policy and reference differ before training. Look for dropout in "
            "the network, noise that is not shared, or two number formats"
        )

    def _first_ratio(self) -> str | None:
        if not self.fresh or self._seen > 1 or abs(self._recent[0].get("ratio", 1.0) - 1) < 1e-3:
            return None
        return (
            f"the first step's mean ratio to the policy that sampled is {self._recent[0]['ratio']:.4f}, and before any "
            f"update it must be 1: {_RATIO_CAUSES}"
        )

    def _not_learning(self) -> str | None:
        rows = list(self._recent)[-self.flat_steps :]
        if len(rows) < self.flat_steps:
            return None
        if all(row.get("learning_rate", 1.0) == 0.0 for row in rows):
            return (
                f"the learning rate was 0 for {len(rows)} steps: nothing is learnt. Check training.learning_rate and "
                "training.lr_scheduler"
            )
        # Where no group has contrast, there is no gradient either; `no_contrast` says so.
        if all(row.get("grad_norm", 1.0) == 0.0 and not _without_contrast(row) for row in rows):
            return (
                f"the gradients were exactly 0 for {len(rows)} steps: the adapters are not attached, are frozen, or "
                "do not reach the loss. Check lora.targets"
            )
        flat = self.initial_loss
        if flat is None or not all(
            abs(row.get("loss", math.inf) - flat * row.get("weight", 1.0)) < 1e-4
            and _spread(row) < 1e-6
            and not _without_contrast(row)
            for row in rows
        ):
            return None
        name = "log 2 = 0.6931" if flat == LOG2 else f"{flat:.4g}"
        return (
            f"the loss stayed at {name} with no margin for {len(rows)} steps: the adapters do not change the policy. "
            "Are they attached, and switched on in the policy's pass? Is the learning rate far too low?"
        )

    def _winner_error(self) -> str | None:
        rise = self._rise()
        if rise is None or rise <= 0.2:
            return None
        return (
            f"the denoising error of the chosen images is {rise:.0%} above the reference's: the model unlearns what "
            "it should prefer, and samples will degrade although the accuracy may rise. Stop and lower "
            "training.learning_rate, raise the objective's beta, or take an earlier checkpoint"
        )

    def _displacement(self) -> str | None:
        rise, accuracy = self._rise(), self._accuracy()
        if rise is None or accuracy is None or rise <= 0.02 or accuracy <= 0.55:
            return None
        return (
            f"likelihood displacement: accuracy is {accuracy:.2f}, yet the chosen images' error rose {rise:.1%} above "
            "the reference's; the rejected ones only rose more. Common and mild at this size. Judge by samples; if it "
            "keeps rising, lower training.learning_rate"
        )

    def _margin(self) -> str | None:
        # Root mean square of the logit over the batch, from its mean and spread: an upper bound of mean |logit|.
        sizes = [math.hypot(mean, std) for mean, std in self._window("rewards/margins", "logits/std")]
        size = statistics.fmean(sizes) if sizes else 0.0
        if size <= 10:
            return None
        return (
            f"margins are exploding: the smoothed size of the logits is {size:.1f} (above 10). The loss is saturated "
            "and the model drifts. Lower training.learning_rate or take an earlier checkpoint"
        )

    def _saturated(self) -> str | None:
        rise, accuracy = self._rise(), self._accuracy()
        if rise is None or accuracy is None or accuracy <= 0.95 or rise <= 0.005:
            return None
        return (
            f"accuracy is {accuracy:.2f} on the training pairs while the chosen images' error is {rise:.1%} above the "
            "reference's: the pairs are separated by making both worse. More steps will not help; use fewer steps, "
            "more pairs, or a lower training.learning_rate"
        )

    def _grad_spike(self) -> str | None:
        norms = [row["grad_norm"] for row in self._recent if "grad_norm" in row]
        if len(norms) <= 20 or "grad_norm" not in self._recent[-1]:
            return None
        usual = statistics.median(norms[:-1])
        if usual == 0.0 or norms[-1] <= 20 * usual:
            return None
        return (
            f"gradient norm {norms[-1]:.3g} is {norms[-1] / usual:.0f} times its running median {usual:.3g}. Clipping "
            "(training.max_grad_norm) limits the damage; if it repeats, lower training.learning_rate"
        )

    def _loss_scale(self) -> str | None:
        scale = self._recent[-1].get("loss_scale")
        if scale is None or scale >= 1.0:
            return None
        return (
            f"the fp16 loss scale fell to {scale:.3g}: gradients overflow at every step, and small ones vanish. Use "
            "training.mixed_precision=bf16 (or no), or, for images, an fp16-safe VAE"
        )

    def _slow(self) -> str | None:
        unit = next((u for u in UNITS if any(f"{u}_per_second" in row for row in self._recent)), UNITS[0])
        rates = [row[f"{unit}_per_second"] for row in self._recent if f"{unit}_per_second" in row]
        if len(rates) < 80:
            return None
        now, usual = statistics.median(rates[-20:]), statistics.median(rates[:-20])
        if now >= 0.5 * usual:
            return None
        return (
            f"throughput fell from {usual:.3g} to {now:.3g} {unit} per second. Something else uses the machine, memory "
            "is swapping, or the data loader cannot keep up (training.dataloader_workers)"
        )


def _spread(row: Mapping[str, float]) -> float:
    """How far implicit rewards are from zero; 1 where a run reports none."""
    found = [abs(row[name]) for name in ("rewards/desirable", "rewards/undesirable") if name in row]
    return row.get("logits/std", max(found, default=1.0))


def _without_contrast(row: Mapping[str, float]) -> bool:
    return row.get("frac_zero_std") == 1.0 or ("reward/best" in row and row.get("weight") == 0.0)


class BinAccumulator:
    """Weighted means of per-sample metrics over equal bins of the timestep, mergeable as sums.

    Preference training behaves very differently at high and low noise; one mean hides it. Sums stay on the device, so
    that adding a micro-batch does not wait for it.

    Args:
        names: the metrics, in the order of the sums.
        num_timesteps: T; times lie in [0, T). 1000 for discrete schedules, 1.0 for flow matching.
        bins: number of bins.
        device: where the sums live; that of the losses.
    """

    def __init__(
        self,
        names: Sequence[str],
        num_timesteps: float = 1000,
        bins: int = 4,
        device: torch.device | str = "cpu",
    ) -> None:
        self.names, self.num_timesteps, self.bins = tuple(names), num_timesteps, bins
        # MPS has no float64.
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        # Rows: one sum per metric, the sum of weights, the number of samples.
        self.sums = torch.zeros(len(self.names) + 2, bins, dtype=dtype, device=device)

    def add(self, t: Tensor, values: Mapping[str, Tensor], weight: Tensor | None = None) -> None:
        """Take in one micro-batch.

        Args:
            t: times in [0, T), shape (B,).
            values: every metric of `names`, shape (B,) each; gradients are cut.
            weight: of the samples in the means, shape (B,); None means 1.

        Raises:
            ValueError: other metrics than `names`.
        """
        if set(values) != set(self.names):
            raise ValueError(f"got metrics {sorted(values)}, expected {sorted(self.names)}")
        like = self.sums
        weight_B = torch.ones_like(t, dtype=like.dtype, device=like.device) if weight is None else weight.to(like)
        index_B = (t.detach().to(like) * (self.bins / self.num_timesteps)).long().clamp(0, self.bins - 1)
        rows = [values[name].detach().to(like) * weight_B for name in self.names]
        self.sums.index_add_(1, index_B, torch.stack([*rows, weight_B, torch.ones_like(weight_B)]))

    def merge(self, sums: Tensor) -> None:
        """Add the `sums` of another accumulator with the same names and bins (or an all-reduced remainder)."""
        self.sums += sums.to(self.sums)

    def reset(self) -> None:
        self.sums.zero_()

    def by_bin(self) -> dict[str, float]:
        """`t0/implicit_acc` ... and `t0/count` ... for the bins that have samples; bin 0 is the least noise."""
        *sums, weights, counts = self.sums.tolist()
        rows: dict[str, float] = {}
        for i in (i for i in range(self.bins) if counts[i] > 0):
            if weights[i] > 0:
                rows |= {f"t{i}/{name}": total[i] / weights[i] for name, total in zip(self.names, sums)}
            rows[f"t{i}/count"] = counts[i]
        return rows

    def means(self) -> dict[str, float]:
        """Means over all samples, by plain metric name; empty before any sample."""
        *sums, weights, _ = (sum(row) for row in self.sums.tolist())
        return {name: total / weights for name, total in zip(self.names, sums)} if weights > 0 else {}
