"""What every objective of the core must come with, and the checks that run on all of them (tests/losses/test_contract.py).

A `Case` holds an independent transcription of the formula, the value and slopes at policy == reference, identities, and
mutations of the source that must turn at least one of those red.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import ModuleType

import torch
from torch import Tensor

from diffalign import losses
from diffalign.losses import Cap, Kind, Layout, Objective, Pairs, Scores, Units

Batch = tuple[Scores, Layout, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Start:
    """Value and slopes at policy == reference.

    Attributes:
        value: of one item, as published constants or hand computation give it.
        slopes: d(sum of per_item) / d theta per row of `rows`.
    """

    value: float
    slopes: Sequence[float]
    batch: Callable[[], Batch]
    tolerance: float = 1e-5


@dataclass(frozen=True)
class Case:
    """One objective's obligations.

    Attributes:
        objective: the class.
        make: builds it (from the class given, which may be a mutant) with settings that use all its terms.
        batch: (seed) -> random scores, layout and stats in float64, with theta (and units.theta) requiring gradient.
        formula: (batch, frozen) -> loss per item, written independently of the package with plain torch operations. Whatever
            the method detaches is computed from `frozen`, a copy of the batch at the base point, so that finite differences
            hold it fixed.
        start: value and slopes at policy == reference, or the reason why there is none.
        identities: functions of the class that assert something the formula does not (swap, scaling, degenerate equality,
            invariance); at least one.
        mutations: (old, new) replacements in the source of the objective's module, each of which must be noticed: at least a
            sign and a factor. `old` must occur; the first occurrence after `class <Name>` is replaced.
        kinds: kinds of score it runs on.
        extreme: why scores of +-1e4 are outside of the domain, where they are; "" runs the check.
        tags: "batch order" for methods that pair rows by their place in the batch.
        optional: parts of the layout, or statistics, that these settings read and others do not, so that `needs` has not.
    """

    objective: type[Objective]
    make: Callable[[type[Objective]], Objective]
    batch: Callable[[int], Batch]
    formula: Callable[[Batch, Batch], Tensor]
    start: Start | str
    identities: Sequence[Callable[[type[Objective]], None]]
    mutations: Sequence[tuple[str, str]]
    kinds: Sequence[Kind] = (Kind.TOKEN,)
    name: str = ""
    extreme: str = ""
    tags: Sequence[str] = field(default_factory=tuple)
    optional: Sequence[str] = field(default_factory=tuple)

    @property
    def label(self) -> str:
        return self.name or self.objective.name


# -- batches ---------------------------------------------------------------------------------------------------------


def token_scores(
    n: int, u: int = 5, seed: int = 0, *, ref: bool = True, old: bool = False, spread: float = 0.4, **more: object
) -> Scores:
    """Random per-token log-probabilities with ragged lengths (1 to u), float64; theta requires gradient."""
    g = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return -0.05 - torch.rand(n, u, generator=g, dtype=torch.float64) * 2

    length = torch.randint(1, u + 1, (n,), generator=g)
    length[0] = u
    mask = torch.arange(u) < length[:, None]
    theta = draw().requires_grad_()
    near = lambda: (theta.detach() + spread * torch.randn(n, u, generator=g, dtype=torch.float64)).clamp(max=-1e-3)  # noqa: E731
    return Scores.tokens(theta, near() if ref else None, near() if old else None, mask=mask, **more)


def row_scores(n: int, seed: int = 0, *, ref: bool = True, spread: float = 2.0, **more: object) -> Scores:
    """Random summed log-probabilities per row with lengths, float64; theta requires gradient."""
    g = torch.Generator().manual_seed(seed)
    theta = (-1 - 20 * torch.rand(n, generator=g, dtype=torch.float64)).requires_grad_()
    noise = spread * torch.randn(n, generator=g, dtype=torch.float64)
    more.setdefault("length", torch.randint(1, 30, (n,), generator=g))
    return Scores.tokens(theta, theta.detach() + noise if ref else None, **more)


def at_start(rows: int, *, length: Sequence[int] | None = None, value: float = -7.0) -> Scores:
    """Rows with policy == reference."""
    theta = torch.full((rows,), value, dtype=torch.float64, requires_grad=True)
    more = {} if length is None else {"length": torch.tensor(length)}
    return Scores.tokens(theta, theta.detach().clone(), **more)


def pair_batch(seed: int, *, units: bool = False, soft: bool = True, **more: object) -> Batch:
    """4 pairs of 8 rows; with `soft`, soft labels, weights and margins per pair; with `units`, scores per token."""
    g = torch.Generator().manual_seed(seed + 100)
    rand = lambda: torch.rand(4, generator=g, dtype=torch.float64)  # noqa: E731
    labels = {"p": 0.6 + 0.4 * rand(), "weight": 0.5 + rand(), "margin": 0.3 * rand()} if soft else {}
    scores = token_scores(8, 6, seed, **more) if units else row_scores(8, seed, **more)
    return scores, Layout(pairs=Pairs.halves(4, **labels)), {}


def pair_start(length: Sequence[int] = (10, 20), **more: object) -> Callable[[], Batch]:
    """One pair at policy == reference."""
    return lambda: (at_start(2, length=length), Layout(pairs=Pairs.halves(1, **more)), {})


# Denoising scores. Errors are near those of real networks; betas of cases are small, so that losses are not saturated.


def error_scores(n: int, seed: int = 0, *, ref: bool = True, spread: float = 0.1, **more: object) -> Scores:
    """Random denoising errors per row, float64; theta (minus one half of them) requires gradient."""
    g = torch.Generator().manual_seed(seed)
    error = 0.1 + 0.4 * torch.rand(n, generator=g, dtype=torch.float64)
    noise = spread * torch.randn(n, generator=g, dtype=torch.float64)
    theta = (-error / 2).requires_grad_()
    reference = -(error + noise).clamp(min=0.01) / 2 if ref else None
    return Scores(kind=Kind.BOUND, theta=theta, ref=reference, error=-2 * theta, imitation=-2 * theta, **more)


def residual_scores(
    n: int, seed: int = 0, *, ref: bool = True, shape: Sequence[int] = (2, 1, 2), spread: float = 0.3, **more: object
) -> Scores:
    """Random residuals per row, float64, which require gradient; errors are the means of their squares."""
    g = torch.Generator().manual_seed(seed)
    residual = 0.6 * torch.randn(n, *shape, generator=g, dtype=torch.float64)
    reference = residual + spread * torch.randn(n, *shape, generator=g, dtype=torch.float64)
    return Scores.residuals(residual.requires_grad_(), reference if ref else None, **more)


def step_scores(n: int, seed: int = 0, *, spread: float = 0.15) -> Scores:
    """Random mean log-densities of transitions, one per row, float64; theta requires gradient."""
    g = torch.Generator().manual_seed(seed)
    theta = torch.randn(n, generator=g, dtype=torch.float64)
    return Scores.steps(
        theta.clone().requires_grad_(), theta + spread * torch.randn(n, generator=g, dtype=torch.float64)
    )


def image_pairs(scores: Scores, seed: int, *, soft: bool = True, **more: object) -> Batch:
    """4 pairs over 8 rows in a random order; with `soft`, soft labels, weights and margins per pair."""
    g = torch.Generator().manual_seed(seed + 100)
    order = torch.randperm(8, generator=g)
    rand = lambda: torch.rand(4, generator=g, dtype=torch.float64)  # noqa: E731
    labels: dict[str, object] = (
        {"p": 0.6 + 0.4 * rand(), "weight": 0.5 + rand(), "margin": 0.1 * rand()} if soft else {}
    )
    return scores, Layout(pairs=Pairs(w=order[:4], l=order[4:], **(labels | more))), {}


def image_start(**more: object) -> Callable[[], Batch]:
    """One pair of denoising errors at policy == reference."""

    def batch() -> Batch:
        theta = torch.full((2,), -0.15, dtype=torch.float64, requires_grad=True)
        scores = Scores(
            kind=Kind.BOUND, theta=theta, ref=theta.detach().clone(), error=-2 * theta, imitation=-2 * theta
        )
        return scores, Layout(pairs=Pairs.halves(1, **more)), {}

    return batch


def swapped_images_cost_the_margin_more(make: Callable[[type[Objective]], Objective]) -> Callable:
    """L(z) - L(-z) = -z of a logistic link, with clean labels."""

    def identity(cls: type[Objective]) -> None:
        scores, layout, stats = image_pairs(error_scores(8, 3), 3, soft=False)
        pairs, loss = layout.pairs, make(cls)
        one, other = loss(scores, pairs, stats), loss(scores, Pairs(w=pairs.l, l=pairs.w), stats)
        torch.testing.assert_close(other.per_item - one.per_item, one.metrics["rewards/margins"])

    return identity


def constants_in_errors_cancel(make: Callable[[type[Objective]], Objective]) -> Callable:
    """The same number added to all four errors changes nothing."""

    def identity(cls: type[Objective]) -> None:
        scores, layout, stats = image_pairs(error_scores(8, 4), 4)
        moved = Scores.denoising(scores.error + 0.3, -2 * scores.ref + 0.3)
        torch.testing.assert_close(make(cls)(moved, layout, stats).per_item, make(cls)(scores, layout, stats).per_item)

    return identity


def equal_images_teach_nothing(
    make: Callable[[type[Objective]], Objective], value: float = 0.6931471805599453
) -> Callable:
    """Winner and loser with one latent, timestep and noise: the initial loss, and no gradient that training feels."""

    def identity(cls: type[Objective]) -> None:
        shared = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
        scores = Scores.denoising(shared.expand(2), torch.tensor([0.25, 0.25], dtype=torch.float64))
        out = make(cls)(scores, Pairs.halves(1))
        torch.testing.assert_close(out.loss.item(), value)
        (grad,) = torch.autograd.grad(out.loss, shared)
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-12)

    return identity


def better_denoising_of_winners_costs_less(make: Callable[[type[Objective]], Objective]) -> Callable:
    """Lowering the winner's error, or raising the loser's, lowers the loss."""

    def identity(cls: type[Objective]) -> None:
        scores, layout, stats = image_pairs(error_scores(8, 6), 6, soft=False)
        loss, e, ref = make(cls), scores.error.detach(), -2 * scores.ref
        before = loss(Scores.denoising(e, ref), layout, stats).per_item
        for rows, step in ((layout.pairs.w, -0.01), (layout.pairs.l, 0.01)):
            moved = e.clone()
            moved[rows] += step
            assert (loss(Scores.denoising(moved, ref), layout, stats).per_item < before).all()

    return identity


def pair_rho(batch: Batch) -> tuple[Tensor, Tensor, Pairs]:
    """Log-ratios of chosen and rejected rows, and the pairs."""
    scores, layout, _ = batch
    assert scores.ref is not None
    assert layout.pairs is not None
    rho = scores.theta - scores.ref
    return rho[layout.pairs.w], rho[layout.pairs.l], layout.pairs


def leaf(scores: Scores) -> Tensor:
    """The tensor that gradients are taken of: per unit or element if there are any, else per row. See `with_leaf`."""
    if scores.residual is not None:
        return scores.residual
    return scores.units.theta if scores.units is not None else scores.theta


def with_leaf(scores: Scores, value: Tensor) -> Scores:
    """The same scores as a function of another leaf (sums, imitation and errors recomputed)."""
    if scores.units is not None:
        units = scores.units
        masked = value.masked_fill(~units.mask, 0.0)
        made = replace(scores, units=replace(units, theta=masked), theta=masked.sum(1))
        return replace(made, imitation=-made.theta if scores.imitation is not None else None)
    if scores.residual is not None:
        error = (value**2).mean(tuple(range(1, value.ndim)))
        return replace(scores, residual=value, theta=-error / 2, error=error, imitation=error)
    made = replace(scores, theta=value)
    if scores.kind is Kind.BOUND:
        return replace(made, error=-2 * value, imitation=-2 * value)
    return replace(made, imitation=-value if scores.imitation is not None else None)


def detach(batch: Batch) -> Batch:
    """A copy of a batch without gradient."""
    scores, layout, stats = batch
    return with_leaf(scores, leaf(scores).detach()), layout, stats


def as_type(batch: Batch, dtype: torch.dtype) -> Batch:
    """A batch whose floating tensors went through another type (as scores from half precision do)."""

    def cast(value: object) -> object:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, (Scores, Layout, Pairs, Units, losses.Items, losses.Groups, losses.Lists)):
            return type(value)(**{f.name: cast(getattr(value, f.name)) for f in fields(value)})
        if isinstance(value, Mapping):
            return {k: cast(v) for k, v in value.items()}
        return value

    return tuple(cast(part) for part in detach(batch))  # type: ignore[return-value]


# -- the checks ------------------------------------------------------------------------------------------------------


def check_formula(case: Case, cls: type[Objective]) -> None:
    """Values per item equal the independent transcription, on several random batches."""
    for seed in range(3):
        batch = case.batch(seed)
        out = case.make(cls)(*batch)
        torch.testing.assert_close(out.per_item, case.formula(batch, detach(batch)), rtol=1e-9, atol=1e-9)
        assert out.per_item.requires_grad, "no gradient flows"


def check_gradient(case: Case, cls: type[Objective]) -> None:
    """Autograd through the objective equals central differences of the transcription, with detached parts held fixed."""
    batch = case.batch(11)
    scores, layout, stats = batch
    x0 = leaf(scores).detach()
    x = x0.clone().requires_grad_()
    out = case.make(cls)(with_leaf(scores, x), layout, stats)
    g = torch.Generator().manual_seed(5)
    weights = torch.rand(out.per_item.shape, generator=g, dtype=torch.float64) + 0.5
    (grad,) = torch.autograd.grad((weights * out.per_item).sum(), x)
    frozen, h = detach(batch), 1e-6
    live = torch.nonzero(scores.units.mask if scores.units is not None else torch.ones_like(x0, dtype=torch.bool))
    for place in live[:: max(1, len(live) // 24)][:24]:
        at = tuple(place.tolist())
        values = []
        for step in (h, -h):
            moved = x0.clone()
            moved[at] += step
            values.append((weights * case.formula((with_leaf(scores, moved), layout, stats), frozen)).sum())
        numeric = (values[0] - values[1]) / (2 * h)
        torch.testing.assert_close(grad[at], numeric, rtol=2e-5, atol=1e-7)


def check_start(case: Case, cls: type[Objective]) -> None:
    """Value and slopes at policy == reference."""
    if isinstance(case.start, str):
        assert case.start.strip(), "say why there is no value at the start"
        return
    scores, layout, stats = case.start.batch()
    out = case.make(cls)(scores, layout, stats)
    expected = torch.full_like(out.per_item, case.start.value)
    torch.testing.assert_close(out.per_item.detach(), expected, rtol=case.start.tolerance, atol=1e-7)
    (grad,) = torch.autograd.grad(out.per_item.sum(), leaf(scores))
    slopes = slopes_of(scores, grad)
    expected = torch.tensor(case.start.slopes, dtype=slopes.dtype)
    torch.testing.assert_close(slopes, expected, rtol=case.start.tolerance, atol=1e-7)


def slopes_of(scores: Scores, grad: Tensor) -> Tensor:
    """Slopes per row from the gradient of the leaf: summed over units; of residuals, in the direction in which all of them
    shrink alike, per unit of score."""
    if scores.residual is None:
        return grad.sum(1) if grad.ndim == 2 else grad
    r = scores.residual.detach()
    axes = tuple(range(1, r.ndim))
    return -(grad * r).sum(axes) / (r**2).mean(axes)


def check_identities(case: Case, cls: type[Objective]) -> None:
    """The case's own identities."""
    assert case.identities, "at least one identity"
    for identity in case.identities:
        identity(cls)


