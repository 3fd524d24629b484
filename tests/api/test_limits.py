"""Bodies over the limit: refused with 413 while they arrive, or before."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.api.forms import MAX_FORM_PARTS
from server.api.limits import FORM_BYTES, FREE_BYTES, MAX_JSON_BYTES, MULTIPART_OVERHEAD, BodyLimit
from server.errors import Overloaded, PayloadTooLarge
from tests.api.live import MAX_UPLOAD_BYTES, LiveServer, as_form, assert_error
from tests.support import random_soft_prompt

HUGE, MEMORY, DISK = 200 * 2**20, 2**30, 2**31


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


class _Under:
    """Requests under way behind one limit on what bodies hold together."""

    def __init__(self, memory: int, disk: int = DISK) -> None:
        self.limit = BodyLimit(self._app, HUGE, memory, disk, ["/training/jobs"])
        self.answered = asyncio.Event()

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass
        await self.answered.wait()

    def begin(
        self, size: int, kind: bytes = b"application/json", *, key: str | None = None, path: str = "", declared: int = 0
    ) -> asyncio.Task[None]:
        sent = [{"type": "http.request", "body": bytes(size // 2), "more_body": more} for more in (True, False)]

        async def receive() -> Any:
            await asyncio.sleep(0)
            return sent.pop(0)

        async def send(message: Any) -> None: ...

        path = path or ("/generate" if kind == b"application/json" else "/training/jobs")
        headers = [(b"content-type", kind), (b"content-length", b"%d" % declared)]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "state": {"key_id": key}}
        return asyncio.ensure_future(self.limit(scope, receive, send))


async def test_what_all_bodies_hold_is_bounded_and_small_ones_always_pass() -> None:
    size, multipart = 2**19, b"multipart/form-data; boundary=x"
    under = _Under(4 * (size - FREE_BYTES))
    many = [under.begin(size) for _ in range(100)]
    small = [under.begin(FREE_BYTES) for _ in range(100)]
    form = under.begin(2 * FORM_BYTES, multipart)
    await asyncio.sleep(0.05)
    refused = [task.exception() for task in [*many, form] if task.done()]
    assert len(refused) >= 97
    assert all(isinstance(error, Overloaded) for error in refused)
    assert not any(task.done() for task in small)
    under.answered.set()
    await asyncio.gather(*many, *small, form, return_exceptions=True)
    await under.begin(3 * size)  # all of it has been given back
    await under.begin(200 * FORM_BYTES, multipart)


async def test_a_form_holds_no_more_than_is_kept_in_memory() -> None:
    under = _Under(2 * FORM_BYTES)
    forms = [under.begin(100 * FORM_BYTES, b"multipart/form-data; boundary=x") for _ in range(2)]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in forms)
    under.answered.set()
    await asyncio.gather(*forms)


async def test_a_body_that_only_calls_itself_a_form_holds_all_that_it_has() -> None:
    under = _Under(4 * FORM_BYTES)
    kind = b"multipart/form-data; boundary=x"
    bodies = [under.begin(2 * FORM_BYTES, kind, path="/v1/completions") for _ in range(10)]
    await asyncio.sleep(0.05)
    assert sum(task.done() for task in bodies) == 8
    under.answered.set()
    await asyncio.gather(*bodies, return_exceptions=True)


async def test_the_files_of_all_forms_take_bounded_disk_and_small_forms_always_pass() -> None:
    size, kind = 2**20 + FREE_BYTES, b"multipart/form-data; boundary=x"
    under = _Under(MEMORY, disk=4 * 2**20)
    forms = [under.begin(size, kind) for _ in range(20)]
    small = [under.begin(FREE_BYTES, kind) for _ in range(20)]
    await asyncio.sleep(0.05)
    refused = [task.exception() for task in forms if task.done()]
    assert len(refused) == 16
    assert all(isinstance(error, Overloaded) for error in refused)
    assert not any(task.done() for task in small)
    under.answered.set()
    await asyncio.gather(*forms, *small, return_exceptions=True)
    await under.begin(4 * 2**20, kind)  # all of it has been given back
    with pytest.raises(PayloadTooLarge, match="PRELUDE_FORM_DISK"):
        await under.begin(4 * 2**20 + 2 * FREE_BYTES, kind)


async def test_a_key_leaves_a_part_of_the_disk_to_the_next_one() -> None:
    size, kind = 2**20 + FREE_BYTES, b"multipart/form-data; boundary=x"
    under = _Under(MEMORY, disk=12 * 2**20)
    greedy = [under.begin(size, kind, key="a") for _ in range(20)]
    await asyncio.sleep(0.05)
    assert sum(not task.done() for task in greedy) == 6
    second = [under.begin(size, kind, key="b") for _ in range(20)]
    await asyncio.sleep(0.05)
    assert sum(not task.done() for task in second) == 4
    third = [under.begin(size, kind, key="c") for _ in range(20)]
    await asyncio.sleep(0.05)
    assert sum(not task.done() for task in third) == 2
    with pytest.raises(PayloadTooLarge):
        await under.begin(0, kind, key="d", declared=8 * 2**20)
    under.answered.set()
    await asyncio.gather(*greedy, *second, *third, return_exceptions=True)
    await under.begin(5 * 2**20, kind, key="a")


async def test_a_form_that_cannot_fit_is_refused_before_it_is_sent() -> None:
    kind = b"multipart/form-data; boundary=x"
    under = _Under(MEMORY, disk=4 * 2**20)
    waiting = under.begin(3 * 2**20, kind)
    await asyncio.sleep(0.05)
    with pytest.raises(Overloaded):
        await under.begin(0, kind, declared=2 * 2**20)
    with pytest.raises(PayloadTooLarge):
        await under.begin(0, kind, declared=5 * 2**20)
    under.answered.set()
    await waiting


def test_a_body_beyond_what_all_may_hold_is_told_when_to_come_again(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BodyLimit, "_hold", _full)
    for content in (json.dumps({"inputs": "x"}), json.dumps({"inputs": "x" * 2 * FREE_BYTES})):
        for path in ("/generate", "/v1/completions", "/training/jobs"):
            headers = {"Content-Type": "application/json"}
            reply = server.client.post(path, content=content, headers=headers)
            if len(content) > FREE_BYTES:
                assert (reply.status_code, reply.headers["retry-after"]) == (429, "1"), path
            else:
                assert reply.status_code != 429


def _full(self: BodyLimit, more: int) -> None:
    if more > 0:
        raise Overloaded("It is full.")
