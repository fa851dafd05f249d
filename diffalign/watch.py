"""Looking after a run while it trains: the evaluation's rewards on a few prompts, the best step so far, and when to stop.

Rewards that are trained on rise long after the pictures have become worse. What is watched here is sampled as the final
evaluation samples, from the same noise at every step and for the base, so that small changes show.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from diffalign import adapters, rewards
from diffalign.config import EvaluationConfig
from diffalign.evaluate import pixel_distance, score_all
from diffalign.files import atomic_write_bytes
from diffalign.sampling import Sampler

FOLDER, FILE = "best", "adapter.safetensors"


class Watch:
    """Measures the adapter every so many steps (main process).

    Args:
        config: what to sample and to score, what is kept, and how long to wait for a better step.
        sampler: over the evaluation prompts.
        device: of the rewards.
        run_dir: the best adapter is kept in its folder `best`.
    """

    def __init__(self, config: EvaluationConfig, sampler: Sampler, device: torch.device | str, run_dir: Path) -> None:
        self.config, self.sampler, self.device = config, sampler, device
        self.path = run_dir / FOLDER / FILE
        self.shown = range(min(config.watch_prompts, len(sampler.prompts)))
        self.best: tuple[int, float] | None = None
        self.waited = 0
        self._base: tuple[Tensor, dict[str, Tensor]] | None = None
        self._models: dict[str, rewards.Reward] = {}

    @property
    def enough(self) -> bool:
        """Whether nothing better has come for `patience` evaluations."""
        return 0 < self.config.patience <= self.waited

    def measure(self, step: int, network: nn.Module) -> dict[str, float]:
        """Sample, score, and keep the adapter if it is the best so far.

        Args:
            step: of the run.
            network: bare, with the adapter that is measured.

        Returns:
            By name: "eval/<reward>" the mean, "eval/<reward>/gain" against the base, "eval/drift" as in `Evaluation`, and
            "eval/best_step".
        """
        if self._base is None:
            images = self._images(adapters=False)
            self._base = images, self._scores(images)
        base, before = self._base
        images = self._images(adapters=True)
        now = self._scores(images)
        row = {"eval/drift": pixel_distance(base, images)}
        for name, score in now.items():
            row |= {f"eval/{name}": float(score.mean()), f"eval/{name}/gain": float((score - before[name]).mean())}
        if self.config.keep_best is not None:
            self._keep(step, float(now[self.config.keep_best].mean()), network)
            assert self.best is not None, "just set"
            row["eval/best_step"] = float(self.best[0])
        return row

    def _keep(self, step: int, value: float, network: nn.Module) -> None:
        if self.best is not None and value <= self.best[1]:
            self.waited += 1
            return
        self.best, self.waited = (step, value), 0
        self.path.parent.mkdir(exist_ok=True)
        atomic_write_bytes(self.path, save(adapters.state_dict(network)))

    def restore(self, network: nn.Module) -> int | None:
        """Put the best adapter back; returns its step, or None where none is kept."""
        if self.best is None:
            return None
        adapters.load_state_dict(network, load_file(self.path))
        return self.best[0]

    def _images(self, *, adapters: bool) -> Tensor:
        return self.sampler.images(self.shown, seed=self.config.seed, adapters=adapters)

    def _scores(self, images: Tensor) -> dict[str, Tensor]:
        prompts = [self.sampler.prompts[i] for i in self.shown]
        for name in self.config.rewards:
            if name not in self._models:
                self._models[name] = rewards.load(name, device=self.device)
        return {name: score_all(self._models[name], images, prompts) for name in self.config.rewards}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores; the best adapter itself is a file of the run."""
        return {} if self.best is None else {"best": list(self.best), "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on; without the file of the best adapter, as if there had been none."""
        if state and self.path.is_file():
            self.best, self.waited = (int(state["best"][0]), float(state["best"][1])), int(state["waited"])
