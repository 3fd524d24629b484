"""Changes of tasks, on threads of their own and in bounded time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from server.errors import StoreTimeout
from server.executors import Executors

P = ParamSpec("P")
T = TypeVar("T")

CHANGE_SECONDS = 90.0
PUBLISH_SECONDS = 300.0
"""A publish writes up to a thousand blobs."""


async def in_time(
    seconds: float, executors: Executors, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
) -> T:
    """What a change returns.

    Raises:
        StoreTimeout: it took longer. One that waits for a thread is never made; one that runs may still come about.
        Overloaded: too many changes wait.
    """
    try:
        async with asyncio.timeout(seconds) as limit:
            return await executors.changes.run(work, *args, **kwargs)
    except TimeoutError as exc:
        if not limit.expired():
            raise
        raise StoreTimeout(f"The change was not made within {seconds:.0f} seconds.") from exc
