"""`diffalign.losses.diffusion`: settings, helpers, and what each method says about its rows."""

import math

import pytest
import torch

from diffalign import losses
from diffalign.losses import DPO, Groups, IncompatibleObjective, Items, Kind, Layout, Pairs, Scores
from diffalign.losses.base import BetaObjective
from diffalign.losses.diffusion import (
    AWM,
    CRD,
    D3PO,
    DDPO,
    DGPO,
    DMPO,
    DPOK,
    DSPO,
    GDPO,
    PRDP,
    PSO,
    SDPO,
    SNPO,
    SPO,
    BideDPO,
    CaPO,
    DanceGRPO,
    DDIMInPO,
    DiffusionDRO,
    DiffusionKTO,
    DiffusionNFT,
    DualIPO,
    FlowDPO,
    FlowDPPO,
    FlowGRPO,
    GRPOGuard,
    PatchDPO,
    PSOPersonal,
    SelfNPO,
    SePPO,
    SmPO,
    SubjectRPO,
)
from diffalign.losses.diffusion.capo import calibrated_rewards, frontiers
from diffalign.losses.diffusion.gdpo import min_max, normalised_advantages
from diffalign.losses.diffusion.patch_dpo import patch_weights
from diffalign.losses.diffusion.sdpo import safeguard
from diffalign.losses.diffusion.spo import step_weights
from diffalign.losses.diffusion.subject_rpo import lambda_harmonic, preference_probability
from diffalign.losses.transforms import bernoulli_score

