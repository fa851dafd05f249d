"""Training on images: pairs from the latent cache, scores from denoising errors, grids and rewards at the end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from diffalign.data.batch import PairBatch
from diffalign.data.loader import BatchPlan, PairMicroBatches, micro_batches
from diffalign.data.pipeline import is_held_out
from diffalign.data.prepare import REPORT, prepare
from diffalign.data.prompts import load_prompts
from diffalign.errors import ConfigError
from diffalign.families import NETWORK, DenoisingFamily
from diffalign.hardware import configure_network
from diffalign.jobs import Job, weight_metric
from diffalign.losses import EXO, LossOut
from diffalign.metrics import StepMetrics
from diffalign.outputs import Outputs
from diffalign.policy import Policy
from diffalign.references import Reference
from diffalign.sampling import Sampler
from diffalign.summary import objective_summary


class ImageJob(Job):
    """A denoising family on image preferences."""

    unit = "pairs"
    family: DenoisingFamily

    def prepare(self) -> None:
        config, training = self.config, self.config.training
        prepared = prepare(config, self.family, self.accelerator)
        if self.accelerator.is_main_process:
            prepared.report.write(self.run_dir / REPORT)
        fraction = config.evaluation.held_out_fraction
        self.data = prepared.data
        self.kept_out = [i for i, prompt in enumerate(self.data.prompts) if is_held_out(prompt, fraction)]
        self.kept = sorted(set(range(len(self.data))) - set(self.kept_out))
        self.count, self.held_out = len(self.kept), len(self.kept_out)
        sizes = self.data.target_sizes
        assert training.train_batch_size != "auto", "resolve_auto has chosen"
        self.plan = BatchPlan(self.kept, [sizes[i] for i in self.kept], training.train_batch_size, config.seed)
        if config.denoising.timestep_min >= self.family.schedule.num_timesteps:
            raise ConfigError(
                f"denoising.timestep_min: got {config.denoising.timestep_min}; the model has timesteps 0 to "
                f"{self.family.schedule.num_timesteps - 1}"
            )
        self.dataset = PairMicroBatches(self.data, self.plan, config.denoising, self.family, config.seed)
        self.elements = self.dataset.example(self.kept[0], 0).noise.numel()
        self.autocast = self.accelerator.autocast if training.mixed_precision != "no" else nullcontext
        self.sampler = self._sampler()

    def _sampler(self) -> Sampler | None:
        config = self.config
        if not config.evaluation.prompts or not self.accelerator.is_main_process:
            return None
        prompts = load_prompts(config.evaluation.prompts, config.evaluation.num_prompts)
        return Sampler(self.family, prompts, config.sampling, config.data.resolution, self.autocast)

    def identity(self) -> dict[str, Any]:
        prompts = "\n".join(self.data.prompts[i] for i in self.kept)
        return {
            "effective_batch": self.effective_batch,
            "micro_batch": self.config.training.train_batch_size if len(self.plan.groups) > 1 else None,
            "pairs": self.count,
            "prompts": hashlib.sha256(prompts.encode()).hexdigest()[:16],
        }

    def load(self) -> nn.Module:
        self.family.load(NETWORK)
        configure_network(self.family.network, self.config.training)
        return self.family.network

    def start(self, network: nn.Module, bare: nn.Module, reference: Reference) -> None:
        self.policy = Policy(self.family, network, bare, self.autocast, self.config.denoising, reference)
        self.estimator = self.objective.estimator()
        self.outputs = Outputs(
            self.config, self.run_dir, self.family, self.sampler, summary=self.summary(), latent_elements=self.elements
        )

    def micro_batches(self, first_step: int) -> Iterator[PairBatch]:
        training, world = self.config.training, self.accelerator.num_processes
        assert training.train_batch_size != "auto", "resolve_auto has chosen"
        first = first_step * self.effective_batch // training.train_batch_size + self.accelerator.process_index
        last = training.max_train_steps * training.gradient_accumulation_steps * world
        for batch in micro_batches(self.dataset, range(first, last, world), training.dataloader_workers):
            yield batch.to(self.accelerator.device)

    def loss(self, batch: PairBatch) -> LossOut:
        scores, layout = self.policy.scores(batch, self.objective)
        stats = None if self.estimator is None else self.estimator.update(scores, layout, self.accelerator.gather)
        out = self.objective(scores, layout, stats)
        weight_metric(out, batch.weight)
        return out

    def record(self, metrics: StepMetrics, batch: PairBatch, out: LossOut) -> None:
        times = batch.t if len(out.per_item) == len(batch.t) else torch.cat([batch.t, batch.t])
        metrics.add(out, times if len(out.per_item) == len(times) else None)

    def initial_loss(self) -> float | None:
        soft = self.config.data.ties == "soft" and isinstance(self.objective, EXO)
        return None if soft else super().initial_loss()

    @property
    def num_timesteps(self) -> int | None:
        return self.family.schedule.num_timesteps

    def summary(self) -> dict[str, float | str]:
        return objective_summary(self.config, self.family.kind, self.elements)

    def sample(self, step: int, *, adapters: bool) -> None:
        if self.sampler is not None:
            self.outputs.sample_grid(step, adapters=adapters)

    def finish(self, step: int, facts: dict[str, Any]) -> dict[str, Any] | None:
        return self.outputs.finish(self.policy, self.dataset, self.kept_out, step=step, facts=facts)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.estimator is None else self.estimator.state_dict()

    def load_state_dict(self, state: Any) -> None:
        if self.estimator is not None:
            self.estimator.load_state_dict(state)
