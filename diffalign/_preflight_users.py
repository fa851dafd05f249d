"""What training on the tastes of single users, or on weighted rewards, cannot be combined with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffalign import plugins
from diffalign.config import PreferenceConfig, RunConfig, UsersConfig
from diffalign.errors import ConfigError

if TYPE_CHECKING:
    from diffalign.families import DenoisingFamily

KINDS = ("world_clip", "clip:WEIGHTS", "vlm:WEIGHTS")


def check_users(config: RunConfig, family: type[DenoisingFamily]) -> None:
    """Refuse settings that do not go with users, or that nothing would read without them.

    Raises:
        ConfigError: the first problem found.
    """
    from diffalign.families._pipeline import PipelineFamily
    from diffalign.sampling.rules import samples_images

    users = config.users
    if users.encoder is None:
        if users != UsersConfig():
            raise ConfigError("users: set users.encoder, without which the section has no effect, or remove it")
        return
    kind, _, weights = users.encoder.partition(":")
    if users.encoder != "world_clip" and not (kind in ("clip", "vlm") and weights):
        raise ConfigError(f"users.encoder: got {users.encoder!r}; expected one of {', '.join(KINDS)}")
    if users.layers != UsersConfig().layers and kind != "vlm":
        raise ConfigError(
            f"users.layers: got {list(users.layers)}; only 'vlm' encoders have layers to choose; remove it"
        )
    if users.through != "attention":
        for name in ("tokens", "token_size"):
            if getattr(users, name) != getattr(UsersConfig(), name):
                raise ConfigError(
                    f"users.{name}: got {getattr(users, name)}; through {users.through!r} there are no tokens; remove it"
                )
    _check_adapter(config, "users", users.through)
    if config.data.num_frames > 1:
        raise ConfigError(
            f"data.num_frames: got {config.data.num_frames}; encoders of users see still images; set it to 1, or remove "
            "users.encoder"
        )
    if samples_images(config):
        raise ConfigError(
            f"users.encoder: objective {config.objective.name!r} trains on sampled images here, which are nobody's; users "
            "need pairs of the data with user ids"
        )
    if not issubclass(family, PipelineFamily):
        raise ConfigError(f"users.encoder: family {config.model.family!r} is a plug-in without diffusers attentions")


def _check_adapter(config: RunConfig, section: str, through: str) -> None:
    """Refuse adapters that do not go with a branch, or lack what it weighs."""
    lora, alone = config.lora, through == "attention"
    if not alone and not lora.rank:
        acts = "weigh the ranks of a LoRA" if through == "gates" else "act beside a LoRA"
        raise ConfigError(f"{section}.through: got {through!r}, which {acts}, and lora.rank is 0; set it above 0")
    if config.training.compile and through != "time":
        raise ConfigError(
            f"training.compile: with {section}.through {through!r} blocks read who is given between calls, which "
            "compiled ones do not see; remove it"
        )
    for key, value in (
        ("lora.rank", lora.rank if alone else 0),
        ("lora.use_dora", lora.use_dora),
        ("lora.text_encoder_rank", lora.text_encoder_rank),
        ("lora.experts", lora.experts),
        ("negative.train", config.negative.train),
    ):
        if value:
            what = {"attention": "attentions of their own", "gates": "a LoRA and its gates"}
            raise ConfigError(
                f"{key}: got {value!r}; with section {section!r} {what.get(through, 'a LoRA and a vector on the time')} "
                f"alone are trained: {f'set it to 0, or {section}.through to gates' if key == 'lora.rank' else 'remove it'}"
            )


def check_preference(config: RunConfig, family: type[DenoisingFamily]) -> None:
    """Refuse settings that do not go with weighted rewards, or that nothing would read.

    Raises:
        ConfigError: the first problem found.
    """
    from diffalign.data.facts import REWARDS, needed
    from diffalign.families._pipeline import PipelineFamily
    from diffalign.sampling.rules import samples_images

    own, data, default = config.preference, config.data, PreferenceConfig()
    if not own.rewards:
        if own != default:
            raise ConfigError(
                "preference: set preference.rewards, without which the section has no effect, or remove it"
            )
        return
    said = "preference.rewards judge the pairs"
    unread: dict[str, tuple[str, ...]] = (
        {"fixed": ("concentration", "dropout", "through", "hidden")} if own.fixed else {}
    )
    unread |= {f"through: {own.through}": ("hidden",)} if own.through == "attention" else {}
    for by, names in unread.items():
        for name in names:
            if getattr(own, name) != getattr(default, name):
                raise ConfigError(f"preference.{name}: has no effect with preference.{by}; remove it")
    for key, value, wanted in (
        ("users.encoder", config.users.encoder, None),
        ("data.label", data.label, "given"),
        ("data.label_from", data.label_from, "label"),
        ("negative.train", config.negative.train, None),
    ):
        if value != wanted:
            raise ConfigError(f"{key}: got {value!r}, and {said}; remove one of them")
    if samples_images(config):
        raise ConfigError(
            f"preference.rewards: objective {config.objective.name!r} trains on sampled images here, which have no pairs to "
            "judge; for several rewards see rollout.reward_weights"
        )
    if not {"pairs", "items"} & set(config.objective.needs.layout) or REWARDS in needed(config.objective):
        raise ConfigError(
            f"preference.rewards: objective {config.objective.name!r} reads rewards itself, or no pairs; expected one whose "
            "only news of a pair is which image is better, such as dpo or diffusion_kto"
        )
    world = data.world_pairs
    if world is not None and tuple(world.rewards) != own.rewards:
        raise ConfigError(
            f"preference.rewards: got {', '.join(own.rewards)}, and data.world_pairs.rewards are "
            f"{', '.join(world.rewards) or 'none'}; set both to the same names in the same order"
        )
    if REWARDS not in plugins.find("readers", data.format).facts:  # type: ignore[attr-defined]
        raise ConfigError(
            f"preference.rewards: rows of format {data.format!r} have no rewards; expected 'jsonl' or 'pickapic'"
        )
    if data.ties != "soft":
        raise ConfigError(
            f"data.ties: got {data.ties!r}, which leaves out pairs whose own label is a tie, and {said}: set it to 'soft'"
        )
    if own.seen and data.num_frames > 1:
        raise ConfigError(
            f"data.num_frames: got {data.num_frames}; an adapter that is told weights is for still images: set it to "
            "1, or preference.fixed"
        )
    if own.seen:
        _check_adapter(config, "preference", own.through)
        if own.through == "gates" and config.lora.init.lower() not in ("gaussian", "default"):
            raise ConfigError(
                f"lora.init: got {config.lora.init!r}; through gates ranks are weighed from the start, and only 'gaussian' "
                "and 'default' start at the base then"
            )
        if own.through == "gates" and config.lora.rank < len(own.rewards):
            raise ConfigError(
                f"lora.rank: got {config.lora.rank}; through gates each of {len(own.rewards)} rewards needs a rank of its "
                "own; set it higher"
            )
        if not issubclass(family, PipelineFamily):
            raise ConfigError(f"preference.rewards: family {config.model.family!r} is a plug-in; set preference.fixed")
