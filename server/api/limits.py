"""A limit on the size of bodies, enforced while they arrive: pure ASGI, so streams pass through untouched."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import PayloadTooLarge

MAX_JSON_BYTES = 4 * 2**20
MULTIPART_OVERHEAD = 64 * 2**10
"""Boundaries and part headers around an upload's files."""


class BodyLimit:
    """Refuses bodies over a limit with 413: at once where Content-Length tells, else when the limit is passed."""

    def __init__(self, app: ASGIApp, max_upload_bytes: int) -> None:
        """Wrap an app."""
        self._app = app
        self._max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        upload = scope["method"] == "PUT" and scope["path"].startswith("/prompts/")
        limit = self._max_upload_bytes + MULTIPART_OVERHEAD if upload else MAX_JSON_BYTES
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        received = int(declared) if declared.isdigit() and int(declared) > limit else 0

        async def limited_receive() -> Message:
            nonlocal received
            if received <= limit:
                message = await receive()
                received += len(message.get("body", b""))
                if received <= limit:
                    return message
            raise PayloadTooLarge(
                f"The body has more than {limit:,} bytes.",
                remedy="Send a smaller soft prompt, or raise PRELUDE_MAX_UPLOAD_BYTES."
                if upload
                else "Send the text in several requests.",
            )

        await self._app(scope, limited_receive, send)
