"""Long work on a thread that ends when nobody waits for it any more: it asks between its pieces."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from server.errors import RequestAborted
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
    try:
        await asyncio.wait({ended})
    except asyncio.CancelledError:
        is_cancelled.set()
        if not running.cancel():
            await asyncio.wait({ended}, timeout=PIECE_SECONDS)
        if ended.done() and not ended.cancelled():
            ended.exception()  # somebody has looked at it
        raise
    return ended.result()
