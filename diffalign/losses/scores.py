"""Scores: what a model family hands to the preference core, and what is true about them.

One row per *item* (a response, a noisy image, a trajectory). Rows are flat: index structures (`layouts.py`) say which rows
form pairs, groups or lists, so the same rows can serve a pair loss, an imitation term and an unpaired loss at once.

Shapes: N rows, U units per row (tokens, denoising steps or latent elements). Half precision is lifted to float32 on
arrival; float64 stays, for tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor


class Kind(str, Enum):
    """What a score is.

    TOKEN: the sum over response tokens of log p; exact, never positive.
    STEP: Gaussian log-density of the stored transitions of a stochastic sampler; exact per step up to constants.
    BOUND: minus one half of a denoising error at a (t, noise) shared by everything that is compared; only differences
        mean something, and their scale is arbitrary.
    REWARD: a differentiable reward of a sampled image, whose gradient goes on into the sampler; no likelihood of anything.
    JUDGE: what a reward model that is trained says of an item, in the model's own unit; it has no reference.
    """

    TOKEN = "token"
    STEP = "step"
    BOUND = "bound"
    REWARD = "reward"
    JUDGE = "judge"


class Cap(str, Enum):
    """What an objective may need to be true of the scores."""

    DIFFERENCE = "differences of a row between two models"
    ABSOLUTE = "absolute log-likelihoods, comparable between different items"
    PROBABILITY = "log-probabilities that are never positive"
    RATIO = "exp of a log-ratio is a likelihood ratio"
    LENGTH = "a length in units"
    UNITS = "scores per unit"
    VOCABULARY = "a distribution over a vocabulary"
    IMITATION = "an imitation loss per row"
    ERROR = "a denoising error per row"
    RESIDUAL = "prediction errors element by element"
    REWARD = "rewards with a gradient to the image"
    JUDGEMENT = "what a reward model says of an item"


CAPABILITIES: Mapping[Kind, frozenset[Cap]] = {
    Kind.TOKEN: frozenset(Cap) - {Cap.ERROR, Cap.RESIDUAL, Cap.REWARD, Cap.JUDGEMENT},
    Kind.STEP: frozenset({Cap.DIFFERENCE, Cap.ABSOLUTE, Cap.RATIO, Cap.UNITS, Cap.IMITATION}),
    Kind.BOUND: frozenset({Cap.DIFFERENCE, Cap.UNITS, Cap.IMITATION, Cap.ERROR, Cap.RESIDUAL}),
    Kind.REWARD: frozenset({Cap.REWARD}),
    Kind.JUDGE: frozenset({Cap.JUDGEMENT, Cap.UNITS}),
}


def lift(x: Tensor) -> Tensor:
    """float32 at least: half precision is lifted, float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def mean_square(residual: Tensor) -> Tensor:
    """The denoising error of residuals (N, *latent): the mean of their square over all axes but the first, (N,)."""
    return lift(residual).square().flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class Units:
    """Scores of the parts of every row.

    Attributes:
        theta: (N, U), gradient flows; 0 where masked out.
        ref, old: of the reference and of the behaviour policy, (N, U), no gradient.
        mask: bool (N, U); True for units that belong to the score.
        weight: >= 0, (N, U); None is 1 everywhere. May carry gradient (learned masks).
        divergence_weight: the same for a divergence at every unit; None is `weight`.
        segment: int64 (N, U): id of the step or phrase a unit belongs to; 0 is none.
    """

    theta: Tensor
    mask: Tensor
    ref: Tensor | None = None
    old: Tensor | None = None
    weight: Tensor | None = None
    divergence_weight: Tensor | None = None
    segment: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.theta.shape
        for name in ("mask", "ref", "old", "weight", "divergence_weight", "segment"):
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"units.{name} has shape {tuple(value.shape)}; expected {tuple(shape)} as units.theta")
        if self.mask.dtype != torch.bool:
            raise ValueError(f"units.mask is {self.mask.dtype}; expected torch.bool")


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Counts over a whole optimiser step (all micro-batches and processes), which make averages over units exact.

    Attributes:
        items: rows, pairs or lists the trainer averages over.
        units: masked units of all rows.
        chosen_units: masked units of the chosen rows of all pairs.
        chosen_prompt_units: prompt tokens of the same rows, for objectives that imitate prompts too.
        item_units: masked units of the rows of all items, for objectives that have both pairs and items.
        positive_items, positive_units: of these items, and of their units, those labelled 1 (desirable, retain), for losses
            that average over both sides apart; None takes this batch for the whole.
    """

    items: float
    units: float
    chosen_units: float = 0.0
    chosen_prompt_units: float = 0.0
    item_units: float = 0.0
    positive_items: float | None = None
    positive_units: float | None = None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of N rows.

    Attributes:
        kind: what a score is.
        theta: of the policy, (N,), gradient flows.
        ref: of the reference, (N,), no gradient; possibly of a mixture of references.
        old: of the behaviour policy that sampled the rows, (N,), no gradient.
        length: number of units that enter the sum, (N,); tokens only.
        units: scores per unit.
        vocabulary: named statistics over the vocabulary, each (N, U) (see `Objective.vocabulary`).
        imitation: loss of imitating the row, summed over its units, (N,): -log p for tokens, the error for denoising.
        prompt_imitation, prompt_length: the same of the prompt's tokens, for objectives that train on both.
        error: the denoising error itself, (N,), BOUND only.
        residual: the policy's prediction minus its target, element by element, (N, *latent), gradient flows, BOUND only;
            `error` is the mean of its square. Supplied where `Cap.RESIDUAL` is among the objective's needs.
        ref_residual: the same of the reference at the same (t, noise), no gradient; residual - ref_residual is the
            difference of the two predictions.
        old_residual: the same of the behaviour policy, no gradient.
        to_sample: how many times larger an error of the clean latents is than one of the prediction at the row's noise
            level, (N,), > 0, BOUND only: t for flow, sigma / alpha for eps, sigma for v.
        log_snr: log(alpha^2 / sigma^2) of the noise level of every row, (N,), BOUND only; with alpha = 1 - t and sigma = t
            (flow matching) 1 - t is sigmoid(log_snr / 2). Infinite at the ends of the schedule.
        patch_weight: >= 0, weights of the locations of a latent, (N, h, w), BOUND only.
        extra: further rows' worth of numbers a named objective asks for (its docstring says which), each (N,), or per unit,
            (N, U). Of transitions, STEP only: "mean_shift", "ref_shift": M[(mu - mu')^2] / (2 std^2), M the mean over the
            latent's elements, mu the mean of the policy's step and mu' that of the behaviour policy or the reference,
            gradient flows; "eps_shift": M[(eps - eps_ref)^2] of the guided noise predictions, gradient flows; "std": of the
            step, > 0; "dt": its length in time, > 0.
        totals: counts over the optimiser step; None takes this batch for the whole.
    """

    kind: Kind
    theta: Tensor
    ref: Tensor | None = None
    old: Tensor | None = None
    length: Tensor | None = None
    units: Units | None = None
    vocabulary: Mapping[str, Tensor] = field(default_factory=dict)
    imitation: Tensor | None = None
    prompt_imitation: Tensor | None = None
    prompt_length: Tensor | None = None
    error: Tensor | None = None
    residual: Tensor | None = None
    ref_residual: Tensor | None = None
    old_residual: Tensor | None = None
    to_sample: Tensor | None = None
    log_snr: Tensor | None = None
    patch_weight: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    totals: Totals | None = None

    def __post_init__(self) -> None:
        if self.theta.ndim != 1:
            raise ValueError(f"scores.theta has shape {tuple(self.theta.shape)}; expected one score per row, (N,)")
        rows = (
            "theta",
            "ref",
            "old",
            "length",
            "imitation",
            "prompt_imitation",
            "prompt_length",
            "error",
            "log_snr",
            "to_sample",
        )
        for name in rows:
            value = getattr(self, name)
            if value is None:
                continue
            if value.shape != self.theta.shape:
                raise ValueError(f"scores.{name} has shape {tuple(value.shape)}; expected {tuple(self.theta.shape)}")
            object.__setattr__(self, name, lift(value))
        self._check_latents()
        for name in ("ref", "old", "ref_residual", "old_residual"):
            value = getattr(self, name)
            if value is not None and value.requires_grad:
                raise ValueError(f"scores.{name} carries gradient; compute it under torch.no_grad()")

    def _check_latents(self) -> None:
        """What only denoising scores have, and shapes of what is given per element or location of a latent."""
        latent = ("residual", "ref_residual", "old_residual", "log_snr", "to_sample", "patch_weight")
        given = [name for name in latent if getattr(self, name) is not None]
        if given and self.kind is not Kind.BOUND:
            raise ValueError(f"scores.{given[0]} belongs to denoising scores; these are {self.kind.value} scores")
        for name in ("residual", "ref_residual", "old_residual", "patch_weight"):
            value = getattr(self, name)
            if value is None:
                continue
            like = None if name == "residual" or self.residual is None else self.residual
            if name == "patch_weight":
                fits = value.ndim == 3 and (like is None or value.shape[1:] == like.shape[-2:])
            else:
                fits = value.ndim > 1 and (like is None or value.shape == like.shape)
            if not fits or len(value) != len(self.theta):
                want = "(N, h, w) as the latents" if name == "patch_weight" else "(N, *latent)"
                raise ValueError(
                    f"scores.{name} has shape {tuple(value.shape)}; expected {want}, N = {len(self.theta)}"
                )
            object.__setattr__(self, name, lift(value))

    def __len__(self) -> int:
        return len(self.theta)

    @classmethod
    def tokens(
        cls,
        theta: Tensor,
        ref: Tensor | None = None,
        old: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        **more: Any,
    ) -> Scores:
        """Scores of texts.

        Args:
            theta: log p of the response, summed, (N,); or per token, (N, U), with `mask`.
            ref, old: of the same shape, without gradient.
            mask: bool (N, U), True on response tokens, the end-of-sequence token included.
            more: further fields (`length`, `vocabulary`, ...).
        """
        if theta.ndim == 1:
            more.setdefault("imitation", -theta)
            return cls(kind=Kind.TOKEN, theta=theta, ref=ref, old=old, **more)
        if mask is None:
            raise ValueError("token scores of shape (N, U) need a mask of the response tokens")
        parts = {
            name: lift(value).masked_fill(~mask, 0.0)
            for name, value in (("theta", theta), ("ref", ref), ("old", old))
            if value is not None
        }
        sums: dict[str, Any] = {name: value.sum(1) for name, value in parts.items()}
        per_unit = {name: more.pop(name, None) for name in ("weight", "divergence_weight", "segment")}
        more.setdefault("length", mask.sum(1))
        more.setdefault("imitation", -sums["theta"])
        return cls(kind=Kind.TOKEN, units=Units(mask=mask, **per_unit, **parts), **sums, **more)

    @classmethod
    def denoising(cls, error: Tensor, reference_error: Tensor | None = None, **more: Any) -> Scores:
        """Scores of denoising errors: minus one half of them, so that beta is the published `beta_dpo`.

        Args:
            error: squared error of the policy, (N,), gradient flows; everything that is compared shares (t, noise).
            reference_error: of the reference at the same (t, noise).
            more: further fields.
        """
        error = lift(error)
        ref = None if reference_error is None else -0.5 * lift(reference_error)
        more.setdefault("imitation", error)
        return cls(kind=Kind.BOUND, theta=-0.5 * error, ref=ref, error=error, **more)

    @classmethod
    def residuals(cls, residual: Tensor, reference_residual: Tensor | None = None, **more: Any) -> Scores:
        """Scores of denoising errors that are known element by element; the error is the mean of their square.

        Args:
            residual: the policy's prediction minus its target, (N, *latent), gradient flows.
            reference_residual: of the reference at the same (t, noise).
            more: further fields.
        """
        error = mean_square(residual)
        reference_error = None if reference_residual is None else mean_square(reference_residual)
        return cls.denoising(error, reference_error, residual=residual, ref_residual=reference_residual, **more)

    @classmethod
    def steps(
        cls,
        theta: Tensor,
        ref: Tensor | None = None,
        old: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        **more: Any,
    ) -> Scores:
        """Scores of sampled trajectories: Gaussian log-densities per denoising step, (N, U), or summed, (N,)."""
        if theta.ndim == 1:
            more.setdefault("imitation", -theta)
            return cls(kind=Kind.STEP, theta=theta, ref=ref, old=old, **more)
        mask = torch.ones_like(theta, dtype=torch.bool) if mask is None else mask
        made = cls.tokens(theta, ref, old, mask=mask, **more)
        fields = {name: getattr(made, name) for name in made.__dataclass_fields__}
        return cls(**fields | {"kind": Kind.STEP, "length": None})

    @classmethod
    def rewards(cls, reward: Tensor, **more: Any) -> Scores:
        """Rewards of sampled images, (N,); gradient flows to the images and on into the sampler."""
        return cls(kind=Kind.REWARD, theta=reward, **more)

    @classmethod
    def judged(cls, theta: Tensor, embedding: Tensor | None = None) -> Scores:
        """Scores of a reward model.

        Args:
            theta: what it says of every row, (N,), gradient flows.
            embedding: of general preferences, (N, 2 k), gradient flows; then theta is only shown.
        """
        units = None if embedding is None else Units(theta=embedding, mask=torch.ones_like(embedding, dtype=torch.bool))
        return cls(kind=Kind.JUDGE, theta=theta, units=units)

    def log_ratio(self) -> Tensor:
        """theta - ref per row, (N,).

        Raises:
            ValueError: there is no reference.
        """
        return self.theta - self.need_ref()

    def need_ref(self) -> Tensor:
        """Scores of the reference, (N,).

        Raises:
            ValueError: there are none.
        """
        if self.ref is None:
            raise ValueError("this objective compares with a reference; scores.ref is missing")
        return self.ref

    def need_units(self) -> Units:
        """The units.

        Raises:
            ValueError: there are none.
        """
        if self.units is None:
            raise ValueError(
                "this objective works per unit; scores.units is missing (give token scores of shape (N, U))"
            )
        return self.units

    def need_vocabulary(self, name: str) -> Tensor:
        """A statistic over the vocabulary, float32 at least, (N, U).

        Raises:
            ValueError: the scorer did not supply it.
        """
        if name not in self.vocabulary:
            raise ValueError(
                f"this objective reads the vocabulary statistic {name!r}; scores.vocabulary has not got it"
            )
        return lift(self.vocabulary[name])

    def need_error(self) -> Tensor:
        """The denoising error per row, (N,).

        Raises:
            ValueError: there is none.
        """
        if self.error is None:
            raise ValueError("this objective is a function of denoising errors; scores.error is missing")
        return self.error

    def need_residual(self) -> Tensor:
        """The policy's prediction minus its target, (N, *latent).

        Raises:
            ValueError: there is none.
        """
        if self.residual is None:
            raise ValueError("this objective works on prediction errors per element; scores.residual is missing")
        return self.residual

    def need_ref_residual(self) -> Tensor:
        """The reference's prediction minus its target, (N, *latent).

        Raises:
            ValueError: there is none.
        """
        if self.ref_residual is None:
            raise ValueError("this objective compares predictions with a reference's; scores.ref_residual is missing")
        return self.ref_residual

    def need_old_residual(self) -> Tensor:
        """The behaviour policy's prediction minus its target, (N, *latent).

        Raises:
            ValueError: there is none.
        """
        if self.old_residual is None:
            raise ValueError("this objective compares with the policy that sampled; scores.old_residual is missing")
        return self.old_residual

    def need_to_sample(self) -> Tensor:
        """Factors from errors of the prediction to errors of the clean latents, (N,).

        Raises:
            ValueError: there are none.
        """
        if self.to_sample is None:
            raise ValueError("this objective measures errors of clean latents; scores.to_sample is missing")
        return self.to_sample

    def need_log_snr(self) -> Tensor:
        """The log of the signal-to-noise ratio of every row, (N,).

        Raises:
            ValueError: there is none.
        """
        if self.log_snr is None:
            raise ValueError("this objective reads the noise level of every row; scores.log_snr is missing")
        return self.log_snr

    def need_patch_weight(self) -> Tensor:
        """Weights of the locations of a latent, (N, h, w).

        Raises:
            ValueError: there are none.
        """
        if self.patch_weight is None:
            raise ValueError("this objective weighs the locations of a latent; scores.patch_weight is missing")
        return self.patch_weight

    def need_extra(self, name: str) -> Tensor:
        """Numbers a named objective asks for, float32 at least.

        Raises:
            ValueError: the scorer did not supply them.
        """
        if name not in self.extra:
            raise ValueError(f"this objective reads {name!r}; scores.extra has not got it")
        return lift(self.extra[name])

    def need_imitation(self) -> Tensor:
        """The imitation loss per row, (N,).

        Raises:
            ValueError: there is none.
        """
        if self.imitation is None:
            raise ValueError("this objective imitates rows; scores.imitation is missing")
        return self.imitation

    def need_length(self) -> Tensor:
        """Lengths, at least 1, so that an empty row divides by one instead of by zero; (N,).

        Raises:
            ValueError: there are none.
        """
        if self.length is None:
            raise ValueError("this objective normalises by length; scores.length is missing")
        return self.length.clamp(min=1)
