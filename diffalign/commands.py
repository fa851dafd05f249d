"""The commands beside `train`: cache, generate, evaluate, export, data check, doctor."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from diffalign import adapters, checkpoint, evaluate, export, plugins, preferences, preflight, sides, sparse
from diffalign import asked as asking
from diffalign.config import RunConfig
from diffalign.data.loader import BatchPlan, PairMicroBatches, TokenizedPairs
from diffalign.data.pipeline import iterate, split_held_out
from diffalign.data.prepare import REPORT, make_world_pairs, prepare
from diffalign.data.prompts import load_prompts
from diffalign.data.report import DataReport
from diffalign.data.source import resolve
from diffalign.errors import CheckpointError, ConfigError
from diffalign.families import NETWORK, Around, DenoisingFamily, EncodingFamily
from diffalign.files import atomic_write_text, require_writable
from diffalign.hardware import make_accelerator, open_denoising, open_family
from diffalign.outputs import held_out_result
from diffalign.policy import Policy
from diffalign.progress import Progress
from diffalign.sampling import Sampler, save_png
from diffalign.sampling.guidance import NegativeGuidance
from diffalign.sampling.rules import flipped_pairs
from diffalign.text_encoders import attach, trains_text


def is_text(config: RunConfig) -> bool:
    """Whether a config's family works on texts; its commands then are those of `diffalign.text.commands`."""
    family: Any = plugins.find("families", config.model.family)
    return bool(family.modality == "text")


def load_adapter(
    family: DenoisingFamily,
    config: RunConfig,
    path: Path,
    name: str = adapters.DEFAULT,
    *,
    negative: bool = False,
) -> dict[str, str]:
    """Attach an adapter file, a run folder's, or a checkpoint folder's (its average, if the run keeps one).

    Args:
        family: with its network in memory.
        config: of the run that a checkpoint is of.
        path: of file or folder.
        name: what the adapter is called.
        negative: it is for the negative branch of guidance.

    Returns:
        What is known about it, as export metadata.

    Raises:
        CheckpointError: it does not fit, or the checkpoint belongs to another config.
    """
    network = family.with_text_encoders() if adapts_text(family, config, path) else family.adapted
    if not (path / "manifest.json").is_file():
        info = export.load_lora(network, path, family=config.model.family, name=name, negative=negative)
        ours = {k.removeprefix("diffalign."): v for k, v in info.metadata.items() if k.startswith("diffalign.")}
        return ours | {"role": info.role}
    if config.negative.train == "joint" or asking.sees(config):
        raise ConfigError(
            f"{path} is a checkpoint of more than one plain adapter (negative.train: joint, users or preference); finish "
            "the run and give its folder, whose files can be loaded"
        )
    found = checkpoint.load(path, config)
    if config.sparse.method is not None:
        params = sparse.attach_state(network, found.adapter, config.sparse.method, name, what=str(path))
    else:
        params = attach(network, config.lora, name=name)
        adapters.load_state_dict(network, found.adapter, name)
    if "ema" in found.state:  # the average is what a run samples and saves
        with torch.no_grad():
            for param, average in zip(params, found.state["ema"]["shadow_params"], strict=True):
                param.copy_(average)
    return {"step": str(found.step), "base": config.model.pretrained, "role": role_of(config)}


def role_of(config: RunConfig) -> str:
    """What the adapter of a run is for, as its files say."""
    return "negative" if config.negative.alone else "positive"


def adapts_text(family: DenoisingFamily, config: RunConfig, path: Path) -> bool:
    """Whether an adapter, as `load_adapter` takes it, has a part for text encoders that can carry it here.

    Raises:
        CheckpointError: no such adapter.
    """
    if asking.sees(config):
        return False  # and there may be no LoRA to look into
    if (path / "manifest.json").is_file():
        return trains_text(config.lora)
    return bool(family.text_encoders) and export.adapts_text(path)


def build_cache(config: RunConfig) -> str:
    """Build (or finish, or check) the cache; returns one line about it.

    Raises:
        ConfigError: a run on texts.
    """
    if is_text(config):
        raise ConfigError(
            f"cache: family {config.model.family!r} works on texts, which are tokenised when a run starts; there is nothing "
            "to cache. Look at the data with: diffalign data check"
        )
    preflight.check_sampling(config)
    accelerator = make_accelerator(config.training, config.output_dir)
    require_writable(config.cache_dir)
    config = replace(config, cache=replace(config.cache, enabled=True))
    family = open_family(config, accelerator)
    assert isinstance(family, EncodingFamily), "all but language models are"
    prepared = prepare(config, family, accelerator)
    return f"{len(prepared.data):,} pairs in {config.cache_dir} ({prepared.report.summary()})"


