"""Advantages of sampled groups, and estimators of the divergence from a reference.

Shapes: M group members, K rewards, N rows, U units (tokens or denoising steps). Groups need not be contiguous or of equal
size: they are told apart by id. A reward that is missing (a verifier that returned None) is NaN; a member without any
reward gets advantage 0 and does not enter its group's statistics.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffalign.losses.scores import lift

KLEstimator = Literal["k1", "k2", "k3"]
Center = Literal["mean", "loo", "none"]
Scale = Literal["group", "batch", "none"]
Aggregate = Literal["sum_then_normalize", "normalize_then_sum"]

# Log-ratios beyond this are treated as this: exp(40), the largest product of two such ratios, still fits float32.
LOG_RATIO_LIMIT = 20.0

# -- divergence from a reference -------------------------------------------------------------------------------------


def kl_estimate(theta: Tensor, ref: Tensor, kind: KLEstimator = "k3") -> Tensor:
    """Single-sample estimate of KL(policy || reference) per unit or per row, d = ref - theta.

    Args:
        theta: log-probabilities of the policy that drew the sample; gradient flows.
        ref: of the reference.
        kind: "k1": -d, unbiased, may be negative. "k2": d^2 / 2. "k3": e^d - d - 1, unbiased and never negative.

    As a reward penalty (detached) k1 is unbiased. As a *loss* on on-policy samples they differ: k1 has no expected
    gradient, k2 has the gradient of KL(policy || reference), k3 that of KL(reference || policy). Multiplying k1 or k3 by
    the likelihood ratio (`bias correction`) gives both the gradient of KL(policy || reference). J. Schulman's note, 2020.

    Raises:
        ValueError: unknown kind.
    """
    d = lift(ref) - lift(theta)
    if kind == "k1":
        return -d
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "k3":
        d = d.clamp(max=LOG_RATIO_LIMIT)
        return d.expm1() - d
    raise ValueError(f"KL estimator is {kind!r}; expected k1, k2 or k3")


def score_function_kl(theta: Tensor, ref: Tensor) -> Tensor:
    """sg(theta - ref) theta per row: on on-policy rows its gradient is an unbiased one of KL(policy || reference).

    Its value means nothing. theta, ref: *sums* over the row, (N,).
    """
    theta = lift(theta)
    return (theta.detach() - lift(ref)) * theta


# -- group statistics ------------------------------------------------------------------------------------------------


def group_sums(x: Tensor, ids: Tensor, count: int) -> Tensor:
    """Sums over the members of every group: x (M, ...) and ids 0 ... count - 1 to (count, ...)."""
    return torch.zeros(count, *x.shape[1:], dtype=x.dtype, device=x.device).index_add_(0, ids, x)


def group_ids(group: Tensor) -> tuple[Tensor, int]:
    """Ids as 0 ... G - 1, and G."""
    unique, ids = torch.unique(group, return_inverse=True)
    return ids, len(unique)


def group_mean(x: Tensor, group: Tensor) -> Tensor:
    """The mean of its group for every member, NaN left out, (M, ...); NaN if the group has no value at all."""
    ids, count = group_ids(group)
    there = ~x.isnan()
    total, number = group_sums(x.nan_to_num(0.0), ids, count), group_sums(there.to(x.dtype), ids, count)
    return (total / number)[ids]


def group_std(x: Tensor, group: Tensor, unbiased: bool = True) -> Tensor:
    """The standard deviation of its group for every member, (M, ...).

    Two passes, so that a group of equal values has exactly 0. A group with a single value has NaN where `unbiased` (there
    is no variance to estimate), except that a group of one *member* has 0.
    """
    ids, count = group_ids(group)
    there = ~x.isnan()
    number = group_sums(there.to(x.dtype), ids, count)
    squares = group_sums((x - group_mean(x, group)).square().nan_to_num(0.0), ids, count)
    std = (squares / (number - 1 if unbiased else number)).sqrt()
    members = group_sums(torch.ones_like(x), ids, count)
    return torch.where(members == 1, torch.zeros_like(std), std)[ids]


def batch_std(x: Tensor, unbiased: bool = True) -> Tensor:
    """The standard deviation of everything that is not NaN, (); 0 for a single value."""
    values = x[~x.isnan()]
    return values.std(correction=int(unbiased)) if values.numel() > 1 else x.new_zeros(())


def informative(reward: Tensor, group: Tensor) -> Tensor:
    """bool (M,): members of groups whose rewards differ; the others teach nothing.

    DAPO's dynamic sampling (arXiv 2503.14476) keeps only these. Compares the rewards themselves: the standard deviation of
    equal values need not be exactly 0.
    """
    ids, count = group_ids(group)
    r = total_reward(reward)
    top = r.new_full((count,), -float("inf")).scatter_reduce(0, ids, r.nan_to_num(-float("inf")), "amax")
    low = r.new_full((count,), float("inf")).scatter_reduce(0, ids, r.nan_to_num(float("inf")), "amin")
    return (top > low)[ids]


def zero_std_groups(reward: Tensor, group: Tensor) -> Tensor:
    """1.0 per group whose members all have the same reward, (G,)."""
    ids, count = group_ids(group)
    same = (~informative(reward, group)).to(lift(reward).dtype)
    return torch.zeros(count, dtype=same.dtype, device=same.device).index_copy_(0, ids, same)


# -- advantages ------------------------------------------------------------------------------------------------------


def _columns(reward: Tensor, weight: Tensor | tuple[float, ...] | None) -> tuple[Tensor, Tensor]:
    """Rewards as (M, K) and their weights (K,)."""
    reward = lift(reward)
    reward = reward if reward.ndim == 2 else reward[:, None]
    if weight is None:
        return reward, torch.ones(reward.shape[1], dtype=reward.dtype, device=reward.device)
    weight = torch.as_tensor(weight, dtype=reward.dtype, device=reward.device)
    if weight.shape != reward.shape[1:]:
        raise ValueError(f"{len(weight)} reward weights for {reward.shape[1]} rewards")
    return reward, weight


def total_reward(reward: Tensor, weight: Tensor | tuple[float, ...] | None = None) -> Tensor:
    """Weighted sum over the rewards that are there, (M,); NaN where none is."""
    reward, weight = _columns(reward, weight)
    total = (reward * weight).nansum(1)
    return total.masked_fill(reward.isnan().all(1), float("nan"))


def centred(r: Tensor, group: Tensor, center: Center) -> Tensor:
    """r minus its baseline: the group's mean, the mean of the *other* members ("loo"), or nothing; (M,).

    Leave-one-out is K / (K - 1) times centring by the mean, K counting members with a reward.

    Raises:
        ValueError: unknown `center`.
    """
    if center == "none":
        return r
    deviation = r - group_mean(r, group)
    if center == "mean":
        return deviation
    if center == "loo":
        ids, count = group_ids(group)
        k = group_sums((~r.isnan()).to(r.dtype), ids, count)[ids]
        # A group of one has nobody to compare with: 0 / 0, which becomes advantage 0.
        return deviation * k / (k - 1)
    raise ValueError(f"center is {center!r}; expected mean, loo or none")


def scaled(a: Tensor, r: Tensor, group: Tensor, scale: Scale, eps: float, unbiased: bool) -> Tensor:
    """a divided by (std of r) + eps: of the group, of the batch, or not at all.

    Raises:
        ValueError: unknown `scale`.
    """
    if scale == "none":
        return a
    if scale == "group":
        return a / (group_std(r, group, unbiased) + eps)
    if scale == "batch":
        return a / (batch_std(r, unbiased) + eps)
    raise ValueError(f"scale is {scale!r}; expected group, batch or none")


def advantages(
    reward: Tensor,
    group: Tensor,
    *,
    weight: Tensor | tuple[float, ...] | None = None,
    center: Center = "mean",
    scale: Scale = "group",
    aggregate: Aggregate = "sum_then_normalize",
    eps: float = 1e-4,
    unbiased: bool = True,
    standardize: bool = False,
) -> Tensor:
    """Advantages of the members of sampled groups, (M,), float32 at least, without gradient.

    Args:
        reward: (M,) or (M, K); NaN is a missing one.
        group: int64 ids, (M,).
        weight: of every reward, (K,); None weighs all by 1.
        center: baseline that is subtracted: "mean" of the group, "loo" (RLOO) mean of the others, or "none".
        scale: what the result is divided by: std of the "group" (GRPO), of the "batch", or "none" (Dr. GRPO).
        aggregate: "sum_then_normalize": weighted sum, then the above. "normalize_then_sum" (GDPO, arXiv 2601.05242): every
            reward is standardised in its group, the weighted sum then over the batch; `center` and `scale` do not apply.
        eps: added to the standard deviation, not to the variance.
        unbiased: divide by K - 1 (TRL; two rewards 1 and 0 become +-0.7071); False divides by K, as NumPy does (+-1).
        standardize: at last, to mean 0 and standard deviation 1 over all members that have an advantage.

    A group whose rewards are all equal gets exactly 0. Statistics need the whole rollout: compute them before splitting
    it into micro-batches, and pass them on as `Groups.advantage`.

    Raises:
        ValueError: unknown settings, or weights that do not fit the rewards.
    """
    if aggregate == "sum_then_normalize":
        r = total_reward(reward, weight)
        a = scaled(centred(r, group, center), r, group, scale, eps, unbiased)
        if center != "none":
            a = a.masked_fill(~informative(r, group) & ~a.isnan(), 0.0)
        return (whiten(a, eps=eps, unbiased=unbiased) if standardize else a).nan_to_num(0.0).detach()
    if aggregate == "normalize_then_sum":
        columns, w = _columns(reward, weight)
        z = (columns - group_mean(columns, group)) / (group_std(columns, group, unbiased) + eps)
        return whiten(total_reward(z, w), eps=eps, unbiased=unbiased).nan_to_num(0.0).detach()
    raise ValueError(f"aggregate is {aggregate!r}; expected sum_then_normalize or normalize_then_sum")


def whiten(x: Tensor, mask: Tensor | None = None, *, eps: float = 1e-4, unbiased: bool = True) -> Tensor:
    """(x - mean) / (std + eps) over everything that is not NaN and, with a mask, not masked; NaN stays, masked is 0."""
    values = x if mask is None else x.masked_fill(~mask, float("nan"))
    z = (values - values.nanmean()) / (batch_std(values, unbiased) + eps)
    return z if mask is None else z.masked_fill(~mask, 0.0)


# -- shaping of rewards ----------------------------------------------------------------------------------------------


def rank_reward(correct: Tensor, group: Tensor, rank: Tensor) -> Tensor:
    """ReRe's reward of K *distinct* candidates (arXiv 2510.12211?): 1 for a hit, and a penalty by rank for the others, (M,).

    The penalty of rank i is -(1 / log2(i + 2)) divided by the same sum over all K ranks, so that a confident mistake costs
    most; it is given only in groups that contain a hit.

    Args:
        correct: bool (M,).
        group: int64 (M,).
        rank: int64 (M,): 0 is the beam the model likes best.
    """
    ids, count = group_ids(group)
    hit = lift(correct.to(torch.float32))
    discount = 1 / (rank.to(hit.dtype) + 2).log2()
    penalty = -discount / group_sums(discount, ids, count)[ids]
    has_hit = group_sums(hit, ids, count)[ids] > 0
    return torch.where(correct.bool(), hit, torch.where(has_hit, penalty, torch.zeros_like(penalty)))


def overlong_penalty(length: Tensor, max_length: int, cache: int) -> Tensor:
    """DAPO's soft punishment of long answers (arXiv 2503.14476, eq. 13), in [-1, 0], (M,); add it to the reward.

    0 up to max_length - cache, from there linearly down to -1 at max_length, and -1 beyond.
    """
    return ((max_length - cache - lift(length.to(torch.float32))) / cache).clamp(-1.0, 0.0)


def optimal_value(reward: Tensor, group: Tensor, beta: float = 0.5) -> Tensor:
    """beta log mean exp(r / beta) over samples of the *reference*, for every member, (M,): V* of A*-PO (arXiv 2505.20686).

    Between the mean reward (beta -> infinity) and the best one (beta -> 0).
    """
    ids, count = group_ids(group)
    x = total_reward(reward) / beta
    top = torch.full((count,), -float("inf"), dtype=x.dtype, device=x.device).scatter_reduce(0, ids, x, "amax")
    number = group_sums(torch.ones_like(x), ids, count)
    return (beta * (top + (group_sums((x - top[ids]).exp(), ids, count) / number).log()))[ids]


# -- PPO (arXiv 1707.06347) ------------------------------------------------------------------------------------------


def ppo_rewards(score: Tensor, old: Tensor, ref: Tensor, mask: Tensor, kl_coef: float = 0.05) -> Tensor:
    """Rewards per unit, (N, U): -kl_coef * k1 everywhere, and the score of the row, (N,), at its last unit; 0 elsewhere."""
    kl = kl_estimate(lift(old).detach(), ref, "k1").masked_fill(~mask, 0.0)
    place = torch.arange(mask.shape[1], device=mask.device)
    last = mask & (place == (place * mask).amax(1, keepdim=True))
    return -kl_coef * kl + last * lift(score)[:, None]


def gae(reward: Tensor, value: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438): advantages and returns per unit, (N, U), without gradient.

    Units that are masked out are skipped: the next unit that counts is the successor, and after the last one the value is 0.
    Defaults as in TRL's former PPO trainer.
    """
    reward, value = lift(reward).detach(), lift(value).detach()
    later, following = torch.zeros_like(value[:, 0]), torch.zeros_like(value[:, 0])
    columns = []
    for t in range(value.shape[1] - 1, -1, -1):
        delta = reward[:, t] + gamma * following - value[:, t]
        here = delta + gamma * lam * later
        columns.append(here.masked_fill(~mask[:, t], 0.0))
        later, following = torch.where(mask[:, t], here, later), torch.where(mask[:, t], value[:, t], following)
    advantage = torch.stack(columns[::-1], 1)
    return advantage, (advantage + value).masked_fill(~mask, 0.0)


