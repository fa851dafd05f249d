"""Requests to a server of scores that may be slow, busy or gone for a while: time-outs, retries, waiting.

Connection errors, time-outs and the answers 429, 502, 503 and 504 are tried again, with exponential back-off and jitter,
until `wait` seconds have passed since the first failure of a request; a `Retry-After` is honoured. Every other answer that
is not 200 is final: what was asked is wrong, and asking again does not mend it. Proxies of the environment are not used.
"""

from __future__ import annotations

import http.client
import json
import logging
import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from diffalign.errors import ConfigError, UserError, did_you_mean

log = logging.getLogger(__name__)

PASSING = {429: "too many requests", 502: "bad gateway", 503: "busy", 504: "gateway time-out"}  # may soon be over
MOST_BYTES = 64 << 20  # of an answer
LONGEST_PAUSE = 30.0  # seconds between two tries, unless the server names another


class ServerError(UserError):
    """A server that does not answer, or whose answer is of no use."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for a server.

    Attributes:
        connect: seconds until a connection must stand.
        timeout: seconds without a byte of the answer.
        wait: seconds that a request may be tried again after its first failure, all tries together.
        backoff: seconds before the second try; doubled from try to try, times a random number in [0.5, 1].
    """

    connect: float = 10.0
    timeout: float = 120.0
    wait: float = 300.0
    backoff: float = 0.5


def parse_url(text: str, what: str) -> tuple[str, Patience]:
    """The address without its query, and the patience that the query sets, as in `http://host:8021?wait=600`.

    Raises:
        ConfigError: no such address, or a key that does not exist.
    """
    parts = urlsplit(text)
    try:
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number
        fine = False
    if not fine or parts.username or parts.fragment:
        raise ConfigError(f"{what}: {text!r} is no address of a server; write it like http://127.0.0.1:8021")
    known = [field.name for field in fields(Patience)]
    values: dict[str, float] = {}
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        if key not in known:
            raise ConfigError(
                f"{what}: unknown key {key!r} in {text!r}{did_you_mean(key, known)} Known: {', '.join(known)}"
            )
        try:
            values[key] = float(value)
        except ValueError:
            values[key] = math.nan
        if not 0 <= values[key] < math.inf or (key in ("connect", "timeout") and not values[key]):
            raise ConfigError(f"{what}: {key} is {value!r}; a number of seconds expected")
    return parts._replace(query="").geturl().rstrip("/"), replace(Patience(), **values)


class Server:
    """A server at one address; every request is a connection of its own, so that threads may share it.

    Args:
        url: `http(s)://host:port`, perhaps with a path that comes before every path asked for.
        patience: see `Patience`.
        token: sent as `Authorization: Bearer`.
        what: how messages call the server.
    """

    def __init__(self, url: str, patience: Patience, *, token: str | None = None, what: str = "server") -> None:
        self.url, self.patience, self.what = url, patience, what
        self._parts = urlsplit(url)
        if token and not (token.isascii() and token.isprintable()):
            raise ConfigError(f"{what} {url}: the token holds other than printable ASCII characters; choose another")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._random = random.Random()  # its own: jitter must not move the seeds of a run

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return self._json(path, self.request("GET", path))

    def post(self, path: str, body: bytes, content_type: str = "application/json") -> Any:
        """Send a body, and return the JSON of the answer."""
        return self._json(path, self.request("POST", path, body, {"Content-Type": content_type}))

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> bytes:
        """One request with its retries.

        Returns:
            The body of the answer.

        Raises:
            ServerError: it did not come in time, or is final and not 200.
        """
        first: float | None = None
        tries = 0
        while True:
            pause = 0.0
            try:
                status, pause, answer = self._once(method, path, body, headers or {})
                if status == 200:
                    return answer
                trouble = f"answered {status} {PASSING.get(status, '')}".rstrip()
                if status not in PASSING:
                    raise ServerError(f"{self.what} {self.url}{path} {trouble}: {_message(answer)}{_advice(status)}")
                trouble += f": {_message(answer)}"
            except (OSError, http.client.HTTPException) as error:
                trouble = f"does not answer ({_reason(error)})"
            tries += 1
            now = time.monotonic()
            if first is None:
                first = now
                log.warning("%s %s %s; trying again for %g s", self.what, self.url, trouble, self.patience.wait)
            left = first + self.patience.wait - now
            if left <= 0:
                raise ServerError(
                    f"{self.what} {self.url}{path} {trouble}, {tries} tries in {now - first:.0f} s. Is it running and "
                    "reachable from here? A longer wait is set with ?wait=SECONDS after the address"
                )
            grown = min(LONGEST_PAUSE, self.patience.backoff * 2.0 ** min(tries - 1, 30))
            time.sleep(min(left, max(pause, grown * self._random.uniform(0.5, 1))))

    def _once(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> tuple[int, float, bytes]:
        """Status, seconds to wait as the server says, body."""
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        host = self._parts.hostname
        assert host is not None, "checked by parse_url"
        connection = kind(host, self._parts.port, timeout=self.patience.connect)
        try:
            connection.connect()
            connection.sock.settimeout(self.patience.timeout)
            connection.request(method, self._parts.path + path, body, {**self._headers, **headers})
            response = connection.getresponse()
            answer = response.read(MOST_BYTES + 1)
            if len(answer) > MOST_BYTES:
                raise ServerError(f"{self.what} {self.url}{path} answered more than {MOST_BYTES >> 20} MiB")
            if response.length:  # a read with a limit does not notice that the rest is missing
                raise http.client.IncompleteRead(b"", response.length)
            return response.status, _seconds(response.getheader("Retry-After")), answer
        finally:
            connection.close()

    def _json(self, path: str, answer: bytes) -> Any:
        try:
            return json.loads(answer)
        except ValueError as error:
            raise ServerError(
                f"{self.what} {self.url}{path} answered {answer[:60]!r}; JSON expected. Is this the right server?"
            ) from error


def _seconds(header: str | None) -> float:
    """Of a `Retry-After`; the form with a date counts as none."""
    try:
        value = float(header or 0)
    except ValueError:
        return 0.0
    return value if 0 <= value < math.inf else 0.0


def _message(answer: bytes) -> str:
    """What a server says about an error: the text of `{"error": ...}`, as ours and OpenAI's send it, or the start."""
    try:
        error = json.loads(answer)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return answer[:200].decode(errors="replace").strip() or "no text"


def _advice(status: int) -> str:
    if status in (401, 403):
        return "; is the token right?"
    return "; is the address right?" if status == 404 else ""


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "time-out"
    return str(getattr(error, "strerror", None) or error) or type(error).__name__
