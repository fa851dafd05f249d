"""The tiny base models: their architecture, and how to build them untrained or load the shipped ones.

A base is an ordinary diffusers pipeline folder. `tiny-sdxl` and `tiny-sd3` are shipped with the package;
`scripts/build_tiny_sdxl.py` and `scripts/build_tiny_sd3.py` train them again from nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffalign.families._loading import dtype_argument, quiet
from diffalign.world.codec import PatchVAE
from diffalign.world.names import base_folder
from diffalign.world.scenes import all_specs, draw, sample_scenes

MAX_TOKENS = 20
LATENT_CHANNELS = 20


def build_tokenizer(words: Sequence[str] = ()) -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the world is one token and any other text still encodes.

    Args:
        words: more words that are to be one token each.
    """
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    learner.train_from_iterator([spec.caption() for spec in all_specs()] + list(words), trainer)
    learnt = json.loads(learner.to_str())["model"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = sorted(learnt["vocab"], key=learnt["vocab"].get)
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    tokens += [word for word in words if word not in set(tokens)]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(pair) for pair in learnt["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)  # type: ignore[arg-type]


def build_untrained(channels: tuple[int, int] = (40, 80)) -> StableDiffusionXLPipeline:
    """The tiny SDXL pipeline with a fitted codec and random weights everywhere else (global torch seed).

    UNet in SDXL's layout: a resolution level without attention, then one with cross-attention, pooled text and time ids.
    """
    tokenizer = build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=4,  # number of heads, by diffusers' old name
        cross_attention_dim=64,
        use_linear_projection=True,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    vae = PatchVAE(latent_channels=LATENT_CHANNELS).fit(draw(sample_scenes(4000, seed=1)) * 2 - 1)
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=False,  # the null condition is the empty caption, as in training
        add_watermarker=False,
    )


def build_untrained_sd3(width: int = 128, layers: int = 4) -> StableDiffusion3Pipeline:
    """The tiny SD3 pipeline: codec and text encoders of `tiny-sdxl`, a random MMDiT (global torch seed).

    There is no T5 encoder: prompts are encoded with `max_sequence_length` 0, so that no zero tokens take its place.
    """
    donor = load_pipeline("tiny-sdxl")
    config = CLIPTextConfig.from_dict(donor.text_encoder.config.to_dict() | {"projection_dim": 32})
    first = CLIPTextModelWithProjection(config)
    first.load_state_dict(donor.text_encoder.state_dict(), strict=False)
    with torch.no_grad():
        # SDXL's first encoder has no projection: SD3's pooled text takes its hidden state as it is.
        first.text_projection.weight.copy_(torch.eye(32))
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=64,
        caption_projection_dim=width,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        vae=donor.vae,
        text_encoder=first,
        text_encoder_2=donor.text_encoder_2,
        text_encoder_3=None,
        tokenizer=donor.tokenizer,
        tokenizer_2=donor.tokenizer_2,
        tokenizer_3=None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
    )


_PIPELINES: dict[str, Any] = {"tiny-sdxl": StableDiffusionXLPipeline, "tiny-sd3": StableDiffusion3Pipeline}
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "tiny-sdxl": {"add_watermarker": False},
    "tiny-sd3": {"text_encoder_3": None, "tokenizer_3": None},  # null entries of the index are not enough
}


def load_pipeline(name: str = "tiny-sdxl", dtype: torch.dtype = torch.float32) -> Any:
    """Load a shipped tiny base as a stock diffusers pipeline."""
    with quiet():
        return _PIPELINES[name].from_pretrained(base_folder(name), **_ARGUMENTS[name], **dtype_argument(dtype))
