"""The preference core: pure functions of scores, usable without any model.

A score is float32, shape (B,), higher = more likely under the model. For text it is the sum of token log-probabilities;
for denoising models it is minus one half of the mean squared error at a (t, noise) that everything compared shares, so
that `beta` is numerically the published `beta_dpo`. Every loss is a composition

    log-ratio (policy - reference)  ->  contrast (chosen - rejected, times beta)  ->  link  ->  weight  ->  mean

and every function returns per-item values; the caller reduces. Nothing here draws random numbers, runs a model or
talks to other processes. Imports torch only.
"""

from diffalign.losses.links import hinge, logistic, robust_logistic, square
from diffalign.losses.pair import PairLoss, dpo, implicit_reward, log_ratio, pair_logits

__all__ = [
    "PairLoss",
    "dpo",
    "hinge",
    "implicit_reward",
    "log_ratio",
    "logistic",
    "pair_logits",
    "robust_logistic",
    "square",
]
