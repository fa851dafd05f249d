"""Runs on clips from the configuration to the report: cache, training, resuming, grids, and what is refused before."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from families.tiny_video import TOKENS, build_cogvideox, build_wan
from PIL import Image, ImageSequence

from diffalign import evaluate, preflight, rewards
from diffalign.commands import generate
from diffalign.config import ModelConfig, RunConfig, SamplingConfig
from diffalign.config_loading import build
from diffalign.data.cache import LatentCache
from diffalign.data.manifest import fingerprint
from diffalign.data.prepare import prepare
from diffalign.errors import ConfigError
from diffalign.families import NETWORK, load_family
from diffalign.report import write_report
from diffalign.rewards import Reward, stills
from diffalign.sampling import Sampler, save_png
from diffalign.trainer import train

BUILD: dict[str, Callable[[Path], Path]] = {"wan": build_wan, "cogvideox": build_cogvideox}
FRAMES = {"wan": 5, "cogvideox": 9}
PROMPTS = ("a red circle moves", "a blue square", "a square on a circle", "a circle")


def gif(number: int, frames: int) -> bytes:
    """A square that moves to the right, one pixel in a frame."""
    images = []
    for i in range(frames):
        x_HWC = np.full((32, 40, 3), 30 * (number % 8), dtype=np.uint8)
        x_HWC[8:16, i : i + 8] = (255, 255 - 14 * number, 0)
        images.append(Image.fromarray(x_HWC))
    out = io.BytesIO()
    images[0].save(out, "GIF", save_all=True, append_images=images[1:], duration=100)
    return out.getvalue()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL with seven pairs of GIFs of 9 frames, one of them too short (4 frames), and one broken."""
    folder, rows = tmp_path_factory.mktemp("clips"), []
    for i in range(9):
        for side in range(2):
            (folder / f"{i}-{side}.gif").write_bytes(gif(2 * i + side, 4 if (i, side) == (7, 1) else 9))
        rows.append({"prompt": PROMPTS[i % 4], "video_0": f"{i}-0.gif", "video_1": f"{i}-1.gif", "label_0": i % 2})
    (folder / "8-0.gif").write_bytes(gif(0, 9)[:150])
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("video-models")
    return {name: make(place / name) for name, make in BUILD.items()}


@pytest.fixture(scope="module", params=sorted(BUILD))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make_config(out: Path, name: str, folder: Path, source: Path, /, **changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "output_dir": str(out),
        "model": {"family": name, "pretrained": str(folder), "max_sequence_length": TOKENS},
        "data": {"format": "jsonl", "sources": [str(source)], "resolution": 32, "num_frames": FRAMES[name]},
        "cache": {"dtype": "float32", "shard_size": 3, "batch_size": 4, "workers": 1},
        "objective": {"name": "dpo", "beta_dpo": 500},
        "lora": {"rank": 4},
        "training": {"learning_rate": 1e-3, "train_batch_size": 2, "max_train_steps": 2, "cpu": True},
        "sampling": {"num_inference_steps": 2, "guidance_scale": 2.0},
        "evaluation": {"prompts": list(PROMPTS[:2]), "grid_prompts": 2},
    }
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values
    return build(tree)


def shape_of(file: Path) -> tuple[tuple[int, int], int]:
    """(width, height) and number of frames of an image file."""
    with Image.open(file) as image:
        return image.size, sum(1 for _ in ImageSequence.Iterator(image))


