"""Streams: one event per token, exactly one end, and nothing left behind by clients that vanish."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from server.api.sse import EventStream
from server.errors import GenerationFailed
from tests.api.live import LiveServer, assert_error, parse_events, send_and_vanish, wait_until

ENDLESS: dict[str, Any] = {"max_new_tokens": 150, "ignore_eos_token": True}


def test_there_is_one_event_per_token_and_the_last_one_has_the_whole_text(server: LiveServer) -> None:
    server.publish_random("sse-task", 1)
    for task in (None, "sse-task"):
        whole = server.generate("hello", task, max_new_tokens=30, details=True).json()
        events = server.events("hello", task, max_new_tokens=30, details=True)
        assert [event["token"] for event in events] == whole["details"]["tokens"]
        assert [event["index"] for event in events] == list(range(1, len(events) + 1))
        assert [event["generated_text"] for event in events[:-1]] == [None] * (len(events) - 1)
        texts = [event["token"]["text"] for event in events if not event["token"]["special"]]
        assert "".join(texts) == events[-1]["generated_text"] == whole["generated_text"]


def test_a_stop_string_is_never_sent_not_even_in_part(server: LiveServer) -> None:
    whole = server.text("hello", max_new_tokens=40)
    end = next(i for i in range(5, len(whole) - 3) if whole.find(whole[i : i + 3]) == i)
    events = server.events("hello", max_new_tokens=40, stop=[whole[end : end + 3]])
    assert "".join(event["token"]["text"] for event in events) == whole[:end] == events[-1]["generated_text"]


def test_an_end_token_is_a_special_event_outside_the_text(server: LiveServer) -> None:
    parameters: dict[str, Any] = {"temperature": 3.0, "max_new_tokens": 150}
    streams = (server.events("hello", **parameters, seed=seed) for seed in range(60))
    events = next(events for events in streams if events[-1]["token"]["special"])
    assert events[-1]["token"]["text"] == "<eos>"
    assert "".join(event["token"]["text"] for event in events[:-1]) == events[-1]["generated_text"]


def test_events_come_as_they_are_made(own_server: LiveServer) -> None:
    own_server.model.allow(3)
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 10}}
    with own_server.client.stream("POST", "/generate_stream", json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        first = json.loads(next(lines).removeprefix("data:"))  # although the engine cannot make the fourth token
        assert first["index"] == 1
        own_server.model.allow(None)
        assert len(list(lines)) == 9


def test_a_stream_says_that_it_is_one_and_must_not_be_cached(server: LiveServer) -> None:
    headers = server.generate(route="/generate_stream", max_new_tokens=1).headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    assert "content-length" not in headers


def test_a_refusal_comes_before_the_stream_with_its_status(server: LiveServer) -> None:
    assert_error(server.generate("a" * 500, route="/generate_stream"), 422, "input_too_long")
    assert_error(server.generate("", route="/generate_stream"), 422, "empty_input")
    assert_error(server.generate("a", "sse-nobody", "/generate_stream"), 404, "unknown_task")


def test_a_failure_after_the_first_token_ends_the_stream_with_an_error_event(own_server: LiveServer) -> None:
    expected = own_server.events("hello", max_new_tokens=10)
    own_server.model.fail_after = 4
    *tokens, error = own_server.events("hello", max_new_tokens=10)
    assert tokens == expected[:4]
    assert set(error) == {"error", "error_type", "code", "remedy"}
    assert (error["code"], error["error_type"]) == ("generation_failed", "generation")
    assert own_server.events("hello", max_new_tokens=10) == expected


def test_a_failure_before_the_first_token_is_a_500(own_server: LiveServer) -> None:
    for route in ("/generate", "/generate_stream"):
        own_server.model.fail_after = 0
        assert_error(own_server.generate(route=route), 500, "generation_failed")
    own_server.model.fail_after = 3
    assert_error(own_server.generate(max_new_tokens=10), 500, "generation_failed")
    assert own_server.generate().status_code == 200


def test_a_failure_gives_everybody_in_flight_exactly_one_end(own_server: LiveServer) -> None:
    own_server.publish_random("sse-a", 1)
    own_server.model.allow(0)
    with ThreadPoolExecutor(20) as pool:
        routes = ["/generate", "/generate_stream"] * 10
        futures = [
            pool.submit(own_server.generate, "hello", [None, "sse-a"][i % 2], route, max_new_tokens=50)
            for i, route in enumerate(routes)
        ]
        wait_until(lambda: own_server.worker.num_in_flight == 20)
        own_server.model.fail_after = 12
        own_server.model.allow(None)
        replies = [future.result() for future in futures]
    ends = 0
    for reply in replies:
        if reply.headers["content-type"] == "application/json":
            ends += 1
            assert reply.status_code == 200 or reply.json()["code"] == "generation_failed"
        else:
            events = parse_events(reply.content)
            ends += sum("error" in event or event["generated_text"] is not None for event in events)
            assert "error" in events[-1] or events[-1]["generated_text"] is not None
    assert ends == 20
    assert any(reply.status_code == 500 for reply in replies)
    wait_until(lambda: own_server.is_idle, 1)


@pytest.mark.parametrize("route", ["/generate_stream", "/generate", "/"])
def test_a_client_that_vanishes_frees_its_sequence(own_server: LiveServer, route: str) -> None:
    own_server.model.delay = 0.02
    body = json.dumps({"inputs": "hello", "parameters": ENDLESS}).encode()
    connection = send_and_vanish(own_server.port, route, body)
    wait_until(lambda: own_server.in_flight == 1 and len(own_server.engine.kv_cache.allocator.used) == 1)
    if route == "/generate_stream":
        assert connection.recv(16) == b"HTTP/1.1 200 OK\r"[:16]
    connection.close()
    wait_until(lambda: own_server.is_idle, 1)


def test_fifty_clients_that_vanish_leave_nothing_behind(own_server: LiveServer) -> None:
    own_server.publish_random("sse-b", 2)
    expected = [own_server.text("hello", task, max_new_tokens=20) for task in (None, "sse-b")]
    own_server.model.delay = 0.01
    body = json.dumps({"inputs": "hello" * 5, "parameters": ENDLESS}).encode()
    paths = ("/generate_stream", "/generate", "/generate_stream?task=sse-b", "/?task=sse-b", "/generate_stream")
    connections = [send_and_vanish(own_server.port, paths[i % len(paths)], body) for i in range(50)]
    wait_until(lambda: own_server.in_flight == 50)
    assert len(own_server.engine.kv_cache.allocator.used) <= 8  # the others wait, and leave from there
    stayed: list[str] = []
    stays = threading.Thread(target=lambda: stayed.append(own_server.text("hello", "sse-b", max_new_tokens=20)))
    stays.start()
    for connection in connections:
        connection.close()
    stays.join(10)
    own_server.model.delay = 0
    wait_until(lambda: own_server.is_idle, 1)
    assert stayed == [expected[1]]
    assert [own_server.text("hello", task, max_new_tokens=20) for task in (None, "sse-b")] == expected


def test_an_engine_that_has_stopped_lets_nobody_wait(own_server: LiveServer) -> None:
    leaked = own_server.engine.kv_cache.allocator.allocate(10)  # the integrity check at the next idle moment finds it
    assert leaked is not None
    assert own_server.generate(max_new_tokens=3).status_code == 200
    wait_until(lambda: own_server.client.get("/ready").status_code == 500)
    for route in ("/generate", "/generate_stream"):
        assert_error(own_server.generate(route=route), 500, "generation_failed", "engine has stopped")
    assert own_server.client.get("/health").status_code == 500, "only another process can serve"
    own_server.engine.kv_cache.allocator.release(leaked)


async def _stream(events: AsyncGenerator[dict[str, Any]]) -> httpx.Response:
    transport = httpx.ASGITransport(app=EventStream(events, {}))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get("/")


async def test_events_survive_clients_that_split_lines_as_unicode_does() -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\nh\ri\N{SNOWMAN}\N{GRINNING FACE}"

    async def events() -> AsyncGenerator[dict[str, Any]]:
        yield {"text": text}

    response = await _stream(events())
    lines = [line for line in response.text.splitlines() if line]
    assert [json.loads(line.removeprefix("data:")) for line in lines] == [{"text": text}]


async def test_an_error_in_a_stream_is_an_event_and_its_insides_are_not_told() -> None:
    async def fails(error: Exception) -> AsyncGenerator[dict[str, Any]]:
        yield {"n": 1}
        raise error

    _, ours = parse_events((await _stream(fails(GenerationFailed("It broke.")))).content)
    assert (ours["error"], ours["code"]) == ("It broke.", "generation_failed")
    _, other = parse_events((await _stream(fails(ValueError("secret")))).content)
    assert other["code"] == "internal_error"
    assert "secret" not in json.dumps(other)


async def test_the_events_are_closed_when_the_client_is_gone_although_nothing_is_sent() -> None:
    closed = False

    async def events() -> AsyncGenerator[dict[str, Any]]:
        nonlocal closed
        try:
            yield {"n": 1}
            await asyncio.Event().wait()
        finally:
            closed = True

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    await EventStream(events(), {})({"type": "http"}, receive, send)
    assert closed
