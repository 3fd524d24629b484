"""Requests to a worker, and waiting for it."""

from __future__ import annotations

import asyncio
from typing import Any

from server.contracts import Delta
from server.engine.worker import EngineWorker
from tests.support import request


async def collect(worker: EngineWorker, request_id: str, new_tokens: int = 5) -> list[Delta]:
    asked = request(request_id, [1, 2, 3], max_new_tokens=new_tokens, ignore_eos=True)
    return [delta async for delta in worker.generate(asked, None)]


def begin(worker: EngineWorker, request_id: str, new_tokens: int = 5, **options: Any) -> asyncio.Task[list[Delta]]:
    """A request that runs beside others."""
    asked = request(request_id, [1, 2, 3], max_new_tokens=new_tokens, ignore_eos=True, **options)

    async def collected() -> list[Delta]:
        return [delta async for delta in worker.generate(asked, None)]

    return asyncio.ensure_future(collected())
