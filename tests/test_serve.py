"""The real command in a process of its own: it comes up, answers, and ends with 0 after a drain."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import shlex
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import uvicorn
from structlog.contextvars import bound_contextvars, get_contextvars

from server.cli.main import imports_kept
from server.engine.model.frozen import FrozenModel
from server.errors import ConfigurationError
from server.keys.file import add_key
from server.keys.key import Scope
from server.serve import (
    ENGINE_FAILED,
    LATEST_SECONDS,
    DrainingServer,
    bind,
    check_exposure,
    first_request,
    open_keys,
    serve,
)
from server.settings import Settings
from server.soft_prompts.formats import save_soft_prompt
from tests.processes import COMMAND, prelude_serve, start_forked
from tests.support import make_engine, random_soft_prompt


class Stream(threading.Thread):
    """A streaming request in a thread of its own."""

    def __init__(self, client: httpx.Client, max_new_tokens: int) -> None:
        super().__init__()
        self._client = client
        parameters = {"max_new_tokens": max_new_tokens, "ignore_eos_token": True}
        self._body = {"inputs": "Once upon a time", "parameters": parameters}
        self.events: list[dict[str, Any]] = []
        self.has_begun = threading.Event()

    def run(self) -> None:
        with self._client.stream("POST", "/generate_stream", json=self._body) as response:
            for line in response.iter_lines():
                if line:
                    self.events.append(json.loads(line.removeprefix("data:")))
                    self.has_begun.set()


def test_serve_publishes_the_inbox_answers_and_on_sigterm_finishes_what_runs(
    tmp_path: Path, served_smollm2: FrozenModel
) -> None:
    spec = served_smollm2.spec
    save_soft_prompt(tmp_path / "prompts" / "shipped", random_soft_prompt(spec, seed=1), spec)
    with prelude_serve(tmp_path) as process:
        client = process.client
        assert [prompt["task"] for prompt in client.get("/prompts").json()["prompts"]] == ["shipped"]
        assert client.get("/info").json()["fingerprint"] == spec.fingerprint
        body = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 8}}
        alone = client.post("/generate", json=body)
        assert "Paris" in alone.json()["generated_text"]
        with_task = client.post("/generate", params={"task": "shipped"}, json=body)
        assert with_task.headers["prelude-task"] == "shipped"
        assert with_task.json() != alone.json()

        stream = Stream(client, max_new_tokens=80)
        stream.start()
        assert stream.has_begun.wait(30)
        process.popen.send_signal(signal.SIGTERM)
        refused = _until_refused(client, body)
        assert refused.status_code == 503
        assert refused.json()["code"] == "server_draining"
        assert client.get("/ready").status_code == 503
        assert stream.is_alive(), "the stream is over, so that this test shows nothing"
        stream.join(200)  # a second for a token, on a machine whose memory others use
        assert len(stream.events) == 80
        assert stream.events[-1]["generated_text"]
        assert process.ended_with(15) == 0, process.log.read_text()
    assert "Traceback" not in process.log.read_text()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{client.base_url}/health")


STEERED_ENGINE = """
import time
from pathlib import Path
from server.engine.model.frozen import FrozenModel
forward = FrozenModel.forward
def steered(self, *args):
    if Path({place!r}, "poisoned").exists():
        raise RuntimeError("CUDA error: device-side assert triggered")
    if Path({place!r}, "slow").exists():
        time.sleep(0.1)
    return forward(self, *args)
FrozenModel.forward = steered
"""
"""An engine that slows down or breaks when a file of this name is there."""


def test_serve_ends_with_0_although_the_drain_time_is_up(tmp_path: Path, served_tiny: dict[str, str]) -> None:
    program = STEERED_ENGINE.format(place=str(tmp_path))
    with prelude_serve(tmp_path, program, PRELUDE_DRAIN_SECONDS="0.5", **served_tiny) as process:
        (tmp_path / "slow").touch()
        stream = Stream(process.client, max_new_tokens=100)
        stream.start()
        assert stream.has_begun.wait(30)
        process.popen.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.ended_with(15) == 0, process.log.read_text()
        assert 0.5 <= time.monotonic() - started < 10
        stream.join(10)
        assert stream.events[-1]["code"] == "request_aborted"
        assert len(stream.events) < 100
    assert "Traceback" not in process.log.read_text()


HANGING_STORE = """
import time
from pathlib import Path
from server.registry.objects import LocalObjects
def hang(*_):
    while True:
        time.sleep(1)