MINE = [losses.find(name) for name in losses.FAMILIES["diffusion"]]
BOUND = Kind.BOUND
ON_GROUPS = (DDPO, DPOK, FlowGRPO, DanceGRPO, GRPOGuard, FlowDPPO, PRDP)  # of trajectories
STEPS = (D3PO, SPO, PSO, *ON_GROUPS)
BACKPROP = ("align_prop", "draft", "draft_lv", "refl", "drtune", "srpo")  # follow the gradient of a reward


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIMInPO(beta=0.0), "beta is 0"),
        (lambda: SmPO(gamma=-1.0), "gamma is -1"),
        (lambda: SmPO(soft_label="label"), "soft_label is 'label'; expected one of reward, p"),
        (lambda: SmPO(reward_low=0.3), "reward_high is 0.28"),
        (lambda: SmPO(reward_scale=0.0), "reward_scale is 0"),
        (lambda: SePPO(flip="always"), "flip is 'always'"),
        (lambda: SePPO(on_zero="plus"), "on_zero is 'plus'"),
        (lambda: DiffusionKTO(utility="sigmoid"), "utility is 'sigmoid'"),
        (lambda: DiffusionKTO(desirable_weight=-1.0), "desirable_weight is -1.0; expected no negative number"),
        (lambda: DSPO(form="sdxl"), "form is 'sdxl'"),
        (lambda: DSPO(form="link", detach=True), "without any gradient"),
        (lambda: D3PO(clip=1.0), "clip is 1"),
        (lambda: SPO(ties="ignore"), "ties is 'ignore'"),
        (lambda: PSOPersonal(form="sigmoid"), "form is 'sigmoid'"),
        (lambda: PSOPersonal(eta=-0.1), "eta is -0.1"),
        (lambda: CaPO(beta=1.0, weighting="snr"), "weighting is 'snr'"),
        (lambda: DMPO(label_smoothing=0.5), "label_smoothing is 0.5"),
        (lambda: SNPO(share=0.0), "share is 0.0"),
        (lambda: SNPO(share=1.5), "share is 1.5"),
        (lambda: SDPO(mu=1.5), "mu is 1.5"),
        (lambda: SDPO(base="kto"), "base is 'kto'"),
        (lambda: SDPO(base="sdpo"), "base is 'sdpo'"),
        (lambda: SDPO(base="dpoo"), "base is 'dpoo'"),
        (lambda: SDPO(settings={"label_smooth": 0.1}), "no setting 'label_smooth'"),
        (lambda: SDPO(settings={"beta": 3.0}), "own beta"),
        (lambda: SDPO(base="dro", beta=3.0), "dro has no beta"),
        (lambda: SDPO(base="subject_rpo"), "noise of their own; expected one with shared noise"),
        (
            lambda: SDPO(base="mixed", settings={"losses": ("smpo",), "weights": (1.0,)}),
            "may disagree on which image loses",
        ),
        (lambda: DiffusionDRO(margin=0.0), "margin is 0"),
        (lambda: DiffusionDRO(margin=-0.001), "margin is -0.001; expected a positive number with form 'code'"),
        (lambda: DiffusionDRO(margin=0.001, form="paper"), "margin is 0.001; expected 0 or less with form 'paper'"),
        (lambda: DiffusionDRO(form="softplus"), "form is 'softplus'"),
        (lambda: SubjectRPO(imitation_weight=-1.0), "imitation_weight is -1"),
        (lambda: GDPO(group_reduction="max"), "group_reduction is 'max'"),
        (lambda: FlowDPO(beta_schedule="cosine"), "beta_schedule is 'cosine'"),
        (lambda: DualIPO(real_weight=-1.0), "real_weight is -1"),
        (lambda: AWM(form="t**2"), r"form is 't\*\*2'; expected one of plain, t, t2, huber, ghuber"),
        (lambda: AWM(ratio_to="ema"), "ratio_to is 'ema'"),
        (lambda: AWM(power=0.0), "power is 0"),
        (lambda: AWM(ema_kl=-1.0), "ema_kl is -1"),
        (lambda: AWM(adv_clip=0.0), "adv_clip is 0"),
        (lambda: DGPO(dgpo_beta=0.0), "dgpo_beta is 0"),
        (lambda: DGPO(epsilon=-1.0), "epsilon is -1"),
        (lambda: CRD(link="mse"), "link is 'mse'"),
        (lambda: CRD(center_on="prompt"), "center_on is 'prompt'"),
        (lambda: CRD(temperature=0.0), "temperature is 0"),
        (lambda: FlowGRPO(kl_form="mu"), "kl_form is 'mu'; expected one of exact, code, eps, sampled"),
        (lambda: FlowGRPO(epsilon=0.0), "epsilon is 0"),
        (lambda: DDPO(adv_clip=-5.0), "adv_clip is -5"),
        (lambda: DPOK(reward_weight=0.0), "reward_weight is 0"),
        (lambda: FlowDPPO(threshold=0.0), "threshold is 0"),
        (lambda: PRDP(beta=0.0), "beta is 0"),
        (lambda: PRDP(step_reduction="token"), "step_reduction is 'token'"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: SmPO()(s, Pairs.halves(1)), "pairs.reward_w and pairs.reward_l are missing"),
        (lambda s: SmPO()(s, Pairs.halves(1, reward_w=torch.ones(1, 2), reward_l=torch.ones(1, 2))), "reads one"),
        (lambda s: CaPO(beta=1.0)(s, Pairs.halves(1)), "pairs.reward_w and pairs.reward_l are missing"),
        (lambda s: CaPO(beta=1.0)(s, Pairs.halves(1, reward_w=torch.ones(1), reward_l=torch.ones(1))), "log_snr is"),
        (lambda s: FlowDPO(beta_schedule="derived")(s, Pairs.halves(1)), "scores.log_snr is missing"),
        (lambda s: DualIPO(beta=1.0, real_weight=0.5)(s, Pairs.halves(1)), "set objective.real_weight: 0"),
        (lambda s: BideDPO(beta=1.0)(s, Pairs.halves(1)), "pairs.aspect is missing"),
        (lambda s: DSPO()(s, Pairs.halves(1)), "scores.residual is missing"),
        (lambda s: SDPO()(s, Pairs.halves(1)), "scores.residual is missing"),
        (lambda s: PatchDPO()(s, Pairs.halves(1)), "scores.residual is missing"),
        (lambda s: PatchDPO()(Scores.residuals(torch.ones(2, 1, 2, 2)), Pairs.halves(1)), "patch_weight is missing"),
        (lambda s: DSPO()(Scores.residuals(torch.ones(2, 4)), Pairs.halves(1)), "reference"),
        (lambda s: DiffusionKTO()(s, Pairs.halves(1)), "statistic 'q'"),
        (lambda s: DiffusionKTO()(s, Items(index=torch.arange(2)), {"q": torch.zeros(())}), "items.label is missing"),
        (
            lambda s: GDPO(reward_weights=(1.0, 2.0))(
                s, Groups(index=torch.arange(2), group=torch.zeros(2, dtype=torch.int64), reward=torch.ones(2))
            ),
            "got 1 rewards; reward_weights has 2",
        ),
    ],
)
def test_what_is_missing_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(Scores.denoising(torch.ones(2), torch.ones(2)))


def test_betas_that_were_not_published_have_to_be_set():
    for cls in (SePPO, CaPO, BideDPO, DualIPO):
        with pytest.raises(IncompatibleObjective, match=r"set objective\.beta"):
            cls().check(BOUND)
        cls(beta=1.0).check(BOUND)


