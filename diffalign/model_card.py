"""The model card: README.md of a run folder, with front matter for the hub and a snippet that runs in that folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from diffalign import __version__, plugins
from diffalign._run_data import interval_of, read_data_report, row_counts
from diffalign.config import ModelConfig, RunConfig
from diffalign.config_loading import to_tree
from diffalign.errors import CheckpointError, did_you_mean
from diffalign.files import atomic_write_text
from diffalign.preferences import said
from diffalign.sparse import describe, label
from diffalign.summary import objective_summary
from diffalign.text_encoders import text_lora, trains_text
from diffalign.world.names import TINY_BASES

LORA_FILE = "pytorch_lora_weights.safetensors"
TORCH_DTYPE = {"no": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}
RESULT_HEAD = ("metric", "base", "aligned", "win rate", "95 % interval", "gain", "95 % interval")
# What a family's pipeline is called with besides, so that it does what `sample` of the family does.
CALL_ARGUMENTS = {
    "pixart": ("clean_caption=False", "use_resolution_binning=False"),
    "sana": ("use_resolution_binning=False",),
}
GUIDANCE = {"qwen_image": "true_cfg_scale"}  # what the others call guidance_scale
FRAMES_PER_SECOND = {"wan": 16}  # the other clips have 8
_FILE_KINDS = ("diffusers", "kohya", "gated", "users", "delta", "comfyui")


def write_card(
    run_dir: Path,
    config: RunConfig,
    result: Mapping[str, Any] | None,
    files: Mapping[str, str],
    *,
    latent_elements: int | None = None,
) -> Path:
    """Write `README.md`.

    Args:
        run_dir: the run folder; `data_report.json` is read from it where present.
        config: the resolved config.
        result: content of `result.json`, or None if nothing was evaluated.
        files: adapter files by kind, relative to `run_dir`: "diffusers" and "kohya" (the naming ComfyUI reads), or "gated"
            (fused experts).
        latent_elements: C*h*w of one latent, which turns beta into its equivalents.

    Returns:
        Path of the card.

    Raises:
        ValueError: an unknown kind of file.
    """
    for kind in files:
        if kind not in _FILE_KINDS:
            raise ValueError(f"file kind {kind!r} is none of {', '.join(_FILE_KINDS)}{did_you_mean(kind, _FILE_KINDS)}")
    tree = to_tree(config)
    body = [
        _front_matter(config),
        _introduction(config, tree),
        _usage(config, files),
        _gates(run_dir, files),
        _results(tree, result),
        _training(config, tree, latent_elements),
        _data(tree, result, read_data_report(run_dir, tree)),
        licence(),
    ]
    path = run_dir / "README.md"
    atomic_write_text(path, "\n\n".join(part.strip() for part in body if part) + "\n")
    return path


def caveats(tree: Mapping[str, Any], result: Mapping[str, Any] | None) -> list[str]:
    """What a reader must know before quoting the numbers.

    Args:
        tree: the resolved config as a plain tree.
        result: content of `result.json`, or None.
    """
    if result is None:
        return ["Nothing was evaluated: no claim about quality is made."]
    notes = []
    data, evaluation = section_of(tree, "data"), section_of(tree, "evaluation")
    text = data.get("format") == "text"
    generated = data.get("world_pairs") or data.get("world_text")
    rewards = section_of(tree, "rollout").get("rewards") or ()
    if data.get("world_text"):
        notes.append(
            "Training data and evaluation come from the same small generated world: this shows that training works, not "
            "that a large model would gain as much."
        )
    elif result.get("metric") in rewards:
        notes.append(
            f"`{result.get('metric')}` is also the reward that was trained on: winning on it is no other evidence."
        )
    if isinstance(result.get("forget_recall"), Mapping):
        asked = (
            "Reworded questions were asked as well"
            if "forget_reworded_recall" in result
            else "Forgetting is measured on the very prompts that were trained on: other wordings were not asked"
        )
        notes.append(f"{asked}; a little fine-tuning may bring the answers back.")
    if data.get("world_pairs"):
        notes.append(
            "The training pairs were judged by the same rule that scores the evaluation, on drawn scenes: this shows "
            "that training works, not that a large model would gain as much."
        )
    elif result.get("in_training"):
        notes.append(
            f"`{result.get('metric')}` also labelled the training data: winning on it is not evidence of quality."
        )
    if isinstance(result.get("win_rate"), (int, float)):
        notes.append(
            f"Win rate: base and aligned {'answers' if text else 'images'} share prompt and noise, ties count one half, and "
            "the 95 % interval is a bootstrap over prompts. It covers these prompts and one training run, not the spread "
            "between runs."
        )
    if isinstance(count := evaluation.get("num_prompts"), int) and count < 200 and not generated and "metric" in result:
        notes.append(f"Only {count} prompts: about 800 are needed to tell 55 % from 50 %.")
    return notes


# -- Sections ---------------------------------------------------------------------------------------------------------


def _front_matter(config: RunConfig) -> str:
    kind = config.sparse.method or "lora"
    tags = ["diffusers", kind, "preference-alignment", "diffalign", objective_name(config), config.model.family]
    head: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video" if _frames(config) > 1 else "text-to-image",
        "tags": list(dict.fromkeys(tags)),
    }
    if is_hub_id(config.model.pretrained):
        head = {"base_model": config.model.pretrained, "base_model_relation": "adapter", **head}
    datasets = [source for source in config.data.sources if is_hub_id(source)]
    if datasets:
        head["datasets"] = datasets
    text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return f"---\n{text}# license: yours to choose; see the section on licences\n---"


def _introduction(config: RunConfig, tree: Mapping[str, Any]) -> str:
    title = getattr(type(config.objective), "title", objective_name(config))
    name = Path(config.output_dir).name or "adapter"
    what = _adapter_label(config)
    if config.lora.experts:
        what = f"{len(config.lora.experts)} frozen LoRA experts and gates that fuse them by layer and denoising time (TLPO)"
    if config.negative.train == "joint":
        what += " and, in the folder `negative`, **one for the negative branch of classifier-free guidance**,"
    if config.negative.alone:
        what += ", **for the negative branch of classifier-free guidance alone**,"
    fused = [Path(source).name for source in config.model.adapters]
    base = _base_label(config.model) + (f" with {' and '.join(fused)} fused into it" if fused else "")
    return (
        f"# {name}\n\n{what} for "
        f"{base}, trained with **{title}** on preference pairs by "
        f"diffalign {__version__}. The base model's weights are unchanged: without "
        "the adapter you have the reference that training started from."
    )


def _adapter_label(config: RunConfig) -> str:
    """What is adapted, with rank and alpha."""
    if config.users.encoder:
        if config.users.through == "gates":
            return f"A LoRA (rank {config.lora.rank}) whose ranks users weigh, described by {config.users.encoder!r},"
        if config.users.through == "time":
            what = f"A LoRA (rank {config.lora.rank}) and a vector on the time"
            return f"{what} for users, described by {config.users.encoder!r},"
        return f"Attentions to users ({config.users.tokens} tokens, described by {config.users.encoder!r}; PPD)"
    if config.preference.seen:
        what = {
            "gates": f"A LoRA (rank {config.lora.rank}) whose ranks are turned up and down",
            "time": f"A LoRA (rank {config.lora.rank}) and a vector on the embedded time",
            "attention": "Attentions",
        }[config.preference.through]
        return f"{what} by weights of {len(config.preference.rewards)} rewards ({', '.join(config.preference.rewards)})"
    if config.sparse.method is not None:
        return describe(config.sparse)
    lora, own = config.lora, text_lora(config.lora)
    text = f"(rank {own.rank}, alpha {own.rank if own.alpha is None else own.alpha:g})"
    if not lora.rank:
        return f"A LoRA adapter of the text encoders {text}"
    network = f"A LoRA adapter (rank {lora.rank}, alpha {alpha_of(config):g})"
    return f"{network} with one of the text encoders {text}" if trains_text(lora) else network


def _usage(config: RunConfig, files: Mapping[str, str]) -> str:
    parts = ["## How to use it"]
    if "users" in files:
        return "\n\n".join([*parts, _usage_of_users(config)])
    if config.preference.fixed:
        parts.append(
            f"Pairs were judged by {said(config.preference.fixed, config.preference.rewards)} "
            f"(scale: {config.preference.scale}); the adapter is for this trade alone."
        )
    lora = next((files[kind] for kind in ("diffusers", "gated", "delta") if kind in files), None)
    if lora is None:
        parts.append("The adapter has not been exported yet: training did not finish.")
    elif config.model.random_weights:
        parts.append(
            f"The base has random weights (architecture {config.model.pretrained!r}, for tests and benchmarks): there "
            "is nothing to look at."
        )
    else:
        parts.append("In diffusers, run in this folder:")
        parts.append(f"```python\n{snippet(config, lora)}```")
        if "gated" in files:
            parts.append(
                "Gates depend on the denoising time: they cannot be merged into weights, and no file for ComfyUI, web UIs "
                "or `load_lora_weights` can hold them. This needs diffalign."
            )
        elif config.negative.alone:
            parts.append(
                "Loaded as an ordinary LoRA it does the opposite of what it is for: it acts in the branch that guidance "
                "subtracts. `alpha` is the share of your other adapters in that branch, `beta` the weight of this one."
            )
        elif "delta" in files:
            parts.append(
                "This is no LoRA: `load_lora_weights` and web UIs cannot read the file, and it fits only the base that it "
                "was trained on. `diffalign export config.yaml --adapter . --out FOLDER --fp16` writes the whole difference "
                "of every changed layer for ComfyUI's *Load LoRA* node, as large as these layers (the keys were read in "
                "ComfyUI's code; it was not run). `diffalign.adapters.use_adapters(network, ['default'], [0.7])` weakens it."
            )
        elif _has_lora_loader(config.model):
            parts.append("`adapter_weights` in `pipe.set_adapters('default_0', adapter_weights=0.7)` weakens it.")
        else:
            parts.append(
                "diffusers has no LoRA loader for this pipeline: diffalign puts the adapter into the transformer."
            )
        parts.append(
            "On the command line, in this folder: base and adapter side by side on the same noise.\n\n"
            f"```bash\ndiffalign generate config.yaml {'--negative-adapter' if config.negative.alone else '--adapter'} . "
            f"{'--base ' if config.negative.alone else ''}--prompt "
            f"{json.dumps(_prompt(config))}\n```"
        )
    if config.negative.train == "joint":
        parts.append(
            "The two were trained together, each on its side of the pairs: guidance leads from one to the other. `alpha=0` "
            "keeps the first out of the negative branch, and `prompt_share` moves that branch's prompt away from yours."
        )
    if "kohya" in files and config.negative.train == "joint":
        parts.append(
            f"In ComfyUI, copy `{files['kohya']}` and the file of the same name in `negative` to `models/loras`, under "
            "names that tell them apart. A *Load LoRA* node would patch both branches: make a hook of each with *Create "
            "Hook LoRA* (strength_model 1.0, strength_clip 0), and put the first on the positive and the second on the "
            "negative conditioning with *Cond Set Props*. `prompt_share` has no node."
        )
    elif "kohya" in files and config.negative.alone:
        parts.append(
            f"In ComfyUI, copy `{files['kohya']}` to `models/loras`. A *Load LoRA* node would patch both branches: make a "
            "hook with *Create Hook LoRA* (strength_model 1.0, strength_clip 0) and put it on the negative conditioning "
            "alone with *Cond Set Props*, before that goes into the sampler."
        )
    elif "kohya" in files:
        strength = "the model. The text encoders were not trained; their strength has no effect."
        if trains_text(config.lora):
            strength = "model and clip: the text encoders were trained, too."
            if not config.lora.rank:
                strength = "clip: only the text encoders were trained; the model's strength has no effect."
        parts.append(
            f"In ComfyUI, copy `{files['kohya']}` to `models/loras` and add a *Load LoRA* node with strength 1.0 for "
            f"{strength}"
        )
    if trains_text(config.lora):
        parts.append(
            "The adapter changes what every prompt is encoded to, the negative one included: embeddings that were computed "
            "without it have to be computed again."
        )
    return "\n\n".join(parts)


def _usage_of_users(config: RunConfig) -> str:
    """How somebody's taste, or weights of rewards, are put into a stock pipeline."""
    part, model = _network_part(config.model), config.model
    rewards = config.preference.rewards
    weights = [round(1 / len(rewards), 4) for _ in rewards]
    tiny = model.pretrained in TINY_BASES
    load = (
        ["from diffalign.world.bases import load_pipeline", "", f"pipe = load_pipeline({quoted(model.pretrained)})"]
        if tiny
        else _load_lines(model, TORCH_DTYPE[config.training.mixed_precision])
    )
    lines = [
        "import torch",
        *_save_imports(config),
        "from diffalign import user_branches",
        *([] if weights else ["from diffalign.users import hashed, read_users"]),
        *load,
        *(
            [""]
            if weights
            else ["from pathlib import Path", "", 'users = read_users(Path("."))  # embeddings by hashed id']
        ),
        f'branch = user_branches.load(pipe.{part}, ".")',
        *(
            [f"with branch.given(torch.tensor({weights})):  # of {', '.join(rewards)}"]
            if weights
            else ["with branch.given(next(iter(users.values()))[0]):  # or users[hashed(id)][0]"]
        ),
        *(f"    {line}" for line in _call(config)),
        *_save(config),
    ]
    text = "In diffusers, run in this folder:\n\n```python\n" + "\n".join(lines) + "\n```\n\n"
    if weights:
        return (
            f"{text}Weights are of {', '.join(rewards)}, in this order, each at least 0, with sum 1. "
            f"Without any {'the LoRA acts alone, for no preference' if config.lora.rank else 'it is the base'}. On the "
            "command line, a row of images for each:\n\n```bash\ndiffalign generate . "
            + " ".join(f"--preference {name}=1" for name in rewards)
            + f" --prompt {json.dumps(_prompt(config))}\n```"
        )
    return (
        f"{text}Somebody new is described by a few "
        "pairs: `diffalign.users.make_encoder(config.users).embed([...])`. `diffalign.users.between` mixes users; "
        "`branch.given(user, strength=0.5)` weakens one. Without a user the network is its base."
    )


