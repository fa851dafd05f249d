"""True drawings of a caption in somebody's taste, and how well patches of a picture agree with those of others.

Quality maps are PatchDPO's (arXiv 2412.03177): for every patch of a picture the best cosine similarity to any patch of the
others. Features are the tiny bases' own codec's latents, patches of 4 x 4 pixels, instead of a vision model's.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from diffalign.families import DenoisingFamily
from diffalign.world import verifier
from diffalign.world.scenes import Style, compose, draw, parse_caption
from diffalign.world.taste import Taste, combined

STYLES = [Style(*parts) for parts in itertools.product((False, True), (False, True), (False, True), (-1, 0, 1))]
CANDIDATES = len(STYLES)  # drawings of a caption, of which the best liked are taken
REFERENCES = 4  # of those, with which quality maps compare samples; the best is the chosen picture
CHUNK = 64  # captions drawn at once, which bounds memory


def favourites(
    captions: Sequence[str],
    tastes: Sequence[Taste],
    weights: Sequence[float],
    seed: int,
    count: int = REFERENCES,
    seen: Callable[[Tensor], Tensor] = lambda image: image,
) -> Tensor:
    """The drawings of each caption that its judge likes best, of one in every style, in random places and order.

    Args:
        captions: N sentences of the world.
        tastes, weights: the judge of each, and how much the taste counts (`taste.combined`).
        seed: a caption's drawings depend on it and on the caption's place in the list alone.
        count: how many of each, best first.
        seen: what the judge is shown of a picture (3, 32, 32), such as the decoded JPEG.

    Returns:
        float32 RGB in [0, 1], (N, count, 3, 32, 32).
    """
    found = []
    for start in range(0, len(captions), CHUNK):
        part = range(start, min(start + CHUNK, len(captions)))
        scenes = []
        for i in part:
            rng, spec = random.Random(f"drawings/{seed}/{i}"), parse_caption(captions[i])
            scenes += [compose(spec, rng, style) for style in rng.sample(STYLES, CANDIDATES)]
        images = draw(scenes).unflatten(0, (-1, CANDIDATES))
        readings = verifier.read(torch.stack([seen(image) for image in images.flatten(0, 1)]))
        for place, i in enumerate(part):
            own = readings[place * CANDIDATES : (place + 1) * CANDIDATES]
            scores = [combined(reading, captions[i], tastes[i], weights[i]) for reading in own]
            best = sorted(range(CANDIDATES), key=scores.__getitem__, reverse=True)  # equals stay in order
            found.append(images[place, best[:count]])
    return torch.stack(found)


def features(family: DenoisingFamily, images: Tensor) -> Tensor:
    """Unit vectors of all patches (N, h, w, C + 1) of pictures in [0, 1], (N, 3, H, W).

    A constant stands beside the codec's latents, which are about unit scale: flat grey is nearly zero in them, so that
    without it noise alone would decide what a grey patch resembles.
    """
    latents = family.encode_images(images * 2 - 1).movedim(1, -1)
    return nn.functional.normalize(nn.functional.pad(latents, (0, 1), value=1.0), dim=-1)


def quality(patches: Tensor, others: Tensor) -> Tensor:
    """For every patch the best cosine similarity to any of the others, in [0, 1]: below zero nothing is alike.

    Args:
        patches: features (h, w, C).
        others: features (..., C).
    """
    return (patches @ others.flatten(0, -2).T).amax(-1).clamp(0, 1)


def quality_maps(family: DenoisingFamily, sample: Tensor, target: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Quality of the patches of sampled pictures and of drawings, (N, h, w) each.

    Args:
        family: with its encoders loaded.
        sample: sampled pictures in [0, 1], (N, 3, H, W): compared with the references of their caption.
        target: drawings: compared with the sample of their caption.
        references: (N, K, 3, H, W).
    """
    of_sample, of_target = features(family, sample), features(family, target)
    of_references = features(family, references.flatten(0, 1)).unflatten(0, references.shape[:2])
    drawn = [quality(patches, others) for patches, others in zip(of_sample, of_references, strict=True)]
    reproduced = [quality(patches, others) for patches, others in zip(of_target, of_sample, strict=True)]
    return torch.stack(drawn), torch.stack(reproduced)
