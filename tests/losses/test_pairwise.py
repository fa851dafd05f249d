"""Settings, defaults and refusals of the pairwise families, and what their cases do not say."""

import logging
import math
from dataclasses import replace

import pytest
import torch
from loss_cases import pair_batch, pair_start, token_scores

from diffalign import config_loading, losses
from diffalign.errors import ConfigError
from diffalign.losses import DPO, IncompatibleObjective, Items, Kind, Layout, Lists, Pairs, Scores
from diffalign.losses.anchored import APODown, EXOList, InfoNCA, NCAList
from diffalign.losses.composite import FDPO, WPO, Mixed
from diffalign.losses.links import reverse_kl
from diffalign.losses.pairwise import EXO, IPO, DiscoPOP, LengthDesensitisedDPO, RobustDPO
from diffalign.losses.transport import AOT, AOTUnpaired

FAMILIES = (losses.pairwise, losses.anchored, losses.transport, losses.composite)
MINE = [cls for cls in losses.catalogue().values() if any(cls.__module__ == module.__name__ for module in FAMILIES)]


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPO(beta=-1.0), "beta is -1"),
        (lambda: DPO(label_smoothing=0.5), "label_smoothing is 0.5"),
        (lambda: RobustDPO(label_noise=0.7), "label_noise is 0.7"),
        (lambda: EXO(label_smoothing=0.0), "label_smoothing is 0"),
        (lambda: DiscoPOP(tau=0.0), "tau is 0"),
        (lambda: LengthDesensitisedDPO(alpha=1.5), "alpha is 1.5"),
        (lambda: NCAList(reward_temperature=0.0), "reward_temperature is 0"),
        (lambda: FDPO(divergence="kl"), "divergence is 'kl'"),
        (lambda: FDPO(base="nca"), "base is 'nca'"),
        (lambda: WPO(base="aot"), "base is 'aot'"),
        (lambda: WPO(settings={"label_smooothing": 0.1}), "no setting 'label_smooothing'"),
        (lambda: WPO(settings={"label_smoothing": 0.9}), "label_smoothing is 0.9"),
        (lambda: WPO(settings={"beta": 0.9}), "own beta"),
        (lambda: Mixed(losses=("dpo",)), "3 weights for 1 losses"),
        (lambda: Mixed(losses=(), weights=()), "0 weights for 0 losses"),
        (lambda: Mixed(losses=("dpoo", "sft"), weights=(1.0, 1.0)), "'dpoo'"),
        (lambda: Mixed(losses=("mixed",), weights=(1.0,)), "'mixed'"),
        (lambda: Mixed(losses=("infonca",), weights=(1.0,)), "pairs alone"),
        (lambda: Mixed(settings={"ipo": {}}), "settings for ipo"),
        (lambda: Mixed(losses=("inpo", "sft"), weights=(1.0, 1.0)), "inpo reads the scores of a second model"),
        (
            lambda: Mixed(losses=("aot",), weights=(1.0,), settings={"aot": {"global_sort": True}}),
            "remembers across batches",
        ),
    ],
)
def test_settings_out_of_range_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_numbers_that_yaml_leaves_as_text_are_read():
    assert WPO(beta=None, base="exo", settings={"label_smoothing": "1e-3"}).inner == EXO(label_smoothing=1e-3)


def test_settings_by_objective_come_from_a_config():
    values = {"losses": ["dpo", "ipo"], "weights": [1, "1e-1"], "settings": {"dpo": {"label_smoothing": "1e-2"}}}
    mixed = config_loading.from_mapping(Mixed, values, "objective")
    assert mixed.parts["dpo"] == DPO(label_smoothing=0.01)
    assert mixed.weights == (1.0, 0.1)
    with pytest.raises(ConfigError, match=r"objective\.settings\.dpo: got 3; a section"):
        config_loading.from_mapping(Mixed, {"settings": {"dpo": 3}}, "objective")


@pytest.mark.parametrize("cls", MINE, ids=lambda cls: cls.name)
def test_aliases_name_fields(cls):
    assert set(cls.aliases.values()) <= set(cls.__dataclass_fields__)


# -- defaults and refusals -------------------------------------------------------------------------------------------

