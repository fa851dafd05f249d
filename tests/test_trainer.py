"""The trainer end to end on a tiny model: exact resume, invariances, outputs that load elsewhere, clean stops."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffalign import checkpoint, losses
from diffalign.config_loading import build, dump
from diffalign.errors import UserError
from diffalign.health import NonFiniteLossError
from diffalign.jobs.image import ImageJob
from diffalign.losses import DPO, Kind
from diffalign.metrics import read_rows
from diffalign.trainer import train

ROOT = Path(__file__).parent.parent


def config_tree(folder: Path, model: Path, data: Path, **changes: object) -> dict:
    """A small run; `changes` are `section__key=value`."""
    tree: dict = {
        "output_dir": str(folder),
        "seed": 3,
        "model": {"family": "sdxl", "pretrained": str(model)},
        "data": {"sources": [str(data)], "resolution": 32},
        "cache": {"dir": str(data.parent / "cache"), "dtype": "float32", "shard_size": 8},
        "objective": {"name": "dpo", "beta_dpo": 200.0},
        "lora": {"rank": 4, "targets": "attention"},
        "training": {"learning_rate": 1e-3, "train_batch_size": 4, "max_train_steps": 4, "cpu": True},
        "sampling": {"num_inference_steps": 2, "guidance_scale": 2.0, "batch_size": 4},
        "evaluation": {},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            tree[section][name] = value
        else:
            tree[section] = value
    return tree


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tiny_folder, pair_parquet):
    """(model folder, data folder); the cache is built once beside a copy of the data."""
    import shutil

    place = tmp_path_factory.mktemp("trainer")
    shutil.copytree(pair_parquet, place / "data")
    return tiny_folder, place / "data"


@pytest.fixture
def run(tmp_path, sources):
    def start(name: str = "run", **changes: object):
        return train(build(config_tree(tmp_path / name, *sources, **changes)))

    return start


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(list(checkpoint.steps_of(folder).values())[-1] / "adapter.safetensors")


def rows_of(folder: Path) -> list[dict]:
    timing = ("pairs_per_second", "seconds_per_step", "memory_gb")
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    return [{k: v for k, v in row.items() if k not in timing} for row in rows]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_near(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], start: float = 1e-5) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=start)


def command(config: Path, *words: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "diffalign", "train", str(config), *words]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def write_config(path: Path, tree: dict) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def test_the_first_step_starts_at_log_two_and_training_lowers_the_loss(run):
    result = run(training__max_train_steps=12, training__learning_rate=3e-3)
    rows = rows_of(result.run_dir)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["implicit_acc"] == 0.5
    assert rows[0]["logits/std"] == pytest.approx(0.0, abs=1e-6)
    late = rows[6:]
    assert sum(row["implicit_acc"] for row in late) / len(late) > 0.6
    assert sum(row["loss"] for row in late) / len(late) < math.log(2)
    assert rows[3]["samples"] == 16
    assert rows[-1]["error/rejected"] > 0
    assert sum(rows[0].get(f"t{i}/count", 0) for i in range(4)) == 4


def test_kill_nine_and_resume_equal_an_uninterrupted_run_bit_for_bit(run, tmp_path, sources):
    changes = {"training__checkpointing_steps": 2, "training__ema_decay": 0.9, "training__lr_warmup_steps": 3}
    whole = run("whole", **changes).run_dir
    tree = config_tree(tmp_path / "killed", *sources, **changes)
    config = write_config(tmp_path / "killed.yaml", tree | {"training": tree["training"] | {"max_train_steps": 500}})
    process = subprocess.Popen(command(config), env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    second = tmp_path / "killed" / "checkpoint-000002"
    deadline = time.monotonic() + 120
    while not second.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert second.exists(), "the run did not reach its second step"
    resumed = run("killed", **changes, training__resume_from_checkpoint="checkpoint-000002").run_dir
    a, b = (checkpoint.folder_for(folder, 4) for folder in (whole, resumed))
    assert_equal(load_file(a / "adapter.safetensors"), load_file(b / "adapter.safetensors"))
    states = [torch.load(path / "state.pt", weights_only=True) for path in (a, b)]
    flat = [torch.cat([v.flatten() for s in st["optimizer"]["state"].values() for v in s.values()]) for st in states]
    assert torch.equal(flat[0], flat[1])
    assert all(torch.equal(x, y) for x, y in zip(states[0]["ema"]["shadow_params"], states[1]["ema"]["shadow_params"]))
    assert states[0]["scheduler"]["last_epoch"] == states[1]["scheduler"]["last_epoch"]
    assert rows_of(whole) == rows_of(resumed)
    exported = [load_file(folder / "pytorch_lora_weights.safetensors") for folder in (whole, resumed)]
    assert_equal(*exported)


def test_accumulation_does_not_change_the_step(run):
    whole = run("whole", training__max_train_steps=3)
    split = run(
        "split", training__max_train_steps=3, training__train_batch_size=1, training__gradient_accumulation_steps=4
    )
    assert_near(adapter_of(whole.run_dir), adapter_of(split.run_dir))
    for a, b in zip(rows_of(whole.run_dir), rows_of(split.run_dir), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["implicit_acc"] == b["implicit_acc"]


def test_two_processes_equal_one(run, tmp_path, sources):
    one = run("one", training__max_train_steps=2)
    tree = config_tree(tmp_path / "two", *sources, training__max_train_steps=2, training__train_batch_size=2)
    config = write_config(tmp_path / "two.yaml", tree)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # What torchrun and accelerate launch set, without their own minute of start and stop.
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            command(config),
            env=environment() | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    messages = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], messages
    assert_near(adapter_of(one.run_dir), adapter_of(tmp_path / "two"))
    for a, b in zip(rows_of(one.run_dir), rows_of(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["samples"] == b["samples"]
        assert a["implicit_acc"] == b["implicit_acc"]
        assert {k: a[k] for k in a if k.endswith("/count")} == {k: b[k] for k in b if k.endswith("/count")}


def test_the_cache_and_the_uncached_path_train_the_same(run):
    cached = run("cached", training__max_train_steps=2)
    live = run("live", training__max_train_steps=2, cache__enabled=False)
    assert_near(adapter_of(cached.run_dir), adapter_of(live.run_dir))


def test_loader_processes_change_nothing(run):
    plain = run("plain", training__max_train_steps=2)
    ahead = run("ahead", training__max_train_steps=2, training__dataloader_workers=1)
    assert_equal(adapter_of(plain.run_dir), adapter_of(ahead.run_dir))


def test_gradient_checkpointing_changes_nothing(run):
    plain = run("plain", training__max_train_steps=2)
    lean = run("lean", training__max_train_steps=2, training__gradient_checkpointing=True)
    assert_near(adapter_of(plain.run_dir), adapter_of(lean.run_dir))


def test_bf16_keeps_the_adapter_in_float32_and_starts_at_log_two(run):
    result = run(training__mixed_precision="bf16", training__max_train_steps=2, cache__dir=None)
    assert rows_of(result.run_dir)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(tensor.dtype == torch.float32 for tensor in adapter_of(result.run_dir).values())


def test_sigterm_leaves_a_checkpoint_and_a_run_that_goes_on(run, tmp_path, sources):
    changes = {"training__checkpointing_steps": 0}
    tree = config_tree(tmp_path / "stopped", *sources, **changes)
    config = write_config(tmp_path / "stopped.yaml", tree | {"training": tree["training"] | {"max_train_steps": 5000}})
    process = subprocess.Popen(command(config), env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    while len(read_rows(metrics)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, message
    assert "resume_from_checkpoint=latest" in message
    assert "Traceback" not in message
    (step,) = checkpoint.steps_of(tmp_path / "stopped")
    assert step >= 2
    more = run("stopped", **changes, training__max_train_steps=step + 1, training__resume_from_checkpoint="latest")
    assert more.step == step + 1


def test_a_non_finite_loss_stops_with_the_samples_and_keeps_the_last_checkpoint(run, tmp_path, monkeypatch):
    original = DPO.__call__
    ids = []

    def poisoned(self, scores, layout, stats=None):
        out = original(self, scores, layout, stats)
        if len(ids) == 3:  # in the third micro-batch, whatever was rehearsed before anything loaded
            out.per_item.data[1] = float("nan")
        return out

    monkeypatch.setattr(DPO, "__call__", poisoned)
    original_loss = ImageJob.loss
    monkeypatch.setattr(ImageJob, "loss", lambda self, batch: ids.append(batch.ids) or original_loss(self, batch))
    with pytest.raises(NonFiniteLossError, match="step 3") as caught:
        run("bad", training__checkpointing_steps=2)
    assert caught.value.sample_ids == [ids[2][1]]
    assert "checkpoint-000002" in str(caught.value)
    checkpoint.verify(tmp_path / "bad" / "checkpoint-000002")


def test_a_used_folder_and_another_config_are_refused(run):
    run("used", training__max_train_steps=1)
    with pytest.raises(UserError, match="resume_from_checkpoint=latest"):
        run("used", training__max_train_steps=1)
    with pytest.raises(UserError, match=r"objective.beta was 200.0, is 100.0"):
        run("used", training__resume_from_checkpoint="latest", objective={"name": "dpo", "beta_dpo": 100.0})


def test_a_run_moves_to_other_hardware_but_not_to_another_effective_batch(run):
    run("moved", training__max_train_steps=2)
    whole = run("whole", training__max_train_steps=4)
    split = {"training__train_batch_size": 2, "training__gradient_accumulation_steps": 2}
    moved = run("moved", training__max_train_steps=4, training__resume_from_checkpoint="latest", **split)
    assert_near(adapter_of(whole.run_dir), adapter_of(moved.run_dir))
    with pytest.raises(UserError, match=r"effective batch was 4, is 8; set gradient_accumulation_steps"):
        run("moved", training__train_batch_size=8, training__resume_from_checkpoint="latest")


def test_resuming_on_other_pairs_is_refused(run, sources, tmp_path):
    run("pairs", training__max_train_steps=1)
    again = {"training__resume_from_checkpoint": "latest"}
    with pytest.raises(UserError, match=r"evaluation.held_out_fraction was 0.0, is 0.3"):
        run("pairs", **again, evaluation__held_out_fraction=0.3)
    import shutil

    import pyarrow.parquet as pq

    shutil.copytree(sources[1], tmp_path / "fewer")
    (file,) = (tmp_path / "fewer").glob("**/*.parquet")
    table = pq.read_table(file)
    pq.write_table(table.slice(0, len(table) - 2), file)
    with pytest.raises(UserError, match=r"pairs was \d+, is \d+; the training pairs must be the same"):
        run("pairs", **again, data__sources=[str(tmp_path / "fewer")], cache__dir=None)


def test_a_checkpoint_used_as_an_adapter_keeps_alpha_and_the_average(run):
    from diffalign import export
    from diffalign.adapters import delta_weights
    from diffalign.commands import load_adapter
    from diffalign.config_loading import load_config
    from diffalign.errors import CheckpointError
    from diffalign.families import NETWORK, load_family

    result = run(lora={"rank": 4, "alpha": 16.0}, training__ema_decay=0.5, training__max_train_steps=3)
    config = load_config(result.run_dir / "config.yaml")
    deltas = []
    for path in (result.run_dir, checkpoint.folder_for(result.run_dir, 3)):
        family = load_family(config.model)
        family.load(NETWORK)
        load_adapter(family, config, path)
        deltas.append(delta_weights(family.network))
    for name in deltas[0]:
        torch.testing.assert_close(deltas[0][name], deltas[1][name])
    with pytest.raises(CheckpointError, match="diffalign export"):
        export.load_lora(family.network, checkpoint.folder_for(result.run_dir, 3), family="sdxl")


def test_held_out_accuracy_works_with_several_image_sizes_and_without_prompts(tmp_path, sources):
    import io
    import random

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    def jpeg(width: int, height: int, seed: int) -> bytes:
        image = Image.effect_noise((width, height), 40 + seed).convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, "JPEG")
        return buffer.getvalue()

    rng = random.Random(0)
    rows = [
        {
            "caption": f"thing {i}",
            "jpg_0": jpeg(*size, i),
            "jpg_1": jpeg(*size, i + 20),
            "label_0": float(i % 2),
            "label_1": 1.0 - i % 2,
            "has_label": True,
        }
        for i, size in enumerate([rng.choice([(64, 64), (48, 96), (96, 48)]) for _ in range(24)])
    ]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "train-00000-of-00001.parquet")
    tree = config_tree(
        tmp_path / "run",
        sources[0],
        tmp_path / "data",
        data__resolution=64,
        data__buckets=True,
        training__max_train_steps=2,
        evaluation={"held_out_fraction": 0.4},
    )
    result = train(build(tree)).result
    assert result is not None
    assert result["held_out_pairs"] + result["pairs"] == 24
    assert "metric" not in result


def test_ema_is_what_is_exported(run):
    result = run(training__ema_decay=0.5, training__max_train_steps=3)
    last = adapter_of(result.run_dir)
    exported = load_file(result.run_dir / "pytorch_lora_weights.safetensors")
    shadow = torch.load(checkpoint.folder_for(result.run_dir, 3) / "state.pt", weights_only=True)["ema"][
        "shadow_params"
    ]
    assert len(shadow) == len(exported) == len(last)
    sums = sorted(float(t.double().sum()) for t in shadow)
    assert sums == pytest.approx(sorted(float(t.double().sum()) for t in exported.values()), abs=1e-6)
    assert sums != pytest.approx(sorted(float(t.double().sum()) for t in last.values()), abs=1e-6)


def test_sft_trains_without_a_reference(run):
    result = run(objective={"name": "sft"}, training__max_train_steps=3)
    rows = rows_of(result.run_dir)
    assert rows[0]["loss"] == rows[0]["error/chosen"]
    assert "implicit_acc" not in rows[0]


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "ipo", "beta": 200, "ipo_scale": "unit"},
        {"name": "robust_dpo", "beta": 200},
        {"name": "hinge", "beta": 200},
        {"name": "exo", "beta": 200},
        {"name": "nca", "beta": 200},
        {"name": "aot", "beta": 200},
        {"name": "kto", "beta": 200, "reference_point": "batch"},
        {"name": "npo", "beta": 200},
        {"name": "mapo"},
        {"name": "dpop", "beta": 200},
    ],
    ids=lambda objective: objective["name"],
)
def test_objectives_of_the_core_train_on_denoising_scores(run, objective):
    """What the core says to mean something on denoising errors runs through the same trainer, and moves the adapter."""
    result = run(objective=objective, training__max_train_steps=2)
    rows = rows_of(result.run_dir)
    initial = build_objective(objective).initial_loss(Kind.BOUND)
    if initial is not None:
        assert rows[0]["loss"] == pytest.approx(initial, abs=1e-5)
    assert all(row["grad_norm"] > 0 for row in rows)


def build_objective(section):
    rest = {k: v for k, v in section.items() if k != "name"}
    return losses.find(section["name"])(**rest)


@pytest.mark.parametrize(
    ("objective", "why"),
    [
        ({"name": "orpo"}, r"'orpo' on bound scores: .*normalised probability.*mapo"),
        ({"name": "simpo"}, r"'simpo' on bound scores: .*mapo"),
        ({"name": "ipo", "beta": 2000}, r"'ipo' on bound scores: .*ipo_scale: unit"),
        ({"name": "ipo", "ipo_scale": "unit"}, r"beta has no default.*2000 to 5000"),
        ({"name": "grpo"}, r"needs groups; image data sets have pairs; sample groups: set rollout\.rewards"),
        ({"name": "tdpo1"}, r"'tdpo1' on bound scores: .*vocabulary"),
        ({"name": "discopop", "beta": 2000, "tau": 0.05}, r"'discopop' on bound scores"),
        ({"name": "plackett_luce", "beta": 2000}, r"needs lists; image data sets have pairs"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_objectives_that_mean_nothing_on_denoising_scores_are_refused_at_start(run, tmp_path, objective, why):
    with pytest.raises(UserError, match=why):
        run(objective=objective)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, sources):
    """A finished run with evaluation, report and model card."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    tree = config_tree(
        folder,
        Path("tiny-sdxl"),
        sources[1],
        cache={"dtype": "float32", "batch_size": 16},
        lora={"rank": 4, "alpha": 8.0, "targets": "all"},
        training={
            "learning_rate": 5e-3,
            "train_batch_size": 4,
            "max_train_steps": 4,
            "sample_steps": 2,
            "cpu": True,
        },
        evaluation={
            "at_end": True,
            "prompts": "world_heldout",
            "num_prompts": 6,
            "images_per_prompt": 2,
            "rewards": ["world_verifier", "world_taste:outlined"],
            "held_out_fraction": 0.3,
            "grid_prompts": 3,
        },
    )
    return train(build(tree))


