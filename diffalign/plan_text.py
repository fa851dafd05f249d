"""A plan as plain text."""

from __future__ import annotations

from collections.abc import Iterator

from diffalign.plan import (
    ACTIVATION_ALLOWANCE,
    CARDS,
    GIB,
    PUBLISHED_RATE_PER_PAIR,
    UTILISATION,
    Memory,
    Plan,
    Setting,
)

LABEL = 36


def render(plan: Plan) -> str:
    """Aligned lines under headings."""
    sections = {
        "Model": _model(plan),
        "Batch and learning rate": _batch(plan),
        f"Memory on the training device ({plan.precision}, {_size(plan)})": _memory(plan),
        "Work and time (arithmetic, not a measurement)": _work(plan),
        "Disk and downloads": _disk(plan),
    }
    lines = [line for title, body in sections.items() for line in (title, *body, "")]
    return "\n".join([*lines, "Verdict", *_verdict(plan), *(_row("note", note) for note in plan.notes)]) + "\n"


def _size(plan: Plan) -> str:
    return f"{plan.resolution} px" + (f", {plan.frames} frames" if plan.frames > 1 else "")


def _item(plan: Plan) -> str:
    return "clip" if plan.frames > 1 else "image"


def _one(plan: Plan) -> str:
    return {"pairs": "pair", "images": "image"}.get(plan.unit, "pair of steps")


def _row(label: str, value: str) -> str:
    return f"  {label:<{LABEL}}{value}"


def _gib(size: int) -> str:
    return f"{size / GIB:9.2f} GiB"


def _gb(size: int | None) -> str:
    if size is None:
        return "size unknown"
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"


