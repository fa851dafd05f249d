"""Estimators: definitions, several processes against one, and restored against uninterrupted."""

import math
import threading

import pytest
import torch

from diffalign import losses
from diffalign.losses import Groups, Items, Layout, Pairs, Scores, Totals
from diffalign.losses.estimators import (
    BCODelta,
    BetaDPOStats,
    DualVariable,
    DynamicLabels,
    GroupStats,
    KTOReference,
    RewardNormaliser,
    UnitCount,
    count_totals,
    hashed_uniform,
    mismatched_partners,
)


class Processes:
    """Runs functions of a gather in threads that meet at every gather, as processes do."""

    def __init__(self, size):
        self.size, self.slots, self.barrier = size, [None] * size, threading.Barrier(size, timeout=30)

    def gather_of(self, rank):
        def gather(x):
            self.slots[rank] = x
            self.barrier.wait()
            everything = torch.cat(list(self.slots))
            self.barrier.wait()
            return everything

        return gather

    def run(self, work):
        results, errors = [None] * self.size, []

        def body(rank):
            try:
                results[rank] = work(rank, self.gather_of(rank))
            except Exception as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results


def token_rows(n, seed):
    g = torch.Generator().manual_seed(seed)
    theta = -5 * torch.rand(n, 3, generator=g, dtype=torch.float64) - 0.1
    ref = theta + torch.randn(n, 3, generator=g, dtype=torch.float64)
    mask = torch.arange(3) < torch.randint(1, 4, (n, 1), generator=g)
    return Scores.tokens(theta, ref, mask=mask), g


def rows_of(scores, rows):
    u = scores.units
    return Scores.tokens(u.theta[rows], u.ref[rows], mask=u.mask[rows])


def item_world(seed):
    """8 items and 6 mismatched rows; the first process gets 3 items and 4 mismatched rows."""
    scores, g = token_rows(14, seed)
    label = torch.randint(0, 2, (8,), generator=g).double()
    label[0], label[7] = 1.0, 1.0
    whole = (scores, Layout(items=Items(index=torch.arange(8), label=label, mismatched=torch.arange(8, 14))))
    parts = []
    for items, others in (([0, 1, 2], [8, 9, 10, 11]), ([3, 4, 5, 6, 7], [12, 13])):
        n, m = len(items), len(others)
        layout = Layout(
            items=Items(index=torch.arange(n), label=label[items], mismatched=torch.arange(n, n + m)),
        )
        parts.append((rows_of(scores, items + others), layout))
    return whole, parts


def pair_world(seed):
    """7 pairs; the first process gets 3. Numbers move between processes from one step to the next."""
    scores, _ = token_rows(14, seed)
    uid = (torch.arange(7) + seed) % 7 + 100
    whole = (scores, Layout(pairs=Pairs.halves(7, uid=uid)))
    parts = []
    for pairs in ([0, 1, 2], [3, 4, 5, 6]):
        rows = pairs + [p + 7 for p in pairs]
        parts.append((rows_of(scores, rows), Layout(pairs=Pairs.halves(len(pairs), uid=uid[pairs]))))
    return whole, parts


def group_world(seed):
    """9 samples of 3 prompts, groups split over the processes, two rewards, one of them missing once."""
    scores, g = token_rows(9, seed)
    group = torch.tensor([4, 4, 17, 2, 4, 17, 17, 2, 2])
    reward = torch.rand(9, 2, generator=g, dtype=torch.float64)
    reward[3, 1] = torch.nan
    whole = (scores, Layout(groups=Groups(index=torch.arange(9), group=group, reward=reward)))
    parts = []
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7, 8]):
        groups = Groups(index=torch.arange(len(rows)), group=group[rows], reward=reward[rows])
        parts.append((rows_of(scores, rows), Layout(groups=groups)))
    return whole, parts


