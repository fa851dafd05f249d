"""Reward back-propagation in a run: gradients through sampler, decoder and reward, whatever way it is cut."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rewards_support import write_soft

from diffalign import checkpoint, rewards
from diffalign.config_loading import dump
from diffalign.errors import ConfigError
from diffalign.jobs.image import ImageJob
from diffalign.losses import SRPO, DRaFT, ReFL
from diffalign.metrics import read_rows
from diffalign.policy import guided
from diffalign.sampling.backprop import PromptBatch, RewardPaths, SamplerChain, through_decoder
from diffalign.trainer import average_gradients, train

PROMPTS = ["a small red circle on a black background", "a large blue square", "two green triangles"]


@pytest.fixture
def soft(tmp_path: Path) -> str:
    return write_soft(tmp_path)


@pytest.fixture
def config_of(tmp_path: Path, tiny_config: Any, soft: str) -> Any:
    def make(name: str, objective: str = "draft", **changes: Any) -> Any:
        rollout = {"prompts": PROMPTS, "num_inference_steps": 3, "rewards": [soft]} | changes.pop("rollout", {})
        training = {"train_batch_size": 3, "max_train_steps": 2} | changes.pop("training", {})
        return tiny_config(
            tmp_path / name,
            objective={"name": objective} | changes.pop("settings", {}),
            rollout=rollout,
            training=training,
            data={"sources": []},
            **changes,
        )

    return make


def gradients(job: ImageJob, batch: PromptBatch, objective: Any = None, **rollout: Any) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss of a batch."""
    config = replace(job.config, rollout=replace(job.config.rollout, **rollout))
    if objective is not None:
        config = replace(config, objective=objective)
    old = job.rollouts
    assert isinstance(old, RewardPaths)
    paths = RewardPaths(
        config,
        job.family,
        job.policy,
        job.accelerator,
        prompts=old.prompts,
        conditions=old.conditions,
        latent_shape=old.latent_shape,
    )
    job.policy.bare.zero_grad()
    scores, layout = paths.scores(batch)
    config.objective(scores, layout).loss.backward()
    return {n: p.grad.clone() for n, p in job.policy.bare.named_parameters() if p.grad is not None}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], **more: float) -> None:
    assert one.keys() == other.keys()
    assert any(value.abs().max() > 0 for value in one.values())
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], **({"rtol": 1e-3, "atol": 1e-7} | more))


def test_gradient_of_the_reward_is_that_of_finite_differences(config_of: Any, seen: list[Any]) -> None:
    train(config_of("run", training={"max_train_steps": 1}, rollout={"guidance_scale": 2.0}))
    job, batch, _ = seen[0]
    network = job.policy.bare
    found = gradients(job, batch)
    name, grad = max(found.items(), key=lambda one: float(one[1].abs().max()))
    place = divmod(int(grad.abs().argmax()), grad.shape[1])
    parameter = dict(network.named_parameters())[name]
    losses = []
    for step in (0.02, -0.02):
        with torch.no_grad():
            parameter[place] += step
            scores, layout = job.rollouts.scores(batch)
            losses.append(float(job.objective(scores, layout).loss))
            parameter[place] -= step
    assert (losses[0] - losses[1]) / 0.04 == pytest.approx(float(grad[place]), rel=0.03)


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("draft", {}),
        ("refl", {"target": 5.0}),
        pytest.param("draft", {"last_steps": 1}, marks=pytest.mark.slow),
        pytest.param("draft_lv", {}, marks=pytest.mark.slow),
        pytest.param("align_prop", {}, marks=pytest.mark.slow),
        pytest.param("drtune", {"trained": 1}, marks=pytest.mark.slow),
        pytest.param("srpo", {"target": 5.0}, marks=pytest.mark.slow),
    ],
)
def test_every_method_raises_the_reward(config_of: Any, objective: str, settings: dict[str, Any]) -> None:
    made = config_of(
        "run",
        objective,
        settings=settings,
        training={"max_train_steps": 12, "learning_rate": 3e-3, "max_grad_norm": 0.0},
    )
    rows = [row for row in read_rows(train(made).run_dir / "metrics.jsonl") if "reward" in row]
    assert len(rows) == 12
    assert all(row["grad_norm"] > 0 for row in rows)
    if objective != "srpo":  # its reward is a difference between two captions
        assert rows[-1]["reward"] > rows[0]["reward"] + 0.003


def test_gradients_do_not_depend_on_checkpoints_or_on_how_many_images_are_decoded(
    config_of: Any, seen: list[Any]
) -> None:
    train(config_of("run", training={"max_train_steps": 1}, rollout={"guidance_scale": 2.0, "eta": 0.5}))
    job, batch, _ = seen[0]
    plain = gradients(job, batch, checkpoint_steps=False, decode_batch_size=3)
    same(plain, gradients(job, batch, checkpoint_steps=True, decode_batch_size=3))
    same(plain, gradients(job, batch, checkpoint_steps=False, decode_batch_size=1))


