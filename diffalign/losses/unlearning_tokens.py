"""Unlearning on single tokens and on the distribution over the vocabulary; see `unlearning` for the retain side.

Defaults are those of locuslab/open-unlearning where it has the method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.losses import vocabulary
from diffalign.losses.base import Estimator, Needs, TokenStatistic
from diffalign.losses.fine_grained import masked_sum, unit_log_ratio
from diffalign.losses.layouts import Layout
from diffalign.losses.pairwise import BETA
from diffalign.losses.scores import Cap, Kind, Scores, lift
from diffalign.losses.transforms import log1mexp
from diffalign.losses.unlearning import Side, Unlearning, item_needs, split

USE_NPO = "use npo, which needs differences to a reference only"
PER_TOKEN = (Cap.UNITS, Cap.PROBABILITY)


@dataclass(frozen=True, kw_only=True)
class WGA(Unlearning):
    """Weighted gradient ascent: - mean p_t^beta nll_t with the weight detached. arXiv id from memory.

    What is already unlikely stops counting, as in NPO but token by token and without a reference. beta 0 is gradient ascent.

    Attributes:
        beta: 1 (open-unlearning).
    """

    beta: float = 1.0

    name: ClassVar[str] = "wga"
    title: ClassVar[str] = "WGA"
    paper: ClassVar[str] = "2502.19301?"
    composition: ClassVar[str] = "- sg(p^beta) NLL per token of forget rows; + retain"
    needs: ClassVar[Needs] = item_needs(*PER_TOKEN)
    parity: ClassVar[str] = "open-unlearning WGA (formula)"
    instead: ClassVar[str] = USE_NPO

    def forget(self, scores: Scores, side: Side) -> Tensor:
        logp = lift(scores.need_units().theta)
        return self.over_tokens((self.beta * logp.detach()).exp() * logp, scores, side)


@dataclass(frozen=True, kw_only=True)
class SatImp(Unlearning):
    """SatImp: - mean p_t^beta1 (1 - p_t)^beta2 nll_t with the weights detached. arXiv id from memory.

    The first factor ends what is forgotten already (saturation), the second spares what is certain (importance).

    beta1 5, beta2 1, gamma 0.1 (open-unlearning).

    Attributes:
        beta1, beta2: exponents.
    """

    gamma: float = 0.1
    beta1: float = 5.0
    beta2: float = 1.0

    name: ClassVar[str] = "satimp"
    title: ClassVar[str] = "SatImp"
    paper: ClassVar[str] = "2505.11953?"
    composition: ClassVar[str] = "- sg(p^beta1 (1 - p)^beta2) NLL per token of forget rows; + retain"
    needs: ClassVar[Needs] = item_needs(*PER_TOKEN)
    parity: ClassVar[str] = "open-unlearning SatImp (formula)"
    instead: ClassVar[str] = USE_NPO

    def forget(self, scores: Scores, side: Side) -> Tensor:
        logp = lift(scores.need_units().theta)
        fixed = logp.detach()
        weight = (self.beta1 * fixed).exp() * (-fixed.expm1()).clamp(min=0.0) ** self.beta2
        return self.over_tokens(weight * logp, scores, side)


@dataclass(frozen=True, kw_only=True)
class CATNIP(Unlearning):
    """CATNIP (arXiv 2602.02824), experimental: NPO per token against a calibrator instead of a frozen reference.

    -(2 / beta) mean_t log sigma(-beta (log p_t - c_t)), without a retain set. c_t, detached, is "confidence": log(1 - p_t),
    so that the slope 2 sigma(beta logit p_t) grows with the model's confidence (with gradient it would gain 1 / (1 - p_t)
    and explode); "constant": delta; or "reference": the frozen one, which is NPO per token.

    Attributes:
        beta: 0.1, as NPO's.
        calibrator: c_t.
        delta: of "constant", in nats.
    """

    retain: Literal["nll", "kl", "none"] = "none"
    beta: float = 0.1
    calibrator: Literal["confidence", "constant", "reference"] = "confidence"
    delta: float = 0.0

    name: ClassVar[str] = "catnip"
    title: ClassVar[str] = "CATNIP"
    paper: ClassVar[str] = "2602.02824"
    composition: ClassVar[str] = "log p_t - c_t -> -beta -> logistic, 2 / beta, per token of forget rows"
    needs: ClassVar[Needs] = item_needs(*PER_TOKEN)
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = "the paper's loss: this is a reconstruction from its abstract"
    instead: ClassVar[str] = USE_NPO

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta is {self.beta}; expected a positive number")

    def reads_reference(self) -> bool:
        return self.calibrator == "reference" or super().reads_reference()

    def forget(self, scores: Scores, side: Side) -> Tensor:
        units = scores.need_units()
        logp = lift(units.theta)
        if self.calibrator == "reference":
            gap = unit_log_ratio(units)
        elif self.calibrator == "constant":
            gap = logp - self.delta
        else:
            gap = logp - log1mexp(logp.detach())
        return self.over_tokens(-2 / self.beta * logsigmoid(-self.beta * gap), scores, side)


@dataclass(frozen=True, kw_only=True)
class CEU(Unlearning):
    """CE-U (arXiv 2503.01224): cross-entropy to the model's own distribution with the true token left out.

    Bounded, reference-free, and without a retain set as released. The first answer tokens are skipped, on which the form of
    an answer depends.

    Attributes:
        skip_first: tokens of every response that do not count; 1 as released.
    """

    retain: Literal["nll", "kl", "none"] = "none"
    skip_first: int = 1

    name: ClassVar[str] = "ce_u"
    title: ClassVar[str] = "CE-U"
    paper: ClassVar[str] = "2503.01224"
    composition: ClassVar[str] = "cross-entropy to the own distribution without the label, on forget rows"
    needs: ClassVar[Needs] = item_needs(Cap.VOCABULARY, Cap.UNITS)
    parity: ClassVar[str] = "open-unlearning CE-U (formula)"
    instead: ClassVar[str] = USE_NPO

    def statistic(self) -> Mapping[str, TokenStatistic]:
        return {"ce_u": vocabulary.ce_u}

    def forget(self, scores: Scores, side: Side) -> Tensor:
        mask = scores.need_units().mask[side.rows]
        mask = mask & (mask.cumsum(1) > self.skip_first)
        # The counts of the step include the tokens that are skipped.
        sums = masked_sum(scores.need_vocabulary("ce_u")[side.rows], mask)
        return side.without(self.skip_first).average(sums, mask.sum(1), self.reduction)


@dataclass(frozen=True, kw_only=True)
class UNDIAL(Unlearning):
    """UNDIAL: distil from the reference with `strength` taken off the true token's logit. arXiv id from memory.

    Released as an average over *all* positions, prompt included; here over the response unless `positions` says all.
    strength 10, no retain term (alpha 0, open-unlearning).

    Attributes:
        strength: in logits (called beta in open-unlearning).
    """

    alpha: float = 0.0
    retain: Literal["nll", "kl", "none"] = "none"
    strength: float = 10.0

    name: ClassVar[str] = "undial"
    title: ClassVar[str] = "UNDIAL"
    paper: ClassVar[str] = "2402.10052?"
    composition: ClassVar[str] = "cross-entropy to softmax(reference logits - strength onehot(label)), on forget rows"
    needs: ClassVar[Needs] = item_needs(Cap.VOCABULARY, Cap.UNITS, reference=True)
    parity: ClassVar[str] = "open-unlearning UNDIAL (formula)"
    instead: ClassVar[str] = USE_NPO

    def statistic(self) -> Mapping[str, TokenStatistic]:
        return {"undial": partial(vocabulary.undial, strength=self.strength)}

    def forget(self, scores: Scores, side: Side) -> Tensor:
        return self.over_positions(scores.need_vocabulary("undial"), scores, side)


@dataclass(frozen=True, kw_only=True)
class DiPO(Unlearning):
    """Distribution preference optimisation (arXiv 2510.04773), experimental: TDPO between two distributions.

    -log sigma(beta (rho(q_f) - rho(q_m))) with rho(q) = sum_t E_{v ~ q_t}[log p(v) - log p_ref(v)]; q_m promotes and q_f
    demotes the model's own `top_k` largest logits by `strength` (see `vocabulary.dipo_term`).

    Attributes:
        beta: 0.1 on tokens is ours.
        strength, top_k: of both distributions; ours.
    """

    beta: float | None = None
    strength: float = 1.0
    top_k: int = 10

    name: ClassVar[str] = "dipo"
    title: ClassVar[str] = "DiPO"
    paper: ClassVar[str] = "2510.04773"
    composition: ClassVar[str] = "expected log-ratio -> beta (demoted - promoted) -> logistic, on forget rows; + retain"
    needs: ClassVar[Needs] = item_needs(Cap.VOCABULARY, Cap.UNITS, reference=True)
    status: ClassVar[Literal["stable", "experimental"]] = "experimental"
    unknown: ClassVar[str] = (
        "how both distributions are built, all constants, and the loss itself, which is a reconstruction"
    )
    instead: ClassVar[str] = USE_NPO
    default_beta: ClassVar[Mapping[Kind, float]] = BETA

    def __post_init__(self) -> None:
        if (self.beta is not None and self.beta <= 0) or self.strength <= 0 or self.top_k < 1:
            raise ValueError(
                f"beta is {self.beta}, strength {self.strength}, top_k {self.top_k}; expected positive numbers"
            )

    def statistic(self) -> Mapping[str, TokenStatistic]:
        term = vocabulary.dipo_term
        return {
            "dipo_forget": partial(term, strength=-self.strength, top_k=self.top_k),
            "dipo_memory": partial(term, strength=self.strength, top_k=self.top_k),
        }

    def forget(self, scores: Scores, side: Side) -> Tensor:
        gap = scores.need_vocabulary("dipo_forget") - scores.need_vocabulary("dipo_memory")
        return -logsigmoid(self.beta_for(scores.kind) * masked_sum(gap, scores.need_units().mask)[side.rows])


class DualVariable(Estimator):
    """The multiplier of a constraint "retain loss <= bound", by dual ascent.

    `update` returns the multiplier in use, "dual", and then moves it by step_size times the violation of this batch (over
    all processes), never below 0: call it once per optimiser step.
    """

    def __init__(self, objective: PDU) -> None:
        self.objective = objective
        self.value = objective.alpha
        self.updates = 0

    def update(
        self, scores: Scores, layout: Layout, gather: Callable[[Tensor], Tensor] = lambda x: x
    ) -> dict[str, Tensor]:
        used = torch.tensor(self.value, device=scores.theta.device)
        with torch.no_grad():
            _, _, side = split(scores, layout.as_items())
            # Without the counts of the step, so that these values average to the mean of this batch.
            violations = self.objective.retained(scores, Side(side.rows, 1.0, 1.0))
            count = self.objective.retained_units(scores, side.rows)
            total = gather(torch.stack([violations.sum() / max(len(violations), 1) * count, count])[None]).sum(0)
        self.updates += 1
        if total[1] > 0 and self.updates > self.objective.dual_warmup:
            self.value = max(0.0, self.value + self.objective.dual_step_size * float(total[0] / total[1]))
        return {"dual": used}

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value, self.updates = float(state["value"]), int(state["updates"])


@dataclass(frozen=True, kw_only=True)
class PDU(Unlearning):
    """Primal-dual unlearning: flatten the distribution on forget rows under a constraint on the retain loss.

    gamma mean (largest logit - mean logit)^2 + dual (retain loss - retain_bound); the multiplier starts at alpha and follows
    dual ascent (`DualVariable`). dual_step_size 0 keeps it. Released as an average over all positions, see `positions`.
    arXiv id from memory. Defaults: open-unlearning.

    Attributes:
        retain_bound: what the retain loss may be (`retain_loss_eps`).
        dual_step_size: of dual ascent; 1 as released.
        dual_warmup: updates before it begins.
    """

    retain_bound: float = 0.0
    dual_step_size: float = 1.0
    dual_warmup: int = 0

    name: ClassVar[str] = "pdu"
    title: ClassVar[str] = "PDU"
    paper: ClassVar[str] = "2506.05314?"
    composition: ClassVar[str] = "(max logit - mean logit)^2 on forget rows; + dual (retain - bound)"
    needs: ClassVar[Needs] = item_needs(Cap.VOCABULARY, Cap.UNITS, stats=("dual",))
    parity: ClassVar[str] = "open-unlearning PDU (formula)"
    instead: ClassVar[str] = USE_NPO

    def __post_init__(self) -> None:
        if self.retain == "none":
            raise ValueError("pdu constrains the retain loss; set retain to nll or kl")

    def estimator(self) -> Estimator:
        return DualVariable(self)

    def statistic(self) -> Mapping[str, TokenStatistic]:
        return {"pdu": vocabulary.pdu}

    def forget(self, scores: Scores, side: Side) -> Tensor:
        return self.over_positions(scores.need_vocabulary("pdu"), scores, side)

    def retain_factor(self, stats: Mapping[str, Tensor] | None) -> Tensor:
        if stats is None or "dual" not in stats:
            raise ValueError("pdu needs the multiplier 'dual' from its estimator; got no such statistic")
        return stats["dual"].detach()

    def retained_units(self, scores: Scores, rows: Tensor) -> Tensor:
        """What the retain loss of these rows is an average over: tokens or rows."""
        if scores.length is None or self.reduction == "sequence" or self.positions == "all":
            return torch.tensor(float(len(rows)), device=scores.theta.device, dtype=scores.theta.dtype)
        return scores.length[rows].sum()

    def retained(self, scores: Scores, side: Side) -> Tensor:
        return super().retained(scores, side) - self.retain_bound
