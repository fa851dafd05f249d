"""The world itself: captions, the held-out split, placement and drawing."""

import pytest
import torch

from diffalign.world.scenes import (
    CANVAS,
    RELATIONS,
    Style,
    all_specs,
    captions,
    draw,
    is_held_out,
    parse_caption,
    restyle,
    sample_captions,
    sample_scenes,
)


def test_every_spec_survives_its_caption():
    specs = all_specs()
    assert len(specs) == 72 + 1584 + 72
    assert [parse_caption(spec.caption()) for spec in specs] == specs


def test_captions_of_different_specs_differ():
    texts = [spec.caption() for spec in all_specs()]
    assert len(set(texts)) == len(texts)


def test_held_out_captions_are_an_eighth_and_disjoint():
    seen, unseen = set(captions(held_out=False)), set(captions(held_out=True))
    assert not seen & unseen
    assert len(seen | unseen) == len(all_specs())
    assert 0.1 < len(unseen) / len(all_specs()) < 0.15


@pytest.mark.parametrize("held_out", [False, True])
def test_sampled_captions_stay_on_their_side(held_out: bool):
    drawn = sample_captions(300, seed=3, held_out=held_out)
    assert all(is_held_out(caption) is held_out for caption in drawn)
    assert drawn == sample_captions(300, seed=3, held_out=held_out)
    assert drawn != sample_captions(300, seed=4, held_out=held_out)


def test_bases_never_see_held_out_captions():
    assert not any(is_held_out(scene.caption) for scene in sample_scenes(300, seed=0))


def test_the_mix_of_kinds():
    kinds = [parse_caption(caption).kind for caption in sample_captions(2000, seed=0)]
    shares = {kind: kinds.count(kind) / len(kinds) for kind in ("one", "two", "count")}
    assert shares == pytest.approx({"one": 0.35, "two": 0.40, "count": 0.25}, abs=0.04)


def test_another_sentence_is_refused_with_an_example():
    with pytest.raises(ValueError, match="a small red circle on a white background"):
        parse_caption("a photo of an astronaut")


def test_placement_keeps_the_promised_relation_and_the_canvas():
    for scene in sample_scenes(400, seed=2):
        for thing in scene.things:
            assert thing.radius <= thing.cx <= CANVAS - thing.radius
            assert thing.radius <= thing.cy <= CANVAS - thing.radius
        if scene.spec.relation:
            dx, dy = RELATIONS[scene.spec.relation]
            first, second = scene.things
            assert (first.cx - second.cx) * dx + (first.cy - second.cy) * dy >= 12


def test_drawing_is_a_function_of_the_scene():
    scenes = sample_scenes(20, seed=5)
    images = draw(scenes)
    assert images.shape == (20, 3, CANVAS, CANVAS)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(images[7:8], draw(scenes[7:8]))


@pytest.mark.parametrize("change", [{"outline": True}, {"striped": True}, {"pastel": True}])
def test_style_shows_but_is_not_captioned(change: dict[str, bool]):
    plain = restyle(sample_scenes(1, seed=1)[0], Style())
    styled = restyle(plain, Style(**change))
    assert styled.caption == plain.caption
    assert (draw([plain]) - draw([styled])).abs().max() > 0.2
