"""Refusals, safe logarithms and exact token means of the reference-free family."""

from dataclasses import replace

import pytest
import torch
from loss_cases import row_scores

from diffalign import losses
from diffalign.losses import IncompatibleObjective, Items, Kind, Layout, Pairs, Scores, Totals
from diffalign.losses.reference_free import ASFT, CPO, ORPO, TPO, TPOL, AlphaPO, MaPO, SimPO, SLiC
from diffalign.losses.transforms import bernoulli_score, exponential_reward

MINE = [cls for cls in losses.catalogue().values() if cls.__module__ == losses.reference_free.__name__]


@pytest.mark.parametrize("cls", MINE, ids=lambda cls: cls.name)
def test_none_needs_a_reference_and_aliases_name_fields(cls):
    assert not cls.needs.reference
    assert set(cls.aliases.values()) <= set(cls.__dataclass_fields__)


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        (CPO(beta=1.0), "how complex.*mapo.*allow_bound_abs"),
        (SLiC(beta=1.0), "how complex.*mapo.*allow_bound_abs"),
        (TPO(beta=1.0), "how complex.*mapo.*allow_bound_abs"),
        (SimPO(beta=1.0), "no tokens.*mapo"),
        (AlphaPO(beta=1.0), "no tokens.*mapo"),
        (TPOL(beta=1.0), "no tokens.*mapo"),
        (ORPO(), "neither normalised nor bounded; use mapo"),
        (ASFT(), "neither normalised nor bounded; use mapo"),
    ],
    ids=lambda x: x.name if isinstance(x, losses.Objective) else "",
)
def test_denoising_errors_are_refused_with_the_way_out(objective, reason):
    with pytest.raises(IncompatibleObjective, match=reason):
        objective.check(Kind.BOUND)


def test_mapo_is_for_denoising_errors_only():
    MaPO().check(Kind.BOUND)
    for kind in (Kind.TOKEN, Kind.STEP):
        with pytest.raises(IncompatibleObjective, match=r"denoising error.*orpo"):
            MaPO().check(kind)
    with pytest.raises(ValueError, match=r"scores.error is missing"):
        MaPO(beta=1.0)(row_scores(2), Pairs.halves(1))


