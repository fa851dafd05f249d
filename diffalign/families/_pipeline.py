"""What families behind a stock diffusers pipeline share: parts, latents, schedule, sampling through the pipeline.

`UNetFamily` and `FlowFamily` say how the noise runs; a family's own file says what is particular to it.
"""

from __future__ import annotations

import gc
import inspect
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from diffalign.config import ModelConfig, SamplingConfig
from diffalign.errors import ConfigError
from diffalign.families import DECODER, ENCODERS, NETWORK, TEXT, Around, Conditioning, DenoisingFamily
from diffalign.families._loading import (
    Location,
    absent_parts,
    check_vae,
    find_scheduler,
    fingerprint,
    load_components,
    locate,
    network_config,
)
from diffalign.schedules import Schedule
from diffalign.text_encoders import PREFIX, TextConditioned, distinct, has_tokens, token_ids

VARIANCE_PRESERVING = ("epsilon", "v_prediction")


class PipelineFamily(DenoisingFamily):
    """A latent model behind a stock diffusers pipeline. Subclasses add schedule and conditioning.

    Class attributes:
        network_part: the pipeline's name of the network.
        text_parts: its names of tokenizers and text encoders.
        optional_parts: those of them that a model may come without.
        text_encoders: those of them that are CLIP's and can be trained with the network.
        last_unread: text encoders whose last layer's output nothing reads.
        architectures: published ones of this family (`diffalign.families.published`).
    """

    resolution_step = 8
    network_part: ClassVar[str]
    text_parts: ClassVar[tuple[str, ...]]
    optional_parts: ClassVar[tuple[str, ...]] = ()
    last_unread: ClassVar[tuple[str, ...]] = ()
    architectures: ClassVar[tuple[str, ...]]

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
        self._conditioned: TextConditioned | None = None

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
        network = network_config(config, location, cls.network_part)
        if network is not None:
            cls.check_network(network)

    @cached_property
    def absent(self) -> frozenset[str]:
        """Optional parts that this model comes without; they are loaded as None."""
        if not self.optional_parts or self.location.kind not in ("folder", "hub"):
            return frozenset()
        return absent_parts(self.pipeline_class(), self.config, self.location, self.optional_parts)

    def _part_names(self, *parts: str) -> set[str]:
        table = {
            NETWORK: (self.network_part,),
            ENCODERS: (*self.text_parts, "vae"),
            DECODER: ("vae",),
            TEXT: (*map(tokenizer_of, self.text_encoders), *self.text_encoders),
        }
        return {name for part in parts for name in table[part]} - self.absent

    def load(self, *parts: str) -> None:
        names = self._part_names(*parts) | {"scheduler"}
        for name in names & set(self.parts):
            if isinstance(part := self.parts[name], nn.Module) and name != self.network_part:
                part.to(self.device)  # it may have been parked
        wanted = names - set(self.parts)
        if not wanted:
            return
        loaded = load_components(
            self.pipeline_class(),
            self.config,
            self.location,
            wanted,
            dtype=self.dtype,
            vae_dtype=self.vae_dtype,
            absent=self.absent,
        )
        self.pipeline_config = loaded.pop("pipeline_config")
        for name, part in loaded.items():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
                part.eval()
                part.to(self.device)
            self.parts[name] = part
        if self.network_part in loaded:
            self.check_network(loaded[self.network_part].config)
            self._fuse(loaded[self.network_part])
        if "scheduler" in loaded and (changes := self.scheduler_changes(loaded["scheduler"])):
            scheduler = loaded["scheduler"]
            self.parts["scheduler"] = type(scheduler).from_config(scheduler.config, **changes)

    def _fuse(self, network: Any) -> None:
        """Put the adapters of the config into the network's weights."""
        from diffalign import sparse  # which attach, as the next
        from diffalign.export import load_lora  # which knows families

        for path in self.config.adapters:
            load_lora(network, Path(path).expanduser(), family=self.config.family, name="fused")
            network.fuse_lora(adapter_names=["fused"])
            if sparse.remove(network):
                continue
            network.unload_lora()

    @abstractmethod
    def scheduler_changes(self, scheduler: Any) -> dict[str, Any]:
        """Settings of the scheduler that the config overrides."""

    @classmethod
    @abstractmethod
    def check_network(cls, config: Mapping[str, Any]) -> None:
        """Refuse a network of another family, or one that takes more than noisy latents.

        Raises:
            ConfigError: with what it is instead.
        """

    @property
    def _kept(self) -> frozenset[str]:
        """Text encoders that are trained: they stay with the network, whoever is done with encoding."""
        return frozenset() if self._conditioned is None else frozenset(self.text_encoders)

    def unload(self, *parts: str) -> None:
        for name in self._part_names(*parts) - self._kept:
            self.parts.pop(name, None)
        self._free()

    def park(self, *parts: str) -> None:
        for name in self._part_names(*parts) - self._kept:
            if isinstance(part := self.parts.get(name), nn.Module):
                part.to("cpu")
        self._free()

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _part(self, name: str) -> Any:
        if name not in self.parts:
            raise RuntimeError(f"{name} is not in memory; call load() for it first")
        return self.parts[name]

    @property
    def network(self) -> nn.Module:
        return cast(nn.Module, self._part(self.network_part))

    @property
    def adapted(self) -> nn.Module:
        return self.network if self._conditioned is None else self._conditioned

    def with_text_encoders(self) -> TextConditioned:
        """Network and trainable text encoders as one module, which from now on is what carries adapters (`adapted`)."""
        if self._conditioned is None:
            self.load(NETWORK, TEXT)
            self._conditioned = TextConditioned(self)
        return self._conditioned

    def tokenize(self, prompts: list[str], encoded: Conditioning) -> Conditioning:
        return {f"{PREFIX}{name}": token_ids(self._part(tokenizer_of(name)), prompts) for name in self.text_encoders}

    def encode_tokens(self, conditioning: Conditioning) -> Conditioning:
        if not has_tokens(conditioning):
            return conditioning
        tokens = {name: value for name, value in conditioning.items() if name.startswith(PREFIX)}
        rest = {name: value for name, value in conditioning.items() if name not in tokens}
        rows, place = distinct({name: value.to(self.device) for name, value in tokens.items()})
        return rest | self.joined({name: value[place] for name, value in self.encode_rows(rows).items()}, rest)

    def encode_rows(self, tokens: Conditioning) -> Conditioning:
        """Text conditioning of token ids by the trainable text encoders, with gradient.

        Args:
            tokens: as `tokenize` makes them, without what other encoders say, on the family's device; M distinct prompts.
        """
        raise self.no_text_encoders()

    def joined(self, encoded: Conditioning, rest: Conditioning) -> Conditioning:
        """What trained text encoders say together with what others have said (`rest`)."""
        return encoded

    @property
    def schedule(self) -> Schedule:
        if self._schedule is None:
            self._schedule = self.make_schedule(self.stock_scheduler())
        return self._schedule

    def stock_scheduler(self) -> Any:
        self.load()  # the scheduler alone
        return self._part("scheduler")

    @abstractmethod
    def make_schedule(self, scheduler: Any) -> Schedule:
        """The training schedule of a stock scheduler's settings."""

    def fingerprint(self) -> dict[str, str]:
        found = fingerprint(self.config, self.location, ("vae", *self.text_parts))
        if self.config.max_sequence_length is not None:
            found["max_sequence_length"] = str(self.config.max_sequence_length)
        return found

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
            encoded = vae.encode(pixels.to(self.device, self.vae_dtype))
        raw = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent  # DC-AE has no spread
        return self.scale_latents(raw.float())

    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self._part("vae")
        raw = self.unscale_latents(latents.float())
        with torch.autocast(self.device.type, enabled=False):
            images = vae.decode(raw.to(self.device, self.vae_dtype)).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def scale_latents(self, raw: Tensor) -> Tensor:
        """The autoencoder's latents to what the network is trained on: about unit variance."""
        config = self._part("vae").config
        return (raw - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def unscale_latents(self, latents: Tensor) -> Tensor:
        """The inverse of `scale_latents`."""
        config = self._part("vae").config
        return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, along each side."""
        return int(2 ** (len(self._part("vae").config.block_out_channels) - 1))

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        channels = int(self._part("vae").config.latent_channels)
        return channels, height // self.vae_factor, width // self.vae_factor

    def pipeline(self) -> Any:
        self.load(NETWORK, ENCODERS, DECODER)
        return self._pipeline(*self._part_names(NETWORK, ENCODERS, DECODER))

    def _pipeline(self, *names: str) -> Any:
        """The stock pipeline over the named parts; the others are None."""
        every = (self.network_part, "vae", *self.text_parts)
        parts = {name: self.parts.get(name) if name in names else None for name in every}
        pipeline = self.pipeline_class()(**parts, scheduler=self._part("scheduler"), **self.pipeline_arguments())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @torch.no_grad()
    def sample(
        self,
        conditioning: Conditioning,
        negative: Conditioning,
        noise: Tensor,
        sampling: SamplingConfig,
        *,
        around: Around = nullcontext,
    ) -> Tensor:
        return self.decode_latents(self.sample_latents(conditioning, negative, noise, sampling, around=around)).cpu()

    @torch.no_grad()
    def sample_latents(
        self,
        conditioning: Conditioning,
        negative: Conditioning,
        noise: Tensor,
        sampling: SamplingConfig,
        *,
        around: Around = nullcontext,
    ) -> Tensor:
        pipeline = self._pipeline(self.network_part, "vae")
        if sampling.scheduler:
            pipeline.scheduler = self.other_scheduler(sampling.scheduler)
        height, width = (side * self.vae_factor for side in noise.shape[-2:])
        with around(pipeline):
            output = pipeline(
                **self.sample_arguments(conditioning, negative, len(noise)),
                **self.guidance_arguments(sampling),
                latents=self.to_pipeline(noise.to(self.device, self.dtype)),
                height=height,
                width=width,
                num_inference_steps=sampling.num_inference_steps,
                output_type="latent",
            )
        return self.from_pipeline(output[0], noise.shape)

    def other_scheduler(self, name: str) -> Any:
        """A diffusers scheduler by name, with the settings of the model's own.

        Raises:
            ConfigError: no such scheduler, or none for such a model.
        """
        return find_scheduler(name).from_config(self._part("scheduler").config)

    def to_pipeline(self, latents: Tensor) -> Tensor:
        """Latents as the stock pipeline takes them (packed into tokens, for some)."""
        return latents

    def from_pipeline(self, latents: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `to_pipeline`; `shape` is (B, C, ..., h, w)."""
        return latents

    def guidance_arguments(self, sampling: SamplingConfig) -> dict[str, Any]:
        """Guidance arguments of the stock pipeline's call.

        Raises:
            ConfigError: guidance that the pipeline does not have.
        """
        if sampling.guidance_rescale:
            raise ConfigError(
                f"sampling.guidance_rescale: got {sampling.guidance_rescale}; the stock pipeline of family "
                f"{self.config.family!r} has no such setting; remove it"
            )
        return {"guidance_scale": sampling.guidance_scale}

    def pipeline_arguments(self) -> dict[str, Any]:
        """What the stock pipeline's constructor takes beyond the parts."""
        return {}

    @abstractmethod
    def sample_arguments(self, conditioning: Conditioning, negative: Conditioning, batch: int) -> dict[str, Any]:
        """Prompt arguments of the stock pipeline's call."""

    def _to_device(self, conditioning: Conditioning, batch: int) -> Conditioning:
        def typed(value: Tensor) -> Tensor:  # masks stay what they are
            return value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)

        return {name: typed(value).expand(batch, *value.shape[1:]) for name, value in conditioning.items()}


