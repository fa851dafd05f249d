"""Published architectures: exact parameter counts, the tokenizer, offline folders, single-file checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

import open_clip.tokenizer
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from diffalign.errors import ConfigError
from diffalign.families import published

COUNTS = {
    ("sd15", "unet"): 859_520_964,
    ("sd15", "vae"): 83_653_863,
    ("sd15", "text_encoder"): 123_060_480,
    ("sd21-base", "unet"): 865_910_724,
    ("sd21", "unet"): 865_910_724,
    ("sd21", "text_encoder"): 340_387_840,
    ("sdxl", "unet"): 2_567_463_684,
    ("sdxl", "vae"): 83_653_863,
    ("sdxl", "text_encoder"): 123_060_480,
    ("sdxl", "text_encoder_2"): 694_659_840,
}


@pytest.mark.parametrize(("name", "component"), COUNTS)
def test_parameter_counts_are_the_published_ones(name: str, component: str) -> None:
    module = published.build_component(name, component, device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in module.parameters()) == COUNTS[name, component]
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sdxl'"):
        published.component_configs("sdx1")
    with pytest.raises(ConfigError, match="text_encoder_2"):
        published.build_component("sd15", "text_encoder_2", device="meta")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.config_folder("sdxl", tmp_path_factory.mktemp("sdxl"))


SENTENCES = [
    "a photo of a cat",
    "A  RED circle, left of a blue square; it's 2024's best... #1 (50% off)",
    "naïve café in 東京 😀",
    "",
    "an owl " * 100,
]


@pytest.mark.parametrize("text", SENTENCES)
def test_token_ids_equal_open_clips(folder: Path, text: str) -> None:
    """open_clip pads with 0, as SDXL's second encoder does; the first pads with the end token."""
    expected = open_clip.tokenizer.SimpleTokenizer()(text)[0]
    arguments = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    second = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer_2")
    assert torch.equal(second(text, **arguments).input_ids[0], expected)
    first = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    used = int((expected == first.eos_token_id).nonzero()[0]) + 1
    ids = first(text, **arguments).input_ids[0]
    assert torch.equal(ids[:used], expected[:used])
    assert (ids[used:] == first.eos_token_id).all()


def test_exclamation_marks(folder: Path) -> None:
    """The first tokenizer keeps them; in the second "!" is the padding token, as published."""
    first = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    second = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer_2")
    expected = open_clip.tokenizer.SimpleTokenizer()("wow !")[0, :4].tolist()
    assert first("wow !").input_ids == expected
    assert second("wow !").input_ids == [*expected[:2], 0, expected[3]]


def test_random_weights_are_finite_seeded_and_complete() -> None:
    """The smallest component on the CPU: same seed, same weights; the position buffer is not left undefined."""
    one, two = (published.build_component("sd15", "text_encoder", dtype=torch.bfloat16, seed=s) for s in (3, 3))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    hidden = one(torch.randint(0, 49408, (1, 77)))[0]
    assert torch.isfinite(hidden).all()
    assert hidden.float().std() > 0.1
    before = torch.random.get_rng_state()
    published.build_component("sd15", "vae", dtype=torch.bfloat16)
    assert torch.equal(before, torch.random.get_rng_state())


def to_ldm(key: str, layers: int) -> str:
    """Diffusers' UNet key to the name used in single-file checkpoints."""
    within = [
        ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
        ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"),
    ]  # fmt: skip
    if ".resnets." in key:
        for ours, theirs in within:
            key = key.replace(f".{ours}.", f".{theirs}.")
    rules = {
        r"conv_in\.": lambda m: "input_blocks.0.0.",
        r"time_embedding\.linear_(\d)\.": lambda m: f"time_embed.{(int(m[1]) - 1) * 2}.",
        r"conv_norm_out\.": lambda m: "out.0.",
        r"conv_out\.": lambda m: "out.2.",
        r"mid_block\.resnets\.(\d)\.": lambda m: f"middle_block.{int(m[1]) * 2}.",
        r"mid_block\.attentions\.0\.": lambda m: "middle_block.1.",
        r"down_blocks\.(\d)\.resnets\.(\d)\.": lambda m: f"input_blocks.{(layers + 1) * int(m[1]) + int(m[2]) + 1}.0.",
        r"down_blocks\.(\d)\.attentions\.(\d)\.": lambda m: (
            f"input_blocks.{(layers + 1) * int(m[1]) + int(m[2]) + 1}.1."
        ),
        r"down_blocks\.(\d)\.downsamplers\.0\.conv\.": lambda m: f"input_blocks.{(layers + 1) * (int(m[1]) + 1)}.0.op.",
        r"up_blocks\.(\d)\.resnets\.(\d)\.": lambda m: f"output_blocks.{(layers + 1) * int(m[1]) + int(m[2])}.0.",
        r"up_blocks\.(\d)\.attentions\.(\d)\.": lambda m: f"output_blocks.{(layers + 1) * int(m[1]) + int(m[2])}.1.",
        # With attention in the same entry the upsampler is number 2, as in this network's first up block.
        r"up_blocks\.(\d)\.upsamplers\.0\.conv\.": lambda m: (
            f"output_blocks.{(layers + 1) * int(m[1]) + layers}.2.conv."
        ),
    }
    for pattern, replace in rules.items():
        if re.match(pattern, key):
            return "model.diffusion_model." + re.sub(rf"^{pattern}", replace, key)
    raise AssertionError(key)


def test_single_file_unet_loads_offline_with_a_written_config_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=4,
        cross_attention_dim=2048,
        use_linear_projection=True,
        norm_num_groups=8,
    )
    file = tmp_path / "model.safetensors"
    save_file({to_ldm(k, 2): v.contiguous() for k, v in unet.state_dict().items()}, file)
    assert published.detect(file) == "sdxl"  # the pattern of levels and the width of the text are SDXL's
    unet.save_config(tmp_path / "config" / "unet")
    loaded = UNet2DConditionModel.from_single_file(str(file), config=str(tmp_path / "config"), subfolder="unet")
    expected = unet.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())


def write_header(file: Path, block: int, width: int, channels: int = 4) -> Path:
    prefix = "model.diffusion_model.input_blocks"
    tensors = {
        f"{prefix}.0.0.weight": torch.zeros(2, channels, 3, 3),
        f"{prefix}.{block}.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(2, width),
    }
    save_file(tensors, file)
    return file


@pytest.mark.parametrize(
    ("block", "width", "channels", "expected"),
    [
        (1, 768, 4, "sd15"),
        (1, 1024, 4, "sd21-base"),
        (4, 2048, 4, "sdxl"),
        (4, 1280, 4, None),  # the SDXL refiner
        (1, 768, 9, None),  # inpainting
    ],
)
def test_detect_by_header(tmp_path: Path, block: int, width: int, channels: int, expected: str | None) -> None:
    assert published.detect(write_header(tmp_path / "x.safetensors", block, width, channels)) == expected


def test_detect_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ConfigError, match="not readable as a"):
        published.detect(tmp_path / "x.safetensors")
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    assert published.detect(tmp_path / "lora.safetensors") is None


def test_light_components_are_the_published_ones() -> None:
    parts = published.light_components("sd21", {"tokenizer", "scheduler"})
    assert parts["scheduler"].config.prediction_type == "v_prediction"
    assert parts["tokenizer"].pad_token_id == 0
    assert parts["tokenizer"].model_max_length == 77
    assert type(published.light_components("sdxl", {"scheduler"})["scheduler"]).__name__ == "EulerDiscreteScheduler"
