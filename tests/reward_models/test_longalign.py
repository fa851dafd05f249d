"""LongAlign's decomposed preference on a tiny random CLIP."""

from pathlib import Path

import pytest
import torch
from rewards_support import check_batches, check_gradient, enlarge, pictures
from torchvision import transforms
from transformers import CLIPConfig, CLIPModel

from diffalign import rewards
from diffalign.errors import ConfigError
from diffalign.rewards import RewardError, score
from diffalign.world.bases import build_tokenizer
from reward_models import longalign
from reward_models.longalign import LongAlign, sentences

PROMPTS = [
    "a red circle. two blue squares",
    "two blue squares",
    "a red circle. two blue squares",
    "is it green? it is red.",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = build_tokenizer()
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    text = tower | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 20}
    clip = CLIPModel(
        CLIPConfig(text_config=text, vision_config=tower | {"image_size": 24, "patch_size": 8}, projection_dim=16)
    )
    enlarge(clip, 3)
    folder = tmp_path_factory.mktemp("longalign")
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "prompts.txt").write_text("a red circle\n\ntwo blue squares. a tree\nthree green triangles\n")
    return folder


@pytest.fixture(scope="module")
def reward(folder: Path) -> LongAlign:
    return LongAlign(prompts=folder / "prompts.txt", model=folder)


def by_hand(folder: Path, weight: float, direction_of: list[str]) -> torch.Tensor:
    """Sentence by sentence, prompt by prompt, with torchvision's transform."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), build_tokenizer()

    def text(prompt: str) -> torch.Tensor:
        rows = []
        for sentence in sentences(prompt):
            row = model.get_text_features(
                **tokenizer(sentence, return_tensors="pt", truncation=True, max_length=20)
            ).pooler_output[0]
            rows.append(row / row.norm())
        return sum(rows) / len(rows)

    transform = transforms.Compose(
        [
            transforms.CenterCrop(63),
            transforms.Resize((24, 24)),
            transforms.Normalize(rewards.CLIP_MEAN, rewards.CLIP_STD),
        ]
    )
    with torch.no_grad():
        image = model.get_image_features(pixel_values=transform(pictures(4, 64, 80))).pooler_output
        shared = sum(text(prompt) for prompt in direction_of)
        shared = shared / shared.norm()
        found = []
        for picture, prompt in zip(image, PROMPTS, strict=True):
            t = text(prompt)
            along = float(t @ shared)
            found.append(float((t - along * shared + weight * along * shared) @ (picture / picture.norm())))
    return torch.tensor(found)


@pytest.mark.parametrize("weight", [0.3, 1.0, 0.0])
def test_score_is_the_formula(folder: Path, weight: float):
    lines = ["a red circle", "two blue squares. a tree", "three green triangles"]
    images = pictures(4, 64, 80)
    made = LongAlign(prompts=folder / "prompts.txt", model=folder, shared_weight=weight)
    wanted = by_hand(folder, weight, lines)
    assert wanted.std() > 0.01
    assert torch.allclose(score(made, images, PROMPTS), wanted, atol=1e-4)
    in_batch = LongAlign(model=folder, shared_weight=weight)
    assert torch.allclose(score(in_batch, images, PROMPTS), by_hand(folder, weight, PROMPTS), atol=1e-4)
    assert longalign.SHARED_WEIGHT == 0.3


def test_sentences_end_as_in_the_original():
    assert sentences("A dog. Is it red? Yes; or not") == ["A dog.", " Is it red.", " Yes; or not."]
    assert sentences('He says "no"! And "yes;" too') == ['He says "no.', ' And "yes.', " too."]
    assert sentences("") == [""]
    assert sentences("...") == ["..."]


def test_batches_and_gradient(reward: LongAlign):
    check_batches(reward, PROMPTS, atol=1e-5)
    check_gradient(reward, PROMPTS[:2])


def test_a_batch_without_a_direction_is_refused(folder: Path):
    reward = LongAlign(model=folder)
    with pytest.raises(RewardError, match=r"name a file of prompts as in longalign:prompts.txt"):
        score(reward, pictures(2), ["a red circle"] * 2)


def test_bad_files_are_refused_before_weights_load(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"file of prompts 'nowhere.txt' cannot be read"):
        rewards.load("longalign:nowhere.txt")
    (tmp_path / "one.txt").write_text("a red circle\na red circle\n")
    with pytest.raises(ConfigError, match=r"holds 1 prompts; two or more expected"):
        rewards.load(f"longalign:{tmp_path}/one.txt")
