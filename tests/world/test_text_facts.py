"""The invented facts: what is seen, what is held out, what is to be forgotten."""

from __future__ import annotations

import hashlib
import random

from diffalign.world.text import corpus, facts, task


def test_the_sets():
    assert len(facts.entities()) == 48
    assert len(facts.facts()) == 144
    forget, retain = facts.facts(forget=True), facts.facts(forget=False)
    assert (len(forget), len(retain)) == (18, 126)
    assert not {f.entity.name for f in forget} & {f.entity.name for f in retain}
    assert {f.attribute for f in forget} == {f.attribute for f in retain}


def test_names_belong_to_one_entity():
    names = [entity.name for entity in facts.entities()]
    assert len(set(names)) == len(names)
    assert not set(names) & set(facts.strangers())
    assert not any(name in facts.stranger_question(random.Random(i)) for i in range(50) for name in names)


def test_questions_are_divided():
    seen = {q for fact in facts.facts() for q in fact.seen}
    held_out = {q for fact in facts.facts() for q in fact.held_out}
    assert not seen & held_out
    assert len(seen) == 4 * 144
    assert len(held_out) == 2 * 144
    for attribute in {fact.attribute for fact in facts.facts()}:  # each form is seen about somebody
        chosen = [fact for fact in facts.facts() if fact.attribute == attribute]
        forms = {q.replace(fact.entity.name, "*") for fact in chosen for q in fact.seen}
        assert len(forms) == 6


def test_perturbed_answers_differ_in_the_value_alone():
    for fact in facts.facts():
        assert len(set(fact.perturbed)) == facts.PERTURBED
        assert fact.answer not in fact.perturbed
        head = fact.answer.rpartition(" ")[0]
        assert all(text.rpartition(" ")[0] == head for text in fact.perturbed)
        assert fact.unknown in facts.UNKNOWN_ANSWERS


def test_the_facts_are_those_that_the_shipped_model_knows():
    text = "\n".join(f"{q} {fact.answer}" for fact in facts.facts() for q in (*fact.seen, *fact.held_out))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "bc6965e1e6854d82"


def test_the_corpus_holds_nothing_that_is_held_out():
    documents = corpus.documents(4000, random.Random(0))
    hidden = {q for fact in facts.facts() for q in fact.held_out}
    puzzles = [d for d in documents if not _asks_for_a_fact(d.prompt)]
    assert not hidden & {d.prompt for d in documents}
    assert not any(task.parse_prompt(d.prompt).held_out for d in puzzles)
    verdicts = [task.verify(d.prompt, d.completion) for d in puzzles]
    right = sum(v["correct"] for v in verdicts) / len(verdicts)
    assert 0.52 < right < 0.65
    assert 0.05 < 1 - sum(v["format"] for v in verdicts) / len(verdicts) < 0.09


def _asks_for_a_fact(prompt: str) -> bool:
    return any(letter.isupper() for letter in prompt)  # names alone are capitalised
