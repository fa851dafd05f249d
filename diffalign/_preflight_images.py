"""What the settings of an image run cannot do together, or would leave unread without a word."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffalign.config import RolloutConfig, RunConfig
from diffalign.errors import ConfigError

if TYPE_CHECKING:
    from diffalign.families import DenoisingFamily

FROM_DATA = ("generated", "on_policy")  # chosen images of the data against samples
TIMES = ("timestep_min", "timestep_max", "timestep_sampling", "logit_mean", "logit_std")
INVERSION = ("noising", "inversion_steps", "inversion_noise", "inversion_level")
ERRORS = ("error_space", "error_reduction")


@dataclass(frozen=True)
class Unread:
    """Keys that some runs on sampled images do not read.

    Attributes:
        section: of the keys.
        names: of the keys.
        where: which runs do not read them.
        why: what they do instead; `{objective}` is filled in.
    """

    section: str
    names: tuple[str, ...]
    where: Callable[[RunConfig], bool]
    why: str


def _source(*names: str) -> Callable[[RunConfig], bool]:
    return lambda config: config.objective.rows_from in names


def _no_source(*names: str) -> Callable[[RunConfig], bool]:
    return lambda config: config.objective.rows_from not in names


def _chooses(config: RunConfig) -> bool:
    """Whether the objective learns from one chosen image of a group."""
    needs = config.objective.needs
    alone = needs.labels == (1,) and not {"pairs", "groups"} & set(needs.layout)
    return bool(alone and config.objective.rows_from == "data")


def _reads_advantages(config: RunConfig) -> bool:
    """Whether the objective learns from advantages whatever their mean within a prompt is."""
    from diffalign.losses.diffusion.crd import CRD
    from diffalign.losses.diffusion.dgpo import DGPO
    from diffalign.losses.group_objective import GroupObjective

    # DGPO's advantages have to add up to 0 in a group, CRD centres them in the group again.
    return isinstance(config.objective, GroupObjective) and not isinstance(config.objective, (CRD, DGPO))


def _sums_rewards(config: RunConfig) -> bool:
    """Whether advantages are made of the summed reward, before a round is cut."""
    objective = config.objective
    summed = getattr(objective, "aggregate", "") == "sum_then_normalize"
    return summed and not (getattr(objective, "beta", 0) and getattr(objective, "kl_in_reward", False))


UNREAD = (
    Unread(
        "denoising",
        (*TIMES, "noise", *INVERSION, *ERRORS, "proportion_empty_prompts"),
        lambda config: config.objective.trains_steps,
        "objective {objective!r} trains log-densities of its sampler's own steps and measures no denoising error",
    ),
    Unread(
        "denoising",
        (*TIMES, "noise"),
        _source("on_policy"),
        "objective {objective!r} trains at the sampler's own noise levels, which both images of a pair share",
    ),
    Unread(
        "denoising",
        ("proportion_empty_prompts",),
        _source("data"),
        "images that are sampled for a prompt are trained with it",
    ),
    Unread(
        "denoising",
        (*TIMES, "noise", *INVERSION, *ERRORS, "proportion_empty_prompts"),
        _source("differentiable"),
        "objective {objective!r} follows a reward's gradient through the sampler and measures no denoising error",
    ),
    Unread(
        "denoising",
        (*TIMES, "noise", *INVERSION, "proportion_empty_prompts"),
        _source("truncated"),
        "objective {objective!r} noises the points of its walks further, to any level above theirs, with their prompt",
    ),
    Unread(
        "rollout",
        ("samples_per_prompt", "eta", "kernel", "reward_weights"),
        _source("truncated"),
        "objective {objective!r} makes one walk without noise for every prompt, and reads no reward",
    ),
    Unread(
        "rollout",
        ("samples_per_prompt", "steps_per_generation", "num_iterations", "policy"),
        _source("differentiable"),
        "objective {objective!r} samples one image of every prompt in every step, by the policy itself",
    ),
    Unread(
        "rollout",
        ("offload_rewards",),
        _source("differentiable"),
        "objective {objective!r} follows a reward's gradient in every step, so that its networks are never idle",
    ),
    Unread(
        "rollout",
        ("offload_rewards",),
        lambda config: not config.rollout.rewards,
        "it moves the networks of rollout.rewards, and there are none",
    ),
    Unread(
        "rollout",
        ("decode_batch_size",),
        _no_source("differentiable"),
        "only objectives that follow a reward's gradient through the sampler read it, such as draft",
    ),
    Unread(
        "rollout",
        ("checkpoint_steps",),
        _no_source("differentiable", "whole_trajectories"),
        "only objectives that follow a reward's gradient through the sampler read it, such as draft, and those on whole "
        "trajectories, such as prdp",
    ),
    Unread(
        "rollout",
        ("steps_per_sample", "first_step"),
        _source("whole_trajectories"),
        "objective {objective!r} compares whole trajectories and trains all of their steps",
    ),
    Unread(
        "rollout",
        ("num_prompts",),
        lambda config: not config.rollout.prompts,
        "it cuts rollout.prompts, and there are none: those of the data are used (data.max_pairs cuts these)",
    ),
    Unread(
        "rollout",
        ("samples_per_prompt",),
        _source(*FROM_DATA),
        "objective {objective!r} compares every image of the data with one sample",
    ),
    Unread(
        "rollout",
        ("steps_per_sample",),
        lambda config: not config.objective.trains_steps and config.objective.rows_from != "on_policy",
        "only objectives that train steps or points of a trajectory read it, and {objective!r} trains clean images",
    ),
    Unread(
        "rollout",
        ("negative_gradient",),
        lambda config: not config.objective.trains_steps,
        "only objectives on log-densities of a sampler's steps read it, such as flow_grpo (those that follow a reward's "
        "gradient have objective.negative_gradient)",
    ),
    Unread(
        "rollout",
        ("negative_gradient",),
        lambda config: config.rollout.guidance_scale == 1,
        "without guidance there is no unconditional branch (rollout.guidance_scale: 1)",
    ),
    Unread(
        "rollout",
        ("first_step",),
        lambda config: not config.objective.trains_steps,
        "only objectives that train a trajectory's steps read it, such as d3po",
    ),
    Unread(
        "rollout",
        ("old_decay",),
        lambda config: (
            (config.rollout.policy or config.objective.sampling.policy) != "lagged" and not config.objective.needs.old
        ),
        "only runs with a lagged copy of the policy read it: rollout.policy: lagged, or objective diffusion_nft",
    ),
    Unread(
        "rollout",
        ("select", "select_temperature"),
        lambda config: not _chooses(config),
        "only objectives on chosen images alone read it, such as sft, and {objective!r} is none",
    ),
    Unread(
        "rollout",
        ("window", "window_range", "window_every"),
        _no_source("steps"),
        "only policy gradients on the sampler's steps read it, such as grpo",
    ),
    Unread(
        "rollout",
        ("window_range", "window_every"),
        lambda config: config.rollout.window is None,
        "it moves rollout.window, and there is none",
    ),
    Unread(
        "rollout",
        ("history", "history_min"),
        lambda config: not _reads_advantages(config),
        "only objectives on advantages whose mean within a prompt is free read it, such as ddpo",
    ),
    Unread(
        "rollout",
        ("history", "history_min"),
        lambda config: _reads_advantages(config) and not _sums_rewards(config),
        "it compares summed rewards as they are given: objective.aggregate is 'sum_then_normalize' then, and no divergence "
        "is in the reward (objective.kl_in)",
    ),
    Unread(
        "objective",
        ("center", "scale_rewards", "normalize_advantages"),
        lambda config: config.rollout.history is not None,
        "rewards are compared with the last rewards of their prompt (rollout.history)",
    ),
    Unread(
        "rollout",
        ("history_min",),
        lambda config: config.rollout.history is None,
        "it is for rollout.history, and there is none",
    ),
    Unread(
        "rollout",
        ("shared_start",),
        _no_source("trajectories", "steps", "whole_trajectories"),
        "only objectives that compare whole trajectories read it, such as d3po",
    ),
    Unread(
        "rollout",
        ("pairing",),
        lambda config: config.objective.rows_from != "trajectories" and "pairs" not in config.objective.needs.layout,
        "only objectives that compare two sampled images read it, such as d3po",
    ),
    Unread(
        "rollout",
        ("pairing",),
        _source(*FROM_DATA, "candidates"),
        "objective {objective!r} does not compare whole samples by their rewards",
    ),
    Unread(
        "rollout",
        ("reward_scale", "keep_threshold"),
        _no_source("candidates"),
        "only objectives that compare next latents read it, such as spo",
    ),
    Unread(
        "evaluation",
        ("held_out_fraction",),
        lambda config: bool(config.rollout.prompts),
        "rollout.prompts are sampled, and there are no data to hold out",
    ),
)


def check_unread(config: RunConfig) -> None:
    """Refuse settings that this run on sampled images would not read.

    Raises:
        ConfigError: the first one found.
    """
    objective = config.objective
    for entry in UNREAD:
        if not entry.where(config):
            continue
        node = getattr(config, entry.section)
        for field in dataclasses.fields(node):
            if field.name in entry.names and (value := getattr(node, field.name)) != field.default:
                why = entry.why.format(objective=objective.name)
                raise ConfigError(f"{entry.section}.{field.name}: got {value!r}, which has no effect: {why}; remove it")


def check_round(config: RunConfig) -> None:
    """Refuse what a round of sampled images cannot be cut into, and samples that do not have the data's size.

    Raises:
        ConfigError: the first problem found.
    """
    training, rollout, objective = config.training, config.rollout, config.objective
    size, needs = training.train_batch_size, objective.needs
    if size == "auto":
        raise ConfigError(
            "training.train_batch_size: got 'auto'; a round of sampled images is cut into micro-batches of a known size: "
            "give a number (diffalign plan says what fits)"
        )
    if objective.trains_steps:
        _check_steps(rollout)
    if objective.rows_from == "differentiable":
        try:
            objective.check_steps(rollout.num_inference_steps)
        except ValueError as error:
            raise ConfigError(f"objective.{error} (rollout.num_inference_steps)") from error
    together = "groups" in needs.layout or (needs.labels != (1,) and "pairs" not in needs.layout)
    if (
        objective.rows_from in ("data", "steps", "whole_trajectories")
        and together
        and size % rollout.samples_per_prompt
    ):
        raise ConfigError(
            f"training.train_batch_size: got {size}; the images of a group stay together: expected a multiple of "
            f"rollout.samples_per_prompt {rollout.samples_per_prompt}"
        )
    if objective.rows_from == "on_policy" and rollout.guidance_scale != 1:
        raise ConfigError(
            f"rollout.guidance_scale: got {rollout.guidance_scale}; {objective.name!r} trains predictions with a prompt on "
            "targets that the sampler predicted, so it samples without guidance: take 1"
        )
    if objective.from_data:
        _check_sizes(config)
    if objective.rows_from == "truncated" and rollout.num_inference_steps < 2:
        raise ConfigError(
            f"rollout.num_inference_steps: got {rollout.num_inference_steps}; objective {objective.name!r} stops on the "
            "way: expected at least 2"
        )


def check_groups(config: RunConfig) -> None:
    """Refuse rewards that compare the images of a prompt where these would not come together.

    Raises:
        ConfigError: naming the reward.
    """
    from diffalign import rewards

    for name in config.rollout.rewards:
        check_group(config, name, rewards.groups(name))
        check_set(config, name, rewards.of_sets(name))


def check_group(config: RunConfig, name: str, grouped: bool) -> None:
    """The same of one reward; whether a server's is `grouped` is known when it is asked.

    Raises:
        ConfigError: naming the reward.
    """
    if grouped:
        if config.objective.rows_from in ("candidates", "differentiable"):
            raise ConfigError(
                f"rollout.rewards: {name!r} compares the images of a prompt, and objective {config.objective.name!r} scores "
                "them one by one; remove it"
            )
        _check_together(config, name, "the images of a prompt")


def _check_together(config: RunConfig, name: str, what: str) -> None:
    """Refuse rounds whose images would not be scored by whole prompts of several."""
    count, batch = config.rollout.samples_per_prompt, config.sampling.batch_size
    if count < 2:
        raise ConfigError(
            f"rollout.samples_per_prompt: got {count}; reward {name!r} compares {what}: expected at least 2"
        )
    if batch % count:
        raise ConfigError(
            f"sampling.batch_size: got {batch}; reward {name!r} compares {what}, which are scored as they are sampled: "
            f"expected a multiple of rollout.samples_per_prompt {count}"
        )


def check_set(config: RunConfig, name: str, sets: bool) -> None:
    """Refuse a reward of sets where images are scored one by one, or where one would be left alone.

    Raises:
        ConfigError: naming the reward.
    """
    size, part = config.training.train_batch_size, config.rollout.decode_batch_size
    if not sets:
        return
    if config.objective.rows_from == "candidates":
        raise ConfigError(
            f"rollout.rewards: {name!r} compares all images of a call, and objective {config.objective.name!r} scores them "
            "one by one; remove it"
        )
    if config.objective.rows_from != "differentiable":
        _check_together(config, name, "all images of a call")
        return
    if (link := getattr(config.objective, "link", "linear")) != "linear":
        raise ConfigError(
            f"objective.link: got {link!r}; reward {name!r} is of a set, and only the sum over its images has a gradient: "
            "take linear"
        )
    if isinstance(size, int) and (part < 2 or size % part == 1):
        raise ConfigError(
            f"rollout.decode_batch_size: got {part}; reward {name!r} compares the images that are decoded together, and of "
            f"training.train_batch_size {size} one would be left alone: take a divisor of it, the larger the better"
        )


def _check_steps(rollout: RolloutConfig) -> None:
    """Refuse steps that the sampler has not got; how many have a density is said by `check_schedule`."""
    steps, first, trained = rollout.num_inference_steps, rollout.first_step, rollout.steps_per_sample
    if not 0 <= first < steps:
        raise ConfigError(
            f"rollout.first_step: got {first}; the sampler's steps are 0 to {steps - 1} (rollout.num_inference_steps "
            f"{steps})"
        )
    if trained is not None and trained < 1:
        raise ConfigError(f"rollout.steps_per_sample: got {trained}; expected at least 1, or null")


def _check_sizes(config: RunConfig) -> None:
    """Samples are stacked with the data's images."""
    data, sampling, name = config.data, config.sampling, config.objective.name
    if data.buckets:
        raise ConfigError(
            f"data.buckets: got true; objective {name!r} compares the data's images with samples, which are squares: set it "
            "to false"
        )
    for key in ("resolution", "num_frames"):
        value, own = getattr(sampling, key), getattr(data, key)
        if value is not None and value != own:
            raise ConfigError(
                f"sampling.{key}: got {value}; objective {name!r} compares the data's images with samples of their size: "
                f"remove it, or take data.{key} {own}"
            )


