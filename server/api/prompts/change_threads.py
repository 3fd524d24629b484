"""Runs changes of tasks on their own threads and within a time limit."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ParamSpec, TypeVar

from fastapi import Depends

from server.api.deps import ExecutorsDep, KeyIdDep, RegistryDep
from server.api.prompts.preconditions import ExpectedDep
from server.errors import StoreTimeout
from server.executors import Executors
from server.registry.commands import Expected
from server.registry.registry import Registry

P = ParamSpec("P")
T = TypeVar("T")

CHANGE_SECONDS = 90.0
PUBLISH_SECONDS = 300.0
"""A publish writes up to a thousand blobs."""


async def in_time(
    seconds: float, executors: Executors, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
) -> T:
    """Run a change on a thread and return its result.

    Raises:
        StoreTimeout: the time limit has passed. A change that still waits for a thread is never made.
        Overloaded: too many changes are waiting.
    """
    try:
        async with asyncio.timeout(seconds) as limit:
            return await executors.changes.run(work, *args, **kwargs)
    except TimeoutError as exc:
        if not limit.expired():
            raise
        raise StoreTimeout(f"The change was not made within {seconds:.0f} seconds.") from exc


@dataclass(frozen=True)
class Change:
    """Makes a change of a task, with the request's key and the state that the task must be in."""

    registry: Registry
    executors: Executors
    expected: Expected
    key_id: str | None

    async def make(self, change: Callable[..., T], *args: Any, seconds: float | None = None, **options: Any) -> T:
        """Run one of the registry's changes with `in_time`."""
        about = {"by": self.key_id, "expected": self.expected, **options}
        return await in_time(seconds or CHANGE_SECONDS, self.executors, change, *args, **about)


async def _change(registry: RegistryDep, executors: ExecutorsDep, expected: ExpectedDep, key_id: KeyIdDep) -> Change:
    return Change(registry, executors, expected, key_id)


ChangeDep = Annotated[Change, Depends(_change)]
