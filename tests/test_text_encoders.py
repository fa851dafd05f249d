"""Text encoders that are trained: which weights get gradient, that a fresh adapter is no change, files, runs, refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from rewards_support import write_bright
from safetensors.torch import load_file
from torch import Tensor, nn

from diffalign import adapters, checkpoint, commands, export
from diffalign.config import LoraConfig, ModelConfig, SamplingConfig, TrainingConfig
from diffalign.data.batch import Rows
from diffalign.errors import CheckpointError, ConfigError
from diffalign.families import DECODER, ENCODERS, NETWORK, Conditioning, load_family
from diffalign.families._pipeline import PipelineFamily
from diffalign.jobs.image import ImageJob
from diffalign.metrics import read_rows
from diffalign.plan import make_plan
from diffalign.policy import Policy, guided
from diffalign.preflight import check
from diffalign.sampling import Sampler
from diffalign.text_encoders import TextConditioned, attach, distinct, has_tokens, parameter_groups, text_targets
from diffalign.trainer import train

PROMPTS = ["a red circle", "two green triangles", "a red circle"]
TEXT_ONLY = {"rank": 0, "text_encoder_rank": 4}
BOTH = {"rank": 4, "text_encoder_rank": 4}


@pytest.fixture(scope="session")
def tiny_sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    with torch.random.fork_rng():
        torch.manual_seed(2)
        tiny.build_sd3(folder)
    return folder


@pytest.fixture
def open_family(request: pytest.FixtureRequest) -> Callable[[str], PipelineFamily]:
    """A family with its encoders in memory, by name."""

    def make(name: str) -> PipelineFamily:
        fixture = {"sdxl": "tiny_folder", "sd": "tiny_sd_folder", "sd3": "tiny_sd3_folder"}[name]
        settings = tiny.SETTINGS.get(name, {}) if name == "sd3" else {}
        config = ModelConfig(family=name, pretrained=str(request.getfixturevalue(fixture)), **settings)
        family = load_family(config)
        assert isinstance(family, PipelineFamily)
        family.load(NETWORK, ENCODERS)
        return family

    return make


def tokens_of(family: PipelineFamily, prompts: list[str]) -> Conditioning:
    return family.tokenize(prompts, family.encode_prompts(prompts))


def with_image(family: PipelineFamily, conditioning: Conditioning) -> Conditioning:
    count = len(next(iter(conditioning.values())))
    image = family.image_conditioning((32, 32), (0, 0), (32, 32))
    return conditioning | {name: value.expand(count, *value.shape) for name, value in image.items()}


def rows_of(family: PipelineFamily, prompts: list[str]) -> Rows:
    g = torch.Generator().manual_seed(0)
    shape = (len(prompts), *family.latent_shape(32, 32))
    conditioning = with_image(family, tokens_of(family, prompts))
    x0, noise = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    return Rows(x0=x0, noise=noise, t=torch.full((len(prompts),), 400), conditioning=conditioning)


def disturb(network: nn.Module) -> None:
    """Let the adapters act."""
    g = torch.Generator().manual_seed(1)
    for parameter in adapters.parameters(network):
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=g))


# -- Tokens ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_tokens_are_encoded_as_the_stock_pipeline_encodes_prompts(name: str, open_family: Any) -> None:
    family = open_family(name)
    for prompts in (PROMPTS, [""], [" ".join(["red"] * 60)]):
        wanted, found = family.encode_prompts(prompts), family.encode_tokens(tokens_of(family, prompts))
        assert found.keys() == wanted.keys()
        for key in wanted:
            torch.testing.assert_close(found[key], wanted[key], rtol=1e-6, atol=1e-6)
    negative = family.encode_negative("")
    found = family.encode_tokens(family.tokenize_negative("", negative))
    assert all(torch.equal(found[key], negative[key]) for key in negative)
    assert family.encode_tokens(negative) is negative  # what is encoded stays


def test_a_negative_prompt_of_zeros_stays_zeros_and_takes_no_gradient(open_family: Any) -> None:
    family = open_family("sdxl")
    family.pipeline_config["force_zeros_for_empty_prompt"] = True
    attach(family.with_text_encoders(), LoraConfig(**TEXT_ONLY))
    disturb(family.adapted)
    zeros = family.encode_tokens(family.tokenize_negative("", {}))
    assert all(not value.any() for value in zeros.values())
    sum(value.sum() for value in zeros.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None or not p.grad.any() for p in adapters.parameters(family.adapted))
    assert family.encode_tokens(family.tokenize_negative("blurred", {}))["text_embeds"].any()


def test_distinct_prompts_are_found_and_put_back() -> None:
    ids = torch.tensor([[3, 1], [0, 2], [3, 1]])
    tokens = {"tokens.a": ids.float(), "tokens.zeros": torch.tensor([0.0, 0.0, 1.0])}
    rows, place = distinct(tokens)
    assert len(rows["tokens.a"]) == 3  # the same prompt as zeros is another one
    assert torch.equal(rows["tokens.a"][place], ids)
    assert torch.equal(rows["tokens.zeros"][place], torch.tensor([0, 0, 1]))
    assert len(distinct({"tokens.a": ids})[0]["tokens.a"]) == 2


# -- Gradient, and the reference ------------------------------------------------------------------------------------------


def prepared(family: PipelineFamily, lora: dict[str, Any]) -> tuple[Policy, nn.Module]:
    config = LoraConfig(**lora)
    network = family.with_text_encoders() if config.text_encoder_rank else family.network
    attach(network, config)
    network.train()
    return Policy(family, network), network


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
@pytest.mark.parametrize(
    ("lora", "trained"),
    [
        (TEXT_ONLY, {"text"}),
        (BOTH, {"text", "network"}),
        ({"rank": 4}, {"network"}),
    ],
    ids=["text", "both", "network"],
)
def test_gradient_reaches_exactly_what_is_trained(
    name: str, lora: dict[str, Any], trained: set[str], open_family: Any
) -> None:
    family = open_family(name)
    policy, network = prepared(family, lora)
    for parameter in adapters.parameters(network):  # B is zero at first, so that A would have none
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    rows = rows_of(family, PROMPTS)
    if "text" not in trained:
        encoded = family.encode_tokens(rows.conditioning)
        assert not has_tokens(encoded)
        rows = Rows(x0=rows.x0, noise=rows.noise, t=rows.t, conditioning=with_image(family, encoded))
    scores = policy.measure(rows)
    assert scores.ref is not None
    assert not scores.ref.requires_grad
    scores.need_error().sum().backward()
    everything = {"network": family.network} | {part: family.parts[part] for part in family.text_encoders}
    for part, module in everything.items():
        for path, parameter in module.named_parameters():
            adapter = "lora_" in path
            assert adapter == parameter.requires_grad
            assert adapter == (parameter.grad is not None), f"{part}: {path}"
            if adapter and part != "network":  # some of SD3's own layers are read by nothing in the last block
                assert parameter.grad.any(), f"{part}: {path}"
        kind = "network" if part == "network" else "text"
        assert (kind in trained) == any("lora_" in path for path, _ in module.named_parameters())


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_gradient_flows_through_both_branches_of_guidance(name: str, open_family: Any) -> None:
    family = open_family(name)
    policy, network = prepared(family, TEXT_ONLY)
    disturb(network)
    rows = rows_of(family, ["a red circle"])
    negative = with_image(family, family.tokenize_negative("", family.encode_negative("")))

    def slope(*, detach_negative: bool) -> Tensor:
        network.zero_grad()
        times = family.schedule.time(rows.t)
        output = guided(
            policy, network, rows.x0, times, rows.conditioning, negative, 3.0, detach_negative=detach_negative
        )
        output.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in adapters.parameters(network) if p.grad is not None])

    both, one = slope(detach_negative=False), slope(detach_negative=True)
    assert one.norm() > 0
    assert (both - one).norm() > 1e-2 * one.norm()


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_an_untouched_adapter_is_no_change_and_the_reference_is_the_base_to_the_bit(
    name: str, open_family: Any
) -> None:
    family = open_family(name)
    rows = rows_of(family, PROMPTS)
    with torch.no_grad():
        base = Policy(family, family.network).output(
            family.network, rows.x0, family.schedule.time(rows.t), family.encode_tokens(rows.conditioning)
        )
    policy, network = prepared(family, BOTH)
    with torch.no_grad():
        assert torch.equal(policy.predict(rows.x0, rows.t, rows.conditioning), base)
        disturb(network)
        assert not torch.equal(policy.predict(rows.x0, rows.t, rows.conditioning), base)
        assert torch.equal(policy.predict_reference(rows.x0, rows.t, rows.conditioning), base)


def test_checkpointed_blocks_pass_the_gradient_on_to_the_text(open_family: Any) -> None:
    def slope(checkpointing: bool) -> Tensor:
        family = open_family("sd")
        if checkpointing:
            family.network.enable_gradient_checkpointing()
        policy, network = prepared(family, TEXT_ONLY)
        disturb(network)
        policy.measure(rows_of(family, PROMPTS)).need_error().sum().backward()
        return torch.cat([p.grad.flatten() for p in adapters.parameters(network) if p.grad is not None])

    torch.testing.assert_close(slope(True), slope(False))


def test_text_encoders_drop_nothing_of_their_own_but_the_adapters_inputs(open_family: Any) -> None:
    family = open_family("sd")
    _, network = prepared(family, TEXT_ONLY | {"dropout": 0.5})
    encoder = family.parts["text_encoder"]
    assert network.training
    assert not encoder.training
    drops = [layer.lora_dropout["default"] for layer in adapters.lora_layers(encoder).values()]
    assert all(isinstance(drop, nn.Dropout) and drop.training for drop in drops)
    assert not any(drop.training for drop in drops if network.eval() is None)


def test_layers_whose_output_nothing_reads_have_no_adapter(open_family: Any) -> None:
    family = open_family("sdxl")
    encoder = family.parts["text_encoder"]
    every = text_targets(encoder, "attention", unread_last=False)
    read = text_targets(encoder, "attention", unread_last=True)
    assert len(every) == 8
    assert len(read) == 4
    assert not any("layers.1." in path for path in read)
    with pytest.raises(
        ConfigError, match=r"lora\.text_encoder_targets: no linear or convolution layer ends with 'to_q'"
    ):
        text_targets(encoder, "to_q", unread_last=True)


def test_text_encoders_can_have_a_learning_rate_of_their_own(open_family: Any) -> None:
    family = open_family("sd")
    _, network = prepared(family, BOTH)
    params = adapters.parameters(network)
    (alone,) = parameter_groups(network, params, TrainingConfig())
    assert len(alone["params"]) == len(params)
    first, second = parameter_groups(network, params, TrainingConfig(text_encoder_learning_rate=0.5))
    text = {id(p) for p in adapters.parameters(family.parts["text_encoder"])}
    assert second["lr"] == 0.5
    assert {id(p) for p in second["params"]} == text
    assert len(first["params"]) + len(second["params"]) == len(params)


def test_the_networks_adapter_starts_alike_with_and_without_text_encoders(open_family: Any) -> None:
    alone, together = open_family("sd"), open_family("sd")
    prepared(alone, {"rank": 4})
    prepared(together, BOTH)
    first, second = adapters.state_dict(alone.network), adapters.state_dict(together.network)
    assert all(torch.equal(first[key], second[key]) for key in first)


# -- Files ----------------------------------------------------------------------------------------------------------------


def images_of(family: PipelineFamily) -> Tensor:
    sampler = Sampler(family, PROMPTS[:2], SamplingConfig(num_inference_steps=2, guidance_scale=2.0), 32, tokens=True)
    family.with_text_encoders()
    return sampler.images(range(2), seed=3)


@pytest.mark.parametrize(
    "name", [pytest.param("sd", marks=pytest.mark.slow), "sdxl", pytest.param("sd3", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("lora", [pytest.param(TEXT_ONLY, marks=pytest.mark.slow), BOTH], ids=["text", "both"])
def test_files_of_both_styles_bring_the_same_images_back(
    name: str, lora: dict[str, Any], open_family: Any, tmp_path: Path
) -> None:
    family = open_family(name)
    config = LoraConfig(**lora, text_encoder_alpha=8.0)
    attach(family.with_text_encoders(), config)
    disturb(family.adapted)
    files = export.save_lora(family.adapted, config, tmp_path, family=name)
    wanted = images_of(family)
    assert not torch.equal(wanted, images_of(open_family(name)))
    assert set(files) == {"diffusers", "kohya"}
    for style, file in files.items():
        assert export.adapts_text(file)
        fresh = open_family(name)
        info = export.load_lora(fresh.with_text_encoders(), file, family=name)
        assert (info.style, info.modules) == (style, adapters.count(family.adapted, "default")[0])
        assert torch.equal(images_of(fresh), wanted), style
        with pytest.raises(CheckpointError, match="adapts text_encoder"):
            export.load_lora(open_family(name).network, file, family=name)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
@pytest.mark.parametrize("lora", [TEXT_ONLY, BOTH], ids=["text", "both"])
def test_the_stock_pipeline_loads_the_file_and_makes_the_same_images(
    name: str, lora: dict[str, Any], open_family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers 5.24 asks for a peft that is newer than the newest release; what it calls there is the same.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda min_version: None)
    family = open_family(name)
    config = LoraConfig(**lora, text_encoder_alpha=8.0)
    attach(family.with_text_encoders(), config)
    disturb(family.adapted)
    files = export.save_lora(family.adapted, config, tmp_path, family=name)
    keys = load_file(files["diffusers"])
    assert any(key.startswith("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A") for key in keys)
    wanted = images_of(family)
    fresh = open_family(name)
    fresh.load(DECODER)
    pipeline = fresh.pipeline()
    arguments = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt", "height": 32, "width": 32}
    if name == "sd3":
        arguments["max_sequence_length"] = fresh.text_length  # type: ignore[attr-defined]
    noise = torch.stack([Sampler.noise(_Shape(fresh.latent_shape(32, 32)), i, 0, 3) for i in range(2)])  # type: ignore[arg-type]
    before = pipeline(PROMPTS[:2], latents=noise, **arguments).images
    pipeline.load_lora_weights(str(tmp_path), weight_name=files["diffusers"].name)
    found = pipeline(PROMPTS[:2], latents=noise, **arguments).images
    assert (found - before).abs().max() > 1e-3
    assert ((found * 255).round() - wanted.float()).abs().max() <= 1


class _Shape:
    """What `Sampler.noise` reads of a sampler."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.latent_shape = shape


