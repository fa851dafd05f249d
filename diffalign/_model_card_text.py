"""The model card of a text run: README.md beside the peft files, with a snippet that runs in that folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffalign import __version__
from diffalign._report_text import MEMORY
from diffalign._run_data import is_number, read_data_report
from diffalign.config import RunConfig
from diffalign.config_loading import to_tree
from diffalign.files import atomic_write_text
from diffalign.model_card import (
    RESULT_HEAD,
    TORCH_DTYPE,
    alpha_of,
    caveats,
    data_table,
    is_hub_id,
    licence,
    markdown_table,
    number,
    objective_name,
    quoted,
    result_row,
    section_of,
    source_names,
    span,
)
from diffalign.world.names import TINY_LMS


def write_text_card(
    run_dir: Path,
    config: RunConfig,
    result: Mapping[str, Any] | None,
    *,
    summary: Mapping[str, float | str],
    prompt: str,
    chat: bool,
) -> Path:
    """Write `README.md`.

    Args:
        run_dir: the run folder; `data_report.json` is read from it where present.
        config: the resolved config.
        result: content of `result.json`, or None if nothing was evaluated.
        summary: the objective's numbers.
        prompt: an example for the snippet.
        chat: the adapter was trained on conversations, so the snippet renders the chat template.

    Returns:
        Path of the card.
    """
    tree = to_tree(config)
    body = [
        _front_matter(config),
        _introduction(config),
        _usage(config, prompt, chat),
        _results(tree, result),
        _training(config, tree, summary),
        _data(config, tree, result, run_dir),
        licence(),
    ]
    path = run_dir / "README.md"
    atomic_write_text(path, "\n\n".join(part.strip() for part in body) + "\n")
    return path


def _front_matter(config: RunConfig) -> str:
    tags = ["peft", "lora", "preference-alignment", "diffalign", objective_name(config)]
    head: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": tags}
    if is_hub_id(config.model.pretrained):
        head = {"base_model": config.model.pretrained, "base_model_relation": "adapter", **head}
    named = (*config.data.sources, *config.data.retain_sources)
    if datasets := [source for source in named if is_hub_id(source)]:
        head["datasets"] = datasets
    text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return f"---\n{text}# license: yours to choose; see the section on licences\n---"


def _base(config: RunConfig) -> str:
    name = config.model.pretrained
    if name in TINY_LMS:
        return f"the embedded tiny language model `{name}`"
    return f"`{name if is_hub_id(name) else Path(name).name}`"


def _introduction(config: RunConfig) -> str:
    name = Path(config.output_dir).name or "adapter"
    return (
        f"# {name}\n\nA LoRA adapter (rank {config.lora.rank}, alpha {alpha_of(config):g}) for {_base(config)}, trained "
        f"with **{config.objective.title}** by diffalign {__version__}. The base model's weights are unchanged: without the "
        "adapter you have the model that training started from."
    )


def _usage(config: RunConfig, prompt: str, chat: bool) -> str:
    if config.model.random_weights:
        return "## How to use it\n\nThe base has random weights (for tests and benchmarks): there is nothing to read."
    return (
        "## How to use it\n\nWith transformers and peft, run in this folder:\n\n"
        f"```python\n{text_snippet(config, prompt, chat=chat)}```\n\n"
        "`model.merge_and_unload()` puts the adapter into the weights; vLLM and others load this folder as a LoRA. On the "
        "command line, in this folder: base and adapter side by side on the same noise.\n\n"
        f"```bash\ndiffalign generate config.yaml --adapter . --base --prompt {quoted(prompt.strip())}\n```"
    )


def text_snippet(config: RunConfig, prompt: str, *, chat: bool) -> str:
    """Python source that loads base and adapter from the current folder and prints an answer."""
    model, generation = config.model, config.generation
    arguments = [f"revision={quoted(model.revision)}"] if model.revision else []
    loading = [*arguments, f"dtype={TORCH_DTYPE[config.training.mixed_precision]}"]
    lines = ["import torch"]
    if model.pretrained in TINY_LMS:
        lines += ["from diffalign.world.names import base_folder"]
    lines += ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if model.pretrained in TINY_LMS:
        lines += [f"base = base_folder({quoted(model.pretrained)})"]
    elif is_hub_id(model.pretrained):
        lines += [f"base = {quoted(model.pretrained)}"]
    else:  # a local path is the trainer's own business: only its last part is published
        lines += [
            "# the base model this was trained on: put your path to it here",
            f"base = {quoted(Path(model.pretrained).name)}",
        ]
    lines += [
        f"tokenizer = AutoTokenizer.from_pretrained({', '.join(['base', *arguments])})",
        f"model = AutoModelForCausalLM.from_pretrained({', '.join(['base', *loading])})",
        'model = PeftModel.from_pretrained(model, ".").eval()',
        'model.to("cuda" if torch.cuda.is_available() else "cpu")',
        "",
        *_input_lines(config, prompt, chat),
        "output = model.generate(",
        '    inputs["input_ids"],',
        '    attention_mask=inputs["attention_mask"],',
        f"    max_new_tokens={generation.max_new_tokens},",
        *(["    do_sample=True,", f"    temperature={generation.temperature},"] if generation.temperature else []),
        *([] if generation.temperature else ["    do_sample=False,"]),
        "    pad_token_id=tokenizer.eos_token_id,",
        ")",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n".join(lines) + "\n"


def _input_lines(config: RunConfig, prompt: str, chat: bool) -> list[str]:
    if not chat:
        return [f'inputs = tokenizer({quoted(prompt)}, return_tensors="pt").to(model.device)']
    template = config.text.chat_template
    own = (
        [f"tokenizer.chat_template = open({quoted(Path(template).name)}).read()  # as in training"] if template else []
    )
    return [
        *own,
        f'messages = [{{"role": "user", "content": {quoted(prompt.strip())}}}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ").to(model.device)",
    ]


def _results(tree: Mapping[str, Any], result: Mapping[str, Any] | None) -> str:
    parts = ["## Results"]
    if result is not None:
        parts += _memory(result)
        rewards = [row for row in result.get("rewards") or () if isinstance(row, Mapping)]
        if rewards:
            parts.append(markdown_table(RESULT_HEAD, [result_row(row) for row in rewards]))
            evaluation, generation = section_of(tree, "evaluation"), section_of(tree, "generation")
            parts.append(
                f"{result.get('prompts')} prompts, {result.get('images_per_prompt')} answer(s) each; temperature "
                f"{generation.get('temperature')}, at most {generation.get('max_new_tokens')} tokens, seed "
                f"{evaluation.get('seed')}. The noise of every answer is a function of (seed, prompt, repeat)."
            )
        if is_number(accuracy := result.get("held_out_implicit_acc")):
            interval = span(result.get("held_out_implicit_acc_ci95"))
            parts.append(
                f"Accuracy on {result.get('held_out_pairs')} held-out pairs: {accuracy:.3f} (95 % interval {interval}; 0.5 "
                "is chance)."
            )
    parts += [f"> {note}" for note in caveats(tree, result)]
    return "\n\n".join(parts)


def _memory(result: Mapping[str, Any]) -> list[str]:
    """The table of an unlearning run."""
    rows = []
    for key, name in MEMORY:
        entry = result.get(key)
        if isinstance(entry, Mapping):
            values = [number(entry.get(part), 3) for part in ("base", "aligned", "change")]
            rows.append([name, *values, span(entry.get("change_ci95")), number(entry.get("items"))])
    if not rows:
        return []
    head = ("set", "base", "aligned", "change", "95 % interval", "items")
    note = (
        "Recall: share of answers that greedy decoding repeats exactly. Probability: geometric mean of the answer's token "
        "probabilities. Intervals are bootstraps over items."
    )
    return [markdown_table(head, rows), note]


def _training(config: RunConfig, tree: Mapping[str, Any], summary: Mapping[str, float | str]) -> str:
    training, rollout = config.training, config.rollout
    settings = {k: v for k, v in section_of(tree, "objective").items() if v is not None} | dict(summary)
    rows: list[tuple[str, str]] = [(f"`{name}`", number(value)) for name, value in settings.items()]
    if config.objective.reads_reference():
        rows.append(("reference", config.reference.scheme))
    if rollout.rewards:
        rows += [
            ("rewards", ", ".join(f"`{_shown(name)}`" for name in rollout.rewards)),
            ("answers per prompt", str(rollout.samples_per_prompt)),
            ("steps per round of samples", str(rollout.steps_per_generation * rollout.num_iterations)),
        ]
    rows += [
        ("learning rate", f"{training.learning_rate:g}, {training.lr_scheduler}, warm-up {training.lr_warmup_steps}"),
        ("optimiser steps", str(training.max_train_steps)),
        (
            "samples per step and device",
            f"{training.train_batch_size} x {training.gradient_accumulation_steps} (accumulated)",
        ),
        ("optimiser", f"{training.optimizer}, gradients clipped at {training.max_grad_norm:g}"),
        ("precision", {"no": "float32"}.get(training.mixed_precision, training.mixed_precision)),
        ("base in 4 bits", "yes" if config.model.load_in_4bit else "no"),
        ("LoRA targets", str(section_of(tree, "lora").get("targets"))),
        ("weights saved", f"moving average, decay {training.ema_decay}" if training.ema_decay else "last step"),
        ("longest text", f"{config.text.max_length} tokens"),
        ("seed", str(config.seed)),
    ]
    return "## Training\n\n" + markdown_table(("setting", "value"), rows) + "\n\nEverything else is in `config.yaml`."


def _shown(reward: str) -> str:
    """A reward's name; of a user's file only its last part is published."""
    return Path(reward).name if ".py" in reward else reward


def _data(config: RunConfig, tree: Mapping[str, Any], result: Mapping[str, Any] | None, run_dir: Path) -> str:
    data = config.data
    if data.world_text is not None:
        origin = f"the embedded text world ({data.world_text.kind}), generated"
    else:
        origin = ", then ".join(source_names(data.sources)) or "not named"
    parts = [f"## Data\n\nSource: {origin}."]
    if data.retain_sources:
        parts.append(f"To be retained: {', then '.join(source_names(data.retain_sources))}.")
    if result is not None and isinstance(result.get("samples"), int):
        parts.append(f"Samples trained on: {result['samples']:,}.")
    return "\n\n".join([*parts, *data_table(read_data_report(run_dir, tree))])
