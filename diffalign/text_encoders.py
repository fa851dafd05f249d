"""Text encoders that are trained, with the network or alone (TexForce, arXiv 2311.15657; code chaofengc/TexForce).

Embeddings that are computed once carry no gradient. So a run that trains text encoders keeps prompts as token ids, in the
conditioning itself, and `TextConditioned` encodes them in the same forward as the network. Whatever cuts, stacks or moves
conditioning does so with tokens, too; policy and reference, and both branches of guidance, encode for themselves.

Keys of such conditioning: `tokens.<part>`, ids of the prompt for a text encoder (N, L), and `tokens.zeros` (N,), where it is
not 0 the prompt stands for zeros. What other encoders say (SD3's T5) stays encoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffalign import adapters
from diffalign.config import LoraConfig, TrainingConfig
from diffalign.schedules import sample_seed

if TYPE_CHECKING:
    from diffalign.families import Conditioning
    from diffalign.families._pipeline import PipelineFamily

PREFIX = "tokens."
ZEROS = f"{PREFIX}zeros"


class TextConditioned(nn.Module):
    """A network and the text encoders that condition it, as one module: what is trained, compared, stored.

    Submodules have the stock pipeline's names of the parts, so that adapter paths read as in diffusers' LoRA files.

    Args:
        family: with network and trainable text encoders in memory; it encodes and predicts.
    """

    def __init__(self, family: PipelineFamily) -> None:
        super().__init__()
        self.family = family
        self.part = family.network_part
        self.add_module(self.part, family.network)
        for name in family.text_encoders:
            self.add_module(name, family.parts[name])

    @property
    def network(self) -> nn.Module:
        """What denoises."""
        return self.get_submodule(self.part)

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The text encoders by part."""
        return {name: self.get_submodule(name) for name in self.family.text_encoders}

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The network and the text encoders."""
        return {self.part: self.network} | self.encoders

    def train(self, mode: bool = True) -> TextConditioned:
        """As `nn.Module.train`, but that text encoders keep out dropout of their own; an adapter's is on in training."""
        super().train(mode)
        for encoder in self.encoders.values():
            encoder.eval()
            for layer in adapters.lora_layers(encoder).values():
                layer.lora_dropout.train(mode)
        return self

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's own prediction; arguments as those of `DenoisingFamily.predict`, conditioning encoded or not."""
        return self.family.predict(self.network, x_t, t, self.family.encode_tokens(conditioning))


def trains_text(config: LoraConfig) -> bool:
    """Whether text encoders get an adapter."""
    return config.text_encoder_rank > 0


def text_lora(config: LoraConfig) -> LoraConfig:
    """The adapter of a text encoder, as one of a network."""
    return LoraConfig(
        rank=config.text_encoder_rank,
        alpha=config.text_encoder_alpha,
        targets=config.text_encoder_targets,
        dropout=config.dropout,
        init=config.init,
        use_rslora=config.use_rslora,
    )


def network_lora(config: LoraConfig) -> LoraConfig:
    """The adapter of the network, without what is said of text encoders."""
    plain = LoraConfig()
    names = ("text_encoder_rank", "text_encoder_alpha", "text_encoder_targets")
    return replace(config, **{name: getattr(plain, name) for name in names})


def text_targets(encoder: nn.Module, targets: str | Sequence[str], *, unread_last: bool) -> tuple[str, ...]:
    """The exact paths of a text encoder's layers that `targets` names.

    Args:
        encoder: a CLIP text encoder.
        targets: as `adapters.target_modules`.
        unread_last: leave the last layer out, whose output nothing reads: its adapter would never have a gradient.

    Raises:
        ConfigError: a target that names no layer.
    """
    paths = adapters.target_modules(encoder, targets, "lora.text_encoder_targets")
    last = f"encoder.layers.{encoder.config.num_hidden_layers - 1}."  # type: ignore[union-attr, operator]
    return tuple(path for path in paths if not (unread_last and last in f"{path}."))


