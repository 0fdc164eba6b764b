"""An HTTP proxy on loopback that answers a share of the requests badly, drawn from a seed; for tests of the retries.

The `Host` header goes through unchanged, so that the signatures, which cover it, stay valid.
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KINDS = ("slow down", "internal", "reset", "hang", "lost", "cut")
_HANG_SECONDS = 5.0
_ERROR = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{}</Code><Message>injected</Message></Error>'


class FaultProxy:
    """Forwards to one server; each request meets, with probability `rate`, one of the faults.

    * `slow down`: 503 SlowDown, `internal`: 500; the request never arrives.
    * `reset`: the connection is reset before the request arrives.
    * `hang`: the request is swallowed, and no answer comes until the client gives up.
    * `lost`: the request takes effect, then the connection is reset in place of the answer.
    * `cut`: the request takes effect, and half of the answer's body comes.

    Args:
        port: Of the server behind it, on loopback.
        rate: Share of the requests that meet a fault.
        seed: Of the draw.
        kinds: The faults to draw from.
        force: Given method, path and headers, a fault for this request whatever is drawn, or None.

    Attributes:
        faults: Number of faults by kind.
        requests: Number of requests.
    """

    def __init__(self, port: int, rate: float = 0.2, seed: int = 0, kinds=KINDS, force: Callable | None = None) -> None:
        self.faults: Counter[str] = Counter()
        self.requests = 0
        self._port, self._rate, self._kinds, self._force = port, rate, kinds, force
        self._draw, self._lock = random.Random(seed), threading.Lock()
        proxy = self

        class Handler(_Handler):
            def setup(self) -> None:
                super().setup()
                self.proxy = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def port(self) -> int:
        """The port on which it listens."""
        return self._server.server_address[1]

    def options(self, options: dict, read_timeout: float = 0.5) -> dict:
        """Return storage options that lead through the proxy, with a client that gives up soon and at the first try."""
        client = {**options["client_kwargs"], "endpoint_url": f"http://127.0.0.1:{self.port}"}
        once = {"read_timeout": read_timeout, "retries": {"total_max_attempts": 1}}
        return {**options, "client_kwargs": client, "config_kwargs": once}

    def fault(self, method: str, path: str, headers) -> str | None:
        """Draw the fault that a request meets."""
        with self._lock:
            self.requests += 1
            kind = self._force(method, path, headers) if self._force else None
            if kind is None and self._draw.random() < self._rate:
                kind = self._draw.choice(self._kinds)
            if kind is not None:
                self.faults[kind] += 1
            return kind

    def forward(self, method: str, path: str, headers, body: bytes) -> tuple[int, list, bytes]:
        """Send a request to the server; returns status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.proxy.fault(self.command, self.path, self.headers)
        if kind == "slow down":
            return self._answer(503, _ERROR.format("SlowDown").encode())
        if kind == "internal":
            return self._answer(500, _ERROR.format("InternalError").encode())
        if kind == "hang":
            self.connection.settimeout(_HANG_SECONDS)
            with suppress(OSError):
                self.connection.recv(1)  # returns when the client closes the connection
            return self._reset()
        if kind == "reset":
            return self._reset()
        try:
            status, headers, content = self.proxy.forward(self.command, self.path, self.headers, body)
        except OSError:  # the server is down
            return self._reset()
        if kind == "lost":
            return self._reset()
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = next((value for name, value in headers if name.lower() == "content-length"), len(content))
        if status not in (204, 304):
            self.send_header("Content-Length", length)
        self.end_headers()
        if kind == "cut":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            return self._reset()
        self.wfile.write(content)
        return None

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _reset(self) -> None:
        """Close the connection with a reset rather than in good order."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
