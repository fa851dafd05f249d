"""Diffusion-SDPO: the gradient of losers scaled down so that a step cannot raise the winners' error, around any pair loss.

Paper: "Diffusion-SDPO: Safeguarded Direct Preference Optimization for Diffusion Models", Fu et al. 2025, arXiv 2511.03317.
Code: AIDC-AI/Diffusion-SDPO:train.py, scripts/train/*.sh.

Before the loss, the losers' error becomes sg(e_l) + lam (e_l - sg(e_l)): the same value, lam times the gradient. With g_w
and g_l the gradients of the batch's mean errors at the network's output, lam = clamp((1 - mu) |g_w|^2 / <g_w, g_l>, 0, 1)
where <g_w, g_l> > 0, else 1; detached. In closed form (1 - mu) <r_w, r_w> / <r_l, r_w> of the residuals, no further backward
pass. To first order, a step then lowers the winners' error by at least mu of what it would without losers (at the output,
for pairs of equal slope).

*One* number per micro-batch, so it depends on how a step is split; `scope: pair` makes one per pair, which does not (ours).
Winner and loser are paired element by element through their shared noise, so a method that draws noise for each image is
refused. lam = 1 is the method inside; equal residuals give lam = 1 - mu, orthogonal ones 1.

The code has hard labels. Here the loser is the image that the label finds worse (ours): row l where p > 1/2, row w where p <
1/2 or a method turns the pair round itself (`smpo`, `capo` by their rewards). Where neither is pushed away (ties; `seppo`
with s = -1, two winners) nothing is damped, and the pair does not enter lam.

Defaults: mu 0.9 (launchers, SD1.5 with DPO and DMPO; 0.6 SDXL, 0.2 SD1.5 with DSPO), beta that of the method inside
(launchers: 5000 DPO; 2000 and 6000 DMPO; 0.001 and 5000 DSPO).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from diffalign import losses as core
from diffalign.losses.base import AnyLayout, BetaObjective, Estimator, LossOut, Needs, Objective, detached, needs
from diffalign.losses.composite import Mixed, adopt, build
from diffalign.losses.diffusion._common import Directed, label_direction, one_of, take
from diffalign.losses.layouts import Layout, Pairs
from diffalign.losses.scores import Cap, Kind, Scores


def safeguard(residual_w: Tensor, residual_l: Tensor, mu: float, scope: Literal["batch", "pair"] = "batch") -> Tensor:
    """lam: what losers' gradients are multiplied by, () or (P,), without gradient.

    Args:
        residual_w, residual_l: of winners and losers, (P, *latent).
        mu: share of the winners' pull that is kept, in [0, 1].
        scope: one number for all pairs, or one for each.
    """
    w, l = residual_w.detach().flatten(1), residual_l.detach().flatten(1)
    own, cross = w.square().sum(1), (w * l).sum(1)
    if scope == "batch":
        own, cross = own.sum(), cross.sum()
    opposed = cross > 0
    lam = (1 - mu) * own / torch.where(opposed, cross, torch.ones_like(cross))
    return torch.where(opposed, lam.clamp(0, 1), torch.ones_like(lam))


@dataclass(frozen=True, kw_only=True)
class SDPO(BetaObjective):
    """Diffusion-SDPO (Fu et al. 2025, arXiv 2511.03317; official code AIDC-AI/Diffusion-SDPO:train.py).

    Any pair loss on denoising errors, with the losers' gradient multiplied by lam so that pushing losers away does not drag
    winners along; the loss's value is that of the base. DPO raises both errors while its accuracy improves (likelihood
    displacement); this is the remedy. Noising and the source of rows are the base's. The loser is the row that the label
    finds worse: w where p < 1/2 or where the base reads rewards that say so; where no row is pushed away nothing is scaled.

    Attributes:
        beta: of the base; None takes the base's default.
        base: name of an objective that reads pairs alone, at one noise for both images; dpo, dmpo and dspo are published.
        settings: of the base, by name.
        mu: in [0, 1]; larger protects winners more. 0.9 (launchers for SD1.5 with dpo and dmpo; 0.6 SDXL, 0.2 SD1.5 with
            dspo).
        scope: "batch": one lam per micro-batch (official); "pair": one per pair, whatever the micro-batch.
    """

    base: str = "dpo"
    settings: Mapping[str, Any] = field(default_factory=dict)
    mu: float = 0.9
    scope: Literal["batch", "pair"] = "batch"

    name: ClassVar[str] = "sdpo"
    title: ClassVar[str] = "Diffusion-SDPO"
    paper: ClassVar[str] = "2511.03317"
    composition: ClassVar[str] = "base, with the gradient of l scaled to spare w"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.RESIDUAL, Cap.ERROR))
    parity: ClassVar[str] = "AIDC-AI/Diffusion-SDPO train.py (formula)"
    instead: ClassVar[str] = "use 'dpop', which holds the chosen up on other scores"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "scope", ("batch", "pair"))
        if not 0 <= self.mu <= 1:
            raise ValueError(f"mu is {self.mu}; expected 0 <= mu <= 1")
        if "beta" in self.settings:
            raise ValueError("settings hold a beta; set the objective's own beta")
        if self.inner.noise == "independent":
            raise ValueError(
                f"base is {self.base!r}, whose two images have noise of their own; expected one with shared noise, through "
                "which sdpo pairs their errors element by element"
            )
        if isinstance(self.inner, Mixed) and any(isinstance(part, Directed) for part in self.inner.parts.values()):
            raise ValueError(
                f"base is 'mixed' of {', '.join(self.inner.losses)}, which may disagree on which image loses"
            )
        adopt(self, [self.inner])

    @cached_property
    def inner(self) -> Objective:
        """The base objective."""
        cls = core.catalogue().get(self.base)
        if cls is None or cls.needs.layout != ("pairs",) or cls.needs.old or issubclass(cls, SDPO):
            raise ValueError(f"base is {self.base!r}; expected the name of an objective that reads pairs alone")
        beta = {"beta": self.beta} if "beta" in cls.__dataclass_fields__ else {}
        if not beta and self.beta is not None:
            raise ValueError(f"{self.base} has no beta; leave sdpo's out")
        return build(cls, beta | dict(self.settings))

    def required_caps(self, kind: Kind) -> frozenset[Cap]:
        return type(self).needs.caps  # the base checks its own

    def check_beta(self, kind: Kind) -> None:
        self.inner.check(kind)

    def beta_for(self, kind: Kind) -> float:
        """That of the base; 0 where it has none."""
        return cast(BetaObjective, self.inner).beta_for(kind) if "beta" in self.inner.__dataclass_fields__ else 0.0

    def reads_reference(self) -> bool:
        return self.inner.reads_reference()

    def estimator(self) -> Estimator | None:
        return self.inner.estimator()

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return self.inner.initial_loss(kind)

    def summary(self) -> dict[str, float | str]:
        return self.inner.summary() | super().summary()

    def direction(self, scores: Scores, pairs: Pairs) -> Tensor:
        """1 where row l is the loser, -1 where row w is, 0 where neither is, (P,)."""
        inner = self.inner
        return inner.direction(scores, pairs) if isinstance(inner, Directed) else label_direction(pairs, scores.theta)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        layout = Layout.of(layout)
        pairs, residual = layout.need_pairs(), scores.need_residual()
        direction = self.direction(scores, pairs)
        ahead, decided = direction > 0, direction != 0
        winners, losers = (torch.where(ahead, *sides)[decided] for sides in ((pairs.w, pairs.l), (pairs.l, pairs.w)))
        lam = safeguard(residual[winners], residual[losers], self.mu, self.scope)
        # Rows of their own for every side of every pair, since a row may win one pair and lose another; then all rows again.
        count, others = len(pairs), layout.items is not None
        everything = torch.arange(len(scores), device=pairs.w.device)
        rows = torch.cat([pairs.w, pairs.l, everything[: len(scores) if others else 0]])
        own = Pairs.halves(count, device=pairs.w.device)
        moved = replace(layout, pairs=replace(pairs, w=own.w, l=own.l))
        if layout.items is not None:
            moved = replace(moved, items=replace(layout.items, index=layout.items.index + 2 * count))
        share = torch.ones(len(rows), dtype=scores.theta.dtype, device=scores.theta.device)
        share[torch.where(ahead, own.l, own.w)[decided]] = lam
        out = self.inner(_scaled(take(scores, rows), share), moved, stats)
        return LossOut(out.per_item, out.metrics | detached(loser_gradient=lam.reshape(-1)))


def _scaled(scores: Scores, share: Tensor) -> Scores:
    """The same values, every row's gradient multiplied by its share."""

    def scale(x: Tensor | None) -> Tensor | None:
        if x is None or not x.requires_grad:
            return x
        by = share.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        return x.detach() + by * (x - x.detach())

    theta = scale(scores.theta)
    assert theta is not None
    return replace(
        scores,
        theta=theta,
        error=scale(scores.error),
        imitation=scale(scores.imitation),
        residual=scale(scores.residual),
    )
