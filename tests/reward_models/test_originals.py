"""What the CLIP rewards rest on, against the originals: transforms of pictures that are not square, both kinds of towers.

The transform of each other reward is compared in its own test: HPSv2, HPSv3, ImageReward, MPS, aesthetic v2.5, LongAlign,
subject similarity, VQAScore of FLAN-T5.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from rewards_support import enlarge, pictures, to_pil
from torch import Tensor
from torchvision import transforms
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from diffalign import rewards
from diffalign.rewards import score
from diffalign.world.bases import build_tokenizer
from reward_models.aesthetic import Aesthetic
from reward_models.clip_score import ClipScore
from reward_models.pickscore import PickScore

SIDE = 24  # of what the tiny towers read
PROMPTS = ["a red circle"] * 3
WIDTH, LAYERS, HEADS, VOCABULARY, CONTEXT, OUT = 32, 2, 4, 50, 12, 16
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}


def of_transformers(images: Tensor) -> Tensor:
    """The Pillow processor of transformers, which PickScore and MPS use: half-pixel crops are rounded down."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    found: Tensor = processor(images=[to_pil(image) for image in images], return_tensors="pt").pixel_values
    return found


def of_clip(images: Tensor) -> Tensor:
    """OpenAI's transform, by torchvision, which the aesthetic predictor uses: half-pixel crops go to the even number."""
    transform = transforms.Compose(
        [
            transforms.Resize(SIDE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIDE),
            transforms.ToTensor(),
            transforms.Normalize(rewards.CLIP_MEAN, rewards.CLIP_STD),
        ]
    )
    return torch.stack([transform(to_pil(image)) for image in images])


ORIGINALS = {"clip_score": of_transformers, "pickscore": of_transformers, "aesthetic": of_clip}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("clip"), build_tokenizer()
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = TOWER | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 20}
    vision = TOWER | {"image_size": SIDE, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=OUT)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# 40 x 59 becomes 24 x 35, from which 5.5 pixels are cut on each side.
@pytest.mark.parametrize(("height", "width"), [(40, 59), (59, 40), (41, 41), (24, 24), (20, 33)])
@pytest.mark.parametrize(("name", "original"), ORIGINALS.items())
def test_pictures_reach_the_tower_as_in_the_original(
    name: str, original: Callable[[Tensor], Tensor], height: int, width: int, clip: Path, tmp_path: Path
) -> None:
    torch.save({"weight": torch.randn(1, OUT), "bias": torch.zeros(1)}, tmp_path / "head.pth")
    made: dict[str, Callable[[], Any]] = {
        "clip_score": lambda: ClipScore(model=clip),
        "pickscore": lambda: PickScore(model=clip),
        "aesthetic": lambda: Aesthetic(head=tmp_path / "head.pth", clip=clip),
    }
    reward = made[name]()
    tower = reward.towers.model.vision_model
    seen: list[Tensor] = []
    handle = tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]),
        with_kwargs=True,
    )
    images = pictures(3, height, width)
    score(reward, images, PROMPTS)
    handle.remove()
    std = torch.tensor(rewards.CLIP_STD).view(3, 1, 1)
    apart = ((seen[0] - original(images)) * std * 255).abs()  # in steps of the 8-bit grid
    assert apart.max() < 2.1
    assert (apart > 1.1).float().mean() < 1e-3
    assert apart.mean() < 0.05


def test_the_two_crops_differ_on_odd_sides() -> None:
    images = pictures(1, 40, 59)
    assert (of_transformers(images) - of_clip(images)).abs().max() > 0.01


# ---------------------------------------------------------------- open_clip and transformers


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of open_clip's CLIP in transformers': fused projections in thirds, `proj` transposed."""
    renamed = {
        "visual.conv1": "vision_model.embeddings.patch_embedding",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
        "token_embedding": "text_model.embeddings.token_embedding",
    }
    found = {
        "logit_scale": state["logit_scale"],
        "text_projection.weight": state["text_projection"].T,
        "visual_projection.weight": state["visual.proj"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
    }
    for ours, theirs in renamed.items():
        found |= {
            f"{theirs}.{kind}": state[f"{ours}.{kind}"] for kind in ("weight", "bias") if f"{ours}.{kind}" in state
        }
    inner = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for ours, theirs in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
        for i in range(LAYERS):
            here, there = f"{ours}.resblocks.{i}", f"{theirs}.encoder.layers.{i}"
            for kind in ("weight", "bias"):
                thirds = state[f"{here}.attn.in_proj_{kind}"].chunk(3)
                found |= {f"{there}.self_attn.{q}_proj.{kind}": part for q, part in zip("qkv", thirds, strict=True)}
                found[f"{there}.self_attn.out_proj.{kind}"] = state[f"{here}.attn.out_proj.{kind}"]
                found |= {f"{there}.{b}.{kind}": state[f"{here}.{a}.{kind}"] for a, b in inner.items()}
    return {key: value.clone().contiguous() for key, value in found.items()}


@pytest.mark.parametrize("quick", [False, True])
def test_open_clip_and_transformers_towers_are_the_same_function(quick: bool) -> None:
    """Published H/14 rewards exist in both layouts; quick GELU is OpenAI's L/14."""
    torch.manual_seed(0)
    vision = {"layers": LAYERS, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": 8, "image_size": SIDE}
    text = {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "vocab_size": VOCABULARY, "context_length": CONTEXT}
    theirs = open_clip.model.CLIP(OUT, vision, text, quick_gelu=quick).eval()
    enlarge(theirs, 2)
    tower = TOWER | {"hidden_act": "quick_gelu" if quick else "gelu"}
    words = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "eos_token_id": VOCABULARY - 1}
    config = CLIPConfig(
        text_config=tower | words | {"bos_token_id": 1, "pad_token_id": 0},
        vision_config=tower | {"image_size": SIDE, "patch_size": 8},
        projection_dim=OUT,
    )
    ours = CLIPModel(config).eval()
    report = ours.load_state_dict(to_transformers(theirs.state_dict()), strict=False)
    assert [key for key in report.missing_keys if "position_ids" not in key] == []
    assert report.unexpected_keys == []
    pixels = torch.randn(3, 3, SIDE, SIDE)
    tokens = torch.randint(2, VOCABULARY - 1, (3, CONTEXT))
    tokens[:, 0], tokens[0, 5], tokens[1, 8], tokens[2, -1] = 1, VOCABULARY - 1, VOCABULARY - 1, VOCABULARY - 1
    tokens[0, 6:], tokens[1, 9:] = 0, 0
    with torch.no_grad():
        image = ours.get_image_features(pixel_values=pixels).pooler_output
        words_ = ours.get_text_features(input_ids=tokens).pooler_output
        assert torch.allclose(image, theirs.encode_image(pixels), atol=1e-5)
        assert torch.allclose(words_, theirs.encode_text(tokens), atol=1e-5)
        assert image.std() > 0.1
