"""Our families against the stock pipelines: the same conditioning, predictions, latents and images."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffalign import adapters
from diffalign.config import LoraConfig, ModelConfig, SamplingConfig
from diffalign.errors import ConfigError
from diffalign.families import DECODER, ENCODERS, NETWORK, Conditioning, DenoisingFamily, load_family
from diffalign.families._loading import dtype_argument, quiet
from diffalign.policy import Policy
from diffalign.prediction import add_noise, target

NAMES = ("sd", "sdxl")
CLASSES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
PROMPTS = ["a red circle on a white background", "two blue squares " * 12]  # the second is cut off at 20 tokens


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, tiny_sd_folder: Path) -> dict[str, Path]:
    return {"sd": tiny_sd_folder, "sdxl": tiny_folder}


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def stock(name: str, folders: dict[str, Path]) -> Any:
    """The stock pipeline, loaded without our code."""
    pipeline = CLASSES[name].from_pretrained(folders[name])
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae):
        part.requires_grad_(False).eval()
    return pipeline


def open_family(name: str, folder: Path | str, *parts: str, **options: Any) -> DenoisingFamily:
    family = load_family(ModelConfig(family=name, pretrained=str(folder), **options))
    family.load(*parts)
    return family


@pytest.fixture(scope="module")
def family(name: str, folders: dict[str, Path]) -> DenoisingFamily:
    return open_family(name, folders[name], NETWORK, ENCODERS, DECODER)


def pixels(n: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def noise(family: DenoisingFamily, n: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, *family.latent_shape(32, 32), generator=torch.Generator().manual_seed(seed))


def conditioning_of(family: DenoisingFamily) -> Conditioning:
    image = family.image_conditioning((40, 36), (4, 2), (32, 32))
    return family.encode_prompts(PROMPTS) | {k: v.expand(2, -1) for k, v in image.items()}


def call(unet: nn.Module, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """The network, called by hand."""
    added = {k: conditioning[k] for k in ("text_embeds", "time_ids") if k in conditioning}
    with torch.no_grad():
        return unet(x, t, conditioning["encoder_hidden_states"], added_cond_kwargs=added or None).sample


# --- conditioning ----------------------------------------------------------------------------------------------------


def test_prompts_are_encoded_as_by_the_stock_pipeline(name: str, family: DenoisingFamily, stock: Any) -> None:
    with torch.no_grad():
        if name == "sd":
            hidden, negative = stock.encode_prompt(PROMPTS, "cpu", 1, True)
            expected = {"encoder_hidden_states": hidden}
            empty = {"encoder_hidden_states": negative}
        else:
            hidden, negative, pooled, negative_pooled = stock.encode_prompt(PROMPTS, device="cpu")
            expected = {"encoder_hidden_states": hidden, "text_embeds": pooled}
            empty = {"encoder_hidden_states": negative, "text_embeds": negative_pooled}
    ours = family.encode_prompts(PROMPTS)
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(ours[key], value), key
        torch.testing.assert_close(family.encode_negative("")[key], empty[key][:1], atol=1e-5, rtol=0)


def test_tokens_are_counted_with_start_and_end(family: DenoisingFamily) -> None:
    assert family.count_tokens("a red circle") == (5, 20)
    assert family.count_tokens("") == (2, 20)
    tokens, limit = family.count_tokens(PROMPTS[1])
    assert tokens > limit


def test_size_conditioning_is_height_first_and_tells_of_the_crop(
    name: str, family: DenoisingFamily, stock: Any
) -> None:
    ours = family.image_conditioning((600, 800), (16, 0), (512, 768))
    if name == "sd":
        assert ours == {}
        return
    assert ours["time_ids"].tolist() == [600, 800, 16, 0, 512, 768]
    expected = stock._get_add_time_ids((600, 800), (16, 0), (512, 768), torch.float32, 32)
    assert torch.equal(ours["time_ids"][None], expected)
    assert ours["time_ids"].dtype == torch.float32


def test_time_ids_stay_float32_in_half_precision(folders: dict[str, Path]) -> None:
    family = open_family("sdxl", folders["sdxl"])
    seen: dict[str, Tensor] = {}

    def network(x: Tensor, t: Tensor, *, added_cond_kwargs: dict[str, Tensor], **more: Any) -> tuple[Tensor]:
        seen.update(added_cond_kwargs)
        return (x,)

    sizes = torch.tensor([[1023.0, 769.0, 0.0, 13.0, 1024.0, 1024.0]])
    family.predict(
        network,  # type: ignore[arg-type]
        torch.zeros(1, 20, 8, 8, dtype=torch.bfloat16),
        torch.tensor([3]),
        {"encoder_hidden_states": torch.zeros(1, 20, 64), "text_embeds": torch.zeros(1, 32), "time_ids": sizes},
    )
    assert torch.equal(seen["time_ids"], sizes)  # bfloat16 would make 1024 and 768 of it
    assert seen["text_embeds"].dtype == torch.bfloat16


def test_the_negative_prompt_is_zeros_where_the_base_was_trained_so(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["sdxl"], tmp_path / "zeros")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": True}))
    family = open_family("sdxl", folder, NETWORK, ENCODERS, DECODER)
    assert all(value.count_nonzero() == 0 for value in family.encode_negative("").values())
    assert all(value.count_nonzero() > 0 for value in family.encode_negative("blurry").values())
    assert all(value.count_nonzero() > 0 for value in family.encode_prompts([""]).values())
    # It stays so when a part is loaded again, and the stock pipeline gives the same images.
    family.unload(ENCODERS)
    family.load(ENCODERS)
    stock = StableDiffusionXLPipeline.from_pretrained(folder)
    check_images(family, stock, SamplingConfig(num_inference_steps=2, guidance_scale=4.0))


# --- the network -----------------------------------------------------------------------------------------------------


def test_predictions_are_those_of_the_bare_network(family: DenoisingFamily, stock: Any) -> None:
    x, t, conditioning = noise(family), torch.tensor([900, 10]), conditioning_of(family)
    ours = family.predict(family.network, x, t, conditioning)
    assert ours.shape == x.shape
    assert torch.isfinite(ours).all()
    assert torch.equal(ours, call(stock.unet, x, t, conditioning))
    assert not any(p.requires_grad for p in family.network.parameters())


def test_with_adapters_off_the_network_is_the_base_to_the_bit(family: DenoisingFamily, stock: Any) -> None:
    network = copy.deepcopy(family.network)
    adapters.attach(network, LoraConfig(rank=4, targets="all"), seed=0)
    with torch.no_grad():
        for parameter in adapters.parameters(network):
            parameter.add_(0.1)
    x, t, conditioning = noise(family), torch.tensor([500, 100]), conditioning_of(family)
    base = call(stock.unet, x, t, conditioning)
    policy = Policy(family, network)
    assert torch.equal(policy.predict_reference(x, t, conditioning), base)
    assert not torch.allclose(policy.predict(x, t, conditioning), base, atol=1e-3)


def test_the_schedule_is_the_schedulers(name: str, family: DenoisingFamily, stock: Any) -> None:
    schedule = family.schedule
    reference = DDPMScheduler.from_config(stock.scheduler.config)
    assert schedule.num_timesteps == 1000
    assert schedule.prediction_type == {"sd": "epsilon", "sdxl": "v_prediction"}[name]
    assert torch.equal(schedule.alphas, reference.alphas_cumprod.sqrt())
    t = torch.tensor([0, 999])
    x0, eps = noise(family), noise(family, seed=1)
    alpha, sigma = schedule.alpha_sigma(t)
    torch.testing.assert_close(add_noise(x0, eps, alpha, sigma), reference.add_noise(x0, eps, t))
    velocity = target("v_prediction", x0, eps, alpha, sigma)
    torch.testing.assert_close(velocity, reference.get_velocity(x0, eps, t), atol=1e-6, rtol=1e-6)
    if name == "sdxl":  # zero terminal SNR: nothing of the image is left
        assert alpha[-1] == 0
        assert torch.equal(add_noise(x0, eps, alpha, sigma)[-1], eps[-1])


def test_the_prediction_type_can_be_stated(folders: dict[str, Path]) -> None:
    family = open_family("sd", folders["sd"], prediction_type="v_prediction")
    assert family.schedule.prediction_type == "v_prediction"
    family.load(NETWORK, DECODER, ENCODERS)
    assert family.pipeline().scheduler.config.prediction_type == "v_prediction"


def test_a_network_that_predicts_something_else_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["sd"], tmp_path / "x0")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "sample"}))
    with pytest.raises(ConfigError, match="predicts 'sample'; expected one of epsilon, v_prediction"):
        _ = open_family("sd", folder).schedule


# --- images ----------------------------------------------------------------------------------------------------------


def test_latents_are_scaled_posterior_means(family: DenoisingFamily, stock: Any) -> None:
    images = pixels()
    with torch.no_grad():
        expected = stock.vae.encode(images).latent_dist.mode() * stock.vae.config.scaling_factor
    latents = family.encode_images(images)
    assert torch.equal(latents, expected)
    assert latents.shape[1:] == family.latent_shape(32, 32)
    assert family.latent_shape(64, 32) == (latents.shape[1], 16, 8)


def test_decoding_undoes_encoding(name: str, family: DenoisingFamily, stock: Any) -> None:
    latents = family.encode_images(pixels())
    with torch.no_grad():
        expected = stock.vae.decode(latents / stock.vae.config.scaling_factor).sample
    decoded = family.decode_latents(latents)
    torch.testing.assert_close(decoded, (expected / 2 + 0.5).clamp(0, 1))
    assert 0 <= decoded.min() <= decoded.max() <= 1
    if name == "sdxl":  # the tiny codec is a projection: what it decodes, it encodes to the same again
        inside = latents * 0.05
        again = family.encode_images(family.decode_latents(inside) * 2 - 1)
        torch.testing.assert_close(again, inside, atol=1e-4, rtol=1e-3)


def check_images(family: DenoisingFamily, stock: Any, sampling: SamplingConfig) -> None:
    """Our images against a call of the stock pipeline with prompts."""
    start = noise(family)
    stock.set_progress_bar_config(disable=True)
    with torch.no_grad():
        expected = stock(
            PROMPTS,
            negative_prompt=[sampling.negative_prompt] * 2 if sampling.negative_prompt else None,
            latents=start.clone(),
            height=32,
            width=32,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            guidance_rescale=sampling.guidance_rescale,
            output_type="pt",
        ).images
    negative = family.encode_negative(sampling.negative_prompt)
    ours = family.sample(family.encode_prompts(PROMPTS), negative, start, sampling)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 6.0},
        {"guidance_scale": 6.0, "guidance_rescale": 0.7},
        {"guidance_scale": 6.0, "negative_prompt": "blue"},
    ],
)
def test_images_are_those_of_the_stock_pipeline(family: DenoisingFamily, stock: Any, changes: dict[str, Any]) -> None:
    check_images(family, stock, SamplingConfig(num_inference_steps=3, **changes))


def test_another_scheduler(family: DenoisingFamily, stock: Any) -> None:
    own = stock.scheduler
    stock.scheduler = EulerDiscreteScheduler.from_config(own.config)
    try:
        check_images(family, stock, SamplingConfig(num_inference_steps=3, scheduler="EulerDiscreteScheduler"))
    finally:
        stock.scheduler = own
    with pytest.raises(
        ConfigError, match="'EulerDiscretScheduler' is no diffusers scheduler; did you mean 'EulerDiscr"
    ):
        family.sample(
            family.encode_prompts(PROMPTS),
            family.encode_negative(""),
            noise(family),
            SamplingConfig(scheduler="EulerDiscretScheduler"),
        )


# --- loading ---------------------------------------------------------------------------------------------------------


def test_parts_come_and_go(name: str, folders: dict[str, Path]) -> None:
    family = open_family(name, folders[name], ENCODERS)
    with pytest.raises(RuntimeError, match="unet is not in memory"):
        _ = family.network
    before = family.encode_prompts(PROMPTS[:1])
    family.load(NETWORK)
    network = family.network
    family.unload(ENCODERS)
    with pytest.raises(RuntimeError, match="vae is not in memory"):
        family.encode_images(pixels())
    family.load(DECODER, ENCODERS, NETWORK)
    assert family.network is network  # what was there is left alone
    assert torch.equal(family.encode_prompts(PROMPTS[:1])["encoder_hidden_states"], before["encoder_hidden_states"])


def test_types_of_network_and_autoencoder_differ(folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        config = ModelConfig(family=name, pretrained=str(folder))
        family = load_family(config, dtype=torch.bfloat16, vae_dtype=torch.float32)
        family.load(NETWORK, ENCODERS)
        assert {p.dtype for p in family.network.parameters()} == {torch.bfloat16}
        assert family.encode_prompts(["x"])["encoder_hidden_states"].dtype == torch.bfloat16
        exact = open_family(name, folder, DECODER)
        assert torch.equal(family.encode_images(pixels()), exact.encode_images(pixels()))


class Records(logging.Handler):
    """Warnings of other libraries."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def warned() -> Iterator[list[str]]:
    handler, loggers = Records(), [logging.getLogger(library) for library in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler.texts
    for logger in loggers:
        logger.removeHandler(handler)


def test_loading_and_encoding_say_nothing(
    name: str, folders: dict[str, Path], warned: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    bars = diffusers_logging.is_progress_bar_enabled()
    family = open_family(name, folders[name], NETWORK, ENCODERS, DECODER)
    family.encode_prompts([PROMPTS[1]])
    family.count_tokens(PROMPTS[1])
    assert warned == []
    assert capfd.readouterr().err == ""
    assert diffusers_logging.is_progress_bar_enabled() == bars
    # What is not known to be noise comes through.
    with quiet():
        logging.getLogger("diffusers.pipelines.pipeline_utils").warning("something new")
    assert warned == ["something new"]


def test_the_installed_diffusers_names_the_type_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, argument in (
        ("0.36.0", "torch_dtype"),
        ("0.39.2", "torch_dtype"),
        ("0.40.0", "dtype"),
        ("1.0.0.dev0", "dtype"),
    ):
        monkeypatch.setattr("importlib.metadata.version", lambda package, version=version: version)
        assert dtype_argument(torch.float16) == {argument: torch.float16}


def refused(match: str, **config: Any) -> None:
    with pytest.raises(ConfigError, match=match) as error:
        load_family(ModelConfig(**config)).load(NETWORK, ENCODERS)
    assert "\n" not in str(error.value)


def test_a_model_of_the_other_family_is_refused_before_it_loads(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("weights were loaded")

    for cls in CLASSES.values():
        monkeypatch.setattr(cls, "from_pretrained", never)
    refused(
        "family is 'sd', but .* size conditioning; set model.family: sdxl", family="sd", pretrained=str(folders["sdxl"])
    )
    refused("family is 'sdxl', but .*set model.family: sd", family="sdxl", pretrained=str(folders["sd"]))
    refused("'sdxl' is no architecture of model.family 'sd'", family="sd", pretrained="sdxl", random_weights=True)
    refused("'sd15' is no architecture of model.family 'sdxl'", family="sdxl", pretrained="sd15", random_weights=True)


def test_an_inpainting_network_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["sd"], tmp_path / "inpaint")
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"in_channels": 9}))
    refused("takes 9 channels and returns 4, as inpainting", family="sd", pretrained=str(folder))


