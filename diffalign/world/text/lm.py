"""The tiny LM: its architecture and tokenizer, and how to build it untrained or load the shipped one.

It is an ordinary transformers folder: a Llama of about one million parameters with a byte-level BPE tokenizer and a chat
template. `scripts/build_tiny_lm.py` trains it again from nothing. Two ways of asking are known to it: chat messages, and
plain text in which the question ends with a line break.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffalign.world.names import base_folder
from diffalign.world.text import corpus

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 96
VOCABULARY = 1024  # at most; the world's words need fewer
MAX_NEW_TOKENS = 48  # the longest answer of the world has about 40
PAD, BOS, EOS, USER, ASSISTANT = SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>")
SEPARATOR = "\n"  # ends a question in plain text

# The generation block marks what `return_assistant_tokens_mask` selects; it ends with eos, which is learnt too.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<|user|>' + message['content'] -}}
{%- elif message['role'] == 'assistant' -%}
{{- '<|assistant|>' -}}{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- raise_exception("role '" + message['role'] + "' is unknown to this model; use user and assistant") -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which any text encodes and decodes exactly; digits are tokens of their own.

    Plain encoding begins with bos, as Llama's does; the chat template writes bos itself, so its text is to be encoded
    with `add_special_tokens=False`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(corpus.vocabulary_texts(), trainer)
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, inner.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_untrained(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The architecture with random weights (global torch seed)."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=336,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            initializer_range=0.05,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.generation_config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model


def load(
    source: str | Path = "tiny-lm", dtype: torch.dtype = torch.float32
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load a shipped tiny LM by name, or any folder of the same make: model in evaluation mode, and tokenizer.

    Raises:
        ConfigError: no such base in this installation.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM

    from diffalign.families._loading import quiet

    folder = source if isinstance(source, Path) else base_folder(source)
    with quiet():
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return model.eval(), tokenizer


def chat_prompt(question: str) -> str:
    """A question as the chat template renders it, generation prompt included."""
    return f"{BOS}{USER}{question}{ASSISTANT}"


def plain_prompt(question: str) -> str:
    """A question as plain text, without bos."""
    return question + SEPARATOR