def rows_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def run(name: str, folders: dict[str, Path], clips: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Two steps of training, done."""
    config = make_config(tmp_path_factory.mktemp("run") / name, name, folders[name], clips)
    result = train(config)
    assert result.step == 2
    return config


def test_every_row_is_accounted_for(run: RunConfig) -> None:
    report = json.loads((Path(run.output_dir) / "data_report.json").read_text())
    assert (report["rows"], report["kept"]) == (9, 7)
    assert report["skipped"]["too_short"]["count"] == 1
    assert report["skipped"]["too_short"]["unusable"]
    assert "4 frames" in report["skipped"]["too_short"]["listed"][0]["detail"]
    assert report["skipped"]["undecodable"]["count"] == 1


def test_the_cache_holds_clips(name: str, run: RunConfig) -> None:
    cache = LatentCache(run.cache_dir)
    assert len(cache) == 7
    frames = 1 + (FRAMES[name] - 1) // 4
    assert {tuple(latent.shape) for i in range(7) for latent in cache.pair(i).latents} == {(4, frames, 4, 4)}
    family = load_family(run.model)
    uncached = replace(run, cache=replace(run.cache, enabled=False))
    live = prepare(uncached, family, Accelerator(cpu=True)).data  # type: ignore[arg-type]
    for i in range(7):
        for cached, encoded in zip(cache.pair(i).latents, live.pair(i).latents, strict=True):
            torch.testing.assert_close(cached, encoded, atol=1e-5, rtol=1e-4)


def test_training_starts_at_log_2_and_learns(run: RunConfig) -> None:
    rows = rows_of(Path(run.output_dir))
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert rows[1]["loss"] != rows[0]["loss"]
    assert rows[0]["grad_norm"] > 0


def test_grids_show_three_frames_and_the_clip(name: str, run: RunConfig) -> None:
    folder = Path(run.output_dir)
    for step in (0, 2):
        for i in range(2):
            still = folder / "samples" / f"step-{step:06d}" / f"{i:03d}.png"
            assert shape_of(still)[0] == (3 * 32, 32)
            assert shape_of(still.with_suffix(".webp")) == ((32, 32), FRAMES[name])
    page = write_report(folder).read_text()
    assert 'href="samples/step-000002/001.webp"' in page


def test_a_run_is_resumed(name: str, run: RunConfig, folders: dict[str, Path], clips: Path, tmp_path: Path) -> None:
    shared = {"dir": str(run.cache_dir)}
    one = make_config(tmp_path / "one", name, folders[name], clips, cache=shared, training={"max_train_steps": 1})
    train(one)
    more = {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    train(make_config(tmp_path / "one", name, folders[name], clips, cache=shared, training=more))
    ours, whole = rows_of(tmp_path / "one"), rows_of(Path(run.output_dir))
    assert [row["loss"] for row in ours] == [row["loss"] for row in whole]


def test_image_pairs_train_a_video_model(
    name: str, folders: dict[str, Path], pair_parquet: Path, tmp_path: Path
) -> None:
    data = {"format": "pickapic", "sources": [str(pair_parquet)], "num_frames": 1}
    config = make_config(
        tmp_path / "run", name, folders[name], pair_parquet, data=data, training={"max_train_steps": 1}
    )
    train(config)
    assert {tuple(latent.shape) for latent in LatentCache(config.cache_dir).pair(0).latents} == {(4, 1, 4, 4)}
    assert rows_of(tmp_path / "run")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert shape_of(tmp_path / "run" / "samples" / "step-000001" / "000.png")[0] == (32, 32)
    assert not list((tmp_path / "run" / "samples").rglob("*.webp"))


def test_clips_are_generated(name: str, run: RunConfig, tmp_path: Path) -> None:
    generate(run, prompts=["a circle"], adapter=None, with_base=False, seed=0, images_per_prompt=1, out=tmp_path)
    assert shape_of(tmp_path / "0000-0-base.png")[0] == (3 * 32, 32)
    assert shape_of(tmp_path / "0000-0-base.webp") == ((32, 32), FRAMES[name])


def test_the_number_of_sampled_frames_can_differ(name: str, run: RunConfig) -> None:
    family = load_family(run.model)
    sampling = SamplingConfig(num_inference_steps=1, guidance_scale=1.0, num_frames=1)
    sampler = Sampler(family, ["a circle"], sampling, 32, frames=FRAMES[name])
    assert sampler.latent_shape == (4, 1, 4, 4)
    family.load(NETWORK)
    assert sampler.images([0], seed=0).shape == (1, 3, 32, 32)


BRIGHTNESS = '''
"""How bright a picture is."""

import torch

from diffalign.rewards import Reward


class Brightness(Reward):
    """The mean over all pixels."""

    range, unit, differentiable, weights, licence, gap = (0.0, 1.0), "a share", True, None, "none", "none"

    def __init__(self, device="cpu", dtype=torch.float32):
        pass

    def __call__(self, images, prompts, metadata=None):
        assert images.ndim == 4
        return images.flatten(1).mean(1)
'''


def test_clips_are_sampled_for_training(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """D3PO on trajectories of clips, judged by their middle frames."""
    (tmp_path / "brightness.py").write_text(BRIGHTNESS)
    config = make_config(
        tmp_path / "run",
        name,
        folders[name],
        tmp_path,
        data={"sources": [], "format": "pickapic"},
        objective={"name": "d3po", "beta_dpo": None},
        rollout={
            "prompts": list(PROMPTS[:2]),
            "rewards": [str(tmp_path / "brightness.py")],
            "samples_per_prompt": 2,
            "num_inference_steps": 3,
        },
        evaluation={"prompts": []},
    )
    train(config)
    rows = rows_of(tmp_path / "run")
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)


# --- pieces ----------------------------------------------------------------------------------------------------------


class Brightness(Reward):
    """The mean of what it sees."""

    range, unit, differentiable, weights, licence, gap = (0.0, 1.0), "", True, None, "none", "none"

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.seen: tuple[int, ...] = ()

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: Any = None) -> torch.Tensor:
        self.seen = tuple(images.shape)
        return images.flatten(1).mean(1)


class Motion(Brightness):
    """The same on whole clips."""

    clips = True


def test_rewards_see_the_middle_frame_or_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffalign.plugins.name_of", lambda cls: cls.__name__.lower())
    clip = torch.arange(5, dtype=torch.uint8).mul(51).view(1, 1, 5, 1, 1).expand(2, 3, 5, 8, 8)
    assert torch.equal(stills(clip), clip[:, :, 2])
    image = clip[:, :, 0]
    assert stills(image) is image
    picture, motion = Brightness(), Motion()
    assert evaluate.score_all(picture, clip, ["a", "b"]).tolist() == pytest.approx([0.4, 0.4])
    assert picture.seen == (2, 3, 8, 8)
    assert evaluate.score_all(motion, clip / 2, ["a", "b"]).tolist() == pytest.approx([0.2, 0.2])
    assert motion.seen == (2, 3, 5, 8, 8)
    assert evaluate.score_all(motion, image, ["a", "b"]).tolist() == [0.0, 0.0]
    assert rewards.score(picture, clip / 255, ["a", "b"]).tolist() == pytest.approx([0.4, 0.4])
    with pytest.raises(rewards.RewardError, match=r"RGB \(B, 3, H, W\) expected"):
        rewards.score(motion, clip[:, 0] / 255, ["a", "b"])


def test_an_animation_plays_at_the_models_speed(tmp_path: Path) -> None:
    clip = torch.randint(0, 255, (3, 5, 16, 16), dtype=torch.uint8)
    save_png(clip, tmp_path / "a.png", frames_per_second=16)
    with Image.open(tmp_path / "a.png") as stills_HWC:
        strip = torch.from_numpy(np.array(stills_HWC)).movedim(-1, 0)
    assert torch.equal(strip, torch.cat([clip[:, 0], clip[:, 2], clip[:, 4]], dim=-1))
    with Image.open(tmp_path / "a.webp") as animation:
        animation.load()
        assert animation.info["duration"] == 62
        assert animation.info["loop"] == 0


@pytest.mark.parametrize(
    ("family", "section", "values", "message"),
    [
        ("wan", "data", {"num_frames": 8}, r"data\.num_frames: got 8; expected 1 \+ a multiple of 4, such as 5 or 9"),
        ("wan", "data", {"num_frames": 0}, r"data\.num_frames: got 0; expected 1 \+ a multiple of 4, such as 1$"),
        ("wan", "sampling", {"num_frames": 80}, r"sampling\.num_frames: got 80; .* such as 77 or 81"),
        ("cogvideox", "data", {"num_frames": 53}, r"expected 1 \+ a multiple of 8, such as 49 or 57"),
        ("wan", "data", {"frame_stride": 0}, r"data\.frame_stride: got 0; expected at least 1"),
        ("wan", "data", {"num_frames": 1, "frame_stride": 2}, r"frame_stride: got 2; .*data\.num_frames above 1"),
    ],
)
def test_frames_that_cannot_be_are_refused_before_anything_loads(
    family: str,
    section: str,
    values: dict[str, Any],
    message: str,
    folders: dict[str, Path],
    clips: Path,
    tmp_path: Path,
) -> None:
    config = make_config(tmp_path, family, folders[family], clips, **{section: values})
    with pytest.raises(ConfigError, match=message):
        preflight.check(config)


def test_image_families_take_no_clips(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got 5; this family makes still images, expected 1"):
        preflight.check(tiny_config(tmp_path, data={"num_frames": 5}))


def test_caches_of_images_stay_valid(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    family = load_family(ModelConfig(family="sdxl", pretrained=config.model.pretrained))
    made = fingerprint(config, family)  # type: ignore[arg-type]
    assert not {"num_frames", "frame_stride"} & made["data"].keys()
