"""The card says what was trained and measured, its snippet runs, and nothing of the training machine leaks into it."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffalign import config_loading, plugins
from diffalign.config import RunConfig
from diffalign.model_card import caveats, snippet, write_card

RESULT = {
    "metric": "verifier",
    "base_mean": 0.4123,
    "aligned_mean": 0.5217,
    "win_rate": 0.6543,
    "win_rate_ci95": [0.5911, 0.7122],
    "pairs": 1234,
}
FILES = {"diffusers": "pytorch_lora_weights.safetensors", "kohya": "pytorch_lora_weights_kohya.safetensors"}


def make_config(**sections: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "output_dir": "/home/someone/secret/runs/my_run",
        "model": {"family": "sdxl", "pretrained": "owner/base-model"},
        "objective": {"name": "dpo", "beta_dpo": 2000},
        "data": {"sources": ["/home/someone/secret/pairs", "owner/pairs-data"], "resolution": 1024},
        "evaluation": {"num_prompts": 64},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return config_loading.build(tree)


TINY = {"family": "sdxl", "pretrained": "tiny-sdxl"}


def card(folder: Path, config: RunConfig, result: dict[str, Any] | None = RESULT, **more: Any) -> str:
    return write_card(folder, config, result, more.pop("files", FILES), **more).read_text(encoding="utf-8")


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def python_block(text: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    return str(block)


def test_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    text = card(tmp_path, make_config())
    head = front_matter(text)
    assert head["base_model"] == "owner/base-model"
    assert head["library_name"] == "diffusers"
    assert head["datasets"] == ["owner/pairs-data"]
    assert {"lora", "dpo", "sdxl"} <= set(head["tags"])
    assert "license" not in head
    assert "# license: yours to choose" in text


def test_local_base_is_no_hub_id_and_no_path_leaks(tmp_path: Path) -> None:
    model = {"pretrained": "/home/someone/secret/juggernaut.safetensors", "vae": "/home/someone/secret/vae"}
    text = card(tmp_path, make_config(model=model))
    assert "base_model" not in front_matter(text)
    assert "secret" not in text
    assert 'StableDiffusionXLPipeline.from_single_file("juggernaut.safetensors"' in python_block(text)
    assert "# my_run" in text


def test_numbers_and_interval_are_in_the_results_row(tmp_path: Path) -> None:
    text = card(tmp_path, make_config())
    assert "| verifier | 0.4123 | 0.5217 | 0.654 | 0.591 to 0.712 |  |  |" in text
    assert "Pairs trained on: 1,234." in text
    assert "Only 64 prompts" in text
    gain = {k: v for k, v in RESULT.items() if "win" not in k} | {"gain_ci95": [0.01, 0.2]}
    assert "|  |  |  | 0.01 to 0.2 |" in card(tmp_path, make_config(), gain)


def test_every_reward_has_its_row(tmp_path: Path) -> None:
    second = {"reward": "aesthetic", "base_mean": 5.5, "aligned_mean": 5.25, "win_rate": 0.25, "gain": -0.25}
    text = card(tmp_path, make_config(), RESULT | {"rewards": [{"reward": "verifier", "base_mean": 0.4}, second]})
    assert "| verifier | 0.4 |" in text
    assert "| aesthetic | 5.5 | 5.25 | 0.25 |  | -0.25 |" in text


def test_beta_is_given_in_every_convention(tmp_path: Path) -> None:
    """beta 2000 on the mean over 16,384 elements with the 1/2 is 1000 without it and 0.061 on the sum."""
    text = card(tmp_path, make_config(), latent_elements=16384)
    assert "| `beta` | 2,000 |" in text or "| `beta` | 2000 |" in text
    assert re.search(r"beta_without_half.*\| 1,?000 \|", text)
    assert re.search(r"beta_on_summed_error.*\| 0\.06104 \|", text)


def test_unevaluated_run_makes_no_claim(tmp_path: Path) -> None:
    text = card(tmp_path, make_config(), None, files={})
    assert "Nothing was evaluated" in text
    assert "training did not finish" in text
    assert "```python" not in text


def test_counts_come_from_the_data_report_even_a_cut_one(tmp_path: Path) -> None:
    report = {
        "rows": 5000,
        "kept": 4100,
        "skipped": {"tie": {"count": 600, "unusable": False}, "undecodable": {"count": 300, "unusable": True}},
        "notes": {"long_prompt": {"count": 12}},
        "source": {"id": "/home/someone/secret", "shards": 3},
    }
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "data_report.json").write_text(json.dumps(report))
    text = card(tmp_path, make_config())
    for line in ("| rows | 5,000 |", "| tie | 600 | removed by a rule |", "| undecodable | 300 | unusable |"):
        assert line in text
    assert "| long prompt | 12 | kept, noted |" in text
    assert "secret" not in text
    (tmp_path / "cache" / "data_report.json").write_text('{"rows": 50')
    assert "while reading" not in card(tmp_path, make_config())


def test_caveats_follow_the_data() -> None:
    world = {"data": {"world_pairs": {"prompts": 10}}}
    assert "drawn scenes" in caveats(world, RESULT)[0]
    assert "also labelled the training data" in caveats({}, RESULT | {"in_training": True})[0]
    assert not any("labelled" in note for note in caveats({}, RESULT))


class FakePipe:
    """Records what the snippet does."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def load_lora_weights(self, folder: str, weight_name: str) -> None:
        self.calls.append(("lora", Path(folder) / weight_name))

    def __call__(self, prompt: str, **arguments: Any) -> Any:
        self.calls.append(("sample", arguments | {"prompt": prompt}))
        self.images = [self]
        return self

    def save(self, path: str) -> None:
        self.calls.append(("save", path))


