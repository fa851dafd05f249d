"""Sampling: independent of the batch, of the right distribution, and without a trace on the network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lm_support import VOCABULARY, build_lm

from diffalign import adapters
from diffalign.config import GenerationConfig, LoraConfig
from diffalign.errors import ConfigError, DataError
from diffalign.families.causal_lm import enable_checkpointing
from diffalign.schedules import sample_seed
from diffalign.text.generation import Sampled, generate

# peft 0.21 asks transformers by a name that the newest one calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16], [17, 18, 19], [20] * 9, [21], [22, 23]]
SEEDS = [sample_seed(7, f"{n:x}", 0) for n in range(len(PROMPTS))]
EOS = (2, 30)


def run(network: Any, prompts: Any = PROMPTS, seeds: Any = SEEDS, eos: Any = EOS, **config: Any) -> list[Sampled]:
    adapters_on = config.pop("adapters", True)
    settings = GenerationConfig(**({"max_new_tokens": 12} | config))
    return generate(network, prompts, config=settings, seeds=seeds, eos_ids=eos, pad_id=0, adapters=adapters_on)


@pytest.fixture(scope="module")
def network() -> Any:
    return build_lm()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.9, "top_k": 20}, {"temperature": 0.0}])
def test_samples_depend_on_neither_batch_nor_order(model_type: str, options: dict[str, Any]) -> None:
    network = build_lm(model_type)
    alone = run(network, batch_size=1, **options)
    assert run(network, batch_size=8, **options) == alone
    assert run(network, batch_size=3, **options) == alone
    backwards = run(network, PROMPTS[::-1], SEEDS[::-1], batch_size=5, **options)
    assert backwards[::-1] == alone
    assert run(network, PROMPTS[2:5], SEEDS[2:5], **options) == alone[2:5]
    assert len({sample.ids for sample in alone}) > 4


def test_another_seed_is_another_sample_and_greedy_has_none(network: Any) -> None:
    other = [seed + 1 for seed in SEEDS]
    assert run(network) != run(network, seeds=other)
    assert run(network, temperature=0.0) == run(network, seeds=other, temperature=0.0)


def test_greedy_is_the_largest_logit_every_time(network: Any) -> None:
    for prompt, sample in zip(PROMPTS, run(network, temperature=0.0), strict=True):
        ids = list(prompt)
        for token in sample.ids:
            with torch.no_grad():
                assert network(input_ids=torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)


def test_the_end_token_is_kept_and_nothing_follows(network: Any) -> None:
    samples = run(network, [[5]] * 60, list(range(60)), max_new_tokens=16)
    finished = [sample for sample in samples if sample.finished]
    cut = [sample for sample in samples if not sample.finished]
    assert finished
    assert cut
    for sample in finished:
        assert sample.ids[-1] in EOS
        assert not set(sample.ids[:-1]) & set(EOS)
    assert all(len(sample.ids) == 16 and not set(sample.ids) & set(EOS) for sample in cut)
    assert {sample.ids[-1] for sample in finished} == set(EOS)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.6}, {"temperature": 2.0, "top_p": 0.8}]
)
def test_first_tokens_have_the_models_distribution(network: Any, options: dict[str, float]) -> None:
    with torch.no_grad():
        logits = network(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1] / options.get("temperature", 1.0)
    order = logits.argsort(descending=True)
    keep = torch.ones(VOCABULARY, dtype=torch.bool)
    if "top_k" in options:
        keep[order[int(options["top_k"]) :]] = False
    if "top_p" in options:  # the smallest set whose mass reaches it
        mass_before = logits.softmax(-1)[order].cumsum(0) - logits.softmax(-1)[order]
        keep[order[mass_before >= options["top_p"]]] = False
    wanted = logits.masked_fill(~keep, -torch.inf).softmax(-1)

    count = 4000
    samples = run(network, [PROMPTS[0]] * count, list(range(count)), max_new_tokens=1, batch_size=count, **options)
    seen = torch.bincount(torch.tensor([sample.ids[0] for sample in samples]), minlength=VOCABULARY)
    assert not seen[~keep].any()
    expected = wanted * count
    common = expected >= 5
    chi2 = ((seen - expected)[common] ** 2 / expected[common]).sum().item()
    degrees = int(common.sum()) - 1
    assert chi2 < degrees + 4 * (2 * degrees) ** 0.5 + 4


def test_adapters_act_or_not_and_the_network_is_left_as_it_was() -> None:
    network = build_lm()
    base = run(network)
    adapters.attach(network, LoraConfig(rank=2, targets="all", dropout=0.5))
    with torch.no_grad():
        for parameter in adapters.parameters(network):
            parameter += 0.2
    enable_checkpointing(network)
    network.train()
    network.model.norm.eval()
    network.generation_config.repetition_penalty = 3.0  # a published default that would spoil samples
    before = network.generation_config
    assert run(network, adapters=False) == base
    on = run(network)
    assert on != base
    assert run(network) == on  # no dropout
    assert network.generation_config is before
    assert network.training
    assert not network.model.norm.training
    assert network.model.layers[0].training


def test_a_peft_model_is_sampled_like_the_network_inside() -> None:
    import peft

    wrapped = peft.get_peft_model(build_lm(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert run(wrapped) == run(build_lm())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": -1.0}, "generation.temperature"),
        ({"top_p": 0.0}, "generation.top_p"),
        ({"top_p": 1.1}, "generation.top_p"),
        ({"top_k": -1}, "generation.top_k"),
        ({"max_new_tokens": 0}, "generation.max_new_tokens"),
        ({"batch_size": 0}, "generation.batch_size"),
    ],
)
def test_settings_out_of_range_are_refused(network: Any, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(network, **wrong)


def test_prompts_that_do_not_fit_are_refused(network: Any) -> None:
    with pytest.raises(DataError, match=r"prompt 1 has 53 tokens.*at most 64"):
        run(network, [[5], [5] * 53], [1, 2])
    assert len(run(network, [[5] * 52], [1], eos=())[0].ids) == 12
    with pytest.raises(DataError, match="prompt 0 has no tokens"):
        run(network, [[]], [1])
    with pytest.raises(ValueError, match="one seed per prompt"):
        run(network, PROMPTS, SEEDS[:2])
    assert run(network, [], []) == []
