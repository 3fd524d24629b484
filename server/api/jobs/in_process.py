"""Jobs that run in the server, beside live traffic, and exist only in memory. One job runs at a time; others wait."""

import asyncio
import contextlib
import copy
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel, Field
from typing_extensions import override

from server.api.jobs.job_kind import Jobs, News, Site
from server.api.schemas import ErrorBody, error_body
from server.api.sse import unless_disconnected
from server.errors import Forbidden, Overloaded, PreludeError, RequestAborted, ServerDraining
from server.jobs.job import JobState, now
from server.keys.key import Scope
from server.long_work import Lane

log = logging.getLogger(__name__)

MOST_WAITING = 8
"""Maximum number of waiting jobs of a kind; each occupies memory for its rows."""
MOST_KEPT = 100
"""Number of finished jobs of a kind that can still be read."""
LOOK_SECONDS = 0.25
"""How often a job checks whether the server is shutting down."""
REPLY_SECONDS = 1.0
"""How long POST waits for a job's preparation, so that an error in a small job is the reply."""

CheckCancelled = Callable[[], None]


class Work(Protocol):
    """The work of a job. It keeps the result after the end; `total` is its number of pieces, 0 until it is prepared."""

    task: str
    total: int

    def prepare(self, check_cancelled: CheckCancelled) -> None:
        """Read and check the input, on a thread. `check_cancelled` is called between pieces and may raise to stop."""

    async def run(self, on_piece: Callable[[], None]) -> None:
        """Do the work; `on_piece` is called after each piece. Cancelling it frees all that it uses in the engine."""

    def release(self) -> None:
        """Free rows and files. Called once, at the job's end."""


W = TypeVar("W", bound=Work)


@dataclass
class InServerJob(Generic[W]):
    """One job, from its acceptance until it is deleted; `prepared` is set when it is prepared or over."""

    work: W
    by: str | None
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    state: JobState = JobState.QUEUED
    done: int = 0
    prepared: asyncio.Event = field(default_factory=asyncio.Event)
    created_at: str = field(default_factory=now)
    started_at: str | None = None
    ended_at: str | None = None
    error: PreludeError | None = None

    @property
    def task(self) -> str:
        """The task that the job is about."""
        return self.work.task

    @property
    def progress(self) -> dict[str, int]:
        """The number of finished pieces of work, and the total."""
        return {"done": self.done, "total": self.work.total}

    def end(self, state: JobState, error: PreludeError | None = None) -> None:
        """End the job and free its rows and files."""
        self.state, self.error, self.ended_at = state, error, now()
        self.work.release()
        self.prepared.set()


class Progress(BaseModel):
    """Answered rows of all systems, and the total."""

    done: int
    total: int


class InServerBody(BaseModel):
    """The fields of every job that runs in the server."""

    id: str
    state: str = Field(
        description="preparing, waiting, running, done, failed, cancelled, or aborted (the server shut down)."
    )
    task: str
    created_at: str
    started_at: str | None = None
    ended_at: str | None = None
    by: str | None = Field(None, description="Id of the key that requested it.")
    progress: Progress
    error: ErrorBody | None = Field(None, description="Why it failed or was aborted.")


