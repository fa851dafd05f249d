"""MPS on tiny random weights under the published names, against the plain formulas written out here."""

import math
from pathlib import Path

import pytest
import torch
from rewards_support import check_batches, check_gradient, enlarge, pictures, to_pil
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu, softmax
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from diffalign import rewards
from diffalign.errors import ConfigError
from diffalign.rewards import RewardError, score
from diffalign.world.bases import build_tokenizer
from reward_models import mps
from reward_models.mps import MPS

PROMPTS = ["a red circle", "two blue squares", "a red circle on a blue background", "three green triangles " * 20]
D, HEADS, HEAD = 16, 2, 8
TOKENIZER = build_tokenizer()
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
}
TOWERS = {
    "projection_dim": D,
    "text_config": TOWER | {"vocab_size": len(TOKENIZER), "max_position_embeddings": 20},
    "vision_config": TOWER | {"image_size": 24, "patch_size": 8},
}
CROSS = {"layers": 2, "heads": HEADS, "head_width": HEAD}


def published_state() -> dict[str, Tensor]:
    """The names and shapes of Kwai-Kolors/MPS, with its constants, as the port stores them."""
    clip = CLIPModel(CLIPConfig(**TOWERS))
    enlarge(clip)
    state = {f"mps.model.{key}": value for key, value in clip.state_dict().items()}
    state["mps.model.text_model.embeddings.position_ids"] = torch.arange(20)[None]
    inner, wide = HEADS * HEAD, 4 * D
    for i in range(2):
        cross, own = (f"mps.cross_model.layers.{i}.{j}.fn." for j in (0, 1))
        shapes = {
            f"{cross}to_q.weight": (inner, D),
            f"{cross}to_kv.weight": (2 * HEAD, D),
            f"{cross}to_out.weight": (D, inner),
            f"{cross}ff.0.weight": (2 * wide, D),
            f"{cross}ff.2.weight": (D, wide),
            f"{own}fused_attn_ff_proj.weight": (inner + 2 * HEAD + 2 * wide, D),
            f"{own}attn_out.weight": (D, inner),
            f"{own}ff_out.1.weight": (D, wide),
        }
        state |= {key: torch.randn(shape) / math.sqrt(shape[1]) for key, shape in shapes.items()}
        for name in (cross, own):
            state |= {f"{name}norm.weight": torch.rand(D) + 0.5, f"{name}norm.bias": torch.zeros(D)}
        state[f"{own}rotary_emb.inv_freq"] = 1.0 / (10000 ** (torch.arange(0, HEAD, 2).float() / HEAD))
    return {key: value.clone() for key, value in state.items()}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Tensor]]:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    state, folder = published_state(), tmp_path_factory.mktemp("mps")
    save_file(state, folder / "model.safetensors")
    TOKENIZER.save_pretrained(folder / "tokenizer")
    return folder / "model.safetensors", folder / "tokenizer", state


@pytest.fixture(scope="module")
def reward(published) -> MPS:
    return MPS(checkpoint=published[0], tokenizer=published[1], towers=TOWERS, cross=CROSS)


def swiglu(x: Tensor, into: Tensor, out: Tensor) -> Tensor:
    a, gate = (x @ into.T).chunk(2, -1)
    return (silu(gate) * a) @ out.T


