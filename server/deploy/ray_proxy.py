"""Middleware in Ray Serve's HTTP proxies: requests of a task go to one replica, and broken streams end with an error.

Ray's proxy routes by the headers of a request. This middleware reads the task from the path, the query or the body, and
puts it into the header by which Ray's ConsistentHashRouter chooses a replica. If a replica ends in mid-stream, Ray
closes the connection; this middleware ends the stream with an error event instead. It runs in Ray's process, so it
imports neither torch nor the app.
"""

import asyncio
import json
import re
import time
from typing import Any
from urllib.parse import parse_qs, unquote

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import InvalidRequest, PreludeError, RequestAborted

SESSION_HEADER = b"x-session-id"
"""The header by which Ray's router chooses a replica; clients may set it themselves."""

MOST_BODY = 2**20
"""Bytes of a body in which the task is looked for; a larger body goes to any replica."""

BODY_SECONDS, BODY_RATE = 20.0, 2**14
"""How long a body may take to arrive until its task is known, and bytes per second that extend this time."""

JOBS = "\njobs"
"""What requests for jobs are routed by: no task has this name, and evaluations live in the replica that runs them."""

SLOW = InvalidRequest("The request took too long to arrive.", remedy="Send it without pauses.")
LOST = RequestAborted("The replica that worked on this request has ended.")

_OF_JOBS = re.compile(r"/(training|evaluations|interpretations)(/|$)|/prompts/[^/]+/interpretation$")
_OF_TASK = re.compile(r"/(?:prompts|v1/models)/([^/]+)")


def middleware() -> list[Middleware]:
    """What Ray's proxies apply; the variable in `ray_environment.py` names this function."""
    return [Middleware(TaskRouting), Middleware(WholeStreams)]


class TaskRouting:
    """Adds the header by which a request is routed; requests that name no task go to any replica."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or any(name == SESSION_HEADER for name, _ in scope["headers"]):
            await self._app(scope, receive, send)
            return
        task, messages = _task_in_target(scope), list[Message]()
        if task is None and scope["method"] == "POST" and _is_json(scope):
            try:
                messages = await _read(receive)
            except TimeoutError:
                await _refuse_slow(scope, send)
                return
            task = _task_in_body(messages)
        if task is not None:
            header = (SESSION_HEADER, task.encode("utf-8", "replace")[:256])
            scope = {**scope, "headers": [*scope["headers"], header]}
        again = iter(messages)

        async def read() -> Message:
            message = next(again, None)
            return await receive() if message is None else message

        await self._app(scope, read if messages else receive, send)


def _task_in_target(scope: Scope) -> str | None:
    """The task that path or query name; without the version, because all versions of a task share a replica."""
    query: str = scope["query_string"].decode("latin-1")
    named = parse_qs(query).get("task")
    if named:
        return named[0].partition("@")[0]
    path: str = scope["path"]
    if _OF_JOBS.match(path):
        return JOBS
    found = _OF_TASK.match(path)
    return None if found is None else unquote(found[1]).partition("@")[0]


def _task_in_body(messages: list[Message]) -> str | None:
    """The task in a JSON body, whose error, if it has one, the replica reports."""
    try:
        body = json.loads(b"".join(message.get("body", b"") for message in messages))
    except (ValueError, RecursionError):
        return None
    if not isinstance(body, dict):
        return None
    parameters = body.get("parameters")
    task: object = body.get("model") or (parameters.get("adapter_id") if isinstance(parameters, dict) else None)
    return task.partition("@")[0] if isinstance(task, str) and task else None


async def _read(receive: Receive) -> list[Message]:
    """The body as one message, up to MOST_BODY bytes and a chunk, and the message that interrupted it, if any.

    Raises TimeoutError if it arrives too slowly.
    """
    body, more, began = bytearray(), True, time.monotonic()
    while more and len(body) <= MOST_BODY:
        left = began + BODY_SECONDS + len(body) / BODY_RATE - time.monotonic()
        message = await asyncio.wait_for(receive(), left)
        if message["type"] != "http.request":
            return [{"type": "http.request", "body": bytes(body), "more_body": True}, message]
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return [{"type": "http.request", "body": bytes(body), "more_body": more}]


async def _refuse_slow(scope: Scope, send: Send) -> None:
    """Answer 408, and close the connection, on which the rest of the body may follow."""
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 408, "headers": headers})
    await send({"type": "http.response.body", "body": render(scope["path"], SLOW), "more_body": False})


class WholeStreams:
    """Ends what a lost replica leaves unfinished: a stream with an error event, a reply that has not begun with 503."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = is_stream = has_ended = is_gone = False

        async def watch() -> Message:
            nonlocal is_gone
            message = await receive()
            is_gone |= message["type"] == "http.disconnect"
            return message

        async def forward(message: Message) -> None:
            nonlocal has_begun, is_stream, has_ended
            if message["type"] == "http.response.start":
                has_begun, is_stream = True, _is_event_stream(message)
            elif message["type"] == "http.response.body":
                has_ended = not message.get("more_body", False)
            await send(message)

        await self._app(scope, watch, forward)
        if is_gone or has_ended or (has_begun and not is_stream):
            return  # an unfinished reply that is no stream is cut off, which its client notices
        if has_begun:
            body = b"data: " + render(scope["path"], LOST) + b"\n\n"
        else:
            body = render(scope["path"], LOST)
            headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
            await send({"type": "http.response.start", "status": LOST.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})


def _is_json(scope: Scope) -> bool:
    """Whether a body may be JSON; clients such as curl send another type if they are not asked to."""
    return not _content_type(scope).startswith(b"multipart/")


def _is_event_stream(start: Message) -> bool:
    return _content_type(start).startswith(b"text/event-stream")


def _content_type(message: Scope | Message) -> bytes:
    return next((bytes(value) for name, value in message.get("headers", ()) if name.lower() == b"content-type"), b"")


def render(path: str, error: PreludeError) -> bytes:
    """An error in the format of the path's front end; a test compares it with what the app renders."""
    body: dict[str, Any]
    if path == "/v1" or path.startswith("/v1/"):
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        body = {"error": {"message": str(error), "type": kind, "param": None, "code": error.code}}
    else:
        body = {"error": error.message, "error_type": error.family, "code": error.code, "remedy": error.remedy}
    return json.dumps(body).encode()
