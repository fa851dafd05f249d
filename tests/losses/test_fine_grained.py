"""Masks of `diffalign.losses.fine_grained`, and objectives on text written out in full."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from diffalign.losses import Pairs, Scores, fine_grained, vocabulary

MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
VALUES = torch.tensor([[4.0, 1.0, 3.0, 2.0, 99.0], [5.0, 6.0, 99.0, 99.0, 99.0], [99.0] * 5])


@pytest.mark.parametrize("keep", [0.2, 0.3, 0.5, 0.8, 1.0])
def test_quantile_mask_of_the_batch_is_that_of_torch_quantile(keep):
    chosen = fine_grained.quantile_mask(VALUES, MASK, keep)
    threshold = torch.quantile(VALUES[MASK], 1 - keep)
    assert torch.equal(chosen, MASK & (threshold <= VALUES))


def test_quantile_mask_of_rows():
    chosen = fine_grained.quantile_mask(VALUES, MASK, 0.5, scope="row")
    assert chosen.tolist() == [[True, False, True, False, False], [False, True, False, False, False], [False] * 5]
    assert torch.equal(fine_grained.quantile_mask(VALUES, MASK, 1.0, scope="row"), MASK)


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.5])
def test_quantile_mask_refuses_fractions(keep):
    with pytest.raises(ValueError, match="keep is"):
        fine_grained.quantile_mask(VALUES, MASK, keep)


def test_activation_mask_is_rescaled_within_rows():
    made = fine_grained.activation_mask(VALUES, MASK)
    torch.testing.assert_close(made[0], torch.tensor([1.0, 0.0, 2 / 3, 1 / 3, 0.0]))
    torch.testing.assert_close(made[1], torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0]))
    assert (made[2] == 0).all()
    assert (fine_grained.activation_mask(torch.ones(3, 5), MASK) == 0).all()


def test_object_weight_is_largest_on_the_object_and_smooth():
    mask = torch.zeros(1, 24, 24)
    mask[:, 8:16, 8:16] = 1
    weight = fine_grained.object_weight(mask, alpha=2.0)
    torch.testing.assert_close(weight[0, 12, 12], torch.tensor(3.0))
    torch.testing.assert_close(weight[0, 0, 0], torch.tensor(1.0))
    assert 1 < weight[0, 8, 12] < 3
    # The blur is a convolution with a kernel of sum 1: half of an edge is outside.
    kernel = torch.exp(-(torch.arange(-2.0, 3.0) ** 2) / 2)
    torch.testing.assert_close(weight[0, 8, 12], 1 + 2 * (kernel[2:].sum() / kernel.sum()))
    sharper = fine_grained.object_weight(mask, alpha=2.0, gamma=3.0)
    torch.testing.assert_close(sharper - 1, (weight - 1) ** 3 / 4)
    assert (fine_grained.object_weight(torch.ones(1, 8, 8)) == 1).all()


def test_weighted_mean_of_nothing_is_zero():
    x = torch.full((3, 5), -2.0)
    torch.testing.assert_close(fine_grained.weighted_mean(x, MASK), torch.tensor([-2.0, -2.0, 0.0]))
    assert (fine_grained.weighted_mean(x, MASK, torch.zeros(3, 5)) == 0).all()


@pytest.mark.parametrize("hidden", [0, 6])
def test_mask_head_makes_trainable_masks(hidden):
    torch.manual_seed(0)
    head = fine_grained.MaskHead(layers=3, width=4, hidden=hidden, dropout=0.0)
    states = [3 * torch.randn(2, 90, 4) for _ in range(3)]
    mask = head(states)
    assert mask.shape == (2, 90)
    assert (mask >= 0).all()
    assert (mask > 0).any()
    assert hidden or (mask == 0).any()
    mask.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())
    assert head.mixer.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="2 layers"):
        head(states[:2])


def test_mask_head_trains_sparse_po():
    """A head, its L1 penalty and the loss: gradient arrives at the head, and the penalty alone drives the masks to zero."""
    torch.manual_seed(1)
    head = fine_grained.MaskHead(layers=1, width=4, dropout=0.0)
    states = [torch.randn(4, 5, 4)]
    mask = torch.ones(4, 5).bool()
    theta = -torch.rand(4, 5)
    kl = torch.rand(4, 5)
    scores = Scores.tokens(theta, theta - 0.1, mask=mask, vocabulary={fine_grained.KL: kl})
    optimizer = torch.optim.SGD(head.parameters(), lr=0.05)
    loss = fine_grained.SparsePO(beta=0.1, lambda_u=1.0, lambda_d=1.0)
    sizes = []
    for _ in range(200):
        made = head(states)
        sizes.append(made.sum().item())
        optimizer.zero_grad()
        loss(fine_grained.with_weights(scores, made), Pairs.halves(2)).loss.backward()
        optimizer.step()
    assert sizes[0] > 0.5
    assert sizes[-1] < 0.2 * sizes[0]


def test_tdpo_on_logits_equals_the_formula_written_out():
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 5, 7, generator=g, dtype=torch.float64).requires_grad_()
    reference = torch.randn(4, 5, 7, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 7, (4, 5), generator=g)
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 2])[:, None]
    logp, ref = logits.log_softmax(-1), reference.log_softmax(-1)
    gather = lambda x: x.gather(-1, labels[..., None])[..., 0]  # noqa: E731
    kl = {fine_grained.KL: vocabulary.kl_ref_theta(logp, labels, ref)}
    scores = Scores.tokens(gather(logp), gather(ref), mask=mask, vocabulary=kl)
    q = reference.softmax(-1)
    k = ((q * (q.log() - logits.softmax(-1).log())).sum(-1) * mask).sum(1)
    margin = ((gather(logp) - gather(ref)) * mask).sum(1)
    delta = margin[:2] - margin[2:]
    for objective, bracket in (
        (fine_grained.TDPO1(beta=0.2), delta - (k[2:] - k[:2])),
        (fine_grained.TDPO2(beta=0.2, alpha=0.7), delta - 0.7 * (k[2:] - k[:2].detach())),
    ):
        expected = -logsigmoid(0.2 * bracket)
        out = objective(scores, Pairs.halves(2))
        torch.testing.assert_close(out.per_item, expected)
        (one,) = torch.autograd.grad(out.loss, logits, retain_graph=True)
        (other,) = torch.autograd.grad(expected.mean(), logits, retain_graph=True)
        torch.testing.assert_close(one, other)


def test_missing_parts_are_named():
    mask = torch.ones(2, 3).bool()
    theta = -torch.rand(2, 3)
    plain = Scores.tokens(theta, theta, mask=mask)
    with pytest.raises(ValueError, match="kl_ref_theta"):
        fine_grained.TDPO1(beta=0.1)(plain, Pairs.halves(1))
    with pytest.raises(ValueError, match="segment"):
        fine_grained.RRPO(beta=0.1)(plain, Pairs.halves(1))
    with pytest.raises(ValueError, match=r"units\.ref"):
        fine_grained.SparsePO(beta=0.1, use_kl=False)(Scores.tokens(theta, mask=mask), Pairs.halves(1))
    with pytest.raises(ValueError, match="conditions"):
        fine_grained.OSPO(copo_weight=1.0)(plain, Pairs.halves(1))
