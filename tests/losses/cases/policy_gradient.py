"""Cases of `diffalign.losses.policy_gradient` per unit: clipped, gated and weighted ratios."""

import math
from dataclasses import replace

import torch
from group_cases import (
    GROUP,
    INDEX,
    SAMPLED,
    clip_term,
    formula,
    fresh,
    row_mean,
    same,
    slope,
    unit_batch,
)
from loss_cases import Case, Start, detach, token_scores

from diffalign.losses import Groups, Layout, Scores, Totals
from diffalign.losses.policy_gradient import BNPO, CISPO, DAPO, GMPO, GRPO, GSPO, LUSPO, SAPO, VESPO, DrGRPO


def over_units(x, lengths):
    return x.sum() * len(lengths) / sum(lengths)


def gate_term(theta, ratio, a, ratio0):
    tau = 1.0 if a > 0 else 1.05
    return -a * 4 / tau / (1 + torch.exp(-tau * (ratio - 1)))


def gamma_term(theta, ratio, a, ratio0):
    w = torch.prod(ratio0)
    k, lam = (2, 3) if a >= 0 else (3, 2)
    return -torch.exp(lam * (1 - w)) * w**k * a * theta


def geometric_term(theta, ratio, a, ratio0):
    log_ratio = torch.log(ratio)
    clipped = torch.clamp(log_ratio, -0.2, 0.3)
    worse = torch.minimum(log_ratio, clipped) if a > 0 else torch.maximum(log_ratio, clipped)
    return -a * torch.exp(worse.mean())


def shifting_and_scaling_rewards_changes_nothing(cls):
    scores, layout, _ = unit_batch(1)
    moved = replace(layout.groups, reward=1000 * layout.groups.reward + 3)
    # up to the 1e-4 that is added to the standard deviation
    same(cls()(scores, moved).per_item, cls()(scores, layout).per_item, rtol=2e-3)


def fresh_samples_have_loss_zero_but_a_gradient(cls):
    scores, layout, _ = unit_batch(2)
    out = cls()(replace(scores, units=replace(scores.units, old=None), old=None), layout)
    same(out.loss, torch.zeros((), dtype=torch.float64), atol=1e-9)
    assert slope(cls(), (scores, layout, {})).abs().sum() > 0.1


def two_samples_are_a_contrastive_pair_loss(cls):
    """2-GRPO: the gradient is that of -(mean log p_w - mean log p_l), times a constant."""
    scores = token_scores(2, seed=3, ref=False)
    layout = Layout(groups=Groups(index=torch.arange(2), group=torch.zeros(2), reward=torch.tensor([1.0, 0.0])))
    got = slope(cls(), (scores, layout, {}))
    length = scores.units.mask.sum(1, keepdim=True)
    sign = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    expected = 0.5 * 0.5 / (math.sqrt(0.5) + 1e-4) * sign * scores.units.mask / length
    same(got, expected, rtol=1e-6)


def dead_groups_teach_nothing(cls):
    scores, _, _ = unit_batch(4)
    reward = torch.tensor([0.1, 0.1, 1.0, 0.1, float("nan"), 1.0])
    out = cls()(scores, Groups(index=INDEX, group=GROUP, reward=reward))
    assert out.per_item.tolist() == [0.0] * 6
    assert out.metrics["frac_zero_std"].tolist() == [1.0, 1.0]


def masked_units_do_not_exist(cls):
    """Cutting padding off, or adding some, changes nothing."""
    scores, layout, _ = detach(unit_batch(5))
    u = scores.units
    wide = [torch.cat([x, torch.full((6, 3), fill)], 1) for x, fill in ((u.theta, -9.0), (u.ref, -8.0), (u.old, -3.0))]
    mask = torch.cat([u.mask, torch.zeros(6, 3, dtype=torch.bool)], 1)
    same(cls()(Scores.tokens(*wide, mask=mask), layout).per_item, cls()(scores, layout).per_item)


def positive_advantage_pulls_up(cls):
    scores, layout, _ = fresh((3, 1))()
    assert (slope(cls(), (scores, layout, {}))[scores.units.mask] < 0).all()


def is_grpo_for_equal_lengths(cls):
    scores, layout, _ = unit_batch(6)
    u = scores.units
    scores = Scores.tokens(u.theta, u.ref, u.old, mask=torch.ones_like(u.mask))
    same(cls(epsilon_high=0.2)(scores, layout).per_item, GRPO()(scores, layout).per_item)


