"""What comes before a body has a limit, however it comes; what is under it is not touched."""

from __future__ import annotations

import socket

import httpx
import pytest

from server.api.connection import MAX_HEADER_BYTES
from tests.api.live import LiveServer

PIECE = 2**13


def answer(server: LiveServer, start: bytes, piece: bytes, pieces: int) -> bytes:
    """What a client is told that goes on sending pieces."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        received = b""
        try:
            client.sendall(start)
            for _ in range(pieces):
                client.sendall(piece)
            while more := client.recv(2**16):
                received += more
        except (BrokenPipeError, ConnectionResetError):  # closed while it still sent
            pass
        return received


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
    assert not received or received.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
    assert server.client.get("/health").status_code == 200


def test_headers_that_end_within_the_limit_are_read(server: LiveServer) -> None:
    reply = httpx.get(f"{server.url}/health", headers={"x": "a" * (MAX_HEADER_BYTES - 2**12)})
    assert reply.status_code == 200


def test_a_body_is_not_held_against_the_headers(server: LiveServer) -> None:
    text = "a " * MAX_HEADER_BYTES
    reply = server.client.post("/generate", json={"inputs": text, "parameters": {"truncate": 5, "max_new_tokens": 1}})
    assert reply.status_code == 200, reply.text
    for _ in range(5):  # one connection, several requests: each is counted anew
        assert server.client.get("/health", headers={"x": "a" * 2**14}).status_code == 200
