"""Training on texts: tokenised data or answers sampled on the way, token log-probabilities, and texts to read at the end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from diffalign import plugins
from diffalign._model_card_text import write_text_card
from diffalign.config import DataConfig, RunConfig
from diffalign.data.loader import micro_batches
from diffalign.data.prepare import REPORT
from diffalign.errors import DataError
from diffalign.families import NETWORK
from diffalign.families.causal_lm import CausalLM
from diffalign.files import atomic_write_text
from diffalign.jobs import Job, weight_metric
from diffalign.losses import Layout, LossOut, Needs
from diffalign.metrics import StepMetrics
from diffalign.preflight import online
from diffalign.references import Reference
from diffalign.report import write_report
from diffalign.text import evaluate
from diffalign.text.batch import TextBatch, TextExample
from diffalign.text.dataset import TextData, TextMicroBatches, make_plan
from diffalign.text.export import save_peft
from diffalign.text.generation import check_prompts
from diffalign.text.policy import TextPolicy
from diffalign.text.prepare import prepare_text
from diffalign.text.rollouts import Rollouts, prompts_per_step

log = logging.getLogger(__name__)
ANSWERS = Needs(layout=("items",), reference=False)  # as data: single answers, as they are
PROMPTS = Needs(layout=("groups",), reference=False)  # as data: a prompt and its columns
HELD_OUT = "held_out"
WORLD_HELD_OUT = "text_world_heldout"
ROLLOUT_METRICS = ("length", "finished", "reward")  # of the sampled answers
MEMORY_ITEMS = 256  # of each set, for the recall before and after unlearning


class TextJob(Job):
    """A causal language model on text preferences, forget sets, or answers that it samples itself."""

    family: CausalLM
    unit = "samples"

    def prepare(self) -> None:
        config, training = self.config, self.config.training
        assert training.train_batch_size != "auto", "resolve_auto has chosen"
        self.family.load_tokenizer(config.text.chat_template)
        self.online = online(config)
        if self.online:
            prompts_per_step(config)  # refuses steps that are no whole number of groups
        self.data, report = prepare_text(config, self.family, self.accelerator, needs=PROMPTS if self.online else None)
        if self.accelerator.is_main_process:
            report.write(self.run_dir / REPORT)
        self.kept, self.kept_out = self.data.split(config.evaluation.held_out_fraction)
        self.count, self.held_out = len(self.kept), len(self.kept_out)
        self.prompts = self._evaluation_prompts()
        if self.kept_out and config.evaluation.prompts != HELD_OUT and (self.online or not self._held_out_pairs()):
            log.warning(
                "evaluation.held_out_fraction: %d samples are kept out of training, and nothing is measured on them: they "
                "are no pairs, and evaluation.prompts is not 'held_out'",
                self.held_out,
            )

    def _held_out_pairs(self) -> list[int]:
        return [i for i in self.kept_out if self.data.kinds[i] == "pair"]

    def _evaluation_prompts(self) -> list[TextExample]:
        """What is answered at the end: held-out prompts of the data, a file, or the text world's own."""
        config = self.config.evaluation
        if not config.prompts:
            return []
        if config.prompts == HELD_OUT:
            examples = unique_prompts(self.data, self.kept_out)
        else:
            examples = self.read_evaluation_prompts()
        return examples[: config.num_prompts]

    def read_evaluation_prompts(self) -> list[TextExample]:
        """The prompts of `evaluation.prompts`, unless they are held-out ones of the data."""
        config = self.config
        spec = config.evaluation.prompts
        if spec == WORLD_HELD_OUT:
            from diffalign.world.text import datasets

            path = self.run_dir / "data" / "evaluation.jsonl"
            if self.accelerator.is_main_process:
                datasets.write_prompts(
                    path, prompts=config.evaluation.num_prompts, seed=config.evaluation.seed, held_out=True
                )
            self.accelerator.wait_for_everyone()
        elif isinstance(spec, str):
            path = Path(spec)
        else:
            path = self.run_dir / "data" / "evaluation.jsonl"
            path.parent.mkdir(exist_ok=True)
            rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in spec)
            atomic_write_text(path, rows)
        return read_prompts(config, self.family, path)

    def identity(self) -> dict[str, Any]:
        prompts = "\n".join(self.data.ids[i] for i in self.kept)
        return {
            "effective_batch": self.effective_batch,
            "samples": self.count,
            "ids": hashlib.sha256(prompts.encode()).hexdigest()[:16],
        }

    def load(self) -> nn.Module:
        self.family.load(NETWORK)
        self.family.configure(self.config.training)
        return self.family.network

    def check_room(self, prompts: list[TextExample]) -> None:
        """Refuse prompts that leave no room for an answer now, and not when their turn comes.

        Raises:
            DataError: with the longest.
        """
        check_prompts(self.family.network, [e.rows[0].ids[: e.rows[0].start] for e in prompts], self.config.generation)

    def open_policy(self, network: nn.Module, bare: nn.Module, reference: Reference | None = None) -> None:
        """Take the network for scoring and sampling alone; `evaluate` needs no more."""
        autocast = self.accelerator.autocast if self.config.training.mixed_precision != "no" else nullcontext
        self.policy = TextPolicy(self.family, network, bare, autocast, self.config.text, reference)

    def start(self, network: nn.Module, bare: nn.Module, reference: Reference) -> None:
        config, training = self.config, self.config.training
        self.open_policy(network, bare, reference)
        self.check_room(self.prompts)
        self.estimator = self.objective.estimator()
        self.rollouts = None
        if self.online:
            asked = unique_prompts(self.data, self.kept)
            self.check_room(asked)
            self.rollouts = Rollouts(config, asked, self.policy, self.accelerator, self.family.tokenizer)
            return
        assert training.train_batch_size != "auto", "resolve_auto has chosen"
        plan = make_plan(self.data, self.kept, training.train_batch_size, config.seed)
        self.dataset = TextMicroBatches(
            self.data,
            plan,
            pad_id=self.family.pad_id,
            needs=self.objective.needs,
            micro_batches_per_step=training.gradient_accumulation_steps * self.accelerator.num_processes,
        )

    def initial_loss(self) -> float | None:
        return super().initial_loss() if self.data.plain else None

    def passes(self) -> float:
        return super().passes() if self.rollouts is None else self.rollouts.passes()

    def micro_batches(self, first_step: int) -> Iterator[TextBatch]:
        if self.rollouts is not None:
            yield from self.rollouts.micro_batches(first_step)
            return
        training, world = self.config.training, self.accelerator.num_processes
        per_step = training.gradient_accumulation_steps * world
        first = first_step * per_step + self.accelerator.process_index
        numbers = range(first, training.max_train_steps * per_step, world)
        for batch in micro_batches(self.dataset, numbers, training.dataloader_workers):
            yield batch.to(self.accelerator.device)

    def loss(self, batch: TextBatch) -> LossOut:
        scores = self.policy.scores(batch, self.objective)
        layout = batch.layout
        try:
            stats = None if self.estimator is None else self.estimator.update(scores, layout, self.accelerator.gather)
            out = self.objective(scores, layout, stats)
        except ValueError as error:  # how the losses say that something they read is not there
            raise DataError(
                f"objective {self.objective.name!r} cannot be computed on these data: {error}; see docs/how-to/text-data.md"
            ) from error
        weight_metric(out, *[part.weight for part in (layout.pairs, layout.items) if part is not None])
        if self.rollouts is not None:
            told = {name: value[: len(value) - self._mismatched(layout)] for name, value in batch.extra.items()}
            out.metrics.update({name: told[name] for name in ROLLOUT_METRICS if name not in out.metrics})
            # -log p of a sampled token is an unbiased estimate of the entropy while the policy is the one that sampled.
            if scores.length is not None and "groups" in self.objective.needs.layout:
                out.metrics["entropy"] = -scores.theta.detach() / scores.length
            if layout.pairs is not None and layout.pairs.reward_w is not None and layout.pairs.reward_l is not None:
                out.metrics["reward/best"] = layout.pairs.reward_w[:, 0]
                out.metrics["reward/worst"] = layout.pairs.reward_l[:, 0]
        return out

    @staticmethod
    def _mismatched(layout: Layout) -> int:
        """Rows at the end that are made up, and no answers."""
        return 0 if layout.items is None or layout.items.mismatched is None else len(layout.items.mismatched)

    def record(self, metrics: StepMetrics, batch: TextBatch, out: LossOut) -> None:
        metrics.add(out)

    def sample(self, step: int, *, adapters: bool) -> None:
        """Write the answers to the first prompts for the report: the same prompts and noise at every step."""
        shown = self.prompts[: self.config.evaluation.grid_prompts]
        if not shown:
            return
        answers = evaluate.sample(
            self.policy,
            shown,
            self.config.generation,
            seed=self.config.evaluation.seed,
            adapters=adapters,
            title=f"samples of step {step}",
        )
        texts = [self.family.tokenizer.decode(answer.ids, skip_special_tokens=True) for answer in answers]
        self._write_samples(step, [example.prompt for example in shown], texts)

    def _write_samples(self, step: int, prompts: list[str], texts: list[str]) -> None:
        path = self.run_dir / "samples" / "texts.json"
        path.parent.mkdir(exist_ok=True)
        known = json.loads(path.read_text()) if path.is_file() and step else {"answers": {}}
        known["prompts"] = prompts
        known["answers"][str(step)] = texts
        atomic_write_text(path, json.dumps(known, indent=1, ensure_ascii=False))

    def finish(self, step: int, facts: dict[str, Any]) -> dict[str, Any] | None:
        config = self.config
        objective = {"name": plugins.name_of(type(self.objective)), **self.summary()}
        metadata = {"objective": str(objective["name"]), "step": str(step), "seed": str(config.seed)}
        save_peft(self.policy.bare, config.lora, self.run_dir, config.model.pretrained, metadata)
        result = self.evaluate(self.run_dir)
        if self.prompts and "metric" not in result:
            self.sample(step, adapters=True)
        if result:
            result |= facts | {"objective": objective, "seed": config.seed}
            atomic_write_text(self.run_dir / "result.json", json.dumps(result, indent=1))
        if self.rollouts is not None and self.rollouts.shown:
            (self.run_dir / "samples").mkdir(exist_ok=True)
            shown = json.dumps(self.rollouts.shown, indent=1, ensure_ascii=False)
            atomic_write_text(self.run_dir / "samples" / "rollouts.json", shown)
        asked = self.prompts[0] if self.prompts else self.data.example(self.kept[0])
        write_text_card(
            self.run_dir,
            config,
            result or None,
            summary=self.summary(),
            prompt=asked.prompt,
            chat=self._conversational(asked),
        )
        report = write_report(self.run_dir)
        log.info("adapter %s; report %s", self.run_dir / "adapter_model.safetensors", report)
        return result or None

    def evaluate(self, folder: Path | None = None) -> dict[str, Any]:
        """The numbers of `result.json`: rewards on prompts, held-out accuracy, and memory of forget and retain sets.

        Args:
            folder: where `scores.json` and `samples/comparison.json` are written; None writes nothing.
        """
        config = self.config.evaluation
        result: dict[str, Any] = {}
        if not self.online and self.kept_out:
            pairs = [self.data.example(i) for i in self._held_out_pairs()]
            accuracy = evaluate.held_out_accuracy(self.policy, pairs, reference=self.objective.reads_reference())
            if accuracy is not None:
                result |= {
                    "held_out_implicit_acc": accuracy.mean,
                    "held_out_implicit_acc_ci95": [accuracy.ci_low, accuracy.ci_high],
                    "held_out_pairs": accuracy.count,
                }
        if not config.at_end:
            return result
        if self.data.retain is not None:
            result |= self._memory(self.data)
        if self.prompts and config.rewards:
            evaluation, samples = evaluate.compare(self.policy, self.prompts, config, self.config.generation)
            if folder is not None:
                atomic_write_text(folder / "scores.json", json.dumps(evaluation.scores))
                rows = [dataclasses.asdict(sample) for sample in samples]
                (folder / "samples").mkdir(exist_ok=True)
                atomic_write_text(
                    folder / "samples" / "comparison.json", json.dumps(rows, indent=1, ensure_ascii=False)
                )
            result = evaluation.headline() | result
        return result

    def _memory(self, data: TextData) -> dict[str, Any]:
        assert data.retain is not None, "asked for unlearning only"
        sides = {
            keep: [data.example(i) for i in self.kept if bool(data.retain[i]) == keep][:MEMORY_ITEMS]
            for keep in (False, True)
        }
        # A pair of an alternate and the answer to forget is about that answer.
        forget = [dataclasses.replace(e, kind="item", rows=e.rows[-1:]) for e in sides[False]]
        sets = {"forget": forget, "retain": sides[True]}
        if self.config.data.world_text is not None:
            sets |= {f"{name}_reworded": self._reworded(forget=name == "forget") for name in ("forget", "retain")}
        return evaluate.unlearning_result(self.policy, sets)

    def _reworded(self, *, forget: bool) -> list[TextExample]:
        """The text world's facts, asked for in words that no training set has."""
        from diffalign.world.text import datasets

        path = self.run_dir / "data" / f"{'forget' if forget else 'retain'}_reworded.jsonl"
        datasets.write_facts(path, forget=forget, held_out=True)
        reading = DataConfig(format="text", sources=(str(path),), drop_duplicates=False)
        found, _ = prepare_text(dataclasses.replace(self.config, data=reading), self.family, needs=ANSWERS)
        return [found.example(i) for i in range(len(found))][:MEMORY_ITEMS]

    def _conversational(self, example: TextExample) -> bool:
        """Whether a prompt was rendered by a chat template: as plain text, its tokens would end what was tokenised."""
        row = example.rows[0]
        plain = self.family.tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
        seen = min(len(plain), row.start)
        return bool(seen) and list(row.ids[row.start - seen : row.start]) != plain[len(plain) - seen :]

    def state_dict(self) -> dict[str, Any]:
        parts = {"estimator": self.estimator, "rollouts": self.rollouts}
        states = {name: part.state_dict() for name, part in parts.items() if part is not None}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.estimator is not None and "estimator" in state:
            self.estimator.load_state_dict(state["estimator"])
        if self.rollouts is not None and "rollouts" in state:
            self.rollouts.load_state_dict(state["rollouts"])


def read_prompts(config: RunConfig, family: CausalLM, path: Path) -> list[TextExample]:
    """The prompts of a file, tokenised as a run's data are."""
    reading = DataConfig(format="text", sources=(str(path),), rename=config.data.rename, drop_duplicates=False)
    found, _ = prepare_text(dataclasses.replace(config, data=reading), family, needs=PROMPTS)
    return [found.example(i) for i in range(len(found))]


def unique_prompts(data: TextData, indices: list[int]) -> list[TextExample]:
    """The first example of every prompt."""
    seen: set[str] = set()
    found = []
    for i in indices:
        if data.prompts[i] not in seen:
            seen.add(data.prompts[i])
            found.append(data.example(i))
    return found
