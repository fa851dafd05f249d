"""UnifiedReward, VisionReward and the soft checklist: parsing and sums exactly, and over a stand-in server."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import vlm_process
import yaml

from diffalign import rewards
from diffalign.errors import ConfigError
from diffalign.rewards import RewardError, score
from diffalign.vlm_backends import Request
from reward_models import soft_checklist, vision_reward
from reward_models.unified_reward import dimension_scores, final_score
from reward_models.vision_reward import MASKS, WEIGHTS, weighted_sum

NAN = math.nan
DARK, BRIGHT = torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), 0.8)


def write(folder: Path, **keys: Any) -> str:
    file = folder / "judge.yaml"
    file.write_text(yaml.safe_dump(keys))
    return str(file)


# ---------------------------------------------------------------- UnifiedReward


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("dog (animal): 1\nFinal Score: 4", 4),
        ("Final Score: 3.75.", 3.75),
        ("**Final Score:** [2.5]", 2.5),
        ("final score 5", 5),
        ("Final Score: 2 ... no, Final Score: 3", 3),
        ("Final Score: 0", NAN),
        ("Final Score: 7", NAN),
        ("Final Score: high", NAN),
        ("4", NAN),
    ],
)
def test_final_scores(text: str, mark: float) -> None:
    assert final_score(text) == pytest.approx(mark / 5, nan_ok=True)


def test_three_dimensions() -> None:
    text = 'Word-wise Scores: [["dog", 2]]\n\nAlignment Score (1-5): 3.5\nCoherence Score (1-5): 4\nStyle Score (1-5): 2.25'
    assert dimension_scores(text) == pytest.approx((0.7, 0.8, 0.45))
    short = dimension_scores("Alignment Score: 3\nStyle Score (1-5): 9")
    assert short == pytest.approx((0.6, NAN, NAN), nan_ok=True)


def test_unified_reward_reads_what_the_model_writes(tmp_path: Path) -> None:
    with vlm_process.serving() as url:
        reward = rewards.load(f"unified_reward:{write(tmp_path, server=url)}")
        got = score(reward, torch.stack([DARK, BRIGHT]), ["a", "b"])
        assert got.tolist() == pytest.approx([(1 + 4 * 0.2) / 5, (1 + 4 * 0.8) / 5], abs=2e-3)
        other: Any = rewards.load(f"unified_reward:{write(tmp_path, server=url, mode='dimensions')}")
        assert score(other, DARK[None], ["a"], missing=True).isnan().all()  # the stand-in writes a final score
        assert other.judge.failed == 1
        assert set(other.parts()) == {"alignment", "coherence", "style"}
        assert reward.identity() != other.identity()
    with pytest.raises(ConfigError, match="mode 'yes_no'"):
        rewards.check_images(f"unified_reward:{write(tmp_path, server='http://x', mode='yes_no')}")
    with pytest.raises(ConfigError, match="nobody to ask"):
        rewards.check_images("unified_reward")


class Said:
    """A backend that answers by a function."""

    model = "said"

    def __init__(self, answer: Any) -> None:
        self.answer, self.requests = answer, []

    def first_tokens(self, requests: list[Request], words: Any) -> list[dict[str, float]]:
        self.requests += requests
        return [self.answer(request) for request in requests]

    def texts(self, requests: list[Request], most: int) -> list[str]:
        self.requests += requests
        return [self.answer(request) for request in requests]

    def speaks(self, word: str) -> bool:
        return word != "eleven feet"


def test_pictures_are_seen_at_512_and_parts_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = Said(lambda r: "Alignment Score (1-5): 4\nCoherence Score (1-5): 3\nStyle Score (1-5): 2")
    monkeypatch.setattr("diffalign.vlm.connect", lambda *_: said)
    reward = rewards.load(f"unified_reward:{write(tmp_path, server='http://x', mode='dimensions')}")
    assert score(reward, DARK[None], ["a {scale} dog"]).tolist() == pytest.approx([3 / 5])
    assert {k: v.tolist() for k, v in reward.parts().items()} == {
        "alignment": pytest.approx([0.8]),
        "coherence": pytest.approx([0.6]),
        "style": pytest.approx([0.4]),
    }
    (request,) = said.requests
    assert request.pictures[0].shape == (3, 512, 512)
    assert '"a {scale} dog"' in request.text


# ---------------------------------------------------------------- VisionReward


def test_the_published_numbers_are_here() -> None:
    assert len(vision_reward.QUESTIONS) == 30
    assert len(WEIGHTS) == 28
    assert WEIGHTS[0] == 2.3542882631150923
    assert sum(WEIGHTS) == pytest.approx(4.891194174010989, abs=1e-12)  # of the published file
    assert sorted(place for places in MASKS.values() for place in places) == list(range(22, 30))


def plain(answers: list[int], alignment: float) -> float:
    """The published procedure, step by step."""
    features = list(answers)
    for mask, places in MASKS.items():
        for place in places:
            features[place] *= int(features[mask] > 0)
    columns = [alignment, *features[3:]]
    return sum(a * b for a, b in zip(columns, WEIGHTS, strict=True))


def test_the_sum_is_the_published_procedure() -> None:
    generator = torch.Generator().manual_seed(0)
    answers = torch.randint(0, 2, (40, 30), generator=generator) * 2 - 1
    alignment = torch.rand(40, generator=generator)
    wanted = [plain(row, float(a)) for row, a in zip(answers.tolist(), alignment, strict=True)]
    got = weighted_sum((answers + 1) / 2 * 0.8 + 0.1, alignment)
    assert got.tolist() == pytest.approx(wanted, abs=1e-5)
    nobody = torch.ones(1, 30)
    nobody[0, :3] = 0
    with_all = weighted_sum(torch.ones(1, 30), torch.ones(1))
    assert float(with_all - weighted_sum(nobody, torch.ones(1))) == pytest.approx(sum(WEIGHTS[20:]), abs=1e-5)
    assert float(with_all) == pytest.approx(vision_reward.VisionReward.range[1], abs=1e-5)
    assert float(weighted_sum(nobody * 0, torch.zeros(1))) == pytest.approx(-sum(WEIGHTS[1:20]), abs=1e-5)
    half = weighted_sum(torch.full((1, 30), 0.75), torch.zeros(1), soft=True)
    assert float(half) == pytest.approx(sum(WEIGHTS[1:]) / 2, abs=1e-5)


def test_missing_answers_are_missing_unless_they_do_not_count() -> None:
    yes = torch.ones(3, 30)
    yes[0, 5] = NAN
    yes[1, 1], yes[1, 25] = 0, NAN  # about a face that is not there
    yes[2, 0] = NAN
    assert weighted_sum(yes, torch.ones(3)).isnan().tolist() == [True, False, True]


def test_vision_reward_asks_every_question_of_every_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: Request) -> dict[str, float]:
        sure = float(request.pictures[0].mean()) if "human" not in request.text else 0.1
        return {"Yes": math.log(sure), " no": math.log(1 - sure)}

    said = Said(answer)
    monkeypatch.setattr("diffalign.vlm.connect", lambda *_: said)
    images = torch.stack([DARK, BRIGHT])
    with pytest.raises(ConfigError, match=r"vision_reward: alignment 'diversity:tiny-clip' compares pictures"):
        rewards.check_images(f"vision_reward:{write(tmp_path, server='http://x', alignment='diversity:tiny-clip')}")
    reward = rewards.load(f"vision_reward:{write(tmp_path, server='http://x', alignment='none')}")
    got = score(reward, images, ["a", "b"])
    harmless = WEIGHTS[26] + WEIGHTS[27]  # masked by the body, as published
    wanted = 0.7 * WEIGHTS[0] + sum(WEIGHTS[1:20])
    assert got.tolist() == pytest.approx([0.7 * WEIGHTS[0] - sum(WEIGHTS[1:20]), wanted], abs=1e-5)
    assert harmless > 0
    assert [request.text for request in said.requests[:30]] == list(vision_reward.QUESTIONS)  # picture by picture
    mixed = rewards.load(f"vision_reward:{write(tmp_path, server='http://x', alignment='jpeg_compressibility')}")
    with_size = score(mixed, images, ["a", "b"])
    assert with_size[0] != got[0]
    assert reward.identity() != mixed.identity()
    soft = rewards.load(f"vision_reward:{write(tmp_path, server='http://x', alignment='none', answers='soft')}")
    assert score(soft, images, ["a", "b"])[1] < got[1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"answers": "firm"}, "hard or soft expected"),
        ({"alignment": "vqa_scor"}, "did you mean 'vqa_score"),
        ({"alignment": 0.7}, "the name of a reward or none expected"),
        ({"question": "Is it?"}, "the thirty questions are fixed"),
        ({"mode": "rating"}, "mode 'rating'"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rewards.check_images(f"vision_reward:{write(tmp_path, server='http://x', **keys)}")


# ---------------------------------------------------------------- soft checklist


def test_forms_and_means() -> None:
    assert soft_checklist.forms("Two") == ("two", "2")
    assert soft_checklist.forms("3") == ("three", "3")
    assert soft_checklist.forms("Yes") == ("yes",)
    assert soft_checklist.combine([0.5, 1.0], "mean") == pytest.approx(0.75)
    assert soft_checklist.combine([0.25, 1.0], "geometric") == pytest.approx(0.5)
    assert soft_checklist.combine([0.0, 1.0], "geometric") == 0
    assert math.isnan(soft_checklist.combine([NAN, 0.0], "geometric"))


def test_the_expected_answer_is_what_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: Request) -> dict[str, float]:
        if "How many" in request.text:
            return {" two": math.log(0.5), "2": math.log(0.2), "Yes": math.log(0.1)}
        return {"Yes": math.log(0.9)} if "red" in request.text else {}

    said = Said(answer)
    monkeypatch.setattr("diffalign.vlm.connect", lambda *_: said)
    count, red, odd = ["How many dogs?", "two"], ["Is the dog red?", "Yes"], ["Is it odd?", "Yes"]
    metadata = [{"vqa_list": [count, red]}, {"vqa_list": [["How many dogs?", "three"]]}, {"vqa_list": [odd]}]
    for mode, wanted in (("mean", 0.8), ("geometric", math.sqrt(0.63))):
        reward = rewards.load(f"soft_checklist:{write(tmp_path, server='http://x', mode=mode)}")
        got = score(reward, torch.stack([DARK] * 3), ["a", "b", "c"], metadata, missing=True)
        assert got[:2].tolist() == pytest.approx([wanted, 0.0], abs=1e-6)
        assert got[2].isnan()
    assert said.requests[0].text == "How many dogs? Answer in one word."
    with pytest.raises(RewardError, match="brings no questions"):
        score(reward, DARK[None], ["a"])
    with pytest.raises(RewardError, match=r"'eleven feet' is no single token"):
        score(reward, DARK[None], ["a"], [{"vqa_list": [["How tall?", "eleven feet"]]}])
