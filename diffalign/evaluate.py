"""Base against adapter: the same prompts, seeds and sampler; rewards, win rate with intervals, held-out accuracy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffalign import plugins, rewards, score_cache, statistics
from diffalign.config import EvaluationConfig
from diffalign.data.batch import collate
from diffalign.data.loader import PairMicroBatches
from diffalign.families import Around
from diffalign.policy import Policy
from diffalign.progress import Progress
from diffalign.sampling import Sampler, sampling_mode, to_float

log = logging.getLogger(__name__)


@dataclass
class RewardResult:
    """One reward on base and adapter, paired by prompt and repeat."""

    reward: str
    base_mean: float
    aligned_mean: float
    win_rate: float
    win_rate_ci95: tuple[float, float]
    gain: float
    gain_ci95: tuple[float, float]
    wins: int
    ties: int
    losses: int
    p_value: float


@dataclass
class Evaluation:
    """Everything measured at the end of a run.

    Attributes:
        prompts, images_per_prompt, seed: what was sampled.
        drift: root mean square difference of pixels in [0, 1] between base and adapter from the same noise.
        diversity: the same between images of one prompt from different noise, of "base" and "aligned"; empty with one
            image per prompt.
        results, scores: by reward.
    """

    prompts: int
    images_per_prompt: int
    seed: int
    drift: float = 0.0
    diversity: dict[str, float] = field(default_factory=dict)
    results: list[RewardResult] = field(default_factory=list)
    scores: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)

    def headline(self) -> dict[str, Any]:
        """The keys of `result.json` that come from the first reward, and all rewards behind them."""
        if not self.results:
            return {}
        first = self.results[0]
        return {
            "metric": first.reward,
            "base_mean": first.base_mean,
            "aligned_mean": first.aligned_mean,
            "win_rate": first.win_rate,
            "win_rate_ci95": list(first.win_rate_ci95),
            "gain": first.gain,
            "gain_ci95": list(first.gain_ci95),
            "prompts": self.prompts,
            "images_per_prompt": self.images_per_prompt,
            "evaluation_seed": self.seed,
            "drift": self.drift,
            "diversity": self.diversity,
            "rewards": [asdict(result) for result in self.results],
        }


@dataclass(frozen=True)
class Side:
    """What is sampled for one side of a comparison; see `Sampler.images`."""

    adapters: bool
    around: Around = nullcontext


def compare(
    sampler: Sampler,
    config: EvaluationConfig,
    device: torch.device | str = "cpu",
    *,
    base: Side = Side(adapters=False),
    aligned: Side = Side(adapters=True),
) -> tuple[Evaluation, Tensor, Tensor]:
    """Sample base and adapter (or whatever the sides are) on every prompt of the sampler, and score both.

    Returns:
        The evaluation, and the first image of every prompt from base and adapter, uint8 (P, 3, H, W) or (P, 3, F, H, W).
    """
    indices = range(len(sampler.prompts))
    images = {}
    for name, side in (("base", base), ("aligned", aligned)):
        with Progress(f"sampling {name}", len(indices) * config.images_per_prompt) as progress:
            images[name] = sampler.images(
                indices,
                seed=config.seed,
                repeats=config.images_per_prompt,
                adapters=side.adapters,
                around=side.around,
                progress=progress.advance,
            )
    evaluation = Evaluation(len(sampler.prompts), config.images_per_prompt, config.seed)
    evaluation.drift = pixel_distance(images["base"], images["aligned"])
    if config.images_per_prompt > 1:
        count = config.images_per_prompt
        for name, image in images.items():
            by_prompt = image.view(-1, count, *image.shape[1:])
            evaluation.diversity[name] = pixel_distance(by_prompt[:, :-1].flatten(0, 1), by_prompt[:, 1:].flatten(0, 1))
    prompts = [prompt for prompt in sampler.prompts for _ in range(config.images_per_prompt)]
    with score_cache.from_environment() as cache:
        for name in config.rewards:
            reward = rewards.load(name, device=device)
            scores = {
                who: score_all(reward, image, prompts, cache=cache, name=name)
                .view(-1, config.images_per_prompt)
                .numpy()
                for who, image in images.items()
            }
            evaluation.results.append(reward_result(name, scores["base"], scores["aligned"]))
            evaluation.scores[name] = {who: value.tolist() for who, value in scores.items()}
    step = config.images_per_prompt
    return evaluation, images["base"][::step], images["aligned"][::step]


def pixel_distance(one: Tensor, other: Tensor) -> float:
    """Root mean square difference of uint8 images, in units of [0, 1]: per image, then the mean over images."""
    difference = (one.float() - other.float()) / 255
    return float(difference.square().flatten(1).mean(1).sqrt().mean())


def score_all(
    reward: rewards.Reward,
    images: Tensor,
    prompts: Sequence[str],
    batch_size: int = 32,
    *,
    cache: score_cache.ScoreCache | None = None,
    name: str = "",
) -> Tensor:
    """Scores (N,), on the CPU, of uint8 images (N, 3, H, W) or clips (N, 3, F, H, W); one batch at a time is held as floats.

    With a cache, the reward `name` is asked only for what is not in it. Scores of groups are not cached, nor cut.

    Raises:
        ConfigError: a reward of sets, whose pictures have no scores of their own.
    """
    rewards.refuse_sets(name or plugins.name_of(type(reward)), reward.sets)
    if reward.grouped:
        batch_size, cache = max(1, len(prompts)), None
    seen = images if reward.clips else rewards.stills(images)
    scores = []
    for start in range(0, len(seen), batch_size):
        pixels, texts = to_float(seen[start : start + batch_size]), prompts[start : start + batch_size]
        if cache is None:
            scores.append(rewards.score(reward, pixels, texts).cpu())  # it answers on its own device
        else:
            scores.append(cache.score(name, reward, pixels, texts))
    return torch.cat(scores)


def reward_result(name: str, base: Any, aligned: Any) -> RewardResult:
    """Win rate and gain of paired scores, (prompts, repeats) each."""
    rate, gain = statistics.win_rate(base, aligned), statistics.mean_gain(base, aligned)
    return RewardResult(
        reward=name,
        base_mean=float(base.mean()),
        aligned_mean=float(aligned.mean()),
        win_rate=rate.rate,
        win_rate_ci95=(rate.ci_low, rate.ci_high),
        gain=gain.mean,
        gain_ci95=(gain.ci_low, gain.ci_high),
        wins=rate.wins,
        ties=rate.ties,
        losses=rate.losses,
        p_value=rate.p_value,
    )


@torch.no_grad()
def held_out_accuracy(
    policy: Policy,
    dataset: PairMicroBatches,
    indices: Sequence[int],
    *,
    draws: int = 4,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda n: None,
) -> statistics.Estimate | None:
    """Implicit accuracy on pairs that training never saw: the mean of `held_out_hits` with its bootstrap interval.

    None if there is no pair.
    """
    hits = held_out_hits(policy, dataset, indices, draws=draws, batch_size=batch_size, progress=progress)
    return statistics.bootstrap_rate(list(hits.values())) if hits else None


def held_out_hits(
    policy: Policy,
    dataset: PairMicroBatches,
    indices: Sequence[int],
    *,
    draws: int = 4,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[int, float]:
    """Implicit accuracy on pairs that training never saw: how often the chosen image gained more than the rejected.

    For each pair the margin is averaged over `draws` timesteps, one from each slice of the range that is trained,
    with fixed noise and always with the prompt, and gains are over the base, also where the run's reference moves, so that
    numbers of different steps and runs are comparable. Errors are measured as in training. Ties in the data are left out.

    Returns:
        1, or 0, or 1/2 where it is undecided, by pair.
    """
    policy = policy.against_base()
    first, last = policy.denoising.timestep_range(policy.num_timesteps)
    sizes = dataset.data.target_sizes
    hits: dict[int, float] = {}
    with sampling_mode(policy.bare, adapters=True):
        for size in sorted({sizes[index] for index in indices}):
            group = [index for index in indices if sizes[index] == size]
            for start in range(0, len(group), batch_size):
                rows = group[start : start + batch_size]
                some = [(index, dataset.example(index, 0, keep_prompt=True)) for index in rows]
                progress(len(rows))
                some = [(index, example) for index, example in some if example.p != 0.5]
                if not some:
                    continue
                batch = collate([example for _, example in some]).to(policy.family.device)
                place = (batch.t.double() - first + 0.5) / (last - first + 1)  # in (0, 1), another one for every pair
                margin = torch.zeros(len(batch), device=policy.family.device)
                for k in range(draws):
                    t = (first + (k + place) / draws * (last - first + 1)).long().clamp(first, last)
                    gain_w, gain_l = (2 * policy.measure(batch.stacked(t)).log_ratio()).chunk(2)
                    margin += gain_w - gain_l
                found = ((margin > 0).float() + 0.5 * (margin == 0).float()).tolist()
                hits |= dict(zip([index for index, _ in some], found, strict=True))
    return hits
