"""VQAScore on a tiny random Qwen2.5-VL."""

import json
from pathlib import Path

import pytest
import torch
import vlm_support
from rewards_support import check_batches, pictures, to_pil
from transformers import AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from diffalign import rewards
from diffalign.rewards import RewardError, score
from reward_models.vqa_score import VQAScore

PROMPTS = ["a red circle", "two blue squares left of a tree", "a red circle", "Yes"]
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vqa") / "qwen"
    torch.manual_seed(0)
    vision = VISION | {"window_size": 56, "fullatt_block_indexes": [1]}
    vlm_support.save(folder, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, vision)
    return folder


@pytest.fixture(scope="module")
def reward(folder: Path) -> VQAScore:
    return VQAScore(model=folder)


def test_score_is_the_probability_of_yes(folder: Path, reward: VQAScore):
    """One picture at a time, all logits, the prompt's text written out."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    yes = processor.tokenizer.convert_tokens_to_ids("Yes")
    wanted = []
    for image, prompt in zip(pictures(), PROMPTS, strict=True):
        text = (
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
            f'Does this figure show "{prompt}"? Please answer Yes or No.<|im_end|>\n<|im_start|>assistant\n'
        )
        inputs = processor(text=[text], images=[to_pil(image)], return_tensors="pt")
        with torch.no_grad():
            wanted.append(float(model(**inputs).logits[0, -1].softmax(0)[yes]))
    assert score(reward, pictures(), PROMPTS).tolist() == pytest.approx(wanted, rel=1e-3)
    assert max(wanted) > 2 * min(wanted)


def test_batches(reward: VQAScore):
    check_batches(reward, PROMPTS, atol=1e-5)


def test_thinking_is_switched_off_where_the_template_knows_it(folder: Path, reward: VQAScore):
    assert reward.ask("x").endswith("assistant\n")
    reward.processor.chat_template, before = (
        vlm_support.TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}<answer>{% endif %}",
        reward.processor.chat_template,
    )
    assert reward.ask("x").endswith("assistant\n<answer>")
    reward.processor.chat_template = before


def test_what_cannot_answer_is_refused(folder: Path, reward: VQAScore, tmp_path: Path):
    with pytest.raises(RewardError, match=r"the answer 'Certainly' is 9 tokens"):
        VQAScore(model=folder, answer="Certainly")
    with pytest.raises(RewardError, match=r"vqa_score: '.*nowhere' cannot be loaded: .*DIFFALIGN_WEIGHTS"):
        rewards.load(f"vqa_score:{tmp_path}/nowhere")
    with pytest.raises(RewardError, match="not differentiable"):
        score(reward, pictures().requires_grad_(), PROMPTS)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").unlink()
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    with pytest.raises(RewardError, match="has no chat template"):
        VQAScore(model=tmp_path)
