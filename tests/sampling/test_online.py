"""What holds for every method on sampled images: where gradient flows, what densities are, and how images are chosen."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rewards_support import write_soft

from diffalign import losses
from diffalign.config import RunConfig
from diffalign.config_loading import build
from diffalign.data.batch import RowBatch, mapped
from diffalign.hardware import open_family
from diffalign.jobs.image import ImageJob
from diffalign.references import Reference
from diffalign.rounds import plain, rebuilt
from diffalign.sampling.entries import CLASSES, Sampled, StepRows, TrajectoryBatch
from diffalign.sampling.rules import has_lagged
from diffalign.sampling.trajectories import Trajectory, log_density

PROMPTS = ["a small red circle on a black background", "two green triangles"]


@dataclass(frozen=True)
class Method:
    """How an online objective is tried.

    Attributes:
        name: of the objective.
        negative: whether gradient flows through the branch without the prompt.
        settings, rollout: of the config.
        data: it compares images of the data with samples.
    """

    name: str
    negative: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)
    data: bool = False


GUIDED = {"guidance_scale": 2.0}
BETA = {"beta": 50.0}
# Log-densities of a sampler's steps are those of guided predictions; errors of images that are noised again are not.
METHODS = [
    *(
        Method(name, True, {}, GUIDED)
        for name in ("ddpo", "dpok", "dance_grpo", "flow_dppo", "grpo", "prdp", "d3po", "pso")
    ),
    Method("spo", True, {}, GUIDED | {"reward_scale": 1e4}),
    *(Method(name, False, {}, GUIDED) for name in ("flow_grpo", "grpo_guard")),
    Method("flow_grpo", True, {"beta": 0.04, "kl_form": "exact"}, GUIDED | {"negative_gradient": True}),
    Method("ddpo", False, {}, GUIDED | {"negative_gradient": False}),
    *(Method(name, False, {}, GUIDED) for name in ("diffusion_nft", "awm", "dgpo", "crd", "rwr", "raft", "sft")),
    *(Method(name, False, BETA, GUIDED) for name in ("dpo", "gdpo")),
    Method("seppo", False, BETA, data=True),
    Method("dro", data=True),
    Method("draft", True, {}, GUIDED),
    Method("draft", False, {"negative_gradient": False}, GUIDED),
    *(Method(name, True, {}, GUIDED) for name in ("draft_lv", "align_prop", "drtune")),
    *(Method(name, True, {"target": 5.0}, GUIDED) for name in ("refl", "srpo")),
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Any, pair_parquet: Any) -> Any:
    """The configuration of a method."""
    folder = tmp_path_factory.mktemp("online")
    reward = write_soft(folder)

    def make(method: Method, **changes: Any) -> RunConfig:
        own = {} if method.data else {"prompts": PROMPTS, "rewards": [reward], "samples_per_prompt": 2}
        if method.name in ("draft", "draft_lv", "align_prop", "drtune", "refl", "srpo"):
            del own["samples_per_prompt"]
        sections: dict[str, Any] = {
            "output_dir": str(folder / "run"),
            "model": {"family": "sdxl", "pretrained": str(tiny_folder)},
            "data": {"sources": [str(pair_parquet)] if method.data else [], "resolution": 32},
            "cache": {"dtype": "float32", "dir": str(folder / "cache"), "workers": 1},
            "objective": {"name": method.name} | method.settings,
            "rollout": {"num_inference_steps": 3} | own | method.rollout,
            "lora": {"rank": 2},
            "training": {"train_batch_size": 4, "cpu": True, "max_train_steps": 2},
        }
        return build(sections | {name: sections.get(name, {}) | value for name, value in changes.items()})

    return make


@pytest.fixture(scope="module")
def parts(tree: Any) -> SimpleNamespace:
    """One network with an adapter, for all methods."""
    config = tree(METHODS[0])
    here = SimpleNamespace(
        process_index=0,
        num_processes=1,
        device=torch.device("cpu"),
        is_main_process=True,
        gather=lambda x: x,
        wait_for_everyone=lambda: None,
        main_process_first=nullcontext,
    )
    family: Any = open_family(config, here)  # type: ignore[arg-type]
    family.unload = lambda *names: None  # every job of this module has the same parts
    job = ImageJob(config, here, family)  # type: ignore[arg-type]
    network = job.load()
    params = job.attach(network)
    return SimpleNamespace(accelerator=here, family=family, network=network, params=params)


def started(parts: SimpleNamespace, config: RunConfig) -> tuple[ImageJob, Reference]:
    """A job whose policy has moved away from its reference and from its lagged copy."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for param in parts.params:
            param.copy_(0.05 * torch.randn(param.shape, generator=generator))
    job = ImageJob(config, parts.accelerator, parts.family)
    job.prepare()
    reference = Reference(replace(config.reference, scheme="sync", every=100), parts.network, parts.params)
    job.start(parts.network, parts.network, reference)
    with torch.no_grad():
        for param in parts.params:
            param.add_(0.01 * torch.randn(param.shape, generator=generator))
    parts.network.zero_grad()
    return job, reference


