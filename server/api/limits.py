"""Limits on bodies, enforced while they arrive: pure ASGI, so streams pass through untouched.

Here it is the size alone, of one body and of all bodies together; `bodies.py` and `forms.py` limit what a body is made
of.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import Overloaded, PayloadTooLarge

MAX_JSON_BYTES = 4 * 2**20
"""Of bodies that bring texts or token ids, and all others but these:"""
MAX_ORDER_BYTES = 2**20
"""Of bodies that ask for a job."""
MULTIPART_OVERHEAD = 64 * 2**10
"""Boundaries and part headers around an upload's files."""
MAX_DATA_BYTES = 256 * 2**20
"""Files of a job."""

FREE_BYTES = 2**16
"""Of each body, which are never held against what all bodies may hold: ordinary requests pass beside large ones."""
FORM_BYTES = 2**20
"""Of a form, which are kept in memory at most; its files lie on the disk."""

_UPLOAD = re.compile(r"PUT /prompts/[^/]+/?")


class BodyLimit:
    """Refuses bodies over a limit with 413: at once where Content-Length tells, else when the limit is passed.

    What the bodies of all requests under way hold in memory has a limit too; a body that would exceed it gets 429. A
    body counts until its request has been answered, as far as it has come.
    """

    def __init__(self, app: ASGIApp, max_upload_bytes: int, memory: int, job_paths: Sequence[str] = ()) -> None:
        """Wrap an app.

        Args:
            app: the app.
            max_upload_bytes: of the files of a soft prompt.
            memory: what all bodies may hold together, in bytes.
            job_paths: of each kind of job.
        """
        self._app = app
        self._job_paths = job_paths
        self._max_upload_bytes = max_upload_bytes
        self._memory = memory
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        is_form = parse_options_header(headers.get("content-type"))[0] == b"multipart/form-data"
        limit, remedy = self._limit(f"{scope['method']} {scope['path']}", is_form)
        declared = headers.get("content-length", "0")
        received = int(declared[:20]) if declared.isdecimal() and int(declared[:20]) > limit else 0
        held = 0

        async def limited_receive() -> Message:
            nonlocal received, held
            if received <= limit:
                message = await receive()
                received += len(message.get("body", b""))
                if received <= limit:
                    more = max(0, min(received, FORM_BYTES if is_form else received) - FREE_BYTES) - held
                    self._hold(more)
                    held += more
                    return message
            raise PayloadTooLarge(f"The body has more than {limit:,} bytes.", remedy=remedy)

        try:
            await self._app(scope, limited_receive, send)
        finally:
            self._held -= held

    def _hold(self, more: int) -> None:
        """Count what has come of a body; refuse it if all of them would hold too much."""
        if more > 0 and self._held + more > self._memory:
            raise Overloaded(
                f"The bodies of all requests under way would hold more than {self._memory:,} bytes.",
                remedy="Send the request again after the seconds in Retry-After, or in parts: bodies up to "
                f"{FREE_BYTES:,} bytes are always taken.",
            )
        self._held += more

    def _limit(self, asked: str, is_form: bool) -> tuple[int, str]:
        """Most bytes of a request's body, and what to do about more."""
        if _UPLOAD.fullmatch(asked):
            most = self._max_upload_bytes + MULTIPART_OVERHEAD
            return most, "Send a smaller soft prompt, or raise PRELUDE_MAX_UPLOAD_BYTES."
        if is_form and asked.rstrip("/") in [f"POST {path}" for path in self._job_paths]:
            return MAX_DATA_BYTES, "Send a sample of the rows; training reads no more than its steps take."
        return json_limit(asked, self._job_paths), "Send the text in several requests."


def json_limit(asked: str, job_paths: Sequence[str]) -> int:
    """Most bytes of the JSON of a request, which is given as its method and path."""
    path = asked.partition(" ")[2] + "/"
    return MAX_ORDER_BYTES if path.startswith(tuple(f"{one}/" for one in job_paths)) else MAX_JSON_BYTES