def local_and_global_counts_agree_on_a_whole_step(cls):
    scores, layout, _ = unit_batch(7)
    same(cls(epsilon_high=0.28)(scores, layout).per_item, DAPO()(scores, layout).per_item)


def split_step_equals_whole_step(cls):
    """Two micro-batches with the counts of the step have the loss of one batch, however long their rows are."""
    scores, layout, _ = detach(unit_batch(8))
    u, objective = scores.units, cls()
    whole = objective(scores, layout).loss
    advantage = objective.advantage(scores, layout.groups)
    totals = Totals(items=6, units=float(u.mask.sum()))
    parts = []
    for at in (slice(0, 2), slice(2, 6)):
        rows = INDEX[at]
        part = Scores.tokens(u.theta[rows], u.ref[rows], u.old[rows], mask=u.mask[rows], totals=totals)
        g = Groups(index=torch.arange(len(rows)), group=GROUP[at], reward=rows * 0.0, advantage=advantage[at])
        parts.append(objective(part, g).per_item)
    same(torch.cat(parts).mean(), whole)


def is_grpo_where_all_units_have_one_ratio(cls):
    scores, layout, _ = unit_batch(9)
    u = scores.units
    shift = torch.linspace(-0.1, 0.1, 6, dtype=torch.float64)[:, None]
    scores = Scores.tokens(u.theta, u.ref, (u.theta + shift).detach(), mask=u.mask)
    same(cls()(scores, layout).per_item, GRPO(epsilon=3e-4, epsilon_high=4e-4)(scores, layout).per_item)


def is_gspo_times_length(cls):
    scores, layout, _ = unit_batch(10)
    length = scores.units.mask.sum(1)[INDEX]
    same(cls()(scores, layout).per_item, GSPO()(scores, layout).per_item * length)


def has_the_gradient_of(other):
    """On fresh samples."""

    def identity(cls):
        batch = unit_batch(12)
        same(slope(cls(), batch), slope(other(), batch))

    return identity


def is_gspo_without_clipping(cls):
    scores, layout, _ = unit_batch(13)
    same(
        cls(epsilon=50.0)(scores, layout).per_item,
        GSPO(epsilon=0.999999999, epsilon_high=50.0, delta=50.0)(scores, layout).per_item,
        rtol=1e-6,
    )


