"""Tools of `diffalign.losses.unlearning_tools`, control tokens, and how unlearning behaves when it is trained."""

import math
import random

import pytest
import torch

from diffalign.losses import IncompatibleObjective, Items, Kind, Layout, Pairs, Scores, supervised, unlearning_tools
from diffalign.losses.unlearning import GA, NPO

# -- hidden states ----------------------------------------------------------------------------------------------------


def test_rmu_is_its_formula_with_each_rows_own_count():
    g = torch.Generator().manual_seed(0)
    forget, retain, ref = (torch.randn(3, 4, 5, generator=g, requires_grad=True) for _ in range(3))
    mask = torch.arange(4) < torch.tensor([4, 1, 2])[:, None]
    direction = unlearning_tools.rmu_direction(5, scale=2.0, generator=g)
    torch.testing.assert_close(direction.norm(), torch.tensor(2.0))
    assert (direction >= 0).all()
    rows = [((forget[i, :n] - direction) ** 2).mean() for i, n in enumerate((4, 1, 2))]
    kept = [((retain[i, :n] - ref[i, :n]) ** 2).mean() for i, n in enumerate((4, 1, 2))]
    loss = unlearning_tools.rmu(forget, mask, direction, retain, ref, mask, gamma=0.5, alpha=3.0)
    torch.testing.assert_close(loss, 0.5 * sum(rows) / 3 + 3.0 * sum(kept) / 3)
    loss.backward()
    assert ref.grad is None
    assert (forget.grad[1, 1:] == 0).all()
    torch.testing.assert_close(unlearning_tools.rmu(forget, mask, direction), sum(rows) / 3)


def test_rmu_lifts_half_precision_and_names_what_is_missing():
    states, mask, direction = torch.ones(2, 3, 4, dtype=torch.bfloat16), torch.ones(2, 3).bool(), torch.zeros(4)
    assert unlearning_tools.rmu(states, mask, direction).dtype == torch.float32
    with pytest.raises(ValueError, match="retain_reference"):
        unlearning_tools.rmu(states, mask, direction, retain=states)
    empty = unlearning_tools.rmu(states[:0], mask[:0], direction)
    assert empty == 0


