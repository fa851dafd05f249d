"""Judges of all kinds: on a server that is a process of its own and misbehaves, and in this process."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import vlm_process
import vlm_support
import yaml
from rewards_support import pictures, to_pil
from transformers import AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from diffalign import rewards, vlm
from diffalign.errors import ConfigError
from diffalign.http_client import ServerError
from diffalign.rewards import RewardError, score
from diffalign.vlm_backends import LocalBackend, Request

DARK, BRIGHT = torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.8)
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}


def write(folder: Path, **keys: Any) -> str:
    file = folder / "questions.yaml"
    file.write_text(yaml.safe_dump(keys))
    return str(file)


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Image 1 is better than Image 2.", 1.0),
        ("so IMAGE 2 is  better", 0.0),
        ("Both images are equally good.", 0.5),
        ("Image 1 is better in colour, but in sum image 2 is better than image 1.", 0.0),
        ("I cannot say", math.nan),
        ("", math.nan),
    ],
)
def test_verdicts(text: str, value: float) -> None:
    assert vlm.read_verdict(text) == pytest.approx(value, nan_ok=True)


def test_both_orders_have_to_agree_on_a_winner() -> None:
    nan = math.nan
    ab = torch.tensor([0.9, 0.1, 0.9, 0.5, 0.5, nan])
    ba = torch.tensor([0.7, 0.3, 0.1, 0.5, 0.9, 0.9])
    found = vlm.combine_orders(ab, ba)
    assert found.tie.tolist() == [False, False, True, True, True, False]
    assert found.p[:5].tolist() == pytest.approx([0.8, 0.2, 0.5, 0.5, 0.7])
    assert found.p[5].isnan()
    assert found.consistency == pytest.approx(2 / 5)
    assert found.bias == pytest.approx((0.2 + 0.2 + 0.8 + 0 + 0.4) / 5)
    back = vlm.combine_orders(1 - ba, 1 - ab)  # the pictures swapped
    assert torch.allclose(back.p[:5], 1 - found.p[:5])
    assert back.tie.equal(found.tie)
    assert math.isnan(vlm.combine_orders(ab[5:], ba[5:]).consistency)


# ---------------------------------------------------------------- a server that is a process


def test_every_mode_over_a_real_connection(tmp_path: Path) -> None:
    images = torch.stack([DARK, BRIGHT])
    with vlm_process.serving() as url:
        yes = score(rewards.load(f"vlm_judge:{write(tmp_path, server=url)}"), images, ["p", "q"])
        rating = score(rewards.load(f"vlm_judge:{write(tmp_path, server=url, mode='rating')}"), images, ["p", "q"])
        assert yes.tolist() == pytest.approx([0.2, 0.8], abs=1e-3)
        assert rating.tolist() == pytest.approx([1 + 4 * 0.2, 1 + 4 * 0.8], abs=1e-2)
        for mode, p in (("pair", 1 / (1 + math.exp(-8 * 0.6))), ("verdict", 1.0)):
            judge = vlm.Judge(vlm.read_questions(write(tmp_path, server=url, mode=mode)))
            found = vlm.compare(judge, [BRIGHT, DARK, DARK], [DARK, BRIGHT, DARK], ["a", "b", "c"])
            assert found.p.tolist() == pytest.approx([p, 1 - p, 0.5], abs=1e-3)
            assert found.tie.tolist() == [False, False, True]
            assert found.consistency == pytest.approx(2 / 3)


def test_a_slow_answer_is_waited_for(tmp_path: Path) -> None:
    with vlm_process.serving("slow", "slow") as url:
        judge = rewards.load(f"vlm_judge:{write(tmp_path, server=url + '?timeout=20&wait=0')}")
        assert score(judge, BRIGHT[None], ["p"]).tolist() == pytest.approx([0.8], abs=1e-3)
        assert vlm_process.stats(url)["answered"] == 1


def test_time_outs_busy_answers_and_broken_ones_are_asked_again(tmp_path: Path) -> None:
    with vlm_process.serving("hang", "busy", "broken", "busy", "ok") as url:
        server = url + "?timeout=1&wait=30&backoff=0.01"
        judge = rewards.load(f"vlm_judge:{write(tmp_path, server=server, workers=1)}")
        assert score(judge, BRIGHT[None], ["p"]).tolist() == pytest.approx([0.8], abs=1e-3)
    with vlm_process.serving("hang") as url:
        judge = rewards.load(f"vlm_judge:{write(tmp_path, server=url + '?timeout=0.2&wait=0')}")
        with pytest.raises(ServerError, match=r"does not answer \(time-out\).*asked about 'p'"):
            score(judge, BRIGHT[None], ["p"])


def test_a_server_that_crashes_and_comes_back(tmp_path: Path) -> None:
    port = vlm_process.free_port()
    first = vlm_process.start(port, "ok", "crash")
    others = []

    def again() -> None:
        first.wait()
        time.sleep(0.2)
        others.append(vlm_process.start(port))

    thread = threading.Thread(target=again)
    thread.start()
    try:
        server = f"http://127.0.0.1:{port}/v1?wait=60&backoff=0.05"
        judge = rewards.load(f"vlm_judge:{write(tmp_path, server=server, workers=2)}")
        got = score(judge, torch.stack([DARK, BRIGHT] * 4), [f"p{i}" for i in range(8)])
        assert got.tolist() == pytest.approx([0.2, 0.8] * 4, abs=1e-3)
    finally:
        thread.join()
        for process in (first, *others):
            vlm_process.stop(process)
    judge = rewards.load  # a server that stays away is told of in one line
    with pytest.raises(ServerError, match="does not answer"):
        judge(f"vlm_judge:{write(tmp_path, server=f'http://127.0.0.1:{port}/v1?wait=0.1')}")


def test_no_more_questions_are_under_way_than_workers(tmp_path: Path) -> None:
    with vlm_process.serving(*["slow"] * 6) as url:
        judge = rewards.load(f"vlm_judge:{write(tmp_path, server=url, workers=3)}")
        score(judge, torch.stack([DARK] * 9), ["p"] * 9)
        found = vlm_process.stats(url)
    assert found["answered"] == 9
    assert 1 < found["most"] <= 3


# ---------------------------------------------------------------- a model in this process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge") / "qwen"
    torch.manual_seed(0)
    vision = VISION | {"window_size": 56, "fullatt_block_indexes": [1]}
    vlm_support.save(folder, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, vision)
    return folder


def logits_of(folder: Path, text: str, shown: list[torch.Tensor]) -> tuple[torch.Tensor, Any]:
    """Of the first token of the answer, one question alone, its text written out."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    marks = "<|vision_start|><|image_pad|><|vision_end|>" * len(shown)
    written = f"<|im_start|>user\n{marks}{text}<|im_end|>\n<|im_start|>assistant\n"
    with torch.no_grad():
        inputs = processor(text=[written], images=[[to_pil(image) for image in shown]], return_tensors="pt")
        return model(**inputs).logits[0, -1].log_softmax(0), processor.tokenizer


