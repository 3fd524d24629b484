"""What a server cannot look after it refuses at once and says when to come back; what it accepted it answers."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.generation import LONG_TEXT
from tests.api.live import LiveServer, as_form, assert_error, live_server, parse_events, wait_until
from tests.support import random_soft_prompt


@contextmanager
def held(server: LiveServer, requests: int, task: str | None = None) -> Iterator[list[Future[httpx.Response]]]:
    """So many requests that are accepted and do not go on before the block ends."""
    server.model.allow(0)
    with ThreadPoolExecutor(requests) as pool:
        sent = [pool.submit(server.generate, "hello", task, max_new_tokens=3) for _ in range(requests)]
        try:
            wait_until(lambda: server.worker.num_in_flight == requests)
            yield sent
        finally:
            server.model.allow(None)


def test_a_full_queue_refuses_with_429_and_says_when_to_come_back(tmp_path: Path) -> None:
    with live_server(tmp_path, max_sequences=2, max_queue=3) as server:
        with held(server, 5) as sent:
            for route in ("/generate", "/generate_stream", "/"):
                refused = server.generate("hello", None, route)
                assert_error(refused, 429, "overloaded", "5 answers are in flight", "takes 5")
                assert int(refused.headers["retry-after"]) >= 1
        assert [future.result().status_code for future in sent] == [200] * 5
        assert server.generate(max_new_tokens=1).status_code == 200


def test_texts_of_a_list_and_choices_count_each(tmp_path: Path) -> None:
    with live_server(tmp_path, max_sequences=2, max_queue=3) as server, held(server, 1):
        assert_error(server.generate("hello", best_of=5, temperature=1.0), 429, "overloaded")
        assert_error(server.generate("hello", choices=["a", "b", "c", "d", "e"]), 429, "overloaded")
        many = server.client.post("/generate", json={"inputs": ["a", "b", "c", "d", "e"]})
        assert_error(many, 429, "overloaded")
        wait_until(lambda: server.worker.num_in_flight == 1)


def test_a_task_at_its_limit_does_not_stop_others(tmp_path: Path) -> None:
    with live_server(tmp_path, max_per_task=2) as server:
        server.publish_random("busy", 1)
        server.publish_random("quiet", 2)
        with held(server, 2, "busy"):
            assert_error(server.generate("hello", "busy"), 429, "overloaded", "for the task busy")
            with ThreadPoolExecutor(1) as pool:
                other = pool.submit(server.generate, "hello", "quiet", max_new_tokens=1)
                wait_until(lambda: server.worker.num_in_flight == 3)
                server.model.allow(None)
                assert other.result().status_code == 200


def test_a_publish_is_not_refused_because_of_a_full_queue(tmp_path: Path) -> None:
    with live_server(tmp_path, max_sequences=2, max_queue=0) as server:
        with held(server, 2), ThreadPoolExecutor(1) as pool:
            published = pool.submit(server.publish_random, "mood", 1)
            wait_until(lambda: server.worker.num_in_flight == 3)
            server.model.allow(None)
            published.result()
        assert server.generate("hello", "mood", max_new_tokens=1).headers["prelude-version"] == "1"


@pytest.mark.parametrize("route", ["/generate", "/v1/completions"])
def test_a_request_that_takes_too_long_ends_with_504_and_frees_what_it_held(tmp_path: Path, route: str) -> None:
    with live_server(tmp_path, request_timeout=0.4) as server:
        server.model.delay = 0.1
        body = {"model": "tiny-llama", "prompt": "hello", "max_tokens": 100, "ignore_eos": True}
        if route == "/generate":
            response = server.generate("hello", max_new_tokens=100, ignore_eos_token=True)
            assert_error(response, 504, "request_timed_out", "not complete after 0.4 s")
        else:
            response = server.client.post(route, json=body)
            assert response.status_code == 504
            assert response.json()["error"]["code"] == "request_timed_out"
        wait_until(lambda: server.is_idle)


def test_a_stream_that_takes_too_long_ends_with_an_error_event(tmp_path: Path) -> None:
    with live_server(tmp_path, request_timeout=0.6) as server:
        server.model.delay = 0.1
        response = server.generate("hello", None, "/generate_stream", max_new_tokens=100, ignore_eos_token=True)
        *tokens, last = parse_events(response.content)
        assert tokens
        assert last["code"] == "request_timed_out"
        wait_until(lambda: server.is_idle)


@contextmanager
def hanging_store(server: LiveServer) -> Iterator[None]:
    """A store that answers nothing before the block ends, as an object store behind a dead network."""
    gate = threading.Event()
    objects = server.registry._store._objects
    actions = {name: getattr(objects, name) for name in ("list", "get", "create", "delete")}

    def hung(name: str, *args: object) -> object:
        gate.wait()
        return actions[name](*args)

    for name in actions:
        setattr(objects, name, partial(hung, name))
    try:
        yield
    finally:
        gate.set()


def test_a_store_that_hangs_holds_up_changes_alone_and_only_so_many(tmp_path: Path) -> None:
    with live_server(tmp_path, max_upload_bytes=2**20) as server:
        server.publish_random("mood", 1)
        files = as_form(server.files(random_soft_prompt(server.model.spec, seed=2)))
        with ThreadPoolExecutor(60) as pool:
            with hanging_store(server):
                pending = [pool.submit(server.client.put, f"/prompts/new-{i}", files=files) for i in range(60)]
                wait_until(lambda: any(future.done() for future in pending))
                refused = next(future for future in pending if future.done()).result()
                assert_error(refused, 429, "overloaded", "32 changes of tasks wait already")
                assert int(refused.headers["retry-after"]) >= 1
                with httpx.Client(base_url=server.url, timeout=10) as client:
                    parameters = {"max_new_tokens": 1, "truncate": 5}
                    for text in ("hello", "x" * (LONG_TEXT + 1)):
                        body = {"inputs": text, "parameters": parameters}
                        answer = client.post("/generate", params={"task": "mood"}, json=body)
                        assert answer.status_code == 200, answer.text
                    for path in ("/metrics", "/health", "/ready", "/training/jobs", "/prompts"):
                        assert client.get(path).status_code == 200
            statuses = sorted(future.result().status_code for future in pending)
        assert statuses == [201] * 38 + [429] * 22


def stalled(server: LiveServer, path: str, body: Mapping[str, object]) -> socket.socket:
    """A client that asks for a stream and reads nothing of it, with as little room for it as there may be."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    connection.sendall(f"{head}\r\n\r\n".encode() + data)
    return connection


