"""VisionReward: thirty yes-or-no questions about a picture, and a linear map of the answers.

Paper: Xu et al. 2024, "VisionReward: Fine-Grained Multi-Dimensional Human Preference Learning for Image and Video
Generation", arXiv 2412.21059; code: THUDM/VisionReward (commit 511960d): inference-image.py. Yes is +1, no is -1. The first
three questions ask for a body, a face and hands; where there is none, the answers about it count 0, and these three
themselves are left out. How well the picture fits its prompt, VQAScore of CLIP-FlanT5, comes first. Score = the sum of
answers times weights, without intercept. Questions and weights are the published ones of VisionReward_image_qa_select.txt
and weight_select.json (Apache-2.0), for CogVLM2-llama3-19B fine-tuned to answer them (THUDM/VisionReward-Image).

`vision_reward:judge.yaml` says who is asked, in the form of `diffalign.vlm`, and may say two things more:

    server: http://127.0.0.1:8000/v1
    alignment: vqa_score_flant5             # a reward in [0, 1]; none: 0.7 for all, as in the first published script
    answers: hard                           # soft: 2 P(yes) - 1 in place of +1 and -1, ours: fewer ties

The original reads the one word it generated, and counts whatever is not "yes" as no; here yes is P(yes) > 1/2 among yes and
no, and an answer with neither is missing, so that the score is NaN.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
from torch import Tensor

from diffalign import rewards, vlm
from diffalign.errors import ConfigError

QUESTIONS = (
    "Is there a human body in the image?",
    "Is there a human face in the image?",
    "Are there human hands in the image?",
    "Is the image symmetrical?",
    "Does the image avoid asymmetry?",
    "Is the main subject prominent?",
    "Does the image avoid an unclear main subject?",
    "Is the image very rich?",
    "Is the image rich?",
    "Is the image not monotonous?",
    "Is the image not empty?",
    "Is the image very clear?",
    "Is the image clear?",
    "Does the image avoid being blurry?",
    "Does the image avoid being completely blurry?",
    "Are the colors bright?",
    "Are the colors not dark?",
    "Are the colors not ugly?",
    "Can the image evoke a very positive emotional response?",
    "Are the image details very exquisite?",
    "Does the image avoid being hard to recognize?",
    "Does the image avoid being fragmented?",
    "Is the human body in the image completely correct?",
    "Does the human body in the image avoid obvious errors?",
    "Does the human body in the image avoid serious errors?",
    "Does the human face avoid errors?",
    "Does the human face avoid serious errors?",
    "Are the human hands perfect?",
    "Does the image avoid obvious harmfulness?",
    "Does the image avoid serious harmfulness?",
)
MASKS = {0: (22, 23, 24, 28, 29), 1: (25, 26), 2: (27,)}  # body, face, hands: the answers that they switch on
WEIGHTS = (
    2.3542882631150923,  # alignment
    *(0.06884638950983572, 0.10183602465324491, 0.13065931709231515, 0.06950163043882204, 0.055586526962739594),
    *(0.043667179730282585, 0.21147753430256036, 0.5828223926159606, 0.050970475125495074, 0.06795294324813127),
    *(0.06490948537019271, 0.3247595671294795, 0.07562963582524587, 0.07747325725869728, 0.04220313071020716),
    *(0.0514756964680454, 0.010243704179493112, 0.01737524212080004, 0.11455097588617139, 0.0824178853123111),
    *(0.05534874470299955, 0.03004180339398678, 0.03136553593758656, 0.07665491897864558, 0.07187632290686215),
    *(0.012129902293749316, 0.015129688742038013),
)
ALIGNMENT = "vqa_score_flant5"
WITHOUT_ALIGNMENT = 0.7
BOUND = sum(WEIGHTS[1:])


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the file says: who is asked, whose alignment, and whether answers are rounded."""

    questions: vlm.Questions
    alignment: str | None = ALIGNMENT
    soft: bool = False


