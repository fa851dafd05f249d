"""Training a reward model: pairs of pictures, a judge's scores of them, and how often and how surely it is right."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from diffalign import adapters, calibration, plugins, rewards
from diffalign._model_card_reward import write_reward_card
from diffalign.data.batch import Batch
from diffalign.data.encode import EncodedPair
from diffalign.data.facts import ASPECT
from diffalign.data.loader import BatchPlan, PairData, micro_batches
from diffalign.data.pipeline import is_held_out, split_held_out
from diffalign.data.prepare import REPORT, prepare
from diffalign.errors import DataError
from diffalign.families._loading import quiet
from diffalign.families.clip_reward import ClipReward
from diffalign.files import atomic_write_text
from diffalign.jobs import Job, weight_metric
from diffalign.judges import FOLDER, HEAD, JudgeCLIP, Judgement, JudgeSettings, normalised_weights
from diffalign.losses import Layout, LossOut, Pairs, Scores
from diffalign.losses.judging import JudgeObjective
from diffalign.metrics import StepMetrics
from diffalign.references import Reference
from diffalign.report import write_report
from diffalign.reward_math import Statistics, save_statistics
from diffalign.statistics import bootstrap_rate

log = logging.getLogger(__name__)
EVALUATION_PAIRS = 64  # per call
HALF = "calibration"  # salt of the split of the held-out prompts
OVERALL = -1  # in place of an aspect


@dataclass(frozen=True, kw_only=True)
class JudgeBatch(Batch):
    """P pairs, chosen pictures first.

    Attributes:
        ids: of the records.
        pixels: RGB in [0, 1], (2P, 3, H, W): all chosen ones, then all rejected ones in the same order.
        input_ids, mask: of the prompts, (P, L).
        p: probability that the chosen picture is the preferred one, in [1/2, 1], (P,).
        weight: (P,).
        aspect: which aspect or criterion each pair is about, int64 (P,), where there are several; -1: the one score.
    """

    ids: tuple[str, ...]
    pixels: Tensor
    input_ids: Tensor
    mask: Tensor
    p: Tensor
    weight: Tensor
    aspect: Tensor | None = None

    @property
    def prompt(self) -> Tensor:
        """The prompt's row of each picture, (2P,)."""
        return torch.arange(len(self.ids), device=self.pixels.device).repeat(2)


def batch_of(data: PairData, pairs: Sequence[EncodedPair], *, aspects: bool) -> JudgeBatch:
    """Pairs from the cache as a batch."""
    chosen = [0 if pair.p >= 0.5 else 1 for pair in pairs]
    sides = [pair.latents[c] for pair, c in zip(pairs, chosen, strict=True)]
    sides += [pair.latents[1 - c] for pair, c in zip(pairs, chosen, strict=True)]
    tokens = [ClipReward.tokens(data.text(pair.prompt)) for pair in pairs]
    return JudgeBatch(
        ids=tuple(pair.id for pair in pairs),
        pixels=torch.stack(sides).float(),
        input_ids=torch.stack([ids for ids, _ in tokens]),
        mask=torch.stack([mask for _, mask in tokens]),
        p=torch.tensor([max(pair.p, 1 - pair.p) for pair in pairs], dtype=torch.float32),
        weight=torch.tensor([pair.weight for pair in pairs], dtype=torch.float32),
        aspect=torch.tensor([int(pair.extra.get(ASPECT, OVERALL)) for pair in pairs]) if aspects else None,
    )


class JudgeMicroBatches(Dataset[JudgeBatch]):
    """Micro-batches by number."""

    def __init__(self, data: PairData, plan: BatchPlan, *, aspects: bool) -> None:
        self.data, self.plan, self.aspects = data, plan, aspects

    def __getitem__(self, k: int) -> JudgeBatch:
        pairs = [self.data.pair(index) for index, _ in self.plan.micro_batch(k)]
        return batch_of(self.data, pairs, aspects=self.aspects)


