"""TRL's GRPOTrainer (every loss_type), GMPOTrainer, RLOOTrainer and A2POTrainer, and their advantages."""

import math
from types import SimpleNamespace

import pytest
import torch
from trl.experimental.a2po.a2po_trainer import A2POTrainer
from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from trl_stubs import (
    DOUBLE,
    DTYPES,
    GRPO_TYPES,
    TOLERANCE,
    assert_parity,
    ragged_mask,
    run_statements,
    token_logps,
    trainer,
)

from diffalign import losses
from diffalign.losses import Groups, Scores, Totals
from diffalign.losses.advantages import advantages, optimal_value

ROWS, UNITS = 8, 6


class Batch:
    """Sampled rows with given advantages."""

    def __init__(self, seed, dtype, old=True, rows=ROWS):
        g = torch.Generator().manual_seed(seed)
        self.mask = ragged_mask(rows, UNITS, seed)
        self.theta = token_logps(self.mask, seed + 1, dtype).requires_grad_()
        self.old = token_logps(self.mask, seed + 2, dtype, near=self.theta) if old else None
        self.ref = token_logps(self.mask, seed + 3, dtype, near=self.theta)
        self.advantage = torch.randn(rows, generator=g, dtype=torch.float64).to(dtype)
        self.weight = torch.rand(rows, UNITS, generator=g, dtype=torch.float64).to(dtype)

    def inputs(self, units=None, **more):
        rows = len(self.mask)
        return {
            "prompt_ids": torch.ones(rows, 1, dtype=torch.long),
            "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
            "completion_ids": torch.ones(rows, UNITS, dtype=torch.long),
            "completion_mask": self.mask.long(),
            "advantages": self.advantage,
            "old_per_token_logps": self.old,
            "ref_per_token_logps": self.ref,
            "num_items_in_batch": torch.tensor(float(units or self.mask.sum())),
        } | more

    def trl(self, loss_type, *, cls=GRPOTrainer, beta=0.0, corrected=True, level="token", units=None, **settings):
        low = settings.pop("epsilon", 0.2)
        pos, neg = settings.pop("temperatures", (1.0, 1.05))
        more = settings.pop("inputs", {})
        args = SimpleNamespace(
            use_bias_correction_kl=corrected,
            delta=settings.pop("delta", None),
            steps_per_generation=settings.pop("steps", 1),
            sapo_temperature_pos=pos,
            sapo_temperature_neg=neg,
            vespo_k_pos=2.0,
            vespo_lambda_pos=3.0,
            vespo_k_neg=3.0,
            vespo_lambda_neg=2.0,
        )
        stub = trainer(
            args=args,
            loss_type=loss_type,
            beta=beta,
            epsilon_low=low,
            epsilon_high=settings.pop("epsilon_high", low),
            importance_sampling_level=level,
            max_completion_length=settings.pop("max_completion_length", UNITS),
            current_gradient_accumulation_steps=settings.pop("accumulation", 1),
            off_policy_mask_threshold=settings.pop("threshold", None),
            top_entropy_quantile=1.0,
            use_vllm=bool(more),
            vllm_importance_sampling_correction=True,
            _entropy_bonus_enabled=False,
            get_gamma_weights=GRPOTrainer.get_gamma_weights,
            get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
            _get_per_token_logps_and_entropies=lambda *a, **k: (self.theta, torch.zeros_like(self.theta), None),
        )
        assert not settings
        return cls._compute_loss(stub, None, self.inputs(units, **more)), stub._metrics["train"]

    def scores(self, **more):
        return Scores.tokens(self.theta, self.ref, self.old, mask=self.mask, **more)

    def groups(self):
        index = torch.arange(len(self.mask))
        return Groups(index=index, group=index // 4, reward=self.advantage, advantage=self.advantage)

    def ours(self, name, scores=None, **settings):
        return losses.find(name)(**settings)(scores or self.scores(), self.groups())


@DTYPES
@pytest.mark.parametrize("divergence", ["none", "k3", "k3 uncorrected"])
@pytest.mark.parametrize("old", [True, False], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("name", GRPO_TYPES)
def test_grpo_loss_types(name, old, divergence, dtype):
    loss_type, theirs, mine = GRPO_TYPES[name]
    beta, corrected = (0.0 if divergence == "none" else 0.04), divergence != "k3 uncorrected"
    batch = Batch(len(name), dtype, old=old)
    trl, _ = batch.trl(loss_type, beta=beta, corrected=corrected, **theirs)
    ours = batch.ours(name, beta=beta, use_bias_correction_kl=corrected, **mine)
    assert_parity(trl, ours.loss, batch.theta, TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_gmpo(beta, dtype):
    batch = Batch(20, dtype)
    trl, _ = batch.trl("grpo", cls=GMPOTrainer, beta=beta, epsilon=0.2, epsilon_high=0.3)
    ours = batch.ours("gmpo", beta=beta, epsilon=0.2, epsilon_high=0.3)
    assert_parity(trl, ours.loss, batch.theta, TOLERANCE[dtype])


@DTYPES
def test_sapo_temperatures(dtype):
    batch = Batch(21, dtype)
    ours = batch.ours("sapo", sapo_temperature_pos=0.7, sapo_temperature_neg=2.0)
    assert_parity(batch.trl("sapo", temperatures=(0.7, 2.0))[0], ours.loss, batch.theta, TOLERANCE[dtype])


@DTYPES
def test_two_sided_clipping(dtype):
    batch = Batch(22, dtype)
    trl, _ = batch.trl("grpo", delta=1.3)
    assert_parity(trl, batch.ours("grpo", delta=1.3).loss, batch.theta, TOLERANCE[dtype])


@DTYPES
def test_off_policy_masking(dtype):
    batch = Batch(23, dtype)
    trl, _ = batch.trl("grpo", threshold=0.02, beta=0.04)
    ours = batch.ours("grpo", off_policy_mask_threshold=0.02, beta=0.04)
    assert_parity(trl, ours.loss, batch.theta, TOLERANCE[dtype])
    assert (ours.per_item != batch.ours("grpo", beta=0.04).per_item).any(), "the threshold drops nothing"


@DTYPES
@pytest.mark.parametrize("name", ["grpo", "dapo", "cispo"])
def test_weights_per_token(name, dtype):
    """Importance weights between the sampling and the training engine multiply the surrogate alone."""
    loss_type, theirs, mine = GRPO_TYPES[name]
    batch = Batch(24, dtype)
    trl, _ = batch.trl(loss_type, beta=0.04, inputs={"importance_sampling_ratio": batch.weight}, **theirs)
    ours = batch.ours(name, scores=batch.scores(weight=batch.weight), beta=0.04, **mine)
    assert_parity(trl, ours.loss, batch.theta, TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("name", ["dapo", "cispo", "vespo"])
def test_token_mean_over_a_whole_step(name, dtype):
    """Two micro-batches of one step: both sides divide by the tokens of the step."""
    loss_type, theirs, mine = GRPO_TYPES[name]
    first, second = Batch(25, dtype), Batch(26, dtype)
    units = float(first.mask.sum() + second.mask.sum())
    totals = Totals(items=2 * ROWS, units=units)
    for batch in (first, second):
        trl, _ = batch.trl(loss_type, units=units, accumulation=2, steps=2, **theirs)
        ours = batch.ours(name, scores=batch.scores(totals=totals), **mine)
        # the trainer's mean over the rows of the step
        assert_parity(trl, ours.per_item.sum() / (2 * ROWS), batch.theta, TOLERANCE[dtype])


def test_metrics_agree():
    batch = Batch(27, torch.float32)
    _, trl = batch.trl("grpo", beta=0.04, corrected=False)
    ours = batch.ours("grpo", beta=0.04, use_bias_correction_kl=False).metrics
    assert ours["clip_frac/low"].mean().item() == pytest.approx(trl["clip_ratio/low_mean"][0])
    assert ours["clip_frac/high"].mean().item() == pytest.approx(trl["clip_ratio/high_mean"][0])
    assert ours["kl"].mean().item() == pytest.approx(trl["kl"][0], rel=1e-5)
    assert trl["clip_ratio/region_mean"][0] > 0
    _, trl = batch.trl("cispo", epsilon_high=1.1)
    assert batch.ours("cispo", epsilon_high=1.1).metrics["clip_frac/high"].mean().item() == pytest.approx(
        trl["cispo_clip_ratio"][0]
    )


def test_trl_default_of_cispo_is_an_absolute_cap():
    """TRL's epsilon_high falls back to 0.2, which scales every weight to at most 0.2; ours is ScaleRL's 5."""
    batch = Batch(28, torch.float32, old=False)
    trl, _ = batch.trl("cispo")
    torch.testing.assert_close(trl, 0.2 * batch.ours("cispo").loss)


# -- RLOO, A*-PO -------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_rloo(beta, dtype):
    """Reward, leave-one-out advantage with the KL in it, and the clipped sequence ratio."""
    batch = Batch(30, dtype)
    batch.old = token_logps(batch.mask, 31, dtype, near=batch.theta, spread=0.1)
    reward = torch.randn(ROWS, 1, generator=torch.Generator().manual_seed(32), dtype=torch.float64).to(dtype)
    scope = run_rloo_advantages(reward, beta=beta, batch=batch)
    stub = trainer(
        epsilon_low=0.2,
        epsilon_high=0.2,
        _get_per_token_logps_and_entropies=lambda *a, **k: (batch.theta, torch.zeros_like(batch.theta), None),
    )
    inputs = batch.inputs() | {"advantages": scope["advantages"], "old_logps": batch.old.sum(1)}
    trl = RLOOTrainer._compute_loss(stub, None, inputs)
    index = torch.arange(ROWS)
    ours = losses.find("rloo")(beta=beta)(batch.scores(), Groups(index=index, group=index // 4, reward=reward))
    assert_parity(trl, ours.loss, batch.theta, TOLERANCE[dtype])
    assert ours.metrics["clip_frac/low"].mean().item() == pytest.approx(
        stub._metrics["train"]["clip_ratio/low_mean"][0]
    )


def run_rloo_advantages(reward, *, beta=0.0, batch=None, normalize=False, clip=None, per_group=4):
    stub = SimpleNamespace(
        reward_weights=torch.ones(reward.shape[1], dtype=reward.dtype),
        reward_clip_range=clip,
        beta=beta,
        normalize_advantages=normalize,
    )
    names = {"self": stub, "rewards_per_func": reward, "num_generations": per_group, "device": "cpu"}
    if batch is not None:
        names |= {
            "old_per_token_logps": batch.old,
            "ref_per_token_logps": batch.ref,
            "completion_mask": batch.mask,
            "gather": lambda x: x,
        }
    method = RLOOTrainer._generate_and_score_completions
    return run_statements(method, "unscorable_mask =", "advantages = torch.nan_to_num", names)


@DOUBLE
@pytest.mark.parametrize(("normalize", "clip"), [(False, None), (True, None), (False, (-0.5, 0.5))])
def test_rloo_advantages(normalize, clip, dtype):
    reward = random_rewards(2)
    scope = run_rloo_advantages(reward, normalize=normalize, clip=clip)
    objective = losses.find("rloo")(beta=0.0, normalize_advantages=normalize, reward_clip_range=clip)
    scores = Scores.tokens(torch.zeros(ROWS, dtype=torch.float64))
    index = torch.arange(ROWS)
    ours = objective.advantage(scores, Groups(index=index, group=index // 4, reward=reward))
    torch.testing.assert_close(ours, scope["advantages"], rtol=1e-9, atol=1e-12)


@DTYPES
def test_a2po(dtype):
    batch = Batch(33, dtype)
    reward = (batch.advantage > 0).to(dtype)
    v_star = torch.rand(ROWS, generator=torch.Generator().manual_seed(34), dtype=torch.float64).to(dtype)
    stub = trainer(
        args=SimpleNamespace(beta2=0.25),
        _get_sequence_logps=lambda *a: (batch.theta * batch.mask).sum(1),
    )
    inputs = {"input_ids": None, "attention_mask": None, "logits_to_keep": 0}
    inputs |= {"ref_logps": batch.ref.sum(1), "rewards": reward, "v_star": v_star}
    trl = A2POTrainer.compute_loss(stub, None, inputs)
    index = torch.arange(ROWS)
    scores = batch.scores(extra={"v_star": v_star})
    ours = losses.find("a2po")(beta=0.25)(scores, Groups(index=index, group=index, reward=reward))
    assert_parity(trl, ours.loss, batch.theta, TOLERANCE[dtype])


def test_optimal_value():
    """The one line of TRL's first stage that computes V*."""
    reward = (random_rewards(1)[:, 0].nan_to_num(0.0) > 0).double()
    expected = 0.5 * (torch.logsumexp(reward.view(2, 4) / 0.5, dim=1) - math.log(4))
    got = optimal_value(reward, torch.arange(ROWS) // 4, beta=0.5)
    torch.testing.assert_close(got, expected.repeat_interleave(4))


# -- advantages --------------------------------------------------------------------------------------------------------


def random_rewards(columns, seed=0, missing=True):
    """Rewards of two groups of four, some missing, one row without any."""
    reward = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if missing:
        reward[1] = float("nan")
        reward[6, 0] = float("nan")
    return reward


def run_grpo_advantages(reward, weights, scale, aggregate):
    """TRL's own statements."""
    stub = SimpleNamespace(
        reward_weights=torch.tensor(weights, dtype=reward.dtype),
        reward_funcs=weights,
        scale_rewards=scale,
        multi_objective_aggregation=aggregate,
    )
    names = {"self": stub, "rewards_per_func": reward, "num_generations": 4, "device": "cpu"}
    method = GRPOTrainer._generate_and_score_completions
    return run_statements(method, "unscorable_mask =", "advantages = torch.nan_to_num", names)


@DOUBLE
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.5)])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_advantages(scale, weights, missing, dtype):
    reward = random_rewards(len(weights), missing=missing)
    scope = run_grpo_advantages(reward, weights, scale, "sum_then_normalize")
    ours = advantages(reward, torch.arange(ROWS) // 4, weight=weights, scale=scale)
    torch.testing.assert_close(ours, scope["advantages"], rtol=1e-9, atol=1e-12)


@DOUBLE
@pytest.mark.parametrize("missing", [False, True])
def test_gdpo_advantages(missing, dtype):
    reward = random_rewards(2, seed=1, missing=missing)
    scope = run_grpo_advantages(reward, (1.0, 0.5), "group", "normalize_then_sum")
    ours = advantages(reward, torch.arange(ROWS) // 4, weight=(1.0, 0.5), aggregate="normalize_then_sum")
    torch.testing.assert_close(ours, scope["advantages"], rtol=1e-9, atol=1e-12)