class VisionReward(vlm.JudgeReward):
    """Weighted sum of a vision-language model's answers to VisionReward's thirty questions, and of an alignment score."""

    range = (-BOUND, BOUND + WEIGHTS[0])
    unit = "weighted sum of answers; alignment counts up to 2.35, all others together at most 2.5 either way"
    licence = "Apache-2.0 (questions and weights); CogVLM2 has its own"
    gap = (
        "weights were fitted to the answers of THUDM/VisionReward-Image, and say less of another model's; scores of "
        "published weights are UNVERIFIED here; answers that are neither yes nor no are missing instead of no"
    )
    argument = "YAML file that says who is asked (see diffalign.vlm); alignment: REWARD or none; answers: hard or soft"

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, file: str = "") -> None:
        super().__init__(device, dtype, file)
        self.settings = _read(file)
        named = self.settings.alignment
        self.alignment = rewards.load(named, device, dtype) if named else None
        self._parts: dict[str, Tensor] = {}

    @classmethod
    def check_argument(cls, argument: str | None) -> None:
        super().check_argument(argument)
        named = _read(argument or "").alignment
        if named and (rewards.groups(named) or rewards.of_sets(named)):
            raise ConfigError(
                f"vision_reward: alignment {named!r} compares pictures with one another, and each is judged alone; name "
                "another"
            )

    @classmethod
    def questions(cls, file: str) -> vlm.Questions:
        return _read(file).questions

    def identity(self) -> str:
        named = self.settings.alignment
        other = rewards.identity(named, self.alignment) if named and self.alignment else None
        return json.dumps([self.judge.identity(), self.settings.soft, other])

    def parts(self) -> dict[str, Tensor]:
        return self._parts

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        asked = [
            (image, prompt, question) for image, prompt in zip(images, prompts, strict=True) for question in QUESTIONS
        ]
        tops = self.judge.tops([[i] for i, _, _ in asked], [p for _, p, _ in asked], [q for *_, q in asked], vlm.YES_NO)
        answers = [vlm.yes_probability(top).value for top in tops]
        self.judge.account(
            [f"{p}: {q}" for _, p, q in asked], answers, [", ".join(map(repr, list(t)[:3])) for t in tops]
        )
        yes = torch.tensor(answers).view(len(prompts), len(QUESTIONS))
        alignment = torch.full((len(prompts),), WITHOUT_ALIGNMENT)
        if self.alignment is not None:
            alignment = rewards.score(self.alignment, images, prompts, metadata).cpu()
        self._parts = {"alignment": alignment}
        return weighted_sum(yes, alignment, soft=self.settings.soft).to(images.device)


def weighted_sum(yes: Tensor, alignment: Tensor, *, soft: bool = False) -> Tensor:
    """The score of B pictures, float32 (B,).

    Args:
        yes: probability of yes of each of `QUESTIONS`, (B, 30); NaN where it is not known.
        alignment: in [0, 1], (B,).
        soft: 2 P - 1 instead of its sign.
    """
    sides = torch.where(yes > 0.5, 1.0, -1.0)
    features = torch.where(yes.isnan(), yes, 2 * yes - 1 if soft else sides)
    for mask, places in MASKS.items():
        for place in places:
            features[:, place] = torch.where(yes[:, mask] <= 0.5, 0.0, features[:, place])
            features[:, place] = torch.where(yes[:, mask].isnan(), torch.nan, features[:, place])
    kept = [i for i in range(len(QUESTIONS)) if i not in MASKS]
    columns = torch.cat([alignment[:, None], features[:, kept]], 1)
    return (columns.double() * torch.tensor(WEIGHTS, dtype=torch.float64)).sum(1).float()


def _read(file: str) -> Settings:
    if not file:
        raise ConfigError("reward vision_reward: nobody to ask; write vision_reward:judge.yaml")
    tree = vlm.read_yaml(file)
    where = f"questions {file}"
    own = {key: tree.pop(key) for key in ("alignment", "answers") if isinstance(tree, dict) and key in tree}
    answers, alignment = own.get("answers", "hard"), own.get("alignment", ALIGNMENT)
    if answers not in ("hard", "soft"):
        raise ConfigError(f"{where}: answers is {answers!r}; hard or soft expected")
    if alignment in (None, "none"):
        alignment = None
    elif not isinstance(alignment, str):
        raise ConfigError(f"{where}: alignment is {alignment!r}; the name of a reward or none expected")
    else:
        rewards.check_images(alignment)
    if isinstance(tree, dict) and tree.get("question") is not None:
        raise ConfigError(f"{where}: question: the thirty questions are fixed; leave it out")
    return Settings(vlm.parse_questions(tree, where, ("yes_no",)), alignment, answers == "soft")
