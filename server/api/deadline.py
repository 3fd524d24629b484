"""The deadline of a request for an answer, from its arrival to its last byte: PRELUDE_REQUEST_TIMEOUT.

The engine's worker ends a request in time by itself. This module covers the time outside the engine: waiting for the
store, waiting for a tokeniser thread, and a client that does not read its stream.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request

from server.api.telemetry.record import record_of
from server.engine.worker import EngineWorker, timed_out

GRACE_SECONDS = 0.5
"""This deadline comes a little after the worker's, because the worker's error is more specific and may still be
sent."""


def seconds_left(request: Request) -> float | None:
    """Seconds that a request may still take, at least 0; None if there is no limit."""
    worker: EngineWorker | None = getattr(request.app.state, "worker", None) if "app" in request.scope else None
    if worker is None or worker.request_timeout is None:
        return None
    return max(0.0, worker.request_timeout + GRACE_SECONDS - record_of(request).seconds)


@asynccontextmanager
async def in_time(request: Request) -> AsyncIterator[None]:
    """Context manager: raise RequestTimedOut in a block that takes longer than the request may."""
    try:
        async with asyncio.timeout(seconds_left(request)) as limit:
            yield
    except TimeoutError as exc:
        if not limit.expired():
            raise
        raise timed_out(request.app.state.worker.request_timeout) from exc