def test_published_defaults():
    betas = {
        cls.name: cls().beta_for(BOUND) for cls in MINE if issubclass(cls, BetaObjective) and BOUND in cls.default_beta
    }
    assert betas == {
        "ddim_inpo": 2000.0,
        "smpo": 2000.0,
        "diffusion_kto": 5000.0,
        "dspo": 0.001,
        "pso_personal": 5.0,
        "dmpo": 2000.0,
        "snpo": 2000.0,
        "chats": 2000.0,
        "subject_rpo": 1.0,
        "gdpo": 5000.0,
        "flow_dpo": 100.0,
    }
    assert {cls.name: cls().beta_for(Kind.STEP) for cls in (D3PO, SPO, PSO)} == {"d3po": 0.1, "spo": 10.0, "pso": 50.0}
    assert SDPO().beta_for(BOUND) == 5000.0
    assert DSPO(form="link").beta_for(BOUND) == 5000.0
    assert DMPO().label_smoothing == 0.01
    assert PRDP().beta_for(Kind.STEP) == 3e-5


def test_published_defaults_of_online_methods():
    """(beta: of the divergence, clip of advantages, clip of ratios, deviation, added to it)."""
    online = [cls() for cls in MINE if "adv_clip" in cls.__dataclass_fields__]
    found = {
        o.name: (o.beta, o.adv_clip, getattr(o, "epsilon", None), o.options()["unbiased"], o.options().get("eps"))
        for o in online
    }
    assert found == {
        "diffusion_nft": (1e-4, 5.0, None, False, None),
        "awm": (1e-3, 5.0, 1.0, False, None),
        "dgpo": (0.02, 5.0, 1e-2, False, None),
        "crd": (0.1, 5.0, None, False, None),
        "ddpo": (0.0, 5.0, 1e-4, False, 1e-6),
        "dpok": (0.01, None, 1e-4, False, None),
        "flow_grpo": (0.04, 5.0, 1e-4, False, None),
        "dance_grpo": (0.0, 5.0, 1e-4, True, 1e-8),
        "grpo_guard": (0.0, 5.0, 2e-6, False, None),
        "flow_dppo": (0.0, 5.0, None, False, None),
    }
    scale = {o.name: o.scale_rewards for o in online}
    assert {name for name in scale if scale[name] == "group"} == {"dgpo", "dance_grpo"}
    assert {name for name in scale if scale[name] == "none"} == {"ddpo", "dpok"}
    assert (AWM().form, AWM().power, AWM().ratio_to, AWM().ema_kl) == ("ghuber", 0.25, "current", 1.0)
    assert (DGPO().dgpo_beta, CRD().crd_beta, CRD().link) == (100.0, 1.0, "square")
    assert (FlowDPPO().threshold, DPOK().reward_weight, PRDP().epsilon) == (1e-5, 100.0, 1e-6)
    assert [FlowGRPO().kl_form, DPOK().kl_form, DDPO().kl_form] == ["code", "eps", "exact"]


def test_where_rows_come_from_and_how_they_are_noised():
    special = {
        cls.name: (cls.noise, cls.noising, cls.source)
        for cls in MINE
        if (cls.noise, cls.noising, cls.source) != ("shared", "forward", "data")
    }
    assert special == {
        "ddim_inpo": ("shared", "ddim_inversion", "data"),
        "smpo": ("shared", "renoise_inversion", "data"),
        "seppo": ("shared", "forward", "generated"),
        "self_npo": ("shared", "forward", "truncated"),
        "diffusion_kto": ("independent", "forward", "data"),
        "d3po": ("shared", "forward", "trajectories"),
        "spo": ("shared", "forward", "candidates"),
        "pso": ("shared", "forward", "trajectories"),
        "prdp": ("shared", "forward", "whole_trajectories"),
        "dro": ("shared", "forward", "on_policy"),
        "subject_rpo": ("independent", "forward", "data"),
        "gdpo": ("independent", "forward", "data"),
        "diffusion_nft": ("independent", "forward", "data"),
        "awm": ("independent", "forward", "data"),
        "crd": ("independent", "forward", "data"),
    } | dict.fromkeys(BACKPROP, ("shared", "forward", "differentiable"))
    assert {cls.name for cls in MINE if cls.sampling.timesteps == "sampler"} == {"diffusion_nft", "awm", "dgpo", "crd"}


