"""Tastes: rules see the style, nothing else, and users disagree where they are meant to."""

import random

import pytest
import torch

from diffalign.errors import ConfigError
from diffalign.world import taste
from diffalign.world.scenes import CANVAS, Scene, Spec, Style, Thing, compose, draw, parse_caption, sample_scenes
from diffalign.world.verifier import Reading, judge, read

CAPTION = "a red square left of a blue triangle on a gray background"


def reading_of(style: Style, seed: int = 0) -> Reading:
    return read(draw([compose(parse_caption(CAPTION), random.Random(seed), style)]))[0]


def single(cx: float, cy: float) -> Reading:
    spec = Spec("white", (("circle", "red"),), size="small")
    return read(draw([Scene(spec, (Thing("circle", "red", 4.5, cx, cy),), Style())]))[0]


@pytest.mark.parametrize(
    ("rule", "liked", "disliked"),
    [
        ("outlined", Style(outline=True), Style()),
        ("plain", Style(), Style(outline=True)),
        ("plain", Style(), Style(striped=True)),
        ("striped", Style(striped=True), Style()),
        ("pastel", Style(pastel=True), Style()),
        ("vivid", Style(), Style(pastel=True)),
        ("tilted", Style(tilt=1), Style()),
        ("upright", Style(), Style(tilt=-1)),
    ],
)
def test_rule_likes_its_style(rule: str, liked: Style, disliked: Style):
    for seed in range(5):
        assert taste.RULES[rule](reading_of(liked, seed)) > 0.8
        assert taste.RULES[rule](reading_of(disliked, seed)) < 0.2


def test_placement_rules_run_from_one_edge_of_the_grid_to_the_other():
    assert taste.leftward(single(8, 16)) == pytest.approx(1, abs=0.02)
    assert taste.leftward(single(24, 16)) == pytest.approx(0, abs=0.02)
    assert taste.leftward(single(16, 16)) == pytest.approx(0.5, abs=0.02)
    assert taste.upward(single(16, 8)) == pytest.approx(1, abs=0.02)
    assert taste.downward(single(16, 8)) == pytest.approx(0, abs=0.02)


def test_mirror_image_swaps_left_and_right():
    images = draw(sample_scenes(40, seed=6))
    for here, mirrored in zip(read(images), read(images.flip(3)), strict=True):
        assert taste.leftward(here) == pytest.approx(taste.rightward(mirrored), abs=0.02)
        assert taste.leftward(here) + taste.rightward(here) == pytest.approx(1)


def test_every_rule_is_a_share_and_zero_where_nothing_is_seen():
    (empty,) = read(torch.full((1, 3, CANVAS, CANVAS), 0.5))
    readings = read(torch.rand(20, 3, CANVAS, CANVAS, generator=torch.Generator().manual_seed(0)))
    readings += read(draw(sample_scenes(40, seed=8)))
    for rule in taste.RULES.values():
        assert rule(empty) == 0
        assert all(0 <= rule(reading) <= 1 for reading in readings)


def test_colourless_thing_is_not_vivid():
    ink = torch.full((1, 3, CANVAS, CANVAS), 0.97)
    ink[:, :, 10:20, 10:20] = 0.05
    (reading,) = read(ink)
    assert len(reading.things) == 1
    assert taste.vivid(reading) == 0


def test_users_are_weighted_rules_with_numbers_of_their_own():
    assert len({user.user_id for user in taste.USERS.values()} | {taste.RULE_USER_ID}) == len(taste.USERS) + 1
    for name, user in taste.USERS.items():
        assert user.name == name
        assert set(user.weights) <= set(taste.RULES)
        assert min(user.weights.values()) > 0
        assert sum(user.weights.values()) == pytest.approx(1)
    assert not set(taste.USERS) & set(taste.RULES)


@pytest.mark.parametrize(("one", "other"), [("ada", "bela"), ("cleo", "dev"), ("eli", "fay")])
def test_some_users_are_opposites(one: str, other: str):
    scores = torch.tensor(
        [[taste.USERS[name](reading) for name in (one, other)] for reading in read(draw(sample_scenes(200, seed=4)))]
    )
    assert torch.corrcoef(scores.T)[0, 1] < -0.3


def test_combined_runs_from_verifier_to_taste():
    reading = reading_of(Style(outline=True))
    wrong = CAPTION.replace("gray", "white")
    outlined, right = taste.find("outlined"), judge(reading, parse_caption(wrong))["score"]
    assert right < 1
    assert taste.combined(reading, wrong, outlined, 0.0) == right
    assert taste.combined(reading, wrong, outlined, 1.0) == outlined(reading)
    assert taste.combined(reading, wrong, outlined, 0.25) == pytest.approx(0.75 * right + 0.25 * outlined(reading))


def test_unknown_taste_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'outlind' not found; did you mean 'outlined'\?.*Users: ada"):
        taste.find("outlind")
