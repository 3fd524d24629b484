"""The route that starts experiments under the path of their task."""

from typing import Any

from fastapi import APIRouter, Request, Response

from server.api.auth import GuardedRoute, Publishes
from server.api.deps import KeyIdDep, RegistryDep, TaskName
from server.api.interpretations.routes import start
from server.api.interpretations.schemas import ExperimentBody, ExperimentRequest
from server.api.jobs.routes import start_route

router = APIRouter(
    prefix="/prompts/{task}/interpretation",
    tags=["interpretations"],
    route_class=GuardedRoute,
    dependencies=[Publishes],
)


@router.post("", **start_route(ExperimentBody, ExperimentRequest.both_bodies(["data"])))
async def start_interpretation_of_task(
    task: TaskName, request: Request, response: Response, registry: RegistryDep, key_id: KeyIdDep
) -> Any:
    """The same as `POST /interpretations`, with the task in the path; the job is at `/interpretations/{job}`."""
    return await start(request, response, registry, key_id, task)
