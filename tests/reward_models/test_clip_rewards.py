"""CLIP score, PickScore and the aesthetic head on tiny random towers saved in the hub's layout."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import transforms
from transformers import CLIPConfig, CLIPModel

from diffalign import rewards
from diffalign.errors import ConfigError
from diffalign.rewards import Reward, RewardError, score
from diffalign.world.bases import build_tokenizer
from reward_models import aesthetic
from reward_models.aesthetic import Aesthetic, read_head
from reward_models.clip_score import ClipScore
from reward_models.pickscore import PickScore

GOLDEN = Path(__file__).parent.parent / "golden" / "laion_aesthetic_v1.npz"
WIDTH = 16
PROMPTS = ["a red circle", "two blue squares", "a red circle", "three green triangles on a black background"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = build_tokenizer()
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config=tower | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 20},
            vision_config=tower | {"image_size": 24, "patch_size": 8},
            projection_dim=WIDTH,
        )
    )
    with torch.no_grad():  # larger weights than the initial ones, so that pictures and prompts matter
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else None
    folder = tmp_path_factory.mktemp("clip") / "owner" / "tiny-clip"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_head(path: Path, width: int = WIDTH) -> nn.Sequential:
    """A head in the v2 file's layout: five linear layers with dropout between."""
    sizes = (width, 64, 32, 16, 8, 1)
    linear = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    drop = nn.Dropout(0.2)
    layers = nn.Sequential(linear[0], drop, linear[1], drop, linear[2], drop, linear[3], linear[4])
    torch.save({f"layers.{key}": value for key, value in layers.state_dict().items()}, path)
    return layers.eval()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Sequential]:
    path = tmp_path_factory.mktemp("head") / "head.pth"
    torch.manual_seed(1)
    return path, random_head(path)


@pytest.fixture(scope="module", params=["clip_score", "pickscore", "aesthetic"])
def reward(request: pytest.FixtureRequest, clip_folder: Path, head) -> Reward:
    if request.param == "aesthetic":
        return Aesthetic(head=head[0], clip=clip_folder)
    return rewards.load(f"{request.param}:{clip_folder}")


