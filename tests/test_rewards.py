"""The reward contract: finding, checking at the border, and the transform shared by CLIP-type rewards."""

import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from diffalign import plugins, rewards
from diffalign.errors import ConfigError
from diffalign.rewards import Reward, RewardError, preprocess, score

FACTS = """range = (0.0, 1.0)
    unit = "mean brightness"
    differentiable = True
    weights = None
    licence = "Apache-2.0"
    gap = "none"
"""
FILE = f'''"""Brightness."""
from diffalign.rewards import Reward


class Brightness(Reward):
    """How bright a picture is."""

    {FACTS}
    def __init__(self, device="cpu", dtype=None):
        self.device = device

    def __call__(self, images, prompts, metadata=None):
        return images.mean((1, 2, 3))
'''


class Probe(Reward):
    """Answers what it is told to, and remembers what it was asked."""

    range = (0.0, 1.0)
    unit = "none"
    differentiable = True
    weights = None
    licence = "none"
    gap = "none"

    def __init__(self, answer=lambda images: images.mean((1, 2, 3))):
        self.answer, self.asked = answer, []

    def __call__(self, images, prompts, metadata=None):
        self.asked.append((images.shape[0], images.dtype, list(prompts), metadata))
        return self.answer(images)


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    path = tmp_path / "brightness.py"
    path.write_text(FILE)
    return path


# ---------------------------------------------------------------- finding


@pytest.mark.parametrize("name", plugins.names("rewards"))
def test_every_shipped_reward_states_its_facts(name: str):
    about = rewards.describe(name)
    assert about.name == name
    assert about.summary.endswith(".")
    assert about.range[0] < about.range[1]
    assert about.unit
    assert about.licence
    assert about.gap
    assert isinstance(about.differentiable, bool)
    assert about.weights is None or "@" in about.weights


def test_names_are_listed_without_importing():
    assert {"aesthetic", "clip_score", "pickscore", "world_taste", "world_verifier"} <= set(plugins.names("rewards"))


def test_user_file_is_loaded(user_file: Path):
    reward = rewards.load(str(user_file))
    images = torch.rand(3, 3, 8, 8)
    assert torch.allclose(score(reward, images, ["a"] * 3), images.mean((1, 2, 3)))
    assert rewards.describe(str(user_file)).summary == "How bright a picture is."


@pytest.mark.parametrize("fact", ["range", "unit", "differentiable", "weights", "licence", "gap"])
def test_missing_fact_is_named(tmp_path: Path, fact: str):
    lines = [line for line in FILE.splitlines() if not line.strip().startswith(f"{fact} =")]
    (tmp_path / "lazy.py").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=f"does not state its {fact};"):
        rewards.find(str(tmp_path / "lazy.py"))


def test_unknown_name_shows_the_nearest():
    with pytest.raises(ConfigError, match=r"'pickscor' not found; did you mean 'pickscore'\?.*aesthetic"):
        rewards.load("pickscor")


def test_argument_where_none_is_taken(user_file: Path):
    with pytest.raises(ConfigError, match="takes nothing after a colon"):
        rewards.find(f"{user_file}:loud")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("pickscore", ("pickscore", None)),
        ("world_taste:ada@0.3", ("world_taste", "ada@0.3")),
        ("clip_score:laion/CLIP-x", ("clip_score", "laion/CLIP-x")),
        ("dir/my.py", ("dir/my.py", None)),
        ("C:/dir/my.py:x", ("C:/dir/my.py", "x")),
    ],
)
def test_split_name(name: str, parts: tuple[str, str | None]):
    assert rewards.split_name(name) == parts


def test_shadowing_folder_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "reward_models").mkdir()
    (tmp_path / "reward_models" / "__init__.py").write_text("")
    for module in [m for m in sys.modules if m.partition(".")[0] == "reward_models"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        rewards.load("world_verifier")
    ours = Path(rewards.__file__).parent.parent / "reward_models"
    assert str(tmp_path / "reward_models") in str(caught.value)
    assert str(ours) in str(caught.value)


# ---------------------------------------------------------------- the border


def test_batches_come_back_in_order():
    images, probe = torch.rand(7, 3, 4, 4), Probe()
    prompts = [f"p{i}" for i in range(7)]
    result = score(probe, images, prompts, [{"i": i} for i in range(7)], batch_size=3)
    assert torch.allclose(result, images.mean((1, 2, 3)))
    assert result.dtype == torch.float32
    assert [(n, p) for n, _, p, _ in probe.asked] == [(3, prompts[:3]), (3, prompts[3:6]), (1, prompts[6:])]
    assert [m for *_, part in probe.asked for m in part] == [{"i": i} for i in range(7)]


def test_half_precision_and_overshoot_are_normalised():
    probe = Probe(lambda images: images.amax((1, 2, 3)))
    assert score(probe, torch.full((1, 3, 4, 4), 1.0005), ["p"]).tolist() == [1.0]
    score(probe, torch.rand(1, 3, 4, 4).bfloat16(), ["p"])
    assert probe.asked[1][1] == torch.float32


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 4, 4, 3), r"shape \(2, 4, 4, 3\); RGB \(B, 3, H, W\)"),
        (torch.rand(3, 4, 4), "shape"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "divide by 255"),
        (torch.rand(2, 3, 4, 4) * 2 - 1, r"lie in \[-.*x / 2 \+ 1 / 2"),
        (torch.full((2, 3, 4, 4), 200.0), r"lie in \[200, 200\]"),
        (torch.full((2, 3, 4, 4), float("nan")), "lie in"),
    ],
)
def test_wrong_pictures_are_refused_by_name(images: Tensor, message: str):
    with pytest.raises(RewardError, match=message) as caught:
        score(Probe(), images, ["a", "b"])
    assert "test_rewards" in str(caught.value)


