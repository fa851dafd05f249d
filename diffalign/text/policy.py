"""The policy and its reference on texts: one network, adapters on or off, turned into token log-probabilities.

Rows are padded on the right, and attention only looks back: what stands behind a row's last token cannot change it, so no
attention mask is handed to the network, which then takes its fastest kernel. With `packing`, rows stand behind each other
in one sequence and their position ids, starting again at zero, keep attention inside a row.

Shapes: N rows, L tokens of the longest row, S tokens of all rows, T scored tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffalign.adapters import adapter_names, adapters_off
from diffalign.config import TextConfig
from diffalign.errors import ConfigError, DataError
from diffalign.losses import Objective, Scores
from diffalign.losses.base import TokenStatistic
from diffalign.references import Reference
from diffalign.text.batch import TextBatch
from diffalign.text.logprobs import check_head, head_of, token_scores

if TYPE_CHECKING:
    from diffalign.families.causal_lm import CausalLM

_REFERENCE = "log p under the reference"  # beside the objective's own statistics, whose names are identifiers


@dataclass(frozen=True)
class _Plan:
    """One forward pass.

    Attributes:
        inputs: of the network's base.
        selected: bool (N, L), the scored tokens.
        places: int64 (T,), where in the flattened output each scored token's predecessor stands.
        labels: int64 (T,).
    """

    inputs: dict[str, Any]
    selected: Tensor
    places: Tensor
    labels: Tensor

    def spread(self, values: Tensor) -> Tensor:
        """(T,) back to (N, L), zero elsewhere."""
        return values.new_zeros(self.selected.shape).masked_scatter(self.selected, values)


class TextPolicy:
    """Scores texts under the policy and under the reference.

    The reference is the same network with its adapters off and without gradient, run before the policy through the same
    kernels in the same types: with a fresh adapter, both agree to the bit.

    Args:
        family: what the network was loaded by.
        network: as prepared for training (possibly wrapped for several processes).
        bare: the same network unwrapped.
        autocast: makes the mixed-precision context, entered for policy and reference alike.
        text: packing and chunk size.
        reference: what the policy is compared with; None: the network with its adapters off.

    Raises:
        ConfigError: the architecture's logits are not understood, or it cannot be packed exactly. Both are tried out on
            a few tokens.
    """

    def __init__(
        self,
        family: CausalLM,
        network: nn.Module,
        bare: nn.Module | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        text: TextConfig | None = None,
        reference: Reference | None = None,
    ) -> None:
        self.reference = reference
        self.family = family
        self.network = network
        self.bare: Any = network if bare is None else bare
        self.autocast = autocast
        self.text = TextConfig() if text is None else text
        self.head = head_of(self.bare)
        with evaluation_mode(self.bare), self.autocast():
            check_head(self.bare, self.head)
            if self.text.packing:
                check_packing(self.bare)

    def scores(self, batch: TextBatch, objective: Objective) -> Scores:
        """Token scores of all rows, with what the objective needs.

        `reads_reference()`, `reads_prompt()` and `vocabulary()` decide what is computed; units are tokens, aligned with
        `batch.input_ids`, (N, L).

        Raises:
            DataError: the objective needs log-probabilities of the sampling model, and the batch has none.
        """
        if objective.needs.old and batch.old is None:
            raise DataError(
                f"objective {objective.name!r} needs the log-probabilities under the model that wrote the responses; this "
                "batch has none. Train it online"
            )
        plan = self._plan(batch, prompt=objective.reads_prompt())
        statistics: dict[str, TokenStatistic] = dict(objective.vocabulary())
        ref, ref_hidden = None, None
        # The reference goes first: adapters must not be switched between the policy's forward and its backward.
        if objective.reads_reference() and not statistics:
            ref = self._reference(plan)
        elif objective.reads_reference():
            ref_hidden = self._reference_hidden(objective, plan)
            statistics[_REFERENCE] = _reference_log_prob
        with self.autocast():
            theta, found = token_scores(
                self._hidden(self.network, plan),
                plan.labels,
                self.head,
                chunk=self.text.logits_chunk,
                statistics=statistics,
                reference=ref_hidden,
            )
        ref = found.pop(_REFERENCE).detach() if _REFERENCE in found else ref
        theta_NL = plan.spread(theta)
        more = self._prompt(theta_NL, plan, batch) if objective.reads_prompt() else {}
        return Scores.tokens(
            theta_NL,
            None if ref is None else plan.spread(ref),
            batch.old,
            mask=batch.response_mask,
            segment=batch.segment,
            vocabulary={name: plan.spread(value).where(batch.response_mask, 0.0) for name, value in found.items()},
            extra=batch.extra,
            totals=batch.totals,
            **more,
        )

    def _parts(self) -> list[tuple[float, AbstractContextManager[None]]]:
        """Weights and contexts of what the reference is mixed of."""
        if self.reference is None:
            return [(1.0, adapters_off(self.bare))]
        return [(weight, self.reference.active(weights)) for weight, weights in self.reference.parts()]

    @torch.no_grad()
    def _reference(self, plan: _Plan) -> Tensor:
        """log p of the scored tokens under the reference, (T,): a geometric mixture where it has parts."""
        total = torch.zeros((), device=plan.labels.device)
        for weight, inside in self._parts():
            with evaluation_mode(self.bare), inside, self.autocast():  # a reference with adapters has no dropout
                hidden = self._hidden(self.bare, plan)
                values, _ = token_scores(hidden, plan.labels, self.head, chunk=self.text.logits_chunk)
            total = total + weight * values
        return total

    @torch.no_grad()
    def _reference_hidden(self, objective: Objective, plan: _Plan) -> Tensor:
        parts = self._parts()
        if len(parts) != 1:
            raise ConfigError(
                f"reference.scheme: objective {objective.name!r} compares whole distributions over the vocabulary, which a "
                "mixture of references does not have here; use scheme 'frozen' or 'sync'"
            )
        with evaluation_mode(self.bare), parts[0][1], self.autocast():
            return self._hidden(self.bare, plan)

    @torch.no_grad()
    def log_probs(self, batch: TextBatch, *, adapters: bool = True) -> Tensor:
        """log p per response token, float32 (N, L), 0 outside of the response, in evaluation mode.

        Args:
            batch: any rows.
            adapters: False scores under the reference.
        """
        plan = self._plan(batch, prompt=False)
        without = adapters_off(self.bare) if not adapters and adapter_names(self.bare) else nullcontext()
        with evaluation_mode(self.bare), without, self.autocast():
            hidden = self._hidden(self.bare, plan)
            values, _ = token_scores(hidden, plan.labels, self.head, chunk=self.text.logits_chunk)
        return plan.spread(values)

    def reference_log_probs(self, batch: TextBatch) -> Tensor:
        """log p per response token under the reference of the run, float32 (N, L), 0 outside of the response."""
        plan = self._plan(batch, prompt=False)
        return plan.spread(self._reference(plan))

    def _plan(self, batch: TextBatch, *, prompt: bool) -> _Plan:
        ids, there = batch.input_ids, batch.attention_mask
        selected = there.clone() if prompt else batch.response_mask.clone()
        selected[:, 0] = False  # nothing predicts a first token
        row, column = selected.nonzero(as_tuple=True)
        inputs: dict[str, Any] = {"use_cache": False}
        if self.text.packing:
            position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
            inputs |= {"input_ids": ids[there][None], "position_ids": position[there][None]}
            first = there.sum(1).cumsum(0) - there.sum(1)
            places = first[row] + column - 1
        else:
            inputs["input_ids"] = ids
            places = row * ids.shape[1] + column - 1
        return _Plan(inputs, selected, places, ids[row, column])

    def _hidden(self, network: nn.Module, plan: _Plan) -> Tensor:
        """Hidden states that predict the scored tokens, (T, D)."""
        base = self.bare.base_model
        if network is self.bare:
            hidden = base(**plan.inputs).last_hidden_state
        else:
            with _answering(self.bare, base):
                hidden = network(**plan.inputs)
        return hidden.flatten(0, 1)[plan.places]  # type: ignore[no-any-return]

    @staticmethod
    def _prompt(theta: Tensor, plan: _Plan, batch: TextBatch) -> dict[str, Tensor]:
        mask = plan.selected & ~batch.response_mask
        return {"prompt_imitation": -theta.masked_fill(~mask, 0.0).sum(1), "prompt_length": mask.sum(1)}


def _reference_log_prob(_: Tensor, labels: Tensor, reference: Tensor | None) -> Tensor:
    assert reference is not None, "only asked for with a reference"
    return reference.gather(1, labels[:, None])[:, 0]


@contextmanager
def _answering(bare: Any, base: nn.Module) -> Iterator[None]:
    """Inside, calling `bare` returns its base's last hidden state.

    A wrapper for several processes must be called itself, or gradients are not exchanged; it calls `bare`, whose own
    forward would make the logits of all tokens.
    """
    before = vars(bare).get("forward")
    bare.forward = lambda **inputs: base(**inputs).last_hidden_state
    try:
        yield
    finally:
        if before is None:
            del bare.forward
        else:
            bare.forward = before


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Inside, no dropout and no checkpointing; afterwards every module is in the mode it was in."""
    before = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@torch.no_grad()
