"""Tiny random language models of several architectures, and batches of random rows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.losses import Layout, Pairs
from diffalign.text.batch import TextBatch, TextRow, pad_rows

VOCABULARY = 60
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = _SHAPE | {"num_key_value_heads": 2}
_GEMMA = _GROUPED | {"head_dim": 8, "sliding_window": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 8},
    "gemma2": _GEMMA | {"final_logit_softcapping": 2.0},
    "gemma3_text": _GEMMA,
    "phi": _SHAPE,
    "granite": _GROUPED | {"logits_scaling": 3.0},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": 2}
    | {"bos_token_id": 1, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    "opt": {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "dropout": 0.0}
    | {"num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
}


def build_lm(model_type: str = "llama", **changes: Any) -> Any:
    """A frozen causal LM in evaluation mode; weights large enough for distributions that are far from flat."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(model_type, **(CONFIGS[model_type] | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(settings)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.2)
    return network.requires_grad_(False).eval()


def build_tokenizer() -> Any:
    """Single letters; no padding token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = {word: n for n, word in enumerate(["<unk>", "<bos>", "<eos>", *letters])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def save_lm(folder: Path, model_type: str = "llama") -> Path:
    """A transformers folder with weights and tokenizer."""
    build_lm(model_type).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def random_rows(count: int, seed: int = 0, longest: int = 20) -> list[TextRow]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        length = draw.randint(4, longest)
        ids = tuple(draw.randrange(3, VOCABULARY) for _ in range(length - 1))
        rows.append(TextRow(ids=(*ids, 2), start=draw.randint(1, length - 2)))
    return rows


def batch_of(rows: list[TextRow], pad_id: int = 0, **more: Any) -> TextBatch:
    """Rows as pairs: the first half chosen, the second rejected."""
    half = len(rows) // 2
    padded: dict[str, Any] = pad_rows(rows, pad_id)
    ids = tuple(f"{n:016x}" for n in range(half))
    return TextBatch(ids=ids, layout=Layout(pairs=Pairs.halves(half)), **(padded | more))


def naive_log_probs(network: Any, rows: list[TextRow]) -> list[Tensor]:
    """log p of every token but the first, row by row, from the whole model's logits."""
    found = []
    for row in rows:
        ids = torch.tensor([row.ids])
        logits = network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].float()
        found.append(torch.stack([logits[n].log_softmax(-1)[ids[0, n + 1]] for n in range(len(logits))]))
    return found