def test_counts_must_match():
    images = torch.rand(2, 3, 4, 4)
    with pytest.raises(RewardError, match="3 prompts for 2 images"):
        score(Probe(), images, ["a", "b", "c"])
    with pytest.raises(RewardError, match="one text for 2 images"):
        score(Probe(), images, "ab")
    with pytest.raises(RewardError, match="1 metadata entries for 2 images"):
        score(Probe(), images, ["a", "b"], [{}])


def test_wrong_shape_and_nan_name_the_prompts():
    images = torch.rand(3, 3, 4, 4)
    with pytest.raises(RewardError, match=r"shape \(3, 1\) instead of \(3,\).*'cat'"):
        score(Probe(lambda x: x.mean((1, 2, 3))[:, None]), images, ["cat", "dog", "cow"])
    with pytest.raises(RewardError, match="shape"):
        score(Probe(lambda x: x.mean()), images, ["cat", "dog", "cow"])

    def broken(x: Tensor) -> Tensor:
        values = x.mean((1, 2, 3))
        values[1] = math.nan
        return values

    with pytest.raises(RewardError, match="NaN or infinity") as caught:
        score(Probe(broken), images, ["cat", "dog", "cow"])
    assert "'dog'" in str(caught.value)
    assert "'cat'" not in str(caught.value)


def test_gradient_flows_or_is_refused():
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    score(Probe(), images, ["a", "b"], batch_size=1).sum().backward()
    assert torch.allclose(images.grad, torch.full_like(images, 1 / 48))
    blind = Probe()
    blind.differentiable = False  # type: ignore[misc]
    with pytest.raises(RewardError, match="not differentiable"):
        score(blind, images, ["a", "b"])
    with torch.no_grad():
        assert score(blind, images, ["a", "b"]).shape == (2,)


def test_no_pictures_no_scores():
    assert score(Probe(), torch.rand(0, 3, 4, 4), []).shape == (0,)


# ---------------------------------------------------------------- the transform


def picture(height: int, width: int) -> Tensor:
    """Smooth areas, hard edges, fine texture and noise, on the 8-bit grid: (3, H, W)."""
    y, x = torch.linspace(0, 1, height).view(-1, 1), torch.linspace(0, 1, width).view(1, -1)
    base = torch.stack([x.expand(height, width), y.expand(height, width), (x - y).abs()])
    base = base + ((x * 7).floor() + (y * 5).floor()) % 2 * 0.4 + 0.2 * torch.sin(x * 300) * torch.cos(y * 260)
    base = base + 0.1 * torch.randn(3, height, width, generator=torch.Generator().manual_seed(0))
    return (base.clamp(0, 1) * 255).round() / 255


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().movedim(0, -1).numpy())


@pytest.mark.parametrize("shape", [(512, 512), (224, 224), (300, 401), (401, 300), (64, 48), (32, 32), (225, 224)])
def test_preprocessing_matches_pillow(shape: tuple[int, int]):
    original = transforms.Compose(
        [
            transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(rewards.CLIP_MEAN, rewards.CLIP_STD),
        ]
    )
    image = picture(*shape)
    wanted = original(to_pil(image))
    (got,) = preprocess(image[None], crop_offset=round)
    std = torch.tensor(rewards.CLIP_STD).view(3, 1, 1)
    apart = ((got - wanted) * std * 255).abs()  # in steps of the 8-bit grid
    assert got.shape == (3, 224, 224)
    assert apart.max() < 1.01
    assert apart.mean() < 0.02


def test_crop_offset_follows_transformers_by_default():
    """A border of three pixels: transformers takes one from the left (down from 1.5), torchvision two (to even)."""
    wide = torch.arange(227.0).view(1, 1, 1, 227).expand(1, 3, 224, 227) / 255
    left = [
        round(float(preprocess(wide, crop_offset=o)[0, 0, 0, 0] * rewards.CLIP_STD[0] + rewards.CLIP_MEAN[0]) * 255)
        for o in (math.floor, round)
    ]
    assert left == [1, 2]


def test_rounding_passes_the_gradient_straight_through():
    image = (picture(96, 96)[None] * 0.5 + 0.25 + 1e-3).requires_grad_()  # far from saturation
    weight = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    gradients = []
    for eight_bit in (True, False):
        (gradient,) = torch.autograd.grad((preprocess(image, 48, eight_bit=eight_bit) * weight).sum(), image)
        gradients.append(gradient)
    assert torch.allclose(*gradients, atol=1e-5)
    assert gradients[0].abs().amax((0, 2, 3)).min() > 0


def test_cosine_stays_float32_under_autocast():
    a, b = torch.randn(2, 5, 16)
    wanted = torch.nn.functional.cosine_similarity(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = rewards.cosine(a, b)
    assert got.dtype == torch.float32
    assert torch.allclose(got, wanted, atol=1e-6)


def test_local_weights_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert rewards.local_weights("owner/name") == "owner/name"
    monkeypatch.setenv(rewards.WEIGHTS_VARIABLE, str(tmp_path))
    assert rewards.local_weights("owner/name") == "owner/name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert rewards.local_weights("owner/name") == str(tmp_path / "owner" / "name")