class RewardJob(Job):
    """A reward model on image preferences."""

    unit = "pairs"
    family: ClipReward
    objective: JudgeObjective

    def prepare(self) -> None:
        config = self.config
        size = self.family.image_size
        if config.data.resolution != size:
            raise DataError(f"data.resolution: got {config.data.resolution}; the vision tower looks at {size} pixels")
        self.autocast = self.accelerator.autocast if config.training.mixed_precision != "no" else nullcontext
        self.settings = self._settings()
        self.aspects = self.settings.head in ("aspects", "experts")
        prepared = prepare(config, self.family, self.accelerator)
        if self.accelerator.is_main_process:
            prepared.report.write(self.run_dir / REPORT)
        self.data = prepared.data
        self.kept, self.kept_out = split_held_out(self.data.prompts, config.evaluation.held_out_fraction)
        self.count, self.held_out = len(self.kept), len(self.kept_out)
        if self.aspects:
            self._check_aspects()
        sizes = self.data.target_sizes
        self.plan = BatchPlan(self.kept, [sizes[i] for i in self.kept], self.micro_batch, config.seed)
        self.dataset = JudgeMicroBatches(self.data, self.plan, aspects=self.aspects)
        self.before: dict[str, Any] = {}

    def _settings(self) -> JudgeSettings:
        judge, earlier = self.config.judge, self.family.earlier()
        if judge.head is None and earlier is not None:
            return dataclasses.replace(earlier, temperature=self.objective.temperature, facts={})
        head = judge.head or "cosine"
        weights = normalised_weights(judge.aspect_weights, judge.outputs) if head == "aspects" else ()
        return JudgeSettings(
            head=head,
            outputs=judge.outputs,
            aspect_weights=weights,
            temperature=self.objective.temperature,
            criteria=judge.criteria,
            gate_width=judge.gate_width,
            gate_temperature=judge.gate_temperature,
        )

    def _check_aspects(self) -> None:
        outputs = self.settings.outputs
        if beyond := [a for extra in self.data.extras if (a := int(extra.get(ASPECT, OVERALL))) >= outputs]:
            raise DataError(
                f"judge.outputs is {outputs}, and {len(beyond):,} pairs are about aspects up to {max(beyond)} (they count "
                "from 0); set judge.outputs to the number of aspects"
            )

    def identity(self) -> dict[str, Any]:
        prompts = "\n".join(self.data.prompts[i] for i in self.kept)
        return {
            "effective_batch": self.effective_batch,
            "pairs": self.count,
            "prompts": hashlib.sha256(prompts.encode()).hexdigest()[:16],
        }

    def load(self) -> nn.Module:
        tuning = self.config.judge.tuning
        network = self.family.load_network(self.settings, self.config.seed, whole=tuning == "full")
        self.family.configure(self.config.training)
        return network

    def attach(self, network: nn.Module) -> list[nn.Parameter]:
        judge = self.config.judge
        if judge.tuning == "lora":
            adapters.attach(network, self.config.lora, seed=self.config.seed)
        names = [name for name, _ in network.named_parameters() if name.startswith(f"{HEAD}.")]
        if judge.tuning == "full":
            names = [name for name, _ in network.named_parameters() if name != "logit_scale" or judge.logit_scale]
        if names:
            adapters.train_whole(network, names)
        return adapters.parameters(network)

    def start(self, network: nn.Module, bare: nn.Module, reference: Reference) -> None:
        assert isinstance(bare, JudgeCLIP), "made by the family"
        self.network, self.bare = network, bare

    def micro_batches(self, first_step: int) -> Iterator[JudgeBatch]:
        training, world = self.config.training, self.accelerator.num_processes
        per_step = training.gradient_accumulation_steps * world
        numbers = range(
            first_step * per_step + self.accelerator.process_index, training.max_train_steps * per_step, world
        )
        for batch in micro_batches(self.dataset, numbers, training.dataloader_workers):
            yield batch.to(self.accelerator.device)

    def loss(self, batch: JudgeBatch) -> LossOut:
        weight = batch.weight
        if self.settings.head == "experts" and batch.aspect is not None:
            weight = torch.where(batch.aspect == OVERALL, weight, self.config.judge.criteria_weight * weight)
        pairs = Pairs.halves(len(batch.ids), batch.p.device, p=batch.p, weight=weight, aspect=batch.aspect)
        out = self.objective(self._scores(self._judge(self.network, batch), batch), Layout(pairs=pairs))
        weight_metric(out, weight)
        return out

    def _judge(self, network: nn.Module, batch: JudgeBatch) -> Judgement:
        with self.autocast():
            found: Judgement = network(batch.pixels, batch.input_ids, batch.mask, batch.prompt)
        return found

    def _scores(self, found: Judgement, batch: JudgeBatch) -> Scores:
        if self.settings.head == "general":
            return Scores.judged(found.scores[:, 0], found.embedding)
        if batch.aspect is None:
            return Scores.judged(found.scores[:, 0])
        # The one score is the last column, which -1 means.
        columns = torch.cat([found.scores, found.overall[:, None]], 1)
        return Scores.judged(columns.gather(1, (batch.aspect.repeat(2) % columns.shape[1])[:, None])[:, 0])

    def record(self, metrics: StepMetrics, batch: JudgeBatch, out: LossOut) -> None:
        metrics.add(out)

    def initial_loss(self) -> float | None:
        return None

    # ---------------------------------------------------------------- evaluation

    def sample(self, step: int, *, adapters: bool) -> None:
        """Measure the untrained judge on the held-out pairs, once."""
        if step == 0 and self.kept_out:
            accuracy = bootstrap_rate(self._accuracy(self._measure(self.kept_out)))
            self.before = {"accuracy": accuracy.mean, "ci95": [accuracy.ci_low, accuracy.ci_high]}
            log.info("before training: right on %.1f %% of the held-out pairs", 100 * accuracy.mean)

    def watch(self, step: int) -> dict[str, float]:
        return {"eval/accuracy": float(self._accuracy(self._measure(self.kept_out)).mean())}

    @torch.no_grad()
    def _measure(self, indices: Sequence[int]) -> Measured:
        """What the judge says of pairs, as it is now."""
        found: list[tuple[Tensor, ...]] = []
        was_training = self.bare.training
        self.bare.eval()
        for start in range(0, len(indices), EVALUATION_PAIRS):
            pairs = [self.data.pair(i) for i in indices[start : start + EVALUATION_PAIRS]]
            batch = batch_of(self.data, pairs, aspects=self.aspects).to(self.accelerator.device)
            judged = self._judge(self.bare, batch)
            scores = self._scores(judged, batch)
            logits = self.objective.difference(scores, Pairs.halves(len(pairs), batch.p.device))
            found.append((logits / self.objective.temperature, batch.p, judged.overall, judged.embedding))
        self.bare.train(was_training)
        logit, p, overall, embedding = (torch.cat(part).float().cpu() for part in zip(*found, strict=True))
        return Measured(
            logit.double().numpy(), p.double().numpy(), overall, embedding, [self.data.prompts[i] for i in indices]
        )

    def _accuracy(self, measured: Measured) -> Any:
        """Right or wrong, averaged within prompts; ties are left out.

        Raises:
            DataError: there are only ties.
        """
        values = calibration.by_prompt(calibration.correct(measured.logit, measured.p), measured.prompts)
        if not len(values):
            raise DataError("all held-out pairs are ties; hold out more: evaluation.held_out_fraction")
        return values

    def evaluate(self) -> dict[str, Any]:
        """Accuracy, calibration and statistics on the held-out pairs; statistics of training pairs where there are none."""
        measured = self._measure(self.kept_out or self.kept[:1024])
        result: dict[str, Any] = {"statistics": dataclasses.asdict(Statistics.measure(measured.overall))}
        if not self.kept_out:
            return result
        accuracy = bootstrap_rate(self._accuracy(measured))
        result |= {
            "held_out_accuracy": accuracy.mean,
            "held_out_accuracy_ci95": [accuracy.ci_low, accuracy.ci_high],
            "held_out_prompts": accuracy.count,
            "held_out_pairs": len(measured.p),
            "held_out_ties": int((measured.p == 0.5).sum()),
        }
        if self.before:
            result["held_out_accuracy_before"] = self.before["accuracy"]
            result["held_out_accuracy_before_ci95"] = self.before["ci95"]
        result |= self._calibration(measured)
        if self.aspects:
            aspect = np.array([int(self.data.extras[i].get(ASPECT, OVERALL)) for i in self.kept_out])
            right = calibration.correct(measured.logit, measured.p)
            found = [decided_mean(right[aspect == a]) for a in (*range(self.settings.outputs), OVERALL)]
            result["held_out_accuracy_by_aspect"] = found[:-1]
            if found[-1] is not None:
                result["held_out_accuracy_overall"] = found[-1]
        if self.config.evaluation.rewards:
            result["other_rewards"] = self._others()
        return result

    def _calibration(self, measured: Measured) -> dict[str, Any]:
        """Of one half of the held-out prompts, with what is fitted on the other half."""
        half = np.array([is_held_out(f"{HALF} {prompt}", 0.5) for prompt in measured.prompts])
        if not half.any() or half.all():
            return {}
        logit, p = measured.logit[half], measured.p[half]
        temperature = calibration.fit_temperature(measured.logit[~half], measured.p[~half])
        raw, fitted = calibration.reliability(logit, p), calibration.reliability(logit / temperature, p)
        found: dict[str, Any] = {
            "calibration_error": raw.error,
            "calibration_temperature": temperature,
            "calibration_error_at_temperature": fitted.error,
            "reliability": dataclasses.asdict(raw),
        }
        if (measured.p == 0.5).any():
            threshold = calibration.best_threshold(measured.logit[~half], measured.p[~half])
            values = calibration.correct_with_ties(logit, p, threshold)
            rate = bootstrap_rate(
                calibration.by_prompt(values, [q for q, h in zip(measured.prompts, half, strict=True) if h])
            )
            found |= {
                "accuracy_with_ties": rate.mean,
                "accuracy_with_ties_ci95": [rate.ci_low, rate.ci_high],
                "tie_threshold": threshold,
            }
        return found

    def _others(self) -> list[dict[str, Any]]:
        """Accuracy of other rewards on the same pairs."""
        pairs = [self.data.pair(i) for i in self.kept_out]
        p = np.array([max(pair.p, 1 - pair.p) for pair in pairs])
        batch = batch_of(self.data, pairs, aspects=False)
        prompts = [pair.prompt for pair in pairs]
        found = []
        for name in self.config.evaluation.rewards:
            reward = rewards.load(name, self.accelerator.device)
            with torch.no_grad():
                scores = rewards.score(reward, batch.pixels, prompts * 2, device=self.accelerator.device).double().cpu()
            chosen, rejected = scores.chunk(2)
            rate = bootstrap_rate(calibration.by_prompt(calibration.correct((chosen - rejected).numpy(), p), prompts))
            found.append({"name": name, "accuracy": rate.mean, "ci95": [rate.ci_low, rate.ci_high]})
        return found

    # ---------------------------------------------------------------- outputs

    def finish(self, step: int, facts: dict[str, Any]) -> dict[str, Any] | None:
        if self.settings.head == "general":
            self._set_opponents()
        result = self.evaluate()
        statistics = Statistics(**result["statistics"])
        objective = {"name": plugins.name_of(type(self.objective)), **self.summary()}
        result |= facts | {"objective": objective, "seed": self.config.seed, "step": step}
        told = {k: v for k, v in result.items() if k not in ("statistics", "reliability")}
        self.bare.settings = dataclasses.replace(self.settings, facts=told)
        folder = self.run_dir / FOLDER
        with quiet():
            write_judge(self.bare, folder)
        self.family.tokenizer.save_pretrained(folder)
        save_statistics(folder / "statistics.json", {f"trained:{folder}": statistics, "trained": statistics})
        atomic_write_text(self.run_dir / "result.json", json.dumps(result, indent=1))
        write_reward_card(self.run_dir, self.config, result, prompt=self.data.prompts[self.kept[0]])
        report = write_report(self.run_dir)
        log.info("reward trained:%s; report %s", folder, report)
        return result

    def _set_opponents(self) -> None:
        """The mean embedding of pictures that the judge was trained on, whom a picture's score compares it with."""
        mean = self._measure(self.kept[:1024]).embedding.mean(0)
        self.settings = self.bare.settings = dataclasses.replace(self.settings, opponents=tuple(mean.tolist()))

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before} if self.before else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.before = dict(state.get("before", {}))


