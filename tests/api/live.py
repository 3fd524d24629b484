"""A live server for tests: the real app on a real socket, around a tiny model that can be slowed, held or broken."""

from __future__ import annotations

import asyncio
import io
import json
import os
import socket
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx
import torch
import uvicorn

from server.api.app import create_app
from server.api.connection import bounded_protocol
from server.api.telemetry.spans import Tracing
from server.background_service import Service
from server.engine.attention.interface import ATTENTION_NAME, Layout
from server.engine.engine import Engine
from server.engine.model.frozen import FrozenModel
from server.engine.worker import EngineWorker
from server.jobs.folder import JobFolder
from server.jobs.job_queue import JobQueue
from server.jobs.launcher import Child, write_order
from server.jobs.process_main import main
from server.jobs.supervisor import JobRunner, Start
from server.registry.inbox import Inbox
from server.registry.objects import open_objects
from server.registry.registry import Registry
from server.registry.store import Store
from server.registry.sync import Syncer
from server.serve import limits, open_keys
from server.settings import Settings
from server.soft_prompts.formats import save_soft_prompt
from server.soft_prompts.soft_prompt import SoftPrompt
from tests.processes import fork
from tests.support import Outcome, byte_tokenizer, make_engine, random_soft_prompt, request, run_engine, tiny_module

MAX_MODEL_LEN = 192
MAX_UPLOAD_BYTES = 2**20

Files = dict[str, bytes]


class SteeredModel(FrozenModel):
    """A tiny llama that behaves like a slow device, one that hangs, or one that breaks."""

    def __init__(self) -> None:
        module = tiny_module(dtype=torch.float64, attention=ATTENTION_NAME)
        super().__init__(module, byte_tokenizer(), name="tiny-llama", max_model_len=MAX_MODEL_LEN)
        self.delay = 0.0
        """Seconds that each forward takes longer."""
        self.fail_after: int | None = None
        """Forwards until one raises."""
        self._turn = threading.Condition()
        self._allowed: int | None = None

    def allow(self, forwards: int | None) -> None:
        """Let so many more forwards run, then hold; None lets all run."""
        with self._turn:
            self._allowed = forwards
            self._turn.notify_all()

    def forward(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, layout: Layout, keep: torch.Tensor
    ) -> torch.Tensor:
        with self._turn:
            assert self._turn.wait_for(lambda: self._allowed != 0, timeout=30)
            if self._allowed is not None:
                self._allowed -= 1
        time.sleep(self.delay)
        if self.fail_after is not None:
            if self.fail_after == 0:
                self.fail_after = None
                raise RuntimeError("the device is gone")
            self.fail_after -= 1
        return super().forward(inputs_embeds, position_ids, layout, keep)


@dataclass
class LiveServer:
    """A server that listens, and what a test may look at from inside."""

    url: str
    port: int
    client: httpx.Client
    settings: Settings
    model: SteeredModel
    engine: Engine
    worker: EngineWorker
    registry: Registry
    loop: asyncio.AbstractEventLoop

    def generate(
        self, inputs: str = "hello", task: str | None = None, route: str = "/generate", **parameters: Any
    ) -> httpx.Response:
        """POST a request; `parameters` are those of the body."""
        query = {} if task is None else {"task": task}
        return self.client.post(route, params=query, json={"inputs": inputs, "parameters": parameters})

    def text(self, inputs: str = "hello", task: str | None = None, **parameters: Any) -> str:
        """The text that a request is answered with."""
        response = self.generate(inputs, task, **parameters)
        assert response.status_code == 200, response.text
        text: str = response.json()["generated_text"]
        return text

    def events(self, inputs: str = "hello", task: str | None = None, **parameters: Any) -> list[dict[str, Any]]:
        """All events of a streamed answer."""
        response = self.generate(inputs, task, "/generate_stream", **parameters)
        assert response.status_code == 200, response.text
        return parse_events(response.content)

    def put(self, task: str, files: Files) -> httpx.Response:
        """Upload files under a task's name."""
        return self.client.put(f"/prompts/{task}", files=as_form(files))

    def publish(self, task: str, soft_prompt: SoftPrompt) -> dict[str, Any]:
        """Upload a soft prompt that must be taken."""
        response = self.put(task, self.files(soft_prompt))
        assert response.status_code in (200, 201), response.text
        reply: dict[str, Any] = response.json()
        return reply

    def publish_random(self, task: str, seed: int = 0, manifest: Mapping[str, Any] | None = None) -> SoftPrompt:
        """Upload a random soft prompt and answer it."""
        soft_prompt = random_soft_prompt(self.model.spec, seed=seed, manifest=manifest)
        self.publish(task, soft_prompt)
        return soft_prompt

    def files(self, soft_prompt: SoftPrompt) -> Files:
        """A soft prompt as the files of a PEFT directory."""
        with tempfile.TemporaryDirectory() as folder:
            save_soft_prompt(Path(folder), soft_prompt, self.model.spec)
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}

    @property
    def in_flight(self) -> int:
        """What /info says."""
        count: int = self.client.get("/info").json()["in_flight"]
        return count

    @property
    def is_idle(self) -> bool:
        """Nothing in flight, and the engine holds no slot."""
        return self.in_flight == 0 and not self.engine.kv_cache.allocator.used


