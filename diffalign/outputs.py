"""What a run leaves behind: sample grids, adapter files, evaluation, report and model card."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from diffalign import __version__, delta_files, evaluate, export, plugins, sides, user_branches
from diffalign.config import RunConfig
from diffalign.data.loader import PairMicroBatches
from diffalign.families import DenoisingFamily
from diffalign.files import atomic_write_text
from diffalign.model_card import write_card
from diffalign.policy import Policy
from diffalign.preferences import said
from diffalign.report import write_report
from diffalign.sampling import Sampler, save_png
from diffalign.statistics import Estimate

log = logging.getLogger(__name__)


def held_out_result(accuracy: Estimate | None) -> dict[str, Any]:
    """The keys of `result.json` about held-out pairs."""
    if accuracy is None:
        return {}
    return {
        "held_out_implicit_acc": accuracy.mean,
        "held_out_implicit_acc_ci95": [accuracy.ci_low, accuracy.ci_high],
        "held_out_pairs": accuracy.count,
    }


class Outputs:
    """Writes everything but checkpoints and metrics.

    Args:
        config: resolved.
        run_dir: the run's folder.
        family: the model.
        sampler: over the evaluation prompts, or None without any.
        summary: the objective's numbers.
        latent_elements: C*h*w of one latent.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        family: DenoisingFamily,
        sampler: Sampler | None,
        *,
        summary: dict[str, float | str],
        latent_elements: int,
    ) -> None:
        self.config, self.run_dir, self.family, self.sampler = config, run_dir, family, sampler
        self.summary, self.latent_elements = summary, latent_elements

    def sample_grid(self, step: int, *, adapters: bool, images: torch.Tensor | None = None) -> None:
        """Write the images of the first prompts for the report: the same prompts and noise at every step."""
        assert self.sampler is not None, "grids need prompts"
        shown = range(min(self.config.evaluation.grid_prompts, len(self.sampler.prompts)))
        if images is None:
            images = self.sampler.images(shown, seed=self.config.evaluation.seed, adapters=adapters)
        folder = self.run_dir / "samples" / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        names = []
        for i in shown:
            path = folder / f"{i:03d}.png"
            save_png(images[i], path, self.family.frames_per_second)
            names.append(path.relative_to(self.run_dir).as_posix())
        index_path = self.run_dir / "samples" / "index.json"
        index = json.loads(index_path.read_text()) if index_path.is_file() and step else {"files": {}}
        index["prompts"] = [self.sampler.prompts[i] for i in shown]
        index["files"][str(step)] = names
        index["steps"] = sorted(int(s) for s in index["files"])
        atomic_write_text(index_path, json.dumps(index, indent=1))

    def finish(
        self,
        policy: Policy,
        dataset: PairMicroBatches | None,
        held_out: Sequence[int],
        *,
        step: int,
        facts: dict[str, Any],
        more: Callable[[], dict[str, Any]] = dict,
    ) -> dict[str, Any] | None:
        """Adapter files, evaluation, `result.json`, report and model card.

        Args:
            policy: with the trained adapter.
            dataset, held_out: pairs that were kept out.
            step: number of the last step.
            facts: of the training, for `result.json`.
            more: measures further results, when the adapter is written.

        Returns:
            The content of `result.json`; None if the config asks for no evaluation.
        """
        config = self.config
        if (branch := user_branches.of(policy.bare)) is not None:
            files = {"users": self.run_dir / user_branches.FILE_NAME}
            known = {"family": config.model.family}
            known |= {} if config.users.encoder is None else {"encoder": config.users.encoder}
            user_branches.save(branch, files["users"], self._metadata(step) | known)
        else:
            files = {}
        if config.sparse.method is not None:
            facts_of_file = {"family": config.model.family, "version": __version__} | self._metadata(step)
            files |= {"delta": delta_files.save_delta(policy.bare, self.run_dir, facts=facts_of_file)}
        if (both := sides.of(policy.bare)) is not None:
            files |= both.save(self.run_dir, family=config.model.family, metadata=self._metadata(step))
        elif config.lora.rank or config.lora.experts or config.lora.text_encoder_rank:
            files |= export.save_lora(
                policy.bare, config.lora, self.run_dir, family=config.model.family, metadata=self._metadata(step)
            )
        result = self._held_out(policy, dataset, held_out)
        if self.sampler is not None and config.evaluation.at_end:
            evaluation, _, aligned = evaluate.compare(self.sampler, config.evaluation, self.family.device)
            self.sample_grid(step, adapters=True, images=aligned)
            atomic_write_text(self.run_dir / "scores.json", json.dumps(evaluation.scores))
            result = evaluation.headline() | result
        elif self.sampler is not None:
            self.sample_grid(step, adapters=True)
        result |= more()
        if result:
            objective = {"name": plugins.name_of(type(config.objective)), **self.summary}
            result |= facts | {"objective": objective, "seed": config.seed}
            atomic_write_text(self.run_dir / "result.json", json.dumps(result, indent=1))
        names = {kind: path.name for kind, path in files.items()}
        write_card(self.run_dir, config, result or None, names, latent_elements=self.latent_elements)
        report = write_report(self.run_dir)
        log.info("adapter %s; report %s", next(iter(files.values())), report)
        return result or None

    def _held_out(self, policy: Policy, dataset: PairMicroBatches | None, held_out: Sequence[int]) -> dict[str, Any]:
        if dataset is None or not held_out or not self.config.objective.reads_reference():
            return {}
        if self.config.negative.train == "joint":  # each side has a model of its own: they rank nothing
            return {}
        return held_out_result(evaluate.held_out_accuracy(policy, dataset, held_out))

    def _metadata(self, step: int) -> dict[str, str]:
        metadata = {
            "role": "user" if self.config.users.encoder else "negative" if self.config.negative.alone else "positive",
            "objective": plugins.name_of(type(self.config.objective)),
            "base": self.config.model.pretrained,
            **(
                {"fused": " ".join(Path(p).name for p in self.config.model.adapters)}
                if self.config.model.adapters
                else {}
            ),
            "step": str(step),
            "seed": str(self.config.seed),
            "resolution": str(self.config.data.resolution),
        }
        if rewards := self.config.preference.rewards:
            fixed = self.config.preference.fixed
            metadata["preference"] = said(fixed, rewards) if fixed else ", ".join(rewards)
        return metadata | {name: str(value) for name, value in self.summary.items()}
