"""Wan 2.1 text-to-video: a DiT with text by cross-attention, on rectified flow.

Text is UMT5's, 512 tokens, with zeros behind the prompt's end. The autoencoder is causal in time; its latents are scaled
channel by channel. The network is told 1000 t, and `model.flow_shift` is UniPC's (3 for 480 lines, 5 for 720, after the
model's own readme). Times are drawn from a logit-normal distribution, as its report (arXiv 2503.20314) is quoted to say
(UNVERIFIED); public fine-tuning scripts differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.config import ModelConfig
from diffalign.errors import ConfigError
from diffalign.families import Conditioning
from diffalign.families._loading import locate
from diffalign.families._pipeline import FlowFamily
from diffalign.families._video import VideoFamily

TEXT_LENGTH = 512


class Wan(VideoFamily, FlowFamily):
    """Wan 2.1 T2V, 1.3B and 14B. Clips have 1 + 4k frames, 16 a second; sides are multiples of 16."""

    title = "Wan 2.1 text-to-video (DiT; flow)"
    frame_step = 4
    architectures = ("wan21-t2v-1.3b", "wan21-t2v-14b")

    @classmethod
    def pipeline_class(cls) -> Any:
        from diffusers import WanPipeline

        return WanPipeline

    @classmethod
    def preflight(cls, config: ModelConfig) -> None:
        super().preflight(config)
        location = locate(config)
        if location.kind == "folder":
            check_pipeline(read_index(Path(location.where) / "model_index.json"))

    @classmethod
    def check_network(cls, config: Mapping[str, Any]) -> None:
        if config.get("_class_name", "WanTransformer3DModel") != "WanTransformer3DModel":
            raise ConfigError(
                f"model.family is 'wan', but this network is a {config['_class_name']}, expected WanTransformer3DModel"
            )
        inputs, outputs = config.get("in_channels", 16), config.get("out_channels") or config.get("in_channels", 16)
        if inputs != outputs or config.get("image_dim") is not None:
            raise ConfigError(
                f"this transformer takes {inputs} channels and returns {outputs}, as image-to-video networks do; "
                "expected a text-to-video network"
            )

    def load(self, *parts: str) -> None:
        super().load(*parts)
        check_pipeline(self.pipeline_config)

    @property
    def frames_per_second(self) -> int:
        return 16

    @property
    def text_length(self) -> int:
        return self.config.max_sequence_length or TEXT_LENGTH

    @property
    def vae_factor(self) -> int:
        return int(self._part("vae").config.scale_factor_spatial)

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        channels = int(self._part("vae").config.z_dim)
        latent_frames = 1 + (frames - 1) // self.temporal_factor
        return channels, latent_frames, height // self.vae_factor, width // self.vae_factor

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

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return network(  # type: ignore[no-any-return]
            hidden_states=x_t,
            timestep=t,
            encoder_hidden_states=conditioning["encoder_hidden_states"].to(x_t.dtype),
            return_dict=False,
        )[0]


def read_index(file: Path) -> dict[str, Any]:
    """A pipeline folder's index.

    Raises:
        ConfigError: it is not readable.
    """
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is not readable ({type(error).__name__}); expected a diffusers pipeline") from error


def check_pipeline(index: Mapping[str, Any]) -> None:
    """Refuse Wan 2.2, whose networks are two, or are told another time for every token.

    Raises:
        ConfigError: it is one of those.
    """
    two = index.get("boundary_ratio") is not None
    if two or index.get("expand_timesteps"):
        what = "two networks, one for each half of the times" if two else "a time for every token"
        raise ConfigError(f"this is a Wan 2.2 pipeline, with {what}; model.family 'wan' is for Wan 2.1 text-to-video")
