"""Scenes of the tiny world: what can be drawn, how it is captioned, and the drawing itself.

A scene has a background, one to three things, and an *uncaptioned* style (outline, texture, palette, tilt, placement).
The caption names what the verifier checks; the style is what a preference may choose among.

Shapes: N scenes, M things in total, H = W = `CANVAS` pixels. Pixel centres sit at integer + 0.5; y grows downwards.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CANVAS = 32
GRID = 4  # centres are multiples of this many pixels, which is also the codec's patch
SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (0.87, 0.15, 0.16),
    "green": (0.13, 0.66, 0.25),
    "blue": (0.18, 0.30, 0.90),
    "yellow": (0.95, 0.80, 0.10),
}
BACKGROUNDS = {"black": 0.04, "gray": 0.50, "white": 0.97}
SIZES = {"small": 4.5, "large": 7.5}  # half extent in pixels
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
COUNTS = {"two": 2, "three": 3}
TILT_DEGREES = 18.0
OUTLINE_INSIDE, OUTLINE_OUTSIDE = 0.9, 0.8  # pixels of the outline on either side of the edge
STRIPE_SHADE = 0.5
PASTEL_MIX = 0.45


@dataclass(frozen=True)
class Thing:
    """One drawn object. `cx`, `cy`: centre in pixels; `radius`: half extent in pixels."""

    shape: str
    colour: str
    radius: float
    cx: float
    cy: float


@dataclass(frozen=True)
class Style:
    """What the caption does not say. `tilt` is -1, 0 or 1 times `TILT_DEGREES`."""

    outline: bool = False
    striped: bool = False
    pastel: bool = False
    tilt: int = 0


@dataclass(frozen=True)
class Spec:
    """What a caption promises: `things` as (shape, colour), and the size or relation when the caption names one."""

    background: str
    things: tuple[tuple[str, str], ...]
    size: str | None = None
    relation: str | None = None

    @property
    def kind(self) -> str:
        if len(self.things) == 1:
            return "one"
        return "two" if self.relation else "count"

    def caption(self) -> str:
        """The one sentence that states this spec."""
        shape, colour = self.things[0]
        if self.kind == "one":
            what = f"a {self.size} {colour} {shape}"
        elif self.kind == "two":
            other_shape, other_colour = self.things[1]
            what = f"a {colour} {shape} {self.relation} a {other_colour} {other_shape}"
        else:
            number = next(word for word, n in COUNTS.items() if n == len(self.things))
            what = f"{number} {colour} {shape}s"
        return f"{what} on a {self.background} background"


@dataclass(frozen=True)
class Scene:
    """A spec with placed things and a style, ready to draw."""

    spec: Spec
    things: tuple[Thing, ...]
    style: Style

    @property
    def caption(self) -> str:
        return self.spec.caption()


_COLOUR, _SHAPE = "|".join(COLOURS), "|".join(SHAPES)
_BACKGROUND = rf" on a (?P<background>{'|'.join(BACKGROUNDS)}) background"
_PATTERNS = (
    re.compile(rf"a (?P<size>{'|'.join(SIZES)}) (?P<c0>{_COLOUR}) (?P<s0>{_SHAPE}){_BACKGROUND}"),
    re.compile(
        rf"a (?P<c0>{_COLOUR}) (?P<s0>{_SHAPE}) (?P<relation>{'|'.join(RELATIONS)})"
        rf" a (?P<c1>{_COLOUR}) (?P<s1>{_SHAPE}){_BACKGROUND}"
    ),
    re.compile(rf"(?P<count>{'|'.join(COUNTS)}) (?P<c0>{_COLOUR}) (?P<s0>{_SHAPE})s{_BACKGROUND}"),
)


def parse_caption(caption: str) -> Spec:
    """Read a caption back into its `Spec`.

    Raises:
        ValueError: the sentence is not one this world produces.
    """
    for pattern in _PATTERNS:
        if match := pattern.fullmatch(caption.strip().lower()):
            found = match.groupdict()
            first = (found["s0"], found["c0"])
            if "size" in found:
                return Spec(found["background"], (first,), size=found["size"])
            if "relation" in found:
                return Spec(found["background"], (first, (found["s1"], found["c1"])), relation=found["relation"])
            return Spec(found["background"], (first,) * COUNTS[found["count"]])
    raise ValueError(
        f"caption {caption!r} is not of the tiny world; expected, for example, 'a small red circle on a white "
        "background', 'a red circle left of a blue square on a gray background' or 'two red circles on a black background'"
    )


def all_specs() -> list[Spec]:
    """Every spec of the world, in a fixed order: 72 single things, 1,584 relations, 72 counts."""
    kinds = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    specs = [Spec(bg, (kind,), size=size) for bg in BACKGROUNDS for kind in kinds for size in SIZES]
    specs += [
        Spec(bg, (a, b), relation=relation)
        for bg in BACKGROUNDS
        for a in kinds
        for b in kinds
        if a != b
        for relation in RELATIONS
    ]
    specs += [Spec(bg, (kind,) * n) for bg in BACKGROUNDS for kind in kinds for n in COUNTS.values()]
    return specs


def is_held_out(caption: str) -> bool:
    """True for the eighth of all captions that neither the tiny bases nor any preference data ever see."""
    return hashlib.sha256(caption.encode()).digest()[0] % 8 == 0


def captions(*, held_out: bool) -> list[str]:
    """All captions on one side of the split, in a fixed order."""
    return [c for c in (spec.caption() for spec in all_specs()) if is_held_out(c) is held_out]


def sample_captions(n: int, seed: int, *, held_out: bool = False) -> list[str]:
    """Draw `n` captions (with replacement) with the world's mix: 35 % one thing, 40 % relations, 25 % counts."""
    rng = random.Random(f"captions/{seed}")
    by_kind: dict[str, list[str]] = {"one": [], "two": [], "count": []}
    for caption in captions(held_out=held_out):
        by_kind[parse_caption(caption).kind].append(caption)
    kinds = rng.choices(("one", "two", "count"), weights=(0.35, 0.40, 0.25), k=n)
    return [rng.choice(by_kind[kind]) for kind in kinds]