def full_rewards(seed):
    """As `group_world`, without a missing reward."""
    whole, parts = group_world(seed)

    def filled(world):
        scores, layout = world
        groups = layout.groups
        reward = groups.reward.nan_to_num(0.25)
        return scores, Layout(groups=Groups(index=groups.index, group=groups.group, reward=reward))

    return filled(whole), [filled(part) for part in parts]


def logit(scores, pairs):
    rho = scores.log_ratio()
    return 0.3 * (rho[pairs.w] - rho[pairs.l])


MAKERS = {
    "kto": (KTOReference, item_world),
    "kto batch": (lambda: KTOReference("batch"), item_world),
    "bco": (BCODelta, item_world),
    "beta_dpo": (lambda: BetaDPOStats(drop=0.4, seed=3), pair_world),
    "labels": (lambda: DynamicLabels(0.3, logit), pair_world),
    "groups": (GroupStats, group_world),
    "groups biased": (lambda: GroupStats(unbiased=False), group_world),
    "units": (UnitCount, group_world),
    "rewards": (RewardNormaliser, full_rewards),
    "dual": (lambda: DualVariable(limit=0.5, rate=0.1), item_world),
}
by_estimator = pytest.mark.parametrize(("make", "world"), MAKERS.values(), ids=MAKERS)
PER_ROW = {"keep", "p", "group_mean", "group_std", "group_count"}


def joined(parts):
    """Statistics of the processes as one process would give them."""
    merged = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name in PER_ROW:
            merged[name] = torch.cat(values)
        else:
            torch.testing.assert_close(values[0], values[1], msg=f"{name} differs between processes")
            merged[name] = values[0]
    return merged


@by_estimator
def test_two_processes_equal_one(make, world):
    """Over three steps, with uneven shares of the batch."""
    alone = make()
    group = [make(), make()]
    for step in range(3):
        whole, parts = world(step)
        expected = alone.update(*whole)
        found = joined(Processes(2).run(lambda rank, gather, p=parts: group[rank].update(*p[rank], gather)))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)
            assert not found[name].requires_grad


@by_estimator
def test_saved_and_restored_continues_identically(make, world, tmp_path):
    first = make()
    first.update(*world(0)[0])
    first.update(*world(1)[0])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = make()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in (2, 3):
        one, other = first.update(*world(step)[0]), second.update(*world(step)[0])
        for name in one:
            assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("name", ["bco", "beta_dpo", "labels", "rewards", "dual"])
def test_memory_matters(name):
    """The same batch after another history gives other statistics: what is saved is not nothing."""
    make, world = MAKERS[name]
    fresh, used = make(), make()
    used.update(*world(5)[0])
    one, other = fresh.update(*world(6)[0]), used.update(*world(6)[0])
    assert any(not torch.allclose(one[k], other[k]) for k in one)


def test_estimators_without_memory_store_nothing_and_refuse_a_state():
    estimator = KTOReference()
    assert estimator.state_dict() == {}
    with pytest.raises(ValueError, match="keeps no state"):
        estimator.load_state_dict({"mean": 1})


# -- definitions -----------------------------------------------------------------------------------------------------


def kto_scores(mismatched):
    theta = torch.tensor([5.0, -5.0, *mismatched], dtype=torch.float64)
    layout = Layout(items=Items(index=torch.tensor([0, 1]), mismatched=torch.arange(2, len(theta))))
    return Scores.tokens(theta, torch.zeros_like(theta)), layout


def test_kto_averages_before_it_clamps():
    torch.testing.assert_close(KTOReference().update(*kto_scores([4.0, -1.0]))["z0"].item(), 1.5)
    assert KTOReference().update(*kto_scores([1.0, -4.0]))["z0"] == 0, "not the mean of clamped values, 0.5"


def test_kto_clamps_after_the_mean_over_processes():
    """Means 4 and -2: 1 over both, not (4 + 0) / 2."""
    worlds = [kto_scores([4.0]), kto_scores([-2.0])]
    found = Processes(2).run(lambda rank, gather: KTOReference().update(*worlds[rank], gather))
    assert [f["z0"].item() for f in found] == [1.0, 1.0]


