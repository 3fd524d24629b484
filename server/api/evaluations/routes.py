"""The routes under /evaluations."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response

from server.api.auth import GuardedRoute, Publishes, allow_task, authorise, may_see
from server.api.deps import ExecutorsDep, KeyIdDep, RegistryDep, SettingsDep, known_query
from server.api.errors import error_body
from server.api.evaluations.job_requests import make_job, read_order
from server.api.evaluations.jobs import EvaluationJob, Evaluations
from server.api.evaluations.schemas import EvaluationBody, EvaluationList, Progress, request_body
from server.api.schemas import ErrorBody
from server.api.sse import unless_disconnected
from server.errors import EvaluationNotDone, RequestAborted, UnknownEvaluation
from server.keys.key import Scope

REPLY_SECONDS = 1.0
"""How long POST waits for an evaluation to be prepared: what is wrong with a small one is the reply."""

UNKNOWN: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorBody, "description": "No such evaluation, or it was forgotten."},
    422: {"model": ErrorBody, "description": "A parameter does not fit."},
}
START_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The body cannot be read."},
    404: {"model": ErrorBody, "description": "No such task or version."},
    413: {"model": ErrorBody, "description": "The upload is too large."},
    422: {"model": ErrorBody, "description": "A field or a row does not fit; a row by its file and line."},
    429: {"model": ErrorBody, "description": "Too many evaluations wait already."},
    500: {"model": ErrorBody, "description": "The files cannot be kept, or what measures text is not installed."},
    503: {"model": ErrorBody, "description": "The server is shutting down, or the version cannot be served."},
    507: {"model": ErrorBody, "description": "There is no room for the files."},
}

router = APIRouter(
    prefix="/evaluations",
    tags=["evaluations"],
    route_class=GuardedRoute,
    dependencies=[Publishes, Depends(known_query)],
)

JobId = Annotated[str, Path(description="As POST /evaluations answered it.", max_length=64)]


async def _evaluations(request: Request) -> Evaluations:
    evaluations: Evaluations = request.app.state.evaluations
    return evaluations


async def _job(request: Request, id: JobId) -> EvaluationJob:  # noqa: A002 (as the path says it)
    """The job that the path names, if the key is for its task: others' are not even there."""
    job = (await _evaluations(request)).get(id)
    if not may_see(request, job.task):
        raise UnknownEvaluation("There is no evaluation of that id.")
    return job


EvaluationsDep = Annotated[Evaluations, Depends(_evaluations)]
JobDep = Annotated[EvaluationJob, Depends(_job)]


@router.post(
    "",
    status_code=202,
    response_model=EvaluationBody,
    response_model_exclude_none=True,
    responses=START_ERRORS,
    openapi_extra=request_body(),
)
async def start_evaluation(
    request: Request,
    response: Response,
    evaluations: EvaluationsDep,
    registry: RegistryDep,
    settings: SettingsDep,
    executors: ExecutorsDep,
    key_id: KeyIdDep,
) -> EvaluationBody:
    """Measure a task on a data file, beside live traffic; ask `GET /evaluations/{id}` how far it is.

    One evaluation is prepared at a time (its rows are read, checked and tokenised), and one runs; the others wait. What
    is refused within a second is the reply; what is refused later is the evaluation's `error`.
    """
    with evaluations.arriving():
        try:
            body = await read_order(request)
            authorise(request, Scope.PUBLISH)  # again: the key must still be valid when a long upload is over
            allow_task(request, body.order.task)
            job = await make_job(body, registry, executors.evaluations, settings, key_id)
        finally:
            await request.close()  # the form's files
        evaluations.add(job)
    try:
        await unless_disconnected(request, _prepared(job))
    except RequestAborted:  # nobody knows its id
        await evaluations.cancel(job)
        raise
    if job.error is not None and job.evaluation is None and job.started_at is None:
        evaluations.forget(job)
        raise job.error
    response.headers["Location"] = f"/evaluations/{job.id}"
    return _shown(job)


async def _prepared(job: EvaluationJob) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(job.prepared.wait(), REPLY_SECONDS)


@router.get("", response_model=EvaluationList, response_model_exclude_none=True, responses={422: UNKNOWN[422]})
async def list_evaluations(request: Request, evaluations: EvaluationsDep) -> EvaluationList:
    """All evaluations since the server's start, newest first, without results; of those that ended the last 100."""
    jobs = [job for job in evaluations.all() if may_see(request, job.task)]
    return EvaluationList(evaluations=[_shown(job, result=False) for job in jobs])


@router.get("/{id}", response_model=EvaluationBody, response_model_exclude_none=True, responses=UNKNOWN)
async def get_evaluation(job: JobDep) -> EvaluationBody:
    """How far an evaluation is, and its result once it is done."""
    return _shown(job)


@router.get(
    "/{id}/card",
    response_class=Response,
    responses={
        200: {"content": {"text/markdown": {}}, "description": "The card."},
        409: {"model": ErrorBody, "description": "It is not done."},
        **UNKNOWN,
    },
)
async def get_card(job: JobDep) -> Response:
    """The result as Markdown, for the README.md beside a soft prompt."""
    if job.card is None:
        raise EvaluationNotDone(f"The evaluation is {job.state}, so there is no card.")
    return Response(job.card, media_type="text/markdown")


@router.delete("/{id}", status_code=204, responses=UNKNOWN)
async def delete_evaluation(job: JobDep, evaluations: EvaluationsDep) -> None:
    """Cancel an evaluation that waits or runs, and free all that it holds; forget one that has ended."""
    await evaluations.cancel(job)


def _shown(job: EvaluationJob, *, result: bool = True) -> EvaluationBody:
    return EvaluationBody(
        id=job.id,
        state=job.state,
        task=job.task,
        version=job.version,
        data=job.data,
        rows=job.rows,
        contestants=list(job.contestants),
        created_at=job.created_at,
        started_at=job.started_at,
        ended_at=job.ended_at,
        by=job.key_id,
        progress=Progress(done=job.done, total=job.total),
        error=None if job.error is None else ErrorBody(**error_body(job.error)),
        result=job.report.as_dict() if result and job.report is not None else None,
    )
