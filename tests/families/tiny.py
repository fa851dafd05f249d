"""A tiny pipeline with random weights for every denoising family, as a diffusers folder.

`BUILDERS` has one function per family: it writes the folder; `FIXTURES` names those that `conftest.py` makes. `SETTINGS`
has what the family's `ModelConfig` needs besides. Images of 32 x 32 pixels are enough for each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families.tiny_video import build_cogvideox, build_wan, spread, t5_shape, t5_tokenizer
from torch import nn

TOKENS = 12
WIDTH = 16


def build_sd3(folder: Path) -> None:
    """CLIP twice and T5; 8 px to the token, a shifted table."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    save(
        StableDiffusion3Pipeline(
            vae=image_vae(shift_factor=0.1, scaling_factor=1.5),
            text_encoder=CLIPTextModelWithProjection(clip_shape(tokenizer)),
            text_encoder_2=CLIPTextModelWithProjection(clip_shape(tokenizer)),
            text_encoder_3=t5_encoder(t5, d_model=2 * WIDTH),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            tokenizer_3=t5,
            transformer=SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=2 * WIDTH,
                caption_projection_dim=16,
                pooled_projection_dim=2 * WIDTH,
                pos_embed_max_size=8,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        ),
        folder,
    )


def build_flux(folder: Path, *, guidance_embeds: bool = True) -> None:
    """CLIP and T5; 8 px to the token. [dev], or [schnell] without its guidance and its shift by the size."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    save(
        FluxPipeline(
            vae=image_vae(shift_factor=0.1, scaling_factor=0.4),
            text_encoder=CLIPTextModel(clip_shape(tokenizer)),
            text_encoder_2=t5_encoder(t5),
            tokenizer=tokenizer,
            tokenizer_2=t5,
            transformer=FluxTransformer2DModel(
                in_channels=16,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=12,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(4, 4, 4),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds
            ),
        ),
        folder,
    )


def build_pixart(folder: Path) -> None:
    """T5 with a mask; 8 px to the token, a learned variance."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    t5 = t5_tokenizer()
    save(
        PixArtSigmaPipeline(
            vae=image_vae(scaling_factor=0.6),
            text_encoder=t5_encoder(t5),
            tokenizer=t5,
            transformer=PixArtTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=8,
                in_channels=4,
                out_channels=8,
                num_layers=2,
                cross_attention_dim=16,
                sample_size=8,
                caption_channels=WIDTH,
                use_additional_conditions=False,
            ),
            scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
        ),
        folder,
    )


def build_sana(folder: Path) -> None:
    """Gemma 2 with a mask and an instruction; 8 px to the token, an autoencoder without a spread, a multistep scheduler."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from tokenizers.processors import TemplateProcessing
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    letters = [*map(chr, range(33, 127)), "▁", "\n"]
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = GemmaTokenizer({token: i for i, token in enumerate([*special, *letters, *bytes_])}, [])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    save(
        SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=Gemma2Model(
                Gemma2Config(
                    vocab_size=len(tokenizer),
                    hidden_size=WIDTH,
                    intermediate_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=8,
                    pad_token_id=0,
                    eos_token_id=1,
                    bos_token_id=2,
                )
            ),
            vae=AutoencoderDC(
                latent_channels=4,
                attention_head_dim=8,
                encoder_block_out_channels=(8, 8, 16, 16),
                decoder_block_out_channels=(8, 8, 16, 16),
                encoder_layers_per_block=(1, 1, 1, 1),
                decoder_layers_per_block=(1, 1, 1, 1),
                encoder_qkv_multiscales=((), (), (), ()),
                decoder_qkv_multiscales=((), (), (), ()),
                scaling_factor=0.4,
            ),
            transformer=SanaTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=8,
                num_layers=2,
                num_cross_attention_heads=2,
                cross_attention_head_dim=8,
                cross_attention_dim=16,
                caption_channels=WIDTH,
                sample_size=8,
                timestep_scale=0.5,
            ),
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        ),
        folder,
    )


def build_qwen_image(folder: Path) -> None:
    """Qwen2.5-VL; 16 px to the token, an autoencoder for video with a scale for each channel."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    letters = sorted(ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer({token: i for i, token in enumerate(["<|endoftext|>", *letters])}, [])
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    save(
        QwenImagePipeline(
            tokenizer=tokenizer,
            text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
            vae=AutoencoderKLQwenImage(
                base_dim=4,
                z_dim=4,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                latents_mean=[-0.3, 0.1, 0.2, 0.4],
                latents_std=[0.5, 2.0, 1.5, 0.8],
            ),
            transformer=QwenImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=2,
                attention_head_dim=12,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                axes_dims_rope=(4, 4, 4),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        ),
        folder,
    )


def save(pipeline: Any, folder: Path) -> None:
    network: nn.Module = pipeline.transformer
    spread(network)
    pipeline.save_pretrained(folder)


def image_vae(**settings: float) -> Any:
    """An autoencoder with 4 px to the latent and 4 channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        **settings,
    )


def clip_tokenizer() -> Any:
    from diffalign.world.bases import build_tokenizer

    return build_tokenizer()  # 20 tokens


def clip_shape(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_encoder(tokenizer: Any, **changes: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**t5_shape(len(tokenizer)) | changes))


Builder = Callable[[Path], Any]
BUILDERS: dict[str, Builder] = {
    "sd3": build_sd3,
    "flux": build_flux,
    "pixart": build_pixart,
    "sana": build_sana,
    "qwen_image": build_qwen_image,
    "wan": build_wan,
    "cogvideox": build_cogvideox,
}
FIXTURES = {"sd": "tiny_sd_folder", "sdxl": "tiny_folder"}  # folders that other tests share
SETTINGS: dict[str, dict[str, Any]] = {
    "sd3": {"max_sequence_length": TOKENS},
    "flux": {"max_sequence_length": TOKENS},
    "pixart": {"max_sequence_length": TOKENS},
    "sana": {"max_sequence_length": 40},  # every letter is a token
    "qwen_image": {"max_sequence_length": 200},  # here, too, and the template is not short
    "wan": {"max_sequence_length": TOKENS},
}


def build(name: str, folder: Path) -> None:
    """Write the tiny pipeline of a family."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        BUILDERS[name](folder)
