"""Server-sent events, and detection of clients that disconnect, even while they wait for the first event."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.auth import has_key, why_no_longer
from server.api.deadline import seconds_left
from server.api.schemas import Responses, error_body
from server.errors import PreludeError, RequestAborted, Unauthorized
from server.long_work import running

T = TypeVar("T")

log = logging.getLogger(__name__)

KEY_SECONDS = 2.0
"""How often a long request's key is checked again."""
READ_SECONDS = 2.0
"""How long a client may take to read why its stream ends."""

EVENTS: Responses = {200: {"description": "Server-sent events.", "content": {"text/event-stream": {}}}}
OR_STREAM: Responses = {
    200: {**EVENTS[200], "description": "The reply; with `stream: true` the same as server-sent events."}
}
"""The OpenAPI description of routes that reply either way."""


@dataclass(frozen=True)
class Dialect:
    """The event format of a front end."""

    field: bytes = b"data:"
    """What a line begins with."""
    end: bytes = b""
    """What follows the last value of a stream that came to its end."""
    error: Callable[[PreludeError], Mapping[str, Any]] = error_body
    """An error as the value of an event."""


NATIVE = Dialect()


class EventStream(Response):
    """Sends one `data:` line per value; an error after the first byte is an event too, never a silent end.

    The generator is closed as soon as the client has disconnected, which frees what the request holds in the engine.
    """

    media_type = "text/event-stream"
    is_answer = True
    """Whether the request has a deadline, at which an unread stream is cut off."""

    def __init__(
        self, events: AsyncGenerator[Mapping[str, Any]], headers: Mapping[str, str], dialect: Dialect = NATIVE
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._dialect = dialect
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        seconds = seconds_left(Request(scope)) if self.is_answer else None
        async with (
            contextlib.aclosing(self._events),
            running(_disconnected(receive), _revoked(scope)) as (gone, revoked),
        ):
            async with running(self._send_all(scope, send)) as (sending,):
                waiting = {sending, gone, revoked}
                done, _ = await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                log.info("a stream is cut off: its client did not read it within the time that a request may take")
            elif done == {revoked}:
                await self._end(send, revoked.result())

    async def _end(self, send: Send, error: PreludeError) -> None:
        """Send an error as the last event, if the client reads at all."""
        last = {"type": "http.response.body", "body": self._encode(self._dialect.error(error)), "more_body": False}
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(READ_SECONDS):
                if not self._has_begun:
                    await self._begin(send)
                await send(last)

    async def _begin(self, send: Send) -> None:
        self._has_begun = True
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await self._begin(send)
        try:
            async for event in self._events:
                if (why := why_no_longer(scope)) is not None:  # what comes after the revocation is not for this client
                    raise Unauthorized(why)
                await send({"type": "http.response.body", "body": self._encode(event), "more_body": True})
            last = self._dialect.end
        except PreludeError as error:
            last = self._encode(self._dialect.error(error))
        except OSError:  # the client went away between two events
            return
        except Exception:
            log.exception("a stream failed")
            last = self._encode(self._dialect.error(PreludeError("The server failed on this request.")))
        await send({"type": "http.response.body", "body": last, "more_body": False})

    def _encode(self, event: Mapping[str, Any]) -> bytes:
        # ASCII only: clients that split lines as Unicode does would cut an event at U+2028 or U+0085 in a token's text.
        return self._dialect.field + json.dumps(event).encode() + b"\n\n"


class NumberedStream(EventStream):
    """A stream with event ids.

    A client that reconnects sends the last id as Last-Event-ID. An empty event is sent as a comment, to keep proxies
    from closing an idle connection.
    """

    is_answer = False

    def _encode(self, event: Mapping[str, Any]) -> bytes:
        if not event:
            return b":\n\n"
        number = event.get("id")
        head = b"" if number is None else f"id:{number}\n".encode()
        return head + super()._encode({name: value for name, value in event.items() if name != "id"})


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Await something on behalf of a client, and cancel it if the client disconnects first.

    Raises:
        RequestAborted: the client has disconnected.
        Unauthorized: the request's key was revoked, or lost what the request needs.
    """
    watching: list[Awaitable[PreludeError]] = [_disconnected(request.receive)]
    if has_key(request.scope):
        watching.append(_revoked(request.scope))
    async with running(work, *watching) as (task, *watches):
        await asyncio.wait({task, *watches}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            result: T = task.result()
            return result
        raise next(watch.result() for watch in watches if watch.done())


async def _revoked(scope: Scope) -> Unauthorized:
    """Wait until the request's key no longer allows the request, then return the error."""
    while True:
        if (why := why_no_longer(scope)) is not None:
            return Unauthorized(why)
        await asyncio.sleep(KEY_SECONDS)


async def _disconnected(receive: Receive) -> RequestAborted:
    """Wait until the client has disconnected, then return the error."""
    while (await receive())["type"] != "http.disconnect":
        pass
    return RequestAborted("The client went away.")