def start_eagerly(folder: JobFolder, settings: Settings) -> Child:
    """A job's process as eager as the tests: beside other work, one that steps back might never come to an end."""
    return fork(be_process, (folder, settings), folder.log)


def be_process(folder: JobFolder, settings: Settings) -> None:
    """Be a job's process, as eager as the tests."""
    write_order(folder, settings, os.getppid(), steps_back=False)
    sys.exit(main(folder.path))


@contextmanager
def live_server(
    directory: Path,
    *,
    max_sequences: int = 8,
    model: FrozenModel | None = None,
    tracing: Tracing | None = None,
    start: Start = start_eagerly,
    **options: Any,
) -> Iterator[LiveServer]:
    """Run a server in a thread until the block ends; it must then be idle and stop by itself."""
    defaults = {
        "prompts_dir": directory / "prompts",
        "max_upload_bytes": MAX_UPLOAD_BYTES,
        "max_sequences": max_sequences,
    }
    settings = Settings.load(**{**defaults, **options})
    model = model or SteeredModel()
    engine = make_engine(model, max_sequences=max_sequences)
    worker = EngineWorker(engine, limits(settings))
    store = Store(open_objects(settings.store_url))
    registry = Registry(store, model.spec, settings.max_virtual_tokens, settings.host_memory)
    job_queue = JobQueue(settings, model.spec, worker.text.encode, worker.text.length_bound.can_fit)
    services: list[Service] = [
        Inbox(settings.prompts_dir, registry),
        Syncer(registry, settings.sync_seconds),
        JobRunner(settings, registry, job_queue, start),
    ]
    app = create_app(settings, worker, registry, services, open_keys(settings), job_queue, tracing)
    options = {"http": bounded_protocol(), "log_config": None, "lifespan": "on", "ws": "none"}
    with serving(uvicorn.Config(app, host="127.0.0.1", port=0, **options)) as port:
        url = f"http://127.0.0.1:{port}"
        loop = worker._loop
        assert loop is not None
        # After 5 s the server closes an idle connection, perhaps just as the client uses it again: forget it earlier.
        with httpx.Client(base_url=url, timeout=30, limits=httpx.Limits(keepalive_expiry=1.0)) as client:
            yield LiveServer(url, port, client, settings, cast(SteeredModel, model), engine, worker, registry, loop)
        if isinstance(model, SteeredModel):
            model.allow(None)
    assert not engine.kv_cache.allocator.used
    assert not engine.has_work


@contextmanager
def serving(config: uvicorn.Config) -> Iterator[int]:
    """Run uvicorn in a thread; answers its port."""
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="uvicorn")
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server does not stop"


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Poll until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.005)


def parse_events(body: bytes) -> list[dict[str, Any]]:
    """The JSON of every server-sent event, after checking that the body is nothing but events."""
    *events, rest = body.split(b"\n\n")
    assert rest == b""
    assert all(event.startswith(b"data:") and b"\n" not in event for event in events)
    return [json.loads(event.removeprefix(b"data:")) for event in events]


def as_form(files: Files | Sequence[tuple[str, bytes]]) -> list[tuple[str, tuple[str, bytes]]]:
    """Files as httpx sends them, all in the field `files`."""
    pairs = files.items() if isinstance(files, dict) else files
    return [("files", (name, content)) for name, content in pairs]


def zip_of(files: Files, folder: str = "") -> bytes:
    """A plain zip of files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(folder + name, content)
    return buffer.getvalue()


def engine_answer(model: FrozenModel, soft_prompt: SoftPrompt | None, text: str, **sampling: Any) -> Outcome:
    """What an engine of its own answers, alone and without HTTP."""
    accepted = request("alone", model.text.encode(text), **sampling)
    return run_engine(make_engine(model), [(accepted, soft_prompt)])["alone"]


OPENAI_CODES = {
    "input_too_long": "context_length_exceeded",
    "unauthorized": "invalid_api_key",
    "unknown_task": "model_not_found",
}
"""Codes that OpenAI's clients know by another name."""


def assert_openai_error(response: httpx.Response, status: int, code: str, *parts: str) -> dict[str, Any]:
    """An error in OpenAI's form; answers what it holds."""
    assert response.status_code == status, f"{response.status_code}: {response.text}"
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    assert error["code"] == OPENAI_CODES.get(code, code), error
    for part in parts:
        assert part in error["message"], error
    return error


def assert_error(response: httpx.Response, status: int, code: str, *parts: str) -> dict[str, str]:
    """An error in the one shape that all of its route have, with these parts in its message; answers the body."""
    if f"{response.request.url.path}/".startswith("/v1/"):
        return assert_openai_error(response, status, code, *parts)
    assert response.status_code == status, f"{response.status_code}: {response.text}"
    body: dict[str, str] = response.json()
    assert set(body) == {"error", "error_type", "code", "remedy"}
    assert all(isinstance(value, str) and value for value in body.values())
    assert body["code"] == code, body
    for part in parts:
        assert part in body["error"], body
    return body


def send_and_vanish(port: int, path: str, body: bytes) -> socket.socket:
    """Send a request by hand; closing the socket is the client going away."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connection.sendall(f"{head}\r\n\r\n".encode() + body)
    return connection