def _number(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _model(plan: Plan) -> Iterator[str]:
    yield _row("architecture", plan.model)
    if plan.assumed:
        yield _row("", plan.assumed)
    for name, count in plan.parameters.items():
        yield _row(f"{name} parameters", f"{count:>15,}")
    targets = plan.lora_targets if isinstance(plan.lora_targets, str) else ", ".join(plan.lora_targets)
    adapter = f"gates over {plan.lora_experts} experts" if plan.lora_experts else f"LoRA r{plan.lora_rank} on {targets}"
    if plan.users:
        adapter = f"{adapter}, weighed by users" if plan.lora_rank else f"attentions to users ({plan.users})"
    if plan.preference and plan.through is not None:
        acts = {"gates": "weighed", "time": "and a vector on the time,", "attention": "attentions, told"}[plan.through]
        adapter = f"{adapter if plan.lora_rank else ''} {acts} by {len(plan.preference)} rewards".strip()
    adapter = plan.sparse or adapter
    if plan.lora_rank or plan.lora_experts or plan.users or plan.preference or plan.sparse:
        yield _row(adapter, f"{plan.network.lora_parameters:>15,}  parameters, trained")
        yield _row("", f"{plan.network.lora_modules:>15,}  modules")
    if plan.text_encoders is not None:
        name = f"LoRA r{plan.lora_text_rank} on text encoders"
        yield _row(name, f"{plan.text_encoders.lora_parameters:>15,}  parameters, trained")
        yield _row("", f"{plan.text_encoders.lora_modules:>15,}  modules")
    yield _row("latent", " x ".join(map(str, plan.latent_shape)))


def _batch(plan: Plan) -> Iterator[str]:
    setting = plan.setting
    parts = f"{setting.train_batch_size} x {setting.gradient_accumulation_steps} x {plan.num_processes}"
    yield _row(
        f"effective batch ({plan.unit})",
        f"{plan.effective_batch:,}  = micro-batch x accumulation x processes = {parts}",
    )
    if plan.sampling is None or plan.sampling.available is None:
        yield _row("usable pairs", _number(plan.pairs))
    else:
        yield _row("prompts", _number(plan.sampling.available))
    yield _row("optimiser steps per epoch", _number(plan.steps_per_epoch))
    epochs = "unknown number of epochs" if plan.epochs is None else f"{plan.epochs:.2f} epochs"
    yield _row("optimiser steps", f"{plan.max_train_steps:,}  ({epochs})")
    yield _row("learning rate in use", f"{plan.learning_rate:.4g}")
    ratio = plan.rate_per_pair / PUBLISHED_RATE_PER_PAIR
    yield _row(
        f"  per {_one(plan)} of the batch",
        f"{plan.rate_per_pair:.3g}  = {ratio:.3g} x the published {PUBLISHED_RATE_PER_PAIR:.0e} (full fine-tuning)",
    )
    yield _row("objective", plan.method)
    for name, value in plan.objective.items():
        yield _row(f"  {name}", f"{value:.6g}" if isinstance(value, float) else str(value))


def _memory(plan: Plan) -> Iterator[str]:
    yield from _parts(plan.setting, plan.unit)
    if plan.cache_phase_bytes is not None:
        yield _row("before that: filling the cache", f"{_gib(plan.cache_phase_bytes)}  VAE and text encoders at work")
    if plan.sampling_phase_bytes is not None:
        yield _row("while samples are decoded", f"{_gib(plan.sampling_phase_bytes)}  without the reward models")
    network = plan.network
    yield _row(f"activations kept per {_item(plan)}", f"{_gib(network.saved_bytes)}  without checkpointing")
    yield _row(
        "", f"{_gib(network.checkpoint_bytes)}  with it, and {network.transient_bytes / GIB:.2f} while recomputing"
    )


def _parts(setting: Setting, unit: str) -> Iterator[str]:
    memory: Memory = setting.memory
    yield _row("network weights, frozen", _gib(memory.network))
    yield _row("adapter, gradients, optimiser states", _gib(memory.adapter))
    if memory.ema:
        yield _row("EMA", _gib(memory.ema))
    if memory.encoders:
        yield _row("VAE and text encoders (no cache)", _gib(memory.encoders))
    how = "on" if setting.gradient_checkpointing else "off"
    yield _row("activations", f"{_gib(memory.activations)}  {setting.train_batch_size} {unit}, checkpointing {how}")
    if memory.recomputed:
        yield _row("block being recomputed", _gib(memory.recomputed))
    yield _row(
        "allowance, casts and fragmentation", f"{_gib(memory.allowance)}  {ACTIVATION_ALLOWANCE:.0%} of activations"
    )
    yield _row("CUDA context and workspaces", _gib(memory.context))
    yield _row("sum", _gib(memory.total))


def _work(plan: Plan) -> Iterator[str]:
    network = plan.network
    yield _row(f"network forward, per {_item(plan)}", f"{network.forward_flops / 1e12:9.3f} TFLOP  (multiply-add = 2)")
    yield _row(
        "  with LoRA, forward + backward",
        f"{(network.policy_forward_flops + network.backward_flops) / 1e12:9.3f} TFLOP",
    )
    yield _row(f"training, per {_one(plan)}", f"{plan.flops_per_pair / 1e12:9.3f} TFLOP")
    yield from _sampling(plan)
    if not plan.step_seconds:
        yield _row("time", "not estimated in float32")
    for card, seconds in plan.step_seconds.items():
        hours = plan.run_hours[card]
        encode = f", cache {plan.encode_hours[card]:,.1f} h once" if card in plan.encode_hours else ""
        yield _row(
            f"{plan.num_processes} x {card}",
            f"{seconds:9.1f} s per optimiser step, {hours:,.1f} h for all steps{encode}",
        )
    if plan.step_seconds:
        rates = ", ".join(f"{card} {rate}" for card, rate in CARDS.items())
        yield _row("assumed", f"{UTILISATION:.0%} of the data-sheet bf16 rates in TFLOP/s: {rates}")


def _sampling(plan: Plan) -> Iterator[str]:
    sampling = plan.sampling
    if sampling is None:
        return
    guided = " x 2 (guidance)" if sampling.branches == 2 else ""
    yield _row("sampling, per optimiser step", f"{sampling.flops / 1e12:9.3f} TFLOP")
    yield _row(
        "",
        f"{sampling.forwards:,.1f} forwards: {sampling.prompts:,.1f} prompts, {sampling.steps} sampler steps{guided}, "
        f"{sampling.images:,.1f} images",
    )


def _disk(plan: Plan) -> Iterator[str]:
    if plan.sampling is None or plan.sampling.available is None:
        yield _row(
            "cache, per pair",
            f"{_gb(plan.latent_bytes_per_pair)} latents; {_gb(plan.text_bytes_per_prompt)} per prompt",
        )
    if plan.cache_bytes is not None:
        yield _row("cache, in all", f"at most {_gb(plan.cache_bytes)} (images shared by pairs are stored once)")
    for item in plan.downloads:
        state = "here already" if item.here else f"to download, about {_gb(item.bytes)}"
        yield _row(f"{item.what}", f"{item.source}: {state}")
    missing = [item.bytes for item in plan.downloads if not item.here]
    known = sum(size for size in missing if size is not None)
    more = " and more of unknown size" if None in missing else ""
    yield _row("downloads in all", f"{_gb(known)}{more}")


def _verdict(plan: Plan) -> Iterator[str]:
    total = plan.setting.memory.total
    if plan.gpu_bytes is None:
        most = max(total, plan.cache_phase_bytes or 0, plan.sampling_phase_bytes or 0)
        yield _row("needs about", f"{most / GIB:.1f} GiB; name a card (GB) to see whether it fits")
        return
    card = f"{plan.gpu_bytes / GIB:.0f} GiB"
    if plan.fits:
        yield _row("fits", f"{total / GIB:.1f} of {card}")
        return
    if total <= plan.gpu_bytes:
        other = "filling the cache" if (plan.cache_phase_bytes or 0) > plan.gpu_bytes else "decoding samples"
        yield _row("training fits", f"{total / GIB:.1f} of {card}, but {other} does not")
        return
    yield _row("does not fit", f"{total / GIB:.1f} of {card}")
    if plan.nearest is None:
        yield _row("nearest that fits", "none: one pair with checkpointing is too much; lower data.resolution")
        return
    near = plan.nearest
    checkpointing = str(near.gradient_checkpointing).lower()
    yield _row(
        "nearest that fits",
        f"training.train_batch_size={near.train_batch_size} "
        f"training.gradient_accumulation_steps={near.gradient_accumulation_steps} "
        f"training.gradient_checkpointing={checkpointing}: {near.memory.total / GIB:.1f} GiB",
    )
