"""The tiny LM's tokenizer, chat template and shipped folder, as stock transformers sees them."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffalign.errors import ConfigError
from diffalign.world.names import TINY_BASES, TINY_LMS, base_folder
from diffalign.world.text import corpus, facts, lm, task


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_folder("tiny-lm"))


@pytest.mark.parametrize(
    "text", ["what is 17 + 6?", "héllo wörld", "日本語 😀\n\ttabs", "  two  spaces ", "\x00\x7f", "Ünïcode’s “quotes”"]
)
def test_any_text_comes_back(tokenizer, text: str):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


def test_digits_and_words(tokenizer):
    assert tokenizer.tokenize("what is 987?")[-4:] == ["9", "8", "7", "?"]
    words = {word.strip(".,:?!") for text in corpus.vocabulary_texts() for word in text.split()}
    lengths = [len(tokenizer.tokenize(" " + word)) for word in words if word.isalpha()]
    assert max(lengths) <= 3
    assert sum(n <= 2 for n in lengths) / len(lengths) > 0.97


def test_special_tokens_are_distinct(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(list(lm.SPECIAL))
    assert len(set(ids)) == len(lm.SPECIAL)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer("hm").input_ids[0] == tokenizer.bos_token_id


def test_chat_template(tokenizer):
    messages = [{"role": "user", "content": "what is 1 + 2?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == lm.chat_prompt("what is 1 + 2?")
    whole = [*messages, {"role": "assistant", "content": "3."}]
    assert tokenizer.apply_chat_template(whole, tokenize=False) == text + "3." + lm.EOS
    twice = tokenizer.apply_chat_template(whole + whole, tokenize=False)
    assert twice == text + "3." + lm.EOS + (text + "3." + lm.EOS).removeprefix(lm.BOS)
    made = tokenizer.apply_chat_template(whole, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, m in zip(made["input_ids"], made["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "3." + lm.EOS
    with pytest.raises(Exception, match="role 'system' is unknown"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


@pytest.mark.parametrize("wrap", [lm.chat_prompt, lm.plain_prompt])
def test_the_border_of_the_answer_is_a_border_of_tokens(tokenizer, wrap):
    prompts = task.sample_prompts(50, 0, held_out=False)
    for question, answer in [*((p, task.word("4")) for p in prompts), *((f.seen[0], f.answer) for f in facts.facts())]:
        head, tail, both = (
            tokenizer(text, add_special_tokens=False).input_ids
            for text in (wrap(question), answer, wrap(question) + answer)
        )
        assert head + tail == both


def test_the_shipped_tokenizer_is_the_one_that_is_built(tokenizer):
    assert lm.build_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_the_shipped_folder():
    folder = base_folder("tiny-lm")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_500_000
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32  # whatever the stored type
    assert 0.8e6 < model.num_parameters() < 1.2e6
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert json.loads((folder / "training.json").read_text())["measured"]
    assert "held-out" in (folder / "README.md").read_text()


def test_bases_by_name():
    assert all(base_folder(name).is_dir() for name in TINY_BASES + TINY_LMS)
    with pytest.raises(ConfigError, match=r"'tiny-nothing' is not installed.*shipped: tiny-sdxl, tiny-sd3, tiny-lm"):
        base_folder("tiny-nothing")