def test_snippet_of_the_tiny_base_runs_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffalign.world import bases

    config = make_config(
        model=TINY,
        data={"resolution": 32, "sources": []},
        sampling={"num_inference_steps": 12, "guidance_scale": 2.0, "scheduler": "DDIMScheduler"},
    )
    pipe = FakePipe()
    pipe.scheduler = type("Scheduler", (), {"config": {}})()  # type: ignore[attr-defined]
    monkeypatch.setattr(bases, "load_pipeline", lambda name: pipe if name == "tiny-sdxl" else None)
    monkeypatch.chdir(tmp_path)
    exec(compile(python_block(card(tmp_path, config)), "snippet", "exec"), {})
    (_, lora), (_, arguments), saved = pipe.calls
    assert lora == Path(FILES["diffusers"])
    assert (arguments["num_inference_steps"], arguments["guidance_scale"], arguments["height"]) == (12, 2.0, 32)
    assert saved == ("save", "sample.png")
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"revision": "main", "variant": "fp16"}, 'revision="main", variant="fp16"'),
        ({"vae": "owner/fp16-vae"}, 'AutoencoderKL.from_pretrained("owner/fp16-vae", torch_dtype=torch.bfloat16)'),
        ({"family": "sd"}, 'StableDiffusionPipeline.from_pretrained("owner/base-model"'),
        ({"prediction_type": "v_prediction"}, 'prediction_type="v_prediction"'),
    ],
)
def test_snippet_follows_the_model_section(model: dict[str, Any], expected: str) -> None:
    source = snippet(make_config(model=model, training={"mixed_precision": "bf16"}))
    compile(source, "snippet", "exec")
    assert expected in source


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("sd3", ['StableDiffusion3Pipeline.from_pretrained("owner/base-model"', "pipe.load_lora_weights("]),
        ("flux", ["FluxPipeline.from_pretrained(", "guidance_scale=", ").images[0]"]),
        ("pixart", ["PixArtSigmaPipeline", "clean_caption=False", "load_lora(pipe.transformer, ", 'family="pixart"']),
        ("sana", ["SanaPipeline", "use_resolution_binning=False"]),
        ("qwen_image", ["QwenImagePipeline", "true_cfg_scale=", 'negative_prompt="",']),
        ("wan", ["WanPipeline", "num_frames=1,", 'output_type="pil"', ").frames[0][0]"]),
        ("cogvideox", ["CogVideoXPipeline", "num_frames=1,"]),
    ],
)
def test_snippets_of_transformers_use_their_pipelines(family: str, expected: list[str], tmp_path: Path) -> None:
    config = make_config(model={"family": family}, training={"mixed_precision": "bf16"})
    source = snippet(config)
    compile(source, "snippet", "exec")
    assert all(text in source for text in [*expected, "torch_dtype=torch.bfloat16"])
    call = source[source.index("= pipe(") :].split(").")[0]
    known = inspect.signature(plugins.find("families", family).pipeline_class().__call__).parameters  # type: ignore[attr-defined]
    assert set(re.findall(r"^    (\w+)=", call, flags=re.M)) <= known.keys()
    text = card(tmp_path, config, files={"diffusers": FILES["diffusers"]})
    assert "ComfyUI" not in text
    assert ("no LoRA loader" in text) == (family == "pixart")


