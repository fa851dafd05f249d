"""What is particular to single families of diffusion transformers; what all do is in `test_contract.py`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from families import tiny

from diffalign import adapters
from diffalign.config import ModelConfig, SamplingConfig
from diffalign.errors import ConfigError
from diffalign.families import DECODER, ENCODERS, NETWORK, load_family
from diffalign.families._pipeline import PipelineFamily
from diffalign.families._transformers import pack, unpack
from diffalign.families.flux import positions

Open = Callable[..., PipelineFamily]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("tiny") / name
            tiny.build(name, made[name])
        return made[name]

    return folder


@pytest.fixture
def open_tiny(folder_of: Callable[[str], Path]) -> Open:
    """`open_tiny("flux", NETWORK, setting=...)`"""

    def make(name: str, *parts: str, **changes: Any) -> PipelineFamily:
        settings = {"pretrained": str(folder_of(name))} | tiny.SETTINGS.get(name, {}) | changes
        family = load_family(ModelConfig(family=name, **settings))
        assert isinstance(family, PipelineFamily)
        family.load(*parts)
        return family

    return make


def noise(family: PipelineFamily, n: int = 2) -> torch.Tensor:
    return torch.randn(n, *family.latent_shape(32, 64), generator=torch.Generator().manual_seed(0))


def altered(source: Path, target: Path, part: str, **changes: Any) -> Path:
    """A copy with another setting in a part's config."""
    shutil.copytree(source, target)
    file = next((target / part).glob("*config.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return target


# --- packing ---------------------------------------------------------------------------------------------------------


def test_packing_is_the_stock_pipelines_and_comes_back() -> None:
    latents = torch.randn(2, 3, 4, 8)
    packed = pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 3, 4, 8))
    assert torch.equal(unpack(packed, latents.shape), latents)
    assert torch.equal(unpack(packed, latents.shape), FluxPipeline._unpack_latents(packed, 32, 64, 8))
    assert torch.equal(positions(latents), FluxPipeline._prepare_latent_image_ids(2, 2, 4, "cpu", torch.float32))


# --- FLUX ------------------------------------------------------------------------------------------------------------


def test_flux_dev_is_told_its_guidance_and_schnell_none(open_tiny: Open, tmp_path: Path) -> None:
    dev = open_tiny("flux", NETWORK, ENCODERS, DECODER)
    x, t, text = noise(dev), dev.schedule.time(torch.tensor([500, 900])), dev.encode_prompts(["a", "a circle"])
    with torch.no_grad():
        low = dev.predict(dev.network, x, t, text)
        dev.training_guidance = 3.5  # type: ignore[attr-defined]
        assert not torch.allclose(dev.predict(dev.network, x, t, text), low, atol=1e-4)
        asked = dev.predict(dev.network, x, t, text)
        dev.training_guidance = 1.0  # type: ignore[attr-defined]
        told, remains = dev.guide(text, 3.5)
        assert remains == 1.0  # there is no second branch
        assert torch.equal(dev.predict(dev.network, x, t, told), asked)
        assert torch.equal(dev.predict(dev.network, x, t, dev.guide(text, 1.0)[0]), low)
    assert "guidance" not in text
    assert float(dev.schedule.sigmas[499]) == 0.5  # its shift depends on the size of an image: the sampler's

    tiny.build_flux(tmp_path, guidance_embeds=False)
    schnell = open_tiny("flux", NETWORK, DECODER, pretrained=str(tmp_path))
    images = [
        schnell.sample_latents(text, {}, x, SamplingConfig(num_inference_steps=2, guidance_scale=scale))
        for scale in (1.0, 4.0)
    ]
    assert torch.equal(*images)
    with torch.no_grad():
        assert schnell.predict(schnell.network, x, t, text).isfinite().all()
    assert schnell.guide(text, 1.0) == (text, 1.0)
    with pytest.raises(ConfigError, match=r"rollout\.guidance_scale: got 2\.0"):
        schnell.guide(text, 2.0)
    with pytest.raises(ConfigError, match=r"negative_prompt: got 'blurry'; FLUX\.1 is distilled"):
        schnell.sample_latents(text, {}, x, SamplingConfig(negative_prompt="blurry"))


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "length"), [("flux", 513), ("qwen_image", 1025), ("pixart", 0), ("sana", -1)])
def test_a_text_length_that_the_pipeline_refuses(name: str, length: int, open_tiny: Open) -> None:
    with pytest.raises(ConfigError, match=f"max_sequence_length: got {length}; family '{name}' takes"):
        open_tiny(name, max_sequence_length=length)