def generate(
    config: RunConfig,
    *,
    prompts: str | Sequence[str] | None,
    adapter: Path | None,
    with_base: bool,
    seed: int,
    images_per_prompt: int,
    out: Path,
    negative_adapter: Path | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    weights: Sequence[str] = (),
    users: Sequence[str] = (),
) -> Path:
    """Sample images of prompts, with an adapter if one is given, and write them with an index.

    A negative adapter acts in the negative branch of guidance alone: see `diffalign.sampling.guidance` for alpha and beta.
    alpha None is 1, or 0 for two adapters that were trained together.
    `weights` of rewards (`preferences.parse`) or ids of `users` are what a network that sees them is told, in turn; then
    `grid.png` has a row for each.
    """
    preflight.check_sampling(config)
    if images_per_prompt < 1:
        raise ConfigError(f"--images-per-prompt: got {images_per_prompt}; expected at least 1")
    if not (prompts or config.evaluation.prompts):
        raise ConfigError("no prompt; give --prompt TEXT or --prompts FILE")
    texts = load_prompts(prompts or config.evaluation.prompts, None if prompts else config.evaluation.num_prompts)
    told = asking.asked(config, adapter, weights, users)
    adapter, negative_adapter = _branches(config, adapter, negative_adapter)
    require_writable(out)
    accelerator = make_accelerator(config.training, config.output_dir)
    family = open_denoising(config, accelerator)
    side, frames = config.data.resolution, config.data.num_frames
    tokens = adapter is not None and adapts_text(family, config, adapter)
    sampler = Sampler(family, texts, config.sampling, side, frames=frames, tokens=tokens)
    family.load(NETWORK)
    around = _attach(family, config, adapter, negative_adapter, alpha, beta)
    asked = "guided" if negative_adapter else "adapter" if adapter else None
    sides: list[tuple[str, bool, asking.Asked | None]] = []
    if with_base or asked is None:
        sides.append(("base", False, None))
    if asked:
        sides += [(one.label, True, one) for one in told] or [(asked, True, None)]
    rows, shown = [], []
    for name, adapters_on, one in sides:
        sampler.users = None if one is None else one.embedding.expand(len(texts), -1)
        with Progress(f"sampling {name}", len(texts) * images_per_prompt) as progress:
            images = sampler.images(
                range(len(texts)),
                seed=seed,
                repeats=images_per_prompt,
                adapters=adapters_on,
                around=around if adapters_on else nullcontext,
                progress=progress.advance,
            )
        for k, image in enumerate(images):
            index, repeat = divmod(k, images_per_prompt)
            file = f"{index:04d}-{repeat}-{name}.png"
            save_png(image, out / file, family.frames_per_second)
            row = {"file": file, "prompt": texts[index], "repeat": repeat, "side": name, "seed": seed}
            rows.append(row if one is None else row | one.facts)
        shown.append(images)
    if told and images.ndim == 4:
        save_png(torch.cat([torch.cat(list(row), dim=-1) for row in shown], dim=-2), out / "grid.png")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic_write_text(out / "images.jsonl", text)
    return out


def _branches(
    config: RunConfig, adapter: Path | None, negative_adapter: Path | None
) -> tuple[Path | None, Path | None]:
    """The adapters of both branches of guidance: that of a run which trains a negative one is for the negative branch.

    Raises:
        ConfigError: a positive adapter would come into the negative branch, or any into that of a network that sees users.
    """
    if negative_adapter is not None and asking.sees(config):
        raise ConfigError("--negative-adapter: not beside an adapter that sees users or preferences; leave it out")
    if config.negative.train == "joint" and adapter is not None:
        if (adapter / "manifest.json").is_file():
            raise ConfigError(
                f"{adapter} is a checkpoint of two adapters that are trained together; finish the run and give its folder, "
                "which has a file for each"
            )
        folder = adapter if adapter.is_dir() else adapter.parent
        if negative_adapter is None:
            negative_adapter = folder / sides.FOLDER
            if not negative_adapter.is_dir():
                raise ConfigError(
                    f"--adapter: {adapter} is one of two adapters that were trained together, and {negative_adapter} is not "
                    "there; give the other one with --negative-adapter"
                )
    if not config.negative.alone or negative_adapter is not None:
        return adapter, negative_adapter
    if adapter is not None and not (adapter / "manifest.json").is_file():
        role = export.read_file(export.find_file(adapter))[1].get("diffalign.role")
        if role not in (None, "negative"):
            raise ConfigError(
                f"--adapter: {adapter} is a {role} adapter, and the run's own are for the negative branch; give the run's "
                "with --negative-adapter beside it"
            )
    return None, adapter


