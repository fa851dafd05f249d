"""The aesthetic predictor v2.5 on a tiny random SigLIP."""

import itertools
import os
from pathlib import Path

import pytest
import torch
from rewards_support import check_batches, check_gradient, enlarge, from_pil, pictures, to_pil
from torch import nn
from transformers import SiglipConfig, SiglipModel

from diffalign import rewards
from diffalign.errors import ConfigError
from diffalign.rewards import RewardError, score
from reward_models import aesthetic_v2_5
from reward_models.aesthetic_v2_5 import AestheticV25, read_head

WIDTH = 32
PROMPTS = ["unread"] * 4


def random_head(path: Path, width: int = WIDTH) -> nn.Sequential:
    """A head in the published layout, in its bfloat16."""
    linear = [nn.Linear(a, b) for a, b in itertools.pairwise((width, 64, 32, 16, 8, 1))]
    drop = nn.Dropout(0.5)
    layers = nn.Sequential(*[part for layer in linear[:-1] for part in (layer, drop)], linear[-1]).bfloat16()
    enlarge(layers, 2.5)
    torch.save({f"scoring_head.{key}": value for key, value in layers.state_dict().items()}, path)
    return layers.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, SiglipModel, nn.Sequential]:
    """Head file and tower folder, the latter with the text side, as on the hub."""
    folder = tmp_path_factory.mktemp("aesthetic_v2_5")
    tower = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    text = tower | {"vocab_size": 10, "max_position_embeddings": 8, "projection_size": WIDTH}
    vision = tower | {"image_size": 28, "patch_size": 14}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    enlarge(model, 1.5)
    model.save_pretrained(folder / "siglip")
    return folder / "head.pth", folder / "siglip", model, random_head(folder / "head.pth")


@pytest.fixture(scope="module")
def reward(files) -> AestheticV25:
    return AestheticV25(head=files[0], tower=files[1])


@pytest.mark.parametrize(("height", "width"), [(40, 40), (37, 61), (28, 28), (20, 24)])
def test_score_is_the_heads_answer_to_the_unit_embedding(files, reward: AestheticV25, height: int, width: int):
    """Squashed by Pillow, scaled to [-1, 1], through the whole model's picture side and the layers one by one."""
    _, _, model, head = files
    images = pictures(4, height, width)
    pixels = torch.stack([2 * from_pil(to_pil(image).resize((28, 28), resample=3)) - 1 for image in images])
    with torch.no_grad():
        embedding = model.vision_model(pixel_values=pixels).pooler_output
        wanted = head.float()(embedding / embedding.norm(dim=-1, keepdim=True))[:, 0]
    got = score(reward, images, PROMPTS)
    assert wanted.std() > 0.01
    assert torch.allclose(got, wanted, atol=0.05 * float(wanted.std()))


def test_batches_gradient_and_prompts(reward: AestheticV25):
    check_batches(reward, PROMPTS, atol=1e-4)
    check_gradient(reward, PROMPTS[:2])
    assert torch.equal(score(reward, pictures(), PROMPTS), score(reward, pictures(), ["other"] * 4))


@pytest.mark.skipif(
    not (Path(os.environ.get(rewards.WEIGHTS_VARIABLE, "")) / aesthetic_v2_5.HEAD_FILE).is_file(),
    reason=f"needs the published head file {aesthetic_v2_5.HEAD_FILE} in the folder $DIFFALIGN_WEIGHTS",
)
def test_published_head_is_the_documented_map():
    weight, bias = read_head(Path(rewards.local_weights(aesthetic_v2_5.HEAD_FILE)))
    assert weight.shape == (1152,)
    assert float(bias) == pytest.approx(1.93904, abs=1e-4)
    assert float(weight.norm()) == pytest.approx(25.4523, abs=1e-3)
    assert AestheticV25.range == pytest.approx((float(bias - weight.norm()), float(bias + weight.norm())), abs=0.1)


def test_nothing_is_downloaded_and_other_heads_are_refused(files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(rewards.WEIGHTS_VARIABLE, raising=False)
    with pytest.raises(RewardError, match=r"is not at hand; its licence is AGPL-3.0.*DIFFALIGN_WEIGHTS"):
        rewards.load("aesthetic_v2_5")
    with pytest.raises(ConfigError, match=r"aesthetic_v2_5: head file 'nowhere.pth' does not exist"):
        rewards.find("aesthetic_v2_5:nowhere.pth")
    torch.save({"weight": torch.zeros(1, WIDTH), "bias": torch.zeros(1)}, tmp_path / "v1.pth")
    with pytest.raises(RewardError, match=r"has bias, weight, .*; scoring_head.0.weight, "):
        AestheticV25(head=tmp_path / "v1.pth", tower=files[1])
    random_head(tmp_path / "wide.pth", 48)
    with pytest.raises(RewardError, match=r"reads 48 numbers, .* gives 32"):
        AestheticV25(head=tmp_path / "wide.pth", tower=files[1])
