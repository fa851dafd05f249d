"""Text scores: those of a plain loop, the reference equal to the bit at the start, packing exact or refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from lm_support import CONFIGS, batch_of, build_lm, naive_log_probs, random_rows
from torch import Tensor, nn

from diffalign import adapters, losses
from diffalign.config import LoraConfig, ModelConfig, ReferenceConfig, TextConfig
from diffalign.errors import ConfigError, DataError
from diffalign.families.causal_lm import CausalLM, enable_checkpointing
from diffalign.losses import LossOut, Needs, Objective, Scores, Totals
from diffalign.losses.base import AnyLayout, TokenStatistic
from diffalign.references import Reference
from diffalign.text.batch import TextRow
from diffalign.text.policy import TextPolicy, check_packing

EXACT_PACKING = sorted(set(CONFIGS) - {"opt"})


def kl(policy: Tensor, labels: Tensor, reference: Tensor | None) -> Tensor:
    assert reference is not None
    return (reference.exp() * (reference - policy)).sum(-1)


@dataclass(frozen=True, kw_only=True)
class Probe(Objective):
    """Asks for whatever the test wants."""

    name: ClassVar[str] = "probe"
    needs: ClassVar[Needs] = Needs(prompt=True)

    def vocabulary(self) -> Mapping[str, TokenStatistic]:
        return {"kl": kl}

    def __call__(self, scores: Scores, layout: AnyLayout, stats: Mapping[str, Tensor] | None = None) -> LossOut:
        return LossOut(scores.theta, {})


@dataclass(frozen=True, kw_only=True)
class NeedsOld(Probe):
    needs: ClassVar[Needs] = Needs(old=True, reference=False)

    def vocabulary(self) -> Mapping[str, TokenStatistic]:
        return {}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    folder = tmp_path_factory.mktemp("lm")
    build_lm().config.save_pretrained(folder)
    return CausalLM(ModelConfig(family="causal_lm", pretrained=str(folder), random_weights=True))


def stirred(name: str = "llama", size: float = 0.1, **changes: Any) -> Any:
    network = build_lm(name, **changes)
    adapters.attach(network, LoraConfig(rank=2, targets="all"))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapters.parameters(network):
            parameter += size * torch.randn(parameter.shape, generator=draw)
    return network


def row_sums(found: list[Tensor], rows: list[TextRow]) -> Tensor:
    return torch.stack([values[row.start - 1 :].sum() for values, row in zip(found, rows, strict=True)])


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", EXACT_PACKING)
def test_scores_and_gradients_are_those_of_a_plain_loop(family: CausalLM, name: str, packing: bool) -> None:
    network = stirred(name)
    rows = random_rows(6)
    policy = TextPolicy(family, network, text=TextConfig(packing=packing, logits_chunk=5))
    scores = policy.scores(batch_of(rows), losses.DPO())
    wanted = row_sums(naive_log_probs(network, rows), rows)
    torch.testing.assert_close(scores.theta, wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), adapters.adapters_off(network):
        reference = row_sums(naive_log_probs(network, rows), rows)
    assert scores.ref is not None
    torch.testing.assert_close(scores.ref, reference, rtol=1e-5, atol=1e-5)
    assert (scores.ref - scores.theta).abs().min() > 1e-3  # the adapter acts

    parameters = adapters.parameters(network)
    weights = torch.linspace(-1, 2, len(rows))
    got = torch.autograd.grad((scores.theta * weights).sum(), parameters)
    for a, b in zip(got, torch.autograd.grad((wanted * weights).sum(), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_fresh_adapter_the_log_ratio_is_exactly_zero(
    family: CausalLM, packing: bool, dtype: torch.dtype
) -> None:
    network = build_lm().to(dtype)
    adapters.attach(network, LoraConfig(rank=2, targets="all", dropout=0.3))
    enable_checkpointing(network)
    network.train()
    policy = TextPolicy(
        family,
        network,
        autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32),
        text=TextConfig(packing=packing, logits_chunk=3),
    )
    assert network.training
    for objective in (losses.DPO(), Probe()):
        scores = policy.scores(batch_of(random_rows(4)), objective)
        assert torch.equal(scores.log_ratio(), torch.zeros(4))
        assert scores.units is not None
        assert torch.equal(scores.units.theta, scores.units.ref)
    assert not scores.vocabulary["kl"].any()
    out = losses.DPO()(policy.scores(batch_of(random_rows(4)), losses.DPO()), batch_of(random_rows(4)).layout)
    assert out.loss.item() == pytest.approx(0.693147, abs=1e-6)
    out.loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in adapters.parameters(network))
    assert all(p.grad is None for p in network.parameters() if not p.requires_grad)


def test_units_prompt_statistics_and_the_rest_of_the_batch_arrive(family: CausalLM) -> None:
    network, rows = stirred(), random_rows(4)
    batch = batch_of(rows)
    segment = batch.response_mask * torch.arange(batch.input_ids.shape[1])
    old = -torch.rand(batch.input_ids.shape) * batch.response_mask
    totals = Totals(items=7, units=99)
    batch = batch_of(rows, segment=segment, old=old, totals=totals, extra={"quality": torch.arange(4.0)})
    scores = TextPolicy(family, network, text=TextConfig(logits_chunk=4)).scores(batch, Probe())
    units = scores.need_units()
    for n, (row, values) in enumerate(zip(rows, naive_log_probs(network, rows), strict=True)):
        response = slice(row.start, len(row.ids))
        torch.testing.assert_close(units.theta[n, response], values[row.start - 1 :], rtol=1e-5, atol=1e-5)
        assert not units.theta[n, : row.start].any()
        assert not units.theta[n, len(row.ids) :].any()
        assert scores.length is not None
        assert scores.length[n] == len(row.ids) - row.start
        assert scores.prompt_imitation is not None
        assert scores.prompt_length is not None
        torch.testing.assert_close(scores.prompt_imitation[n], -values[: row.start - 1].sum(), rtol=1e-5, atol=1e-5)
        assert scores.prompt_length[n] == row.start - 1
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            policy = network(input_ids=ids).logits[0].log_softmax(-1)
            with adapters.adapters_off(network):
                reference = network(input_ids=ids).logits[0].log_softmax(-1)
        wanted = kl(policy, ids[0], reference)[row.start - 1 : -1]
        torch.testing.assert_close(scores.vocabulary["kl"][n, response], wanted, rtol=1e-4, atol=1e-5)
    assert not scores.vocabulary["kl"][~batch.response_mask].any()
    assert torch.equal(scores.imitation, -scores.theta)  # type: ignore[arg-type]
    assert torch.equal(units.segment, segment)  # type: ignore[arg-type]
    assert torch.equal(units.old, old)  # type: ignore[arg-type]
    assert torch.equal(scores.extra["quality"], torch.arange(4.0))
    assert scores.totals == totals


def test_padding_and_its_id_do_not_reach_the_scores(family: CausalLM) -> None:
    # 2 is the end token, which occurs in responses: only the masks may say what is padding
    network, rows = stirred(), random_rows(6)
    policy = TextPolicy(family, network)
    with torch.no_grad():
        one, other = (policy.scores(batch_of(rows, pad_id=pad), losses.DPO()).theta for pad in (0, 2))
    assert torch.equal(one, other)


def test_objectives_without_a_reference_do_not_run_it(family: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = TextPolicy(family, stirred())

    def refuse(network: nn.Module) -> Any:
        raise AssertionError("the reference was run")

    monkeypatch.setattr("diffalign.text.policy.adapters_off", refuse)
    batch = batch_of(random_rows(4))
    scores = policy.scores(batch_of(random_rows(4), old=torch.zeros(batch.input_ids.shape)), NeedsOld())
    assert scores.ref is None
    assert scores.prompt_imitation is None
    with pytest.raises(DataError, match="'probe' needs the log-probabilities"):
        policy.scores(batch, NeedsOld())
    with pytest.raises(AssertionError, match="was run"):
        policy.scores(batch, losses.DPO())


def test_log_probs_are_the_scores_in_evaluation_mode(family: CausalLM) -> None:
    network = build_lm()
    rows = random_rows(4)
    batch = batch_of(rows)
    plain = TextPolicy(family, network).log_probs(batch, adapters=False)  # no adapter yet: the base itself
    adapters.attach(network, LoraConfig(rank=2, dropout=0.5))
    with torch.no_grad():
        for parameter in adapters.parameters(network):
            parameter += 0.1
    network.train()
    policy = TextPolicy(family, network)
    assert torch.equal(policy.log_probs(batch, adapters=False), plain)
    on = policy.log_probs(batch)
    assert torch.equal(on, policy.log_probs(batch))  # no dropout
    assert network.training
    network.eval()
    torch.testing.assert_close(on.sum(1), row_sums(naive_log_probs(network, rows), rows), rtol=1e-5, atol=1e-5)


def test_a_row_without_response_scores_zero_and_stays_connected(family: CausalLM) -> None:
    rows = [TextRow(ids=(3, 4, 5), start=3), TextRow(ids=(3, 4), start=2)]
    scores = TextPolicy(family, stirred()).scores(batch_of(rows), losses.DPO())
    assert torch.equal(scores.theta, torch.zeros(2))
    scores.theta.sum().backward()


@pytest.mark.parametrize("objective", [losses.DPO(), Probe()])
def test_a_moving_reference_is_scored_without_dropout(family: CausalLM, objective: Objective) -> None:
    network = build_lm()
    adapters.attach(network, LoraConfig(rank=2, dropout=0.5))
    with torch.no_grad():
        for parameter in adapters.parameters(network):
            parameter += 0.1
    batch = batch_of(random_rows(4))
    wanted = TextPolicy(family, network).log_probs(batch).sum(1)
    reference = Reference(ReferenceConfig(scheme="sync"), network, adapters.parameters(network))
    network.train()
    scores = TextPolicy(family, network, reference=reference).scores(batch, objective)
    assert scores.ref is not None
    torch.testing.assert_close(scores.ref, wanted)
    assert not torch.allclose(scores.theta, wanted, atol=1e-4)


# Packing


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_equals_padding(family: CausalLM, attention: str) -> None:
    network, rows = stirred(), random_rows(8, seed=5)
    network.set_attn_implementation(attention)
    found = [
        TextPolicy(family, network, text=TextConfig(packing=packing)).scores(batch_of(rows), losses.DPO())
        for packing in (False, True)
    ]
    torch.testing.assert_close(found[0].theta, found[1].theta, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[0].need_units().theta, found[1].need_units().theta, rtol=0, atol=1e-5)


def test_packing_is_refused_where_rows_would_mix(family: CausalLM) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    state_space = MambaForCausalLM(MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, state_size=4))
    with pytest.raises(ConfigError, match="MambaForCausalLM a row's scores would change with its neighbour"):
        check_packing(state_space.eval())
    network = build_lm("opt")
    TextPolicy(family, network)
    with pytest.raises(ConfigError, match=r"set text\.packing: false"):
        TextPolicy(family, network, text=TextConfig(packing=True))


def test_learned_positions_start_again_in_every_packed_row(family: CausalLM) -> None:
    network = build_lm("gpt2")
    check_packing(network)

    class Shifted(nn.Module):
        """Ignores position ids, as a model that counts places itself would."""

        def __init__(self) -> None:
            super().__init__()
            self.config, self.device = network.config, network.device

        @property
        def base_model(self) -> Any:
            mask = torch.block_diag(torch.ones(7, 7), torch.ones(9, 9)).tril().bool()[None, None]

            def run(input_ids: Tensor, use_cache: bool, position_ids: Tensor | None = None) -> Any:
                packed = {} if position_ids is None else {"attention_mask": mask}
                return network.base_model(input_ids=input_ids, use_cache=False, **packed)

            return run

    with pytest.raises(ConfigError, match="change with its place"):
        check_packing(Shifted())


# Several processes


def test_a_wrapped_network_is_called_itself_and_without_logits(family: CausalLM, tmp_path: Path) -> None:
    network, batch = stirred(), batch_of(random_rows(4))
    alone = copy.deepcopy(network)
    TextPolicy(family, alone).scores(batch, losses.DPO()).theta.sum().backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(network)
        calls: list[Any] = []
        wrapped.register_forward_hook(lambda *values: calls.append(values[-1].shape))
        policy = TextPolicy(family, wrapped, network)
        policy.scores(batch, losses.DPO()).theta.sum().backward()
    finally:
        dist.destroy_process_group()
    assert calls == [torch.Size((4, batch.input_ids.shape[1], 32))]  # hidden states
    for a, b in zip(adapters.parameters(network), adapters.parameters(alone), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert "forward" not in vars(network)
    assert network(input_ids=batch.input_ids).logits.shape[-1] == 60
