"""Two adapters that are trained together, one for the images of a pair that were chosen and one for those that were not.

They are one LoRA of twice the rank, of which chosen rows use the first half of the ranks and rejected rows the second, so
that optimiser, average, checkpoint and reference treat them as one adapter: B diag(side) A. A batch holds chosen rows in its
first half and rejected rows in its second, as pairs are stacked. To sample, and for files, the halves are copied into two
adapters of the rank that was asked for, which act in the two branches of guidance (`diffalign.sampling.guidance`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign import adapters, export
from diffalign.config import LoraConfig, RunConfig
from diffalign.families import Around
from diffalign.sampling.guidance import NegativeGuidance

ATTRIBUTE = "diffalign_sides"  # of a network
CHOSEN, REJECTED = "chosen", "rejected"  # the adapters that are sampled with
FOLDER = "negative"  # of a run, holds the adapter of rejected images
PARTNER = "partner"  # in a file's header: the branch of the adapter that it was trained with


def lora_of(config: RunConfig) -> LoraConfig:
    """The LoRA that a run attaches: of twice the rank, and the same scale, where two are trained together."""
    lora = config.lora
    if config.negative.train != "joint":
        return lora
    alpha = lora.rank if lora.alpha is None else lora.alpha
    return replace(lora, rank=2 * lora.rank, alpha=alpha * (2**0.5 if lora.use_rslora else 2))


def around_of(config: RunConfig) -> Around | None:
    """The context in which the adapters of a run are sampled with, where branches of guidance have different ones."""
    negative = config.negative
    if negative.train == "joint":
        return lambda pipeline: NegativeGuidance(
            pipeline, REJECTED, alpha=0.0, beta=negative.beta, prompt_share=negative.prompt_share
        )
    if negative.alone:
        return lambda pipeline: NegativeGuidance(pipeline, adapters.DEFAULT, beta=negative.beta)
    return None


def of(network: nn.Module) -> Sides | None:
    """The two adapters of a network, if it has them."""
    return network.__dict__.get(ATTRIBUTE)


class Sides:
    """The two halves of a network's LoRA.

    Args:
        network: without adapters yet.
        config: of the run.
    """

    def __init__(self, network: nn.Module, config: RunConfig) -> None:
        self.network, self.lora = network, config.lora
        adapters.attach(network, lora_of(config), seed=config.seed)
        self.layers: dict[str, Any] = dict(adapters.lora_layers(network, adapters.DEFAULT))
        for path, layer in self.layers.items():
            down = layer.lora_A[adapters.DEFAULT]
            if config.lora.init.lower() == "gaussian":  # its deviation is one over the rank
                down.weight.data *= 2
            down.register_forward_hook(self._hook(path))
        network.__dict__[ATTRIBUTE] = self

    def _hook(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            rows, axis = len(output), 1 if isinstance(module, nn.Conv2d) else output.ndim - 1
            if rows % 2:
                raise RuntimeError(
                    f"{path}: {rows} rows; expected chosen and rejected ones, as many of each (this network is not to be "
                    "sampled from: see diffalign.sides)"
                )
            ranks = output.shape[axis] // 2
            side = output.new_zeros(rows, 2 * ranks)
            side[: rows // 2, :ranks] = 1
            side[rows // 2 :, ranks:] = 1
            shape = [1] * output.ndim
            shape[0], shape[axis] = rows, 2 * ranks
            return output * side.view(shape)

        return hook

    @contextmanager
    def separated(self) -> Iterator[None]:
        """Within, `CHOSEN` is the network's adapter and `REJECTED` is attached, both as they are now; nothing is trained."""
        self._attach()
        with torch.no_grad():
            for layer in self.layers.values():
                ranks = layer.r[adapters.DEFAULT] // 2
                for name, half in ((CHOSEN, slice(0, ranks)), (REJECTED, slice(ranks, None))):
                    layer.lora_A[name].weight.copy_(layer.lora_A[adapters.DEFAULT].weight[half])
                    layer.lora_B[name].weight.copy_(layer.lora_B[adapters.DEFAULT].weight[:, half])
        adapters.use_adapters(self.network, [CHOSEN], [1.0])
        try:
            yield
        finally:
            adapters.use_adapters(self.network, [adapters.DEFAULT], [1.0])

    def _attach(self) -> None:
        if CHOSEN in adapters.adapter_names(self.network):
            return
        trainable = [(p, p.requires_grad) for p in self.network.parameters()]
        rank, alpha = self.lora.rank, self.lora.alpha
        for name in (CHOSEN, REJECTED):
            adapters.attach_modules(
                self.network,
                dict.fromkeys(self.layers, rank),
                dict.fromkeys(self.layers, rank if alpha is None else alpha),
                use_rslora=self.lora.use_rslora,
                name=name,
            )
            for parameter in adapters.parameters(self.network, name):
                parameter.requires_grad_(False)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)

    def save(self, run_dir: Path, *, family: str, metadata: dict[str, str]) -> dict[str, Path]:
        """Write both adapters: that of chosen images as any run's, that of rejected ones into the folder `negative`.

        Returns:
            The files of the first by style.
        """
        with self.separated():
            files = export.save_lora(
                self.network,
                None,
                run_dir,
                family=family,
                name=CHOSEN,
                metadata=metadata | {"role": "positive", PARTNER: "negative"},
            )
            export.save_lora(
                self.network,
                None,
                run_dir / FOLDER,
                family=family,
                name=REJECTED,
                metadata=metadata | {"role": "negative", PARTNER: "positive"},
            )
        return files