DEFAULTS = {
    "dpo": 0.1,
    "robust_dpo": 0.1,
    "hinge": 0.05,
    "ipo": 0.1,
    "exo": 0.1,
    "exo_list": 0.1,
    "nca": 0.01,
    "nca_list": 0.01,
    "infonca": 0.01,
    "discopop": 0.05,
    "apo_zero": 0.1,
    "apo_down": 0.1,
    "bco_pair": 0.1,
    "aot": 0.01,
    "aot_unpaired": 0.01,
    "ld_dpo": 0.1,
    "r_dpo": 0.1,
    "f_dpo": 0.1,
    "wpo": 0.01,
    "mixed": 0.1,
}


def test_default_betas_on_tokens_are_the_published_ones():
    assert {cls.name: cls().beta_for(Kind.TOKEN) for cls in MINE if cls.name != "dpo_norm"} == DEFAULTS


def test_length_normalised_dpo_has_no_default_beta():
    with pytest.raises(IncompatibleObjective, match=r"set objective.beta$"):
        losses.find("dpo_norm")().check(Kind.TOKEN)


@pytest.mark.parametrize("cls", MINE, ids=lambda cls: cls.name)
def test_only_logistic_dpo_has_a_default_beta_on_denoising_errors(cls):
    objective = cls()
    if cls.name in ("dpo", "robust_dpo"):
        objective.check(Kind.BOUND)
        assert objective.beta_for(Kind.BOUND) == 5000.0
    else:
        with pytest.raises(IncompatibleObjective):
            objective.check(Kind.BOUND)


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        (IPO(beta=5000.0), "beta\\^2"),
        (DiscoPOP(beta=5000.0), "tau"),
        (FDPO(beta=5000.0), "likelihood ratio.*use dpo"),
        (FDPO(beta=5000.0, divergence="reverse_kl", base="ipo"), "beta\\^2"),
        (WPO(beta=5000.0), "vocabulary.*use dpo"),
        (losses.find("dpo_norm")(beta=1.0), "no tokens.*use dpo"),
        (losses.find("ld_dpo")(beta=1.0), "no tokens.*use dpo"),
        (losses.find("r_dpo")(beta=1.0), "no tokens.*use dpo"),
        (Mixed(beta=5000.0, losses=("dpo", "ipo"), weights=(1.0, 1.0)), "beta\\^2"),
    ],
    ids=lambda x: x.name if isinstance(x, losses.Objective) else "",
)
def test_what_means_nothing_on_denoising_errors_says_why(objective, reason):
    with pytest.raises(IncompatibleObjective, match=reason):
        objective.check(Kind.BOUND)


def test_what_means_something_on_denoising_errors_is_allowed():
    for objective in (
        IPO(beta=5000.0, ipo_scale="unit"),
        DiscoPOP(beta=5000.0, tau=0.2),
        Mixed(beta=5000.0, losses=("dpo", "sft"), weights=(1.0, 0.1)),
    ):
        objective.check(Kind.BOUND)


def test_discopop_warns_where_it_starts_uphill(caplog):
    with caplog.at_level(logging.WARNING, "diffalign.losses.pairwise"):
        DiscoPOP(tau=0.11)
        assert not caplog.records
        DiscoPOP(tau=0.05)
    assert "first lowers the margin" in caplog.text


@pytest.mark.parametrize("cls", MINE, ids=lambda cls: cls.name)
def test_the_declared_initial_loss_is_the_loss_at_the_reference(cls):
    """What a run's first step is checked against."""
    objective = cls(beta=0.3)
    declared = objective.initial_loss(Kind.TOKEN)
    if declared is None:
        assert cls.name in ("r_dpo", "wpo", "mixed", "infonca", "exo_list"), "the others start at a constant"
        return
    scores = token_scores(4, 5, 1, spread=0.0)
    lists = Lists(index=torch.arange(4).view(2, 2), gain=torch.randn(2, 2), mask=torch.ones(2, 2, dtype=torch.bool))
    out = objective(scores, Layout(pairs=Pairs.halves(2), lists=lists))
    assert out.loss.item() == pytest.approx(declared, rel=1e-6)


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_diffusion_dpo_is_text_dpo_on_minus_half_the_error():
    g = torch.Generator().manual_seed(0)
    error, reference = (0.1 + 1e-3 * torch.rand(6, generator=g, dtype=torch.float64) for _ in range(2))
    image = DPO()(Scores.denoising(error, reference), Pairs.halves(3))
    w, l = (error - reference).chunk(2)
    torch.testing.assert_close(image.per_item, torch.nn.functional.softplus(0.5 * 5000 * (w - l)))
    text = DPO(beta=5000.0)(Scores.tokens(-error / 2, -reference / 2), Pairs.halves(3))
    assert torch.equal(image.per_item, text.per_item)


