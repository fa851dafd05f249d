"""CogVideoX text-to-video (2B, 5B, and 1.5): text and video in one sequence, v-prediction, zero terminal SNR.

Text is T5's, 226 tokens without an attention mask. Latents are (B, C, F', h, w) here and (B, F', C, h, w) inside of the
stock pipeline and network. 5B and 1.5 have rotary embeddings, computed from the latents' size as the stock pipeline does;
2B adds sines by itself. The noise schedule is the stock scheduler's own: its shift of the signal-to-noise ratio (3 for 2B,
1 for 5B) is unknown to other diffusers schedulers.

1.5 takes latent frames by two (`patch_size_t`). Its clips have an odd number of them, and as in its training a copy of the
first goes before them (zai-org/CogVideo, issue 679); it is dropped again where latents are decoded.

Clips have 1 + 8k frames: the autoencoder decodes two latent frames at a time, and only an odd number of them comes out as
the frames that went in (5 frames become 2 latent frames, and those 8 frames; zai-org/CogVideo, issue 786).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.config import ModelConfig
from diffalign.errors import ConfigError
from diffalign.families import Conditioning
from diffalign.families._loading import locate, network_config
from diffalign.families._pipeline import VARIANCE_PRESERVING, variance_preserving_changes
from diffalign.families._video import VideoFamily
from diffalign.schedules import Schedule

TEXT_LENGTH = 226


class CogVideoX(VideoFamily):
    """CogVideoX 2B and 5B, and 1.5 5B. Clips have 1 + 8k frames, 8 a second (1.5: 16); sides are multiples of 16."""

    title = "CogVideoX text-to-video (DiT; v)"
    network_part = "transformer"
    frame_step = 8
    architectures = ("cogvideox-2b", "cogvideox-5b")

    @classmethod
    def pipeline_class(cls) -> Any:
        from diffusers import CogVideoXPipeline

        return CogVideoXPipeline

    @classmethod
    def preflight(cls, config: ModelConfig) -> None:
        super().preflight(config)
        network = network_config(config, locate(config), cls.network_part)
        if network is not None:
            check_text_length(config, network)

    @classmethod
    def check_network(cls, config: Mapping[str, Any]) -> None:
        if config.get("_class_name", "CogVideoXTransformer3DModel") != "CogVideoXTransformer3DModel":
            raise ConfigError(
                f"model.family is 'cogvideox', but this network is a {config['_class_name']}, "
                "expected CogVideoXTransformer3DModel"
            )
        inputs, outputs = config.get("in_channels", 16), config.get("out_channels", 16)
        if inputs != outputs or config.get("ofs_embed_dim") or config.get("use_learned_positional_embeddings"):
            raise ConfigError(
                f"this transformer takes {inputs} channels and returns {outputs}, as image-to-video networks do; "
                "expected a text-to-video network"
            )
        if config.get("patch_size_t") not in (None, 2):
            raise ConfigError(f"this transformer takes {config['patch_size_t']} latent frames at a time; expected 2")

    def load(self, *parts: str) -> None:
        super().load(*parts)
        if self.network_part in self.parts:
            check_text_length(self.config, self.network_config)

    def scheduler_changes(self, scheduler: Any) -> dict[str, Any]:
        return variance_preserving_changes(self.config)

    def make_schedule(self, scheduler: Any) -> Schedule:
        prediction_type = scheduler.config.prediction_type
        if prediction_type not in VARIANCE_PRESERVING:
            raise ConfigError(
                f"model.pretrained {self.config.pretrained!r} predicts {prediction_type!r}; "
                f"expected one of {', '.join(VARIANCE_PRESERVING)}"
            )
        return Schedule.variance_preserving(scheduler.alphas_cumprod, prediction_type)

    @cached_property
    def network_config(self) -> Mapping[str, Any]:
        """The network's settings, whether it is loaded or not."""
        from diffusers import CogVideoXTransformer3DModel

        if self.network_part in self.parts:
            return dict(self.parts[self.network_part].config)
        config = network_config(self.config, self.location, self.network_part)
        if config is None:  # on the hub, and not in the cache yet
            config = CogVideoXTransformer3DModel.load_config(
                self.location.where, subfolder=self.network_part, revision=self.config.revision
            )
        return config

    @property
    def frames_per_second(self) -> int:
        return 16 if self.padding else 8

    @property
    def text_length(self) -> int:
        if self.config.max_sequence_length is not None:
            return self.config.max_sequence_length
        return int(self.network_config.get("max_text_seq_length", TEXT_LENGTH))

    @property
    def padding(self) -> int:
        """Copies of the first latent frame that go before it."""
        return 0 if self.network_config.get("patch_size_t") is None else 1

    def fingerprint(self) -> dict[str, str]:
        # What is cached depends on the network, too, where the same encoders stand before another one.
        return super().fingerprint() | {"max_sequence_length": str(self.text_length), "padding": str(self.padding)}

    def encode_images(self, pixels: Tensor) -> Tensor:
        latents = super().encode_images(pixels)
        return torch.cat([latents[:, :, :1]] * self.padding + [latents], dim=2)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return super().decode_latents(latents[:, :, self.padding :])

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        channels, latent_frames, height, width = super().latent_shape(height, width, frames)
        return channels, latent_frames + self.padding, height, width

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2)  # (B, C, F, h, w) -> (B, F, C, h, w)

    def from_pipeline(self, latents: Tensor, shape: torch.Size) -> Tensor:
        return latents.transpose(1, 2)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        output = network(
            hidden_states=self.to_pipeline(x_t),
            encoder_hidden_states=conditioning["encoder_hidden_states"].to(x_t.dtype),
            timestep=t,
            image_rotary_emb=self.rotary(x_t),
            return_dict=False,
        )[0]
        return self.from_pipeline(output, x_t.shape)

    def rotary(self, latents: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the tokens' positions, each (tokens, width of a head), as the stock pipeline has them.

        Args:
            latents: (B, C, F', h, w).
        """
        config = self.network_config
        if not config.get("use_rotary_positional_embeddings"):
            return None
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        patch, frames = config["patch_size"], latents.shape[2]
        grid = latents.shape[3] // patch, latents.shape[4] // patch
        base = config["sample_height"] // patch, config["sample_width"] // patch
        where: dict[str, Any]
        if config.get("patch_size_t") is None:  # positions are stretched from the size that it was trained at
            crop = get_resize_crop_region_for_grid(grid, base[1], base[0])
            where = {"crops_coords": crop, "temporal_size": frames}
        else:  # positions are cut out of a larger grid
            tokens = -(-frames // config["patch_size_t"])
            where = {"crops_coords": None, "temporal_size": tokens, "grid_type": "slice", "max_size": base}
        cos, sin = get_3d_rotary_pos_embed(
            embed_dim=config["attention_head_dim"], grid_size=grid, device=latents.device, **where
        )
        return cos, sin


def check_text_length(config: ModelConfig, network: Mapping[str, Any]) -> None:
    """Refuse another text length than the network's, where positions are added to text and video together (2B).

    Raises:
        ConfigError: with the length that it has.
    """
    length = network.get("max_text_seq_length", TEXT_LENGTH)
    if not network.get("use_rotary_positional_embeddings") and config.max_sequence_length not in (None, length):
        raise ConfigError(
            f"model.max_sequence_length: got {config.max_sequence_length}; this network takes {length} tokens; remove it"
        )
