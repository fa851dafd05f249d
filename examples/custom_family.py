"""A model family of your own in one file: AuraFlow, named by its path in the configuration.

    diffalign train demo_dpo model.family=examples/custom_family.py model.pretrained=fal/AuraFlow-v0.3 ...

What is particular to a family stands here and nothing else: which stock pipeline it has, how prompts become tensors, and
how its network is called. Loading, latents, schedule, sampling, cache, LoRA, training and evaluation are what they are for
every family. AuraFlow has not been run by us on its real weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import ConfigError
from diffalign.families import Conditioning
from diffalign.families._pipeline import FlowFamily

TEXT_LENGTH = 256


class AuraFlow(FlowFamily):
    """AuraFlow: an MMDiT on rectified flow with one T5-like text encoder and Stable Diffusion XL's four latent channels."""

    title = "AuraFlow (MMDiT; flow)"
    resolution_step = 16
    text_parts = ("tokenizer", "text_encoder")
    architectures = ()

    @classmethod
    def pipeline_class(cls) -> Any:
        from diffusers import AuraFlowPipeline

        return AuraFlowPipeline

    @classmethod
    def check_network(cls, config: Mapping[str, Any]) -> None:
        if config.get("_class_name", "AuraFlowTransformer2DModel") != "AuraFlowTransformer2DModel":
            raise ConfigError(f"this network is a {config['_class_name']}, expected AuraFlowTransformer2DModel")

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        length = self.config.max_sequence_length or TEXT_LENGTH
        hidden, mask, _, _ = self._pipeline(*self.text_parts).encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device, max_sequence_length=length
        )
        return {"encoder_hidden_states": hidden, "mask": mask.float()}

    @staticmethod
    def image_conditioning(
        original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
    ) -> Conditioning:
        return {}

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        # Padding was set to zero when the prompt was encoded: the network reads no mask. It is told t in [0, 1].
        return network(  # type: ignore[no-any-return]
            x_t,
            encoder_hidden_states=conditioning["encoder_hidden_states"].to(x_t.dtype),
            timestep=t.to(x_t.dtype) / 1000,
            return_dict=False,
        )[0]

    def sample_arguments(self, conditioning: Conditioning, negative: Conditioning, batch: int) -> dict[str, Any]:
        positive, negative = self._to_device(conditioning, batch), self._to_device(negative, batch)
        return {
            "prompt_embeds": positive["encoder_hidden_states"],
            "prompt_attention_mask": positive["mask"],
            "negative_prompt_embeds": negative["encoder_hidden_states"],
            "negative_prompt_attention_mask": negative["mask"],
        }
