"""Which pairs form which micro-batch, and their timesteps and noise: functions of (seed, sample id) alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffalign.config import DenoisingConfig
from diffalign.data.batch import PairBatch, PairExample, collate
from diffalign.data.encode import EncodedPair, Owner
from diffalign.data.facts import ASPECT, MAPS, PROMPTS, REWARDS
from diffalign.errors import DataError
from diffalign.families import Conditioning, DenoisingFamily
from diffalign.schedules import generator_for, sample_seed

log = logging.getLogger(__name__)


class PairData(Protocol):
    """Encoded pairs by index: the cache, or the uncached path."""

    def __len__(self) -> int: ...

    @property
    def prompts(self) -> list[str]: ...

    @property
    def target_sizes(self) -> list[tuple[int, int]]: ...

    @property
    def owners(self) -> list[Owner]: ...

    @property
    def extras(self) -> list[dict[str, Any]]: ...

    def pair(self, index: int) -> EncodedPair: ...

    def text(self, prompt: str) -> Conditioning: ...


class UserRows(Protocol):
    """Embeddings of the users of pairs (`diffalign.users.Users`)."""

    def row(self, pair: EncodedPair, visit: int) -> Tensor: ...

    def of(self, pair: EncodedPair) -> Tensor: ...


class PreferenceRows(Protocol):
    """Labels of pairs by weighted rewards, and the weights that the network sees (`diffalign.preferences.Preferences`)."""

    def seen(self, pair: EncodedPair, visit: int, *, measured: bool = False) -> tuple[EncodedPair, Tensor | None]: ...


class TokenizedPairs:
    """Encoded pairs whose prompts are token ids, for text encoders that are trained; all else is as it was.

    Args:
        data: encoded pairs.
        family: its tokenizers are in memory.
    """

    def __init__(self, data: PairData, family: DenoisingFamily) -> None:
        self.data = data
        others = (prompt for extra in data.extras for prompt in extra.get(PROMPTS, ()))
        prompts = list(dict.fromkeys(["", *data.prompts, *others]))
        self._texts: dict[str, Conditioning] = {}
        for start in range(0, len(prompts), 256):
            chunk = prompts[start : start + 256]
            known = [data.text(prompt) for prompt in chunk]
            encoded = {name: torch.stack([one[name] for one in known]) for name in known[0]}
            batch = family.tokenize(chunk, encoded)
            # Copies, so that a prompt does not keep its chunk.
            self._texts |= {p: {k: v[i].clone() for k, v in batch.items()} for i, p in enumerate(chunk)}

    def __len__(self) -> int:
        return len(self.data)

    @property
    def prompts(self) -> list[str]:
        return self.data.prompts

    @property
    def target_sizes(self) -> list[tuple[int, int]]:
        return self.data.target_sizes

    @property
    def owners(self) -> list[Owner]:
        return self.data.owners

    @property
    def extras(self) -> list[dict[str, Any]]:
        return self.data.extras

    def pair(self, index: int) -> EncodedPair:
        return self.data.pair(index)

    def text(self, prompt: str) -> Conditioning:
        return self._texts[prompt]


class BatchPlan:
    """An endless sequence of micro-batches over shuffled epochs.

    Micro-batch k holds the same samples whoever asks for it. Without buckets the epochs are strung together, so that no
    sample is left out at their ends, and splitting the same optimiser step into more or fewer micro-batches leaves its
    set of samples unchanged. With several image sizes a micro-batch has one size, and what does not fill one at the end
    of an epoch waits for the next.

    Args:
        indices: the samples to use.
        sizes: image size per sample of `indices`.
        batch_size: samples per micro-batch.
        seed: of the shuffles.
    """

    def __init__(self, indices: Sequence[int], sizes: Sequence[tuple[int, int]], batch_size: int, seed: int) -> None:
        self.batch_size, self.seed = batch_size, seed
        self.groups: dict[tuple[int, int], list[int]] = {}
        for index, size in zip(indices, sizes, strict=True):
            self.groups.setdefault(size, []).append(index)
        if not self.groups:
            raise DataError("no pair to train on")
        self._orders: dict[tuple[tuple[int, int], int], list[int]] = {}
        if len(self.groups) > 1:
            self._per_epoch = {s: max(1, len(g) // batch_size) for s, g in self.groups.items()}
            self._deals: dict[int, list[tuple[tuple[int, int], int]]] = {}
            log.info("%d image sizes, %d micro-batches an epoch", len(self.groups), sum(self._per_epoch.values()))

    def micro_batch(self, k: int) -> list[tuple[int, int]]:
        """(index, visit) of the samples of micro-batch k; `visit` counts a sample's earlier appearances."""
        if len(self.groups) == 1:
            (size,) = self.groups
            return self._take(size, k * self.batch_size)
        per_epoch = sum(self._per_epoch.values())
        epoch, place = divmod(k, per_epoch)
        if epoch not in self._deals:
            deal = [(s, i) for s, n in sorted(self._per_epoch.items()) for i in range(n)]
            order = torch.randperm(per_epoch, generator=generator_for(self.seed, "deal", epoch)).tolist()
            self._deals = {epoch: [deal[i] for i in order]}
        size, i = self._deals[epoch][place]
        return self._take(size, (epoch * self._per_epoch[size] + i) * self.batch_size)

    def _take(self, size: tuple[int, int], start: int) -> list[tuple[int, int]]:
        group = self.groups[size]
        taken = []
        for position in range(start, start + self.batch_size):
            epoch, place = divmod(position, len(group))
            key = (size, epoch)
            if key not in self._orders:
                order = torch.randperm(len(group), generator=generator_for(self.seed, f"order {size}", epoch)).tolist()
                # Two epochs meet in a batch; older ones are done with.
                self._orders = {k: v for k, v in self._orders.items() if k[0] != size or k[1] >= epoch - 1}
                self._orders[key] = order
            taken.append((group[self._orders[key][place]], epoch))
        return taken


