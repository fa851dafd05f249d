"""What the shipped tiny LM can do, and what a model that knows nothing measures."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from diffalign.world.text import lm, measure, task


@pytest.fixture(scope="module")
def base():
    return lm.load()


@pytest.fixture(scope="module")
def ignorant(base):
    torch.manual_seed(0)
    return lm.build_untrained(base[1]), base[1]


@pytest.mark.parametrize("chat", [True, False])
def test_the_base_knows_better_than_it_samples(base, chat: bool):
    greedy = measure.measure_task(*base, temperature=0.0, chat=chat)
    drawn = measure.measure_task(*base, temperature=1.0, chat=chat)
    assert greedy.correct.mean() > 0.85
    assert 0.4 < drawn.correct.mean() < 0.65
    assert 0.85 < drawn.verdicts["format"].mean() < 0.98
    assert drawn.words.std() > 4  # style is mixed
    assert set(greedy.by_kind()) == set(task.KINDS)


def test_items_belong_to_their_prompts(base):
    drawn = measure.measure_task(*base, seed=2, prompts=40)
    again = [task.verify(p, c)["correct"] for p, c in zip(drawn.prompts, drawn.completions, strict=True)]
    assert drawn.correct.tolist() == again
    assert np.array_equal(measure.measure_task(*base, seed=2, prompts=40).correct, drawn.correct)


@pytest.mark.parametrize("forget", [True, False])
def test_the_base_has_memorised_the_facts(base, forget: bool):
    known = measure.measure_facts(*base, forget=forget)
    assert len(known.questions) == len(known.recall) == (36 if forget else 252)
    assert known.recall.mean() > 0.95
    assert known.probability.mean() > 0.9
    assert known.truth_ratio.mean() < 0.6
    assert known.unknown.mean() < 0.05


def test_a_model_that_knows_nothing(ignorant):
    nothing = measure.measure_facts(*ignorant, forget=True)
    assert nothing.recall.mean() == 0
    assert nothing.probability.mean() < 0.05
    assert nothing.truth_ratio.mean() == pytest.approx(1, abs=0.3)
    assert measure.measure_task(*ignorant, prompts=40).correct.mean() == 0


def test_the_training_mode_is_put_back(base):
    model, tokenizer = copy.deepcopy(base[0]), base[1]
    model.train()
    measure.measure_task(model, tokenizer, prompts=4)
    assert model.training