def test_soft_exo_targets_are_exact_in_float32():
    z = torch.linspace(-5, 5, 11, dtype=torch.float64)
    for p in (1.0, 0.7, 0.0):
        torch.testing.assert_close(
            reverse_kl(z.float(), 1e-6, p).double(), reverse_kl(z, 1e-6, p), rtol=2e-6, atol=1e-6
        )


def test_ld_dpo_ignores_what_is_masked_out():
    scores, layout, _ = pair_batch(3, units=True)
    noisy = replace(scores.units, theta=scores.units.theta.masked_fill(~scores.units.mask, 99.0))
    objective = LengthDesensitisedDPO(beta=0.1)
    torch.testing.assert_close(
        objective(replace(scores, units=noisy), layout).per_item, objective(scores, layout).per_item
    )


def test_ld_dpo_names_a_missing_reference():
    scores, layout, _ = pair_batch(3, units=True, ref=False)
    with pytest.raises(ValueError, match="reference"):
        LengthDesensitisedDPO()(scores, layout)


def test_margins_are_not_part_of_the_reported_rewards():
    scores, layout, _ = pair_batch(2)
    for cls in (DPO, APODown):
        metrics = cls(beta=0.1)(scores, layout).metrics
        torch.testing.assert_close(metrics["rewards/margins"], metrics["rewards/chosen"] - metrics["rewards/rejected"])


def test_list_metrics_say_whether_the_best_response_is_first():
    lists = Lists(
        index=torch.tensor([[0, 1, 2], [3, 4, 0], [0, 0, 0]]),
        gain=torch.tensor([[1.0, 3.0, 2.0], [0.5, 0.1, 9.0], [0.0, 0.0, 0.0]]),
        mask=torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]]).bool(),
    )
    scores = Scores.tokens(torch.tensor([-1.0, 2.0, 0.0, -3.0, -2.0]), torch.zeros(5))
    for cls in (InfoNCA, NCAList, EXOList):
        metrics = cls(beta=0.5)(scores, lists).metrics
        assert metrics["implicit_acc"].tolist() == [1.0, 0.0]
        assert metrics["rewards/best"].tolist() == [1.0, -1.5]
        torch.testing.assert_close(metrics["rewards/mean"], torch.tensor([0.5 / 3, -1.25]))


# -- sorting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["p", "weight", "margin"])
def test_aot_refuses_what_differs_between_pairs(field):
    scores, _, _ = pair_batch(1)
    same = Pairs.halves(4, **{field: torch.full((4,), 0.8)})
    AOT()(scores, same)
    with pytest.raises(ValueError, match=f"{field} per pair"):
        AOT()(scores, Pairs.halves(4, **{field: torch.tensor([0.8, 0.8, 0.8, 0.7])}))


def shares(layout):
    """The pairs of two processes: one of 4 and one of 2."""
    pairs = layout.pairs
    return [Layout(pairs=Pairs(w=pairs.w[part], l=pairs.l[part])) for part in (slice(0, 4), slice(4, 6))]


@pytest.mark.parametrize("cls", [AOT, AOTUnpaired])
def test_sorting_over_two_processes_is_sorting_over_one(cls):
    theta = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    reference = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    scores, layout = Scores.tokens(theta, reference), Layout(pairs=Pairs.halves(6))
    whole = cls(beta=0.3)(scores, layout).loss
    (grad,) = torch.autograd.grad(whole, theta)

    objective = cls(beta=0.3, global_sort=True)
    samples = [objective.samples(scores, part.pairs) for part in shares(layout)]
    total = torch.zeros((), dtype=torch.float64)
    for part in shares(layout):
        # What each rank's calls of gather return, in order: the upper sample, then the lower one.
        gathered = iter([torch.cat(sample).detach() for sample in zip(*samples)])
        stats = objective.estimator().update(scores, part, lambda x, values=gathered: next(values))
        total = total + objective(scores, part, stats).per_item.sum()
    torch.testing.assert_close(total / 6, whole)
    torch.testing.assert_close(torch.autograd.grad(total / 6, theta)[0], grad)


