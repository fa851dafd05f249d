"""The OCR reward: distance and target exactly, and readers of both kinds on tiny random weights."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rewards_support import enlarge, pictures, to_pil
from tokenizers import pre_tokenizers
from transformers import (
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    GotOcr2ImageProcessor,
    GotOcr2Processor,
    Qwen2Tokenizer,
    TrOCRConfig,
    TrOCRForCausalLM,
    TrOCRProcessor,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from diffalign import rewards
from diffalign.rewards import RewardError, score
from diffalign.world.bases import build_tokenizer
from reward_models.ocr import OCR, edit_distance, similarity, target_of


@pytest.mark.parametrize(
    ("reading", "target", "value"),
    [
        ("Forever Yours", "Forever Yours", 1.0),
        ("a ring, FOREVER\nyours!", "Forever Yours", 1.0),  # part of it, without blanks and case
        ("", "abcd", 0.0),
        ("wxyz", "abcd", 0.0),
        ("abed", "abcd", 0.75),
        ("ab", "abcd", 0.5),
        ("abd", "abcd", 0.75),
        ("wxyz" * 50, "abcd", 0.0),  # the distance counts no more than the target's length
        ("hello wrld", "Hello World", 0.9),
    ],
)
def test_similarity(reading: str, target: str, value: float) -> None:
    assert similarity(reading, target) == pytest.approx(value)


def test_distance_is_levenshteins() -> None:
    @cache
    def slow(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    words = ["".join(letters) for n in range(5) for letters in itertools.product("ab", repeat=n)]
    for a, b in itertools.product(words, repeat=2):
        assert edit_distance(a, b) == slow(a, b)
    assert edit_distance("kitten", "sitting") == 3


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('A ring with "Forever Yours" on it', "Forever Yours"),
        ('"One" and "Two"', "One"),
        ("no quotes", None),
        ('an empty "" one', None),
        ('a blank " " one', None),
        ('only one " quote', None),
        ("curly “quotes”", None),
    ],
)
def test_target(prompt: str, target: str | None) -> None:
    assert target_of(prompt) == target


# ---------------------------------------------------------------- readers


@pytest.fixture(scope="module")
def trocr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A line reader in the layout of microsoft/trocr-base-printed."""
    folder, tokenizer = tmp_path_factory.mktemp("trocr"), build_tokenizer()
    torch.manual_seed(0)
    encoder = ViTModel(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
        )
    )
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    starts = {"bos_token_id": tokenizer.bos_token_id, "decoder_start_token_id": tokenizer.bos_token_id}
    decoder = TrOCRForCausalLM(
        TrOCRConfig(
            vocab_size=len(tokenizer), max_position_embeddings=64, cross_attention_hidden_size=16, **sizes, **special
        )
    )
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    enlarge(model, 6)
    for config in (model.config, model.generation_config):
        for key, value in (special | starts).items():
            setattr(config, key, value)
    model.save_pretrained(folder)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    TrOCRProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def got(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page reader in the layout of stepfun-ai/GOT-OCR-2.0-hf: 64 x 64 patches become 256 tokens."""
    folder = tmp_path_factory.mktemp("got")
    torch.manual_seed(0)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"]
    alphabet = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=alphabet, merges=[], extra_special_tokens=special[1:])
    text = {
        "model_type": "qwen2",
        "vocab_size": len(tokenizer) + 8,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    vision = {
        "hidden_size": 16,
        "output_channels": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 256,
        "patch_size": 4,
        "window_size": 8,
        "global_attn_indexes": [],
        "mlp_dim": 16,
    }
    pad = tokenizer.convert_tokens_to_ids("<imgpad>")
    config = GotOcr2Config(text_config=text, vision_config=vision, image_token_id=pad)
    model = GotOcr2ForConditionalGeneration(config).eval()
    enlarge(model, 4)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.save_pretrained(folder)
    images = GotOcr2ImageProcessor(size={"height": 256, "width": 256})
    GotOcr2Processor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["trocr", "got"])
def test_readers_of_both_kinds(kind: str, request: pytest.FixtureRequest) -> None:
    """The reading is the processor's and the model's own, one picture at a time, and scored against the quoted text."""
    folder = request.getfixturevalue(kind)
    reader: Any = OCR(model=folder, longest=6)
    images = pictures(3)
    readings = reader.read(images)
    alone = []
    for image in images:
        inputs = reader.processor(images=to_pil(image), return_tensors="pt")
        with torch.no_grad():
            tokens = reader.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        start = inputs["input_ids"].shape[1] if kind == "got" else 0
        alone.append(reader.processor.tokenizer.decode(tokens[0, start:], skip_special_tokens=True))
    assert readings == [text.partition("<|im_end|>")[0] for text in alone]
    assert any(readings)
    prompts = [f'a sign that says "{readings[0]}x"', "no text", 'says "qqqqqqqqqqqqqqqq"']
    got = score(reader, images, prompts, missing=True)
    wanted = similarity(readings[0], f"{readings[0]}x")
    assert got[0] == pytest.approx(wanted)
    assert 0 < wanted < 1
    assert got[1].isnan()
    assert got[2] < 0.3


def test_prompts_without_quotes_are_told_of(trocr: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = rewards.load(f"ocr:{trocr}")
    with pytest.raises(RewardError, match="NaN or infinity for the prompts 'plain'"):
        score(reader, pictures(1), ["plain"])
    assert "1 of 1 prompts quote no text, such as 'plain'" in caplog.text
    with pytest.raises(RewardError, match="cannot be loaded"):
        rewards.load(f"ocr:{trocr}/nothing")
