"""CHATS: one model of chosen images and one of rejected ones, trained together, for both branches of guidance.

Paper: "CHATS: Combining human-aligned optimization and test-time sampling for text-to-image generation", arXiv 2502.12579
(ICML 2025). Code read: AIDC-AI/CHATS:train.py and pipelines.

Both start from the base, which is the reference, and a pair shares its timestep and noise. Each model becomes better at its
own side, the other's success making up for a failure,

    z = beta (r_w + r_l),   r_w of the chosen image by the first model, r_l of the rejected one by the second

with a *plus*, and r = score - reference's score. Guidance then leads from the model of rejected images to that of chosen
ones, and the prompt of the negative branch is (1 + a) empty - a prompt, for sequence and pooled embeddings alike.

Here the models are two adapters on one frozen network (`negative.train: joint`). The published loss has no 1/2 before the
errors: its beta of 1000 is 2000 on our scores. The code empties (zeroes) the prompts of rejected images for whole batches,
with probability 1/2; here each image's own draw decides (`negative.proportion_empty_prompts`), so that a sample does not
depend on its batch. An emptied prompt is what the model's negative branch is told (SDXL 1.0: zeros). The
reference of a rejected image has the same prompt.

Published otherwise: learning rate 3e-9 (SDXL) and 1e-9 (SD1.5) times devices x batch x accumulation, 6000 and 2000 steps,
full weights, Adafactor, a = 0.5, guidance 5 counted from the positive branch, which diffusers calls 6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffalign.losses import links
from diffalign.losses.base import AnyLayout, BetaObjective, LossOut, Needs, as_rows, needs
from diffalign.losses.diffusion._common import Refusing
from diffalign.losses.layouts import Layout
from diffalign.losses.pairwise import pair_metrics
from diffalign.losses.scores import Kind, Scores


@dataclass(frozen=True, kw_only=True)
class CHATS(Refusing, BetaObjective):
    """CHATS (Fu et al. 2025, arXiv 2502.12579; official code AIDC-AI/CHATS).

    -log sigma(beta (r_w + r_l)) of scores in which every side has a model of its own, see the top of the file. A pair whose
    label is uncertain weighs 2 p - 1, since its images belong to no side. "margin" and "accuracy" in the log are those of
    r_w + r_l, which starts at 0.

    beta: 2000 on denoising errors (code: 1000 on whole errors).
    """

    name: ClassVar[str] = "chats"
    title: ClassVar[str] = "CHATS"
    paper: ClassVar[str] = "2502.12579"
    composition: ClassVar[str] = "log-ratios of two models, each on its side -> w + l -> beta -> logistic"
    needs: ClassVar[Needs] = needs("pairs")
    parity: ClassVar[str] = "AIDC-AI/CHATS train.py (formula)"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.BOUND: 2000.0}
    instead: ClassVar[str] = "its two models are adapters of a denoising network; use dpo"
    joint: ClassVar[bool] = True
    refused: ClassVar[Mapping[Kind, str]] = dict.fromkeys(
        (Kind.TOKEN, Kind.STEP),
        "chosen and rejected rows need models of their own, which only denoising networks have here",
    )

    def initial_loss(self, kind: Kind = Kind.BOUND) -> float | None:
        return math.log(2)

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs, reward = Layout.of(layout).need_pairs(), self.beta_for(scores.kind) * scores.log_ratio()
        w, l = reward[pairs.w], reward[pairs.l]
        certain = (2 * as_rows(pairs.p, reward) - 1).clamp(min=0)
        loss = certain * links.logistic(w + l - pairs.margin)
        metrics = pair_metrics(w + l, w, l, scores, pairs) | {
            "weight": (pairs.weight * certain).detach().expand_as(loss)
        }
        return LossOut(pairs.weight * loss, metrics)