def test_kto_refuses_matched_rows():
    scores, _ = kto_scores([1.0])
    with pytest.raises(ValueError, match="would equal the reward"):
        KTOReference().update(scores, Layout(items=Items(index=torch.tensor([0, 1]), mismatched=torch.tensor([1]))))
    with pytest.raises(ValueError, match="mismatched is missing"):
        KTOReference().update(scores, Layout(items=Items(index=torch.tensor([0]))))
    with pytest.raises(ValueError, match="reference_point"):
        losses.unpaired.KTO(reference_point="mean")


@pytest.mark.parametrize("prompts", [[0, 1], [5, 5, 2, 9], [1, 2, 1, 2, 1, 2], [3, 8, 8, 1, 4, 4, 2]])
def test_mismatched_partners_have_another_prompt_and_use_every_response_once(prompts):
    prompt = torch.tensor(prompts)
    partner = mismatched_partners(prompt)
    assert (prompt[partner] != prompt).all()
    assert partner.sort().values.tolist() == list(range(len(prompts)))


def test_mismatched_partners_of_different_prompts_are_the_usual_rotation():
    assert mismatched_partners(torch.arange(5)).tolist() == [4, 0, 1, 2, 3]


@pytest.mark.parametrize("prompts", [[], [7], [7, 7], [1, 1, 1, 2]])
def test_batches_that_cannot_be_mismatched_are_refused(prompts):
    with pytest.raises(ValueError, match="at least 2 prompts"):
        mismatched_partners(torch.tensor(prompts, dtype=torch.long))


def test_bco_shift_is_the_mean_of_everything_seen_the_current_batch_included():
    estimator, seen = BCODelta(), []
    for values in ([1.0, 3.0], [5.0], [-2.0, 0.0, 8.0]):
        seen += values
        theta = torch.tensor(values, dtype=torch.float64)
        items = Items(index=torch.arange(len(values)), label=torch.ones(len(values)))
        stats = estimator.update(Scores.tokens(theta, torch.zeros_like(theta)), Layout(items=items))
        torch.testing.assert_close(stats["mean_log_ratio"].item(), sum(seen) / len(seen))


def delta_world(values, uid=None):
    n = len(values)
    theta = torch.cat([torch.tensor(values, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)])
    uid = torch.arange(n) if uid is None else uid
    return Scores.tokens(theta, torch.zeros_like(theta)), Layout(pairs=Pairs.halves(n, uid=uid))