def draw_timestep(
    config: DenoisingConfig, generator: torch.Generator, num_timesteps: int, sampling: str = "uniform"
) -> int:
    """One timestep within the bounds of the config.

    Args:
        config: bounds and distribution.
        generator: seeded by (seed, sample id, visit).
        num_timesteps: T of the schedule.
        sampling: the distribution where the config names none.
    """
    first, last = config.timestep_range(num_timesteps)
    if (config.timestep_sampling or sampling) == "uniform":
        return int(torch.randint(first, last + 1, (), generator=generator))
    if first > 0 or last < num_timesteps - 1:
        return _truncated_logit_normal(config, generator, num_timesteps, first, last)
    u = torch.sigmoid(config.logit_mean + config.logit_std * torch.randn((), generator=generator))
    return min(int(u * num_timesteps), num_timesteps - 1)


def _truncated_logit_normal(
    config: DenoisingConfig, generator: torch.Generator, num_timesteps: int, first: int, last: int
) -> int:
    """One timestep of the logit-normal distribution given that it is within bounds, by its inverse: one number is drawn."""
    edges = torch.tensor([first, last + 1], dtype=torch.float64) / num_timesteps
    low, high = (torch.logit(edges) - config.logit_mean) / config.logit_std
    mirrored = bool(low > 0)  # the lower tail resolves what the upper one rounds to 1
    if mirrored:
        low, high = -high, -low
    below, above = torch.special.ndtr(low), torch.special.ndtr(high)
    if above <= below:  # so far out that all of it is at the bound that is nearer
        return first if mirrored else last
    v = torch.rand((), generator=generator, dtype=torch.float64)
    normal = torch.special.ndtri(below + v * (above - below))
    u = torch.sigmoid(config.logit_mean + config.logit_std * (-normal if mirrored else normal))
    return min(max(int(u * num_timesteps), first), last)


