"""A judge on an OpenAI-compatible server: what is sent, how answers are read, and every way in which they can be missing."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rewards_support import pictures
from server_support import Reply, Scripted, running

from diffalign import rewards, vlm
from diffalign.errors import ConfigError, UserError
from diffalign.http_client import ServerError
from diffalign.rewards import RewardError, score

Make = Callable[..., str]


def chat(**probabilities: float) -> Reply:
    """An answer whose first token has these probabilities; `_` stands for a blank before the token."""
    top = [{"token": t.replace("_", " "), "logprob": math.log(p), "bytes": None} for t, p in probabilities.items()]
    content = [{"token": "x", "logprob": 0.0, "top_logprobs": top}]
    return Reply(body={"choices": [{"message": {"content": "x"}, "logprobs": {"content": content}}]})


MODELS = Reply(body={"data": [{"id": "judge-7b"}, {"id": "judge-72b"}]})


class Fake(Scripted):
    """Lists its models, answers by `answer(question, pictures)`, and keeps the requests."""

    answer: Callable[[str, list[np.ndarray]], Reply]

    def __init__(self) -> None:
        super().__init__(last=self.reply)
        self.requests: list[dict[str, Any]] = []
        self.answer = lambda question, shown: chat(Yes=shown[0].mean() / 255, No=1 - shown[0].mean() / 255)

    def reply(self, path: str, body: Any) -> Reply:
        if path == "/v1/models":
            return MODELS
        assert path == "/v1/chat/completions"
        request = json.loads(body)
        self.requests.append(request)
        content = request["messages"][-1]["content"]
        shown = []
        for part in content[:-1]:
            kind, _, data = part["image_url"]["url"].partition(";base64,")
            assert kind == "data:image/png"
            shown.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
        return self.answer(content[-1]["text"], shown)


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def make(fake: Fake, tmp_path: Path) -> Iterator[Make]:
    """Write questions for the fake server; the name of the file."""
    with running(fake.make()) as url:

        def write(patience: str = "wait=2&timeout=2&backoff=0.01", **keys: Any) -> str:
            file = tmp_path / "questions.yaml"
            file.write_text(yaml.safe_dump({"server": f"{url}/v1?{patience}"} | keys))
            return str(file)

        yield write
        fake.released.set()


# ---------------------------------------------------------------- reading


def logs(**probabilities: float) -> dict[str, float]:
    return {token.replace("_", " "): math.log(p) for token, p in probabilities.items()}


def test_yes_among_yes_and_no() -> None:
    answer = vlm.yes_probability(logs(Yes=0.3, _yes=0.1, YES=0.05, No=0.1, _NO=0.05, Maybe=0.4))
    assert (answer.value, answer.mass) == pytest.approx((0.45 / 0.6, 0.6))
    swapped = vlm.yes_probability(logs(No=0.3, _no=0.1, NO=0.05, Yes=0.1, _YES=0.05, Maybe=0.4))
    assert swapped.value == pytest.approx(1 - answer.value)
    assert vlm.yes_probability(logs(_Yes=0.2)).value == 1
    for token in ("▁Yes", "ĠYes", "\nyes", "Yes "):
        assert vlm.yes_probability({token: -1.0}).value == 1
    for top in ({}, logs(Maybe=0.9), logs(Yesterday=0.5, Not=0.5)):
        answer = vlm.yes_probability(top)
        assert math.isnan(answer.value)
        assert answer.mass == 0


def test_expected_rating() -> None:
    assert vlm.expected_rating({"1": math.log(0.2), " 5": math.log(0.2), "5": math.log(0.1), "x": -0.1}).value == (
        pytest.approx((0.2 * 1 + 0.3 * 5) / 0.5)
    )
    uniform = {str(k): math.log(0.1) for k in range(10)}
    assert vlm.expected_rating(uniform, 5).value == pytest.approx(3)
    assert vlm.expected_rating(uniform, 5).mass == pytest.approx(0.5)  # 0 and 6 to 9 are no ratings
    assert vlm.expected_rating(uniform, 9).value == pytest.approx(5)
    assert math.isnan(vlm.expected_rating({"10": -0.1, "0": -0.1}, 5).value)


# ---------------------------------------------------------------- as a reward


def test_scores_are_the_probabilities(make: Make, fake: Fake) -> None:
    images = pictures(20)
    judge = rewards.load(f"vlm_judge:{make(workers=4)}")
    assert judge.waits
    got = score(judge, images, [f"p{i}" for i in range(20)])
    assert torch.allclose(got, images.mean((1, 2, 3)), atol=1e-5)  # in order, although four are asked at a time
    assert {r["messages"][-1]["content"][-1]["text"] for r in fake.requests} == {
        f'Does this picture show "p{i}"? Answer with Yes or No.' for i in range(20)
    }


def test_what_is_sent(make: Make, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(vlm.TOKEN_VARIABLE, "key")
    seen = []
    fake.answer = lambda question, shown: seen.append(shown[0]) or chat(**{"4": 1.0})  # type: ignore[func-returns-value]
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    file = make(mode="rating", scale=7, model="judge-72b", system="Be strict.", top_logprobs=9, extra=extra)
    images = pictures(1)
    assert score(rewards.load(f"vlm_judge:{file}"), images, ['{scale} "quotes" {prompt}']).tolist() == [4.0]
    (request,) = fake.requests
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("judge-72b", 1, 0)
    assert (request["logprobs"], request["top_logprobs"]) == (True, 9)
    assert request["chat_template_kwargs"] == {"enable_thinking": False}
    assert request["messages"][0] == {"role": "system", "content": "Be strict."}
    text = request["messages"][1]["content"][1]["text"]
    assert text.startswith('How well does this picture show "{scale} "quotes" {prompt}"? ')
    assert text.endswith("1 (not at all) to 7 (perfectly).")
    assert (seen[0] == (images[0] * 255).round().byte().movedim(0, -1).numpy()).all()  # without loss


def test_answers_that_cannot_be_read_are_counted_and_missing(
    make: Make, fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    replies = {"good": chat(Yes=0.9), "odd": chat(Perhaps=0.6, Sure=0.3)}
    silent = Reply(body={"choices": [{"logprobs": {"content": []}}]})
    fake.answer = lambda question, shown: next((r for key, r in replies.items() if key in question), silent)
    judge: Any = rewards.load(f"vlm_judge:{make()}")
    prompts = ["good", "odd", "silence", "good too"]
    assert score(judge, pictures(4), prompts, missing=True).isnan().tolist() == [False, True, True, False]
    assert (judge.judge.asked, judge.judge.failed) == (4, 2)
    assert "2 of 4 answers could not be read; to 'odd' the model says 'Perhaps', 'Sure'" in caplog.text
    with pytest.raises(RewardError, match=r"NaN or infinity for the prompts 'odd', 'silence'$"):
        score(judge, pictures(4), prompts)


def test_a_model_that_wants_to_say_something_else(make: Make, fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    fake.answer = lambda question, shown: chat(**{"<think>": 0.9, "Yes": 0.04, "No": 0.01})
    assert score(rewards.load(f"vlm_judge:{make()}"), pictures(1), ["p"]).tolist() == pytest.approx([0.8])
    assert "have only 0.05 of the probability; does the model think first?" in caplog.text


def test_slow_crashed_and_busy_servers_are_asked_again(make: Make, fake: Fake) -> None:
    judge = rewards.load(f"vlm_judge:{make('wait=5&timeout=0.2&backoff=0.01', workers=1)}")
    fake.replies = [Reply(silent=5), Reply(body={"choices": 1}, cut=True), Reply(503, {}, {"Retry-After": "0"})]
    images = pictures(2)
    assert torch.allclose(score(judge, images, ["a", "b"]), images.mean((1, 2, 3)), atol=1e-5)
    assert len(fake.seen) == 1 + 2 + 3


def test_a_server_that_stays_away(make: Make, fake: Fake, tmp_path: Path) -> None:
    with running(Scripted(last=MODELS).make()) as url:
        file = make(server=f"{url}/v1?wait=0.2&backoff=0.01")
        judge = rewards.load(f"vlm_judge:{file}")
    before = threading.active_count()
    with pytest.raises(ServerError, match=r"does not answer \(Connection refused\).*asked about 'p'"):
        score(judge, pictures(3), ["p"] * 3)
    assert threading.active_count() <= before
    with pytest.raises(ServerError, match="does not answer"):
        rewards.load(f"vlm_judge:{file}")


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(400, {"error": {"message": "too many tokens"}}), r"answered 400: too many tokens \(asked about 'p'\)"),
        (Reply(body={"choices": [{"logprobs": None}]}), "sends no log-probabilities"),
        (Reply(body={"choices": []}), "sends no log-probabilities"),
        (
            Reply(body={"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "a"}]}]}}]}),
            "log-probabilities",
        ),
        (Reply(body=b"<html>"), "JSON expected"),
    ],
)
def test_what_asking_again_would_not_mend(make: Make, fake: Fake, reply: Reply, message: str) -> None:
    fake.answer = lambda question, shown: reply
    with pytest.raises(UserError, match=message):
        score(rewards.load(f"vlm_judge:{make()}"), pictures(1), ["p"])
    assert len(fake.requests) == 1


def test_the_model_has_to_be_there(make: Make, fake: Fake) -> None:
    with pytest.raises(
        RewardError, match=r"no model 'judge-8b'; did you mean 'judge-7b'\? It has: judge-7b, judge-72b"
    ):
        rewards.load(f"vlm_judge:{make(model='judge-8b')}")
    fake.replies = [Reply(body={"object": "list"})]
    with pytest.raises(RewardError, match="lists no models"):
        rewards.load(f"vlm_judge:{make()}")
    assert rewards.load(f"vlm_judge:{make()}").judge.model == "judge-7b"  # type: ignore[attr-defined]


def test_the_identity_knows_what_is_asked_of_whom(make: Make) -> None:
    seen = [
        rewards.load(f"vlm_judge:{make(**keys)}").identity()
        for keys in ({}, {"question": "Is it good?"}, {"model": "judge-72b"}, {"mode": "rating"}, {"workers": 2})
    ]
    assert len(set(seen)) == 4  # the number of workers changes nothing
    assert seen[0] == seen[-1]


# ---------------------------------------------------------------- pairs


def test_pairs_are_asked_in_both_orders(make: Make, fake: Fake) -> None:
    """A judge that looks at brightness and adds 0.2 for the first place."""

    def answer(question: str, shown: list[np.ndarray]) -> Reply:
        a, b = (float(picture.mean()) for picture in shown)
        p = min(0.99, (0.9 if a > b else 0.5 if a == b else 0.1) * 0.8 + 0.2)
        return chat(A=0.5 * p, _a=0.3 * p, B=0.8 * (1 - p), C=0.2)

    fake.answer = answer
    judge = vlm.Judge(vlm.read_questions(make(mode="pair")))
    dark, bright = torch.full((2, 3, 4, 4), 0.2), torch.full((2, 3, 4, 4), 0.8)
    dark[1] = bright[1]
    found = vlm.compare(judge, bright, dark, ["p", "q"])
    assert len(fake.requests) == 4
    assert found.p.tolist() == pytest.approx([(0.92 + 1 - 0.28) / 2, 0.5])
    assert found.tie.tolist() == [False, True]  # each order prefers its first picture
    assert found.bias == pytest.approx((0.2 + 0.2) / 2)
    back = vlm.compare(judge, dark, bright, ["p", "q"])
    assert torch.allclose(back.p, 1 - found.p)
    assert back.bias == pytest.approx(found.bias)


def test_half_an_answer_is_none(make: Make, fake: Fake) -> None:
    fake.answer = lambda question, shown: chat(A=0.9) if shown[0].mean() > shown[1].mean() else chat(Hm=1.0)
    judge = vlm.Judge(vlm.read_questions(make(mode="pair")))
    found = vlm.compare(judge, torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), ["p"])
    assert found.p.isnan().all()
    assert math.isnan(found.bias)
    with pytest.raises(ConfigError, match="compare needs mode: pair"):
        vlm.compare(vlm.Judge(vlm.read_questions(make())), torch.ones(1, 3, 4, 4), torch.ones(1, 3, 4, 4), ["p"])


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"server": None}, "no server; write server: http"),
        ({"server": "localhost:8000"}, "is no address of a server"),
        ({"modle": "x"}, "modle: unknown key; did you mean 'mode"),
        ({"mode": "yesno"}, "mode 'yesno'; did you mean 'yes_no'"),
        ({"mode": "pair"}, "asks about pairs, which are no scores"),
        ({"scale": 10}, "scale is 10; 2 to 9 expected"),
        ({"scale": "5"}, "scale is '5'; int expected"),
        ({"workers": 0}, "workers is 0; 1 to 256"),
        ({"extra": []}, r"extra is \[\]; dict expected"),
        ({"question": "Is this {promt}?"}, r"question has \{promt\}; \{prompt\} and \{scale\}"),
    ],
)
def test_wrong_questions_are_refused_before_asking(make: Make, fake: Fake, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rewards.check_images(f"vlm_judge:{make(**keys)}")
    assert fake.seen == []


def test_a_file_is_needed(tmp_path: Path) -> None:
    for name, message in (
        ("vlm_judge", "no questions; write"),
        (f"vlm_judge:{tmp_path / 'no.yaml'}", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            rewards.check_images(name)