def negative_of(batch: Any) -> dict[str, torch.Tensor]:
    """Conditioning without a prompt, where a batch has it."""
    found = batch.content.negative if isinstance(batch, RowBatch) else getattr(batch, "negative", None)
    return {} if found is None else {name: value for name, value in found.items() if value.is_floating_point()}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}{'-' if m.negative else '-detached'}")
def test_gradient_flows_to_the_adapter_and_nowhere_else(tree: Any, parts: SimpleNamespace, method: Method) -> None:
    """Not into the base, not into reference or lagged copies; through the branch without the prompt where it should."""
    objective = losses.find(method.name)
    groups = "groups" in objective.needs.layout and method.name not in ("ddpo", "dpok")
    noised = groups and not tree(method).objective.trains_steps and method.name not in ("gdpo", "raft")
    job, reference = started(parts, tree(method, **({"reference": {"guidance_scale": 2.0}} if noised else {})))
    batch = mapped(next(iter(job.micro_batches(0))), lambda x: x.clone())
    for value in (leaves := negative_of(batch)).values():
        value.requires_grad_()
    lagged = job.policy.lagged
    assert (lagged is not None) == has_lagged(job.config)
    copies = [*(reference.copy or []), *(lagged.copy if lagged is not None else [])]
    before = [copy.clone() for copy in copies]
    for copy in copies:
        copy.requires_grad_()
    out = job.loss(batch)
    out.loss.backward()
    trained = {id(param) for param in parts.params}
    for name, param in parts.network.named_parameters():
        assert (param.grad is not None) == (id(param) in trained), name
    assert sum(float(param.grad.abs().sum()) for param in parts.params) > 0
    for component in parts.family.parts.values():
        if isinstance(component, torch.nn.Module) and component is not parts.network:
            assert all(param.grad is None for param in component.parameters())
    assert all(copy.grad is None and torch.equal(copy, old) for copy, old in zip(copies, before, strict=True))
    got = [value.grad is not None and bool(value.grad.any()) for value in leaves.values()]
    assert any(got) == method.negative
    if noised:
        assert leaves, "a guided reference predicts without a prompt, too"