def test_what_they_ask_of_sampled_images():
    asked = {cls.name: cls.sampling for cls in MINE}
    assert {name for name, s in asked.items() if s.policy == "lagged"} == {"diffusion_nft", "crd"}
    assert {name for name, s in asked.items() if s.policy == "reference"} == {"seppo", "self_npo"}
    assert {name for name, s in asked.items() if not s.shared_start} == {
        *("pso", "prdp", "flow_grpo", "grpo_guard", "flow_dppo", "ddpo", "dpok")
    }
    assert {name for name, s in asked.items() if s.pairing == "dominance"} == {"d3po"}
    assert {name for name, s in asked.items() if s.win_rates} == {"capo"}
    assert {name for name, s in asked.items() if not s.negative_gradient} == {"flow_grpo", "grpo_guard"}
    assert SDPO(base="capo", beta=1.0).sampling.win_rates
    assert not SDPO().sampling.win_rates


def test_methods_without_public_code_are_experimental():
    without = {"seppo", "capo", "bide_dpo", "dual_ipo", "prdp", "snpo"}
    ported = {"crd", "drtune"}  # whose code is public in somebody else's port
    assert {cls.name for cls in MINE if cls.status == "experimental"} == without | ported
    assert {cls.name for cls in MINE if not cls.parity} == without | {"draft", "draft_lv"}  # whose formula says it all


@pytest.mark.parametrize("cls", MINE, ids=lambda cls: cls.name)
def test_initial_losses_are_those_of_policy_equal_to_reference(cls):
    """What raises an alarm in a first step that differs from it."""
    if cls.name in BACKPROP:
        assert cls().initial_loss(Kind.REWARD) is None
        return
    kind = Kind.STEP if cls in STEPS else BOUND
    objective = cls(beta=3.0) if not cls.default_beta and "beta" in cls.__dataclass_fields__ else cls()
    residual = torch.full((2, 1, 2, 2), 0.5, dtype=torch.float64)
    if kind is BOUND:
        more = {"log_snr": tensor(0.3, 0.3), "patch_weight": torch.full((2, 2, 2), 0.5), "to_sample": tensor(0.5, 0.5)}
        more["old_residual"] = residual.detach()
        scores = Scores.residuals(residual.requires_grad_(), residual.detach(), **more)
    else:
        theta = tensor(0.1, 0.2)[:, None]
        extra = {name: torch.zeros(2, 1) + 0.1 for name in ("mean_shift", "ref_shift", "eps_shift", "std", "dt")}
        scores = Scores.steps(theta, theta.clone(), theta.clone(), extra=extra)
    pairs = Pairs.halves(1, reward_w=tensor(0.2), reward_l=tensor(0.1), aspect=torch.zeros(1, dtype=torch.int64))
    groups = Groups(index=torch.arange(2), group=torch.zeros(2, dtype=torch.int64), reward=tensor(1.0, 0.0))
    items = Items(index=torch.arange(1), label=torch.ones(1))
    layout = Layout(pairs=pairs, groups=groups, items=items if "items" in objective.needs.layout else None)
    estimator = objective.estimator()
    out = objective(scores, layout, None if estimator is None else estimator.update(scores, layout))
    expected = objective.initial_loss(kind)
    if expected is None:
        # Denoising of winners is part of the loss, or a target that the data choose.
        online = (DiffusionNFT, AWM, DGPO, CRD, *ON_GROUPS)  # an advantage or a reward
        assert cls in (DSPO, PSOPersonal, SelfNPO, CaPO, SubjectRPO, PatchDPO, DualIPO, *online)
    else:
        torch.testing.assert_close(out.per_item.detach(), torch.full_like(out.per_item, expected), rtol=1e-6, atol=1e-9)


def test_texts_are_sent_to_their_own_methods():
    for cls in MINE:
        if cls not in (BideDPO, GDPO, SNPO):
            with pytest.raises(IncompatibleObjective):
                (cls(beta=1.0) if "beta" in cls.__dataclass_fields__ else cls()).check(Kind.TOKEN)
    with pytest.raises(IncompatibleObjective, match=r"mean over the elements of a latent; a text has none; use 'dpo'"):
        D3PO().check(Kind.TOKEN)
    with pytest.raises(IncompatibleObjective, match="is not a likelihood ratio"):
        SPO().check(BOUND)
    for cls in ON_GROUPS:
        with pytest.raises(IncompatibleObjective, match="is not a likelihood ratio"):
            cls().check(BOUND)
    with pytest.raises(IncompatibleObjective, match=r"no image to invert; use 'dpo' on texts"):
        DDIMInPO().check(Kind.STEP)


