"""The verifier: right on every drawing, at chance elsewhere, and each promise moves its own part only."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffalign.world import verifier
from diffalign.world.pairs import from_jpeg, to_jpeg
from diffalign.world.scenes import CANVAS, GRID, Scene, Spec, Style, Thing, compose, draw, parse_caption, sample_scenes
from diffalign.world.verifier import judge, read, verify

PLAIN = Style()
PARTS = {"background", "count", "colour", "shape", "bound", "size", "relation"}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return sample_scenes(700, seed=11)


@pytest.fixture(scope="module")
def images(scenes: list[Scene]) -> Tensor:
    return draw(scenes)


def reading_of(caption: str, seed: int = 0) -> verifier.Reading:
    return read(draw([compose(parse_caption(caption), random.Random(seed), PLAIN)]))[0]


def failed_parts(drawn: str, said: str, seed: int = 0) -> set[str]:
    verdict = judge(reading_of(drawn, seed), parse_caption(said))
    return {part for part in PARTS & set(verdict) if verdict[part] < 1}


def test_every_drawing_is_right(scenes: list[Scene], images: Tensor):
    verdicts = verify(images, [scene.caption for scene in scenes])
    assert [scene.caption for scene, v in zip(scenes, verdicts, strict=True) if v["strict"] < 1] == []
    assert all(v["score"] == 1 for v in verdicts)


def test_chance_level_is_low(scenes: list[Scene], images: Tensor):
    captions = [scene.caption for scene in scenes]
    random.Random(0).shuffle(captions)
    verdicts = verify(images, captions)
    assert sum(v["strict"] for v in verdicts) / len(verdicts) < 0.03
    assert sum(v["score"] for v in verdicts) / len(verdicts) < 0.4


def test_shipped_jpeg_quality_keeps_the_verdict(scenes: list[Scene], images: Tensor):
    decoded = torch.stack([from_jpeg(to_jpeg(image, 96)) for image in images[:400]])
    verdicts = verify(decoded, [scene.caption for scene in scenes[:400]])
    assert sum(v["strict"] for v in verdicts) / len(verdicts) > 0.97


ONE, TWO = "a large red circle on a white background", "a red circle left of a blue square on a gray background"
COUNT = "three green triangles on a black background"


@pytest.mark.parametrize(
    ("drawn", "said", "failed"),
    [
        (ONE, ONE, set()),
        (ONE, "a large red circle on a gray background", {"background"}),
        (ONE, "a small red circle on a white background", {"size"}),
        (ONE, "a large blue circle on a white background", {"colour", "bound"}),
        (ONE, "a large red square on a white background", {"shape", "bound"}),
        (TWO, "a red circle right of a blue square on a gray background", {"relation"}),
        (TWO, "a blue square right of a red circle on a gray background", set()),
        (COUNT, "two green triangles on a black background", {"count"}),
        (COUNT, "three yellow triangles on a black background", {"colour", "bound"}),
        (COUNT, "three green circles on a black background", {"shape", "bound"}),
    ],
)
def test_each_promise_moves_its_own_part(drawn: str, said: str, failed: set[str]):
    for seed in range(4):
        assert failed_parts(drawn, said, seed) == failed


def test_partial_credit_counts_things():
    verdict = judge(reading_of(TWO), parse_caption("a red circle left of a blue triangle on a gray background"))
    assert verdict["shape"] == verdict["bound"] == 0.5
    assert verdict["colour"] == verdict["relation"] == 1
    assert verdict["score"] == pytest.approx((1 + 1 + 1 + 0.5 + 0.5 + 1) / 6)
    assert verdict["strict"] == 0


def test_swapped_colours_are_not_bound():
    verdict = judge(reading_of(TWO), parse_caption("a blue circle left of a red square on a gray background"))
    assert verdict["bound"] == 0


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_mirror_image_flips_left_and_right_only(relation: str):
    caption = f"a red circle {relation} a blue square on a gray background"
    flipped = {"left of": "right of", "right of": "left of"}.get(relation, relation)
    image = draw([compose(parse_caption(caption), random.Random(1), PLAIN)])
    (as_said,), (as_flipped,) = (
        verify(image.flip(3), [caption]),
        verify(image.flip(3), [caption.replace(relation, flipped)]),
    )
    assert as_flipped["strict"] == 1
    assert as_said["relation"] == float(relation == flipped)


def test_no_thing_is_no_credit():
    empty = torch.full((1, 3, CANVAS, CANVAS), 0.97)
    (reading,) = read(empty)
    assert reading.things == ()
    verdict = judge(reading, parse_caption(ONE))
    assert verdict["background"] == 1
    assert {verdict[part] for part in ("count", "colour", "shape", "bound", "size")} == {0.0}


def test_noise_is_not_a_picture():
    noise = torch.rand(20, 3, CANVAS, CANVAS, generator=torch.Generator().manual_seed(0))
    assert all(v["strict"] == 0 for v in verify(noise, [ONE] * 20))


def test_style_is_read_back(scenes: list[Scene], images: Tensor):
    pairs = [(scene.style, thing) for scene, r in zip(scenes, read(images), strict=True) for thing in r.things]
    # Not even dark stripes pass for an outline, and a tilt is always seen.
    assert all((thing.outline > 0.5) is style.outline for style, thing in pairs)
    assert all(abs(thing.tilt) == (abs(style.tilt) if thing.shape != "circle" else 0) for style, thing in pairs)
    # A light outline washes out the colours of a few small triangles on black.
    assert sum((thing.pastel > 0.5) is style.pastel for style, thing in pairs) > 0.99 * len(pairs)
    assert sum((thing.striped > 0.5) is style.striped for style, thing in pairs) > 0.99 * len(pairs)


def test_reading_does_not_depend_on_the_batch(images: Tensor):
    noisy = (images[:24] + 0.08 * torch.randn(images[:24].shape, generator=torch.Generator().manual_seed(1))).clamp(
        0, 1
    )
    together = read(noisy)
    for image, reading in zip(noisy, together, strict=True):
        (alone,) = read(image[None])
        assert alone.background == reading.background
        assert [replace(t, iou=0.0) for t in alone.things] == [replace(t, iou=0.0) for t in reading.things]
        assert [t.iou for t in alone.things] == pytest.approx([t.iou for t in reading.things], abs=1e-5)


def test_chunks_do_not_matter(images: Tensor, monkeypatch: pytest.MonkeyPatch):
    whole = read(images[:10])
    monkeypatch.setattr(verifier, "CHUNK", 3)
    assert [len(r.things) for r in read(images[:10])] == [len(r.things) for r in whole]
    assert [r.things[0].cx for r in read(images[:10])] == [r.things[0].cx for r in whole]


def test_components_equal_a_plain_flood_fill():
    mask = torch.rand(3, CANVAS, CANVAS, generator=torch.Generator().manual_seed(2)) < 0.55
    labels = verifier._components(mask)
    for picture, label in zip(mask.tolist(), labels, strict=True):
        todo = {(y, x) for y in range(CANVAS) for x in range(CANVAS) if picture[y][x]}
        assert int((label > 0).sum()) == len(todo)
        groups = 0
        while todo:
            stack, group = [todo.pop()], set()
            while stack:
                y, x = stack.pop()
                group.add((y, x))
                near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & todo
                todo -= near
                stack.extend(near)
            assert len({int(label[y, x]) for y, x in group}) == 1
            groups += 1
        assert len(label[label > 0].unique()) == groups


def test_template_match_is_the_soft_intersection_over_union():
    cover = torch.rand(2, CANVAS, CANVAS, generator=torch.Generator().manual_seed(3))
    cover[:, :6], cover[:, :, 26:] = 0, 0
    centre_x, centre_y = torch.tensor([14.0, 17.5]), torch.tensor([16.5, 20.0])
    iou, _ = verifier._best_templates(cover, centre_x, centre_y)
    half = verifier.HALF_WINDOW
    for m in range(2):
        padded = torch.nn.functional.pad(cover[m], (half,) * 4)
        best = 0.0
        for jy in (-0.5, 0.0, 0.5):
            for jx in (-0.5, 0.0, 0.5):
                y, x = float(centre_y[m]) + jy, float(centre_x[m]) + jx
                seen = padded[int(y) : int(y) + 2 * half, int(x) : int(x) + 2 * half]
                for drawn in verifier._template_bank()[int(2 * (y % 1)), int(2 * (x % 1))]:
                    outside = cover[m].sum() - seen.sum()
                    both, either = torch.minimum(drawn, seen).sum(), torch.maximum(drawn, seen).sum()
                    best = max(best, float(both / (either + outside)))
        assert iou[m] == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("large_first", [False, True])
def test_of_two_equal_matches_the_one_of_the_promised_size_counts(large_first: bool):
    """Also guards against an answer that depends on the order in which candidates are tried."""
    small, large = Thing("circle", "red", 4.5, 8, 8), Thing("circle", "red", 7.5, 20, 20)
    things = (large, small) if large_first else (small, large)
    (reading,) = read(draw([Scene(Spec("white", (("circle", "red"),), size="small"), things, PLAIN)]))
    for size in ("small", "large"):
        verdict = judge(reading, parse_caption(f"a {size} red circle on a white background"))
        assert verdict["size"] == 1
        assert verdict["count"] == 0


def test_another_picture_size_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 64, 64\).*\(B, 3, 32, 32\)"):
        read(torch.zeros(2, 3, 8 * GRID * 2, 64))
