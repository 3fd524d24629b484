"""Time limits for waiting on the store; after them, a request gets 503 with the reason."""

import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TypeVar

from server.errors import StoreTimeout

T = TypeVar("T")

WAIT_SECONDS = 60.0
"""How long a change waits for its turn behind others, and for a content that it needs from the store."""


class BoundedLock:
    """A lock for changes; its holder may wait for the store."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        """Wait for the lock; raises StoreTimeout if others hold it for WAIT_SECONDS."""
        if not self._lock.acquire(timeout=WAIT_SECONDS):
            raise StoreTimeout(f"Another change has waited for the store for {WAIT_SECONDS:.0f} seconds.")

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def result_of(future: Future[T]) -> T:
    """The result of a future; raises StoreTimeout if it takes longer than WAIT_SECONDS."""
    try:
        return future.result(WAIT_SECONDS)
    except FutureTimeoutError as exc:
        if future.done():
            raise
        raise StoreTimeout(f"The store has not answered for {WAIT_SECONDS:.0f} seconds.") from exc
