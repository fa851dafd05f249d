"""Pairs, labels and segments from other structures."""

import itertools

import pytest
import torch

from diffalign import losses
from diffalign.losses import Pairs, Scores
from diffalign.losses.pairing import (
    conservative_label,
    context_pairs,
    divergence_segments,
    join_by_key,
    rank_consistency,
    worst_step,
)


def test_siblings_count_from_the_first_difference_on():
    ids = torch.tensor([[5, 6, 7, 8, 0], [5, 6, 9, 8, 3], [1, 2, 0, 0, 0], [1, 2, 0, 0, 0], [4, 4, 4, 4, 4]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    segment = divergence_segments(ids, mask, Pairs(w=torch.tensor([0, 2]), l=torch.tensor([1, 3])))
    assert segment.tolist() == [
        [0, 0, 1, 1, 0],  # later equal tokens still belong
        [0, 0, 1, 1, 1],
        [0, 0, 1, 0, 0],  # equal to padding, where the other one has ended
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],  # in no pair
    ]


def test_equal_siblings_have_no_difference():
    ids = torch.tensor([[1, 2], [1, 2]])
    assert divergence_segments(ids, torch.ones(2, 2, dtype=torch.bool), Pairs.halves(1)).sum() == 0


def test_conservative_labels_never_turn_a_pair_round():
    p = conservative_label(torch.tensor([1.0, 0.8, 0.5, 0.2]))
    torch.testing.assert_close(p, torch.tensor([1.0, 0.8, 0.5, 0.5]))


def test_the_worst_step_is_where_success_drops_most():
    value = torch.tensor([[0.8, 0.2, 0.1, 0.0], [0.4, 0.5, 0.45, -9.0]])
    mask = torch.tensor([[True, True, True, True], [True, True, True, False]])
    index, advantage = worst_step(value, mask, start=torch.tensor([0.7, 0.9]))
    assert index.tolist() == [1, 0]
    torch.testing.assert_close(advantage, torch.tensor([-0.6, -0.5]))


def test_contexts_that_flip_the_label_give_pairs_of_both_kinds():
    layout = context_pairs(torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]))
    assert list(zip(layout.pairs.w.tolist(), layout.pairs.l.tolist())) == [(0, 1), (4, 5), (3, 2), (7, 6)]
    assert list(zip(layout.conditions.w.tolist(), layout.conditions.l.tolist())) == [(0, 2), (4, 6), (3, 1), (7, 5)]
    assert layout.pairs.uid.tolist() == [0, 1, 0, 1]
    with pytest.raises(ValueError, match=r"\(P, 4\)"):
        context_pairs(torch.zeros(3, 2, dtype=torch.long))


def test_a_response_that_is_likely_in_every_context_wins_nothing_between_conditions():
    layout = context_pairs(torch.tensor([[0, 1, 2, 3]]))
    ref = torch.zeros(4, dtype=torch.float64)
    favours_one = Scores.tokens(torch.tensor([5.0, 0.0, 5.0, 0.0], dtype=torch.float64), ref)
    out = losses.DPO(beta=1.0)(favours_one, layout.conditions)
    torch.testing.assert_close(out.per_item, torch.full((2,), 0.5, dtype=torch.float64).log().neg())


def kendall(one, other):
    pairs = list(itertools.combinations(range(len(one)), 2))
    sign = lambda x: (x > 0) - (x < 0)  # noqa: E731
    return sum(sign(one[i] - one[j]) * sign(other[i] - other[j]) for i, j in pairs) / len(pairs)


def test_kendall_consistency_equals_counting_pairs():
    g = torch.Generator().manual_seed(0)
    one, other = torch.randn(20, 6, generator=g), torch.randint(0, 4, (20, 6), generator=g).float()
    expected = torch.tensor([(kendall(a.tolist(), b.tolist()) + 1) / 2 for a, b in zip(one, other)])
    torch.testing.assert_close(rank_consistency(one, other), expected)


@pytest.mark.parametrize(("measure", "swapped"), [("kendall", 5 / 6), ("spearman", 0.9), ("top_bottom", 1.0)])
def test_consistency_of_equal_reversed_and_nearly_equal_rankings(measure, swapped):
    one = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert rank_consistency(one, 10 * one, measure).item() == pytest.approx(1.0)
    assert rank_consistency(one, -one, measure).item() == pytest.approx(0.0)
    # The two in the middle swapped: tau = 4 / 6, Spearman 1 - 6 * 2 / (4 * 15).
    assert rank_consistency(one, torch.tensor([[1.0, 3.0, 2.0, 4.0]]), measure).item() == pytest.approx(swapped)


def test_top_bottom_asks_for_both_ends():
    one = torch.tensor([[1.0, 2.0, 3.0]]).repeat(3, 1)
    other = torch.tensor([[1.0, 2.0, 3.0], [2.0, 1.0, 3.0], [1.0, 3.0, 2.0]])
    assert rank_consistency(one, other, "top_bottom").tolist() == [1.0, 0.0, 0.0]


def test_other_measures_and_shapes_are_refused():
    with pytest.raises(ValueError, match="kendall, spearman or top_bottom"):
        rank_consistency(torch.zeros(1, 2), torch.zeros(1, 2), "pearson")
    with pytest.raises(ValueError, match="C >= 2"):
        rank_consistency(torch.zeros(3, 1), torch.zeros(3, 1))


def test_values_are_joined_by_key_and_missing_ones_are_told():
    values = {7: 0.9, 3: 0.4, 5: 1.0}
    torch.testing.assert_close(join_by_key(torch.tensor([5, 7, 7]), values), torch.tensor([1.0, 0.9, 0.9]))
    with pytest.raises(ValueError, match="2 keys have no value, first 8"):
        join_by_key(torch.tensor([8, 3, 9]), values)
