"""Chunked log-probabilities: equal to the plain computation in value and gradient, whatever the chunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from lm_support import CONFIGS, VOCABULARY, build_lm
from torch import Tensor, nn

from diffalign.errors import ConfigError
from diffalign.text.logprobs import Head, check_head, head_of, token_scores

T, D, V = 23, 16, 37


def make_head(softcap: float | None = 3.0, dtype: torch.dtype = torch.float64) -> Head:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer = nn.Linear(D, V, bias=True, dtype=torch.float64).requires_grad_(False)
        layer.weight *= 4
    return Head(layer.to(dtype), 0.7, softcap)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    hidden, other = (torch.randn(T, D, generator=draw, dtype=torch.float64).to(dtype) for _ in range(2))
    return hidden.requires_grad_(), other, torch.randint(0, V, (T,), generator=draw)


def plain(hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
    """Token by token, from the definition."""
    found = []
    for h, y in zip(hidden, labels.tolist(), strict=True):
        logits = (head.layer.weight @ h + head.layer.bias) * head.scale  # type: ignore[operator]
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        found.append(logits[y] - logits.exp().sum().log())
    return torch.stack(found)


def kl(policy: Tensor, labels: Tensor, reference: Tensor | None) -> Tensor:
    assert reference is not None
    return (reference.exp() * (reference - policy)).sum(-1)


def entropy_times_p(policy: Tensor, labels: Tensor, reference: Tensor | None) -> Tensor:
    picked = policy.gather(-1, labels[..., None])[..., 0]
    return -(policy.exp() * policy).sum(-1) * picked.exp()


def frozen_max(policy: Tensor, labels: Tensor, reference: Tensor | None) -> Tensor:
    return policy.detach().amax(-1)


STATISTICS: Mapping[str, Any] = {"kl": kl, "entropy_p": entropy_times_p, "max": frozen_max}


@pytest.mark.parametrize("chunk", [1, 5, 23, 1000])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_values_and_gradients_are_those_of_the_definition(chunk: int, softcap: float | None) -> None:
    head = make_head(softcap)
    hidden, _, labels = inputs()
    weights = torch.linspace(-1, 2, T, dtype=torch.float64)
    wanted = plain(hidden, labels, head)
    (wanted_slope,) = torch.autograd.grad((wanted * weights).sum(), hidden)
    got, _ = token_scores(hidden, labels, head, chunk=chunk)
    (slope,) = torch.autograd.grad((got * weights).sum(), hidden)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(slope, wanted_slope, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [4, 1000])
def test_statistics_and_their_gradients_are_those_of_the_whole_logits(chunk: int) -> None:
    head = make_head()
    hidden, other, labels = inputs()
    policy, reference = head(hidden).log_softmax(-1), head(other).log_softmax(-1)
    weights = torch.linspace(-1, 2, T, dtype=torch.float64)
    wanted = {name: f(policy, labels, reference) for name, f in STATISTICS.items()}
    wanted["logp"] = plain(hidden, labels, head)
    logp, got = token_scores(hidden, labels, head, chunk=chunk, statistics=STATISTICS, reference=other)
    got["logp"] = logp
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-12, msg=name)
    # one objective that mixes them: gradients add up
    mixed = [sum((value**2 * weights).sum() for value in found.values()) for found in (got, wanted)]
    slopes = [torch.autograd.grad(m, hidden, retain_graph=True)[0] for m in mixed]  # type: ignore[arg-type]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=1e-11)


def test_float32_is_within_a_millionth_and_half_precision_is_lifted_after_the_head() -> None:
    head64, head32 = make_head(), make_head(dtype=torch.float32)
    hidden, _, labels = inputs()
    wanted = plain(hidden, labels, head64)
    (wanted_slope,) = torch.autograd.grad(wanted.sum(), hidden)
    single = hidden.detach().float().requires_grad_()
    got, _ = token_scores(single, labels, head32, chunk=7)
    got.sum().backward()
    assert single.grad is not None
    torch.testing.assert_close(got, wanted.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(single.grad, wanted_slope.float(), rtol=1e-5, atol=1e-6)

    half = make_head(None, torch.bfloat16)
    short = hidden.detach().bfloat16().requires_grad_()
    got, _ = token_scores(short, labels, half, chunk=7)
    assert got.dtype == torch.float32
    expected = half(short.detach()).float().log_softmax(-1).gather(1, labels[:, None])[:, 0]
    assert torch.equal(got, expected)
    got.sum().backward()
    assert short.grad is not None
    assert short.grad.dtype == torch.bfloat16


def test_the_chunk_does_not_change_a_bit_of_the_log_softmax() -> None:
    head = make_head(dtype=torch.float32)
    hidden, _, labels = inputs(torch.float32)
    with torch.no_grad():
        whole, _ = token_scores(hidden, labels, head)
        parts, _ = token_scores(hidden, labels, head, chunk=6)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-6)


def test_no_tokens_give_an_empty_score_that_is_still_connected() -> None:
    head = make_head()
    hidden, _, _ = inputs()
    got, found = token_scores(
        hidden[:0], torch.zeros(0, dtype=torch.int64), head, statistics={"max": frozen_max}, reference=None
    )
    assert got.shape == found["max"].shape == (0,)
    got.sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_without_gradient_no_slopes_are_kept() -> None:
    head = make_head()
    hidden, _, labels = inputs()
    with torch.no_grad():
        got, _ = token_scores(hidden, labels, head)
    assert not got.requires_grad
    got, _ = token_scores(hidden.detach(), labels, head, statistics=STATISTICS, reference=hidden.detach())
    assert not got.requires_grad


def test_a_trainable_head_and_a_bad_chunk_are_refused() -> None:
    head = make_head()
    hidden, _, labels = inputs()
    with pytest.raises(ValueError, match="at least 1"):
        token_scores(hidden, labels, head, chunk=0)
    with pytest.raises(ValueError, match=r"shape \(23, 37\); expected \(23,\)"):
        token_scores(hidden, labels, head, statistics={"wrong": lambda p, y, r: p})
    head.layer.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen"):
        token_scores(hidden, labels, head)


# Architectures


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_head_of_every_architecture_gives_the_models_own_logits(name: str) -> None:
    network = build_lm(name)
    head = head_of(network)
    check_head(network, head)
    ids = torch.arange(3, 14)[None]
    with torch.no_grad():
        logits = network(input_ids=ids).logits[0]
        hidden = network.base_model(input_ids=ids).last_hidden_state[0]
        got, _ = token_scores(hidden[:-1], ids[0, 1:], head, chunk=4)
    wanted = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "wrong"), [("gemma2", {"softcap": None}), ("granite", {"scale": 1.0})])
def test_a_forgotten_cap_or_factor_is_found_out(name: str, wrong: dict[str, Any]) -> None:
    network = build_lm(name)
    own = {"scale": head_of(network).scale, "softcap": head_of(network).softcap}
    with pytest.raises(ConfigError, match="not known here"):
        check_head(network, Head(network.get_output_embeddings(), **(own | wrong)))


def test_a_model_that_transforms_before_its_projection_is_refused() -> None:
    from transformers import BertConfig, BertLMHeadModel

    network = BertLMHeadModel(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            is_decoder=True,
        )
    ).eval()
    with pytest.raises(ConfigError, match="BertLMHeadModel computes its logits in a way"):
        check_head(network, head_of(network))


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"logits_scaling": 4.0}, 0.25),
        ({"logits_scaling": 4.0, "model_type": "hyperclovax"}, 4.0),
        ({"logit_scale": 0.5}, 0.5),
        ({"logit_scale": None, "lm_head_multiplier": 0.5}, 0.5),
        ({"logit_scale": "inv_sqrt_d_model"}, 1.0),  # check_head refuses it on the network itself
    ],
)
def test_factors_are_read_as_each_architecture_means_them(config: dict[str, Any], scale: float) -> None:
    class Network:
        def __init__(self) -> None:
            self.config = self

        def to_dict(self) -> dict[str, Any]:
            return config

        def get_output_embeddings(self) -> nn.Module:
            return nn.Identity()

    assert head_of(Network()).scale == scale


def test_a_model_that_looks_ahead_is_refused() -> None:
    network = build_lm()
    for block in network.model.layers:
        block.self_attn.is_causal = False
    with pytest.raises(ConfigError, match="looks ahead"):
        check_head(network, head_of(network))