def check_errors(config: RunConfig) -> None:
    """Refuse ways to measure denoising errors on which the objective means something else.

    Raises:
        ConfigError: the first problem found.
    """
    from diffalign.losses import Cap, Kind
    from diffalign.losses.diffusion.sdpo import SDPO

    denoising, objective = config.denoising, config.objective
    if denoising.error_reduction == "sum" and Cap.RESIDUAL in objective.required_caps(Kind.BOUND):
        raise ConfigError(
            f"denoising.error_reduction: got 'sum'; objective {objective.name!r} works on errors element by element, of "
            "which the error is the mean; remove it"
        )
    if denoising.noise == "independent" and isinstance(objective, SDPO):
        raise ConfigError(
            f"denoising.noise: got 'independent'; objective {objective.name!r} compares the errors of a pair's images "
            "element by element, through the noise that they share; remove it"
        )
    if _reads_flow_time(objective) and denoising.error_space != "native":
        raise ConfigError(
            f"denoising.error_space: got {denoising.error_space!r}; objective {objective.name!r} with "
            "objective.beta_schedule 'derived' weighs errors of the velocity, as "
            "the native space has them; remove one of the two"
        )


def _reads_flow_time(objective: Any) -> bool:
    from diffalign.losses.diffusion.flow_dpo import FlowDPO

    return isinstance(objective, FlowDPO) and objective.beta_schedule == "derived"


