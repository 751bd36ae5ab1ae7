"""An HTTP proxy before a real S3 server, which does to requests what networks and busy servers do."""

from __future__ import annotations

import http.client
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
GONE = b"<?xml version='1.0'?><Error><Code>NoSuchUpload</Code><Message>It is completed or ended.</Message></Error>"
NO_BUCKET = b"<?xml version='1.0'?><Error><Code>NoSuchBucket</Code><Message>It does not exist.</Message></Error>"
LOST = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>An internal error.</Message></Error>"


class Fault(StrEnum):
    """What happens to a request."""

    BUSY = "503 SlowDown, and nothing is done"
    NO_BUCKET = "404 NoSuchBucket, as of servers that make none by themselves"
    LOST_ANSWER = "the server does it, and the client is told 500"
    LOST_AND_GONE = "the server does it, the client is told 500, and then that there is no such upload"
    RESET = "the connection is reset before the request arrives"
    RESET_HALFWAY = "the connection is reset in the middle of the answer"
    CUT = "the answer ends in the middle, and claims its whole length"
    CUT_UNNOTICED = "the answer ends in the middle, and claims that length"
    SLOW = "the answer comes in small pieces"


@dataclass
class Proxy:
    """A running proxy: `fault` happens to each request that matches, `times` times."""

    endpoint: str
    fault: Fault | None = None
    matching: re.Pattern[str] = re.compile("")
    """Sought in "METHOD /path?query"."""
    times: int = 0
    seen: list[str] = field(default_factory=list)
    """Requests that matched, with or without a fault."""
    conditional: list[str] = field(default_factory=list)
    """Requests that ask for something only if a condition holds."""
    draws: random.Random | None = None
    share: float = 0.0
    faults: tuple[Fault, ...] = ()
    lock: threading.Lock = field(default_factory=threading.Lock)

    def inject(self, fault: Fault | None, matching: str = "", times: int = 1) -> None:
        """Let the fault happen to the next `times` matching requests."""
        with self.lock:
            self.fault, self.matching, self.times, self.seen, self.draws = fault, re.compile(matching), times, [], None

    def shower(self, seed: int, share: float, faults: tuple[Fault, ...]) -> None:
        """Let one of the faults happen to this share of all requests, by chance."""
        with self.lock:
            self.draws, self.share, self.faults, self.seen = random.Random(seed), share, faults, []

    def take(self, request: str) -> Fault | None:
        """The fault of this request."""
        with self.lock:
            if self.draws is not None:
                fault = self.draws.choice(self.faults) if self.draws.random() < self.share else None
                self.seen += [request] if fault else []
                return fault
            if self.fault is None or not self.matching.search(request):
                return None
            self.seen.append(request)
            if len(self.seen) > self.times:
                return None
            return self.fault


@contextmanager
def faulty(endpoint: str) -> Iterator[Proxy]:
    """A proxy before the S3 server at `endpoint`."""
    address = endpoint.removeprefix("http://")

    class Handler(_Handler):
        upstream = address

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Handler.proxy = Proxy(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Handler.proxy
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: str
    proxy: Proxy

    def handle_request(self) -> None:
        body = self._body()
        if any(name.lower().startswith("if-") for name in self.headers):
            self.proxy.conditional.append(f"{self.command} {self.path}")
        fault = self.proxy.take(f"{self.command} {self.path}")
        if fault is Fault.RESET:
            self._reset()
            return
        if fault is Fault.BUSY:
            self._answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
            return
        if fault is Fault.NO_BUCKET:
            self._answer(404, {"Content-Type": "application/xml"}, NO_BUCKET)
            return
        status, headers, data = self._forward(body)
        if fault is Fault.LOST_AND_GONE and len(self.proxy.seen) > 1:
            self._answer(404, {"Content-Type": "application/xml"}, GONE)
        elif fault in (Fault.LOST_ANSWER, Fault.LOST_AND_GONE):
            self._answer(500, {"Content-Type": "application/xml"}, LOST)
        elif fault is None or self.command == "HEAD" or len(data) < 2:
            self._answer(status, headers, data)
        elif fault is Fault.CUT_UNNOTICED:
            self._answer(status, headers, data[: len(data) // 2])
        else:
            self._answer(status, headers, data, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while True:
                line = self.rfile.readline()
                parts.append(line)
                size = int(line.split(b";")[0], 16)
                if size == 0:
                    break
                parts.append(self.rfile.read(size + 2))
            while (line := self.rfile.readline()).strip():  # trailers
                parts.append(line)
            return b"".join([*parts, b"\r\n"])
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() != "expect":
                connection.putheader(name, value)
        connection.endheaders()
        connection.send(body)
        answer = connection.getresponse()
        data = answer.read()
        headers = {n: v for n, v in answer.getheaders() if n.lower() not in ("transfer-encoding", "connection")}
        connection.close()
        return answer.status, headers, data

    def _answer(self, status: int, headers: dict[str, str], data: bytes, fault: Fault | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        half = data[: len(data) // 2]
        if fault is Fault.SLOW:
            for start in range(0, len(data), step := max(1, len(data) // 8)):
                self.wfile.write(data[start : start + step])
                self.wfile.flush()
                time.sleep(0.02)
        elif fault is None:
            self.wfile.write(data)
        else:
            self.wfile.write(half)
            self.wfile.flush()
            if fault is Fault.RESET_HALFWAY:
                self._reset()
            self.close_connection = True

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):  # the client has gone, or was sent away
            self.close_connection = True
