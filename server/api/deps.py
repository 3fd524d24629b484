"""What endpoints ask for, as `Annotated` aliases."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path, Request

from server.api.bodies import nearest
from server.api.telemetry.metrics import Metrics
from server.engine.worker import EngineWorker
from server.errors import InvalidRequest
from server.executors import Executors
from server.jobs.job_queue import JobBoard
from server.registry.registry import Registry
from server.settings import Settings
from server.soft_prompts.names import TASK_NAME


async def _worker(request: Request) -> EngineWorker:
    worker: EngineWorker = request.app.state.worker
    return worker


async def _registry(request: Request) -> Registry:
    registry: Registry = request.app.state.registry
    return registry


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


async def _metrics(request: Request) -> Metrics:
    metrics: Metrics = request.app.state.metrics
    return metrics


async def _board(request: Request) -> JobBoard:
    board: JobBoard = request.app.state.jobs
    return board


async def _executors(request: Request) -> Executors:
    executors: Executors = request.app.state.executors
    return executors


async def _key_id(request: Request) -> str | None:
    """The id of the key that the request came with, for the record of who changed what."""
    key_id: str | None = getattr(request.state, "key_id", None)
    return key_id


async def known_query(request: Request) -> None:
    """Refuse a query parameter that the route does not have, or that comes twice.

    A misspelt `?task=` would otherwise be answered by the frozen model alone.

    Raises:
        InvalidRequest: names the parameter and the nearest known one.
    """
    known = [parameter.alias for parameter in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            near = nearest(name, known)
            hint = f", did you mean {near}?" if near else "."
            raise InvalidRequest(f"Unknown query parameter {name[:80]!r}{hint}")
        if len(request.query_params.getlist(name)) > 1:
            raise InvalidRequest(f"The query parameter {name} comes twice.", remedy="Give it once.")


WorkerDep = Annotated[EngineWorker, Depends(_worker)]
RegistryDep = Annotated[Registry, Depends(_registry)]
SettingsDep = Annotated[Settings, Depends(_settings)]
BoardDep = Annotated[JobBoard, Depends(_board)]
ExecutorsDep = Annotated[Executors, Depends(_executors)]
MetricsDep = Annotated[Metrics, Depends(_metrics)]
KeyIdDep = Annotated[str | None, Depends(_key_id)]

# The pattern only tells OpenAPI: FastAPI would refuse what does not match in words of its own.
TaskName = Annotated[
    str,
    Path(
        description="The task's name.", examples=["sms_spam"], json_schema_extra={"pattern": f"^{TASK_NAME.pattern}$"}
    ),
]