def attach(
    network: nn.Module, config: LoraConfig, *, seed: int = 0, name: str = adapters.DEFAULT
) -> list[nn.Parameter]:
    """Freeze a network and add the adapters of a config to it: `adapters.attach`, and text encoders.

    Args:
        network: of a family, or a `TextConditioned`.
        config: both adapters.
        seed: of the initialisation; that of the network's adapter is the same with and without text encoders.
        name: of a network's adapter; those of a `TextConditioned` have the default one.

    Returns:
        The trainable parameters, in the network's order; of a `TextConditioned` those of its network first.

    Raises:
        ConfigError: see `adapters.attach`.
    """
    if not isinstance(network, TextConditioned):
        return adapters.attach(network, config, name, seed=seed)
    adapters.check_lora(config)
    network.requires_grad_(False)
    if config.rank:
        adapters.attach(network.network, network_lora(config), seed=seed)
    for name, encoder in network.encoders.items():
        attach_text(encoder, config, unread_last=name in network.family.last_unread, seed=sample_seed(seed, name, 0))
    return adapters.parameters(network)


def attach_text(encoder: nn.Module, config: LoraConfig, *, unread_last: bool, seed: int = 0) -> list[nn.Parameter]:
    """Freeze a text encoder and add the adapter of a config to it; see `text_targets` and `adapters.attach`."""
    own = text_lora(config)
    return adapters.attach(
        encoder, replace(own, targets=text_targets(encoder, own.targets, unread_last=unread_last)), seed=seed
    )


def parameter_groups(
    network: nn.Module, params: Sequence[nn.Parameter], training: TrainingConfig
) -> list[dict[str, Any]]:
    """Trained parameters as an optimiser's groups: text encoders apart, where they have a learning rate of their own.

    Args:
        network: bare, with its adapters.
        params: all that are trained.
        training: learning rates.
    """
    rate = training.text_encoder_learning_rate
    if rate is None or not isinstance(network, TextConditioned):
        return [{"params": list(params)}]
    text = {id(p) for encoder in network.encoders.values() for p in encoder.parameters()}
    return [
        {"params": [p for p in params if id(p) not in text]},
        {"params": [p for p in params if id(p) in text], "lr": rate},
    ]


# -- What families do with tokens -----------------------------------------------------------------------------------------


def has_tokens(conditioning: Mapping[str, Tensor]) -> bool:
    """Whether conditioning holds prompts that are not encoded yet."""
    return any(name.startswith(PREFIX) for name in conditioning)


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int | None = None) -> Tensor:
    """Prompts as a stock pipeline's CLIP tokenizer has them, cut off and filled up, int64 (N, L).

    Args:
        tokenizer: of CLIP.
        prompts: N of them.
        length: L; None: as long as the tokenizer says.
    """
    longest = int(tokenizer.model_max_length if length is None else length)
    found = tokenizer(list(prompts), padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
    return found.input_ids  # type: ignore[no-any-return]


def distinct(tokens: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Every prompt once: a group's samples have the same, and so have all unconditional branches.

    Args:
        tokens: by key, (N, L) or (N,); stored as floats or integers.

    Returns:
        Their distinct rows as int64, (M, L) or (M,), and the place of each of the N in them, (N,).
    """
    columns = {name: value.long().reshape(len(value), -1) for name, value in tokens.items()}
    rows, place = torch.unique(torch.cat(list(columns.values()), dim=1), dim=0, return_inverse=True)
    parts = rows.split([value.shape[1] for value in columns.values()], dim=1)
    found = {name: part if tokens[name].ndim > 1 else part[:, 0] for name, part in zip(columns, parts, strict=True)}
    return found, place


def zeroed(hidden: Tensor, zeros: Tensor) -> Tensor:
    """Rows of `hidden` (M, ...) as exact zeros, without gradient, where `zeros` (M,) is not 0."""
    return hidden.masked_fill((zeros != 0).reshape(-1, *[1] * (hidden.ndim - 1)), 0.0)
