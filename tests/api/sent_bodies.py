"""Bodies that are read without a server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData

from server.api.forms import read_form


async def read(body: bytes, size: Callable[[], int] = lambda: 2**16, boundary: str = "b") -> FormData:
    """A form whose body comes in pieces of these sizes."""

    async def receive() -> dict[str, Any]:
        return await anext(messages)

    async def pieces() -> AsyncIterator[dict[str, Any]]:
        at = 0
        while at < len(body):
            piece = body[at : at + size()]
            at += len(piece)
            yield {"type": "http.request", "body": piece, "more_body": True}
        yield {"type": "http.request", "body": b"", "more_body": False}

    messages = pieces()
    headers = [(b"content-type", f"multipart/form-data; boundary={boundary}".encode())]
    return await read_form(Request({"type": "http", "headers": headers}, receive))
