"""Real servers on 127.0.0.1 for tests: one that follows a script, and running any server in a thread."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from typing import Any


@contextlib.contextmanager
def running(server: HTTPServer) -> Iterator[str]:
    """Serve in a thread; the address."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield "http://{}:{}".format(*server.server_address[:2])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Reply:
    """What the scripted server does with a request: answer, say nothing for a while, or break off."""

    status: int = 200
    body: Any = None  # JSON, or bytes as they are
    headers: dict[str, str] = field(default_factory=dict)
    silent: float = 0.0  # seconds before the answer
    cut: bool = False  # promise more bytes than come


@dataclass
class Scripted:
    """A server that gives `replies` in turn, then `last`, which may be a function of path and body."""

    replies: list[Reply] = field(default_factory=list)
    last: Reply | Callable[[str, Any], Reply] = field(default_factory=Reply)
    seen: list[tuple[str, Any]] = field(default_factory=list)  # path and body of every request
    released: threading.Event = field(default_factory=threading.Event)

    def make(self) -> ThreadingHTTPServer:
        script = self
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(None)

            def do_POST(self) -> None:
                self.reply(self.rfile.read(int(self.headers["Content-Length"])))

            def reply(self, body: Any) -> None:
                with lock:
                    script.seen.append((self.path, body))
                    reply = script.replies.pop(0) if script.replies else script.last
                if not isinstance(reply, Reply):
                    reply = reply(self.path, body)
                if reply.silent:
                    script.released.wait(reply.silent)
                answer = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                with contextlib.suppress(ConnectionError):
                    self.send_response(reply.status)
                    self.send_header("Content-Length", str(len(answer) + 50 * reply.cut))
                    for name, value in reply.headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        return server
