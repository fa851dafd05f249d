"""Two adapters that are trained together: who trains which half, what is sampled, and the files of a run."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from torch import Tensor

from diffalign import adapters, cli, export, sides
from diffalign.errors import ConfigError
from diffalign.families import DECODER, NETWORK
from diffalign.preflight import check
from diffalign.sampling import Sampler
from diffalign.sampling.guidance import NegativeGuidance
from diffalign.trainer import train

PROMPTS = ["a small red circle on a black background", "a large blue square"]
LOOKS = {"prompts": PROMPTS, "num_prompts": 2, "rewards": ["jpeg_compressibility"], "at_end": True}
CHATS = {"objective": {"name": "chats"}, "negative": {"train": "joint"}}
FAST = {"max_train_steps": 2, "learning_rate": 0.02, "train_batch_size": 4}


@pytest.fixture(params=["sdxl", "sd3"])
def job(request: Any, tmp_path: Path, tiny_config: Any, seen: list[Any]) -> Any:
    """A run after its steps."""
    model = {}
    if request.param == "sd3":
        tiny.build("sd3", tmp_path / "sd3")
        model = {"family": "sd3", "pretrained": str(tmp_path / "sd3"), **tiny.SETTINGS.get("sd3", {})}
    train(tiny_config(tmp_path / "run", model=model, training=FAST, evaluation=LOOKS, **CHATS))
    return seen[0][0]


def stacked(job: Any) -> tuple[Any, Any]:
    batch = job.dataset[0].to(job.accelerator.device)
    return batch.rows(job.objective.needs)


def errors(job: Any, rows: Any) -> Tensor:
    return job.policy.measure(rows, reference=False).need_error()


def test_a_run_starts_at_log_2_and_both_sides_are_learnt(tmp_path: Path, tiny_config: Any, seen: list[Any]) -> None:
    train(tiny_config(tmp_path / "run", training=FAST | {"max_train_steps": 8}, **CHATS))
    assert seen[0][2].loss.item() == pytest.approx(math.log(2), abs=1e-6)
    job, first = seen[0][0], seen[0][1]
    after = job.loss(first).metrics
    assert float(after["rewards/chosen"].mean()) > 0
    assert float(after["rewards/rejected"].mean()) > 0, "the second model gets better at rejected images"


def test_every_side_trains_its_half_alone(job: Any) -> None:
    rows, layout = stacked(job)
    count = len(layout.pairs)
    layers = adapters.lora_layers(job.policy.bare, adapters.DEFAULT)
    for part in (slice(0, count), slice(count, 2 * count)):
        job.policy.bare.zero_grad()
        errors(job, rows)[part].sum().backward()
        halves = torch.zeros(2)
        for layer in layers.values():
            gradient = layer.lora_B[adapters.DEFAULT].weight.grad
            if gradient is not None:
                halves += torch.stack([half.abs().sum() for half in gradient.flatten(1).chunk(2, dim=1)])
        mine, other = (0, 1) if part.start == 0 else (1, 0)
        assert halves[mine] > 0
        assert halves[other] == 0


def test_the_adapters_that_are_sampled_are_those_of_their_rows(job: Any) -> None:
    rows, layout = stacked(job)
    count, network = len(layout.pairs), job.policy.bare
    with torch.no_grad():
        joint = errors(job, rows)
        both = sides.of(network)
        assert both is not None
        trained = [p.requires_grad for p in network.parameters()]
        with both.separated():
            one = errors(job, rows)[:count]
            adapters.use_adapters(network, [sides.REJECTED], [1.0])
            other = errors(job, rows)[count:]
        assert all(p.requires_grad for p in adapters.parameters(network))
        assert sum(p.requires_grad for p in network.parameters()) == sum(trained)
        torch.testing.assert_close(joint, torch.cat([one, other]), rtol=1e-5, atol=1e-6)
        assert torch.equal(errors(job, rows), joint), "training goes on as before"
        with adapters.adapters_off(network):
            base = errors(job, rows)
    assert not torch.allclose(joint[:count], base[:count], rtol=1e-4)
    assert not torch.allclose(joint[count:], base[count:], rtol=1e-4)


def test_pictures_have_each_adapter_in_its_branch(job: Any) -> None:
    job.family.load(NETWORK, DECODER)
    ours = job.sampler.images([0, 1], seed=0)
    plain = Sampler(job.family, job.sampler.prompts, job.config.sampling, 32)
    base = plain.images([0, 1], seed=0, adapters=False)
    assert torch.equal(job.sampler.images([0, 1], seed=0, adapters=False), base)
    assert not torch.equal(ours, base)
    network = job.policy.bare
    with sides.of(network).separated():  # type: ignore[union-attr]

        def mixed(pipe: Any) -> NegativeGuidance:
            return NegativeGuidance(pipe, sides.REJECTED, alpha=0.0, prompt_share=0.5, calls="two")

        del network.__dict__[sides.ATTRIBUTE]
        wanted = plain.images([0, 1], seed=0, around=mixed)
    assert (ours.int() - wanted.int()).abs().max() <= 1


def test_a_network_of_two_sides_is_not_sampled_as_one(job: Any) -> None:
    rows, _ = stacked(job)
    one = {name: value[:1] for name, value in rows.conditioning.items()}
    with pytest.raises(RuntimeError, match="chosen and rejected ones"):
        job.policy.predict(rows.x0[:1], rows.t[:1], one)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_side_has_the_scale_that_was_asked_for(tmp_path: Path, tiny_config: Any, use_rslora: bool) -> None:
    config = tiny_config(tmp_path / "x", lora={"rank": 4, "alpha": 6.0, "use_rslora": use_rslora}, **CHATS)
    lora = sides.lora_of(config)
    root = 0.5 if use_rslora else 1.0
    assert lora.rank == 8
    assert lora.alpha == pytest.approx(6.0 * 2**root)
    assert lora.alpha / lora.rank**root == pytest.approx(6.0 / 4**root)


def test_prompts_of_rejected_images_are_emptied_by_sample(
    tmp_path: Path, tiny_config: Any, tiny_folder: Path, seen: list[Any]
) -> None:
    """As the negative branch is told: of SDXL 1.0, and so of this folder, zeros and not an encoded empty prompt."""
    folder = shutil.copytree(tiny_folder, tmp_path / "zeros")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": True}))
    model = {"pretrained": str(folder)}
    for name, share in (("none", 0.0), ("half", 0.5), ("all", 1.0)):
        negative = {"train": "joint", "proportion_empty_prompts": share}
        train(tiny_config(tmp_path / name, model=model, objective={"name": "chats"}, negative=negative, training=FAST))
    jobs = list(dict.fromkeys(job for job, _, _ in seen))
    emptied = []
    for job in jobs:
        empty = {name: torch.zeros_like(value.float()) for name, value in job.data.text("").items()}
        assert all(value.count_nonzero() for value in job.data.text("").values())
        found = []
        for index in range(len(job.data)):
            example = job.dataset.example(index, 0)
            text = example.rejected_text or example.text
            found.append(all(torch.equal(text[name].float(), empty[name]) for name in empty))
            assert job.dataset.example(index, 0, keep_prompt=True).rejected_text is None
            assert torch.equal(example.noise, jobs[0].dataset.example(index, 0).noise)
        emptied.append(sum(found))
    assert emptied[0] == 0
    assert 0 < emptied[1] < len(jobs[0].data)
    assert emptied[2] == len(jobs[0].data)


def test_a_run_leaves_two_files_that_the_commands_put_in_their_branches(tmp_path: Path, tiny_config: Any) -> None:
    run = tmp_path / "run"
    made = train(tiny_config(run, training=FAST, evaluation=LOOKS, lora={"rank": 2}, **CHATS))
    files = {name: run / name / export.FILE_NAME for name in (".", sides.FOLDER)}
    tensors = {name: export.read_file(file, tensors=True) for name, file in files.items()}
    assert [tensors[name][1]["diffalign.role"] for name in files] == ["positive", "negative"]
    ranks = {value.shape[0] for name in files for key, value in tensors[name][0].items() if "lora_A" in key}
    assert ranks == {2}
    card = (run / "README.md").read_text()
    assert "alpha=0, prompt_share=0.5" in card
    assert 'NegativeGuidance(pipe, "negative/' in card

    out = tmp_path / "again.json"
    assert cli.main(["evaluate", str(run), "--out", str(out)]) == 0
    again, ran = json.loads(out.read_text()), json.loads((made.run_dir / "result.json").read_text())
    assert again["aligned_mean"] == pytest.approx(ran["aligned_mean"], abs=1e-6)
    assert again["alpha"] == 0.0
    assert again["negative_adapter"].endswith(sides.FOLDER)
    assert "prompt_share` has no node" in card
    (last,) = run.glob("checkpoint-*")
    assert cli.main(["evaluate", str(run), "--adapter", str(last), "--out", str(out)]) == 2
    assert cli.main(["export", str(run), "--out", str(tmp_path / "file")]) == 2, "a checkpoint of two adapters"
    mixture = ["merge", str(run), "--adapter", f"{run}=1", "--out", str(tmp_path / "soup")]
    assert cli.main(mixture) == 2, "half of what was trained"
    shutil.rmtree(run / sides.FOLDER)
    assert cli.main(["evaluate", str(run), "--out", str(out)]) == 2, "and half of it is nothing to evaluate"


def test_a_run_of_two_sides_resumes_to_the_same_adapters(tmp_path: Path, tiny_config: Any, adapter_of: Any) -> None:
    steps = FAST | {"max_train_steps": 4, "checkpointing_steps": 2}
    whole = train(tiny_config(tmp_path / "whole", training=steps, **CHATS))
    train(tiny_config(tmp_path / "cut", training=steps | {"max_train_steps": 2}, **CHATS))
    ended = train(tiny_config(tmp_path / "cut", training=steps | {"resume_from_checkpoint": "latest"}, **CHATS))
    one, other = adapter_of(whole.run_dir), adapter_of(ended.run_dir)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"name": "chats"}}, "set it to 'joint'"),
        ({"negative": {"train": "joint"}}, "take 'chats'"),
        ({"negative": {"prompt_share": 0.2}}, "'joint' alone; remove it"),
        ({"negative": {"train": "flip", "proportion_empty_prompts": 0.2}}, "'joint' alone; remove it"),
        ({**CHATS, "lora": {"init": "orthogonal"}}, "do not start at the base"),
        ({**CHATS, "denoising": {"noise": "independent"}}, "shares its timestep and noise"),
        ({**CHATS, "denoising": {"noising": "ddim_inversion"}}, "inversion sees single rows"),
        ({**CHATS, "evaluation": {"held_out_fraction": 0.1}}, "rank nothing"),
        ({**CHATS, "training": {"compile": True}, "evaluation": LOOKS}, "compiled blocks do not see"),
        ({**CHATS, "lora": {"use_dora": True}}, "magnitudes depend on the sum"),
        ({**CHATS, "sampling": {"guidance_scale": 1.0}, "evaluation": LOOKS}, "set it above 1"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, tiny_config: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check(tiny_config(tmp_path / "x", **changes))
