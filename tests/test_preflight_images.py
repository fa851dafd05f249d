"""What runs on sampled images would not read, or cannot do, is refused before anything loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers import DDPMScheduler
from PIL import Image

from diffalign import preflight
from diffalign._preflight_images import UNREAD
from diffalign.config import RunConfig
from diffalign.config_loading import build, load_config
from diffalign.errors import ConfigError
from diffalign.losses.diffusion.ddpo import DDPO
from diffalign.losses.policy_gradient import RLOO
from diffalign.schedules import Schedule
from diffalign.trainer import train

REWARD = "world_verifier"
# One objective for every way in which images are sampled, with what it needs.
WAYS: dict[str, dict[str, Any]] = {
    "trajectories": {"objective": {"name": "d3po"}},
    "candidates": {"objective": {"name": "spo"}},
    "pairs": {"objective": {"name": "dpo", "beta": 100.0}},
    "chosen": {"objective": {"name": "sft"}},
    "groups": {"objective": {"name": "gdpo", "beta": 30.0}},
    "generated": {"objective": {"name": "seppo", "beta": 30.0}},
    "on_policy": {"objective": {"name": "dro"}},
}
FROM_DATA = ("generated", "on_policy")
TRANSITIONS = ("trajectories", "candidates")


def config_of(way: str, folder: Path, **changes: Any) -> RunConfig:
    from_data = way in FROM_DATA
    tree: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "model": {"family": "sdxl", "pretrained": "tiny-sdxl"},
        "data": {"sources": [str(folder)] if from_data else [], "resolution": 32},
        "rollout": {} if from_data else {"prompts": ["a", "b"], "rewards": [REWARD], "samples_per_prompt": 4},
        "training": {"train_batch_size": 8},
    }
    for section, values in (WAYS[way] | changes).items():
        tree[section] = values if section == "objective" else tree.get(section, {}) | values
    return build(tree)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_sample_passes_as_it_is(way: str, tmp_path: Path) -> None:
    preflight.check(config_of(way, tmp_path))


DENOISING: dict[str, Any] = {
    "timestep_min": 100,
    "timestep_max": 900,
    "timestep_sampling": "logit_normal",
    "logit_mean": 1.0,
    "logit_std": 2.0,
    "noise": "independent",
    "noising": "ddim_inversion",
    "inversion_steps": 3,
    "inversion_noise": 1.0,
    "inversion_level": "grid",
    "error_space": "epsilon",
    "error_reduction": "sum",
    "proportion_empty_prompts": 0.1,
}
# (section, key, value, ways that do not read it)
IGNORED: list[tuple[str, str, Any, tuple[str, ...]]] = [
    *(("denoising", name, value, TRANSITIONS) for name, value in DENOISING.items()),
    *(("denoising", name, DENOISING[name], ("on_policy",)) for name in ("timestep_min", "timestep_max", "noise")),
    ("denoising", "proportion_empty_prompts", 0.1, ("pairs", "chosen", "groups")),
    ("rollout", "num_prompts", 3, FROM_DATA),
    ("rollout", "samples_per_prompt", 4, FROM_DATA),
    ("evaluation", "held_out_fraction", 0.1, ("pairs", "trajectories")),
    ("rollout", "steps_per_sample", 2, ("pairs", "chosen", "groups", "generated")),
    ("rollout", "first_step", 1, ("pairs", "chosen", "groups", *FROM_DATA)),
    ("rollout", "select", "bradley_terry", ("pairs", "groups", *TRANSITIONS, *FROM_DATA)),
    ("rollout", "select_temperature", 0.5, ("pairs", "groups", *TRANSITIONS, *FROM_DATA)),
    ("rollout", "shared_start", False, ("pairs", "chosen", "groups", "candidates", *FROM_DATA)),
    ("rollout", "history", 16, ("pairs", "chosen", "candidates", "trajectories", *FROM_DATA)),
    ("rollout", "history_min", 8, ("pairs", "groups")),
    ("rollout", "reward_scale", 2.0, ("pairs", "chosen", "groups", "trajectories", *FROM_DATA)),
    ("rollout", "keep_threshold", 0.5, ("pairs", "chosen", "groups", "trajectories", *FROM_DATA)),
]


@pytest.mark.parametrize(
    ("way", "section", "key", "value"),
    [(way, section, key, value) for section, key, value, ways in IGNORED for way in ways],
)
def test_what_a_run_would_not_read_is_refused(way: str, section: str, key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{section}\.{key}: got .*no effect.*; remove it"):
        preflight.check(config_of(way, tmp_path, **{section: {key: value}}))


@pytest.mark.parametrize(
    ("way", "changes"),
    [
        ("on_policy", {"rollout": {"steps_per_sample": 4}}),
        ("trajectories", {"rollout": {"steps_per_sample": 4, "shared_start": False}}),
        ("candidates", {"rollout": {"first_step": 1, "reward_scale": 10, "keep_threshold": 0.5}}),
        ("chosen", {"rollout": {"select": "bradley_terry", "select_temperature": 0.1, "num_prompts": 1}}),
        ("generated", {"denoising": {"proportion_empty_prompts": 0.1, "timestep_min": 10}}),
        ("generated", {"evaluation": {"held_out_fraction": 0.1}}),
        ("pairs", {"denoising": {"timestep_min": 10, "noise": "independent", "error_space": "epsilon"}}),
        ("pairs", {"evaluation": {"held_out_fraction": 0.0}}),
    ],
)
def test_what_a_run_reads_may_be_set(way: str, changes: dict[str, Any], tmp_path: Path) -> None:
    preflight.check(config_of(way, tmp_path, **changes))


def test_a_history_of_rewards_leaves_nothing_to_other_baselines(tmp_path: Path) -> None:
    objective = {"name": "ddpo", "center": "mean"}
    with pytest.raises(ConfigError, match=r"objective\.center: got 'mean'.*no effect.*rollout\.history"):
        preflight.check(config_of("groups", tmp_path, objective=objective, rollout={"history": 16}))
    rloo = {"name": "rloo", "beta": 0.0, "normalize_advantages": True}
    with pytest.raises(ConfigError, match=r"normalize_advantages: got True.*no effect"):
        preflight.check(config_of("groups", tmp_path, objective=rloo, rollout={"history": 16}))
    for count in (1, 4):  # it needs no groups
        changes = {"history": 16, "samples_per_prompt": count}
        preflight.check(config_of("groups", tmp_path, objective={"name": "ddpo"}, rollout=changes))


@pytest.mark.parametrize(
    ("objective", "why"),
    [
        ({"name": "dgpo"}, "mean within a prompt is free"),
        ({"name": "crd"}, "mean within a prompt is free"),
        ({"name": "ddpo", "aggregate": "normalize_then_sum"}, "sum_then_normalize"),
        ({"name": "grpo", "beta": 0.1, "kl_in": "reward"}, "no divergence is in the reward"),
    ],
)
def test_a_history_is_refused_where_it_means_something_else(
    objective: dict[str, Any], why: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"rollout\.history: got 16, which has no effect: .*{why}"):
        preflight.check(config_of("groups", tmp_path, objective=objective, rollout={"history": 16}))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"name": "gdpo", "beta": 30.0}, "normalises every reward by itself"),
        ({"name": "grpo", "aggregate": "normalize_then_sum"}, "normalises every reward by itself"),
        ({"name": "ddpo", "reward_weights": [1.0]}, "beside objective.reward_weights"),
        ({"name": "ddpo"}, None),
        ({"name": "prdp"}, None),
        ({"name": "raft"}, None),
    ],
)
def test_weights_that_would_be_lost_are_refused(objective: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    config = config_of("groups", tmp_path, objective=objective, rollout={"reward_weights": [0.5]})
    if message is None:
        preflight.check(config)
        return
    with pytest.raises(ConfigError, match=rf"rollout\.reward_weights: .*{message}"):
        preflight.check(config)


@pytest.mark.parametrize(
    ("way", "changes", "message"),
    [
        ("candidates", {}, r"'mmd:.*compares all images of a call, and objective 'spo' scores them one by one"),
        ("draft", {"rollout": {"decode_batch_size": 1}}, r"decode_batch_size: got 1; reward 'mmd:"),
        ("draft", {"rollout": {"decode_batch_size": 7}}, r"of training\.train_batch_size 8 one would be left alone"),
        ("draft", {"evaluation": {"rewards": ["mmd:FOLDER"]}}, r"evaluation: reward 'mmd:.*one number of a whole set"),
        ("draft", {"objective": {"link": "hinge", "target": 1.0}}, r"objective\.link: got 'hinge'.*take linear"),
        ("groups", {"sampling": {"batch_size": 6}}, r"sampling\.batch_size: got 6; reward 'mmd:.*multiple of.*4"),
        ("draft", {}, None),
        ("groups", {}, None),
    ],
)
def test_a_reward_of_sets_is_taken_where_sets_are_scored(
    way: str, changes: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    reward = f"mmd:{tmp_path}:tiny-clip"
    rollout: dict[str, Any] = {"rewards": [reward]} | changes.get("rollout", {})
    if way == "draft":
        rollout |= {"prompts": ["a", "b"]}
    tree: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "model": {"family": "sdxl", "pretrained": "tiny-sdxl"},
        "data": {"resolution": 32},
        "objective": {"name": "draft"} | changes.get("objective", {}) if way == "draft" else WAYS[way]["objective"],
        "sampling": changes.get("sampling", {}),
        "rollout": rollout if way == "draft" else {"prompts": ["a", "b"], "samples_per_prompt": 4} | rollout,
        "training": {"train_batch_size": 8},
        "evaluation": {"rewards": [reward]} if "evaluation" in changes else {},
    }
    if message is None:
        preflight.check(build(tree))
        return
    with pytest.raises(ConfigError, match=message):
        preflight.check(build(tree))


def test_the_table_names_keys_that_there_are() -> None:
    for entry in UNREAD:
        sections = (
            [getattr(load_config("demo_dpo"), entry.section)] if entry.section != "objective" else [DDPO(), RLOO()]
        )
        assert set(entry.names) <= {field.name for one in sections for field in dataclasses.fields(one)}


@pytest.mark.parametrize(
    ("way", "changes", "said"),
    [
        ("generated", {"data": {"buckets": True}}, r"data\.buckets: got true"),
        ("on_policy", {"sampling": {"resolution": 64}}, r"sampling\.resolution: got 64.*data\.resolution 32"),
        (
            "groups",
            {"training": {"train_batch_size": 6}},
            r"train_batch_size: got 6.*multiple of.*samples_per_prompt 4",
        ),
        ("pairs", {"training": {"train_batch_size": "auto"}}, r"train_batch_size: got 'auto'.*give a number"),
        ("trajectories", {"rollout": {"first_step": 10}}, r"first_step: got 10.*0 to 9"),
        ("trajectories", {"rollout": {"steps_per_sample": 0}}, r"steps_per_sample: got 0"),
    ],
)
def test_rounds_that_cannot_be_are_refused(way: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        preflight.check(config_of(way, tmp_path, **changes))


@pytest.mark.parametrize(
    ("way", "changes"),
    [
        ("generated", {"sampling": {"resolution": 32, "num_frames": 1}}),
        ("pairs", {"sampling": {"resolution": 64}}),
        ("pairs", {"training": {"train_batch_size": 6}}),
        ("chosen", {"training": {"train_batch_size": 3}}),
    ],
)
def test_rounds_that_can_be_pass(way: str, changes: dict[str, Any], tmp_path: Path) -> None:
    preflight.check(config_of(way, tmp_path, **changes))


def stored(folder: Path, objective: dict[str, Any], **denoising: Any) -> RunConfig:
    """A run on stored pairs."""
    return build(
        {
            "output_dir": str(folder / "run"),
            "model": {"family": "sdxl", "pretrained": "tiny-sdxl"},
            "data": {"sources": [str(folder)], "resolution": 32},
            "objective": objective,
            "denoising": denoising,
        }
    )


@pytest.mark.parametrize(
    ("objective", "denoising", "said"),
    [
        ({"name": "dspo", "beta": 0.01}, {"error_reduction": "sum"}, r"error_reduction: got 'sum'.*element by element"),
        ({"name": "sdpo"}, {"noise": "independent"}, r"denoising\.noise: got 'independent'.*the noise that they share"),
        (
            {"name": "flow_dpo", "beta_schedule": "derived"},
            {"error_space": "epsilon"},
            r"error_space: got 'epsilon'.*'derived'",
        ),
    ],
)
def test_errors_on_which_an_objective_means_something_else_are_refused(
    objective: dict[str, Any], denoising: dict[str, Any], said: str, tmp_path: Path
) -> None:
    preflight.check(stored(tmp_path, objective))
    with pytest.raises(ConfigError, match=said):
        preflight.check(stored(tmp_path, objective, **denoising))


FLOW = Schedule.flow(1.0)
DIFFUSION = Schedule.variance_preserving(DDPMScheduler().alphas_cumprod, "epsilon")


def test_what_does_not_go_with_the_models_noise_is_refused(tmp_path: Path) -> None:
    def check(schedule: Schedule, objective: dict[str, Any], **denoising: Any) -> None:
        preflight.check_schedule(stored(tmp_path, objective, **denoising), SimpleNamespace(schedule=schedule))  # type: ignore[arg-type]

    derived = {"name": "flow_dpo", "beta_schedule": "derived"}
    for schedule in (FLOW, DIFFUSION):
        check(schedule, {"name": "flow_dpo"}, timestep_min=999)
        with pytest.raises(ConfigError, match=r"timestep_min: got 1000; the model has timesteps 0 to 999"):
            check(schedule, {"name": "flow_dpo"}, timestep_min=1000)
    check(FLOW, derived)
    with pytest.raises(ConfigError, match=r"beta_schedule: got 'derived'; the model predicts epsilon"):
        check(DIFFUSION, derived)


@pytest.mark.parametrize("rollout", [{}, {"prompts": ["a"], "rewards": [REWARD], "samples_per_prompt": 2}])
def test_timesteps_beyond_the_schedule_are_refused_with_data_and_with_prompts(
    rollout: dict[str, Any], tmp_path: Path, tiny_config: Any
) -> None:
    data = {"data": {"sources": []}} if rollout else {}
    config = tiny_config(
        tmp_path / "run",
        rollout=rollout,
        denoising={"timestep_min": 1000, "timestep_sampling": "logit_normal"},
        **data,
    )
    with pytest.raises(ConfigError, match=r"timestep_min: got 1000; the model has timesteps 0 to 999"):
        train(config)
    assert not (tmp_path / "run" / "cache").exists()


@pytest.mark.parametrize(("name", "told"), [("flux1-dev", True), ("flux1-schnell", False)])
def test_a_model_that_is_told_its_guidance_may_be_sampled_with_it(name: str, told: bool, tmp_path: Path) -> None:
    model = {"family": "flux", "pretrained": name, "random_weights": True}
    preflight.check(config_of("pairs", tmp_path, model=model))
    guided = config_of("pairs", tmp_path, model=model, rollout={"guidance_scale": 3.5})
    if told:
        preflight.check(guided)
        return
    with pytest.raises(ConfigError, match=r"guidance_scale: got 3.5; models of family 'flux' are distilled"):
        preflight.check(guided)


@pytest.mark.parametrize(
    ("rollout", "training", "said"),
    [
        ({"steps_per_sample": 4}, {}, r"steps_per_sample: got 4; 3 of 4 sampler steps have a density"),
        ({}, {"train_batch_size": 4}, r"a round of 4 .* is no multiple of 3 trained steps"),
    ],
)
def test_rounds_are_refused_before_the_data_are_read(
    rollout: dict[str, Any],
    training: dict[str, Any],
    said: str,
    tmp_path: Path,
    tiny_config: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config(
        tmp_path / "run",
        objective={"name": "d3po"},
        rollout={"rewards": [REWARD], "num_inference_steps": 4, "samples_per_prompt": 2} | rollout,
        training={"train_batch_size": 3} | training,
    )
    monkeypatch.setattr("diffalign.jobs.image.prepare", lambda *_: pytest.fail("the data were read"))
    with pytest.raises(ConfigError, match=said):
        train(config)
