"""FLUX.1 [dev] and [schnell]: double and single MMDiT blocks on rectified flow, T5 with pooled CLIP.

Latents are (B, 16, h, w) everywhere; 2 x 2 of them are packed into a token inside of `predict` and of the stock pipeline.
The network is told t / 1000, in (0, 1]. Both models are distilled and have no unconditional branch: [dev] is told a
guidance scale instead, which is `sampling.guidance_scale` when it samples, `rollout.guidance_scale` in rollouts (and for the
scores of their transitions) and `training_guidance` when it is trained, as in public LoRA trainers; [schnell] has no such
input, `sampling.guidance_scale` does nothing there, and `rollout.guidance_scale` is 1.

Times are logit-normal, as FLUX.1 Kontext's report (arXiv 2506.15742) says of its training; how FLUX.1 itself was trained is
not published (UNVERIFIED). [dev]'s shift by the size of an image is its sampler's alone. [schnell]'s model card has 256
tokens of text (`model.max_sequence_length: 256`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.config import ModelConfig, SamplingConfig
from diffalign.errors import ConfigError
from diffalign.families import Conditioning
from diffalign.families._loading import locate, network_config, quiet
from diffalign.families._pipeline import FlowFamily
from diffalign.families._transformers import check_architecture, check_channels, check_text_length, pack, unpack

TEXT_LENGTH = 512  # of T5, in the stock pipeline, and the most that it takes


class Flux(FlowFamily):
    """FLUX.1 dev and schnell. CLIP reads 77 tokens, T5 `model.max_sequence_length` (512).

    Class attributes:
        training_guidance: the guidance scale that [dev] is told where its conditioning does not say (`guide`).
    """

    title = "FLUX.1 dev / schnell (MMDiT; flow)"
    resolution_step = 16
    text_parts = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
    architectures = ("flux1-dev", "flux1-schnell")
    unconditional = False
    linspace_sigmas = True
    training_guidance: ClassVar[float] = 1.0

    @classmethod
    def pipeline_class(cls) -> Any:
        from diffusers import FluxPipeline

        return FluxPipeline

    @classmethod
    def preflight(cls, config: ModelConfig) -> None:
        check_text_length(config, TEXT_LENGTH)
        super().preflight(config)

    @classmethod
    def check_network(cls, config: Mapping[str, Any]) -> None:
        check_architecture(config, "flux", "FluxTransformer2DModel")
        check_channels(config.get("in_channels", 64), config.get("out_channels") or config.get("in_channels", 64))

    @classmethod
    def check_guidance(cls, config: ModelConfig, scale: float, setting: str = "rollout.guidance_scale") -> None:
        network = network_config(config, locate(config), cls.network_part)
        if network is not None and not network.get("guidance_embeds"):  # what is not known yet is refused by `guide`
            super().check_guidance(config, scale, setting)

    def guide(self, conditioning: Conditioning, scale: float) -> tuple[Conditioning, float]:
        if not self._is_guided:
            super().check_guidance(self.config, scale)
            return conditioning, 1.0
        hidden = conditioning["encoder_hidden_states"]
        told = torch.full((len(hidden),), scale, dtype=torch.float32, device=hidden.device)
        return conditioning | {"guidance": told}, 1.0

    @property
    def text_length(self) -> int:
        """Tokens of T5."""
        return self.config.max_sequence_length or TEXT_LENGTH

    def count_tokens(self, prompt: str) -> tuple[int, int]:
        """By T5, which reads most."""
        return len(self._part("tokenizer_2")(prompt, verbose=False).input_ids), self.text_length

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        pipeline = self._pipeline(*self.text_parts)
        with quiet():
            hidden, pooled, _ = pipeline.encode_prompt(
                prompts, None, device=self.device, max_sequence_length=self.text_length
            )
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    @staticmethod
    def image_conditioning(
        original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
    ) -> Conditioning:
        return {}

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def from_pipeline(self, latents: Tensor, shape: torch.Size) -> Tensor:
        return unpack(latents, shape)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        hidden = conditioning["encoder_hidden_states"].to(x_t.dtype)
        output = network(
            hidden_states=pack(x_t),
            encoder_hidden_states=hidden,
            pooled_projections=conditioning["pooled_projections"].to(x_t.dtype),
            timestep=t / 1000,
            guidance=self._told(t, conditioning),
            txt_ids=torch.zeros(hidden.shape[1], 3, device=x_t.device),
            img_ids=positions(x_t),
            return_dict=False,
        )[0]
        return unpack(output, x_t.shape)

    def _told(self, t: Tensor, conditioning: Conditioning) -> Tensor | None:
        """The guidance scale that the network is told, (B,)."""
        if not self._is_guided:
            return None
        told = conditioning.get("guidance")
        return torch.full_like(t, self.training_guidance, dtype=torch.float32) if told is None else told

    @property
    def _is_guided(self) -> bool:
        return bool(self._part(self.network_part).config.guidance_embeds)

    def guidance_arguments(self, sampling: SamplingConfig) -> dict[str, Any]:
        if sampling.negative_prompt:
            raise ConfigError(
                f"sampling.negative_prompt: got {sampling.negative_prompt!r}; FLUX.1 is distilled and has no "
                "unconditional branch; remove it"
            )
        return super().guidance_arguments(sampling)

    def sample_arguments(self, conditioning: Conditioning, negative: Conditioning, batch: int) -> dict[str, Any]:
        positive = self._to_device(conditioning, batch)
        return {
            "prompt_embeds": positive["encoder_hidden_states"],
            "pooled_prompt_embeds": positive["pooled_projections"],
        }


def positions(latents: Tensor) -> Tensor:
    """(0, row, column) of every token of latents (B, C, h, w), (h/2 * w/2, 3), float32."""
    rows, columns = (torch.arange(side // 2, device=latents.device) for side in latents.shape[-2:])
    return torch.cartesian_prod(torch.zeros(1, device=latents.device), rows.float(), columns.float())
