"""Tiny random vision-language models of the Qwen-VL kind, in the hub's layout."""

from pathlib import Path
from typing import Any

from rewards_support import enlarge
from tokenizers import pre_tokenizers
from transformers import (
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    "max_position_embeddings": 1024,
}
PATCHES = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}


def build_tokenizer() -> Any:
    """Bytes, and the answers Yes and No as one token each."""
    vocab = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ye", "Yes", "No"])}
    merges = [("Y", "e"), ("Ye", "s"), ("N", "o")]
    return Qwen2Tokenizer(vocab=vocab, merges=merges, additional_special_tokens=list(SPECIAL))


def save(folder: Path, model_class: type, config_class: type, vision: dict[str, Any], tokenizer: Any = None) -> Any:
    """A model and its processor, whose pictures have at most 56 x 56 pixels."""
    tokenizer = tokenizer or build_tokenizer()
    names = {
        "image": "<|image_pad|>",
        "video": "<|video_pad|>",
        "vision_start": "<|vision_start|>",
        "vision_end": "<|vision_end|>",
    }
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    places = {f"{name}_token_id": tokenizer.pad_token_id for name in ("pad", "bos", "eos")}
    text = TEXT | places | {"vocab_size": len(tokenizer)}
    model = model_class(config_class(text_config=text, vision_config=PATCHES | vision, **ids)).eval()
    enlarge(model, 12)
    model.save_pretrained(folder)
    processor_class = Qwen2_5_VLProcessor if "2_5" in model_class.__name__ else Qwen2VLProcessor
    pixels = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
    processor_class(pixels, tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE).save_pretrained(folder)
    return model
