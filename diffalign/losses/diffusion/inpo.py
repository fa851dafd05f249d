"""DDIM-InPO: Diffusion-DPO on latents that DDIM inversion of the images reaches, instead of on freshly noised ones.

Paper: "InPO: Inversion Preference Optimization with Reparametrized DDIM for Efficient Diffusion Model Alignment", Lu et al.
2025 (CVPR), arXiv 2503.18454. Code: JaydenLyh/InPO:train.py, examples/{sd15,sdxl}.sh.

Loss, per pair, as in Diffusion-DPO: -log sigma(z), z = -(beta / 2) [(e_w - e_w_ref) - (e_l - e_l_ref)], e the mean squared
error over the latent. What is new is where it is measured: x_t comes from running DDIM backwards from x_0 with the current
policy (prompt given, no guidance, no gradient), and the target is the noise that this x_t implies, tau = (x_t - sqrt(abar_t)
x_0) / sqrt(1 - abar_t), so that winner and loser have different targets. The loss sees none of it: `noising` tells whoever
makes x_t.

Paper and code differ, or the code with itself (how the rows are noised, not the loss):
- The released code inverts to the last grid point s below t but asks the network at t, up to 99 steps away; tau then mixes
  in a part of the image. The principled form makes the last step land on t.
- Its optional noise per inversion step reads the schedule at s + 100, past the end of a 1000-entry table wherever t > 901,
  so the published results cannot come from that branch.
- Summaries say that the reference does the inversion; the code uses the policy.
- For t <= 1 its grid is empty and x_t = x_0; leave such t out.
- It reads the first timestep of a batch only, so it is right for one pair per device.

Defaults: beta 2000 (SD1.5 launcher, which starts from an SFT checkpoint; SDXL: 5000 from the base). Paper body second-hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from diffalign.losses.base import Needs, needs
from diffalign.losses.pairwise import LogisticPair
from diffalign.losses.scores import Cap, Kind


@dataclass(frozen=True, kw_only=True)
class DDIMInPO(LogisticPair):
    """DDIM-InPO (Lu et al. 2025, arXiv 2503.18454; official code JaydenLyh/InPO:train.py).

    Diffusion-DPO's loss on latents made by DDIM inversion, against the noise that those latents imply: only latents that
    belong to the images are trained (published: 400 steps at 1024 pairs). `inpo` is another method, iterative Nash policy
    optimisation.

    beta: 2000 on denoising errors (SD1.5 launcher; SDXL 5000).
    """

    name: ClassVar[str] = "ddim_inpo"
    title: ClassVar[str] = "DDIM-InPO"
    paper: ClassVar[str] = "2503.18454"
    composition: ClassVar[str] = "log-ratio at inverted latents -> beta (w - l) -> logistic"
    needs: ClassVar[Needs] = needs("pairs", caps=(Cap.DIFFERENCE, Cap.ERROR))
    parity: ClassVar[str] = "JaydenLyh/InPO train.py (formula)"
    default_beta: ClassVar[Mapping[Kind, float]] = {Kind.BOUND: 2000.0}
    instead: ClassVar[str] = "there is no image to invert; use 'dpo' on texts, 'd3po' on stored transitions"
    noising: ClassVar[Literal["forward", "ddim_inversion", "renoise_inversion"]] = "ddim_inversion"