def tokenizer_of(encoder: str) -> str:
    """The stock pipeline's name of a text encoder's tokenizer."""
    return encoder.replace("text_encoder", "tokenizer")


class UNetFamily(PipelineFamily):
    """A UNet with discrete variance-preserving noise; eps or v prediction."""

    attention_backends = ("default", "xformers")
    network_part = "unet"

    @classmethod
    def check_network(cls, config: Mapping[str, Any]) -> None:
        inputs, outputs = config.get("in_channels", 4), config.get("out_channels", 4)
        if inputs != outputs:
            raise ConfigError(
                f"this UNet takes {inputs} channels and returns {outputs}, as inpainting and editing networks do; "
                "expected a text-to-image network"
            )

    def scheduler_changes(self, scheduler: Any) -> dict[str, Any]:
        return variance_preserving_changes(self.config)

    def make_schedule(self, scheduler: Any) -> Schedule:
        return variance_preserving_schedule(self.config, scheduler)

    def guidance_arguments(self, sampling: SamplingConfig) -> dict[str, Any]:
        return {"guidance_scale": sampling.guidance_scale, "guidance_rescale": sampling.guidance_rescale}


def variance_preserving_changes(config: ModelConfig) -> dict[str, Any]:
    """What a config overrides of a variance-preserving scheduler.

    Raises:
        ConfigError: a flow model's setting.
    """
    if config.flow_shift is not None:
        raise ConfigError(f"model.flow_shift: family {config.family!r} is no flow model; remove it")
    return {"prediction_type": config.prediction_type} if config.prediction_type else {}


