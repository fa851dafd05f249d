"""What can be found wrong with a run that trains a reward model, before any weights load."""

from __future__ import annotations

from collections.abc import Collection

from diffalign.config import JudgeConfig, LoraConfig, RunConfig
from diffalign.data.facts import ASPECT
from diffalign.errors import ConfigError, DataError
from diffalign.losses.judging import BradleyTerryTies, GeneralPreference

# Keys of image runs that reward training reads, too; every other key of images or texts would silently do nothing.
READ_BY_REWARDS = (
    "cache",
    "data.resolution",
    "data.crop",
    "data.flip",
    "data.world_pairs",
    "data.label_from",
    "evaluation.every",
)
# Keys that images and texts both read and reward training does not.
UNREAD_BY_REWARDS = (
    "reference",
    "rollout",
    "cache.encode_dtype",
    "model.variant",
    "model.flow_shift",
    "model.max_sequence_length",
    "data.num_frames",
    "data.buckets",
    "training.compile",
    "training.sample_steps",
    "lora.use_dora",
    "evaluation.at_end",
    "evaluation.prompts",
    "evaluation.num_prompts",
    "evaluation.images_per_prompt",
    "evaluation.seed",
    "evaluation.grid_prompts",
    "evaluation.keep_best",
    "evaluation.patience",
)


def check_reward_run(config: RunConfig, facts: Collection[str]) -> None:
    """Head, objective, data and adapter of a reward training run.

    Args:
        config: of the run.
        facts: what the rows of the configured data may have beyond a label.

    Raises:
        ConfigError: the first problem found.
    """
    from diffalign import rewards
    from diffalign.families.clip_reward import known_image_size

    _check_head(config)
    data, judge = config.data, config.judge
    if judge.head == "aspects" and ASPECT not in facts:
        raise ConfigError(
            f"judge.head: aspects, and rows of format {data.format!r} do not say which aspect they are about; take a format "
            "that does ('jsonl', or data.world_pairs with aspects: true), or judge.head: cosine"
        )
    if data.world_pairs is not None and data.format != "pickapic":
        raise DataError(f"data.world_pairs writes the 'pickapic' format; data.format is {data.format!r}")
    size = known_image_size(config.model)
    if size is not None and data.resolution != size:
        raise ConfigError(
            f"data.resolution: got {data.resolution}; the vision tower of {config.model.pretrained!r} looks at {size} pixels"
        )
    if isinstance(config.objective, BradleyTerryTies) and data.ties == "drop":
        raise ConfigError(
            "data.ties: drop, and objective 'bradley_terry_ties' learns how near the scores of ties are; set data.ties: "
            "soft, or take bradley_terry"
        )
    if "auto" in (config.training.train_batch_size, config.training.gradient_checkpointing):
        raise ConfigError(
            "training: 'auto' batch size and checkpointing are measured for diffusion models only; give train_batch_size a "
            "number and gradient_checkpointing true or false"
        )
    for name in config.evaluation.rewards:
        rewards.check_judge(name)
    for name in ("rewards", "every"):
        if getattr(config.evaluation, name) and not config.evaluation.held_out_fraction:
            raise ConfigError(
                f"evaluation.{name}: it is about held-out pairs, and evaluation.held_out_fraction is 0; set it, or remove "
                f"evaluation.{name}"
            )


def _check_head(config: RunConfig) -> None:
    judge, objective = config.judge, config.objective
    general = isinstance(objective, GeneralPreference)
    if judge.head is not None and general != (judge.head == "general"):
        raise ConfigError(
            f"judge.head: got {judge.head!r} with objective {objective.name!r}; objective general_preference and head "
            "'general' belong together"
        )
    if general and judge.head is None:
        raise ConfigError("judge.head: missing; objective 'general_preference' needs head: general")
    if judge.head == "general" and (judge.outputs < 2 or judge.outputs % 2):
        raise ConfigError(f"judge.outputs: got {judge.outputs}; a general preference has an even number of dimensions")
    if judge.head == "aspects" and judge.outputs < 2:
        raise ConfigError(f"judge.outputs: got {judge.outputs}; aspects are at least 2")
    if judge.head in (None, "cosine") and judge.outputs != 1:
        raise ConfigError(
            f"judge.outputs: got {judge.outputs}; only heads 'aspects', 'general' and 'experts' have several"
        )
    _check_experts(judge)
    weights = judge.aspect_weights
    if weights and (judge.head != "aspects" or len(weights) != judge.outputs):
        raise ConfigError(
            f"judge.aspect_weights: got {len(weights)} with head {judge.head!r} and outputs {judge.outputs}; give one for "
            "each aspect, or none"
        )
    if weights and (min(weights) < 0 or sum(weights) <= 0):
        raise ConfigError(f"judge.aspect_weights: got {list(weights)}; none may be negative, and one must be positive")
    if judge.tuning == "head" and judge.head in (None, "cosine"):
        raise ConfigError("judge.tuning: head, and the cosine has none; take 'lora' or 'full', or another judge.head")
    if judge.tuning != "lora" and config.lora != LoraConfig():
        raise ConfigError(f"lora: has no effect with judge.tuning: {judge.tuning}; remove the section")
    if judge.logit_scale and judge.tuning != "full":
        raise ConfigError("judge.logit_scale: it is trained in full tuning only; set judge.tuning: full")
    if judge.logit_scale and judge.head == "general":
        raise ConfigError("judge.logit_scale: has no effect with judge.head: general, which reads no cosine; remove it")


def _check_experts(judge: JudgeConfig) -> None:
    if judge.head != "experts":
        plain = JudgeConfig()
        for name in ("criteria", "criteria_weight", "gate_width", "gate_temperature"):
            if (value := getattr(judge, name)) != getattr(plain, name):
                raise ConfigError(f"judge.{name}: got {value!r}, which only head 'experts' reads; remove it")
        return
    if judge.outputs < 2:
        raise ConfigError(
            f"judge.outputs: got {judge.outputs}; gates weigh at least 2 criteria (one is the head without gates: "
            "aspects, or the cosine)"
        )
    if judge.criteria and (min(judge.criteria) < 1 or sum(judge.criteria) != judge.outputs):
        raise ConfigError(
            f"judge.criteria: got {list(judge.criteria)}, and judge.outputs is {judge.outputs}; expected how many criteria "
            "each aspect has, adding up to it"
        )
    for name in ("criteria_weight", "gate_width", "gate_temperature"):
        if (value := getattr(judge, name)) <= 0:
            raise ConfigError(f"judge.{name}: got {value!r}; expected a positive number")
