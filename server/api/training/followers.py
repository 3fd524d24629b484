"""Following training jobs: each job's folder is looked at by one task, however many clients follow it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.api.training.schemas import job_body
from server.engine.worker import EngineWorker
from server.errors import Overloaded, PreludeError, ServerDraining
from server.executors import Executor
from server.jobs.job import Job
from server.jobs.job_queue import JobBoard
from server.jobs.record import last_line_end, read_lines

MOST_FOLLOWERS = 64
LOOK_SECONDS = 0.5
SILENT_SECONDS = 15.0
CHUNK = 2**18
"""Bytes of a record that a follower reads at once until it has caught up."""

Events = AsyncGenerator[Mapping[str, Any]]


@dataclass(frozen=True)
class _News:
    """A job, and what its record has grown by since the last look: from one offset to another."""

    job: Job
    since: int
    until: int
    lines: tuple[Mapping[str, Any], ...]


@dataclass
class _Watch:
    """One job that is followed."""

    followers: int = 0
    news: _News | None = None
    error: PreludeError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def tell(self) -> None:
        """Wake all followers."""
        self.changed.set()
        self.changed = asyncio.Event()


class Followers:
    """Everybody who follows a job. Only for the event loop's thread."""

    def __init__(self, board: JobBoard, worker: EngineWorker, threads: Executor) -> None:
        """Nobody does yet."""
        self._board = board
        self._worker = worker
        self._threads = threads
        self._watches: dict[str, _Watch] = {}

    def check_room(self) -> None:
        """Refuse another follower.

        Raises:
            Overloaded: as many follow as may.
        """
        if sum(watch.followers for watch in self._watches.values()) >= MOST_FOLLOWERS:
            raise Overloaded(
                f"{MOST_FOLLOWERS} clients follow training jobs.", remedy="Ask GET /training/jobs/{job} now and then."
            )

    async def events(self, job_id: str, last: int) -> Events:
        """The record's lines after the last one, numbered; the state whenever it changes; at the end the whole job.

        Raises:
            Overloaded: as `check_room`.
            UnknownJob: its folder is gone.
            ServerDraining: the server ends before the job does; a client that comes back resumes after its last event.
        """
        with self._watching(job_id) as watch:
            number, offset, shown, at = 0, 0, "", time.monotonic()
            while True:
                changed, news = watch.changed, watch.news
                if news is not None:
                    if news.job.status.state != shown:
                        shown, at = news.job.status.state, time.monotonic()
                        yield {"event": "state", "state": shown}
                    while offset < news.until:
                        lines, offset = await self._read(job_id, offset, news)
                        for line in lines:
                            number += 1
                            if number > last:
                                at = time.monotonic()
                                yield {"id": number, **line}
                    if news.job.status.state.is_over:
                        yield {"event": "end", "job": job_body(news.job).model_dump(exclude_none=True)}
                        return
                if watch.error is not None:
                    raise watch.error
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), max(0.0, at + SILENT_SECONDS - time.monotonic()))
                if time.monotonic() >= at + SILENT_SECONDS:
                    at = time.monotonic()
                    yield {}

    async def _read(self, job_id: str, offset: int, news: _News) -> tuple[list[Mapping[str, Any]], int]:
        """Lines from an offset on: those of the news, or of the file until the follower has caught up with them."""
        if offset == news.since:
            return list(news.lines), news.until
        end = news.since if offset < news.since else news.until
        lines, until = await self._threads.run(read_lines, self._record(job_id), offset, min(CHUNK, end - offset))
        return list(lines), until if until > offset else end

    @contextlib.contextmanager
    def _watching(self, job_id: str) -> Iterator[_Watch]:
        self.check_room()
        watch = self._watches.setdefault(job_id, _Watch())
        watch.followers += 1
        if watch.task is None:
            watch.task = asyncio.get_running_loop().create_task(self._look(job_id, watch))
        try:
            yield watch
        finally:
            watch.followers -= 1
            if not watch.followers:
                watch.task.cancel()
                del self._watches[job_id]

    async def _look(self, job_id: str, watch: _Watch) -> None:
        """Look at a job's folder until it is over, on behalf of all its followers."""
        offset: int | None = None
        while True:
            with contextlib.suppress(Overloaded):  # the threads are busy; another look comes
                try:
                    news = await self._threads.run(self._news, job_id, offset)
                except Overloaded:
                    raise
                except PreludeError as exc:
                    watch.error = exc
                    watch.tell()
                    return
                offset = news.until
                if watch.news is None or news.lines or news.job != watch.news.job:
                    watch.news = news
                    watch.tell()
                if news.job.status.state.is_over:
                    return
            if self._worker.draining:
                watch.error = ServerDraining("The server is shutting down; the job resumes when it is back.")
                watch.tell()
                return
            await asyncio.sleep(LOOK_SECONDS)

    def _news(self, job_id: str, offset: int | None) -> _News:
        job = self._board.files.job(job_id)  # before its record: what it recorded before its end is read
        since = last_line_end(self._record(job_id)) if offset is None else offset
        lines, until = read_lines(self._record(job_id), since)
        return _News(job, since, until, tuple(lines))

    def _record(self, job_id: str) -> Path:
        return self._board.folder(job_id).record
