"""Runs several awaitables at the same time, none of which outlives its caller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import Any


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