def test_a_local_model_gives_the_probabilities_of_its_logits(folder: Path, tmp_path: Path) -> None:
    images, prompts = pictures(3), ["a red circle", "two blue squares left of a tree", "x"]
    judge = rewards.load(f"vlm_judge:{write(tmp_path, local=str(folder), batch=2)}")
    assert not judge.waits, "it is busy itself, so nothing should go on beside it"
    got = score(judge, images, prompts)
    wanted = []
    for image, prompt in zip(images, prompts, strict=True):
        logp, tokenizer = logits_of(folder, f'Does this picture show "{prompt}"? Answer with Yes or No.', [image])
        yes, no = (logp[tokenizer.convert_tokens_to_ids(word)].exp() for word in ("Yes", "No"))
        wanted.append(float(yes / (yes + no)))
    assert got.tolist() == pytest.approx(wanted, rel=1e-3)
    assert got.std() > 1e-3
    alone = score(judge, images, prompts, batch_size=1)
    assert torch.allclose(got, alone, atol=1e-4)


def test_a_local_model_compares_pairs(folder: Path, tmp_path: Path) -> None:
    a, b = pictures(2)
    judge = vlm.Judge(vlm.read_questions(write(tmp_path, local=str(folder), mode="pair")))
    found = vlm.compare(judge, [a], [b], ["x"])
    text = vlm.QUESTIONS["pair"].replace("{prompt}", "x")
    wanted = []
    for order in ([a, b], [b, a]):
        logp, tokenizer = logits_of(folder, text, order)
        # The byte tokens of both cases count, as they would in a server's list.
        p = [sum(logp[tokenizer.convert_tokens_to_ids(w)].exp() for w in (x, x.lower())) for x in ("A", "B")]
        wanted.append(float(p[0] / (p[0] + p[1])))
    assert float(found.p) == pytest.approx((wanted[0] + 1 - wanted[1]) / 2, rel=1e-3)
    assert found.bias == pytest.approx(abs(wanted[0] + wanted[1] - 1), abs=1e-4)


def test_a_local_model_writes(folder: Path) -> None:
    backend = LocalBackend(str(folder), batch=2)
    a, b = pictures(2)
    requests = [Request((image,), "say something", "x") for image in (a, b, a)]
    found = backend.texts(requests, 5)
    assert found[0] == found[2]
    assert all(found)
    assert found == [backend.texts([request], 5)[0] for request in requests]


def test_local_models_that_cannot_judge_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="cannot be loaded"):
        rewards.load(f"vlm_judge:{write(tmp_path, local=str(tmp_path / 'nothing'))}")
    with pytest.raises(RewardError, match="'maybe' is not one token of"):
        LocalBackend(str(folder)).first_tokens([Request((DARK,), "?", "x")], ["yes", "maybe"])
    for keys, message in (({}, "no server; write"), ({"server": "http://x", "local": "y"}, "server and local")):
        with pytest.raises(ConfigError, match=message):
            rewards.check_images(f"vlm_judge:{write(tmp_path, mode='yes_no', **keys)}")
    with pytest.raises(ConfigError, match="asks about pairs"):
        rewards.check_images(f"vlm_judge:{write(tmp_path, local='y', mode='verdict')}")


def test_the_identity_knows_the_model_and_not_the_place(folder: Path, tmp_path: Path) -> None:
    seen = [
        rewards.load(f"vlm_judge:{write(tmp_path, local=str(folder), **keys)}").identity()
        for keys in ({"batch": 2}, {"batch": 1}, {"processor": {"max_pixels": 1568}})
    ]
    assert seen[0] == seen[1] != seen[2]
