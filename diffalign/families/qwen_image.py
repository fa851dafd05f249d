"""Qwen-Image: an MMDiT on rectified flow, text by Qwen2.5-VL, a 16-channel autoencoder made for video.

Text is Qwen2.5-VL's last hidden states of the prompt in the stock pipeline's template, less the template's first 34 tokens.
The stock pipeline has as many tokens as its longest prompt; here they are padded with zeros and a mask to
`model.max_sequence_length` (512), so that all cached prompts have one shape, and masked tokens change nothing.

Latents are (B, 16, h, w) everywhere, scaled channel by channel; the autoencoder's frame axis and the 2 x 2 packing into
tokens stay inside. The network is told t / 1000, in (0, 1]. Times are logit-normal, as its report (arXiv 2508.02324) is
quoted to say (UNVERIFIED); the shift by the size of an image is the sampler's alone. Guidance is `true_cfg_scale` of the
stock pipeline, which keeps the length of each token's prediction.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from diffalign.config import ModelConfig, SamplingConfig
from diffalign.errors import ConfigError
from diffalign.families import Around, Conditioning
from diffalign.families._loading import quiet
from diffalign.families._pipeline import FlowFamily
from diffalign.families._transformers import (
    check_architecture,
    check_channels,
    check_text_length,
    pack,
    restored,
    stored,
    unpack,
)

TEXT_LENGTH = 512  # of a call of the stock pipeline
LONGEST_TEXT = 1024


class QwenImage(FlowFamily):
    """Qwen-Image. Its text encoder reads `model.max_sequence_length` tokens (512) beyond the template's head."""

    title = "Qwen-Image (MMDiT; flow)"
    resolution_step = 16
    text_parts = ("tokenizer", "text_encoder")
    architectures = ("qwen-image",)
    linspace_sigmas = True

    @classmethod
    def pipeline_class(cls) -> Any:
        from diffusers import QwenImagePipeline

        return QwenImagePipeline

    @classmethod
    def preflight(cls, config: ModelConfig) -> None:
        check_text_length(config, LONGEST_TEXT)
        super().preflight(config)

    @classmethod
    def check_network(cls, config: Mapping[str, Any]) -> None:
        check_architecture(config, "qwen_image", "QwenImageTransformer2DModel")
        patch, outputs = config.get("patch_size", 2), config.get("out_channels", 16)
        check_channels(config.get("in_channels", 64), patch * patch * outputs)
        for setting in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope", "guidance_embeds"):
            if config.get(setting):
                raise ConfigError(
                    f"this transformer has {setting}, as networks for editing and for layers have; expected "
                    "a text-to-image network"
                )

    @property
    def text_length(self) -> int:
        return self.config.max_sequence_length or TEXT_LENGTH

    @cached_property
    def template(self) -> tuple[str, int]:
        """The stock pipeline's template, and how many of its first tokens are dropped."""
        pipeline = self._pipeline()
        return str(pipeline.prompt_template_encode), int(pipeline.prompt_template_encode_start_idx)

    def count_tokens(self, prompt: str) -> tuple[int, int]:
        """Tokens of the prompt and of the template's end."""
        template, dropped = self.template
        tokens = self._part("tokenizer")(template.format(prompt), verbose=False).input_ids
        return len(tokens) - dropped, self.text_length

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        pipeline = self._pipeline(*self.text_parts)
        with quiet():
            hidden, mask = pipeline.encode_prompt(prompts, device=self.device, max_sequence_length=self.text_length)
        if mask is None:  # of prompts of one length
            mask = torch.ones(hidden.shape[:2], device=hidden.device)
        missing = self.text_length - hidden.shape[1]
        return {
            "encoder_hidden_states": pad(hidden, (0, 0, 0, missing)),
            "attention_mask": pad(stored(mask), (0, missing)),
        }

    @staticmethod
    def image_conditioning(
        original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
    ) -> Conditioning:
        return {}

    @property
    def vae_factor(self) -> int:
        return int(2 ** len(self._part("vae").config.temperal_downsample))

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        return int(self._part("vae").config.z_dim), height // self.vae_factor, width // self.vae_factor

    def encode_images(self, pixels: Tensor) -> Tensor:
        return super().encode_images(pixels.unsqueeze(2)).squeeze(2)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return super().decode_latents(latents.unsqueeze(2)).squeeze(2)

    def scale_latents(self, raw: Tensor) -> Tensor:
        mean, deviation = self._statistics(raw)
        return (raw - mean) / deviation

    def unscale_latents(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return latents * deviation + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, (1, C, 1, 1, 1)."""
        config = self._part("vae").config
        mean, deviation = (
            torch.tensor(numbers, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
            for numbers in (config.latents_mean, config.latents_std)
        )
        return mean, deviation

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def from_pipeline(self, latents: Tensor, shape: torch.Size) -> Tensor:
        return unpack(latents, shape)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = x_t.shape[-2] // 2, x_t.shape[-1] // 2
        output = network(
            hidden_states=pack(x_t),
            encoder_hidden_states=conditioning["encoder_hidden_states"].to(x_t.dtype),
            encoder_hidden_states_mask=restored(conditioning["attention_mask"]),
            timestep=t / 1000,
            img_shapes=[[(1, height, width)]] * len(x_t),
            return_dict=False,
        )[0]
        return unpack(output, x_t.shape)

    def sample_latents(
        self,
        conditioning: Conditioning,
        negative: Conditioning,
        noise: Tensor,
        sampling: SamplingConfig,
        *,
        around: Around = nullcontext,
    ) -> Tensor:
        # The pipeline warns of a negative prompt that it does not use.
        guided = sampling.guidance_scale > 1
        return super().sample_latents(conditioning, negative if guided else {}, noise, sampling, around=around)

    def guidance_arguments(self, sampling: SamplingConfig) -> dict[str, Any]:
        return {"true_cfg_scale": super().guidance_arguments(sampling)["guidance_scale"]}

    def sample_arguments(self, conditioning: Conditioning, negative: Conditioning, batch: int) -> dict[str, Any]:
        positive, negative = self._to_device(conditioning, batch), self._to_device(negative, batch)
        arguments = {
            "prompt_embeds": positive["encoder_hidden_states"],
            "prompt_embeds_mask": restored(positive["attention_mask"]),
        }
        if negative:
            arguments["negative_prompt_embeds"] = negative["encoder_hidden_states"]
            arguments["negative_prompt_embeds_mask"] = restored(negative["attention_mask"])
        return arguments
