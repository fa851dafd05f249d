"""HPSv3 on a tiny random Qwen2-VL, saved under the published names."""

from pathlib import Path

import pytest
import torch
import vlm_support
from rewards_support import check_batches, check_gradient, enlarge, pictures, to_pil
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoProcessor, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

from diffalign import rewards
from diffalign.errors import ConfigError
from diffalign.rewards import RewardError, score
from reward_models import hpsv3
from reward_models.hpsv3 import HPSv3

PROMPTS = ["a red circle", "two {blue} squares left of a tree", "a red circle", "three"]
TEMPLATE = "\nRate this.  \nTextual prompt - {text_prompt}\n\n\n\nThe rating: <|Reward|>\n\nEND\n"
VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
PIXELS = 4 * 28 * 28


def names(state: dict[str, Tensor], *, old: bool) -> dict[str, Tensor]:
    """Those of transformers 4.45, or of 4.52 and later."""
    if not old:
        return {key: value.clone() for key, value in state.items()}
    return {
        key.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value.clone()
        for key, value in state.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` is what the hub has of Qwen2-VL, `old` and `new` are HPSv3 under both generations' names."""
    folder = tmp_path_factory.mktemp("hpsv3")
    torch.manual_seed(0)
    vlm_support.save(folder / "base", Qwen2VLForConditionalGeneration, Qwen2VLConfig, VISION)
    tokenizer = AutoProcessor.from_pretrained(folder / "base").tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder / "base")
    model.resize_token_embeddings(len(tokenizer))
    head = nn.Sequential(
        nn.Linear(32, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
    enlarge(head, 3)
    for name in ("old", "new"):
        (folder / name).mkdir()
        state = names(model.state_dict(), old=name == "old") | {f"rm_head.{k}": v for k, v in head.state_dict().items()}
        save_file(state, folder / name / "HPSv3.safetensors")
        (folder / name / "template.txt").write_text(TEMPLATE, newline="")
    return folder


@pytest.fixture(scope="module")
def reward(folder: Path) -> HPSv3:
    return HPSv3(folder=folder / "old", base=folder / "base", pixels=PIXELS)


def by_hand(folder: Path, images: Tensor) -> list[float]:
    """The stock model, processor and head, one picture at a time."""
    from safetensors.torch import load_file

    state = load_file(folder / "new" / "HPSv3.safetensors")
    processor = AutoProcessor.from_pretrained(folder / "base")
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder / "base")
    model.resize_token_embeddings(len(processor.tokenizer))
    model.load_state_dict({key: value for key, value in state.items() if not key.startswith("rm_head.")})
    model.eval()
    found = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        text += TEMPLATE.replace("{text_prompt}", prompt) + "<|im_end|>\n<|im_start|>assistant\n"
        inputs = processor(text=[text], images=[to_pil(image).resize((56, 56))], return_tensors="pt")
        with torch.no_grad():
            hidden = model.model(**inputs).last_hidden_state[0]
            at = inputs.input_ids[0].tolist().index(processor.tokenizer.convert_tokens_to_ids("<|Reward|>"))
            x = hidden[at]
            for i in (0, 3, 5):
                x = state[f"rm_head.{i}.weight"] @ x + state[f"rm_head.{i}.bias"]
                x = x.relu() if i < 5 else x
        found.append(float(x[0]))
    return found


@pytest.mark.parametrize("generation", ["old", "new"])
def test_score_is_the_heads_first_answer_at_its_token(folder: Path, generation: str):
    images = pictures(4, 64, 64)
    made = HPSv3(folder=folder / generation, base=folder / "base", pixels=PIXELS)
    wanted = torch.tensor(by_hand(folder, images))
    assert wanted.std() > 0.1
    assert torch.allclose(score(made, images, PROMPTS), wanted, atol=0.05 * float(wanted.std()))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 90), (56, 56), (200, 120)])
def test_patches_are_the_processors(height: int, width: int):
    images = pictures(2, height, width)
    size = hpsv3.fit(height, width, PIXELS)
    processor = Qwen2VLImageProcessorPil(do_resize=False)
    resized = [to_pil(image).resize((size[1], size[0])) for image in images]
    wanted = processor(images=resized, return_tensors="pt")
    patches, grid = hpsv3.to_patches(images, PIXELS)
    assert wanted.image_grid_thw.tolist() == [[1, *grid]] * 2
    steps = (patches - wanted.pixel_values).abs() * 255 * min(rewards.CLIP_STD)
    assert steps.max() < 2.1  # of the 8-bit grid; Pillow rounds after each of its two passes
    assert (steps > 1.1).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("height", "width", "wanted"),
    [(448, 448, (448, 448)), (1024, 1024, (448, 448)), (100, 100, (448, 448)), (1024, 512, (616, 308))],
)
def test_sizes_are_those_of_qwen_vl_utils(height: int, width: int, wanted: tuple[int, int]):
    assert hpsv3.fit(height, width, hpsv3.PIXELS) == wanted


def test_batches_and_gradient(reward: HPSv3):
    check_batches(reward, PROMPTS, atol=1e-3)
    check_gradient(reward, PROMPTS[:2], step=0.002, rel=0.05)


def test_identity_holds_the_instruction(reward: HPSv3):
    assert repr(TEMPLATE) in reward.identity()


def test_a_prompt_may_not_hold_the_token(reward: HPSv3):
    with pytest.raises(RewardError, match=r"a prompt holds <\|Reward\|>"):
        score(reward, pictures(1), ["say <|Reward|>"])


def test_what_is_missing_is_named(folder: Path, tmp_path: Path):
    from safetensors.torch import load_file

    with pytest.raises(ConfigError, match=r"hpsv3: folder '.*' holds no HPSv3.safetensors"):
        rewards.find(f"hpsv3:{tmp_path}")
    state = load_file(folder / "new" / "HPSv3.safetensors")
    save_file(
        {k: v for k, v in state.items() if k != "model.visual.merger.ln_q.weight"}, tmp_path / "HPSv3.safetensors"
    )
    with pytest.raises(ConfigError, match=r"holds no template.txt"):
        rewards.find(f"hpsv3:{tmp_path}")
    with pytest.raises(RewardError, match=r"template.txt' cannot be read; copy INSTRUCTION"):
        HPSv3(folder=tmp_path, base=folder / "base")
    (tmp_path / "template.txt").write_text("Rate {text_prompt}")
    with pytest.raises(RewardError, match=r"must hold \{text_prompt\} and <\|Reward\|> once each"):
        HPSv3(folder=tmp_path, base=folder / "base")
    (tmp_path / "template.txt").write_text(TEMPLATE)
    with pytest.raises(RewardError, match=r"has 1 missing keys, such as 'visual.merger.ln_q.weight'"):
        HPSv3(folder=tmp_path, base=folder / "base")
    save_file({k: v for k, v in state.items() if "embed_tokens" not in k}, tmp_path / "HPSv3.safetensors")
    with pytest.raises(RewardError, match=r"no embedding of the token"):
        HPSv3(folder=tmp_path, base=folder / "base")
