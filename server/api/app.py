"""The FastAPI app around a worker and a registry that are ready."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from server import __version__
from server.api import ops, pages, playground, sagemaker
from server.api.body_sizes import BodyLimit
from server.api.browsers import CORS, OwnPagesOnly, SecurityHeaders
from server.api.error_format import ErrorFormats
from server.api.errors import install_error_handlers
from server.api.head_method import HeadAsGet
from server.api.interpretations import of_task
from server.api.jobs.followers import Followers
from server.api.jobs.job_kind import Site
from server.api.jobs.routes import common_routes
from server.api.jobs.table import KINDS
from server.api.openai import chat, completions, models
from server.api.openai.errors import OPENAI_ERRORS
from server.api.prompts import interpretation, versions
from server.api.prompts import routes as prompts
from server.api.prompts.interpretation import Interpretations
from server.api.telemetry.access import Access
from server.api.telemetry.metrics import Metrics
from server.api.tgi import many
from server.api.tgi import routes as tgi
from server.api.tgi.schemas import TGI_ERRORS
from server.api.training.schemas import JOB_ERRORS
from server.background_service import Service
from server.engine.worker import EngineWorker
from server.executors import Executors
from server.jobs.job_queue import JobQueue
from server.keys.live import ApiKeys
from server.registry.registry import Registry
from server.settings import Settings

if TYPE_CHECKING:
    from server.api.telemetry.spans import Tracing

log = logging.getLogger(__name__)

FORMATS = ErrorFormats(TGI_ERRORS, (OPENAI_ERRORS, sagemaker.INVOCATION_ERRORS, JOB_ERRORS))
"""The error format of each front end; all other routes use text-generation-inference's format."""

DESCRIPTION = """One frozen LLM in memory; each task is a soft prompt, a few learned vectors in front of the input.
Name the task in a request; publish, replace and delete soft prompts while the server runs."""


STOP_SECONDS = 3.5
"""Time limit for stopping the services and the engine's thread. A thread that hangs (for example in a store) is
abandoned."""


def api_routes() -> list[BaseRoute]:
    """The routes that the OpenAPI document describes; all apps share them."""
    modules = (tgi, many, sagemaker, completions, chat, models, prompts, versions, interpretation, of_task, ops)
    routers = [module.router for module in modules]
    routers += [router for kind in KINDS for router in (kind.router, common_routes(kind))]
    return [route for router in routers for route in router.routes]


class App(FastAPI):
    """FastAPI with middleware around the whole app, including the replies to unexpected errors."""

    def __init__(self, metrics: Metrics, origins: frozenset[str], tracing: Tracing | None, **options: Any) -> None:
        """An app without routes, whose replies the pages of `origins` may read (CORS); `options` are FastAPI's."""
        super().__init__(**options)
        self.state.metrics = metrics
        self._origins = origins
        self._tracing = tracing

    def build_middleware_stack(self) -> ASGIApp:
        """FastAPI's own, in ours."""
        stack = super().build_middleware_stack()
        if self._origins:
            stack = CORSMiddleware(stack, allow_origins=self._origins, **CORS)
        return Access(SecurityHeaders(HeadAsGet(stack)), self.state.metrics, self._tracing)


async def _within(seconds: float, ending: Sequence[Awaitable[None]]) -> None:
    """Wait for the given awaitables, but only for a limited time."""
    _, late = await asyncio.wait([asyncio.ensure_future(one) for one in ending], timeout=seconds)
    for task in late:
        task.cancel()
    if late:
        log.warning("%d parts of the server hang; they are left behind", len(late))


def create_app(
    settings: Settings,
    worker: EngineWorker,
    registry: Registry,
    services: Sequence[Service] = (),
    keys: ApiKeys | None = None,
    job_queue: JobQueue | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """Put the routes together. The engine's thread and the services live as long as the app.

    Without `job_queue`, the app makes one whose jobs stay queued, because no service runs them.
    """
    assert keys is not None or settings.api_keys_file is None, "the settings name keys that the app was not given"

    job_queue = job_queue or JobQueue(settings, registry.model, worker.text.encode, worker.text.length_bound.can_fit)
    metrics = Metrics(worker, registry, settings.metrics_tasks, job_queue)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start(registry.is_referenced)
        registry.connect(worker)
        registry.host.on_load = metrics.loads.observe
        for service in services:
            service.start()
        yield
        for jobs in app.state.kinds.values():
            await jobs.stop()
        ending = [executors.ending.run(service.stop) for service in (*services, tracing) if service is not None]
        await _within(STOP_SECONDS, [*ending, worker.stop()])

    app = App(
        metrics,
        settings.origins,
        tracing,
        title="Prelude",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.settings, app.state.worker, app.state.registry = settings, worker, registry
    app.state.executors = executors = Executors()
    app.state.keys = job_queue.keys = keys
    app.state.jobs = job_queue
    app.state.interpretations = Interpretations(settings, worker, executors)
    app.state.site = site = Site(settings, worker, executors, job_queue, keys)
    app.state.kinds = {kind.router.prefix: kind(site) for kind in KINDS}
    app.state.followers = Followers(worker)
    app.state.started = int(time.time())
    _limit_requests(app, settings, keys)
    install_error_handlers(app, FORMATS)
    app.router.routes.extend(api_routes())  # include_router would make each anew, and parse its schemas
    app.router.routes.extend(pages.ROUTES)
    if settings.ui:
        app.router.routes.extend(playground.routes())
    return app


def _limit_requests(app: App, settings: Settings, keys: ApiKeys | None) -> None:
    """Refuse bodies that are too large, and what foreign pages may not send."""
    app.add_middleware(
        BodyLimit,
        max_upload_bytes=settings.max_upload_bytes,
        memory=settings.body_memory,
        disk=settings.form_disk,
        job_paths=[kind.router.prefix for kind in KINDS],
    )
    hosts = settings.hosts
    if keys is None:
        hosts = frozenset() if hosts is None and not settings.allow_anonymous else hosts
        app.add_middleware(OwnPagesOnly, hosts=hosts, origins=settings.origins, formats=FORMATS)
    elif hosts is not None:
        app.add_middleware(OwnPagesOnly, hosts=hosts, origins=frozenset({"*"}), formats=FORMATS)