class InServerJobs(Jobs, Generic[W]):
    """All jobs of one kind that run in the server. Only for the event loop's thread."""

    outlives_server = False
    words: ClassVar = {JobState.QUEUED: "waiting", JobState.SUCCEEDED: "done"}

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._jobs: dict[str, InServerJob[W]] = {}  # oldest first
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._arriving = 0
        # Waiting jobs are limited by `arriving`.
        self._preparing = Lane(site.executors.in_server, f"{self.noun}s", MOST_KEPT)
        self._is_stopping = False

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """Context manager: count one more job while its body is read; raises Overloaded or ServerDraining."""
        if self._site.worker.draining or self._is_stopping:
            raise ServerDraining("The server is shutting down.")
        if len(self._tasks) + self._arriving > MOST_WAITING:
            raise Overloaded(
                f"{MOST_WAITING} {self.noun}s wait already.", remedy="Come back when one has ended, or cancel one."
            )
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1

    def add(self, job: InServerJob[W]) -> None:
        """Start the preparation of a job that was counted by `arriving`; it runs when its turn comes."""
        self._jobs[job.id] = job
        self._tasks[job.id] = asyncio.get_running_loop().create_task(self._run(job))

    def fields_of(self, job: InServerJob[W]) -> dict[str, Any]:
        """The fields of `InServerBody`."""
        fields = {name: getattr(job, name) for name in ("id", "task", "created_at", "started_at", "ended_at", "by")}
        error = None if job.error is None else ErrorBody(**error_body(job.error))
        return {**fields, "state": self.state_of(job), "progress": job.progress, "error": error}

    @override
    async def all(self) -> Sequence[InServerJob[W]]:
        return list(reversed(self._jobs.values()))

    @override
    async def get(self, job_id: str) -> InServerJob[W]:
        if job_id not in self._jobs:
            raise self.no_such(job_id)
        return self._jobs[job_id]

    @override
    async def cancel(self, job_id: str) -> None:
        task, job = self._tasks.get(job_id), self._jobs[job_id]
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if not job.state.is_over:  # the job had not started, so it could not end itself
                self._end(job, JobState.CANCELLED)

    @override
    async def delete(self, job_id: str) -> None:
        if job_id in self._tasks:
            await self.cancel(job_id)
        else:
            self._jobs.pop(job_id, None)

    @override
    async def stop(self) -> None:
        self._is_stopping = True
        for job_id in list(self._tasks):
            await self.cancel(job_id)

    @override
    async def news(self, job_id: str, offset: int | None) -> News:
        job = await self.get(job_id)
        return News(copy.copy(job), progress=job.progress)

    async def _run(self, job: InServerJob[W]) -> None:
        running = asyncio.current_task()
        assert running is not None, "it is a task"
        draining = asyncio.get_running_loop().create_task(self._cancel_once_draining(running))
        try:
            await self._preparing.run(lambda check_cancelled: self._prepare(job, check_cancelled))
            job.state = JobState.QUEUED
            job.prepared.set()
            async with self._site.turn:
                self._check_key(job)
                job.state, job.started_at = JobState.RUNNING, now()
                await job.work.run(lambda: self._count(job))
            self._end(job, JobState.SUCCEEDED)
        except asyncio.CancelledError:
            if self._is_stopping or self._site.worker.draining:
                error = ServerDraining(f"The server was shut down before the {self.noun}'s end.")
                self._end(job, JobState.ABORTED, error)
            else:
                self._end(job, JobState.CANCELLED)
        except (ServerDraining, RequestAborted) as exc:
            self._end(job, JobState.ABORTED, exc)
        except PreludeError as exc:
            self._end(job, JobState.FAILED, exc)
        except Exception:
            log.exception("this %s failed", self.noun)
            self._end(job, JobState.FAILED, PreludeError(f"The server failed on this {self.noun}."))
        finally:
            draining.cancel()

    def _prepare(self, job: InServerJob[W], check_cancelled: CheckCancelled) -> None:
        """Prepare a job (on a thread), unless the server shuts down."""

        def check_cancelled_or_draining() -> None:
            check_cancelled()
            if self._site.worker.draining:
                raise ServerDraining("The server is shutting down.")

        job.state = JobState.PREPARING
        job.work.prepare(check_cancelled_or_draining)

    async def _cancel_once_draining(self, running: asyncio.Task[None]) -> None:
        """Cancel the job when the server drains: draining waits for clients' requests, not for jobs."""
        while True:
            if self._site.worker.draining:
                running.cancel()
                return
            await asyncio.sleep(LOOK_SECONDS)

    def _count(self, job: InServerJob[W]) -> None:
        job.done += 1
        self._check_key(job)

    def _check_key(self, job: InServerJob[W]) -> None:
        """Stop the job if its key may no longer publish this task."""
        keys = self._site.keys
        if keys is None or job.by is None:
            return
        if (why := keys.why_not(job.by, [Scope.PUBLISH], [job.task])) is not None:
            raise Forbidden(f"{why} The {self.noun} used this key, so it has ended.")

    def _end(self, job: InServerJob[W], state: JobState, error: PreludeError | None = None) -> None:
        job.end(state, error)
        self._tasks.pop(job.id, None)
        ended = [other for other in self._jobs.values() if other.state.is_over]
        for old in ended[: max(0, len(ended) - MOST_KEPT)]:
            del self._jobs[old.id]


async def accept(
    jobs: InServerJobs[W], request: Request, response: Response, by: str | None, make: Callable[[], Awaitable[W]]
) -> Any:
    """Handle POST: create the job from the request's body and queue it.

    An error of `make` or the preparation within the first second is the reply; a later one is the job's `error`.

    Raises:
        ServerDraining, Overloaded: the server accepts no more jobs.
        RequestAborted: the client has disconnected, so the job is cancelled.
    """
    with jobs.arriving():
        job = InServerJob(await make(), by)
        jobs.add(job)
    try:
        await unless_disconnected(request, _prepared(job))
    except RequestAborted:  # no client knows its id
        await jobs.cancel(job.id)
        raise
    if job.error is not None and job.started_at is None:
        await jobs.delete(job.id)
        raise job.error
    response.headers["Location"] = f"{jobs.router.prefix}/{job.id}"
    return jobs.show(job)


async def _prepared(job: InServerJob[Any]) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(job.prepared.wait(), REPLY_SECONDS)
