"""The model card of a trained reward: README.md of the run folder, with a snippet that runs in that folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffalign import __version__
from diffalign._run_data import is_number, read_data_report
from diffalign.config import RunConfig
from diffalign.config_loading import to_tree
from diffalign.files import atomic_write_text
from diffalign.judges import FOLDER
from diffalign.model_card import (
    data_table,
    is_hub_id,
    markdown_table,
    number,
    objective_name,
    quoted,
    section_of,
    source_names,
    span,
)
from diffalign.world.names import TINY_CLIPS


def write_reward_card(run_dir: Path, config: RunConfig, result: Mapping[str, Any], *, prompt: str) -> Path:
    """Write `README.md`.

    Args:
        run_dir: the run folder; `data_report.json` is read from it where present.
        config: the resolved config.
        result: content of `result.json`.
        prompt: an example for the snippet.

    Returns:
        Path of the card.
    """
    tree = to_tree(config)
    body = [
        _front_matter(config),
        _introduction(config),
        _usage(prompt),
        _results(tree, result),
        _training(config, tree),
    ]
    body += [_data(config, tree, result, run_dir), _limits()]
    path = run_dir / "README.md"
    atomic_write_text(path, "\n\n".join(part.strip() for part in body) + "\n")
    return path


def _front_matter(config: RunConfig) -> str:
    tags = ["reward-model", "preference-alignment", "diffalign", objective_name(config)]
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": tags,
    }
    if is_hub_id(config.model.pretrained):
        head = {"base_model": config.model.pretrained, "base_model_relation": "finetune", **head}
    if datasets := [source for source in config.data.sources if is_hub_id(source)]:
        head["datasets"] = datasets
    text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return f"---\n{text}# license: yours to choose; see the section on limits\n---"


def _introduction(config: RunConfig) -> str:
    name, base = Path(config.output_dir).name or "reward", config.model.pretrained
    shown = (
        f"the embedded tiny CLIP `{base}`"
        if base in TINY_CLIPS
        else f"`{base if is_hub_id(base) else Path(base).name}`"
    )
    how = {"lora": "a LoRA, merged into the towers", "full": "all weights", "head": "the head alone"}[
        config.judge.tuning
    ]
    return (
        f"# {name}\n\nA reward model of pictures: CLIP's towers, from {shown}, trained with **{config.objective.title}** by "
        f"diffalign {__version__} ({how}). It says how much people prefer a picture for a prompt."
    )


def _usage(prompt: str) -> str:
    return (
        "## How to use it\n\nWith diffalign, in this folder:\n\n"
        "```python\nimport torch\nfrom diffalign import rewards\n\n"
        'reward = rewards.load("trained:.")\n'
        "images = torch.rand(2, 3, 64, 64)  # RGB in [0, 1]\n"
        f"print(rewards.score(reward, images, [{quoted(prompt)}] * 2))\n```\n\n"
        'In a config: `rewards: ["trained:PATH"]`, for evaluation, for online training, and, since it is differentiable, '
        f"for back-propagation. `{FOLDER}/statistics.json` has the mean, spread and quantiles of its scores."
    )


def _results(tree: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    if not is_number(result.get("held_out_accuracy")):
        return "## Results\n\n> Nothing was held out: no claim about quality is made."
    rows = [
        ("accuracy", number(result["held_out_accuracy"], 3), span(result.get("held_out_accuracy_ci95"))),
        (
            "accuracy before training",
            number(result.get("held_out_accuracy_before"), 3),
            span(result.get("held_out_accuracy_before_ci95")),
        ),
        (
            "accuracy with ties",
            number(result.get("accuracy_with_ties"), 3),
            span(result.get("accuracy_with_ties_ci95")),
        ),
        ("expected calibration error", number(result.get("calibration_error"), 3), ""),
        ("the same, at the fitted temperature", number(result.get("calibration_error_at_temperature"), 3), ""),
    ]
    rows += [
        (f"accuracy of `{entry['name']}`", number(entry["accuracy"], 3), span(entry["ci95"]))
        for entry in result.get("other_rewards") or ()
    ]
    known = [row for row in rows if row[1] not in ("", "None", "-")]
    notes = [
        f"{result['held_out_pairs']} pairs ({result['held_out_ties']} of them ties) of {result['held_out_prompts']} prompts "
        "that were kept out of training. Ties are left out of the accuracy; one half is chance. Intervals are bootstraps "
        "over prompts. Calibration is of one half of these prompts, with the temperature (and the threshold of ties) fitted "
        "on the other."
    ]
    if section_of(tree, "data").get("world_pairs"):
        notes.append("> Pictures and judges are those of a small drawn world: this shows that training works, no more.")
    return "\n\n".join(["## Results", markdown_table(("on held-out pairs", "value", "95 % interval"), known), *notes])


def _training(config: RunConfig, tree: Mapping[str, Any]) -> str:
    training, judge = config.training, config.judge
    settings = {k: v for k, v in section_of(tree, "objective").items() if v is not None}
    rows = [(f"`{name}`", number(value)) for name, value in settings.items()]
    rows += [
        ("head", judge.head or "cosine, or that of the earlier reward"),
        ("tuning", judge.tuning + (f" (rank {config.lora.rank})" if judge.tuning == "lora" else "")),
        ("learning rate", number(training.learning_rate)),
        ("optimiser steps", str(training.max_train_steps)),
        ("pairs per micro-batch and process", str(training.train_batch_size)),
        ("micro-batches per step", str(training.gradient_accumulation_steps)),
        ("precision", training.mixed_precision),
        ("seed", str(config.seed)),
    ]
    return "## Training\n\n" + markdown_table(("setting", "value"), rows) + "\n\nEverything else is in `config.yaml`."


def _data(config: RunConfig, tree: Mapping[str, Any], result: Mapping[str, Any], run_dir: Path) -> str:
    made = config.data.world_pairs
    origin = (
        f"images sampled from a tiny base and judged by the tiny world's verifier and the taste *{made.taste}*"
        if made
        else ", then ".join(source_names(config.data.sources))
    )
    parts = [f"## Data\n\nFormat `{config.data.format}`; source: {origin}. Ties: {config.data.ties}."]
    parts.append(f"Pairs trained on: {result['pairs']:,}.")
    return "\n\n".join([*parts, *data_table(read_data_report(run_dir, tree))])


def _limits() -> str:
    return (
        "## Licence and limits\n\nNo licence is set: choose one that the licences of the towers and of the data set allow. "
        "A reward model repeats the preferences, and the biases, of the people who chose. What is optimised against it "
        "will find where it errs: measure gains by another reward, and look at the pictures."
    )
