"""List losses, trees and steps as functions."""

import pytest
import torch

from diffalign.losses import Lists, Scores
from diffalign.losses.ranked import lambda_weights, model_ranks, plackett_luce, step_means, step_similarity_weights


def units_of(segment, mask=None):
    segment = torch.tensor(segment)
    mask = torch.ones_like(segment, dtype=torch.bool) if mask is None else torch.tensor(mask).bool()
    zero = torch.zeros(segment.shape, dtype=torch.float64)
    return Scores.tokens(zero, zero, mask=mask, segment=segment).need_units()


def one_list(gain):
    n = len(gain)
    return Lists(index=torch.arange(n)[None], gain=torch.tensor([gain]), mask=torch.ones(1, n, dtype=torch.bool))


def test_ranks_go_by_score_then_by_gain_and_padding_comes_last():
    u = torch.tensor([[0.5, 0.5, 2.0, 9.0]])
    gain = torch.tensor([[0.0, 1.0, 0.5, 7.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert model_ranks(u, gain, mask).tolist() == [[3.0, 2.0, 1.0, 4.0]]


def test_tied_rows_compete_with_their_whole_tie():
    u = torch.tensor([[0.3, -0.7, 1.1]], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    tied = plackett_luce(u, torch.tensor([[1.0, 1.0, 0.0]]), mask)
    everyone = u[0].logsumexp(0)
    torch.testing.assert_close(tied[0], 2 * everyone - u[0, 0] - u[0, 1])


def test_padding_of_a_list_carries_nothing():
    """Whatever stands in padded places: not a number, infinite, huge."""
    u = torch.tensor([[0.3, -0.7, float("nan")]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    loss = plackett_luce(u, torch.tensor([[1.0, 0.0, 5.0]]), mask)
    torch.testing.assert_close(loss[0], -torch.nn.functional.logsigmoid(u[0, 0] - u[0, 1]))
    (grad,) = torch.autograd.grad(loss.sum(), u)
    assert grad[0, 2] == 0
    assert torch.isfinite(grad).all()


def test_lambda_weights_are_symmetric_and_vanish_between_equal_gains():
    u, gain = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.2, 0.2, 1.0, 0.0]])
    weight = lambda_weights(u, gain, torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(weight, weight.mT)
    assert weight[0, 0, 1] == 0
    assert weight.diagonal(dim1=1, dim2=2).sum() == 0


def test_means_of_steps_leave_out_padding_and_units_without_step():
    units = units_of([[1, 1, 2, 0], [2, 2, 2, 2]], [[1, 1, 1, 1], [1, 1, 0, 0]])
    x = torch.tensor([[1.0, 3.0, 5.0, 100.0], [2.0, 4.0, 100.0, 100.0]])
    mean, there = step_means(x, units)
    assert mean.tolist() == [[2.0, 5.0], [0.0, 3.0]]
    assert there.tolist() == [[True, True], [False, True]]
    vectors, _ = step_means(torch.stack([x, -x], -1), units)
    torch.testing.assert_close(vectors[..., 1], -mean)


def test_similar_steps_weigh_up_to_two_and_missing_ones_one():
    units = units_of([[1, 1, 2, 2], [1, 2, 2, 3], [1, 2, 2, 0]])
    hidden = torch.zeros(3, 4, 2)
    hidden[0, :2, 0] = 1.0  # best response: step 1 points right,
    hidden[0, 2:, 1] = 1.0  # step 2 up
    hidden[1, 0, 0] = 3.0  # same direction
    hidden[1, 1:3, 1] = -1.0  # opposite
    hidden[1, 3, 0] = 1.0  # a step the best one lacks
    hidden[2, 0, 1] = 1.0  # orthogonal
    hidden[2, 1:3, 1] = 5.0
    weight = step_similarity_weights(hidden, units, one_list([1.0, 0.5, 0.0]))
    expected = [[2.0, 2.0, 2.0, 2.0], [2.0, 0.0, 0.0, 1.0], [1.0, 2.0, 2.0, 1.0]]
    torch.testing.assert_close(weight, torch.tensor(expected))


def test_rows_outside_of_all_lists_weigh_one():
    units = units_of([[1, 1], [1, 1], [1, 1]])
    lists = Lists(
        index=torch.tensor([[0, 1, 50]]), gain=torch.tensor([[1.0, 0.0, 9.0]]), mask=torch.tensor([[1, 1, 0]]).bool()
    )
    weight = step_similarity_weights(torch.ones(3, 2, 4), units, lists)
    torch.testing.assert_close(weight, torch.tensor([[2.0, 2.0], [2.0, 2.0], [1.0, 1.0]]))


def test_steps_must_be_marked():
    zero = torch.zeros(1, 2)
    units = Scores.tokens(zero, zero, mask=torch.ones(1, 2, dtype=torch.bool)).need_units()
    with pytest.raises(ValueError, match=r"units\.segment is missing"):
        step_means(zero, units)
