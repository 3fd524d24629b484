"""Dependencies of endpoints, as `Annotated` aliases."""

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Path, Request

from server.api.bodies import nearest
from server.api.telemetry.metrics import Metrics
from server.engine.worker import EngineWorker
from server.errors import InvalidRequest
from server.executors import Executors
from server.jobs.job_queue import JobQueue
from server.registry.registry import Registry
from server.settings import Settings
from server.soft_prompts.names import TASK_NAME


def _of_app(name: str) -> Any:
    """A dependency that returns the named attribute of `app.state`."""

    async def get(request: Request) -> Any:
        return getattr(request.app.state, name)

    return Depends(get)


async def _key_id(request: Request) -> str | None:
    key_id: str | None = getattr(request.state, "key_id", None)
    return key_id


def check_query(request: Request) -> None:
    """Refuse (InvalidRequest) a query parameter that the route does not have, or that occurs twice.

    The frozen model alone would otherwise answer a misspelt `?task=`.
    """
    known = [parameter.alias for parameter in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            near = nearest(name, known)
            hint = f", did you mean {near}?" if near else "."
            raise InvalidRequest(f"Unknown query parameter {name[:80]!r}{hint}")
        if len(request.query_params.getlist(name)) > 1:
            raise InvalidRequest(f"The query parameter {name} comes twice.", remedy="Give it once.")


WorkerDep = Annotated[EngineWorker, _of_app("worker")]
RegistryDep = Annotated[Registry, _of_app("registry")]
SettingsDep = Annotated[Settings, _of_app("settings")]
JobQueueDep = Annotated[JobQueue, _of_app("jobs")]
ExecutorsDep = Annotated[Executors, _of_app("executors")]
MetricsDep = Annotated[Metrics, _of_app("metrics")]
KeyIdDep = Annotated[str | None, Depends(_key_id)]


@dataclass(frozen=True)
class Call:
    """A request for an answer, and the parts of the server that answer it."""

    request: Request
    worker: EngineWorker
    registry: Registry
    key_id: str | None


async def _call(request: Request) -> Call:
    """All parts in one dependency: FastAPI would make a class on another thread, and each dependency takes time."""
    state = request.app.state
    return Call(request, state.worker, state.registry, getattr(request.state, "key_id", None))


CallDep = Annotated[Call, Depends(_call)]

# The pattern only tells OpenAPI: FastAPI would refuse what does not match in words of its own.
TaskName = Annotated[
    str,
    Path(
        description="The task's name.", examples=["sms_spam"], json_schema_extra={"pattern": f"^{TASK_NAME.pattern}$"}
    ),
]
