"""Limits on bodies, enforced while they arrive: pure ASGI, so streams pass through untouched.

Any body has a limit on its size. An upload's form also has one on its parts, and must come to its end.
"""

from __future__ import annotations

import re

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import InvalidRequest, PayloadTooLarge

MAX_JSON_BYTES = 4 * 2**20
MULTIPART_OVERHEAD = 64 * 2**10
"""Boundaries and part headers around an upload's files."""
MAX_DATA_BYTES = 256 * 2**20
"""Rows of a training job, those to measure on included."""
MAX_FORM_PARTS = 16
"""Parts of an upload. Up to 1 MB one waits in memory, not on disk: their number bounds what an upload takes."""

_UPLOAD = re.compile(r"PUT /prompts/[^/]+/?")
_DATA = re.compile(r"POST /(training/jobs|evaluations)/?")


class BodyLimit:
    """Refuses bodies over a limit with 413: at once where Content-Length tells, else when the limit is passed.

    Of uploads it refuses those that have too many parts, or that end before their closing boundary.
    """

    def __init__(self, app: ASGIApp, max_upload_bytes: int) -> None:
        """Wrap an app."""
        self._app = app
        self._max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        form, limit, remedy = None, MAX_JSON_BYTES, "Send the text in several requests."
        asked = f"{scope['method']} {scope['path']}"
        if _UPLOAD.fullmatch(asked):
            form, limit = FormWatch.of(headers), self._max_upload_bytes + MULTIPART_OVERHEAD
            remedy = "Send a smaller soft prompt, or raise PRELUDE_MAX_UPLOAD_BYTES."
        elif _DATA.fullmatch(asked) and (form := FormWatch.of(headers)) is not None:
            limit, remedy = (
                MAX_DATA_BYTES,
                "Send a sample of the rows; training reads no more than its steps take.",
            )
        declared = headers.get("content-length", "0")
        received = int(declared[:20]) if declared.isdecimal() and int(declared[:20]) > limit else 0

        async def limited_receive() -> Message:
            nonlocal received
            if received <= limit:
                message = await receive()
                received += len(message.get("body", b""))
                if received <= limit:
                    if form is not None:
                        form.follow(message)
                    return message
            raise PayloadTooLarge(f"The body has more than {limit:,} bytes.", remedy=remedy)

        await self._app(scope, limited_receive, send)


class FormWatch:
    """Follows a multipart body as it passes: how many parts it has, and whether it came to its end.

    The parser behind it takes whatever came for the whole: of a body that breaks off it drops the last part without a
    word, and a soft prompt would go live without its template.
    """

    def __init__(self, boundary: bytes) -> None:
        """Begin before the first byte of a body."""
        self._delimiter = b"\r\n--" + boundary
        self._tail = b"\r\n"  # the first delimiter may open the body
        self._parts = 0
        self._is_closed = False

    @classmethod
    def of(cls, headers: Headers) -> FormWatch | None:
        """The watch for a request's body; None if it is no multipart form, or one that the parser cannot begin with."""
        kind, options = parse_options_header(headers.get("content-type"))
        boundary = options.get(b"boundary")
        return cls(boundary) if kind == b"multipart/form-data" and boundary is not None else None

    def follow(self, message: Message) -> None:
        """Look at the body's next piece.

        Raises:
            InvalidRequest: the form has too many parts.
            HTTPException: (400, as for every form that cannot be read) the body is over and the form is not.
        """
        if message["type"] != "http.request" or self._is_closed:  # what comes after the last boundary is no part
            return
        self._search(message.get("body", b""))
        if self._parts > MAX_FORM_PARTS:
            raise InvalidRequest(
                f"The form has more than {MAX_FORM_PARTS} parts.",
                remedy="Send each file and field once.",
            )
        if not self._is_closed and not message.get("more_body", False):
            raise HTTPException(400, "The form is cut off: the body ends before its closing boundary")

    def _search(self, piece: bytes) -> None:
        seen = self._tail + piece
        closing = self._delimiter + b"--"
        end = seen.find(closing)
        self._is_closed = end >= 0
        known = max(0, len(self._tail) - len(self._delimiter) + 1)  # a delimiter within the tail was counted before
        self._parts += seen.count(self._delimiter, known, end if self._is_closed else len(seen))
        if self._is_closed and end < known:
            self._parts -= 1  # that one, it turns out, begins no part
        self._tail = seen[1 - len(closing) :]
