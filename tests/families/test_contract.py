"""What every denoising family must do, against the stock pipeline of its folder. A new family joins by existing.

`families/tiny.py` has a tiny pipeline for each. Images are not square, so that rows and columns cannot be mistaken.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from families import tiny
from torch import Tensor, nn

from diffalign import adapters, export, plugins
from diffalign.config import LoraConfig, ModelConfig, SamplingConfig
from diffalign.data.batch import PairExample, collate
from diffalign.data.encode import encode_prompts
from diffalign.errors import ConfigError
from diffalign.families import DECODER, ENCODERS, NETWORK, Conditioning, DenoisingFamily, load_family
from diffalign.families._pipeline import PipelineFamily
from diffalign.policy import Policy, guided
from diffalign.prediction import add_noise, convert, target
from diffalign.sampling.trajectories import make_grid

HEIGHT, WIDTH = 32, 64
PROMPTS = ["a red circle", "a blue square on a red circle moves on a blue square"]


@cache
def denoising_families() -> list[str]:
    found = plugins.names("families")
    return [name for name in found if issubclass(plugins.find("families", name), DenoisingFamily)]


# Arguments of a stock pipeline's call without which it would read a prompt otherwise than when it is given embeddings.
CALLS: dict[str, dict[str, Any]] = {
    "pixart": {"clean_caption": False, "use_resolution_binning": False},
    "sana": {"use_resolution_binning": False},
    "cogvideox": {"max_sequence_length": tiny.TOKENS},  # which the family reads off the network
}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("net.0.proj", "net.2")
# Name endings that the presets "attention" and, beyond it, "attention+ff" and "all" stand for.
PRESETS: dict[str, tuple[set[str], set[str], set[str]]] = {
    "sd3": (set(JOINT), set(FEED_FORWARD), {"norm1.linear", "norm1_context.linear"}),
    "flux": (
        set(JOINT),
        {*FEED_FORWARD, "proj_mlp", "proj_out"},
        {"norm1.linear", "norm1_context.linear", "norm.linear"},
    ),
    "pixart": (set(ATTENTION), set(FEED_FORWARD), set()),
    "sana": (set(ATTENTION), {"conv_inverted", "conv_point"}, set()),
    "qwen_image": (set(JOINT), set(FEED_FORWARD), {"img_mod.1", "txt_mod.1"}),
    "wan": (set(ATTENTION), set(FEED_FORWARD), set()),
    "cogvideox": (set(ATTENTION), set(FEED_FORWARD), {"norm1.linear", "norm2.linear"}),
}


@dataclass(frozen=True)
class Case:
    """A family over its tiny folder, and the stock pipeline loaded without our code."""

    name: str
    folder: Path
    family: PipelineFamily
    stock: Any
    texts: Conditioning  # of PROMPTS
    negative: Conditioning

    @property
    def settings(self) -> dict[str, Any]:
        return tiny.SETTINGS.get(self.name, {})

    @property
    def stock_network(self) -> nn.Module:
        network: nn.Module = getattr(self.stock, self.family.network_part)
        return network

    def open(self, *parts: str, **changes: Any) -> PipelineFamily:
        return open_family(self.name, self.folder, *parts, **changes)

    def shape(self) -> tuple[int, ...]:
        return self.family.latent_shape(HEIGHT, WIDTH)

    def noise(self, n: int = 2, seed: int = 0) -> Tensor:
        return torch.randn(n, *self.shape(), generator=torch.Generator().manual_seed(seed))

    def conditioning(self) -> Conditioning:
        image = self.family.image_conditioning((HEIGHT, WIDTH), (0, 0), (HEIGHT, WIDTH))
        return self.texts | {key: value.expand(2, -1) for key, value in image.items()}

    def policy(self, targets: str = "all", stir: float = 0.0) -> Policy:
        """Over a copy of the network, with an adapter."""
        network = copy.deepcopy(self.family.network)
        adapters.attach(network, LoraConfig(rank=2, targets=targets))
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapters.parameters(network):
                parameter.add_(stir * torch.randn(parameter.shape, generator=draw))
        return Policy(self.family, network)

    def call_stock(self, sampling: SamplingConfig, noise: Tensor, output_type: str = "latent") -> Tensor:
        """The stock pipeline with prompts, not embeddings."""
        arguments = CALLS.get(self.name, {}) | self.settings | self.family.guidance_arguments(sampling)
        if self.name == "qwen_image" and sampling.guidance_scale > 1:
            arguments["negative_prompt"] = [""] * 2
        with torch.no_grad():
            output: Tensor = self.stock(
                PROMPTS,
                latents=self.family.to_pipeline(noise.clone()),
                height=HEIGHT,
                width=WIDTH,
                num_inference_steps=sampling.num_inference_steps,
                output_type=output_type,
                **arguments,
            )[0]
        return self.family.from_pipeline(output, noise.shape) if output_type == "latent" else output


def open_family(name: str, folder: Path, *parts: str, **changes: Any) -> PipelineFamily:
    family = load_family(ModelConfig(family=name, pretrained=str(folder), **tiny.SETTINGS.get(name, {}) | changes))
    assert isinstance(family, PipelineFamily)
    family.load(*parts)
    return family


@pytest.fixture(scope="module", params=denoising_families())
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name = str(request.param)
    if name in tiny.FIXTURES:
        folder = request.getfixturevalue(tiny.FIXTURES[name])
    elif name in tiny.BUILDERS:
        folder = tmp_path_factory.mktemp("tiny") / name
        tiny.build(name, folder)
    else:
        pytest.fail(f"family {name!r} has no tiny pipeline: add a builder to BUILDERS of tests/families/tiny.py")
    family = open_family(name, folder, NETWORK, ENCODERS, DECODER)
    stock = family.pipeline_class().from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    for part in stock.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return Case(name, folder, family, stock, family.encode_prompts(PROMPTS), family.encode_negative(""))


# --- conditioning and the network's call -----------------------------------------------------------------------------


def call_of(network: nn.Module, use: Callable[[], object]) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors that a network is first called with, by argument name, and what it returns."""
    seen: list[tuple[dict[str, Tensor], Tensor]] = []
    signature = inspect.signature(type(network).forward)

    def hook(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        found: dict[str, Tensor] = {}
        for name, value in signature.bind(module, *args, **options).arguments.items():
            for key, entry in value.items() if isinstance(value, dict) else [(name, value)]:
                if isinstance(entry, Tensor):
                    found[key] = entry
                elif isinstance(entry, tuple):
                    found |= {f"{key}.{i}": part for i, part in enumerate(entry)}
        seen.append((found, output[0]))

    handle = network.register_forward_hook(hook, with_kwargs=True)
    try:
        use()
    finally:
        handle.remove()
    return seen[0]


def test_the_network_is_called_as_by_the_stock_pipeline(case: Case) -> None:
    sampling, noise = SamplingConfig(num_inference_steps=2, guidance_scale=1.0), case.noise()
    theirs, expected = call_of(case.stock_network, lambda: case.call_stock(sampling, noise))
    time = case.stock.scheduler.timesteps[0].expand(2)
    x = noise * getattr(case.stock.scheduler, "init_noise_sigma", 1.0)
    with torch.no_grad():
        ours, output = call_of(
            case.family.network, lambda: case.family.predict(case.family.network, x, time, case.conditioning())
        )
    assert ours.keys() - {"encoder_hidden_states_mask"} == theirs.keys() - {"encoder_hidden_states_mask"}
    for name, value in theirs.items():
        mine = ours[name].float()
        if case.name == "qwen_image" and name.startswith("encoder_hidden_states"):
            length = value.shape[1]  # the stock pipeline's text ends with the longest prompt
            assert mine[:, length:].count_nonzero() == 0
            mine = mine[:, :length]
        torch.testing.assert_close(mine, value.float().expand_as(mine), atol=1e-5, rtol=1e-5, msg=name)
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


def test_predictions_have_the_latents_shape_and_depend_on_everything(case: Case) -> None:
    family, noise, conditioning = case.family, case.noise(), case.conditioning()
    late, early = family.schedule.time(torch.tensor([900, 700])), family.schedule.time(torch.tensor([300, 100]))
    with torch.no_grad():
        output = family.predict(family.network, noise, late, conditioning)
        others = [
            family.predict(family.network, noise, early, conditioning),
            family.predict(family.network, noise.flip(-1), late, conditioning),
            family.predict(family.network, noise, late, {k: v.flip(0) for k, v in conditioning.items()}),
        ]
    assert output.shape == noise.shape
    assert output.isfinite().all()
    assert all((other - output).abs().amax() > 1e-4 for other in others)


def test_half_precision_runs_and_is_close(case: Case) -> None:
    config = ModelConfig(family=case.name, pretrained=str(case.folder), **case.settings)
    family = load_family(config, dtype=torch.bfloat16)
    assert isinstance(family, PipelineFamily)
    family.load(NETWORK)
    t = family.schedule.time(torch.tensor([500, 600]))
    with torch.no_grad():
        exact = case.family.predict(case.family.network, case.noise(), t, case.conditioning())
        rough = family.predict(family.network, case.noise().to(torch.bfloat16), t, case.conditioning())
    assert rough.dtype == torch.bfloat16
    # FLUX and Qwen-Image round the time itself, in the stock pipeline as here: 0.601 becomes 0.602.
    assert (rough - exact).square().mean() < 0.1 * exact.square().mean()


def test_conditioning_has_one_shape_and_survives_cache_and_batch(case: Case) -> None:
    family = case.family
    alone = encode_prompts(family, PROMPTS, batch_size=1)
    for i, prompt in enumerate(PROMPTS):
        assert alone[prompt].keys() == case.texts.keys()
        for key, value in alone[prompt].items():
            assert value.is_floating_point(), key  # what caches and batches keep
            torch.testing.assert_close(value, case.texts[key][i].cpu(), atol=1e-5, rtol=1e-5)
    for key, value in case.negative.items():
        assert value.shape == case.texts[key][:1].shape
    # A cache stores half precision: ones and zeros come back as they were.
    masks = [value for key, value in case.texts.items() if "mask" in key]
    assert all(torch.equal(mask, mask.to(torch.bfloat16).float()) for mask in masks)
    assert all(set(mask.unique().tolist()) == {0.0, 1.0} for mask in masks)
    image = family.image_conditioning((HEIGHT, WIDTH), (0, 0), (HEIGHT, WIDTH))
    batch = collate(
        [
            PairExample(
                id=prompt,
                chosen=x,
                rejected=x,
                text={key: value[i] for key, value in case.texts.items()},
                chosen_image=image,
                rejected_image=image,
                p=1.0,
                weight=1.0,
                t=500,
                noise=x,
            )
            for i, (prompt, x) in enumerate(zip(PROMPTS, case.noise(), strict=True))
        ]
    )
    t = family.schedule.time(batch.t)
    with torch.no_grad():
        direct = family.predict(family.network, case.noise(), t, case.conditioning())
        assert torch.equal(family.predict(family.network, batch.chosen, t, batch.chosen_conditioning), direct)


def test_tokens_are_counted_up_to_the_limit(case: Case) -> None:
    family = case.family
    limit = family.count_tokens("")[1]
    prompts = [" ".join(["a"] * n) for n in range(limit + 2)]
    counts = [family.count_tokens(prompt)[0] for prompt in prompts]
    assert counts == sorted(counts)
    assert counts[0] < limit < counts[-1]
    chosen = [n for n, count in enumerate(counts) if limit - 3 <= count <= limit + 3]
    encoded = family.encode_prompts([prompts[n] for n in chosen])
    if "attention_mask" in encoded:
        used = encoded["attention_mask"].sum(1).tolist()
        assert used == [min(counts[n], limit) for n in chosen]
        return
    hidden = encoded["encoder_hidden_states"]
    if case.name == "sd3":
        hidden = hidden[:, -limit:]  # T5's part
    for k, n in enumerate(chosen[1:]):
        changed = not torch.allclose(hidden[k], hidden[k + 1], atol=1e-6)
        assert changed == (counts[n] <= limit), prompts[n]


# --- noise -----------------------------------------------------------------------------------------------------------


def test_noising_is_the_stock_schedulers(case: Case) -> None:
    schedule, scheduler = case.family.schedule, copy.deepcopy(case.stock.scheduler)
    x0, noise = case.noise(), case.noise(seed=1)
    if not schedule.is_flow:
        scheduler.set_timesteps(10)
        t = scheduler.timesteps[[2, 7]].long()
        ours = add_noise(x0, noise, *schedule.alpha_sigma(t))
        torch.testing.assert_close(ours, scheduler.add_noise(x0, noise, t), atol=1e-4, rtol=1e-4)
        assert torch.equal(schedule.time(t), t)
        return
    dynamic = scheduler.config.get("use_dynamic_shifting", False)
    scheduler.set_timesteps(20, **({"mu": 0.7} if dynamic else {}))
    place = [3, 15]
    noisy = scheduler.scale_noise if hasattr(scheduler, "scale_noise") else scheduler.add_noise
    theirs = (
        noisy(x0, scheduler.timesteps[place], noise)
        if hasattr(scheduler, "scale_noise")
        else noisy(x0, noise, scheduler.timesteps[place])
    )
    sigma = scheduler.sigmas[place].float()
    torch.testing.assert_close(add_noise(x0, noise, 1 - sigma, sigma), theirs, atol=1e-5, rtol=1e-5)
    # What the network is told is 1000 sigma, for the sampler (some count whole steps) and for the training table.
    assert (scheduler.timesteps[place] - 1000 * sigma).abs().max() <= 1
    torch.testing.assert_close(schedule.times, 1000 * schedule.sigmas)
    # The training table is the scheduler's, unshifted where the shift is the sampler's business.
    shift = 1.0 if dynamic else scheduler.config.get("flow_shift", scheduler.config.get("shift"))
    table = FlowMatchEulerDiscreteScheduler(shift=shift)
    torch.testing.assert_close(schedule.sigmas.flip(0), table.timesteps / 1000)
    assert schedule.sigmas[-1] == 1


def test_a_stock_step_finds_the_x0_that_our_conversion_finds(case: Case) -> None:
    family, schedule = case.family, case.family.schedule
    t = torch.tensor([650, 650])
    alpha, sigma = schedule.alpha_sigma(t)
    x_t = add_noise(case.noise(), case.noise(seed=1), alpha, sigma)
    with torch.no_grad():
        output = family.predict(family.network, x_t, schedule.time(t), case.conditioning())
    ours = convert(output, x_t, alpha, sigma, schedule.prediction_type, "sample")
    if schedule.is_flow:
        euler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        euler.set_timesteps(sigmas=[float(sigma[0])])
        theirs = euler.step(output, euler.timesteps[0], x_t).prev_sample
    else:
        scheduler = case.stock.scheduler
        step = scheduler if "CogVideoX" in type(scheduler).__name__ else plain_ddim(schedule)
        step.set_timesteps(10)
        theirs = step.step(output, int(t[0]), x_t).pred_original_sample
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    # The target of training is the prediction that is right.
    x0, noise = case.noise(), case.noise(seed=1)
    wanted = target(schedule.prediction_type, x0, noise, alpha, sigma)
    for space, value in {"sample": x0, "epsilon": noise}.items():
        found = convert(wanted, x_t, alpha, sigma, schedule.prediction_type, space)  # type: ignore[arg-type]
        torch.testing.assert_close(found, value, atol=1e-4, rtol=1e-4)


def test_a_sample_of_one_step_is_the_x0_of_our_prediction(case: Case) -> None:
    family, scheduler = case.family, case.stock.scheduler
    expected = case.call_stock(SamplingConfig(num_inference_steps=1, guidance_scale=1.0), case.noise())
    if not scheduler.config.get("set_alpha_to_one", True):
        pytest.skip("this scheduler does not end at the clean image")
    time, x = scheduler.timesteps[:1].expand(2), case.noise() * getattr(scheduler, "init_noise_sigma", 1.0)
    if family.schedule.is_flow:
        sigma = scheduler.sigmas[:1].float().expand(2)
        alpha = 1 - sigma
    else:
        alpha, sigma = family.schedule.alpha_sigma(time.long())
    with torch.no_grad():
        output = family.predict(family.network, x, time, case.conditioning())
    ours = convert(output, x, alpha, sigma, family.schedule.prediction_type, "sample")
    # In units of the prediction: eps is divided by a small alpha.
    assert (ours - expected).abs().max() < 1e-4 * (1 + expected.abs().max())


def plain_ddim(schedule: Any) -> Any:
    alphas = schedule.alphas.double().square()
    betas = 1 - alphas / torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    return DDIMScheduler(
        trained_betas=betas.tolist(), prediction_type=schedule.prediction_type, clip_sample=False, set_alpha_to_one=True
    )


# --- images ----------------------------------------------------------------------------------------------------------


def pixels() -> Tensor:
    return torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_latents_have_the_promised_shape_and_the_stock_scale(case: Case) -> None:
    family, vae = case.family, case.stock.vae
    latents = family.encode_images(pixels())
    assert latents.shape[1:] == case.shape()
    assert latents.dtype == torch.float32
    with torch.no_grad():
        images = pixels().unsqueeze(2) if case.name in ("qwen_image", "wan", "cogvideox") else pixels()
        encoded = vae.encode(images)
        raw = encoded.latent if case.name == "sana" else encoded.latent_dist.mode()
    unscaled = family.unscale_latents(latents.unsqueeze(2) if case.name == "qwen_image" else latents)
    torch.testing.assert_close(unscaled, raw, atol=1e-5, rtol=1e-5)
    decoded = family.decode_latents(latents)
    assert decoded.shape == pixels().shape
    assert 0 <= decoded.min() <= decoded.max() <= 1


def test_a_parked_decoder_is_not_loaded_again(case: Case) -> None:
    family = case.open(DECODER)
    decoder = family.parts["vae"]
    family.park(DECODER)
    assert family.parts["vae"] is decoder
    family.load(DECODER)
    assert family.parts["vae"] is decoder


def test_images_are_decoded_as_by_the_stock_pipeline(case: Case) -> None:
    sampling, noise = SamplingConfig(num_inference_steps=1, guidance_scale=1.0), case.noise()
    expected = case.call_stock(sampling, noise, output_type="pt")
    expected = expected.squeeze(1) if expected.ndim == 5 else expected  # (B, F, 3, H, W) of clips
    ours = case.family.sample(case.texts, case.negative, noise, sampling)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_samples_with_guidance_are_the_stock_pipelines(case: Case) -> None:
    sampling, noise = SamplingConfig(num_inference_steps=2, guidance_scale=3.0), case.noise()
    ours = case.family.sample_latents(case.texts, case.negative, noise, sampling)
    assert ours.shape == noise.shape
    torch.testing.assert_close(ours, case.call_stock(sampling, noise), atol=1e-3, rtol=1e-3)
    again = case.family.sample_latents(case.texts, case.negative, noise, sampling)
    assert torch.equal(ours, again)
    plain = case.family.sample_latents(
        case.texts, case.negative, noise, SamplingConfig(num_inference_steps=2, guidance_scale=1.0)
    )
    assert not torch.allclose(ours, plain, atol=1e-3)


class Records(logging.Handler):
    """Warnings of other libraries."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def test_rollouts_take_the_levels_of_the_stock_pipeline(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = case.stock.scheduler
    seen: list[list[float]] = []
    original = type(scheduler).set_timesteps

    @functools.wraps(original)  # pipelines ask what it accepts
    def set_timesteps(self: Any, *args: Any, **more: Any) -> None:
        original(self, *args, **more)
        seen.append([float(t) for t in self.timesteps])

    monkeypatch.setattr(type(scheduler), "set_timesteps", set_timesteps)
    case.call_stock(SamplingConfig(num_inference_steps=3, guidance_scale=1.0), case.noise())
    grid = make_grid(case.family, case.family.stock_scheduler(), 3, case.shape())
    assert grid.times.tolist() == pytest.approx(list(dict.fromkeys(seen[0])), rel=1e-4)


def test_rollouts_are_guided_by_a_second_branch_or_by_what_the_model_is_told(case: Case) -> None:
    family, t = case.family, case.family.schedule.time(torch.tensor([700, 300]))
    policy, conditioning = Policy(family, family.network), case.conditioning()
    image = {key: value for key, value in conditioning.items() if key not in case.texts}
    empty = {key: value.expand(2, *value.shape[1:]) for key, value in case.negative.items()} | image
    with torch.no_grad():
        found = guided(policy, family.network, case.noise(), t, conditioning, empty, 3.0)
        plain = family.predict(family.network, case.noise(), t, conditioning)
        if family.unconditional:
            without = family.predict(family.network, case.noise(), t, empty)
            expected, count = without + 3.0 * (plain - without), 4
        else:
            told = conditioning | {"guidance": torch.full((2,), 3.0)}
            expected, count = family.predict(family.network, case.noise(), t, told), 2
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain.float(), atol=1e-4)
    assert policy.forwards == count


def test_encoding_and_sampling_say_nothing(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    handler, loggers = Records(), [logging.getLogger(library) for library in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        texts, negative = case.family.encode_prompts(["a circle"]), case.family.encode_negative("")
        for scale in (1.0, 2.0):
            sampling = SamplingConfig(num_inference_steps=1, guidance_scale=scale)
            case.family.sample(texts, negative, case.noise(1), sampling)
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert handler.texts == []
    assert capfd.readouterr().err == ""


def test_one_prompt_serves_a_batch(case: Case) -> None:
    sampling, noise = SamplingConfig(num_inference_steps=1, guidance_scale=2.0), case.noise()
    one = {key: value[:1] for key, value in case.texts.items()}
    together = case.family.sample_latents(one, case.negative, noise, sampling)
    apart = [case.family.sample_latents(one, case.negative, x[None], sampling) for x in noise]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-3, rtol=1e-3)


# --- training --------------------------------------------------------------------------------------------------------


def batch_of(case: Case) -> tuple[Tensor, Tensor, Tensor, Conditioning]:
    return case.noise(seed=2), case.noise(seed=3), torch.tensor([250, 750]), case.conditioning()


def test_errors_are_finite_and_reach_every_adapter(case: Case) -> None:
    policy = case.policy(stir=0.1)
    error, reference = policy.errors(*batch_of(case))
    assert reference is not None
    assert error.shape == (2,)
    assert error.isfinite().all()
    assert (error - reference).abs().min() > 1e-6
    assert not reference.requires_grad
    error.sum().backward()
    for key, parameter in policy.network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{key} has no gradient: several processes would stop here"
            assert parameter.grad.isfinite().all(), key
        else:
            assert parameter.grad is None, key


def test_gradient_checkpointing_changes_no_gradient(case: Case) -> None:
    found = []
    for checkpointing in (False, True):
        policy = case.policy(stir=0.1)
        policy.network.train()
        if checkpointing:
            policy.network.enable_gradient_checkpointing()  # type: ignore[operator]
        policy.errors(*batch_of(case), reference=False)[0].sum().backward()
        found.append([parameter.grad for parameter in adapters.parameters(policy.network)])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, atol=1e-5, rtol=1e-4)


def test_with_adapters_off_the_network_is_the_base_to_the_bit(case: Case) -> None:
    policy = case.policy(stir=0.1)
    x, _, t, conditioning = batch_of(case)
    with torch.no_grad():
        base = case.family.predict(case.family.network, x, case.family.schedule.time(t), conditioning)
        assert torch.equal(policy.predict_reference(x, t, conditioning), base)
        assert not torch.allclose(policy.predict(x, t, conditioning), base, atol=1e-3)
        fresh = case.policy()
        assert torch.equal(fresh.predict_reference(x, t, conditioning), base)
        # with B = 0 an adapter adds exact zeros
        torch.testing.assert_close(fresh.predict(x, t, conditioning), base, atol=0, rtol=0)


@torch.no_grad()
def test_splitting_a_batch_changes_nothing(case: Case) -> None:
    policy = case.policy(stir=0.1)
    x, noise, t, conditioning = batch_of(case)
    together, _ = policy.errors(x, noise, t, conditioning, reference=False)
    for i in range(2):
        part = {key: value[i : i + 1] for key, value in conditioning.items()}
        alone, _ = policy.errors(x[i : i + 1], noise[i : i + 1], t[i : i + 1], part, reference=False)
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)


def test_an_adapter_comes_back_from_its_state(case: Case) -> None:
    policy, other = case.policy(stir=0.1), case.policy()
    adapters.load_state_dict(other.network, adapters.state_dict(policy.network))
    x, _, t, conditioning = batch_of(case)
    with torch.no_grad():
        assert torch.equal(policy.predict(x, t, conditioning), other.predict(x, t, conditioning))


@pytest.mark.slow  # tests/test_gates.py has the tiny SDXL
def test_gates_weigh_experts_by_every_rows_own_time(case: Case, tmp_path: Path) -> None:
    for k in range(2):
        expert = case.policy(stir=0.1 * (k + 1)).network
        export.save_lora(expert, None, tmp_path / str(k), family=case.name)
    x, noise, t, conditioning = batch_of(case)
    found = []
    for checkpointing in (False, True):
        network = copy.deepcopy(case.family.network).train()
        if checkpointing:
            network.enable_gradient_checkpointing()  # type: ignore[operator]
        (weight,) = adapters.attach(network, LoraConfig(experts=(str(tmp_path / "0"), str(tmp_path / "1"))))
        with torch.no_grad():
            weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
        gates = adapters.gates_of(network)
        assert gates is not None
        told: list[Tensor] = []
        gates.register_forward_pre_hook(lambda module, args, told=told: told.append(args[0]))
        policy = Policy(case.family, network)
        error, _ = policy.errors(x, noise, t, conditioning, reference=False)
        assert len(told) == 1  # FLUX embeds its guidance scale where it embeds the time
        torch.testing.assert_close(told[0], case.family.schedule.time(t).float() / 1000, atol=1e-5, rtol=1e-5)
        error.sum().backward()
        found.append(weight.grad)
        assert weight.grad is not None
        reached = weight.grad.abs().amax(dim=(1, 2)) > 0
        assert reached.float().mean() > 0.8  # queries of text have no effect in the last block of some
        for i in range(2):
            part = {key: value[i : i + 1] for key, value in conditioning.items()}
            alone, _ = policy.errors(x[i : i + 1], noise[i : i + 1], t[i : i + 1], part, reference=False)
            torch.testing.assert_close(alone[0], error[i], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


def test_a_step_of_the_optimiser_lowers_the_error_and_changes_samples(case: Case) -> None:
    family = case.open(NETWORK, DECODER)
    trainable = adapters.attach(family.network, LoraConfig(rank=4, targets="attention+ff"))
    policy, batch = Policy(family, family.network), batch_of(case)
    sampling, noise = SamplingConfig(num_inference_steps=2, guidance_scale=2.0), case.noise()
    before = family.sample_latents(case.texts, case.negative, noise, sampling)
    optimiser = torch.optim.AdamW(trainable, lr=3e-3)
    errors = []
    for _ in range(2):
        error, _ = policy.errors(*batch, reference=False)
        errors.append(float(error.detach().mean()))
        optimiser.zero_grad()
        error.mean().backward()
        optimiser.step()
    assert errors[1] < errors[0]
    after = family.sample_latents(case.texts, case.negative, noise, sampling)
    assert not torch.allclose(before, after, atol=1e-4)


def test_presets_are_the_layers_they_say(case: Case) -> None:
    network = case.family.network
    attention, with_ff, every = (set(adapters.target_modules(network, t)) for t in ("attention", "attention+ff", "all"))
    assert attention < with_ff <= every < set(adapters.base_layers(network))
    if case.name in tiny.FIXTURES:  # UNets: tests/test_adapters.py
        return
    if case.name not in PRESETS:
        pytest.fail(f"say in PRESETS which layers the presets of family {case.name!r} are")
    expected = PRESETS[case.name]
    for found, endings in zip((attention, with_ff - attention, every - with_ff), expected, strict=True):
        assert {next((e for e in endings if path.endswith(f".{e}")), path) for path in found} == endings
    blocks = {path.split(".")[0] for path in every}
    assert all(name.endswith("blocks") for name in blocks)
    depthwise = {name for name, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    inside = {
        name
        for name, m in network.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d)) and name.split(".")[0] in blocks
    }
    missing = inside - depthwise - every
    last = f"transformer_blocks.{len(network.transformer_blocks) - 1}." if case.name == "qwen_image" else "none"
    assert all(name.startswith(last) for name in missing), missing


# --- refusals and fingerprints ---------------------------------------------------------------------------------------


def refused(case: Case, folder: Path, match: str, **changes: Any) -> None:
    shutil.copytree(case.folder, folder)
    file = folder / case.family.network_part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConfigError, match=match) as error:
        load_family(ModelConfig(family=case.name, pretrained=str(folder), **case.settings))
    assert "\n" not in str(error.value)


def test_other_networks_are_refused_before_they_load(case: Case, tmp_path: Path) -> None:
    channels = int(case.stock_network.config["in_channels"])
    outputs = {"out_channels": channels} if case.stock_network.config.get("out_channels") is None else {}
    refused(case, tmp_path / "wide", f"takes {3 * channels} channels", in_channels=3 * channels, **outputs)
    if case.name not in tiny.FIXTURES:
        refused(case, tmp_path / "other", "this network is a OtherModel, expected ", _class_name="OtherModel")


def test_settings_that_a_family_does_not_have_are_refused(case: Case) -> None:
    flow = case.family.schedule.is_flow
    wrong = {"prediction_type": "epsilon"} if flow else {"flow_shift": 3.0}
    with pytest.raises(ConfigError, match=f"model.{next(iter(wrong))}: family {case.name!r} "):
        case.open(**wrong)
    if flow:
        middle = float(case.open(flow_shift=2.0).schedule.sigmas[499])
        assert middle == pytest.approx(0.5 if is_dynamic(case) else 2 / 3, abs=1e-4)


def is_dynamic(case: Case) -> bool:
    return bool(case.stock.scheduler.config.get("use_dynamic_shifting", False))


def test_the_fingerprint_knows_what_encodes(case: Case, tmp_path: Path) -> None:
    found = case.family.fingerprint()
    for part in ("vae", *case.family.text_parts):
        assert any(key.startswith(f"{part}/") for key in found), part
    assert not any(key.startswith(case.family.network_part) for key in found)
    assert case.open().fingerprint() == found
    if case.settings:
        assert case.open(max_sequence_length=case.settings["max_sequence_length"] - 1).fingerprint() != found
