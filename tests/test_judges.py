"""Reward models that can be trained: heads, folders, and how a trained one is loaded again."""

import dataclasses
import math

import pytest
import torch
from transformers import CLIPModel

from diffalign import adapters, rewards
from diffalign.config import LoraConfig, ModelConfig
from diffalign.errors import ConfigError
from diffalign.families.clip_reward import ClipReward, clip_config
from diffalign.jobs.reward import write_judge
from diffalign.judges import JudgeSettings, load_judge, shares
from diffalign.losses.judging import general_preference
from diffalign.rewards import CLIP_MEAN, CLIP_STD, normalise
from diffalign.world.names import base_folder
from diffalign.world.scenes import draw, sample_scenes

TINY = base_folder("tiny-clip")
SETTINGS = {
    "cosine": JudgeSettings(),
    "aspects": JudgeSettings(head="aspects", outputs=3, aspect_weights=(0.5, 0.5, 0.0)),
    "general": JudgeSettings(head="general", outputs=4, opponents=(0.5, 0.1, -0.3, 0.2), temperature=0.1),
    "experts": JudgeSettings(head="experts", outputs=5, criteria=(2, 3), gate_width=16, gate_temperature=2.0),
}


@pytest.fixture(scope="module")
def scenes():
    found = sample_scenes(6, seed=4)
    return draw(found), [scene.caption for scene in found]


def family() -> ClipReward:
    return ClipReward(ModelConfig(family="clip_reward", pretrained="tiny-clip"))


def judge(network, images, prompts):
    tokens = family().tokenizer(prompts, padding=True, return_tensors="pt")
    return network(images, tokens.input_ids, tokens.attention_mask, torch.arange(len(prompts)))


def test_cosine_head_is_the_towers_own_logit(scenes):
    images, prompts = scenes
    clip = CLIPModel.from_pretrained(TINY, dtype=torch.float32)
    tokens = family().tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = clip(pixel_values=normalise(images, CLIP_MEAN, CLIP_STD), **tokens)
        mine = judge(load_judge(TINY), images, prompts).scores[:, 0]
    torch.testing.assert_close(mine, out.logits_per_image.diagonal(), rtol=1e-4, atol=1e-4)


def test_aspects_begin_as_the_cosine_and_the_overall_score_is_their_weighted_mean(scenes):
    network = load_judge(TINY, SETTINGS["aspects"])
    with torch.no_grad():
        fresh = judge(network, *scenes).scores
        cosines = judge(load_judge(TINY), *scenes).scores
        network.judge_head.bias.copy_(torch.tensor([2.0, 4.0, 100.0]))
        moved = judge(network, *scenes)
    torch.testing.assert_close(fresh, cosines.expand(-1, 3))
    torch.testing.assert_close(moved.overall, cosines[:, 0] + 3.0)


# ---------------------------------------------------------------- experts