@dataclass(frozen=True)
class Measured:
    """What a judge says of P pairs.

    Attributes:
        logit: difference of scores divided by the temperature, chosen first, (P,).
        p: labels, in [1/2, 1], (P,).
        overall: the one score of all pictures, (2P,).
        embedding: of all pictures, (2P, 2k), of a general preference.
        prompts: of the pairs.
    """

    logit: calibration.Floats
    p: calibration.Floats
    overall: Tensor
    embedding: Tensor
    prompts: list[str]


def decided_mean(right: calibration.Floats) -> float | None:
    """Mean without the NaN of ties; None where nothing else is."""
    decided = right[~np.isnan(right)]
    return float(decided.mean()) if len(decided) else None


def write_judge(network: JudgeCLIP, folder: Any) -> None:
    """Write a judge with its adapter merged into the towers: a transformers CLIP folder with `judge.json`."""
    deltas = adapters.delta_weights(network) if adapters.lora_layers(network) else {}
    state = {}
    for name, value in network.state_dict().items():
        path = name.replace(".base_layer.", ".")
        if ".lora_" in name:
            continue
        own = deltas.get(path.removesuffix(".weight")) if path.endswith(".weight") else None
        state[path] = (
            value.detach().cpu() if own is None else (value.float() + own.to(value.device)).to(value.dtype).cpu()
        )
    merged = JudgeCLIP(network.config, network.settings)
    merged.load_state_dict(state, strict=True)
    merged.to(dtype=network.dtype).save_pretrained(folder)  # type: ignore[call-arg]
    network.settings.save(folder)