def test_published_defaults():
    assert (SimPO().beta_for(Kind.TOKEN), SimPO().gamma_beta_ratio) == (2.0, 0.25)
    assert (AlphaPO().beta_for(Kind.TOKEN), AlphaPO().alpha, AlphaPO().gamma) == (2.5, 0.25, 0.1)
    assert (CPO().beta_for(Kind.TOKEN), CPO().imitation_weight) == (0.1, 1.0)
    assert (TPO().beta_for(Kind.TOKEN), TPO().imitation_weight) == (0.01, 1.0)
    assert (SLiC().beta_for(Kind.TOKEN), SLiC().margin, SLiC().imitation_weight) == (1.0, 1.0, 0.1)
    assert (MaPO().beta_for(Kind.BOUND), MaPO().snr_value, MaPO().train_timesteps) == (0.1, 0.5, 1000)
    assert (ORPO().odds_weight, ORPO().imitate_prompt) == (0.1, True)
    with pytest.raises(IncompatibleObjective, match=r"set objective.beta$"):
        TPOL().check(Kind.TOKEN)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SLiC(margin=0.0), "margin is 0"),
        (lambda: MaPO(snr_value=0.0), "snr_value is 0"),
        (lambda: CPO(label_smoothing=0.6), "label_smoothing is 0.6"),
        (lambda: SimPO(beta=0.0), "beta is 0"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_asft_is_marked_as_not_fully_known():
    assert ASFT.status == "experimental"
    assert "weight" in ASFT.unknown


# -- numerics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [ORPO, ASFT])
@pytest.mark.parametrize("logp", [0.0, -1e-9, -1e-7, -5000.0])
def test_certain_and_impossible_responses_have_finite_losses_and_slopes(cls, logp):
    """p rounds to one for short deterministic answers; TRL's single `where` gives NaN slopes there."""
    theta = torch.tensor([logp, logp], requires_grad=True)
    out = cls(imitate_prompt=False)(Scores.tokens(theta, length=torch.tensor([1, 1])), Pairs.halves(1))
    (grad,) = torch.autograd.grad(out.loss, theta)
    assert torch.isfinite(out.loss)
    assert torch.isfinite(grad).all()


def test_an_empty_response_does_not_divide_by_zero():
    scores = Scores.tokens(torch.zeros(2, requires_grad=True), length=torch.tensor([0, 3]))
    for objective in (SimPO(), ORPO(imitate_prompt=False), CPO()):
        out = objective(scores, Pairs.halves(1))
        assert torch.isfinite(out.loss)


def test_bernoulli_score_has_its_limit_at_zero():
    error = torch.tensor([0.0, 1e-9, 1e-3, 3.0, 1e6], requires_grad=True)
    score = bernoulli_score(error)
    assert score[0].item() == 1.0
    (grad,) = torch.autograd.grad(score.sum(), error)
    torch.testing.assert_close(grad[:2], torch.full((2,), -0.25))
    assert torch.isfinite(grad).all()
    literal = (0.5 * error[3]) / ((0.5 * error[3]).exp() - 1)
    torch.testing.assert_close(score[3], literal)


def test_exponential_reward_has_slope_one_at_zero_and_its_limit():
    x = torch.tensor([0.0, -1.0, -1e6], requires_grad=True)
    for alpha in (0.25, 0.0, -0.25):
        r = exponential_reward(x, alpha)
        (grad,) = torch.autograd.grad(r.sum(), x)
        assert grad[0].item() == 1.0
        assert torch.isfinite(r).all()
    torch.testing.assert_close(exponential_reward(x[:2], 1e-6), x[:2], rtol=1e-5, atol=0)


# -- what they read --------------------------------------------------------------------------------------------------


def test_orpo_names_missing_prompts():
    with pytest.raises(ValueError, match="prompt_imitation"):
        ORPO()(row_scores(2, ref=False), Pairs.halves(1))


def test_tpo_wants_one_gold_response_per_pair():
    layout = Layout(pairs=Pairs.halves(2), items=Items(index=torch.tensor([4])))
    for objective in (TPO(), TPOL(beta=1.0)):
        with pytest.raises(ValueError, match="1 gold responses for 2 pairs"):
            objective(row_scores(5, ref=False), layout)
        with pytest.raises(ValueError, match="reads items"):
            objective(row_scores(5, ref=False), Layout(pairs=Pairs.halves(2)))


def test_without_imitation_nothing_to_imitate_is_needed():
    scores = replace(row_scores(4, ref=False), imitation=None)
    assert torch.isfinite(SimPO()(scores, Pairs.halves(2)).loss)
    with pytest.raises(ValueError, match=r"scores.imitation is missing"):
        CPO()(scores, Pairs.halves(2))


def micro_batches(scores, totals, rows):
    """The same rows in two micro-batches that know the counts of the whole step."""
    for part in rows:
        fields = {
            name: getattr(scores, name)[part]
            for name in ("theta", "length", "imitation", "prompt_imitation", "prompt_length")
        }
        yield Scores(kind=Kind.TOKEN, totals=totals, **fields)


@pytest.mark.parametrize(
    "objective",
    [CPO(), SLiC(), TPO(), TPOL(beta=2.0), SimPO(imitation_weight=1.0), ORPO(), ORPO(imitate_prompt=False), ASFT()],
    ids=lambda o: f"{o.name}{'' if getattr(o, 'imitate_prompt', True) else ' response only'}",
)
def test_more_micro_batches_have_the_same_loss(objective):
    """Token means weigh by the counts of the whole step, not by those of each micro-batch."""
    g = torch.Generator().manual_seed(2)
    scores = row_scores(
        9,
        5,
        ref=False,
        prompt_imitation=torch.rand(9, generator=g, dtype=torch.float64),
        prompt_length=torch.randint(1, 9, (9,), generator=g),
    )
    w, l, gold = torch.arange(0, 3), torch.arange(3, 6), torch.arange(6, 9)
    whole = objective(scores, Layout(pairs=Pairs(w=w, l=l), items=Items(index=gold)))
    totals = Totals(
        items=3,
        units=float(scores.length.sum()),
        chosen_units=float(scores.length[w].sum()),
        chosen_prompt_units=float(scores.prompt_length[w].sum()),
        item_units=float(scores.length[gold].sum()),
    )
    rows = [torch.tensor([0, 3, 6]), torch.tensor([1, 2, 4, 5, 7, 8])]
    layouts = [
        Layout(pairs=Pairs.halves(1), items=Items(index=torch.tensor([2]))),
        Layout(pairs=Pairs.halves(2), items=Items(index=torch.tensor([4, 5]))),
    ]
    total = sum(
        objective(part, layout).per_item.sum() for part, layout in zip(micro_batches(scores, totals, rows), layouts)
    )
    torch.testing.assert_close(total / 3, whole.loss)
