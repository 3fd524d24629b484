"""Thread pools for work that would block the event loop, one bounded pool for each kind of work.

A store that does not answer blocks the threads that wait for it, so changes of tasks never share a pool with generation
requests. Each pool limits its threads and its waiting work. Threads are daemons, which `concurrent.futures` does not
offer: before the process ends, Python waits for threads that are not daemons, even if they hang.
"""

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
    """A thread pool whose threads start when there is work and end when there is none, so it needs no shutdown."""

    def __init__(self, name: str, work: str, *, threads: int, most_waiting: int) -> None:
        """Create a pool without threads, of at most `threads`, for which at most `most_waiting` calls wait.

        `work` names the work in the plural, for the refusal: "changes of tasks".
        """
        self._name = name
        self._work = work
        self.most_threads = threads
        self._most_waiting = most_waiting
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._num_threads = self._num_running = 0
        self._lock = threading.Lock()

    async def run(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `work` on a thread and return its result; its log entries have the request's id.

        Cancelling the caller cancels waiting work; running work is not interrupted. Raises Overloaded if too much work
        waits.
        """
        return await asyncio.wrap_future(self.submit(work, *args, **kwargs))

    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Like `run`, for callers without an event loop."""
        call = partial(contextvars.copy_context().run, work, *args, **kwargs)
        future: Future[T] = Future()
        with self._lock:
            if self._is_full:
                self._waiting = deque(item for item in self._waiting if not item[0].cancelled())
                if self._is_full:
                    raise Overloaded(f"{self._most_waiting} {self._work} wait already; no more may wait.")
            self._waiting.append((future, call))
            if self._num_threads < self.most_threads:
                self._num_threads += 1
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
        return future

    @property
    def _is_full(self) -> bool:
        """Whether no more work is accepted; work that a starting thread will take does not count as waiting."""
        return self._num_running + len(self._waiting) >= self.most_threads + self._most_waiting

    def _run(self) -> None:
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
            del item  # otherwise the result would stay in memory while this thread runs the next item


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
    """The pools of the control plane. The pool of the data plane is `EngineWorker.threads`.

    Attributes:
        changes: publishes and all other changes of tasks; each may wait minutes for the store.
        jobs: reads and writes the folders of training jobs.
        in_server: prepares jobs that run in the server, and their rows.
        interpretation: interprets soft prompts.
        scrapes: renders metrics.
        ending: work at shutdown; nothing else may use its threads.
    """

    def __init__(self) -> None:
        self.changes = Executor("changes", "changes of tasks", threads=6, most_waiting=32)
        self.jobs = Executor("training-jobs", "requests for training jobs", threads=4, most_waiting=128)
        self.in_server = Executor("in-server-jobs", "jobs in the server and their rows", threads=2, most_waiting=64)
        self.interpretation = Executor("interpretation", "interpretations", threads=1, most_waiting=16)
        self.scrapes = Executor("scrapes", "scrapes", threads=1, most_waiting=4)
        self.ending = Executor("ending", "parts of the server", threads=8, most_waiting=8)


def for_texts(most_waiting: int) -> Executor:
    """The pool of the data plane, which tokenises long texts and large sets of labels."""
    return Executor("texts", "texts", threads=4, most_waiting=most_waiting)