def test_stored_steps_have_the_densities_they_had_when_they_were_sampled(
    tree: Any, parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever type the network answers in: densities are those of the latents as they are stored, also in a checkpoint."""
    predict = parts.family.predict
    monkeypatch.setattr(parts.family, "predict", lambda *args: predict(*args).bfloat16())
    job, _ = started(parts, tree(Method("grpo_guard", rollout=GUIDED)))
    made = job.rollouts._make(0)
    torch.save(plain(made), tmp_path / "round.pt")
    back = rebuilt(torch.load(tmp_path / "round.pt", weights_only=True), CLASSES)
    assert len(back) == 2
    for entry in back:
        assert isinstance(entry, StepRows)
        assert entry.x.dtype == entry.x_next.dtype == entry.mean.dtype == entry.old.dtype == torch.float32
        deviation = torch.full((2,), job.rollouts.grid.deviation(entry.step, 1.0))
        assert torch.equal(log_density(entry.x_next, entry.mean, deviation), entry.old)


def test_choices_move_a_distribution_as_enumeration_says(tree: Any, parts: SimpleNamespace) -> None:
    """p'(x) = p(x) K E[e^R(x) / (e^R(x) + sum of e^R of K - 1 others)], arXiv 2407.09499, with three images and K = 3."""
    rollout = {"select": "bradley_terry", "select_temperature": 0.5, "samples_per_prompt": 3}
    job, _ = started(parts, tree(Method("sft", rollout=rollout)))
    p, reward = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.0, 0.4, 0.8])
    weight = (reward / 0.5).exp()
    wanted = torch.zeros(3)
    for x, y, z in itertools.product(range(3), repeat=3):
        wanted[x] += 3 * p[x] * p[y] * p[z] * weight[x] / (weight[x] + weight[y] + weight[z])
    assert wanted.sum() == pytest.approx(1.0)
    draws = torch.multinomial(p.expand(4000, 3), 3, replacement=True, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(3)
    for number, drawn in enumerate(draws):
        given = reward[drawn]
        latents = drawn.view(3, 1).float()
        one = Sampled(
            id=f"x{number}", prompt=0, trajectory=Trajectory([latents], []), reward=given, rewards=given[:, None]
        )
        counts[int(job.rollouts._chosen(one, 0).latents)] += 1
    torch.testing.assert_close(counts / 4000, wanted, rtol=0, atol=0.025)
    assert (wanted - p).abs().max() > 0.1


# -- whole trajectories ----------------------------------------------------------------------------------------------


def adapter_gradient(parts: SimpleNamespace, job: ImageJob, batch: Any) -> list[torch.Tensor]:
    """Gradient of the mean loss of a batch."""
    parts.network.zero_grad()
    job.loss(batch).loss.backward()
    return [param.grad.clone() for param in parts.params]


def trajectories_of(tree: Any, parts: SimpleNamespace, **rollout: Any) -> tuple[ImageJob, TrajectoryBatch]:
    """A job on whole trajectories whose policy is neither the reference nor the one that sampled, and a batch."""
    settings = {"beta": 0.1, "epsilon": 1e-4}
    job, _ = started(parts, tree(Method("prdp", settings=settings, rollout=GUIDED | rollout)))
    batch = next(iter(job.micro_batches(0)))
    assert isinstance(batch, TrajectoryBatch)
    return job, replace(batch, old=batch.old + 1e-3 * torch.arange(batch.old.numel()).view_as(batch.old).sin())


def test_gradient_step_by_step_is_that_of_all_steps_at_once(tree: Any, parts: SimpleNamespace) -> None:
    """d loss / d adapter = sum over steps of (d loss / d l_k) (d l_k / d adapter): recomputed, in one graph, and by hand."""
    job, batch = trajectories_of(tree, parts)
    rollouts = job.rollouts
    assert rollouts.densities.recompute
    one = adapter_gradient(parts, job, batch)
    rollouts.densities.recompute = False
    whole = adapter_gradient(parts, job, batch)
    scores, layout = rollouts.scores(batch)
    leaf = scores.units.theta.detach().requires_grad_()
    units = replace(scores.units, theta=leaf)
    (factor,) = torch.autograd.grad(job.objective(replace(scores, units=units), layout).loss, leaf)
    assert 0 < int(factor.ne(0).sum()) < factor.numel(), "some steps are clipped"
    parts.network.zero_grad()
    for place in range(len(batch.steps)):
        single = rollouts.scores(batch)[0].units.theta[:, place]
        (factor[:, place] * single).sum().backward()
    by_hand = [param.grad.clone() for param in parts.params]
    scale = max(float(value.abs().max()) for value in whole)
    for a, b, c in zip(one, whole, by_hand, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, b, rtol=1e-3, atol=1e-4 * scale)


def test_one_step_at_a_time_has_a_graph(tree: Any, parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the network is kept by the forward pass, and a step's backward begins before the next is computed again."""
    job, batch = trajectories_of(tree, parts, num_inference_steps=4)
    kept: list[int] = []
    events: list[str] = []
    predict = parts.family.predict

    def watched(network: Any, x: torch.Tensor, *more: Any) -> torch.Tensor:
        output = predict(network, x, *more)
        if output.requires_grad:
            events.append("forward")
            output.register_hook(lambda grad: events.append("backward"))
        return output

    monkeypatch.setattr(parts.family, "predict", watched)

    def count(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.numel())
        return x

    found = {}
    for again in (True, False):
        job.rollouts.densities.recompute = again
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss = job.loss(batch).loss
        found[again] = sum(kept)
        events.clear()
        loss.backward()
        assert events == (["forward", "backward"] * 3 if again else ["backward"] * 3)
    assert found[True] < 0.01 * found[False]


def test_fresh_trajectories_miss_the_rewards_difference_and_nothing_else(tree: Any, parts: SimpleNamespace) -> None:
    """With an untouched adapter log-ratios are exactly 0: the residual of a pair is its reward difference over beta."""
    job, _ = started(parts, tree(Method("prdp", settings={"beta": 0.1}, rollout=GUIDED)))
    with torch.no_grad():
        for param in parts.params:
            param.zero_()
    job.policy.reference = Reference(job.config.reference, parts.network, parts.params)
    batch = next(iter(job.micro_batches(0)))
    out = job.loss(batch)
    assert batch.old.shape == (4, 2)  # 3 steps, of which the last has no density
    assert batch.steps.tolist() == [0, 1]
    assert out.metrics["log_ratio"].abs().max() == 0
    torch.testing.assert_close(job.rollouts.scores(batch)[0].units.theta.detach(), batch.old, rtol=1e-4, atol=1e-5)
    reward = batch.layout.need_groups().reward[:, 0].view(2, 2)
    gap = (reward[:, 0] - reward[:, 1]) / 0.1
    torch.testing.assert_close(out.per_item.detach(), gap.square().repeat_interleave(2), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(out.metrics["residual"], gap.abs().repeat_interleave(2), rtol=1e-3, atol=1e-6)
    assert not torch.equal(batch.latents[0, 0], batch.latents[1, 0]), "every image starts from its own noise"


def test_forwards_of_whole_trajectories_are_counted_once(tree: Any, parts: SimpleNamespace) -> None:
    job, batch = trajectories_of(tree, parts)
    assert job.policy.forwards == 4 * 3 * 2  # images, steps of the sampler, branches
    adapter_gradient(parts, job, batch)
    assert job.policy.forwards == 4 * 3 * 2 + 2 * (4 * 2 * 2)  # policy and reference: images, trained steps, branches