def _gates(run_dir: Path, files: Mapping[str, str]) -> str:
    """What the gates learnt: each expert's share at a few times."""
    if "gated" not in files:
        return ""
    from diffalign import export, gates

    file = run_dir / files["gated"]
    header = gates.read_header(file, export.read_file(file)[1])
    rows = [(f"{time:g}", *(number(share, 3) for share in row)) for time, row in zip(header["times"], header["shares"])]
    layers = len(header["layers"])
    return (
        f"## Gates\n\nMean {header['kind']} gate of each expert over {layers} layers; time runs from 0 (clean) to 1 (noise)."
        "\n\n" + markdown_table(("time", *header["experts"]), rows)
    )


def snippet(config: RunConfig, lora: str = LORA_FILE) -> str:
    """Python source that loads base and adapter from the current folder and saves `sample.png` (clips: `sample.mp4`).

    Args:
        config: the resolved config.
        lora: file name of the adapter in diffusers' format, or of gated experts.
    """
    sampling, model = config.sampling, config.model
    dtype = TORCH_DTYPE[config.training.mixed_precision]
    tiny = model.pretrained in TINY_BASES
    lines = ["import torch", ""]
    if tiny:
        lines += [
            "from diffalign.world.bases import load_pipeline",
            "",
            f"pipe = load_pipeline({quoted(model.pretrained)})",
        ]
    else:
        lines += _load_lines(model, dtype)
        lines += ['pipe.to("cuda" if torch.cuda.is_available() else "cpu")']
    if sampling.scheduler:
        lines.insert(1, f"from diffusers import {sampling.scheduler}")
        lines.append(f"pipe.scheduler = {sampling.scheduler}.from_config(pipe.scheduler.config)")
    if model.prediction_type:
        lines.append(
            "pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, "
            f"prediction_type={quoted(model.prediction_type)})"
        )
    if model.flow_shift is not None:
        lines.append(
            f"pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, {_shift_key(model)}="
            f"{model.flow_shift})"
        )
    alone, adapter = config.negative.alone, quoted(lora)
    fusing = _fuse_lines(model)
    lines[1:1] = [line for line in dict.fromkeys(fusing) if line.startswith("from ")]
    lines += [line for line in fusing if not line.startswith("from ")]
    if alone:
        lines.insert(1, "from diffalign.sampling.guidance import NegativeGuidance")
        load = ""
        if not _has_lora_loader(model) or config.sparse.method is not None:
            lines.insert(1, "from diffalign.export import load_lora")
            load = (
                f'load_lora(pipe.{_network_part(model)}, {quoted(lora)}, family={quoted(model.family)}, name="negative", '
                "negative=True)"
            )
            adapter = quoted("negative")
    elif config.lora.experts:
        lines.insert(1, "from diffalign.gates import load_gated")
        load = f"load_gated(pipe.{_network_part(model)}, {quoted(lora)})"
    elif _has_lora_loader(model) and config.sparse.method is None:
        load = f'pipe.load_lora_weights(".", weight_name={quoted(lora)})'
    else:
        lines.insert(1, "from diffalign.export import load_lora")
        load = f"load_lora(pipe.{_network_part(model)}, {quoted(lora)}, family={quoted(model.family)})"
    joint = config.negative.train == "joint"
    if joint:
        alone, adapter = True, quoted(f"negative/{lora}")
        lines.insert(1, "from diffalign.sampling.guidance import NegativeGuidance")
        if not _has_lora_loader(model):
            # Before the other one: what is attached last acts alone.
            first = (
                f'load_lora(pipe.{_network_part(model)}, {adapter}, family={quoted(model.family)}, name="negative", '
            )
            load = f"{first}negative=True)\n{load}"
            adapter = quoted("negative")
    lines += [load] if load else []
    start = len(lines) + 1
    lines += ["", *_call(config)]
    if alone:
        beta = f", beta={config.negative.beta:g}" if config.negative.beta != 1 else ""
        if joint:
            beta = f", alpha=0{beta}, prompt_share={config.negative.prompt_share:g}"
        call = [f"with NegativeGuidance(pipe, {adapter}{beta}):", *(f"    {line}" for line in lines[start:])]
        lines[start:] = call
    lines[1:1] = _save_imports(config)
    lines += _save(config)
    lines = [line for i, line in enumerate(lines) if not line.startswith("from ") or line not in lines[:i]]
    return "\n".join(lines) + "\n"


