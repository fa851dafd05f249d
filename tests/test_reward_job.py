"""Training a reward model end to end on the tiny CLIP: every head, ties, exact resume, what is written, what is refused."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffalign import checkpoint, commands, preflight, rewards
from diffalign._plan_rewards import plan_reward, render
from diffalign.config_loading import build
from diffalign.errors import DataError, UserError
from diffalign.jobs.reward import RewardJob, decided_mean
from diffalign.judges import load_judge
from diffalign.metrics import read_rows
from diffalign.reward_math import load_statistics
from diffalign.trainer import train
from diffalign.world.names import base_folder
from diffalign.world.scenes import Style, compose, draw, parse_caption, sample_captions


def tree(folder: Path, data: Path, **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": 3,
        "model": {"family": "clip_reward", "pretrained": "tiny-clip"},
        "data": {"format": "jsonl", "sources": [str(data)], "resolution": 32, "ties": "soft"},
        "cache": {"dir": str(data.parent / "cache"), "dtype": "float32", "workers": 1},
        "objective": {"name": "pickscore"},
        "judge": {},
        "lora": {"rank": 4, "targets": "attention"},
        "training": {"learning_rate": 3e-3, "train_batch_size": 8, "max_train_steps": 4, "cpu": True},
        "evaluation": {"held_out_fraction": 0.3},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            made[section][name] = value
        else:
            made[section] = value
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pairs: of a caption once outlined and once plain, the outlined one preferred; every eighth pair is a tie."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("outlined")
    rng = random.Random(0)
    rows = []
    for i, caption in enumerate(sample_captions(48, seed=5)):
        styles = [Style(outline=True), Style()]
        first = rng.randrange(2)
        scenes = [compose(parse_caption(caption), rng, styles[side ^ first]) for side in (0, 1)]
        names = []
        for side, image in enumerate(draw(scenes)):
            pixels = (image * 255).round().byte().movedim(0, -1).numpy()
            Image.fromarray(pixels).save(folder / f"{i}-{side}.png")
            names.append(f"{i}-{side}.png")
        p = 0.5 if i % 8 == 7 else float(first == 0)
        rows.append(
            {
                "prompt": caption,
                "image_0": names[0],
                "image_1": names[1],
                "label_0": p,
                "label_1": 1 - p,
                "aspect": i % 2,
            }
        )
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def test_it_learns_a_taste_and_the_reward_loads_by_name(tmp_path, data):
    result = train(
        build(
            tree(
                tmp_path / "run",
                data,
                training__max_train_steps=30,
                evaluation__rewards=["world_taste:outlined@1"],
                evaluation__every=15,
            )
        )
    ).result
    assert result["held_out_accuracy"] > result["held_out_accuracy_before"]
    assert result["held_out_accuracy"] > 0.9
    low, high = result["held_out_accuracy_ci95"]
    assert low <= result["held_out_accuracy"] <= high
    assert result["held_out_ties"] > 0
    assert result["other_rewards"][0]["accuracy"] == 1.0
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["judge/accuracy"] > rows[0]["judge/accuracy"]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [15, 30]
    assert rows[-1]["eval/accuracy"] == pytest.approx(result["held_out_accuracy"])

    reward = rewards.load(f"trained:{tmp_path / 'run'}")
    caption = "a large red circle on a white background"
    rng = random.Random(1)
    images = draw([compose(parse_caption(caption), rng, Style(outline=outline)) for outline in (True, False)])
    outlined, plain = rewards.score(reward, images, [caption] * 2)
    assert outlined > plain
    known = load_statistics(tmp_path / "run" / "reward" / "statistics.json", "trained")
    assert known.mean == pytest.approx(result["statistics"]["mean"])
    assert "trained:." in (tmp_path / "run" / "README.md").read_text()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Held-out accuracy" in page
    assert "Calibration" in page


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"objective": {"name": "bradley_terry"}, "data__ties": "drop"}, marks=pytest.mark.slow),
        {"objective": {"name": "bradley_terry_ties"}},
        {
            "judge": {"head": "aspects", "outputs": 2, "tuning": "head"},
            "lora": {},
            "training__learning_rate": 0.1,  # embeddings are unit vectors, of which a linear head sees little
        },
        {"judge": {"head": "general", "outputs": 2}, "objective": {"name": "general_preference"}},
        {"judge": {"head": "experts", "outputs": 3, "criteria": [1, 2], "gate_width": 16}},
        pytest.param(
            {"judge": {"tuning": "full"}, "lora": {}, "training__learning_rate": 3e-4}, marks=pytest.mark.slow
        ),
    ],
    ids=["bradley_terry", "ties", "aspects", "general", "experts", "full"],
)
def test_every_loss_and_head_lowers_its_loss_and_can_be_loaded(tmp_path, data, changes):
    changes = changes | {"cache__dir": str(tmp_path / "cache"), "training__max_train_steps": 12}
    train(build(tree(tmp_path / "run", data, **changes)))
    losses = [row["loss"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert sum(losses[-3:]) < sum(losses[:3])
    scores = rewards.score(rewards.load(f"trained:{tmp_path / 'run'}"), torch.rand(2, 3, 32, 32), ["a red circle"] * 2)
    assert scores.isfinite().all()


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, data):
    judge = {"head": "aspects", "outputs": 2}
    whole = tree(tmp_path / "whole", data, judge=judge, training__ema_decay=0.9)
    train(build(whole))
    half = tree(tmp_path / "half", data, judge=judge, training__ema_decay=0.9)
    half["training"] |= {"max_train_steps": 2}
    train(build(half))
    half["training"] |= {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    train(build(half))
    one, other = (checkpoint.load(tmp_path / name / "checkpoint-000004", build(whole)) for name in ("whole", "half"))
    assert any("judge_head" in key for key in one.adapter)
    for key, value in one.adapter.items():
        assert torch.equal(value, other.adapter[key]), key


def test_an_earlier_reward_is_tuned_on_with_its_head(tmp_path, data):
    judge = {"head": "aspects", "outputs": 2, "aspect_weights": [3, 1]}
    train(build(tree(tmp_path / "first", data, judge=judge)))
    again = tree(tmp_path / "second", data, model__pretrained=str(tmp_path / "first"), training__max_train_steps=1)
    again["training"]["learning_rate"] = 0.0
    train(build(again))
    images, prompts = torch.rand(3, 3, 32, 32), ["a red circle"] * 3
    first, second = (
        rewards.score(rewards.load(f"trained:{tmp_path / name}"), images, prompts) for name in ("first", "second")
    )
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_frozen_weights_stay_as_they_are(tmp_path, data):
    train(build(tree(tmp_path / "run", data, judge={"head": "aspects", "outputs": 2, "tuning": "head"}, lora={})))
    before, after = load_judge(base_folder("tiny-clip")), load_judge(tmp_path / "run" / "reward")
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]), name
    assert after.judge_head.weight.abs().max() > 0


def test_aspects_beyond_the_heads_are_refused(tmp_path, data):
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for i, line in enumerate(lines):
        line["aspect"] = i % 3
    three = data.parent / "three.jsonl"
    three.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = tree(tmp_path / "run", three, judge={"head": "aspects", "outputs": 2}, cache__dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"judge.outputs is 2, and 16 pairs are about aspects up to 2"):
        train(build(made))


def test_pairs_about_a_criterion_train_it_and_the_others_the_gated_score(tmp_path, data, monkeypatch):
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for i, line in enumerate(lines):
        line["aspect"] = i % 3
        if line["aspect"] == 2:
            del line["aspect"]
    some = data.parent / "some.jsonl"
    some.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = []
    original = RewardJob.loss

    def loss(self, batch):
        out = original(self, batch)
        with torch.no_grad():
            seen.append((batch, self._judge(self.bare, batch), out))
        return out

    monkeypatch.setattr(RewardJob, "loss", loss)
    judge = {"head": "experts", "outputs": 2, "gate_width": 16, "criteria_weight": 0.25}
    more = {"objective": {"name": "bradley_terry"}, "cache__dir": str(tmp_path / "cache")}
    result = train(build(tree(tmp_path / "run", some, judge=judge, **more))).result
    batch, judged, out = seen[1]
    assert set(batch.aspect.tolist()) == {-1, 0, 1}
    count = len(batch.ids)
    for i, aspect in enumerate(batch.aspect.tolist()):
        of = judged.overall if aspect < 0 else judged.scores[:, aspect]
        z, p = float(of[i] - of[i + count]), float(batch.p[i])
        wanted = p * math.log1p(math.exp(-z)) + (1 - p) * math.log1p(math.exp(z))
        assert float(out.per_item[i].detach()) == pytest.approx(
            (1.0 if aspect < 0 else 0.25) * wanted, rel=1e-3, abs=1e-5
        )
    found = [result["held_out_accuracy_overall"], *result["held_out_accuracy_by_aspect"]]
    assert all(rate is None or 0 <= rate <= 1 for rate in found)
    assert found[0] is not None
    assert decided_mean(np.array([1.0, np.nan, 0.0, 1.0])) == pytest.approx(2 / 3)
    assert decided_mean(np.array([np.nan])) is None
    assert "the gated score" in (tmp_path / "run" / "report.html").read_text()


# ---------------------------------------------------------------- refusals and plan


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": {"name": "dpo"}}, "objective 'dpo' on judge scores: .*use 'bradley_terry'"),
        ({"data__resolution": 64}, "data.resolution: got 64; the vision tower of 'tiny-clip' looks at 32"),
        ({"objective": {"name": "bradley_terry_ties"}, "data__ties": "drop"}, "data.ties: drop"),
        ({"judge": {"head": "general", "outputs": 2}}, "belong together"),
        ({"objective": {"name": "general_preference"}}, "needs head: general"),
        ({"judge": {"outputs": 3}}, "only heads 'aspects', 'general' and 'experts'"),
        ({"judge": {"head": "experts"}}, "got 1; gates weigh at least 2 criteria"),
        ({"judge": {"head": "experts", "outputs": 5, "criteria": [2, 2]}}, r"criteria: got \[2, 2\], .*outputs is 5"),
        ({"judge": {"head": "experts", "outputs": 2, "criteria": [2, 0]}}, "adding up to it"),
        ({"judge": {"head": "experts", "outputs": 2, "gate_temperature": 0}}, "gate_temperature: got 0.0; .*positive"),
        ({"judge": {"head": "experts", "outputs": 2, "aspect_weights": [1, 1]}}, "give one for each aspect, or none"),
        ({"judge": {"head": "aspects", "outputs": 2, "criteria": [1, 1]}}, "only head 'experts' reads"),
        ({"judge": {"gate_width": 8}}, "judge.gate_width: got 8, which only head 'experts' reads"),
        ({"judge": {"head": "aspects", "outputs": 2, "aspect_weights": [1]}}, "give one for each aspect"),
        ({"judge": {"tuning": "head"}}, "the cosine has none"),
        ({"judge": {"tuning": "full"}}, "lora: has no effect"),
        ({"judge": {"logit_scale": True}}, "full tuning only"),
        (
            {
                "judge": {"logit_scale": True, "tuning": "full", "head": "general", "outputs": 2},
                "lora": {},
                "objective": {"name": "general_preference"},
            },
            "reads no cosine",
        ),
        ({"evaluation": {"rewards": ["world_clip"]}}, "held_out_fraction is 0"),
        ({"evaluation": {"every": 5}}, "evaluation.every: it is about held-out pairs"),
        ({"evaluation": {"at_end": True}}, "evaluation.at_end: has no effect"),
        ({"denoising": {"timestep_min": 3}}, "denoising: has no effect"),
        ({"data__flip": True, "data__buckets": True}, "data.buckets: has no effect"),
        ({"rollout": {"rewards": ["world_clip"]}}, "rollout: has no effect"),
        ({"sampling": {"num_inference_steps": 3}}, "sampling: has no effect"),
        ({"training__train_batch_size": "auto"}, "'auto' batch size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_run_is_refused_with_the_key_and_what_to_do(tmp_path, data, changes, said):
    with pytest.raises(UserError, match=said):
        preflight.check(build(tree(tmp_path / "run", data, **changes)))


def test_the_section_of_reward_models_is_refused_elsewhere(tmp_path, data):
    made = tree(tmp_path / "run", data, judge={"head": "general", "outputs": 2}, objective={"name": "dpo"})
    made["model"] = {"family": "sdxl", "pretrained": "tiny-sdxl"}
    with pytest.raises(UserError, match="judge: has no effect on family 'sdxl'"):
        preflight.check(build(made))


def test_commands_that_need_a_generator_say_so_and_cache_works(tmp_path, data):
    config = build(tree(tmp_path / "run", data))
    assert commands.build_cache(config).startswith("48 pairs")
    with pytest.raises(UserError, match="'clip_reward' trains reward models; this needs a model that makes images"):
        commands.generate(
            config,
            prompts=["a red circle"],
            adapter=None,
            with_base=False,
            seed=0,
            images_per_prompt=1,
            out=tmp_path / "out",
        )


def test_half_precision_towers_train_their_adapter_in_float32(tmp_path, data):
    judge = {"head": "aspects", "outputs": 2}
    more = {"training__mixed_precision": "bf16", "training__max_train_steps": 2, "cache__dir": str(tmp_path / "cache")}
    made = tree(tmp_path / "run", data, judge=judge, **more)
    train(build(made))
    state = checkpoint.load(tmp_path / "run" / "checkpoint-000002", build(made)).adapter
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(value.isfinite().all() for value in state.values())
    written = load_file(tmp_path / "run" / "reward" / "model.safetensors")
    assert written["visual_projection.weight"].dtype == torch.bfloat16


def test_plan_counts_what_is_trained(tmp_path, data):
    plan = plan_reward(build(tree(tmp_path / "run", data, judge={"head": "aspects", "outputs": 2})), gpu_gb=2)
    assert plan.parameters["head"] == 3 * 128 * 2 + 2
    assert plan.trained > plan.parameters["head"]
    assert plan.fits
    assert "clip" in render(plan)
    full = plan_reward(build(tree(tmp_path / "run", data, judge={"tuning": "full"}, lora={})))
    assert full.trained == sum(full.parameters.values()) + 1  # and the logit scale