@pytest.fixture
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system takes little of what the server sends to a client that reads nothing."""
    made = HttpToolsProtocol.connection_made

    def connection_made(self: HttpToolsProtocol, transport: asyncio.Transport) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)

    monkeypatch.setattr(HttpToolsProtocol, "connection_made", connection_made)


@pytest.mark.usefixtures("_small_buffers")
@pytest.mark.parametrize("prompt", ["hello", ["hello", "there"]], ids=["one", "several"])
def test_a_stream_that_nobody_reads_gives_its_place_back_and_ends_in_time(
    tmp_path: Path, prompt: str | list[str]
) -> None:
    body = {
        "model": "tiny-llama",
        "prompt": prompt,
        "n": 8,
        "max_tokens": 100,
        "ignore_eos": True,
        "logprobs": 5,
        "stream": True,
    }
    with live_server(tmp_path, max_queue=8, request_timeout=5.0) as server:
        with closing(stalled(server, "/v1/completions", body)):
            wait_until(lambda: server.worker._admission._in_flight > 0)
            wait_until(lambda: not server.worker._admission._in_flight, 20)
            assert server.worker.num_in_flight > 0, "it was read, so that this test shows nothing"
            assert server.generate("hello", max_new_tokens=1).status_code == 200
            wait_until(lambda: server.worker.num_in_flight == 0, 20)
        assert server.generate("hello", max_new_tokens=1).status_code == 200


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
def test_a_request_that_waits_for_the_store_ends_in_time_and_holds_up_no_other_task(tmp_path: Path, path: str) -> None:
    with live_server(tmp_path, host_memory=1, request_timeout=2.0) as server:
        for seed, task in enumerate(("cold", "warm")):
            server.publish_random(task, seed)  # there is room for one alone
        with hanging_store(server):
            if path.startswith("/v1/"):
                late = server.client.post(path, json={"model": "cold", "prompt": "hello", "max_tokens": 1})
            else:
                late = server.generate("hello", "cold", path)
            assert_error(late, 504, "request_timed_out", "not complete after 2 s")
            assert server.generate("hello", "warm", max_new_tokens=1).status_code == 200
        wait_until(lambda: server.generate("hello", "cold", max_new_tokens=1).status_code == 200)
