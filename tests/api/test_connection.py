"""Bytes, time and number of connections have limits before anybody is known; what is under them is not touched."""

from __future__ import annotations

import socket
import struct
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from server.api import connection
from server.api.connection import Connections, most_connections
from server.api.raw_replies import MAX_HEADER_BYTES, MAX_URL_BYTES
from server.keys.file import add_key
from server.keys.key import Scope
from tests.api.live import LiveServer, live_server, wait_until
from tests.api.raw import PIECE, answer, post, talk


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: ", b"a" * PIECE),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\n", b"x: a\r\n" * (PIECE // 6)),
        (b"GET /", b"a" * PIECE),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\n", b"y" * PIECE),
    ],
    ids=["a long value", "many headers", "a long address", "a long name"],
)
def test_headers_that_do_not_end_are_cut_off(server: LiveServer, start: bytes, piece: bytes) -> None:
    received = answer(server, start, piece, 4 * MAX_HEADER_BYTES // PIECE)
    assert not received or received.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400", b"HTTP/1.1 414"))
    assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize("path", ["/health?", "/generate?task=", "/"])
def test_a_long_url_is_refused_before_it_is_taken_apart(server: LiveServer, path: str) -> None:
    url = f"{server.url}{path}{'%4%&' * (MAX_URL_BYTES // 4)}"
    reply = httpx.get(url)
    assert reply.status_code == 414, reply.text
    assert reply.json()["error"] == "The URL has more than 8,192 bytes."
    assert httpx.get(f"{server.url}/health?{'a' * (MAX_URL_BYTES - 100)}").status_code == 200


def test_headers_that_end_within_the_limit_are_read(server: LiveServer) -> None:
    reply = httpx.get(f"{server.url}/health", headers={"x": "a" * (MAX_HEADER_BYTES - 2**12)})
    assert reply.status_code == 200


def test_a_body_is_not_held_against_the_headers(server: LiveServer) -> None:
    text = "a " * MAX_HEADER_BYTES
    reply = server.client.post("/generate", json={"inputs": text, "parameters": {"truncate": 5, "max_new_tokens": 1}})
    assert reply.status_code == 200, reply.text
    for _ in range(5):  # one connection, several requests: each is counted anew
        assert server.client.get("/health", headers={"x": "a" * 2**14}).status_code == 200


CHUNKED = "Transfer-Encoding: chunked"
BODY = b'{"inputs": "hi"}'
CHUNK = b"%x\r\n" % len(BODY) + BODY + b"\r\n"


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"0\r\nx: ", b"a" * PIECE),
        (b"0\r\n", b"x: a\r\n" * (PIECE // 6)),
        (b"0\r\n", b"y" * PIECE),
        (CHUNK + b"0\r\nx: ", b"a" * PIECE),
        (b"5;", b"a" * PIECE),
    ],
    ids=["a long value", "many fields", "a long name", "behind a body", "a long extension"],
)
def test_trailers_that_do_not_end_are_cut_off(server: LiveServer, start: bytes, piece: bytes) -> None:
    received = answer(server, post(start, CHUNKED), piece, 8 * MAX_HEADER_BYTES // PIECE)
    assert b"HTTP/1.1 200" not in received
    assert server.client.get("/health").status_code == 200


def test_many_small_chunks_are_not_taken_for_a_trailer(server: LiveServer) -> None:
    text = b'{"inputs": "a"' + b" " * 400 + b"}"
    body = b"".join(b"1;%s\r\n%c\r\n" % (b"e" * 1000, byte) for byte in text) + b"0\r\nx: y\r\n\r\n"
    pieces = [body[at : at + PIECE] for at in range(0, len(body), PIECE)]
    assert len(body) > 4 * MAX_HEADER_BYTES
    assert talk(server, post(b"", CHUNKED, "Connection: close"), *pieces).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("name", ["X-Request-Id", "Authorization", "Content-Type", "Host"])
def test_a_field_of_a_trailer_is_no_header(server: LiveServer, name: str, caplog: pytest.LogCaptureFixture) -> None:
    trailer = f"0\r\n{name}: from-the-trailer\r\n\r\n".encode()
    received = talk(server, post(CHUNK + trailer, CHUNKED, "Connection: close"))
    assert received.startswith(b"HTTP/1.1 200")
    assert b"from-the-trailer" not in received
    assert "from-the-trailer" not in str([vars(record) for record in caplog.records])


def test_a_key_in_a_trailer_lets_nobody_in(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    _, key = add_key(file, "ada", [Scope.ADMIN], None)
    with live_server(tmp_path, api_keys_file=file) as guarded:
        trailer = f"0\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
        head, rest = post(b"", CHUNKED, "Connection: close"), CHUNK + trailer
        assert talk(guarded, head + rest).startswith(b"HTTP/1.1 401")
        assert talk(guarded, head + CHUNK, trailer).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_client_that_closes_its_half_gets_its_reply(own_server: LiveServer, version: str) -> None:
    own_server.model.delay = 0.1
    body = b'{"inputs": "hello", "parameters": {"max_new_tokens": 3}}'
    request = post(body, f"Content-Length: {len(body)}", path="/generate").replace(
        b"HTTP/1.1", f"HTTP/{version}".encode()
    )
    received = talk(own_server, request, half_close=True)
    assert b"HTTP/1.1 200" in received
    assert b"generated_text" in received


def test_a_client_that_closes_its_half_gets_its_whole_stream_and_all_replies(server: LiveServer) -> None:
    body = b'{"inputs": "hello", "parameters": {"max_new_tokens": 3, "ignore_eos_token": true}, "stream": true}'
    request = post(body, f"Content-Length: {len(body)}", path="/generate")
    assert talk(server, request, half_close=True).count(b"data:") == 3
    assert talk(server, request * 3, half_close=True).count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize("pipelined", [1, 2])
@pytest.mark.parametrize("is_reset", [False, True])
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_client_that_leaves_is_noticed_whatever_else_it_has_sent(
    own_server: LiveServer, path: str, is_reset: bool, pipelined: int, caplog: pytest.LogCaptureFixture
) -> None:
    own_server.model.allow(0)
    body = b'{"inputs": "hello"}'
    request = post(body, f"Content-Length: {len(body)}", path=path)
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", own_server.port), timeout=10) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", is_reset, 0))
            client.sendall(request * pipelined)
            wait_until(lambda: own_server.in_flight > 0)
    wait_until(lambda: own_server.in_flight == 0)
    own_server.model.allow(None)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("start", [b"GET /hea", post(b"", "Content-Length: 100"), post(b"5\r\na", CHUNKED)])