def test_a_detached_negative_branch_leaves_its_part_of_the_gradient_out(config_of: Any, seen: list[Any]) -> None:
    """u + w (c - u) has the gradient w dc + (1 - w) du; detached, w dc, at the same value."""
    train(config_of("run", training={"max_train_steps": 1}))
    job, batch, _ = seen[0]
    policy, x, scale = job.policy, batch.start, 3.0
    times = torch.full((len(x),), 700)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    def there_and_back(prompt: Any, scale: float = 1.0, **more: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        policy.bare.zero_grad()
        output = guided(policy, policy.bare, x, times, prompt, batch.negative, scale, **more)
        (weight * output).sum().backward()
        return output.detach(), {n: p.grad.clone() for n, p in policy.bare.named_parameters() if p.grad is not None}

    (whole, both), (value, alone) = (
        there_and_back(batch.conditioning, scale, detach_negative=d) for d in (False, True)
    )
    (_, c), (_, u) = there_and_back(batch.conditioning), there_and_back(batch.negative)
    torch.testing.assert_close(whole, value, rtol=1e-4, atol=1e-5)
    same(alone, {n: scale * c[n] for n in c}, atol=1e-4)
    same(both, {n: scale * c[n] + (1 - scale) * u[n] for n in c}, atol=1e-4)
    assert max(float(u[n].abs().max()) for n in u) > 1e-2


def test_objectives_choose_whether_the_negative_branch_is_detached(config_of: Any, seen: list[Any]) -> None:
    train(config_of("run", training={"max_train_steps": 1}, rollout={"guidance_scale": 3.0}))
    job, batch, _ = seen[0]
    both, alone = (gradients(job, batch, DRaFT(negative_gradient=n)) for n in (True, False))
    assert max(float((both[n] - alone[n]).abs().max()) for n in both) > 1e-6


def test_a_step_does_not_depend_on_how_it_is_split(config_of: Any, seen: list[Any], adapter_of: Any) -> None:
    settings = {"train_batch_size": 6, "max_train_steps": 2}
    whole = train(config_of("whole", "align_prop", training=settings, rollout={"eta": 1.0})).run_dir
    walks = [(batch.ids, batch.start[0, 0, 0, 0].item()) for _, batch, _ in seen]
    parts = train(
        config_of(
            "parts",
            "align_prop",
            training={"train_batch_size": 2, "gradient_accumulation_steps": 3, "max_train_steps": 2},
            rollout={"eta": 1.0},
        )
    ).run_dir
    same(adapter_of(whole), adapter_of(parts), atol=2e-5)
    assert walks[0][0] != walks[1][0] or walks[0][1] != walks[1][1], "every step has its own noise"


def test_resumed_runs_go_on_as_if_they_had_not_stopped(config_of: Any, adapter_of: Any) -> None:
    whole = train(config_of("whole", "align_prop", training={"max_train_steps": 4, "checkpointing_steps": 2})).run_dir
    first = config_of("parts", "align_prop", training={"max_train_steps": 4, "checkpointing_steps": 2})
    stopped = Path(first.output_dir)
    train(first)
    for step, folder in checkpoint.steps_of(stopped).items():
        if step == 4:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    again = replace(first, training=replace(first.training, resume_from_checkpoint="latest"))
    train(again)
    one, two = adapter_of(whole), adapter_of(stopped)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_walks_draw_once_for_an_optimiser_step(config_of: Any, seen: list[Any]) -> None:
    train(config_of("run", training={"train_batch_size": 1, "gradient_accumulation_steps": 2, "max_train_steps": 2}))
    draws = [int(torch.randint(1 << 30, (), generator=SamplerChain(job.rollouts, b).generator)) for job, b, _ in seen]
    assert draws[0] == draws[1] != draws[2] == draws[3]


def test_forwards_are_counted_once_however_often_a_checkpoint_repeats_them(config_of: Any, seen: list[Any]) -> None:
    train(config_of("run", training={"max_train_steps": 1}, rollout={"guidance_scale": 2.0}))
    job, batch, _ = seen[0]
    for again in (True, False):
        before = job.policy.forwards
        gradients(job, batch, checkpoint_steps=again)
        assert job.policy.forwards - before == 3 * 3 * 2  # images, steps, branches


def test_several_rewards_are_weighted_and_told_apart(
    config_of: Any, seen: list[Any], soft: str, tmp_path: Path
) -> None:
    other = tmp_path / "other.py"
    other.write_text(Path(soft).read_text().replace("sin()", "cos()"))
    train(
        config_of(
            "run",
            rollout={"rewards": [soft, str(other)], "reward_weights": [1.0, -2.0]},
            training={"max_train_steps": 1},
        )
    )
    _, _, out = seen[0]
    one, two = out.metrics[f"reward/{soft}"], out.metrics[f"reward/{other}"]
    torch.testing.assert_close(out.metrics["reward"], one - 2 * two)


def test_captions_of_a_walk_reach_the_reward(config_of: Any, seen: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    original = rewards.score
    monkeypatch.setattr(rewards, "score", lambda m, i, p, **k: asked.append(list(p)) or original(m, i, p, **k))
    settings = {"positive": ["outlined"], "negative": ["plain"], "target": 5.0}
    train(config_of("run", "srpo", settings=settings, training={"max_train_steps": 1}))
    prefixes = {text.partition(". ")[0] for texts in asked for text in texts}
    assert prefixes == {"outlined", "plain"}


def test_scores_through_the_decoder_keep_value_and_gradient() -> None:
    latents = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    factor = torch.arange(1.0, 6.0, dtype=torch.float64)

    def score(images: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        given = (images.sin() * factor[start : start + len(images), None, None]).flatten(1).sum(1)
        return given, given[:, None].detach()

    found, each = through_decoder(lambda x: x**3, score, latents, 2)
    wanted = ((latents**3).sin() * factor[:, None, None]).flatten(1).sum(1)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(each[:, 0], wanted.detach())
    (one,) = torch.autograd.grad(found.square().sum(), latents)
    (two,) = torch.autograd.grad(wanted.square().sum(), latents)
    torch.testing.assert_close(one, two)


def test_scores_of_a_set_through_the_decoder_keep_the_gradient_of_their_sum() -> None:
    latents = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def score(images: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        products = images @ images.T
        others = products.sum(1) - products.diagonal()
        return others, others[:, None].detach()

    found, _ = through_decoder(lambda x: x**3, score, latents, 4)
    (one,) = torch.autograd.grad(found.sum(), latents)
    (two,) = torch.autograd.grad(score(latents**3, 0)[0].sum(), latents)
    torch.testing.assert_close(one, two)


def test_gradients_are_averaged_over_processes_where_the_wrapper_is_not_called() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, 3.0])

    class Two:
        num_processes = 2

        def reduce(self, value: torch.Tensor, reduction: str) -> torch.Tensor:
            assert reduction == "mean"
            return (value + torch.tensor([3.0, 5.0])) / 2

    average_gradients(Two(), [parameter, torch.nn.Parameter(torch.zeros(1))])  # type: ignore[arg-type]
    assert parameter.grad.tolist() == [2.0, 4.0]


@pytest.mark.slow
def test_two_processes_equal_one(config_of: Any, adapter_of: Any, tmp_path: Path) -> None:
    """Walks of random length, guidance, noise at every step, checkpoints, two micro-batches; prompts come again."""
    rollout = {"eta": 1.0, "guidance_scale": 2.0, "checkpoint_steps": True}
    training = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 2}
    one = train(config_of("one", "align_prop", training=training, rollout=rollout)).run_dir
    shared = training | {"train_batch_size": 1}
    file = tmp_path / "two.yaml"
    file.write_text(dump(config_of("two", "align_prop", training=shared, rollout=rollout)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # What torchrun and accelerate launch set.
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    world |= {"PYTHONPATH": str(Path(__file__).parent.parent.parent), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "diffalign", "train", str(file)],
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        messages = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], messages
    same(adapter_of(one), adapter_of(tmp_path / "two"), atol=2e-5)
    for a, b in zip(*(read_rows(folder / "metrics.jsonl") for folder in (one, tmp_path / "two")), strict=True):
        assert a["reward"] == pytest.approx(b["reward"], rel=1e-4)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert (a["samples"], a["count"]) == (b["samples"], b["count"])


def test_what_cannot_be_differentiated_is_refused_at_once(config_of: Any, tmp_path: Path) -> None:
    hard = write_soft(tmp_path, differentiable=False)
    with pytest.raises(ConfigError, match=r"not differentiable.*'draft' follows its gradient"):
        train(config_of("run", rollout={"rewards": [hard]}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"samples_per_prompt": 3}}, r"rollout.samples_per_prompt: got 3.*one image of every prompt"),
        ({"rollout": {"num_iterations": 2}}, r"rollout.num_iterations: got 2"),
        ({"denoising": {"timestep_min": 5}}, r"denoising.timestep_min: got 5.*measures no denoising error"),
        (
            {"objective": "refl", "settings": {"first_step": 3}},
            r"objective.first_step is 3; the sampler's steps are 0 to 2",
        ),
        ({"objective": "drtune", "settings": {"trained": 4}}, r"objective.trained is 4"),
        ({"training": {"train_batch_size": "auto"}}, r"train_batch_size: got 'auto'"),
        ({"rollout": {"rewards": []}}, r"rollout.rewards: empty"),
    ],
)
def test_settings_that_cannot_work_are_refused(config_of: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(config_of("run", **changes))


def test_keys_of_back_propagation_are_refused_elsewhere(config_of: Any) -> None:
    with pytest.raises(ConfigError, match=r"rollout.decode_batch_size: got 2, which has no effect"):
        train(config_of("run", "dgpo", rollout={"decode_batch_size": 2, "samples_per_prompt": 3}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DRaFT(link="hinge"), "target is None with link 'hinge'"),
        (lambda: ReFL(link="linear"), "target is 2.0 with link 'linear'"),
        (lambda: DRaFT(last_steps=0), "last_steps is 0"),
        (lambda: SRPO(positive=()), "positive is empty"),
        (lambda: SRPO(caption="{word}"), "expected both {word} and {prompt}"),
    ],
)
def test_objectives_refuse_settings_that_contradict_each_other(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
