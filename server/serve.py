"""`prelude serve`: load, publish the inbox, listen; on SIGTERM finish running requests, then end with 0."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import gc
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import TYPE_CHECKING

import psutil
import uvicorn
from fastapi import FastAPI
from tqdm import tqdm

from server.api.app import create_app
from server.api.browsers import is_loopback
from server.api.connection import bounded_protocol
from server.api.telemetry.tracing import open_tracing
from server.background_service import Service
from server.contracts import GenerationRequest, SamplingParams
from server.engine.admission_control import Limits
from server.engine.build_engine import load_engine
from server.engine.engine import Engine
from server.engine.model.device_defaults import as_served
from server.engine.worker import EngineWorker
from server.errors import ConfigurationError
from server.jobs.job_queue import JobQueue
from server.jobs.supervisor import JobRunner
from server.keys.live import ApiKeys
from server.registry.inbox import Inbox
from server.registry.objects import open_objects
from server.registry.registry import Registry
from server.registry.store import Store
from server.registry.sync import Syncer
from server.settings import Settings

if TYPE_CHECKING:
    from server.api.telemetry.spans import Tracing

log = logging.getLogger(__name__)

CLOSE_SECONDS = 3
"""After the drain, how long clients may take to read the rest of their replies or to finish an upload."""

MANY_FILES = 65_536

BACKGROUND_SHARE = 4
"""Evaluations may have 1 / this of the choices in flight that live requests may have."""

SAME_SIGNAL_SECONDS = 1.0

ENGINE_FAILED = 70
"""Exit status after the engine has failed permanently, so that a supervisor restarts the process."""

LATEST_SECONDS = 9.0
"""After the drain, how long the process may take to end; the 40 s in docker-compose.yml cover both."""


def serve(settings: Settings) -> None:
    """Run a server until it is stopped; raises ConfigurationError or StoreError if it cannot start."""
    keys, tracing = open_keys(settings), open_tracing(settings)
    allow_many_connections()
    # First, so that a port in use is reported before the model is loaded.
    with bind(settings.host, settings.port) as listener:
        check_exposure(settings, listener.getsockname()[0])
        app, worker, registry = assemble(settings, keys, tracing)
        keep_for_good()
        config = uvicorn.Config(
            app,
            http=bounded_protocol(),
            # Prelude's own messages cover its info messages.
            log_level="warning" if settings.log_level == "info" else settings.log_level,
            log_config=None,  # uvicorn's messages are formatted like Prelude's
            access_log=False,
            lifespan="on",
            ws="none",  # no route uses WebSockets: upgrade requests are handled as plain HTTP
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
        before = set(threading.enumerate())
        first = next(filter(registry.answering, registry.names_after(None)), None)
        server = DrainingServer(config, worker, settings.drain_seconds, first_request(first, keys is not None))
        server.run([listener])
        leave_hanging_threads(set(threading.enumerate()) - before, server.status)
        if server.status:  # destructors of data on a lost device raise in C++, which would abort with another status
            end_process(server.status)


def assemble(
    settings: Settings, keys: ApiKeys | None, tracing: Tracing | None, start: Callable[[Settings], Engine] | None = None
) -> tuple[FastAPI, EngineWorker, Registry]:
    """The app, its worker and its registry, with the inbox published; nothing listens yet.

    `start` loads the engine, `start_engine` by default. Raises ConfigurationError or StoreError.
    """
    store = Store(open_objects(settings.store_url))
    with ThreadPoolExecutor(1) as starter:  # its OpenMP helpers end with it; see engine/worker.py
        engine = starter.submit(start or start_engine, settings).result()
        settings = as_served(settings, engine.model.spec)
        registry = Registry(store, engine.model.spec, settings.max_virtual_tokens, settings.host_memory)
        inbox = Inbox(settings.prompts_dir, registry)
        starter.submit(publish_inbox, inbox, registry).result()
    worker = EngineWorker(engine, limits(settings))
    job_queue = JobQueue(settings, registry.model, worker.text.encode, worker.text.length_bound.can_fit)
    services: list[Service] = [
        inbox,
        Syncer(registry, settings.sync_seconds),
        JobRunner(settings, registry, job_queue),
    ]
    return create_app(settings, worker, registry, services, keys, job_queue, tracing), worker, registry


def leave_hanging_threads(threads: Collection[threading.Thread], status: int = 0) -> None:
    """End the process at once if threads hang, for example in a store: Python would wait for them."""
    if threads:
        log.warning("left behind: %s", ", ".join(sorted({thread.name for thread in threads})))
        end_process(status)


def end_process(status: int) -> None:
    """End the process without waiting for anything."""
    logging.shutdown()
    os._exit(status)


def start_engine(settings: Settings) -> Engine:
    """Load the engine and run its first steps; raises what `load_engine` raises."""
    engine = load_engine(settings)
    warm_up(engine)
    return engine


def allow_many_connections() -> None:
    """Raise the limit of open files as far as allowed: usually it is 1,024, and each stream takes one."""
    # Windows has no such limit; some limits cannot be raised.
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MANY_FILES if hard == resource.RLIM_INFINITY else min(MANY_FILES, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def limits(settings: Settings) -> Limits:
    """The worker's limits, beyond which it refuses requests."""
    return Limits(
        in_flight=settings.max_sequences + settings.max_queue,
        per_task=settings.max_per_task,
        per_key=settings.max_per_key,
        background=max(1, (settings.max_sequences + settings.max_queue) // BACKGROUND_SHARE),
        request_timeout=settings.request_timeout,
    )


def keep_for_good() -> None:
    """Exempt all objects that exist now from garbage collection.

    They are never freed, and scanning half a million of them stops every thread for a quarter of a second.
    """
    gc.collect()
    gc.freeze()


def publish_inbox(inbox: Inbox, registry: Registry) -> None:
    """Publish new content of the inbox, and log the served tasks."""
    with tqdm(desc="soft prompts", unit="task", leave=False, delay=1.0, disable=None) as bar:

        def show(name: str) -> None:
            bar.update()

        inbox.scan(show)
    live = list(filter(registry.answering, registry.names_after(None)))
    log.info("%d tasks: %s", len(live), ", ".join(live[:20]) or "none yet")


def first_request(task: str | None, with_key: bool) -> str:
    """An example command for a first request; `{url}` is replaced by the server's address."""
    query = f"?task={task}" if task else ""
    key = "-H 'authorization: Bearer KEY' " if with_key else ""
    return (
        f"curl '{{url}}/generate{query}' -H 'content-type: application/json' {key}"
        """-d '{"inputs": "Hello, how are you?"}'"""
    )


def open_keys(settings: Settings) -> ApiKeys | None:
    """The API keys that requests must have; None if no keys are required.

    Raises ConfigurationError if the keys file cannot be used, or the settings also allow anonymous requests.
    """
    if settings.api_keys_file is None:
        return None
    if settings.allow_anonymous:
        raise ConfigurationError(
            "PRELUDE_ALLOW_ANONYMOUS lets everybody in, PRELUDE_API_KEYS_FILE only those with a key.",
            remedy="Leave out one of them.",
        )
    return ApiKeys(settings.api_keys_file)


def check_exposure(settings: Settings, address: str) -> None:
    """Refuse to be reachable from a network without keys, unless the settings allow it.

    Raises ConfigurationError if other users could reach the server, directly or through web pages in a local browser.
    """
    if settings.api_keys_file is None and not settings.allow_anonymous and "*" in settings.origins:
        raise ConfigurationError(
            "With PRELUDE_CORS_ORIGINS=* and no API keys, every page in a browser on this machine could use, replace "
            "and delete every task.",
            remedy="Name the origins; or ask for keys (PRELUDE_API_KEYS_FILE); or let everybody in: "
            "PRELUDE_ALLOW_ANONYMOUS=1.",
        )
    if settings.api_keys_file is not None or is_loopback(address):
        return
    if not settings.allow_anonymous:
        raise ConfigurationError(
            f"Without API keys, everybody who reaches {address} could use, replace and delete every task.",
            remedy="Create keys: `prelude keys create --file keys.json --name me --scope admin`, then "
            "PRELUDE_API_KEYS_FILE=keys.json. Or let everybody in: PRELUDE_ALLOW_ANONYMOUS=1.",
        )
    log.warning("no API keys: everybody who reaches %s may use, replace and delete every task", address)


def bind(host: str, port: int) -> socket.socket:
    """Bind the address; connections wait until the server is ready. ConfigurationError: it cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # without `listen`, a second server could bind the same address
    except OSError as exc:
        listener.close()
        raise ConfigurationError(
            f"Cannot listen on {host}:{port}: {exc.strerror or exc}.",
            remedy="Choose another PRELUDE_PORT (0 takes a free one) or PRELUDE_HOST.",
        ) from exc
    return listener


def warm_up(engine: Engine) -> None:
    """Run a few steps before the first request: the first step of each kind sets up the device's kernels."""
    engine.add(GenerationRequest("warm-up", (0,) * 8, SamplingParams(max_new_tokens=3, ignore_eos=True)), None)
    while engine.has_work:
        engine.step()


class DrainingServer(uvicorn.Server):
    """uvicorn with a drain: after a signal, requests in flight finish, and new requests get 503."""

    def __init__(self, config: uvicorn.Config, worker: EngineWorker, drain_seconds: float, example: str = "") -> None:
        """Serve `config`; `example` is a first command to show, in which `{url}` becomes the server's address."""
        super().__init__(config)
        self._example = example
        self._worker = worker
        self._drain_seconds = drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: concurrent.futures.Future[None] | None = None
        self._signalled = 0.0
        self.status = 0
        """Exit status of the process."""
        self._latest_end: threading.Timer | None = None

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Run until drained, or until the latest time at which the drain should be over."""
        super().run(sockets)
        if self._latest_end is not None:
            self._latest_end.cancel()
            self._latest_end.join()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Run until drained."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and log the address and the time since the start of the process."""
        await super().startup(sockets)
        if self.started and sockets and not self.should_exit:
            host, port = sockets[0].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            url = f"http://{host}:{port}"
            log.info("ready on %s in %.1f s", url, time.time() - psutil.Process().create_time())
            if self._example:
                log.info("try: %s", self._example.replace("{url}", url))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. A later one: stop at once. The process ends with 0 either way.

        One press of Ctrl-C can arrive twice, from the terminal and from `make`; that is one signal.
        """
        now = time.monotonic()
        if self._loop is None or (self._draining is not None and now - self._signalled > SAME_SIGNAL_SECONDS):
            self.should_exit = self.force_exit = True
        if self._loop is None or self._draining is not None:
            return
        self._signalled = now
        self._end_after(self._drain_seconds + LATEST_SECONDS)
        # Use an empty context: a signal may interrupt a request, whose id must not be in these log entries.
        self._draining = contextvars.Context().run(
            asyncio.run_coroutine_threadsafe, self._drain(signal.Signals(sig).name), self._loop
        )

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: ends the process if the engine has failed permanently."""
        if self._worker.has_failed and not self.status:
            log.error(
                "the engine has failed for good: the process ends with %d, so that its supervisor restarts it",
                ENGINE_FAILED,
            )
            self.status, self.should_exit = ENGINE_FAILED, True
            self._end_after(LATEST_SECONDS)
        return await super().on_tick(counter)

    def _end_after(self, seconds: float) -> None:
        """End the process after this time, even if a thread hangs."""
        if self._latest_end is None:
            self._latest_end = threading.Timer(seconds, self._end_late)
            self._latest_end.daemon = True
            self._latest_end.start()

    def _end_late(self) -> None:
        log.error("the server hangs at its end; the process ends now")
        end_process(self.status)

    async def _drain(self, signal_name: str) -> None:
        log.info("%s: finishing %d requests", signal_name, self._worker.num_in_flight)
        try:
            await self._worker.drain(self._drain_seconds)
        finally:
            log.info("drained; the server ends")
            self.should_exit = True
