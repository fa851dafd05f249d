"""Training on sampled images: what a round holds, that it is a function of seed and weights, and exact resumption."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rewards_support import write_bright

from diffalign import checkpoint, rewards
from diffalign.adapters import adapters_off
from diffalign.data.batch import PairBatch, RowBatch, mapped
from diffalign.errors import ConfigError, UserError
from diffalign.jobs.image import ImageJob
from diffalign.losses.references import lag_decay
from diffalign.metrics import read_rows
from diffalign.prediction import add_noise
from diffalign.references import Lagged
from diffalign.sampling import rollouts as rollouts_module
from diffalign.sampling.advantages import RewardHistory
from diffalign.sampling.entries import Sampled, StepBatch, TrajectoryBatch
from diffalign.sampling.rollouts import ImageRollouts, Scoring
from diffalign.sampling.trajectories import Trajectory, log_density
from diffalign.trainer import train

PROMPTS = [
    "a small red circle on a black background",
    "a large blue square on a white background",
    "two green triangles",
]
ONLINE = {"prompts": PROMPTS, "samples_per_prompt": 2, "num_inference_steps": 4}


@pytest.fixture
def bright(tmp_path: Path) -> str:
    return write_bright(tmp_path)


@pytest.fixture
def run(tmp_path: Path, tiny_config: Any, bright: str) -> Any:
    def start(name: str, objective: str, *, online: bool = True, **changes: Any) -> Path:
        settings = changes.pop("settings", {})
        rollout = (ONLINE | {"rewards": [bright]} if online else {"num_inference_steps": 4}) | changes.pop(
            "rollout", {}
        )
        more: dict[str, Any] = {"data": {"sources": []}} if online else {}
        training = {"train_batch_size": 6, "max_train_steps": 2} | changes.pop("training", {})
        config = tiny_config(
            tmp_path / name,
            objective={"name": objective} | settings,
            rollout=rollout,
            training=training,
            **more,
            **changes,
        )
        return train(config).run_dir

    return start


def losses_of(folder: Path) -> list[float]:
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


def processes(job: ImageJob, count: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The entries of round 0 in each of `count` processes with micro-batches of `batch`."""
    config = replace(job.config, training=replace(job.config.training, train_batch_size=batch))
    old = job.rollouts
    others = []
    for rank in range(count):
        accelerator = SimpleNamespace(process_index=rank, num_processes=count, device=torch.device("cpu"))
        made = ImageRollouts(
            config,
            old.family,
            old.policy,
            accelerator,
            prompts=old.prompts,
            conditions=old.conditions,
            latent_shape=old.latent_shape,
            winners=old.winners,
            kept=old.kept,
        )
        others.append(made)
    parts: list[Any] = []
    monkeypatch.setattr(rollouts_module, "gather_object", lambda found: parts.append(found) or found)
    for one in others:
        one._make(0)
    everything = [entry for part in parts for entry in part]
    monkeypatch.setattr(rollouts_module, "gather_object", lambda found: everything)
    return [one._make(0) for one in others]


def decoded_mean(job: ImageJob, latents: torch.Tensor) -> torch.Tensor:
    return job.family.decode_latents(latents).mean((1, 2, 3))


