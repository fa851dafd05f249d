"""Tiny text-to-video pipelines with random weights, as diffusers folders: 16 px to the token, 4 frames to the latent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

TOKENS = 12  # of the tiny text encoders
WIDTH = 16


def build_wan(folder: Path) -> Path:
    """A tiny Wan 2.1: two blocks, three levels of the autoencoder (8 px to the latent), UMT5."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng():
        torch.manual_seed(2)
        tokenizer = t5_tokenizer()
        pipeline = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=UMT5EncoderModel(UMT5Config(**t5_shape(len(tokenizer)))),
            vae=AutoencoderKLWan(
                base_dim=4,
                z_dim=4,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                latents_mean=[-0.3, 0.1, 0.2, 0.4],
                latents_std=[0.5, 2.0, 1.5, 0.8],
            ),
            transformer=WanTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=WIDTH,
                freq_dim=16,
                ffn_dim=32,
                num_layers=2,
                rope_max_seq_len=32,
            ),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
            ),
        )
        pipeline.save_pretrained(folder)
    return folder


def build_cogvideox(folder: Path, *, rotary: bool = True, patch_size_t: int | None = None) -> Path:
    """A tiny CogVideoX: 5B's rotary positions, or 2B's sines; 1.5 with `patch_size_t` 2."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng():
        torch.manual_seed(3)
        tokenizer = t5_tokenizer()
        pipeline = CogVideoXPipeline(
            tokenizer=tokenizer,
            text_encoder=T5EncoderModel(T5Config(**t5_shape(len(tokenizer)))),
            vae=AutoencoderKLCogVideoX(
                block_out_channels=(4, 4, 4, 4),
                layers_per_block=1,
                norm_num_groups=2,
                latent_channels=4,
                sample_height=32,
                sample_width=32,
                scaling_factor=0.7,
            ),
            transformer=CogVideoXTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=4,
                out_channels=4,
                time_embed_dim=8,
                text_embed_dim=WIDTH,
                num_layers=2,
                sample_width=8,
                sample_height=6,
                sample_frames=9,
                patch_size_t=patch_size_t,
                max_text_seq_length=TOKENS,
                use_rotary_positional_embeddings=rotary,
            ),
            scheduler=CogVideoXDDIMScheduler(
                prediction_type="v_prediction",
                clip_sample=False,
                rescale_betas_zero_snr=True,
                snr_shift_scale=1.0 if rotary else 3.0,
                timestep_spacing="trailing",
            ),
        )
        spread(pipeline.transformer)
        pipeline.save_pretrained(folder)
    return folder


def spread(network: nn.Module) -> None:
    """Weights as large as trained ones, so that a position or a word makes a difference."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)


def t5_shape(vocabulary: int) -> dict[str, Any]:
    """Settings of a tiny T5 or UMT5 encoder."""
    return {
        "vocab_size": vocabulary,
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }


def t5_tokenizer() -> Any:
    """A T5 tokenizer of letters and a few words."""
    from transformers import T5Tokenizer

    words = ("▁a", "▁red", "▁blue", "▁circle", "▁square", "▁on", "▁moves")
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocabulary += [(word, -2.0) for word in words] + [(letter, -5.0) for letter in letters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)
