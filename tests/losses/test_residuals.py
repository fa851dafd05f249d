"""What only denoising scores have: prediction errors element by element, noise levels, weights of locations."""

import pytest
import torch

from diffalign.losses import Kind, Objective, Pairs, Scores
from diffalign.losses.base import Needs, needs
from diffalign.losses.scores import CAPABILITIES, Cap, mean_square


def residual(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_the_error_is_the_mean_of_the_squared_residual_and_the_score_minus_half_of_it():
    r, ref = residual(4, 3, 2, 2).requires_grad_(), residual(4, 3, 2, 2) + 1
    scores = Scores.residuals(r, ref)
    plain = torch.stack([(x * x).sum() / 12 for x in r])
    torch.testing.assert_close(scores.error, plain)
    torch.testing.assert_close(scores.theta, -plain / 2)
    torch.testing.assert_close(scores.imitation, plain)
    torch.testing.assert_close(scores.ref, -torch.stack([(x * x).mean() for x in ref]) / 2)
    assert scores.residual.requires_grad
    assert Scores.residuals(r).ref is None


def test_half_precision_is_lifted_before_it_is_squared():
    r = residual(2, 4, 8, 8, dtype=torch.float32).half()
    scores = Scores.residuals(r)
    assert scores.residual.dtype == scores.error.dtype == torch.float32
    torch.testing.assert_close(scores.error, r.double().square().flatten(1).mean(1).float())


def test_videos_and_tokens_have_residuals_of_their_own_shape():
    for shape in ((2, 4, 3, 2, 2), (2, 16, 8)):
        assert mean_square(residual(*shape)).shape == (2,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"residual": torch.zeros(3, 4)}, r"scores.residual has shape \(3, 4\); expected \(N, \*latent\), N = 2"),
        ({"residual": torch.zeros(2)}, "scores.residual has shape"),
        ({"residual": torch.zeros(2, 4), "ref_residual": torch.zeros(2, 5)}, "scores.ref_residual has shape"),
        ({"ref_residual": torch.zeros(2, 4, requires_grad=True)}, "ref_residual carries gradient"),
        ({"log_snr": torch.zeros(3)}, "scores.log_snr has shape"),
        ({"patch_weight": torch.zeros(2, 4)}, r"scores.patch_weight has shape \(2, 4\); expected \(N, h, w\)"),
        ({"residual": torch.zeros(2, 4, 8, 8), "patch_weight": torch.zeros(2, 4, 4)}, "scores.patch_weight has shape"),
    ],
)
def test_wrong_shapes_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Scores.denoising(torch.zeros(2), **given)


@pytest.mark.parametrize("kind", [Kind.TOKEN, Kind.STEP])
@pytest.mark.parametrize("name", ["residual", "ref_residual", "log_snr", "patch_weight"])
def test_other_kinds_of_score_have_none(kind, name):
    value = torch.zeros(2) if name == "log_snr" else torch.zeros(2, 4, 4)
    with pytest.raises(ValueError, match="belongs to denoising scores"):
        Scores(kind=kind, theta=torch.zeros(2), **{name: value})
    assert Cap.RESIDUAL not in CAPABILITIES[kind]


@pytest.mark.parametrize("name", ["error", "residual", "ref_residual", "log_snr", "patch_weight"])
def test_what_is_missing_is_named(name):
    scores = Scores(kind=Kind.BOUND, theta=torch.zeros(2))
    with pytest.raises(ValueError, match=f"scores.{name} is missing"):
        getattr(scores, f"need_{name}")()


def test_only_denoising_scores_have_residuals():
    assert Cap.RESIDUAL in CAPABILITIES[Kind.BOUND]


def test_needs_and_class_attributes_ask_for_nothing_unless_a_method_says_so():
    assert (Needs().log_snr, Needs().patch_weight) == (False, False)
    assert needs("pairs", log_snr=True, patch_weight=True).log_snr
    assert (Objective.noise, Objective.noising, Objective.source) == ("shared", "forward", "data")


def test_aspects_are_one_per_pair():
    assert Pairs.halves(2).aspect is None
    with pytest.raises(ValueError, match=r"Pairs\.aspect has shape"):
        Pairs.halves(2, aspect=torch.zeros(3, dtype=torch.int64))
