"""GET /v1/models: the frozen model and every live task."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from server.api.auth import GuardedRoute, Reads, allow_task, may_see, visible
from server.api.deps import RegistryDep, WorkerDep
from server.api.openai.errors import MISSING, REFUSALS, no_model
from server.api.openai.translate import task_of
from server.engine.worker import EngineWorker
from server.errors import InvalidTaskName, UnknownTask
from server.registry.events import seconds_of

router = APIRouter(
    prefix="/v1/models", tags=["openai"], responses=REFUSALS, route_class=GuardedRoute, dependencies=[Reads]
)


PAGE = 1000
"""Maximum number of tasks on a page."""


class ModelCard(BaseModel):
    """A value that `model` accepts."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When the version was published; for the frozen model, when the server started.")
    owned_by: Literal["prelude"] = "prelude"
    root: str = Field(description="The version that answers, task@version; in a canary the one that answers most.")
    parent: str | None = Field(description="The frozen model behind a task.")
    max_model_len: int = Field(description="Virtual tokens, input and new tokens together.")


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
    has_more: bool = Field(description="Whether there are more tasks: ask again with the last `id` as `after`.")


@router.get("")
async def list_models(
    request: Request,
    worker: WorkerDep,
    registry: RegistryDep,
    limit: Annotated[int, Query(ge=1, le=PAGE, description="Tasks of a page.")] = PAGE,
    after: Annotated[str | None, Query(description="Start after this task, without the frozen model.")] = None,
) -> ModelList:
    """The frozen model and the live tasks by name, as far as the key may use them; a page of them."""
    cards = [_frozen(request, worker)] if after is None and may_see(request, None) else []
    most = len(cards) + limit
    async for name in visible(request, registry.names_after(after)):
        task = registry.find(name)
        live = None if task is None else task.live
        if live is not None and len(cards) == most:
            return ModelList(data=cards, has_more=True)
        if live is not None:
            cards.append(_card(worker, name, f"{name}@{live.number}", live.at))
    return ModelList(data=cards, has_more=False)


@router.get("/{model:path}", responses=MISSING)
async def get_model(model: str, request: Request, worker: WorkerDep, registry: RegistryDep) -> ModelCard:
    """The frozen model, a task, or one version of a task: task@version."""
    name = task_of(model, worker)
    allow_task(request, name)
    if name is None:
        return _frozen(request, worker)
    try:
        resolved = registry.resolve(name)
        live = None if "@" in name else registry.task(name).live
    except (InvalidTaskName, UnknownTask) as exc:
        raise no_model(name, exc) from exc
    number, at = (resolved.version, resolved.at) if live is None else (live.number, live.at)
    return _card(worker, name, f"{resolved.task}@{number}", at)


def _frozen(request: Request, worker: EngineWorker) -> ModelCard:
    spec = worker.model
    started: int = request.app.state.started
    return ModelCard(id=spec.name, created=started, root=spec.name, parent=None, max_model_len=spec.max_model_len)


def _card(worker: EngineWorker, name: str, root: str, at: str) -> ModelCard:
    created = seconds_of(at) or 0  # an unreadable time must not fail the whole list
    spec = worker.model
    return ModelCard(id=name, created=created, root=root, parent=spec.name, max_model_len=spec.max_model_len)
