"""Long work on a thread that ends when nobody waits for it any more: it checks between its pieces."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from server.errors import Overloaded, RequestAborted
from server.executors import Executor

T = TypeVar("T")

PIECE_SECONDS = 5.0
"""How long to wait for the end of work that was cancelled; a piece takes far less."""


async def run_long(threads: Executor, work: Callable[[Callable[[], None]], T]) -> T:
    """Return what `work` returns, which calls the function that it is given between its pieces.

    If the caller is cancelled, that function raises, so the work ends, and only then does the caller.

    Raises:
        Overloaded: too much work waits for a thread.
    """
    is_cancelled = threading.Event()

    def go_on() -> None:
        if is_cancelled.is_set():
            raise RequestAborted("The work was cancelled before its end.")

    running = threads.submit(work, go_on)
    ended = asyncio.wrap_future(running)
    # Looked at in any case: a caller that is cancelled twice does not wait for the end of the work.
    ended.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        await asyncio.wait({ended})
    except asyncio.CancelledError:
        is_cancelled.set()
        if not running.cancel():
            await asyncio.wait({ended}, timeout=PIECE_SECONDS)
        raise
    return ended.result()


class Lane:
    """Long work of one kind, one piece of work at a time; a bounded number waits in turn, and holds no thread."""

    def __init__(self, threads: Executor, work: str, most_waiting: int) -> None:
        """Nothing waits yet.

        Args:
            threads: run the work.
            work: the work in the plural, for the refusal.
            most_waiting: how many may wait.
        """
        self._threads = threads
        self._work = work
        self._most_waiting = most_waiting
        self._turn = asyncio.Lock()
        self._entered = 0

    async def run(self, work: Callable[[Callable[[], None]], T]) -> T:
        """As `run_long`, when it is this work's turn.

        Raises:
            Overloaded: too much waits.
        """
        if self._entered > self._most_waiting:
            raise Overloaded(f"{self._most_waiting} {self._work} wait already until their data is checked.")
        self._entered += 1
        try:
            async with self._turn:
                return await run_long(self._threads, work)
        finally:
            self._entered -= 1