def _call(config: RunConfig) -> list[str]:
    """Source that samples as the run's evaluation does, with `pipe`."""
    model, sampling, frames, video = config.model, config.sampling, _frames(config), _makes_clips(config.model)
    lines = [f"{'frames' if frames > 1 else 'image'} = pipe(", f"    {quoted(_prompt(config))},"]
    # Qwen-Image is guided only where there is a negative prompt, an empty one included.
    guidance = GUIDANCE.get(model.family, "guidance_scale")
    if sampling.negative_prompt or (guidance == "true_cfg_scale" and sampling.guidance_scale > 1):
        lines.append(f"    negative_prompt={quoted(sampling.negative_prompt)},")
    lines += [
        f"    num_inference_steps={sampling.num_inference_steps},",
        f"    {guidance}={sampling.guidance_scale},",
    ]
    if sampling.guidance_rescale:
        lines.append(f"    guidance_rescale={sampling.guidance_rescale},")
    if model.max_sequence_length is not None:
        lines.append(f"    max_sequence_length={model.max_sequence_length},")
    lines += [f"    {argument}," for argument in CALL_ARGUMENTS.get(model.family, ())]
    resolution = sampling.resolution or config.data.resolution
    lines += [f"    height={resolution},", f"    width={resolution},"]
    if video:
        lines += [f"    num_frames={frames},", *([] if frames > 1 else ['    output_type="pil",'])]
    lines += ["    generator=torch.Generator().manual_seed(0),"]
    return [*lines, ").frames[0]" if frames > 1 else ").frames[0][0]" if video else ").images[0]"]


