"""Model families: one file each. A family knows how its models are loaded, conditioned, called and sampled.

What all have in common is `Family`. A denoising family turns prompts into a dict of tensors and images into latents, and
`predict` returns the network's own prediction for noisy latents. A language model's family has a tokenizer instead, and a
reward model's looks at pictures as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from diffalign.config import ModelConfig, SamplingConfig
from diffalign.errors import ConfigError
from diffalign.losses import Kind
from diffalign.schedules import Schedule

Conditioning = dict[str, Tensor]
Around: TypeAlias = Callable[[Any], AbstractContextManager[Any]]  # stock pipeline -> a context for its call
# TEXT: tokenizers and text encoders that can be trained, those of ENCODERS that `DenoisingFamily.text_encoders` names.
NETWORK, ENCODERS, DECODER, TEXT = "network", "encoders", "decoder", "text"


class Family(ABC):
    """A model of one family. Parts are loaded on demand, so that not all need be in memory together.

    Args:
        config: which model.
        device: where parts go.
        dtype: of the frozen network (and of text encoders).
        vae_dtype: of the autoencoder, where there is one.
    """

    title: ClassVar[str]  # for `diffalign list families`
    modality: ClassVar[Literal["image", "text", "reward"]]
    kind: ClassVar[Kind]  # of its scores
    attention_backends: ClassVar[tuple[str, ...]] = ("default",)  # what `training.attention` may name

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        self.vae_dtype = vae_dtype

    @classmethod
    @abstractmethod
    def preflight(cls, config: ModelConfig) -> None:
        """Check, before anything loads, that `config.pretrained` is something this family can load.

        Raises:
            ConfigError: it is not.
        """

    @abstractmethod
    def load(self, *parts: str) -> None:
        """Bring parts ("network"; for images also "encoders", "decoder") into memory; those already there stay."""

    @abstractmethod
    def unload(self, *parts: str) -> None:
        """Drop parts from memory."""

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The network that is trained."""


class EncodingFamily(Family):
    """A model that is trained on pairs of images: what the readers, the cache and the uncached path ask of it.

    Images are encoded once, before training, into whatever the network takes ("latents").
    """

    resolution_step: ClassVar[int]  # image sides are multiples of this
    frame_step: ClassVar[int] = 0  # clips have 1 + a multiple of this many frames; 0: still images only
    resampling: ClassVar[Literal["bilinear", "bicubic"]] = "bilinear"  # how images are resized to the training size

    def park(self, *parts: str) -> None:
        """Free the device's memory of parts until they are loaded again. The base drops them."""
        self.unload(*parts)

    @classmethod
    def check_frames(cls, frames: int, setting: str = "data.num_frames") -> None:
        """Refuse a number of frames that the model has no latents for.

        Raises:
            ConfigError: with the nearest numbers that it has.
        """
        if frames == 1 or (frames > 1 and cls.frame_step and frames % cls.frame_step == 1):
            return
        if not cls.frame_step:
            raise ConfigError(f"{setting}: got {frames}; this family makes still images, expected 1")
        below = max(0, frames - 1) // cls.frame_step * cls.frame_step + 1
        near = f"{below} or {below + cls.frame_step}" if frames > 1 else "1"
        raise ConfigError(f"{setting}: got {frames}; expected 1 + a multiple of {cls.frame_step}, such as {near}")

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """What determines encoded images and prompts: ids or hashes of VAE, text encoders and tokenizers."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Text conditioning as the stock pipeline computes it; tensors of shape (len(prompts), ...)."""

    @abstractmethod
    def count_tokens(self, prompt: str) -> tuple[int, int]:
        """(tokens of the prompt, tokens the encoders can take); what is beyond is cut off."""

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Tensor:
        """RGB in [-1, 1], shape (B, 3, H, W), to scaled latents (B, C, h, w): the posterior mean, about unit variance.

        Families that make clips take (B, 3, F, H, W), too, and give (B, C, F', h, w); an image is a clip of one frame.
        """


