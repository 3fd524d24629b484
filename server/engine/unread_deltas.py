"""The unread deltas of each request. Only for the event loop's thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from server.contracts import Delta, FinishReason
from server.errors import RequestAborted

MOST_UNREAD = 1_000_000
"""Maximum number of unread tokens and candidates in all streams together: about 150 MB."""


class Stream:
    """The deltas of one request that its front end has not read yet."""

    def __init__(self, streams: Streams, on_end: Callable[[], None]) -> None:
        """Create an empty stream among `streams`; `on_end` is called with the last delta, read or not."""
        self._streams = streams
        self._deltas: asyncio.Queue[Delta] = asyncio.Queue()
        self._on_end = on_end
        self.unread = 0
        """Number of unread tokens and candidates."""
        self.has_ended = False
        """Whether the last delta has arrived."""

    def put(self, delta: Delta) -> None:
        """Add a delta."""
        self._count(_size(delta))
        self._deltas.put_nowait(delta)
        if delta.finish_reason is not None and delta.is_last:
            self.has_ended = True
            self._on_end()

    async def get(self) -> Delta:
        """Wait for the next delta and return it."""
        delta = await self._deltas.get()
        self._count(-_size(delta))
        return delta

    def end_with(self, delta: Delta) -> None:
        """Drop all unread deltas and end the stream with this one."""
        self.drop()
        self.put(delta)

    def drop(self) -> None:
        """Drop all unread deltas."""
        while not self._deltas.empty():
            self._deltas.get_nowait()
        self._count(-self.unread)

    def _count(self, size: int) -> None:
        self.unread += size
        self._streams.unread += size


class Streams:
    """The streams of all accepted requests."""

    def __init__(self) -> None:
        self.unread = 0
        """Number of unread tokens and candidates in all streams."""
        self._streams: dict[str, Stream] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._streams))

    @contextmanager
    def open(self, request_id: str, on_end: Callable[[], None]) -> Iterator[Stream]:
        """Context manager: the stream of a request."""
        assert request_id not in self._streams, "request ids are unique"
        stream = self._streams[request_id] = Stream(self, on_end)
        self._idle.clear()
        try:
            yield stream
        finally:
            stream.drop()
            del self._streams[request_id]
            if not self._streams:
                self._idle.set()

    def hand_out(self, deltas: Iterable[Delta]) -> list[str]:
        """Add deltas to their streams; returns the requests to abort because too much of their output is unread."""
        for delta in deltas:
            if (stream := self._streams.get(delta.request_id)) is not None:
                stream.put(delta)
        return self._drop_slowest()

    def end_all(self, error: Exception) -> None:
        """End every open stream with an error, after its unread deltas."""
        for request_id, stream in self._streams.items():
            if not stream.has_ended:
                stream.put(Delta(request_id, None, FinishReason.FAILED, error=error))

    async def idle_within(self, seconds: float) -> bool:
        """Wait until no stream is open; returns False if one still is after `seconds`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        return self._idle.is_set()

    def _drop_slowest(self) -> list[str]:
        """While the limit is exceeded, end the stream with the most unread tokens; returns the requests."""
        dropped = []
        while self.unread > MOST_UNREAD:
            request_id, stream = max(self._streams.items(), key=lambda item: item[1].unread)
            error = RequestAborted(
                "The client reads more slowly than the model writes, and too much output is unread.",
                remedy="Read faster, or ask for fewer choices and log-probabilities.",
            )
            stream.end_with(Delta(request_id, None, FinishReason.FAILED, error=error))
            dropped.append(request_id)
        return dropped


def _size(delta: Delta) -> int:
    token = 0 if delta.token is None else 1 + len(delta.token.top)
    return token + sum(1 + len(scored.top) for scored in delta.scored)