def _save_imports(config: RunConfig) -> list[str]:
    return ["from diffusers.utils import export_to_video"] if _frames(config) > 1 else []


def _save(config: RunConfig) -> list[str]:
    """Source that writes what `_call` made."""
    if _frames(config) > 1:
        return [f'export_to_video(frames, "sample.mp4", fps={FRAMES_PER_SECOND.get(config.model.family, 8)})']
    return ['image.save("sample.png")']


def _fuse_lines(model: ModelConfig) -> list[str]:
    """Source that puts the adapters of the config into the network."""
    lines = []
    for source in model.adapters:
        name = Path(source).name
        if _holds_changes(source):
            network = f"pipe.{_network_part(model)}"
            lines += [
                "from diffalign import sparse",
                "from diffalign.export import load_lora",
                f'load_lora({network}, {quoted(name)}, family={quoted(model.family)}, name="fused")  # what the base had: '
                "your path to it",
                f'{network}.fuse_lora(adapter_names=["fused"])',
                f"sparse.remove({network})",
            ]
            continue
        lines += [f'pipe.load_lora_weights({quoted(name)}, adapter_name="fused")  # what the base had: your path to it']
        lines += ['pipe.fuse_lora(adapter_names=["fused"])', "pipe.unload_lora_weights()"]
    return lines