def _attach(
    family: DenoisingFamily,
    config: RunConfig,
    adapter: Path | None,
    negative_adapter: Path | None,
    alpha: float | None,
    beta: float | None,
) -> Around:
    """Attach the adapters of both branches; returns what a call of the stock pipeline needs around it.

    Raises:
        CheckpointError: one of them does not fit.
        ConfigError: guidance is off.
    """
    if adapter is not None and asking.sees(config):
        asking.attach(family, config, adapter)
    elif adapter is not None:
        load_adapter(family, config, adapter)
    if negative_adapter is None:
        return nullcontext
    if config.sampling.guidance_scale <= 1:
        raise ConfigError(
            f"--negative-adapter: sampling.guidance_scale is {config.sampling.guidance_scale}, so that there is no negative "
            "branch; set it above 1"
        )
    network, name = family.network, "negative"
    before = adapters.adapter_names(network)
    load_adapter(family, config, negative_adapter, name, negative=True)
    if before:
        adapters.use_adapters(network, before, [1.0] * len(before))
    weight = config.negative.beta if beta is None else beta
    share, rest = alpha_of(config, alpha), config.negative.prompt_share if config.negative.train == "joint" else 0.0
    return lambda pipeline: NegativeGuidance(pipeline, name, alpha=share, beta=weight, prompt_share=rest)


def alpha_of(config: RunConfig, alpha: float | None) -> float:
    """The share of the positive adapter in the negative branch: none of it where each branch was trained with its own."""
    return alpha if alpha is not None else 0.0 if config.negative.train == "joint" else 1.0


