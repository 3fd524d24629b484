"""The routes that all kinds of jobs have: list, show, follow, cancel, delete. Each kind adds its own POST."""

import functools
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Request, Response

from server.api.auth import may_see
from server.api.jobs.followers import Followers
from server.api.jobs.job_kind import Jobs, job_router
from server.api.schemas import responses
from server.api.sse import EVENTS, NumberedStream
from server.errors import InvalidRequest

MISSING = responses(
    on_404="No such job.",
    on_422="A parameter does not fit.",
    on_429="Too much waits; Retry-After says when to come back.",
)
REFUSED = responses(
    404,
    on_400="The body cannot be read.",
    on_413="The files are too large.",
    on_422="A field or a row does not fit; a row by its file and line.",
    on_429="Too many jobs are waiting.",
    on_500="The files cannot be kept, or what measures text is not installed.",
    on_503="The server is shutting down, or a version cannot be served.",
    on_507="There is no room for the files.",
)
NOT_OVER = responses(on_409="The job is not over.")

JobId = Annotated[str, Path(description="Id of a job, as POST answered it.")]


def start_route(body: Any, request_body: dict[str, Any]) -> dict[str, Any]:
    """The options of a kind's POST route: its reply model, and the OpenAPI description of its body."""
    reply = {"status_code": 202, "response_model": body, "response_model_exclude_none": True}
    return {**reply, "responses": REFUSED, "openapi_extra": request_body}


@functools.cache
def common_routes(kind: type[Jobs]) -> APIRouter:
    """A router with the common routes for one kind of job."""
    router = job_router(kind.router.prefix, str(kind.router.tags[0]))
    one, several = kind.word, f"{kind.word}s"
    shown: dict[str, Any] = {"response_model": kind.body, "response_model_exclude_none": True}

    async def find(request: Request, job: JobId) -> Any:
        return await kind.of(request).find(request, job)

    found = Depends(find)

    @router.get(
        "",
        response_model=kind.listing,
        response_model_exclude_none=True,
        responses={422: MISSING[422], 429: MISSING[429]},
        name=f"list_{several}",
    )
    async def list_jobs(request: Request) -> Any:
        """All jobs, newest first, without results; the server keeps the last hundred finished jobs."""
        jobs = kind.of(request)
        mine = [jobs.show(job, with_result=False) for job in await jobs.all() if may_see(request, job.task)]
        return kind.listing(**{several: mine})

    @router.get("/{job}", responses=MISSING, name=f"get_{one}", **shown)
    async def get_job(request: Request, job: Any = found) -> Any:
        """One job: its state, progress and result."""
        return kind.of(request).show(job)

    @router.get("/{job}/events", response_class=Response, responses=MISSING | EVENTS, name=f"follow_{one}")
    async def follow_job(
        request: Request,
        job: Any = found,
        last_event_id: Annotated[str | None, Header(description="The id of the last event that was received.")] = None,
    ) -> Response:
        """Past and new events of a job until it is over, as server-sent events."""
        followers: Followers = request.app.state.followers
        followers.check_room()
        return NumberedStream(followers.events(kind.of(request), job.id, _number(last_event_id)), {})

    @router.post("/{job}/cancel", responses=MISSING, name=f"cancel_{one}", **shown)
    async def cancel_job(request: Request, job: Any = found) -> Any:
        """Cancel a job; nothing is published. A finished job does not change.

        If the reply for a running job has `cancelling: false`, its result is already being published.
        """
        jobs = kind.of(request)
        await jobs.cancel(job.id)
        return jobs.show(await jobs.find(request, job.id))

    @router.delete("/{job}", status_code=204, responses=MISSING | NOT_OVER, name=f"delete_{one}")
    async def delete_job(request: Request, job: Any = found) -> None:
        """Delete a finished job and its record; versions that it has published stay.

        An unfinished evaluation is cancelled instead.
        """
        await kind.of(request).delete(job.id)

    return router


def _number(last_event_id: str | None) -> int:
    if last_event_id is None:
        return 0
    if not last_event_id.isdecimal() or not last_event_id.isascii() or len(last_event_id) > 12:
        raise InvalidRequest(
            f"Last-Event-ID is {last_event_id[:80]!r}.", remedy="Send the id of the last event, or leave it out."
        )
    return int(last_event_id)