def test_sanas_negative_comes_without_the_instruction(open_tiny: Open) -> None:
    sana = open_tiny("sana", ENCODERS)
    plain, instructed = sana.encode_negative(""), sana.encode_prompts([""])
    assert plain["attention_mask"].sum() == 1  # the start token
    assert instructed["attention_mask"].sum() == 2  # and the instruction's last
    assert not torch.allclose(plain["encoder_hidden_states"][:, 1], instructed["encoder_hidden_states"][:, 1])
    assert "instruction" in sana.fingerprint()


def test_qwens_text_is_the_same_however_far_it_is_padded(open_tiny: Open) -> None:
    short, long = (open_tiny("qwen_image", ENCODERS, NETWORK, max_sequence_length=n) for n in (200, 260))
    prompts = ["a red circle", "a blue square"]
    texts = [family.encode_prompts(prompts) for family in (short, long)]
    assert [text["encoder_hidden_states"].shape[1] for text in texts] == [200, 260]
    x, t = noise(short), short.schedule.time(torch.tensor([500, 900]))
    with torch.no_grad():
        outputs = [short.predict(short.network, x, t, text) for text in texts]
        length = int(texts[0]["attention_mask"].sum(1).min())  # of the first prompt, which ends there
        bare = short.predict(short.network, x[:1], t[:1], {k: v[:1, :length] for k, v in texts[0].items()})
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs[0][:1], bare, atol=1e-5, rtol=1e-5)


# --- schedulers ------------------------------------------------------------------------------------------------------


def test_another_scheduler_keeps_the_flow_and_its_shift(open_tiny: Open) -> None:
    sana, sd3 = open_tiny("sana"), open_tiny("sd3")
    euler = sana.other_scheduler("FlowMatchEulerDiscreteScheduler")
    assert euler.config.shift == 3.0
    multistep = sd3.other_scheduler("DPMSolverMultistepScheduler").config
    assert (multistep.flow_shift, multistep.use_flow_sigmas) == (3.0, True)
    assert multistep.prediction_type == "flow_prediction"
    with pytest.raises(ConfigError, match="'DDIMScheduler' is no scheduler for flow models"):
        sd3.other_scheduler("DDIMScheduler")


def test_sana_samples_with_another_scheduler(open_tiny: Open) -> None:
    sana = open_tiny("sana", NETWORK, ENCODERS, DECODER)
    x, text = noise(sana, 1), sana.encode_prompts(["a circle"])
    euler = SamplingConfig(num_inference_steps=2, guidance_scale=2.0, scheduler="FlowMatchEulerDiscreteScheduler")
    assert sana.sample_latents(text, sana.encode_negative(""), x, euler).isfinite().all()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("pixart", {"use_additional_conditions": True}, "as PixArt-Alpha at 1024 px is"),
        ("pixart", {"use_additional_conditions": None, "sample_size": 128}, "as PixArt-Alpha at 1024 px is"),
        ("sana", {"guidance_embeds": True}, "few-step Sana-Sprint"),
        ("qwen_image", {"zero_cond_t": True}, "has zero_cond_t, as networks for editing"),
        ("flux", {"in_channels": 96, "out_channels": 16}, "takes 96 channels and returns 16, as inpainting"),
    ],
)
def test_relatives_are_refused(
    name: str, changes: dict[str, Any], match: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = altered(folder_of(name), tmp_path / name, "transformer", **changes)
    with pytest.raises(ConfigError, match=match):
        load_family(ModelConfig(family=name, pretrained=str(folder)))


def test_pixarts_old_class_name_is_accepted(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = altered(folder_of("pixart"), tmp_path / "old", "transformer", _class_name="Transformer2DModel")
    index = folder / "model_index.json"
    named = json.loads(index.read_text()) | {"transformer": ["diffusers", "Transformer2DModel"]}
    index.write_text(json.dumps(named))
    family = load_family(ModelConfig(family="pixart", pretrained=str(folder)))
    family.load(NETWORK)
    assert type(family.network).__name__ == "PixArtTransformer2DModel"


# --- adapters --------------------------------------------------------------------------------------------------------


def test_no_adapter_stands_where_nothing_is_read(open_tiny: Open) -> None:
    network = open_tiny("qwen_image", NETWORK).network
    for targets in ("attention", "all", ("to_add_out",)):
        paths = adapters.target_modules(network, targets)
        assert "transformer_blocks.0.attn.to_add_out" in paths
        assert "transformer_blocks.1.attn.to_add_out" not in paths
        assert not any(path.startswith("transformer_blocks.1.txt_mlp") for path in paths)