def test_result_json_has_the_agreed_keys_and_consistent_numbers(evaluated):
    result = json.loads((evaluated.run_dir / "result.json").read_text())
    keys = {"metric", "base_mean", "aligned_mean", "win_rate", "win_rate_ci95", "steps", "pairs", "seconds_per_step"}
    assert keys | {"train_seconds"} <= result.keys()
    assert result["metric"] == "world_verifier"
    assert result["gain"] == pytest.approx(result["aligned_mean"] - result["base_mean"], abs=1e-6)
    assert result["win_rate_ci95"][0] <= result["win_rate"] <= result["win_rate_ci95"][1]
    assert result["steps"] == 4
    assert result["held_out_pairs"] > 0
    scores = json.loads((evaluated.run_dir / "scores.json").read_text())["world_verifier"]
    assert [len(row) for row in scores["base"]] == [2] * 6
    mean = sum(sum(row) for row in scores["base"]) / 12
    assert mean == pytest.approx(result["base_mean"], abs=1e-6)


def test_held_out_pairs_are_not_trained_on(evaluated):
    result = json.loads((evaluated.run_dir / "result.json").read_text())
    report = json.loads((evaluated.run_dir / "data_report.json").read_text())
    assert result["pairs"] + result["held_out_pairs"] == report["kept"]