class DenoisingFamily(EncodingFamily):
    """A diffusion or flow model: images become latents, and the network predicts what was added to them."""

    modality: ClassVar = "image"
    kind: ClassVar = Kind.BOUND
    unconditional: ClassVar[bool] = True  # False: distilled, without a branch for classifier-free guidance
    linspace_sigmas: ClassVar[bool] = False  # the stock pipeline gives its scheduler sigmas evenly spaced from 1
    timestep_sampling: ClassVar[Literal["uniform", "logit_normal"]] = "uniform"  # how the model was trained
    text_encoders: ClassVar[tuple[str, ...]] = ()  # parts that can be trained with the network

    @property
    def adapted(self) -> nn.Module:
        """What carries adapters: the network, or a `TextConditioned` of it and its text encoders."""
        return self.network

    def no_text_encoders(self) -> ConfigError:
        """What those get who ask a family without trainable text encoders for them."""
        return ConfigError(
            f"family {self.config.family!r} has no text encoders that can be trained; set lora.text_encoder_rank to 0"
        )

    def with_text_encoders(self) -> nn.Module:
        """Network and trainable text encoders as one module (`TextConditioned`), which from now on is `adapted`."""
        raise self.no_text_encoders()

    def tokenize(self, prompts: list[str], encoded: Conditioning) -> Conditioning:
        """Text conditioning with prompts as token ids, for text encoders that are trained; `encode_tokens` encodes it.

        Args:
            prompts: N of them.
            encoded: what `encode_prompts` says of them, of which stays what encoders say that cannot be trained.
        """
        raise self.no_text_encoders()

    def tokenize_negative(self, prompt: str, encoded: Conditioning) -> Conditioning:
        """The same of the unconditional branch, batch 1; `encoded` is what `encode_negative` says of it."""
        return self.tokenize([prompt], encoded)

    def encode_tokens(self, conditioning: Conditioning) -> Conditioning:
        """Conditioning as `predict` takes it: prompts that are token ids are encoded, with gradient.

        What is encoded already comes back as it is, which is all of it in families without trainable text encoders.
        """
        return conditioning

    @classmethod
    def check_guidance(cls, config: ModelConfig, scale: float, setting: str = "rollout.guidance_scale") -> None:
        """Refuse a guidance scale of training, as far as it is known before anything loads.

        Raises:
            ConfigError: the model cannot be sampled with it.
        """
        if scale != 1 and not cls.unconditional:
            raise ConfigError(
                f"{setting}: got {scale}; models of family {config.family!r} are distilled and have no "
                "unconditional branch; set it to 1"
            )

    def guide(self, conditioning: Conditioning, scale: float) -> tuple[Conditioning, float]:
        """Conditioning for a guidance scale, and the scale that remains for classifier-free guidance (1: none).

        For most models that is all of it; those that are told their scale carry it in the conditioning.

        Args:
            conditioning: merged text and image conditioning with a batch axis.
            scale: of guidance.
        """
        return conditioning, scale

    @property
    def frames_per_second(self) -> int:
        """How fast the clips play that it makes."""
        return 8

    @property
    @abstractmethod
    def schedule(self) -> Schedule:
        """The training noise schedule."""

    @abstractmethod
    def stock_scheduler(self) -> Any:
        """The model's own diffusers scheduler."""

    def encode_negative(self, prompt: str) -> Conditioning:
        """Text conditioning of the unconditional branch, batch 1."""
        return self.encode_prompts([prompt])

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents to RGB in [0, 1], shape (B, 3, H, W), of clips with F > 1 (B, 3, F, H, W), float32.

        Gradient flows to latents that ask for it, but for pixels that are cut to the range.
        """

    @staticmethod
    @abstractmethod
    def image_conditioning(
        original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
    ) -> Conditioning:
        """Per-image conditioning without a batch axis (SDXL's time ids); sizes are (height, width) in pixels."""

    @abstractmethod
    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's own prediction (see `schedule.prediction_type`), same shape as `x_t`.

        Args:
            network: `self.network` or a wrapper of it.
            x_t: noisy latents (B, C, ..., h, w).
            t: what the network is told (B,): `schedule.time(...)`, or a stock scheduler's timesteps.
            conditioning: merged text and image conditioning with a batch axis.
        """

    @abstractmethod
    def sample(
        self,
        conditioning: Conditioning,
        negative: Conditioning,
        noise: Tensor,
        sampling: SamplingConfig,
        *,
        around: Around = nullcontext,
    ) -> Tensor:
        """Images from noise through the stock pipeline, as `decode_latents` gives them, on the CPU.

        Args:
            conditioning: of B prompts, without image conditioning.
            negative: of the unconditional branch, batch 1 or B.
            noise: standard normal latents (B, C, ..., h, w), float32.
            sampling: steps, guidance, scheduler.
            around: makes the context in which the stock pipeline is called, such as `NegativeGuidance`.
        """

    @abstractmethod
    def sample_latents(
        self,
        conditioning: Conditioning,
        negative: Conditioning,
        noise: Tensor,
        sampling: SamplingConfig,
        *,
        around: Around = nullcontext,
    ) -> Tensor:
        """As `sample`, but the scaled latents before they are decoded."""

    @abstractmethod
    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """(C, ..., h, w) of the latents of an image, or of a clip of so many frames, of that size in pixels."""

    @abstractmethod
    def pipeline(self) -> Any:
        """A stock diffusers pipeline over the loaded parts (loads all)."""


def load_family(
    config: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype = torch.float32,
) -> Family:
    """The family object of a config, checked but with no part loaded yet.

    Raises:
        ConfigError: no such family, or nothing loadable.
    """
    from diffalign import plugins

    cls: type[Family] = plugins.find("families", config.family)
    cls.preflight(config)
    return cls(config, device=device, dtype=dtype, vae_dtype=vae_dtype)