def test_sorting_over_all_processes_asks_for_their_values():
    assert AOT().estimator() is None
    scores, layout, _ = pair_batch(1, soft=False)
    with pytest.raises(ValueError, match="estimator's stats"):
        AOT(global_sort=True)(scores, layout)


# -- composites ------------------------------------------------------------------------------------------------------


def test_wpo_asks_the_scorer_for_its_statistic():
    statistic = WPO().vocabulary()["log_sum_p2"]
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    expected = logits.softmax(-1).square().sum(-1).log()
    torch.testing.assert_close(statistic(logits.log_softmax(-1), torch.zeros(3, dtype=torch.long), None), expected)
    scores, layout, _ = pair_batch(1, units=True)
    with pytest.raises(ValueError, match="log_sum_p2"):
        WPO()(scores, layout)


def test_wpo_weighs_any_pairwise_objective():
    scores, layout, _ = pair_batch(4, units=True)
    scores = replace(scores, vocabulary={"log_sum_p2": torch.full((8, 6), -1.3, dtype=torch.float64)})
    for base in WPO.allowed:
        objective = WPO(beta=0.1, base=base)
        out = objective(scores, layout)
        plain = objective.inner(scores, layout).per_item
        torch.testing.assert_close(out.per_item, out.metrics["weight"] * plain)
        assert (out.metrics["weight"] != 1).all()


def test_f_dpo_reports_log_probabilities_not_what_it_contrasts():
    scores, layout, _ = pair_batch(4)
    metrics = FDPO(beta=0.1, divergence="js")(scores, layout).metrics
    torch.testing.assert_close(metrics["logps/chosen"], scores.theta[layout.pairs.w].detach())
    assert (metrics["rewards/chosen"] <= 0.1 * math.log(2)).all()


def test_mixed_knows_its_start_unless_it_imitates():
    assert Mixed().initial_loss() is None
    mixed = Mixed(beta=0.1, losses=("dpo", "bco_pair", "sft"), weights=(0.8, 0.2, 0.0))
    assert mixed.initial_loss() == pytest.approx(1.2 * math.log(2))
    out = mixed(*pair_start()()[:2])
    assert out.loss.item() == pytest.approx(1.2 * math.log(2))


def test_mixed_hands_on_beta_settings_and_statistics():
    mixed = Mixed(
        beta=0.3,
        losses=("wpo", "ipo"),
        weights=(1.0, 0.5),
        settings={"ipo": {"beta": 0.7, "reduction": "sum"}, "wpo": {"base": "hinge"}},
    )
    assert mixed.parts["ipo"] == IPO(beta=0.7, reduction="sum")
    assert mixed.parts["wpo"] == WPO(beta=0.3, base="hinge")
    assert set(mixed.vocabulary()) == {"log_sum_p2"}
    assert mixed.summary()["mixed"] == "1 wpo + 0.5 ipo"


def test_mixed_reports_each_part():
    scores, layout, _ = pair_batch(4)
    out = Mixed()(scores, layout)
    total = sum(w * out.metrics[f"loss/{n}"] for n, w in (("dpo", 0.8), ("bco_pair", 0.2), ("sft", 1.0)))
    torch.testing.assert_close(out.per_item.detach(), total)


def test_objectives_that_read_items_cannot_be_mixed_in():
    scores, _, _ = pair_batch(4)
    with pytest.raises(ValueError, match="layout has items"):
        Mixed()(scores, Items(index=torch.arange(4)))


def test_a_mixture_asks_for_what_its_parts_read():
    assert Mixed().reads_reference()
    assert not Mixed().reads_prompt()
    reference_free = Mixed(losses=("orpo", "simpo"), weights=(1.0, 1.0))
    assert not reference_free.reads_reference()
    assert reference_free.reads_prompt()
    settings = {"orpo": {"imitate_prompt": False}}
    assert not Mixed(losses=("orpo",), weights=(1.0,), settings=settings).reads_prompt()
