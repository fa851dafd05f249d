"""PixArt-Sigma: a DiT with text by cross-attention, variance-preserving noise, eps prediction with a learned variance.

The network returns twice the latents' channels: eps, and a variance that stock samplers do not use and that is dropped
here. Text is T5's, 300 tokens with a mask, of the prompt in lower case; the stock pipeline's `clean_caption`, which does
nothing without two further packages, is off. The sizes and aspect ratios that PixArt-Alpha's 1024 px model is told are
not made here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.config import ModelConfig
from diffalign.errors import ConfigError
from diffalign.families import Conditioning
from diffalign.families._loading import quiet
from diffalign.families._pipeline import (
    PipelineFamily,
    variance_preserving_changes,
    variance_preserving_schedule,
)
from diffalign.families._transformers import check_architecture, check_channels, check_text_length, restored, stored
from diffalign.schedules import Schedule

TEXT_LENGTH = 300  # in the stock pipeline


class PixArtSigma(PipelineFamily):
    """PixArt-Sigma, 256 px to 2K. T5 reads `model.max_sequence_length` tokens (300)."""

    title = "PixArt-Sigma (DiT; eps)"
    resolution_step = 16
    network_part = "transformer"
    text_parts = ("tokenizer", "text_encoder")
    architectures = ("pixart-sigma",)

    @classmethod
    def pipeline_class(cls) -> Any:
        from diffusers import PixArtSigmaPipeline

        return PixArtSigmaPipeline

    @classmethod
    def preflight(cls, config: ModelConfig) -> None:
        check_text_length(config)
        super().preflight(config)

    @classmethod
    def check_network(cls, config: Mapping[str, Any]) -> None:
        # Published weights carry the name of the class that PixArt had at first.
        check_architecture(config, "pixart", "PixArtTransformer2DModel", "Transformer2DModel")
        outputs = config.get("out_channels") or config.get("in_channels", 4)
        check_channels(config.get("in_channels", 4), outputs, outputs // 2)
        told = config.get("use_additional_conditions")
        if told or (told is None and config.get("sample_size", 128) == 128):
            raise ConfigError(
                "this transformer is told sizes and aspect ratios (use_additional_conditions), as PixArt-Alpha at 1024 px "
                "is; expected PixArt-Sigma"
            )

    def scheduler_changes(self, scheduler: Any) -> dict[str, Any]:
        return variance_preserving_changes(self.config)

    def make_schedule(self, scheduler: Any) -> Schedule:
        return variance_preserving_schedule(self.config, scheduler)

    @property
    def text_length(self) -> int:
        return self.config.max_sequence_length or TEXT_LENGTH

    def count_tokens(self, prompt: str) -> tuple[int, int]:
        return len(self._part("tokenizer")(prompt.lower().strip(), verbose=False).input_ids), self.text_length

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        pipeline = self._pipeline(*self.text_parts)
        with quiet():
            hidden, mask, _, _ = pipeline.encode_prompt(
                prompts,
                do_classifier_free_guidance=False,
                device=self.device,
                max_sequence_length=self.text_length,
            )
        return {"encoder_hidden_states": hidden, "attention_mask": stored(mask)}

    @staticmethod
    def image_conditioning(
        original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
    ) -> Conditioning:
        return {}

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = network(
            x_t,
            encoder_hidden_states=conditioning["encoder_hidden_states"].to(x_t.dtype),
            encoder_attention_mask=restored(conditioning["attention_mask"]),
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]]

    def sample_arguments(self, conditioning: Conditioning, negative: Conditioning, batch: int) -> dict[str, Any]:
        positive, negative = self._to_device(conditioning, batch), self._to_device(negative, batch)
        return {
            "prompt_embeds": positive["encoder_hidden_states"],
            "prompt_attention_mask": restored(positive["attention_mask"]),
            "negative_prompt": None,
            "negative_prompt_embeds": negative["encoder_hidden_states"],
            "negative_prompt_attention_mask": restored(negative["attention_mask"]),
            "use_resolution_binning": False,  # the size is the noise's
        }
