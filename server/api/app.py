"""The FastAPI app around a worker and a registry that are ready."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from server import __version__
from server.api import ops, prompts, tgi
from server.api.errors import install_error_handlers
from server.api.limits import BodyLimit
from server.engine.worker import EngineWorker
from server.registry.registry import Registry
from server.settings import Settings

DESCRIPTION = """One frozen LLM in memory; each task is a soft prompt, a few learned vectors in front of the input.
Name the task in a request; publish, replace and delete soft prompts while the server runs."""


def create_app(settings: Settings, worker: EngineWorker, registry: Registry) -> FastAPI:
    """Put the routes together. The engine's thread lives as long as the app."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.stop()

    app = FastAPI(title="Prelude", version=__version__, description=DESCRIPTION, lifespan=lifespan)
    app.state.settings, app.state.worker, app.state.registry = settings, worker, registry
    app.add_middleware(BodyLimit, max_upload_bytes=settings.max_upload_bytes)
    install_error_handlers(app)
    for module in (tgi, prompts, ops):
        app.include_router(module.router)
    return app
