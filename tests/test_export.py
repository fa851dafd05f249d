"""LoRA files: what is written loads elsewhere with equal numbers; what does not fit is refused before it loads."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from families import tiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffalign import adapters
from diffalign.config import LoraConfig
from diffalign.errors import CheckpointError, ConfigError
from diffalign.export import find_file, load_lora, read_metadata, save_lora
from diffalign.families import published
from diffalign.lora_format import FORMATS, kohya_names
from diffalign.world.bases import build_untrained

UNTRUE_ALPHA = LoraConfig(rank=4, alpha=10, targets="all")
RS = LoraConfig(rank=3, alpha=7, targets=("to_out.0", "proj_in", "conv1", "upsamplers.0.conv"), use_rslora=True)
SMALL = LoraConfig(rank=4, alpha=10, targets=("attn2.to_k", "conv1"))


def build_sdxl() -> UNet2DConditionModel:
    """The published layout (3 levels, 2 layers per block), narrow."""
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 24),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=2,
        cross_attention_dim=64,
        use_linear_projection=True,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    ).requires_grad_(False)


def build_sd() -> UNet2DConditionModel:
    """SD1.5's layout (4 levels, 2 layers per block, 1x1 convolutions around attention), narrow."""
    torch.manual_seed(2)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=2,
        attention_head_dim=2,
        cross_attention_dim=32,
        norm_num_groups=4,
    ).requires_grad_(False)


BUILD: dict[str, Callable[[], UNet2DConditionModel]] = {"sdxl": build_sdxl, "sd": build_sd}


@torch.no_grad()
def run(unet: UNet2DConditionModel) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, unet.config.in_channels, 8, 8, generator=draw)
    text = torch.randn(1, 5, unet.config.cross_attention_dim, generator=draw)
    conditions = None
    if unet.config.addition_embed_type == "text_time":
        conditions = {"text_embeds": torch.randn(1, 32, generator=draw), "time_ids": torch.full((1, 6), 32.0)}
    return unet(x, 500, text, added_cond_kwargs=conditions).sample


@functools.cache
def trained(family: str, config: LoraConfig, size: float = 0.2) -> UNet2DConditionModel:
    """A network with an adapter that acts; shared, so copy it before changing it."""
    unet = BUILD[family]()
    adapters.attach(unet, config)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapters.parameters(unet):
            parameter += size * torch.randn(parameter.shape, generator=draw)
    assert (run(unet) - run(BUILD[family]())).abs().max() > 1e-3, "the adapter must act"
    return unet


@pytest.fixture(scope="module")
def parts() -> StableDiffusionXLPipeline:
    return build_untrained()


def stock_pipeline(family: str, parts: StableDiffusionXLPipeline) -> Any:
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    shared = {"vae": parts.vae, "tokenizer": parts.tokenizer, "scheduler": scheduler, "unet": BUILD[family]()}
    if family == "sd":
        text = {"text_encoder": copy.deepcopy(parts.text_encoder), "safety_checker": None, "feature_extractor": None}
        return StableDiffusionPipeline(**shared, **text, requires_safety_checker=False)
    text = {"text_encoder": parts.text_encoder, "text_encoder_2": parts.text_encoder_2, "tokenizer_2": parts.tokenizer}
    return StableDiffusionXLPipeline(**shared, **text, add_watermarker=False)