def all_checks(case: Case, cls: type[Objective]) -> None:
    """Everything that a mutation may turn red."""
    check_start(case, cls)
    check_formula(case, cls)
    check_gradient(case, cls)
    check_identities(case, cls)


def mutant(cls: type[Objective], old: str, new: str) -> type[Objective]:
    """The class with one piece of its module's source replaced: first occurrence in or after the class, else before it.

    What the class's module does not contain is looked for in the modules of its bases.

    Raises:
        AssertionError: no source contains `old`.
    """
    owner = next((c for c in cls.__mro__ if old in module_source(c)), None)
    assert owner is not None, f"neither {cls.__module__} nor the modules of its bases contain {old!r}"
    source = module_source(owner)
    place = source.find(old, source.index(f"class {owner.__name__}("))
    place = place if place >= 0 else source.find(old)
    changed = execute(owner, source[:place] + new + source[place + len(old) :])
    if owner.__module__ == cls.__module__:
        return getattr(changed, cls.__name__)
    # The class itself, built anew on the changed base.
    original = sys.modules[owner.__module__]
    sys.modules[owner.__module__] = changed
    try:
        return getattr(execute(cls, module_source(cls)), cls.__name__)
    finally:
        sys.modules[owner.__module__] = original


def module_source(cls: type) -> str:
    """The source of the module that defines a class; "" outside of the package."""
    return inspect.getsource(sys.modules[cls.__module__]) if cls.__module__.startswith("diffalign.") else ""