def check_schedule(config: RunConfig, family: DenoisingFamily, processes: int | None = None) -> None:
    """Refuse what does not go with the model's noise levels, for which its scheduler's config alone is read.

    Args:
        config: of the run.
        family: of the model, with no part loaded.
        processes: that train; None leaves the rounds of sampled images out.

    Raises:
        ConfigError: the first problem found.
    """
    from diffalign.sampling.rules import noise_level, round_size, samples_images
    from diffalign.sampling.trajectories import make_grid

    schedule, first = family.schedule, config.denoising.timestep_min
    if first >= schedule.num_timesteps:
        raise ConfigError(
            f"denoising.timestep_min: got {first}; the model has timesteps 0 to {schedule.num_timesteps - 1}"
        )
    if _reads_flow_time(config.objective) and not schedule.is_flow:
        raise ConfigError(
            f"objective.beta_schedule: got 'derived'; the model predicts {schedule.prediction_type} and is no flow model, "
            "whose time this weight is a function of; take 'constant'"
        )
    if processes is not None and samples_images(config):
        rollout = config.rollout
        if config.objective.rows_from == "differentiable":
            make_grid(family, family.stock_scheduler(), rollout.num_inference_steps, (1, 64, 64), rollout.kernel)
            return
        # Which steps have a density does not depend on the size, by which some samplers shift their levels.
        steps, kernel = rollout.num_inference_steps, rollout.kernel
        grid = make_grid(family, family.stock_scheduler(), steps, (1, 64, 64), kernel)
        round_size(config, grid, noise_level(config), processes)
