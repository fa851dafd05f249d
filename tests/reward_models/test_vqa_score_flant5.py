"""VQAScore with a tiny random CLIP-FlanT5."""

import json
import string
from pathlib import Path

import pytest
import torch
from PIL import Image
from rewards_support import check_batches, check_gradient, enlarge, from_pil, pictures, to_pil
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration, T5Tokenizer

from diffalign import rewards
from diffalign.rewards import RewardError, score
from reward_models.vqa_score_flant5 import VQAScoreFlanT5, pad_to_square

PROMPTS = ["a red circle", "two blue squares left of a tree", "a red circle", "three"]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flant5")
    pieces = [(c, -5.0) for c in string.printable if c.strip()]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), ("▁Yes", -1.0), *pieces]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": len(tokenizer) + 5}
    model = T5ForConditionalGeneration(
        T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)
    )
    model.lm_head.weight = nn.Parameter(torch.randn(sizes["vocab_size"], 16) / 4)  # not tied, as in Flan-T5
    model.mm_projector = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 16))
    model.vision_tower = nn.Linear(1, 1)  # a copy of CLIP in the checkpoint is not read
    model.save_pretrained(folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"model_type": "clip_t5"}))
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    tower = CLIPVisionModel(CLIPVisionConfig(**vision, image_size=28, patch_size=14))
    enlarge(tower, 3)
    tower.save_pretrained(folder / "tower")
    return folder


def make(folder: Path, model: str = "model") -> VQAScoreFlanT5:
    return VQAScoreFlanT5(model=folder / model, tokenizer=folder / "tokenizer", tower=folder / "tower")


@pytest.fixture(scope="module")
def reward(folder: Path) -> VQAScoreFlanT5:
    return make(folder)


def by_hand(folder: Path, images: torch.Tensor) -> list[float]:
    """One picture and prompt at a time, the pieces put together as t2v_metrics does."""
    from safetensors.torch import load_file

    state = load_file(folder / "model" / "model.safetensors")
    tokenizer, tower = (
        T5Tokenizer.from_pretrained(folder / "tokenizer"),
        CLIPVisionModel.from_pretrained(folder / "tower").eval(),
    )
    model = T5ForConditionalGeneration.from_pretrained(folder / "model").eval()
    w = [state[f"mm_projector.{i}.{kind}"] for i in (0, 2) for kind in ("weight", "bias")]
    answer = [tokenizer.convert_tokens_to_ids("▁Yes"), tokenizer.eos_token_id]
    found = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        picture = to_pil(image)
        side = max(picture.size)
        square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in rewards.CLIP_MEAN))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        pixels = rewards.normalise(
            from_pil(square.resize((28, 28), resample=3))[None], rewards.CLIP_MEAN, rewards.CLIP_STD
        )
        text = f'{SYSTEM} USER: <image>\nDoes this figure show "{prompt}"? Please answer yes or no. ASSISTANT: '
        with torch.no_grad():
            hidden = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
            projected = nn.functional.gelu(hidden @ w[0].T + w[1]) @ w[2].T + w[3]
            pieces = [model.shared(torch.tensor(tokenizer(chunk).input_ids)) for chunk in text.split("<image>")]
            embeds = torch.cat([pieces[0], projected, pieces[1]])[None]
            start = torch.tensor([[0, answer[0]]])  # the decoder reads the start token and what it has said
            decoded = model.decoder(start, encoder_hidden_states=model.encoder(inputs_embeds=embeds).last_hidden_state)
            logits = decoded.last_hidden_state[0] @ state["lm_head.weight"][: len(tokenizer)].T
        found.append(float((-nn.functional.cross_entropy(logits, torch.tensor(answer))).exp()))
    return found


@pytest.mark.parametrize(("height", "width"), [(40, 40), (33, 50), (60, 41)])
def test_score_is_the_originals(folder: Path, reward: VQAScoreFlanT5, height: int, width: int):
    images = pictures(4, height, width)
    wanted = torch.tensor(by_hand(folder, images))
    assert wanted.std() > 0.003 * wanted.mean()
    assert torch.allclose(score(reward, images, PROMPTS), wanted, atol=0.05 * float(wanted.std()))


def test_padding_is_centred():
    wide = pad_to_square(pictures(1, 4, 7))
    assert wide.shape == (1, 3, 7, 7)
    assert torch.equal(wide[..., 1:5, :], pictures(1, 4, 7))
    assert (wide[0, :, 0, 0] * 255).round().tolist() == [122, 116, 104]


def test_batches_and_gradient(reward: VQAScoreFlanT5):
    check_batches(reward, PROMPTS, atol=1e-6)
    check_gradient(reward, PROMPTS[:2], rel=0.05)


def test_weights_without_a_projector_are_refused(folder: Path, tmp_path: Path):
    plain = T5ForConditionalGeneration.from_pretrained(folder / "model")
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(RewardError, match=r"has 4 missing keys, such as 'mm_projector.0.bias'"):
        VQAScoreFlanT5(model=tmp_path / "plain", tokenizer=folder / "tokenizer", tower=folder / "tower")
    with pytest.raises(RewardError, match=r"vqa_score_flant5: '.*nowhere' cannot be loaded: .*DIFFALIGN_WEIGHTS"):
        make(folder, "nowhere")