def execute(cls: type, source: str) -> ModuleType:
    """A module like the one that defines a class, from another source."""
    spec = importlib.util.spec_from_loader(f"{cls.__module__}_mutant", loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = inspect.getfile(cls)
    sys.modules[spec.name] = module
    try:
        exec(compile(source, spec.name, "exec"), module.__dict__)
    finally:
        del sys.modules[spec.name]
    return module


def survives(case: Case, old: str, new: str) -> bool:
    """True if a mutation goes unnoticed by all checks."""
    changed = mutant(case.objective, old, new)
    try:
        all_checks(case, changed)
    except Exception:  # a mutant may fail in any way
        return False
    return True


# -- broken objectives, batches with less in them, halves of batches ---------------------------------------------------


def fails(identity: Callable[[type[Objective]], None], cls: type[Objective]) -> bool:
    """True if an identity notices an objective whose values are random, negated, scaled or without gradient."""
    for spoil in (
        lambda x, scores: x * (1 + torch.rand_like(x)) + torch.rand_like(x) + torch.rand(()) * scores.theta.sum(),
        lambda x, scores: -x,
        lambda x, scores: 1.37 * x,
        lambda x, scores: x.detach() + 0 * x,
    ):
        try:
            identity(_broken(cls, spoil))
        except Exception:  # in any way
            return True
    return False


def _broken(cls: type[Objective], spoil: Callable[[Tensor, Scores], Tensor]) -> type[Objective]:
    def call(self: Objective, scores: Scores, *args: object) -> losses.LossOut:
        out = cls.__call__(self, scores, *args)  # type: ignore[arg-type]
        return losses.LossOut(spoil(out.per_item, scores), out.metrics)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


def only_declared(objective: Objective, batch: Batch, optional: Sequence[str] = ()) -> Batch:
    """A batch without what an objective does not say that it reads."""
    scores, layout, stats = batch
    needs = objective.needs
    parts = (set(needs.layout) | set(needs.or_layout) | set(optional)) & layout.parts
    keep: dict[str, object] = {
        "ref": scores.ref if objective.reads_reference() else None,
        "old": scores.old if needs.old else None,
        "extra": {name: x for name, x in scores.extra.items() if name in needs.extra},
        "vocabulary": {name: x for name, x in scores.vocabulary.items() if name in objective.vocabulary()},
    }
    if Cap.RESIDUAL not in needs.caps:
        keep |= {"residual": None, "ref_residual": None}
    elif not objective.reads_reference():
        keep["ref_residual"] = None
    keep |= {name: None for name in ("log_snr", "to_sample", "patch_weight") if not getattr(needs, name)}
    if not needs.old:
        keep["old_residual"] = None
    if not objective.reads_prompt():
        keep |= {"prompt_imitation": None, "prompt_length": None}
    if scores.units is not None:
        ref = scores.units.ref if objective.reads_reference() else None
        keep["units"] = replace(scores.units, ref=ref, old=scores.units.old if needs.old else None)
    known = {name: x for name, x in stats.items() if name in (*needs.stats, *optional)}
    return replace(scores, **keep), Layout(**{name: getattr(layout, name) for name in parts}), known


def totals_of(scores: Scores, layout: Layout, items: int) -> losses.Totals:
    """Counts of a batch, of whose values per item the trainer averages `items`."""

    def units(rows: Tensor) -> float:
        if scores.units is not None:
            return float(scores.units.mask[rows].sum())
        return 0.0 if scores.length is None else float(scores.length[rows].sum())

    rows, more = [], {}
    if (pairs := layout.pairs) is not None:
        rows += [pairs.w, pairs.l]
        more["chosen_units"] = units(pairs.w)
        if scores.prompt_length is not None:
            more["chosen_prompt_units"] = float(scores.prompt_length[pairs.w].sum())
    if (single := layout.items) is not None:
        rows += [single.index]
        positive = single.index if single.label is None else single.index[single.label > 0.5]
        more |= {"item_units": units(single.index), "positive_items": len(positive), "positive_units": units(positive)}
    rows += [] if layout.groups is None else [layout.groups.index]
    rows += [] if layout.lists is None else [layout.lists.index[layout.lists.mask]]
    return losses.Totals(items=items, units=sum(map(units, rows)), **more)


def halves(layout: Layout, stats: Mapping[str, Tensor]) -> list[tuple[Layout, Mapping[str, Tensor]]]:
    """Every other pair, item, list or whole group of a batch, and the rest, with their own statistics."""
    return [_half(layout, stats, parity) for parity in (0, 1)]


def _half(layout: Layout, stats: Mapping[str, Tensor], parity: int) -> tuple[Layout, Mapping[str, Tensor]]:
    parts, sizes = {}, {}
    for name in layout.parts:
        part = getattr(layout, name)
        number = (
            part.group.unique(return_inverse=True)[1] if name in ("groups", "on_policy") else torch.arange(len(part))
        )
        keep = (number % 2) == parity
        cut = {f.name: getattr(part, f.name) for f in fields(part)}
        parts[name] = replace(
            part, **{f: x[keep] for f, x in cut.items() if isinstance(x, Tensor) and len(x) == len(keep)}
        )
        sizes[len(part)] = keep
    return Layout(**parts), {name: x[sizes[len(x)]] if x.ndim and len(x) in sizes else x for name, x in stats.items()}
