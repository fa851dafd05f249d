"""The numbers of an objective that are printed, planned, and stored with every checkpoint and adapter."""

from __future__ import annotations

from diffalign.config import RunConfig
from diffalign.losses import Kind, Objective


def objective_summary(
    config: RunConfig, kind: Kind = Kind.BOUND, elements: int | None = None
) -> dict[str, float | str]:
    """The objective's settings with the beta in use, and on denoising errors what that beta means.

    Args:
        config: of the run.
        kind: of the scores.
        elements: C*h*w of one latent, for beta on the summed error.
    """
    objective: Objective = config.objective
    numbers = objective.summary()
    if config.negative.train is not None:
        numbers["negative"] = config.negative.train
    if "beta" in objective.__dataclass_fields__ and kind in objective.default_beta:
        numbers["beta"] = objective.beta_for(kind)
    if kind is not Kind.BOUND:
        return numbers
    reduction = config.denoising.error_reduction
    numbers |= {"error_reduction": reduction, "error_factor": 0.5, "error_space": config.denoising.error_space}
    beta = numbers.get("beta")
    if isinstance(beta, (int, float)):
        numbers["beta_without_half"] = beta / 2
        if elements:
            numbers["beta_on_summed_error"] = beta * (1 / (2 * elements) if reduction == "mean" else 0.5)
    return numbers


def images_per_pair(objective: Objective) -> int:
    """How many images of a pair go through the network: both, or one where only one label is read."""
    return 1 if "pairs" not in objective.needs.layout and len(objective.needs.labels) == 1 else 2