def test_what_the_sampler_must_supply_is_named():
    theta = torch.zeros(2, 3, requires_grad=True)
    scores = Scores.steps(theta, torch.zeros(2, 3), torch.zeros(2, 3), extra={"std": torch.ones(2, 2)})
    groups = Groups(index=torch.arange(2), group=torch.zeros(2), reward=tensor(1.0, 0.0))
    for cls, name in (
        (FlowGRPO, "ref_shift"),
        (DPOK, "eps_shift"),
        (GRPOGuard, "mean_shift"),
        (FlowDPPO, "mean_shift"),
    ):
        with pytest.raises(ValueError, match=f"reads '{name}'"):
            cls()(scores, groups)
    for cls in (DDPO, DanceGRPO):
        assert cls()(scores, groups).loss.requires_grad
    with pytest.raises(ValueError, match=r"'std'\] has shape \(2, 2\); expected \(2, 3\), one per step"):
        GRPOGuard()(Scores.steps(theta, extra=scores.extra | {"mean_shift": torch.zeros(2, 3)}), groups)
    with pytest.raises(ValueError, match=r"units\.ref is missing"):
        PRDP()(Scores.steps(theta), groups)
    with pytest.raises(ValueError, match="old_residual is missing"):
        CRD()(Scores.residuals(torch.ones(2, 1, 2, 2)), groups)


@pytest.mark.parametrize("cls", [D3PO, SPO, PSO])
def test_sums_over_a_trajectory_are_no_transitions(cls):
    whole = Scores.steps(torch.zeros(2, 5), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="one row per transition; these rows are sums over 5 steps"):
        cls()(whole, Pairs.halves(1))
    single = Scores.steps(torch.zeros(2, 1), torch.zeros(2, 1))
    assert cls()(single, Pairs.halves(1)).loss.item() == pytest.approx(math.log(2))


# -- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls",
    [FlowGRPO, DanceGRPO, GRPOGuard, FlowDPPO, PRDP, DiffusionNFT, AWM, DGPO, CRD, GDPO],
    ids=lambda cls: cls.name,
)
def test_a_group_of_equal_rewards_teaches_nothing_at_first(cls):
    """At policy == reference == sampling policy; advantages of the other group add up to 0, and it teaches something."""
    objective = cls(beta=2.0) if cls is GDPO else cls()
    reward = tensor(0.3, 0.3, 0.3, 1.0, 0.0, 0.4)
    groups = Groups(index=torch.arange(6), group=torch.tensor([4, 4, 4, 1, 1, 1]), reward=reward)
    g = torch.Generator().manual_seed(3)
    if cls in STEPS:
        x = torch.randn(6, 2, generator=g, dtype=torch.float64).requires_grad_()
        none = torch.zeros(6, 2, dtype=torch.float64)
        extra = dict.fromkeys(("mean_shift", "ref_shift", "eps_shift"), none) | {
            "std": none + 0.3,
            "dt": none + 0.1,
        }
        scores = Scores.steps(x, x.detach().clone(), x.detach().clone(), extra=extra)
    else:
        x = torch.randn(6, 2, 2, 2, generator=g, dtype=torch.float64).requires_grad_()
        still, ones = x.detach().clone(), torch.ones(6, dtype=torch.float64)
        scores = Scores.residuals(x, still, old_residual=still, to_sample=ones, log_snr=0 * ones)
    (grad,) = torch.autograd.grad(objective(scores, groups).loss, x)
    size = grad.abs().flatten(1).amax(1)
    assert size[:3].max() < 1e-12
    assert size[3:].min() > 1e-9
    if cls not in (PRDP, GDPO):  # which compare rewards themselves
        a = objective.advantage(scores, groups)
        assert a[:3].tolist() == [0.0] * 3
        assert a[3:].sum().abs() < 1e-9


# -- sdpo ------------------------------------------------------------------------------------------------------------


def test_sdpo_is_noised_and_fed_as_its_base_is():
    inner = SDPO(base="ddim_inpo")
    assert (inner.noising, inner.beta_for(BOUND)) == ("ddim_inversion", 2000.0)
    assert SDPO(base="smpo").noising == "renoise_inversion"
    assert SDPO(base="dro").source == "on_policy"
    assert SDPO().noising == SDPO.noising == "forward"
    assert losses.Cap.RESIDUAL in SDPO().needs.caps
    with pytest.raises(IncompatibleObjective, match=r"nats|likelihood|token|prob"):
        SDPO(base="simpo").check(BOUND)
    assert not SDPO(base="mapo").reads_reference()
    assert SDPO(base="dmpo").initial_loss(BOUND) == pytest.approx(1.614, abs=1e-3)


