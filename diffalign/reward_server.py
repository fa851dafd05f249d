"""A reward behind HTTP: `diffalign serve-reward`. What travels is described in `diffalign.reward_wire`.

    GET  /health   what the reward states about itself, and the limits of this server
    POST /score    a batch of pictures or texts

One request is scored at a time, since the reward has one device; a few more may wait. When too many wait, the answer is
503 with `Retry-After`, and the client waits instead of the server's memory filling up. 400 is a request that cannot be
read, 401 a wrong token, 413 one that is too large, 422 something that the reward cannot score or scored as NaN, with the
prompts it belongs to.
"""

from __future__ import annotations

import hmac
import json
import logging
import math
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

import torch

from diffalign import reward_wire as wire
from diffalign import rewards
from diffalign.errors import ConfigError, UserError
from diffalign.rewards import Reward, TextReward

log = logging.getLogger(__name__)

IDLE_SECONDS = 60.0  # without a byte from a client


class _RefusedError(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


class RewardServer(ThreadingHTTPServer):
    """Hosts one loaded reward; `serve_forever` runs it, `shutdown` ends it.

    Args:
        reward: of pictures or of texts.
        name: as it was named.
        host: address to listen at.
        port: 0 takes any that is free; `url` tells which.
        device: where the reward was loaded.
        max_batch: pictures or texts in a request and in a call of the reward.
        max_bytes: of a request.
        queue: requests that may wait or be scored at the same time.
        token: demanded of every request, if there is one.
    """

    daemon_threads = True
    request_queue_size = 128  # connections that are not accepted yet: many processes may start at once

    def __init__(
        self,
        reward: Reward | TextReward,
        name: str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        device: torch.device | str = "cpu",
        max_batch: int = 32,
        max_bytes: int = wire.MAX_BYTES,
        queue: int = 8,
        token: str | None = None,
    ) -> None:
        for what, value in (("max-batch", max_batch), ("max-bytes", max_bytes), ("queue", queue)):
            if value < 1:
                raise ConfigError(f"serve-reward: --{what} is {value}; at least 1 expected")
        if isinstance(reward, Reward) and reward.sets:
            raise ConfigError(
                f"serve-reward: reward {name!r} compares all pictures of a call, and clients cut theirs into requests; name "
                "it in the run itself"
            )
        self.reward, self.device, self.token = reward, device, token
        low, high = reward.range
        self.health = wire.Health(
            protocol=wire.PROTOCOL,
            reward=name,
            kind="images" if isinstance(reward, Reward) else "texts",
            range=(low, high),
            unit=reward.unit,
            licence=reward.licence,
            gap=reward.gap,
            weights=reward.weights,
            identity=rewards.identity(name, reward),
            max_batch=max_batch,
            max_bytes=max_bytes,
            clips=isinstance(reward, Reward) and reward.clips,
            grouped=isinstance(reward, Reward) and reward.grouped,
        )
        self._places = threading.BoundedSemaphore(queue)
        self._turn = threading.Lock()
        self._seconds = 0.0  # that the last batch took
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"serve-reward: cannot listen at {host}:{port} ({reason}); choose another --port"
            ) from error

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def server_bind(self) -> None:
        # http.server's own asks the name service for the host's full name, which may take long and is not needed.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def score(self, body: bytes, gone: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Score the body of a request; the answer as JSON.

        Args:
            body: see `diffalign.reward_wire`.
            gone: tells, when the request's turn has come, whether its client has left.

        Raises:
            _RefusedError: it cannot be read, is too large, or cannot be scored; or nobody waits for the answer.
        """
        try:
            if isinstance(self.reward, Reward):
                images, prompts, metadata = wire.decode_pictures(body)
                completions: list[str] = []
            else:
                prompts, completions, metadata = wire.decode_texts(body)
        except wire.WireError as error:
            raise _RefusedError(400, str(error)) from error
        if len(prompts) > self.health.max_batch:
            raise _RefusedError(413, f"{len(prompts)} items in a request; at most {self.health.max_batch}")
        with self._turn, torch.no_grad():
            if gone():  # it has asked again since: scoring this one too would hold up the others
                raise _RefusedError(503, "the client has left")
            started = time.monotonic()
            try:
                if isinstance(self.reward, Reward):
                    scores = rewards.score(
                        self.reward, images, prompts, metadata, batch_size=self.health.max_batch, device=self.device
                    )
                else:
                    scores = rewards.score_texts(
                        self.reward, prompts, completions, metadata, batch_size=self.health.max_batch, missing=True
                    )
            except UserError as error:
                raise _RefusedError(422, str(error)) from error
            except torch.OutOfMemoryError as error:
                torch.cuda.empty_cache()
                raise _RefusedError(500, "out of memory; start the server with a smaller --max-batch") from error
            except Exception as error:  # a reward may raise anything; the server stays up
                log.exception("the reward failed")
                raise _RefusedError(500, f"the reward failed: {type(error).__name__}: {str(error)[:300]}") from error
            self._seconds = time.monotonic() - started
        return wire.encode_scores(scores)

    def enter(self) -> None:
        """Take a place in the queue.

        Raises:
            _RefusedError: all are taken.
        """
        if not self._places.acquire(blocking=False):
            raise _RefusedError(503, "too many requests are waiting", retry_after=max(1, math.ceil(self._seconds)))

    def leave(self) -> None:
        """Give the place back."""
        self._places.release()


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        try:
            self._authorise()
            if self.path != "/health":
                raise _RefusedError(404, f"no such path {self.path!r}; there are GET /health and POST /score")
            self._answer(200, self.server.health.to_json())
        except _RefusedError as refusal:
            self._refuse(refusal)

    def do_POST(self) -> None:
        # A body that is refused is read to its end all the same: a client that still writes would see a broken pipe
        # in place of the answer.
        length = -1
        try:
            text = self.headers.get("Content-Length", "")
            if not text.isdigit():
                raise _RefusedError(411, "Content-Length is missing")
            length = int(text)
            self._authorise()
            if self.path != "/score":
                raise _RefusedError(404, f"no such path {self.path!r}; there are GET /health and POST /score")
            if length > self.server.health.max_bytes:
                raise _RefusedError(413, f"a request of {length} bytes; at most {self.server.health.max_bytes}")
            self.server.enter()
            try:
                body = self.rfile.read(length)
                if len(body) < length:
                    self.close_connection = True
                    return
                length = 0
                self._answer(200, self.server.score(body, self._gone))
            finally:
                self.server.leave()
        except _RefusedError as refusal:
            self._drain(length)
            self._refuse(refusal)

    def _gone(self) -> bool:
        """Whether the client has closed the connection; one that waits for its answer sends nothing."""
        self.connection.settimeout(0)
        try:
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:  # open, and nothing to read
            return False
        except OSError:
            return True
        finally:
            self.connection.settimeout(self.timeout)

    def _authorise(self) -> None:
        if self.server.token is None:
            return
        given = self.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.server.token}".encode()):
            raise _RefusedError(401, f"wrong or missing token; the client takes it from ${wire.TOKEN_VARIABLE}")

    def _drain(self, length: int) -> None:
        if not 0 <= length <= self.server.health.max_bytes:
            self.close_connection = True
            length = self.server.health.max_bytes if length > 0 else 0
        while length > 0 and (chunk := self.rfile.read(min(length, 1 << 20))):
            length -= len(chunk)

    def _refuse(self, refusal: _RefusedError) -> None:
        self._answer(refusal.status, {"error": str(refusal)}, refusal.retry_after)

    def _answer(self, status: int, answer: dict[str, Any], retry_after: int | None = None) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", wire.JSON)
        self.send_header("Content-Length", str(len(body)))
        if retry_after is not None:
            self.send_header("Retry-After", str(retry_after))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s %s", self.client_address[0], format % args)

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError) as error:  # a client that has gone away
            log.debug("%s: %s", self.client_address[0], error)


def load_any(name: str, device: torch.device | str = "cpu") -> Reward | TextReward:
    """Load a reward by name, whichever it judges.

    Raises:
        ConfigError, RewardError: see `rewards.load` and `rewards.load_text`.
    """
    try:
        rewards.check_text(name)
    except ConfigError:
        return rewards.load(name, device)
    return rewards.load_text(name, device)


def check_device(device: str) -> str:
    """A device that torch has here; "auto" is the first GPU, or the CPU.

    Raises:
        ConfigError: it has not.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used ({reason}); diffalign doctor lists them") from error
    return device


def serve(server: RewardServer) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    import signal

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        log.info("stopped")
    finally:
        signal.signal(signal.SIGTERM, before)
        server.server_close()
