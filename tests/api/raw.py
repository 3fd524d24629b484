"""Requests as bytes, over sockets of our own."""

from __future__ import annotations

import socket

from tests.api.live import LiveServer

PIECE = 2**13


def answer(server: LiveServer, start: bytes, piece: bytes, pieces: int) -> bytes:
    """The reply to a client that sends a start and then the same piece many times."""
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


def talk(server: LiveServer, *pieces: bytes, half_close: bool = False, seconds: float = 10) -> bytes:
    """All that a client is answered that sends pieces and then waits for the connection's end."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as client:
        received = b""
        try:
            for piece in pieces:
                client.sendall(piece)
            if half_close:
                client.shutdown(socket.SHUT_WR)
            while more := client.recv(2**16):
                received += more
        except (BrokenPipeError, ConnectionResetError):
            pass
        return received


def post(body: bytes, *headers: str, path: str = "/tokenize") -> bytes:
    """A POST request, byte by byte."""
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers)
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
