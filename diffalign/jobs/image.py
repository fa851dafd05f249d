"""Training on images: pairs from the latent cache, scores from denoising errors, grids and rewards at the end."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from diffalign import adapters, preferences, sides, sparse, user_branches
from diffalign.data.loader import BatchPlan, PairData, PairMicroBatches, TokenizedPairs, micro_batches
from diffalign.data.pipeline import split_held_out
from diffalign.data.prepare import REPORT, prepare
from diffalign.data.prompts import load_prompts
from diffalign.data.report import DataReport
from diffalign.errors import DataError
from diffalign.families import NETWORK, TEXT, Conditioning, DenoisingFamily
from diffalign.hardware import configure_network
from diffalign.jobs import Job, weight_metric
from diffalign.losses import EXO, Layout, LossOut
from diffalign.metrics import StepMetrics
from diffalign.outputs import Outputs
from diffalign.policy import Policy
from diffalign.preflight import check_schedule
from diffalign.references import Lagged, Reference
from diffalign.sampling import Sampler
from diffalign.sampling.backprop import PromptBatch, RewardPaths
from diffalign.sampling.batches import Conditions
from diffalign.sampling.entries import StepBatch, TrajectoryBatch
from diffalign.sampling.rollouts import AnyBatch, ImageRollouts
from diffalign.sampling.rules import flipped_pairs, has_lagged, kind_of, noise_of, reward_sign, samples_images
from diffalign.summary import objective_summary
from diffalign.text_encoders import attach, trains_text
from diffalign.users import USERS_FILE, Users, by_user, check_encoder, described, kept_out
from diffalign.watch import Watch

log = logging.getLogger(__name__)


class ImageJob(Job):
    """A denoising family on image preferences."""

    unit = "pairs"
    family: DenoisingFamily
    users: Users | None = None  # where they are trained on
    preferences: preferences.Preferences | None = None  # where pairs are judged by weighted rewards

    def prepare(self) -> None:
        config = self.config
        check_schedule(config, self.family, self.accelerator.num_processes)
        self.online = samples_images(config)
        self.autocast = self.accelerator.autocast if config.training.mixed_precision != "no" else nullcontext
        self.data: PairData | None = None
        self.dataset: PairMicroBatches | None = None
        self.kept: list[int] = []
        self.kept_out: list[int] = []
        self.unseen: list[int] = []  # pairs of users who are kept out
        prompts = load_prompts(config.rollout.prompts, config.rollout.num_prompts) if config.rollout.prompts else []
        own = bool(prompts)
        if not own:
            prompts = self._prepare_pairs()
        if self.online:
            self._prepare_prompts(prompts, encode=own)
        self.sampler = self._sampler()

    def _prepare_pairs(self) -> list[str]:
        """Read and encode the data's pairs; returns the distinct prompts that are trained on."""
        config, training = self.config, self.config.training
        if config.users.encoder is not None:
            check_encoder(config.users)  # before hours of encoding
        prepared = prepare(config, self.family, self.accelerator)
        if self.accelerator.is_main_process:
            prepared.report.write(self.run_dir / REPORT)
        data = prepared.data
        if self.tokens:
            self.family.load(TEXT)
            data = TokenizedPairs(data, self.family)
        self.kept, self.kept_out = split_held_out(data.prompts, config.evaluation.held_out_fraction)
        if config.users.encoder is not None:
            self._describe_users(data)
        if config.preference.rewards:
            self._prefer(data, prepared.report)
        self.count, self.held_out = len(self.kept), len(self.kept_out)
        sizes = data.target_sizes
        assert training.train_batch_size != "auto", "resolve_auto has chosen"
        self.plan = BatchPlan(self.kept, [sizes[i] for i in self.kept], training.train_batch_size, config.seed)
        independent = noise_of(config) == "independent"
        dataset = PairMicroBatches(
            data,
            self.plan,
            config.denoising,
            self.family,
            config.seed,
            independent,
            facts=prepared.facts,
            label=config.data.label,
            temperature=config.data.label_temperature,
            flipped=flipped_pairs(config),
            users=self.users,
            preferences=self.preferences,
            rejected_empty=self._emptied(),
        )
        self.elements = dataset.example(self.kept[0], 0).noise.numel()
        self.data, self.dataset = data, dataset
        prompts = data.prompts  # of all pairs, read once
        return list(dict.fromkeys(prompts[i] for i in self.kept))

    def _emptied(self) -> tuple[float, Conditioning] | None:
        """How often the prompt of a rejected image is emptied, and what the negative branch is told then."""
        if self.config.negative.train != "joint":
            return None
        self.family.load(TEXT)
        told = {name: value[0].cpu() for name, value in self.family.encode_negative("").items()}
        self.family.unload(TEXT)
        return self.config.negative.proportion_empty_prompts, told

    def _describe_users(self, data: PairData) -> None:
        """Embed the users, and sort pairs into those that are trained on and those that are not."""
        config, owners = self.config, data.owners
        held_out = set(self.kept_out)
        # Pairs on which seen users are measured do not describe them.
        shown = [i for i, owner in enumerate(owners) if i not in held_out or kept_out(owner.user, config.users)]
        with self.accelerator.main_process_first():  # the others read what the first has written
            self.users = described(data, shown, config, self.family, self.run_dir / USERS_FILE)
        trained = self.users.trained(owners)
        unseen = {user for user, one in self.users.found.items() if one.unseen}
        seen = self.users.found.keys() - unseen
        self.kept = [index for index in self.kept if trained[index]]
        self.unseen = [i for i, owner in enumerate(owners) if owner.user in unseen and self.users.free(owner)]
        self.kept_out = [i for i in sorted(held_out) if owners[i].user in seen]
        if not self.kept:
            raise DataError("users: no pair of a user who may be trained on is left; lower users.held_out_fraction")

    def _prefer(self, data: PairData, report: DataReport) -> None:
        """Let weighted rewards judge the pairs; those that no weights decide are left out."""
        config, owners = self.config.preference, data.owners
        self.preferences, ahead = preferences.prepare(data.extras, self.kept, config, self.config.seed)
        self.correlation = preferences.correlation(ahead[self.kept])
        useful = [self.preferences.useful(one) for one in ahead]
        for index in sorted([*self.kept, *self.kept_out]):
            if not useful[index]:
                detail = f"differences {[round(float(v), 4) for v in ahead[index]]}"
                report.skip(owners[index].id, "undecided_preference", detail)
        self.kept, self.kept_out = ([i for i in part if useful[i]] for part in (self.kept, self.kept_out))
        if not self.kept:
            raise DataError(
                f"preference.margin: got {config.margin}, and none of {len(owners):,} pairs is decided by that much; set it "
                "lower"
            )
        if self.accelerator.is_main_process:
            report.write(self.run_dir / REPORT)

    def _prepare_prompts(self, prompts: list[str], *, encode: bool) -> None:
        """What is needed to sample images of prompts: a `Sampler` encodes those once that the data have not encoded."""
        config = self.config
        frames, side, new = config.data.num_frames, config.data.resolution, prompts if encode else []
        self.asked = Sampler(self.family, new, config.sampling, side, self.autocast, frames, tokens=self.tokens)
        self.prompts = prompts
        if self.data is None:
            self.count, self.unit = len(prompts), "prompts"
        self.elements = math.prod(self.asked.latent_shape)

    def _sampler(self) -> Sampler | None:
        config = self.config
        if not config.evaluation.prompts or not self.accelerator.is_main_process:
            return None
        prompts = load_prompts(config.evaluation.prompts, config.evaluation.num_prompts)
        frames = config.data.num_frames
        side, tokens = config.data.resolution, self.tokens
        negative = sides.around_of(config)
        sampler = Sampler(
            self.family, prompts, config.sampling, side, self.autocast, frames, tokens=tokens, negative=negative
        )
        if self.users is not None:  # prompts are everybody's in turn
            seen = [one.embeddings[0] for one in self.users.found.values() if not one.unseen]
            sampler.users = torch.stack([seen[i % len(seen)] for i in range(len(prompts))])
        if config.preference.seen:
            width = len(config.preference.rewards)
            sampler.users = torch.full((len(prompts), width), 1 / width)
        return sampler

    def identity(self) -> dict[str, Any]:
        if self.data is None:
            digest = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()[:16]
            return {"effective_batch": self.effective_batch, "prompts": digest, "count": self.count}
        texts = self.data.prompts
        prompts = "\n".join(texts[i] for i in self.kept)
        return {
            "effective_batch": self.effective_batch,
            "micro_batch": self.config.training.train_batch_size if len(self.plan.groups) > 1 else None,
            "pairs": self.count,
            **({} if self.users is None else {"users": len(self.users.found)}),
            "prompts": hashlib.sha256(prompts.encode()).hexdigest()[:16],
        }

    @property
    def tokens(self) -> bool:
        """Whether prompts stay tokens, because text encoders are trained."""
        return trains_text(self.config.lora)

    def load(self) -> nn.Module:
        self.family.load(NETWORK)
        configure_network(self.family.network, self.config.training)
        return self.family.with_text_encoders() if self.tokens else self.family.network

    def attach(self, network: nn.Module) -> list[nn.Parameter]:
        if self.config.negative.train == "joint":
            sides.Sides(network, self.config)
            return adapters.parameters(network)
        if self.config.sparse.method is not None:
            params = sparse.attach(network, self.config.sparse, seed=self.config.seed)
            sparse.share_places(network, self.accelerator)
            return params
        kind = user_branches.wanted(self.config, None if self.users is None else self.users.width)
        if kind is None:
            return attach(network, self.config.lora, seed=self.config.seed)
        if self.config.lora.rank:
            attach(network, self.config.lora, seed=self.config.seed)
        else:
            network.requires_grad_(False)
        branch = kind.attach(network)
        adapters.train_whole(network, [f"{adapters.USERS}.{name}" for name, _ in branch.named_parameters()])
        return adapters.parameters(network)

    def start(self, network: nn.Module, bare: nn.Module, reference: Reference) -> None:
        lagged = None
        if has_lagged(self.config):
            lagged = Lagged(adapters.parameters(bare), self.config.rollout.old_decay)
        self.policy = Policy(
            self.family,
            network,
            bare,
            self.autocast,
            self.config.denoising,
            reference,
            lagged,
            negative_only=self.config.negative.train == "guided",
        )
        self.reselection = (
            None if self.config.sparse.reselect_at is None else sparse.Reselection(bare, self.config.sparse)
        )
        nuclear = self.config.sparse.nuclear_norm
        self.nuclear_norm = sparse.NuclearNorm(bare, nuclear, self.config.seed) if nuclear else None
        self.forwards_before = 0  # images through the network before the run was resumed
        evaluation = self.config.evaluation
        self.watching = None
        if evaluation.every and self.sampler is not None:
            self.watching = Watch(evaluation, self.sampler, self.accelerator.device, self.run_dir)
        self.estimator = self.objective.estimator()
        self.rollouts = self._rollouts() if self.online else None
        self.own_gradients = self.objective.rows_from in ("differentiable", "whole_trajectories")
        self.outputs = Outputs(
            self.config, self.run_dir, self.family, self.sampler, summary=self.summary(), latent_elements=self.elements
        )

    def _prompt_text(self, index: int) -> Conditioning:
        """Conditioning of a prompt that is sampled, without a batch axis."""
        if self.data is not None:
            return self.data.text(self.prompts[index])
        return {name: value[0] for name, value in self.asked.conditioning[index].items()}

    def _rollouts(self) -> ImageRollouts | RewardPaths:
        side = self.asked.side
        image = self.family.image_conditioning((side, side), (0, 0), (side, side))
        conditions, shape = Conditions(self._prompt_text, self.asked.negative, image), self.asked.latent_shape
        parts = (self.config, self.family, self.policy, self.accelerator)
        if self.objective.rows_from == "differentiable":
            return RewardPaths(*parts, prompts=self.prompts, conditions=conditions, latent_shape=shape)
        return ImageRollouts(
            *parts,
            prompts=self.prompts,
            conditions=conditions,
            latent_shape=shape,
            winners=self.dataset,
            kept=self.kept,
        )

    def micro_batches(self, first_step: int) -> Iterator[AnyBatch | PromptBatch]:
        if self.rollouts is not None:
            yield from self.rollouts.micro_batches(first_step)
            return
        assert self.dataset is not None, "runs without rollouts have data"
        training, world = self.config.training, self.accelerator.num_processes
        assert training.train_batch_size != "auto", "resolve_auto has chosen"
        first = first_step * self.effective_batch // training.train_batch_size + self.accelerator.process_index
        last = training.max_train_steps * training.gradient_accumulation_steps * world
        for batch in micro_batches(self.dataset, range(first, last, world), training.dataloader_workers):
            yield batch.to(self.accelerator.device)

    def loss(self, batch: AnyBatch | PromptBatch) -> LossOut:
        if isinstance(batch, PromptBatch):
            assert isinstance(self.rollouts, RewardPaths), "it made the batch"
            scores, layout = self.rollouts.scores(batch)
        elif isinstance(batch, (StepBatch, TrajectoryBatch)):
            assert isinstance(self.rollouts, ImageRollouts), "it made the batch"
            scores, layout = self.rollouts.scores(batch)
        else:
            scores, layout = self.policy.scores(batch, self.objective)
        stats = None if self.estimator is None else self.estimator.update(scores, layout, self.accelerator.gather)
        out = self.objective(scores, layout, stats)
        weight_metric(out, batch.weight)
        if self.online and (reward := rewards_of(layout)) is not None:
            out.metrics.setdefault("reward", reward)
        if isinstance(batch, PromptBatch):
            out.metrics.update(scores.extra)
        if self.online and "reward" in out.metrics:  # as it is, whichever way it is followed
            out.metrics["reward"] = reward_sign(self.config) * out.metrics["reward"]
        return out

    def record(self, metrics: StepMetrics, batch: AnyBatch | PromptBatch, out: LossOut) -> None:
        if isinstance(batch, (PromptBatch, TrajectoryBatch)):  # no row has one timestep
            metrics.add(out)
            return
        if isinstance(batch, StepBatch):
            t, layout = batch.t, batch.layout
        else:
            rows, layout = batch.rows(self.objective.needs)
            t = rows.t
        metrics.add(out, times_of(layout, t, len(out.per_item)))

    def penalties(self, step: int) -> dict[str, Tensor]:
        return {} if self.nuclear_norm is None else {"nuclear_norm": self.nuclear_norm(step)}

    def after_update(self, step: int) -> None:
        if self.reselection is not None:
            self.reselection.after_update(step)
            if step == self.config.sparse.reselect_at:
                log.info(
                    "SaRA: %s entries are still small and trained on from step %d",
                    f"{self.reselection.trained():,}",
                    step,
                )

    def initial_loss(self) -> float | None:
        if self.config.lora.experts:  # a mixture of experts is not the base, however fresh its gates are
            return None
        soft = self.config.data.ties == "soft" and isinstance(self.objective, EXO)
        return None if soft else self.objective.initial_loss(kind_of(self.objective))

    @property
    def num_timesteps(self) -> int | None:
        return self.family.schedule.num_timesteps

    def summary(self) -> dict[str, float | str]:
        return objective_summary(self.config, kind_of(self.objective), self.elements)

    def passes(self) -> float:
        return super().passes() if self.rollouts is None else self.rollouts.passes()

    def sample(self, step: int, *, adapters: bool) -> None:
        if self.sampler is not None:
            self.outputs.sample_grid(step, adapters=adapters)

    def watch(self, step: int) -> dict[str, float]:
        if self.watching is None:
            return {}
        forwards = self.forwards_before + self.policy.forwards * self.accelerator.num_processes
        return self.watching.measure(step, self.policy.bare) | {"image_forwards": float(forwards)}

    @property
    def enough(self) -> bool:
        return self.watching is not None and self.watching.enough

    def finish(self, step: int, facts: dict[str, Any]) -> dict[str, Any] | None:
        if self.watching is not None and (best := self.watching.restore(self.policy.bare)) is not None:
            facts = facts | {"best_step": best}
        facts = facts | {"image_forwards": self.forwards_before + self.policy.forwards * self.accelerator.num_processes}
        return self.outputs.finish(
            self.policy, self.dataset, self.kept_out, step=step, facts=facts, more=self._more_results
        )

    def _more_results(self) -> dict[str, Any]:
        """How pairs that were not trained on are ranked, by user or by reward."""
        if self.dataset is None:
            return {}
        if self.preferences is not None:
            config, reads = self.config.preference, self.objective.reads_reference()
            ranked = (
                preferences.by_reward(self.policy, self.dataset, self.preferences, self.kept_out)
                if self.kept_out and reads
                else []
            )
            told = {"rewards": list(config.rewards), "fixed": list(config.fixed), "correlation": self.correlation}
            return {"preference": told | {"held_out": ranked}}
        if self.users is None:
            return {}
        return {"users": by_user(self.policy, self.dataset, self.users, self.kept_out, self.unseen)}

    def state_dict(self) -> dict[str, Any]:
        forwards = self.forwards_before + self.policy.forwards * self.accelerator.num_processes
        state = {
            "estimator": {} if self.estimator is None else self.estimator.state_dict(),
            "rollouts": {} if self.rollouts is None else self.rollouts.state_dict(),
            "watch": {} if self.watching is None else self.watching.state_dict(),
            "lagged": {} if self.policy.lagged is None else self.policy.lagged.state_dict(),
            "reselection": {} if self.reselection is None else self.reselection.state_dict(),
        }
        return {name: value for name, value in state.items() if value} | {"image_forwards": forwards}

    def load_state_dict(self, state: Any) -> None:
        if self.estimator is not None:
            self.estimator.load_state_dict(state.get("estimator", {}))
        if self.rollouts is not None:
            self.rollouts.load_state_dict(state.get("rollouts", {}))
        if self.watching is not None:
            self.watching.load_state_dict(state.get("watch", {}))
        if self.policy.lagged is not None and "lagged" in state:
            self.policy.lagged.load_state_dict(state["lagged"])
        if self.reselection is not None:
            self.reselection.load_state_dict(state.get("reselection", {}))
        self.forwards_before = int(state.get("image_forwards", 0))


def times_of(layout: Layout, t: Tensor, count: int) -> Tensor | None:
    """Timesteps of `count` losses: those of the pairs' chosen rows, or of the rows of items or of groups.

    None where the losses are not one for each of them, so that nobody could say whose timesteps they have.

    Args:
        layout: of the batch.
        t: timesteps of its rows, (N,).
        count: number of losses.
    """
    if layout.pairs is not None and len(layout.pairs) == count:
        return t[layout.pairs.w]
    for part in (layout.items, layout.groups):
        if part is not None and len(part) == count:
            return t[part.index]
    return None


def rewards_of(layout: Layout) -> Tensor | None:
    """Rewards of sampled images in a batch, the first reward model's, for the log."""
    if layout.pairs is not None:
        sides = (layout.pairs.reward_w, layout.pairs.reward_l)
        found = [side[:, 0] for side in sides if side is not None and side.shape[1]]
        return torch.cat(found) if found else None
    if layout.groups is not None:
        return layout.groups.reward[:, 0]
    return None if layout.items is None else layout.items.target
