from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from server.api.connection import bounded_protocol
from server.api.head_method import HeadAsGet
from server.api.raw_replies import MAX_HEADER_BYTES
from tests.api.live import LiveServer, serving
from tests.api.raw import PIECE, answer, post, talk


def test_a_request_for_another_protocol_is_answered_in_this_one(server: LiveServer) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n"
    start = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + upgrade
    assert talk(server, start + b"\r\n").startswith(b"HTTP/1.1 200")
    received = answer(server, start + b"x: ", b"a" * PIECE, 8 * MAX_HEADER_BYTES // PIECE)
    assert not received or received.startswith(b"HTTP/1.1 431")
    assert talk(server, b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("is_chunked", [False, True], ids=["of a known length", "in chunks"])
def test_the_body_of_a_request_for_another_protocol_is_read(server: LiveServer, is_chunked: bool) -> None:
    body = b'{"inputs": "two words"}'
    size = "Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {len(body)}"
    sent = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if is_chunked else body
    # As Java's HttpClient asks wherever there is no TLS.
    asks = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB")
    request = post(sent, *asks, size)
    head = len(request) - len(sent)
    for cut in (1, 30, head - 1, head, head + 5, len(request)):
        replies = talk(server, request[:cut], request[cut:], request, half_close=True)
        assert replies.count(b"HTTP/1.1 200") == 2, (cut, replies)
        assert replies.count(b'"stop":9}') == 2, (cut, replies)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET\x00/health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost localhost\r\n\r\n",
        b"POST /generate HTTP/1.1\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        b"POST /generate HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nhost: localhost\r\n\r\n",
    ],
    ids=["TLS", "HTTP/2", "a zero", "no colon", "two lengths", "a wrong chunk", "a proxy's method"],
)
def test_what_is_not_http_gets_an_error_in_our_form(server: LiveServer, sent: bytes) -> None:
    head, _, body = talk(server, sent).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400"), head
    assert b"content-type: application/json" in head
    error = json.loads(body)
    assert error["code"] == "invalid_request"
    assert "not a valid HTTP request: " in error["error"]
    assert error["remedy"]


def test_a_stream_for_http_1_0_ends_with_its_connection_and_has_no_chunks(server: LiveServer) -> None:
    body = b'{"inputs": "one", "parameters": {"max_new_tokens": 5}}'
    request = post(body, f"Content-Length: {len(body)}", path="/generate_stream")
    head, _, events = talk(server, request.replace(b"HTTP/1.1", b"HTTP/1.0")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in head
    assert b"transfer-encoding" not in head
    assert [json.loads(event.removeprefix(b"data:")) for event in events.split(b"\n\n") if event]
    reply = talk(server, b"GET /health HTTP/1.0\r\n\r\n")
    assert b"content-length: " in reply
    assert reply.endswith(b'{"status":"ok"}')


def test_head_is_answered_wherever_get_is(server: LiveServer) -> None:
    server.publish_random("head-task", 1)
    for path in (
        "/health",
        "/ready",
        "/ping",
        "/v2/health/live",
        "/v2/health/ready",
        "/v1/models",
        "/info",
        "/prompts",
    ):
        get, head = server.client.get(path), server.client.head(path)
        assert head.status_code == get.status_code == 200, path
        assert head.headers["content-length"] == get.headers["content-length"] or path == "/info"
        assert head.content == b""
    assert server.client.head("/prompts/head-task").headers["etag"]
    assert server.client.head("/prompts/nobody").status_code == 404
    assert server.client.head("/generate").status_code == 405
    assert server.client.post("/health").headers["allow"] == "GET, HEAD"


def test_head_does_not_wait_for_the_end_of_a_stream(tmp_path: Path) -> None:
    ended = threading.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive())["type"] != "http.disconnect":
            await send({"type": "http.response.body", "body": b"more", "more_body": True})
        ended.set()

    with serving(uvicorn.Config(HeadAsGet(endless), port=0, http=bounded_protocol(), log_config=None)) as port:
        assert httpx.head(f"http://127.0.0.1:{port}/", timeout=10).content == b""
        assert ended.wait(10)