def test_names_that_are_no_model(folders: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.ckpt"
    checkpoint.write_bytes(b"x")
    refused(r"model\.ckpt'.*\.safetensors.*convert \.ckpt", family="sd", pretrained=str(checkpoint))
    (tmp_path / "empty").mkdir()
    refused("is a folder without model_index.json", family="sd", pretrained=str(tmp_path / "empty"))
    refused("is no file, folder, hub id .*; did you mean 'tiny-sdxl'", family="sdxl", pretrained="tiny-sdlx")
    refused(
        "'sdlx' is no published architecture; did you mean 'sdxl'",
        family="sdxl",
        pretrained="sdlx",
        random_weights=True,
    )
    refused("owner/there-is-none.*could not be loaded.*offline", family="sdxl", pretrained="owner/there-is-none")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no safetensors")
    refused(r"broken\.safetensors: not readable", family="sd", pretrained=str(broken))
    save_file({"a": torch.zeros(1)}, broken)
    refused(r"broken\.safetensors: not recognised as", family="sd", pretrained=str(broken))


def test_damaged_or_missing_weights_are_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    for number, (name, folder) in enumerate(folders.items()):
        copied = shutil.copytree(folder, tmp_path / str(number))
        weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        refused("could not be loaded", family=name, pretrained=str(copied))
        weights.unlink()
        refused("could not be loaded", family=name, pretrained=str(copied))
        shutil.rmtree(copied / "unet")
        refused("unet/config.json is not readable", family=name, pretrained=str(copied))


# --- another autoencoder ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory: pytest.TempPathFactory, tiny_sd_folder: Path) -> Path:
    """An autoencoder with other weights, another scale and a shift."""
    folder = tmp_path_factory.mktemp("vae")
    vae = AutoencoderKL.from_pretrained(tiny_sd_folder, subfolder="vae")
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(1.1)
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    vae.save_pretrained(folder)
    return folder


def test_another_autoencoder_by_folder(folders: dict[str, Path], other_vae: Path) -> None:
    family = open_family("sd", folders["sd"], ENCODERS, vae=str(other_vae))
    vae = AutoencoderKL.from_pretrained(other_vae).eval()
    with torch.no_grad():
        expected = (vae.encode(pixels()).latent_dist.mode() - 0.25) * 0.5
        images = (vae.decode(expected / 0.5 + 0.25).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(family.encode_images(pixels()), expected)
    torch.testing.assert_close(family.decode_latents(expected), images)
    plain = open_family("sd", folders["sd"])
    assert family.fingerprint()["vae"] != plain.fingerprint().get("vae")
    # The autoencoder of a whole pipeline's folder.
    again = open_family("sd", folders["sd"], ENCODERS, vae=str(folders["sd"]))
    plain.load(ENCODERS)
    assert torch.equal(again.encode_images(pixels()), plain.encode_images(pixels()))


def test_names_that_are_no_autoencoder(folders: dict[str, Path], tmp_path: Path) -> None:
    base = {"family": "sd", "pretrained": str(folders["sd"])}
    refused("model.vae 'no such' is no file, folder or hub id", vae="no such", **base)
    refused("model.vae 'owner/none' could not be loaded.*offline", vae="owner/none", **base)
    (tmp_path / "empty").mkdir()
    refused(r"is a folder without config\.json", vae=str(tmp_path / "empty"), **base)
    (tmp_path / "vae.pt").write_bytes(b"x")
    refused(r"vae\.pt': expected a \.safetensors file", vae=str(tmp_path / "vae.pt"), **base)


def test_the_fingerprint_is_that_of_the_files(folders: dict[str, Path], tmp_path: Path) -> None:
    for name, folder in folders.items():
        before = open_family(name, folder).fingerprint()
        assert before == open_family(name, shutil.copytree(folder, tmp_path / name)).fingerprint()
        assert any(key.startswith("vae/") for key in before)
        assert any(key.startswith("tokenizer/") for key in before)
        assert not any(key.startswith("unet/") for key in before)  # the network does not encode anything


# --- single files ----------------------------------------------------------------------------------------------------


def ldm_unet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of the original code for a two-level UNet with one layer per block (attention on the first level)."""
    blocks = {
        "conv_in": "input_blocks.0.0",
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.attentions.0": "input_blocks.1.1",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.upsamplers.0": "output_blocks.1.1",
        "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.attentions.0": "output_blocks.2.1",
        "up_blocks.1.resnets.1": "output_blocks.3.0",
        "up_blocks.1.attentions.1": "output_blocks.3.1",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    inside = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    return {f"model.diffusion_model.{_rename(key, blocks, inside)}": value for key, value in state.items()}


def ldm_vae(state: dict[str, Tensor], prefix: str = "first_stage_model.") -> dict[str, Tensor]:
    """The names of the original code for an autoencoder with three levels and one layer per block."""
    blocks = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        blocks |= {f"{side}.{part}": f"{side}.{part}" for part in ("conv_in", "conv_out")}
        blocks[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        blocks |= {f"{side}.mid_block.resnets.{i}": f"{side}.mid.block_{i + 1}" for i in (0, 1)}
        blocks[f"{side}.mid_block.attentions.0"] = f"{side}.mid.attn_1"
    for level in range(3):
        blocks[f"encoder.down_blocks.{level}.resnets.0"] = f"encoder.down.{level}.block.0"
        blocks[f"encoder.down_blocks.{level}.downsamplers.0"] = f"encoder.down.{level}.downsample"
        blocks |= {f"decoder.up_blocks.{level}.resnets.{i}": f"decoder.up.{2 - level}.block.{i}" for i in (0, 1)}
        blocks[f"decoder.up_blocks.{level}.upsamplers.0"] = f"decoder.up.{2 - level}.upsample"
    inside = {"conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_out.0": "proj_out"}
    inside |= {f"to_{x}": x for x in "qkv"}
    found = {}
    for key, value in state.items():
        is_projection = "mid_block.attentions.0.to_" in key and key.endswith("weight")
        found[prefix + _rename(key, blocks, inside)] = value[..., None, None] if is_projection else value
    return found


def _rename(key: str, blocks: dict[str, str], inside: dict[str, str]) -> str:
    block = max((b for b in blocks if key.startswith(b + ".")), key=len)
    rest = key.removeprefix(block + ".")
    for old, new in inside.items():
        if rest.startswith(old + "."):
            rest = new + rest.removeprefix(old)
            break
    return f"{blocks[block]}.{rest}"


@pytest.fixture(scope="module")
def single_file(tmp_path_factory: pytest.TempPathFactory, tiny_sd_folder: Path) -> Path:
    """The tiny SD as one file with the original names, as checkpoints are passed around."""
    parts = {
        part: load_file(next((tiny_sd_folder / part).glob("*.safetensors"))) for part in ("unet", "vae", "text_encoder")
    }
    # transformers 5 dropped the prefix that the original files have.
    bare = {key.removeprefix("text_model."): value for key, value in parts["text_encoder"].items()}
    text = {f"cond_stage_model.transformer.text_model.{key}": value for key, value in bare.items()}
    whole = ldm_unet(parts["unet"]) | ldm_vae(parts["vae"]) | text
    file = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    save_file({key: value.contiguous() for key, value in whole.items()}, file)
    return file


def test_a_single_file_is_the_folder(single_file: Path, folders: dict[str, Path], warned: list[str]) -> None:
    config = ModelConfig(family="sd", pretrained=str(single_file), config=str(folders["sd"]))
    ours = load_family(config)
    ours.load(NETWORK, ENCODERS)
    folder = open_family("sd", folders["sd"], NETWORK, ENCODERS)
    x, t = noise(folder), torch.tensor([800, 20])
    conditioning = folder.encode_prompts(PROMPTS)
    assert torch.equal(ours.encode_prompts(PROMPTS)["encoder_hidden_states"], conditioning["encoder_hidden_states"])
    assert torch.equal(
        ours.predict(ours.network, x, t, conditioning), folder.predict(folder.network, x, t, conditioning)
    )
    torch.testing.assert_close(ours.encode_images(pixels()), folder.encode_images(pixels()))
    assert ours.schedule.prediction_type == "epsilon"
    assert warned == []


def test_the_autoencoder_of_a_single_file_is_not_rounded(single_file: Path, folders: dict[str, Path]) -> None:
    config = ModelConfig(family="sd", pretrained=str(single_file), config=str(folders["sd"]))
    half = load_family(config, dtype=torch.bfloat16, vae_dtype=torch.float32)
    half.load(ENCODERS, NETWORK)
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    exact = open_family("sd", folders["sd"], DECODER)
    torch.testing.assert_close(half.encode_images(pixels()), exact.encode_images(pixels()))


def test_a_single_file_of_the_other_family(single_file: Path, folders: dict[str, Path]) -> None:
    refused("set model.family: sdxl", family="sd", pretrained=str(single_file), config=str(folders["sdxl"]))
    refused("for SD1.x and SD2.x", family="sdxl", pretrained=str(single_file), config=str(folders["sd"]))
    refused("not recognised as an SD1.x, SD2.x or SDXL checkpoint", family="sd", pretrained=str(single_file))


def test_an_autoencoder_from_a_single_file(folders: dict[str, Path], other_vae: Path, tmp_path: Path) -> None:
    file = tmp_path / "vae.safetensors"
    state = ldm_vae(load_file(next(other_vae.glob("*.safetensors"))), prefix="")
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    family = open_family("sd", folders["sd"], ENCODERS, vae=str(file), config=str(folders["sd"]))
    vae = AutoencoderKL.from_pretrained(other_vae).eval()
    with torch.no_grad():
        expected = vae.encode(pixels()).latent_dist.mode() * 0.18215  # the scale of the named config
    torch.testing.assert_close(family.encode_images(pixels()), expected)


# --- full size -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "architecture", "parameters"), [("sd", "sd15", 859_520_964), ("sd", "sd21", 865_910_724)]
)
def test_published_architectures_with_random_weights(name: str, architecture: str, parameters: int) -> None:
    family = load_family(ModelConfig(family=name, pretrained=architecture, random_weights=True), dtype=torch.bfloat16)
    family.load(ENCODERS)
    conditioning = family.encode_prompts(["a photograph of an astronaut riding a horse"])
    assert family.count_tokens("a") == (3, 77)
    family.unload(ENCODERS)
    family.load(NETWORK)
    assert sum(p.numel() for p in family.network.parameters()) == parameters
    x = torch.randn(1, 4, 8, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        out = family.predict(family.network, x, torch.tensor([500]), conditioning)
    assert out.shape == x.shape
    assert torch.isfinite(out).all()
