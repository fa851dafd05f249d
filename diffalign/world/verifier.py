"""The exact verifier: reads background, count, colour, shape, size and relation back from pixels, and the style too.

It is GenEval in miniature, without a learned part. Parts are scored in [0, 1]; `score` is the mean of those that the
caption speaks about and `strict` is 1 only if all of them are fully right. On the world's own drawings `strict` is 1.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from diffalign.world.scenes import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    GRID,
    OUTLINE_OUTSIDE,
    RELATIONS,
    SHAPES,
    SIZES,
    Spec,
    parse_caption,
    signed_distance,
)

FOREGROUND = 0.13  # RGB distance to the background (root mean square over channels) that counts as painted
MIN_AREA = 10  # pixels; smaller specks are noise, not things
SHAPE_IOU = 0.72
COLOUR_PURITY = 0.55
RELATION_MARGIN = 2.5  # pixels between centroids
MAX_THINGS = 5
HALF_WINDOW = 12  # pixels around a thing's centre in which templates are compared
CHUNK = 128  # pictures read at once, which bounds memory


@dataclass(frozen=True)
class Found:
    """One thing read from the picture. `iou` is the best template's soft intersection over union."""

    shape: str
    size: str
    iou: float
    colour: str
    purity: float
    cx: float
    cy: float
    area: int
    outline: float  # share of the rim that is achromatic ink, [0, 1]
    striped: float  # contrast between the two stripe phases, [0, 1]
    pastel: float  # 0 vivid .. 1 pastel
    tilt: int  # of the best template: -1, 0, 1


@dataclass(frozen=True)
class Reading:
    """What the verifier saw in one picture."""

    background: str
    background_noise: float  # root mean square deviation of background pixels from their mean, [0, 1] units
    things: tuple[Found, ...]


@cache
def _templates() -> list[tuple[str, str, int, float]]:
    """(shape, size, tilt, grown): `grown` pixels stand for the outer part of an outline."""
    return [
        (shape, size, tilt, grown)
        for shape in SHAPES
        for size in SIZES
        for tilt in ((0,) if shape == "circle" else (-1, 0, 1))
        for grown in (0.0, OUTLINE_OUTSIDE)
    ]


@cache
def _template_bank() -> Tensor:
    """Drawn templates in a window, for bounding-box centres at 0 or 1/2 pixel: (2, 2, T, W, W), y fraction first."""
    fine = torch.arange(-12, 12, 0.05)
    x, y = fine.view(1, -1).expand(480, 480), fine.view(-1, 1).expand(480, 480)
    window = torch.arange(2 * HALF_WINDOW) + 0.5 - HALF_WINDOW
    bank = torch.empty(2, 2, len(_templates()), 2 * HALF_WINDOW, 2 * HALF_WINDOW)
    for k, (shape, size, tilt, grown) in enumerate(_templates()):
        inside = signed_distance(shape, x, y, SIZES[size], tilt) - grown < 0
        dx, dy = (float(v[inside].min() + v[inside].max()) / 2 for v in (x, y))
        for fy, fx in itertools.product((0, 1), (0, 1)):
            across, down = (window - fx / 2 + dx).view(1, -1), (window - fy / 2 + dy).view(-1, 1)
            across, down = torch.broadcast_tensors(across, down)
            dist = signed_distance(shape, across, down, SIZES[size], tilt) - grown
            bank[fy, fx, k] = (2 * (0.5 - dist)).clamp(0, 1)
    return bank