def test_grids_show_the_same_prompts_before_during_and_after(evaluated):
    index = json.loads((evaluated.run_dir / "samples" / "index.json").read_text())
    assert index["steps"] == [0, 2, 4]
    for step in index["steps"]:
        assert len(index["files"][str(step)]) == len(index["prompts"]) == 3
        assert all((evaluated.run_dir / name).is_file() for name in index["files"][str(step)])
    assert "<html" in (evaluated.run_dir / "report.html").read_text()


def test_an_adapter_can_be_given_to_the_negative_branch_alone(evaluated, tmp_path):
    from dataclasses import replace

    from diffalign.commands import generate
    from diffalign.config_loading import load_config
    from diffalign.errors import ConfigError
    from diffalign.sampling.guidance import NegativeGuidance
    from diffalign.schedules import generator_for
    from diffalign.world.bases import load_pipeline

    config = load_config(evaluated.run_dir / "config.yaml")
    prompt, settings = (
        "a large red circle on a white background",
        {"with_base": True, "seed": 5, "images_per_prompt": 1},
    )
    adapter = evaluated.run_dir

    def images(out, **more):
        generate(config, prompts=[prompt], out=tmp_path / out, **settings, **more)
        return [read_image(tmp_path / out / f"0000-0-{side}.png") for side in ("guided", "base")]

    guided, base = images("negative", adapter=None, negative_adapter=adapter)
    nothing, _ = images("nothing", adapter=None, negative_adapter=adapter, beta=0.0)
    assert torch.equal(nothing, base)
    both, _ = images("both", adapter=adapter, negative_adapter=adapter, alpha=0.5, beta=0.5)
    positive = generate(config, prompts=[prompt], out=tmp_path / "positive", adapter=adapter, **settings)
    torch.testing.assert_close(
        both, read_image(positive / "0000-0-adapter.png"), rtol=0, atol=1.01 / 255
    )  # half and half

    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(20, 8, 8, generator=generator_for(5, "prompt 0", 0))[None]
    with NegativeGuidance(pipeline, adapter / "pytorch_lora_weights.safetensors"):
        theirs = pipeline(
            prompt,
            latents=noise,
            height=32,
            width=32,
            num_inference_steps=config.sampling.num_inference_steps,
            guidance_scale=config.sampling.guidance_scale,
            output_type="pt",
        ).images[0]
    torch.testing.assert_close(guided, theirs, rtol=0, atol=1.01 / 255)
    assert (guided - base).abs().max() > 2 / 255
    plain = replace(config, sampling=replace(config.sampling, guidance_scale=1.0))
    with pytest.raises(ConfigError, match="guidance_scale is 1"):
        generate(plain, prompts=[prompt], out=tmp_path / "off", adapter=None, negative_adapter=adapter, **settings)