def one_outlier_is_clipped_alone(cls):
    """A single unit with a huge ratio moves the row's mean by at most its clipped share."""
    theta = torch.tensor([[5.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    scores = Scores.tokens(theta, None, torch.zeros(1, 4), mask=torch.ones(1, 4, dtype=torch.bool))
    one = torch.ones(1, dtype=torch.float64)
    g = Groups(index=torch.zeros(1, dtype=torch.int64), group=one, reward=one, advantage=one)
    same(cls()(scores, g).per_item, -torch.exp(torch.tensor([0.1], dtype=torch.float64)))


CLIP = ("surrogates.clip_surrogate(ratio, rollout.advantage,", "surrogates.clip_surrogate(ratio, -rollout.advantage,")
DOUBLE = (
    "surrogates.clip_surrogate(ratio, rollout.advantage,",
    "2 * surrogates.clip_surrogate(ratio, rollout.advantage,",
)
RANGE = ("return self.epsilon, self.epsilon if", "return 2 * self.epsilon, self.epsilon if")
KL = [
    ("return self.beta * self.reduce(kl", "return -self.beta * self.reduce(kl"),
    ("return self.beta * self.reduce(kl", "return 2 * self.beta * self.reduce(kl"),
    ("kl = kl * ratio", "kl = kl / ratio"),
    ("kl_estimate(rollout.theta, rollout.ref,", "kl_estimate(rollout.ref, rollout.theta,"),
]
CALL = "surrogates.weighted_likelihood(rollout.theta, weight, rollout.advantage)"
LIKELIHOOD = [(CALL, f"-{CALL}"), (CALL, f"2 * {CALL}")]


CASES = [
    Case(
        objective=GRPO,
        make=lambda cls: cls(beta=0.04, epsilon_high=0.3, delta=1.5, reward_weights=(1.0, 1.0)),
        batch=lambda seed: unit_batch(seed, columns=2),
        formula=formula(clip_term(0.2, 0.3, 1.5), row_mean, beta=0.04),
        start=Start(-1.0, [-1.0, -1.0], fresh((3, 1))),
        identities=[
            shifting_and_scaling_rewards_changes_nothing,
            fresh_samples_have_loss_zero_but_a_gradient,
            two_samples_are_a_contrastive_pair_loss,
            dead_groups_teach_nothing,
            masked_units_do_not_exist,
        ],
        mutations=[
            CLIP,
            DOUBLE,
            RANGE,
            *KL,
            ('reduction: ClassVar[UnitReduction] = "seq_mean"', 'reduction: ClassVar[UnitReduction] = "seq_sum"'),
            ('"scale": self.scale_rewards', '"scale": "none"'),
            ("total_reward(groups.reward, self.reward_weights)", "total_reward(groups.reward, (2.0, 1.0))"),
        ],
        kinds=SAMPLED,
    ),
    Case(
        objective=BNPO,
        make=lambda cls: cls(beta=0.04, use_bias_correction_kl=False),
        batch=unit_batch,
        formula=formula(clip_term(0.2, 0.2), over_units, beta=0.04, corrected=False),
        start=Start(-1.0, [-1.0, -1.0], fresh((2, 2))),
        identities=[
            is_grpo_for_equal_lengths,
            local_and_global_counts_agree_on_a_whole_step,
            masked_units_do_not_exist,
        ],
        mutations=[
            ('mask, "token_mean")', 'mask, "seq_mean")'),
            ("return reduce_units(x.expand(mask.shape)", "return -reduce_units(x.expand(mask.shape)"),
            ("return reduce_units(x.expand(mask.shape)", "return 2 * reduce_units(x.expand(mask.shape)"),
            KL[0],
            ("if self.use_bias_correction_kl:", "if not self.use_bias_correction_kl:"),
        ],
        kinds=SAMPLED,
    ),
    Case(
        objective=DrGRPO,
        make=lambda cls: cls(beta=0.04, max_completion_length=7),
        batch=unit_batch,
        formula=formula(clip_term(0.2, 0.2), lambda x, lengths: x.sum() / 7, beta=0.04, std=False),
        start=Start(-2 / 7, [-2 / 7, -2 / 7], fresh((2, 2))),
        identities=[positive_advantage_pulls_up, split_step_equals_whole_step],
        mutations=[
            ('scale_rewards: Scale = "none"', 'scale_rewards: Scale = "group"'),
            ('mask, "constant", constant=constant)', 'mask, "constant", constant=2 * constant)'),
            ('mask, "constant", constant=constant)', 'mask, "seq_mean", constant=constant)'),
            ('return reduce_units(x.expand(mask.shape), mask, "constant"', 'return -reduce_units(x, mask, "constant"'),
            KL[0],
        ],
        kinds=SAMPLED,
    ),
    Case(
        objective=DAPO,
        make=lambda cls: cls(beta=0.04),
        batch=unit_batch,
        formula=formula(clip_term(0.2, 0.28), over_units, beta=0.04),
        start=Start(-1.0, [-1.0, -1.0], fresh((2, 2))),
        identities=[is_grpo_for_equal_lengths, split_step_equals_whole_step, dead_groups_teach_nothing],
        mutations=[
            ("epsilon_high: float | None = 0.28", "epsilon_high: float | None = 0.2"),
            ('reduction: ClassVar[UnitReduction] = "token_mean"', 'reduction: ClassVar[UnitReduction] = "seq_mean"'),
            ("totals=scores.totals)", "totals=None)"),
            KL[0],
        ],
        kinds=SAMPLED,
    ),
    Case(
        objective=GSPO,
        make=lambda cls: cls(beta=0.04, epsilon=0.05, epsilon_high=0.08),
        batch=unit_batch,
        formula=formula(clip_term(0.05, 0.08), row_mean, beta=0.04, level="sequence"),
        start=Start(-1.0, [-1.0, -1.0], fresh((3, 1))),
        identities=[is_grpo_where_all_units_have_one_ratio, masked_units_do_not_exist],
        mutations=[
            ('level: Literal["token", "sequence"] = "sequence"', 'level: Literal["token", "sequence"] = "token"'),
            ("epsilon: float = 3e-4", "epsilon: float = 3e-3"),
            KL[0],
        ],
        kinds=SAMPLED,
    ),
    Case(
        objective=LUSPO,
        make=lambda cls: cls(beta=0.04, epsilon=0.05, epsilon_high=0.08),
        batch=unit_batch,
        formula=formula(clip_term(0.05, 0.08), lambda x, lengths: x.sum(), beta=0.04, level="sequence"),
        start=Start(-2.0, [-2.0, -2.0], fresh((2, 2))),
        identities=[is_gspo_times_length, masked_units_do_not_exist],
        mutations=[
            ('reduction: ClassVar[UnitReduction] = "seq_sum"', 'reduction: ClassVar[UnitReduction] = "seq_mean"'),
            ("per_item = self.reduce(loss,", "per_item = -self.reduce(loss,"),
            KL[0],
        ],
        kinds=SAMPLED,
    ),
    Case(
        objective=CISPO,
        make=lambda cls: cls(beta=0.04, epsilon_high=1.1),
        batch=unit_batch,
        formula=formula(lambda t, r, a, r0: -torch.clamp(r0, max=1.1) * a * t, over_units, beta=0.04),
        start=Start(1.0, [-1.0, -1.0], fresh((2, 2))),
        identities=[has_the_gradient_of(DAPO), split_step_equals_whole_step, masked_units_do_not_exist],
        mutations=[
            *LIKELIHOOD,
            ("ratio.clamp(max=self.epsilon_high)", "ratio.clamp(max=1 + self.epsilon_high)"),
            ('reduction: ClassVar[UnitReduction] = "token_mean"', 'reduction: ClassVar[UnitReduction] = "seq_mean"'),
            KL[0],
        ],
        kinds=SAMPLED,
    ),
    Case(
        objective=SAPO,
        make=lambda cls: cls(beta=0.04),
        batch=unit_batch,
        formula=formula(gate_term, row_mean, beta=0.04),
        start=Start(-2.0, [-1.0, -1.0], fresh((3, 1))),
        identities=[has_the_gradient_of(GRPO), masked_units_do_not_exist],
        mutations=[
            ("surrogates.soft_gate(ratio, rollout.advantage,", "-surrogates.soft_gate(ratio, rollout.advantage,"),
            ("surrogates.soft_gate(ratio, rollout.advantage,", "2 * surrogates.soft_gate(ratio, rollout.advantage,"),
            ("sapo_temperature_neg: float = 1.05", "sapo_temperature_neg: float = 1.0"),
            ('reduction: ClassVar[UnitReduction] = "seq_mean"', 'reduction: ClassVar[UnitReduction] = "token_mean"'),
            KL[0],
        ],
        kinds=SAMPLED,
    ),
    Case(
        objective=VESPO,
        make=lambda cls: cls(beta=0.04),
        batch=unit_batch,
        formula=formula(gamma_term, over_units, beta=0.04),
        start=Start(1.0, [-1.0, -1.0], fresh((2, 2))),
        identities=[has_the_gradient_of(DAPO), masked_units_do_not_exist],
        mutations=[
            *LIKELIHOOD,
            ("vespo_k_neg: float = 3.0", "vespo_k_neg: float = 2.0"),
            ("lambda_pos=self.vespo_lambda_pos", "lambda_pos=self.vespo_k_pos"),
            ('reduction: ClassVar[UnitReduction] = "token_mean"', 'reduction: ClassVar[UnitReduction] = "seq_mean"'),
            KL[0],
        ],
        kinds=SAMPLED,
    ),
    Case(
        objective=GMPO,
        make=lambda cls: cls(beta=0.04, epsilon=0.2, epsilon_high=0.3),
        batch=unit_batch,
        formula=formula(geometric_term, row_mean, beta=0.04, corrected=False),
        start=Start(-1.0, [-1.0, -1.0], fresh((3, 1))),
        identities=[is_gspo_without_clipping, one_outlier_is_clipped_alone, has_the_gradient_of(GRPO)],
        mutations=[
            ("mask, rollout.advantage, self.epsilon, high)", "mask, -rollout.advantage, self.epsilon, high)"),
            ("mask, rollout.advantage, self.epsilon, high)", "mask, 2 * rollout.advantage, self.epsilon, high)"),
            ("use_bias_correction_kl: bool = False", "use_bias_correction_kl: bool = True"),
            KL[0],
        ],
        kinds=SAMPLED,
    ),
]