def _holds_changes(source: str) -> bool:
    """Whether an adapter file holds changed weights; one that is gone is taken for a LoRA."""
    from diffalign import export

    try:
        return "diffalign.delta" in export.read_metadata(Path(source).expanduser())
    except CheckpointError:
        return False


def _frames(config: RunConfig) -> int:
    return config.sampling.num_frames or config.data.num_frames


def _pipeline_family(model: ModelConfig) -> Any:
    """The family's class; None if it is not behind a stock diffusers pipeline."""
    from diffalign.families._pipeline import PipelineFamily

    cls: Any = plugins.find("families", model.family)
    return cls if issubclass(cls, PipelineFamily) else None


def _makes_clips(model: ModelConfig) -> bool:
    return bool(getattr(_pipeline_family(model), "frame_step", 0))


def _has_lora_loader(model: ModelConfig) -> bool:
    """Whether the stock pipeline loads adapters itself."""
    from diffusers.loaders.lora_base import LoraBaseMixin

    family = _pipeline_family(model)
    return family is None or issubclass(family.pipeline_class(), LoraBaseMixin)


def _network_part(model: ModelConfig) -> str:
    family = _pipeline_family(model)
    return "unet" if family is None else family.network_part


def _shift_key(model: ModelConfig) -> str:
    """What the family's published scheduler calls its shift."""
    from diffalign.families import published

    family = _pipeline_family(model)
    names = () if family is None else family.architectures
    schedulers = [published.component_configs(name)["scheduler"] for name in names]
    return "flow_shift" if any("flow_shift" in scheduler for scheduler in schedulers) else "shift"


