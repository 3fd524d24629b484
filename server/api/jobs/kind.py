"""The jobs of one kind, as routes and followers see them.

A kind is a subclass of `Jobs` in a module that also asks for a job (POST), and a line in `table.py`. Jobs that run in
the server subclass `InServerJobs` instead, and bring their `Work` (`in_process.py`).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastapi import APIRouter, Depends, Request
from pydantic import TypeAdapter

from server.api.auth import GuardedRoute, Publishes, may_see
from server.api.deps import known_query
from server.engine.worker import EngineWorker
from server.errors import PreludeError
from server.executors import Executors
from server.jobs.job import JobState
from server.jobs.job_queue import JobBoard
from server.keys.live import ApiKeys
from server.settings import Settings

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Site:
    """What the jobs of a server may use."""

    settings: Settings
    worker: EngineWorker
    executors: Executors
    board: JobBoard
    keys: ApiKeys | None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the one job that runs in the server."""


@dataclass(frozen=True)
class News:
    """A job, and what its record has grown by since the last look: from one offset to another.

    `progress` is what followers get whenever it changes; None if the record holds it.
    """

    job: Any
    since: int = 0
    until: int = 0
    lines: Sequence[Line] = ()
    progress: Line | None = None


def job_router(path: str, tag: str) -> APIRouter:
    """A router for jobs: its routes are for keys that may publish."""
    guards = [Publishes, Depends(known_query)]
    return APIRouter(prefix=path, tags=[tag], route_class=GuardedRoute, dependencies=guards)


class Jobs(ABC):
    """The jobs of one kind on a server. A job has at least `id`, `task` and `state`.

    Attributes:
        router: has the kind's path, and the routes that only this kind has; `routes.py` adds those of every kind.
        word: names a job in operation ids; its plural is the one field of `listing`.
        noun: what errors call a job.
        unknown: the error for an id that stands for no job.
        body, listing: the models that show one job and all of them.
        words: what clients read for a state, where it is not the state's name.
        outlives_server: whether a job resumes after a restart.
    """

    router: ClassVar[APIRouter]
    word: ClassVar[str]
    noun: ClassVar[str]
    unknown: ClassVar[type[PreludeError]]
    body: ClassVar[Any]
    listing: ClassVar[Any]
    words: ClassVar[Mapping[JobState, str]] = {}
    outlives_server: ClassVar[bool]

    def __init__(self, site: Site) -> None:
        self._site = site

    @classmethod
    def of(cls, request: Request) -> Any:
        """The jobs of the server that has this request."""
        return request.app.state.kinds[cls.router.prefix]

    @abstractmethod
    def show(self, job: Any, *, with_result: bool = True) -> Any:
        """A job as `body`."""

    @abstractmethod
    async def all(self) -> Sequence[Any]:
        """All jobs, newest first."""

    @abstractmethod
    async def get(self, job_id: str) -> Any:
        """One of them; raises `unknown` if there is none of this id."""

    @abstractmethod
    async def cancel(self, job_id: str) -> None:
        """End a job, and wait for its end; one that is over stays as it is."""

    @abstractmethod
    async def delete(self, job_id: str) -> None:
        """Forget a job that is over; the kind decides about one that is not."""

    @abstractmethod
    async def news(self, job_id: str, offset: int | None) -> News:
        """A job, and its record from an offset on; None is the record's end."""

    async def read(self, job_id: str, offset: int, most: int) -> tuple[Sequence[Line], int]:
        """Lines of the record from an offset on, in at most that many bytes, and where the next ones begin."""
        return (), offset

    async def stop(self) -> None:  # noqa: B027 - a job that outlives the server needs no end
        """End what would not outlive the server."""

    async def find(self, request: Request, job_id: str) -> Any:
        """A job that the request's key may see; of the others it does not learn that they exist."""
        job = await self.get(job_id)
        if not may_see(request, job.task):
            raise self.no_such(job_id)
        return job

    def no_such(self, job_id: str) -> PreludeError:
        """The error for an id that stands for no job, or for one that the key may not see."""
        return self.unknown(f"There is no {self.noun} {job_id[:80]!r}.")

    def as_json(self, job: Any) -> Any:
        """A job as the routes answer it."""
        return TypeAdapter(self.body).dump_python(self.show(job), mode="json", exclude_none=True)

    def state_of(self, job: Any) -> str:
        """How far a job has come, in the words of its kind."""
        return self.words.get(job.state, job.state.value)
