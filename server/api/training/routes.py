"""Training jobs over HTTP: ask for one, watch it, end it. They run beside the server, one at a time."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Request, Response

from server.api.auth import GuardedRoute, Publishes, allow_task, authorise, may_see
from server.api.deps import BoardDep, ExecutorsDep, KeyIdDep, RegistryDep, SettingsDep, known_query
from server.api.schemas import ErrorBody
from server.api.sse import NumberedStream, unless_disconnected
from server.api.training.followers import Followers
from server.api.training.job_requests import find_start, read_job, submit
from server.api.training.schemas import JOBS, JobBody, JobList, job_body, request_body
from server.errors import InvalidRequest, UnknownJob
from server.executors import Executors
from server.jobs.job import JOB_ID, Job
from server.jobs.job_queue import JobBoard
from server.keys.key import Scope
from server.long_work import Lane

LOG_BYTES = 2**16
CANCEL_SECONDS, CANCEL_LOOKS = 5.0, 100

MISSING: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorBody, "description": "No such job."},
    422: {"model": ErrorBody, "description": "A parameter does not fit."},
    429: {"model": ErrorBody, "description": "Too much waits; Retry-After says when to come back."},
}
REFUSED: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The form cannot be read."},
    404: {"model": ErrorBody, "description": "There is no such task to begin with."},
    413: {"model": ErrorBody, "description": "The data is too large."},
    422: {"model": ErrorBody, "description": "A field, the task's name or the data does not fit."},
    429: {"model": ErrorBody, "description": "Too many jobs are waiting."},
    500: {"model": ErrorBody, "description": "The job could not be written."},
    503: {"model": ErrorBody, "description": "The server is shutting down, or what to begin with cannot be served."},
    507: {"model": ErrorBody, "description": "There is no space left to keep it."},
}
EVENTS: dict[int | str, dict[str, Any]] = {
    **MISSING,
    200: {"description": "Server-sent events.", "content": {"text/event-stream": {}}},
}
LOG: dict[int | str, dict[str, Any]] = {**MISSING, 200: {"description": "Text.", "content": {"text/plain": {}}}}

router = APIRouter(
    prefix=JOBS, tags=["training"], route_class=GuardedRoute, dependencies=[Publishes, Depends(known_query)]
)

JobId = Annotated[str, Path(description="Id of a job.", json_schema_extra={"pattern": f"^{JOB_ID.pattern}$"})]


@router.post(
    "",
    status_code=202,
    response_model=JobBody,
    response_model_exclude_none=True,
    responses=REFUSED,
    openapi_extra=request_body(),
)
async def create_job(
    request: Request,
    response: Response,
    board: BoardDep,
    executors: ExecutorsDep,
    registry: RegistryDep,
    settings: SettingsDep,
    key_id: KeyIdDep,
) -> JobBody:
    """Queue a training job, once its data has been found good. What it learns becomes a version of its task."""
    async with read_job(request) as asked:
        authorise(request, Scope.PUBLISH)  # the key may have been revoked while the data came
        allow_task(request, asked.request.task)
        start = await find_start(request, asked.request.spec, registry, key_id)
        checks: Lane = request.app.state.job_checks
        work = partial(submit, board, asked, settings.data_dir, key_id, start)
        job = await unless_disconnected(request, checks.run(work))
    response.headers["Location"] = f"{JOBS}/{job.id}"
    return job_body(job)


@router.get(
    "", response_model=JobList, response_model_exclude_none=True, responses={422: MISSING[422], 429: MISSING[429]}
)
async def list_jobs(request: Request, board: BoardDep, executors: ExecutorsDep) -> JobList:
    """All jobs, newest first; of those that are over a hundred are kept."""
    jobs = await executors.jobs.run(board.jobs)
    return JobList(jobs=[job_body(job) for job in jobs if may_see(request, job.spec.task)])


@router.get("/{job}", response_model=JobBody, response_model_exclude_none=True, responses=MISSING)
async def get_job(job: JobId, request: Request, board: BoardDep) -> JobBody:
    """One job: how far it has come, or how it ended."""
    return job_body(await _find(job, request, board))


@router.get("/{job}/events", response_class=Response, responses=EVENTS)
async def follow_job(
    job: JobId,
    request: Request,
    board: BoardDep,
    last_event_id: Annotated[str | None, Header(description="The id of the last event that was received.")] = None,
) -> Response:
    """Everything that has happened to a job, then what happens, until it is over: server-sent events."""
    await _find(job, request, board)
    followers: Followers = request.app.state.followers
    followers.check_room()
    return NumberedStream(followers.events(job, _number(last_event_id)), {})


@router.get("/{job}/log", response_class=Response, responses=LOG)
async def get_log(job: JobId, request: Request, board: BoardDep, executors: ExecutorsDep) -> Response:
    """The end of what a job's process has printed."""
    await _find(job, request, board)
    return Response(await executors.jobs.run(_read_log, board, job), media_type="text/plain; charset=utf-8")


@router.post("/{job}/cancel", response_model=JobBody, response_model_exclude_none=True, responses=MISSING)
async def cancel_job(job: JobId, request: Request, board: BoardDep, executors: ExecutorsDep) -> JobBody:
    """End a job; nothing is published. One that is over stays as it is.

    A reply with `cancelling: false` of a job that still runs says that its result is being published already.
    """
    await _find(job, request, board)
    await executors.jobs.run(board.cancel, job)
    for _ in range(CANCEL_LOOKS):  # whoever runs it may be another server on the same folder
        found = await _find(job, request, board)
        if found.status.state.is_over:
            break
        await asyncio.sleep(CANCEL_SECONDS / CANCEL_LOOKS)
    return job_body(found)


@router.delete(
    "/{job}",
    status_code=204,
    responses={**MISSING, 409: {"model": ErrorBody, "description": "The job is not over."}},
)
async def delete_job(job: JobId, request: Request, board: BoardDep, executors: ExecutorsDep) -> None:
    """Forget a job that is over, with its record; what it has published stays."""
    await _find(job, request, board)
    await executors.jobs.run(board.delete, job)


async def _find(job_id: str, request: Request, board: JobBoard) -> Job:
    """A job that the request's key is for; of others it does not learn that they are there."""
    executors: Executors = request.app.state.executors
    job = await executors.jobs.run(board.job, job_id)
    if not may_see(request, job.spec.task):
        raise UnknownJob(f"There is no training job {job_id[:80]!r}.")
    return job


def _number(last_event_id: str | None) -> int:
    if last_event_id is None:
        return 0
    if not last_event_id.isdecimal() or not last_event_id.isascii() or len(last_event_id) > 12:
        raise InvalidRequest(
            f"Last-Event-ID is {last_event_id[:80]!r}.", remedy="Send the id of the last event, or leave it out."
        )
    return int(last_event_id)


def _read_log(board: JobBoard, job_id: str) -> bytes:
    try:
        with board.folder(job_id).log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - LOG_BYTES))
            return file.read()
    except FileNotFoundError:  # it has not begun yet
        return b""
