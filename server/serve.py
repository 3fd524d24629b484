"""`prelude serve`: load, publish the inbox, listen; on SIGTERM finish what runs, then end with 0."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import signal
import socket
import time
from types import FrameType

import uvicorn
from tqdm import tqdm

from server.api.app import create_app
from server.engine.build import build_engine
from server.engine.model import FrozenModel
from server.engine.worker import EngineWorker
from server.registry.inbox import scan_inbox
from server.registry.registry import Registry
from server.registry.store import LocalStore
from server.settings import Settings

log = logging.getLogger(__name__)

CLOSE_SECONDS = 3
"""After the drain, how long clients may take to read what is left for them, or to finish an upload."""


def serve(settings: Settings) -> None:
    """Run a server until it is told to stop.

    Raises:
        ConfigurationError, StoreError: it cannot start.
    """
    started = time.perf_counter()
    model = FrozenModel.load(settings)
    worker = EngineWorker(build_engine(settings, model))
    registry = Registry(LocalStore.open(settings.store_url), model.spec, settings.max_virtual_tokens)
    with tqdm(desc="soft prompts", unit="task", leave=False, delay=1.0) as bar:

        def show(name: str) -> None:
            bar.update()

        scan_inbox(settings.prompts_dir, registry, show)
    log.info(
        "%d tasks: %s", len(registry.tasks()), ", ".join(task.task for task in registry.tasks()[:20]) or "none yet"
    )
    app = create_app(settings, worker, registry)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )
    log.info("ready in %.1f s", time.perf_counter() - started)
    DrainingServer(config, worker, settings.drain_seconds).run()


class DrainingServer(uvicorn.Server):
    """uvicorn, but a signal first drains: new requests get 503 from a server that still answers, the others finish."""

    def __init__(self, config: uvicorn.Config, worker: EngineWorker, drain_seconds: float) -> None:
        """Serve `config`."""
        super().__init__(config)
        self._worker = worker
        self._drain_seconds = drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: concurrent.futures.Future[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Run until drained."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second one: stop at once. The process ends with 0 either way."""
        if self._draining is not None or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._draining = asyncio.run_coroutine_threadsafe(self._drain(signal.Signals(sig).name), self._loop)

    async def _drain(self, signal_name: str) -> None:
        log.info("%s: finishing %d requests", signal_name, self._worker.num_in_flight)
        try:
            await self._worker.drain(self._drain_seconds)
        finally:
            self.should_exit = True
