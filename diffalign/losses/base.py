"""The objective: a frozen dataclass whose fields are its settings and whose call is the method.

    out = losses.SimPO(beta=2.0, gamma_beta_ratio=0.5)(scores, pairs)
    out.loss.backward()

An objective is a pure function of (scores, layout, stats): no random numbers, no model call, no communication.
What remembers anything (a reference point, a running mean, dynamic labels) is an `Estimator` and arrives as `stats`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from diffalign.losses.layouts import Groups, Items, Layout, Lists, Pairs
from diffalign.losses.scores import CAPABILITIES, Cap, Kind, Scores

Source: TypeAlias = Literal[
    "data",
    "generated",
    "on_policy",
    "truncated",
    "trajectories",
    "candidates",
    "steps",
    "whole_trajectories",
    "differentiable",
]
AnyLayout: TypeAlias = Layout | Pairs | Items | Groups | Lists
# (log-softmax of the policy (..., V), labels (...), log-softmax of the reference or None) -> statistic (...)
TokenStatistic: TypeAlias = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


class IncompatibleObjective(ValueError):  # noqa: N818 - what it says of the objective
    """An objective that means nothing on this kind of score.

    Attributes:
        objective: its name.
        kind: of the scores.
        why: the reason.
        instead: the nearest meaningful alternative.
    """

    def __init__(self, objective: str, kind: Kind, why: str, instead: str) -> None:
        self.objective, self.kind, self.why, self.instead = objective, kind, why, instead
        advice = f"; {instead}" if instead else ""
        super().__init__(f"objective {objective!r} on {kind.value} scores: {why}{advice}")


# Why an objective that needs a capability is refused where scores do not have it.
_WHY: Mapping[Cap, Mapping[Kind, str]] = {
    Cap.PROBABILITY: {
        Kind.BOUND: "1 - exp(score) needs a normalised probability, and a denoising error is neither normalised nor bounded",
        Kind.STEP: "a density may exceed 1, so odds and 1 - p are undefined",
    },
    Cap.ABSOLUTE: {
        Kind.BOUND: "without a reference the difference between two images mostly measures how complex they are",
    },
    Cap.RATIO: {
        Kind.BOUND: "exp of a difference of denoising errors is not a likelihood ratio, and its scale is arbitrary",
    },
    Cap.LENGTH: {
        Kind.BOUND: "there are no tokens to count or to normalise by",
        Kind.STEP: "every trajectory has the same number of steps, so there is no length to normalise by",
    },
    Cap.VOCABULARY: {
        Kind.BOUND: "there is no vocabulary to take a divergence over",
        Kind.STEP: "there is no vocabulary to take a divergence over",
    },
    Cap.ERROR: {
        Kind.TOKEN: "it is a function of a denoising error",
        Kind.STEP: "it is a function of a denoising error",
    },
    Cap.JUDGEMENT: dict.fromkeys(
        (Kind.TOKEN, Kind.STEP, Kind.BOUND),
        "it reads what a reward model says, and these are log-likelihoods of a policy",
    ),
    Cap.RESIDUAL: {
        Kind.TOKEN: "it works on the prediction of a denoising network, element by element",
        Kind.STEP: "it works on the prediction of a denoising network, element by element",
    },
    Cap.REWARD: {
        Kind.TOKEN: "no gradient of a reward reaches a text that was sampled token by token",
        Kind.STEP: "it follows the gradient of a reward through the sampler and has no use for log-densities",
        Kind.BOUND: "it follows the gradient of a reward through the sampler and has no use for denoising errors",
    },
}
# Kinds that are no likelihoods of anything: why, and what to take there instead.
_NO_POLICY: Mapping[Kind, tuple[str, str]] = {
    Kind.REWARD: (
        "a reward that is followed by its gradient is no likelihood",
        "use an objective that back-propagates rewards, such as 'draft'",
    ),
    Kind.JUDGE: (
        "a reward model's scores are no log-likelihoods of a policy, and have no reference",
        "use 'bradley_terry'",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What an objective reads.

    Attributes:
        layout: parts of the layout ("pairs", "items", "groups", "lists", "conditions", "on_policy").
        or_layout: parts that serve instead of `layout`.
        reference, old: scores of the reference, of the behaviour policy.
        caps: what must be true of the scores.
        labels: labels of items that are read: (1,) for what only imitates, (0,) for what only pushes away.
        prompt: reads `Scores.prompt_imitation`.
        extra: names in `Scores.extra`.
        stats: names of what an estimator supplies.
        log_snr: reads `Scores.log_snr`.
        to_sample: reads `Scores.to_sample`.
        patch_weight: reads `Scores.patch_weight`.
    """

    layout: tuple[str, ...] = ("pairs",)
    reference: bool = True
    old: bool = False
    caps: frozenset[Cap] = frozenset({Cap.DIFFERENCE})
    labels: tuple[int, ...] = (0, 1)
    prompt: bool = False
    extra: tuple[str, ...] = ()
    stats: tuple[str, ...] = ()
    or_layout: tuple[str, ...] = ()
    log_snr: bool = False
    to_sample: bool = False
    patch_weight: bool = False