def pictures(n: int = 4, side: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    return (nn.functional.interpolate(coarse, (side, side), mode="bilinear") * 255).round() / 255


def by_hand(clip_folder: Path, images: Tensor) -> tuple[Tensor, Tensor, CLIPModel]:
    """Embeddings through Pillow and the plain model."""
    transform = transforms.Compose(
        [
            transforms.ToPILImage(),
            transforms.Resize(24, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(24),
            transforms.ToTensor(),
            transforms.Normalize(rewards.CLIP_MEAN, rewards.CLIP_STD),
        ]
    )
    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokens = build_tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(pixel_values=torch.stack([transform(image) for image in images]), **tokens)
    return output.image_embeds, output.text_embeds, model  # both normalised


def test_clip_score_is_a_hundred_cosines(clip_folder: Path):
    image, text, _ = by_hand(clip_folder, pictures())
    got = score(ClipScore(model=clip_folder), pictures(), PROMPTS)
    assert torch.allclose(got, 100 * (image * text).sum(1), atol=0.3)
    assert got.std() > 1  # far above the tolerance: a double rescale or a mixed-up order would show


def test_pickscore_is_the_scaled_cosine(clip_folder: Path):
    image, text, model = by_hand(clip_folder, pictures())
    scale = model.logit_scale.exp().item()
    assert scale != pytest.approx(100, abs=1)
    got = score(PickScore(model=clip_folder), pictures(), PROMPTS)
    assert torch.allclose(got, scale * (image * text).sum(1), atol=0.05)


def test_aesthetic_is_the_heads_answer_to_the_unit_embedding(clip_folder: Path, head):
    image, _, _ = by_hand(clip_folder, pictures())
    with torch.no_grad():
        wanted = head[1](image)[:, 0]
    reward = Aesthetic(head=head[0], clip=clip_folder)
    assert torch.allclose(score(reward, pictures(), PROMPTS), wanted, atol=3e-3)
    assert torch.equal(score(reward, pictures(), PROMPTS), score(reward, pictures(), ["x"] * 4))


def test_batch_equals_one_by_one(reward: Reward):
    together = score(reward, pictures(), PROMPTS)
    assert together.dtype == torch.float32
    assert torch.allclose(together, score(reward, pictures(), PROMPTS, batch_size=1), atol=1e-3)
    order = [2, 0, 3, 1]
    permuted = score(reward, pictures()[order], [PROMPTS[i] for i in order])
    assert torch.allclose(permuted, together[order], atol=1e-3)


def test_gradient_to_pixels_by_finite_differences(reward: Reward):
    """Along the gradient, without the 8-bit rounding, which would make steps of the score."""
    images = pictures(2, side=30) * 0.6 + 0.2
    reward.eight_bit = False  # type: ignore[attr-defined]
    try:
        images.requires_grad_()
        (gradient,) = torch.autograd.grad(score(reward, images, PROMPTS[:2]).sum(), images)
        assert gradient.abs().amax((0, 2, 3)).min() > 0
        direction = torch.nn.functional.normalize(gradient.flatten(), dim=0).view_as(gradient)
        step = 0.01
        with torch.no_grad():
            up, down = (score(reward, images + s * direction, PROMPTS[:2]).sum() for s in (step, -step))
        assert float((up - down) / (2 * step)) == pytest.approx(float((gradient * direction).sum()), rel=0.02)
    finally:
        reward.eight_bit = True  # type: ignore[attr-defined]


def test_gradient_survives_the_rounding(reward: Reward):
    images = (pictures(2, side=30) * 0.6 + 0.2).requires_grad_()
    (gradient,) = torch.autograd.grad(score(reward, images, PROMPTS[:2]).sum(), images)
    assert gradient.abs().amax((0, 2, 3)).min() > 0
    assert all(not p.requires_grad for p in reward.towers.model.parameters())  # type: ignore[attr-defined]


def test_scores_stay_float32_under_autocast_and_in_bfloat16_towers(clip_folder: Path):
    plain = score(ClipScore(model=clip_folder), pictures(), PROMPTS)
    low = ClipScore("cpu", torch.bfloat16, clip_folder)
    assert low.towers.model.dtype == torch.bfloat16
    got = score(low, pictures(), PROMPTS)
    assert got.dtype == torch.float32
    assert torch.allclose(got, plain, atol=3)
    assert not torch.equal(got, got.bfloat16().float())  # not on the coarse grid of bfloat16


def test_long_prompts_are_cut_not_refused(clip_folder: Path):
    long = "a red circle left of " * 30
    reward = ClipScore(model=clip_folder)
    got = score(reward, pictures(2), [long, long + " a blue square"])
    alone = score(reward, pictures(2)[:1], [long])
    assert torch.allclose(got[:1], alone, atol=1e-3)


def test_weights_folder_of_the_environment(clip_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(rewards.WEIGHTS_VARIABLE, str(clip_folder.parent.parent))
    assert torch.equal(
        score(ClipScore(model="owner/tiny-clip"), pictures(), PROMPTS),
        score(ClipScore(model=clip_folder), pictures(), PROMPTS),
    )


def test_missing_weights_say_what_to_do(tmp_path: Path):
    with pytest.raises(RewardError, match=r"cannot be loaded: .*DIFFALIGN_WEIGHTS") as caught:
        rewards.load(f"clip_score:{tmp_path}/nowhere")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- aesthetic heads


def test_folded_head_equals_its_layers(tmp_path: Path):
    torch.manual_seed(3)
    layers = random_head(tmp_path / "head.pth", width=768).double()
    weight, bias = read_head(tmp_path / "head.pth")
    unit = nn.functional.normalize(torch.randn(50, 768, dtype=torch.float64), dim=1)
    with torch.no_grad():
        assert torch.allclose(unit @ weight + bias, layers(unit)[:, 0], atol=1e-9)


def test_v1_head_gives_the_published_scores(tmp_path: Path):
    golden = np.load(GOLDEN)
    state = {name: torch.from_numpy(golden[name]) for name in ("weight", "bias")}
    torch.save(state, tmp_path / "v1.pth")
    weight, bias = read_head(tmp_path / "v1.pth")
    scores = torch.from_numpy(golden["embeddings"]).double() @ weight + bias
    wanted = [-2.45791, -0.13786, 1.89511, 3.58493, 5.09973, 6.47010, 7.78699, 9.04800, 10.22641, 11.30443]
    assert scores.tolist() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.skipif(
    not (Path(os.environ.get(rewards.WEIGHTS_VARIABLE, "")) / aesthetic.HEAD_FILE).is_file(),
    reason=f"needs the published head file {aesthetic.HEAD_FILE} in the folder $DIFFALIGN_WEIGHTS",
)
def test_v2_head_gives_the_published_scores():
    weight, bias = read_head(aesthetic.find_head())
    scores = torch.from_numpy(np.load(GOLDEN)["embeddings"]).double() @ weight + bias
    wanted = [1.65548, 2.35927, 3.06982, 3.67245, 4.23801, 4.70102, 5.07305, 5.36536, 5.57666, 5.74676]
    assert scores.tolist() == pytest.approx(wanted, abs=1e-4)


def test_head_with_activations_is_refused(tmp_path: Path):
    torch.save(
        {f"layers.{i}.{k}": torch.zeros(1) for i in (0, 3, 6, 9, 11) for k in ("weight", "bias")}, tmp_path / "h"
    )
    with pytest.raises(RewardError, match=r"layers at \[0, 3, 6, 9, 11\]; expected \[0, 2, 4, 6, 7\]"):
        read_head(tmp_path / "h")


def test_pickled_code_is_not_run(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(RewardError, match="cannot be read") as caught:
        read_head(tmp_path / "evil.pth")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_head_of_another_width_is_refused(clip_folder: Path, tmp_path: Path):
    random_head(tmp_path / "wide.pth", width=768)
    with pytest.raises(RewardError, match=r"reads 768 numbers.*into 16"):
        Aesthetic(head=tmp_path / "wide.pth", clip=clip_folder)


def test_missing_head_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(rewards.WEIGHTS_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="does not exist"):
        rewards.find("aesthetic:nowhere.pth")
