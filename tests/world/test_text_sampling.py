"""Drawing answers and scoring given ones, against stock generation and a plain loop."""

from __future__ import annotations

import pytest
import torch

from diffalign.world.text import lm, sampling, task


@pytest.fixture(scope="module")
def base():
    return lm.load()


QUESTIONS = task.sample_prompts(12, 5, held_out=True)


@pytest.mark.parametrize("chat", [True, False])
def test_greedy_answers_are_those_of_generate(base, chat: bool):
    model, tokenizer = base
    got = sampling.sample(model, tokenizer, QUESTIONS, 0, temperature=0.0, chat=chat, batch_size=5)
    for question, (answer,) in zip(QUESTIONS, got, strict=True):
        ids = torch.tensor([sampling.prompt_ids(tokenizer, question, chat=chat)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=48)
        assert answer == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_an_answer_does_not_depend_on_its_batch(base):
    one = sampling.sample(*base, QUESTIONS, 3, samples=3)
    assert sampling.sample(*base, QUESTIONS, 3, samples=3, batch_size=4) == one
    assert sampling.sample(*base, QUESTIONS[:5], 3, samples=3) == one[:5]
    assert sampling.sample(*base, QUESTIONS, 4, samples=3) != one
    assert len({text for answers in one for text in answers}) > len(QUESTIONS)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_are_drawn_from_the_softmax(base, temperature: float):
    model, tokenizer = base
    draws = 2000
    (answers,) = sampling.sample(
        model, tokenizer, QUESTIONS[:1], 0, samples=draws, temperature=temperature, max_new_tokens=1, batch_size=500
    )
    ids = torch.tensor([sampling.prompt_ids(tokenizer, QUESTIONS[0])])
    with torch.no_grad():
        wanted = (model(ids).logits[0, -1] / temperature).softmax(0)
    for token in wanted.topk(3).indices.tolist():
        share = sum(text == tokenizer.decode([token]) for text in answers) / draws
        assert share == pytest.approx(float(wanted[token]), abs=4 * (0.25 / draws) ** 0.5)


@pytest.mark.parametrize("chat", [True, False])
def test_logprobs_are_those_of_a_plain_loop(base, chat: bool):
    model, tokenizer = base
    answers = ["4.", "sure! the answer is 17. i hope that helps.", "hmm.", "ü"]
    got = sampling.answer_logprobs(model, tokenizer, QUESTIONS[:4], answers, chat=chat, batch_size=3)
    for i, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=False)):
        head = sampling.prompt_ids(tokenizer, question, chat=chat)
        tail = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        total = 0.0
        for j, token in enumerate(tail):
            with torch.no_grad():
                total += float(model(torch.tensor([head + tail[:j]])).logits[0, -1].log_softmax(0)[token])
        assert float(got.total[i]) == pytest.approx(total, abs=1e-3)
        assert int(got.tokens[i]) == len(tail)
    assert torch.allclose(got.mean, got.total / got.tokens)


def test_nothing_asked_nothing_said(base):
    assert sampling.sample(*base, [], 0) == []
    assert sampling.answer_logprobs(*base, [], []).total.shape == (0,)
