"""GenEval's rules exactly, the colour namer against Pillow and plain CLIP, and detectors on tiny random weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rewards_support import enlarge, pictures, to_pil
from torchvision import transforms
from transformers import (
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessor,
    OwlViTProcessor,
    SwinConfig,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from diffalign import geneval as rules
from diffalign import rewards
from diffalign.errors import ConfigError
from diffalign.geneval import Detection, judge, keep, parse_prompt, relations
from diffalign.rewards import RewardError, score
from diffalign.world.bases import build_tokenizer
from reward_models._detectors import load_detector
from reward_models.geneval import GenEval, cut_out, promise

CLASSES = {"clock": "clock", "mouse": "computer mouse"}


def at(x: float, y: float, w: float = 10, h: float = 10, score: float = 0.95) -> Detection:
    return Detection((x - w / 2, y - h / 2, x + w / 2, y + h / 2), score)


# ---------------------------------------------------------------- places


@pytest.mark.parametrize(
    ("dx", "dy", "wanted"),
    [
        (-30, 0, {"left of"}),
        (30, 0, {"right of"}),
        (0, -30, {"above"}),
        (0, 30, {"below"}),
        (-30, -30, {"left of", "above"}),
        (30, 30, {"right of", "below"}),
        (30, 12, {"right of"}),  # (12 - 2) / |offset| = 0.31
        (2, 1, set()),  # within a tenth of both sizes
        (0, 0, set()),
        # Both sizes are 10, so that 2 of the offset are taken off: (4 - 2) / 4 is not above 0.5, the next is.
        (4, 0, set()),
        (4.01, 0, {"right of"}),
    ],
)
def test_relations(dx: float, dy: float, wanted: set[str]) -> None:
    assert relations(at(50 + dx, 50 + dy), at(50, 50)) == wanted
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(at(50, 50), at(50 + dx, 50 + dy)) == {opposite[name] for name in wanted}


def test_larger_things_must_be_farther_apart() -> None:
    assert relations(at(62, 50, 10), at(50, 50, 10)) == {"right of"}
    assert relations(at(62, 50, 60), at(50, 50, 60)) == set()  # 0.1 * 120 = 12


# ---------------------------------------------------------------- counts, colours


def no_colours(name: str, things: Any) -> list[str]:
    raise AssertionError("nobody asked for colours")


TWO = {"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}]}


@pytest.mark.parametrize(
    ("n", "correct", "strict", "graded"),
    [(0, False, False, 0), (1, False, False, 0.5), (2, True, True, 1), (3, False, False, 0.5), (5, False, False, -0.5)],
)
def test_counts(n: int, correct: bool, strict: bool, graded: float) -> None:
    verdict = judge({"clock": [at(20 * i, 0) for i in range(n)]}, TWO, no_colours)
    assert (verdict.correct, verdict.strict, verdict.graded) == (correct, strict, pytest.approx(graded))
    # Without the exclude clause more than named are correct, but not strictly.
    verdict = judge({"clock": [at(20 * i, 0) for i in range(n)]}, {"include": TWO["include"]}, no_colours)
    assert verdict.correct == (n >= 2)
    assert verdict.strict == (n == 2)


def test_detections_that_count() -> None:
    found = {
        "clock": [at(i, 0, score=s) for i, s in enumerate((0.3, 0.95, 0.31, 0.9, 0.91))],
        "cup": [at(0, 0, score=0.2)],
    }
    assert [d.score for d in keep(found, "single_object")["clock"]] == [0.95, 0.91, 0.9, 0.31]
    assert [d.score for d in keep(found, "counting")["clock"]] == [0.95, 0.91]
    assert "cup" not in keep(found, "")
    many = {"clock": [at(i, 0, score=0.5 + i / 100) for i in range(20)]}
    assert [d.score for d in keep(many, "colors")["clock"]][:2] == pytest.approx([0.69, 0.68])
    assert len(keep(many, "colors")["clock"]) == 16


def test_colours_are_those_of_the_surest_things() -> None:
    colours = {0.0: "red", 20.0: "blue", 40.0: "red"}

    def name_colours(name: str, things: Any) -> list[str]:
        return [colours[thing.box[0] + 5] for thing in things]

    found = {"clock": [at(0, 0), at(20, 0), at(40, 0)]}
    one = {"include": [{"class": "clock", "count": 1, "color": "red"}]}
    assert judge(found, one, name_colours).correct
    assert not judge(found, one, name_colours).strict
    blue = {"include": [{"class": "clock", "count": 1, "color": "blue"}]}
    assert not judge(found, blue, name_colours).correct  # the first is red; the others are not looked at
    three = {"include": [{"class": "clock", "count": 3, "color": "red"}]}
    verdict = judge(found, three, name_colours)
    assert (verdict.correct, verdict.strict, verdict.graded) == (False, False, pytest.approx((1 + 2 / 3) / 2))
    verdict = judge({}, three, no_colours)
    assert verdict.graded == 0  # count and colour


def test_places_between_groups() -> None:
    wanted = {"include": [{"class": "cup", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]}
    cup, left, right = at(100, 50), at(20, 50), at(180, 50)
    for found, correct, graded in (
        ({"cup": [cup], "dog": [left]}, True, 1),
        ({"cup": [cup], "dog": [right]}, False, (1 + 1 + 0 + 1) / 4),  # as released: credits 0 and 1
        ({"dog": [left]}, False, (0 + 1 + 0) / 3),  # no target
        ({"cup": [cup]}, False, (1 + 0 + 0) / 3),
    ):
        verdict = judge(found, wanted, no_colours)
        assert (verdict.correct, verdict.strict, verdict.graded) == (correct, correct, pytest.approx(graded))
    surest = {"cup": [cup], "dog": [left, right]}
    assert judge(surest, wanted, no_colours).correct
    assert not judge(surest, wanted, no_colours).strict
    both = {"include": [wanted["include"][0], {"class": "dog", "count": 2, "position": ["left of", 0]}]}
    assert not judge(surest, both, no_colours).correct  # every one must be there


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("prompt", "tag", "include"),
    [
        ("a photo of an orange", "single_object", [{"class": "orange", "count": 1}]),
        (
            "a photo of a toaster and an oven",
            "two_object",
            [{"class": "toaster", "count": 1}, {"class": "oven", "count": 1}],
        ),
        ("a photo of two wine glasses", "counting", [{"class": "wine glass", "count": 2}]),
        ("a photo of four benchs", "counting", [{"class": "bench", "count": 4}]),
        ("a photo of an orange cow", "colors", [{"class": "cow", "count": 1, "color": "orange"}]),
        (
            "a photo of a couch below a cup",
            "position",
            [{"class": "cup", "count": 1}, {"class": "couch", "count": 1, "position": ["below", 0]}],
        ),
        (
            "a photo of a green skis and a brown airplane",
            "color_attr",
            [{"class": "skis", "count": 1, "color": "green"}, {"class": "airplane", "count": 1, "color": "brown"}],
        ),
    ],
)
def test_prompts_say_their_metadata(prompt: str, tag: str, include: list[Any]) -> None:
    found = parse_prompt(prompt)
    assert found is not None
    assert (found["tag"], found["include"], found["prompt"]) == (tag, include, prompt)
    assert ("exclude" in found) == (tag == "counting")
    if tag == "counting":
        assert found["exclude"] == [{"class": include[0]["class"], "count": include[0]["count"] + 1}]


def test_other_prompts_need_metadata() -> None:
    others = (
        "a dog",
        "a photo of a unicorn",
        "a photo of a dog and a red cat",
        "a photo of a dog and a cat and a cow",
        "",
    )
    for prompt in others:
        assert parse_prompt(prompt) is None
    with pytest.raises(RewardError, match="none of GenEval's and brings no metadata"):
        promise("a dog", {})
    given = {"include": '[{"class": "dog", "count": 1}]', "tag": "single_object", "exclude": None}
    assert promise("a dog", given) == {"include": [{"class": "dog", "count": 1}], "tag": "single_object"}
    assert len(rules.CLASSES) == len(set(rules.CLASSES)) == 80


# ---------------------------------------------------------------- colours of pixels


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("clip"), build_tokenizer()
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = tower | {"vocab_size": len(tokenizer), "max_position_embeddings": 24}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config=tower | {"image_size": 24, "patch_size": 8}, projection_dim=16)
    )
    enlarge(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_crops_are_grey_outside_of_the_mask() -> None:
    image, mask = pictures(1, 12, 16)[0], torch.zeros(12, 16, dtype=torch.bool)
    mask[3:7, 4:9] = True
    box = (3.4, 1.5, 10.5, 8.6)
    pil, grey = to_pil(image), Image.new("RGB", (16, 12), "#999")
    wanted = Image.composite(pil, grey, Image.fromarray(mask.numpy())).crop(box)
    got = cut_out(image, Detection(box, 1.0, mask))
    assert torch.equal((got * 255).round().byte(), transforms.functional.pil_to_tensor(wanted))
    assert cut_out(image, Detection((20, 20, 20, 20), 1.0)).shape == (3, 1, 1)


def test_colours_are_clips_choice(clip: Path) -> None:
    reward = GenEval(clip=clip, detector=lambda images: [{}] * len(images))
    image, box = pictures(1, 48, 40)[0], (2.0, 5.0, 33.0, 40.0)
    model = CLIPModel.from_pretrained(clip).eval()
    transform = transforms.Compose(
        [
            transforms.Resize(24, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(24),
            transforms.ToTensor(),
            transforms.Normalize(rewards.CLIP_MEAN, rewards.CLIP_STD),
        ]
    )
    texts = []
    with torch.no_grad():
        for colour in rules.COLOURS:
            lines = [
                f"a photo of a {colour} cup",
                f"a photo of a {colour}-colored cup",
                f"a photo of a {colour} object",
            ]
            found = model.get_text_features(**build_tokenizer()(lines, padding=True, return_tensors="pt")).pooler_output
            mean = (found / found.norm(dim=1, keepdim=True)).mean(0)
            texts.append(mean / mean.norm())
        seen = model.get_image_features(transform(to_pil(image).crop(box))[None]).pooler_output[0]
    chances = torch.stack(texts) @ (seen / seen.norm())
    assert reward.colours(image, "cup", [Detection(box, 1.0)]) == [rules.COLOURS[int(chances.argmax())]]
    assert torch.allclose(reward._texts["cup"], torch.stack(texts), atol=1e-5)


def test_the_reward_puts_them_together(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def detector(images: torch.Tensor) -> list[dict[str, list[Detection]]]:
        bright = {"clock": [at(8, 8), at(24, 8), at(8, 24, score=0.5)]}
        return [bright if float(image.mean()) > 0.5 else {"clock": [at(8, 8)]} for image in images]

    images = torch.stack([torch.full((3, 32, 32), v) for v in (0.9, 0.1)])
    prompts = ["a photo of two clocks"] * 2
    for way, wanted in (("correct", [1, 0]), ("strict", [1, 0]), ("graded", [1, 0.5])):
        reward: Any = GenEval(what=way, clip=clip, detector=detector)
        assert score(reward, images, prompts).tolist() == pytest.approx(wanted)
        assert set(reward.parts()) == {"correct", "strict", "graded"} - {way}
    three = [{"include": [{"class": "clock", "count": 3}], "tag": "single_object"}] * 2  # a lower bar than for counting
    assert score(GenEval(clip=clip, detector=detector), images, ["x", "y"], three).tolist() == [1, 0]
    coloured = ["a photo of a red clock"] * 2
    monkeypatch.setattr(GenEval, "colours", lambda self, image, name, things: ["red" if image.mean() > 0.5 else "blue"])
    assert score(GenEval(clip=clip, detector=detector), images, coloured).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "message"),
    [("geneval:stric", "did you mean 'strict'"), ("geneval:@x", "Available: correct, strict, graded")],
)
def test_wrong_arguments(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rewards.check_images(name)


# ---------------------------------------------------------------- detectors

LABELS = {0: "clock", 1: "mouse", 2: "giraffe"}
NAMES = {"id2label": LABELS, "label2id": {name: i for i, name in LABELS.items()}}


def test_masks_are_the_models_instances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "reward_models._detectors.INSTANCES", 8
    )  # as many as there are queries, as in the published model
    torch.manual_seed(1)
    swin = SwinConfig(
        image_size=64,
        embed_dim=12,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_indices=(1, 2, 3, 4),
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        encoder_feedforward_dim=32,
        num_queries=8,
        **NAMES,
    )
    model = Mask2FormerForUniversalSegmentation(config).eval()
    enlarge(model, 2)
    model.save_pretrained(tmp_path)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    detector: Any = load_detector("geneval", tmp_path, CLASSES)
    images = pictures(2, 48, 56)
    found = detector(images)
    assert {name for one in found for name in one} <= {"clock", "computer mouse"}
    things = [thing for one in found for name in one for thing in one[name]]
    assert things
    for thing in things:
        assert thing.mask is not None
        rows, columns = thing.mask.any(1).nonzero()[:, 0], thing.mask.any(0).nonzero()[:, 0]
        assert thing.mask.shape == (48, 56)
        assert thing.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert 0 < thing.score < 1
    # Scores are those of transformers' own post-processing, which thresholds masks at another size.
    processor = Mask2FormerImageProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        output = model(**processor(images=[to_pil(i) for i in images], return_tensors="pt"))
    theirs = processor.post_process_instance_segmentation(output, threshold=0.0, target_sizes=[(48, 56)] * 2)
    for ours, other in zip(found, theirs, strict=True):
        for label, name in ((0, "clock"), (1, "computer mouse")):
            best = max((s["score"] for s in other["segments_info"] if s["label_id"] == label), default=math.nan)
            got = max((thing.score for thing in ours.get(name, [])), default=math.nan)
            assert got == pytest.approx(best, rel=0.05, nan_ok=True)


def test_boxes_are_the_processors(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=6,
        **NAMES,
    )
    model = YolosForObjectDetection(config).eval()
    enlarge(model, 6)
    model.save_pretrained(tmp_path)
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    found = load_detector("geneval", tmp_path, CLASSES)(pictures(2, 48, 56))
    processor = AutoProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        output = model(**processor(images=[to_pil(i) for i in pictures(2, 48, 56)], return_tensors="pt"))
    theirs = processor.post_process_object_detection(output, threshold=0.05, target_sizes=[(48, 56)] * 2)
    for ours, other in zip(found, theirs, strict=True):
        for label, name in ((0, "clock"), (1, "computer mouse")):
            wanted = other["boxes"][other["labels"] == label]
            assert torch.allclose(
                torch.tensor([t.box for t in ours.get(name, [])]).view(-1, 4), wanted.view(-1, 4), atol=1e-3
            )
    assert any(found)
    with pytest.raises(RewardError, match=r"knows none of the classes; it knows clock, mouse, giraffe"):
        load_detector("geneval", tmp_path, {"zebra": "zebra"})


def test_classes_may_be_told_in_words(tmp_path: Path) -> None:
    torch.manual_seed(1)
    tokenizer = build_tokenizer()
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = OwlViTConfig(
        text_config=text, vision_config=tower | {"image_size": 32, "patch_size": 8}, projection_dim=16
    )
    model = OwlViTForObjectDetection(config).eval()
    enlarge(model, 4)
    model.save_pretrained(tmp_path)
    images = OwlViTImageProcessor(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    OwlViTProcessor(images, tokenizer).save_pretrained(tmp_path)
    found = load_detector("geneval", tmp_path, CLASSES)(pictures(2, 48, 48))
    assert {name for one in found for name in one} <= {"clock", "computer mouse"}
    assert sum(len(things) for one in found for things in one.values()) > 0
