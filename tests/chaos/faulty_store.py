"""A proxy before an S3 service that is slow, unreachable, full or failing, as a test asks for."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, cast
from urllib.parse import urlsplit

Fault = Literal["slow", "partitioned", "refused", "failing", "full", "deaf", "filling"]
"""What is wrong with the store.

    slow          each request takes SLOW_SECONDS longer
    partitioned   nothing gets through, in either direction, until it is over; what waits then goes on
    refused       each connection is closed at once
    failing       503 to everything
    full          507 to every write
    deaf          requests are carried out, and their connections closed without a reply
    filling       a write is carried out and its reply lost; when it is sent again, the store is full
"""

SLOW_SECONDS = 0.4
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


class FaultyStore:
    """The proxy; `url` is its endpoint. `fault` may be set at any time."""

    def __init__(self, upstream: str) -> None:
        self.counted: Counter[str] = Counter()
        """Requests that a fault has met, by its kind."""
        self.only = ""
        """Only requests whose path has this in it meet faults."""
        self._upstream = urlsplit(upstream)
        self._fault: Fault | None = None
        self._healed = threading.Event()
        self._written = set[str]()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def fault(self) -> Fault | None:
        """What is wrong now."""
        return self._fault

    @fault.setter
    def fault(self, fault: Fault | None) -> None:
        self._healed.set()
        self._healed = threading.Event()
        self._fault = fault

    @contextlib.contextmanager
    def running(self) -> Iterator[FaultyStore]:
        """Serve until the end of the block."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.fault = None
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> _Reply | None:
        """The reply; None closes the connection."""
        fault, is_write = self._fault if self.only in path else None, method == "PUT"
        if fault is not None:
            self.counted[fault] += 1
        if fault == "slow":
            time.sleep(SLOW_SECONDS)
        elif fault == "partitioned":
            self._healed.wait()
        elif fault == "refused":
            return None
        elif fault == "failing":
            return _error(503, "SlowDown")
        elif is_write and (fault == "full" or (fault == "filling" and path in self._written)):
            return _error(507, "XMinioStorageFull")
        reply = self._forward(method, path, headers, body)
        if fault == "filling" and is_write:
            self._written.add(path)
            return None
        if self._fault == "partitioned":  # since it was sent
            self._healed.wait()
        return None if fault == "deaf" else reply

    def _forward(self, method: str, path: str, headers: dict[str, str], body: bytes) -> _Reply:
        connection = http.client.HTTPConnection(cast(str, self._upstream.hostname), self._upstream.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            reply = connection.getresponse()
            return reply.status, reply.getheaders(), reply.read()


_Reply = tuple[int, list[tuple[str, str]], bytes]


def _error(status: int, code: str) -> _Reply:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as the test asks</Message></Error>".encode()
    return status, [("content-type", "application/xml")], body


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: FaultyStore

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet for head and body

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        proxy = cast(_Server, self.server).proxy
        reply = proxy.answer(self.command, self.path, dict(self.headers.items()), body)
        if reply is None:
            self.close_connection = True
            return
        status, headers, content = reply
        self.send_response(status)
        length = str(len(content))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in _HOP:
                self.send_header(name, value)
        self.send_header("content-length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_DELETE = do_HEAD = do_POST = _answer  # noqa: N815

    def log_message(self, *args: object) -> None:
        """Nothing."""
