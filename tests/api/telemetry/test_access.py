"""Every request has an id, on its reply and in the log, and ends in one line that tells what it was and no more."""

from __future__ import annotations

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api import ops
from server.api.telemetry.access import QUIET
from server.keys.file import add_key
from server.keys.key import Scope
from tests.api.live import LiveServer, live_server, wait_until
from tests.api.telemetry.logged import Log, logged

ROOT = Path(__file__).parents[3]
BODY: dict[str, Any] = {"inputs": "hello", "parameters": {"max_new_tokens": 3, "ignore_eos_token": True}}


def line_of(log: Log, request_id: str) -> dict[str, Any]:
    """A request's line, which is written when its reply is over: perhaps after the client has read it."""

    def found() -> list[dict[str, Any]]:
        return [entry for entry in log.requests if entry["request_id"] == request_id]

    wait_until(lambda: bool(found()))
    [line] = found()
    return line


def with_id(request_id: str) -> dict[str, str]:
    return {"X-Request-Id": request_id}


@pytest.mark.parametrize("given", ["a", "7f3c-11", "x" * 128, "with space, and !#$%&'()*+{|}~"])
def test_a_client_may_bring_an_id(server: LiveServer, given: str) -> None:
    assert server.client.get("/health", headers=with_id(given)).headers["x-request-id"] == given


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"X-Request-Id", b"")],
        [(b"X-Request-Id", b"x" * 129)],
        [(b"X-Request-Id", b"caf\xc3\xa9")],
        [(b"X-Request-Id", b"a\tb")],
        [(b"X-Request-Id", b"a"), (b"X-Request-Id", b"b")],
    ],
    ids=str,
)
def test_an_id_that_does_not_fit_is_replaced_by_a_new_one(
    server: LiveServer, headers: list[tuple[bytes, bytes]]
) -> None:
    replies = [server.client.get("/health", headers=headers) for _ in range(2)]
    ids = [reply.headers.get_list("x-request-id") for reply in replies]
    assert all(len(found) == 1 and re.fullmatch("[0-9a-f]{32}", found[0]) for found in ids)
    assert ids[0] != ids[1]


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/health", {}, 200),
        ("POST", "/generate", {"json": BODY}, 200),
        ("POST", "/generate_stream", {"json": BODY}, 200),
        ("POST", "/generate?task=nobody", {"json": BODY}, 404),
        ("POST", "/generate", {"json": {}}, 422),
        ("POST", "/generate", {"content": b"{"}, 422),
        ("POST", "/v1/completions", {"json": {}}, 400),
        ("POST", "/generate", {"content": b"x" * 5 * 2**20}, 413),
        ("GET", "/nowhere", {}, 404),
        ("GET", "/generate", {}, 405),
        ("GET", "/health", {"headers": {"Host": "evil.example"}}, 403),
        ("POST", "/generate", {"json": BODY, "headers": {"Sec-Fetch-Site": "cross-site"}}, 403),
    ],
)
def test_every_reply_has_the_id_and_every_request_one_line(
    server: LiveServer, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    request_id = f"{method} {path} {status} {sorted(options)}"
    with logged(level=logging.DEBUG) as log:
        headers = {**options.pop("headers", {}), **with_id(request_id)}
        reply = server.client.request(method, path, headers=headers, **options)
        assert (reply.status_code, reply.headers["x-request-id"]) == (status, request_id)
        line = line_of(log, request_id)
    assert (line["method"], line["status"]) == (method, status)
    assert 0 < line["seconds"] < 30


def test_an_error_that_nobody_expected_has_the_id_too_in_its_reply_and_its_traceback(
    own_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_server.registry, "resolve", None)
    with logged() as log, httpx.Client(base_url=own_server.url) as client:  # uvicorn closes the connection after it
        reply = client.post("/generate?task=mood", json=BODY, headers=with_id("unlucky"))
        assert (reply.status_code, reply.headers["x-request-id"]) == (500, "unlucky")
        assert line_of(log, "unlucky")["outcome"] == "failed"
        wait_until(lambda: any("exception" in entry for entry in log.entries))
    [failure] = [entry for entry in log.entries if "exception" in entry]
    assert failure["request_id"] == "unlucky"
    assert "not callable" in failure["exception"]


def test_the_line_of_an_answer_tells_task_version_and_tokens(own_server: LiveServer) -> None:
    own_server.publish_random("mood", 1)
    for route in ("/generate", "/generate_stream"):
        with logged() as log:
            own_server.client.post(f"{route}?task=mood", json=BODY, headers=with_id("one"))
            line = line_of(log, "one")
        assert {name: line[name] for name in line if name not in ("seconds", "timestamp")} == {
            "event": "request",
            "level": "info",
            "logger": "server.api.telemetry.access",
            "request_id": "one",
            "method": "POST",
            "route": route,
            "status": 200,
            "task": "mood",
            "version": 1,
            "outcome": "finished",
            "input_tokens": 5,
            "virtual_tokens": 5,
            "cached_tokens": 5,
            "output_tokens": 3,
        }


def test_several_texts_are_one_line(server: LiveServer) -> None:
    with logged() as log:
        body = {**BODY, "inputs": ["hello", "world!"]}
        assert server.client.post("/generate", json=body, headers=with_id("many")).status_code == 200
        line = line_of(log, "many")
    assert (line["input_tokens"], line["output_tokens"]) == (11, 6)


def test_the_line_names_the_route_and_never_the_path(server: LiveServer) -> None:
    with logged() as log:
        for path, status in (("/prompts/secret-name", 404), ("/secret/words", 404)):
            assert server.client.get(path, headers=with_id(path[:9])).status_code == status
            line_of(log, path[:9])
    assert [line.get("route") for line in log.requests] == ["/prompts/{task}", None]
    assert "secret-name" not in str(log.requests)
    assert "words" not in str(log.requests)


def test_the_line_tells_whose_key_it_was(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key, text = add_key(path, "ci", [Scope.GENERATE], None)
    with live_server(tmp_path, api_keys_file=path) as live, logged() as log:
        headers = {"Authorization": f"Bearer {text}", **with_id("mine")}
        assert live.client.post("/generate", json=BODY, headers=headers).status_code == 200
        assert line_of(log, "mine")["key"] == key.id
        assert live.client.post("/generate", json=BODY, headers=with_id("nobody's")).status_code == 401
        line = line_of(log, "nobody's")
    assert "key" not in line
    assert line["outcome"] == "refused"
    assert text.split("_")[2] not in log.text


def test_requests_that_overlap_keep_their_ids_apart(own_server: LiveServer) -> None:
    own_server.model.delay = 0.002
    ids = [f"id-{i}" for i in range(24)]
    with logged() as log, ThreadPoolExecutor(12) as pool:
        parameters = [{**BODY["parameters"], "max_new_tokens": i + 1} for i in range(24)]
        bodies = [{**BODY, "parameters": each} for each in parameters]
        replies = pool.map(
            lambda pair: own_server.client.post("/generate", json=pair[0], headers=with_id(pair[1])),
            zip(bodies, ids, strict=True),
        )
        assert [reply.headers["x-request-id"] for reply in replies] == ids
        tokens = [line_of(log, request_id)["output_tokens"] for request_id in ids]
    assert tokens == [i + 1 for i in range(24)]


def test_ids_that_repeat_do_not_disturb_the_engine(own_server: LiveServer) -> None:
    own_server.model.delay = 0.002
    with ThreadPoolExecutor(8) as pool:
        replies = pool.map(lambda _: own_server.client.post("/generate", json=BODY, headers=with_id("same")), range(16))
        assert {(reply.status_code, reply.text) for reply in replies} == {(200, own_server.generate(**short()).text)}


def short() -> dict[str, Any]:
    return {"inputs": "hello", **BODY["parameters"]}


def test_probes_and_scrapes_are_quiet_unless_they_fail(own_server: LiveServer) -> None:
    with logged() as log:
        for path in QUIET:
            assert own_server.client.get(path).status_code == 200
        own_server.worker.draining = True
        assert own_server.client.get("/ready", headers=with_id("late")).status_code == 503
        line_of(log, "late")
    assert [line["route"] for line in log.requests] == ["/ready"]
    assert {route.path for route in ops.router.routes if hasattr(route, "path")} - {"/info"} == QUIET


def test_the_page_on_operations_tells_every_field(own_server: LiveServer) -> None:
    own_server.publish_random("mood", 1)
    with logged() as log:
        own_server.client.post("/generate?task=mood", json=BODY, headers=with_id("one"))
        fields = {*line_of(log, "one"), "key", "exception", "trace_id"}
    page = (ROOT / "docs/operations.md").read_text().partition("## Logs")[2]
    rows = re.findall(r"^\| (`[^|]+`) \|", page, re.MULTILINE)
    assert {field for row in rows for field in re.findall(r"`(\w+)`", row)} == fields
