"""Which samples meet in a step, and what is drawn for them: functions of the seed and of the samples alone."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from diffalign.config import DenoisingConfig
from diffalign.data.batch import collate
from diffalign.data.encode import EncodedPair
from diffalign.data.loader import BatchPlan, PairMicroBatches, draw_timestep, micro_batches
from diffalign.errors import DataError
from diffalign.families import DenoisingFamily

SQUARE, WIDE, TALL = (32, 32), (24, 40), (40, 24)


def plan(n: int, batch_size: int, seed: int = 0) -> BatchPlan:
    return BatchPlan(range(n), [SQUARE] * n, batch_size, seed)


def stream(made: BatchPlan, micro_batches: int) -> list[tuple[int, int]]:
    return [item for k in range(micro_batches) for item in made.micro_batch(k)]


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7])
def test_every_epoch_is_a_permutation_and_none_is_cut_short(batch_size: int) -> None:
    taken = stream(plan(10, batch_size), 40)
    orders = []
    for epoch in range(len(taken) // 10):
        part = taken[10 * epoch : 10 * epoch + 10]
        assert sorted(index for index, _ in part) == list(range(10))
        assert {visit for _, visit in part} == {epoch}
        orders.append(tuple(index for index, _ in part))
    assert len(set(orders)) == len(orders)


def test_a_step_holds_the_same_samples_however_it_is_split() -> None:
    whole, halves, single = plan(10, 4), plan(10, 2), plan(10, 1)
    for step in range(9):  # across three ends of epochs
        samples = whole.micro_batch(step)
        assert [s for k in (2 * step, 2 * step + 1) for s in halves.micro_batch(k)] == samples
        assert [single.micro_batch(4 * step + k)[0] for k in range(4)] == samples


def test_any_micro_batch_can_be_asked_for_at_any_time() -> None:
    in_order = [plan(7, 3).micro_batch(k) for k in range(20)]
    asked = plan(7, 3)
    for k in (19, 2, 11, 3, 2, 0):
        assert asked.micro_batch(k) == in_order[k]


def test_the_order_is_the_seeds() -> None:
    assert stream(plan(10, 2), 10) == stream(plan(10, 2), 10)
    assert stream(plan(10, 2), 10) != stream(plan(10, 2, seed=1), 10)


def test_indices_are_those_that_were_given() -> None:
    kept = [3, 5, 8]
    made = BatchPlan(kept, [SQUARE] * 3, 2, 0)
    assert Counter(index for index, _ in stream(made, 3)) == {3: 2, 5: 2, 8: 2}
    with pytest.raises(DataError, match="no pair to train on"):
        BatchPlan([], [], 2, 0)


def test_a_batch_larger_than_the_data_visits_samples_again() -> None:
    assert Counter(plan(3, 7).micro_batch(0)) == Counter(
        [(i, visit) for visit in (0, 1) for i in range(3)] + [plan(3, 7).micro_batch(0)[-1]]
    )


def bucket_plan(batch_size: int = 4, seed: int = 0) -> tuple[BatchPlan, list[tuple[int, int]]]:
    sizes = [SQUARE] * 11 + [WIDE] * 6 + [TALL] * 2
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(5)).tolist()
    sizes = [sizes[i] for i in order]
    return BatchPlan(range(len(sizes)), sizes, batch_size, seed), sizes


def test_a_micro_batch_has_one_size() -> None:
    made, sizes = bucket_plan()
    seen = set()
    for k in range(30):
        batch = made.micro_batch(k)
        assert len(batch) == 4
        assert len({sizes[index] for index, _ in batch}) == 1
        seen.add(sizes[batch[0][0]])
    assert seen == {SQUARE, WIDE, TALL}


def test_buckets_take_turns_in_an_order_of_the_seed() -> None:
    def turns(seed: int) -> list[tuple[int, int]]:
        made, sizes = bucket_plan(seed=seed)
        return [sizes[made.micro_batch(k)[0][0]] for k in range(20)]

    assert turns(0) == turns(0)
    assert turns(0) != turns(1)
    made, _ = bucket_plan()
    again, _ = bucket_plan()
    expected = [made.micro_batch(k) for k in range(20)]
    assert [again.micro_batch(k) for k in (17, 3, 9)] == [expected[k] for k in (17, 3, 9)]


def test_what_does_not_fill_a_batch_waits_and_visits_count_up() -> None:
    made, _ = bucket_plan()
    taken = stream(made, 60)
    assert len(set(taken)) == len(taken)  # a sample is never drawn twice with the same noise
    visits: dict[int, list[int]] = {}
    for index, visit in taken:
        visits.setdefault(index, []).append(visit)
    assert len(visits) == 19  # nobody is left out
    for seen in visits.values():
        assert sorted(seen) == list(range(len(seen)))
    with_turns = {index: len(seen) for index, seen in visits.items()}
    for size in (SQUARE, WIDE, TALL):
        counts = [with_turns[i] for i in made.groups[size]]
        assert max(counts) - min(counts) <= 1


# --- examples --------------------------------------------------------------------------------------------------------


class Pairs:
    """Encoded pairs whose tensors say which they are."""

    target_sizes: Sequence[tuple[int, int]]

    def __init__(self, labels: Sequence[float]) -> None:
        self.labels = labels
        self.prompts = [f"prompt {i}" for i in range(len(labels))]
        self.target_sizes = [SQUARE] * len(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def pair(self, index: int) -> EncodedPair:
        return EncodedPair(
            id=f"id{index}",
            prompt=self.prompts[index],
            latents=(torch.full((2, 3, 4), 1.0).half(), torch.full((2, 3, 4), 2.0).half()),
            p=self.labels[index],
            weight=0.5,
            user=None,
            original_sizes=((100, 200), (300, 400)),
            crops=((1, 2), (3, 4)),
            target_size=SQUARE,
        )

    def text(self, prompt: str) -> dict[str, Tensor]:
        return {"hidden": torch.full((5,), float(len(prompt))).half()}


def dataset(
    labels: Sequence[float] = (1.0, 0.0, 0.5),
    seed: int = 0,
    denoising: DenoisingConfig | None = None,
    batch_size: int = 2,
) -> PairMicroBatches:
    def image_conditioning(*sizes: tuple[int, int]) -> dict[str, Tensor]:
        return {"time_ids": torch.tensor([float(x) for size in sizes for x in size])}

    family = SimpleNamespace(
        image_conditioning=image_conditioning, schedule=SimpleNamespace(num_timesteps=1000), timestep_sampling="uniform"
    )
    data = Pairs(labels)
    made = BatchPlan(range(len(labels)), data.target_sizes, batch_size, seed)
    return PairMicroBatches(data, made, denoising or DenoisingConfig(), cast(DenoisingFamily, family), seed)


def drawn(example: Any) -> tuple[int, Tensor]:
    return example.t, example.noise


def test_noise_and_timestep_are_those_of_seed_sample_and_visit(monkeypatch: pytest.MonkeyPatch) -> None:
    t, noise = drawn(dataset().example(0, 0))
    # Neither the batch size, nor what else is in the data, nor the label, nor what was drawn before matters.
    other = dataset(labels=(0.0, 1.0), batch_size=1)
    other.example(1, 0)
    assert drawn(other.example(0, 0))[0] == t
    assert torch.equal(drawn(other.example(0, 0))[1], noise)
    torch.manual_seed(99)
    torch.rand(3)
    assert torch.equal(drawn(dataset().example(0, 0))[1], noise)
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(variable, "3")
    assert torch.equal(dataset().example(0, 0).noise, noise)
    for changed in (dataset(seed=1).example(0, 0), dataset().example(1, 0), dataset().example(0, 1)):
        assert not torch.equal(changed.noise, noise)
    assert len({dataset().example(0, visit).t for visit in range(20)}) > 10
    assert noise.dtype == torch.float32
    assert abs(float(torch.cat([dataset().example(0, v).noise for v in range(50)]).std()) - 1) < 0.1


def test_losers_first_are_swapped_with_all_that_belongs_to_them() -> None:
    first, second = [100, 200, 1, 2, 32, 32], [300, 400, 3, 4, 32, 32]
    for index, (chosen, rejected), sizes in ((0, (1, 2), (first, second)), (1, (2, 1), (second, first))):
        example = dataset().example(index, 0)
        assert example.p == 1.0
        assert torch.all(example.chosen == chosen)
        assert torch.all(example.rejected == rejected)
        assert example.chosen_image["time_ids"].tolist() == sizes[0]
        assert example.rejected_image["time_ids"].tolist() == sizes[1]


def test_a_tie_stays_a_tie() -> None:
    example = dataset().example(2, 0)
    assert example.p == 0.5
    assert torch.all(example.chosen == 1)


def test_soft_labels_keep_their_strength() -> None:
    a, b = dataset(labels=(0.75, 0.25)).example(0, 0), dataset(labels=(0.75, 0.25)).example(1, 0)
    assert a.p == b.p == 0.75
    assert torch.all(b.chosen == 2)


def test_dropped_prompts_are_the_empty_one() -> None:
    never, some = dataset(), dataset(denoising=DenoisingConfig(proportion_empty_prompts=0.3))
    assert all(never.example(0, visit).text["hidden"][0] == 8 for visit in range(50))
    lengths = Counter(float(some.example(0, visit).text["hidden"][0]) for visit in range(400))
    assert set(lengths) == {0.0, 8.0}
    assert 0.22 < lengths[0.0] / 400 < 0.38
    # Whether a prompt is dropped changes neither the timestep nor the noise.
    assert torch.equal(never.example(0, 3).noise, some.example(0, 3).noise)


def test_the_range_of_timesteps() -> None:
    narrow = dataset(denoising=DenoisingConfig(timestep_min=10, timestep_max=12))
    assert {narrow.example(0, visit).t for visit in range(60)} == {10, 11, 12}
    everything = {dataset(denoising=DenoisingConfig(timestep_min=998)).example(0, visit).t for visit in range(60)}
    assert everything == {998, 999}


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_stacks_its_examples_in_order() -> None:
    data = dataset(batch_size=3)
    batch = data[0]
    assert len(batch) == 3
    shapes = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    assert shapes["chosen"].shape == shapes["rejected"].shape == shapes["noise"].shape == (3, 2, 3, 4)
    assert shapes["t"].shape == shapes["p"].shape == shapes["weight"].shape == (3,)
    assert batch.t.dtype == torch.int64
    for value in (batch.chosen, batch.rejected, batch.noise, batch.p, batch.weight, batch.text["hidden"]):
        assert value.dtype == torch.float32
    assert batch.chosen_image["time_ids"].dtype == torch.float32
    for row, (index, visit) in enumerate(data.plan.micro_batch(0)):
        example = data.example(index, visit)
        assert batch.ids[row] == f"id{index}"
        assert torch.equal(batch.chosen[row], example.chosen.float())
        assert torch.equal(batch.noise[row], example.noise)
        assert batch.t[row] == example.t
        assert torch.equal(batch.rejected_image["time_ids"][row], example.rejected_image["time_ids"])
    assert batch.chosen_conditioning.keys() == {"hidden", "time_ids"}
    assert torch.equal(batch.rejected_conditioning["time_ids"], batch.rejected_image["time_ids"])
    assert torch.equal(batch.to(torch.device("cpu")).noise, batch.noise)


def test_a_batch_of_one_equals_its_row() -> None:
    data = dataset()
    both = collate([data.example(0, 0), data.example(1, 0)])
    alone = collate([data.example(1, 0)])
    assert torch.equal(both.noise[1:], alone.noise)
    assert torch.equal(both.t[1:], alone.t)


def test_workers_load_the_same_in_the_same_order() -> None:
    data = dataset(labels=[1.0, 0.0, 0.5, 1.0, 0.0])
    alone = list(micro_batches(data, range(3, 9, 2), workers=0))
    ahead = list(micro_batches(data, range(3, 9, 2), workers=1))
    assert [batch.ids for batch in ahead] == [batch.ids for batch in alone] == [data[k].ids for k in (3, 5, 7)]
    for a, b in zip(alone, ahead, strict=True):
        assert torch.equal(a.noise, b.noise)
        assert torch.equal(a.chosen, b.chosen)


# --- timesteps within bounds -------------------------------------------------------------------------------------------


def timesteps(count: int, **settings: Any) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    config = DenoisingConfig(timestep_sampling="logit_normal", **settings)
    return [draw_timestep(config, generator, 1000) for _ in range(count)]


def test_without_bounds_a_logit_normal_timestep_is_one_normal_number() -> None:
    generator = torch.Generator().manual_seed(0)
    shares = [torch.sigmoid(0.5 + 2.0 * torch.randn((), generator=generator)) for _ in range(50)]
    expected = [min(int(1000 * share), 999) for share in shares]
    assert timesteps(50, logit_mean=0.5, logit_std=2.0) == expected
    assert timesteps(50, logit_mean=0.5, logit_std=2.0, timestep_max=999) == expected


@pytest.mark.parametrize("bounds", [(0, 399), (600, None), (350, 700), (700, 900)])
@pytest.mark.parametrize("mean", [-1.0, 0.0, 1.0])
def test_within_bounds_it_is_the_distribution_given_the_bounds(bounds: tuple[int, int | None], mean: float) -> None:
    first, last = bounds
    found = torch.tensor(timesteps(2000, timestep_min=first, timestep_max=last, logit_mean=mean)).double()
    free = torch.tensor(timesteps(40_000, logit_mean=mean)).double()
    kept = free[(free >= first) & (free <= (999 if last is None else last))]
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    width = float(kept.max() - kept.min())
    assert (found.quantile(quantiles) - kept.quantile(quantiles)).abs().max() < 0.05 * width
    assert found.min() >= first
    assert found.max() <= (999 if last is None else last)


@pytest.mark.parametrize(
    ("settings", "around"),
    [
        ({"timestep_min": 998, "logit_std": 0.1}, {998}),  # 62 deviations out
        ({"timestep_max": 1, "logit_std": 0.1}, {1}),
        ({"timestep_min": 990, "logit_std": 0.5}, {990, 991, 992, 993, 994, 995, 996, 997, 998, 999}),
        ({"timestep_min": 500, "timestep_max": 500}, {500}),
    ],
)
def test_bounds_far_from_where_the_distribution_lies_are_kept_at_once(settings: Any, around: set[int]) -> None:
    assert set(timesteps(50, **settings)) <= around
