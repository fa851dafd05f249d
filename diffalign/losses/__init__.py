# ruff: noqa: F401 - what type checkers read; `__all__` is made from the tables
"""The preference core: objectives as pure functions of scores, usable without any model, trainer or data set.

    import torch
    from diffalign import losses

    scores = losses.Scores.tokens(policy_logps, reference_logps)   # (2B,), chosen rows first
    out = losses.DPO(beta=0.1)(scores, losses.Pairs.halves(B))
    out.loss.backward()

A score is one number per row, higher = more likely under the model: the sum of token log-probabilities of a text, the
log-density of a sampled trajectory, or minus one half of a denoising error. Every objective is a composition

    log-ratio -> transform -> contrast (times beta, minus margin) -> link -> weight -> mean    (+ regularisers)

and says which one it is. It also says what it needs to be true of a score, and refuses scores of which that is not true.
Imports torch and nothing else of this package; a family of objectives is imported when one of it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffalign.losses.base import Estimator, IncompatibleObjective, LossOut, Needs, Objective
from diffalign.losses.layouts import Groups, Items, Layout, Lists, Pairs
from diffalign.losses.scores import Cap, Kind, Scores, Totals, Units

if TYPE_CHECKING:
    from diffalign.losses import (
        advantages,
        anchored,
        base,
        composite,
        diffusion,
        estimators,
        fine_grained,
        games,
        group_objective,
        hybrid,
        judging,
        layouts,
        links,
        pairing,
        pairwise,
        policy_gradient,
        ranked,
        reduce,
        reference_free,
        references,
        regression,
        scores,
        supervised,
        surrogates,
        transforms,
        transport,
        unlearning,
        unlearning_tokens,
        unlearning_tools,
        unpaired,
        vocabulary,
        weighted,
    )
    from diffalign.losses.anchored import NCA, APODown, APOZero, BCOPair, EXOList, InfoNCA, NCAList
    from diffalign.losses.composite import FDPO, WPO, Mixed
    from diffalign.losses.diffusion import (
        AWM,
        CHATS,
        CRD,
        D3PO,
        DDPO,
        DGPO,
        DMPO,
        DPOK,
        DSPO,
        GDPO,
        PRDP,
        PSO,
        SDPO,
        SNPO,
        SPO,
        BideDPO,
        CaPO,
        DanceGRPO,
        DDIMInPO,
        DiffusionDRO,
        DiffusionKTO,
        DiffusionNFT,
        DualIPO,
        FlowDPO,
        FlowDPPO,
        FlowGRPO,
        GRPOGuard,
        PatchDPO,
        PSOPersonal,
        SelfNPO,
        SePPO,
        SmPO,
        SubjectRPO,
    )
    from diffalign.losses.fine_grained import OSPO, RRPO, TDPO1, TDPO2, SparsePO
    from diffalign.losses.games import DNO, GPO, INPO, SPPO, XPO, NashMD, OnlineIPO
    from diffalign.losses.hybrid import DPOP, POVID, RPO, FlexDPO, HyPO, IterativeRPO, RationaleDPO, RealignRDPO, UVCoT
    from diffalign.losses.judging import BradleyTerry, BradleyTerryTies, GeneralPreference, PickScoreLoss
    from diffalign.losses.pairwise import (
        DPO,
        EXO,
        IPO,
        DiscoPOP,
        Hinge,
        LengthDesensitisedDPO,
        LengthRegularisedDPO,
        NormalisedDPO,
        RobustDPO,
    )
    from diffalign.losses.policy_gradient import (
        BNPO,
        CISPO,
        DAPO,
        GMPO,
        GRPO,
        GSPO,
        LUSPO,
        RLOO,
        SAPO,
        VESPO,
        DrGRPO,
        Reinforce,
        ReMix,
    )
    from diffalign.losses.ranked import LambdaRank, PlackettLuce, StepDPO, TPOTree
    from diffalign.losses.reference_free import ASFT, CPO, ORPO, TPO, TPOL, AlphaPO, MaPO, SimPO, SLiC
    from diffalign.losses.regression import A2PO, NFT, CoPG, Rebel
    from diffalign.losses.supervised import (
        AWR,
        MML,
        RAFT,
        RFT,
        RWR,
        SFT,
        FDivergenceSFT,
        PoFT,
        UniformMLE,
        Unlikelihood,
    )
    from diffalign.losses.transport import AOT, AOTUnpaired
    from diffalign.losses.unlearning import D2O, GA, NPO, GradDiff, IdkDPO, SimNPO
    from diffalign.losses.unlearning_tokens import CATNIP, CEU, PDU, UNDIAL, WGA, DiPO, SatImp
    from diffalign.losses.unpaired import BCO, KTO, APOZeroUnpaired
    from diffalign.losses.weighted import (
        CREAM,
        MADPO,
        MAPL,
        MODPO,
        POWER,
        POWERDL,
        BetaDPO,
        DynamicLabelDPO,
        SimulPL,
        SPODegree,
        VerifierDPO,
    )

# Families of objectives and their members, {name: class}, in the order of the reference table. Importing all of them takes
# longer than everything else here, so they are imported when needed.
FAMILIES: dict[str, dict[str, str]] = {
    "pairwise": {
        "dpo": "DPO",
        "robust_dpo": "RobustDPO",
        "hinge": "Hinge",
        "ipo": "IPO",
        "exo": "EXO",
        "discopop": "DiscoPOP",
        "dpo_norm": "NormalisedDPO",
        "ld_dpo": "LengthDesensitisedDPO",
        "r_dpo": "LengthRegularisedDPO",
    },
    "anchored": {
        "nca": "NCA",
        "bco_pair": "BCOPair",
        "apo_zero": "APOZero",
        "apo_down": "APODown",
        "infonca": "InfoNCA",
        "nca_list": "NCAList",
        "exo_list": "EXOList",
    },
    "transport": {
        "aot": "AOT",
        "aot_unpaired": "AOTUnpaired",
    },
    "composite": {
        "f_dpo": "FDPO",
        "wpo": "WPO",
        "mixed": "Mixed",
    },
    "reference_free": {
        "cpo": "CPO",
        "slic": "SLiC",
        "tpo": "TPO",
        "simpo": "SimPO",
        "alphapo": "AlphaPO",
        "tpo_l": "TPOL",
        "orpo": "ORPO",
        "asft": "ASFT",
        "mapo": "MaPO",
    },
    "unpaired": {
        "apo_zero_unpaired": "APOZeroUnpaired",
        "kto": "KTO",
        "bco": "BCO",
    },
    "ranked": {
        "plackett_luce": "PlackettLuce",
        "lambda_rank": "LambdaRank",
        "tpo_tree": "TPOTree",
        "step_dpo": "StepDPO",
    },
    "games": {
        "sppo": "SPPO",
        "gpo": "GPO",
        "dno": "DNO",
        "inpo": "INPO",
        "online_ipo": "OnlineIPO",
        "nash_md": "NashMD",
        "xpo": "XPO",
    },
    "weighted": {
        "modpo": "MODPO",
        "simulpl": "SimulPL",
        "verifier_dpo": "VerifierDPO",
        "madpo": "MADPO",
        "beta_dpo": "BetaDPO",
        "dynamic_label_dpo": "DynamicLabelDPO",
        "power": "POWER",
        "power_dl": "POWERDL",
        "cream": "CREAM",
        "spo_degree": "SPODegree",
        "mapl": "MAPL",
    },
    "fine_grained": {
        "tdpo1": "TDPO1",
        "tdpo2": "TDPO2",
        "sparse_po": "SparsePO",
        "rrpo": "RRPO",
        "ospo": "OSPO",
    },
    "hybrid": {
        "rpo": "RPO",
        "iterative_rpo": "IterativeRPO",
        "flex_dpo": "FlexDPO",
        "dpop": "DPOP",
        "hypo": "HyPO",
        "realign_rdpo": "RealignRDPO",
        "povid": "POVID",
        "uv_cot": "UVCoT",
        "rationale_dpo": "RationaleDPO",
    },
    "unlearning": {
        "ga": "GA",
        "grad_diff": "GradDiff",
        "npo": "NPO",
        "simnpo": "SimNPO",
        "idk_dpo": "IdkDPO",
        "d2o": "D2O",
    },
    "unlearning_tokens": {
        "wga": "WGA",
        "satimp": "SatImp",
        "catnip": "CATNIP",
        "ce_u": "CEU",
        "undial": "UNDIAL",
        "dipo": "DiPO",
        "pdu": "PDU",
    },
    "policy_gradient": {
        "grpo": "GRPO",
        "bnpo": "BNPO",
        "dr_grpo": "DrGRPO",
        "dapo": "DAPO",
        "gspo": "GSPO",
        "luspo": "LUSPO",
        "cispo": "CISPO",
        "sapo": "SAPO",
        "vespo": "VESPO",
        "gmpo": "GMPO",
        "remix": "ReMix",
        "rloo": "RLOO",
        "reinforce": "Reinforce",
    },
    "regression": {
        "nft": "NFT",
        "copg": "CoPG",
        "rebel": "Rebel",
        "a2po": "A2PO",
    },
    "supervised": {
        "sft": "SFT",
        "rft": "RFT",
        "raft": "RAFT",
        "poft": "PoFT",
        "unlikelihood": "Unlikelihood",
        "rwr": "RWR",
        "awr": "AWR",
        "mml": "MML",
        "uniform_mle": "UniformMLE",
        "f_sft": "FDivergenceSFT",
    },
    "judging": {
        "bradley_terry": "BradleyTerry",
        "pickscore": "PickScoreLoss",
        "bradley_terry_ties": "BradleyTerryTies",
        "general_preference": "GeneralPreference",
    },
    "diffusion": {
        "ddim_inpo": "DDIMInPO",
        "smpo": "SmPO",
        "seppo": "SePPO",
        "diffusion_kto": "DiffusionKTO",
        "dspo": "DSPO",
        "d3po": "D3PO",
        "spo": "SPO",
        "pso": "PSO",
        "pso_personal": "PSOPersonal",
        "capo": "CaPO",
        "dmpo": "DMPO",
        "sdpo": "SDPO",
        "dro": "DiffusionDRO",
        "subject_rpo": "SubjectRPO",
        "patch_dpo": "PatchDPO",
        "bide_dpo": "BideDPO",
        "gdpo": "GDPO",
        "flow_dpo": "FlowDPO",
        "dual_ipo": "DualIPO",
        "snpo": "SNPO",
        "chats": "CHATS",
        "self_npo": "SelfNPO",
        "diffusion_nft": "DiffusionNFT",
        "awm": "AWM",
        "dgpo": "DGPO",
        "crd": "CRD",
        "ddpo": "DDPO",
        "dpok": "DPOK",
        "flow_grpo": "FlowGRPO",
        "dance_grpo": "DanceGRPO",
        "grpo_guard": "GRPOGuard",
        "flow_dppo": "FlowDPPO",
        "prdp": "PRDP",
        "align_prop": "AlignProp",
        "draft": "DRaFT",
        "draft_lv": "DRaFTLV",
        "refl": "ReFL",
        "drtune": "DRTune",
        "srpo": "SRPO",
    },
}
_MODULES = (
    "advantages",
    "anchored",
    "base",
    "composite",
    "diffusion",
    "estimators",
    "fine_grained",
    "games",
    "group_objective",
    "hybrid",
    "judging",
    "layouts",
    "links",
    "pairing",
    "pairwise",
    "policy_gradient",
    "ranked",
    "reduce",
    "reference_free",
    "references",
    "regression",
    "scores",
    "supervised",
    "surrogates",
    "transforms",
    "transport",
    "unlearning",
    "unlearning_tokens",
    "unlearning_tools",
    "unpaired",
    "vocabulary",
    "weighted",
)


def names() -> list[str]:
    """The names of all objectives, in the order of `FAMILIES`; imports none of them."""
    return [name for members in FAMILIES.values() for name in members]


def find(name: str) -> type[Objective]:
    """An objective by name.

    Raises:
        KeyError: no such name.
    """
    for module, members in FAMILIES.items():
        if name in members:
            found: type[Objective] = getattr(importlib.import_module(f"{__name__}.{module}"), members[name])
            return found
    raise KeyError(name)


def catalogue() -> dict[str, type[Objective]]:
    """Every named objective of the core, by name."""
    return {name: find(name) for name in names()}


def __getattr__(attribute: str) -> Any:
    """Modules and objectives by attribute, imported on first use."""
    if attribute in _MODULES:
        return importlib.import_module(f"{__name__}.{attribute}")
    for module, members in FAMILIES.items():
        if attribute in members.values():
            return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")


__all__ = [
    "FAMILIES",
    "Cap",
    "Estimator",
    "Groups",
    "IncompatibleObjective",
    "Items",
    "Kind",
    "Layout",
    "Lists",
    "LossOut",
    "Needs",
    "Objective",
    "Pairs",
    "Scores",
    "Totals",
    "Units",
    "catalogue",
    "find",
    "names",
]
__all__ += _MODULES
__all__ += [member for members in FAMILIES.values() for member in members.values()]
