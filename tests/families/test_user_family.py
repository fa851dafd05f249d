"""The newcomer's path: a family in one file outside of the package trains, resumes and samples like ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny import image_vae, save
from families.tiny_video import t5_shape, t5_tokenizer

from diffalign.config import ModelConfig, SamplingConfig
from diffalign.errors import ConfigError
from diffalign.families import DECODER, ENCODERS, NETWORK, load_family
from diffalign.metrics import read_rows
from diffalign.trainer import train

FAMILY = str(Path(__file__).parents[2] / "examples" / "custom_family.py")
PROMPTS = ["a red circle", "two blue squares"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny AuraFlow with random weights."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    place = tmp_path_factory.mktemp("models") / "tiny-auraflow"
    tokenizer = t5_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save(
            AuraFlowPipeline(
                tokenizer=tokenizer,
                text_encoder=UMT5EncoderModel(UMT5Config(**t5_shape(len(tokenizer)))),
                vae=image_vae(),
                transformer=AuraFlowTransformer2DModel(
                    sample_size=8,
                    num_mmdit_layers=1,
                    num_single_dit_layers=1,
                    attention_head_dim=8,
                    num_attention_heads=2,
                    joint_attention_dim=t5_shape(len(tokenizer))["d_model"],
                    caption_projection_dim=16,
                    pos_embed_max_size=16,
                ),
                scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
            ),
            place,
        )
    return place


def test_it_is_conditioned_and_called_as_the_stock_pipeline_does(folder: Path) -> None:
    family = load_family(ModelConfig(family=FAMILY, pretrained=str(folder), max_sequence_length=8))
    family.load(ENCODERS, NETWORK, DECODER)
    pipeline = family.pipeline()
    with torch.no_grad():
        hidden, mask, _, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=8)
    ours = family.encode_prompts(PROMPTS)
    assert torch.equal(ours["encoder_hidden_states"], hidden)
    assert torch.equal(ours["mask"], mask.float())
    noise = torch.randn(2, *family.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    sampled = family.sample(
        ours, family.encode_negative(""), noise, SamplingConfig(num_inference_steps=2, guidance_scale=2.0)
    )
    stock = pipeline(
        PROMPTS,
        negative_prompt=["", ""],
        latents=noise,
        num_inference_steps=2,
        guidance_scale=2.0,
        height=32,
        width=32,
        output_type="pt",
        max_sequence_length=8,
    ).images
    torch.testing.assert_close(sampled, stock.float(), atol=2e-3, rtol=0)


def test_it_trains_and_resumes_through_the_ordinary_configuration(
    folder: Path, tmp_path: Path, pair_parquet: Path, tiny_config: Any
) -> None:
    model = {"family": FAMILY, "pretrained": str(folder), "max_sequence_length": 8}
    training = {"max_train_steps": 2, "checkpointing_steps": 1}
    config = tiny_config(tmp_path / "run", model=model, training=training, objective={"name": "flow_dpo", "beta": 50})
    run = train(config)
    rows = [row for row in read_rows(run.run_dir / "metrics.jsonl") if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert len(rows) == 2
    more = training | {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    again = train(tiny_config(tmp_path / "run", model=model, training=more, objective={"name": "flow_dpo", "beta": 50}))
    assert again.step == 3


def test_another_network_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="transformer"):
        load_family(ModelConfig(family=FAMILY, pretrained=str(tiny_folder)))
