"""What training entries of the weights (section `sparse`) cannot be combined with."""

from __future__ import annotations

import dataclasses
import logging

from diffalign.config import LoraConfig, RunConfig
from diffalign.errors import ConfigError

log = logging.getLogger(__name__)


def check_sparse_run(config: RunConfig) -> None:
    """Refuse settings that do not go with changed weights, or that nothing would read beside them.

    Raises:
        ConfigError: the first problem found.
    """
    from diffalign.sparse import check_sparse

    sparse, training = config.sparse, config.training
    check_sparse(sparse)
    if sparse.method is None:
        return
    plain = LoraConfig(rank=0)
    for field in dataclasses.fields(LoraConfig):
        value = getattr(config.lora, field.name)
        if value != getattr(plain, field.name):
            raise ConfigError(
                f"lora.{field.name}: got {value!r}; with sparse.method {sparse.method!r} entries of the weights are "
                f"trained, and no LoRA: {'set it to 0' if field.name == 'rank' else 'remove it'}, or the section sparse"
            )
    if config.users.encoder is not None:
        raise ConfigError(
            f"users.encoder: got {config.users.encoder!r}; users are seen by attentions of their own or by a LoRA, not by "
            f"changed weights (sparse.method {sparse.method!r}): remove one of them"
        )
    if config.preference.seen:
        raise ConfigError(
            f"preference.rewards: got {list(config.preference.rewards)}; weights of rewards act on a LoRA, the time or "
            f"attentions, not on changed weights (sparse.method {sparse.method!r}): remove one of them, or set "
            "preference.fixed"
        )
    if config.negative.train == "joint":
        raise ConfigError(
            "negative.train: got 'joint'; the two adapters are halves of a LoRA, and there is none (sparse.method "
            f"{sparse.method!r}): remove the section sparse"
        )
    if training.compile:
        raise ConfigError(
            "training.compile: got true; blocks with changed weights (section sparse) are not compiled: remove it"
        )
    for key in ("train_batch_size", "gradient_checkpointing"):
        if sparse.method == "sara" and getattr(training, key) == "auto":
            raise ConfigError(
                f"training.{key}: got 'auto'; which entries are below sparse.threshold is known when weights are there, and "
                "before that all entries of the layers would be counted: give "
                f"{'a number' if key == 'train_batch_size' else 'true or false'}"
            )
    if sparse.reselect_at is not None and sparse.reselect_at >= training.max_train_steps:
        # Not refused: a run may be meant to be looked at early, and to be resumed with more steps.
        log.warning(
            "sparse.reselect_at is %d and training ends at step %d: entries are not chosen again",
            sparse.reselect_at,
            training.max_train_steps,
        )