def _load_lines(model: ModelConfig, dtype: str) -> list[str]:
    from diffalign.families._loading import stock_vae

    single = model.pretrained.endswith(".safetensors")
    family = _pipeline_family(model)
    cls = "DiffusionPipeline" if family is None else family.pipeline_class().__name__
    call = "from_single_file" if single else "from_pretrained"
    # A local path is the trainer's own business: only its last part is published.
    where = model.pretrained if is_hub_id(model.pretrained) else Path(model.pretrained).name
    arguments = [quoted(where), f"torch_dtype={dtype}"]
    arguments += [f"revision={quoted(model.revision)}"] if model.revision else []
    arguments += [f"variant={quoted(model.variant)}"] if model.variant else []
    vae_class = "AutoencoderKL" if family is None else stock_vae(family.pipeline_class())[0].__name__
    lines = [f"from diffusers import {f'{vae_class}, ' if model.vae else ''}{cls}", ""]
    if model.vae:
        vae = model.vae if is_hub_id(model.vae) else Path(model.vae).name
        vae_call = "from_single_file" if vae.endswith(".safetensors") else "from_pretrained"
        lines.append(f"vae = {vae_class}.{vae_call}({quoted(vae)}, torch_dtype={dtype})")
        arguments.append("vae=vae")
    if not is_hub_id(model.pretrained):
        lines.append("# the base checkpoint this was trained on: put your path to it here")
    return [*lines, f"pipe = {cls}.{call}({', '.join(arguments)})"]