create = LocalObjects.create
LocalObjects.create = lambda self, *args: hang() if Path({flag!r}).exists() else create(self, *args)
"""


def test_sigterm_ends_the_process_within_the_drain_although_the_store_hangs(
    tmp_path: Path, tiny32: FrozenModel, served_tiny: dict[str, str]
) -> None:
    flag = tmp_path / "hang"
    uploads = []
    for seed in range(6):
        folder = tmp_path / f"upload-{seed}"
        save_soft_prompt(folder, random_soft_prompt(tiny32.spec, seed=seed), tiny32.spec)
        uploads.append([("files", (path.name, path.read_bytes())) for path in folder.iterdir()])
    program = HANGING_STORE.format(flag=str(flag))
    serving = prelude_serve(tmp_path, program, PRELUDE_DRAIN_SECONDS="1", **served_tiny)
    with serving as process, ThreadPoolExecutor(6) as pool:
        flag.touch()
        hung = [pool.submit(process.client.put, f"/prompts/new-{i}", files=files) for i, files in enumerate(uploads)]
        end = time.monotonic() + 60
        while "prelude_prefix_cache_misses_total 6.0" not in process.client.get("/metrics").text:
            assert time.monotonic() < end
            time.sleep(0.05)  # each has computed its prefix, and goes to the store next
        process.popen.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.ended_with(30) == 0, process.log.read_text()
        assert time.monotonic() - started < 1 + LATEST_SECONDS + 5
        assert all(future.exception() is not None or future.result().status_code >= 500 for future in hung)
    assert re.search(r"left behind: .*changes", process.log.read_text())


def test_an_engine_that_has_failed_for_good_ends_the_process_so_that_it_is_started_again(
    tmp_path: Path, served_tiny: dict[str, str]
) -> None:
    with prelude_serve(tmp_path, STEERED_ENGINE.format(place=str(tmp_path)), **served_tiny) as process:
        (tmp_path / "slow").touch()
        stream = Stream(process.client, max_new_tokens=100)
        stream.start()
        assert stream.has_begun.wait(30)
        (tmp_path / "poisoned").touch()
        assert process.ended_with(30) == ENGINE_FAILED, process.log.read_text()
        stream.join(10)
        assert stream.events[-1]["code"] == "generation_failed"
    assert "the engine has failed for good" in process.log.read_text()


def _until_refused(client: httpx.Client, body: dict[str, Any]) -> httpx.Response:
    """The first reply after the signal has arrived; until then requests are answered."""
    end = time.monotonic() + 10
    while True:
        response = client.post("/generate", json={**body, "parameters": {"max_new_tokens": 1}})
        if response.status_code != 200:
            return response
        assert time.monotonic() < end


def test_an_address_is_taken_by_one_server_before_its_model_is_loaded() -> None:
    with bind("127.0.0.1", 0) as first, pytest.raises(ConfigurationError, match="Cannot listen"):
        bind("127.0.0.1", first.getsockname()[1])


def listen(host: str, **options: Any) -> None:
    """What a server that is to listen there does first."""
    if ":" in host and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    with bind(host, 0) as listener:
        check_exposure(Settings(host=host, **options), listener.getsockname()[0])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "127.1", "::1"])
def test_on_loopback_no_keys_are_needed(host: str) -> None:
    listen(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "", "0", "::"])
def test_on_other_addresses_a_server_without_keys_does_not_start_unless_everybody_is_meant(
    host: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigurationError, match="could use, replace and delete every task") as caught:
        listen(host)
    for way_out in ("prelude keys create --file keys.json", "PRELUDE_API_KEYS_FILE=keys.json", "ALLOW_ANONYMOUS=1"):
        assert way_out in caught.value.remedy
    assert "no API keys" not in caplog.text
    listen(host, allow_anonymous=True)
    assert "no API keys: everybody who reaches" in caplog.text
    listen(host, api_keys_file=tmp_path / "keys.json")


def test_all_pages_are_let_in_only_where_a_key_is_asked_for_or_everybody_is_meant(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="every page in a browser") as caught:
        listen("127.0.0.1", cors_origins="*")
    assert "PRELUDE_ALLOW_ANONYMOUS=1" in caught.value.remedy
    listen("127.0.0.1", cors_origins="https://app.example")
    listen("127.0.0.1", cors_origins="*", allow_anonymous=True)
    listen("127.0.0.1", cors_origins="*", api_keys_file=tmp_path / "keys.json")


def test_what_counts_is_the_address_that_the_socket_has_and_not_its_name() -> None:
    with bind("0.0.0.0", 0) as listener, pytest.raises(ConfigurationError):
        check_exposure(Settings(host="localhost"), listener.getsockname()[0])


def test_the_keys_that_the_settings_name_are_read_before_the_model(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    assert open_keys(Settings()) is None
    with pytest.raises(ConfigurationError, match="cannot be read") as caught:
        open_keys(Settings(api_keys_file=path))
    assert "prelude keys create" in caught.value.remedy
    text = add_key(path, "ci", [Scope.ADMIN], None)[1]
    keys = open_keys(Settings(api_keys_file=path))
    assert keys is not None
    assert keys.find(text) is not None
    with pytest.raises(ConfigurationError, match="lets everybody in") as caught:
        open_keys(Settings(api_keys_file=path, allow_anonymous=True))
    assert caught.value.remedy == "Leave out one of them."


def test_the_command_refuses_with_both_ways_out_and_status_2(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PRELUDE_")}
    options = ["serve", "--host", "0.0.0.0", "--port", "0", "--model", "/none"]
    log = tmp_path / "log.txt"
    assert start_forked(COMMAND, options, environment, log).wait(60) == 2
    told = log.read_text()
    assert "Traceback" not in told
    assert "PRELUDE_API_KEYS_FILE=keys.json" in told
    assert "PRELUDE_ALLOW_ANONYMOUS=1" in told


def test_the_command_serves_with_keys(tmp_path: Path, served_tiny: dict[str, str]) -> None:
    path = tmp_path / "keys.json"
    text = add_key(path, "ci", [Scope.GENERATE], None)[1]
    settings = served_tiny | {"PRELUDE_API_KEYS_FILE": str(path), "PRELUDE_LOG_LEVEL": "debug"}
    with prelude_serve(tmp_path, **settings) as process:
        body = {"inputs": "my-very-own-words", "parameters": {"max_new_tokens": 1}}
        assert process.client.post("/generate", json=body).status_code == 401
        allowed = process.client.post("/generate", json=body, headers={"Authorization": f"Bearer {text}"})
        assert allowed.status_code == 200
        process.popen.send_signal(signal.SIGTERM)
        assert process.ended_with(15) == 0
    log = process.log.read_text()
    assert "ready on http" in log
    assert text.split("_")[2] not in log
    assert "my-very-own-words" not in log


def test_the_command_logs_json_that_tells_where_it_is_ready_and_what_it_served(
    tmp_path: Path, served_tiny: dict[str, str]
) -> None:
    with prelude_serve(tmp_path, PRELUDE_LOG_FORMAT="json", **served_tiny) as process:
        body = {"inputs": "hello", "parameters": {"max_new_tokens": 1}}
        assert process.client.post("/generate", json=body, headers={"X-Request-Id": "one"}).status_code == 200
        process.popen.send_signal(signal.SIGTERM)
        assert process.ended_with(15) == 0
    entries = [json.loads(line) for line in process.log.read_text().splitlines()]
    assert [entry["level"] for entry in entries if entry["event"].startswith("ready on http://")] == ["info"]
    starts = ["loading", "loaded", "optimised", "KV cache", "0 tasks", "ready on", "try"]
    events = [entry["event"] for entry in entries if not entry["event"].startswith(("compiling", "converting"))]
    assert [event[: len(start)] for event, start in zip(events, starts, strict=False)] == starts
    [served] = [entry for entry in entries if entry["event"] == "request" and entry["route"] == "/generate"]
    assert (served["request_id"], served["status"], served["output_tokens"]) == ("one", 200, 1)


def test_what_is_loaded_at_the_start_is_never_looked_through_again(
    tiny: FrozenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collection of everything stops the server for as long as several tokens take."""
    kept: list[int] = []
    monkeypatch.setattr("server.serve.start_engine", lambda settings: make_engine(tiny))
    monkeypatch.setattr("server.serve.DrainingServer.run", lambda *_: kept.append(gc.get_freeze_count()))
    serve(Settings.load(port=0, prompts_dir=tmp_path / "prompts"))
    assert kept[0] > 10_000