def test_pairs_are_the_best_against_the_worst_of_a_prompt(run: Any, seen: list[Any]) -> None:
    run("run", "dpo", settings={"beta": 50.0}, rollout={"samples_per_prompt": 3}, training={"train_batch_size": 3})
    job, batch, out = seen[0]
    assert isinstance(batch, PairBatch)
    assert (batch.chosen_reward > batch.rejected_reward).all()
    torch.testing.assert_close(decoded_mean(job, batch.chosen), batch.chosen_reward[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoded_mean(job, batch.rejected), batch.rejected_reward[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.per_item.detach(), torch.full((3,), 2.0).log())
    assert len({tuple(n.flatten()[:2].tolist()) for n in batch.noise}) == 3


def test_transitions_start_at_ratio_one_and_their_scores_are_densities(run: Any, seen: list[Any]) -> None:
    run("run", "d3po", rollout={"guidance_scale": 2.0})
    job, batch, out = seen[0]
    assert isinstance(batch, StepBatch)
    assert len(batch) == 6
    assert len(batch.x) == 12
    # 4 steps, of which the last has no noise and no density
    assert set(batch.step.tolist()) <= {0, 1, 2}
    assert out.metrics["rewards/margins"].abs().max() == 0
    scores, _ = job.rollouts.scores(batch)
    assert not torch.equal(scores.theta.detach(), scores.ref)  # two steps later
    # by hand, for the first row
    grid, eta = job.rollouts.grid, job.rollouts.eta
    assert eta == 1.0
    k = int(batch.step[0])
    alpha, sigma = grid.alphas[k], grid.sigmas[k]
    alpha_next, sigma_next = grid.alphas[k + 1], grid.sigmas[k + 1]
    row = {name: value[:1] for name, value in batch.conditioning.items()}
    empty = {name: value[:1] for name, value in batch.negative.items()}
    with torch.no_grad():
        t = grid.times[k].expand(1)
        a = job.family.predict(job.policy.bare, batch.x[:1], t, row)
        b = job.family.predict(job.policy.bare, batch.x[:1], t, empty)
    v = b + 2.0 * (a - b)
    x0, noise = alpha * batch.x[:1] - sigma * v, alpha * v + sigma * batch.x[:1]
    d = torch.tensor([grid.deviation(k, 1.0)])
    mean = alpha_next * x0 + (sigma_next**2 - d**2).clamp(min=0).sqrt() * noise
    ours = job.rollouts.scores(batch)[0].theta[:1].detach()
    torch.testing.assert_close(ours, log_density(batch.x_next[:1], mean, d), rtol=1e-4, atol=1e-4)


def test_both_trajectories_of_d3po_start_from_the_same_noise_and_those_of_pso_do_not(run: Any, seen: list[Any]) -> None:
    for name, shared in (("d3po", True), ("pso", False)):
        seen.clear()
        run(name, name, rollout={"steps_per_sample": 3}, training={"train_batch_size": 9})
        _, batch, _ = seen[0]
        first = [i for i in range(len(batch)) if int(batch.step[i]) == 0]
        assert first
        for i in first:
            assert torch.equal(batch.x[i], batch.x[i + len(batch)]) == shared


def test_of_several_rewards_none_may_say_otherwise_where_dominance_is_asked_for() -> None:
    latents, rewards = torch.zeros(3, 1), torch.tensor([[0.9, 0.1], [0.5, 0.0], [0.2, 0.3]])
    one = Sampled(id="x", prompt=0, trajectory=Trajectory([latents], []), reward=rewards.sum(1), rewards=rewards)
    assert one.best_and_worst("sum") == (0, 1, False)  # 1.0, 0.5, 0.5
    assert one.best_and_worst("dominance") == (0, 1, False)
    mixed = replace(one, reward=torch.tensor([1.0, 0.5, 0.4]))
    assert mixed.best_and_worst("sum") == (0, 2, False)
    assert mixed.best_and_worst("dominance") == (0, 2, True)
    alike = replace(one, reward=torch.ones(3))
    assert alike.best_and_worst("sum") == (0, 1, True)


def test_candidates_come_from_one_latent(run: Any, seen: list[Any]) -> None:
    run("run", "spo", rollout={"samples_per_prompt": 3, "reward_scale": 1000.0, "first_step": 1})
    _, batch, _ = seen[0]
    half = len(batch)
    assert torch.equal(batch.x[:half], batch.x[half:])
    assert not torch.equal(batch.x_next[:half], batch.x_next[half:])
    assert int(batch.step.min()) >= 1
    pairs = batch.layout.need_pairs()
    assert (pairs.reward_w >= pairs.reward_l).all()
    kept = pairs.weight > 0
    assert kept.any()
    torch.testing.assert_close(pairs.weight[kept].sum(), torch.tensor(float(half)))


def test_groups_keep_together_and_have_noise_of_their_own(run: Any, seen: list[Any]) -> None:
    run("run", "gdpo", settings={"beta": 50.0}, rollout={"policy": "reference"})
    job, batch, _ = seen[0]
    assert isinstance(batch, RowBatch)
    groups = batch.layout.need_groups()
    assert groups.group.tolist() == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(decoded_mean(job, batch.content.x0), groups.reward[:, 0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(batch.content.noise[0], batch.content.noise[1])


def test_the_best_is_the_one_with_the_largest_reward(run: Any, seen: list[Any]) -> None:
    run("run", "sft", training={"train_batch_size": 3})
    reward = torch.tensor([0.1, 0.7, 0.4])
    one = Sampled(
        id="x", prompt=0, trajectory=Trajectory([torch.zeros(3, 1)], []), reward=reward, rewards=reward[:, None]
    )
    assert seen[0][0].rollouts._chosen(one, 0).numbers == [1]


@pytest.mark.parametrize("select", ["best", "bradley_terry"])
def test_an_objective_on_chosen_images_learns_from_one_of_a_group(run: Any, seen: list[Any], select: str) -> None:
    run(
        "run",
        "sft",
        rollout={"select": select, "select_temperature": 1e-6, "samples_per_prompt": 3},
        training={"train_batch_size": 3},
    )
    job, batch, _ = seen[0]
    items = batch.layout.need_items()
    assert len(batch) == 3
    torch.testing.assert_close(decoded_mean(job, batch.content.x0), items.target, rtol=1e-4, atol=1e-5)
    assert (items.label == 1).all()


def test_people_choose_in_proportion_to_the_exponential_of_the_reward(run: Any, seen: list[Any]) -> None:
    run("run", "sft", rollout={"select": "bradley_terry", "select_temperature": 0.5}, training={"train_batch_size": 3})
    job, _, _ = seen[0]
    reward = torch.tensor([0.0, 0.5])
    counts = torch.zeros(2)
    for n in range(800):
        x = torch.stack([torch.zeros(job.rollouts.latent_shape), torch.ones(job.rollouts.latent_shape)])
        one = Sampled(prompt=0, id=f"x{n}", trajectory=Trajectory([x], []), reward=reward, rewards=reward[:, None])
        counts[job.rollouts._chosen(one, 0).numbers[0]] += 1
    share = float(counts[1] / 800)  # e^1 / (1 + e^1) = 0.731
    assert share == pytest.approx(0.731, abs=0.05)


def test_seppo_compares_winners_of_the_data_with_samples_of_the_reference(run: Any, seen: list[Any]) -> None:
    run("run", "seppo", settings={"beta": 50.0}, online=False, training={"train_batch_size": 4})
    job, batch, _ = seen[0]
    data = {job.data.pair(i).id: job.data.pair(i) for i in job.kept}
    for n, name in enumerate(batch.ids):
        pair = data[name]
        winner = pair.latents[0 if pair.p >= 0.5 else 1]
        loser = pair.latents[1 if pair.p >= 0.5 else 0]
        torch.testing.assert_close(batch.chosen[n], winner.float())
        assert not torch.allclose(batch.rejected[n], loser.float(), atol=0.1)


def test_points_on_the_policys_way_have_its_predictions_as_targets(run: Any, seen: list[Any]) -> None:
    run(
        "run",
        "dro",
        online=False,
        rollout={"steps_per_sample": 2},
        training={"train_batch_size": 4, "max_train_steps": 1},
    )
    job, batch, out = seen[0]
    rows, _ = batch.rows(job.objective.needs)
    assert rows.given.tolist() == [False] * 4 + [True] * 4
    # the sampler's weights are still the policy's: its own prediction is reproduced without error
    torch.testing.assert_close(out.metrics["error/rejected"], torch.zeros(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(out.per_item.detach(), torch.full((4,), 0.001), rtol=1e-3, atol=1e-6)
    assert batch.t.tolist() == rows.t[4:].tolist()


def test_a_dropped_prompt_is_dropped_in_the_sample_too(run: Any, seen: list[Any]) -> None:
    dropping = {"proportion_empty_prompts": 0.5}
    run("run", "dro", online=False, denoising=dropping, training={"train_batch_size": 8, "max_train_steps": 1})
    job, batch, out = seen[0]
    empty = job.data.text("")
    name = max(empty, key=lambda key: empty[key].ndim)
    dropped = [torch.equal(text, empty[name].float()) for text in batch.text[name]]
    assert True in dropped
    assert False in dropped
    torch.testing.assert_close(out.metrics["error/rejected"], torch.zeros(8), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "objective",
    [
        "d3po",
        "prdp",
        "diffusion_nft",
        pytest.param("dpo", marks=pytest.mark.slow),
        pytest.param("gdpo", marks=pytest.mark.slow),
        pytest.param("grpo", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_round_equals_an_unbroken_one(run: Any, objective: str, tmp_path: Path, adapter_of: Any) -> None:
    settings = {"beta": 50.0} if objective in ("dpo", "gdpo") else {}
    rollout = {"steps_per_generation": 4}
    training = {"max_train_steps": 4, "checkpointing_steps": 2, "train_batch_size": 6}
    whole = run("whole", objective, settings=settings, rollout=rollout, training=training)
    run("part", objective, settings=settings, rollout=rollout, training=training | {"max_train_steps": 2})
    again = training | {"resume_from_checkpoint": "latest"}
    part = run("part", objective, settings=settings, rollout=rollout, training=again)
    assert losses_of(whole) == losses_of(part)
    a, b = adapter_of(whole), adapter_of(part)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_history_of_rewards_goes_on_when_a_run_is_resumed(
    run: Any, adapter_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = {"history": 6, "history_min": 3, "steps_per_sample": 1}
    training = {"max_train_steps": 4, "checkpointing_steps": 2, "train_batch_size": 6}
    asked: list[list[float]] = []
    original = RewardHistory.advantages

    def advantages(self: RewardHistory, number: int, prompts: Any, reward: torch.Tensor) -> torch.Tensor:
        found = original(self, number, prompts, reward)
        asked.append(found.tolist())
        return found

    monkeypatch.setattr(RewardHistory, "advantages", advantages)
    whole = run("whole", "ddpo", rollout=rollout, training=training)
    unbroken = asked.copy()
    asked.clear()
    run("part", "ddpo", rollout=rollout, training=training | {"max_train_steps": 2})
    part = run("part", "ddpo", rollout=rollout, training=training | {"resume_from_checkpoint": "latest"})
    assert asked == unbroken
    assert len(unbroken) == 4
    assert losses_of(whole) == losses_of(part)
    a, b = adapter_of(whole), adapter_of(part)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_history_is_loaded_where_a_round_is_made_anew(run: Any, seen: Any) -> None:
    rollout = {"history": 6, "history_min": 3, "steps_per_sample": 1, "steps_per_generation": 4}
    run("run", "ddpo", rollout=rollout, training={"max_train_steps": 1, "train_batch_size": 6})
    rollouts = seen[0][0].rollouts
    state = rollouts.state_dict()
    assert {"round", "entries", "history"} <= state.keys()
    for changes, kept in (({}, True), ({"processes": 2}, False)):
        rollouts.advantages.history, rollouts._round = RewardHistory(6, 3), None
        rollouts.load_state_dict(state | changes)
        assert rollouts.advantages.state_dict()["history"] == state["history"]
        assert (rollouts._round is not None) == kept


@pytest.mark.parametrize("objective", ["ddpo", "diffusion_nft", "prdp", "raft", "rwr"])
def test_weights_of_rewards_reach_what_is_trained(run: Any, bright: str, tmp_path: Path, objective: str) -> None:
    (tmp_path / "dark.py").write_text(
        Path(bright).read_text().replace("Bright", "Dark").replace("return ", "return -3 * ")
    )
    training = {"max_train_steps": 1, "train_batch_size": 6}
    alone = run("alone", objective, rollout={"rewards": [bright]}, training=training)
    both = [bright, str(tmp_path / "dark.py")]
    weighed = run("weighed", objective, rollout={"rewards": both, "reward_weights": [1, 0]}, training=training)
    plain = run("plain", objective, rollout={"rewards": both}, training=training)
    a, b, c = (next(iter(read_rows(x / "metrics.jsonl"))) for x in (alone, weighed, plain))
    keys = [key for key in ("loss", "grad_norm", "reward") if key in a]
    assert [a[key] for key in keys] == [b[key] for key in keys]
    assert [a[key] for key in keys] != [c[key] for key in keys]


@pytest.mark.parametrize(("objective", "count"), [("ddpo", 1), ("ddpo", 2), ("diffusion_nft", 2)])
def test_a_history_is_asked_by_the_prompts_of_the_round(
    run: Any, seen: Any, objective: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[int, list[str]] = {}

    def advantages(self: RewardHistory, number: int, prompts: Any, reward: torch.Tensor) -> torch.Tensor:
        asked[number] = list(prompts)
        return torch.tensor([float(PROMPTS.index(text)) for text in prompts])

    monkeypatch.setattr(RewardHistory, "advantages", advantages)
    rollout = {"history": 6, "history_min": 3, "samples_per_prompt": count}
    rollout |= {"steps_per_sample": 1} if objective == "ddpo" else {}
    run("run", objective, rollout=rollout, training={"max_train_steps": 2, "train_batch_size": 6})
    job = seen[0][0]
    for number, prompts in asked.items():
        assert prompts == [PROMPTS[i] for i, _ in job.rollouts.plan.micro_batch(number) for _ in range(count)]
    assert set(asked) == {0, 1}
    for _, batch, _ in seen:  # every image has what was made of its own prompt, which its id names
        own = [float(name.removeprefix("rollout ").partition("/")[0]) for name in batch.ids]
        assert batch.layout.groups.advantage.tolist() == own


def test_a_reward_that_dies_loses_no_step(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"settings": {"beta": 50.0}, "training": {"max_train_steps": 4}}
    original, calls, fatal = rewards.score, [], [0]

    def score(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == fatal[0]:
            raise rewards.RewardError("no answer")
        return original(*args, **options)

    monkeypatch.setattr(rewards, "score", score)
    whole = run("whole", "dpo", **more)
    fatal[0] = len(calls) + len(calls) // 2 + 1  # within the third of four rounds
    with pytest.raises(UserError, match="no answer"):
        run("part", "dpo", **more)
    assert list(checkpoint.steps_of(tmp_path / "part")) == [2]
    again = run("part", "dpo", **(more | {"training": {"max_train_steps": 4, "resume_from_checkpoint": "latest"}}))
    assert losses_of(again) == losses_of(whole)


def test_a_round_may_be_cut_otherwise_when_it_is_resumed(run: Any) -> None:
    settings, rollout = {"beta": 50.0}, {"steps_per_generation": 4}
    training = {"max_train_steps": 4, "checkpointing_steps": 2, "train_batch_size": 6}
    whole = run("whole", "dpo", settings=settings, rollout=rollout, training=training)
    run("part", "dpo", settings=settings, rollout=rollout, training=training | {"max_train_steps": 2})
    again = training | {"resume_from_checkpoint": "latest", "train_batch_size": 2, "gradient_accumulation_steps": 3}
    part = run("part", "dpo", settings=settings, rollout=rollout, training=again)
    assert losses_of(part) == pytest.approx(losses_of(whole), rel=1e-4)


@pytest.mark.parametrize(
    "objective",
    [
        "gdpo",
        "d3po",
        "prdp",
        "dro",
        pytest.param("dpo", marks=pytest.mark.slow),
        pytest.param("diffusion_nft", marks=pytest.mark.slow),
        pytest.param("grpo", marks=pytest.mark.slow),
        pytest.param("spo", marks=pytest.mark.slow),
        pytest.param("seppo", marks=pytest.mark.slow),
    ],
)
def test_a_round_is_the_same_on_one_process_and_on_two(
    run: Any, seen: list[Any], monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    settings = {"beta": 50.0} if objective in ("dpo", "gdpo", "seppo") else {}
    rollout = {"reward_scale": 1000.0} if objective == "spo" else {"steps_per_sample": 2} if objective == "dro" else {}
    online = objective not in ("seppo", "dro")
    run("run", objective, settings=settings, rollout=rollout, online=online, training={"max_train_steps": 1})
    job = seen[0][0]
    (alone,) = processes(job, 1, 12, monkeypatch)
    first, second = processes(job, 2, 6, monkeypatch)
    assert [e.id for e in first + second] == [e.id for e in alone]
    for a, b in zip(first + second, alone, strict=True):
        for name in ("latents", "x", "x_next", "x_t", "target", "weight", "old", "advantage"):
            if getattr(b, name, None) is not None:
                torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-4)
    # micro-batches are dealt in turn
    size = 6 if objective == "grpo" else 2 if objective in ("gdpo", "diffusion_nft", "prdp") else 3
    first, second = processes(job, 2, size, monkeypatch)
    (alone,) = processes(job, 1, 2 * size, monkeypatch)
    half = len(alone) // 2
    assert [e.id for e in first] == [e.id for e in alone[:half]]


@pytest.mark.parametrize(
    "objective",
    ["d3po", "prdp", pytest.param("dpo", marks=pytest.mark.slow), pytest.param("spo", marks=pytest.mark.slow)],
)
def test_cutting_a_step_into_micro_batches_changes_nothing(run: Any, objective: str) -> None:
    settings = {"dpo": {"beta": 50.0}, "prdp": {"beta": 0.1}}.get(objective, {})
    rollout = {"reward_scale": 100.0} if objective == "spo" else {}
    whole = run("whole", objective, settings=settings, rollout=rollout)
    training = {"train_batch_size": 2, "gradient_accumulation_steps": 3}
    cut = run("cut", objective, settings=settings, rollout=rollout, training=training)
    for a, b in zip(losses_of(whole), losses_of(cut), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_a_second_pass_over_a_round_draws_new_noise_for_the_same_images(run: Any, seen: list[Any]) -> None:
    run("run", "dpo", settings={"beta": 50.0}, rollout={"num_iterations": 2}, training={"train_batch_size": 3})
    (_, first, _), (_, second, _) = seen
    assert torch.equal(first.chosen, second.chosen)
    assert not torch.equal(first.noise, second.noise)


@pytest.mark.parametrize("noise", ["shared", "independent"])
def test_a_second_pass_keeps_to_the_rule_of_the_first(run: Any, seen: list[Any], noise: str) -> None:
    """Both images of a pair, and all of a group, share their noise, or each has its own."""
    more = {"settings": {"beta": 50.0}, "rollout": {"num_iterations": 2}, "denoising": {"noise": noise}}
    run("pairs", "dpo", **more)
    run("groups", "rebel", **more)
    pairs, groups = [batch for _, batch, _ in seen[:2]], [batch for _, batch, _ in seen[2:]]
    assert len(groups) == 2
    for batch in pairs:
        assert (batch.rejected_noise is not None) == (noise == "independent")
    if noise == "independent":
        assert not torch.equal(pairs[0].rejected_noise, pairs[1].rejected_noise)
        assert pairs[0].rejected_t.tolist() != pairs[1].rejected_t.tolist()
    for batch in groups:
        rows = batch.content
        assert torch.equal(rows.noise[0], rows.noise[1]) == (noise == "shared")
        assert not torch.equal(rows.noise[0], rows.noise[2])
    assert not torch.equal(groups[0].content.noise, groups[1].content.noise)


@pytest.mark.parametrize("noise", ["shared", "independent"])
def test_pairs_of_the_data_have_the_noise_that_is_asked_for(
    tiny_config: Any, tmp_path: Path, seen: list[Any], noise: str
) -> None:
    train(tiny_config(tmp_path / "run", denoising={"noise": noise}, training={"max_train_steps": 1}))
    _, batch, _ = seen[0]
    assert (batch.rejected_noise is not None) == (noise == "independent")


def test_rewards_of_capo_are_win_rates_within_a_prompt(run: Any, seen: list[Any]) -> None:
    run("run", "capo", settings={"beta": 50.0}, rollout={"samples_per_prompt": 3}, training={"train_batch_size": 3})
    job, batch, _ = seen[0]
    assert ((batch.chosen_reward > 0.5) & (batch.rejected_reward < 0.5)).all()
    reward = torch.tensor([0.0, 3.0, 1.0])
    latents = torch.arange(3.0).view(3, 1)
    one = Sampled(id="x", prompt=0, trajectory=Trajectory([latents], []), reward=reward, rewards=reward[:, None])
    made = job.rollouts._pair(one, 0)
    assert made.latents.flatten().tolist() == [1.0, 0.0]
    s = torch.sigmoid
    expected = torch.stack(
        [(s(torch.tensor(3.0)) + s(torch.tensor(2.0))) / 2, (s(torch.tensor(-3.0)) + s(torch.tensor(-1.0))) / 2]
    )
    torch.testing.assert_close(made.rewards[:, 0], expected)


def test_a_small_batch_of_the_sampler_splits_a_group(
    run: Any, seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, sizes = rollouts_module.guided, list[int]()

    def guided(policy: Any, network: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
        sizes.append(len(x))
        return original(policy, network, x, *args)

    monkeypatch.setattr(rollouts_module, "guided", guided)
    for size in (1, 64):
        run(f"run{size}", "dpo", settings={"beta": 50.0}, sampling={"batch_size": size})
        assert max(sizes) == min(size, 12)
        sizes.clear()
    (_, one, _), _, (_, many, _), _ = seen
    torch.testing.assert_close(one.chosen, many.chosen, rtol=1e-4, atol=1e-4)


def test_nothing_of_a_round_stays_where_it_was_sampled() -> None:
    made = mapped(Trajectory([torch.zeros(1)], [torch.ones(1)]), lambda x: x.double())
    assert made.latents[0].dtype == made.outputs[0].dtype == torch.float64


@pytest.mark.parametrize("window", [None, 2])
def test_policy_gradients_train_sampled_steps_at_ratio_one_first(run: Any, seen: list[Any], window: int | None) -> None:
    rollout = {"window": window, "guidance_scale": 2.0, "steps_per_generation": 2}
    run("run", "grpo", settings={"epsilon": 1e-4, "beta": 0.1}, rollout=rollout)
    job, batch, out = seen[0]
    assert isinstance(batch, StepBatch)
    assert job.rollouts.size.per_prompt == (window or 3)
    groups = batch.layout.need_groups()
    assert groups.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.step.view(3, 2)[:, 0].tolist() == batch.step.view(3, 2)[:, 1].tolist()
    torch.testing.assert_close(out.metrics["ratio"], torch.ones(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.metrics["kl"], torch.zeros(6), rtol=0, atol=1e-6)
    # the loss starts at the mean of -A, which is 0 in every group, and its gradient does not vanish
    torch.testing.assert_close(out.per_item.detach().view(3, 2).sum(1), torch.zeros(3), rtol=0, atol=1e-4)
    assert seen[-1][2].metrics["ratio"].sub(1).abs().max() > 0
    rewards = groups.reward[:, 0]
    assert ((rewards.view(3, 2)[:, 0] > rewards.view(3, 2)[:, 1]) == (groups.advantage.view(3, 2)[:, 0] > 0)).all()


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("flow_grpo", {"beta": 0.04}),
        ("grpo_guard", {}),
        ("flow_dppo", {}),
        ("dpok", {"beta": 0.01}),
        pytest.param("dance_grpo", {}, marks=pytest.mark.slow),
        pytest.param("ddpo", {}, marks=pytest.mark.slow),
    ],
)
def test_what_policy_gradients_on_steps_read_is_nothing_at_first(
    run: Any, seen: list[Any], objective: str, settings: dict[str, Any]
) -> None:
    run("run", objective, settings=settings, rollout={"steps_per_generation": 2})
    job, batch, out = seen[0]
    torch.testing.assert_close(out.metrics["ratio"], torch.ones(6), rtol=0, atol=1e-5)
    scores, _ = job.rollouts.scores(batch)
    asked = job.objective.needs.extra
    assert set(scores.extra) == set(asked)
    assert seen[-1][2].per_item.isfinite().all()
    for name in ("std", "dt"):
        if name in asked:
            assert (scores.extra[name] > 0).all()
    for name in ("mean_shift", "ref_shift", "eps_shift"):  # two steps later
        if name in asked:
            assert (scores.extra[name] >= 0).all()
            assert scores.extra[name].any()
            assert scores.extra[name].requires_grad
    if "kl" in out.metrics:
        torch.testing.assert_close(out.metrics["kl"], torch.zeros(6), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("objective", "metric", "at_first"),
    [("awm", "ratio", 1.0), ("dgpo", "group_weight", 0.5), ("crd", "implicit_reward", 0.0)],
)
def test_online_objectives_on_noised_samples_start_at_the_policy_that_sampled(
    run: Any, seen: list[Any], objective: str, metric: str, at_first: float
) -> None:
    run("run", objective, rollout={"num_iterations": 2})
    job, _, out = seen[0]
    assert job.policy.lagged is not None
    assert out.metrics[metric].unique().tolist() == [pytest.approx(at_first, abs=1e-6)]
    ups = [p for name, p in job.policy.bare.named_parameters() if "lora_B" in name]
    assert any(bool(p.any()) for p in ups)  # it has learnt something


@pytest.mark.parametrize(
    ("objective", "rollout", "steps"),
    [
        ("flow_grpo", {"kernel": "flow_sde", "guidance_scale": 2.0, "steps_per_sample": 2}, {0, 1, 2, 3}),
        ("flow_grpo", {"kernel": "cps", "window": 1, "window_range": [0, 1]}, {0, 1}),  # Flow-GRPO-Fast
        pytest.param(
            "dance_grpo", {"kernel": "constant_sde", "steps_per_sample": 2}, {0, 1, 2, 3}, marks=pytest.mark.slow
        ),
        pytest.param(  # MixGRPO
            "grpo_guard",
            {"kernel": "flow_sde", "window": 2, "window_range": [0, 1], "window_every": 25},
            {0, 1},
            marks=pytest.mark.slow,
        ),
        ("prdp", {"kernel": "flow_sde"}, {0, 1, 2, 3}),
    ],
)
def test_flow_models_train_the_steps_of_their_own_kernels(
    run: Any, seen: list[Any], objective: str, rollout: dict[str, Any], steps: set[int]
) -> None:
    model = {"family": "sd3", "pretrained": "tiny-sd3"}
    run("run", objective, model=model, rollout=rollout, training={"train_batch_size": 4})
    job, batch, out = seen[0]
    whole = isinstance(batch, TrajectoryBatch)
    assert set((batch.steps if whole else batch.step).tolist()) <= steps
    assert job.rollouts.grid.kernel == rollout["kernel"]
    at_first = out.metrics["log_ratio"] if whole else out.metrics["ratio"] - 1
    torch.testing.assert_close(at_first, torch.zeros_like(at_first), rtol=0, atol=1e-5)
    assert all(
        bool(p.any()) for name, p in job.policy.bare.named_parameters() if "lora_B" in name and "attn.to_q" in name
    )


def test_rewards_weigh_the_images_that_are_imitated(run: Any, seen: list[Any]) -> None:
    """Reward-weighted regression weighs all of them; RAFT takes the best of every prompt."""
    run("rwr", "rwr", settings={"beta": 0.1})
    _, batch, out = seen[0]
    items = batch.layout.need_items()
    torch.testing.assert_close(out.metrics["weight"], (items.target / 0.1).exp())
    torch.testing.assert_close(out.per_item.detach(), out.metrics["weight"] * out.metrics["error/chosen"])
    seen.clear()
    run("raft", "raft")
    _, batch, out = seen[0]
    reward = batch.layout.need_groups().reward[:, 0].view(3, 2)
    assert out.per_item.shape == (3,)
    assert out.metrics["accepted"].view(3, 2).argmax(1).tolist() == reward.argmax(1).tolist()


def test_diversity_rewarded_distillation_is_a_guided_reference_and_a_reward(
    run: Any, seen: list[Any], bright: str
) -> None:
    """Diversity-rewarded distillation of guidance (arXiv 2410.06084) from the parts of others."""
    rollout = {"rewards": [bright, "diversity:tiny-clip"], "reward_weights": [1.0, 0.5]}
    run("run", "diffusion_nft", settings={"beta": 1.0}, reference={"guidance_scale": 3.0}, rollout=rollout)
    _, batch, out = seen[0]
    reward = batch.layout.need_groups().reward
    torch.testing.assert_close(reward[0::2, 1], reward[1::2, 1])  # of two images each is as far from the other
    assert (reward[:, 1] > 0).all()
    assert (out.metrics["kl"] > 0).all(), "the guided base is not the policy"


def test_steps_outside_of_the_window_are_deterministic(run: Any, seen: list[Any]) -> None:
    run("run", "grpo", rollout={"window": 1, "window_range": [1, 1], "shared_start": True})
    _, batch, _ = seen[0]
    assert set(batch.step.tolist()) == {1}
    for first in (0, 2, 4):  # one start and no noise before the window
        torch.testing.assert_close(batch.x[first], batch.x[first + 1], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(batch.x_next[first], batch.x_next[first + 1], atol=1e-2)


def test_a_guided_reference_is_what_the_base_predicts_with_guidance(run: Any, seen: list[Any]) -> None:
    run("plain", "crd", training={"max_train_steps": 1})
    run("guided", "crd", reference={"guidance_scale": 3.0}, training={"max_train_steps": 1})
    (_, _, plain), (job, batch, out) = seen
    assert plain.metrics["kl"].max() == 0
    rows, schedule, family = batch.content, job.family.schedule, job.family
    alpha, sigma = schedule.alpha_sigma(rows.t)
    x_t = add_noise(rows.x0, rows.noise, alpha, sigma)
    negative = job.rollouts.conditions.without(len(x_t))
    with torch.no_grad(), adapters_off(job.policy.bare):
        times = schedule.time(rows.t)
        given = family.predict(job.policy.bare, x_t, times, rows.conditioning)
        without = family.predict(job.policy.bare, x_t, times, negative)
    # the untouched policy predicts what the base does without guidance
    wanted = (2.0 * (given - without)).square().flatten(1).mean(1)
    torch.testing.assert_close(out.metrics["kl"], wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", ["dpo", "grpo"])
def test_a_guided_reference_is_refused_where_it_is_compared_with(run: Any, objective: str) -> None:
    with pytest.raises(
        ConfigError, match=r"reference.guidance_scale: got 3.0; only objectives on groups of sampled images"
    ):
        run("run", objective, reference={"guidance_scale": 3.0})


def test_a_window_moves_on_every_so_many_rounds(run: Any, seen: list[Any]) -> None:
    rollout = {"window": 1, "window_range": [0, 1], "window_every": 2}
    run("run", "grpo", rollout=rollout, training={"max_train_steps": 6})
    assert [set(batch.step.tolist()) for _, batch, _ in seen] == [{0}, {0}, {1}, {1}, {0}, {0}]


def test_rewards_that_wait_are_asked_in_a_thread_while_sampling_goes_on() -> None:
    begun, may_end = threading.Event(), threading.Event()

    class Slow:
        waits, clips, grouped, sets, differentiable = True, False, False, False, False

        def __call__(self, images: torch.Tensor, prompts: list[str], metadata: Any = None) -> torch.Tensor:
            assert not torch.is_grad_enabled()
            begun.set()
            assert may_end.wait(20)
            return images.mean((1, 2, 3))

    images = torch.rand(3, 3, 4, 4)
    with Scoring([Slow()]) as scoring:  # type: ignore[list-item]
        first, second = scoring.submit(images, ["a"] * 3), scoring.submit(images[:1], ["a"])
        assert begun.wait(20)
        assert not first.done()
        may_end.set()
        torch.testing.assert_close(first.result()[:, 0], images.mean((1, 2, 3)))
        assert second.result().shape == (1, 1)


def test_a_reward_that_dies_in_its_thread_ends_the_round_with_its_message() -> None:
    class Dead:
        waits, clips, grouped, sets, differentiable = True, False, False, False, False

        def __call__(self, images: torch.Tensor, prompts: list[str], metadata: Any = None) -> torch.Tensor:
            raise rewards.RewardError("the server is gone")

    with pytest.raises(UserError, match="the server is gone"), Scoring([Dead()]) as scoring:  # type: ignore[list-item]
        scoring.submit(torch.rand(1, 3, 4, 4), ["a"]).result()


def test_diffusion_nft_starts_where_the_lagged_policy_is(run: Any, seen: list[Any]) -> None:
    run("run", "diffusion_nft", rollout={"num_iterations": 3, "old_decay": 0.5}, training={"max_train_steps": 6})
    job, batch, out = seen[0]
    assert out.metrics["moved"].max() == 0  # the policy is the lagged one
    assert out.metrics["kl"].max() == 0  # and the base
    torch.testing.assert_close(out.metrics["error/better"], out.metrics["error/worse"])
    assert seen[1][2].metrics["moved"].max() > 0
    # advantages are those of the whole round: mean 0 in a group, and as wide as all rewards
    groups = batch.layout.need_groups()
    assert groups.advantage is not None
    torch.testing.assert_close(groups.advantage.view(3, 2).sum(1), torch.zeros(3), rtol=0, atol=1e-5)
    reward = groups.reward[:, 0]
    centred = reward.view(3, 2) - reward.view(3, 2).mean(1, keepdim=True)
    torch.testing.assert_close(groups.advantage, (centred / (reward.std(correction=0) + 1e-4)).flatten())
    # a level of the sampler per pass, none twice, and not the last
    times = torch.stack([b.t for _, b, _ in seen[:3]])
    assert set(times.flatten().tolist()) <= set(job.rollouts.grid.timesteps[:-1].tolist())
    assert all(len(set(column.tolist())) == 3 for column in times.T)
    assert torch.equal(seen[0][1].content.x0, seen[2][1].content.x0)
    assert job.policy.lagged.round == 1


def test_the_lagged_policy_follows_at_the_start_of_a_round() -> None:
    param = torch.nn.Parameter(torch.zeros(2))
    lagged = Lagged([param], 0.75)
    with torch.no_grad():
        param.fill_(4.0)
    lagged.start_round(0, 0)
    assert lagged.copy[0].tolist() == [0.0, 0.0]
    lagged.start_round(1, 10)
    assert lagged.copy[0].tolist() == [1.0, 1.0]
    lagged.start_round(1, 10)  # a round that is made anew
    assert lagged.copy[0].tolist() == [1.0, 1.0]
    with lagged.active():
        assert param.tolist() == [1.0, 1.0]
    assert param.tolist() == [4.0, 4.0]
    other = Lagged([param], 0.75)
    other.load_state_dict(lagged.state_dict())
    assert other.copy[0].tolist() == [1.0, 1.0]
    assert other.round == 1


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("copy", [0, 0, 0, 0, 0]),
        ("linear_to_0_5", [0, 0.074, 0.075, 0.208, 0.5]),
        ("delayed_linear_to_0_999", [0, 0, 0, 0.9975, 0.999]),
        (0.3, [0.3] * 5),
    ],
)
def test_schedules_of_the_lagged_policy_are_the_released_ones(schedule: str | float, expected: list[float]) -> None:
    assert [lag_decay(schedule, step) for step in (0, 74, 75, 208, 500)] == pytest.approx(expected)
    with pytest.raises(ValueError, match="old_decay is 1"):
        lag_decay(1.0, 0)


def test_forwards_are_counted(run: Any) -> None:
    folder = run("run", "d3po", rollout={"guidance_scale": 2.0})
    state = torch.load(next(folder.glob("checkpoint-*")) / "state.pt", weights_only=True)
    # two rounds of 2 prompts x 2 images x 4 steps with guidance; two steps of 12 rows, policy and reference, with guidance
    assert state["job"]["image_forwards"] == 2 * (2 * 2 * 4 * 2) + 2 * (12 * 2 * 2)


@pytest.mark.parametrize(
    ("objective", "rollout", "message"),
    [
        ("d3po", {"eta": 0.0}, "have no density"),
        ("d3po", {"steps_per_sample": 9}, "3 of 4 sampler steps have a density"),
        ("d3po", {"rewards": []}, "at least one reward"),
        ("grpo", {"window": 4}, "do not fit"),
        ("grpo", {"window": 2, "window_range": [2, 3]}, "start at 2 to 3 do not fit"),
        ("grpo", {"window_every": 3}, "there is none"),
        ("grpo", {"kernel": "flow_sde"}, "a step of flow models"),
        ("grpo", {"negative_gradient": False}, "without guidance there is no unconditional branch"),
        ("dpo", {"negative_gradient": False, "guidance_scale": 2.0}, "only objectives on log-densities"),
        ("prdp", {"eta": 0.0}, "have no density"),
        ("prdp", {"steps_per_sample": 2}, "trains all of their steps"),
        ("prdp", {"first_step": 1}, "trains all of their steps"),
        ("prdp", {"window": 2}, "only policy gradients"),
        ("prdp", {"samples_per_prompt": 4}, "multiple of rollout.samples_per_prompt 4"),
        ("d3po", {"checkpoint_steps": True}, "those on whole trajectories, such as prdp"),
        ("dpo", {"samples_per_prompt": 1}, "at least 2"),
        ("gdpo", {"samples_per_prompt": 4}, "multiple of rollout.samples_per_prompt 4"),
        ("d3po", {"reward_weights": [1.0, 2.0]}, "give one each"),
    ],
)
def test_settings_that_cannot_work_are_refused(run: Any, objective: str, rollout: dict[str, Any], message: str) -> None:
    settings = {} if objective in ("d3po", "grpo", "prdp") else {"beta": 50.0}
    with pytest.raises(ConfigError, match=message):
        run("run", objective, settings=settings, rollout=rollout)


def test_sampling_for_prompts_and_for_data_at_once_is_refused(run: Any, tiny_config: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.prompts: set, and data too"):
        train(tiny_config(tmp_path / "x", objective={"name": "d3po"}, rollout=ONLINE | {"rewards": ["world_verifier"]}))
    with pytest.raises(ConfigError, match=r"reads no reward"):
        run("y", "seppo", settings={"beta": 1.0}, online=False, rollout={"rewards": ["world_verifier"]})
    with pytest.raises(ConfigError, match=r"trains on the data's pairs"):
        run("z", "dpo", online=False)