def ppo_value_loss(value: Tensor, old_value: Tensor, returns: Tensor, cliprange: float = 0.2) -> Tensor:
    """max((v - G)^2, (clip(v, v_old +- c) - G)^2) / 2 per unit, (N, U), to be averaged over units and weighed by 0.1."""
    value, old_value = lift(value), lift(old_value)
    clipped = old_value + (value - old_value).clamp(-cliprange, cliprange)
    return 0.5 * torch.maximum((value - returns).square(), (clipped - returns).square())


# -- sampling temperature --------------------------------------------------------------------------------------------


def adjusted_entropy(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Mean entropy in nats of softmax(logits / temperature), logits (..., V), ()."""
    logp = (lift(logits) / temperature).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1).mean()


def temperature_for_entropy(logits: Tensor, target: float = 0.3, low: float = 0.05, high: float = 4.0) -> float:
    """The sampling temperature at which the mean entropy over positions is `target` nats, by bisection.

    AceReason-Nemotron's rule for the rollout temperature (about 0.3; arXiv id unknown): lower explores too little, higher
    drowns the reward in noise. A check of a rollout's settings, not a loss.

    Args:
        logits: of sampled positions, (..., V).
        target: entropy in nats, 0 < target < log V.
        low, high: range of temperatures; the nearest end is returned where the target lies outside.
    """
    for _ in range(40):
        middle = 0.5 * (low + high)
        if adjusted_entropy(logits, middle) < target:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)