@pytest.mark.parametrize("section", [{"users": {"encoder": "clip:x"}}, {"preference": {"rewards": ["a", "b"]}}])
def test_what_the_network_is_told_is_given_around_the_same_call(section: dict[str, Any], tmp_path: Path) -> None:
    model = {"family": "qwen_image"}
    plain = snippet(make_config(model=model))
    told = python_block(
        card(tmp_path, make_config(model=model, **section), files=FILES | {"users": "users.safetensors"})
    )
    compile(told, "snippet", "exec")
    call = plain[plain.index("image = pipe(") :].split("image.save")[0]
    assert call.count("true_cfg_scale=") == 1
    assert "".join(f"    {line}\n" for line in call.splitlines()) in told
    assert told.index("branch.given(") < told.index("true_cfg_scale=") < told.index("image.save(")


def test_clips_are_saved_as_a_video(tmp_path: Path) -> None:
    config = make_config(model={"family": "wan", "flow_shift": 3.0}, data={"resolution": 480, "num_frames": 33})
    text = card(tmp_path, config)
    assert front_matter(text)["pipeline_tag"] == "text-to-video"
    assert "480 px, 33 frames" in text
    source = python_block(text)
    assert 'export_to_video(frames, "sample.mp4", fps=16)' in source
    assert "flow_shift=3.0)" in source
    assert "num_frames=33," in source
    assert ", shift=3.0)" in snippet(make_config(model={"family": "sd3", "flow_shift": 3.0}))


def test_a_pixart_snippet_loads_a_real_adapter_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers
    from families import tiny

    from diffalign import adapters, export
    from diffalign.config import LoraConfig

    tiny.build("pixart", tmp_path / "tiny")
    network = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "tiny" / "transformer")
    adapters.attach(network, LoraConfig(rank=2))
    export.save_lora(network, None, tmp_path, family="pixart")
    pipe = FakePipe()
    pipe.transformer = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "tiny" / "transformer")  # type: ignore[attr-defined]
    pipe.to = lambda device: pipe  # type: ignore[attr-defined]
    monkeypatch.setattr(diffusers.PixArtSigmaPipeline, "from_pretrained", lambda *args, **kwargs: pipe)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet(make_config(model={"family": "pixart"})), "snippet", "exec"), {})
    assert len(adapters.lora_layers(pipe.transformer)) == len(adapters.lora_layers(network))  # type: ignore[attr-defined]
    assert pipe.calls[-1] == ("save", "sample.png")


def test_random_weights_have_nothing_to_show(tmp_path: Path) -> None:
    text = card(tmp_path, make_config(model={"pretrained": "sdxl", "random_weights": True}))
    assert "random weights" in text
    assert "```python" not in text


def test_unknown_file_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'diffusers'"):
        write_card(tmp_path, make_config(), None, {"difusers": "x"})
