"""Stable Diffusion XL: two CLIP text encoders, pooled text, and micro-conditioning on sizes and crops.

Time ids are (original height, original width, crop top, crop left, target height, target width) and say what was really
done to the image. They stay float32 until the sinusoidal embedding: bfloat16 would round sizes above 256.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import ConfigError
from diffalign.families import Conditioning
from diffalign.families._loading import quiet
from diffalign.families._pipeline import UNetFamily
from diffalign.text_encoders import ZEROS, zeroed


class SDXL(UNetFamily):
    """SDXL UNets. Prompts beyond 77 tokens are cut off, and counted in the data report."""

    title = "Stable Diffusion XL (UNet; eps or v)"
    text_parts = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
    text_encoders = ("text_encoder", "text_encoder_2")
    last_unread = ("text_encoder",)  # the network is told the layer before the last; only the second is pooled
    architectures = ("sdxl",)

    @classmethod
    def pipeline_class(cls) -> Any:
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline

    @classmethod
    def check_network(cls, config: Mapping[str, Any]) -> None:
        super().check_network(config)
        if config.get("addition_embed_type") != "text_time":
            found = config.get("addition_embed_type")
            raise ConfigError(
                f"model.family is 'sdxl', but this UNet's addition_embed_type is {found!r}, expected 'text_time'; "
                "for SD1.x and SD2.x set model.family: sd"
            )

    def pipeline_arguments(self) -> dict[str, Any]:
        return {"add_watermarker": False, "force_zeros_for_empty_prompt": self._zeros_for_empty()}

    def _zeros_for_empty(self) -> bool:
        return bool(self.pipeline_config.get("force_zeros_for_empty_prompt", True))

    def encode_negative(self, prompt: str) -> Conditioning:
        """Zeros for an empty prompt where the base was trained that way (SDXL 1.0 is), as the stock pipeline has it."""
        conditioning = self.encode_prompts([prompt])
        if prompt == "" and self._zeros_for_empty():
            return {name: torch.zeros_like(value) for name, value in conditioning.items()}
        return conditioning

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        pipeline = self._pipeline(*self.text_parts)
        with quiet():
            hidden, _, pooled, _ = pipeline.encode_prompt(
                prompts, device=self.device, do_classifier_free_guidance=False
            )
        return {"encoder_hidden_states": hidden, "text_embeds": pooled}

    def tokenize(self, prompts: list[str], encoded: Conditioning) -> Conditioning:
        return super().tokenize(prompts, encoded) | {ZEROS: torch.zeros(len(prompts), dtype=torch.int64)}

    def tokenize_negative(self, prompt: str, encoded: Conditioning) -> Conditioning:
        zeros = int(prompt == "" and self._zeros_for_empty())
        return self.tokenize([prompt], encoded) | {ZEROS: torch.full((1,), zeros)}

    def encode_rows(self, tokens: Conditioning) -> Conditioning:
        outputs = [self._part(name)(tokens[f"tokens.{name}"], output_hidden_states=True) for name in self.text_encoders]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = outputs[-1].text_embeds
        return {
            "encoder_hidden_states": zeroed(hidden, tokens[ZEROS]),
            "text_embeds": zeroed(pooled, tokens[ZEROS]),
        }

    @staticmethod
    def image_conditioning(
        original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
    ) -> Conditioning:
        return {"time_ids": torch.tensor([*original_size, *crop_top_left, *target_size], dtype=torch.float32)}

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        added = {
            "text_embeds": conditioning["text_embeds"].to(x_t.dtype),
            "time_ids": conditioning["time_ids"].float(),
        }
        hidden = conditioning["encoder_hidden_states"].to(x_t.dtype)
        return network(  # type: ignore[no-any-return]
            x_t, t, encoder_hidden_states=hidden, added_cond_kwargs=added, return_dict=False
        )[0]

    def sample_arguments(self, conditioning: Conditioning, negative: Conditioning, batch: int) -> dict[str, Tensor]:
        positive, negative = self._to_device(conditioning, batch), self._to_device(negative, batch)
        return {
            "prompt_embeds": positive["encoder_hidden_states"],
            "pooled_prompt_embeds": positive["text_embeds"],
            "negative_prompt_embeds": negative["encoder_hidden_states"],
            "negative_pooled_prompt_embeds": negative["text_embeds"],
        }
