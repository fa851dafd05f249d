"""HPS v2.0 and v2.1 on tiny random towers of open_clip, saved as the published checkpoints are."""

from pathlib import Path

import open_clip
import pytest
import torch
from rewards_support import check_batches, check_gradient, enlarge, pictures, to_pil
from torchvision import transforms

from diffalign import rewards
from diffalign.errors import ConfigError
from diffalign.rewards import RewardError, score
from reward_models import hpsv2
from reward_models.hpsv2 import HPSv2
from reward_models.hpsv2_1 import HPSv21

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 24, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
PROMPTS = ["a red circle", "two blue squares", "a red circle", "three green triangles " * 20]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, open_clip.CLIP]:
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY).eval()
    enlarge(model, 3)
    path = tmp_path_factory.mktemp("hps") / "HPS.pt"
    torch.save({"epoch": 1, "state_dict": model.state_dict() | {"attn_mask": torch.zeros(20, 20)}}, path)
    return path, model


@pytest.fixture(scope="module")
def reward(published) -> HPSv2:
    return HPSv2(checkpoint=published[0], architecture=TINY)


@pytest.mark.parametrize(("height", "width"), [(40, 40), (37, 52), (61, 40), (20, 20), (24, 24)])
def test_preprocessing_is_the_originals(height: int, width: int):
    """To a tensor first, then resized: unlike Pillow's, the result overshoots [0, 1]."""
    transform = transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Resize(24, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(24),
            transforms.Normalize(rewards.CLIP_MEAN, rewards.CLIP_STD),
        ]
    )
    images = pictures(3, height, width)
    wanted = torch.stack([transform(to_pil(image)) for image in images])
    assert torch.allclose(hpsv2.preprocess(images, 24), wanted, atol=1e-5)


def test_score_is_the_models_cosine(published, reward: HPSv2):
    _, model = published
    pixels = hpsv2.preprocess(pictures(), 24)
    tokens = open_clip.get_tokenizer("ViT-H-14", context_length=20)(PROMPTS)
    with torch.no_grad():
        image, text, _ = model(pixels, tokens)  # both normalised
    got = score(reward, pictures(), PROMPTS)
    assert torch.allclose(got, (image * text).sum(1), atol=1e-5)
    assert got.std() > 0.01


def test_versions_are_two_files_of_one_architecture(published):
    assert (HPSv2.file, HPSv21.file) == ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt")
    assert HPSv21.file in str(HPSv21.weights)
    full = open_clip.get_model_config(hpsv2.ARCHITECTURE)
    with torch.device("meta"):
        model = open_clip.CLIP(**full)
    assert len(model.state_dict()) == 686
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(986.1e6, rel=1e-4)
    newer = HPSv21(checkpoint=published[0], architecture=TINY)
    assert torch.equal(
        score(newer, pictures(), PROMPTS), score(HPSv2(checkpoint=published[0], architecture=TINY), pictures(), PROMPTS)
    )


def test_batches_and_gradient(reward: HPSv2):
    check_batches(reward, PROMPTS, atol=1e-5)
    check_gradient(reward, PROMPTS[:2])
    assert all(not p.requires_grad for p in reward.towers.parameters())


def test_scores_stay_float32_with_bfloat16_towers(published, reward: HPSv2):
    got = score(HPSv2("cpu", torch.bfloat16, published[0], architecture=TINY), pictures(), PROMPTS)
    assert got.dtype == torch.float32
    assert torch.allclose(got, score(reward, pictures(), PROMPTS), atol=0.05)
    assert not torch.equal(got, got.bfloat16().float())


def test_weights_of_the_environment(published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(rewards.WEIGHTS_VARIABLE, str(tmp_path))
    with pytest.raises(RewardError, match=r"hpsv2_1: HPS_v2.1_compressed.pt is not at hand.*DIFFALIGN_WEIGHTS"):
        rewards.load("hpsv2_1")
    for place in (tmp_path / HPSv2.file, tmp_path / hpsv2.REPOSITORY / HPSv21.file):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(published[0])
    assert isinstance(HPSv2(architecture=TINY), HPSv2)
    assert isinstance(HPSv21(architecture=TINY), HPSv2)


def test_other_weights_and_other_files_are_refused(published, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"hpsv2: checkpoint 'nowhere.pt' does not exist"):
        rewards.find("hpsv2:nowhere.pt")
    state = torch.load(published[0])["state_dict"]
    torch.save(state | {"predictor.weight": torch.zeros(1)}, tmp_path / "more.pt")
    with pytest.raises(RewardError, match=r"has unknown 1 of \d+ tensors, such as 'predictor.weight'"):
        HPSv2(checkpoint=tmp_path / "more.pt", architecture=TINY)
    torch.save({k: v for k, v in state.items() if k != "visual.proj"}, tmp_path / "less.pt")
    with pytest.raises(RewardError, match=r"lacks 1 of \d+ tensors, such as 'visual.proj'"):
        HPSv2(checkpoint=tmp_path / "less.pt", architecture=TINY)
    torch.save(state | {"visual.proj": torch.zeros(3, 3)}, tmp_path / "shape.pt")
    with pytest.raises(RewardError, match=r"other shapes of 1 .*'visual.proj'"):
        HPSv2(checkpoint=tmp_path / "shape.pt", architecture=TINY)
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(RewardError, match=r"text.pt cannot be read") as caught:
        HPSv2(checkpoint=tmp_path / "text.pt", architecture=TINY)
    assert "\n" not in str(caught.value)


def test_pickled_code_is_not_run(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": {"visual.proj": Evil()}}, tmp_path / "evil.pt")
    with pytest.raises(RewardError, match="holds more than tensors"):
        HPSv2(checkpoint=tmp_path / "evil.pt", architecture=TINY)
    assert not (tmp_path / "ran").exists()
