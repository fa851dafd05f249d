"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, eps or v prediction, square latents of 4 channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import ConfigError
from diffalign.families import Conditioning
from diffalign.families._loading import quiet
from diffalign.families._pipeline import UNetFamily


class SD(UNetFamily):
    """SD1.x and SD2.x UNets. Prompts beyond 77 tokens are cut off, and counted in the data report."""

    title = "Stable Diffusion 1.x / 2.x (UNet; eps or v)"
    text_parts = ("tokenizer", "text_encoder")
    text_encoders = ("text_encoder",)
    architectures = ("sd15", "sd21-base", "sd21")

    @classmethod
    def pipeline_class(cls) -> Any:
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline

    @classmethod
    def check_network(cls, config: Mapping[str, Any]) -> None:
        super().check_network(config)
        if config.get("addition_embed_type") is not None:
            raise ConfigError(
                "model.family is 'sd', but this UNet takes SDXL's size conditioning; set model.family: sdxl"
            )

    def pipeline_arguments(self) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        pipeline = self._pipeline(*self.text_parts)
        with quiet():
            hidden, _ = pipeline.encode_prompt(prompts, self.device, 1, False)
        return {"encoder_hidden_states": hidden}

    def encode_rows(self, tokens: Conditioning) -> Conditioning:
        return {"encoder_hidden_states": self._part("text_encoder")(tokens["tokens.text_encoder"])[0]}

    @staticmethod
    def image_conditioning(
        original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
    ) -> Conditioning:
        return {}

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        hidden = conditioning["encoder_hidden_states"].to(x_t.dtype)
        return network(x_t, t, encoder_hidden_states=hidden, return_dict=False)[0]  # type: ignore[no-any-return]

    def sample_arguments(self, conditioning: Conditioning, negative: Conditioning, batch: int) -> dict[str, Tensor]:
        return {
            "prompt_embeds": self._to_device(conditioning, batch)["encoder_hidden_states"],
            "negative_prompt_embeds": self._to_device(negative, batch)["encoder_hidden_states"],
        }