def turn(x: Tensor, frequencies: Tensor) -> Tensor:
    """Each pair (x_i, x_{i + d/2}) is turned by position times frequency i, as complex numbers."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.exp(
        1j * torch.arange(len(x))[:, None] * frequencies[None].to(torch.complex64)
    )
    return torch.cat([turned.real, turned.imag], -1)


def by_hand(state: dict[str, Tensor], image: Tensor, prompt: str, threshold: float) -> float:
    """One picture and one prompt, head by head."""
    clip = CLIPModel(CLIPConfig(**TOWERS)).eval()
    clip.load_state_dict(
        {key[10:]: value for key, value in state.items() if key.startswith("mps.model.") and "position_ids" not in key}
    )

    def tokens(text: str) -> tuple[Tensor, Tensor]:
        ids = TOKENIZER([text], padding="max_length", truncation=True, max_length=20, return_tensors="pt").input_ids
        hidden = clip.text_projection(clip.text_model(input_ids=ids).last_hidden_state)[0]
        return hidden, hidden[ids[0].tolist().index(TOKENIZER.eos_token_id)]

    pixels = rewards.preprocess(image[None], 24)
    x = clip.visual_projection(clip.vision_model(pixel_values=pixels).last_hidden_state)[0]
    text, end = tokens(prompt)
    condition, _ = tokens(mps.CONDITION)
    best = (text @ condition.T).amax(1)
    mask = torch.where(best / best.max() > threshold, 0.0, -math.inf)
    for i in range(2):
        cross, own = (
            {key[len(n) :]: v for key, v in state.items() if key.startswith(n)}
            for n in (f"mps.cross_model.layers.{i}.{j}.fn." for j in (0, 1))
        )
        n = layer_norm(x, (D,), cross["norm.weight"])
        k, v = (text @ cross["to_kv.weight"].T).chunk(2, -1)
        q = n @ cross["to_q.weight"].T
        heads = [softmax(q[:, h * HEAD : (h + 1) * HEAD] @ k.T / math.sqrt(HEAD) + mask, -1) @ v for h in range(HEADS)]
        x = x + torch.cat(heads, -1) @ cross["to_out.weight"].T + swiglu(n, cross["ff.0.weight"], cross["ff.2.weight"])
        n = layer_norm(x, (D,), own["norm.weight"])
        fused, inner = own["fused_attn_ff_proj.weight"], HEADS * HEAD
        q, k, v = n @ fused[:inner].T, n @ fused[inner : inner + HEAD].T, n @ fused[inner + HEAD : inner + 2 * HEAD].T
        k, f = turn(k, own["rotary_emb.inv_freq"]), own["rotary_emb.inv_freq"]
        heads = [
            softmax(turn(q[:, h * HEAD : (h + 1) * HEAD], f) @ k.T / math.sqrt(HEAD), -1) @ v for h in range(HEADS)
        ]
        x = (
            x
            + torch.cat(heads, -1) @ own["attn_out.weight"].T
            + swiglu(n, fused[inner + 2 * HEAD :], own["ff_out.1.weight"])
        )
    return float(clip.logit_scale.exp() * torch.cosine_similarity(x[0], end, dim=0))


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.3, 0.01, 0.8])
def test_score_is_the_formula(published, threshold: float):
    made = MPS(checkpoint=published[0], tokenizer=published[1], towers=TOWERS, cross=CROSS, threshold=threshold)
    wanted = [
        by_hand(published[2], image, prompt, threshold) for image, prompt in zip(pictures(), PROMPTS, strict=True)
    ]
    assert score(made, pictures(), PROMPTS).tolist() == pytest.approx(wanted, abs=1e-3)
    assert torch.tensor(wanted).std() > 0.1


@pytest.mark.parametrize(("height", "width"), [(40, 59), (59, 40), (41, 41), (20, 33)])
def test_pictures_reach_the_tower_as_in_the_original(reward: MPS, height: int, width: int):
    """The Pillow processor of transformers; 40 x 59 becomes 24 x 35, of which 5.5 pixels are cut on each side."""
    seen: list[Tensor] = []
    hook = lambda module, args, kwargs: seen.append(kwargs["pixel_values"])  # noqa: E731
    handle = reward.clip.vision_model.register_forward_pre_hook(hook, with_kwargs=True)
    images = pictures(3, height, width)
    score(reward, images, PROMPTS[:3])
    handle.remove()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    wanted = processor(images=[to_pil(image) for image in images], return_tensors="pt").pixel_values
    apart = ((seen[0] - wanted) * torch.tensor(rewards.CLIP_STD).view(3, 1, 1) * 255).abs()
    assert apart.max() < 2.1  # steps of the 8-bit grid
    assert (apart > 1.1).float().mean() < 1e-3


def test_the_threshold_masks_some_words(published, reward: MPS):
    loose = MPS(checkpoint=published[0], tokenizer=published[1], towers=TOWERS, cross=CROSS, threshold=-1e9)
    assert not torch.allclose(score(reward, pictures(), PROMPTS), score(loose, pictures(), PROMPTS), atol=1e-3)
    assert mps.THRESHOLD == 0.3


def test_batches_and_gradient(reward: MPS):
    check_batches(reward, PROMPTS, atol=1e-3)
    check_gradient(reward, PROMPTS[:2], step=0.003)


def test_a_state_dict_of_the_original_module_is_read(published, reward: MPS, tmp_path: Path):
    torch.save({key.removeprefix("mps."): value for key, value in published[2].items()}, tmp_path / "mps.pt")
    made = MPS(checkpoint=tmp_path / "mps.pt", tokenizer=published[1], towers=TOWERS, cross=CROSS)
    assert torch.equal(score(made, pictures(), PROMPTS), score(reward, pictures(), PROMPTS))


def test_full_size():
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(**mps.TOWERS))
        block = mps._Block(1024, mps.CROSS["heads"], mps.CROSS["head_width"])
    assert sum(p.numel() for p in clip.parameters()) == pytest.approx(986.1e6, rel=1e-4)
    assert block.own.into[0].weight.shape == (1024 + 64 + 64 + 8192, 1024)


def test_pickled_modules_and_other_weights_are_refused(published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"mps: weights 'nowhere.pt' do not exist"):
        rewards.find("mps:nowhere.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(RewardError, match="holds more than tensors"):
        MPS(checkpoint=tmp_path / "module.pth", tokenizer=published[1], towers=TOWERS, cross=CROSS)
    torch.save({k: v for k, v in published[2].items() if "to_kv" not in k}, tmp_path / "less.pt")
    with pytest.raises(RewardError, match=r"lacks 2 of .*'cross.0.text.into.1.weight'"):
        MPS(checkpoint=tmp_path / "less.pt", tokenizer=published[1], towers=TOWERS, cross=CROSS)
    monkeypatch.setenv(rewards.WEIGHTS_VARIABLE, str(tmp_path))
    with pytest.raises(RewardError, match=r"model.safetensors is not at hand.*pickled module"):
        rewards.load("mps")