def check_packing(network: Any) -> None:
    """Prove on a few tokens that rows in one sequence do not see each other and have their own positions.

    Exact where attention is masked by position ids (with sdpa and eager attention as a block-diagonal mask, with flash
    attention by row lengths) and positions come from position ids, learned ones included. State-space layers, convolutions
    and linear attention carry a state over the border, and are refused here. The network must be in evaluation mode.

    Raises:
        ConfigError: a row's hidden states change with its neighbour's tokens or its place.
    """
    vocabulary = network.config.vocab_size
    one, other = (torch.arange(7, device=network.device) * step % (vocabulary - 1) + 1 for step in (1, 5))
    row = torch.arange(9, device=network.device) * 3 % (vocabulary - 1) + 1
    position = torch.cat([torch.arange(7), torch.arange(9)])[None].to(network.device)
    base = network.base_model
    packed = [
        base(input_ids=torch.cat([first, row])[None], position_ids=position, use_cache=False).last_hidden_state[0, 7:]
        for first in (one, other)
    ]
    alone = base(input_ids=row[None], use_cache=False).last_hidden_state[0]
    size = alone.double().abs().amax()
    exact = alone.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(alone.device.type)
    bound = 1e-4 if exact else 5e-2
    for what, a, b in (("its neighbour's tokens", *packed), ("its place", packed[0], alone)):
        if (a.double() - b.double()).abs().amax() > bound * size:
            raise ConfigError(
                f"text.packing: with {type(network).__name__} a row's scores would change with {what}; set "
                "text.packing: false"
            )
