"""The jobs of one kind, as routes and followers see them.

A kind is a subclass of `Jobs`, a POST route in the same module, and a line in `table.py`. Kinds whose jobs run in the
server subclass `InServerJobs` instead and define their `Work` (`in_process.py`).
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from pydantic import TypeAdapter

from server.api.auth import GuardedRoute, Publishes, may_see
from server.engine.worker import EngineWorker
from server.errors import PreludeError
from server.executors import Executors
from server.jobs.job import JobState
from server.jobs.job_queue import JobQueue
from server.keys.live import ApiKeys
from server.settings import Settings

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Site:
    """The parts of the server that jobs use."""

    settings: Settings
    worker: EngineWorker
    executors: Executors
    job_queue: JobQueue
    keys: ApiKeys | None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Lock of the one in-server job that runs."""


@dataclass(frozen=True)
class News:
    """A job, and the lines added to its record between two offsets.

    `progress` is sent to followers whenever it changes; None if the record contains the progress.
    """

    job: Any
    since: int = 0
    until: int = 0
    lines: Sequence[Line] = ()
    progress: Line | None = None


def job_router(path: str, tag: str) -> APIRouter:
    """A router for jobs; its routes require a key that may publish."""
    return APIRouter(prefix=path, tags=[tag], route_class=GuardedRoute, dependencies=[Publishes])


class Jobs(ABC):
    """The jobs of one kind on a server. Each job has `id`, `task` and `state`."""

    router: ClassVar[APIRouter]
    """The kind's path and own routes; `routes.py` adds the common routes."""
    word: ClassVar[str]
    """A job's name in operation ids; its plural is the only field of `listing`."""
    noun: ClassVar[str]
    """A job's name in errors."""
    unknown: ClassVar[type[PreludeError]]
    """The error for an unknown id."""
    body: ClassVar[Any]
    listing: ClassVar[Any]
    words: ClassVar[Mapping[JobState, str]] = {}
    """The names that clients see for states, where they differ from the states' own."""
    outlives_server: ClassVar[bool]
    """Whether a job resumes after a restart."""

    def __init__(self, site: Site) -> None:
        self._site = site

    @classmethod
    def of(cls, request: Request) -> Any:
        """The jobs of this kind on the server that handles the request."""
        return request.app.state.kinds[cls.router.prefix]

    @abstractmethod
    def show(self, job: Any, *, with_result: bool = True) -> Any:
        """Render a job as `body`."""

    @abstractmethod
    async def all(self) -> Sequence[Any]:
        """All jobs, newest first."""

    @abstractmethod
    async def get(self, job_id: str) -> Any:
        """The job with this id; raises `unknown` if there is none."""

    @abstractmethod
    async def cancel(self, job_id: str) -> None:
        """Cancel a job and wait for its end; a finished job does not change."""

    @abstractmethod
    async def delete(self, job_id: str) -> None:
        """Delete a finished job; the kind decides what happens to an unfinished job."""

    @abstractmethod
    async def news(self, job_id: str, offset: int | None) -> News:
        """A job, and its record from an offset on; None means from the record's end."""

    async def read(self, job_id: str, offset: int, most: int) -> tuple[Sequence[Line], int]:
        """Lines of the record from an offset on, at most `most` bytes, and the offset of the next line."""
        return (), offset

    async def stop(self) -> None:  # noqa: B027 - jobs that outlive the server need no stop
        """End the jobs that do not outlive the server."""

    async def find(self, request: Request, job_id: str) -> Any:
        """The job with this id, if the request's key may see it; other jobs are reported as unknown."""
        job = await self.get(job_id)
        if not may_see(request, job.task):
            raise self.no_such(job_id)
        return job

    def no_such(self, job_id: str) -> PreludeError:
        """The error for an unknown job, or for a job that the key may not see."""
        return self.unknown(f"There is no {self.noun} {job_id[:80]!r}.")

    def as_json(self, job: Any) -> Any:
        """Render a job as the JSON of the routes."""
        return TypeAdapter(self.body).dump_python(self.show(job), mode="json", exclude_none=True)

    def state_of(self, job: Any) -> str:
        """The name that clients see for a job's state."""
        return self.words.get(job.state, job.state.value)
