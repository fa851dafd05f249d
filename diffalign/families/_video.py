"""What families of text-to-video models share: clips through a causal autoencoder, of which an image is the shortest.

Shapes: pixels (B, 3, F, H, W); latents (B, C, F', h, w) with F' = 1 + (F - 1) / `temporal_factor`, frames before rows and
columns everywhere, whatever order a stock pipeline has.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.families import Conditioning
from diffalign.families._loading import quiet
from diffalign.families._pipeline import PipelineFamily


class VideoFamily(PipelineFamily):
    """A text-to-video model with one T5 encoder. Subclasses add what is said of the noise.

    Class attributes:
        temporal_factor: frames per latent frame, after the first, which has one of its own.
        frame_step: clips have 1 + a multiple of so many frames.
    """

    resolution_step = 16  # 8 pixels per latent, 2 x 2 latents per token
    text_parts = ("tokenizer", "text_encoder")
    temporal_factor: ClassVar[int] = 4

    @property
    @abstractmethod
    def text_length(self) -> int:
        """Tokens of the text encoder."""

    def count_tokens(self, prompt: str) -> tuple[int, int]:
        tokenizer = self._part("tokenizer")
        return len(tokenizer(prompt, verbose=False).input_ids), self.text_length

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        pipeline = self._pipeline(*self.text_parts)
        with quiet():
            hidden, _ = pipeline.encode_prompt(
                prompts, do_classifier_free_guidance=False, max_sequence_length=self.text_length, device=self.device
            )
        return {"encoder_hidden_states": hidden}

    @staticmethod
    def image_conditioning(
        original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
    ) -> Conditioning:
        return {}

    def encode_images(self, pixels: Tensor) -> Tensor:
        return super().encode_images(pixels.unsqueeze(2) if pixels.ndim == 4 else pixels)

    def decode_latents(self, latents: Tensor) -> Tensor:
        clips = super().decode_latents(latents)
        return clips.squeeze(2) if clips.shape[2] == 1 else clips

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        channels, height, width = super().latent_shape(height, width)
        return channels, 1 + (frames - 1) // self.temporal_factor, height, width

    def sample_arguments(self, conditioning: Conditioning, negative: Conditioning, batch: int) -> dict[str, Any]:
        return {
            "prompt_embeds": self._to_device(conditioning, batch)["encoder_hidden_states"],
            "negative_prompt_embeds": self._to_device(negative, batch)["encoder_hidden_states"],
        }
