"""Everything that can be found wrong before any weights load."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign import plugins
from diffalign._preflight_images import check_errors, check_groups, check_round, check_schedule, check_unread
from diffalign._preflight_negative import check_fused, check_negative
from diffalign._preflight_rewards import READ_BY_REWARDS, UNREAD_BY_REWARDS, check_reward_run
from diffalign._preflight_sparse import check_sparse_run
from diffalign._preflight_users import check_preference, check_users
from diffalign.config import GenerationConfig, RolloutConfig, RunConfig
from diffalign.errors import ConfigError, DataError, did_you_mean
from diffalign.files import require_writable

if TYPE_CHECKING:
    from diffalign.families import DenoisingFamily, Family
    from diffalign.losses import Objective

__all__ = ["check", "check_objective", "check_sampling", "check_schedule", "check_text", "online"]
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
)


def check(config: RunConfig) -> None:
    """Refuse what cannot run.

    Raises:
        UserError: the first problem found.
    """
    from diffalign.adapters import check_lora

    family: type[Family] = plugins.find("families", config.model.family)
    _refuse_unused(config, family.modality)
    family.preflight(config.model)
    check_objective(config, family)
    plugins.find("readers", config.data.format)
    check_sparse_run(config)
    others = config.users.encoder is not None or config.preference.seen or config.sparse.method is not None
    check_lora(config.lora, others=others)
    if config.lora.experts:
        _check_experts(config, family)
    _check_training(config)
    if config.training.attention not in family.attention_backends:
        raise ConfigError(
            f"training.attention {config.training.attention!r}: family {config.model.family!r} takes "
            f"{' or '.join(map(repr, family.attention_backends))} (PyTorch's own attention picks flash where it can)"
        )
    _check_data(config)
    if family.modality == "image":
        _check_images(config, family)  # type: ignore[arg-type]
    elif family.modality == "reward":
        _check_counts(config)
        check_reward_run(config, _facts(config))
    else:
        check_text(config)
        _check_supply(config)
        _check_evaluation(config)
    require_writable(Path(config.output_dir), needed_bytes=64 << 20)


def check_objective(config: RunConfig, family: type[Family]) -> None:
    """Refuse an objective that means nothing on the family's scores, or that the configured data cannot feed.

    Raises:
        ConfigError: with the reason and the nearest alternative.
    """
    from diffalign.losses import IncompatibleObjective
    from diffalign.sampling.rules import kind_of

    objective: Objective = config.objective
    try:
        objective.check(kind_of(objective) if family.modality == "image" else family.kind)
    except IncompatibleObjective as error:
        raise ConfigError(f"{error} (family {config.model.family!r})") from error
    if config.reference.scheme != "frozen" and not objective.reads_reference():
        raise ConfigError(
            f"reference.scheme {config.reference.scheme!r}: objective {objective.name!r} has no reference; "
            "leave the section out"
        )
    if family.modality == "reward":
        return
    if config.reference.guidance_scale != 1:
        _check_guided_reference(config, family)
    if family.modality == "text":
        if objective.source != "data":
            raise ConfigError(
                f"objective {objective.name!r} trains on sampled images ({objective.source}); family "
                f"{config.model.family!r} works on texts"
            )
        return
    groups = {"groups"} if config.rollout.rewards else set()
    if wanted := set(objective.needs.layout) - {"pairs", "items"} - groups:
        raise ConfigError(
            f"objective {objective.name!r} needs {', '.join(sorted(wanted))}; image data sets have pairs"
            + ("; sample groups: set rollout.rewards and rollout.prompts" if "groups" in wanted else "")
            + ". See `diffalign list objectives`"
        )
    if objective.rows_from == "data" and "groups" not in objective.needs.layout:
        _rehearse(objective, _facts(config))
    check_errors(config)
    _check_image_rollout(config)
    family.check_guidance(config.model, config.rollout.guidance_scale)  # type: ignore[attr-defined]


def _check_guided_reference(config: RunConfig, family: type[Family]) -> None:
    """Refuse a guided reference where there is no branch without the prompt, or where policy and reference are compared."""
    scale, objective = config.reference.guidance_scale, config.objective
    if family.modality == "text" or "groups" not in objective.needs.layout or objective.rows_from != "data":
        raise ConfigError(
            f"reference.guidance_scale: got {scale}; only objectives on groups of sampled images that are noised again pull "
            f"to a guided reference, such as 'crd' or 'diffusion_nft', and {objective.name!r} is none; remove it"
        )
    family.check_guidance(config.model, scale, "reference.guidance_scale")  # type: ignore[attr-defined]


def _check_image_rollout(config: RunConfig) -> None:
    """Refuse rollout settings that an image run cannot use.

    Raises:
        ConfigError: the first problem found.
    """
    from diffalign import rewards
    from diffalign.sampling.rules import samples_images

    rollout, objective = config.rollout, config.objective
    if not samples_images(config):
        if config.denoising.timestep_sampling == "sampler":
            raise ConfigError(
                "denoising.timestep_sampling: got 'sampler'; the data's images have no sampler whose levels could be taken; "
                "take 'uniform' or 'logit_normal', or set rollout.rewards"
            )
        if rollout != RolloutConfig():
            raise ConfigError(
                f"rollout: objective {objective.name!r} trains on the data's pairs; set rollout.rewards to train it on "
                "sampled images, or remove the section"
            )
        return
    if rollout.reward_weights and len(rollout.reward_weights) != len(rollout.rewards):
        raise ConfigError(
            f"rollout.reward_weights: got {len(rollout.reward_weights)} for {len(rollout.rewards)} rewards; give one each"
        )
    _check_reward_weights(config)
    from_data, own = objective.from_data, objective.rows_from == "truncated"
    if from_data and rollout.prompts:
        raise ConfigError(
            f"rollout.prompts: objective {objective.name!r} samples for the prompts of its data; remove it"
        )
    if (from_data or own) and rollout.rewards:
        why = "learns from its own predictions" if own else "compares the data's images with sampled ones"
        raise ConfigError(f"rollout.rewards: objective {objective.name!r} {why}, and reads no reward; remove it")
    if not (from_data or own) and not rollout.rewards:
        raise ConfigError(
            f"rollout.rewards: empty; objective {objective.name!r} needs at least one reward to tell samples apart"
        )
    if objective.rows_from == "differentiable":
        for name in rollout.rewards:
            if not rewards.describe(name).differentiable:
                raise ConfigError(
                    f"rollout.rewards: {name!r} is not differentiable, and objective {objective.name!r} follows its "
                    "gradient; take one that is (docs/how-to/rewards.md), or an objective such as 'diffusion_nft', which "
                    "needs no gradient"
                )
    elif not (from_data or own) and rollout.samples_per_prompt < (2 if rollout.history is None else 1):
        raise ConfigError(f"rollout.samples_per_prompt: got {rollout.samples_per_prompt}; a group has at least 2")
    if objective.trains_steps and rollout.eta == 0:
        raise ConfigError("rollout.eta: got 0; a deterministic sampler's transitions have no density; take 1")
    if config.reference.scheme in ("mixture", "momentum") and objective.rows_from != "data":
        raise ConfigError(
            f"reference.scheme {config.reference.scheme!r}: nobody can sample from a mixture of scores; objective "
            f"{objective.name!r} takes 'frozen', 'sync' or 'pool'"
        )
    for name in rollout.rewards:
        rewards.check_images(name)
    check_unread(config)
    check_groups(config)
    check_round(config)


def _rehearse(objective: Objective, facts: Collection[str] = ()) -> None:
    """Compute the objective on two made-up image pairs, as training will: whatever they do not supply is said now.

    Args:
        objective: to be tried.
        facts: what the pairs have beyond a label (`diffalign.data.facts`).

    Raises:
        ConfigError: what the objective reads and image pairs do not have.
    """
    from diffalign.data.facts import READ_BY_OBJECTIVES, why_not

    if not (error := why_not(objective, facts)):
        return
    advice = "it can be used as a library (docs/explanation/preference-core.md)"
    if not why_not(objective, READ_BY_OBJECTIVES):
        advice = "see docs/how-to/data.md for data that have it"
    raise ConfigError(f"objective {objective.name!r} cannot be computed on image pairs: {error}; {advice}")


def _facts(config: RunConfig) -> frozenset[str]:
    """What the rows of the configured data, or the images that are sampled, may have beyond a label."""
    from diffalign.data.facts import ASPECT, MAPS, REWARDS
    from diffalign.data.readers import Reader

    if config.rollout.rewards:
        return frozenset({REWARDS})
    world = config.data.world_pairs
    if world is not None:
        asked = {REWARDS: True, ASPECT: world.aspects, MAPS: world.maps}
        return frozenset(fact for fact, there in asked.items() if there)
    reader: type[Reader] = plugins.find("readers", config.data.format)
    return reader.facts


_ROLLOUT_OF_TEXTS = (
    "samples_per_prompt",
    "steps_per_generation",
    "num_iterations",
    "rewards",
    "reward_weights",
    "offload_rewards",
)
# Keys that only one modality reads: set for the other, they would silently do nothing.
_ONLY: dict[str, tuple[str, ...]] = {
    "image": (
        "denoising",
        "negative",
        "users",
        "preference",
        "sparse",
        "model.adapters",
        "cache",
        "sampling",
        "model.vae",
        "model.prediction_type",
        "model.config",
        "data.resolution",
        "data.buckets",
        "data.crop",
        "data.flip",
        "data.num_frames",
        "data.frame_stride",
        "data.world_pairs",
        "data.label_from",
        "data.label",
        "data.label_temperature",
        "training.channels_last",
        "lora.text_encoder_rank",
        "lora.text_encoder_alpha",
        "lora.text_encoder_targets",
        "training.text_encoder_learning_rate",
        "lora.experts",
        "lora.gate",
        "lora.gate_features",
        "evaluation.every",
        "evaluation.watch_prompts",
        *(
            f"rollout.{field.name}"
            for field in dataclasses.fields(RolloutConfig)
            if field.name not in _ROLLOUT_OF_TEXTS
        ),
    ),
    "text": (
        "text",
        "generation",
        "model.load_in_4bit",
        "data.retain_sources",
        "data.retain_split",
        "data.rename",
        "data.world_text",
    ),
    "reward": ("judge",),
}


def _refuse_unused(config: RunConfig, modality: str) -> None:
    unread = dict(_ONLY)
    if modality == "reward":
        unread = {m: tuple(key for key in keys if key not in READ_BY_REWARDS) for m, keys in _ONLY.items()}
        unread["any"] = UNREAD_BY_REWARDS
    for other, keys in unread.items():
        if other == modality:
            continue
        for key in keys:
            section, _, name = key.partition(".")
            node = getattr(config, section)
            default = type(node)() if not name else _default(type(node), name)
            value = getattr(node, name) if name else node
            if value != default:
                raise ConfigError(
                    f"{key}: has no effect on family {config.model.family!r}, which {_DOES[modality]}; remove it"
                )


_DOES = {"image": "works on images", "text": "works on texts", "reward": "trains reward models"}


def _default(cls: type, name: str) -> Any:
    return next(f.default for f in dataclasses.fields(cls) if f.name == name)


def _check_reward_weights(config: RunConfig) -> None:
    """Refuse weights of rewards that would be normalised away, or multiplied with others."""
    objective = config.objective
    if not config.rollout.reward_weights or not hasattr(objective, "reward_weights"):
        return
    if objective.reward_weights is not None:
        raise ConfigError(
            f"rollout.reward_weights: got {list(config.rollout.reward_weights)} beside objective.reward_weights "
            f"{list(objective.reward_weights)}; give one of them"
        )
    # Those without `aggregate` normalise every reward by itself.
    if getattr(objective, "aggregate", "normalize_then_sum") == "normalize_then_sum" and objective.name != "prdp":
        raise ConfigError(
            f"rollout.reward_weights: objective {objective.name!r} normalises every reward by itself, which takes weights "
            "out again; give objective.reward_weights instead"
        )


def _check_experts(config: RunConfig, family: type[Family]) -> None:
    """Refuse experts that cannot be fused on this model: by their headers, then on its network without weights."""
    from diffalign import adapters, gates
    from diffalign.families import published
    from diffalign.families._loading import locate, network_config
    from diffalign.families._pipeline import PipelineFamily

    if config.training.compile:
        raise ConfigError("training.compile: gates change between passes, which compiled blocks do not see; remove it")
    for source in config.lora.experts:
        gates.check_expert(source, config.model.family)
    if not issubclass(family, PipelineFamily):
        return
    shape = network_config(config.model, locate(config.model), family.network_part)
    if shape is not None and shape.get("_class_name") in published.DIFFUSERS_CLASSES:
        adapters.attach(published.build_from_config(dict(shape), device="meta"), config.lora)


def _check_images(config: RunConfig, family: type[DenoisingFamily]) -> None:
    from diffalign.data.prompts import load_prompts

    data = config.data
    if data.resolution < family.resolution_step:
        raise ConfigError(f"data.resolution: got {data.resolution}; expected at least {family.resolution_step} pixels")
    if data.buckets and not config.cache.enabled:
        raise ConfigError("data.buckets needs the cache, which knows every image's size; set cache.enabled: true")
    if data.frame_stride is not None and (data.frame_stride < 1 or data.num_frames == 1):
        raise ConfigError(
            f"data.frame_stride: got {data.frame_stride}; expected at least 1, with data.num_frames above 1, or null"
        )
    if data.world_pairs is not None and data.format != "pickapic":
        raise DataError(f"data.world_pairs writes the 'pickapic' format; data.format is {data.format!r}")
    _check_labels(config)
    check_text_encoders(config, family)
    check_negative(config, family)
    check_users(config, family)
    check_preference(config, family)
    check_fused(config)
    check_sampling(config)
    if config.evaluation.at_end:
        if not config.evaluation.prompts:
            raise ConfigError("evaluation.prompts: missing, and evaluation.at_end is true; name a file or a list")
        if not config.evaluation.rewards:
            raise ConfigError("evaluation.rewards: empty, and evaluation.at_end is true; name at least one reward")
    if config.evaluation.every and not (config.evaluation.prompts and config.evaluation.rewards):
        raise ConfigError(
            f"evaluation.every: got {config.evaluation.every}, and there are no prompts or no rewards to look at; set "
            "evaluation.prompts and evaluation.rewards"
        )
    if config.evaluation.prompts:
        load_prompts(config.evaluation.prompts, config.evaluation.num_prompts)


def check_text_encoders(config: RunConfig, family: type[DenoisingFamily]) -> None:
    """Refuse adapters on text encoders that the family has not got, and a learning rate that nothing would read.

    Raises:
        ConfigError: the first problem found.
    """
    lora, rate = config.lora, config.training.text_encoder_learning_rate
    if lora.text_encoder_rank and not family.text_encoders:
        raise ConfigError(
            f"lora.text_encoder_rank: got {lora.text_encoder_rank}; text encoders that can be trained are CLIP's, of "
            f"families sd, sdxl and sd3, and model.family is {config.model.family!r}; remove it"
        )
    if rate is None:
        return
    if not (lora.rank and lora.text_encoder_rank):
        raise ConfigError(
            f"training.text_encoder_learning_rate: got {rate}; it has no effect unless network and text encoders are both "
            "trained (lora.rank and lora.text_encoder_rank above 0); set training.learning_rate"
        )
    if rate < 0:
        raise ConfigError(f"training.text_encoder_learning_rate: got {rate}; expected a number >= 0")


def _check_labels(config: RunConfig) -> None:
    """Refuse labels of rewards that the data cannot have, or that nobody would read."""
    from diffalign.data.facts import REWARDS
    from diffalign.sampling.rules import samples_images

    data = config.data
    if data.label_temperature <= 0:
        raise ConfigError(f"data.label_temperature: got {data.label_temperature}; expected a positive number")
    if data.label_temperature != 1 and data.label == "given":
        raise ConfigError("data.label_temperature: has no effect on given labels; set data.label to soft or sampled")
    world = data.world_pairs
    if world is not None and world.maps and world.chosen != "drawn":
        raise ConfigError(
            "data.world_pairs.maps compares samples with drawings; it needs data.world_pairs.chosen: drawn"
        )
    if data.label != "given" and samples_images(config):
        raise ConfigError(f"data.label: got {data.label!r}; it has no effect where images are sampled; set it to given")
    for key, value, default in (("label_from", data.label_from, "label"), ("label", data.label, "given")):
        if value != default and REWARDS not in _facts(config):
            raise ConfigError(
                f"data.{key}: got {value!r}, and rows of format {data.format!r} have no rewards; expected {default!r}, or a "
                "format that has them ('jsonl', 'pickapic')"
            )


def check_text(config: RunConfig) -> None:
    """Lengths, generation and rollout settings, and reward names of a text run.

    Raises:
        ConfigError: the first problem found.
    """
    from diffalign.text.generation import check_generation

    text, generation, rollout = config.text, config.generation, config.rollout
    if config.data.format != "text":
        raise ConfigError(f"data.format: got {config.data.format!r}; family {config.model.family!r} reads 'text'")
    if "auto" in (config.training.train_batch_size, config.training.gradient_checkpointing):
        raise ConfigError(
            "training: 'auto' batch size and checkpointing are measured for image models only; give train_batch_size a "
            "number and gradient_checkpointing true or false"
        )
    if text.max_length < 2 or text.logits_chunk < 1:
        raise ConfigError(
            f"text: got max_length {text.max_length} and logits_chunk {text.logits_chunk}; expected at least 2 and 1"
        )
    if text.max_prompt_length is not None and not 1 <= text.max_prompt_length < text.max_length:
        raise ConfigError(
            f"text.max_prompt_length: got {text.max_prompt_length}; expected 1 to {text.max_length - 1} (max_length - 1)"
        )
    check_generation(generation)
    _check_rollout(config, rollout, generation)
    if config.evaluation.at_end and config.evaluation.prompts and not config.evaluation.rewards:
        raise ConfigError("evaluation.rewards: empty, and evaluation.prompts are set; name at least one text reward")
    from diffalign import rewards

    for name in (*config.evaluation.rewards, *rollout.rewards):
        rewards.check_text(name)


def _check_evaluation(config: RunConfig) -> None:
    """Refuse an evaluation that was asked for and would not take place."""
    if config.evaluation.at_end and config.evaluation.rewards and not config.evaluation.prompts:
        raise ConfigError(
            "evaluation.prompts: missing, and evaluation.rewards are set; name a file, a list, or 'held_out' with "
            "evaluation.held_out_fraction"
        )
    if config.evaluation.at_end and config.evaluation.prompts == "held_out" and not config.evaluation.held_out_fraction:
        raise ConfigError(
            "evaluation.prompts: 'held_out', and evaluation.held_out_fraction is 0, so no prompt is held out; set it to a "
            "share such as 0.1"
        )


def _check_supply(config: RunConfig) -> None:
    """Refuse objectives that read what neither text data nor sampled answers have."""
    objective: Objective = config.objective
    needs, name = objective.needs, objective.name
    if missing := sorted(set(needs.layout) - {"pairs", "items", "groups", "lists"}):
        raise ConfigError(
            f"objective {name!r} needs {' and '.join(missing)}, which text data do not have here; it can be used as a "
            "library (docs/explanation/preference-core.md)"
        )
    from diffalign.losses.unlearning import Retaining

    if {"pairs", "items"} <= set(needs.layout) and not isinstance(objective, Retaining):
        raise ConfigError(
            f"objective {name!r} reads one further item beside every pair, which text data do not have here; it can be used "
            "as a library (docs/explanation/preference-core.md)"
        )
    if not online(config):
        if needs.old:
            raise ConfigError(
                f"objective {name!r} needs the log-probabilities under the model that wrote the responses, which data do "
                "not have; train it online: set rollout.rewards"
            )
        return
    if needs.extra:
        raise ConfigError(
            f"objective {name!r} reads {', '.join(map(repr, needs.extra))} of every answer, which sampled answers do not "
            "have here; it can be used as a library (docs/explanation/preference-core.md)"
        )
    if {"pairs", "items"} <= set(needs.layout):
        raise ConfigError(
            f"objective {name!r} reads pairs and items together, and sampled answers become one of them; remove "
            "rollout.rewards and train on data"
        )


def _check_rollout(config: RunConfig, rollout: RolloutConfig, generation: GenerationConfig) -> None:
    if not online(config):
        if rollout != RolloutConfig():
            raise ConfigError(f"rollout: objective {config.objective.name!r} samples nothing; remove the section")
        return
    if not rollout.rewards:
        raise ConfigError("rollout.rewards: empty; online training needs at least one reward")
    if rollout.reward_weights and len(rollout.reward_weights) != len(rollout.rewards):
        raise ConfigError(
            f"rollout.reward_weights: got {len(rollout.reward_weights)} for {len(rollout.rewards)} rewards; give one each"
        )
    if rollout.samples_per_prompt < 2:
        raise ConfigError(f"rollout.samples_per_prompt: got {rollout.samples_per_prompt}; a group has at least 2")
    if generation.top_p != 1 or generation.top_k != 0 or generation.temperature != 1:
        raise ConfigError(
            "generation: online training needs temperature 1, top_p 1 and top_k 0; otherwise the log-probability that is "
            "trained is not the one that was sampled from"
        )


def online(config: RunConfig) -> bool:
    """Whether a run samples what it trains on: objectives on groups, or any objective with `rollout.rewards` set."""
    return "groups" in config.objective.needs.layout or bool(config.rollout.rewards)


def _check_training(config: RunConfig) -> None:
    training = config.training
    for name in ("max_train_steps", "gradient_accumulation_steps", "logging_steps"):
        if getattr(training, name) < 1:
            raise ConfigError(f"training.{name}: got {getattr(training, name)}; expected at least 1")
    if training.train_batch_size != "auto" and training.train_batch_size < 1:
        raise ConfigError(f"training.train_batch_size: got {training.train_batch_size}; expected at least 1, or 'auto'")
    if training.learning_rate < 0:
        raise ConfigError(f"training.learning_rate: got {training.learning_rate}; expected a number >= 0")
    if training.lr_scheduler not in SCHEDULES:
        raise ConfigError(
            f"training.lr_scheduler {training.lr_scheduler!r}{did_you_mean(training.lr_scheduler, SCHEDULES)} "
            f"Expected one of: {', '.join(SCHEDULES)}"
        )
    if training.lr_scheduler == "constant" and training.lr_warmup_steps:
        raise ConfigError(
            f"training.lr_warmup_steps: got {training.lr_warmup_steps}, but the 'constant' schedule has no warm-up; set "
            "training.lr_scheduler: constant_with_warmup"
        )
    if training.lr_scheduler == "polynomial" and training.learning_rate <= 1e-7:
        raise ConfigError(
            f"training.learning_rate: got {training.learning_rate}; the 'polynomial' schedule ends at 1e-7 and must start "
            "above it"
        )
    _check_trackers(training.report_to)
    if training.max_grad_norm < 0:
        raise ConfigError(f"training.max_grad_norm: got {training.max_grad_norm}; expected 0 (no clipping) or more")
    if training.ema_decay is not None and not 0 < training.ema_decay < 1:
        raise ConfigError(f"training.ema_decay: got {training.ema_decay}; expected 0 < value < 1, or null")
    if not config.cache.enabled and training.dataloader_workers:
        raise ConfigError(
            "training.dataloader_workers needs the cache: without it images are encoded by the model in the main "
            "process. Set cache.enabled: true or training.dataloader_workers: 0"
        )


def _check_trackers(names: tuple[str, ...]) -> None:
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = sorted(LOGGER_TYPE_TO_CLASS)
            raise ConfigError(
                f"training.report_to {name!r} is no tracker{did_you_mean(name, known)} Known: {', '.join(known)}"
            )
        if name not in available:
            raise ConfigError(f"training.report_to {name!r} needs its package; install it with: pip install {name}")


def check_sampling(config: RunConfig) -> None:
    """Counts, scheduler and reward names: what sampling and evaluation need, for every command.

    Raises:
        ConfigError: the first problem found.
    """
    from diffalign import rewards
    from diffalign.families._loading import find_scheduler

    _check_counts(config)
    _check_frames(config)
    if config.sampling.scheduler:
        find_scheduler(config.sampling.scheduler)
    for name in config.evaluation.rewards:
        rewards.check_judge(name)


def _check_frames(config: RunConfig) -> None:
    family: type[DenoisingFamily] = plugins.find("families", config.model.family)
    if family.modality != "image":
        return
    family.check_frames(config.data.num_frames)
    if config.sampling.num_frames is not None:
        family.check_frames(config.sampling.num_frames, "sampling.num_frames")


def _check_counts(config: RunConfig) -> None:
    counts = {
        "cache": ("shard_size", "batch_size", "workers"),
        "sampling": ("num_inference_steps", "batch_size"),
        "evaluation": ("num_prompts", "images_per_prompt"),
    }
    for section, names in counts.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            if value < 1:
                raise ConfigError(f"{section}.{name}: got {value}; expected at least 1")
    if config.data.max_pairs is not None and config.data.max_pairs < 1:
        raise ConfigError(f"data.max_pairs: got {config.data.max_pairs}; expected at least 1, or null for all")


def _check_data(config: RunConfig) -> None:
    data = config.data
    if config.rollout.prompts:  # everything is sampled
        if data.sources or data.world_pairs is not None:
            raise ConfigError(
                "rollout.prompts: set, and data too; images are sampled either for these prompts or for those of the data: "
                "remove one of them"
            )
        return
    if not data.sources and data.world_pairs is None and data.world_text is None:
        raise ConfigError(
            "data.sources: empty; name local files or folders, or hub data set ids, in the order to try them"
        )
    if not 0 <= config.evaluation.held_out_fraction < 1:
        raise ConfigError(
            f"evaluation.held_out_fraction: got {config.evaluation.held_out_fraction}; expected 0 <= value < 1"
        )