def test_the_saved_lora_gives_the_same_images_in_a_plain_pipeline(evaluated):
    from diffalign.commands import generate
    from diffalign.config_loading import load_config
    from diffalign.schedules import generator_for
    from diffalign.world.bases import load_pipeline

    config = load_config(evaluated.run_dir / "config.yaml")
    prompt = "a large red circle on a white background"
    out = generate(
        config,
        prompts=[prompt],
        adapter=evaluated.run_dir,
        with_base=True,
        seed=5,
        images_per_prompt=1,
        out=evaluated.run_dir / "images",
    )
    ours, base = (read_image(out / f"0000-0-{side}.png") for side in ("adapter", "base"))
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(evaluated.run_dir), weight_name="pytorch_lora_weights.safetensors")
    noise = torch.randn(20, 8, 8, generator=generator_for(5, "prompt 0", 0))[None]
    theirs = pipeline(
        prompt,
        latents=noise,
        height=32,
        width=32,
        num_inference_steps=2,
        guidance_scale=2.0,
        negative_prompt="",
        output_type="pt",
    ).images[0]
    assert (ours - theirs).abs().max() < 1.01 / 255
    assert (base - theirs).abs().max() > 0.02


def read_image(path: Path) -> torch.Tensor:
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

    return to_tensor(Image.open(path))