@pytest.mark.parametrize(("task", "with_key"), [(None, False), ("a_task", True)])
def test_the_first_command_that_a_start_shows_is_a_request_that_a_shell_can_send(
    task: str | None, with_key: bool
) -> None:
    words = shlex.split(first_request(task, with_key).replace("{url}", "http://127.0.0.1:8000"))
    assert words[:2] == ["curl", "http://127.0.0.1:8000/generate" + ("?task=a_task" if task else "")]
    assert json.loads(words[-1]) == {"inputs": "Hello, how are you?"}
    assert ("authorization: Bearer KEY" in words) is with_key


def test_imports_of_a_start_are_not_collected_and_collection_goes_on_afterwards() -> None:
    made = [[i] for i in range(1_000)]
    before = gc.get_freeze_count()
    with imports_kept():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > before + len(made)


async def test_a_shutdown_that_is_signalled_within_a_request_is_not_logged_under_its_id() -> None:
    seen: list[dict[str, Any]] = []

    class Worker:
        num_in_flight = 0

        async def drain(self, seconds: float) -> None:
            seen.append(get_contextvars())

    server = DrainingServer(uvicorn.Config(lambda: None, log_config=None), cast(Any, Worker()), 1.0)
    server._loop = asyncio.get_running_loop()
    with bound_contextvars(request_id="somebody's"):
        server.handle_exit(signal.SIGTERM, None)
    assert server._draining is not None
    assert server._latest_end is not None
    await asyncio.wrap_future(server._draining)
    server._latest_end.cancel()
    assert seen == [{}]
