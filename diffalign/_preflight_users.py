"""What training on the tastes of single users cannot be combined with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffalign.config import RunConfig, UsersConfig
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

    users, lora = config.users, config.lora
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
    if users.through == "gates" and not lora.rank:
        raise ConfigError(
            "users.through: got 'gates', which weigh the ranks of a LoRA, and lora.rank is 0; set it above 0"
        )
    if users.through == "gates":
        for name in ("tokens", "token_size"):
            if getattr(users, name) != getattr(UsersConfig(), name):
                raise ConfigError(f"users.{name}: got {getattr(users, name)}; gates have no tokens; remove it")
    alone = users.through == "attention"
    for key, value in (
        ("lora.rank", lora.rank if alone else 0),
        ("lora.use_dora", lora.use_dora),
        ("lora.text_encoder_rank", lora.text_encoder_rank),
        ("lora.experts", lora.experts),
        ("negative.train", config.negative.train),
    ):
        if value:
            raise ConfigError(
                f"{key}: got {value!r}; with users.encoder {'the attentions to users' if alone else 'a LoRA and its gates'} "
                f"alone are trained: {'set it to 0, or users.through to gates' if key == 'lora.rank' else 'remove it'}"
            )
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
