"""Bodies over the limit: refused with 413 while they arrive, or before."""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.api.body_sizes import MAX_JSON_BYTES, MULTIPART_OVERHEAD, BodyLimit
from server.api.forms import MAX_FORM_PARTS
from server.errors import PayloadTooLarge
from tests.api.body_limits import DISK, HUGE, MEMORY
from tests.api.live import MAX_UPLOAD_BYTES, LiveServer, as_form, assert_error
from tests.support import random_soft_prompt


def _chunks(total: int, size: int = 2**16) -> Iterator[bytes]:
    for _ in range(total // size):
        yield bytes(size)


def _head(method: str, path: str, *headers: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


def _reply(connection: socket.socket) -> tuple[int, dict[str, str]]:
    """Status and body of a reply read by hand."""
    data = b""
    while b"\r\n\r\n" not in data or not data.endswith(b"}"):
        received = connection.recv(4096)
        assert received, data
        data += received
    head, body = data.split(b"\r\n\r\n", 1)
    return int(head.split()[1]), json.loads(body)


UPLOAD = ("PUT", "/prompts/limits", "Content-Type: multipart/form-data; boundary=x")
GENERATE = ("POST", "/generate", "Content-Type: application/json")
STREAM = ("POST", "/generate_stream", "Content-Type: application/json")


@pytest.mark.parametrize("target", [UPLOAD, GENERATE, STREAM])
def test_a_length_over_the_limit_is_refused_before_the_body_is_sent(
    server: LiveServer, target: tuple[str, ...]
) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(_head(*target, f"Content-Length: {HUGE}"))
        status, body = _reply(connection)
    assert (status, body["code"]) == (413, "payload_too_large")
    assert "bytes" in body["error"]
    assert ("PRELUDE_MAX_UPLOAD_BYTES" in body["remedy"]) == (target is UPLOAD)


@pytest.mark.parametrize("target", [UPLOAD, GENERATE])
def test_a_body_without_a_length_is_refused_as_soon_as_it_passes_the_limit(
    server: LiveServer, target: tuple[str, ...]
) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="f.zip"\r\n\r\n' if target is UPLOAD else b""
    limit = MAX_UPLOAD_BYTES + MULTIPART_OVERHEAD if target is UPLOAD else MAX_JSON_BYTES
    sent = 0
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(
            _head(*target, "Transfer-Encoding: chunked") + b"%x\r\n%b\r\n" % (len(part), part) * bool(part)
        )
        while sent < HUGE and not select.select([connection], [], [], 0)[0]:
            connection.sendall(b"10000\r\n" + bytes(2**16) + b"\r\n")
            sent += 2**16
            time.sleep(0.0005)
        status, body = _reply(connection)
    assert (status, body["code"]) == (413, "payload_too_large")
    assert limit - 2**17 < sent < HUGE / 4


@pytest.mark.parametrize("with_length", [True, False])
def test_an_ordinary_client_that_sends_200_mb_learns_why_it_is_refused(server: LiveServer, with_length: bool) -> None:
    server.publish_random("limits", 1)
    before = server.text("hello", "limits", max_new_tokens=10)
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    if with_length:
        headers["Content-Length"] = str(HUGE)
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="f.zip"\r\n\r\n'

    def body() -> Iterator[bytes]:
        yield part
        yield bytes(2**16 - len(part))
        yield from _chunks(HUGE - 2**16)

    response = server.client.put("/prompts/limits", content=body(), headers=headers)
    assert_error(response, 413, "payload_too_large", f"{MAX_UPLOAD_BYTES + MULTIPART_OVERHEAD:,} bytes")
    assert server.text("hello", "limits", max_new_tokens=10) == before
    assert server.client.get("/prompts/limits").json()["versions"] == [1]


def test_a_body_of_exactly_the_limit_reaches_the_endpoint(server: LiveServer) -> None:
    body = b'{"inputs": "hello", "parameters": {"max_new_tokens": 2}}'
    headers = {"Content-Type": "application/json"}
    exact = server.client.post("/generate", content=body.ljust(MAX_JSON_BYTES), headers=headers)
    assert exact.json() == {"generated_text": server.text("hello", max_new_tokens=2)}
    over = server.client.post("/generate", content=body.ljust(MAX_JSON_BYTES + 1), headers=headers)
    assert_error(over, 413, "payload_too_large", f"{MAX_JSON_BYTES:,} bytes")


async def _through(
    chunks: list[bytes], headers: list[tuple[bytes, bytes]], limit: int, path: str = "/prompts/x"
) -> bytes:
    """What an app reads behind the limit."""
    queue: list[dict[str, Any]] = [
        {"type": "http.request", "body": chunk, "more_body": i + 1 < len(chunks)} for i, chunk in enumerate(chunks)
    ]
    read = b""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal read
        more = True
        while more:
            message = await receive()
            read += message["body"]
            more = message["more_body"]

    async def receive() -> dict[str, Any]:
        return queue.pop(0)

    async def send(message: Any) -> None:
        raise AssertionError("the limit itself sends nothing")

    scope = {"type": "http", "method": "PUT", "path": path, "headers": headers}
    await BodyLimit(app, limit - MULTIPART_OVERHEAD, MEMORY, DISK)(scope, receive, send)
    return read


async def test_the_limit_is_exact() -> None:
    limit = MULTIPART_OVERHEAD + 1000
    assert len(await _through([b"x" * limit], [], limit)) == limit
    assert len(await _through([b"x" * (limit - 1), b"x"], [], limit)) == limit
    assert len(await _through([b"x" * limit], [(b"content-length", b"%d" % limit)], limit)) == limit
    too_much: tuple[tuple[list[bytes], list[tuple[bytes, bytes]]], ...] = (
        ([b"x" * (limit + 1)], []),
        ([b"x" * limit, b"x"], []),
        ([b"x"], [(b"content-length", b"%d" % (limit + 1))]),
        ([b"x" * limit, b"x"], [(b"content-length", b"1")]),
    )
    for chunks, headers in too_much:
        with pytest.raises(PayloadTooLarge):
            await _through(chunks, headers, limit)


async def test_only_an_upload_may_be_as_large_as_one() -> None:
    body, limit = [bytes(MAX_JSON_BYTES), b"x"], 2 * MAX_JSON_BYTES
    assert len(await _through(body, [], limit)) == MAX_JSON_BYTES + 1
    with pytest.raises(PayloadTooLarge, match=f"{MAX_JSON_BYTES:,} bytes"):  # it is read into memory
        await _through(body, [], limit, "/prompts/x/traffic")


# Forms that do not come to their end


def _form(files: dict[str, bytes]) -> tuple[bytes, bytes]:
    """Body and head of an upload."""
    request = httpx.Request("PUT", "http://127.0.0.1", files=as_form(files))
    body = request.read()
    return body, f"Content-Type: {request.headers['Content-Type']}".encode()


@pytest.mark.parametrize("framing", ["Content-Length: %d", "Transfer-Encoding: chunked"])
def test_a_form_without_its_last_part_is_refused_rather_than_published_without_it(
    server: LiveServer, framing: str
) -> None:
    path = f"/prompts/limits-{len(framing)}"
    template = {"input_template": "Text: {input}"}
    files = server.files(random_soft_prompt(server.model.spec, seed=9, manifest=template))
    assert list(files)[-1] == "manifest.json"
    body, content_type = _form(files)
    last = body.rfind(b"\r\n--", 0, len(body) - 10)
    for end in (body.find(b"manifest.json"), last + 2, body.rfind(b"\r\n--"), len(body) - 4, len(body) - 3):
        cut = body[:end]
        framed = cut if "%d" in framing else b"%x\r\n%b\r\n0\r\n\r\n" % (len(cut), cut)
        head = _head("PUT", path, content_type.decode(), framing.replace("%d", str(len(cut))))
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(head + framed)
            status, reply = _reply(connection)
        assert (status, reply["code"]) == (400, "invalid_request")
        assert "cut off" in reply["error"]
        assert "again" in reply["remedy"]
    assert server.client.get(path).status_code == 404
    assert server.client.put(path, files=as_form(files)).status_code == 201
    assert server.client.get(path).json()["manifest"]["input_template"] == "Text: {input}"


def test_what_follows_the_closing_boundary_is_no_matter(server: LiveServer) -> None:
    body, content_type = _form(server.files(random_soft_prompt(server.model.spec, seed=9)))
    headers = {"Content-Type": content_type.decode().partition(": ")[2]}
    for content in (body[:-2], body, body + b"an epilogue" * 20_000, b"\r\n" + body):
        response = server.client.put("/prompts/limits-end", content=content, headers=headers)
        assert response.status_code in (200, 201), response.text


def test_a_form_of_many_parts_is_refused(server: LiveServer) -> None:
    for count, taken in ((MAX_FORM_PARTS, True), (MAX_FORM_PARTS + 1, False), (900, False)):
        response = server.client.put("/prompts/limits-parts", files=as_form([("README.md", b"x" * 50)] * count))
        said = "adapter_config.json is missing" if taken else f"more than {MAX_FORM_PARTS} parts"
        assert_error(response, 422, "invalid_soft_prompt" if taken else "invalid_request", said)


async def test_what_is_not_http_passes_untouched() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, receive, send))

    async def receive() -> dict[str, Any]:
        return {}

    async def send(message: Any) -> None:
        pass

    scope = {"type": "lifespan"}
    await BodyLimit(app, 10, MEMORY, DISK)(scope, receive, send)
    assert seen == [(scope, receive, send)]


def test_a_connection_that_was_refused_can_be_used_again(server: LiveServer) -> None:
    with httpx.Client(base_url=server.url, limits=httpx.Limits(max_connections=1), timeout=20) as client:
        refused = client.post(
            "/generate", content=bytes(MAX_JSON_BYTES + 1), headers={"Content-Type": "application/json"}
        )
        assert refused.status_code == 413
        assert client.get("/health").status_code == 200
