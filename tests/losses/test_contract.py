"""The contract of every objective of the core; see tests/loss_cases.py."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import loss_cases
import pytest
import torch
from loss_cases import Case, as_type, detach, leaf, survives, with_leaf

from diffalign import losses
from diffalign.losses import IncompatibleObjective, Kind


def load_cases() -> list[Case]:
    found = []
    for path in sorted((Path(__file__).parent / "cases").glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"loss_cases_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found += module.CASES
    return found


CASES = load_cases()
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)


def test_every_objective_has_a_case_and_no_two_cases_share_a_label():
    # Variants of a case have a name of their own and fewer obligations.
    assert set(losses.catalogue()) == {case.objective.name for case in CASES if not case.name}
    labels = [case.label for case in CASES]
    assert len(labels) == len(set(labels))


@by_case
def test_case_is_complete(case):
    """Identities, mutations, start values and metadata: what a new objective must not lack."""
    assert case.identities
    assert len(set(case.mutations)) >= (1 if case.name else 2)
    assert not isinstance(case.start, str) or len(case.start) > 10, "say why there is no value at the start"
    cls = case.objective
    for text in (cls.name, cls.title, cls.composition, cls.__doc__):
        assert text
        assert text.strip()
    assert cls.status in ("stable", "experimental")
    assert bool(cls.unknown) == (cls.status == "experimental"), "experimental objectives say what is unknown"
    assert cls.paper or "arXiv id unknown" in cls.__doc__ or "no paper" in cls.__doc__


@by_case
def test_value_and_slopes_at_the_start(case):
    loss_cases.check_start(case, case.objective)


@by_case
def test_values_equal_an_independent_transcription(case):
    loss_cases.check_formula(case, case.objective)


@by_case
def test_gradient_equals_finite_differences(case):
    loss_cases.check_gradient(case, case.objective)


@by_case
def test_identities(case):
    loss_cases.check_identities(case, case.objective)


@pytest.mark.parametrize("case", [c for c in CASES if not c.name], ids=lambda case: case.label)
def test_some_identity_can_fail(case):
    """An identity that no broken objective violates says nothing; some may be about settings, but not all."""
    assert any(loss_cases.fails(identity, case.objective) for identity in case.identities)


@by_case
def test_mutations_are_noticed(case):
    for old, new in case.mutations:
        assert not survives(case, old, new), f"replacing {old!r} by {new!r} goes unnoticed"


@by_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_scores_are_lifted(case, dtype):
    scores, layout, stats = as_type(case.batch(1), dtype)
    x = leaf(scores).requires_grad_()
    out = case.make(case.objective)(with_leaf(scores, x), layout, stats)
    assert out.per_item.dtype == torch.float32
    assert torch.isfinite(out.per_item).all()
    (grad,) = torch.autograd.grad(out.per_item.sum(), x)
    assert torch.isfinite(grad).all()


def test_cases_spared_extreme_scores_say_why():
    assert all(len(case.extreme) > 20 for case in CASES if case.extreme)


@pytest.mark.parametrize("case", [c for c in CASES if not c.extreme], ids=lambda case: case.label)
@pytest.mark.parametrize("size", [1e4, -1e4, 1e-30, 0.0])
def test_extreme_scores_stay_finite(case, size):
    """Scores of +-1e4 with alternating signs, all at -1e4, nothing, and probabilities of one; in float32."""
    scores, layout, stats = as_type(case.batch(2), torch.float32)
    x = leaf(scores)
    signs = torch.where(torch.arange(x.numel()).view(x.shape) % 2 == 0, 1.0, -1.0)
    # Token log-probabilities are never positive; sums of them are only ever compared, so both signs are tried there.
    x = (size * signs if size > 0 and scores.units is None else -abs(size) * signs.abs()).requires_grad_()
    out = case.make(case.objective)(with_leaf(scores, x), layout, stats)
    assert torch.isfinite(out.per_item).all()
    (grad,) = torch.autograd.grad(out.per_item.sum(), x)
    assert torch.isfinite(grad).all()


@by_case
def test_nothing_but_the_policy_gets_gradient_and_metrics_are_detached(case):
    out = case.make(case.objective)(*case.batch(3))
    assert out.metrics
    for name, value in out.metrics.items():
        assert not value.requires_grad, name
        assert value.ndim == 1, name


@by_case
def test_refused_kinds_are_refused_with_reason_and_alternative(case):
    objective = case.make(case.objective)
    for kind in Kind:
        if kind in case.kinds:
            objective.check(kind)
        else:
            with pytest.raises(IncompatibleObjective) as refusal:
                objective.check(kind)
            assert refusal.value.why
            assert refusal.value.instead, "name the nearest meaningful alternative"


def test_what_is_named_as_an_alternative_exists():
    for name, cls in losses.catalogue().items():
        for other in re.findall(r"'(\w+)'", cls.instead):
            assert other in losses.names(), f"{name} advises {other}"


@by_case
def test_missing_parts_are_named(case):
    objective = case.make(case.objective)
    scores, _, stats = detach(case.batch(0))
    with pytest.raises(ValueError, match="layout has nothing"):
        objective(scores, losses.Layout(), stats)
    if objective.needs.reference and scores.ref is not None and scores.units is None:
        with pytest.raises(ValueError, match="reference"):
            objective(replace(scores, ref=None), case.batch(0)[1], stats)


ORDERLESS = [c for c in CASES if c.batch(0)[1].pairs is not None and "batch order" not in c.tags]


@pytest.mark.parametrize("case", ORDERLESS, ids=lambda case: case.label)
def test_pairs_in_another_order_give_the_same_losses_in_that_order(case):
    """Rows have no memory of their place: permuting the rows with their indices changes nothing."""
    scores, layout, stats = detach(case.batch(7))
    order = torch.arange(len(layout.pairs)).flip(0)

    def pick(value):
        return value[order] if isinstance(value, torch.Tensor) else value

    flipped = replace(layout.pairs, **{f: pick(getattr(layout.pairs, f)) for f in layout.pairs.__dataclass_fields__})
    # Statistics per pair move with their pairs.
    moved = {name: pick(x) if x.shape[:1] == order.shape else x for name, x in stats.items()}
    objective = case.make(case.objective)
    one, other = objective(scores, layout, stats), objective(scores, replace(layout, pairs=flipped), moved)
    torch.testing.assert_close(one.loss, other.loss)


@by_case
def test_what_is_read_is_declared(case):
    """Scorers and data sets supply what `needs`, `reads_*` and `vocabulary` name: the rest must not be missed.

    The behaviour policy's scores are optional for objectives on groups, where fresh rows have a ratio of one.
    """
    scores, layout, stats = detach(case.batch(0))
    objective = case.make(case.objective)
    given = objective(*loss_cases.only_declared(objective, (scores, layout, stats), optional=case.optional))
    if scores.old is None or objective.needs.old:
        torch.testing.assert_close(given.per_item, objective(scores, layout, stats).per_item)


NOT_SPLIT = {
    "bnpo": "a mean over the micro-batch, by definition",
    "rft": "which samples are accepted is not among the counts of a step",
    "raft": "which samples are accepted is not among the counts of a step",
    "spo_degree": "adds the mean over the further items of the micro-batch, exact where their number is the same in all",
    "mapl": "adds the mean over the further pairs of the micro-batch, exact where their number is the same in all",
    "dual_ipo": "adds the mean over the real items of the micro-batch, exact where their number is the same in all",
    "dspo, link, above its gate": "its gate is the mean of the micro-batch, by definition",
    "diffusion_nft": "divides by the deviation of the whole round, which a trainer computes before it cuts it",
    "ddpo": "standardises over the whole round, which a trainer does before it cuts it",
    "flow_grpo": "divides by the deviation of the whole round, which a trainer computes before it cuts it",
    "crd, two-sided, over the batch": "centres over the micro-batch, if it is told to",
    "bide_dpo of a batch alone": "without statistics its shares are those of the micro-batch",
    "aot": "sorts the micro-batch, by definition",
    "aot_unpaired": "sorts the micro-batch, by definition",
}


@pytest.mark.parametrize(
    "case", [c for c in CASES if not {c.objective.name, c.label} & NOT_SPLIT.keys()], ids=lambda case: case.label
)
def test_a_step_in_two_micro_batches_has_the_same_loss(case):
    """With the counts of the step in `Scores.totals`, whatever the lengths and labels in either half."""
    scores, layout, stats = detach(case.batch(0))
    objective = case.make(case.objective)
    whole = objective(scores, layout, stats)
    counted = replace(scores, totals=loss_cases.totals_of(scores, layout, len(whole.per_item)))
    parts = [objective(counted, *half).per_item for half in loss_cases.halves(layout, stats)]
    torch.testing.assert_close(torch.cat(parts).mean(), whole.loss)


@pytest.mark.parametrize("case", [c for c in CASES if c.batch(0)[1].lists is not None], ids=lambda case: case.label)
def test_padded_places_of_lists_may_hold_any_index(case):
    scores, layout, stats = detach(case.batch(0))
    objective, lists = case.make(case.objective), layout.lists
    assert not lists.mask.all(), "a batch without padding"
    elsewhere = replace(layout, lists=replace(lists, index=lists.index.masked_fill(~lists.mask, 10**6)))
    expected = objective(scores, layout, stats).per_item
    torch.testing.assert_close(objective(scores, elsewhere, stats).per_item, expected)


WITH_MARGINS = [
    c for c in CASES if "rewards/margins" in c.make(c.objective)(*c.batch(0)).metrics and c.batch(0)[1].pairs
]


@pytest.mark.parametrize("case", WITH_MARGINS, ids=lambda case: case.label)
def test_reported_margins_and_accuracy_leave_target_margins_out(case):
    """They say what the policy prefers, and compare between runs whatever margin is asked for."""
    scores, layout, stats = detach(case.batch(0))
    objective = case.make(case.objective)
    farther = replace(layout, pairs=replace(layout.pairs, margin=layout.pairs.margin + 3.0))
    one, other = objective(scores, layout, stats).metrics, objective(scores, farther, stats).metrics
    for name in ("rewards/margins", "implicit_acc"):
        if name in one:
            torch.testing.assert_close(one[name], other[name])
