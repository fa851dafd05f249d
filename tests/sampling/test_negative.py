"""Adapters for the negative branch of guidance: how they are trained, and what a run makes of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rewards_support import write_soft

from diffalign import adapters, cli, export
from diffalign.config import LoraConfig
from diffalign.config_loading import dump
from diffalign.data.loader import flip
from diffalign.errors import CheckpointError, ConfigError
from diffalign.families import DECODER, NETWORK
from diffalign.metrics import read_rows
from diffalign.policy import guided
from diffalign.preflight import check
from diffalign.sampling import Sampler
from diffalign.sampling.guidance import NegativeGuidance
from diffalign.sampling.scoring import Scoring
from diffalign.trainer import train

PROMPTS = ["a small red circle on a black background", "a large blue square", "two green triangles"]
LOOKS = {"prompts": PROMPTS[:2], "num_prompts": 2, "rewards": ["jpeg_compressibility"], "at_end": True}


@pytest.fixture
def soft(tmp_path: Path) -> str:
    return write_soft(tmp_path)


@pytest.fixture
def sampled(tmp_path: Path, tiny_config: Any, soft: str) -> Any:
    """Runs on sampled images."""

    def make(name: str, objective: str, **changes: Any) -> Any:
        rollout = {"prompts": PROMPTS, "num_inference_steps": 3, "rewards": [soft]} | changes.pop("rollout", {})
        training = {"train_batch_size": 2, "max_train_steps": 1} | changes.pop("training", {})
        return tiny_config(
            tmp_path / name,
            objective={"name": objective} | changes.pop("settings", {}),
            rollout=rollout,
            training=training,
            data={"sources": []},
            **changes,
        )

    return make


# -- pairs that change places ------------------------------------------------------------------------------------------


def test_flipped_pairs_are_those_of_the_opposite_taste(tmp_path: Path, tiny_config: Any, seen: list[Any]) -> None:
    for name, train_ in (("plain", None), ("flip", "flip")):
        train(tiny_config(tmp_path / name, negative={"train": train_}, training={"max_train_steps": 1}))
    (job, plain, one), (_, flipped, other) = seen
    assert plain.ids == flipped.ids
    assert torch.equal(plain.chosen, flipped.rejected)
    assert torch.equal(plain.rejected, flipped.chosen)
    assert torch.equal(plain.t, flipped.t)
    assert torch.equal(plain.noise, flipped.noise)
    # With a policy that has moved: sigmoid(z) + sigmoid(-z) = 1.
    moved(job.policy.bare)
    per = [torch.exp(-job.objective(*job.policy.scores(batch, job.objective)).per_item) for batch in (plain, flipped)]
    assert not torch.allclose(per[0], per[1], atol=1e-3)
    torch.testing.assert_close(per[0] + per[1], torch.ones(2), rtol=1e-4, atol=1e-4)
    assert one.loss.item() == other.loss.item() == pytest.approx(math.log(2))


def test_only_pairs_without_their_prompt_change_places(tmp_path: Path, tiny_config: Any, seen: list[Any]) -> None:
    share = {"proportion_empty_prompts": 0.5}
    for name, train_ in (("plain", None), ("half", "empty_prompts")):
        train(
            tiny_config(tmp_path / name, negative={"train": train_}, denoising=share, training={"train_batch_size": 10})
        )
    plain, half = seen[0][1], seen[4][1]
    dropped = torch.tensor([same_text(plain, row, seen[0][0].data.text("")) for row in range(10)])
    assert 0 < int(dropped.sum()) < 10
    for row in range(10):
        ours, theirs = (half.rejected, half.chosen) if dropped[row] else (half.chosen, half.rejected)
        assert torch.equal(plain.chosen[row], ours[row])
        assert torch.equal(plain.rejected[row], theirs[row])
    # Held-out accuracy is about pairs with their prompt.
    kept = seen[4][0].dataset.example(0, 0, keep_prompt=True)
    assert torch.equal(kept.chosen, seen[0][0].dataset.example(0, 0, keep_prompt=True).chosen)


def same_text(batch: Any, row: int, text: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(batch.text[name][row], value.float()) for name, value in text.items())


def test_a_flipped_pair_has_the_other_label_and_rewards_of_the_other_sign(
    tmp_path: Path, tiny_config: Any, seen: list[Any]
) -> None:
    train(tiny_config(tmp_path / "run", training={"max_train_steps": 1}))
    pair = replace(seen[0][0].data.pair(0), p=0.75, extra={"rewards": [[0.5, 1.0], [0.25, -2.0]], "aspect": 1})
    turned = flip(pair)
    assert turned.p == 0.25
    assert turned.extra == {"rewards": [[-0.5, -1.0], [-0.25, 2.0]], "aspect": 1}
    assert flip(turned).extra == pair.extra
    assert pair.extra["rewards"][0] == [0.5, 1.0], "the cache's own pair stays as it is"


# -- rewards -----------------------------------------------------------------------------------------------------------


def test_rewards_change_their_sign_and_logs_keep_theirs(sampled: Any, soft: str, seen: list[Any]) -> None:
    from diffalign import rewards

    images = torch.rand(3, 3, 8, 8)
    model = rewards.load(soft)
    with Scoring([model]) as one, Scoring([model], -1.0) as other:
        assert torch.equal(one.submit(images, PROMPTS).result(), -other.submit(images, PROMPTS).result())
    found = []
    for name, train_ in (("plain", None), ("flip", "flip")):
        made = train(sampled(name, "draft", negative={"train": train_}))
        found += [row["reward"] for row in read_rows(made.run_dir / "metrics.jsonl") if "reward" in row]
    (_, _, one), (_, _, other) = seen
    assert one.loss.item() == pytest.approx(-other.loss.item(), rel=1e-5)
    assert found[0] == pytest.approx(found[1], rel=1e-5), "what is logged is the reward itself"


# -- guided ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ("draft", {}),
        ("spo", {"rollout": {"samples_per_prompt": 2, "reward_scale": 1e4}}),
        ("ddpo", {"rollout": {"samples_per_prompt": 2, "steps_per_sample": 1}}),
        pytest.param(
            "flow_grpo",
            {"rollout": {"samples_per_prompt": 2, "steps_per_sample": 1}, "settings": {"beta": 0.0}},
            marks=pytest.mark.slow,
        ),
        pytest.param("draft", {"settings": {"last_steps": 1}}, marks=pytest.mark.slow),
    ],
)
def test_only_the_negative_branch_is_trained(
    sampled: Any, seen: list[Any], objective: str, more: dict[str, Any]
) -> None:
    more = dict(more)
    rollout = {"guidance_scale": 3.0} | more.pop("rollout", {})
    train(sampled("run", objective, negative={"train": "guided"}, rollout=rollout, **more))
    job = seen[0][0]
    policy, count = job.policy, 2
    assert policy.negative_only
    moved(policy.bare)
    x = torch.randn(count, *job.asked.latent_shape, generator=torch.Generator().manual_seed(0))
    times = torch.full((count,), 700)
    positive = job.rollouts.conditions.of([0, 1])
    negative = job.rollouts.conditions.without(count)
    found = guided(policy, policy.bare, x, times, positive, negative, 3.0)
    with torch.no_grad(), adapters.adapters_off(policy.bare):
        base = policy.output(policy.bare, x, times, positive).float()
    without = policy.output(policy.bare, x, times, negative).float()
    torch.testing.assert_close(found, without + 3.0 * (base - without), rtol=1e-5, atol=1e-5)
    # d guided / d negative = 1 - w, and nothing through the positive branch.
    parameters = adapters.parameters(policy.bare)
    ours = torch.autograd.grad(found.square().sum(), parameters)
    wanted = torch.autograd.grad(((1 - 3.0) * 2 * found.detach() * without).sum(), parameters)
    assert max(float(value.abs().max()) for value in ours) > 0
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_step_raises_the_reward_of_guided_images(sampled: Any) -> None:
    made = sampled(
        "run",
        "draft",
        negative={"train": "guided"},
        rollout={"guidance_scale": 4.0},
        training={"max_train_steps": 12, "learning_rate": 3e-3, "max_grad_norm": 0.0},
    )
    rows = [row["reward"] for row in read_rows(train(made).run_dir / "metrics.jsonl") if "reward" in row]
    assert rows[-1] > rows[0] + 0.003


# -- what a run leaves -------------------------------------------------------------------------------------------------


def moved(network: torch.nn.Module) -> None:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if "lora_B" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=draw))


def test_pictures_of_a_run_have_the_adapter_in_the_negative_branch_alone(
    tmp_path: Path, tiny_config: Any, seen: list[Any]
) -> None:
    config = tiny_config(tmp_path / "run", negative={"train": "flip", "beta": 0.5}, evaluation=LOOKS)
    train(config)
    job = seen[0][0]
    moved(job.policy.bare)
    job.family.load(NETWORK, DECODER)
    ours = job.sampler.images([0, 1], seed=0)
    other = Sampler(job.family, job.sampler.prompts, config.sampling, 32)
    expected = other.images(
        [0, 1], seed=0, adapters=False, around=lambda pipe: NegativeGuidance(pipe, "default", beta=0.5)
    )
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, other.images([0, 1], seed=0)), "the adapter in both branches is something else"
    assert torch.equal(job.sampler.images([0, 1], seed=0, adapters=False), other.images([0, 1], seed=0, adapters=False))


def test_the_commands_know_whose_branch_an_adapter_is_for(
    tmp_path: Path, tiny_config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fast = {"max_train_steps": 2, "learning_rate": 0.05}
    config = tiny_config(tmp_path / "bad", negative={"train": "flip", "beta": 0.5}, evaluation=LOOKS, training=fast)
    train(config)
    info = export.read_file(tmp_path / "bad" / export.FILE_NAME)[1]
    assert info["diffalign.role"] == "negative"
    kohya = export.read_file(tmp_path / "bad" / export.KOHYA_NAME)[1]
    assert kohya["diffalign.role"] == "negative"
    ran = json.loads((tmp_path / "bad" / "result.json").read_text())

    assert cli.main(["evaluate", str(tmp_path / "bad"), "--out", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["aligned_mean"] == pytest.approx(ran["aligned_mean"], abs=1e-6)
    assert again["base_mean"] == pytest.approx(ran["base_mean"], abs=1e-6)
    assert "negative_adapter" in again
    assert "adapter" not in again

    good = tiny_config(tmp_path / "good", evaluation=LOOKS, training=fast)
    train(good)
    both = ["--adapter", str(tmp_path / "good"), "--negative-adapter", str(tmp_path / "bad"), "--alpha", "0.5"]
    out = ["--out", str(tmp_path / "both.json")]
    assert cli.main(["evaluate", str(tmp_path / "good"), *both, "--against", "adapter", *out]) == 0
    result = json.loads((tmp_path / "both.json").read_text())
    positive = json.loads((tmp_path / "good" / "result.json").read_text())
    assert result["base_mean"] == pytest.approx(positive["aligned_mean"], abs=1e-6), "against the positive adapter"
    assert result["aligned_mean"] != pytest.approx(result["base_mean"], abs=1e-9)
    assert (result["alpha"], result["beta"], result["against"]) == (0.5, 1.0, "adapter")
    assert again["beta"] == 0.5, "as the run's own pictures"
    assert cli.main(["evaluate", str(tmp_path / "bad"), "--adapter", str(tmp_path / "good")]) == 2

    folder = tmp_path / "pictures"
    assert cli.main(["generate", str(tmp_path / "bad"), "--prompt", PROMPTS[0], "--base", "--out", str(folder)]) == 0
    assert sorted(path.name for path in folder.glob("*.png")) == ["0000-0-base.png", "0000-0-guided.png"]
    assert "loaded as an ordinary one" not in caplog.text


def test_a_checkpoint_of_a_negative_run_goes_to_the_negative_branch(tmp_path: Path, tiny_config: Any) -> None:
    fast = {"max_train_steps": 2, "learning_rate": 0.05, "checkpointing_steps": 2}
    train(tiny_config(tmp_path / "bad", negative={"train": "flip"}, evaluation=LOOKS, training=fast))
    (last,) = (tmp_path / "bad").glob("checkpoint-*")
    out = tmp_path / "again.json"
    assert cli.main(["evaluate", str(tmp_path / "bad"), "--adapter", str(last), "--out", str(out)]) == 0
    ran = json.loads((tmp_path / "bad" / "result.json").read_text())
    assert json.loads(out.read_text())["aligned_mean"] == pytest.approx(ran["aligned_mean"], abs=1e-6)


def test_comparing_with_the_adapter_needs_both(
    tmp_path: Path, tiny_config: Any, own_logging: None, capsys: Any
) -> None:
    train(tiny_config(tmp_path / "good", evaluation=LOOKS, training={"max_train_steps": 1}))
    assert cli.main(["evaluate", str(tmp_path / "good"), "--against", "adapter"]) == 2
    assert "give both" in capsys.readouterr().err


def test_a_negative_run_resumes_to_the_same_adapter(tmp_path: Path, sampled: Any, adapter_of: Any) -> None:
    steps = {"max_train_steps": 4, "checkpointing_steps": 2}
    more = {"negative": {"train": "guided"}, "rollout": {"guidance_scale": 3.0}}
    whole = train(sampled("whole", "draft", training=steps, **more))
    train(sampled("cut", "draft", training=steps | {"max_train_steps": 2}, **more))
    cut = sampled("cut", "draft", training=steps | {"resume_from_checkpoint": "latest"}, **more)
    ended = train(cut)
    one, other = adapter_of(whole.run_dir), adapter_of(ended.run_dir)
    assert all(torch.equal(one[name], other[name]) for name in one)


# -- a base with adapters in it ----------------------------------------------------------------------------------------


def test_adapters_are_fused_into_the_base(tmp_path: Path, tiny_config: Any) -> None:
    from diffalign.families import load_family

    plain = tiny_config(tmp_path / "x")
    family = load_family(plain.model)
    family.load(NETWORK)
    adapters.attach(family.network, LoraConfig(rank=2, targets="all"))
    moved(family.network)
    export.save_lora(family.network, None, tmp_path / "first", family="sdxl")

    fused = load_family(replace(plain.model, adapters=(str(tmp_path / "first"),)))
    fused.load(NETWORK)
    assert not adapters.adapter_names(fused.network)
    draw = torch.Generator().manual_seed(0)
    shapes = {k: v.shape for k, v in load_conditioning(family).items()}
    conditioning = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    x, t = torch.randn(2, *latent_shape(family), generator=draw), torch.tensor([10, 700])
    with torch.no_grad():
        one = family.predict(family.network, x, t, conditioning)
        other = fused.predict(fused.network, x, t, conditioning)
        with adapters.adapters_off(family.network):
            base = family.predict(family.network, x, t, conditioning)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert (one - base).abs().max() > 1e-2

    made = train(tiny_config(tmp_path / "run", model={"adapters": [str(tmp_path / "first")]}))
    assert export.read_file(made.run_dir / export.FILE_NAME)[1]["diffalign.fused"] == "first"


def load_conditioning(family: Any) -> dict[str, torch.Tensor]:
    from diffalign.families import ENCODERS

    family.load(ENCODERS)
    text = family.encode_prompts(["a", "b"])
    image = family.image_conditioning((32, 32), (0, 0), (32, 32))
    return text | {name: torch.stack([value, value]) for name, value in image.items()}


def latent_shape(family: Any) -> tuple[int, ...]:
    family.load(DECODER)
    shape: tuple[int, ...] = family.latent_shape(32, 32)
    return shape


def test_files_that_cannot_be_fused_are_refused(tmp_path: Path, tiny_config: Any) -> None:
    with pytest.raises(CheckpointError, match="no such adapter"):
        check(tiny_config(tmp_path / "x", model={"adapters": ["nowhere"]}))
    from diffalign.families import load_family

    config = tiny_config(tmp_path / "x", family="sd")
    family = load_family(config.model)
    family.load(NETWORK)
    adapters.attach(family.network, LoraConfig(rank=2))
    export.save_lora(family.network, None, tmp_path / "sd", family="sd")
    with pytest.raises(CheckpointError, match=r"got model\.family 'sdxl'"):
        check(tiny_config(tmp_path / "x", model={"adapters": [str(tmp_path / "sd")]}))


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"negative": {"beta": 0.5}}, "set negative.train"),
        ({"negative": {"train": "guided"}}, "measures denoising errors"),
        ({"negative": {"train": "flip"}, "lora": {"use_dora": True}}, "magnitudes depend on the sum"),
        ({"negative": {"train": "flip"}, "lora": {"text_encoder_rank": 4}}, "is on the network"),
        (
            {"negative": {"train": "flip"}, "sampling": {"guidance_scale": 1.0}, "evaluation": LOOKS},
            "need guidance: set it above 1",
        ),
        ({"negative": {"train": "empty_prompts"}}, "no pair changes places"),
        ({"negative": {"train": "empty_prompts", "beta": 0.5}}, "one adapter serves both branches"),
        (
            {"negative": {"train": "flip"}, "objective": {"name": "patch_dpo"}},
            "learns from both images of a pair alike",
        ),
    ],
)
def test_what_has_no_effect_is_refused(tmp_path: Path, tiny_config: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(tiny_config(tmp_path / "x", **changes))


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        ("draft", {"negative": {"train": "guided"}}, "no negative branch to train"),
        (
            "draft",
            {
                "negative": {"train": "guided"},
                "rollout": {"guidance_scale": 3.0},
                "settings": {"negative_gradient": False},
            },
            "objective.negative_gradient: got false",
        ),
        (
            "ddpo",
            {
                "negative": {"train": "guided"},
                "rollout": {"guidance_scale": 3.0, "negative_gradient": False, "samples_per_prompt": 2},
            },
            "rollout.negative_gradient: got false",
        ),
        (
            "diffusion_nft",
            {"negative": {"train": "guided"}, "rollout": {"samples_per_prompt": 2}},
            "measures denoising errors",
        ),
        (
            "sft",
            {
                "negative": {"train": "empty_prompts"},
                "rollout": {"samples_per_prompt": 2},
            },
            "no pair changes places",
        ),
    ],
)
def test_sampled_runs_without_a_negative_branch_are_refused(
    sampled: Any, objective: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check(sampled("x", objective, **changes))


def test_distilled_models_are_refused_with_the_way_out(tmp_path: Path, tiny_config: Any) -> None:
    config = tiny_config(tmp_path / "x", negative={"train": "flip"})
    from families import tiny

    tiny.build("flux", tmp_path / "flux")
    config = replace(config, model=replace(config.model, family="flux", pretrained=str(tmp_path / "flux")))
    with pytest.raises(ConfigError, match=r"guidance-distilled.*true_cfg_scale above 1"):
        check(config)
    assert "negative" in dump(config)


@pytest.mark.parametrize("name", ["sdxl_npo_pickapic", "sd35m_npo_pickapic", "demo_npo", "demo_self_npo"])
def test_recipes_pass_what_is_checked_before_weights_load(name: str, tmp_path: Path) -> None:
    from diffalign.config_loading import load_config

    config = load_config(name, [f"output_dir={tmp_path}"])
    check(config)
    assert config.negative.alone


# -- Self-NPO ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def self_npo(tmp_path: Path, tiny_config: Any) -> Any:
    def make(name: str, start: str = "noise", **changes: Any) -> Any:
        rollout = {"num_inference_steps": 4} | ({"prompts": PROMPTS} if start == "noise" else {})
        return tiny_config(
            tmp_path / name,
            objective={"name": "self_npo", "start": start} | changes.pop("settings", {}),
            negative={"train": "plain"},
            rollout=rollout | changes.pop("rollout", {}),
            training={"train_batch_size": 3, "max_train_steps": 1} | changes.pop("training", {}),
            **({"data": {"sources": []}} if start == "noise" else {}),
            **changes,
        )

    return make


def test_walks_stop_on_their_way_and_are_noised_further(self_npo: Any, seen: list[Any]) -> None:
    train(self_npo("run", training={"train_batch_size": 12}))
    job, batch, _ = seen[0]
    entries = {entry.id: entry for entry in job.rollouts._round[1]}
    schedule, grid = job.family.schedule, job.rollouts.grid
    steps = {entry.step for entry in entries.values()}
    assert steps <= {1, 2, 3}
    assert len(steps) > 1, "walks of several lengths"
    for row, name in enumerate(batch.ids):
        entry, t = entries[name], batch.t[row]
        assert torch.equal(batch.content.x0[row], entry.goal)
        assert int(t) > int(grid.timesteps[entry.step]), "noisier than where the walk stopped"
        alpha, sigma = schedule.alpha_sigma(t[None])
        a, s = grid.alphas[entry.step], grid.sigmas[entry.step]
        x_s = alpha * entry.goal + sigma * batch.content.noise[row]
        added = x_s - alpha / a * entry.x_t
        spread = (sigma.square() - (s * alpha / a).square()).clamp(min=0).sqrt()
        assert float(added.std()) == pytest.approx(float(spread), rel=0.15)
        assert abs(float(added.mean())) < 5 * float(spread) / math.sqrt(added.numel())
    # What a walk meets on its way is what the sampler of the base meets, however far the adapter has moved.
    moved(job.policy.bare)
    entries = {entry.id: entry for (entry,) in job.rollouts._truncated([(0, 0), (1, 0)], ["x", "y"], 0)}
    one = next(iter(entries.values()))
    with torch.no_grad(), adapters.adapters_off(job.policy.bare):
        predict = job.rollouts.predict(job.rollouts.conditions.of([one.prompt]))
        x = job.rollouts._noise(f"{one.id}/0", 0)[None]
        from diffalign.sampling.trajectories import sample

        path = sample(predict, grid, x, 0.0)
    torch.testing.assert_close(path.latents[one.step][0], one.x_t, rtol=1e-3, atol=1e-4)


def test_without_the_prompt_goals_do_not_depend_on_it(self_npo: Any, seen: list[Any]) -> None:
    for name, prompts in (("one", PROMPTS), ("two", PROMPTS[::-1])):
        for scale in (0.0, 1.0):
            train(self_npo(f"{name}{scale}", rollout={"prompts": prompts, "guidance_scale": scale}))
    goals = [batch.content.x0 for _, batch, _ in seen]
    torch.testing.assert_close(goals[0], goals[2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(goals[1], goals[3], atol=1e-3)


def test_walks_may_begin_at_images_of_the_data(self_npo: Any, seen: list[Any]) -> None:
    made = train(self_npo("run", "data", settings={"steps": 2}, training={"train_batch_size": 10}))
    job, _, out = seen[0]
    entries = job.rollouts._round[1]
    assert len({entry.step for entry in entries}) > 1
    assert float(out.loss.detach()) > 0
    assert made.run_dir.joinpath("pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("start", ["noise", "data"])
def test_walks_may_all_stop_early_or_leave_levels_between_them_out(self_npo: Any, seen: list[Any], start: str) -> None:
    """One or two walks at a time, over many levels."""
    more = {"rollout": {"num_inference_steps": 12}, "settings": {"steps": 1}}
    train(self_npo("run", start, training={"train_batch_size": 2, "max_train_steps": 3}, **more))
    assert len(seen) == 3
    for job, batch, _ in seen:
        times = job.rollouts.grid.timesteps
        assert bool((batch.t > times[-1]).all())
        assert batch.content.x0.isfinite().all()


def test_self_npo_resumes_within_a_round(self_npo: Any, adapter_of: Any) -> None:
    more = {"rollout": {"steps_per_generation": 2, "num_iterations": 2}}
    steps = {"max_train_steps": 4, "checkpointing_steps": 1}
    whole = train(self_npo("whole", training=steps, **more))
    train(self_npo("cut", training=steps | {"max_train_steps": 3}, **more))
    ended = train(self_npo("cut", training=steps | {"resume_from_checkpoint": "latest"}, **more))
    one, other = adapter_of(whole.run_dir), adapter_of(ended.run_dir)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(value.abs().max() > 0 for name, value in one.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"rewards": ["jpeg_compressibility"]}}, "learns from its own predictions"),
        ({"rollout": {"num_inference_steps": 1}}, "stops on the way"),
        ({"rollout": {"samples_per_prompt": 4}}, "one walk without noise"),
        ({"denoising": {"timestep_max": 500}}, "to any level above theirs"),
        ({"negative": {"train": None}}, "set it to 'plain'"),
    ],
)
def test_self_npo_refuses_what_it_does_not_read(self_npo: Any, changes: dict[str, Any], message: str) -> None:
    negative = changes.pop("negative", None)
    config = self_npo("x", **changes)
    if negative is not None:
        config = replace(config, negative=replace(config.negative, train=None))
    with pytest.raises(ConfigError, match=message):
        check(config)


# -- what the card says ------------------------------------------------------------------------------------------------


def python_of(card: str) -> str:
    return card.partition("```python\n")[2].partition("```")[0]


def test_the_card_of_a_negative_run_shows_how_to_use_it(
    tmp_path: Path, tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    made = train(
        tiny_config(
            tmp_path / "run",
            model={"pretrained": "tiny-sdxl"},
            negative={"train": "flip", "beta": 0.5},
            training={"max_train_steps": 2, "learning_rate": 0.05},
        )
    )
    card = (made.run_dir / "README.md").read_text()
    assert "for the negative branch of classifier-free guidance alone" in card
    assert "Create Hook LoRA" in card
    assert "--negative-adapter ." in card
    monkeypatch.chdir(made.run_dir)
    exec(compile(python_of(card), "snippet", "exec"), {})
    guided_ = Image.open(made.run_dir / "sample.png").convert("RGB").tobytes()
    exec(compile(python_of(card).replace("beta=0.5", "beta=0.0"), "snippet", "exec"), {})
    assert Image.open(made.run_dir / "sample.png").convert("RGB").tobytes() != guided_


def test_snippets_of_pipelines_without_a_loader_attach_by_name(tmp_path: Path, tiny_config: Any) -> None:
    from diffalign.model_card import snippet

    config = tiny_config(tmp_path / "x", negative={"train": "flip"}, model={"adapters": ["some/good.safetensors"]})
    source = snippet(replace(config, model=replace(config.model, family="pixart", pretrained="owner/model")))
    compile(source, "snippet", "exec")
    assert 'name="negative", negative=True)' in source
    assert 'with NegativeGuidance(pipe, "negative"):\n    image = pipe(\n        ' in source
    source = snippet(config)
    compile(source, "snippet", "exec")
    assert 'pipe.load_lora_weights("good.safetensors", adapter_name="fused")' in source
