"""Middleware around the whole app: the request's id, its log line and its metrics. Pure ASGI leaves streams untouched.

The id is the client's `X-Request-Id`, or a new one. It is in every reply, errors included, and in every log line
written on behalf of the request: loggers read it from the context variables of the request's asyncio task.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars

from server.api.telemetry.metrics import Metrics
from server.api.telemetry.record import TOKENS, Record, RequestOutcome
from server.errors import PreludeError

if TYPE_CHECKING:
    from server.api.telemetry.spans import Tracing

log = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"

QUIET = frozenset({"/health", "/ready", "/ping", "/v2/health/live", "/v2/health/ready", "/metrics"})
"""Routes that monitoring polls every few seconds; successful requests are logged at debug level only."""

_ID = re.compile(r"[ -~]{1,128}")


class Access:
    """The outermost middleware of the app."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = _record(headers)
        scope.setdefault("state", {})["record"] = record
        bind_contextvars(request_id=record.id)
        added = {REQUEST_ID: record.id}
        if self._tracing is not None and scope["path"] not in QUIET:
            record.trace = self._tracing.begin(headers, scope["method"])
            if record.trace.id is not None:
                bind_contextvars(trace_id=record.trace.id)
            added |= record.trace.headers
        to_add = [(name.encode(), value.encode()) for name, value in added.items()]

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *to_add]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._end(scope, record)

    def _end(self, scope: Scope, record: Record) -> None:
        route = _route(scope)
        if record.generates and record.outcome is None and (record.status is None or record.status >= 400):
            record.outcome = _outcome(record.status)
            self._metrics.never_began(record.outcome)
        self._metrics.answered(scope["method"], route, record.status)
        is_quiet = route in QUIET and record.status == 200
        line = _line(scope, record, route)
        log.log(logging.DEBUG if is_quiet else logging.INFO, "request", extra=line)
        if record.trace is not None:
            record.trace.end(line)


def _record(headers: Headers) -> Record:
    """A record with the client's id, if the id is safe to repeat in a header and in a log."""
    given = headers.getlist(REQUEST_ID)
    return Record(given[0]) if len(given) == 1 and _ID.fullmatch(given[0]) else Record()


def _outcome(status: int | None) -> RequestOutcome:
    """The outcome of a request that never reached the engine."""
    if status is None:
        return RequestOutcome.ABORTED
    return RequestOutcome.FAILED if status == PreludeError.status else RequestOutcome.REFUSED


def _route(scope: Scope) -> str | None:
    """The route's path template; never the request's path, which may contain anything."""
    route = scope.get("route")
    return route.path if isinstance(route, Route) else None


def _line(scope: Scope, record: Record, route: str | None) -> dict[str, Any]:
    usage = record.usage
    fields: dict[str, Any] = {
        "method": scope["method"],
        "route": route,
        "status": record.status,
        "seconds": round(record.seconds, 6),
        "key": scope["state"].get("key_id"),
        "task": record.task,
        "version": record.version,
        "outcome": None if record.outcome is None else str(record.outcome),
        **({} if usage is None else {name: getattr(usage, name) for name in TOKENS}),
    }
    return {name: value for name, value in fields.items() if value is not None}
