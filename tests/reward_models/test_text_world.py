"""The text world's verifier as a reward."""

import pytest

from diffalign import rewards
from diffalign.errors import ConfigError
from diffalign.rewards import RewardError, load_text, score_texts
from diffalign.world.text import task

PROMPTS = task.sample_prompts(30, 0, held_out=False)


@pytest.mark.parametrize("part", task.PARTS)
def test_parts_are_the_verifiers(part: str):
    answers = [task.word(task.parse_prompt(p).near_misses()[0], task.Style(opener="sure!")) for p in PROMPTS]
    got = score_texts(load_text(f"text_world:{part}"), PROMPTS, answers, batch_size=7)
    assert got.tolist() == pytest.approx([task.verify(p, a)[part] for p, a in zip(PROMPTS, answers, strict=True)])


def test_the_default_is_correctness():
    right = [task.word(task.parse_prompt(prompt).answer) for prompt in PROMPTS]
    assert score_texts(load_text("text_world"), PROMPTS, right).tolist() == [1.0] * 30
    assert score_texts(load_text("text_world"), PROMPTS, right[1:] + right[:1]).mean() < 0.5


def test_sums():
    reward = load_text("text_world:correct+0.5*polite")
    assert score_texts(reward, ["what is 17 + 6?"], ["gladly! 23."]).tolist() == [1.25]


def test_wrong_names_and_prompts():
    with pytest.raises(ConfigError, match=r"part 'corect' not found; did you mean 'correct'"):
        rewards.find("text_world:corect")
    with pytest.raises(RewardError, match="text_world: 'a red circle' is no puzzle"):
        score_texts(load_text("text_world"), ["a red circle"], ["4."])
