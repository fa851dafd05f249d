"""DMPO: Diffusion-DPO with the reverse KL divergence to the label's distribution as its link.

Paper: "Divergence Minimization Preference Optimization for Diffusion Model Alignment", Li et al. 2025, arXiv 2507.07510.
Code read: the implementation in AIDC-AI/Diffusion-SDPO:train.py; the paper was not.

Loss, per pair: p log(p / q) + (1 - p) log((1 - p) / (1 - q)), p = sigma(z), q = clamp(1 - a, 1e-6, 1 - 1e-6), z as in
Diffusion-DPO. It is EXO's link (arXiv 2402.00856) on denoising errors. With the launchers' a = 0.01 it starts at 1.614, not
at log 2; it is flat where z is very negative, and its minimum, 0 at p = q, is at z = log((1 - a) / a) = 4.6. The script's
own default is a = 0, which clamps to 1e-6 and starts at 6.215.

Defaults: a 0.01 and beta 2000 (SD1.5; SDXL a 0.01 and 6000), from the launchers of that repository (sd15_dmpo.sh,
sdxl_dmpo.sh).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.losses import links
from diffalign.losses.base import Needs, needs
from diffalign.losses.diffusion._common import Refusing
from diffalign.losses.pairwise import PairObjective, check_share
from diffalign.losses.scores import Cap, Kind

FLOOR = 1e-6  # of q and 1 - q


@dataclass(frozen=True, kw_only=True)
class DMPO(Refusing, PairObjective):
    """DMPO (Li et al. 2025, arXiv 2507.07510; code read: AIDC-AI/Diffusion-SDPO:train.py).

    KL(sigma(z) || 1 - a) of Bernoulli distributions: the reverse of the divergence that `dpo` minimises, so it seeks a mode
    instead of covering. `exo` is the same on texts. Pairs that are badly violated hardly pull.

    beta: 2000 on denoising errors (SD1.5 launcher; SDXL 6000).

    Attributes:
        label_smoothing: a; 0.01 (both launchers). 0, the script's own default, is taken as 1e-6: at 0 the loss is infinite.
    """

    label_smoothing: float = 0.01

    name: ClassVar[str] = "dmpo"
    title: ClassVar[str] = "DMPO"
    paper: ClassVar[str] = "2507.07510"
    composition: ClassVar[str] = "log-ratio -> beta (w - l) -> reverse KL"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.DIFFERENCE,))
    parity: ClassVar[str] = "AIDC-AI/Diffusion-SDPO train.py (formula)"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.BOUND: 2000.0}
    instead: ClassVar[str] = "use 'exo'"
    refused: ClassVar[Mapping[Kind, str]] = {Kind.TOKEN: "on texts this loss is EXO's, with a smoothing made for them"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "label_smoothing")

    def initial_loss(self, kind: Kind = Kind.TOKEN) -> float | None:
        """Of clean labels."""
        return float(self.link(torch.zeros(1, dtype=torch.float64), 1.0, 1.0))

    def link(self, z: Tensor, p: Tensor | float, beta: float) -> Tensor:
        return links.reverse_kl(z, max(self.label_smoothing, FLOOR), p)