def stirred(settings, seed=5):
    """A judge all of whose head's tensors are random."""
    network = load_judge(TINY, settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.judge_head.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network


def plain_experts(network, image, text, cosine, sizes, temperature):
    """One score, criteria and weights of one picture, written again in plain numbers."""
    head = {name: value.double().tolist() for name, value in network.judge_head.state_dict().items()}
    width = len(text)

    def layer(x, name, bias=True):
        out = [sum(w * v for w, v in zip(row, x)) for row in head[f"{name}.weight"]]
        return [o + b for o, b in zip(out, head[f"{name}.bias"])] if bias else out

    def perceptron(name):
        x = [math.sqrt(width) * v for v in text]
        for number in (0, 1):
            x = [max(0.0, v) for v in layer(x, f"{name}.{number}")]
        return [v / temperature for v in layer(x, f"{name}.2")]

    def softmax(x):
        powers = [math.exp(v) for v in x]
        return [p / sum(powers) for p in powers]

    joint = [*image, *text, *(math.sqrt(width) * a * b for a, b in zip(image, text))]
    criteria = [cosine + c for c in layer(joint, "criteria", bias=False)]
    gate, total, start = perceptron("gate"), 0.0, 0
    aspects, weights = softmax(perceptron("aspect_gate")), []
    for size, aspect in zip(sizes, aspects):
        within = softmax(gate[start : start + size])
        part = 0.0
        for k in range(size):
            part += within[k] * head["scale"][start + k] * criteria[start + k]
            weights.append(aspect * within[k] * head["scale"][start + k])
        total += aspect * part
        start += size
    return total, criteria, weights


def test_experts_are_the_formula_of_mj_video(scenes):
    images, prompts = scenes
    network = stirred(SETTINGS["experts"])
    tokens = family().tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = judge(network, images, prompts)
        clip = CLIPModel.from_pretrained(TINY, dtype=torch.float32)
        out = clip(pixel_values=normalise(images, CLIP_MEAN, CLIP_STD), **tokens)
    for i in range(len(prompts)):
        image, text = (side[i].double().tolist() for side in (out.image_embeds, out.text_embeds))
        cosine = float(out.logits_per_image[i, i])
        total, criteria, weights = plain_experts(network, image, text, cosine, (2, 3), 2.0)
        assert float(found.overall[i]) == pytest.approx(total, rel=1e-4, abs=1e-4)
        assert found.scores[i].tolist() == pytest.approx(criteria, rel=1e-4, abs=1e-4)
        assert found.weights[i].tolist() == pytest.approx(weights, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("sizes", [(5,), (2, 3), (1, 1, 3)])
def test_shares_add_up_to_one_and_follow_the_prompt_alone(scenes, sizes):
    images, prompts = scenes
    network = stirred(dataclasses.replace(SETTINGS["experts"], criteria=sizes))
    with torch.no_grad():
        network.judge_head.scale.fill_(1)
        found = judge(network, images, prompts)
        turned = judge(network, images.flip(0), prompts)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(6))
    assert (found.weights > 0).all()
    assert found.weights.std(0).min() > 1e-3
    torch.testing.assert_close(turned.weights, found.weights)
    assert not torch.allclose(turned.scores, found.scores)


def test_shares_of_criteria_are_those_within_an_aspect_times_the_aspects():
    logits = torch.tensor([[0.0, math.log(3.0), 5.0, 5.0, 5.0]])
    aspects = torch.tensor([[math.log(4.0), 0.0]])
    wanted = torch.tensor([[0.8 / 4, 0.8 * 3 / 4, 0.2 / 3, 0.2 / 3, 0.2 / 3]])
    torch.testing.assert_close(shares(logits, aspects, (2, 3), 1.0), wanted)
    torch.testing.assert_close(shares(2 * logits, 2 * aspects, (2, 3), 2.0), wanted)


def test_one_expert_is_the_head_without_gates(scenes):
    single = stirred(JudgeSettings(head="experts", outputs=1, gate_width=16))
    plain = load_judge(TINY, JudgeSettings(head="aspects", outputs=1))
    with torch.no_grad():
        single.judge_head.scale.fill_(1)
        plain.judge_head.weight.copy_(single.judge_head.criteria.weight)
        one, other = judge(single, *scenes), judge(plain, *scenes)
    torch.testing.assert_close(one.weights, torch.ones(6, 1))
    torch.testing.assert_close(one.overall, other.overall)


def test_fresh_experts_are_the_cosine_and_already_differ(scenes):
    network = load_judge(TINY, SETTINGS["experts"], seed=3)
    found, cosines = judge(network, *scenes), judge(load_judge(TINY), *scenes)
    torch.testing.assert_close(found.overall, cosines.overall, rtol=1e-4, atol=1e-4)
    found.overall.sum().backward()
    rows = network.judge_head.criteria.weight.grad
    assert all(not torch.allclose(rows[a], rows[b]) for a in range(5) for b in range(a))


def test_general_embeddings_are_unit_vectors_and_score_against_the_opponents(scenes):
    network = load_judge(TINY, SETTINGS["general"], seed=1)
    with torch.no_grad():
        found = judge(network, *scenes)
    torch.testing.assert_close(found.embedding.norm(dim=1), torch.ones(6))
    opponents = torch.tensor(SETTINGS["general"].opponents)
    torch.testing.assert_close(found.scores[:, 0], general_preference(found.embedding, opponents.expand(6, -1)))


@pytest.mark.parametrize("head", list(SETTINGS))
def test_what_is_written_scores_as_the_adapter_did(tmp_path, scenes, head):
    images, prompts = scenes
    network = load_judge(TINY, SETTINGS[head], seed=2).eval()
    adapters.attach(network, LoraConfig(rank=4, targets="all"), seed=0)
    with torch.no_grad():
        for parameter in adapters.parameters(network):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        if network.judge_head is not None:
            for parameter in network.judge_head.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(generator=torch.Generator().manual_seed(4))
        wanted = judge(network, images, prompts).overall
    write_judge(network, tmp_path / "reward")
    family().tokenizer.save_pretrained(tmp_path / "reward")
    scale = network.settings.temperature if head == "general" else 1.0
    reward = rewards.load(f"trained:{tmp_path}")
    reward.eight_bit = False
    torch.testing.assert_close(rewards.score(reward, images, prompts), wanted / scale, rtol=1e-4, atol=1e-4)
    untrained = load_judge(TINY, SETTINGS[head], seed=2)
    with torch.no_grad():
        assert not torch.allclose(judge(untrained, images, prompts).overall, wanted, atol=1e-2)


def test_a_trained_cosine_is_a_plain_clip_that_pickscore_reads(tmp_path, scenes):
    write_judge(load_judge(TINY), tmp_path / "reward")
    family().tokenizer.save_pretrained(tmp_path / "reward")
    names = (f"trained:{tmp_path}", f"pickscore:{tmp_path / 'reward'}")
    one, other = (rewards.score(rewards.load(name), *scenes) for name in names)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_parts_are_the_aspects(tmp_path, scenes):
    network = load_judge(TINY, SETTINGS["aspects"])
    with torch.no_grad():
        network.judge_head.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    write_judge(network, tmp_path)
    family().tokenizer.save_pretrained(tmp_path)
    reward = rewards.load(f"trained:{tmp_path}")
    total = rewards.score(reward, *scenes)
    parts = reward.parts()
    torch.testing.assert_close(parts["aspect_1"] - parts["aspect_0"], torch.ones(6), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close((parts["aspect_0"] + parts["aspect_1"]) / 2, total, rtol=1e-4, atol=1e-3)


def test_an_earlier_rewards_head_is_kept_and_another_begins_anew(tmp_path):
    network = load_judge(TINY, SETTINGS["aspects"])
    with torch.no_grad():
        network.judge_head.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    write_judge(network, tmp_path)
    assert load_judge(tmp_path).judge_head.bias.tolist() == [1.0, 2.0, 3.0]
    other = load_judge(tmp_path, JudgeSettings(head="aspects", outputs=2))
    assert other.judge_head.bias.tolist() == [0.0, 0.0]
    gated = stirred(SETTINGS["experts"])
    write_judge(gated, tmp_path)
    assert torch.equal(load_judge(tmp_path).judge_head.scale, gated.judge_head.scale)
    cut_otherwise = load_judge(tmp_path, dataclasses.replace(SETTINGS["experts"], criteria=(4, 1)))
    assert cut_otherwise.judge_head.scale.tolist() == [1.0] * 5


@pytest.mark.parametrize(
    ("name", "said"), [("trained", "needs a folder"), ("trained:/nowhere", "holds no trained reward")]
)
def test_names_that_cannot_be_loaded_are_refused_before_anything_loads(name, said):
    with pytest.raises(ConfigError, match=said):
        rewards.find(name)


def test_settings_survive_the_disk(tmp_path):
    for settings in SETTINGS.values():
        settings.save(tmp_path)
        assert JudgeSettings.load(tmp_path) == settings
    (tmp_path / "judge.json").write_text('{"head": "cosine"}')
    with pytest.raises(ConfigError, match="not readable"):
        JudgeSettings.load(tmp_path)


# ---------------------------------------------------------------- the family


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_token_ids_survive_the_caches_types(dtype):
    made = family()
    prompts = ["outlined, two red circles on a white background", "?"]
    text = {name: value.to(dtype) for name, value in made.encode_prompts(prompts).items()}
    ids, mask = made.tokens(text)
    wanted = made.tokenizer(prompts, padding="max_length", max_length=20, return_tensors="pt")
    assert torch.equal(ids, wanted.input_ids)
    assert torch.equal(mask, wanted.attention_mask)
    high = {"high": torch.tensor([192.0]), "low": torch.tensor([255.0]), "mask": torch.tensor([1.0])}
    assert made.tokens({k: v.to(dtype) for k, v in high.items()})[0].item() == 49407  # CLIP's largest


def test_published_sizes_are_the_published_ones():
    """986.1 M parameters of laion's H/14, counted from its open_clip weights (427.6 M of OpenAI's L/14)."""
    from diffalign.judges import JudgeCLIP

    for name, millions in (("clip-h14", 986.1), ("clip-l14", 427.6)):
        config = clip_config(ModelConfig(family="clip_reward", pretrained=name, random_weights=True))
        with torch.device("meta"):
            network = JudgeCLIP(config)
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pretrained": "tiny-clp"}, "did you mean 'tiny-clip'"),
        ({"pretrained": "clip-x", "random_weights": True}, "no published CLIP"),
        ({"vae": "x/y"}, "model.vae"),
        ({"pretrained": str(base_folder("tiny-sdxl") / "text_encoder")}, "model_type 'clip_text_model'"),
    ],
)
def test_models_that_are_no_clip_are_refused(changes, said):
    config = dataclasses.replace(ModelConfig(family="clip_reward", pretrained="tiny-clip"), **changes)
    with pytest.raises(ConfigError, match=said):
        ClipReward.preflight(config)
