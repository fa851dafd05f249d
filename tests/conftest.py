"""No network, one thread, and the few small models and data sets that tests share."""

from __future__ import annotations

import copy
import os

# Before anything reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import io
import logging
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.config import RunConfig
from diffalign.config_loading import build

torch.set_num_threads(1)

LONG_PROMPT = (
    "a very long prompt that has many more words than the twenty tokens of the tiny text encoder can ever take in"
)
# label_0, has_label, prompt number, scene numbers of the two images; what the pipeline makes of the row
ROWS: tuple[tuple[float, bool, int, tuple[int, int]], ...] = (
    (1.0, True, 0, (0, 1)),
    (0.0, True, 0, (0, 2)),  # shares an image with the row before
    (0.5, True, 0, (1, 2)),  # a tie: dropped, or kept as one half
    (1.0, True, 1, (3, 4)),
    (0.0, True, 1, (4, 5)),
    (1.0, False, 1, (3, 5)),  # unlabelled
    (0.0, True, 2, (6, 7)),
    (1.0, True, 2, (-1, 7)),  # the first image is cut short
    (1.0, True, 3, (8, 9)),
    (0.0, True, 4, (9, 10)),  # the long prompt
    (1.0, True, 4, (8, 10)),
    (0.0, True, 0, (3, 1)),  # an earlier prompt again, in a later shard
    (1.0, True, 5, (10, 11)),
)
PAIRS = 10  # of them can be trained on; 11 with ties


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL with random weights, as a diffusers folder."""
    from diffalign.world.bases import build_untrained

    folder = tmp_path_factory.mktemp("models") / "tiny-sdxl"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build_untrained().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network in SD1.5's layout with random weights, as a diffusers folder; 32 px become 8x8x4 latents."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from diffalign.world.bases import MAX_TOKENS, build_tokenizer

    tokenizer = build_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                block_out_channels=(8, 16, 16),
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=4,
                sample_size=32,
                scaling_factor=0.18215,
            ),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    max_position_embeddings=MAX_TOKENS,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            ),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(16, 32),
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                layers_per_block=1,
                attention_head_dim=4,
                cross_attention_dim=32,
                norm_num_groups=8,
            ),
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        folder = tmp_path_factory.mktemp("models") / "tiny-sd"
        pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pair_parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in Pick-a-Pic's schema with drawn 32x32 scenes: see `ROWS`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from diffalign.world.scenes import sample_captions

    prompts = [*sample_captions(4, seed=0), LONG_PROMPT, sample_captions(6, seed=0)[5]]
    files = _jpegs(12)
    rows = []
    for label, labelled, prompt, (a, b) in ROWS:
        row: dict[str, Any] = {
            "caption": prompts[prompt],
            "jpg_0": files[a] if a >= 0 else files[6][:200],
            "jpg_1": files[b],
            "label_0": label,
            "label_1": 1 - label,
            "has_label": labelled,
            "user_id": 7 + prompt,
            "num_example_per_prompt": sum(p == prompt for _, _, p, _ in ROWS),
            "image_0_uid": f"image {a}",
            "image_1_uid": f"image {b}",
        }
        rows.append(row)
    folder = tmp_path_factory.mktemp("pairs")
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    return folder


def _jpegs(n: int) -> list[bytes]:
    from torchvision.transforms.functional import to_pil_image

    from diffalign.world.scenes import compose, draw, parse_caption, sample_captions

    rng = random.Random(0)
    scenes = [compose(parse_caption(caption), rng) for caption in sample_captions(n, seed=3)]
    files = []
    for image in draw(scenes):
        out = io.BytesIO()
        to_pil_image(image).save(out, "JPEG", quality=95, subsampling=0)
        files.append(out.getvalue())
    return files


TinyConfig = Callable[..., RunConfig]


@pytest.fixture
def tiny_config(request: pytest.FixtureRequest) -> TinyConfig:
    """`tiny_config(output_dir, family="sdxl", section={...})`: a run on the shared data with a tiny model."""

    def make(output_dir: Path | str, family: str = "sdxl", **changes: Any) -> RunConfig:
        folder = request.getfixturevalue("tiny_folder" if family == "sdxl" else "tiny_sd_folder")
        tree: dict[str, Any] = {
            "output_dir": str(output_dir),
            "model": {"family": family, "pretrained": str(folder)},
            "data": {"sources": [str(request.getfixturevalue("pair_parquet"))], "resolution": 32},
            "cache": {"dtype": "float32", "shard_size": 4, "batch_size": 4, "workers": 1},
            "objective": {"name": "dpo", "beta_dpo": 500},
            "lora": {"rank": 4},
            "training": {"learning_rate": 1e-3, "train_batch_size": 2, "max_train_steps": 4, "cpu": True},
            "sampling": {"num_inference_steps": 2, "guidance_scale": 2.0},
        }
        for section, values in changes.items():
            whole = section == "objective" or not isinstance(values, dict)
            tree[section] = values if whole else tree.get(section, {}) | values
        return build(tree)

    return make


@pytest.fixture(scope="module")
def base() -> Any:
    """The tiny UNet's architecture with random weights, frozen, without adapters: not to be changed."""
    from diffalign.world.bases import build_untrained

    torch.manual_seed(0)
    return build_untrained().unet.requires_grad_(False)


@pytest.fixture
def unet(base: Any) -> Any:
    """A copy of `base` for one test."""
    return copy.deepcopy(base)


@pytest.fixture(autouse=True)
def _fresh_process_state() -> Iterator[None]:
    """A run sets torch's threads, and accelerate keeps its device and precision, for the whole process."""
    yield
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def own_logging() -> Iterator[None]:
    """`main` sets up our logger for a process of its own; afterwards it is as it was."""
    logger = logging.getLogger("diffalign")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before
    logging.getLogger("diffalign.losses").setLevel(logging.NOTSET)