def _best_templates(cover_MHW: Tensor, box_x_M: Tensor, box_y_M: Tensor) -> tuple[list[float], list[int]]:
    """Soft IoU against every template, with half a pixel of play around the bounding-box centre.

    Returns:
        the best IoU and the number of its template, for each of the M things.
    """
    padded = torch.nn.functional.pad(cover_MHW, (HALF_WINDOW,) * 4)
    play_J = torch.tensor(list(itertools.product((-0.5, 0.0, 0.5), repeat=2)))
    y_MJ, x_MJ = box_y_M[:, None] + play_J[:, 0], box_x_M[:, None] + play_J[:, 1]
    reach_W = torch.arange(2 * HALF_WINDOW)
    rows = (y_MJ.long()[..., None] + reach_W)[..., :, None]
    columns = (x_MJ.long()[..., None] + reach_W)[..., None, :]
    seen_MJD = padded[torch.arange(len(padded)).view(-1, 1, 1, 1), rows, columns].flatten(2)
    seen_area_MJ = seen_MJD.sum(2)
    # Paint beyond the window counts against every template.
    outside_MJ = cover_MHW.sum((1, 2))[:, None] - seen_area_MJ
    fraction_MJ = 2 * (2 * (y_MJ % 1)).long() + (2 * (x_MJ % 1)).long()
    iou_MJT = torch.empty(*y_MJ.shape, len(_templates()))
    for fraction, drawn_TWW in enumerate(_template_bank().flatten(0, 1)):
        here = fraction_MJ == fraction
        drawn_TD = drawn_TWW.flatten(1)
        # With |a - b| summed: 2 min = a + b - |a - b| and 2 max = a + b + |a - b|, so one distance gives both.
        apart_NT = torch.cdist(seen_MJD[here], drawn_TD, p=1.0)
        total_NT = seen_area_MJ[here][:, None] + drawn_TD.sum(1)
        iou_MJT[here] = (total_NT - apart_NT) / (total_NT + apart_NT + 2 * outside_MJ[here][:, None])
    iou_M, index_M = iou_MJT.flatten(1).max(1)
    return iou_M.tolist(), (index_M % len(_templates())).tolist()


def _with_neighbours(values_BHW: Tensor, dim: int) -> Tensor:
    """The largest of each pixel and its two neighbours along `dim` (max pooling by slices: many times faster here)."""
    n = values_BHW.shape[dim]
    spread = values_BHW.clone()
    torch.maximum(spread.narrow(dim, 1, n - 1), values_BHW.narrow(dim, 0, n - 1), out=spread.narrow(dim, 1, n - 1))
    torch.maximum(spread.narrow(dim, 0, n - 1), values_BHW.narrow(dim, 1, n - 1), out=spread.narrow(dim, 0, n - 1))
    return spread


def _components(mask_BHW: Tensor) -> Tensor:
    """Label 4-connected components by spreading each pixel's number until nothing moves; 0 is background."""
    mask = mask_BHW.to(torch.int16)
    labels = torch.arange(1, CANVAS * CANVAS + 1, dtype=torch.int16).view(1, CANVAS, CANVAS) * mask
    while True:
        across = _with_neighbours(labels, 2) * mask
        spread = _with_neighbours(across, 1) * mask
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def _grow(mask_MHW: Tensor) -> Tensor:
    """Members and their eight neighbours."""
    return _with_neighbours(_with_neighbours(mask_MHW, 1), 2)


