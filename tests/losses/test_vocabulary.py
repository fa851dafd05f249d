"""Statistics over the vocabulary: values against probabilities, gradients, and logits where naive formulas give NaN."""

from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from diffalign.losses import vocabulary

V = 7
STATISTICS = {
    "kl_ref_theta": vocabulary.kl_ref_theta,
    "kl_theta_ref": vocabulary.kl_theta_ref,
    "entropy": vocabulary.entropy,
    "log_sum_p2": vocabulary.log_sum_p2,
    "ce_u": vocabulary.ce_u,
    "pdu": vocabulary.pdu,
    "undial": vocabulary.undial,
    "dipo_term": partial(vocabulary.dipo_term, top_k=3),
}


def draw(seed=0, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(3, 4, V, generator=g, dtype=torch.float64)
    reference = scale * torch.randn(3, 4, V, generator=g, dtype=torch.float64)
    return logits, reference, torch.randint(0, V, (3, 4), generator=g)


def run(name, logits, reference, labels):
    return STATISTICS[name](logits.log_softmax(-1), labels, reference.log_softmax(-1))


def expected(name, logits, reference, labels):
    p, q = logits.softmax(-1), reference.softmax(-1)
    own, label = logits.detach(), torch.nn.functional.one_hot(labels, V).bool()
    if name == "kl_ref_theta":
        return (q * (q / p).log()).sum(-1)
    if name == "kl_theta_ref":
        return (p * (p / q).log()).sum(-1)
    if name == "entropy":
        return -(p * p.log()).sum(-1)
    if name == "log_sum_p2":
        return (p * p).sum(-1).log()
    if name == "pdu":
        return (logits.max(-1).values - logits.mean(-1)) ** 2
    if name == "ce_u":
        target = own.masked_fill(label, -torch.inf).softmax(-1)
        return cross_entropy(logits.flatten(0, 1), target.flatten(0, 1), reduction="none").view(3, 4)
    if name == "undial":
        target = (reference - 10.0 * label).softmax(-1)
        return cross_entropy(logits.flatten(0, 1), target.flatten(0, 1), reduction="none").view(3, 4)
    top = own >= own.topk(3).values[..., -1:]
    target = (own + top.double()).softmax(-1)
    return (target * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("name", STATISTICS)
def test_values_and_gradients_equal_those_from_probabilities(name):
    logits, reference, labels = draw()
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    a, b = run(name, one, reference, labels), expected(name, other, reference, labels)
    torch.testing.assert_close(a, b)
    for x, value in ((one, a), (other, b)):
        (value * torch.arange(12.0).view(3, 4)).sum().backward()
        assert x.grad is not None
    torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("name", STATISTICS)
def test_no_gradient_reaches_the_reference(name):
    logits, reference, labels = draw(1)
    logits.requires_grad_()
    reference.requires_grad_()
    run(name, logits, reference, labels).sum().backward()
    assert reference.grad is None or (reference.grad == 0).all()


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("size", [200.0, 1e4])
def test_underflowing_probabilities_give_finite_values_and_gradients(name, size):
    """Where softmax is exactly 0 in float32: its log would be minus infinity, and 0 times that NaN."""
    logits = torch.zeros(1, 1, V)
    logits[..., 0] = size
    reference = torch.zeros(1, 1, V)
    reference[..., 1] = size
    labels = torch.zeros(1, 1, dtype=torch.long)
    logits.requires_grad_()
    value = run(name, logits, reference, labels)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(logits.grad).all()


def test_naive_formula_is_what_the_statistic_avoids():
    logits = torch.tensor([[0.0, 200.0]])
    q = logits.softmax(-1)
    assert torch.isnan((q * (q.log() - logits.log_softmax(-1))).sum(-1)).any()
    log_q = logits.log_softmax(-1)
    assert vocabulary.kl_ref_theta(log_q, torch.tensor([0]), log_q) == 0


def test_tokens_that_cannot_be_written_count_as_nothing():
    """Logits of minus infinity (a padded vocabulary) in both models."""
    logits, reference, labels = draw(2)
    pad = torch.full((3, 4, 2), -torch.inf, dtype=torch.float64)
    for name in ("kl_ref_theta", "kl_theta_ref", "entropy", "log_sum_p2", "ce_u", "undial"):
        padded = torch.cat([logits, pad], -1).requires_grad_()
        value = run(name, padded, torch.cat([reference, pad], -1), labels)
        torch.testing.assert_close(value, run(name, logits, reference, labels))
        value.sum().backward()
        assert torch.isfinite(padded.grad).all(), name


@pytest.mark.parametrize("name", STATISTICS)
def test_half_precision_is_lifted(name):
    logits, reference, labels = draw(3)
    value = STATISTICS[name](
        logits.log_softmax(-1).to(torch.bfloat16), labels, reference.log_softmax(-1).to(torch.bfloat16)
    )
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), run(name, logits, reference, labels), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("name", ["kl_ref_theta", "kl_theta_ref", "undial", "dipo_term"])
def test_a_missing_reference_is_named(name):
    logits, _, labels = draw(4)
    with pytest.raises(ValueError, match="compares with a reference"):
        STATISTICS[name](logits.log_softmax(-1), labels, None)


@pytest.mark.parametrize("name", STATISTICS)
def test_chunks_give_the_same(name):
    logits, reference, labels = draw(5)
    parts = [run(name, logits[:, i : i + 2], reference[:, i : i + 2], labels[:, i : i + 2]) for i in (0, 2)]
    torch.testing.assert_close(torch.cat(parts, 1), run(name, logits, reference, labels))


def test_divergences_are_torchs_and_zero_at_equality():
    logits, reference, labels = draw(6)
    logp, log_q = logits.log_softmax(-1), reference.log_softmax(-1)
    total = kl_div(logp, log_q, reduction="sum", log_target=True)
    torch.testing.assert_close(vocabulary.kl_ref_theta(logp, labels, log_q).sum(), total)
    for kl in (vocabulary.kl_ref_theta, vocabulary.kl_theta_ref):
        assert (kl(logp, labels, log_q) > 0).all()
        torch.testing.assert_close(kl(logp, labels, logp), torch.zeros(3, 4, dtype=torch.float64))


def test_uniform_distributions():
    logp = torch.zeros(1, V, dtype=torch.float64).log_softmax(-1)
    labels = torch.tensor([2])
    log_v = torch.tensor([V], dtype=torch.float64).log()
    torch.testing.assert_close(vocabulary.entropy(logp, labels), log_v)
    torch.testing.assert_close(vocabulary.log_sum_p2(logp, labels), -log_v)
    torch.testing.assert_close(vocabulary.pdu(logp, labels), torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(vocabulary.ce_u(logp, labels), log_v)


def test_ce_u_lowers_only_the_label():
    """Its gradient is p - target: what is taken from the label is given to the others in their proportions."""
    logits, _, labels = draw(7)
    logits.requires_grad_()
    vocabulary.ce_u(logits.log_softmax(-1), labels).sum().backward()
    label = torch.nn.functional.one_hot(labels, V).bool()
    assert (logits.grad[label] > 0).all()
    assert (logits.grad[~label] < 0).all()


def test_dipo_terms_at_the_reference_are_zero_and_gradient_parts_them():
    logits, _, labels = draw(8)
    x = logits.clone().requires_grad_()
    ref = logits.log_softmax(-1)
    terms = [vocabulary.dipo_term(x.log_softmax(-1), labels, ref, s, top_k=2) for s in (-1.0, 1.0)]
    torch.testing.assert_close(terms[0] - terms[1], torch.zeros(3, 4, dtype=torch.float64))
    (grad,) = torch.autograd.grad((terms[0] - terms[1]).sum(), x)
    top = logits >= logits.topk(2).values[..., -1:]
    assert (grad[top] < 0).all()
    assert (grad[~top] > 0).all()


def test_ignored_labels_are_finite():
    logits, reference, labels = draw(9)
    labels[:, 0] = -100
    for name in ("ce_u", "undial"):
        assert torch.isfinite(run(name, logits, reference, labels)).all()
