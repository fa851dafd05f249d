"""What training a reward model will cost, before anything is downloaded: counts of the two towers, and arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from diffalign import adapters, preflight
from diffalign.config import RunConfig
from diffalign.families.clip_reward import clip_config
from diffalign.judges import HEAD, JudgeCLIP, JudgeSettings

GIB = 2**30
# As in `diffalign.plan`: a share of the makers' dense 16-bit rates, TFLOP/s.
UTILISATION = 0.40
CARDS = {"H100/H200": 989, "A100": 312, "RTX 4090": 165}
PIXEL_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class RewardPlan:
    """Every number of a plan. Bytes are bytes, FLOPs count a multiply-add as 2, None means unknown.

    Attributes:
        model: what is tuned.
        parameters: of the vision tower, the text tower, and the rest.
        trained: parameters that are trained.
        image_size: side of the square that the vision tower looks at.
        weights_bytes: of the network as it is held, gradients and optimiser states included.
        activation_bytes: kept for the backward pass of a micro-batch, by the formula s b h (34 + 5 a s / h) per layer
            (arXiv 2205.05198), of both towers; a checkpointed layer keeps its input.
        gpu_bytes: of the card that was asked about.
        fits: whether both fit it.
        flops_per_pair: of a training step.
        run_hours: all optimiser steps on one device, by card; empty in float32.
        effective_batch: pairs per optimiser step, over all processes.
        pairs: usable ones; None if unknown.
        epochs: passes over them.
        cache_bytes_per_image: pixels at the tower's size.
    """

    model: str
    method: str
    head: str
    tuning: str
    parameters: dict[str, int]
    trained: int
    image_size: int
    precision: str
    weights_bytes: int
    activation_bytes: int
    gpu_bytes: int | None
    fits: bool | None
    flops_per_pair: int
    run_hours: dict[str, float]
    effective_batch: int
    max_train_steps: int
    learning_rate: float
    pairs: int | None
    epochs: float | None
    cache_bytes_per_image: int


def plan_reward(
    config: RunConfig, *, gpu_gb: float | None = None, num_processes: int = 1, pairs: int | None = None
) -> RewardPlan:
    """Count what a reward training run costs; nothing is downloaded, and no weights are made.

    Args:
        config: the run.
        gpu_gb: memory of the card, GiB.
        num_processes: devices that train together.
        pairs: number of usable pairs, where you know it; None takes `data.max_pairs`.

    Raises:
        UserError: what `diffalign train` would refuse.
    """
    preflight.check(config)
    training, judge = config.training, config.judge
    towers = clip_config(config.model)
    settings = JudgeSettings(
        head=judge.head or "cosine", outputs=judge.outputs, criteria=judge.criteria, gate_width=judge.gate_width
    )
    with torch.device("meta"):
        network = JudgeCLIP(towers, settings)
    counted = {
        "vision": _count(network.vision_model) + _count(network.visual_projection),
        "text": _count(network.text_model) + _count(network.text_projection),
        "head": 0 if network.judge_head is None else _count(network.judge_head),
    }
    total = sum(p.numel() for p in network.parameters())
    whole = sum(p.numel() for name, p in network.named_parameters() if name.startswith(f"{HEAD}."))
    trained = whole
    if judge.tuning == "full":
        trained = total
    elif judge.tuning == "lora":
        trained += sum(p.numel() for p in adapters.attach(network, config.lora))
    frozen = 0 if judge.tuning == "full" else total
    size = 4 if training.mixed_precision == "no" else 2
    assert training.train_batch_size != "auto", "refused before"
    batch = training.train_batch_size
    vision, text = towers.vision_config, towers.text_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    sides = ((vision, tokens, 2 * batch), (text, text.max_position_embeddings, batch))
    activations = sum(_activations(tower, s, b, size, bool(training.gradient_checkpointing)) for tower, s, b in sides)
    forward = 2 * _flops(vision, tokens) + _flops(text, text.max_position_embeddings)
    passes = 3.0 if judge.tuning == "full" else 2.1 if judge.tuning == "lora" else 1.0
    passes += 1.0 if training.gradient_checkpointing else 0.0
    flops = int(forward * passes)
    effective = batch * training.gradient_accumulation_steps * num_processes
    known = pairs if pairs is not None else config.data.max_pairs
    world = config.data.world_pairs
    known = world.prompts if known is None and world is not None else known
    weights = frozen * size + trained * 16  # float32 weights and gradients, and Adam's two moments
    gpu = None if gpu_gb is None else int(gpu_gb * GIB)
    seconds = {card: flops * effective / num_processes / (UTILISATION * rate * 1e12) for card, rate in CARDS.items()}
    return RewardPlan(
        model=config.model.pretrained,
        method=config.objective.title,
        head=settings.head,
        tuning=judge.tuning,
        parameters=counted,
        trained=trained,
        image_size=int(vision.image_size),
        precision=training.mixed_precision,
        weights_bytes=weights,
        activation_bytes=activations,
        gpu_bytes=gpu,
        fits=None if gpu is None else weights + activations + GIB <= gpu,
        flops_per_pair=flops,
        run_hours={} if size == 4 else {card: s * training.max_train_steps / 3600 for card, s in seconds.items()},
        effective_batch=effective,
        max_train_steps=training.max_train_steps,
        learning_rate=training.learning_rate,
        pairs=known,
        epochs=None if known is None else training.max_train_steps * effective / known,
        cache_bytes_per_image=3 * int(vision.image_size) ** 2 * PIXEL_BYTES[config.cache.dtype],
    )


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _activations(tower: Any, tokens: int, batch: int, size: int, checkpointing: bool) -> int:
    per_layer = tokens * batch * tower.hidden_size
    layer = per_layer * (34 + 5 * tower.num_attention_heads * tokens / tower.hidden_size) * size / 2
    if checkpointing:
        return int(tower.num_hidden_layers * per_layer * size + layer)
    return int(tower.num_hidden_layers * layer)


def _flops(tower: Any, tokens: int) -> int:
    """Of one forward pass over one sequence: linear layers and attention products."""
    width = tower.hidden_size
    linear = 2 * tokens * (4 * width**2 + 2 * width * tower.intermediate_size)
    return int(tower.num_hidden_layers * (linear + 4 * tokens**2 * width))


def render(plan: RewardPlan) -> str:
    """A plan as people read it."""
    million = {name: f"{count / 1e6:,.1f} M" for name, count in plan.parameters.items() if count}
    lines = [
        f"{plan.method} on {plan.model} (head: {plan.head}, tuning: {plan.tuning})",
        f"  parameters       {', '.join(f'{name} {count}' for name, count in million.items())}; "
        f"trained {plan.trained / 1e6:,.1f} M",
        f"  pictures         {plan.image_size} px; {plan.cache_bytes_per_image / 1e3:,.0f} kB each in the cache",
        f"  batch            {plan.effective_batch:,} pairs per step, {plan.max_train_steps:,} steps, learning rate in use "
        f"{plan.learning_rate:g}",
        f"  memory           {plan.weights_bytes / GIB:.1f} GiB weights, gradients and optimiser; about "
        f"{plan.activation_bytes / GIB:.1f} GiB activations",
        f"  work             {plan.flops_per_pair / 1e12:.2f} TFLOP per pair",
    ]
    if plan.gpu_bytes is not None:
        lines.append(f"  card             {plan.gpu_bytes / GIB:.0f} GiB: {'fits' if plan.fits else 'does not fit'}")
    if plan.run_hours:
        told = ", ".join(f"{card} {hours:.1f} h" for card, hours in plan.run_hours.items())
        lines.append(f"  time             {told} (arithmetic at {UTILISATION:.0%} of the data-sheet rate)")
    if plan.pairs is not None and plan.epochs is not None:
        lines.append(f"  data             {plan.pairs:,} pairs, {plan.epochs:.2f} passes")
    return "\n".join(lines)
