"""Alarms come when they should, once, and stay silent on a healthy run; timestep bins add up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from diffalign.errors import UserError
from diffalign.health import (
    LOG2,
    Alarm,
    BinAccumulator,
    Monitor,
    NonFiniteLossError,
    OffPolicyError,
    require_finite,
    require_on_policy,
)


def healthy(step: int) -> dict[str, float]:
    """A row of a run that learns: margins grow, the chosen error falls a little."""
    noise = np.random.default_rng(step).normal(size=4)
    progress = step / 200
    start = 0.0 if step == 0 else 1.0
    return {
        "step": step,
        "loss": LOG2 - start * (0.1 * progress + 0.02 * noise[0]),
        "implicit_acc": 0.5 + start * (0.2 * progress + 0.05 * noise[1]),
        "rewards/margins": start * (0.3 * progress + 0.1 * noise[2]),
        "logits/std": start * 0.4,
        "error/chosen": 0.2 - 0.001 * progress + 0.02 * noise[3],
        "error/chosen_ref": 0.2 + 0.02 * noise[3],
        "error/rejected": 0.2 + 0.001 * progress,
        "error/rejected_ref": 0.2,
        "grad_norm": 0.5 + 0.1 * abs(noise[0]),
        "learning_rate": 1e-4 * min(1, step / 5),
        "pairs_per_second": 10 + noise[1],
    }


def run(change: Callable[[int, dict[str, float]], dict[str, float]], steps: int = 200) -> list[Alarm]:
    monitor = Monitor()
    for step in range(steps):
        row = healthy(step)
        monitor.update(row | change(step, row))
    return monitor.alarms


def test_a_healthy_run_is_silent() -> None:
    assert run(lambda step, row: {}) == []


def test_each_alarm_names_step_and_what_to_do() -> None:
    alarms = run(lambda step, row: {"learning_rate": 0.0})
    assert [(a.code, a.step) for a in alarms] == [("not_learning", 9)]
    assert "training.learning_rate" in alarms[0].message
    assert alarms[0].row() == {
        "step": 9,
        "alarm": "not_learning",
        "level": "alarm",
        "message": alarms[0].message,
    }


def test_zero_gradients_point_at_the_adapters() -> None:
    (alarm,) = run(lambda step, row: {"grad_norm": 0.0, "loss": LOG2, "logits/std": 0.0, "rewards/margins": 0.0})
    assert alarm.code == "not_learning"
    assert "adapters are not attached" in alarm.message


def test_flat_loss_with_gradients_is_seen() -> None:
    (alarm,) = run(lambda step, row: {"loss": LOG2 + 5e-5, "logits/std": 1e-8, "rewards/margins": 0.0})
    assert "log 2" in alarm.message


def test_other_links_have_their_own_flat_loss() -> None:
    monitor = Monitor(initial_loss=1.0)  # hinge
    for step in range(30):
        monitor.update(healthy(step) | {"loss": 1.0, "logits/std": 0.0})
    assert [a.code for a in monitor.alarms] == ["not_learning"]


def test_a_noisy_loss_around_log_2_is_normal() -> None:
    """Early preference training looks flat for hundreds of steps; only an exactly dead one is an alarm."""
    wobble = np.random.default_rng(0).normal(0, 0.005, 200)
    change = lambda step, row: {"loss": LOG2 + (wobble[step] if step else 0.0), "rewards/margins": 0.0}  # noqa: E731
    assert run(change) == []


def test_warm_up_from_zero_is_normal() -> None:
    assert run(lambda step, row: {"learning_rate": 1e-6 * step}) == []


@pytest.mark.parametrize("first", [{"loss": 0.70}, {"loss": LOG2, "logits/std": 0.5}])
def test_first_step_off_log_2_means_reference_is_not_the_policy(first: dict[str, float]) -> None:
    (alarm,) = run(lambda step, row: first if step == 0 else {})
    assert (alarm.code, alarm.step) == ("first_loss", 0)


def test_the_first_ratio_is_one() -> None:
    for ratio, codes in ((1.0004, []), (1.004, ["first_ratio"]), (0.98, ["first_ratio"])):
        row = {"step": 1, "loss": 0.3, "ratio": ratio}
        assert [alarm.code for alarm in Monitor(initial_loss=None).update(row)] == codes
        assert not Monitor(initial_loss=None, fresh=False).update(row)
        require_on_policy(row)
    require_on_policy({"loss": 0.3})
    for ratio in (1.2, 0.9, float("nan")):
        with pytest.raises(OffPolicyError, match="Nothing was kept"):
            require_on_policy({"ratio": ratio})


def test_first_loss_is_not_judged_on_resume_or_without_an_expectation() -> None:
    for monitor in (Monitor(initial_loss=None), Monitor(fresh=False)):
        assert monitor.update(healthy(100) | {"loss": 0.3}) == []


def test_winner_error_and_displacement_are_told_apart() -> None:
    mild = run(lambda step, row: {"error/chosen": row["error/chosen_ref"] * 1.05, "implicit_acc": 0.7})
    assert [(a.code, a.level) for a in mild] == [("displacement", "notice")]
    bad = run(lambda step, row: {"error/chosen": row["error/chosen_ref"] * (1 + step / 400)})
    assert [a.code for a in bad] == ["displacement", "winner_error"]
    assert 80 < bad[1].step < 140  # 1.2 is reached at 80; smoothing lags behind


def test_rising_rejected_error_alone_is_what_training_is_for() -> None:
    assert run(lambda step, row: {"error/rejected": 0.4}) == []


def test_one_bad_batch_does_not_raise_the_winner_error() -> None:
    assert run(lambda step, row: {"error/chosen": 0.6} if step == 100 else {}, steps=101) == []


def test_margin_explosion_in_either_direction() -> None:
    for sign in (1, -1):
        alarms = run(lambda step, row, s=sign: {"rewards/margins": s * step / 5.0})
        assert [a.code for a in alarms] == ["margin"]
        assert 50 < alarms[0].step < 100
    assert run(lambda step, row: {"rewards/margins": 9.0 if step else 0.0}) == []


def test_saturation_needs_both_accuracy_and_rising_error() -> None:
    def worse(step: int, row: dict[str, float]) -> dict[str, float]:
        return {"implicit_acc": 0.99, "error/chosen": row["error/chosen_ref"] * 1.01}

    assert [a.code for a in run(worse)] == ["saturated"]
    assert run(lambda step, row: {"implicit_acc": 0.99}) == []


def test_gradient_spikes_are_raised_again_after_recovery_only() -> None:
    alarms = run(lambda step, row: {"grad_norm": 50.0} if step in (60, 62, 150) else {})
    assert [(a.code, a.step) for a in alarms] == [("grad_spike", 60), ("grad_spike", 150)]


def test_loss_scale_and_throughput() -> None:
    alarms = run(lambda step, row: {"loss_scale": 2.0 ** (10 - step / 10), "pairs_per_second": 10 if step < 120 else 3})
    assert [(a.code, a.step) for a in alarms] == [("loss_scale", 101), ("slow", 130)]


# --- texts -----------------------------------------------------------------------------------------------------------


def preferences(step: int) -> dict[str, float]:
    """A healthy row of preference training on texts."""
    noise = np.random.default_rng(step).normal(size=3)
    progress = 0.0 if step == 0 else step / 200
    return {
        "step": step,
        "loss": LOG2 - 0.1 * progress,
        "implicit_acc": 0.5 + 0.3 * progress,
        "rewards/chosen": 0.2 * progress + 0.01 * noise[0] * (step > 0),
        "rewards/rejected": -0.2 * progress,
        "rewards/margins": 0.4 * progress,
        "logits/std": 0.2 * (step > 0),
        "logps/chosen": -40 + 5 * noise[1],
        "grad_norm": 1.0,
        "samples_per_second": 20.0,
    }


def sampled(step: int) -> dict[str, float]:
    """A healthy row of online training: the reward rises, half of the groups have contrast."""
    noise = np.random.default_rng(step).normal(size=4)
    return {
        "step": step,
        "loss": 0.01 * noise[0],
        "reward": 0.3 + step / 500 + 0.05 * noise[1],
        "frac_zero_std": 0.5,
        "length": 30 + 2 * noise[2],
        "finished": 0.95,
        "entropy": 1.0 - step / 500 + 0.05 * noise[3],
        "kl": 0.05,
        "ratio": 1.0,
        "grad_norm": 1.0,
    }


Row = dict[str, float]


def text_alarms(row: Callable[[int], Row], change: Callable[[int], Row], **monitor: Any) -> list[str]:
    watch = Monitor(initial_loss=None, **monitor)
    for step in range(150):
        watch.update(row(step) | change(step))
    return [alarm.code for alarm in watch.alarms]


def test_healthy_text_runs_are_silent() -> None:
    for row in (preferences, sampled):
        assert text_alarms(row, lambda step: {}) == []


@pytest.mark.parametrize(
    ("row", "change", "codes"),
    [
        (preferences, lambda step: {"rewards/chosen": -step / 500}, ["likelihood_displacement"]),
        (preferences, lambda step: {"rewards/chosen": -step / 50}, ["likelihood_displacement", "chosen_falls"]),
        (preferences, lambda step: {"rewards/chosen": -step / 50, "implicit_acc": 0.5}, ["chosen_falls"]),
        (preferences, lambda step: {"samples_per_second": 20.0 if step < 100 else 5.0}, ["slow"]),
        (sampled, lambda step: {"frac_zero_std": 0.95}, ["no_contrast"]),
        (sampled, lambda step: {"frac_zero_std": 1.0, "grad_norm": 0.0, "loss": 0.0}, ["no_contrast"]),
        (sampled, lambda step: {"reward": 0.3 - step / 500}, ["reward_falls"]),
        (sampled, lambda step: {"reward": 0.3 + (0.2 if step % 2 else -0.2)}, []),
        (sampled, lambda step: {"length": 30 + step}, ["length"]),
        (sampled, lambda step: {"length": 4 + step / 15}, []),
        (sampled, lambda step: {"finished": 0.4}, ["unfinished"]),
        (sampled, lambda step: {"finished": 1.0 - step / 300}, ["unfinished"]),
        (sampled, lambda step: {"kl": step / 100}, ["kl"]),
        (sampled, lambda step: {"entropy": math.exp(-step / 30)}, ["entropy"]),
    ],
)
def test_text_alarms(row: Callable[[int], Row], change: Callable[[int], Row], codes: list[str]) -> None:
    assert text_alarms(row, change) == codes


def test_implicit_rewards_without_a_reference_are_no_fall() -> None:
    fallen = lambda step: {"rewards/chosen": -3.0}  # noqa: E731
    assert text_alarms(preferences, fallen) == ["chosen_falls", "likelihood_displacement"]
    assert text_alarms(preferences, fallen, reference=False) == []


def test_a_kl_that_is_not_per_token_is_not_judged() -> None:
    watch = Monitor(initial_loss=None)
    for step in range(40):
        watch.update({"step": step, "loss": 0.0, "kl": 8.0})
    assert watch.alarms == []


def test_pairs_of_sampled_answers_without_contrast() -> None:
    watch = Monitor()
    for step in range(40):
        watch.update({"step": step, "loss": 0.0, "weight": 0.0, "reward/best": 1.0, "grad_norm": 0.0})
    assert [alarm.code for alarm in watch.alarms] == ["no_contrast"]


def test_the_first_loss_is_compared_with_weights() -> None:
    for loss, codes in ((0.25 * LOG2, []), (LOG2, ["first_loss"])):
        watch = Monitor()
        watch.update({"step": 0, "loss": loss, "weight": 0.25, "logits/std": 0.0})
        assert [alarm.code for alarm in watch.alarms] == codes


def test_a_loss_of_unpaired_training_that_does_not_move() -> None:
    for reward, codes in ((0.0, ["not_learning"]), (0.1, [])):
        watch = Monitor(initial_loss=0.5)
        for step in range(20):
            watch.update({"step": step, "loss": 0.5, "rewards/desirable": reward, "rewards/undesirable": 0.0})
        assert [alarm.code for alarm in watch.alarms] == codes


def test_what_is_to_be_retained_is_watched() -> None:
    def alarms(start: float, fall: float) -> list[str]:
        watch = Monitor(initial_loss=None)
        for step in range(60):
            watch.update({"step": step, "loss": 1.0, "logps/retain": start - fall * step, "logps/forget": -step})
        return [alarm.code for alarm in watch.alarms]

    assert alarms(-0.1, 0.0) == alarms(-40.0, 0.1) == []
    assert alarms(-0.1, 0.1) == alarms(-40.0, 1.0) == ["retain_lost"]


def test_non_finite_metrics_and_missing_ones_are_ignored() -> None:
    assert run(lambda step, row: {"grad_norm": math.inf} if step % 7 == 0 else {}) == []
    monitor = Monitor(initial_loss=None)
    for step in range(50):  # winners-only training has a loss and little else
        monitor.update({"step": step, "loss": 0.2, "grad_norm": 1.0, "learning_rate": 1e-4})
    assert monitor.alarms == []


def test_non_finite_loss_names_samples_and_checkpoint() -> None:
    require_finite(3, ["a", "b"], torch.tensor([0.1, 0.2]))
    losses = torch.tensor([0.1, math.nan, math.inf], requires_grad=True)
    with pytest.raises(NonFiniteLossError, match=r"step 7 in sample b \(nan\), c \(inf\).*checkpoint-5") as caught:
        require_finite(7, ["a", "b", "c"], losses, checkpoint="out/checkpoint-5")
    assert caught.value.sample_ids == ["b", "c"]
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)


def test_non_finite_losses_of_items_name_their_sample() -> None:
    both_sides = torch.tensor([0.1, 0.2, 0.3, math.nan])
    with pytest.raises(NonFiniteLossError, match=r"in sample b \(nan\)"):
        require_finite(1, ["a", "b"], both_sides)
    with pytest.raises(NonFiniteLossError, match=r"in sample a or b or c \(nan\)"):
        require_finite(1, ["a", "b", "c"], torch.tensor([0.1, math.nan]))


def test_bins_are_equal_and_hold_their_edges() -> None:
    bins = BinAccumulator(["x"], num_timesteps=1000)
    bins.add(torch.tensor([0, 249, 250, 999]), {"x": torch.tensor([1.0, 3.0, 5.0, 7.0])})
    assert bins.by_bin() == {"t0/x": 2.0, "t0/count": 2, "t1/x": 5.0, "t1/count": 1, "t3/x": 7.0, "t3/count": 1}
    assert bins.means() == {"x": 4.0}


def test_continuous_time_bins() -> None:
    bins = BinAccumulator(["x"], num_timesteps=1.0, bins=2)
    bins.add(torch.tensor([0.0, 0.49, 0.5, 1.0]), {"x": torch.arange(4.0)})
    assert (bins.by_bin()["t0/x"], bins.by_bin()["t1/x"]) == (0.5, 2.5)


def test_weighted_mean_counts_samples() -> None:
    bins = BinAccumulator(["x"], bins=1)
    bins.add(torch.tensor([1, 2]), {"x": torch.tensor([1.0, 4.0])}, weight=torch.tensor([3.0, 1.0]))
    assert bins.by_bin() == {"t0/x": 1.75, "t0/count": 2}


def test_micro_batches_and_ranks_merge_to_the_whole_batch() -> None:
    torch.manual_seed(0)
    t, x, y, w = torch.randint(0, 1000, (12,)), torch.randn(12), torch.randn(12), torch.rand(12)
    whole, left, right = (BinAccumulator(["x", "y"]) for _ in range(3))
    whole.add(t, {"x": x, "y": y}, w)
    left.add(t[:3], {"x": x[:3], "y": y[:3]}, w[:3])
    left.add(t[3:8], {"y": y[3:8], "x": x[3:8]}, w[3:8])
    right.add(t[8:], {"x": x[8:], "y": y[8:]}, w[8:])
    left.merge(right.sums)
    assert left.by_bin() == pytest.approx(whole.by_bin())
    assert left.means()["y"] == pytest.approx(float((w * y).sum() / w.sum()))
    left.reset()
    assert left.by_bin() == {}
    assert left.means() == {}


def test_accumulator_refuses_other_metrics_and_keeps_no_graph() -> None:
    bins = BinAccumulator(["x"])
    with pytest.raises(ValueError, match="expected \\['x'\\]"):
        bins.add(torch.tensor([1]), {"y": torch.tensor([1.0])})
    bins.add(torch.tensor([1]), {"x": torch.ones(1, requires_grad=True)})
    assert not bins.sums.requires_grad
