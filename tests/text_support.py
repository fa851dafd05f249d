"""A byte-level BPE tokenizer with known merges, made on the spot."""

from __future__ import annotations

from typing import Any

PAD, BOS, EOS, END = "<pad>", "<s>", "</s>", "<end>"
# Llama-like: the template writes bos itself and a line break after every turn.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' and loop.index0 %}"
    "{{ raise_exception('system must come first') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Renders the last assistant message differently from the others, as templates that drop earlier reasoning do.
UNSTABLE = (
    "{{ bos_token }}{% if messages[-1]['role'] == 'assistant' %}done:{% endif %}{% for m in messages %}"
    "<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build(*, bos: bool = True, template: str | None = TEMPLATE, max_length: int = 10_000) -> Any:
    """A fast tokenizer: bytes, and the merges "a"+"b" and "\\n"+"\\n"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = "Ċ"  # how byte-level BPE writes a line break
    vocabulary = {token: i for i, token in enumerate([PAD, BOS, EOS, END, *alphabet, "ab", newline * 2])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), (newline, newline)]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([PAD, BOS, EOS, END])
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        bos_token=BOS if bos else None,
        eos_token=EOS,
        extra_special_tokens=[END],
        model_max_length=max_length,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
