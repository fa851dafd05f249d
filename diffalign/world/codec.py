"""A closed-form autoencoder for the tiny world: patches in, principal components out.

`PatchVAE` has the interface of diffusers' `AutoencoderKL` as far as the stock pipelines use it, so that the tiny bases
are ordinary diffusers folders. Encoding is exact linear algebra (pixel-unshuffle by 4, one 1x1 convolution); a trained
autoencoder of this size would need far longer and reproduce colours worse.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

PATCH = 4


class PointDistribution:
    """A latent distribution with no spread: `sample` and `mode` agree."""

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """The mean; `generator` is accepted for the interface's sake."""
        return self.mean

    def mode(self) -> Tensor:
        return self.mean


class PatchVAE(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Patch PCA with AutoencoderKL's interface.

    Pixels are RGB in [-1, 1], shape (B, 3, H, W) with H and W multiples of 4; latents (B, C, H/4, W/4), about unit scale.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        block_out_channels: tuple[int, ...] = (8, 8, 8),  # the pipelines read 2 ** (len - 1) = 4 as the scale factor
        force_upcast: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.to_latent = nn.Conv2d(in_channels * PATCH**2, latent_channels, 1)
        self.to_patch = nn.Conv2d(latent_channels, in_channels * PATCH**2, 1)

    @torch.no_grad()
    def fit(self, images: Tensor, exponent: float = 0.75) -> PatchVAE:
        """Set the weights by an SVD over the patches of `images` (RGB in [-1, 1], shape (N, 3, H, W)).

        Args:
            images: training pictures.
            exponent: each component is divided by std ** exponent; 0 is plain PCA, 1 whitens.
        """
        patches_ND = nn.functional.pixel_unshuffle(images, PATCH).movedim(1, -1).flatten(0, -2)
        mean_D = patches_ND.mean(0)
        _, singular, components_DD = torch.linalg.svd((patches_ND - mean_D).double(), full_matrices=False)
        channels = self.to_latent.out_channels
        basis_CD = components_DD[:channels].float()
        # Fix the sign of each component, so that a rebuilt codec speaks the same latent language.
        basis_CD = basis_CD * basis_CD.gather(1, basis_CD.abs().argmax(1, keepdim=True)).sign()
        std_C = (singular[:channels] / patches_ND.shape[0] ** 0.5).float()
        scale_C = (std_C**exponent).view(-1, 1)
        self.to_latent.weight.copy_((basis_CD / scale_C)[..., None, None])
        assert self.to_latent.bias is not None, "made with a bias"
        assert self.to_patch.bias is not None, "made with a bias"
        self.to_latent.bias.copy_(-(basis_CD / scale_C) @ mean_D)
        self.to_patch.weight.copy_((basis_CD * scale_C).T[..., None, None])
        self.to_patch.bias.copy_(mean_D)
        return self

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[PointDistribution]:
        """Pixels to a (degenerate) latent distribution."""
        latents = self.to_latent(nn.functional.pixel_unshuffle(x, PATCH))
        distribution = PointDistribution(latents)
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents to pixels, not clamped."""
        pixels = nn.functional.pixel_shuffle(self.to_patch(z), PATCH)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)
