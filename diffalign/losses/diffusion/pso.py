"""PSO: pairwise sample optimisation of few-step distilled models, online and for personalisation.

Paper: "Tuning Timestep-Distilled Diffusion Model Using Pairwise Sample Optimization", Miao et al. 2024 (ICLR 2025), arXiv
2410.03190. Code:
ZichenMiao/Pairwise_Sample_Optimization:human_preference_tuning/{train_online_pso_sdxl_turbo,train_online_pso_sdxl_dmd2}.py,
personalization/train_pso_sdxl_turbo_dreambooth.py and its scripts.

Online (`pso`): D3PO's loss on transitions of the distilled sampler, beta 50 and clip 0.1, so |z| <= 10.03. The last step is
deterministic (or has no noise to score) and is left out: 3 of 4 steps of Turbo, 7 of 8 of DMD2. Turbo's Euler-ancestral step
is DDIM's at eta 1 on the same levels. DMD2's is not in a run's samplers: it noises the predicted image anew, with mean
sqrt(abar_prev) x_0 and deviation sqrt(1 - abar_prev), above DDIM's at any eta up to 1; the loss takes its transitions from a
caller who samples them. Ties count as a win of the
second image in the code, and with several rewards one is drawn per element; both make labels noisy and are the data's
business (p = 1/2 is a tie here).

Personalisation (`pso_personal`): with a = e_w - eta e_l of instance images w and images l that the untouched model
generated,
    "hinge" (the code's `pso_db`, no reference): relu(1 + beta a) + lambda e_l
    "logistic" (the code's `pso`): -log sigma(beta [(e_ref_w - eta e_ref_l) - (e_w - eta e_l)]) + lambda e_l
The code's default for the loss type is no valid name and must be set; "hinge" is what its scripts set.

The vanishing negatives: while the hinge is active, the coefficient of e_l is lambda - beta eta, which at the shipped values
(5, 0.1, 0.5) is *zero*. The generated images then have no gradient at all, and the loss is 1 + 5 e_w: denoising fine-tuning
on the instance images. The hinge is inactive only where 5 e_w < 0.5 e_l - 1, which errors below 2 never reach. Set
negative_weight below beta eta to push generated images away.

The code weighs x_0-errors by 1 / sigma^2, which is the error of the noise; errors of a network that predicts noise are
meant. Timesteps lie on the distilled grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import relu, softplus

from diffalign.losses.base import AnyLayout, BetaObjective, LossOut, Needs, Sampling, detached, needs
from diffalign.losses.diffusion._common import either_way, one_of, positive
from diffalign.losses.diffusion.d3po import ClippedPair
from diffalign.losses.layouts import Layout
from diffalign.losses.pairwise import pair_metrics
from diffalign.losses.scores import Cap, Kind, Scores


@dataclass(frozen=True, kw_only=True)
class PSO(ClippedPair):
    """Online pairwise sample optimisation (Miao et al. 2024, arXiv 2410.03190; official code
    ZichenMiao/Pairwise_Sample_Optimization).

    `d3po`'s clipped loss on the transitions of a few-step distilled sampler, the deterministic last step left out. Runs
    sample with DDIM, which at eta 1 is Turbo's Euler-ancestral step; DMD2's sampler, which noises the predicted image anew
    at every step, is missing.

    beta: 50 on transitions (official): |z| <= 10.03.
    """

    name: ClassVar[str] = "pso"
    title: ClassVar[str] = "PSO (online)"
    paper: ClassVar[str] = "2410.03190"
    composition: ClassVar[str] = "log-ratio of a distilled transition, clipped -> beta (w - l) -> logistic"
    parity: ClassVar[str] = "ZichenMiao/Pairwise_Sample_Optimization train_online_pso_sdxl_turbo.py (formula)"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.STEP: 50.0}
    sampling: ClassVar[Sampling] = Sampling(shared_start=False)


@dataclass(frozen=True, kw_only=True)
class PSOPersonal(BetaObjective):
    """PSO for personalisation (Miao et al. 2024, arXiv 2410.03190; official code ZichenMiao/Pairwise_Sample_Optimization).

    relu(1 + beta (e_w - eta e_l)) + negative_weight e_l: w are images of the subject, l images that the model generated
    before training. With the shipped values the generated images have *no* gradient: beta eta = negative_weight, and what is
    left while the hinge is active (always, for errors below 2) is 1 + 5 e_w, fine-tuning on the subject. Set
    `negative_weight` below beta eta to push them away.

    beta: 5 on denoising errors (launcher), of differences of errors.

    Attributes:
        form: "hinge" (launchers; no reference), or "logistic": -log sigma of beta times the same margin relative to the
            reference.
        eta: share of the generated images' error in the margin; 0.1 (launcher).
        negative_weight: lambda of the generated images' error; 0.5 (launcher).
    """

    form: Literal["hinge", "logistic"] = "hinge"
    eta: float = 0.1
    negative_weight: float = 0.5

    name: ClassVar[str] = "pso_personal"
    title: ClassVar[str] = "PSO (personalisation)"
    paper: ClassVar[str] = "2410.03190"
    composition: ClassVar[str] = "error -> beta (eta e_l - e_w) -> hinge at 1 + lambda error of l"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.ERROR,), reference=False)
    parity: ClassVar[str] = "ZichenMiao/Pairwise_Sample_Optimization train_pso_sdxl_turbo_dreambooth.py (formula)"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.BOUND: 5.0}
    instead: ClassVar[str] = "use 'slic' or 'cpo', its relatives on log-probabilities, or 'pso' on transitions"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "form", ("hinge", "logistic"))
        positive(self, "eta", "negative_weight", zero=True)

    def reads_reference(self) -> bool:
        return self.form == "logistic"

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs, e = Layout.of(layout).need_pairs(), scores.need_error()
        beta = self.beta_for(scores.kind)
        # Of the errors, or of the differences to the reference's; ref is minus one half of an error.
        d = e if self.form == "hinge" else e + 2 * scores.need_ref()

        def loss(win: Tensor, lose: Tensor, margin: Tensor | float) -> Tensor:
            z = -beta * (d[win] - self.eta * d[lose]) - margin
            cost = relu(1 - z) if self.form == "hinge" else softplus(-z)
            return cost + self.negative_weight * e[lose]

        w, l = -beta * d[pairs.w], -beta * self.eta * d[pairs.l]
        metrics = pair_metrics(w - l, w, l, scores, pairs)
        active = (w - l - pairs.margin < 1).to(w.dtype)
        return LossOut(pairs.weight * either_way(pairs, loss), metrics | detached(hinge_active=active))
