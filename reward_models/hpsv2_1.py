"""HPS v2.1: HPS v2 trained on higher quality data; another scale than v2.0.

Paper, code and preprocessing as in `hpsv2`. Online methods such as DiffusionNFT train on this version, and the package's
`evaluate` takes it.
"""

from __future__ import annotations

from typing import ClassVar

from reward_models.hpsv2 import REPOSITORY, REVISION, HPSv2


class HPSv21(HPSv2):
    """Human preference score v2.1: cosine of picture and prompt under a CLIP fine-tuned on people's rankings."""

    name: ClassVar[str] = "hpsv2_1"
    file: ClassVar[str] = "HPS_v2.1_compressed.pt"
    unit = "cosine; 0.18 to 0.34 for SD1.5 to SD3.5 pictures (published as 18 to 34)"
    weights = f"{REPOSITORY}@{REVISION}:{file}"
    gap = f"{HPSv2.gap}; users report 0.288 for the package's demo image with the prompt 'cat with horn' (UNVERIFIED)"
