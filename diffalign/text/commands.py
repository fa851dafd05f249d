"""The commands beside `train`, for language models: generate, evaluate, export, data check."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open

from diffalign import adapters, checkpoint, preflight
from diffalign.config import RunConfig
from diffalign.data.report import DataReport
from diffalign.errors import CheckpointError, ConfigError
from diffalign.families._loading import quiet
from diffalign.families.causal_lm import CausalLM
from diffalign.files import atomic_write_text, require_writable
from diffalign.hardware import make_accelerator, open_family
from diffalign.jobs.text import HELD_OUT, PROMPTS, TextJob, read_prompts
from diffalign.text import evaluate
from diffalign.text.batch import TextExample
from diffalign.text.export import CONFIG_NAME, WEIGHTS_NAME, load_peft, save_peft
from diffalign.text.prepare import prepare_text


def open_job(config: RunConfig) -> TextJob:
    """The job of a config, with its tokenizer; neither data nor weights are loaded.

    Raises:
        UserError: settings that cannot work.
    """
    preflight.check_text(config)
    if config.training.train_batch_size == "auto":  # nothing is trained; any whole number of groups will do
        batch = 2 * config.rollout.samples_per_prompt
        config = replace(config, training=replace(config.training, train_batch_size=batch))
    accelerator = make_accelerator(config.training, config.output_dir)
    family = open_family(config, accelerator)
    assert isinstance(family, CausalLM), "the caller has asked for a text family"
    family.load_tokenizer(config.text.chat_template)
    return TextJob(config, accelerator, family)


def require_adapter(path: Path) -> None:
    """Refuse, before anything is loaded, a path that holds no adapter.

    Raises:
        CheckpointError: neither a peft folder nor a checkpoint folder.
    """
    if not any((path / name).is_file() for name in (CONFIG_NAME, "manifest.json")):
        raise CheckpointError(
            f"{path} holds no adapter: expected {CONFIG_NAME} (a peft folder, or the folder of a run that finished) or "
            "manifest.json (a checkpoint folder)"
        )


def load_adapter(family: CausalLM, config: RunConfig, path: Path) -> dict[str, str]:
    """Attach the adapter of a peft folder or of a checkpoint folder (its average, if the run keeps one).

    Returns:
        What is known about it, as export metadata.

    Raises:
        CheckpointError: it does not fit, or the checkpoint belongs to another config.
    """
    if not (path / "manifest.json").is_file():
        load_peft(family.network, path)
        return _facts(path / WEIGHTS_NAME)
    found = checkpoint.load(path, config)
    params = adapters.attach(family.network, config.lora)
    adapters.load_state_dict(family.network, found.adapter)
    if "ema" in found.state:  # the average is what a run samples and saves
        with torch.no_grad():
            for param, average in zip(params, found.state["ema"]["shadow_params"], strict=True):
                param.copy_(average)
    return {"step": str(found.step)}


def _facts(weights: Path) -> dict[str, str]:
    try:
        with safe_open(weights, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{weights} cannot be read ({error}); expected a safetensors file") from error
    return {k.removeprefix("diffalign."): v for k, v in metadata.items() if k.startswith("diffalign.")}


# -- generate ---------------------------------------------------------------------------------------------------------


def generate(
    config: RunConfig,
    *,
    prompts: str | Sequence[str] | None,
    chat: bool,
    adapter: Path | None,
    with_base: bool,
    seed: int,
    repeats: int,
    out: Path,
) -> list[dict[str, Any]]:
    """Answer prompts, with an adapter if one is given, and write `answers.jsonl`.

    Args:
        config: of the run or the base.
        prompts: texts, a file (one prompt per line, or a data file with a `prompt` column), or None for the config's
            evaluation prompts.
        chat: send texts as a user's message through the chat template.
        adapter: a peft or checkpoint folder.
        with_base: the base as well, on the same noise.
        seed: with prompt and repeat, it decides the noise.
        repeats: answers per prompt.
        out: folder.

    Returns:
        The rows of `answers.jsonl`: prompt, repeat, side, text, finished, seed.

    Raises:
        UserError: no prompts, or something that does not fit.
    """
    if repeats < 1:
        raise ConfigError(f"--samples-per-prompt: got {repeats}; expected at least 1")
    if adapter is not None:
        require_adapter(adapter)
    job = open_job(config)
    require_writable(out)
    asked = _prompts(job, prompts, chat=chat)
    network = job.load()
    if adapter is not None:
        load_adapter(job.family, job.config, adapter)
    job.open_policy(network, network)
    # A network without adapter is the base as it is.
    sides = [("base", adapter is None)] if with_base or adapter is None else []
    sides += [("adapter", True)] if adapter else []
    rows = []
    for side, on in sides:
        answers = evaluate.sample(
            job.policy, asked, config.generation, seed=seed, repeats=repeats, adapters=on, title=f"sampling {side}"
        )
        for k, answer in enumerate(answers):
            index, repeat = divmod(k, repeats)
            text = job.family.tokenizer.decode(answer.ids, skip_special_tokens=True)
            facts = {"prompt": asked[index].prompt, "repeat": repeat, "side": side, "text": text}
            rows.append(facts | {"finished": answer.finished, "seed": seed})
    order = sorted(range(len(rows)), key=lambda n: n % (len(asked) * repeats))  # sides of a prompt beside each other
    rows = [rows[n] for n in order]
    atomic_write_text(out / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def _prompts(job: TextJob, prompts: str | Sequence[str] | None, *, chat: bool) -> list[TextExample]:
    count = job.config.evaluation.num_prompts
    if not prompts and not job.config.evaluation.prompts:
        raise ConfigError("no prompt; give --prompt TEXT or --prompts FILE")
    if not prompts and job.config.evaluation.prompts == HELD_OUT:
        job.prepare()
        return job.prompts
    if not prompts:
        return job.read_evaluation_prompts()[:count]
    if isinstance(prompts, str):
        path = Path(prompts)
        if path.suffix != ".txt":
            return read_prompts(job.config, job.family, path)
        if not path.is_file():
            raise ConfigError(f"--prompts {prompts}: no such file")
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [{"prompt": [{"role": "user", "content": text}] if chat else text} for text in prompts]
    with tempfile.TemporaryDirectory() as folder:
        file = (
            Path(folder) / "evaluation.jsonl"
        )  # as a run names its own: a prompt's noise depends on file name and place
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return read_prompts(job.config, job.family, file)


# -- evaluate, export, data check -------------------------------------------------------------------------------------


def evaluate_adapter(config: RunConfig, adapter: Path, out: Path) -> dict[str, Any]:
    """What a run's own evaluation measures, for any adapter: rewards, held-out accuracy, forget and retain sets.

    Raises:
        UserError: nothing to evaluate, or an adapter that does not fit.
    """
    require_adapter(adapter)
    config = replace(config, evaluation=replace(config.evaluation, at_end=True))
    job = open_job(config)
    require_writable(out.parent)
    job.prepare()
    network = job.load()
    load_adapter(job.family, job.config, adapter)
    job.open_policy(network, network)
    result = job.evaluate()
    if not result:
        raise ConfigError(
            "nothing to evaluate; set evaluation.prompts and evaluation.rewards, or evaluation.held_out_fraction for pairs"
        )
    result |= {"adapter": str(adapter)}
    atomic_write_text(out, json.dumps(result, indent=1))
    return result


def export_adapter(config: RunConfig, adapter: Path | None, out: Path, *, fp16: bool, merge: bool) -> list[Path]:
    """Write an adapter, or a checkpoint's, as a peft folder; or the model with the adapter merged into its weights.

    Raises:
        UserError: no adapter, one that does not fit, or a base in 4 bits to merge into.
    """
    if merge and config.model.load_in_4bit:
        raise ConfigError("--merge into a base in 4 bits would round the adapter away; set model.load_in_4bit=false")
    require_writable(out)
    if adapter is None:
        adapter = checkpoint.find(Path(config.output_dir), "latest")
        if adapter is None:
            raise CheckpointError(f"{config.output_dir} holds no checkpoint; give --adapter FOLDER")
    require_adapter(adapter)
    job = open_job(config)
    family = job.family
    job.load()
    metadata = load_adapter(family, config, adapter)
    dtype = torch.float16 if fp16 else torch.float32
    if not merge:
        save_peft(family.network, None, out, config.model.pretrained, metadata, dtype=dtype)
        return sorted(out.glob("adapter_*"))
    merged = merge_adapter(family.network)
    if fp16:
        merged.half()
    with quiet():
        merged.save_pretrained(out)
    family.tokenizer.save_pretrained(out)
    return sorted(path for path in out.iterdir() if path.is_file())


def merge_adapter(network: Any) -> Any:
    """Put the adapter into the weights, in place: the network is a plain one again."""
    for path, layer in adapters.lora_layers(network).items():
        layer.merge(safe_merge=True)
        parent, _, name = path.rpartition(".")
        setattr(network.get_submodule(parent), name, layer.get_base_layer())
    del network.peft_config
    network._hf_peft_config_loaded = False  # or transformers would save an adapter alone
    return network


def check_data(config: RunConfig, accelerator: Accelerator) -> DataReport:
    """Read and tokenise all of a config's data; the account of every row."""
    family = open_family(config, accelerator)
    assert isinstance(family, CausalLM), "the caller has asked for a text family"
    family.load_tokenizer(config.text.chat_template)
    return prepare_text(config, family, accelerator, needs=PROMPTS if preflight.online(config) else None)[1]
