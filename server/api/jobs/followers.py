"""Follows jobs: one asyncio task polls a job on behalf of all its followers."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field

from server.api.jobs.job_kind import Jobs, Line, News
from server.engine.worker import EngineWorker
from server.errors import Overloaded, PreludeError, ServerDraining

MOST_FOLLOWERS = 64
LOOK_SECONDS = 0.5
SILENT_SECONDS = 15.0
CHUNK = 2**18
"""Maximum number of record bytes that a follower reads at a time while it catches up."""

Events = AsyncGenerator[Line]


@dataclass
class _Watch:
    """A job with followers, and its latest news."""

    followers: int = 0
    news: News | None = None
    error: PreludeError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def notify(self) -> None:
        """Wake all followers."""
        self.changed.set()
        self.changed = asyncio.Event()


class Followers:
    """All followers of jobs. Only for the event loop's thread."""

    def __init__(self, worker: EngineWorker) -> None:
        self._worker = worker
        self._watches: dict[tuple[str, str], _Watch] = {}

    def check_room(self) -> None:
        """Raise Overloaded if the maximum number of followers is reached."""
        if sum(watch.followers for watch in self._watches.values()) >= MOST_FOLLOWERS:
            raise Overloaded(f"{MOST_FOLLOWERS} clients follow jobs already.", remedy="Poll the job itself instead.")

    async def events(self, jobs: Jobs, job_id: str, last: int) -> Events:
        """Yield the record's numbered lines after `last`, state and progress on each change, and the job at its end.

        Raises:
            Overloaded: see `check_room`.
            PreludeError: the job was deleted.
            ServerDraining: the server shuts down first; a client that reconnects resumes after its last event.
        """
        with self._watching(jobs, job_id) as watch:
            number, offset, at = 0, 0, time.monotonic()
            shown: list[Line] = []
            while True:
                changed, news = watch.changed, watch.news
                if news is not None:
                    shown, before = _standing(jobs, news), shown
                    for event in (event for event in shown if event not in before):
                        at = time.monotonic()
                        yield event
                    while offset < news.until:
                        lines, offset = await _read(jobs, job_id, offset, news)
                        for line in lines:
                            number += 1
                            if number > last:
                                at = time.monotonic()
                                yield {"id": number, **line}
                    if news.job.state.is_over:
                        yield {"event": "end", "job": jobs.as_json(news.job)}
                        return
                if watch.error is not None:
                    raise watch.error
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), max(0.0, at + SILENT_SECONDS - time.monotonic()))
                if time.monotonic() >= at + SILENT_SECONDS:
                    at = time.monotonic()
                    yield {}

    @contextlib.contextmanager
    def _watching(self, jobs: Jobs, job_id: str) -> Iterator[_Watch]:
        self.check_room()
        key = jobs.word, job_id
        watch = self._watches.setdefault(key, _Watch())
        watch.followers += 1
        if watch.task is None:
            watch.task = asyncio.get_running_loop().create_task(self._look(jobs, job_id, watch))
        try:
            yield watch
        finally:
            watch.followers -= 1
            if not watch.followers:
                watch.task.cancel()
                del self._watches[key]

    async def _look(self, jobs: Jobs, job_id: str, watch: _Watch) -> None:
        """Poll a job until it is over, on behalf of all its followers."""
        offset: int | None = None
        while True:
            with contextlib.suppress(Overloaded):  # the threads are busy; the next poll comes soon
                try:
                    news = await jobs.news(job_id, offset)
                except Overloaded:
                    raise
                except PreludeError as exc:
                    watch.error = exc
                    watch.notify()
                    return
                offset = news.until
                if watch.news is None or news.lines or news.job != watch.news.job:
                    watch.news = news
                    watch.notify()
                if news.job.state.is_over:
                    return
            if self._worker.draining and jobs.outlives_server:
                watch.error = ServerDraining("The server is shutting down; the job resumes when it is back.")
                watch.notify()
                return
            await asyncio.sleep(LOOK_SECONDS)


def _standing(jobs: Jobs, news: News) -> list[Line]:
    """The state and progress events of a job; a follower gets each event only if it has changed."""
    state = {"event": "state", "state": jobs.state_of(news.job)}
    return [state] if news.progress is None else [state, {"event": "progress", **news.progress}]


async def _read(jobs: Jobs, job_id: str, offset: int, news: News) -> tuple[Sequence[Line], int]:
    """Lines from an offset on: from the news, or from the record until the follower has caught up."""
    if offset == news.since:
        return news.lines, news.until
    end = news.since if offset < news.since else news.until
    lines, until = await jobs.read(job_id, offset, min(CHUNK, end - offset))
    return lines, until if until > offset else end