def test_beta_dpo_averages_start_at_the_first_batch():
    estimator = BetaDPOStats(drop=0.0)
    stats = estimator.update(*delta_world([1.0, 3.0]))
    assert (stats["mean"].item(), stats["std"].item()) == (2.0, 1.0)
    stats = estimator.update(*delta_world([10.0, 14.0]))
    torch.testing.assert_close(stats["mean"].item(), 0.9 * 2 + 0.1 * 12)
    torch.testing.assert_close(stats["std"].item(), 0.9 * 1 + 0.1 * 2)
    torch.testing.assert_close(stats["keep"], torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(stats["kept_mean"].item(), 12.0)


def test_beta_dpo_keeps_the_share_it_should_and_scales_the_loss_to_their_mean():
    values = torch.linspace(-2, 2, 20).tolist()
    scores, layout = delta_world(values)
    objective = losses.weighted.BetaDPO(beta=0.1, drop=0.2)
    stats = objective.estimator().update(scores, layout)
    kept = stats["keep"] > 0
    assert kept.sum() == 16
    torch.testing.assert_close(stats["keep"][kept], torch.full((16,), 1.25, dtype=torch.float64))
    torch.testing.assert_close(stats["kept_mean"], torch.tensor(values, dtype=torch.float64)[kept].mean())
    out = objective(scores, layout, stats)
    beta = out.metrics["beta"].item()
    expected = torch.nn.functional.softplus(-beta * torch.tensor(values, dtype=torch.float64)[kept]).mean()
    torch.testing.assert_close(out.loss, expected)


def test_beta_dpo_drops_outliers_more_often():
    """20 pairs near the mean and one six deviations off: it is always among the 20 % dropped."""
    estimator = BetaDPOStats(drop=0.2)
    for step in range(20):
        near = torch.linspace(-1, 1, 20).tolist()
        stats = estimator.update(*delta_world([*near, 40.0], uid=torch.arange(21) + 100 * step))
        assert stats["keep"][-1] == 0


def test_beta_dpo_draws_differ_between_steps_and_seeds():
    def draws(seed):
        estimator = BetaDPOStats(drop=0.5, seed=seed)
        return [tuple((estimator.update(*delta_world([0.0] * 12))["keep"] > 0).tolist()) for _ in range(6)]

    assert len(set(draws(0))) > 3
    assert draws(0) == draws(0)
    assert draws(0) != draws(1)


def test_equal_differences_do_not_divide_by_zero():
    stats = BetaDPOStats(drop=0.5).update(*delta_world([2.0] * 6))
    assert all(torch.isfinite(v).all() for v in stats.values())
    assert (stats["keep"] > 0).sum() == 3


def test_numbers_are_needed_to_remember_pairs():
    scores, _ = token_rows(4, 0)
    for estimator in (BetaDPOStats(), DynamicLabels(0.5, logit)):
        with pytest.raises(ValueError, match="uid is missing"):
            estimator.update(scores, Layout(pairs=Pairs.halves(2)))


def test_hashed_uniform_looks_uniform_and_independent():
    u = hashed_uniform(torch.arange(20000), seed=0, step=0)
    assert u.min() > 0
    assert u.max() < 1
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8, "chi-square of 19 degrees, p = 0.001"
    for other in (
        hashed_uniform(torch.arange(20000), 0, 1),
        hashed_uniform(torch.arange(20000), 1, 0),
        hashed_uniform(torch.arange(20000) + 1, 0, 0),
        hashed_uniform(-torch.arange(20000) - 1, 0, 0),
    ):
        assert torch.corrcoef(torch.stack([u, other]))[0, 1].abs() < 0.03


def groups_of(group, reward):
    rows = torch.zeros(len(group), dtype=torch.float64)
    groups = Groups(index=torch.arange(len(group)), group=torch.tensor(group), reward=torch.as_tensor(reward))
    return Scores.tokens(rows), Layout(groups=groups)


def test_group_deviation_of_two_rewards_is_unbiased_as_in_trl():
    world = groups_of([5, 5], [1.0, 0.0])
    torch.testing.assert_close(GroupStats().update(*world)["group_std"][0, 0].item(), math.sqrt(0.5))
    torch.testing.assert_close(GroupStats(unbiased=False).update(*world)["group_std"][0, 0].item(), 0.5)


def test_equal_rewards_have_no_deviation_and_single_ones_neither():
    tenth = torch.tensor([0.1, 0.1, 0.1, 0.7], dtype=torch.float64)  # the mean of three is not 0.1 in floating point
    stats = GroupStats().update(*groups_of([1, 1, 1, 2], tenth))
    assert stats["group_std"].flatten().tolist() == [0.0] * 4
    assert stats["group_count"].flatten().tolist() == [3.0, 3.0, 3.0, 1.0]


def test_missing_rewards_do_not_count():
    stats = GroupStats().update(*groups_of([1, 1, 1], [1.0, math.nan, 3.0]))
    assert stats["group_mean"].flatten().tolist() == [2.0] * 3
    torch.testing.assert_close(stats["group_std"][0, 0].item(), math.sqrt(2))


def test_totals_over_micro_batches_and_processes_equal_those_of_one_batch():
    g = torch.Generator().manual_seed(0)
    masks = [torch.rand(n, 5, generator=g) < 0.6 for n in (2, 3, 1)]
    chosen = [torch.tensor([0]), torch.tensor([1, 2]), torch.tensor([0])]
    positive = [torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([], dtype=torch.long)]
    whole = torch.cat(masks)
    expected = Totals(
        items=6,
        units=int(whole.sum()),
        chosen_units=int(whole[[0, 3, 4, 5]].sum()),
        positive_items=3,
        positive_units=int(whole[[0, 1, 4]].sum()),
    )
    assert expected.chosen_units != expected.positive_units
    assert count_totals(masks, chosen=chosen, positive=positive) == expected
    shares = [slice(0, 2), slice(2, 3)]
    found = Processes(2).run(
        lambda rank, gather: count_totals(
            masks[shares[rank]], gather, chosen=chosen[shares[rank]], positive=positive[shares[rank]]
        )
    )
    assert found == [expected, expected]
    assert count_totals(masks, items=4).items == 4


def test_token_means_with_counted_totals_do_not_depend_on_the_split():
    """The mean over rows of each micro-batch, averaged by its rows, is the token mean of the whole."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(6, 5, generator=g, dtype=torch.float64)
    mask = torch.rand(6, 5, generator=g) < 0.5
    totals = count_totals([mask[:2], mask[2:]])
    parts = [losses.reduce.reduce_units(x[s], mask[s], "token_mean", totals=totals) for s in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(torch.cat(parts).mean(), x[mask].mean())


def test_normalised_rewards_of_a_steady_stream_have_mean_zero_and_deviation_one():
    g = torch.Generator().manual_seed(2)
    estimator = RewardNormaliser(decay=0.9)
    for _ in range(60):
        reward = (5 + 3 * torch.randn(256, generator=g)).tolist()
        world = groups_of([0] * 256, reward)
        stats = estimator.update(*world)
    made = estimator.normalised(world[1].groups.reward, stats)
    assert abs(made.mean()) < 0.2
    assert abs(made.std() - 1) < 0.15


def test_dual_variable_rises_while_the_constraint_is_violated_and_stays_in_bounds():
    theta = torch.tensor([-2.0, -1.0], dtype=torch.float64)
    layout = Layout(items=Items(index=torch.tensor([0, 1]), label=torch.tensor([1.0, 0.0])))
    scores = Scores.tokens(theta)  # the retained row costs 2
    strict, loose = DualVariable(limit=0.5, rate=0.1), DualVariable(limit=5.0, rate=0.5)
    values = [strict.update(scores, layout)["dual"].item() for _ in range(3)]
    torch.testing.assert_close(values, [1.15, 1.30, 1.45])
    assert [loose.update(scores, layout)["dual"].item() for _ in range(2)] == [0.0, 0.0]
    bounded = DualVariable(limit=0.0, rate=10.0, largest=7.0)
    assert bounded.update(scores, layout)["dual"] == 7.0
    with pytest.raises(ValueError, match="rate"):
        DualVariable(limit=1.0, rate=0.0)


def test_dynamic_labels_follow_pairs_not_places():
    estimator = DynamicLabels(0.25, lambda scores, pairs: scores.theta[pairs.w])
    scores = Scores.tokens(torch.tensor([0.0, 50.0, 0.0, 0.0], dtype=torch.float64))
    first = estimator.update(scores, Layout(pairs=Pairs.halves(2, uid=torch.tensor([4, 9]))))
    assert first["p"].tolist() == [0.875, 1.0]
    # The same scores, the numbers swapped: pair 4 now wins, pair 9 is at even.
    second = estimator.update(scores, Layout(pairs=Pairs.halves(2, uid=torch.tensor([9, 4]))))
    assert second["p"].tolist() == [0.875, 0.90625]


def test_statistics_that_are_missing_are_named():
    scores, layout = delta_world([1.0])
    with pytest.raises(ValueError, match=r"reads the statistic 'kept_mean'.*estimator"):
        losses.weighted.BetaDPO(beta=0.1)(scores, layout)
