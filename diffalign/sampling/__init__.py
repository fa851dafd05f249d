"""Sampling for grids, evaluation and `generate`: fixed prompts; noise depends on (seed, prompt index, repeat) alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffalign import sides, user_branches
from diffalign.adapters import adapters_off, is_adapted
from diffalign.config import SamplingConfig
from diffalign.families import DECODER, ENCODERS, Around, Conditioning, DenoisingFamily
from diffalign.schedules import generator_for


class Sampler:
    """Images or clips of a fixed list of prompts. Prompts are encoded once, when it is made, or kept as tokens.

    Args:
        family: its encoders are loaded and unloaded again here; its network must be in memory when sampling.
        prompts: the list; a prompt's noise depends on its place in it.
        sampling: steps, guidance, scheduler, batch size.
        resolution: image side in pixels where `sampling` names none.
        autocast: the mixed-precision context of training.
        frames: of a clip, where `sampling` names none; 1 for still images.
        tokens: keep prompts as token ids, which are encoded whenever images are sampled, by text encoders with adapters.
        negative: makes the context in which an adapter acts in the negative branch of guidance alone, and not in the
            positive one, or in the two branches two adapters (`diffalign.sides`); None: adapters act everywhere.
    """

    def __init__(
        self,
        family: DenoisingFamily,
        prompts: Sequence[str],
        sampling: SamplingConfig,
        resolution: int,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        frames: int = 1,
        *,
        tokens: bool = False,
        negative: Around | None = None,
    ) -> None:
        self.in_negative = negative
        self.users: Tensor | None = None  # embeddings (P, d), where prompts are of users
        self.family, self.prompts, self.sampling, self.autocast = family, list(prompts), sampling, autocast
        self.side = (sampling.resolution or resolution) // family.resolution_step * family.resolution_step
        family.load(ENCODERS)
        unique = list(dict.fromkeys(self.prompts))
        encoded: dict[str, Conditioning] = {}
        for start in range(0, len(unique), 16):
            chunk = unique[start : start + 16]
            batch = family.encode_prompts(chunk)
            if tokens:
                batch = family.tokenize(chunk, batch)
            encoded |= {p: {k: v[i : i + 1].cpu() for k, v in batch.items()} for i, p in enumerate(chunk)}
        self.conditioning = [encoded[prompt] for prompt in self.prompts]
        self.negative = family.encode_negative(sampling.negative_prompt)
        if tokens:
            self.negative = family.tokenize_negative(sampling.negative_prompt, self.negative)
        self.latent_shape = family.latent_shape(self.side, self.side, sampling.num_frames or frames)
        family.unload(ENCODERS)

    def noise(self, index: int, repeat: int, seed: int) -> Tensor:
        """Initial standard normal latents (C, ..., h, w) of a prompt and a repeat, float32 on the CPU."""
        return torch.randn(self.latent_shape, generator=generator_for(seed, f"prompt {index}", repeat))

    def images(
        self,
        indices: Sequence[int],
        *,
        seed: int,
        repeats: int = 1,
        adapters: bool = True,
        around: Around = nullcontext,
        progress: Callable[[int], None] = lambda n: None,
    ) -> Tensor:
        """Sample `repeats` images of each prompt.

        Args:
            indices: which prompts.
            seed: of the noise.
            repeats: images per prompt.
            adapters: False samples the base.
            around: beside `adapters`, makes the context of a call of the stock pipeline, such as `NegativeGuidance`.
            progress: called with the number of images finished in each batch.

        Returns:
            uint8 RGB on the CPU, as a PNG would hold it (`to_float` gives [0, 1]), shape
            (len(indices) * repeats, 3, H, W), of clips (..., 3, F, H, W), a prompt's repeats together.
        """
        both = sides.of(self.family.network) if adapters else None
        if self.in_negative is not None and adapters:
            adapters, around = both is not None, self.in_negative
        self.family.load(DECODER)
        jobs = [(i, j) for i in indices for j in range(repeats)]
        done = []
        apart = nullcontext() if both is None else both.separated()
        with torch.no_grad(), apart, sampling_mode(self.family.adapted, adapters=adapters), self.autocast():
            negative = self.family.encode_tokens(self.negative)
            for start in range(0, len(jobs), self.sampling.batch_size):
                chunk = jobs[start : start + self.sampling.batch_size]
                conditioning = {k: torch.cat([self.conditioning[i][k] for i, _ in chunk]) for k in self.conditioning[0]}
                noise = torch.stack([self.noise(i, j, seed) for i, j in chunk])
                texts = self.family.encode_tokens(conditioning)
                with self._users([i for i, _ in chunk]):
                    images = self.family.sample(texts, negative, noise, self.sampling, around=around)
                done.append((images * 255).round().to(torch.uint8))
                progress(len(chunk))
        if self.family.device.type != "cpu":
            self.family.park(DECODER)  # the device's memory belongs to training
        return torch.cat(done)

    def _users(self, rows: Sequence[int]) -> AbstractContextManager[object]:
        """The users of prompts, where there are any."""
        branch = user_branches.of(self.family.network)
        if branch is None:
            return nullcontext()
        return branch.given(None if self.users is None else self.users[list(rows)])


def to_float(images: Tensor) -> Tensor:
    """uint8 RGB to float32 in [0, 1]."""
    return images.float() / 255


def save_png(image: Tensor, path: Path, frames_per_second: int = 8) -> None:
    """Write one uint8 image of shape (3, H, W).

    Of a clip (3, F, H, W) the first, the middle and the last frame side by side, and all of it as an animation in a WebP
    file beside it.
    """
    if image.ndim == 3:
        Image.fromarray(image.movedim(0, -1).numpy()).save(path)  # CHW -> HWC
        return
    count = image.shape[1]
    frames = [Image.fromarray(frame) for frame in image.permute(1, 2, 3, 0).contiguous().numpy()]  # CFHW -> FHWC
    save_png(torch.cat([image[:, i] for i in (0, count // 2, count - 1)], dim=-1), path)
    duration = round(1000 / frames_per_second)
    frames[0].save(path.with_suffix(".webp"), save_all=True, append_images=frames[1:], duration=duration, loop=0)


@contextmanager
def sampling_mode(network: torch.nn.Module, *, adapters: bool) -> Iterator[None]:
    """Evaluation mode (no dropout), with the adapters on or off; everything is put back afterwards."""
    was_training = network.training
    network.eval()
    try:
        with nullcontext() if adapters or not is_adapted(network) else adapters_off(network):
            yield
    finally:
        network.train(was_training)
