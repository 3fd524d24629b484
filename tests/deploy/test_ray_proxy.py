from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.app import FORMATS
from server.deploy import ray_proxy
from server.deploy.ray_proxy import JOBS, LOST, MOST_BODY, SESSION_HEADER, SLOW, TaskRouting, WholeStreams, render
from server.deploy.replica_metrics import Gathered

JSON = (b"content-type", b"application/json")


async def call(app: ASGIApp, body: Sequence[bytes] = (b"",), **scope: Any) -> list[Message]:
    """The messages of the reply to a request."""
    incoming = [
        {"type": "http.request", "body": part, "more_body": number < len(body)} for number, part in enumerate(body, 1)
    ]
    sent: list[Message] = []

    async def receive() -> Message:
        return incoming.pop(0) if incoming else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"type": "http", "method": "POST", "query_string": b"", "headers": [JSON], **scope}, receive, send)
    return sent


class Routed:
    """An app that takes note of the session and of the body."""

    def __init__(self) -> None:
        self.session: bytes | None = None
        self.body = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sessions = [value for name, value in scope["headers"] if name == SESSION_HEADER]
        assert len(sessions) <= 1
        self.session, self.body, is_more = (sessions[0] if sessions else None), b"", True
        while is_more:
            message = await receive()
            self.body += message["body"]
            is_more = message["more_body"]


@pytest.mark.parametrize(
    ("session", "scope", "body"),
    [
        (b"a", {"path": "/generate", "query_string": b"task=a"}, b"{}"),
        (b"a", {"path": "/generate", "query_string": b"task=a%403"}, b"{}"),
        (b"a", {"path": "/prompts/a/rollback"}, b""),
        (b"a", {"path": "/prompts/a", "method": "GET"}, b""),
        (b"a", {"path": "/v1/completions"}, b'{"model": "a@2", "prompt": "b"}'),
        (b"a", {"path": "/generate"}, b'{"inputs": "x", "parameters": {"adapter_id": "a"}}'),
        (None, {"path": "/generate"}, b'{"inputs": "x", "parameters": 3}'),
        (None, {"path": "/v1/completions"}, b'{"model": 7}'),
        (None, {"path": "/v1/completions"}, b"[" * 100_000),
        (None, {"path": "/v1/completions"}, b'{"model": "a", "prompt": "' + b"x" * 2 * MOST_BODY + b'"}'),
        (None, {"path": "/metrics", "method": "GET"}, b""),
        (JOBS.encode(), {"path": "/training/jobs/1", "method": "GET"}, b""),
        (JOBS.encode(), {"path": "/prompts/a/interpretation"}, b"{}"),
        (b"mine", {"path": "/generate", "query_string": b"task=a", "headers": [(SESSION_HEADER, b"mine")]}, b"{}"),
    ],
)
async def test_a_request_is_routed_by_its_task_and_arrives_whole(
    session: bytes | None, scope: dict[str, Any], body: bytes
) -> None:
    app = Routed()
    parts = [body[at : at + 65_536] for at in range(0, len(body), 65_536)] or [b""]
    await call(TaskRouting(app), parts, **scope)
    assert (app.session, app.body) == (session, body)


@pytest.mark.parametrize("pause", [0.01, 60.0])
async def test_a_body_that_arrives_too_slowly_is_refused(pause: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_proxy, "BODY_SECONDS", 0.2)
    app, sent = Routed(), list[Message]()

    async def receive() -> Message:
        await asyncio.sleep(pause)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/generate", "query_string": b"", "headers": [JSON]}
    async with asyncio.timeout(30):
        await TaskRouting(app)(scope, receive, send)
    start, body = sent
    assert (start["status"], json.loads(body["body"])["code"], app.body) == (408, "invalid_request", b"")
    assert (b"connection", b"close") in start["headers"]


def replies(*messages: Message) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    return app


STREAM: Message = {"type": "http.response.start", "status": 200, "headers": [(b"Content-Type", b"text/event-stream")]}
FILE: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/zip")]}
PART: Message = {"type": "http.response.body", "body": b"data:1\n\n", "more_body": True}
LAST: Message = {"type": "http.response.body", "body": b"", "more_body": False}


@pytest.mark.parametrize("path", ["/generate_stream", "/v1/completions"])
async def test_a_stream_that_breaks_ends_with_one_error_event(path: str) -> None:
    *sent, last = await call(WholeStreams(replies(STREAM, PART)), path=path)
    assert sent == [STREAM, PART]
    assert not last["more_body"]
    assert last["body"].startswith(b"data: ")
    assert json.loads(last["body"][6:]) == FORMATS.of(path).body(LOST)
    assert render(path, LOST) == last["body"][6:].strip()


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_refusal_of_the_proxy_looks_like_one_of_the_app(path: str) -> None:
    assert json.loads(render(path, SLOW)) == FORMATS.of(path).body(SLOW)


async def test_only_what_breaks_is_ended() -> None:
    for whole in ((STREAM, PART, LAST), (FILE, LAST), (FILE, PART)):
        assert await call(WholeStreams(replies(*whole)), path="/") == list(whole)
    start, body = await call(WholeStreams(replies()), path="/generate")
    assert (start["status"], json.loads(body["body"])["code"]) == (503, "request_aborted")


async def test_a_client_that_left_is_sent_nothing() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(STREAM)
        while (await receive())["type"] != "http.disconnect":
            pass

    assert await call(WholeStreams(app), path="/generate_stream") == [STREAM]


def test_metrics_of_replicas_are_one_family_each() -> None:
    def metrics(value: int) -> list[Metric]:
        family = CounterMetricFamily("prelude_requests", "Requests.", labels=["task"])
        family.add_metric(["a"], value)
        return [family]

    (family,) = Gathered({"one": metrics(1), "two": metrics(2)}).collect()
    assert [(sample.labels["replica"], sample.labels["task"], sample.value) for sample in family.samples] == [
        ("one", "a", 1),
        ("two", "a", 2),
    ]
