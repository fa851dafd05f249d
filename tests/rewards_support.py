"""Pictures for the tests of rewards, and the checks that every reward of pictures has to pass."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.rewards import Reward, score

_FILE = """
import torch
from diffalign.rewards import Reward

class {name}(Reward):
    "{title}"
    range = (-10.0, 10.0)
    unit = "mean over channels and places"
    differentiable = {differentiable}
    weights = None
    licence = "Apache-2.0"
    gap = "none"

    def __init__(self, device="cpu", dtype=None):
        pass

    def __call__(self, images, prompts, metadata=None):
        {score}
"""
_BRIGHT = "return images.mean((1, 2, 3))"
_SOFT = """factor = torch.tensor([1.0 + len(prompt) / 50 for prompt in prompts])
        return (factor[:, None, None, None] * images).sin().mean((1, 2, 3))"""


def write_bright(folder: Path) -> str:
    """The file of a reward that likes bright pictures."""
    return _write(folder / "bright.py", "Bright", "How bright a picture is.", _BRIGHT)


def write_soft(folder: Path, *, differentiable: bool = True) -> str:
    """The file of a smooth reward that is another for every prompt."""
    stem = "soft" if differentiable else "hard"
    return _write(folder / f"{stem}.py", "Soft", "A sine of the pixels.", _SOFT, differentiable=differentiable)


def _write(file: Path, name: str, title: str, score: str, *, differentiable: bool = True) -> str:
    file.write_text(_FILE.format(name=name, title=title, differentiable=differentiable, score=score))
    return str(file)


def pictures(n: int = 4, height: int = 40, width: int = 40) -> Tensor:
    """Smooth random pictures on the 8-bit grid, (n, 3, height, width)."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    return (nn.functional.interpolate(coarse, (height, width), mode="bilinear") * 255).round() / 255


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def enlarge(model: nn.Module, factor: float = 4.0) -> None:
    """Larger weights than the initial ones, so that pictures and prompts matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor) if parameter.ndim > 1 else None


def check_batches(reward: Reward, prompts: list[str], atol: float = 1e-3) -> None:
    """A batch gets the scores of its pictures one by one, in any order."""
    images = pictures(len(prompts))
    together = score(reward, images, prompts)
    assert together.dtype == torch.float32
    assert together.std() > 10 * atol
    assert torch.allclose(together, score(reward, images, prompts, batch_size=1), atol=atol)
    order = list(range(len(prompts)))[::-1]
    permuted = score(reward, images[order], [prompts[i] for i in order])
    assert torch.allclose(permuted, together[order], atol=atol)


def check_gradient(reward: Reward, prompts: list[str], step: float = 0.01, rel: float = 0.02) -> None:
    """Gradient to the pixels by finite differences along it, without the 8-bit rounding, which would make steps."""
    images = (pictures(len(prompts), 30, 30) * 0.6 + 0.2).requires_grad_()
    (rounded,) = torch.autograd.grad(score(reward, images, prompts).sum(), images)
    assert rounded.abs().amax((0, 2, 3)).min() > 0  # all three channels, straight through the rounding
    reward.eight_bit = False  # type: ignore[attr-defined]
    try:
        (gradient,) = torch.autograd.grad(score(reward, images, prompts).sum(), images)
        direction = nn.functional.normalize(gradient.flatten(), dim=0).view_as(gradient)
        with torch.no_grad():
            up, down = (score(reward, images + s * direction, prompts).sum() for s in (step, -step))
        assert float((up - down) / (2 * step)) == pytest.approx(float((gradient * direction).sum()), rel=rel)
    finally:
        reward.eight_bit = True  # type: ignore[attr-defined]