def same(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((one - other).abs().max() <= tolerance * max(1.0, float(one.abs().max())))


# Loading elsewhere


@pytest.mark.parametrize("family", ["sdxl", pytest.param("sd", marks=pytest.mark.slow)])
@pytest.mark.parametrize("style", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    "config",
    [
        UNTRUE_ALPHA,
        pytest.param(RS, marks=pytest.mark.slow),
        pytest.param(LoraConfig(rank=2, alpha=6, targets=("attention", "conv_in")), marks=pytest.mark.slow),
    ],
)
def test_stock_pipelines_load_both_files_with_equal_outputs(
    tmp_path: Path,
    parts: StableDiffusionXLPipeline,
    caplog: pytest.LogCaptureFixture,
    family: str,
    style: str,
    config: LoraConfig,
) -> None:
    unet = trained(family, config)
    files = save_lora(unet, config, tmp_path, family=family, metadata={"role": "positive"})
    pipeline = stock_pipeline(family, parts)
    logging.getLogger("diffusers").addHandler(caplog.handler)  # it does not propagate
    pipeline.load_lora_weights(tmp_path, weight_name=files[style].name)
    logging.getLogger("diffusers").removeHandler(caplog.handler)
    warned = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    # diffusers says so of every adapter without text encoder parts
    assert [text for text in warned if not text.startswith("No LoRA keys associated to CLIPText")] == []
    assert len(adapters.lora_layers(pipeline.unet)) == len(adapters.lora_layers(unet))
    assert same(run(unet), run(pipeline.unet))


def test_a_folder_with_both_files_loads_the_diffusers_one(tmp_path: Path, parts: StableDiffusionXLPipeline) -> None:
    unet = trained("sdxl", SMALL)
    save_lora(unet, SMALL, tmp_path, family="sdxl")
    pipeline = stock_pipeline("sdxl", parts)
    pipeline.load_lora_weights(tmp_path)
    assert same(run(unet), run(pipeline.unet))
    assert find_file(tmp_path).name == "pytorch_lora_weights.safetensors"


def test_dora_survives_the_diffusers_file(tmp_path: Path, parts: StableDiffusionXLPipeline) -> None:
    config = LoraConfig(rank=2, alpha=5, targets=("to_v", "conv1", "proj_out"), use_dora=True)
    unet = trained("sdxl", config, size=0.1)
    files = save_lora(unet, config, tmp_path, family="sdxl")
    pipeline = stock_pipeline("sdxl", parts)
    pipeline.load_lora_weights(tmp_path, weight_name=files["diffusers"].name)
    assert same(run(unet), run(pipeline.unet))


# Our own reader


@pytest.mark.parametrize("family", ["sdxl", "sd"])
@pytest.mark.parametrize("config", [UNTRUE_ALPHA, pytest.param(RS, marks=pytest.mark.slow)])
def test_our_reader_gets_equal_merged_weights_from_every_style(tmp_path: Path, family: str, config: LoraConfig) -> None:
    unet = trained(family, config)
    files = save_lora(unet, config, tmp_path, family=family, metadata={"beta": "5000"})
    expected = adapters.delta_weights(unet)
    for style, file in files.items():
        network = BUILD[family]()
        info = load_lora(network, file, family=family, name="loaded")
        got = adapters.delta_weights(network, "loaded")
        assert got.keys() == expected.keys()
        assert all(same(expected[path], got[path], 1e-6) for path in expected)
        assert same(run(unet), run(network))
        assert (info.style, info.modules, info.rank) == (style, len(expected), config.rank)
        assert info.metadata["diffalign.beta"] == "5000"
        assert not any(p.requires_grad for p in network.parameters())


def test_the_two_level_tiny_base_round_trips_through_sgm_names(
    tmp_path: Path, parts: StableDiffusionXLPipeline
) -> None:
    unet = copy.deepcopy(parts.unet)
    adapters.attach(unet, UNTRUE_ALPHA)
    for parameter in adapters.parameters(unet):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    file = save_lora(unet, UNTRUE_ALPHA, tmp_path, family="sdxl")["kohya"]
    assert any("input_blocks_2_0_op" in key for key in load_file(file))  # one layer per block
    network = copy.deepcopy(parts.unet)
    load_lora(network, file, family="sdxl")
    assert same(run(unet), run(network))


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_dora_round_trips_through_our_reader(tmp_path: Path, caplog: pytest.LogCaptureFixture, style: str) -> None:
    config = LoraConfig(rank=2, alpha=5, targets=("to_v", "conv1", "proj_out"), use_dora=True)
    unet = trained("sdxl", config, size=0.1)
    file = save_lora(unet, config, tmp_path, family="sdxl")[style]
    assert "DoRA in the kohya file" in caplog.text
    network = build_sdxl()
    load_lora(network, file, family="sdxl")
    assert same(run(unet), run(network))


def test_kohya_files_with_diffusers_names_and_uneven_ranks_load(tmp_path: Path) -> None:
    """As other trainers write them: an SDXL file with diffusers names, a rank and an alpha per layer."""
    paths = ["mid_block.resnets.0.conv1", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in"]
    network = build_sdxl()
    layers = adapters.base_layers(network)
    tensors: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for rank, alpha, path in zip((2, 3, 2), (1.0, 1.5, 8.0), paths, strict=True):
        out, *inner = layers[path].weight.shape
        a, b = torch.randn(rank, *inner), torch.randn(out, rank, *[1] * (len(inner) - 1))
        name = f"lora_unet_{path.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(alpha)}
        expected[path] = torch.einsum("or,r...->o...", b.flatten(1), a) * alpha / rank
    save_file(tensors, tmp_path / "other.safetensors")
    load_lora(network, tmp_path, family="sdxl", trainable=True)  # the only file of its folder
    got = adapters.delta_weights(network)
    assert sorted(got) == sorted(paths)
    assert all(same(expected[path], got[path]) for path in paths)
    assert all(p.requires_grad for p in adapters.parameters(network))
    # and out again, with every layer's own rank and alpha
    again = build_sdxl()
    for style, file in save_lora(network, None, tmp_path / "again", family="sdxl").items():
        load_lora(again, file, family="sdxl", name=style)
        assert all(same(expected[path], x) for path, x in adapters.delta_weights(again, style).items())


def test_without_settings_alpha_is_the_rank_as_diffusers_reads_it(tmp_path: Path) -> None:
    unet = trained("sd", SMALL)
    file = save_lora(unet, SMALL, tmp_path, family="sd")["diffusers"]
    save_file(load_file(file), tmp_path / "bare.safetensors")
    network = build_sd()
    assert load_lora(network, tmp_path / "bare.safetensors", family="sd").alpha == 4
    path, change = next(iter(adapters.delta_weights(unet).items()))
    assert same(change, 10 / 4 * adapters.delta_weights(network)[path])


# Kohya layout


def comfy_names(unet: UNet2DConditionModel) -> set[str]:
    """The module names ComfyUI accepts for an SDXL UNet: those of the original network, built up as its code does."""
    config = unet.config
    per_block, levels = config.layers_per_block, len(config.block_out_channels)
    layers = config.transformer_layers_per_block
    layers = (layers,) * levels if isinstance(layers, int) else layers
    depth = [0 if kind == "DownBlock2D" else n for kind, n in zip(config.down_block_types, layers, strict=True)]
    attention = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
    attention += [name.replace("attn1", "attn2") for name in attention] + ["ff.net.0.proj", "ff.net.2"]
    names = {"time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "input_blocks.0.0", "out.2"}

    def residual(place: str) -> None:
        names.update(f"{place}.{x}" for x in ("in_layers.2", "emb_layers.1", "out_layers.3", "skip_connection"))

    def transformer(place: str, n: int) -> None:
        names.update(f"{place}.transformer_blocks.{i}.{x}" for i in range(n) for x in attention)
        names.update((f"{place}.proj_in", f"{place}.proj_out"))

    block = 1
    for level in range(levels):
        for _ in range(per_block):
            residual(f"input_blocks.{block}.0")
            transformer(f"input_blocks.{block}.1", depth[level]) if depth[level] else None
            block += 1
        if level < levels - 1:
            names.add(f"input_blocks.{block}.0.op")
            block += 1
    residual("middle_block.0")
    transformer("middle_block.1", depth[-1])
    residual("middle_block.2")
    block = 0
    for level in reversed(range(levels)):
        for layer in range(per_block + 1):
            residual(f"output_blocks.{block}.0")
            transformer(f"output_blocks.{block}.1", depth[level]) if depth[level] else None
            if level and layer == per_block:
                names.add(f"output_blocks.{block}.{2 if depth[level] else 1}.conv")
            block += 1
    return {f"lora_unet_{name.replace('.', '_')}" for name in names}


@pytest.mark.parametrize("layout", ["published", "tiny"])
def test_every_layer_has_a_name_comfyui_accepts(parts: StableDiffusionXLPipeline, layout: str) -> None:
    unet = build_sdxl() if layout == "published" else parts.unet  # 3 levels of 2 layers, 2 of 1
    names = kohya_names(unet, "sdxl")
    assert names.keys() == adapters.base_layers(unet).keys()
    assert len(set(names.values())) == len(names)
    assert set(names.values()) <= comfy_names(unet)
    missing = comfy_names(unet) - set(names.values())
    assert all(name.endswith("skip_connection") for name in missing)  # only where the width changes


def test_sgm_names_of_sdxl_are_the_known_ones() -> None:
    names = kohya_names(build_sdxl(), "sdxl")
    block = "transformer_blocks_0_attn2_to_out_0"
    known = {
        "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0": f"input_blocks_5_1_{block}",
        "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
        "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_out.0": f"output_blocks_2_1_{block}",
        "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
        "up_blocks.2.resnets.2.conv_shortcut": "output_blocks_8_0_skip_connection",
        "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
        "down_blocks.2.resnets.0.conv2": "input_blocks_7_0_out_layers_3",
    }
    assert {path: names[path] for path in known} == {path: f"lora_unet_{name}" for path, name in known.items()}
    sd = kohya_names(build_sd(), "sd")
    assert sd["down_blocks.0.attentions.0.proj_in"] == "lora_unet_down_blocks_0_attentions_0_proj_in"


@pytest.mark.parametrize("family", ["sdxl", "sd"])
@pytest.mark.parametrize(
    ("config", "alpha", "dtype"),
    [pytest.param(UNTRUE_ALPHA, 10.0, torch.float32, marks=pytest.mark.slow), (RS, 7 * 3**0.5, torch.float16)],
)
def test_every_kohya_module_is_down_up_and_a_float_alpha(
    tmp_path: Path, family: str, config: LoraConfig, alpha: float, dtype: torch.dtype
) -> None:
    unet = trained(family, config)
    tensors = load_file(save_lora(unet, config, tmp_path, family=family, dtype=dtype)["kohya"])
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, part = key.partition(".")
        modules.setdefault(module, {})[part] = tensor
    names, layers = kohya_names(unet, family), adapters.base_layers(unet)
    blocks = {names[path]: layers[path] for path in adapters.target_modules(unet, config.targets)}
    assert modules.keys() == blocks.keys()
    prefix = ("lora_unet_down_", "lora_unet_mid_", "lora_unet_up_")
    if family == "sdxl":
        prefix = ("lora_unet_input_block", "lora_unet_middle_block", "lora_unet_output_block")
    for module, parts_ in modules.items():
        assert parts_.keys() == {"lora_down.weight", "lora_up.weight", "alpha"}
        assert module.startswith(prefix)
        down, up = parts_["lora_down.weight"], parts_["lora_up.weight"]
        out, *inner = blocks[module].weight.shape
        assert down.shape == (config.rank, *inner)
        assert up.shape == (out, config.rank, *[1] * (len(inner) - 1))
        assert down.dtype == up.dtype == dtype
        assert parts_["alpha"].shape == ()
        assert parts_["alpha"].dtype == torch.float32
        assert parts_["alpha"].item() == pytest.approx(alpha, rel=1e-6)


# Metadata


def test_metadata_says_what_it_is(tmp_path: Path) -> None:
    unet = trained("sdxl", SMALL)
    facts = {"role": "negative", "objective": "dpo", "beta": "5000", "base": "me/base", "resolution": "768"}
    facts |= {"learning_rate": "1e-05", "prediction_type": "v_prediction"}
    files = save_lora(unet, SMALL, tmp_path, family="sdxl", metadata=facts)
    for file in files.values():
        metadata = read_metadata(file)
        assert {key: metadata[f"diffalign.{key}"] for key in facts} == facts
        assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
        assert metadata["modelspec.resolution"] == "768x768"
        assert metadata["modelspec.prediction_type"] == "v"
        assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert read_metadata(tmp_path) == read_metadata(files["diffusers"])
    kohya = read_metadata(files["kohya"])
    assert "lora_adapter_metadata" not in kohya
    assert (kohya["ss_network_dim"], kohya["ss_network_alpha"]) == ("4", "10")
    assert json.loads(kohya["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "10"}
    assert (kohya["ss_base_model_version"], kohya["ss_v2"]) == ("sdxl_base_v1-0", "False")
    assert (kohya["ss_learning_rate"], kohya["ss_sd_model_name"]) == ("1e-05", "me/base")
    content = files["kohya"].read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert kohya["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()
    settings = json.loads(read_metadata(files["diffusers"])["lora_adapter_metadata"])
    assert (settings["unet.r"], settings["unet.lora_alpha"], settings["unet.use_dora"]) == (4, 10, False)


def test_a_negative_adapter_loaded_as_an_ordinary_one_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unet = trained("sd", SMALL)
    for role, warned in (("positive", False), ("negative", True)):
        files = save_lora(unet, SMALL, tmp_path / role, family="sd", metadata={"role": role})
        caplog.clear()
        assert load_lora(build_sd(), files["kohya"], family="sd").role == role
        assert ("negative-preference" in caplog.text) is warned


# Writing


def test_a_replacement_state_is_what_is_written(tmp_path: Path) -> None:
    unet = trained("sd", SMALL)
    average = {key: value / 2 for key, value in adapters.state_dict(unet).items()}
    files = save_lora(unet, SMALL, tmp_path, family="sd", state=average)
    for style, file in files.items():
        network = build_sd()
        load_lora(network, file, family="sd")
        got = adapters.state_dict(network)
        assert all(torch.equal(got[key], average[key]) for key in average), style
    with pytest.raises(CheckpointError, match="missing"):
        save_lora(unet, SMALL, tmp_path, family="sd", state={})


def test_half_precision_files_are_close_and_too_large_numbers_are_refused(tmp_path: Path) -> None:
    unet = trained("sdxl", SMALL)
    network = build_sdxl()
    load_lora(network, save_lora(unet, None, tmp_path, family="sdxl", dtype=torch.float16)["kohya"], family="sdxl")
    assert same(run(unet), run(network), 1e-2)
    unet = copy.deepcopy(unet)
    adapters.parameters(unet)[1].data.fill_(1e5)
    before = (tmp_path / "pytorch_lora_weights.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="not finite as float16"):
        save_lora(unet, None, tmp_path, family="sdxl", dtype=torch.float16)
    assert (tmp_path / "pytorch_lora_weights.safetensors").read_bytes() == before


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = trained("sd", SMALL)
    files = save_lora(unet, None, tmp_path, family="sd")
    before = {file: file.read_bytes() for file in files.values()}

    def broken(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(CheckpointError, match="No space left"):
        save_lora(unet, None, tmp_path, family="sd")
    assert sorted(tmp_path.iterdir()) == sorted(before)
    assert all(file.read_bytes() == content for file, content in before.items())


def test_a_file_where_the_folder_should_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_lora(trained("sd", SMALL), None, tmp_path / "taken", family="sd")


def test_callers_mistakes_are_refused(tmp_path: Path) -> None:
    unet = trained("sd", SMALL)
    with pytest.raises(ValueError, match="attached is"):
        save_lora(unet, LoraConfig(rank=4, alpha=4), tmp_path, family="sd")
    with pytest.raises(ValueError, match="'beta'"):
        save_lora(unet, None, tmp_path, family="sd", metadata={"beta": 5000})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="no adapter named 'other'"):
        save_lora(unet, None, tmp_path, family="sd", name="other")
    assert list(tmp_path.iterdir()) == []


# Transformers


TRANSFORMERS = ("sd3", "flux", "pixart", "sana", "qwen_image", "wan", "cogvideox")
WITH_KOHYA = ("sd3", "flux", "qwen_image", "wan")
WITH_LOADER = tuple(family for family in TRANSFORMERS if family != "pixart")  # diffusers has none for it
ALL = LoraConfig(rank=4, alpha=10, targets="all")
RS_ALL = LoraConfig(rank=3, alpha=7, targets="attention+ff", use_rslora=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {family: tmp_path_factory.mktemp(family) / "tiny" for family in TRANSFORMERS}
    for family, folder in made.items():
        tiny.build(family, folder)
    return made


def transformer(folder: Path, config: LoraConfig | None = None) -> Any:
    """The transformer of a tiny pipeline, perhaps with an adapter that acts."""
    index = json.loads((folder / "model_index.json").read_text())
    network = getattr(diffusers, index["transformer"][1]).from_pretrained(folder / "transformer")
    network.requires_grad_(False)
    if config is not None:
        adapters.attach(network, config)
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in adapters.parameters(network):
                parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
    return network


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(same(one[path], other[path]) for path in one)


@pytest.mark.parametrize("family", WITH_LOADER)
@pytest.mark.parametrize("config", [ALL, RS_ALL])
def test_stock_pipelines_load_transformer_files_with_equal_weights(
    tmp_path: Path, folders: dict[str, Path], caplog: pytest.LogCaptureFixture, family: str, config: LoraConfig
) -> None:
    network = transformer(folders[family], config)
    files = save_lora(network, config, tmp_path, family=family)
    index = json.loads((folders[family] / "model_index.json").read_text())
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(folders[family])
    logging.getLogger("diffusers").addHandler(caplog.handler)
    pipeline.load_lora_weights(tmp_path, weight_name=files["diffusers"].name)
    logging.getLogger("diffusers").removeHandler(caplog.handler)
    warned = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert [text for text in warned if not text.startswith("No LoRA keys associated to CLIPText")] == []
    assert equal(adapters.delta_weights(pipeline.transformer, "default_0"), adapters.delta_weights(network))


@pytest.mark.parametrize("family", TRANSFORMERS)
@pytest.mark.parametrize("config", [ALL, RS_ALL])
def test_our_reader_gets_equal_weights_from_transformer_files(
    tmp_path: Path, folders: dict[str, Path], family: str, config: LoraConfig
) -> None:
    network = transformer(folders[family], config)
    files = save_lora(network, config, tmp_path, family=family)
    assert files.keys() == ({"diffusers", "kohya"} if family in WITH_KOHYA else {"diffusers"})
    for style, file in files.items():
        again = transformer(folders[family])
        info = load_lora(again, file, family=family)
        assert (info.style, info.modules) == (style, len(adapters.lora_layers(network)))
        assert equal(adapters.delta_weights(again), adapters.delta_weights(network))
        start = "transformer." if style == "diffusers" else "lora_unet_"
        assert all(key.startswith(start) for key in load_file(file))


def test_joined_layers_may_have_adapters_in_part_and_of_several_ranks(tmp_path: Path, folders: dict[str, Path]) -> None:
    network = transformer(folders["sd3"])
    block = "transformer_blocks.0.attn"
    ranks = {f"{block}.to_q": 2, f"{block}.to_v": 4, f"{block}.add_k_proj": 3}
    adapters.attach_modules(network, ranks, {f"{block}.to_q": 6.0, f"{block}.to_v": 4.0, f"{block}.add_k_proj": 1.0})
    for parameter in adapters.parameters(network):
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    files = save_lora(network, None, tmp_path, family="sd3")
    tensors = load_file(files["kohya"])
    joined = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    assert tensors[f"{joined}.lora_down.weight"].shape == (3 * 4, 16)
    assert tensors[f"{joined}.lora_up.weight"].shape == (3 * 16, 3 * 4)
    again = transformer(folders["sd3"])
    load_lora(again, files["kohya"], family="sd3")
    assert equal(adapters.delta_weights(again), adapters.delta_weights(network))


def kohya_deltas(file: Path) -> dict[str, Tensor]:
    """What a kohya file adds to each layer, as every reader computes it."""
    tensors = load_file(file)
    names = {key.split(".")[0] for key in tensors}
    return {
        name: tensors[f"{name}.lora_up.weight"]
        @ tensors[f"{name}.lora_down.weight"]
        * (tensors[f"{name}.alpha"] / len(tensors[f"{name}.lora_down.weight"]))
        for name in names
    }


class Checkpoint(dict[str, Tensor]):
    """A checkpoint of the original code in which all that is not asked about is zero."""

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(key, torch.zeros(6))


def test_sd3_kohya_names_are_those_of_the_original_checkpoint(tmp_path: Path, folders: dict[str, Path]) -> None:
    """diffusers' converter of checkpoints turns the kohya file's changes into those of the adapter, halves and all."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    network = transformer(folders["sd3"], ALL)
    file = save_lora(network, ALL, tmp_path, family="sd3")["kohya"]
    dots = {"x_block_": "x_block.", "context_block_": "context_block.", "attn_": "attn.", "attn2_": "attn2."}
    dots |= {"mlp_": "mlp.", "adaLN_modulation_1": "adaLN_modulation.1"}
    checkpoint = Checkpoint({"context_embedder.weight": torch.zeros(16, 1)})
    for name, change in kohya_deltas(file).items():
        number, rest = name.removeprefix("lora_unet_joint_blocks_").split("_", 1)
        for ours, theirs in dots.items():
            rest = rest.replace(ours, theirs)
        checkpoint[f"joint_blocks.{number}.{rest}.weight"] = change
    converted = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    expected = adapters.delta_weights(network)
    assert "transformer_blocks.1.norm1_context.linear" in expected
    for path, change in expected.items():
        assert same(converted[f"{path}.weight"], change), path


@pytest.mark.slow
def test_flux_kohya_files_become_the_adapter_again_in_diffusers(tmp_path: Path) -> None:
    """At the published width, which diffusers' converter takes for granted; the network itself has no memory."""
    config = published.component_configs("flux1-dev")["transformer"] | {"num_layers": 1, "num_single_layers": 1}
    network = published.build_from_config(config, device="meta")
    adapters.attach(network, LoraConfig(rank=2, alpha=6, targets="all"))
    draw = torch.Generator().manual_seed(3)
    for layer in adapters.lora_layers(network).values():
        for factor in (layer.lora_A["default"], layer.lora_B["default"]):
            factor.weight = torch.nn.Parameter(torch.randn(factor.weight.shape, generator=draw))
    file = save_lora(network, None, tmp_path, family="flux")["kohya"]
    converted = diffusers.FluxPipeline.lora_state_dict(load_file(file))
    assert len(converted) == 2 * len(adapters.lora_layers(network))
    for path, layer in adapters.lora_layers(network).items():
        a, b = (converted[f"transformer.{path}.lora_{part}.weight"] for part in "AB")
        assert a.shape[0] == 2
        ours = layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach() * 3
        assert same(b @ a, ours), path


@pytest.mark.parametrize(("family", "targets"), [("wan", "attention+ff"), ("qwen_image", "attention+ff")])
def test_other_kohya_files_load_in_diffusers(
    tmp_path: Path, folders: dict[str, Path], family: str, targets: str
) -> None:
    network = transformer(folders[family], LoraConfig(rank=4, alpha=10, targets=targets))
    file = save_lora(network, None, tmp_path, family=family)["kohya"]
    index = json.loads((folders[family] / "model_index.json").read_text())
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(folders[family])
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    assert equal(adapters.delta_weights(pipeline.transformer, "default_0"), adapters.delta_weights(network))


def test_what_a_kohya_file_cannot_say_leaves_it_out(
    tmp_path: Path, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "pytorch_lora_weights_kohya.safetensors").write_bytes(b"of an earlier adapter")
    dora = transformer(folders["flux"], LoraConfig(rank=2, targets="attention", use_dora=True))
    assert save_lora(dora, None, tmp_path, family="flux").keys() == {"diffusers"}
    assert "DoRA cannot be said" in caplog.text
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    again = transformer(folders["flux"])
    load_lora(again, tmp_path, family="flux")
    assert equal(adapters.state_dict(again), adapters.state_dict(dora))
    outside = transformer(folders["sd3"], LoraConfig(rank=2, targets=("context_embedder", "to_q")))
    assert save_lora(outside, None, tmp_path / "outside", family="sd3").keys() == {"diffusers"}
    assert "'context_embedder' has no name" in caplog.text


@pytest.mark.parametrize(
    ("family", "architecture", "module"),
    [
        ("sd3", "stable-diffusion-3-m/lora", "networks.lora_sd3"),
        ("flux", "flux-1-dev/lora", "networks.lora_flux"),
        ("qwen_image", "Qwen-Image/lora", "networks.lora_qwen_image"),
        ("wan", "wan2.1/lora", "networks.lora_wan"),
        ("pixart", "pixart-sigma/lora", None),
    ],
)
def test_metadata_of_transformers(
    tmp_path: Path, folders: dict[str, Path], family: str, architecture: str, module: str | None
) -> None:
    files = save_lora(transformer(folders[family], ALL), ALL, tmp_path, family=family, metadata={"resolution": "512"})
    metadata = read_metadata(files["diffusers"])
    assert metadata["modelspec.architecture"] == architecture
    assert metadata["modelspec.resolution"] == "512x512"
    assert metadata["diffalign.family"] == family
    assert json.loads(metadata["lora_adapter_metadata"])["transformer.lora_alpha"] == 10
    if module is not None:
        kohya = read_metadata(files["kohya"])
        assert kohya["ss_network_module"] == module
        assert "lora_adapter_metadata" not in kohya


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("sd3-medium", "stable-diffusion-3-m"),
        ("sd35-medium", "stable-diffusion-3-5-medium"),
        ("sd35-large", "stable-diffusion-3-5-large"),
        ("flux1-schnell", "flux-1-schnell"),
    ],
)
def test_published_architectures_have_their_modelspec_names(name: str, architecture: str) -> None:
    config = published.component_configs(name)["transformer"]
    network = published.build_from_config(config | {"num_layers": 1, "pos_embed_max_size": 8}, device="meta")
    family = "sd3" if name.startswith("sd3") else "flux"
    assert FORMATS[family].spec(network, {})[0] == architecture


def test_an_adapter_of_another_transformer_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    file = save_lora(transformer(folders["sd3"], ALL), ALL, tmp_path, family="sd3")["kohya"]
    refused(transformer(folders["flux"]), file, "flux", "fits no layer of a flux network")
    refused(transformer(folders["sd3"]), file.with_name("pytorch_lora_weights.safetensors"), "flux", "'sd3'")


# Refusing


def refused(network: nn.Module, path: Path, family: str, said: str) -> None:
    keys = list(network.state_dict())
    with pytest.raises(CheckpointError, match=said) as caught:
        load_lora(network, path, family=family)
    assert "\n" not in str(caught.value)
    assert list(network.state_dict()) == keys, "the network was touched"


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
@pytest.mark.parametrize(("mine", "other"), [("sd", "sdxl"), ("sdxl", "sd")])
def test_an_adapter_of_another_family_is_refused(tmp_path: Path, style: str, mine: str, other: str) -> None:
    file = save_lora(trained(other, SMALL), None, tmp_path, family=other)[style]
    refused(BUILD[mine](), file, mine, rf"a {mine} network.*the file is for '{other}'")


def test_an_adapter_of_another_family_is_refused_even_where_it_fits(tmp_path: Path) -> None:
    file = save_lora(trained("sd", SMALL), None, tmp_path, family="sd")["diffusers"]
    refused(build_sd(), file, "sdxl", "an adapter for 'sd', got model.family 'sdxl'")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, m: t.pop(f"{m}.lora_up.weight"), "incomplete"),
        (lambda t, m: t.update({f"{m}.lora_down.weight": torch.zeros(4, 7, 3, 3)}), r"A has shape \(4, 7, 3, 3\)"),
        (lambda t, m: t.update({f"{m}.lora_up.weight": torch.zeros(4, 8, 1, 1)}), r"B has shape \(4, 8, 1, 1\)"),
        (lambda t, m: t.update({f"{m}.alpha": torch.tensor(float("nan"))}), "alpha is not a usable number"),
        (lambda t, m: t.update({f"{m}.alpha": torch.tensor(0.0)}), "alpha is not a usable number"),
        (lambda t, m: t.update({f"{m}.hada_w1_a": torch.zeros(1)}), "LoHa"),
        (
            lambda t, m: t.update({"lora_unet_nowhere.alpha": torch.tensor(1.0)}),
            "'lora_unet_nowhere.alpha' fits no layer",
        ),
        (lambda t, m: t.update({"lora_te1_text_model_x.alpha": torch.tensor(1.0)}), "text encoder"),
        (lambda t, m: t.update({f"{m}.dora_scale": torch.ones(8, 1, 1, 1)}), "DoRA magnitude"),
        (lambda t, m: t.update({"lora_unet_input_blocks_1_0_in_layers_2.alpha": torch.tensor(1.0)}), "two namings"),
    ],
)
def test_damaged_files_are_refused_before_the_network_is_touched(
    tmp_path: Path, change: Callable[[dict[str, Tensor], str], None], said: str
) -> None:
    file = save_lora(trained("sd", SMALL), None, tmp_path, family="sd")["kohya"]
    tensors = load_file(file)
    change(tensors, "lora_unet_down_blocks_0_resnets_0_conv1")
    save_file(tensors, tmp_path / "changed.safetensors")
    refused(build_sd(), tmp_path / "changed.safetensors", "sd", said)


def test_dora_over_inputs_is_refused_also_on_square_layers(tmp_path: Path) -> None:
    config = LoraConfig(rank=2, targets=("attn1.to_q",), use_dora=True)
    file = save_lora(trained("sd", config), config, tmp_path, family="sd")["kohya"]
    turned = {key: x.T.contiguous() if key.endswith("dora_scale") else x for key, x in load_file(file).items()}
    save_file(turned, tmp_path / "turned.safetensors")
    refused(build_sd(), tmp_path / "turned.safetensors", "sd", "DoRA over inputs")


def test_paths_that_hold_no_adapter_are_refused(tmp_path: Path) -> None:
    network = build_sd()
    refused(network, tmp_path / "nowhere", "sd", "no such adapter")
    refused(network, tmp_path, "sd", "no .safetensors file")
    (tmp_path / "a.safetensors").write_bytes(b"not this")
    refused(network, tmp_path, "sd", "not readable as safetensors")
    (tmp_path / "b.safetensors").touch()
    refused(network, tmp_path, "sd", "a.safetensors, b.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    refused(network, tmp_path / "empty.safetensors", "sd", "holds no tensors")
    tensors = {"unet.conv_in.lora_A.weight": torch.zeros(1)}
    save_file(tensors, tmp_path / "bad.safetensors", metadata={"lora_adapter_metadata": "{"})
    refused(network, tmp_path / "bad.safetensors", "sd", "incomplete")
