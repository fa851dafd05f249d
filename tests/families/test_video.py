"""The video families against the stock pipelines: the same text, latents, predictions and clips; and short runs on clips."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_video import TOKENS, build_cogvideox, build_wan
from torch import Tensor, nn

from diffalign import adapters
from diffalign.config import LoraConfig, ModelConfig, SamplingConfig, TrainingConfig
from diffalign.errors import ConfigError
from diffalign.families import DECODER, ENCODERS, NETWORK, Conditioning, load_family
from diffalign.families._video import VideoFamily
from diffalign.families.cogvideox import CogVideoX
from diffalign.hardware import configure_network
from diffalign.policy import Policy
from diffalign.prediction import add_noise, target

KINDS = ("wan", "cogvideox-2b", "cogvideox-5b", "cogvideox-1.5")
BUILD: dict[str, Callable[[Path], Path]] = {
    "wan": build_wan,
    "cogvideox-2b": lambda folder: build_cogvideox(folder, rotary=False),
    "cogvideox-5b": build_cogvideox,
    "cogvideox-1.5": lambda folder: build_cogvideox(folder, patch_size_t=2),
}
PROMPTS = ["a red circle moves", "a blue square on a red circle moves on a blue square on a red circle"]
FRAMES = 9  # valid for both families


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("video")
    return {kind: make(place / kind) for kind, make in BUILD.items()}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def model_of(kind: str, folder: Path | str, **options: Any) -> ModelConfig:
    name = kind.partition("-")[0]
    if name == "wan":  # 512 tokens else
        options = {"max_sequence_length": TOKENS} | options
    return ModelConfig(family=name, pretrained=str(folder), **options)


def open_family(kind: str, folder: Path | str, *parts: str, **options: Any) -> VideoFamily:
    family = load_family(model_of(kind, folder, **options))
    assert isinstance(family, VideoFamily)
    family.load(*parts)
    return family


@pytest.fixture(scope="module")
def family(kind: str, folders: dict[str, Path]) -> VideoFamily:
    return open_family(kind, folders[kind], NETWORK, ENCODERS, DECODER)


@pytest.fixture(scope="module")
def stock(kind: str, folders: dict[str, Path]) -> Any:
    """The stock pipeline, loaded without our code."""
    from diffusers import CogVideoXPipeline, WanPipeline

    pipeline = (WanPipeline if kind == "wan" else CogVideoXPipeline).from_pretrained(folders[kind])
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    return pipeline


def pixels(frames: int = FRAMES, n: int = 2, height: int = 32, width: int = 48) -> Tensor:
    return torch.rand(n, 3, frames, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def noise(family: VideoFamily, frames: int = FRAMES, n: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, *family.latent_shape(32, 48, frames), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def by_hand(stock: Any, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """The stock network, called as its pipeline calls it."""
    hidden, network = conditioning["encoder_hidden_states"], stock.transformer
    if type(network).__name__.startswith("Wan"):
        return network(x, timestep=t, encoder_hidden_states=hidden, return_dict=False)[0]
    x, rotary = x.permute(0, 2, 1, 3, 4), None
    if network.config.use_rotary_positional_embeddings:
        rotary = stock._prepare_rotary_positional_embeddings(8 * x.shape[3], 8 * x.shape[4], x.shape[1], "cpu")
    output = network(x, hidden, t, image_rotary_emb=rotary, return_dict=False)[0]
    return output.permute(0, 2, 1, 3, 4)


# --- conditioning ----------------------------------------------------------------------------------------------------


def test_prompts_are_encoded_as_by_the_stock_pipeline(kind: str, family: VideoFamily, stock: Any) -> None:
    with torch.no_grad():
        expected, empty = stock.encode_prompt(PROMPTS, max_sequence_length=TOKENS, device="cpu")
    ours = family.encode_prompts(PROMPTS)
    assert list(ours) == ["encoder_hidden_states"]
    assert torch.equal(ours["encoder_hidden_states"], expected)
    torch.testing.assert_close(family.encode_negative("")["encoder_hidden_states"], empty[:1], atol=1e-6, rtol=0)
    short = ours["encoder_hidden_states"][0, family.count_tokens(PROMPTS[0])[0] :]
    assert len(short)
    assert bool((short == 0).all()) == (kind == "wan")  # zeros behind the end there, encoded padding here


def test_clips_play_at_the_models_speed(kind: str, family: VideoFamily) -> None:
    assert family.frames_per_second == (16 if kind in ("wan", "cogvideox-1.5") else 8)


def test_tokens_are_counted_against_what_the_encoder_takes(family: VideoFamily) -> None:
    assert family.count_tokens(PROMPTS[0]) == (5, TOKENS)
    tokens, limit = family.count_tokens(PROMPTS[1])
    assert tokens > limit


def test_text_lengths(folders: dict[str, Path]) -> None:
    assert load_family(ModelConfig(family="wan", pretrained=str(folders["wan"]))).text_length == 512  # type: ignore[attr-defined]
    longer = open_family("cogvideox-5b", folders["cogvideox-5b"], ENCODERS, max_sequence_length=20)
    assert longer.encode_prompts(PROMPTS)["encoder_hidden_states"].shape[1] == 20
    with pytest.raises(ConfigError, match=f"got 20; this network takes {TOKENS} tokens"):
        open_family("cogvideox-2b", folders["cogvideox-2b"], max_sequence_length=20)


# --- clips and latents -----------------------------------------------------------------------------------------------


def test_latents_are_scaled_posterior_means(kind: str, family: VideoFamily, stock: Any) -> None:
    clips, config = pixels(), stock.vae.config
    with torch.no_grad():
        raw = stock.vae.encode(clips).latent_dist.mode()
    latents = family.encode_images(clips)
    assert latents.shape[1:] == family.latent_shape(32, 48, FRAMES)
    if kind == "wan":
        mean, deviation = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        expected = (raw - mean) / deviation
    else:
        expected = raw * config.scaling_factor
    if kind == "cogvideox-1.5":  # latent frames are taken by two, and three of them are odd
        assert torch.equal(latents[:, :, 0], latents[:, :, 1])
        latents = latents[:, :, 1:]
    torch.testing.assert_close(latents, expected)
    assert latents.shape[2] == 1 + (FRAMES - 1) // 4


def test_a_cache_of_another_network_is_told_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    def found(folder: Path, **options: Any) -> dict[str, str]:
        return load_family(model_of("cogvideox-5b", folder, **options)).fingerprint()  # type: ignore[attr-defined,no-any-return]

    five = folders["cogvideox-5b"]
    newer = changed(five, tmp_path / "1.5", "transformer/config.json", patch_size_t=2)  # the same encoders
    longer = changed(five, tmp_path / "longer", "transformer/config.json", max_text_seq_length=20)
    assert len({tuple(found(folder).items()) for folder in (five, newer, longer)}) == 3
    assert found(five, max_sequence_length=20) == found(longer)


def test_decoding_is_the_stock_pipelines(kind: str, family: VideoFamily, stock: Any) -> None:
    latents = family.encode_images(pixels())
    with torch.no_grad():
        if kind == "wan":
            config = stock.vae.config
            mean, deviation = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
            expected = stock.vae.decode(latents * deviation + mean).sample
        else:
            expected = stock.decode_latents(latents[:, :, family.padding :].transpose(1, 2))  # type: ignore[attr-defined]
    clips = family.decode_latents(latents)
    assert clips.shape == (2, 3, FRAMES, 32, 48)
    torch.testing.assert_close(clips, (expected / 2 + 0.5).clamp(0, 1))


def test_an_image_is_a_clip_of_one_frame(family: VideoFamily, stock: Any) -> None:
    clips = pixels(frames=1)
    latents = family.encode_images(clips[:, :, 0])
    assert torch.equal(latents, family.encode_images(clips))
    assert latents.shape[1:] == family.latent_shape(32, 48)
    assert family.decode_latents(latents).shape == (2, 3, 32, 48)
    conditioning = family.encode_prompts(PROMPTS)
    x, t = noise(family, frames=1), torch.tensor([900, 10])
    torch.testing.assert_close(family.predict(family.network, x, t, conditioning), by_hand(stock, x, t, conditioning))


@pytest.mark.parametrize("frames", [1, 5, 9, 13, 17])
def test_frames_come_out_as_they_went_in(kind: str, family: VideoFamily, frames: int) -> None:
    valid = frames % family.frame_step == 1
    if valid:
        family.check_frames(frames)
        again = family.decode_latents(family.encode_images(pixels(frames, n=1)))
        assert again.shape == ((1, 3, 32, 48) if frames == 1 else (1, 3, frames, 32, 48))
    else:
        assert kind != "wan"
        with pytest.raises(ConfigError, match=f"got {frames}; expected 1 [+] a multiple of 8, such as {frames - 4} or"):
            family.check_frames(frames)


# --- the network -----------------------------------------------------------------------------------------------------


def test_predictions_are_those_of_the_bare_network(family: VideoFamily, stock: Any) -> None:
    x, t, conditioning = noise(family), torch.tensor([900, 10]), family.encode_prompts(PROMPTS)
    ours = family.predict(family.network, x, t, conditioning)
    assert ours.shape == x.shape
    assert torch.isfinite(ours).all()
    assert torch.equal(ours, by_hand(stock, x, t, conditioning))
    # Every input has its say: text, time, and where in the clip something is.
    other = {"encoder_hidden_states": conditioning["encoder_hidden_states"].flip(0)}
    for changed in (
        family.predict(family.network, x, t, other),
        family.predict(family.network, x, t.flip(0), conditioning),
        family.predict(family.network, x.flip(2), t, conditioning).flip(2),
    ):
        assert not torch.allclose(changed, ours, atol=1e-4)


def test_splitting_a_batch_changes_nothing(family: VideoFamily) -> None:
    x, t, conditioning = noise(family), torch.tensor([900, 10]), family.encode_prompts(PROMPTS)
    parts = [
        family.predict(family.network, x[i : i + 1], t[i : i + 1], {k: v[i : i + 1] for k, v in conditioning.items()})
        for i in range(2)
    ]
    torch.testing.assert_close(torch.cat(parts), family.predict(family.network, x, t, conditioning))


def test_the_schedule_is_the_schedulers(kind: str, family: VideoFamily, stock: Any) -> None:
    schedule, scheduler = family.schedule, stock.scheduler
    t = torch.tensor([0, 400, 999])
    x0, eps = noise(family, n=3), noise(family, n=3, seed=1)
    alpha, sigma = schedule.alpha_sigma(t)
    if kind == "wan":
        assert schedule.prediction_type == "flow_prediction"
        scheduler.set_timesteps(999)  # from all of the noise down to two thousandths of it
        # UniPC leaves its first level a millionth below 1; its times are whole numbers, rounded down.
        torch.testing.assert_close(schedule.sigmas[1:].flip(0), scheduler.sigmas[:-1].float(), atol=2e-6, rtol=0)
        assert (schedule.times[1:].flip(0) - scheduler.timesteps.float()).abs().max() <= 1
        torch.testing.assert_close(schedule.time(t), 1000 * sigma)
        return
    assert schedule.prediction_type == "v_prediction"
    torch.testing.assert_close(add_noise(x0, eps, alpha, sigma), scheduler.add_noise(x0, eps, t))
    velocity = target("v_prediction", x0, eps, alpha, sigma)
    torch.testing.assert_close(velocity, scheduler.get_velocity(x0, eps, t), atol=1e-6, rtol=1e-6)
    assert alpha[-1] == 0  # zero terminal SNR: nothing of the clip is left
    from diffusers import DDPMScheduler

    plain = DDPMScheduler.from_config(scheduler.config).alphas_cumprod  # does not know the shift of the SNR
    assert torch.allclose(schedule.alphas.square(), plain, atol=1e-4) == (kind != "cogvideox-2b")


def test_with_adapters_off_the_network_is_the_base_to_the_bit(family: VideoFamily, stock: Any) -> None:
    network = copy.deepcopy(family.network)
    trained = adapters.attach(network, LoraConfig(rank=4), seed=0)
    names = {
        path.rpartition("attn")[2].partition(".lora")[0] for path, _ in network.named_parameters() if "lora" in path
    }
    assert {name[2:] for name in names} == {"to_q", "to_k", "to_v", "to_out.0"}
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1)
    x, t, conditioning = noise(family), torch.tensor([500, 100]), family.encode_prompts(PROMPTS)
    policy = Policy(family, network)
    times = family.schedule.time(t)
    base = by_hand(stock, x, times, conditioning)
    assert torch.equal(policy.predict_reference(x, t, conditioning), base)
    assert not torch.allclose(policy.predict(x, t, conditioning), base, atol=1e-3)


@pytest.mark.parametrize("targets", ["attention", "attention+ff", "all"])
def test_every_adapter_of_a_preset_is_trained(kind: str, family: VideoFamily, targets: str) -> None:
    network = copy.deepcopy(family.network)
    trained = adapters.attach(network, LoraConfig(rank=4, targets=targets), seed=0)
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.01)
    x, t, conditioning = noise(family), torch.tensor([500, 100]), family.encode_prompts(PROMPTS)
    family.predict(network, x, t, conditioning).square().mean().backward()
    names = [path for path, parameter in network.named_parameters() if parameter.requires_grad]
    assert len(names) == len(trained)
    assert all(parameter.grad is not None and parameter.grad.count_nonzero() for parameter in trained)
    feed_forward = ".ffn.net.0.proj." if kind == "wan" else ".ff.net.0.proj."
    assert any(feed_forward in path for path in names) == (targets != "attention")


def test_half_precision(kind: str, folders: dict[str, Path], family: VideoFamily) -> None:
    half = load_family(model_of(kind, folders[kind]), dtype=torch.bfloat16)
    assert isinstance(half, VideoFamily)
    half.load(NETWORK, ENCODERS)
    assert torch.equal(half.encode_images(pixels()), family.encode_images(pixels()))  # the autoencoder's own type
    x, t, conditioning = noise(half), torch.tensor([500, 100]), half.encode_prompts(PROMPTS)
    with torch.no_grad():
        ours = half.predict(half.network, x.bfloat16(), t, conditioning)
        whole = family.predict(family.network, x, t, family.encode_prompts(PROMPTS))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), whole, atol=0.1, rtol=0.1)


def test_checkpointing_changes_no_gradient(family: VideoFamily) -> None:
    x, t, conditioning = noise(family), torch.tensor([500, 100]), family.encode_prompts(PROMPTS)
    gradients = []
    for checkpointing in (False, True):
        network = copy.deepcopy(family.network)
        trained = adapters.attach(network, LoraConfig(rank=4), seed=0)
        if checkpointing:
            network.enable_gradient_checkpointing()  # type: ignore[operator]
        network.train()
        family.predict(network, x, t, conditioning).square().mean().backward()
        gradients.append([parameter.grad for parameter in trained])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize(("kind", "setting"), [("wan", "channels_last"), ("cogvideox-5b", "compile")])
def test_what_a_network_cannot_do_is_said(kind: str, setting: str, folders: dict[str, Path]) -> None:
    family = open_family(kind, folders[kind], NETWORK)
    with pytest.raises(ConfigError, match=rf"training\.{setting}: .*Transformer3DModel .*; remove it"):
        configure_network(family.network, TrainingConfig(**{setting: True}))


def test_one_step_lowers_the_denoising_error(family: VideoFamily) -> None:
    network = copy.deepcopy(family.network)
    trained = adapters.attach(network, LoraConfig(rank=4), seed=0)
    policy = Policy(family, network)
    x0, eps, t = family.encode_images(pixels()), noise(family), torch.tensor([700, 300])
    conditioning = family.encode_prompts(PROMPTS)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(3):
        error, reference = policy.errors(x0, eps, t, conditioning)
        losses.append(float(error.detach().mean()))
        if len(losses) == 1:
            assert torch.equal(error, reference)  # a fresh adapter
        optimizer.zero_grad()
        error.mean().backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guidance", "frames"), [(1.0, FRAMES), (5.0, FRAMES), (5.0, 1)])
def test_clips_are_those_of_the_stock_pipeline(
    kind: str, family: VideoFamily, stock: Any, guidance: float, frames: int
) -> None:
    start = noise(family, frames)
    with torch.no_grad():
        expected = stock(
            PROMPTS,
            latents=(start if kind == "wan" else start.transpose(1, 2)).clone(),
            height=32,
            width=48,
            num_frames=frames,
            num_inference_steps=3,
            guidance_scale=guidance,
            max_sequence_length=TOKENS,
            output_type="pt",
        ).frames
    sampling = SamplingConfig(num_inference_steps=3, guidance_scale=guidance)
    ours = family.sample(family.encode_prompts(PROMPTS), family.encode_negative(""), start, sampling)
    assert ours.dtype == torch.float32
    expected = expected.transpose(1, 2)  # (B, F, 3, H, W)
    torch.testing.assert_close(ours, expected[:, :, 0] if frames == 1 else expected, atol=1e-4, rtol=0)


def test_the_adapter_is_sampled_through_the_stock_pipeline(kind: str, folders: dict[str, Path]) -> None:
    family = open_family(kind, folders[kind], NETWORK, ENCODERS, DECODER)
    sampling = SamplingConfig(num_inference_steps=2, guidance_scale=1.0)
    conditioning, negative, start = family.encode_prompts(PROMPTS), family.encode_negative(""), noise(family)
    base = family.sample_latents(conditioning, negative, start, sampling)
    with torch.no_grad():
        for parameter in adapters.attach(family.network, LoraConfig(rank=4), seed=0):
            parameter.add_(0.1)
    assert not torch.allclose(family.sample_latents(conditioning, negative, start, sampling), base, atol=1e-3)
    with torch.no_grad(), adapters.adapters_off(family.network):
        assert torch.equal(family.sample_latents(conditioning, negative, start, sampling), base)


def test_guidance_rescale_is_refused(family: VideoFamily) -> None:
    with pytest.raises(ConfigError, match=r"guidance_rescale: got 0\.7"):
        family.guidance_arguments(SamplingConfig(guidance_rescale=0.7))


# --- what is refused -------------------------------------------------------------------------------------------------


def changed(folder: Path, to: Path, file: str, **values: Any) -> Path:
    shutil.copytree(folder, to)
    path = to / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return to


@pytest.mark.parametrize(
    ("kind", "file", "values", "message"),
    [
        ("wan", "transformer/config.json", {"in_channels": 36}, "takes 36 channels and returns 4"),
        ("wan", "model_index.json", {"boundary_ratio": 0.875}, "Wan 2.2 pipeline, with two networks"),
        ("wan", "model_index.json", {"expand_timesteps": True}, "Wan 2.2 pipeline, with a time for every token"),
        ("cogvideox-5b", "transformer/config.json", {"in_channels": 32}, "takes 32 channels and returns 4"),
        ("cogvideox-5b", "transformer/config.json", {"patch_size_t": 4}, "takes 4 latent frames at a time"),
    ],
)
def test_other_models_are_refused_before_they_load(
    kind: str, file: str, values: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(folders[kind], tmp_path / "other", file, **values)
    with pytest.raises(ConfigError, match=message):
        load_family(model_of(kind, folder))


def test_an_index_that_is_no_json(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["wan"], tmp_path / "broken")
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ConfigError, match=r"model_index\.json is not readable \(JSONDecodeError\)"):
        load_family(model_of("wan", folder))


def test_families_are_not_mixed_up(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="this network is a CogVideoXTransformer3DModel"):
        load_family(model_of("wan", folders["cogvideox-5b"]))
    with pytest.raises(ConfigError, match="this network is a WanTransformer3DModel"):
        load_family(ModelConfig(family="cogvideox", pretrained=str(folders["wan"])))


def test_settings_of_other_models_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="flow_shift: family 'cogvideox' is no flow model"):
        open_family("cogvideox-5b", folders["cogvideox-5b"], flow_shift=3.0)
    with pytest.raises(ConfigError, match="prediction_type: family 'wan' predicts flow"):
        open_family("wan", folders["wan"], prediction_type="epsilon")
    shifted = open_family("wan", folders["wan"], flow_shift=5.0)
    assert shifted.schedule.sigmas[499] == pytest.approx(5 * 0.5 / (1 + 4 * 0.5))


def test_other_predictions_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    file = "scheduler/scheduler_config.json"
    folder = changed(folders["cogvideox-5b"], tmp_path / "x0", file, prediction_type="sample")
    with pytest.raises(ConfigError, match="predicts 'sample'"):
        _ = open_family("cogvideox-5b", folder).schedule


def test_rotary_positions_depend_on_the_size(folders: dict[str, Path]) -> None:
    family = open_family("cogvideox-5b", folders["cogvideox-5b"], NETWORK)
    assert isinstance(family, CogVideoX)
    cos, sin = family.rotary(torch.zeros(1, 4, 3, 4, 6)) or (Tensor(), Tensor())
    assert cos.shape == sin.shape == (3 * 2 * 3, 16)
    assert isinstance(family.network, nn.Module)