def test_projection_removes_a_subspace():
    layer = unlearning_tools.RepresentationProjection(6, 2, torch.Generator().manual_seed(1))
    q = layer.basis()
    torch.testing.assert_close(q @ q.T, torch.eye(2), rtol=0, atol=1e-6)
    states = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2))
    once = layer(states)
    torch.testing.assert_close(once @ q.T, torch.zeros(3, 5, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(layer(once), once)
    assert once.norm() < states.norm()
    half = layer(states.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    once.square().sum().backward()
    assert torch.isfinite(layer.weight.grad).all()
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("directions", [0, 6])
def test_projection_refuses_sizes(directions):
    with pytest.raises(ValueError, match="directions is"):
        unlearning_tools.RepresentationProjection(6, directions)


# -- parameters -------------------------------------------------------------------------------------------------------


def test_wagle_scores_and_mask():
    weights = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[3.0]])}
    retain = {"a": torch.tensor([0.1, 0.0]), "b": torch.tensor([[0.3]])}
    forget = {"a": torch.tensor([2.0, 1.0]), "b": torch.tensor([[10.0]])}
    scores = unlearning_tools.wagle_scores(weights, retain, forget, mu=0.1)
    torch.testing.assert_close(scores["a"], torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(scores["b"], torch.tensor([[0.0]]))
    scores = unlearning_tools.wagle_scores(weights, retain, forget, mu=0.05)
    torch.testing.assert_close(scores["a"], torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(scores["b"], torch.tensor([[30.0]]))
    mask = unlearning_tools.wagle_mask({"a": torch.tensor([0.5, 2.0, 1.0]), "b": torch.tensor([[3.0]])}, keep=0.5)
    assert mask["a"].tolist() == [False, True, False]
    assert mask["b"].tolist() == [[True]]
    everything = unlearning_tools.wagle_mask(scores, keep=1.0)
    assert all(value.all() for value in everything.values())


def test_wagle_refuses_factors_and_other_names():
    one = {"q.lora_A": torch.ones(1)}
    with pytest.raises(ValueError, match="LoRA factors"):
        unlearning_tools.wagle_scores(one, one, one)
    with pytest.raises(ValueError, match="different names"):
        unlearning_tools.wagle_scores({"a": torch.ones(1)}, {"b": torch.ones(1)}, {"a": torch.ones(1)})
    with pytest.raises(ValueError, match="keep is"):
        unlearning_tools.wagle_mask({"a": torch.ones(1)}, keep=0.0)


# -- weights ----------------------------------------------------------------------------------------------------------


def test_unpii_weighs_risky_items_more():
    """The push on a row, d loss / d score, grows by 1 + risk: the sign that the released code gets wrong."""
    risk = torch.tensor([0.0, unlearning_tools.EXPOSURE_RISK["ssn"]])
    theta = torch.zeros(2, requires_grad=True)
    items = Items(index=torch.arange(2), label=torch.zeros(2), weight=unlearning_tools.unpii_weight(risk))
    out = NPO(beta=0.1, retain="none")(Scores.tokens(theta, torch.zeros(2)), items)
    (grad,) = torch.autograd.grad(out.per_item.sum(), theta)
    torch.testing.assert_close(grad, torch.tensor([1.0, 1.513]))


def test_npo_on_denoising_errors_is_dpo_with_the_chosen_side_at_the_base() -> None:
    """gamma = beta / 2: the loss of a rejected image alone, without a partner."""
    error, base = torch.tensor([0.30, 0.10, 0.25]), torch.tensor([0.20, 0.20, 0.25])
    items = Items(index=torch.arange(3), label=torch.zeros(3))
    out = NPO(beta=40.0, gamma=20.0, retain="none")(Scores.denoising(error, base), items)
    paired = -torch.nn.functional.logsigmoid(40.0 * 0.5 * (error - base))
    torch.testing.assert_close(out.per_item, paired)
    assert out.per_item[0] < math.log(2) < out.per_item[1]  # a larger error than the base's is what is wanted


def test_u2a_weighs_items_that_help_alignment():
    outer = torch.tensor([1.0, 0.0])
    grads = torch.tensor([[2.0, 5.0], [1.0, 0.0], [-3.0, 1.0]])
    torch.testing.assert_close(unlearning_tools.u2a_weights(outer, grads), torch.tensor([2 / 3, 1 / 3, 0.0]))
    preconditioned = unlearning_tools.u2a_weights(torch.tensor([1.0, 1.0]), grads, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(preconditioned, torch.tensor([5 / 6, 0.0, 1 / 6]))
    torch.testing.assert_close(unlearning_tools.u2a_weights(-outer, grads[:2]), torch.tensor([0.5, 0.5]))


# -- training ---------------------------------------------------------------------------------------------------------


def _unlearn(objective, steps):
    """A softmax over 10 answers to 2 questions that share weights; one is to be forgotten, the other retained."""
    torch.manual_seed(0)
    features = torch.tensor([[1.0, 0.6], [0.6, 1.0]])
    weight = torch.zeros(2, 10)
    weight[0, 3], weight[1, 7] = 6.0, 6.0
    weight.requires_grad_()
    logp = lambda: (features @ weight).log_softmax(-1)[torch.arange(2), torch.tensor([3, 7])]  # noqa: E731
    reference = logp().detach()
    items = Items(index=torch.arange(2), label=torch.tensor([0.0, 1.0]))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    for _ in range(steps):
        scores = Scores.tokens(logp(), reference, length=torch.ones(2))
        optimizer.zero_grad()
        objective(scores, items).loss.backward()
        optimizer.step()
    return logp().detach()


def test_npo_stops_where_gradient_ascent_goes_on():
    """Both forget; gradient ascent has no end, NPO's push fades, and the retained answer survives beside it."""
    ascent, npo = _unlearn(GA(), 400), _unlearn(NPO(beta=1.0, retain="none"), 400)
    assert npo[0] < -3
    assert ascent[0] < 5 * npo[0]
    kept = _unlearn(NPO(beta=1.0, alpha=1.0), 400)
    assert kept[0] < -3
    assert kept[1] > npo[1]
    assert kept[1] > -0.5


def test_a_divergence_on_the_retain_set_asks_for_reference_and_vocabulary():
    for objective in (GA(), GA(retain="nll")):
        assert not objective.reads_reference()
        assert not objective.vocabulary()
    with_kl = GA(retain="kl")
    assert with_kl.reads_reference()
    assert set(with_kl.vocabulary()) == {"kl_ref_theta"}
    with pytest.raises(IncompatibleObjective, match=r"set objective\.retain: nll"):
        with_kl.check(Kind.STEP)
    assert NPO(retain="none").reads_reference()


def test_items_without_labels_are_refused():
    scores = Scores.tokens(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="0 to forget, 1 to retain"):
        NPO(beta=0.1)(scores, Items(index=torch.arange(2)))


def test_rows_of_pairs_as_items():
    pairs = Pairs(w=torch.tensor([4, 1]), l=torch.tensor([0, 3]), weight=torch.tensor([2.0, 5.0]))
    items = Layout(pairs=pairs).as_items()
    assert items.index.tolist() == [4, 1, 0, 3]
    assert items.label.tolist() == [1, 1, 0, 0]
    assert items.weight.tolist() == [2, 5, 2, 5]
    own = Items(index=torch.arange(1))
    assert Layout(pairs=pairs, items=own).as_items() is own
    with pytest.raises(ValueError, match="layout has nothing"):
        Layout().as_items()


# -- conditional training ---------------------------------------------------------------------------------------------


def test_control_tokens():
    scores = [0.0, 5.6e-4, 0.2]
    aligned, misaligned = supervised.ALIGNED, supervised.MISALIGNED
    assert supervised.control_tokens(scores, 5.6e-4, omit=0.0) == [aligned, aligned, misaligned]
    assert supervised.control_tokens(scores, 0.0, omit=1.0) == ["", "", ""]
    many = supervised.control_tokens([0.0] * 5000, 0.0, omit=0.1, rng=random.Random(1))
    assert 400 < many.count("") < 600
    assert many == supervised.control_tokens([0.0] * 5000, 0.0, omit=0.1, rng=random.Random(1))
