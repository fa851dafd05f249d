"""Rewards over HTTP: the scores are the local ones, and every way in which a server can fail has its own ending."""

from __future__ import annotations

import http.client
import logging
import math
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import save
from server_support import Reply, Scripted, running
from torch import Tensor

from diffalign import reward_server, rewards
from diffalign import reward_wire as wire
from diffalign.cli import main
from diffalign.errors import ConfigError, UserError
from diffalign.http_client import Patience, Server, ServerError, parse_url
from diffalign.reward_server import RewardServer
from diffalign.rewards import Reward, RewardError, score, score_texts
from diffalign.world.scenes import compose, draw, parse_caption, sample_captions

QUICK = "?backoff=0.01&wait=2&timeout=2"


class Probe(Reward):
    """Mean brightness plus `metadata[i]["plus"]`; waits or answers otherwise where it is told to."""

    range = (0.0, math.inf)
    unit = "brightness"
    differentiable = True
    weights = None
    licence = "none"
    gap = "none"

    def __init__(self, answer: Any = None) -> None:
        self.answer, self.sizes = answer, []

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        self.sizes.append(len(prompts))
        scores = images.mean((1, 2, 3))
        if metadata is not None:
            scores = scores + torch.tensor([entry["plus"] for entry in metadata])
        return self.answer(scores) if self.answer else scores


def hosted(reward: Any = None, name: str = "probe", **settings: Any) -> Any:
    return running(RewardServer(reward or Probe(), name, **settings))


