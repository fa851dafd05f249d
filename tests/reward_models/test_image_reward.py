"""ImageReward on tiny random weights under the published names, against a plain BLIP written out here."""

import math
from pathlib import Path

import pytest
import torch
from rewards_support import check_batches, check_gradient, enlarge, pictures, to_pil
from torch import Tensor, nn
from torchvision import transforms
from transformers import BertTokenizer

from diffalign import rewards
from diffalign.errors import ConfigError
from diffalign.rewards import RewardError, score
from reward_models import image_reward
from reward_models.image_reward import ImageReward

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *["a", "red", "two", "blue", "circle", "squares", "green", "triangles", "on", "black"],
]
PROMPTS = ["a red circle", "Two blue squares", "a red circle on black", "green triangles " * 40]
D, H, WIDE = 24, 32, 64  # widths of vision and text, and of their inner layers
VISION = {
    "hidden_size": D,
    "intermediate_size": WIDE,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
TEXT = {
    "vocab_size": len(WORDS) + 2,
    "hidden_size": H,
    "intermediate_size": WIDE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "layer_norm_eps": 1e-12,
}


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = logits + (1 - mask[:, None, None].float()) * -10000.0
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Holder(nn.Module):
    """A module with the given children."""

    def __init__(self, /, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class Vision(nn.Module):
    """The original's vit.py, by its names."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, D))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, D))
        self.patch_embed = Holder(proj=nn.Conv2d(3, D, 16, 16))
        self.blocks = nn.ModuleList(
            Holder(
                norm1=nn.LayerNorm(D, 1e-6),
                attn=Holder(qkv=nn.Linear(D, 3 * D), proj=nn.Linear(D, D)),
                norm2=nn.LayerNorm(D, 1e-6),
                mlp=Holder(fc1=nn.Linear(D, WIDE), fc2=nn.Linear(WIDE, D)),
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(D, 1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = x + block.attn.proj(attend(*block.attn.qkv(block.norm1(x)).chunk(3, -1), 3))
            x = x + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(x))))
        return self.norm(x)


def attention(width: int) -> Holder:
    inner = {"query": nn.Linear(H, H), "key": nn.Linear(width, H), "value": nn.Linear(width, H)}
    return Holder(self=Holder(**inner), output=Holder(dense=nn.Linear(H, H), LayerNorm=nn.LayerNorm(H, 1e-12)))


class Text(nn.Module):
    """The original's med.py in its mode `multimodal`, by its names."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Holder(
            word_embeddings=nn.Embedding(TEXT["vocab_size"], H),
            position_embeddings=nn.Embedding(40, H),
            LayerNorm=nn.LayerNorm(H, 1e-12),
        )
        self.embeddings.register_buffer("position_ids", torch.arange(40)[None])
        layers = (
            Holder(
                attention=attention(H),
                crossattention=attention(D),
                intermediate=Holder(dense=nn.Linear(H, WIDE)),
                output=Holder(dense=nn.Linear(WIDE, H), LayerNorm=nn.LayerNorm(H, 1e-12)),
            )
            for _ in range(2)
        )
        self.encoder = Holder(layer=nn.ModuleList(layers))

    def forward(self, ids: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
        emb = self.embeddings
        x = emb.LayerNorm(emb.word_embeddings(ids) + emb.position_embeddings(torch.arange(ids.shape[1])))
        for layer in self.encoder.layer:
            for block, seen, seen_mask in ((layer.attention, None, mask), (layer.crossattention, patches, None)):
                own = block.get_submodule("self")
                other = x if seen is None else seen
                mixed = attend(own.query(x), own.key(other), own.value(other), 4, seen_mask)
                x = block.output.LayerNorm(block.output.dense(mixed) + x)
            inner = nn.functional.gelu(layer.intermediate.dense(x))
            x = layer.output.LayerNorm(layer.output.dense(inner) + x)
        return x


class Original(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blip = Holder(
            visual_encoder=Vision(), text_encoder=Text(), vision_proj=nn.Linear(D, 8), text_proj=nn.Linear(H, 8)
        )
        drop = nn.Dropout(0.2)
        layers = [nn.Linear(H, 1024), drop, nn.Linear(1024, 128), drop, nn.Linear(128, 64), drop, nn.Linear(64, 16)]
        self.mlp = Holder(layers=nn.Sequential(*layers, nn.Linear(16, 1)))

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.blip.text_encoder(ids, mask, self.blip.visual_encoder(pixels))
        return (self.mlp.layers(hidden[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Original]:
    torch.manual_seed(0)
    model = Original().eval()
    enlarge(model, 2)
    folder = tmp_path_factory.mktemp("image_reward")
    torch.save(model.state_dict(), folder / "ImageReward.pt")
    (folder / "bert").mkdir()
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder / "bert")
    return folder / "ImageReward.pt", folder / "bert", model


@pytest.fixture(scope="module")
def reward(published) -> ImageReward:
    return ImageReward(checkpoint=published[0], tokenizer=published[1], vision=VISION, text=TEXT)


def by_hand(words: Path, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    transform = transforms.Compose(
        [
            transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(rewards.CLIP_MEAN, rewards.CLIP_STD),
        ]
    )
    pixels = torch.stack([transform(to_pil(image)) for image in pictures(len(prompts), 50, 41)])
    tokens = BertTokenizer.from_pretrained(words)(
        prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    assert (tokens.input_ids[:, 0] == WORDS.index("[CLS]")).all()
    return pixels, tokens.input_ids, tokens.attention_mask


def test_score_is_the_originals(published, reward: ImageReward):
    _, words, model = published
    with torch.no_grad():
        wanted = model(*by_hand(words, PROMPTS))
    got = score(reward, pictures(4, 50, 41), PROMPTS)
    assert wanted.std() > 0.1
    assert torch.allclose(got, wanted, atol=0.05 * float(wanted.std()))  # Pillow's rounding


def test_port_is_the_original_on_the_same_pixels(published, reward: ImageReward):
    """Without resizing nothing is rounded: names, attention masks, norms and head agree to float precision."""
    _, words, model = published
    images = pictures(4, 32, 32)
    _, ids, mask = by_hand(words, PROMPTS)
    with torch.no_grad():
        wanted = model(rewards.normalise(images, rewards.CLIP_MEAN, rewards.CLIP_STD), ids, mask)
    assert torch.allclose(score(reward, images, PROMPTS), wanted, atol=1e-4)


def test_full_size_has_the_published_tensors():
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    with torch.device("meta"):
        vision = BlipVisionModel(BlipVisionConfig(**image_reward.VISION))
        config = BlipTextConfig(**image_reward.TEXT, encoder_hidden_size=1024, is_decoder=True)
        text = BlipTextModel(config, add_pooling_layer=False)
    assert len(vision.state_dict()) == 294
    assert len(text.state_dict()) == 316
    assert sum("crossattention" in key for key in text.state_dict()) == 120


def test_first_token_reads_the_whole_prompt_and_the_picture(reward: ImageReward):
    images = pictures(1).expand(3, -1, -1, -1)
    a, b, c = score(reward, images, ["a red circle", "a red squares", "a red circle"]).tolist()
    assert a != pytest.approx(b, abs=1e-3)
    assert a == pytest.approx(c, abs=1e-5)
    assert float(score(reward, pictures(2)[1:], ["a red circle"])) != pytest.approx(a, abs=1e-3)


def test_batches_and_gradient(reward: ImageReward):
    check_batches(reward, PROMPTS, atol=1e-4)
    check_gradient(reward, PROMPTS[:2])


def test_special_tokens_of_blip_have_their_places(reward: ImageReward):
    assert reward.tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [len(WORDS), len(WORDS) + 1]


def test_what_is_not_the_published_file_is_refused(published, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"image_reward: checkpoint 'nowhere.pt' does not exist"):
        rewards.find("image_reward:nowhere.pt")
    state = torch.load(published[0])
    state["blip.visual_encoder_m.norm.weight"] = torch.zeros(D)
    torch.save(state, tmp_path / "more.pt")
    with pytest.raises(RewardError, match=r"has unknown 1 .*'blip.visual_encoder_m.norm.weight'"):
        ImageReward(checkpoint=tmp_path / "more.pt", tokenizer=published[1], vision=VISION, text=TEXT)
    with pytest.raises(RewardError, match=r"image_reward: '.*nobert' cannot be loaded: .*DIFFALIGN_WEIGHTS") as caught:
        ImageReward(checkpoint=published[0], tokenizer=tmp_path / "nobert", vision=VISION, text=TEXT)
    assert "\n" not in str(caught.value)