def _hue_votes(rgb_N3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest palette colour by hue, saturation (max - min) and value per pixel."""
    high, low = rgb_N3.max(1).values, rgb_N3.min(1).values
    chroma_N2 = _hue_plane(rgb_N3)
    palette_K2 = _hue_plane(torch.tensor(list(COLOURS.values())))
    palette_K2 = palette_K2 / palette_K2.norm(dim=1, keepdim=True)
    return (chroma_N2 @ palette_K2.T).argmax(1), high - low, high


def _hue_plane(rgb_N3: Tensor) -> Tensor:
    r, g, b = rgb_N3.unbind(1)
    return torch.stack([r - (g + b) / 2, (g - b) * math.sqrt(3) / 2], 1)


@dataclass(frozen=True)
class _Packed:
    """The member pixels of M things, packed to the left of K slots; `valid` marks the filled ones."""

    valid: Tensor  # (M, K)
    pixel: Tensor  # (M, K): flat pixel numbers
    owner: Tensor  # (M, 1): picture of each thing

    def take(self, values_BHW: Tensor) -> Tensor:
        """The values of a map at the member pixels, (M, K); unfilled slots hold anything."""
        return values_BHW.flatten(1)[self.owner, self.pixel]


def _pack(member_MHW: Tensor, owner_M: Tensor) -> _Packed:
    member_MP = member_MHW.flatten(1)
    thing_N, pixel_N = member_MP.nonzero(as_tuple=True)
    area_M = member_MP.sum(1)
    slot_N = torch.arange(len(thing_N)) - (area_M.cumsum(0) - area_M)[thing_N]
    pixel_MK = torch.zeros(len(area_M), int(area_M.max()), dtype=torch.long)
    pixel_MK[thing_N, slot_N] = pixel_N
    return _Packed(torch.arange(pixel_MK.shape[1]) < area_M[:, None], pixel_MK, owner_M[:, None])


def _middle(values_MK: Tensor, mask_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Per row, over the masked values: the lower of the two middle ones, and their mean. Undefined for empty rows."""
    ordered = values_MK.masked_fill(~mask_MK, math.inf).sort(1).values
    n = mask_MK.sum(1, keepdim=True)
    low, high = (
        ordered.gather(1, (n - 1).clamp_min(0) // 2),
        ordered.gather(1, (n // 2).clamp_max(ordered.shape[1] - 1)),
    )
    return low[:, 0], torch.lerp(low, high, 0.5)[:, 0]


def _read_things(
    images_B3HW: Tensor, far_BHW: Tensor, ink_B: Tensor, member_MHW: Tensor, owner_M: Tensor
) -> list[Found]:
    """Read M things at once.

    Args:
        images_B3HW: pictures.
        far_BHW: distance of each pixel to its picture's background.
        ink_B: grey level of an outline in each picture.
        member_MHW: which pixels belong to each thing.
        owner_M: the picture of each thing.
    """
    rgb_BPC = images_B3HW.flatten(2).mT
    vote_BP, saturation_BP, value_BP = (v.view(rgb_BPC.shape[:2]) for v in _hue_votes(rgb_BPC.flatten(0, 1)))
    packed = _pack(member_MHW, owner_M)
    vote, saturation, value = packed.take(vote_BP), packed.take(saturation_BP), packed.take(value_BP)
    valid, area_M = packed.valid, packed.valid.sum(1)

    # Place.
    x, y = packed.pixel % CANVAS + 0.5, packed.pixel // CANVAS + 0.5
    box_x_M, box_y_M = (
        (v.masked_fill(~valid, math.inf).amin(1) + v.masked_fill(~valid, -math.inf).amax(1)) / 2 for v in (x, y)
    )
    centre_x_M, centre_y_M = ((v * valid).sum(1) / area_M for v in (x, y))

    # Colour. A thing must show it: the share among coloured pixels, times how much colour there is at all.
    coloured = valid & (saturation > 0.14)
    coloured_M = coloured.sum(1)
    has_colour_M = coloured_M >= 4
    counts_MC = torch.stack([(coloured & (vote == k)).sum(1) for k in range(len(COLOURS))], 1)
    purity_M = counts_MC.amax(1) / coloured_M.clamp_min(1) * (coloured_M / area_M / 0.15).clamp_max(1)

    # Shape. Coverage is steepened so that stripes and shading inside do not count as holes.
    _, reference_M = _middle(packed.take(far_BHW), torch.where(has_colour_M[:, None], coloured, valid))
    steep_M11 = (0.5 * reference_M).clamp_min(0.08).view(-1, 1, 1)
    cover_MHW = (far_BHW[owner_M] / steep_M11).clamp(0, 1) * _grow(member_MHW)
    iou, template = _best_templates(cover_MHW, box_x_M, box_y_M)

    # Style. Outline: ink on the rim, which is two pixels wide. Ink is grey: the dark stripes of green are not.
    core_MHW = ~_grow(_grow(~member_MHW))
    inky_BHW = (images_B3HW - ink_B.view(-1, 1, 1, 1)).abs().amax(1) < 0.3
    inky_BHW &= saturation_BP.view_as(inky_BHW) < 0.2
    rim_MHW = member_MHW & ~core_MHW
    outline_M = (rim_MHW & inky_BHW[owner_M]).sum((1, 2)) / rim_MHW.sum((1, 2)).clamp_min(1) / 0.45
    # Stripes: the difference between the two phases. Pastel: vivid colours have saturation / value near 0.85 in the
    # strongest pixels, pastel ones near 0.4.
    dark_phase = (y.long() % GRID) < GRID // 2
    bright, dark = coloured & ~dark_phase, coloured & dark_phase
    (bright_M, _), (dark_M, _) = _middle(value, bright), _middle(value, dark)
    both_phases_M = (bright.sum(1) >= 3) & (dark.sum(1) >= 3) & has_colour_M
    striped_M = torch.where(both_phases_M, (bright_M - dark_M) / bright_M.clamp_min(0.05) / 0.5, 0.0)
    top = coloured & (value >= _middle(value, coloured)[1][:, None])
    ratio_M, _ = _middle(saturation / value.clamp_min(0.05), top)
    pastel_M = torch.where(has_colour_M, (0.78 - ratio_M) / (0.78 - 0.45), 0.0)

    names = list(COLOURS)
    columns = zip(
        iou,
        template,
        has_colour_M.tolist(),
        counts_MC.argmax(1).tolist(),
        purity_M.tolist(),
        centre_x_M.tolist(),
        centre_y_M.tolist(),
        area_M.tolist(),
        *(v.clamp(0, 1).tolist() for v in (outline_M, striped_M, pastel_M)),
        strict=True,
    )
    return [
        Found(
            shape=_templates()[k][0],
            size=_templates()[k][1],
            iou=match,
            colour=names[colour] if has_colour else "none",
            purity=purity if has_colour else 0.0,
            cx=cx,
            cy=cy,
            area=area,
            outline=outline,
            striped=striped,
            pastel=pastel,
            tilt=_templates()[k][2],
        )
        for match, k, has_colour, colour, purity, cx, cy, area, outline, striped, pastel in columns
    ]


def read(images: Tensor) -> list[Reading]:
    """Read pictures without knowing their captions.

    Args:
        images: float RGB in [0, 1], shape (B, 3, 32, 32).

    Raises:
        ValueError: another shape.
    """
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, CANVAS, CANVAS):
        raise ValueError(
            f"images have shape {tuple(images.shape)}; the tiny world's verifier reads (B, 3, {CANVAS}, {CANVAS})"
        )
    images = images.detach().float().cpu().clamp(0, 1)
    return [reading for chunk in images.split(CHUNK) for reading in _read_chunk(chunk)]


def _read_chunk(images: Tensor) -> list[Reading]:
    border_BN3 = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], 2).mT
    ground_B3 = border_BN3.median(1).values
    levels_K = torch.tensor(list(BACKGROUNDS.values()))
    background_B = (ground_B3.mean(1, keepdim=True) - levels_K).abs().argmin(1)
    far_BHW = (images - ground_B3[..., None, None]).square().mean(1).sqrt()
    mask_BHW = far_BHW > FOREGROUND
    labels_BHW = _components(mask_BHW)

    # The largest components of each picture; equal areas by their label, so that the order is always the same.
    labels_per_image = CANVAS * CANVAS + 1
    flat = labels_BHW.flatten(1) + labels_per_image * torch.arange(len(images))[:, None]
    areas_BL = torch.bincount(flat.flatten(), minlength=labels_per_image * len(images)).view(len(images), -1)
    areas_BL[:, 0] = 0
    areas_BT, label_BT = (v[:, :MAX_THINGS] for v in areas_BL.sort(dim=1, descending=True, stable=True))
    owner_M, rank_M = (areas_BT >= MIN_AREA).nonzero(as_tuple=True)
    ink_B = torch.where(background_B == list(BACKGROUNDS).index("black"), 0.95, 0.05)
    found: list[list[Found]] = [[] for _ in images]
    if len(owner_M):
        member_MHW = labels_BHW[owner_M] == label_BT[owner_M, rank_M].view(-1, 1, 1)
        things = _read_things(images, far_BHW, ink_B, member_MHW, owner_M)
        for owner, thing in zip(owner_M.tolist(), things, strict=True):
            found[owner].append(thing)

    ground_BHW = (~mask_BHW)[:, None].float()
    pixels_B = ground_BHW.sum((1, 2, 3)).clamp_min(1)
    mean_B3 = (images * ground_BHW).sum((2, 3)) / pixels_B[:, None]
    spread_B = ((images - mean_B3[..., None, None]).square() * ground_BHW).sum((1, 2, 3)) / (3 * pixels_B)
    return [
        Reading(list(BACKGROUNDS)[background], noise, tuple(things))
        for background, noise, things in zip(background_B.tolist(), spread_B.sqrt().tolist(), found, strict=True)
    ]


def judge(reading: Reading, spec: Spec) -> dict[str, float]:
    """Score a reading against what the caption promises.

    Returns:
        `background, count, colour, shape, bound` (and `size` or `relation` where the caption names one) in [0, 1],
        their mean `score`, and `strict` (1.0 if every part is 1).
    """
    wanted, found = spec.things, reading.things
    best: dict[str, float] = {"colour": 0.0, "shape": 0.0, "bound": 0.0}
    best_key: tuple[float, float] = (-1.0, -1.0)
    best_order: tuple[int | None, ...] = ()
    slots: list[int | None] = [*range(len(found)), *[None] * len(wanted)]
    for order in dict.fromkeys(itertools.permutations(slots, len(wanted))):
        parts = {"colour": 0.0, "shape": 0.0, "bound": 0.0}
        for (shape, colour), index in zip(wanted, order, strict=True):
            if index is None:
                continue
            thing = found[index]
            right_colour = thing.colour == colour and thing.purity >= COLOUR_PURITY
            right_shape = thing.shape == shape and thing.iou >= SHAPE_IOU
            parts["colour"] += right_colour / len(wanted)
            parts["shape"] += right_shape / len(wanted)
            parts["bound"] += (right_colour and right_shape) / len(wanted)
        # Among equally good matches, the one that also has the promised size or relation.
        key = (sum(parts.values()), _size_holds(spec, found, order) + _relation_holds(spec, found, order))
        if key > best_key:
            best_key, best_order, best = key, order, parts
    parts = {"background": float(reading.background == spec.background), "count": float(len(found) == len(wanted))}
    parts |= {name: 1.0 if value > 1 - 1e-6 else value for name, value in best.items()}
    if spec.size:
        parts["size"] = _size_holds(spec, found, best_order)
    if spec.relation:
        parts["relation"] = _relation_holds(spec, found, best_order)
    score = sum(parts.values()) / len(parts)
    return parts | {"score": score, "strict": float(all(value == 1.0 for value in parts.values()))}


def _size_holds(spec: Spec, found: tuple[Found, ...], order: tuple[int | None, ...]) -> float:
    return float(spec.size is not None and order[0] is not None and found[order[0]].size == spec.size)


def _relation_holds(spec: Spec, found: tuple[Found, ...], order: tuple[int | None, ...]) -> float:
    if spec.relation is None or order[0] is None or order[1] is None:
        return 0.0
    dx, dy = RELATIONS[spec.relation]
    first, second = found[order[0]], found[order[1]]
    return float((first.cx - second.cx) * dx + (first.cy - second.cy) * dy >= RELATION_MARGIN)


def verify(images: Tensor, captions: list[str]) -> list[dict[str, float]]:
    """Read and judge pictures against their captions; see `judge` for the keys.

    Args:
        images: float RGB in [0, 1], shape (B, 3, 32, 32).
        captions: B sentences of the tiny world.
    """
    return [judge(reading, parse_caption(caption)) for reading, caption in zip(read(images), captions, strict=True)]
