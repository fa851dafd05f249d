"""Object detectors of transformers behind one call: pictures in, detections by class name out.

Mask2Former (instances with masks, as GenEval's own), detectors with boxes alone (DETR, RT-DETR, YOLOS), and detectors that
are told the classes in words (OWL-ViT, OWLv2). Which one a folder holds is read from its configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffalign.geneval import Detection
from diffalign.rewards import RewardError
from diffalign.vlm_backends import to_pil
from reward_models._weights import pretrained

LEAST = 0.05  # confidence below which nothing is told
INSTANCES = 100  # masks per picture, mmdetection's max_per_image
TOLD = ("owlvit", "owlv2")


class Detector(Protocol):
    """Finds things."""

    def __call__(self, images: Tensor) -> list[dict[str, list[Detection]]]:
        """By class name, of each picture; images are float RGB in [0, 1], (B, 3, H, W)."""


def load_detector(
    reward: str,
    source: str | Path,
    classes: Mapping[str, str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Detector:
    """The detector of a folder or hub id.

    Args:
        reward: who needs it, for messages.
        source: folder or hub id.
        classes: the detector's class names, theirs to ours; of a detector that is told them, what it is told.
        device, dtype: of the network.

    Raises:
        RewardError: it cannot be loaded, or knows none of the classes.
    """
    from transformers import AutoConfig

    kind = pretrained(reward, AutoConfig.from_pretrained, source).model_type
    made = Masks if kind == "mask2former" else Told if kind in TOLD else Boxes
    return made(reward, source, classes, device, dtype)


class _Network:
    """What the three have in common: a network, its processor, and names of classes."""

    auto = "AutoModelForObjectDetection"

    def __init__(
        self,
        reward: str,
        source: str | Path,
        classes: Mapping[str, str],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        import transformers

        load = getattr(transformers, self.auto).from_pretrained
        self.processor = cast(Any, pretrained(reward, transformers.AutoProcessor.from_pretrained, source))
        try:
            self.model = cast(Any, pretrained(reward, lambda place: load(place, dtype=dtype), source))
        except ImportError as error:  # Mask2Former's loss, built with the network, wants scipy
            raise RewardError(
                f"{reward}: the detector {str(source)!r} needs a package: {str(error).splitlines()[0]} "
                "pip install 'diffalign[detection]'"
            ) from error
        self.model.eval().requires_grad_(False).to(device)
        self.device, self.dtype, self.classes = torch.device(device), dtype, dict(classes)
        names = {int(i): self.classes.get(str(name)) for i, name in self.model.config.id2label.items()}
        self.names = {i: name for i, name in names.items() if name is not None}
        if not self.names and not isinstance(self, Told):
            known = ", ".join(map(str, list(self.model.config.id2label.values())[:5]))
            raise RewardError(
                f"{reward}: the detector {str(source)!r} knows none of the classes; it knows {known}, ..."
            )

    def inputs(self, images: Tensor, **more: Any) -> dict[str, Any]:
        found = self.processor(images=[to_pil(image) for image in images], return_tensors="pt", **more).to(self.device)
        return {key: value.to(self.dtype) if value.is_floating_point() else value for key, value in found.items()}


class Masks(_Network):
    """Mask2Former's instances. Confidence = class probability times the mean probability inside the mask (its paper)."""

    auto = "Mask2FormerForUniversalSegmentation"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[dict[str, list[Detection]]]:
        output = self.model(**self.inputs(images))
        chances = output.class_queries_logits.float().softmax(-1)[..., :-1]
        return [
            self._of_one(chance, masks.float(), (images.shape[-2], images.shape[-1]))
            for chance, masks in zip(chances, output.masks_queries_logits, strict=True)
        ]

    def _of_one(self, chance: Tensor, masks: Tensor, shape: tuple[int, int]) -> dict[str, list[Detection]]:
        count = chance.shape[1]
        best, places = chance.flatten().topk(min(INSTANCES, chance.numel()))
        found: dict[str, list[Detection]] = {}
        for score, place in zip(best.tolist(), places.tolist(), strict=True):
            name = self.names.get(place % count)
            if name is None or score < LEAST:
                continue
            logits = interpolate(masks[place // count][None, None], shape, mode="bilinear", align_corners=False)[0, 0]
            inside = logits > 0
            if not inside.any():
                continue
            score *= float(logits.sigmoid()[inside].mean())
            rows, columns = (inside.any(axis).nonzero()[:, 0] for axis in (1, 0))
            box = (float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1)
            found.setdefault(name, []).append(Detection(box, score, inside.cpu()))
        return found


class Boxes(_Network):
    """Detectors with a fixed list of classes and no masks."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[dict[str, list[Detection]]]:
        output = self.model(**self.inputs(images))
        sizes = [(images.shape[-2], images.shape[-1])] * len(images)
        read = self.processor.post_process_object_detection
        return [_by_class(one, self.names) for one in read(output, threshold=LEAST, target_sizes=sizes)]


class Told(_Network):
    """Detectors that are told the classes in words."""

    auto = "AutoModelForZeroShotObjectDetection"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[dict[str, list[Detection]]]:
        words = [f"a photo of a {name}" for name in self.classes]
        output = self.model(**self.inputs(images, text=[words] * len(images), padding=True, truncation=True))
        sizes = [(images.shape[-2], images.shape[-1])] * len(images)
        read = self.processor.post_process_grounded_object_detection
        names = dict(enumerate(self.classes.values()))
        return [_by_class(one, names) for one in read(output, threshold=LEAST, target_sizes=sizes)]


def _by_class(found: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, list[Detection]]:
    result: dict[str, list[Detection]] = {}
    rows: Sequence[Any] = list(zip(found["scores"], found["labels"], found["boxes"], strict=True))
    for score, label, box in rows:
        if (name := names.get(int(label))) is not None:
            x0, y0, x1, y1 = (float(v) for v in box)
            result.setdefault(name, []).append(Detection((x0, y0, x1, y1), float(score)))
    return result