def sample_style(rng: random.Random) -> Style:
    """Independent draws: 35 % outlined, 30 % striped, 35 % pastel, 25 % tilted (either way)."""
    return Style(
        outline=rng.random() < 0.35,
        striped=rng.random() < 0.30,
        pastel=rng.random() < 0.35,
        tilt=rng.choice((-1, 1)) if rng.random() < 0.25 else 0,
    )


def compose(spec: Spec, rng: random.Random, style: Style | None = None) -> Scene:
    """Place the things of `spec` at random on the grid, without overlap, and give them a style."""
    style = style or sample_style(rng)
    spots = range(2 * GRID, CANVAS - 2 * GRID + 1, GRID)  # 8, 12, ..., 24
    least_gap = 16 if style.outline else 12  # outlines would touch at 12
    radius = SIZES[spec.size or "small"]
    if spec.relation:
        dx, dy = RELATIONS[spec.relation]
        gap = rng.choice((least_gap, 16))
        along = rng.choice([s for s in spots if s + gap in spots])
        across = rng.choice(spots)
        across_other = rng.choice([s for s in spots if abs(s - across) <= GRID])
        low, high = (along, across), (along + gap, across_other)
        first, second = (low, high) if dx + dy < 0 else (high, low)
        centres = [first, second] if dx else [first[::-1], second[::-1]]
    else:
        centres = []
        while len(centres) < len(spec.things):
            centres = [(rng.choice(spots), rng.choice(spots)) for _ in spec.things]
            far = all(
                max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= least_gap for i, a in enumerate(centres) for b in centres[:i]
            )
            centres = centres if far else []
    things = tuple(
        Thing(shape, colour, radius, cx, cy) for (shape, colour), (cx, cy) in zip(spec.things, centres, strict=True)
    )
    return Scene(spec, things, style)


def sample_scenes(n: int, seed: int) -> list[Scene]:
    """`n` random scenes of the training side of the split, a function of the seed alone."""
    rng = random.Random(f"scenes/{seed}")
    return [compose(parse_caption(caption), rng) for caption in sample_captions(n, seed)]


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: float, tilt: int = 0) -> Tensor:
    """Signed distance (pixels, negative inside) of points `x, y` relative to the thing's centre; any shape."""
    if shape == "circle":
        return torch.sqrt(x * x + y * y) - radius
    angle = math.radians(TILT_DEGREES * tilt)
    x, y = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    if shape == "square":
        side = 0.92 * radius
        return torch.maximum(x.abs(), y.abs()) - side
    # Isosceles triangle, apex (0, -r), base y = 0.9 r from -r to r: the largest of three half-plane distances.
    base = 0.9 * radius
    height = radius + base
    slant = math.hypot(height, radius)
    return torch.maximum(y - base, (x.abs() * height - (y + radius) * radius) / slant)


def _pixel_grid() -> tuple[Tensor, Tensor]:
    axis = torch.arange(CANVAS) + 0.5
    return axis.view(1, -1).expand(CANVAS, CANVAS), axis.view(-1, 1).expand(CANVAS, CANVAS)


def draw(scenes: list[Scene]) -> Tensor:
    """Render scenes with one-pixel linear coverage at the edges.

    Returns:
        float32 RGB in [0, 1], shape (N, 3, H, W).
    """
    x_HW, y_HW = _pixel_grid()
    stripe_HW = ((y_HW.long() % GRID) < GRID // 2).float()
    images = []
    for scene in scenes:
        level = BACKGROUNDS[scene.spec.background]
        canvas_3HW = torch.full((3, CANVAS, CANVAS), level)
        ink = 0.95 if scene.spec.background == "black" else 0.05
        for thing in scene.things:
            colour = torch.tensor(COLOURS[thing.colour]).view(3, 1, 1)
            if scene.style.pastel:
                colour = colour * (1 - PASTEL_MIX) + PASTEL_MIX
            fill_3HW = colour.expand_as(canvas_3HW)
            if scene.style.striped:
                fill_3HW = fill_3HW * (1 - (1 - STRIPE_SHADE) * stripe_HW)
            dist_HW = signed_distance(thing.shape, x_HW - thing.cx, y_HW - thing.cy, thing.radius, scene.style.tilt)
            if scene.style.outline:
                ring_HW = (dist_HW + OUTLINE_INSIDE + 0.5).clamp(0, 1)
                fill_3HW = fill_3HW * (1 - ring_HW) + ink * ring_HW
                dist_HW = dist_HW - OUTLINE_OUTSIDE
            cover_HW = (0.5 - dist_HW).clamp(0, 1)
            canvas_3HW = canvas_3HW * (1 - cover_HW) + fill_3HW * cover_HW
        images.append(canvas_3HW)
    return torch.stack(images)


def restyle(scene: Scene, style: Style) -> Scene:
    """The same scene in another style."""
    return replace(scene, style=style)
