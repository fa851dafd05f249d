"""Subject-driven RPO: fine-tuning on a subject's images plus a preference whose label is drawn from a harmonic-mean reward.

Paper: "Subject-driven Text-to-Image Generation via Preference-based Reinforcement Learning", Miao et al. 2024 (NeurIPS),
arXiv 2407.12164. Code: andrew-miao/RPO:train.py, train_sdxl.py, datasets_utils.py, evaluation_metrics.py. (`rpo` is another
method.)

Loss, per pair of a subject image R and a generated one G, which have *different prompts*:
    e(R) - y log sigma(beta k) - (1 - y) log sigma(-beta k), k = (e_ref(R) - e(R)) - (e_ref(G) - e(G))
with y drawn from Bernoulli(sigma(reward(R) - reward(G))) at every access; the reward is `lambda_harmonic` of image and text
similarity. y goes into `pairs.p`; the probability itself (`preference_probability`) gives the expected loss without the
noise of the draw.

The two scripts differ, and this class follows one in each point. beta: train.py (SD) has the argument and does not use it
(so 1), train_sdxl.py multiplies by it, and so does this. Noise: train.py draws timestep and noise for each image apart, as
here; train_sdxl.py copies those of the first half to the second, so that both members of a pair share them
(`denoising.noise: shared` in a config). The README calls the SDXL script not evaluated.

Weakness of the published settings: at beta 1 k stays near 0.01, so the slope is (sigma(k) - y), about +-1/2, against an
imitation term of slope 1; reward gaps of 0.05 to 0.2 make labels that are right with probability 0.51 to 0.55, and the
expected force of the preference is 0.01 to 0.05 of the imitation: mostly label noise. For a real preference raise beta to
the order of 1000 and sharpen the reward (`temperature`).

Defaults: beta 1; lambda 0 in training (text only), 0.3 to 0.7 for choosing the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from diffalign.losses import reduce
from diffalign.losses.base import AnyLayout, LossOut, Needs, detached, needs
from diffalign.losses.diffusion._common import positive
from diffalign.losses.layouts import Layout
from diffalign.losses.pairwise import LogisticPair
from diffalign.losses.scores import Cap, Kind, Scores, lift


def lambda_harmonic(image_similarity: Tensor, text_similarity: Tensor, lam: float) -> Tensor:
    """The lambda-harmonic reward 1 / (lambda / S_image + (1 - lambda) / S_text), S = (cosine + 1) / 2, in (0, 1], (B,).

    lambda 0 is the text's similarity, 1 the image's; never above their arithmetic mean. The code's 1e-8 stands in every
    denominator.

    Args:
        image_similarity: cosine with the subject's images, averaged over them, in [-1, 1], (B,).
        text_similarity: cosine with the prompt, in [-1, 1], (B,).
        lam: lambda in [0, 1].

    Raises:
        ValueError: `lam` outside [0, 1].
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lambda is {lam}; expected 0 <= lambda <= 1")
    image, text = ((lift(x) + 1) / 2 for x in (image_similarity, text_similarity))
    return 1 / (lam / (image + 1e-8) + (1 - lam) / (text + 1e-8) + 1e-8)


def preference_probability(reward_w: Tensor, reward_l: Tensor, temperature: float = 1.0) -> Tensor:
    """sigma((reward_w - reward_l) / temperature), (B,): what labels are drawn with, or `Pairs.p` itself.

    At the published temperature 1 rewards in [0, 1] give labels that are nearly coin flips.
    """
    return ((lift(reward_w) - lift(reward_l)) / temperature).sigmoid()


@dataclass(frozen=True, kw_only=True)
class SubjectRPO(LogisticPair):
    """Subject-driven RPO (Miao et al. 2024, arXiv 2407.12164; official code andrew-miao/RPO).

    e_w - p log sigma(beta k) - (1 - p) log sigma(-beta k), k = (e_w_ref - e_w) - (e_l_ref - e_l): w is an image of the
    subject, l one that the base model generated from another prompt. `pairs.p` is the label drawn from the lambda-harmonic
    reward, or its probability. With the published beta the preference is hardly felt beside the imitation, and its labels
    are nearly coin flips; raise beta by 1000 and lower the temperature of the label for a real preference. Each image has
    its own timestep and noise, as in the SD script; the SDXL script shares them within a pair (`denoising.noise: shared`).

    beta: 1 on differences of denoising errors (SDXL script; the SD script ignores its own).

    Attributes:
        imitation_weight: of e_w; 1 (official).
    """

    imitation_weight: float = 1.0

    name: ClassVar[str] = "subject_rpo"
    title: ClassVar[str] = "RPO (subject-driven)"
    paper: ClassVar[str] = "2407.12164"
    composition: ClassVar[str] = "difference of errors -> beta (w - l) -> logistic of a drawn label + error of w"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.DIFFERENCE, Cap.ERROR, Cap.IMITATION))
    parity: ClassVar[str] = "andrew-miao/RPO train_sdxl.py, noise of train.py (formula)"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.BOUND: 1.0}
    instead: ClassVar[str] = "use 'rpo', DPO with imitation of the chosen"
    noise: ClassVar[Literal["shared", "independent"]] = "independent"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "imitation_weight", zero=True)

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        return None if self.imitation_weight else super().initial_loss(kind)

    def transform(self, scores: Scores) -> Tensor:
        return 2 * scores.log_ratio()  # e_ref - e

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        pairs, out = Layout.of(layout).need_pairs(), super().__call__(scores, layout, stats)
        imitation = reduce.imitation(scores, pairs.w)
        loss = out.per_item + self.imitation_weight * pairs.weight * imitation
        return LossOut(loss, out.metrics | detached(imitation=imitation))
