"""Sana: a DiT with linear attention on rectified flow, a deep-compression autoencoder (32 px per latent), text by Gemma 2.

Text is Gemma's last hidden states, 300 tokens with a mask, of the prompt in lower case behind the stock pipeline's default
"complex human instruction", of which only the first token is kept. Negative prompts come without the instruction,
as in the stock pipeline: the empty prompt that stands for a dropped caption in training is not the one of guidance.

The network is told t times its `timestep_scale` (1). Times are drawn as in its training (logit-normal over a table with
shift 3; arXiv 2410.10629 and its released configs).
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.config import ModelConfig
from diffalign.errors import ConfigError
from diffalign.families import Conditioning
from diffalign.families._loading import quiet
from diffalign.families._pipeline import FlowFamily
from diffalign.families._transformers import check_architecture, check_channels, check_text_length, restored, stored

TEXT_LENGTH = 300  # in the stock pipeline


class Sana(FlowFamily):
    """Sana 0.6B and 1.6B, and 1.5. Gemma reads `model.max_sequence_length` tokens (300) and the instruction."""

    title = "Sana (linear DiT; flow)"
    resolution_step = 32
    text_parts = ("tokenizer", "text_encoder")
    architectures = ("sana-1.6b",)

    @classmethod
    def pipeline_class(cls) -> Any:
        from diffusers import SanaPipeline

        return SanaPipeline

    @classmethod
    def preflight(cls, config: ModelConfig) -> None:
        check_text_length(config)
        super().preflight(config)

    @classmethod
    def check_network(cls, config: Mapping[str, Any]) -> None:
        check_architecture(config, "sana", "SanaTransformer2DModel")
        check_channels(config.get("in_channels", 32), config.get("out_channels") or config.get("in_channels", 32))
        if config.get("guidance_embeds"):
            raise ConfigError(
                "this transformer is told a guidance scale, as the few-step Sana-Sprint is, whose network is no plain flow "
                "model; expected Sana"
            )

    @property
    def text_length(self) -> int:
        return self.config.max_sequence_length or TEXT_LENGTH

    @cached_property
    def instruction(self) -> list[str]:
        """The stock pipeline's default instruction, line by line."""
        call = inspect.signature(self.pipeline_class().__call__)
        return list(call.parameters["complex_human_instruction"].default)

    def fingerprint(self) -> dict[str, str]:
        text = "\n".join(self.instruction)
        return super().fingerprint() | {"instruction": hashlib.sha256(text.encode()).hexdigest()[:16]}

    @cached_property
    def _instruction_tokens(self) -> int:
        return len(self._part("tokenizer")("\n".join(self.instruction), verbose=False).input_ids)

    def count_tokens(self, prompt: str) -> tuple[int, int]:
        text = "\n".join(self.instruction) + prompt.lower().strip()
        tokens = len(self._part("tokenizer")(text, verbose=False).input_ids)
        # The pipeline makes room for so many tokens beyond the instruction's, less two.
        return tokens - self._instruction_tokens + 2, self.text_length

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        return self._encode(prompts, self.instruction)

    def encode_negative(self, prompt: str) -> Conditioning:
        return self._encode([prompt], None)

    @torch.no_grad()
    def _encode(self, prompts: list[str], instruction: list[str] | None) -> Conditioning:
        pipeline = self._pipeline(*self.text_parts)
        with quiet():
            hidden, mask, _, _ = pipeline.encode_prompt(
                prompts,
                do_classifier_free_guidance=False,
                device=self.device,
                max_sequence_length=self.text_length,
                complex_human_instruction=instruction,
            )
        return {"encoder_hidden_states": hidden, "attention_mask": stored(mask)}

    @staticmethod
    def image_conditioning(
        original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
    ) -> Conditioning:
        return {}

    @property
    def vae_factor(self) -> int:
        return int(2 ** (len(self._part("vae").config.encoder_block_out_channels) - 1))

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return network(  # type: ignore[no-any-return]
            x_t,
            encoder_hidden_states=conditioning["encoder_hidden_states"].to(x_t.dtype),
            encoder_attention_mask=restored(conditioning["attention_mask"]),
            timestep=t * self._part(self.network_part).config.timestep_scale,
            return_dict=False,
        )[0]

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
