"""The tiny CLIP: its architecture, and the captions that it reads.

`tiny-clip` is an ordinary transformers `CLIPModel` folder, shipped with the package; `scripts/build_tiny_clip.py` trains it
again from nothing. Its cosine approximates the exact verifier's score, and with a taste before the caption ("outlined, a
small red circle on a white background") that of `taste.combined` at `TASTE_WEIGHT`; unlike those it has a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from diffalign.world.bases import MAX_TOKENS, build_tokenizer
from diffalign.world.scenes import CANVAS

# The rules of `diffalign.world.taste` that it knows. Where things stand and whether they are tilted it does not learn in the
# time that its build takes.
TASTES = ("outlined", "plain", "striped", "pastel", "vivid")
TASTE_WEIGHT = 0.5  # of the taste against the verifier's score


def build_untrained() -> tuple[CLIPModel, CLIPTokenizer]:
    """CLIP's two towers with random weights (global torch seed), and a tokenizer that knows captions and tastes.

    Pictures are cut into patches of 4 x 4 pixels, which is also the grid of the scenes and of the bases' codec.
    """
    tokenizer = build_tokenizer([f"{name}," for name in TASTES])
    width = {"projection_dim": 128, "num_attention_heads": 4}
    text = width | {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = width | {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "image_size": CANVAS,
        "patch_size": 4,
    }
    return CLIPModel(CLIPConfig(projection_dim=128, text_config=text, vision_config=vision)), tokenizer


def styled(captions: Sequence[str], taste: str | None) -> list[str]:
    """Captions as the tiny CLIP is asked for them in a taste (of `TASTES`); None: as they are."""
    return list(captions) if taste is None else [f"{taste}, {caption}" for caption in captions]
