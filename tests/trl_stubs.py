"""Runs the loss methods of TRL's trainers on tensors, without a model, a data set or a trainer.

Every trainer computes its loss in one method that reads a few attributes of itself and of a model's output. Called unbound
on an object that has just those, it is an independent implementation to compare with. Written for trl 1.16.0.

Shapes: P pairs, N rows, U response tokens.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

PROMPT = 2  # tokens of every prompt


# TRL loss_type -> (our name, our settings, TRL settings)
LOSS_TYPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ("dpo", {}, {}),
    "hinge": ("hinge", {}, {}),
    "ipo": ("ipo", {}, {}),
    "exo_pair": ("exo", {"label_smoothing": 0.125}, {"label_smoothing": 0.125}),
    "nca_pair": ("nca", {}, {}),
    "robust": ("robust_dpo", {"label_noise": 0.1}, {"label_smoothing": 0.1}),
    "bco_pair": ("bco_pair", {}, {}),
    "sppo_hard": ("sppo", {"halve": False, "win_rate": "hard"}, {}),
    "aot": ("aot", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    "aot_unpaired": ("aot_unpaired", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    "apo_zero": ("apo_zero", {}, {}),
    "apo_down": ("apo_down", {}, {}),
    "discopop": ("discopop", {"tau": 0.3}, {"tau": 0.3}),
    "sft": ("mixed", {"losses": ("sft",), "weights": (1.0,)}, {}),
    "sigmoid_norm": ("dpo_norm", {}, {}),
}

# our name -> (TRL loss_type, TRL settings, our settings)
GRPO_TYPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "grpo": ("grpo", {}, {"epsilon_high": 0.2}),
    "bnpo": ("bnpo", {}, {"epsilon_high": 0.2}),
    "dr_grpo": ("dr_grpo", {"max_completion_length": 9}, {"epsilon_high": 0.2, "max_completion_length": 9}),
    "dapo": ("dapo", {"epsilon_high": 0.28}, {}),
    "gspo": ("grpo", {"level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}, {}),
    "luspo": (
        "luspo",
        {"level": "sequence", "epsilon": 3e-2, "epsilon_high": 4e-2},
        {"epsilon": 3e-2, "epsilon_high": 4e-2},
    ),
    "cispo": ("cispo", {"epsilon_high": 1.1}, {"epsilon_high": 1.1}),
    "sapo": ("sapo", {}, {}),
    "vespo": ("vespo", {}, {}),
}


class Accelerator:
    """One process."""

    device = torch.device("cpu")
    num_processes = 1
    process_index = 0
    sync_gradients = True

    def gather(self, x: Any) -> Any:
        return x

    gather_for_metrics = gather
    unwrap_model = gather

    def reduce(self, x: Tensor, reduction: str = "sum") -> Tensor:
        return x


class Model(torch.nn.Module):
    """Returns the same output whatever the input."""

    is_gradient_checkpointing = False

    def __init__(self, **output: Any) -> None:
        super().__init__()
        self.output = SimpleNamespace(**output)

    def forward(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
        return self.output


def trainer(**attributes: Any) -> SimpleNamespace:
    """What all trainers read."""
    common = {
        "accelerator": Accelerator(),
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "is_encoder_decoder": False,
    }
    return SimpleNamespace(**common | {"model": Model()} | attributes)


# -- random batches ----------------------------------------------------------------------------------------------------


def ragged_mask(n: int, u: int, seed: int) -> Tensor:
    """bool (N, U), lengths 1 to U, the first of them U."""
    length = torch.randint(1, u + 1, (n,), generator=torch.Generator().manual_seed(seed))
    length[0] = u
    return torch.arange(u) < length[:, None]


def token_logps(mask: Tensor, seed: int, dtype: torch.dtype, near: Tensor | None = None, spread: float = 0.4) -> Tensor:
    """Random log-probabilities per token, 0 where masked; `near` others or between -2 and 0."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.rand(mask.shape, generator=g, dtype=torch.float64)
    x = -0.05 - 2 * noise if near is None else near.detach().double() + spread * (2 * noise - 1)
    return x.clamp(max=-1e-3).masked_fill(~mask, 0.0).to(dtype)


def after_prompt(x: Tensor) -> Tensor:
    """(N, U) as TRL has it after the shift by one: PROMPT - 1 zeros first."""
    return torch.cat([x.new_zeros(len(x), PROMPT - 1), x], 1)


def sequence_inputs(mask: Tensor) -> dict[str, Tensor]:
    """Token ids and masks of prompts and responses in one row."""
    completion = torch.cat([torch.zeros(len(mask), PROMPT, dtype=torch.long), mask.long()], 1)
    attention = torch.cat([torch.ones(len(mask), PROMPT, dtype=torch.long), mask.long()], 1)
    return {"input_ids": torch.ones_like(completion), "attention_mask": attention, "completion_mask": completion}


def model_output(theta: Tensor, mask: Tensor, log_sum_p2: Tensor | None = None) -> dict[str, Tensor]:
    """What TRL's patched forward returns per token: 0 without gradient where there is no label."""
    x = after_prompt(theta.masked_fill(~mask, 0.0))
    blank = torch.zeros_like(x.detach())
    p2 = blank if log_sum_p2 is None else after_prompt(log_sum_p2)
    return {
        "log_probs": x,
        "entropy": blank,
        "mean_logits": blank,
        "is_top1": blank.bool(),
        "log_sum_sq_probs": p2,
    }


# -- comparison --------------------------------------------------------------------------------------------------------


def assert_parity(theirs: Tensor, ours: Tensor, leaf: Tensor, rtol: float) -> None:
    """Equal values and gradients: the largest difference within `rtol` of the largest value."""
    (one,) = torch.autograd.grad(theirs, leaf, retain_graph=True)
    (other,) = torch.autograd.grad(ours, leaf, retain_graph=True)
    assert one.abs().max() > 0, "TRL's loss has no gradient; the batch tests nothing"
    for expected, got in ((theirs, ours), (one, other)):
        expected, got = expected.detach().double(), got.detach().double()
        scale = expected.abs().max().clamp(min=1e-3)
        assert torch.isfinite(got).all()
        assert (got - expected).abs().max() <= rtol * scale, f"{got} differs from TRL's {expected}"


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["f32", "f64"], indirect=True)
SINGLE = pytest.mark.parametrize("dtype", [torch.float32], ids=["f32"], indirect=True)
DOUBLE = pytest.mark.parametrize("dtype", [torch.float64], ids=["f64"], indirect=True)


# -- parts of long methods ---------------------------------------------------------------------------------------------


def run_statements(method: Any, first: str, last: str, names: dict[str, Any]) -> dict[str, Any]:
    """Runs the statements of a method from the one starting with `first` to the one starting with `last`, and returns names.

    Raises:
        AssertionError: the method has no such statements any more.
    """
    source = textwrap.dedent(inspect.getsource(method))
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    texts = [ast.unparse(node) for node in body]
    begin = next((i for i, text in enumerate(texts) if text.startswith(first)), None)
    assert begin is not None, f"{method.__qualname__} has no statement {first!r}"
    end = next((i for i in range(begin, len(texts)) if texts[i].startswith(last)), None)
    assert end is not None, f"{method.__qualname__} has no statement {last!r} after {first!r}"
    scope = dict(method.__globals__) | names
    exec(compile(ast.Module(body=body[begin : end + 1], type_ignores=[]), method.__qualname__, "exec"), scope)
    return scope
