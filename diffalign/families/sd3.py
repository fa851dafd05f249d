"""Stable Diffusion 3 and 3.5: an MMDiT on rectified flow, two CLIP encoders with pooled text, and T5.

Text is CLIP-L and CLIP-G side by side, padded to T5's width, then T5's tokens along the sequence. A model without its T5
encoder gets zeros there, as in the stock pipeline. Latents have 16 channels with a shift; times are 1000 t.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffalign.families import Conditioning
from diffalign.families._loading import network_config, quiet
from diffalign.families._pipeline import FlowFamily
from diffalign.families._transformers import check_architecture, check_channels
from diffalign.text_encoders import token_ids
from diffalign.world.names import TEXT_LENGTHS

TEXT_LENGTH = 256  # of T5, in the stock pipeline


class SD3(FlowFamily):
    """SD3 and SD3.5. CLIP reads 77 tokens, T5 `model.max_sequence_length` (256)."""

    title = "Stable Diffusion 3 / 3.5 (MMDiT; flow)"
    resolution_step = 16
    text_parts = ("tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2", "text_encoder_3")
    optional_parts = ("tokenizer_3", "text_encoder_3")
    text_encoders = ("text_encoder", "text_encoder_2")
    architectures = ("sd3-medium", "sd35-medium", "sd35-large")

    @classmethod
    def pipeline_class(cls) -> Any:
        from diffusers import StableDiffusion3Pipeline

        return StableDiffusion3Pipeline

    @classmethod
    def check_network(cls, config: Mapping[str, Any]) -> None:
        check_architecture(config, "sd3", "SD3Transformer2DModel")
        check_channels(config.get("in_channels", 16), config.get("out_channels") or config.get("in_channels", 16))

    @property
    def text_length(self) -> int:
        """Tokens of T5."""
        if self.config.max_sequence_length is not None:
            return self.config.max_sequence_length
        return TEXT_LENGTHS.get(self.config.pretrained, TEXT_LENGTH)

    def count_tokens(self, prompt: str) -> tuple[int, int]:
        """By T5, which reads most; by CLIP where there is none."""
        tokenizer = self.parts.get("tokenizer_3")
        if tokenizer is None:
            return super().count_tokens(prompt)
        return len(tokenizer(prompt, verbose=False).input_ids), self.text_length

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        pipeline = self._pipeline(*self.text_parts)
        if pipeline.text_encoder_3 is None:
            pipeline.transformer = self._shape_of_network()  # the zeros in T5's place are as wide as it says
        with quiet():
            hidden, _, pooled, _ = pipeline.encode_prompt(
                prompts,
                None,
                None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.text_length,
            )
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def tokenize(self, prompts: list[str], encoded: Conditioning) -> Conditioning:
        length = int(self._part("tokenizer").model_max_length)  # of both, as in the stock pipeline
        ids = {
            f"tokens.{name}": token_ids(self._part(f"tokenizer{name.removeprefix('text_encoder')}"), prompts, length)
            for name in self.text_encoders
        }
        return ids | {"encoder_hidden_states": encoded["encoder_hidden_states"][:, length:].cpu()}  # T5's

    def encode_rows(self, tokens: Conditioning) -> Conditioning:
        outputs = [self._part(name)(tokens[f"tokens.{name}"], output_hidden_states=True) for name in self.text_encoders]
        return {
            "encoder_hidden_states": torch.cat([output.hidden_states[-2] for output in outputs], dim=-1),
            "pooled_projections": torch.cat([output.text_embeds for output in outputs], dim=-1),
        }

    def joined(self, encoded: Conditioning, rest: Conditioning) -> Conditioning:
        clip, other = encoded["encoder_hidden_states"], rest["encoder_hidden_states"]
        clip = functional.pad(clip, (0, other.shape[-1] - clip.shape[-1]))
        return encoded | {"encoder_hidden_states": torch.cat([clip, other.to(clip)], dim=1)}

    def _shape_of_network(self) -> nn.Module:
        """The network, or one of its shape without memory where it is not loaded."""
        from diffusers import SD3Transformer2DModel

        if self.network_part in self.parts:
            return self.network
        config = network_config(self.config, self.location, self.network_part)
        if config is None:  # on the hub, and not in the cache yet
            config = SD3Transformer2DModel.load_config(
                self.location.where, subfolder=self.network_part, revision=self.config.revision
            )
        with torch.device("meta"):
            made: nn.Module = SD3Transformer2DModel.from_config(dict(config))
        return made

    @staticmethod
    def image_conditioning(
        original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
    ) -> Conditioning:
        return {}

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return network(  # type: ignore[no-any-return]
            hidden_states=x_t,
            encoder_hidden_states=conditioning["encoder_hidden_states"].to(x_t.dtype),
            pooled_projections=conditioning["pooled_projections"].to(x_t.dtype),
            timestep=t,
            return_dict=False,
        )[0]

    def sample_arguments(self, conditioning: Conditioning, negative: Conditioning, batch: int) -> dict[str, Any]:
        positive, negative = self._to_device(conditioning, batch), self._to_device(negative, batch)
        return {
            "prompt_embeds": positive["encoder_hidden_states"],
            "pooled_prompt_embeds": positive["pooled_projections"],
            "negative_prompt_embeds": negative["encoder_hidden_states"],
            "negative_pooled_prompt_embeds": negative["pooled_projections"],
        }
