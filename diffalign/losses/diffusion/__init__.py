# ruff: noqa: F401 - what type checkers read; the members are imported when they are asked for
"""Preference objectives of diffusion and flow models.

One file per method, its paper, its code and their differences at the top. All but `diffalign.losses.dpo`, `kto` and `mapo`,
which are older than this package and serve texts or images alike, live here. A score is minus one half of a denoising error
(the mean over the latent, never its sum), so that beta is the published `beta_dpo`; methods on stored transitions read one
row per transition, the *mean* log-density over the elements of the latent, as all their public implementations do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign.losses.diffusion.align_prop import AlignProp
    from diffalign.losses.diffusion.awm import AWM
    from diffalign.losses.diffusion.bide_dpo import BideDPO
    from diffalign.losses.diffusion.capo import CaPO
    from diffalign.losses.diffusion.chats import CHATS
    from diffalign.losses.diffusion.crd import CRD
    from diffalign.losses.diffusion.d3po import D3PO
    from diffalign.losses.diffusion.dance_grpo import DanceGRPO
    from diffalign.losses.diffusion.ddpo import DDPO
    from diffalign.losses.diffusion.dgpo import DGPO
    from diffalign.losses.diffusion.dmpo import DMPO
    from diffalign.losses.diffusion.dpok import DPOK
    from diffalign.losses.diffusion.draft import DRaFT, DRaFTLV
    from diffalign.losses.diffusion.dro import DiffusionDRO
    from diffalign.losses.diffusion.drtune import DRTune
    from diffalign.losses.diffusion.dspo import DSPO
    from diffalign.losses.diffusion.dual_ipo import DualIPO
    from diffalign.losses.diffusion.flow_dpo import FlowDPO
    from diffalign.losses.diffusion.flow_dppo import FlowDPPO
    from diffalign.losses.diffusion.flow_grpo import FlowGRPO
    from diffalign.losses.diffusion.gdpo import GDPO
    from diffalign.losses.diffusion.grpo_guard import GRPOGuard
    from diffalign.losses.diffusion.inpo import DDIMInPO
    from diffalign.losses.diffusion.kto import DiffusionKTO
    from diffalign.losses.diffusion.nft import DiffusionNFT
    from diffalign.losses.diffusion.patch_dpo import PatchDPO
    from diffalign.losses.diffusion.prdp import PRDP
    from diffalign.losses.diffusion.pso import PSO, PSOPersonal
    from diffalign.losses.diffusion.refl import ReFL
    from diffalign.losses.diffusion.sdpo import SDPO
    from diffalign.losses.diffusion.self_npo import SelfNPO
    from diffalign.losses.diffusion.seppo import SePPO
    from diffalign.losses.diffusion.smpo import SmPO
    from diffalign.losses.diffusion.snpo import SNPO
    from diffalign.losses.diffusion.spo import SPO
    from diffalign.losses.diffusion.srpo import SRPO
    from diffalign.losses.diffusion.subject_rpo import SubjectRPO

# Where every class is; the names of objectives are in `diffalign.losses.FAMILIES`.
MODULES: dict[str, str] = {
    "CHATS": "chats",
    "DDIMInPO": "inpo",
    "SmPO": "smpo",
    "SePPO": "seppo",
    "DiffusionKTO": "kto",
    "DSPO": "dspo",
    "D3PO": "d3po",
    "SPO": "spo",
    "SNPO": "snpo",
    "SelfNPO": "self_npo",
    "PSO": "pso",
    "PSOPersonal": "pso",
    "CaPO": "capo",
    "DMPO": "dmpo",
    "SDPO": "sdpo",
    "DiffusionDRO": "dro",
    "SubjectRPO": "subject_rpo",
    "PatchDPO": "patch_dpo",
    "BideDPO": "bide_dpo",
    "GDPO": "gdpo",
    "FlowDPO": "flow_dpo",
    "DualIPO": "dual_ipo",
    "DiffusionNFT": "nft",
    "AWM": "awm",
    "DGPO": "dgpo",
    "CRD": "crd",
    "DDPO": "ddpo",
    "DPOK": "dpok",
    "FlowGRPO": "flow_grpo",
    "DanceGRPO": "dance_grpo",
    "GRPOGuard": "grpo_guard",
    "FlowDPPO": "flow_dppo",
    "PRDP": "prdp",
    "AlignProp": "align_prop",
    "DRaFT": "draft",
    "DRaFTLV": "draft",
    "ReFL": "refl",
    "DRTune": "drtune",
    "SRPO": "srpo",
}


def __getattr__(attribute: str) -> Any:
    """Objectives by attribute, imported on first use."""
    if attribute in MODULES:
        return getattr(importlib.import_module(f"{__name__}.{MODULES[attribute]}"), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