def test_a_sum_asks_for_what_its_parts_read():
    mixed = losses.Mixed(losses=("dspo", "flow_dpo", "sft"), weights=(1.0, 0.5, 0.1))
    assert losses.Cap.RESIDUAL in mixed.needs.caps
    assert mixed.needs.log_snr
    assert not losses.Mixed().needs.log_snr
    assert losses.Mixed().needs.caps == losses.Mixed.needs.caps
    assert losses.Mixed(losses=("ddim_inpo", "sft"), weights=(1.0, 0.1)).noising == "ddim_inversion"
    assert losses.Mixed(losses=("sft",), weights=(1.0,)).noising == "forward"
    assert SDPO(base="flow_dpo").needs.log_snr
    assert not SDPO().needs.log_snr
    SDPO(base="cpo", beta=500.0, settings={"allow_bound_abs": True}).check(BOUND)
    with pytest.raises(ValueError, match="made in different ways"):
        losses.Mixed(losses=("dpo", "ddim_inpo"), weights=(1.0, 1.0))
    scores = Scores.steps(tensor(0.1, 0.0, 0.2, 0.1), torch.zeros(4))
    tied = losses.Mixed(losses=("d3po", "sft"), weights=(1.0, 0.1), settings={"d3po": {"ties": "drop"}})
    with pytest.raises(ValueError, match="d3po left out 1 of 2 pairs"):
        tied(scores, Pairs.halves(2, p=torch.tensor([1.0, 0.5])))


def test_sdpo_hands_statistics_and_items_on():
    g = torch.Generator().manual_seed(0)
    r = torch.randn(6, 3, generator=g, dtype=torch.float64).requires_grad_()
    scores = Scores.residuals(r, r.detach() + 0.1)
    aspect = torch.tensor([0, 1])
    pairs = Pairs(w=torch.tensor([0, 1]), l=torch.tensor([2, 3]), aspect=aspect)
    mine, base = SDPO(base="bide_dpo", beta=2.0), BideDPO(beta=2.0)
    assert mine.needs.stats == base.needs.stats
    stats = mine.estimator().update(scores, Layout(pairs=pairs))
    torch.testing.assert_close(mine(scores, pairs, stats).per_item, base(scores, pairs, stats).per_item)
    layout = Layout(pairs=pairs, items=Items(index=torch.tensor([4, 5])))
    mine, other = SDPO(base="dual_ipo", beta=2.0, settings={"real_weight": 0.5}), DualIPO(beta=2.0, real_weight=0.5)
    assert "error/real" in mine(scores, layout).metrics
    torch.testing.assert_close(mine(scores, layout).per_item, other(scores, layout).per_item)


def test_the_safeguard_is_one_number_per_micro_batch_or_one_per_pair():
    w = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]], dtype=torch.float64)
    l = torch.tensor([[[4.0, 3.0]], [[1.0, 1.0]]], dtype=torch.float64)
    # <w, w> = 1, 4; <l, w> = 4, 2
    torch.testing.assert_close(safeguard(w, l, 0.2), torch.tensor(0.8 * 5 / 6, dtype=torch.float64))
    torch.testing.assert_close(safeguard(w, l, 0.2, "pair"), tensor(0.2, 1.0))
    assert safeguard(w, -l, 0.2) == 1.0
    assert safeguard(w, w, 0.7).item() == pytest.approx(0.3)
    assert safeguard(0 * w, l, 0.7) == 1.0, "winners without error have nothing to protect"


# -- helpers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gap", "factor"), [(0.1, 0.50), (0.3, 1.49), (0.6, 2.91), (1.0, 4.62), (0.0, 0.0)])
def test_smpo_multiplies_by_ten_times_the_tangent_of_half_the_gap(gap, factor):
    objective = SmPO()
    high = tensor(objective.reward_low + gap * (objective.reward_high - objective.reward_low))
    pairs = Pairs.halves(1, reward_w=high, reward_l=tensor(objective.reward_low))
    assert objective.factor(pairs, high).item() == pytest.approx(factor, abs=5e-3)


