"""GenEval-like verifier: a detector finds the things that a prompt names, and rules check counts, colours and places.

Paper: Ghosh et al. 2023, "GenEval", arXiv 2310.11513; as a reward in Flow-GRPO, arXiv 2505.05470. The rules are those of
the released codes (`diffalign.geneval`). What is looked with is not: the original's detector is Mask2Former Swin-S of
mmdetection 2.x, which does not run beside a current torch, here the Mask2Former of transformers or another detector. Scores
correlate with GenEval's and are not GenEval's: call them geneval-like. Colours are named as there by CLIP L/14, among ten,
of the crop of a thing with grey outside of its mask.

`geneval` is the official verdict, 0 or 1; `geneval:strict` wants exact counts; `geneval:graded` gives partial credit, which
Flow-GRPO trains with. A detector follows an @: `geneval:graded@/models/owlv2`. What a prompt promises is taken from the
metadata `include`, `exclude` and `tag`, else from the words of prompts like GenEval's, "a photo of two clocks".
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign import geneval as rules
from diffalign.errors import ConfigError, did_you_mean
from diffalign.geneval import Detection
from diffalign.rewards import ClipTowers, Reward, RewardError, preprocess
from reward_models._detectors import Detector, load_detector

DETECTOR = "facebook/mask2former-swin-small-coco-instance"  # its revision is not pinned
CLIP = "openai/clip-vit-large-patch14"
CLIP_REVISION = "32bd64288804d66eefd0ccbe215aa642df71cc41"
TEMPLATES = ("a photo of a {c} {n}", "a photo of a {c}-colored {n}", "a photo of a {c} object")
GREY = 0x99 / 255
WAYS = ("correct", "strict", "graded")


class GenEval(Reward):
    """Whether the things, counts, colours and places of a GenEval prompt are in the picture; geneval-like, see the gap."""

    range = (-rules.MOST + 1.0, 1.0)
    unit = "correct and strict: 0 or 1; graded: mean credit, below 0 where there are more than twice as many things"
    differentiable = False
    weights = f"{DETECTOR}@main (not pinned), {CLIP}@{CLIP_REVISION}"
    licence = "MIT (rules, CLIP); that of the detector (Mask2Former: UNVERIFIED)"
    gap = (
        "another detector than mmdetection's, for which the thresholds (0.3; 0.9 where things are counted) were tuned; "
        "numbers are not those of GenEval's tables; UNVERIFIED with published weights"
    )
    argument = "correct (default), strict or graded, and perhaps @ and the folder or hub id of a detector"

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        what: str = "correct",
        *,
        clip: str | Path = CLIP,
        detector: Detector | None = None,
    ) -> None:
        self.way, source = _parse(what)
        coco = {rules.COCO_NAMES.get(name, name): name for name in rules.CLASSES}
        self.detector = detector or load_detector("geneval", source, coco, device, dtype)
        revision = CLIP_REVISION if clip == CLIP else None
        self.towers = ClipTowers(clip, revision=revision, device=device, dtype=dtype)
        self._texts: dict[str, Tensor] = {}
        self._parts: dict[str, Tensor] = {}

    @classmethod
    def check_argument(cls, argument: str | None) -> None:
        if argument is not None:
            _parse(argument)

    def parts(self) -> dict[str, Tensor]:
        return self._parts

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        promised = [promise(prompt, metadata[i] if metadata else {}) for i, prompt in enumerate(prompts)]
        verdicts = []
        for image, wanted, found in zip(images, promised, self.detector(images), strict=True):
            kept = rules.keep(found, str(wanted.get("tag", "")))
            verdicts.append(rules.judge(kept, wanted, functools.partial(self.colours, image)))
        table = {way: torch.tensor([float(getattr(verdict, way)) for verdict in verdicts]) for way in WAYS}
        self._parts = {way: values for way, values in table.items() if way != self.way}
        return table[self.way].to(images.device)

    def colours(self, image: Tensor, name: str, things: Sequence[Detection]) -> list[str]:
        """The colour of each of some things in a picture (3, H, W), one of `diffalign.geneval.COLOURS`."""
        if name not in self._texts:
            self._texts[name] = self._colour_texts(name)
        size = self.towers.image_size
        seen = torch.cat([preprocess(cut_out(image, thing)[None], size, crop_offset=round) for thing in things])
        embedded = self.towers.embed_images(seen)
        return [rules.COLOURS[i] for i in (embedded @ self._texts[name].T).argmax(1).tolist()]

    def _colour_texts(self, name: str) -> Tensor:
        """Unit embedding of each colour of a thing, the mean over templates, (10, D)."""
        rows = []
        for colour in rules.COLOURS:
            texts = [template.format(c=colour, n=name) for template in TEMPLATES]
            each = torch.nn.functional.normalize(self.towers.embed_texts(texts), dim=1)
            rows.append(torch.nn.functional.normalize(each.mean(0), dim=0))
        return torch.stack(rows)


def cut_out(image: Tensor, thing: Detection) -> Tensor:
    """The box of a thing out of a picture (3, H, W), grey outside of its mask; at least one pixel."""
    if thing.mask is not None:
        image = torch.where(thing.mask.to(image.device), image, GREY)
    height, width = image.shape[-2:]
    x0, y0, x1, y1 = (round(v) for v in thing.box)
    x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    return image[:, y0 : max(y0 + 1, min(y1, height)), x0 : max(x0 + 1, min(x1, width))]


def promise(prompt: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """What a prompt promises, by its metadata or its words.

    Raises:
        RewardError: neither says it.
    """
    given = {key: metadata[key] for key in ("include", "exclude", "tag") if metadata.get(key) is not None}
    given = {key: json.loads(v) if isinstance(v, str) and key != "tag" else v for key, v in given.items()}
    found = given if given.get("include") else rules.parse_prompt(prompt)
    if found is None:
        raise RewardError(
            f"geneval: the prompt {prompt[:80]!r} is none of GenEval's and brings no metadata; give include, and perhaps "
            "exclude and tag, as in GenEval's evaluation_metadata.jsonl"
        )
    return found


def _parse(what: str) -> tuple[str, str]:
    """The way to score, and the detector."""
    way, _, detector = what.partition("@")
    if way not in WAYS:
        raise ConfigError(
            f"reward geneval: {way!r}{did_you_mean(way, WAYS)} Available: {', '.join(WAYS)}, and perhaps @DETECTOR"
        )
    return way, detector or DETECTOR