def _results(tree: Mapping[str, Any], result: Mapping[str, Any] | None) -> str:
    parts = ["## Results"]
    if result is not None:
        evaluation, sampling = section_of(tree, "evaluation"), section_of(tree, "sampling")
        rewards = [row for row in result.get("rewards") or () if isinstance(row, Mapping)]
        rows = [result_row(row) for row in rewards] or [result_row(result)]
        parts.append(
            markdown_table(("metric", "base", "aligned", "win rate", "95 % interval", "gain", "95 % interval"), rows)
        )
        accuracy = result.get("held_out_implicit_acc")
        if isinstance(accuracy, (int, float)):
            parts.append(f"Implicit accuracy on held-out pairs: {accuracy:.3f} (0.5 is chance).")
        images = f"{evaluation.get('num_prompts')} prompts, {evaluation.get('images_per_prompt')} image(s) each"
        settings = (
            f"{sampling.get('num_inference_steps')} steps, guidance {sampling.get('guidance_scale')}, "
            f"scheduler {sampling.get('scheduler') or 'of the model'}, seed {evaluation.get('seed')}"
        )
        parts.append(f"{images}; {settings}. The noise of every image is a function of (seed, prompt index, repeat).")
    parts += [f"> {note}" for note in caveats(tree, result)]
    return "\n\n".join(parts)


def result_row(result: Mapping[str, Any]) -> list[str]:
    return [
        str(result.get("reward") or result.get("metric") or ""),
        number(result.get("base_mean")),
        number(result.get("aligned_mean")),
        number(result.get("win_rate"), 3),
        span(result.get("win_rate_ci95")),
        number(result.get("gain"), 3),
        span(result.get("gain_ci95")),
    ]


def span(value: Any) -> str:
    interval = interval_of(value)
    return "" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}"


def _training(config: RunConfig, tree: Mapping[str, Any], latent_elements: int | None) -> str:
    objective, training = section_of(tree, "objective"), config.training
    summary = objective_summary(config, elements=latent_elements)
    rows = [(f"`{name}`", number(value)) for name, value in objective.items() if value is not None]
    explained = {
        "error_factor": "score = -factor x error",
        "beta_without_half": "the same strength in code that leaves out the 1/2 of the score",
        "beta_on_summed_error": "the same strength on the summed squared error, as the paper's pseudo-code has it",
    }
    rows += [
        (f"{name}: {explained[name]}" if name in explained else name, number(value))
        for name, value in summary.items()
        if name not in objective
    ]
    rows += [
        ("learning rate", f"{training.learning_rate:g}, {training.lr_scheduler}, warm-up {training.lr_warmup_steps}"),
        ("optimiser steps", str(training.max_train_steps)),
        (
            "pairs per step and device",
            f"{training.train_batch_size} x {training.gradient_accumulation_steps} (accumulated)",
        ),
        ("optimiser", f"{training.optimizer}, gradients clipped at {training.max_grad_norm:g}"),
        ("precision", {"no": "float32"}.get(training.mixed_precision, training.mixed_precision)),
        *_targets(config, section_of(tree, "lora")),
        ("weights saved", f"moving average, decay {training.ema_decay}" if training.ema_decay else "last step"),
        (
            "resolution",
            f"{config.data.resolution} px"
            + (", aspect-ratio buckets" if config.data.buckets else "")
            + (f", {config.data.num_frames} frames" if config.data.num_frames > 1 else ""),
        ),
        ("seed", str(config.seed)),
    ]
    return "## Training\n\n" + markdown_table(("setting", "value"), rows) + "\n\nEverything else is in `config.yaml`."