def test_the_model_cards_snippet_runs(evaluated):
    card = (evaluated.run_dir / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)[:1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", snippet],
        env=environment(),
        cwd=evaluated.run_dir,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_evaluating_the_exported_adapter_again_gives_the_same_numbers(evaluated, tmp_path):
    from diffalign.commands import evaluate_adapter
    from diffalign.config_loading import load_config

    config = load_config(evaluated.run_dir / "config.yaml")
    again = evaluate_adapter(config, evaluated.run_dir, tmp_path / "again.json")
    first = json.loads((evaluated.run_dir / "result.json").read_text())
    assert again["base_mean"] == pytest.approx(first["base_mean"], abs=1e-5)
    assert again["aligned_mean"] == pytest.approx(first["aligned_mean"], abs=1e-3)
    assert again["win_rate"] == pytest.approx(first["win_rate"], abs=0.1)


def test_the_resolved_config_can_be_run_again(evaluated):
    from diffalign.config_loading import load_config

    text = (evaluated.run_dir / "config.yaml").read_text()
    assert dump(load_config(evaluated.run_dir / "config.yaml")) == text


@pytest.mark.slow
def test_one_step_of_the_full_sdxl_architecture_on_the_cpu(tmp_path, pair_parquet):
    """Random weights, bf16, 256 px, through the ordinary trainer: about 15 GB and some minutes on two cores."""
    tree = config_tree(
        tmp_path / "run",
        Path("sdxl"),
        pair_parquet,
        model__random_weights=True,
        data__resolution=256,
        data__max_pairs=2,
        cache={"dir": str(tmp_path / "cache"), "batch_size": 1},
        training={
            "learning_rate": 1e-5,
            "train_batch_size": 1,
            "max_train_steps": 1,
            "mixed_precision": "bf16",
            "gradient_checkpointing": True,
            "cpu": True,
        },
    )
    result = train(build(tree))
    (row,) = rows_of(result.run_dir)
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert row["grad_norm"] > 0
    tensors = adapter_of(result.run_dir)
    assert len(tensors) == 2 * 560
    assert max(float(t.abs().max()) for name, t in tensors.items() if "lora_B" in name) > 0
