"""Jobs: what the trainer must know about a modality.

The trainer owns the loop, the optimiser, checkpoints and metrics. A job owns the data, the policy, the scores and what
people look at in the end. There is one for images, one for texts, and one for reward models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffalign import adapters
from diffalign.config import RunConfig
from diffalign.families import Family
from diffalign.losses import LossOut, Objective
from diffalign.references import Reference
from diffalign.summary import objective_summary

if TYPE_CHECKING:
    from diffalign.metrics import StepMetrics


class Job(ABC):
    """One run's data, policy and outputs.

    Args:
        config: resolved.
        accelerator: devices and processes.
        family: of the model; nothing is loaded yet.

    Attributes:
        unit: what a sample is, for people.
        count: samples trained on.
        held_out: samples kept out of training.
        own_gradients: its forwards go past the wrapper that averages gradients over processes, so the trainer has to.
    """

    unit: str
    count: int = 0
    held_out: int = 0
    own_gradients: bool = False

    def __init__(self, config: RunConfig, accelerator: Accelerator, family: Family) -> None:
        self.config, self.accelerator, self.family = config, accelerator, family
        self.run_dir = Path(config.output_dir)
        self.objective: Objective = config.objective

    @property
    def effective_batch(self) -> int:
        """Samples per optimiser step over all processes."""
        return self.micro_batch * self.config.training.gradient_accumulation_steps * self.accelerator.num_processes

    @property
    def micro_batch(self) -> int:
        """Samples per micro-batch and process."""
        size = self.config.training.train_batch_size
        assert size != "auto", "resolved before"
        return size

    @abstractmethod
    def prepare(self) -> None:
        """Read the data, count what cannot be used, and set `count` and `held_out`; no network is loaded yet."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must be the same when a run is resumed."""

    @abstractmethod
    def load(self) -> nn.Module:
        """The network, configured for training, without adapters."""

    def attach(self, network: nn.Module) -> list[nn.Parameter]:
        """Make trainable what is trained, and return it: by default a fresh adapter."""
        return adapters.attach(network, self.config.lora, seed=self.config.seed)

    @abstractmethod
    def start(self, network: nn.Module, bare: nn.Module, reference: Reference) -> None:
        """Take the prepared network and its reference; everything below may be called from now on."""

    @abstractmethod
    def micro_batches(self, first_step: int) -> Iterator[Any]:
        """This process's micro-batches from an optimiser step on, in order."""

    @abstractmethod
    def loss(self, batch: Any) -> LossOut:
        """The objective on one micro-batch."""

    @abstractmethod
    def record(self, metrics: StepMetrics, batch: Any, out: LossOut) -> None:
        """Add one micro-batch to the step's metrics."""

    def penalties(self, step: int) -> dict[str, Tensor]:
        """Terms of the parameters alone that are added to the loss of an optimiser step, counted from 0, by metric.

        Asked for once a step and on every process; scalars with gradient.
        """
        return {}

    @property
    def num_timesteps(self) -> int | None:
        """Of the schedule, for metrics by timestep; None where there are none."""
        return None

    def initial_loss(self) -> float | None:
        """The loss of an untouched adapter, where it is known: margins and soft labels may move it."""
        return self.objective.initial_loss(self.family.kind)

    def summary(self) -> dict[str, float | str]:
        """Numbers worth printing and storing with every checkpoint."""
        return objective_summary(self.config, self.family.kind)

    def passes(self) -> float:
        """How often the run sees all of its data."""
        return self.config.training.max_train_steps * self.effective_batch / self.count

    def sample(self, step: int, *, adapters: bool) -> None:
        """Write samples of a fixed set of prompts for the report (main process); does nothing without prompts."""
        return

    def watches(self, step: int) -> bool:
        """Whether the run is looked at after a step, the same on every process."""
        every = self.config.evaluation.every
        return bool(every) and (step % every == 0 or step == self.config.training.max_train_steps)

    def watch(self, step: int) -> dict[str, float]:
        """Measure the adapter (main process); values for the step's row of metrics."""
        return {}

    @property
    def enough(self) -> bool:
        """Whether training should end before its last step; known to the main process."""
        return False

    def after_update(self, step: int) -> None:
        """Called after every update of the optimiser, before moving averages and references see the parameters."""
        return

    def after_step(self, step: int) -> None:
        """Called after every optimiser step."""
        return

    @abstractmethod
    def finish(self, step: int, facts: dict[str, Any]) -> dict[str, Any] | None:
        """Write adapter files, evaluation, report and model card (main process), and return the content of `result.json`."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores of the job."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        return


def open_job(config: RunConfig, accelerator: Accelerator, family: Family) -> Job:
    """The job of a family's modality."""
    if family.modality == "text":
        from diffalign.jobs.text import TextJob

        return TextJob(config, accelerator, family)
    if family.modality == "reward":
        from diffalign.jobs.reward import RewardJob

        return RewardJob(config, accelerator, family)
    from diffalign.jobs.image import ImageJob

    return ImageJob(config, accelerator, family)


def weight_metric(out: LossOut, *weights: Tensor | float) -> None:
    """Note the data's weights, so that the loss can be compared with its initial value.

    In every micro-batch, whatever they are: processes must report the same metrics. `StepMetrics` leaves a mean of 1 out.
    An objective that reports weights of its own keeps them.
    """
    found = [weight.detach().flatten() for weight in weights if isinstance(weight, Tensor)]
    if found and "weight" not in out.metrics:
        out.metrics["weight"] = torch.cat(found)