def test_calibrated_rewards_are_win_rates():
    reward = tensor(1.0, 0.0, 3.0, -1.0, 0.5)
    group = torch.tensor([0, 0, 1, 1, 1])
    rate = calibrated_rewards(reward, group)[:, 0]
    p = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(rate[:2], tensor(p, 1 - p))
    torch.testing.assert_close(rate[2:].sum().item(), 1.5)
    s = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    torch.testing.assert_close(rate[2].item(), (s(4.0) + s(2.5)) / 2)
    torch.testing.assert_close(calibrated_rewards(reward + 7 * (group == 1), group)[:, 0], rate)
    sharper = calibrated_rewards(5 * reward, group)[:, 0]
    assert ((sharper - 0.5).abs() >= (rate - 0.5).abs() - 1e-12)[:4].all()
    two = calibrated_rewards(torch.stack([reward, -reward], 1), group)
    torch.testing.assert_close(two.sum(1), torch.ones(5, dtype=torch.float64))
    with pytest.raises(ValueError, match="one sample only"):
        calibrated_rewards(reward, torch.tensor([0, 0, 1, 1, 2]))


def test_frontiers_are_the_samples_nothing_dominates_and_those_that_dominate_nothing():
    reward = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 0.0], [0.5, 0.5], [9.0, 9.0], [1.0, 1.0]])
    group = torch.tensor([0, 0, 0, 0, 1, 0])
    upper, lower = frontiers(reward, group)
    assert upper.tolist() == [True, True, False, False, True, True]
    assert lower.tolist() == [False, False, True, False, True, False]
    upper, lower = frontiers(tensor(0.3, 0.1, 0.9), torch.zeros(3, dtype=torch.int64))
    assert (upper.tolist(), lower.tolist()) == ([False, False, True], [False, True, False])


def test_the_harmonic_reward():
    image, text = tensor(0.8, 0.2, -0.4), tensor(0.2, 0.2, 0.6)
    s = lambda x: (x + 1) / 2  # noqa: E731
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-6, atol=0)  # noqa: E731
    close(lambda_harmonic(image, text, 0.0), s(text))
    close(lambda_harmonic(image, text, 1.0), s(image))
    for lam in (0.3, 0.5, 0.7):
        reward = lambda_harmonic(image, text, lam)
        close(reward[1], s(image)[1])
        assert (reward <= lam * s(image) + (1 - lam) * s(text) + 1e-7).all()
        close(reward, 1 / (lam / s(image) + (1 - lam) / s(text)))
    assert torch.isfinite(lambda_harmonic(tensor(-1.0), tensor(-1.0), 0.5)).all()
    with pytest.raises(ValueError, match=r"lambda is 1\.5"):
        lambda_harmonic(image, text, 1.5)


def test_published_subject_labels_are_nearly_coin_flips():
    p = preference_probability(tensor(0.55, 0.7), tensor(0.5, 0.5))
    torch.testing.assert_close(p, tensor(0.512, 0.550), rtol=0, atol=5e-4)
    assert preference_probability(tensor(0.7), tensor(0.5), temperature=0.02).item() > 0.99


def test_patch_weights_learn_bad_patches_of_subjects_and_good_ones_of_generated_images():
    quality = torch.tensor([[[0.9, 0.1]], [[0.9, 0.1]]])
    weight = patch_weights(quality, torch.tensor([True, False]))
    torch.testing.assert_close(weight, torch.tensor([[[0.1, 0.9]], [[0.9, 0.1]]]))
    perfect = patch_weights(torch.tensor([[[1.0]], [[0.0]]]), torch.tensor([True, False]))
    assert not perfect.any(), (
        "a subject that is reproduced and a generated image without good patches: nothing to learn"
    )


def test_steps_without_a_clear_winner_weigh_nothing():
    gap = tensor(0.3, 0.7, 2.0, -1.0)
    weight = step_weights(gap, torch.zeros(4), 0.3)
    assert [round(math.tanh(x / 2), 3) for x in gap.tolist()] == [0.149, 0.336, 0.762, -0.462]
    assert weight.tolist() == [0.0, 2.0, 2.0, 0.0]
    assert not step_weights(torch.zeros(3), torch.zeros(3)).any()
    with pytest.raises(ValueError, match="threshold is 1"):
        step_weights(gap, gap, 1.0)


def test_group_advantages():
    group = torch.zeros(2, dtype=torch.int64)
    torch.testing.assert_close(normalised_advantages(tensor(3.0, 1.0)[:, None], group), tensor(0.7071068, -0.7071068))
    one_hot = normalised_advantages(tensor(0, 0, 9.0, 0, 0, 0)[:, None], torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(one_hot, tensor(-0.408, -0.408, 2.041, -0.408, -0.408, -0.408), rtol=0, atol=5e-4)
    torch.testing.assert_close(one_hot.sum().item(), 0.0, rtol=0, atol=1e-9)
    reward = torch.tensor([[1.0, 5.0], [3.0, 5.0], [2.0, 5.0], [-1.0, 0.0], [7.0, 1.0]])
    ids = torch.tensor([4, 4, 4, 1, 1])
    expected = torch.tensor([[0, 0], [1, 0], [0.5, 0], [0, 0], [1, 1]])
    torch.testing.assert_close(min_max(reward, ids), expected)
    by_image = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 2)
    mixed = normalised_advantages(reward, ids, by_image)
    torch.testing.assert_close(mixed[3:], torch.tensor([-0.7071068, 0.7071068]))