def _targets(config: RunConfig, section: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows about what is adapted."""
    if config.lora.experts:
        return [("LoRA targets", "those of the experts")]
    if config.sparse.method is not None:
        return [("trained entries", label(config.sparse))]
    rows = [("LoRA targets", str(section.get("targets")))] if config.lora.rank else []
    if trains_text(config.lora):
        rows.append(("LoRA targets, text encoders", str(section.get("text_encoder_targets"))))
    if (rate := config.training.text_encoder_learning_rate) is not None:
        rows.append(("learning rate, text encoders", f"{rate:g}"))
    return rows


def _data(tree: Mapping[str, Any], result: Mapping[str, Any] | None, report: Mapping[str, Any] | None) -> str:
    data = section_of(tree, "data")
    sources = source_names(data.get("sources") or ())
    made = data.get("world_pairs")
    origin = (
        (
            f"true drawings in the taste *{made['taste']}*, against images sampled from a tiny base"
            if made.get("chosen") == "drawn"
            else f"images sampled from the base and judged by the tiny world's verifier and the taste *{made['taste']}*"
        )
        if made
        else ", then ".join(sources) or "not named"
    )
    parts = [f"## Data\n\nFormat `{data.get('format')}`; source: {origin}. Ties: {data.get('ties')}."]
    if result is not None and isinstance(result.get("pairs"), int):
        parts.append(f"Pairs trained on: {result['pairs']:,}.")
    return "\n\n".join([*parts, *data_table(report)])


def source_names(sources: Sequence[str]) -> list[str]:
    """Hub ids as they are; of folders of the machine it was trained on, which are nobody's business, only the names."""
    return [f"`{source if is_hub_id(source) else Path(source).name}`" for source in sources]


def data_table(report: Mapping[str, Any] | None) -> list[str]:
    """What was read, kept and taken out; nothing without a report."""
    counts = [(what, f"{n:,}", kind) for what, n, kind in row_counts(report)] if report else []
    return [markdown_table(("while reading", "count", ""), counts)] if counts else []


def licence() -> str:
    return (
        "## Licence and limits\n\nNo licence is set: choose one that the licences of the base model and of the data "
        "set allow, and put it into the front matter (`license: ...`). The adapter inherits the base model's biases "
        "and those of the people whose choices it was trained on."
    )


# -- Small helpers ----------------------------------------------------------------------------------------------------


def section_of(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = tree.get(name)
    return section if isinstance(section, Mapping) else {}


def objective_name(config: RunConfig) -> str:
    return Path(str(to_tree(config)["objective"]["name"])).stem


def alpha_of(config: RunConfig) -> float:
    return float(config.lora.rank if config.lora.alpha is None else config.lora.alpha)


def is_hub_id(name: str) -> bool:
    looks = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")
    return looks and not name.endswith((".safetensors", ".parquet", ".jsonl")) and not Path(name).exists()


def _base_label(model: ModelConfig) -> str:
    if is_hub_id(model.pretrained):
        return f"`{model.pretrained}`"
    if model.pretrained in TINY_BASES:
        return f"the embedded tiny base `{model.pretrained}`"
    return f"`{Path(model.pretrained).name}`"


def _prompt(config: RunConfig) -> str:
    prompts = config.evaluation.prompts
    if not isinstance(prompts, str) and prompts:
        return prompts[0]
    if config.model.pretrained in TINY_BASES:
        return "a small green circle on a black background"
    return "a fox in the snow, golden hour, photograph"


def quoted(text: str) -> str:
    """A Python literal with double quotes: JSON's is one."""
    return json.dumps(text, ensure_ascii=False)


def number(value: Any, digits: int = 4) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


def markdown_table(head: tuple[str, ...], rows: list[Any]) -> str:
    cells = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells)
