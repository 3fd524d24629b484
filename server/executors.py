"""Threads for work that would block the event loop, one bounded pool for each kind of work.

A store that does not answer holds the threads that wait for it, so changes of tasks never share a pool with requests
for an answer. Each pool bounds its threads and the work that may wait for one. Threads are daemons, which
`concurrent.futures` does not offer: Python waits for its threads before the process ends, even for those that hang.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, ParamSpec, TypeVar

from server.errors import Overloaded

P = ParamSpec("P")
T = TypeVar("T")


class Executor:
    """A pool of threads that start when there is work and end when there is none, so nothing has to be shut down."""

    def __init__(self, name: str, work: str, *, threads: int, most_waiting: int) -> None:
        """Start no thread yet.

        Args:
            name: of the threads.
            work: the work in the plural, for the refusal: "changes of tasks".
            threads: work that runs at once; kept as `most_threads`.
            most_waiting: work that may wait for a thread.
        """
        self._name = name
        self._work = work
        self.most_threads = threads
        self._most_waiting = most_waiting
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._num_threads = self._num_running = 0
        self._lock = threading.Lock()

    async def run(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `work` returns; logging on its thread keeps the request's id.

        Cancelling the caller cancels work that waits; work that runs is left alone.

        Raises:
            Overloaded: too much work waits for a thread.
        """
        return await asyncio.wrap_future(self.submit(work, *args, **kwargs))

    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """As `run`, for callers without an event loop."""
        call = partial(contextvars.copy_context().run, work, *args, **kwargs)
        future: Future[T] = Future()
        with self._lock:
            if self._is_full:
                self._forget_cancelled()
                if self._is_full:
                    raise Overloaded(f"{self._most_waiting} {self._work} wait already; no more may wait.")
            self._waiting.append((future, call))
            if self._num_threads < self.most_threads:
                self._num_threads += 1
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
        return future

    @property
    def _is_full(self) -> bool:
        """Work that a thread was started for and has not taken yet does not count as waiting."""
        return self._num_running + len(self._waiting) >= self.most_threads + self._most_waiting

    def _forget_cancelled(self) -> None:
        self._waiting = deque(item for item in self._waiting if not item[0].cancelled())

    def _run(self) -> None:
        """Work until nothing waits."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._num_threads -= 1
                    return
                item = self._waiting.popleft()
                self._num_running += 1
            _work_off(*item)
            with self._lock:
                self._num_running -= 1
            del item  # or it would keep its result in memory while this thread works on the next one


def _work_off(future: Future[T], work: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as exc:  # noqa: BLE001 - the caller raises it
        future.set_exception(exc)
    else:
        future.set_result(result)


class Executors:
    """The pools of the control plane. The data plane's is the engine worker's (`EngineWorker.threads`).

    Attributes:
        changes: publishes and all other changes of tasks; each may wait minutes for the store.
        jobs: training jobs: reading and writing their folders.
        in_server: preparing jobs that run in the server, and their rows.
        scrapes: writing metrics.
        ending: what ends with the server; nothing else may take its threads.
    """

    def __init__(self) -> None:
        self.changes = Executor("changes", "changes of tasks", threads=6, most_waiting=32)
        self.jobs = Executor("training-jobs", "requests for training jobs", threads=4, most_waiting=128)
        self.in_server = Executor("in-server-jobs", "jobs in the server and their rows", threads=2, most_waiting=64)
        self.scrapes = Executor("scrapes", "scrapes", threads=1, most_waiting=4)
        self.ending = Executor("ending", "parts of the server", threads=8, most_waiting=8)


def for_texts(most_waiting: int) -> Executor:
    """The data plane's pool: long texts and many labels are tokenised on it.

    Args:
        most_waiting: texts that may wait; as many as requests may be in flight.
    """
    return Executor("texts", "texts", threads=4, most_waiting=most_waiting)