def draw(
    config: DenoisingConfig,
    generator: torch.Generator,
    shape: tuple[int, ...],
    num_timesteps: int,
    sampling: str = "uniform",
) -> tuple[int, Tensor, bool]:
    """One sample's timestep, noise and whether its prompt is dropped.

    Args:
        config: distribution of the timesteps and share of dropped prompts.
        generator: seeded by (seed, sample id, visit).
        shape: of the latents.
        num_timesteps: T of the schedule.
        sampling: the distribution of timesteps where the config names none.
    """
    t = draw_timestep(config, generator, num_timesteps, sampling)
    noise = torch.randn(shape, generator=generator)
    dropped = bool(torch.rand((), generator=generator) < config.proportion_empty_prompts)
    return t, noise, dropped


class PairMicroBatches(Dataset[PairBatch]):
    """Micro-batches by number, ready for the policy.

    Args:
        data: encoded pairs.
        plan: which samples form micro-batch k.
        denoising: how timesteps are drawn and prompts dropped.
        family: for image conditioning and the length of the schedule.
        seed: of the draws.
        independent: give the rejected image a timestep and noise of its own.
        facts: further facts (`diffalign.data.facts`) that examples have; every pair must.
        label: "given", or what the first reward says of the chosen image: "soft" its probability to be preferred, "sampled"
            a draw from it at every visit.
        temperature: divides the difference of rewards of "soft" and "sampled".
        flipped: pairs whose images change places: "none", "all", or those without their prompt ("empty").
        users: whose embeddings go with the text of a pair, under "user".
        preferences: who judges the pairs, in place of their labels; what the network sees of it goes the same way.
        rejected_empty: share of the rejected images whose prompt is emptied, and what they are told then: the conditioning
            of the negative branch (SDXL 1.0: zeros).
    """

    def __init__(
        self,
        data: PairData,
        plan: BatchPlan,
        denoising: DenoisingConfig,
        family: DenoisingFamily,
        seed: int,
        independent: bool = False,
        *,
        facts: Collection[str] = (),
        label: Literal["given", "soft", "sampled"] = "given",
        temperature: float = 1.0,
        flipped: Literal["none", "all", "empty"] = "none",
        users: UserRows | None = None,
        preferences: PreferenceRows | None = None,
        rejected_empty: tuple[float, Conditioning] | None = None,
    ) -> None:
        self.rejected_empty, self.preferences = rejected_empty, preferences
        self.flipped, self.users = flipped, users
        self.data, self.plan, self.denoising, self.seed = data, plan, denoising, seed
        self.independent, self.facts, self.label, self.temperature = independent, frozenset(facts), label, temperature
        self.image_conditioning = family.image_conditioning
        self.num_timesteps = family.schedule.num_timesteps
        self.timestep_sampling = family.timestep_sampling

    def __getitem__(self, k: int) -> PairBatch:
        return collate([self.example(index, visit) for index, visit in self.plan.micro_batch(k)])

    def example(self, index: int, visit: int, *, keep_prompt: bool = False) -> PairExample:
        """One pair, chosen first, with its timestep and noise for this visit; `keep_prompt` never drops the prompt."""
        pair = self.data.pair(index)
        generator = torch.Generator().manual_seed(sample_seed(self.seed, pair.id, visit))
        shape = tuple(pair.latents[0].shape)
        t, noise, dropped = draw(self.denoising, generator, shape, self.num_timesteps, self.timestep_sampling)
        conditioning = [
            self.image_conditioning(size, crop, pair.target_size)
            for size, crop in zip(pair.original_sizes, pair.crops, strict=True)
        ]
        dropped = dropped and not keep_prompt
        if self.flipped == "all" or (self.flipped == "empty" and dropped):
            pair = flip(pair)
        more: Conditioning = {}
        if self.preferences is not None:
            pair, weights = self.preferences.seen(pair, visit, measured=keep_prompt)
            more = {} if weights is None else {"user": weights}
        chosen, rejected = (0, 1) if pair.p >= 0.5 else (1, 0)
        own = self._facts(pair, chosen, rejected)
        if self.users is not None:
            more = {"user": self.users.of(pair) if keep_prompt else self.users.row(pair, visit)}
        prompts = ["", ""] if dropped else pair.extra.get(PROMPTS, [pair.prompt] * 2)
        # A generator of its own: timestep and noise are those of a run that keeps the prompts.
        share, nothing = self.rejected_empty or (0.0, {})
        if not keep_prompt and share > _uniform(self.seed, pair.id, visit):
            own["rejected_text"] = nothing | more
        elif PROMPTS in pair.extra:
            own["rejected_text"] = self.data.text(prompts[rejected]) | more
        if self.independent:
            own["rejected_t"], own["rejected_noise"], _ = draw(
                self.denoising, generator, shape, self.num_timesteps, self.timestep_sampling
            )
        return PairExample(
            id=pair.id,
            chosen=pair.latents[chosen],
            rejected=pair.latents[rejected],
            text=self.data.text(prompts[chosen]) | more,
            chosen_image=conditioning[chosen],
            rejected_image=conditioning[rejected],
            p=self._p(pair, chosen, rejected, visit),
            weight=pair.weight,
            t=t,
            noise=noise,
            **own,
        )

    def _facts(self, pair: EncodedPair, chosen: int, rejected: int) -> dict[str, Any]:
        """Fields of the example beyond the label, the chosen image's first whichever it is."""
        found: dict[str, Any] = {}
        if REWARDS in self.facts:
            rewards = torch.tensor(pair.extra[REWARDS], dtype=torch.float32)
            found |= {"chosen_reward": rewards[chosen], "rejected_reward": rewards[rejected]}
        if ASPECT in self.facts:
            found["aspect"] = int(pair.extra[ASPECT])
        if MAPS in self.facts:
            maps = pair.extra[MAPS]
            found |= {"chosen_map": maps[chosen], "rejected_map": maps[rejected]}
        return found

    def _p(self, pair: EncodedPair, chosen: int, rejected: int, visit: int) -> float:
        """The label of the chosen image."""
        if self.label == "given":
            return max(pair.p, 1 - pair.p)
        rewards = pair.extra[REWARDS]
        gap = (rewards[chosen][0] - rewards[rejected][0]) / self.temperature
        probability = 1 / (1 + math.exp(-max(-700.0, gap)))
        if self.label == "soft":
            return probability
        # A generator of its own: timestep and noise are those of the given labels.
        drawn = torch.rand((), generator=generator_for(self.seed, f"{pair.id} label", visit))
        return float(drawn < probability)


def _uniform(seed: int, name: str, visit: int) -> float:
    """A number in [0, 1) for whether the prompt of a rejected image is emptied."""
    return float(torch.rand((), generator=generator_for(seed, f"{name} rejected prompt", visit)))


def flip(pair: EncodedPair) -> EncodedPair:
    """The same pair for the opposite taste: its label turned round, and its rewards with the other sign."""
    extra = dict(pair.extra)
    if REWARDS in extra:
        extra[REWARDS] = [[-reward for reward in side] for side in extra[REWARDS]]
    return replace(pair, p=1 - pair.p, extra=extra)


def micro_batches(dataset: Dataset[Any], numbers: Iterator[int] | range, workers: int) -> Iterator[Any]:
    """Load micro-batches in the order of `numbers`, ahead of time with worker processes if there are any."""
    options: dict[str, Any] = {"prefetch_factor": 4, "persistent_workers": True} if workers else {}
    loader = DataLoader(
        dataset, batch_size=None, sampler=numbers, num_workers=workers, pin_memory=torch.cuda.is_available(), **options
    )
    yield from loader
