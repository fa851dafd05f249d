"""Objectives made of other objectives: another divergence, weights, sums.

`base` or `losses` name pairwise objectives of the core; `settings` are theirs (`{"label_smoothing": 0.1}`), and `beta` is
handed on to them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from diffalign import losses as core
from diffalign.losses import anchored, pairwise, reduce, vocabulary
from diffalign.losses.base import (
    AnyLayout,
    BetaObjective,
    LossOut,
    Needs,
    Objective,
    Sampling,
    TokenStatistic,
    detached,
    needs,
)
from diffalign.losses.layouts import Layout
from diffalign.losses.scores import Cap, Kind, Scores
from diffalign.losses.transforms import Divergence, f_score

# Objectives whose pairs may be weighted one by one; `aot` sorts the batch and is not among them.
BASES: Mapping[str, type[BetaObjective]] = {
    cls.name: cls
    for cls in (
        pairwise.DPO,
        pairwise.RobustDPO,
        pairwise.Hinge,
        pairwise.IPO,
        pairwise.EXO,
        pairwise.DiscoPOP,
        pairwise.NormalisedDPO,
        pairwise.LengthDesensitisedDPO,
        pairwise.LengthRegularisedDPO,
        anchored.NCA,
        anchored.BCOPair,
        anchored.APOZero,
        anchored.APODown,
    )
}


def build(cls: type[Objective], settings: Mapping[str, Any]) -> Objective:
    """An objective with settings from a config.

    Raises:
        ValueError: it has no such setting, or the value is not a number where one is due.
    """
    known = cls.__dataclass_fields__
    for key in settings:
        if key not in known:
            raise ValueError(f"{cls.name} has no setting {key!r}; it has {', '.join(known)}")
    # YAML leaves 1e-3 a text.
    numbers = {k: float(v) if isinstance(known[k].default, float) else v for k, v in settings.items()}
    return cls(**numbers)


def adopt(owner: Objective, parts: Collection[Objective]) -> None:
    """Set on an objective what policies and sources of data look up before the first batch: all that its parts need.

    Raises:
        ValueError: parts that read rows which are made in different ways.
    """
    ways = {(part.noise, part.noising, part.source): part.name for part in parts}
    if len(ways) > 1:
        found = "; ".join(
            f"{name}: {noise} noise, {noising}, {source}" for (noise, noising, source), name in ways.items()
        )
        raise ValueError(
            f"{owner.name} of objectives that read rows made in different ways ({found}); train them apart"
        )
    mine, theirs = type(owner).needs, [part.needs for part in parts]
    asked = replace(
        mine,
        reference=any(needs.reference for needs in theirs) if theirs else mine.reference,
        caps=mine.caps.union(*(needs.caps for needs in theirs)),
        extra=tuple(dict.fromkeys(name for needs in theirs for name in needs.extra)),
        stats=tuple(dict.fromkeys(name for needs in theirs for name in needs.stats)),
        log_snr=any(needs.log_snr for needs in theirs),
        to_sample=any(needs.to_sample for needs in theirs),
        patch_weight=any(needs.patch_weight for needs in theirs),
    )
    object.__setattr__(owner, "needs", asked)
    for noise, noising, source in ways:
        for attribute, value in (("noise", noise), ("noising", noising), ("source", source)):
            object.__setattr__(owner, attribute, value)
    # All parts read the same sampled images: those of the first part that asks for something.
    asks = [part.sampling for part in parts if part.sampling != Sampling()]
    object.__setattr__(owner, "sampling", asks[0] if asks else Sampling())


@dataclass(frozen=True, kw_only=True)
class Wrapping(BetaObjective):
    """Base of objectives around one other.

    Attributes:
        beta: of the base; None takes the base's default.
        base: name of the pairwise objective.
        settings: of the base, by name.
    """

    base: str = "dpo"
    settings: Mapping[str, Any] = field(default_factory=dict)

    allowed: ClassVar[tuple[str, ...]] = tuple(BASES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base not in self.allowed:
            raise ValueError(f"base is {self.base!r}; {self.name} takes one of {', '.join(self.allowed)}")
        if "beta" in self.settings:
            raise ValueError("settings hold a beta; set the objective's own beta")
        self.inner.summary()

    @cached_property
    def inner(self) -> BetaObjective:
        """The base objective."""
        return cast(BetaObjective, build(BASES[self.base], {"beta": self.beta, **self.settings}))

    def check_beta(self, kind: Kind) -> None:
        self.inner.check(kind)

    def beta_for(self, kind: Kind) -> float:
        return self.inner.beta_for(kind)

    def summary(self) -> dict[str, float | str]:
        return self.inner.summary() | super().summary()


@dataclass(frozen=True, kw_only=True)
class FDPO(Wrapping):
    """f-DPO (Wang et al. 2023, arXiv 2309.16240): another divergence to the reference than the reverse KL.

    The base objective is fed f'(exp(rho)) instead of rho: forward KL 1 - exp(-rho), Jensen-Shannon log 2 + log sigma(rho)
    (half the effective beta at the start), alpha (exp((alpha - 1) rho) - 1) / (alpha - 1). The reverse KL is the base. As in
    TRL, objectives that divide by length divide f' of the whole response. TRL's older parametrisation of alpha is one
    minus this one.

    Only the reverse KL means something on denoising errors: the others are not equivariant to the scale of rho.

    Attributes:
        divergence: "forward_kl", "js", "alpha" or "reverse_kl".
        alpha: of "alpha"; 0.5 (TRL).
        base: one of dpo, robust_dpo, hinge, ipo, exo, discopop, dpo_norm.
    """

    divergence: Divergence = "forward_kl"
    alpha: float = 0.5

    name: ClassVar[str] = "f_dpo"
    title: ClassVar[str] = "f-DPO"
    paper: ClassVar[str] = "2309.16240"
    composition: ClassVar[str] = "f'(exp(log-ratio)) -> beta (w - l) -> link of the base"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.DIFFERENCE, Cap.RATIO))
    parity: ClassVar[str] = "TRL DPOTrainer f_divergence_type"
    instead: ClassVar[str] = "use dpo, which is its reverse KL"
    allowed: ClassVar[tuple[str, ...]] = ("dpo", "robust_dpo", "hinge", "ipo", "exo", "discopop", "dpo_norm")

    def __post_init__(self) -> None:
        super().__post_init__()
        f_score(torch.zeros(1), self.divergence, self.alpha)  # refuses unknown divergences now

    def required_caps(self, kind: Kind) -> frozenset[Cap]:
        return self.needs.caps - {Cap.RATIO} if self.divergence == "reverse_kl" else self.needs.caps

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return self.inner.initial_loss(kind)  # every f' is 0 at the reference

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        # The square of exp(80) leaves float32.
        limit = 40.0 if self.base == "ipo" else 80.0
        u = f_score(scores.log_ratio(), self.divergence, self.alpha, limit)
        out = self.inner(replace(scores, theta=u, ref=torch.zeros_like(u)), layout, stats)
        return LossOut(out.per_item, out.metrics | pairwise.raw_metrics(scores, Layout.of(layout).need_pairs()))


@dataclass(frozen=True, kw_only=True)
class WPO(Wrapping):
    """Weighted preference optimisation (Zhou et al. 2024, arXiv 2406.11827, eq. 2): off-policy pairs as if on-policy.

    Each pair's loss times w_w w_l, with w = exp(mean_t [log p(y_t) - log sum_v p(v)^2]) of the current policy, detached: how
    likely the response is, against what the policy's own samples would be. Not bounded by 1, since a likely token may exceed
    the expected probability; the exponent is limited to 20.

    Attributes:
        beta: of the base; 0.01 (paper, with `dpo`). None takes the base's default.
        base: any pairwise objective but `aot`.
    """

    beta: float | None = 0.01

    name: ClassVar[str] = "wpo"
    title: ClassVar[str] = "WPO"
    paper: ClassVar[str] = "2406.11827"
    composition: ClassVar[str] = "base, weighted by the policy's normalised likelihood of both responses"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.DIFFERENCE, Cap.PROBABILITY, Cap.UNITS, Cap.VOCABULARY))
    parity: ClassVar[str] = "TRL DPOTrainer use_weighting"
    instead: ClassVar[str] = "use dpo with a weight per pair, from the timestep or from how similar the two images are"

    def vocabulary(self) -> Mapping[str, TokenStatistic]:
        return {"log_sum_p2": vocabulary.log_sum_p2}

    def weights(self, scores: Scores) -> Tensor:
        """w per row, (N,), without gradient."""
        units = scores.need_units()
        aligned = units.theta.detach() - scores.need_vocabulary("log_sum_p2").detach()
        return reduce.masked_mean(aligned, units.mask).clamp(max=20.0).exp()

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        layout = Layout.of(layout)
        pairs, weights = layout.need_pairs(), self.weights(scores)
        both = weights[pairs.w] * weights[pairs.l]
        out = self.inner(scores, replace(layout, pairs=replace(pairs, weight=pairs.weight * both)), stats)
        return LossOut(out.per_item, out.metrics | detached(weight=both))


@dataclass(frozen=True, kw_only=True)
class Mixed(BetaObjective):
    """A weighted sum of pairwise objectives on one set of scores, and of imitating the chosen responses.

    The default is mixed preference optimisation (MPO, Wang et al. 2024, arXiv 2411.10442): 0.8 dpo + 0.2 bco_pair + 1 sft.
    TRL has it as lists `loss_type` and `loss_weights`.

    Attributes:
        beta: of all that have one and do not set it themselves; None takes each one's default.
        losses: names of objectives that read pairs, and "sft": the mean over tokens of -log p of the chosen responses (on
            denoising errors the error, so its weight is in other units).
        weights: one per name.
        settings: by objective, by name: `{"dpo": {"label_smoothing": 0.1}}`.
    """

    losses: tuple[str, ...] = ("dpo", "bco_pair", "sft")
    weights: tuple[float, ...] = (0.8, 0.2, 1.0)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    name: ClassVar[str] = "mixed"
    title: ClassVar[str] = "Mixed (MPO)"
    paper: ClassVar[str] = "2411.10442"
    composition: ClassVar[str] = "weighted sum of pairwise objectives and imitation"
    needs: ClassVar[Needs] = needs("pairs")
    parity: ClassVar[str] = "TRL DPOTrainer loss_weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.losses) != len(self.weights) or not self.losses:
            raise ValueError(f"{len(self.weights)} weights for {len(self.losses)} losses; expected one weight per loss")
        if unused := sorted(set(self.settings) - set(self.losses)):
            raise ValueError(f"settings for {', '.join(unused)}, not among the losses {', '.join(self.losses)}")
        adopt(self, self.parts.values())  # refuses unknown names and settings now

    @cached_property
    def parts(self) -> dict[str, Objective]:
        """The objectives by name, without "sft"."""
        return {name: self._part(name) for name in self.losses if name != "sft"}

    def _part(self, name: str) -> Objective:
        cls = core.catalogue().get(name)
        if cls is None or cls.needs.layout != ("pairs",) or cls is type(self):
            raise ValueError(f"losses has {name!r}; expected names of objectives that read pairs alone, or sft")
        shared = {"beta": self.beta} if "beta" in cls.__dataclass_fields__ and self.beta is not None else {}
        part = build(cls, shared | dict(self.settings.get(name, {})))
        if part.estimator() is not None:
            raise ValueError(f"{name} remembers across batches, which a sum of objectives cannot; train with it alone")
        if part.needs.old:
            raise ValueError(
                f"{name} reads the scores of a second model, which a sum of objectives has not; train it alone"
            )
        return part

    def check(self, kind: Kind) -> None:
        for part in self.parts.values():
            part.check(kind)

    def reads_reference(self) -> bool:
        return any(part.reads_reference() for part in self.parts.values())

    def reads_prompt(self) -> bool:
        return any(part.reads_prompt() for part in self.parts.values())

    def beta_for(self, kind: Kind) -> float:
        """That of the first objective."""
        return next((part.beta_for(kind) for part in self.parts.values() if "beta" in part.__dataclass_fields__), 0.0)

    def vocabulary(self) -> Mapping[str, TokenStatistic]:
        return {name: f for part in self.parts.values() for name, f in part.vocabulary().items()}

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        known = {name: part.initial_loss(kind) for name, part in self.parts.items()}
        total = 0.0
        for name, weight in zip(self.losses, self.weights):
            value = known.get(name) if weight else 0.0
            if value is None:
                return None
            total += weight * value
        return total

    def summary(self) -> dict[str, float | str]:
        return super().summary() | {"mixed": " + ".join(f"{w:g} {n}" for n, w in zip(self.losses, self.weights))}

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs = Layout.of(layout).need_pairs()
        metrics: dict[str, Tensor] = {}
        total = torch.zeros((), dtype=scores.theta.dtype, device=scores.theta.device)
        for name, weight in zip(self.losses, self.weights):
            if name == "sft":
                loss = pairs.weight * reduce.imitation(scores, pairs.w)
            else:
                out = self.parts[name](scores, layout, stats)
                loss, metrics = out.per_item, out.metrics | metrics
                if len(loss) != len(pairs):
                    raise ValueError(f"{name} left out {len(pairs) - len(loss)} of {len(pairs)} pairs; a sum keeps all")
            total = total + weight * loss
            metrics[f"loss/{name}"] = loss.detach()
        return LossOut(total, metrics)