@pytest.fixture(autouse=True)
def _own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No token from outside; `main` sets up our logger for a process of its own."""
    monkeypatch.delenv(wire.TOKEN_VARIABLE, raising=False)
    logger = logging.getLogger("diffalign")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def scripted() -> Iterator[tuple[Scripted, str]]:
    script = Scripted()
    with running(script.make()) as url:
        yield script, url
        script.released.set()


def server(url: str, **patience: float) -> Server:
    return Server(url, Patience(**{"backoff": 0.01, "wait": 2.0, "timeout": 2.0} | patience))


# ---------------------------------------------------------------- the same scores


def test_scores_are_the_local_ones_to_the_bit():
    captions = sample_captions(5, seed=0)
    images = torch.stack(list(draw([compose(parse_caption(c), random.Random(0)) for c in captions])))
    local = rewards.load("world_taste:outlined")
    with hosted(local, "world_taste:outlined", max_batch=2) as url:
        remote = rewards.load(f"remote:{url}{QUICK}")
        assert torch.equal(score(remote, images, captions), score(local, images, captions))


@pytest.mark.parametrize("on_grid", [True, False])
def test_pictures_and_metadata_arrive_without_loss(on_grid: bool):
    images = torch.rand(5, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    if on_grid:
        images = (images * 255).round() / 255
    prompts, metadata = [f"prömpt {i}\n\"'" for i in range(5)], [{"plus": i, "note": ["ü", None]} for i in range(5)]
    body = wire.encode_pictures(images, prompts, metadata)
    assert len(body) < images.numel() * (2 if on_grid else 5) + 1000
    got, texts, facts = wire.decode_pictures(body)
    assert torch.equal(got, images)
    assert (texts, facts) == (prompts, metadata)
    probe = Probe()
    with hosted(probe, max_batch=2) as url:
        remote = rewards.load(f"remote:{url}{QUICK}")
        assert torch.equal(score(remote, images, prompts, metadata), score(Probe(), images, prompts, metadata))
    assert probe.sizes == [2, 2, 1]


def test_requests_are_split_by_bytes_as_well():
    probe = Probe()
    with hosted(probe, max_bytes=(1 << 20) + 3 * 8 * 8 * 4 * 2) as url:
        remote = rewards.load(f"remote:{url}{QUICK}")
        score(remote, torch.rand(5, 3, 8, 8), ["p"] * 5)
        assert probe.sizes == [2, 2, 1]
        with pytest.raises(RewardError, match=r"takes \d+ bytes a request, a picture of \(3, 16, 16\) has 3072"):
            score(remote, torch.rand(1, 3, 16, 16), ["p"])


def test_the_client_knows_what_it_asks(caplog: pytest.LogCaptureFixture):
    local = rewards.load("world_verifier")
    with hosted(local, "world_verifier", max_batch=7) as url:
        with caplog.at_level("INFO", "diffalign"):
            remote: Any = rewards.load(f"remote:{url}{QUICK}")
        health = remote.health
    assert (health.reward, health.kind, health.range, health.max_batch) == ("world_verifier", "images", (0.0, 1.0), 7)
    assert (health.unit, health.licence) == (local.unit, local.licence)
    assert remote.identity() == rewards.identity("world_verifier", local)
    assert "Apache-2.0" in caplog.text
    with RewardServer(Probe(), "x") as server:
        assert wire.Health.from_json(server.health.to_json(), "u").range == (0.0, math.inf)


def test_texts_and_missing_opinions():
    with hosted(rewards.load_text("text_world:polite"), "text_world:polite") as url:
        remote = rewards.load_text(f"remote_text:{url}{QUICK}")
        prompts, answers = ["what is 17 + 26?", "what is 3 + 4?"], ["the result is 43, happy to help.", "it is 7."]
        local = score_texts(rewards.load_text("text_world:polite"), prompts, answers)
        assert torch.equal(score_texts(remote, prompts, answers), local)
        assert "text_world:polite at http" in remote.name
        with pytest.raises(ConfigError, match=r"judges texts; name it remote_text:http"):
            rewards.load(f"remote:{url}{QUICK}")


def test_a_function_without_an_opinion(tmp_path: Path):
    file = tmp_path / "length.py"
    file.write_text("def length(prompts, completions, **columns):\n    return [len(c) or None for c in completions]\n")
    with running(RewardServer(reward_server.load_any(f"{file}:length"), f"{file}:length", max_batch=1)) as url:
        remote = rewards.load_text(f"remote_text:{url}{QUICK}")
        values = score_texts(remote, ["p"] * 3, ["abc", "", "a"], missing=True).tolist()
        assert (values[0], math.isnan(values[1]), values[2]) == (3, True, 1)
        with pytest.raises(RewardError, match="NaN or infinity for the prompts 'q'"):
            score_texts(remote, ["p", "q"], ["abc", ""])


class Crowd(Probe):
    """How many pictures of its prompt came with a picture, itself included."""

    grouped = True

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        self.sizes.append(len(prompts))
        return torch.tensor([float(prompts.count(prompt)) for prompt in prompts])


def test_pictures_of_a_prompt_come_in_one_request_where_they_are_compared():
    crowd, prompts = Crowd(), ["a", "b", "a", "c", "b", "a"]
    with hosted(crowd, max_batch=3) as url:
        remote = rewards.load(f"remote:{url}{QUICK}")
        assert remote.grouped
        assert score(remote, torch.rand(6, 3, 4, 4), prompts).tolist() == [3, 2, 3, 1, 2, 3]
        assert crowd.sizes == [3, 3]
        with pytest.raises(RewardError, match=r"takes 3 at a time; 'a' has 4: start it with a larger --max-batch"):
            score(remote, torch.rand(4, 3, 4, 4), ["a"] * 4)


# ---------------------------------------------------------------- what the reward got wrong


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda s: torch.where(torch.arange(len(s)) == 1, math.nan, s), r"NaN or infinity for the prompts 'dog'$"),
        (lambda s: s[:, None], r"shape \(3, 1\) instead of \(3,\) for the prompts 'cat', 'dog', 'cow'"),
        (lambda s: 1 / 0, r"answered 500: the reward failed: ZeroDivisionError"),
    ],
)
def test_a_broken_reward_is_named_with_its_prompts(answer: Any, message: str):
    probe = Probe(answer)
    with hosted(probe) as url:
        remote = rewards.load(f"remote:{url}{QUICK}")
        with pytest.raises(UserError, match=message) as caught:
            score(remote, torch.rand(3, 3, 4, 4), ["cat", "dog", "cow"])
        assert url in str(caught.value)
        assert len(probe.sizes) == 1  # asking again would not mend it
        probe.answer = None
        assert score(remote, torch.rand(1, 3, 4, 4), ["cat"]).shape == (1,)  # the server is still there


def test_metadata_that_cannot_travel():
    with hosted() as url:
        remote = rewards.load(f"remote:{url}{QUICK}")
        with pytest.raises(RewardError, match=r"metadata cannot travel .* only texts, numbers, lists"):
            score(remote, torch.rand(1, 3, 4, 4), ["p"], [{"references": [torch.rand(3, 2, 2)]}])


# ---------------------------------------------------------------- servers that are gone, busy, slow


def test_a_busy_server_is_waited_for_as_long_as_it_says(scripted: tuple[Scripted, str]):
    script, url = scripted
    script.replies = [Reply(503, {"error": "busy"}, {"Retry-After": "0.2"}), Reply(502), Reply(200, {"a": 1})]
    started = time.monotonic()
    assert server(url).get("/x") == {"a": 1}
    assert 0.2 <= time.monotonic() - started < 1.5
    assert len(script.seen) == 3


def test_a_full_queue_answers_503_and_the_others_are_served():
    entered, release = threading.Event(), threading.Event()

    def slow(scores: Tensor) -> Tensor:
        entered.set()
        assert release.wait(10)
        return scores

    with hosted(Probe(slow), queue=1) as url:
        remote = rewards.load(f"remote:{url}{QUICK}")
        first = threading.Thread(target=score, args=(remote, torch.rand(1, 3, 4, 4), ["p"]))
        first.start()
        assert entered.wait(10)
        body = wire.encode_pictures(torch.rand(1, 3, 4, 4), ["p"], None)
        status, headers, answer = raw(url, body)
        assert (status, headers["Retry-After"]) == (503, "1")
        assert b"too many requests" in answer
        with pytest.raises(ServerError, match=r"answered 503 busy: too many requests are waiting, 1 tries"):
            server(url, wait=0).post("/score", body)
        assert server(url).get("/health")["reward"] == "probe"  # health has no queue
        release.set()
        first.join()
        assert score(remote, torch.rand(1, 3, 4, 4), ["p"]).shape == (1,)


def test_nobody_scores_for_a_client_that_has_left():
    entered, release, probe = threading.Event(), threading.Event(), Probe()

    def slow(scores: Tensor) -> Tensor:
        entered.set()
        assert release.wait(10)
        return scores

    probe.answer = slow
    with hosted(probe) as url:
        remote = rewards.load(f"remote:{url}{QUICK}")
        first = threading.Thread(target=score, args=(remote, torch.rand(1, 3, 4, 4), ["p"]))
        first.start()
        assert entered.wait(10)
        with pytest.raises(ServerError, match="time-out"):  # behind the first
            server(url, timeout=0.1, wait=0).post(
                "/score", wire.encode_pictures(torch.rand(2, 3, 4, 4), ["p"] * 2, None)
            )
        release.set()
        first.join()
        assert score(remote, torch.rand(3, 3, 4, 4), ["p"] * 3).shape == (3,)
    assert probe.sizes == [1, 3]


def test_slow_and_broken_answers_are_tried_again(scripted: tuple[Scripted, str]):
    script, url = scripted
    script.replies = [Reply(silent=5), Reply(body={"a": 1}, cut=True), Reply(504), Reply(200, {"a": 2})]
    assert server(url, timeout=0.15).get("/x") == {"a": 2}
    assert len(script.seen) == 4


def test_a_server_that_comes_back():
    with hosted() as url:
        remote = rewards.load(f"remote:{url}{QUICK.replace('wait=2', 'wait=20')}")
    got: list[Tensor] = []
    images = torch.rand(2, 3, 4, 4)
    client = threading.Thread(target=lambda: got.append(score(remote, images, ["a", "b"])))
    client.start()
    time.sleep(0.05)  # a few tries in vain
    assert not got
    with hosted(port=urlsplit(url).port):
        client.join(10)
    assert torch.equal(got[0], images.mean((1, 2, 3)))


def test_waiting_ends(caplog: pytest.LogCaptureFixture):
    with hosted() as url:
        pass
    started = time.monotonic()
    with pytest.raises(
        ServerError, match=r"/health does not answer \(Connection refused\), \d+ tries in 0 s\. Is it running"
    ):
        rewards.load(f"remote:{url}?wait=0.2&backoff=0.01")
    assert 0.2 <= time.monotonic() - started < 1.5
    assert caplog.text.count("trying again") == 1


def test_pauses_grow_and_have_jitter(monkeypatch: pytest.MonkeyPatch):
    with hosted() as url:
        pass
    now, pauses = [0.0], []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    monkeypatch.setattr("diffalign.http_client.time.sleep", sleep)
    monkeypatch.setattr("diffalign.http_client.time.monotonic", lambda: now[0])
    state = torch.get_rng_state()
    with pytest.raises(ServerError):
        server(url, wait=100, backoff=1).get("/x")
    assert sum(pauses) == pytest.approx(100)
    for k, pause in enumerate(pauses[:-1]):
        assert min(30, 2**k) / 2 <= pause <= min(30, 2**k)
    assert len({p / min(30, 2**k) for k, p in enumerate(pauses)}) == len(pauses)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 500])
def test_what_is_asked_wrongly_is_not_asked_again(scripted: tuple[Scripted, str], status: int):
    script, url = scripted
    script.last = Reply(status, {"error": {"message": "no such thing"}})
    with pytest.raises(ServerError, match=rf"{url}/x answered {status}: no such thing"):
        server(url).get("/x")
    assert len(script.seen) == 1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"<html>", "answered b'<html>'; JSON expected"),
        ({"status": "ok"}, "is no reward server; start one with: diffalign serve-reward"),
        ({"service": "diffalign-reward", "protocol": 2}, "speaks protocol 2, this is 1; install the same version"),
        ({"service": "diffalign-reward", "protocol": 1}, "facts cannot be read"),
    ],
)
def test_other_servers_are_found_out(scripted: tuple[Scripted, str], reply: Any, message: str):
    script, url = scripted
    script.last = Reply(200, reply)
    with pytest.raises(UserError, match=message):
        rewards.load(f"remote:{url}{QUICK}")


@pytest.mark.parametrize(
    "answer", [{"scores": [1.0]}, {"scores": [1, "2"]}, {"scores": None}, [], {"scores": [True, 1]}]
)
def test_wrong_scores_are_found_out(answer: Any):
    with pytest.raises(wire.WireError, match="http://u returned"):
        wire.decode_scores(answer, 2, "http://u")


# ---------------------------------------------------------------- what a server refuses


def raw(url: str, body: bytes, path: str = "/score", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    found = response.status, dict(response.getheaders()), response.read()
    connection.close()
    return found


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch exploded",)


def test_nothing_that_is_sent_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    good = {"protocol": "1", "prompts": '["a"]'}
    pixels = {"images": torch.zeros(1, 3, 4, 4)}
    bodies = [
        pickle.dumps(Bomb()),
        b"",
        b"\xff" * 100,
        save(pixels),
        save(pixels, good | {"protocol": "9"}),
        save(pixels, good | {"prompts": '"a"'}),
        save(pixels, good | {"metadata": "[1]"}),
        save({"other": pixels["images"]}, good),
        save({"images": torch.zeros(1, 3, 4, 4, dtype=torch.int64)}, good),
        save(pixels, good)[:-5],
    ]
    with hosted() as url:
        for body in bodies:
            status, _, answer = raw(url, body)
            assert status == 400, answer
            assert b"error" in answer
        assert raw(url, save({"images": torch.zeros(2, 3, 4, 4)}, good))[0] == 422  # two pictures, one prompt
        assert raw(url, save({"images": torch.full((1, 3, 4, 4), math.nan)}, good))[0] == 422
        assert raw(url, save(pixels, good))[0] == 200
    assert not (tmp_path / "exploded").exists()


def test_sizes_and_paths_are_limited():
    with hosted(max_batch=2, max_bytes=1 << 20) as url:
        assert raw(url, b"x" * ((1 << 20) + 1))[0] == 413
        assert raw(url, wire.encode_pictures(torch.rand(3, 3, 4, 4), ["p"] * 3, None))[0] == 413
        assert raw(url, b"x" * (1 << 19), path="/elsewhere")[0] == 404
        with pytest.raises(ServerError, match="no such path"):
            server(url).get("/metrics")


def test_the_token_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    with hosted(token="secret") as url:
        for token in (None, "wrong", "sécret"):
            monkeypatch.setenv(wire.TOKEN_VARIABLE, token) if token else None
            with pytest.raises(UserError, match="token"):
                rewards.load(f"remote:{url}{QUICK}")
        assert raw(url, b"x")[0] == 401
        monkeypatch.setenv(wire.TOKEN_VARIABLE, "secret")
        remote = rewards.load(f"remote:{url}{QUICK}")
        assert score(remote, torch.ones(1, 3, 4, 4), ["p"]).tolist() == [1.0]


# ---------------------------------------------------------------- names and the command


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("remote:localhost:8021", "is no address of a server; write it like http://127.0.0.1:8021"),
        ("remote:http://", "is no address"),
        ("remote:http://h:x", "is no address"),
        ("remote:ftp://h", "is no address"),
        ("remote:http://h?wiat=3", r"unknown key 'wiat' .*; did you mean 'wait'\?"),
        ("remote:http://h?wait=long", "wait is 'long'; a number of seconds expected"),
        ("remote:http://h?timeout=0", "timeout is '0'"),
        ("remote_text:h", "is no address"),
    ],
)
def test_wrong_addresses_are_refused_without_asking(name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        rewards.find(name)


def test_the_address_may_stand_in_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MY_SERVER", raising=False)
    for name in ("remote:$MY_SERVER", "remote_text:$MY_SERVER"):
        with pytest.raises(ConfigError, match=r"\$MY_SERVER is not set; set it to the address"):
            rewards.find(name)
    monkeypatch.setenv("MY_SERVER", "nonsense")
    with pytest.raises(ConfigError, match="'nonsense' is no address"):
        rewards.find("remote:$MY_SERVER")
    with hosted() as url:
        monkeypatch.setenv("MY_SERVER", url + QUICK)
        moved: Any = rewards.load("remote:$MY_SERVER")
        assert (moved.server.url, moved.server.patience.wait) == (url, 2)


def test_addresses_are_read():
    url, patience = parse_url("http://host:1/base/?wait=600&timeout=5", "x")
    assert (url, patience) == ("http://host:1/base", Patience(wait=600, timeout=5))


def test_the_command_serves_until_it_is_stopped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    made: list[RewardServer] = []
    serve = reward_server.serve

    def watched(server: RewardServer) -> None:
        made.append(server)

        def ask() -> None:
            made.append(Server(server.url, Patience(wait=2)).get("/health"))
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=ask).start()
        serve(server)

    monkeypatch.setattr(reward_server, "serve", watched)
    before = signal.getsignal(signal.SIGTERM)
    argv = ["serve-reward", "world_taste:ada@0.3", "--port", "0", "--device", "cpu", "--max-batch", "5"]
    assert main(argv) == 0
    assert signal.getsignal(signal.SIGTERM) == before
    server, health = made
    assert (health["reward"], health["max_batch"]) == ("world_taste:ada@0.3", 5)  # type: ignore[index]
    assert f"use it as remote:{server.url}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pickscor"], "did you mean 'pickscore'?"),
        (["world_verifier", "--device", "gpu7"], "device 'gpu7' cannot be used"),
        (["world_verifier", "--max-batch", "0"], "--max-batch is 0; at least 1 expected"),
        (["world_verifier", "--port", "99999999"], "cannot listen at 127.0.0.1:99999999"),
    ],
)
def test_the_command_refuses(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["serve-reward", *argv]) == 2
    assert message in capsys.readouterr().err
