"""CLIP-I, DINO and the lambda-harmonic mean on tiny random backbones."""

from pathlib import Path

import pytest
import torch
from rewards_support import check_batches, check_gradient, enlarge, pictures, to_pil
from torchvision import transforms
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from diffalign import rewards
from diffalign.errors import ConfigError
from diffalign.rewards import RewardError, score
from diffalign.world.bases import build_tokenizer
from reward_models.subject_similarity import SubjectSimilarity

PROMPTS = ["a red circle", "two blue squares", "a red circle", "three green triangles"]
BICUBIC = transforms.InterpolationMode.BICUBIC


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, tokenizer = tmp_path_factory.mktemp("subject"), build_tokenizer()
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    text = tower | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 20}
    sizes = {"image_size": 28, "patch_size": 14}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=tower | sizes, projection_dim=16))
    dino = ViTModel(ViTConfig(**tower, **sizes))  # with the pooling layer that the hub's config implies
    for name, model in (("clip", clip), ("dino", dino)):
        enlarge(model, 3)
        model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "clip")
    (folder / "references").mkdir()
    for i, image in enumerate(pictures(2, 50, 41).flip(-1)):
        to_pil(image).save(folder / "references" / f"{i}.png")
    return {name: folder / name for name in ("clip", "dino", "references")}


def make(folders: dict[str, Path], what: str) -> SubjectSimilarity:
    return SubjectSimilarity(what=f"{what}:{folders['references']}", clip=folders["clip"], dino=folders["dino"])


def by_hand(folders: dict[str, Path], method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cosines to the references and cosines to the prompts, through Pillow and the plain models."""
    side, mean, std = (
        (32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        if method == "dino"
        else (28, rewards.CLIP_MEAN, rewards.CLIP_STD)
    )

    def transform(side: int, mean: tuple, std: tuple) -> transforms.Compose:
        steps = [transforms.Resize(side, BICUBIC), transforms.CenterCrop(28), transforms.ToTensor()]
        return transforms.Compose([*steps, transforms.Normalize(mean, std)])

    clip, dino = CLIPModel.from_pretrained(folders["clip"]).eval(), ViTModel.from_pretrained(folders["dino"]).eval()
    ours = [to_pil(image) for image in pictures(4, 40, 52)]
    refs = [to_pil(image) for image in pictures(2, 50, 41).flip(-1)]
    with torch.no_grad():
        own, other = (torch.stack([transform(side, mean, std)(image) for image in images]) for images in (ours, refs))
        if method == "dino":
            a, b = (dino(pixel_values=x).last_hidden_state[:, 0] for x in (own, other))
        else:
            a, b = (clip.get_image_features(pixel_values=x).pooler_output for x in (own, other))
        pixels = torch.stack([transform(28, rewards.CLIP_MEAN, rewards.CLIP_STD)(image) for image in ours])
        output = clip(pixel_values=pixels, **build_tokenizer()(PROMPTS, padding=True, return_tensors="pt"))
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    return (a @ b.T).mean(1), (output.image_embeds * output.text_embeds).sum(1)


@pytest.mark.parametrize("method", ["clip_i", "dino"])
def test_score_is_the_mean_cosine_and_its_harmonic_mean(folders: dict[str, Path], method: str):
    subject, text = by_hand(folders, method)
    images = pictures(4, 40, 52)
    atol = 0.04 * float(subject.std())  # Pillow's rounding
    assert subject.std() > 0.01
    assert torch.allclose(score(make(folders, method), images, PROMPTS), subject, atol=atol)
    s_i, s_t = (subject + 1) / 2, (text + 1) / 2
    for share, wanted in ((0, s_t), (1, s_i), (0.3, 1 / (0.3 / (s_i + 1e-8) + 0.7 / (s_t + 1e-8)))):
        got = score(make(folders, f"{method}@{share}"), images, PROMPTS)
        assert torch.allclose(got, wanted, atol=atol)


def test_references_of_the_metadata_come_first(folders: dict[str, Path]):
    reward = make(folders, "clip_i")
    images = pictures(3)
    files = sorted(folders["references"].iterdir())
    own = [{"references": [image]} for image in images]
    assert score(reward, images, PROMPTS[:3], own).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    mixed = [{"references": [str(files[0])]}, {"references": [to_pil(images[1]), images[1]]}, {}]
    got = score(reward, images, PROMPTS[:3], mixed)
    assert float(got[1]) == pytest.approx(1, abs=1e-5)
    assert float(got[2]) == pytest.approx(float(score(reward, images, PROMPTS[:3])[2]), abs=1e-5)
    assert float(got[0]) != pytest.approx(float(score(reward, images, PROMPTS[:3])[0]), abs=1e-4)


@pytest.mark.parametrize("what", ["clip_i", "dino@0.3"])
def test_batches_and_gradient(folders: dict[str, Path], what: str):
    reward = make(folders, what)
    check_batches(reward, PROMPTS, atol=1e-5)
    check_gradient(reward, PROMPTS[:2])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("clip", r"method 'clip' not found.* Available: clip_i, dino"),
        ("dino@much", r"lambda 'much' is not a number; write dino@0.3"),
        ("dino@1.5", r"lambda 1.5 is outside \[0, 1\]"),
        ("clip_i:nowhere", r"folder of references 'nowhere' does not exist"),
        ("clip_i:EMPTY", r"holds no pictures"),
    ],
)
def test_bad_arguments_are_refused_before_weights_load(tmp_path: Path, argument: str, message: str):
    with pytest.raises(ConfigError, match=message):
        rewards.load(f"subject_similarity:{argument.replace('EMPTY', str(tmp_path))}")


def test_missing_and_odd_references_are_refused(folders: dict[str, Path], tmp_path: Path):
    reward = SubjectSimilarity(clip=folders["clip"])
    (tmp_path / "text.png").write_text("no picture")
    for metadata, message in (
        (None, r"no reference pictures; give metadata"),
        ([{"references": []}], r"no reference pictures"),
        ([{"references": "dog.png"}], r"references are str; a list of pictures expected"),
        ([{"references": [3]}], r"a reference is int; a path, a Pillow picture or a tensor expected"),
        ([{"references": [torch.ones(3, 8, 8) * 255]}], r"floats in \[0, 1\]"),
        ([{"references": [str(tmp_path / "text.png")]}], r"text.png' cannot be read"),
    ):
        with pytest.raises(RewardError, match=message):
            score(reward, pictures(1), PROMPTS[:1], metadata)


def test_identity_changes_with_the_references(folders: dict[str, Path], tmp_path: Path):
    to_pil(pictures(1)[0]).save(tmp_path / "0.png")
    before = SubjectSimilarity(what=f"clip_i:{tmp_path}", clip=folders["clip"]).identity()
    assert before == SubjectSimilarity(what=f"clip_i:{tmp_path}", clip=folders["clip"]).identity()
    to_pil(pictures(1)[0]).save(tmp_path / "1.png")
    assert SubjectSimilarity(what=f"clip_i:{tmp_path}", clip=folders["clip"]).identity() != before