def variance_preserving_schedule(config: ModelConfig, scheduler: Any) -> Schedule:
    """The discrete schedule that a stock scheduler's settings describe.

    Raises:
        ConfigError: neither eps nor v prediction.
    """
    from diffusers import DDPMScheduler

    if scheduler.config.prediction_type not in VARIANCE_PRESERVING:
        raise ConfigError(
            f"model.pretrained {config.pretrained!r} predicts {scheduler.config.prediction_type!r}; "
            f"expected one of {', '.join(VARIANCE_PRESERVING)}"
        )
    alphas = DDPMScheduler.from_config(scheduler.config).alphas_cumprod
    return Schedule.variance_preserving(alphas, scheduler.config.prediction_type)


class FlowFamily(PipelineFamily):
    """A rectified-flow transformer: x_t = (1 - t) x0 + t noise, and the network predicts noise - x0.

    Times are drawn from a logit-normal distribution over the scheduler's shifted table, as these models were trained
    (Stable Diffusion 3, arXiv 2403.03206); `denoising.timestep_sampling` changes it.
    """

    network_part = "transformer"
    timestep_sampling = "logit_normal"

    def scheduler_changes(self, scheduler: Any) -> dict[str, Any]:
        if self.config.prediction_type:
            raise ConfigError(
                f"model.prediction_type: family {self.config.family!r} predicts flow, whatever the scheduler; remove it"
            )
        shift = self.config.flow_shift
        return {} if shift is None else {shift_key(scheduler): shift}

    def other_scheduler(self, name: str) -> Any:
        # Schedulers name a flow's settings differently, and those that were made for other models have to be told.
        scheduler, own = find_scheduler(name), self._part("scheduler").config
        shift = own.get(shift_key(self._part("scheduler")), 1.0)
        flow = {"shift": shift, "flow_shift": shift, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        known = inspect.signature(scheduler.__init__).parameters
        if not {"shift", "use_flow_sigmas"} & known.keys():
            raise ConfigError(
                f"sampling.scheduler: {name!r} is no scheduler for flow models; expected one such as "
                "FlowMatchEulerDiscreteScheduler, or null for the model's own"
            )
        return scheduler.from_config(own, **{key: value for key, value in flow.items() if key in known})

    def make_schedule(self, scheduler: Any) -> Schedule:
        # A shift that depends on the image's size is the sampler's: training uses the unshifted table, as diffusers'
        # own training scripts do.
        dynamic = scheduler.config.get("use_dynamic_shifting", False)
        shift = 1.0 if dynamic else scheduler.config.get(shift_key(scheduler), 1.0)
        return Schedule.flow(float(shift or 1.0), int(scheduler.config.num_train_timesteps))


def shift_key(scheduler: Any) -> str:
    """The name of a flow scheduler's shift: Euler's and Heun's is `shift`, that of the multistep solvers `flow_shift`."""
    return "flow_shift" if "flow_shift" in scheduler.config else "shift"