def test_a_missing_reward_is_left_out_of_its_group():
    nan = math.nan
    reward = torch.tensor([[1.0, 5.0], [nan, 7.0], [3.0, 6.0], [2.0, nan], [nan, nan], [8.0, 9.0], [4.0, nan]])
    group = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    expected = torch.tensor([[0, 0], [nan, 1], [1, 0.5], [0.5, nan], [nan, nan], [1, 0], [0, nan]])
    torch.testing.assert_close(min_max(reward, group), expected, equal_nan=True)
    mine = normalised_advantages(reward, group, (2.0, 1.0))
    total = torch.tensor([0.0, 1.0, 2.5, 1.0])
    torch.testing.assert_close(mine[:4], (total - total.mean()) / total.std())
    assert mine[4] == 0, "nothing is known of it"
    torch.testing.assert_close(mine[5:], torch.tensor([0.7071068, -0.7071068]))
    # One reward, one of three missing: the other two are what they would be alone.
    alone = normalised_advantages(torch.tensor([[3.0], [nan], [1.0]]), torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(alone, torch.tensor([0.7071068, 0.0, -0.7071068]))
    none = normalised_advantages(torch.full((2, 1), nan), torch.zeros(2, dtype=torch.int64))
    assert none.tolist() == [0.0, 0.0]
    scores = Scores.denoising(torch.rand(3, requires_grad=True), torch.rand(3))
    groups = Groups(index=torch.arange(3), group=torch.zeros(3, dtype=torch.int64), reward=tensor(3.0, nan, 1.0))
    (grad,) = torch.autograd.grad(GDPO(beta=2.0)(scores, groups).loss, scores.error)
    assert [value != 0 for value in grad.tolist()] == [True, False, True]


# -- golden numbers of neighbours ------------------------------------------------------------------------------------


def test_mapo_function_of_the_error():
    torch.testing.assert_close(bernoulli_score(tensor(0.0, 0.1, 1.0)), tensor(1.0, 0.97521, 0.77075), rtol=0, atol=5e-6)
    mapo = losses.MaPO()
    tied = Scores.denoising(tensor(0.2, 0.2).requires_grad_())
    assert mapo(tied, Pairs.halves(1)).loss.item() == pytest.approx(0.2 + 0.1 * math.log(2))
    small = torch.full((2,), 1e-6, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(mapo(Scores.denoising(small), Pairs.halves(1)).loss, small)
    torch.testing.assert_close(grad, tensor(13.5, -12.5), rtol=1e-4, atol=0)


def test_a_constant_offset_of_the_reference_is_affine_in_the_mean_error():
    """Reference = policy + b on all elements: z = beta / 2 times 2 b (mean r_w - mean r_l)."""
    g = torch.Generator().manual_seed(0)
    r = torch.randn(2, 4, 3, generator=g, dtype=torch.float64)
    z = DPO(beta=6.0)(Scores.residuals(r, r + 0.3), Pairs.halves(1)).metrics["rewards/margins"]
    torch.testing.assert_close(z.item(), (3.0 * 2 * 0.3 * (r[0].mean() - r[1].mean())).item())


def test_equal_noise_at_zero_signal_teaches_nothing():
    """At abar = 0 both noisy latents are the noise, so one network's errors are equal and the pair cancels."""
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theta = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    r = torch.stack([theta * noise - noise] * 2)
    out = DPO(beta=5000.0)(Scores.residuals(r, -0.5 * torch.stack([noise] * 2)), Pairs.halves(1))
    assert out.loss.item() == pytest.approx(math.log(2))
    (grad,) = torch.autograd.grad(out.loss, theta)
    assert grad.abs() < 1e-9


@pytest.mark.parametrize("objective", [losses.RFT(threshold=0.5), losses.RAFT()])
def test_several_rewards_of_samples_count_by_their_sum(objective: losses.RFT) -> None:
    reward = torch.tensor([[1.0, -2.0], [0.0, 0.7], [0.9, 0.1], [1.6, -1.4]])
    groups = losses.Groups(index=torch.arange(4), group=torch.tensor([0, 0, 1, 1]), reward=reward)
    assert objective.accepted(groups).tolist() == [False, True, True, False]
