"""A stand-in for an OpenAI-compatible server, as a process of its own: `python vlm_process.py PORT WHAT...`.

It judges by brightness. Each question takes the next WHAT: `ok`, `slow` (a third of a second), `hang` (until the client
gives up), `busy` (429), `broken` (half an answer) or `crash` (the process ends); `ok` when there are none left.
`GET /v1/stats` tells the number of questions answered and how many were under way at the same time.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.request import ProxyHandler, build_opener

SLOW = 0.3


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(port: int, *what: str) -> subprocess.Popen[bytes]:
    """A process that listens when this returns."""
    process = subprocess.Popen([sys.executable, __file__, str(port), *what], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


@contextlib.contextmanager
def serving(*what: str) -> Iterator[str]:
    """The address of a running stand-in."""
    port = free_port()
    process = start(port, *what)
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def stats(url: str) -> dict[str, int]:
    with build_opener(ProxyHandler({})).open(f"{url}/stats") as answer:
        return dict(json.load(answer))


# ---------------------------------------------------------------- the process


def judge(request: dict[str, Any]) -> dict[str, Any]:
    """A question answered by the mean brightness of its pictures."""
    import numpy as np
    from PIL import Image

    shown = []
    for part in request["messages"][-1]["content"][:-1]:
        data = part["image_url"]["url"].partition(";base64,")[2]
        shown.append(float(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).mean()) / 255)
    text = request["messages"][-1]["content"][-1]["text"]
    if not request.get("logprobs"):
        if len(shown) == 1:
            return written(f"Final Score: {1 + 4 * shown[0]:.2f}")
        better = "Both images are equally good."
        if shown[0] != shown[1]:
            one, two = (1, 2) if shown[0] > shown[1] else (2, 1)
            better = f"Image {one} is better than Image {two}."
        return written(f"Image 1 is better lit, and image 2 has its merits. {better}")
    p = min(max(shown[0] if len(shown) == 1 else 1 / (1 + math.exp(8 * (shown[1] - shown[0]))), 1e-6), 1 - 1e-6)
    tokens = ("A", "B") if len(shown) == 2 else ("Yes", "No")
    if "digit" in text:
        tokens = ("5", "1")
    top = [{"token": token, "logprob": math.log(q)} for token, q in zip(tokens, (p, 1 - p), strict=True)]
    return {"choices": [{"message": {"content": tokens[0]}, "logprobs": {"content": [{"top_logprobs": top}]}}]}


def written(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}, "logprobs": None}]}


def main(port: int, what: list[str]) -> None:
    lock = threading.Lock()
    seen = {"answered": 0, "now": 0, "most": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send(200, seen if self.path == "/v1/stats" else {"data": [{"id": "brightness"}]})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                do = what.pop(0) if what else "ok"
                seen["now"] += 1
                seen["most"] = max(seen["most"], seen["now"])
            try:
                self.do(do, request)
            finally:
                with lock:
                    seen["now"] -= 1

        def do(self, do: str, request: dict[str, Any]) -> None:
            if do == "crash":
                os._exit(1)
            if do == "hang":
                time.sleep(60)
            if do == "slow":
                time.sleep(SLOW)
            if do == "busy":
                self.send(429, {"error": {"message": "too many requests"}}, retry=True)
            else:
                body = judge(request)
                with lock:  # before it is sent: whoever has the answer may ask for the count at once
                    seen["answered"] += do != "broken"
                self.send(200, body, cut=do == "broken")

        def send(self, status: int, body: Any, *, retry: bool = False, cut: bool = False) -> None:
            data = json.dumps(body).encode()
            with contextlib.suppress(ConnectionError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(data) + 50 * cut))
                if retry:
                    self.send_header("Retry-After", "0.1")
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