# -- Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def online(tmp_path: Path, tiny_config: Any) -> Any:
    """`online("name", lora, ...)`: the config of a run of DDPO."""
    write_bright(tmp_path)
    reward = str(tmp_path / "bright.py")

    def make(name: str, lora: dict[str, Any], family: str = "sdxl", **changes: Any) -> Any:
        rollout = {
            "prompts": PROMPTS[:2],
            "samples_per_prompt": 2,
            "num_inference_steps": 3,
            "guidance_scale": 2.0,
            "rewards": [reward],
            "steps_per_sample": 2,
        }
        training = {"train_batch_size": 4, "max_train_steps": 2} | changes.pop("training", {})
        return tiny_config(
            tmp_path / name,
            family,
            objective=changes.pop("objective", {"name": "ddpo"}),
            lora=lora,
            data={"sources": []},
            rollout=rollout | changes.pop("rollout", {}),
            training=training,
            **changes,
        )

    return make


def adapter_of(folder: Path) -> dict[str, Tensor]:
    return load_file(list(checkpoint.steps_of(folder).values())[-1] / "adapter.safetensors")


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_texforce_starts_on_policy_and_moves_text_encoders_alone(
    family: str, online: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[ImageJob] = []
    start = ImageJob.start
    monkeypatch.setattr(ImageJob, "start", lambda self, *args: (jobs.append(self), start(self, *args))[1])
    evaluation = {"prompts": PROMPTS[:2], "grid_prompts": 2}
    config = online("run", TEXT_ONLY, family, training={"learning_rate": 0.05}, evaluation=evaluation)
    folder = train(config).run_dir
    first = read_rows(folder / "metrics.jsonl")[0]
    assert first["ratio"] == pytest.approx(1, abs=1e-6)
    state = adapter_of(folder)
    assert state
    assert all(key.startswith(("text_encoder.", "text_encoder_2.")) for key in state)
    assert any(value.any() for key, value in state.items() if "lora_B" in key)
    bare = jobs[0].policy.bare
    assert isinstance(bare, TextConditioned)
    assert not adapters.lora_layers(bare.network)
    # Evaluation encodes with the text encoders of now: the base's images are those of before, the adapter's are others.
    shown = [(folder / "samples" / f"step-{step:06d}" / "000.png").read_bytes() for step in (0, 2)]
    assert shown[0] != shown[1]
    sampler = jobs[0].sampler
    assert sampler is not None
    assert not torch.equal(sampler.images([0], seed=0, adapters=False), sampler.images([0], seed=0, adapters=True))


@pytest.mark.parametrize("lora", [pytest.param(TEXT_ONLY, marks=pytest.mark.slow), BOTH], ids=["text", "both"])
def test_a_resumed_run_ends_with_the_same_adapters(lora: dict[str, Any], online: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rollout": {"steps_per_generation": 2}}
    training = {"max_train_steps": 3, "checkpointing_steps": 1, "checkpoints_total_limit": None, "ema_decay": 0.5}
    if lora is BOTH:
        training["text_encoder_learning_rate"] = 3e-4
    whole = train(online("whole", lora, training=training, **settings)).run_dir
    shutil.copytree(whole / "checkpoint-000001", tmp_path / "part" / "checkpoint-000001")
    part = train(online("part", lora, training=training | {"resume_from_checkpoint": "latest"}, **settings)).run_dir
    first, second = adapter_of(whole), adapter_of(part)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    rates = read_rows(whole / "metrics.jsonl")[-1]
    assert rates.get("text_encoder_learning_rate") == (3e-4 if lora is BOTH else None)


def test_a_step_does_not_depend_on_its_micro_batches(online: Any) -> None:
    whole = train(online("whole", BOTH, training={"train_batch_size": 4})).run_dir
    split = train(online("split", BOTH, training={"train_batch_size": 2, "gradient_accumulation_steps": 2})).run_dir
    first, second = (read_rows(folder / "metrics.jsonl")[0] for folder in (whole, split))
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-4, abs=1e-6)
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("cached", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["cache", "no_cache"])
def test_dpo_trains_text_encoders_on_cached_latents(cached: bool, tiny_config: Any, tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path / "run",
        lora=BOTH,
        cache={"enabled": cached},
        training={"max_train_steps": 2, "text_encoder_learning_rate": 1e-2},
        denoising={"proportion_empty_prompts": 0.5},
        evaluation={"held_out_fraction": 0.2},
    )
    result = train(config)
    first = read_rows(result.run_dir / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)
    state = adapter_of(result.run_dir)
    assert all(any(v.any() for k, v in state.items() if k.startswith(p) and "lora_B" in k) for p in ("unet", "text_"))


@pytest.mark.parametrize(
    ("objective", "rollout"),
    [
        ({"name": "draft"}, {"steps_per_sample": None, "samples_per_prompt": 8}),
        pytest.param(
            {"name": "diffusion_nft"}, {"steps_per_sample": None, "guidance_scale": 1.0}, marks=pytest.mark.slow
        ),
        pytest.param({"name": "d3po"}, {"shared_start": True}, marks=pytest.mark.slow),
        pytest.param({"name": "spo"}, {"steps_per_sample": None, "keep_threshold": 0.0}, marks=pytest.mark.slow),
    ],
    ids=["draft", "nft", "d3po", "spo"],
)
def test_other_sources_train_text_encoders(objective: dict[str, Any], rollout: dict[str, Any], online: Any) -> None:
    folder = train(online("run", TEXT_ONLY, objective=objective, rollout=rollout)).run_dir
    assert any(value.any() for key, value in adapter_of(folder).items() if "lora_B" in key)


def test_generate_and_evaluate_and_export_take_the_run(online: Any, tmp_path: Path) -> None:
    evaluation = {"prompts": PROMPTS[:2], "rewards": [str(tmp_path / "bright.py")], "at_end": True}
    config = online("run", BOTH, training={"learning_rate": 0.05}, evaluation=evaluation)
    result = train(config)
    assert result.result is not None
    for adapter in (result.run_dir, result.run_dir / "checkpoint-000002"):
        again = commands.evaluate_adapter(config, adapter, tmp_path / "again.json")
        assert again["aligned_mean"] == pytest.approx(result.result["aligned_mean"], abs=1e-6)
        assert again["base_mean"] == pytest.approx(result.result["base_mean"], abs=1e-6)
    out = commands.generate(
        config,
        prompts=PROMPTS[:1],
        adapter=result.run_dir,
        with_base=True,
        seed=0,
        images_per_prompt=1,
        out=tmp_path / "images",
    )
    assert (out / "0000-0-base.png").read_bytes() != (out / "0000-0-adapter.png").read_bytes()
    files = commands.export_adapter(config, result.run_dir / "checkpoint-000002", tmp_path / "export", False)
    first, second = load_file(files[0]), load_file(result.run_dir / export.FILE_NAME)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    card = (result.run_dir / "README.md").read_text()
    assert "with one of the text encoders (rank 4, alpha 4)" in card
    assert "text encoders r4" in (result.run_dir / "report.html").read_text()
    assert "model and clip" in card
    assert "LoRA targets, text encoders" in card


# -- What is counted and what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("lora", [TEXT_ONLY, BOTH], ids=["text", "both"])
def test_a_plan_counts_what_is_trained(family: str, lora: dict[str, Any], online: Any, open_family: Any) -> None:
    plan = make_plan(online("run", lora, family))
    real = open_family(family)
    attach(real.with_text_encoders(), LoraConfig(**lora))
    assert plan.text_encoders is not None
    modules, parameters = adapters.count(real.adapted, "default")
    assert plan.network.lora_parameters + plan.text_encoders.lora_parameters == parameters
    assert plan.network.lora_modules + plan.text_encoders.lora_modules == modules
    assert plan.network.backward_flops > 0
    assert plan.text_encoders.backward_flops > 0
    assert plan.setting.memory.adapter == 16 * parameters
    frozen = sum(p.nbytes for p in real.adapted.parameters() if not p.requires_grad)
    assert plan.setting.memory.network == pytest.approx(frozen, rel=0.01)
    assert make_plan(online("run", {"rank": 4}, family)).text_encoders is None


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 0}, r"lora\.rank: got 0; expected a whole number of at least 1"),
        ({"rank": 4, "text_encoder_rank": -1}, r"lora\.text_encoder_rank: got -1"),
        (
            {"rank": 4, "text_encoder_alpha": 8},
            r"lora\.text_encoder_alpha: has no effect with lora\.text_encoder_rank 0",
        ),
        ({"rank": 4, "text_encoder_targets": "all"}, r"lora\.text_encoder_targets: has no effect"),
        (TEXT_ONLY | {"alpha": 8}, r"lora\.alpha: has no effect with lora\.rank 0"),
        (TEXT_ONLY | {"targets": "all"}, r"lora\.targets: has no effect with lora\.rank 0"),
        (BOTH | {"text_encoder_alpha": 0}, r"lora\.text_encoder_alpha: got 0"),
        (BOTH | {"use_dora": True}, r"lora\.use_dora: got true; adapters of text encoders are plain"),
        (
            {"rank": 4, "text_encoder_rank": 3, "init": "orthogonal"},
            r"lora\.text_encoder_rank: 'orthogonal' needs an even",
        ),
        ({"experts": ["a", "b"], "text_encoder_rank": 4}, r"lora\.text_encoder_rank: has no effect with lora\.experts"),
    ],
)
def test_adapters_that_cannot_be_are_refused(lora: dict[str, Any], message: str, online: Any) -> None:
    settings = {"rank": 16} | lora
    with pytest.raises(ConfigError, match=message):
        check(online("run", settings))


def test_families_without_trainable_text_encoders_and_idle_rates_are_refused(online: Any) -> None:
    config = online("run", BOTH)
    flux = {"family": "flux", "pretrained": "flux1-dev", "random_weights": True}
    with pytest.raises(ConfigError, match=r"lora\.text_encoder_rank: got 4; .* model\.family is 'flux'"):
        check(online("run", BOTH, model=flux, rollout={"guidance_scale": 1.0}))
    for lora in (TEXT_ONLY, {"rank": 4}):
        with pytest.raises(ConfigError, match=r"training\.text_encoder_learning_rate: got 0\.001; it has no effect"):
            check(online("run", lora, training={"text_encoder_learning_rate": 1e-3}))
    check(config)


def test_text_models_refuse_the_keys(online: Any) -> None:
    from diffalign.config_loading import build

    with pytest.raises(ConfigError, match=r"lora\.text_encoder_rank: has no effect on family 'causal_lm'"):
        check(
            build(
                {
                    "output_dir": "runs/x",
                    "model": {"family": "causal_lm", "pretrained": "tiny-lm"},
                    "objective": {"name": "dpo"},
                    "lora": {"text_encoder_rank": 4},
                }
            )
        )