def needs(*layout: str, caps: tuple[Cap, ...] = (Cap.DIFFERENCE,), **more: Any) -> Needs:
    """Short form of `Needs`: `needs("pairs", caps=(Cap.LENGTH,), reference=False)`."""
    return Needs(layout=layout or ("pairs",), caps=frozenset(caps), **more)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What an objective asks of the images that a run samples for it, as it was published; a config may say otherwise.

    Attributes:
        policy: who samples; see `rollout.policy`.
        timesteps: at which images are noised again: "family", as its models were trained, or the "sampler"'s levels.
        shared_start: the trajectories of a prompt start from the same noise.
        pairing: how two images make a pair where there are several rewards; see `rollout.pairing`.
        win_rates: rewards are read as win rates among the samples of a prompt.
        negative_gradient: whether gradient flows through the unconditional branch of guided log-densities.
    """

    policy: Literal["policy", "reference", "lagged"] = "policy"
    timesteps: Literal["family", "sampler"] = "family"
    shared_start: bool = True
    pairing: Literal["sum", "dominance"] = "sum"
    win_rates: bool = False
    negative_gradient: bool = True


@dataclass(frozen=True)
class LossOut:
    """What an objective returns.

    Attributes:
        per_item: loss per pair, item, list or group member, (M,), with gradient; weights are in it. The loss of a step is
            the mean over all of them, whatever the number of micro-batches and processes.
        metrics: detached values by metric name; each of its own length, averaged over its own count.
    """

    per_item: Tensor
    metrics: dict[str, Tensor]

    @property
    def loss(self) -> Tensor:
        """The scalar to minimise: the mean of `per_item`; zero, still connected to the graph, if there is none."""
        return self.per_item.mean() if self.per_item.numel() else self.per_item.sum()


class Estimator(ABC):
    """Something with memory, or that looks at all processes: kept apart from the pure objective.

    `gather` concatenates a tensor over all processes along axis 0 (the identity for one process), so a definition on the
    gathered batch is the same on one process and on many.
    """

    @abstractmethod
    def update(
        self, scores: Scores, layout: Layout, gather: Callable[[Tensor], Tensor] = lambda x: x
    ) -> dict[str, Tensor]:
        """Take in a batch and return detached statistics by name."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores. The base remembers nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state; got {', '.join(state)}")


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """Base of all objectives of the core.

    Class attributes:
        name: as in a config's `objective.name`.
        title: for people.
        paper: arXiv id; "" where there is none, ending in "?" where the id is from memory.
        composition: transform -> contrast -> link -> weight -> reduction, in words.
        needs: what it reads.
        parity: the independent implementation it is tested against; ending in "(formula)" where its formula was transcribed
            and its code is not run; "" if there is none.
        status: "experimental" where the published formula was not available.
        unknown: then, what is not known.
        instead: what to use where it is refused.
        default_beta: beta per kind of score, for objectives with a `beta` field that may be left out.
        aliases: other names of fields that a config may use.
        noise: whether the two images of a pair are scored at one (t, noise), "shared", or each at its own, "independent".
        noising: how x_t is made of x_0 unless a config says otherwise: "forward" adds noise; "ddim_inversion" and
            "renoise_inversion" run a sampler backwards, and the target is the noise that the result implies.
        source: where the rows come from. "data": stored images. "generated": the rejected image is sampled by the reference.
            "on_policy": the rejected row is a latent on a lagged policy's own trajectory, its target that policy's
            prediction. "truncated": noised latents on the way of a sampler's walk, with its prediction further down the walk
            as their clean image. "trajectories": stored transitions of sampled images, one row each. "candidates": the same
            of next latents drawn from one latent. "steps": transitions of all samples of a prompt, with the log-densities
            under the policy that sampled them. "whole_trajectories": all samples of a prompt, one row each with all its
            steps as units. "differentiable": images that are sampled with gradient, see `diffusion.walks`.
        sampling: what it asks of images that are sampled for it.
        takes_sides: whether it matters which image of a pair is the chosen one.
        joint: chosen and rejected images are scored by models of their own (`negative.train: joint`).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    composition: ClassVar[str]
    needs: ClassVar[Needs]
    parity: ClassVar[str] = ""
    status: ClassVar[Literal["stable", "experimental"]] = "stable"
    unknown: ClassVar[str] = ""
    instead: ClassVar[str] = ""
    default_beta: ClassVar[Mapping[Kind, float]] = {}
    aliases: ClassVar[Mapping[str, str]] = {}
    noise: ClassVar[Literal["shared", "independent"]] = "shared"
    noising: ClassVar[Literal["forward", "ddim_inversion", "renoise_inversion"]] = "forward"
    source: ClassVar[Source] = "data"
    sampling: ClassVar[Sampling] = Sampling()
    takes_sides: ClassVar[bool] = True
    joint: ClassVar[bool] = False

    def check(self, kind: Kind) -> None:
        """Refuse a kind of score on which this objective, with these settings, means nothing.

        Raises:
            IncompatibleObjective: with the reason and the nearest alternative.
        """
        self.check_caps(kind)
        self.check_beta(kind)

    def check_caps(self, kind: Kind) -> None:
        """Refuse a kind of score that lacks what this objective needs; see `check`."""
        missing = sorted(self.required_caps(kind) - CAPABILITIES[kind], key=lambda c: c.name)
        if missing and kind in _NO_POLICY:
            raise IncompatibleObjective(self.name, kind, *_NO_POLICY[kind])
        if missing:
            reasons = [_WHY.get(cap, {}).get(kind, f"needs {cap.value}") for cap in missing]
            raise IncompatibleObjective(self.name, kind, "; ".join(dict.fromkeys(reasons)), self.instead)

    def check_beta(self, kind: Kind) -> None:
        """Refuse to guess a beta where none was published; see `check`."""
        if "beta" in self.__dataclass_fields__ and self.__dict__.get("beta") is None and kind not in self.default_beta:
            published = "; on denoising errors (mean over the latent) published values are 2000 to 5000"
            raise IncompatibleObjective(
                self.name,
                kind,
                "beta has no default here, because it depends on the scale of the score",
                f"set objective.beta{published if kind is Kind.BOUND else ''}",
            )

    def required_caps(self, kind: Kind) -> frozenset[Cap]:
        """The capabilities these settings need; may be fewer than `needs.caps`."""
        return self.needs.caps

    @property
    def rows_from(self) -> Source:
        """`source` in an image run: policy gradients on groups, which need likelihood ratios, take sampled transitions."""
        if self.source == "data" and "groups" in self.needs.layout:
            missing = self.required_caps(Kind.BOUND) - CAPABILITIES[Kind.BOUND]
            return "steps" if missing and not self.required_caps(Kind.STEP) - CAPABILITIES[Kind.STEP] else "data"
        return self.source

    @property
    def from_data(self) -> bool:
        """Whether sampled rows belong to images of the data, which they are compared with or begin at."""
        return self.rows_from in ("generated", "on_policy")

    @property
    def trains_steps(self) -> bool:
        """Whether an image run gives it transitions of a sampler, single or all of a trajectory, instead of images."""
        return self.rows_from in ("trajectories", "candidates", "steps", "whole_trajectories")

    def reads_reference(self) -> bool:
        """Whether these settings read the reference; may be more or less than `needs.reference`."""
        return self.needs.reference

    def reads_prompt(self) -> bool:
        """Whether these settings read `Scores.prompt_imitation`; may be less than `needs.prompt`."""
        return self.needs.prompt

    def beta_for(self, kind: Kind) -> float:
        """The beta in use: the field, or the default of this kind of score."""
        beta = self.__dict__.get("beta")
        return float(self.default_beta[kind] if beta is None else beta)

    def vocabulary(self) -> Mapping[str, TokenStatistic]:
        """Statistics over the vocabulary that the scorer must supply in `Scores.vocabulary`."""
        return {}

    def estimator(self) -> Estimator | None:
        """A fresh estimator, for objectives that need `stats`."""
        return None

    def round_advantage(self, groups: Groups) -> Tensor | None:
        """Advantages of all groups of a round, (M,), computed before it is cut; None: the objective makes none of them."""
        return None

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        """The loss at policy == reference, where it is a constant; a first step that differs from it raises an alarm.

        Of pairs without margins: a margin moves every logit. Weights multiply it.
        """
        return None

    def summary(self) -> dict[str, float | str]:
        """Numbers worth printing and storing with every checkpoint."""
        return {
            name: value
            for name in [f.name for f in fields(self)]
            if isinstance(value := getattr(self, name), (int, float, str)) and not isinstance(value, bool)
        }

    @abstractmethod
    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        """The loss.

        Args:
            scores: of N rows.
            layout: what is compared.
            stats: from the estimator.
        """


@dataclass(frozen=True, kw_only=True)
class BetaObjective(Objective):
    """Base of objectives with a beta that may be left out.

    Attributes:
        beta: strength of the pull to the reference, > 0. None takes the default of the kind of score. On denoising errors
            it is the published `beta_dpo`.
    """

    beta: float | None = None

    aliases: ClassVar[Mapping[str, str]] = {"beta_dpo": "beta"}

    def __post_init__(self) -> None:
        if self.beta is not None and self.beta <= 0:
            raise ValueError(f"beta is {self.beta}; expected a positive number")

    def summary(self) -> dict[str, float | str]:
        return {k: v for k, v in super().summary().items() if v is not None}


def detached(**metrics: Tensor) -> dict[str, Tensor]:
    """Metrics without gradient; `__` in a name stands for `/`."""
    return {name.replace("__", "/"): value.detach() for name, value in metrics.items()}


def as_rows(value: Tensor | float, like: Tensor) -> Tensor:
    """A scalar or tensor as a tensor of `like`'s type and device."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def read_stat(stats: Mapping[str, Tensor] | None, name: str, like: Tensor) -> Tensor:
    """A statistic from the estimator, of `like`'s type and device, without gradient.

    Raises:
        ValueError: it is missing.
    """
    if stats is None or name not in stats:
        raise ValueError(
            f"this objective reads the statistic {name!r}; pass stats=estimator.update(scores, layout) with the estimator "
            "from objective.estimator()"
        )
    return stats[name].detach().to(like)