def test_a_client_that_closes_its_half_within_a_request_is_answered_why(server: LiveServer, start: bytes) -> None:
    received = talk(server, start, half_close=True)
    assert received.startswith(b"HTTP/1.1 400")
    assert b"breaks off" in received


@pytest.mark.parametrize(
    "start",
    [b"", b"GET /hea", b"\r\n", post(b"", "Content-Length: 100"), post(b"", CHUNKED), post(b"5\r\na", CHUNKED)],
    ids=["nothing", "half a line", "an empty line", "no body", "no chunk", "half a chunk"],
)
def test_half_a_request_is_not_waited_for(server: LiveServer, start: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(connection, "BODY_SECONDS", 0.3)
    received = talk(server, start)
    assert received == b"" if not start.strip() else received.startswith(b"HTTP/1.1 408")


def test_a_body_that_trickles_is_cut_off_and_one_that_flows_is_read(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "BODY_SECONDS", 0.5)
    monkeypatch.setattr(connection, "BODY_RATE", 1000)
    text = b'{"inputs": "' + b"a" * 2000 + b'", "parameters": {"truncate": 5, "max_new_tokens": 1}}'

    def sent(size: int) -> bytes:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
            client.sendall(post(b"", f"Content-Length: {len(text)}", "Connection: close", path="/generate"))
            try:
                for at in range(0, len(text), size):
                    time.sleep(0.1)
                    client.sendall(text[at : at + size])
                return client.recv(2**16)
            except (BrokenPipeError, ConnectionResetError):
                return b"closed"

    assert b"200 OK" in sent(300)  # over a longer time than BODY_SECONDS, at more than the rate
    assert b"200 OK" not in sent(10)


def test_what_is_left_of_a_refused_body_is_not_read_for_ever(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(post(b"", "Content-Length: 1000000000"))
        assert client.recv(2**16).startswith(b"HTTP/1.1 413")
        started = time.monotonic()

        def is_closed() -> bool:
            try:
                client.sendall(b"a" * PIECE)
            except OSError:
                return True
            return False

        wait_until(is_closed)
        assert time.monotonic() > started + 0.1


def test_a_stranger_who_opens_many_connections_only_replaces_his_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "most_connections", lambda: 8)
    with ExitStack() as stack:
        guarded = stack.enter_context(live_server(tmp_path))
        for _ in range(40):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", guarded.port), timeout=10))
            client.sendall(b"GET /hea")
        assert httpx.get(f"{guarded.url}/health").status_code == 200
        assert guarded.text("hello", max_new_tokens=2)


def test_requests_in_flight_keep_their_connections(own_server: LiveServer) -> None:
    bounds = Connections(most=2)
    busy, idle = _Fake(bounds), _Fake(bounds)
    bounds.waits(busy)
    bounds.is_done_waiting(busy)
    bounds.make_room(3)
    assert not busy.gave_way
    bounds.waits(idle)
    bounds.waits(busy)
    bounds.make_room(2)
    bounds.make_room(3)
    assert (busy.gave_way, idle.gave_way) == (False, True)
    assert 16 <= most_connections() < 2**20


class _Fake:
    """A connection that notes whether it had to give way."""

    def __init__(self, bounds: Connections) -> None:
        self.gave_way = False
        self._bounds = bounds

    def give_way(self) -> None:
        self.gave_way = True
        self._bounds.is_done_waiting(self)


def test_a_client_that_takes_nothing_is_given_up(own_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALLED_SECONDS", 0.3)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(10)
    client.connect(("127.0.0.1", own_server.port))
    with client:
        for _ in range(10):  # the page is larger than any buffer takes so many times
            try:
                client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 16)
            except (ConnectionResetError, BrokenPipeError):
                break
            time.sleep(0.3)
        else:
            pytest.fail("the connection is still open")
    assert own_server.client.get("/health").status_code == 200


def test_only_so_many_requests_wait_for_a_reply_on_one_connection(server: LiveServer) -> None:
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert talk(server, get * 10, half_close=True).count(b"HTTP/1.1 200") == 10
    assert talk(server, get * 1000, half_close=True).count(b"HTTP/1.1 200") < 100
