"""What the UNet families (SD1.x, SD2.x, SDXL) share: parts, latents, schedule, sampling through the stock pipeline."""

from __future__ import annotations

import gc
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from diffalign.config import ModelConfig, SamplingConfig
from diffalign.errors import ConfigError
from diffalign.families import DECODER, ENCODERS, NETWORK, Conditioning, DenoisingFamily
from diffalign.families._loading import (
    Location,
    check_vae,
    find_scheduler,
    fingerprint,
    load_components,
    locate,
    network_config,
)
from diffalign.schedules import Schedule

PREDICTIONS = ("epsilon", "v_prediction")


class UNetFamily(DenoisingFamily):
    """A latent UNet behind a stock diffusers pipeline. Subclasses add the conditioning."""

    resolution_step = 8
    attention_backends = ("default", "xformers")
    text_parts: ClassVar[tuple[str, ...]]
    architectures: ClassVar[tuple[str, ...]]  # published ones of this family

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(config, device=device, dtype=dtype, vae_dtype=vae_dtype)
        self.location: Location = locate(config)
        self.parts: dict[str, Any] = {}
        self.pipeline_config: dict[str, Any] = {}
        self._schedule: Schedule | None = None

    @classmethod
    @abstractmethod
    def pipeline_class(cls) -> Any:
        """The stock pipeline class."""

    @classmethod
    def preflight(cls, config: ModelConfig) -> None:
        location = locate(config)
        if config.vae:
            check_vae(config.vae)
        if location.kind == "random" and location.where not in cls.architectures:
            raise ConfigError(
                f"model.pretrained {config.pretrained!r} is no architecture of model.family {config.family!r}; "
                f"expected one of: {', '.join(cls.architectures)}"
            )
        network = network_config(config, location)
        if network is not None:
            cls.check_network(network)

    def _part_names(self, *parts: str) -> set[str]:
        table = {NETWORK: ("unet",), ENCODERS: (*self.text_parts, "vae"), DECODER: ("vae",)}
        return {name for part in parts for name in table[part]}

    def load(self, *parts: str) -> None:
        wanted = (self._part_names(*parts) | {"scheduler"}) - set(self.parts)
        if not wanted:
            return
        loaded = load_components(
            self.pipeline_class(), self.config, self.location, wanted, dtype=self.dtype, vae_dtype=self.vae_dtype
        )
        self.pipeline_config = loaded.pop("pipeline_config")
        for name, part in loaded.items():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
                part.eval()
                part.to(self.device)
            self.parts[name] = part
        self._check(loaded)

    def _check(self, loaded: dict[str, Any]) -> None:
        if "unet" in loaded:
            self.check_network(loaded["unet"].config)
        if "scheduler" in loaded and self.config.prediction_type:
            scheduler = loaded["scheduler"]
            self.parts["scheduler"] = type(scheduler).from_config(
                scheduler.config, prediction_type=self.config.prediction_type
            )

    @classmethod
    def check_network(cls, config: Mapping[str, Any]) -> None:
        """Refuse a UNet of another family, or one that takes more than noisy latents.

        Raises:
            ConfigError: with what it is instead.
        """
        inputs, outputs = config.get("in_channels", 4), config.get("out_channels", 4)
        if inputs != outputs:
            raise ConfigError(
                f"this UNet takes {inputs} channels and returns {outputs}, as inpainting and editing networks do; "
                "expected a text-to-image network"
            )

    def unload(self, *parts: str) -> None:
        for name in self._part_names(*parts):
            self.parts.pop(name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _part(self, name: str) -> Any:
        if name not in self.parts:
            raise RuntimeError(f"{name} is not in memory; call load() for it first")
        return self.parts[name]

    @property
    def network(self) -> nn.Module:
        return cast(nn.Module, self._part("unet"))

    @property
    def schedule(self) -> Schedule:
        if self._schedule is None:
            from diffusers import DDPMScheduler

            self.load()  # the scheduler alone
            config = self._part("scheduler").config
            if config.prediction_type not in PREDICTIONS:
                raise ConfigError(
                    f"model.pretrained {self.config.pretrained!r} predicts {config.prediction_type!r}; "
                    f"expected one of {', '.join(PREDICTIONS)}"
                )
            alphas = DDPMScheduler.from_config(config).alphas_cumprod
            self._schedule = Schedule(alphas.float(), config.prediction_type)
        return self._schedule

    def fingerprint(self) -> dict[str, str]:
        return fingerprint(self.config, self.location, ("vae", *self.text_parts))

    def count_tokens(self, prompt: str) -> tuple[int, int]:
        tokenizer = self._part("tokenizer")
        limit = int(tokenizer.model_max_length)
        # An over-long text is what is being counted: no warning about it from the tokenizer.
        return len(tokenizer(prompt, verbose=False).input_ids), limit

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        vae = self._part("vae")
        # Never inside the training's autocast: the VAE's own type was chosen because lower ones overflow.
        with torch.autocast(self.device.type, enabled=False):
            latents = vae.encode(pixels.to(self.device, self.vae_dtype)).latent_dist.mode()
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return cast(Tensor, (latents.float() - shift) * vae.config.scaling_factor)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self._part("vae")
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        raw = latents.float() / vae.config.scaling_factor + shift
        with torch.autocast(self.device.type, enabled=False):
            images = vae.decode(raw.to(self.device, self.vae_dtype)).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        config = self._part("vae").config
        factor = 2 ** (len(config.block_out_channels) - 1)
        return int(config.latent_channels), height // factor, width // factor

    def pipeline(self) -> Any:
        self.load(NETWORK, ENCODERS, DECODER)
        return self._pipeline(*self._part_names(NETWORK, ENCODERS, DECODER))

    def _pipeline(self, *names: str) -> Any:
        """The stock pipeline over the named parts; the others are None."""
        parts = {name: self.parts.get(name) if name in names else None for name in ("unet", "vae", *self.text_parts)}
        pipeline = self.pipeline_class()(**parts, scheduler=self._part("scheduler"), **self.pipeline_arguments())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @torch.no_grad()
    def sample(
        self, conditioning: Conditioning, negative: Conditioning, noise: Tensor, sampling: SamplingConfig
    ) -> Tensor:
        pipeline = self._pipeline("unet", "vae")
        if sampling.scheduler:
            pipeline.scheduler = find_scheduler(sampling.scheduler).from_config(pipeline.scheduler.config)
        vae = self._part("vae")
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        images = pipeline(
            **self.sample_arguments(conditioning, negative, len(noise)),
            latents=noise.to(self.device, self.dtype),
            height=noise.shape[-2] * factor,
            width=noise.shape[-1] * factor,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            guidance_rescale=sampling.guidance_rescale,
            output_type="latent",
        ).images
        return self.decode_latents(images).cpu()

    def pipeline_arguments(self) -> dict[str, Any]:
        """What the stock pipeline's constructor takes beyond the parts."""
        return {}

    @abstractmethod
    def sample_arguments(self, conditioning: Conditioning, negative: Conditioning, batch: int) -> dict[str, Tensor]:
        """Prompt arguments of the stock pipeline's call."""

    def _to_device(self, conditioning: Conditioning, batch: int) -> Conditioning:
        return {
            name: value.to(self.device, self.dtype).expand(batch, *value.shape[1:])
            for name, value in conditioning.items()
        }