def evaluate_adapter(
    config: RunConfig,
    adapter: Path | None,
    out: Path,
    *,
    negative_adapter: Path | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    against: Literal["base", "adapter"] = "base",
    weights: str | None = None,
    user: str | None = None,
) -> dict[str, Any]:
    """Compare base and adapter on the config's evaluation prompts and held-out pairs, and write the numbers.

    Args:
        config: of a run.
        adapter: file or folder; None: the base's own weights, with a negative adapter.
        out: of the numbers, JSON.
        negative_adapter: for the negative branch of guidance alone.
        alpha, beta: see `diffalign.sampling.guidance`.
        against: what is compared with: the base, or the adapter without the negative one.
        weights: of rewards (`preferences.parse`), for an adapter that sees them; None: equal ones.
        user: id, for an adapter that sees users.
    """
    preflight.check_sampling(config)
    told = asking.asked(config, adapter, [weights] if weights else [], [user] if user else [])
    adapter, negative_adapter = _branches(config, adapter, negative_adapter)
    if against == "adapter" and (adapter is None or negative_adapter is None):
        raise ConfigError("--against adapter: compares --adapter with and without --negative-adapter; give both")
    if not config.evaluation.prompts or not config.evaluation.rewards:
        raise ConfigError("evaluation.prompts and evaluation.rewards must both be set to evaluate")
    texts = load_prompts(config.evaluation.prompts, config.evaluation.num_prompts)
    require_writable(out.parent)
    accelerator = make_accelerator(config.training, config.output_dir)
    family = open_denoising(config, accelerator)
    preflight.check_schedule(config, family)
    fraction, objective = config.evaluation.held_out_fraction, config.objective
    ranks = fraction and objective.reads_reference() and (adapter is None) != (negative_adapter is None)
    # People's held-out pairs are ranked, and written, by the run itself.
    data = prepare(config, family, accelerator).data if ranks and config.users.encoder is None else None
    autocast = accelerator.autocast if config.training.mixed_precision != "no" else nullcontext
    side, frames = config.data.resolution, config.data.num_frames
    tokens = adapter is not None and adapts_text(family, config, adapter)
    sampler = Sampler(family, texts, config.sampling, side, autocast, frames, tokens=tokens)
    sampler.users = told[0].embedding.expand(len(texts), -1) if told else None
    family.load(NETWORK)
    around = _attach(family, config, adapter, negative_adapter, alpha, beta)
    evaluation, _, _ = evaluate.compare(
        sampler,
        config.evaluation,
        accelerator.device,
        base=evaluate.Side(adapters=against == "adapter"),
        aligned=evaluate.Side(adapters=adapter is not None, around=around),
    )
    found = {"adapter": adapter, "negative_adapter": negative_adapter}
    result = evaluation.headline() | {name: str(path) for name, path in found.items() if path is not None}
    if negative_adapter is not None:
        weight = config.negative.beta if beta is None else beta
        result |= {"alpha": alpha_of(config, alpha), "beta": weight, "against": against}
    if data is not None:
        data = TokenizedPairs(data, family) if tokens else data
        kept, held_out = split_held_out(data.prompts, fraction)
        plan = BatchPlan(range(len(data)), data.target_sizes, 1, config.seed)
        dataset = PairMicroBatches(data, plan, config.denoising, family, config.seed, flipped=flipped_pairs(config))
        if config.preference.rewards:
            made, _ = preferences.prepare(data.extras, kept, config.preference, config.seed)
            fixed = config.preference.fixed or told[0].embedding.double().numpy()
            dataset.preferences = preferences.Asked(made, np.array(fixed), np.array(fixed))
        policy = Policy(family, family.adapted, autocast=autocast, denoising=config.denoising)
        result |= held_out_result(evaluate.held_out_accuracy(policy, dataset, held_out))
    result |= told[0].facts if told else {}
    atomic_write_text(out, json.dumps(result, indent=1))
    return result


def export_adapter(config: RunConfig, adapter: Path | None, out: Path, fp16: bool) -> list[Path]:
    """Write an adapter file, or a checkpoint's adapter, in both styles."""
    require_writable(out)
    family = open_denoising(config, make_accelerator(config.training, config.output_dir))
    family.load(NETWORK)
    if adapter is None:
        adapter = checkpoint.find(Path(config.output_dir), "latest")
        if adapter is None:
            raise CheckpointError(f"{config.output_dir} holds no checkpoint; give --adapter FILE")
    metadata = load_adapter(family, config, adapter)
    dtype = torch.float16 if fp16 else torch.float32
    files = export.save_lora(family.adapted, None, out, family=config.model.family, metadata=metadata, dtype=dtype)
    return list(files.values())


def check_data(config: RunConfig) -> tuple[DataReport, Path]:
    """Read all records of a config's data and write the account of every row; images are not decoded."""
    accelerator = make_accelerator(config.training, config.output_dir)
    require_writable(Path(config.output_dir))
    path = Path(config.output_dir) / REPORT
    if is_text(config):
        from diffalign.text.commands import check_data as check_texts

        report = check_texts(config, accelerator)
        report.write(path)
        return report, path
    data = config.data
    if data.world_pairs is not None:
        data = replace(data, sources=(str(make_world_pairs(config, accelerator)),))
    source = resolve(data)
    report = DataReport(source=source.facts())
    with Progress("reading", data.max_pairs, "pair") as progress:
        for _ in iterate(data, source, report):
            progress.advance()
    report.write(path)
    return report, path


def doctor() -> dict[str, Any]:
    """Versions, devices and which optional packages are there."""
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft", "open_clip_torch", "safetensors")
    optional = ("xformers", "bitsandbytes", "tensorboard", "wandb")

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    devices = [
        {
            "name": torch.cuda.get_device_name(i),
            "memory_gb": round(torch.cuda.get_device_properties(i).total_memory / 1e9, 1),
            "bf16": torch.cuda.is_bf16_supported(),
        }
        for i in range(torch.cuda.device_count())
    ]
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "optional": {name: version(name) for name in optional},
        "devices": devices or "no CUDA device; training runs on the CPU",
        "cpu_threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "offline": os.environ.get("HF_HUB_OFFLINE", "0") == "1",
    }
