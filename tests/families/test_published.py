"""Published architectures: exact parameter counts, the tokenizer, offline folders, single-file checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import diffusers
import open_clip.tokenizer
import pytest
import torch
from diffusers import UNet2DConditionModel
from families import tiny
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from diffalign import plugins
from diffalign.config import ModelConfig
from diffalign.errors import ConfigError
from diffalign.families import ENCODERS, NETWORK, DenoisingFamily, load_family, published

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
    ("sd3-medium", "transformer"): 2_028_328_000,
    ("sd3-medium", "vae"): 83_819_683,
    ("sd3-medium", "text_encoder"): 123_650_304,
    ("sd3-medium", "text_encoder_2"): 694_659_840,
    ("sd3-medium", "text_encoder_3"): 4_762_310_656,
    ("sd35-medium", "transformer"): 2_243_171_520,
    ("sd35-large", "transformer"): 8_056_627_520,
    ("flux1-dev", "transformer"): 11_901_408_320,
    ("flux1-dev", "vae"): 83_819_683,
    ("flux1-dev", "text_encoder"): 123_060_480,
    ("flux1-schnell", "transformer"): 11_891_178_560,
    ("pixart-sigma", "transformer"): 610_856_096,
    ("pixart-sigma", "vae"): 83_653_863,
    ("sana-1.6b", "transformer"): 1_604_462_752,
    ("sana-1.6b", "vae"): 312_250_275,
    ("sana-1.6b", "text_encoder"): 2_614_341_888,
    ("qwen-image", "transformer"): 20_430_401_088,
    ("qwen-image", "vae"): 126_892_531,
    ("qwen-image", "text_encoder"): 8_292_166_656,
    ("wan21-t2v-1.3b", "transformer"): 1_418_996_800,
    ("wan21-t2v-1.3b", "vae"): 126_892_531,
    ("wan21-t2v-1.3b", "text_encoder"): 5_680_910_336,
    ("wan21-t2v-14b", "transformer"): 14_288_491_584,
    ("cogvideox-2b", "transformer"): 1_693_783_872,
    ("cogvideox-2b", "vae"): 215_583_907,
    ("cogvideox-5b", "transformer"): 5_570_283_072,
}
# Numbers of the published files, positions that are stored with the weights included.
STORED = {"sd3-medium": 2_084_951_104, "sd35-medium": 2_469_663_936}


@pytest.mark.parametrize(("name", "component"), COUNTS)
def test_parameter_counts_are_the_published_ones(name: str, component: str) -> None:
    module = published.build_component(name, component, device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in module.parameters()) == COUNTS[name, component]
    kept = {torch.float32} if name.startswith("wan") and component == "transformer" else set()
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16} | kept
    if component == "transformer" and name in STORED:
        assert sum(tensor.numel() for tensor in module.state_dict().values()) == STORED[name]


@pytest.mark.parametrize("name", published.NAMES)
def test_every_architecture_is_whole(name: str) -> None:
    """Each component of the index is there, of the class that the index says, and the pipeline class takes them."""
    configs = published.component_configs(name)
    index = dict(configs["model_index"])
    pipeline = getattr(diffusers, index.pop("_class_name"))
    expected, _ = pipeline._get_signature_keys(pipeline)
    named = {part: value[1] for part, value in index.items() if isinstance(value, list) and value[0]}
    assert named.keys() <= set(expected)
    assert configs.keys() == {*named, "model_index"}
    weights = published.weight_components(name)
    assert published.network_part(configs) in weights
    for part in weights:
        config = configs[part]
        assert named[part] == (config["architectures"][0] if "architectures" in config else config["_class_name"])
    parts = published.light_components(name, filter(published.is_light, configs))
    assert parts.keys() | weights == named.keys()
    assert type(parts["scheduler"]).__name__ == named["scheduler"]


# --- random weights --------------------------------------------------------------------------------------------------

ARCHITECTURES = {
    "sd3": "sd35-medium",
    "flux": "flux1-dev",
    "pixart": "pixart-sigma",
    "sana": "sana-1.6b",
    "qwen_image": "qwen-image",
    "wan": "wan21-t2v-1.3b",
    "cogvideox": "cogvideox-5b",
}


@pytest.fixture(scope="module")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name in ARCHITECTURES:
        folders[name] = tmp_path_factory.mktemp(name) / "tiny"
        tiny.build(name, folders[name])
    return folders


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_random_components_are_those_of_a_folder_but_for_the_weights(
    family: str, tiny_folders: dict[str, Path]
) -> None:
    pipeline = getattr(diffusers, json.loads((tiny_folders[family] / "model_index.json").read_text())["_class_name"])
    pipeline = pipeline.from_pretrained(tiny_folders[family])
    for file in sorted(tiny_folders[family].glob("*/config.json")):
        theirs = getattr(pipeline, file.parent.name)
        made = published.build_from_config(json.loads(file.read_text()), dtype=torch.float32)
        assert type(made) is type(theirs)
        shapes = {key: value.shape for key, value in theirs.state_dict().items()}
        assert {key: value.shape for key, value in made.state_dict().items()} == shapes
        assert len(list(made.parameters())) == len(list(theirs.parameters())), "tied weights are tied"
        assert all(torch.isfinite(p).all() for p in made.parameters())
        buffers = dict(theirs.named_buffers())
        for key, value in made.named_buffers():
            assert torch.equal(value, buffers[key]), key
        for path, module in made.named_modules():
            if "Norm" in type(module).__name__ and isinstance(weight := getattr(module, "weight", None), torch.Tensor):
                assert weight.unique().tolist() == [0.0 if type(module).__name__ == "Gemma2RMSNorm" else 1.0], path


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_families_run_with_random_weights_and_stand_in_tokenizers(
    family: str, tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published pipeline, with tokenizers and schedulers as they are and networks made small."""
    name, folder = ARCHITECTURES[family], tiny_folders[family]
    configs = published.component_configs(name)
    for part in published.weight_components(name):
        configs[part] = json.loads((folder / part / "config.json").read_text())
        if "vocab_size" in configs[part]:
            clip = configs[part]["model_type"] == "clip_text_model"
            configs[part]["vocab_size"] = 49408 if clip else 512
            if clip:
                configs[part]["max_position_embeddings"] = 77
        if "text_config" in configs[part]:
            configs[part]["text_config"]["vocab_size"] = 512
    monkeypatch.setattr(published, "component_configs", lambda _: configs)
    cls = plugins.find("families", family)
    monkeypatch.setattr(cls, "architectures", (name,))
    settings = {} if family == "sana" else tiny.SETTINGS.get(family, {})
    model = load_family(ModelConfig(family=family, pretrained=name, random_weights=True, **settings))
    assert isinstance(model, DenoisingFamily)
    model.load(NETWORK, ENCODERS)
    conditioning = model.encode_prompts(["a red circle"])
    other = model.encode_prompts(["a blue square"])
    assert all(torch.isfinite(value).all() for value in conditioning.values())
    assert any(not torch.equal(conditioning[key], other[key]) for key in conditioning)
    x_t = torch.randn(1, *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    output = model.predict(model.network, x_t, torch.full((1,), 500.0), conditioning)
    assert output.shape == x_t.shape
    assert torch.isfinite(output).all()
    assert output.std() > 0


def test_the_stand_in_tokenizer_has_a_token_for_every_byte() -> None:
    parts = published.light_components("sana-1.6b", ["tokenizer"])
    tokenizer = parts["tokenizer"]
    text = "naïve 東京, twice  spaced\n"
    ids = tokenizer(text).input_ids
    assert len(ids) == 1 + len(text.encode())  # Gemma's texts start with a token
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    t5 = published.light_components("flux1-dev", ["tokenizer_2"])["tokenizer_2"]
    padded = t5(["a"], padding="max_length", max_length=6)
    assert padded.input_ids == [[*t5("a").input_ids, 0, 0, 0, 0]]
    assert t5("a").input_ids[-1] == t5.eos_token_id
    assert padded.attention_mask == [[1, 1, 0, 0, 0, 0]]
    qwen = published.light_components("qwen-image", ["tokenizer"])["tokenizer"]
    assert len(qwen("<|im_start|>user<|im_end|>").input_ids) == 6


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
