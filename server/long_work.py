"""Work that ends with its caller: long work on a thread, which stops between pieces, and tasks that run at once."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from server.errors import Overloaded, RequestAborted
from server.executors import Executor

T = TypeVar("T")

PIECE_SECONDS = 5.0
"""How long to wait for cancelled work to end; a piece takes far less."""


async def run_long(threads: Executor, work: Callable[[Callable[[], None]], T]) -> T:
    """Run `work` and return its result; `work` calls the function that it receives between its pieces.

    If the caller is cancelled, that function raises. The work then ends, and after it the caller. Raises Overloaded if
    too much work waits for a thread.
    """
    is_cancelled = threading.Event()

    def check_cancelled() -> None:
        if is_cancelled.is_set():
            raise RequestAborted("The work was cancelled before its end.")

    running = threads.submit(work, check_cancelled)
    ended = asyncio.wrap_future(running)
    # Always retrieve the exception, because a caller that is cancelled twice does not wait for the end of the work.
    ended.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        await asyncio.wait({ended})
    except asyncio.CancelledError:
        is_cancelled.set()
        if not running.cancel():
            await asyncio.wait({ended}, timeout=PIECE_SECONDS)
        raise
    return ended.result()


@asynccontextmanager
async def running(*work: Awaitable[Any]) -> AsyncIterator[Sequence[asyncio.Future[Any]]]:
    """Context manager: start all; at the block's end, cancel those that still run, and wait until all have ended."""
    started: Sequence[asyncio.Future[Any]] = [asyncio.ensure_future(one) for one in work]
    try:
        yield started
    finally:
        for future in started:
            future.cancel()
        await asyncio.gather(*started, return_exceptions=True)


class Lane:
    """A queue for long work of one kind, which runs one item at a time; waiting items are limited and use no thread."""

    def __init__(self, threads: Executor, work: str, most_waiting: int) -> None:
        """Create an empty queue; `work` names the work in the plural, for the refusal."""
        self._threads = threads
        self._work = work
        self._most_waiting = most_waiting
        self._turn = asyncio.Lock()
        self._entered = 0

    async def run(self, work: Callable[[Callable[[], None]], T]) -> T:
        """Like `run_long`, after waiting for the turn; raises Overloaded if too many items are waiting."""
        if self._entered > self._most_waiting:
            raise Overloaded(f"{self._most_waiting} {self._work} wait already until their data is checked.")
        self._entered += 1
        try:
            async with self._turn:
                return await run_long(self._threads, work)
        finally:
            self._entered -= 1
