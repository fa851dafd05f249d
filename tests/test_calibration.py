"""Accuracy with ties and calibration of reward models."""

import numpy as np
import pytest

from diffalign import calibration
from diffalign.calibration import correct, correct_with_ties, fit_temperature, reliability


def test_ties_have_no_right_answer_and_equal_scores_are_half_right():
    found = correct(np.array([2.0, -1.0, 0.0, 3.0, -2.0]), np.array([1.0, 1.0, 1.0, 0.5, 0.0]))
    np.testing.assert_equal(found, [1.0, 0.0, 0.5, np.nan, 1.0])


def test_a_tie_said_of_a_win_is_half_right_and_a_tie_said_of_a_tie_is_right():
    logit, p = np.array([0.1, 0.1, 4.0, 4.0, -4.0]), np.array([0.5, 1.0, 0.5, 1.0, 1.0])
    np.testing.assert_equal(correct_with_ties(logit, p, 0.3), [1.0, 0.5, 0.5, 1.0, 0.0])


def test_the_threshold_is_the_one_with_the_highest_accuracy():
    rng = np.random.default_rng(0)
    p = np.repeat([0.5, 1.0], 200)
    logit = np.where(p == 0.5, rng.normal(0, 0.2, 400), rng.normal(3, 0.5, 400))
    # |2 sigma - 1| is below 0.3 for nearly all ties (|logit| < 0.62), and above 0.6 for the wins.
    assert calibration.best_threshold(logit, p) in (0.3, 0.4, 0.5)


def test_a_calibrated_judge_has_no_error_and_temperature_one():
    rng = np.random.default_rng(1)
    logit = rng.normal(0, 2, 40_000)
    p = (rng.random(40_000) < calibration.sigmoid(logit)).astype(float)
    assert reliability(logit, p).error < 0.01
    assert fit_temperature(logit, p) == pytest.approx(1.0, abs=0.05)
    # The same preferences, told with three times the confidence.
    assert reliability(3 * logit, p).error > 0.1
    assert fit_temperature(3 * logit, p) == pytest.approx(3.0, rel=0.05)
    assert reliability(3 * logit / fit_temperature(3 * logit, p), p).error < 0.01


def test_which_picture_is_called_the_first_does_not_matter():
    rng = np.random.default_rng(2)
    logit, p = rng.normal(0, 2, 500), rng.choice([0.0, 0.5, 1.0], 500)
    one, other = reliability(logit, p), reliability(-logit, 1 - p)
    assert one.error == pytest.approx(other.error)
    assert one.count == other.count


def test_pairs_of_one_prompt_are_averaged_and_ties_left_out():
    values = np.array([1.0, 0.0, 1.0, np.nan])
    np.testing.assert_allclose(calibration.by_prompt(values, ["a", "a", "b", "c"]), [0.5, 1.0])
